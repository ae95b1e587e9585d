"""The product in the middle of attention: weights by softmax, applied to values.

Heads come before time, so that each head is one matrix product. What a query may see is said by a
`Pattern`, of which every implementation asks for the part that it works on.
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
from diffprog.core.errors import LayerError
from diffprog.core.meshes import beside, reshaped
from diffprog.core.notation import listed, show
from diffprog.core.parameters import parameter_dtype
from diffprog.layers.attention.fused import Fused

IMPLEMENTATIONS = ("xla", "blocks", "cudnn")

_BLOCKS = 4  # a causal product in four blocks of queries skips 3/8 of all pairs
_LONG = 256  # steps from which blocks are faster than one product
_FEW = 8  # so many keys to a query leave cuDNN's kernel idle

Pair = tuple[jax.Array, jax.Array]  # of the queries, of the keys


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass  # it passes through jit, where the static fields are Python's
@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which queries see which keys; what is None forbids nothing.

    Attributes:
        causal: no query sees a key of higher order.
        window: a query sees the keys less than so many ranks behind it.
        orders: (T,) and (S,), the order in time; 0, 1, 2, ... for both if None.
        ranks: (..., T) and (..., S), what `window` counts; the orders if None.
        real: (..., S), the keys that are there.
        segments: (..., T) and (..., S), ints; a query sees the keys of its own segment.
        mask: (..., heads or 1, T, S), an explicit pattern.
        empty: may a query see nothing at all?
    """

    causal: bool = _static(False)
    window: int | None = _static(None)
    orders: Pair | None = None
    ranks: Pair | None = None
    real: jax.Array | None = None
    segments: Pair | None = None
    mask: jax.Array | None = None
    empty: bool = _static(False)

    def seen(self, rows: slice, columns: slice) -> jax.Array | None:
        """Booleans (..., heads or 1, rows, columns), True = seen; None if all is seen."""
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
            behind = _of_pairs(jnp.subtract, q_rank[..., rows], k_rank[..., columns])
            conditions.append(behind < self.window)
        if self.real is not None:
            conditions.append(self.real[..., None, None, columns])
        if self.segments is not None:
            q_segments, k_segments = self.segments
            conditions.append(
                _of_pairs(jnp.equal, q_segments[..., rows], k_segments[..., columns]))
        if self.mask is not None:
            conditions.append(self.mask[..., rows, columns])
        rank = max((condition.ndim for condition in conditions), default=0)
        conditions = [jax.lax.broadcast_to_rank(condition, rank) for condition in conditions]
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def reach(self, rows: slice, keys: int) -> slice:
        """Of so many keys those that the rows may see, as far as it is known at tracing."""
        if not self.causal or self.orders is not None:
            return slice(0, keys)
        first = 0
        if self.window and self.ranks is None:  # padding makes a window longer
            first = max(0, rows.start - self.window + 1)
        return slice(first, rows.stop)


