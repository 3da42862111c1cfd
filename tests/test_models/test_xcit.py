"""XCiT against timm 1.0.31 in float64, with tiny widths and weights by the golden rule."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.extend import core as jax_core

from vit_at import models, weights
from vit_at.distributed import sharding
from vit_at.errors import UserError
from vit_at.models import xcit_stem
from vit_at.reporting.exported import timm_arguments
from vit_at.training.setup import initial_state

# {tag of the golden file: (name, image size, normalisation, what is overridden)}
MODELS = {
    "xcit_p16": ("xcit_tiny_12_p16_224", 64, "imagenet", {"depth": 3, "embed_dim": 32}),
    "xcit_p8": (
        "xcit_nano_12_p8_224",
        32,
        "cifar",
        {"depth": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "xcit_p4": (
        "xcit_tiny_12_p16_224",
        32,
        "cifar",
        {"depth": 3, "embed_dim": 32, "patch_size": 4},
    ),
}


@functools.cache
def create(tag, dtype="float32", **overrides):
    name, size, normalisation, own = MODELS[tag]
    own = own | overrides
    model = models.create(name, num_classes=10, image_size=size, dtype=dtype, **own)
    return model, golden.params(model), jnp.asarray(golden.images(size, normalisation))


def loss_and_logits(model, images, params, keep):
    logits = model.apply({"params": params}, images, keep)
    log_p = jax.nn.log_softmax(logits)
    return -log_p[jnp.arange(2), golden.LABELS].mean(), logits


def gradients(apply, images, params, expected):
    """(logits, input gradient, gated input gradient)."""
    step = jax.jit(jax.grad(functools.partial(loss_and_logits, apply), has_aux=True))
    keep = jnp.asarray(expected["keep"])
    (g, logits), (gm, _) = (step(images, params, k) for k in (keep | True, keep))
    return logits, g, gm


@pytest.mark.parametrize("tag", [runs.slow("xcit_p16"), "xcit_p8"])
def test_reference(tag):
    """Scanned, in float64."""
    expected = golden.arrays(tag)
    with jax.enable_x64(True):
        model, params, images = create(tag, "float64")
        assert model.num_blocks == len(expected["keep"]) == model.depth + 2
        logits, g, gm = gradients(model, images, params, expected)
    assert golden.error(logits, expected["logits"]) < 1e-6
    assert golden.error(g, expected["g"]) < 1e-5
    assert golden.error(gm, expected["gm"]) < 1e-5


@pytest.mark.slow
def test_reference_block_by_block_in_float32():
    """Patch 4, with the blocks unstacked and computed again for the gradient."""
    expected = golden.arrays("xcit_p4")
    model, params, images = create("xcit_p4", remat=True)
    apply = models.classifier(model, (0.0,) * 3, (1.0,) * 3)
    laid_out = models.unstack_blocks(apply, params)
    assert len(laid_out["blocks"].blocks) == 3
    logits, g, gm = gradients(model, images.astype(jnp.float32), laid_out, expected)
    assert golden.error(logits, expected["logits"]) < 1e-5
    assert golden.error(g, expected["g"]) < 5e-5
    assert golden.error(gm, expected["gm"]) < 5e-5


def test_masked_backward_passes_are_not_computed():
    model, params, images = create("xcit_p4")

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            if equation.primitive.name != "cond":
                for inner in jax_core.jaxprs_in_params(equation.params):
                    yield from equations(inner)

    def count(primitive, branch):
        return sum(e.primitive.name == primitive for e in equations(branch.jaxpr))

    gradient = jax.grad(functools.partial(loss_and_logits, model), has_aux=True)
    jaxpr = jax.make_jaxpr(gradient)(images, params, jnp.zeros(5, bool)).jaxpr
    conditions = [e.params["branches"] for e in equations(jaxpr) if e.primitive.name == "cond"]
    # The stem's convolutions choose by platform, not by mask.
    conditions = [c for c in conditions if not any(count("conv_general_dilated", b) for b in c)]
    assert len(conditions) == 3  # one for the scanned blocks, one for each block of class attention
    for skipped, computed in conditions:
        assert count("dot_general", skipped) == 0
        assert count("dot_general", computed) >= 6


@pytest.mark.slow
def test_bfloat16_and_stochastic_depth():
    """A key for each image; float32 logits, near the exact ones without drops."""
    model, params, images = create("xcit_p4", "bfloat16", drop_path=0.5)
    apply = models.classifier(model, (0.0,) * 3, (1.0,) * 3)
    images = jnp.repeat(images[:1].astype(jnp.float32), 8, 0)
    keys = jax.random.split(jax.random.key(0), 8)
    train = jax.jit(lambda keys: apply(params, images, train=True, rngs={"drop_path": keys}))
    logits, backwards = train(keys), train(keys[::-1])
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, backwards[::-1])
    assert len(np.unique(logits, axis=0)) > 1
    plain = jax.jit(apply)(params, images)
    assert golden.error(plain[0], golden.arrays("xcit_p4")["logits"][0]) < 0.1


@pytest.mark.slow
def test_drops_scale_all_three_branches():
    """All branches dropped: each block passes its input on."""
    model, params, images = create("xcit_p8", drop_path=0.999999)
    with_none = params | {"blocks": jax.tree.map(jnp.zeros_like, params["blocks"])}
    apply = jax.jit(model.apply, static_argnames="train")
    rngs = {"drop_path": jax.random.key(0)}
    dropped = apply({"params": params}, images, train=True, rngs=rngs)
    np.testing.assert_allclose(dropped, apply({"params": with_none}, images), atol=1e-6)


def test_weights_go_both_ways_with_the_statistics_folded():
    model, params, _ = create("xcit_p16")
    state = weights.to_timm(params, model)
    again = weights.from_timm(state, model)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))
    layer = "blocks.1.local_mp.bn"
    assert state[f"{layer}.num_batches_tracked"].dtype == np.int64
    changed = state | {f"{layer}.running_var": np.full(32, 4 - 1e-5, np.float32)}
    changed |= {f"{layer}.running_mean": np.full(32, 3, np.float32)}
    bn = {k: v[1] for k, v in weights.from_timm(changed, model)["blocks"]["local_mp"]["bn"].items()}
    np.testing.assert_allclose(bn["scale"], state[f"{layer}.weight"] / 2, rtol=1e-6)
    np.testing.assert_allclose(
        bn["bias"], state[f"{layer}.bias"] - 3 * state[f"{layer}.weight"] / 2, rtol=1e-5, atol=1e-6
    )


def test_weights_load_into_timm():
    """A strict load_state_dict, and timm's logits of random weights of ours."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model, _, images = create("xcit_p16")
    params = models.init_params(model, jax.random.key(0))
    theirs = timm.create_model(**timm_arguments(model, "xcit_tiny_12_p16_224")).eval()
    state = weights.to_timm(params, model)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    images = np.asarray(images, np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    ours = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_what_timm_has_not_is_not_exported():
    model, _, _ = create("xcit_p4")
    with pytest.raises(UserError, match=r"timm has no mine with model\.patch_size 4"):
        timm_arguments(model, "mine")
    large = models.create("xcit_large_12_p16_224", num_classes=10)
    assert timm_arguments(large, "xcit_large_12_p16_224")["model_name"] == "xcit_large_24_p16_224"


def test_small_patches_take_the_weights_of_large_ones():
    large, params, _ = create("xcit_p16")
    small, _, _ = create("xcit_p4")
    state = weights.to_timm(params, large)
    loaded, report = weights.convert(state, small)
    assert [report.adapted, report.dropped, report.initialised] == [{}, {}, []]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, loaded))


