"""Prompts: padding on the left to a shared width, and the stream that begins with them."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import is_int
from diffprog.core.errors import LayerError
from diffprog.core.guards import taken
from diffprog.core.layer import Layer, check_layer
from diffprog.core.notation import clip, listed, show
from diffprog.core.plans import Params, State
from diffprog.transforms.unroll import unrolled

Prompts = Any  # ints (batch, time), or a list of lists of ints

# Side inputs with a time axis: they would change from step to step.
_PER_STEP = frozenset({"mask", "positions", "segments", "attention_mask", "attention_bias"})
NO_TOKEN = -1  # in the padding, and after the end of a text

# The longest stream that each net is known to take, and the shortest that it is known to refuse.
_reach: weakref.WeakKeyDictionary[Layer, tuple[int, int]] = weakref.WeakKeyDictionary()


class PromptBatch(NamedTuple):
    """Parameters, state and padded prompts: the inputs of a program."""

    params: Params
    state: State
    ids: Any  # ints (batch, width), padded on the left
    mask: Any  # booleans (batch, width), or None if the net takes no mask
    side: dict[str, Any]


def prepare(
    net: Layer, params: Params, state: State | None, prompts: Prompts, steps: int,
    side: dict[str, Any],
) -> PromptBatch:
    """Checked arguments, with prompts padded to a width that many prompts share."""
    check_layer(net, "generate(net, params, prompts, max_tokens)")
    check_count("max_tokens", steps)
    steps = int(steps)  # a NumPy int would overflow below
    side = {name: value for name, value in side.items() if value is not None}
    _check_side(net, side)
    state = {} if state is None else state
    ids, mask = _padded(prompts)
    longest = ids.shape[1]

    def check_stream(width: int) -> None:
        """Raise unless the net streams `steps` tokens after a prompt of this width."""
        jax.eval_shape(functools.partial(start_stream, net, width + steps - 1), params, state,
                       ids[:, :1], side)

    if "mask" not in net.side:
        check_stream(longest)
        if not mask.all():
            raise LayerError("prompts of one length for a net without mask",
                             clip(f"lengths {mask.sum(1).tolist()}"),
                             "pass one prompt at a time")
        return PromptBatch(params, state, ids, None, side)
    power_of_two = 1 << (longest - 1).bit_length()
    width = _shared_width(net, longest, power_of_two, steps, check_stream)
    padding = ((0, 0), (width - longest, 0))
    return PromptBatch(params, state, np.pad(ids, padding), np.pad(mask, padding), side)


def _check_side(net: Layer, side: dict[str, Any]) -> None:
    """Raise for side inputs that change from step to step, or that the net does not take."""
    if wrong := side.keys() & _PER_STEP:
        raise LayerError("side inputs without a time axis", listed(wrong), "give prompts of "
                         "different lengths as a list of lists: they are padded and masked here")
    if "source" in side and "memory" in net.side:
        # The children of a net with computed parameters do not take its parameters.
        encoded = ('dp.tap(net, "encoder")(params, ids, state=state, source=source, '
                   'source_mask=source_mask)[1]["encoder"]' if net.computed else
                   'net.children["encoder"](params["encoder"], source, mask=source_mask)')
        raise LayerError("memory in place of source", show(side["source"]),
                         f"encode it once: memory={encoded}, memory_mask=source_mask")
    taken(net, side)  # before a jitted program receives a value that is no array


def _shared_width(
    net: Layer, longest: int, wanted: int, steps: int, check_stream: Callable[[int], None]
) -> int:
    """The width of the padded prompts: `wanted`, or the largest below that the net can stream.

    Raises if the net cannot stream the longest prompt. Results are cached by net.
    """
    fits, refused = (length - steps + 1 for length in _reach.get(net, (0, sys.maxsize)))
    if longest > fits:
        check_stream(longest)
        fits = longest
    while fits < wanted and refused - fits > 1:  # bisection
        width = wanted if refused > wanted else (fits + refused) // 2
        try:
            check_stream(width)
            fits = width
        except LayerError:
            refused = width
    _reach[net] = (fits + steps - 1, refused + steps - 1)
    return min(fits, wanted)


def _padded(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Ids (batch, longest), padded on the left, and the mask of valid ones."""
    if any(isinstance(row, Tracer) for row in (prompts, *jax.tree.leaves(prompts))):
        raise LayerError("prompts of concrete ids", show(prompts),
                         "call it outside of jax.jit: it is one compiled program already, and "
                         "an export is one of net.start and net.apply")
    rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 for row in rows):
        raise LayerError("prompts as ints (batch, time) or a list of lists of ints",
                         show(prompts), "pass a single prompt as a batch of one: [prompt]")
    if empty := [i for i, row in enumerate(rows) if not row.size]:
        raise LayerError("at least one token in each prompt", f"an empty prompt, number {empty[0]}",
                         "begin with the id of the start token")
    if any(not is_int(row) or row.min() < 0 or row.max() >= 2**31 for row in rows):
        raise LayerError("prompts of ids, ints from 0 to 2**31 - 1", show(prompts),
                         "encode the text first")
    lengths = np.array([row.size for row in rows])
    longest = int(lengths.max())
    ids = np.stack([np.pad(row, (longest - row.size, 0)) for row in rows]).astype(np.int32)
    return ids, np.arange(longest) >= (longest - lengths)[:, None]


def start_stream(
    net: Layer, length: int, params: Params, state: State, first: Any, side: dict[str, Any]
) -> State:
    """The state of a stream of `length` steps; a net without `start` has no such state."""
    return net.start(params, state, first, length=length, **side) if net.start else state


def prefill(
    net: Layer, prompt: PromptBatch, steps: int
) -> tuple[State, jax.Array, dict[str, Any]]:
    """The state after the prompt, the next-token logits, and the side inputs of each step."""
    ids = jnp.asarray(prompt.ids)
    length = ids.shape[1] + steps - 1  # the last token is never an input
    state = start_stream(net, length, prompt.params, prompt.state, ids[:, :1], prompt.side)
    side = {name: value for name, value in prompt.side.items() if name not in net.kept}
    logits, state = net.apply(prompt.params, state, ids, mask=prompt.mask, **side)
    check_logits_shape(logits, ids)
    return state, logits[:, -1], side


def check_logits_shape(logits: Any, ids: jax.Array) -> None:
    """Raise unless the logits are (batch, time, vocabulary)."""
    check_array(logits)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise LayerError(f"a net that returns logits (batch, time, vocabulary) for {show(ids)}",
                         show(logits), "return next-token logits at each step")


def unroll_repeats(
    net: Layer, prompt: PromptBatch, state: State
) -> tuple[Layer, PromptBatch, State]:
    """The net, its trees and its stream with each `repeat` unrolled, on CPU, where it is faster."""
    if jax.default_backend() != "cpu":
        return net, prompt, state  # there it costs memory: a second copy of the parameters
    net, split = unrolled(net)
    prompt = prompt._replace(params=split(prompt.params), state=split(prompt.state))
    return net, prompt, split(state)
