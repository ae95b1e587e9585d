"""Every registered layer and the networks of the example lower for CPU, GPU and TPU."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, floats
from jax import export
from support.comparing import KEY

import diffprog as dp

PLATFORMS = ("cpu", "cuda", "tpu")


def lowered(net, x, side=None):
    """The gradient of a training call, exported for all platforms without a device."""
    net = dp.serial(net)
    side = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in (side or {}).items()}
    plan = net.plan(x, **side)

    def loss(params, state, x, key, side):
        y, state = net.apply(params, state, x, key=key, train=True, **side)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(y)).astype(float), state

    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True, allow_int=True))
    return export.export(step, platforms=PLATFORMS)(plan.params, plan.state, x, key, side)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_lowers_for_all_platforms(case):
    assert lowered(case.layer, case.x, case.side).platforms == PLATFORMS


@pytest.mark.slow
@pytest.mark.parametrize("model", ["convnet", "mlp", pytest.param(
    "resnet", marks=pytest.mark.slow)])
def test_the_networks_of_the_example_lower_for_all_platforms(model, monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "examples")
    digits = importlib.import_module("digits")
    make = digits.MODELS[model][0]
    assert lowered(make(), floats(4, 8, 8, 1)).platforms == PLATFORMS


def test_an_operation_that_a_platform_lacks_raises():
    with pytest.raises(NotImplementedError, match="schur"):
        lowered(lambda x: jax.scipy.linalg.schur(x)[0] * jax.lax.stop_gradient(x), floats(3, 3))


SMALL = dp.serial(
    dp.conv(2, 3), dp.batch_norm(), jax.nn.relu, dp.dropout(0.5),
    dp.repeat(2, dp.residual(dp.serial(dp.conv(2, 3), dp.batch_norm()))),
    dp.global_avg_pool(), dp.linear(3),
)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["rest", "train"])
def test_an_export_for_all_platforms_runs(train):
    x = jax.random.normal(KEY, (2, 4, 4, 2))
    params, state = SMALL.init(KEY, x)

    def step(params, state, x):
        def loss(params):
            y, after = SMALL.apply(params, state, x, key=jax.random.key(1), train=train)
            return jnp.sum(jnp.square(y)), after

        return jax.value_and_grad(loss, has_aux=True)(params)

    exported = export.export(jax.jit(step), platforms=PLATFORMS)(params, state, x)
    assert exported.platforms == PLATFORMS
    assert "stablehlo.while" in exported.mlir_module()  # the loop of the accelerators
    if not train:
        return
    with jax.default_device(jax.devices("cpu")[0]):
        got, wanted = exported.call(params, state, x), jax.jit(step)(params, state, x)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-4)
