"""Tests compile thousands of programs and run each once: so they are hardly optimized.

A test asks for `optimized` where the compiled program itself, or the rounding of what users run,
is the matter.
"""

import collections
import gc
import importlib
import itertools
import os
import pathlib
import signal
from typing import Any

import jax
import pytest
from jax._src import compiler
from jax._src.interpreters import mlir

# Cutting a program into parts, to be compiled side by side, takes a fifth of the time of compiling.
QUICK: dict[str, Any] = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 12):
    # A fused loop written by XLA's older emitters compiles in half the time of one by its newer
    # ones; jax 0.12 has no others, and refuses the option.
    QUICK["xla_cpu_use_fusion_emitters"] = False
else:
    # Its XLA sums some products of bfloat16 in bfloat16 on CPU, the gradient of a plain linear map
    # too (ones of (2, 2048, 4) give 2048 for 4096). What a layer sums is the matter of the tests.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_experimental_ynn_fusion_type=").strip()
COMPILED = jax.make_user_context("quickly")  # what was compiled one way is not taken for the other
_options = compiler.get_compile_options
made = []  # how each program in memory was compiled


def options(*args, env_options_overrides=None, **kwargs):
    """What JAX tells XLA: to compile quickly, unless a test asks for `optimized`."""
    made.append(COMPILED.value)
    if COMPILED.value == "quickly":
        env_options_overrides = QUICK | (env_options_overrides or {})
    return _options(*args, env_options_overrides=env_options_overrides, **kwargs)


compiler.get_compile_options = options

_make_context = mlir.make_ir_context
_contexts = itertools.count(), []


def context():
    """JAX makes a context of MLIR for each program, which takes most of the time of lowering a
    small one: here some hundreds share one, and then a new one lets their constants go.
    """
    number, kept = _contexts
    if next(number) % 500 == 0:
        kept[:] = [_make_context()]
    return kept[0]


mlir.make_ir_context = context
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimized():
    """Compile as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    with COMPILED("as users do"):
        yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def interruptible():
    """Ctrl-C as Python handles it, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """Programs take a megabyte each, and few serve more than one file of tests."""
    yield
    if len(made) > 2000:
        jax.clear_caches()
        made.clear()


# Libraries whose networks become layers, and the files with tests and examples that import them.
NEIGHBOURS = {
    "equinox": {"test_interop.py", "test_errors.py", "equinox.py"},
    "flax": {"test_interop.py", "test_errors.py", "linen.py", "nnx.py"},
    "haiku": {"test_interop.py", "test_errors.py", "haiku.py"},
    "numpyro": {"test_interop_stax.py"},
}
left_out = {}  # library -> why it does not import


def pytest_addoption(parser):
    parser.addoption("--newest", action="store_true", help="a neighbouring library that does not "
                     "import with these versions is left out, by name, with its files of tests")


def pytest_configure(config):
    """Import the neighbours first: what one of them raises against a new JAX is its own."""
    for name in NEIGHBOURS if config.getoption("--newest") else ():
        try:
            importlib.import_module(name)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"


def pytest_ignore_collect(collection_path: pathlib.Path):
    if any(collection_path.name in NEIGHBOURS[name] for name in left_out):
        return True
    return None


def pytest_collection_finish():
    """What was imported stays; looking through it for garbage again and again costs seconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_terminal_summary(terminalreporter):
    """Print what was left out, and what the random nets were made of, over all processes."""
    for name, why in left_out.items():
        terminalreporter.write_line(
            f"{name} does not import, {why}: left out with {', '.join(sorted(NEIGHBOURS[name]))}")
    drawn = collections.Counter()
    for report in terminalreporter.stats.get("passed", ()):
        for name, counts in getattr(report, "user_properties", ()):
            drawn.update(counts if name == "drawn" else {})
    if drawn:
        parts = ", ".join(f"{name} {count}" for name, count in drawn.most_common())
        terminalreporter.write_line(f"random nets under every law: {parts}")
