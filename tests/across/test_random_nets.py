"""Every law on nets that `random_nets.py` composes by chance from all layers and combinators."""

import collections
import itertools

import jax
import jax.numpy as jnp
import pytest
from cases import TIMELESS, Case
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import given as drawing
from names import makers
from support.comparing import KEY, same
from support.random_combinators import NESTED
from support.random_nets import KINDS, floats, nested, nets
from support.random_pieces import PROGRAMS, both, namespace
from support.tracing import PRECISIONS, given, trace

import diffprog as dp

SEEDS = range(2, 12)  # of the nets of each kind on which laws are run
CHUNKS = 4  # tests of each kind that share them, so that several processes do
QUICK = {(kind, 0) for kind in KINDS if kind not in ("sequence", "stream", "pair")}  # long compiles
SETTINGS = settings(
    max_examples=2, derandomize=True, deadline=None, database=None, print_blob=False,
    phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
)
PLAIN = {"add", "concatenate", "gelu", "binary_step"}  # public functions that are layers
WAYS = {"program", "replace", "serial, unnamed", "serial, named", "serial, >>", "**",
        "residual with a shortcut"} | {f.__name__ for f in PROGRAMS}
# Laws that need no witness. Which of the others a net holds is added up and printed.
ALWAYS = {"declared shapes are real", "init is abstract", "jit equals eager",
          "state keeps its structure", "results are determined", "rebuild gives the same layer"}


def each(kind, seeds, test):
    """Run a test on one net of each seed, and on the simplest, with which hypothesis begins.

    More examples of one seed would be mutations of the first ones, and all alike.
    """
    each_of(nets(kind), [len(KINDS) * number + KINDS.index(kind) for number in seeds], test)


def each_of(strategy, seeds, test):
    for number in seeds:
        seed(number)(settings(SETTINGS)(drawing(strategy)(test)))()


def composed(net):
    """Is the net more than one leaf? Leaves have their cases in `test_laws.py`."""
    return net.depth > 1


def drawn_makers():
    return makers() - {"pin"}  # see test_pinned.py


@pytest.mark.parametrize(("kind", "chunk"), [
    pytest.param(*given, marks=[pytest.mark.slow] * (given not in QUICK))
    for given in itertools.product(KINDS, range(CHUNKS))])
def test_every_law_holds(kind, chunk, record_property):
    tried = collections.Counter()

    def test(net):
        if not composed(net):
            return
        tried.update({"nets": 1, f"depth {net.depth}": 1} | dict.fromkeys(net.parts, 1))
        report = dp.check(net.layer, net.x, **net.options, **net.side)
        tried.update({f"held: {law}": 1 for law in report.laws})
        assert not ALWAYS - set(report.laws)
        again = eval(repr(net.layer), namespace())
        assert repr(again) == repr(net.layer)
        same(again.init(KEY, net.x, **net.side), net.layer.init(KEY, net.x, **net.side))

    each(kind, SEEDS[:1] if chunk == 0 else SEEDS[chunk :: CHUNKS - 1], test)
    record_property("drawn", dict(tried))  # which conftest.py adds up and prints


@pytest.mark.slow
@pytest.mark.parametrize("way", NESTED)
def test_every_law_holds_of_what_is_put_into_each_other(way):
    def test(net):
        dp.check(net.layer, net.x, **net.options)

    each_of(nested(way), range(4), test)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_nets_need_no_implicit_promotion(kind):
    def test(net):
        untried = () if net.options["causal"] else (TIMELESS,)
        case = Case("", net.layer, net.x, net.options | net.side, untried=untried)
        # After ints everything is float32, beside which a scale in 16 bits is the net's own doing.
        for precision in ("float32", "mixed") if kind == "labels" else PRECISIONS:
            with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
                trace(given(case, precision))

    each(kind, range(20, 23), test)


@pytest.mark.slow
def test_the_random_nets_contain_every_hard_part():
    met = collections.Counter()

    def look(net):
        if composed(net):
            plan = net.layer.plan(net.x, **net.side)
            met.update(net.parts.keys() | net.side.keys() | {net.depth})
            met.update({"state": bool(plan.state), "random": net.layer.random,
                        "streaming": net.options["causal"] and net.layer.start is not None})

    for kind in KINDS:
        each(kind, SEEDS, look)
    wanted = {5, "repeat", "heads", "mask", "scale", "state", "random", "streaming",
              "program", "twice", "resampled", "trained", "tied", "tap", "mixed",
              "ensemble", "remat", "residual", "branch", "self_attention", "cross_attention",
              "recurrent", "pre_norm"}
    assert not wanted - {name for name, n in met.items() if n}


@pytest.mark.slow
def test_a_tap_around_a_tap_of_the_same_pattern():
    """Not drawn above; the inner tap once took the outputs of the outer one for its own."""
    inner = dp.tap(dp.serial(jnp.tanh), "**/tanh~0") >> both
    dp.check(dp.tap(inner, "**/tanh~0") >> both, floats(2, 3))


@pytest.mark.slow
def test_every_layer_and_combinator_is_drawn():
    wanted, met = drawn_makers() | PLAIN | WAYS | {1, 2, 3, 4, 5}, set()

    def look(net):
        met.update(net.parts.keys() | {net.depth})

    for number in range(100):  # a quarter of them is enough at the time of writing
        if wanted <= met:
            break
        for kind in KINDS:
            each(kind, [number], look)
    assert not wanted - met
