"""Optimizers that know which parameter is what: thin compositions of optax.

Each is an ordinary optax transformation of a tree of parameters, inside `make_step` or elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffprog.core.arguments import check_count, check_positive
from diffprog.core.computed import Patterns
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer, check_layer
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths, select
from diffprog.training.partition import Rule, layers_around, muon_partition

__all__ = ["adamw", "layerwise_decay", "muon", "warmup_stable_decay"]

Rate = float | Callable[[Any], Any]

# The last name of a path: leaves that decay by default, and leaves that do not. `direction` is of
# weight_norm, `down` and `up` are the factors of lora and `base` its frozen kernel; `w`, `b`,
# `offset` and `embeddings` are Haiku's.
_DECAYED = {"kernel", "embedding", "direction", "down", "up", "w", "embeddings"}
_NOT_DECAYED = {"bias", "scale", "base", "b", "offset"}


def adamw(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.01, decay: Patterns | None = None, cautious: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay: ``w -= rate * (m / (sqrt(v) + eps) + weight_decay * w)``.

    m and v are the bias-corrected moving averages of the gradient and of its square. By default
    kernels and embeddings decay, and biases, scales and other vectors do not. A leaf is recognized
    by the last name of its path, because the copies of `repeat`, `heads` and `ensemble` add axes.

    Args:
        learning_rate: a positive number, or a schedule, step -> rate.
        b1, b2: decay rates of the two averages; in [0, 1).
        eps: added to the root; positive.
        weight_decay: the fraction of w, times the rate, that is subtracted in each step;
            nonnegative. PyTorch has the same default.
        decay: path, or a tuple of paths, of the leaves that decay, as in `tree.select`; None is
            the default above, and () is none.
        cautious: let an entry decay only if that moves it the same way as Adam does, or if Adam
            leaves it alone: ``update * w >= 0``.

    Raises:
        LayerError: in ``init``: a pattern that matches nothing; with the default, a leaf of two
            axes or more whose name is unknown.

    Example:
        >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> optimizer = dp.training.adamw(0.1, weight_decay=0.5)
        >>> no_gradient = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
        >>> bool(jnp.allclose(updates["kernel"], -0.05)), bool(jnp.any(updates["bias"]))
        (True, False)

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Chen et al. 2025,
    arXiv:2510.12402, algorithm 1, for `cautious`.
    """
    def mask(params: Any) -> Any:
        return _mask(params, _decayed(paths(params), decay))

    return _adam(learning_rate, b1, b2, eps, _decay(weight_decay, mask, cautious))


