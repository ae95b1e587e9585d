"""What each head of a trained translator attends to, and what the others do when one is removed.

    python examples/course/attention_maps.py [--short] [--seed N] [--out FOLDER]

A Transformer translates dates from written formats to 1987-03-28, as in examples/translate.py. The
weights of its cross-attention are returned by the layer itself, `dp.tap(net, "**",
attention_weights=True)`. Head h is removed by zeroing its rows of the output kernel: the accuracy
falls by the work that no other head does. The other heads of the same block look where they looked
before, as they do not read it; those of the next block read its output, and look elsewhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import BLUE, ORANGE, bare, figure
from translate import END, split, text, written_dates

import diffprog as dp

HEADS, DEPTH, PATH = 4, 2, "decoder/body/blocks/cross/body"
FORMATS = (0, 4, 7, 8)  # 1987/03/28, 28-Mar-1987, March 28, 1987, Sat, 28 Mar 1987


def dates(days: np.ndarray, rng: np.random.Generator) -> tuple[list[str], dict[str, Any]]:
    """The days in random formats of the four: texts, and a batch of ids."""
    return written_dates(days, rng.choice(FORMATS, len(days)), rng)


def without(params: Any, block: int, head: int) -> Any:
    """Parameters in which one head of the cross-attention of a block adds nothing."""
    leaves = dict(dp.tree.paths(params))
    kernel = leaves[f"{PATH}/out/kernel"]  # (blocks, heads * features, width)
    size = kernel.shape[1] // HEADS
    leaves[f"{PATH}/out/kernel"] = kernel.at[block, head * size : (head + 1) * size].set(0)
    return jax.tree.unflatten(jax.tree.structure(params), [
        leaves[path] for path in dp.tree.paths(params)])


def main(experiment: Experiment) -> None:
    """Train, draw the weights by head, and remove each head."""
    net = dp.models.transformer(128, END + 1, width=experiment.pick(64, 32), depth=DEPTH,
                                heads=HEADS, hidden=128, norm_first=True)
    days, rng = split(), experiment.rng
    steps = experiment.pick(700, 120)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 4e-3), weight_decay=1e-2)
    step = dp.make_step(net, dp.text.next_token(), optimizer)
    data = (dates(rng.choice(days.training, 64), rng)[1] for _ in iter(int, 1))
    params = dp.fit(step, data, key=experiment.key, steps=steps, progress=False).state.params

    texts, held_out = dates(days.held_out[: experiment.pick(600, 200)], experiment.rng)
    side = {name: held_out[name] for name in ("source", "source_mask")}
    tapped = dp.tap(net, PATH, attention_weights=True)

    @jax.jit
    def look(params: Any, x: Any, side: Any) -> tuple[jax.Array, jax.Array]:
        """Percent of correct characters; weights (blocks, batch, heads, target, source)."""
        logits, seen = tapped(params, x[:, :-1], **side)
        return 100 * (logits.argmax(-1) == x[:, 1:]).mean(), seen[PATH]

    whole, weights = look(params, held_out["x"], side)
    experiment.record("correct characters, all heads (percent)", whole)
    left = np.zeros((DEPTH, HEADS))
    same_block, next_block = [], []
    for block, head in np.ndindex(DEPTH, HEADS):
        percent, seen = look(without(params, block, head), held_out["x"], side)
        left[block, head] = percent
        moved = np.asarray(jnp.abs(seen - weights).sum(-1).mean((1, 3))) / 2  # (blocks, heads)
        same_block.append(np.delete(moved[block], head).max())
        if block == 0:
            next_block.append(moved[1].max())
        experiment.record(f"correct characters without head {head + 1} of block {block + 1} "
                          "(percent)", percent)
    experiment.record("weights moved in the same block", max(same_block))
    experiment.record("weights moved in the next block, at most", max(next_block))

    draw(experiment, texts, held_out, np.asarray(weights))
    drawn = figure(7.5, 3, "Correct characters when one head is removed")
    axes = drawn.subplots()
    for block, color in enumerate((BLUE, ORANGE)):
        axes.bar(np.arange(HEADS) + 0.4 * block - 0.2, left[block], 0.36, color=color,
                 label=f"of block {block + 1}", hatch="" if block else "//", edgecolor="white")
    axes.axhline(float(whole), color="black", ls=":", label="all heads")
    axes.set(xticks=range(HEADS), xticklabels=[f"head {h + 1}" for h in range(HEADS)],
             ylabel="percent", ylim=(max(left.min() - 5, 0), 104))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    experiment.save(drawn, "removed", "Held-out characters that are correct without one head.")

    sums = np.asarray(weights).sum(-1)
    experiment.claim("The weights of each query sum to 1.", np.abs(sums - 1).max() < 1e-5)
    experiment.claim("Heads do different work: removing the most useful one costs more than twice "
                     "as much as removing the least useful one.",
                     whole - left.min() > 2 * (whole - left.max()))
    experiment.claim("A removed head leaves the weights of its own block as they are, and moves "
                     "those of the next.", max(same_block) < 1e-6 < 1e-3 < max(next_block))


def draw(experiment: Experiment, texts: list[str], batch: dict, weights: np.ndarray) -> None:
    """The weights of one date, by block and head."""
    chosen = next(i for i, text in enumerate(texts) if "," in text and len(text) < 18)
    source = texts[chosen]
    target = text(batch["x"][chosen]) + " "
    drawn = figure(11, 6, f"Cross-attention of each head: “{source}” is read (columns) while "
                          f"{target.strip()} is written (rows)")
    for (block, head), axes in zip(np.ndindex(DEPTH, HEADS), drawn.subplots(DEPTH, HEADS).flat,
                                   strict=True):
        axes.imshow(weights[block, chosen, head, : len(target), : len(source)], vmin=0, vmax=1,
                    aspect="auto")
        bare(axes)
        axes.set_xticks(range(len(source)), source, family="monospace", size=8)
        axes.set_yticks(range(len(target)), [*target[:-1], "end"], family="monospace", size=8)
        axes.set_title(f"block {block + 1}, head {head + 1}")
    experiment.save(drawn, "heads", "Attention weights by block and head; bright is 1, dark is 0.")


if __name__ == "__main__":
    run(main)
