"""Parameters that are computed from others: a leaf is replaced in place by a small tree.

What `reparam` does to a layer is kept in its record, so that the trees of a whole net can be
turned into those of the net without it (`merge`) and back (`unmerge`), however deep it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.dtypes import cast
from diffprog.errors import LayerError
from diffprog.notation import listed, show
from diffprog.parameters import fold
from diffprog.patterns import matches
from diffprog.plans import Params, State, reaches, remember, spec
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
        carry: ``tree -> carried``, what the state holds for the leaf; None for nothing.
        constant: the pattern of the paths inside a tree that no gradient reaches; "" for none.
        mark: the name in the state under which all that is carried stands, at the paths of the
            leaves; it begins with #, as no name of a child or leaf does.
    """

    make: Callable[[jax.Array, Any], Any]
    use: Callable[..., Any]
    pattern: Patterns
    but: Patterns = ()
    carry: Callable[[Any], Any] | None = None
    constant: str = ""
    mark: str = "#reparam"
    _found: dict[tuple[int, ...], Any] = dataclasses.field(init=False, default_factory=dict)

    def choose(self, params: Params) -> list[str]:
        """The paths of the leaves that are replaced; what a tool has marked is none of them."""
        if self.but:
            select(params, *_several(self.but))
        if not (chosen := [*filter(self._means, select(params, *_several(self.pattern)))]):
            raise LayerError("a leaf that is not left out", f"but={self.but!r}, which leaves out "
                             "all", "name fewer of them")
        return chosen

    def made(
        self, key: jax.Array, params: Params, state: State, stacks: Callable[[str], int]
    ) -> tuple[Params, State]:
        """The trees with small trees in the places of the leaves, and what these carry."""
        held: State = {}
        for path in self.choose(params):
            leaf, depth = _get(params, path), stacks(path)
            keys = jax.random.split(fold(key, f"make {path}"), leaf.shape[:depth])
            tree = _over(self.make, depth)(keys, leaf)
            params = _put(params, path, tree)
            if self.carry:
                held = _put(held, path, _over(self.carry, depth)(tree))
        return params, {**state, self.mark: held} if held else state

    def found(self, params: Params, stacks: Callable[[str], int]) -> tuple[str, ...]:
        """The paths of the small trees, which are known by themselves.

        One is what `make` gives for the leaf that `use` gives for it, in structure and shapes.
        """
        depths = tuple(map(stacks, paths(params)))
        if depths not in self._found:
            self._found[depths] = remember(lambda params: (
                tuple(self._find(params, stacks)) or self.choose(params)))
        return self._found[depths](spec(params))

    def leaf(self, tree: Any, carried: Any = None) -> Any:
        """The leaf of a small tree at rest; of one that is new if it carries nothing yet."""
        if not self.carry:
            return self.use(tree)
        return self.use(tree, self.carry(tree) if carried is None else carried, False)[0]

    def leaves(self, params: Params, stacks: Callable[[str], int]) -> Params:
        """The parameters with leaves in the places of small trees that are new."""
        for path in self.found(params, stacks):
            params = _put(params, path, _over(self.leaf, stacks(path))(_get(params, path)))
        return params

    def plain(
        self, params: Params, state: State, stacks: Callable[[str], int], train: bool = False,
        at: Sequence[str] | None = None,
    ) -> tuple[Params, State, State]:
        """The trees without it, and apart from them what it carries after the call.

        `at` are the paths of the small trees, if they are known.
        """
        held, after = state.get(self.mark, {}), {}
        rest = {name: part for name, part in state.items() if name != self.mark}
        for path in self.found(params, stacks) if at is None else at:
            tree = _get(params, path)
            tree = jax.tree.map(lambda held, leaf: jax.lax.stop_gradient(leaf) if held else leaf,
                                self.held(tree), tree)
            if self.carry:
                if (carried := _get(held, path)) is None:
                    raise LayerError(f"state with {self.mark}/{path}", listed(paths(state)),
                                     "pass state=, as init gave it")
                use = _over(lambda tree, carried: self.use(tree, carried, train), stacks(path))
                leaf, carried = use(tree, carried)
                after = _put(after, path, carried)
            else:
                leaf = _over(self.use, stacks(path))(tree)
            params = _put(params, path, leaf)
        return params, rest, {self.mark: after} if after else {}

    def held(self, tree: Any) -> Any:
        """The mask of a small tree that is True where no gradient goes."""
        held = [bool(self.constant) and matches(at, f"{self.constant}/**") for at in paths(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), held)

    def moves(self, tree: Any) -> bool:
        """Has the leaf of a small tree a gradient in it at rest? An average has none."""
        moves: list[bool] = []

        def evaluate(tree: Any) -> None:
            carried = self.carry(tree) if self.carry else None
            leaf, pull = jax.vjp(lambda tree: self.leaf(tree, carried), tree)
            moves.append(reaches(pull, leaf))

        jax.eval_shape(evaluate, tree)
        return moves[0]

    def _means(self, path: str) -> bool:
        """Is the leaf at a path meant?"""
        meant, but = (any(matches(path, pattern) for pattern in _several(patterns))
                      for patterns in (self.pattern, self.but))
        return meant and not but and "#" not in path

    def _find(self, params: Any, stacks: Callable[[str], int], at: str = "") -> Iterator[str]:
        """The paths of the small trees; a leaf that should be one is refused."""
        for name, tree in _level(params)[0].items():
            path = _path(at, name)
            one = _one(tree, stacks(path))
            if self._means(path) and self._is_made(one):
                yield path
            elif _level(tree)[0]:
                yield from self._find(tree, stacks, path)
            elif self._means(path) and hasattr(tree, "shape"):
                form = self._form(one)
                raise LayerError(f"{path} with {listed(paths(form))}" if isinstance(form, dict) else
                                 f"{path} as one array", show(tree),
                                 "pass the parameters of the reparametrized net: these are merged "
                                 "already, or of another one")

    def _form(self, leaf: Any) -> Any:
        """The shapes of the small tree of one leaf."""
        return jax.eval_shape(lambda leaf: self.make(jax.random.key(0), leaf), leaf)

    def _is_made(self, tree: Any) -> bool:
        """Is this one small tree, in shapes?"""
        try:
            leaf = jax.eval_shape(self.leaf, tree)
            again = self._form(leaf)
        except Exception:
            return False  # it is a level above them, or a leaf
        forms = [(jax.tree.structure(a), [leaf.shape for leaf in jax.tree.leaves(a)])
                 for a in (again, tree)]
        return hasattr(leaf, "shape") and forms[0] == forms[1]


