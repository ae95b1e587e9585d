import json
import logging
import pathlib
import re
import resource
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparing import same
from support.refusing import refused
from support.training_nets import KEY, assert_same, examples, noisy

import diffprog as dp
from diffprog.runtime import Checkpoints, manifests

BATCH = examples()
TREE = {"kernel": jnp.arange(6.0).reshape(2, 3), "step": jnp.int32(7)}


def steps_of(state, count):
    for _ in range(count):
        state, _ = noisy().apply(state, BATCH)
    return state


def begun():
    return noisy().init(KEY, BATCH[0])


def like():
    return jax.eval_shape(noisy().init, KEY, BATCH[0])


def saved(folder, *steps, tree=TREE, **options):
    """The folder with a checkpoint of each step; the first leaf says which."""
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree | {"step": jnp.int32(step)}, data={"next": step})
    return folder


def files_of(folder, step):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def restored(folder, like=TREE, **options):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(like, **options)


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


# What is saved is restored.


def test_a_train_state_is_restored_to_the_bit_and_goes_on_the_same(tmp_path):
    state = steps_of(begun(), 3)
    whole = steps_of(jax.tree.map(jnp.copy, state), 4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, data=b"at 3")
        after = steps_of(state, 2)  # the arrays that are being saved are donated
        checkpoints.save(5, after)
    assert Checkpoints(tmp_path).steps == [3, 5]
    step, found, data = restored(tmp_path, like(), step=3)
    assert (step, data) == (3, b"at 3") and type(found) is dp.training.TrainState
    assert jax.tree.structure(found) == jax.tree.structure(like())
    assert_same(steps_of(found, 4), whole)
    step, found, data = restored(tmp_path, like())
    assert (step, data) == (5, None)
    assert_same(steps_of(found, 2), whole)


LEAVES = {
    **{dtype: jnp.ones((2, 3), dtype) for dtype in (
        "bfloat16", "float16", "float32", "int8", "uint32", "bool", "complex64", "int4",
        "float8_e4m3fn")},
    "key": jax.random.key(3), "keys": jax.random.split(KEY, 4),
    "rbg": jax.random.key(1, impl="rbg"), "raw": jax.random.PRNGKey(5),
    "none": None, "empty": {}, "no_entries": jnp.zeros((0, 3)), "scalar": jnp.float32(2.5),
    "numpy": np.arange(3.0), "numpy_scalar": np.float64(0.1), "number": 3, "truth": True,
    "name/with.signs": [jnp.ones(2), (jnp.zeros(1),)], "optimizer": optax.adam(1.0).init(TREE),
}


@pytest.mark.parametrize("abstract", [False, True])
def test_leaves_of_every_kind_are_restored_in_their_dtypes(tmp_path, abstract):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, LEAVES)
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                              if isinstance(leaf, jax.Array) and abstract else leaf, LEAVES)
        _, found, _ = checkpoints.restore(wanted)
    assert jax.tree.structure(found) == jax.tree.structure(LEAVES)
    for path, leaf in dp.tree.paths(LEAVES).items():
        other = dp.tree.paths(found)[path]
        assert isinstance(other, jax.Array) == isinstance(leaf, jax.Array)
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            assert leaf.dtype == other.dtype
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        assert np.asarray(leaf).dtype == np.asarray(other).dtype, path
        np.testing.assert_array_equal(leaf, other, err_msg=path)


@pytest.mark.parametrize("data", [None, 3, "at", b"\x00\xff", {"next": [1, {"a": 2.5}]}], ids=str)
def test_the_position_in_the_data_is_restored(tmp_path, data):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TREE, data=data)
        assert checkpoints.restore(TREE)[2] == data


def test_saving_returns_before_the_checkpoint_is_complete(tmp_path, monkeypatch):
    """And the next save waits for it."""
    import threading

    go, write = threading.Event(), manifests.write

    def slow(*given):
        assert go.wait(30)
        write(*given)

    monkeypatch.setattr(manifests, "write", slow)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TREE)
        assert checkpoints.steps == []
        go.set()
        checkpoints.wait()
        assert checkpoints.steps == [1]


def test_orbax_logs_nothing_and_reads_the_checkpoints(tmp_path, capfd):
    import orbax.checkpoint as orbax

    (saved(tmp_path, 1) / "2.orbax-checkpoint-tmp").mkdir()  # orbax warns of it
    saved(tmp_path, 2)
    reader = orbax.Checkpointer(orbax.StandardCheckpointHandler())
    found = reader.restore(tmp_path / "2" / "default", args=orbax.args.StandardRestore(TREE))
    same(found, TREE | {"step": jnp.int32(2)})
    logging.getLogger("absl").warning("of others")
    out, err = capfd.readouterr()
    assert "orbax" not in out + err


