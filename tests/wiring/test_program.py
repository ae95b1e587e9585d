"""Programs: shared children, side inputs, the training flag."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import (
    KEY,
    X,
    close,
    copies,
    equal,
    gradient,
    identity,
    names,
    params_of,
    same,
)

import diffprog as dp

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


@pytest.mark.slow
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


# Transformations that a program opens around a child.

OPENED = {
    "vmap": jax.vmap,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1],
    "map": lambda f: lambda x: jax.lax.map(f, x),
    "fori_loop": lambda f: lambda x: jax.lax.fori_loop(0, 2, lambda i, x: f(x), x),
    "while_loop": lambda f: lambda x: jax.lax.while_loop(
        lambda at: at[0] < 2, lambda at: (at[0] + 1, f(at[1])), (0, x))[1],
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, f, x),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "grad": lambda f: lambda x: jax.grad(lambda x: f(x).sum())(x),
    "vmap in jit": lambda f: jax.jit(jax.vmap(f)),
}
IMAGES = jax.random.normal(KEY, (2, 3, 4))


NORMED = dp.serial(dp.linear(4), norm=dp.batch_norm())


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("f", [
    NORMED, dp.remat(NORMED), dp.repeat(2, NORMED), dp.ema(dp.linear(4)),
], ids=["norm", "remat", "repeat", "ema"])
def test_a_child_with_state_is_refused_where_its_program_transforms_it(name, f):
    def around(layers, x):
        return OPENED[name](layers.f)(x)

    net = dp.serial(dp.linear(4), at=dp.program(f=f)(around))
    with pytest.raises(dp.LayerError, match=r"^at/f \(.*ensemble, heads, repeat or remat"):
        net.init(KEY, IMAGES)


@pytest.mark.parametrize("name", OPENED)
def test_a_child_that_draws_is_refused_where_its_program_transforms_it(name):
    def around(layers, x):
        return OPENED[name](layers.f)(x)

    net = dp.program(f=dp.linear(4) >> dp.dropout(0.5))(around)
    params, state = net.init(KEY, IMAGES)
    for run in (net.apply, jax.jit(net.apply, static_argnames="train")):
        with pytest.raises(dp.LayerError, match=r"^f \(serial\(.*as it draws"):
            run(params, state, IMAGES, key=KEY, train=True)
    plain = dp.program(f=dp.linear(4))(around)  # at rest nothing is drawn
    close(net(params, IMAGES), plain({"f": params["f"]["linear_0"]}, IMAGES))


@pytest.mark.parametrize("name", OPENED)
def test_a_child_without_state_may_be_transformed_in_its_program(name):
    lin = dp.serial(dp.linear(4), jnp.tanh)
    net = dp.program(f=lin)(lambda layers, x: OPENED[name](layers.f)(x))
    params, state = net.init(KEY, IMAGES)

    def alone(params, x):
        return OPENED[name](lambda x: lin(params["f"], x))(x)

    close(jax.jit(net)(params, IMAGES), alone(params, IMAGES))
    close(net.apply(params, state, IMAGES, key=KEY, train=True)[0], alone(params, IMAGES))
    if name != "while_loop":  # which has no gradient in reverse
        close(gradient(net, params, IMAGES), gradient(alone, params, IMAGES))


def test_a_tapped_child_is_refused_where_its_program_transforms_it():
    net = dp.program(f=dp.linear(4))(lambda layers, x: jax.vmap(layers.f)(x))
    assert net.plan(IMAGES).y.shape == IMAGES.shape
    with pytest.raises(dp.LayerError, match=r"^f \(linear\(4\)\): wants a call outside"):
        dp.tap(net, "f").init(KEY, IMAGES)


def test_a_stream_is_refused_where_its_program_transforms_it():
    past = dp.conv(4, 2, dims=1, padding="CAUSAL")
    net = dp.program(f=past)(lambda layers, x: jax.vmap(layers.f)(x))
    params = params_of(net, IMAGES)
    close(net(params, IMAGES), past(params["f"], IMAGES))
    with pytest.raises(dp.LayerError, match=r"^f \(conv\(.*its new state would be lost"):
        net.start(params, {}, IMAGES, length=3)


def test_a_program_may_use_what_transforms_none_of_its_children():
    @dp.program(norm=dp.batch_norm(), drop=dp.dropout(0.5))
    def inside(layers, x):
        with jax.named_scope("here"), jax.default_matmul_precision("highest"):
            y = layers.drop(layers.norm(x))
        return jax.vmap(jnp.sin)(jax.checkpoint(jnp.cos)(y))

    plain = dp.serial(norm=dp.batch_norm(), drop=dp.dropout(0.5))
    net = dp.serial(norm=plain, last=inside)
    params, state = net.init(KEY, X)
    y, after = net.apply(params, state, X, key=KEY, train=True)
    assert jax.tree.leaves(after)[0].shape == (4,) and y.shape == X.shape


def test_a_net_that_is_no_child_may_be_called_inside_a_transformation():
    norm = dp.batch_norm()
    own, held = norm.init(KEY, X)

    @dp.program(lin=dp.linear(4))
    def outside(layers, x):
        return layers.lin(jax.vmap(lambda x: norm(own, x, state=held))(x))

    params = params_of(outside, IMAGES)
    close(outside(params, IMAGES), dp.linear(4)(params["lin"], norm(own, IMAGES, state=held)))


OUTER = {
    "jit": jax.jit,
    "vmap": lambda f: lambda p, s, x: jax.vmap(f, (None, None, 0))(p, s, x[None]),
    "grad": lambda f: jax.value_and_grad(lambda p, s, x: f(p, s, x)[0].sum()),
    "jit(grad(vmap(scan)))": lambda f: jax.jit(jax.grad(lambda p, s, x: jax.vmap(
        lambda x: jax.lax.scan(lambda s, x: f(p, s, x)[::-1], s, x[None])[1])(x[None]).sum())),
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda p, s, x: jax.lax.cond(x.sum() > 0, f, f, p, s, x),
    "eval_shape": lambda f: lambda p, s, x: f(p, jax.tree.map(
        lambda a: jnp.zeros(a.shape), jax.eval_shape(f, p, s, x)[1]), x),
    "linearize": lambda f: lambda p, s, x: jax.linearize(lambda p: f(p, s, x), p)[0],
}


@pytest.mark.parametrize("name", OUTER)
@pytest.mark.parametrize("wrap", [
    lambda f: f, lambda f: dp.repeat(2, dp.remat(f)),
], ids=["alone", "repeat of remat"])
def test_a_program_as_a_whole_runs_in_any_transformation(name, wrap):
    @dp.program(norm=dp.batch_norm(), drop=dp.dropout(0.5), lin=dp.linear(4))
    def f(layers, x):
        return layers.drop(layers.norm(jax.vmap(jnp.sin)(layers.lin(x))))

    net = wrap(f)
    plan = net.plan(X)
    run = lambda p, s, x: net.apply(p, s, x, key=KEY, train=True)  # noqa: E731
    with jax.checking_leaks():
        jax.eval_shape(OUTER[name](run), plan.params, plan.state, X)


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


# What tells a stream.

def once(layers, x):
    return layers.mean(x)


def again(layers, x):
    return layers.mean(layers.mean(x))


def test_a_stream_is_recognized_by_its_structure_in_a_net_that_never_started_one():
    """As after a checkpoint: the state comes from a file, and `start` was another process's."""
    made = lambda f: dp.program(mean=dp.conv(4, 2, dims=1, padding="CAUSAL"))(f)  # noqa: E731
    x = jnp.ones((1, 6, 4))
    net, params = made(again), params_of(made(again), x)
    state = net.start(params, {}, x[:, :1], length=6)
    assert sorted(state) == ["mean", "mean@1"]
    close(made(again).apply(params, state, x)[0], net.apply(params, state, x)[0])
    with pytest.raises(dp.LayerError, match="as many calls of mean as start made, got 1"):
        made(once).apply(params, state, x)
    alone = made(once).start(params, {}, x[:, :1], length=6)
    with pytest.raises(dp.LayerError, match="as many calls of mean as start made, got 2"):
        made(again).apply(params, alone, x)


