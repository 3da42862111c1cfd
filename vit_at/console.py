"""What a command prints on the terminal: messages, a progress bar, numbers in words."""

import functools
import logging as standard_logging
import math
import os
import sys
import time
from collections.abc import Callable

import jax
from absl import flags, logging
from tqdm import tqdm

_PACKAGE = os.path.join(os.path.dirname(__file__), "")


class _Plain(standard_logging.Formatter):
    """Log messages without time stamps and file names."""

    def format(self, record: standard_logging.LogRecord) -> str:
        prefix = "" if record.levelno <= standard_logging.INFO else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()


def quiet_logging() -> None:
    """Shows our own messages, and other libraries' from warnings up."""
    if not flags.FLAGS.is_parsed():  # argparse parses; absl would warn
        flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(_Plain())
    handler.addFilter(_ours)


def _ours(record: standard_logging.LogRecord) -> bool:
    """Whether to show a record: not Orbax's, whose errors are raised too and then printed once."""
    if "orbax" in record.pathname:
        return False
    # Not merely 'vit_at' in it: a virtual environment often lies inside of a checkout of that name.
    return record.pathname.startswith(_PACKAGE) or record.levelno > standard_logging.INFO


class Progress:
    """A tqdm bar on a terminal; elsewhere, a line every ``every_seconds``.

    The time left follows from the pace since the first update with a text, so compilation and
    other preparations before it do not count.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        unit: str = "it",
        every_seconds: float = 30.0,
        *,
        at_most: bool = False,
        enabled: bool = True,
        write: Callable[[str], None] | None = None,
    ):
        """at_most: the total is an upper bound, and so is the time left.

        write: gets the lines, on every process; default: standard error of process 0.
        """
        self._bar = None
        if write is None and enabled and jax.process_index() == 0:
            write = _to_stderr
            if sys.stderr.isatty():
                shown = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + unit + "{postfix}"
                options = {"dynamic_ncols": True, "leave": False, "bar_format": shown}
                self._bar = tqdm(total=total, initial=done, **options)
                write = functools.partial(tqdm.write, file=sys.stderr)
        self._write = write
        self._total, self._done, self._every_seconds = total, done, every_seconds
        self._at_most = "at most " if at_most else ""
        self._start: tuple[int, float] | None = None  # done, and when: the pace counts from here
        self._last_line = time.monotonic()

    def update(self, text: str = "", *, done: int | None = None, total: int | None = None) -> None:
        """One more is done, or ``done`` of ``total``; an empty text leaves the line as it is."""
        self._done = self._done + 1 if done is None else done
        self._total = self._total if total is None else total
        if self._write is None:
            return
        left = self._left() if text else ""
        if self._bar is not None:
            self._bar.total = self._total
            if text:
                self._bar.set_postfix_str(f"{text}{left}", refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif text and time.monotonic() - self._last_line >= self._every_seconds:
            self._last_line = time.monotonic()
            self.say(f"{self._done}/{self._total}  {text}{left}")

    def _left(self) -> str:
        """The time left as text; empty while the pace is unknown."""
        now = time.monotonic()
        if self._start is None:
            self._start = (self._done, now)
        first, since = self._start
        if self._done <= first:
            return ""
        seconds = (now - since) / (self._done - first) * (self._total - self._done)
        return f"  {self._at_most}{duration(seconds)} left"

    def discount(self, seconds: float) -> None:
        """Takes seconds out of the pace, such as those of a program that compiles once."""
        if self._start is not None:
            first, since = self._start
            self._start = (first, since + seconds)

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._write is not None:
            self._write(line)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """3725 -> '1 h 02 min'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def with_prefix(value: float) -> str:
    """2.08e9 -> '2.08 G'."""
    power = min(int(math.log10(max(value, 1.0)) // 3), 7)
    return f"{value / 1000**power:.3g} {' kMGTPEZ'[power].strip()}"
