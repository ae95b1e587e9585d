"""Beam search: the most probable texts, which greedy decoding may miss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.dtypes import wide
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import settled
from diffprog.core.plans import Params, State, grown, spec
from diffprog.text.generation import (
    Adjust,
    Generation,
    apply_adjust,
    check_adjust,
    check_finite,
    padded_ids,
)
from diffprog.text.prompts import (
    NO_TOKEN,
    PromptBatch,
    Prompts,
    prefill,
    prepare,
    start_stream,
    unroll_repeats,
)
from diffprog.text.stops import Stop, as_stop, check_stop, stop_matches

__all__ = ["beam_search"]


def beam_search(
    net: Layer, params: Params, prompts: Prompts, max_tokens: int, *, beams: int = 4,
    length_penalty: float = 0.0, state: State | None = None,
    stop_tokens: Sequence[int | Sequence[int]] = (), adjust: Adjust | None = None, **side: Any,
) -> Generation:
    """The `beams` continuations of largest ``log p(text | prompt) / length**length_penalty``.

    Each step extends every beam by every token. Extensions that end with a stop token move to a
    separate set of finished texts, which keeps the best `beams`; the `beams` most probable of the
    others stay in the search. The search ends after `max_tokens` steps, or as soon as no unfinished
    text can still beat a finished one; then both sets compete. It is exhaustive if `beams` is at
    least the number of unfinished texts.

    Shapes:
        Returns tokens (batch, beams, max_tokens), lengths and log_probs (batch, beams), best first.
            An unused beam has length 0 and log-probability -inf.

    Args:
        net, params, prompts, max_tokens, state, stop_tokens, adjust, side: as in `generate`. A side
            input whose first axis has the batch size is repeated for each beam; any other is
            shared. `adjust` receives batch * beams rows, and the search uses the logits it returns.
        beams: number of unfinished texts kept at each step; positive.
        length_penalty: exponent in [0, 10]; 0 compares log-probabilities, which favours short
            texts; 1 compares the mean log-probability of a token.

    Raises:
        LayerError: as in `generate`; length_penalty outside [0, 10].

    Example:
        >>> net = dp.models.gpt(11, length=8, width=16, depth=2, heads=4)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((1, 8), int))
        >>> dp.text.beam_search(net, params, [[1, 2, 3]], 5, beams=3).tokens.shape
        (1, 3, 5)

    Source: Graves 2012, arXiv:1211.3711, section 2.4; Sutskever, Vinyals, Le 2014,
    arXiv:1409.3215, section 3.2.
    """
    check_count("beams", beams)
    if not 0 <= length_penalty <= 10:
        raise LayerError("length_penalty in [0, 10]", repr(length_penalty),
                         "choose 0 to compare log-probabilities, 1 to compare means over tokens")
    prompt = prepare(net, params, state, prompts, max_tokens, side)
    check_adjust(adjust)
    return check_finite(_search(
        prompt, float(length_penalty), steps=max_tokens, beams=beams, stop=as_stop(stop_tokens),
        adjust=adjust, net=net))


class _Carry(NamedTuple):
    """What the loop carries from step to step."""

    step: jax.Array
    token: jax.Array  # (batch, beams), the last token of each live text
    state: State
    live: Generation  # unfinished texts, (batch, beams, ...)
    finished: Generation  # texts that ended with a stop token, (batch, beams, ...)


@functools.partial(jax.jit, static_argnames=("net", "steps", "beams", "stop", "adjust"))
def _search(
    prompt: PromptBatch, penalty: jax.Array, *, net: Layer, steps: int, beams: int, stop: Stop,
    adjust: Adjust | None,
) -> Generation:
    """The program of `beam_search`: all beams of all prompts are one batch of the net."""
    state, logits, side = prefill(net, prompt, steps)                 # logits (batch, vocabulary)
    net, prompt, state = unroll_repeats(net, prompt, state)
    axes = _batch_axes(net, prompt, steps)
    batch, vocabulary = logits.shape
    check_stop(stop, vocabulary)

    first_rows = beams * jnp.arange(batch, dtype=jnp.int32)[:, None]  # (batch, 1)
    copies = jnp.repeat(jnp.arange(batch), beams)                     # (batch * beams,)
    search = _Beams(batch, beams, steps, vocabulary, penalty, stop, adjust,
                    padded_ids(prompt)[copies])
    side = jax.tree.map(lambda a: a[copies] if a.shape[:1] == (batch,) else a, side)

    def step(carry: _Carry) -> _Carry:
        logits, state = net.apply(
            prompt.params, carry.state, carry.token.reshape(-1, 1), **side)
        live, finished, beam, token = search.extend(
            carry.step, logits[:, 0], carry.live, carry.finished)
        state = _select_rows(state, first_rows + beam, axes)
        return _Carry(carry.step + 1, token, state, live, finished)

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.step < steps) & search.can_improve(carry.live, carry.finished)

    # All beams are the bare prompt at first: only one of them may be extended.
    one_beam = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    dtype = wide(logits).dtype
    live, finished, _, token = search.extend(
        jnp.int32(0), logits[copies], search.empty(one_beam, dtype),
        search.empty(-jnp.inf, dtype))
    first = _Carry(jnp.int32(1), token, _select_rows(state, copies, axes), live, finished)
    last = jax.lax.while_loop(unfinished, step, settled(lambda carry, _: step(carry), first))

    best = search.best(last.finished, last.live)
    unused = jnp.isneginf(best.log_probs)
    return Generation(jnp.where(unused[..., None], NO_TOKEN, best.tokens),
                      jnp.where(unused, 0, best.lengths), best.log_probs)


@dataclasses.dataclass(frozen=True)
class _Beams:
    """One step of the search on sets of texts: a `Generation` of arrays (batch, beams, ...)."""

    batch: int
    beams: int
    steps: int
    vocabulary: int
    penalty: jax.Array
    stop: Stop
    adjust: Adjust | None
    prompt: jax.Array  # (batch * beams, width), -1 in the padding

    def empty(self, log_prob: Any, dtype: Any) -> Generation:
        """Texts without tokens; `log_prob` is one number, or one for each beam."""
        shape = self.batch, self.beams
        return Generation(
            jnp.full((*shape, self.steps), NO_TOKEN, jnp.int32), jnp.zeros(shape, jnp.int32),
            jnp.broadcast_to(jnp.asarray(log_prob, dtype), shape))

    def extend(
        self, step: Any, logits: jax.Array, live: Generation, finished: Generation
    ) -> tuple[Generation, Generation, jax.Array, jax.Array]:
        """Extend all live texts by one token of logits (batch * beams, vocabulary).

        Returns live and finished texts, and for each live one its parent beam and its new token,
        both (batch, beams). A finished text leaves the beams, so that no unfinished one displaces
        it.
        """
        written = live.tokens.reshape(self.batch * self.beams, self.steps)
        logits = apply_adjust(self.adjust, logits, self.prompt, written)
        log_probs = jax.nn.log_softmax(wide(logits)).reshape(
            self.batch, self.beams, self.vocabulary)
        scores = live.log_probs[..., None] + log_probs            # (batch, beams, vocabulary)

        if matches := stop_matches(live.tokens, step, self.stop):
            ids = jnp.asarray([*matches], jnp.int32)              # (stops,)
            ends = jnp.stack([*matches.values()], -1)             # (batch, beams, stops)
            of_ends = scores[..., ids]
            new, _, _ = self._top(step, live, jnp.where(ends, of_ends, -jnp.inf), ids)
            finished = self.best(finished, new)
            scores = scores.at[..., ids].set(jnp.where(ends, -jnp.inf, of_ends))

        live, beam, token = self._top(
            step, live, scores, jnp.arange(self.vocabulary, dtype=jnp.int32))
        return live, finished, beam, token

    def _top(
        self, step: Any, live: Generation, scores: jax.Array, ids: jax.Array
    ) -> tuple[Generation, jax.Array, jax.Array]:
        """The best extensions by scores (batch, beams, ids), their parent beams and new tokens."""
        log_probs, best = jax.lax.top_k(scores.reshape(self.batch, -1), self.beams)
        beam = best // len(ids)                                   # (batch, beams)
        token = ids[best % len(ids)]                              # (batch, beams)
        tokens = jnp.take_along_axis(live.tokens, beam[..., None], axis=1)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, 2)
        lengths = jnp.full_like(live.lengths, step + 1)
        return Generation(tokens, lengths, log_probs), beam, token

    def best(self, *sets: Generation) -> Generation:
        """The best `beams` texts of several sets; ties go to the first set."""
        texts = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *sets)
        _, best = jax.lax.top_k(self._rank(texts), self.beams)    # (batch, beams)
        return jax.tree.map(lambda a: jnp.take_along_axis(
            a, best[..., None] if a.ndim == 3 else best, axis=1), texts)

    def _rank(self, texts: Generation) -> jax.Array:
        """``log_prob / length**penalty`` of each text."""
        lengths = jnp.maximum(texts.lengths, 1).astype(texts.log_probs.dtype)
        return texts.log_probs / lengths ** self.penalty

    def can_improve(self, live: Generation, finished: Generation) -> jax.Array:
        """Can a live text still beat a finished one? Its log-probability can only fall."""
        bound = live._replace(lengths=jnp.full_like(live.lengths, self.steps))
        return (self._rank(bound).max(1) > self._rank(finished).min(1)).any()


def _select_rows(tree: Any, rows: jax.Array, axes: Any) -> Any:
    """These rows of the batch axis of each leaf; a leaf whose axis is -1 has none and stays."""

    def select(leaf: jax.Array, axis: int) -> jax.Array:
        return leaf if axis < 0 else jnp.take(leaf, rows.reshape(-1), axis=axis)

    return jax.tree.map(select, tree, axes)


def _batch_axes(net: Layer, prompt: PromptBatch, steps: int) -> Any:
    """The batch axis of each leaf of the streaming state, -1 for a leaf without one.

    It is the axis that grows if the batch does.
    """
    batch, width = prompt.ids.shape

    def resized(size: int, a: Any) -> Any:
        shape = (size, *a.shape[1:]) if a.shape[:1] == (batch,) else a.shape
        return jax.ShapeDtypeStruct(shape, a.dtype)

    def state(size: int) -> Any:
        token = jax.ShapeDtypeStruct((size, 1), jnp.int32)
        side = jax.tree.map(functools.partial(resized, size), prompt.side)
        return jax.eval_shape(
            functools.partial(start_stream, net, width + steps - 1), spec(prompt.params),
            spec(prompt.state), token, side)

    return jax.tree.map(grown, state(batch), state(batch + 1))
