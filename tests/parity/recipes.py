"""The tables: from names of cases to our counterparts."""

import jax
import jax.numpy as jnp
import numpy as np
from reference import Leaf, Recipe

import diffprog as dp

# How PyTorch arranges things, and we.


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def conv_kernel(weight):
    """(out, in / groups, places) to (places, in / groups, out)."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def conv_transpose_kernel(groups):
    """(in, out / groups, places) to (places, in / groups, out)."""

    def arrange(weight):
        inside, features, *places = weight.shape
        parts = weight.reshape(groups, inside // groups, features, *places).swapaxes(0, 1)
        joined = parts.reshape(inside // groups, groups * features, *places)
        return np.moveaxis(joined, (0, 1), (-2, -1))

    return arrange


def after_flatten(channels):
    """The kernel (in, out) after `flatten`: rows in the order of NCHW to rows in that of NHWC."""

    def arrange(weight):
        side = round((weight.shape[1] // channels) ** 0.5)
        rows = weight.T.reshape(channels, side, side, -1)
        return np.moveaxis(rows, 0, 2).reshape(weight.T.shape)

    return arrange


IMAGE = {"x": channels_last, "y": channels_last}
BIAS = Leaf("params", "bias")


def kernel(arrange):
    return lambda options: {"weight": Leaf("params", "kernel", arrange), "bias": BIAS}


def scale(options):
    return {"weight": Leaf("params", "scale", np.ravel), "bias": Leaf("params", "bias", np.ravel)}


def statistics(options):
    return scale(options) | {"running_mean": Leaf("state", "mean"),
                             "running_var": Leaf("state", "var")}


# How PyTorch names options, and we; what is not here has one name, or says the size of x.

NAMES = {"out_channels": "features", "kernel_size": "size", "output_size": "size",
         "stride": "stride", "padding": "padding", "output_padding": "output_padding",
         "padding_mode": "padding_mode", "dilation": "dilation", "groups": "groups",
         "bias": "bias", "dims": "dims"}


def window(maker, **more):
    """A layer that slides over places; PyTorch pads none unless told so."""

    def make(options):
        ours = {NAMES[name]: value for name, value in options.items() if name in NAMES}
        padding = ours.get("padding", 0)
        if isinstance(padding, tuple):
            padding = tuple((side, side) for side in padding)
        ours["padding"] = "SAME" if padding == "same" else padding
        return maker(**ours, **more)

    return make


def max_pool(options):
    return window(dp.max_pool)(options)


def avg_pool(options):
    return window(dp.avg_pool, count_padding=options.get("count_include_pad", True))(options)


def depthwise(options):
    """`depthwise_conv` takes the number of channels from x."""

    def maker(*, features, groups, **ours):
        return dp.depthwise_conv(multiplier=features // groups, **ours)

    return window(maker)(options)


def upsample(options):
    factor = options.get("scale_factor")
    method = {"nearest": "nearest", "bilinear": "linear"}[options["mode"]]
    return dp.upsample(factor and int(factor), size=options.get("size"), method=method)


def batch_norm(options):
    return dp.batch_norm(eps=options.get("eps", 1e-5), momentum=1 - options.get("momentum", 0.1))


def layer_norm(options):
    """Over the last axes, made one; without parameters if they are not asked for."""
    shape, affine = options[0], options["elementwise_affine"]
    norm = dp.layer_norm(eps=options["eps"], scale=affine, bias=affine)

    @dp.program(norm=norm)
    def over_all(layers, x):
        return layers.norm(x.reshape(*x.shape[: -len(shape)], -1)).reshape(x.shape)

    return over_all


def inside(name, leaves):
    """The same leaves, in a child."""

    def deeper(options):
        return {original: leaf._replace(path=f"{name}/{leaf.path}")
                for original, leaf in leaves(options).items()}

    return deeper


def table(options):
    return {"weight": Leaf("params", "embedding")}


def embedding(options):
    return dp.embedding(options[0], options[1])


def padded_embedding(options):
    """In PyTorch the row of the padding begins with zeros and gets no gradient: it is hidden."""

    @dp.program(embed=embedding(options), hide=dp.hide())
    def embedded(layers, x):
        return layers.hide(layers.embed(x), mask=x != options["padding_idx"])

    return embedded


ALEXNET = {  # original name of a layer -> ours, and how its kernel is arranged
    **{f"features.{place}": (f"conv_{number}", conv_kernel)
       for number, place in enumerate((0, 3, 6, 8, 10))},
    "classifier.1": ("linear_0", after_flatten(7)),
    "classifier.4": ("linear_1", np.transpose), "classifier.6": ("linear_2", np.transpose),
}


def alexnet(options):
    """The layout of torchvision, which differs from the paper's, with a few channels."""
    relu = jax.nn.relu
    return dp.serial(
        dp.conv(6, 11, stride=4, padding=2), relu, dp.max_pool(3, stride=2),
        dp.conv(8, 5), relu, dp.max_pool(3, stride=2),
        dp.conv(10, 3), relu, dp.conv(9, 3), relu, dp.conv(7, 3), relu, dp.max_pool(3, stride=2),
        dp.adaptive_avg_pool(6), dp.flatten(),
        dp.dropout(0.5), dp.linear(20), relu, dp.dropout(0.5), dp.linear(20), relu, dp.linear(7),
    )


