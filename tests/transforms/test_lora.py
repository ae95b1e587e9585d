"""`lora`: the formula, the trained factors, and fine-tuning of a pretrained net."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, X, close, drawn, gradient, params_of, same

import diffprog as dp

NET = dp.lora(dp.linear(3), 2)


def test_the_formula_in_numpy():
    params = params_of(NET)
    kernel = params["kernel"]
    assert jax.tree.map(jnp.shape, kernel) == {"base": (4, 3), "down": (4, 2), "up": (2, 3)}
    kernel["up"] = jnp.asarray(drawn(2, 3), jnp.float32)
    base, down, up = (np.asarray(kernel[name], np.float64) for name in ("base", "down", "up"))
    close(NET(params, X), (np.asarray(X) @ (base + down @ up)).astype(np.float32))


def test_the_initial_output_is_unchanged_and_the_base_has_no_gradient():
    params = params_of(NET)
    same(NET(params, X), dp.linear(3)(params_of(dp.linear(3)), X))
    grads = gradient(NET, params)["kernel"]
    assert not grads["base"].any() and not grads["down"].any() and grads["up"].any()


@pytest.mark.slow
def test_kernels_with_leading_axes_have_factors_for_each_position():
    params = params_of(dp.lora(dp.conv(5, 3), 2), jnp.ones((1, 4, 4, 6)))
    assert jax.tree.map(jnp.shape, params["kernel"]) == {
        "base": (3, 3, 6, 5), "down": (3, 3, 6, 2), "up": (3, 3, 2, 5)}


def test_freeze_with_exclude_trains_the_factors_only():
    tuned = dp.lora(dp.models.gpt(7, width=4, depth=2, heads=1, length=5), 1, "**/attend/**/kernel")
    net = dp.freeze(tuned, exclude=("**/down", "**/up"))
    ids = jnp.arange(5)[None]
    params, _ = net.init(KEY, ids)
    free = [path for path, moved in dp.tree.paths(dp.tree.trainable(net, params)).items() if moved]
    assert free and all(path.endswith(("down", "up")) for path in free)
    assert {path.split("/")[-3] for path in free} == {"query", "key", "value", "out"}


@pytest.mark.slow
def test_fine_tuning_with_unmerge_and_merge():
    """A target at a distance of rank one from the pretrained map is learned with rank one."""
    plain = dp.linear(3, bias=False)
    pretrained = params_of(plain)
    change = jnp.asarray(drawn(4, 1) @ drawn(1, 3, seed=1), jnp.float32)
    x = jnp.asarray(drawn(64, 4), jnp.float32)
    y = x @ (pretrained["kernel"] + change)
    tuned = dp.lora(plain, 1)
    step = dp.make_step(tuned, dp.regression(), optax.adam(0.1))
    begun = step.init(KEY, x)
    params, _ = dp.tree.unmerge(tuned, pretrained, key=jax.random.key(3))
    close(tuned(params, x), plain(pretrained, x))
    done = dp.fit(step, [(x, y)], steps=400, state=begun._replace(params=params), progress=False)
    same(done.state.params["kernel"]["base"], pretrained["kernel"])
    merged, _ = dp.tree.merge(tuned, done.state.params)
    np.testing.assert_allclose(merged["kernel"], pretrained["kernel"] + change, atol=1e-3)
