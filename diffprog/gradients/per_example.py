"""What each example alone says of the parameters: its gradient, and what it shares with others.

An example is a batch of one, so that layers, losses and masks mean for it what they mean in
training. Nothing may mix the examples of a batch, then; the statistics of a batch do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.nets import check_moves, computes, statistics, trained
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths
from diffprog.core.plans import Params, State
from diffprog.data.batches import as_batch, examples_in
from diffprog.gradients.curvature import check_reaches
from diffprog.training.objectives import Objective

__all__ = ["per_example_gradient_norms", "per_example_gradients", "tangent_kernel"]


def per_example_gradients(
    net: Layer, objective: Objective, params: Params, state: State, batch: Any, *,
    key: jax.Array | None = None, train: bool = False,
) -> Params:
    """The gradient of the objective on each example of a batch: ``g_i = grad loss(x_i, y_i)``.

    Of a loss that is a mean over examples their mean is the gradient of the batch; where a mask
    leaves examples unlike numbers of real entries, each counts with its own. A `sample_weight`
    cancels in the mean over one example: the gradient of the batch is the mean that it weighs. The
    operations are those of one gradient of the batch. The memory is that of the result, batch times
    parameters: `per_example_gradient_norms` needs less.

    It is the gradient in what is `trainable`: what is frozen is left out of the result.

    Shapes:
        batch: arrays (B, ...). Each leaf of the result: (B, *that of the parameter).

    Args:
        net: a layer.
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``.
        params, state: of the net; the state stays as it is.
        batch: of examples, as the objective takes it. One that compares them with each other, as
            a contrastive one does, sees one at a time here.
        key: of randomness, split into one for each example.
        train: as in `apply`. A net with statistics is refused in training, unless it is pinned to
            inference: those of a batch mix examples and are those of one alone here. A net with
            averages, as `ema` has, is refused at rest, where it computes with these and no
            parameter has a gradient.

    Raises:
        LayerError: arrays of several lengths; ``train=True`` for a net with statistics, or
            ``train=False`` for one with averages; a net that is frozen; what the objective and the
            net refuse.

    Example:
        >>> net, x, y = dp.linear(3), jnp.ones((2, 4)), jnp.array([0, 2])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> gradients = dp.gradients.per_example_gradients(
        ...     net, dp.classification(), params, state, (x, y))
        >>> gradients["kernel"].shape
        (2, 4, 3)
    """
    batch, keys = _examples(net, batch, state, key, train)
    return jax.vmap(_gradient(net, objective, params, state, train))(batch, keys)


def per_example_gradient_norms(
    net: Layer, objective: Objective, params: Params, state: State, batch: Any, *,
    key: jax.Array | None = None, train: bool = False, batch_size: int | None = None,
) -> jax.Array:
    """The length of the gradient on each example, over all that is trained: ``|g_i|``, (B,).

    Args:
        net, objective, params, state, batch, key, train: as in `per_example_gradients`.
        batch_size: how many examples are taken at a time, one group after the other, so that memory
            is at most this many times the parameters; all at once if None.

    Raises:
        LayerError: as `per_example_gradients` does.

    Example:
        >>> net, x, y = dp.linear(1, bias=False), jnp.array([[3.0], [0.0]]), jnp.zeros((2, 1))
        >>> dp.gradients.per_example_gradient_norms(
        ...     net, dp.regression(), {"kernel": jnp.ones((1, 1))}, {}, (x, y)).tolist()
        [18.0, 0.0]

    Source: such norms are clipped in Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    batch, keys = _examples(net, batch, state, key, train)
    gradient = _gradient(net, objective, params, state, train)

    def norm(pair: Any) -> jax.Array:
        leaves = jax.tree.leaves(gradient(*pair))
        return jnp.sqrt(sum(jnp.vdot(g, g).astype(joint(*leaves)) for g in leaves))

    if batch_size is None:
        return jax.vmap(norm)((batch, keys))
    check_count("batch_size", batch_size)
    return jax.lax.map(norm, (batch, keys), batch_size=batch_size)


