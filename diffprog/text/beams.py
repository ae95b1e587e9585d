"""Beam search: the likeliest texts, where taking the likeliest token each time is not enough."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import settled
from diffprog.core.plans import Params, State, grown, spec
from diffprog.losses.entries import wide
from diffprog.text.generation import Adjust, Generation, adjusted, check_adjust, checked, shown
from diffprog.text.prompts import NOTHING, Begin, Prompts, begun, prompted, started, written_out
from diffprog.text.stops import Stop, as_stop, check_stop, ending

__all__ = ["beam_search"]


def beam_search(
    net: Layer, params: Params, prompts: Prompts, max_tokens: int, *, beams: int = 4,
    length_penalty: float = 0.0, state: State | None = None,
    stop_tokens: Sequence[int | Sequence[int]] = (), adjust: Adjust | None = None, **side: Any,
) -> Generation:
    """Likely texts, not likely tokens: the `beams` texts of largest ``score / length**penalty``.

    At every step each of the beginnings that are kept is continued by each token. Those of these
    texts that end are set apart, and the best `beams` ended ones stay, whatever unfinished ones
    come to; of the others the likeliest `beams` are kept. After the last step those compete with
    the ended ones, and before it the search ends where none of them can win any more. With as many
    beams as there are beginnings it is exhaustive.

    Shapes:
        Returns tokens (batch, beams, max_tokens), lengths and log_probs (batch, beams), best first.
            A beam that is left over has length 0 and log-probability -inf.

    Args:
        net, params, prompts, max_tokens, state, stop_tokens, adjust, side: as in `generate`. An
            array among the side inputs whose first axis has the length of the batch belongs to
            its texts; any other to all. `adjust` gets beams as rows; the search uses what it gives.
        beams: how many beginnings are kept; positive.
        length_penalty: in [0, 10]; 0 compares log-probabilities, which favours short texts; 1
            compares their means over tokens.

    Raises:
        LayerError: as in `generate`; a penalty below 0.

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
                         "choose 0 to compare whole texts, 1 their tokens")
    begin = begun(net, params, state, prompts, max_tokens, side)
    check_adjust(adjust)
    return checked(_searched(
        begin, float(length_penalty), steps=max_tokens, beams=beams, stop=as_stop(stop_tokens),
        adjust=adjust, net=net))


@functools.partial(jax.jit, static_argnames=("net", "steps", "beams", "stop", "adjust"))
def _searched(
    begin: Begin, penalty: jax.Array, *, net: Layer, steps: int, beams: int, stop: Stop,
    adjust: Adjust | None,
) -> Generation:
    """Prompt and loop of `beam_search`; in the loop the beams of all texts are one batch."""
    state, logits, each = prompted(net, begin, steps)
    net, begin, state = written_out(net, begin, state)
    axes = _batch_axes(net, begin, steps)
    batch, vocabulary = logits.shape
    check_stop(stop, vocabulary)
    rows = beams * jnp.arange(batch, dtype=jnp.int32)[:, None]

    def of_beams(tree: Any, beam: jax.Array, axes: Any) -> Any:
        """Of each leaf the rows of these beams, along its axis of texts."""
        return jax.tree.map(lambda a, axis: a if axis < 0 else jnp.take(
            a, beam.reshape(-1), axis=axis), tree, axes)

    def extended(step: Any, live: Generation, scores: jax.Array, ids: jax.Array) -> Any:
        """The best texts of one token more, out of scores (batch, beams, ids), and their beams."""
        scores, best = jax.lax.top_k(scores.reshape(batch, -1), beams)
        beam, token = best // len(ids), ids[best % len(ids)]
        tokens = jnp.take_along_axis(live.tokens, beam[..., None], axis=1)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, 2)
        return Generation(tokens, jnp.full_like(live.lengths, step + 1), scores), beam, token

    def rank(found: Generation) -> jax.Array:
        return found.log_probs / jnp.maximum(found.lengths,
            1).astype(found.log_probs.dtype) ** penalty

    def best_of(*found: Generation) -> Generation:
        """The best of several sets of texts; of equal ones the first."""
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *found)
        _, best = jax.lax.top_k(rank(both), beams)
        return jax.tree.map(lambda a: jnp.take_along_axis(
            a, best[..., None] if a.ndim == 3 else best, axis=1), both)

    def grow(step: Any, logits: jax.Array, live: Generation, ended: Generation) -> Any:
        """One token more. What ends leaves the beams, so that nothing unfinished displaces it."""
        logits = adjusted(adjust, logits, prompt, live.tokens.reshape(batch * beams, steps))
        scores = live.log_probs[..., None] + jax.nn.log_softmax(wide(logits)).reshape(
            batch, beams, vocabulary)
        if ends := ending(live.tokens, step, stop):
            ids, here = jnp.asarray([*ends], jnp.int32), jnp.stack([*ends.values()], -1)
            of_ends = scores[..., ids]
            ended = best_of(ended, extended(step, live, jnp.where(here, of_ends, -jnp.inf), ids)[0])
            scores = scores.at[..., ids].set(jnp.where(here, -jnp.inf, of_ends))
        live, beam, token = extended(step, live, scores, jnp.arange(vocabulary, dtype=jnp.int32))
        return live, ended, beam, token

    def body(carry: Any) -> Any:
        step, token, state, live, ended = carry
        logits, state = net.apply(begin.params, state, token.reshape(-1, 1), **beside)
        live, ended, beam, token = grow(step, logits[:, 0], live, ended)
        return step + 1, token, of_beams(state, rows + beam, axes), live, ended

    def going(carry: Any) -> jax.Array:
        """Can a beginning come to more than what has ended? Its score only falls."""
        step, _, _, live, ended = carry
        most = live._replace(lengths=jnp.full_like(live.lengths, steps))
        return (step < steps) & (rank(most).max(1) > rank(ended).min(1)).any()

    same = jnp.repeat(jnp.arange(batch), beams)
    prompt = shown(begin)[same]
    beside = jax.tree.map(lambda a: a[same] if a.shape[:1] == (batch,) else a, each)
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # all beams are the prompt as yet
    live, nothing = (Generation(
        jnp.full((batch, beams, steps), NOTHING, jnp.int32), jnp.zeros((batch, beams), jnp.int32),
        jnp.broadcast_to(jnp.asarray(scores, wide(logits).dtype), (batch, beams)))
        for scores in (first, -jnp.inf))
    live, ended, _, token = grow(jnp.int32(0), logits[same], live, nothing)
    begun = (jnp.int32(1), token, of_beams(state, same, axes), live, ended)
    *_, live, ended = jax.lax.while_loop(
        going, body, settled(lambda carry, _: body(carry), begun))
    found = best_of(ended, live)
    left = jnp.isneginf(found.log_probs)
    return Generation(jnp.where(left[..., None], NOTHING, found.tokens),
                      jnp.where(left, 0, found.lengths), found.log_probs)


def _batch_axes(net: Layer, begin: Begin, steps: int) -> Any:
    """Of each leaf of the stream's state the axis of texts, -1 where there is none."""
    batch, width = begin.ids.shape

    def shapes(size: int) -> Any:
        of = lambda a: jax.ShapeDtypeStruct(  # noqa: E731
            (size, *a.shape[1:]) if a.shape[:1] == (batch,) else a.shape, a.dtype)
        first = jax.ShapeDtypeStruct((size, 1), jnp.int32)
        return jax.eval_shape(
            functools.partial(started, net, width + steps - 1), spec(begin.params),
            spec(begin.state), first, jax.tree.map(of, begin.side))

    return jax.tree.map(grown, shapes(batch), shapes(batch + 1))
