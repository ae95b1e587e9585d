"""Grade the exercises of a folder: `make grade`, or `make grade FROM=FOLDER`.

    python docs/course/exercises/grade.py [FOLDER]

Each function is compared with NumPy, and with the laws that `dp.check` tries on any layer. The
first thing that is wrong is printed. The exit status is 1 unless all pass.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffprog as dp

HERE = pathlib.Path(__file__).parent
KEY = jax.random.key(0)


class Wrong(Exception):
    """What is wrong with an answer."""


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def near(found: Any, wanted: Any) -> bool:
    """Whether arrays are equal to rounding."""
    return np.shape(found) == np.shape(wanted) and np.allclose(found, wanted, atol=1e-4)


def expect(found: Any, wanted: Any, what: str, **faults: Any) -> None:
    """Raise unless found is what is wanted; `faults` are what typical faults give, by name."""
    if np.shape(found) != np.shape(wanted):
        raise Wrong(f"{what}: the shape is {np.shape(found)}, not {np.shape(wanted)}")
    if near(found, wanted):
        return
    for fault, value in faults.items():
        if near(found, value):
            raise Wrong(f"{what}: {fault.replace('_', ' ')}")
    error = np.abs(np.asarray(found) - np.asarray(wanted)).max()
    raise Wrong(f"{what}: wrong by up to {error:.2g}")


def lawful(layer: dp.Layer, x: Any, **options: Any) -> None:
    """Raise what `dp.check` finds."""
    try:
        dp.check(layer, x, **options)
    except dp.LayerError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise Wrong(f"a law does not hold: {first[0].strip()}") from error


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    exp = np.exp(x - x.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def grade_attention(answer: ModuleType) -> None:
    query, key, value = draw(3, 4), draw(5, 4, seed=1), draw(5, 2, seed=2)
    everything, masked = np.ones(5, bool), np.array([True, True, False, True, False])
    scores = query @ key.T / 2
    expect(answer.attention(query, key, value, everything), softmax(scores) @ value, "attention",
           the_factor_of_the_scores_is_missing=softmax(2 * scores) @ value,
           the_scores_are_divided_by_D=softmax(scores / 2) @ value,
           the_softmax_is_over_the_queries=softmax(scores, 0) @ value)
    weights = softmax(np.where(masked, scores, -np.inf))
    expect(answer.attention(query, key, value, masked), weights @ value, "attention with a mask",
           the_mask_has_no_effect=softmax(scores) @ value,
           the_mask_is_inverted=softmax(np.where(masked, -np.inf, scores)) @ value,
           the_weights_do_not_sum_to_1=(softmax(scores) * masked) @ value)
    layer = dp.stateless(None, lambda params, x: jax.vmap(
        lambda x: answer.attention(x, x, x, jnp.ones(len(x), bool)))(x))
    lawful(layer, jnp.asarray(draw(2, 5, 4)), symmetry="equivariant")


def grade_residual(answer: ModuleType) -> None:
    x, params = draw(2, 3, 8), answer.init(KEY, 8, 16)
    shapes = {name: np.shape(array) for name, array in params.items()}
    if shapes != {"first": (8, 16), "second": (16, 8)}:
        raise Wrong(f"init: the parameters are {shapes}")
    if not np.any(params["first"]):
        raise Wrong("init: both kernels are zero, so that no gradient reaches either")
    params = {"first": draw(8, 16, seed=1), "second": draw(16, 8, seed=2)}
    centered = x - x.mean(-1, keepdims=True)
    normal = centered / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    branch = np.maximum(normal @ params["first"], 0) @ params["second"]
    plain = np.maximum(x @ params["first"], 0) @ params["second"]
    expect(answer.apply(params, x), x + branch, "apply", the_sum_with_x_is_missing=branch,
           the_norm_is_missing=x + plain, the_normal_x_is_added_instead_of_x=normal + branch,
           the_activation_is_missing=x + normal @ params["first"] @ params["second"])
    if not near(answer.apply(answer.init(KEY, 8, 16), x), x):
        raise Wrong("init: the block does not begin as the identity")
    lawful(dp.stateless(lambda key, x: answer.init(key, x.shape[-1], 4), answer.apply),
           jnp.asarray(x))


def grade_backpropagation(answer: ModuleType) -> None:
    x, target, *kernels = draw(6, 3), draw(6, 2, seed=1), draw(3, 4, seed=2), draw(4, 2, seed=3)

    def loss(w1: Any, w2: Any) -> Any:
        return jnp.sum((jnp.tanh(x @ w1) @ w2 - target) ** 2) / 2

    by_w1, by_w2 = jax.grad(loss, (0, 1))(*kernels)
    h = np.tanh(x @ kernels[0])
    by_h = (h @ kernels[1] - target) @ kernels[1].T
    found = answer.gradients(x, target, *kernels)
    expect(found[1], by_w2, "the gradient by w2", the_factor_1_2_of_the_loss_is_missing=2 * by_w2,
           the_sign_is_wrong=-by_w2, it_is_a_mean_over_examples=by_w2 / 6)
    expect(found[0], by_w1, "the gradient by w1", the_slope_of_tanh_is_missing=x.T @ by_h,
           the_slope_of_tanh_is_taken_at_h_instead_of_x_W1=x.T @ (by_h * (1 - np.tanh(h) ** 2)),
           the_sign_is_wrong=-by_w1)


def grade_adam(answer: ModuleType) -> None:
    w, optimizer = draw(5), optax.adam(0.1)
    state, expected, found = optimizer.init(w), w, (w, np.zeros(5), np.zeros(5))
    for t in (1, 2, 3):
        g = draw(5, seed=t)
        updates, state = optimizer.update(g, state, expected)
        before, expected = found, optax.apply_updates(expected, updates)
        found = answer.step(*before, g, t, rate=0.1)
        if len(found) != 3:
            raise Wrong(f"step {t}: it returns {len(found)} values, not w, m and v")
        m, v = 0.9 * before[1] + 0.1 * g, 0.999 * before[2] + 0.001 * g**2
        size = np.sqrt(v / (1 - 0.999**t))
        expect(found[0], expected, f"step {t}",
               the_bias_correction_is_missing=before[0] - 0.1 * m / (np.sqrt(v) + 1e-8),
               the_correction_of_m_is_missing=before[0] - 0.1 * m / size,
               the_step_goes_uphill=2 * before[0] - np.asarray(expected),
               the_root_is_missing=before[0] - 0.1 * m / (1 - 0.9**t) / size**2)
        expect(found[1], m, f"m after step {t}")
        expect(found[2], v, f"v after step {t}")


def grade_convolution(answer: ModuleType) -> None:
    kernel, x = draw(3, 2, 4), draw(2, 6, 2, seed=1)
    padded = np.pad(x, [(0, 0), (1, 1), (0, 0)])

    def slid(kernel: np.ndarray, padded: np.ndarray) -> np.ndarray:
        return np.sum([padded[:, j : j + 6] @ kernel[j] for j in range(3)], axis=0)

    late = np.pad(x, [(0, 0), (2, 0), (0, 0)])
    around = np.concatenate([x[:, -1:], x, x[:, :1]], 1)
    expect(answer.convolution(kernel, x), slid(kernel, padded), "convolution",
           the_kernel_is_flipped=slid(kernel[::-1], padded),
           the_padding_is_on_one_side=slid(kernel, late), x_goes_around=slid(kernel, around))
    layer = dp.stateless(lambda key, x: {"kernel": jax.random.normal(key, (3, x.shape[-1], 4))},
                         lambda params, x: answer.convolution(params["kernel"], x))
    lawful(layer, jnp.asarray(x))


GRADES: dict[str, Callable[[ModuleType], None]] = {
    "attention": grade_attention, "residual": grade_residual,
    "backpropagation": grade_backpropagation, "adam": grade_adam,
    "convolution": grade_convolution,
}


def loaded(path: pathlib.Path) -> ModuleType:
    """The module of a file."""
    found = importlib.util.spec_from_file_location(f"answer_{path.stem}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def graded(name: str, folder: pathlib.Path) -> str:
    """"passed", or what is wrong."""
    path = folder / f"{name}.py"
    if not path.is_file():
        return f"there is no {path.name} in {folder}"
    try:
        GRADES[name](loaded(path))
    except NotImplementedError:
        return "not begun: write what raises NotImplementedError"
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return "passed"


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    results = {name: graded(name, folder) for name in GRADES}
    for name, result in results.items():
        print(f"{name}: {result}")
    sys.exit(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    main()
