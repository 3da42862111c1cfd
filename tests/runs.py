"""Toy runs that several test files share."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from vit_at import models
from vit_at.configs import digits_sgd
from vit_at.data.examples import Examples
from vit_at.distributed.sharding import make_mesh
from vit_at.training import optim
from vit_at.training.loop import Loop, train
from vit_at.training.setup import Setup, compile_step, resolve

CLASSES = ("zero", "one", "two")
# Real CIFAR-10 and ImageNet photographs, where the machine has them.
TFDS = pathlib.Path(
    os.environ.get("VIT_AT_TFDS", pathlib.Path(__file__).parents[2] / "shared" / "tfds")
)
needs_tfds = pytest.mark.skipif(
    not (TFDS / "imagenet2012").is_dir(), reason=f"no TFDS data in {TFDS} (set VIT_AT_TFDS)"
)
# The smoke recipe at the digits' own size.
QUICK = {
    "data__image_size": 8,
    "model__patch_size": 2,
    "model__embed_dim": 16,
    "threat__eps": 0.1,
    "threat__step_size": 0.05,
    "optimizer__learning_rate": 0.01,
}


def slow(*values):
    """A row of a parametrised test that takes more than a few seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


def smoke(variants: str = "", **changes) -> ConfigDict:
    """The digits' smoke recipe with other values; a dot is written as two underscores."""
    config = digits_sgd.get_config(",".join(filter(None, ["smoke", variants])))
    with config.unlocked():
        config.update_from_flattened_dict({f.replace("__", "."): v for f, v in changes.items()})
    return config


def flags(options) -> list[str]:
    """The same values as flags of the command."""
    return [f"--config.{f.replace('__', '.')}={v}" for f, v in options.items()]


def resolved(variants: str = "", **changes) -> ConfigDict:
    """``smoke``, as a run stores it."""
    return resolve(smoke(variants, **changes), make_mesh())


def examples(n: int, size: int = 8, channels: int = 1, seed: int = 0) -> Examples:
    """n random images of three classes."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, size, size, channels)).astype(np.uint8)
    labels = rng.integers(0, len(CLASSES), n).astype(np.int32)
    rows = np.arange(n)
    return Examples(
        "made/1.0.0 test", CLASSES, images.shape[1:], rows, rows, lambda r: (images[r], labels[r])
    )


def tiny_setup(num_devices: int = 1, **changes) -> Setup:
    """A setup on made-up images of three classes, 4 steps an epoch, with a tiny model."""
    options = {
        "threat__eps": 0.1,
        "threat__step_size": 0.05,
        "threat__eps_warmup_epochs": 0.0,
        "data__image_size": 8,
        "model__patch_size": 2,
        "model__embed_dim": 16,
        "model__depth": 2,
        "model__num_heads": 2,
        "batch_size": 16,
    }
    mesh = make_mesh(jax.devices()[:num_devices])
    config = resolve(smoke(**options | changes), mesh)
    model = models.create(
        config.model.name,
        num_classes=len(CLASSES),
        image_size=8,
        patch_size=2,
        in_channels=1,
        embed_dim=16,
        depth=2,
        num_heads=2,
    )
    return Setup(config, mesh, examples(64), None, examples(21, seed=1), model, steps_per_epoch=4)


def compiled_step(setup: Setup, state, batch):
    """The compiled training step."""
    return compile_step(setup, optimizer_of(setup)).lower(state, batch).compile()


def optimizer_of(setup: Setup):
    return optim.make_optimizer(setup.config, setup.steps_per_epoch, setup.model.num_blocks)


def batches(setup: Setup, count: int):
    """The first batches of a made-up order, on the host."""
    size = setup.config.batch_size
    for step in range(count):
        rows = (np.arange(size) + step * size) % len(setup.train_set)
        images, labels = setup.train_set.read(rows)
        yield {"image": images, "label": labels}


def arrays_of(workdir: epath.Path, step: int, series: str = "last") -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, as it lies on disk."""
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not on the devices that wrote it

    def target(stored):
        return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=here)

    found = {}
    for item in ("params", "opt_state"):
        directory = workdir / "checkpoints" / series / str(step) / item
        if directory.exists():
            checkpointer = ocp.StandardCheckpointer()
            shapes = jax.tree.map(target, checkpointer.metadata(directory).item_metadata.tree)
            tree = checkpointer.restore(directory, shapes)
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            found |= {item + jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return found


def losses(workdir) -> list[float]:
    """The loss of each line of the metrics that has one."""
    lines = (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@contextlib.contextmanager
def mounted(directory, options: str):
    """A file system in memory mounted there, such as with 'ro,size=1m'; skips where it can't be."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    yield epath.Path(directory)
    subprocess.run(["umount", "-l", str(directory)], check=True)


def trained(workdir) -> epath.Path:
    """A work directory in which the smoke recipe has been trained."""
    train(smoke(**QUICK), epath.Path(workdir))
    return epath.Path(workdir)


def assert_same_arrays(a, b):
    assert a.keys() == b.keys()
    assert a
    for name, value in a.items():
        assert value.tobytes() == b[name].tobytes(), name


def assert_resumes_bit_exactly(config, directory, monkeypatch, *, dies_at: int, last_step: int):
    """A run that dies in a step, before a save, and goes on, ends as one that does not die."""
    train(config, directory / "whole")
    after_step = Loop._after_step

    def dies(loop, state, step, ending):
        if step == dies_at:
            raise RuntimeError("killed")
        after_step(loop, state, step, ending)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, directory / "killed")
    train(config, directory / "killed")
    whole, killed = (
        arrays_of(epath.Path(directory / name), last_step) for name in ("whole", "killed")
    )
    assert_same_arrays(whole, killed)
