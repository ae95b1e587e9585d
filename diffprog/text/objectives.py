"""The objectives of text: the next token, hidden tokens, and whether two sentences follow.

Text is ids of tokens, (batch, time). What is not a token of the text, padding, is marked by the
side input `mask`. A label, where there are labels, is -100 where nothing is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffprog.core import arguments
from diffprog.core.arguments import check_array, check_count, check_share
from diffprog.core.computed import Expanded
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.nets import plain
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths
from diffprog.losses.classes import cross_entropy, linear_cross_entropy
from diffprog.losses.entries import Mask, average, known, spread, total, weighed, weighing
from diffprog.losses.metrics import accuracy
from diffprog.training.objectives import (
    OF_TARGETS,
    Metrics,
    Objective,
    check_logits,
    inputs,
    parts,
    real_targets,
)
from diffprog.transforms.tap import tap

__all__ = ["chunked_next_token", "masked_language", "next_token"]

IGNORED = -100  # the label of a token that is not asked for, as `mask_tokens` writes it


def next_token(*, label_smoothing: float = 0.0) -> Objective:
    """The objective of a net that scores the next token: ``loss = -log p(x[t+1] | x[:t+1])``.

    The net sees all tokens but the last, and is asked for all but the first. A net that also takes
    a `source` is thus trained to translate with the true beginning of the translation before it,
    which is teacher forcing. Metrics: `accuracy`, and `bits`, the surprise in bits per token.

    A batch is ids (batch, time + 1), or a dict with ``x``, those ids, and side inputs under all
    other names. Of these `mask`, `segments` and `positions` are (batch, time + 1) like x, and all
    others as the net takes them for the first `time` tokens. A token that is padding, follows
    padding or begins a new segment is not asked for.
    With ``asked``, booleans like x, no others than those are asked for, such as the answer behind
    a question; the net is shown all. `target_mask` says the same of the targets, (batch, time), and
    `sample_weight`, numbers (batch,) or (batch, time), how much each of them counts.

    Args:
        label_smoothing: as in `cross_entropy`; adds the metric ``cross_entropy``, of targets that
            are not smoothed, in nats. It is what `bits` and `perplexity` speak of.

    Raises:
        LayerError: a batch of another form, or with fewer than two tokens; the net gives no scores
            for each token.

    Example:
        >>> net = dp.models.gpt(11, length=8, width=16, depth=1, heads=2)
        >>> ids = jnp.array([[1, 2, 3, 4, 5]])
        >>> params, state = net.init(jax.random.key(0), ids[:, :-1])
        >>> objective = dp.text.next_token()
        >>> loss, (state, metrics) = objective(net, params, state, ids, key=None, train=True)
        >>> sorted(metrics), int(metrics["count"])
        (['accuracy', 'bits', 'count', 'loss'], 4)

    Source: Bengio et al. 2003, JMLR 3, section 2; teacher forcing: Williams and Zipser 1989,
    doi:10.1162/neco.1989.1.2.270.
    """
    check_share("label_smoothing", label_smoothing)

    def score(
        net: Layer, params: Any, state: Any, x: jax.Array, labels: jax.Array, real: Mask,
        mean: Callable[[jax.Array], jax.Array], given: dict[str, Any],
    ) -> Any:
        check_logits(net)
        logits, state = net.apply(params, state, x, **given)
        _check_scores(logits, labels)

        def surprise(**options: Any) -> jax.Array:
            return mean(cross_entropy(logits, labels, mask=real, reduction="none", **options))

        plain = loss = surprise()
        if label_smoothing:
            loss = surprise(label_smoothing=label_smoothing)
        metrics = {"cross_entropy": plain} if label_smoothing else {}
        right = mean(accuracy(logits, labels, reduction="none"))
        return loss, metrics | _of_tokens(plain, right), state

    return _of_successors(score)


def chunked_next_token(trunk: str, table: str, *, chunk: int = 8192) -> Objective:
    """`next_token` without the logits: ``linear_cross_entropy(y, table)``, y from inside the net.

    The net's own scores are never computed. They must be the product of what the layer at
    `trunk` gives with the parameters at `table`, and nothing else. Only sizes are compared: look
    once whether its loss is that of `next_token`, for with wrong paths it is that of another net.

    Args:
        trunk: path of the layer whose output is scored: "trunk" of `gpt` and `llama`.
        table: path of the parameters that score: "embed/embedding" of `gpt` and of a tied `llama`,
            "head/kernel" of one that is not; a ``bias`` beside a kernel is added.
        chunk: how many tokens of the vocabulary are scored at a time; positive.

    Raises:
        LayerError: a path that names nothing; a trunk and a table that do not fit the net's scores,
            or are in one `linearize`; a batch that `next_token` does not take.

    Example:
        >>> net = dp.models.gpt(11, length=8, width=16, depth=1, heads=2)
        >>> ids = jnp.array([[1, 2, 3, 4, 5]])
        >>> params, state = net.init(jax.random.key(0), ids[:, :-1])
        >>> objective = dp.text.chunked_next_token("trunk", "embed/embedding", chunk=4)
        >>> loss, _ = objective(net, params, state, ids, key=None, train=True)
        >>> bool(abs(loss - dp.text.next_token()(
        ...     net, params, state, ids, key=None, train=True)[0]) < 1e-5)
        True
    """
    check_count("chunk", chunk)

    def check_product(net: Layer) -> None:
        """Raise where the scores are on the line from an origin: then they are no product."""
        layer = net
        for name, other in zip(trunk.split("/"), table.split("/"), strict=False):
            if any(isinstance(own, Expanded) for own in layer.computed):
                raise LayerError("scores that are one product", repr(layer),
                                 "use next_token: linearize makes a sum of two of a product")
            if name != other or name not in layer.children:
                return
            layer = layer.children[name]

    def score(
        net: Layer, params: Any, state: Any, x: jax.Array, labels: jax.Array, real: Mask,
        mean: Callable[[jax.Array], jax.Array], given: dict[str, Any],
    ) -> Any:
        check_logits(net)
        check_product(net)
        net.plan(x, **{name: given[name] for name in given.keys() & net.side})
        computed, _ = plain(net, params, state, given["train"])  # of the state before the call
        # The scores are traced and not used, so that XLA never computes them.
        (scores, seen), state = tap(net, trunk).apply(params, state, x, **given)
        if list(seen) != [trunk]:
            raise LayerError("the path of one layer as trunk", listed(seen), "name one alone")
        kernel, bias = _scoring(computed, table)
        _check_scores(scores, labels)
        if seen[trunk].shape[-1] != len(kernel) or scores.shape[-1] != kernel.shape[-1]:
            raise LayerError(
                f"a trunk and a table whose product is the scores {show(scores)}",
                show((seen[trunk], kernel)), "name the net's last layer before its scores, "
                "and what it is multiplied with")
        losses, best = linear_cross_entropy(
            seen[trunk], kernel, labels, bias=bias, chunk=chunk, mask=real, reduction="none")
        loss = mean(losses)
        return loss, _of_tokens(loss, mean((best == labels).astype(jnp.float32))), state

    return _of_successors(score)


def masked_language() -> Objective:
    """The objective of BERT: the surprise of the hidden tokens plus that of whether y follows x.

    The net gives a pair, scores of all tokens (batch, time, vocabulary) and of the pair (batch,
    2), as `bert_pretraining` does. A batch is a dict with ``x``, ids of which some are hidden;
    ``y``, a pair: the true ids where they are asked for and -100 elsewhere, as `mask_tokens` gives
    them, and ints (batch,), 0 where the second sentence follows the first; and side inputs. A
    `target_mask` is one of pairs, (batch,), or itself a pair like y, each of which may be None; a
    `sample_weight` likewise, where that of a pair holds for its tokens.

    Metrics: ``token_loss`` and ``token_accuracy``, means over the hidden tokens; ``follows_loss``
    and ``follows_accuracy``, over the pairs.

    Raises:
        LayerError: a batch or a net of another form.

    Example:
        >>> net = dp.models.bert_pretraining(11, length=8, width=16, depth=1, heads=2)
        >>> x = jnp.array([[1, 9, 3], [1, 2, 9]])
        >>> y = jnp.array([[-100, 2, -100], [-100, -100, 4]]), jnp.array([0, 1])
        >>> params, state = net.init(jax.random.key(0), x)
        >>> loss, (state, metrics) = dp.text.masked_language()(
        ...     net, params, state, {"x": x, "y": y}, key=None, train=True)
        >>> int(metrics["count/token_loss"]), int(metrics["count"])
        (2, 2)

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1.
    """
    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        x, y, side = parts(net, batch)
        if isinstance(batch, Mapping) and "mask" in batch and "mask" not in net.side:
            raise LayerError("a net that takes mask", f"one that takes {listed(net.side)}",
                             "leave the mask out: tokens not asked for have the label -100")
        if not isinstance(y, (tuple, list)) or len(y) != 2:
            raise LayerError("y as a pair (true tokens, what follows)", show(y),
                             "use classification(ignore_index=-100) for tokens alone")
        scores, state = net.apply(params, state, x, key=key, train=train, **side)
        if not isinstance(scores, (tuple, list)) or len(scores) != 2:
            raise LayerError("a net that scores a pair, tokens and what follows", show(scores),
                             "use bert_pretraining, for example")
        for part in net.children.values() if net.name == "branch" else ():
            check_logits(part)
        (tokens, follows), (labels, order) = scores, y
        (real, of_tokens), (pairs, of_pairs) = (
            real_targets(net, own, x, side, part.shape, lambda scores, i=i: scores[i])
            for i, (part, own) in enumerate(zip(y, _of_both(batch), strict=True)))
        real = known(labels, real, IGNORED)
        asked = total(labels.shape, real, of_tokens)
        hidden = cross_entropy(tokens, labels, mask=real, reduction="none")
        found = {"token_loss": average(hidden, real, of_tokens),
                 "token_accuracy": average(
                     accuracy(tokens, labels, reduction="none"), real, of_tokens),
                 "follows_loss": average(
                     cross_entropy(follows, order, mask=pairs, reduction="none"), pairs, of_pairs),
                 "follows_accuracy": average(
                     accuracy(follows, order, reduction="none"), pairs, of_pairs),
                 "count": total(order.shape, pairs, of_pairs),
                 "count/token_loss": asked, "count/token_accuracy": asked}
        loss = found["token_loss"] + found["follows_loss"]
        return loss, (state, {"loss": loss, **found})

    said: Any = objective
    said.inputs = inputs
    said.combine = lambda found: {"loss": found["token_loss"] + found["follows_loss"]}
    return said


def _of_successors(score: Callable[..., Any]) -> Objective:
    """The objective that asks for each token's successor.

    `score` gives loss, metrics and state of a net that is shown all tokens but the last; it is
    handed what takes the mean over the tokens that are asked for.
    """

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        ids, real, side, weights = _shifted(net, batch)
        labels = ids[:, 1:]
        loss, metrics, state = score(
            net, params, state, ids[:, :-1], labels, real,
            lambda values: average(values, real, weights), {"key": key, "train": train, **side})
        return loss, (state, {"loss": loss, **metrics, "count": total(labels.shape, real, weights)})

    def shown(net: Layer, batch: Any) -> tuple[jax.Array, dict[str, Any]]:
        ids, _, side, _ = _shifted(net, batch)
        return ids[:, :-1], side

    said: Any = objective
    said.inputs = shown
    return said


def _of_both(batch: Any) -> Iterator[dict[str, Any]]:
    """What a batch says of its tokens, and of its pairs."""
    said = {name: batch.get(name) for name in OF_TARGETS} if isinstance(batch, Mapping) else {}
    both = {name: value if isinstance(value, (tuple, list)) else (value, value)
            for name, value in said.items()}
    for i in (0, 1):
        yield {name: pair[i] for name, pair in both.items()}


def _of_tokens(surprise: jax.Array, right: jax.Array) -> Metrics:
    """What is said of a mean surprise in nats, and of the share of tokens that are right."""
    return {"accuracy": right, "bits": surprise / math.log(2)}


def _shifted(net: Layer, batch: Any) -> tuple[jax.Array, Mask, dict[str, Any], Any]:
    """The ids, which of those but the first are asked for, side inputs for all but the last, and
    the weights of what is asked for.
    """
    given = dict(batch) if isinstance(batch, Mapping) else {"x": batch}
    rest = {name: value for name, value in given.items() if name != "x" and value is not None}
    if "x" not in given or rest.keys() - net.side - {"asked", *OF_TARGETS}:
        raise LayerError(f"a batch with x and side inputs of the net ({listed(net.side)})",
                         listed(given), "rename or remove the rest: x holds inputs and targets")
    ids = given["x"]
    check_array(ids, rank=2, axes="(batch, time + 1)", floating=False)
    size = ids.shape[1] if ids.ndim == 2 else 0
    if (arguments.known(size) and size < 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise LayerError("ids as ints (batch, time + 1), at least two tokens", show(ids),
                         "give at least two to each row: all but the first are asked for")
    if not (arguments.at_most(2, size) and arguments.at_most(0, ids.shape[0] * (size - 1))):
        raise LayerError("ids with an open size of the form t + 1", show(ids),
                         'write jax.export.symbolic_shape("b, t + 1"): t are shown to the net')
    weights = weighing(rest.pop("sample_weight", None), ids[:, 1:].shape)
    real = spread(rest.pop("asked", None), ids.shape)
    real = None if real is None else real[:, 1:]
    if (targets := spread(rest.pop("target_mask", None), ids[:, 1:].shape)) is not None:
        real = targets if real is None else real & targets
    if (mask := rest.get("mask")) is not None:
        mask = spread(mask, ids.shape)
        rest["mask"], both = mask[:, :-1], mask[:, 1:] & mask[:, :-1]
        real = both if real is None else real & both
    for name in ("segments", "positions"):
        if name not in rest:
            continue
        if getattr(rest[name], "shape", None) != ids.shape:
            raise LayerError(f"{name} of the shape of x, {ids.shape}", show(rest[name]),
                             "give one to each token, the last one too")
        if name == "segments":
            same = rest[name][:, 1:] == rest[name][:, :-1]
            real = same if real is None else real & same
        rest[name] = rest[name][:, :-1]
    side = {name: value for name, value in rest.items() if name in net.side}
    return ids, weighed(real, weights), side, weights


def _check_scores(logits: Any, labels: jax.Array) -> None:
    check_array(logits)
    if logits.shape[:-1] != labels.shape:
        raise LayerError(f"a net that gives (batch, time, vocabulary) for {show(labels)}",
                         show(logits), "return the scores of each token's successor")


def _scoring(params: Any, table: str) -> tuple[jax.Array, Any]:
    """The kernel (features, vocabulary) and the bias at a path of the parameters."""
    leaves = paths(params)
    if table not in leaves or leaves[table].ndim != 2:
        raise LayerError(f"the path of a matrix as table ({listed(leaves)})", repr(table),
                         "write embed/embedding or head/kernel, for example")
    kernel = leaves[table]
    above, _, name = table.rpartition("/")
    if name == "embedding":
        return kernel.T, None
    return kernel, leaves.get(f"{above}/bias" if above else "bias")
