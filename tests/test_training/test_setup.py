"""What is refused before a run begins, and runs that do not begin in the main thread."""

import threading

import data_sets
import pytest
import runs

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


def test_another_thread_than_the_main_one_leaves_signals_alone():
    found = []

    def run():
        with Signals() as signals:
            found.append(signals.ending(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
