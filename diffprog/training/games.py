"""Games: training with several players, each with an objective and an optimizer.

The players are children of one net, so that parameters, state and paths are those of the net, and a
game is a `Step` for `fit`, scans and `jax.vmap`. A player's objective sees the whole net and
updates the part of the player: its parameters by the gradient, its state by the state that the
objective returns. Changes to the state of other players are discarded.
"""

from __future__ import annotations

import dataclasses
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
from diffprog.training.averages import (
    average_parts,
    inference_metrics,
    is_across_examples,
    mean_names,
)
from diffprog.training.descent import (
    check_optimizer,
    descend,
    for_net,
    inference_params,
)
from diffprog.training.objectives import Metrics, Objective, checked
from diffprog.training.step import (
    Compiled,
    Step,
    TrainState,
    check_batch,
    check_objective,
    fresh_state,
    step_metrics,
)

__all__ = ["Player", "make_game"]


class Player(NamedTuple):
    """A player of `make_game`: how one child of the net is trained.

    Attributes:
        objective: ``(net, params, state, batch, *, key, train) -> (loss, (state, metrics))``, as
            for `make_step`; net, params and state are those of all players. Of the state that it
            returns only the player's part is kept.
        optimizer: any optax transformation.
        steps: updates per step of the game, each on another part of the batch; positive.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    steps: int = 1


class _Own(NamedTuple):
    """The part of a player in the state of training."""

    params: Any
    state: Any
    opt_state: Any


def make_game(
    net: Layer, players: Mapping[str, Player], *, simultaneous: bool = False,
    inputs: Callable[[Any], Any] | None = None, donate: bool = True, check_axes: bool = True,
) -> Step:
    """One step of a game as a pair of pure functions: the players are updated in the order given.

    A player updates its own child of the net; no gradient reaches the others. Each update has its
    own key. If some player takes k > 1 steps, the batch is split into k parts along its first axis,
    and the i-th update of each player uses the i-th part. The other players do not change during
    the updates of one. Metrics are means over the updates, under ``<player>/<metric>``. `evaluate`
    calls every objective with a key, since a player may draw noise in inference too: the same key
    each time, different for each batch, and for each example if the objective says ``draws``. No
    metric of a game is called loss: `fit` keeps a ``best`` state if its metric is named, as in
    ``Validation(data, metric="critic/loss")``.

    Args:
        net: a layer whose children are the players, such as ``serial(generator=...,
            discriminator=...)``; its wiring is used by ``init`` and `check_axes` alone.
        players: child -> `Player`, for all children that have parameters.
        simultaneous: players use the others as before this step, not as just updated.
        inputs: ``batch -> x``, the input of the net in ``init``; the batch itself if None.
        donate, check_axes: as in `make_step`.

    Raises:
        LayerError: a player is no child of the net or no `Player`; `freeze` or a similar wrapper is
            around the whole net, since objectives call its children directly; at ``init``, a child
            with parameters has no player; in ``apply``, a batch cannot be split, or an objective
            changes the structure of the player's state.

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
    players = {name: player._replace(optimizer=for_net(net.children[name], player.optimizer),
                                     objective=checked(player.objective))
               for name, player in players.items()}
    game = _Game(net, players, simultaneous, inputs, check_axes)
    across = any(is_across_examples(player.objective) for player in players.values())
    return Step(game.init, Compiled(game.apply, donate_argnums=0 if donate else ()),
                Compiled(game.evaluate), net, game.inputs, game.combine, across, game.eval_params)


