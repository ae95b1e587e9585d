import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file
from support.comparing import KEY, same
from support.refusing import refused

import diffprog as dp
from diffprog.runtime import load_weights, save_weights
from diffprog.transforms.unroll import unrolled

X = jnp.ones((2, 4))
NET = dp.serial(dp.batch_norm(), dp.linear(4), dp.linear(3))
BLOCK = dp.residual(dp.serial(dp.linear(4), jax.nn.relu, dp.batch_norm(), dp.linear(4)))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "net.safetensors"


def made(net, x=X):
    """Trees of different random numbers in each leaf."""
    shapes = jax.eval_shape(net.init, KEY, x)
    keys = iter(jax.random.split(KEY, 99))
    return jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype), shapes)


def test_weights_are_loaded_to_the_bit(file):
    params, state = made(NET)
    save_weights(file, NET, params, state)
    for found in (load_weights(file), load_weights(file, NET, X)):
        same(found[:2], (params, state))
        assert found.code == repr(NET)
        assert found.version == importlib.metadata.version("diffprog") == dp.__version__
        assert repr(found).startswith("Weights(params={") and "serial(batch_norm()" in repr(found)


def test_other_programs_read_the_file(file):
    params, state = made(NET)
    save_weights(file, NET, params, state)
    leaves = load_file(file)
    assert leaves.keys() == dp.tree.paths({"params": params, "state": state}).keys()
    np.testing.assert_array_equal(leaves["params/linear_1/kernel"], params["linear_1"]["kernel"])
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata().items() >= {"net": repr(NET), "diffprog": dp.__version__}.items()


def test_a_file_of_another_program_has_no_code(file):
    from safetensors.numpy import save_file

    save_file({"encoder/kernel": np.ones((2, 3), np.float32)}, file)
    assert load_weights(file)[2:] == ("", "") and load_weights(file).params == {}
    error = refused(load_weights, file, dp.linear(3), X)
    assert error.got == "3 that differ"


@pytest.mark.parametrize("dtype", [
    "bfloat16", "float16", "float32", "int8", "uint8", "int32", "bool", "complex64"])
def test_dtypes_are_kept(file, dtype):
    net = dp.stateless(lambda key, x: {"a": jnp.ones((2, 3), dtype)}, lambda params, x: x)
    params = {"a": jnp.asarray(np.arange(6).reshape(2, 3), dtype).T.copy().T}
    save_weights(file, net, params)
    same(load_weights(file, net, X).params, params)


def test_arrays_in_any_order_of_memory_are_written_right(file):
    kernel = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))[:, ::-1]
    save_weights(file, dp.linear(3, bias=False), {"kernel": kernel})
    np.testing.assert_array_equal(load_weights(file).params["kernel"], kernel)


def test_64_bit_leaves_are_not_cut(file):
    params = {"kernel": np.full((4, 3), 0.1)}
    save_weights(file, dp.linear(3, bias=False), params)
    assert "jax_enable_x64" in refused(load_weights, file).remedy
    with jax.enable_x64(True):
        found = load_weights(file, dp.linear(3, bias=False), X.astype(jnp.float64)).params
        assert found["kernel"].dtype == np.float64 and float(found["kernel"][0, 0]) == 0.1


def test_names_with_slashes_are_those_of_the_net(file):
    net = dp.stateless(lambda key, x: {"mlp/~/linear": {"w": jnp.ones(3)}, "b": [jnp.zeros(1)]},
                       lambda params, x: x)
    params, _ = net.init(KEY, X)
    save_weights(file, net, params)
    same(load_weights(file, net, X).params, params)


# Layouts.


def unstacked(tree, n, name):
    """The copies of a stacked tree, by hand."""
    return {f"{name}_{i}": jax.tree.map(lambda a, i=i: a[i], tree) for i in range(n)}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_stacked_and_unrolled_copies_convert(file, n):
    """Parameters and state, and so the outputs."""
    stacked = dp.serial(first=dp.linear(4), blocks=dp.repeat(n, BLOCK), last=dp.linear(2))
    single = dp.serial(first=dp.linear(4), blocks=BLOCK ** n, last=dp.linear(2))
    params, state = made(stacked)
    parted = [tree | {"blocks": unstacked(tree["blocks"], n, "residual")}
              for tree in (params, state)]
    save_weights(file, stacked, params, state)
    same(list(load_weights(file, single, X)[:2]), parted)
    assert list(dp.tree.paths(state)) == ["blocks/body/batch_norm_0/mean",
                                          "blocks/body/batch_norm_0/var"]
    y = stacked.apply(params, state, X)[0]
    np.testing.assert_allclose(single.apply(*parted, X)[0], y, rtol=1e-6)
    save_weights(file, single, *parted)
    same(load_weights(file, stacked, X)[:2], (params, state))


