"""Random changes of images: each is one of those that NumPy makes, drawn for each example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import diffprog as dp

KEY = jax.random.key(3)
X = np.random.default_rng(0).normal(size=(6, 5, 7, 2)).astype(np.float32)
CHANGES = {
    "crop": lambda key, x: dp.data.random_crop(key, x, (4, 6), padding=1),
    "flip": dp.data.random_flip,
    "rotation": lambda key, x: dp.data.random_rotation(key, x, 30),
    "mixup": lambda key, x: dp.data.mixup(key, x, x[:, 0, 0, :])[0],
}
COMPILED = {name: jax.jit(change) for name, change in CHANGES.items()}
each = pytest.mark.parametrize("name", CHANGES)
but_mixup_slow = pytest.mark.parametrize("name", [
    "crop", "flip", "rotation", pytest.param("mixup", marks=pytest.mark.slow)])


def same(one, other):
    np.testing.assert_array_equal(np.asarray(one, np.float64), np.asarray(other, np.float64))


@pytest.mark.slow
@each
def test_compiled_equals_eager(name):
    np.testing.assert_allclose(COMPILED[name](KEY, X), CHANGES[name](KEY, X), rtol=1e-5, atol=1e-5)


@but_mixup_slow
def test_under_vmap_each_batch_has_its_own_key(name):
    keys = jax.random.split(KEY, 2)
    got = jax.jit(jax.vmap(CHANGES[name]))(keys, jnp.stack([X, X]))
    wanted = [COMPILED[name](key, X) for key in keys]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert not (got[0] == got[1]).all()


@but_mixup_slow
def test_another_key_is_another_draw(name):
    first, other = (COMPILED[name](jax.random.key(seed), X) for seed in (0, 1))
    assert not (first == other).all()
    same(first, COMPILED[name](jax.random.key(0), X))


@pytest.mark.parametrize("name", ["crop", "flip", "rotation"])
def test_the_draws_of_the_first_examples_do_not_depend_on_the_batch_size(name):
    same(COMPILED[name](KEY, X)[:2], COMPILED[name](KEY, X[:2]))


@each
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_is_kept(name, dtype):
    x = jax.ShapeDtypeStruct(X.shape, dtype)
    if name == "mixup" and not jnp.issubdtype(dtype, jnp.floating):
        return  # refused, in tests/errors
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert jax.eval_shape(lambda x: CHANGES[name](KEY, x), x).dtype == dtype


def test_wide_images_of_numpy_are_those_of_jax():
    assert dp.data.random_flip(KEY, X.astype(np.float64)).dtype == jnp.float32
    assert dp.data.normalize(X.astype(np.float64), 0.0, 1.0).dtype == jnp.float32


@pytest.mark.parametrize("size", [None, 4, (3, 9)], ids=str)
def test_a_crop_is_any_part_of_the_padded_image(size):
    height, width = (5, 7) if size is None else np.broadcast_to(size, 2)
    y = jax.jit(lambda x: dp.data.random_crop(KEY, x, size, padding=1))(np.repeat(X[:1], 400, 0))
    padded = np.pad(X[0], ((1, 1), (1, 1), (0, 0)))
    places = [padded[i : i + height, j : j + width].tobytes()
              for i in range(8 - height) for j in range(10 - width)]
    found = [places.index(row.tobytes()) for row in np.asarray(y)]  # raises if it is none of them
    counts = np.bincount(found, minlength=len(places))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3  # all places, equally often


def test_a_crop_of_the_whole_image_is_the_image():
    same(dp.data.random_crop(KEY, X), X)


def test_half_of_the_images_are_flipped():
    x = np.repeat(X[:1], 400, 0)
    y = np.asarray(COMPILED["flip"](KEY, x))
    flipped = (y == x[:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (y == x).all((1, 2, 3))).all()
    assert 160 < flipped.sum() < 240  # four standard deviations


def rotated(image, angle):
    """An image (height, width), rotated counterclockwise by an angle, pixel by pixel."""
    height, width = image.shape
    padded = np.pad(image.astype(np.float64), ((1, 2), (1, 2)))
    y = np.zeros(image.shape)
    for i in range(height):
        for j in range(width):
            p = complex(j - (width - 1) / 2, (height - 1) / 2 - i)  # up is positive
            source = p * np.exp(-1j * angle)
            row, column = (height - 1) / 2 - source.imag, source.real + (width - 1) / 2
            if -1 < row < height and -1 < column < width:
                top, left = int(np.floor(row)), int(np.floor(column))
                cell = padded[top + 1 : top + 3, left + 1 : left + 3]
                y[i, j] = np.interp(row - top, [0, 1], [
                    np.interp(column - left, [0, 1], cell[0]),
                    np.interp(column - left, [0, 1], cell[1])])
    return y


def angles_of(ramp):
    """The angles by which ramps from left to right were rotated: the direction of their slope."""
    row, column = (n // 2 for n in ramp.shape[1:])
    across = ramp[:, row, column + 1] - ramp[:, row, column]
    down = ramp[:, row + 1, column] - ramp[:, row, column]
    np.testing.assert_allclose(across**2 + down**2, 1, rtol=1e-4)
    return np.arctan2(-down, across)


@pytest.mark.parametrize("shape", [(5, 7), (6, 6)], ids=str)
def test_a_rotation_interpolates_linearly(shape):
    image = np.random.default_rng(1).normal(size=shape)
    ramp = np.broadcast_to(np.arange(float(shape[1])), shape)
    x = np.broadcast_to(np.stack([image, ramp], -1), (5, *shape, 2)).astype(np.float32)
    y = np.asarray(COMPILED["rotation"](KEY, x))
    angles = angles_of(y[..., 1])
    assert np.ptp(angles) > 0.1
    for got, angle in zip(y[..., 0], angles, strict=True):
        np.testing.assert_allclose(got, rotated(image, angle), atol=2e-5)


def test_the_reference_rotates_counterclockwise():
    image = np.arange(9.0).reshape(3, 3)
    np.testing.assert_allclose(rotated(image, np.pi / 2), np.rot90(image), atol=1e-12)


def test_the_angles_of_rotations_are_uniform():
    ramp = np.broadcast_to(np.arange(5.0)[None, None, :, None], (500, 5, 5, 1))
    angles = np.rad2deg(angles_of(np.asarray(COMPILED["rotation"](KEY, ramp))[..., 0]))
    assert scipy.stats.kstest(angles, scipy.stats.uniform(-30, 60).cdf).pvalue > 1e-3


def test_ints_are_rounded_in_a_rotation():
    x = np.random.default_rng(1).integers(0, 256, X.shape).astype(np.uint8)
    wanted = np.round(COMPILED["rotation"](KEY, x.astype(np.float32)))
    same(COMPILED["rotation"](KEY, x), wanted)


@pytest.mark.parametrize(("mean", "std"), [
    (0.5, 2.0), ([0.5, -1.0], [2.0, 3.0]), (np.float64(0.1), jnp.array([1.0, 2.0]))], ids=str)
def test_channels_are_normalized(mean, std):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        got = dp.data.normalize(X, mean, std)
        compiled = jax.jit(dp.data.normalize)(X, np.float32(mean), np.float32(std))
    np.testing.assert_allclose(got, (X - np.asarray(mean)) / np.asarray(std), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(compiled, got, rtol=1e-6, atol=1e-6)
    assert dp.data.normalize(jnp.asarray(X, jnp.bfloat16), mean, std).dtype == jnp.bfloat16


@pytest.mark.parametrize("alpha", [0.2, pytest.param(1.0, marks=pytest.mark.slow)])
def test_mixup_mixes_examples_and_their_labels_alike(alpha):
    """Unit vectors as examples: a row of the result shows its weights and its partner."""
    count = 300
    x, y = jax.jit(lambda x: dp.data.mixup(KEY, x, 3 * x, alpha=alpha))(np.eye(count))
    np.testing.assert_allclose(y, 3 * x, rtol=1e-6)
    own, rest = np.diag(x), np.asarray(x) - np.diag(np.diag(x))
    assert ((rest > 0).sum(1) <= 1).all() and ((rest > 0).sum(0) <= 1).all()  # a permutation
    np.testing.assert_allclose(np.asarray(x).sum(1), 1, rtol=1e-6)
    assert scipy.stats.kstest(own, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_mixup_keeps_each_dtype():
    x, y = jax.eval_shape(lambda x, y: dp.data.mixup(KEY, x, y), jnp.ones((4, 2), jnp.bfloat16),
                          jnp.ones((4, 3), jnp.float16))
    assert (x.dtype, y.dtype) == (jnp.bfloat16, jnp.float16)