def muon(
    learning_rate: Rate, net: Layer, x: Any, *, adam: Patterns | None = None,
    adam_learning_rate: Rate | None = None, beta: float = 0.95, rms: float | None = 0.2,
    weight_decay: float = 0.01, decay: Patterns | None = None, cautious: bool = False, **side: Any,
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalized momentum for hidden kernels: ``w -= rate * (s * NS(g + beta * m) + decay)``.

    ``m = beta * m + g``, and NS is the Newton-Schulz iteration of five steps, which moves the
    singular values of a matrix towards one. The scale s and the decay are explained below. All
    other parameters go to `adamw`. ``print(dp.training.muon_partition(net, x))`` shows which:

    - Hidden kernels are orthogonalized, each copy of `repeat`, `heads` and `ensemble` by itself.
    - Query, key, value and output kernels of attention are one matrix each, with all heads;
      those of ``heads(n, attention_head(...))`` one for each head. The gates of a cell are one.
    - Kernels of convolutions are matrices (places * in, out). Those with groups of channels, such
      as of `depthwise_conv`, go to AdamW, because a group is a matrix of its own.
    - The factors of `lora` and other leaves of a reparametrization, maps of `hyper`, kernels with a
      side of one, and kernels of other libraries with more than two axes go to AdamW.
    - Embeddings, biases, scales, leaves with names other than ``kernel``, and the last map before
      each output go to AdamW. The first map of a net is hidden, unless `adam` names it.

    Args:
        learning_rate: a positive number, or a schedule, step -> rate.
        net: the net that is trained, or one whose parameters have the same paths.
        x: its input, or `jax.ShapeDtypeStruct`s of it.
        adam: path, or a tuple of paths, of further leaves for AdamW. If several kernels may be the
            last map, as where the output is a sum, it must be given; () names none.
        adam_learning_rate: the rate of AdamW; None takes `learning_rate`.
        beta: decay rate of the momentum; in [0, 1).
        rms: the root mean square of an update at a rate of one: ``s = rms * sqrt(max(in, out))``.
            With 0.2 it is that of AdamW, so that rates and decay tuned for AdamW can be used. None
            is the scale of Jordan et al., ``s = sqrt(max(1, out / in))``, for rates around 0.02.
        weight_decay, decay, cautious: as in `adamw`, for all parameters.
        side: side inputs of the net.

    Raises:
        LayerError: several kernels may be the last map; a pattern that matches nothing; in
            ``init``, parameters of another net.

    Example:
        >>> net = dp.models.mlp((64, 32), 10)
        >>> optimizer = dp.training.muon(1e-3, net, jnp.ones((2, 8)))
        >>> step = dp.make_step(net, dp.classification(), optimizer)

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982, section 2.2,
    for `rms`.
    """
    partition = muon_partition(net, x, adam=adam, **side)
    params = paths(net.plan(x, **side).params)
    decayed = _decayed({path: params[path] for path, rule in partition.rules.items()
                        if rule.optimizer != "frozen"}, decay)
    decays = _decay(weight_decay, lambda params: _mask(params, decayed), cautious)

    def axes(tree: Any) -> Any:
        return partition.map(lambda rule: rule.axes, tree)

    def scaled(updates: Any, params: Any) -> Any:
        scales = partition.map(lambda rule: _scale(rule, rms), updates)
        return jax.tree.map(jnp.multiply, updates, scales)

    hidden = optax.chain(optax.trace(beta, nesterov=True), _orthogonalized(axes),
                         optax.stateless(scaled), decays,
                         optax.scale_by_learning_rate(learning_rate))
    rest = _adam(learning_rate if adam_learning_rate is None else adam_learning_rate,
                 0.9, 0.999, 1e-8, decays)
    return optax.partition({"muon": hidden, "adamw": rest, "frozen": optax.set_to_zero()},
                           lambda params: partition.map(lambda rule: rule.optimizer, params))


def layerwise_decay(net: Layer, rate: float, *layers: Patterns) -> optax.GradientTransformation:
    """Smaller updates towards the input: ``update *= rate ** (layers between it and the output)``.

    Behind an optimizer it multiplies the learning rate, as in
    ``optax.chain(adamw(1e-3), layerwise_decay(net, 0.75, ...))``: that of the last layer is the
    optimizer's. Leaves inside a `repeat` of n count as n layers, one for each copy.

    Args:
        net: the net that is trained.
        rate: the factor from a layer to the one before; positive, mostly in (0.6, 1).
        layers: the path, or a tuple of paths, of the leaves of each layer, from the input to the
            output; each trainable leaf is in exactly one.

    Raises:
        LayerError: in ``init``: a pattern that matches nothing; a leaf in no layer or in several;
            leaves inside and outside a `repeat` in one.

    Example:
        >>> net = dp.serial(embed=dp.embedding(11, 4), blocks=dp.repeat(2, dp.linear(4)))
        >>> params, state = net.init(jax.random.key(0), jnp.ones(3, int))
        >>> scaling = dp.training.layerwise_decay(net, 0.5, "embed/**", "blocks/**")
        >>> updates, _ = scaling.update(jax.tree.map(jnp.ones_like, params), scaling.init(params))
        >>> float(updates["embed"]["embedding"][0, 0]), updates["blocks"]["bias"][:, 0].tolist()
        (0.25, [0.5, 1.0])

    Source: Clark et al. 2020, arXiv:2003.10555, appendix A; Bao et al. 2022, arXiv:2106.08254.
    """
    check_layer(net, "layerwise_decay(net, rate, *layers)")
    check_positive("rate", rate, "pass 0.75, for example")

    def init(params: Any) -> optax.EmptyState:
        _factors(net, rate, layers, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(jnp.multiply, updates, _factors(net, rate, layers, updates)), state

    return optax.GradientTransformation(init, update)


def warmup_stable_decay(peak: float, warmup: int, stable: int, decay: int) -> optax.Schedule:
    """A schedule of three phases: linearly from 0 to the peak, constant, linearly to 0.

    The rate of step i is ``peak * min(i / warmup, 1, (warmup + stable + decay - i) / decay)``, and
    0 afterwards. A run can be extended from the end of the constant phase.

    Args:
        peak: the largest rate; positive.
        warmup, stable: number of steps of the first two phases; 0 leaves a phase out.
        decay: number of steps of the last phase; positive.

    Raises:
        LayerError: a peak or a number of steps outside its range.

    Example:
        >>> schedule = dp.training.warmup_stable_decay(1e-3, warmup=2, stable=3, decay=4)
        >>> [round(float(schedule(i)) * 1e3, 2) for i in range(10)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    Source: Hu et al. 2024, arXiv:2404.06395, section 4; Hägele et al. 2024, arXiv:2405.18392,
    section 3.
    """
    check_positive("peak", peak, "pass 1e-3, for example")
    check_count("warmup", warmup, least=0)
    check_count("stable", stable, least=0)
    check_count("decay", decay)
    phases = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak),
              optax.linear_schedule(peak, 0.0, decay)]
    return optax.join_schedules(phases, [warmup, warmup + stable])


# Adam and decay.


def _adam(
    learning_rate: Rate, b1: float, b2: float, eps: float, decays: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.scale_by_adam(b1, b2, eps), decays,
                       optax.scale_by_learning_rate(learning_rate))


def _decay(
    weight_decay: float, mask: Callable[[Any], Any], cautious: bool
) -> optax.GradientTransformation:
    """Add ``weight_decay * w`` to the updates of the leaves of a mask."""

    def agreeing(update: Any, w: Any) -> Any:
        agrees = (update * jnp.conj(w)).real >= 0
        return update + jnp.where(agrees, weight_decay * w, 0)

    return optax.masked(optax.stateless_with_tree_map(agreeing) if cautious else
                        optax.add_decayed_weights(weight_decay), mask)


def _decayed(leaves: dict[str, Any], decay: Patterns | None) -> set[str]:
    """The paths of the leaves that decay."""
    if decay is not None:
        return set(select(leaves, *((decay,) if isinstance(decay, str) else decay)))
    found = set()
    for path, leaf in leaves.items():
        name = path.rpartition("/")[2]
        if name in _NOT_DECAYED or np.ndim(leaf) < 2:
            continue
        if name not in _DECAYED:
            raise LayerError(f"a leaf named {listed(_DECAYED | _NOT_DECAYED)}, or decay=",
                             f"{path}, {show(leaf)}",
                             "pass decay= the paths of the leaves that decay, such as '**/kernel'")
        found.add(path)
    return found


def _mask(tree: Any, chosen: Iterable[str]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [path in chosen for path in paths(tree)])


# Muon.


def _orthogonalized(axes: Callable[[Any], Any]) -> optax.GradientTransformation:
    """The Newton-Schulz iteration of each matrix, by optax's Muon without momentum of its own.

    Its momentum corrects the bias of both averages, which is not in the published algorithm.
    """
    iteration = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, eps=1e-7, weight_dimension_numbers=axes)
    return optax.stateless(lambda updates, params: iteration.update(
        updates, iteration.init(updates))[0])


def _scale(rule: Rule, rms: float | None) -> float:
    """The factor of an orthogonalized update."""
    rows, columns = rule.matrix
    return max(1, columns / rows) ** 0.5 if rms is None else rms * max(rows, columns) ** 0.5


# Layer-wise rates.


def _factors(net: Layer, rate: float, layers: tuple[Patterns, ...], tree: Any) -> Any:
    """The factor of each leaf, an array that is broadcast to it."""
    found: dict[str, Any] = {}
    later = 0  # the number of layers between this one and the output
    for layer in reversed(layers):
        leaves = select(tree, *((layer,) if isinstance(layer, str) else layer))
        depths = {path: _depth(net, path, np.shape(leaf)) for path, leaf in leaves.items()}
        if twice := found.keys() & leaves:
            raise LayerError("each leaf in one layer", f"several for {listed(twice)}",
                             "narrow the patterns of one of them")
        if len(sizes := {math.prod(shape) for shape in depths.values()}) != 1:
            raise LayerError("leaves of equally many copies in a layer",
                             f"{layer!r}, of {listed(sizes)}",
                             "write two patterns: each copy in a repeat is a layer")
        for path, shape in depths.items():
            after = np.arange(math.prod(shape))[::-1].reshape(shape) + later
            found[path] = jnp.asarray(rate**after, leaves[path].dtype)
        later += sizes.pop()
    if rest := paths(tree).keys() - found:
        raise LayerError("each leaf in one layer", f"none for {listed(rest)}",
                         "add a pattern, or several for one layer: ('embed/**', 'norm/**')")
    return jax.tree.unflatten(jax.tree.structure(tree), [found[path] for path in paths(tree)])


def _depth(net: Layer, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf with sizes of one, except along the copies of each `repeat`."""
    repeats = [layer.wraps.order == "depth" for layer in layers_around(net, path)
               if layer.wraps and layer.stacks > layer.wraps.layer.stacks]
    return tuple(size if i < len(repeats) and repeats[i] else 1 for i, size in enumerate(shape))
