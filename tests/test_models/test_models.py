"""Every architecture against the PyTorch reference, and the gate that ARD needs."""

import functools
import types

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.extend import core as jax_core

from vit_at import models, weights
from vit_at.errors import UserError
from vit_at.models import blocks, convit, layers, swin

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
# Small models of each family, with fewer blocks and a narrower trunk than any published one.
SMALL = {
    "deit_tiny_patch16_224": {"depth": 3, "embed_dim": 24},
    "deit_tiny_distilled_patch16_224": {"depth": 3, "embed_dim": 24},
    "convit_tiny": {"depth": 3, "embed_dim": 32},
    "swin_tiny_patch4_window7_224": {"depth": 8, "embed_dim": 12},
}
TAGS = tuple(golden.FACTS["models"])
QUICK = {  # the others take long: they are marked slow
    ("cifar_deit_tiny_patch16_224", "float32"),
    ("cifar_deit_tiny_patch16_224", "float64"),
    ("cifar_vit_small_patch16_224_qkscale768", "float32"),
    ("cifar_convit_tiny", "float32"),
    ("imagenet_deit_tiny_patch16_224", "float32"),
    ("imagenet_convit_tiny", "float32"),
    ("imagenet_swin_tiny_patch4_window7_224", "float32"),
}
CASES = [
    (tag, dtype) if (tag, dtype) in QUICK else runs.slow(tag, dtype)
    for tag in TAGS
    for dtype in ("float32", "float64")
]


@functools.cache
def small(name, dtype="float32", **overrides):
    """A small model of a family at 32 pixels, with weights by the golden rule."""
    options = SMALL[name] | {"num_classes": 10, "image_size": 32, "patch_size": 4} | overrides
    model = models.create(name, dtype=dtype, **options)
    return model, golden.params(model)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, images):
    return model.apply({"params": params}, images)


def loss_and_logits(model, images, params, keep):
    logits = model.apply({"params": params}, images, keep)
    log_p = jax.nn.log_softmax(logits)
    return -log_p[jnp.arange(len(images)), golden.LABELS[: len(images)]].mean(), logits


def error(value, expected):
    """Largest difference, relative to the largest expected number."""
    return np.abs(np.asarray(value) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("tag", "dtype"), CASES)
def test_reference(tag, dtype):
    facts, expected = golden.FACTS["models"][tag], golden.arrays(tag)
    with jax.enable_x64(dtype == "float64"):
        model = golden.create(tag, dtype)
        assert model.num_blocks == facts["num_blocks"]
        params = golden.params(model)
        assert sum(x.size for x in jax.tree.leaves(params)) == facts["num_parameters"]
        images = jnp.asarray(golden.images(facts["image_size"], facts["normalisation"]), dtype)
        objective = functools.partial(loss_and_logits, model)
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
        assert error(value, expected[name]) < gradient_bound, name


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


def small_gradients(name):
    """Gradients of a small model for the images and the weights, with and without masked blocks."""
    model, params = small(name)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    step = jax.jit(jax.grad(functools.partial(loss_and_logits, model), (0, 1), has_aux=True))
    some = jnp.arange(model.num_blocks) % 3 != 1
    return [jax.tree.map(np.asarray, step(images, params, k)) for k in (some, some | True)]


def plain_gate(norm, attention, x, keep):
    """keep * a + (1 - keep) * stop_gradient(a), the definition."""
    a = attention(norm(x))
    return keep * a + (1 - keep) * jax.lax.stop_gradient(a)


# Swin takes longest to compile.
MOST = [runs.slow(name) if "swin" in name else name for name in SMALL]


