"""Parameters that are computed: one net, the generator, writes those of another, the target.

What is trained are the generator and, for each leaf of the target, an affine map from the
generator's features to that leaf. So the target is one function for each condition, and the tree of
its maps is the target's own, each leaf in it replaced by a ``kernel`` and a ``bias``.
"""

from __future__ import annotations

import functools
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

# Of a variance of `lecun_normal`, a hundredth.
_SMALL = jax.nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


class _Parts(NamedTuple):
    """The plans of both layers, how the target is called, and for how many examples each alone."""

    generator: Plan
    target: Plan
    call: Call
    examples: int | None  # None where all have the same parameters


@factory
def hyper(target: Any, generator: Any, *, kernel_init: Initializer = _SMALL) -> Layer:
    """Write the parameters of a layer: ``y = f(x; W)`` with ``W = g(condition) @ kernel + bias``.

    Each leaf W of the target f is an affine map of the features that the generator g makes of the
    side input ``condition``. The rank of the features says for whom W is, and nothing is guessed:

    - (H,): one task. All of x is computed by the same W.
    - (batch, H): as many examples, on the first axis of x and of the target's side inputs. Each is
      computed by its own W, as a batch of one.

    A bias begins as the target alone would from the same key. What a kernel adds to a leaf is small
    at first, a hundredth of the variance of ``lecun_normal`` for features of variance 1, so that
    training begins at a sane target: were the two equal, the variance of activations would double
    with every layer.

    A stream writes W once, at its start, and keeps it. Other side inputs go to those of the two
    layers that take them; a program around the generator withholds a mask that is of x alone.

    Shapes:
        x: what the target takes; y: what it gives.
        condition: what the generator takes, such that it gives (H,) or (batch, H).
        params: ``generator``; ``target``, where a leaf of shape S is ``kernel`` (H, *S) and
            ``bias`` S. state: ``generator``.

    Args:
        target: a layer with parameters and without state.
        generator: a layer that gives one array of features.
        kernel_init: initializer of all kernels, of shape (H, *S); a tenth of ``lecun_normal``,
            whose variance 1 / (H * fan-in) is that of Chang et al. 2020, section 4.

    Raises:
        LayerError: at composition, if the target never has parameters; at ``init``, without
            ``condition``, for a target with state or that moves the axis of examples, and for
            features of another rank or of another number of examples than x.

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
                         "pass dp.linear(8), for example: nothing could be written here")
    children = {"generator": generator, "target": target}

    @remember
    def parts(x: Any, side: dict[str, Any]) -> _Parts:
        condition = _condition(side)
        with signed(generator.__repr__, condition, "generator"):
            made = generator.plan(condition, **_for(generator, side))
            _check_features(made.y)
        beside = _for(target, side)
        examples = made.y.shape[0] if made.y.ndim == 2 else None
        if examples is not None:
            _check_examples(examples, x, beside)
            x, beside = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), (x, beside))
        with signed(target.__repr__, x, "target"):
            plan = target.plan(x, **beside)
            if plan.state:
                raise LayerError("a target without state", listed(paths(plan.state)),
                                 "put a layer without running statistics in its place")
            if examples is not None and any(a.shape[:1] != (1,) for a in jax.tree.leaves(plan.y)):
                raise LayerError("a target that keeps the axis of examples", show(plan.y),
                                 "give each example its output, on the first axis")
        return _Parts(made, plan, Call("target", x, beside), examples)

    @remember
    def planner(x: Any, side: dict[str, Any]) -> Plan:
        part, condition = parts(x, side), _condition(side)
        y = part.target.y
        if part.examples is not None:
            y = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((part.examples, *a.shape[1:]), a.dtype), y)
        trees = {"generator": part.generator.params, "target": _maps(part)}
        state = {"generator": part.generator.state} if part.generator.state else {}
        first = Call("generator", condition, _for(generator, side))
        return Plan({name: tree for name, tree in trees.items() if tree}, state, y,
                    (first, part.call))

    def init(key: jax.Array, x: Any, **side: Any) -> tuple[Params, State]:
        part = parts(x, side)
        made, state = generator.init(
            fold(key, "generator"), _condition(side), **_for(generator, side))
        own = fold(key, "target")
        biases, _ = target.init(own, part.call.x, **part.call.side)
        features = part.generator.y.shape[-1]

        def maps(at: tuple[Any, ...], leaf: jax.Array) -> Params:
            names = (jax.tree_util.keystr((level,), simple=True) for level in at)
            shape = (features, *(leaf.shape or (1,)))  # initializers want a fan
            kernel = parameter(functools.reduce(fold, names, own), "kernel", kernel_init, shape,
                               leaf)
            return {"kernel": kernel.reshape(features, *leaf.shape), "bias": leaf}

        params = {"generator": made} if made else {}
        params["target"] = jax.tree_util.tree_map_with_path(maps, biases)
        return params, {"generator": state} if state else {}

    def write(
        params: Params, state: State, x: Any, side: dict[str, Any], key: Any, train: bool
    ) -> tuple[Params, State]:
        """The target's parameters for this condition, and the state with that of the generator."""
        part, condition = parts(*inputs((x, side))), _condition(side)
        _check_maps(_maps(part), params.get("target", {}))
        own = fold(key, "generator") if generator.random and key is not None else None
        with signed(generator.__repr__, condition, "generator"):
            z, new = generator.apply(
                params.get("generator", {}), state.get("generator", {}), condition, key=own,
                train=train, **_for(generator, side))
        weights = jax.tree.map(lambda leaf, maps: _written(z, maps, leaf.shape),
                               part.target.params, params["target"])
        return weights, {**state, "generator": new} if new else state

    def run(
        f: Callable[..., tuple[Any, State]], params: Params, weights: Params, carried: State,
        x: Any, side: dict[str, Any], key: Any = None,
    ) -> tuple[Any, State]:
        """``f(weights, carried, x, key, side)`` of the target, or of each example by itself."""
        with signed(target.__repr__, x, "target"):
            leaf, shared = (jax.tree.leaves(t)[0] for t in (weights, params["target"]))
            if leaf.ndim == shared.ndim:  # a bias, the first of its leaf
                return f(weights, carried, x, key, side)
            _check_examples(leaf.shape[0], x, side)

            def one(weights: Params, carried: State, given: Any, key: Any) -> tuple[Any, State]:
                x, side = jax.tree.map(lambda a: a[None], given)
                y, new = f(weights, carried, x, key, side)
                return jax.tree.map(lambda a: a[0], y), new

            keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(
                key, beside(jnp.arange(leaf.shape[0]), leaf))
            given = (weights, carried, (x, side), keys)
            # A convolution of each example is one in so many groups: they must be counted.
            if not known(leaf.shape[0]) and convolves(jax.vmap(one), *given):
                return jax.lax.map(lambda each: one(*each), given)
            return jax.vmap(one)(*given)

    def apply(params: Params, state: State, x: Any, *, key: jax.Array | None = None,
              train: bool = False, **side: Any) -> tuple[Any, State]:
        check_children(params, {}, children)
        check_children({}, state, {**children, "weights": None})
        weights, after = (state["weights"], state) if "weights" in state else write(
            params, state, x, side, key, train)
        own = fold(key, "target") if target.random and key is not None else None
        y, carried = run(
            lambda weights, carried, x, key, side: target.apply(
                weights, carried, x, key=key, train=train, **side),
            params, weights, state.get("target", {}), x, _for(target, side), own)
        return y, {**after, "target": carried} if carried else after

    def start(params: Params, state: State, x: Any, *, length: int, **side: Any) -> State:
        check_children(params, state, children)
        weights, _ = write(params, state, x, side, None, False)
        carried: State = {}
        if target.start:
            _, carried = run(
                lambda weights, carried, x, key, side: (
                    (), target.start(weights, carried, x, length=length, **side)),
                params, weights, {}, x, _for(target, side))
        return {**state, "weights": weights} | ({"target": carried} if carried else {})

    mine = {"condition"} | generator.side
    return Layer(
        init, apply, start, children, lambda new: hyper(**new, kernel_init=kernel_init),
        within=lambda f: hyper(f(target), f(generator), kernel_init=kernel_init),
        name="hyper", random=generator.random or target.random,
        side=frozenset(mine | target.side),
        kept=frozenset(mine - target.side | target.kept), planner=planner, computed=(Mapped(),),
    )


