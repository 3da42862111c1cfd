"""Images of one's own: what is taken from them, proportions, and warnings."""

import logging

import data_sets
import numpy as np
import pytest

import vit_at
from vit_at import configs, main
from vit_at.data import folders, own, sources
from vit_at.errors import UserError


def arranged(root, counts, size=(40, 50)):
    """counts: {'train/a': n}; half of a class's images are black, half are white."""
    for name, count in counts.items():
        for i in range(count):
            data_sets.write_image(
                root / name / f"{i}.png", size, "white" if i % 2 else "black", "RGB"
            )
    return root


def recipe(root, variants="scratch"):
    config = configs.load(f"folder:{variants}").unlock()
    config.data.name = f"folder:{root}"
    return config


def test_size_normalisation_and_splits_come_from_the_images(tmp_path):
    arranged(tmp_path, {"train/a": 40, "train/b": 60})
    data = own.from_images(config := recipe(tmp_path)).data
    assert (data.train_split, data.test_split) == ("train[:80%]", "train[80%:]")
    assert data.validation_examples == 8
    assert data.image_size == 32  # 40, rounded down to a multiple of 16
    assert own.from_images(config).model.patch_size == 4
    np.testing.assert_allclose(data.mean, 0.5, atol=0.02)
    np.testing.assert_allclose(data.std, 0.5, atol=0.02)
    assert data.from_images == ""
    assert config.data.from_images  # the recipe is left as it is
    sources.check_splits(
        data, *(sources.load(data, s) for s in (data.train_split, data.test_split))
    )


def test_held_out_images_are_in_proportion(tmp_path):
    arranged(tmp_path, {"train/a": 10, "train/b": 30, "train/c": 60}, size=(8, 8))
    config = own.from_images(recipe(tmp_path))
    train, test = (sources.load(config.data, s) for s in ("train[:80%]", "train[80%:]"))
    kept, held = sources.hold_out(train, 8, seed=3, stratified=True)
    for examples, expected in ((test, [2, 6, 12]), (held, [0.8, 2.4, 4.8]), (kept, [7, 22, 43])):
        labels = examples.read(np.arange(len(examples)))[1]
        np.testing.assert_allclose(np.bincount(labels, minlength=3), expected, atol=1)
    assert not set(kept.indices) & set(held.indices)
    assert set(held.indices) != set(sources.hold_out(train, 8, seed=4, stratified=True)[1].indices)


def test_every_slice_is_in_proportion():
    labels = np.random.default_rng(0).permutation([0] * 30 + [1] * 60 + [2] * 10)
    ordered = labels[folders.in_proportion(labels)]
    for start in range(0, 100, 10):
        counts = np.bincount(ordered[start : start + 10], minlength=3)
        np.testing.assert_allclose(counts, [3, 6, 1], atol=1)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "test"), "test"),
        (("train", "val"), "val"),
        (("train", "validation"), "validation"),
    ],
)
def test_a_split_that_is_there_is_the_test_split(tmp_path, splits, expected):
    arranged(tmp_path, {f"{split}/{name}": 12 for split in splits for name in "ab"})
    data = own.from_images(recipe(tmp_path)).data
    assert (data.train_split, data.test_split) == ("train", expected)


def test_large_images_keep_the_recipes_size_and_patch(tmp_path):
    arranged(
        tmp_path, {f"{split}/{name}": 2 for split in ("train", "test") for name in "ab"}, (300, 240)
    )
    config = own.from_images(recipe(tmp_path))
    assert (config.data.image_size, config.model.patch_size) == (224, 0)


def test_an_unknown_name_is_refused():
    config = recipe("x")
    config.data.from_images = "image_size,sizes"
    with pytest.raises(UserError, match="'sizes', which is unknown; use image_size, normalisation"):
        own.from_images(config)


@pytest.mark.parametrize(
    ("size", "channels", "says"),
    [
        ((64, 64), 1, ["read as grey", "about 64 pixels are shrunk to data.image_size 8"]),
        ((31, 40), 3, []),
    ],
)
def test_what_a_grey_small_recipe_loses_is_said(tmp_path, caplog, size, channels, says):
    arranged(tmp_path, {"train/a": 4}, size)
    with caplog.at_level(logging.WARNING):
        sources.load(data_sets.config(f"folder:{tmp_path}", mean=(0.5,) * channels), "train")
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(says)
    assert all(part in warning for part, warning in zip(says, warnings, strict=True))


@pytest.mark.slow
def test_a_folder_is_trained_on_and_evaluated_by_the_command(tmp_path):
    arranged(tmp_path / "photos", {"train/a": 30, "train/b": 50}, size=(20, 16))
    fields = ["epochs=1", "batch_size=8", "model.embed_dim=8", "model.depth=1", "threat.steps=1"]
    fields += ["model.num_heads=2", "threat.eps_warmup_epochs=1", "eval.validation_attack=pgd-1"]
    fields += ["eval.attacks=clean", f"data.name=folder:{tmp_path / 'photos'}"]
    fields += ["optimizer.drop_before_end=()", "data.augment=random-erasing", "eval.batch_size=8"]
    run, flags = str(tmp_path / "run"), [f"--config.{field}" for field in fields]
    command = ["folder:scratch", *flags, "--no-report", f"--workdir={run}"]
    assert main.main(command) == 0
    assert main.main(command) == 0  # the values of the first start are found again
    (tmp_path / "ids.txt").write_text("b/3.png\na/2.png\n")
    (record,) = vit_at.evaluate(
        run, "clean", split="train", ids=str(tmp_path / "ids.txt"), transform="resize18-crop16"
    )
    protocol = record["protocol"]
    assert (protocol["num_examples"], protocol["resolution"]) == (2, 16)
    assert protocol["transform"] == "resize18-crop16"
    assert protocol["ids"].startswith("ids.txt ")
    (usual,) = vit_at.evaluate(run, "clean")
    assert (usual["protocol"]["transform"], usual["protocol"]["num_examples"]) == ("squash", 16)
    assert usual["protocol"]["data"].endswith("train[80%:]")