def test_a_child_without_parameters_has_none_to_read():
    net = dp.program(act=jnp.tanh)(lambda layers, x: (layers.act(x), layers.act.params))
    assert net({}, X)[1] == {}


@pytest.mark.parametrize("name", ["count", "calls", "children", "items", "params_of", "train"])
def test_any_name_reaches_a_child(name):
    net = dp.program(**{name: dp.linear(2)})(lambda layers, x: getattr(layers, name)(x))
    assert net.plan(X).y.shape[-1] == 2


DECODER = dp.models.transformer_decoder(1, heads=2, hidden=4)


@pytest.mark.parametrize("net", [
    DECODER, dp.mixed(DECODER, jnp.bfloat16), dp.repeat(2, DECODER), dp.remat(DECODER),
    dp.models.encoder_decoder(dp.linear(4), DECODER),
], ids=["decoder", "mixed", "repeat", "remat", "encoder_decoder"])
def test_a_stream_keeps_the_encoder_output_that_its_children_keep(net):
    assert net.kept == {"memory", "memory_mask"} <= net.side


def test_a_stream_without_an_encoder_keeps_no_side_inputs():
    assert dp.models.gpt(5, length=4, width=4, depth=1, heads=1).kept == set()


def test_alone_a_layer_is_as_random_as_inside_a_net():
    def apply(params, state, x, *, key=None, train=False):
        return x if key is None else x + jax.random.normal(key, x.shape), state

    noise = dp.Layer(lambda key, x: ({}, {}), apply, random=True)
    forgotten = dp.Layer(lambda key, x: ({}, {}), apply)
    for net in (noise, dp.serial(noise)):
        assert not equal(net({}, X, key=KEY), X)
    for net in (forgotten, dp.serial(forgotten)):
        same(net({}, X, key=KEY), X)
