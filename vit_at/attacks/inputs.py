"""What every attack requires of its input and of the model; traced arrays are checked by shape
alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks.norms import NORMS
from vit_at.attacks.threat import Threat
from vit_at.errors import UserError, in_one_line

_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-6  # of an eps in float32


def as_array(name: str, values: Any) -> Any:
    """An array, or an object with ``shape`` and ``dtype``, as it is; lists as a NumPy array."""
    if hasattr(values, "shape"):
        return values
    try:
        return np.asarray(values)
    except Exception as error:  # NumPy and the values' own types raise many
        raise UserError(
            f"{name} can't be read as an array ({in_one_line(error, 200)}); give a NumPy or JAX "
            "array"
        ) from error


def check_threat(threat: Threat, count: int) -> None:
    """Checks eps, step size and steps, so far as they are not traced; count: values of an image.

    Raises:
      UserError: a size is not over 0, or larger than the image range lets any perturbation be; or
        steps is no positive integer.
    """
    largest = NORMS[threat.norm].diameter(count)
    for name, value in (("eps", threat.eps), ("step_size", threat.step_size)):
        if isinstance(value, jax.core.Tracer):
            continue
        values = np.asarray(value, float).reshape(-1)
        wrong = values[~((values > 0) & (values <= largest * (1 + _ROUNDING)))]
        if len(wrong):
            raise UserError(
                f"{name} is {wrong[0]:g}; it is in pixel units of images in [0, 1] and must be "
                f"over 0 and at most {largest:g}: 8/255, say, not 8"
            )
    steps = threat.steps
    if not isinstance(steps, jax.core.Tracer):
        check_count("steps", np.asarray(steps)[()] if isinstance(steps, jax.Array) else steps)


def check_count(name: str, value: Any) -> None:
    """Raises UserError for what is no integer, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be an integer, 1 or more")


def output_shape(logits_fn: Callable[..., Any], *arguments: Any) -> Any:
    """What the model gives, as shapes; UserError if JAX can't trace it."""
    try:
        return jax.eval_shape(logits_fn, *arguments)
    except UserError:
        raise
    except Exception as error:  # the model is a user's program
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise UserError(
            f"logits_fn can't be traced by JAX ({type(error).__name__}: {reason}); it must be "
            "a JAX function of images [b, H, W, C], not of NumPy or PyTorch arrays"
        ) from error


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
