"""Adversarial training: classify digits under attack by FGSM and PGD.

    python examples/adversarial.py [--steps N] [--seed N] [--out adversarial.png]

Data: scikit-learn's 1,797 digits of 8x8 pixels in [0, 1]; 360 are held out. An attack may change
each pixel by up to epsilon = 0.15. The fast gradient sign method (FGSM) takes one step of this size
uphill on the loss; projected gradient descent (PGD) takes ten smaller ones. The same convolutional
network is trained twice: on the clean images, and on adversarial examples, which five steps of PGD
compute for each batch from the current parameters. The latter minimizes over parameters a maximum
over images.

Takes under a minute on two cores (51 s of CPU time). Expected: after plain training 99.2 % of the
held-out digits are classified correctly, and 15.0 % under attack by PGD (46.7 % by FGSM); after
adversarial training 98.9 %, and 74.7 % under attack (83.3 %).

Source: Goodfellow, Shlens, Szegedy 2015, arXiv:1412.6572, section 3 (FGSM); Madry et al. 2018,
arXiv:1706.06083, section 2 (PGD and the min-max problem).
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import Images, convnet, load
from style import plt

import diffprog as dp

BATCH, EPSILON = 64, 0.15  # the largest change of a pixel by an attack


class Variables(NamedTuple):
    """Parameters and running statistics of a net; an attack knows both."""

    params: Any
    state: Any


def adversarial_examples(
    net: dp.Layer, variables: Variables, x: jax.Array, y: jax.Array, *, steps: int,
    epsilon: float | jax.Array = EPSILON, key: jax.Array | None = None,
) -> jax.Array:
    """Images within `epsilon` of x, by `steps` gradient steps uphill on the loss of the net.

    One step without a key is FGSM. With a key, the start is random within `epsilon` of x.
    """
    step_size = epsilon if steps == 1 else 2.5 * epsilon / steps  # reaches the border
    noise = 0 if key is None else jax.random.uniform(key, x.shape, x.dtype, -1, 1)

    def loss(perturbed: jax.Array) -> jax.Array:
        return dp.losses.cross_entropy(net(variables.params, perturbed, state=variables.state), y,
            reduction="sum")

    def step(_: int, perturbed: jax.Array) -> jax.Array:
        changed = perturbed + step_size * jnp.sign(jax.grad(loss)(perturbed))
        return jnp.clip(jnp.clip(changed, x - epsilon, x + epsilon), 0, 1)  # pixels stay valid

    # On CPU convolutions are slow inside a loop of XLA, so the loop is unrolled.
    return jax.lax.fori_loop(0, steps, step, jnp.clip(x + epsilon * noise, 0, 1), unroll=True)


def adversarial(objective: Any, steps: int) -> Any:
    """The objective on adversarial examples in training, and on the batch itself in inference."""

    def on_attacked(
        net: dp.Layer, params: Any, state: Any, batch: Images, *, key: Any, train: bool
    ) -> Any:
        if train:
            (x, y), (start_key, key) = batch, jax.random.split(key)
            # Adversarial examples are constants: the gradient does not pass through the attack.
            variables = jax.lax.stop_gradient(Variables(params, state))
            batch = adversarial_examples(net, variables, x, y, steps=steps, key=start_key), y
        return objective(net, params, state, batch, key=key, train=train)

    return on_attacked


def train(net: dp.Layer, objective: Any, images: Images, steps: int, seed: int) -> Variables:
    """Train with AdamW and a one-cycle learning rate."""
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3), weight_decay=1e-2)
    step = dp.make_step(net, objective, optimizer)
    fit = dp.fit(step, dp.batches(images, BATCH, seed=seed), key=jax.random.key(seed), steps=steps)
    return Variables(fit.state.params, fit.state.state)


@functools.partial(jax.jit, static_argnums=0)
def under_attack(
    net: dp.Layer, variables: Variables, x: jax.Array, y: jax.Array, epsilon: float
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By attack, the perturbed images and the predicted probabilities."""
    attack = functools.partial(adversarial_examples, net, variables, x, y, epsilon=epsilon)
    perturbed = {"no attack": x, "FGSM": attack(steps=1),
                 "PGD": attack(steps=10, key=jax.random.key(0))}
    return {name: (images, jax.nn.softmax(net(variables.params, images, state=variables.state)))
            for name, images in perturbed.items()}


