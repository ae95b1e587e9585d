"""Beam search against exhaustive search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.writing_nets import KEY, NETS, PROMPTS, VOCABULARY, memory, scores, trees

import diffprog as dp

STEPS = 2


def search(name, prompts=PROMPTS, steps=STEPS, **options):
    params, state = trees(name)
    return dp.text.beam_search(
        NETS[name], params, prompts, steps, state=state, **memory(name) | options)


def texts(stop):
    """All texts of STEPS tokens, cut after their first stop token."""
    found = set()
    for text in itertools.product(range(VOCABULARY), repeat=STEPS):
        ends = [i for i, token in enumerate(text) if token in stop]
        found.add(text[: ends[0] + 1] if ends else text)
    return sorted(found)


def exhaustive(name, prompt, number, stop, penalty):
    """Every text with its log-probability, the best by ``score / length**penalty`` first."""
    rows = texts(stop)
    likely = scores(name, [[*prompt, *text] for text in rows], number)
    begin = len(prompt) - 1
    totals = [sum(likely[i, begin + t, token] for t, token in enumerate(text))
              for i, text in enumerate(rows)]
    order = np.argsort([-total / len(text) ** penalty
                        for text, total in zip(rows, totals, strict=True)])
    return [(list(rows[i]), totals[i]) for i in order]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stop", "penalty"), [
    ("gpt", (1, 4), 1.0),
    *(pytest.param("gpt", stop, 0.0, marks=pytest.mark.slow) for stop in ((), (1, 4))),
    *(pytest.param(name, stop, penalty, marks=pytest.mark.slow)
      for name in ("llama with a window", "lstm", "transformer", "seq2seq", "mixed")
      for stop, penalty in (((), 0.0), ((1, 4), 0.7)))])
def test_enough_beams_are_exhaustive(name, stop, penalty):
    """With as many beams as unfinished texts, the result is that of exhaustive search."""
    written = search(name, beams=VOCABULARY, stop_tokens=stop, length_penalty=penalty)
    for i, prompt in enumerate(PROMPTS):
        wanted = exhaustive(name, prompt, i, stop, penalty)[:VOCABULARY]
        for beam, (text, score) in enumerate(wanted):
            length = int(written.lengths[i, beam])
            assert written.tokens[i, beam, :length].tolist() == text
            assert (written.tokens[i, beam, length:] == -1).all()
            np.testing.assert_allclose(written.log_probs[i, beam], score, rtol=1e-4, atol=1e-5)


def test_one_beam_is_greedy():
    params, state = trees("gpt")
    one = search("gpt", steps=5, beams=1)
    assert one.tokens[:, 0].tolist() == dp.text.generate(
        NETS["gpt"], params, PROMPTS, 5, state=state).tokens.tolist()


@pytest.mark.slow
def test_unused_beams_are_empty():
    written = search("gpt", [[3]], 1, beams=VOCABULARY + 2)
    assert sorted(written.tokens[0, :VOCABULARY, 0].tolist()) == list(range(VOCABULARY))
    np.testing.assert_allclose(jnp.exp(written.log_probs[0, :VOCABULARY]).sum(), 1, rtol=1e-5)
    assert (written.tokens[0, VOCABULARY:] == -1).all()
    assert (written.log_probs[0, VOCABULARY:] == -jnp.inf).all()
    assert written.lengths[0].tolist() == [1] * VOCABULARY + [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 4)])
def test_side_inputs_of_a_prompt_and_of_the_batch(shape):
    """One beam treats them as `generate` does."""
    @dp.program(embed=dp.embedding(5, 4), head=dp.linear(5))
    def net(layers, x, *, style=None):
        return layers.head(layers.embed(x) * style)

    style = jnp.sin(jnp.arange(8.0)).reshape(2, 4)[:, None] if len(shape) == 3 else jnp.cos(
        jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32)).reshape(shape)
    params, _ = net.init(KEY, jnp.ones((2, 3), int), style=style)
    plain = dp.text.generate(net, params, [[1], [2]], 3, style=style)
    for beams in (1, 2):
        found = dp.text.beam_search(net, params, [[1], [2]], 3, beams=beams, style=style)
        if beams == 1:
            assert (found.tokens[:, 0] == plain.tokens).all()
        assert (found.log_probs[:, 0] >= plain.log_probs - 1e-5).all()
        both = [dp.text.beam_search(net, params, [[token]], 3, beams=beams, style=(
            style[i : i + 1] if len(shape) == 3 else style)) for i, token in enumerate((1, 2))]
        np.testing.assert_allclose(
            found.log_probs, jnp.concatenate([one.log_probs for one in both]), rtol=1e-5)


def over_lists(likely, steps, beams, stop, penalty):
    """Beam search over Python lists: likely[t, a, b] is log p of token b after token a at step t.

    The prompt is token 0. Finished texts leave the beams.
    """
    score = lambda text: sum(  # noqa: E731
        likely[t, a, b] for t, (a, b) in enumerate(itertools.pairwise((0, *text))))
    rank = lambda text: score(text) / len(text) ** penalty  # noqa: E731
    live, finished = [()], []
    for _ in range(steps):
        texts = [(*text, token) for text in live for token in range(likely.shape[-1])]
        finished += [text for text in texts if text[-1] in stop]
        live = sorted((t for t in texts if t[-1] not in stop), key=score, reverse=True)[:beams]
    return [(text, score(text)) for text in sorted(finished + live, key=rank, reverse=True)][:beams]


TABLE = dp.serial(token=dp.embedding(4, 4), step=dp.learned_positions(5))


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "beams", "stop", "penalty"), [
    (4, 2, (3,), 0.0), (5, 3, (1, 3), 1.0), (3, 1, (2,), 0.6), (3, 20, (0,), 2.0), (4, 2, (), 0.0)])
def test_beam_search_is_that_over_lists(steps, beams, stop, penalty):
    """On random tables; mostly its best text is the best of all texts."""
    best_of_all = 0
    for seed in range(60):
        params = {name: {"embedding": np.random.default_rng([seed, i]).normal(
            0, 1.5, (4 + i, 4)).astype(np.float32)} for i, name in enumerate(("token", "step"))}
        logits = params["token"]["embedding"] + params["step"]["embedding"][:, None]
        likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = over_lists(likely, steps, beams, stop, penalty)
        found = dp.text.beam_search(
            TABLE, params, [[0]], steps, beams=beams, stop_tokens=stop, length_penalty=penalty)
        texts = [tuple(row[:n]) for row, n in zip(
            found.tokens[0].tolist(), found.lengths[0].tolist(), strict=True)]
        assert texts[: len(wanted)] == [text for text, _ in wanted]
        np.testing.assert_allclose(
            found.log_probs[0, : len(wanted)], [score for _, score in wanted], rtol=1e-4, atol=1e-4)
        assert set(texts[len(wanted) :]) <= {()}
        best_of_all += over_lists(likely, steps, 4**steps, stop, penalty)[0][0] == texts[0]
    assert best_of_all > 40


@pytest.mark.slow
def test_unfinished_texts_do_not_displace_a_finished_one():
    """It has p = 0.2; the unfinished ones have 0.4 each, and 0.4 / 8 or less at the end."""
    table = np.full((9, 9), 1 / 9)
    table[0] = [0, 0.4, 0.4, 0, 0, 0, 0, 0, 0.2]
    params = {"embedding": jnp.log(jnp.asarray(table))}
    found = dp.text.beam_search(dp.embedding(9, 9), params, [[0]], 4, beams=2, stop_tokens=[8])
    assert found.tokens[0, 0].tolist() == [8, -1, -1, -1] and found.lengths[0, 0] == 1
    np.testing.assert_allclose(jnp.exp(found.log_probs[0, 0]), 0.2, rtol=1e-5)


def test_the_search_stops_early():
    """The texts end after one step and after two; no unfinished one can win after that."""
    calls = []

    @dp.program(table=dp.embedding(4, 4))
    def net(layers, x):
        jax.debug.callback(lambda _: calls.append(1), x)
        return layers.table(x)

    table = np.full((4, 4), 1e-9)
    table[0, 3] = table[1, 2] = table[2, 3] = 1.0
    params = {"table": {"embedding": jnp.log(jnp.asarray(table, jnp.float32))}}
    found = dp.text.beam_search(net, params, [[0], [1]], 9, beams=1, stop_tokens=[3])
    jax.effects_barrier()
    assert found.lengths.tolist() == [[1], [2]]
    assert len(calls) == 2  # the prompt, and one token
