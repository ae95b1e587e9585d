"""A trial: one layer with its trees and its input in float64, for the laws to run and compare.

Float64 keeps rounding errors far below the tolerance. The laws share compiled programs: `vjp`,
which returns output, state and gradients at once, serves nearly all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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

_TOLERANCE = 1e-9  # relative; two float64 computations of one result differ by 1e-13 or less
_PERTURBATION = 0.2  # relative standard deviation of the noise on parameters and state


class Result(NamedTuple):
    """Output and state of a call, and gradients of the weighted sum of its floats.

    A gradient is None for leaves without floats.
    """

    y: Any
    state: Any
    params_gradient: Any
    state_gradient: Any
    x_gradient: Any
    side_gradient: Any

    @property
    def gradients(self) -> tuple[Any, Any, Any]:
        """Gradients by parameters, input and side inputs."""
        return self.params_gradient, self.x_gradient, self.side_gradient


Symmetry = Literal["equivariant", "invariant"]


class Options(NamedTuple):
    """The options of `check`."""

    batched: bool = True
    causal: bool = False
    symmetry: Symmetry | None = None
    smooth: bool = True
    precision: Any = "float64"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A layer with its trees, its input and its results in float64, in inference and training.

    All arrays are NumPy's, so that slicing and changing them compiles nothing.

    Parameters and state are perturbed: at their initial values, running averages equal parameters
    and biases are zero, which would hide faults.
    """

    layer: Layer
    key: jax.Array
    x: Any
    side: dict[str, Any]
    initial: Any  # params and state from init, unperturbed
    params: Any
    state: Any
    options: Options

    @classmethod
    def of(
        cls, layer: Layer, x: Any, key: jax.Array, side: dict[str, Any],
        options: Options | None = None,
    ) -> Trial:
        """Initialize the layer on x in float64; requires x64 mode."""
        # A threefry key of the same bits, whatever the kind of key, so that draws can be recorded.
        key = jax.random.wrap_key_data(jax.random.key_data(key).ravel()[:2], impl="threefry2x32")
        drawn = jax.tree.map(functools.partial(_drawn, key), x)
        x, side = jax.tree.map(widened, (drawn, side))
        initial = layer.init(key, x, **side)
        rng = np.random.default_rng(0)
        params = jax.tree.map(functools.partial(_perturbed, rng), initial[0])
        # A variance may be initialized to zero, and must not become negative.
        state = jax.tree.map(functools.partial(_perturbed, rng, positive=True), initial[1])
        x, side = jax.tree.map(np.asarray, (x, side))
        return cls(layer, key, x, side, initial, params, state, options or Options())

    @property
    def tolerance(self) -> float:
        """Largest difference of two computations of one result, relative to its largest number."""
        return max(_TOLERANCE, 10 * float(jnp.finfo(self.options.precision).eps))

    def eager(self, params: Any, state: Any, x: Any, side: Any, key: Any, train: bool) -> Any:
        """Output and state, not jitted."""
        return self.layer.apply(params, state, x, key=key, train=train, **side)

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """``run(params, state, x, side, key, train)``: output and state, jitted."""
        return jax.jit(self.eager, static_argnums=5)

    @functools.cached_property
    def vjp(self) -> Callable[..., Result]:
        """``vjp(params, state, x, side, key, train, weights)``, jitted.

        `weights` are the cotangents of the floats of ``(y, state)``.
        """

        def vjp(
            params: Any, state: Any, x: Any, side: Any, key: Any, train: bool, weights: list[Any]
        ) -> Result:
            given = (params, state, x, side)

            def outputs(parts: list[Any]) -> Any:
                params, state, x, side = with_floats(given, parts)
                result = self.eager(params, state, x, side, key, train)
                return floats(result), result

            _, pullback, (y, after) = jax.vjp(outputs, floats(given), has_aux=True)
            cotangents = [jnp.asarray(w, leaf.dtype)
                          for w, leaf in zip(weights, floats((y, after)), strict=True)]
            gradients = with_floats(given, pullback(cotangents)[0], gaps=True)
            return Result(y, after, *gradients)

        return jax.jit(vjp, static_argnums=5)

    @functools.cached_property
    def jvp(self) -> Callable[..., Any]:
        """``jvp(params, x, side, tangents, key, train)``: tangents of the floats of y, jitted."""

        def jvp(params: Any, x: Any, side: Any, tangents: Any, key: Any, train: bool) -> Any:
            given = (params, x, side)

            def outputs(parts: list[Any]) -> Any:
                params, x, side = with_floats(given, parts)
                return floats(self.eager(params, self.given[1], x, side, key, train)[0])

            return jax.jvp(outputs, (floats(given),), (tangents,))[1]

        return jax.jit(jvp, static_argnums=5)

    @functools.cached_property
    def weights(self) -> list[Any]:
        """Random weights of the floats of y."""
        rng = np.random.default_rng(1)
        plan = self.layer.plan(self.x, **self.side)
        return [rng.normal(size=leaf.shape) for leaf in floats(plan.y)]

    def with_state_weights(self, weights: list[Any]) -> list[Any]:
        """Weights of y, and zeros for the floats of the state."""
        return [*weights, *(np.zeros(leaf.shape, leaf.dtype) for leaf in floats(self.state))]

    def call(
        self, *, x: Any = None, side: Any = None, key: Any = None, train: bool = False,
        weights: list[Any] | None = None,
    ) -> Result:
        """`vjp` on the arrays of the trial, except for those given."""
        return self.vjp(self.params, self.state, self.x if x is None else x,
                        self.side if side is None else side, key, train,
                        self.with_state_weights(self.weights if weights is None else weights))

    @functools.cached_property
    def inference(self) -> Result:
        """The call in inference, without a key."""
        return self.call()

    @functools.cached_property
    def training(self) -> Result:
        """The call in training, with a key; `inference` if both modes compute the same."""
        if len(self.modes) == 1:
            return self.inference
        return self.call(key=self.key, train=True)

    def of_mode(self, train: bool) -> Result:
        """`training` or `inference`."""
        return self.training if train else self.inference

    @functools.cached_property
    def modes(self) -> list[tuple[Any, bool]]:
        """(key, train) of inference and of training; inference alone if both compute the same.

        A layer without randomness is traced in both modes, and the programs are compared.
        """
        both = [(None, False), (self.key, True)]
        if self.layer.random:
            return both
        inference, training = (
            jax.make_jaxpr(functools.partial(self.eager, key=None, train=train))(
                self.params, self.state, self.x, self.side) for train in (False, True))
        same = str(inference) == str(training) and equal(inference.consts, training.consts)
        return both[:1] if same else both

    @functools.cached_property
    def shapes(self) -> list[Any]:
        """Shapes of output and state in each mode, for the trees of init."""
        return [jax.eval_shape(functools.partial(self.eager, train=train), *self.initial, self.x,
                               self.side, key) for key, train in self.modes]

    @functools.cached_property
    def recorded(self) -> tuple[Any, list[bytes]]:
        """The call in training, eager, and the keys of its draws."""
        _KEYS.clear()
        key = jax.random.wrap_key_data(jax.random.key_data(self.key), impl=_RECORDING)
        result = self.eager(*self.given, key, True)
        jax.effects_barrier()
        return result, list(_KEYS)

    @property
    def given(self) -> tuple[Any, Any, Any, Any]:
        """Parameters, state, x and side inputs as JAX arrays."""
        return jax.tree.map(jnp.asarray, (self.params, self.state, self.x, self.side))

    @property
    def examples(self) -> int:
        """Number of examples: the size of the first axis of x."""
        return jax.tree.leaves(self.x)[0].shape[0]

    @property
    def steps(self) -> int:
        """Number of time steps: the size of the second axis of x; 0 if it has none."""
        shape = jax.tree.leaves(self.x)[0].shape
        return shape[1] if len(shape) > 1 else 0

    def check_close(self, what: str, got: Any, wanted: Any) -> None:
        """Raise unless two results agree up to rounding."""
        check_same(what, got, wanted, self.tolerance)

    def differs(self, one: Any, other: Any) -> bool:
        """Do two results differ by more than rounding?"""
        try:
            self.check_close("", one, other)
        except LayerError:
            return True
        return False

    def stream_state(self, side: dict[str, Any]) -> Any:
        """The state of a stream after x; None if the layer cannot stream."""
        if self.layer.start is None or not self.steps:
            return None
        try:
            params, state, x, _ = self.given
            side = jax.tree.map(jnp.asarray, side)
            state = self.layer.start(params, state, x, length=self.steps, **side)
            return self.run(params, state, x, side, None, False)[1]
        except LayerError:
            return None


