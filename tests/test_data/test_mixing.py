"""Mixup and CutMix: the reference's mixing array by array, and the draws' distributions."""

import collections
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_at.data import augment
from vit_at.data.mixing import Mixing, apply_mixing, cutmix_box, draw_mixing, mix

STEPS = Path(__file__).parents[1] / "data" / "steps"
MIXING = {
    "probability": 0.3,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "cutmix_probability": 0.5,
}


def images(b=6, size=8, channels=3, seed=0):
    return np.random.default_rng(seed).random((b, size, size, channels), np.float32)


def targets(b=6, classes=10):
    return augment.one_hot(jnp.arange(b) % classes, classes)


# --- the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["at_plain_cutmix", "at_ardprm_cutmix"])
def test_cutmix_box_is_the_references(case):
    with np.load(STEPS / f"train_{case}.npz") as golden:
        drawn, centre = jnp.float32(golden["mix_lam_drawn"]), jnp.array(golden["cutmix_center"])
        mixing = cutmix_box(drawn, centre, 32)
        np.testing.assert_array_equal(mixing.box, golden["cutmix_box"])
        assert mixing.box.dtype == jnp.int32
        np.testing.assert_allclose(mixing.lam, golden["mix_lam"], rtol=1e-7)


@pytest.mark.parametrize(
    "case", ["at_plain_cutmix", "at_plain_mixup", "at_ardprm_cutmix", "at_ardprm_mixup"]
)
def test_mixed_batches_are_the_references(case):
    with np.load(STEPS / "model.npz") as model:
        pixels, labels = augment.to_float(jnp.array(model["images"])), model["labels"]
        mean, std = model["mean"], model["std"]
    with np.load(STEPS / f"train_{case}.npz") as golden:
        box = golden["cutmix_box"] if "cutmix_box" in golden else np.zeros(4)
        mixing = Mixing(jnp.float32(golden["mix_lam"]), jnp.array(box, jnp.int32))
        mixed, soft = apply_mixing(pixels, augment.one_hot(labels, 10), mixing)
        np.testing.assert_allclose(soft, golden["soft_targets"], atol=1e-6)
        full = case in ("at_plain_cutmix", "at_ardprm_mixup")  # the others leave the images out
        assert ("x_input" in golden) == full
        if full:
            np.testing.assert_allclose((mixed - mean) / std, golden["x_input"], atol=2e-6)


def box_by_the_book(lam, centre, size):
    """timm's rand_bbox and lambda correction, in its words."""
    cut = int(size * np.sqrt(1 - lam))
    edges = [np.clip(c + s * (cut // 2), 0, size) for c in centre for s in (-1, 1)]
    area = (edges[1] - edges[0]) * (edges[3] - edges[2])
    return edges, 1 - area / size**2


@settings(deadline=None)
@given(
    lam=st.floats(0, 1, width=32),
    centre=st.tuples(st.integers(0, 31), st.integers(0, 31)),
    size=st.just(32),
)
def test_cutmix_box_for_any_draw(lam, centre, size):
    mixing = cutmix_box(jnp.float32(lam), jnp.array(centre), size)
    box, corrected = box_by_the_book(np.float32(lam), centre, size)
    np.testing.assert_array_equal(mixing.box, box)
    np.testing.assert_allclose(mixing.lam, corrected, atol=1e-6)


# --- drawing ----------------------------------------------------------------------------------


def kinds(options, n=2000, size=16):
    """Draws n mixings; returns them and how many are none, mixup and cutmix."""
    draw = jax.jit(jax.vmap(lambda key: draw_mixing(key, size, **(MIXING | options))))
    mixing = draw(jax.random.split(jax.random.key(0), n))
    area = (mixing.box[:, 1] - mixing.box[:, 0]) * (mixing.box[:, 3] - mixing.box[:, 2])
    kind = np.where(area > 0, "cutmix", np.where(mixing.lam < 1, "mixup", "none"))
    return mixing, collections.Counter(kind.tolist())


def test_how_often_batches_are_mixed():
    mixing, count = kinds({})
    # An empty box counts as none here: of a Beta(1, 1) draw, int(16 sqrt(1 - lam)) < 2 in 1 of 64.
    assert count["mixup"] == pytest.approx(300, abs=60)
    assert count["cutmix"] == pytest.approx(295, abs=60)
    lam = np.asarray(mixing.lam)
    assert ((lam >= 0) & (lam <= 1)).all()


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"probability": 0.0}, {"mixup", "cutmix"}),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "probability": 1.0}, {"mixup", "cutmix"}),
        ({"mixup_alpha": 0.0, "probability": 1.0}, {"mixup"}),
        ({"cutmix_alpha": 0.0, "probability": 1.0}, {"cutmix", "none"}),
        ({"cutmix_probability": 0.0, "probability": 1.0}, {"cutmix", "none"}),
        ({"cutmix_probability": 1.0, "probability": 1.0}, {"mixup"}),
    ],
)
def test_what_is_off_never_happens(options, absent):
    _, count = kinds(options, n=500)
    assert not absent & set(count)
    if options.get("probability") == 1.0 and len(absent) < 2 and "none" not in absent:
        assert (
            count["cutmix"] > 450
        )  # the alpha or probability that is 0 doesn't thin out the other


def test_lambda_follows_its_beta_distribution():
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    mixing, _ = kinds({"probability": 1.0, "cutmix_alpha": 0.0, "mixup_alpha": 0.8}, n=4000)
    lam = np.asarray(mixing.lam)
    assert lam.mean() == pytest.approx(0.5, abs=0.02)
    assert lam.var() == pytest.approx(1 / (4 * 2.6), rel=0.06)


def test_mix_without_mixing_is_the_identity_bit_for_bit():
    x, y = jnp.array(images()), targets()
    mixed, soft = mix(jax.random.key(0), x, y, **(MIXING | {"probability": 0.0}))
    np.testing.assert_array_equal(mixed, x)
    np.testing.assert_array_equal(soft, y)


@pytest.mark.parametrize("seed", range(6))
def test_mix_is_draw_then_apply_and_keeps_the_mass(seed):
    x, y, key = jnp.array(images()), targets(), jax.random.key(seed)
    options = MIXING | {"probability": 1.0}
    mixed, soft = jax.jit(lambda k, x, y: mix(k, x, y, **options))(key, x, y)
    drawn = draw_mixing(key, 8, **options)
    expected = apply_mixing(x, y, drawn)
    np.testing.assert_allclose(mixed, expected[0], atol=1e-6)
    np.testing.assert_allclose(soft, expected[1], atol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    if not np.any(drawn.box):
        np.testing.assert_allclose(mixed, drawn.lam * x + (1 - drawn.lam) * x[::-1], atol=1e-6)
    else:
        share = np.mean(np.all(np.asarray(mixed) == np.asarray(x), -1), (1, 2))
        np.testing.assert_allclose(share, drawn.lam, atol=1e-6)


def test_an_odd_batch_can_be_mixed():
    mixing = Mixing(jnp.float32(0.25), jnp.zeros(4, jnp.int32))
    x = jnp.array(images(b=3))
    mixed, _ = apply_mixing(x, targets(3), mixing)
    np.testing.assert_allclose(mixed[1], x[1], atol=1e-6)
    np.testing.assert_allclose(mixed[0], 0.25 * x[0] + 0.75 * x[2], atol=1e-6)
