"""Every architecture against the PyTorch reference."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vit_at import models
from vit_at.errors import UserError
from vit_at.models import convit, swin

# Parameters with 10 classes: timm's own counts, less the head's, where there is no fixture.
PARAMETERS = {
    "convit_base": 85_778_730,
    "convit_small": 27_348_652,
    "convit_tiny": 5_519_442,
    "deit_base_patch16_224": 85_806_346,
    "deit_small_patch16_224": 21_669_514,
    "deit_tiny_patch16_224": 5_526_346,
    "swin_base_patch4_window7_224": 86_753_474,
    "swin_base_patch4_window7_224_in22k": 86_753_474,
    "swin_large_patch4_window7_224": 196_532_476 - 990 * 1537,
    "swin_large_patch4_window7_224_in22k": 196_532_476 - 990 * 1537,
    "swin_small_patch4_window7_224": 48_844_948,
    "swin_tiny_patch4_window7_224": 27_527_044,
    "deit_base_patch16_384": 86_859_496 - 990 * 769,
    "deit_tiny_distilled_patch16_224": 5_910_800 - 990 * 2 * 193,
    "deit_small_distilled_patch16_224": 22_436_432 - 990 * 2 * 385,
    "deit_base_distilled_patch16_224": 87_338_192 - 990 * 2 * 769,
    "deit_base_distilled_patch16_384": 87_630_032 - 990 * 2 * 769,
    "vit_tiny_patch16_224": 5_717_416 - 990 * 193,
    "vit_tiny_patch16_384": 5_790_376 - 990 * 193,
    "vit_small_patch16_224": 22_050_664 - 990 * 385,
    "vit_small_patch16_384": 22_196_584 - 990 * 385,
    "vit_small_patch32_224": 22_878_952 - 990 * 385,
    "vit_small_patch32_384": 22_915_432 - 990 * 385,
    "vit_base_patch8_224": 86_576_872 - 990 * 769,
    "vit_base_patch16_384": 86_859_496 - 990 * 769,
    "vit_base_patch32_224": 88_224_232 - 990 * 769,
    "vit_base_patch32_384": 88_297_192 - 990 * 769,
    "vit_large_patch16_384": 304_715_752 - 990 * 1025,
    "vit_large_patch32_384": 306_632_680 - 990 * 1025,
    "vit_base_patch16_224": 85_806_346,
    "vit_base_patch16_224_in21k": 85_806_346,
    "vit_large_patch16_224": 304_326_632 - 990 * 1025,
    "vit_small_patch16_224_timm05": 47_993_098,
    "convnext_tiny": 27_827_818,
    "convnext_small": 49_462_378,
    "convnext_base": 87_576_714,
    "convnext_large": 196_245_706,
    "xcit_nano_12_p16_224": 2_925_514,
    "xcit_tiny_12_p16_224": 6_525_202,
    "xcit_tiny_24_p16_224": 11_925_826,
    "xcit_small_12_p16_224": 25_872_154,
    "xcit_small_24_p16_224": 47_290_234,
    "xcit_medium_24_p16_224": 83_887_882,
    "xcit_large_24_p16_224": 188_334_826,
    "xcit_nano_12_p8_224": 2_921_306,
    "xcit_tiny_12_p8_224": 6_515_434,
    "xcit_tiny_24_p8_224": 11_916_058,
    "xcit_small_12_p8_224": 25_831_882,
    "xcit_small_24_p8_224": 47_249_962,
    "xcit_medium_24_p8_224": 83_815_754,
    "xcit_large_24_p8_224": 188_171_338,
    # Debenedetti et al.'s, by timm's Xcit of their sizes.
    "xcit_medium_12_p16_224": 45_893_290,
    "xcit_large_12_p16_224": 103_031_338,
    "xcit_small_12_p4_32": 25_872_154,
    "xcit_medium_12_p4_32": 45_893_290,
    "xcit_large_12_p4_32": 103_031_338,
}
TAGS = tuple(golden.FACTS["models"])
QUICK = {  # the others take long: they are marked slow
    ("cifar_deit_tiny_patch16_224", "float32"),
    ("cifar_deit_tiny_patch16_224", "float64"),
    ("cifar_vit_small_patch16_224_qkscale768", "float32"),
    ("cifar_convit_tiny", "float32"),
    ("imagenet_swin_tiny_patch4_window7_224", "float32"),
}
CASES = [
    (tag, dtype) if (tag, dtype) in QUICK else runs.slow(tag, dtype)
    for tag in TAGS
    for dtype in ("float32", "float64")
]


@pytest.mark.parametrize(("tag", "dtype"), CASES)
def test_reference(tag, dtype):
    facts, expected = golden.FACTS["models"][tag], golden.arrays(tag)
    with jax.enable_x64(dtype == "float64"):
        model = golden.create(tag, dtype)
        assert model.num_blocks == facts["num_blocks"]
        params = golden.params(model)
        assert sum(x.size for x in jax.tree.leaves(params)) == facts["num_parameters"]
        images = jnp.asarray(golden.images(facts["image_size"], facts["normalisation"]), dtype)
        objective = functools.partial(golden.loss_and_logits, model)
        step = jax.jit(jax.value_and_grad(objective, has_aux=True))
        everywhere = jnp.ones(model.num_blocks, bool)
        (loss, logits), gradient = step(images, params, everywhere)
        _, masked = step(images, params, jnp.asarray(expected["keep"]))

    assert logits.dtype == dtype
    logits_bound, gradient_bound = (2e-5, 5e-5) if dtype == "float32" else (1e-6, 1e-6)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=logits_bound)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=logits_bound)
    every = (slice(None), slice(None, None, 1 if facts["image_size"] == 32 else 7))
    for value, name in ((gradient, "g"), (masked, "gm")):
        value = value[every][:, :, every[1]]
        assert golden.error(value, expected[name]) < gradient_bound, name


def test_reference_covers_all_tags_and_families():
    quick_families = {tag.split("_")[1] for tag, _ in QUICK}
    assert quick_families == {"deit", "vit", "convit", "swin"}
    assert {tag for tag, _ in QUICK} <= set(TAGS)


@pytest.mark.parametrize("tag", ["21k", "22k"])
def test_pretraining_tags_name_the_same_architecture(tag):
    for name in (n for n in models.NAMES if n.endswith(tag)):
        plain = models.create(name.rpartition("_in")[0], num_classes=10)
        assert models.create(name, num_classes=10) == plain


def test_no_model_is_unlisted():
    assert set(models.NAMES) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_number_of_parameters(name):
    model = models.create(name, num_classes=10)
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == PARAMETERS[name]


def test_default_stochastic_depth_is_the_papers():
    assert models.create("swin_tiny_patch4_window7_224", num_classes=10).drop_path == 0.1
    assert models.create("convit_tiny", num_classes=10).drop_path == 0.0
    assert models.create("deit_tiny_patch16_224", num_classes=10).drop_path == 0.0


@pytest.mark.parametrize(("size", "patch"), [(32, 4), runs.slow(64, 2)])
def test_swin_with_shrunk_and_padded_windows(size, patch):
    """Where 7 tokens do not divide the grid; the expected logits are of timm 1.0.31, in float64."""
    with np.load(golden.DATA / "swin_padded_windows.npz") as file:
        expected = file[f"logits_{size}p{patch}"]
    with jax.enable_x64(True):
        model = models.create(
            "swin_tiny_patch4_window7_224",
            num_classes=10,
            image_size=size,
            patch_size=patch,
            depth=8,
            dtype="float64",
        )
        logits = golden.forward(model, golden.params(model), golden.images(size, "imagenet"))
    np.testing.assert_allclose(logits, expected, atol=1e-9)


def test_gpsa_starts_as_a_convolution():
    """Nine heads look at the nine neighbours, one each."""
    kernel = convit._local_init(jax.random.key(0), (3, 9), jnp.float32)
    position = jax.nn.softmax(convit.relative_positions(49, jnp.float32) @ kernel, axis=1)
    centre = 24
    neighbours = [centre + 7 * dy + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    np.testing.assert_array_equal(position[centre].argmax(axis=0), neighbours)


def test_swin_geometry():
    index = swin.relative_position_index(7)
    assert index[0, 0] == 6 * 13 + 6
    assert index[48, 0] == 12 * 13 + 12
    mask = swin.shift_mask(14, 7, 3)
    assert mask.shape == (4, 49, 49)
    assert not mask[0].any()
    assert mask[1][0, 6] == -100
    assert mask[2][0, 6] == 0


@pytest.mark.parametrize(
    ("name", "multiply_adds"),  # of one 224-pixel image, as the papers give them
    [
        ("deit_tiny_patch16_224", 1.26e9),
        ("vit_base_patch16_224", 17.58e9),
        ("convit_base", 17.5e9),
        ("swin_tiny_patch4_window7_224", 4.5e9),
        ("swin_base_patch4_window7_224", 15.4e9),
    ],
)
def test_forward_flops(name, multiply_adds):
    """Less what the papers count of the last block's patches, which nothing reads: with mlp_ratio
    4, twelve linear maps of width d and two products with the attention, for each patch.
    """
    model = models.create(name, num_classes=1000)
    unread = 0
    if not name.startswith("swin"):
        d = model.embed_dim
        unread = 196 * (12 * d * d + 2 * 197 * d)
    assert model.forward_flops() == pytest.approx(2 * (multiply_adds - unread), rel=0.02)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_tinny", {}, ["vit_tinny", "vit_"]),
        ("deit_tiny_patch16_224", {"image_size": 30}, ["patch_size 16", "30"]),
        ("deit_tiny_patch16_224", {"num_heads": 5}, ["num_heads 5", "192"]),
        ("deit_tiny_patch16_224", {"width": 5}, ["width"]),
        ("convit_tiny", {"depth": 1}, ["depth 1", "at least 2"]),
        ("swin_tiny_patch4_window7_224", {"depth": 9}, ["depth 9", "even"]),
        ("swin_tiny_patch4_window7_224", {"image_size": 240}, ["240", "multiple of 32", "224"]),
        ("swin_tiny_patch4_window7_224", {"image_size": 16}, ["16", "32"]),
    ],
)
def test_errors_say_what_and_how(name, options, words):
    with pytest.raises(UserError) as caught:
        models.create(name, num_classes=10, **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