def accuracies(
    net: dp.Layer, variables: Variables, held_out: Images, epsilon: float
) -> dict[str, float]:
    """Accuracy in percent under each attack."""
    attacked = under_attack(net, variables, *held_out, epsilon)
    return {name: 100 * float((attacked[name][1].argmax(-1) == held_out[1]).mean())
            for name in ("no attack", "FGSM", "PGD")}


def draw(
    path: pathlib.Path, net: dp.Layer, trained: dict[str, Variables], held_out: Images
) -> None:
    """Digits, perturbations and predictions of each net; and accuracy by epsilon."""
    x, y = held_out
    attacked = {name: jax.tree.map(np.asarray, under_attack(net, variables, x, y, EPSILON))
                for name, variables in trained.items()}
    fooled = attacked["plain"]["PGD"][1].argmax(-1) != y
    fooled &= attacked["adversarial"]["no attack"][1].argmax(-1) == y
    chosen = [i for digit in range(10) for i in np.flatnonzero(fooled & (y == digit))[:1]][:7]

    figure = plt.figure(figsize=(14, 7))
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1.5, 1)))
    rows = [("clean image", x, None)]
    for name in trained:
        perturbed, p = attacked[name]["PGD"]
        rows += [(f"perturbation after\n{name} training", perturbed - x, None),
                 ("perturbed image\nand prediction", perturbed, p)]
    left.suptitle("Predictions under attack by PGD. Perturbations: red adds ink, blue removes it",
                  size=11)
    grid = left.subplots(len(rows), 7)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for row, (title, images, p) in zip(grid, rows, strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", size=9)
        for axes, i in zip(row, chosen, strict=False):
            is_change = title.startswith("perturbation")
            axes.imshow(images[i, :, :, 0], cmap="RdBu_r" if is_change else "gray_r",
                        vmin=-EPSILON if is_change else 0, vmax=EPSILON if is_change else 1)
            if p is not None:
                prediction = p[i].argmax()
                axes.set_title(f"{prediction}: {100 * p[i].max():.0f} %", size=9,
                               color="black" if prediction == y[i] else "red")
            elif not is_change:
                axes.set_title(f"true {y[i]}", size=9)

    axes = right.subplots()
    epsilons = np.linspace(0, 0.3, 5)
    for (name, variables), color in zip(trained.items(), ("C3", "C0"), strict=True):
        found = [accuracies(net, variables, held_out, float(epsilon)) for epsilon in epsilons]
        for attack, style in (("FGSM", "--"), ("PGD", "-")):
            axes.plot(epsilons, [row[attack] for row in found], f"{style}o", color=color,
                      label=f"{name} training, {attack}")
    axes.axvline(EPSILON, color="gray", lw=1)
    axes.text(EPSILON, 101, "epsilon in training", ha="center", size=9)
    axes.set(xlabel="epsilon, the largest change of a pixel (pixels are in [0, 1])", ylim=(0, 105),
             ylabel="accuracy in percent, 360 held-out digits")
    axes.legend(loc="lower left", fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train twice, attack both nets, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("adversarial.png"))
    args = parser.parse_args()

    net, (images, held_out) = convnet(width=16), load()
    plain = dp.classification()
    objectives = {"plain": plain, "adversarial": adversarial(plain, steps=5)}
    trained = {name: train(net, objective, images, args.steps, args.seed)
               for name, objective in objectives.items()}
    draw(args.out, net, trained, held_out)
    print(f"picture: {args.out}")
    for name, variables in trained.items():
        found = accuracies(net, variables, held_out, EPSILON)
        row = ", ".join(f"{attack} {percent:.1f} %" for attack, percent in found.items())
        print(f"{name} training: {row}")


if __name__ == "__main__":
    main()
