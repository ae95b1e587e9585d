"""Parameters that are computed from others: a leaf is replaced in place by a small tree.

What `reparam` does to a layer is kept in its record, so that the trees of a whole net can be
turned into those of the net without it (`merge`) and back (`unmerge`), however deep it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from diffprog.dtypes import cast
from diffprog.errors import LayerError
from diffprog.notation import listed, show
from diffprog.parameters import fold
from diffprog.patterns import matches
from diffprog.plans import Params, State
from diffprog.tree import paths, select

if TYPE_CHECKING:
    from diffprog.layer import Layer

__all__ = ["merge", "trainable", "unmerge"]

Patterns = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """How the leaves of a layer that match a pattern are computed from small trees.

    Attributes:
        make: ``(key, leaf) -> tree``, what stands in the place of the leaf.
        use: ``tree -> leaf``; with `carry`, ``(tree, carried, train) -> (leaf, carried)``.
        pattern, but: of the paths of leaves that are meant, and of those that are not.
        carry: ``tree -> carried``, what stands at the same path of the state; None for nothing.
        constant: the pattern of the paths inside a tree that no gradient reaches; "" for none.
    """

    make: Callable[[jax.Array, Any], Any]
    use: Callable[..., Any]
    pattern: Patterns
    but: Patterns = ()
    carry: Callable[[Any], Any] | None = None
    constant: str = ""
    # The structure of each tree that was made, by path: what `merge` knows it by.
    forms: dict[str, Any] = dataclasses.field(default_factory=dict)

    def choose(self, params: Params) -> list[str]:
        """The paths of the leaves that are replaced."""
        but = select(params, *_several(self.but)) if self.but else ()
        chosen = [path for path in select(params, *_several(self.pattern)) if path not in but]
        if not chosen:
            raise LayerError("a leaf that is not left out", f"but={self.but!r}, which leaves out "
                             "all", "name fewer of them")
        return chosen

    def made(
        self, key: jax.Array, params: Params, state: State, stacks: Callable[[str], int]
    ) -> tuple[Params, State]:
        """The trees with small trees in the places of the leaves, and what these carry."""
        for path in self.choose(params):
            leaf, depth = _get(params, path), stacks(path)
            keys = jax.random.split(fold(key, f"make {path}"), leaf.shape[:depth])
            tree = _over(self.make, depth)(keys, leaf)
            self.forms[path] = jax.tree.structure(tree)
            params = _put(params, path, tree)
            if self.carry:
                state = _put(state, path, _over(self.carry, depth)(tree))
        return params, state

    def plain(
        self, params: Params, state: State, stacks: Callable[[str], int], train: bool = False
    ) -> tuple[Params, State, State]:
        """The trees without it, and apart from them what it carries after the call."""
        after: State = {}
        for path, form in self.forms.items():
            tree = _get(params, path)
            if tree is None:
                continue  # this recipe has it in another place, where its input has other parts
            if jax.tree.structure(tree) != form:
                names = list(paths(form.unflatten([0] * form.num_leaves)))
                raise LayerError(f"{path} with {listed(names)}" if form.num_nodes > 1 else
                                 f"{path} as one array", show(tree),
                                 "pass the parameters of the reparametrized net: these are merged "
                                 "already, or of another one")
            tree = jax.tree.map(lambda held, leaf: jax.lax.stop_gradient(leaf) if held else leaf,
                                self.held(tree), tree)
            if self.carry:
                if _get(state, path) is None:
                    raise LayerError(f"state with {path}", listed(paths(state)),
                                     "pass state=, as init gave it")
                use = _over(lambda tree, carried: self.use(tree, carried, train), stacks(path))
                leaf, carried = use(tree, _get(state, path))
                state, after = _put(state, path, None), _put(after, path, carried)
            else:
                leaf = _over(self.use, stacks(path))(tree)
            params = _put(params, path, leaf)
        return params, state, after

    def held(self, tree: Any) -> Any:
        """The mask of a small tree that is True where no gradient goes."""
        held = [bool(self.constant) and matches(at, f"{self.constant}/**") for at in paths(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), held)


def merge(net: Layer, params: Params, state: State | None = None) -> tuple[Params, State]:
    """The trees of the net without its reparametrizations: every leaf is computed once.

    After fine-tuning by `lora` this gives what the plain net takes, with nothing left to compute;
    of `ema` it gives the averages, of `spectral_norm` the divided kernels.

    Args:
        net: a net with `reparam`, or what is made by it, somewhere in it, that was planned:
            its `init`, `plan` or `apply` was called on an input.
        params, state: its trees; None for no state.

    Returns:
        Parameters and state of the same net composed without them.

    Raises:
        LayerError: the net has none, or was not planned; parameters that were merged already.

    Example:
        >>> plain = dp.linear(3)
        >>> tuned = dp.lora(plain, rank=2)
        >>> params, state = tuned.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> merged, state = dp.merge(tuned, params, state)
        >>> plain(merged, jnp.ones((2, 4))).shape
        (2, 3)
    """
    _found(net)
    return plain(net, params, state or {})


def unmerge(
    net: Layer, params: Params, state: State | None = None, *, key: jax.Array
) -> tuple[Params, State]:
    """The trees of the net from those of the net without reparametrizations: `merge` turned round.

    So fine-tuning begins from parameters that are there.

    Args:
        net: as in `merge`.
        params, state: trees of the same net composed without reparametrizations.
        key: of what is drawn, such as the factors of `lora`.

    Raises:
        LayerError: as in `merge`; a leaf that is to be replaced is missing.

    Example:
        >>> plain, x = dp.linear(3), jnp.ones((2, 4))
        >>> pretrained, _ = plain.init(jax.random.key(0), x)
        >>> tuned = dp.lora(plain, rank=2)
        >>> plan = tuned.plan(x)
        >>> params, state = dp.unmerge(tuned, pretrained, key=jax.random.key(1))
        >>> bool(jnp.allclose(tuned(params, x), plain(pretrained, x)))
        True
    """
    state = state or {}
    # Inner ones first: an outer one replaces leaves of what the inner ones have made.
    for at, own, stacks in reversed(_found(net)):
        below = own.made(fold(key, at), _get(params, at) or {}, _get(state, at) or {}, stacks)
        params, state = _put(params, at, below[0]), _put(state, at, below[1])
    return params, state


def trainable(net: Layer, params: Params) -> Params:
    """The tree of booleans that is False where `freeze` and `lora` let no gradient through.

    `make_step` hands exactly these parameters to the optimizer, so that no decay or penalty moves
    what is frozen and no memory is spent on its moments. In a loop of your own,
    ``optax.multi_transform({True: optimizer, False: optax.set_to_zero()}, mask)`` does.

    Args:
        net: any net; if reparametrized, one that was planned.
        params: its parameters, or their shapes.

    Raises:
        LayerError: a reparametrized net was not planned.

    Example:
        >>> net = dp.lora(dp.linear(3), rank=2)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> dp.trainable(net, params)
        {'bias': True, 'kernel': {'base': False, 'down': True, 'up': True}}
    """
    trained = jax.tree.map(lambda leaf: True, params)
    for at, own, _ in _computed(net):
        for path in own.forms:
            whole = _path(at, path)
            tree = _get(trained, whole)
            if tree is not None:
                trained = _put(trained, whole, jax.tree.map(
                    lambda free, held: free and not held, tree, own.held(tree)))
    return trained


def freezes(net: Layer) -> bool:
    """Is there something in a net that no gradient reaches?"""
    inside = any(map(freezes, net.children.values()))
    return inside or any(own.constant for own in net.computed)


def plain(
    layer: Layer, params: Params, state: State, train: bool = False
) -> tuple[Params, State]:
    """The trees of a layer as those of the layer without reparametrizations, if it has any."""
    for at, own, stacks in _computed(layer):
        if below := _get(params, at):
            below, carried, _ = own.plain(below, _get(state, at) or {}, stacks, train)
            params, state = _put(params, at, below), _put(state, at, carried)
    return params, state


def reader(
    children: Mapping[str, Layer], params: Params, state: State, train: bool = False
) -> Callable[[str], Params]:
    """What reads the plain parameters of a child by its name."""
    return lambda name: cast(plain(
        children[name], params.get(name, {}), state.get(name, {}), train)[0], children[name].dtype)


def stacks_at(layer: Layer, path: str) -> int:
    """How many leading axes the leaf at a path of a layer's trees has for copies of the layer."""
    name, _, rest = path.partition("/")
    below = layer.children.get(name)
    return layer.stacks + (stacks_at(below, rest) if below else 0)


