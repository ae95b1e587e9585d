"""Convolution: one linear map, shared by all places of an image or a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_leaves, known
from diffprog.core.dtypes import along, check_chunk
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.masks import (
    begins,
    check_segments,
    cleared,
    last_real,
    over_steps,
    refuse_segments,
)
from diffprog.core.meshes import beside
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params, State
from diffprog.layers.spatial.window import (
    AXES,
    Padding,
    Pairs,
    Sides,
    apart,
    cannot_stream,
    check_fits,
    check_length,
    check_mode,
    continued,
    extents,
    margins,
    on_images,
    pairs_for,
    reach_back,
    sides,
    takes,
    window,
)

__all__ = ["conv", "conv_transpose", "depthwise_conv"]

Split = Callable[[Any], tuple[int, int]]  # x -> features of y, groups

_LAYOUT = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@factory
def conv(
    features: int, size: int | tuple[int, ...], *, dims: int = 2,
    stride: int | tuple[int, ...] = 1, padding: Any = "SAME", padding_mode: str = "zeros",
    dilation: int | tuple[int, ...] = 1, groups: int = 1, bias: bool = True,
    kernel_init: Initializer = "lecun_normal", bias_init: Initializer = "zeros",
) -> Layer:
    """Slide a kernel over x: ``y[p] = sum_q x[stride * p + dilation * q] @ kernel[q] + bias``.

    This is cross-correlation: the kernel is not flipped, as everywhere in deep learning. With
    padding by `pad` an axis of H places gives ``floor((H + 2 * pad - K) / stride) + 1``, where
    ``K = dilation * (size - 1) + 1``. "CAUSAL" pads ``K - 1`` places before a sequence and none
    after it, so that no output depends on what comes later; such a layer streams, in chunks that
    are multiples of the stride, and keeps the last ``K - 1`` inputs.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', features) for two dims; the last dims + 1 axes are space
            and channels, all before are batch.
        params: ``kernel`` (size, size, C / groups, features); ``bias`` (features,).
        mask, for one dim: booleans of the leading axes of x; what is not real counts as zero and
            keeps its place: pad short prompts of a stream before their first step, not after it.
        segments, for one dim, where each step has an output: ints (..., T); what is of another
            segment counts as zero, as it does before and after a sequence that is alone. A new one
            begins wherever they change. A chunk of a stream that has none goes on with the last.
        streaming state: ``past`` (..., K - 1, C); ``segment`` (...,), in which the last step
            stands, 0 at the start.

    Args:
        features: channels of y; positive.
        size: side of the kernel, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3; sequences (batch, time, C) want 1, since two would
            read the batch as the height of one image.
        stride: places between two outputs, or one number for each axis.
        padding: "SAME" (as many outputs as inputs, divided by the stride), "VALID" (none),
            "CAUSAL" (one dim), an int, or a pair (before, after) for each axis.
        padding_mode: what stands in the padding: "zeros", or x "reflect"-ed at its border
            places, its border places repeated ("replicate"), or x as a ring ("circular").
        dilation: places between two kernel entries.
        groups: channels are split into so many parts that do not see each other.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` over all inputs of a kernel (LeCun et al. 1998,
            Efficient BackProp, section 4.6).
        bias_init: initializer; zeros.

    Raises:
        LayerError: x has too few axes, or is smaller than the kernel or than what reflect and
            circular put into the padding; groups divide not both channels and features; a chunk of
            a stream is no multiple of the stride; a mask of steps where outputs would depend on how
            long x is padded: with another padding_mode than zeros, or "SAME" and a stride;
            segments, unless stride is 1 and y as long as x, padded by zeros.

    Example:
        >>> net = dp.conv(8, 3, stride=2)
        >>> net.plan(jax.ShapeDtypeStruct((10, 28, 28, 1), jnp.float32)).y.shape
        (10, 14, 14, 8)

    Source: Dumoulin and Visin 2016, arXiv:1603.07285, relation 15; "CAUSAL": van den Oord et al.
    2016, arXiv:1609.03499, section 2.1.
    """
    return _sliding(
        _equal_groups(features, groups), size, dims, stride, padding, padding_mode, dilation, bias,
        kernel_init, bias_init)


@factory
def depthwise_conv(
    size: int | tuple[int, ...], *, multiplier: int = 1, dims: int = 2,
    stride: int | tuple[int, ...] = 1, padding: Any = "SAME", padding_mode: str = "zeros",
    dilation: int | tuple[int, ...] = 1, bias: bool = True,
    kernel_init: Initializer = "lecun_normal", bias_init: Initializer = "zeros",
) -> Layer:
    """Convolve channels one by one: ``y[p,c] = sum_q x[stride*p + dilation*q, c] * kernel[q,c]``.

    This is `conv` with as many groups as channels; ``depthwise_conv(3) >> linear(features)`` is the
    separable convolution. Channel c makes the channels from ``c * multiplier`` on.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C * multiplier) for two dims.
        params: ``kernel`` (size, size, 1, C * multiplier); ``bias`` (C * multiplier,).
        mask, segments, streaming state: as in `conv`.

    Args:
        size: side of the kernels, or one for each axis; a tuple sets `dims`.
        multiplier: kernels of each channel; positive.
        dims: number of spatial axes, 1 to 3.
        stride: places between two outputs, or one number for each axis.
        padding: "SAME", "VALID", "CAUSAL" (one dim), an int, or a pair for each axis, as in `conv`.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as in `conv`.
        dilation: places between two kernel entries.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` over the places of a kernel.
        bias_init: initializer; zeros.

    Raises:
        LayerError: x has too few axes, or is smaller than the kernel or than what reflect and
            circular put into the padding; a chunk of a stream is no multiple of the stride; for a
            mask and segments as `conv` does.

    Example:
        >>> net = dp.depthwise_conv(3, multiplier=2)
        >>> net.plan(jax.ShapeDtypeStruct((10, 28, 28, 4), jnp.float32)).y.shape
        (10, 28, 28, 8)

    Source: Chollet 2017, arXiv:1610.02357, section 3.
    """
    check_count("multiplier", multiplier)
    return _sliding(
        lambda x: (x.shape[-1] * multiplier, x.shape[-1]), size, dims, stride, padding,
        padding_mode, dilation, bias, kernel_init, bias_init)


@factory
def conv_transpose(
    features: int, size: int | tuple[int, ...], *, dims: int = 2,
    stride: int | tuple[int, ...] = 1, padding: Any = "SAME",
    output_padding: int | tuple[int, ...] = 0, dilation: int | tuple[int, ...] = 1,
    groups: int = 1, bias: bool = True, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """Write a kernel for each place: ``y[stride*p + dilation*q - pad] += x[p] @ kernel[q] + bias``.

    The linear map is the transpose of that of `conv` with the same options (and each kernel entry
    transposed), so it makes x larger where `conv` makes it smaller. With padding by `pad` an axis
    of H places gives ``(H - 1) * stride - 2 * pad + K + output_padding``, where
    ``K = dilation * (size - 1) + 1``. The bias is added once to each place.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', features) for two dims.
        params: ``kernel`` (size, size, C / groups, features); ``bias`` (features,).
        mask, for one dim: booleans of the leading axes of x; what is not real counts as zero.

    Args:
        features: channels of y; positive.
        size: side of the kernel, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: places of y between two places of x, or one number for each axis.
        padding: "SAME" (H' = H * stride), "VALID" (all that is written), or how many places are cut
            off: an int, or a pair (before, after) for each axis.
        output_padding: places added after, to tell apart the sizes of which `conv` makes H; below
            the stride or the dilation, and 0 with "SAME".
        dilation: places of y between two kernel entries.
        groups: channels are split into so many parts that do not see each other.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` over all inputs of a kernel.
        bias_init: initializer; zeros.

    Raises:
        LayerError: x has too few axes; groups divide not both channels and features; the padding
            leaves nothing of y; segments, which y mixes.

    Example:
        >>> net = dp.conv_transpose(8, 4, stride=2)
        >>> net.plan(jax.ShapeDtypeStruct((10, 7, 7, 1), jnp.float32)).y.shape
        (10, 14, 14, 8)

    Source: Dumoulin and Visin 2016, arXiv:1603.07285, relation 14.
    """
    size = window(size, dims)
    dims = len(size)
    stride, dilation = sides("stride", stride, dims), sides("dilation", dilation, dims)
    extra = sides("output_padding", output_padding, dims, least=0)
    extent = extents(size, dilation)
    if any(more >= max(s, d) for more, s, d in zip(extra, stride, dilation, strict=True)):
        raise LayerError(f"output_padding below the stride {stride} or the dilation {dilation}",
                         repr(output_padding), "lower it: more places would hold the bias alone")
    if padding == "SAME":
        if any(extra):
            raise LayerError("no output_padding where padding is 'SAME'", repr(output_padding),
                             "give padding as an int or pairs")
        before = [max(k - s, 0) // 2 for k, s in zip(extent, stride, strict=True)]
        cut = [(b, k - s - b) for b, k, s in zip(before, extent, stride, strict=True)]
    else:
        pairs = margins(padding, dims)
        cut = ((0, 0),) * dims if isinstance(pairs, str) else pairs
    cut = [(before, after - more) for (before, after), more in zip(cut, extra, strict=True)]

    def convolve(x: jax.Array, kernel: jax.Array, groups: int, cut: Pairs) -> jax.Array:
        spans = [(side - 1) * s + 1 for side, s in zip(x.shape[1:-1], stride, strict=True)]
        inner = _within(cut, extent, spans)
        y = jax.lax.conv_general_dilated(
            x, jax.lax.rev(kernel, range(dims)), (1,) * dims,
            [(k - 1 - before, k - 1 - after) for k, (before, after)
             in zip(extent, inner, strict=True)],
            lhs_dilation=stride, rhs_dilation=dilation, dimension_numbers=_LAYOUT[dims],
            feature_group_count=groups,
        )
        return _enlarged(y, inner, cut)

    init, forward = _with_kernel(
        convolve, _equal_groups(features, groups), size, bias, kernel_init, bias_init)

    def apply(
        params: Params, state: State, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, State]:
        refuse_segments(segments)
        check_array(x, rank=dims + 1, axes=AXES[dims])
        if 0 in x.shape[-dims - 1 : -1]:
            raise LayerError("at least one place to write a kernel for", show(x),
                             "leave such an input out")
        left = [(side - 1) * s + k - sum(pair) for side, s, pair, k
                in zip(x.shape[-dims - 1 : -1], stride, cut, extent, strict=True)]
        if min(left) < 1:
            raise LayerError("padding that leaves something of the output", show(x), "pad less")
        return forward(params, cleared(x, mask), cut), state

    return Layer(init, apply, cannot_stream, side=takes(dims), casts=True)


# XLA on CPU reads other memory where a padding is negative. Each derivative of a convolution is
# one too, and pads by what the padding leaves of the kernel, or of the way that the kernel goes.
# So a padding is less than either of them; zeros beyond that are put around x, and what is cut off,
# as are the places that the kernel does not reach by its stride, is no part of any convolution.


def _within(pairs: Pairs, extent: Sides, spans: Sequence[int]) -> list[tuple[int, int]]:
    """The part of the padding that no derivative turns into a negative one."""
    rooms = [max(min(k, span) - 1, 0) if known(span) else 0
             for k, span in zip(extent, spans, strict=True)]
    return [(min(max(before, 0), room), min(max(after, 0), room)) if room else (0, 0)
            for (before, after), room in zip(pairs, rooms, strict=True)]


def _enlarged(x: jax.Array, wanted: Pairs, given: Pairs) -> jax.Array:
    """x with the zeros around it, or without the places, by which one padding exceeds another."""
    more = [(a - c, b - d, 0) for (a, b), (c, d) in zip(wanted, given, strict=True)]
    if not any(map(any, more)):
        return x
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *more, (0, 0, 0)])


def _equal_groups(features: int, groups: int) -> Split:
    """Channels of y and groups, both given; the channels of x must be divided by the groups too."""
    check_count("features", features)
    check_count("groups", groups)
    if features % groups:
        raise LayerError(f"features in {groups} equal groups", f"{features}",
                         "choose groups that divide the features")

    def split(x: Any) -> tuple[int, int]:
        if x.shape[-1] % groups:
            raise LayerError(f"channels in {groups} equal groups", f"{x.shape[-1]} in {show(x)}",
                             "choose groups that divide the channels")
        return features, groups

    return split


def _with_kernel(
    convolve: Callable[..., jax.Array], split: Split, size: Sides, bias: bool,
    kernel_init: Initializer, bias_init: Initializer,
) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """`init`, and `forward` of ``convolve(x, kernel, groups, margin) + bias``."""
    dims = len(size)

    def init(key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        check_array(x, rank=dims + 1, axes=AXES[dims])
        features, groups = split(x)
        shape = (*size, x.shape[-1] // groups, features)
        params = {"kernel": parameter(key, "kernel", kernel_init, shape, x)}
        if bias:
            params["bias"] = parameter(key, "bias", bias_init, (features,), x)
        return params, {}

    def forward(params: Params, x: jax.Array, margin: Padding) -> jax.Array:
        features, groups = split(x)
        check_leaves(params, features)
        kernel = params["kernel"].astype(x.dtype)
        y = on_images(lambda x: convolve(x, kernel, groups, margin), dims, x)
        return y + along(params["bias"], y) if bias else y

    return init, forward


def _sliding(
    split: Split, size: Any, dims: int, stride: Any, padding: Any, mode: str, dilation: Any,
    bias: bool, kernel_init: Initializer, bias_init: Initializer,
) -> Layer:
    """The layer of a kernel that slides over x."""
    size = window(size, dims)
    dims = len(size)
    stride, dilation = sides("stride", stride, dims), sides("dilation", dilation, dims)
    extent, causal = extents(size, dilation), padding == "CAUSAL"
    check_mode(mode)
    if causal and (dims, mode) != (1, "zeros"):
        raise LayerError("dims=1 and padding_mode='zeros' for causal padding",
                         f"dims={dims} and {mode!r}", "pad by pairs: only a sequence has a past")
    before = extent[0] - 1
    margin = ((before, 0),) if causal else margins(padding, dims)

    def convolve(x: jax.Array, kernel: jax.Array, groups: int, margin: Padding) -> jax.Array:
        pairs = pairs_for(margin, x, extent, stride)
        if mode != "zeros":
            x, pairs = continued(x, pairs, mode), ((0, 0),) * dims
        # How far the kernel moves, and what is left beyond its last place.
        moves = [side + sum(pair) - k for side, pair, k
                 in zip(x.shape[1:-1], pairs, extent, strict=True)]
        moves = [max(move, 0) if known(move) else move for move in moves]
        rests = [move % s for move, s in zip(moves, stride, strict=True)]
        pairs = [(before, after - rest)
                 for (before, after), rest in zip(pairs, rests, strict=True)]
        spans = [move - rest + 1 for move, rest in zip(moves, rests, strict=True)]
        inner = _within(pairs, extent, spans)
        return jax.lax.conv_general_dilated(
            _enlarged(x, pairs, inner), kernel, stride, inner, rhs_dilation=dilation,
            dimension_numbers=_LAYOUT[dims], feature_group_count=groups,
        )

    def convolve_apart(x: jax.Array, kernel: jax.Array, groups: int, margin: Padding) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, size, margin, dimension_numbers=_LAYOUT[dims], feature_group_count=groups)

    init, forward = _with_kernel(convolve, split, size, bias, kernel_init, bias_init)
    _, forward_apart = _with_kernel(convolve_apart, split, size, bias, kernel_init, bias_init)

    def by_segment(
        params: Params, state: State, x: jax.Array, segments: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, State]:
        """The same where windows end with their segment: each is written out, and cleared."""
        back = reach_back(segments, margin, extent, stride, mode)
        segments, real = check_segments(segments, x.shape[:-1]), over_steps(mask, x)
        runs = jnp.cumsum(begins(segments, real, state.get("segment")), -1, dtype=jnp.int32)
        around = [(0, 0)] * (x.ndim - 2) + [(back, extent[0] - 1 - back)]
        whole, runs = jnp.pad(x, [*around, (0, 0)]), jnp.pad(runs, around)
        if state:  # which has the last segment's past alone
            past, last = state["past"], whole.shape[-2] - before
            check_chunk(past, x)
            whole = whole.at[..., :before, :].set(past.astype(x.dtype))
            kept = cleared(whole[..., last:, :], runs[..., last:] == runs[..., -1:])
            state = {"past": kept.astype(past.dtype),
                     "segment": last_real(segments, real, state["segment"])}
        windows, _ = apart(whole, runs, size[0], dilation[0], back)
        return forward_apart(params, windows, "VALID"), state

    def apply(
        params: Params, state: State, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=dims + 1, axes=AXES[dims])
        check_length(mask, x, margin, extent, stride, mode)
        x, pads = cleared(x, mask), margin
        if segments is not None:
            return by_segment(params, state, x, segments, mask)
        if "past" in state:
            if x.shape[-2] % stride[0]:
                raise LayerError(f"chunks whose steps are a multiple of the stride {stride[0]}",
                                 show(x), "pass on so many steps at a time")
            past = state["past"]
            check_chunk(past, x)
            x, pads = jnp.concatenate([beside(past, x).astype(x.dtype), x], axis=-2), "VALID"
            state = state | {"past": x[..., x.shape[-2] - before :, :].astype(past.dtype)}
        y = forward(params, x, pads)
        check_fits(x, y, "kernel")
        return y, state

    def start(params: Params, state: State, x: jax.Array, **_: Any) -> State:
        return {"past": jnp.zeros((*x.shape[:-2], before, x.shape[-1]), x.dtype),
                "segment": jnp.zeros(x.shape[:-2], jnp.int32)}

    return Layer(init, apply, start if causal else cannot_stream, side=takes(dims), casts=True)
