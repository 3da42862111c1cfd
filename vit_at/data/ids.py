"""Images chosen by name: a list such as RobustBench's 5 000 of ImageNet's validation set.

A list is a text file with one image a line, as CLASS/FILE, or a longer path that ends so:
``n09468604/ILSVRC2012_val_00015253.JPEG``. The name ``robustbench`` means the list in the installed
package robustbench. The images come in the list's order, so that the first 1 000 of them are
RobustBench's first 1 000.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_at.errors import UserError, in_one_line

ROBUSTBENCH = "robustbench"
_LIST = Path("helper_files") / "imagenet_test_image_ids.txt"  # in the package robustbench


class Ids(NamedTuple):
    """about: 'NAME SHA-256', for records; names: 'CLASS/FILE' in the list's order."""

    about: str
    names: tuple[str, ...]


def read(source: str) -> Ids:
    """Reads a list of images.

    Args:
      source: a file, or 'robustbench'.

    Raises:
      UserError: it can't be read, is empty, or has a line that is no CLASS/FILE or comes twice.
    """
    path = _installed_list() if source == ROBUSTBENCH else Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"--ids is '{source}', which is no file; give one, or {ROBUSTBENCH}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = in_one_line(error)
        raise UserError(f"--ids is '{source}', which can't be read ({reason})") from error
    names: dict[str, None] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        name = "/".join(line.split("/")[-2:])
        if line and not all(name.partition("/")):
            raise UserError(f"line {number} of {source} is '{line:.80}'; write it as CLASS/FILE")
        if name in names:
            raise UserError(f"line {number} of {source} names '{name}' again; remove it")
        if line:
            names[name] = None
    if not names:
        raise UserError(f"--ids is '{source}', which names no image; write one a line")
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return Ids(f"{ROBUSTBENCH if source == ROBUSTBENCH else path.name} {digest}", tuple(names))


def _installed_list() -> Path:
    """The list inside the package robustbench, which is not imported, as that needs torch."""
    spec = importlib.util.find_spec(ROBUSTBENCH)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"--ids is {ROBUSTBENCH}, but that package is not installed; run pip install "
            f"{ROBUSTBENCH}, or give its file {_LIST.name}"
        )
    return Path(spec.submodule_search_locations[0]) / _LIST


def rows_of(ids: Ids, names: Sequence[str], where: str) -> np.ndarray:
    """The positions in ``names`` of a list's images, in the list's order.

    Raises:
      UserError: some are not there; where: the data set and split, for the message.
    """
    place = {name: row for row, name in enumerate(names)}
    if missing := [name for name in ids.names if name not in place]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"--ids names {missing[0]}{more}, which {where} does not have; choose the split that "
            "has them, or correct the list"
        )
    return np.array([place[name] for name in ids.names], int)