def alexnet_leaves(options):
    return {f"{name}.{original}": leaf for name, (ours, arrange) in ALEXNET.items()
            for original, leaf in inside(ours, kernel(arrange))(options).items()}


LAYERS = {
    "Conv?d_*": Recipe(window(dp.conv), kernel(conv_kernel), IMAGE),
    "ConvTranspose?d_*": Recipe(
        window(dp.conv_transpose),
        lambda options: kernel(conv_transpose_kernel(options.get("groups", 1)))(options), IMAGE),
    "MaxPool*": Recipe(max_pool, axes=IMAGE),
    "AvgPool*": Recipe(avg_pool, axes=IMAGE),
    "AdaptiveAvgPool2d_*": Recipe(lambda o: dp.adaptive_avg_pool(o["output_size"]), axes=IMAGE),
    "Upsample_*": Recipe(upsample, axes=IMAGE),
    "PixelShuffle": Recipe(lambda o: dp.pixel_shuffle(o["upscale_factor"]), axes=IMAGE),
    "BatchNorm*_train*": Recipe(batch_norm, statistics, IMAGE),
    "BatchNorm*_eval*": Recipe(batch_norm, statistics, IMAGE),
    "BatchNorm2d_no_stats": Recipe(batch_norm, scale, IMAGE, train=True),
    "GroupNorm_*": Recipe(
        lambda o: dp.group_norm(o[0], dims=o["dims"], eps=o["eps"]), scale, IMAGE),
    "InstanceNorm2d": Recipe(lambda o: dp.instance_norm(eps=o["eps"]), scale, IMAGE),
    "LayerNorm_*": Recipe(layer_norm, inside("norm", scale)),
    "RMSNorm_*": Recipe(lambda o: dp.rms_norm(eps=o["eps"]), scale),
    "PReLU_*": Recipe(lambda o: dp.prelu(shared=o["num_parameters"] == 1), scale, IMAGE),
    "Linear*": Recipe(lambda o: dp.linear(o["out_features"], bias=o["bias"]), kernel(np.transpose)),
    "Bilinear": Recipe(lambda o: dp.bilinear(o["out_features"], bias=o["bias"]),
                       kernel(lambda weight: np.moveaxis(weight, 0, -1))),
    "Embedding": Recipe(embedding, table),
    "Embedding_padding_idx": Recipe(padded_embedding, inside("embed", table)),
    "AlexNet_tiny": Recipe(alexnet, alexnet_leaves, {"x": channels_last}),
}


# Activations: functions of x. PyTorch's slopes at the corners are those of these formulas.

