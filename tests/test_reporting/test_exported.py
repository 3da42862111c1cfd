"""Exported weights: their files, and that PyTorch computes the same logits from them."""

import functools
import hashlib
import importlib.util
import json
import re

import golden
import jax
import numpy as np
import pytest
import runs
import safetensors.numpy

from vit_at import export, models, weights
from vit_at.configs import default
from vit_at.data import sources
from vit_at.errors import UserError
from vit_at.evaluation.protocol import weights_digest
from vit_at.reporting import exported, extras
from vit_at.reporting.model_card import model_card
from vit_at.workdir import registry
from vit_at.workdir.checkpoint import Trained
from vit_at.workdir.exported import load_exported

CASES = [  # every family, with whatever changes what timm must be told
    ("deit_tiny_patch16_224", {"image_size": 32, "patch_size": 4, "depth": 2}),
    ("vit_small_patch16_224_timm05", {"depth": 2, "embed_dim": 96}),
    ("vit_small_patch16_224_timm05", {"depth": 2, "embed_dim": 96, "qk_scale": 768**-0.5}),
    ("vit_base_patch16_224_in21k", {"depth": 1, "mlp_ratio": 2.0, "embed_dim": 96}),
    ("convit_tiny", {"image_size": 32, "patch_size": 4}),
    ("convit_small", {"depth": 3, "qk_scale": 0.2}),
    ("swin_tiny_patch4_window7_224", {"depth": 8, "embed_dim": 48}),
    ("swin_base_patch4_window7_224_in22k", {"depth": 8, "embed_dim": 32, "image_size": 64}),
    ("swin_tiny_patch4_window7_224", {"depth": 8, "embed_dim": 24, "image_size": 256}),
    ("deit_tiny_distilled_patch16_224", {"image_size": 32, "patch_size": 4, "depth": 2}),
]
STEMS = [  # timm has no such architectures
    ("deit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "depth": 2, "stem": "conv"}),
    ("convit_tiny", {"image_size": 32, "patch_size": 4, "depth": 4, "stem": "conv"}),
]


@functools.cache
def trained():
    config = default.get_config()
    config.unlock()
    config.model.name, config.model.depth = "deit_tiny_patch16_224", 2
    config.lock()
    model = models.create(config.model.name, num_classes=10, image_size=32, patch_size=4, depth=2)
    return Trained(config, model, golden.params(model), {"step": 5, "num_classes": 10}, "best")


def about(name):
    """The metadata that an export needs."""
    return {"architecture": name, "normalisation": {"mean": [0.5] * 3, "std": [0.25] * 3}}


def record(attack, accuracy, num_examples=100, digest="", **protocol):
    digest = digest or weights_digest(trained().params)
    protocol = {"data": "cifar10/3.0.2 test"} | protocol
    protocol |= {"num_examples": num_examples, "weights": {"digest": digest}}
    entry = {"attack": attack, "accuracy": accuracy, "standard_error": 0.01}
    return entry | {"protocol": protocol}


def test_description_has_robustbench_fields():
    linf = {"norm": "linf", "eps": 8 / 255}
    records = [
        record("clean", 0.8123),
        record("clean", 0.9, num_examples=10),
        record("clean", 0.1, digest="another"),
        record("autoattack-standard", 0.4567, **linf),
        record("autoattack-standard", 0.1, num_examples=500, norm="linf", eps=16 / 255),
        record("autoattack-union", 0.2, num_examples=200, union=[linf, linf | {"norm": "l2"}]),
        record("clean", 0.99, num_examples=300, data="cifar10/3.0.2 train"),
        record("clean", 0.5, num_examples=300, data="cifar10_corrupted/fog_1/1.0.0 test"),
        record("clean", 0.6, num_examples=300, transform="resize40-crop32"),
    ]
    about = exported.describe(trained(), records)
    expected = {
        "architecture": "deit_tiny_patch16_224",
        "eps": "8/255",
        "clean_acc": "81.23",
        "autoattack_acc": "45.67",
        "reported": "45.67",
        "additional_data": False,
        "dataset": "cifar10",
        "number_forward_passes": 1,
        "unreliable": False,
        "threat_model": "Linf",
    }
    assert {key: about[key] for key in expected} == expected
    assert {"link", "name", "authors", "venue"} <= about.keys()
    assert len(about["results"]) == 8
    assert exported.describe(trained(), [])["clean_acc"] is None


def test_files(tmp_path):
    about = exported.describe(trained(), [])
    path = exported.export(trained().params, trained().model, tmp_path / "new", about)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "README.md",
        "config.json",
        "load.py",
        "model.json",
        "model.safetensors",
    ]
    stored = json.loads((path.parent / "model.json").read_text())
    assert stored["weights"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stored["normalisation"]["mean"] == list(default.CIFAR_MEAN)
    assert stored["training"]["threat"]["steps"] == 10
    assert (stored["image_size"], stored["patch_size"]) == (32, 4)
    back = weights.from_timm(weights.load(path.parent), trained().model)
    jax.tree.map(np.testing.assert_array_equal, back, trained().params)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "load_trained", lambda workdir, which: trained())
    (tmp_path / "results.json").write_text(json.dumps([record("clean", 0.5)]))
    assert export.main([str(tmp_path), "--checkpoint=last"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    stored = json.loads((tmp_path / "export" / "model.json").read_text())
    assert stored["clean_acc"] == "50.00"
    assert "clean       50.00 %" in (tmp_path / "export" / "README.md").read_text()
    assert export.main([str(tmp_path), f"--output={tmp_path / 'there'}"]) == 0
    assert (tmp_path / "there" / "model.safetensors").exists()


def test_the_model_card_says_what_was_trained_and_what_not_measured():
    trained = runs.smoke("ard_prm").to_dict()
    about = {"architecture": "deit_tiny_patch16_224", "image_size": 8, "patch_size": 2}
    about |= {"name": "digits", "dataset": "digits", "training": trained, "results": []}
    card = model_card(about)
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "trained on digits by vit_at: AT + ARD + PRM" in card
    assert "started from scratch" in card
    assert "These weights have not been evaluated" in card
    assert "AutoAttack has not been run" in card
    natural = model_card(about | {"training": trained | {"objective": "natural"}})
    assert "they are not robust" in natural
    bare = model_card({"architecture": "swin", "image_size": 8, "patch_size": 2})
    assert "## Training" not in bare


def test_an_export_replaces_only_its_own_files(tmp_path):
    export_to = functools.partial(exported.export, trained().params, trained().model, tmp_path)
    export_to(exported.describe(trained(), []))
    before = (tmp_path / "model.safetensors").read_bytes()
    about = exported.describe(trained(), [record("clean", 0.5)])
    export_to(about)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    card = (tmp_path / "README.md").read_text()
    assert "clean       50.00 %" in card
    (tmp_path / "README.md").write_text(f"{card}\nMy notes.\n")
    with pytest.raises(UserError, match=r"holds README\.md, which"):
        export_to(about)
    (tmp_path / "README.md").unlink()
    export_to(about)
    assert (tmp_path / "README.md").read_text() == card
    (tmp_path / "model.json").unlink()  # as if the export had been killed before its last file
    export_to(about)
    with pytest.raises(UserError, match=r"holds README\.md and model\.json, which"):
        export_to(about | {"training": about["training"] | {"seed": 7}})


def test_no_path_of_the_machine_is_exported(tmp_path):
    config = trained().config.copy_and_resolve_references().unlock()
    config.data.dir, config.data.decoded_dir = "/home/me/tfds", "/home/me/decoded"
    config.data.name = "folder:/home/me/flowers/"
    config.data.extra.name = "npz:/home/me/edm.npz"
    config.model.pretrained = "/home/me/weights/deit.pth"
    values = {"step": 5, "num_classes": 10, "run": {"data": "/home/me"}}
    records = [record("clean", 0.5, data="folder:/home/me/flowers test[:10]")]
    about = exported.describe(trained()._replace(config=config, values=values), records)
    exported.export(trained().params, trained().model, tmp_path, about)
    texts = [(tmp_path / name).read_text() for name in ("model.json", "README.md")]
    assert not any("/home" in text or str(tmp_path) in text for text in texts)
    assert about["dataset"] == "folder:flowers"
    assert about["training"]["data"]["extra"]["name"] == "npz:edm.npz"
    assert about["training"]["model"]["pretrained"] == "deit.pth"
    assert about["results"][0]["protocol"]["data"] == "folder:flowers test[:10]"
    assert config.data.dir == "/home/me/tfds"
    back = load_exported(tmp_path)
    assert back.config.data.name == "folder:flowers"
    assert back.values == {"step": 5, "num_classes": 10}


def test_the_card_shows_names_as_they_are():
    name = "a|b`c`\n---\n# <script>_x_ [y](z) *w* &lt; \x1b"
    config = trained().config.copy_and_resolve_references().unlock()
    config.name, config.data.name = name, name
    about = exported.describe(
        trained()._replace(config=config), [record("clean", 0.5, data="d ````\n# e")]
    )
    card = model_card(about | {"image_size": 8, "patch_size": 2})
    shown = r"a\|b\`c\` --- \# \<script\>\_x\_ \[y\](z) \*w\* \&lt;  "
    assert f"\n# {shown}\n" in card
    assert f"trained on {shown} by vit_at" in card
    assert f"data {shown} at 32 px" in " ".join(card.splitlines())
    _, front, rest = re.split("^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert f"datasets:\n- {json.dumps(name)}\n" in front
    assert re.findall("^# .*$", rest.split("`````")[0], re.MULTILINE) == [f"# {shown}"]
    assert rest.count("\n`````\n") == 2
    assert "<script>" not in rest


def test_no_work_directory_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        export.main([str(tmp_path)])
    assert caught.value.code == 2
    assert "no work directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "overrides"), [runs.slow(*c) for c in CASES if "qk_scale" in c[1]]
)
def test_scale_is_folded_into_the_queries(name, overrides, tmp_path):
    model = models.create(name, num_classes=3, **overrides)
    params = golden.params(model)
    path = exported.export(params, model, tmp_path, about(name))
    plain = models.create(name, num_classes=3, **overrides | {"qk_scale": 0.0})
    folded = weights.from_timm(weights.load(path), plain)
    images = golden.images(model.image_size, "imagenet").astype(np.float32)
    logits, expected = (
        jax.jit(lambda p, m=m: m.apply({"params": p}, images))(p)
        for m, p in ((plain, folded), (model, params))
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def exported_model(name, overrides, path):
    """(logits of ours, images in [0, 1] as PyTorch has them) of a model that is exported there."""
    model = models.create(name, num_classes=10, **overrides)
    params = golden.params(model)
    metadata = about(name)
    exported.export(params, model, path, metadata)
    side = model.image_size
    images = np.random.default_rng(0).random((2, side, side, 3), np.float32)
    apply = models.classifier(model, **metadata["normalisation"])
    return jax.jit(apply)(params, images), np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def import_timm():
    """timm, or a skip that says why it cannot be used."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    try:
        import timm
    except Exception as error:  # its own import errors come from torchvision, of any kind
        pytest.skip(f"timm cannot be imported here: {str(error)[:100]}")
    return timm


def loader(path):
    """The module load.py of an export."""
    spec = importlib.util.spec_from_file_location("load", path / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "overrides"), CASES + STEMS)
def test_the_exported_loader_computes_the_same_logits(name, overrides, tmp_path):
    import_timm()
    import torch

    logits, images = exported_model(name, overrides, tmp_path)
    model = loader(tmp_path).load()
    assert not model.training
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(torch.tensor(images)), rtol=0, atol=2e-5)
    # Nothing stays on the CPU: on another device, a tensor that did would raise.
    assert model.to("meta")(torch.tensor(images, device="meta")).shape == logits.shape


@pytest.mark.parametrize(("name", "overrides"), [c for c in CASES if "timm05" not in c[0]])
def test_timm_loads_the_folder_itself(name, overrides, tmp_path):
    timm = import_timm()
    import torch

    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        pytest.skip(f"timm {timm.__version__} has no local-dir:")
    logits, images = exported_model(name, overrides, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        theirs = model((torch.tensor(images) - 0.5) / 0.25)
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-5)
    settings = timm.data.resolve_data_config(model.pretrained_cfg)
    assert settings["mean"] == (0.5,) * 3
    assert settings["input_size"][1] == overrides.get("image_size", 224)


@pytest.mark.parametrize(("case", "stem"), [(CASES[1], None), (STEMS[0], [48, 96, 192])])
def test_what_timm_does_not_build_is_not_described_as_timms(case, stem, tmp_path):
    model = models.create(case[0], num_classes=10, **case[1])
    exported.export(golden.params(model), model, tmp_path, about(case[0]))
    described = json.loads((tmp_path / "model.json").read_text())["timm"]
    assert (described["complete"], described["conv_stem"]) == (False, stem)
    assert not (tmp_path / "config.json").exists()
    assert "timm has no such model" in (tmp_path / "README.md").read_text()


def test_the_loader_refuses_changed_weights(tmp_path):
    import_timm()
    exported_model(*CASES[0], tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    with pytest.raises(ValueError, match="is not the file that"):
        loader(tmp_path).load()
    with pytest.raises(ValueError, match="holds no images; export it again"):
        loader(tmp_path).load_images()


@pytest.mark.parametrize("overrides", [{}, runs.slow({"stem": "conv"})])
def test_jax_alone_runs_the_exported_program(overrides):
    pytest.importorskip("flatbuffers")
    model = models.create(
        "convit_tiny", num_classes=3, image_size=8, patch_size=2, depth=2, **overrides
    )
    config = trained().config
    content = extras.program(Trained(config, model, golden.params(model), {}, "best"))
    images = np.random.default_rng(0).random((5, 8, 8, 3), np.float32)
    call = jax.export.deserialize(bytearray(content)).call
    apply = models.classifier(model, config.data.mean, config.data.std)
    expected = jax.jit(apply)(golden.params(model), images)
    for count in (5, 2):  # the batch is symbolic
        np.testing.assert_allclose(call(images[:count]), expected[:count], atol=1e-5)


def test_images_and_program_are_exported_if_asked_for_and_removed_if_not(tmp_path):
    pytest.importorskip("flatbuffers")
    options = {"output": str(tmp_path), "images": 5, "stablehlo": True}
    path = exported.export_workdir("digits_deit_64x2", "", **options)
    stored = safetensors.numpy.load_file(tmp_path / "images.safetensors")
    assert (stored["images"].shape, stored["images"].dtype) == ((5, 1, 8, 8), np.uint8)
    loaded = registry.load(path.parent)
    images, labels = sources.load(loaded.config.data, "test").read(np.arange(5))
    np.testing.assert_array_equal(stored["images"], images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(stored["labels"], labels)
    call = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes())).call
    images01 = images.astype(np.float32) / 255
    np.testing.assert_allclose(call(images01), loaded(images01), atol=1e-5)
    exported.export_workdir("digits_deit_64x2", "", str(tmp_path))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == set(exported.FILES) - {"images.safetensors", "model.stablehlo"}


def test_pytorchs_own_encoder_computes_the_same_logits(tmp_path):
    """torch.nn.TransformerEncoder is a ViT's trunk: the parity test that needs PyTorch alone."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import safetensors.torch

    overrides = {"image_size": 32, "patch_size": 4}
    logits, images = exported_model("deit_tiny_patch16_224", overrides, tmp_path)
    described = json.loads((tmp_path / "model.json").read_text())["timm"]
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    arguments = described["create_model"]
    d, eps = arguments["embed_dim"], described["layer_norm_eps"]
    layer = torch.nn.TransformerEncoderLayer(
        d,
        arguments["num_heads"],
        int(d * arguments["mlp_ratio"]),
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=eps,
        batch_first=True,
        norm_first=True,
    )
    norm = torch.nn.LayerNorm(d, eps)
    trunk = torch.nn.TransformerEncoder(layer, arguments["depth"], norm, enable_nested_tensor=False)
    renamed = {}
    parts = {"qkv.": "in_proj_", "proj.": "out_proj."}
    for name, value in tensors.items():
        if name.startswith("norm."):
            renamed[name] = value
        elif name.startswith("blocks."):
            name = name.replace("blocks.", "layers.").replace("mlp.fc", "linear")
            for ours, theirs in parts.items():
                name = name.replace(f"attn.{ours}", f"self_attn.{theirs}")
            renamed[name] = value
    trunk.load_state_dict(renamed)
    with torch.no_grad():
        patches = torch.nn.functional.conv2d(
            (torch.from_numpy(images) - 0.5) / 0.25,
            tensors["patch_embed.proj.weight"],
            tensors["patch_embed.proj.bias"],
            stride=4,
        )
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([tensors["cls_token"].expand(2, 1, d), tokens], 1)
        features = trunk.eval()(tokens + tensors["pos_embed"])[:, 0]
        theirs = features @ tensors["head.weight"].T + tensors["head.bias"]
    np.testing.assert_allclose(logits, theirs.numpy(), rtol=0, atol=2e-5)
