"""Scaled dot-product attention: ``softmax(scale * query @ key^T + bias) @ value``.

The head axis comes before the time axis, so that each head is one matrix product. A `Pattern` says
which keys each query attends to; each implementation evaluates the part of it that it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import known
from diffprog.core.dtypes import wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.meshes import beside, reshaped
from diffprog.core.notation import listed, show
from diffprog.layers.attention.fused import Fused

IMPLEMENTATIONS = ("xla", "blocks", "cudnn")

_BLOCKS = 4  # with four blocks of queries, causal attention skips 3/8 of all pairs
_LONG = 256  # time steps; from here on blocks are faster than one product
_FEW = 8  # keys per query; from here on cuDNN's kernel does not fill the GPU
_LEAVE_NONE = "leave implementation=None to choose by platform, dtype and shape"

Pair = tuple[jax.Array, jax.Array]  # of the queries, of the keys


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass  # a pytree, so that it can be an argument of jitted functions
@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys each query attends to: the conjunction of all conditions that are not None.

    Attributes:
        causal: a query attends to no key of higher order.
        window: a query attends to keys less than `window` ranks before it.
        orders: (T,) and (S,), the order in time; 0, 1, 2, ... for both if None.
        ranks: (..., T) and (..., S), the positions that `window` counts; the orders if None.
        valid: (..., S), False for padded keys.
        segments: (..., T) and (..., S), ints; a query attends to the keys of its own segment.
        mask: (..., heads or 1, T, S), an explicit mask.
        empty: True if some query may attend to no key at all.
    """

    causal: bool = _static(False)
    window: int | None = _static(None)
    orders: Pair | None = None
    ranks: Pair | None = None
    valid: jax.Array | None = None
    segments: Pair | None = None
    mask: jax.Array | None = None
    empty: bool = _static(False)

    def allowed(self, rows: slice, columns: slice) -> jax.Array | None:
        """Booleans (..., heads or 1, rows, columns), True = attend; None if all are True."""
        conditions = []
        if self.causal or self.window:
            q_order, k_order = self.orders or (jnp.arange(rows.stop), jnp.arange(columns.stop))
            q_order, k_order = q_order[rows, None], k_order[None, columns]
            if self.causal:
                conditions.append(q_order >= k_order)
            if self.window and self.ranks is None:
                conditions.append(q_order - k_order < self.window)
        if self.window and self.ranks is not None:
            q_rank, k_rank = self.ranks
            distance = _pairwise(jnp.subtract, q_rank[..., rows], k_rank[..., columns])
            conditions.append(distance < self.window)
        if self.valid is not None:
            conditions.append(self.valid[..., None, None, columns])
        if self.segments is not None:
            q_segment, k_segment = self.segments
            conditions.append(_pairwise(jnp.equal, q_segment[..., rows], k_segment[..., columns]))
        if self.mask is not None:
            conditions.append(self.mask[..., rows, columns])
        if not conditions:
            return None
        rank = max(condition.ndim for condition in conditions)
        conditions = [jax.lax.broadcast_to_rank(condition, rank) for condition in conditions]
        return functools.reduce(jnp.logical_and, conditions)

    def columns(self, rows: slice, keys: int) -> slice:
        """The range of the `keys` that these rows can attend to, as far as known at tracing."""
        if not self.causal or self.orders is not None:
            return slice(0, keys)
        first = 0
        if self.window and self.ranks is None:  # with padding a window reaches further back
            first = max(0, rows.start - self.window + 1)
        return slice(first, rows.stop)


