"""Norms and histograms of gradients and activations while a net is trained.

Both are of one batch, the same at each reading, so that readings can be compared. It begins a
sequence of its own: the stream of a state is not continued.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from diffprog.core.arguments import held
from diffprog.core.layer import Layer
from diffprog.core.paths import joined, paths, select
from diffprog.core.plans import Params, State
from diffprog.runtime.watching import Measured, Observer, measured, record
from diffprog.training.objectives import Objective, checked
from diffprog.training.step import without_stream
from diffprog.transforms.tap import tap

__all__ = ["watch_activations", "watch_gradients"]


def watch_gradients(
    net: Layer, objective: Objective, batch: Any, pattern: str, *, key: jax.Array | None = None,
) -> Observer:
    """An observer that adds norms and histograms of the gradient of a batch, by parameter.

    The metrics are ``gradient_norm/<path>`` and ``gradient_histogram/<path>``, as those of
    `dp.runtime.watch`, of the gradient in a training step, before the optimizer clips it.

    Args:
        net: the layer that is trained.
        objective: as in `make_step`.
        batch: as the objective takes it.
        pattern: of paths of parameters, in which ``*`` is one level and ``**`` any number.
        key: for random layers.

    Returns:
        ``(step, state, metrics)``, where state is a `TrainState`.

    Raises:
        LayerError: at the first call, if the pattern matches nothing, or as net and objective do.

    Example:
        >>> net, objective = dp.linear(3), dp.classification()
        >>> batch = jnp.ones((2, 4)), jnp.array([0, 2])
        >>> watch = dp.inspection.watch_gradients(net, objective, batch, "kernel")
        >>> step = dp.make_step(net, objective, optax.sgd(0.1))
        >>> result = dp.fit(step, [batch], steps=1, key=jax.random.key(0), progress=False,
        ...                 log=[watch, lambda number, metrics: print(*metrics)])
        accuracy loss gradient_norm/kernel gradient_histogram/kernel
    """
    batch, inputs = held(batch), functools.partial(checked(objective).inputs, net)

    @jax.jit
    def gradient(params: Params, state: State, batch: Any) -> Measured:
        def loss(params: Params) -> jax.Array:
            return objective(net, params, state, batch, key=key, train=True)[0]

        return measured(select(jax.grad(loss)(params), pattern))

    def add(step: int, state: Any, metrics: dict[str, Any]) -> None:
        held_state = without_stream(net, inputs, state.state, batch)
        record(metrics, gradient(state.params, held_state, batch), "gradient_")

    return add


def watch_activations(net: Layer, x: Any, pattern: str, **side: Any) -> Observer:
    """An observer that adds norms and histograms of the outputs of inner layers, in inference.

    The metrics are ``activation_norm/<path>`` and ``activation_histogram/<path>``, as those of
    `dp.runtime.watch`. The outputs of the copies of a `repeat` count together.

    Args:
        net: the layer that is trained.
        x, side: inputs of the net.
        pattern: of paths of layers, as `tap` takes it.

    Returns:
        ``(step, state, metrics)``, where state is a `TrainState`.

    Raises:
        LayerError: as `tap` does; the pattern is tried at once.

    Example:
        >>> net, x = dp.serial(dp.linear(8), jax.nn.relu, dp.linear(3)), jnp.ones((2, 4))
        >>> watch = dp.inspection.watch_activations(net, x, "relu~0")
        >>> step = dp.make_step(net, dp.classification(), optax.sgd(0.1))
        >>> metrics = {"loss": 0.5}
        >>> watch(0, step.init(jax.random.key(0), x), metrics)
        >>> list(metrics)
        ['loss', 'activation_norm/relu~0', 'activation_histogram/relu~0']
    """
    tapped, given = tap(net, pattern), held((x, side))

    @jax.jit
    def activations(params: Params, state: State, given: Any) -> Measured:
        x, side = given
        (_, seen), _ = tapped.apply(params, state, x, **side)
        leaves = {joined(path, inner): leaf
                  for path, output in seen.items() for inner, leaf in paths(output).items()}
        return measured(leaves)

    def add(step: int, state: Any, metrics: dict[str, Any]) -> None:
        held_state = without_stream(net, lambda given: given, state.state, given)
        record(metrics, activations(state.params, held_state, given), "activation_")

    return add
