"""How the choices in examples/digits.py were made, and what they came to.

    python examples/digits_choices.py            # compare choices; about 45 minutes on two cores
    python examples/digits_choices.py --final    # seeds 0 to 4 on the held-out images

Choices are compared on 287 of the 1,437 training images, over five splits and seeds; the held-out
images take no part. Those of the ViT have been compared on the first split alone. `--final` trains
the chosen networks on all training images and measures them on the held-out ones, once for each
seed.
"""

from __future__ import annotations

import argparse

import numpy as np
from digits import MODELS, Images, convnet, load, mlp, resnet, train, vit
from sklearn.model_selection import train_test_split

import diffprog as dp

SEEDS = range(5)
# name -> (network, steps, reach)
CHOICES = {
    "convnet 32, 800 steps, shift 1": (convnet(), 800, 1),
    "convnet 32, 800 steps, no shift": (convnet(), 800, 0),
    "convnet 16, 800 steps, shift 1": (convnet(16), 800, 1),
    "convnet 32, 400 steps, shift 1": (convnet(), 400, 1),
    "convnet 32, 1600 steps, shift 1": (convnet(), 1600, 1),
    "convnet 32, 800 steps, shift 1, no dropout": (convnet(rate=0.0), 800, 1),
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
    "vit 48, 800 steps, shift 1, positions 0.02": (vit(spread=0.02), 800, 1),
}


def measure(net: dp.Layer, steps: int, reach: int, seed: int, seen: Images, held: Images) -> float:
    """Accuracy in percent on `held` after training on `seen`."""
    step, fit = train(net, seen, steps, reach, seed, log_every=steps, progress=False)
    return 100 * dp.evaluate(step, fit.state, [held])["accuracy"]


def main() -> None:
    """Print a line for each choice, or for each final network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--final", action="store_true", help="measure the chosen networks")
    final = parser.parse_args().final

    (x, y), held = load()
    chosen = {name: (make(), steps, reach) for name, (make, steps, reach, _) in MODELS.items()}
    for name, choice in (chosen if final else CHOICES).items():
        found = []
        for seed in SEEDS:
            seen, apart = (x, y), held
            if not final:
                a, b, c, d = train_test_split(x, y, test_size=287, random_state=seed, stratify=y)
                seen, apart = (a, c), (b, d)
            found.append(measure(*choice, seed, seen, apart))
        each = " ".join(f"{share:.1f}" for share in found)
        print(f"{name:43s} mean {np.mean(found):.2f} %, worst {min(found):.2f} %  ({each})",
              flush=True)


if __name__ == "__main__":
    main()
