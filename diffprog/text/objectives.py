"""Objectives of language models: next token, masked tokens, next-sentence prediction.

A text is ids (batch, time). The side input `mask` marks valid tokens; the label -100 marks tokens
without a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffprog.core import arguments
from diffprog.core.arguments import check_array, check_count, check_fraction
from diffprog.core.computed import Expanded
from diffprog.core.dtypes import is_int
from diffprog.core.errors import LayerError
from diffprog.core.layer import Layer
from diffprog.core.nets import ending, made_by, plain
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
    valid_targets,
)
from diffprog.transforms.tap import tap

__all__ = ["chunked_next_token", "masked_language", "next_token"]

IGNORED = -100  # the label of a token without a loss, as in `mask_tokens`


def next_token(*, label_smoothing: float = 0.0) -> Objective:
    """Next-token cross-entropy: ``loss = -log p(x[t+1] | x[:t+1])``, the mean over valid tokens.

    The inputs are all tokens but the last, the targets all tokens but the first. A net that takes a
    `source` is trained to translate by teacher forcing. Metrics: `accuracy`, and `bits`, the
    cross-entropy in bits per token.

    A batch is ids (batch, time + 1), or a dict with ``x``, those ids, and side inputs by name.
    `mask`, `segments` and `positions` are (batch, time + 1) like x; other side inputs are passed to
    the net as they are. A target has no loss if it or its predecessor is padding, or if it begins a
    new segment. ``asked``, booleans like x, restricts the loss to some tokens, such as the answer
    to a question. `target_mask`, (batch, time), does the same by target; `sample_weight`, numbers
    (batch,) or (batch, time), weighs the targets.

    Args:
        label_smoothing: as in `cross_entropy`; adds the metric ``cross_entropy``, in nats and
            without smoothing, from which `bits` is computed.

    Raises:
        LayerError: a batch of another form, or with fewer than two tokens; a net that does not
            return logits for each token.

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
    check_fraction("label_smoothing", label_smoothing)

    def evaluate(
        net: Layer, params: Any, state: Any, shifted: _Shifted, given: dict[str, Any]
    ) -> tuple[jax.Array, Metrics, Any]:
        check_logits(net)
        labels = shifted.labels
        logits, state = net.apply(params, state, shifted.x, **given)  # (batch, time, vocabulary)
        _check_shape(logits, labels)

        def nll(**options: Any) -> jax.Array:
            return shifted.mean(cross_entropy(
                logits, labels, mask=shifted.mask, reduction="none", **options))

        loss = unsmoothed = nll()
        if label_smoothing:
            loss = nll(label_smoothing=label_smoothing)
        metrics = {"cross_entropy": unsmoothed} if label_smoothing else {}
        hits = shifted.mean(accuracy(logits, labels, reduction="none"))
        return loss, metrics | _token_metrics(unsmoothed, hits), state

    return _next_token_objective(evaluate)


def chunked_next_token(trunk: str, table: str, *, chunk: int = 8192) -> Objective:
    """`next_token` without materializing the logits: ``linear_cross_entropy(y, table)``.

    y is the output of the layer at `trunk`, and the logits of the net must be y times the
    parameters at `table`. Only shapes are checked: wrong paths silently train a different model, so
    compare the loss with that of `next_token` once.

    Args:
        trunk: path of the last layer before the logits: "trunk" in `gpt` and `llama`.
        table: path of the output kernel: "embed/embedding" in `gpt` and in a tied `llama`,
            "head/kernel" in an untied one; a ``bias`` beside a kernel is added.
        chunk: number of vocabulary entries computed at a time; positive.

    Raises:
        LayerError: a path without a layer or parameters; a trunk and a table that do not match the
            logits, or lie inside a `dp.linearize`; a batch that `next_token` does not accept.

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

    def evaluate(
        net: Layer, params: Any, state: Any, shifted: _Shifted, given: dict[str, Any]
    ) -> tuple[jax.Array, Metrics, Any]:
        check_logits(net)
        _check_product(net, trunk, table)
        net.plan(shifted.x, **{name: given[name] for name in given.keys() & net.side})
        computed, _ = plain(net, params, state, given["train"])  # of the state before the call
        # XLA drops the logits, since only their shape is used.
        (logits, tapped), state = tap(net, trunk).apply(params, state, shifted.x, **given)
        if list(tapped) != [trunk]:
            raise LayerError("the path of one layer as trunk", listed(tapped), "name one alone")
        y = tapped[trunk]                                             # (batch, time, features)
        kernel, bias = _output_kernel(computed, table)                # (features, vocabulary)
        _check_shape(logits, shifted.labels)
        if y.shape[-1] != len(kernel) or logits.shape[-1] != kernel.shape[-1]:
            raise LayerError(
                f"a trunk and a table whose product is the logits {show(logits)}",
                show((y, kernel)), "name the last layer before the logits, and the kernel that "
                "its output is multiplied by")
        losses, best = linear_cross_entropy(
            y, kernel, shifted.labels, bias=bias, chunk=chunk, mask=shifted.mask, reduction="none")
        loss = shifted.mean(losses)
        hits = shifted.mean((best == shifted.labels).astype(jnp.float32))
        return loss, _token_metrics(loss, hits), state

    return _next_token_objective(evaluate)


def masked_language() -> Objective:
    """The objective of BERT: ``loss = token_loss + follows_loss``, two cross-entropies.

    The net returns a pair, token logits (batch, time, vocabulary) and logits (batch, 2) of
    next-sentence prediction, as `bert_pretraining` does. A batch is a dict with ``x``, masked ids;
    ``y``, a pair: labels (batch, time), -100 for tokens without a loss, as `mask_tokens` returns
    them, and ints (batch,), 0 if the second sentence follows the first and 1 if not; and side
    inputs. A `target_mask` or `sample_weight` is either an array, used for the pairs and broadcast
    to their tokens, or a pair like y, whose parts may be None.

    Metrics: ``token_loss`` and ``token_accuracy``, means over the masked tokens; ``follows_loss``
    and ``follows_accuracy``, means over the pairs of sentences.

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
        _check_masked_batch(net, batch, y)
        logits, state = net.apply(params, state, x, key=key, train=train, **side)
        _check_logit_pair(net, logits)
        metrics = _masked_metrics(net, batch, x, side, logits, y)
        loss = _masked_loss(metrics)
        return loss, (state, {"loss": loss, **metrics})

    result: Any = objective
    result.inputs = inputs
    result.combine = lambda metrics: {"loss": _masked_loss(metrics)}
    return result


