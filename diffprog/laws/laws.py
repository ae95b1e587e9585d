"""The laws that every layer keeps, each a small function of a trial.

A law raises where it is broken. It counts as held only with a witness: what it changed was seen to
matter. Where it was not, the law returns the reason; None means held.
"""

from __future__ import annotations

import jax

from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.plans import spec
from diffprog.laws.draws import draws, noise, randomness
from diffprog.laws.examples import examples
from diffprog.laws.numbers import dtypes, finite, gradients, sums
from diffprog.laws.sequences import causality, more_padding, padding, segments, streaming
from diffprog.laws.trial import Law, Trial, another, equal, same, same_spec
from diffprog.wiring.combinators import serial


def _shapes(t: Trial) -> None:
    plan = t.layer.plan(t.x, **t.side)
    rest, *training = t.shapes
    same_spec("the plan", (plan.params, plan.state, spec(plan.y)), spec((*t.initial, rest[0])))
    for y, _ in training:
        same_spec("the output in training", spec(rest[0]), spec(y))


def _abstract(t: Trial) -> None:
    seen = jax.eval_shape(lambda key: t.layer.init(key, t.x, **t.side), t.key)
    same_spec("init under jax.eval_shape", spec(seen), spec(t.initial))


def _jit(t: Trial) -> None:
    train = len(t.modes) > 1
    eager = t.noted[0] if train else t.eager(*t.given, None, False)
    found = t.of_mode(train)
    t.close(f"eager with train={train}", eager, (found.y, found.state))


def _structure(t: Trial) -> None:
    for when, (_, state) in zip(("at rest", "in training"), t.shapes, strict=False):
        same_spec(f"the state {when}", spec(t.initial[1]), spec(state))


def _determinism(t: Trial) -> None:
    same("a second init", t.layer.init(t.key, t.x, **t.side), t.initial)
    key, train = t.modes[-1]
    same("a second apply", t.pulled(key=key, train=train), t.of_mode(train))


def _siblings(t: Trial) -> str | None:
    plain = serial(t.layer).init(t.key, t.x, **t.side)
    among = serial(lambda x: x, t.layer, lambda y: y).init(t.key, t.x, **t.side)
    same("init between two functions", among, plain)
    return None if jax.tree.leaves(t.params) else "it has no parameters"


def _rebuilding(t: Trial) -> None:
    again = _rebuilt_throughout(t.layer)
    if repr(again) != repr(t.layer):
        raise LayerError(f"a rebuild that gives {t.layer!r}", repr(again),
                         "let it pass on every setting, and the children in their places")
    same("init of the rebuilt layer", again.init(t.key, t.x, **t.side), t.initial)
    params, state, x, side = t.given
    t.close("the rebuilt layer", again.apply(params, state, x, **side), (t.rest.y, t.rest.state))


def _rebuilt_throughout(layer: Layer) -> Layer:
    children = {name: _rebuilt_throughout(child) for name, child in layer.children.items()}
    return layer.rebuilt(children) if layer.rebuild else layer


def _side_inputs(t: Trial) -> str | None:
    for name, value in t.side.items():
        other = t.side | {name: jax.tree.map(another, value)}
        if equal(t.pulled(side=other).y, t.rest.y) and equal(t.carried(other), t.carried(t.side)):
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
    "sums are right in sixteen bits": sums,
    "siblings keep their values": _siblings,
    "rebuild gives the same layer": _rebuilding,
    "side inputs have effect": _side_inputs,
    "a batch is its examples": examples,
    "padding changes nothing": padding,
    "more padding changes nothing": more_padding,
    "a segment is as if alone": segments,
    "nothing depends on the future": causality,
    "streaming equals all at once": streaming,
}