def tangent_kernel(
    net: Any, params: Any, x1: Any, x2: Any = None, *, batch_size: int = 1
) -> jax.Array:
    """The empirical neural tangent kernel: ``K(x1, x2) = J(x1) J(x2)^T``.

    J is the Jacobian of the outputs in the parameters; neither is kept. Rows of J(x2) are pulled
    back one example at a time, and pushed through the net at x1. That takes one gradient for each
    output of each example of x2, and for each of them one derivative along a direction, two
    evaluations, on all of x1. The memory is that of `batch_size` times outputs gradients, and of
    as many evaluations on x1.

    Shapes:
        x1, x2: (n1, ...), (n2, ...), with outputs (n1, *outputs), (n2, *outputs).
        Returns (n1, n2, *outputs, *outputs); ``jnp.trace(kernel, axis1=2, axis2=3)`` leaves the
        (n1, n2) that serves for many outputs.

    Args:
        net: a layer, or any function ``(params, x) -> y``, at rest; a net with state is
            ``functools.partial(net, state=state)``, and x may be a dict whose parts a function
            gives to x and side inputs. It must not mix examples; forward mode must get through.
        params: a tree of floating-point arrays; of a layer what is `trainable` counts.
        x1, x2: trees of arrays with a first axis of examples; x2 is x1 if None.
        batch_size: how many examples of x2 are taken at a time.

    Raises:
        LayerError: arrays of several lengths; the output is no array with an axis of examples, or
            does not depend on the parameters; averages, as `ema` has, are used at rest.

    Example:
        >>> net, x = dp.linear(1, bias=False), jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> params, _ = net.init(jax.random.key(0), x)
        >>> dp.gradients.tangent_kernel(net, params, x)[..., 0, 0].tolist()
        [[1.0, 1.0], [1.0, 5.0]]

    Source: Jacot, Gabriel, Hongler 2018, arXiv:1806.07572; of the ways to compute it, "NTK-vector
    products" of Novak, Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720.
    """
    x1, x2 = as_batch((x1, x1 if x2 is None else x2))
    n1, n2 = examples_in(x1), examples_in(x2)
    check_count("batch_size", batch_size)
    params, run = _of_trained(net, params, x1)
    outputs, push = jax.linearize(lambda params: run(params, x1), params)
    check_array(outputs, 1)
    if outputs.shape[0] != n1:
        raise LayerError(f"an output for each of {n1} examples", show(outputs),
                         "keep the first axis of x")
    check_reaches(push, params)

    def pairs(example: Any) -> jax.Array:
        """The kernel of all of x1 with one example: (outputs of it, n1, *outputs)."""
        y, pull = jax.vjp(lambda params: run(params, _batch_of_one(example)), params)
        rows = jnp.eye(y.size, dtype=y.dtype).reshape(y.size, *y.shape)
        return jax.vmap(lambda row: push(*pull(row)))(rows)

    kernel = jax.lax.map(pairs, x2, batch_size=batch_size)
    shape = outputs.shape[1:]
    return jnp.moveaxis(kernel, 1, -1).swapaxes(0, 1).reshape(n1, n2, *shape, *shape)


def _of_trained(net: Any, params: Any, x: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """What is trained of the parameters, and the net as a function of it; all of a function."""
    layer = net.func if isinstance(net, functools.partial) else net
    if not isinstance(layer, Layer):
        return params, net
    if computes(layer, layer.computed):
        jax.eval_shape(net, params, x)  # by which it is known what is computed
    check_moves(layer, params, "pass the plain net with the trees that dp.tree.merge(net, params, "
                "state) gives: it computes with these at rest")
    part, whole = trained(layer, params)
    return part, lambda part, x: net(whole(part), x)


def _gradient(
    net: Layer, objective: Objective, params: Params, state: State, train: bool
) -> Callable[[Any, jax.Array | None], Params]:
    """The gradient of the objective on one example, in what is trained."""

    def gradient(example: Any, key: jax.Array | None) -> Params:
        def loss(params: Params) -> jax.Array:
            batch = _batch_of_one(example)
            return objective(net, params, state, batch, key=key, train=train)[0]

        if computes(net, net.computed):
            jax.eval_shape(loss, params)  # by which it is known what is computed
        if not train:
            check_moves(net, params, "pass train=True, or the plain net with the trees that "
                        "dp.tree.merge(net, params, state) gives: it computes with these at rest")
        part, whole = trained(net, params)
        return jax.grad(lambda part: loss(whole(part)))(part)

    return gradient


def _examples(
    net: Layer, batch: Any, state: State, key: jax.Array | None, train: bool
) -> tuple[Any, jax.Array | None]:
    """The batch and a key for each example; raise where these would not be as in the batch."""
    batch = as_batch(batch)
    n = examples_in(batch)
    if mixing := statistics(net, state, train):
        if train:
            raise LayerError("train=False for a net with state",
                             f"train=True and {listed(paths(mixing))}",
                             "leave train out: batch statistics mix the examples of a batch")
        raise LayerError("a net whose statistics are those at rest",
                         f"{listed(paths(mixing))} of what is pinned to training",
                         "leave pin out: batch statistics mix the examples of a batch")
    return batch, None if key is None else jax.random.split(key, n)


def _batch_of_one(example: Any) -> Any:
    return jax.tree.map(lambda a: a[None], example)
