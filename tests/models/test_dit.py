"""The diffusion Transformer: its parameters, counted by hand; a block in NumPy; it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.comparing import KEY, close, drawn, params_of
from support.counting import attention, count, linear
from support.learning import IMAGES, NET, differs, filled, learns

import diffprog as dp
from diffprog.models.dit import _block, _positions, _unpatchify

X = jnp.asarray(drawn(2, 4, 6, 1), jnp.float32)
TIME = jnp.array([3, 70])


def test_the_parameters_of_the_diffusion_transformer():
    """675 million, table 4 of the paper; its code also counts 256 positions of 1152 numbers,
    which are not trained: 675,129,632."""
    width = 1152
    conditioning = linear(256, width) + linear(width, width) + 1001 * width
    block = (linear(width, 6 * width) + attention(width) + linear(width, 4 * width)
             + linear(4 * width, width))
    head = linear(width, 2 * width) + linear(width, 2 * 2 * 8)
    derived = conditioning + linear(2 * 2 * 4, width) + 28 * block + head
    assert count("dit") == derived == 674_834_720 == 675_129_632 - 256 * 1152


@pytest.mark.slow
def test_a_block_in_numpy():
    """self_attention and ffn, which have tests of their own, are called as layers."""
    block, x, told = _block(4, 2, 6, 0.0, 1e-6), drawn(2, 3, 4), drawn(2, 4, seed=1)
    with jax.enable_x64(True):
        x, told = jnp.asarray(x), jnp.asarray(told)
        params = params_of(block, x, condition=told)
        close(block(params, x, condition=told), x)  # all gates are zero
        params["adapt"]["linear_0"]["kernel"] = jnp.asarray(drawn(4, 24, seed=2))
        found = block(params, x, condition=told)
        parts = np.split(np.asarray(told @ params["adapt"]["linear_0"]["kernel"]), 6, axis=-1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (part[:, None] for part in parts)

        def norm(x):
            centered = x - x.mean(-1, keepdims=True)
            return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)

        attend, feed = block.children["attend"], block.children["feed"]
        y = np.asarray(x)
        y = y + gate_1 * attend(params["attend"], jnp.asarray(norm(y) * (1 + scale_1) + shift_1))
        y = y + gate_2 * feed(params["feed"], jnp.asarray(norm(y) * (1 + scale_2) + shift_2))
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-12)


def test_unpatchify_is_the_inverse_of_patches():
    x = drawn(2, 4, 6, 3)
    np.testing.assert_array_equal(_unpatchify(dp.patches(2)({}, jnp.asarray(x)), 2, 3, 2),
                                  jnp.asarray(x))


def test_positions_are_sinusoids_of_row_and_column():
    positions = np.asarray(_positions(3, 5, 8, jnp.float32)).reshape(3, 5, 8)
    assert (positions[:, :, :4] == positions[:, :1, :4]).all()  # the first half is of the row
    assert (positions[:, :, 4:] == positions[:1, :, 4:]).all()
    assert len(np.unique(positions.reshape(15, 8).round(6), axis=0)) == 15


@pytest.mark.slow
def test_output_depends_on_time_and_class_for_images_of_any_size():
    net = dp.models.dit(1, classes=3, **NET)
    params = filled(net.plan(X, time=TIME).params)
    run = jax.jit(lambda params, condition, time: net(params, X, time=time, condition=condition))
    y = run(params, jnp.array([3, 3]), TIME)
    assert differs(run(params, jnp.array([3, 3]), TIME + 1), y)
    assert differs(run(params, jnp.array([1, 3]), TIME)[0], y[0])
    fresh = net.init(KEY, X, time=TIME)[0]
    assert not run(fresh, jnp.array([3, 3]), TIME).any()  # the output starts at zero
    assert jax.eval_shape(lambda: net(fresh, X[:, :2], time=TIME)).shape == (2, 2, 6, 1)


def test_a_condition_without_classes_raises():
    with pytest.raises(dp.LayerError, match="no condition, for a net without classes"):
        dp.models.dit(1, **NET).init(KEY, X, time=TIME, condition=TIME)


@pytest.mark.slow
def test_it_learns_eight_examples():
    net = dp.models.dit(1, classes=4, **NET) >> dp.flatten() >> dp.linear(4)
    batch = IMAGES | {"time": np.arange(8), "condition": np.zeros(8, int)}
    learns(net, dp.classification(), batch, 120)
