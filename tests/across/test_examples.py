"""The examples in short mode, and the two commands of the README from a clean clone."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(command, cwd, **env):
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()


@pytest.mark.parametrize(("model", "steps"), [
    ("convnet", 60), ("mlp", 60), ("resnet", 120), ("vit", 240)])
def test_digits_in_short_mode(model, steps, tmp_path):
    out = tmp_path / "picture.png"
    example = str(ROOT / "examples" / "digits.py")
    command = [sys.executable, example, "--model", model, "--steps", str(steps),
               "--out", str(out)]
    printed = run(command, tmp_path)
    assert "gradient agrees with finite differences" in printed
    last = re.fullmatch(r"accuracy (\d+\.\d) % on 360 held-out images", printed.splitlines()[-1])
    assert last and float(last[1]) > 80
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 20


def test_the_two_commands_of_the_readme_from_a_clean_clone(tmp_path):
    readme = (ROOT / "README.md").read_text()
    clone, demo = readme.split("```sh\n")[1].split("```")[0].strip().splitlines()
    assert clone == "git clone <this repository> diffprog && cd diffprog"
    assert demo == "make demo"
    run(["git", "clone", "-q", str(ROOT), "diffprog"], tmp_path)
    own = {name: "" for name in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    printed = run(["make", "demo"], tmp_path / "diffprog", **own)
    last = re.fullmatch(r"accuracy (\d+\.\d) % on 360 held-out images", printed.splitlines()[-1])
    assert last and float(last[1]) >= 98.3
    assert (tmp_path / "diffprog" / "digits.png").exists()
    claimed = re.search(r"last line is `accuracy (\d+\.\d) %", readme)
    assert claimed and abs(float(claimed[1]) - float(last[1])) <= 0.6  # two images, across machines
