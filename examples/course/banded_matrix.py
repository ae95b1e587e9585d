"""A 1-D convolution is a matrix: banded, and with the same weights in each row.

    python examples/course/banded_matrix.py [--short] [--seed N] [--out FOLDER]

The matrix is drawn by differentiation, as the Jacobian of the layer. Layers compute
y_i = sum_j w_j x_(i+j), the cross-correlation; the convolution of mathematics is
y_i = sum_j w_j x_(i-j), with the kernel flipped. A stride leaves rows out, a dilation spreads the
band, circular padding wraps it around, and its transpose is the transposed convolution.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from experiment import Experiment, run
from style import DIVERGING, figure

import diffprog as dp

LENGTH = 12
W = jnp.array([-1.0, 0.5, 2.0])  # differs from its reverse, so that a flip is seen


def matrix(net: dp.Layer, params: dict, length: int = LENGTH) -> np.ndarray:
    """The Jacobian dy/dx of a net from (1, length, 1) to (1, length', 1): (length', length)."""
    return np.asarray(jax.jacobian(lambda x: net(params, x[None, :, None])[0, :, 0])(
        jnp.zeros(length)))


def main(experiment: Experiment) -> None:
    """Draw the Jacobians of six linear layers, and compare them with NumPy."""
    params = {"kernel": W[:, None, None]}                              # (size, channels, features)
    flipped = {"kernel": W[::-1, None, None]}
    layers = {
        "cross-correlation: $y_i = \\sum_j w_j\\, x_{i+j}$": (dp.conv(1, 3, dims=1, bias=False),
                                                              params),
        "convolution: $y_i = \\sum_j w_j\\, x_{i-j}$": (dp.conv(1, 3, dims=1, bias=False), flipped),
        "circular padding": (dp.conv(1, 3, dims=1, bias=False, padding_mode="circular"), params),
        "stride 2": (dp.conv(1, 3, dims=1, bias=False, stride=2, padding=1), params),
        "dilation 3": (dp.conv(1, 3, dims=1, bias=False, dilation=3), params),
        "a dense layer": (dp.linear(LENGTH, bias=False),
                          dp.linear(LENGTH, bias=False).init(experiment.key, jnp.ones(LENGTH))[0]),
    }
    found = {}
    drawn = figure(10.5, 7.4, "Six layers of 12 inputs, each drawn as its matrix dy/dx")
    for axes, (name, (layer, of_layer)) in zip(drawn.subplots(2, 3).flat, layers.items(),
                                               strict=True):
        if name == "a dense layer":
            found[name] = np.asarray(jax.jacobian(lambda x, f=layer, p=of_layer: f(p, x))(
                jnp.zeros(LENGTH)))
        else:
            found[name] = matrix(layer, of_layer)
        axes.imshow(found[name], cmap=DIVERGING, vmin=-2, vmax=2)
        weights = len(np.unique(found[name][found[name] != 0].round(6)))
        axes.set(title=name, xlabel=f"input; {weights} different weights", ylabel="output",
                 xticks=range(0, LENGTH, 2), yticks=range(0, len(found[name]), 2))
        axes.grid(False)
    drawn.colorbar(drawn.axes[0].images[0], ax=drawn.axes, shrink=0.6, label="weight")
    experiment.save(drawn, "banded_matrix", "Cross-correlation, convolution, circular padding, "
                    "stride, dilation and a dense layer as matrices.")

    correlation, convolution, circular, strided, _, dense = found.values()
    x = experiment.rng.normal(size=LENGTH).astype(np.float32)
    w = np.asarray(W)
    errors = {
        "cross-correlation and np.correlate": correlation @ x - np.correlate(x, w, "same"),
        "convolution and np.convolve": convolution @ x - np.convolve(x, w, "same"),
        "convolution and the transposed matrix": convolution - correlation.T,
        "stride 2 and every other row": strided - correlation[::2],
    }
    for name, error in errors.items():
        experiment.record(f"largest difference of {name}", abs(error).max())
    experiment.claim("The layer is np.correlate, and with a flipped kernel np.convolve, within "
                     "1e-5.", max(abs(errors[name]).max() for name in list(errors)[:2]) < 1e-5)
    experiment.claim("The flipped kernel transposes the matrix; a stride of 2 takes every other "
                     "row.", all(abs(errors[name]).max() < 1e-6 for name in list(errors)[2:]))

    transposed = dp.conv_transpose(1, 3, dims=1, bias=False, stride=2, padding=((1, 0),))
    error = abs(matrix(transposed, params, len(strided)) - strided.T).max()
    experiment.record("largest difference of a transposed convolution and the transpose", error)
    experiment.claim("conv_transpose has the transposed matrix of a conv with the same options.",
                     error < 1e-6)

    # A circulant matrix multiplies each wave by a number: the Fourier transform of its first row.
    spectrum = np.fft.fft(circular[0].astype(float))
    of_matrix = np.linalg.eigvals(circular.astype(float))
    distance = abs(spectrum[:, None] - of_matrix).min(1).max()
    experiment.record("largest distance of the Fourier transform to an eigenvalue", distance)
    experiment.claim("With circular padding, the eigenvalues are the Fourier transform of a row, "
                     "within 1e-6.", distance < 1e-6)

    shared, free = (len(np.unique(a[a != 0])) for a in (convolution, dense))
    experiment.record("different weights of the convolution", shared)
    experiment.record("different weights of the dense layer", free)
    experiment.claim("The convolution has 3 different weights, the dense layer 144.",
                     (shared, free) == (3, 144))


if __name__ == "__main__":
    run(main)
