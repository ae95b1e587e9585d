"""Generation with streams equals generation without, for prompts of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import expect, refused
from support.writing_nets import (
    DECODERS,
    KEY,
    LONGEST,
    NETS,
    PROMPTS,
    VOCABULARY,
    greedy,
    memory,
    scores,
    trees,
)

import diffprog as dp
from diffprog.text import generation

GPT = NETS["gpt"]
fast = {"gpt", "gru"}


def write(name, prompts=PROMPTS, steps=5, **options):
    params, state = trees(name)
    return dp.text.generate(
        NETS[name], params, prompts, steps, state=state, **memory(name) | options)


@pytest.mark.parametrize("name", [
    name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in NETS])
def test_greedy_decoding_equals_that_without_a_stream(name):
    """Ragged prompts in one batch have the tokens and log-probabilities of each alone."""
    written = write(name)
    assert written.tokens.shape == (3, 5) and written.tokens.dtype == jnp.int32
    assert written.lengths.tolist() == [5, 5, 5]
    for i, prompt in enumerate(PROMPTS):
        tokens, found = greedy(name, prompt, 5, i)
        assert written.tokens[i].tolist() == tokens
        np.testing.assert_allclose(written.log_probs[i], found.sum(), rtol=1e-4, atol=1e-5)
    assert len(set(written.tokens.ravel().tolist())) > 2  # not a constant


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_equals_its_prompts_one_by_one(name):
    together = write(name).tokens.tolist()
    assert together == [write(name, [prompt]).tokens[0].tolist() for prompt in PROMPTS]


@pytest.mark.slow
def test_few_programs_serve_prompts_of_all_lengths():
    params, _ = trees("gpt")
    net = dp.models.gpt(VOCABULARY, length=LONGEST, width=8, depth=2, heads=2, hidden=8)
    generation._generate.clear_cache()  # an equal net may have been compiled before
    before = generation._generate._cache_size()
    prompts = [[1] * size for size in (2, 3, 4, 5, 6, 7)]
    texts = [dp.text.generate(net, params, [prompt], 5).tokens[0].tolist() for prompt in prompts]
    # Widths 2, 4 and 8, the widest that fits: 8 + 5 - 1 = 12 = LONGEST positions.
    assert generation._generate._cache_size() - before == 3
    assert texts == [greedy("gpt", prompt, 5)[0] for prompt in prompts]
    dp.text.generate(net, params, [[1] * 9], 4)  # 16 would not fit, 9 does
    assert generation._generate._cache_size() - before == 4


@pytest.mark.slow
def test_an_error_for_another_reason_does_not_limit_the_width():
    """A call without memory fails, but the net takes longer prompts."""
    net = dp.models.seq2seq(5, VOCABULARY, width=6)
    given = memory("seq2seq")
    params, _ = trees("seq2seq")
    refused(dp.text.generate, net, params, PROMPTS, 5)
    generation._generate.clear_cache()
    before = generation._generate._cache_size()
    for prompts in (PROMPTS, [prompt[:3] for prompt in PROMPTS]):  # widths 4 and 3, both padded
        dp.text.generate(net, params, prompts, 5, **given)
    assert generation._generate._cache_size() - before == 1


def test_texts_end_at_a_stop_token():
    plain = [greedy("gpt", prompt, 5)[0] for prompt in PROMPTS]
    stop = plain[0][2]
    written = write("gpt", stop_tokens=[stop, VOCABULARY - 1])
    for row, length, text, score, prompt in zip(
            written.tokens.tolist(), written.lengths.tolist(), plain, written.log_probs, PROMPTS,
            strict=True):
        ends = [i for i, token in enumerate(text) if token in (stop, VOCABULARY - 1)]
        end = ends[0] + 1 if ends else 5
        assert length == end and row == text[:end] + [-1] * (5 - end)
        np.testing.assert_allclose(score, greedy("gpt", prompt, end)[1].sum(), rtol=1e-4)
    assert written.lengths[0] <= 3


def test_the_loop_stops_when_all_texts_have_ended():
    """A net that counts its calls is called once for each token."""
    calls = []

    def count(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return jax.nn.one_hot((x + 1) % 9, 9) * 20.0

    net = dp.stateless(None, count, name="count")
    written = dp.text.generate(net, {}, [[2], [4]], 7, stop_tokens=[6])
    jax.effects_barrier()
    assert written.tokens.tolist() == [[3, 4, 5, 6, -1, -1, -1], [5, 6, -1, -1, -1, -1, -1]]
    assert len(calls) == 4


def test_equal_keys_give_equal_texts():
    draw = lambda seed, **options: write(  # noqa: E731
        "gpt", key=jax.random.key(seed), temperature=2.0, **options).tokens.tolist()
    assert draw(0) == draw(0) != draw(1)
    assert draw(0, top_k=1) == write("gpt").tokens.tolist()
    assert draw(0, top_p=1e-6) == write("gpt").tokens.tolist()
    cold = write("gpt", key=KEY, temperature=1e-3).tokens.tolist()
    assert cold == write("gpt").tokens.tolist()


@pytest.mark.slow
def test_log_probs_are_those_of_the_sampled_tokens():
    written = write("gpt", key=KEY, temperature=3.0, top_k=4)
    for i, prompt in enumerate(PROMPTS):
        text = prompt + written.tokens[i].tolist()
        likely = scores("gpt", [text])[0]
        wanted = sum(likely[len(prompt) - 1 + t, text[len(prompt) + t]] for t in range(5))
        np.testing.assert_allclose(written.log_probs[i], wanted, rtol=1e-4)


LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))


@pytest.mark.parametrize(("options", "probs"), [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_k": 3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
    ({"temperature": 0.0}, [0, 1, 0, 0]),
], ids=str)
def test_frequencies_of_samples(options, probs):
    """Counts of 20,000 samples within 4.5 sigma; a token of probability 0 never appears."""
    drawn = dp.text.sample(KEY, jnp.broadcast_to(LOGITS, (20_000, 4)), **options)
    counts, probs = np.bincount(drawn, minlength=4), np.array(probs)
    sigma = np.sqrt(20_000 * probs * (1 - probs))
    assert (abs(counts - 20_000 * probs) <= 4.5 * sigma).all(), counts


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}], ids=str)
def test_a_row_with_a_nan_logit_has_no_sample(options):
    logits = jnp.stack([LOGITS, LOGITS.at[2].set(jnp.nan)])
    assert dp.text.sample(KEY, logits, **options)[1] == -1
    assert dp.text.sample(KEY, logits, **options)[0] >= 0


@pytest.mark.slow
def test_other_side_inputs_are_passed_at_every_step():
    @dp.program(net=GPT)
    def warm(layers, x, *, offset=None):
        return layers.net(x) + offset[:, None]

    params, _ = trees("gpt")
    only = jnp.where(jnp.arange(VOCABULARY) == 3, 1e3, 0.0)
    written = dp.text.generate(warm, {"net": params}, PROMPTS, 3, offset=jnp.tile(only, (3, 1)))
    assert (written.tokens == 3).all()


def test_generation_inside_jit():
    params, _ = trees("gpt")
    inside = jax.jit(lambda params: dp.text.generate(GPT, params, PROMPTS, 5).tokens)(params)
    assert inside.tolist() == write("gpt").tokens.tolist()


# Errors.


def ask(prompts=PROMPTS, steps=5, net=GPT, params=None, **options):
    return dp.text.generate(
        net, trees("gpt")[0] if params is None else params, prompts, steps, **options)


@pytest.mark.parametrize("prompt", [[0.5], [-1], [2**32 + 1]], ids=str)
def test_prompts_of_numbers_that_are_no_ids_are_refused(prompt):
    assert refused(ask, [prompt]).wants == "prompts of ids, ints from 0 to 2**31 - 1"


def test_empty_and_single_prompts_are_refused():
    begin = "begin with the id of the start token"
    expect("", f"wants at least one token in each prompt, got an empty prompt, number 1; {begin}",
           ask, [[1], []])
    one = "pass a single prompt as a batch of one: [prompt]"
    form = "prompts as ints (batch, time) or a list of lists of ints"
    assert refused(ask, [1, 2]).remedy == one
    assert refused(ask, []).wants == form


def test_too_long_prompts_are_refused():
    expect("positions", f"positions (learned_positions({LONGEST})): wants at most {LONGEST} steps, "
           "got 13; learn more positions, or cut x", ask, [[1] * 9])
    expect("positions", f"positions (learned_positions({LONGEST})): wants at most {LONGEST} steps, "
           "got 14; learn more positions, or cut x", ask, [[1] * 10])


@pytest.mark.slow
def test_nets_that_cannot_generate_are_refused():
    never = dp.serial(embed=dp.embedding(7, 4), look=dp.self_attention(2), head=dp.linear(7))
    params, _ = never.init(KEY, jnp.ones((1, 2), int))
    error = refused(ask, net=never, params=params)
    assert error.path == "look" and "causal=True" in str(error)
    plain = dp.embedding(7, 7)
    params, _ = plain.init(KEY, jnp.ones((1, 2), int))
    expect("", "wants prompts of one length for a net without mask, got lengths [3, 1, 4]; pass "
           "one prompt at a time", ask, net=plain, params=params)
    scalar = dp.stateless(None, lambda params, x: x * 1.0, name="scalar")
    assert "(batch, time, vocabulary)" in refused(ask, [[1]], net=scalar, params={}).wants
    translator, params = NETS["seq2seq"], trees("seq2seq")[0]
    assert "memory" in refused(ask, [[1]], net=translator, params=params).wants
    expect("", "wants memory in place of source, got int32[1,2]; encode it once: "
           'memory=net.children["encoder"](params["encoder"], source, mask=source_mask), '
           "memory_mask=source_mask", ask, [[1]], net=translator, params=params,
           source=jnp.ones((1, 2), int))


@pytest.mark.slow
def test_nan_logits_are_refused():
    broken = jax.tree.map(lambda a: a * jnp.nan, trees("gpt")[0])
    assert refused(ask, params=broken).got == "NaN for prompt 0"
    assert refused(ask, [[1], [VOCABULARY]]).got == "NaN for prompt 1"
