"""Where reports and exports may be written: never over a file that is not their own."""

import os
import re

from etils import epath

from vit_at.errors import UserError
from vit_at.schema import is_regular, is_remote

# {suffix of a report: (what it is, a regular expression of its whole text)}
REPORTS = {
    ".html": ("page", r"<!doctype html>.*· vit_at</title>.*"),
    ".md": ("table", r"\| training \| seeds [^\n]*\n(\|[^\n]*\n)*"),
    ".json": ("study file", r'\{\s*"format": "vit_at study .*'),
}


def check_report(path: epath.Path) -> None:
    """Raises UserError if no report can be written to this path, or if it holds another file."""
    if path.suffix not in REPORTS:
        kinds = ", ".join(f"{suffix} (a {kind})" for suffix, (kind, _) in REPORTS.items())
        raise UserError(f"--out is {path}; its name must end in one of {kinds}")
    check_directory(path.parent, "--out")
    if not path.exists():
        return
    kind, pattern = REPORTS[path.suffix]
    text = path.read_bytes().decode(errors="replace") if is_regular(path) else "no file"
    if text and not re.fullmatch(pattern, text, re.DOTALL):
        raise UserError(
            f"--out is {path}, which exists and is no {kind} of vit_at; choose another name, or "
            "move it away"
        )


def check_directory(path: epath.Path, option: str) -> None:
    """Raises UserError if a local directory can't be created or written to; option: names it."""
    if is_remote(path):
        return
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is no directory; choose another {option}")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is not writable; choose another {option}")
