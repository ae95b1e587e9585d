"""Infinite depth: one layer applied until nothing changes any more.

The solver is no part of the derivative. Where ``z = f(z, x)``, the implicit function theorem gives
``dz = (1 - df/dz)^-1 df/dx dx``, one linear equation, which the same solver solves: so memory does
not grow with the number of iterations.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, is_number
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

_MEMORY = 5  # iterates that Anderson acceleration looks back on
_DAMPING = 1e-6  # keeps their Gram matrix invertible; its diagonal is 1


@factory
def fixed_point(layer: Any, *, tolerance: float | None = None, steps: int = 200) -> Layer:
    """Apply a layer infinitely often with the same parameters: the z with ``z = f((z, x))``.

    z is found by Anderson acceleration from zeros, and differentiated by the implicit function
    theorem, in both modes and to any order: memory is that of one application. All applications
    share one key, so that with dropout too there is one function to be at rest in. Within a loop,
    such as that of `repeat`, JAX refuses the gradient of a gradient; `jax.jvp` of a gradient goes,
    and so does ``repeat(n, ..., unroll=n)``.

    **Each example is solved for itself**: one that has come to rest stays as it is while the others
    go on, so none decides for another how exactly it is solved; f is applied as often as the
    slowest needs. Examples are on the first axis if f, planned with one more, gives one more and
    wants the same parameters; else x is solved as a whole.

    **What was not found is not returned**: an example of z, or of its derivative, is NaN where the
    tolerance is not reached. A layer that brings any two z nearer has one fixed point, and it is
    found; where plain iteration swings, the solver often comes to rest all the same. Begin with
    small kernels on z, such as ``kernel_init=jax.nn.initializers.normal(0.5 / sqrt(width))``, and
    end in ``layer_norm`` or `jnp.tanh`. Where it fails, look on: ``z = layer(params, (z, x))``.

    A causal f streams: the solution for a chunk rests on the solutions of those before it.

    Shapes:
        x: floats of any shape, a pytree too; y: as x. params: the layer's.

    Args:
        layer: a stateless layer of the pair (z, x), which gives a z of the shape and dtype of x.
        tolerance: the largest entry of ``f((z, x)) - z`` that is left in an example, as a share of
            the largest entry of its z; positive. The same holds for derivatives. None is
            ``eps ** 0.75`` of the dtype of x, 6e-6 in float32, and computes products in full
            precision; where f is coarser than that, by TF32 or in `mixed`, pass what it can reach.
        steps: how often f is applied at most; positive.

    Raises:
        LayerError: at composition for a tolerance that is no positive number; at ``init``, if the
            layer has state or changes the shape or dtype of z, or x holds integers.

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
    if tolerance is not None and (not is_number(tolerance) or not tolerance > 0):
        raise LayerError("tolerance as a positive number", repr(tolerance),
                         "pass 1e-4, for example, or None for that of the dtype")

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        for leaf in jax.tree.leaves(x):
            check_array(leaf)
        plan = layer.plan((x, x), **side)
        # What `tap` reads off is no state: it is that of the solution.
        if held := [path for path in paths(plan.state)
                    if not any(map(is_output, path.split("/")))]:
            raise LayerError("a layer without state", listed(held),
                             "use layer_norm for batch_norm: a step of the solver is no call")
        if spec(plan.y) != spec(x):
            raise LayerError(f"a layer that gives z as it is, {show(x)}", show(plan.y),
                             "let its output have the shape and dtype of x")
        return Plan(plan.params, plan.state, plan.y, plan.calls)

    @remember
    def rows(x: Any, side: dict[str, Any]) -> int | None:
        """How many examples x has, on the first axis of each leaf; None if it is one whole."""
        counts = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
        count = counts.pop() if len(counts) == 1 else None
        if count is None:
            return None

        def run(x: Any, side: dict[str, Any] = side) -> Any:
            plan = layer.plan((x, x), **side)
            return blank((plan.params, plan.y))

        # A side input may be as long without being of examples: then x has one more than it.
        for given in ((x, side), (x,)):
            with contextlib.suppress(Exception):  # where one more cannot be, axis 0 is another
                params, y = example_axes(run, count, *given)
                if {*jax.tree.leaves(params)} <= {-1} and {*jax.tree.leaves(y)} == {0}:
                    return count
        return None

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        return layer.init(key, (x, x), **side)

    def solved(params: Params, state: State, x: Any, key: jax.Array | None, side: dict[str, Any], *,
               train: bool, count: int | None) -> tuple[Any, State]:
        def f(z: Any) -> tuple[Any, State]:
            return layer.apply(params, state, (z, x), key=key, train=train, **side)

        exact = jax.default_matmul_precision("highest") if tolerance is None else (
            contextlib.nullcontext())
        with exact:
            z = _root(lambda z: f(z)[0], blank(spec(x)), count, tolerance or _reachable(x), steps)
            return z, f(z)[1] if state else state

    solved_once = once(solved, "train", "count")

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        note = note_of(state)
        count = rows(spec(x), recalled(note) | spec(side))
        y, new = solved_once(params, without(state, note), x, key, side, train=train, count=count)
        return y, {**new, **note}

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        carried = layer.start(params, state, (x, x), length=length, **side)
        return noted(layer, carried, side)

    return Layer(
        init, apply, layer.start and start, layer.children,
        **around(layer, lambda layer: fixed_point(layer, tolerance=tolerance, steps=steps),
                 order="fixed point"),
        name="fixed_point",
        bare=layer.bare, random=layer.random, side=layer.side, kept=layer.kept, planner=planner,
        computed=layer.computed, stacks=layer.stacks,
    )


