"""The one list of layers on which every law runs: a new layer is registered by one line here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import diffprog as dp


class Case(NamedTuple):
    """A layer and the input on which it is tried; `options` go to `dp.check`.

    `slow` marks compositions of layers that have fast cases of their own: `make verify` tries them.
    `exempt` says of a row of `test_transformations` why the case cannot go through it.
    """

    name: str
    layer: Any
    x: Any
    options: dict[str, Any] | None = None
    slow: bool = False
    untried: tuple[dict[str, str], ...] = ()
    exempt: Mapping[str, str] = MappingProxyType({})

    @property
    def reasons(self) -> dict[str, str]:
        """law -> why it cannot be tried."""
        unclaimed = {} if "symmetry" in (self.options or {}) else {
            "steps are symmetric": "symmetry=None"}
        return unclaimed | {law: why for group in self.untried for law, why in group.items()}

    @property
    def side(self) -> dict[str, Any]:
        """The options that are side inputs of the layer."""
        return {name: value for name, value in (self.options or {}).items() if hasattr(
            value, "shape")}


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dp.program(norm=dp.layer_norm(), up=dp.linear(6), down=dp.linear(4), drop=dp.dropout(0.5))
def block(layers, x, *, scale=None):
    y = layers.drop(layers.down(jax.nn.silu(layers.up(layers.norm(x)))))
    return x + layers.drop(y if scale is None else y * scale[:, None, None])


def mean_of_all(y):
    return y.mean(0)


def both(pair):
    """A result and the activations tapped beside it, as one array."""
    y, seen = pair
    return y + sum(activation.sum(-1, keepdims=True).astype(y.dtype)
                   for activation in map(last_copy, seen.values()))


def first(pair):
    return pair[0]


def again(layers, x):
    return layers.f(layers.f(x)) + x


def last_copy(activation):
    return activation[-1] if activation.ndim > 3 else activation


def opened(net):
    """The net with other kernels for those that begin at zero, behind which nothing has effect."""
    def other(layer):
        if layer.settings.get("kernel_init") != "zeros":
            return layer
        return getattr(dp, layer.name)(**layer.settings | {"kernel_init": "lecun_normal"})

    return dp.replace(net, "**/*", other)


EQUIVARIANT, INVARIANT = {"symmetry": "equivariant"}, {"symmetry": "invariant"}
CAUSAL = dp.conv(3, 2, dims=1, padding="CAUSAL") >> jnp.tanh
SETTLING = dp.parallel(dp.linear(4, kernel_init=jax.nn.initializers.normal(0.2)) >> dp.dropout(0.3),
                       dp.linear(4)) >> dp.add >> jnp.tanh
RECALLING = dp.parallel(dp.self_attention(1, causal=True, kernel_init=jax.nn.initializers.normal(
    0.3)), jnp.sin) >> dp.add
SCALE = {"scale": jnp.array([1.0, 2.0, 3.0])}
# Which of five steps are real.
FIVE = {"mask": jnp.array([[True, True, False, True, False], [False, True, True, False, False]])}
# Which of five steps belong together; what is padding has any number.
PACKED = {"segments": jnp.array([[0, 0, 1, 0, 0], [4, 2, 3, 3, 3]])}
CONDITION = {"condition": jnp.sin(jnp.arange(12.0).reshape(3, 4))}
RAGGED = FIVE | {"positions": jnp.array([[0, 1, 0, 2, 0], [0, 0, 1, 0, 0]])}
IDS = jnp.array([[0, 2, 4, 1, 3], [3, 3, 0, 1, 4]])


TYPES = {"token_types": jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])}
# What a sequence of five asks: ids, what an encoder made of them, and which of them are real.
SOURCE = {"source": jnp.array([[4, 0, 1], [2, 3, 3]]),
          "source_mask": jnp.array([[True, True, False], [False, True, True]])}
MEMORY = {"memory": jnp.sin(jnp.arange(48.0).reshape(2, 3, 8)),
          "memory_mask": SOURCE["source_mask"]}
EXPLICIT = {"attention_mask": jnp.arange(50).reshape(2, 1, 5, 5) % 4 > 0,
            "attention_bias": jnp.cos(jnp.arange(100.0)).reshape(2, 2, 5, 5)}
NOISY = {"time": jnp.array([3, 70]), "condition": jnp.array([2, 0])}
STACK = {"depth": 2, "heads": 2, "hidden": 12}
NET = STACK | {"width": 8}


@dp.program(embed=dp.embedding(5, 4), positions=dp.learned_positions(6), body=dp.linear(4))
def tied(layers, x):
    y = jnp.tanh(layers.body(layers.positions(layers.embed(x))))
    return dp.unembed(layers.embed.params, y)


# Through which the keys of noise and the segments of texts must come.
WRAPPERS = {
    "serial": lambda f: dp.serial(f, f), "residual": dp.residual,
    "branch": lambda f: dp.branch(f, f, merge=dp.add),
    "program": lambda f: dp.program(f=f)(again), "repeat": lambda f: dp.repeat(2, f),
    "heads": lambda f: dp.heads(2, f), "ensemble": lambda f: dp.ensemble(2, f) >> mean_of_all,
    "remat": dp.remat, "replace": lambda f: dp.replace(f >> jnp.asarray, "asarray~0", dp.remat),
    "tap": lambda f: dp.tap(dp.serial(f=f), "f") >> first, "freeze": dp.freeze,
    "lora": lambda f: dp.lora(f, 1), "weight_norm": dp.weight_norm, "ema": dp.ema,
    "pin": lambda f: dp.pin(f, train=True),
}
NOISE = dp.linear(2) >> dp.dropout(0.5)
TEXTS = dp.serial(dp.self_attention(1, causal=True, bias=False))

# Why laws cannot be tried: law -> reason.
DRY = dict.fromkeys(
    ["keys matter in training", "no two draws share a key", "noise keeps the mean"],
    "the layer is not random")
ALONE = {"side inputs have an effect": "no side input is given"}
UNMASKED = dict.fromkeys(
    ["padding changes nothing", "more padding changes nothing"],
    "no mask is given")
UNPACKED = {"segments do not mix": "it takes no segments"}
UNPACKABLE = {"segments do not mix": "it refuses segments"}
TIMELESS = dict.fromkeys(
    ["nothing depends on the future", "streaming equals all at once"],
    "causal=False")
BARE = dict.fromkeys(
    ["sums are accurate in 16 bits", "init does not depend on siblings"],
    "it has no parameters")
ROUNDED = {"sums are accurate in 16 bits": "its forward pass is rounded in bfloat16"}
BENT = {"noise keeps the mean": "it is not affine in x"}
COUNTING = dict.fromkeys(["dtypes are kept", "sums are accurate in 16 bits"], "x has no floats")
UNDRAWN = {"init does not depend on siblings": "it has no parameters"}
NOISY_IDS = {"noise keeps the mean": "x has no floats"}
UNSEEN = {"padding changes nothing": "valid entries do not depend on others"}
AHEAD = {"more padding changes nothing": "valid entries do not depend on later ones"}
FIXED = {"more padding changes nothing": "it takes no more steps"}
ROUGH = dict.fromkeys(
    ["gradients are finite", "gradients agree"],
    "smooth=False")
CONSTANT = dict.fromkeys(
    ["gradients are finite", "gradients agree"],
    "nothing can be differentiated")
NARROW = {"gradients agree": "it computes in float32"}
SHARED = {"examples do not mix": "batched=False"}
SHARED_SUMS = {"sums are accurate in 16 bits": "batched=False"}
FLAT = {"sums are accurate in 16 bits": "all its gradients are zero"}
MERGED = {"segments do not mix": "its output has no time axis"}
APART = {"segments do not mix": "steps do not depend on each other"}
SOLVED = {"no two draws share a key": "the iterations of a solver share their noise"}
OFFLINE = {"streaming equals all at once": "an encoder takes the whole source at once"}
# What is given x alone, and nothing is known of.
PLAIN = (ALONE, UNMASKED, UNPACKED, TIMELESS)

CASES = [
    # linear
    Case("linear", dp.linear(3), floats(2, 4),
         untried=(DRY, *PLAIN)),
    Case("linear without bias", dp.linear(3, bias=False), floats(2, 3, 4), EQUIVARIANT,
         slow=True, untried=(DRY, *PLAIN)),
    Case("bilinear", dp.bilinear(3), (floats(2, 4), floats(2, 2)),
         untried=(DRY, *PLAIN)),
    Case("bilinear without bias", dp.bilinear(1, bias=False), (floats(2, 3, 2), floats(2, 3, 4)),
         slow=True, untried=(DRY, *PLAIN)),
    # convolution
    Case("conv 1-d", dp.conv(3, 3, dims=1), floats(2, 6, 2),
         untried=(DRY, ALONE, UNMASKED, TIMELESS)),
    Case("conv 2-d", dp.conv(2, (2, 3), stride=2, padding="VALID"), floats(2, 5, 5, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("conv in groups", dp.conv(4, 3, groups=2, dilation=2, padding=1), floats(2, 5, 4, 4),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("conv 3-d", dp.conv(2, (2, 1, 2), stride=2), floats(2, 3, 2, 3, 2),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("conv on a ring", dp.conv(2, 3, padding_mode="circular"), floats(2, 3, 4, 2),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("conv, reflected", dp.conv(2, 3, dims=1, stride=2, padding_mode="reflect"),
         floats(2, 5, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("conv with segments", dp.conv(2, 3, dims=1), floats(2, 5, 2), FIVE | PACKED,
         slow=True, untried=(DRY, TIMELESS, AHEAD)),
    Case("conv, causal", dp.conv(3, 2, dims=1, padding="CAUSAL", dilation=2), floats(2, 5, 2),
         FIVE | {"causal": True},
         untried=(DRY, AHEAD)),
    Case("conv, causal, with segments", dp.conv(2, 3, dims=1, padding="CAUSAL"), floats(2, 5, 2),
         FIVE | PACKED | {"causal": True},
         slow=True, untried=(DRY, UNSEEN, AHEAD)),
    Case("depthwise_conv", dp.depthwise_conv((2, 3), multiplier=2), floats(2, 3, 4, 3),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("depthwise_conv, causal", dp.depthwise_conv(3, dims=1, padding="CAUSAL", bias=False),
         floats(2, 5, 2), FIVE | {"causal": True},
         untried=(DRY, AHEAD)),
    Case("conv_transpose", dp.conv_transpose(3, 3, stride=2), floats(2, 3, 2, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("conv_transpose in groups",
         dp.conv_transpose(4, (3, 2), stride=(2, 3), padding=1, output_padding=1, groups=2),
         floats(2, 3, 2, 4),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("conv_transpose 1-d", dp.conv_transpose(2, 2, dims=1, padding="VALID", dilation=2),
         floats(2, 5, 2), FIVE,
         untried=(DRY, UNPACKABLE, TIMELESS)),
    # pools
    Case("max_pool", dp.max_pool(2), floats(2, 4, 5, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("max_pool 1-d", dp.max_pool(3, dims=1, stride=1, padding="SAME"), floats(2, 5, 2),
         untried=(DRY, ALONE, UNMASKED, TIMELESS, BARE)),
    Case("max_pool, dilated", dp.max_pool(2, stride=1, padding=1, dilation=(2, 1)),
         floats(2, 4, 3, 2),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("max_pool, masked", dp.max_pool(2, dims=1, stride=1), floats(2, 5, 2), FIVE,
         untried=(DRY, UNPACKABLE, TIMELESS, BARE, AHEAD)),
    Case("avg_pool", dp.avg_pool(2, padding=1), floats(2, 4, 5, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("avg_pool, all counted", dp.avg_pool(2, padding=1, count_padding=True),
         floats(2, 3, 4, 2),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("avg_pool, masked", dp.avg_pool(3, dims=1, stride=1, padding="SAME"), floats(2, 5, 2),
         FIVE | PACKED,
         slow=True, untried=(DRY, TIMELESS, BARE, AHEAD)),
    Case("global_avg_pool", dp.global_avg_pool(), floats(2, 3, 4, 2), INVARIANT,
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("global_avg_pool, masked", dp.global_avg_pool(dims=1), floats(2, 5, 2), FIVE | INVARIANT,
         untried=(DRY, UNPACKABLE, TIMELESS, BARE)),
    Case("global_max_pool", dp.global_max_pool(dims=1), floats(2, 5, 2), FIVE | INVARIANT,
         untried=(DRY, UNPACKABLE, TIMELESS, BARE, AHEAD)),
    Case("adaptive_avg_pool", dp.adaptive_avg_pool((2, 5)), floats(2, 5, 3, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("adaptive_avg_pool, masked", dp.adaptive_avg_pool(3, dims=1), floats(2, 5, 2), FIVE,
         slow=True, untried=(DRY, UNPACKABLE, TIMELESS, BARE)),
    Case("adaptive_max_pool", dp.adaptive_max_pool(3), floats(2, 5, 2, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("adaptive_max_pool, masked", dp.adaptive_max_pool(2, dims=1), floats(2, 5, 2), FIVE,
         slow=True, untried=(DRY, UNPACKABLE, TIMELESS, BARE)),
    # resizing
    Case("upsample", dp.upsample((2, 3)), floats(2, 3, 2, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("upsample to a size", dp.upsample(size=(4, 5)), floats(2, 3, 3, 1),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("upsample, linear", dp.upsample(2, dims=1, method="linear"), floats(2, 5, 2), FIVE,
         slow=True, untried=(DRY, UNPACKABLE, TIMELESS, BARE, AHEAD)),
    Case("upsample, cubic", dp.upsample(size=(4, 3), method="cubic"), floats(2, 3, 2, 1),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("pixel_shuffle", dp.pixel_shuffle(2), floats(2, 2, 3, 8),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("patches", dp.patches((2, 1)), floats(2, 4, 3, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("patches of a sequence", dp.patches(5, dims=1), floats(2, 5, 2), FIVE,
         untried=(DRY, UNPACKABLE, TIMELESS, BARE, FIXED)),
    # normalization
    Case("batch_norm", dp.batch_norm(), floats(4, 3),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("batch_norm on images", dp.batch_norm(momentum=0.5, bias=False), floats(2, 3, 3, 2),
         EQUIVARIANT,
         slow=True, untried=(DRY, *PLAIN, ROUNDED)),
    Case("layer_norm", dp.layer_norm(), floats(2, 3, 5), EQUIVARIANT,
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("layer_norm alone", dp.layer_norm(scale=False, bias=False), floats(2, 5),
         slow=True, untried=(DRY, *PLAIN, BARE)),
    Case("batch_norm, masked", dp.batch_norm(), floats(2, 5, 3), FIVE | EQUIVARIANT,
         slow=True, untried=(DRY, UNPACKED, TIMELESS, ROUNDED)),
    Case("rms_norm", dp.rms_norm(), floats(2, 3, 5), {"causal": True} | EQUIVARIANT,
         untried=(DRY, ALONE, UNMASKED, UNPACKED, ROUNDED)),
    Case("group_norm", dp.group_norm(2), floats(2, 3, 2, 4),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, ROUNDED)),
    Case("group_norm of vectors", dp.group_norm(3, dims=0, bias=False), floats(2, 2, 6),
         {"causal": True},
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKED, ROUNDED)),
    Case("group_norm, masked", dp.group_norm(2, dims=1), floats(2, 5, 4), FIVE | EQUIVARIANT,
         slow=True, untried=(DRY, UNPACKABLE, TIMELESS, ROUNDED)),
    Case("instance_norm", dp.instance_norm(), floats(2, 3, 2, 3),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, ROUNDED)),
    Case("instance_norm, masked", dp.instance_norm(dims=1, scale=False), floats(2, 5, 2),
         FIVE | EQUIVARIANT,
         slow=True, untried=(DRY, UNPACKABLE, TIMELESS, ROUNDED)),
    # embedding and positions
    Case("embedding", dp.embedding(5, 3), IDS, {"causal": True} | EQUIVARIANT,
         untried=(DRY, ALONE, UNMASKED, UNPACKED, COUNTING)),
    Case("embedding, tied", tied, IDS, RAGGED | {"causal": True},
         slow=True, untried=(DRY, COUNTING, UNSEEN, AHEAD, APART)),
    Case("sinusoidal_positions", dp.sinusoidal_positions(), floats(2, 5, 4), {"causal": True},
         untried=(DRY, ALONE, UNMASKED, BARE, APART)),
    Case("sinusoidal_positions, ragged", dp.sinusoidal_positions(base=100.0, first=1),
         floats(2, 5, 2), RAGGED | {"causal": True},
         untried=(DRY, BARE, UNSEEN, AHEAD, APART)),
    Case("learned_positions", dp.learned_positions(7), floats(2, 5, 3), {"causal": True},
         slow=True, untried=(DRY, ALONE, UNMASKED, APART)),
    Case("learned_positions, ragged", dp.learned_positions(5), floats(2, 5, 2),
         RAGGED | {"causal": True},
         slow=True, untried=(DRY, UNSEEN, AHEAD, APART)),
    Case("learned_positions with segments", dp.learned_positions(5), floats(2, 5, 2),
         FIVE | PACKED | {"causal": True},
         slow=True, untried=(DRY, UNSEEN, AHEAD, APART)),
    # recurrence
    Case("cells", dp.branch(dp.simple_rnn(2), dp.lstm(2), dp.gru(2), merge=dp.concatenate),
         floats(2, 1, 3),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("recurrent", dp.recurrent(dp.lstm(2)), floats(2, 3, 2), {
        "mask": FIVE["mask"][:, 1:4], "causal": True},
         untried=(DRY, ROUNDED, AHEAD)),
    Case("recurrent with segments", dp.recurrent(dp.gru(2)), floats(2, 5, 2),
         FIVE | PACKED | {"causal": True},
         slow=True, untried=(DRY, ROUNDED, UNSEEN, AHEAD)),
    Case("recurrent backwards", dp.recurrent(dp.simple_rnn(2), reverse=True), floats(2, 5, 3),
         FIVE,
         slow=True, untried=(DRY, TIMELESS, ROUNDED)),
    Case("recurrent both ways", dp.recurrent(dp.gru(2), bidirectional=True), floats(2, 5, 2),
         FIVE, slow=True,
         untried=(DRY, TIMELESS, ROUNDED)),
    Case("recurrent chain", dp.recurrent(dp.serial(
        dp.linear(3), dp.dropout(0.5), dp.simple_rnn(2, bias=False)), unroll=2),
        floats(2, 3, 2), {"causal": True}, slow=True,
         untried=(ALONE, UNMASKED, ROUNDED, BENT)),
    Case("recurrent copies", dp.repeat(2, dp.recurrent(dp.heads(2, dp.simple_rnn(1)))),
         floats(2, 2, 2), {"mask": FIVE["mask"][:, 1:3], "causal": True}, slow=True,
         untried=(DRY, ROUNDED, UNSEEN, AHEAD)),
    *(Case(f"collapse to {how}", dp.collapse(how), floats(2, 5, 2),
           FIVE | (INVARIANT if how in ("mean", "max", "attention") else {}),
           untried=(DRY, UNPACKABLE, TIMELESS, *{"first": (BARE, AHEAD), "last":
                    (BARE,), "mean": (BARE,), "max": (BARE, AHEAD), "attention":
                    (ROUNDED,)}.get(how, ())))
      for how in ("first", "last", "mean", "max", "attention")),
    # attention
    Case("self_attention", dp.self_attention(2, kv_heads=1, value_dim=1), floats(2, 3, 4), {
        "mask": FIVE["mask"][:, 1:4],
        "attention_mask": jnp.array([1, 0, 1, 1, 1, 0], bool).reshape(2, 1, 1, 3),
        "attention_bias": jnp.arange(36.0).reshape(2, 2, 3, 3) % 5 - 2} | EQUIVARIANT,
         untried=(DRY, TIMELESS, ROUNDED, UNSEEN, FIXED)),
    Case("self_attention, streaming", dp.self_attention(1, causal=True, rotary=dp.rotary()),
         floats(2, 3, 2), {name: a[:, 1:4] for name, a in RAGGED.items()} | {"causal": True},
         slow=True, untried=(DRY, ROUNDED, AHEAD)),
    Case("self_attention, window",
         dp.self_attention(1, causal=True, window=2, bias=False),
         floats(2, 4, 2), {"mask": FIVE["mask"][:, :4], "causal": True},
         slow=True, untried=(DRY, ROUNDED, AHEAD)),
    Case("self_attention, segments", dp.self_attention(1, causal=True, bias=False),
         floats(2, 3, 2), {"segments": jnp.array([[0, 0, 1], [5, 2, 2]]), "causal": True},
         slow=True, untried=(DRY, UNMASKED, ROUNDED)),
    Case("cross_attention", dp.cross_attention(1, bias=False), floats(2, 2, 2), {
        "memory": jnp.sin(jnp.arange(20.0).reshape(2, 5, 2)), "memory_mask": FIVE["mask"],
        "causal": True} | EQUIVARIANT,
         untried=(DRY, UNMASKED, UNPACKED, ROUNDED)),
    Case("attention_head in heads", dp.heads(2, dp.attention_head(1, causal=True, bias=False)),
         floats(2, 2, 2), {"causal": True},
         slow=True, untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("ffn", dp.ffn(3, jnp.tanh), floats(2, 2),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("add_norm with dropout", dp.add_norm(
        dp.ffn(2, jnp.tanh, dropout=0.5), dp.rms_norm(), dropout=0.5) >> dp.self_attention(
            1, dropout=0.5, bias=False), floats(2, 2, 2), EQUIVARIANT, slow=True,
         untried=(ALONE, UNMASKED, TIMELESS, ROUNDED, BENT)),
    Case("pre_norm in repeat", dp.repeat(2, dp.pre_norm(
        dp.self_attention(1, causal=True, bias=False), dp.rms_norm())),
        floats(2, 3, 2), {"mask": FIVE["mask"][:, 1:4], "causal": True}, slow=True,
         untried=(DRY, ROUNDED, AHEAD)),
    # the rest
    Case("dropout", dp.dropout(0.4), floats(3, 8),
         untried=(*PLAIN, BARE)),
    Case("spatial_dropout", dp.spatial_dropout(0.5, dims=1), floats(3, 2, 8),
         untried=(*PLAIN, BARE)),
    Case("stochastic_depth", dp.residual(dp.linear(4) >> dp.stochastic_depth(0.5)), floats(6, 4),
         untried=PLAIN),
    Case("gaussian_sample", dp.estimators.gaussian_sample(), (floats(3, 2), floats(3, 2)),
         untried=(*PLAIN, BARE, BENT)),
    Case("gumbel_softmax", dp.estimators.gumbel_softmax(temperature=0.7), floats(2, 3),
         untried=(*PLAIN, BARE, BENT)),
    Case("gumbel_softmax, hard", dp.estimators.gumbel_softmax(hard=True), floats(3, 4),
        {"smooth": False},
         slow=True, untried=(*PLAIN, BARE, BENT, ROUGH)),
    Case("flatten", dp.flatten(), floats(2, 3, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("flatten each step", dp.flatten(keep=2), floats(2, 3, 2, 2),
         {"causal": True} | EQUIVARIANT,
         untried=(DRY, ALONE, UNMASKED, UNPACKED, BARE)),
    Case("reshape", dp.reshape((2, -1)), floats(2, 3, 4),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, BARE)),
    Case("one_hot", dp.one_hot(3), jnp.array([[0, 2], [1, 1]]), EQUIVARIANT,
         untried=(DRY, *PLAIN, COUNTING, UNDRAWN,
                  CONSTANT)),
    Case("hide", dp.hide(), floats(2, 5, 3), FIVE | EQUIVARIANT,
         untried=(DRY, UNPACKED, TIMELESS, BARE, UNSEEN, AHEAD)),
    Case("hide tokens", dp.hide(), jnp.arange(1, 11).reshape(2, 5), FIVE | EQUIVARIANT,
         untried=(DRY, UNPACKED, TIMELESS, COUNTING, UNDRAWN, UNSEEN, AHEAD,
                  CONSTANT)),
    Case("gelu", dp.gelu, floats(2, 3),
         untried=(DRY, *PLAIN, BARE)),
    Case("binary_step", dp.binary_step, floats(2, 3), {"smooth": False},
         untried=(DRY, *PLAIN, BARE, ROUGH)),
    Case("prelu", dp.prelu(), floats(2, 3, 4), EQUIVARIANT,
         untried=(DRY, *PLAIN)),
    Case("prelu of one slope", dp.prelu(shared=True), floats(2, 4),
         slow=True, untried=(DRY, *PLAIN)),
    Case("glu", dp.glu(3), floats(2, 4),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("swiglu", dp.swiglu(3), floats(2, 2, 4), {"causal": True} | EQUIVARIANT,
         untried=(DRY, ALONE, UNMASKED, UNPACKED, ROUNDED)),
    # wiring
    Case("serial", dp.serial(dp.linear(5), jnp.tanh, out=dp.linear(2)), floats(2, 4),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("residual", dp.residual(dp.conv(3, 3), shortcut=dp.conv(3, 1)), floats(2, 4, 4, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS)),
    Case("branch", dp.branch(dp.linear(2), jnp.sin, merge=dp.concatenate), floats(2, 3),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("parallel", dp.parallel(dp.linear(2), jnp.sin) >> dp.add, (floats(2, 3), floats(2, 2)),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("program", block, floats(3, 2, 4), SCALE | EQUIVARIANT,
         untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED, BENT)),
    # transformations
    Case("repeat", dp.repeat(2, block), floats(3, 2, 4), SCALE | EQUIVARIANT,
         untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED, BENT)),
    Case("repeat with state", dp.repeat(2, dp.batch_norm() >> jnp.tanh), floats(4, 3),
         slow=True, untried=(DRY, *PLAIN, ROUNDED)),
    Case("repeat of convolutions", dp.repeat(2, dp.conv(2, 3) >> jnp.tanh), floats(2, 3, 3, 2),
         slow=True, untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, ROUNDED)),
    Case("heads", dp.heads(2, dp.linear(3) >> dp.dropout(0.5)), floats(2, 4),
         untried=PLAIN),
    Case("heads with state", dp.heads(2, dp.batch_norm()), floats(4, 3),
         slow=True, untried=(DRY, *PLAIN, ROUNDED)),
    Case("remat", dp.remat(block), floats(3, 2, 4), SCALE | EQUIVARIANT, slow=True,
         untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED, BENT)),
    Case("repeat, streaming", dp.repeat(2, CAUSAL), floats(2, 4, 3), {"causal": True}, slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("heads, streaming", dp.heads(2, CAUSAL), floats(2, 4, 3), {"causal": True}, slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("remat in repeat", dp.repeat(2, dp.remat(dp.linear(3) >> jnp.tanh)), floats(2, 3),
         slow=True, untried=(DRY, *PLAIN, ROUNDED)),
    Case("remat of repeat", dp.remat(dp.repeat(2, CAUSAL, remat=True), policy="dots_saveable"),
         floats(2, 3, 3), {"causal": True}, slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("ensemble", dp.ensemble(2, dp.linear(3) >> dp.dropout(0.5)), floats(2, 4),
         {"batched": False},
         untried=(*PLAIN, SHARED, SHARED_SUMS)),
    Case("ensemble, averaged", dp.ensemble(2, dp.batch_norm()) >> mean_of_all, floats(4, 3),
         slow=True, untried=(DRY, *PLAIN, ROUNDED)),
    Case("ensemble, streaming", dp.ensemble(2, CAUSAL) >> mean_of_all, floats(2, 3, 3),
         {"causal": True}, slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("linearize", dp.linearize(dp.linear(3) >> jnp.tanh >> dp.batch_norm()), floats(4, 2),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("linearize, randomly", dp.linearize(block), floats(3, 2, 4), SCALE, slow=True,
         untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED, BENT)),
    Case("linearize in repeat", dp.repeat(2, dp.linearize(CAUSAL)), floats(2, 3, 3), slow=True,
         untried=(DRY, ALONE, UNMASKED, TIMELESS, ROUNDED)),
    Case("mixed", dp.mixed(block, jnp.float32), floats(3, 2, 4),
         SCALE | {"precision": "float32"}, slow=True,
         untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED, BENT, NARROW)),
    Case("mixed in repeat", dp.repeat(2, dp.mixed(dp.batch_norm() >> jnp.tanh, jnp.float32)),
         floats(4, 3), {"precision": "float32"},
         slow=True, untried=(DRY, *PLAIN, ROUNDED, NARROW)),
    Case("mixed, streaming", dp.mixed(dp.repeat(2, CAUSAL), jnp.float32), floats(2, 3, 3),
         {"precision": "float32", "causal": True}, slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED, NARROW)),
    Case("hyper", dp.hyper(dp.linear(3) >> dp.dropout(0.4), dp.linear(3) >> jnp.tanh),
         floats(3, 40), CONDITION,
         untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED)),
    Case("hyper of one task", dp.hyper(dp.linear(3), dp.linear(2)), floats(2, 4),
         {"condition": CONDITION["condition"][0], "batched": False},
         slow=True, untried=(DRY, UNMASKED, UNPACKED, TIMELESS, SHARED, SHARED_SUMS)),
    Case("hyper, streaming", dp.repeat(2, dp.hyper(CAUSAL, dp.linear(3) >> dp.batch_norm())),
         floats(3, 3, 3), CONDITION | {"causal": True}, slow=True,
         untried=(DRY, UNMASKED, ROUNDED)),
    Case("fixed_point", dp.fixed_point(dp.parallel(dp.linear(
        4, kernel_init=jax.nn.initializers.normal(0.2)), dp.linear(4)) >> dp.add >> jnp.tanh),
        floats(2, 4), untried=(DRY, *PLAIN, ROUNDED)),
    Case("fixed_point, randomly", dp.fixed_point(SETTLING), floats(2, 4), slow=True,
         untried=(*PLAIN, ROUNDED, BENT, SOLVED)),
    Case("fixed_point, streaming", dp.repeat(2, dp.fixed_point(RECALLING)), floats(2, 4, 2),
         {"mask": FIVE["mask"][:, :4], "causal": True}, slow=True,
         untried=(DRY, ROUNDED, AHEAD)),
    Case("pin", dp.pin(dp.linear(3) >> dp.batch_norm() >> dp.dropout(0.5), train=False),
         floats(4, 2),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("pin to training", dp.linear(3) >> dp.pin(dp.dropout(0.5), train=True), floats(4, 2),
         slow=True, untried=PLAIN),
    Case("pin to training, of statistics", dp.pin(dp.batch_norm(), train=True), floats(4, 3),
         {"batched": False}, slow=True,
         untried=(DRY, *PLAIN, ROUNDED, SHARED)),
    Case("pin, streaming", dp.repeat(2, dp.pin(CAUSAL, train=False)), floats(2, 3, 3),
         {"causal": True}, slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("replace", dp.replace(CAUSAL, "tanh~0", lambda tanh: jnp.sin), floats(2, 3, 3),
         {"causal": True},
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("tap", dp.tap(block, "up") >> both, floats(3, 2, 4), SCALE | EQUIVARIANT,
         slow=True, untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED, BENT)),
    Case("tap in remat of repeat", dp.remat(dp.tap(dp.repeat(2, CAUSAL), "conv_0")) >> both,
         floats(2, 3, 3), {"causal": True}, slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    Case("tap in repeat", dp.repeat(2, dp.tap(dp.batch_norm() >> dp.linear(3), "*") >> both),
         floats(4, 3), slow=True,
         untried=(DRY, *PLAIN, ROUNDED)),
    # computed parameters
    Case("reparam", dp.reparam(dp.linear(3), lambda key, w: {"half": w / 2},
                               lambda tree: 2 * tree["half"]), floats(2, 4),
         untried=(DRY, *PLAIN)),
    Case("lora", dp.lora(dp.linear(3), 2), floats(2, 4),
         untried=(DRY, *PLAIN)),
    Case("lora in repeat", dp.repeat(2, dp.lora(block, 2)), floats(3, 2, 4),
         SCALE | EQUIVARIANT, slow=True, untried=(UNMASKED, UNPACKED, TIMELESS, ROUNDED, BENT)),
    Case("freeze", dp.freeze(dp.linear(3), "kernel"), floats(2, 4),
         untried=(DRY, *PLAIN)),
    Case("weight_norm", dp.weight_norm(dp.conv(3, 2)), floats(2, 3, 3, 2),
         untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, ROUNDED)),
    Case("spectral_norm", dp.spectral_norm(dp.linear(3)), floats(2, 4),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("spectral_norm of copies", dp.spectral_norm(dp.heads(2, dp.linear(3))), floats(2, 4),
         slow=True,
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("quantize", dp.quantize(dp.linear(3), 4), floats(2, 4), {"smooth": False},
         untried=(DRY, *PLAIN, ROUNDED, ROUGH)),
    Case("ema", dp.ema(dp.linear(3) >> dp.batch_norm(), 0.5), floats(4, 4),
         untried=(DRY, *PLAIN, ROUNDED)),
    Case("ema, streaming", dp.ema(dp.repeat(2, CAUSAL)), floats(2, 3, 3), {"causal": True},
         slow=True,
         untried=(DRY, ALONE, UNMASKED, ROUNDED)),
    # what wrappers must hand on
    *(Case(f"noise through {name}", wrap(NOISE), floats(4, 2), slow=True,
           untried=(*PLAIN, *{"freeze": (FLAT,),
                    "weight_norm": (ROUNDED,), "ema": (ROUNDED,)}.get(name, ())))
      for name, wrap in WRAPPERS.items()),
    *(Case(f"segments through {name}", wrap(TEXTS), floats(2, 3, 2),
           {"segments": jnp.array([[0, 0, 1], [5, 2, 2]]), "causal": True}, slow=True,
           untried=(DRY, UNMASKED, ROUNDED))
      for name, wrap in WRAPPERS.items()),
    *(Case(f"padding through {name}", wrap(dp.serial(dp.self_attention(1, bias=False))),
           floats(2, 3, 2), {"mask": FIVE["mask"][:, 1:4]}, slow=True,
           untried=(DRY, TIMELESS, ROUNDED))
      for name, wrap in WRAPPERS.items() if name in ("repeat", "residual", "heads", "tap")),
    # models
    *(case._replace(slow=True) for case in (
        Case("gpt", dp.models.gpt(11, length=8, dropout=0.2, **NET), IDS, RAGGED | {"causal": True},
             untried=(COUNTING, NOISY_IDS, AHEAD)),
        Case("llama", dp.models.llama(11, kv_heads=1, **NET), IDS, RAGGED | {"causal": True},
             untried=(DRY, COUNTING, AHEAD)),
        Case("llama, tied, with a window",
            dp.models.llama(11, window=2, tied=True, head_dim=2, **NET),
             IDS, FIVE | {"segments": jnp.array([[0, 0, 0, 4, 4], [1, 1, 1, 1, 1]]),
                          "causal": True},
             untried=(DRY, COUNTING, AHEAD)),
        Case("bert", dp.models.bert(11, length=8, **NET), IDS, RAGGED | TYPES,
             untried=(DRY, UNPACKABLE, TIMELESS, COUNTING)),
        Case("bert_pretraining", dp.models.bert_pretraining(11, length=8, **NET), IDS, FIVE | TYPES,
             untried=(DRY, TIMELESS, COUNTING, MERGED)),
        Case("dcgan_generator", dp.models.dcgan_generator(2, 2, width=3, smallest=1), floats(4, 5),
             untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, ROUNDED)),
        Case("dcgan_discriminator", dp.models.dcgan_discriminator(4, width=3, smallest=1),
             floats(3, 4, 4, 2),
             untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, ROUNDED)),
        Case("vit", dp.models.vit(3, image_size=4, patch_size=2, **NET), floats(2, 4, 4, 3),
             untried=(DRY, ALONE, UNMASKED, UNPACKABLE, TIMELESS, ROUNDED)),
        Case("unet",
            opened(dp.models.unet(2, widths=(4, 6), depth=1, attention=(2,), groups=2, classes=3,
                                    dropout=0.2)), floats(2, 4, 2, 2), NOISY,
             untried=(UNMASKED, UNPACKABLE, TIMELESS, ROUNDED, BENT)),
        Case("dit", opened(dp.models.dit(2, classes=3, dropout=0.2, **NET)), floats(2, 4, 2, 2),
            NOISY,
             untried=(UNMASKED, UNPACKABLE, TIMELESS, ROUNDED, BENT)),
        Case("transformer_encoder", dp.models.transformer_encoder(dropout=0.2, **STACK),
             floats(2, 5, 8), FIVE | EXPLICIT,
             untried=(TIMELESS, ROUNDED, BENT, AHEAD)),
        Case("transformer_encoder, norms first",
             dp.models.transformer_encoder(norm_first=True, **STACK), floats(2, 5, 8), FIVE,
             untried=(DRY, TIMELESS, ROUNDED)),
        Case("transformer_decoder", dp.models.transformer_decoder(**STACK), floats(2, 5, 8),
             FIVE | MEMORY | {"causal": True},
             untried=(DRY, ROUNDED, AHEAD)),
        Case("transformer_decoder alone", dp.models.transformer_decoder(
            cross=False, norm_first=True, **STACK), floats(2, 5, 8), FIVE | {"causal": True},
             untried=(DRY, ROUNDED, AHEAD)),
        Case("transformer", dp.models.transformer(11, 13, **NET), IDS,
             RAGGED | SOURCE | EXPLICIT | {"causal": True},
             untried=(DRY, COUNTING, AHEAD, OFFLINE)),
        Case("the decoder of transformer",
             dp.models.transformer(11, 13, norm_first=True, **NET).children["decoder"], IDS,
             RAGGED | MEMORY | {"causal": True},
             untried=(DRY, COUNTING, AHEAD)),
        Case("seq2seq", dp.models.seq2seq(11, 13, width=8, depth=2, dropout=0.2), IDS,
             FIVE | SOURCE | {"causal": True},
             untried=(COUNTING, NOISY_IDS, AHEAD, OFFLINE)),
        Case("the decoder of seq2seq", dp.models.seq2seq(11, 13, width=8).children["decoder"], IDS,
             FIVE | MEMORY | {"causal": True},
             untried=(DRY, COUNTING, AHEAD)),
        Case("vae", dp.models.vae(dp.linear(3) >> jnp.tanh >> dp.branch(dp.linear(2), dp.linear(2)),
                           dp.linear(4)), floats(3, 4),
             untried=(*PLAIN, ROUNDED, BENT)),
        Case("sequence_classifier", dp.models.sequence_classifier(
            11, 3, dp.recurrent(dp.gru(4)), width=6, method="last"), IDS, FIVE,
             untried=(DRY, UNPACKED, TIMELESS, COUNTING)),
    )),
]
