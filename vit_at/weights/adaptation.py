"""Adapts pre-trained weights to another patch size, resolution or window.

adapt_patches      a patch kernel, by summing cells
adapt_positions    a position embedding, by bilinear interpolation
adapt_bias_table   Swin's relative position bias, by leaving out the farthest offsets
adapt              applies the rule that fits an array's name

Arrays have timm's names and layouts. NumPy computes in float64 and rounds once. The first two rules
are those of Mo et al. 2022.
"""

import numpy as np


def adapt_patches(kernel: np.ndarray, size: int) -> np.ndarray:
    """A patch kernel [out, in, p, p] for patches of ``size`` pixels, a divisor of p.

    Cells of p / size pixels are summed, not averaged, so a patch that is enlarged to p pixels
    keeps its token.
    """
    out, channels, p, _ = kernel.shape
    cells = kernel.astype(np.float64).reshape(out, channels, size, p // size, size, p // size)
    return cells.sum(axis=(3, 5)).astype(kernel.dtype)


def _bilinear(old: int, new: int) -> np.ndarray:
    """Interpolation matrix [new, old] with half-pixel centres, without antialiasing."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, old - 1)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(new), high), at - low)
    return matrix


def adapt_positions(positions: np.ndarray, num_tokens: int, num_extra: int) -> np.ndarray:
    """A position embedding [1, extra + old, d] -> [1, extra + num_tokens, d] on square grids.

    The first ``num_extra`` entries (the class token's) are copied.
    """
    extra, grid = positions[0, :num_extra], positions[0, num_extra:].astype(np.float64)
    old, new = round(len(grid) ** 0.5), round(num_tokens**0.5)
    resize = _bilinear(old, new)
    grid = np.einsum("yi,xj,ijd->yxd", resize, resize, grid.reshape(old, old, -1), optimize=True)
    grid = grid.reshape(num_tokens, -1).astype(positions.dtype)
    return np.concatenate([extra, grid])[None]


def adapt_bias_table(table: np.ndarray, window: int) -> np.ndarray:
    """Swin's bias table [(2 w - 1)², heads] for a smaller window; keeps the inner offsets."""
    old = round(len(table) ** 0.5)
    new = 2 * window - 1
    margin = (old - new) // 2
    inner = slice(margin, margin + new)
    return table.reshape(old, old, -1)[inner, inner].reshape(new**2, -1)


def adapt(
    name: str, value: np.ndarray, shape: tuple[int, ...], num_tokens: int
) -> tuple[np.ndarray, str] | None:
    """The array ``name`` in another shape and a description; None if no rule applies.

    num_tokens: number of patches of the model, without a class token.
    """
    if value.ndim != len(shape) or value.size == 0:
        return None
    if name in ("patch_embed.proj.weight", "stem.0.weight"):
        old, new = value.shape[-1], shape[-1]
        if value.shape == (*shape[:2], old, old) and old % new == 0:
            return adapt_patches(value, new), f"{old}x{old} -> {new}x{new} pixels, cells summed"
    elif name == "pos_embed":
        extra = shape[1] - num_tokens
        old, new = round(max(value.shape[1] - extra, 0) ** 0.5), round(num_tokens**0.5)
        if old and value.shape == (1, extra + old**2, shape[2]):
            positions = adapt_positions(value, num_tokens, extra)
            return positions, f"{old}x{old} -> {new}x{new} patches, bilinear"
    elif name.endswith("relative_position_bias_table"):
        old, new = ((round(len(t) ** 0.5) + 1) // 2 for t in (value, np.empty(shape)))
        if value.shape == ((2 * old - 1) ** 2, shape[1]) and old > new:
            return adapt_bias_table(value, new), f"window {old} -> {new}, inner offsets"
    return None
