"""Embedding: a table with one vector for each id, used for look-up and for output scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog.core.arguments import as_int32, check_array, check_count, check_features, check_ints
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

    Value and gradient equal those of ``one_hot(vocabulary) >> linear(features, bias=False)``. To
    find an id that is out of range, run
    ``checkify.checkify(net.apply, errors=checkify.index_checks)`` of `jax.experimental`, whose
    error names the id. The check costs nothing unless requested.

    Shapes:
        x: (...), ints in [0, vocabulary) -> (..., features), in the dtype of the parameters, or
            that of `mixed`. Any other int, including a negative one, returns a row of NaN without
            gradient, because an error cannot be raised under `jax.jit`.
        params: ``embedding`` (vocabulary, features).

    Args:
        vocabulary: number of ids; positive.
        features: size of each vector; positive.
        embedding_init: initializer; normal with variance 1 / features, so that the scores of
            `unembed` have variance 1 for x of variance 1.

    Raises:
        LayerError: x is not an array of ints.

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
                             "pass what init returned")
        return rows(params["embedding"], x)

    return stateless(init, forward, name="embedding", casts=True)


def unembed(params: Params, x: jax.Array) -> jax.Array:
    """Compute logits with a tied embedding: ``y = x @ embedding.T``.

    In a program with a child ``embed``, call ``unembed(layers.embed.params, y)`` after the child.

    Shapes:
        params: those of an `embedding`, (vocabulary, features).
        x: (..., features) -> (..., vocabulary), in the dtype of x.

    Raises:
        LayerError: params are not those of an embedding, or x has a different number of features.

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
    return x @ params["embedding"].astype(x.dtype).T  # (..., vocabulary)


def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``, with rows of NaN for ids outside [0, len(table))."""
    ids = as_int32(ids)
    return table.at[ids].get(mode="fill", fill_value=np.nan, wrap_negative_indices=False,
                             out_sharding=placed(ids, ids.ndim, 1))


def _check_ids(x: Any) -> None:
    check_array(x, floating=False)
    check_ints("ids", x)


def scaled(width: int) -> Layer:
    """``y = sqrt(width) * x``, from embeddings of variance 1 / width to variance 1."""
    return stateless(None, lambda params, x: x * width**0.5, name="scaled")


def leading_token() -> Layer:
    """Prepend one learned vector to a sequence: ``y = [token, x_1, ..., x_T]``.

    It is initialized to zero, as in the code of the Vision Transformer, arXiv:2010.11929.
    """

    def init(key: jax.Array, x: Any) -> Params:
        return {"embedding": parameter(key, "embedding", "zeros", (1, x.shape[-1]), x)}

    def forward(params: Params, x: jax.Array) -> jax.Array:
        token = along(params["embedding"], x[..., :1, :])
        token = jnp.broadcast_to(token, (*x.shape[:-2], 1, x.shape[-1]))  # (..., 1, D)
        return jnp.concatenate([beside(token, x), x], axis=-2)  # (..., T + 1, D)

    return stateless(init, forward, name="token", casts=True)
