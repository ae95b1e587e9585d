"""Parameters that are computed from others: a leaf is replaced in place by a small tree.

What `reparam` does to a layer is kept in its record, so that the trees of a whole net can be
turned into those of the net without it (`merge`) and back (`unmerge`), however deep it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from diffprog.core.errors import LayerError
from diffprog.core.notation import listed, show
from diffprog.core.parameters import fold
from diffprog.core.paths import joined, level, part_at, paths, put, select
from diffprog.core.patterns import matches
from diffprog.core.plans import Params, State, reaches, remember, spec

Patterns = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """How the leaves of a layer that match a pattern are computed from small trees.

    Attributes:
        make: ``(key, leaf) -> tree``, the small tree that replaces the leaf.
        use: ``tree -> leaf``; with `carry`, ``(tree, carried, train) -> (leaf, carried)``.
        pattern, exclude: of the paths of the leaves that are replaced, and of exceptions.
        carry: ``tree -> carried``, the initial state for the leaf; None for no state.
        constant: the pattern of the paths inside a small tree without a gradient; "" for none.
        mark: the key in the state that holds what is carried, at the paths of the leaves. It
            begins with #, which no child or leaf may.
    """

    make: Callable[[jax.Array, Any], Any]
    use: Callable[..., Any]
    pattern: Patterns
    exclude: Patterns = ()
    carry: Callable[[Any], Any] | None = None
    constant: str = ""
    mark: str = "#reparam"
    _found: dict[tuple[int, ...], Any] = dataclasses.field(init=False, default_factory=dict)

    def choose(self, params: Params) -> list[str]:
        """The paths of the leaves that are replaced; leaves with a # in their path never are."""
        if self.exclude:
            select(params, *_several(self.exclude))
        if not (chosen := [*filter(self._means, select(params, *_several(self.pattern)))]):
            raise LayerError("a leaf that is not excluded",
                             f"exclude={self.exclude!r}, which excludes all", "exclude fewer")
        return chosen

    def made(
        self, key: jax.Array, params: Params, state: State, stacks: Callable[[str], int]
    ) -> tuple[Params, State]:
        """Parameters with a small tree for each leaf, and the state with what these carry."""
        held: State = {}
        for path in self.choose(params):
            leaf, depth = part_at(params, path), stacks(path)
            keys = jax.random.split(fold(key, f"make {path}"), leaf.shape[:depth])
            tree = _over(self.make, depth)(keys, leaf)
            params = put(params, path, tree)
            if self.carry:
                held = put(held, path, _over(self.carry, depth)(tree))
        return params, {**state, self.mark: held} if held else state

    def found(self, params: Params, stacks: Callable[[str], int]) -> tuple[str, ...]:
        """The paths of the small trees in `params`, recognized by their structure and shapes.

        A subtree is one if ``make(key, use(subtree))`` has the same structure and shapes.
        """
        depths = tuple(map(stacks, paths(params)))
        if depths not in self._found:
            self._found[depths] = remember(lambda params: (
                tuple(self._find(params, stacks)) or self.choose(params)))
        return self._found[depths](spec(params))

    def leaf(self, tree: Any, carried: Any = None) -> Any:
        """The leaf that a small tree stands for at inference; without `carried`, of a new tree."""
        if not self.carry:
            return self.use(tree)
        return self.use(tree, self.carry(tree) if carried is None else carried, False)[0]

    def leaves(self, params: Params, stacks: Callable[[str], int]) -> Params:
        """The parameters with leaves in place of the small trees, all taken as new."""
        for path in self.found(params, stacks):
            params = put(params, path, _over(self.leaf, stacks(path))(part_at(params, path)))
        return params

    def plain(
        self, params: Params, state: State, stacks: Callable[[str], int], train: bool = False,
        at: Sequence[str] | None = None,
    ) -> tuple[Params, State, State]:
        """The plain parameters and state, and separately what is carried after the call.

        `at` are the paths of the small trees, if the caller knows them.
        """
        held, after = state.get(self.mark, {}), {}
        rest = {name: part for name, part in state.items() if name != self.mark}
        for path in self.found(params, stacks) if at is None else at:
            tree = part_at(params, path)
            tree = jax.tree.map(lambda held, leaf: jax.lax.stop_gradient(leaf) if held else leaf,
                                self.held(tree), tree)
            if self.carry:
                if (carried := part_at(held, path)) is None:
                    raise LayerError(f"state with {self.mark}/{path}", listed(paths(state)),
                                     "pass state=, as init returned it")
                use = _over(lambda tree, carried: self.use(tree, carried, train), stacks(path))
                leaf, carried = use(tree, carried)
                after = put(after, path, carried)
            else:
                leaf = _over(self.use, stacks(path))(tree)
            params = put(params, path, leaf)
        return params, rest, {self.mark: after} if after else {}

    def held(self, tree: Any) -> Any:
        """The mask of a small tree that is True for leaves without a gradient."""
        held = [bool(self.constant) and matches(at, f"{self.constant}/**") for at in paths(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), held)

    def moves(self, tree: Any) -> bool:
        """Does the leaf at inference have a gradient by the small tree? An average has none."""
        moves: list[bool] = []

        def evaluate(tree: Any) -> None:
            carried = self.carry(tree) if self.carry else None
            leaf, pull = jax.vjp(lambda tree: self.leaf(tree, carried), tree)
            moves.append(reaches(pull, leaf))

        jax.eval_shape(evaluate, tree)
        return moves[0]

    def _means(self, path: str) -> bool:
        """Does the leaf at a path match `pattern`, and not `exclude`?"""
        meant, excluded = (any(matches(path, pattern) for pattern in _several(patterns))
                      for patterns in (self.pattern, self.exclude))
        return meant and not excluded and "#" not in path

    def _find(self, params: Any, stacks: Callable[[str], int], at: str = "") -> Iterator[str]:
        """The paths of the small trees; raise for a leaf that should be one."""
        for name, tree in level(params)[0].items():
            path = joined(at, name)
            one = one_copy(tree, stacks(path))
            if self._means(path) and self._is_made(one):
                yield path
            elif level(tree)[0]:
                yield from self._find(tree, stacks, path)
            elif self._means(path) and hasattr(tree, "shape"):
                form = self._form(one)
                raise LayerError(f"{path} with {listed(paths(form))}" if isinstance(form, dict) else
                                 f"{path} as one array", show(tree),
                                 "pass the parameters of the reparametrized net: these are already "
                                 "merged, or belong to another net")

    def _form(self, leaf: Any) -> Any:
        """The shapes of the small tree of one leaf."""
        return jax.eval_shape(lambda leaf: self.make(jax.random.key(0), leaf), leaf)

    def _is_made(self, tree: Any) -> bool:
        """Is this a small tree, by structure and shapes?"""
        try:
            leaf = jax.eval_shape(self.leaf, tree)
            again = self._form(leaf)
        except Exception:
            return False  # a level above the small trees, or a leaf
        forms = [(jax.tree.structure(a), [leaf.shape for leaf in jax.tree.leaves(a)])
                 for a in (again, tree)]
        return hasattr(leaf, "shape") and forms[0] == forms[1]


class Expanded:
    """The mark of `linearize`: the layers inside are computed at the origin, which is in the state,
    and along the line from there to the parameters."""

    mark = "origin"


class Pinned(NamedTuple):
    """The mark of `pin`: the layers inside run in this mode, training or inference."""

    train: bool


class Mapped:
    """The mark of `hyper`: each leaf of its child ``target`` is an affine map in the trees."""


class WrittenOut:
    """The mark of `unrolled`: the children are the copies of a repeat, whose trees were stacked."""


Own = Computed | Expanded | Pinned | Mapped | WrittenOut


def _several(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _over(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """The function of one copy, vectorized over the leading axes of stacked copies."""
    for _ in range(depth):
        function = jax.vmap(function)
    return function


def one_copy(tree: Any, depth: int) -> Any:
    """The shapes of one copy of a tree with `depth` axes of copies."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[depth:], a.dtype), tree)