def trained(devices):
    """Two steps of AT with ARD and PRM, in l2, where rounding stays small."""
    options = {"masking__ard": True, "masking__prm": True, "masking__warmup_epochs": 1.0}
    options |= {"threat__norm": "l2", "threat__eps": 0.5, "threat__step_size": 0.25}
    setup = runs.tiny_setup(devices, **options)
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "embed_dim": 16, "depth": 1}
    setup = setup._replace(
        model=models.create("xcit_nano_12_p16_224", num_classes=3, num_heads=2, **sizes)
    )
    state = initial_state(setup, runs.optimizer_of(setup))
    batches = [sharding.split_batch(b, setup.mesh) for b in runs.batches(setup, 2)]
    step = runs.compiled_step(setup, state, batches[0])
    for batch in batches:
        state, metrics = step(state, batch)
    return jax.device_get(state.params), float(metrics.compute()["loss"])


@pytest.mark.slow
def test_training_with_ard_and_prm_does_not_depend_on_the_number_of_devices():
    (one, loss), (several, same) = trained(1), trained(4)
    assert loss == pytest.approx(same, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, several)


@pytest.mark.parametrize(
    ("name", "gflop"),  # torch.utils.flop_counter on timm's model
    [
        ("xcit_nano_12_p16_224", 1.101703168),
        ("xcit_small_12_p16_224", 9.59106048),
        ("xcit_tiny_12_p8_224", 9.540811776),
    ],
)
def test_forward_flops(name, gflop):
    """It counts the positional encoding, once a batch, and not the products of class attention."""
    model = models.create(name, num_classes=1000)
    n, d = model.num_tokens, model.embed_dim
    difference = 2 * (2 * 2 * (n + 1) * d - n * 64 * d)
    assert model.forward_flops() == pytest.approx(gflop * 1e9 + difference, rel=1e-9)


def test_debenedettis_names():
    options = models.create("xcit_small_12_p16_224", num_classes=10, image_size=32, patch_size=4)
    assert models.create("xcit_small_12_p4_32", num_classes=10) == options
    plan = [(48, 1), (96, 1), (192, 2), (384, 2)]
    assert xcit_stem.conv_plan(4, 4, 384) == plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 32}, "patch_size 32 .* choose one of 2, 4, 8, 16"),
        ({"stem": "conv"}, "'conv', but XCiT's own stem"),
        ({"qk_scale": 0.1}, "qk_scale is 0.1"),
        ({"embed_dim": 36}, "embed_dim 36 .* a multiple of 8"),
    ],
)
def test_what_does_not_suit_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        models.create("xcit_tiny_12_p16_224", num_classes=10, **options)
