"""What the benchmarks share: a case to measure, interleaved timing, the machine's description."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

CLASSES = 10
EPS, STEP_SIZE = 8 / 255, 2 / 255


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time: a training step, or (objective 'pgd') an evaluation of one batch.

    keep: ARD's and PRM's keep probability, held fixed; only with ``masked``.
    steps: attack steps. dtype: of the matrix products.
    """

    model: str = "deit_tiny_patch16_224"
    image_size: int = 32
    patch_size: int = 4
    batch: int = 64
    objective: str = "at"
    masked: bool = False
    keep: float = 0.5
    steps: int = 10
    dtype: str = "float32"
    depth: int = 0  # 0: the architecture's own
    tf32: bool = False  # float32 products on a GPU in TF32, ours and PyTorch's
    plain_attention: bool = False  # not model.fused_attention

    @property
    def title(self) -> str:
        """Such as 'deit_tiny_patch16_224 32/4 b64 at+ARD+PRM(0.5)'."""
        masked = f"+ARD+PRM({self.keep:g})" if self.masked else ""
        depth = f" depth {self.depth}" if self.depth else ""
        size = f"{self.image_size}/{self.patch_size}"
        tf32 = " TF32" if self.tf32 else ""
        steps = f"{self.objective}-{self.steps}"
        return f"{self.model} {size}{depth} b{self.batch} {steps}{masked}{tf32}"


def parse_model(text: str) -> dict[str, Any]:
    """'NAME@SIZE/PATCH' as fields of a Case; ValueError, in one sentence, for another text."""
    found = re.fullmatch(r"(\w+)@(\d+)/(\d+)", text)
    if not found:
        raise ValueError(f"the model is '{text}'; write NAME@SIZE/PATCH, such as {Case.model}@32/4")
    name, size, patch = found.groups()
    return {"model": name, "image_size": int(size), "patch_size": int(patch)}


def interleaved(
    runs: dict[str, Callable[[], float]], repetitions: int, seconds: float
) -> dict[str, dict]:
    """Takes turns, again and again, so that a slow moment of the machine hits all alike.

    runs: {name: runs once and returns its duration}, each warmed up. It ends after ``repetitions``
    rounds, or after 3 or more once ``seconds`` are over.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(repetitions):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            times[name].append(run())
    return {name: spread(values) for name, values in times.items()}


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, quartiles and count of some durations."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_s": middle, "quartiles_s": [low, high], "repetitions": len(seconds)}


def machine() -> dict[str, Any]:
    """Processor, devices and versions, as they stand beside every number."""
    import jax

    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "timm", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "platform": jax.default_backend(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        return re.search(r"model name\s*:\s*(.*)", info)[1].strip()
    except (OSError, TypeError):
        return platform.processor()


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a result; '': nowhere."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        part = Path(f"{path}.part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)
        print(f"written: {path}")


def mebibytes(count: int) -> str:
    """'1536 MiB'."""
    return f"{count / 2**20:.0f} MiB"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
