"""How far each position reaches: the size of dy_i/dx_j for four kinds of sequence net.

    python examples/course/reach.py [--short] [--seed N] [--out FOLDER]

Output i of a causal net depends on the inputs j <= i. The size of its derivative, ||dy_i/dx_j||,
says how much it hears of each, and how much of the gradient at i arrives at j. Untrained nets of
one width are compared on random inputs. In a recurrent net the derivative is a product of i - j
matrices; for one without an activation it is known in closed form, W U^(i-j).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, run
from matplotlib.colors import LogNorm
from style import COLORS, DASHES, figure

import diffprog as dp

WIDTH, SIZE, LAYERS = 16, 5, 2

NETS = {
    "simple RNN": dp.recurrent(dp.simple_rnn(WIDTH)),
    "LSTM": dp.recurrent(dp.lstm(WIDTH)),
    "two convolutions of five steps": dp.conv(WIDTH, SIZE, dims=1, padding="CAUSAL") ** LAYERS,
    "attention": dp.self_attention(4, causal=True),
}


def jacobian(net: dp.Layer, params: Any, x: jax.Array) -> jax.Array:
    """dy_i/dx_j for x (time, D), of shape (time, D, time, D)."""
    return jax.jacrev(lambda x: net(params, x[None])[0])(x)


@functools.partial(jax.jit, static_argnums=0)
def reach(net: dp.Layer, params: Any, x: jax.Array) -> jax.Array:
    """``||dy_i/dx_j||``, its root mean square over the inputs x (inputs, time, D)."""
    squares = jax.vmap(lambda x: jnp.square(jacobian(net, params, x)).sum((1, 3)))(x)
    return jnp.sqrt(squares.mean(0))  # (time, time)


def difference_from_product(net: dp.Layer, params: Any, x: jax.Array) -> float:
    """The largest difference of the Jacobian of a linear RNN from W U^(i-j)."""
    found = np.asarray(jax.jit(functools.partial(jacobian, net))(params, x))  # (time, D, time, D)
    product, worst = np.asarray(params["input"]["kernel"]), 0.0  # (D, D), inputs by outputs
    for distance in range(len(x)):
        ij = found[np.arange(distance, len(x)), :, np.arange(len(x) - distance)]  # (pairs, D, D)
        worst = max(worst, abs(ij - product.T).max())
        product = product @ np.asarray(params["hidden"]["kernel"])
    return float(worst)


def main(experiment: Experiment) -> None:
    """Measure and draw the derivatives of four nets, and check those of a linear RNN."""
    time = experiment.pick(48, 24)
    init_key, x_key = jax.random.split(experiment.key)
    x = jax.random.normal(x_key, (4, time, WIDTH))
    far = time - 1

    drawn = figure(10, 6.4, "Size of dy_i/dx_j in untrained causal nets")
    halves: Any = drawn.subfigures(1, 2, width_ratios=(1.25, 1))
    maps, curves = halves
    image: Any = None  # the last of them, for the colour bar
    panels, right = maps.subplots(2, 2, sharex=True, sharey=True), curves.subplots()
    last = {}
    for (name, net), axes, color, dash in zip(NETS.items(), panels.flat, COLORS, DASHES,
                                              strict=False):
        params, _ = net.init(init_key, x)
        sizes = np.asarray(reach(net, params, x))  # (time, time)
        last[name] = sizes[-1, ::-1] / sizes[-1, -2]  # of the last output, by distance
        experiment.record(f"size over 8 steps relative to 1 step, {name}", last[name][8])
        experiment.record(f"size over {far} steps relative to 1 step, {name}", last[name][-1])
        image = axes.imshow(sizes, norm=LogNorm(1e-4, 2))
        axes.set(title=name.removesuffix(" of five steps"))
        axes.grid(False)
        right.plot(last[name], color=color, ls=dash, label=name)
    maps.supxlabel("input step j", fontsize=10)
    maps.supylabel("output step i", fontsize=10)
    maps.colorbar(image, ax=panels, shrink=0.6, extend="min", label="size (white: 0)")
    right.set(yscale="log", ylim=(1e-6, 10), xlabel="distance of input from last output, steps",
              ylabel="size relative to distance 1", title="Last output")
    right.legend()
    experiment.save(drawn, "reach", "Left, output against input step; right, the last output.")

    linear = dp.recurrent(dp.simple_rnn(WIDTH, activation=jax.nn.identity))
    params, _ = linear.init(init_key, x)
    difference = experiment.record("largest difference of a linear RNN's derivative from "
                                   "W U^(i-j)", difference_from_product(linear, params, x[0]))

    behind = LAYERS * (SIZE - 1)
    conv = last["two convolutions of five steps"]
    experiment.claim("In a linear RNN dy_i/dx_j = W U^(i-j), within 1e-5.", difference < 1e-5)
    experiment.claim(f"Two convolutions of five steps reach exactly {behind} steps back.",
                     conv[behind] > 0 and not conv[behind + 1:].any())
    experiment.claim("In a simple RNN the size falls more than a hundredfold over 23 steps.",
                     last["simple RNN"][23] < 0.01)
    near, distant = np.array_split(last["attention"][1:], 2)
    ratio = experiment.record("size in the distant half relative to the near half, attention",
                              distant.mean() / near.mean())
    experiment.claim("Attention hears the distant half of the steps as loudly as the near half, "
                     "within a factor of 1.5.", 1 / 1.5 < ratio < 1.5)


if __name__ == "__main__":
    run(main)