class _Shifted(NamedTuple):
    """A batch of texts as inputs and targets of next-token prediction."""

    x: jax.Array  # ids (batch, time), all but the last
    labels: jax.Array  # ids (batch, time), all but the first
    mask: Mask  # booleans (batch, time), the targets that have a loss; None for all
    weights: Any  # numbers (batch, time), or None
    side: dict[str, Any]  # side inputs of x

    def mean(self, values: jax.Array) -> jax.Array:
        """The weighted mean over the targets."""
        return average(values, self.mask, self.weights)


def _next_token_objective(evaluate: Callable[..., Any]) -> Objective:
    """The objective of ``evaluate(net, params, state, shifted, given)``.

    `evaluate` returns loss, metrics and state; `given` are the keyword arguments of `net.apply`.
    """

    def objective(
        net: Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        shifted = _shifted(net, batch)
        given = {"key": key, "train": train, **shifted.side}
        loss, metrics, state = evaluate(net, params, state, shifted, given)
        count = total(shifted.labels.shape, shifted.mask, shifted.weights)
        return loss, (state, {"loss": loss, **metrics, "count": count})

    def shifted_inputs(net: Layer, batch: Any) -> tuple[jax.Array, dict[str, Any]]:
        shifted = _shifted(net, batch)
        return shifted.x, shifted.side

    result: Any = objective
    result.inputs = shifted_inputs
    return result


def _token_metrics(nll: jax.Array, hits: jax.Array) -> Metrics:
    """Metrics by the mean negative log-likelihood in nats and the fraction of correct tokens."""
    return {"accuracy": hits, "bits": nll / math.log(2)}


def _shifted(net: Layer, batch: Any) -> _Shifted:
    """Check a batch and split it into inputs and targets."""
    given = dict(batch) if isinstance(batch, Mapping) else {"x": batch}
    rest = {name: value for name, value in given.items() if name != "x" and value is not None}
    if "x" not in given or rest.keys() - net.side - {"asked", *OF_TARGETS}:
        raise LayerError(f"a batch with x and side inputs of the net ({listed(net.side)})",
                         listed(given), "rename or remove the rest: x holds inputs and targets")
    ids = given["x"]                                                  # (batch, time + 1)
    _check_ids(ids)
    labels = ids[:, 1:]

    # A target has a loss if all of these masks say so.
    weights = weighing(rest.pop("sample_weight", None), labels.shape)
    asked = spread(rest.pop("asked", None), ids.shape)
    mask = None if asked is None else asked[:, 1:]
    mask = _both(mask, spread(rest.pop("target_mask", None), labels.shape))
    if (valid := rest.get("mask")) is not None:
        valid = spread(valid, ids.shape)
        rest["mask"] = valid[:, :-1]
        mask = _both(mask, valid[:, 1:] & valid[:, :-1])
    for name in ("segments", "positions"):
        if name not in rest:
            continue
        value = rest[name]
        if getattr(value, "shape", None) != ids.shape:
            raise LayerError(f"{name} of the shape of x, {ids.shape}", show(value),
                             "give one to each token, the last one too")
        if name == "segments":
            mask = _both(mask, value[:, 1:] == value[:, :-1])
        rest[name] = value[:, :-1]
    side = {name: value for name, value in rest.items() if name in net.side}
    return _Shifted(ids[:, :-1], labels, weighed(mask, weights), weights, side)


def _both(mask: Mask, other: Mask) -> Mask:
    """The conjunction of two masks; None masks nothing."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def _check_ids(ids: Any) -> None:
    check_array(ids, rank=2, axes="(batch, time + 1)", floating=False)
    size = ids.shape[1] if ids.ndim == 2 else 0
    if (arguments.known(size) and size < 2) or not is_int(ids):
        raise LayerError("ids as ints (batch, time + 1), at least two tokens", show(ids),
                         "give at least two tokens to each row: the targets are all but the first")
    if not (arguments.at_most(2, size) and arguments.at_most(0, ids.shape[0] * (size - 1))):
        raise LayerError("ids with an open size of the form t + 1", show(ids),
                         'write jax.export.symbolic_shape("b, t + 1"): t of them are inputs')


def _check_shape(logits: Any, labels: jax.Array) -> None:
    check_array(logits)
    if logits.shape[:-1] != labels.shape:
        raise LayerError(
            f"a net that returns logits (batch, time, vocabulary) for {show(labels)}",
            show(logits), "return next-token logits at each step")


def _check_product(net: Layer, trunk: str, table: str) -> None:
    """Raise if trunk and table lie in one `linearize`, whose logits are no single product."""
    layer = net
    for name, other in zip(trunk.split("/"), table.split("/"), strict=False):
        if any(isinstance(own, Expanded) for own in layer.computed):
            raise LayerError("logits that are one product", repr(layer),
                             "use next_token: linearize turns a product into a sum of two")
        if name != other or name not in layer.children:
            return
        layer = layer.children[name]


def _output_kernel(params: Any, table: str) -> tuple[jax.Array, Any]:
    """The kernel (features, vocabulary) at a path of the parameters, and its bias or None."""
    leaves = paths(params)
    if table not in leaves or leaves[table].ndim != 2:
        raise LayerError(f"the path of a matrix as table ({listed(leaves)})", repr(table),
                         "write embed/embedding or head/kernel, for example")
    kernel = leaves[table]
    above, _, name = table.rpartition("/")
    if name == "embedding":
        return kernel.T, None
    return kernel, leaves.get(f"{above}/bias" if above else "bias")


def _check_masked_batch(net: Layer, batch: Any, y: Any) -> None:
    if isinstance(batch, Mapping) and "mask" in batch and "mask" not in net.side:
        raise LayerError("a net that takes mask", f"one that takes {listed(net.side)}",
                         "leave the mask out: tokens without a loss have the label -100")
    if not isinstance(y, (tuple, list)) or len(y) != 2:
        raise LayerError("y as a pair (token labels, follows)", show(y),
                         "use classification(ignore_index=-100) for tokens alone")


def _check_logit_pair(net: Layer, logits: Any) -> None:
    if not isinstance(logits, (tuple, list)) or len(logits) != 2:
        raise LayerError("a net that returns a pair of logits, of tokens and of follows",
                         show(logits), "use bert_pretraining, for example")
    if made_by(end := ending(net), "wiring.combinators.branch"):
        for part in end.children.values():
            check_logits(part)


def _masked_loss(metrics: Metrics) -> jax.Array:
    return metrics["token_loss"] + metrics["follows_loss"]


def _masked_metrics(
    net: Layer, batch: Any, x: Any, side: dict[str, Any], logits: Any, y: Any
) -> Metrics:
    """Metrics of the two parts: masked tokens, and pairs of sentences."""
    token_logits, follows_logits = logits
    labels, follows = y
    token_mask, token_weights = valid_targets(
        net, _target_part(batch, 0), x, side, labels.shape, lambda pair: pair[0])
    pair_mask, pair_weights = valid_targets(
        net, _target_part(batch, 1), x, side, follows.shape, lambda pair: pair[1])
    token_mask = known(labels, token_mask, IGNORED)

    def token_mean(values: jax.Array) -> jax.Array:
        return average(values, token_mask, token_weights)

    def pair_mean(values: jax.Array) -> jax.Array:
        return average(values, pair_mask, pair_weights)

    count = total(labels.shape, token_mask, token_weights)
    token_nll = cross_entropy(token_logits, labels, mask=token_mask, reduction="none")
    return {
        "token_loss": token_mean(token_nll),
        "token_accuracy": token_mean(accuracy(token_logits, labels, reduction="none")),
        "follows_loss": pair_mean(
            cross_entropy(follows_logits, follows, mask=pair_mask, reduction="none")),
        "follows_accuracy": pair_mean(accuracy(follows_logits, follows, reduction="none")),
        "count": total(follows.shape, pair_mask, pair_weights),
        "count/token_loss": count,
        "count/token_accuracy": count,
    }


def _target_part(batch: Any, i: int) -> dict[str, Any]:
    """The masks and weights of a batch for part i of y; an array is shared by both parts."""
    if not isinstance(batch, Mapping):
        return {}
    given = {name: batch.get(name) for name in OF_TARGETS}
    return {name: value[i] if isinstance(value, (tuple, list)) else value
            for name, value in given.items()}
