"""Attention by cuDNN's kernel, which knows one derivative, with all others by the formula.

Three primitives of JAX: the value, its tangent, and the gradient. The kernel computes the value and
the gradient. The tangent is that of the formula; it is linear, and its transpose is the gradient,
so that reverse mode costs the kernel's two passes and nothing else. Derivatives of the tangent and
of the gradient are those of the formula too: so every transformation goes as far as it does there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

PLATFORM = "cuda"  # the kernel's; on others the formula computes all

Arrays = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class Fused:
    """Attention by the kernel on its platform, elsewhere by `formula`, which a subclass gives.

    Operands are queries (B, T, H, D), keys and values (B, S, K, D), and if `padded` booleans
    (B, S), the real keys. The scale of the scores is 1.
    """

    causal: bool
    window: int | None
    padded: bool

    def __call__(self, *operands: jax.Array) -> jax.Array:
        """The weighted sums (B, T, H, D), differentiable as often as the formula."""
        return _VALUE(*operands, fused=self, residuals=False)[0]

    def formula(self, *operands: jax.Array) -> jax.Array:
        """The same, of anything that JAX differentiates."""
        raise NotImplementedError

    def kernel(self, query: jax.Array, key: jax.Array, value: jax.Array, *real: jax.Array) -> Any:
        """cuDNN's, to which each row of real keys is a length."""
        return jax.nn.dot_product_attention(
            query, key, value, scale=1.0, is_causal=self.causal,
            key_value_seq_lengths=real[0].sum(-1, dtype=jnp.int32) if real else None,
            local_window_size=self.window and (self.window - 1, 0), implementation="cudnn")

    def pulled(self, *operands: jax.Array) -> tuple[jax.Array, Arrays, Callable[..., Any]]:
        """The kernel's y, what it keeps besides, and the gradient's function of them all.

        JAX keeps what it is given as well: that, and y, is kept once.
        """
        moving, real = operands[:3], operands[3:]
        y, pull = jax.vjp(lambda *moving: self.kernel(*moving, *real), *moving)
        leaves, tree = jax.tree.flatten(pull)
        places = [_place(leaf, (*operands, y)) for leaf in leaves]

        def gradient(known: Arrays, kept: Arrays, of_y: jax.Array) -> Arrays:
            rest = iter(kept)
            return tree.unflatten([
                next(rest) if place is None else known[place] for place in places])(of_y)

        kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
        return y, kept, gradient

    def split(self, operands: Arrays) -> tuple[Arrays, Arrays]:
        """Those of the value, and what comes behind them."""
        return operands[: 3 + self.padded], operands[3 + self.padded :]

    def computed(
        self, by_kernel: Callable[..., Any], by_formula: Callable[..., Any], operands: Arrays
    ) -> Any:
        """By the kernel on its platform, if all padding stands behind what is real."""

        def looking(*operands: jax.Array) -> Any:
            return jax.lax.cond(_lengths_say_all(operands[3]), by_kernel, by_formula, *operands)

        there = {PLATFORM: looking if self.padded else by_kernel}
        return jax.lax.platform_dependent(*operands, default=by_formula, **there)


def _value(*operands: jax.Array, fused: Fused, residuals: bool) -> Arrays:
    """y, and if asked for `residuals` what else the gradient wants."""

    def by_kernel(*operands: jax.Array) -> Arrays:
        if not residuals:
            return [fused.kernel(*operands)]
        y, kept, _ = fused.pulled(*operands)
        return [y, *kept]

    def by_formula(*operands: jax.Array) -> Arrays:
        y = fused.formula(*operands)
        if not residuals:
            return [y]
        _, *kept = jax.make_jaxpr(by_kernel)(*operands).out_avals
        return [y, *map(ad.zeros_like_aval, kept)]

    return fused.computed(by_kernel, by_formula, operands)


def _tangent(*operands: jax.Array, fused: Fused) -> Arrays:
    """Linear in the last three, the tangents; what stands between is for the transpose."""
    given, _ = fused.split(operands)
    moved = jax.jvp(lambda *moving: fused.formula(*moving, *given[3:]), given[:3], operands[-3:])
    return [moved[1]]


def _gradient(*operands: jax.Array, fused: Fused) -> Arrays:
    """Linear in the last, the cotangent of y; y and what was kept of it stand before."""

    def by_kernel(*operands: jax.Array) -> Arrays:
        given, (y, *kept, of_y) = fused.split(operands)
        functions = []

        def traced(*given: jax.Array) -> None:
            functions.append(fused.pulled(*given)[-1])

        jax.eval_shape(traced, *given)  # the kernel does not run again
        return functions[0]((*given, y), kept, of_y)

    return fused.computed(by_kernel, _gradient_of_formula(fused), operands)


def _gradient_of_formula(fused: Fused) -> Callable[..., Arrays]:
    def by_formula(*operands: jax.Array) -> Arrays:
        given, (*_, of_y) = fused.split(operands)
        return jax.vjp(lambda *moving: fused.formula(*moving, *given[3:]), *given[:3])[1](of_y)

    return by_formula


