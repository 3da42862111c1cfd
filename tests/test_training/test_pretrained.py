"""A run and the weights that it starts from."""

import re
import shutil

import jax
import numpy as np
import pytest
import runs
from etils import epath

from vit_at.errors import UserError
from vit_at.training.loop import train
from vit_at.training.setup import initial_state
from vit_at.workdir import registry
from vit_at.workdir.checkpoint import Checkpoints
from vit_at.workdir.files import write_config

DIGITS = "digits_deit_64x2"


def start(source, **attention):
    """The parameters of a run whose model is the packaged one with another attention."""
    model = registry.load(DIGITS).model.clone(**attention)
    setup = runs.tiny_setup(model__pretrained=source)._replace(model=model)
    return initial_state(setup, runs.optimizer_of(setup)).params


@pytest.mark.parametrize("kind", ["export", "work directory"])
def test_an_attention_that_no_shape_shows_is_that_of_the_weights(tmp_path, monkeypatch, kind):
    """Of an export, the scale is in its weights; in a home directory, '~' is expanded before."""
    trained = registry.read(registry.PACKAGED / DIGITS)
    monkeypatch.setenv("HOME", str(tmp_path))
    if kind == "export":
        shutil.copytree(registry.PACKAGED / DIGITS, tmp_path / "start")
    else:
        write_config(epath.Path(tmp_path / "start"), trained.config)
        checkpoints = Checkpoints(epath.Path(tmp_path / "start"))
        checkpoints.save_best(jax.device_put(trained.params), {"step": 1, "num_classes": 10})
        checkpoints.close()
    same = start("~/start")
    jax.tree.map(np.testing.assert_array_equal, same, trained.params)
    start("~/start", qk_scale=32**-0.5)  # that of its heads, said in another way
    with pytest.raises(
        UserError, match=r"num_heads is 4, but .* 2; set --config.model.num_heads=2"
    ):
        start("~/start", num_heads=4)
    with pytest.raises(UserError, match=r"0.5, .* need 0.1768; set --config.model.qk_scale=0.0"):
        start("~/start", qk_scale=0.5)


@pytest.mark.slow
def test_a_run_resumes_without_the_weights_that_it_started_from(tmp_path):
    start = tmp_path / "start"
    train(runs.smoke(**runs.QUICK), start)
    config = runs.smoke(**runs.QUICK | {"epochs": 1, "model__pretrained": str(start)})
    records = train(config, tmp_path / "run")
    shutil.rmtree(start)
    assert train(config, tmp_path / "run") == records
    with pytest.raises(UserError, match=re.escape(str(start))):
        train(config, tmp_path / "another")
