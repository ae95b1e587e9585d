"""Logs: JSON lines, TensorBoard, progress."""

import io
import json
import re
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from support.training_nets import KEY, examples, sgd

import diffprog as dp
from diffprog.runtime.logs import bar

HISTOGRAM = dp.runtime.Histogram([1, 0, 3], [-1.0, -0.5, 0.5, 1.0])
METRICS = {"loss": jnp.asarray(0.5, jnp.bfloat16), "accuracy": np.float64(0.25),
           "count": np.int32(7), "tokens": 3, "better": np.bool_(True),
           "histogram/kernel": HISTOGRAM}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_the_metrics_as_numbers(tmp_path):
    log = dp.runtime.jsonl(tmp_path / "log")
    log(3, None, METRICS)
    assert lines(tmp_path / "log") == [{
        "step": 3, "loss": 0.5, "accuracy": 0.25, "count": 7, "tokens": 3, "better": 1,
        "histogram/kernel": [[1, 0, 3], [-1.0, -0.5, 0.5, 1.0]]}]


def test_json_lines_are_appended_and_on_disk_at_once(tmp_path):
    path = tmp_path / "log"
    for log in map(dp.runtime.jsonl, (path, str(path))):  # the second continues the file
        for step in (1, 2):
            before = len(lines(path))
            log(step, None, {"loss": 0.5})
            assert len(lines(path)) == before + 1
    assert [line["step"] for line in lines(path)] == [1, 2, 1, 2]


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = dp.runtime.jsonl("log")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log(1, None, {})
    assert lines(tmp_path / "log") == [{"step": 1}]


def test_a_path_that_cannot_be_written_raises_before_training(tmp_path):
    with pytest.raises(FileNotFoundError):
        dp.runtime.jsonl(tmp_path / "missing" / "log")


@pytest.mark.parametrize("value", ["high", jnp.ones(3), None, 1j, [0.5]], ids=str)
def test_what_is_no_number_raises_and_is_not_written(value, tmp_path):
    log = dp.runtime.jsonl(tmp_path / "log")
    with pytest.raises(dp.LayerError, match="wants a number as the metric other"):
        log(1, None, {"loss": 0.5, "other": value})
    assert lines(tmp_path / "log") == []


def test_the_logs_of_a_loop_of_ones_own(tmp_path, capsys):
    """The loop of the module's docstring logs what `fit` logs."""
    x, y = examples()
    step, path = sgd(), tmp_path / "log"
    with dp.runtime.progress(4) as show:
        log, state = dp.runtime.jsonl(path), step.init(KEY, x)
        for number in range(1, 5):
            state, metrics = step.apply(state, (x, y))
            if number % 2 == 0:
                for observe in (log, show):
                    observe(number, state, metrics)
    fit = dp.fit(step, [(x, y)], key=KEY, steps=4, log_every=1, progress=False)
    assert lines(path) == [{"count": 12, **row} for row in fit.history[1::2]]
    assert len(capsys.readouterr().err.splitlines()) == 2


# TensorBoard.

def events(folder):
    """Tag -> (step, value) of each event in a folder, as TensorBoard reads the file's records."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    data, at = file.read_bytes(), 0
    while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        yield from ((value.tag, event.step, value) for value in event.summary.value)


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    with dp.runtime.tensorboard(tmp_path) as log:
        log(3, None, METRICS)
    found = {tag: (step, value) for tag, step, value in events(tmp_path)}
    assert found.keys() == METRICS.keys() and {step for step, _ in found.values()} == {3}
    scalars = {tag: value.simple_value for tag, (_, value) in found.items() if "/" not in tag}
    assert scalars == {"loss": 0.5, "accuracy": 0.25, "count": 7, "tokens": 3, "better": 1}
    histogram = found["histogram/kernel"][1].histo
    assert list(histogram.bucket) == [1, 0, 3] and histogram.num == 4
    assert list(histogram.bucket_limit) == [-0.5, 0.5, 1.0]
    assert (histogram.min, histogram.max) == (-1, 1)
    assert histogram.sum == pytest.approx(-0.75 + 3 * 0.75)
    assert histogram.sum_squares == pytest.approx(4 * 0.75**2)


def test_tensorboard_is_on_disk_soon(tmp_path):
    """A killed run keeps its log: the file is read before it is closed."""
    log, began = dp.runtime.tensorboard(tmp_path), time.monotonic()
    for step in (1, 2):
        log(step, None, {"loss": 0.25})
        while (found := [step for _, step, _ in events(tmp_path)]) != [*range(1, step + 1)]:
            assert time.monotonic() - began < 30, found
            time.sleep(0.02)
    log.close()
    log.close()  # closes nothing twice


# Progress.

class Terminal(io.StringIO):
    def isatty(self):
        return True


def without(monkeypatch, *packages):
    """These packages are not installed."""
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_without_a_terminal_a_reading_is_a_line(capsys, monkeypatch):
    without(monkeypatch, "tqdm")
    clock = iter([100.0, 110.0, 112.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    show = dp.runtime.progress(400, taken=1000)
    show(1050, None, {"loss": jnp.array(0.12345), "validation/loss": 2, "accuracy": 0.5})
    show(1051, None, {})
    show(1400, None, {"g/loss": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "step 50/400, loss 0.1235, validation/loss 2, 5 steps/s, 0:01:10 left",
        "step 400/400, g/loss 1, 33.3 steps/s, 0:00:00 left"]


def test_on_a_terminal_it_is_one_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with dp.runtime.progress(4) as show:
        for number in range(1, 5):
            show(number, None, {"loss": 1 / number, "accuracy": 0.5} if number % 2 == 0 else {})
    shown = terminal.getvalue()
    last = shown.split("\r")[-1]
    assert "\n" not in shown.rstrip("\n") and "4/4" in last and "loss=0.25" in last
    assert re.search(r"\[\d+:\d+<\d+:\d+, .*(step/s|s/step)", last) and "accuracy" not in shown


def test_a_bar_without_tqdm_raises_on_a_terminal_only(monkeypatch, tmp_path):
    without(monkeypatch, "tqdm", "tensorboardX")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar(3, False) as hidden:
        hidden.update(1)
    with pytest.raises(ImportError, match=r"needs tqdm: pip install 'diffprog\[train\]'"):
        dp.runtime.progress(3)
    with pytest.raises(ImportError, match=r"needs tensorboardX: pip install 'diffprog\[logs\]'"):
        dp.runtime.tensorboard(tmp_path)
    assert dp.fit(sgd(), [examples()], key=KEY, steps=1, progress=False).history


def test_metrics_without_a_loss_show_no_line(capsys):
    with dp.runtime.progress(2) as show:
        show(1, None, {"accuracy": 0.5})
    assert capsys.readouterr().err == ""
