"""Labels by a model, for images that others will be trained on (``data.extra``).

check_file   that labels can be written there
label        a model's classes of images, and how sure it is
write        images and labels as an .npz file that ``data.extra.open_npz`` maps
"""

import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.lib import format as npy

from vit_at.data import augment
from vit_at.data.examples import Examples
from vit_at.distributed import processes, sharding
from vit_at.errors import UserError
from vit_at.evaluation.evaluator import by_parts, global_batches
from vit_at.evaluation.protocol import Attack

_AT_ONCE = 4096  # images read and written at a time


def check_file(path: pathlib.Path) -> None:
    """UserError: labels can't be written to this file, or it is there already."""
    if path.suffix != ".npz":
        raise UserError(f"--write_labels is '{path}'; give the name of an .npz file")
    if path.exists():
        raise UserError(f"--write_labels names {path}, which is there already; give another name")
    if not path.parent.is_dir():
        raise UserError(f"--write_labels is '{path}', but {path.parent} is no directory")


def label(
    apply: Callable[..., jax.Array],
    params: Any,
    examples: Examples,
    attack: Attack,
    mesh: Mesh,
    *,
    batch_size: int,
    threads: int = 0,
) -> dict[str, np.ndarray]:
    """'label' [N] int32, the most likely class, and 'confidence' [N] float32, its probability.

    attack: 'clean'; of its precision.
    """

    def of_part(logits_fn, part, _):
        probabilities = jax.nn.softmax(logits_fn(augment.to_float(part["image"])))
        classes = jnp.argmax(probabilities, -1).astype(jnp.int32)
        return {"label": classes, "confidence": probabilities.max(-1)}

    compiled, found = by_parts(apply, of_part, mesh, attack), {}
    params = sharding.replicate(params, mesh)
    for where, real, batch in global_batches(examples, batch_size, mesh, threads):
        for name, values in jax.tree.map(sharding.my_rows, compiled(params, batch)).items():
            whole = found.setdefault(name, np.zeros(len(examples), values.dtype))
            whole[where[real]] = values[real]
    return {name: processes.sum_of(values) for name, values in found.items()}


def write(path: pathlib.Path, examples: Examples, labels: dict[str, np.ndarray]) -> None:
    """Writes 'image' [N, H, W, C] uint8 and the labels, uncompressed; nothing if that fails.

    Images are read and written in parts, so that a set may be larger than memory.
    """
    shape, partial = (len(examples), *examples.image_shape), path.with_suffix(".partial")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            for name, values in labels.items():
                _add(archive, name, values.shape, values.dtype, iter([values]))
            parts = np.array_split(np.arange(len(examples)), -(-len(examples) // _AT_ONCE))
            images = (examples.read(part)[0] for part in parts)
            _add(archive, "image", shape, np.dtype(np.uint8), images)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _add(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    parts: Iterator[np.ndarray],
) -> None:
    header = {"shape": shape, "fortran_order": False, "descr": npy.dtype_to_descr(dtype)}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())
