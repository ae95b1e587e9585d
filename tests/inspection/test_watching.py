"""Norms and histograms of gradients and activations: against those computed without observers."""

import jax
import numpy as np
import optax
import pytest
from support.training_nets import KEY, examples

import diffprog as dp

OBJECTIVE = dp.classification()
NET = dp.serial(dp.linear(8), jax.nn.relu, dp.linear(3), dp.dropout(0.5))


def observed(watch, net=NET, x=None):
    x = examples()[0] if x is None else x
    state = dp.make_step(net, OBJECTIVE, optax.sgd(0.1)).init(KEY, x)
    metrics = {"loss": 0.5}
    watch(1, state, metrics)
    assert metrics.pop("loss") == 0.5
    return metrics, state.params


def test_gradients_are_those_of_a_training_step():
    batch = examples()
    metrics, params = observed(
        dp.inspection.watch_gradients(NET, OBJECTIVE, batch, "**/kernel", key=KEY))
    gradient = jax.grad(lambda params: OBJECTIVE(NET, params, {}, batch, key=KEY, train=True)[0])(
        params)
    for path in ("linear_0/kernel", "linear_1/kernel"):
        expected = np.asarray(dp.tree.paths(gradient)[path], float)
        assert metrics.pop(f"gradient_norm/{path}") == pytest.approx(
            np.linalg.norm(expected), rel=1e-5)
        assert sum(metrics.pop(f"gradient_histogram/{path}").counts) == expected.size
    assert not metrics


def test_activations_are_those_of_inference():
    x, _ = examples()
    metrics, params = observed(dp.inspection.watch_activations(NET, x, "**"))
    hidden = np.asarray(x) @ params["linear_0"]["kernel"] + params["linear_0"]["bias"]
    after = np.maximum(hidden, 0)
    assert metrics["activation_norm/linear_0"] == pytest.approx(np.linalg.norm(hidden), rel=1e-5)
    assert metrics["activation_norm/relu~0"] == pytest.approx(np.linalg.norm(after), rel=1e-5)
    counts = metrics["activation_histogram/relu~0"].counts
    assert counts[0] >= (after == 0).sum() > 0 and sum(counts) == after.size
    assert metrics["activation_norm/dropout~0"] == metrics["activation_norm/linear_1"]


def test_a_layer_with_several_outputs_has_a_path_for_each():
    net = dp.serial(dp.branch(a=dp.linear(2), b=dp.linear(3)), dp.concatenate)
    x = examples()[0]
    metrics, _ = observed(dp.inspection.watch_activations(net, x, "branch*"), net, x)
    assert [name for name in metrics if "norm" in name] == [
        "activation_norm/branch_0/0", "activation_norm/branch_0/1"]


def test_statistics_and_streams_of_the_state_are_as_they_are():
    net = dp.serial(dp.batch_norm(), dp.linear(3))
    x, y = examples()
    step = dp.make_step(net, OBJECTIVE, optax.sgd(0.1))
    state = step.init(KEY, x)
    before = jax.tree.map(np.asarray, state.state)
    for watch in (dp.inspection.watch_gradients(net, OBJECTIVE, (x, y), "**"),
                  dp.inspection.watch_activations(net, x, "batch_norm*")):
        watch(1, state, {})
    jax.tree.map(np.testing.assert_array_equal, state.state, before)


def test_the_stream_of_a_state_is_not_continued():
    net, x = dp.recurrent(dp.gru(3)), np.ones((2, 4, 3), np.float32)
    begun = dp.make_step(net, dp.regression(), optax.sgd(0.1)).init(KEY, x)
    carried = net.start(begun.params, begun.state, x[:, :1], length=8)
    carried = net.apply(begun.params, carried, x)[1]
    watch = dp.inspection.watch_gradients(net, dp.regression(), (x, x), "**")
    found, wanted = {}, {}
    watch(1, begun._replace(state=carried), found)
    watch(1, begun, wanted)
    assert found == wanted and len(wanted) > 2


def test_patterns_that_match_nothing_are_refused():
    x, y = examples()
    with pytest.raises(dp.LayerError, match="a pattern that matches a path"):
        observed(dp.inspection.watch_gradients(NET, OBJECTIVE, (x, y), "nothing", key=KEY))
    with pytest.raises(dp.LayerError, match="matches"):
        dp.inspection.watch_activations(NET, x, "nothing")


def test_fit_writes_them_down(tmp_path):
    x, y = examples()
    step = dp.make_step(NET, OBJECTIVE, optax.sgd(0.1))
    dp.fit(step, [(x, y)], steps=2, key=KEY, progress=False, log_every=1, log=[
        dp.inspection.watch_gradients(NET, OBJECTIVE, (x, y), "linear_0/kernel", key=KEY),
        dp.inspection.watch_activations(NET, x, "linear_0"), tmp_path / "log.jsonl"])
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all("gradient_norm/linear_0/kernel" in line for line in lines)
    assert all("activation_histogram/linear_0" in line for line in lines)
