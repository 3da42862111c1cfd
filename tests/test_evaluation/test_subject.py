"""Evaluation of weights of other people and of other data, by the command."""

import json
import pathlib

import golden
import jax
import numpy as np
import pytest
import runs
import safetensors.numpy
from PIL import Image

from vit_at import evaluate, models, weights
from vit_at.configs import default
from vit_at.errors import UserError
from vit_at.evaluation.subject import of_file
from vit_at.reporting.exported import describe, export
from vit_at.weights.architecture import sizes_of
from vit_at.workdir.checkpoint import Trained

NAME, SIZES = "deit_tiny_patch16_224", {"image_size": 16, "patch_size": 4, "num_heads": 2}
MODEL = models.create(NAME, num_classes=3, embed_dim=16, depth=2, **SIZES)
PARAMS = golden.params(MODEL)
ARRAYS = weights.to_timm(PARAMS, MODEL)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SAME = {"mean": MEAN, "std": STD}
OPTIONS = ["--num_heads=2", "--data=npy:images.npy", "--batch_size=8"]


def beside(prefix, normalisation, values):
    """The names of a model that is wrapped beside a normalisation."""
    statistics = {"mean": MEAN, "std": STD}
    shaped = {n: np.array(v, np.float32).reshape(1, 3, 1, 1) for n, v in statistics.items()}
    named = {f"{normalisation}.{n}": v for n, v in shaped.items()}
    return {f"{prefix}{n}": v for n, v in values.items()} | named


# {form: (arrays, whether the normalisation is in it)}
FORMS = {
    "plain": (ARRAYS, False),
    "DataParallel": ({f"module.{n}": v for n, v in ARRAYS.items()}, False),
    "RobustBench": (beside("model.", "normalize", ARRAYS), True),
    "RobustBench over DataParallel": (beside("model.module.", "normalize", ARRAYS), True),
    "DataParallel over RobustBench": (beside("module.model.", "module.normalize", ARRAYS), True),
    "an unnamed Sequential": (beside("1.", "0", ARRAYS), True),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, with 20 images as the array images.npy and their labels."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("images.npy", rng.integers(0, 256, (20, 16, 16, 3)).astype(np.uint8))
    np.save("labels.npy", rng.permutation(np.arange(20) % 3))
    return tmp_path


def pixels():
    return np.load("images.npy").astype(np.float32) / 255


def logits_of(subject):
    return subject.apply(subject.params, pixels())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_models_logits(form, here, capsys):
    arrays, has_statistics = FORMS[form]
    (here / "checkpoint_40").write_bytes(safetensors.numpy.save(arrays))
    given = {} if has_statistics else SAME
    subject = of_file("checkpoint_40", NAME, default.get_config().unlock(), num_heads=2, **given)
    expected = models.classifier(MODEL, MEAN, STD)(PARAMS, pixels())
    np.testing.assert_allclose(logits_of(subject), expected, rtol=0, atol=1e-6)
    said = capsys.readouterr().err
    assert ("prefix" in said) == (form != "plain")
    assert ("normalisation taken from the file: mean 0.4,0.5,0.6, std" in said) == has_statistics
    assert "embed_dim 16 (not 192), depth 2 (not 12), image_size 16 (not 224)" in said


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".npz", ".40"])
def test_a_file_without_a_suffix_is_known_by_its_content(suffix, here):
    (here / f"w{suffix}").write_bytes(safetensors.numpy.save(ARRAYS))
    if suffix == ".npz":
        np.savez(here / "w.npz", **ARRAYS)
        (here / "w.npz").rename(here / "archive")
    loaded = weights.load(here / ("archive" if suffix == ".npz" else f"w{suffix}"))
    assert loaded.keys() == ARRAYS.keys()
    assert all((loaded[n] == v).all() for n, v in ARRAYS.items())


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_command_evaluates_weights_and_stores_what_they_are(here, capsys):
    (here / "net.safetensors").write_bytes(safetensors.numpy.save(FORMS["RobustBench"][0]))
    arguments = ["--weights=net.safetensors", f"--model={NAME}", *OPTIONS, "--attacks=clean,pgd-2"]
    assert evaluate.main(arguments) == 0
    clean, pgd = results(here / "runs" / "evaluate" / "net")
    predicted = models.classifier(MODEL, MEAN, STD)(PARAMS, pixels()).argmax(-1)
    assert clean["correct"] == (predicted == np.load("labels.npy")).sum()
    assert pgd["protocol"]["eps"] == 8 / 255
    about = clean["protocol"]["weights"]
    assert (about["source"], about["model"], about["num_heads"]) == ("net.safetensors", NAME, 2)
    assert about["mean"] == list(MEAN)
    assert str(here) not in json.dumps(about)
    # Other heads are another function of the same weights: nothing stored is taken for it.
    assert evaluate.main([*arguments, "--num_heads=4", "--attacks=clean"]) == 0
    digests = {r["protocol"]["weights"]["digest"] for r in results(here / "runs/evaluate/net")}
    assert len(digests) == 2
    assert "normalisation: " not in capsys.readouterr().err


