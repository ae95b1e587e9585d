"""DCGAN: its parameters, counted by hand, and the shape of its images."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.counting import conv, count, linear, norm

import diffprog as dp


def test_the_parameters_of_dcgan():
    widths = [1024, 512, 256, 128]
    between = [conv(5, *pair) + norm(pair[1]) for pair in itertools.pairwise(widths)]
    project = 100 * 16 * 1024 + norm(1024)
    derived = project + sum(between) + conv(5, 128, 3) + 3
    assert count("dcgan_generator") == derived == 18_855_043
    # The same convolutions in reverse; the norms are on the wider side.
    between = [conv(5, *pair) + norm(pair[0]) for pair in itertools.pairwise(widths)]
    derived = conv(5, 3, 128) + 128 + sum(between) + linear(16 * 1024, 1)
    assert count("dcgan_discriminator") == derived == 17_232_897


@pytest.mark.slow
def test_sides_double_from_figure_1():
    z = jax.ShapeDtypeStruct((1, 100), jnp.float32)
    rows = {row.path: row.output.shape for row in dp.summary(dp.models.dcgan_generator(), z).rows}
    found = [rows[name] for name in ("project", "up_1", "up_2", "up_3", "image")]
    assert found == [(1, 4, 4, 1024), (1, 8, 8, 512), (1, 16, 16, 256), (1, 32, 32, 128),
                     (1, 64, 64, 3)]


@pytest.mark.slow
def test_generator_and_discriminator_in_numpy():
    """On one pixel a convolution is a matrix: one doubling, and two halvings."""
    generator = dp.models.dcgan_generator(2, 1, width=3, smallest=1)
    z = jnp.linspace(-2.0, 2.0, 8).reshape(4, 2)
    params, state = generator.init(jax.random.key(0), z)
    y, _ = jax.jit(lambda *given: generator.apply(*given, train=True))(params, state, z)
    hidden = np.asarray(z) @ np.asarray(params["project"]["linear_0"]["kernel"])
    hidden = np.maximum((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5), 0)
    kernel = np.asarray(params["image"]["conv_transpose_0"]["kernel"])
    # "SAME" cuts one pixel at the start: the image is the center of the full output.
    image = np.tanh(np.einsum("nc,ijcd->nijd", hidden, kernel[1:3, 1:3]))
    np.testing.assert_allclose(y, image, atol=1e-6)

    discriminator = dp.models.dcgan_discriminator(4, width=2, smallest=1)
    x = jnp.sin(jnp.arange(64.0)).reshape(4, 4, 4, 1)
    params, state = discriminator.init(jax.random.key(0), x)
    y, _ = jax.jit(lambda *given: discriminator.apply(*given, train=True))(params, state, x)
    wide = np.pad(np.asarray(x), ((0, 0), (1, 2), (1, 2), (0, 0)))
    kernel = np.asarray(params["down_1"]["conv_0"]["kernel"])
    first = np.stack([np.einsum("nijc,ijcd->nd", wide[:, i : i + 5, j : j + 5], kernel)
                      for i in (0, 2) for j in (0, 2)], 1).reshape(4, 2, 2, 2)
    first = np.maximum(first, 0.2 * first)
    kernel = np.asarray(params["down_2"]["conv_0"]["kernel"])
    second = np.einsum("nijc,ijcd->nd", first, kernel[1:3, 1:3])
    second = (second - second.mean(0)) / np.sqrt(second.var(0) + 1e-5)
    second = np.maximum(second, 0.2 * second)
    np.testing.assert_allclose(y, second @ np.asarray(params["head"]["linear_0"]["kernel"]),
                               atol=1e-6)


@pytest.mark.parametrize("image_size", [12, 20])
@pytest.mark.parametrize("make", [dp.models.dcgan_generator, dp.models.dcgan_discriminator])
def test_other_image_sizes_raise(make, image_size):
    with pytest.raises(dp.LayerError, match="image_size as 4 times a power of two"):
        make(image_size)
