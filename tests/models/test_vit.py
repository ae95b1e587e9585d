"""The Vision Transformer: its parameters, counted by hand; it learns; images of one size."""

import jax
import numpy as np
import pytest
from support.counting import block, count, linear, norm
from support.learning import IMAGES, NET, learns

import diffprog as dp

KEY = jax.random.key(0)


def test_the_parameters_of_the_vision_transformer():
    patches = linear(16 * 16 * 3, 768)
    positions = 1 + (224 // 16) ** 2
    derived = patches + 768 + positions * 768 + 12 * block(768) + norm(768) + linear(768, 1000)
    assert count("vit") == derived == 86_567_656


@pytest.mark.slow
def test_it_learns_eight_examples():
    learns(dp.models.vit(4, image_size=4, patch_size=2, **NET), dp.classification(), IMAGES, 80)


@pytest.mark.parametrize("shape", [(1, 4, 16, 3), (1, 9, 9, 3), (1, 4, 4, 3), (8, 8)])
def test_images_of_another_size_raise(shape):
    """A 4 x 16 image has as many patches as 8 x 8, at other positions."""
    net = dp.models.vit(4, image_size=8, patch_size=2, **NET)
    with pytest.raises(dp.LayerError) as caught:
        net.init(KEY, np.ones(shape, np.float32))
    assert caught.value.path == "images"
