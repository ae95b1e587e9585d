"""Meshes: the placement of an array is part of its type, and loops need equal types.

Under `jax.shard_map` an array varies over axes of the mesh; on an explicit mesh it is sharded over
them. New arrays inside a layer, such as zeros or draws, are replicated, and must be given the
placement of the inputs. Without a mesh these functions do nothing.
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
    """The carry of a loop, placed as ``step(carry, x)`` returns it; x is an entry of `xs`.

    A part may change its placement only after another one does, so this is repeated.
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
    """`a` with the placement of x, on leading axes of equal sizes.

    The axes of `a` that correspond to those of x begin after the first `below`.
    """
    kind, own = jax.typeof(x), jax.typeof(a).sharding.spec
    axes = [mine or (other if m == n else None) for m, n, mine, other in zip(
        a.shape[below:], x.shape, own[below:], kind.sharding.spec, strict=False)]
    return _moved(a, kind, PartitionSpec(*own[:below], *axes, *own[below + len(axes) :]))


def on_mesh(tree: Any) -> Any:
    """Arrays without a mesh, such as parameters made before it was set, replicated on the mesh."""
    return jax.tree.map(lambda a: _moved(a, kind := jax.typeof(a), kind.sharding.spec), tree)


def placed(x: jax.Array, keep: int, more: int) -> NamedSharding | None:
    """The sharding of an array with the first `keep` axes of x, and `more` unsharded ones.

    For operations whose sharding JAX cannot infer; None if it need not be given.
    """
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec[:keep]):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:keep], *[None] * more))


def reshaped(x: jax.Array, keep: int, *sizes: int) -> jax.Array:
    """x with other sizes after its first `keep` axes, over which it stays sharded."""
    return jnp.reshape(x, (*x.shape[:keep], *sizes), out_sharding=placed(x, keep, len(sizes)))


def _moved(a: jax.Array, kind: Any, spec: PartitionSpec) -> jax.Array:
    """`a`, varying over the axes of `like` too, and sharded by `spec` over its mesh."""
    if axes := varying(kind) - varying(own := jax.typeof(a)):
        a = jax.lax.pcast(a, tuple(sorted(axes, key=str)), to="varying")
    mesh = kind.sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh  # an array without a mesh
    if not mesh.explicit_axes or (own.sharding.mesh, own.sharding.spec) == (mesh, spec):
        return a
    return jax.sharding.reshard(a, NamedSharding(mesh, spec))


def unplaced(error: Exception, given: Any) -> LayerError | None:
    """The error if JAX cannot infer how a result is sharded over an explicit mesh; else None."""
    axes = {axis: None for leaf in jax.tree.leaves(given)
            for axis in jax.typeof(leaf).sharding.mesh.explicit_axes}
    if not axes or not re.search("shard|@", str(error), re.IGNORECASE):
        return None
    each = f" * {len(axes)}" if len(axes) > 1 else ""
    return LayerError(
        "arrays on a mesh of automatic axes", f"explicit axes ({listed(map(str, axes))})",
        f"pass axis_types=(jax.sharding.AxisType.Auto,){each} to jax.make_mesh: explicit axes "
        "need a sharding of each result, which JAX cannot infer here")


def varying(kind: Any) -> frozenset[str]:
    """The axes of the mesh over which values of a type vary, under `jax.shard_map`."""
    now = getattr(kind, "manual_axis_type", None)
    return kind.vma if now is None else now.varying
