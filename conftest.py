"""What every docstring example may use without importing it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import diffprog as dp


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace):
    doctest_namespace.update(dp=dp, jax=jax, jnp=jnp, optax=optax)
