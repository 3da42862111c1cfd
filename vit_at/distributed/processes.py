"""Several processes that act as one run.

Every process runs the same program. A computation over all devices waits for all processes, so one
that is missing or has ended would block the others forever. Therefore:

    initialize    finds the other processes (JAX recognises TPU pods, Slurm and Kubernetes; flags
                  name them elsewhere), waits for all, and starts ``jax.distributed``
    shared_exit   ends all processes when one ends. Each holds a connection to process 0. It breaks
                  when a process dies, and carries the message of one that ends with an error
    agree         broadcasts process 0's decision, where it depends on a clock or a disk
    from_first    broadcasts the arrays that process 0 reads

With one process all of these are no-ops.
"""

import contextlib
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vit_at.distributed.rendezvous import Connection, connect
from vit_at.errors import UserError

EXIT_LOST = 75  # another process is gone; launchers start again (EX_TEMPFAIL of sysexits.h)
EXIT_FAILED, EXIT_MISTAKE = 1, 2
_RESUME = "run the same command again on all of them to resume from the last checkpoint"
HEARTBEAT_SECONDS = 60  # JAX gives up a silent process after this long

_peers: "Peers | None" = None


def initialize(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, *, seconds: int = 300
) -> None:
    """Joins the other processes. Call it before JAX is used.

    Args:
      coordinator: HOST:PORT of process 0. Give all of coordinator, num_processes and process_id, or
        none: then JAX detects a TPU pod, Slurm or Kubernetes. num_processes=1 alone forces one
        process.
      seconds: how long to wait for the others.

    Raises:
      UserError: the flags contradict each other, or a process is missing after ``seconds``. Every
        process raises it.
    """
    global _peers
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
        coordinator, num_processes, process_id, local_device_ids = _detected(seconds)
        if num_processes <= 1:
            return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not process_id < num_processes:
        raise UserError(
            f"--coordinator is '{coordinator}' and --process_id {process_id} of {num_processes}; "
            "the first must be HOST:PORT, the second from 0 to one less than --num_processes"
        )
    begin = time.monotonic()
    connections = connect(host, int(port), num_processes, process_id, seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids,
        cluster_detection_method="deactivate",  # already done
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    _peers = Peers(num_processes, connections)
    took = time.monotonic() - begin
    logging.info("process %d of %d, joined in %.1f s", process_id, num_processes, took)
    if jax.process_index():
        logging.set_verbosity(logging.ERROR)


def _detected(seconds: int) -> tuple[str, int, int, Sequence[int] | None]:
    """The cluster that JAX detects: coordinator, number of processes, own number, devices."""
    from jax._src.clusters import ClusterEnv  # used by jax.distributed.initialize

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
        )
    except Exception as error:  # of a metadata service or a scheduler
        raise UserError(
            "this machine seems to belong to a cluster that JAX can't read "
            f"({str(error).splitlines()[0]}); give --coordinator, --num_processes and "
            "--process_id, or --num_processes=1 for one process"
        ) from error
    address, count, process, devices = found
    return address or "", count or 1, process or 0, devices


class Peers:
    """The other processes of a run; a thread watches the connections to them."""

    def __init__(self, count: int, connections: list[Connection]):
        self._count, self._connections = count, connections
        self._ending = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for connection in self._connections:
            selector.register(connection, selectors.EVENT_READ, connection)
        while selector.get_map():
            for key, _ in selector.select():
                message = key.data.receive(5)
                if message is None:
                    gone = f"process {key.data.process} of {self._count} is gone without a message"
                    self.end(EXIT_LOST, f"{gone}; {_RESUME}")
                elif "exit" in message:
                    self.end(message["exit"], message["text"])
                else:  # it finished
                    selector.unregister(key.data)

    def end(self, status: int, text: str) -> NoReturn:
        """Ends all processes at once; each writes ``text`` and exits with ``status``."""
        with self._ending:  # only the first reason is reported
            for connection in self._connections:
                connection.send(exit=status, text=text)
            # One write, as other processes may share the terminal.
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()
            sys.stdout.flush()
            # A normal exit would wait for the other processes.
            os._exit(status)

    def finish(self) -> None:
        """Waits for all processes, then tells them that this one ends without an error."""
        jax.distributed.shutdown()
        for connection in self._connections:
            connection.send(done=True)


@contextlib.contextmanager
def shared_exit() -> Iterator[None]:
    """An error or signal inside ends every process, with the same message and exit status."""
    if _peers is None:
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
        _peers.end(EXIT_MISTAKE, " ".join(str(error).splitlines()))
    except Terminated as error:
        _peers.end(error.status, str(error))
    except KeyboardInterrupt:
        _peers.end(128 + signal.SIGINT, "interrupted")
    except Exception as error:
        # If another process died, the computation fails first. Its connection then names it.
        time.sleep(2)
        reason = (str(error) or repr(error)).splitlines()[0][:300]
        logging.exception("process %d failed", jax.process_index())
        _peers.end(EXIT_FAILED, f"process {jax.process_index()} failed ({reason})")
    else:
        _peers.finish()


class Terminated(BaseException):
    """SIGTERM, and there is nothing to save; ``status`` is the exit status."""

    def __init__(self, number: int):
        super().__init__(f"ended by signal {number}; run the same command again to resume")
        self.status = 128 + number


def end_on_sigterm() -> None:
    """Makes SIGTERM raise Terminated from now on; no-op outside the main thread."""

    def end(number: int, frame: Any) -> None:
        raise Terminated(number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def agree(value: bool) -> bool:
    """Process 0's value, on every process; all processes must call it."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def from_first(read: Callable[[], Any], like: Any) -> Any:
    """What ``read`` gives on process 0, on every process: one reads or downloads it, for all.

    like: a tree of its shapes and dtypes. All processes must call it.
    """
    if jax.process_count() == 1:
        return read()
    first = jax.process_index() == 0
    value = read() if first else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    return multihost_utils.broadcast_one_to_all(value)


def all_of(value: bool) -> bool:
    """Whether the value is true on every process; all processes must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def any_of(values: np.ndarray) -> np.ndarray:
    """[N] bool, true where any process has true; all processes must call it."""
    return np.any(multihost_utils.process_allgather(values), axis=0)


def sum_of(values: np.ndarray) -> np.ndarray:
    """[N], the sum over the processes in the same dtype; all processes must call it."""
    return multihost_utils.process_allgather(values).sum(axis=0, dtype=values.dtype)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    multihost_utils.sync_global_devices(name)
