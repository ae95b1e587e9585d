"""AlexNet: five convolutions and three linear layers, in one expression.

Krizhevsky, Sutskever, Hinton 2012, "ImageNet classification with deep convolutional neural
networks", NeurIPS 25, section 3 and figure 2:

    AlexNet(x) = FeedForward³(MaxPool(Conv³(MaxPool(Conv(MaxPool(Conv(x)))))))
"""

from __future__ import annotations

from typing import Any

import jax

from diffprog.core.layer import Layer
from diffprog.layers.linear import linear
from diffprog.layers.reshape import flatten
from diffprog.layers.spatial.conv import conv
from diffprog.layers.spatial.pool import max_pool

__all__ = ["alexnet"]


def alexnet(classes: int = 1000) -> Layer:
    """``y = FeedForward^3(MaxPool(Conv^3(MaxPool(Conv(MaxPool(Conv(x)))))))``, the sizes of 2012.

    Conv is a convolution and a ReLU, FeedForward a linear map and a ReLU, except for the last,
    whose outputs are logits. Convolutions 2, 4 and 5 have two groups, as on the two GPUs of the
    paper. Local response normalization and dropout, which the paper adds, are left out.

    Shapes:
        x: (..., 227, 227, 3) -> (..., classes). The paper says 224, which does not match the
            55 x 55 positions of its first layer.
        params: 60,965,224 parameters for 1000 classes.

    Args:
        classes: number of classes.

    Example:
        >>> image = jax.ShapeDtypeStruct((1, 227, 227, 3), jnp.float32)
        >>> dp.models.alexnet().plan(image).y.shape
        (1, 1000)

    Source: Krizhevsky, Sutskever, Hinton 2012, NeurIPS 25, section 3.5.
    """

    def Conv(features: int, size: int, **options: Any) -> Layer:
        return conv(features, size, **options) >> jax.nn.relu

    def MaxPool() -> Layer:
        return max_pool(3, stride=2)

    def FeedForward(features: int, activation: Any = jax.nn.relu) -> Layer:
        return linear(features) >> activation

    return (
        Conv(96, 11, stride=4, padding="VALID") >> MaxPool()
        >> Conv(256, 5, groups=2) >> MaxPool()
        >> Conv(384, 3) >> Conv(384, 3, groups=2) >> Conv(256, 3, groups=2) >> MaxPool()
        >> flatten()
        >> FeedForward(4096) >> FeedForward(4096) >> FeedForward(classes, jax.nn.identity)
    )
