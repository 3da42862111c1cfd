"""Checkpoints: what is read is what was saved, bit for bit, or is refused and passed over."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from absl import logging
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MESH, state_of

from vit_at.distributed import sharding
from vit_at.errors import UserError
from vit_at.training.step import TrainState
from vit_at.workdir import checkpoint
from vit_at.workdir.checkpoint import Checkpoints, fingerprint
from vit_at.workdir.files import check_space, disk_errors


def values_of(step: int) -> dict:
    return {"step": step, "best": {"step": 1, "robust": 0.25}, "num_classes": 3}


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def said(monkeypatch):
    """What is logged as a warning."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def save(workdir, *steps, ema=False):
    checkpoints = Checkpoints(workdir, keep=3)
    for step in steps:
        checkpoints.last.save(step, state_of(step, ema).trees, values_of(step))
    checkpoints.close()


def restore(workdir, ema=False):
    checkpoints = Checkpoints(workdir, keep=3)
    try:
        state = state_of(0, ema)
        found = checkpoints.restore(state.trees, MESH)
    finally:
        checkpoints.close()
    if found is None:
        return None
    step, trees, values = found
    return state.replace(step=sharding.replicate(np.int32(step), MESH), **trees), values


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_restored_is_bit_for_bit_what_was_saved(workdir, ema):
    save(workdir, 2, 5, ema=ema)
    state, values = restore(workdir, ema)
    assert_identical(state, state_of(5, ema))
    assert {name: values[name] for name in values_of(5)} == values_of(5)
    for x in jax.tree.leaves(state):
        assert x.sharding.is_equivalent_to(state.step.sharding, x.ndim)


def test_with_nothing_saved_nothing_is_restored(workdir):
    assert restore(workdir) is None


def test_the_state_may_be_donated_once_save_returns(workdir):
    checkpoints = Checkpoints(workdir, keep=1)
    state = state_of(1)
    checkpoints.last.save(1, state.trees, values_of(1))
    jax.tree.map(lambda x: x.delete(), state)
    checkpoints.close()
    assert_identical(restore(workdir)[0], state_of(1))


def data_files(workdir, step):
    """The files of a checkpoint, the largest first: that holds the arrays."""
    found = pathlib.Path(workdir / "checkpoints" / "last" / str(step)).rglob("*")
    return sorted((f for f in found if f.is_file()), key=lambda f: -f.stat().st_size)


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda file: file.unlink()])
def test_a_damaged_checkpoint_is_moved_aside_for_the_one_before(workdir, said, damage):
    save(workdir, 2, 5)
    damage(data_files(workdir, 5)[0])
    state, values = restore(workdir)
    assert_identical(state, state_of(2))
    assert values["step"] == 2
    (warning,) = said
    assert "last/5 is corrupt" in warning
    assert "falling back to the one before it" in warning
    assert [path.name for path in (workdir / "checkpoints" / "corrupt").iterdir()] == ["5"]
    save(workdir, 5)  # its place is free again
    assert_identical(restore(workdir)[0], state_of(5))


def test_damaged_values_count_as_well(workdir, said):
    save(workdir, 2, 5)
    (workdir / "checkpoints" / "last" / "5" / "values" / "metadata").write_text('{"step": 5')
    assert int(restore(workdir)[0].step) == 2
    assert len(said) == 1


def test_where_all_are_damaged_one_sentence_says_so(workdir, said):
    save(workdir, 2, 5)
    for step in (2, 5):
        truncate(data_files(workdir, step)[0])
    with pytest.raises(UserError, match=r"none of the checkpoints .* can be read"):
        restore(workdir)
    assert len(said) == 2
    assert restore(workdir) is None  # and the next start begins anew


def test_a_checkpoint_that_was_not_finished_is_ignored(workdir, said):
    save(workdir, 2, 5)
    last = workdir / "checkpoints" / "last"
    (last / "5").rename(last / "7.orbax-checkpoint-tmp")
    assert int(restore(workdir)[0].step) == 2
    assert said == []


SAVE_FOREVER = """
import sys, jax, jax.numpy as jnp
from etils import epath
from vit_at.workdir.checkpoint import Checkpoints
from vit_at.training.step import TrainState
checkpoints = Checkpoints(epath.Path(sys.argv[1]), 2)
for step in range(1, 1000):
    weights = jnp.full((1000, 1000), float(step))
    state = TrainState(jnp.int32(step), {"w": weights}, {"m": weights}, None)
    checkpoints.last.save(step, state.trees, {"step": step})
    print(step, flush=True)
"""


def test_after_kill_9_the_newest_whole_checkpoint_is_there(workdir, said):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(workdir)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    started = 0
    for line in process.stdout:
        started = int(line)
        if started == 4:
            time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    zeros = jnp.zeros((1000, 1000))
    shape = TrainState(jnp.int32(0), {"w": zeros}, {"m": zeros}, None)
    checkpoints = Checkpoints(workdir, 2)
    step, trees, values = checkpoints.restore(shape.trees, MESH)
    checkpoints.close()
    assert step == values["step"] >= 2
    np.testing.assert_array_equal(trees["params"]["w"], float(step))
    assert said == []


