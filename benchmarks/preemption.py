"""A run that is told to stop and started again: how long each takes.

    python benchmarks/preemption.py [--model vit_base_patch16_224@32/4] [--root DIR] [--out FILE]

A run on the packaged digits is started with an empty compilation cache and gets SIGTERM some
seconds after its first step, as from a spot machine that is taken back: reported are the seconds
from the signal to the end of the process, and the bytes of the state that it saved. Clouds give
30 s. The same command then starts again, with the programs of the first run: reported are the
seconds from opening the run to the end of its first step, both times.
"""

import argparse
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import machine, parse_model, print_table, write_json

FIRST_STEP = re.compile(r"first step after (\d+) s")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224@32/4", help="NAME@SIZE/PATCH")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10, help="from first step to SIGTERM")
    parser.add_argument("--root", default=tempfile.gettempdir(), help="a directory of the disk")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.root) as folder:
        runs = [_stopped(options, pathlib.Path(folder)) for _ in ("cold", "warm")]
        state = max(_size(path) for path in pathlib.Path(folder).glob("run/checkpoints/last/*"))
    result = {"machine": machine(), "model": options.model, "state_bytes": state}
    result |= dict(zip(("cold", "warm"), runs, strict=True))
    rows = [[name, *(f"{result[name][key]:.1f}" for key in runs[0])] for name in ("cold", "warm")]
    print(f"{options.model}: a state of {state / 1e6:,.0f} MB")
    print_table(["start", "first step, s", "SIGTERM to the end, s"], rows)
    write_json(options.out, result)


def _stopped(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Starts the run, or goes on with it, and ends it by SIGTERM after its first step."""
    shape = parse_model(options.model)
    fields = {
        "model.name": shape["model"],
        "data.image_size": shape["image_size"],
        "model.patch_size": shape["patch_size"],
        "model.embed_dim": 0,
        "model.depth": 0,
        "model.num_heads": 0,
        "batch_size": options.batch,
        "threat.steps": 1,
        "log_every_steps": 1,
        "eval.every_epochs": 0,
        "eval.checkpoint": "last",
    }
    command = [sys.executable, "-m", "vit_at.main", "--config=digits_sgd", "--no-report"]
    command += [f"--workdir={folder / 'run'}", f"--compilation_cache={folder / 'cache'}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said, found = [], None
    for line in process.stderr:
        said.append(line)
        if found := FIRST_STEP.search(line):
            break
    time.sleep(options.seconds)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said += process.stderr
    process.wait()
    if found is None or process.returncode != 128 + signal.SIGTERM:
        sys.exit(f"the run ended with status {process.returncode}:\n{''.join(said)}")
    return {"first_step_seconds": float(found[1]), "stopping_seconds": time.monotonic() - begin}


def _size(directory: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
