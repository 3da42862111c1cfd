"""Augmentation: what random crops and flips may do, and the targets."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_at.data import augment


def images(b=6, size=8, channels=3, seed=0):
    return np.random.default_rng(seed).random((b, size, size, channels), np.float32)


def test_random_crop_shifts_within_the_padding_and_adds_black():
    x, padding = images(b=300, size=5, channels=1) + 1, 2
    cropped = np.asarray(augment.random_crop(jax.random.key(0), jnp.array(x), padding))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = collections.Counter()
    for before, after in zip(padded, cropped, strict=True):
        shifts = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if np.array_equal(before[i : i + 5, j : j + 5], after)
        ]
        assert len(shifts) == 1
        found.update(shifts)
    assert len(found) == 25  # every shift occurs


def test_random_flip_mirrors_about_half():
    x = images(b=400, size=4)
    flipped = np.asarray(augment.random_flip(jax.random.key(1), jnp.array(x)))
    same = np.all(flipped == x, (1, 2, 3))
    np.testing.assert_array_equal(flipped[~same], x[~same][:, :, ::-1])
    assert 150 < same.sum() < 250


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_augment_is_keyed_and_switchable(dtype):
    x = jnp.array((images(b=16) * 255).astype(dtype))
    run = jax.jit(augment.augment, static_argnames=("crop_padding", "flip"))
    a, b, c = (run(jax.random.key(k), x, crop_padding=4, flip=True) for k in (0, 0, 1))
    assert a.dtype == x.dtype
    assert a.shape == x.shape
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)
    off = run(jax.random.key(0), x, crop_padding=0, flip=False)
    np.testing.assert_array_equal(off, x)
    only_flip = run(jax.random.key(0), x, crop_padding=0, flip=True)
    np.testing.assert_array_equal(np.sort(only_flip, axis=2), np.sort(x, axis=2))
    assert np.any(only_flip != x)


def test_to_float():
    converted = augment.to_float(jnp.arange(256).astype(jnp.uint8))
    assert converted.dtype == jnp.float32
    np.testing.assert_allclose(converted, np.arange(256) / 255, rtol=1e-7)


def test_one_hot_smoothing_is_pytorchs():
    soft = augment.one_hot(jnp.array([2, 0]), 4, 0.2)
    np.testing.assert_allclose(soft, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    np.testing.assert_array_equal(augment.one_hot(jnp.array([1]), 3), [[0, 1, 0]])
