"""What all attention layers share: maps to queries, keys and values, and what streams of them.

The public layers are in `attention.py`; the product of queries, keys and values in
`dot_product.py`; what a stream keeps in `caches.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_count, check_share
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.masks import check_segments, cleared, over_steps, real_before
from diffprog.core.notation import listed, show
from diffprog.core.parameters import Initializer, fold, parameter
from diffprog.core.plans import Params, State
from diffprog.layers.attention.caches import Context, empty_cache, extended, overrun
from diffprog.layers.attention.dot_product import Pattern, check_implementation, choose, dot_product
from diffprog.layers.linear import affine
from diffprog.layers.positions.absolute import follow
from diffprog.layers.positions.rotary import Rotary

_OF_X = frozenset({"mask", "segments"})
_OF_MEMORY = frozenset({"memory", "memory_mask"})  # `start` computes keys and values of them
_OF_PAIRS = frozenset({"attention_mask", "attention_bias"})
_SIDE = {  # source of keys and values -> side inputs
    "x": _OF_PAIRS | _OF_X, "memory": _OF_PAIRS | _OF_MEMORY,
    "either": _OF_PAIRS | _OF_X | _OF_MEMORY,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multihead:
    """The settings of an attention layer; `layer` makes it.

    `joined` heads have an output map. `source` is what keys and values are made of: x, the side
    input `memory`, or either, as the call has it.
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
    bias_init: Initializer

    def layer(self) -> Layer:
        """The layer of these settings, after a check of them."""
        self._check()
        side = _SIDE[self.source]
        return Layer(
            self.init, self.apply, self.start, random=self.dropout > 0,
            side=side | {"positions"} if self.rotary else side, kept=side & _OF_MEMORY,
            choice=self.choice, casts=True,
        )

    def _check(self) -> None:
        check_count("heads", self.heads)
        for name in ("head_dim", "value_dim", "kv_heads", "window"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_share("dropout", self.dropout)
        check_implementation(self.implementation)
        if self.heads % self._groups:
            raise LayerError(f"kv_heads that divide heads={self.heads}", f"{self.kv_heads}",
                             "choose a divisor: each is shared by equally many heads")
        if self.window and not self.causal:
            raise LayerError("causal=True with a window", "causal=False",
                             "give attention_mask for another pattern: a window looks back")
        if not isinstance(self.rotary, Rotary | None):
            raise LayerError("rotary as dp.rotary makes it", show(self.rotary),
                             "pass dp.rotary(base=10000.0), for example")

    def init(self, key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        """Kernels (and biases) of query, key, value, and of the output map."""
        _check_sequence(x, asks=self._crosses(side))
        self._check_memory(side)
        of_keys, of_values = self._sources(x, side)
        head_dim, value_dim = self._sizes(x)
        shapes = {
            "query": (x.shape[-1], self.heads * head_dim),
            "key": (of_keys.shape[-1], self._groups * head_dim),
            "value": (of_values.shape[-1], self._groups * value_dim),
        }
        if self.joined:
            shapes["out"] = (self.heads * value_dim, x.shape[-1])
        params: Params = {}
        for name, shape in shapes.items():
            of_map = fold(key, name)
            params[name] = {"kernel": parameter(of_map, "kernel", self.kernel_init, shape, x)}
            if self.bias:
                params[name]["bias"] = parameter(of_map, "bias", self.bias_init, shape[-1:], x)
        return params, {}

    def apply(
        self, params: Params, state: State, x: jax.Array, *, key: jax.Array | None = None,
        train: bool = False, **side: Any,
    ) -> tuple[jax.Array, State]:
        """The formula, on a whole sequence, or on a chunk if the state is that of a stream."""
        _check_sequence(x, asks=self._crosses(side, state))
        self._check_memory(side, state)
        crosses = self._crosses(side, state)
        if state:
            _check_state(state, x, crosses)
            _check_stream(side)
        too_long = overrun(state, x.shape[-2])
        if crosses:
            query = self._heads_of(params, "query", x, self._sizes(x)[0])
            keys, values, pattern, state = self._from_memory(params, state, x, side)
        else:
            query, (keys, values, pattern, state) = self._from_x(params, state, x, side)
        pairs = (*query.shape[:-1], keys.shape[-2])
        mask = _for_pairs("attention_mask", jnp.bool_, pairs, side)
        bias = _for_pairs("attention_bias", jnp.floating, pairs, side)
        if mask is not None:
            pattern = dataclasses.replace(pattern, mask=mask, empty=True)
        y = dot_product(query, keys, values, pattern, scale=self.scale, bias=bias,
                        dropout=self.dropout, rng=key if train and self.dropout else None,
                        implementation=self.implementation)
        if too_long is not None:
            y = jnp.where(too_long, jnp.nan, y)  # the write was clamped, over the newest steps
        y = jnp.moveaxis(y, -3, -2)
        y = y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])
        return affine(params["out"], y, x.shape[-1]) if self.joined else y, state

    def start(self, params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        """An empty cache; or keys and values of memory, computed once."""
        _check_sequence(x)
        _check_stream(side)
        self._check_memory(side)
        if self._crosses(side):
            keys, values, pattern, _ = self._from_memory(params, {}, x, side)
            real = jnp.ones((*x.shape[:-2], keys.shape[-2]), bool)
            return {"key": keys, "value": values,
                    "real": real if pattern.real is None else real & pattern.real}
        if not self.causal:
            raise LayerError("causal=True for a stream", "causal=False",
                             "set it: without it every position sees later ones")
        key, value = (_by_head(x, self._groups, size, x.dtype) for size in self._sizes(x))
        cache = empty_cache(key, value, length, self.window)
        return cache | {"next": jnp.zeros(x.shape[:-2], jnp.int32)} if self.rotary else cache

    def choice(self, x: Any, side: dict[str, Any]) -> str:
        """Which implementation runs at rest on these shapes, and where another one does."""
        head_dim, value_dim = self._sizes(x)
        of_keys, _ = self._sources(x, side)
        choice = choose(
            _by_head(x, self.heads, head_dim, x.dtype),
            _by_head(of_keys, self._groups, head_dim, x.dtype),
            _by_head(of_keys, self._groups, value_dim, x.dtype),
            Pattern(self.causal, self.window, real=side.get("mask", side.get("memory_mask"))),
            more=bool(side.keys() - {"memory", "positions", "mask", "memory_mask"}),
            implementation=self.implementation)
        default = choice.pop("default")
        return ", ".join([default, *(f"{name} on {where}" for where, name in choice.items())])

    @property
    def _groups(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def _sizes(self, x: Any) -> tuple[int, int]:
        """Features of a query and of a value."""
        if self.head_dim is None and x.shape[-1] % self.heads:
            raise LayerError(f"a width that is a multiple of heads={self.heads}", show(x),
                             "choose another number of heads, or give head_dim")
        head_dim = self.head_dim or x.shape[-1] // self.heads
        return head_dim, self.value_dim or head_dim

    def _crosses(self, side: dict[str, Any], state: State | None = None) -> bool:
        """Are keys and values those of memory?"""
        if self.source == "either":
            return "memory" in side or "real" in (state or {})
        return self.source == "memory"

    def _check_memory(self, side: dict[str, Any], state: State | None = None) -> None:
        """Raise for what does not go with x, or with memory, where the call decides for either."""
        if self.source != "either":
            return
        crosses = self._crosses(side, state)
        if crosses and (self.causal or self.rotary):
            raise LayerError("no memory for a head that is causal or has rotary",
                             show(side.get("memory")), "leave one of them out: the order of a "
                             "memory is not that of x")
        if crosses and "segments" in side:
            raise LayerError("no segments beside memory", show(side["segments"]),
                             "give attention_mask in their place")
        if not crosses and "memory_mask" in side:
            raise LayerError("memory with its memory_mask", "memory_mask alone",
                             "pass memory= too, or mask= for x itself")

    def _sources(self, x: Any, side: dict[str, Any]) -> Any:
        """What keys and values are made of, a pair."""
        if not self._crosses(side):
            return x, x
        if "memory" not in side:
            raise LayerError("the side input memory", "none",
                             "pass memory=, what is to be asked, in every call but a stream's")
        memory = side["memory"]
        pair = memory if isinstance(memory, (tuple, list)) else (memory, memory)
        if len(pair) != 2:
            raise LayerError("memory as an array or a pair (keys, values)", show(memory),
                             "pass what makes keys, and what makes values")
        for part in pair:
            _check_sequence(part)
            if part.shape[:-2] != x.shape[:-2]:
                one = part.shape[:-2] == x.shape[:-1]  # a vector asks in each example
                raise LayerError(f"memory (..., time, features) for each example of {show(x)}",
                                 show(memory), "write y[..., None, :] for one vector y in each "
                                 "example: it is a sequence of one step" if one else
                                 "give it the leading axes of x")
        if pair[0].shape[-2] != pair[1].shape[-2]:
            raise LayerError("as many keys as values in memory", show(memory),
                             "give each key one value")
        return pair

    def _from_x(
        self, params: Params, state: State, x: jax.Array, side: dict[str, Any]
    ) -> tuple[jax.Array, Context]:
        """Queries of x, and what they meet: keys and values of x, in a stream also of the past."""
        mask, segments = over_steps(side.get("mask"), x), side.get("segments")
        if segments is not None:
            segments = check_segments(segments, x.shape[:-1])
        x = cleared(x, mask)
        asked = cleared(x, self._ever_seen(x, side))
        # Joining the kernels for one product gains nothing: `python benchmarks/gpt.py`.
        head_dim, value_dim = self._sizes(x)
        query = self._heads_of(params, "query", x, head_dim)
        key = self._heads_of(params, "key", asked, head_dim)
        value = self._heads_of(params, "value", asked, value_dim)
        if self.rotary:
            steps, state = follow(state, side.get("positions"), mask, x.shape[:-1], segments)
            steps = None if steps is None else steps[..., None, :]  # the same for all heads
            query, key = self.rotary(query, steps), self.rotary(key, steps)
        return query, self._with_past(state, key, value, mask, segments)

    def _with_past(
        self, state: State, key: jax.Array, value: jax.Array, mask: jax.Array | None,
        segments: jax.Array | None,
    ) -> Context:
        """Keys and values, in a stream with those of the past, and who sees whom."""
        if state:
            return extended(state, key, value, mask, segments, self.window)
        pattern = Pattern(
            self.causal, self.window, real=mask, empty=mask is not None,
            segments=None if segments is None else (segments, segments))
        if self.window and mask is not None:
            rank = real_before(mask)
            pattern = dataclasses.replace(pattern, ranks=(rank, rank))
        return Context(key, value, pattern, state)

    def _from_memory(
        self, params: Params, state: State, x: jax.Array, side: dict[str, Any]
    ) -> Context:
        """Keys and values of memory; those kept in the state, unless it is passed again."""
        if state and "memory" not in side:
            if "memory_mask" in side:
                raise LayerError("memory with its memory_mask", "memory_mask alone",
                                 "leave it out: the stream keeps the mask that start was given")
            pattern = Pattern(real=state["real"], empty=True)
            return Context(state["key"], state["value"], pattern, state)
        of_keys, of_values = self._sources(x, side)
        real, seen = over_steps(side.get("memory_mask"), of_keys), self._ever_seen(x, side)
        key, value = (
            self._heads_of(params, name, cleared(cleared(part, real), seen).astype(x.dtype), size)
            for name, part, size in zip(
                ("key", "value"), (of_keys, of_values), self._sizes(x), strict=True))
        if state:
            if key.shape != state["key"].shape:
                raise LayerError("a memory of the length with which the stream began",
                                 show(side["memory"]), "start anew, or pad it")
            kept = jnp.ones_like(state["real"]) if real is None else real
            state = {"key": key, "value": value, "real": kept}
        return Context(key, value, Pattern(real=real, empty=real is not None), state)

    def _ever_seen(self, x: Any, side: dict[str, Any]) -> jax.Array | None:
        """Which keys any query may see by attention_mask, (batch or 1..., S); None is all."""
        if "attention_mask" not in side:
            return None
        keys = self._sources(x, side)[0].shape[:-1]
        pairs = (*x.shape[:-2], self.heads, x.shape[-2], keys[-1])
        mask = _for_pairs("attention_mask", jnp.bool_, pairs, side)
        return None if mask is None else jnp.broadcast_to(mask.any((-3, -2)), keys)

    def _heads_of(self, params: Params, name: str, x: jax.Array, size: int) -> jax.Array:
        """One of the three linear maps, (..., time, width) to (..., heads, time, size)."""
        heads = self.heads if name == "query" else self._groups
        y = affine(params[name], x, heads * size)
        return jnp.moveaxis(y.reshape(*y.shape[:-1], heads, size), -2, -3)


def _by_head(x: Any, heads: int, size: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape that `_heads_of` makes of x."""
    return jax.ShapeDtypeStruct((*x.shape[:-2], heads, x.shape[-2], size), dtype)


def _for_pairs(
    name: str, kind: Any, shape: tuple[int, ...], side: dict[str, Any]
) -> jax.Array | None:
    """The side input `name`, checked against (..., heads, query, key), the last two broadcast."""
    given = side.get(name)
    if given is None:
        return None
    fits = given.ndim == len(shape) and all(
        size in (1, full) for size, full in zip(given.shape, shape, strict=True))
    if not (jnp.issubdtype(given.dtype, kind) and fits):
        what = "booleans" if kind is jnp.bool_ else "floats"
        raise LayerError(f"{name} as {what} of shape {shape}, or 1 for axes that are alike",
                         show(given), "give it the axes batch, heads, query and key")
    return jnp.broadcast_to(given, (*given.shape[:-2], *shape[-2:]))


def _check_stream(side: dict[str, Any]) -> None:
    for name in ("attention_mask", "attention_bias"):
        if name in side:
            raise LayerError(f"no {name} in a stream", show(side[name]),
                             "say by mask, segments and window what a chunk may see")


def _check_state(state: State, x: Any, crosses: bool) -> None:
    """Raise for the state of another stream."""
    kept = {"key", "value", "real" if crosses else "segments"}
    if kept - state.keys():
        raise LayerError(f"the state of a stream, with {listed(kept)}", listed(state),
                         "pass what start gave")
    key = state["key"]
    if key.shape[:-3] != x.shape[:-2] or key.dtype != x.dtype:
        raise LayerError(f"a chunk with batch axes {key.shape[:-3]} in {key.dtype}, as start saw",
                         show(x), "start anew for another batch or dtype")


def _check_sequence(x: Any, *, asks: bool = False) -> None:
    """Raise unless x is a sequence; a single vector that `asks` a memory is a short one."""
    if asks and len(getattr(x, "shape", "no array")) == 1:
        raise LayerError("at least 2 axes (..., time, features)", show(x),
                         "write y[None] for one vector y: it is a sequence of one step")
    check_array(x, rank=2, axes="(..., time, features)")
