"""Square against the official code: schedules, patterns, and traces from its recorded uniforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_autoattack as reference

from vit_at.attacks import square
from vit_at.attacks.losses import best_wrong_class, pick
from vit_at.attacks.threat import Threat

TRACES = reference.arrays("traces")
UNITS = reference.arrays("units")


def test_schedule():
    np.testing.assert_allclose(square.share(UNITS["square_it"]), UNITS["square_p"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sides(norm):
    sides = square.side(UNITS["square_it"], 32, 32, norm)
    np.testing.assert_array_equal(sides, UNITS[f"square_side_{norm}_32"])


@pytest.mark.parametrize("size", [3, 5, 6, 7, 9, 13, 15, 21, 29])
def test_pattern(size):
    np.testing.assert_allclose(square.pattern(size), UNITS[f"square_l2_eta_{size}"], atol=1e-6)


class Uniforms:
    """The recorded numbers, in the order in which they were drawn."""

    def __init__(self, norm):
        key = f"square_{reference.THEIR_NAME[norm]}"
        ends = np.cumsum(TRACES[f"{key}_uniform_sizes"])[:-1]
        self._draws = iter(np.split(TRACES[f"{key}_uniforms"], ends))
        self._norm = norm

    def take(self):
        return next(self._draws)

    def initial(self):
        if self._norm == "linf":
            return self.take().reshape(16, 3, 32).transpose(0, 2, 1)
        tiles = []
        for _ in range(25):
            coin, signs = self.take(), self.take().reshape(16, 3)
            tiles.append(np.concatenate([np.broadcast_to(coin, (16, 1)), signs], 1))
        return np.stack(tiles, 1)

    def proposal(self, active):
        """The same window for all images; signs in L2 are of the images still attacked."""
        if self._norm == "linf":
            row, column, signs = self.take(), self.take(), self.take()
            return np.broadcast_to(np.concatenate([row, column, signs]), (16, 5))
        window = np.concatenate([self.take() for _ in range(5)])
        out = np.zeros((16, 8), np.float32)
        out[:, :5] = window
        out[active, 5:] = self.take().reshape(-1, 3)
        return out


def choose(active, new, old):
    return np.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_trace(norm):
    key = f"square_{reference.THEIR_NAME[norm]}"
    images, labels = reference.traced("float32")
    options = Threat(norm, reference.EPS[norm])
    classify = reference.apply()

    @jax.jit
    def advance(params, state, uniforms):
        def margin_fn(x):
            logits = classify(params, x)
            return pick(logits, labels) - pick(logits, best_wrong_class(logits, labels))

        return square.advance(margin_fn, images, state, uniforms, options)

    params, uniforms = reference.parameters(), Uniforms(norm)
    state = square.start(images, jnp.asarray(uniforms.initial()), options)
    first = reference.nhwc(TRACES[f"{key}_x_first"])
    np.testing.assert_allclose(state.best, first, rtol=0, atol=1e-6)
    state = advance(params, state, jnp.zeros((16, 5 if norm == "linf" else 8)))
    counts, margins = TRACES[f"{key}_query_count"], TRACES[f"{key}_query_margin"]
    np.testing.assert_allclose(state.margin, margins[0], rtol=0, atol=1e-4)

    for query in range(1, len(counts)):
        active = np.asarray(state.margin > 0)
        assert active.sum() == counts[query]
        draws = jnp.asarray(uniforms.proposal(active))
        if query == 1:
            proposal = square.propose(images, state.best, jnp.zeros(16, int), draws, options)
            second = reference.nhwc(TRACES[f"{key}_x_second"])
            np.testing.assert_allclose(proposal[active], second, rtol=0, atol=2e-6)
        moved = advance(params, state, draws)
        state = jax.tree.map(functools.partial(choose, active), moved, state)
    np.testing.assert_array_equal(state.queries, TRACES[f"{key}_n_queries"])
    np.testing.assert_allclose(state.margin, TRACES[f"{key}_final_margin"], rtol=0, atol=2e-4)
    best = reference.nhwc(TRACES[f"{key}_x_best"])
    np.testing.assert_allclose(state.best, best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (24, 20, 3), (5, 7, 3)])
def test_stays_in_the_ball_and_the_image_range(norm, shape):
    images = jax.random.uniform(jax.random.key(0), (3, *shape))
    images = jnp.where(images < 0.2, 0.0, jnp.where(images > 0.8, 1.0, images))
    options = Threat(norm, 0.3)
    keys = jax.random.split(jax.random.key(1), 3)
    draws = jax.vmap(lambda k: square.draw_initial(k, shape, norm))(keys)
    state = square.start(images, draws, options)

    @jax.jit
    def advance(state, key):
        keys = jax.random.split(key, 3)
        draws = jax.vmap(lambda k: square.draw_proposal(k, shape, norm))(keys)
        return square.advance(
            lambda x: 1 + jnp.cos(9 * x).mean((1, 2, 3)), images, state, draws, options
        )

    for query in range(80):
        state = advance(state, jax.random.key(query))
        assert float(state.best.min()) >= 0
        assert float(state.best.max()) <= 1
        delta = jnp.abs(state.best - images)
        size = delta.max() if norm == "linf" else jnp.sqrt((delta**2).sum((1, 2, 3)).max())
        assert float(size) <= 0.3 + 1e-6
    assert np.all(state.queries == 80)
