"""Generation: a net reads a prompt, and each token it generates is its next input.

The prompt and the loop are one jitted program over the streaming state. Prompts are padded on the
left to a power of two, so that a few programs serve prompts of all lengths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from diffprog.core.dtypes import wide
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import settled
from diffprog.core.notation import code, show
from diffprog.core.plans import Params, State
from diffprog.text.listening import Callback, emit, with_callback
from diffprog.text.prompts import (
    NO_TOKEN,
    PromptBatch,
    Prompts,
    prefill,
    prepare,
    unroll_repeats,
)
from diffprog.text.sampling import (
    Temperature,
    check_keys,
    check_sampling,
    check_top_k,
    draw,
    is_greedy,
    log_prob,
    traced_options,
    vmap_keys,
)
from diffprog.text.stops import Stop, as_stop, check_stop, stop_matches

__all__ = ["Generation", "generate"]

Adjust = Callable[[jax.Array, jax.Array], jax.Array]


class Generation(NamedTuple):
    """Generated tokens, their number and their log-probability.

    Attributes:
        tokens: ints (batch, max_tokens), from `beam_search` (batch, beams, max_tokens); -1 after
            the end of a text.
        lengths: number of tokens, stop tokens included.
        log_probs: log-probability of the tokens in nats, by the logits of the net at temperature 1,
            after `adjust`.
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
    """Continue prompts: ``token[t] ~ softmax(net(prompt, token[:t]) / temperature)``.

    At temperature 0, the default, decoding is greedy and needs no key.

    Args:
        net: a net that streams and returns next-token logits (batch, time, vocabulary).
        params, state: parameters and state of the net.
        prompts: ints (batch, time), or a list of lists of ints, which may differ in length.
        max_tokens: number of tokens after which generation stops; positive.
        key: one key for the batch, or keys (batch,), such as ``jax.random.split(key, batch)``, one
            for each prompt. With a key of its own, a prompt gets the same tokens in any batch.
        temperature: 0, or at least 1e-30; one number for all prompts, or an array (batch,).
        top_k: sample among the k most probable tokens; between 1 and the vocabulary.
        top_p: sample among the fewest most probable tokens whose total probability reaches top_p,
            in (0, 1], after temperature and top_k.
        stop_tokens: ids that end a text, and sequences of ids that do so one after the other. The
            loop stops when all texts have ended.
        adjust: ``(logits, text) -> logits``, applied to the next-token logits (rows, vocabulary)
            before sampling; `text` is ints (rows, length), the prompt and the tokens generated so
            far, padded with -1. Define the function once: each function object compiles anew.
        callback: ``(step, tokens)``, called at each step with ints (batch,), -1 after the end of a
            text. `generate` returns after the last call and raises what the callback raises.
        side: `memory` and `memory_mask` of an encoder-decoder, ``memory =
            net.children["encoder"](params["encoder"], source, mask=source_mask)`` and
            ``memory_mask=source_mask``; without the masks, padding is treated as valid. If
            parameters are computed, as in `ema` or `quantize`, use ``memory = dp.tap(net,
            "encoder")(params, ids, state=state, source=source, source_mask=source_mask)[1]
            ["encoder"]`` with any `ids` (batch, time). Other side inputs are passed unchanged at
            every step.

    Raises:
        LayerError: an argument is out of its range; a prompt is empty, or longer with `max_tokens`
            than the net supports; prompts differ in length and the net takes no mask; logits are
            NaN, because of NaN parameters or ids outside the vocabulary.

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
    prompt = prepare(net, params, state, prompts, max_tokens, side)
    check_adjust(adjust)
    rows = prompt.ids.shape[:1]
    check_sampling(temperature, top_k, top_p, rows)
    greedy = is_greedy(temperature)
    if not greedy and key is None:
        raise LayerError("a key at a temperature above 0", "none",
                         "pass key=jax.random.key(seed), or temperature=0.0 for greedy decoding")
    if not greedy:
        check_keys(key, rows)

    def run(listener: Any) -> Generation:
        return _generate(
            prompt, None if greedy else key, traced_options(temperature, top_p), listener, net=net,
            steps=max_tokens, greedy=greedy, top_k=top_k, stop=as_stop(stop_tokens), adjust=adjust)

    return check_finite(with_callback(callback, run))


class _Carry(NamedTuple):
    """What the loop carries from step to step."""

    step: jax.Array
    token: jax.Array  # (batch,), the last token of each text
    alive: jax.Array  # (batch,), False after the end of a text
    state: State
    texts: Generation


@functools.partial(
    jax.jit, static_argnames=("net", "steps", "greedy", "top_k", "stop", "adjust"))
def _generate(
    prompt: PromptBatch, key: Any, options: dict[str, Any], listener: Any, *, net: Layer,
    steps: int, greedy: bool, top_k: int | None, stop: Stop, adjust: Adjust | None,
) -> Generation:
    """The program of `generate`: the prompt, then a loop over steps."""
    state, logits, side = prefill(net, prompt, steps)                 # logits (batch, vocabulary)
    decoder = _Decoder(padded_ids(prompt), key, options, listener, greedy, top_k, stop, adjust)
    net, prompt, state = unroll_repeats(net, prompt, state)
    batch, vocabulary = logits.shape
    check_stop(stop, vocabulary)
    check_top_k(top_k, vocabulary)

    def step(carry: _Carry) -> _Carry:
        logits, state = net.apply(prompt.params, carry.state, carry.token[:, None], **side)
        token, log_prob = decoder.choose(carry.step, logits[:, 0], carry.texts)
        texts, alive = decoder.append(carry.texts, carry.step, token, log_prob, carry.alive)
        return _Carry(carry.step + 1, token, alive, state, texts)

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.step < steps) & carry.alive.any()

    empty = Generation(jnp.full((batch, steps), NO_TOKEN, jnp.int32),
                       jnp.zeros(batch, jnp.int32), jnp.zeros(batch, wide(logits).dtype))
    begin = jnp.int32(0)
    token, log_prob = decoder.choose(begin, logits, empty)
    texts, alive = decoder.append(empty, begin, token, log_prob, jnp.ones(batch, bool))
    first = _Carry(begin + 1, token, alive, state, texts)
    first = settled(lambda carry, _: step(carry), first)
    return jax.lax.while_loop(unfinished, step, first).texts


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """How a token is chosen and appended."""

    prompt: jax.Array  # (batch, width), -1 in the padding
    key: jax.Array | None
    options: dict[str, Any]
    listener: Any
    greedy: bool
    top_k: int | None
    stop: Stop
    adjust: Adjust | None

    def choose(
        self, step: Any, logits: jax.Array, texts: Generation
    ) -> tuple[jax.Array, jax.Array]:
        """The next token of each text, and its log-probability, by logits (batch, vocabulary)."""
        logits = apply_adjust(self.adjust, logits, self.prompt, texts.tokens)
        if self.greedy:
            token = logits.argmax(-1)
        else:
            keys: Any = vmap_keys(self.key, lambda key: jax.random.fold_in(key, step))(self.key)
            token = draw(keys, logits, self.options, self.top_k)
        return token.astype(jnp.int32), log_prob(logits, token)

    def append(
        self, texts: Generation, step: Any, token: jax.Array, log_prob: jax.Array, alive: jax.Array
    ) -> tuple[Generation, jax.Array]:
        """The texts with this token, and which of them go on; a NaN log-probability ends one."""
        ends = [(token == last) & match
                for last, match in stop_matches(texts.tokens, step, self.stop).items()]
        written = jnp.where(alive & ~jnp.isnan(log_prob), token, NO_TOKEN)
        emit(self.listener, step, written)
        texts = Generation(
            jax.lax.dynamic_update_index_in_dim(texts.tokens, written, step, 1),
            texts.lengths + alive.astype(jnp.int32),
            jnp.where(alive, texts.log_probs + log_prob, texts.log_probs))
        alive = alive & ~jnp.isnan(log_prob)
        for end in ends:
            alive = alive & ~end
        return texts, alive


def padded_ids(prompt: PromptBatch) -> jax.Array:
    """The prompts (batch, width), -1 in the padding."""
    ids = jnp.asarray(prompt.ids)
    return ids if prompt.mask is None else jnp.where(prompt.mask, ids, NO_TOKEN)


def check_adjust(adjust: Any) -> None:
    """Raise unless `adjust` is None or a hashable function."""
    if adjust is None:
        return
    if not callable(adjust):
        raise LayerError("adjust as a function (logits, text)", code(adjust),
                         "pass lambda logits, text: logits / 2, for example")
    try:
        hash(adjust)
    except TypeError:
        raise LayerError("a hashable function as adjust", code(adjust),
                         "write @dataclass(frozen=True), or pass a plain function: compiled "
                         "programs are cached by it") from None


def apply_adjust(
    adjust: Adjust | None, logits: jax.Array, prompt: jax.Array, written: jax.Array
) -> jax.Array:
    """The logits after `adjust`, which receives the prompt and the generated tokens."""
    if adjust is None:
        return logits
    adjusted = adjust(logits, jnp.concatenate([prompt, written], -1))
    if getattr(adjusted, "shape", None) != logits.shape:
        raise LayerError(f"adjust to return logits {show(logits)}", show(adjusted),
                         "return one number for each token of each row")
    return adjusted


def check_finite(texts: Generation) -> Generation:
    """The texts; raise if a log-probability is NaN."""
    if isinstance(texts.log_probs, Tracer):
        return texts
    wrong = np.isnan(texts.log_probs).reshape(len(texts.log_probs), -1).any(1)
    if wrong.any():
        raise LayerError("logits that are not NaN", f"NaN for prompt {int(wrong.argmax())}",
                         "look for ids outside the vocabulary, for an adjust that leaves no token, "
                         "and for NaN in the parameters by tree.nonfinite(params)")
    return texts
