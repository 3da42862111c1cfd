"""The geometry of the norms: for any point, radius and image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vit_at.attacks.norms import NORMS, largest_size, resize, resize_as_official, sizes
from vit_at.attacks.threat import Threat, ascend, into_ball, into_image_range, random_start
from vit_at.configs import default

SHAPE = (3, 4, 4, 2)
EPS = st.floats(2**-10, 5.0, width=32)


def points(bound):
    return hnp.arrays(np.float32, SHAPE, elements=st.floats(-bound, bound, width=32))


def lengths(norm, delta):
    """[b] of [b, H, W, C], in float64."""
    flat = np.abs(np.asarray(delta, np.float64)).reshape(len(delta), -1)
    if norm == "l1":
        return flat.sum(axis=1)
    return flat.max(axis=1) if norm == "linf" else np.sqrt((flat**2).sum(axis=1))


def nearest_in_l1(delta, eps):
    """The projection onto the l1 ball by sorting (Duchi et al. 2008), in float64."""
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    ordered = -np.sort(-np.abs(flat), axis=1)
    levels = (np.cumsum(ordered, 1) - eps) / np.arange(1, flat.shape[1] + 1)
    last = (ordered > levels).sum(1, keepdims=True) - 1
    level = np.maximum(np.take_along_axis(levels, np.maximum(last, 0), 1), 0)
    return (np.sign(flat) * np.maximum(np.abs(flat) - level, 0)).reshape(delta.shape)


@pytest.mark.parametrize("norm", NORMS)
@given(delta=points(10.0), eps=EPS)
@settings(max_examples=50, deadline=None)
def test_projection_is_the_nearest_point_of_the_ball(norm, delta, eps):
    projected = np.asarray(NORMS[norm].project(delta, eps))
    assert np.all(lengths(norm, projected) <= eps * (1 + 1e-5))
    inside = lengths(norm, delta) <= eps * (1 - 1e-5)
    np.testing.assert_allclose(projected[inside], delta[inside], rtol=1e-6, atol=1e-12)
    if norm == "linf":
        nearest = np.clip(delta, -eps, eps)
    elif norm == "l1":
        nearest = nearest_in_l1(delta, eps)
    else:
        factor = np.minimum(1, eps / np.maximum(lengths(norm, delta), 1e-12))
        nearest = delta * factor[:, None, None, None]
    np.testing.assert_allclose(projected, nearest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@given(eps=EPS, seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_starts_lie_in_the_ball(norm, eps, seed):
    start = random_start(jax.random.key(seed), SHAPE, Threat(norm, eps))
    assert start.shape == SHAPE
    assert np.all(lengths(norm, start) <= eps * (1 + 1e-5))


def test_linf_starts_are_uniform():
    start = np.asarray(random_start(jax.random.key(0), (64, 16, 16, 1), Threat("linf", 0.5)))
    counts, _ = np.histogram(start, bins=8, range=(-0.5, 0.5))
    np.testing.assert_allclose(counts / start.size, 1 / 8, atol=0.01)


def test_l2_starts_are_uniform_in_volume_and_direction():
    start = random_start(jax.random.key(0), (4000, 2, 2, 1), Threat("l2", 2.0))
    volume = (lengths("l2", start) / 2.0) ** 4  # the share of the ball within that radius
    counts, _ = np.histogram(volume, bins=4, range=(0, 1))
    np.testing.assert_allclose(counts / 4000, 1 / 4, atol=0.04)
    np.testing.assert_allclose(np.asarray(start).mean(axis=0), 0, atol=0.08)


def test_l1_starts_are_uniform_in_volume_and_sign():
    start = random_start(jax.random.key(0), (4000, 2, 2, 1), Threat("l1", 2.0))
    volume = (lengths("l1", start) / 2.0) ** 4
    counts, _ = np.histogram(volume, bins=4, range=(0, 1))
    np.testing.assert_allclose(counts / 4000, 1 / 4, atol=0.04)
    np.testing.assert_allclose(np.asarray(start).mean(axis=0), 0, atol=0.08)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@given(delta=points(1.0), eps=EPS)
@settings(max_examples=50, deadline=None)
def test_projecting_an_image_is_projecting_its_perturbation(norm, delta, eps):
    images = np.full(SHAPE, 0.5, np.float32)
    projected = NORMS[norm].project_image(images + delta, images, eps)
    expected = images + NORMS[norm].project(delta, eps)
    np.testing.assert_allclose(projected, expected, rtol=1e-4, atol=1e-6)
    moved = sizes(np.asarray(projected) - images, norm)
    assert np.all(moved <= largest_size(eps, images[0].size, norm))


@pytest.mark.parametrize("norm", NORMS)
@given(x=points(10.0), y=points(10.0))
@settings(max_examples=50, deadline=None)
def test_sizes(norm, x, y):
    """Against numpy's norms, on the host and on the device; the dual size bounds the product."""
    size = np.asarray(NORMS[norm].size(x))[:, 0, 0, 0]
    np.testing.assert_allclose(size, lengths(norm, x), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(sizes(x, norm), lengths(norm, x), rtol=1e-12)
    products = (x.astype(np.float64) * y).sum((1, 2, 3))
    dual_size = np.asarray(NORMS[norm].dual_size(y), np.float64)[:, 0, 0, 0]
    assert np.all(np.abs(products) <= lengths(norm, x) * dual_size * (1 + 1e-5) + 1e-6)
    assert NORMS[norm].diameter(x[0].size) == pytest.approx(lengths(norm, np.ones(SHAPE))[0])


@pytest.mark.parametrize("resize", [resize, resize_as_official])
@pytest.mark.parametrize("norm", NORMS)
@given(gradient=points(1.0), step_size=EPS)
@settings(max_examples=50, deadline=None)
def test_a_step_has_its_length_and_follows_the_gradient(norm, resize, gradient, step_size):
    step = np.asarray(NORMS[norm].steepest_step(gradient, step_size, resize))
    moving = lengths(norm, gradient) > 1e-6
    np.testing.assert_allclose(lengths(norm, step)[moving], step_size, rtol=1e-4)
    assert np.all(lengths(norm, step) <= step_size * (1 + 1e-4))
    assert np.all(step * gradient >= 0)


@pytest.mark.parametrize("resize", [resize, resize_as_official])
@pytest.mark.parametrize("norm", NORMS)
def test_without_a_gradient_nothing_moves(norm, resize):
    step = NORMS[norm].steepest_step(jnp.zeros(SHAPE), 0.1, resize)
    np.testing.assert_array_equal(step, np.zeros(SHAPE))


@pytest.mark.parametrize("norm", NORMS)
@given(gradient=points(1.0), delta=points(0.5), eps=EPS, seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_an_attack_step_stays_in_ball_and_image_range(norm, gradient, delta, eps, seed):
    images = np.random.default_rng(seed).uniform(size=SHAPE).astype(np.float32)
    threat = Threat(norm, eps, eps / 3)
    moved = ascend(jnp.asarray(delta), jnp.asarray(gradient), jnp.asarray(images), threat)
    assert np.all(lengths(norm, moved) <= eps * (1 + 1e-5))
    assert np.min(images + moved) >= -1e-6
    assert np.max(images + moved) <= 1 + 1e-6


def test_into_image_range_keeps_what_is_already_there():
    images = jnp.array([[[[0.1], [0.9], [0.5]]]])
    delta = jnp.array([[[[-0.3], [0.3], [0.25]]]])
    moved = into_image_range(delta, images)
    np.testing.assert_allclose(moved[0, 0, :, 0], [-0.1, 0.1, 0.25], rtol=1e-6)


def test_a_threat_reads_the_configuration_and_scales():
    threat = Threat.of(default.get_config().threat)
    assert threat == Threat("linf", 8 / 255, 2 / 255, 10)
    assert threat.scaled(0.5) == Threat("linf", 4 / 255, 1 / 255, 10)


def test_a_step_is_a_quarter_of_eps_unless_it_is_given():
    assert Threat() == Threat("linf", 8 / 255, 2 / 255, 10)
    assert Threat("l2", eps=0.8).step_size == 0.2
    assert Threat(eps=0.8, step_size=0.1).step_size == 0.1
    eps = jnp.array([0.1, 0.2])
    np.testing.assert_array_equal(Threat(eps=eps).step_size, eps / 4)
    step_size = jax.jit(lambda eps: Threat("l1", eps).step_size)(2.0)
    assert step_size == 0.5


def test_a_threat_is_a_tree_of_its_two_sizes():
    threat = Threat("l2", 0.5, steps=3)
    assert jax.tree.leaves(threat) == [0.5, 0.125]
    paths, structure = jax.tree_util.tree_flatten_with_path(threat)
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".eps", ".step_size"]
    assert structure == jax.tree.structure(Threat("l2", 0.8, 0.1, 3))
    assert structure != jax.tree.structure(Threat("l2", 0.8, 0.1, 4))
    for marker in (None, object(), "text"):
        marked = jax.tree.map(lambda _, marker=marker: marker, threat)
        assert (marked.norm, marked.steps) == ("l2", 3)
        assert marked.eps is marked.step_size is marker
    assert jax.jit(lambda t: t.scaled(2.0))(threat) == threat.scaled(2.0)
    many = jax.vmap(lambda eps: Threat("l2", eps))(jnp.array([0.4, 0.8]))
    np.testing.assert_allclose(many.step_size, [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda t: t.eps)(many), [0.4, 0.8])


@pytest.mark.parametrize("norm", NORMS)
@given(eps=EPS, seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_what_is_in_the_ball_stays_and_the_rest_is_projected(norm, eps, seed):
    threat = Threat(norm, eps)
    start = random_start(jax.random.key(seed), SHAPE, threat)
    np.testing.assert_array_equal(into_ball(start, threat), start)
    moved = into_ball(100 * start, threat)
    np.testing.assert_array_equal(moved, NORMS[norm].project(100 * start, eps))
