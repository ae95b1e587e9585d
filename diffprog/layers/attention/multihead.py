"""The layer behind `self_attention`, `cross_attention` and `attention_head`.

The public factories are in `attention.py`, the product of queries, keys and values in
`dot_product.py`, the state of a stream in `caches.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_fraction
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer, Weighs
from diffprog.core.masks import check_segments, cleared, over_steps, valid_before
from diffprog.core.notation import listed, show
from diffprog.core.parameters import Initializer, fold
from diffprog.core.plans import Params, State
from diffprog.layers.attention.caches import (
    Context,
    empty_cache,
    extended,
    keys_of_stream,
    overrun,
)
from diffprog.layers.attention.dot_product import Pattern, check_implementation, choose, dot_product
from diffprog.layers.linear import affine, affine_params
from diffprog.layers.positions.absolute import follow
from diffprog.layers.positions.rotary import Rotary

_SELF = frozenset({"mask", "segments"})
_CROSS = frozenset({"memory", "memory_mask"})  # read by `start` alone
_PAIRS = frozenset({"attention_mask", "attention_bias"})
_SIDE = {  # source of keys and values -> side inputs
    "x": _PAIRS | _SELF,
    "memory": _PAIRS | _CROSS,
    "either": _PAIRS | _SELF | _CROSS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multihead:
    """The settings of an attention layer, and the functions of the layer.

    Attributes:
        joined: whether the heads are concatenated and mapped by ``out``.
        source: the input of the key and value maps: x, the side input `memory`, or "either":
            memory in the calls that pass it, otherwise x.
    """

    heads: int
    joined: bool
    source: Literal["x", "memory", "either"]
    head_dim: int | None
    value_dim: int | None
    kv_heads: int | None = None
    causal: bool = False
    window: int | None = None
    rotary: Rotary | None = None
    bias: bool
    dropout: float
    scale: float | None
    implementation: str | None
    kernel_init: Initializer
    out_init: Initializer | None = None
    bias_init: Initializer

    def layer(self) -> Layer:
        """The layer of these settings, after a check of them."""
        self._check_settings()
        side = _SIDE[self.source]
        return Layer(
            self.init, self.apply, self.start, random=self.dropout > 0,
            side=side | {"positions"} if self.rotary else side, kept=side & _CROSS,
            choice=self.choice, casts=True, weighs=Weighs(self.weighed, keys_of_stream),
        )

    def init(self, key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        """Kernels and biases of the maps ``query``, ``key``, ``value`` and, if joined, ``out``."""
        _check_sequence(x, crosses=self._crosses(side))
        self._check_memory(side)
        key_input, value_input = self._key_value_inputs(x, side)

        width = x.shape[-1]
        head_dim, value_dim = self._dims(x)
        shapes = {
            "query": (width, self.heads * head_dim),
            "key": (key_input.shape[-1], self._kv_heads * head_dim),
            "value": (value_input.shape[-1], self._kv_heads * value_dim),
        }
        if self.joined:
            shapes["out"] = (self.heads * value_dim, width)
        inits = dict.fromkeys(shapes, self.kernel_init)
        if self.joined and self.out_init is not None:
            inits["out"] = self.out_init
        params = {
            name: affine_params(fold(key, name), shape, x, self.bias, inits[name], self.bias_init)
            for name, shape in shapes.items()
        }
        return params, {}

    def apply(
        self, params: Params, state: State, x: jax.Array, *, key: jax.Array | None = None,
        train: bool = False, **side: Any,
    ) -> tuple[jax.Array, State]:
        """Attention over a whole sequence or, with the state of a stream, over the next chunk."""
        return self._apply(dot_product, params, state, x, key, train, side)

    def weighed(
        self, params: Params, state: State, x: jax.Array, *, key: jax.Array | None = None,
        train: bool = False, **side: Any,
    ) -> tuple[tuple[jax.Array, jax.Array], State]:
        """`apply`, with the attention weights (..., heads, T, S)."""
        seen = []

        def product(*operands: Any, **settings: Any) -> jax.Array:
            y, weights = dot_product(*operands, **settings, weighed=True)
            seen.append(weights)
            return y

        y, state = self._apply(product, params, state, x, key, train, side)
        return (y, *seen), state

    def _apply(
        self, product: Callable[..., jax.Array], params: Params, state: State, x: jax.Array,
        key: jax.Array | None, train: bool, side: dict[str, Any],
    ) -> tuple[jax.Array, State]:
        """`apply`, by this product of queries, keys and values."""
        crosses = self._crosses(side, state)
        _check_sequence(x, crosses=crosses)
        self._check_memory(side, state)
        if state:
            _check_state(state, x, crosses)
            _check_stream(side)
        rng = key if train and self.dropout else None  # below, `key` is the key of attention

        past_the_end = overrun(state, x.shape[-2])
        if crosses:
            query = self._project(params, "query", x, self._dims(x)[0])  # (..., heads, T, head_dim)
            context = self._context_of_memory(params, state, x, side)
        else:
            query, context = self._query_and_context_of_x(params, state, x, side)
        key, value, pattern, state = context  # (..., kv_heads, S, head_dim or value_dim)

        pairs = (*query.shape[:-1], key.shape[-2])  # (..., heads, T, S)
        mask = _pair_input("attention_mask", jnp.bool_, pairs, side)
        bias = _pair_input("attention_bias", jnp.floating, pairs, side)
        if mask is not None:
            pattern = dataclasses.replace(pattern, mask=mask, empty=True)
        y = product(
            query, key, value, pattern, scale=self.scale, bias=bias, dropout=self.dropout,
            rng=rng, implementation=self.implementation)  # (..., heads, T, value_dim)
        if past_the_end is not None:
            y = jnp.where(past_the_end, jnp.nan, y)  # the cache wrote over its newest steps

        y = jnp.moveaxis(y, -3, -2)  # (..., T, heads, value_dim)
        y = y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])  # (..., T, heads * value_dim)
        if self.joined:
            y = affine(params["out"], y, x.shape[-1])  # (..., T, D)
        return y, state

    def start(self, params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        """An empty cache, or the keys and values of memory, computed once."""
        _check_sequence(x)
        _check_stream(side)
        self._check_memory(side)
        if self._crosses(side):
            key, value, pattern, _ = self._context_of_memory(params, {}, x, side)
            valid = jnp.ones((*x.shape[:-2], key.shape[-2]), bool)  # (..., S)
            if pattern.valid is not None:
                valid = valid & pattern.valid
            return {"key": key, "value": value, "real": valid}
        if not self.causal:
            raise LayerError("causal=True for a stream", "causal=False",
                             "set it: otherwise each step attends to later ones")
        head_dim, value_dim = self._dims(x)
        key = _projected_shape(x, self._kv_heads, head_dim, x.dtype)
        value = _projected_shape(x, self._kv_heads, value_dim, x.dtype)
        cache = empty_cache(key, value, length, self.window)
        if self.rotary:
            cache["next"] = jnp.zeros(x.shape[:-2], jnp.int32)  # the next position
        return cache

    def choice(self, x: Any, side: dict[str, Any]) -> str:
        """The implementation that inference uses for these shapes, for `summary`."""
        head_dim, value_dim = self._dims(x)
        key_input, _ = self._key_value_inputs(x, side)
        choice = choose(
            _projected_shape(x, self.heads, head_dim, x.dtype),
            _projected_shape(key_input, self._kv_heads, head_dim, x.dtype),
            _projected_shape(key_input, self._kv_heads, value_dim, x.dtype),
            Pattern(self.causal, self.window, valid=side.get("mask", side.get("memory_mask"))),
            unsupported=bool(side.keys() - {"memory", "positions", "mask", "memory_mask"}),
            implementation=self.implementation)
        default = choice.pop("default")
        return ", ".join([default, *(f"{name} on {where}" for where, name in choice.items())])

    # Queries, keys and values.

    def _query_and_context_of_x(
        self, params: Params, state: State, x: jax.Array, side: dict[str, Any]
    ) -> tuple[jax.Array, Context]:
        """Queries, keys and values of x; in a stream keys and values include the past."""
        mask, segments = over_steps(side.get("mask"), x), side.get("segments")  # (..., T)
        if segments is not None:
            segments = check_segments(segments, x.shape[:-1])
        x = cleared(x, mask)
        attended = cleared(x, self._attended(x, side))

        # One product with joined kernels is no faster: `python benchmarks/gpt.py`.
        head_dim, value_dim = self._dims(x)
        query = self._project(params, "query", x, head_dim)  # (..., heads, T, head_dim)
        key = self._project(params, "key", attended, head_dim)  # (..., kv_heads, T, head_dim)
        value = self._project(params, "value", attended, value_dim)  # (..., kv_heads, T, value_dim)
        if self.rotary:
            positions, state = follow(state, side.get("positions"), mask, x.shape[:-1], segments)
            if positions is not None:
                positions = positions[..., None, :]  # (..., 1, T), the same for all heads
            query, key = self.rotary(query, positions), self.rotary(key, positions)

        if state:
            return query, extended(state, key, value, mask, segments, self.window)
        pattern = Pattern(
            self.causal, self.window, valid=mask, empty=mask is not None,
            segments=None if segments is None else (segments, segments))
        if self.window and mask is not None:
            rank = valid_before(mask)
            pattern = dataclasses.replace(pattern, ranks=(rank, rank))
        return query, Context(key, value, pattern, state)

    def _context_of_memory(
        self, params: Params, state: State, x: jax.Array, side: dict[str, Any]
    ) -> Context:
        """Keys and values of memory; in a stream those of the state, unless memory is passed."""
        if state and "memory" not in side:
            if "memory_mask" in side:
                raise LayerError("memory with its memory_mask", "memory_mask alone",
                                 "leave it out: the stream keeps the mask passed to start")
            pattern = Pattern(valid=state["real"], empty=True)
            return Context(state["key"], state["value"], pattern, state)

        key_input, value_input = self._key_value_inputs(x, side)  # (..., S, M)
        valid = over_steps(side.get("memory_mask"), key_input)  # (..., S)
        attended = self._attended(x, side)  # (..., S)
        head_dim, value_dim = self._dims(x)
        key_input = cleared(cleared(key_input, valid), attended).astype(x.dtype)
        key = self._project(params, "key", key_input, head_dim)  # (..., kv_heads, S, head_dim)
        value_input = cleared(cleared(value_input, valid), attended).astype(x.dtype)
        value = self._project(params, "value", value_input, value_dim)
        if state:
            if key.shape != state["key"].shape:
                raise LayerError("a memory of the length with which the stream began",
                                 show(side["memory"]), "start a new stream, or pad the memory")
            kept = jnp.ones_like(state["real"]) if valid is None else valid
            state = {"key": key, "value": value, "real": kept}
        return Context(key, value, Pattern(valid=valid, empty=valid is not None), state)

    def _project(self, params: Params, name: str, x: jax.Array, size: int) -> jax.Array:
        """The linear map `name` of x, split into heads: (..., T, D) -> (..., heads, T, size)."""
        heads = self.heads if name == "query" else self._kv_heads
        y = affine(params[name], x, heads * size)  # (..., T, heads * size)
        y = y.reshape(*y.shape[:-1], heads, size)  # (..., T, heads, size)
        return jnp.moveaxis(y, -2, -3)

    def _attended(self, x: Any, side: dict[str, Any]) -> jax.Array | None:
        """Whether attention_mask allows a key to any query, (batch or 1..., S); None if absent."""
        if "attention_mask" not in side:
            return None
        key_input, _ = self._key_value_inputs(x, side)
        keys = key_input.shape[:-1]  # (..., S)
        pairs = (*x.shape[:-2], self.heads, x.shape[-2], keys[-1])  # (..., heads, T, S)
        mask = _pair_input("attention_mask", jnp.bool_, pairs, side)
        return None if mask is None else jnp.broadcast_to(mask.any((-3, -2)), keys)

    def _key_value_inputs(self, x: Any, side: dict[str, Any]) -> tuple[Any, Any]:
        """The inputs of the key map and of the value map, each (..., S, features)."""
        if not self._crosses(side):
            return x, x
        if "memory" not in side:
            raise LayerError("the side input memory", "none",
                             "pass memory=, the encoder output, in each call: only a stream "
                             "keeps it")
        memory = side["memory"]
        pair = memory if isinstance(memory, (tuple, list)) else (memory, memory)
        if len(pair) != 2:
            raise LayerError("memory as an array or a pair (keys, values)", show(memory),
                             "pass the input of the keys and that of the values")
        for part in pair:
            _check_sequence(part)
            if part.shape[:-2] != x.shape[:-2]:
                remedy = "give it the leading axes of x"
                if part.shape[:-2] == x.shape[:-1]:  # x is one vector for each example
                    remedy = ("write y[..., None, :] for one vector y in each example: it is a "
                              "sequence of one step")
                raise LayerError(f"memory (..., time, features) with the leading axes of {show(x)}",
                                 show(memory), remedy)
        if pair[0].shape[-2] != pair[1].shape[-2]:
            raise LayerError("as many keys as values in memory", show(memory),
                             "give each key one value")
        return pair[0], pair[1]

    def _crosses(self, side: dict[str, Any], state: State | None = None) -> bool:
        """Whether keys and values are those of memory."""
        if self.source == "either":
            return "memory" in side or "real" in (state or {})
        return self.source == "memory"

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def _dims(self, x: Any) -> tuple[int, int]:
        """The features of a query or key, and of a value, in one head."""
        if self.head_dim is None and x.shape[-1] % self.heads:
            raise LayerError(f"a width that is a multiple of heads={self.heads}", show(x),
                             "choose another number of heads, or pass head_dim")
        head_dim = self.head_dim or x.shape[-1] // self.heads
        return head_dim, self.value_dim or head_dim

    # Checks.

    def _check_settings(self) -> None:
        check_count("heads", self.heads)
        for name in ("head_dim", "value_dim", "kv_heads", "window"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_fraction("dropout", self.dropout)
        check_implementation(self.implementation)
        if self.heads % self._kv_heads:
            raise LayerError(f"kv_heads that divide heads={self.heads}", f"{self.kv_heads}",
                             "choose a divisor: each is shared by equally many heads")
        if self.window and not self.causal:
            raise LayerError("causal=True with a window", "causal=False",
                             "set it, or pass attention_mask for another pattern")
        if not isinstance(self.rotary, Rotary | None):
            raise LayerError("rotary as returned by dp.rotary", show(self.rotary),
                             "pass dp.rotary(base=10000.0), for example")

    def _check_memory(self, side: dict[str, Any], state: State | None = None) -> None:
        """Check side inputs that "x" and "memory" do not take, for the source "either"."""
        if self.source != "either":
            return
        crosses = self._crosses(side, state)
        if crosses and (self.causal or self.rotary):
            raise LayerError("no memory for a head that is causal or has rotary",
                             show(side.get("memory")), "leave one of them out: memory and x do "
                             "not share positions")
        if crosses and "segments" in side:
            raise LayerError("no segments together with memory", show(side["segments"]),
                             "pass attention_mask instead")
        if not crosses and "memory_mask" in side:
            raise LayerError("memory with its memory_mask", "memory_mask alone",
                             "pass memory= too, or mask= for x itself")


def _projected_shape(x: Any, heads: int, size: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of `Multihead._project` of x."""
    return jax.ShapeDtypeStruct((*x.shape[:-2], heads, x.shape[-2], size), dtype)


