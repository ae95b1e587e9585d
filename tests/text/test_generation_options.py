"""Options of generation: stop tokens, keys, temperatures, `adjust`, callbacks; and
log-probabilities of given texts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.refusing import expect, refused
from support.writing_nets import KEY, NETS, PROMPTS, VOCABULARY, memory, scores, trees

import diffprog as dp
from diffprog.text import generation
from diffprog.text.prompts import prepare

GPT = NETS["gpt"]
# A net with uniform logits: `scripted` decides what is generated.
UNIFORM = dp.serial(table=dp.embedding(9, 9))
UNIFORM_PARAMS = {"table": {"embedding": jnp.zeros((9, 9))}}
SCRIPT = jnp.array([1, 1, 1, 2, 3, 1, 2])


def scripted(logits, text):
    """Logits of the next token of the script, after a prompt of two tokens."""
    written = (text >= 0).sum(-1) - 2
    return logits + 9.0 * jax.nn.one_hot(SCRIPT[written], 9)


# A cheap net for prompts of all lengths: the next token depends on the last one alone.
TABLE = np.random.default_rng(7).normal(0, 2.0, (7, 7)).astype(np.float32)


@dp.program(table=dp.embedding(7, 7))
def last_alone(layers, x, *, mask=None):
    return layers.table(x)


def write(prompts=PROMPTS, steps=5, **options):
    params = {"table": {"embedding": jnp.asarray(TABLE)}}
    return dp.text.generate(last_alone, params, prompts, steps, **options)


def likeliest(prompt, steps=5):
    row = list(prompt)
    for _ in range(steps):
        row.append(int(TABLE[row[-1]].argmax()))
    return row[len(prompt):]


def test_max_tokens_may_be_a_numpy_int():
    """The arithmetic of the width does not overflow."""
    nets = [dp.program(table=dp.embedding(7, 7))(lambda layers, x, *, mask=None: layers.table(x))
            for _ in range(2)]
    params = {"table": {"embedding": jnp.asarray(TABLE)}}
    one, other = (prepare(net, params, None, PROMPTS, steps, {})
                  for net, steps in zip(nets, (5, np.int64(5)), strict=True))
    np.testing.assert_array_equal(one.mask, other.mask)


# Stop tokens.


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "length"), [
    ([[1, 1, 2]], 4), ([[2, 3], 3], 5), ([[1, 2, 3, 1]], 6), ([[3, 3], [8]], 7), ([[1, 1]], 2),
    ([[0, 1]], 7), ([[1] * 8], 7), ([2], 4), ([[1, 3], [1, 1, 1]], 3), (np.array([[1, 2]]), 4)],
    ids=str)
@pytest.mark.parametrize("prompts", [[[5, 0]], [[4, 0], [5, 0]]], ids=["one prompt", "two"])
def test_texts_end_at_a_stop_sequence(stop, length, prompts):
    """It may begin at any generated token, but not in the prompt, which ends with 0."""
    written = dp.text.generate(
        UNIFORM, UNIFORM_PARAMS, prompts, 7, stop_tokens=stop, adjust=scripted)
    assert written.lengths.tolist() == [length] * len(prompts)
    assert written.tokens[0].tolist() == [*SCRIPT[:length].tolist(), *[-1] * (7 - length)]


def test_texts_end_independently():
    plain = list(map(likeliest, PROMPTS))
    stop = [plain[0][1:3], plain[1][:4]]
    written = write(stop_tokens=stop)
    for text, row, length in zip(plain, written.tokens.tolist(), written.lengths, strict=True):
        ends = [t + 1 for t in range(5) for end in stop if text[: t + 1][-len(end):] == end]
        end = min(ends, default=5)
        assert int(length) == end and row == text[:end] + [-1] * (5 - end)
    assert written.lengths[0] < 5


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3, 81])
def test_beams_end_at_a_stop_sequence(beams):
    """Against beam search over lists, by the logits of a table."""
    table = np.random.default_rng(0).normal(0, 1.5, (3, 3)).astype(np.float32)
    likely = table - np.log(np.exp(table).sum(-1, keepdims=True))
    stop = [(0, 1), (2,), (1, 1)]
    score = lambda text: sum(  # noqa: E731
        likely[a, b] for a, b in zip((0, *text), text, strict=False))
    live, finished = [()], []
    for _ in range(4):
        texts = [(*text, token) for text in live for token in range(3)]
        over = [text for text in texts if any(text[-len(end):] == end for end in stop)]
        finished += over
        live = sorted(set(texts) - set(over), key=score, reverse=True)[:beams]
    wanted = sorted(finished + live, key=score, reverse=True)[:beams]
    found = dp.text.beam_search(dp.embedding(3, 3), {"embedding": jnp.asarray(table)}, [[0]], 4,
                           beams=beams, stop_tokens=[[0, 1], 2, [1, 1], [2, 2]])
    texts = [tuple(row[:n]) for row, n in zip(
        found.tokens[0].tolist(), found.lengths[0].tolist(), strict=True)]
    assert texts[: len(wanted)] == wanted and set(texts[len(wanted):]) <= {()}
    np.testing.assert_allclose(found.log_probs[0, : len(wanted)], list(map(score, wanted)),
        rtol=1e-4)


# Keys and temperatures.


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, pytest.param({"top_k": 3}, marks=pytest.mark.slow),
    pytest.param({"top_p": 0.8, "temperature": 2.0}, marks=pytest.mark.slow)], ids=str)
def test_rows_with_keys_of_their_own_sample_as_alone(options):
    logits = jax.random.normal(KEY, (2, 3, 7))
    keys = jax.random.split(KEY, (2, 3))
    for each in (keys, jax.random.key_data(keys)):
        together = dp.text.sample(each, logits, **options)
        for i in np.ndindex(2, 3):
            assert together[i] == dp.text.sample(each[i], logits[i], **options)
            assert together[i] == dp.text.sample(each[i], logits[i][None], **options)[0]


@pytest.mark.slow
def test_prompts_with_keys_of_their_own_generate_as_alone():
    keys = jax.random.split(jax.random.key(3), 3)
    together = write(key=keys, temperature=1.5, top_k=4).tokens
    for i, key in ((0, keys[0]), (2, keys[2:])):
        alone = write([PROMPTS[i]], key=key, temperature=1.5, top_k=4).tokens[0]
        assert together[i].tolist() == alone.tolist()
    assert together.tolist() != write(key=KEY, temperature=1.5, top_k=4).tokens.tolist()


@pytest.mark.slow
def test_each_row_may_have_a_temperature():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3])), (30_000, 4))
    drawn = dp.text.sample(KEY, logits, temperature=np.repeat([0.0, 0.5, 1.0], 10_000))
    cold, warm, plain = np.bincount(drawn[:10_000], minlength=4), *(
        np.bincount(part, minlength=4) for part in np.split(np.asarray(drawn[10_000:]), 2))
    assert cold.tolist() == [0, 10_000, 0, 0]
    for counts, probs in ((warm, [1 / 30, 16 / 30, 4 / 30, 9 / 30]), (plain, [.1, .4, .2, .3])):
        sigma = np.sqrt(10_000 * np.array(probs) * (1 - np.array(probs)))
        assert (abs(counts - 10_000 * np.array(probs)) <= 4.5 * sigma).all(), counts
    same = [dp.text.sample(KEY, logits[:9], temperature=t, top_k=3)
        for t in (jnp.full(9, 0.7), 0.7)]
    assert same[0].tolist() == same[1].tolist()
    traced = jax.jit(lambda t: dp.text.sample(KEY, logits[:9], temperature=t))
    assert (traced(0.0) == 1).all() and (traced(50.0) != 1).any()


@pytest.mark.slow
def test_each_prompt_may_have_a_temperature():
    keys = jax.random.split(KEY, 3)
    found = write(key=keys, temperature=jnp.array([0.0, 2.0, 0.0])).tokens.tolist()
    plain = write().tokens.tolist()
    warm = write([PROMPTS[1]], key=keys[1], temperature=2.0).tokens[0].tolist()
    assert found == [plain[0], warm, plain[2]] and warm != plain[1]


def test_no_rank_or_dtype_is_promoted():
    """With all options; the programs are traced, not run."""
    net = dp.stateless(None, lambda params, x: jax.nn.one_hot(x, 7, dtype=jnp.float32))
    options = {"stop_tokens": [1, [2, 3]], "adjust": lambda logits, text: logits}
    drawn = {"key": jax.random.split(KEY, 1), "temperature": jnp.ones(1), "top_k": 3, "top_p": 0.5}
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for given in ({}, {"key": KEY, "temperature": 0.5}, drawn):
            jax.eval_shape(lambda given=given: dp.text.generate(
                net, {}, [[1, 2]], 3, **options, **given))
        jax.eval_shape(lambda: dp.text.beam_search(net, {}, [[1, 2]], 3, beams=2, **options))


# Adjusted logits.


def test_adjust_sees_prompt_and_generated_tokens():
    """The repetition penalty, against NumPy."""

    def repeat_less(logits, text):
        seen = jax.nn.one_hot(text, logits.shape[-1], dtype=bool).any(1)
        return jnp.where(seen, jnp.where(logits > 0, logits / 3, logits * 3), logits)

    written = write(adjust=repeat_less)
    changed = 0
    for i, prompt in enumerate(PROMPTS):
        row, total = list(prompt), 0.0
        for _ in range(5):
            logits = TABLE[row[-1]].copy()
            seen = sorted(set(row))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / 3, logits[seen] * 3)
            row.append(int(logits.argmax()))
            total += logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert written.tokens[i].tolist() == row[len(prompt):]
        np.testing.assert_allclose(written.log_probs[i], total, rtol=1e-4)
        changed += row[len(prompt):] != likeliest(prompt)
    assert changed


@pytest.mark.slow
def test_beams_use_the_adjusted_logits():
    """An adjustment by the last token alone equals another table."""
    table, other = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 5)), jnp.float32)
    seen = []

    def change(logits, text):
        seen.append(text.shape)
        last = jnp.take_along_axis(text, (text >= 0).sum(-1, keepdims=True) - 1, 1)[:, 0]
        return logits + other[last]

    net = dp.embedding(5, 5)
    found = dp.text.beam_search(net, {"embedding": table}, [[2], [4]], 4, beams=3, stop_tokens=[1],
                                length_penalty=0.5, adjust=change)
    wanted = dp.text.beam_search(net, {"embedding": table + other}, [[2], [4]], 4, beams=3,
                                 stop_tokens=[1], length_penalty=0.5)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, rtol=1e-4)
    assert set(seen) == {(6, 5)}


# Callbacks.


def test_the_callback_receives_the_tokens_of_each_step():
    told = []
    written = write(stop_tokens=[likeliest(PROMPTS[0])[2]], callback=lambda step, tokens: (
        told.append((step, tokens.tolist()))))
    assert [step for step, _ in told] == list(range(int(written.lengths.max())))
    assert [tokens for _, tokens in told] == written.tokens.T[: len(told)].tolist()


def test_one_program_serves_all_callbacks():
    before, told = generation._generate._cache_size(), []
    for name in range(3):
        write(steps=2, callback=lambda step, tokens, name=name: told.append((name, step)))
    assert generation._generate._cache_size() - before == 1
    assert told == [(name, step) for name in range(3) for step in range(2)]


def test_an_error_of_the_callback_is_raised_and_its_listener_removed():
    from diffprog.text import listening

    told = []

    def stop(step, tokens):
        told.append(step)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        write(steps=2, callback=stop)
    assert told == [0] and not listening._listeners
    with pytest.raises(dp.LayerError):
        write([[]], callback=stop)
    assert not listening._listeners


def test_the_callback_of_a_jitted_program_is_called_at_every_run():
    told = []
    run = jax.jit(lambda params: dp.text.generate(
        last_alone, params, PROMPTS, 2, callback=lambda step, tokens: told.append(step)).tokens)
    for _ in range(2):
        jax.block_until_ready(run({"table": {"embedding": jnp.asarray(TABLE)}}))
        jax.effects_barrier()
    assert told == [0, 1, 0, 1]


def test_steps_are_delivered_in_order():
    from diffprog.text.listening import _Listener

    told = []
    listener = _Listener(lambda step, tokens: told.append((step, tokens)))
    for step in (1, 0, 2, 0, 2, 1):
        listener.receive(step, step)
    assert told == [(step, step) for step in (0, 1, 2, 0, 1, 2)]


# Log-probabilities of given texts.


@pytest.mark.slow  # the next test is the fast one
@pytest.mark.parametrize("name", ["gpt", "gru", "seq2seq"])
def test_log_probabilities_are_those_of_the_net(name):
    texts = [[3, 1, 4, 1, 5], [5, 2], [6, 6, 6, 0]]
    params, state = trees(name)
    found = dp.text.log_probabilities(NETS[name], params, texts, state=state, **memory(name))
    assert found.shape == (3, 4)
    for i, text in enumerate(texts):
        likely = scores(name, [text], i)[0]
        wanted = [likely[t, text[t + 1]] for t in range(len(text) - 1)]
        np.testing.assert_allclose(found[i, : len(wanted)], wanted, rtol=1e-4, atol=1e-5)
        assert (found[i, len(wanted):] == 0).all()


@pytest.mark.slow
def test_log_probabilities_of_generated_texts_are_their_log_probs():
    params = {"table": {"embedding": jnp.asarray(TABLE)}}
    written = write(key=KEY, temperature=2.0)
    texts = [prompt + row for prompt, row in zip(PROMPTS, written.tokens.tolist(), strict=True)]
    found = dp.text.log_probabilities(last_alone, params, texts)
    own = [found[i, len(prompt) - 1 : len(text) - 1].sum()
           for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))]
    np.testing.assert_allclose(own, written.log_probs, rtol=1e-4)
    nan = dp.text.log_probabilities(last_alone, params, [[1, VOCABULARY, 2], [1, 2, 3]])
    assert np.isnan(nan[0]).any() and np.isfinite(nan[1]).all()
    assert dp.text.log_probabilities(last_alone, params, [[1]]).shape == (1, 0)


# Unrolled repeats.


@pytest.mark.slow
def test_a_program_that_reads_the_parameters_of_a_repeat_generates():
    """It indexes the levels of a repeat in a repeat; also with beam search."""

    @dp.program(embed=dp.embedding(7, 4), head=dp.linear(7),
                body=dp.serial(deep=dp.repeat(2, dp.repeat(3, dp.linear(4)))))
    def net(layers, x):
        y = layers.body(layers.embed(x))
        kernel = layers.body.params["deep"]["kernel"]
        assert kernel.shape[:2] == (2, 3)
        return layers.head(y @ kernel[1, 0] @ kernel[0, 2].T)

    params, _ = net.init(KEY, jnp.ones((1, 2), int))
    params = jax.tree.map(lambda a: a + jax.random.normal(KEY, a.shape), params)
    run, row = jax.jit(net), [1]
    for _ in range(4):  # the next token depends on the last one alone
        row.append(int(run(params, jnp.array([row[-1:]]))[0, -1].argmax()))
    assert dp.text.generate(net, params, [[1]], 4).tokens[0].tolist() == row[1:]
    assert dp.text.beam_search(net, params, [[1]], 4, beams=1).tokens[0, 0].tolist() == row[1:]


@pytest.mark.slow
def test_a_custom_layer_that_indexes_levels_itself_generates():
    """Its child is a repeat, which must not be unrolled."""
    block = dp.linear(7)
    body = dp.repeat(2, block)

    def made(children):
        def apply(params, state, x, *, key=None, train=False):
            y = jax.nn.one_hot(x, 7)
            for i in range(2):
                y = jnp.tanh(block(jax.tree.map(lambda a, i=i: a[i], params["body"]), y))
            return y, state

        def init(key, x):
            return {"body": body.init(key, jnp.zeros((1, 7)))[0]}, {}

        return dp.Layer(init, apply, children=children, rebuild=made)

    net = made({"body": body})
    params, _ = net.init(KEY, jnp.ones((1, 2), int))
    token = net(params, jnp.array([[1]]))[0, 0].argmax()
    assert dp.text.generate(net, params, [[1]], 1).tokens[0, 0] == token
    assert dp.text.generate(net, params, [[1]], 3).tokens.shape == (1, 3)


# Errors.


def test_keys_and_temperatures_of_other_shapes_are_refused():
    expect("", "wants a key, or one for each row, (3,), got key<fry>[2]; pass "
           "jax.random.key(seed), or jax.random.split(key, rows)",
           write, key=jax.random.split(KEY, 2), temperature=1.0)
    assert refused(write, temperature=jnp.ones(2), key=KEY).wants.startswith("one temperature")
    assert refused(write, temperature=jnp.array([1.0, -1.0, 1.0]), key=KEY).got == "-1.0"
    assert refused(dp.text.sample, KEY, jnp.ones((2, 3)), top_k=4).wants == \
        "top_k of at most 3, the vocabulary"
    assert refused(dp.text.sample, KEY, jnp.ones((2, 3)), temperature=[1.0, np.nan]).got == "nan"
