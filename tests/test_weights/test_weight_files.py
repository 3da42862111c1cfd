"""Weight files: their formats; damaged or malicious files are refused and never run."""

import io
import json
import os
import pickle
import sys
import types
import zipfile

import golden
import jax
import numpy as np
import pytest
import safetensors.numpy

from vit_at import models, weights
from vit_at.configs import default
from vit_at.errors import UserError
from vit_at.training import setup
from vit_at.weights.files import HUB_FILE
from vit_at.weights.forms import NESTINGS

MODEL = models.create(
    "deit_tiny_patch16_224",
    num_classes=3,
    image_size=32,
    patch_size=4,
    depth=2,
    embed_dim=8,
    num_heads=2,
)
VALUES = weights.to_timm(golden.params(MODEL), MODEL)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def google_arrays(state_dict, depth, heads):
    """The same weights with Google's names and layouts."""
    d = state_dict["cls_token"].shape[-1]
    out = {"cls": state_dict["cls_token"]}
    out["Transformer/posembed_input/pos_embedding"] = state_dict["pos_embed"]
    pairs = [("embedding", "patch_embed.proj"), ("head", "head")]
    pairs += [("Transformer/encoder_norm", "norm")]
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        pairs += [(f"{theirs}/LayerNorm_0", f"{ours}.norm1")]
        pairs += [(f"{theirs}/LayerNorm_2", f"{ours}.norm2")]
        pairs += [(f"{theirs}/MlpBlock_3/Dense_{j}", f"{ours}.mlp.fc{j + 1}") for j in (0, 1)]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        qkv_kernel = state_dict[f"{ours}.attn.qkv.weight"].reshape(3, heads, -1, d)
        qkv_bias = state_dict[f"{ours}.attn.qkv.bias"].reshape(3, heads, -1)
        for j, part in enumerate(("query", "key", "value")):
            out[f"{attention}/{part}/kernel"] = qkv_kernel[j].transpose(2, 0, 1)
            out[f"{attention}/{part}/bias"] = qkv_bias[j]
        out[f"{attention}/out/kernel"] = state_dict[f"{ours}.attn.proj.weight"].T.reshape(
            heads, -1, d
        )
        out[f"{attention}/out/bias"] = state_dict[f"{ours}.attn.proj.bias"]
    for theirs, ours in pairs:
        weight = state_dict[f"{ours}.weight"]
        layout = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[weight.ndim]
        leaf = "scale" if weight.ndim == 1 else "kernel"
        out[f"{theirs}/{leaf}"] = weight.transpose(layout)
        out[f"{theirs}/bias"] = state_dict[f"{ours}.bias"]
    return out


@pytest.mark.parametrize("kind", ["safetensors", "npz", "google", "google with optimizer"])
def test_files(kind, tmp_path):
    values = VALUES
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.npz")
    if kind == "safetensors":
        safetensors.numpy.save_file(values, path)
    elif kind == "npz":
        np.savez(path, **values)
    else:
        prefix = "opt/target/" if "optimizer" in kind else ""
        arrays = google_arrays(values, MODEL.depth, MODEL.num_heads)
        np.savez(path, **{prefix + name: value for name, value in arrays.items()})
    assert_same(weights.to_timm(weights.from_timm(weights.load(path), MODEL), MODEL), values)


def test_bfloat16_safetensors(tmp_path):
    values = {"a": np.arange(4).astype(jax.numpy.bfloat16)}
    safetensors.numpy.save_file(values, tmp_path / "w.safetensors")
    np.testing.assert_array_equal(weights.load(tmp_path / "w.safetensors")["a"], values["a"])


def test_google_representation_layer_goes_with_the_head(tmp_path):
    values = VALUES | {"head.weight": np.ones((21, 8), np.float32), "head.bias": np.ones(21)}
    arrays = google_arrays(values, MODEL.depth, MODEL.num_heads)
    arrays |= {"pre_logits/kernel": np.eye(8), "pre_logits/bias": np.zeros(8)}
    np.savez(tmp_path / "w.npz", **arrays)
    _, report = weights.convert(weights.load(tmp_path / "w.npz"), MODEL)
    assert {"pre_logits.fc.weight", "pre_logits.fc.bias", "head.weight"} <= set(report.dropped)


def test_export_directory(tmp_path):
    values = VALUES
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    assert_same(weights.load(tmp_path), values)


