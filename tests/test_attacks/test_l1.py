"""The attacks in l1 against the official code: recorded units (l1_units.npz), and counts."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_autoattack as reference
import runs

from vit_at.attacks import Threat, apgd_l1, autoattack, fab, losses, square
from vit_at.attacks.norms import NORMS, largest_size, sizes, sparse_sign

UNITS = reference.arrays("l1_units")
EPS = 2.0  # of the recorded runs


def network(points):
    """The recorded model: one hidden layer, on images of 6 x 6 x 3."""
    flat = points.reshape(len(points), -1) - 0.5
    return jnp.tanh(flat @ UNITS["w1"]) @ UNITS["w2"]


@pytest.mark.parametrize("eps", [0.5, 4, 12])
def test_projection_onto_the_ball_and_the_image_range(eps):
    images, delta = UNITS["proj_x"], UNITS["proj_y"]
    projected = NORMS["l1"].project_image(images + delta, images, eps)
    expected = images + delta + UNITS[f"proj_d_{eps}"]
    # The official sums are over sorted values in float32, ours over the values: both round.
    np.testing.assert_allclose(projected, expected, rtol=0, atol=3e-5)
    moved = sizes(np.asarray(projected) - images, "l1")
    assert np.all(moved <= largest_size(eps, images[0].size, "l1"))


def test_projection_onto_a_hyperplane():
    units = reference.arrays("units")
    with jax.enable_x64(True):
        arguments = [jnp.asarray(units[f"proj_{n}"], jnp.float64) for n in "twb"]
        step = np.asarray(fab.project(*arguments, "l1"))
    theirs = UNITS["fab_l1_d"]
    # Where weights are equal the official step depends on the sort; its size does not.
    np.testing.assert_allclose(sizes(step, "l1"), sizes(theirs, "l1"), rtol=0, atol=1e-12)
    points, normal, offset = (np.asarray(a) for a in arguments)
    reached, reachable = np.sum(normal * (points + step), -1), units["proj_reachable"]
    np.testing.assert_allclose(reached[reachable], offset[reachable], atol=1e-6)
    assert np.all((points + step >= -1e-12) & (points + step <= 1 + 1e-12))


def test_the_values_that_move_are_those_of_the_largest_gradients():
    gradient = jnp.array([[[[3.0], [-2.0], [1.0], [-4.0], [0.0]]]])
    signs = sparse_sign(gradient, jnp.array([0.4]))
    np.testing.assert_array_equal(signs[0, 0, :, 0], [1, 0, 0, -1, 0])


@pytest.mark.parametrize(("iterations", "expected"), [(100, (30, 30, 40)), (20, (6, 6, 8))])
def test_phases(iterations, expected):
    schedule = apgd_l1.phases(iterations, several=True)
    assert tuple(p.iterations for p in schedule) == expected
    assert tuple(p.radius for p in schedule) == (3, 2, 1)
    for few in range(1, 8):
        lengths = [p.iterations for p in apgd_l1.phases(few, several=True)]
        assert sum(lengths) == few
        assert min(lengths) >= 0


@pytest.mark.parametrize(
    ("name", "iterations", "several"), [("phases", 20, 1), runs.slow("single", 50, 0)]
)
def test_apgd_evaluates_the_official_points(name, iterations, several):
    """Point by point over the first evaluations, and the best loss at the end."""
    images, labels = jnp.asarray(UNITS["apgd_x"]), jnp.asarray(UNITS["apgd_y"])
    threat = Threat("l1", EPS, steps=iterations)
    schedule = apgd_l1.phases(iterations, bool(several))

    def evaluate(points):
        return losses_of(points, labels)

    @jax.jit
    def run(state):
        def step(state, _):
            state, _ = apgd_l1.advance(evaluate, images, state, threat, schedule)
            return state, None

        return jax.lax.scan(step, state, length=len(UNITS[f"{name}_points"]))[0]

    final = run(apgd_l1.start(images, jnp.asarray(UNITS["apgd_t"]), threat, schedule))
    assert len(UNITS[f"{name}_points"]) == iterations + len(schedule)
    np.testing.assert_array_equal(final.robust, UNITS[f"{name}_acc"])
    np.testing.assert_allclose(final.best_loss, UNITS[f"{name}_best"], rtol=1e-3)
    visited = first_points(threat, schedule, evaluate, images, 12)
    theirs = UNITS[f"{name}_points"][:12]
    # A value that rounding moved by 1e-7 counts as changed in the official code: at the start of
    # a phase, rounding decides how many values move in some images.
    counts = [np.sum(points[0] != images, (1, 2, 3)) for points in (visited, theirs)]
    same = (counts[0] == counts[1]) | (not several)
    assert same.sum() >= 7
    np.testing.assert_allclose(visited[:, same], theirs[:, same], rtol=0, atol=2e-5)


def losses_of(points, labels):
    def total(points):
        logits = network(points)
        values = losses.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        return values.sum(), (values, losses.is_correct(logits, labels))

    gradient, (values, correct) = jax.grad(total, has_aux=True)(points)
    return values, gradient, correct


def first_points(threat, schedule, evaluate, images, count):
    """The evaluated points: ``state.point`` may be the best point again after a checkpoint."""

    def step(state, _):
        evaluated = []

        def recording(points):
            evaluated.append(points)
            return evaluate(points)

        state, _ = apgd_l1.advance(recording, images, state, threat, schedule)
        (points,) = evaluated
        return state, points

    # Outside of the program: the start rounds as the official one.
    start = apgd_l1.start(images, jnp.asarray(UNITS["apgd_t"]), threat, schedule)
    return np.asarray(jax.lax.scan(step, start, length=count)[1])


@pytest.mark.parametrize("size", [2, 3, 5, 6])
def test_pattern(size):
    np.testing.assert_allclose(square.pattern(size, "l1"), UNITS[f"eta_{size}"], atol=1e-6)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_square_evaluates_the_official_points(row):
    images, label = jnp.asarray(UNITS["apgd_x"][row : row + 1]), UNITS["apgd_y"][row : row + 1]
    uniforms, expected = UNITS[f"square_u_{row}"], UNITS[f"square_points_{row}"]
    threat, tiles = Threat("l1", EPS), 36

    @jax.jit
    def step(state, proposal):
        evaluated = []

        def margin_fn(points):
            evaluated.append(points[0])
            logits = network(points)
            wrong = losses.best_wrong_class(logits, label)
            return losses.pick(logits, label) - losses.pick(logits, wrong)

        state = square.advance(margin_fn, images, state, proposal[None], threat)
        (point,) = evaluated
        return state, point

    first = jnp.asarray(uniforms[: 4 * tiles].reshape(1, tiles, 4))
    state = square.start(images, first, threat)
    proposals = np.stack([np.zeros(8, np.float32), *uniforms[4 * tiles :].reshape(-1, 8)])
    _, visited = jax.lax.scan(step, state, proposals[: len(expected)])
    np.testing.assert_allclose(visited, expected, rtol=0, atol=1e-5)


@functools.cache
def problem(count):
    images, labels = reference.images()
    params = jax.tree.map(jax.device_put, reference.parameters())
    logits_fn = functools.partial(reference.apply(), params)
    return logits_fn, np.asarray(images)[:count], np.asarray(labels)[:count]


def agreement(attacks, count):
    """Our robust images after each attack, and the official ones: {attack: (bool, bool)}."""
    result = autoattack.run(*problem(count), norm="l1", eps=4, attacks=attacks)
    assert not result.failures
    theirs, pairs = reference.arrays("l1"), {}
    for name, robust in result.robust.items():
        key = "clean_correct" if name == "clean" else f"robust_after_{name.replace('-', '_')}"
        pairs[name] = (robust, theirs[key][:count])
    shown = {name: [int(a.sum()), int(b.sum())] for name, (a, b) in pairs.items()}
    print(json.dumps({"counts": shown, "seconds": result.seconds}))
    return pairs


@pytest.mark.slow
def test_apgd_ce_leaves_the_official_images():
    for ours, theirs in agreement(["apgd-ce"], 16).values():
        assert abs(int(ours.sum()) - int(theirs.sum())) <= 1


@pytest.mark.campaign
def test_cascade():
    for ours, theirs in agreement("standard", 96).values():
        assert abs(int(ours.sum()) - int(theirs.sum())) <= 1
        assert (ours != theirs).sum() <= 3