@functools.partial(jax.jit, static_argnames=("dropout", "implementation", "weighed"))
def dot_product(
    query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern = Pattern(), *,
    scale: float | None = None, bias: jax.Array | None = None, dropout: float = 0.0,
    rng: jax.Array | None = None, implementation: str | None = None, weighed: bool = False,
) -> Any:
    """Scaled dot-product attention: ``y = softmax(scale * query @ key^T + bias) @ value``.

    With fewer heads of keys than of queries, neighbouring query heads share a key head. A query
    that attends to no key returns zeros, with zero gradient. The function is jitted, so that a net
    of many layers traces it once.

    Shapes:
        query: (..., H, T, D); key: (..., K, S, D); value: (..., K, S, E), K a divisor of H.
        bias: (..., H or 1, T, S), added to the scores. y: (..., H, T, E), in the dtype of query.

    Args:
        pattern: which keys each query attends to.
        scale: factor of the scores; 1 / sqrt(D) if None.
        dropout: fraction of the weights dropped at random, with the key `rng`.
        implementation: one of `IMPLEMENTATIONS`; selected by `choose` if None.
        weighed: True returns ``(y, weights)``, with the weights (..., H, T, S) after dropout. The
            formula computes them, as cuDNN's kernel keeps none.
    """
    scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)  # (..., H, T, D)
    steps, keys = query.shape[-2], key.shape[-2]
    if not steps or not keys:
        y = jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
        return (y, jnp.zeros((*query.shape[:-1], keys), query.dtype)) if weighed else y

    if weighed and implementation == "cudnn":
        implementation = "xla"
    choice = choose(query, key, value, pattern, implementation=implementation,
                    unsupported=bias is not None or rng is not None or weighed)
    if "cudnn" in choice.values():
        fallback = choice["default"] if "cuda" in choice else "xla"
        return _by_cudnn(scaled, key, value, pattern, fallback)

    empty = pattern.empty or bias is not None  # a bias may be -inf

    def attend(rows: slice, columns: slice) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _weighted_sum(
            scaled[..., rows, :], key[..., columns, :], value[..., columns, :],
            None if bias is None else bias[..., rows, columns],
            pattern.allowed(rows, columns), empty, dropout,
            None if rng is None else jax.random.fold_in(rng, rows.start))

    if choice["default"] == "blocks":
        size = -(-steps // _BLOCKS)
        blocks = [slice(first, min(first + size, steps)) for first in range(0, steps, size)]
        columns = [pattern.columns(rows, keys) for rows in blocks]
        parts = [attend(*block) for block in zip(blocks, columns, strict=True)]
        y = jnp.concatenate([y for y, _, _ in parts], -2)  # (..., H, T, E)
        total = jnp.concatenate([total for _, total, _ in parts], -2)  # (..., H, T, 1)
        weights = [part[2] for part in parts]  # each (..., K, G * rows, columns)
    else:
        y, total, weight = attend(slice(0, steps), slice(0, keys))
        blocks, columns, weights = [slice(0, steps)], [slice(0, keys)], [weight]
    if empty:
        total = jnp.where(total == 0, jnp.ones_like(total), total)
    y = (y * (1 / total)).astype(query.dtype)  # one division for each query
    if not weighed:
        return y

    rows = [_all_columns(weight, query, block, seen, keys)
            for weight, block, seen in zip(weights, blocks, columns, strict=True)]
    return y, (jnp.concatenate(rows, -2) / total).astype(query.dtype)  # (..., H, T, S)


def choose(
    query: Any, key: Any, value: Any, pattern: Pattern, *, unsupported: bool = False,
    implementation: str | None = None,
) -> dict[str, str]:
    """Platform -> implementation for these shapes and dtypes; "default" is one of the platforms.

    `unsupported` is True with a bias, with dropout, or with conditions that `pattern` lacks.
    """
    wants = _cudnn_wants(query, key, value, pattern, unsupported)
    if implementation == "cudnn" and wants:
        raise LayerError(f"{wants}, for cuDNN's attention", show((query, value)),
                         _LEAVE_NONE)
    if implementation:
        return {"default": implementation}
    steps = query.shape[-2]
    aligned = pattern.orders is None and steps == key.shape[-2]
    in_blocks = pattern.causal and aligned and known(steps) and steps >= _LONG
    choice = {"default": "blocks" if in_blocks else "xla"}
    if not wants and not _few_queries(query, key) and _on_hopper():
        choice["cuda"] = "cudnn"
    return choice


def check_implementation(name: Any) -> None:
    """Raise unless `name` is None or the name of an implementation."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise LayerError(f"implementation out of {listed(IMPLEMENTATIONS)}, or None", repr(name),
                         _LEAVE_NONE)


def _pairwise(f: Callable[..., jax.Array], queries: jax.Array, keys: jax.Array) -> jax.Array:
    """f of every query with every key: (..., T) and (..., S) -> (..., 1, T, S)."""
    return f(queries[..., None, :, None], keys[..., None, None, :])


def _weighted_sum(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None,
    allowed: jax.Array | None, empty: bool, dropout: float, rng: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``exp(scores) @ value`` (..., H, T, E), the sums of ``exp(scores)`` (..., H, T, 1), and these
    (..., K, G * T, S).

    The caller divides the first by the second, because y is smaller than the weights. In the
    comments K is the number of key heads, and G = H / K query heads share each of them. These G
    heads are joined along time, so that they are one product.
    """
    wide = wide_dtype(query)
    group = query.shape[-3] // key.shape[-3]  # G

    scores = jnp.einsum("...td,...sd->...ts", _grouped(query, group), key,
                        preferred_element_type=wide)  # (..., K, G * T, S)
    if bias is not None:
        scores = scores + _grouped(bias, group).astype(wide)
    if allowed is not None and allowed.ndim == 2:
        # A mask (T, S) is the same for all examples and heads. Adding a constant is cheaper to
        # differentiate than `where`.
        masked = jnp.where(allowed, 0.0, -jnp.inf).astype(wide)  # (T, S)
        masked = jnp.tile(masked, (group, 1))  # (G * T, S)
        scores = scores + jax.lax.broadcast_to_rank(masked, scores.ndim)
    elif allowed is not None:
        scores = jnp.where(_grouped(allowed, group), scores, -jnp.inf)

    # Softmax is invariant to the subtraction of the maximum, which keeps exp from overflowing.
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # (..., K, G * T, 1)
    if empty:
        top = jnp.maximum(top, jnp.finfo(wide).min)  # -inf - -inf would be NaN
    weights = jnp.exp(scores - top)  # (..., K, G * T, S)
    total = weights.sum(-1, keepdims=True)  # (..., K, G * T, 1)
    if rng is not None:  # after the sum, because dropout acts on normalized weights
        kept = beside(jax.random.bernoulli(rng, 1 - dropout, weights.shape), weights)
        weights = jnp.where(kept, weights / (1 - dropout), jnp.zeros_like(weights))

    y = jnp.einsum("...ts,...se->...te", weights.astype(value.dtype), value,
                   preferred_element_type=wide)  # (..., K, G * T, E)
    batch, heads_and_time = query.ndim - 3, query.shape[-3:-1]
    y = reshaped(y, batch, *heads_and_time, y.shape[-1])  # (..., H, T, E)
    total = reshaped(total, batch, *heads_and_time, 1)  # (..., H, T, 1)
    return y, total, weights


def _all_columns(
    weights: jax.Array, query: jax.Array, rows: slice, columns: slice, keys: int
) -> jax.Array:
    """Weights (..., K, G * rows, columns) as (..., H, rows, keys), zero for all other keys."""
    batch, heads = query.ndim - 3, query.shape[-3]
    weights = reshaped(weights, batch, heads, rows.stop - rows.start, weights.shape[-1])
    beside = [(0, 0)] * (weights.ndim - 1) + [(columns.start, keys - columns.stop)]
    return jnp.pad(weights, beside)


def _grouped(a: jax.Array, group: int) -> jax.Array:
    """(..., H, T, D) -> (..., H / group, group * T, D); a head axis of size 1 stays 1."""
    if group == 1:
        return a
    heads, steps, features = a.shape[-3:]
    if heads == 1:
        return jnp.concatenate([a] * group, -2) if steps != 1 else a
    return reshaped(a, a.ndim - 3, heads // group, group * steps, features)


@dataclasses.dataclass(frozen=True)
class _Kernel(Fused):
    """cuDNN's kernel, with the implementation `fallback` on other platforms."""

    fallback: str

    def formula(self, *operands: jax.Array) -> jax.Array:
        query, key, value = (a.swapaxes(1, 2) for a in operands[:3])  # (B, heads, time, features)
        valid = operands[3] if self.padded else None
        pattern = Pattern(self.causal, self.window, valid=valid, empty=self.padded)
        y = dot_product(query, key, value, pattern, scale=1.0, implementation=self.fallback)
        return y.swapaxes(1, 2)


def _by_cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern, fallback: str
) -> jax.Array:
    """Attention in the layout of cuDNN's kernel: (B, time, heads, features), with D equal to E."""
    batch, examples = query.shape[:-3], math.prod(query.shape[:-3])
    features = max(query.shape[-1], value.shape[-1])

    def to_kernel(a: jax.Array) -> jax.Array:
        if a.shape[-1] < features:
            a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, features - a.shape[-1])])
        return a.reshape(examples, *a.shape[-3:]).swapaxes(1, 2)

    operands = [to_kernel(query), to_kernel(key), to_kernel(value)]
    if pattern.valid is not None:
        valid = jnp.broadcast_to(pattern.valid, (*batch, key.shape[-2]))
        operands.append(valid.reshape(examples, -1))  # (B, S)
    kernel = _Kernel(pattern.causal, pattern.window, pattern.valid is not None, fallback)
    try:
        y = kernel(*operands)  # (B, T, H, features)
    except RuntimeError as error:
        raise LayerError("cuDNN, which comes with JAX for NVIDIA GPUs", str(error).rstrip("."),
                         _LEAVE_NONE) from error
    y = y.swapaxes(1, 2)[..., : value.shape[-1]]  # (B, H, T, E)
    return y.reshape(*query.shape[:-1], value.shape[-1])  # (..., H, T, E)


