"""A game is training with several players: each has an objective and an optimizer of its own.

The players are children of one net, so parameters, state and paths are those of the net, and the
game is a step like any other: `fit` plays it, a scan or a `jax.vmap` goes over it. A player's
objective sees the whole net and moves the player's own part of it: parameters by the gradient,
statistics as the objective threads them. What it does to another's statistics is not kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffprog.core.arguments import check_count
from diffprog.core.errors import LayerError
from diffprog.core.guards import check_key
from diffprog.core.layer import Layer, as_layer
from diffprog.core.loops import convolves, scan
from diffprog.core.notation import code, listed, show
from diffprog.core.parameters import fold
from diffprog.core.plans import spec
from diffprog.training.averages import across, at_rest, averaged, counted, means, unless
from diffprog.training.objectives import Metrics, Objective, explained
from diffprog.training.optimizers import check_optimizer, descend, looked_at, of_net
from diffprog.training.step import (
    Compiled,
    Step,
    TrainState,
    check_batch,
    check_objective,
)

__all__ = ["Player", "make_game"]


class Player(NamedTuple):
    """Who moves one child of a net: by which objective, by which optimizer, how often.

    Attributes:
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``, as
            for `make_step`; net, params and state are those of all players. Of the state that it
            returns, the player's own part is kept.
        optimizer: any optax transformation.
        steps: updates in one step of the game, each on a part of the batch of its own; positive.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    steps: int = 1


class _Turn(NamedTuple):
    """What a player moves: its own parameters and statistics, and the state of its optimizer."""

    params: Any
    state: Any
    opt_state: Any