def _computed(
    layer: Layer, at: str = "", above: int = 0
) -> Iterator[tuple[str, Computed, Callable[[str], int]]]:
    """Where a net has computed parameters, the outer before the inner."""
    for own in layer.computed:
        if not own.forms:
            raise LayerError("a net that was planned", repr(layer),
                             "call net.plan(x) first: which leaves match depends on the input")
        yield at, own, lambda path: above + stacks_at(layer, path)
    for name, child in layer.children.items():
        yield from _computed(child, _path(at, name), above + layer.stacks)


def _found(net: Layer) -> list[tuple[str, Computed, Callable[[str], int]]]:
    if not (found := list(_computed(net))):
        raise LayerError("a net with computed parameters", repr(net), "pass the net that was made "
                         "by reparam, lora or the like: parameters of any other are plain")
    return found


def _several(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _over(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """The function of one copy, mapped over the leading axes of stacked ones."""
    for _ in range(depth):
        function = jax.vmap(function)
    return function


def joined(one: State, other: State) -> State:
    """Nested dicts with the parts of both."""
    both = {name: joined(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def _path(at: str, path: str) -> str:
    return f"{at}/{path}" if at and path else at or path


def _get(tree: Any, path: str) -> Any:
    """What stands at a path of nested dicts; None for nothing."""
    for name in path.split("/") if path else ():
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _put(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The nested dicts with another value at a path; what is empty is left out."""
    if not path:
        return value
    name, _, rest = path.partition("/")
    below = _put(tree.get(name, {}), rest, value)
    if below is None or (isinstance(below, dict) and not below):
        return {other: part for other, part in tree.items() if other != name}
    return {**tree, name: below}