# The rules.

def _value_jvp(
    operands: Arrays, tangents: Sequence[Any], *, fused: Fused, residuals: bool
) -> tuple[Arrays, Sequence[Any]]:
    y, *kept = _VALUE(*operands, fused=fused, residuals=True)
    moved = _TANGENT(*operands, y, *kept, *map(ad.instantiate_zeros, tangents[:3]), fused=fused)
    if not residuals:
        return [y], moved
    return [y, *kept], [*moved, *(ad.Zero(jax.typeof(a).to_tangent_aval()) for a in kept)]


def _tangent_jvp(
    operands: Arrays, tangents: Sequence[Any], *, fused: Fused
) -> tuple[Arrays, Arrays]:
    y = _TANGENT(*operands, fused=fused)
    return y, _moved(lambda *operands: _tangent(*operands, fused=fused), operands, tangents)


def _gradient_jvp(
    operands: Arrays, tangents: Sequence[Any], *, fused: Fused
) -> tuple[Arrays, Arrays]:
    slopes = _GRADIENT(*operands, fused=fused)
    return slopes, _moved(_gradient_of_formula(fused), operands, tangents)


def _moved(f: Callable[..., Any], operands: Arrays, tangents: Sequence[Any]) -> Arrays:
    """The tangents of f where some operands move."""
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_moving(*some: jax.Array) -> Arrays:
        moved = dict(zip(moving, some, strict=True))
        return list(f(*(moved.get(i, operand) for i, operand in enumerate(operands))))

    return jax.jvp(of_moving, [operands[i] for i in moving], [tangents[i] for i in moving])[1]


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, fused: Fused) -> Sequence[Any]:
    known = operands[:-3]
    slopes = _GRADIENT(*known, *map(ad.instantiate_zeros, cotangents), fused=fused)
    return [None] * len(known) + [
        slope if ad.is_undefined_primal(tangent) else None
        for slope, tangent in zip(slopes, operands[-3:], strict=True)]


def _gradient_transpose(cotangents: Sequence[Any], *operands: Any, fused: Fused) -> Sequence[Any]:
    known = operands[:-1]
    return [None] * len(known) + _TANGENT(
        *known, *map(ad.instantiate_zeros, cotangents), fused=fused)


def _primitive(
    name: str, run: Callable[..., Any], jvp: Callable[..., Any],
    transpose: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A primitive of arrays whose first axis is that of examples, computed by `run`.

    It holds the program that it runs: who reads programs sees what is in it, as JAX has to for a
    kernel that wants to know its devices.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def bind(*operands: Any, **settings: Any) -> Any:
        program = jax.make_jaxpr(lambda *operands: run(*operands, **settings))(*operands)
        return primitive.bind(*operands, jaxpr=program, **settings)

    def listed(*operands: Any, jaxpr: ClosedJaxpr, **_: Any) -> Any:
        return jaxpr_as_fun(jaxpr)(*operands)

    def batched(
        operands: Arrays, axes: Sequence[int | None], *, jaxpr: ClosedJaxpr, **settings: Any
    ) -> Any:
        """More examples are a longer axis of examples."""
        size = next(a.shape[i] for a, i in zip(operands, axes, strict=True) if i is not None)
        found = bind(*(_folded(a, axis, size) for a, axis in zip(operands, axes, strict=True)),
                     **settings)
        apart = [a.reshape(size, a.shape[0] // size, *a.shape[1:]) for a in found]
        return apart, [0] * len(found)

    primitive.def_impl(listed)
    primitive.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
    rule = mlir.lower_fun(listed, multiple_results=True)
    for platform in (None, PLATFORM):  # apart, so that an export may be to both
        mlir.register_lowering(primitive, rule, platform)
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = lambda *given, jaxpr, **settings: jvp(*given, **settings)
    if transpose is not None:
        ad.primitive_transposes[primitive] = (
            lambda *given, jaxpr, **settings: transpose(*given, **settings))
    return bind


def _folded(a: jax.Array, axis: int | None, size: int) -> jax.Array:
    """An axis of so many joined with the first one; what lacks it is repeated."""
    a = jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def _place(leaf: Any, known: Arrays) -> int | None:
    return next((i for i, array in enumerate(known) if array is leaf), None)


def _lengths_say_all(real: jax.Array) -> jax.Array:
    """Are the real ones of each row its first ones, and is there one?"""
    return jnp.all(real[:, 0]) & jnp.all(real[:, :-1] >= real[:, 1:])


_VALUE = _primitive("fused_attention", _value, _value_jvp)
_TANGENT = _primitive("fused_attention_tangent", _tangent, _tangent_jvp, _tangent_transpose)
_GRADIENT = _primitive("fused_attention_gradient", _gradient, _gradient_jvp, _gradient_transpose)
