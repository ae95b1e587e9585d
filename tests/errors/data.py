"""What data refuses: batches, images, token files, pipelines."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from support.refusing import KEY

import diffprog as dp

IMAGES = jnp.ones((2, 4, 5, 3))
HEIGHTS = "(batch, height, width, channels)"


@functools.cache
def folder():
    return pathlib.Path(tempfile.mkdtemp())


def written(*ids, dtype=np.uint16):
    """A token file of these ids."""
    path = folder() / f"{'_'.join(map(str, ids))}.bin"
    np.array(ids, dtype).tofile(path)
    return path


def truncated():
    path = folder() / "truncated.bin"
    path.write_bytes(b"123")
    return path


def windows(path, length=2, vocabulary=10, **options):
    return lambda: dp.data.token_windows(path, length, vocabulary=vocabulary, **options)


def texts(*ids):
    return lambda: dp.data.write_tokens(folder() / "new.bin", ids, vocabulary=10)


EXAMPLES = {
    # Batches.
    "wants remainder out of keep, drop, pad, got 'mask'; choose one of them":
        lambda: dp.batches(IMAGES, 2, remainder="mask"),
    "wants at least 3 examples, one batch, got 2; lower batch_size, or pass remainder=\"keep\"":
        lambda: dp.batches(IMAGES, 3, remainder="drop"),
    "wants data to pad as a dict, a pair (x, y) or one array, got (float32[2,4,5,3], "
    "float32[2,4,5,3], float32[2,4,5,3]); name the arrays, {\"x\": x, \"y\": y}: the mask needs a "
    "name too":
        lambda: dp.batches((IMAGES,) * 3, 2, remainder="pad"),
    # Images.
    f"wants images {HEIGHTS}, got float32[1,2,4,5,3]; merge the leading axes, or map over them by "
    "vmap":
        lambda: dp.data.random_flip(KEY, IMAGES[None]),
    f"wants at least 4 axes {HEIGHTS}, got float32[4,5,3]; add the missing axes":
        lambda: dp.data.random_flip(KEY, IMAGES[0]),
    "wants a key, got 0; pass jax.random.key(seed), and map over several by vmap":
        lambda: dp.data.random_crop(0, IMAGES),
    "wants size of at most (6, 7), the padded image, got (7, 7); lower it, or add padding":
        lambda: dp.data.random_crop(KEY, IMAGES, 7, padding=1),
    "wants height as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.data.random_crop(KEY, IMAGES, (0, 3)),
    "wants padding as an int of at least 0, got -1; pass 0 or more":
        lambda: dp.data.random_crop(KEY, IMAGES, padding=-1),
    "wants degrees as a positive number, got -5; pass the largest angle":
        lambda: dp.data.random_rotation(KEY, IMAGES, -5),
    "wants floating-point input, got uint8[2,4,5,3]; convert it: x.astype(jnp.float32)":
        lambda: dp.data.normalize(IMAGES.astype(jnp.uint8), 0.5, 0.5),
    "wants mean as one number, or 3 for the channels, got float64[2]; compute it over all axes "
    "but the last":
        lambda: dp.data.normalize(IMAGES, [0.5, 0.5], 0.5),
    "wants std of positive numbers, got [1. 0. 1.]; leave out channels that are constant":
        lambda: dp.data.normalize(IMAGES, 0.5, [1.0, 0.0, 1.0]),
    "wants y as floats with 2 examples, as x, got int32[2]; encode the labels: jax.nn.one_hot(y, "
    "classes)":
        lambda: dp.data.mixup(KEY, IMAGES, jnp.array([0, 1])),
    "wants alpha as a positive number, got 0; pass 0.2, for example, or leave mixup out":
        lambda: dp.data.mixup(KEY, IMAGES, IMAGES, alpha=0),
    # Token files.
    "wants a text as ids (time,), ints, got float64[2]; encode it, and pass several texts as a "
    "list of arrays":
        texts([1, 2], [0.5, 1.5]),
    "wants token ids in [0, 10), got 10 as token 3; pass the vocabulary of the tokenizer, which "
    "decides the dtype of the file too":
        texts([1, 2], [9, 10]),
    "wants token ids in [0, 10), got 12 as token 1; pass the vocabulary of the tokenizer, which "
    "decides the dtype of the file too":
        lambda: windows(written(1, 12, 3))(),
    "wants the path of a token file, got 'none.bin'; write it by write_tokens(path, texts, "
    "vocabulary=...)":
        windows("none.bin"),
    "wants a token file of uint16, got 3 bytes; write it again: it was truncated, or has another "
    "dtype":
        lambda: windows(truncated())(),
    "wants at least 3 tokens, one window, got 2; lower length, or write a longer file":
        lambda: windows(written(1, 2))(),
    "wants stride as an int of at least 1, got 0; pass 1 or more":
        lambda: windows(written(1, 2, 3), stride=0)(),
    # Pipelines.
    "wants seed in [0, 2**32), got -1; take another one":
        lambda: dp.data.pipeline(IMAGES, 2, seed=-1),
    "wants transform as a function (key, batch), got 0.5; write lambda key, batch: batch, for "
    "example":
        lambda: dp.data.pipeline(IMAGES, 2, transform=0.5),
    "wants data as an iterable of batches, got 3; pass batches(data, batch_size), or [batch] for "
    "a single one":
        lambda: dp.data.prefetch(3),
    "wants size as an int of at least 1, got 0; pass 1 or more":
        lambda: dp.data.prefetch([jax.numpy.ones(3)], 0),
}
