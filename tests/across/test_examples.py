"""The examples in short mode: prints, pictures and errors; and the README's two commands."""

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
    """Run an example in short mode; check its picture and return the lines that it prints."""
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
    used = np.concatenate([days.training, days.validation])
    assert not np.intersect1d(used, days.held_out).size
    assert len(used) + len(days.held_out) == len({*used.tolist(), *days.held_out.tolist()})


def test_sets(tmp_path):
    """The logits do not depend on the order of the points, up to rounding."""
    lines = shorten("sets.py", tmp_path)
    assert re.fullmatch(r"accuracy \d+\.\d % on 360 held-out digits as sets", lines[-1]), lines[-1]
    shuffled = re.search(r"when every set is shuffled: (\S+)", "\n".join(lines))
    assert shuffled and float(shuffled[1]) < 1e-4


def test_bert_pretrain(tmp_path):
    lines = shorten("bert_pretrain.py", tmp_path)
    first = re.fullmatch(r"masked tokens: (\d+\.\d) % correct, most frequent token (\d+\.\d) % "
                         r"\(held-out documents\)", lines[-2])
    second = re.fullmatch(r"next sentence: (\d+\.\d) % correct, chance (\d+\.\d) %", lines[-1])
    assert first and second, lines[-2:]
    assert 2 < float(first[2]) < 15 and 45 < float(second[2]) < 70


def test_hypernetwork(tmp_path):
    """After few steps the predictions are already better than the mean image."""
    lines = shorten("hypernetwork.py", tmp_path, steps=200)
    rows = {line[:24].strip(): [float(x) for x in line[24:].split()] for line in lines[-8:-2]}
    assert rows["percent visible"] == [20, 35, 50, 65, 80]
    for error, mean, best in zip(*(rows[name] for name in (
            "hypernetwork", "mean image", "best linear prediction")), strict=True):
        assert error < 0.9 * mean and best < 0.9 * mean
    assert re.fullmatch(r"error of masked pixels 0\.\d+, best linear prediction 0\.\d+ on 360 "
                        r"held-out digits, half visible", lines[-1])


def test_sweep(tmp_path):
    """Rates in the middle are best, and training forty networks at once changes none of them."""
    lines = shorten("sweep.py", tmp_path, "--seeds", "3", steps=100)
    alone = re.fullmatch(r"trained alone, parameters differ by (\S+) after 20 steps", lines[0])
    assert alone and float(alone[1]) < 1e-5
    table = [re.fullmatch(r"rate (\S+) +validation accuracy +(\S+) ± (\S+) %", line)
             for line in lines[1:9]]
    accuracies = {float(row[1]): float(row[2]) for row in table if row}
    assert len(accuracies) == 8 and accuracies[1e-2] > 90
    assert accuracies[1e-4] < accuracies[1e-3] < accuracies[1e-2] > accuracies[1e-1] + 20
    last = re.fullmatch(r"best rate (\S+): accuracy (\S+) ± (\S+) % on 360 held-out images, "
                        r"3 seeds", lines[-1])
    assert last and accuracies[float(last[1])] == max(accuracies.values()) and float(last[2]) > 90


# Sampling, attacks, inspection.

def test_vae(tmp_path):
    """Two latent variables give a better likelihood than independent pixels."""
    lines = shorten("vae.py", tmp_path, steps=400)
    classified = re.fullmatch(r"five nearest neighbours classify (\d+\.\d) % of 360 .*", lines[-2])
    found = re.fullmatch(r"negative ELBO: (\S+) nats per held-out image \((\S+) \+ (\S+)\), "
                         r"independent pixels (\S+)", lines[-1])
    assert classified and found, lines[-2:]
    bound, reconstruction, kl, pixels = map(float, found.groups())
    assert abs(reconstruction + kl - bound) < 0.02 and 1 < kl < 10
    assert bound < pixels - 1.5 and float(classified[1]) > 40


