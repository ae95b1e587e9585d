"""Optimizers of optax against those of PyTorch, in float64: 8 steps on one small problem.

They are not ours, but whoever brings a training recipe along wants to know which are the same, and
how to get PyTorch's where optax defines another one under the same name.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from reference import ARRAYS, CASES, difference

EPS = 1e-8  # PyTorch's default, except where said otherwise


def nadam(learning_rate, b1=0.9, b2=0.999, eps=EPS, decay=4e-3):
    """PyTorch's: the momentum follows Dozat's schedule b1 * (1 - 0.96**(decay * t) / 2).

    The product of the momenta is kept in float32, whatever the parameters are.
    """

    def momentum(step):
        return b1 * (1 - 0.5 * 0.96 ** (decay * step))

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros([], int), jnp.ones([], jnp.float32), zeros, zeros

    def update(grads, state, params=None):
        count, product, mean, square = state
        count += 1
        now, following = momentum(count), momentum(count + 1)
        product *= now.astype(jnp.float32)
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, square, grads)

        def step(m, v, g):
            whole = product.astype(g.dtype)
            ahead = (1 - now) / (1 - whole) * g + following / (1 - whole * following) * m
            return ahead / (jnp.sqrt(v / (1 - b2**count)) + eps)

        return jax.tree.map(step, mean, square, grads), (count, product, mean, square)

    return optax.chain(optax.GradientTransformation(init, update),
                       optax.scale_by_learning_rate(learning_rate))


def radam(learning_rate, b2=0.999):
    """PyTorch's: eps is added before the bias of the second moment is corrected."""
    return optax.inject_hyperparams(optax.radam)(
        learning_rate, b2=b2, eps=lambda count: EPS / jnp.sqrt(1 - b2 ** (count + 1)))


# From PyTorch's options to the optimizer of optax that takes the same steps.
SAME = {
    "SGD": lambda lr: optax.sgd(lr),
    "SGD_momentum": lambda lr, momentum: optax.sgd(lr, momentum),
    # weight decay is added to the gradient, before the momentum
    "SGD_nesterov_wd": lambda lr, momentum, nesterov, weight_decay: optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(lr, momentum, nesterov)),
    "Adam": lambda lr, betas: optax.adam(lr, *betas),
    # PyTorch's weight decay is 1e-2 unless told otherwise, that of optax 1e-4
    "AdamW": lambda lr, weight_decay: optax.adamw(lr, weight_decay=weight_decay),
    "Adadelta": lambda lr: optax.adadelta(lr),
    "Adamax": lambda lr: optax.adamax(lr),
    "RMSprop": lambda lr, alpha: optax.rmsprop(lr, alpha, eps_in_sqrt=False),
    "RMSprop_momentum": lambda lr, alpha, momentum: optax.rmsprop(
        lr, alpha, eps_in_sqrt=False, momentum=momentum),
    "Adagrad": lambda lr: optax.adagrad(lr, initial_accumulator_value=0.0, eps=1e-20),
    "NAdam": lambda lr: nadam(lr),
    "RAdam": lambda lr: radam(lr),
}
TOLERANCE = 1e-14
# eps = 1e-20 inside the root is less than PyTorch's 1e-10 beside it, which matters for gradients
# near 1e-10 alone: elsewhere both are next to nothing.
NEARLY = {"Adagrad": 1e-9}


class Difference(NamedTuple):
    """What optax does under the same name and with the same options, and why it is not the same."""

    plain: Any
    reason: str
    about: float  # how far apart the trajectories are, relative to the largest entry


DIFFERENT = {
    "RMSprop": Difference(
        lambda lr, alpha: optax.rmsprop(lr, alpha),
        "optax divides by sqrt(v + eps), PyTorch by sqrt(v) + eps: eps_in_sqrt=False", 3e-7),
    "RMSprop_momentum": Difference(
        lambda lr, alpha, momentum: optax.rmsprop(lr, alpha, momentum=momentum),
        "as RMSprop", 1e-6),
    "Adagrad": Difference(
        lambda lr: optax.adagrad(lr),
        "optax starts the sum of squares at 0.1, PyTorch at 0: initial_accumulator_value=0; and "
        "the eps of optax is 1e-7 inside the root, PyTorch's 1e-10 beside it: eps=1e-20", 0.1),
    "NAdam": Difference(
        lambda lr: optax.nadam(lr),
        "optax keeps the momentum constant, PyTorch lets it grow: `nadam` above", 0.1),
    "RAdam": Difference(
        lambda lr: optax.radam(lr),
        "PyTorch adds eps before it corrects the bias of the second moment: `radam` above", 1e-9),
}


def distance(name, optimizer):
    """How far the parameters are from PyTorch's in 8 steps, relative to the largest."""
    with jax.enable_x64(True):
        matrix, b, params = (jnp.asarray(ARRAYS[f"optim/{x}"]) for x in ("A", "b", "p0"))

        @jax.grad
        def gradient(params):
            return 0.5 * jnp.sum((matrix @ jnp.tanh(params) - b) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        _, ours = jax.jit(lambda carry: jax.lax.scan(step, carry, length=8))(
            (params, optimizer.init(params)))
        return difference(ours, ARRAYS[f"optim/{name}/trajectory"])


def kwargs(name):
    return CASES[f"optim/{name}"]["kwargs"]


def test_every_optimizer_is_in_the_table():
    assert [f"optim/{name}" for name in sorted(SAME)] == sorted(
        case for case in CASES if case.startswith("optim/"))


@pytest.mark.parametrize("name", SAME)
def test_an_optimizer_takes_the_steps_of_pytorch(name):
    assert distance(name, SAME[name](**kwargs(name))) <= NEARLY.get(name, TOLERANCE)


@pytest.mark.parametrize("name", DIFFERENT)
def test_plain_optax_differs_as_the_table_says(name):
    """If this fails, optax has changed: see whether the table can become shorter."""
    plain, reason, about = DIFFERENT[name]
    assert about / 2 < distance(name, plain(**kwargs(name))) < about * 2, reason
