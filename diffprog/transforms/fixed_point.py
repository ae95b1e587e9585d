"""Deep equilibrium layers: one layer applied until its output no longer changes.

The derivative does not go through the solver. For ``z = f(z, x)`` the implicit function theorem
gives ``dz = (1 - df/dz)^-1 df/dx dx``, one linear equation, which the same solver solves. Memory
therefore does not grow with the number of iterations.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_positive
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, around, as_layer
from diffprog.core.loops import once
from diffprog.core.meshes import settled
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths
from diffprog.core.plans import Params, Plan, State, blank, example_axes, remember, spec
from diffprog.core.streams import note_of, noted, recalled, without
from diffprog.transforms.tap import is_output

__all__ = ["fixed_point"]

_MEMORY = 5  # iterates that Anderson acceleration averages
_DAMPING = 1e-6  # keeps their Gram matrix invertible; its diagonal is 1


@factory
def fixed_point(layer: Any, *, tolerance: float | None = None, steps: int = 200) -> Layer:
    """The fixed point of a layer, a net of infinite depth: the z with ``z = f((z, x))``.

    z is found by Anderson acceleration from zeros, and differentiated by the implicit function
    theorem, in forward and reverse mode and to any order. Memory is that of one application. All
    applications share one key, so that with dropout, too, f is one function. Inside a loop, such as
    that of `repeat`, JAX cannot take the gradient of a gradient; use `jax.jvp` of a gradient there,
    or ``repeat(n, ..., unroll=n)``.

    **Each example is solved separately**: it stops when it has converged, while the others go on,
    so no example affects the accuracy of another. f is applied as often as the slowest example
    needs. The first axis is the batch axis if f, planned with a batch of one more, returns one more
    example and needs the same parameters. Otherwise x is solved as a whole.

    **Examples that do not converge are NaN**, in z or in its derivative. If f is a contraction in
    z, there is one fixed point, and it is found; the solver also often converges where plain
    iteration oscillates. Start with small kernels on z, such as
    ``kernel_init=jax.nn.initializers.normal(0.5 / sqrt(width))``, and end f in ``layer_norm`` or
    `jnp.tanh`. To find out why it fails, iterate by hand: ``z = layer(params, (z, x))``.

    A causal f streams: the solution for a chunk depends on those of the chunks before it.

    Shapes:
        x: floats of any shape, or a pytree; y: as x. params: the layer's.

    Args:
        layer: a stateless layer of the pair (z, x), which returns z with the shape and dtype of x.
        tolerance: the largest entry of ``f((z, x)) - z`` in an example, as a fraction of the
            largest entry of its z; positive. The same holds for derivatives. None is
            ``eps ** 0.75`` of the dtype of x, 6e-6 in float32, and computes products in full
            precision. If f is less precise, by TF32 or in `mixed`, pass what it can reach.
        steps: the largest number of applications of f; positive.

    Raises:
        LayerError: at composition for a tolerance that is not a positive number; at ``init``, if
            the layer has state or changes the shape or dtype of z, or x holds integers.

    Example:
        >>> f = dp.parallel(dp.linear(4, kernel_init=jax.nn.initializers.normal(0.1)), dp.linear(4))
        >>> net = dp.fixed_point(f >> dp.add >> jnp.tanh)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> net(params, jnp.ones((2, 4))).shape
        (2, 4)

    Source: Bai, Kolter, Koltun 2019, arXiv:1909.01377, eq. 7 and theorem 1.
    """
    layer = as_layer(layer)
    check_count("steps", steps)
    if tolerance is not None:
        check_positive("tolerance", tolerance,
                       "pass 1e-4, for example, or None for the default of the dtype")
    net = _FixedPoint(layer, tolerance, steps)
    return Layer(
        net.init, net.apply, layer.start and net.start, layer.children,
        **around(layer, lambda layer: fixed_point(layer, tolerance=tolerance, steps=steps),
                 order="fixed point"),
        name="fixed_point",
        bare=layer.bare, random=layer.random, side=layer.side, kept=layer.kept, planner=net.plan,
        computed=layer.computed, stacks=layer.stacks,
    )


class _FixedPoint:
    """The functions of the layer `fixed_point`: plan, init, apply and start."""

    def __init__(self, layer: Layer, tolerance: float | None, steps: int) -> None:
        self.layer, self.tolerance, self.steps = layer, tolerance, steps
        self.plan = remember(self._plan)  # (x, side) -> Plan
        self.batch = remember(self._batch)  # (x, side) -> int | None
        self.solved_once = once(self.solved, "train", "batch")

    def _plan(self, x: Any, side: dict[str, Any]) -> Plan:
        for leaf in jax.tree.leaves(x):
            check_array(leaf)
        plan = self.layer.plan((x, x), **side)
        # The outputs that `tap` writes into the state are allowed: they are those of the solution.
        held = [path for path in paths(plan.state) if not any(map(is_output, path.split("/")))]
        if held:
            raise LayerError("a layer without state", listed(held),
                             "use layer_norm in place of batch_norm: the solver applies the layer "
                             "many times per call")
        if spec(plan.y) != spec(x):
            raise LayerError(f"a layer that keeps the shape and dtype of z, {show(x)}",
                             show(plan.y), "let its output have the shape and dtype of x")
        return Plan(plan.params, plan.state, plan.y, plan.calls)

    def _batch(self, x: Any, side: dict[str, Any]) -> int | None:
        """The batch size, on the first axis of each leaf of x; None if x is solved as a whole."""
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
        batch = sizes.pop() if len(sizes) == 1 else None
        if batch is None:
            return None

        def run(x: Any, side: dict[str, Any] = side) -> Any:
            plan = self.layer.plan((x, x), **side)
            return blank((plan.params, plan.y))

        # A side input may have the length of the batch by chance: then only x gets one more.
        for given in ((x, side), (x,)):
            with contextlib.suppress(Exception):  # f cannot take one more: not a batch axis
                params, y = example_axes(run, batch, *given)
                if {*jax.tree.leaves(params)} <= {-1} and {*jax.tree.leaves(y)} == {0}:
                    return batch
        return None

    def init(self, key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return self.layer.init(key, (x, x), **side)

    def apply(self, params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        note = note_of(state)
        batch = self.batch(spec(x), recalled(note) | spec(side))
        y, new = self.solved_once(
            params, without(state, note), x, key, side, train=train, batch=batch)
        return y, {**new, **note}

    def solved(self, params: Params, state: State, x: Any, key: jax.Array | None,
               side: dict[str, Any], *, train: bool, batch: int | None) -> tuple[Any, State]:
        """The fixed point, and the state after one more application at it."""

        def f(z: Any) -> tuple[Any, State]:
            return self.layer.apply(params, state, (z, x), key=key, train=train, **side)

        if self.tolerance is None:
            tolerance, precision = _default_tolerance(x), jax.default_matmul_precision("highest")
        else:
            tolerance, precision = self.tolerance, contextlib.nullcontext()
        with precision:
            z = _root(lambda z: f(z)[0], blank(spec(x)), batch, tolerance, self.steps)
            return z, f(z)[1] if state else state

    def start(
        self, params: Params, state: State, x: Any, *, length: int, **side: Any
    ) -> State:
        carried = self.layer.start(params, state, (x, x), length=length, **side)
        return noted(self.layer, carried, side)


def _default_tolerance(x: Any) -> float:
    """A tolerance above the rounding errors of the coarsest dtype in x."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x)) ** 0.75


