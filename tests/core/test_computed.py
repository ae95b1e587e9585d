"""`merge`, `unmerge` and `trainable`: the trees of a whole net without its reparametrizations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import KEY, X, close, same

import diffprog as dp

OTHER = jax.random.key(7)
BLOCK = dp.residual(dp.linear(4) >> jnp.tanh)
# What computes parameters, and is neutral where it begins.
NEUTRAL = {"lora": lambda f: dp.lora(f, 2), "freeze": dp.freeze, "weight_norm": dp.weight_norm,
           "ema": dp.ema, "twice": lambda f: dp.lora(dp.weight_norm(f), 2, "**/direction")}
# Where it may stand in a net.
PLACES = {
    "in repeat": lambda f: dp.repeat(2, f(BLOCK)),
    "around repeat": lambda f: f(dp.repeat(2, BLOCK)),
    "around copies of copies": lambda f: f(dp.heads(2, dp.repeat(2, BLOCK))),
    "between copies": lambda f: dp.heads(2, f(dp.repeat(2, BLOCK))),
    "in a program in a wrapper": lambda f: dp.remat(dp.serial(a=f(dp.linear(3)), b=f(BLOCK_3))),
    "in an ensemble in mixed": lambda f: dp.mixed(dp.ensemble(2, f(BLOCK)), jnp.float32),
    "in a fixed point": lambda f: dp.fixed_point(f(SMALL)),
    "in a recurrence": lambda f: steps >> dp.recurrent(dp.serial(dp.linear(3), f(dp.gru(2)))),
}
SMALL = dp.parallel(dp.linear(4, kernel_init="normal"), dp.linear(4)) >> dp.add >> jnp.tanh
BLOCK_3 = dp.residual(dp.linear(3))


def steps(x):
    return x[:, None]


def alone(f):
    return f


@pytest.mark.parametrize("place", [pytest.param(name, marks=[pytest.mark.slow] * (name in (
    "around repeat", "around copies of copies", "in a fixed point", "in a recurrence")))
    for name in PLACES])
@pytest.mark.parametrize("way", NEUTRAL)
def test_merge_returns_the_plain_parameters_and_unmerge_inverts_it(way, place):
    if place == "in a recurrence" and way != "lora":
        return  # GRU kernels have other names to most; a cell holds no averages
    if place == "in a fixed point" and way == "ema":
        return  # it takes no state
    pattern = {"lora": lambda f: dp.lora(f, 1, "**/kernel")}.get(way, NEUTRAL[way])
    net = PLACES[place](pattern if place == "in a recurrence" else NEUTRAL[way])
    plain = PLACES[place](alone)
    params, state = net.init(KEY, X)
    y = net(params, X, state=state)
    merged = dp.tree.merge(net, params, state)
    dp.tree.verify(plain, merged[0], X, state=merged[1])
    close(plain(merged[0], X, state=merged[1]), y)
    again = dp.tree.unmerge(net, *merged, key=OTHER)
    dp.tree.verify(net, again[0], X, state=again[1])
    close(net(again[0], X, state=again[1]), y)


@pytest.mark.slow
def test_each_copy_is_reparametrized_by_itself():
    """Copies have a leading axis: a norm over it would mix them."""
    inner, outer = dp.repeat(3, dp.weight_norm(BLOCK)), dp.weight_norm(dp.repeat(3, BLOCK))
    same(inner.init(KEY, X), outer.init(KEY, X))
    params, _ = outer.init(KEY, X)
    drawn, _ = dp.repeat(3, BLOCK).init(KEY, X)
    wanted = np.sqrt((np.asarray(drawn["body"]["linear_0"]["kernel"]) ** 2).sum(1))
    np.testing.assert_allclose(params["body"]["linear_0"]["kernel"]["scale"], wanted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [
    lambda f: dp.lora(f, 2), dp.weight_norm, dp.spectral_norm, dp.ema,
], ids=["lora", "weight_norm", "spectral_norm", "ema"])
def test_a_program_reads_the_plain_parameters_of_a_child(wrap):
    def tied(layers, x):
        y = layers.code(x)
        return y @ layers.code.params["kernel"].T

    net = dp.program(code=wrap(dp.linear(3)))(tied)
    params, state = net.init(KEY, X)
    for train in (False, True):
        y, _ = net.apply(params, state, X, train=train)
        assert y.shape == X.shape
    plain = dp.program(code=dp.linear(3))(tied)
    merged, _ = dp.tree.merge(net, params, state)
    close(plain(merged, X), net(params, X, state=state))


@pytest.mark.slow
def test_what_is_frozen_costs_the_optimizer_nothing_and_is_not_moved_by_decay():
    net = dp.serial(body=dp.repeat(2, dp.lora(BLOCK, 1)), head=dp.freeze(dp.linear(3), "kernel"))
    step = dp.make_step(net, dp.classification(), optax.adamw(0.1, weight_decay=0.5), donate=False)
    before = step.init(KEY, X)
    free = dp.tree.trainable(net, before.params)
    assert {path for path, moved in dp.tree.paths(free).items() if not moved} == {
        "body/body/linear_0/kernel/base", "head/kernel"}
    after, _ = step.apply(before, (X, jnp.array([0, 1, 2])))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert moved == free
    held = before.params["body"]["body"]["linear_0"]["kernel"]["base"].size
    held += before.params["head"]["kernel"].size
    moments = dp.tree.count(before.opt_state) - 1  # Adam counts its steps
    assert moments == 2 * (dp.tree.count(before.params) - held)


def test_what_is_frozen_is_not_moved_by_a_penalty():
    """It speaks of what the net computes with, where what is frozen has no gradient."""
    net = dp.serial(dp.freeze(dp.linear(4)), head=dp.linear(3))
    objective = dp.training.penalized(dp.classification(), lambda params: 0.1
        * dp.losses.l2(params))
    step = dp.make_step(net, objective, optax.sgd(0.1), donate=False)
    before = step.init(KEY, X)
    after, _ = step.apply(before, (X, jnp.array([0, 1, 2])))
    same(after.params["linear_0"], before.params["linear_0"])
    assert (after.params["head"]["kernel"] != before.params["head"]["kernel"]).any()


def test_a_net_without_computed_parameters_keeps_the_state_of_its_optimizer():
    step = dp.make_step(dp.linear(3), dp.classification(), optax.adam(0.1))
    state = step.init(KEY, X)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(
        optax.adam(0.1).init(state.params))


def wide_apart(key, kernel):
    """Factors of what is wide, and what is narrow as it is."""
    if kernel.shape[0] <= 4:
        return kernel
    return {"left": kernel / 2, "right": jnp.full(kernel.shape[-1:], 2.0)}


def joined(tree):
    return tree["left"] * tree["right"] if isinstance(tree, dict) else tree


@pytest.mark.parametrize("way", [*NEUTRAL, "spectral_norm", "quantize", "linearize"])
@pytest.mark.parametrize("tool", ["apply", "merge", "trainable", "unmerge"])
def test_it_works_in_a_process_that_has_planned_nothing(way, tool):
    """As after loading: which leaves were replaced is told by the trees."""
    wrap = NEUTRAL.get(way, getattr(dp, way, None))

    def net():
        if way == "linearize":
            return dp.linearize(dp.serial(dp.lora(dp.linear(4), 2), head=dp.linear(3)))
        return dp.serial(dp.repeat(2, wrap(BLOCK)), head=wrap(dp.linear(3)))

    made, loaded = net(), net()
    params, state = made.init(KEY, X)
    run = {"apply": lambda net: net.apply(params, state, X)[0],
           "merge": lambda net: dp.tree.merge(net, params, state),
           "trainable": lambda net: {path: np.asarray(free) for path, free in dp.tree.paths(
               dp.tree.trainable(net, params)).items()},
           "unmerge": lambda net: dp.tree.unmerge(net, *dp.tree.merge(net, params, state),
               key=OTHER)}[tool]
    same(run(loaded), run(made))


@pytest.mark.slow
def test_a_small_tree_that_depends_on_the_size_of_its_leaf():
    """The plan of the last place says nothing of the first, nor the last net of the same recipe."""
    def net():
        return dp.reparam(dp.linear(4), wide_apart, joined)

    one = net()
    whole = dp.serial(a=one, b=dp.linear(6), c=one, d=one)
    params, _ = whole.init(KEY, X)
    assert isinstance(params["c"]["kernel"], dict) and params["a"]["kernel"].shape == (4, 4)
    plain = dp.serial(a=dp.linear(4), b=dp.linear(6), c=dp.linear(4), d=dp.linear(4))
    drawn, _ = plain.init(KEY, X)
    for again in (whole, dp.serial(a=net(), b=dp.linear(6), c=net(), d=net())):
        close(again(params, X), plain(drawn, X))
        close(dp.tree.merge(again, params)[0], drawn)
    wide = jnp.ones((2, 8))
    narrow_first, wide_later = one.init(KEY, X)[0], one.init(KEY, wide)[0]
    assert one(narrow_first, X).shape == (3, 4) and one(wide_later, wide).shape == (2, 4)


def test_small_trees_are_found_where_names_are_misleading():
    """By what they are: a level that is named as a leaf, and a leaf as a part of a small tree."""
    net = dp.serial(kernel=dp.linear(4), base=dp.serial(down=dp.linear(4)))
    tuned = dp.lora(net, 1, "**/kernel")
    params, state = tuned.init(KEY, X)
    assert sorted(params["kernel"]["kernel"]) == ["base", "down", "up"]
    merged, _ = dp.tree.merge(dp.lora(net, 1, "**/kernel"), params, state)
    same(merged, net.init(KEY, X)[0])
    free = dp.tree.trainable(dp.lora(net, 1, "**/kernel"), params)
    held = {path for path, trained in dp.tree.paths(free).items() if not trained}
    assert held == {"kernel/kernel/base", "base/down/kernel/base"}


def test_affine_maps_of_hyper_are_trainable_where_the_target_is():
    """A ``kernel`` of a map is none of the target's."""
    net = dp.repeat(2, dp.hyper(dp.lora(dp.linear(2) >> jnp.tanh, 1), dp.linear(2)))
    params = net.plan(jnp.ones((3, 2)), condition=jnp.ones((3, 2))).params
    trained = dp.tree.trainable(net, params)["target"]["linear_0"]
    assert not any(trained["kernel"]["base"].values())
    assert all(jax.tree.leaves([trained["bias"], [trained["kernel"][n] for n in ("up", "down")]]))
