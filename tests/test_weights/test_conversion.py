"""Weights between timm's names and ours: round trips, adaptation, refusals."""

import functools
import hashlib
import re

import golden
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vit_at import models, weights
from vit_at.errors import UserError
from vit_at.weights import batch_norm, conversion
from vit_at.weights.adaptation import adapt_bias_table, adapt_patches, adapt_positions

DEIT, CONVIT, SWIN = "deit_tiny_patch16_224", "convit_tiny", "swin_tiny_patch4_window7_224"


@functools.cache
def small(name, **overrides):
    """A narrow and shallow model of any name, at 32 pixels."""
    heads = 1 if name.startswith(("swin", "convnext")) else 2
    depth = 10 if name.startswith("convnext") else 8
    options = {"depth": depth, "num_heads": heads, "embed_dim": 4 * heads, "num_classes": 3}
    return models.create(name, **(options | {"image_size": 32, "patch_size": 4} | overrides))


def shapes_of(model):
    abstract = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    return weights.timm_shapes(abstract, model)


@functools.cache
def state_dict_of(model, names="0.5"):
    values = golden.weights(shapes_of(model))
    return weights.to_timm(weights.from_timm(values, model), model, names=names)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def refusal(state_dict, model):
    with pytest.raises(UserError) as caught:
        weights.from_timm(state_dict, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_golden_rule():
    for spot in golden.FACTS["spot_checks"]:
        value = golden.weight(spot["name"], tuple(spot["shape"]), spot["salt"])
        np.testing.assert_allclose(value.ravel()[:4], spot["first"], rtol=1e-6)


def digest(shapes):
    lines = (f"{name} {' '.join(map(str, shape))}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("tag", golden.FACTS["models"])
def test_names_and_shapes_are_timms(tag):
    facts = golden.FACTS["models"][tag]
    model = golden.create(tag)
    assert digest(shapes_of(model)) == facts["parameters_sha256"]
    if "buffers_sha256" in facts:
        buffers = {name: value.shape for name, value in conversion._swin_buffers(model).items()}
        assert digest(buffers) == facts["buffers_sha256"]


# Many names differ in size alone: narrowed, they are one model.
DISTINCT = {small(name): name for name in models.NAMES}


@pytest.mark.parametrize("model", DISTINCT, ids=DISTINCT.get)
def test_round_trip(model):
    values = golden.weights(shapes_of(model))
    params, report = weights.convert(values, model)
    assert len(report.loaded) == len(values)
    # The same arrays, but for XCiT's statistics, which are folded.
    layers = model.batch_norms
    values = batch_norm.unfold(batch_norm.fold(values, layers), layers)
    assert_same(weights.to_timm(params, model), values)
    for names in ("0.5", "1.x"):
        renamed = weights.to_timm(params, model, names=names)
        assert_same(weights.to_timm(weights.from_timm(renamed, model), model), values)
    assert (report.adapted, report.dropped, report.initialised) == ({}, {}, [])


def test_new_names_of_swin():
    old, new = (set(state_dict_of(small(SWIN), names)) for names in ("0.5", "1.x"))
    assert {"layers.0.downsample.reduction.weight", "head.weight"} <= old - new
    assert {"layers.3.downsample.reduction.weight", "head.fc.weight"} <= new - old
    assert set(state_dict_of(small(DEIT))) == set(state_dict_of(small(DEIT), "1.x"))


def test_buffers_are_read_past():
    model = small(SWIN)
    params = weights.from_timm(state_dict_of(model), model)
    stored = weights.to_timm(params, model, buffers=True)
    extra = stored.keys() - state_dict_of(model).keys()
    assert {name.rpartition(".")[2] for name in extra} == {"relative_position_index", "attn_mask"}
    assert_same(weights.to_timm(weights.from_timm(stored, model), model), state_dict_of(model))
    name = "layers.0.blocks.0.attn.relative_position_index"
    assert f"unexpected: {name}" in refusal(stored | {name: np.zeros(7)}, model)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("names", ["0.5", "1.x"])
@pytest.mark.parametrize("name", [DEIT, CONVIT, SWIN])
def test_every_fault_is_named(name, names, data):
    """Any few arrays removed, added or misshapen: the error names them all, and no others."""
    model = small(name)
    whole = state_dict_of(model, names)
    # Without these, a Swin's dict has the names of neither version.
    fixed = ("head.", "layers.3.downsample.norm.bias")
    keys = sorted(key for key in whole if not key.startswith(fixed))
    few = st.lists(st.sampled_from(keys), max_size=5, unique=True)
    missing, misshapen = data.draw(few), data.draw(few)
    letters = st.text("abc.", min_size=1, max_size=8).map("extra_{}".format)
    extra = data.draw(st.lists(letters, max_size=5, unique=True))
    faulty = {key: value for key, value in whole.items() if key not in missing}
    misshapen = [key for key in misshapen if key in faulty]
    faulty |= {key: faulty[key][None] for key in misshapen}
    faulty |= {key: np.zeros(2, np.float32) for key in extra}
    if not (missing or misshapen or extra):
        kept = weights.to_timm(weights.from_timm(faulty, model), model, names=names)
        assert_same(kept, whole)
        return
    message = refusal(faulty, model)
    found = {}
    for kind in ("missing", "unexpected", "misshapen"):
        match = re.search(rf"{kind}: (.*?)(?:; |\); )", message)
        text = re.sub(r" \([\d, ]+\) instead of \([\d, ]+\)", "", match[1]) if match else ""
        found[kind] = set(filter(None, text.split(", ")))
    assert found == {
        "missing": set(missing),
        "misshapen": set(misshapen),
        "unexpected": set(extra),
    }


def test_wrong_model_is_refused_briefly():
    message = refusal(state_dict_of(small(CONVIT)), small(DEIT))
    assert "missing: " in message
    assert "more" in message
    assert len(message) < 4000


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (np.zeros((3, 8), np.int32), "not floating-point: head.weight int32"),
        (np.zeros((3, 8), bool), "not floating-point: head.weight bool"),
        (np.array([[None] * 8] * 3), "not floating-point: head.weight object"),
        (np.full((3, 8), np.nan, np.float32), "not finite: head.weight"),
    ],
)
def test_wrong_numbers_are_refused(value, word):
    model = small(DEIT)
    assert word in refusal(state_dict_of(model) | {"head.weight": value}, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_are_converted(dtype):
    model = small(DEIT)
    values = {k: v.astype(jax.numpy.dtype(dtype)) for k, v in state_dict_of(model).items()}
    got = weights.to_timm(weights.from_timm(values, model), model)
    assert_same(got, {k: v.astype(np.float32) for k, v in values.items()})


@pytest.mark.parametrize("tag", ["deit_tiny", "convit_tiny", "vit_base"])
def test_adaptation_is_the_references(tag):
    with np.load(golden.DATA / "adaptation_224p16_to_32p4.npz") as file:
        expected = {k.split("/")[1]: file[k] for k in file.files if k.startswith(tag)}
    d = 768 if tag == "vit_base" else 192
    extra = 0 if tag == "convit_tiny" else 1
    kernel = golden.weight("patch_embed.proj.weight", (d, 3, 16, 16), salt=5)
    positions = golden.weight("pos_embed", (1, 196 + extra, d), salt=5)
    kernel, positions = adapt_patches(kernel, 4), adapt_positions(positions, 64, extra)
    np.testing.assert_allclose(kernel, expected["patch_embed.proj.weight"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(positions, expected["pos_embed"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [DEIT, CONVIT, SWIN])
def test_from_another_resolution_and_other_classes(name, capsys):
    sizes = {"image_size": 224, "patch_size": 4 if name == SWIN else 16}
    source, target = small(name, **sizes, num_classes=7), small(name)
    state_dict = state_dict_of(source)
    params, report = weights.convert(state_dict, target, jax.random.key(3))
    got = weights.to_timm(params, target)
    assert set(report.dropped) == set(report.initialised) == {"head.weight", "head.bias"}
    if name == SWIN:  # stages of 4, 2 and 1 tokens have smaller windows
        assert len(report.adapted) == 6
        assert all(k.endswith("bias_table") for k in report.adapted)
    else:
        assert set(report.adapted) == {"patch_embed.proj.weight", "pos_embed"}
    same = state_dict.keys() - report.adapted.keys() - report.dropped.keys()
    assert set(report.loaded) == same
    assert all((got[k] == state_dict[k]).all() for k in same)
    if name == DEIT:
        fresh = models.init_params(target, jax.random.key(3))["head"]
        np.testing.assert_array_equal(params["head"]["kernel"], fresh["kernel"])

    weights.from_timm(state_dict, target)
    table = capsys.readouterr().err
    assert "made for 7 classes, not 3" in table
    assert "initialised" in table
    assert len(table.splitlines()) <= 7
    weights.from_timm(got, target)
    assert capsys.readouterr().err == ""


def test_adaptation_where_nothing_changes_is_the_identity():
    positions = golden.weight("pos_embed", (1, 17, 4))
    np.testing.assert_array_equal(adapt_positions(positions, 16, 1), positions)
    table = golden.weight("relative_position_bias_table", (49, 2))
    np.testing.assert_array_equal(adapt_bias_table(table, 4), table)
    np.testing.assert_array_equal(adapt_bias_table(table, 1), table[24:25])


def test_what_cannot_be_adapted_is_misshapen():
    wider = state_dict_of(small(DEIT, embed_dim=16))
    message = refusal(wider, small(DEIT))
    assert "blocks.0.attn.proj.bias (16,) instead of (8,)" in message
    assert "more" in message
    finer = state_dict_of(small(DEIT, patch_size=2, image_size=16))
    assert "misshapen: patch_embed.proj.weight" in refusal(finer, small(DEIT))
