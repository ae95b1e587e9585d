"""A ConvNet goes from edges to parts to objects.

    python examples/course/hierarchy.py [--short] [--seed N] [--out FOLDER]

Images of 32 x 32 pixels show an object: one of four parts (circle, square, cross, triangle) above
another one, at random places, with noise. A ConvNet learns to name the twelve objects. Then a
linear probe looks at the features of one place at a time, and says the orientation of the edge
there, the part that it belongs to, and the object. What can be said depends on the receptive field
and on what the net has kept.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from scipy import ndimage
from style import BLUE, GREEN, ORANGE, bare, figure

import diffprog as dp

SIDE, PARTS = 32, 4
OBJECTS = list(itertools.permutations(range(PARTS), 2))                # (above, below)
STRIDES = (1, 2, 4, 8)                                                 # of the four stages


def part(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Ink of an outlined part around (0, 0); u to the right, v downwards, in pixels."""
    box = np.maximum(abs(u), abs(v))
    distance = (
        abs(np.hypot(u, v) - 5),
        abs(box - 4.5),
        np.where(box < 5, abs(abs(u) - abs(v)) / 1.4, 9),
        abs(np.maximum(v - 4, 0.89 * abs(u) - 0.45 * (v + 5))),
    )[kind]
    return np.clip(1.5 - distance, 0, 1)


