#!/usr/bin/env python3
"""Starts n processes of one run on this machine, to try a multi-process run without a pod.

    launch/local.py -n 2 -- --config=configs/digits_sgd.py --workdir=runs/two
    launch/local.py -n 2 --module=vit_at.evaluate -- runs/two --attacks=clean,pgd-20

Arguments after ``--`` go to every process, and signals are passed on to all. When a process fails,
the others are killed after ``--grace`` seconds; the exit status is that of the first failure.
``--devices`` sets the number of virtual CPU devices of each process.
"""

import argparse
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """The exit status of the first process to fail; 0 where none does."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    port = options.port or _free_port()
    commands = [_command(options, port, process) for process in range(options.num_processes)]
    if options.dry_run:
        print("\n".join(shlex.join(command) for command in commands))
        return 0
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(_python_path()))
    if options.devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
        environment.pop("XLA_FLAGS", None)
    # In sessions of their own, so that Ctrl-C reaches each of them only once, from here.
    running = [
        subprocess.Popen(command, env=environment, start_new_session=True) for command in commands
    ]

    def forward(number: int, frame: object) -> None:
        for process in running:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return _wait(running, options.grace)


def _wait(running: list[subprocess.Popen], grace: float) -> int:
    """Waits for all; kills those that outlive the first failure by ``grace`` seconds."""
    status, deadline = 0, float("inf")
    while any(process.poll() is None for process in running):
        failed = [process.returncode for process in running if process.returncode]
        if failed and not status:
            status, deadline = failed[0], time.monotonic() + grace
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    failed = [process.returncode for process in running if process.returncode]
    status = status or next(iter(failed), 0)
    return 128 - status if status < 0 else status


def _command(options: argparse.Namespace, port: int, process: int) -> list[str]:
    return [
        *(sys.executable, "-m", options.module, *options.arguments),
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={options.num_processes}",
        f"--process_id={process}",
    ]


def _python_path() -> list[str]:
    return [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _parse(arguments: list[str]) -> argparse.Namespace:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="launch/local.py",
        description="Several processes of one run, on this machine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", "--num_processes", type=int, required=True)
    add("--devices", type=int, default=0, help="virtual CPU devices of each process")
    add("--module", default="vit_at.main", help="or vit_at.evaluate")
    add("--port", type=int, default=0, help="of the coordinator; 0: any that is free")
    add("--grace", type=float, default=60.0, help="seconds for the others once one has failed")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(arguments[:cut])
    options.arguments = arguments[cut + 1 :]
    return options


if __name__ == "__main__":
    sys.exit(main())
