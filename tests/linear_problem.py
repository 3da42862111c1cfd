"""A linear classifier, whose robustness is known exactly, under AutoAttack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks import autoattack
from vit_at.attacks.autoattack import Budget

SHAPE = (4, 4, 2)
SHORT = {"budget": Budget(iterations=20, queries=300)}


def linear(params, images):
    kernel, bias = params
    return images.reshape(len(images), -1) @ kernel + bias


def problem(count=24, num_classes=5, seed=0):
    """A linear classifier, images far from 0 and 1, their labels (some wrong), exact distances."""
    keys = jax.random.split(jax.random.key(seed), 3)
    images = np.asarray(0.4 + 0.2 * jax.random.uniform(keys[0], (count, *SHAPE)))
    kernel = jax.random.normal(keys[1], (np.prod(SHAPE), num_classes))
    bias = -jnp.mean(linear((kernel, 0.0), images), 0)
    logits = np.array(linear((kernel, bias), images))
    labels = logits.argmax(1)
    labels[:3] = logits[:3].argmin(1)
    return (kernel, bias), images, labels


def exact_distance(params, images, labels, norm):
    """To the nearest boundary: |z_y - z_k| / dual norm of the difference of weights.

    In l1 a step of one value would leave [0, 1]: values move to their bounds in turn.
    """
    kernel, _ = params
    logits = np.asarray(linear(params, images))
    gaps = np.take_along_axis(logits, labels[:, None], 1) - logits
    across = np.asarray(kernel)[:, labels][:, :, None] - np.asarray(kernel)[:, None]
    if norm == "l1":
        flat = images.reshape(len(images), -1).T[:, :, None]
        order = np.argsort(-np.abs(across), 0)
        weights = np.take_along_axis(np.abs(across), order, 0)
        room = np.take_along_axis(np.where(across > 0, flat, 1 - flat), order, 0)
        left = np.maximum(gaps - np.cumsum(weights * room, 0) + weights * room, 0)
        distance = np.minimum(left / np.maximum(weights, 1e-12), room).sum(0)
        distance[gaps < 0] = gaps[gaps < 0]
        distance[np.arange(len(labels)), labels] = np.nan
        return np.nanmin(distance, 1)
    across = np.linalg.norm(across, 1 if norm == "linf" else 2, axis=0)
    across[np.arange(len(labels)), labels] = np.nan
    return np.nanmin(gaps / across, 1)


def attack(params, images, labels, **options):
    options = {"batch_size": 8, **SHORT} | options
    return autoattack.run(functools.partial(linear, params), images, labels, **options)


def median_eps(params, images, labels, norm):
    """An eps with a gap around it, so that rounding decides nothing."""
    distances = np.sort(exact_distance(params, images, labels, norm))
    distances = distances[distances > 0]
    middle = len(distances) // 2
    if norm == "l1":  # the two in the middle are too close
        middle += int(np.argmax(np.diff(distances[middle - 3 : middle + 4]))) - 2
    return float(distances[middle - 1] + distances[middle]) / 2
