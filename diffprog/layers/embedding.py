"""Embedding: each id of a vocabulary has a vector of its own, for reading and for scoring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import as_int32, check_array, check_count, check_features
from diffprog.core.dtypes import along
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer, stateless
from diffprog.core.meshes import beside, placed
from diffprog.core.notation import show
from diffprog.core.parameters import Initializer, parameter
from diffprog.core.plans import Params

__all__ = ["embedding", "unembed"]

_UNIT_SCORES = jax.nn.initializers.variance_scaling(
    1.0, "fan_in", "normal", in_axis=1, out_axis=0)


@factory
def embedding(
    vocabulary: int, features: int, *, embedding_init: Initializer = _UNIT_SCORES
) -> Layer:
    """Look up the vector of each id: ``y = embedding[x]``.

    It is ``one_hot(vocabulary) >> linear(features, bias=False)``, in value and gradient. To find an
    id that is out of range, run ``checkify.checkify(net.apply, errors=checkify.index_checks)`` of
    `jax.experimental`: its error names the id; without it nothing is spent on the search.

    Shapes:
        x: (...), ints in [0, vocabulary) -> (..., features), in the dtype of the parameters, or
            that of `mixed`. Other ints, negative ones too, give a row of NaN without gradient,
            because nothing can be raised under `jax.jit`.
        params: ``embedding`` (vocabulary, features).

    Args:
        vocabulary: how many ids there are; positive.
        features: size of the vectors; positive.
        embedding_init: initializer; normal with variance 1 / features, so that the scores that
            `unembed` gives to x of variance 1 have variance 1.

    Raises:
        LayerError: x holds no ints.

    Example:
        >>> net = dp.embedding(11, 3)
        >>> params, state = net.init(jax.random.key(0), jnp.array([4, 2]))
        >>> bool((net(params, jnp.array([4, 2])) == params["embedding"][jnp.array([4, 2])]).all())
        True

    Source: Bengio et al. 2003, JMLR 3, section 2.
    """
    check_count("vocabulary", vocabulary)
    check_count("features", features)

    def init(key: jax.Array, x: Any) -> Params:
        _check_ids(x)
        table = jax.ShapeDtypeStruct((vocabulary, features), jnp.float32)
        return {"embedding": parameter(key, "embedding", embedding_init, table.shape, table)}

    def forward(params: Params, x: jax.Array) -> jax.Array:
        _check_ids(x)
        if params["embedding"].shape != (vocabulary, features):
            raise LayerError(f"params of {vocabulary} ids and {features} features", show(params),
                             "pass what init gave")
        return rows(params["embedding"], x)

    return stateless(init, forward, name="embedding", casts=True)


def unembed(params: Params, x: jax.Array) -> jax.Array:
    """Score x against every id with the vectors that read it: ``y = x @ embedding.T``.

    This is the output layer that is tied to an embedding: inside a program, after a call of its
    child ``embed``, it is ``unembed(layers.embed.params, y)``.

    Shapes:
        params: those of an `embedding`, of (vocabulary, features).
        x: (..., features) -> (..., vocabulary), in the dtype of x.

    Raises:
        LayerError: params are not those of an embedding, or x has other features.

    Example:
        >>> @dp.program(embed=dp.embedding(11, 4), body=dp.linear(4))
        ... def net(layers, x):
        ...     y = layers.body(layers.embed(x))
        ...     return dp.unembed(layers.embed.params, y)
        >>> net.plan(jax.ShapeDtypeStruct((2, 5), jnp.int32)).y.shape
        (2, 5, 11)

    Source: Press and Wolf 2017, arXiv:1608.05859; Inan et al. 2017, arXiv:1611.01462.
    """
    if not isinstance(params, dict) or getattr(params.get("embedding"), "ndim", 0) != 2:
        raise LayerError("the params of an embedding", show(params),
                         "pass layers.embed.params, for example, after a call of layers.embed")
    check_array(x, rank=1, axes="(..., features)")
    check_features(params["embedding"].shape[-1], x)
    return x @ params["embedding"].astype(x.dtype).T


def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``, with rows of NaN for ids that are not in [0, len(table))."""
    ids = as_int32(ids)
    return table.at[ids].get(mode="fill", fill_value=np.nan, wrap_negative_indices=False,
                             out_sharding=placed(ids, ids.ndim, 1))


def _check_ids(x: Any) -> None:
    check_array(x, floating=False)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise LayerError("integer input", show(x), "convert it: x.astype(jnp.int32)")


def scaled(width: int) -> Layer:
    """``y = sqrt(width) * x``: vectors that score have variance 1 / width, and waves about 1."""
    return stateless(None, lambda params, x: x * width**0.5, name="scaled")


def leading_token() -> Layer:
    """Put one learned vector before a sequence: ``y = [token, x_1, ..., x_T]``.

    It begins at zero, as in the code of the Vision Transformer, arXiv:2010.11929.
    """

    def forward(params: Params, x: jax.Array) -> jax.Array:
        token = along(params["embedding"], x[..., :1, :])
        leading = jnp.broadcast_to(token, (*x.shape[:-2], 1, x.shape[-1]))
        return jnp.concatenate([beside(leading, x), x], axis=-2)

    return stateless(
        lambda key, x: {"embedding": parameter(key, "embedding", "zeros", (1, x.shape[-1]), x)},
        forward, name="token", casts=True)