ACTIVATIONS = {
    "ReLU": lambda o: jax.nn.relu,
    "ReLU6": lambda o: jax.nn.relu6,
    "GELU_exact": lambda o: dp.gelu,
    "GELU_tanh": lambda o: jax.nn.gelu,
    "SiLU": lambda o: jax.nn.silu,
    "ELU": lambda o: lambda x: jax.nn.elu(x, o["alpha"]),
    "SELU": lambda o: jax.nn.selu,
    "CELU": lambda o: lambda x: jax.nn.celu(x, o["alpha"]),
    "LeakyReLU": lambda o: lambda x: jax.nn.leaky_relu(x, o["negative_slope"]),
    "Softplus": lambda o: jax.nn.softplus,
    "Mish": lambda o: jax.nn.mish,
    "Hardswish": lambda o: jax.nn.hard_swish,
    "Hardsigmoid": lambda o: jax.nn.hard_sigmoid,
    "Hardtanh": lambda o: jax.nn.hard_tanh,
    "Sigmoid": lambda o: jax.nn.sigmoid,
    "Tanh": lambda o: jnp.tanh,
    "LogSigmoid": lambda o: jax.nn.log_sigmoid,
    "Softsign": lambda o: jax.nn.soft_sign,
    "Tanhshrink": lambda o: lambda x: x - jnp.tanh(x),
    "Softshrink": lambda o: lambda x: jnp.sign(x) * jax.nn.relu(jnp.abs(x) - o[0]),
    "Hardshrink": lambda o: lambda x: jnp.where(jnp.abs(x) > o[0], x, 0),
    "Threshold": lambda o: lambda x: jnp.where(x > o["threshold"], x, o["value"]),
    "quick_gelu": lambda o: lambda x: x * jax.nn.sigmoid(1.702 * x),
}
FUNCTIONS = {f"act_{name}": Recipe(make) for name, make in ACTIVATIONS.items()} | {
    "GLU": Recipe(lambda o: lambda x: jax.nn.glu(x, o["dim"])),
    "Softmax": Recipe(lambda o: lambda x: jax.nn.softmax(x, o["dim"])),
    "LogSoftmax": Recipe(lambda o: lambda x: jax.nn.log_softmax(x, o["dim"])),
}


# Losses


def cross_entropy(options):
    def loss(x, y, w=None):
        soft = jnp.issubdtype(y.dtype, jnp.floating)
        return dp.losses.cross_entropy(
            x, y, class_weights=w, label_smoothing=options.get("label_smoothing", 0.0),
            ignore_index=None if soft else options.get("ignore_index", -100),
            reduction=options.get("reduction", "mean"))

    return loss


def ctc(x, y, il, tl):
    """`il` and `tl` count the real frames and labels of each example; PyTorch's time is first."""
    return dp.losses.ctc(x, y, mask=jnp.arange(x.shape[1]) < il[:, None],
                  label_mask=jnp.arange(y.shape[1]) < tl[:, None], reduction="none")


LOSSES = {
    "cross_entropy_*": Recipe(cross_entropy, axes={"x": channels_last}),
    "bce_with_logits": Recipe(lambda o: dp.losses.binary_cross_entropy),
    "mse": Recipe(lambda o: dp.losses.squared_error),
    "l1": Recipe(lambda o: dp.losses.absolute_error),
    "smooth_l1": Recipe(lambda o: dp.losses.huber),
    # PyTorch's huber divided by its delta, which is 1
    "huber": Recipe(lambda o: dp.losses.huber),
    "kl_div": Recipe(lambda o: dp.losses.kl_divergence),  # "batchmean": the mean over rows
    "ctc": Recipe(lambda o: ctc, axes={"x": lambda x: x.swapaxes(0, 1)}),
}

RECIPES = LAYERS | FUNCTIONS | LOSSES


# Cases to which there is a second way.


def gated(options):
    """`glu` where gate and value are read from the halves of x, which are (value, gate)."""

    def split(x):
        value, gate = np.split(np.eye(x.shape[-1], dtype=x.dtype), 2, axis=1)
        none = np.zeros(len(value) // 2, x.dtype)
        return dp.glu(len(none))({"up": {"kernel": value, "bias": none},
                                  "gate": {"kernel": gate, "bias": none}}, x)

    return split


AGAIN = {
    "Conv1d_2": Recipe(depthwise, kernel(conv_kernel), IMAGE),
    "Conv2d_[23]": Recipe(depthwise, kernel(conv_kernel), IMAGE),
    "AdaptiveAvgPool2d_1": Recipe(
        lambda o: dp.global_avg_pool() >> dp.reshape((1, 1, -1)), axes=IMAGE),
    "InstanceNorm2d": Recipe(lambda o: dp.group_norm(o[0], eps=o["eps"]), scale, IMAGE),
    "GLU": Recipe(gated),
}

ELSEWHERE = ["optim/*",  # test_optimizers.py
             "LSTM*", "GRU*", "RNN*",  # test_recurrences.py
             "MHA_*", "sdpa*", "Transformer*"]  # test_attentions.py
