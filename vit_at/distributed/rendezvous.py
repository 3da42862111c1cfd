"""How the processes of a run find each other: connections that all go to process 0.

JAX's own start ends a process with a C++ stack where another is missing; so they meet first, at the
address that JAX's coordinator takes afterwards. The connections stay: see ``processes``.
"""

import contextlib
import json
import socket
import time
from typing import Any

from vit_at.errors import UserError

_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # 30 s to notice silence


class Line:
    """A connection to another process that carries lines of JSON."""

    def __init__(self, connection: socket.socket, process: int):
        self.process, self._socket, self._unread = process, connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def fileno(self) -> int:
        """For ``selectors``."""
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends; says nothing where the other is gone."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None where the connection is broken or the time is up."""
        try:
            self._socket.settimeout(seconds)
            while b"\n" not in self._unread:
                some = self._socket.recv(65536)
                if not some:
                    return None
                self._unread += some
            line, _, self._unread = self._unread.partition(b"\n")
            return json.loads(line)
        except (OSError, ValueError):
            return None
        finally:
            with contextlib.suppress(OSError):
                self._socket.settimeout(None)

    def close(self) -> None:
        self._socket.close()


def meet(host: str, port: int, count: int, process: int, seconds: float) -> list[Line]:
    """Returns once all processes are there: the lines to them, or to process 0.

    Raises:
      UserError: some did not come within ``seconds``, or don't belong; with the same sentence on
        every process that came.
    """
    deadline = time.monotonic() + seconds
    if process:
        return [_join(host, port, count, process, deadline, seconds)]
    lines, error = _gather(port, count, deadline, seconds)
    for line in lines:
        line.send(**({"error": error} if error else {"go": True}))
    if error:
        raise UserError(error)
    return lines


def _gather(
    port: int, count: int, deadline: float, seconds: float
) -> tuple[list[Line], str | None]:
    """Process 0's side: the lines to those that came, and a sentence if something is amiss."""
    lines: dict[int, Line] = {}
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
        while len(lines) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except OSError:
                missing = [str(p) for p in range(1, count) if p not in lines]
                return list(lines.values()), (
                    f"{len(missing)} of {count} processes did not come within {seconds:g} s "
                    f"(process {', '.join(missing[:8])}); start all of them with the same "
                    "--coordinator, and see whether they can reach it"
                )
            line = Line(connection, -1)
            hello = line.receive(5)
            if hello is None or "process" not in hello:
                line.close()  # something else that tried the port
                continue
            line.process = hello["process"]
            if hello["count"] != count or line.process in lines:
                return [*lines.values(), line], (
                    f"process {line.process} of {hello['count']} came to a run of {count} "
                    "processes, or came twice; give every process the same --num_processes and its "
                    "own --process_id"
                )
            lines[line.process] = line
    return list(lines.values()), None


def _join(host: str, port: int, count: int, process: int, deadline: float, seconds: float) -> Line:
    """Another process's side: its line to process 0, once that says that all are there."""
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((host, port), timeout=min(left, 10)), 0)
        except OSError as error:  # not there yet, perhaps
            reason = error.strerror or str(error)
            time.sleep(min(0.2, left))
            continue
        line.send(process=process, count=count)
        answer = line.receive(left + 5)  # process 0 says first who is missing
        if answer and "error" in answer:
            raise UserError(answer["error"])
        if answer:
            return line
        line.close()
        time.sleep(min(0.2, left))
    raise UserError(
        f"process {process} of {count} could not reach process 0 at {host}:{port} within "
        f"{seconds:g} s ({reason}); see whether that process runs, and whether the address and "
        "port are right and open between the machines"
    )