def _root(
    f: Callable[[Any], Any], zeros: Any, batch: int | None, tolerance: float, steps: int
) -> Any:
    """The z with ``z = f(z)``, with its derivatives; NaN where the solver does not converge."""
    zeros = settled(lambda z, _: f(z), zeros)
    solver = _Anderson(zeros, batch, tolerance, steps)

    def residual(z: Any) -> Any:
        return jax.tree.map(jnp.subtract, z, f(z))

    def linear_solve(linear: Callable[[Any], Any], b: Any) -> Any:
        """The u with ``linear(u) = b``, as the fixed point of ``u - linear(u) + b``.

        `linear` is the derivative of `residual`, 1 - df/dz, so that this is ``df/dz u + b``.
        """
        return solver.solve(lambda u: jax.tree.map(
            lambda u, image, b: u - image + b, u, linear(u), b))

    def tangent_solve(linear: Callable[[Any], Any], b: Any) -> Any:
        return jax.lax.custom_linear_solve(linear, b, linear_solve, transpose_solve=linear_solve)

    return jax.lax.custom_root(
        residual, zeros, lambda residual, zeros: solver.solve(f), tangent_solve)


class _Iteration(NamedTuple):
    """The carry of the solver's loop: M iterates of R rows (examples) of N numbers."""

    count: Any  # applications of f so far
    z: jax.Array  # (R, N), the last argument of f
    y: jax.Array  # (R, N), f(z)
    ys: jax.Array  # (M, R, N), the last values of f
    residuals: jax.Array  # (M, R, N), each y - z
    active: jax.Array  # (R,), the rows that have not converged


