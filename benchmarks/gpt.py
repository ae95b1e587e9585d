"""A small GPT in diffprog against the same net written by hand in plain JAX.

    python benchmarks/gpt.py [--quick]

Six layers of width 256, 8 heads, a feed-forward net of 1024 with gelu, 256 steps, a vocabulary of
8192, batch 4, AdamW. The plain net is written in the obvious way: the layer norm as in its formula,
three products for queries, keys and values, attention by einsum, a loop over the layers. Both use
the same parameters, and the benchmark asserts that their losses and generated tokens are equal.
Tokens are generated in two ways: by `apply` in a scan with caches of 256 positions, and by whole
calls of `dp.text.generate` from Python, against the plain scan with caches of the same size.
`measuring.py` describes how times are measured.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import cpu, instructions, interleaved

import diffprog as dp

LAYERS, WIDTH, HEADS, HIDDEN, STEPS, VOCABULARY, BATCH = 6, 256, 8, 1024, 256, 8192, 4
KEY = jax.random.key(0)
OPTIMIZER = optax.adamw(1e-3)

# The net in diffprog.

BLOCK = (dp.pre_norm(dp.self_attention(HEADS, causal=True))
         >> dp.pre_norm(dp.ffn(HIDDEN, jax.nn.gelu)))


def gpt(body: dp.Layer) -> dp.Layer:
    return dp.serial(
        embed=dp.embedding(VOCABULARY, WIDTH), positions=dp.learned_positions(STEPS), body=body,
        norm=dp.layer_norm(), head=dp.linear(VOCABULARY))


def objective(
    net: dp.Layer, params: Any, state: Any, batch: Any, *, key: Any, train: bool
) -> tuple[jax.Array, Any]:
    logits, state = net.apply(params, state, batch[0], key=key, train=train)
    loss = dp.losses.cross_entropy(logits, batch[1])
    return loss, (state, {"loss": loss})


def scan(net: dp.Layer, params: Any, first: jax.Array, tokens: int) -> jax.Array:
    """Greedy decoding after the first tokens, (batch, 1) to (batch, tokens)."""

    def step(carry: Any, _: None) -> Any:
        token, state = carry
        logits, state = net.apply(params, state, token)
        token = logits.argmax(-1)
        return (token, state), token[:, 0]

    state = net.start(params, {}, first, length=STEPS)
    return jax.lax.scan(step, (first, state), length=tokens)[1].T


# The same net in plain JAX.


def linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: Any, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def projected(p: Any, x: jax.Array, joined: bool = False) -> list[jax.Array]:
    """Queries, keys and values, (batch, time, heads, features); `joined` makes one product."""
    parts = [p[name] for name in ("query", "key", "value")]
    if joined:
        whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *parts)
        products = jnp.split(linear(whole, x), 3, -1)
    else:
        products = [linear(part, x) for part in parts]
    return [a.reshape(*a.shape[:-1], HEADS, -1) for a in products]


def attention(p: Any, x: jax.Array, joined: bool) -> jax.Array:
    query, key, value = projected(p, x, joined)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    return linear(p["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


def feed(p: Any, x: jax.Array) -> jax.Array:
    return linear(p["down"], jax.nn.gelu(linear(p["up"], x)))


def plain(params: Any, ids: jax.Array, joined: bool = False) -> jax.Array:
    x = params["embed"]["embedding"][ids] + params["positions"]["embedding"][: ids.shape[1]]
    for i in range(LAYERS):
        first, second = params["body"][f"serial_{i}"].values()
        x = x + attention(first["body"], layer_norm(first["norm"], x), joined)
        x = x + feed(second["body"], layer_norm(second["norm"], x))
    return linear(params["head"], layer_norm(params["norm"], x))


def plain_step(net: Callable[..., jax.Array]) -> Callable[..., Any]:
    def loss(params: Any, batch: Any) -> jax.Array:
        logits = net(params, batch[0])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def step(state: Any, batch: Any) -> Any:
        params, optimizer = state
        found, grads = jax.value_and_grad(loss)(params, batch)
        updates, optimizer = OPTIMIZER.update(grads, optimizer, params)
        return (optax.apply_updates(params, updates), optimizer), {"loss": found}

    return jax.jit(step, donate_argnums=0)


def plain_scan(
    params: Any, first: jax.Array, tokens: int, positions: int = STEPS
) -> jax.Array:
    """`scan` in plain JAX. Caches have heads before positions, which is faster."""

    def attend(p: Any, x: jax.Array, cache: Any, index: jax.Array) -> Any:
        query, *new = (a.swapaxes(1, 2) for a in projected(p, x))
        keys, values = cache = [
            jax.lax.dynamic_update_slice_in_dim(old, a, index, 2)
            for old, a in zip(cache, new, strict=True)]
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, keys) / query.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.arange(positions) <= index, scores, -jnp.inf))
        y = jnp.einsum("bhqk,bhkd->bqhd", weights, values)
        return linear(p["out"], y.reshape(x.shape)), cache

    def step(carry: Any, _: None) -> Any:
        token, caches, index = carry
        table = params["positions"]["embedding"]
        x = params["embed"]["embedding"][token] + jax.lax.dynamic_slice_in_dim(table, index, 1)
        after = []
        for i, cache in enumerate(caches):
            attention_params, ffn_params = params["body"][f"serial_{i}"].values()
            normed = layer_norm(attention_params["norm"], x)
            y, cache = attend(attention_params["body"], normed, cache, index)
            x = x + y
            x = x + feed(ffn_params["body"], layer_norm(ffn_params["norm"], x))
            after.append(cache)
        token = linear(params["head"], layer_norm(params["norm"], x)).argmax(-1)
        return (token, after, index + 1), token[:, 0]

    empty = jnp.zeros((first.shape[0], HEADS, positions, WIDTH // HEADS))
    caches = [[empty, empty] for _ in range(LAYERS)]
    return jax.lax.scan(step, (first, caches, jnp.int32(0)), length=tokens)[1].T


# The sides, and their measurements.


class Side(NamedTuple):
    """One implementation: training step, initial state, and generation of tokens.

    `scan` is traced by the benchmark; `generate` is called as it is.
    """

    step: Callable[[], Any]  # a new jitted function each time, without cached programs
    state: Any
    scan: Callable[..., jax.Array] | None
    generate: Callable[..., jax.Array] | None


def sides() -> dict[str, Side]:
    nets = {"diffprog": gpt(BLOCK**LAYERS), "repeat": gpt(dp.repeat(LAYERS, BLOCK))}
    params, _ = nets["diffprog"].init(KEY, jax.ShapeDtypeStruct((BATCH, STEPS), jnp.int32))
    blocks = [params["body"][f"serial_{i}"] for i in range(LAYERS)]
    stacked = params | {"body": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    trees = {"diffprog": params, "repeat": stacked}

    def ours(name: str) -> Side:
        net, tree = nets[name], trees[name]
        state = dp.training.TrainState(tree, {}, OPTIMIZER.init(tree), KEY,
            jnp.zeros((), jnp.int32))
        return Side(lambda: dp.make_step(net, objective, OPTIMIZER).apply, state,
                    lambda first, tokens: scan(net, tree, first, tokens),
                    lambda first, tokens: dp.text.generate(net, tree, first, tokens).tokens)

    def plain_side(net: Any, scan: Any, generate: Any) -> Side:
        return Side(lambda: plain_step(net), (params, OPTIMIZER.init(params)), scan, generate)

    exact_cache = jax.jit(lambda first, tokens: plain_scan(params, first, tokens, tokens),
                          static_argnames="tokens")
    return {
        "plain": plain_side(plain, functools.partial(plain_scan, params), exact_cache),
        "diffprog": ours("diffprog"),
        "repeat": ours("repeat"),
        "joined": plain_side(functools.partial(plain, joined=True), None, None),
    }


def print_row(what: str, found: dict[str, tuple[float, float]], form: str, goal: str = "-") -> None:
    cells = [f"{format(value, form):>10} {ratio:6.2f}" for value, ratio in found.values()]
    print(f"{what:34s} {cells[0][:10]} {' '.join(cells[1:]):52s} {goal}", flush=True)


def measure_step(all_sides: dict[str, Side], rounds: int) -> None:
    """Measure the training step of each side, and compare the losses."""
    ids, labels = jax.random.randint(KEY, (2, BATCH, STEPS), 0, VOCABULARY)
    batch, programs = (ids, labels), {}
    compiling: dict[str, Callable[[], float]] = {}
    lowering: dict[str, Callable[[], float]] = {}
    lowered: dict[str, Any] = {}
    for name, side in all_sides.items():

        def lower(name: str = name, side: Side = side) -> float:
            step = side.step()
            return cpu(lambda: lowered.update({name: step.lower(side.state, batch)}))

        def compile(name: str = name, lower: Any = lower) -> float:
            lower()  # again, because a lowered step caches its program
            return cpu(lambda: programs.update({name: lowered[name].compile()}))

        lower()  # traces what all sides have in common
        lowering[name], compiling[name] = lower, compile
    times = {"lower": interleaved(lowering, rounds),
             "compile": interleaved(compiling, max(1, rounds // 3))}

    now, losses, running, calling = {}, {}, {}, {}
    for name, side in all_sides.items():
        step = side.step()
        now[name] = jax.tree.map(jnp.copy, side.state)  # the step donates its arguments

        def call(name: str = name, step: Any = step) -> float:
            """CPU seconds of this thread until the call returns; others do the computation."""
            start = time.thread_time()
            now[name], metrics = step(now[name], batch)
            seconds = time.thread_time() - start
            losses.setdefault(name, []).append(jax.block_until_ready(metrics)["loss"])
            jax.block_until_ready(now[name])
            return seconds

        for _ in range(3):
            call()
        calling[name] = call
        running[name] = lambda call=call: cpu(call)
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["plain"], rtol=0, atol=1e-5, err_msg=name)

    scaled = lambda found, by: {n: (value * by, r) for n, (value, r) in found.items()}  # noqa: E731
    counted = lambda f: {name: (f(program), f(program) / f(programs["plain"]))  # noqa: E731
                         for name, program in programs.items()}
    print_row("step, CPU ms", scaled(interleaved(running, rounds), 1e3), ".0f", "0.75")
    print_row("its dispatch, CPU us", scaled(interleaved(calling, rounds), 1e6), ".0f", "1.05")
    print_row("its lowering, CPU ms", scaled(times["lower"], 1e3), ".0f", "0.75; repeat 0.60")
    print_row("its compiling, CPU s", times["compile"], ".2f", "0.60; repeat 0.45")
    print_row("its instructions", counted(instructions), ".0f", "11000")
    megabytes = lambda program: program.memory_analysis().temp_size_in_bytes / 1e6  # noqa: E731
    print_row("its temporary memory, MB", counted(megabytes), ".0f")


def measure_generation(all_sides: dict[str, Side], batch: int, tokens: int, rounds: int) -> None:
    first = jnp.arange(batch)[:, None]
    scans = {name: jax.jit(functools.partial(side.scan, tokens=tokens))
             for name, side in all_sides.items() if side.scan}
    calls = {name: functools.partial(side.generate, tokens=tokens)
             for name, side in all_sides.items() if side.generate}
    for what, ways in (("scan", scans), ("generate", calls)):
        runs = {}
        for name, run in ways.items():
            np.testing.assert_array_equal(run(first), scans["plain"](first), err_msg=name)
            runs[name] = lambda run=run: cpu(lambda: jax.block_until_ready(run(first))) / tokens
        found = {name: (value * 1e3, r) for name, (value, r) in interleaved(runs, rounds).items()}
        print_row(f"{what}, batch {batch}, CPU ms a token", found, ".2f", "1.10")


def main() -> None:
    """Print a table with two columns per side: absolute numbers, and ratios to the plain net."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = parser.parse_args().quick
    print(f"jax {jax.__version__} on {jax.default_backend()}, diffprog {dp.__version__}")
    found = sides()
    heads = "".join(f"{name:>10} {'ratio' if name != 'plain' else '':6} " for name in found)
    print(f"{'':34s} {heads} goal", flush=True)
    measure_step(found, 3 if quick else 9)
    for batch in (1, 4):
        measure_generation(found, batch, 16 if quick else 128, 3 if quick else 11)


if __name__ == "__main__":
    main()
