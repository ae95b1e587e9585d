"""Inspect two classifiers of digits: filters, feature maps, attention, and gradients by depth.

    python examples/seeing.py [--steps N] [--seed N] [--out seeing.png]

A convolutional net and a Vision Transformer are trained as in examples/digits.py, on scikit-learn's
1,797 digits without the 360 that are held out. `dp.tap` then returns the output of each layer, and
the attention weights. The picture shows first-layer filters, feature maps of one digit, the
representations of all digits at each depth, the attention of the Transformer to patches, and the
gradients of a deep net by depth, with and without residual sums (`dp.inspection.gradient_flow`).

Takes about a minute (63 s of CPU time). Expected: accuracies of 99.7 % and 98.1 % on the held-out
digits for the two nets. The last line is the accuracy of a nearest-class-mean classifier on the
representations: 90.0 % on pixels, and 90.6, 95.3, 98.1 and 99.2 % at the four depths.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from digits import Images, convnet, load, train, vit
from sklearn.decomposition import PCA
from style import plt

import diffprog as dp

HEADS, PATCHES = 4, 4  # of the Transformer: heads per layer, patches along a side of the image
DEPTHS = {"stem/relu~0": "1st convolution", "stem/max_pool~0": "2nd, pooled",
          "body/relu~0": "3rd", "body/max_pool~0": "4th, pooled"}
Depths = dict[str, np.ndarray]  # depth -> representations of images, batch axis first


def representations(net: dp.Layer, fit: dp.training.Fit, x: Any) -> Depths:
    """The representations of images by depth, from the pixels to the last pool."""
    tapped = dp.tap(dp.tap(net, "stem/*"), "body/*")
    (_, stem), body = dp.predict(tapped, fit.state.params, x, state=fit.state.state)
    found = {"pixels": x} | {name: (stem | body)[path] for path, name in DEPTHS.items()}
    return {name: np.asarray(a) for name, a in found.items()}


def nearest_mean_accuracy(
    training: Depths, held_out: Depths, y: Any, y_held_out: Any
) -> dict[str, float]:
    """Percent of the held-out digits that are nearest to the mean of their class, by depth.

    Means of the training digits. The classifier is linear and fits nothing else, so more features
    alone are no advantage.
    """
    found = {}
    for name in training:
        flat, flat_held = (a[name].reshape(len(a[name]), -1) for a in (training, held_out))
        squared = [((flat_held - flat[y == digit].mean(0)) ** 2).sum(-1) for digit in range(10)]
        found[name] = 100 * float((np.argmin(squared, 0) == y_held_out).mean())
    return found


def deep_net(wrapper: Any) -> dp.Layer:
    """Thirty blocks of a linear layer and a ReLU, each in the same wrapper."""
    block = wrapper(dp.linear(64) >> jax.nn.relu)
    return dp.flatten() >> dp.linear(64) >> dp.repeat(30, block) >> dp.linear(10)


def gradient_flows(images: Images, seed: int) -> dict[str, list[float]]:
    """The RMS of the gradient at the output of each block, at initialization."""
    found = {}
    for name, wrapper in (("plain", lambda f: f), ("residual", dp.residual),
                          ("residual, norm first", dp.pre_norm)):
        net = deep_net(wrapper)
        params, _ = net.init(jax.random.key(seed), images[0])
        flow = dp.inspection.gradient_flow(net, dp.classification(), params, images)
        found[name] = [row.gradient for row in flow.rows if row.path.endswith("]")]
    return found


def draw_maps(figure: Any, kernel: np.ndarray, depths: Depths) -> None:
    """First-layer filters, and at each depth the feature maps of one digit that vary most."""
    above, below = figure.subfigures(2, 1, height_ratios=(1, 3))
    above.suptitle("First-layer filters (red positive, blue negative)")
    for axes, i in zip(above.subplots(2, 8).flat, range(16), strict=True):
        axes.imshow(kernel[:, :, 0, i], cmap="RdBu_r", vmin=-abs(kernel).max(),
                    vmax=abs(kernel).max())
        axes.set_axis_off()
    below.suptitle("Feature maps of one digit, those with the largest variance")
    for row, (name, maps) in zip(below.subplots(len(depths), 6), depths.items(), strict=True):
        for axes in row:
            axes.set_axis_off()
        for axes, i in zip(row, np.argsort(-maps[0].std((0, 1)), kind="stable"), strict=False):
            axes.imshow(maps[0, ..., i], cmap="gray_r" if name == "pixels" else "magma")
        row[0].set_title(name, loc="left", size=9)


def draw_attention(figure: Any, x: np.ndarray, weights: np.ndarray) -> None:
    """Attention weights (depth, batch, heads, query, key) of the class token on the patches."""
    figure.suptitle("Attention of the class token of the Transformer")
    depth, count = len(weights), len(x)
    grid = figure.subplots(count * depth, HEADS + 1)
    for row, (i, layer) in zip(grid, np.ndindex(count, depth), strict=True):
        maps = weights[layer, i, :, 0, 1:].reshape(HEADS, PATCHES, PATCHES)
        row[0].imshow(x[i, ..., 0], cmap="gray_r")
        for head, axes in enumerate(row[1:]):
            axes.imshow(x[i, ..., 0], cmap="gray_r")
            axes.imshow(maps[head], cmap="inferno", vmin=0, alpha=0.7,
                        extent=(-0.5, 7.5, 7.5, -0.5))
            if i == layer == 0:
                axes.set_title(f"head {head + 1}", size=9)
        row[0].set_ylabel(f"layer {layer + 1}", size=9)
        for axes in row:
            axes.set(xticks=[], yticks=[])


def draw_flows(figure: Any, found: dict[str, list[float]]) -> None:
    """The RMS of the gradient by depth."""
    axes = figure.subplots()
    for name, sizes in found.items():
        axes.plot(range(1, len(sizes) + 1), sizes, ".-", label=name)
    axes.set(title="Gradient behind 30 untrained blocks", yscale="log",
             xlabel="block, from the input", ylabel="rms of dloss / dy")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_depths(figure: Any, depths: Depths, y: Any, percent: Any) -> None:
    """The digits in the first two principal components of each depth."""
    figure.suptitle("Held-out digits at each depth, in two principal components, and percent "
                    "nearest to the mean of their class")
    for axes, (name, maps) in zip(figure.subplots(1, len(depths)), depths.items(), strict=True):
        plane = PCA(2, random_state=0).fit_transform(maps.reshape(len(maps), -1))
        axes.scatter(*plane.T, c=y, cmap="tab10", s=8)
        for digit in range(10):
            axes.text(*np.median(plane[y == digit], 0), str(digit), weight="bold", ha="center",
                      va="center", bbox={"boxstyle": "circle,pad=0.1", "fc": "w", "alpha": 0.7})
        axes.set(title=f"{name}: {percent[name]:.1f} %", xticks=[], yticks=[])


def main() -> None:
    """Train both nets, inspect them and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("seeing.png"))
    args = parser.parse_args()
    training, held_out = load()

    net, transformer = convnet(), vit()
    _, fit = train(net, training, args.steps, 1, args.seed)
    _, transformer_fit = train(transformer, training, args.steps, 1, args.seed)
    params = transformer_fit.state.params
    for name, layer, found in (
            ("convolutional net", net, fit), ("Transformer", transformer, transformer_fit)):
        logits = dp.predict(layer, found.state.params, held_out[0], state=found.state.state)
        print(f"{name}: {100 * float(dp.metrics.accuracy(logits, jnp.asarray(held_out[1]))):.1f} %")

    figure = plt.figure(figsize=(16, 11))
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(5, 3)))
    left, middle, right = above.subfigures(1, 3, width_ratios=(6, 5, 5))
    training_depths, depths = (representations(net, fit, x) for x in (training[0], held_out[0]))
    percent = nearest_mean_accuracy(training_depths, depths, training[1], held_out[1])
    draw_maps(left, np.asarray(fit.state.params["stem"]["conv_0"]["kernel"]), depths)
    weighed = dp.tap(transformer, "**", attention_weights=True)
    _, weights = dp.predict(weighed, params, held_out[0][:2])
    draw_attention(middle, held_out[0][:2], np.asarray(*weights.values()))
    draw_flows(right, sizes := gradient_flows((training[0][:256], training[1][:256]), args.seed))
    draw_depths(below, depths, held_out[1], percent)
    figure.savefig(args.out, dpi=80)

    print(f"picture: {args.out}")
    for name, size in sizes.items():
        print(f"gradient at the output of block 1 over that of block 30, {name}: "
              f"{size[0] / size[-1]:.1e}")
    print("nearest to the mean of their class: "
          + ", ".join(f"{name} {p:.1f} %" for name, p in percent.items()))


if __name__ == "__main__":
    main()
