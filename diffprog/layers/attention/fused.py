"""cuDNN's attention kernel with all derivatives and batching, as three JAX primitives.

The kernel provides the value and its gradient, and nothing else. The primitives are:

- `_VALUE`: y, by the kernel.
- `_TANGENT`: the tangent of y, by the formula. It is linear, and its transpose is `_GRADIENT`, so
  that reverse mode runs the two passes of the kernel and nothing else.
- `_GRADIENT`: the cotangents of query, key and value, by the kernel.

Derivatives of `_TANGENT` and `_GRADIENT` are those of the formula, so all transformations that the
formula supports are supported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

PLATFORM = "cuda"  # the platform of the kernel; on others the formula is used

Arrays = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class Fused:
    """Attention by the kernel on its platform, elsewhere by the `formula` of a subclass.

    The operands are queries (B, T, H, D), keys and values (B, S, K, D) and, if `padded`, booleans
    (B, S), True for valid keys. The scale of the scores is 1.
    """

    causal: bool
    window: int | None
    padded: bool

    def __call__(self, *operands: jax.Array) -> jax.Array:
        """The output (B, T, H, D), differentiable as often as the formula."""
        return _VALUE(*operands, fused=self, residuals=False)[0]

    def formula(self, *operands: jax.Array) -> jax.Array:
        """The output (B, T, H, D), by operations that JAX differentiates."""
        raise NotImplementedError

    def kernel(self, query: jax.Array, key: jax.Array, value: jax.Array, *valid: jax.Array) -> Any:
        """The output by cuDNN, which takes the number of valid keys of each row, not a mask."""
        lengths = valid[0].sum(-1, dtype=jnp.int32) if valid else None  # (B,)
        window = (self.window - 1, 0) if self.window else None
        return jax.nn.dot_product_attention(
            query, key, value, scale=1.0, is_causal=self.causal, key_value_seq_lengths=lengths,
            local_window_size=window, implementation="cudnn")

    def vjp(self, *operands: jax.Array) -> tuple[jax.Array, Arrays, Callable[..., Any]]:
        """y, the residuals of the kernel, and ``gradient(operands and y, residuals, dy)``.

        JAX's residuals include the operands and y. These are left out of the residuals here, so
        that each array is kept once.
        """
        qkv, valid = operands[:3], operands[3:]
        y, pullback = jax.vjp(lambda *qkv: self.kernel(*qkv, *valid), *qkv)
        leaves, tree = jax.tree.flatten(pullback)
        places = [_index(leaf, (*operands, y)) for leaf in leaves]
        residuals = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]

        def gradient(given: Arrays, residuals: Arrays, dy: jax.Array) -> Arrays:
            remaining = iter(residuals)
            leaves = [next(remaining) if place is None else given[place] for place in places]
            return tree.unflatten(leaves)(dy)

        return y, residuals, gradient

    def split(self, operands: Arrays) -> tuple[Arrays, Arrays]:
        """The operands of `_VALUE`, and the operands after them."""
        count = 3 + self.padded
        return operands[:count], operands[count:]

    def dispatch(
        self, by_kernel: Callable[..., Any], by_formula: Callable[..., Any], operands: Arrays
    ) -> Any:
        """By the kernel on its platform if all padding is on the right, else by the formula."""

        def by_padding(*operands: jax.Array) -> Any:
            return jax.lax.cond(_is_right_padded(operands[3]), by_kernel, by_formula, *operands)

        by_platform = {PLATFORM: by_padding if self.padded else by_kernel}
        return jax.lax.platform_dependent(*operands, default=by_formula, **by_platform)


# What the primitives compute.

def _value(*operands: jax.Array, fused: Fused, residuals: bool) -> Arrays:
    """y and, if `residuals`, the residuals of the kernel."""

    def by_kernel(*operands: jax.Array) -> Arrays:
        if not residuals:
            return [fused.kernel(*operands)]
        y, kept, _ = fused.vjp(*operands)
        return [y, *kept]

    def by_formula(*operands: jax.Array) -> Arrays:
        y = fused.formula(*operands)
        if not residuals:
            return [y]
        _, *kept = jax.make_jaxpr(by_kernel)(*operands).out_avals
        return [y, *map(ad.zeros_like_aval, kept)]

    return fused.dispatch(by_kernel, by_formula, operands)


def _tangent(*operands: jax.Array, fused: Fused) -> Arrays:
    """dy, linear in the last three operands, the tangents.

    The operands between, y and the residuals, are used by the transpose alone.
    """
    given, _ = fused.split(operands)
    qkv, valid, tangents = given[:3], given[3:], operands[-3:]
    _, dy = jax.jvp(lambda *qkv: fused.formula(*qkv, *valid), qkv, tangents)
    return [dy]


def _gradient(*operands: jax.Array, fused: Fused) -> Arrays:
    """The cotangents of query, key and value, linear in the last operand, the cotangent of y.

    The operands before it are those of `_VALUE`, y, and the residuals.
    """

    def by_kernel(*operands: jax.Array) -> Arrays:
        given, (y, *residuals, dy) = fused.split(operands)
        gradients = []

        def traced(*given: jax.Array) -> None:
            gradients.append(fused.vjp(*given)[-1])

        jax.eval_shape(traced, *given)  # the forward pass does not run again
        return gradients[0]((*given, y), residuals, dy)

    return fused.dispatch(by_kernel, _gradient_of_formula(fused), operands)


def _gradient_of_formula(fused: Fused) -> Callable[..., Arrays]:
    def by_formula(*operands: jax.Array) -> Arrays:
        given, (*_, dy) = fused.split(operands)
        qkv, valid = given[:3], given[3:]
        _, pullback = jax.vjp(lambda *qkv: fused.formula(*qkv, *valid), *qkv)
        return pullback(dy)

    return by_formula


# Their rules of differentiation.

def _value_jvp(
    operands: Arrays, tangents: Sequence[Any], *, fused: Fused, residuals: bool
) -> tuple[Arrays, Sequence[Any]]:
    y, *kept = _VALUE(*operands, fused=fused, residuals=True)
    of_qkv = map(ad.instantiate_zeros, tangents[:3])
    dy = _TANGENT(*operands, y, *kept, *of_qkv, fused=fused)
    if not residuals:
        return [y], dy
    return [y, *kept], [*dy, *(ad.Zero(jax.typeof(a).to_tangent_aval()) for a in kept)]


def _tangent_jvp(
    operands: Arrays, tangents: Sequence[Any], *, fused: Fused
) -> tuple[Arrays, Arrays]:
    y = _TANGENT(*operands, fused=fused)
    return y, _jvp(lambda *operands: _tangent(*operands, fused=fused), operands, tangents)


def _gradient_jvp(
    operands: Arrays, tangents: Sequence[Any], *, fused: Fused
) -> tuple[Arrays, Arrays]:
    gradients = _GRADIENT(*operands, fused=fused)
    return gradients, _jvp(_gradient_of_formula(fused), operands, tangents)


def _jvp(f: Callable[..., Any], operands: Arrays, tangents: Sequence[Any]) -> Arrays:
    """The tangents of f, differentiated in the operands whose tangent is not a symbolic zero."""
    active = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_active(*values: jax.Array) -> Arrays:
        replaced = dict(zip(active, values, strict=True))
        return list(f(*(replaced.get(i, operand) for i, operand in enumerate(operands))))

    _, moved = jax.jvp(of_active, [operands[i] for i in active], [tangents[i] for i in active])
    return moved


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, fused: Fused) -> Sequence[Any]:
    given, of_qkv = operands[:-3], operands[-3:]
    gradients = _GRADIENT(*given, *map(ad.instantiate_zeros, cotangents), fused=fused)
    return [None] * len(given) + [
        gradient if ad.is_undefined_primal(tangent) else None
        for gradient, tangent in zip(gradients, of_qkv, strict=True)]


def _gradient_transpose(cotangents: Sequence[Any], *operands: Any, fused: Fused) -> Sequence[Any]:
    given = operands[:-1]
    of_dy = _TANGENT(*given, *map(ad.instantiate_zeros, cotangents), fused=fused)
    return [None] * len(given) + of_dy


def _primitive(
    name: str, compute: Callable[..., Any], jvp: Callable[..., Any],
    transpose: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A primitive computed by `compute`, whose operands and outputs have a leading batch axis.

    The traced program of `compute` is a parameter of the primitive, so that code that inspects
    jaxprs sees its operations. JAX itself does so, to find out which devices a kernel runs on.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def bind(*operands: Any, **settings: Any) -> Any:
        program = jax.make_jaxpr(lambda *operands: compute(*operands, **settings))(*operands)
        return primitive.bind(*operands, jaxpr=program, **settings)

    def run(*operands: Any, jaxpr: ClosedJaxpr, **_: Any) -> Any:
        return jaxpr_as_fun(jaxpr)(*operands)

    def batch(
        operands: Arrays, axes: Sequence[int | None], *, jaxpr: ClosedJaxpr, **settings: Any
    ) -> Any:
        """Join the axis of `jax.vmap` with the batch axis, and split it off the outputs."""
        size = next(a.shape[i] for a, i in zip(operands, axes, strict=True) if i is not None)
        joined = [_join(a, axis, size) for a, axis in zip(operands, axes, strict=True)]
        outputs = bind(*joined, **settings)
        outputs = [a.reshape(size, a.shape[0] // size, *a.shape[1:]) for a in outputs]
        return outputs, [0] * len(outputs)

    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
    lowering = mlir.lower_fun(run, multiple_results=True)
    for platform in (None, PLATFORM):  # one rule for each, so that one export can be to both
        mlir.register_lowering(primitive, lowering, platform)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = lambda *given, jaxpr, **settings: jvp(*given, **settings)
    if transpose is not None:
        ad.primitive_transposes[primitive] = (
            lambda *given, jaxpr, **settings: transpose(*given, **settings))
    return bind


def _join(a: jax.Array, axis: int | None, size: int) -> jax.Array:
    """Join an axis of this size with the batch axis; with axis None the array is repeated."""
    a = jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def _index(leaf: Any, arrays: Arrays) -> int | None:
    """The index of a leaf among the arrays, by identity; None if it is a new array."""
    return next((i for i, array in enumerate(arrays) if array is leaf), None)


def _is_right_padded(valid: jax.Array) -> jax.Array:
    """Whether in each row the valid keys come first, and there is at least one: lengths suffice."""
    return jnp.all(valid[:, 0]) & jnp.all(valid[:, :-1] >= valid[:, 1:])


_VALUE = _primitive("fused_attention", _value, _value_jvp)
_TANGENT = _primitive("fused_attention_tangent", _tangent, _tangent_jvp, _tangent_transpose)
_GRADIENT = _primitive("fused_attention_gradient", _gradient, _gradient_jvp, _gradient_transpose)
