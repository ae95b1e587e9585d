"""Networks of other libraries as layers, against their own libraries."""

import functools
import operator
import pickle
import sys

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from support.neighbours import AFFINE, NEIGHBOURS

import diffprog as dp
from diffprog import interop
from diffprog.core.plans import spec
from diffprog.interop import haiku
from diffprog.interop.foreign import library, named

KEY, OTHER, X = jax.random.key(0), jax.random.key(2), jax.random.normal(jax.random.key(1), (6, 4))
every = pytest.mark.parametrize("name", NEIGHBOURS)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


@functools.cache
def ran(name):
    """The trees of `init`, and output and state of a call in inference and of one in training."""
    layer = NEIGHBOURS[name].layer

    @jax.jit
    def run():
        params, state = layer.init(KEY, X)
        return (params, state), *(layer.apply(params, state, X, key=OTHER, train=train)
                                  for train in (False, True))

    return run()


@every
@pytest.mark.slow
def test_every_law_holds(name):
    dp.check(NEIGHBOURS[name].layer, jax.ShapeDtypeStruct((3, 4), jnp.float32))


@every
def test_parameters_and_outputs_are_those_of_the_library(name):
    _, init, leaves, apply, _ = NEIGHBOURS[name]

    @jax.jit
    def run():
        made = init(KEY, X)
        return leaves(made), *(apply(made, X, OTHER, train) for train in (False, True))

    theirs, inference, training = run()
    (params, _), inferred, trained = ran(name)
    ours = jax.tree.leaves(params)
    assert len(theirs) == len(ours)
    for leaf in theirs:  # in any order
        assert any(leaf.shape == own.shape and np.allclose(leaf, own, atol=1e-6) for own in ours)
    close(inferred[0], inference)
    close(trained[0], training)
    assert not np.allclose(inference, training, atol=0.1)


@every
def test_names_are_those_of_the_library(name):
    trees, _, _ = ran(name)
    params, state = (sorted(dp.tree.paths(tree)) for tree in trees)
    assert " ".join([*params, "|", *state]) == NEIGHBOURS[name].paths
    floats = [a for a in jax.tree.leaves(trees) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {"float32"}


@every
def test_running_statistics_are_updated_in_training_only(name):
    (_, state), (_, inferred), (_, trained) = ran(name)
    close(inferred, state)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, trained)
    assert not any(jax.tree.leaves(same))


@every
def test_training_without_a_key_is_refused(name):
    layer = dp.serial(dp.linear(4), NEIGHBOURS[name].layer)
    params, state = jax.eval_shape(lambda: layer.init(KEY, X))
    with pytest.raises(dp.LayerError, match=f"{name}_0 .*: wants a key when train=True"):
        jax.eval_shape(lambda *trees: layer.apply(*trees, X, train=True), params, state)


@pytest.mark.slow
@every
def test_it_composes_with_other_layers(name):
    affine = AFFINE[name]
    net = dp.serial(dp.linear(4), dp.repeat(2, dp.residual(affine)), jnp.tanh)

    @jax.jit
    def run():
        params, state = net.init(KEY, X)
        x = X @ params["linear_0"]["kernel"] + params["linear_0"]["bias"]
        for i in range(2):
            x += affine(jax.tree.map(operator.itemgetter(i), params["repeat_0"]["body"]), x)
        return state, net(params, X), jnp.tanh(x)

    state, y, by_hand = run()
    assert state == {}
    close(y, by_hand)
    narrow, params = dp.mixed(net, jnp.bfloat16), net.plan(X).params
    y, grads = jax.eval_shape(jax.value_and_grad(lambda params: narrow(params, X).sum()), params)
    assert y.dtype == jnp.float32
    assert jax.tree.map(spec, grads) == jax.tree.map(spec, params)
    assert affine.plan(X.astype(jnp.bfloat16)).y.dtype == jnp.bfloat16


@every
def test_a_layer_without_randomness_has_no_key_operations(name):
    params, _ = AFFINE[name].init(KEY, X)
    net = dp.serial(AFFINE[name], dp.dropout(0.5))

    def run(layer, params):
        return str(jax.make_jaxpr(lambda params, key: layer.apply(
            params, {}, X, key=key, train=True))(params, KEY))

    assert not AFFINE[name].random and "random" not in run(AFFINE[name], params)
    assert "random" in run(net, {f"{name}_0": params})


@pytest.mark.parametrize("name", ["linen", "haiku"])
def test_init_runs_without_the_output(name):
    """The input has 16 TB; these libraries initialize by calling the network."""
    params, _ = AFFINE[name].init(KEY, jax.ShapeDtypeStruct((2**20, 2**20, 4), jnp.float32))
    assert {leaf.shape for leaf in jax.tree.leaves(params)} == {(4, 4), (4,)}


def test_call_receives_parameters_in_the_dtype_of_x():
    def apply_fun(scale, x):
        seen.append(scale.dtype.name)
        return x * scale

    seen = []
    net = interop.from_stax((lambda rng, shape: (shape, jnp.ones(shape[-1:])), apply_fun))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.int32):
        plan = net.plan(jax.ShapeDtypeStruct((2, 4), dtype))
        assert plan.params["0"].dtype == jnp.float32
    assert seen == ["bfloat16", "float32", "float32"]


