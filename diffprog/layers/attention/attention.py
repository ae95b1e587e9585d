"""The attention layers: self-attention, cross-attention, a single head; and attention itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer
from diffprog.layers.attention.dot_product import Pattern, check_implementation, dot_product
from diffprog.layers.attention.multihead import Multihead
from diffprog.layers.positions.rotary import Rotary

__all__ = ["attention", "attention_head", "cross_attention", "self_attention"]


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = False,
    bias: jax.Array | None = None, mask: jax.Array | None = None, scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention: ``y = softmax(scale * query @ key^T + bias) @ value``.

    A plain function without parameters; a layer is three linear maps and this. Heads are a leading
    axis. A query that attends to no key is 0.

    Shapes:
        query: (..., T, D). y: (..., T, E), in the dtype of query.
        key, value: (..., S, D) and (..., S, E), with the leading axes of query. The last of these,
            the heads, may be a divisor of that of query: neighbouring heads then share a key.
        mask: booleans that broadcast to (..., T, S), True = attend.
        bias: floats that broadcast to (..., T, S), added to the scores.

    Args:
        causal: True masks keys later than the query, for queries and keys of the same steps.
        scale: factor of the scores; ``1 / sqrt(D)`` if None.
        implementation: as in `self_attention`.

    Raises:
        LayerError: for arrays that do not fit each other; causal for T and S that differ.

    Example:
        >>> query, key = jax.random.normal(jax.random.key(0), (2, 5, 8))
        >>> weights = dp.attention(query, key, jnp.eye(5))  # the values eye(S) give the weights
        >>> jnp.allclose(weights.sum(-1), 1)
        Array(True, dtype=bool)

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; shared heads: Ainslie et al. 2023,
    arXiv:2305.13245.
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_array(array, rank=2, axes=f"(..., time, features) for {name}")
    check_implementation(implementation)
    *leading, steps, features = query.shape
    *leading_key, keys, _ = key.shape
    if key.shape[-1] != features or value.shape[:-1] != key.shape[:-1]:
        raise LayerError(f"key (..., S, {features}) and value (..., S, E) for query {show(query)}",
                         f"{show(key)} and {show(value)}",
                         "give a key the features of a query, and each key one value")
    shared = (len(leading) == len(leading_key) and leading[:-1] == leading_key[:-1]
              and not (leading and leading[-1] % leading_key[-1]))
    if not shared:
        raise LayerError(f"keys with the leading axes {tuple(leading)} of query", show(key),
                         "broadcast them: only the last may be a divisor, of shared heads")
    if causal and steps != keys:
        raise LayerError(f"as many keys as queries, {steps}, with causal=True", show(key),
                         "pass mask= for queries and keys of different steps")

    def pairs(name: str, given: Any, kind: Any) -> jax.Array | None:
        """A mask or a bias for all queries and keys, with an axis of heads."""
        if given is None:
            return None
        full = (*leading, steps, keys)
        fits = len(given.shape) <= len(full) and all(
            size in (1, whole) for size, whole in zip(given.shape[::-1], full[::-1], strict=False))
        if not (jnp.issubdtype(given.dtype, kind) and fits):
            what = "booleans" if kind is jnp.bool_ else "floats"
            raise LayerError(f"{name} as {what} that broadcast to {full}", show(given),
                             "give it the axes (..., query, key)")
        return jnp.broadcast_to(given, full if leading else (1, *full))

    allowed, bias = pairs("mask", mask, jnp.bool_), pairs("bias", bias, jnp.floating)
    pattern = Pattern(causal, mask=allowed, empty=allowed is not None)
    operands = (query, key, value) if leading else (query[None], key[None], value[None])
    y = dot_product(*operands, pattern, scale=scale, bias=bias, implementation=implementation)
    return y if leading else y[0]


@factory
def self_attention(
    heads: int, *, head_dim: int | None = None, value_dim: int | None = None,
    kv_heads: int | None = None, causal: bool = False, window: int | None = None,
    rotary: Rotary | None = None, bias: bool = True, dropout: float = 0.0,
    scale: float | None = None, implementation: str | None = None,
    kernel_init: Initializer = "lecun_normal", out_init: Initializer | None = None,
    bias_init: Initializer = "zeros",
) -> Layer:
    """Multi-head self-attention: ``y = concatenate(head_1(x), ..., head_h(x)) @ W + b``.

    ``head_i(x) = softmax(scale * q_i @ k_i^T) @ v_i`` with linear maps q, k and v of x. Causal
    attention streams: the state keeps past keys and values. In a stream `mask`, `segments` and
    `positions` are those of the chunk. A chunk without segments continues the last segment; a chunk
    without positions continues after the last valid step of each row.

    Shapes:
        x: (..., T, D) -> (..., T, D), in the dtype of x.
        mask: booleans (batch, time) or (batch,), True = valid. Masked keys are not attended to. A
            query without any valid key is 0 before the output map, so that its y is the bias.
        segments: ints (batch, time); a query attends to its own segment alone.
        attention_mask: booleans (batch, heads or 1, query, key), True = attend; axes of size 1
            broadcast. A key that no query attends to is set to zero, so NaN there does not spread.
            NaN in a key that some query attends to, or in another segment, does spread, because
            0 * NaN is NaN.
        attention_bias: floats of the same shape, added to the scores.
        positions: with rotary, ints (batch, time); by default the valid steps of each segment are
            counted from 0.
        params: ``query`` (D, heads * head_dim), ``key`` (D, kv_heads * head_dim), ``value``
            (D, kv_heads * value_dim) and ``out`` (heads * value_dim, D), each a ``kernel`` of this
            shape and a ``bias``.
        streaming state: ``key`` (..., kv_heads, P, head_dim), ``value`` (..., kv_heads, P,
            value_dim) and ``segments`` (..., P), where P is `length`, or window - 1; ``segment``
            (...,), that of the last step; without a window ``index``, the number of steps written;
            with rotary ``next`` (...,), the position of the next step.

    Args:
        heads: number of heads; positive.
        head_dim: features of a query and a key; ``D / heads`` if None.
        value_dim: features of a value; head_dim if None.
        kv_heads: number of heads of keys and values, each shared by ``heads / kv_heads``
            neighbouring heads of queries; heads if None.
        causal: True masks keys later than the query.
        window: a causal query attends to itself and to the window - 1 valid steps before it.
        rotary: rotary position embedding of queries and keys, a `rotary(...)`.
        bias: False leaves all biases out.
        dropout: fraction of the attention weights dropped in training, in [0, 1).
        scale: factor of the scores; ``1 / sqrt(head_dim)`` if None.
        implementation: "xla": one product. "blocks": four blocks of queries, which skips 3/8 of the
            work if causal. "cudnn": the kernel for NVIDIA GPUs, in 16 bits; derivatives beyond the
            gradient, and rows not padded on the right, use the formula. None: chosen by platform,
            dtype and shape, and reported by `summary`.
        kernel_init, bias_init: initializers, of all maps; ``lecun_normal`` keeps variances.
        out_init: initializer of the kernel of ``out``; kernel_init if None.

    Raises:
        LayerError: heads does not divide D, or kv_heads does not divide heads; a window without
            causal; a mask of another dtype or shape; a stream without causal, with attention_mask
            or attention_bias, or with a chunk longer than `length`. A stream that runs past
            `length` returns NaN.

    Example:
        >>> net, x = dp.self_attention(4, causal=True), jnp.ones((2, 10, 16))
        >>> params, state = net.init(jax.random.key(0), x)
        >>> state = net.start(params, state, x, length=12)
        >>> y, state = net.apply(params, state, x)  # the prompt
        >>> y, state = net.apply(params, state, x[:, :1])  # one more step
        >>> y.shape
        (2, 1, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2; kv_heads: Ainslie et al. 2023,
    arXiv:2305.13245; window: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
    """
    check_count("heads", heads)
    return Multihead(
        heads=heads, head_dim=head_dim, value_dim=value_dim, kv_heads=kv_heads, causal=causal,
        window=window, rotary=rotary, bias=bias, dropout=dropout, scale=scale,
        implementation=implementation, kernel_init=kernel_init, out_init=out_init,
        bias_init=bias_init, joined=True, source="x",
    ).layer()


@factory
def cross_attention(
    heads: int, *, head_dim: int | None = None, value_dim: int | None = None,
    kv_heads: int | None = None, bias: bool = True, dropout: float = 0.0,
    scale: float | None = None, implementation: str | None = None,
    kernel_init: Initializer = "lecun_normal", out_init: Initializer | None = None,
    bias_init: Initializer = "zeros",
) -> Layer:
    """Multi-head cross-attention: ``y = concatenate(head_1, ..., head_h) @ W + b``.

    ``head_i = softmax(scale * q_i @ k_i^T) @ v_i`` with linear maps q of x, and k and v of
    `memory`, the encoder output. In a stream `start` computes keys and values once, and later calls
    need no memory. Passing memory again replaces it and its mask; without a `memory_mask` all of
    the new memory is valid.

    Shapes:
        x: (..., T, D) -> (..., T, D), in the dtype of x.
        memory: (..., S, M), or a pair (input of the keys, input of the values).
        memory_mask: booleans (batch, S) or (batch,), True = valid; if all keys are masked, y is
            zero before the output map.
        attention_mask, attention_bias: as in `self_attention`.
        params: as in `self_attention`, with M rows in ``key`` and ``value``.
        streaming state: ``key`` (..., kv_heads, S, head_dim), ``value`` (..., kv_heads, S,
            value_dim), ``real`` (..., S).

    Args:
        heads, head_dim, value_dim, kv_heads, bias, dropout, scale, implementation, kernel_init,
            out_init, bias_init: as in `self_attention`.

    Raises:
        LayerError: memory is missing, or its leading axes differ from those of x; and as in
            `self_attention`.

    Example:
        >>> net, x, memory = dp.cross_attention(4), jnp.ones((2, 10, 16)), jnp.ones((2, 7, 5))
        >>> params, state = net.init(jax.random.key(0), x, memory=memory)
        >>> net(params, x, memory=memory).shape
        (2, 10, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
    """
    check_count("heads", heads)
    return Multihead(
        heads=heads, head_dim=head_dim, value_dim=value_dim, kv_heads=kv_heads, bias=bias,
        dropout=dropout, scale=scale, implementation=implementation, kernel_init=kernel_init,
        out_init=out_init, bias_init=bias_init, joined=True, source="memory",
    ).layer()


@factory
def attention_head(
    features: int, value_features: int | None = None, scale: float | None = None, *,
    causal: bool = False, window: int | None = None, rotary: Rotary | None = None,
    bias: bool = True, dropout: float = 0.0, implementation: str | None = None,
    kernel_init: Initializer = "lecun_normal", bias_init: Initializer = "zeros",
) -> Layer:
    """A single attention head: ``y = softmax(scale * q @ k^T) @ v``.

    ``q = x @ W_q + b_q``, ``k = m @ W_k + b_k``, ``v = m @ W_v + b_v``, where m is `memory` if it
    is passed, otherwise x. ``heads(h, attention_head(d)) >> linear(m)`` is multi-head attention,
    which `self_attention` and `cross_attention` compute faster.

    Shapes:
        x: (..., T, D) -> (..., T, value_features), in the dtype of x.
        memory: (..., S, M), or a pair (input of the keys, input of the values).
        mask, memory_mask, segments, attention_mask, attention_bias, positions, streaming: as in
            `self_attention` and `cross_attention`, with one head. With memory, mask has no effect.
        params: ``query``, ``key`` and ``value``, each a ``kernel`` and a ``bias``.

    Args:
        features: features of a query and a key; positive.
        value_features: features of a value; `features` if None.
        scale: factor of the scores; ``1 / sqrt(features)`` if None.
        causal, window, rotary, bias, dropout, implementation: as in `self_attention`.
        kernel_init, bias_init: initializers, of all maps.

    Raises:
        LayerError: as in `self_attention`; memory for a head that is causal or has rotary; memory
            with segments.

    Example:
        >>> net = dp.heads(4, dp.attention_head(8)) >> dp.linear(16)
        >>> net.plan(jnp.ones((2, 10, 16))).y.shape
        (2, 10, 16)

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    check_count("features", features)
    if value_features is not None:
        check_count("value_features", value_features)
    return Multihead(
        heads=1, head_dim=features, value_dim=value_features, causal=causal, window=window,
        rotary=rotary, bias=bias, dropout=dropout, scale=scale, implementation=implementation,
        kernel_init=kernel_init, bias_init=bias_init, joined=False, source="either",
    ).layer()
