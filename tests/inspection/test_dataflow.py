"""`wiring`: what a layer made of layers does between the calls of its children."""

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp
from diffprog.inspection.dataflow import wiring

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def steps(f, x=X, **side):
    """Each step as (child or names, where its inputs come from)."""
    @dp.program(a=dp.linear(4), b=dp.linear(4))
    def net(layers, x, *, extra=None):
        return f(layers, x, extra)

    found = wiring(net, x, side)
    origin = {value: "x" for value in found.x} | {
        value: name for name, values in found.side.items() for value in values}
    shown = []
    for step in found.steps:
        what = step.call.name if step.call else ", ".join(step.names).replace(
            "\N{MULTIPLICATION SIGN}", "*")
        roots = [value.root for value, _ in step.taken if value]
        shown.append((what, [origin.get(root) or root.params for root in roots]))
        origin.update(dict.fromkeys(step.given, what))
    return [*shown, [value and origin[value.root] for value in found.y]]


def test_a_chain():
    assert steps(lambda layers, x, _: layers.b(layers.a(x))) == [
        ("a", ["x"]), ("b", ["a"]), ["b"]]


def test_a_sum_has_both_of_its_inputs():
    def f(layers, x, _):
        return x + layers.b(x + layers.a(x))

    assert steps(f) == [
        ("a", ["x"]), ("+", ["x", "a"]), ("b", ["+"]), ("+", ["x", "b"]), ["+"]]


def test_reshapes_and_casts_are_passed_through():
    def f(layers, x, _):
        y = layers.a(x.reshape(2, 2, 2).swapaxes(0, 1).reshape(2, 4).astype(jnp.float32))
        return layers.b(jnp.squeeze(y[None], 0)), y

    assert steps(f) == [("a", ["x"]), ("b", ["a"]), ["b", "a"]]


def test_operations_are_joined_to_the_one_that_alone_uses_them():
    def f(layers, x, _):
        y = layers.a(x)
        return layers.b(jnp.exp(y) / jnp.exp(y).sum(-1, keepdims=True))

    (first, joined, *rest) = steps(f)
    assert first == ("a", ["x"])
    assert joined[0] == "exp, reduce_sum, ÷" and set(joined[1]) == {"a"}
    assert rest == [("b", ["exp, reduce_sum, ÷"]), ["b"]]


def test_an_operation_that_others_use_too_stands_alone():
    def f(layers, x, _):
        y = jnp.exp(layers.a(x))
        return layers.b(y) + y

    assert steps(f) == [
        ("a", ["x"]), ("exp", ["a"]), ("b", ["exp"]), ("+", ["b", "exp"]), ["+"]]


def test_jitted_functions_are_one_operation_of_their_name():
    def f(layers, x, _):
        return layers.b(jax.nn.relu(layers.a(x)))

    assert steps(f) == [("a", ["x"]), ("relu", ["a"]), ("b", ["relu"]), ["b"]]
    named = jax.jit(lambda a: a.reshape(4, 2).reshape(2, 4))
    assert steps(lambda layers, x, _: layers.b(named(layers.a(x))))[1] == ("b", ["a"])


def test_what_is_computed_from_no_input_is_none_and_what_is_unused_is_dropped():
    def f(layers, x, _):
        y = layers.a(x)
        jnp.exp(y)
        return layers.b(jnp.ones((2, 4))) * jnp.arange(4.0)

    assert steps(f) == [("a", ["x"]), ("b", []), ("*", ["b"]), ["*"]]


def test_side_inputs_and_parameters_that_others_read():
    def f(layers, x, extra):
        return layers.b(layers.a(x) + extra) @ layers.a.params["kernel"].T

    assert steps(f, extra=X) == [
        ("a", ["x"]), ("+", ["a", "extra"]), ("b", ["+"]), ("@", ["b", "a/kernel"]), ["@"]]


TRANSFORMED = {
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "cond": lambda f, x: jax.lax.cond(True, f, f, x),
    "scan": lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, length=3)[0],
    "while": lambda f, x: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, x))[1],
}


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_calls_inside_transformed_functions_are_found(kind):
    def f(layers, x, _):
        layers.a(x)
        return TRANSFORMED[kind](lambda x: layers.b(x) + 1.0, jnp.exp(x))

    found = steps(f)
    assert found[:3] == [("a", ["x"]), ("exp", ["x"]), ("b", ["exp"])]
    assert found[-1] == ["+"]
