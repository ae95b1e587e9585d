"""Prompts, padded on the left to a length that many share, and the stream that begins with them."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.core.arguments import check_array, check_count
from diffprog.core.errors import LayerError
from diffprog.core.guards import taken
from diffprog.core.layer import Layer, check_layer
from diffprog.core.notation import clip, listed, show
from diffprog.core.plans import Params, State
from diffprog.transforms.unroll import unrolled

Prompts = Any  # ints (batch, time), or a list of lists of ints

_OF_CHUNKS = frozenset({"mask", "positions", "segments", "attention_mask", "attention_bias"})
NOTHING = -1  # stands where there is no token


# The longest stream that each net is known to take, and the shortest that it is known to refuse.
_reach: weakref.WeakKeyDictionary[Layer, tuple[int, int]] = weakref.WeakKeyDictionary()


class Begin(NamedTuple):
    """What both loops begin with: trees, padded prompts, which of their ids are real, the rest."""

    params: Params
    state: State
    ids: Any
    mask: Any
    side: dict[str, Any]


def begun(
    net: Layer, params: Params, state: State | None, prompts: Prompts, steps: int,
    side: dict[str, Any],
) -> Begin:
    """Prompts as one array, padded to a length that many prompts share."""
    check_layer(net, "generate(net, params, prompts, max_tokens)")
    check_count("max_tokens", steps)
    steps = int(steps)  # a number of NumPy would overflow below
    side = {name: value for name, value in side.items() if value is not None}
    if wrong := side.keys() & _OF_CHUNKS:
        raise LayerError("side inputs that hold for all steps", listed(wrong), "give prompts of "
                         "different lengths as a list of lists: they are padded and masked here")
    if "source" in side and "memory" in net.side:
        # What a wrapper makes of parameters, the children that it shows do not know.
        encoded = ('dp.tap(net, "encoder")(params, ids, state=state, source=source, '
                   'source_mask=source_mask)[1]["encoder"]' if net.computed else
                   'net.children["encoder"](params["encoder"], source, mask=source_mask)')
        raise LayerError("memory in place of source", show(side["source"]),
                         f"encode it once: memory={encoded}, memory_mask=source_mask")
    taken(net, side)  # before a program is handed what is no array
    state = {} if state is None else state
    ids, real = _padded(prompts)
    longest = ids.shape[1]

    def trial(width: int) -> None:
        """Raise if the net does not stream as far as a prompt of this width takes it."""
        jax.eval_shape(functools.partial(started, net, width + steps - 1), params, state,
                       ids[:, :1], side)

    took, refused = (length - steps + 1 for length in _reach.get(net, (0, sys.maxsize)))
    if longest > took:
        trial(longest)
        took = longest
    if "mask" not in net.side:
        if not real.all():
            raise LayerError("prompts of one length, for a net without mask",
                             clip(f"lengths {real.sum(1).tolist()}"),
                             "write to one prompt at a time")
        return Begin(params, state, ids, None, side)
    power = 1 << (longest - 1).bit_length()
    while took < power and refused - took > 1:  # as wide as the net allows, if that is less
        width = power if refused > power else (took + refused) // 2
        try:
            trial(width)
            took = width
        except LayerError:
            refused = width
    _reach[net] = (took + steps - 1, refused + steps - 1)
    width = min(took, power)
    before = ((0, 0), (width - longest, 0))
    return Begin(params, state, np.pad(ids, before), np.pad(real, before), side)


def _padded(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Ids (batch, time), ragged rows padded on the left, and which of them are real."""
    if any(isinstance(row, Tracer) for row in (prompts, *jax.tree.leaves(prompts))):
        raise LayerError("prompts of ids that are known", show(prompts),
                         "call it outside of jax.jit: it is one compiled program itself, and to "
                         "be exported are net.start and net.apply")
    rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 for row in rows):
        raise LayerError("prompts as ints (batch, time) or a list of lists of ints",
                         show(prompts), "pass one prompt alone as a batch of one: [prompt]")
    if empty := [i for i, row in enumerate(rows) if not row.size]:
        raise LayerError("at least one token in each prompt", f"an empty prompt, number {empty[0]}",
                         "begin with the id that stands before a text")
    if any(not np.issubdtype(row.dtype, np.integer) or row.min() < 0 or row.max() >= 2**31
           for row in rows):
        raise LayerError("prompts of ids, ints from 0 to 2**31 - 1", show(prompts),
                         "encode the text first")
    longest = max(row.size for row in rows)
    ids = np.stack([np.pad(row, (longest - row.size, 0)) for row in rows]).astype(np.int32)
    missing = longest - np.array([row.size for row in rows])
    return ids, np.arange(longest) >= missing[:, None]


def started(
    net: Layer, length: int, params: Params, state: State, first: Any, side: dict[str, Any]
) -> State:
    """The state of a stream of so many steps; a net that mixes no positions needs none."""
    return net.start(params, state, first, length=length, **side) if net.start else state


def prompted(net: Layer, begin: Begin, steps: int) -> tuple[State, jax.Array, dict[str, Any]]:
    """The state after the prompt, the scores of the next token, and what is given at each step."""
    ids = jnp.asarray(begin.ids)
    length = ids.shape[1] + steps - 1  # the last token is written and never read
    state = started(net, length, begin.params, begin.state, ids[:, :1], begin.side)
    each = {name: value for name, value in begin.side.items() if name not in net.kept}
    logits, state = net.apply(begin.params, state, ids, mask=begin.mask, **each)
    check_scores(logits, ids)
    return state, logits[:, -1], each


def check_scores(logits: Any, ids: jax.Array) -> None:
    """Raise unless they are scores of all tokens."""
    check_array(logits)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise LayerError("a net that gives (batch, time, vocabulary) for "
                         f"{show(ids)}", show(logits),
                         "return the scores of each token's successor")


def written_out(net: Layer, begin: Begin, state: State) -> tuple[Layer, Begin, State]:
    """The net, its trees and its stream with repeats written out, where that is faster."""
    if jax.default_backend() != "cpu":
        return net, begin, state  # there it costs memory: a second copy of the parameters
    net, split = unrolled(net)
    begin = begin._replace(params=split(begin.params), state=split(begin.state))
    return net, begin, split(state)
