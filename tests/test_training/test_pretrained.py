"""A run and the weights that it starts from."""

import re
import shutil

import pytest
import runs

from vit_at.errors import UserError
from vit_at.training.loop import train


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
