"""The course: its experiments in short mode, and its pages, made from their results."""

import ast
import functools
import hashlib
import importlib
import json
import pathlib
import re
import subprocess
import sys

import pytest
from across.test_readme import execute

import diffprog as dp

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "course"
COURSE = ROOT / "docs" / "course"
COMMON = {"experiment", "data"}
NAMES = sorted({path.stem for path in SCRIPTS.glob("*.py")} - COMMON)
PAGES = sorted(path.name for path in COURSE.glob("*.md"))


def run(script, *options, cwd):
    return subprocess.run([sys.executable, str(script), *options], cwd=cwd, capture_output=True,
                          text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_draws_and_its_claims_hold(name, tmp_path):
    done = run(SCRIPTS / f"{name}.py", "--short", "--out", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "\nholds: " in done.stdout
    drawn = {path.name for path in (tmp_path / "found").iterdir()}
    shown = set(json.loads((COURSE / name / "result.json").read_text())["pictures"])
    assert drawn == shown
    assert all((tmp_path / "found" / file).stat().st_size > 5_000 for file in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_of_the_script_as_it_is(name):
    """A changed script must be run again, `python examples/course/NAME.py --out docs/...`."""
    result = json.loads((COURSE / name / "result.json").read_text())
    assert result["sha256"] == hashlib.sha256((SCRIPTS / f"{name}.py").read_bytes()).hexdigest()
    assert result["script"] == f"{name}.py" and result["claims"] and result["figures"]
    assert result["cpu_seconds"] < 600  # five minutes of two cores
    files = {path.name for path in (COURSE / name).iterdir()}
    assert files == {"result.json", *result["pictures"]}


def test_pages_and_gallery_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    gallery = importlib.import_module("gallery")
    differ = [page.name for page, text in gallery.pages().items() if page.read_text() != text]
    assert not differ, "run: python examples/gallery.py --write"
    shown = re.findall(r"<!-- experiment: (\w+) -->", "".join(
        (COURSE / page).read_text() for page in PAGES))
    assert sorted(shown) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute((COURSE / page).read_text(), page)


@pytest.mark.parametrize("page", [page for page in PAGES if page[0].isdecimal()])
def test_a_page_of_a_topic_has_predictions_and_solved_exercises(page):
    text = (COURSE / page).read_text()
    assert "**Predict before running:**" in text
    exercises = text.partition("\n## Exercises\n")[2]
    solutions = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", exercises, re.S)
    assert len(solutions) >= 2
    assert any("assert " in solution for solution in solutions)


def rows():
    """Statement, page, line and test of each row of the map."""
    table = (COURSE / "index.md").read_text().partition("\n## The map\n")[2]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def anchors(page):
    """The names of a page's headings in links, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_of_the_map_leads_to_a_page_a_line_and_a_test(row):
    _, page, line, test = row
    path, _, anchor = re.fullmatch(r"\[.+\]\((.+)\)", page)[1].partition("#")
    assert not anchor or anchor in anchors(COURSE / path)
    assert (COURSE / path).is_file()
    names = re.findall(r"\bdp((?:\.\w+)+)", line)
    assert names
    for name in names:
        functools.reduce(getattr, name.split(".")[1:], dp)
    file, _, function = test.strip("`").partition("::")
    source = (ROOT / file).read_text()
    assert not function or re.search(rf"^def {function}\(", source, re.M)


def test_every_page_is_in_the_map():
    """Exercises that are graded, and the map itself, are none."""
    linked = {re.search(r"\((.+?)[#)]", page)[1] for _, page, _, _ in rows()}
    assert linked >= {page for page in PAGES if page != "index.md"}


def test_a_claim_that_does_not_hold_ends_the_run(tmp_path):
    script = tmp_path / "false.py"
    script.write_text(f'''"""False."""
import sys
sys.path.append({str(SCRIPTS)!r})
from experiment import run


def main(experiment):
    experiment.claim("One is two.", 1 == 2)


run(main)
''')
    done = run(script, cwd=tmp_path)
    assert done.returncode != 0 and "DOES NOT HOLD: One is two." in done.stdout
    assert not (tmp_path / "false" / "result.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_how_it_is_run(name):
    doc = ast.get_docstring(ast.parse((SCRIPTS / f"{name}.py").read_text()))
    assert doc and f"python examples/course/{name}.py [--short] [--seed N] [--out FOLDER]" in doc