def make_game(
    net: Layer, players: Mapping[str, Player], *, simultaneous: bool = False,
    inputs: Callable[[Any], Any] | None = None, donate: bool = True, check_axes: bool = True,
) -> Step:
    """One step of a game as a pair of pure functions: every player moves, in the order given.

    A player moves its child of the net alone, and is given no gradient of the others. Each update
    has a key of its own. If some player takes k > 1 steps, the batch is split into as many parts
    along its first axis; the i-th update of each player sees the i-th part. Opponents stand still
    meanwhile. Metrics are means over the updates, under ``<player>/<metric>``. `evaluate` gives
    every objective a key, since a player at rest may draw noise too: the same each time, another
    for each batch, and for each example if the objective says that it ``draws``. No metric of a
    game is called loss, so `fit` with validation data keeps a ``best`` by one that is named alone:
    ``metric="critic/loss"``.

    Args:
        net: a layer whose children are the players, such as ``serial(generator=...,
            discriminator=...)``; how it is wired matters for ``init`` alone.
        players: child -> `Player`; all children that have parameters.
        simultaneous: players answer what the others were before this step, not what they have
            just become.
        inputs: ``batch -> x``, what the net is shown to make parameters; the batch itself if None.
        donate, check_axes: as in `make_step`; the net is looked at as it is wired.

    Raises:
        LayerError: a player is no child of the net or no `Player`; `freeze` or the like stands
            around the whole net, where objectives that call its children pass it by; at ``init``, a
            child with parameters has no player; in ``apply``, a batch cannot be split, or an
            objective changes the structure of the player's state.

    Example:
        >>> def guess(net, params, state, x, *, key, train):  # the point makes x * y small ...
        ...     loss = params["point"]["scale"] * params["rival"]["scale"]
        ...     return loss.sum(), (state, {"loss": loss.sum()})
        >>> def resist(*given, **how):  # ... and its rival makes it large
        ...     loss, aux = guess(*given, **how)
        ...     return -loss, aux
        >>> number = dp.stateless(lambda key, x: {"scale": jnp.ones(1)}, lambda p, x: p["scale"])
        >>> step = dp.training.make_game(dp.serial(point=number, rival=number), {
        ...     "point": dp.training.Player(guess, optax.sgd(0.5)),
        ...     "rival": dp.training.Player(resist, optax.sgd(0.5))})
        >>> state, metrics = step.apply(step.init(jax.random.key(0), jnp.ones(1)), jnp.ones(1))
        >>> [float(state.params[name]["scale"][0]) for name in ("point", "rival")]
        [0.5, 1.25]

    Source: Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1.
    """
    net = as_layer(net)
    _check_players(net, players)
    players = {name: player._replace(optimizer=of_net(net.children[name], player.optimizer),
                                     objective=explained(player.objective))
               for name, player in players.items()}
    parts = max(player.steps for player in players.values())

    def init(key: jax.Array, x: Any, **side: Any) -> TrainState:
        check_key(key)
        first, later = jax.random.split(key)
        params, state = net.init(first, x, **side)
        if idle := params.keys() - players.keys():
            raise LayerError("a player for every child with parameters", f"none for {listed(idle)}",
                             "add it to players: what never moves belongs into an objective")
        opt = {name: player.optimizer.init(params.get(name, {}))
               for name, player in players.items()}
        # Copied as in `make_step`: a buffer can be donated only once.
        params, state, opt = jax.tree.map(jnp.copy, (params, state, opt))
        return TrainState(params, state, opt, later, jnp.zeros((), jnp.int32))

    def move(name: str, now: TrainState, seen: TrainState, batches: Any, key: jax.Array) -> Any:
        """The turn of a player, begun from `now` against what is `seen`, and its metrics."""
        player = players[name]

        def update(turn: _Turn, given: Any) -> tuple[_Turn, Metrics]:
            i, batch = given

            def loss(own: Any) -> Any:
                params, state = seen.params | {name: own}, _with(seen.state, name, turn.state)
                value, (state, metrics) = player.objective(
                    net, params, state, batch, key=jax.random.fold_in(key, i), train=True)
                state = state.get(name, {})
                if spec(state) != spec(turn.state):
                    raise LayerError(f"the state of {name} in one structure, {show(turn.state)}",
                                     show(state), "return its state that came, with new values")
                return value, (state, metrics)

            done = descend(player.optimizer, loss, turn.params, turn.opt_state, turn.state)
            metrics = counted(done.metrics, batch)
            if done.skipped is not None:
                metrics = unless(done.skipped, metrics)
            return _Turn(done.params, done.state, done.opt_state), metrics

        own = _Turn(now.params[name], now.state.get(name, {}), now.opt_state[name])
        steps = jnp.arange(player.steps)
        if parts == 1:
            turn, metrics = update(own, (0, batches))
            return turn, jax.tree.map(lambda a: a[None], metrics)
        xs = steps, jax.tree.map(lambda a: a[: player.steps], batches)
        first = jax.tree.map(lambda a: a[0], xs)
        return scan(update, own, xs, length=player.steps,
                    convolving=lambda: convolves(update, own, first))

    def apply(now: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        check(batch)
        key = jax.random.fold_in(now.key, now.step)
        batches = batch if parts == 1 else jax.tree.map(functools.partial(_split, parts), batch)
        new, metrics = now, {}
        for name in players:
            seen = now if simultaneous else new
            turn, found = move(name, now, seen, batches, fold(key, name))
            new = new._replace(params=new.params | {name: turn.params},
                               state=_with(new.state, name, turn.state),
                               opt_state=new.opt_state | {name: turn.opt_state})
            metrics |= _averaged(name, found)
        return new._replace(step=now.step + 1), metrics

    def rest(now: TrainState, batch: Any, first: Any = 0) -> Metrics:
        check(batch)
        params, metrics = looked(now), {}
        for name, player in players.items():
            found = at_rest(player.objective, net, params, now.state, batch,
                            key=fold(now.key, name), first=first)
            metrics |= _averaged(name, jax.tree.map(lambda a: jnp.asarray(a)[None], found))
        return metrics

    def looked(now: TrainState) -> Any:
        return now.params | {name: looked_at(now.opt_state[name], now.params[name])
                             for name in players if name in now.params}

    def check(batch: Any) -> None:
        if check_axes:
            check_batch(net, shown, batch)

    def combine(found: dict[str, float]) -> dict[str, float]:
        for name, player in players.items():
            own = {metric.removeprefix(f"{name}/"): value for metric, value in found.items()
                   if metric.startswith(f"{name}/")}
            made = getattr(player.objective, "combine", dict)(own)
            found = found | {f"{name}/{metric}": value for metric, value in made.items()}
        return found

    def shown(batch: Any) -> tuple[Any, dict[str, Any]]:
        return batch if inputs is None else inputs(batch), {}

    return Step(init, Compiled(apply, donate_argnums=0 if donate else ()), Compiled(rest), net,
                shown, combine, any(across(player.objective) for player in players.values()),
                looked)


def _check_players(net: Layer, players: Mapping[str, Player]) -> None:
    if not players:
        raise LayerError("at least one player", "none", "name a child of the net and its Player")
    if net.computed:
        raise LayerError("children that are frozen, pinned or reparametrized by themselves",
                         repr(net),
                         "put freeze, pin or lora around a child: objectives call the children")
    for name, player in players.items():
        if name not in net.children:
            raise LayerError(f"players among the children ({listed(net.children)})", repr(name),
                             "correct the name, or name the child: serial(generator=...)")
        if not isinstance(player, Player):
            raise LayerError(f"a Player for {name}", code(player),
                             "pass Player(objective, optimizer)")
        check_objective(net, player.objective)
        check_optimizer(player.optimizer)
        check_count("steps", player.steps)


def _with(state: dict[str, Any], name: str, own: Any) -> dict[str, Any]:
    """The state of a net with a child's replaced; what is empty is left out."""
    return state | {name: own} if own else state


def _split(parts: int, a: Any) -> Any:
    """An array of a batch as `parts` equal ones, on a new first axis."""
    if not jnp.shape(a) or a.shape[0] % parts:
        raise LayerError(f"a batch of {parts} equal parts, as many as the most steps of a player",
                         show(a), "choose another batch_size")
    return a.reshape(parts, a.shape[0] // parts, *a.shape[1:])


def _averaged(name: str, metrics: Metrics) -> Metrics:
    """Means over the updates of a player, weighed by their counts, which are kept for `fit`."""
    found = averaged(metrics)
    return {f"{prefix}{name}/{metric}": found[prefix + metric]
            for metric in means(metrics) for prefix in ("", "count/")}
