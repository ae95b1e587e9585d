"""Recurrent modules and cells agree with PyTorch: outputs, final carries, and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import RECURRENT, batch_first, layers, read, run
from reference import arrays, difference

import diffprog as dp

pytestmark = [pytest.mark.usefixtures("optimized"), pytest.mark.slow]
TOLERANCE = 1e-5


def far(ours, theirs):
    """The arrays that differ by more than the tolerance, of those that PyTorch gave."""
    ours, theirs = dp.tree.paths(ours), dp.tree.paths(theirs)
    assert ours.keys() == theirs.keys()
    found = {path: difference(ours[path], leaf) for path, leaf in theirs.items()}
    return {path: value for path, value in found.items() if not value <= TOLERANCE}


def results(case, params, inputs):
    """Outputs, and gradients of what the case adds up, in parameters and inputs."""
    weights = arrays(case, "cot", {})

    def total(params, inputs):
        outputs = run(case, params, inputs)
        return sum((outputs[name] * weights[name]).sum() for name in weights), outputs

    with jax.default_matmul_precision("highest"):
        grads, outputs = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, inputs)
    return {"out": outputs, "grad_param": grads[0], "grad_in": grads[1]}


@pytest.mark.parametrize("case", RECURRENT)
def test_outputs_carries_and_gradients_agree(case):
    given, wanted = read(case), read(case, "grad_param")
    inputs = {name: jnp.asarray(a) for name, a in given.inputs.items() if name != "mask"}
    for way, params in given.params.items():
        x = (given.inputs["x"].shape[0], *params["input"]["kernel"].shape[:1])
        dp.tree.verify(given.cell, params, jax.ShapeDtypeStruct(x, jnp.float32))
        assert way in given.ways
    theirs = {"out": arrays(case, "out", {}), "grad_param": wanted.params,
              "grad_in": arrays(case, "grad_in", {})}
    assert far(results(case, given.params, inputs), theirs) == {}


@pytest.mark.parametrize("case", [case for case in RECURRENT if "Cell" not in case
                                  and "h0" not in case])
def test_one_layer_gives_the_same_outputs(case):
    """Where no carry is asked for, modules are `recurrent` and `serial` as users write them."""
    net, params = layers(case)
    given, wanted = read(case), arrays(case, "out", {})["output"]
    x, mask = given.inputs["x"], given.inputs.get("mask")
    if not batch_first(case):
        x, wanted = x.swapaxes(0, 1), wanted.swapaxes(0, 1)
    dp.tree.verify(net, params, x)
    with jax.default_matmul_precision("highest"):
        y = jax.jit(net.__call__)(params, x, mask=mask)
    assert difference(y, wanted) <= TOLERANCE
    if mask is not None:
        assert not np.asarray(y)[~mask].any()  # exactly, as in a packed sequence


def test_parameters_off_by_a_thousandth_are_detected():
    given, case = read("GRU_packed_bi"), "GRU_packed_bi"
    spoilt = jax.tree.map(lambda leaf: leaf * np.float32(1.001), given.params)
    theirs = {"out": arrays(case, "out", {}), "grad_param": read(case, "grad_param").params,
              "grad_in": arrays(case, "grad_in", {})}
    found = far(results(case, spoilt, {"x": jnp.asarray(given.inputs["x"])}), theirs)
    assert {"out/output", "out/h_n", "grad_in/x"} <= found.keys()
