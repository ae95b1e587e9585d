"""The laws of numbers: gradients agree and are finite, dtypes are kept, sums are accurate."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.core.jaxprs import primitives
from diffprog.core.nets import trainable
from diffprog.core.notation import listed, show
from diffprog.core.paths import nonfinite, paths
from diffprog.core.plans import spec
from diffprog.gradients.agreement import compared
from diffprog.laws.trial import Result, Trial, check_same_spec, floats, with_floats

# Number of examples that use a parameter: bfloat16 counts to 256. XLA sums an axis longer than 32
# in parts, which would hide the error of several short ones.
_EXAMPLES = (32, 32, 4)
_KINDS = ("params", "x", "side")  # the arguments of a gradient
_GRADIENT_ERROR = 0.01  # largest error in bfloat16, relative to the largest norm of a gradient
_OUTPUT_ERROR = 1e-4  # relative to the largest output; a larger one is rounding in bfloat16
_ROUNDED = {"cos", "erf", "exp", "exp2", "log", "log1p", "logistic", "rsqrt", "sin", "sqrt", "tanh"}
_ROUNDED_OUTPUT = "its forward pass is rounded in bfloat16"


def gradients(t: Trial) -> str | None:
    """Reverse mode, forward mode and finite differences agree, by parameters and inputs."""
    if not t.options.smooth:
        return "smooth=False"
    if t.options.precision != "float64":
        return f"it computes in {np.dtype(t.options.precision).name}"
    given = (t.params, t.x, t.side)
    # Frozen parameters change the output, but have no gradient by design.
    free = jax.tree.leaves((trainable(t.layer, t.params),
                            jax.tree.map(lambda leaf: True, (t.x, t.side))))
    names = [f"{kind}/{path}".rstrip("/")
             for kind, part in zip(_KINDS, given, strict=True) for path in paths(part)]
    leaves = jax.tree.leaves(given)
    float_places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    moved = [i for i in float_places if free[i]]
    if not moved or not floats(t.inference.y):
        return "nothing can be differentiated"

    def replaced(parts: list[Any]) -> Any:
        new = dict(zip(moved, parts, strict=True))
        return jax.tree.unflatten(jax.tree.structure(given),
                                  [new.get(i, leaf) for i, leaf in enumerate(leaves)])

    for key, train in t.modes:
        def value(parts: list[Any], key: Any = key, train: bool = train) -> float:
            params, x, side = replaced(parts)
            weights = t.with_state_weights(t.weights)
            y = t.vjp(params, t.state, x, side, key, train, weights).y
            return _weighted_sum(t.weights, floats(y))

        def forward(tangents: list[Any], key: Any = key, train: bool = train) -> float:
            new = dict(zip(moved, tangents, strict=True))
            every = [new.get(i, np.zeros(leaves[i].shape)) for i in float_places]
            return _weighted_sum(t.weights, t.jvp(t.params, t.x, t.side, every, key, train))

        slopes = dict(
            zip(float_places, jax.tree.leaves(t.of_mode(train).gradients), strict=True))
        compared([names[i] for i in moved], [leaves[i] for i in moved], value,
                 [slopes[i] for i in moved], forward, 1e-6, np.random.default_rng(0))
    return None


def finite(t: Trial) -> str | None:
    """No gradient is NaN or infinite, at x and at zero."""
    if not t.options.smooth:
        return "smooth=False"
    zeros = jax.tree.map(np.zeros_like, t.x)
    if not floats(t.inference.y) or not jax.tree.leaves(t.inference.gradients):
        return "nothing can be differentiated"
    for key, train in t.modes:
        for where, result in (("", t.of_mode(train)),
                              (" at zero", t.call(x=zeros, key=key, train=train))):
            if broken := nonfinite(dict(zip(_KINDS, result.gradients, strict=True))):
                raise LayerError(f"finite gradients{where} with train={train}",
                                 f"NaN in {listed(broken)}",
                                 "keep roots, logarithms and quotients away from zero")
    return None


def dtypes(t: Trial) -> str | None:
    """Parameters and statistics are in float32, and the output has the dtype of x."""
    if not floats(t.x):
        return "x has no floats"
    with jax.enable_x64(False):
        key = jax.random.wrap_key_data(jnp.asarray(jax.random.key_data(t.key)))
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            _check_dtypes(t, dtype, key)
    return None


def _check_dtypes(t: Trial, dtype: Any, key: jax.Array) -> None:
    """Raise unless x of this dtype has an output of it, and parameters and state in float32."""

    def narrow(a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, dtype if is_float(a) else a.dtype)

    x, side = spec(jax.tree.map(narrow, (t.x, t.side)))
    params, state = jax.eval_shape(lambda key: t.layer.init(key, x, **side), key)
    if wrong := _float_dtypes((params, state)) - {"float32"}:
        raise LayerError("parameters and statistics in float32",
                         f"{listed(wrong)} for {show(x)}", "make them in float32, whatever x is")
    for own_key, train in ((None, False), (key, True))[:len(t.modes)]:
        y, new = jax.eval_shape(
            functools.partial(t.eager, train=train), params, state, x, side, own_key)
        if wrong := _float_dtypes(y) - {np.dtype(dtype).name}:
            raise LayerError(f"an output in {np.dtype(dtype).name} for {show(x)}", listed(wrong),
                             "return y.astype(x.dtype)")
        check_same_spec("the state", spec(state), spec(new))


def _float_dtypes(tree: Any) -> set[str]:
    return {a.dtype.name for a in floats(tree)}


def sums(t: Trial) -> str | None:
    """In bfloat16, the gradient of a parameter used by thousands of examples is that of float64.

    All numbers are powers of two, so that the forward pass is exact and errors come from sums. All
    examples are equal, so that in float64 one example gives the gradient of all.
    """
    if not floats(t.x):
        return "x has no floats"
    if not floats(t.params):
        return "it has no parameters"
    if not t.options.batched:
        return "batched=False"
    inference = functools.partial(t.eager, key=None, train=False)
    program = jax.make_jaxpr(inference)(t.params, t.state, t.x, t.side).jaxpr
    if primitives(program) & _ROUNDED:
        return _ROUNDED_OUTPUT

    rng = np.random.default_rng(0)
    x, side = jax.tree.map(lambda a: _powers_of_two(rng, a[:1]), (t.x, t.side))
    params = jax.tree.map(functools.partial(_powers_of_two, rng), t.params)
    plan = t.layer.plan(x, **side)
    weights = [rng.choice([-1.0, 1.0], a.shape) for a in floats(plan.y)]
    one = t.vjp(params, t.state, x, side, None, False, t.with_state_weights(weights))
    y, gradient = _in_bfloat16(t, params, x, side, weights)
    return _compare_sums(t, one, y, gradient)


def _in_bfloat16(
    t: Trial, params: Any, x: Any, side: Any, weights: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Output and gradient of the parameters in float32, of many copies of one example in bfloat16.
    """

    def many(a: Any) -> Any:
        return np.broadcast_to(_cast(a, jnp.bfloat16)[0], (*_EXAMPLES, *a.shape[1:]))

    with jax.enable_x64(False):
        xs, sides = jax.tree.map(many, (x, side))
        single, state = jax.tree.map(
            lambda a: jnp.asarray(_cast(a, np.float32)), (params, t.state))

        @jax.jit
        def run(xs: Any, sides: Any) -> tuple[list[Any], list[Any]]:
            def outputs(parts: list[Any]) -> Any:
                params = with_floats(single, parts)

                def call(x: Any, side: Any) -> list[Any]:
                    return floats(t.eager(params, state, x, side, None, False)[0])

                return jax.vmap(jax.vmap(call))(xs, sides)

            y, pullback = jax.vjp(outputs, floats(single))
            cotangents = [jnp.broadcast_to(jnp.asarray(w, a.dtype), a.shape)
                          for w, a in zip(weights, y, strict=True)]
            return y, pullback(cotangents)[0]

        return run(xs, sides)


