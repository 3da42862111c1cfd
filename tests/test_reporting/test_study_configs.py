"""Every study: its sweep is valid at each size, its arms differ, and smoke runs without data."""

import pathlib

import pytest

from vit_at.config import flatten
from vit_at.configs import common
from vit_at.configs.study import base
from vit_at.reporting import study
from vit_at.reporting.jobs import jobs_of
from vit_at.training import objectives

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(
    path
    for path in (ROOT / "configs" / "study").glob("*.py")
    if path.stem not in ("__init__", "base")
)
STUDIES = [path for path in FILES if path.stem != "natural"]  # one start for all seeds


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", base.SIZES)
def test_a_sweep_is_valid_and_every_arm_has_every_seed(path, size):
    runs = jobs_of(f"{path}:{size}")
    arms = {}
    for run in runs:
        objectives.check(run.config)
        assert run.config.name.startswith(f"study_{path.stem}-{size}")
        read = study.Run(run.name, run.config.to_dict())
        arms.setdefault(str(study._relevant(read)), []).append(run.config.seed)
    assert len(arms) >= 2
    assert all(tuple(seeds) == base.SEEDS for seeds in arms.values())
    assert size != "cpu" or len(runs) <= 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_can_be_tried_in_seconds(path):
    for run in jobs_of(f"{path}:cpu,smoke"):
        assert run.config.data.train_split == "train[:160]"
        assert run.config.epochs == 2


def test_only_what_a_study_asks_about_differs_between_its_arms():
    asked = {
        "augmentation": {"data.crop_padding", "mixing.probability", "label_smoothing"},
        "clipping": {"optimizer.clip_norm"},
        "masking": {"masking.ard", "masking.prm"},
        "pretraining": {"model.pretrained"},
        "warmup": {"masking.ard", "masking.prm", "masking.warmup_epochs"},
        "weight_decay": {"optimizer.weight_decay"},
    }
    for name, fields in asked.items():
        configs = [
            flatten(run.config.to_dict()) for run in jobs_of(f"{ROOT}/configs/study/{name}.py:cpu")
        ]
        differing = {f for f in configs[0] if len({str(c[f]) for c in configs}) > 1}
        assert differing - {"seed", "name"} == fields, name


def test_the_size_is_found_wherever_it_stands_and_only_once():
    assert base.start("x", "ard,gpu").name == "study_x-gpu-ard"
    assert base.start("x", "").name == "study_x-cpu"
    with pytest.raises(ValueError, match="'cpu' and 'gpu' exclude each other"):
        base.start("x", "cpu,gpu")
    with pytest.raises(ValueError, match="'gpuu' is unknown"):
        base.start("x", "gpuu")
    assert not base.SIZES.keys() & common.VARIANTS.keys()
