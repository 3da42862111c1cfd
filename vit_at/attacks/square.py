"""Square attack: random search with squares that shrink (Andriushchenko et al. 2020).

It needs logits only, so masked gradients do not stop it. A proposal changes one square of the best
point so far; it is kept if it lowers the margin z_y - max_{k != y} z_k.

``initial`` and ``propose`` are deterministic functions of uniform numbers in [0, 1), which
``draw_initial`` and ``draw_proposal`` draw for one image. The side of a square depends on the
iteration only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks.apgd import where
from vit_at.attacks.norms import NORMS, resize_as_official
from vit_at.attacks.threat import Threat

Array = jax.Array
_FIRST_SHARE = 0.8  # p_init: share of the image that the first squares cover
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_l2_size = NORMS["l2"].size
_FLOOR = 1e-12


class State(NamedTuple):
    """One batch of runs.

    best: the point of the lowest margin, [b, H, W, C]; margin: [b]; queries: model evaluations so
    far, [b].
    """

    best: Array
    margin: Array
    queries: Array


def start(images: Array, uniforms: Array, threat: Threat) -> State:
    """Starts runs at ``initial``."""
    b = images.shape[0]
    return State(
        best=initial(images, uniforms, threat),
        margin=jnp.full(b, jnp.inf, images.dtype),
        queries=jnp.zeros(b, jnp.int32),
    )


def advance(
    margin_fn: Callable[[Array], Array],
    images: Array,
    state: State,
    uniforms: Array,
    threat: Threat,
) -> State:
    """One query: of a proposal, or of the start in the first call.

    margin_fn: points -> z_y - max_{k != y} z_k [b]; uniforms: of ``draw_proposal``, [b, n].
    """
    iteration = jnp.maximum(state.queries - 1, 0)
    proposal = propose(images, state.best, iteration, uniforms, threat)
    proposal = where(state.queries == 0, state.best, proposal)
    margin = margin_fn(proposal)
    better = margin < state.margin
    return State(
        best=where(better, proposal, state.best),
        margin=jnp.where(better, margin, state.margin),
        queries=state.queries + 1,
    )


def share(iteration: np.ndarray) -> np.ndarray:
    """The share p of the image that a square covers; halved after 10, 50, 200, ... iterations."""
    return _FIRST_SHARE / 2.0 ** np.searchsorted(_HALVED_AFTER, iteration)


def side(iteration: np.ndarray, height: int, width: int, norm: str) -> np.ndarray:
    """The side of the square in pixels."""
    sides = np.round(np.sqrt(share(iteration) * height * width)).astype(int)
    if norm == "linf":
        sides = np.maximum(sides, 1)
    else:
        sides = np.maximum(sides, 3)
        sides += sides % 2 == 0
    return np.minimum(sides, min(height, width))


def _tiles(height: int, width: int) -> tuple[int, list[tuple[int, int]]]:
    """The side and the corners of the start's tiles in l2 and l1: 5 x 5 on a square image."""
    tile = max(height // 5, 1)
    first = (height - 5 * tile) // 2 if height >= 5 else 0
    rows = range(first, height - tile + 1, tile)[: height // tile]
    columns = range(first, width - tile + 1, tile)[: width // tile]
    return tile, [(row, column) for row in rows for column in columns]


def draw_initial(key: Array, shape: tuple[int, ...], norm: str) -> Array:
    """One image's uniforms for ``initial``: [W, C] in linf, else [tiles, 1 + C]."""
    height, width, channels = shape
    if norm == "linf":
        return jax.random.uniform(key, (width, channels))
    return jax.random.uniform(key, (len(_tiles(height, width)[1]), 1 + channels))


def draw_proposal(key: Array, shape: tuple[int, ...], norm: str) -> Array:
    """One image's uniforms for ``propose``: row, column, [row 2, column 2, coin,] channel signs."""
    return jax.random.uniform(key, ((2 if norm == "linf" else 5) + shape[-1],))


def initial(images: Array, uniforms: Array, threat: Threat) -> Array:
    """The start: vertical stripes in linf, else tiles of ``pattern`` with random signs."""
    if threat.norm == "linf":
        return jnp.clip(images + threat.eps * _signs(uniforms)[:, None], 0, 1)
    delta = jnp.zeros_like(images)
    tile, corners = _tiles(*images.shape[1:3])
    shape = jnp.asarray(pattern(tile, threat.norm), images.dtype)
    for number, (row, column) in enumerate(corners):
        coin, signs = uniforms[:, number, 0], _signs(uniforms[:, number, 1:])
        turned = jnp.where((coin > 0.5)[:, None, None], shape.T, shape)
        patch = turned[..., None] * signs[:, None, None]
        delta = delta.at[:, row : row + tile, column : column + tile].add(patch)
    return jnp.clip(_fit(images, delta, threat), 0, 1)


def _fit(images: Array, delta: Array, threat: Threat) -> Array:
    """images + delta with delta brought to the size eps in l2, and projected in l1."""
    if threat.norm == "l1":
        inner = threat.eps * (1 - 1e-6)  # as in the official code: rounding stays in the ball
        return NORMS["l1"].project_image(images + delta, images, inner)
    return images + resize_as_official(delta, _l2_size(delta), threat.eps)


def propose(images: Array, best: Array, iteration: Array, uniforms: Array, threat: Threat) -> Array:
    """The next point to evaluate, [b, H, W, C]; iteration: proposals before this one, [b]."""
    first_iterations = np.array([0, *(i + 1 for i in _HALVED_AFTER)])  # of each level
    sides = side(first_iterations, *images.shape[1:3], threat.norm)
    level = jnp.sum(iteration[:, None] > jnp.array(_HALVED_AFTER), -1)
    move = _propose_linf if threat.norm == "linf" else _propose_moved
    return jnp.clip(move(images, best, level, sides, uniforms, threat), 0, 1)


def _propose_linf(images, best, level, sides, uniforms, threat):
    """The square's pixels of each channel move by +-2 eps, within the ball."""
    inside, _, _ = _window(uniforms[:, 0], uniforms[:, 1], jnp.asarray(sides)[level], images.shape)
    moved = best + _inside(inside, 2 * threat.eps * _signs(uniforms[:, 2:])[:, None, None])
    return NORMS["linf"].project_image(moved, images, threat.eps)


def _propose_moved(images, best, level, sides, uniforms, threat):
    """The perturbation of a second square moves to the first, in the shape of ``pattern``."""
    size, channels = jnp.asarray(sides)[level], images.shape[-1]
    first, rows, columns = _window(uniforms[:, 0], uniforms[:, 1], size, images.shape)
    second, _, _ = _window(uniforms[:, 2], uniforms[:, 3], size, images.shape)
    turn, signs = uniforms[:, 4] > 0.5, _signs(uniforms[:, 5:])
    shape = _place(sides, level, rows, columns, turn, threat.norm, images.dtype)

    delta, eps = best - images, threat.eps
    length = _window_l1 if threat.norm == "l1" else _window_l2
    within = length(_inside(first | second, delta))
    if threat.norm == "l1":
        unused = jnp.maximum(eps - NORMS["l1"].size(delta), 0)
        budget = (unused / channels + within) * channels
    else:
        unused = jnp.maximum(eps**2 - _l2_size(delta) ** 2, 0)
        budget = jnp.sqrt(unused / channels + within**2)
    old = _inside(first, delta)
    new = shape[..., None] * signs[:, None, None] + old / (_FLOOR + length(old))
    new = _inside(first, new)
    new = new / (_FLOOR + length(new)) * budget
    delta = jnp.where(first[..., None], new, _inside(~second, delta))
    return _fit(images, delta, threat)


def _window(u_row: Array, u_column: Array, size: Array, shape: tuple[int, ...]):
    """A square's pixels [b, H, W] bool; each row's and column's index in it, [b, H] and [b, W]."""
    _, height, width, _ = shape

    def places(u, extent):
        first = jnp.floor(u * (extent - size)).astype(jnp.int32)
        return jnp.arange(extent) - first[:, None]

    rows, columns = places(u_row, height), places(u_column, width)
    in_rows = (rows >= 0) & (rows < size[:, None])
    in_columns = (columns >= 0) & (columns < size[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :], rows, columns


def _place(sides, level, rows, columns, turn, norm, dtype):
    """``pattern`` at each image's square, transposed where ``turn``: [b, H, W]."""
    largest = max(sides)
    table = np.zeros((len(sides), largest, largest))
    for row, size in enumerate(sides):
        table[row, :size, :size] = pattern(size, norm)
    rows, columns = rows[:, :, None], columns[:, None, :]
    turn = turn[:, None, None]
    i, j = jnp.where(turn, columns, rows), jnp.where(turn, rows, columns)
    i, j = jnp.clip(i, 0, largest - 1), jnp.clip(j, 0, largest - 1)
    return jnp.asarray(table, dtype)[level[:, None, None], i, j]


def pattern(size: int, norm: str = "l2") -> np.ndarray:
    """eta of section 3.4: two pyramids of opposite sign, one above the other; norm 1, [s, s]."""
    top = size // 2
    whole = np.concatenate([_pyramid(top, size, norm), -_pyramid(size - top, size, norm)])
    return whole / _length(whole, norm)


def _length(x: np.ndarray, norm: str) -> float:
    return np.sum(np.abs(x)) if norm == "l1" else np.sqrt(np.sum(x**2))


def _pyramid(rows: int, columns: int, norm: str) -> np.ndarray:
    """Nested centred rectangles, the n-th adding 1 / n^2 in l2 and 1 / n^4 in l1."""
    power = 4 if norm == "l1" else 2
    out = np.zeros((rows, columns))
    top, left = rows // 2, columns // 2
    for n in range(max(top, left) + 1):
        out[max(top - n, 0) : top + n + 1, max(left - n, 0) : left + n + 1] += 1 / (n + 1) ** power
    return out / max(_length(out, norm), _FLOOR)


def _signs(uniforms: Array) -> Array:
    """U[0, 1) -> -1 or 1."""
    return jnp.sign(2 * uniforms - 1)


def _inside(mask: Array, values: Array) -> Array:
    """values, of a shape that broadcasts to [b, H, W, C], inside mask [b, H, W]; 0 outside."""
    return jnp.where(mask[..., None], values, 0)


def _window_l2(x: Array) -> Array:
    """The l2 norm of every channel, [b, 1, 1, C]."""
    return jnp.sqrt(jnp.sum(x**2, (1, 2), keepdims=True))


def _window_l1(x: Array) -> Array:
    """The l1 norm of every channel, [b, 1, 1, C]."""
    return jnp.sum(jnp.abs(x), (1, 2), keepdims=True)
