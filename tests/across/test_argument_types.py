"""What users bring: NumPy's arrays and numbers, callables of any kind, parameters in any tree."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import linen, nnx
from support.refusing import KEY, X, refused

import diffprog as dp
from diffprog.core.layer import as_layer

# NumPy's arrays


def zeros(tree):
    """Zeros of NumPy in the place of shapes and arrays; ids, masks and the like as they are."""
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype) if isinstance(
        a, jax.ShapeDtypeStruct) else np.asarray(a), tree)


def seen_by(layer, x, side, *, train):
    """Trace a call on arrays of NumPy that stay such inside of the trace."""
    plan = layer.plan(x, **side)
    params, state = zeros((plan.params, plan.state))
    key = np.asarray(jax.random.PRNGKey(0)) if train else None
    run = lambda: layer.apply(params, state, x, key=key, train=train, **side)  # noqa: E731
    y, after = jax.eval_shape(run)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    return plan.y, y


@pytest.mark.parametrize("case", [case for case in CASES if not case.slow], ids=lambda c: c.name)
def test_every_layer_takes_arrays_of_numpy(case):
    layer, x, side = as_layer(case.layer), zeros(case.x), zeros(case.side)
    for train in (False, True):
        planned, y = seen_by(layer, x, side, train=train)
        assert jax.tree.map(lambda a: a.dtype, planned) == jax.tree.map(lambda a: a.dtype, y)
    if layer.start and (case.options or {}).get("causal"):
        plan = layer.plan(x, **side)
        params, state = zeros((plan.params, plan.state))
        length = jax.tree.leaves(x)[0].shape[1]
        stream = jax.eval_shape(lambda: layer.start(params, state, x, length=length, **side))
        stream = zeros(stream)
        jax.eval_shape(lambda: layer.apply(params, stream, x, **side))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_arrays_of_numpy_give_what_those_of_jax_give(case):
    layer, side = as_layer(case.layer), zeros(case.side)
    draw = np.random.default_rng(0)
    x = jax.tree.map(lambda a: draw.normal(size=a.shape).astype(np.float32) if isinstance(
        a, jax.ShapeDtypeStruct) else np.asarray(a), case.x)
    params, state = layer.init(KEY, x, **side)
    own, held = jax.tree.map(np.asarray, (params, state))
    for train, key in ((False, None), (True, KEY)):
        wanted = layer.apply(params, state, *jnp_of(x, side)[:1], key=key, train=train,
                             **jnp_of(x, side)[1])
        found = layer.apply(own, held, x, key=key, train=train, **side)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def jnp_of(*trees):
    return jax.tree.map(jnp.asarray, trees)


def test_a_layer_of_ones_own_sees_arrays_of_jax():
    """Whatever stands around it, at rest and in a stream."""
    seen = []

    def forward(params, x, *, extra):
        seen.extend((params["w"], x, extra))
        return x.at[0].add(params["w"]) + extra.at[0].get()

    own = dp.stateless(lambda key, x: {"w": jnp.ones(x.shape[-1])}, forward)
    given = {"w": np.ones(4, np.float64)}
    net = dp.serial(own=own)
    for layer, params in ((own, given), (net, {"own": given}), (dp.remat(net), {"own": given})):
        assert layer(params, np.ones((2, 4)), extra=np.ones(3)).dtype == jnp.float32
    assert all(isinstance(a, jax.Array) for a in seen)


@pytest.mark.parametrize("wrap", [
    lambda f: f, lambda f: dp.serial(own=f), lambda f: dp.repeat(2, f),
], ids=["alone", "serial", "repeat"])
def test_parameters_may_begin_as_arrays_of_numpy(wrap):
    """An init may give them; a state too, which equals its plan then."""
    own = dp.Layer(lambda key, x: ({"w": [np.ones(4)]}, {"seen": np.zeros(())}),
                   lambda params, state, x, *, key=None, train=False: (
                       x * params["w"][0], {"seen": state["seen"] + 1}))
    net = wrap(own)
    params, state = net.init(KEY, X)
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves((params, state)))
    dp.tree.verify(net, params, X, state=state)


def test_parameters_that_begin_as_an_array_of_the_users_are_copied():
    """A step takes the memory of what it was given, and must not take that of a pretrained table.
    """
    table = jnp.ones((5, 3))
    own = dp.stateless(lambda key, x: {"table": table, "again": table},
                       lambda params, x: params["table"][x] + params["again"][x])
    batch = np.array([0, 3]), np.zeros((2, 3), np.float32)
    for step in (dp.make_step(own, dp.regression(), optax.sgd(0.1)),
                 dp.training.make_game(dp.serial(own=own), {"own": dp.training.Player(
                     dp.regression(), optax.sgd(0.1))}, inputs=lambda batch: batch[0])):
        step.apply(step.init(KEY, batch[0]), batch)
        assert not table.is_deleted()


# NumPy's numbers


MADE = {
    "dropout": lambda n: dp.dropout(np.float32(0.25)),
    "linear": lambda n: dp.linear(n(3), bias=np.bool_(False)),
    "conv": lambda n: dp.conv(n(3), (n(2), n(3)), stride=n(2), dims=n(2)),
    "batch_norm": lambda n: dp.batch_norm(momentum=np.float32(0.5), eps=np.float32(0.25)),
    "group_norm": lambda n: dp.group_norm(np.array(2), eps=np.float64(0.5)),
    "repeat": lambda n: dp.repeat(n(2), dp.linear(n(4))),
    "mlp": lambda n: dp.models.mlp((n(4), n(5)), n(3)),
    "upsample": lambda n: dp.upsample((n(2), n(3))),
    "embedding": lambda n: dp.embedding(n(5), n(3)),
    "ema": lambda n: dp.ema(dp.linear(n(3)), np.float32(0.5)),
    "attention": lambda n: dp.self_attention(n(2), dropout=np.float32(0.5), window=n(3),
                                             causal=np.True_),
    "rotary": lambda n: dp.self_attention(n(2), rotary=dp.rotary(
        base=np.float32(8), scaling=dp.rope.linear_scaling(np.float32(2)))),
    "dcgan_generator": lambda n: dp.models.dcgan_generator(n(8), n(1), width=n(2)),
    "gpt": lambda n: dp.models.gpt(n(5), length=n(8), width=n(8), depth=n(1), heads=n(2),
                            dropout=np.float32(0.5)),
}


def python(n):
    return int(n)


@pytest.mark.parametrize("name", MADE)
def test_numbers_of_numpy_are_options(name):
    """They are those of Python from then on: a layer shows and computes what it would with them."""
    kinds = [MADE[name](kind) for kind in (np.int64, np.uint8, np.int32, python)]
    assert len(set(kinds)) == len(set(map(repr, kinds))) == 1
    assert "np." not in repr(kinds[0]) and "array" not in repr(kinds[0])


@pytest.mark.parametrize("layer", [
    dp.dropout(np.float32(0.5)), dp.batch_norm(momentum=np.float64(0.5)),
], ids=repr)
def test_numbers_of_numpy_widen_nothing(layer):
    x = jax.ShapeDtypeStruct((2, 8), jnp.bfloat16)
    params, state = layer.init(KEY, x)
    y, after = jax.eval_shape(lambda: layer.apply(
        params, state, jnp.ones((2, 8), jnp.bfloat16), key=KEY, train=True))
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)


@pytest.mark.slow
def test_numbers_of_numpy_are_options_of_tools():
    ids = np.arange(12).reshape(3, 4)
    x, labels = dp.text.mask_tokens(KEY, ids, vocabulary=np.int64(13), mask_token=np.int64(12),
                               rate=np.float32(0.5))
    assert x.shape == labels.shape == (3, 4)
    assert len(list(dp.batches(ids, np.int64(2)))) == 2
    dp.classification(label_smoothing=np.float32(0.1), top_k=np.int32(2))
    assert dp.metrics.bits_per_character(1.0, np.int64(2), np.int64(4)) < 1


# Callables


class Shift:
    """An object that can be each kind of function, by itself and by a method."""

    def __call__(self, x):
        return x + 1

    def shift(self, x):
        return x + 1


class Wiring:
    def __call__(self, layers, x, *, extra=0.0):
        return layers.lin(x) + extra

    def wire(self, layers, x, *, extra=0.0):
        return layers.lin(x) + extra


class Forward:
    def __call__(self, params, x, *, extra=0.0):
        return params["w"] * x + extra

    def run(self, params, x, *, extra=0.0):
        return params["w"] * x + extra

    def start(self, key, x):
        return {"w": jnp.full(x.shape[-1], 2.0)}


def power(x, by):
    return x**by


def wired(layers, x, by, *, extra=0.0):
    return layers.lin(x) * by + extra


def scaled(params, x, by, *, extra=0.0):
    return params["w"] * x * by + extra


@pytest.mark.parametrize(("f", "name"), [
    (Shift(), "Shift"), (Shift().shift, "shift"), (functools.partial(power, by=2), "power"),
    (functools.partial(functools.partial(power, by=2)), "power"),
    (functools.partial(Shift()), "Shift"), (functools.partial(Shift().shift), "shift"),
    (jax.jit(Shift().shift), "shift"), (jax.tree_util.Partial(power, by=2), "power"),
    (jnp.vectorize(Shift().shift), "shift"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_any_callable_is_a_function_of_a_net(f, name):
    net = dp.serial(dp.linear(4), f)
    assert [*net.children] == ["linear_0", f"{name}~0"]
    params, _ = net.init(KEY, X)
    np.testing.assert_array_equal(net(params, X), f(net.children["linear_0"](
        params["linear_0"], X)))
    assert " at 0x" not in repr(net)


@pytest.mark.parametrize(("f", "name"), [
    (Wiring(), "Wiring"), (Wiring().wire, "wire"), (functools.partial(wired, by=1.0), "wired"),
    (functools.partial(lambda by, layers, x, *, extra=0.0: layers.lin(x) * by + extra, 1.0),
     "lambda"),
    (functools.partial(Wiring()), "Wiring"), (functools.partial(Wiring().wire), "wire"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_any_callable_is_a_program(f, name):
    net = dp.program(lin=dp.linear(3))(f)
    assert net.name == name and net.side == {"extra"}
    params, _ = net.init(KEY, X)
    np.testing.assert_array_equal(net(params, X, extra=2.0 * np.ones(3)),
                                  dp.linear(3)(params["lin"], X) + 2)


@pytest.mark.parametrize(("f", "name"), [
    (Forward(), "Forward"), (Forward().run, "run"), (functools.partial(scaled, by=1.0), "scaled"),
    (functools.partial(Forward().run), "run"),
], ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("init", [
    Forward().start,
    functools.partial(lambda key, x, by: {"w": by * jnp.ones(x.shape[-1])}, by=2.0),
], ids=["a method", "a partial"])
def test_any_callable_is_a_forward(f, name, init):
    net = dp.stateless(init, f)
    assert net.name == name and net.side == {"extra"}
    params, _ = net.init(KEY, X)
    np.testing.assert_array_equal(net(params, X, extra=np.ones(4)), 2 * X + 1)


def test_what_a_partial_has_filled_in_is_no_side_input():
    net = dp.stateless(Forward().start, functools.partial(Forward(), extra=1.0))
    assert net.side == frozenset()
    params, _ = net.init(KEY, X)
    np.testing.assert_array_equal(net(params, X), 2 * X + 1)
    whole = dp.program(lin=dp.linear(3))(functools.partial(Wiring().wire, extra=1.0))
    assert whole.side == frozenset()


class Own(nnx.Module):
    def __init__(self):
        self.inner = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def encode(self, x):
        return self.inner(x)


class Dense(eqx.Module):
    """It has no `__call__`, but a method that is passed."""

    inner: eqx.nn.Linear

    def encode(self, x):
        return jax.vmap(self.inner)(x)


FOREIGN = {
    "nnx": (lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "from_nnx"),
    "an nnx module of one's own": (lambda: Own().encode, "from_nnx"),
    "nnx in a partial": (lambda: functools.partial(Own().inner), "from_nnx"),
    "linen": (lambda: linen.Dense(4), "from_linen"),
    "equinox": (lambda: eqx.nn.MLP(4, 4, 4, 1, key=KEY), "from_equinox"),
    "a method of equinox": (lambda: Dense(eqx.nn.Linear(4, 4, key=KEY)).encode, "from_equinox"),
    "equinox over a batch": (lambda: jax.vmap(eqx.nn.Linear(4, 4, key=KEY)), "from_equinox"),
    "nnx that is jitted": (lambda: functools.partial(jax.jit(Own().encode)), "from_nnx"),
    "haiku": (lambda: hk.transform(lambda x: x), "from_haiku"),
    "haiku with state": (lambda: hk.transform_with_state(lambda x: x), "from_haiku"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("compose", [
    lambda f: dp.serial(dp.linear(4), f), dp.residual, lambda f: dp.program(f=f),
    lambda f: dp.linear(4) >> f, dp.freeze], ids=range(5))
def test_a_module_of_another_library_is_no_function(name, compose):
    make, by = FOREIGN[name]
    assert f"dp.interop.{by}" in refused(compose, make()).remedy
    assert hasattr(dp.interop, by)


@pytest.mark.parametrize("name", ["an nnx module of one's own", "equinox"])
@pytest.mark.parametrize("compose", [
    lambda f: dp.ffn(4, f), lambda f: dp.simple_rnn(4, activation=f),
], ids=["ffn", "simple_rnn"])
def test_a_module_of_another_library_is_no_activation(name, compose):
    make, by = FOREIGN[name]
    assert f"dp.interop.{by}" in refused(compose, make()).remedy


def test_a_module_of_another_library_without_parameters_is_a_function():
    net = dp.serial(eqx.nn.Lambda(jax.nn.relu), eqx.filter_jit(jnp.sin))
    np.testing.assert_allclose(net({}, X), jnp.sin(X), rtol=1e-6)


# Parameters


class Pair(NamedTuple):
    kernel: Any
    bias: Any


def square():
    return jnp.full((4, 4), 0.5)


TREES = {
    "lists": lambda: {"layers": [{"kernel": square()}, {"kernel": square()}], "bias": jnp.ones(4)},
    "tuples": lambda: {"pair": (square(), (square(), jnp.ones(4)))},
    "ints": lambda: {0: square(), 1: {2: square(), 10: jnp.ones(4)}},
    "slashes": lambda: {"a": {"c": square()}, "a/b": square(), "x/y": {"z/w": jnp.ones(4)}},
    "a name that begins another": lambda: {"a": square(), "a/b": square()},
    "named": lambda: {"one": Pair(square(), jnp.ones(4)), "rest": [[square()], ()]},
}
WRAPPED = {
    "freeze": dp.freeze,
    "ema": lambda f: dp.ema(f, 0.5),
    "reparam": lambda f: dp.reparam(
        f, lambda key, w: {"half": w / 2, "rest": [0 * w]},
        lambda tree: 2 * tree["half"] + tree["rest"][0], "**", constant="rest"),
    "reparam that carries": lambda f: dp.reparam(
        f, lambda key, w: (w,), lambda tree, carried, train: (tree[0], carried), "**",
        carry=lambda tree: {"calls": jnp.zeros(())}),
}


def of_tree(name):
    def forward(params, x):
        return x + sum(x @ w if w.ndim == 2 else x * w for w in jax.tree.leaves(params))

    return dp.stateless(lambda key, x: TREES[name](), forward)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("kind", WRAPPED)
def test_parameters_may_stand_in_any_tree(name, kind):
    plain = of_tree(name)
    net = WRAPPED[kind](plain)
    own, _ = plain.init(KEY, X)
    params, state = net.init(KEY, X)
    assert jax.tree.structure(net.plan(X).params) == jax.tree.structure(params)
    np.testing.assert_allclose(net(params, X, state=state), plain(own, X), rtol=1e-6)
    merged, _ = dp.tree.merge(net, params, state)
    jax.tree.map(np.testing.assert_array_equal, merged, own)
    again, _ = dp.tree.unmerge(net, merged, {}, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    free = jax.tree.leaves(dp.tree.trainable(net, params))
    assert (sum(free), len(free)) == {
        "freeze": (0, len(jax.tree.leaves(own))), "reparam": (len(free) // 2, len(free)),
    }.get(kind, (len(free), len(free)))


@pytest.mark.parametrize("name", TREES)
def test_one_leaf_in_any_tree_is_frozen_alone(name):
    net = dp.repeat(2, of_tree(name))
    for path in dp.tree.paths(TREES[name]()):
        held = dp.freeze(net, path)
        free = dp.tree.paths(dp.tree.trainable(held, held.plan(X).params))
        assert [p for p, trains in free.items() if not trains] == [path]


@pytest.mark.parametrize("name", ["lists", "ints"])
def test_hyper_writes_parameters_in_any_tree(name):
    net = dp.hyper(of_tree(name), dp.linear(2))
    params, _ = net.init(KEY, X, condition=X)
    assert jax.tree.structure(params["target"]) == jax.tree.structure(
        jax.tree.map(lambda a: {"kernel": a, "bias": a}, TREES[name]()))
    leaves = [np.asarray(a) for a in dp.tree.select(params, "**/kernel").values()]
    assert len({a.tobytes() for a in leaves}) == len(leaves)  # each is drawn by itself


# Booleans


@pytest.mark.parametrize("pool", [
    dp.max_pool(2), dp.max_pool(3, stride=1, padding="SAME"), dp.max_pool(2, padding=1),
    dp.max_pool(2, stride=1, dilation=2, padding=1), dp.global_max_pool(),
    dp.adaptive_max_pool(2)], ids=repr)
def test_the_maximum_of_booleans_is_any(pool):
    x = np.random.default_rng(0).random((2, 5, 6, 2)) > 0.6
    y = pool({}, x)
    assert y.dtype == bool
    np.testing.assert_array_equal(y, np.asarray(pool({}, x.astype(np.float32))) > 0)


@pytest.mark.parametrize("pool", [
    dp.max_pool(2, dims=1, stride=1), dp.max_pool(2, dims=1, stride=1, dilation=2, padding=1),
    dp.global_max_pool(dims=1), dp.adaptive_max_pool(2, dims=1), dp.collapse("max")], ids=repr)
def test_the_maximum_of_booleans_ignores_masked_entries(pool):
    x = np.random.default_rng(0).random((2, 5, 2)) > 0.6
    mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1]], bool)
    np.testing.assert_array_equal(
        pool({}, x, mask=mask), np.asarray(pool({}, x.astype(np.float32), mask=mask)) > 0)