class _Anderson:
    """Anderson acceleration: the next z is a mean of the last f(z), weighted by small residuals.

    Each row, an example, has weights of its own and stops when it has converged. If f mixes
    examples, a row goes on when another moves it away again, so that all converge at the same z.

    Source: Walker, Ni 2011, doi:10.1137/10078356X, section 2, with ``beta = 1``.
    """

    def __init__(self, zeros: Any, batch: int | None, tolerance: float, steps: int) -> None:
        self.rows = _Rows(zeros, batch)
        self.zeros, self.tolerance, self.steps = zeros, tolerance, steps

    def solve(self, f: Callable[[Any], Any]) -> Any:
        """The z with ``z = f(z)``; NaN where it is not found within the steps."""

        def step(z: jax.Array) -> jax.Array:                             # (R, N) -> (R, N)
            return self.rows.pack(f(self.rows.unpack(z)))

        def goes_on(at: _Iteration) -> jax.Array:
            return jnp.any(at.active) & (at.count < self.steps)

        def iterate(at: _Iteration) -> _Iteration:
            mean = jnp.einsum("mr,mrn->rn", _weights(at.residuals), at.ys)
            z = jnp.where(at.active[:, None], mean, at.z)
            y = step(z)
            active = self.unconverged(z, y)
            slot, updated = at.count % _MEMORY, (at.active | active)[:, None]
            residual = y - z
            ys = at.ys.at[slot].set(jnp.where(updated, y, at.ys[slot]))
            residuals = at.residuals.at[slot].set(
                jnp.where(updated, residual, at.residuals[slot]))
            return _Iteration(at.count + 1, z, y, ys, residuals, active)

        z = self.rows.pack(self.zeros)
        y = step(z)
        copies = jnp.broadcast_to(y, (_MEMORY, *y.shape))                # y - z is y: z is zero
        first = _Iteration(1, z, y, copies, copies, self.unconverged(z, y))
        last = jax.lax.while_loop(goes_on, iterate, first)
        found = ~last.active[:, None] & jnp.isfinite(last.y)
        return self.rows.unpack(jnp.where(found, last.y, jnp.nan))

    def unconverged(self, z: jax.Array, y: jax.Array) -> jax.Array:
        """The rows (R,) in which an entry of y - z exceeds the tolerance, relative to y."""
        finite = jnp.isfinite(y)  # other entries are solved in spite of those that are not

        def largest(a: jax.Array) -> jax.Array:
            return jnp.max(jnp.abs(jnp.where(finite, a, 0)), axis=1, initial=0)

        return ~(largest(y - z) <= self.tolerance * largest(y))


def _weights(residuals: jax.Array) -> jax.Array:
    """The weights (M, R), with sum 1 over M, that make the mean of residuals (M, R, N) small.

    They solve the normal equations, with residuals scaled to length 1 to be well conditioned.
    """
    residuals = jnp.where(jnp.isfinite(residuals), residuals, 0)
    tiny = jnp.finfo(residuals.dtype).tiny
    norms = jnp.linalg.norm(residuals, axis=-1, keepdims=True) + tiny    # (M, R, 1)
    unit = residuals / norms
    scale = (norms.min(0, keepdims=True) / norms)[..., 0].T              # (R, M)
    damping = _DAMPING * jnp.eye(_MEMORY, dtype=unit.dtype)[None]
    gram = jnp.einsum("mrn,krn->rmk", unit, unit) + damping              # (R, M, M)
    weights = scale * jnp.linalg.solve(gram, scale[..., None])[..., 0]   # (R, M)
    return (weights / jnp.sum(weights, axis=1, keepdims=True)).T


class _Rows:
    """Trees of given shapes as one matrix of float32 or wider, and back.

    The matrix has `batch` rows, the entries of the first axis of every leaf; if None, one row.
    """

    def __init__(self, like: Any, batch: int | None) -> None:
        self.leaves, self.structure = jax.tree.flatten(like)
        self.count = 1 if batch is None else batch
        self.sizes = [leaf.size if batch is None else math.prod(leaf.shape[1:])
                      for leaf in self.leaves]
        self.dtype = joint(jnp.float32, *self.leaves)

    def pack(self, tree: Any) -> jax.Array:
        parts = [leaf.reshape(self.count, size).astype(self.dtype)
                 for leaf, size in zip(jax.tree.leaves(tree), self.sizes, strict=True)]
        return jnp.concatenate(parts, axis=1)                            # (R, N)

    def unpack(self, matrix: jax.Array) -> Any:
        ends = list(itertools.accumulate(self.sizes))
        parts = jnp.split(matrix, ends[:-1], axis=1)
        return self.structure.unflatten([
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, self.leaves, strict=True)])