def _reachable(x: Any) -> float:
    """A tolerance with room for the rounding of the coarsest dtype in x."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x)) ** 0.75


def _root(
    f: Callable[[Any], Any], zeros: Any, count: int | None, tolerance: float, steps: int
) -> Any:
    """The z with ``z = f(z)`` and its derivatives; NaN where it was not found."""
    zeros = settled(lambda z, _: f(z), zeros)
    find = functools.partial(
        _accelerated, zeros=zeros, count=count, tolerance=tolerance, steps=steps)

    def residual(z: Any) -> Any:
        return jax.tree.map(jnp.subtract, z, f(z))

    def solve(linear: Callable[[Any], Any], b: Any) -> Any:
        """The u with ``linear(u) = b``; as `residual` is ``1 - f``, so is its derivative."""
        return find(lambda u: jax.tree.map(lambda u, v, b: u - v + b, u, linear(u), b))

    return jax.lax.custom_root(
        residual, zeros, lambda residual, zeros: find(f),
        lambda linear, b: jax.lax.custom_linear_solve(linear, b, solve, transpose_solve=solve))


def _accelerated(
    f: Callable[[Any], Any], zeros: Any, count: int | None, tolerance: float, steps: int
) -> Any:
    """Anderson acceleration: go on from a mean of the last f(z), weighed by how little they moved.

    Each row, an example, has weights of its own, and rests while f leaves it where it is. Should f
    mix examples, one is moved on when another takes it away from rest: all rest at the same z.

    Source: Walker, Ni 2011, doi:10.1137/10078356X, section 2, with ``beta = 1``.
    """
    rows, back = _in_rows(zeros, count)
    step = lambda z: rows(f(back(z)))  # noqa: E731

    def moves_on(z: jax.Array, y: jax.Array) -> jax.Array:
        # An entry that is no finite number says so itself; the others are solved all the same.
        known = jnp.isfinite(y)
        most = lambda a: jnp.max(jnp.abs(jnp.where(known, a, 0)), axis=1, initial=0)  # noqa: E731
        return ~(most(y - z) <= tolerance * most(y))

    def goes_on(carry: Any) -> jax.Array:
        steps_so_far, *_, moving = carry
        return jnp.any(moving) & (steps_so_far < steps)

    def iterate(carry: Any) -> Any:
        steps_so_far, z, _, ys, moves, moving = carry
        mean = jnp.einsum("mr,mrn->rn", _weights(moves), ys)
        z = jnp.where(moving[:, None], mean, z)
        y = step(z)
        still = moves_on(z, y)
        at, news = steps_so_far % _MEMORY, (moving | still)[:, None]
        ys, moves = (a.at[at].set(jnp.where(news, new, a[at]))
                     for a, new in ((ys, y), (moves, y - z)))
        return steps_so_far + 1, z, y, ys, moves, still

    z = rows(zeros)
    y = step(z)
    first = jnp.broadcast_to(y, (_MEMORY, *y.shape))
    _, _, y, _, _, moving = jax.lax.while_loop(
        goes_on, iterate, (1, z, y, first, first, moves_on(z, y)))
    found = ~moving[:, None] & jnp.isfinite(y)
    return back(jnp.where(found, y, jnp.nan))


def _weights(moves: jax.Array) -> jax.Array:
    """Weights (M, R) with sum 1 that make the mean of moves (M, R, N) small."""
    moves = jnp.where(jnp.isfinite(moves), moves, 0)
    size = jnp.linalg.norm(moves, axis=-1, keepdims=True) + jnp.finfo(moves.dtype).tiny
    unit, share = moves / size, (size.min(0, keepdims=True) / size)[..., 0].T
    damping = _DAMPING * jnp.eye(_MEMORY, dtype=unit.dtype)[None]
    gram = jnp.einsum("mrn,krn->rmk", unit, unit) + damping
    found = share * jnp.linalg.solve(gram, share[..., None])[..., 0]
    return (found / jnp.sum(found, axis=1, keepdims=True)).T


def _in_rows(
    like: Any, count: int | None
) -> tuple[Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    """Turns trees of these shapes to one matrix of float32 or wider, and such a matrix back.

    It has `count` rows, the entries of the first axis of every leaf; if None, one row.
    """
    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.size if count is None else math.prod(leaf.shape[1:]) for leaf in leaves]
    ends = list(itertools.accumulate(sizes))
    dtype = joint(jnp.float32, *leaves)

    def rows(tree: Any) -> jax.Array:
        return jnp.concatenate([
            leaf.reshape(1 if count is None else count, size).astype(dtype)
            for leaf, size in zip(jax.tree.leaves(tree), sizes, strict=True)], axis=1)

    def back(matrix: jax.Array) -> Any:
        parts = jnp.split(matrix, ends[:-1], axis=1)
        return structure.unflatten([
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)])

    return rows, back
