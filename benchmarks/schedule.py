"""Seconds of the kernels of ``vit_at.models.tpu_attention``, by the TPU compiler's schedule.

    python benchmarks/schedule.py --tokens=65 --images=256 --width=192 --heads=3

XLA's own estimate holds nothing of a kernel's inside. But the compiler writes its schedule where it
is asked to: bundles of instructions, one a cycle. A step of a kernel takes these, or the bytes that
it reads and writes over the bandwidth, if they take longer; what else may stall is not counted.
``compiled.py`` adds these seconds to XLA's. libtpu reads its options once, so each schedule takes a
process of its own.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from targets import CHIPS, Target

ARRAYS = {"attention_forward": 3 + 1, "attention_backward": 3 + 1 + 3}  # read and written
_MANY = 4096  # images, too many for vector memory: within it, a step would copy what it reads


def seconds(target: str, tokens: int, images: int, width: int, heads: int) -> dict[str, float]:
    """{kernel: of one call on one device}."""
    from vit_at.models.tpu_attention import IMAGES, LANES  # not before ``Target.devices``

    chip = CHIPS[Target.of(target).chip]
    full, rest = divmod(width, LANES)
    steps = [(full, LANES), (1, rest)] if rest else [(full, LANES)]
    total = dict.fromkeys(ARRAYS, 0.0)
    for times, lanes in steps:
        if times:
            bundles = _bundles(target, tokens, lanes, lanes * heads // width)
            for kernel, arrays in ARRAYS.items():
                moved = arrays * tokens * IMAGES * LANES * 2 / chip.bandwidth
                step = max(bundles[kernel] / chip.clock, moved)
                total[kernel] += images // IMAGES * times * step
    return total


def _bundles(target: str, tokens: int, width: int, heads: int) -> dict[str, int]:
    """{kernel: of a step}, by a process that compiles both."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_emit_annotations=true --xla_jf_dump_hlo_text=false"
        code = f"import schedule; schedule.compile_both({target!r}, {tokens}, {width}, {heads})"
        here = pathlib.Path(__file__).parent
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags},
            cwd=here,
            check=True,
        )
        return {kernel: _count(pathlib.Path(folder), kernel) for kernel in ARRAYS}


def _count(folder: pathlib.Path, kernel: str) -> int:
    (file,) = folder.glob(f"*{kernel}*-schedule-analysis_final_bundles.txt")
    return int(re.search(r"non empty scheduled bundles: +(\d+)", file.read_text())[1])


def compile_both(target: str, tokens: int, width: int, heads: int) -> None:
    """Compiles both kernels for the first device of a target."""
    (device, *_) = Target.of(target).devices()
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from vit_at.models import tpu_attention

    def both(qkv, cotangent):
        out, back = jax.vjp(lambda qkv: tpu_attention.attend(qkv, heads, 1.0), qkv)
        return out, back(cotangent)

    lies, shape = SingleDeviceSharding(device), (tokens, _MANY, width)
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=lies) for s in ((3, *shape), shape)]
    jax.jit(both).lower(*shapes).compile()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--target", default="tpu:v5e:2x2")
    for size in ("tokens", "images", "width", "heads"):
        parser.add_argument(f"--{size}", type=int, required=True)
    print(json.dumps(seconds(**vars(parser.parse_args()))))
