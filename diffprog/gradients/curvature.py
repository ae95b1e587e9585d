"""Second-order products: Hessian, Gauss-Newton and Fisher matrix times a vector.

No matrix is formed. A product is a tree like the parameters, for conjugate gradients
(`jax.scipy.sparse.linalg.cg`), power iteration and Lanczos. An objective becomes a function of the
parameters alone by a lambda::

    loss = lambda params: objective(net, params, state, batch, key=None, train=False)[0]

Costs are numbers of operations. A gradient costs three evaluations of the function: one forward,
two backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffprog.core.arguments import check_array
from diffprog.core.dtypes import is_float, wide
from diffprog.core.errors import LayerError
from diffprog.core.guards import inputs
from diffprog.core.notation import listed, show
from diffprog.core.plans import difference, reaches
from diffprog.losses.entries import Mask, clear, reduce, spread

__all__ = ["fisher_product", "gauss_newton_product", "hessian_product"]

# The log-partition function of the natural parameters of an entry, by exponential family.
_LOG_PARTITION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bernoulli": jax.nn.softplus,
    "categorical": lambda logits: jax.nn.logsumexp(logits, axis=-1),
    "gaussian": lambda mean: jnp.square(mean) / 2,
}


def hessian_product(loss: Callable[[Any], jax.Array], params: Any, vector: Any) -> Any:
    """The Hessian of a loss times a vector: ``H v``, with ``H = d^2 loss / d params^2``.

    The product is the derivative of the gradient along the vector: forward mode over reverse mode.
    It costs at most three gradients, with the memory of two. A kink, as of ReLU, contributes
    nothing.

    Args:
        loss: ``params -> number``.
        params: a tree of floating-point arrays.
        vector: a tree like `params`.

    Raises:
        LayerError: the vector is not like the parameters; the loss is no single number, or does
            not depend on them.

    Example:
        >>> params, vector = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])
        >>> dp.gradients.hessian_product(lambda p: p[0] ** 2 * p[1], params, vector).tolist()
        [4.0, 2.0]

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian", Neural Computation 6.
    """
    _check_vector(params, vector)
    value, pull = jax.vjp(_number(loss), params)
    check_reaches(pull, value)
    return jax.jvp(jax.grad(_number(loss)), (params,), (vector,))[1]


def gauss_newton_product(
    forward: Callable[[Any], Any], loss: Callable[[Any], jax.Array], params: Any, vector: Any
) -> Any:
    """The Gauss-Newton matrix times a vector: ``G v = J^T H_loss J v``.

    J is the Jacobian of the outputs with respect to the parameters, H_loss the Hessian of the loss
    with respect to the outputs. G is the Hessian of ``loss(forward(params))`` without the curvature
    of the net. If the loss is convex in the outputs, G is positive semi-definite. The product costs
    five thirds of a gradient: one evaluation, one forward and one backward derivative.

    Args:
        forward: ``params -> outputs``, an array or a tree; it must support forward mode.
        loss: ``outputs -> number``.
        params, vector: as in `hessian_product`.

    Raises:
        LayerError: as `hessian_product` does.

    Example:
        >>> x, y = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])
        >>> dp.gradients.gauss_newton_product(
        ...     lambda slope: slope * x, lambda f: jnp.sum((f - y) ** 2), jnp.array(3.0),
        ...     jnp.array(1.0)).item()
        10.0

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient
    descent", Neural Computation 14.
    """
    _check_vector(params, vector)
    outputs, push = jax.linearize(forward, params)
    check_reaches(push, vector)
    pull = jax.linear_transpose(push, params)
    return pull(jax.jvp(jax.grad(_number(loss)), (outputs,), (push(vector),))[1])[0]


def fisher_product(
    forward: Callable[[Any], jax.Array], params: Any, vector: Any, *,
    distribution: Literal["bernoulli", "categorical", "gaussian"], mask: Mask = None,
) -> Any:
    """The Fisher information times a vector: ``F v = E[g g^T] v``, with ``g = grad log p(y)``.

    The expectation is over targets y from the predicted distribution, and the mean over the valid
    entries of the batch. It is exact: nothing is sampled, and no targets are needed. The
    *empirical* Fisher matrix, of the gradients at the given targets, is another matrix unless the
    net predicts these.

    Outputs are natural parameters of the distribution, so F is the Gauss-Newton matrix of its
    log-partition function, and of the loss: `cross_entropy` for "categorical",
    `binary_cross_entropy` for "bernoulli", half the `squared_error` for "gaussian". It costs as
    much as `gauss_newton_product`.

    Shapes:
        outputs: (..., classes) for "categorical", with entries (...); otherwise each number is an
        entry. mask: leading axes of the entries, True where valid.

    Args:
        forward: ``params -> outputs``: logits, or means.
        params, vector: as in `hessian_product`.
        distribution: of the targets: "categorical" with logits of the classes, "bernoulli" with
            one logit, or "gaussian" with the mean and variance 1.
        mask: entries where it is False are invalid.

    Raises:
        LayerError: as `hessian_product` does; the distribution is unknown; the output is not one
            array.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> dp.gradients.fisher_product(lambda p: x @ p, jnp.zeros(2), jnp.ones(2),
        ...                   distribution="bernoulli").tolist()
        [0.125, 0.5]

    Source: Martens 2020, arXiv:1412.1193; on the empirical matrix Kunstner, Balles, Hennig 2019,
    arXiv:1905.12558.
    """
    if distribution not in _LOG_PARTITION:
        raise LayerError(f"distribution out of {listed(_LOG_PARTITION)}", repr(distribution),
                         "choose one of them")
    features = 1 if distribution == "categorical" else 0

    def log_partition(outputs: jax.Array) -> jax.Array:
        check_array(outputs, features)
        valid = spread(mask, outputs.shape[: outputs.ndim - features])
        values = _LOG_PARTITION[distribution](clear(wide(outputs), valid))
        return reduce(values, valid, "mean")

    return gauss_newton_product(forward, log_partition, params, vector)


def check_reaches(derivative: Callable[[Any], Any], given: Any) -> None:
    """Raise if a linear map is zero for every argument, as of a function without parameters."""
    if not reaches(derivative, given):
        raise LayerError("something that depends on the parameters", "a derivative of zero",
                         "make the loss train=True, or differentiate the plain net at "
                         "dp.tree.merge(net, params, state): ema uses averages in inference, and "
                         "frozen parameters have no gradient")


def _check_vector(params: Any, vector: Any) -> None:
    """Raise unless the vector has the paths, shapes and dtypes of the parameters."""
    remedy = "make it like params, as jax.tree.map(jnp.zeros_like, params) is"
    if wrong := difference("vector", inputs(params), inputs(vector), remedy):
        raise wrong


def _number(loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The loss, checked to be a scalar."""

    def checked(point: Any) -> Any:
        value = loss(point)
        if not is_float(value) or value.shape != ():
            raise LayerError("a loss that is one floating-point number", show(value),
                             "take its mean, or of a pair (loss, rest) the first: f(params)[0]")
        return value

    return checked
