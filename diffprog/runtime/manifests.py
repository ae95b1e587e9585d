"""Manifests: the sha256 of each file of a checkpoint, so that no changed file is loaded.

A manifest is the last file of a checkpoint to be written, so a checkpoint without one is
incomplete. Its last line is the sha256 of the lines before.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from diffprog.core.errors import LayerError
from diffprog.core.notation import show

NAME = "manifest.json"


class Manifest(NamedTuple):
    """What is known of a checkpoint.

    Attributes:
        leaves: path -> dtype and shape.
        data: the position in the data, as JSON or bytes.
        metric: the value by which the best checkpoints are chosen; None if there is none.
        files: the sha256 of each file.
    """

    leaves: dict[str, str]
    data: Any
    metric: float | None
    files: dict[str, str]


class Broken(Exception):
    """A checkpoint that differs from its manifest."""


def as_json(data: Any) -> Any:
    """The position in the data as it is written into a manifest."""
    if isinstance(data, bytes):
        return {"bytes": base64.b64encode(data).decode()}
    try:
        same = repr(json.loads(json.dumps(data))) == repr(data)  # NaN equals itself here
    except (TypeError, ValueError):
        same = False
    if not same:
        raise LayerError("the position in the data as bytes, or as dicts, lists, strings and "
                         "numbers of Python", show(data), "convert it: JSON has no other types")
    return {"json": data}


def write(folder: pathlib.Path, leaves: dict[str, str], data: Any, metric: float | None) -> None:
    """Write the manifest of a folder whose other files are complete."""
    files = {path.relative_to(folder).as_posix(): _sha256(path)
             for path in sorted(folder.rglob("*")) if path.is_file()}
    text = json.dumps({"leaves": leaves, "data": data, "metric": metric, "files": files}, indent=1)
    text += f"\n{hashlib.sha256(text.encode()).hexdigest()}\n"
    part = folder / f"{NAME}.part"
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder / NAME)


def read(folder: pathlib.Path) -> Manifest:
    """The manifest of a folder; raise `Broken` if it was changed."""
    raw = (folder / NAME).read_bytes()
    text, _, _ = raw.removesuffix(b"\n").rpartition(b"\n")
    if raw != text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise Broken(f"{folder / NAME} was changed")
    known = json.loads(text)
    data = known.pop("data")
    data = base64.b64decode(data["bytes"]) if "bytes" in data else data["json"]
    return Manifest(data=data, **known)


def check_files(folder: pathlib.Path, files: dict[str, str]) -> None:
    """Raise `Broken` for a file that is missing, or differs from its sha256."""
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file():
            raise Broken(f"{path} is missing")
        if _sha256(path) != sha256:
            raise Broken(f"{path} was changed: its sha256 is another")


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
