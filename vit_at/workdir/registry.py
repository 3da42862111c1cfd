"""Models by name: those that come with the package, exports, work directories and hub repositories.

load    a model that is called on images
place   the directory that a name stands for
NAMES   the packaged models: exports in ``packaged/``, with what was measured on them
BEST    {name: the best of them that a recipe has given}

``vit-at models --robust`` lists them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vit_at import models
from vit_at.errors import UserError, nearest
from vit_at.weights import HUB_PREFIX
from vit_at.weights.files import fetch
from vit_at.workdir.checkpoint import Trained, load_trained
from vit_at.workdir.exported import load_exported, read_description
from vit_at.workdir.files import DESCRIPTION_FILE, is_export
from vit_at.workdir.results import read_records

PACKAGED = epath.Path(__file__).parent / "packaged"
NAMES = tuple(sorted(path.parent.name for path in PACKAGED.glob(f"*/{DESCRIPTION_FILE}")))
_ROUNDING = 1e-3
BEST = {"cifar10_small_at": "cifar10_convit_128x5_conv"}


class Loaded(functools.partial):
    """A model with its weights, called as ``logits = loaded(images)``.

    images [B, H, W, C] float32 in [0, 1]; logits [B, classes]. UserError: of another shape, type or
    range, the last outside of jit only. As a ``functools.partial`` of
    ``models.Classifier`` with the parameters it can be given to ``pgd_attack`` and
    ``autoattack.run``, which then take the parameters as arguments of compiled programs.

    Attributes:
      config: of its training.
      class_names: by label; () if they are not known.
      record: its results, as in ``results.json``: accuracy and protocol of each evaluation.
    """

    config: ConfigDict
    class_names: tuple[str, ...]
    record: list[dict[str, Any]]

    def __call__(self, images: Any) -> jax.Array:
        _check_images(images, self.model)
        return super().__call__(images)

    @property
    def model(self) -> Any:
        """The Flax module; its ``apply({"params": params}, images)`` takes normalised images."""
        return self.func.model

    @property
    def params(self) -> Any:
        """The parameters."""
        return self.args[0]

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<vit_at model {self.config.name}: {self.config.model.name}, {count:,} parameters>"


def _check_images(images: Any, model: Any) -> None:
    """UserError unless they are what a model takes; of traced images, the range is not known."""
    side, channels = model.image_size, model.in_channels
    shape, dtype = np.shape(images), jnp.result_type(images)
    if shape[1:] != (side, side, channels) or not shape[0]:
        raise UserError(
            f"images have the shape {shape}; the model takes [B, {side}, {side}, {channels}], B > 0"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"images are {dtype}; divide them by 255 to bring them into [0, 1]")
    if isinstance(images, jax.core.Tracer):
        return
    low, high = float(jnp.min(images)), float(jnp.max(images))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # of resizing; NaN is neither
        raise UserError(
            f"images range from {low:g} to {high:g}; they must be in [0, 1]: the model normalises "
            "them itself"
        )


def place(source: str | epath.PathLike) -> epath.Path:
    """The directory of a model: a path itself, a packaged model's, or a copy from the hub.

    Args:
      source: a directory, one of NAMES or BEST, or hf:OWNER/NAME[@REVISION] of an uploaded export.
        A directory takes precedence over a packaged model of the same name.

    Raises:
      UserError: there is nothing of this name.
    """
    text = str(source)
    if text.startswith(HUB_PREFIX):
        name = text.removeprefix(HUB_PREFIX)
        fetch(name)
        return epath.Path(fetch(name, DESCRIPTION_FILE).parent)
    path = epath.Path(source).expanduser()
    if path.exists():
        return path
    name = BEST.get(text, text)
    if name in NAMES:
        return PACKAGED / name
    raise UserError(
        f"there is no work directory or export {text[:80]!r}, and no packaged model of this name; "
        f"the nearest are {nearest(text, [*NAMES, *BEST])} ('vit-at models --robust' lists them)"
    )


def read(directory: epath.Path, checkpoint: str = "") -> Trained:
    """The weights of an export or a work directory; checkpoint: see ``load_trained``.

    Raises:
      UserError: the directory is neither, or damaged, or an export, which has no other checkpoint.
    """
    if is_export(directory):
        if checkpoint:
            raise UserError(
                f"{directory} is an export, which holds one checkpoint; leave '{checkpoint}' out"
            )
        return load_exported(directory)
    return load_trained(directory, checkpoint)


def records_of(directory: epath.Path) -> list[dict[str, Any]]:
    """What was measured on the model of an export, when it was exported, or of a work directory."""
    if is_export(directory):
        return read_description(directory).get("results", [])
    return read_records(directory)


def load(source: str | epath.PathLike, checkpoint: str = "") -> Loaded:
    """A trained model that is called on images in [0, 1].

    Args:
      source: one of NAMES or BEST, such as 'cifar10_small_at'; the path of an export or a work
        directory; or hf:OWNER/NAME of an uploaded export.
      checkpoint: 'best' or 'last' of a work directory; '': the one that its run tests.

    Raises:
      UserError: there is nothing of this name, or it is damaged.
    """
    directory = place(source)
    trained = read(directory, checkpoint)
    data = trained.config.data
    loaded = Loaded(models.classifier(trained.model, data.mean, data.std), trained.params)
    loaded.config = trained.config
    loaded.class_names = tuple(trained.values.get("class_names", ()))
    loaded.record = records_of(directory)
    return loaded