class Bomb:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _npz_with(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", content)
    return buffer.getvalue()


def _object_npy(value):
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".bin"])
@pytest.mark.parametrize("content", ["pickle", "object array", "garbage", "nothing", "truncated"])
def test_bad_files_are_refused_and_not_run(suffix, content, tmp_path):
    bomb = Bomb(tmp_path / "executed")
    values = {"a": np.arange(1000, dtype=np.float32)}
    whole = io.BytesIO()
    np.savez(whole, **values)
    stored = whole.getvalue() if suffix == ".npz" else safetensors.numpy.save(values)
    data = {
        "pickle": pickle.dumps({"model": bomb}),
        "object array": _npz_with(_object_npy(bomb)),
        "garbage": bytes(range(256)) * 4,
        "nothing": b"",
        "truncated": stored[: len(stored) // 2],
    }[content]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        weights.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not bomb.path.exists()


@pytest.mark.parametrize("at", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_truncation_anywhere(suffix, at, tmp_path):
    values = VALUES
    path = tmp_path / f"w{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, **values)
    else:
        safetensors.numpy.save_file(values, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(at * len(data))])
    with pytest.raises(UserError, match="damaged"):
        weights.load(path)


@pytest.mark.parametrize("name", ["missing.npz", "missing/"])
def test_missing_file_names_the_ways_on(name, tmp_path):
    with pytest.raises(UserError, match=r"no weight file.*runs/NAME.*pretrained=''"):
        weights.load(tmp_path / name)


def test_unknown_suffix_and_empty_file(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"unknown suffix.*\.safetensors"):
        weights.load(tmp_path / "w.h5")
    np.savez(tmp_path / "w.npz")
    with pytest.raises(UserError, match="holds no arrays"):
        weights.load(tmp_path / "w.npz")


def test_pth_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(UserError, match=r"needs PyTorch.*pip install torch"):
        weights.load(tmp_path / "w.pth")


def test_a_run_starts_from_the_forms_that_load_reads(tmp_path, caplog):
    mean, std = (np.full((1, 3, 1, 1), value, np.float32) for value in (0.5, 0.2))
    named = {f"model.module.{name}": value for name, value in VALUES.items()}
    named |= {"normalize.mean": mean, "normalize.std": std}
    (tmp_path / "checkpoint_40").write_bytes(safetensors.numpy.save(named))
    caplog.set_level("INFO", "absl")
    data = default.get_config().data
    assert_same(setup._of_file(str(tmp_path / "checkpoint_40"), data), VALUES)
    assert "the weights' file by (0.5, 0.5, 0.5, 0.2" in caplog.text


def test_timms_config_beside_a_file_of_the_hub_gives_the_normalisation(tmp_path, capsys):
    safetensors.numpy.save_file(VALUES, tmp_path / "model.safetensors")
    config = {"architecture": "x", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = weights.read(tmp_path)
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.25,) * 3)
    assert "taken from config.json: mean 0.5,0.5,0.5, std 0.25," in capsys.readouterr().err
    for content in ('{"pretrained_cfg": {"mean": "a", "std": 3}}', "[1]", "{", '{"model": {}}'):
        (tmp_path / "config.json").write_text(content)
        assert weights.read(tmp_path).mean == ()


@pytest.mark.parametrize("wrapper", ["", *NESTINGS])
def test_pth(wrapper, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    values = VALUES
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "w.pth")
    assert_same(weights.load(tmp_path / "w.pth"), values)
    torch.save({"model": [1, 2]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no state_dict"):
        weights.load(tmp_path / "w.pth")
    bomb = Bomb(tmp_path / "executed")
    torch.save({"model": {"a": bomb}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="nothing in it was run"):
        weights.load(tmp_path / "w.pth")
    assert not bomb.path.exists()


def test_views_in_a_pth_are_what_they_show(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pair = torch.tensor([1 + 2j, 3 - 4j])
    tensors = {"negated": pair.conj().imag, "transposed": torch.arange(6.0).reshape(2, 3).T}
    torch.save(tensors, tmp_path / "w.pth")
    assert_same(
        weights.load(tmp_path / "w.pth"),
        {n: np.array(t.tolist(), "f4") for n, t in tensors.items()},
    )


def fake_hub(download):
    constants = types.SimpleNamespace(ENDPOINT="http://127.0.0.1:9")
    return types.SimpleNamespace(hf_hub_download=download, constants=constants)


def test_hub_offline_names_the_ways_on(monkeypatch):
    def download(**wanted):
        assert wanted.get("local_files_only"), "tried to download while nothing answers"
        raise FileNotFoundError("not cached")

    monkeypatch.setitem(sys.modules, "huggingface_hub", fake_hub(download))
    with pytest.raises(UserError) as caught:
        weights.load("hf:timm/deit_tiny_patch16_224.fb_in1k")
    for way in ("PATH.safetensors", "runs/NAME", "pretrained=''"):
        assert way in str(caught.value)


def test_hub_reads_its_cache_and_knows_revisions(tmp_path, monkeypatch):
    values = VALUES
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(values, path)
    asked = []

    def download(**wanted):
        asked.append(wanted)
        return str(path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", fake_hub(download))
    assert_same(weights.load("hf:timm/a_model.b@v1"), values)
    assert [(w["repo_id"], w["revision"]) for w in asked] == [("timm/a_model.b", "v1")]
    assert asked[0]["filename"] == HUB_FILE
    assert asked[0]["local_files_only"]


def test_hub_library_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        weights.load("hf:timm/deit_tiny_patch16_224.fb_in1k")