@dataclasses.dataclass(frozen=True, eq=False)
class _Game:
    """The functions of a step of `make_game`."""

    net: Layer
    players: Mapping[str, Player]
    simultaneous: bool
    x_of: Callable[[Any], Any] | None
    check_axes: bool

    @property
    def parts(self) -> int:
        """The number of parts that a batch is split into."""
        return max(player.steps for player in self.players.values())

    def init(self, key: jax.Array, x: Any, **side: Any) -> TrainState:
        check_key(key)
        net_key, later = jax.random.split(key)
        params, state = self.net.init(net_key, x, **side)
        if idle := params.keys() - self.players.keys():
            raise LayerError("a player for every child with parameters", f"none for {listed(idle)}",
                             "add it to players, or keep parameters without one in an objective")
        opt_state = {name: player.optimizer.init(params.get(name, {}))
                     for name, player in self.players.items()}
        return fresh_state(params, state, opt_state, later)

    def apply(self, now: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        self._check(batch)
        key = jax.random.fold_in(now.key, now.step)
        batches = batch
        if self.parts > 1:
            batches = jax.tree.map(functools.partial(_split, self.parts), batch)
        new, metrics = now, {}
        for name in self.players:
            seen = now if self.simultaneous else new
            own, found = self._updates(name, now, seen, batches, fold(key, name))
            new = new._replace(params=new.params | {name: own.params},
                               state=_with(new.state, name, own.state),
                               opt_state=new.opt_state | {name: own.opt_state})
            metrics |= _player_metrics(name, found)
        return new._replace(step=now.step + 1), metrics

    def _updates(
        self, name: str, now: TrainState, seen: TrainState, batches: Any, key: jax.Array
    ) -> tuple[_Own, Metrics]:
        """All updates of a player against the others in `seen`; metrics have an axis of updates."""
        update = functools.partial(self._update, name, seen, key)
        own = _Own(now.params[name], now.state.get(name, {}), now.opt_state[name])
        if self.parts == 1:
            own, metrics = update(own, (0, batches))
            return own, jax.tree.map(lambda a: a[None], metrics)
        steps = self.players[name].steps
        xs = jnp.arange(steps), jax.tree.map(lambda a: a[:steps], batches)
        first = jax.tree.map(lambda a: a[0], xs)
        return scan(update, own, xs, length=steps,
                    convolving=lambda: convolves(update, own, first))

    def _update(
        self, name: str, seen: TrainState, key: jax.Array, own: _Own, numbered: tuple[Any, Any]
    ) -> tuple[_Own, Metrics]:
        """One update of a player on a numbered part of the batch, and its metrics."""
        player = self.players[name]
        number, batch = numbered

        def loss(params: Any) -> Any:
            value, (state, metrics) = player.objective(
                self.net, seen.params | {name: params}, _with(seen.state, name, own.state), batch,
                key=jax.random.fold_in(key, number), train=True)
            state = state.get(name, {})
            if spec(state) != spec(own.state):
                raise LayerError(f"a state of unchanged structure for {name}, {show(own.state)}",
                                 show(state), "return the same structure with new values")
            return value, (state, metrics)

        done = descend(player.optimizer, loss, own.params, own.opt_state, own.state)
        return _Own(done.params, done.state, done.opt_state), step_metrics(done, batch)

    def evaluate(self, now: TrainState, batch: Any, first: Any = 0) -> Metrics:
        self._check(batch)
        params, metrics = self.eval_params(now), {}
        for name, player in self.players.items():
            found = inference_metrics(player.objective, self.net, params, now.state, batch,
                                      key=fold(now.key, name), first=first)
            metrics |= _player_metrics(name, jax.tree.map(lambda a: jnp.asarray(a)[None], found))
        return metrics

    def eval_params(self, now: TrainState) -> Any:
        return now.params | {name: inference_params(now.opt_state[name], now.params[name])
                             for name in self.players if name in now.params}

    def inputs(self, batch: Any) -> tuple[Any, dict[str, Any]]:
        return batch if self.x_of is None else self.x_of(batch), {}

    def combine(self, found: dict[str, float]) -> dict[str, float]:
        for name, player in self.players.items():
            own = {metric.removeprefix(f"{name}/"): value for metric, value in found.items()
                   if metric.startswith(f"{name}/")}
            combined = getattr(player.objective, "combine", dict)(own)
            found = found | {f"{name}/{metric}": value for metric, value in combined.items()}
        return found

    def _check(self, batch: Any) -> None:
        if self.check_axes:
            check_batch(self.net, self.inputs, batch)


def _check_players(net: Layer, players: Mapping[str, Player]) -> None:
    """Raise unless every player is a valid `Player` of a child of the net."""
    if not players:
        raise LayerError("at least one player", "none", "name a child of the net and its Player")
    if net.computed:
        raise LayerError("children that are frozen, pinned or reparametrized one by one",
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
    """The state of a net with that of one child replaced; an empty one is left out."""
    return state | {name: own} if own else state


def _split(parts: int, a: Any) -> Any:
    """An array of a batch, (batch, ...), as (parts, batch / parts, ...)."""
    if not jnp.shape(a) or a.shape[0] % parts:
        raise LayerError(f"a batch of {parts} equal parts, the largest steps= of a player",
                         show(a), "choose another batch_size")
    return a.reshape(parts, a.shape[0] // parts, *a.shape[1:])


def _player_metrics(name: str, metrics: Metrics) -> Metrics:
    """The means over the updates of a player, and their counts, under the name of the player."""
    found = average_parts(metrics)
    named: Metrics = {}
    for metric in mean_names(metrics):
        named[f"{name}/{metric}"] = found[metric]
        named[f"count/{name}/{metric}"] = found[f"count/{metric}"]
    return named