@functools.partial(jax.jit, static_argnames=("dropout", "implementation"))
def dot_product(
    query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern = Pattern(), *,
    scale: float | None = None, bias: jax.Array | None = None, dropout: float = 0.0,
    rng: jax.Array | None = None, implementation: str | None = None,
) -> jax.Array:
    """Weigh values by likeness: ``y = softmax(scale * query @ key^T + bias) @ value``.

    Where there are fewer heads of keys than of queries, neighbouring heads of queries share one.
    A query that sees no key gives zeros, with zero gradient. It is jitted, so that a net of many
    layers traces it once.

    Shapes:
        query: (..., H, T, D); key: (..., K, S, D); value: (..., K, S, E), K a divisor of H.
        bias: (..., H or 1, T, S), added to the scores. y: (..., H, T, E), in the dtype of query.

    Args:
        pattern: which queries see which keys.
        scale: factor of the scores; 1 / sqrt(D) if None.
        dropout: share of the weights that is dropped at random, with the key `rng`.
        implementation: one of `IMPLEMENTATIONS`; chosen by `choose` if None.
    """
    scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    steps, keys = query.shape[-2], key.shape[-2]
    empty = pattern.empty or bias is not None  # a bias may hold -inf
    if not steps or not keys:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)

    def attend(rows: slice, columns: slice) -> tuple[jax.Array, jax.Array]:
        """What these queries take of these keys: the weighted sum and the sum of weights."""
        return _weighted(
            scaled[..., rows, :], key[..., columns, :], value[..., columns, :],
            None if bias is None else bias[..., rows, columns], pattern.seen(rows, columns),
            empty, dropout, None if rng is None else jax.random.fold_in(rng, rows.start))

    def normalized(y: jax.Array, total: jax.Array) -> jax.Array:
        if empty:
            total = jnp.where(total == 0, jnp.ones_like(total), total)
        return (y * (1 / total)).astype(query.dtype)  # one division for each query

    def at_once() -> jax.Array:
        return normalized(*attend(slice(0, steps), slice(0, keys)))

    def in_blocks() -> jax.Array:
        """Block by block of the queries, each with no more keys than it may see."""
        size = -(-steps // _BLOCKS)
        blocks = [slice(first, min(first + size, steps)) for first in range(0, steps, size)]
        ys, totals = zip(*(attend(rows, pattern.reach(rows, keys)) for rows in blocks),
                         strict=True)
        return normalized(jnp.concatenate(ys, -2), jnp.concatenate(totals, -2))

    choice = choose(query, key, value, pattern, implementation=implementation,
                    more=bias is not None or rng is not None)
    if "cudnn" in choice.values():
        elsewhere = choice["default"] if "cuda" in choice else "xla"
        return _fused(scaled, key, value, pattern, elsewhere)
    return in_blocks() if choice["default"] == "blocks" else at_once()


def choose(
    query: Any, key: Any, value: Any, pattern: Pattern, *, more: bool = False,
    implementation: str | None = None,
) -> dict[str, str]:
    """Platform -> implementation, "default" among them, for inputs of these shapes and dtypes.

    `more` says that there is a bias, dropout, or a pattern that `pattern` does not tell.
    """
    unfit = _unfit(query, key, value, pattern, more)
    if implementation == "cudnn" and unfit:
        raise LayerError(f"{unfit}, for cuDNN's attention", show((query, value)),
                         "leave the choice of the implementation to the layer")
    if implementation:
        return {"default": implementation}
    aligned = pattern.orders is None and query.shape[-2] == key.shape[-2]
    blocks_pay = pattern.causal and aligned and (
        known(query.shape[-2]) and query.shape[-2] >= _LONG)
    choice = {"default": "blocks" if blocks_pay else "xla"}
    return choice if unfit or _idle(query, key) or not _on_hopper() else choice | {"cuda": "cudnn"}


def check_implementation(name: Any) -> None:
    """Raise unless it is None or names an implementation."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise LayerError(f"implementation out of {listed(IMPLEMENTATIONS)}, or None", repr(name),
                         "leave it None to choose by platform, dtype and shape")


def _of_pairs(f: Callable[..., jax.Array], queries: jax.Array, keys: jax.Array) -> jax.Array:
    """f of every pair, (..., T) and (..., S) to (..., 1, T, S)."""
    return f(queries[..., None, :, None], keys[..., None, None, :])


def _weighted(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None,
    seen: jax.Array | None, empty: bool, rate: float, rng: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum (..., H, T, E) and the sum of weights (..., H, T, 1).

    The caller divides the one by the other, because y is smaller than the weights. Axes in the
    comments: k heads of keys, r heads of queries to each. The queries of r heads stand one after
    the other in time, so that they are one product: t = r * T. s = S, d and e are features.
    """
    wide, shared = parameter_dtype(query), query.shape[-3] // key.shape[-3]  # shared = r
    # Scores.
    scores = jnp.einsum("...td,...sd->...ts", _in_groups(query, shared), key,
                        preferred_element_type=wide)  # k t d, k s d -> k t s
    # Bias.
    if bias is not None:
        scores = scores + _in_groups(bias, shared).astype(wide)
    # Mask. One of (T, S) is the same for every example and head: adding a constant is cheaper to
    # differentiate than a choice.
    if seen is not None and seen.ndim == 2:
        hidden = jnp.tile(jnp.where(seen, 0.0, -jnp.inf).astype(wide), (shared, 1))  # t s
        scores = scores + jax.lax.broadcast_to_rank(hidden, scores.ndim)
    elif seen is not None:
        scores = jnp.where(_in_groups(seen, shared), scores, -jnp.inf)
    # The numerator of softmax. Scores less the largest, so that exp does not overflow.
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # k t 1
    if empty:
        top = jnp.maximum(top, jnp.finfo(wide).min)  # the largest of nothing is -inf
    weights = jnp.exp(scores - top)  # k t s
    # Its sum, taken before dropout: dropout acts on normalized weights.
    total = weights.sum(-1, keepdims=True)  # k t 1
    # Dropout.
    if rng is not None:
        kept = beside(jax.random.bernoulli(rng, 1 - rate, weights.shape), weights)
        weights = jnp.where(kept, weights / (1 - rate), jnp.zeros_like(weights))
    # The product.
    y = jnp.einsum("...ts,...se->...te", weights.astype(value.dtype), value,
                   preferred_element_type=wide)  # k t s, k s e -> k t e
    batch, apart = query.ndim - 3, query.shape[-3:-1]  # k t to H T
    return reshaped(y, batch, *apart, y.shape[-1]), reshaped(total, batch, *apart, 1)


def _in_groups(a: jax.Array, shared: int) -> jax.Array:
    """(..., H, T, D) to (..., k, r * T, D) where r are `shared`; one head for all stays one."""
    if shared == 1:
        return a
    if a.shape[-3] == 1:
        return jnp.concatenate([a] * shared, -2) if a.shape[-2] != 1 else a
    return reshaped(a, a.ndim - 3, a.shape[-3] // shared, shared * a.shape[-2], a.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Kernel(Fused):
    """cuDNN's kernel; `elsewhere` names what computes the formula on other platforms."""

    elsewhere: str

    def formula(self, *operands: jax.Array) -> jax.Array:
        (query, key, value), real = (a.swapaxes(1, 2) for a in operands[:3]), operands[3:]
        pattern = Pattern(self.causal, self.window, real=real[0] if real else None,
                          empty=self.padded)
        return dot_product(query, key, value, pattern, scale=1.0,
                           implementation=self.elsewhere).swapaxes(1, 2)


def _fused(
    query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern, elsewhere: str
) -> jax.Array:
    """The kernel wants one axis of examples, time before heads, and one number of features."""
    lead, examples = query.shape[:-3], math.prod(query.shape[:-3])
    features = max(query.shape[-1], value.shape[-1])

    def fitted(a: jax.Array) -> jax.Array:
        if a.shape[-1] < features:
            a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, features - a.shape[-1])])
        return a.reshape(examples, *a.shape[-3:]).swapaxes(1, 2)

    real = () if pattern.real is None else (jnp.broadcast_to(
        pattern.real, (*lead, key.shape[-2])).reshape(examples, -1),)
    kernel = _Kernel(pattern.causal, pattern.window, bool(real), elsewhere)
    try:
        y = kernel(fitted(query), fitted(key), fitted(value), *real)
    except RuntimeError as error:
        raise LayerError("cuDNN, which comes with JAX for NVIDIA GPUs", str(error).rstrip("."),
                         "leave the choice of the implementation to the layer") from error
    y = y.swapaxes(1, 2)[..., : value.shape[-1]]
    return y.reshape(*query.shape[:-1], value.shape[-1])


