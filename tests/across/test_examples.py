"""The examples in short mode: what they print, draw and refuse; the README's two commands."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
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


# Sequences.

def shorten(name, tmp_path, *options, steps=20):
    """Run an example in short mode; what it prints, after a look at its picture."""
    out = tmp_path / "picture.png"
    command = [sys.executable, str(ROOT / "examples" / name), "--steps", str(steps), "--out",
               str(out), *options]
    printed = run(command, tmp_path)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    return printed.splitlines()


@pytest.mark.parametrize("model", ["gpt", "llama", "lstm", "gru"])
def test_language_model(model, tmp_path):
    lines = shorten("language_model.py", tmp_path, "--model", model)
    for line, part in zip(lines[-2:], ("the last 5 %", "every 20th block"), strict=True):
        found = re.fullmatch(rf"unigram (\d\.\d+), trigram (\d\.\d+), {model} (\d\.\d+) bits per "
                             rf"character on {part}", line)
        assert found, line
        unigram, trigram, bits = map(float, found.groups())
        assert 4 < unigram < 5 and 2 < trigram < 3  # other versions of Python have other texts
        assert trigram < bits < unigram  # so few steps teach hardly more than frequencies


def test_language_model_of_a_file(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Gödel, Escher, Bach: — und so fort.\n" * 2000)
    lines = shorten("language_model.py", tmp_path, "--text", str(file))
    assert lines[-1].startswith("unigram") and lines[-2].startswith("unigram")


@pytest.mark.parametrize(("content", "message"), [
    (b"\xff\xfe\x00not text", "wants UTF-8 text"), (b"ab\x00cd" * 20_000, "wants text, got NUL"),
    (b"too short", r"wants at least \d+ characters .*, got 9"), (None, "wants a readable file"),
])
def test_language_model_refuses(content, message, tmp_path):
    file = tmp_path / "given"
    if content is not None:
        file.write_bytes(content)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "language_model.py"), "--text", str(file)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(message, last) and "; " in last, last
    assert not list(pathlib.Path(tmp_path).glob("*.png"))


@pytest.mark.parametrize("model", ["transformer", "seq2seq"])
def test_translate(model, tmp_path):
    last = shorten("translate.py", tmp_path, "--model", model)[-1]
    assert re.fullmatch(rf"exact match \d+\.\d % on 7500 held-out dates \({model}\)", last), last


def test_no_held_out_date_is_a_target_in_training(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    translate = importlib.import_module("translate")
    days = translate.split()
    seen = np.concatenate([days.learn, days.validation])
    assert not np.intersect1d(seen, days.held).size
    assert len(seen) + len(days.held) == len({*seen.tolist(), *days.held.tolist()})


def test_sets(tmp_path):
    """Whatever order the points come in, the logits are the same but for rounding."""
    lines = shorten("sets.py", tmp_path)
    assert re.fullmatch(r"accuracy \d+\.\d % on 360 held-out digits as sets", lines[-1]), lines[-1]
    shuffled = re.search(r"when every set is shuffled: (\S+)", "\n".join(lines))
    assert shuffled and float(shuffled[1]) < 1e-4


def test_bert_pretrain(tmp_path):
    lines = shorten("bert_pretrain.py", tmp_path)
    first = re.fullmatch(r"masked tokens: (\d+\.\d) % right, unigram guess (\d+\.\d) % "
                         r"\(held-out documents\)", lines[-2])
    second = re.fullmatch(r"next sentence: (\d+\.\d) % right, chance (\d+\.\d) %", lines[-1])
    assert first and second, lines[-2:]
    assert 2 < float(first[2]) < 15 and 45 < float(second[2]) < 70


def test_hypernetwork(tmp_path):
    """So few steps already tell one digit from another: better than their mean."""
    lines = shorten("hypernetwork.py", tmp_path, steps=200)
    rows = {line[:18].strip(): [float(x) for x in line[18:].split()] for line in lines[-8:-2]}
    assert rows["percent seen"] == [20, 35, 50, 65, 80]
    for written, mean, best in zip(*(rows[name] for name in (
            "hypernetwork", "mean image", "best linear guess")), strict=True):
        assert written < 0.9 * mean and best < 0.9 * mean
    assert re.fullmatch(r"error of hidden pixels 0\.\d+, best linear guess 0\.\d+ on 360 held-out "
                        r"digits, half seen", lines[-1])


# Draws and attacks.

def test_vae(tmp_path):
    """Two numbers for each image say more than the frequency of ink at each place."""
    lines = shorten("vae.py", tmp_path, steps=400)
    named = re.fullmatch(r"five neighbours in the plane name (\d+\.\d) % of 360 .*", lines[-2])
    found = re.fullmatch(r"bound: (\S+) nats a held-out image \((\S+) \+ (\S+)\), "
                         r"independent pixels (\S+)", lines[-1])
    assert named and found, lines[-2:]
    bound, reconstruction, kl, pixels = map(float, found.groups())
    assert abs(reconstruction + kl - bound) < 0.02 and 1 < kl < 10
    assert bound < pixels - 1.5 and float(named[1]) > 40


def test_estimators(monkeypatch, tmp_path):
    """The score function is unbiased, relaxed draws are not; each has its place in variance."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    estimators = importlib.import_module("estimators")
    monkeypatch.setattr(estimators, "TEMPERATURES", (0.1, 0.5))
    classes, numbers = estimators.of_classes(4000, 0), estimators.of_normal_numbers(1000, 0)
    score, others = classes["score function"], classes["score function, leave-one-out"]
    cold, warm = classes["Gumbel-softmax 0.1"], classes["Gumbel-softmax 0.5"]
    for unbiased in (score, others):
        assert unbiased.bias < 4 * unbiased.error
    assert cold.bias < 0.5 * warm.bias and warm.bias > 10 * warm.error
    assert others.deviation < warm.deviation < score.deviation < cold.deviation
    assert classes["straight-through Gumbel 0.5"].deviation > warm.deviation
    small, large = ([found[i].deviation for found in numbers.values()] for i in (0, -1))
    # Of n numbers the reparametrized draw does not heed the n; the score function does.
    assert 0.9 < large[0] / small[0] < 1.1 and large[1] > 5 * small[1]
    out = tmp_path / "picture.png"
    estimators.draw(out, classes, numbers)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000