class Expanded:
    """What `linearize` does: all that is inside is computed at the origin, which is in the state,
    and along the straight line from there to the parameters."""

    mark = "origin"


class Pinned(NamedTuple):
    """What `pin` does: all that is inside is computed in this mode, in training or at rest."""

    train: bool


class Mapped:
    """What `hyper` does: of its child ``target`` each leaf is an affine map in the trees."""


class WrittenOut:
    """What `unrolled` does to a repeat: its children are the copies, whose trees were stacked."""


Own = Computed | Expanded | Pinned | Mapped | WrittenOut


def merge(
    net: Layer, params: Params, state: State | None = None, *, train: bool = False
) -> tuple[Params, State]:
    """The trees of the net without its reparametrizations: every leaf is computed once.

    After fine-tuning by `lora` this gives what the plain net takes, with nothing left to compute;
    of `ema` it gives the averages, of `spectral_norm` the divided kernels. Whatever of your own
    reads parameters beside the net reads these; gradients flow through.

    Args:
        net: a net with `reparam`, or what is made by it, somewhere in it.
        params, state: its trees; None for no state.
        train: as the net computes in training, where `ema` has the parameters themselves.

    Returns:
        Parameters and state of the same net composed without them.

    Raises:
        LayerError: the net has none; parameters that were merged already.

    Example:
        >>> plain = dp.linear(3)
        >>> tuned = dp.lora(plain, rank=2)
        >>> params, state = tuned.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> merged, state = dp.merge(tuned, params, state)
        >>> plain(merged, jnp.ones((2, 4))).shape
        (2, 3)
    """
    _check_found(net)
    return plain(net, params, state or {}, train)


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
        >>> params, state = dp.unmerge(tuned, pretrained, key=jax.random.key(1))
        >>> bool(jnp.allclose(tuned(params, x), plain(pretrained, x)))
        True
    """
    _check_found(net)
    return _made(net, net.computed, "", 0, params, state or {}, key)


def trainable(net: Layer, params: Params) -> Params:
    """The tree of booleans that is False where `freeze` and `lora` let no gradient through.

    `make_step` hands exactly these parameters to the optimizer, so that no decay or penalty moves
    what is frozen and no memory is spent on its moments. In a loop of your own,
    ``optax.multi_transform({True: optimizer, False: optax.set_to_zero()}, mask)`` does.

    Args:
        net: any net.
        params: its parameters, or their shapes.

    Example:
        >>> net = dp.lora(dp.linear(3), rank=2)
        >>> params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> dp.trainable(net, params)
        {'bias': True, 'kernel': {'base': False, 'down': True, 'up': True}}
    """
    trained = jax.tree.map(lambda leaf: True, params)
    for path, own, *_ in _replaced(net, net.computed, params):
        tree = _get(trained, path)
        trained = _put(trained, path, jax.tree.map(
            lambda free, held: free and not held, tree, own.held(tree)))
    return trained


def freezes(net: Layer) -> bool:
    """Is there something in a net that no gradient reaches?"""
    inside = any(map(freezes, net.children.values()))
    return inside or any(own.constant for own in net.computed if isinstance(own, Computed))


def idle(net: Layer, params: Params) -> list[str]:
    """The paths of the leaves that are trained but have no gradient at rest, as averages are."""
    return [path for path, own, one, train in _replaced(net, net.computed, params)
            if own.carry and not train and not own.moves(one)]


def statistics(layer: Layer, state: State, train: bool) -> State:
    """The part of a state that moves by the inputs in this mode, and not by parameters."""
    carried = {own.mark for own in layer.computed if isinstance(own, (Computed, Expanded))}
    train = mode(layer.computed, train)
    found = {name: part for name, part in state.items()
             if train and name not in carried | layer.children.keys()}
    for name, child in layer.children.items():
        found = _put(found, name, statistics(child, state.get(name, {}), train))
    return found


def mode(computed: Sequence[Own], train: bool) -> bool:
    """In which mode all of these are inside, where the net is in `train`; the inner one counts."""
    return next((own.train for own in reversed(computed) if isinstance(own, Pinned)), train)


def trained(net: Layer, params: Params) -> tuple[Params, Callable[[Params], Params]]:
    """The parameters that are trained alone, and what puts such among the others."""
    if not freezes(net):
        return params, lambda part: part
    free, whole = trainable(net, params), jax.tree.structure(params)
    part: Params = {}
    for path, leaf in paths(params).items():
        if paths(free)[path]:
            part = _put(part, path, leaf)
    if not part:
        raise LayerError("a net with something to train", f"{net!r}, which is frozen",
                         "freeze less of it: name what trains by but=")
    return part, lambda part: whole.unflatten(
        [paths(part).get(path, leaf) for path, leaf in paths(params).items()])


def check_moves(net: Layer, params: Params, remedy: str) -> None:
    """Raise if parameters that are trained have no gradient at rest."""
    if still := idle(net, params):
        raise LayerError("parameters that have a gradient at rest",
                         f"averages in the place of {listed(still)}", remedy)


def plain(
    layer: Layer, params: Params, state: State, train: bool = False
) -> tuple[Params, State]:
    """The trees of a layer as those of the layer without reparametrizations, if it has any."""
    return _plain(layer, layer.computed, 0, params, state, train)


def _plain(
    layer: Layer, computed: Sequence[Own], above: int, params: Params,
    state: State, train: bool,
) -> tuple[Params, State]:
    """`plain` of a layer of which these are left, the outer before the inner."""
    if not computes(layer, computed):
        return params, state
    if computed:
        own, *inner = computed
        if isinstance(own, Pinned):
            return _plain(layer, inner, above, params, state, own.train)
        if isinstance(own, Mapped):
            return _plain(layer, inner, above, params, state, train)
        if isinstance(own, WrittenOut):
            copies, states = _plain(layer, inner, above, params, state, train)
            return _stacked(copies), _stacked(states)
        if isinstance(own, Expanded):
            origin = state.get("origin", {})
            rest = {name: part for name, part in state.items() if name != "origin"}
            begin, way, rest = jax.jvp(
                lambda params: _plain(layer, inner, above, params, rest, train), (origin,),
                (jax.tree.map(jnp.subtract, params, origin),), has_aux=True)
            return jax.tree.map(jnp.add, begin, way), {**rest, "origin": begin}
        stacks = _stacks(layer, above)
        return _plain(layer, inner, above, *own.plain(params, state, stacks, train)[:2], train)
    for name, child in layer.children.items():
        if own := params.get(name):
            below, rest = _plain(child, child.computed, above + layer.stacks, own,
                                 state.get(name, {}), train)
            params, state = {**params, name: below}, _put(state, name, rest)
    return params, state


def _stacked(copies: dict[str, Any]) -> dict[str, Any]:
    """The trees of copies as one, on a new first axis."""
    return jax.tree.map(lambda *each: jnp.stack(each), *copies.values()) if copies else {}


def _made(
    layer: Layer, computed: Sequence[Own], at: str, above: int, params: Params,
    state: State, key: jax.Array,
) -> tuple[Params, State]:
    """`unmerge` of a layer at a path of which these are left; the inner ones are made first."""
    if not computes(layer, computed):
        return params, state
    if computed:
        own, *inner = computed
        make = lambda params, state: _made(  # noqa: E731
            layer, inner, at, above, params, state, key)
        if isinstance(own, Expanded):
            rest = {name: part for name, part in state.items() if name != "origin"}
            origin, state = make(state.get("origin", {}), rest)
            return make(params, rest)[0], {**state, "origin": origin}
        params, state = make(params, state)
        if isinstance(own, Computed):
            params, state = own.made(fold(key, at), params, state, _stacks(layer, above))
        return params, state
    for name, child in layer.children.items():
        below, rest = _made(child, child.computed, _path(at, name), above + layer.stacks,
                            params.get(name, {}), state.get(name, {}), key)
        params, state = _put(params, name, below), _put(state, name, rest)
    return params, state


def computes(layer: Layer, computed: Sequence[Own]) -> bool:
    """Is there something to compute in a layer of which these are left?"""
    inside = any(computes(child, child.computed) for child in layer.children.values())
    return inside or any(isinstance(own, (Computed, WrittenOut)) for own in computed)


def _stacks(layer: Layer, above: int) -> Callable[[str], int]:
    """How many axes for copies the leaf at a path has, `above` of them around the layer."""
    return lambda path: above + stacks_at(layer, path)


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


def _replaced(
    layer: Layer, computed: Sequence[Own], params: Params, at: str = "", above: int = 0,
    train: bool = False,
) -> Iterator[tuple[str, Computed, Any, bool]]:
    """The path of each small tree, what it is of, the shapes of one copy, and its mode at rest.

    The outer come first. Of what is done to the layer at a path, these are left.
    """
    if not computes(layer, computed):
        return
    if computed:
        own, *inner = computed
        if isinstance(own, Pinned):
            train = own.train
        if isinstance(own, Mapped):
            params = {**params, "target": _written(params.get("target", {}))}
        if isinstance(own, Computed):
            stacks = _stacks(layer, above)
            for path in own.found(params, stacks):
                yield _path(at, path), own, _one(_get(params, path), stacks(path)), train
            params = jax.eval_shape(lambda params: own.leaves(params, stacks), spec(params))
        yield from _replaced(layer, inner, params, at, above, train)
        return
    for name, child in layer.children.items():
        yield from _replaced(child, child.computed, params.get(name, {}), _path(at, name),
                             above + layer.stacks, train)


def _written(maps: Params) -> Params:
    """The leaves that `hyper` writes for its target, in shapes: those of the biases of its maps."""
    is_map = lambda part: isinstance(part, dict) and part.keys() == {"kernel", "bias"} and (  # noqa: E731
        not any(isinstance(a, dict) for a in part.values()))
    return jax.tree.map(lambda part: part["bias"] if is_map(part) else part, maps, is_leaf=is_map)


def _one(tree: Any, depth: int) -> Any:
    """The shapes of one copy of a tree that is stacked so often."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[depth:], a.dtype), tree)


