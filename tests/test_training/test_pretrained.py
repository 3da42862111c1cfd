"""A run and the weights that it starts from."""

import re
import shutil

import pytest
import runs

from vit_at.errors import UserError
from vit_at.training.loop import train


def test_a_home_directory_is_expanded_before_its_kind_is_known(tmp_path, monkeypatch):
    """An export there is one, whose attention scale is in its weights."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.json").write_text("{}")
    config = runs.smoke(model__pretrained="~/export", model__qk_scale=0.5)
    with pytest.raises(UserError, match="an export, which has its attention scale"):
        train(config, tmp_path / "run")


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
