"""The folder of a run: what was run, with which versions, and its log."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

from diffprog.core.errors import LayerError
from diffprog.core.notation import clip, code
from diffprog.runtime.logs import jsonl

__all__ = ["Run"]

_PACKAGES = ("jax", "jaxlib", "optax", "diffprog")


class Run:
    """The folder of a run: settings, versions, the net as text, and the log.

    The folder holds ``settings.json``; ``versions.jsonl``, of Python, jax, jaxlib, optax and
    diffprog, with a line for each start; ``net.txt``; and ``log.jsonl``. A folder that exists is
    continued, if settings and net are the same. A run is an observer, ``(step, state, metrics)``,
    which appends to the log as `jsonl` does.

    Args:
        folder: of this run alone; it is made if it does not exist.
        settings: by name, as ``vars`` of parsed arguments; what JSON does not know becomes text.
        net: a layer, written as the code that makes it, or `dp.summary` of it, written as a table.

    Raises:
        LayerError: the folder is a file, or that of a run with other settings or another net.

    Example:
        >>> import os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> run = dp.runtime.Run(folder, {"rate": 1e-3}, dp.linear(3))
        >>> run(50, None, {"loss": 0.5})
        >>> sorted(os.listdir(folder))
        ['log.jsonl', 'net.txt', 'settings.json', 'versions.jsonl']
        >>> print((run.folder / "net.txt").read_text(), end="")
        linear(3)
    """

    def __init__(
        self, folder: str | pathlib.Path, settings: Mapping[str, Any], net: Any = None
    ) -> None:
        self.folder = pathlib.Path(folder).absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise LayerError("a folder for a run", f"the file {clip(str(self.folder))}",
                             "name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep("settings.json", json.dumps(dict(settings), indent=2, default=code))
        if net is not None:
            self._keep("net.txt", str(net))
        with (self.folder / "versions.jsonl").open("a") as file:
            file.write(json.dumps(_versions()) + "\n")
        self._log = jsonl(self.folder / "log.jsonl")

    def __call__(self, step: int, state: Any, metrics: dict[str, Any]) -> None:
        """Append a line to the log."""
        self._log(step, state, metrics)

    def _keep(self, name: str, text: str) -> None:
        """Write a file, or raise if it exists with another text."""
        path = self.folder / name
        if not path.exists():
            path.write_text(text + "\n")
        elif (old := path.read_text()) != text + "\n":
            at, of = _difference(old, text)
            raise LayerError(f"{name} as this folder has it, {at}", of,
                             "name another folder: this one belongs to another run")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def _difference(old: str, new: str) -> tuple[str, str]:
    """The first lines in which two texts differ; "nothing" beyond the end of one."""
    lines, others = [*old.splitlines(), "nothing"], [*new.splitlines(), "nothing"]
    pair = next(pair for pair in zip(lines, others, strict=False) if len({*pair}) == 2)
    return clip(pair[0].strip()), clip(pair[1].strip())
