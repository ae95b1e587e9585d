"""Per-example gradients, their norms, and the neural tangent kernel.

An example is a batch of one, so that layers, losses and masks work as in training. The net must not
mix the examples of a batch, as batch statistics do.
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

    If the loss is a mean over examples, the mean of the gradients is that of the batch. With masks,
    examples must be weighted by their numbers of valid entries to get the gradient of the batch,
    and with `sample_weight` by that, since it cancels in the mean over a single example. The
    computation is that of one gradient of the batch; the memory is that of the result, batch times
    parameters. `per_example_gradient_norms` needs less.

    The result holds the `trainable` parameters; frozen ones are left out.

    Shapes:
        batch: arrays (B, ...). Each leaf of the result: (B, *shape of the parameter).

    Args:
        net: a layer.
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``.
        params, state: of the net; the state is not updated.
        batch: a batch of the objective. An objective that compares examples, such as a contrastive
            one, gets them one at a time.
        key: of randomness, split into one key per example.
        train: as in `apply`. True raises for a net with batch statistics, which mix examples,
            unless they are pinned to inference. False raises for a net with averages, as of `ema`:
            inference uses the averages, so that no parameter has a gradient.

    Raises:
        LayerError: arrays of different lengths; ``train=True`` for a net with batch statistics, or
            ``train=False`` for one with averages; a frozen net; as the objective and the net do.

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
    """The norm of the gradient on each example, over all trained parameters: ``|g_i|``, (B,).

    Args:
        net, objective, params, state, batch, key, train: as in `per_example_gradients`.
        batch_size: examples at a time; the memory is at most this many times the parameters. None
            takes all at once.

    Raises:
        LayerError: as `per_example_gradients` does.

    Example:
        >>> net, x, y = dp.linear(1, bias=False), jnp.array([[3.0], [0.0]]), jnp.zeros((2, 1))
        >>> dp.gradients.per_example_gradient_norms(
        ...     net, dp.regression(), {"kernel": jnp.ones((1, 1))}, {}, (x, y)).tolist()
        [18.0, 0.0]

    Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1, which clips these norms.
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

    J is the Jacobian of the outputs with respect to the parameters; it is never stored. A row of
    J(x2) is computed in reverse mode, and multiplied by J(x1) in forward mode. Each output of each
    example of x2 thus costs one gradient, and one directional derivative (two evaluations) on all
    of x1. The memory is that of ``batch_size * outputs`` gradients, and of as many evaluations on
    x1.

    Shapes:
        x1, x2: (n1, ...), (n2, ...), with outputs (n1, *outputs), (n2, *outputs).
        Returns (n1, n2, *outputs, *outputs); for one number per pair of examples, (n1, n2), take
        ``jnp.trace(kernel, axis1=2, axis2=3)``.

    Args:
        net: a layer, or any function ``(params, x) -> y``, in inference. Pass a net with state as
            ``functools.partial(net, state=state)``, and one with side inputs as a function of a
            dict x. It must not mix examples, and must support forward mode.
        params: a tree of floating-point arrays; of a layer the kernel is over the `trainable` ones.
        x1, x2: trees of arrays with the batch axis first; x2 is x1 if None.
        batch_size: examples of x2 at a time.

    Raises:
        LayerError: arrays of different lengths; the output is no array with a batch axis, or does
            not depend on the parameters; the net uses averages in inference, as `ema` does.

    Example:
        >>> net, x = dp.linear(1, bias=False), jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> params, _ = net.init(jax.random.key(0), x)
        >>> dp.gradients.tangent_kernel(net, params, x)[..., 0, 0].tolist()
        [[1.0, 1.0], [1.0, 5.0]]

    Source: Jacot, Gabriel, Hongler 2018, arXiv:1806.07572; computed by the "NTK-vector products" of
    Novak, Sohl-Dickstein, Schoenholz 2022, arXiv:2206.08720.
    """
    x1, x2 = as_batch((x1, x1 if x2 is None else x2))
    n1, n2 = examples_in(x1), examples_in(x2)
    check_count("batch_size", batch_size)
    params, run = _trained_part(net, params, x1)
    outputs, push = jax.linearize(lambda params: run(params, x1), params)
    check_array(outputs, 1)
    if outputs.shape[0] != n1:
        raise LayerError(f"one output per example, {n1} in all", show(outputs),
                         "keep the first axis of x")
    check_reaches(push, params)

    def pairs(example: Any) -> jax.Array:
        """The kernel of one example of x2 with all of x1, (m, n1, *outputs), for its m outputs."""
        y, pull = jax.vjp(lambda params: run(params, _batch_of_one(example)), params)
        rows = jnp.eye(y.size, dtype=y.dtype).reshape(y.size, *y.shape)     # (m, 1, *outputs)
        return jax.vmap(lambda row: push(*pull(row)))(rows)

    kernel = jax.lax.map(pairs, x2, batch_size=batch_size)                  # (n2, m, n1, *outputs)
    kernel = jnp.moveaxis(kernel, 1, -1).swapaxes(0, 1)                     # (n1, n2, *outputs, m)
    shape = outputs.shape[1:]
    return kernel.reshape(n1, n2, *shape, *shape)


def _trained_part(net: Any, params: Any, x: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The trained parameters, and the net as a function of them; of a function all parameters."""
    layer = net.func if isinstance(net, functools.partial) else net
    if not isinstance(layer, Layer):
        return params, net
    if computes(layer, layer.computed):
        jax.eval_shape(net, params, x)  # records which parameters are computed
    check_moves(layer, params, "pass the plain net with the trees of dp.tree.merge(net, params, "
                "state), which inference uses")
    part, whole = trained(layer, params)
    return part, lambda part, x: net(whole(part), x)


def _gradient(
    net: Layer, objective: Objective, params: Params, state: State, train: bool
) -> Callable[[Any, jax.Array | None], Params]:
    """The gradient of the objective on one example, with respect to the trained parameters."""

    def gradient(example: Any, key: jax.Array | None) -> Params:
        def loss(params: Params) -> jax.Array:
            batch = _batch_of_one(example)
            return objective(net, params, state, batch, key=key, train=train)[0]

        if computes(net, net.computed):
            jax.eval_shape(loss, params)  # records which parameters are computed
        if not train:
            check_moves(net, params, "pass train=True, or the plain net with the trees of "
                        "dp.tree.merge(net, params, state), which inference uses")
        part, whole = trained(net, params)
        return jax.grad(lambda part: loss(whole(part)))(part)

    return gradient


def _examples(
    net: Layer, batch: Any, state: State, key: jax.Array | None, train: bool
) -> tuple[Any, jax.Array | None]:
    """The batch and one key per example; raise if the net mixes examples."""
    batch = as_batch(batch)
    n = examples_in(batch)
    if mixing := statistics(net, state, train):
        if train:
            raise LayerError("train=False for a net with batch statistics",
                             f"train=True and {listed(paths(mixing))}",
                             "leave train out: batch statistics mix the examples of a batch")
        raise LayerError("a net that uses running statistics",
                         f"{listed(paths(mixing))} pinned to training",
                         "leave pin out: batch statistics mix the examples of a batch")
    return batch, None if key is None else jax.random.split(key, n)


def _batch_of_one(example: Any) -> Any:
    """The example with a batch axis of size 1."""
    return jax.tree.map(lambda a: a[None], example)
