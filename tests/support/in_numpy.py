"""Layers written out in NumPy, all in float64: attention, rotary positions, norms."""

import jax
import numpy as np

# Attention: loops over examples, heads and queries.


def numbers(net, x, **side):
    """Parameters for a net, drawn by NumPy, which compiles nothing; no bias is zero."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: (draw(size=leaf.shape) / 2).astype(leaf.dtype),
                        net.plan(x, **side).params)


def attend(query, key, value, seen=None, *, scale=None, bias=0.0):
    """``softmax(scale * q @ k^T + bias) @ v`` for (batch, heads, time, features), query by query.

    `seen` and `bias` broadcast to (batch, heads, queries, keys); who sees nothing gets zeros.
    """
    examples, heads, steps, features = query.shape
    share = heads // key.shape[1]
    pairs = (examples, heads, steps, key.shape[2])
    seen = np.broadcast_to(True if seen is None else seen, pairs)
    bias = np.broadcast_to(bias, pairs)
    y = np.zeros((examples, heads, steps, value.shape[-1]))
    for n, h, t in np.ndindex(pairs[:3]):
        places = np.flatnonzero(seen[n, h, t])
        if len(places):
            scores = key[n, h // share, places] @ query[n, h, t]
            scores = scores * (1 / np.sqrt(features) if scale is None else scale)
            weights = np.exp(scores + bias[n, h, t, places])
            y[n, h, t] = weights / weights.sum() @ value[n, h // share, places]
    return y


def visible(steps, *, causal=False, window=None, mask=None, segments=None):
    """Which queries see which keys, (batch or 1, 1, time, time), pair by pair."""
    rows = mask if segments is None else segments
    examples = 1 if rows is None else len(rows)
    seen = np.zeros((examples, 1, steps, steps), bool)
    real = np.ones((examples, steps), bool) if mask is None else np.asarray(mask)
    for n, t, u in np.ndindex(examples, steps, steps):
        behind = real[n, u:t].sum()  # real steps from the key on, up to the query
        seen[n, 0, t, u] = (
            real[n, u] and (not causal or u <= t) and (window is None or behind < window)
            and (segments is None or segments[n][t] == segments[n][u]))
    return seen


def turned(x, positions, base=10000.0):
    """Rotary positions: features i and i + D/2 of step t, turned by ``t * base**(-2i/D)``."""
    y, half = np.zeros_like(x), x.shape[-1] // 2
    for n, t, i in np.ndindex(x.shape[0], x.shape[2], half):
        angle = positions[n][t] * base ** (-i / half)
        a, b = x[n, :, t, i], x[n, :, t, i + half]
        y[n, :, t, i] = a * np.cos(angle) - b * np.sin(angle)
        y[n, :, t, i + half] = a * np.sin(angle) + b * np.cos(angle)
    return y


def affine(params, x):
    return x @ np.asarray(params["kernel"]) + np.asarray(params.get("bias", 0.0))


def split(x, heads):
    """(batch, time, heads * features) to (batch, heads, time, features)."""
    return np.stack(np.split(x, heads, axis=-1), axis=1)


def multihead(params, x, *, heads, kv_heads=None, memory=None, positions=None, **rest):
    """All of an attention layer; without an output map if params have none."""
    keys, values = memory if isinstance(memory, tuple) else (x if memory is None else memory,) * 2
    kv_heads = kv_heads or heads
    query = split(affine(params["query"], x), heads)
    key = split(affine(params["key"], keys), kv_heads)
    value = split(affine(params["value"], values), kv_heads)
    if positions is not None:
        query, key = turned(query, positions), turned(key, positions)
    y = np.concatenate(list(attend(query, key, value, **rest).swapaxes(0, 1)), axis=-1)
    return affine(params["out"], y) if "out" in params else y


# Rotary positions.


def as_complex(x, positions, speeds, interleaved=False, magnitude=1.0):
    """Each pair as a complex number, multiplied by ``exp(i t f)``; x (..., time, features)."""
    pairs = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, None))
    z = x[..., first] + 1j * x[..., second]
    z = z * np.exp(1j * np.asarray(positions)[..., None] * speeds) * magnitude
    y = np.zeros_like(x)
    y[..., first], y[..., second] = z.real, z.imag
    return y


def speeds(dims, base=10000.0):
    return np.array([base ** (-2 * i / dims) for i in range(dims // 2)])


# Norms.

EPS = 1e-3  # large, so that its place in the formula shows


def off_centre(*shape, seed=0):
    """Numbers that are not standardized."""
    return np.random.default_rng(seed).normal(2.0, 3.0, size=shape)


def standardized(x, mean, var, scale=1.0, bias=0.0, eps=EPS):
    return scale * (x - mean) / np.sqrt(var + eps) + bias
