"""Side inputs that nobody takes, and what apply refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import (
    ANOTHER,
    GRAMMAR,
    INIT_RETURNED,
    KEY,
    NO_KEY,
    NOBODY,
    STATIC,
    X,
    divide,
    expect,
    mask_taker,
    refused,
)

import diffprog as dp

# Side inputs.

def test_a_side_input_that_nobody_takes():
    net = dp.serial(body=dp.linear(4))
    params, state = net.init(KEY, X)
    message = f"serial(body=linear(4)): wants only side inputs that it takes (none), got mask; " \
              f"{NOBODY}"
    expect("", message, net.init, KEY, X, mask=X)
    expect("", message, net.apply, params, state, X, mask=X)
    expect("", message, net, params, X, mask=X)
    expect("", message, net.plan, X, mask=X)


def test_a_side_input_that_nobody_takes_lists_those_taken():
    net = dp.serial(body=mask_taker())
    message = "serial(body=taker): wants only side inputs that it takes (mask, positions), " \
              f"got maks; {NOBODY}"
    expect("", message, net.init, KEY, X, mask=X, maks=X)
    expect("", message, net.apply, {}, {}, X, mask=X, maks=X)


def test_a_side_input_given_to_a_child_that_does_not_take_it():
    @dp.program(lin=dp.linear(3))
    def f(layers, x, *, mask=None):
        return layers.lin(x, mask=mask)

    expect("a/lin", "a/lin (linear(3)): wants only side inputs that it takes (none), got mask; "
           f"{NOBODY}", dp.serial(a=f).init, KEY, X, mask=X)
    dp.serial(a=f).init(KEY, X)  # None is absent


# What apply is given.

NET = dp.serial(lin=dp.linear(4), body=dp.serial(norm=dp.batch_norm()))
SHOWN = "serial(lin=linear(4), body=serial(norm=batch_norm()))"


@pytest.fixture(scope="module")
def trees():
    return NET.init(KEY, X)


def test_training_a_dropout_without_key():
    drop = dp.serial(a=dp.serial(dp.dropout(0.5)))
    expect("a/dropout~0", f"a/dropout~0 (dropout(0.5)): {NO_KEY}",
           drop.apply, {}, {}, X, train=True)
    expect("", f"dropout(0.5): {NO_KEY}", dp.dropout(0.5).apply, {}, {}, X, train=True)


@pytest.mark.parametrize("wrap", [
    lambda f: dp.repeat(2, f), lambda f: dp.heads(2, f), dp.remat, lambda f: f,
], ids=["repeat", "heads", "remat", "program"])
def test_training_a_dropout_without_key_inside(wrap):
    @dp.program(lin=dp.linear(4), drop=dp.dropout(0.5))
    def block(layers, x):
        return layers.drop(layers.lin(x))

    net = dp.serial(blocks=wrap(block))
    params, state = net.init(KEY, X)
    expect("blocks/drop", f"blocks/drop (dropout(0.5)): {NO_KEY}",
           net.apply, params, state, X, train=True)
    expect("blocks/drop", f"blocks/drop (dropout(0.5)): {NO_KEY}",
           jax.jit(net.apply, static_argnames="train"), params, state, X, train=True)


def test_a_stateful_net_without_state(trees):
    params, _ = trees
    message = "body/norm (batch_norm()): wants state mean, var, got none; pass state=, as init " \
              "returned it"
    expect("body/norm", message, NET, params, X)
    expect("body/norm", message, NET.apply, params, {}, X, train=True)
    expect("body/norm", message, jax.jit(NET), params, X)
    expect("", message.removeprefix("body/norm (").replace(")):", "):"),
           dp.batch_norm(), params["body"]["norm"], X)


def test_parameters_of_another_net(trees):
    params, state = trees
    wants = "wants params bias, kernel"
    expect("lin", f"lin (linear(4)): {wants}, got none; {INIT_RETURNED}", NET.apply, {}, state, X)
    expect("body/norm", "body/norm (batch_norm()): wants params bias, scale, got none; "
           f"{INIT_RETURNED}", NET.apply, {"lin": params["lin"]}, state, X)
    expect("lin", f"lin (linear(4)): {wants}, got bias, kernel, w; {INIT_RETURNED}",
           NET.apply, params | {"lin": params["lin"] | {"w": X}}, state, X)
    expect("lin", f"lin (linear(4)): {wants}, got kernel; {INIT_RETURNED}",
           NET.apply, params | {"lin": {"kernel": X}}, state, X)
    for trace in (NET.apply, jax.jit(NET.apply)):
        expect("", f"{SHOWN}: wants params of its children (body, lin), got other; pass what "
               "init returned: this belongs to another net",
               trace, params | {"other": params["lin"]}, state, X)


def test_foreign_names_below_carry_the_path(trees):
    params, state = trees
    error = refused(NET.apply, params | {"body": {"norm": params["body"]["norm"], "z": {}}},
                    state, X)
    assert error.path == "body"
    assert str(error).startswith(
        "body (serial(norm=batch_norm())): wants params of its children (norm), got z; ")


def test_state_of_another_net(trees):
    params, state = trees
    error = refused(NET.apply, params, state | {"other": {}}, X)
    assert error.path == ""
    assert str(error).startswith(f"{SHOWN}: wants state of its children (body, lin), got other; ")
    assert error.remedy == "pass what init returned: this belongs to another net"
    expect("body/norm", "body/norm (batch_norm()): wants state mean, var, got mean; pass state=, "
           "as init returned it", NET.apply, params, {"body": {"norm": {"mean": jnp.zeros(4)}}}, X)


def test_the_pair_passed_whole(trees):
    pair = "wants params alone, got the pair (params, state); unpack it: params, state = " \
           "net.init(key, x)"
    expect("", f"{SHOWN}: {pair}", NET.apply, trees, trees[1], X)
    expect("", f"{SHOWN}: {pair}", NET, trees, X, state=trees[1])
    lin = dp.linear(3)
    expect("", f"linear(3): {pair}", lin, lin.init(KEY, X), X)


def test_fit_compares_shapes():
    step = dp.make_step(dp.serial(lin=dp.linear(3)), dp.classification(), optax.sgd(0.1))
    data = dp.batches((X, jnp.zeros(2, jnp.int32)), 2)
    expect("", f"wants params lin/kernel as float32[4,3], got float32[5,3]; {ANOTHER}",
           dp.fit, step, data, steps=1, progress=False,
           state=step.init(KEY, jnp.ones((2, 5))))
    state = step.init(KEY, X)
    error = refused(dp.fit, step, data, steps=1, progress=False,
                    state=state._replace(params={"other": state.params["lin"]}))
    assert error.wants == "params with lin/bias"
    assert error.got == "other/bias, other/kernel"


@pytest.mark.parametrize(("train", "shown"), [
    (1, "1"), (0, "0"), (None, "None"), ("no", "'no'"), (np.bool_(True), "bool[]"),
], ids=["1", "0", "None", "string", "numpy"])
def test_train_is_a_python_bool(trees, train, shown):
    expect("", f"{SHOWN}: wants train as a Python bool, got {shown}; {STATIC}",
           NET.apply, *trees, X, train=train)


def test_train_is_not_traced(trees):
    expect("", f"{SHOWN}: wants train as a Python bool, got bool[]; {STATIC}",
           jax.jit(NET.apply), *trees, X, train=True)
    y, _ = jax.jit(NET.apply, static_argnames="train")(*trees, X, train=True)
    assert y.shape == (2, 4)


def test_batch_statistics_of_one_value(trees):
    expect("body/norm", "body/norm (batch_norm()): wants several values per channel in training, "
           "got float32[1,4]; take a larger batch: a variance needs two",
           NET.apply, *trees, X[:1], train=True)


# Plain functions raise as well, and other exceptions keep their type.


def place(error):
    """The notes that say where an exception was raised."""
    return [note for note in error.__notes__ if note.startswith("at ")]


@pytest.mark.parametrize("wrap", [
    lambda f: f, dp.remat, lambda f: dp.repeat(2, f), lambda f: dp.heads(2, f),
], ids=["serial", "remat", "repeat", "heads"])
def test_other_exceptions_keep_their_type_and_carry_the_path(wrap):
    net = dp.serial(a=wrap(dp.serial(b=divide)))
    with pytest.raises(ZeroDivisionError) as caught:
        net.init(KEY, X)
    assert place(caught.value) == ["at a/b: divide given float32[2,4]"]


def test_other_exceptions_carry_the_path_in_apply_too():
    ready = [True]

    def sometimes(x):
        return x if ready else [][0]

    @dp.program(c=sometimes)
    def f(layers, x):
        return layers.c(x)

    net = dp.serial(a=dp.serial(b=f))
    params, state = net.init(KEY, X)
    ready.clear()
    for apply in (net.apply, jax.jit(net.apply)):
        with pytest.raises(IndexError) as caught:
            apply(params, state, X)
        (note,) = place(caught.value)
        assert note.startswith("at a/b/c: <sometimes") and note.endswith(" given float32[2,4]")


def test_a_lambda_is_found_by_file_and_line():
    net = dp.serial(a=dp.serial(b=lambda x: x / (1 // 0)))
    with pytest.raises(ZeroDivisionError) as caught:
        net.init(KEY, X)
    (note,) = place(caught.value)
    assert re.fullmatch(r"at a/b: <lambda test_errors_apply\.py:\d+> given float32\[2,4\]", note)


def test_an_error_of_a_users_layer_is_signed():
    def forward(params, x):
        raise dp.LayerError("something else", "this", "do that")

    mine = dp.stateless(None, forward, name="mine")
    expect("a/b", "a/b (mine): wants something else, got this; do that",
           dp.serial(a=dp.serial(b=mine)).init, KEY, X)


def test_the_grammar_can_fail():
    assert not GRAMMAR.fullmatch("a/b (linear(3)): expected a key; pass one")
    assert not GRAMMAR.fullmatch("linear(3) wants a key, got none")


@pytest.mark.parametrize("layer", [dp.linear(3), dp.conv(3, 1, dims=1)], ids=repr)
def test_a_single_bias_does_not_broadcast_over_all_features(layer):
    params, _ = layer.init(KEY, X)
    with pytest.raises(dp.LayerError, match="params of 3 features"):
        layer({**params, "bias": jnp.ones(1)}, X)


def test_one_running_variance_does_not_broadcast_over_all_channels():
    params, state = dp.batch_norm().init(KEY, X)
    with pytest.raises(dp.LayerError, match="1 feature "):
        dp.batch_norm()(params, X, state={**state, "var": jnp.ones(1)})