def _idle(query: Any, key: Any) -> bool:
    """Are the queries too few for the kernel, as in a step or a short chunk of a stream?"""
    steps = query.shape[-2]
    return steps == 1 or key.shape[-2] >= _FEW * steps


def _unfit(query: Any, key: Any, value: Any, pattern: Pattern, more: bool) -> str:
    """What cuDNN's kernel wants and does not get; nothing if all is well."""
    dtypes = {jnp.dtype(a.dtype) for a in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return "bfloat16 or float16"
    features, limit = max(query.shape[-1], value.shape[-1]), 256 if _on_hopper() else 128
    if features % 8 or features > limit:
        return f"the larger number of features, of keys or values, as a multiple of 8 up to {limit}"
    if not all(isinstance(size, int) for a in (query, key, value) for size in a.shape):
        return "sizes that are known"
    if jax.sharding.get_abstract_mesh().explicit_axes:
        return "a mesh whose axis_types are not Explicit"
    if more or pattern.orders or pattern.segments or pattern.mask is not None or (
            pattern.window and (pattern.real is not None or not pattern.causal)):
        return "no more than causality, with it a window, or a mask of keys"
    return ""


@functools.cache
def _on_hopper() -> bool:
    """Is the GPU a Hopper, with cuDNN? On others its kernel is not the fastest, or is missing."""
    if jax.default_backend() != "gpu":
        return False
    given = [jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)] * 3
    try:
        jax.eval_shape(_Kernel(False, None, False, "xla").kernel, *given)
    except RuntimeError:
        return False
    return getattr(jax.local_devices()[0], "compute_capability", "") == "9.0"
