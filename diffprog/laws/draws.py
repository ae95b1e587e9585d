"""The laws of randomness: keys matter, no two draws share one, and noise has no bias."""

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

_KEYS = 300  # samples of the mean of noise: dropout without division is off by 10 standard errors
_ERRORS = 6.0  # largest deviation of a mean, in standard errors: exceeded once in a billion
NOT_RANDOM = "the layer is not random"


def randomness(t: Trial) -> str | None:
    """In training, the key changes the output of a random layer, and of no other layer."""
    if t.layer.random:
        # With few examples, several keys may drop all of them, or none.
        others = (t.call(key=key, train=True).y for key in _keys(t, 20))
        if all(equal(y, t.training.y) for y in others):
            raise LayerError("other results from another key", "the same",
                             "draw with the key of the call, or leave random out")
        return None
    # `apply` passes no key to a layer that is not random, so the function inside is called.
    raw = getattr(t.layer.apply, "raw", t.layer.apply)
    params, state, x, side = t.given

    def run(key: Any) -> Any:
        return raw(params, state, x, key=key, train=True, **side)[0]

    traced = jax.make_jaxpr(run)(t.key).jaxpr
    used = any(traced.invars[0] is v for eqn in traced.eqns for v in eqn.invars)
    if used and not equal(*map(jax.jit(run), jax.random.split(t.key))):
        raise LayerError("the same results from any key for a layer without random=True", "others",
                         "make it with Layer(..., random=True)")
    return NOT_RANDOM


def draws(t: Trial) -> str | None:
    """Each draw has its own key, and equal examples get different noise."""
    if not t.layer.random:
        return NOT_RANDOM
    if any(layer.wraps and layer.wraps.order == "fixed point" for layer in _layers(t.layer)):
        return "the iterations of a solver share their noise"
    _, keys = t.recorded
    if not keys:
        return "it draws with keys of another library"
    if len(set(keys)) < len(keys):
        raise LayerError("a key for each draw", f"{len(keys)} draws from {len(set(keys))} keys",
                         "split the key, or fold in what tells the draws apart")
    if not t.options.batched or t.examples < 2:
        return None
    x, side = jax.tree.map(_repeat_first, (t.x, t.side))
    for key in _keys(t, 20):
        y = t.call(x=x, side=side, key=key, train=True).y
        leaves = [np.asarray(a) for a in floats(y)]
        if any(not np.array_equal(a, _repeat_first(a)) for a in leaves if len(a) == t.examples):
            return None
    raise LayerError("other noise for each example", "the same for all",
                     "draw an array with the batch axis")


def _repeat_first(a: Any) -> np.ndarray:
    """The first example in place of all."""
    return np.repeat(np.asarray(a)[:1], len(a), 0)


def noise(t: Trial) -> str | None:
    """The mean over keys in training equals inference, for a layer that is affine in x."""
    if not t.layer.random:
        return NOT_RANDOM
    if not floats(t.x):
        return "x has no floats"

    def run(key: Any, factor: float = 1.0) -> list[np.ndarray]:
        x = jax.tree.map(lambda a: factor * a if is_float(a) else a, t.x)
        return [np.asarray(a) for a in floats(t.call(x=x, key=key, train=True).y)]

    one, two, three = (run(t.key, factor) for factor in (1.0, 2.0, 3.0))
    if t.differs([a + b for a, b in zip(one, three, strict=True)], [2 * a for a in two]):
        return "it is not affine in x"
    inference = [np.asarray(a) for a in floats(t.inference.y)]
    deviations = [[a - b for a, b in zip(run(key), inference, strict=True)]
                  for key in _keys(t, _KEYS)]
    for direction in (inference, [np.ones_like(a) for a in inference]):
        projected = [sum(map(np.vdot, direction, one)) for one in deviations]
        error = np.std(projected) / np.sqrt(_KEYS)
        if abs(np.mean(projected)) > _ERRORS * error + t.tolerance:
            ratio = abs(np.mean(projected)) / (error + 1e-30)
            raise LayerError("noise of mean zero", f"a mean {ratio:.0f} standard errors off",
                             "divide by the probability of keeping an entry")
    return None


def _keys(t: Trial, count: int) -> Iterator[Any]:
    """`count` random keys."""
    bits = np.asarray(jax.random.key_data(t.key))
    rng = np.random.default_rng(bits)
    for _ in range(count):
        data = jnp.asarray(rng.integers(0, 2**32, bits.shape, np.uint32))
        yield jax.random.wrap_key_data(data, impl="threefry2x32")


def _layers(layer: Layer) -> Iterator[Layer]:
    """The layer, the layers that its wrappers wrap, and all layers inside."""
    yield layer
    for inside in [layer.wraps.layer] if layer.wraps else layer.children.values():
        yield from _layers(inside)
