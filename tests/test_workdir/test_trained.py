"""Weights of a run: which are taken, and what is said where there are none."""

import gc
import pathlib

import jax
import numpy as np
import pytest
import runs
from etils import epath
from states import state_of

from vit_at import models
from vit_at.errors import UserError
from vit_at.workdir.checkpoint import Checkpoints, load_trained, preferred
from vit_at.workdir.files import write_config


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def test_a_directory_without_a_run_is_refused(workdir):
    with pytest.raises(UserError, match="is no work directory"):
        load_trained(workdir, "best")
    write_config(workdir, runs.resolved())
    with pytest.raises(UserError, match="holds no 'best' checkpoint yet; train it first"):
        load_trained(workdir, "best")
    checkpoints = Checkpoints(workdir)
    checkpoints.last.save(3, state_of(3).trees, {"step": 3})
    checkpoints.close()
    with pytest.raises(UserError, match="take the last weights with --checkpoint=last"):
        load_trained(workdir, "best")


def test_arrays_cut_short_are_one_sentence(workdir):
    """Orbax raises a bare Exception; arrays of tiny runs have no files of their own."""
    config = runs.resolved(model__embed_dim=64)
    write_config(workdir, config)
    model = models.build(config, 3, "float32")
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    checkpoints = Checkpoints(workdir)
    checkpoints.save_best(jax.device_put(params), {"step": 1, "num_classes": 3})
    checkpoints.close()
    load_trained(workdir)
    for path in pathlib.Path(workdir / "checkpoints" / "best").rglob("ocdbt.process_0/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\(step 1\) can't be read \(OUT_OF_RANGE: .*\); resume"):
        load_trained(workdir)
    gc.collect()  # what TensorStore leaves behind, before another file's test warns of it


def test_the_last_weights_stand_in_for_best_ones_that_are_not_there_yet(tmp_path):
    best, last = (runs.resolved(eval__checkpoint=name) for name in ("best", "last"))
    workdir = epath.Path(tmp_path)
    checkpoints = Checkpoints(workdir)
    checkpoints.last.save(3, state_of(3).trees, {"step": 3})
    checkpoints.wait()
    assert preferred(workdir, best) == preferred(workdir, last) == "last"
    checkpoints.save_best(state_of(3).params, {"step": 3})
    checkpoints.close()
    assert (preferred(workdir, best), preferred(workdir, last)) == ("best", "last")
