"""APGD and its losses against the official code: traces, schedules, loss values; exact cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_autoattack as reference
import runs

from vit_at.attacks import Threat, apgd, losses, norms

TRACES = reference.arrays("traces")
UNITS = reference.arrays("units")
# (norm, loss, iterations): agreement of best losses with the float64 trace, as its README gives it
CASES = {
    ("linf", "ce", 20): 1e-13,
    ("linf", "ce", 50): 1e-13,
    ("linf", "ce", 100): 1e-13,
    ("linf", "targeted dlr", 100): 1e-13,
    ("linf", "dlr", 100): 1e-9,
    ("l2", "ce", 100): 2e-6,
    ("l2", "targeted dlr", 100): 2e-6,
}
FEW = 24  # iterations of the quick tests: the first checkpoint of 100 iterations is after 22


@functools.partial(jax.jit, static_argnames=("loss", "norm", "iterations", "dtype", "rows"))
def trace(params, images, labels, targets, start, *, loss, norm, iterations, dtype, rows):
    """Losses, best losses, step sizes, still robust, all [rows, b]; previous points."""
    threat = Threat(norm, reference.EPS[norm], steps=iterations)
    classify = reference.apply(dtype)

    def evaluate(points):
        return apgd.loss_and_gradient(lambda x: classify(params, x), loss, points, labels, targets)

    def step(state, _):
        state, value = apgd.advance(evaluate, images, state, threat)
        return state, (value, state.best_loss, state.step_size, state.robust, state.previous)

    return jax.lax.scan(step, apgd.start_at(start, threat), length=rows)[1]


def run_case(norm, loss, iterations, dtype, rows, count=16):
    """Our trace of the first ``count`` images, and the official one, {name: [rows, count]}."""
    key = f"{reference.THEIR_NAME[norm]}_{loss.replace('targeted dlr', 'dlr_targeted')}"
    key = f"{key}_{iterations}"
    images, labels = (x[:count] for x in reference.traced(dtype))
    start = reference.nhwc(TRACES[f"start_{reference.THEIR_NAME[norm]}"]).astype(dtype)[:count]
    targets = jnp.asarray(TRACES.get(f"{key}_target", TRACES["sel"]), jnp.int32)[:count]
    static = {"loss": loss, "norm": norm, "iterations": iterations, "dtype": dtype, "rows": rows}
    ours = trace(reference.parameters(dtype), images, labels, targets, start, **static)
    prefix = f"{key}_f64_"
    theirs = {k.removeprefix(prefix): v for k, v in TRACES.items() if k.startswith(prefix)}
    for name in ("loss", "loss_best", "step", "acc"):
        theirs[name] = theirs[name][:rows, :count]
    return [np.asarray(x) for x in ours], theirs


def check_trace(norm, loss, iterations, rows, count=16):
    tolerance = CASES[norm, loss, iterations]
    with jax.enable_x64(True):
        ours, theirs = run_case(norm, loss, iterations, "float64", rows, count)
    value, best, step, robust, previous = ours
    np.testing.assert_allclose(best, theirs["loss_best"], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(robust, theirs["acc"])
    if norm == "linf":
        np.testing.assert_allclose(step, theirs["step"], rtol=1e-15)
        np.testing.assert_allclose(value, theirs["loss"], rtol=0, atol=1e-9)
    else:  # one halving may differ once the loss has converged to rounding
        assert (~np.isclose(step, theirs["step"])).any(0).sum() <= 1
    for i in (0, 1, 9):
        if f"x_it{i}" in theirs:
            points = reference.nhwc(theirs[f"x_it{i}"])
            np.testing.assert_allclose(previous[i + 2][:8], points, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [("linf", "ce", 20), ("l2", "targeted dlr", 100)], ids=str)
def test_trace(case):
    check_trace(*case, rows=min(FEW, 1 + case[2]), count=8)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_trace(case):
    """Untargeted DLR is chaotic once an image is misclassified: its first 20 rows."""
    check_trace(*case, rows=20 if case[1] == "dlr" else 1 + case[2])


@pytest.mark.slow
def test_float32_stays_near_float64():
    (_, best, _, robust, _), theirs = run_case("linf", "ce", 20, "float32", 21, 8)
    np.testing.assert_allclose(best, theirs["loss_best"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(robust, theirs["acc"])


@pytest.mark.parametrize("iterations", [10, 20, 50, 100, 200, 500, 1000])
def test_checkpoints(iterations):
    facts = reference.results()["units"]["apgd_checkpoints"][str(iterations)]
    first, decrement, shortest = apgd.periods(iterations)
    expected = (facts["first_period"], facts["period_decrement"], facts["min_period"])
    assert (first, decrement, shortest) == expected


@pytest.mark.parametrize(
    ("name", "arguments"), [("dlr", ("loss_y",)), ("dlr_targeted", ("loss_y", "loss_target"))]
)
def test_losses(name, arguments):
    function = {"dlr": losses.dlr, "dlr_targeted": losses.targeted_dlr}[name]
    classes = [jnp.asarray(UNITS[a]) for a in arguments]
    logits = jnp.asarray(UNITS["loss_logits"])
    np.testing.assert_allclose(function(logits, *classes), UNITS[f"loss_{name}"], rtol=2e-5)
    gradient = jax.grad(lambda z: function(z, *classes).sum())(logits)
    expected = UNITS[f"loss_{name}_grad"]
    np.testing.assert_allclose(gradient[4:], expected[4:], rtol=1e-4, atol=1e-5)  # 0-3: ties


def test_dlr_is_scale_invariant():
    logits, labels = jnp.asarray(UNITS["loss_logits"]), jnp.asarray(UNITS["loss_y"])
    np.testing.assert_allclose(
        losses.dlr(logits, labels), losses.dlr(1000 * logits, labels), rtol=1e-4
    )


def test_mean_gradient_over_samples():
    """Expectation over transformation: the gradient is the mean over the keys."""
    key = jax.random.key(0)
    kernel = jax.random.normal(key, (12, 5))
    points = jax.random.uniform(key, (3, 2, 2, 3))
    labels = jnp.array([0, 1, 2])
    keys = jax.random.split(key, 4)

    def noisy(x, key):
        return x.reshape(len(x), -1) @ (kernel + jax.random.normal(key, kernel.shape))

    _, gradient, _ = apgd.loss_and_gradient(noisy, "ce", points, labels, labels, keys)
    each = [
        apgd.loss_and_gradient(functools.partial(noisy, key=k), "ce", points, labels, labels)[1]
        for k in keys
    ]
    np.testing.assert_allclose(gradient, np.mean(each, 0), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_in_the_ball_and_the_image_range(norm):
    key = jax.random.key(1)
    images = jax.random.uniform(key, (8, 4, 4, 3))
    images = jnp.where(images < 0.2, 0.0, jnp.where(images > 0.8, 1.0, images))
    labels = jnp.arange(8) % 5
    kernel = jax.random.normal(key, (48, 5))
    threat = Threat(norm, 0.3, steps=20)

    def evaluate(points):
        return apgd.loss_and_gradient(
            lambda x: jnp.sin(3 * x).reshape(8, -1) @ kernel, "ce", points, labels, labels
        )

    keys = jax.random.split(key, 8)
    directions = norms.random_directions(keys, (4, 4, 3), norm)
    state = apgd.start(images, directions, threat)
    for _ in range(21):
        state, _ = jax.jit(apgd.advance, static_argnums=(0, 3))(evaluate, images, state, threat)
        assert float(state.point.min()) >= 0
        assert float(state.point.max()) <= 1
        assert float(norms.NORMS[norm].size(state.point - images).max()) <= 0.3 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [2, runs.slow(3), 10])
def test_the_attack_of_training_is_that_of_its_authors(norm, steps):
    """Singh et al. 2023, their code in float64 on a small network: the points of largest loss."""
    golden = reference.arrays("apgd_training")
    with jax.enable_x64(True):
        images, w1, w2 = (jnp.asarray(golden[name]) for name in ("x", "w1", "w2"))
        targets = jax.nn.one_hot(golden["y"], 4, dtype=images.dtype)

        def losses_at(images, attn_keep):
            logits = jnp.tanh(images.reshape(len(images), -1) @ w1) @ w2
            return losses.cross_entropy(logits, targets)

        threat = Threat(norm, {"linf": 0.1, "l2": 1.0}[norm], steps=steps)
        start = jnp.zeros_like(images)
        found = apgd.training_attack(losses_at, images, start, None, threat)
        np.testing.assert_allclose(found, golden[f"{norm}_{steps}"], atol=1e-9)