def _compare_sums(t: Trial, one: Result, y: list[Any], gradient: list[Any]) -> str | None:
    """Compare with one example in float64, whose gradient is multiplied by the number of examples.
    """
    for narrow, wide in zip(y, floats(one.y), strict=True):
        error = np.abs(np.asarray(narrow, np.float64) - wide).max(initial=0)
        if error > _OUTPUT_ERROR * np.abs(wide).max(initial=0):
            return _ROUNDED_OUTPUT
    wanted = [math.prod(_EXAMPLES) * np.asarray(a) for a in jax.tree.leaves(one.params_gradient)]
    largest = max(map(np.linalg.norm, wanted))
    if not largest:
        return "all its gradients are zero"
    names = [path for path, leaf in paths(t.params).items() if is_float(leaf)]
    for path, got, exact in zip(names, gradient, wanted, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - exact) / largest
        if error <= _GRADIENT_ERROR:
            continue
        if _xla_sums_in_16_bits():
            return "XLA sums products of bfloat16 in bfloat16 on this backend"
        raise LayerError(f"the gradient of float32 in {path}", f"one {error:.1%} off",
                         "broadcast a parameter before it is cast to the dtype of x: its gradient "
                         "is summed in the dtype that it has when it is broadcast")
    return None


def _powers_of_two(rng: np.random.Generator, a: Any) -> Any:
    """Random powers of two in place of floats."""
    return rng.choice([-1.0, -0.5, 0.5, 1.0], a.shape) if is_float(a) else a


@functools.cache
def _xla_sums_in_16_bits() -> bool:
    """Does XLA sum a product of bfloat16 matrices in bfloat16? It does with jax 0.12 on CPU."""

    def output(kernel: jax.Array) -> jax.Array:
        x = jnp.ones((2, 2048, 4), jnp.bfloat16)
        return jnp.sum(x @ kernel, dtype=jnp.float32)

    with jax.enable_x64(False):
        kernel = jnp.ones((4, 4), jnp.bfloat16)
        return bool((jax.jit(jax.grad(output))(kernel) != 2 * 2048).any())


def _cast(a: Any, dtype: Any) -> Any:
    """The array in NumPy, floats in this dtype."""
    return np.asarray(a, dtype) if is_float(a) else np.asarray(a)


def _weighted_sum(weights: list[Any], outputs: list[Any]) -> float:
    return sum(float(np.vdot(w, a)) for w, a in zip(weights, outputs, strict=True))
