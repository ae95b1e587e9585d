"""A layer is known by the call that made it: to be equal, to be hashed, and to be pickled."""

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys

import cloudpickle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from support.comparing import KEY, X, identity, same
from support.refusing import expect, halve, refused

import diffprog as dp
from diffprog.core.calls import compared
from diffprog.core.factories import factory

NORMAL = jax.nn.initializers.normal
PLAIN = dp.serial(dp.linear(3))
IDS = jnp.ones((2, 3), jnp.int32)


def feed(layers, x):
    return x + layers.down(jax.nn.silu(layers.up(x)))


def scaled(params, x):
    return params["scale"] * x


def ones(key, x):
    return {"scale": jnp.ones(x.shape[-1])}


def scaling_by(factor):
    def scale(x):
        return factor * x

    return scale


def counting(log):
    def count(x):
        log.append(x)
        return x

    return count


@factory
def squared(power: int = 2) -> dp.Layer:
    return dp.stateless(None, lambda params, x: x**power)


# Each is made anew at every call.
MAKE = {
    "leaf": lambda: dp.linear(3, kernel_init="he_normal"),
    "initializer": lambda: dp.linear(3, kernel_init=NORMAL(0.5)),
    "partial": lambda: dp.serial(functools.partial(jax.nn.gelu, approximate=False)),
    "wires": lambda: dp.serial(dp.linear(4), jax.nn.relu, dp.residual(dp.linear(4)), head=dp.gelu),
    "branch": lambda: dp.branch(dp.linear(2), jnp.tanh, merge=dp.concatenate),
    "chain": lambda: dp.linear(3) >> jnp.tanh >> dp.linear(2) ** 2,
    "program": lambda: dp.program(up=dp.linear(8), down=dp.linear(4))(feed),
    "stateless": lambda: dp.stateless(ones, scaled, name="scaling"),
    "closure": lambda: dp.serial(scaling_by(2.0), scaling_by(np.arange(4.0))),
    "transforms": lambda: dp.repeat(2, dp.remat(dp.mixed(dp.linear(4), jnp.bfloat16))),
    "computed": lambda: dp.freeze(dp.lora(dp.weight_norm(dp.linear(4)), 1, "**/direction")),
    "tap": lambda: dp.tap(dp.serial(a=dp.linear(4), b=jnp.sin), "a"),
    "recurrent": lambda: dp.recurrent(dp.gru(3), bidirectional=True),
    "gpt": lambda: dp.models.gpt(5, length=4, width=4, depth=1, heads=1),
    "a view": lambda: dp.lora(dp.serial(a=dp.linear(4)), 1).children["a"],
    "edited": lambda: dataclasses.replace(PLAIN, name="other"),
    "replaced": lambda: dp.replace(dp.serial(a=dp.linear(3), b=jnp.sin), "a", dp.linear(2)),
}
OTHER = {
    "leaf": lambda: dp.linear(3, kernel_init="he_uniform"),
    "initializer": lambda: dp.linear(3, kernel_init=NORMAL(0.25)),
    "partial": lambda: dp.serial(functools.partial(jax.nn.gelu, approximate=True)),
    "wires": lambda: dp.serial(dp.linear(4), jax.nn.relu, dp.residual(dp.linear(4)), head=abs),
    "branch": lambda: dp.branch(dp.linear(2), jnp.tanh, merge=lambda y: y[0]),
    "program": lambda: dp.program(up=dp.linear(9), down=dp.linear(4))(feed),
    "stateless": lambda: dp.stateless(ones, lambda params, x: params["scale"] + x, name="scaling"),
    "closure": lambda: dp.serial(scaling_by(2.0), scaling_by(np.arange(4.0) + 1e-9)),
    "gpt": lambda: dp.models.gpt(5, length=4, width=4, depth=1, heads=1, dropout=0.5),
    "edited": lambda: dataclasses.replace(PLAIN, name="another"),
}


