"""The laws of a layer, each a small function of a trial.

A law raises if it is broken. It holds only with a witness: the change that it makes must matter to
the output. Without a witness it returns the reason why it could not be tried; None means it holds.
"""

from __future__ import annotations

import jax

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.plans import spec
from diffprog.laws.draws import draws, noise, randomness
from diffprog.laws.examples import examples
from diffprog.laws.numbers import dtypes, finite, gradients, sums
from diffprog.laws.permutations import symmetry
from diffprog.laws.sequences import causality, more_padding, padding, segments, streaming
from diffprog.laws.trial import Law, Trial, another, check_same, check_same_spec, equal
from diffprog.wiring.combinators import serial


def _shapes(t: Trial) -> None:
    """The plan, inference and training agree in shapes."""
    plan = t.layer.plan(t.x, **t.side)
    inference, *training = t.shapes
    check_same_spec("the plan", (plan.params, plan.state, spec(plan.y)),
                    spec((*t.initial, inference[0])))
    for y, _ in training:
        check_same_spec("the output in training", spec(inference[0]), spec(y))


def _abstract(t: Trial) -> None:
    """`init` under `jax.eval_shape` returns the shapes of `init`."""
    shapes = jax.eval_shape(lambda key: t.layer.init(key, t.x, **t.side), t.key)
    check_same_spec("init under jax.eval_shape", spec(shapes), spec(t.initial))


def _jit(t: Trial) -> None:
    """A jitted call equals an eager one."""
    train = len(t.modes) > 1
    eager = t.recorded[0] if train else t.eager(*t.given, None, False)
    jitted = t.of_mode(train)
    t.check_close(f"eager with train={train}", eager, (jitted.y, jitted.state))


def _structure(t: Trial) -> None:
    """A call keeps structure, shapes and dtypes of the state."""
    for when, (_, state) in zip(("inference", "training"), t.shapes, strict=False):
        check_same_spec(f"the state in {when}", spec(t.initial[1]), spec(state))


def _determinism(t: Trial) -> None:
    """`init` and `apply` are pure functions."""
    check_same("a second init", t.layer.init(t.key, t.x, **t.side), t.initial)
    key, train = t.modes[-1]
    check_same("a second apply", t.call(key=key, train=train), t.of_mode(train))


def _siblings(t: Trial) -> str | None:
    """Unnamed functions beside a layer in `serial` do not change its parameters."""
    alone = serial(t.layer).init(t.key, t.x, **t.side)
    among = serial(lambda x: x, t.layer, lambda y: y).init(t.key, t.x, **t.side)
    check_same("init between two functions", among, alone)
    return None if jax.tree.leaves(t.params) else "it has no parameters"


def _rebuilding(t: Trial) -> None:
    """A layer rebuilt from its children is the same layer."""
    rebuilt = _rebuilt(t.layer)
    if repr(rebuilt) != repr(t.layer):
        raise LayerError(f"a rebuild that returns {t.layer!r}", repr(rebuilt),
                         "let it pass on all settings, and the children by their names")
    check_same("init of the rebuilt layer", rebuilt.init(t.key, t.x, **t.side), t.initial)
    params, state, x, side = t.given
    t.check_close("the rebuilt layer", rebuilt.apply(params, state, x, **side),
                  (t.inference.y, t.inference.state))


def _rebuilt(layer: Layer) -> Layer:
    """The layer and all layers in it, rebuilt."""
    children = {name: _rebuilt(child) for name, child in layer.children.items()}
    return layer.rebuilt(children) if layer.rebuild else layer


def _side_inputs(t: Trial) -> str | None:
    """Each side input changes the output, or the state of a stream."""
    for name, value in t.side.items():
        other = t.side | {name: jax.tree.map(another, value)}
        if equal(t.call(side=other).y, t.inference.y) and equal(
                t.stream_state(other), t.stream_state(t.side)):
            raise LayerError(f"an effect of {name}", "the same output for another one",
                             "pass it on, or leave it out of the signature")
    return None if t.side else "no side input is given"


LAWS: dict[str, Law] = {
    "declared shapes are real": _shapes,
    "init is abstract": _abstract,
    "jit equals eager": _jit,
    "state keeps its structure": _structure,
    "results are determined": _determinism,
    "keys matter in training": randomness,
    "no two draws share a key": draws,
    "noise keeps the mean": noise,
    "gradients are finite": finite,
    "gradients agree": gradients,
    "dtypes are kept": dtypes,
    "sums are accurate in 16 bits": sums,
    "init does not depend on siblings": _siblings,
    "rebuild gives the same layer": _rebuilding,
    "side inputs have an effect": _side_inputs,
    "examples do not mix": examples,
    "padding changes nothing": padding,
    "more padding changes nothing": more_padding,
    "segments do not mix": segments,
    "nothing depends on the future": causality,
    "streaming equals all at once": streaming,
    "steps are symmetric": symmetry,
}
