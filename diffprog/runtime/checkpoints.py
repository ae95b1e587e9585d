"""Checkpoints of a training run: written in the background, verified before they are loaded."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffprog.core.arguments import check_count, check_kept, is_array
from diffprog.core.errors import LayerError
from diffprog.core.notation import listed, show
from diffprog.core.paths import paths
from diffprog.runtime import manifests
from diffprog.runtime.differences import described, difference

__all__ = ["Checkpoints"]

_MARK = "checkpoints.txt"
_ABOUT = ("Checkpoints of diffprog. Each numbered folder is a training step in the format of "
          f"orbax,\nwith the sha256 of its files in {manifests.NAME}.\n")
_PARTIAL = ".orbax-checkpoint-tmp"  # orbax renames a folder when it is complete


class Checkpoints:
    """A folder of checkpoints, as a callback of a training loop: ``(step, state, metrics)``.

    A checkpoint is any tree of arrays, mostly the whole `TrainState`, and the position in the data.
    It is written in the background, in the format of orbax, after the arrays were copied; so a step
    may donate its state at once. The sha256 of each file is compared before a checkpoint is loaded.
    A run that is killed at any time goes on from the last complete checkpoint. In a ``with`` block,
    the last save is complete at the end. One process writes into a folder.

    Args:
        folder: where to save; made if missing. Other files than checkpoints must not be in it.
        save_every: number of steps between two saves by the callback; it saves at its first call
            after that many.
        last: number of newest checkpoints to keep.
        best: number of best checkpoints to keep besides; needs the metric.
        metric: the validation metric that selects the best, as in `fit`.
        highest: whether the highest `metric` is best, rather than the lowest.

    Attributes:
        steps: the steps of the complete checkpoints, in order.
        best_steps: those with the metric, the best first.

    Raises:
        LayerError: a folder that is a file, cannot be written, or has other content.

    Example:
        >>> import tempfile
        >>> x, y = jnp.eye(4), jnp.arange(4)
        >>> step = dp.make_step(dp.linear(4), dp.classification(), optax.adam(0.1))
        >>> state = step.init(jax.random.key(0), x)
        >>> with dp.runtime.Checkpoints(tempfile.mkdtemp(), save_every=2) as checkpoints:
        ...     for number in range(1, 6):
        ...         state, metrics = step.apply(state, (x, y))
        ...         checkpoints(number, state, metrics)
        >>> number, state, data = checkpoints.restore(jax.eval_shape(step.init, state.key, x))
        >>> number, int(state.step)
        (4, 4)
    """

    def __init__(
        self, folder: str | pathlib.Path, *, save_every: int = 1000, last: int = 3, best: int = 0,
        metric: str = "loss", highest: bool = False,
    ) -> None:
        check_count("save_every", save_every)
        check_count("last", last)
        check_count("best", best, 0)
        self.folder = pathlib.Path(folder).absolute()
        self.save_every, self.last, self.best = save_every, last, best
        self.metric, self.highest = f"validation/{metric}", highest
        self._orbax = _orbax()
        self._continued = _opened(self.folder)
        self._at: int | None = None  # the step that was saved or restored last
        self._refused: set[int] = set()  # steps that differ from their manifest
        self._manager: Any = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._written: tuple[int, concurrent.futures.Future[None]] | None = None

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return [step for step in self._found() if step not in self._refused
                and (self._at_step(step) / manifests.NAME).exists()]

    @property
    def best_steps(self) -> list[int]:
        """The steps of the checkpoints with the metric, the best first; NaN is none."""
        values = {step: self._metric_of(step) for step in self.steps}
        sign = -1 if self.highest else 1
        ranked = [(sign * value, step) for step, value in values.items()
                  if value is not None and not math.isnan(value)]
        return [step for _, step in sorted(ranked)]

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Save if it is due."""
        if self.due(step):
            self.save(step, state, metrics=metrics)

    def due(self, step: int) -> bool:
        """Whether `save_every` steps passed since the last save."""
        return step // self.save_every > (self._at or 0) // self.save_every

    def save(
        self, step: int, tree: Any, *, data: Any = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Copy a tree and write it in the background; waits for the save before.

        Args:
            step: number of steps taken, larger than those in the folder; the step that was saved or
                restored last is not saved again.
            tree: a pytree of arrays and numbers, such as a `TrainState`.
            data: the position in the data, bytes or what JSON can hold.
            metrics: the metrics of the reading, for the best.

        Raises:
            LayerError: a step before the last one in the folder; a leaf that is neither an array
                nor a number; the metric is missing; this save, or the one before, was not possible,
                as on a full disk: earlier checkpoints stay.
        """
        check_count("step", step, 0)
        self.wait()
        if step == self._at:
            return
        check_kept(tree)
        leaves = _leaves(tree)
        about = described(tree), manifests.as_json(data), self._value(metrics)
        if self._manager is None:
            self._manager = self._made_manager()
        if (done := self.steps) and done[-1] >= step:
            raise LayerError(f"a step after {done[-1]}, the last in {self.folder}", str(step),
                             "restore it and go on from there, or choose another folder")
        try:
            self._manager.save(step, args=self._orbax.args.StandardSave(leaves), force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._at = step
        self._written = step, self._writer.submit(self._complete, step, *about)

    def wait(self) -> None:
        """Wait until the last save is complete; raise if it was not possible."""
        if self._written is None:
            return
        (step, written), self._written = self._written, None
        try:
            written.result()
        except Exception as error:
            self._at = None
            raise self._failed(step, error) from error

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, Any] | None:
        """The newest complete checkpoint as ``(step, tree, data)``; None if there is none.

        A checkpoint of which a file was changed or is missing is passed over with a warning. A run
        that was killed before its first complete save returns None with a warning.

        Args:
            like: a tree with the structure, shapes and dtypes to restore, and the placement on
                devices if it has one: a state, or `jax.eval_shape` of what makes it.
            step: a step of `steps` or `best_steps`; None is the newest.

        Raises:
            LayerError: the checkpoint is of another net: the error lists the paths that differ,
                with likely renames; all checkpoints were changed; there is none of `step`.
        """
        self.wait()
        complete = self.steps
        if step is not None and step not in complete:
            raise LayerError(f"a step out of {listed(complete)}", str(step), "choose one of them")
        faults = []
        for number in reversed(complete) if step is None else [step]:
            try:
                manifest = manifests.read(self._at_step(number))
                manifests.check_files(self._at_step(number), manifest.files)
            except manifests.Broken as error:
                self._refuse(number)
                faults.append(str(error))
                continue
            if faults:
                warnings.warn(f"{', '.join(faults)}: step {number} is used instead", stacklevel=2)
            tree, self._at = self._loaded(number, like, manifest.leaves), number
            return number, tree, manifest.data
        if faults:
            raise LayerError("a checkpoint whose files are as they were saved", ", ".join(faults),
                             "restore the files from a copy, or begin in another folder")
        if self._continued:
            warnings.warn(f"no complete checkpoint in {self.folder}: begin at step 0",
                          stacklevel=2)
        return None

    def close(self) -> None:
        """Wait for the last save, and end the threads that write."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._end_manager()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _found(self) -> list[int]:
        """The steps of all numbered folders, in order."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def _at_step(self, step: int) -> pathlib.Path:
        return self.folder / str(step)

    def _metric_of(self, step: int) -> float | None:
        with contextlib.suppress(manifests.Broken):
            return manifests.read(self._at_step(step)).metric
        return None

    def _value(self, metrics: Mapping[str, Any] | None) -> float | None:
        """The metric of a reading; None without one."""
        if metrics is not None and self.metric in metrics:
            return float(metrics[self.metric])
        if metrics is not None and self.best:
            raise LayerError(f"the metric {self.metric}, which selects the best", listed(metrics),
                             "pass validation data, or metric=")
        return None

    def _made_manager(self) -> Any:
        """The manager of orbax; what a killed run left, and what was refused, is put away first."""
        for step in set(self._found()) - set(self.steps):
            if step in self._refused:
                aside = self.folder / f"{step}.refused"
                shutil.rmtree(aside, ignore_errors=True)
                self._at_step(step).rename(aside)
            else:
                shutil.rmtree(self._at_step(step))
        self._refused.clear()
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=None, cleanup_tmp_directories=True, save_root_metadata=False)
        return self._orbax.CheckpointManager(self.folder, options=options)

    def _end_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # a failed save was raised by `wait`
                manager.close()

    def _complete(self, step: int, leaves: dict[str, str], data: Any, metric: float | None) -> None:
        """Wait for orbax, write the manifest, and only then delete old checkpoints."""
        self._manager.wait_until_finished()
        manifests.write(self._at_step(step), leaves, data, metric)
        kept = {*self.steps[-self.last :], *self.best_steps[: self.best]}
        for old in set(self.steps) - kept:
            (self._at_step(old) / manifests.NAME).unlink()  # half deleted, it is incomplete
            self._manager.delete(old)

    def _failed(self, step: int, error: Exception) -> LayerError:
        """The error for a save that was not possible; what is written of it is removed."""
        self._end_manager()
        shutil.rmtree(self.folder / f"{step}{_PARTIAL}", ignore_errors=True)
        done = self.steps
        if step not in done:
            shutil.rmtree(self._at_step(step), ignore_errors=True)
        stays = f"the last complete checkpoint is {done[-1]}" if done else "there is no other yet"
        why = " ".join(str(error).split())[-120:]  # the system's reason is at the end
        return LayerError(f"checkpoint {step} written into {self.folder}",
                          f"{type(error).__name__} ({why})",
                          f"see to space and permissions: {stays}")

    def _refuse(self, step: int) -> None:
        """Leave out a checkpoint that differs from its manifest."""
        self._refused.add(step)
        self._end_manager()  # the next one puts it away

    def _loaded(self, step: int, like: Any, saved: dict[str, str]) -> Any:
        """The tree of a verified checkpoint."""
        if wrong := difference(f"checkpoint {step}", saved, described(like)):
            raise wrong
        orbax = self._orbax
        with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as reader:
            restored = reader.restore(self._at_step(step) / "default",
                                      args=orbax.args.StandardRestore(
                                          {path: _target(leaf) for path, leaf
                                           in _leaves(like).items()}))
        return jax.tree.unflatten(jax.tree.structure(like), [
            restored[path] if path in restored else jax.numpy.zeros(leaf.shape, leaf.dtype)
            for path, leaf in paths(like).items()])


def _orbax() -> Any:
    """The package orbax, which logs nothing: what fails is raised."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("checkpoints need orbax: pip install 'diffprog[checkpoints]'") from error
    logging.getLogger("absl").addFilter(_not_of_orbax)
    return orbax.checkpoint


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in pathlib.Path(record.pathname).parts


def _opened(folder: pathlib.Path) -> bool:
    """Make the folder; whether it was one of checkpoints before."""
    if folder.exists() and not folder.is_dir():
        raise LayerError("a folder for checkpoints", f"the file {folder}", "choose a folder")
    mark = folder / _MARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        if _MARK not in names and not names:
            mark.write_text(_ABOUT)
    except OSError as error:
        raise LayerError("a folder that can be written", f"{folder} ({error.strerror})",
                         "choose another, or change its permissions") from error
    if names and _MARK not in names:
        raise LayerError("a folder of checkpoints, or an empty one",
                         f"{folder} with {listed(names)}", "choose another folder")
    return bool(names)


def _leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf, as orbax takes them: scalars of NumPy as arrays, and none without entries."""
    leaves = paths(tree)
    for path, leaf in leaves.items():
        if not is_array(leaf) and not isinstance(leaf, (int, float)):
            raise LayerError("leaves that are arrays or numbers", f"{show(leaf)} at {path}",
                             "leave it out: data= takes what JSON can hold")
    return {path: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
            for path, leaf in leaves.items() if getattr(leaf, "size", 1)}


def _target(leaf: Any) -> Any:
    """What orbax restores: on the devices of `leaf`, or on the first one."""
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf
    on = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on)
