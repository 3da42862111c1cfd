"""The recipes, by name or by file.

    load("digits_sgd:ard_prm")      # an installed recipe with variants -> its configuration
    load("mine.py:smoke")           # likewise from a file

names     of the installed recipes: 'digits_sgd', ..., 'study/masking', ...
find      the module of a recipe
fields    what the fields mean, and ``--config.FIELD=VALUE``
"""

import importlib
import importlib.machinery
import pathlib
import types

from ml_collections import ConfigDict

from vit_at.config import flatten
from vit_at.configs import default
from vit_at.errors import UserError, nearest

_FOLDER = pathlib.Path(__file__).parent
_NO_RECIPES = frozenset({"__init__", "base", "common", "default", "fields"})


def names() -> list[str]:
    """The names of the installed recipes, those of the study last."""
    paths = [*sorted(_FOLDER.glob("*.py")), *sorted(_FOLDER.glob("study/*.py"))]
    return [
        path.relative_to(_FOLDER).with_suffix("").as_posix()
        for path in paths
        if path.stem not in _NO_RECIPES
    ]


def load(recipe: str) -> ConfigDict:
    """The configuration of 'NAME', 'FILE.py', or one of these with ':VARIANT,...'.

    Raises:
      UserError: no such recipe or variant, an error inside the recipe, or a field that it lacks.
    """
    source, _, variants = recipe.partition(":")
    module = find(source)
    try:
        config = module.get_config(variants) if variants else module.get_config()
    except UserError:
        raise
    except Exception as error:  # a recipe is a program: it can raise anything
        raise UserError(
            f"the recipe '{recipe}' can't be loaded ({_last_line(error)}); correct its get_config"
        ) from error
    given = set(flatten(config)) if isinstance(config, ConfigDict) else set()
    if missing := set(flatten(default.get_config())) - given:
        raise UserError(
            f"the recipe '{recipe}' gives no value for {', '.join(sorted(missing)[:3])}; its "
            "get_config must change and return vit_at.configs.default.get_config()"
        )
    return config


def find(source: str) -> types.ModuleType:
    """The module of an installed recipe, or of a file that ends with '.py'.

    Raises:
      UserError: there is no such recipe, or it raises an error.
    """
    if source in names():
        return importlib.import_module(f"{__name__}.{source.replace('/', '.')}")
    path = pathlib.Path(source)
    near = nearest(path.stem if path.suffix == ".py" else source, names())
    if path.suffix != ".py":
        raise UserError(
            f"the recipe '{source}' is unknown; the nearest are {near}, 'vit-at recipes' lists "
            "all, and a recipe of your own is a file that ends with .py"
        )
    if not path.is_file():
        raise UserError(
            f"the recipe '{source}' can't be loaded (there is no such file); give a file that "
            f"exists, or an installed recipe by name: the nearest are {near}, and 'vit-at recipes' "
            "lists all"
        )
    try:
        module = types.ModuleType("recipe")
        module.__file__ = source
        importlib.machinery.SourceFileLoader("recipe", source).exec_module(module)
    except Exception as error:  # a recipe is a program: it can raise anything
        raise UserError(
            f"the recipe '{source}' can't be loaded ({_last_line(error)}); correct that file"
        ) from error
    if not hasattr(module, "get_config"):
        raise UserError(
            f"the recipe '{source}' can't be loaded (it has no get_config); add the function "
            "get_config(variants='') that returns a configuration"
        )
    return module


def _last_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[-1].strip()
