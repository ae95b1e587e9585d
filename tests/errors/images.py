"""What layers with a window refuse: convolution, pooling, resizing, reshaping."""

import jax.numpy as jnp
from support.refusing import X

import diffprog as dp
from errors.given import at, bools, floats, ints, params, zeros

IMAGE, SERIES = floats(2, 8, 8, 3), jnp.ones((2, 4, 3))
SEEING = dp.conv(3, 3, dims=1)
STRIDING = dp.conv(3, 2, dims=1, stride=2, padding="CAUSAL")


def three_steps():
    """A stream of three steps, where two make one of the output."""
    own = params(STRIDING, SERIES)
    state = zeros(lambda: STRIDING.start(own, {}, SERIES[:, :2], length=12))
    STRIDING.apply(own, state, SERIES[:, :3])


EXAMPLES = {
    # Windows, padding.
    "conv(4, 0): wants size as a positive int or a tuple of 2, got 0; pass 2, for example":
        lambda: dp.conv(4, 0),
    "conv(4, (3, 3, 3, 3)): wants a window over 1, 2 or 3 axes, got 4; pass a size of 1, 2 or 3 "
    "numbers":
        lambda: dp.conv(4, (3, 3, 3, 3)),
    "conv(4, 3, stride=(1,)): wants stride as a positive int or a tuple of 2, got (1,); pass 2, "
    "for example":
        lambda: dp.conv(4, 3, stride=(1,)),
    "conv(4, 3, dilation=1.0): wants dilation as a positive int or a tuple of 2, got 1.0; pass 2,"
    " for example":
        lambda: dp.conv(4, 3, dilation=1.0),
    "conv(4, 3, padding='same'): wants padding 'SAME', 'VALID', an int, or 2 pairs of ints, got "
    "'same'; pass padding=1, for example":
        lambda: dp.conv(4, 3, padding="same"),
    "conv(4, 3, padding=((1, -1), (0, 0))): wants padding 'SAME', 'VALID', an int, or 2 pairs of "
    "ints, got ((1, -1), (0, 0)); pass padding=1, for example":
        lambda: dp.conv(4, 3, padding=((1, -1), (0, 0))),
    "max_pool(2, stride=(1, 1, 1)): wants stride as a positive int or a tuple of 2, got (1, 1, "
    "1); pass 2, for example":
        lambda: dp.max_pool(2, stride=(1, 1, 1)),
    "global_avg_pool(dims=4): wants a window over 1, 2 or 3 axes, got 4; pass a size of 1, 2 or 3 "
    "numbers":
        lambda: dp.global_avg_pool(dims=4),
    "conv(2, 3, padding_mode='same'): wants padding_mode out of circular, reflect, replicate, "
    "zeros, got 'same'; choose 'zeros', the default":
        lambda: dp.conv(2, 3, padding_mode="same"),
    "at (conv(2, 3, padding=3, padding_mode='reflect')): wants reflect padding of at most 2 "
    "on an axis of length 3, got (3, 3); pad less, or choose padding_mode='replicate'":
        at(dp.conv(2, 3, padding=3, padding_mode="reflect"), floats(1, 5, 3, 1)),
    "at (depthwise_conv(3, padding=4, padding_mode='circular')): wants circular padding of at "
    "most 3 on an axis of length 3, got (4, 4); pad less, or choose padding_mode='replicate'":
        at(dp.depthwise_conv(3, padding=4, padding_mode="circular"), floats(1, 5, 3, 1)),
    "at (conv(4, 9, padding='VALID')): wants input at least as large as the kernel, got "
    "float32[2,8,8,3]; pad, or take a smaller window":
        at(dp.conv(4, 9, padding="VALID"), IMAGE),
    "at (conv(4, 3, padding='VALID', dilation=4)): wants input at least as large as the kernel, "
    "got float32[2,8,8,3]; pad, or take a smaller window":
        at(dp.conv(4, 3, padding="VALID", dilation=4), IMAGE),
    "at (max_pool(9)): wants input at least as large as the window, got float32[2,8,8,3]; pad, or "
    "take a smaller window":
        at(dp.max_pool(9), IMAGE),
    "conv(3, 3, dims=1): wants the whole input at once, got a streaming call; apply it without "
    "start":
        lambda: SEEING.start(params(SEEING, SERIES), {}, SERIES, length=4),
    # Convolution.
    "at (conv(4, 3)): wants at least 3 axes (..., height, width, channels), got float32[4]; add "
    "the missing axes":
        at(dp.conv(4, 3), floats(4)),
    "at (conv(4, 3, dims=1)): wants at least 2 axes (..., length, channels), got float32[4]; add "
    "the missing axes":
        at(dp.conv(4, 3, dims=1), floats(4)),
    "at (conv(3, 3)): wants floating-point input, got int32[2,8,8,3]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.conv(3, 3), ints(2, 8, 8, 3)),
    "serial(at=conv(3, 3)): wants only side inputs that it takes (segments), got mask; leave it "
    "out, or add a layer that takes it":
        at(dp.conv(3, 3), IMAGE, mask=bools(2)),
    "at (conv(3, 3)): wants no segments, got int32[2,8]; give each sequence a row: an image has no "
    "steps":
        at(dp.conv(3, 3), IMAGE, segments=ints(2, 8)),
    "at (conv(3, 3, dims=1, stride=2)): wants one window for each step, padded by zeros, with "
    "segments, got stride=2, padding='SAME' and padding_mode='zeros'; pass stride=1 and "
    "padding='SAME', or give each sequence a row":
        at(dp.conv(3, 3, dims=1, stride=2), SERIES, segments=ints(2, 4)),
    "at (conv(3, 3, dims=1, padding_mode='circular')): wants padding_mode='zeros' with a mask, got "
    "'circular'; pass it: the border of x is not that of its valid steps":
        at(dp.conv(3, 3, dims=1, padding_mode="circular"), SERIES, mask=bools(2, 4)),
    "at (max_pool(3, dims=1, padding='SAME')): wants padding as a number with a mask and a "
    "stride, got 'SAME'; pass padding=1, for example: the 'SAME' padding before the first step "
    "depends on the length of x":
        at(dp.max_pool(3, dims=1, padding="SAME"), SERIES, mask=bools(2, 4)),
    "at (upsample(size=8, dims=1)): wants a factor with a mask, got size=8; pass upsample(2), for "
    "example: a size stretches x by the length of its padding":
        at(dp.upsample(size=8, dims=1), SERIES, mask=bools(2, 4)),
    "conv(4, 3, groups=3): wants features divisible by groups=3, got 4; choose groups that "
    "divide the features":
        lambda: dp.conv(4, 3, groups=3),
    "at (conv(4, 3, groups=2)): wants channels divisible by groups=2, got 3 in "
    "float32[2,8,8,3]; choose groups that divide the channels":
        at(dp.conv(4, 3, groups=2), IMAGE),
    "conv(3, 1, dims=1): wants params of 3 features, got {bias: float32[1], kernel: "
    "float32[1,4,3]}; pass what init returned":
        lambda: dp.conv(3, 1, dims=1)(params(dp.conv(3, 1, dims=1), X) | {"bias": jnp.ones(1)}, X),
    "depthwise_conv(3, multiplier=0): wants multiplier as an int of at least 1, got 0; pass 1 or "
    "more":
        lambda: dp.depthwise_conv(3, multiplier=0),
    "conv(2, 3, padding='CAUSAL'): wants dims=1 and padding_mode='zeros' for causal padding, got "
    "dims=2 and 'zeros'; pass pairs: only a sequence has a past":
        lambda: dp.conv(2, 3, padding="CAUSAL"),
    "depthwise_conv((3,), padding='CAUSAL', padding_mode='reflect'): wants dims=1 and "
    "padding_mode='zeros' for causal padding, got dims=1 and 'reflect'; pass pairs: only a "
    "sequence has a past":
        lambda: dp.depthwise_conv((3,), padding="CAUSAL", padding_mode="reflect"),
    "conv(3, 2, dims=1, stride=2, padding='CAUSAL'): wants chunks whose length is a multiple of "
    "the stride 2, got float32[2,3,3]; pass chunks of such a length":
        three_steps,
    "conv_transpose(3, 3, groups=2): wants features divisible by groups=2, got 3; choose "
    "groups that divide the features":
        lambda: dp.conv_transpose(3, 3, groups=2),
    "conv_transpose(4, 3, stride=2, padding=1, output_padding=2): wants output_padding below the "
    "stride (2, 2) or the dilation (1, 1), got 2; lower it: more positions would hold the bias "
    "alone":
        lambda: dp.conv_transpose(4, 3, stride=2, padding=1, output_padding=2),
    "conv_transpose(4, 3, stride=2, output_padding=1): wants no output_padding with "
    "padding='SAME', got 1; pass padding as an int or pairs":
        lambda: dp.conv_transpose(4, 3, stride=2, output_padding=1),
    "conv_transpose(4, 3, output_padding=-1): wants output_padding as a non-negative int or a "
    "tuple of 2, got -1; pass 2, for example":
        lambda: dp.conv_transpose(4, 3, output_padding=-1),
    "conv_transpose(4, 3, padding='CAUSAL'): wants padding 'SAME', 'VALID', an int, or 2 pairs of "
    "ints, got 'CAUSAL'; pass padding=1, for example":
        lambda: dp.conv_transpose(4, 3, padding="CAUSAL"),
    "at (conv_transpose(4, 2, padding=2)): wants padding that leaves at least one output position, "
    "got float32[2,1,3,1]; pad less":
        at(dp.conv_transpose(4, 2, padding=2), floats(2, 1, 3, 1)),
    "at (conv_transpose(4, 2, dims=1)): wants at least one position along each spatial axis, "
    "got float32[2,0,3]; leave such an input out":
        at(dp.conv_transpose(4, 2, dims=1), floats(2, 0, 3)),
    # Pooling.
    "at (global_max_pool(dims=1)): wants at least one position to pool, got float32[2,0,3]; leave "
    "such an input out: an empty window has no mean and no maximum":
        at(dp.global_max_pool(dims=1), floats(2, 0, 3)),
    "at (max_pool(2)): wants at least 3 axes (..., height, width, channels), got float32[2,4]; "
    "add the missing axes":
        at(dp.max_pool(2), X),
    "at (avg_pool((2, 2, 2))): wants at least 4 axes (..., depth, height, width, channels), got "
    "float32[8,8,3]; add the missing axes":
        at(dp.avg_pool((2, 2, 2)), floats(8, 8, 3)),
    "at (avg_pool(2)): wants floating-point input, got int32[2,8,8,3]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.avg_pool(2), ints(2, 8, 8, 3)),
    "at (global_max_pool()): wants at least 3 axes (..., height, width, channels), got "
    "float32[2,4]; add the missing axes":
        at(dp.global_max_pool(), X),
    "at (global_avg_pool()): wants at least 3 axes (..., height, width, channels), got "
    "float32[2,4]; add the missing axes":
        at(dp.global_avg_pool(), X),
    "at (global_avg_pool()): wants floating-point input, got int32[2,8,8,3]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.global_avg_pool(), ints(2, 8, 8, 3)),
    "max_pool(2, stride=1, padding=2): wants padding below the size (2, 2), got ((2, 2), (2, 2)); "
    "pad less: a window of padding alone has no mean and no maximum":
        lambda: dp.max_pool(2, stride=1, padding=2),
    "avg_pool((3, 2), padding=((0, 0), (0, 2))): wants padding below the size (3, 2), got ((0, "
    "0), (0, 2)); pad less: a window of padding alone has no mean and no maximum":
        lambda: dp.avg_pool((3, 2), padding=((0, 0), (0, 2))),
    "max_pool(2, padding=3, dilation=2): wants padding below the size (3, 3), got ((3, 3), (3, "
    "3)); pad less: a window of padding alone has no mean and no maximum":
        lambda: dp.max_pool(2, padding=3, dilation=2),
    "at (max_pool(2, padding=1, dilation=3)): wants padded axes at least as long as the dilation "
    "(3, 3), got (3, 2); dilate less: a window of padding alone has no maximum":
        at(dp.max_pool(2, padding=1, dilation=3), floats(1, 3, 2, 1)),
    "adaptive_avg_pool(0): wants size as a positive int or a tuple of 2, got 0; pass 2, for "
    "example":
        lambda: dp.adaptive_avg_pool(0),
    "adaptive_max_pool(0): wants size as a positive int or a tuple of 2, got 0; pass 2, for "
    "example":
        lambda: dp.adaptive_max_pool(0),
    "at (adaptive_avg_pool(2)): wants at least 3 axes (..., height, width, channels), got "
    "float32[2,4]; add the missing axes":
        at(dp.adaptive_avg_pool(2), X),
    "at (adaptive_max_pool(2)): wants at least 3 axes (..., height, width, channels), got "
    "float32[2,4]; add the missing axes":
        at(dp.adaptive_max_pool(2), X),
    "at (adaptive_avg_pool(2, dims=1)): wants floating-point input, got int32[3,1]; convert it: "
    "x.astype(jnp.float32)":
        at(dp.adaptive_avg_pool(2, dims=1), ints(3, 1)),
    # Resizing, reshaping.
    "upsample(): wants exactly one of factor and size, got factor=None and size=None; write "
    "upsample(2), for example":
        lambda: dp.upsample(),
    "upsample(factor=2, size=3): wants exactly one of factor and size, got factor=2 and "
    "size=3; write upsample(2), for example":
        lambda: dp.upsample(2, size=3),
    "upsample(factor=2, method='bilinear'): wants method out of cubic, linear, nearest, got "
    "'bilinear'; choose 'nearest' for exact copies":
        lambda: dp.upsample(2, method="bilinear"),
    "upsample(factor=0): wants factor as a positive int or a tuple of 2, got 0; pass 2, for "
    "example":
        lambda: dp.upsample(0),
    "at (upsample(size=5)): wants spatial axes from 1 to (5, 5), got float32[2,4,6,3]; pool to "
    "make x smaller":
        at(dp.upsample(size=5), floats(2, 4, 6, 3)),
    "at (upsample(factor=2, method='linear')): wants floating-point input, got int32[2,4,6,3]; "
    "convert it: x.astype(jnp.float32)":
        at(dp.upsample(2, method="linear"), ints(2, 4, 6, 3)),
    "pixel_shuffle(0): wants factor as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.pixel_shuffle(0),
    "at (pixel_shuffle(2)): wants channels that are a multiple of 4, got float32[2,4,6,3]; give "
    "the layer before it 4 times the channels of y":
        at(dp.pixel_shuffle(2), floats(2, 4, 6, 3)),
    "at (patches(4)): wants spatial axes that are multiples of (4, 4), got float32[2,4,6,3]; crop "
    "or pad x, or choose a size that divides them":
        at(dp.patches(4), floats(2, 4, 6, 3)),
    "at (upsample(factor=2)): wants at least 3 axes (..., height, width, channels), got "
    "float32[2,4]; add the missing axes":
        at(dp.upsample(2), X),
    "at (pixel_shuffle(1)): wants at least 3 axes (..., height, width, channels), got "
    "float32[2,4]; add the missing axes":
        at(dp.pixel_shuffle(1), X),
    "at (patches(2)): wants at least 3 axes (..., height, width, channels), got float32[2,4]; add "
    "the missing axes":
        at(dp.patches(2), X),
    "at (flatten(keep=3)): wants at least 3 axes, got float32[2,4]; add the missing axes":
        at(dp.flatten(keep=3), X),
    "reshape((-1, -1)): wants a shape of positive ints, at most one of them -1, got (-1, -1); "
    "pass (4, -1), for example":
        lambda: dp.reshape((-1, -1)),
    "reshape([3, 4]): wants a shape of positive ints, at most one of them -1, got [3, 4]; pass "
    "(4, -1), for example":
        lambda: dp.reshape([3, 4]),
    "at (reshape((5, 2))): wants 10 entries after keep=1 axes, for (5, 2), got 12 in "
    "float32[2,3,4]; choose a shape with as many entries":
        at(dp.reshape((5, 2)), floats(2, 3, 4)),
    "at (reshape((5, -1))): wants a multiple of 5 entries after keep=1 axes, for (5, -1), got 12 "
    "in float32[2,3,4]; choose a shape with as many entries":
        at(dp.reshape((5, -1)), floats(2, 3, 4)),
    "at (reshape(24)): wants 24 entries after keep=1 axes, for (24,), got 12 in float32[2,3,4]; "
    "choose a shape with as many entries":
        at(dp.reshape(24), floats(2, 3, 4)),
    "at (reshape(-1, keep=3)): wants at least 3 axes, got float32[2,4]; add the missing axes":
        at(dp.reshape(-1, keep=3), X),
}
