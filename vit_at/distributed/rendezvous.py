"""Connections between the processes of a run: each process connects to process 0.

If a process is missing, ``jax.distributed.initialize`` aborts with a C++ stack. So the processes
connect first, at the address that JAX's coordinator uses afterwards. ``processes`` keeps the
connections open.
"""

import contextlib
import json
import socket
import time
from typing import Any

from vit_at.errors import UserError

# A silent peer is noticed after 30 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


class Connection:
    """A connection to another process; each message is a line of JSON."""

    def __init__(self, opened: socket.socket, process: int):
        self.process, self._socket, self._lines = process, opened, opened.makefile("rb")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        """The file descriptor, for ``selectors``."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends a message; no-op if the other process is gone."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None if the connection is broken or the time is up."""
        try:
            self._socket.settimeout(seconds)
            return json.loads(self._lines.readline())
        except (OSError, ValueError):  # ValueError: of json, also at the end of the connection
            return None
        finally:
            with contextlib.suppress(OSError):
                self._socket.settimeout(None)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def connect(host: str, port: int, count: int, process: int, seconds: float) -> list[Connection]:
    """Waits for all processes; on process 0 connections to all others, elsewhere one to process 0.

    Raises:
      UserError: a process is missing after ``seconds``, or has other flags. Every process that is
        there raises the same message.
    """
    deadline = time.monotonic() + seconds
    if process:
        return [_connect_to_first(host, port, count, process, deadline, seconds)]
    connections, error = _accept_all(port, count, deadline, seconds)
    for connection in connections:
        connection.send(**({"error": error} if error else {"go": True}))
    if error:
        raise UserError(error)
    return connections


def _accept_all(
    port: int, count: int, deadline: float, seconds: float
) -> tuple[list[Connection], str | None]:
    """Process 0's side: the connections, and a message if a process is missing or is wrong."""
    found: dict[int, Connection] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"process 0 can't listen on port {port} ({error.strerror}); end what uses it, or "
            "choose another port for --coordinator"
        ) from error
    with server:
        while len(found) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                accepted, _ = server.accept()
            except OSError:
                missing = [str(p) for p in range(1, count) if p not in found]
                return list(found.values()), (
                    f"{len(missing)} of {count} processes did not connect within {seconds:g} s "
                    f"(process {', '.join(missing[:8])}); start all of them with the same "
                    "--coordinator, and check that they can reach it"
                )
            connection = Connection(accepted, -1)
            hello = connection.receive(5)
            if hello is None or "process" not in hello:
                connection.close()  # not one of our processes
                continue
            number = connection.process = hello["process"]
            if hello["count"] != count or number in found:
                return [*found.values(), connection], (
                    f"process {number} of {hello['count']} connected to a run of {count} "
                    "processes, or connected twice; give every process the same --num_processes "
                    "and its own --process_id"
                )
            found[number] = connection
    return list(found.values()), None


def _connect_to_first(
    host: str, port: int, count: int, process: int, deadline: float, seconds: float
) -> Connection:
    """The other processes' side: a connection to process 0, once all processes are there."""
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            opened = socket.create_connection((host, port), timeout=min(left, 10))
        except OSError as error:  # process 0 may not listen yet
            reason = error.strerror or str(error)
            time.sleep(min(0.2, left))
            continue
        connection = Connection(opened, 0)
        connection.send(process=process, count=count)
        answer = connection.receive(left + 5)  # later than process 0's own deadline
        if answer and "error" in answer:
            raise UserError(answer["error"])
        if answer:
            return connection
        connection.close()
        time.sleep(min(0.2, left))
    raise UserError(
        f"process {process} of {count} could not reach process 0 at {host}:{port} within "
        f"{seconds:g} s ({reason}); check that it runs, that the address is right, and that the "
        "port is open between the machines"
    )
