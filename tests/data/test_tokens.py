"""Token files: what is written is read again, in windows, shuffled or in order."""

import itertools
import pathlib

import numpy as np
import optax
import pytest
from support.refusing import refused
from support.training_nets import KEY

import diffprog as dp

IDS = np.random.default_rng(0).integers(0, 300, 101)


@pytest.fixture
def path(tmp_path):
    dp.data.write_tokens(tmp_path / "train.bin", IDS, vocabulary=300)
    return tmp_path / "train.bin"


@pytest.mark.parametrize(("vocabulary", "dtype"), [
    (300, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32), (2**32, np.uint32)])
def test_a_file_is_a_flat_array_without_a_header(tmp_path, vocabulary, dtype):
    ids = np.array([0, 7, vocabulary - 1])
    assert dp.data.write_tokens(tmp_path / "a.bin", ids, vocabulary=vocabulary) == 3
    assert (tmp_path / "a.bin").read_bytes() == ids.astype(dtype).tobytes()
    windows = dp.data.token_windows(tmp_path / "a.bin", 2, vocabulary=vocabulary)
    assert windows.dtype == dtype and windows.tolist() == [ids.tolist()]


def test_texts_are_written_one_after_the_other(tmp_path):
    texts = ([1, 2], np.array([], int), np.arange(3, dtype=np.uint8), (9,))
    assert dp.data.write_tokens(tmp_path / "a.bin", iter(texts), vocabulary=10) == 6
    assert np.fromfile(tmp_path / "a.bin", np.uint16).tolist() == [1, 2, 0, 1, 2, 9]


@pytest.mark.parametrize("wrong", [[300], [-1], [[1]], [0.5], ["a"]], ids=str)
def test_a_text_that_is_refused_leaves_the_older_file(path, wrong):
    error = refused(dp.data.write_tokens, path, [[1, 2], wrong], vocabulary=300)
    if wrong in ([300], [-1]):
        assert error.got == f"{wrong[0]} as token 2"
    assert np.fromfile(path, np.uint16).tolist() == IDS.tolist()
    assert [file.name for file in path.parent.iterdir()] == ["train.bin"]


@pytest.mark.parametrize("length", [1, 3, 10, 99, 100])
@pytest.mark.parametrize("stride", [None, 1, 7])
def test_windows_are_those_of_a_loop(path, length, stride):
    windows = dp.data.token_windows(str(path), length, vocabulary=300, stride=stride)
    starts = range(0, len(IDS) - length, stride or length)
    assert windows.tolist() == [IDS[i : i + length + 1].tolist() for i in starts]


def test_without_a_stride_each_token_is_a_target_once(path):
    windows = dp.data.token_windows(path, 10, vocabulary=300)
    assert windows[:, 1:].ravel().tolist() == IDS[1:].tolist()


def test_windows_are_read_from_the_file(path):
    """A view of a memory map: what is changed on disk is seen, and nothing can be written."""
    windows = dp.data.token_windows(path, 10, vocabulary=300)
    assert not windows.flags.owndata and not windows.flags.writeable
    data = dp.batches(windows, 2)
    with open(path, "r+b") as file:
        file.write(np.uint16(299).tobytes())
    assert windows[0, 0] == next(iter(data))[0, 0] == 299


@pytest.mark.parametrize("make", [dp.batches, dp.data.pipeline], ids=["batches", "pipeline"])
@pytest.mark.parametrize("seed", [None, 2])
def test_reading_goes_on_at_any_batch(path, make, seed):
    def data():
        return make(dp.data.token_windows(path, 10, vocabulary=300, stride=1), 4, seed=seed)

    wanted = list(itertools.islice(data(), 12))
    assert len({batch.tobytes() for batch in wanted}) == 12
    for batch, again in zip(wanted[5:], data().begun(5), strict=False):
        assert batch.dtype == again.dtype and batch.tobytes() == again.tobytes()


def test_a_net_is_trained_on_windows(path):
    net = dp.embedding(300, 8) >> dp.linear(300)
    step = dp.make_step(net, dp.text.next_token(), optax.adam(0.1))
    windows = dp.data.token_windows(path, 10, vocabulary=300)
    result = dp.fit(step, dp.batches(windows, 5, seed=0), steps=60, key=KEY, progress=False)
    assert result.history[-1]["loss"] < 1 < result.history[0]["loss"]
    found = dp.evaluate(step, result.state, dp.batches(windows, 3, remainder="pad"))
    assert found == pytest.approx(dp.evaluate(step, result.state, [windows]), rel=1e-5)


def test_a_token_out_of_range_anywhere_in_the_file_is_found(path, monkeypatch):
    monkeypatch.setattr("diffprog.data.tokens._AT_ONCE", 8)
    for at in (0, 7, 8, 100):
        ids = IDS.astype(np.uint16)
        ids[at] = 300
        ids.tofile(path)
        error = refused(dp.data.token_windows, path, 10, vocabulary=300)
        assert error.got == f"300 as token {at}"
    assert dp.data.token_windows(path, 10, vocabulary=301).shape == (10, 11)


def test_a_truncated_file_is_refused(path):
    pathlib.Path(path).write_bytes(path.read_bytes()[:-1])
    assert refused(dp.data.token_windows, path, 10, vocabulary=300).got == "201 bytes"
