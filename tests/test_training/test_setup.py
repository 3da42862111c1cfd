"""What is refused before a run begins, and runs that do not begin in the main thread."""

import threading

import data_sets
import pytest
import runs

from vit_at.config import differences
from vit_at.errors import UserError
from vit_at.training.setup import Setup
from vit_at.training.signals import Signals


@pytest.fixture
def folder(tmp_path):
    """Makes images of some classes; returns the fields of a run on them."""

    def make(*classes):
        for split in ("train", "test"):
            for name in classes:
                for i in range(20):
                    data_sets.write_image(tmp_path / split / name / f"{i}.png", color=i)
        return runs.QUICK | {
            "data__name": f"folder:{tmp_path}",
            "data__train_split": "train",
            "data__test_split": "test",
            "data__validation_examples": 2,
            "batch_size": 8,
        }

    return make


def test_attacks_that_need_more_classes_are_refused(folder):
    fields = folder("cat", "dog")
    Setup.of(runs.smoke(**fields, eval__attacks="clean,autoattack"))
    with pytest.raises(UserError, match="no attack of apgd-t works with 2 classes"):
        Setup.of(runs.smoke(**fields, eval__attacks="clean,apgd-t"))
    with pytest.raises(UserError, match="no attack of apgd-dlr works with 2 classes"):
        Setup.of(runs.smoke(**fields, eval__validation_attack="apgd-dlr"))


def test_one_class_is_refused(folder):
    with pytest.raises(UserError, match="has one class, cat; training needs two or more"):
        Setup.of(runs.smoke(**folder("cat")))


@pytest.mark.parametrize("name", ["folder:{}", "folder:{}/", "folder:{}/../{}"])
def test_extra_images_are_recognised_by_any_spelling(folder, tmp_path, name):
    fields = folder("cat", "dog") | {"data__extra__fraction": 0.5, "data__extra__split": "test"}
    fields |= {"data__extra__name": name.format(tmp_path, tmp_path.name)}
    with pytest.raises(UserError, match="'test' has 40 images of the test"):
        Setup.of(runs.smoke(**fields))


def test_held_out_images_of_two_splits_are_no_extra_ones(folder, tmp_path):
    fields = folder("cat", "dog") | {
        "data__train_split": "train+test[:50%]",
        "data__test_split": "test[50%:]",
        "data__validation_examples": 30,
        "data__extra__fraction": 0.5,
        "data__extra__name": f"folder:{tmp_path}",
    }
    held = Setup.of(runs.smoke(**fields, data__allow_overlap=True)).validation_set
    counts = {split: len(rows) for split, rows in held.own_origin()}
    assert sum(counts.values()) == 30
    assert min(counts.values()) > 0
    for split, found in (("train", counts["train"]), ("test[:50%]", counts["test"])):
        with pytest.raises(UserError, match=f"has {found} images held out for validation"):
            Setup.of(runs.smoke(**fields, data__extra__split=split))


def test_a_share_of_no_extra_images_is_refused():
    with pytest.raises(UserError, match=r"data\.extra\.fraction is 0\.7, but"):
        Setup.of(runs.smoke(**runs.QUICK, data__extra__fraction=0.7))


def test_a_renamed_image_makes_another_run(folder, tmp_path):
    """It may change which images are held out for validation."""
    config = runs.smoke(**folder("cat", "dog"))
    before = Setup.of(config).fingerprint
    assert Setup.of(config).fingerprint == before
    (tmp_path / "train" / "cat" / "3.png").rename(tmp_path / "train" / "cat" / "33.png")
    changed = differences(before, Setup.of(config).fingerprint)
    assert [line.partition(" ")[0] for line in changed] == ["data.contents"]


def test_another_thread_than_the_main_one_leaves_signals_alone():
    found = []

    def run():
        with Signals() as signals:
            found.append(signals.ending(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