@pytest.mark.parametrize("name", MOST)
def test_gate_is_its_definition(name, monkeypatch):
    gated, unmasked = small_gradients(name)
    model, params = small(name)
    plain = forward(model, params, jnp.asarray(golden.images(32, "cifar"), jnp.float32))
    for _, logits in (gated, unmasked):
        np.testing.assert_allclose(logits, plain, atol=1e-5)

    monkeypatch.setattr(blocks, "attention_branch", plain_gate)
    expected, _ = small_gradients(name)
    for got, wanted, free in zip(gated[0], expected[0], unmasked[0], strict=True):
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
        jax.tree.map(
            lambda a, b, atol=1e-5 * scale: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
            got,
            wanted,
        )
        difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), got, free)
        assert max(jax.tree.leaves(difference)) > 1e-3 * scale


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "cond":
            for inner in jax_core.jaxprs_in_params(equation.params):
                yield from _equations(inner)


def _products(jaxpr):
    return sum(e.primitive.name == "dot_general" for e in _equations(jaxpr))


@pytest.mark.parametrize("name", MOST)
def test_masked_backward_pass_is_not_computed(name):
    model, params = small(name)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    gradient = jax.jit(jax.grad(functools.partial(loss_and_logits, model), has_aux=True))
    keep = jnp.zeros(model.num_blocks, bool)
    jaxpr = jax.make_jaxpr(gradient)(images, params, keep).jaxpr
    branches = [e.params["branches"] for e in _equations(jaxpr) if e.primitive.name == "cond"]
    assert branches, "no branch depends on the mask"
    for skipped, computed in branches:
        assert _products(skipped.jaxpr) == 0
        assert _products(computed.jaxpr) >= 6  # of qkv, the logits, the values and proj
    if name.startswith("deit"):  # what XLA makes of it is the same for all, and takes long
        compiled = gradient.lower(images, params, keep).compile().as_text()
        assert compiled.count(" conditional(") == len(branches)


@pytest.mark.parametrize("name", MOST)
def test_bfloat16_gives_float32_logits(name):
    model, params = small(name, dtype="bfloat16")
    exact, _ = small(name)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    logits, expected = forward(model, params, images), forward(exact, params, images)
    assert logits.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert 0 < error(logits, expected) < 0.1


@pytest.mark.parametrize("name", MOST)
def test_stochastic_depth_drops_the_attention_branch_alone(name, monkeypatch):
    model, params = small(name, drop_path=0.5)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)

    @jax.jit
    def train(params, key):
        return model.apply({"params": params}, images, train=True, rngs={"drop_path": key})

    if name.startswith("deit"):
        first, second = (train(params, jax.random.key(i)) for i in range(2))
        assert error(first, second) > 1e-3
        np.testing.assert_array_equal(first, train(params, jax.random.key(0)))
        train.clear_cache()

    monkeypatch.setattr(blocks, "drop_path", lambda key, x, rate: jnp.zeros_like(x))
    dropped = train(params, jax.random.key(0))
    without = weights.to_timm(params, model)
    without |= {n: 0 * v for n, v in without.items() if ".attn.proj." in n}
    expected = forward(model, weights.from_timm(without, model), images)
    np.testing.assert_allclose(dropped, expected, atol=1e-5)