@pytest.mark.slow
def test_fit_trains_a_net_of_several_libraries():
    net = dp.serial(NEIGHBOURS["linen"].layer, jnp.tanh, dp.linear(4), AFFINE["haiku"])
    step = dp.make_step(net, dp.regression(), optax.adam(0.03))
    fit = dp.fit(step, [(X, X)], key=KEY, steps=100, progress=False)
    first, last = (row["loss"] for row in fit.history)
    assert last < 0.8 * first
    assert fit.state.state["linen_0"]["batch_stats"]["BatchNorm_0"]["mean"].any()


def test_haiku_names_have_an_inverse():
    """Also for modules of the same name made in different methods."""
    tree, _ = jax.eval_shape(lambda: NEIGHBOURS["haiku"].init(KEY, X))
    modules = {"net/linear", "net/~/linear", "net/~down/linear"}
    assert modules < tree.keys()
    dicts = named(tree, haiku._names)
    assert not any(sign in path for path in dp.tree.paths(dicts) for sign in "*@~#")
    undone = haiku._joined(dicts)
    assert undone.keys() == tree.keys()
    assert all(undone[module].keys() == tree[module].keys() for module in tree)


def test_linen_metadata_is_removed():
    boxed = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    net = interop.from_linen(nn.Dense(3, kernel_init=boxed))
    assert jax.tree.structure(net.plan(X).params) == jax.tree.structure({"bias": 0, "kernel": 0})


def test_linen_state_may_change_in_inference():
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("calls", "n", jnp.zeros, (), int)
            calls.value += not self.is_initializing()
            return x + calls.value

    net = dp.serial(interop.from_linen(Counter()), interop.from_linen(Counter()))
    params, state = net.init(KEY, X)
    assert params == {}
    _, state = net.apply(params, state, X)
    y, _ = net.apply(params, state, X)
    close(y, X + 4)


def test_each_stream_of_an_nnx_module_has_its_own_key_and_restarts():
    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.one, self.other = rngs.noise.fork(), rngs.noise.fork()

        def __call__(self, x, quiet):
            return x if quiet else x + self.one.normal(x.shape) - self.other.normal(x.shape)

    net = interop.from_nnx(Noise, call=lambda net, x, train: net(x, quiet=not train))
    y, other, raw = (net.apply({}, {}, X, key=key, train=True)[0]
                     for key in (KEY, OTHER, jax.random.key_data(KEY)))
    assert not np.allclose(y, X) and not np.allclose(other, y)
    close(net.apply({}, {}, X, key=KEY, train=True)[0], y)
    close(raw, y)


def test_integer_arrays_of_an_equinox_module_are_state():
    class Lookup(eqx.Module):
        kernel: jax.Array
        order: jax.Array
        scale: float = 2.0

        def __call__(self, x):
            return self.scale * self.kernel[self.order] * x.sum(0)

    net = interop.from_equinox(
        lambda key: Lookup(jax.random.normal(key, (4,)), jnp.arange(4)[::-1]), axis_name=None)
    params, state = net.init(KEY, X)
    assert params.keys() == {"kernel"} and state["order"].tolist() == [3, 2, 1, 0]
    close(net(params, X, state=state), 2 * params["kernel"][::-1] * X.sum(0))


@pytest.mark.parametrize(("module", "call"), [
    ("flax.linen", interop.from_linen), ("flax.nnx", interop.from_nnx),
    ("haiku", interop.from_haiku), ("equinox", interop.from_equinox),
], ids=["linen", "nnx", "haiku", "equinox"])
def test_the_error_of_a_missing_library_names_the_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module.split('.')[0]} here: pip install "
                                          r"'diffprog\[interop\]'"):
        call(None)


def test_the_error_of_an_incomplete_library_is_its_own(monkeypatch, tmp_path):
    (tmp_path / "incomplete.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="No module named 'not_there'"):
        library("incomplete")


class Shortcut(nn.Module):
    """A block whose shortcut has parameters only if the width changes."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(8, name="body")(x)
        return y + (x if x.shape[-1] == 8 else nn.Dense(8, name="shortcut")(x))


@pytest.mark.slow
def test_a_module_with_an_optional_part_is_used_twice():
    block = interop.from_linen(Shortcut())
    net, x = dp.serial(a=block, b=block), jnp.ones((2, 4))
    params, state = net.init(jax.random.key(0), x)
    assert sorted(params["a"]) == ["body", "shortcut"] and sorted(params["b"]) == ["body"]
    again = dp.serial(a=interop.from_linen(Shortcut()), b=interop.from_linen(Shortcut()))
    for one in (net, again):
        assert jax.eval_shape(one.apply, params, state, x)[0].shape == (2, 8)


def test_equality_and_pickling_are_those_of_the_module():
    one, two, other = (interop.from_linen(nn.Dense(n)) for n in (3, 3, 4))
    assert repr(one) == "from_linen(<Dense>)" == repr(other)
    assert one == two != other and hash(one) == hash(two)
    assert repr(cloudpickle.loads(cloudpickle.dumps(one))) == repr(one)
    with pytest.raises(dp.LayerError, match="use cloudpickle"):
        pickle.dumps(interop.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs)))
