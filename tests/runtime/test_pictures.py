"""Pictures of a run."""

import json
import math
import sys

import matplotlib.figure
import pytest

import diffprog as dp

HISTORY = [{"step": 50, "loss": 2.0, "accuracy": 0.1}, {"step": 100, "loss": 1.0,
           "validation/loss": 1.5}, {"step": 120, "loss": 0.5, "validation/loss": 1.25}]


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figure that is saved."""
    found, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **options: (
        found.extend(figure.axes), save(figure, *args, **options)))
    return found


def test_losses_are_drawn_over_steps(tmp_path, axes):
    dp.runtime.plot_history(HISTORY, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
    assert curves == {"loss": [[50, 2], [100, 1], [120, 0.5]],
                      "validation/loss": [[100, 1.5], [120, 1.25]]}
    assert axes[0].get_yscale() == "log" and axes[0].get_xlabel() == "step"
    assert [text.get_text() for text in axes[0].get_legend().texts] == list(curves)


def test_losses_that_are_not_positive_have_a_linear_axis(tmp_path, axes):
    history = [{"step": 1, "g/loss": -1.0, "d/loss": 2.0}, {"step": 2, "g/loss": 0.5, "d/loss": 1}]
    dp.runtime.plot_history(history, str(tmp_path / "a.svg"))
    assert axes[0].get_yscale() == "linear" and len(axes[0].lines) == 2
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_a_log_is_a_history(tmp_path, axes):
    log = dp.runtime.jsonl(tmp_path / "log")
    log(1, None, {"loss": 0.5})
    log(2, None, {"loss": math.nan})
    with open(tmp_path / "log") as file:
        dp.runtime.plot_history([json.loads(line) for line in file], tmp_path / "a.png")
    assert axes[0].lines[0].get_xydata()[0].tolist() == [1, 0.5]


@pytest.mark.parametrize("history", [[], [{"step": 1, "accuracy": 0.5}]], ids=str)
def test_a_history_without_losses_raises(history, tmp_path):
    with pytest.raises(dp.LayerError, match="wants a history with losses"):
        dp.runtime.plot_history(history, tmp_path / "a.png")


def test_matplotlib_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'diffprog\[examples\]'"):
        dp.runtime.plot_history(HISTORY, tmp_path / "a.png")
