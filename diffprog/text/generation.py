"""Writing with a net: it is shown a prompt, gives scores of the next token, and goes on from there.

Prompt and loop are one jitted program over the streaming state. Prompts are padded on the left to a
power of two, so that a handful of programs serves prompts of all lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import settled
from diffprog.core.notation import code, show
from diffprog.core.plans import Params, State
from diffprog.losses.entries import wide
from diffprog.text.listening import Callback, heard, tell
from diffprog.text.prompts import NOTHING, Begin, Prompts, begun, prompted, written_out
from diffprog.text.sampling import (
    Temperature,
    check_keys,
    check_sampling,
    check_top_k,
    drawn,
    is_greedy,
    numbers,
    over_keys,
    surprise,
)
from diffprog.text.stops import Stop, as_stop, check_stop, ending

__all__ = ["Generation", "generate"]

Adjust = Callable[[jax.Array, jax.Array], jax.Array]


class Generation(NamedTuple):
    """What a net wrote.

    Attributes:
        tokens: ints (batch, max_tokens), of `beam_search` (batch, beams, max_tokens); -1 after the
            end.
        lengths: how many tokens there are before the end, the tokens of a stop included.
        log_probs: log-probability of the tokens, in nats, as the net has it (at temperature 1), or
            `adjust` makes it.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array


def generate(
    net: Layer, params: Params, prompts: Prompts, max_tokens: int, *, state: State | None = None,
    key: jax.Array | None = None, temperature: Temperature = 0.0, top_k: int | None = None,
    top_p: float | None = None, stop_tokens: Sequence[int | Sequence[int]] = (),
    adjust: Adjust | None = None, callback: Callback | None = None, **side: Any,
) -> Generation:
    """Go on after prompts: ``token[t] ~ softmax(net(prompt, token[:t]) / temperature)``.

    At temperature 0, the default, each token is the likeliest, and no key is needed.

    Args:
        net: a net that streams and gives scores (batch, time, vocabulary) of the next token.
        params, state: of the net.
        prompts: ints (batch, time), or a list of lists of ints, which may differ in length.
        max_tokens: how many at most; positive.
        key: the same key gives the same tokens. With keys (batch,), one for each prompt, such as
            ``jax.random.split(key, batch)``, a prompt draws what it draws alone with its key.
        temperature: 0, or at least 1e-30; one for all, or (batch,), one for each prompt.
        top_k: of the likeliest tokens alone; between 1 and the vocabulary.
        top_p: of the likeliest tokens that make up this probability alone, in (0, 1]. It is
            measured after temperature and top_k.
        stop_tokens: what ends a text: ids, and sequences of ids, written one after the other.
            When all texts have ended, the loop does.
        adjust: ``(logits, text) -> logits``, what the scores (rows, vocabulary) of the next token
            become before anything is drawn; `text` is ints (rows, length), prompt and all that was
            written, with -1 where no token stands. Define it once: each function has its own
            program.
        callback: ``(step, tokens)``, called with the ints (batch,) of each step as they come, -1
            behind the end. All calls are over when `generate` returns; what it raises is raised
            then.
        side: `memory` and `memory_mask` of an encoder-decoder, ``memory =
            net.children["encoder"](params["encoder"], source, mask=source_mask)`` and
            ``memory_mask=source_mask``; without the masks padding is read like the rest. Of a
            wrapped net, whose parameters `ema` or `quantize` computes, ``memory = dp.tap(net,
            "encoder")(params, ids, state=state, source=source, source_mask=source_mask)[1]
            ["encoder"]`` with any `ids` (batch, time). Other side inputs are given unchanged at
            every step.

    Raises:
        LayerError: an argument is out of its range; a prompt is empty, or with `max_tokens` longer
            than the net can go; prompts of different lengths and a net that takes no mask; logits
            that are NaN, for which NaN parameters or ids outside the vocabulary are to blame.

    Example:
        >>> net = dp.models.gpt(11, length=8, width=16, depth=2, heads=4)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((1, 8), int))
        >>> written = dp.text.generate(net, params, [[1, 2, 3], [4]], 5, stop_tokens=[10, [7, 7]])
        >>> written.tokens.shape, written.lengths.shape
        ((2, 5), (2,))
        >>> def repeat_less(logits, text):  # the penalty of Keskar et al. 2019, section 4.1
        ...     seen = jax.nn.one_hot(text, logits.shape[-1], dtype=bool).any(1)
        ...     return jnp.where(seen, jnp.where(logits > 0, logits / 1.2, logits * 1.2), logits)
        >>> dp.text.generate(net, params, [[1, 2, 3]], 5, adjust=repeat_less).tokens.shape
        (1, 5)

    Source: top_k: Fan, Lewis, Dauphin 2018, arXiv:1805.04833, section 5.3; top_p: Holtzman et al.
    2020, arXiv:1904.09751, section 3.1; the penalty: Keskar et al. 2019, arXiv:1909.05858.
    """
    begin = begun(net, params, state, prompts, max_tokens, side)
    check_adjust(adjust)
    rows = begin.ids.shape[:1]
    check_sampling(temperature, top_k, top_p, rows)
    greedy = is_greedy(temperature)
    if not greedy and key is None:
        raise LayerError("a key at a temperature above 0", "none",
                         "pass key=jax.random.key(seed), or temperature=0.0 for the likeliest")
    if not greedy:
        check_keys(key, rows)
    given = None if greedy else key, numbers(temperature, top_p)
    return checked(heard(callback, lambda listener: _generated(
        begin, *given, listener, steps=max_tokens, stop=as_stop(stop_tokens), greedy=greedy,
        top_k=top_k, adjust=adjust, net=net)))


