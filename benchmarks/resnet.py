"""A ResNet-18 in diffprog against the same net written by hand in plain JAX.

    python benchmarks/resnet.py [--quick]

The published net on images of 64 x 64, batch 8, and a step of SGD with momentum. The plain net is
written in the obvious way: a loop over the blocks, batch normalization as in its formula. Both have
the same initial parameters, and the benchmark asserts that their losses are equal. A second part
compares the gradient of a basic block in `repeat`, `ensemble` and `heads` with that of the same
blocks written out. `measuring.py` describes how times are measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import cpu, interleaved

import diffprog as dp
from diffprog.models.resnet import basic

CLASSES, SIDE, BATCH = 10, 64, 8
KEY = jax.random.key(0)
OPTIMIZER = optax.sgd(0.01, momentum=0.9)

# The net in plain JAX; its parameters and statistics are lists in order of use.


def conv_norm(p: Any, s: Any, x: jax.Array, stride: int = 1) -> tuple[jax.Array, Any]:
    """A convolution and batch normalization, in training."""
    pad = p["kernel"].shape[0] // 2
    x = jax.lax.conv_general_dilated(x, p["kernel"], (stride, stride), [(pad, pad)] * 2,
                                     dimension_numbers=("NHWC", "HWIO", "NHWC"))
    mean, var, count = x.mean((0, 1, 2)), x.var((0, 1, 2)), x.size // x.shape[-1]
    y = (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"]
    return y, {"mean": 0.9 * s["mean"] + 0.1 * mean,
               "var": 0.9 * s["var"] + 0.1 * var * count / (count - 1)}


def plain(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    def block(body: Any, x: jax.Array, stride: int) -> tuple[jax.Array, Any]:
        p, s = body
        y, first = conv_norm(p[0], s[0], x, stride)
        y, second = conv_norm(p[1], s[1], jax.nn.relu(y))
        if len(p) == 2:
            return jax.nn.relu(x + y), [first, second]
        x, third = conv_norm(p[2], s[2], x, stride)
        return jax.nn.relu(x + y), [first, second, third]

    x, new = conv_norm(params["stem"], state["stem"], x, 2)
    x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
                              [(0, 0), (1, 1), (1, 1), (0, 0)])
    after = []
    for p, s in zip(params["blocks"], state["blocks"], strict=True):
        x, moved = block((p, s), x, 2 if len(p) == 3 else 1)
        after.append(moved)
    y = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    return y, {"stem": new, "blocks": after}


def by_hand(params: Any, state: Any) -> tuple[Any, Any]:
    """The trees of the diffprog net in the structure of the plain net."""

    def units(tree: Any) -> Any:
        """A convolution and its normalization as one dict."""
        return {name: leaf for part in tree.values() for name, leaf in part.items()}

    def block(tree: Any) -> list[Any]:
        body, *rest = tree["residual_0"].values()
        names = sorted({name[-1] for name in body})
        split = [{n: a for n, a in body.items() if n[-1] == name} for name in names]
        return [units(part) for part in (*split, *rest)]

    def blocks(tree: Any) -> Iterator[list[Any]]:
        for stage in (tree[f"stage_{i}"] for i in range(1, 5)):
            if "first" in stage:
                yield block(stage["first"])
            count = len(jax.tree.leaves(stage["rest"])[0])
            yield from (block(jax.tree.map(lambda a, i=i: a[i], stage["rest"]))
                        for i in range(count))

    head = params["head"]["linear_0"]
    return ({"stem": units(params["stem"]), "blocks": [*blocks(params)], "head": head},
            {"stem": units(state["stem"]), "blocks": [*blocks(state)]})


def plain_step(state: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
        logits, new = plain(params, stats, batch[0])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), new

    params, stats, optimizer = state
    (found, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, optimizer = OPTIMIZER.update(grads, optimizer, params)
    return (optax.apply_updates(params, updates), stats, optimizer), {"loss": found}


def measure_step(rounds: int) -> None:
    x = jax.random.normal(KEY, (BATCH, SIDE, SIDE, 3))
    batch = x, jax.random.randint(KEY, (BATCH,), 0, CLASSES)
    step = dp.make_step(dp.models.resnet(18, CLASSES, zero_init=False), dp.classification(),
        OPTIMIZER)
    state = step.init(KEY, x)
    params, stats = jax.tree.map(jnp.copy, by_hand(state.params, state.state))
    steps = {"plain": jax.jit(plain_step, donate_argnums=0), "diffprog": step.apply}
    now = {"plain": (params, stats, OPTIMIZER.init(params)), "diffprog": state}
    losses: dict[str, list[Any]] = {name: [] for name in steps}

    def call(name: str) -> None:
        now[name], metrics = steps[name](now[name], batch)
        losses[name].append(metrics["loss"])
        jax.block_until_ready(now[name])

    for name in steps:
        call(name)  # compiles
    found = interleaved({name: lambda name=name: cpu(lambda: call(name)) for name in steps}, rounds)
    np.testing.assert_allclose(losses["diffprog"][:3], losses["plain"][:3], rtol=1e-3)
    show("a step of ResNet-18 / plain JAX", found)


def measure_blocks(rounds: int) -> None:
    x, block = jax.random.normal(KEY, (BATCH, 8, 8, 128)), basic(128)
    for what, ours, theirs in (
        ("repeat(1, block) / block", dp.repeat(1, block), block),
        ("repeat(2, block) / block**2", dp.repeat(2, block), block**2),
        ("repeat(3, block) / block**3", dp.repeat(3, block), block**3),
        ("repeat(2, remat) / remat**2", dp.repeat(2, block, remat=True), dp.remat(block) ** 2),
        ("ensemble(2, repeat(2, block))", dp.ensemble(2, dp.repeat(2, block)),
         dp.ensemble(2, block**2)),
        ("heads(2, repeat(1, block))", dp.heads(2, dp.repeat(1, block)), dp.heads(2, block)),
    ):
        sides = {"theirs": gradient_time(theirs, x), "ours": gradient_time(ours, x)}
        show(what, interleaved(sides, rounds))


def gradient_time(net: dp.Layer, x: jax.Array) -> Callable[[], float]:
    """A function that returns the CPU time of one gradient in training."""
    params, state = net.init(KEY, x)

    def loss(params: Any) -> Any:
        y, new = net.apply(params, state, x, train=True)
        return jnp.square(y).mean(), new

    run = jax.jit(jax.grad(loss, has_aux=True))
    jax.block_until_ready(run(params))  # compiles
    return lambda: cpu(lambda: jax.block_until_ready(run(params)))


def show(what: str, found: dict[str, tuple[float, float]]) -> None:
    (theirs, _), (ours, ratio) = found.values()
    print(f"{what:34s} {ours * 1e3:9.1f} ms {theirs * 1e3:9.1f} ms {ratio:6.2f}   goal 1.1",
          flush=True)


def main() -> None:
    """Print each measurement beside its goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 3 if parser.parse_args().quick else 9
    print(f"jax {jax.__version__} on {jax.default_backend()}, diffprog {dp.__version__}, CPU time")
    measure_step(rounds)
    measure_blocks(rounds)


if __name__ == "__main__":
    main()
