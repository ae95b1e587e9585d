"""What the observers of a run, its folder and pictures refuse, and results over seeds."""

import pathlib
import tempfile

import jax.numpy as jnp

import diffprog as dp


def logged(metrics):
    folder = pathlib.Path(tempfile.mkdtemp())
    return lambda: dp.runtime.jsonl(folder / "log")(1, None, metrics)


def file_in_the_way():
    with tempfile.NamedTemporaryFile() as file:
        dp.runtime.Run(file.name, {})


def other_settings():
    folder = tempfile.mkdtemp()
    dp.runtime.Run(folder, {"rate": 0.1})
    dp.runtime.Run(folder, {"rate": 0.2})


EXAMPLES = {
    "wants a number as the metric confusion, got float32[3,3]; take its mean, or leave it out":
        logged({"confusion": jnp.ones((3, 3))}),
    "wants flops as a positive number, got 0; pass the number of one step, or leave it out":
        lambda: dp.runtime.rates(flops=0),
    "wants a folder for a run, got the file ...": file_in_the_way,
    'wants settings.json as this folder has it, "rate": 0.1, got "rate": 0.2; name another '
    "folder: this one belongs to another run": other_settings,
    "wants a history with losses, got metrics accuracy, step; pass the history of a Fit, or the "
    "lines of a log":
        lambda: dp.runtime.plot_history([{"step": 1, "accuracy": 0.5}], "losses.png"),
    "wants results of at least 2 seeds, on the first axis, got {loss: float32[1,9]}; pass a list "
    "with a result per seed, or arrays with an axis of seeds":
        lambda: dp.training.over_seeds({"loss": jnp.ones((1, 9))}),
    "wants results of one form, as {loss: 0.5}, got {accuracy: 0.9}; keep what all seeds have: "
    "the same metrics, at the same steps":
        lambda: dp.training.over_seeds([{"loss": 0.5}, {"accuracy": 0.9}]),
}