def test_nested_copies_convert_in_their_order(file):
    """As many outer as inner ones, so that the shapes would not tell."""
    pair = lambda layer: dp.serial(a_0=layer, a_1=layer)  # noqa: E731
    forms = [dp.repeat(2, dp.repeat(2, dp.linear(4))), dp.repeat(2, dp.linear(4) ** 2),
             pair(dp.repeat(2, dp.linear(4))), pair(dp.linear(4) ** 2)]
    params, _ = made(forms[0])
    rows = {}
    rows[forms[0]] = params
    rows[forms[1]] = {f"linear_{j}": jax.tree.map(lambda a, j=j: a[:, j], params) for j in (0, 1)}
    rows[forms[2]] = {f"a_{i}": jax.tree.map(lambda a, i=i: a[i], params) for i in (0, 1)}
    rows[forms[3]] = {f"a_{i}": {f"linear_{j}": jax.tree.map(
        lambda a, i=i, j=j: a[i, j], params) for j in (0, 1)} for i in (0, 1)}
    assert all(a.shape[:2] == (2, 2) for a in jax.tree.leaves(params))
    for one, saved in rows.items():
        save_weights(file, one, saved)
        for other, wanted in rows.items():
            same(load_weights(file, other, X).params, wanted)


def test_the_net_that_generation_unrolls_takes_the_weights_of_the_model(file):
    net, tokens = dp.models.gpt(vocabulary=9, length=4, width=4, depth=2, heads=2), X.astype(int)
    other, split = unrolled(net)
    params, _ = made(net, tokens)
    save_weights(file, net, params)
    same(load_weights(file, other, tokens).params, split(params))
    save_weights(file, other, split(params))
    same(load_weights(file, net, tokens).params, params)


def test_copies_of_equal_names_on_two_levels_are_told_apart(file):
    """The file says which axes are stacked: names and shapes would not tell."""
    inner = dp.serial(a_0=dp.linear(4), a_1=dp.linear(4))
    stacked, single = dp.repeat(2, inner), dp.serial(a_0=inner, a_1=inner)
    params, _ = made(stacked)
    save_weights(file, stacked, params)
    same(load_weights(file, single, X).params, unstacked(params, 2, "a"))


def test_copies_side_by_side_stay_stacked(file):
    """As many heads as blocks, and as many features."""
    block = dp.heads(4, dp.linear(1))
    stacked, single = dp.repeat(4, block), block ** 4
    params, _ = made(stacked)
    save_weights(file, stacked, params)
    name = next(iter(single.children)).rpartition("_")[0]
    same(load_weights(file, single, X).params, unstacked(params, 4, name))


def test_copies_of_other_names_are_not_renamed(file):
    one = dp.serial(a_0=dp.linear(4), a_1=dp.linear(4))
    save_weights(file, one, made(one)[0])
    assert "leaves of this net" in refused(
        load_weights, file, dp.serial(b_0=dp.linear(4), b_1=dp.linear(4)), X).wants


def test_another_number_of_copies_is_refused(file):
    net = dp.serial(blocks=dp.repeat(3, dp.linear(4)))
    save_weights(file, net, made(net)[0])
    error = refused(load_weights, file, dp.serial(blocks=dp.linear(4) ** 2), X)
    assert "blocks/linear_0/kernel: float32[4,4]" in error.remedy
    assert error.got == "6 that differ in weights of serial(blocks=repeat(3, linear(4)))"


# Other nets.


def test_the_difference_to_another_net_is_listed_with_likely_renames(file):
    one = dp.serial(body=dp.linear(4), out=dp.linear(3))
    save_weights(file, one, made(one)[0])
    error = refused(load_weights, file, dp.serial(body=dp.linear(5), output=dp.linear(3)), X)
    assert error.remedy.split("\n  ")[1:] == [
        "params/body/bias: float32[5], saved as float32[4]",
        "params/body/kernel: float32[4,5], saved as float32[4,4]",
        "params/output/bias: float32[3], perhaps saved as params/out/bias",
        "params/output/kernel: float32[5,3], not saved",
        "params/out/kernel: float32[4,3], saved but not in the net"]


def test_a_state_that_is_missing_is_not_made(file):
    save_weights(file, NET, made(NET)[0])
    assert "state/batch_norm_0/mean: float32[4], not saved" in refused(
        load_weights, file, NET, X).remedy
