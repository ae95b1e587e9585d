"""Composition: names, keys, sharing, side inputs, planning, repr, streaming, transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.parameters import fold

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 4))


def names(net):
    return list(net.children)


def same(a, b):
    """Assert that two trees are equal to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype
        np.testing.assert_array_equal(np.asarray(u), np.asarray(v))


def close(a, b):
    """Assert that two trees are equal but for rounding, which is relative to the largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.shape == v.shape
        np.testing.assert_allclose(np.asarray(u), np.asarray(v), rtol=0, atol=1e-5 * largest)


def equal(a, b):
    try:
        same(a, b)
    except AssertionError:
        return False
    return True


def params_of(net, x=X, **side):
    return net.init(KEY, x, **side)[0]


def gradient(net, params, x=X, **side):
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(net(p, x, **side)))))(params)


def spy(seen):
    """A function that changes nothing and remembers what passes."""

    def spy(x):
        seen.append(x)
        return x

    return spy


def identity(x):
    return x


def copies(x):
    return x, x


# Names.

def test_children_are_named_by_kind_and_count():
    net = dp.serial(dp.linear(3), dp.layer_norm(), dp.linear(2), dp.layer_norm())
    assert names(net) == ["linear_0", "layer_norm_0", "linear_1", "layer_norm_1"]
    assert sorted(params_of(net)) == sorted(names(net))


def test_layers_without_parameters_take_no_number():
    net = dp.serial(dp.linear(3), jax.nn.relu, dp.dropout(0.5), dp.linear(2), jax.nn.relu,
                    dp.dropout(0.1), lambda x: x, dp.serial(abs, jnp.tanh))
    assert names(net) == ["linear_0", "relu~0", "dropout~0", "linear_1", "relu~1", "dropout~1",
                          "lambda~0", "serial~0"]
    assert sorted(params_of(net)) == ["linear_0", "linear_1"]


def test_bare_and_not_bare_of_one_kind_are_counted_apart():
    net = dp.serial(dp.serial(abs), dp.serial(dp.linear(3)), dp.serial(jnp.tanh),
                    dp.serial(dp.linear(2)))
    assert names(net) == ["serial~0", "serial_0", "serial~1", "serial_1"]


def test_named_children_follow_the_unnamed():
    net = dp.serial(dp.linear(3), jax.nn.relu, head=dp.linear(2), tail=abs)
    assert names(net) == ["linear_0", "relu~0", "head", "tail"]
    assert net.plan(X).params["head"]["kernel"].shape == (3, 2)


def test_kinds_of_functions_programs_and_wrappers():
    @dp.program(lin=dp.linear(4))
    def block(layers, x):
        return layers.lin(x)

    net = dp.serial(block, dp.repeat(2, block), dp.heads(2, dp.linear(2)), dp.remat(block),
                    dp.residual(block), functools.partial(jnp.clip, max=1.0), dp.branch(block),
                    dp.concatenate)
    assert names(net) == ["block_0", "repeat_0", "heads_0", "block_1", "residual_0", "clip~0",
                          "branch_0", "concatenate~0"]


def test_branch_and_parallel_name_as_serial_does():
    for combine in (dp.branch, dp.parallel):
        net = combine(dp.linear(3), jax.nn.relu, dp.linear(2), other=dp.linear(1))
        assert names(net) == ["linear_0", "relu~0", "linear_1", "other"]


def test_residual_has_body_and_shortcut():
    assert names(dp.residual(dp.linear(4))) == ["body"]
    assert names(dp.residual(dp.linear(3), dp.linear(3))) == ["body", "shortcut"]
    assert list(params_of(dp.residual(abs, dp.linear(4)))) == ["shortcut"]


# Sequences.

def test_grouping_makes_no_difference():
    a, b, c = dp.linear(5), dp.layer_norm(), dp.linear(2)
    nets = [dp.serial(a, b, c), (a >> b) >> c, a >> (b >> c), dp.serial(a, b) >> c,
            a >> dp.serial(b, c), dp.serial() >> a >> b >> c]
    for net in nets:
        assert repr(net) == "serial(linear(5), layer_norm(), linear(2))"
        same(net.init(KEY, X), nets[0].init(KEY, X))
        same(net(params_of(net), X), nets[0](params_of(net), X))


def test_a_function_on_either_side():
    lin = dp.linear(3)
    for net, shown in ((jax.nn.relu >> lin, "serial(jax.nn.relu, linear(3))"),
                       (lin >> jax.nn.relu, "serial(linear(3), jax.nn.relu)"),
                       (dp.gelu >> lin >> dp.gelu, "serial(gelu, linear(3), gelu)")):
        assert repr(net) == shown
    params = params_of(jnp.abs >> lin)
    same((jnp.abs >> lin)(params, X), lin(params["linear_0"], jnp.abs(X)))
    same((lin >> jnp.abs)(params, X), jnp.abs(lin(params["linear_0"], X)))


def test_a_named_serial_is_not_absorbed():
    named = dp.serial(first=dp.linear(3))
    assert names(named >> dp.linear(2)) == ["serial_0", "linear_0"]
    assert names(dp.linear(2) >> named) == ["linear_0", "serial_0"]
    partly = dp.serial(dp.linear(3), last=dp.linear(2))
    assert names(partly >> abs) == ["serial_0", "abs~0"]
    assert names(dp.remat(dp.serial(dp.linear(3))) >> dp.linear(2)) == ["serial_0", "linear_0"]
    assert names(dp.serial(dp.serial(dp.linear(3)), abs)) == ["serial_0", "abs~0"]


def test_a_power_is_copies_with_own_parameters():
    cube = dp.linear(4) ** 3
    assert repr(cube) == "serial(linear(4), linear(4), linear(4))"
    params = params_of(cube)
    assert sorted(params) == ["linear_0", "linear_1", "linear_2"]
    assert not equal(params["linear_0"], params["linear_1"])
    assert not equal(params["linear_1"], params["linear_2"])
    assert names(dp.linear(4) ** 1) == ["linear_0"]
    assert names(cube >> abs) == ["linear_0", "linear_1", "linear_2", "abs~0"]


def test_a_layer_is_a_pair():
    net = dp.serial(dp.linear(3), dp.batch_norm())
    init, apply = net
    assert init is net.init and apply is net.apply
    params, state = init(KEY, X)
    y, after = apply(params, state, X, train=True)
    same((y, after), net.apply(params, state, X, train=True))


# Inserting.

BASE = (dp.linear(4), dp.layer_norm(), dp.linear(2))
DROPS = (dp.linear(4), dp.dropout(0.5), dp.linear(4))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("new", [
    lambda x: x, jax.nn.relu, dp.dropout(0.5), dp.serial(abs, jnp.tanh), dp.flatten(),
], ids=["lambda", "relu", "dropout", "bare serial", "flatten"])
def test_inserting_what_is_bare_changes_no_parameter(new, place):
    more = dp.serial(*BASE[:place], new, *BASE[place:])
    same(params_of(more), params_of(dp.serial(*BASE)))


def test_inserting_another_kind_changes_no_sibling():
    more = dp.serial(BASE[0], dp.batch_norm(), *BASE[1:])
    params, before = params_of(more), params_of(dp.serial(*BASE))
    same({name: tree for name, tree in params.items() if name in before}, before)
    assert set(params) - set(before) == {"batch_norm_0"}


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("new", [identity, jnp.abs], ids=["identity", "abs"])
def test_inserting_a_function_keeps_the_dropout_pattern(new, where):
    def pattern(*layers):
        seen = []
        layers = [dp.serial(f, spy(seen)) if f is DROPS[1] else f for f in layers]
        net = dp.serial(*layers)
        params, state = net.init(KEY, X)
        seen.clear()
        net.apply(params, state, X, key=KEY, train=True)
        return [np.asarray(x) == 0 for x in seen]

    before = pattern(*DROPS)
    assert 0 < before[0].sum() < before[0].size
    same(pattern(*DROPS[:where], new, *DROPS[where:]), before)


def test_inserting_a_dropout_behind_keeps_the_pattern_of_others():
    seen = []
    layers = [dp.linear(4), dp.dropout(0.5), spy(seen), dp.linear(4)]

    def pattern(net):
        params, state = net.init(KEY, X)
        seen.clear()
        net.apply(params, state, X, key=KEY, train=True)
        return seen[0]

    before = pattern(dp.serial(*layers))
    same(pattern(dp.serial(*layers, dp.dropout(0.3))), before)
    same(pattern(dp.serial(*layers[:3], dp.dropout(0.3), layers[3])), before)
    named = dp.serial(dp.linear(4), dp.dropout(0.3), drop=dp.dropout(0.5), spy=spy(seen))
    alone = dp.serial(dp.linear(4), identity, drop=dp.dropout(0.5), spy=spy(seen))
    more, less = (np.asarray(pattern(net)) == 0 for net in (named, alone))
    assert (more >= less).all() and (more != less).any()  # the same, and those dropped before


@pytest.mark.parametrize("new", [dp.linear(4), dp.dropout(0.2), dp.layer_norm(), abs],
                         ids=["linear", "dropout", "layer_norm", "abs"])
def test_named_children_keep_theirs_whatever_is_inserted(new):
    seen = []
    named = {"drop": dp.dropout(0.5), "see": spy(seen), "head": dp.linear(2),
             "body": dp.serial(dp.linear(3))}

    def look(net):
        params, state = net.init(KEY, X)
        seen.clear()
        net.apply(params, state, X, key=KEY, train=True)
        return {name: params[name] for name in ("head", "body")}, np.asarray(seen[0]) == 0

    before = look(dp.serial(**named))
    assert before[1].any() and not before[1].all()
    after = look(dp.serial(new, **named))
    same(after[0], before[0])
    if repr(new) != "dropout(0.2)":
        same(after[1], before[1])


@pytest.mark.parametrize("layer", [
    dp.linear(4), dp.serial(dp.linear(4), jnp.tanh), dp.residual(dp.linear(4)), dp.batch_norm(),
    dp.repeat(2, dp.linear(4)), dp.heads(2, dp.linear(2)), dp.serial(jnp.tanh), jnp.tanh,
], ids=lambda layer: repr(dp.serial(layer)))
def test_remat_renames_nothing_and_changes_no_value(layer):
    plain = dp.serial(dp.linear(4), layer, dp.linear(4))
    wrapped = dp.serial(dp.linear(4), dp.remat(layer), dp.linear(4))
    assert names(wrapped) == names(plain)
    params, state = plain.init(KEY, X)
    same(wrapped.init(KEY, X), (params, state))
    for net in (plain, wrapped):
        assert net.plan(X).params.keys() == params.keys()
    run = [jax.jit(net.apply, static_argnames="train") for net in (wrapped, plain)]
    same(*[f(params, state, X, train=True) for f in run])
    close(gradient(wrapped, params, state=state), gradient(plain, params, state=state))
    text = [str(jax.make_jaxpr(net.apply)(params, state, X)) for net in (wrapped, plain)]
    assert ["checkpoint" in t or "remat" in t for t in text] == [True, False]


def test_remat_keeps_the_dropout_pattern():
    plain = dp.serial(dp.linear(4), dp.dropout(0.5))
    wrapped = dp.serial(dp.linear(4), dp.remat(dp.dropout(0.5)))
    trees = plain.init(KEY, X)
    same(wrapped.apply(*trees, X, key=KEY, train=True), plain.apply(*trees, X, key=KEY, train=True))


# Children mirror the trees.

def test_children_are_initialized_as_if_alone():
    net = dp.serial(dp.linear(5), dp.batch_norm(), body=dp.residual(dp.linear(5)))
    params, state = net.init(KEY, X)
    x = X
    for name, child in net.children.items():
        alone = child.init(fold(KEY, name), x)
        same(alone, (params.get(name, {}), state.get(name, {})))
        x = child(params.get(name, {}), x, state=state.get(name, {}))
    same(x, net(params, X, state=state))


def test_children_of_a_program_are_complete_layers():
    @dp.program(norm=dp.layer_norm(), feed=dp.serial(dp.linear(4), jax.nn.relu), act=jnp.tanh)
    def block(layers, x):
        return x + layers.act(layers.feed(layers.norm(x)))

    params = params_of(block)
    assert sorted(params) == ["feed", "norm"]
    run = {name: functools.partial(block.children[name], params.get(name, {}))
           for name in block.children}
    same(block(params, X), X + run["act"](run["feed"](run["norm"](X))))


@pytest.mark.parametrize("wrap", [
    functools.partial(dp.repeat, 3), functools.partial(dp.heads, 3)], ids=["repeat", "heads"])
def test_copies_are_initialized_as_if_alone(wrap):
    layer = dp.serial(dp.linear(4), dp.batch_norm())
    trees = wrap(layer).init(KEY, X)
    for i in range(3):
        alone = layer.init(jax.random.fold_in(KEY, i), X)
        same(jax.tree.map(lambda a, i=i: a[i], trees), alone)


def test_what_is_empty_is_left_out():
    net = dp.serial(dp.linear(3), abs, dp.serial(jnp.tanh), dp.serial(dp.batch_norm()))
    params, state = net.init(KEY, X)
    assert sorted(params) == ["linear_0", "serial_0"]
    assert list(state) == ["serial_0"]
    assert dp.serial(abs, jnp.tanh).init(KEY, X) == ({}, {})


# A child called twice.

def twice(layers, x):
    return layers.lin(layers.lin(x))


def test_calling_a_child_twice_shares_its_parameters():
    net = dp.program(lin=dp.linear(4))(twice)
    params = params_of(net)
    assert list(params) == ["lin"]
    kernel, bias = params["lin"]["kernel"], params["lin"]["bias"]
    close(net(params, X), (X @ kernel + bias) @ kernel + bias)

    def unshared(first, second):
        y = (X @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]
        return jnp.sum(jnp.square(y))

    parts = jax.grad(unshared, argnums=(0, 1))(params["lin"], params["lin"])
    close(gradient(net, params)["lin"], jax.tree.map(jnp.add, *parts))
    assert not equal(*parts)


def test_one_layer_under_two_names_is_not_shared():
    lin = dp.linear(4)
    params = params_of(dp.serial(a=lin, b=lin))
    assert not equal(params["a"], params["b"])


def test_calling_a_child_twice_shares_running_statistics():
    @dp.program(norm=dp.batch_norm())
    def both(layers, x):
        return layers.norm(x), layers.norm(3 * x + 1)

    params, state = both.init(KEY, X)
    y, after = both.apply(params, state, X, train=True)
    norm = dp.batch_norm()
    first, once = norm.apply(params["norm"], state["norm"], X, train=True)
    second, again = norm.apply(params["norm"], once, 3 * X + 1, train=True)
    close((y, after), ((first, second), {"norm": again}))
    assert not equal(once, again)


def test_calling_a_dropout_twice_drops_differently():
    @dp.program(drop=dp.dropout(0.5))
    def both(layers, x):
        return layers.drop(x), layers.drop(x)

    @dp.program(drop=dp.dropout(0.5))
    def one(layers, x):
        return layers.drop(x)

    ones = jnp.ones((8, 8))
    (first, second), _ = both.apply({}, {}, ones, key=KEY, train=True)
    assert not equal(first, second)
    for y in (first, second):
        assert set(np.unique(y)) == {0.0, 2.0}
    same(one.apply({}, {}, ones, key=KEY, train=True)[0], first)


def test_tied_parameters():
    @dp.program(embed=dp.linear(3, bias=False), body=dp.serial(dp.linear(3)))
    def tied(layers, x):
        h = layers.body(layers.embed(x))
        return (h + layers.body.params["linear_0"]["bias"]) @ layers.embed.params["kernel"].T

    params = params_of(tied)

    def manual(params):
        kernel, lin = params["embed"]["kernel"], params["body"]["linear_0"]
        return (X @ kernel @ lin["kernel"] + 2 * lin["bias"]) @ kernel.T

    close(tied(params, X), manual(params))
    close(gradient(tied, params), jax.grad(lambda p: jnp.sum(jnp.square(manual(p))))(params))
    assert names(tied) == ["embed", "body"]


# Side by side.

def test_branch():
    net = dp.branch(dp.linear(2), jnp.abs, other=dp.linear(3))
    params = params_of(net)
    wanted = (dp.linear(2)(params["linear_0"], X), jnp.abs(X), dp.linear(3)(params["other"], X))
    y = net(params, X)
    assert isinstance(y, tuple)
    same(y, wanted)


def test_merging():
    parts = (dp.linear(4), jnp.abs)
    params = params_of(dp.branch(*parts))
    a, b = dp.branch(*parts)(params, X)
    same(dp.branch(*parts, merge=dp.concatenate)(params, X), jnp.concatenate([a, b], -1))
    same(dp.branch(*parts, merge=dp.add)(params, X), a + b)
    same(dp.branch(*parts, merge=lambda y: y[1])(params, X), b)
    same((dp.branch(*parts) >> dp.add)({"branch_0": params}, X), a + b)
    same(dp.add((a, b, a)), a + b + a)
    same(dp.concatenate((a,)), a)


def test_parallel():
    net = dp.parallel(dp.linear(2), jnp.abs, dp.linear(2))
    other = X[:, :3]
    params = params_of(net, (X, X, other))
    assert params["linear_1"]["kernel"].shape == (3, 2)
    y = net(params, (X, -X, other))
    assert isinstance(y, tuple)
    same(y, (dp.linear(2)(params["linear_0"], X), jnp.abs(X),
             dp.linear(2)(params["linear_1"], other)))
    same(net(params, [X, -X, other]), y)


def test_residual():
    net = dp.residual(dp.linear(4))
    params = params_of(net)
    same(net(params, X), X + dp.linear(4)(params["body"], X))
    net = dp.residual(dp.linear(2), dp.linear(2, bias=False))
    params = params_of(net)
    close(net(params, X), X @ params["shortcut"]["kernel"] + dp.linear(2)(params["body"], X))
    pair = dp.residual(dp.parallel(dp.linear(4), jnp.tanh))
    params = params_of(pair, (X, X))
    close(pair(params, (X, X)), (X + dp.linear(4)(params["body"]["linear_0"], X), X + jnp.tanh(X)))


# Side inputs.

MASK = jnp.array([True, False, True])


def taker(log=None):
    """Zeroes x where the mask is False; nothing without a mask."""

    def forward(params, x, *, mask=None):
        if log is not None:
            log.append(mask)
        return x if mask is None else x * mask[:, None]

    return dp.stateless(None, forward, name="taker")


WRAPS = {
    "serial": lambda f: dp.serial(dp.linear(4), f),
    "named": lambda f: dp.serial(lin=dp.linear(4), f=f),
    ">>": lambda f: dp.linear(4) >> f >> abs,
    "residual": lambda f: dp.residual(dp.serial(dp.linear(4), f)),
    "shortcut": lambda f: dp.residual(dp.linear(4), f),
    "branch": lambda f: dp.branch(dp.linear(4), f, merge=dp.concatenate),
    "parallel": lambda f: dp.serial(copies, dp.parallel(dp.linear(4), f), dp.add),
    "repeat": lambda f: dp.repeat(3, dp.serial(dp.linear(4), f)),
    "heads": lambda f: dp.heads(2, dp.serial(dp.linear(4), f)),
    "remat": lambda f: dp.remat(dp.serial(dp.linear(4), f)),
    "program": lambda f: dp.program(f=f, lin=dp.linear(4))(
        lambda layers, x: layers.lin(layers.f(layers.lin(x)))),
    "nested": lambda f: dp.serial(dp.linear(4), dp.repeat(2, dp.residual(dp.remat(
        dp.branch(dp.heads(2, dp.serial(dp.linear(2), f)), dp.linear(4), merge=dp.add))))),
}


@pytest.mark.parametrize("name", WRAPS)
def test_a_side_input_goes_to_exactly_those_who_take_it(name):
    wrap = WRAPS[name]
    net = wrap(taker())
    assert net.side == {"mask"}
    params = params_of(net, mask=MASK)
    same(params, params_of(net))
    masked = wrap(lambda x: x * MASK[:, None])
    assert masked.side == frozenset()
    with_mask, without = jax.jit(net)(params, X, mask=MASK), jax.jit(net)(params, X)
    close(with_mask, jax.jit(masked)(params, X))
    close(gradient(net, params, mask=MASK), gradient(masked, params))
    assert not equal(with_mask, without)


@pytest.mark.parametrize("name", WRAPS)
def test_none_is_absent(name):
    net, plain = WRAPS[name](taker()), WRAPS[name](identity)
    params, state = net.init(KEY, X, mask=None)
    same(params, params_of(plain))
    same(net(params, X, mask=None), plain(params, X))
    same(net.apply(params, state, X, mask=None)[0], plain(params, X))
    same(plain(params, X, mask=None), plain(params, X))  # even where nobody takes it


def test_each_child_gets_its_own_side_inputs():
    seen = {}

    def layer(*taken):
        def apply(params, state, x, *, key=None, train=False, **side):
            seen[taken] = sorted(side)
            return x, state

        return dp.Layer(lambda key, x, **side: ({}, {}), apply, bare=True, side=frozenset(taken))

    net = dp.serial(layer(), layer("mask"), dp.residual(layer("positions")),
                    dp.repeat(2, layer("mask", "positions")))
    assert net.side == {"mask", "positions"}
    net({}, X, mask=MASK, positions=X)
    assert seen == {(): [], ("mask",): ["mask"], ("positions",): ["positions"],
                    ("mask", "positions"): ["mask", "positions"]}
    net({}, X, positions=X)
    assert seen == {(): [], ("mask",): [], ("positions",): ["positions"],
                    ("mask", "positions"): ["positions"]}


def test_a_program_may_change_a_side_input_on_the_way():
    @dp.program(lin=dp.linear(4), first=taker(), second=taker())
    def f(layers, x, *, mask=None):
        return layers.second(layers.first(layers.lin(x), mask=~mask))

    params = params_of(f, mask=MASK)
    y = f(params, X, mask=MASK)
    close(y, dp.linear(4)(params["lin"], X) * ~MASK[:, None])
    assert f.side == {"mask"}


def test_a_program_routes_what_it_names_itself():
    log = []

    @dp.program(f=taker(log))
    def keeps(layers, x, *, mask=None):
        return layers.f(x) + (0 if mask is None else mask[:, None])

    net = dp.serial(keeps)
    close(net({}, X, mask=MASK), X + MASK[:, None])
    assert log and all(mask is None for mask in log)


def test_a_program_may_rename_a_side_input():
    @dp.program(f=taker())
    def renames(layers, x, *, memory_mask=None):
        return layers.f(x, mask=memory_mask)

    net = dp.serial(renames)
    assert net.side == {"memory_mask", "mask"}  # mask, unnamed, goes to the child as ever
    same(net({}, X, memory_mask=MASK), X * MASK[:, None])
    same(net({}, X), X)


def test_a_side_input_may_decide_which_children_are_called():
    @dp.program(lin=dp.linear(4), extra=dp.linear(4))
    def f(layers, x, *, memory=None):
        return layers.lin(x) if memory is None else layers.lin(x) + layers.extra(memory)

    params = params_of(f, memory=X)
    assert sorted(params) == ["extra", "lin"]
    same(f(params, X), dp.linear(4)(params["lin"], X))
    with pytest.raises(dp.LayerError, match="a call of every child, extra too"):
        f.init(KEY, X)


# The training flag.

def test_a_program_that_names_train_receives_it():
    flags = []

    @dp.program(lin=dp.linear(4), late=dp.linear(4))
    def f(layers, x, *, train):
        flags.append(train)
        return layers.late(layers.lin(x)) if train else layers.lin(x)

    net = dp.serial(dp.repeat(1, f), dp.residual(f))
    assert "train" not in net.side | f.side
    params, state = f.init(KEY, X)
    assert sorted(flags) == [False, True]  # planned for both values, once each
    assert sorted(params) == ["late", "lin"]
    flags.clear()
    y, _ = f.apply(params, state, X, train=True)
    close(y, dp.linear(4)(params["late"], dp.linear(4)(params["lin"], X)))
    same(f(params, X), dp.linear(4)(params["lin"], X))
    assert flags == [True, False]
    trees = net.init(KEY, X)
    flags.clear()
    net.apply(*trees, X, train=True)
    assert set(flags) == {True}


# Planning: every leaf is traced once.

def leaf(log):
    def forward(params, x):
        log.append(x.shape)
        return params["scale"] * x

    return dp.stateless(lambda key, x: {"scale": jnp.ones(x.shape[-1])}, forward, name="leaf")


TRACED = {
    "serial": dp.serial, "residual": dp.residual, "remat": dp.remat,
    "repeat": lambda f: dp.repeat(2, f), "heads": lambda f: dp.heads(2, f),
    "branch": lambda f: dp.branch(f, abs) >> dp.add,
    "program with train": lambda f: dp.program(f=f)(lambda layers, x, *, train: layers.f(x)),
    "shared": lambda f: dp.program(f=f)(lambda layers, x: layers.f(layers.f(x))),
}


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("wrap", TRACED)
def test_init_traces_each_leaf_once(wrap, depth):
    log = []
    net = leaf(log)
    for _ in range(min(depth, 2) if wrap in ("repeat", "heads") else depth):
        net = TRACED[wrap](net)
    net.init(KEY, X)
    assert len(log) == 1
    net.init(KEY, X)
    net.init(jax.random.key(1), X + 1)
    net.plan(X)
    dp.summary(net, X)
    assert len(log) == 1
    net.init(KEY, X[:2])
    assert len(log) == 2


def test_a_layer_in_two_places_is_traced_once():
    log = []
    one = leaf(log)
    dp.serial(dp.serial(one), dp.residual(dp.serial(one)), one).init(KEY, X)
    assert len(log) == 1


def test_apply_traces_each_leaf_once_more():
    log = []
    net = dp.serial(dp.serial(dp.serial(leaf(log))))
    params, state = net.init(KEY, X)
    log.clear()
    jax.jit(net.apply)(params, state, X)
    assert len(log) == 1


# repr is code.

BLOCK = dp.residual(dp.serial(dp.layer_norm(), dp.linear(6), jax.nn.relu, dp.linear(4)))
IMAGE = jnp.ones((2, 8, 8, 4))
SHOWN = {
    "wires": (dp.serial(dp.linear(4, bias=False), BLOCK, dp.residual(dp.linear(3), dp.linear(3)),
                        head=dp.branch(dp.linear(3), jnp.tanh, merge=dp.concatenate)), X),
    "functions": (dp.linear(3) >> jax.nn.relu >> dp.gelu >> jnp.tanh
                  >> functools.partial(jax.nn.gelu, approximate=False)
                  >> functools.partial(jnp.clip, min=-1.0, max=(1.0)), X),
    "image": (dp.serial(dp.conv(4, 3, stride=2, padding=((1, 0), (0, 1))), dp.batch_norm(
        momentum=0.5), dp.max_pool((2, 2), padding="SAME"), dp.dropout(0.5)), IMAGE),
    "pools": (dp.serial(dp.conv(4, (3, 3), groups=2), dp.avg_pool(2, stride=1), dp.branch(
        dp.global_avg_pool(), dp.global_max_pool(), merge=dp.add)), IMAGE),
    "sequence": (dp.serial(dp.conv(4, (3,)), dp.conv(4, 3, dims=1, dilation=2), dp.flatten(keep=2)),
                 jnp.ones((2, 5, 4))),
    "copies": (dp.serial(dp.repeat(3, BLOCK, unroll=2), dp.heads(2, dp.remat(dp.linear(2)))), X),
    "pairs": (dp.serial(dp.branch(dp.linear(2), other=abs), dp.parallel(
        dp.linear(2), dp.linear(3)), dp.concatenate), X),
    "power": (dp.linear(4) ** 3 >> dp.layer_norm(scale=False, eps=1e-3), X),
    "long": (dp.serial(*[dp.serial(*[dp.linear(11), jax.nn.relu] * 6) for _ in range(2)]), X),
    "long, in wrappers": (dp.repeat(2, dp.remat(dp.serial(*[dp.linear(4), jax.nn.relu] * 6))), X),
    "long, in brackets": (dp.residual(dp.serial(*[dp.linear(4), dp.layer_norm()] * 6)), X),
}


def namespace():
    names = {"jax": jax, "jnp": jnp, "functools": functools}
    exec("from diffprog import *", names)
    return names


@pytest.mark.parametrize("name", SHOWN)
def test_repr_evaluates_to_an_equal_net(name):
    net, x = SHOWN[name]
    again = eval(repr(net), namespace())
    assert repr(again) == repr(net)
    assert names(again) == names(net)
    trees = net.init(KEY, x)
    same(again.init(KEY, x), trees)
    for train in (False, True):  # one text of the whole program, so one output for all inputs
        first, second = (
            jax.jit(layer.apply, static_argnames="train").lower(*trees, x, key=KEY, train=train)
            for layer in (net, again))
        assert first.as_text() == second.as_text()


def test_every_layer_and_combinator_is_shown_above():
    text = " ".join(repr(net) for net, _ in SHOWN.values())
    for name in ("serial", "branch", "parallel", "residual", "repeat", "heads", "remat", "linear",
                 "conv", "max_pool", "avg_pool", "global_avg_pool", "global_max_pool",
                 "batch_norm", "layer_norm", "dropout", "flatten"):
        assert re.search(rf"\b{name}\(", text), name
    for name in ("gelu", "concatenate", "add", "jax.nn.relu", "functools.partial(jnp.clip"):
        assert name in text, name


def test_how_functions_are_shown():
    def local(x):
        return x

    assert repr(dp.serial(jax.nn.relu, dp.gelu, jnp.sin)) == "serial(jax.nn.relu, gelu, jnp.sin)"
    assert repr(dp.serial(abs)) == "serial(abs)"
    assert re.fullmatch(r"serial\(<lambda test_composition\.py:\d+>\)",
                        repr(dp.serial(lambda x: x)))
    assert re.fullmatch(r"serial\(<local test_composition\.py:\d+>\)", repr(dp.serial(local)))
    assert repr(dp.serial(identity)) == "serial(identity)"
    partial = functools.partial(jnp.clip, max=1.0)
    assert repr(dp.serial(partial)) == "serial(functools.partial(jnp.clip, max=1.0))"


def test_defaults_are_not_shown():
    assert repr(dp.conv(4, 3, stride=1, padding="SAME", bias=True)) == "conv(4, 3)"
    assert repr(dp.residual(dp.linear(3), None)) == "residual(linear(3))"
    assert repr(dp.max_pool(2, stride=None)) == "max_pool(2)"
    assert repr(dp.layer_norm(eps=float("1e-5"))) == "layer_norm()"  # equal is enough


def test_a_program_shows_its_children():
    @dp.program(norm=dp.layer_norm(), feed=dp.linear(4))
    def block(layers, x):
        return layers.feed(layers.norm(x))

    assert repr(block) == "block(norm=layer_norm(), feed=linear(4))"
    assert repr(dp.repeat(2, block)) == "repeat(2, block(norm=layer_norm(), feed=linear(4)))"


# Streaming, shown on a toy: the running sum over axis 1.

SERIES = jax.random.normal(jax.random.key(2), (2, 6, 3))


def running():
    def init(key, x):
        return {"scale": jax.random.normal(key, x.shape[-1:])}, {}

    def apply(params, state, x, *, key=None, train=False):
        y = jnp.cumsum(x, axis=1)
        if "total" in state:
            y = y + state["total"][:, None]
            state = {"total": y[:, -1]}
        return params["scale"] * y, state

    def start(params, state, x, *, length):
        return {"total": jnp.zeros_like(x[:, 0])}

    return dp.Layer(init, apply, start, name="running")


def again(layers, x):
    return layers.run(layers.lin(layers.run(x)))


STREAMS = {
    "alone": (running(), {"total"}),
    "serial": (dp.serial(running(), jax.nn.relu, dp.linear(3), running()),
               {"running_0/total", "running_1/total"}),
    "residual": (dp.residual(running()), {"body/total"}),
    "branch": (dp.branch(running(), dp.linear(2), merge=dp.concatenate), {"running_0/total"}),
    "program": (dp.program(run=running(), lin=dp.linear(3))(again), {"run/total", "run@1/total"}),
    "program of a serial": (dp.program(run=dp.serial(running()), lin=dp.linear(3))(again),
                            {"run/running_0/total", "run@1/running_0/total"}),
    "repeat": (dp.repeat(3, running()), {"total"}),
    "heads": (dp.heads(2, running()), {"total"}),
    "remat": (dp.remat(running()), {"total"}),
    "repeat of a program": (dp.repeat(2, dp.program(run=running(), lin=dp.linear(3))(again)),
                            {"run/total", "run@1/total"}),
    "with running statistics": (dp.serial(dp.batch_norm(), dp.repeat(2, dp.serial(
        dp.batch_norm(), dp.residual(running())))),
        {"batch_norm_0/mean", "batch_norm_0/var", "repeat_0/batch_norm_0/mean",
         "repeat_0/batch_norm_0/var", "repeat_0/residual_0/body/total"}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_chunk_by_chunk_equals_all_at_once(name):
    net, kept = STREAMS[name]
    params, state = net.init(KEY, SERIES)
    apply = jax.jit(net.apply)
    whole, after = apply(params, state, SERIES)
    same(after, state)  # without start nothing is carried
    for sizes in ((1,) * 6, (3, 1, 2)):
        carried = net.start(params, state, SERIES[:, :1], length=6)
        assert set(dp.tree.paths(carried)) == kept
        chunks, at = [], 0
        for size in sizes:
            x = SERIES[:, at : at + size]
            y, new = apply(params, carried, x)
            assert jax.tree.structure(new) == jax.tree.structure(carried)
            assert not equal(new, carried)
            chunks.append(y)
            carried, at = new, at + size
        close(jnp.concatenate(chunks, 1), whole)


def test_streaming_state_of_copies_is_stacked():
    for net in (dp.repeat(3, running()), dp.heads(3, running())):
        params, state = net.init(KEY, SERIES)
        carried = net.start(params, state, SERIES, length=6)
        assert carried["total"].shape == (3, 2, 3)


def test_streaming_state_serves_an_equal_net():
    def build():
        return dp.serial(running(), dp.residual(dp.remat(running())), last=running())

    params, state = build().init(KEY, SERIES)
    carried = build().start(params, state, SERIES[:, :1], length=6)
    first, carried = build().apply(params, carried, SERIES[:, :4])
    last, _ = build().apply(params, carried, SERIES[:, 4:])
    close(jnp.concatenate([first, last], 1), build()(params, SERIES))


def test_streaming_in_a_scan():
    net = dp.program(run=running(), lin=dp.linear(3))(again)
    params, state = net.init(KEY, SERIES)
    carried = net.start(params, state, SERIES[:, :1], length=6)

    def step(carried, x):
        y, carried = net.apply(params, carried, x[:, None])
        return carried, y[:, 0]

    _, y = jax.lax.scan(step, carried, SERIES.swapaxes(0, 1))
    close(y.swapaxes(0, 1), net(params, SERIES))


def test_layers_that_do_not_mix_time_have_no_start():
    for net in (dp.linear(3), dp.serial(dp.linear(3), abs), dp.repeat(2, dp.linear(3)),
                dp.heads(2, dp.residual(dp.layer_norm())), dp.remat(abs), dp.batch_norm()):
        assert net.start is None


@pytest.mark.parametrize(("layer", "path"), [
    (dp.conv(3, 3, dims=1), "a/b"), (dp.flatten(keep=2), "a/b"), (dp.max_pool(1, dims=1), "a/b"),
    (dp.global_avg_pool(dims=1), "a/b"), (dp.residual(dp.conv(3, 3, dims=1)), "a/b/body"),
    (dp.repeat(2, dp.serial(c=dp.conv(3, 3, dims=1))), "a/b/c"),
    (dp.heads(2, dp.serial(c=dp.conv(3, 3, dims=1))), "a/b/c"),
    (dp.remat(dp.serial(c=dp.conv(3, 3, dims=1))), "a/b/c"),
], ids=repr)
def test_what_cannot_stream_says_so_in_start(layer, path):
    net = dp.serial(a=dp.serial(running(), b=layer))
    params, state = net.init(KEY, SERIES)
    with pytest.raises(dp.LayerError, match="wants the whole input at once, got a streaming call"
                       ) as caught:
        net.start(params, state, SERIES[:, :1], length=6)
    assert caught.value.path == path


@pytest.mark.parametrize("name", ["alone", "serial", "program", "repeat", "heads"])
def test_start_begins_anew(name):
    net, _ = STREAMS[name]
    params, state = net.init(KEY, SERIES)
    fresh = net.start(params, state, SERIES[:, :1], length=6)
    _, used = net.apply(params, fresh, SERIES)
    same(net.start(params, used, SERIES[:, :1], length=6), fresh)


def test_start_checks_what_it_is_given():
    net = dp.serial(a=running())
    params, state = net.init(KEY, SERIES)
    for length in (0, 2.5, True):
        with pytest.raises(dp.LayerError, match="length, an int of at least 1"):
            net.start(params, state, SERIES, length=length)
    with pytest.raises(dp.LayerError, match="params of its children"):
        net.start({"b": {}}, state, SERIES, length=6)


@pytest.mark.parametrize(("started", "called"), [(2, 1), (3, 2), (1, 2), (2, 3)])
def test_a_streaming_call_makes_the_calls_that_start_made(started, called):
    @dp.program(run=running())
    def as_often_as_long(layers, x):
        for _ in range(x.shape[1]):
            x = layers.run(x)
        return x

    params, state = as_often_as_long.init(KEY, SERIES)
    carried = as_often_as_long.start(params, state, SERIES[:, :started], length=6)
    as_often_as_long.apply(params, carried, SERIES[:, :started])
    with pytest.raises(dp.LayerError, match="as many calls of run as start made"):
        as_often_as_long.apply(params, carried, SERIES[:, :called])


def test_a_streaming_call_may_not_leave_out_a_child():
    @dp.program(run=running())
    def unless_masked(layers, x, *, mask=None):
        return layers.run(x) if mask is None else x

    params, state = unless_masked.init(KEY, SERIES)
    carried = unless_masked.start(params, state, SERIES, length=6)
    with pytest.raises(dp.LayerError, match="as many calls of run as start made"):
        unless_masked.apply(params, carried, SERIES, mask=MASK)


# JAX's transformations work on the pair unwrapped.

DEEP = dp.serial(dp.batch_norm(), dp.repeat(2, dp.residual(dp.linear(4))),
                 dp.dropout(0.5), head=dp.heads(2, dp.linear(1)))


@pytest.fixture(scope="module")
def trees():
    return DEEP.init(KEY, X)


def test_jit(trees):
    params, state = trees
    same(jax.jit(DEEP.init)(KEY, X), trees)
    close(jax.jit(DEEP.apply)(params, state, X), DEEP.apply(params, state, X))
    run = jax.jit(DEEP.apply, static_argnames="train")
    close(run(params, state, X, key=KEY, train=True),
          DEEP.apply(params, state, X, key=KEY, train=True))
    close(jax.jit(DEEP)(params, X, state=state), DEEP.apply(params, state, X)[0])


def test_vmap(trees):
    params, state = trees
    many = jnp.stack([X, 2 * X, X - 1])
    apply = jax.jit(DEEP.apply)
    mapped = jax.jit(jax.vmap(DEEP.apply, in_axes=(None, None, 0), out_axes=(0, None)))
    close(mapped(params, state, many)[0], jnp.stack([apply(params, state, x)[0] for x in many]))
    one = jax.jit(jax.vmap(lambda x: DEEP(params, x, state=state)))(X)
    close(one, apply(params, state, X)[0])  # without a batch axis
    keys = jnp.stack([KEY, jax.random.key(1)])
    many = jax.vmap(DEEP.init, in_axes=(0, None))(keys, X)
    same(jax.tree.map(lambda a: a[0], many), trees)
    assert not equal(jax.tree.map(lambda a: a[1], many), trees)


def test_abstract_evaluation(trees):
    shapes = jax.eval_shape(DEEP.init, KEY, X)
    assert jax.tree.map(jnp.shape, trees) == jax.tree.map(lambda a: a.shape, shapes)
    spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
    same(DEEP.init(KEY, spec), trees)
    assert DEEP.plan(spec).y == jax.ShapeDtypeStruct((3, 2), jnp.float32)


def test_grad(trees):
    params, state = trees

    def loss(params, x):
        y, after = DEEP.apply(params, state, x, key=KEY, train=True)
        return jnp.sum(jnp.square(y)), after

    grads, after = jax.jit(jax.grad(loss, has_aux=True))(params, X)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert not equal(after, state)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads["repeat_0"]))
    along = jax.jit(lambda p: jax.jvp(lambda p: loss(p, X)[0], (p,), (p,))[1])(params)
    inner = sum(jnp.vdot(g, p) for g, p in zip(
        jax.tree.leaves(grads), jax.tree.leaves(params), strict=True))
    close(along, inner)


def unrolled(layer, n):
    """What `repeat` and `heads` say they are, with a Python loop over copy i of the trees."""
    def at(tree, i):
        return jax.tree.map(lambda a: a[i], tree)

    def repeat(params, x):
        for i in range(n):
            x = layer(at(params, i), x)
        return x

    def heads(params, x):
        return jnp.concatenate([layer(at(params, i), x) for i in range(n)], -1)

    return {"repeat": repeat, "heads": heads}


@pytest.mark.parametrize("unroll", [1, 2])
def test_gradient_of_repeat(unroll):
    layer = dp.residual(dp.serial(dp.linear(5), jnp.tanh, dp.linear(4)))
    net, plain = dp.repeat(3, layer, unroll=unroll), unrolled(layer, 3)["repeat"]
    params = params_of(net)
    close(jax.jit(net)(params, X), jax.jit(plain)(params, X))
    close(gradient(net, params), gradient(plain, params))
    if unroll == 1:
        def second(f):
            slope = jax.grad(lambda x: jnp.sum(jnp.sin(f(params, x))))
            return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(slope(x)))))(X)

        close(second(net), second(plain))


def test_gradient_of_heads():
    layer = dp.serial(dp.linear(5), jnp.tanh, dp.linear(2))
    net, plain = dp.heads(3, layer), unrolled(layer, 3)["heads"]
    params = params_of(net)
    assert net(params, X).shape == (3, 6)
    close(jax.jit(net)(params, X), jax.jit(plain)(params, X))
    close(gradient(net, params), gradient(plain, params))
    close(*[jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(params, x) ** 2)))(X) for f in (net, plain)])


def test_repeat_moves_the_state_of_each_copy():
    layer = dp.serial(dp.linear(4), dp.batch_norm())
    net = dp.repeat(3, layer)
    params, state = net.init(KEY, X)
    y, after = jax.jit(net.apply, static_argnames="train")(params, state, X, train=True)
    x, moved = X, []
    run = jax.jit(layer.apply, static_argnames="train")
    for i in range(3):
        own, old = jax.tree.map(lambda a, i=i: a[i], (params, state))
        x, new = run(own, old, x, train=True)
        moved.append(new)
    close((y, after), (x, jax.tree.map(lambda *a: jnp.stack(a), *moved)))


@pytest.mark.parametrize("wrap", [dp.repeat, dp.heads], ids=["repeat", "heads"])
def test_copies_have_own_randomness(wrap):
    seen = dp.serial(dp.dropout(0.5), identity)
    ones = jnp.ones((6, 8))
    y, _ = wrap(2, seen).apply({}, {}, ones, key=KEY, train=True)
    first, second = (seen.apply({}, {}, ones, key=jax.random.fold_in(KEY, i), train=True)[0]
                     for i in range(2))
    assert not equal(first, second)
    same(y, first * second if wrap is dp.repeat else jnp.concatenate([first, second], -1))