def scenes(count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Images, objects, and at each pixel the ink, the part and the orientation of the edge."""
    labels = rng.integers(0, len(OBJECTS), count).astype(np.int32)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(float)
    ink, parts = np.zeros((count, SIDE, SIDE)), np.zeros((count, SIDE, SIDE), int)
    for i, label in enumerate(labels):
        for kind, row in zip(OBJECTS[label], (9, 22), strict=True):
            u = columns - 16 - rng.uniform(-5, 5)
            v = rows - row - rng.uniform(-1.5, 1.5)
            drawn = part(kind, u, v)
            parts[i][drawn > 0] = kind
            ink[i] = np.maximum(ink[i], drawn)
    # The direction of least change, from the structure tensor of the gradient.
    down, right = np.gradient(ndimage.gaussian_filter(ink, (0, 0.7, 0.7)), axis=(1, 2))
    smooth = [ndimage.gaussian_filter(a, (0, 1, 1)) for a in (right**2, down**2, right * down)]
    angle = 0.5 * np.arctan2(2 * smooth[2], smooth[0] - smooth[1])     # of the gradient
    orientation = np.round(angle / (np.pi / 4)).astype(int) % 4
    x = (ink + rng.normal(0, 0.1, ink.shape))[..., None].astype(np.float32)
    return {"x": x, "y": labels, "ink": ink, "part": parts, "edge": orientation,
            "object": np.broadcast_to(labels[:, None, None], ink.shape)}


def convnet() -> dp.Layer:
    """Four convolutions; the field of a unit is 5, 10, 20 and 40 pixels wide."""
    return dp.serial(
        stage_1=dp.conv(12, 5) >> jax.nn.relu, pool_1=dp.max_pool(2),
        stage_2=dp.conv(16, 3) >> jax.nn.relu, pool_2=dp.max_pool(2),
        stage_3=dp.conv(32, 3) >> jax.nn.relu, pool_3=dp.max_pool(2),
        stage_4=dp.conv(48, 3) >> jax.nn.relu, pool_4=dp.global_max_pool(),
        head=dp.linear(len(OBJECTS)))


def at_places(features: np.ndarray, stride: int, places: tuple[np.ndarray, ...]) -> np.ndarray:
    """The features of the units over some pixels: (pixels, channels), and a column of ones."""
    i, row, column = places
    found = features[i, row // stride, column // stride]
    return np.concatenate([found, np.ones((len(found), 1))], 1)


def probe(features: np.ndarray, labels: np.ndarray, half: int) -> float:
    """Percent right of a linear classifier, least squares on the first half, on the others."""
    targets = np.eye(labels.max() + 1)[labels]
    ridge = 1e-3 * half * np.eye(features.shape[1])
    known, unknown = features[:half], features[half:]
    weights = np.linalg.solve(known.T @ known + ridge, known.T @ targets[:half])
    return 100 * float(((unknown @ weights).argmax(1) == labels[half:]).mean())


def draw_patches(figure: Any, x: np.ndarray, maps: list[np.ndarray], fields: list[int]) -> None:
    """For four channels of each stage, the three patches that excite them most."""
    rows = figure.subplots(4, 12)
    for row, features, field, stride in zip(rows, maps, fields, STRIDES, strict=True):
        channels = np.argsort(-features.max((1, 2)).std(0))[:4]
        for k, channel in enumerate(channels):
            peaks = features[..., channel].max((1, 2))
            for axes, i in zip(row[3 * k : 3 * k + 3], np.argsort(-peaks), strict=False):
                place = np.unravel_index(features[i, ..., channel].argmax(), features.shape[1:3])
                center = [int(stride * (p + 0.5)) for p in place]
                wide = np.pad(x[i, ..., 0], 20)
                top, left = (c + 20 - field // 2 for c in center)
                axes.imshow(wide[top : top + field, left : left + field], cmap="gray_r", vmin=0,
                            vmax=1)
        for axes in row:
            bare(axes)
        row[0].set_ylabel(f"{field} x {field}")


def main(experiment: Experiment) -> None:
    """Train, probe each stage, and draw what excites its channels."""
    rng = experiment.rng
    training, tested = scenes(experiment.pick(2000, 800), rng), scenes(500, rng)
    net = convnet()
    step = dp.make_step(net, dp.classification(), optax.adam(4e-3))
    fit = dp.fit(step, dp.batches((training["x"], training["y"]), 32, seed=experiment.seed),
                 steps=experiment.pick(700, 200), key=experiment.key, progress=False)
    accuracy = 100 * dp.evaluate(step, fit.state, [(tested["x"], tested["y"])])["accuracy"]
    experiment.record("objects: held-out accuracy of the net in percent", accuracy)

    _, taps = dp.tap(net, "stage_*")(fit.state.params, jnp.asarray(tested["x"]))
    maps = [np.asarray(taps[f"stage_{k}"]) for k in (1, 2, 3, 4)]
    fields = [row.field.size[0] for row in dp.summary(net, tested["x"][:1]).rows
              if row.field and row.layer.name == "conv"]
    on_lines = np.flatnonzero(tested["ink"] > 0.7)
    chosen = np.sort(rng.choice(on_lines, 12_000, replace=False))      # by image: halves differ
    places = np.unravel_index(chosen, tested["ink"].shape)
    found = {}
    for what in ("edge", "part", "object"):
        labels = tested[what][places]
        found[what] = [probe(at_places(features, stride, places), labels, 6_000)
                       for features, stride in zip(maps, STRIDES, strict=True)]
        for field, percent in zip(fields, found[what], strict=True):
            experiment.record(f"{what}, from one unit of field {field}: percent right", percent)

    drawn = figure(12, 4.2, "From edges to parts to objects")
    left, right = np.asarray(drawn.subfigures(1, 2, width_ratios=(1, 2.1)))
    axes = left.subplots()
    for (what, percents), color, marker, dashes, chance in zip(
            found.items(), (BLUE, ORANGE, GREEN), "os^", ("-", "--", "-."), (25, 25, 8.3),
            strict=True):
        axes.plot(range(1, 5), percents, marker, ls=dashes, color=color,
                  label=f"{what} (chance {chance:g} %)")
    axes.set(title="What a probe reads at one place", ylabel="percent right", xticks=range(1, 5),
             xticklabels=[f"{k}\n{field} px" for k, field in enumerate(fields, 1)],
             xlabel="stage, and width of its field", ylim=(0, 140),
             yticks=range(0, 101, 20))
    axes.legend(loc="upper left", fontsize=9)
    right.suptitle("Patches that excite four channels of each stage most", size=11)
    draw_patches(right, tested["x"], maps, fields)
    experiment.save(drawn, "hierarchy", "What a linear probe reads off one place, by depth, and "
                    "the patches that excite channels most.")

    edge, parts, objects = found.values()
    experiment.claim("The orientation of an edge is read best in the first two stages, the part "
                     "and the object in the last two.",
                     np.argmax(edge) <= 1 and np.argmax(parts) >= 2 and np.argmax(objects) >= 2)
    experiment.claim("Objects are near chance in the first stage, and read more than 20 points "
                     "better in the last.", objects[0] < 20 and objects[3] > objects[0] + 20)
    gained = [(found[2] - found[0]) / (found[3] - found[0]) for found in (parts, objects)]
    experiment.record("part: fraction of the gain from stage 1 to 4 that stage 3 has", gained[0])
    experiment.record("object: the same", gained[1])
    experiment.claim("Parts are read earlier than objects: stage 3 has a larger fraction of the "
                     "gain, by at least 0.1.", gained[0] > gained[1] + 0.1)


if __name__ == "__main__":
    run(main)
