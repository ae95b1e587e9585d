"""Overhead of the core over hand-written JAX: import, dispatch, tracing, depth, convolutions.

    python benchmarks/core.py

`measuring.py` describes how times are measured.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from measuring import ratio

import diffprog as dp

KEY = jax.random.key(0)


def chain() -> tuple[Any, Any, Any, jax.Array]:
    """A tiny MLP of 60 layers, the same in plain JAX, and the nested dict that both read."""
    x = jnp.ones((1, 8))
    net = dp.serial(*[f for _ in range(60) for f in (dp.linear(8), jax.nn.relu)])

    def plain(params: Any, x: Any) -> Any:
        for i in range(60):
            layer = params[f"linear_{i}"]
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x

    return net, plain, net.init(KEY, x)[0], x


def dispatch() -> float:
    """The time of jitted calls of the chain, over plain JAX."""
    net, plain, params, x = chain()
    ours, theirs = jax.jit(net), jax.jit(plain)
    repeat_calls = lambda f: [f(params, x) for _ in range(300)][-1].block_until_ready()  # noqa: E731
    for f in (ours, theirs):
        repeat_calls(f)  # compiles
    return ratio(lambda: repeat_calls(ours), lambda: repeat_calls(theirs), 41)


def trace() -> float:
    """The time of tracing and lowering the chain, over plain JAX."""
    net, plain, params, x = chain()
    lower = lambda f: jax.jit(lambda p, x: f(p, x)).lower(params, x)  # noqa: E731
    return ratio(lambda: lower(net), lambda: lower(plain), 21)


def depth() -> float:
    """The time of tracing and compiling the gradient of 48 repeated layers, over that of 6."""
    x = jnp.ones((4, 64))
    block = dp.residual(dp.layer_norm() >> dp.linear(256) >> dp.gelu >> dp.linear(64))

    def build(n: int) -> None:
        net = dp.repeat(n, block)
        plan = net.plan(x)
        jax.jit(jax.grad(lambda p: net(p, x).sum())).lower(plan.params).compile()

    build(2)  # compiles what both sides have in common
    return ratio(lambda: build(48), lambda: build(6), 5)


def convolutions() -> float:
    """The time of the gradient of 4 repeated convolutions, over that of 4 written out."""
    x = jax.random.normal(KEY, (16, 16, 16, 32))
    block = dp.residual(dp.conv(32, 3) >> jax.nn.relu)

    def gradient(net: dp.Layer) -> Callable[[], Any]:
        params = net.init(KEY, x)[0]
        run = jax.jit(jax.grad(lambda p: jnp.square(net(p, x)).mean()))
        jax.block_until_ready(run(params))  # compiles
        return lambda: jax.block_until_ready([run(params) for _ in range(5)])

    return ratio(gradient(dp.repeat(4, block)), gradient(block**4), 21)


def importing() -> float:
    """CPU seconds of `import diffprog` after `import jax, optax`, in fresh interpreters."""
    # Garbage of jax is collected first, so that its collection does not count.
    code = ("import gc, jax, optax, time; gc.collect(); t = time.process_time(); import diffprog; "
            "print(time.process_time() - t)")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    """Print each measurement beside its goal."""
    print(f"jax {jax.__version__} on {jax.default_backend()}, diffprog {dp.__version__}")
    for what, measured, goal in (
        ("import, CPU seconds over jax and optax", importing(), "0.05"),
        ("jitted call of 60 layers / plain JAX", dispatch(), "1.05"),
        ("trace and lower 60 layers / plain JAX", trace(), "-"),
        ("trace and compile repeat(48) / repeat(6)", depth(), "1.5"),
        ("gradient of repeated / written-out conv", convolutions(), "1.1"),
    ):
        print(f"{what:42s} {measured:7.3f}   goal {goal}", flush=True)


if __name__ == "__main__":
    main()