def test_the_normalisation_of_the_data_set_is_said(here, capsys):
    (here / "net.safetensors").write_bytes(safetensors.numpy.save(ARRAYS))
    config = default.get_config().unlock()
    assert of_file("net.safetensors", NAME, config, num_heads=2).weights["mean"] == (
        default.CIFAR_MEAN
    )
    assert "normalisation: CIFAR-10's, as the data are 'cifar10'" in capsys.readouterr().err
    config.data.name = "imagenet2012"
    of_file("net.safetensors", NAME, config, num_heads=2)
    assert config.data.std == default.IMAGENET_STD
    assert "normalisation: ImageNet's" in capsys.readouterr().err


# --- Architectures ----------------------------------------------------------------------------

SHAPES = {
    "deit_tiny_distilled_patch16_224": {"depth": 3, "embed_dim": 24, "num_heads": 2},
    "vit_small_patch16_224_timm05": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    "vit_tiny_patch16_224": {"stem": "conv", "embed_dim": 32, "num_heads": 2, "depth": 2},
    "convit_tiny": {"depth": 3, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2.0},
    "swin_tiny_patch4_window7_224": {"depth": 8, "embed_dim": 8, "num_heads": 2, "window_size": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_say_all_but_the_heads_of_a_vit(name):
    sides = {"image_size": 32, "patch_size": 4}
    model = models.create(name, num_classes=7, in_channels=1, **sides, **SHAPES[name])
    sizes = sizes_of(golden.weights(shapes_of(model)))
    assert isinstance(model, {"ViT": models.vit.VisionTransformer}.get(sizes.pop("family"), object))
    assert all(getattr(model, field) == value for field, value in sizes.items())
    expected = {*sides, *SHAPES[name], "num_classes", "in_channels", "mlp_ratio", "stem"}
    assert expected - sizes.keys() <= ({"num_heads"} if name[0] in "dv" else set())


def shapes_of(model):
    abstract = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    return weights.timm_shapes(abstract, model)


def broadcast(name, **options):
    """Weights of a model, which take no memory."""
    shapes = shapes_of(models.create(name, num_classes=3, **options))
    return {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}


@pytest.mark.parametrize(
    ("of", "under", "said"),
    [
        ("vit_small_patch16_224", "vit_small_patch16_224_timm05", "or vit_small_patch16_224:"),
        ("vit_small_patch16_224_timm05", "vit_small_patch16_224", "of vit_small_patch16_224_timm"),
        ("vit_large_patch32_384", "vit_tiny_patch16_224", "of vit_large_patch32_384: choose"),
        ("deit_base_distilled_patch16_384", "deit_base_patch16_384", "of deit_base_distilled_"),
        ("convit_small", "vit_small_patch16_224", "shape of convit_small: choose that name"),
        ("swin_base_patch4_window7_224", "swin_tiny_patch4_window7_224", "of swin_base_patch4_win"),
    ],
)
def test_weights_under_another_models_name_name_the_right_one(of, under, said):
    with pytest.raises(UserError, match=said) as caught:
        weights.from_timm(broadcast(of), models.create(under, num_classes=3))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"are not those of {under}; .*{said}"):
        weights.architecture.arguments_for(broadcast(of), under)


# --- Other data -------------------------------------------------------------------------------


@pytest.fixture
def exported(here):
    """An export of an untrained model of three classes, for 16-pixel colour images."""
    config = runs.resolved(data__mean=MEAN, data__std=STD, data__image_size=16)
    model = models.build(config, 3, "float32")
    values = {"step": 0, "num_classes": 3, "class_names": runs.CLASSES}
    trained = Trained(config, model, golden.params(model), values, "last")
    export(trained.params, model, here / "export", describe(trained, []))
    return trained


def predictions(trained, images):
    apply = models.classifier(trained.model, MEAN, STD)
    return np.asarray(apply(trained.params, images.astype(np.float32) / 255).argmax(-1))


def correct_of(*options):
    assert evaluate.main(["export", "--attacks=clean", "--batch_size=8", *options]) == 0
    return results(pathlib.Path("export"))[-1]["correct"]


def test_severities_of_an_array_file_are_its_fifths(exported):
    images, labels = np.load("images.npy"), np.load("labels.npy")
    right = predictions(exported, images) == labels
    assert correct_of("--data=npy:images.npy") == right.sum()
    assert correct_of("--data=npy:images.npy", "--split=severity2") == right[4:8].sum()
    assert correct_of("--data=npy:images.npy", "--split=severity5[:2]") == right[16:18].sum()


def test_labels_of_an_array_file_may_lack_the_highest_class(exported, capsys):
    images, labels = np.load("images.npy"), np.load("labels.npy") % 2
    np.save("labels.npy", labels)
    right = predictions(exported, images) == labels
    assert correct_of("--data=npy:images.npy") == right.sum()
    np.save("labels.npy", labels + 2)
    with pytest.raises(SystemExit):
        correct_of("--data=npy:images.npy")
    assert "has 4 classes, but the model 3" in capsys.readouterr().err


def test_the_ledger_of_data_with_a_long_path_has_a_name_that_fits(exported):
    options = ["--attacks=apgd-ce", "--num_examples=4", "--batch_size=8"]
    folder = pathlib.Path("a" * 130, "b" * 130)
    folder.mkdir(parents=True)
    for name in ("images.npy", "labels.npy"):
        (folder / name).write_bytes(pathlib.Path(name).read_bytes())
    for data in ("images.npy", folder / "images.npy"):
        assert evaluate.main(["export", f"--data=npy:{data}", *options]) == 0
    protocol = results(pathlib.Path("export"))[-1]["protocol"]
    after = f"_4_seed0_{protocol['weights']['digest']}_{protocol['contents']}"
    before = "apgd-ce_linf_0.15_npy-"
    names = sorted((p.name for p in pathlib.Path("export/autoattack").iterdir()), key=len)
    assert names[0] == f"{before}images.npy-test{after}"  # short names stay as they are
    assert names[1].startswith(f"{before}{'a' * 130}-bb")
    assert names[1].endswith(after)
    assert len(names[1]) == 255


def test_a_folder_with_some_of_the_classes_is_labelled_by_their_names(exported, capsys):
    images = np.load("images.npy")
    kept = {"two": images[:8], "one": images[8:]}  # sorted, 'one' is 0 and 'two' 1
    for name, of_class in kept.items():
        folder = pathlib.Path("shift", "3", name)
        folder.mkdir(parents=True)
        for i, pixels in enumerate(of_class):
            Image.fromarray(pixels).save(folder / f"{i}.png")
    labels = np.repeat([2, 1], [8, 12])  # in runs.CLASSES
    expected = (predictions(exported, images) == labels).sum()
    assert correct_of("--data=folder:shift", "--split=3") == expected
    pathlib.Path("shift/3/two").rename("shift/3/four")
    with pytest.raises(SystemExit):
        correct_of("--data=folder:shift", "--split=3")
    assert "has 2 classes, but the model 3" in capsys.readouterr().err