# The callback, and what is kept.


def test_the_callback_saves_at_the_first_call_after_so_many_steps(tmp_path):
    with Checkpoints(tmp_path, save_every=10, last=9) as checkpoints:
        for step in [3, 9, 12, 15, 20, 29, 45, 50]:
            checkpoints(step, TREE, {"loss": 1.0})
    assert checkpoints.steps == [12, 20, 45, 50]
    with Checkpoints(tmp_path, save_every=10, last=9) as again:
        assert again.restore(TREE)[0] == 50
        for step in [51, 60, 62]:
            again(step, TREE, {})
        again.save(60, TREE)  # the loop saves its last step, whether the callback did or not
    assert again.steps == [12, 20, 45, 50, 60]


@pytest.mark.parametrize(("options", "kept", "ranked"), [
    ({}, [4, 5, 6], [4, 5, 6]), ({"last": 1}, [6], [6]),
    ({"last": 1, "best": 2}, [2, 4, 6], [4, 2, 6]),
    ({"last": 2, "best": 1, "highest": True}, [1, 5, 6], [1, 6, 5]),
    ({"last": 1, "best": 9}, [1, 2, 4, 5, 6], [4, 2, 5, 6, 1])], ids=str)
def test_the_last_and_the_best_are_kept(tmp_path, options, kept, ranked):
    """Of two that are equally good the earlier one; NaN is not good."""
    values = {1: 9.0, 2: 2.0, 3: float("nan"), 4: jnp.float32(1.0), 5: 2.0, 6: 3.0}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, value in values.items():
            checkpoints.save(step, TREE, metrics={"loss": 0.0, "validation/loss": value})
    assert checkpoints.steps == kept and checkpoints.best_steps == ranked
    assert [step for step, *_ in [restored(tmp_path, step=s) for s in kept]] == kept


def test_a_save_without_metrics_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path, last=1, best=1, metric="score") as checkpoints:
        checkpoints.save(1, TREE, metrics={"validation/score": 3.0})
        checkpoints.save(2, TREE)
        checkpoints.save(3, TREE)
    assert checkpoints.steps == [1, 3] and checkpoints.best_steps == [1]


