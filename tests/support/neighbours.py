"""One network, with batch norm and dropout, in the words of five libraries, and as their layers."""

from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.example_libraries import stax

import diffprog as dp
from diffprog import interop
from diffprog.core.parameters import fold


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(2)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](self.drop(jnp.tanh(self.norm(self.layers[0](x)))))


class Haiku(hk.Module):
    """It has three modules of one name, which Haiku tells apart by where they are made."""

    def __init__(self):
        super().__init__(name="net")
        self.up = hk.Linear(5)

    def __call__(self, x, train):
        x = hk.BatchNorm(True, True, 0.9)(self.up(x), train)
        x = hk.dropout(hk.next_rng_key(), 0.5, jnp.tanh(x)) if train else jnp.tanh(x)
        return self.down(x) + hk.Linear(2)(x)

    def down(self, x):
        return hk.Linear(2)(x)


class Equinox(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 5, key=up), eqx.nn.Linear(5, 2, key=down)]
        self.norm = eqx.nn.BatchNorm(5, "batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.5)

    def __call__(self, x, state, *, key):
        x, state = self.norm(self.layers[0](x), state)
        return self.layers[1](self.drop(jnp.tanh(x), key=key)), state


def stax_net(mode):
    return stax.serial(
        stax.Dense(5), stax.Tanh, stax.FanOut(2), stax.parallel(stax.Dense(3), stax.Identity),
        stax.FanInConcat(), stax.Dropout(0.5, mode=mode), stax.Dense(2))


class Neighbour(NamedTuple):
    """A layer, and what its own library does.

    Attributes:
        layer: the adapted network.
        init: ``(key, x) -> made``, all that the library makes.
        leaves: ``(made) -> list``, the parameters in it.
        apply: ``(made, x, key, train) -> y``.
        paths: of parameters and state, as the layer names them.
    """

    layer: dp.Layer
    init: Any
    leaves: Any
    apply: Any
    paths: str


def linen_apply(variables, x, key, train):
    rngs = {"dropout": fold(key, "dropout")}
    return Linen().apply(variables, x, train, rngs=rngs, mutable=["batch_stats"])[0]


def nnx_apply(net, x, key, train):
    net.train() if train else net.eval()
    net.drop.rngs.key[...] = fold(key, "drop/rngs/key")
    net.drop.rngs.count[...] = jnp.zeros((), jnp.uint32)
    return net(x)


def haiku_apply(trees, x, key, train):
    # Its averages begin as those of x, of which the init of a layer knows the shape alone.
    params, state = trees[0], jax.tree.map(jnp.zeros_like, trees[1])
    return transformed.apply(params, state, key, x, train)[0]


def equinox_apply(made, x, key, train):
    net, state = made
    net = eqx.nn.inference_mode(net, value=not train)
    run = jax.vmap(lambda x, key: net(x, state, key=key), out_axes=(0, None), axis_name="batch")
    return run(x, jax.random.split(key, len(x)))[0]


def stax_apply(params, x, key, train):
    return stax_net("train" if train else "test")[1](params, x, rng=key)


transformed = hk.transform_with_state(lambda x, train: Haiku()(x, train))

NEIGHBOURS = {
    "linen": Neighbour(
        interop.from_linen(Linen(), call=lambda net, x, train: net(x, train), streams=["dropout"]),
        lambda key, x: Linen().init(key, x, False), lambda made: jax.tree.leaves(made["params"]),
        linen_apply,
        "BatchNorm_0/bias BatchNorm_0/scale Dense_0/bias Dense_0/kernel Dense_1/bias "
        "Dense_1/kernel | batch_stats/BatchNorm_0/mean batch_stats/BatchNorm_0/var"),
    "nnx": Neighbour(
        interop.from_nnx(lambda rngs: Nnx(rngs)), lambda key, x: Nnx(nnx.Rngs(key)),
        lambda made: jax.tree.leaves(nnx.state(made, nnx.Param)), nnx_apply,
        "layers/0/bias layers/0/kernel layers/1/bias layers/1/kernel norm/bias norm/scale | "
        "norm/mean norm/var"),
    "haiku": Neighbour(
        interop.from_haiku(transformed, call=lambda f, x, train: f(x, train), random=True),
        lambda key, x: transformed.init(key, x, True), lambda made: jax.tree.leaves(made[0]),
        haiku_apply,
        "net/batch_norm/offset net/batch_norm/scale net/down()/linear/b net/down()/linear/w "
        "net/init()/linear/b net/init()/linear/w net/linear/b net/linear/w | " + " ".join(
            f"net/batch_norm/init()/{kind}_ema/{leaf}"
            for kind in ("mean", "var") for leaf in ("average", "counter", "hidden"))),
    "equinox": Neighbour(
        interop.from_equinox(eqx.nn.make_with_state(Equinox), random=True),
        lambda key, x: eqx.nn.make_with_state(Equinox)(key),
        lambda made: jax.tree.leaves(eqx.filter(made[0], eqx.is_inexact_array)), equinox_apply,
        "layers/0/bias layers/0/weight layers/1/bias layers/1/weight norm/bias norm/weight | "
        "norm/batch_counter norm/batch_state_index/0 norm/batch_state_index/1"),
    "stax": Neighbour(
        interop.from_stax(stax_net("test"), training=stax_net("train")),
        lambda key, x: stax_net("test")[0](key, x.shape)[1], jax.tree.leaves, stax_apply,
        "0/0 0/1 3/0/0 3/0/1 6/0 6/1 |"),
}

# One affine map of each, with no state and nothing random.
AFFINE = {
    "linen": interop.from_linen(nn.Dense(4)),
    "nnx": interop.from_nnx(lambda rngs: nnx.Linear(4, 4, rngs=rngs)),
    "haiku": interop.from_haiku(hk.transform(lambda x: hk.Linear(4)(x))),
    "equinox": interop.from_equinox(lambda key: eqx.nn.Linear(4, 4, key=key)),
    "stax": interop.from_stax(stax.Dense(4)),
}