@pytest.mark.parametrize("name", MAKE)
def test_nets_of_equal_calls_are_equal_and_hash_alike(name):
    one, two = MAKE[name](), MAKE[name]()
    assert one is not two and one == two and hash(one) == hash(two)
    others = [MAKE[other]() for other in MAKE if other != name]
    if name in OTHER:
        others.append(OTHER[name]())
    assert all(one != other for other in others)
    assert one != "serial" and len({one, two, *others}) == 1 + len(others)


@pytest.mark.parametrize(("one", "other"), [
    (1, 1.0), (1, True), (0.0, -0.0), (jnp.float32, jnp.float16), ((1, 2), [1, 2]),
    (np.ones(2, np.float32), np.ones(2)), (np.ones((2, 1)), np.ones((1, 2))),
    (np.ones(2), np.ones(2) + 1e-12), (jnp.ones(2), jnp.ones(2).at[1].set(2)),
    (jnp.ones(()), jnp.asarray(1.0)), (jax.random.key(0), jax.random.key(1)),
    (NORMAL(0.02), NORMAL(0.03)), (NORMAL(0.02), jax.nn.initializers.truncated_normal(0.02)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (scaling_by(1), scaling_by(2)),
    (counting([]), counting([])), (jax.jit(identity), jax.jit(identity)),
    (functools.partial(identity, 1), functools.partial(identity, 2)), (halve, identity),
], ids=lambda value: type(value).__name__)
def test_nets_that_differ_in_one_argument_are_unequal(one, other):
    assert compared(one) != compared(other) and compared(one) == compared(one)


@pytest.mark.parametrize("make", [
    lambda: float("nan"), lambda: np.arange(3), lambda: jnp.arange(3), lambda: jax.random.key(3),
    lambda: NORMAL(0.02), lambda: jax.nn.initializers.variance_scaling(1, "fan_in", "normal"),
    lambda: functools.partial(identity, np.ones(2)), lambda: [1, (2, {"a": 3})],
    lambda: scaling_by(functools.partial(jax.nn.gelu, approximate=False)),
    lambda: dp.program(up=dp.linear(8), down=dp.linear(4))(functools.partial(feed)),
    lambda: dp.rotary(scaling=dp.rope.linear_scaling(2.0)), lambda: frozenset({1, 2}),
])
def test_nets_made_by_the_same_calls_are_equal(make):
    assert compared(make()) == compared(make()) and hash(compared(make())) == hash(compared(make()))


def test_a_function_that_encloses_itself_is_compared_too():
    def made():
        def power(x, n=2):
            return x if n == 1 else x * power(x, n - 1)

        return power

    one = dp.serial(made())
    assert one == one and hash(one) == hash(one) and one != dp.serial(made())


def test_a_jitted_function_with_the_net_as_a_static_argument_is_traced_once():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(net, params, x):
        traced.append(net)
        return net(params, x)

    def net(scale):
        return dp.serial(dp.linear(4, kernel_init=NORMAL(scale)), jax.nn.relu, dp.residual(
            dp.linear(4)))

    params, _ = net(0.02).init(KEY, X)
    for _ in range(3):
        run(net(0.02), params, X)
    assert len(traced) == 1
    run(net(0.5), params, X)
    assert len(traced) == 2


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("copied", [
    copy.copy, copy.deepcopy, lambda net: copy.deepcopy({"net": [net]})["net"][0],
], ids=["copy", "deepcopy", "deepcopy of a tree"])
def test_copies_are_the_net(name, copied):
    net = MAKE[name]()
    assert copied(net) == net and repr(copied(net)) == repr(net)


BY_VALUE = {"initializer", "closure", "edited"}  # what holds a function that no module has by name


@pytest.mark.parametrize("name", MAKE)
def test_pickles_are_equal_nets(name):
    net = MAKE[name]()
    if name not in BY_VALUE:
        again = pickle.loads(pickle.dumps(net))
        assert again == net and repr(again) == repr(net)
    again = cloudpickle.loads(cloudpickle.dumps(net))
    assert again.name == net.name and list(again.children) == list(net.children)


# They hold a lambda, an initializer with arguments, or a part that is a program of its model.
NAMELESS = ["fixed_point", "fixed_point, randomly", "fixed_point, streaming",
            "reparam", "unet", "dit", "the decoder of transformer", "the decoder of seq2seq"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layer_of_the_library_is_pickled(case):
    if case.name in NAMELESS:
        assert "cloudpickle" in refused(pickle.dumps, case.layer).remedy
        assert repr(cloudpickle.loads(cloudpickle.dumps(case.layer)))
    else:
        again = pickle.loads(pickle.dumps(case.layer))
        assert again == case.layer and repr(again) == repr(case.layer)


@pytest.mark.parametrize("make", [
    lambda: dp.models.unet(widths=(4, 4), groups=2),
    lambda: dp.models.dit(width=8, depth=1, heads=2),
    lambda: dp.models.bert(5, length=4, width=4, depth=1, heads=1), lambda: dp.embedding(5, 4),
    lambda: dp.models.llama(5, width=4, depth=1, heads=1, hidden=8), lambda: dp.prelu(),
    lambda: dp.models.transformer(5, 5, width=4, depth=1, heads=1, hidden=4),
    lambda: dp.models.vae(dp.linear(4), dp.linear(3)), lambda: dp.models.resnet(18, 10)])
def test_models_and_defaults_are_pickled_by_their_call(make):
    net = make()
    again = pickle.loads(pickle.dumps(net))
    assert again == net == make() and repr(again) == repr(net)


def test_functions_without_a_name_in_a_module_are_not_pickled():
    local = scaling_by(2)
    shown = f"<scale test_calls.py:{local.__code__.co_firstlineno}>"
    expect("", f"serial({shown}): wants functions that a module has by name, to be pickled, got "
           f"{shown}; use cloudpickle, which pickles functions by value, or define it by def in a "
           "module", pickle.dumps, dp.serial(local))
    with pytest.raises(dp.LayerError, match="use cloudpickle"):
        pickle.dumps(dp.repeat(2, dp.serial(dp.linear(4), lambda x: x)))
    module = nn.Dense(3, kernel_init=NORMAL(0.5))  # an object that holds such a function
    with pytest.raises(dp.LayerError, match="got <Dense>; use cloudpickle"):
        pickle.dumps(dp.interop.from_linen(module))


# The small net has all that is pickled in another way each.
SENT = {
    "small": (dp.serial(dp.lora(dp.linear(4), 1), dp.gelu, jax.nn.relu, lambda x: 2 * x), X),
    "tap": (MAKE["tap"](), X), "computed": (MAKE["computed"](), X), "gpt": (MAKE["gpt"](), IDS),
}
IN_ANOTHER_PROCESS = """
import pathlib, pickle, sys
import jax
import numpy as np
folder = pathlib.Path(sys.argv[1])
told = []
for net, x in pickle.loads((folder / "nets").read_bytes()):
    params, state = net.init(jax.random.key(0), x)
    leaves = jax.tree.leaves((params, state, net(params, x, state=state)))
    told.append([np.asarray(leaf) for leaf in leaves])
(folder / "told").write_bytes(pickle.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")  # as the other process does
@pytest.mark.parametrize("names", [
    ["small"], pytest.param(["tap", "computed", "gpt"], marks=pytest.mark.slow)])
def test_in_a_new_process_a_pickled_net_gives_the_same_bits(names, tmp_path):
    sent = [(net, np.asarray(x)) for net, x in map(SENT.get, names)]
    (tmp_path / "nets").write_bytes(cloudpickle.dumps(sent))
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)], check=True,
                   timeout=600)
    for (net, x), told in zip(sent, pickle.loads((tmp_path / "told").read_bytes()), strict=True):
        params, state = net.init(KEY, x)
        leaves = jax.tree.leaves((params, state, net(params, x, state=state)))
        same([np.asarray(leaf) for leaf in leaves], told)