@pytest.mark.parametrize("name", MOST)
def test_a_key_for_each_image_makes_its_depth_independent_of_the_others(name):
    model, params = small(name, drop_path=0.5)
    apply = jax.jit(models.classifier(model, (0.5,) * 3, (0.5,) * 3), static_argnames="train")
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(images))

    def logits(rows):
        return apply(params, images[rows], train=True, rngs={"drop_path": keys[rows]})

    whole, backwards = logits(slice(None)), logits(slice(None, None, -1))
    np.testing.assert_allclose(whole, backwards[::-1], rtol=1e-4, atol=1e-5)
    same, keys = jnp.repeat(images[:1], 16, 0), jax.random.split(jax.random.key(0), 16)
    of_same = apply(params, same, train=True, rngs={"drop_path": keys})
    assert len(np.unique(np.round(of_same, 4), axis=0)) > 1


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("deit_tiny_patch16_224", False),
        runs.slow("deit_tiny_patch16_224", True),
        *(runs.slow(name, remat) for name in [*SMALL][1:] for remat in (False, True)),
    ],
)
def test_blocks_one_by_one_are_those_of_the_scan(name, remat):
    """Logits and all gradients, with masked blocks and stochastic depth."""
    model, params = small(name, drop_path=0.5, remat=remat)
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    keep = jnp.arange(model.num_blocks) != 1
    # Of this key, some of the images keep their last attention.
    rngs = {"drop_path": jax.random.split(jax.random.key(1), len(images))}

    def loss(params, images):
        return (apply(params, images, keep, train=True, rngs=rngs) ** 2).sum()

    laid_out = models.unstack_blocks(apply, params)
    kinds = {type(tree) for tree in laid_out.values()}
    assert kinds == {blocks.Unstacked, *(type(tree) for tree in params.values())}
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected, (expected_to_params, expected_to_images) = step(params, images)
    value, (to_params, to_images) = step(laid_out, images)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert error(to_images, expected_to_images) < 1e-4
    to_params = weights.to_timm(models.stack_blocks(to_params), model)
    for key, gradient in weights.to_timm(expected_to_params, model).items():
        np.testing.assert_allclose(to_params[key], gradient, rtol=1e-3, atol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"])
def test_fused_attention_is_attention(name, monkeypatch):
    """An odd number of tokens and an even one, by JAX's formula in place of cuDNN's kernel."""
    original = jax.nn.dot_product_attention
    calls = []

    def on_a_cpu(*arguments, implementation, **options):
        calls.append((implementation, options["query_seq_lengths"] is None))
        return original(*arguments, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_cpu)
    model, params = small(name, dtype="bfloat16", image_size=28)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)[:, :28, :28]
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    fused = models.for_device(apply, types.SimpleNamespace(compute_capability="9.0"))
    assert fused.model.fused_attention

    def loss(params, images, apply):
        logits = apply(params, images, jnp.arange(model.num_blocks) != 1)
        return (logits**2).sum(), logits

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (expected_to_params, expected), expected_logits = step(params, images, apply)
    (to_params, to_images), logits = step(params, images, fused)
    assert set(calls) == {("cudnn", "distilled" not in name)}
    assert error(logits, expected_logits) < 0.02
    assert error(to_images, expected) < 0.05
    for a, b in zip(*map(jax.tree.leaves, (to_params, expected_to_params)), strict=True):
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b) + 1e-3


def test_attention_is_fused_in_bfloat16_on_a_gpu_that_can():
    def is_fused(capability, **options):
        model, _ = small("deit_tiny_patch16_224", **options)
        apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
        device = types.SimpleNamespace(compute_capability=capability)
        return models.for_device(apply, device).model.fused_attention

    assert is_fused("8.0", dtype="bfloat16")
    assert not is_fused("8.0")
    for other in ("7.5", "gfx90a", ""):  # a T4, an AMD, a device without the attribute
        assert not is_fused(other, dtype="bfloat16")
    assert not is_fused("8.0", dtype="bfloat16", embed_dim=36)  # heads of 12


@pytest.mark.parametrize("name", MOST)
def test_weights_cast_before_an_attack_change_no_bit(name):
    model, params = small(name, dtype="bfloat16")
    apply = models.classifier(model, (0.5,) * 3, (0.5,) * 3)
    images = jnp.asarray(golden.images(32, "cifar"), jnp.float32)
    cast = models.cast_kernels(apply, models.unstack_blocks(apply, params))
    assert {x.dtype.name for x in jax.tree.leaves(cast)} == {"float32", "bfloat16"}
    cast = models.stack_blocks(cast)
    np.testing.assert_array_equal(forward(model, cast, images), forward(model, params, images))


def test_drop_path_keeps_the_mean():
    x = jnp.ones((20_000, 1, 1))
    dropped = layers.drop_path(jax.random.key(0), x, jnp.asarray(0.1))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.9)}
    assert abs(float(dropped.mean()) - 1) < 0.01


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
        logits = forward(model, golden.params(model), golden.images(size, "imagenet"))
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
    4, ten linear maps of width d and two products with the attention, for each patch.
    """
    model = models.create(name, num_classes=1000)
    unread = 0
    if not name.startswith("swin"):
        d = model.embed_dim
        unread = 196 * (10 * d * d + 2 * 197 * d)
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
