"""Convolution: one linear map, shared by all positions of an image or a sequence."""

from __future__ import annotations

import dataclasses
import functools
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
    last_valid,
    over_steps,
    refuse_segments,
)
from diffprog.core.meshes import beside
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer
from diffprog.core.plans import Params, State
from diffprog.layers.linear import affine_params
from diffprog.layers.spatial.window import (
    AXES,
    Edges,
    Padding,
    Pairs,
    apart,
    cannot_stream,
    check_fits,
    check_length,
    check_mode,
    continued,
    edges,
    extents,
    margins,
    on_images,
    pairs_for,
    reach_back,
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

    This is cross-correlation: the kernel is not flipped, as usual in deep learning. With padding
    by `pad`, the output length is ``floor((H + 2 * pad - K) / stride) + 1``, where
    ``K = dilation * (size - 1) + 1``. "CAUSAL" pads ``K - 1`` steps before a sequence and none
    after it, so that outputs depend on the past alone; such a layer streams, in chunks whose length
    is a multiple of the stride, and keeps the last ``K - 1`` inputs.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', features) for two dims; all axes before the spatial axes
            are batch axes.
        params: ``kernel`` (size, size, C / groups, features); ``bias`` (features,).
        mask, for one dim: booleans over leading axes of x, True = valid; masked steps count as
            zeros and keep their position: pad short prompts of a stream on the left.
        segments, for one dim, if each step has an output: ints (..., T); steps of other segments
            count as zeros, as padding does. A segment begins wherever the number changes. A chunk
            of a stream without segments continues the last one.
        streaming state: ``past`` (..., K - 1, C); ``segment`` (...,), that of the last step, 0 at
            the start.

    Args:
        features: channels of y; positive.
        size: kernel size, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3; 1 for sequences (batch, time, C), whose batch axis
            would be the height of an image with 2.
        stride: distance of two outputs in positions of x, or one for each axis.
        padding: "SAME" (as many outputs as inputs, divided by the stride), "VALID" (none),
            "CAUSAL" (one dim), an int, or a pair (before, after) for each axis.
        padding_mode: values of the padding: "zeros", or x reflected at its border ("reflect"), its
            border repeated ("replicate"), or x repeated ("circular").
        dilation: distance of two kernel entries in positions of x, or one for each axis.
        groups: number of groups of channels that are convolved separately.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` over all inputs of a kernel (LeCun et al. 1998,
            Efficient BackProp, section 4.6).
        bias_init: initializer; zeros.

    Raises:
        LayerError: x has too few axes, or is smaller than the kernel or than reflect and circular
            padding; groups do not divide both channels and features; the length of a chunk is no
            multiple of the stride; a mask of steps, if outputs would depend on the length of x:
            with another padding_mode than zeros, or "SAME" and a stride; segments, unless stride
            is 1 and y as long as x, padded by zeros.

    Example:
        >>> net = dp.conv(8, 3, stride=2)
        >>> net.plan(jax.ShapeDtypeStruct((10, 28, 28, 1), jnp.float32)).y.shape
        (10, 14, 14, 8)

    Source: Dumoulin and Visin 2016, arXiv:1603.07285, relation 15; "CAUSAL": van den Oord et al.
    2016, arXiv:1609.03499, section 2.1.
    """
    return _conv(
        _equal_groups(features, groups), size, dims, stride, padding, padding_mode, dilation, bias,
        kernel_init, bias_init)


@factory
def depthwise_conv(
    size: int | tuple[int, ...], *, multiplier: int = 1, dims: int = 2,
    stride: int | tuple[int, ...] = 1, padding: Any = "SAME", padding_mode: str = "zeros",
    dilation: int | tuple[int, ...] = 1, bias: bool = True,
    kernel_init: Initializer = "lecun_normal", bias_init: Initializer = "zeros",
) -> Layer:
    """Convolve each channel alone: ``y[p,c] = sum_q x[stride*p + dilation*q, c] * kernel[q,c]``.

    This is `conv` with one group for each channel; ``depthwise_conv(3) >> linear(features)`` is the
    separable convolution. With a multiplier m, channel c has the outputs ``c * m`` to
    ``c * m + m - 1``.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', C * multiplier) for two dims.
        params: ``kernel`` (size, size, 1, C * multiplier); ``bias`` (C * multiplier,).
        mask, segments, streaming state: as in `conv`.

    Args:
        size: kernel size, or one for each axis; a tuple sets `dims`.
        multiplier: kernels of each channel; positive.
        dims: number of spatial axes, 1 to 3.
        stride: distance of two outputs in positions of x, or one for each axis.
        padding: "SAME", "VALID", "CAUSAL" (one dim), an int, or a pair for each axis, as in `conv`.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as in `conv`.
        dilation: distance of two kernel entries in positions of x, or one for each axis.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` over the positions of a kernel.
        bias_init: initializer; zeros.

    Raises:
        LayerError: x has too few axes, or is smaller than the kernel or than reflect and circular
            padding; the length of a chunk is no multiple of the stride; for a mask and segments as
            in `conv`.

    Example:
        >>> net = dp.depthwise_conv(3, multiplier=2)
        >>> net.plan(jax.ShapeDtypeStruct((10, 28, 28, 4), jnp.float32)).y.shape
        (10, 28, 28, 8)

    Source: Chollet 2017, arXiv:1610.02357, section 3.
    """
    check_count("multiplier", multiplier)

    def split(x: Any) -> tuple[int, int]:
        return x.shape[-1] * multiplier, x.shape[-1]

    return _conv(
        split, size, dims, stride, padding, padding_mode, dilation, bias, kernel_init, bias_init)


@factory
def conv_transpose(
    features: int, size: int | tuple[int, ...], *, dims: int = 2,
    stride: int | tuple[int, ...] = 1, padding: Any = "SAME",
    output_padding: int | tuple[int, ...] = 0, dilation: int | tuple[int, ...] = 1,
    groups: int = 1, bias: bool = True, kernel_init: Initializer = "lecun_normal",
    bias_init: Initializer = "zeros",
) -> Layer:
    """Add a kernel at each position: ``y[stride*p + dilation*q - pad] += x[p] @ kernel[q] + bias``.

    The linear map is the transpose of that of `conv` with the same options (and each kernel entry
    transposed): `conv` makes x smaller, this makes it larger. With padding by `pad`, the output
    length is ``(H - 1) * stride - 2 * pad + K + output_padding``, where
    ``K = dilation * (size - 1) + 1``. The bias is added once at each position.

    Shapes:
        x: (..., H, W, C) -> (..., H', W', features) for two dims.
        params: ``kernel`` (size, size, C / groups, features); ``bias`` (features,).
        mask, for one dim: booleans over leading axes of x, True = valid; masked steps count as
            zeros.

    Args:
        features: channels of y; positive.
        size: kernel size, or one for each axis; a tuple sets `dims`.
        dims: number of spatial axes, 1 to 3.
        stride: distance of two positions of x in positions of y, or one for each axis.
        padding: "SAME" (H' = H * stride), "VALID" (nothing is cut off), or the number of positions
            to cut off: an int, or a pair (before, after) for each axis.
        output_padding: positions added after, since `conv` with a stride maps several lengths to H;
            below the stride or the dilation, and 0 with "SAME".
        dilation: distance of two kernel entries in positions of y, or one for each axis.
        groups: number of groups of channels that are convolved separately.
        bias: False leaves the bias out.
        kernel_init: initializer; ``lecun_normal`` over all inputs of a kernel.
        bias_init: initializer; zeros.

    Raises:
        LayerError: x has too few axes; groups do not divide both channels and features; the padding
            cuts off all of y; segments, because y mixes them.

    Example:
        >>> net = dp.conv_transpose(8, 4, stride=2)
        >>> net.plan(jax.ShapeDtypeStruct((10, 7, 7, 1), jnp.float32)).y.shape
        (10, 14, 14, 8)

    Source: Dumoulin and Visin 2016, arXiv:1603.07285, relation 14.
    """
    size = window(size, dims)
    dims = len(size)
    stride, dilation = edges("stride", stride, dims), edges("dilation", dilation, dims)
    extra = edges("output_padding", output_padding, dims, least=0)
    extent = extents(size, dilation)
    if any(more >= max(s, d) for more, s, d in zip(extra, stride, dilation, strict=True)):
        raise LayerError(f"output_padding below the stride {stride} or the dilation {dilation}",
                         repr(output_padding), "lower it: more positions would hold the bias alone")
    if padding == "SAME" and any(extra):
        raise LayerError("no output_padding with padding='SAME'", repr(output_padding),
                         "pass padding as an int or pairs")
    cut = _cut(padding, extent, stride)
    cut = [(before, after - more) for (before, after), more in zip(cut, extra, strict=True)]
    kernel = _Kernel(size, _equal_groups(features, groups), bias, kernel_init, bias_init)
    transposed = _Transposed(kernel, extent, stride, dilation, cut)
    return Layer(kernel.init, transposed.apply, cannot_stream, side=takes(dims), casts=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Kernel:
    """The parameters of a convolution, and how they are applied."""

    size: Edges
    split: Split
    bias: bool
    kernel_init: Initializer
    bias_init: Initializer

    def init(self, key: jax.Array, x: Any, **_: Any) -> tuple[Params, State]:
        dims = len(self.size)
        check_array(x, rank=dims + 1, axes=AXES[dims])
        features, groups = self.split(x)
        shape = (*self.size, x.shape[-1] // groups, features)
        return affine_params(key, shape, x, self.bias, self.kernel_init, self.bias_init), {}

    def apply(
        self, params: Params, x: jax.Array, convolve: Callable[..., jax.Array]
    ) -> jax.Array:
        """``convolve(x, kernel, groups) + bias``; convolve sees x with one batch axis."""
        features, groups = self.split(x)
        check_leaves(params, features)
        kernel = params["kernel"].astype(x.dtype)  # (size..., C / groups, features)
        y = on_images(lambda x: convolve(x, kernel, groups), len(self.size), x)
        return y + along(params["bias"], y) if self.bias else y  # (..., H', W', features)


def _convolved(
    x: jax.Array, kernel: jax.Array, groups: int, *, stride: Sequence[int], padding: Padding,
    dilation: Edges | None = None, gaps: Edges | None = None,
) -> jax.Array:
    """``y[p] = sum_q x[stride * p + dilation * q] @ kernel[q]``, x with one batch axis.

    Between two positions of x come ``gaps - 1`` zeros.
    """
    return jax.lax.conv_general_dilated(
        x, kernel, stride, padding, lhs_dilation=gaps, rhs_dilation=dilation,
        dimension_numbers=_LAYOUT[x.ndim - 2], feature_group_count=groups)


def _conv(
    split: Split, size: Any, dims: int, stride: Any, padding: Any, mode: str, dilation: Any,
    bias: bool, kernel_init: Initializer, bias_init: Initializer,
) -> Layer:
    """The layer of `conv` and `depthwise_conv`, which split the channels differently."""
    size = window(size, dims)
    dims = len(size)
    stride, dilation = edges("stride", stride, dims), edges("dilation", dilation, dims)
    extent, causal = extents(size, dilation), padding == "CAUSAL"
    check_mode(mode)
    if causal and (dims, mode) != (1, "zeros"):
        raise LayerError("dims=1 and padding_mode='zeros' for causal padding",
                         f"dims={dims} and {mode!r}", "pass pairs: only a sequence has a past")
    margin = ((extent[0] - 1, 0),) if causal else margins(padding, dims)
    kernel = _Kernel(size, split, bias, kernel_init, bias_init)
    sliding = _Sliding(kernel, extent, stride, dilation, margin, mode)
    return Layer(kernel.init, sliding.apply, sliding.start if causal else cannot_stream,
                 side=takes(dims), casts=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sliding:
    """A kernel that slides over x."""

    kernel: _Kernel
    extent: Edges  # positions of x that the kernel spans
    stride: Edges
    dilation: Edges
    margin: Padding
    mode: str

    def apply(
        self, params: Params, state: State, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, State]:
        dims = len(self.stride)
        check_array(x, rank=dims + 1, axes=AXES[dims])
        check_length(mask, x, self.margin, self.extent, self.stride, self.mode)
        x, margin = cleared(x, mask), self.margin
        if segments is not None:
            return self.by_segment(params, state, x, segments, mask)
        if "past" in state:
            x, state = self.after_past(x, state)
            margin = "VALID"
        y = self.kernel.apply(params, x, functools.partial(self.convolve, margin=margin))
        check_fits(x, y, "kernel")
        return y, state

    def start(self, params: Params, state: State, x: jax.Array, **_: Any) -> State:
        return {"past": jnp.zeros((*x.shape[:-2], self.extent[0] - 1, x.shape[-1]), x.dtype),
                "segment": jnp.zeros(x.shape[:-2], jnp.int32)}

    def convolve(
        self, x: jax.Array, kernel: jax.Array, groups: int, *, margin: Padding
    ) -> jax.Array:
        """Pad x, with one batch axis, and convolve it."""
        pairs = pairs_for(margin, x, self.extent, self.stride)
        if self.mode != "zeros":
            x = continued(x, pairs, self.mode)
            pairs = ((0, 0),) * len(pairs)
        x, pairs = _safe_padding(x, pairs, self.extent, self.stride)
        return _convolved(
            x, kernel, groups, stride=self.stride, padding=pairs, dilation=self.dilation)

    def after_past(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """The chunk with the past before it, and the state with the past of the next chunk."""
        if x.shape[-2] % self.stride[0]:
            raise LayerError(f"chunks whose length is a multiple of the stride {self.stride[0]}",
                             show(x), "pass chunks of such a length")
        past = state["past"]  # (..., K - 1, C)
        check_chunk(past, x)
        x = jnp.concatenate([beside(past, x).astype(x.dtype), x], axis=-2)  # (..., K - 1 + T, C)
        past = x[..., x.shape[-2] - self.extent[0] + 1 :, :].astype(past.dtype)
        return x, state | {"past": past}

    def by_segment(
        self, params: Params, state: State, x: jax.Array, segments: jax.Array,
        mask: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        """Convolve each segment alone: windows are copied and cut off at their segments."""
        back = reach_back(segments, self.margin, self.extent, self.stride, self.mode)
        size, before = self.kernel.size[0], self.extent[0] - 1
        segments, valid = check_segments(segments, x.shape[:-1]), over_steps(mask, x)
        new = begins(segments, valid, state.get("segment"))
        runs = jnp.cumsum(new, -1, dtype=jnp.int32)  # index of the segment, (..., T)
        around = [(0, 0)] * (x.ndim - 2) + [(back, before - back)]
        whole = jnp.pad(x, [*around, (0, 0)])  # (..., K - 1 + T, C)
        runs = jnp.pad(runs, around)
        if state:  # all of the past is of the last segment, which has the index 0
            past, last = state["past"], whole.shape[-2] - before
            check_chunk(past, x)
            whole = whole.at[..., :before, :].set(past.astype(x.dtype))
            kept = cleared(whole[..., last:, :], runs[..., last:] == runs[..., -1:])
            state = {"past": kept.astype(past.dtype),
                     "segment": last_valid(segments, valid, state["segment"])}
        windows, _ = apart(whole, runs, size, self.dilation[0], back)  # (..., T * size, C)
        convolve = functools.partial(_convolved, stride=(size,), padding="VALID")
        return self.kernel.apply(params, windows, convolve), state


def _cut(padding: Any, extent: Edges, stride: Edges) -> Pairs:
    """The positions that a transposed convolution cuts off; "SAME" may cut off less than none."""
    if padding == "SAME":
        before = [max(k - s, 0) // 2 for k, s in zip(extent, stride, strict=True)]
        return [(b, k - s - b) for b, k, s in zip(before, extent, stride, strict=True)]
    pairs = margins(padding, len(extent))
    return ((0, 0),) * len(extent) if isinstance(pairs, str) else pairs


@dataclasses.dataclass(frozen=True, eq=False)
class _Transposed:
    """A kernel that is added to y at each position of x."""

    kernel: _Kernel
    extent: Edges  # positions of y that the kernel spans
    stride: Edges
    dilation: Edges
    cut: Pairs  # positions of y that are cut off; added where negative

    def apply(
        self, params: Params, state: State, x: jax.Array, *, mask: jax.Array | None = None,
        segments: jax.Array | None = None, **_: Any,
    ) -> tuple[jax.Array, State]:
        dims = len(self.stride)
        refuse_segments(segments)
        check_array(x, rank=dims + 1, axes=AXES[dims])
        space = x.shape[-dims - 1 : -1]
        if 0 in space:
            raise LayerError("at least one position along each spatial axis", show(x),
                             "leave such an input out")
        lengths = [(n - 1) * s + k - sum(pair) for n, s, pair, k
                   in zip(space, self.stride, self.cut, self.extent, strict=True)]
        if min(lengths) < 1:
            raise LayerError("padding that leaves at least one output position", show(x),
                             "pad less")
        return self.kernel.apply(params, cleared(x, mask), self.convolve), state

    def convolve(self, x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
        """Spread x, with one batch axis, by the stride, and convolve it with the flipped kernel."""
        spans = [(n - 1) * s + 1 for n, s in zip(x.shape[1:-1], self.stride, strict=True)]
        safe = _within(self.cut, self.extent, spans)
        pairs = [(k - 1 - before, k - 1 - after) for k, (before, after)
                 in zip(self.extent, safe, strict=True)]
        flipped = jax.lax.rev(kernel, range(len(spans)))
        y = _convolved(x, flipped, groups, stride=(1,) * len(spans), padding=pairs,
                       dilation=self.dilation, gaps=self.stride)
        return _enlarged(y, safe, self.cut)


# XLA on CPU reads outside the array where a padding is negative. The derivatives of a convolution
# are convolutions too, padded by the extent of the kernel minus the padding, or by the span of its
# positions minus the padding. So a padding must be smaller than both. The rest is padded around x,
# and positions that no window reaches, because of the stride, are cut off before the convolution.


def _safe_padding(
    x: jax.Array, pairs: Pairs, extent: Edges, stride: Edges
) -> tuple[jax.Array, Pairs]:
    """x with a part of the padding in it, and the part that is left for the convolution."""
    moves = [length + sum(pair) - k for length, pair, k
             in zip(x.shape[1:-1], pairs, extent, strict=True)]  # from the first window on
    moves = [max(move, 0) if known(move) else move for move in moves]
    unread = [move % s for move, s in zip(moves, stride, strict=True)]  # after the last window
    pairs = [(before, after - rest) for (before, after), rest in zip(pairs, unread, strict=True)]
    spans = [move - rest + 1 for move, rest in zip(moves, unread, strict=True)]
    safe = _within(pairs, extent, spans)
    return _enlarged(x, pairs, safe), safe


def _within(pairs: Pairs, extent: Edges, spans: Sequence[int]) -> list[tuple[int, int]]:
    """The part of the padding that leads to no negative padding in any derivative."""
    most = [max(min(k, span) - 1, 0) if known(span) else 0
            for k, span in zip(extent, spans, strict=True)]
    return [(min(max(before, 0), m), min(max(after, 0), m)) if m else (0, 0)
            for (before, after), m in zip(pairs, most, strict=True)]


def _enlarged(x: jax.Array, wanted: Pairs, given: Pairs) -> jax.Array:
    """x padded by ``wanted - given`` zeros on each side; cut off where that is negative."""
    more = [(a - c, b - d, 0) for (a, b), (c, d) in zip(wanted, given, strict=True)]
    if not any(map(any, more)):
        return x
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *more, (0, 0, 0)])


def _equal_groups(features: int, groups: int) -> Split:
    """The split of `features` into groups, which must divide the channels of x too."""
    check_count("features", features)
    check_count("groups", groups)
    if features % groups:
        raise LayerError(f"features divisible by groups={groups}", f"{features}",
                         "choose groups that divide the features")

    def split(x: Any) -> tuple[int, int]:
        if x.shape[-1] % groups:
            raise LayerError(f"channels divisible by groups={groups}",
                             f"{x.shape[-1]} in {show(x)}",
                             "choose groups that divide the channels")
        return features, groups

    return split
