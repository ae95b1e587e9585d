"""Diffusion: an image is drowned in noise step by step, and a net learns to say what the noise is.

``x_t = sqrt(a_t) * x + sqrt(1 - a_t) * noise``. A schedule is the array of a_t for t = 0, 1, ...,
in the papers alpha-bar of 1, 2, ...: which share of the variance is still image. What a net
predicts is the noise, or the velocity ``sqrt(a_t) * noise - sqrt(1 - a_t) * x``, by which x_t moves
as the angle arccos(sqrt(a_t)) grows; each of them gives the other, and x.

Ho, Jain, Abbeel 2020, arXiv:2006.11239; Salimans and Ho 2022, arXiv:2202.00512.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.arguments import check_array, check_count, check_share
from diffprog.entries import average, spread, total, wide
from diffprog.errors import LayerError
from diffprog.layer import Layer
from diffprog.losses import squared_error
from diffprog.meshes import beside, placed, reshaped
from diffprog.notation import listed, show
from diffprog.objectives import OF_TARGETS, Metrics, Objective, real_targets

__all__ = ["add_noise", "cosine_schedule", "denoising", "linear_schedule"]

Predict = Literal["noise", "velocity"]


def linear_schedule(
    steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> np.ndarray:
    """Noise whose variance grows in equal parts: ``a_t = prod(1 - beta_0, ..., 1 - beta_t)``.

    Args:
        steps: how many; positive.
        beta_start, beta_end: variance that the first and the last step add, in (0, 1). The
            paper's are for 1000 steps; for fewer, take larger ones.

    Raises:
        LayerError: beta_start or beta_end is outside (0, 1).

    Example:
        >>> dp.linear_schedule(2, beta_start=0.5, beta_end=0.75).tolist()
        [0.5, 0.125]

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, section 4.
    """
    check_count("steps", steps)
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise LayerError(f"{name} in (0, 1)", repr(beta), "pass a share of the variance")
    return np.cumprod(1 - np.linspace(beta_start, beta_end, steps))


def cosine_schedule(steps: int = 1000, *, offset: float = 0.008) -> np.ndarray:
    """Noise that comes and goes gently: ``a_t = f(t + 1) / f(0)``, ``f(t) = cos(angle of t)**2``.

    The angle is ``(t / steps + offset) / (1 + offset) * pi / 2``. No step takes more than 99.9 %
    of the variance, so that the last ones leave something.

    Args:
        steps: how many; positive.
        offset: keeps the first steps from being too small to matter; not negative.

    Raises:
        LayerError: offset is negative.

    Example:
        >>> [round(a, 3) for a in dp.cosine_schedule(4).tolist()]
        [0.847, 0.494, 0.144, 0.0]

    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    check_count("steps", steps)
    if not offset >= 0:
        raise LayerError("offset of at least 0", repr(offset), "pass 0.008, as the paper does")
    share = (np.arange(steps + 1) / steps + offset) / (1 + offset)
    kept = np.cos(share * math.pi / 2) ** 2
    return np.cumprod(np.maximum(kept[1:] / kept[:-1], 1e-3))


def add_noise(x: jax.Array, noise: jax.Array, schedule: np.ndarray, time: jax.Array) -> jax.Array:
    """What is left of x after some steps: ``x_t = sqrt(a_t) * x + sqrt(1 - a_t) * noise``.

    Shapes:
        x: (batch, ...) -> the same.
        noise: of the shape of x, standard normal.
        schedule: (steps,).
        time: ints (batch,) in [0, steps), the t of each example; others give NaN, because nothing
            can be raised under `jax.jit`.

    Raises:
        LayerError: as `denoising` does, and for arrays of other shapes.

    Example:
        >>> x, noise = jnp.full((2, 1), 10.0), jnp.ones((2, 1))
        >>> y = dp.add_noise(x, noise, np.array([0.64, 0.36]), jnp.array([0, 1]))
        >>> [round(float(number), 3) for number in y[:, 0]]
        [8.6, 6.8]

    Source: Ho, Jain, Abbeel 2020, arXiv:2006.11239, eq. 4.
    """
    check_array(x, rank=1, axes="(batch, ...)")
    if noise.shape != x.shape or time.shape != x.shape[:1]:
        raise LayerError(f"noise of shape {x.shape} and time of shape {x.shape[:1]}",
                         f"{show(noise)} and {show(time)}", "draw noise for each number of x")
    signal, spread = shares(checked(schedule), time, x)
    image, noise = x.astype(signal.dtype), noise.astype(signal.dtype)
    return (signal * image + spread * noise).astype(x.dtype)


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
        schedule: shares of the image, (steps,), falling, in (0, 1): what `linear_schedule` or
            `cosine_schedule` give.
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
        >>> net = dp.dit(1, width=8, depth=1, heads=2, classes=10)
        >>> objective = dp.denoising(dp.cosine_schedule(100), null_class=10)
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


def checked(schedule: Any) -> np.ndarray:
    """A schedule in float64; raise unless it falls from step to step inside of (0, 1)."""
    found = np.asarray(schedule, np.float64)
    if found.ndim != 1 or not found.size or not (
            0 < found[-1] and found[0] < 1 and (np.diff(found) < 0).all()):
        raise LayerError("a schedule of numbers that fall inside of (0, 1)", show(schedule),
                         "pass cosine_schedule(1000), for example")
    return found


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


def shares(schedule: Any, time: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What image and noise are multiplied by at these steps; axes as x, float32 or wider."""
    def own(share: np.ndarray) -> jax.Array:
        found = jnp.asarray(share, wide(x).dtype).at[time].get(
            mode="fill", fill_value=np.nan, wrap_negative_indices=False,
            out_sharding=placed(time, time.ndim, 0))
        return reshaped(found, time.ndim, *(1,) * (x.ndim - time.ndim))

    return own(np.sqrt(schedule)), own(np.sqrt(1 - np.asarray(schedule)))


def image_and_noise(
    y: jax.Array, x: jax.Array, signal: jax.Array, spread: jax.Array, predict: Predict
) -> tuple[jax.Array, jax.Array]:
    """The two parts of ``x = signal * image + spread * noise``, by what a net predicts of it."""
    if predict == "noise":
        return (x - spread * y) / signal, y
    return signal * x - spread * y, spread * x + signal * y


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
