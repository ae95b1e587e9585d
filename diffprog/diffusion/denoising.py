"""The objective of a diffusion model: the net predicts the noise in an image, or the velocity.

Ho, Jain, Abbeel 2020, arXiv:2006.11239; Salimans and Ho 2022, arXiv:2202.00512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_fraction
from diffprog.core.dtypes import is_inexact, is_int, wide
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside, reshaped
from diffprog.core.notation import listed, show
from diffprog.diffusion.process import Predict, add_noise, check_schedule, scales
from diffprog.losses.entries import average, spread, total
from diffprog.losses.values import squared_error
from diffprog.training.objectives import OF_TARGETS, Metrics, Objective, valid_targets

__all__ = ["denoising"]


def denoising(
    schedule: np.ndarray, *, predict: Predict = "noise", null_class: int | None = None,
    null: Mapping[str, Any] | None = None, rate: float = 0.1,
) -> Objective:
    """The denoising objective of diffusion: ``loss = mean((net(x_t, t) - target)**2)``.

    Each image gets its own uniform step t and its own noise. The net takes the side input `time`,
    ints (batch,), and returns its prediction in the shape of x. A batch is the images (batch, ...),
    or a dict with ``x``, those images, `mask`, `target_mask` and `sample_weight` as in
    `classification`, and side inputs by name. `evaluate` uses the same steps and noise in every
    call, so that losses can be compared.

    Args:
        schedule: the fractions a_t of the image, (steps,), decreasing in (0, 1), from
            `linear_noise` or `cosine_noise`.
        predict: the target, "noise" or "velocity". The velocity depends on the image even if the
            input is nearly all noise.
        null_class: the class that means no condition. In training it replaces a fraction of the
            `condition`, as classifier-free guidance needs; None replaces nothing.
        null: the null value of each side input that is no class: the value of one example, or an
            array that broadcasts to it, such as ``{"condition": jnp.zeros(8)}`` for vectors, or
            ``{"memory": jnp.zeros(8), "memory_mask": valid}`` for sequences. An example has either
            all of them replaced or none.
        rate: fraction of the examples whose condition is replaced in training, in [0, 1).

    Raises:
        LayerError: a schedule that does not decrease in (0, 1); an unknown prediction; a batch
            without the condition of null_class or `null`, or with one of another shape or dtype; a
            net that takes no time or returns another shape.

    Example:
        >>> net = dp.models.dit(1, width=8, depth=1, heads=2, classes=10)
        >>> objective = dp.diffusion.denoising(dp.diffusion.cosine_noise(100), null_class=10)
        >>> step = dp.make_step(net, objective, optax.adam(1e-3))
        >>> batch = {"x": jnp.ones((2, 8, 8, 1)), "condition": jnp.array([3, 7])}
        >>> fit = dp.fit(step, [batch], key=jax.random.key(0), steps=1, progress=False)
        >>> 0 < fit.history[0]["loss"] < 2
        True

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, eq. 14; velocity: Salimans and Ho 2022,
    arXiv:2202.00512, appendix D; null_class: Ho and Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    schedule = check_schedule(schedule)
    check_predict(predict)
    check_fraction("rate", rate)
    check_null(null_class, null)

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        x, side = _images(net, batch)                                 # (batch, ...)
        net_key, time_key, noise_key, null_key = jax.random.split(
            jax.random.key(0) if key is None else key, 4)
        time = beside(jax.random.randint(time_key, x.shape[:1], 0, len(schedule)), x)
        noise = jax.random.normal(noise_key, x.shape, wide(x).dtype)  # 16 bits would cut its tails
        noise = beside(noise, x)
        if train and (nulls := null_inputs(side, null_class, null)):
            dropped = beside(jax.random.bernoulli(null_key, rate, x.shape[:1]), x)  # (batch,)
            side = side | _replaced(dropped, nulls, side)

        y, state = net.apply(
            params, state, add_noise(x, noise, schedule, time), time=time, train=train,
            key=None if key is None else net_key, **side)
        check_prediction(y, x)
        signal, sigma = scales(schedule, time, x)                     # (batch, 1, ...)
        target = noise if predict == "noise" else signal * noise - sigma * wide(x)

        mask, weights = valid_targets(net, batch, x, side | {"time": time}, x.shape)
        mask = spread(mask, x.shape)
        loss = average(squared_error(y, target, mask=mask, reduction="none"), mask, weights)
        return loss, (state, {"loss": loss, "count": total(x.shape, mask, weights)})

    def inputs(net: Layer, batch: Any) -> tuple[jax.Array, dict[str, Any]]:
        x, side = _images(net, batch)
        return x, {"time": jnp.zeros(x.shape[:1], jnp.int32), **side}

    result: Any = objective
    result.inputs, result.draws = inputs, True
    return result


