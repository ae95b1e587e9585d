"""Laws that are not tested on ids elsewhere: padding, and streams of encoder-decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, NET
from support.comparing import KEY, close

import diffprog as dp

BODY = dp.sinusoidal_positions() >> dp.models.transformer_encoder(2, heads=2, hidden=12)
NETS = {
    "gpt": dp.models.gpt(11, length=5, **NET),
    "llama": dp.models.llama(11, kv_heads=1, window=2, **NET),
    "bert": dp.models.bert(11, length=5, **NET),
    "bert_pretraining": dp.models.bert_pretraining(11, length=5, **NET),
    "transformer": dp.models.transformer(11, 11, **NET),
    "seq2seq": dp.models.seq2seq(11, 11, width=8),
    "classifier of a recurrence": dp.models.sequence_classifier(
        11, 3, dp.recurrent(dp.gru(4), bidirectional=True), width=8),
    "classifier of a transformer": dp.models.sequence_classifier(11, 3, BODY, width=8,
        method="max"),
}
TRANSLATE = ("transformer", "seq2seq")
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
LENGTHS = (5, 3)


def padded(side, fill):
    """Ids of two lengths padded with `fill`, and their mask."""
    positions = np.arange(5)
    mask = np.stack([positions < n if side == "right" else positions >= 5 - n for n in LENGTHS])
    x = np.full((2, 5), fill)
    for row, valid, ids, n in zip(x, mask, IDS, LENGTHS, strict=True):
        row[valid] = ids[:n]
    return jnp.asarray(x), jnp.asarray(mask)


def translated(name, x, mask):
    """The side inputs of a net for x; an encoder-decoder also gets x as its source."""
    given = {} if mask is None else {"mask": mask}
    if name in TRANSLATE:
        given |= {"source": x} | ({} if mask is None else {"source_mask": mask})
    return given


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt")) for name in NETS])
def test_padding_has_no_effect_on_valid_tokens(name):
    net = NETS[name]
    params, _ = net.init(KEY, jnp.asarray(IDS), **translated(name, jnp.asarray(IDS), None))
    run = jax.jit(lambda params, x, given: net(params, x, **given))
    for side in ("left", "right"):
        x, mask = padded(side, 99)  # outside the vocabulary: its vector is NaN
        y = jax.tree.leaves(run(params, x, translated(name, x, mask)))
        for i, n in enumerate(LENGTHS):
            row = jnp.asarray(IDS[i : i + 1, :n])
            alone = jax.tree.leaves(run(params, row, translated(name, row, None)))
            of_row = [a[i][mask[i]] if a.shape[:2] == mask.shape else a[i] for a in y]
            close(of_row, [a[0] for a in alone])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_padding_has_no_effect_on_gradients(name):
    net = NETS[name]
    params, _ = net.init(KEY, jnp.asarray(IDS), **translated(name, jnp.asarray(IDS), None))

    @jax.jit
    @jax.grad
    def slope(params, x, mask):
        y = jax.tree.leaves(net(params, x, **translated(name, x, mask)))
        return sum(jnp.sum(jnp.where(mask[..., None], a, 0) ** 2) if a.shape[:2] == mask.shape
                   else jnp.sum(a**2) for a in y)

    for side in ("left", "right"):
        close(*(slope(params, *padded(side, fill)) for fill in (0, 7)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "seq2seq", pytest.param("transformer", marks=pytest.mark.slow)])
def test_streams_from_the_encoder_output(name):
    net, x = NETS[name], jnp.asarray(IDS)
    source, valid = padded("right", 99)
    params, state = net.init(KEY, x, source=source)
    whole = jax.jit(net)(params, x, source=source, source_mask=valid)

    @jax.jit
    def started(params, state):
        memory = net.children["encoder"](params["encoder"], source, mask=valid)
        return net.start(params, state, x, length=5, memory=memory, memory_mask=valid)

    state = started(params, state)
    outputs, apply = [], jax.jit(net.apply)
    for chunk in (x[:, :3], x[:, 3:4], x[:, 4:]):
        y, state = apply(params, state, chunk)
        outputs.append(y)
    close(jnp.concatenate(outputs, 1), whole)


@pytest.mark.parametrize("case", [
    case for case in CASES if case.name.startswith(("gpt", "llama", "transformer_decoder", "the "))
], ids=lambda case: case.name)
def test_language_models_stream(case):
    """The law of streams skips layers without `start`, so this asserts that these have one."""
    assert case.options["causal"]
    plan = case.layer.plan(case.x, **case.side)
    state = jax.eval_shape(lambda params: case.layer.start(
        params, {}, case.x, length=5, **case.side), plan.params)
    assert jax.tree.leaves(state)
