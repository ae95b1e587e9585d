"""The look of all pictures: legible on light and dark pages, in colours for everyone.

A picture has a light background of its own, so that a dark page changes nothing. The colours are
those of Okabe and Ito (2008, jfly.uni-koeln.de/color), which people with any kind of colour vision
can tell apart; lines also differ in dashes.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # draw files, not windows
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#1A1A1A"
COLORS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK)
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"  # colour maps of amounts, and of signed values
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))

plt.rcParams.update({
    "figure.facecolor": "#FBFAF7", "axes.facecolor": "#FFFFFF", "savefig.facecolor": "#FBFAF7",
    "figure.constrained_layout.use": True, "savefig.dpi": 110, "figure.dpi": 110,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "figure.titlesize": 13, "figure.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "image.cmap": SEQUENTIAL,
    "text.color": BLACK, "axes.labelcolor": BLACK, "xtick.color": BLACK, "ytick.color": BLACK,
    "legend.frameon": False, "lines.linewidth": 1.8,
    "axes.prop_cycle": cycler(color=COLORS, linestyle=DASHES),
})


def figure(width: float = 9, height: float = 4, title: str = "") -> Figure:
    """An empty figure, in inches."""
    made = plt.figure(figsize=(width, height))
    if title:
        made.suptitle(title, x=0.01, ha="left")
    return made


def bare(axes) -> None:
    """Hide the ticks and the frame of axes that show an image."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
