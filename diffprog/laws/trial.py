"""What a law tries: one layer with its trees and its input, in float64, and how it compares.

In float64 tolerances need no excuse. Laws share what a trial has compiled: `pull`, which gives
output, state and gradients at once, serves nearly all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry_prng_impl

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.paths import paths
from diffprog.core.plans import spec
from diffprog.gradients.agreement import widened

_CLOSE = 1e-9  # float64 results of two ways to compute one thing; rounding gives 1e-13 or less
_FAR = 0.2  # how far parameters and state are moved from where init put them, as a share


class Pulled(NamedTuple):
    """Output and state of a call, and the gradients of its weighted sum; None for no floats."""

    y: Any
    state: Any
    params_gradient: Any
    state_gradient: Any
    x_gradient: Any
    side_gradient: Any

    @property
    def gradients(self) -> tuple[Any, Any, Any]:
        """By parameters, input and side inputs."""
        return self.params_gradient, self.x_gradient, self.side_gradient


class Options(NamedTuple):
    """What a layer promises beyond what all do; `check` says what each means."""

    batched: bool = True
    causal: bool = False
    smooth: bool = True
    precision: Any = "float64"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A layer with its trees, input and outputs in float64, at rest and in training.

    All is held in NumPy, to be cut and changed without compiling anything.

    Parameters and state were moved apart at random: where init puts them, averages equal what they
    average, origins equal parameters and biases are zero, and much that is wrong does not show.
    """

    layer: Layer
    key: jax.Array
    x: Any
    side: dict[str, Any]
    initial: Any  # params and state as init returned them, in float32 where x is no float64
    params: Any
    state: Any
    options: Options

    @classmethod
    def of(
        cls, layer: Layer, x: Any, key: jax.Array, side: dict[str, Any],
        options: Options | None = None,
    ) -> Trial:
        """Initialize the layer on x in float64; under x64 only."""
        # Of any kind of key the bits of a threefry one, which draws can be noted by.
        key = jax.random.wrap_key_data(jax.random.key_data(key).ravel()[:2], impl="threefry2x32")
        drawn = jax.tree.map(functools.partial(_drawn, key), x)
        wide, beside = jax.tree.map(widened, (drawn, side))
        initial = layer.init(key, wide, **beside)
        draw = np.random.default_rng(0)
        params = jax.tree.map(functools.partial(_moved, draw), initial[0])
        # A variance that begins at zero, as another library's may, is no variance below it.
        state = jax.tree.map(functools.partial(_moved, draw, positive=True), initial[1])
        wide, beside = jax.tree.map(np.asarray, (wide, beside))
        return cls(layer, key, wide, beside, initial, params, state, options or Options())

    @property
    def tolerance(self) -> float:
        """Between two ways to compute one thing, as a share of the largest number."""
        return max(_CLOSE, 10 * float(jnp.finfo(self.options.precision).eps))

    def eager(self, params: Any, state: Any, x: Any, side: Any, key: Any, train: bool) -> Any:
        """Output and state, not jitted."""
        return self.layer.apply(params, state, x, key=key, train=train, **side)

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """``run(params, state, x, side, key, train)``: output and state, jitted."""
        return jax.jit(self.eager, static_argnums=5)

    @functools.cached_property
    def pull(self) -> Callable[..., Pulled]:
        """``pull(params, state, x, side, key, train, weights)``, jitted.

        `weights` are those of the sum over the floats of ``(y, state)`` that is differentiated.
        """

        def pull(
            params: Any, state: Any, x: Any, side: Any, key: Any, train: bool, weights: list[Any]
        ) -> Pulled:
            given = (params, state, x, side)

            def outputs(parts: list[Any]) -> Any:
                params, state, x, side = with_floats(given, parts)
                result = self.eager(params, state, x, side, key, train)
                return floats(result), result

            _, back, (y, after) = jax.vjp(outputs, floats(given), has_aux=True)
            along = [jnp.asarray(w, leaf.dtype)
                     for w, leaf in zip(weights, floats((y, after)), strict=True)]
            of_params, of_state, of_x, of_side = with_floats(given, back(along)[0], gaps=True)
            return Pulled(y, after, of_params, of_state, of_x, of_side)

        return jax.jit(pull, static_argnums=5)

    @functools.cached_property
    def push(self) -> Callable[..., Any]:
        """``push(params, x, side, tangents, key, train)``: how the floats of y move, jitted."""

        def push(params: Any, x: Any, side: Any, tangents: Any, key: Any, train: bool) -> Any:
            given = (params, x, side)

            def outputs(parts: list[Any]) -> Any:
                params, x, side = with_floats(given, parts)
                return floats(self.eager(params, self.given[1], x, side, key, train)[0])

            return jax.jvp(outputs, (floats(given),), (tangents,))[1]

        return jax.jit(push, static_argnums=5)

    @functools.cached_property
    def weights(self) -> Any:
        """Of the floats of y: random ones, of which no two are alike."""
        draw = np.random.default_rng(1)
        plan = self.layer.plan(self.x, **self.side)
        return [draw.normal(size=leaf.shape) for leaf in floats(plan.y)]

    def weighing(self, weights: list[Any], state: Any = None) -> list[Any]:
        """Weights of y, and none of the state."""
        after = self.state if state is None else state
        return [*weights, *(np.zeros(leaf.shape, leaf.dtype) for leaf in floats(after))]

    def pulled(
        self, *, x: Any = None, side: Any = None, key: Any = None, train: bool = False,
        weights: list[Any] | None = None,
    ) -> Pulled:
        """`pull` on what the trial holds, but for what is given."""
        return self.pull(self.params, self.state, self.x if x is None else x,
                         self.side if side is None else side, key, train,
                         self.weighing(self.weights if weights is None else weights))

    @functools.cached_property
    def rest(self) -> Pulled:
        """The call at rest, without a key."""
        return self.pulled()

    @functools.cached_property
    def training(self) -> Pulled:
        """The call in training, with a key; that at rest where both compute the same."""
        return self.pulled(key=self.key, train=True) if len(self.modes) > 1 else self.rest

    def of_mode(self, train: bool) -> Pulled:
        """`training` or `rest`."""
        return self.training if train else self.rest

    @functools.cached_property
    def modes(self) -> list[tuple[Any, bool]]:
        """Key and flag of a call at rest and of one in training; one where both compute the same.

        A layer without randomness is traced in both modes, and the programs are compared.
        """
        both = [(None, False), (self.key, True)]
        if self.layer.random:
            return both
        rest, training = (jax.make_jaxpr(functools.partial(self.eager, key=None, train=train))(
            self.params, self.state, self.x, self.side) for train in (False, True))
        same = str(rest) == str(training) and equal(rest.consts, training.consts)
        return both[:1] if same else both

    @functools.cached_property
    def shapes(self) -> list[Any]:
        """Output and state of each mode in shapes, of trees as init returned them."""
        return [jax.eval_shape(functools.partial(self.eager, train=train), *self.initial, self.x,
                               self.side, key) for key, train in self.modes]

    @functools.cached_property
    def noted(self) -> tuple[Any, list[bytes]]:
        """The call in training, eager, and the keys that it drew from."""
        _DRAWN.clear()
        key = jax.random.wrap_key_data(jax.random.key_data(self.key), impl=_NOTED)
        result = self.eager(*self.given, key, True)
        jax.effects_barrier()
        return result, list(_DRAWN)

    @property
    def given(self) -> tuple[Any, Any, Any, Any]:
        """Parameters, state, x and side inputs as a call is given them: as arrays of JAX."""
        return jax.tree.map(jnp.asarray, (self.params, self.state, self.x, self.side))

    @property
    def examples(self) -> int:
        """How many examples the first axis of x holds."""
        return jax.tree.leaves(self.x)[0].shape[0]

    @property
    def steps(self) -> int:
        """How many steps of time the second axis of x holds; 0 if it has none."""
        shape = jax.tree.leaves(self.x)[0].shape
        return shape[1] if len(shape) > 1 else 0

    def close(self, what: str, got: Any, wanted: Any) -> None:
        """Raise unless two results of the layer agree but for rounding."""
        same(what, got, wanted, self.tolerance)

    def apart(self, one: Any, other: Any) -> bool:
        """Do two results of the layer differ by more than rounding?"""
        try:
            self.close("", one, other)
        except LayerError:
            return True
        return False

    def carried(self, side: dict[str, Any]) -> Any:
        """The state of a stream after x; None where the layer cannot stream."""
        if self.layer.start is None or not self.steps:
            return None
        try:
            params, state, x, _ = self.given
            side = jax.tree.map(jnp.asarray, side)
            state = self.layer.start(params, state, x, length=self.steps, **side)
            return self.run(params, state, x, side, None, False)[1]
        except LayerError:
            return None


