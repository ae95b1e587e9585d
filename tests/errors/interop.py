"""Errors of layers from other libraries."""

import equinox as eqx
import haiku as hk
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.example_libraries import stax
from support.refusing import KEY, X

import diffprog as dp
from diffprog import interop
from errors.given import at, floats


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("losses", "norm", x.sum())
        return x


class Growing(nn.Module):
    @nn.compact
    def __call__(self, x):
        n = self.variable("calls", "n", jnp.zeros, ())
        if not self.is_initializing():
            self.variable("calls", "more", jnp.zeros, ())
        return x + n.value


class Twice(hk.Module):
    """A module with an array and a submodule of the same name."""

    def __call__(self, x):
        return hk.Linear(2, name="b")(x) + hk.get_parameter("b", (2,), init=jnp.zeros)


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.noise = rngs.noise.fork()

    def __call__(self, x):
        return x + self.noise.normal(x.shape)


EXAMPLES = {
    "serial(<Linear>): wants a layer, or a function without parameters of its own, got Linear of "
    "another library; write dp.interop.from_nnx(...): a function's parameters are never trained":
        lambda: dp.serial(nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
    "serial(tanh): wants a function that JAX can trace, got np.tanh; write jnp.tanh":
        lambda: dp.serial(np.tanh),
    "wants a module of flax.linen, got Dense; call its class: nn.Dense(3)":
        lambda: interop.from_linen(nn.Dense),
    "wants call= for a module that takes more than x, got BatchNorm, which takes mask, "
    "use_running_average; pass call=lambda net, x, train: net(x, ...)":
        lambda: interop.from_linen(nn.BatchNorm()),
    "at (from_linen(<Sowing>)): wants variables in nested dicts of arrays, got {losses: {norm: "
    "(float32[])}}; keep one array in each variable, and leave out sown values":
        at(interop.from_linen(Sowing()), floats(2, 4)),
    "from_linen(<Growing>): wants a state that keeps its structure, {calls: {n: float32[]}}, got "
    "{calls: {more: float32[], n: float32[]}}; leave out the variables that appear in a call":
        lambda: interop.from_linen(Growing()).init(KEY, X),
    "wants a function from nnx.Rngs to a module of flax.nnx, got Noisy; write lambda rngs: "
    "Model(rngs=rngs), so that init can draw parameters":
        lambda: interop.from_nnx(Noisy(nnx.Rngs(0))),
    "from_nnx(Noisy): wants a module without random numbers in inference, got one that draws some; "
    "let it draw in train() mode alone: inference has no key":
        lambda: interop.from_nnx(Noisy).plan(X),
    "wants a function transformed by Haiku, got jax.nn.tanh; pass hk.transform(f) or "
    "hk.transform_with_state(f)":
        lambda: interop.from_haiku(jnp.tanh),
    "at (from_haiku(<Transformed>)): wants arrays of different names, got several within "
    "twice/b/b; rename one of them":
        at(interop.from_haiku(hk.transform(lambda x: Twice()(x))), floats(2, 4)),
    "wants a function from a key to a module of Equinox, got Linear; write lambda key: "
    "Model(key=key), so that init can draw parameters":
        lambda: interop.from_equinox(eqx.nn.Linear(4, 3, key=KEY)),
    "from_stax(Dense): wants a pair (init_fun, apply_fun) of stax, got Dense":
        lambda: interop.from_stax(stax.Dense),
    "at (from_linen(<Dense>)): wants a layer that can stream, got one of linen; write it with "
    "layers of diffprog: nothing tells whether this one mixes time steps":
        lambda: dp.serial(at=interop.from_linen(nn.Dense(4))).start(
            {"at": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}, {}, X, length=2),
    "wants a layer without state, got state mean, var; use net.init and net.apply: pairs of stax "
    "have no state":
        lambda: interop.to_stax(dp.batch_norm())[0](KEY, (2, 4)),
}
