"""Several processes as one run: how they meet, decide alike, and notice that one has gone.

Every process runs the same program, and a computation over all devices waits for all of them; so
one that is missing, or has ended, would leave the others waiting. Therefore:

    start      finds the other processes (TPU pods, Slurm and Kubernetes are recognised by JAX;
               elsewhere by flags) and starts ``jax.distributed`` once all of them are there
    together   while a run lasts, each process holds a connection to process 0: it breaks as soon as
               a process dies, and carries the sentence of one that ends with an error; then all end
    agree      what follows from a clock or a disk is decided by process 0, and so alike everywhere

With one process all of this does nothing.
"""

import contextlib
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vit_at.distributed.rendezvous import Line, meet
from vit_at.errors import UserError

EXIT_LOST = 75  # another process is gone: to be started again (EX_TEMPFAIL of sysexits.h)
EXIT_FAILED, EXIT_MISTAKE = 1, 2
HEARTBEAT_SECONDS = 60  # after which JAX gives up a process that is silent but connected

_group: "Group | None" = None


def start(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, *, seconds: int = 300
) -> None:
    """Joins the other processes; to be called before anything of JAX is used.

    Args:
      coordinator: HOST:PORT of process 0. With num_processes and process_id, or none of the three:
        then JAX is asked what the machine says (TPU pod, Slurm, Kubernetes). num_processes=1 alone
        means one process whatever the machine says.
      seconds: how long to wait for the others.

    Raises:
      UserError: the flags don't fit, or not all processes were there in time; on every process.
    """
    global _group
    if num_processes == 1:
        return
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --num_processes and --process_id go together; give all three, or none "
            "on a TPU pod, Slurm or Kubernetes, or --num_processes=1 for one process"
        )
    local_device_ids: Sequence[int] | None = None
    if not any(given):
        coordinator, num_processes, process_id, local_device_ids = _announced(seconds)
        if num_processes <= 1:
            return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not process_id < num_processes:
        raise UserError(
            f"--coordinator is '{coordinator}' and --process_id {process_id} of {num_processes}; "
            "the first must be HOST:PORT, the second from 0 to one less than --num_processes"
        )
    begin = time.monotonic()
    lines = meet(host, int(port), num_processes, process_id, seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids,
        cluster_detection_method="deactivate",  # all has been found out
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    _group = Group(process_id, num_processes, lines)
    logging.info(
        "process %d of %d, joined in %.1f s", process_id, num_processes, time.monotonic() - begin
    )
    if jax.process_index():
        logging.set_verbosity(logging.ERROR)


def _announced(seconds: int) -> tuple[str, int, int, Sequence[int] | None]:
    """What the machine says of the run it belongs to: address, count, own number, devices."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
        )
    except Exception as error:  # a service that it asks can fail in any way
        raise UserError(
            f"this machine seems to belong to a cluster, but its description can't be used "
            f"({str(error).splitlines()[0]}); give --coordinator, --num_processes and "
            "--process_id, or --num_processes=1 for one process"
        ) from error
    address, count, process, devices = found
    return address or "", count or 1, process or 0, devices


# --- Being together ---------------------------------------------------------------------------


class Group:
    """The processes of a run; watches the connections to them on a thread."""

    def __init__(self, process: int, count: int, lines: list[Line]):
        self._process, self._count, self._lines = process, count, lines
        self._leaving = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for line in self._lines:
            selector.register(line, selectors.EVENT_READ, line)
        while selector.get_map():
            for key, _ in selector.select():
                message = key.data.receive(5)
                if message is None:
                    self.end(
                        EXIT_LOST,
                        f"process {key.data.process} of {self._count} has ended without a word; "
                        "start the same command again on all of them, it goes on from the last "
                        "checkpoint",
                    )
                elif "exit" in message:
                    self.end(message["exit"], message["text"])
                else:  # it has finished
                    selector.unregister(key.data)

    def end(self, status: int, text: str) -> NoReturn:
        """Ends this process at once, and tells the others to; text: what each of them says."""
        with self._leaving:  # the first reason is the one that counts
            for line in self._lines:
                line.send(exit=status, text=text)
            # In one piece, as the others write to the same terminal.
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()
            sys.stdout.flush()
            # Python's usual end would wait for the others.
            os._exit(status)

    def finish(self) -> None:
        """Ends well: once all processes are here."""
        jax.distributed.shutdown()
        for line in self._lines:
            line.send(done=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What ends a process inside ends all of them, with the same sentence and exit status."""
    if _group is None:
        before = signal.getsignal(signal.SIGTERM)
        end_on_sigterm()
        try:
            yield
        except Terminated as error:
            print(error, file=sys.stderr)
            sys.exit(error.status)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        return
    try:
        yield
    except UserError as error:
        _group.end(EXIT_MISTAKE, " ".join(str(error).splitlines()))
    except Terminated as error:
        _group.end(error.status, str(error))
    except KeyboardInterrupt:
        _group.end(128 + signal.SIGINT, "interrupted")
    except Exception as error:
        # Where another process is gone, the computation fails first: let the connection say who.
        time.sleep(2)
        reason = (str(error) or repr(error)).splitlines()[0][:300]
        logging.exception("process %d failed", jax.process_index())
        _group.end(EXIT_FAILED, f"process {jax.process_index()} failed ({reason})")
    else:
        _group.finish()


class Terminated(BaseException):
    """SIGTERM came where there is nothing to save; ``status`` is the exit status."""

    def __init__(self, number: int):
        super().__init__(f"ended by signal {number}; the same command goes on from what is stored")
        self.status = 128 + number


def end_on_sigterm() -> None:
    """From here on SIGTERM raises Terminated; only the main thread can have that."""

    def end(number: int, frame: Any) -> None:
        raise Terminated(number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def agree(value: bool) -> bool:
    """Process 0's value, on every process; all of them must call it."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def all_of(value: bool) -> bool:
    """Whether it is true on every process; all of them must call it."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def any_of(values: np.ndarray) -> np.ndarray:
    """Where [N] bool are true on any process; all of them must call it."""
    if jax.process_count() == 1:
        return values
    return np.any(multihost_utils.process_allgather(values), axis=0)


def barrier(name: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
