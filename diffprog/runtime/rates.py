"""How fast a run is: seconds per step, entries per second, and utilization of the device."""

from __future__ import annotations

import time
from typing import Any

import jax

from diffprog.core.arguments import check_positive
from diffprog.runtime.watching import Observer

__all__ = ["rates"]

# Kind of device, as JAX names it -> dense bfloat16 operations per second by the maker's data sheet.
PEAKS = {
    **dict.fromkeys(["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"],
                    312e12),
    "NVIDIA H100 PCIe": 756e12,
    **dict.fromkeys(["NVIDIA H100 80GB HBM3", "NVIDIA H200"], 989e12),
    "TPU v4": 275e12,
    **dict.fromkeys(["TPU v5 lite", "TPU v5e"], 197e12),
    **dict.fromkeys(["TPU v5", "TPU v5p"], 459e12),
    **dict.fromkeys(["TPU v6 lite", "TPU v6e"], 918e12),
}


def rates(*, flops: float | None = None, peak: float | None = None, **counts: float) -> Observer:
    """An observer that adds ``seconds_per_step``, rates, and the utilization of the devices.

    The time is that between two calls, validation and checkpoints in between included. The first
    call begins it and adds nothing, so that compilation is left out. A call must wait for the
    device, as reading a metric does.

    ``utilization`` is model-FLOPs utilization (Chowdhery et al. 2022, PaLM, appendix B): operations
    per second, without those that are recomputed, divided by the peak of all devices of the state.

    Args:
        flops: floating-point operations of one training step, which adds ``flops_per_second``; as
            the backward pass costs about two forward passes, ``3 * dp.summary(net, x).flops``.
        peak: floating-point operations per second of one device. None is the bfloat16 peak of a
            common GPU or TPU; on other devices, and on CPU, there is no utilization.
        counts: what one step processes: ``tokens=8192`` adds ``tokens_per_second``.

    Returns:
        ``(step, state, metrics)``; of the state, the devices are used.

    Raises:
        LayerError: flops, peak or a count is not positive.

    Example:
        >>> net, x = dp.linear(3), jax.ShapeDtypeStruct((64, 4), jnp.float32)
        >>> rates = dp.runtime.rates(flops=3 * dp.summary(net, x).flops, peak=1e12, examples=64)
        >>> rates(10, None, {})
        >>> metrics = {"loss": 0.5}
        >>> rates(20, None, metrics)
        >>> list(metrics)[:3]
        ['loss', 'seconds_per_step', 'examples_per_second']
        >>> list(metrics)[3:]
        ['flops_per_second', 'utilization']
    """
    for name, value in {"flops": flops, "peak": peak, **counts}.items():
        if value is not None:
            check_positive(name, value, "pass the number of one step, or leave it out")
    before: tuple[int, float] | None = None

    def add(step: int, state: Any, metrics: dict[str, Any]) -> None:
        nonlocal before
        now = time.perf_counter()
        if before and step > before[0]:
            seconds = (now - before[1]) / (step - before[0])
            metrics["seconds_per_step"] = seconds
            metrics |= {f"{name}_per_second": count / seconds for name, count in counts.items()}
            if flops:
                metrics["flops_per_second"] = flops / seconds
                if most := _peak(state, peak):
                    metrics["utilization"] = flops / seconds / most
        before = step, now

    return add


def _peak(state: Any, of_one: float | None) -> float:
    """The peak of all devices of a state; 0 if it is not known."""
    arrays = (leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "sharding"))
    devices = max((array.sharding.device_set for array in arrays), key=len,
                  default={jax.devices()[0]})
    return sum(of_one or PEAKS.get(device.device_kind, 0.0) for device in devices)
