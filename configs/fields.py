"""The fields of a configuration: what they mean, and ``--config.FIELD=VALUE``.

meanings   of each field, from the comments in ``default.py``
describe   the fields of a recipe as text, for ``vit-at train RECIPE --help``
override   a configuration with values from the command line
"""

import ast
import contextlib
import functools
import inspect
import io
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_at.config import flatten, fraction
from vit_at.configs import default
from vit_at.errors import UserError, nearest

FLAG = "--config."  # what an override begins with


@functools.cache
def meanings() -> dict[str, str]:
    """{dotted field or group: its comment}, in the order of ``default.py``."""
    source = inspect.getsource(default)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    prefixes, found = {"config": ""}, {}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id=group), attr=name), *others]):
                found[prefixes[group] + name] = comments.get(node.lineno, "").lstrip("# ")
                prefixes |= {
                    o.id: f"{prefixes[group]}{name}." for o in others if isinstance(o, ast.Name)
                }
    return found


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """The configuration with the values of '--config.FIELD=VALUE'; numbers may be fractions.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    known = flatten(config)
    for argument in arguments:
        field = argument.removeprefix(FLAG).partition("=")[0]
        if field not in known:
            raise UserError(
                f"config field '{field}' is unknown; the nearest are {nearest(field, known)}"
            )
    words = ["vit-at", *(_decimal(argument, known) for argument in arguments)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    try:
        values(words)
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal_value(str(error), config)) from error
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; write --config.FIELD=VALUE") from error
    return values.config


def _decimal(argument: str, fields: Mapping[str, Any]) -> str:
    """'--config.threat.eps=8/255' -> '--config.threat.eps=0.0313...'; other fields as they are."""
    flag, _, value = argument.partition("=")
    if "/" in value and isinstance(fields[flag.removeprefix(FLAG)], float):
        with contextlib.suppress(ValueError):
            return f"{flag}={fraction(value)!r}"
    return argument


def _illegal_value(message: str, config: ConfigDict) -> str:
    """One sentence for the message of absl about a value that is of another type."""
    match = re.match(r"flag --config\.([^=]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message.strip().splitlines()[-1]
    field, value = match[1], match[2]
    current = flatten(config)[field]
    kind = {"bool": "True or False", "int": "a whole number", "float": "a number"}.get(
        type(current).__name__, f"a {type(current).__name__}"
    )
    return f"{field} is '{value}'; it must be {kind}, such as the recipe's {current!r}"


def describe(config: ConfigDict) -> str:
    """The help text: every field of a configuration with its value and meaning, one a line."""
    lines = ["fields (--config.FIELD=VALUE) with their values here:"]
    flat = flatten(config)
    for name, meaning in meanings().items():
        if name not in flat:
            lines.append(f"\n  {name}: {meaning}")
            continue
        value = flat[name]
        shown = f"{value:.4g}" if isinstance(value, float) else repr(value)
        lines.append(f"  {f'{name}={shown}':<42}  {meaning}")
    return "\n".join(lines)
