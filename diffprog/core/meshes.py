"""Meshes: where an array lies on them is part of its type, which loops and choices want equal.

Under `jax.shard_map` an array varies over axes of the mesh, on an explicit one it is sharded over
them; what is made inside of a layer, zeros or draws, is the same on all devices. Without a mesh
nothing is asked and nothing done.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from diffprog.core.errors import LayerError
from diffprog.core.notation import listed


def settled(step: Callable[[Any, Any], Any], carry: Any, xs: Any = None) -> Any:
    """The carry of a loop, lying as ``step(carry, x)`` gives it back; x is an entry of `xs`.

    A part may come to lie elsewhere only after another one does, so this is asked again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes + mesh.explicit_axes or any(
            a.shape[0] == 0 for a in jax.tree.leaves(xs)):
        return carry
    leaves, structure = jax.tree.flatten(carry)

    def after(leaves: Any, xs: Any) -> Any:
        return step(structure.unflatten(leaves), jax.tree.map(lambda a: a[0], xs))

    for _ in leaves:
        kinds = jax.make_jaxpr(after)(leaves, xs).out_avals
        moved = [_moved(leaf, kind, kind.sharding.spec) for leaf, kind in zip(
            leaves, kinds, strict=True)]
        if all(new is old for new, old in zip(moved, leaves, strict=True)):
            break
        leaves = moved
    return structure.unflatten(leaves)


def beside(a: jax.Array, x: jax.Array, *, below: int = 0) -> jax.Array:
    """`a`, lying as x does: sharded alike on the axes that are equally long, from the first on.

    Those of `a` begin `below` so many of its own.
    """
    kind, own = jax.typeof(x), jax.typeof(a).sharding.spec
    axes = [mine or (other if m == n else None) for m, n, mine, other in zip(
        a.shape[below:], x.shape, own[below:], kind.sharding.spec, strict=False)]
    return _moved(a, kind, PartitionSpec(*own[:below], *axes, *own[below + len(axes) :]))


def on_mesh(tree: Any) -> Any:
    """What lies on no mesh yet, as parameters that were made before one was set, on that mesh."""
    return jax.tree.map(lambda a: _moved(a, kind := jax.typeof(a), kind.sharding.spec), tree)


def placed(x: jax.Array, keep: int, more: int) -> NamedSharding | None:
    """Where an array lies whose first `keep` axes are those of x, and `more` are whole.

    For JAX to know where it cannot tell by itself; None where it has nothing to be told.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec[:keep]):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:keep], *[None] * more))


def reshaped(x: jax.Array, keep: int, *sizes: int) -> jax.Array:
    """x with other sizes after its first `keep` axes, over which it stays sharded."""
    return jnp.reshape(x, (*x.shape[:keep], *sizes), out_sharding=placed(x, keep, len(sizes)))


def _moved(a: jax.Array, kind: Any, spec: PartitionSpec) -> jax.Array:
    """`a` varying over the axes of a type too, and sharded by `spec` over its mesh."""
    if axes := varying(kind) - varying(own := jax.typeof(a)):
        a = jax.lax.pcast(a, tuple(sorted(axes, key=str)), to="varying")
    mesh = kind.sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh  # an array of no mesh yet
    if not mesh.explicit_axes or (own.sharding.mesh, own.sharding.spec) == (mesh, spec):
        return a
    return jax.sharding.reshard(a, NamedSharding(mesh, spec))


def unplaced(error: Exception, given: Any) -> LayerError | None:
    """What is wrong where JAX does not know how a result is sharded over an explicit mesh."""
    axes = {axis: None for leaf in jax.tree.leaves(given)
            for axis in jax.typeof(leaf).sharding.mesh.explicit_axes}
    if not axes or not re.search("shard|@", str(error), re.IGNORECASE):
        return None
    each = f" * {len(axes)}" if len(axes) > 1 else ""
    return LayerError(
        "arrays on a mesh of automatic axes", f"explicit axes ({listed(map(str, axes))})",
        f"pass axis_types=(jax.sharding.AxisType.Auto,){each} to jax.make_mesh: what is explicit "
        "needs a sharding of each result, which JAX cannot tell here")


def varying(kind: Any) -> frozenset[str]:
    """The axes of the mesh over which values of a type vary, under `jax.shard_map`."""
    now = getattr(kind, "manual_axis_type", None)
    return kind.vma if now is None else now.varying
