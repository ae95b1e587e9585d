"""The exercises of the course: solutions pass, and stubs and wrong answers fail with the reason."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "course" / "exercises"
SOLUTIONS = FOLDER / "solutions"


def load():
    found = importlib.util.spec_from_file_location("grade", FOLDER / "grade.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


GRADE = load()

# What a wrong answer has instead of the solution, and the reason that is given.
WRONG = {
    "attention": [
        (" / jnp.sqrt(query.shape[-1])", "", "the factor of the scores is missing"),
        ("axis=-1", "axis=0", "the softmax is over the queries"),
        ("jnp.where(mask, scores, -jnp.inf)", "scores", "the mask has no effect"),
        ("weights @ value", "weights", "the shape is"),
    ],
    "residual": [
        ("return x + ", "return ", "the sum with x is missing"),
        ("jax.nn.relu(normal", "jax.nn.relu(x", "the norm is missing"),
        ("jnp.zeros((hidden, features))", "jnp.ones((hidden, features))", "begin as the identity"),
        (" * jnp.sqrt(2 / features)", " * 0", "no gradient reaches either"),
        (".astype(x.dtype)", "", "a law does not hold: dtypes are kept"),
    ],
    "backpropagation": [
        (" * (1 - h**2)", "", "the slope of tanh is missing"),
        ("h @ w2 - target", "target - h @ w2", "the sign is wrong"),
        ("h @ w2 - target", "2 * (h @ w2 - target)", "the factor 1 2 of the loss is missing"),
    ],
    "adam": [
        (" / (1 - b1**t) / size", " / (jnp.sqrt(v) + eps)", "the bias correction is missing"),
        ("w - rate", "w + rate", "the step goes uphill"),
        ("b2 * v + (1 - b2) * g**2", "b2 * v + (1 - b2) * g", "wrong by up to"),
    ],
    "convolution": [
        ("kernel[j] for", "kernel[-1 - j] for", "the kernel is flipped"),
        ("(places // 2, places // 2)", "(places - 1, 0)", "the padding is on one side"),
        ("(places // 2, places // 2)", "(0, 0)", "raises|the shape is"),
    ],
}


@pytest.mark.parametrize("name", GRADE.GRADES)
def test_a_solution_passes_and_a_stub_is_not_begun(name):
    assert GRADE.graded(name, SOLUTIONS) == "passed"
    assert GRADE.graded(name, FOLDER).startswith("not begun")


@pytest.mark.parametrize(("name", "right", "wrong", "reason"), [
    (name, *each) for name, answers in WRONG.items() for each in answers])
def test_a_wrong_answer_is_told_why(name, right, wrong, reason, tmp_path):
    text = (SOLUTIONS / f"{name}.py").read_text()
    assert right in text
    (tmp_path / f"{name}.py").write_text(text.replace(right, wrong))
    found = GRADE.graded(name, tmp_path)
    assert found != "passed" and any(part in found for part in reason.split("|")), found


def test_a_missing_file_and_an_error_are_told(tmp_path):
    assert "there is no adam.py" in GRADE.graded("adam", tmp_path)
    (tmp_path / "adam.py").write_text("import nothing_of_this_name")
    assert GRADE.graded("adam", tmp_path).startswith("raises ModuleNotFoundError")


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "status"), [(SOLUTIONS, 0), (FOLDER, 1)])
def test_the_command_exits_by_the_grades(folder, status):
    done = subprocess.run([sys.executable, str(FOLDER / "grade.py"), str(folder)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert done.stdout.count("passed") == (5 if status == 0 else 0)
