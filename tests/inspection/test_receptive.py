"""Receptive fields: by hand along a chain, and where the gradient is."""

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp
from diffprog.inspection.receptive import Field


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


def fields(net, x):
    return {row.path: row.field for row in dp.summary(net, x).rows if row.field}


def square(size, stride):
    return Field((size, size), (stride, stride))


@pytest.mark.slow
def test_the_fields_of_alexnet():
    """By the recurrence r <- r + (k - 1) j, j <- j s, done by hand along the chain."""
    found = fields(dp.models.alexnet(), shape(1, 227, 227, 3))
    assert list(found.values()) == [
        square(11, 4), square(19, 8), square(51, 8), square(67, 16), square(99, 16),
        square(131, 16), square(163, 16), square(195, 32)]


# Windows that end where the output is, and that begin there.
BEFORE = dp.conv(1, 3, padding=((2, 0), (2, 0)))
AFTER = dp.conv(1, 3, padding=((0, 2), (0, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("net", "side"), [
    (dp.serial(dp.conv(1, 3, padding="VALID"), dp.max_pool(2), dp.conv(1, 3, padding="VALID")), 12),
    (dp.serial(dp.conv(1, 3, padding="VALID", dilation=2), dp.avg_pool(3, stride=2)), 11),
    (dp.repeat(3, dp.conv(1, 3)), 15),
    (dp.serial(dp.residual(dp.conv(1, 3) >> dp.conv(1, 3)), dp.conv(1, 3, stride=2)), 15),
    (dp.serial(dp.branch(dp.conv(1, 5), dp.conv(1, 1), merge=dp.add), dp.conv(1, 3)), 15),
    (dp.serial(dp.branch(BEFORE, AFTER, merge=dp.add), dp.conv(1, 1)), 15),
    (dp.serial(dp.branch(BEFORE >> BEFORE, AFTER, merge=dp.add), dp.conv(1, 3, stride=2)), 21),
    (dp.serial(dp.branch(dp.conv(1, 2), dp.conv(1, 2, padding=((1, 0), (1, 0))), merge=dp.add),
               dp.conv(1, 1)), 15),
    (dp.serial(dp.branch(dp.conv(1, 2, stride=2), dp.avg_pool(2), dp.conv(
        1, 3, stride=2, padding=((2, 0), (2, 0))), merge=dp.add), dp.conv(1, 1)), 16),
    (dp.serial(dp.repeat(2, dp.branch(BEFORE, AFTER, merge=dp.add)), dp.conv(1, 1)), 21),
    (dp.serial(dp.residual(BEFORE), dp.residual(AFTER), dp.conv(1, 1)), 15),
], ids=["chain", "dilated", "repeat", "residual", "branch", "beside each other", "one further",
        "even", "strides", "repeat of ways", "residuals"])
def test_fields_are_where_the_gradient_is(net, side):
    """The places of the input on which one place in the middle depends, by its gradient."""
    x = jax.random.normal(jax.random.key(0), (1, side, side, 1))
    params, _ = net.init(jax.random.key(1), x)
    params = jax.tree.map(lambda a: jnp.abs(a) + 0.1, params)
    middle = net(params, x).shape[1] // 2

    def seen(net, x):
        slope = jax.grad(lambda x: net(params, x)[0, middle, middle, 0])(x)
        return int((slope[0, :, :, 0] != 0).any(1).sum())

    # An average instead of a maximum, so that every place in a window has a gradient.
    soft = net
    if "max_pool" in repr(net):
        soft = dp.replace(net, "**/max_pool*", dp.avg_pool(2))
    assert seen(soft, x) == list(fields(net, x).values())[-1].size[0]


def test_branches_with_different_offsets_have_a_joint_receptive_field():
    """One looks two steps back, the other two ahead: five places in all."""
    ways = dp.branch(dp.conv(2, 3, dims=1, padding="CAUSAL"),
                     dp.conv(2, 3, dims=1, padding=((0, 2),)), merge=dp.add)
    assert fields(ways >> dp.conv(2, 1, dims=1), shape(1, 9, 2))["conv_0"].size == (5,)


def test_sides_of_their_own():
    found = fields(dp.conv(1, (3, 5), stride=(1, 2)), shape(1, 9, 9, 1))
    assert found == {"": Field((3, 5), (1, 2))}
    assert " 3x5     1x2" in str(dp.summary(dp.conv(1, (3, 5), stride=(1, 2)), shape(1, 9, 9, 1)))


def test_windows_over_other_axes_have_no_field_in_common():
    net = dp.serial(dp.conv(1, 3), dp.conv(1, 3, dims=1))
    assert list(fields(net, shape(1, 4, 4, 1))) == ["conv_0"]


def test_a_change_of_positions_other_than_a_window_ends_the_receptive_field():
    net = dp.serial(dp.conv(1, 3), dp.upsample(2), dp.conv(1, 3))
    assert list(fields(net, shape(1, 4, 4, 1))) == ["conv_0"]
    net = dp.serial(dp.conv(1, 3), dp.global_avg_pool(), dp.linear(3))
    assert list(fields(net, shape(1, 4, 4, 1))) == ["conv_0"]


def test_a_layer_that_mixes_positions_ends_the_receptive_field():
    net = dp.serial(a=dp.conv(4, 3, dims=1), mix=dp.self_attention(2), b=dp.conv(4, 3, dims=1))
    assert fields(net, shape(1, 16, 2)) == {"a": Field((3,), (1,))}
