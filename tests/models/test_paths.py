"""The paths of all models are pinned: renaming a parameter would break checkpoints."""

import json

import pytest
from golden import FOLDER, MODELS, structure


@pytest.mark.parametrize("name", MODELS)
def test_paths_shapes_and_dtypes_are_pinned(name):
    wanted = json.loads((FOLDER / f"{name}.json").read_text())
    assert structure(name) == wanted, "if intended, run: python tests/models/golden.py"
