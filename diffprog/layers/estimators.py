"""Random samples inside a net, and estimators of the gradient through them.

All estimate the gradient of an expectation, ``d/dtheta E[f(z)]``, from samples of z, whose
distribution depends on theta:

- `gaussian_sample` (reparametrization): z is a function of theta and of noise that does not depend
  on theta, and is differentiated. Unbiased.
- `gumbel_softmax`: a discrete z is relaxed to such a function. Biased.
- `straight_through`: a discrete z has the derivative of a surrogate. Biased.
- `score_function` (REINFORCE): the log-probability of z is differentiated instead of z. Unbiased,
  with the highest variance.

`examples/estimators.py` measures bias and standard deviation of each.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array, check_positive
from diffprog.core.dtypes import wide_dtype
from diffprog.core.errors import LayerError
from diffprog.core.factories import factory
from diffprog.core.layer import Layer
from diffprog.core.notation import show
from diffprog.core.plans import Params, State

__all__ = ["gaussian_sample", "gumbel_softmax", "score_function", "straight_through"]


@factory
def gaussian_sample() -> Layer:
    """Sample a normal distribution: ``y = mean + exp(log_variance / 2) * e`` with e ~ N(0, 1).

    The gradient flows to mean and log_variance (reparametrization). Without a key y is the mean;
    with a key it is sampled, in training and in inference.

    Shapes:
        x: a pair (mean, log_variance) with one shape and dtype -> that shape and dtype.

    Raises:
        LayerError: x is not such a pair of floating-point arrays; ``train=True`` without a key.

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
                             "give each entry of the mean its own log_variance")
        if key is None:
            return mean, state
        # Noise drawn in 16 bits would have no tails beyond three standard deviations.
        noise = jax.random.normal(key, mean.shape, wide_dtype(mean)).astype(mean.dtype)
        return mean + jnp.exp(log_variance / 2) * noise, state

    return Layer(lambda key, x: ({}, {}), apply, bare=True, random=True)


@factory
def gumbel_softmax(*, temperature: float = 1.0, hard: bool = False) -> Layer:
    """A relaxed sample of a class: ``y = softmax((logits + g) / temperature)``, g ~ Gumbel(0, 1).

    The argmax of y is an exact sample of ``softmax(logits)`` at any temperature. As the temperature
    goes to 0, y approaches the one-hot vector of that class, and the variance of the gradient
    grows. Without a key g is 0; with a key it is sampled, in training and in inference.

    Shapes:
        x: logits (..., classes) -> (..., classes), in the dtype of x.

    Args:
        temperature: positive.
        hard: True returns the one-hot vector of the argmax, with the gradient of the soft vector
            (`straight_through`).

    Raises:
        LayerError: temperature is not positive; x is not a floating-point array with at least one
            axis; ``train=True`` without a key.

    Example:
        >>> net = dp.estimators.gumbel_softmax(hard=True)
        >>> logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
        >>> y = net({}, jnp.tile(logits, (1000, 1)), key=jax.random.key(0))
        >>> y[0].tolist(), [round(float(frequency), 1) for frequency in y.mean(0)]
        ([0.0, 1.0, 0.0], [0.1, 0.2, 0.7])

    Source: Jang, Gu, Poole 2017, arXiv:1611.01144, eq. 2 and section 2.2; Maddison, Mnih, Teh 2017,
    arXiv:1611.00712.
    """
    # Schedules return arrays.
    check_positive("temperature", float(temperature), "pass 1.0, for example")

    def apply(
        params: Params, state: State, x: jax.Array, *, key: Any = None, train: bool = False
    ) -> tuple[jax.Array, State]:
        check_array(x, rank=1, axes="(..., classes)")
        logits = x.astype(wide_dtype(x))
        if key is not None:
            logits += jax.random.gumbel(key, x.shape, logits.dtype)
        soft = jax.nn.softmax(logits / temperature).astype(x.dtype)
        if not hard:
            return soft, state
        # The argmax is taken of the logits: close logits may round to a tie in the soft vector.
        one_hot = jax.nn.one_hot(logits.argmax(-1), x.shape[-1], dtype=x.dtype)
        return straight_through(one_hot, soft), state

    return Layer(lambda key, x: ({}, {}), apply, bare=True, random=True)


def straight_through(values: jax.Array, surrogate: jax.Array) -> jax.Array:
    """Values with the gradient of a surrogate: ``y = [values] + surrogate - [surrogate]``.

    Brackets denote `jax.lax.stop_gradient`. The estimator is for a sample, a step or a rounding,
    which have no useful derivative. Its bias grows with the difference of values and surrogate.

    Args:
        values: the values of y.
        surrogate: differentiated instead of the values; of the same shape and dtype.

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
    """``x - [x]``: zero, with the gradient of x; x may be infinite."""
    return jnp.zeros_like(x)


@_nothing.defjvp
def _tangent(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _nothing(*primals), tangents[0]


def score_function(
    values: jax.Array, log_probabilities: jax.Array, *,
    baseline: jax.Array | Literal["leave_one_out"] | None = None,
) -> jax.Array:
    """The score-function estimator (REINFORCE): ``y = f + [f - b] (log p - [log p])``.

    Brackets denote `jax.lax.stop_gradient`, so y equals f, and its gradient
    ``df + (f - b) dlog p`` has the expectation ``d E[f]``, even if f is not differentiable in the
    sample. This is the policy gradient. Only first derivatives are estimated.

    Args:
        values: f of each sample, (samples, ...); the loss or the reward.
        log_probabilities: log p of each sample, of the same shape, differentiable; the sample
            itself is a constant, as returned by `jax.random.categorical`.
        baseline: b, a number or an array of the shape of values. It reduces the variance, and adds
            no bias if it does not depend on its own sample. "leave_one_out" is the mean of all
            other values along the first axis; None is 0.

    Raises:
        LayerError: shapes differ; "leave_one_out" with fewer than two samples.

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
                         "give one for each sample: sum over the parts of a sample")
    if isinstance(baseline, str):
        b: Any = _leave_one_out(values, baseline)
    elif baseline is None:
        b = 0
    elif jnp.shape(baseline) not in ((), values.shape):
        raise LayerError(f"a baseline that is one number or of the shape {values.shape}",
                         show(baseline), "give one for each sample")
    else:
        b = baseline
    advantage = jax.lax.stop_gradient(values - b)
    return values + advantage * _nothing(log_probabilities)


def _leave_one_out(values: jax.Array, baseline: str) -> jax.Array:
    """For each sample the mean of all other values, (samples, ...)."""
    if baseline != "leave_one_out":
        raise LayerError("a baseline that is an array or leave_one_out", repr(baseline),
                         "pass one of them")
    if values.ndim == 0 or len(values) < 2:
        raise LayerError("at least two samples for leave_one_out", show(values),
                         "draw more samples, or pass an array as baseline")
    wide = values.astype(wide_dtype(values))
    return ((wide.sum(0) - wide) / (len(values) - 1)).astype(values.dtype)
