"""How an error is compared, and the faulty functions that several files use."""

import re

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp

KEY = jax.random.key(0)
X = jnp.ones((2, 4))
GRAMMAR = re.compile(r"^(.+: )?wants .+(, got .+)?(; .+)?$", re.DOTALL)
NO_KEY = "wants a key when train=True, got none; pass key=jax.random.key(seed) to apply"
INIT_RETURNED = "pass what init returned"
NAMES = "wants a name without leading _ and / * @ ~ #"
STATIC = "make it static under jax.jit: jax.jit(net.apply, static_argnames='train')"
ANOTHER = "pass what init returned on input of this shape"
NOBODY = "leave it out, or add a layer that takes it"
LIST = ("write serial(a, b) for a sequence of layers, and Layer(init, apply) for a pair of "
        "functions")


def refused(f, *args, **kwargs):
    """The error that the call raises: of the one class, and of the one grammar."""
    with pytest.raises(dp.LayerError) as caught:
        f(*args, **kwargs)
    error = caught.value
    assert type(error) is dp.LayerError
    assert isinstance(error, ValueError)
    assert GRAMMAR.fullmatch(str(error)), str(error)
    assert error.wants in str(error) and error.got in str(error)
    assert str(error).endswith(error.remedy)
    assert str(error).startswith(error.path)
    return error


def expect(path, message, f, *args, **kwargs):
    """The call raises this error, with this path; the whole message is compared.

    A message without a remedy leaves its wording open, but not that there is one.
    """
    error = refused(f, *args, **kwargs)
    assert error.remedy
    assert str(error) == (message if "; " in message else f"{message}; {error.remedy}")
    assert error.path == path
    return error


# Functions with a name, so that messages are the same wherever they stand in this file.
def halve(x):
    return x.astype(jnp.bfloat16)


def first_row(x):
    return x[:1]


def give_layer(x):
    return dp.linear(3)


def divide(x):
    return x * (1 / 0)


def once(layers, x):
    return layers.lin(x)


def twice(layers, x):
    return layers.lin(layers.lin(x))


def nope(layers, x):
    return layers.nope(x)


def nope_in_brackets(layers, x):
    return layers["nope"](x)


def forgets(layers, x):
    layers.lin(x)


def early(layers, x):
    return x @ layers.lin.params["kernel"] + layers.lin(x)


def mask_taker(*, name="taker"):
    def forward(params, x, *, mask, positions=None):
        return x

    return dp.stateless(None, forward, name=name)


def program(function, **children):
    return dp.program(**children)(function)
