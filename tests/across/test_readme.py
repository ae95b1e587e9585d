"""What README, guide and docs show is run as it stands, the blocks of each in one namespace."""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
OTHERS = ["docs/reproducibility.md", "CONTRIBUTING.md", "docs/cells.md", "docs/defaults.md"]
LONG = ["docs/coming_from.md", "docs/recipes.md", "docs/second_order.md"]
NOT_RUN = "<!-- not run -->"
BLOCK = re.compile(
    rf"^(?P<skip>{re.escape(NOT_RUN)}[ \t]*\n\s*)?^```python[ \t]*\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL)


def blocks(text):
    """(line, code) of every Python block that is to be run."""
    for match in BLOCK.finditer(text):
        if not match["skip"]:
            yield text.count("\n", 0, match.start("code")) + 1, match["code"]


def execute(text, name):
    """Run the blocks of a text in order; tracebacks show its lines. Returns the namespace."""
    names = {"__name__": "__readme__"}
    for line, code in blocks(text):
        exec(compile("\n" * (line - 1) + code, name, "exec"), names)
    return names


def read(path):
    """A text with blocks that are run."""
    text = (ROOT / path).read_text()
    assert list(blocks(text)), f"{path} shows no Python block that is run"
    assert text.count("```python") == len(BLOCK.findall(text)), "a block is not closed"
    return text


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_blocks_of_the_readme_run(tmp_path, monkeypatch):
    text = read("README.md")
    monkeypatch.chdir(tmp_path)
    names = execute(text, str(README))
    assert repr(names["AlexNet"]) == repr(dp.models.alexnet())
    assert names["table"].parameters == 60_965_224
    assert names["score"].plan((jnp.ones((2, 3)), jnp.ones((2, 5)))).y.shape == (2,)
    assert names["noisy"].apply(*names["noisy"].init(jax.random.key(0), jnp.ones((2, 4))),
                                jnp.ones((2, 4)))[1]["steps_0"]["steps"] == 0
    assert names["activations"]["down"].shape == (12, 2, 16)
    assert names["texts"] == [" with para", " parameter"]
    assert (names["written"].tokens == names["target"][:, 1:]).all()
    assert names["shrunk"] < 1e-4


def test_the_diagram_in_the_readme_is_what_the_block_above_it_draws():
    text = read("README.md")
    (code,) = [code for _, code in blocks(text) if "dp.inspection.diagram(" in code]
    names = {"jax": jax, "jnp": jnp, "dp": dp}
    exec(code, names)
    assert re.findall(r"^```mermaid\n(.*?)\n```$", text, re.M | re.S) == [names["chart"]]


@pytest.mark.parametrize("path", [
    *OTHERS, *(pytest.param(path, marks=pytest.mark.slow) for path in LONG)])
def test_the_blocks_of_the_other_pages_run(path, tmp_path, monkeypatch):
    text = read(path)
    monkeypatch.chdir(tmp_path)
    execute(text, path)


def test_every_page_with_blocks_is_run():
    pages = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"),
                                                            *ROOT.glob("docs/*.md"))}
    shown = {path for path in pages if "```python" in (ROOT / path).read_text()}
    assert shown == {"README.md", *OTHERS, *LONG}


def test_blocks_share_a_namespace_and_some_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"""
```python
a = 1
open("written", "w").close()
```
```bash
a = 7
```
{NOT_RUN}

```python
a = 2
```
Text.
```python
b = a + 1
```
"""
    assert [line for line, _ in blocks(text)] == [3, 16]
    names = execute(text, "text")
    assert (names["a"], names["b"]) == (1, 2)
    assert os.listdir() == ["written"]


def test_a_block_that_fails_is_found_by_its_line():
    with pytest.raises(ZeroDivisionError) as caught:
        execute("Text.\n\n```python\na = 1\na / 0\n```\n", "text")
    assert caught.traceback[-1].lineno + 1 == 5
