"""What every attack requires of images and labels; traced arrays are checked by shape alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks.norms import NORMS
from vit_at.attacks.threat import Threat
from vit_at.errors import UserError

_CHANNELS = (1, 3, 4)


def check_threat(threat: Threat, count: int) -> None:
    """Checks eps and steps, so far as they are no traced arrays; count: values of an image.

    Raises:
      UserError: eps is 0, or larger than the image range lets any perturbation be.
    """
    largest = NORMS[threat.norm].diameter(count)
    if not isinstance(threat.eps, jax.Array) and not 0 < threat.eps <= largest:
        raise UserError(
            f"eps is {threat.eps:g}; it is in pixel units of images in [0, 1] and must be over 0 "
            f"and at most {largest:g}: 8/255, say, not 8"
        )
    if not isinstance(threat.steps, jax.Array) and threat.steps < 1:
        raise UserError(f"steps is {threat.steps}; it must be 1 or more")


def check_shapes(images: Any, labels: Any) -> None:
    """Checks images [N, H, W, C] and labels [N].

    images: an array, or an object with ``shape`` and ``dtype``.

    Raises:
      UserError: a shape or type is not allowed.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or not shape[0]:
        raise UserError(f"images have the shape {shape}; they must be [N, H, W, C], N > 0")
    if shape[3] not in _CHANNELS and shape[1] in _CHANNELS and shape[1] != shape[2]:
        raise UserError(
            f"images have the shape {shape}, which looks like [N, C, H, W]; they must be "
            "[N, H, W, C]: transpose them by (0, 2, 3, 1)"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):  # NumPy's does not know bfloat16
        raise UserError(f"images are {images.dtype}; divide them by 255 to bring them into [0, 1]")
    if tuple(labels.shape) != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels are {labels.dtype} of the shape {tuple(labels.shape)}; they must be one "
            f"integer for each of the {shape[0]} images"
        )


def check_range(images: Any) -> None:
    """Raises UserError for images outside [0, 1], NaN included."""
    if isinstance(images, jax.core.Tracer):
        return
    images = np.asarray(images)  # under jit, the minimum of a captured array is traced
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images range from {low:g} to {high:g}; they must be in [0, 1], with the "
            "normalisation inside logits_fn"
        )


def check_classes(labels: Any, num_classes: int) -> None:
    """Raises UserError for labels that are no classes of the model."""
    if isinstance(labels, jax.core.Tracer):
        return
    labels = np.asarray(labels)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"labels range from {low} to {high}, but the model has classes 0 to "
            f"{num_classes - 1}; give labels of these classes"
        )
