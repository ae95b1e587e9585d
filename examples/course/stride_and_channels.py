"""What a stride and more channels cost, and what they buy: FLOPs, receptive field and accuracy.

    python examples/course/stride_and_channels.py [--short] [--seed N] [--out FOLDER]

Three convolutions and a mean over all places, in five variants. A stride of 2 leaves a quarter of
the places, so the layers after it cost a quarter, and a step there is two pixels, so the receptive
field grows faster. Doubled channels cost four times as much between two such layers. Both at once
keep the cost of a layer: so ConvNets are built. Costs and fields are read off `dp.summary`.
"""

from __future__ import annotations

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from style import COLORS, figure

import diffprog as dp

# name -> (strides, channels) of the three convolutions
VARIANTS = {
    "stride 1": ((1, 1, 1), (8, 8, 8)),
    "stride 2": ((1, 2, 2), (8, 8, 8)),
    "stride 1, doubled": ((1, 1, 1), (8, 16, 32)),
    "stride 2, doubled": ((1, 2, 2), (8, 16, 32)),
    "stride 2 at once": ((2, 2, 2), (8, 16, 32)),
}


def convnet(strides: tuple[int, ...], channels: tuple[int, ...]) -> dp.Layer:
    """Convolutions of 3 x 3 with ReLU, the mean over all places, and a linear layer."""
    layers = []
    for stride, features in zip(strides, channels, strict=True):
        layers += [dp.conv(features, 3, stride=stride), jax.nn.relu]
    return dp.serial(body=dp.serial(*layers), pool=dp.global_avg_pool(), head=dp.linear(10))


def main(experiment: Experiment) -> None:
    """Fill the table: one row for each variant."""
    digits = data.digits(seed=experiment.seed)
    # Sixteen pixels a side: there is something to stride over.
    x, x_held_out = (np.asarray(jax.image.resize(jnp.asarray(images), (len(images), 16, 16, 1),
                                                 "linear"))
                     for images in (digits.x, digits.x_held_out))
    variants = experiment.pick(list(VARIANTS), ["stride 1", "stride 2", "stride 2, doubled"])
    table = {}
    for name in variants:
        net = convnet(*VARIANTS[name])
        summary = dp.summary(net, x[:1])
        convolutions = [row for row in summary.rows if row.layer.name == "conv"]
        field = convolutions[-1].field
        assert field is not None
        step = dp.make_step(net, dp.classification(), optax.adam(5e-3))
        fit = dp.fit(step, dp.batches((x, digits.y), 50, seed=experiment.seed),
                     steps=experiment.pick(500, 100), key=experiment.key, progress=False)
        found = dp.evaluate(step, fit.state, [(x_held_out, digits.y_held_out)])
        table[name] = {"thousand FLOPs": summary.flops / 1000, "parameters": summary.parameters,
                       "receptive field in pixels": field.size[0],
                       "held-out accuracy in percent": 100 * found["accuracy"],
                       "layers": [row.flops / 1000 for row in convolutions]}
        for figure_name, value in table[name].items():
            if figure_name != "layers":
                experiment.record(f"{name}: {figure_name}", value)

    drawn = figure(11, 4, "Stride and channels: what a ConvNet costs, sees and reaches")
    left, right = drawn.subplots(1, 2, width_ratios=(1, 1.4))
    below = np.zeros(len(table))
    for k in range(3):
        costs = np.array([row["layers"][k] for row in table.values()])
        left.barh(list(table), costs, left=below, color=COLORS[k], label=f"convolution {k + 1}")
        below += costs
    left.invert_yaxis()
    left.set(title="Cost by layer", xlabel="thousand FLOPs an image")
    left.legend()
    right.set_axis_off()
    right.set_title("The table")
    cells = [[f"{row['thousand FLOPs']:,.0f}", f"{row['parameters']:,}",
              f"{row['receptive field in pixels']} x {row['receptive field in pixels']}",
              f"{row['held-out accuracy in percent']:.1f} %"] for row in table.values()]
    shown = right.table(cells, rowLabels=list(table), loc="center", cellLoc="right",
                        edges="horizontal", colLabels=[
                            "thousand\nFLOPs", "para-\nmeters", "receptive\nfield",
                            "held-out\naccuracy"])
    shown.scale(1, 2.4)
    shown.auto_set_font_size(False)
    shown.set_fontsize(9)
    experiment.save(drawn, "stride_and_channels", "Cost by layer, and the table of cost, "
                    "parameters, receptive field and accuracy.")

    one, two, both = (table[name] for name in ("stride 1", "stride 2", "stride 2, doubled"))
    experiment.claim("A stride of 2 divides the cost of a convolution by about four, and keeps "
                     "its parameters.", 3.3 < one["layers"][1] / two["layers"][1] < 4.7
                     and one["parameters"] == two["parameters"])
    experiment.claim("With stride 2 and doubled channels the last convolution costs as much as "
                     "the one before, within a fifth.",
                     0.8 < both["layers"][2] / both["layers"][1] < 1.25)
    experiment.claim("Strides widen the receptive field: 9 x 9 in place of 7 x 7.",
                     (one["receptive field in pixels"], two["receptive field in pixels"])
                     == (7, 9))
    experiment.claim("With both, the net costs less than the narrow net of stride 1, and is more "
                     "accurate after as many steps.", both["thousand FLOPs"] < one["thousand FLOPs"]
                     and both["held-out accuracy in percent"]
                     > one["held-out accuracy in percent"] + 1)


if __name__ == "__main__":
    run(main)