def _for(layer: Layer, side: Mapping[str, Any]) -> dict[str, Any]:
    return {name: side[name] for name in side.keys() & layer.side}


def _condition(side: Mapping[str, Any]) -> Any:
    if "condition" not in side:
        raise LayerError("condition, of which the generator makes parameters", "none",
                         "pass condition=, for each example or one for all")
    return side["condition"]


def _check_features(z: Any) -> None:
    check_array(z, rank=1, axes="(features,)")
    if z.ndim > 2:
        raise LayerError("features (H,) of one task, or (batch, H) of as many examples", show(z),
                         "end the generator with dp.flatten() or a pool")


def _check_examples(count: int, x: Any, side: Mapping[str, Any]) -> None:
    """Raise unless x and all side inputs have as many examples as there are rows of features."""
    for name, given in {"x": x, **side}.items():
        if any(a.shape[:1] != (count,) for a in jax.tree.leaves(given)):
            raise LayerError(f"{name} with {count} on its first axis, a condition each",
                             show(given), "give each example its condition, or all of them one: "
                             "features without an axis of examples")


def _maps(part: _Parts) -> Params:
    """The shapes of what is trained in the place of the target's parameters."""
    features = part.generator.y.shape[-1]
    return jax.tree.map(lambda a: {
        "kernel": jax.ShapeDtypeStruct((features, *a.shape), a.dtype), "bias": a},
        part.target.params)


def _check_maps(planned: Params, given: Params) -> None:
    """Raise unless paths and shapes are as planned: a bias of one number would be broadcast."""
    want, have = ({path: a.shape for path, a in paths(t).items()} for t in (planned, given))
    if want != have:
        raise LayerError(f"target params {show(planned)}", show(given),
                         "pass what init gave on input of this shape")


def _written(z: jax.Array, maps: Params, shape: tuple[int, ...]) -> jax.Array:
    """``z @ kernel + bias`` as a leaf, or one for each row of z, in the dtype of the kernel.

    The product is in that of z; the target casts the leaf where it uses it.
    """
    kernel = maps["kernel"].reshape(z.shape[-1], -1)
    leaf = (z @ kernel.astype(z.dtype)).astype(kernel.dtype)
    leaf = leaf.reshape(*z.shape[:-1], *shape)
    return leaf + jax.lax.broadcast_to_rank(maps["bias"], leaf.ndim)
