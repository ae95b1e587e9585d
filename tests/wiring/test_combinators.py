"""Names, sequences, what inserting a layer must not change, sums and layers side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, X, close, equal, identity, names, params_of, same, spy

import diffprog as dp
from diffprog.core.parameters import fold

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


def test_children_with_and_without_parameters_are_numbered_apart():
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


@pytest.mark.parametrize("combine", [dp.branch, dp.parallel])
def test_branch_and_parallel_name_as_serial_does(combine):
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


@pytest.mark.parametrize(("net", "shown"), [
    (jax.nn.relu >> dp.linear(3), "serial(jax.nn.relu, linear(3))"),
    (dp.linear(3) >> jax.nn.relu, "serial(linear(3), jax.nn.relu)"),
    (dp.gelu >> dp.linear(3) >> dp.gelu, "serial(gelu, linear(3), gelu)"),
], ids=["before", "after", "both"])
def test_a_chain_shows_functions_by_name(net, shown):
    assert repr(net) == shown


def test_a_chain_calls_functions_in_order():
    lin = dp.linear(3)
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


def test_children_without_parameters_have_no_entry():
    net = dp.serial(dp.linear(3), abs, dp.serial(jnp.tanh), dp.serial(dp.batch_norm()))
    params, state = net.init(KEY, X)
    assert sorted(params) == ["linear_0", "serial_0"]
    assert list(state) == ["serial_0"]
    assert dp.serial(abs, jnp.tanh).init(KEY, X) == ({}, {})


# Around and side by side.

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
