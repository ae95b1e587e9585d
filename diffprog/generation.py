"""Writing with a net: it is shown a prompt, gives scores of the next token, and goes on from there.

Prompt and loop are one jitted program over the streaming state. Prompts are padded on the left to a
power of two, so that a handful of programs serves prompts of all lengths.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.arguments import check_array, check_count
from diffprog.entries import wide
from diffprog.errors import LayerError
from diffprog.layer import Layer
from diffprog.meshes import settled
from diffprog.notation import clip, listed, show
from diffprog.plans import Params, State
from diffprog.transforms.unroll import unrolled

__all__ = ["Generation", "generate", "sample"]

Prompts = Any  # ints (batch, time), or a list of lists of ints

_OF_CHUNKS = frozenset({"mask", "positions", "segments", "attention_mask", "attention_bias"})
NOTHING = -1  # stands where there is no token


class Generation(NamedTuple):
    """What a net wrote.

    Attributes:
        tokens: ints (batch, steps), of `beam_search` (batch, beams, steps); -1 behind the end.
        lengths: how many tokens there are before the end, the stop token included.
        scores: log-probability of the tokens, in nats, as the net has it (at temperature 1).
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


def generate(
    net: Layer, params: Params, prompts: Prompts, steps: int, *, state: State | None = None,
    key: jax.Array | None = None, temperature: float = 0.0, top_k: int | None = None,
    top_p: float | None = None, stop: Sequence[int] = (), **side: Any,
) -> Generation:
    """Go on after prompts: ``token[t] ~ softmax(net(prompt, token[:t]) / temperature)``.

    At temperature 0, the default, each token is the likeliest, and no key is needed.

    Args:
        net: a net that streams and gives scores (batch, time, vocabulary) of the next token.
        params, state: of the net.
        prompts: ints (batch, time), or a list of lists of ints, which may differ in length.
        steps: how many tokens at most; positive.
        key: the same key gives the same tokens.
        temperature: 0, or at least 1e-30.
        top_k: of the likeliest tokens alone; between 1 and the vocabulary.
        top_p: of the likeliest tokens that make up this probability alone, in (0, 1]. It is
            measured after temperature and top_k.
        stop: ids that end a text. When all texts have ended, the loop does.
        side: `memory` and `memory_mask` of an encoder-decoder, ``memory =
            net.children["encoder"](params["encoder"], source, mask=source_mask)`` and
            ``memory_mask=source_mask``; without the masks padding is read like the rest. Of a
            wrapped net, whose parameters `ema` or `quantize` computes, ``memory = dp.tap(net,
            "encoder")(params, ids, state=state, source=source, source_mask=source_mask)[1]
            ["encoder"]`` with any `ids` (batch, time). Other side inputs are given unchanged at
            every step.

    Raises:
        LayerError: an argument is out of its range; a prompt is empty, or with `steps` longer than
            the net can go; prompts of different lengths and a net that takes no mask; scores that
            are NaN, for which NaN parameters or ids outside the vocabulary are to blame.

    Example:
        >>> net = dp.gpt(11, length=8, width=16, depth=2, heads=4)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((1, 8), int))
        >>> written = dp.generate(net, params, [[1, 2, 3], [4]], 5, stop=[10])
        >>> written.tokens.shape, written.lengths.shape
        ((2, 5), (2,))

    Source: top_k: Fan, Lewis, Dauphin 2018, arXiv:1805.04833, section 5.3; top_p: Holtzman et al.
    2020, arXiv:1904.09751, section 3.1.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature > 0 and key is None:
        raise LayerError("a key at a temperature above 0", "none",
                         "pass key=jax.random.key(seed), or temperature=0.0 for the likeliest")
    begin = begun(net, params, state, prompts, steps, side)
    choose = {"greedy": temperature == 0, "top_k": top_k}
    numbers = {"temperature": float(temperature), "top_p": None if top_p == 1 else top_p}
    key = key if temperature > 0 else None
    found = _generated(begin, key, numbers, steps=steps, stop=as_ids(stop), **choose, net=net)
    return checked(found)


def sample(
    key: jax.Array, logits: jax.Array, *, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draw ids: ``id ~ softmax(logits / temperature)``, of the likeliest alone.

    Shapes:
        logits: (..., vocabulary) -> ints (...), -1 where a logit is NaN.

    Args:
        key, temperature, top_k, top_p: as in `generate`; at temperature 0 the first of the
            likeliest, whatever the key is.

    Raises:
        LayerError: an argument is out of its range.

    Example:
        >>> int(dp.sample(jax.random.key(0), jnp.array([0.0, 9.0, 1.0]), top_k=1))
        1
    """
    _check_sampling(temperature, top_k, top_p)
    check_array(logits, 1, "(..., vocabulary)")
    known = ~jnp.isnan(logits).any(-1)
    if temperature == 0:
        return jnp.where(known, logits.argmax(-1), NOTHING)
    numbers = {"temperature": temperature, "top_p": None if top_p == 1 else top_p}
    return jnp.where(known, _drawn(key, logits, numbers, top_k), NOTHING)


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
    check_count("steps", steps)
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


def written_out(
    net: Layer, begin: Begin, state: State, steps: int
) -> tuple[Layer, Begin, State]:
    """The net, its trees and its stream with repeats written out, where that is faster."""
    if jax.default_backend() != "cpu":
        return net, begin, state  # there it costs memory: a second copy of the parameters
    net, split = unrolled(net)
    begin = begin._replace(params=split(begin.params), state=split(begin.state))
    return net, begin, split(state)


