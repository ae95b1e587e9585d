"""The laws that every layer keeps, each a small function of a trial.

All but the law on dtypes happens in float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffprog import tree
from diffprog.combinators import serial
from diffprog.computed import trainable
from diffprog.derivatives import check_gradients, is_float
from diffprog.errors import LayerError
from diffprog.factories import rebuilt
from diffprog.layer import Layer
from diffprog.notation import listed, show
from diffprog.plans import spec
from diffprog.trials import Trial, another, equal, floats, over, same, same_spec, with_floats

_TIMED = ("mask", "positions", "segments")  # side inputs with an axis of time, the second one


def _shapes(t: Trial) -> None:
    plan = t.layer.plan(t.x, **t.side)
    y, _ = t.run(*t.initial, t.x, t.side, None, False)
    real = spec((*t.initial, y))
    same_spec("the plan", (plan.params, plan.state, spec(plan.y)), real)
    same_spec("the output in training", spec(t.rest[0]), spec(t.training[0]))


def _abstract(t: Trial) -> None:
    seen = jax.eval_shape(lambda key: t.layer.init(key, t.x, **t.side), t.key)
    same_spec("init under jax.eval_shape", spec(seen), spec(t.initial))


def _jit(t: Trial) -> None:
    for key, train, jitted in ((None, False, t.rest), (t.key, True, t.training)):
        t.close(f"eager with train={train}",
                t.eager(t.params, t.state, t.x, t.side, key, train), jitted)


def _structure(t: Trial) -> None:
    for when, (_, state) in (("at rest", t.rest), ("in training", t.training)):
        same_spec(f"the state {when}", spec(t.state), spec(state))


def _determinism(t: Trial) -> None:
    same("a second init", t.layer.init(t.key, t.x, **t.side), t.initial)
    again = t.run(t.params, t.state, t.x, t.side, t.key, True)
    same("a second apply", again, t.training)


def _randomness(t: Trial) -> None:
    if t.layer.random:
        other = t.run(t.params, t.state, t.x, t.side, jax.random.fold_in(t.key, 1), True)
        if equal(other[0], t.training[0]):
            raise LayerError("other results from another key", "the same",
                             "draw with the key of the call, or leave random out")
        return
    # `apply` hands no key on to what is not declared random, so what it guards is asked.
    raw = getattr(t.layer.apply, "raw", t.layer.apply)
    run = lambda key: raw(t.params, t.state, t.x, key=key, train=True, **t.side)[0]  # noqa: E731
    traced = jax.make_jaxpr(run)(t.key).jaxpr
    seen = any(traced.invars[0] is v for eqn in traced.eqns for v in eqn.invars)
    if seen and not equal(*map(jax.jit(run), jax.random.split(t.key))):
        raise LayerError("the same results from any key, of what is not declared random", "others",
                         "make it with Layer(..., random=True)")


def _examples(t: Trial) -> None:
    count = jax.tree.leaves(t.x)[0].shape[0]
    one = lambda i: jax.tree.map(lambda a: a[i : i + 1], (t.x, t.side))  # noqa: E731
    alone = [t.run(t.params, t.state, *one(i), None, False)[0] for i in range(count)]
    t.close("one by one", jax.tree.map(lambda *parts: jnp.concatenate(parts), *alone), t.rest[0])


def _padding(t: Trial) -> None:
    mask = t.side.get("mask")
    if mask is None:
        return

    def filled(value: float) -> Any:
        def fill(a: Any) -> Any:
            if a.shape[: mask.ndim] != mask.shape or a.dtype == jnp.bool_:
                return a
            # Integers may be ids: what stands in their padding is one of those that x has.
            other = value if is_float(a) else a.max() if value else a.min()
            return jnp.where(over(mask, a), a, other)

        return jax.tree.map(fill, t.x)

    def real(y: Any) -> Any:
        return jax.tree.map(lambda a: jnp.where(over(mask, a), a, 0) if (
            a.shape[: mask.ndim] == mask.shape) else a, y)

    @functools.partial(jax.jit, static_argnums=2)
    def results(x: Any, key: Any, train: bool) -> Any:
        y, state = t.eager(t.params, t.state, x, t.side, key, train)
        return real(y), state

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(x: Any, key: Any, train: bool) -> Any:
        def total(params: Any) -> Any:
            y = real(t.eager(params, t.state, x, t.side, key, train)[0])
            return sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(y) if is_float(a))

        return jax.grad(total)(t.params)

    for key, train in t.modes:
        wanted = results(filled(0.0), key, train)
        for value in (7.0, float("nan")):
            t.close(f"real entries with {value:g} in the padding, train={train}",
                    results(filled(value), key, train), wanted)
        if t.params:
            t.close(f"gradients with other numbers in the padding, train={train}",
                    gradients(filled(7.0), key, train), gradients(filled(0.0), key, train))


def _streaming(t: Trial) -> None:
    length = jax.tree.leaves(t.x)[0].shape[1]

    def chunk(x: Any, side: Any, begin: int, end: int) -> Any:
        cut = lambda a: a[:, begin:end]  # noqa: E731
        beside = {n: jax.tree.map(cut, v) if n in _TIMED else v for n, v in side.items()}
        return jax.tree.map(cut, x), beside

    def streamed(cuts: Sequence[int], again: bool, params: Any, x: Any) -> Any:
        state, outputs = t.state, []
        for begin, end in itertools.pairwise(cuts):
            part, side = chunk(x, t.side, begin, end)
            if begin == 0 and t.layer.start:
                state = t.layer.start(params, state, part, length=length, **side)
            if not again:
                side = {name: value for name, value in side.items() if name not in t.layer.kept}
            y, state = t.eager(params, state, part, side, None, False)
            outputs.append(y)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *outputs)

    def value_and_gradients(cuts: Sequence[int], again: bool = False) -> Any:
        def total(params: Any, floats: Any) -> Any:
            y = streamed(cuts, again, params, with_floats(t.x, floats))
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y) if is_float(a)), y

        (_, y), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(t.params, floats(t.x))
        return y, grads

    if t.layer.start:
        try:
            t.layer.start(t.params, t.state, t.x, length=length, **t.side)
        except LayerError:
            return  # it says by itself that it cannot
    whole = jax.jit(functools.partial(value_and_gradients, (0, length), True))()
    t.close("one chunk", whole[0], t.rest[0])
    for name, cuts in (("chunks of 1", range(length + 1)),
                       ("chunks of 2", [*range(0, length, 2), length]),
                       ("mixed chunks", [0, *range(1, length, 2), length])):
        cuts = sorted(set(cuts))
        t.close(name, jax.jit(functools.partial(value_and_gradients, cuts))(), whole)


def _causality(t: Trial) -> None:
    length = jax.tree.leaves(t.x)[0].shape[1]
    for now in range(1, length):
        # Integers may be ids: others of those that x has.
        later = jax.tree.map(lambda a, now=now: a.at[:, now:].set(
            (a + 1 if is_float(a) else a.max() + a.min() - a)[:, now:]), t.x)
        y, _ = t.run(t.params, t.state, later, t.side, None, False)
        before = lambda y, now=now: jax.tree.map(lambda a: a[:, :now], y)  # noqa: E731
        t.close(f"steps before {now}, after changing the later ones", before(y), before(t.rest[0]))


def _gradients(t: Trial) -> None:
    # What is frozen moves the output, but has no gradient, and that is what it is for.
    free = trainable(t.layer, t.params)
    moved, held = (jax.tree.map(lambda leaf, free, want=want: leaf if free is want else None,
                                t.params, free) for want in (True, False))

    def run(moved: Any, x: Any, key: Any, train: bool) -> Any:
        params = jax.tree.map(lambda leaf, other: other if leaf is None else leaf, moved, held,
                              is_leaf=lambda leaf: leaf is None)
        return t.layer.apply(params, t.state, x, key=key, train=train, **t.side)[0]

    if any(map(is_float, jax.tree.leaves((moved, t.x)))):
        for key, train in t.modes:
            check_gradients(functools.partial(run, key=key, train=train), moved, t.x)


def _finite(t: Trial) -> None:
    @functools.partial(jax.jit, static_argnums=3)
    def gradients(params: Any, x: Any, key: Any, train: bool) -> Any:
        def total(floats: Any) -> Any:
            y, _ = t.layer.apply(floats[0], t.state, with_floats(x, floats[1]), key=key,
                                 train=train, **t.side)
            return sum((jnp.sum(a) for a in jax.tree.leaves(y) if is_float(a)), jnp.zeros(()))

        return jax.grad(total)((params, floats(x)))

    for where, x in (("", t.x), (" at zero", jax.tree.map(jnp.zeros_like, t.x))):
        for key, train in t.modes:
            if broken := tree.nonfinite(gradients(t.params, x, key, train)):
                raise LayerError(f"finite gradients{where} with train={train}",
                                 f"NaN in {listed(broken)}",
                                 "keep roots, logarithms and quotients away from zero")


def _dtypes(t: Trial) -> None:
    with jax.enable_x64(False):
        key = jax.random.wrap_key_data(jnp.asarray(jax.random.key_data(t.key)))
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            narrow = lambda a, d=dtype: jax.ShapeDtypeStruct(  # noqa: E731
                a.shape, d if is_float(a) else a.dtype)
            x, side = spec(jax.tree.map(narrow, (t.x, t.side)))
            if not any(map(is_float, jax.tree.leaves(x))):
                continue
            params, state = jax.eval_shape(lambda k, x=x, s=side: t.layer.init(k, x, **s), key)
            if wrong := {a.dtype.name for a in jax.tree.leaves((params, state)) if is_float(a)} - {
                "float32"
            }:
                raise LayerError("parameters and statistics in float32",
                                 f"{listed(wrong)} for {show(x)}",
                                 "make them in float32, whatever x is")
            for own, train in ((None, False), (key, True)):
                y, new = jax.eval_shape(
                    lambda p, s, x, side, k, train=train: t.eager(p, s, x, side, k, train),
                    params, state, x, side, own)
                if wrong := {a.dtype.name for a in jax.tree.leaves(y) if is_float(a)} - {
                    np.dtype(dtype).name
                }:
                    raise LayerError(f"{np.dtype(dtype).name} out of {show(x)}", listed(wrong),
                                     "return y.astype(x.dtype)")
                same_spec("the state", spec(state), spec(new))


def _siblings(t: Trial) -> None:
    plain = serial(t.layer).init(t.key, t.x, **t.side)
    among = serial(lambda x: x, t.layer, lambda y: y).init(t.key, t.x, **t.side)
    same("init between two functions", among, plain)


def _rebuilding(t: Trial) -> None:
    again = _rebuilt_throughout(t.layer)
    if repr(again) != repr(t.layer):
        raise LayerError(f"a rebuild that gives {t.layer!r}", repr(again),
                         "let it pass on every setting, and the children in their places")
    same("init of the rebuilt layer", again.init(t.key, t.x, **t.side), t.initial)
    t.close("the rebuilt layer", again.apply(t.params, t.state, t.x, **t.side), t.rest)


def _rebuilt_throughout(layer: Layer) -> Layer:
    children = {name: _rebuilt_throughout(child) for name, child in layer.children.items()}
    return rebuilt(layer, children) if layer.rebuild else layer


def _side_inputs(t: Trial) -> None:
    for name, value in t.side.items():
        other = t.side | {name: jax.tree.map(another, value)}
        same = equal(t.run(t.params, t.state, t.x, other, None, False)[0], t.rest[0])
        if same and equal(t.carried(other), t.carried(t.side)):
            raise LayerError(f"an effect of {name}", "the same output for another one",
                             "pass it on, or leave it out of the signature")


LAWS: dict[str, Callable[[Trial], None]] = {
    "declared shapes are real": _shapes,
    "init is abstract": _abstract,
    "jit equals eager": _jit,
    "state keeps its structure": _structure,
    "results are determined": _determinism,
    "keys matter in training": _randomness,
    "gradients are finite": _finite,
    "dtypes are kept": _dtypes,
    "siblings keep their values": _siblings,
    "rebuild gives the same layer": _rebuilding,
    "side inputs have effect": _side_inputs,
    "examples do not mix": _examples,
    "padding changes nothing": _padding,
    "nothing depends on the future": _causality,
    "streaming equals all at once": _streaming,
    "gradients agree": _gradients,
}