def test_adversarial(tmp_path):
    lines = shorten("adversarial.py", tmp_path, steps=90)
    found = [re.fullmatch(rf"{name} training: no attack (\S+) %, FGSM (\S+) %, PGD (\S+) %", line)
             for name, line in zip(("plain", "adversarial"), lines[-2:], strict=True)]
    assert all(found), lines[-2:]
    plain, taught = ([float(share) for share in line.groups()] for line in found)
    assert min(plain[0], taught[0]) > 85  # both read what nobody has changed
    assert plain[2] < plain[1] < plain[0] and taught[2] < taught[1] < taught[0]
    assert taught[2] > plain[2] + 20


def test_seeing(tmp_path):
    """Depth tells digits apart better than pixels do; attention weights are those in use."""
    lines = shorten("seeing.py", tmp_path, steps=60)
    recomputed = re.search(r"output of their layers within (\S+)", "\n".join(lines))
    assert recomputed and float(recomputed[1]) < 1e-4
    pixels, *depths = map(float, re.findall(r"(\d+\.\d) %", lines[-1]))
    assert len(depths) == 4 and min(depths[1:]) > pixels + 2 and pixels > 85
    plain, summed, normed = (float(line.split()[-1]) for line in lines[-4:-1])
    assert plain < 1e-2 < 0.1 < normed < 100 < summed


def test_equilibrium(tmp_path):
    """The network of one block, applied until it is at rest, comes near that of twelve."""
    lines = shorten("equilibrium.py", tmp_path, steps=150)
    rest = re.match(r"at rest after (\d+) applications of f, the last of which moved z by (\S+)",
                    lines[-3])
    assert rest and int(rest[1]) < 100 and float(rest[2]) < 1e-5
    deep, endless = (re.fullmatch(rf"{name}: (\d+\.\d) % of 360 held-out images, (\d+) parameters "
                                  r"in \d+ blocks?", line)
                     for name, line in zip(("residual", "equilibrium"), lines[-2:], strict=True))
    assert deep and endless, lines[-2:]
    assert float(endless[1]) > 92 and int(endless[2]) < int(deep[2]) / 5


def test_maml(tmp_path):
    """One step from where MAML begins does more than the best step of plain training."""
    lines = shorten("maml.py", tmp_path, steps=400)
    assert lines[0].startswith("gradient agrees with finite differences")
    found = [re.match(r"[\w-]+: squared error \S+ at first, (\S+) after 1 step", line)
             for line in lines[-3:]]
    pretrained, maml, sgd = (float(match[1]) for match in found if match)
    assert maml < 0.8 * pretrained and sgd < maml


def test_gan(tmp_path):
    """A judge that tells digits from blends of two finds many among the samples already."""
    lines = shorten("gan.py", tmp_path, "--inner", "2", steps=400)
    judge = re.match(r"the judge reads (\d+\.\d) % of held-out digits rightly, and takes "
                     r"(\d+\.\d) %", lines[0])
    assert judge and float(judge[1]) > 90 and float(judge[2]) < 35, lines[0]
    last = re.fullmatch(r"recognized (\d+\.\d) % of 1000 samples, the rarest digit (\d+\.\d) %",
                        lines[-1])
    assert last and float(last[1]) > 50 and float(last[2]) > 1, lines[-1]


@pytest.mark.parametrize(("denoiser", "least"), [("unet", 60), ("dit", 15)])
def test_diffusion(denoiser, least, tmp_path):
    """So few steps give digits that are read more often than by chance, and copy next to none."""
    lines = shorten("diffusion.py", tmp_path, "--denoiser", denoiser, "--samples", "10", steps=400)
    found = re.fullmatch(r"recognized (\d+\.\d) %, least deviation (\d\.\d\d) of the real one, "
                         r"copies (\d+\.\d) %", lines[-1])
    assert found, lines[-1]
    recognized, deviation, copies = map(float, found.groups())
    assert recognized > least and deviation > 0.6 and copies <= 10
