"""A hash of the programs and of the parameters of every case, to show that a change keeps them.

Run ``python tests/support/fingerprints.py --write`` before a change that only moves or renames
things, and without ``--write`` after it. The hashes hold for one version of JAX, since another one
writes other programs; so they are no test.
"""

import functools
import hashlib
import json
import pathlib
import re
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from cases import CASES

from diffprog.core.dtypes import is_float
from diffprog.core.errors import LayerError
from diffprog.core.layer import as_layer
from diffprog.core.paths import paths

FILE = pathlib.Path(__file__).with_name("fingerprints.json")


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def program(function, *args):
    """The jaxpr of a function as text, without addresses in memory and the homes of functions."""
    text = str(jax.make_jaxpr(function)(*args))
    return re.sub(r" at 0x[0-9a-f]+|diffprog(\.\w+)*|\S+\.py:\d+", "", text)


def values(tree):
    """Paths, dtypes and bytes of the leaves."""
    return "\n".join(f"{path} {leaf.dtype} {leaf.shape} {np.asarray(leaf).tobytes().hex()}"
                     for path, leaf in paths(tree).items())


def fingerprint(case):
    """The hash of each thing that a case computes."""
    layer, key = as_layer(case.layer), jax.random.key(0)
    x, side = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (case.x, case.side))
    params, state = layer.init(key, x, **side)
    given = params, state, x, key, side

    def apply(params, state, x, key, side, train):
        return layer.apply(params, state, x, key=key, train=train, **side)

    def loss(params, state, x, key, side):
        y = apply(params, state, x, key, side, True)
        return sum((a.sum() for a in jax.tree.leaves(y) if is_float(a)), jax.numpy.zeros(()))

    found = {
        "params": values((params, state)),
        "inference": program(functools.partial(apply, train=False), *given),
        "training": program(functools.partial(apply, train=True), *given),
        "gradient": program(jax.grad(loss), *given),
    }
    if layer.start is not None:

        def start(params, state, x, side):
            try:
                return layer.start(params, state, x, length=9, **side)
            except LayerError:
                return {}

        found["start"] = program(start, params, state, x, side)
    return {name: digest(text) for name, text in found.items()}


def main():
    found = {}
    for case in CASES:
        assert case.name not in found, case.name
        found[case.name] = fingerprint(case)
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return print(f"{len(found)} cases written")
    wanted = json.loads(FILE.read_text())
    other = {f"{name}: {part}" for name in wanted.keys() | found.keys()
             for part in {**wanted.get(name, {}), **found.get(name, {})}
             if wanted.get(name, {}).get(part) != found.get(name, {}).get(part)}
    print(*sorted(other), sep="\n")
    print(f"{len(found)} cases, {len(other)} differences")
    return sys.exit(bool(other))


if __name__ == "__main__":
    main()
