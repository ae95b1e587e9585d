"""Pictures of a run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffprog.core.errors import LayerError
from diffprog.core.notation import listed

__all__ = ["plot_history"]


def plot_history(history: Sequence[Mapping[str, Any]], path: str | pathlib.Path) -> None:
    """Draw losses and validation losses over steps; needs matplotlib.

    Losses are all metrics named ``loss`` or ``.../loss``, as those of the players of a game. The
    axis is logarithmic if all of them are positive.

    Args:
        history: of `Fit`, or ``[json.loads(line) for line in open(path)]`` of a log.
        path: of the picture; its ending is the format, as in ``losses.png`` or ``losses.pdf``.

    Raises:
        ImportError: matplotlib is not installed.
        LayerError: no reading has a loss.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "losses.png"
        >>> dp.runtime.plot_history([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], path)
        >>> path.exists()
        True
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'diffprog[examples]'") from error
    curves = _curves(history)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, (steps, losses) in curves.items():
        axes.plot(steps, losses, label=name)
    positive = all(loss > 0 for _, losses in curves.values() for loss in losses)
    axes.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
    axes.legend()
    figure.savefig(path, dpi=120)


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each loss, over the readings that have it."""
    names = dict.fromkeys(
        name for row in history for name in row if name.split("/")[-1] == "loss")
    if not names:
        raise LayerError("a history with losses",
                         f"metrics {listed({name for row in history for name in row})}",
                         "pass the history of a Fit, or the lines of a log")
    return {name: ([row["step"] for row in history if name in row],
                   [float(row[name]) for row in history if name in row]) for name in names}
