"""The devices that ``compiled.py`` and ``schedule.py`` compile for, without having them."""

import importlib.util
import os
import pathlib
import re
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A kind of device. bandwidth: bytes a second, about what copies reach; peak: bf16 operations
    a second; clock: cycles a second of the TPU compiler's estimates.
    """

    platform: str
    bandwidth: float
    peak: float
    clock: float = 0.0


CHIPS = {
    "v5e": Chip("tpu", 0.82e12, 197e12, 1.5e9),
    "v6e": Chip("tpu", 1.64e12, 918e12, 1.75e9),
    "h200": Chip("cuda", 4.3e12, 790e12),
}


class Target(NamedTuple):
    """PLATFORM:CHIP[:TOPOLOGY], such as tpu:v5e:2x2 or cuda:h200:8, taken apart."""

    chip: str
    topology: str

    def __str__(self) -> str:
        return f"{CHIPS[self.chip].platform}:{self.chip}:{self.topology}"

    @classmethod
    def of(cls, text: str) -> "Target":
        """Raises ValueError, in one sentence, for a text that is no target."""
        platform, _, rest = text.partition(":")
        chip, _, topology = rest.partition(":")
        if chip not in CHIPS or CHIPS[chip].platform != platform:
            known = ", ".join(f"{c.platform}:{name}" for name, c in CHIPS.items())
            raise ValueError(f"--target is '{text}'; use one of {known}, and :TOPOLOGY")
        pattern, example = (r"\d+x\d+", "2x2") if platform == "tpu" else (r"\d+", "8")
        topology = topology or {"tpu": "2x2", "cuda": "1"}[platform]
        if not re.fullmatch(pattern, topology):
            raise ValueError(f"--target is '{text}'; a topology of {chip} looks like {example}")
        return cls(chip, topology)

    def check_installed(self) -> None:
        """Raises ValueError, in one sentence, where the compiler for the target is missing."""
        extra, module = {"tpu": ("tpu", "libtpu"), "cuda": ("cuda12", "jax_cuda12_plugin")}[
            CHIPS[self.chip].platform
        ]
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"a {self.chip} needs {module}: pip install -e '.[{extra}]'")

    def devices(self) -> list[Any]:
        """The described devices. Sets the environment, so JAX must not be imported before."""
        os.environ["JAX_PLATFORMS"] = "cpu"
        if CHIPS[self.chip].platform == "tpu":  # no metadata server to ask, no device to lock
            kind = {"v5e": "v5litepod", "v6e": "v6e"}[self.chip]
            os.environ |= {
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_ACCELERATOR_TYPE": f"{kind}-4",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_WORKER_ID": "0",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            }
            options = {"topology_name": f"{self.chip}:{self.topology}", "platform": "tpu"}
        else:  # no device to tune on; without tuning, Triton's products fail on some shapes
            flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
            os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
            described = (pathlib.Path(__file__).parent / f"{self.chip}.txtpb").read_text()
            options = {"topology_name": self.chip, "platform": "cuda"}
            options |= {"topology": f"1x1x{self.topology}", "target_config": described}
        from jax.experimental import topologies

        return list(topologies.get_topology_desc(**options).devices)