def prompted(net: Layer, begin: Begin, steps: int) -> tuple[State, jax.Array, dict[str, Any]]:
    """The state after the prompt, the scores of the next token, and what is given at each step."""
    ids = jnp.asarray(begin.ids)
    length = ids.shape[1] + steps - 1  # the last token is written and never read
    state = started(net, length, begin.params, begin.state, ids[:, :1], begin.side)
    each = {name: value for name, value in begin.side.items() if name not in net.kept}
    logits, state = net.apply(begin.params, state, ids, mask=begin.mask, **each)
    check_array(logits)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise LayerError("a net that gives (batch, time, vocabulary) for "
                         f"{show(ids)}", show(logits),
                         "return the scores of each token's successor")
    return state, logits[:, -1], each


@functools.partial(jax.jit, static_argnames=("net", "steps", "greedy", "top_k", "stop"))
def _generated(
    begin: Begin, key: Any, numbers: dict[str, Any], *, net: Layer, steps: int, greedy: bool,
    top_k: int | None, stop: tuple[int, ...],
) -> Generation:
    """Prompt and loop of `generate`."""
    state, logits, each = prompted(net, begin, steps)
    net, begin, state = written_out(net, begin, state, steps)
    batch, vocabulary = logits.shape
    check_ids(stop, top_k, vocabulary)

    def chosen(step: Any, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next token, and its log-probability."""
        token = logits.argmax(-1) if greedy else _drawn(
            jax.random.fold_in(key, step), logits, numbers, top_k)
        return token.astype(jnp.int32), _surprise(logits, token)

    def put(found: Generation, step: Any, token: Any, score: Any, alive: Any) -> Any:
        """Write a token where a text goes on; NaN ends it."""
        written = jnp.where(alive & ~jnp.isnan(score), token, NOTHING)
        found = Generation(
            jax.lax.dynamic_update_index_in_dim(found.tokens, written, step, 1),
            found.lengths + alive, jnp.where(alive, found.scores + score, found.scores))
        return found, alive & ~jnp.isnan(score) & ~among(token, stop)

    def body(carry: Any) -> Any:
        step, token, alive, state, found = carry
        logits, state = net.apply(begin.params, state, token[:, None], **each)
        token, score = chosen(step, logits[:, 0])
        found, alive = put(found, step, token, score, alive)
        return step + 1, token, alive, state, found

    token, score = chosen(0, logits)
    nothing = Generation(jnp.full((batch, steps), NOTHING, jnp.int32),
                         jnp.zeros(batch, jnp.int32), jnp.zeros(batch, score.dtype))
    found, alive = put(nothing, 0, token, score, jnp.ones(batch, bool))
    going = lambda carry: (carry[0] < steps) & carry[2].any()  # noqa: E731
    begun = settled(lambda carry, _: body(carry), (jnp.int32(1), token, alive, state, found))
    return jax.lax.while_loop(going, body, begun)[-1]


def _drawn(
    key: jax.Array, logits: jax.Array, numbers: dict[str, Any], top_k: int | None
) -> jax.Array:
    """Draw of the likeliest; nothing is sorted where all tokens may be drawn."""
    logits = wide(logits) / numbers["temperature"]
    if top_k is None and numbers["top_p"] is None:
        return jax.random.categorical(key, logits)
    logits, order = jax.lax.top_k(logits, logits.shape[-1] if top_k is None else top_k)
    if numbers["top_p"] is not None:
        shares = jax.nn.softmax(logits)
        logits = jnp.where(shares.cumsum(-1) - shares < numbers["top_p"], logits, -jnp.inf)
    place = jax.random.categorical(key, logits)
    return jnp.take_along_axis(order, place[..., None], axis=-1)[..., 0]


def _surprise(logits: jax.Array, token: jax.Array) -> jax.Array:
    """The log-probability of a token."""
    logits = wide(logits)
    own = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def among(token: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Is a token one of the ids?"""
    return (token[..., None] == jnp.asarray(ids, jnp.int32)).any(-1)


def as_ids(stop: Sequence[int]) -> tuple[int, ...]:
    """The stop tokens as ints, by which programs are remembered."""
    if np.ndim(stop) != 1 or isinstance(stop, str):
        raise LayerError("stop as a sequence of ids", repr(stop), "pass stop=[0], for example")
    return tuple(int(token) for token in stop)


def check_ids(stop: tuple[int, ...], top_k: int | None, vocabulary: int) -> None:
    """Raise for what a vocabulary of this size does not have."""
    if wrong := [token for token in stop if not 0 <= token < vocabulary]:
        raise LayerError(f"stop tokens in [0, {vocabulary})", repr(wrong[0]),
                         "leave it out: the net can never write it")
    if top_k is not None and top_k > vocabulary:
        raise LayerError(f"top_k of at most {vocabulary}, the vocabulary", repr(top_k), "lower it")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if temperature != 0 and not 1e-30 <= temperature < math.inf:  # less is 0 in float32
        raise LayerError("temperature as 0 or a number of at least 1e-30", repr(temperature),
                         "choose 0 for the likeliest token, 1 to draw as the net says")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise LayerError("top_p in (0, 1]", repr(top_p),
                         "pass a probability, or None to leave it out")


def checked(found: Generation) -> Generation:
    """What was written, unless scores were NaN."""
    if isinstance(found.scores, Tracer):
        return found
    if (wrong := np.isnan(found.scores).reshape(len(found.scores), -1).any(1)).any():
        raise LayerError("scores that are numbers", f"NaN for prompt {int(wrong.argmax())}",
                         "look for ids outside the vocabulary, and for NaN in the parameters by "
                         "tree.nonfinite(params)")
    return found
