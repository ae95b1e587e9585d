"""Single modules agree with PyTorch: outputs, gradients, and statistics after a step."""

import fnmatch

import jax
import numpy as np
import pytest
from recipes import AGAIN, ELSEWHERE, RECIPES
from reference import CASES, differences

pytestmark = pytest.mark.usefixtures("optimized")
TOLERANCE = {"out": 1e-5, "grad_in": 1e-5, "grad_param": 1e-5, "buffer_after": 2e-6}
PATTERNS = [*RECIPES, *ELSEWHERE]


def cases(table):
    return [(pattern, case) for pattern in table for case in fnmatch.filter(CASES, pattern)]


def agree(found):
    far = {path: value for path, value in found.items()
           if not value <= TOLERANCE[path.partition("/")[0]]}
    assert not far, far


def test_every_case_is_in_one_table():
    """Nothing is left out in silence: what stands in another file is listed as such."""
    tables = {case: [p for p in PATTERNS if fnmatch.fnmatchcase(case, p)] for case in CASES}
    assert {case: found for case, found in tables.items() if len(found) != 1} == {}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_matches_a_case(pattern):
    assert fnmatch.filter(CASES, pattern)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "case"), cases(RECIPES))
def test_a_module_agrees(pattern, case):
    agree(differences(case, RECIPES[pattern]))


@pytest.mark.parametrize(("pattern", "case"), cases(AGAIN))
def test_a_second_recipe_agrees(pattern, case):
    agree(differences(case, AGAIN[pattern]))


@pytest.mark.parametrize(("pattern", "case", "tree", "far"), [
    ("Conv?d_*", "Conv2d_0", "params", ["grad_in/x", "out/y"]),
    ("Linear*", "Linear", "params", ["grad_in/x", "out/y"]),
    ("BatchNorm*_train*", "BatchNorm1d_train", "state", ["buffer_after/mean", "buffer_after/var"]),
])
def test_parameters_off_by_a_thousandth_are_detected(pattern, case, tree, far):
    def change(trees):
        return trees | {tree: jax.tree.map(lambda leaf: leaf * np.float32(1.001), trees[tree])}

    found = differences(case, RECIPES[pattern], change=change)
    assert sorted(path for path, value in found.items() if value > 1e-4) == far
    with pytest.raises(AssertionError):
        agree(found)