Law = Callable[[Trial], str | None]  # raises if broken; returns the reason if it was not tried


def over_trailing(mask: Any, a: Any) -> Any:
    """The mask with trailing axes of size 1, up to the rank of a."""
    return mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim))


def floats(x: Any) -> list[Any]:
    """The floating-point leaves."""
    return [leaf for leaf in jax.tree.leaves(x) if is_float(leaf)]


def with_floats(x: Any, floats: list[Any], gaps: bool = False) -> Any:
    """x with other floating-point leaves; other leaves stay, or become None if `gaps`."""
    leaves, structure = jax.tree.flatten(x)
    new = iter(floats)
    return structure.unflatten([
        next(new) if is_float(leaf) else None if gaps else leaf for leaf in leaves])


def another(leaf: Any) -> Any:
    """Another value of the same dtype, to which no symmetry of positions or masks maps this one."""
    leaf = np.asarray(leaf)
    if leaf.dtype == np.bool_:
        return ~leaf
    return np.flip(leaf, -1) * 2 + 1


def check_same_spec(what: str, wanted: Any, got: Any) -> None:
    """Raise unless two trees have the same structure, shapes and dtypes."""
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


def check_same(what: str, got: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """Raise unless two trees agree up to a tolerance relative to the largest number of a leaf."""
    check_same_spec(what, spec(wanted), spec(got))
    for (path, leaf), other in zip(
        paths(wanted).items(), jax.tree.leaves(got), strict=True
    ):
        other, leaf = np.asarray(other), np.asarray(leaf)
        atol = tolerance * max(1.0, float(np.abs(leaf).max(initial=0)))
        if not np.allclose(other, leaf, rtol=0, atol=atol, equal_nan=True):
            worst = float(np.abs(other - leaf).max())
            raise LayerError(f"no difference at {path or 'the output'} for {what}",
                             f"one of {worst:.1e}", "look for what the two compute differently")


def _drawn(key: jax.Array, leaf: Any) -> Any:
    """Random numbers in place of a shape, or zeros if it is one of integers."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.asarray(leaf)
    if is_float(leaf):
        return jax.random.normal(key, leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _perturbed(rng: np.random.Generator, leaf: Any, positive: bool = False) -> Any:
    """A floating-point leaf in float64, times exp(noise); zeros become noise, or its absolute."""
    if not is_float(leaf):
        return np.asarray(leaf)
    wide = np.asarray(leaf, np.float64)
    noise = _PERTURBATION * rng.normal(size=leaf.shape)
    if wide.any():
        return wide * np.exp(noise)
    return np.abs(noise) if positive else noise


_KEYS: list[bytes] = []  # the keys of all draws, in their order


def _recording_bits(key: Any, width: int, shape: tuple[int, ...]) -> Any:
    jax.debug.callback(lambda key: _KEYS.append(np.asarray(key).tobytes()), key)
    return threefry_prng_impl.random_bits(key, width, shape)


# Threefry keys that record each draw.
_RECORDING = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape, seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split, random_bits=_recording_bits,
    fold_in=threefry_prng_impl.fold_in, name="recording", tag="recording")