def test_estimators(monkeypatch, tmp_path):
    """The score function is unbiased, relaxed samples are not; and the order of their variances."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    estimators = importlib.import_module("estimators")
    monkeypatch.setattr(estimators, "TEMPERATURES", (0.1, 0.5))
    categorical = estimators.measure_categorical(4000, 0)
    gaussian = estimators.measure_gaussian(1000, 0)
    score = categorical["score function"]
    others = categorical["score function, leave-one-out"]
    cold, warm = categorical["Gumbel-softmax 0.1"], categorical["Gumbel-softmax 0.5"]
    for unbiased in (score, others):
        assert unbiased.bias < 4 * unbiased.error
    assert cold.bias < 0.5 * warm.bias and warm.bias > 10 * warm.error
    assert others.std < warm.std < score.std < cold.std
    assert categorical["straight-through Gumbel 0.5"].std > warm.std
    small, large = ([found[i].std for found in gaussian.values()] for i in (0, -1))
    # The reparametrized estimator does not depend on the dimension; the score function does.
    assert 0.9 < large[0] / small[0] < 1.1 and large[1] > 5 * small[1]
    out = tmp_path / "picture.png"
    estimators.draw(out, categorical, gaussian)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000


def test_adversarial(tmp_path):
    lines = shorten("adversarial.py", tmp_path, steps=90)
    found = [re.fullmatch(rf"{name} training: no attack (\S+) %, FGSM (\S+) %, PGD (\S+) %", line)
             for name, line in zip(("plain", "adversarial"), lines[-2:], strict=True)]
    assert all(found), lines[-2:]
    plain, taught = ([float(percent) for percent in line.groups()] for line in found)
    assert min(plain[0], taught[0]) > 85  # both classify clean images
    assert plain[2] < plain[1] < plain[0] and taught[2] < taught[1] < taught[0]
    assert taught[2] > plain[2] + 20


def test_seeing(tmp_path):
    """Deeper representations separate digits better."""
    lines = shorten("seeing.py", tmp_path, steps=60)
    pixels, *depths = map(float, re.findall(r"(\d+\.\d) %", lines[-1]))
    assert len(depths) == 4 and min(depths[1:]) > pixels + 2 and pixels > 85
    plain, summed, normed = (float(line.split()[-1]) for line in lines[-4:-1])
    assert plain < 1e-2 < 0.1 < normed < 100 < summed


def test_equilibrium(tmp_path):
    """The equilibrium network of one block is nearly as accurate as twelve residual blocks."""
    lines = shorten("equilibrium.py", tmp_path, steps=150)
    solved = re.fullmatch(r"converged after (\d+) evaluations of f, relative residual (\S+)",
                          lines[-3])
    assert solved and int(solved[1]) < 100 and float(solved[2]) < 1e-5
    deep, implicit = (re.fullmatch(rf"{name}: (\d+\.\d) % of 360 held-out images, (\d+) parameters "
                                  r"in \d+ blocks?", line)
                     for name, line in zip(("residual", "equilibrium"), lines[-2:], strict=True))
    assert deep and implicit, lines[-2:]
    assert float(implicit[1]) > 92 and int(implicit[2]) < int(deep[2]) / 5


def test_maml(tmp_path):
    """One step from the parameters of MAML is better than the best step after pretraining."""
    lines = shorten("maml.py", tmp_path, steps=400)
    assert lines[0].startswith("gradient agrees with finite differences")
    found = [re.match(r"[\w-]+: squared error \S+ after 0 steps, (\S+) after 1 step", line)
             for line in lines[-3:]]
    pretrained, maml, sgd = (float(match[1]) for match in found if match)
    assert maml < 0.8 * pretrained and sgd < maml


def test_gan(tmp_path):
    """A classifier that rejects blends of digits recognizes many of the samples."""
    lines = shorten("gan.py", tmp_path, "--inner", "2", steps=400)
    classifier = re.match(r"accuracy of the classifier on held-out digits (\d+\.\d) %; it accepts "
                          r"(\d+\.\d) %", lines[0])
    assert classifier and float(classifier[1]) > 90 and float(classifier[2]) < 35, lines[0]
    last = re.fullmatch(r"recognized (\d+\.\d) % of 1000 samples, the rarest digit (\d+\.\d) %",
                        lines[-1])
    assert last and float(last[1]) > 50 and float(last[2]) > 1, lines[-1]


@pytest.mark.parametrize(("denoiser", "least"), [("unet", 60), ("dit", 15)])
def test_diffusion(denoiser, least, tmp_path):
    """After few steps digits are recognized more often than by chance, and hardly any is a copy."""
    lines = shorten("diffusion.py", tmp_path, "--denoiser", denoiser, "--samples", "10", steps=400)
    found = re.fullmatch(r"recognized (\d+\.\d) %, lowest diversity (\d\.\d\d), "
                         r"copies (\d+\.\d) %", lines[-1])
    assert found, lines[-1]
    recognized, diversity, copies = map(float, found.groups())
    assert recognized > least and diversity > 0.6 and copies <= 10


def test_train_gpt_is_killed_and_resumed(tmp_path):
    """The loss of a run that was killed is, digit by digit, that of one that was not."""
    def command(folder):
        return [sys.executable, str(ROOT / "examples" / "train_gpt.py"), "--steps", "12",
                "--every", "4", "--out", str(tmp_path / folder)]

    whole = run(command("whole"), tmp_path).splitlines()
    killed = subprocess.Popen(command("killed"), cwd=tmp_path, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    for line in killed.stdout:
        if line.startswith("step 12"):  # at which the checkpoint of step 4 is complete
            break
    killed.kill()
    killed.communicate()
    resumed = run(command("killed"), tmp_path).splitlines()
    assert re.fullmatch(r"step 12: loss \d\.\d{4}, validation \d\.\d{4} nats per token", whole[-1])
    assert resumed[-1] == whole[-1] and not any(line.startswith("step 4") for line in resumed)
    assert (tmp_path / "killed" / "loss.png").read_bytes().startswith(b"\x89PNG")
