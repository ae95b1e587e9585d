"""JAX's cache of compiled programs on disk."""

from __future__ import annotations

import pathlib

import jax

__all__ = ["compilation_cache"]


def compilation_cache(folder: str | pathlib.Path | None) -> None:
    """Keep compiled programs in a folder, so that a run that is started again does not compile.

    All programs are kept, those that compile in less than a second too; files accumulate, and may
    be deleted at any time. JAX alone ignores a folder that is set after the first compilation; this
    function takes effect at once. A program is found again with the same versions, devices and
    flags.

    Args:
        folder: of the cache; it is made if it does not exist. Runs may share it.
            None keeps nothing.

    Example:
        >>> import os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> before = jax.config.jax_compilation_cache_dir
        >>> dp.runtime.compilation_cache(folder)
        >>> float(jax.jit(lambda x: x + 17)(1.0))
        18.0
        >>> any("lambda" in name for name in os.listdir(folder))
        True
        >>> dp.runtime.compilation_cache(before)
    """
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    path = None if folder is None else str(pathlib.Path(folder).absolute())
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    reset_cache()
