"""Token files: a flat array of ids on disk, without a header, as nanoGPT's ``.bin``.

Ids are uint16 if the vocabulary has at most 65,536 of them, and uint32 otherwise.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from diffprog.core.arguments import check_count
from diffprog.core.dtypes import is_int
from diffprog.core.errors import LayerError
from diffprog.core.notation import code, show

__all__ = ["token_windows", "write_tokens"]

_AT_ONCE = 2**24  # tokens that are checked at a time


def write_tokens(path: str | pathlib.Path, texts: Any, *, vocabulary: int) -> int:
    """Write texts one after the other as a token file, and return the number of tokens.

    The file appears when it is complete, in place of an older one.

    Args:
        path: of the file, for example ``train.bin``.
        texts: arrays or lists of ids in [0, vocabulary), read one by one; one array is one text.
        vocabulary: number of token ids; decides the dtype of the file.

    Raises:
        LayerError: a text that is no flat sequence of ids; an id outside the vocabulary.

    Example:
        >>> import pathlib, tempfile, numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp(), "train.bin")
        >>> dp.data.write_tokens(path, [[1, 2, 3], [4, 5]], vocabulary=256)
        5
        >>> np.fromfile(path, np.uint16).tolist()
        [1, 2, 3, 4, 5]

    Source: ``prepare.py`` of nanoGPT, Karpathy 2022, https://github.com/karpathy/nanoGPT.
    """
    dtype, count = _dtype(vocabulary), 0
    partial = pathlib.Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            for text in [texts] if hasattr(texts, "dtype") else texts:
                ids = np.asarray(text)
                if ids.ndim != 1 or (ids.size and not is_int(ids)):
                    raise LayerError("a text as ids (time,), ints", show(ids),
                                     "encode it, and pass several texts as a list of arrays")
                _check_range(ids, vocabulary, count)
                ids.astype(dtype).tofile(file)
                count += ids.size
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def token_windows(
    path: str | pathlib.Path, length: int, *, vocabulary: int, stride: int | None = None
) -> np.ndarray[Any, Any]:
    """The windows of a token file: ``y[i] = ids[i stride : i stride + length + 1]``.

    A window has `length` inputs, and as targets the same tokens one further, as `next_token` takes
    them. y is a view of the file on disk, of which only the windows that are asked for are read:
    `batches` or `pipeline` cut it into batches, shuffled or in order, and resume there. The file is
    read once to check the ids, unless its dtype holds only ids of the vocabulary.

    Shapes:
        y: uint16 or uint32 (windows, length + 1).

    Args:
        path: of a file of `write_tokens` or of nanoGPT.
        length: number of inputs of a window.
        vocabulary: number of token ids; decides the dtype of the file.
        stride: tokens from one window to the next. None is `length`, with which an epoch has each
            token as target once; 1 takes windows at any place, as nanoGPT does.

    Raises:
        LayerError: no such file, or one whose size is no multiple of an id; fewer tokens than a
            window has; an id outside the vocabulary.

    Example:
        >>> import pathlib, tempfile, numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp(), "train.bin")
        >>> dp.data.write_tokens(path, np.arange(9), vocabulary=256)
        9
        >>> dp.data.token_windows(path, 4, vocabulary=256).tolist()
        [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
        >>> windows = dp.data.token_windows(path, 4, vocabulary=256, stride=1)
        >>> next(iter(dp.batches(windows, 3, seed=0))).shape
        (3, 5)

    Source: ``train.py`` of nanoGPT, Karpathy 2022, https://github.com/karpathy/nanoGPT.
    """
    check_count("length", length)
    stride = length if stride is None else stride
    check_count("stride", stride)
    dtype = _dtype(vocabulary)
    if not os.path.isfile(path):
        raise LayerError("the path of a token file", code(str(path)),
                         "write it by write_tokens(path, texts, vocabulary=...)")
    if (size := os.path.getsize(path)) % dtype.itemsize:
        raise LayerError(f"a token file of {dtype.name}", f"{size} bytes",
                         "write it again: it was truncated, or has another dtype")
    if (count := size // dtype.itemsize) <= length:
        raise LayerError(f"at least {length + 1} tokens, one window", str(count),
                         "lower length, or write a longer file")
    ids = np.memmap(path, dtype, "r")
    if vocabulary <= np.iinfo(dtype).max:
        for first in range(0, count, _AT_ONCE):
            _check_range(ids[first : first + _AT_ONCE], vocabulary, first)
    return np.lib.stride_tricks.sliding_window_view(np.asarray(ids), length + 1)[::stride]


def _dtype(vocabulary: int) -> np.dtype[Any]:
    """The dtype of the ids of a vocabulary."""
    check_count("vocabulary", vocabulary)
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def _check_range(ids: np.ndarray[Any, Any], vocabulary: int, first: int) -> None:
    """Raise for an id outside the vocabulary; the ids begin at token number `first`."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        at = int(np.argmax((ids < 0) | (ids >= vocabulary)))
        raise LayerError(f"token ids in [0, {vocabulary})", f"{ids[at]} as token {first + at}",
                         "pass the vocabulary of the tokenizer, which decides the dtype of the "
                         "file too")
