"""Universal approximation: error by size, of wide, deep and infinite nets, and of two series.

    python examples/course/approximation.py [--short] [--seed N] [--out FOLDER]

Networks of one hidden layer of 10 to 10,000 random features, whose last map is fitted by least
squares to 48 points, and the network of infinite width, which is regression with their kernel
(Rahimi and Recht 2007, "Random features for large-scale kernel machines"). The partial sums of the
Fourier and Taylor series with as many coefficients are beside them; these know the function, not 48
points. Then deeper nets of 16 features and an equilibrium network, which is infinitely deep, are
trained whole by a second-order method. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, run
from jax.flatten_util import ravel_pytree
from style import AMBER, BLACK, COLORS, DASHES, PINK, figure

import diffprog as dp

jax.config.update("jax_enable_x64", True)
Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "ReLU": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sin 5x": lambda x: np.sin(5 * x), "1 / (1 + 25 x²)": lambda x: 1 / (1 + 25 * x**2),
    "|x|": np.abs}
TAYLOR: dict[str, Callable[[int], float]] = {  # the coefficient of x^k; |x| has none
    "sin 5x": lambda k: 5**k / math.factorial(k) * (0, 1, 0, -1)[k % 4],
    "1 / (1 + 25 x²)": lambda k: 5.0**k * (1, 0, -1, 0)[k % 4]}
X, FINE = np.linspace(-1, 1, 48)[:, None], np.linspace(-1, 1, 1000)[:, None]
FEATURES, SCALE = 16, 4.0  # of deep nets; of the first kernel and bias


def hidden(width: int, activation: Activation) -> dp.Layer:
    """``activation(w_i x + b_i) / sqrt(width)``, the features of x."""
    first = dp.linear(width, kernel_init=SCALE, bias_init=SCALE)
    return first >> activation >> (lambda h: h / width**0.5)


def deep(depth: int) -> dp.Layer:
    """A network of `depth` hidden layers of 16 features."""
    first = dp.linear(FEATURES, kernel_init=SCALE, bias_init=SCALE) >> jnp.tanh
    more = dp.repeat(depth - 1, dp.linear(FEATURES) >> jnp.tanh) if depth > 1 else (lambda h: h)
    return first >> more >> dp.linear(1)


def equilibrium() -> dp.Layer:
    """The infinitely deep network ``z = tanh(W z + u(x))``, linear before and after."""
    small = dp.linear(FEATURES, bias=False, kernel_init=0.5 / FEATURES**0.5)
    block = dp.parallel(small, lambda u: u) >> dp.add >> jnp.tanh
    first = dp.linear(FEATURES, kernel_init=SCALE, bias_init=SCALE)
    return first >> dp.fixed_point(block) >> dp.linear(1)


def infinite_kernels(activation: Activation, x1: Any, x2: Any) -> tuple[Any, Any]:
    """The mean of ``a(h) a(h')`` and of ``a'(h) a'(h')`` over normal w and b, for h = w x + b.

    By the trapezoidal rule for the angle of (w, b), and Gauss-Legendre's for its length.
    """
    nodes, weights = np.polynomial.legendre.leggauss(48)
    radius = 4.5 * (nodes + 1)  # from 0 to 9, beyond which the density is below 1e-17
    angle = 2 * np.pi * np.arange(400) / 400
    w, b = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)])[:, None]
    weight = np.repeat(4.5 * weights * radius * np.exp(-(radius**2) / 2) / 400, 400)

    def mean(f: Activation) -> np.ndarray:
        one, other = (np.asarray(f(jnp.asarray(SCALE * (x * w.ravel() + b.ravel()))))
                      for x in (x1, x2))
        return (one * weight) @ other.T

    return mean(activation), mean(jnp.vectorize(jax.grad(lambda h: activation(h))))


def solved(design: Any, at: Any, y: Any) -> np.ndarray:
    """The least-squares fit of y with a constant, at other points; singular values are cut."""
    design, at = (np.concatenate([a, np.ones((len(a), 1))], 1) for a in (design, at))
    return at @ np.linalg.lstsq(design, y, rcond=1e-10)[0]


def trained(net: dp.Layer, y: np.ndarray, steps: int, key: jax.Array) -> np.ndarray:
    """The fit of a whole net by Levenberg and Marquardt's method, at the fine points.

    A step solves the problem that is linear in the parameters, near the present ones. The damping
    falls after a step that helped, and rises after one that did not, which is not taken.
    """
    flat, tree = ravel_pytree(net.init(key, X)[0])

    def f(flat: jax.Array, x: Any = X) -> jax.Array:
        return net(tree(flat), x)[..., 0]

    def step(now: Any, _: Any) -> tuple[Any, None]:
        flat, damping = now
        jacobian, rest = jax.vmap(jax.grad(f), (None, 0))(flat, X), y - f(flat)
        kernel = jacobian @ jacobian.T
        damped = kernel + damping * jnp.trace(kernel) / len(X) * jnp.eye(len(X))
        tried = flat + jacobian.T @ jnp.linalg.solve(damped, rest)
        better = jnp.sum((y - f(tried)) ** 2) < jnp.sum(rest**2)
        return (jnp.where(better, tried, flat),
                jnp.clip(jnp.where(better, damping / 4, damping * 4), 1e-13, 1e3)), None

    (flat, _), _ = jax.jit(lambda flat: jax.lax.scan(step, (flat, 0.01), length=steps))(flat)
    return np.asarray(f(flat, FINE))


def fourier(f: Callable[[Any], Any], count: int) -> np.ndarray:
    """The partial sum of `count` coefficients, with period 2, at the fine points."""
    grid = (np.arange(2**14) + 0.5) / 2**13 - 1
    orders = np.pi * np.arange(count // 2 + 1)
    even, odd = (2 * (g(orders[:, None] * grid) * f(grid)).mean(1) for g in (np.cos, np.sin))
    even[0] /= 2
    return even @ np.cos(orders[:, None] * FINE[:, 0]) + odd @ np.sin(orders[:, None] * FINE[:, 0])


def rms(error: Any) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(error))))


def geometric(errors: list[float]) -> float:
    """Their geometric mean."""
    return float(np.exp(np.log(errors).mean()))


def main(experiment: Experiment) -> None:
    """Fit wide nets, series, the infinite width, and deep nets; compare kernels."""
    widths = experiment.pick((10, 30, 100, 300, 1000, 3000, 10000), (10, 1000))
    keys = jax.random.split(experiment.key, experiment.pick(3, 1))
    drawn = figure(12, 4.4, "Error of networks of one random hidden layer, and of two series")
    panels = drawn.subplots(1, 3, sharey=True)
    reached: dict[tuple[str, str], list[float]] = {}
    infinite: dict[tuple[str, str], float] = {}
    for name, color, dashes in zip(ACTIVATIONS, COLORS, DASHES, strict=False):
        activation = ACTIVATIONS[name]
        kernels = [infinite_kernels(activation, x, X)[0] for x in (X, FINE)]
        for width in widths:
            net = hidden(width, activation)
            made = [net.init(key, X)[0] for key in keys]
            features = [[np.asarray(net(params, x)) for x in (X, FINE)] for params in made]
            for function, f in FUNCTIONS.items():
                errors = [rms(solved(given, at, f(X[:, 0])) - f(FINE[:, 0]))
                          for given, at in features]
                reached.setdefault((name, function), []).append(geometric(errors))
        for (function, f), axes in zip(FUNCTIONS.items(), panels, strict=True):
            infinite[name, function] = rms(solved(*kernels, y=f(X[:, 0])) - f(FINE[:, 0]))
            axes.plot(widths, reached[name, function], color=color, ls=dashes, label=name)
            axes.plot(1.6 * widths[-1], infinite[name, function], "<", color=color)
            experiment.record(f"error of width {widths[-1]:,}, {name}, {function}",
                              reached[name, function][-1])
            experiment.record(f"error of infinite width, {name}, {function}",
                              infinite[name, function])
    counts = np.array([3, 9, 31, 101, 301])
    for (function, f), axes in zip(FUNCTIONS.items(), panels, strict=True):
        series = [rms(fourier(f, count) - f(FINE[:, 0])) for count in counts]
        axes.plot(counts, series, color=AMBER, ls="-", marker="s", ms=4, label="Fourier series")
        if function in TAYLOR:
            orders = np.arange(3, 31, 3)
            sums = [rms(sum(TAYLOR[function](k) * FINE[:, 0]**k for k in range(n)) - f(FINE[:, 0]))
                    for n in orders]
            axes.plot(orders, np.clip(sums, None, 1e3), color=PINK, ls="-", marker="^", ms=4,
                      label="Taylor series")
            experiment.record(f"error of 30 Taylor coefficients, {function}", sums[-1])
        experiment.record(f"error of 101 Fourier coefficients, {function}", series[3])
        axes.set(xscale="log", yscale="log", ylim=(1e-9, 1e2), title=function,
                 xlabel="features or coefficients; ◂ infinite")
    panels[0].set(ylabel="RMS error")
    panels[1].legend(fontsize=8)
    experiment.save(drawn, "width", "Error by width, of infinite width, and of two series.")

    drawn = figure(11, 4, "Infinite width, and infinite depth")
    left, right = drawn.subplots(1, 2)
    net_widths = experiment.pick((10, 100, 1000, 10000), (10, 3000))
    apart = []
    mean, slopes = infinite_kernels(jnp.tanh, X, X)
    limit = 1 + mean + (1 + X @ X.T) * slopes  # the last bias, the last kernel, the first map
    for width in net_widths:
        net = hidden(width, jnp.tanh) >> dp.linear(1, kernel_init=1.0)
        kernel = dp.gradients.tangent_kernel(net, net.init(keys[0], X)[0], X, batch_size=48)
        kernel = np.asarray(kernel)[:, :, 0, 0]
        apart.append(experiment.record(
            f"relative distance of the tangent kernel of width {width:,} from the limit",
            np.linalg.norm(kernel - limit) / np.linalg.norm(limit)))
    left.plot(net_widths, apart, "o-", color=COLORS[0], label="one net of each width")
    left.plot(net_widths, apart[0] * np.sqrt(net_widths[0] / np.array(net_widths)), ":",
              color=BLACK, label="1 / √width")
    left.set(xscale="log", yscale="log", xlabel="width", ylabel="relative distance",
             title="Tangent kernel, from its limit")
    left.legend()

    target, depths = FUNCTIONS["sin 5x"], experiment.pick((1, 2, 4, 8), (1,))
    steps, by_depth = experiment.pick(60, 30), []
    for net in (*map(deep, depths), equilibrium()):
        errors = [rms(trained(net, target(X[:, 0]), steps, key) - target(FINE[:, 0]))
                  for key in keys]
        by_depth.append(geometric(errors))
    for depth, error in zip((*depths, "infinite"), by_depth, strict=True):
        experiment.record(f"error of depth {depth}, trained whole, sin 5x", error)
    right.bar([str(depth) for depth in depths] + ["equilibrium"], by_depth, color=COLORS[1])
    right.set(yscale="log", xlabel="hidden layers of 16 features", ylabel="RMS error",
              title="sin 5x, tanh, trained whole")
    experiment.save(drawn, "limits", "The tangent kernel by width, and the error by depth.")

    smooth = [("tanh", "sin 5x"), ("sigmoid", "sin 5x"), ("ReLU", "sin 5x")]
    experiment.claim("Wider nets approximate sin 5x better, with each activation: the widest errs "
                     "less than a fifth as much as the narrowest.",
                     all(reached[kind][-1] < reached[kind][0] / 5 for kind in smooth))
    experiment.claim("On |x| the widest net errs as the infinite one, within a factor of 3, with "
                     "each activation.",
                     all(1 / 3 < reached[name, "|x|"][-1] / infinite[name, "|x|"] < 3
                         for name in ACTIVATIONS))
    experiment.claim("The tangent kernel nears its limit with the width.", apart[-1] < apart[0] / 3)
    experiment.claim("The Taylor series of 1 / (1 + 25 x²) diverges, that of sin 5x converges.",
                     experiment.figures["error of 30 Taylor coefficients, 1 / (1 + 25 x²)"] > 1e3
                     > 1e-3 > experiment.figures["error of 30 Taylor coefficients, sin 5x"])
    experiment.claim("Deep and infinitely deep nets of 16 features approximate sin 5x within 0.1.",
                     max(by_depth) < 0.1)


if __name__ == "__main__":
    run(main)