def _check_found(net: Layer) -> None:
    if not computes(net, net.computed):
        raise LayerError("a net with computed parameters", repr(net), "pass the net that was made "
                         "by reparam, lora or the like: parameters of any other are plain")


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
    """What stands at a path of a tree; None for nothing."""
    if not path:
        return tree
    for name, part in _level(tree)[0].items():
        if (rest := _behind(name, path)) is not None and (found := _get(part, rest)) is not None:
            return found
    return None


def _put(tree: Any, path: str, value: Any) -> Any:
    """The tree with another value at a path; what is empty is left out of nested dicts."""
    if not path:
        return value
    parts, again = _level(tree)
    there = (name for name, part in parts.items() if (rest := _behind(name, path)) is not None
             and _get(part, rest) is not None)
    name = next(there, path.partition("/")[0])
    below = _put(parts.get(name, {}), path[len(name) + 1 :], value)
    if not isinstance(tree, dict):
        return again(parts | {name: below})
    if below is None or (isinstance(below, dict) and not below):
        return {other: part for other, part in tree.items() if str(other) != name}
    return {**tree, {str(other): other for other in tree}.get(name, name): below}


def _level(tree: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """The parts of a tree by name, one level deep, and what makes it anew of others."""
    found, form = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    names = [jax.tree_util.keystr(at, simple=True) for at, _ in found]
    if names == [""]:
        return {}, lambda parts: tree  # a leaf
    return (dict(zip(names, (part for _, part in found), strict=True)),
            lambda parts: form.unflatten([parts[name] for name in names]))


def _behind(name: str, path: str) -> str | None:
    """What is left of a path behind a name, which may hold / itself; None for another name."""
    return path[len(name) + 1 :] if f"{path}/".startswith(f"{name}/") else None
