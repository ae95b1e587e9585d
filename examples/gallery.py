"""Write what the experiments of the course found into its pages and into the gallery.

    python examples/gallery.py [--write]

A page holds a line `<!-- experiment: NAME -->` for each experiment, and after it, down to
`<!-- end -->`, what is made from docs/course/NAME/result.json: command, pictures, claims and
figures. Without --write the program lists the pages that differ, and ends with an error.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
COURSE = ROOT / "docs" / "course"
GALLERY = ROOT / "examples" / "README.md"
_BLOCK = re.compile(r"(<!-- experiment: (\w+) -->\n).*?(<!-- end -->)", re.S)
_TABLE = re.compile(r"(<!-- course -->\n).*?(<!-- end -->)", re.S)


def results() -> dict[str, dict[str, Any]]:
    """Experiment -> its result."""
    return {path.parent.name: json.loads(path.read_text())
            for path in sorted(COURSE.glob("*/result.json"))}


def pages() -> dict[pathlib.Path, str]:
    """Page -> its text, with the blocks made from the results."""
    found = results()
    texts = {page: _BLOCK.sub(lambda match: _block(match, found), page.read_text())
             for page in sorted(COURSE.glob("*.md"))}
    if GALLERY.exists():
        texts[GALLERY] = _TABLE.sub(
            lambda match: match[1] + _table(found, texts) + match[2], GALLERY.read_text())
    return texts


def _block(match: re.Match[str], found: dict[str, dict[str, Any]]) -> str:
    """The block of one experiment: command, pictures, claims and figures."""
    name = match[2]
    result = found[name]
    command = (f"`python examples/course/{name}.py --seed {result['seed']}` takes "
               f"{_duration(result)}.")
    pictures = [f"![{caption}]({name}/{file})\n\n*{caption}*"
                for file, caption in result["pictures"].items()]
    claims = "\n".join(f"- {claim}" for claim in result["claims"])
    rows = "\n".join(f"| {figure} | {value:g} |" for figure, value in result["figures"].items())
    figures = ("<details><summary>All figures</summary>\n\n| Measured | |\n|---|---|\n"
               f"{rows}\n\n</details>")
    return match[1] + "\n" + "\n\n".join([command, *pictures, claims, figures, ""]) + match[3]


def _table(found: dict[str, dict[str, Any]], texts: dict[pathlib.Path, str]) -> str:
    """A row for each experiment: first picture, page, command, minutes, first claim."""
    page_of = {name: page for page, text in texts.items() for _, name, _ in _BLOCK.findall(text)
               if page.parent == COURSE}
    rows = ["| | Experiment | Takes | Shows |", "|---|---|---|---|"]
    order = sorted(found, key=lambda name: (str(page_of.get(name, "~")), name))
    for name in order:
        result = found[name]
        file = next(iter(result["pictures"]), None)
        picture = f'<img src="../docs/course/{name}/{file}" width="240">' if file else ""
        page = page_of.get(name)
        title = f"[{_title(texts[page])}](../docs/course/{page.name})" if page else ""
        rows.append(f"| {picture} | {title}<br>[`course/{name}.py`](course/{name}.py) | "
                    f"{_duration(result)} | {'<br>'.join(result['claims'][:2])} |")
    return "\n".join(rows) + "\n"


def _title(text: str) -> str:
    """The heading of a page."""
    return text.partition("\n")[0].lstrip("# ")


def _duration(result: dict[str, Any]) -> str:
    """The CPU time of the run, of all cores together."""
    seconds = result["cpu_seconds"]
    return f"{seconds} s of CPU time" if seconds < 90 else f"{seconds / 60:.1f} minutes of CPU time"


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    differ = [page for page, text in pages().items() if page.read_text() != text]
    if write:
        for page, text in pages().items():
            page.write_text(text)
    elif differ:
        sys.exit("differ from the results, run with --write: "
                 + ", ".join(str(page.relative_to(ROOT)) for page in differ))


if __name__ == "__main__":
    main()