Law = Callable[[Trial], str | None]  # it raises, or says why it was not tried, or holds


def over(mask: Any, a: Any) -> Any:
    """The mask with the trailing axes that a has beyond it."""
    return mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim))


def floats(x: Any) -> list[Any]:
    """The leaves that hold floating-point numbers."""
    return [leaf for leaf in jax.tree.leaves(x) if is_float(leaf)]


def with_floats(x: Any, floats: list[Any], gaps: bool = False) -> Any:
    """x with others in the places of its floating-point leaves, and gaps in those of the rest."""
    leaves, structure = jax.tree.flatten(x)
    new = iter(floats)
    return structure.unflatten([
        next(new) if is_float(leaf) else None if gaps else leaf for leaf in leaves])


def another(leaf: Any) -> Any:
    """Another value of the same kind, which no symmetry of positions or masks maps to this one."""
    leaf = np.asarray(leaf)
    if leaf.dtype == np.bool_:
        return ~leaf
    return np.flip(leaf, -1) * 2 + 1


def same_spec(what: str, wanted: Any, got: Any) -> None:
    """Raise unless two trees of shapes agree."""
    same = jax.tree.structure(wanted) == jax.tree.structure(got) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True))
    if not same:
        raise LayerError(f"{what} as {show(wanted)}", show(got),
                         "let both have one structure, and equal shapes and dtypes")


