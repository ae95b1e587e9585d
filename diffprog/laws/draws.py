"""The laws of what a layer draws: keys matter, no two draws share one, and noise has no bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.laws.trial import Trial, equal, floats

_KEYS = 300  # over which noise is averaged: a dropout that forgets to divide is 10 errors off
_ERRORS = 6.0  # standard errors that a mean may be off: more come once in a billion


def randomness(t: Trial) -> str | None:
    """Another key gives other results in training, of what is declared random and of no other."""
    if t.layer.random:
        # Few examples may all be dropped, or all be kept, by several keys.
        others = (t.pulled(key=key, train=True).y for key in _keys(t, 20))
        if all(equal(y, t.training.y) for y in others):
            raise LayerError("other results from another key", "the same",
                             "draw with the key of the call, or leave random out")
        return None
    # `apply` hands no key on to what is not declared random, so what it guards is asked.
    raw = getattr(t.layer.apply, "raw", t.layer.apply)
    params, state, x, side = t.given
    run = lambda key: raw(params, state, x, key=key, train=True, **side)[0]  # noqa: E731
    traced = jax.make_jaxpr(run)(t.key).jaxpr
    seen = any(traced.invars[0] is v for eqn in traced.eqns for v in eqn.invars)
    if seen and not equal(*map(jax.jit(run), jax.random.split(t.key))):
        raise LayerError("the same results from any key, of what is not declared random", "others",
                         "make it with Layer(..., random=True)")
    return "it draws nothing"


def draws(t: Trial) -> str | None:
    """Each draw has a key of its own, and equal examples get noise of their own."""
    if not t.layer.random:
        return "it draws nothing"
    if any(layer.name == "fixed_point" for layer in _layers(t.layer)):
        return "a solver draws the same in each iteration"
    _, keys = t.noted
    if not keys:
        return "it draws by keys of another library"
    if len(set(keys)) < len(keys):
        raise LayerError("a key for each draw", f"{len(keys)} draws from {len(set(keys))} keys",
                         "split the key, or fold in what tells the draws apart")
    if not t.options.batched or t.examples < 2:
        return None
    alike = lambda a: np.repeat(np.asarray(a)[:1], len(a), 0)  # noqa: E731
    x, side = jax.tree.map(alike, (t.x, t.side))
    for key in _keys(t, 20):
        leaves = [np.asarray(a) for a in floats(t.pulled(x=x, side=side, key=key, train=True).y)]
        if any(not np.array_equal(a, alike(a)) for a in leaves if len(a) == t.examples):
            return None
    raise LayerError("other noise for each example", "the same for all",
                     "draw an array with the axis of examples")


def noise(t: Trial) -> str | None:
    """The mean over keys is what the layer gives at rest, where it is affine in x."""
    if not t.layer.random:
        return "it draws nothing"
    if not floats(t.x):
        return "x holds no floats"

    def run(key: Any, times: float = 1.0) -> list[np.ndarray]:
        x = jax.tree.map(lambda a: times * a if is_float(a) else a, t.x)
        return [np.asarray(a) for a in floats(t.pulled(x=x, key=key, train=True).y)]

    one, two, three = (run(t.key, times) for times in (1.0, 2.0, 3.0))
    if t.apart([a + b for a, b in zip(one, three, strict=True)], [2 * a for a in two]):
        return "it is not affine in x"
    rest = [np.asarray(a) for a in floats(t.rest.y)]
    off = [[a - b for a, b in zip(run(key), rest, strict=True)] for key in _keys(t, _KEYS)]
    for direction in (rest, [np.ones_like(a) for a in rest]):
        along = [sum(map(np.vdot, direction, one)) for one in off]
        error = np.std(along) / np.sqrt(_KEYS)
        if abs(np.mean(along)) > _ERRORS * error + t.tolerance:
            raise LayerError("noise that is zero in the mean",
                             f"a mean {abs(np.mean(along)) / (error + 1e-30):.0f} errors off",
                             "divide what is kept by the share that is kept")
    return None


def _keys(t: Trial, count: int) -> Iterator[Any]:
    """That many keys."""
    bits = np.asarray(jax.random.key_data(t.key))
    draw = np.random.default_rng(bits)
    for _ in range(count):
        drawn = jnp.asarray(draw.integers(0, 2**32, bits.shape, np.uint32))
        yield jax.random.wrap_key_data(drawn, impl="threefry2x32")


def _layers(layer: Layer) -> Iterator[Layer]:
    yield layer
    for child in layer.children.values():
        yield from _layers(child)
