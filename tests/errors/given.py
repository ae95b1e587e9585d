"""What examples are given: shapes in place of arrays, and a layer with a name around it."""

import jax
import jax.numpy as jnp
from support.refusing import KEY

import diffprog as dp


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def bools(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def at(layer, x, **side):
    """A call of init on a net in which the layer is `at`."""
    return lambda: dp.serial(at=layer).init(KEY, x, **side)


def zeros(call, *given):
    """What a call gives, as zeros: an error is about shapes, and nothing has to be compiled."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(call, *given))


def traced(f, *given, **options):
    """A call of f in abstract evaluation; of the options, shapes stand for arrays too."""
    arrays = {name: value for name, value in options.items() if hasattr(value, "shape")}
    rest = {name: value for name, value in options.items() if name not in arrays}
    return lambda: jax.eval_shape(lambda given, arrays: f(*given, **arrays, **rest), given, arrays)


def params(layer, x, **side):
    return zeros(lambda: layer.init(KEY, x, **side))[0]
