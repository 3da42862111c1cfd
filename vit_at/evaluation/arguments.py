"""The arguments of ``vit_at.evaluate``: whether they are right, and what they name.

checked         a decorator that checks types, choices and ranges
subject         the model that they name, with its data
make_writable   creates a directory of results
"""

import functools
import inspect
import numbers
import os
import tempfile
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vit_at.config import CHECKPOINTS
from vit_at.configs import default
from vit_at.errors import UserError, in_one_line
from vit_at.evaluation.functions import of_function
from vit_at.evaluation.subject import Subject, of_directory, of_file

_F = TypeVar("_F", bound=Callable[..., Any])
_PATH = ((str, os.PathLike), "the path of a directory")
_TYPES: dict[Any, tuple[Any, str]] = {
    str: (str, "a string"),
    int: (int, "a whole number"),
    float | None: ((int, float, types.NoneType), "a number"),
    float | Sequence[float] | None: (
        (int, float, list, types.NoneType),
        "a number, or a tuple of numbers",
    ),
    tuple[float, ...]: (list, "a tuple of numbers"),
}
_TAKERS = {  # the sources that take an option
    "checkpoint": ("WORKDIR",),
    "model": ("--weights",),
    "num_heads": ("--weights",),
    "mean": ("--weights",),
    "std": ("--weights",),
    "image_size": ("--weights", "--function"),
}
_MOST_RESTARTS = 1000  # their starts are in memory together


def checked(function: _F) -> _F:
    """The function with checks of types and choices, for calls from Python, and of ranges.

    It is given Python's numbers and lists for fractions and for those of NumPy and JAX.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def with_checks(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = {name: _as_python(value) for name, value in bound.arguments.items()}
        _check(given, signature)
        return function(**given)

    return with_checks  # type: ignore[return-value]


def _as_python(value: Any) -> Any:
    """A number or array as a float, an integer or a list; anything else as it is."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_as_python(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, int):
        return float(value)
    return value


def _check(given: dict[str, Any], signature: inspect.Signature) -> None:
    for name, parameter in signature.parameters.items():
        kind, words = _TYPES.get(parameter.annotation, _PATH)
        values = given[name] if isinstance(given[name], list) else [given[name]]
        fits = isinstance(given[name], kind) and not any(isinstance(v, bool) for v in values)
        if isinstance(given[name], list):
            fits = fits and all(isinstance(v, (int, float)) for v in values)
        if not fits:
            raise UserError(f"{name} is {given[name]!r}; it must be {words}")
    if given["checkpoint"] not in ("", *CHECKPOINTS):
        choices = ", ".join(CHECKPOINTS)
        raise UserError(f"checkpoint is '{given['checkpoint']}'; it must be {choices}")
    for name in ("num_heads", "image_size"):
        if given[name] < 0:
            raise UserError(f"--{name} is {given[name]}; it must be 1 or more, or be left out")
    restarts, seed = given["restarts"], given["seed"]
    if restarts < 1:
        raise UserError(f"--restarts is {restarts}; it must be 1 or more")
    if restarts > _MOST_RESTARTS:
        raise UserError(f"--restarts is {restarts}; it must be at most {_MOST_RESTARTS}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; it must be from 0 to {2**32 - 1}")


def subject(given: dict[str, Any]) -> Subject:
    """What the arguments name, with the data that they name."""
    _check_sources(given)
    if not (given["weights"] or given["function"]):
        of_others = bool(given["from_runs"])
        found = of_directory(given["source"], given["checkpoint"], of_others=of_others)
        _set_data(found.config, given)
        return found
    config = default.get_config().unlock()
    _set_data(config, given)
    if given["function"]:
        return of_function(given["function"], config, given["image_size"])
    options = {name: given[name] for name in ("num_heads", "image_size", "mean", "std")}
    return of_file(given["weights"], given["model"], config, **options)


def _check_sources(given: dict[str, Any]) -> None:
    """Checks that there is one source, and only options that it takes."""
    sources = {"WORKDIR": given["source"]} | {f"--{n}": given[n] for n in ("weights", "function")}
    present = [name for name, value in sources.items() if value]
    if len(present) > 1:
        raise UserError(f"{' and '.join(present)} are both given; choose one of them")
    if not present:
        raise UserError(
            "one source is required: WORKDIR, --weights=FILE with --model=NAME, or "
            "--function=MODULE:NAME"
        )
    for option, takers in _TAKERS.items():
        if option == "checkpoint" and given["from_runs"]:  # that of the other models
            continue
        if given[option] and present[0] not in takers:
            raise UserError(
                f"--{option} is given, but only {' and '.join(takers)} "
                f"take{'s' if len(takers) == 1 else ''} it; leave it out"
            )
    if given["weights"] and not given["model"]:
        raise UserError(
            "--weights needs --model=NAME, timm's name of the architecture, such as "
            "--model=deit_small_patch16_224; 'vit-at models' lists them"
        )


def _set_data(config: ConfigDict, given: dict[str, Any]) -> None:
    """Changes the data to those that are asked for; of other data, the whole split is used."""
    whole = config.data.test_split.partition("[")[0] if given["data"] else ""
    fields = {
        "name": given["data"],
        "dir": given["data_dir"],
        "transform": given["transform"],
        "test_split": given["split"] or whole,
    }
    config.data.update({field: value for field, value in fields.items() if value})


def make_writable(directory: epath.PathLike, option: str) -> None:
    """Creates a directory, unless it is there; UserError if no file can be written to it.

    option: the one that names it.
    """
    try:
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        if os.path.isdir(directory) and jax.process_index() == 0:  # it is local
            with tempfile.TemporaryFile(dir=directory):
                pass
    except OSError as error:
        raise UserError(
            f"no file can be written to {directory} ({error.strerror or in_one_line(error)}); "
            f"choose another {option}"
        ) from error
