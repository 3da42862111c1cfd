"""Ending a run between two steps when a signal asks for it."""

import os
import signal
import threading
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal asked the run to end; its state is saved."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.exit_status = 128 + signal_number


class Signals:
    """Remembers SIGTERM and SIGINT, so that the loop can end between two steps.

    With several processes, the one that receives a signal tells the others through JAX's preemption
    service, which listens to SIGTERM itself and chooses a step that none of them has passed.
    """

    def __enter__(self) -> "Signals":
        self.received: int | None = None
        self._several = jax.process_count() > 1
        numbers = {signal.SIGINT} if self._several else {signal.SIGTERM, signal.SIGINT}
        if threading.current_thread() is not threading.main_thread():
            numbers = set()  # Python takes signals in the main thread only, which decides then
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def ending(self, step: int) -> bool:
        """Whether the run ends with this step, which every process asks once after every step.

        A signal that comes later, such as while the step is awaited or logged, ends the next one.
        """
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def _remember(self, number: int, frame: Any) -> None:
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.received is not None:  # the second signal ends the run at once
            raise KeyboardInterrupt
        self.received = number
        logging.info("signal %d: saving, then ending; once more ends at once", number)

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
