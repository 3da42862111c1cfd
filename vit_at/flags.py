"""The flags of ``vit_at.main``: parsing whose mistakes end in one sentence."""

import re
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from vit_at.config import field_names, get
from vit_at.errors import UserError, nearest, one_sentence_errors

_OVERRIDE = re.compile(r"--?config\.([^=]+?)(?:=(.*))?$", re.DOTALL)
_FRACTION = re.compile(r"(--?config\.[^=]+=)(\d+\.?\d*)/(\d+\.?\d*)$")


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """For ``absl.app.run``: parses, or ends with status 2 and a sentence.

    A value may be a fraction, as in ``--config.threat.eps=8/255``.
    """
    with one_sentence_errors():
        return _parse([_decimal(argument) for argument in arguments])


def _decimal(argument: str) -> str:
    match = _FRACTION.match(argument)
    if not match or not float(match[3]):
        return argument
    return f"{match[1]}{float(match[2]) / float(match[3])!r}"


def _parse(arguments: list[str]) -> list[str]:
    overrides = [match for match in map(_OVERRIDE.match, arguments) if match]
    plain = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    # ml_collections takes the overrides from sys.argv. The first parse, without them, gives the
    # names that there are.
    sys.argv = plain
    rest = _sentences(plain, None)
    if len(rest) > 1:
        raise UserError(f"'{rest[1]}' is no flag; write --config.FIELD=VALUE to set a field")
    config = flags.FLAGS.config if flags.FLAGS["config"].present else None
    if config is None:
        raise UserError(
            "no recipe is given; add --config=FILE, such as --config=configs/digits_sgd.py"
        )
    fields = list(field_names(config))
    for match in overrides:
        if match[1] not in fields:
            raise UserError(
                f"config field '{match[1]}' is unknown; the nearest are {nearest(match[1], fields)}"
            )
    flags.FLAGS.unparse_flags()
    sys.argv = arguments
    return _sentences(arguments, config)


def _sentences(arguments: list[str], config: ConfigDict | None) -> list[str]:
    """``FLAGS(arguments)``, with its errors as sentences; config: where fields are looked up."""
    try:
        rest = flags.FLAGS(arguments)
        # A file that could not be read is reported only when the configuration is looked at.
        getattr(flags.FLAGS.config, "name", None)
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal_value(str(error), config)) from error
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; see --help for the flags there are") from error
    except Exception as error:  # a recipe is a program: it can raise anything
        name = re.search(r"--?config[= ]([^: ]*)", " ".join(arguments))
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"the recipe '{name and name[1]}' can't be loaded ({reason}); give a file such as "
            "configs/digits_sgd.py, and run the command where that lies"
        ) from error
    return rest


def _illegal_value(message: str, config: ConfigDict | None) -> str:
    match = re.match(r"flag --config\.([^=]+)=(.*?): ", message, re.DOTALL)
    if match and config is not None:
        field, value = match[1], match[2]
        current = get(config, field)
        kind = {"bool": "True or False", "int": "a whole number", "float": "a number"}.get(
            type(current).__name__, f"a {type(current).__name__}"
        )
        return f"{field} is '{value}'; it must be {kind}, such as the recipe's {current!r}"
    # A recipe that raised: ml_collections gives its whole traceback, whose last line says why.
    return message.strip().splitlines()[-1].removeprefix("ValueError: ")
