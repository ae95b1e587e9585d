"""A 3-D convolution says in which direction a digit moves; frames one by one do not tell.

    python examples/course/video_direction.py [--short] [--seed N] [--out FOLDER]

A video is an image with one more axis, time. A digit moves one pixel a frame, up, down, left or
right, from a random place: a single frame holds no direction. A kernel of 3 x 3 x 3 compares
neighbouring frames. A kernel of 1 x 3 x 3, in the same net, sees each frame alone, and the mean
over time forgets their order.
"""

from __future__ import annotations

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from matplotlib.animation import FuncAnimation
from style import BLUE, DIVERGING, ORANGE, bare, figure

import diffprog as dp

FRAMES, SIDE = 4, 12
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
REVERSED = np.array([1, 0, 3, 2])


def videos(images: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Videos (N, FRAMES, SIDE, SIDE, 1) of the digits, and their directions."""
    labels = rng.integers(0, 4, len(images)).astype(np.int32)
    x = np.zeros((len(images), FRAMES, SIDE, SIDE, 1), np.float32)
    for image, label, video in zip(images, labels, x, strict=True):
        step = np.array(list(DIRECTIONS.values())[label])
        places = step * np.arange(FRAMES)[:, None]                     # (FRAMES, 2), from 0
        places += rng.integers(-places.min(0), SIDE - 8 - places.max(0) + 1)
        for frame, (row, column) in zip(video, places, strict=True):
            frame[row : row + 8, column : column + 8] = image
    return x, labels


def classifier(time: int) -> dp.Layer:
    """A convolution over `time` frames at once, the mean over all places, a linear layer."""
    return dp.serial(
        first=dp.conv(16, (time, 3, 3)), relu=jax.nn.relu,
        pool=dp.global_avg_pool(dims=3), head=dp.linear(4))


def main(experiment: Experiment) -> None:
    """Train both nets, play the videos backwards, and draw the first kernels."""
    digits = data.digits(seed=experiment.seed)
    rng = experiment.rng
    x, y = videos(digits.x, rng)
    x_held_out, y_held_out = videos(digits.x_held_out, rng)
    backwards = x_held_out[:, ::-1]
    steps = experiment.pick(400, 200)

    accuracies, turned, changed, kernels, said = {}, {}, {}, {}, {}
    for name, time in (("3 x 3 x 3", 3), ("1 x 3 x 3", 1)):
        step = dp.make_step(classifier(time), dp.classification(), optax.adam(1e-2))
        fit = dp.fit(step, dp.batches((x, y), 32, seed=experiment.seed), steps=steps,
                     key=experiment.key, progress=False)
        forth, back = (np.asarray(dp.predict(step.net, fit.state.params, jnp.asarray(video),
                                             batch_size=360)) for video in (x_held_out, backwards))
        said[name] = forth.argmax(-1)
        accuracies[name] = experiment.record(f"kernels of {name}: held-out accuracy in percent",
                                             100 * (said[name] == y_held_out).mean())
        turned[name] = experiment.record(
            f"kernels of {name}: videos backwards that are given the opposite direction, percent",
            100 * (back.argmax(-1) == REVERSED[said[name]]).mean())
        changed[name] = experiment.record(f"kernels of {name}: largest change of a logit backwards",
                                          abs(forth - back).max())
        kernels[name] = np.asarray(fit.state.params["first"]["kernel"])  # (time, 3, 3, 1, 8)

    experiment.claim("Kernels of 3 x 3 x 3 find over 90 % of the directions, kernels of 1 x 3 x 3 "
                     "at most 60 %.", accuracies["3 x 3 x 3"] > 90 and accuracies["1 x 3 x 3"] < 60)
    experiment.claim("Played backwards, over 90 % of the videos are given the opposite direction.",
                     turned["3 x 3 x 3"] > 90)
    experiment.claim("The net that sees frames alone does not notice: no logit changes by 1e-4.",
                     changed["1 x 3 x 3"] < 1e-4)

    shown = [int(np.argmax(y_held_out == k)) for k in range(4)]
    played = figure(6.4, 2.1, "In which direction?")
    images = []
    for axes, i in zip(played.subplots(1, 4), shown, strict=True):
        images.append(axes.imshow(x_held_out[i, 0, ..., 0], cmap="gray_r", vmin=0, vmax=1))
        bare(axes)
        axes.set_title(f"net: {list(DIRECTIONS)[said['3 x 3 x 3'][i]]}")

    def draw(frame: int) -> list:
        for image, i in zip(images, shown, strict=True):
            image.set_data(x_held_out[i, frame, ..., 0])
        return images

    experiment.save(FuncAnimation(played, draw, frames=FRAMES), "video_direction",
                    "Four held-out videos, and what the net with kernels of 3 x 3 x 3 says.")

    drawn = figure(11, 3.4, "Time in the kernel")
    left, right = np.asarray(drawn.subfigures(1, 2, width_ratios=(1, 1.6)))
    axes = left.subplots()
    for k, accuracy in enumerate(accuracies.values()):
        axes.bar(k, accuracy, color=(BLUE, ORANGE)[k], width=0.6)
        axes.text(k, accuracy + 2.5, f"{accuracy:.1f}", ha="center")
    axes.axhline(25, color="0.5", ls=":", label="chance")
    axes.set(title="Directions found", ylabel="held-out accuracy in percent", ylim=(0, 115),
             xticks=range(2), xticklabels=accuracies)
    axes.legend(loc="upper right")
    kernel = kernels["3 x 3 x 3"][..., 0, :]
    right.suptitle("Kernels of 3 x 3 x 3: before, now and after (red positive, blue negative)",
                   size=11)
    largest = abs(kernel).max()
    for row, name in zip(range(3), ("t - 1", "t", "t + 1"), strict=True):
        for k in range(6):
            axes = right.add_subplot(3, 6, 6 * row + k + 1)
            axes.imshow(kernel[row, :, :, k], cmap=DIVERGING, vmin=-largest, vmax=largest)
            bare(axes)
            if k == 0:
                axes.set_ylabel(name)
    experiment.save(drawn, "kernels", "Accuracy of both nets, and six learned kernels in time.")


if __name__ == "__main__":
    run(main)
