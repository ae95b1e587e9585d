"""Convolution: one linear map, shared by all places of an image or a sequence."""

from __future__ import annotations

from typing import Any

import jax

from diffprog.errors import LayerError, check_array, check_count, check_leaves
from diffprog.layer import Layer, Params, State, factory
from diffprog.layers.window import (
    AXES,
    cannot_stream,
    check_fits,
    margins,
    on_images,
    sides,
    window,
)
from diffprog.notation import show
from diffprog.parameters import parameter

__all__ = ["conv"]

_LECUN_NORMAL = jax.nn.initializers.lecun_normal()
_ZEROS = jax.nn.initializers.zeros


@factory
def conv(
    features: int, size: int | tuple[int, ...], *, dims: int = 2,
    stride: int | tuple[int, ...] = 1, padding: Any = "SAME",
    dilation: int | tuple[int, ...] = 1, groups: int = 1, bias: bool = True,
    kernel_init: Any = _LECUN_NORMAL, bias_init: Any = _ZEROS,
) -> Layer:
    """Slide a kernel over x: ``y[p] = sum_q x[stride * p + dilation * q] @ kernel[q] + bias``.

    This is cross-correlation: the kernel is not flipped, as everywhere in deep learning. With
    padding by `pad` an axis of H places gives ``floor((H + 2 * pad - K) / stride) + 1``, where
    ``K = dilation * (size - 1) + 1``.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', features) for two dims; the last dims + 1 axes are space
            and channels, all before are batch.
        params: ``kernel`` (size, size, C / groups, features); ``bias`` (features,).

    Args:
        features: channels of y; positive.
        size: side of the kernel, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: places between two outputs, or one number for each axis.
        padding: "SAME" (as many outputs as inputs, divided by the stride), "VALID" (none), an int,
            or a pair (before, after) for each axis.
        dilation: places between two kernel entries.
        groups: channels are split into so many parts that do not see each other.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` over all inputs of a kernel (LeCun et al. 1998,
            Efficient BackProp, section 4.6).
        bias_init: initializer; zeros.

    Raises:
        LayerError: x has too few axes or is smaller than the kernel; groups divide not both
            channels and features.

    Example:
        >>> net = dp.conv(8, 3, stride=2)
        >>> net.plan(jax.ShapeDtypeStruct((10, 28, 28, 1), jnp.float32)).y.shape
        (10, 14, 14, 8)

    Source: Dumoulin and Visin 2016, arXiv:1603.07285, relation 14.
    """
    check_count("features", features)
    check_count("groups", groups)
    size = window(size, dims)
    dims = len(size)
    stride, dilation = sides("stride", stride, dims), sides("dilation", dilation, dims)
    margin = margins(padding, dims)
    if features % groups:
        raise LayerError(f"features in {groups} equal groups", f"{features}",
                         "choose groups that divide the features")
    space = "DHW"[-dims:]
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")

    def init(key: jax.Array, x: Any) -> tuple[Params, State]:
        check_array(x, rank=dims + 1, axes=AXES[dims])
        if x.shape[-1] % groups:
            raise LayerError(f"channels in {groups} equal groups", f"{x.shape[-1]} in {show(x)}",
                             "choose groups that divide the channels")
        shape = (*size, x.shape[-1] // groups, features)
        params = {"kernel": parameter(key, "kernel", kernel_init, shape, x)}
        if bias:
            params["bias"] = parameter(key, "bias", bias_init, (features,), x)
        return params, {}

    def apply(params: Params, state: State, x: jax.Array, **_: Any) -> tuple[jax.Array, State]:
        def convolve(x: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x, params["kernel"].astype(x.dtype), stride, margin, rhs_dilation=dilation,
                dimension_numbers=layout, feature_group_count=groups,
            )

        check_array(x, rank=dims + 1, axes=AXES[dims])
        check_leaves(params, features)
        y = on_images(convolve, x, dims)
        check_fits(x, y, "kernel")
        return (y + params["bias"].astype(x.dtype) if bias else y), state

    return Layer(init, apply, cannot_stream)
