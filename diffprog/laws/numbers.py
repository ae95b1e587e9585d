"""The laws of numbers: gradients agree and are finite, dtypes are kept, sums are right."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.core.nets import trainable
from diffprog.core.notation import listed, show
from diffprog.core.paths import nonfinite, paths
from diffprog.core.plans import spec
from diffprog.gradients.agreement import compared
from diffprog.laws.trial import Trial, floats, same_spec, with_floats

# How often a parameter is read: bfloat16 counts to 256. XLA sums an axis longer than 32 in parts,
# which hides what happens on several short ones.
_READ = (32, 32, 4)
_KINDS = ("params", "x", "side")  # what gradients are by
_SHARE = 0.01  # of the largest norm of a gradient, by which one may be off in sixteen bits
_EXACT = 1e-4  # of the largest output: more is rounding in sixteen bits
_ROUNDED = {"cos", "erf", "exp", "exp2", "log", "log1p", "logistic", "rsqrt", "sin", "sqrt", "tanh"}


def gradients(t: Trial) -> str | None:
    """Reverse mode, forward mode and finite differences agree, for all that is trained or given."""
    if not t.options.smooth:
        return "smooth=False"
    if t.options.precision != "float64":
        return f"it computes in {np.dtype(t.options.precision).name}"
    given = (t.params, t.x, t.side)
    # What is frozen moves the output, but has no gradient, and that is what it is for.
    free = jax.tree.leaves((trainable(t.layer, t.params),
                            jax.tree.map(lambda leaf: True, (t.x, t.side))))
    names = [f"{kind}/{path}".rstrip("/")
             for kind, part in zip(_KINDS, given, strict=True) for path in paths(part)]
    leaves = jax.tree.leaves(given)
    places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    moved = [i for i in places if free[i]]
    if not moved or not floats(t.rest.y):
        return "nothing can be differentiated"

    def whole(parts: list[Any]) -> Any:
        new = dict(zip(moved, parts, strict=True))
        return jax.tree.unflatten(jax.tree.structure(given),
                                  [new.get(i, leaf) for i, leaf in enumerate(leaves)])

    for key, train in t.modes:
        def value(parts: list[Any], key: Any = key, train: bool = train) -> float:
            params, x, side = whole(parts)
            y = t.pull(params, t.state, x, side, key, train, t.weighing(t.weights)).y
            return _sum(t.weights, floats(y))

        def forward(tangents: list[Any], key: Any = key, train: bool = train) -> float:
            new = dict(zip(moved, tangents, strict=True))
            every = [new.get(i, np.zeros(leaves[i].shape)) for i in places]
            return _sum(t.weights, t.push(t.params, t.x, t.side, every, key, train))

        found = dict(zip(places, jax.tree.leaves(t.of_mode(train).gradients), strict=True))
        compared([names[i] for i in moved], [leaves[i] for i in moved], value,
                 [found[i] for i in moved], forward, 1e-6, np.random.default_rng(0))
    return None


def finite(t: Trial) -> str | None:
    """No gradient is NaN or infinite, at x and at zero."""
    if not t.options.smooth:
        return "smooth=False"
    zeros = jax.tree.map(np.zeros_like, t.x)
    if not floats(t.rest.y) or not jax.tree.leaves(t.rest.gradients):
        return "nothing can be differentiated"
    for key, train in t.modes:
        for where, result in (("", t.of_mode(train)),
                              (" at zero", t.pulled(x=zeros, key=key, train=train))):
            if broken := nonfinite(dict(zip(_KINDS, result.gradients, strict=True))):
                raise LayerError(f"finite gradients{where} with train={train}",
                                 f"NaN in {listed(broken)}",
                                 "keep roots, logarithms and quotients away from zero")
    return None


def dtypes(t: Trial) -> str | None:
    """Parameters and statistics are in float32, and what comes out has the dtype of x."""
    if not floats(t.x):
        return "x holds no floats"
    with jax.enable_x64(False):
        key = jax.random.wrap_key_data(jnp.asarray(jax.random.key_data(t.key)))
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            narrow = lambda a, d=dtype: jax.ShapeDtypeStruct(  # noqa: E731
                a.shape, d if is_float(a) else a.dtype)
            x, side = spec(jax.tree.map(narrow, (t.x, t.side)))
            params, state = jax.eval_shape(lambda k, x=x, s=side: t.layer.init(k, x, **s), key)
            if wrong := {a.dtype.name for a in jax.tree.leaves((params, state)) if is_float(a)} - {
                "float32"
            }:
                raise LayerError("parameters and statistics in float32",
                                 f"{listed(wrong)} for {show(x)}",
                                 "make them in float32, whatever x is")
            for own, train in ((None, False), (key, True))[:len(t.modes)]:
                y, new = jax.eval_shape(
                    lambda p, s, x, side, k, train=train: t.eager(p, s, x, side, k, train),
                    params, state, x, side, own)
                if wrong := {a.dtype.name for a in jax.tree.leaves(y) if is_float(a)} - {
                    np.dtype(dtype).name
                }:
                    raise LayerError(f"{np.dtype(dtype).name} out of {show(x)}", listed(wrong),
                                     "return y.astype(x.dtype)")
                same_spec("the state", spec(state), spec(new))
    return None


def sums(t: Trial) -> str | None:
    """A parameter that is read thousands of times has in bfloat16 the gradient of float64.

    Numbers are powers of two, so that the forward pass is exact and sums alone can be wrong. All
    examples are one, so that in float64 one call gives the gradient of as many as there are.
    """
    if not floats(t.x):
        return "x holds no floats"
    if not floats(t.params):
        return "it has no parameters"
    if not t.options.batched:
        return "batched=False"
    draw = np.random.default_rng(0)

    def power(a: Any) -> Any:
        """A power of two in place of each float."""
        return draw.choice([-1.0, -0.5, 0.5, 1.0], a.shape) if is_float(a) else a

    if _names(jax.make_jaxpr(functools.partial(t.eager, key=None, train=False))(
        t.params, t.state, t.x, t.side).jaxpr) & _ROUNDED:
        return "its forward pass is rounded in bfloat16"
    x, side = jax.tree.map(lambda a: power(a[:1]), (t.x, t.side))
    params = jax.tree.map(power, t.params)
    plan = t.layer.plan(x, **side)
    weights = [draw.choice([-1.0, 1.0], a.shape) for a in floats(plan.y)]
    one = t.pull(params, t.state, x, side, None, False, t.weighing(weights))

    def many(a: Any) -> Any:
        return np.broadcast_to(_narrow(a, jnp.bfloat16)[0], (*_READ, *a.shape[1:]))

    with jax.enable_x64(False):
        given = jax.tree.map(many, (x, side))
        single, state = jax.tree.map(
            lambda a: jnp.asarray(_narrow(a, np.float32)), (params, t.state))

        @jax.jit
        def run(x: Any, side: Any) -> Any:
            def outputs(parts: list[Any]) -> Any:
                params = with_floats(single, parts)

                def call(x: Any, side: Any) -> list[Any]:
                    return floats(t.eager(params, state, x, side, None, False)[0])

                return jax.vmap(jax.vmap(call))(x, side)

            y, back = jax.vjp(outputs, floats(single))
            along = [jnp.broadcast_to(jnp.asarray(w, a.dtype), a.shape)
                     for w, a in zip(weights, y, strict=True)]
            return y, back(along)[0]

        y, found = run(*given)
    wide = [math.prod(_READ) * np.asarray(a) for a in jax.tree.leaves(one.params_gradient)]
    found = [np.asarray(a, np.float64) for a in found]
    for a, b in zip(y, floats(one.y), strict=True):
        if np.abs(np.asarray(a, np.float64) - b).max(initial=0) > _EXACT * np.abs(b).max(initial=0):
            return "its forward pass is rounded in bfloat16"
    if not (largest := max(map(np.linalg.norm, wide))):
        return "all its gradients are zero"
    names = [path for path, leaf in paths(t.params).items() if is_float(leaf)]
    for path, got, wanted in zip(names, found, wide, strict=True):
        if (off := np.linalg.norm(got - wanted) / largest) > _SHARE:
            if _sums_in_16_bits():
                return "XLA sums products of bfloat16 in bfloat16 on this backend"
            raise LayerError(f"the gradient of float32 in {path}", f"one {off:.1%} off",
                             "broadcast a parameter before it is cast to the dtype of x: what is "
                             "read many times sums its gradient in the dtype in which it is read")
    return None


@functools.cache
def _sums_in_16_bits() -> bool:
    """Does XLA sum a plain product of bfloat16 so, as that of jax 0.12 on CPU?"""
    with jax.enable_x64(False):
        x, kernel = jnp.ones((2, 2048, 4), jnp.bfloat16), jnp.ones((4, 4), jnp.bfloat16)
        output = lambda kernel: jnp.sum(x @ kernel, dtype=jnp.float32)  # noqa: E731
        return bool((jax.jit(jax.grad(output))(kernel) != 2 * 2048).any())


def _names(jaxpr: Any) -> set[str]:
    """The primitives of a program and of all programs in it."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    for inner in _inner(jaxpr):
        names |= _names(inner)
    return names


def _inner(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        for part in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield getattr(part, "jaxpr", part)


def _narrow(a: Any, dtype: Any) -> Any:
    return np.asarray(a, dtype) if is_float(a) else np.asarray(a)


def _sum(weights: list[Any], outputs: list[Any]) -> float:
    return sum(float(np.vdot(w, a)) for w, a in zip(weights, outputs, strict=True))
