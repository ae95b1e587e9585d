"""Hypernetworks: one net, the generator, computes the parameters of another, the target.

The trained parameters are those of the generator and, for each leaf of the target, an affine map
from the generator's features to that leaf. The tree of these maps is the target's own tree, with
each leaf replaced by a ``kernel`` and a ``bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, known
from diffprog.core.computed import Mapped
from diffprog.core.errors import LayerError, signed
from diffprog.core.factories import factory
from diffprog.core.guards import check_children, inputs
from diffprog.core.layer import Layer, as_layer
from diffprog.core.loops import convolves
from diffprog.core.meshes import beside
from diffprog.core.notation import listed, show
from diffprog.core.parameters import Initializer, fold, parameter
from diffprog.core.paths import paths
from diffprog.core.plans import Call, Params, Plan, State, remember

__all__ = ["hyper"]

# A hundredth of the variance of `lecun_normal`.
_SMALL = jax.nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


@factory
def hyper(target: Any, generator: Any, *, kernel_init: Initializer = _SMALL) -> Layer:
    """Generate the parameters of a layer: ``y = f(x; W)``, ``W = g(condition) @ kernel + bias``.

    Each leaf W of the target f is an affine map of the features that the generator g computes from
    the side input ``condition``. The rank of the features decides how W is shared:

    - (H,): one task. All of x is computed with the same W.
    - (batch, H): one W per example, with the batch on the first axis of x and of the target's side
      inputs. Each example is computed as a batch of one.

    A bias is initialized as the target's own leaf from the same key. The kernels start small, with
    a hundredth of the variance of ``lecun_normal`` for features of variance 1, so that training
    starts near the initialized target. With the full variance the activations would double in
    variance with every layer.

    A stream computes W once, at its start, and keeps it. Other side inputs go to whichever of the
    two layers takes them; to keep a mask of x from the generator, wrap it in a program.

    Shapes:
        x, y: input and output of the target.
        condition: input of the generator, whose output is (H,) or (batch, H).
        params: ``generator``; ``target``, where a leaf of shape S is ``kernel`` (H, *S) and
            ``bias`` S. state: ``generator``.

    Args:
        target: a layer with parameters and without state.
        generator: a layer that returns one array of features.
        kernel_init: initializer of all kernels, of shape (H, *S). The default has a tenth of the
            standard deviation of ``lecun_normal``, whose variance 1 / (H * fan-in) is that of
            Chang et al. 2020, section 4.

    Raises:
        LayerError: at composition, if the target has no parameters; at ``init``, without
            ``condition``, for a target with state or one that moves the batch axis, and for
            features of another rank or another batch size than x.

    Example:
        >>> net = dp.hyper(dp.linear(3), dp.linear(8) >> jnp.tanh)
        >>> x, condition = jnp.ones((5, 2)), jnp.ones((5, 4))
        >>> params, state = net.init(jax.random.key(0), x, condition=condition)
        >>> params["target"]["kernel"]["kernel"].shape
        (8, 2, 3)
        >>> net(params, x, condition=condition).shape, net(params, x, condition=condition[0]).shape
        ((5, 3), (5, 3))

    Source: Ha, Dai, Le 2016, arXiv:1609.09106, section 3.1; Chang, Flokas, Lipson 2020,
    arXiv:2312.08399.
    """
    target, generator = as_layer(target), as_layer(generator)
    if target.bare:
        raise LayerError("a target with parameters", repr(target),
                         "pass dp.linear(8), for example: this one has nothing to generate")
    net = _Hypernetwork(target, generator, kernel_init)
    generator_side = {"condition"} | generator.side
    return Layer(
        net.init, net.apply, net.start, net.children,
        lambda children: hyper(**children, kernel_init=kernel_init),
        within=lambda f: hyper(f(target), f(generator), kernel_init=kernel_init),
        name="hyper", random=generator.random or target.random,
        side=frozenset(generator_side | target.side),
        kept=frozenset(generator_side - target.side | target.kept),
        planner=net.plan, computed=(Mapped(),),
    )


class _Plans(NamedTuple):
    """The plans of both layers, and the call of the target: of one example, if each has its own W.
    """

    generator: Plan
    target: Plan
    call: Call
    batch: int | None  # None if all examples share W

    def maps(self) -> Params:
        """The shapes of the target's tree with each leaf replaced by its affine map."""
        features = self.generator.y.shape[-1]
        return jax.tree.map(lambda leaf: {
            "kernel": jax.ShapeDtypeStruct((features, *leaf.shape), leaf.dtype), "bias": leaf},
            self.target.params)