def _pair_input(
    name: str, kind: Any, shape: tuple[int, ...], side: dict[str, Any]
) -> jax.Array | None:
    """The side input `name`, checked against (..., heads, T, S), with T and S broadcast."""
    given = side.get(name)
    if given is None:
        return None
    fits = given.ndim == len(shape) and all(
        size in (1, full) for size, full in zip(given.shape, shape, strict=True))
    if not (jnp.issubdtype(given.dtype, kind) and fits):
        what = "booleans" if kind is jnp.bool_ else "floats"
        raise LayerError(f"{name} as {what} of shape {shape}, or with axes of size 1",
                         show(given), "give it the axes batch, heads, query and key")
    return jnp.broadcast_to(given, (*given.shape[:-2], *shape[-2:]))


def _check_stream(side: dict[str, Any]) -> None:
    for name in ("attention_mask", "attention_bias"):
        if name in side:
            raise LayerError(f"no {name} in a stream", show(side[name]),
                             "pass mask or segments, or set window")


def _check_state(state: State, x: Any, crosses: bool) -> None:
    """Raise for the state of another kind of layer, or of another batch or dtype."""
    kept = {"key", "value", "real" if crosses else "segments"}
    if kept - state.keys():
        raise LayerError(f"the state of a stream, with {listed(kept)}", listed(state),
                         "pass the state that start returned")
    key = state["key"]
    if key.shape[:-3] != x.shape[:-2] or key.dtype != x.dtype:
        raise LayerError(f"a chunk with batch axes {key.shape[:-3]} in {key.dtype}, as start saw",
                         show(x), "start a new stream for another batch or dtype")


def _check_sequence(x: Any, *, crosses: bool = False) -> None:
    """Raise unless x is (..., time, features); the query of a memory may be a vector by mistake."""
    if crosses and len(getattr(x, "shape", "no array")) == 1:
        raise LayerError("at least 2 axes (..., time, features)", show(x),
                         "write y[None] for one vector y: it is a sequence of one step")
    check_array(x, rank=2, axes="(..., time, features)")