def equal(a: Any, b: Any) -> bool:
    """Are two trees of one structure equal to the last bit?"""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(u), np.asarray(v), equal_nan=True) for u, v in pairs)


def same(what: str, got: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """Raise unless two trees agree, the difference being a share of the largest number."""
    same_spec(what, spec(wanted), spec(got))
    for (path, leaf), other in zip(
        paths(wanted).items(), jax.tree.leaves(got), strict=True
    ):
        other, leaf = np.asarray(other), np.asarray(leaf)
        atol = tolerance * max(1.0, float(np.abs(leaf).max(initial=0)))
        if not np.allclose(other, leaf, rtol=0, atol=atol, equal_nan=True):
            worst = float(np.abs(other - leaf).max())
            where = path or "the output"
            raise LayerError(f"no difference at {where} for {what}", f"one of {worst:.1e}",
                             "look for what the two compute differently")


def _drawn(key: jax.Array, leaf: Any) -> Any:
    """Random numbers where only a shape was given; zeros for integers."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.random.normal(key, leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _moved(draw: np.random.Generator, leaf: Any, positive: bool = False) -> Any:
    """A leaf in float64, elsewhere by a random share: what is positive stays so; zeros move too."""
    if not is_float(leaf):
        return np.asarray(leaf)
    wide, noise = np.asarray(leaf, np.float64), _FAR * draw.normal(size=leaf.shape)
    return wide * np.exp(noise) if wide.any() else np.abs(noise) if positive else noise


_DRAWN: list[bytes] = []  # the keys that were drawn from, in the order of the draws


def _noting(key: Any, width: int, shape: tuple[int, ...]) -> Any:
    jax.debug.callback(lambda key: _DRAWN.append(np.asarray(key).tobytes()), key)
    return threefry_prng_impl.random_bits(key, width, shape)


# Keys that give the same numbers as usual ones, and note that they were drawn from.
_NOTED = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape, seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split, random_bits=_noting, fold_in=threefry_prng_impl.fold_in,
    name="noted", tag="noted")
