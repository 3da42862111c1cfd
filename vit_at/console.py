"""What a command prints on the terminal: messages, a progress bar, numbers in words."""

import logging as standard_logging
import math
import sys
import time

import jax
from absl import flags, logging
from tqdm import tqdm


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
    return "vit_at" in record.pathname or record.levelno > standard_logging.INFO


class Progress:
    """A tqdm bar on a terminal; elsewhere one line every ``every_seconds``."""

    def __init__(self, total: int, done: int, unit: str, every_seconds: float = 30.0):
        self._enabled = jax.process_index() == 0
        self._bar = None
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)
        self._total, self._first, self._done = total, done, done
        self._start = self._last_line = time.monotonic()
        self._every_seconds = every_seconds

    def update(self, text: str = "") -> None:
        """One more is done; ``text`` replaces what is shown beside the bar, unless it is empty."""
        self._done += 1
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if self._enabled and text and now - self._last_line >= self._every_seconds:
            self._last_line = now
            left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
            self.say(f"{self._done}/{self._total}  {text}  {duration(left)} left")

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            tqdm.write(line, file=sys.stderr)
        elif self._enabled:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.close()


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