def _few_queries(query: Any, key: Any) -> bool:
    """Whether the queries are too few for the kernel, as in a decoding step."""
    steps = query.shape[-2]
    return steps == 1 or key.shape[-2] >= _FEW * steps


def _cudnn_wants(query: Any, key: Any, value: Any, pattern: Pattern, unsupported: bool) -> str:
    """The first requirement of cuDNN's kernel that is not met; empty if all are."""
    dtypes = {jnp.dtype(a.dtype) for a in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return "bfloat16 or float16"
    features, limit = max(query.shape[-1], value.shape[-1]), 256 if _on_hopper() else 128
    if features % 8 or features > limit:
        return f"the larger size of keys and values as a multiple of 8 up to {limit}"
    if not all(isinstance(size, int) for a in (query, key, value) for size in a.shape):
        return "static sizes"
    if jax.sharding.get_abstract_mesh().explicit_axes:
        return "a mesh whose axis_types are not Explicit"
    if pattern.orders or pattern.segments or pattern.mask is not None:
        unsupported = True
    if pattern.window and (pattern.valid is not None or not pattern.causal):
        unsupported = True
    if unsupported:
        return "only causal attention, a causal window, or a mask of keys"
    return ""


@functools.cache
def _on_hopper() -> bool:
    """Whether the GPU is a Hopper with cuDNN: elsewhere the kernel is slower, or missing."""
    if jax.default_backend() != "gpu":
        return False
    operands = [jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)] * 3
    try:
        jax.eval_shape(_Kernel(False, None, False, "xla").kernel, *operands)
    except RuntimeError:
        return False
    return getattr(jax.local_devices()[0], "compute_capability", "") == "9.0"
