"""FAB against the official code: projections and traces; the exact distance on a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_autoattack as reference
import runs

from vit_at.attacks import fab

TRACES = reference.arrays("traces")
UNITS = reference.arrays("units")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection(norm, dtype, tolerance):
    with jax.enable_x64(True):
        arguments = [jnp.asarray(UNITS[f"proj_{n}"], dtype) for n in "twb"]
        step = np.asarray(fab.project(*arguments, norm))
    expected = UNITS[f"proj_{norm}_d_f{dtype[-2:]}"]
    np.testing.assert_allclose(step, expected, rtol=0, atol=tolerance)
    points, normal, offset = (np.asarray(a, np.float64) for a in arguments)
    reached = np.sum(normal * (points + step), -1)
    reachable = UNITS["proj_reachable"]
    np.testing.assert_allclose(reached[reachable], offset[reachable], atol=100 * tolerance)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_without_a_normal_does_not_move(norm):
    step = fab.project(jnp.full((2, 5), 0.5), jnp.zeros((2, 5)), jnp.array([1.0, -1.0]), norm)
    np.testing.assert_array_equal(step, 0)


def run_trace(norm, dtype, iterations, count):
    images, labels = (x[:count] for x in reference.traced(dtype))
    classify = reference.apply(dtype)

    @jax.jit
    def run(params, images):
        def logits_fn(x):
            return classify(params, x)

        targets = jnp.argsort(logits_fn(images))[:, -2]

        def step(state, _):
            state = fab.advance(
                lambda x: fab.towards_target(logits_fn, x, labels, targets),
                lambda x: jnp.argmax(logits_fn(x), -1) == labels,
                images,
                state,
                norm,
            )
            return state, (state.distance, state.point, state.is_adversarial)

        return jax.lax.scan(step, fab.start(images, images), length=iterations)[1]

    return [np.asarray(x) for x in run(reference.parameters(dtype), images)]


def check_trace(norm, iterations, count):
    with jax.enable_x64(True):
        distance, points, is_adversarial = run_trace(norm, "float64", iterations, count)
    key = f"fab_t_{reference.THEIR_NAME[norm]}_f64"
    rows = slice(iterations)
    np.testing.assert_allclose(
        distance, TRACES[f"{key}_best_dist"][rows, :count], rtol=0, atol=1e-6
    )
    assert np.mean(is_adversarial != TRACES[f"{key}_is_adv"][rows, :count]) < 1e-2
    for i in (1, 10):
        if i <= iterations:
            theirs = reference.nhwc(TRACES[f"{key}_x_it{i}"])
            np.testing.assert_allclose(points[i - 1][:8], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", runs.slow("l2")])
def test_trace(norm):
    check_trace(norm, 12, 8)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_whole_trace(norm):
    check_trace(norm, 100, 16)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [True, False])
def test_distance_of_a_linear_classifier(norm, targeted):
    """Away from 0 and 1 the distance to a boundary is |z_y - z_k| / dual norm of the weights."""
    key = jax.random.key(0)
    images = 0.4 + 0.2 * jax.random.uniform(key, (6, 4, 4, 3))
    kernel = jax.random.normal(jax.random.key(2), (48, 4))

    def logits_fn(x):
        return x.reshape(len(x), -1) @ kernel

    logits = logits_fn(images)
    labels, targets = jnp.argsort(logits)[:, -1], jnp.argsort(logits)[:, -2]
    order = 1 if norm == "linf" else 2
    gaps = logits.max(-1, keepdims=True) - logits
    across = np.linalg.norm(kernel[:, labels][:, :, None] - kernel[:, None], order, axis=0)
    with np.errstate(invalid="ignore"):
        distances = np.where(np.arange(4) == labels[:, None], np.inf, gaps / across)
    exact = np.take_along_axis(distances, np.asarray(targets)[:, None], 1)[:, 0]
    if not targeted:
        exact = distances.min(-1)

    def linearise(x):
        if targeted:
            return fab.towards_target(logits_fn, x, labels, targets)
        return fab.towards_nearest(logits_fn, x, labels, norm)

    def correct_at(x):
        return jnp.argmax(logits_fn(x), -1) == labels

    state = fab.start(images, images)
    for _ in range(30):
        state = jax.jit(fab.advance, static_argnums=(0, 1, 4))(
            linearise, correct_at, images, state, norm
        )
    assert np.all(state.distance <= exact * 1.02)
    if not targeted:
        assert np.all(state.distance >= exact * 0.9999)
    assert not np.any(correct_at(state.adversarial))
