"""Train a GPT on a file of tokens: mixed precision, accumulation, checkpoints, resume, samples.

    python examples/train_gpt.py [--preset small|gpt2] [--data FOLDER] [--vocabulary N]
                                 [--steps N] [--every N] [--seed N] [--out train_gpt]

The folder of the run holds settings, versions, the net as code, a log of JSON lines, checkpoints
and the learning curve. The same command again goes on from the newest checkpoint, and ends with the
same bits as a run without an interruption. The log has losses, the gradient's norm, the learning
rate, tokens per second and, on a GPU or TPU, model-FLOPs utilization.

Data: `train.bin` and `validation.bin`, flat files of ids (uint16) as nanoGPT writes them, in the
folder --data. Without it, the help texts of the standard library (`pydoc_data.topics`) by bytes;
the last 10 % are the validation part.

The preset gpt2 is the job of nanoGPT on 8 GPUs (Karpathy 2022,
https://github.com/karpathy/nanoGPT, `config/train_gpt2.py`): GPT-2 of 124 million parameters on
half a million tokens a step. Write its tokens with `dp.data.write_tokens`, or with nanoGPT's
`prepare.py`.
"""

from __future__ import annotations

import argparse
import pathlib
import pydoc_data.topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffprog as dp

PROMPT = "The statement "


class Preset(NamedTuple):
    """A net, its batches and its schedule."""

    length: int  # of a window, in tokens
    width: int
    depth: int
    heads: int
    batch: int  # windows in a step
    accumulate: int  # parts in which they are computed
    steps: int
    rate: float  # the highest learning rate
    warmup: int  # steps

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.length


PRESETS = {
    "small": Preset(64, 96, 3, 4, batch=32, accumulate=2, steps=600, rate=3e-3, warmup=40),
    "gpt2": Preset(1024, 768, 12, 12, batch=480, accumulate=40, steps=600_000, rate=6e-4,
                   warmup=2000),
}


def network(preset: Preset, vocabulary: int) -> dp.Layer:
    """A GPT that computes in bfloat16, with float32 parameters, norms and losses."""
    net = dp.models.gpt(vocabulary, length=preset.length, width=preset.width, depth=preset.depth,
                        heads=preset.heads)
    return dp.mixed(net, jnp.bfloat16)


def write_bytes(folder: pathlib.Path) -> pathlib.Path:
    """The help texts as token files of bytes, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = len(text) * 9 // 10
    for name, part in (("train", text[:cut]), ("validation", text[cut:])):
        ids = np.frombuffer(part, np.uint8).astype(np.int32)
        dp.data.write_tokens(folder / f"{name}.bin", ids, vocabulary=256)
    return folder


def make_step(preset: Preset, net: dp.Layer, schedule: optax.Schedule) -> dp.training.Step:
    """AdamW with clipping, as nanoGPT has it; kernels and embeddings decay."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        dp.training.adamw(schedule, b2=0.95, weight_decay=0.1))
    return dp.make_step(net, dp.text.next_token(), optimizer, accumulate=preset.accumulate,
                        report=["gradient_norm"])


def sampler(net: dp.Layer, seed: int) -> Any:
    """An observer that prints a text of bytes which the net writes."""
    prompt = [np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32)]

    def sample(step: int, state: dp.training.TrainState, metrics: dict[str, Any]) -> None:
        key = jax.random.fold_in(jax.random.key(seed), step)
        written = dp.text.generate(net, state.params, prompt, 40, key=key, temperature=0.8)
        text = bytes(np.asarray(written.tokens[0]).tolist()).decode(errors="replace")
        print(f"step {step}: {PROMPT}{text}".replace("\n", " "), flush=True)

    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a GPT on a file of tokens.")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--data", type=pathlib.Path, help="a folder with train.bin and "
                        "validation.bin; the help texts of Python by bytes if left out")
    parser.add_argument("--vocabulary", type=int, default=50_304, help="of --data")
    parser.add_argument("--steps", type=int, help="that of the preset if left out")
    parser.add_argument("--every", type=int, default=50, help="steps between two readings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("train_gpt"),
                        help="the folder of the run")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    steps = preset.steps if args.steps is None else args.steps

    by_bytes = args.data is None
    vocabulary = 256 if by_bytes else args.vocabulary
    folder = write_bytes(args.out / "data") if by_bytes else args.data
    windows = [dp.data.token_windows(folder / f"{name}.bin", preset.length, vocabulary=vocabulary,
                                     stride=stride)
               for name, stride in (("train", 1), ("validation", None))]
    training = dp.data.pipeline(windows[0], preset.batch, seed=args.seed)
    validation = dp.batches(windows[1][: 10 * preset.batch], preset.batch, remainder="drop")

    net = network(preset, vocabulary)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, preset.rate, min(preset.warmup, steps // 4), steps, preset.rate / 10)
    step = make_step(preset, net, schedule)
    x = jax.ShapeDtypeStruct((preset.batch, preset.length), jnp.int32)
    run = dp.runtime.Run(args.out, {**vars(args), **preset._asdict()}, net)
    rates = dp.runtime.rates(flops=3 * dp.summary(net, x).flops, tokens=preset.tokens)

    def add_rate(step: int, state: Any, metrics: dict[str, Any]) -> None:
        metrics["learning_rate"] = float(np.asarray(schedule(step)))

    observers = [rates, add_rate, run, *([sampler(net, args.seed)] if by_bytes else [])]
    with dp.runtime.Checkpoints(args.out / "checkpoints", save_every=args.every) as checkpoints:
        result = dp.fit(step, training, steps=steps, key=jax.random.key(args.seed),
                        validation=validation, log_every=args.every, log=observers,
                        checkpoints=checkpoints, resume=True)
    dp.runtime.plot_history(result.history, args.out / "loss.png")
    last = result.history[-1]
    print(f"step {last['step']}: loss {last['loss']:.4f}, "
          f"validation {last['validation/loss']:.4f} nats per token")


if __name__ == "__main__":
    main()
