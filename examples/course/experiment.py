"""An experiment of the course: a function that measures figures, states claims and draws pictures.

    python examples/course/<name>.py [--short] [--seed N] [--out FOLDER]

A full run writes its pictures and `result.json` to the folder, `<name>` by default. The pages in
docs/course show what is in `docs/course/<name>`. A short run takes seconds, writes the pictures,
and checks the same claims. A claim that does not hold ends both with an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

import diffprog as dp

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # examples/, where style.py is

A = TypeVar("A")


@dataclasses.dataclass
class Experiment:
    """What an experiment is asked for, and what it found.

    Attributes:
        short: whether seconds must suffice.
        seed: of all randomness.
        out: the folder of the pictures.
        figures: name -> number, in the order of measurement.
        claims: sentence -> whether it holds.
        pictures: file name -> caption.
    """

    short: bool
    seed: int
    out: pathlib.Path
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    claims: dict[str, bool] = dataclasses.field(default_factory=dict)
    pictures: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> jax.Array:
        """A PRNG key of the seed."""
        return jax.random.key(self.seed)

    @property
    def rng(self) -> np.random.Generator:
        """A new NumPy generator of the seed."""
        return np.random.default_rng(self.seed)

    def pick(self, full: A, short: A) -> A:
        """The value for a full run or for a short one."""
        return short if self.short else full

    def record(self, name: str, value: Any) -> float:
        """Keep a figure, and print it. The name says what it is, with its unit."""
        self.figures[name] = float(f"{float(value):.4g}")
        print(f"{name}: {self.figures[name]:g}", flush=True)
        return float(value)

    def claim(self, sentence: str, holds: Any) -> None:
        """State what the figures show; the run fails at its end if it does not hold."""
        self.claims[sentence] = bool(holds)

    def save(self, figure: Any, name: str, caption: str) -> None:
        """Save a picture as `name`.png, or an animation of matplotlib as `name`.gif."""
        if hasattr(figure, "savefig"):
            file = f"{name}.png"
            figure.savefig(self.out / file)
        else:
            file = f"{name}.gif"
            figure.save(self.out / file, writer="pillow", fps=8)
        self.pictures[file] = caption


def run(main: Callable[[Experiment], None]) -> None:
    """Run an experiment from the command line."""
    script = pathlib.Path(sys.modules[main.__module__].__file__ or "")
    parser = argparse.ArgumentParser(
        description=(sys.modules[main.__module__].__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="seconds; writes no result.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(script.stem))
    args = parser.parse_args()

    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    args.out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(args.short, args.seed, args.out)
    began = time.process_time()
    main(experiment)
    seconds = time.process_time() - began

    for sentence, holds in experiment.claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {sentence}")
    print(f"{seconds:.0f} s of CPU time, pictures in {args.out}")
    if not all(experiment.claims.values()):
        sys.exit("a claim does not hold")
    if not args.short:
        result = {
            "script": script.name,
            "sha256": digest,
            "seed": args.seed,
            "cpu_seconds": round(seconds),
            "versions": {"python": platform.python_version(), "jax": jax.__version__,
                         "diffprog": dp.__version__, "numpy": np.__version__},
            "figures": experiment.figures,
            "claims": list(experiment.claims),
            "pictures": experiment.pictures,
        }
        (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
