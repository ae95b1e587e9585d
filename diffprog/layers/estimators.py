"""What a net draws on its way, and how a gradient passes a draw.

The gradient wanted is that of a mean, ``d/dtheta E[f(z)]`` with z drawn from a distribution that
theta moves. Three ways lead to it from single draws. A draw may be written as a function of theta
and of noise that knows no theta, and differentiated (`gaussian_sample`); a discrete one may be
relaxed until it is such a function (`gumbel_softmax`), or be given the derivative of something else
(`straight_through`), both of which are biased; and the distribution may be differentiated in place
of the draw (`score_function`), which is not, and varies most. `examples/estimators.py` measures
bias and deviation of each.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array
from diffprog.core.dtypes import joint
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.parameters import parameter_dtype
from diffprog.core.plans import Params, State

__all__ = ["gaussian_sample", "gumbel_softmax", "score_function", "straight_through"]


@factory
def gaussian_sample() -> Layer:
    """Draw from a normal distribution: ``y = mean + exp(log_variance / 2) * e`` with e ~ N(0, 1).

    The gradient passes to mean and log_variance, which is called reparametrization. Without a key
    y is the mean; with one it is drawn, at rest as well as in training.

    Shapes:
        x: a pair (mean, log_variance) of one shape and dtype -> the same.

    Raises:
        LayerError: x is no such pair of floating-point arrays; ``train=True`` without a key.

    Example:
        >>> net, x = dp.estimators.gaussian_sample(), (jnp.full(1000, 5.0), jnp.zeros(1000))
        >>> net({}, x, key=jax.random.key(0)).std().round(1).tolist()
        1.0
        >>> net({}, x)[0].tolist()
        5.0

    Source: Kingma and Welling 2014, arXiv:1312.6114, section 2.4 and appendix B.
    """

    def apply(
        params: Params, state: State, x: Any, *, key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        if not isinstance(x, (tuple, list)) or len(x) != 2:
            raise LayerError("a pair (mean, log_variance)", show(x),
                             "put branch(linear(n), linear(n)) before it, for example")
        mean, log_variance = x
        check_array(mean)
        if (log_variance.shape, log_variance.dtype) != (mean.shape, mean.dtype):
            raise LayerError("a mean and a log_variance of one shape and dtype", show(x),
                             "give each number that is drawn a variance of its own")
        if key is None:
            return mean, state
        # In 16 bits there would be no tails: nothing beyond three deviations.
        noise = jax.random.normal(key, mean.shape, parameter_dtype(mean)).astype(mean.dtype)
        return mean + jnp.exp(log_variance / 2) * noise, state

    return Layer(lambda key, x: ({}, {}), apply, bare=True, random=True)


@factory
def gumbel_softmax(*, temperature: float = 1.0, hard: bool = False) -> Layer:
    """Draw a class, smoothly: ``y = softmax((logits + g) / temperature)``, g of Gumbel(0, 1).

    The class of the largest entry is a true draw from ``softmax(logits)`` at any temperature, and
    as the temperature falls y approaches its one-hot vector, while the gradient varies ever more.
    Without a key g is 0; with one it is drawn, at rest as well as in training.

    Shapes:
        x: logits (..., classes) -> (..., classes), in the dtype of x.

    Args:
        temperature: positive.
        hard: True gives the one-hot vector of the largest entry, with the gradient of the soft one:
            `straight_through`.

    Raises:
        LayerError: a temperature that is not positive; x is no floating-point array of at least one
            axis; ``train=True`` without a key.

    Example:
        >>> net = dp.estimators.gumbel_softmax(hard=True)
        >>> logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
        >>> y = net({}, jnp.tile(logits, (1000, 1)), key=jax.random.key(0))
        >>> y[0].tolist(), [round(float(share), 1) for share in y.mean(0)]
        ([0.0, 1.0, 0.0], [0.1, 0.2, 0.7])

    Source: Jang, Gu, Poole 2017, arXiv:1611.01144, eq. 2 and section 2.2; Maddison, Mnih, Teh 2017,
    arXiv:1611.00712.
    """
    if not temperature > 0:
        raise LayerError("temperature as a positive number", repr(temperature),
                         "pass 1.0, for example")

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=1, axes="(..., classes)")
        logits = x.astype(joint(x.dtype, jnp.float32))
        if key is not None:
            logits += jax.random.gumbel(key, x.shape, logits.dtype)
        soft = jax.nn.softmax(logits / temperature).astype(x.dtype)
        if not hard:
            return soft, state
        # The class is that of the logits: of two close ones the soft vector may round to a tie.
        one = jax.nn.one_hot(logits.argmax(-1), x.shape[-1], dtype=x.dtype)
        return straight_through(one, soft), state

    return Layer(lambda key, x: ({}, {}), apply, bare=True, random=True)


def straight_through(values: jax.Array, surrogate: jax.Array) -> jax.Array:
    """One thing with the gradient of another: ``y = [values] + surrogate - [surrogate]``.

    What stands in brackets is a constant to the gradient. It is how a draw, a step or a rounding
    that has no useful derivative borrows one, and the gradient is biased by what the two differ.

    Args:
        values: what y is.
        surrogate: what is differentiated in their place; of the same shape and dtype.

    Raises:
        LayerError: shapes or dtypes differ.

    Example:
        >>> rounded = lambda x: dp.estimators.straight_through(jnp.round(x), x)
        >>> float(rounded(0.7)), float(jax.grad(rounded)(0.7))
        (1.0, 1.0)

    Source: Bengio, Leonard, Courville 2013, arXiv:1308.3432, section 4.
    """
    values, surrogate = jnp.asarray(values), jnp.asarray(surrogate)
    if (values.shape, values.dtype) != (surrogate.shape, surrogate.dtype):
        raise LayerError("values and surrogate of one shape and dtype", show((values, surrogate)),
                         "bring them to one shape and dtype")
    return jax.lax.stop_gradient(values) + _nothing(surrogate)


@jax.custom_jvp
def _nothing(x: jax.Array) -> jax.Array:
    """Zeros with the gradient of x: ``x - [x]``, where x may be infinite."""
    return jnp.zeros_like(x)


@_nothing.defjvp
def _tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _nothing(*primals), tangents[0]


def score_function(
    values: jax.Array, log_probabilities: jax.Array, *,
    baseline: jax.Array | Literal["leave_one_out"] | None = None,
) -> jax.Array:
    """The values of draws, with the gradient of their mean: ``y = f + [f - b] (log p - [log p])``.

    What stands in brackets is a constant to the gradient, so y equals ``f``, and its gradient
    ``df + (f - b) dlog p`` has the expectation ``d E[f]``, also where f is no smooth function of
    what was drawn. That is REINFORCE, the policy gradient. It holds for first derivatives alone.

    Args:
        values: f of each draw, (draws, ...); what is to be made small or large.
        log_probabilities: that of each draw, of the same shape, differentiable; the draw itself is
            a constant, as `jax.random.categorical` gives it.
        baseline: b, of the shape of values, or a single number; it lessens the variance and adds no
            bias, if it does not depend on the draw that it is taken from. "leave_one_out" is the
            mean of all other values along the first axis; None is 0.

    Raises:
        LayerError: shapes differ; "leave_one_out" of fewer than two draws.

    Example:
        >>> rewards = jnp.array([1.0, 0.0, 2.0])
        >>> def mean_reward(logits, draws):
        ...     log_p = jax.nn.log_softmax(logits)[draws]
        ...     y = dp.estimators.score_function(rewards[draws], log_p, baseline="leave_one_out")
        ...     return y.mean()
        >>> draws = jax.random.categorical(jax.random.key(0), jnp.zeros(3), shape=(30_000,))
        >>> slopes = jax.grad(mean_reward)(jnp.zeros(3), draws)  # in the limit 0, -1/3 and 1/3
        >>> [abs(round(float(slope), 1)) for slope in slopes]
        [0.0, 0.3, 0.3]

    Source: Williams 1992, doi:10.1007/BF00992696, theorem 1; leave-one-out: Kool, van Hoof, Welling
    2019, "Buy 4 REINFORCE samples, get a baseline for free!", eq. 8.
    """
    values, log_probabilities = jnp.asarray(values), jnp.asarray(log_probabilities)
    check_array(values)
    if values.shape != log_probabilities.shape:
        raise LayerError(f"log_probabilities of the shape of values, {values.shape}",
                         show(log_probabilities),
                         "give each draw one: sum over all that it consists of")
    if isinstance(baseline, str):
        baseline = _others(values, baseline)
    elif jnp.shape(baseline if baseline is not None else 0) not in ((), values.shape):
        raise LayerError(f"a baseline that is one number or of the shape {values.shape}",
                         show(baseline), "give each draw its own")
    advantage = jax.lax.stop_gradient(values - (0 if baseline is None else baseline))
    return values + advantage * _nothing(log_probabilities)


def _others(values: jax.Array, baseline: str) -> jax.Array:
    """The mean of all other draws, for each draw."""
    if baseline != "leave_one_out":
        raise LayerError("a baseline that is an array or leave_one_out", repr(baseline),
                         "pass one of them")
    if values.ndim == 0 or len(values) < 2:
        raise LayerError("at least two draws to leave one out", show(values),
                         "draw more, or pass an array as baseline")
    wide = values.astype(parameter_dtype(values))
    return ((wide.sum(0) - wide) / (len(values) - 1)).astype(values.dtype)
