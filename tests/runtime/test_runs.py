"""The folder of a run."""

import importlib.metadata
import json
import pathlib
import platform

import jax
import jax.numpy as jnp
import pytest
from support.refusing import refused

import diffprog as dp

SETTINGS = {"rate": 1e-3, "model": "mlp", "out": pathlib.Path("a.png"), "activation": jax.nn.relu,
            "widths": (3, 4), "dtype": jnp.bfloat16, "nothing": None}
NET = dp.serial(dp.linear(3), jax.nn.relu)


def test_a_folder_holds_settings_versions_net_and_log(tmp_path):
    run = dp.runtime.Run(str(tmp_path / "runs" / "1"), SETTINGS, NET)
    run(50, None, {"loss": jnp.array(0.5)})
    assert run.folder == tmp_path / "runs" / "1"
    assert {path.name for path in run.folder.iterdir()} == {
        "settings.json", "versions.jsonl", "net.txt", "log.jsonl"}
    settings = json.loads((run.folder / "settings.json").read_text())
    assert list(settings) == list(SETTINGS) and settings["activation"] == "jax.nn.relu"
    assert settings["rate"] == 1e-3 and settings["nothing"] is None and settings["widths"] == [3, 4]
    assert "a.png" in settings["out"] and "bfloat16" in settings["dtype"]
    versions = json.loads((run.folder / "versions.jsonl").read_text())
    assert versions == {"python": platform.python_version(), **{
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "diffprog")}}
    assert eval((run.folder / "net.txt").read_text(), {
        "serial": dp.serial, "linear": dp.linear, "jax": jax}) == NET
    assert json.loads((run.folder / "log.jsonl").read_text()) == {"step": 50, "loss": 0.5}


def test_the_net_may_be_a_table_or_left_out(tmp_path):
    table = dp.summary(NET, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    run = dp.runtime.Run(tmp_path / "1", {}, table)
    assert (run.folder / "net.txt").read_text() == f"{table}\n"
    assert not (dp.runtime.Run(tmp_path / "2", {}).folder / "net.txt").exists()


def test_a_run_is_continued(tmp_path):
    for step in (1, 2):
        dp.runtime.Run(tmp_path, SETTINGS, NET)(step, None, {})
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == [{"step": 1}, {"step": 2}]
    assert len((tmp_path / "versions.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("settings", "net", "got"), [
    ({**SETTINGS, "rate": 1e-2}, NET, '"rate": 0.01,'),
    (SETTINGS, dp.serial(dp.linear(4), jax.nn.relu), "serial(linear(4), jax.nn.relu)"),
    ({**SETTINGS, "more": 1}, NET, '"nothing": null,'),
])
def test_a_folder_of_another_run_raises_and_keeps_its_files(settings, net, got, tmp_path):
    def texts():
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    dp.runtime.Run(tmp_path, SETTINGS, NET)(1, None, {})
    before = texts()
    error = refused(dp.runtime.Run, tmp_path, settings, net)
    assert error.got == got and "as this folder has it" in error.wants
    assert texts() == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    assert "the file " in refused(dp.runtime.Run, tmp_path / "file", {}).got
