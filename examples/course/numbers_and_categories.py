"""A table of numbers and categories: what enters a net as a number, and what as an embedding.

    python examples/course/numbers_and_categories.py [--short] [--seed N] [--out FOLDER]

A category has no order. As a number 0, 1, 2 it gives a linear model one slope; one-hot, a value for
each category. An embedding is a one-hot code times a matrix, looked up. Data: scikit-learn's wines
(178 wines of 3 cultivars, 13 measured quantities) and diabetes (442 patients). The head decides
what is predicted: linear(1) with the squared error a number, linear(classes) with the cross-entropy
a class; one body serves both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from experiment import Experiment, run
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import LinearRegression, LogisticRegression
from style import BLUE, COLORS, ORANGE, figure

import diffprog as dp


def standardized(x: Any) -> np.ndarray:
    """Columns of mean 0 and deviation 1."""
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def explained(predictions: Any, y: Any) -> float:
    """The fraction of the variance of y that is explained, R^2."""
    return 1 - float(((np.asarray(predictions) - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def trained(net: dp.Layer, objective: Any, x: Any, y: Any, steps: int, key: Any,
            rate: float = 0.05, params: Any = None) -> tuple[Any, np.ndarray]:
    """Parameters after steps on all examples at once, and the loss of each step."""
    step = dp.make_step(net, objective, optax.adam(rate), donate=False)
    state = step.init(key, x)
    if params is not None:
        state = state._replace(params=params)
    state, metrics = jax.jit(lambda state: jax.lax.scan(
        lambda state, _: step.apply(state, (x, y)), state, length=steps))(state)
    return state.params, np.asarray(metrics["loss"])


def of_category(experiment: Experiment, cultivar: np.ndarray, alcohol: np.ndarray) -> dict:
    """Predict the alcohol of a wine from its cultivar alone, in three codes."""
    columns = {
        "number": dp.linear(1),
        "one-hot": dp.one_hot(3) >> dp.linear(1, bias=False),
        "embedding": dp.embedding(3, 4) >> dp.linear(1, bias=False),
    }
    found = {}
    for name, net in columns.items():
        x = cultivar[:, None].astype(np.float32) if name == "number" else cultivar
        params, _ = trained(net, dp.regression(), x, alcohol, 500, experiment.key)
        found[name] = np.asarray(net(params, x))
        experiment.record(f"alcohol from the cultivar as {name}: explained variance",
                          explained(found[name], alcohol))
    means = np.stack([alcohol[cultivar == k].mean(0) for k in range(3)])[cultivar]
    worst = max(abs(found[name] - means).max() for name in ("one-hot", "embedding"))
    experiment.claim("Cultivar as a number explains little of the alcohol; one-hot and embedded it "
                     "predicts the mean of each cultivar, within 0.01 deviations.",
                     explained(found["number"], alcohol) < 0.2 and worst < 0.01)
    return found


def same_training(experiment: Experiment, cultivar: np.ndarray, alcohol: np.ndarray) -> None:
    """An embedding and a one-hot code with the same matrix: losses and costs."""
    table = dp.serial(code=dp.embedding(3, 4), head=dp.linear(1))
    coded = dp.serial(code=dp.one_hot(3) >> dp.linear(4, bias=False), head=dp.linear(1))
    params, _ = table.init(experiment.key, cultivar)
    as_coded = params | {"code": {"linear_0": {"kernel": params["code"]["embedding"]}}}
    _, losses = trained(table, dp.regression(), cultivar, alcohol, 100, experiment.key,
                        params=params)
    _, others = trained(coded, dp.regression(), cultivar, alcohol, 100, experiment.key,
                        params=as_coded)
    difference = experiment.record("embedding and one-hot: largest difference of a training loss",
                                   abs(losses - others).max())
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    costs = [dp.summary(net, ids).flops for net in (
        dp.embedding(50_000, 64), dp.one_hot(50_000) >> dp.linear(64, bias=False))]
    experiment.record("FLOPs to embed one of 50,000 categories", costs[0])
    experiment.record("FLOPs of its one-hot code times the matrix", costs[1])
    experiment.claim("An embedding trains as a one-hot code times the same matrix, within 1e-5, "
                     "and costs a thousandth for many categories.",
                     difference < 1e-5 and costs[0] < costs[1] / 1000)


def main(experiment: Experiment) -> None:
    """Codes of a category; a mixed table against least squares; two heads on one body."""
    wine: Any = load_wine()
    numbers, cultivar = standardized(wine.data), wine.target.astype(np.int32)
    alcohol, others = numbers[:, :1], numbers[:, 1:]
    found = of_category(experiment, cultivar, alcohol)
    same_training(experiment, cultivar, alcohol)

    patients: Any = load_diabetes(scaled=False)
    sex = patients.data[:, 1].astype(np.int32) - 1                     # a category: 0 or 1
    table = standardized(np.delete(patients.data, 1, axis=1)), sex
    target = standardized(patients.target[:, None])
    net = dp.parallel(dp.linear(1), dp.embedding(2, 1)) >> sum
    params, _ = trained(net, dp.regression(), table, target, 3000, experiment.key)
    columns = np.column_stack([table[0], np.eye(2)[sex]])
    exact = LinearRegression().fit(columns, target).predict(columns)
    fitted = np.asarray(net(params, table))
    error = experiment.record("diabetes: largest difference to least squares in deviations",
                              abs(fitted - exact).max())
    experiment.record("diabetes: explained variance of the linear net", explained(fitted, target))
    experiment.claim("A linear net of nine numbers and an embedded category reaches the least "
                     "squares of scikit-learn, within 0.01 deviations.", error < 0.01)

    # One body, two heads: the cultivar is a class, the alcohol a number.
    order = experiment.rng.permutation(len(cultivar))
    train, held_out = order[60:], order[:60]
    heads = dp.serial(body=dp.linear(32) >> jnp.tanh, heads=dp.branch(dp.linear(3), dp.linear(1)))

    def objective(net: Any, params: Any, state: Any, batch: Any, *, key: Any, train: bool) -> Any:
        x, (label, value) = batch
        (logits, predicted), state = net.apply(params, state, x, key=key, train=train)
        loss = dp.losses.cross_entropy(logits, label) + dp.losses.squared_error(predicted, value)
        return loss, (state, {"loss": loss})

    params, _ = trained(heads, objective, others[train], (cultivar[train], alcohol[train]), 150,
                        experiment.key, rate=0.01)
    logits, predicted = heads(params, others[held_out])
    accuracy = 100 * float((logits.argmax(-1) == cultivar[held_out]).mean())
    reference = LogisticRegression(max_iter=1000).fit(others[train], cultivar[train])
    accuracy_reference = 100 * reference.score(others[held_out], cultivar[held_out])
    r2 = explained(predicted, alcohol[held_out])
    experiment.record("class head: cultivar, accuracy on held-out wines in percent", accuracy)
    experiment.record("logistic regression of scikit-learn: the same", accuracy_reference)
    experiment.record("number head: alcohol, explained variance of held-out wines", r2)
    experiment.claim("A body with two heads classifies held-out wines as well as a logistic "
                     "regression, within 4 points, and explains over a fifth of the variance of "
                     "their alcohol.", accuracy > accuracy_reference - 4 and r2 > 0.2)

    drawn = figure(11, 3.8, "Numbers and categories of a table")
    left, middle, right = drawn.subplots(1, 3)
    left.scatter(cultivar + experiment.rng.uniform(-0.15, 0.15, len(cultivar)), alcohol, s=8,
                 color="0.6", label="a wine")
    ends = np.array([int(np.argmax(cultivar == k)) for k in range(3)])
    left.plot(range(3), found["number"][ends], color=ORANGE, ls="--", label="as a number")
    left.plot(range(3), found["one-hot"][ends], "D", color=BLUE, ls="", label="one-hot")
    left.set(title="A category is no number", xlabel="cultivar", xticks=range(3),
             ylabel="alcohol in deviations")
    left.legend(fontsize=8)
    middle.plot(exact, fitted, ".", color=BLUE, ms=4)
    middle.axline((0, 0), slope=1, color=ORANGE, ls="--")
    middle.set(title="Diabetes: equal to least squares", xlabel="least squares, in deviations",
               ylabel="linear net, trained")
    for k, marker in enumerate("os^"):
        chosen = np.asarray(logits.argmax(-1)) == k
        right.scatter(alcohol[held_out][chosen], predicted[chosen], s=16, color=COLORS[k],
                      marker=marker, label=f"predicted cultivar {k}")
    right.legend(fontsize=8)
    right.axline((0, 0), slope=1, color="0.5", ls=":")
    right.set(title="One body, two heads", xlabel="alcohol in deviations",
              ylabel="predicted")
    experiment.save(drawn, "numbers_and_categories", "A category in two codes, a mixed table "
                    "against least squares, and a body with two heads.")


if __name__ == "__main__":
    run(main)