def test_old_checkpoints_go_and_the_best_stays(workdir):
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save_best(state_of(1).params, values_of(1))
    for step in (1, 2, 3):
        checkpoints.last.save(step, state_of(step).trees, values_of(step))
    checkpoints.save_best(state_of(1).params, values_of(1))  # again, as after a resume
    checkpoints.wait()
    last = workdir / "checkpoints" / "last"
    assert sorted(path.name for path in last.iterdir()) == ["2", "3"]
    params, step = checkpoints.restore_best(state_of(0).params, MESH)
    checkpoints.close()
    assert step == 1
    assert_identical(params, state_of(1).params)


# --- Fingerprints -----------------------------------------------------------------------------


@given(data=st.data(), dtype=st.sampled_from(["float32", "int32", "uint8", "bool", "bfloat16"]))
@settings(max_examples=60, deadline=None)
def test_any_single_flipped_bit_changes_the_fingerprint(data, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    raw = np.random.default_rng(0).integers(0, 256, 35 * itemsize, dtype=np.uint8)
    if dtype == "bool":
        raw &= 1
    before = fingerprint({"x": jnp.asarray(raw.view(dtype).reshape(5, 7))})
    where = data.draw(st.integers(0, len(raw) - 1))
    raw[where] ^= 1 if dtype == "bool" else 1 << data.draw(st.integers(0, 7))
    after = fingerprint({"x": jnp.asarray(raw.view(dtype).reshape(5, 7))})
    assert int(before[0]) != int(after[0])


def test_the_fingerprint_does_not_depend_on_the_sharding():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    split = sharding.split_batch(np.asarray(x), sharding.make_mesh())
    assert int(fingerprint([x])[0]) == int(fingerprint([split])[0])


def test_swapped_words_change_the_fingerprint():
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 1.0, 3.0])
    assert int(fingerprint([a])[0]) != int(fingerprint([b])[0])


# --- Disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "choose another --workdir"),
        (errno.EROFS, "choose another --workdir"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_sentence(workdir, monkeypatch, number, remedy):
    checkpoints = Checkpoints(workdir)

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.last._manager, "save", fail)
        with pytest.raises(UserError) as caught:
            checkpoints.last.save(1, state_of(1).trees, values_of(1))
    checkpoints.close()
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_full_disk(workdir):
    with pytest.raises(KeyError), disk_errors(workdir):
        raise KeyError("step")


def test_a_checkpoint_that_will_not_fit_is_not_begun(workdir, monkeypatch):
    usage = shutil.disk_usage(workdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**19))
    checkpoints = Checkpoints(workdir)
    with pytest.raises(UserError, match=r"disk is full \(0\.5 MiB are free"):
        checkpoints.last.save(1, state_of(1).trees, values_of(1))
    checkpoints.close()
    assert list((workdir / "checkpoints" / "last").iterdir()) == []


def test_room_is_asked_only_of_local_disks():
    check_space(epath.Path("gs://bucket/run"), 2**60)


@pytest.fixture
def full_disk(tmp_path):
    """A mounted file system of 2 MiB, where that is allowed."""
    with runs.mounted(tmp_path, "size=2m") as directory:
        yield directory


def test_a_disk_that_is_really_full(full_disk, monkeypatch):
    """As another program fills it: the check before has seen enough room."""
    checkpoints = Checkpoints(full_disk)
    checkpoints.last.save(1, state_of(1).trees, values_of(1))
    checkpoints.wait()
    free = shutil.disk_usage(full_disk).free
    (full_disk / "other").write_bytes(bytes(free - 8192))
    usage = shutil.disk_usage(full_disk)

    def save_and_wait():
        checkpoints.last.save(2, state_of(2).trees, values_of(2))
        checkpoints.wait()

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
        with pytest.raises(UserError, match="the disk is full: free some space"):
            save_and_wait()
    (full_disk / "other").unlink()
    assert_identical(restore(full_disk)[0], state_of(1))


@pytest.mark.parametrize("resumed", [None, 100, 300])
def test_best_weights_of_steps_after_the_resumed_one_are_forgotten(workdir, resumed):
    checkpoints = Checkpoints(workdir)
    if resumed:
        checkpoints.last.save(resumed, state_of(resumed).trees, {"step": resumed})
    checkpoints.save_best(state_of(300).params, {"step": 300})
    checkpoints.wait()
    checkpoints.restore(state_of(0).trees, MESH)
    if resumed == 300:
        assert checkpoints.restore_best(state_of(0).params, MESH)[1] == 300
    else:
        assert checkpoints.restore_best(state_of(0).params, MESH) is None
        checkpoints.save_best(state_of(200).params, {"step": 200})
        assert checkpoints.restore_best(state_of(0).params, MESH)[1] == 200
    checkpoints.close()


def test_a_relative_work_directory_serves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(epath.Path("runs/relative"))
    checkpoints.last.save(3, state_of(3).trees, {"step": 3})
    checkpoints.close()
    assert (tmp_path / "runs" / "relative" / "checkpoints" / "last" / "3").is_dir()


def test_the_address_of_a_bucket_reaches_orbax_as_it_is(monkeypatch):
    """A local directory is made absolute; of a bucket, that would make a directory named gs:."""
    given = []
    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", lambda d, **_: given.append(str(d)))
    for place in ("gs://bucket/run/last", "run/last"):
        checkpoint.Series(epath.Path(place), 1)
    assert given == ["gs://bucket/run/last", str(epath.Path("run/last").resolve())]