# Changed files.


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "sum"])
def test_a_changed_checkpoint_is_passed_over_aloud(tmp_path, damage):
    saved(tmp_path, 1, 2, 3)
    path = max(files_of(tmp_path, 3), key=lambda path: "d" == path.parent.name)
    if damage in ("manifest", "sum"):
        path = tmp_path / "3" / manifests.NAME
    size = path.stat().st_size
    {"flip": lambda: flip(path, 8 * (size // 2)), "cut": lambda: path.write_bytes(b""),
     "remove": path.unlink, "manifest": lambda: flip(path, 8 * (size // 2)),
     "sum": lambda: flip(path, 8 * (size - 3))}[damage]()
    with pytest.warns(UserWarning, match=re.escape(str(path)) + ".*: step 2 is used instead"):
        step, found, data = restored(tmp_path)
    assert step == 2 and int(found["step"]) == 2 and data == {"next": 2}
    assert "were saved" in refused(restored, tmp_path, step=3).wants


def test_training_goes_on_after_a_changed_checkpoint(tmp_path):
    """The run reaches its number again; the changed one is put aside."""
    flip(files_of(saved(tmp_path, 1, 2), 2)[-1], 99)
    with Checkpoints(tmp_path, last=1) as checkpoints:
        with pytest.warns(UserWarning, match="step 1 is used"):
            checkpoints.restore(TREE)
        assert checkpoints.steps == [1]
        checkpoints.save(2, TREE)
    assert checkpoints.steps == [2] and (tmp_path / "2.refused").is_dir()
    assert restored(tmp_path)[0] == 2


def test_a_file_beside_those_of_the_checkpoint_is_no_damage(tmp_path):
    (saved(tmp_path, 1) / "1" / "note.txt").write_text("the good one")
    assert restored(tmp_path)[0] == 1


# What a killed run leaves.


def test_a_first_run_begins_silently_and_a_killed_one_says_so(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(TREE) is None
    with pytest.warns(UserWarning, match="no complete checkpoint in .*run: begin at step 0"):
        assert restored(tmp_path / "run") is None


def test_a_step_without_a_manifest_is_incomplete(tmp_path):
    """As after a kill between orbax's commit and the manifest, or while it is written."""
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / manifests.NAME).rename(tmp_path / "2" / f"{manifests.NAME}.part")
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1] and checkpoints.restore(TREE)[0] == 1
        assert (tmp_path / "2").exists()  # reading changes nothing: another run may be saving
        checkpoints.save(2, TREE)
    assert checkpoints.steps == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "checkpoints.txt"}


def test_old_checkpoints_stay_until_the_new_one_has_its_manifest(tmp_path, monkeypatch):
    saved(tmp_path, 1, last=1)
    monkeypatch.setattr(manifests, "write", lambda *_: pathlib.Path(tmp_path / "no/no").touch())
    checkpoints = Checkpoints(tmp_path, last=1)
    checkpoints.save(2, TREE)
    assert "the last complete checkpoint is 1" in refused(checkpoints.wait).remedy
    checkpoints.close()
    assert restored(tmp_path)[0] == 1


# A disk that is full.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in orbax
def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path):
    big = {"kernel": jax.random.normal(KEY, (500, 500))}
    with Checkpoints(saved(tmp_path, 1, tree=TREE | big), last=1) as checkpoints:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

            def save():
                checkpoints.save(2, TREE | big)
                checkpoints.wait()

            error = refused(save)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "the last complete checkpoint is 1" in error.remedy and "checkpoint 2" in error.wants
        assert checkpoints.steps == [1] and "File too large" in error.got
        checkpoints.save(3, TREE | big)  # there is room again
        checkpoints.wait()
        assert checkpoints.steps == [3]


def test_an_error_of_the_background_is_raised_by_the_next_save(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifests, "write", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, TREE)
    error = refused(checkpoints.save, 2, TREE)
    assert "No space left" in error.got and error.remedy.endswith("there is no other yet")
    checkpoints.close()
    assert not list(tmp_path.glob("[0-9]*"))


# Other nets.


def test_the_difference_to_another_net_is_listed_with_likely_renames(tmp_path):
    tree = {"out": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "body": jnp.ones(4),
            "old": jnp.ones(9)}
    other = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
             "body": jnp.ones(4, jnp.bfloat16), "scale": jnp.ones(5)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        error = refused(checkpoints.restore, other)
    assert error.got == "5 that differ"
    assert error.remedy.split("\n  ")[1:] == [
        "body: bfloat16[4], saved as float32[4]",
        "head/bias: float32[3], perhaps saved as out/bias",
        "head/kernel: float32[2,3], perhaps saved as out/kernel",
        "scale: float32[5], not saved", "old: float32[9], saved but not in the net"]


def test_a_long_difference_is_cut(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {f"a{i}": np.ones(i + 1) for i in range(99)})
        error = refused(checkpoints.restore, {"b": jnp.ones(200)})
    assert error.got == "100 that differ" and error.remedy.endswith("\n  and 88 more")


@pytest.mark.parametrize("other", [
    {"kernel": TREE["kernel"].astype(jnp.bfloat16)}, {"kernel": TREE["kernel"].T},
    {"step": np.int32(7).reshape(1)}, {"step": 7}, {"more": jnp.ones(1)}], ids=str)
def test_nothing_is_cast_or_left_out(tmp_path, other):
    saved(tmp_path, 1)
    assert "leaves of this net" in refused(restored, tmp_path, TREE | other).wants


# The manifest.


def test_the_manifest_holds_the_sums_of_all_other_files(tmp_path):
    saved(tmp_path, 1)
    known = manifests.read(tmp_path / "1")
    assert known.leaves == {"kernel": "float32[2,3]", "step": "int32[]"}
    assert set(known.files) == {path.relative_to(tmp_path / "1").as_posix()
                                for path in files_of(tmp_path, 1)} - {manifests.NAME}
    text = (tmp_path / "1" / manifests.NAME).read_text()
    assert json.loads(text.rpartition("\n}")[0] + "}")["data"] == {"json": {"next": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restored(tmp_path)[0] == 1


def test_any_flipped_bit_of_a_manifest_is_found(tmp_path):
    path = saved(tmp_path, 1) / "1" / manifests.NAME
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 101):
        flip(path, bit)
        with pytest.raises(manifests.Broken):
            manifests.read(tmp_path / "1")
        path.write_bytes(whole)
    manifests.read(tmp_path / "1")
