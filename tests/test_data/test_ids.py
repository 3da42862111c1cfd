"""Images chosen by a list: of a folder, of TFDS, and RobustBench's."""

import data_sets
import numpy as np
import pytest
import runs

from vit_at.data import ids, sources
from vit_at.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name, color in (("a", 0), ("b", 100)):
        for i in range(5):
            data_sets.write_image(tmp_path / f"val/{name}/{i}.png", color=color + i)
    return tmp_path


def listed(path, *lines):
    (path / "ids.txt").write_text("\n".join(lines) + "\n")
    return str(path / "ids.txt")


def test_a_list_chooses_images_in_its_order(folder):
    chosen = listed(folder, "val/b/3.png", "a/1.png", "", "b/0.png")
    config = data_sets.config(f"folder:{folder}")
    examples = sources.load(config, "val", chosen=chosen)
    images, labels = examples.read(np.arange(3))
    assert images[:, 0, 0, 0].tolist() == [103, 1, 100]
    assert labels.tolist() == [1, 0, 1]
    assert examples.indices.tolist() == [8, 1, 5]  # in the sorted listing
    assert examples.ids.startswith("ids.txt ")
    other = sources.load(config, "val", chosen=listed(folder, "b/3.png", "a/1.png", "b/1.png"))
    assert other.ids != examples.ids
    assert sources.load(config, "val").ids == ""


def test_a_missing_image_is_named_with_the_number_of_others(folder):
    chosen = listed(folder, "a/1.png", "a/7.png", "c/0.png")
    with pytest.raises(UserError, match=r"a/7\.png and 1 more, which folder:.* does not have"):
        sources.load(data_sets.config(f"folder:{folder}"), "val", chosen=chosen)


@pytest.mark.skipif(not runs.TFDS.exists(), reason="no photographs in TFDS's format here")
def test_tfds_matches_class_and_file_name(tmp_path):
    config = data_sets.config("imagenet2012", dir=str(runs.TFDS), mean=(0, 0, 0), cache_gib=0)
    encoded = sources.open_encoded(config, "validation")
    names = encoded.names()
    assert len(names) == len(set(names)) == 300
    examples = sources.load(config, "validation", chosen=listed(tmp_path, names[7], names[2]))
    assert examples.indices.tolist() == [7, 2]
    labels = examples.read(np.arange(2))[1]
    assert [examples.class_names[k] for k in labels] == [names[i][:9] for i in (7, 2)]


def test_a_set_without_file_names_is_refused(tmp_path):
    with pytest.raises(UserError, match="no feature 'file_name'"):
        sources.load(data_sets.config(), "test", chosen=listed(tmp_path, "0/x.png"))


def test_robustbenchs_list_is_read_from_its_package(tmp_path, monkeypatch):
    package = tmp_path / "robustbench" / "helper_files"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise ImportError('it needs torch')")
    (package / "imagenet_test_image_ids.txt").write_text("n01/x.JPEG\nn02/y.JPEG\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = ids.read("robustbench")
    assert found.names == ("n01/x.JPEG", "n02/y.JPEG")
    assert found.about.startswith("robustbench ")


def test_robustbenchs_list_has_5000_images():
    if not ids.importlib.util.find_spec("robustbench"):
        pytest.skip("robustbench is not installed")
    found = ids.read("robustbench")
    assert len(found.names) == 5000
    assert found.names[0] == "n09468604/ILSVRC2012_val_00015253.JPEG"
