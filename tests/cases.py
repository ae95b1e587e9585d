"""The one list of layers on which every law runs: a new layer is registered by one line here."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import diffprog as dp


class Case(NamedTuple):
    """A layer and the input on which it is tried; `options` go to `dp.check`."""

    name: str
    layer: Any
    x: Any
    options: dict[str, Any] | None = None


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dp.program(norm=dp.layer_norm(), up=dp.linear(6), down=dp.linear(4), drop=dp.dropout(0.5))
def block(layers, x, *, scale=None):
    y = layers.drop(layers.down(jax.nn.silu(layers.up(layers.norm(x)))))
    return x + layers.drop(y if scale is None else y * scale[:, None, None])


SCALE = {"scale": jnp.array([1.0, 2.0, 3.0])}

CASES = [
    # linear
    Case("linear", dp.linear(3), floats(2, 4)),
    Case("linear without bias", dp.linear(3, bias=False), floats(2, 3, 4)),
    # convolution
    Case("conv 1-d", dp.conv(3, 3, dims=1), floats(2, 6, 2)),
    Case("conv 2-d", dp.conv(2, (2, 3), stride=2, padding="VALID"), floats(2, 5, 5, 2)),
    Case("conv in groups", dp.conv(4, 3, groups=2, dilation=2, padding=1), floats(2, 5, 4, 4)),
    # pools
    Case("max_pool", dp.max_pool(2), floats(2, 4, 5, 2)),
    Case("max_pool 1-d", dp.max_pool(3, dims=1, stride=1, padding="SAME"), floats(2, 5, 2)),
    Case("avg_pool", dp.avg_pool(2, padding=1), floats(2, 4, 5, 2)),
    Case("global_avg_pool", dp.global_avg_pool(), floats(2, 3, 4, 2)),
    Case("global_max_pool", dp.global_max_pool(dims=1), floats(2, 5, 2)),
    # normalization
    Case("batch_norm", dp.batch_norm(), floats(4, 3)),
    Case("batch_norm on images", dp.batch_norm(momentum=0.5, bias=False), floats(2, 3, 3, 2)),
    Case("layer_norm", dp.layer_norm(), floats(2, 3, 5)),
    Case("layer_norm alone", dp.layer_norm(scale=False, bias=False), floats(2, 5)),
    # the rest
    Case("dropout", dp.dropout(0.4), floats(3, 8)),
    Case("flatten", dp.flatten(), floats(2, 3, 2)),
    Case("gelu", dp.gelu, floats(2, 3)),
    # wiring
    Case("serial", dp.serial(dp.linear(5), jnp.tanh, out=dp.linear(2)), floats(2, 4)),
    Case("residual", dp.residual(dp.conv(3, 3), shortcut=dp.conv(3, 1)), floats(2, 4, 4, 2)),
    Case("branch", dp.branch(dp.linear(2), jnp.sin, merge=dp.concatenate), floats(2, 3)),
    Case("parallel", dp.parallel(dp.linear(2), jnp.sin) >> dp.add, (floats(2, 3), floats(2, 2))),
    Case("program", block, floats(3, 2, 4), SCALE),
    # transformations
    Case("repeat", dp.repeat(2, block), floats(3, 2, 4), SCALE),
    Case("repeat with state", dp.repeat(2, dp.batch_norm() >> jnp.tanh), floats(4, 3)),
    Case("repeat of convolutions", dp.repeat(2, dp.conv(2, 3) >> jnp.tanh), floats(2, 3, 3, 2)),
    Case("heads", dp.heads(2, dp.linear(3) >> dp.dropout(0.5)), floats(2, 4)),
    Case("heads with state", dp.heads(2, dp.batch_norm()), floats(4, 3)),
    Case("remat", dp.remat(block), floats(3, 2, 4), SCALE),
    Case("remat in repeat", dp.repeat(2, dp.remat(dp.linear(3) >> jnp.tanh)), floats(2, 3)),
]
