"""Steps without effect where loss or gradient is not finite, and scales of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.refusing import expect, refused
from support.training_nets import KEY, NET, assert_same, examples, taken, train

import diffprog as dp

X, Y = examples()
BATCH = (X, Y)
NAN = (np.full_like(X, np.nan), Y)
MOVING = dp.ema(dp.serial(dp.batch_norm(), NET))


def rooted(net, params, state, batch, *, key, train):
    """A finite loss of 1 + sqrt(0), whose gradient by the bias is NaN where x is negative."""
    x, side = batch[0], params["bias"].sum() * 0
    value = 1 + jnp.sqrt(jnp.where(x[0, 0] < 0, side, 1.0)) + params["kernel"].sum() ** 2
    return value, (state, {"loss": value})


def made(net=NET, objective=None, optimizer=None, **options):
    return dp.make_step(net, objective or dp.classification(), optimizer or optax.adam(0.1),
                        **options)


@pytest.mark.parametrize("how", ["raise", "skip"])
@pytest.mark.parametrize("accumulate", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_skipped_step_changes_nothing_but_its_number(how, accumulate):
    step = made(MOVING, non_finite=how, accumulate=accumulate)
    wanted, _ = taken(step, [BATCH, BATCH])
    state, metrics = taken(step, [BATCH, NAN, BATCH])
    assert int(state.step) == 3
    for one, other in ((state.params, wanted.params), (state.state, wanted.state),
                       (state.opt_state.inner, wanted.opt_state.inner)):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert [float(read["skipped"]) for read in metrics] == [0, 1, 0]
    assert [float(read["count"]) for read in metrics] == [12, 0, 12]


def test_a_guard_changes_no_finite_step():
    plain, _ = taken(made(MOVING), [BATCH] * 3)
    step = made(MOVING, non_finite="skip")
    state, _ = taken(step, [BATCH] * 3)
    assert_same(state._replace(opt_state=state.opt_state.inner), plain, rtol=1e-6, atol=1e-7)


def test_fit_counts_skipped_steps():
    result = train(made(non_finite="skip"), [BATCH, NAN, BATCH, BATCH], 4, log_every=2)
    assert [row["skipped"] for row in result.history] == [0.5, 0]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_fit_names_the_gradients_that_are_not_finite(every):
    """The state is that before the step: the next ones are good."""
    error = refused(train, made(non_finite="raise"), [BATCH, BATCH, NAN, BATCH, BATCH], 5,
                    log_every=every)
    assert error.wants == "a finite loss and gradient"
    assert error.got == "a non-finite loss and non-finite gradients of bias, kernel in step 3"
    assert error.step == 3 and not dp.tree.nonfinite(error.state.params)


def test_a_gradient_alone_is_named_and_the_first_step_told():
    step = made(objective=rooted, non_finite="raise")
    expect("", "wants a finite loss and gradient, got non-finite gradients of bias in step 3, at "
           "first in step 2", train, step, [BATCH, (-abs(X), Y), (-abs(X), Y), (abs(X), Y)], 4)


def test_gradients_of_frozen_parameters_do_not_count():
    """A penalty has a gradient there too."""
    def rooted(net, params, state, batch, *, key, train):
        loss, aux = dp.classification()(net, params, state, batch, key=key, train=train)
        return loss + jnp.sqrt(params["body"]["bias"] * 0).sum(), aux

    net = dp.serial(body=dp.freeze(dp.linear(4)), head=NET)
    _, (read,) = taken(made(net, rooted, non_finite="skip"), [BATCH])
    assert read["skipped"] == 0


# Scales of the loss.


def test_a_scale_changes_no_bit_in_float32():
    plain, _ = taken(made(), [BATCH] * 3)
    state, _ = taken(made(loss_scale=dp.training.LossScale(2.0**10, 2)), [BATCH] * 3)
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_not_scaled(accumulate):
    report = ["gradient_norm", "total_loss"]
    _, (plain,) = taken(made(report=report, accumulate=accumulate), [BATCH])
    _, (read,) = taken(made(report=report, accumulate=accumulate,
                            loss_scale=dp.training.LossScale()), [BATCH])
    for name in ("loss", *report):
        np.testing.assert_allclose(read[name], plain[name], rtol=1e-6)


def test_a_scale_doubles_after_good_steps_and_halves_at_a_skipped_one():
    step = made(report=["loss_scale"], loss_scale=dp.training.LossScale(4.0, 2))
    order = [BATCH, BATCH, NAN, BATCH, BATCH, BATCH, NAN, NAN, NAN, NAN, NAN]
    _, metrics = taken(step, order)
    assert [float(read["loss_scale"]) for read in metrics] == [4, 8, 4, 4, 8, 8, 4, 2, 1, 1, 1]


def tiny(scaling, accumulate=1):
    """How four steps move a kernel whose cotangents are below the least float16."""
    def objective(net, params, state, batch, *, key, train):
        y, state = net.apply(params, state, batch, key=key, train=train)
        loss = 1e-9 * y.mean()
        return loss, (state, {"loss": loss})

    step = dp.make_step(dp.mixed(NET, jnp.float16), objective, optax.sgd(1e8), loss_scale=scaling,
                        accumulate=accumulate)
    state = step.init(KEY, X)
    before = np.asarray(state.params["kernel"])
    for _ in range(4):
        state, _ = step.apply(state, X)
    return np.asarray(state.params["kernel"]) - before


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tiny_gradients_of_float16_need_a_scale(accumulate):
    assert not tiny(None, accumulate).any()
    gradient = 1e-9 * X.mean(0)[:, None] / 3 * np.ones(3)
    np.testing.assert_allclose(tiny(dp.training.LossScale(2.0**24), accumulate),
                               -4e8 * gradient, rtol=2e-2)


def test_a_scale_that_is_too_large_is_found_down():
    """The first steps overflow in float16 and are skipped."""
    step = dp.make_step(dp.mixed(NET, jnp.float16), dp.classification(), optax.adam(0.1),
                        loss_scale=dp.training.LossScale(2.0**22), report=["loss_scale"])
    result = train(step, [BATCH], 60, log_every=20)
    rows = result.history
    assert rows[0]["skipped"] > 0 and rows[-1]["skipped"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"]
