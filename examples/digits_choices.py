"""Compare hyperparameters for examples/digits.py, and evaluate the chosen ones.

    python examples/digits_choices.py            # compare choices; about 45 minutes on two cores
    python examples/digits_choices.py --final    # seeds 0 to 4 on the held-out images

Choices are compared on 287 of the 1,437 training images, over five splits and seeds, without the
held-out images; those of the ViT were compared on the first split only. `--final` trains the chosen
networks on all training images, once for each seed, and evaluates them on the held-out images.
"""

from __future__ import annotations

import argparse

import numpy as np
from digits import MODELS, Images, convnet, load, mlp, resnet, train, vit
from sklearn.model_selection import train_test_split

import diffprog as dp

SEEDS = range(5)
# name -> (network, training steps, largest shift of an image in pixels)
CHOICES = {
    "convnet 32, 800 steps, shift 1": (convnet(), 800, 1),
    "convnet 32, 800 steps, no shift": (convnet(), 800, 0),
    "convnet 16, 800 steps, shift 1": (convnet(16), 800, 1),
    "convnet 32, 400 steps, shift 1": (convnet(), 400, 1),
    "convnet 32, 1600 steps, shift 1": (convnet(), 1600, 1),
    "convnet 32, 800 steps, shift 1, no dropout": (convnet(dropout=0.0), 800, 1),
    "mlp 256, 800 steps, no shift": (mlp(), 800, 0),
    "mlp 256, 800 steps, shift 1": (mlp(), 800, 1),
    "mlp 512, 800 steps, no shift": (mlp(512), 800, 0),
    "mlp 256, 1600 steps, no shift": (mlp(), 1600, 0),
    "resnet 18, width 16, 800 steps, shift 1": (resnet(), 800, 1),
    "resnet 18, width 16, 400 steps, shift 1": (resnet(), 400, 1),
    "resnet 18, width 8, 800 steps, shift 1": (resnet(8), 800, 1),
    "vit 48, 800 steps, shift 1": (vit(), 800, 1),
    "vit 48, 2400 steps, shift 1": (vit(), 2400, 1),
    "vit 48, 3200 steps, shift 1": (vit(), 3200, 1),
    "vit 64, 1600 steps, shift 1": (vit(64), 1600, 1),
    "vit 48, 800 steps, shift 1, positions 0.02": (vit(position_std=0.02), 800, 1),
}


def measure(
    net: dp.Layer, steps: int, max_shift: int, seed: int, training: Images, held_out: Images
) -> float:
    """Accuracy in percent on `held_out` after training on `training`."""
    step, fit = train(net, training, steps, max_shift, seed, log_every=steps, progress=False)
    return 100 * dp.evaluate(step, fit.state, [held_out])["accuracy"]


def main() -> None:
    """Print a line for each choice, or for each final network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--final", action="store_true", help="evaluate the chosen networks")
    final = parser.parse_args().final

    (x, y), held_out = load()
    chosen = {name: (make(), steps, max_shift)
              for name, (make, steps, max_shift, _) in MODELS.items()}
    for name, choice in (chosen if final else CHOICES).items():
        accuracies = []
        for seed in SEEDS:
            training, test_images = (x, y), held_out
            if not final:
                a, b, c, d = train_test_split(x, y, test_size=287, random_state=seed, stratify=y)
                training, test_images = (a, c), (b, d)
            accuracies.append(measure(*choice, seed, training, test_images))
        each = " ".join(f"{percent:.1f}" for percent in accuracies)
        mean, worst = np.mean(accuracies), min(accuracies)
        print(f"{name:43s} mean {mean:.2f} %, worst {worst:.2f} %  ({each})", flush=True)


if __name__ == "__main__":
    main()