@functools.partial(
    jax.jit, static_argnames=("net", "steps", "greedy", "top_k", "stop", "adjust"))
def _generated(
    begin: Begin, key: Any, numbers: dict[str, Any], listener: Any, *, net: Layer, steps: int,
    greedy: bool, top_k: int | None, stop: Stop, adjust: Adjust | None,
) -> Generation:
    """Prompt and loop of `generate`."""
    state, logits, each = prompted(net, begin, steps)
    prompt = shown(begin)
    net, begin, state = written_out(net, begin, state)
    batch, vocabulary = logits.shape
    check_stop(stop, vocabulary)
    check_top_k(top_k, vocabulary)

    def chosen(step: Any, logits: jax.Array, found: Generation) -> tuple[jax.Array, jax.Array]:
        """The next token, and its log-probability."""
        logits = adjusted(adjust, logits, prompt, found.tokens)
        token = logits.argmax(-1) if greedy else drawn(
            over_keys(key, lambda key: jax.random.fold_in(key, step))(key), logits, numbers, top_k)
        return token.astype(jnp.int32), surprise(logits, token)

    def put(found: Generation, step: Any, token: Any, score: Any, alive: Any) -> Any:
        """Write a token where a text goes on; NaN ends it."""
        ends = [(token == last) & here for last, here in ending(found.tokens, step, stop).items()]
        written = jnp.where(alive & ~jnp.isnan(score), token, NOTHING)
        tell(listener, step, written)
        found = Generation(
            jax.lax.dynamic_update_index_in_dim(found.tokens, written, step, 1),
            found.lengths + alive.astype(jnp.int32),
            jnp.where(alive, found.log_probs + score, found.log_probs))
        return found, functools.reduce(lambda going, end: going & ~end, ends,
                                       alive & ~jnp.isnan(score))

    def body(carry: Any) -> Any:
        step, token, alive, state, found = carry
        logits, state = net.apply(begin.params, state, token[:, None], **each)
        token, score = chosen(step, logits[:, 0], found)
        found, alive = put(found, step, token, score, alive)
        return step + 1, token, alive, state, found

    nothing = Generation(jnp.full((batch, steps), NOTHING, jnp.int32),
                         jnp.zeros(batch, jnp.int32), jnp.zeros(batch, wide(logits).dtype))
    first = jnp.int32(0)
    token, score = chosen(first, logits, nothing)
    found, alive = put(nothing, first, token, score, jnp.ones(batch, bool))
    going = lambda carry: (carry[0] < steps) & carry[2].any()  # noqa: E731
    begun = settled(lambda carry, _: body(carry), (first + 1, token, alive, state, found))
    return jax.lax.while_loop(going, body, begun)[-1]


def shown(begin: Begin) -> jax.Array:
    """The prompts (batch, time), with -1 where they are padded."""
    ids = jnp.asarray(begin.ids)
    return ids if begin.mask is None else jnp.where(begin.mask, ids, NOTHING)


def check_adjust(adjust: Any) -> None:
    """Raise unless it is a function by which a program can be remembered."""
    if adjust is None:
        return
    if not callable(adjust):
        raise LayerError("adjust as a function (logits, text)", code(adjust),
                         "pass lambda logits, text: logits / 2, for example")
    try:
        hash(adjust)
    except TypeError:
        raise LayerError("adjust as a function that has a hash", code(adjust),
                         "write @dataclass(frozen=True), or pass a plain function: its program is "
                         "remembered by it") from None


def adjusted(
    adjust: Adjust | None, logits: jax.Array, prompt: jax.Array, written: jax.Array
) -> jax.Array:
    """What `adjust` makes of the scores, shown all that was read and written."""
    if adjust is None:
        return logits
    found = adjust(logits, jnp.concatenate([prompt, written], -1))
    if getattr(found, "shape", None) != logits.shape:
        raise LayerError(f"adjust to give the scores again, {show(logits)}", show(found),
                         "return one for each token of each row")
    return found


def checked(found: Generation) -> Generation:
    """What was written, unless scores were NaN."""
    if isinstance(found.log_probs, Tracer):
        return found
    if (wrong := np.isnan(found.log_probs).reshape(len(found.log_probs), -1).any(1)).any():
        raise LayerError("scores that are numbers", f"NaN for prompt {int(wrong.argmax())}",
                         "look for ids outside the vocabulary, for an adjust that leaves no token, "
                         "and for NaN in the parameters by tree.nonfinite(params)")
    return found
