"""The objective of a diffusion model: a net learns to predict the noise in an image.

Ho, Jain, Abbeel 2020, arXiv:2006.11239; Salimans and Ho 2022, arXiv:2202.00512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import check_array, check_share
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.meshes import beside, reshaped
from diffprog.core.notation import listed, show
from diffprog.diffusion.process import Predict, add_noise, checked, shares
from diffprog.losses.entries import average, spread, total, wide
from diffprog.losses.values import squared_error
from diffprog.training.objectives import OF_TARGETS, Metrics, Objective, real_targets

__all__ = ["denoising"]


def denoising(
    schedule: np.ndarray, *, predict: Predict = "noise", null_class: int | None = None,
    null: Mapping[str, Any] | None = None, rate: float = 0.1,
) -> Objective:
    """The objective of a net that sees through noise: ``loss = mean((net(x_t, t) - target)**2)``.

    Each image gets a step t of its own, all being alike likely, and its own noise. The net takes
    the side input `time`, ints (batch,), and gives what it predicts in the shape of x. A batch is
    the images (batch, ...), or a dict with ``x``, those images, `mask`, `target_mask` and
    `sample_weight` as in `classification`, and side inputs under all other names. In `evaluate`
    each example always has the same step and noise, so that losses can be compared.

    Args:
        schedule: shares of the image, (steps,), falling, in (0, 1): what `linear_noise` or
            `cosine_noise` give.
        predict: the target, "noise" or "velocity". Velocity says something of the image also
            where hardly anything is left of it.
        null_class: the class that stands for none. It takes the place of some of the `condition`,
            so that one net learns both parts of classifier-free guidance; None replaces nothing.
        null: what stands for none where that is no class: the value of one example, or what is
            broadcast to it, under the name of the side input, such as ``{"condition":
            jnp.zeros(8)}`` of vectors, or ``{"memory": jnp.zeros(8), "memory_mask": real}`` of
            sequences. All of an example are replaced, or none.
        rate: share of the conditions that is replaced in training, in [0, 1).

    Raises:
        LayerError: a schedule that does not fall in (0, 1); another prediction; a null_class and no
            condition in a batch, or one of another kind, and likewise for `null`; a net that takes
            no time, or gives another shape.

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
    schedule = checked(schedule)
    check_predict(predict)
    check_share("rate", rate)
    check_null(null_class, null)

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        x, side = _images(net, batch)
        own, *keys = jax.random.split(jax.random.key(0) if key is None else key, 4)
        time = beside(jax.random.randint(keys[0], x.shape[:1], 0, len(schedule)), x)
        noise = jax.random.normal(keys[1], x.shape, wide(x).dtype)  # with tails, in 16 bits too
        noise = beside(noise, x)
        if train and (none := untold(side, null_class, null)):
            dropped = beside(jax.random.bernoulli(keys[2], rate, x.shape[:1]), x)
            side = side | jax.tree.map(lambda none, own: jnp.where(
                reshaped(dropped, 1, *[1] * (own.ndim - 1)), beside(none, own), own),
                none, {name: side[name] for name in none})
        seen = add_noise(x, noise, schedule, time)
        y, state = net.apply(params, state, seen, time=time, train=train,
                             key=None if key is None else own, **side)
        check_prediction(y, x)
        signal, drowned = shares(schedule, time, x)
        target = noise if predict == "noise" else signal * noise - drowned * wide(x)
        mask, weights = real_targets(net, batch, x, side | {"time": time}, x.shape)
        real = spread(mask, x.shape)
        loss = average(squared_error(y, target, mask=real, reduction="none"), real, weights)
        return loss, (state, {"loss": loss, "count": total(x.shape, real, weights)})

    def inputs(net: Layer, batch: Any) -> tuple[jax.Array, dict[str, Any]]:
        x, side = _images(net, batch)
        return x, {"time": jnp.zeros(x.shape[:1], jnp.int32), **side}

    said: Any = objective
    said.inputs, said.draws = inputs, True
    return said


def check_denoiser(net: Layer) -> None:
    """Raise for a net that is not told how noisy x is."""
    if "time" not in net.side:
        raise LayerError("a net that takes time", f"one that takes {listed(net.side)}",
                         "name it in a program: (layers, x, *, time=None)")


def check_prediction(y: Any, x: jax.Array) -> None:
    """Raise unless y is as large as the images are."""
    if getattr(y, "shape", None) != x.shape:
        raise LayerError(f"a net that gives the shape of x, {x.shape}", show(y),
                         "let it have as many features as x")


def check_predict(predict: str) -> None:
    """Raise for what nothing can be predicted as."""
    if predict not in ("noise", "velocity"):
        raise LayerError("predict out of noise, velocity", repr(predict), "choose one of them")


def _images(net: Layer, batch: Any) -> tuple[jax.Array, dict[str, Any]]:
    """The images of a batch, and the side inputs beside them."""
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
    """Raise for what cannot stand for no condition."""
    if null is None:
        return
    if null_class is not None:
        raise LayerError("a null_class or null", "both", "pass null alone: it may hold the class")
    if not isinstance(null, Mapping) or not null:
        raise LayerError("null as side inputs of one example", show(null),
                         'pass null={"condition": jnp.zeros(8)}, for example')


def untold(
    side: Mapping[str, Any], null_class: int | None, null: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The side inputs of a batch that say none for all its examples."""
    if null_class is not None:
        _check_classes(side.get("condition"))
        null = {"condition": null_class}
    found = {}
    for name, none in (null or {}).items():
        if name not in side:
            raise LayerError(f"{name} in each batch, beside null", listed(side),
                             "give each example one, and leave out of null what has none")
        one = jax.tree.map(lambda own: jax.ShapeDtypeStruct(own.shape[1:], own.dtype), side[name])
        none = jax.tree.map(jnp.asarray, none)
        if jax.tree.structure(none) != jax.tree.structure(one) or not all(
                map(_fits, jax.tree.leaves(none), jax.tree.leaves(one))):
            raise LayerError(f"null to hold {name} of one example, {show(one)}", show(none),
                             "give it the shape and kind of what an example has")
        found[name] = jax.tree.map(lambda none, own: jnp.broadcast_to(
            none.astype(own.dtype), own.shape), none, side[name])
    return found


def _check_classes(condition: Any) -> None:
    if condition is None:
        raise LayerError("a condition in each batch, beside a null_class", "none",
                         'pass {"x": images, "condition": labels}')
    if condition.ndim != 1 or not jnp.issubdtype(condition.dtype, jnp.integer):
        raise LayerError("a condition of one class for each image, ints (batch,)", show(condition),
                         "pass labels, or null={...} in place of null_class for what is no class")


def _fits(none: jax.Array, one: Any) -> bool:
    """Can it be broadcast to what an example has, and are its numbers of no wider kind?"""
    try:
        shape = np.broadcast_shapes(none.shape, one.shape)
    except ValueError:
        return False
    narrow = jnp.issubdtype(one.dtype, jnp.inexact) or not jnp.issubdtype(none.dtype, jnp.inexact)
    return shape == one.shape and narrow