class _Hypernetwork:
    """The functions of the layer `hyper`: plan, init, apply and start."""

    def __init__(self, target: Layer, generator: Layer, kernel_init: Initializer) -> None:
        self.target, self.generator = target, generator
        self.children = {"generator": generator, "target": target}
        self.kernel_init = kernel_init
        self.plans = remember(self._plans)  # (x, side) -> _Plans
        self.plan = remember(self._plan)  # (x, side) -> Plan

    def _plans(self, x: Any, side: dict[str, Any]) -> _Plans:
        condition = _condition(side)
        with signed(self.generator.__repr__, condition, "generator"):
            generator = self.generator.plan(condition, **_taken(self.generator, side))
            _check_features(generator.y)
        batch = generator.y.shape[0] if generator.y.ndim == 2 else None
        target_side = _taken(self.target, side)
        if batch is not None:
            _check_batch(batch, x, target_side)
            x, target_side = _with_batch(1, (x, target_side))
        with signed(self.target.__repr__, x, "target"):
            target = self.target.plan(x, **target_side)
            if target.state:
                raise LayerError("a target without state", listed(paths(target.state)),
                                 "use a layer without running statistics in its place")
            if batch is not None and any(a.shape[:1] != (1,) for a in jax.tree.leaves(target.y)):
                raise LayerError("a target that keeps the batch axis", show(target.y),
                                 "return one output per example, with the batch on the first axis")
        return _Plans(generator, target, Call("target", x, target_side), batch)

    def _plan(self, x: Any, side: dict[str, Any]) -> Plan:
        plans = self.plans(x, side)
        y = plans.target.y
        if plans.batch is not None:
            y = _with_batch(plans.batch, y)
        params = {"generator": plans.generator.params, "target": plans.maps()}
        state = {"generator": plans.generator.state}
        first = Call("generator", _condition(side), _taken(self.generator, side))
        return Plan(_filled(params), _filled(state), y, (first, plans.call))

    def init(self, key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        plans = self.plans(x, side)
        params, state = self.generator.init(
            fold(key, "generator"), _condition(side), **_taken(self.generator, side))
        target_key = fold(key, "target")
        biases, _ = self.target.init(target_key, plans.call.x, **plans.call.side)
        features = plans.generator.y.shape[-1]                           # H

        def affine_map(path: tuple[Any, ...], bias: jax.Array) -> Params:
            leaf_key = target_key
            for level in path:
                leaf_key = fold(leaf_key, jax.tree_util.keystr((level,), simple=True))
            shape = (features, *(bias.shape or (1,)))                    # initializers want a fan
            kernel = parameter(leaf_key, "kernel", self.kernel_init, shape, bias)
            return {"kernel": kernel.reshape(features, *bias.shape), "bias": bias}

        maps = jax.tree_util.tree_map_with_path(affine_map, biases)
        return {**_filled({"generator": params}), "target": maps}, _filled({"generator": state})

    def apply(self, params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        check_children(params, {}, self.children)
        check_children({}, state, {**self.children, "weights": None})
        if "weights" in state:                                           # a stream
            weights = state["weights"]
        else:
            weights, state = self.generate(params, state, x, side, key, train)

        def apply_target(weights: Params, carried: State, x: Any, key: Any, side: Any) -> Any:
            return self.target.apply(weights, carried, x, key=key, train=train, **side)

        y, carried = self.call_target(
            apply_target, params, weights, state.get("target", {}), x, _taken(self.target, side),
            _key_of(self.target, "target", key))
        return y, {**state, "target": carried} if carried else state

    def start(
        self, params: Params, state: State, x: Any, *, length: int, **side: Any
    ) -> State:
        check_children(params, state, self.children)
        weights, _ = self.generate(params, state, x, side, None, False)
        state = {**state, "weights": weights}
        if not self.target.start:
            return state

        def start_target(weights: Params, carried: State, x: Any, key: Any, side: Any) -> Any:
            return (), self.target.start(weights, carried, x, length=length, **side)

        _, carried = self.call_target(
            start_target, params, weights, {}, x, _taken(self.target, side))
        return {**state, "target": carried} if carried else state

    def generate(
        self, params: Params, state: State, x: Any, side: dict[str, Any], key: Any, train: bool
    ) -> tuple[Params, State]:
        """The target's parameters for this condition, and the state after the generator's call."""
        plans, condition = self.plans(*inputs((x, side))), _condition(side)
        _check_maps(plans.maps(), params.get("target", {}))
        with signed(self.generator.__repr__, condition, "generator"):
            z, after = self.generator.apply(                             # (H,) or (batch, H)
                params.get("generator", {}), state.get("generator", {}), condition,
                key=_key_of(self.generator, "generator", key), train=train,
                **_taken(self.generator, side))
        weights = jax.tree.map(lambda leaf, affine: _leaf(z, affine, leaf.shape),
                               plans.target.params, params["target"])
        return weights, {**state, "generator": after} if after else state

    def call_target(
        self, f: Callable[..., tuple[Any, State]], params: Params, weights: Params,
        carried: State, x: Any, side: dict[str, Any], key: Any = None,
    ) -> tuple[Any, State]:
        """``f(weights, carried, x, key, side)``, mapped over the batch if each example has its W.
        """
        with signed(self.target.__repr__, x, "target"):
            leaf = jax.tree.leaves(weights)[0]                           # S or (batch, *S)
            bias = jax.tree.leaves(params["target"])[0]                  # S
            if leaf.ndim == bias.ndim:
                return f(weights, carried, x, key, side)
            batch = leaf.shape[0]
            _check_batch(batch, x, side)

            def example(weights: Params, carried: State, given: Any, key: Any) -> Any:
                x, side = jax.tree.map(lambda a: a[None], given)         # a batch of one
                y, new = f(weights, carried, x, key, side)
                return jax.tree.map(lambda a: a[0], y), new

            keys = None
            if key is not None:
                numbers = beside(jnp.arange(batch), leaf)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
            given = (weights, carried, (x, side), keys)
            # `vmap` over kernels makes a convolution in `batch` groups, so batch must be known.
            if not known(batch) and convolves(jax.vmap(example), *given):
                return jax.lax.map(lambda each: example(*each), given)
            return jax.vmap(example)(*given)


def _condition(side: Mapping[str, Any]) -> Any:
    if "condition" not in side:
        raise LayerError("the side input condition, which the generator takes", "none",
                         "pass condition=, one per example or one for all")
    return side["condition"]


def _taken(layer: Layer, side: Mapping[str, Any]) -> dict[str, Any]:
    """The side inputs that a layer takes."""
    return {name: side[name] for name in side.keys() & layer.side}


def _key_of(layer: Layer, name: str, key: Any) -> Any:
    """The key of a child; None if it needs none."""
    return fold(key, name) if layer.random and key is not None else None


def _filled(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without empty parts."""
    return {name: part for name, part in tree.items() if part}


def _with_batch(batch: int, tree: Any) -> Any:
    """The shapes of a tree with another batch size."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), tree)


def _check_features(z: Any) -> None:
    check_array(z, rank=1, axes="(features,)")
    if z.ndim > 2:
        raise LayerError("features (H,) for all examples, or (batch, H) for each", show(z),
                         "end the generator with dp.flatten() or a pool")


def _check_batch(batch: int, x: Any, side: Mapping[str, Any]) -> None:
    """Raise unless x and all side inputs have as many examples as the features have rows."""
    for name, given in {"x": x, **side}.items():
        if any(a.shape[:1] != (batch,) for a in jax.tree.leaves(given)):
            raise LayerError(f"{name} with a batch axis of {batch}, one example per condition",
                             show(given), "pass one condition per example, or one without a batch "
                             "axis for all")


def _check_maps(planned: Params, given: Params) -> None:
    """Raise unless paths and shapes are as planned: a bias of shape (1,) would broadcast."""
    want, have = ({path: a.shape for path, a in paths(t).items()} for t in (planned, given))
    if want != have:
        raise LayerError(f"target params {show(planned)}", show(given),
                         "pass what init gave on input of this shape")


def _leaf(z: jax.Array, affine: Params, shape: tuple[int, ...]) -> jax.Array:
    """A leaf of the target: ``z @ kernel + bias``, in the dtype of the kernel.

    The product is in the dtype of z; the target casts the leaf where it uses it.
    """
    kernel = affine["kernel"].reshape(z.shape[-1], -1)                   # (H, size)
    leaf = (z @ kernel.astype(z.dtype)).astype(kernel.dtype)             # (..., size)
    leaf = leaf.reshape(*z.shape[:-1], *shape)                           # (..., *S)
    return leaf + jax.lax.broadcast_to_rank(affine["bias"], leaf.ndim)