def check_denoiser(net: Layer) -> None:
    """Raise unless the net takes the side input `time`."""
    if "time" not in net.side:
        raise LayerError("a net that takes time", f"one that takes {listed(net.side)}",
                         "name it in a program: (layers, x, *, time=None)")


def check_prediction(y: Any, x: jax.Array) -> None:
    """Raise unless y has the shape of the images."""
    if getattr(y, "shape", None) != x.shape:
        raise LayerError(f"a net that returns the shape of x, {x.shape}", show(y),
                         "give it as many output features as x has")


def check_predict(predict: str) -> None:
    """Raise for an unknown prediction."""
    if predict not in ("noise", "velocity"):
        raise LayerError("predict out of noise, velocity", repr(predict), "choose one of them")


def _images(net: Layer, batch: Any) -> tuple[jax.Array, dict[str, Any]]:
    """The images and the side inputs of a batch."""
    given = dict(batch) if isinstance(batch, Mapping) else {"x": batch}
    check_denoiser(net)
    side = {name: value for name, value in given.items() if name in net.side - {"time"}}
    if "x" not in given or given.keys() - side.keys() - {"x", *OF_TARGETS}:
        raise LayerError(f"a batch with x and side inputs of the net "
                         f"({listed(net.side - {'time'})})", listed(given),
                         "rename or remove the rest: time and noise are drawn")
    check_array(given["x"], rank=1, axes="(batch, ...)")
    return given["x"], side


def check_null(null_class: int | None, null: Any) -> None:
    """Raise unless at most one of both is given, and `null` is a dict of side inputs."""
    if null is None:
        return
    if null_class is not None:
        raise LayerError("a null_class or null", "both", "pass null alone: it may hold the class")
    if not isinstance(null, Mapping) or not null:
        raise LayerError("null as side inputs of one example", show(null),
                         'pass null={"condition": jnp.zeros(8)}, for example')


def null_inputs(
    side: Mapping[str, Any], null_class: int | None, null: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The null values by side input, for all examples of a batch."""
    if null_class is not None:
        _check_classes(side.get("condition"))
        null = {"condition": null_class}
    nulls = {}
    for name, value in (null or {}).items():
        if name not in side:
            raise LayerError(f"{name} in each batch with null", listed(side),
                             "add it to the batch, or remove it from null")
        example = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), side[name])
        value = jax.tree.map(jnp.asarray, value)
        if jax.tree.structure(value) != jax.tree.structure(example) or not all(
                map(_fits, jax.tree.leaves(value), jax.tree.leaves(example))):
            raise LayerError(f"null {name} for one example, {show(example)}", show(value),
                             "give it the shape and kind of dtype of one example")
        nulls[name] = jax.tree.map(
            lambda a, own: jnp.broadcast_to(a.astype(own.dtype), own.shape), value, side[name])
    return nulls


def _replaced(
    dropped: jax.Array, nulls: dict[str, Any], side: Mapping[str, Any]
) -> dict[str, Any]:
    """The side inputs with null values in the examples that `dropped` (batch,) marks."""

    def replace(null: jax.Array, own: jax.Array) -> jax.Array:
        rows = reshaped(dropped, 1, *[1] * (own.ndim - 1))            # (batch, 1, ...)
        return jnp.where(rows, beside(null, own), own)

    return jax.tree.map(replace, nulls, {name: side[name] for name in nulls})


def _check_classes(condition: Any) -> None:
    if condition is None:
        raise LayerError("a condition in each batch with null_class", "none",
                         'pass {"x": images, "condition": labels}')
    if not is_int(condition) or condition.ndim != 1:
        raise LayerError("a condition of one class for each image, ints (batch,)", show(condition),
                         "pass labels, or null={...} in place of null_class")


def _fits(null: jax.Array, example: Any) -> bool:
    """Does a null value broadcast to that of an example, and cast to its dtype?"""
    try:
        shape = np.broadcast_shapes(null.shape, example.shape)
    except ValueError:
        return False
    return shape == example.shape and (is_inexact(example) or not is_inexact(null))
