"""Weight files and arrays: damaged, malicious, of another kind, or of another model."""

import functools
import io
import json
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from bad_input.case import Case

from vit_at import models, weights

FOUR = struct.pack("<4f", 1, 2, 3, 4)  # four float32


def refused(name: str, content: bytes | Callable[[], bytes], says: str) -> Case:
    """A file with this content that ``load`` refuses."""

    def prepare(folder: pathlib.Path) -> None:
        (folder / name).write_bytes(content() if callable(content) else content)

    return Case(lambda folder: weights.load(folder / name), says, prepare)


def path(name: str, says: str, prepare: Callable[[pathlib.Path], Any] | None = None) -> Case:
    """A path, relative to the folder, that ``load`` refuses."""
    return Case(lambda _: weights.load(name), says, prepare)


def safe(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A .safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple = (1,), at: tuple[int, int] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


def archive(members: dict[str, bytes], change: Callable[[zipfile.ZipFile], Any] = id) -> bytes:
    """A zip archive; change: alters its directory before that is written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
        change(file)
    return buffer.getvalue()


def npy(value: Any, header: bytes = b"") -> bytes:
    """A .npy member; header: in place of the true one."""
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    content = buffer.getvalue()
    if not header:
        return content
    return content[:8] + struct.pack("<H", len(header)) + header + content[-4:]


def claims(gib: int) -> Callable[[zipfile.ZipFile], None]:
    """Lets the first member of an archive claim a size."""

    def change(file: zipfile.ZipFile) -> None:
        file.infolist()[0].file_size = gib * 2**30

    return change


def twice(file: zipfile.ZipFile) -> None:
    file.filelist.append(file.filelist[0])


def encrypted(file: zipfile.ZipFile) -> None:
    file.infolist()[0].flag_bits |= 1


def load_sparse(file: pathlib.Path, gib: int) -> None:
    """Loads a file of this size that takes no space on the disk, and removes it."""
    file.write_bytes(b"1")
    os.truncate(file, gib * 2**30)
    try:
        weights.load(file)
    finally:
        file.unlink()


@functools.cache
def model() -> Any:
    sizes = {"image_size": 32, "patch_size": 4, "depth": 1, "embed_dim": 8, "num_heads": 2}
    return models.create("deit_tiny_patch16_224", num_classes=3, **sizes)


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """What fits the model."""
    abstract = jax.eval_shape(lambda: models.init_params(model(), jax.random.key(0)))
    named = weights.timm_shapes(abstract, model())
    return {name: np.full(shape, 0.1, np.float32) for name, shape in named.items()}


def unfit(says: str, change: Callable[[dict[str, np.ndarray]], dict[str, Any]]) -> Case:
    """Arrays of the model with a change, which ``from_timm`` refuses."""
    return Case(lambda _: weights.from_timm(change(dict(arrays())), model()), says)


def with_head(says: str, value: Any) -> Case:
    return unfit(says, lambda a: a | {"head.weight": np.asarray(value)})


def filled(number: Any, dtype: Any) -> np.ndarray:
    return np.full((3, 8), number, dtype)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 5717416\n"
DAMAGED = "is damaged or no .*download it again"

PATHS = {
    "no file": path("w.pth", "no weight file 'w.pth'"),
    "no name": path("", "no weight file 'model.safetensors'"),
    "a NUL in the path": path("w\0.pth", "no weight file"),
    "the home of nobody": path("~nobody-here/w.pth", "no weight file '~nobody-here"),
    "a web address": path("https://host/w.pth", "no weight file 'https:"),
    "a folder without weights": path(".", "no weight file 'model.safetensors'"),
    "a folder named as a file": path(
        "w.pth", r"no weight file 'w.pth/model.safetensors'", lambda f: (f / "w.pth").mkdir()
    ),
    "a pipe": path("w.npz", "no weight file 'w.npz'", lambda f: os.mkfifo(f / "w.npz")),
    "a device": path("/dev/zero", "no weight file '/dev/zero'"),
    "a link to itself": path(
        "w.npz", "no weight file", lambda f: (f / "w.npz").symlink_to("w.npz")
    ),
    "a link to nothing": path(
        "w.npz", "no weight file", lambda f: (f / "w.npz").symlink_to("gone")
    ),
    "a file below a file": path(
        "w.npz/w.npz", "no weight file", lambda f: (f / "w.npz").write_bytes(b"1")
    ),
    "an unknown suffix": refused("w.h5", b"1", "unknown suffix; convert it to one of .safetensors"),
    "no suffix": refused("weights", b"1", "unknown suffix"),
    "a hub name without an owner": path("hf:deit_tiny", "'hf:deit_tiny' is no name"),
    "a hub name with parents": path("hf:../../etc/passwd", "write hf:OWNER/NAME"),
    "an empty hub name": path("hf:", "'hf:' is no name"),
    "weights of a run that are not there": Case(
        ["train", "digits_sgd:smoke", "--config.model.pretrained=w.npz"],
        "there is no weight file 'w.npz'; give a file",
        slow=True,
    ),
    "a natural run that a recipe starts from and nobody has made": Case(
        ["train", "digits_sgd:smoke", "--config.model.pretrained=runs/natural"],
        "there is no weight file 'runs/natural'; make this run first",
        slow=True,
    ),
    "weights of another model for a run": Case(
        ["train", "digits_sgd:smoke", "--config.model.pretrained=w.npz"],
        "the weights do not fit the model .*model.name",
        lambda folder: np.savez(folder / "w.npz", **arrays()),
        slow=True,
    ),
}

MISTAKEN = {
    "an empty .safetensors": refused("w.safetensors", b"", "is empty; download it again"),
    "an empty .pth": refused("w.pth", b"", "is empty"),
    "blanks": refused("w.pth", b" \n" * 40, "is empty"),
    "a web page as .pth": refused("w.pth", b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "a web page as .safetensors": refused("w.safetensors", b"\n<html lang=en>", "is a web page"),
    "a Git LFS pointer as .safetensors": refused("w.safetensors", POINTER, "git lfs pull"),
    "a Git LFS pointer as .npz": refused("w.npz", POINTER, "a Git LFS pointer"),
    "a .safetensors named .npz": refused("w.npz", safe({"a": entry()}, FOUR[:4]), DAMAGED),
    "a .npz named .safetensors": refused("w.safetensors", archive({"a.npy": npy(1.0)}), DAMAGED),
    "one array as .npz": refused("w.npz", npy(np.ones(3)), DAMAGED),
}

SAFETENSORS = {
    "a header longer than the file": refused("w.safetensors", struct.pack("<Q", 10**9), DAMAGED),
    "a header of an exabyte": refused("w.safetensors", struct.pack("<Q", 10**18), DAMAGED),
    "a header that is not UTF-8": refused("w.safetensors", safe(b'{"\xff":{}}'), "invalid UTF-8"),
    "a header that is not JSON": refused("w.safetensors", safe(b"{a: 1}"), DAMAGED),
    "a header nested deeply": refused("w.safetensors", safe(b'{"a":' * 10**5), DAMAGED),
    "arrays that overlap": refused(
        "w.safetensors", safe({"a": entry(), "b": entry()}, FOUR[:4]), "invalid offset"
    ),
    "bytes between arrays": refused(
        "w.safetensors", safe({"a": entry(), "b": entry(at=(8, 12))}, FOUR), "invalid offset"
    ),
    "bytes after the arrays": refused("w.safetensors", safe({"a": entry()}, FOUR), DAMAGED),
    "fewer bytes than the shape": refused(
        "w.safetensors", safe({"a": entry(shape=(8,))}, FOUR[:4]), DAMAGED
    ),
    "a shape beyond 64 bits": refused(
        "w.safetensors", safe({"a": entry(shape=(2**40, 2**40))}, FOUR[:4]), "overflow"
    ),
    "an empty shape beyond memory": refused(
        "w.safetensors", safe({"a": entry(shape=(0, 2**62), at=(0, 0))}), DAMAGED
    ),
    "a negative shape": refused(
        "w.safetensors", safe({"a": entry(shape=(-1,))}, FOUR[:4]), DAMAGED
    ),
    "a name that occurs twice": refused(
        "w.safetensors",
        safe(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), FOUR[:4]),
        "a name occurs twice",
    ),
    "an unknown type": refused("w.safetensors", safe({"a": entry("F99")}, FOUR[:4]), DAMAGED),
    "float8 in .safetensors": refused(
        "w.safetensors", safe({"a": entry("F8_E4M3", (4,))}, FOUR[:4]), "'a' as F8_E4M3; convert"
    ),
    "float4 in .safetensors": refused(
        "w.safetensors", safe({"a": entry("F4", (8,))}, FOUR[:4]), "'a' as F4; convert"
    ),
    "metadata alone": refused("w.safetensors", safe({"__metadata__": {"a": "b"}}), "no arrays"),
    "metadata that is no text": refused("w.safetensors", safe({"__metadata__": {"a": 1}}), DAMAGED),
    "a .safetensors larger than any model": Case(
        lambda folder: load_sparse(folder / "w.safetensors", 9),
        "holds 9.0 GiB of arrays, more than the 8 GiB allowed",
    ),
}


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n"
CALL = b"{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,)}\n"
NPZ = {
    "an object array": refused(
        "w.npz", archive({"a.npy": npy(np.array([None]))}), "Object arrays cannot be loaded"
    ),
    "an array shorter than its shape": refused(
        "w.npz", archive({"a.npy": npy(1.0, HUGE)}), DAMAGED
    ),
    "a header with a call": refused("w.npz", archive({"a.npy": npy(1.0, CALL)}), DAMAGED),
    "a header that never ends": refused(
        "w.npz", archive({"a.npy": npy(1.0, b"[" * 60000)}), DAMAGED
    ),
    "a member that claims 100 GiB": refused(
        "w.npz", archive({"a.npy": npy(np.ones(3))}, claims(100)), "holds 100.0 GiB of arrays"
    ),
    "a member that occurs twice": refused(
        "w.npz", archive({"a.npy": npy(np.ones(3))}, twice), "a name occurs twice"
    ),
    "an encrypted member": refused("w.npz", archive({"a.npy": npy(1.0)}, encrypted), DAMAGED),
    "no arrays in the archive": refused("w.npz", archive({}), "holds no arrays"),
    "Google's names without the rest": refused(
        "w.npz", archive({"embedding/kernel.npy": npy(np.ones((4, 4, 3, 8)))}), "but lacks 'cls'"
    ),
    "Google's names with a scalar kernel": refused(
        "w.npz",
        archive(
            {
                "cls.npy": npy(np.ones((1, 1, 8))),
                "Transformer/posembed_input/pos_embedding.npy": npy(np.ones((1, 65, 8))),
                "embedding/kernel.npy": npy(1.0),
            }
        ),
        "Google's ViT names but not their shapes",
    ),
}

ARRAYS = {
    "arrays of another architecture": unfit(
        "missing: cls_token, .*; unexpected: layers.0.weight",
        lambda a: {"layers.0.weight": a["cls_token"]},
    ),
    "names with a prefix": unfit(
        "unexpected: module.cls_token", lambda a: {f"module.{n}": v for n, v in a.items()}
    ),
    "a missing bias": unfit(
        "missing: norm.bias", lambda a: {n: v for n, v in a.items() if n != "norm.bias"}
    ),
    "one array too many": unfit(
        "unexpected: norm.extra", lambda a: a | {"norm.extra": a["norm.bias"]}
    ),
    "a kernel transposed": unfit(
        r"misshapen: blocks.0.mlp.fc1.weight \(8, 32\) instead of \(32, 8\)",
        lambda a: a | {"blocks.0.mlp.fc1.weight": a["blocks.0.mlp.fc1.weight"].T},
    ),
    "a position too many": unfit(
        r"pos_embed \(1, 66, 8\) instead of \(1, 65, 8\)",
        lambda a: a | {"pos_embed": np.ones((1, 66, 8), np.float32)},
    ),
    "a patch kernel of other channels": unfit(
        r"patch_embed.proj.weight \(8, 1, 4, 4\) instead of",
        lambda a: a | {"patch_embed.proj.weight": np.ones((8, 1, 4, 4), np.float32)},
    ),
    "a scalar kernel": with_head(r"head.weight \(\) instead of \(3, 8\)", np.float32(1)),
    "a scalar position": unfit(
        r"pos_embed \(\) instead of", lambda a: a | {"pos_embed": np.array(1.0)}
    ),
    "an array without numbers": unfit(
        r"norm.bias \(0,\) instead of", lambda a: a | {"norm.bias": np.ones(0, np.float32)}
    ),
    "a head whose bias is of other classes": with_head("misshapen: head.weight", np.ones((7, 8))),
    "NaN": with_head("not finite: head.weight", filled(np.nan, np.float32)),
    "infinity": with_head("not finite: head.weight", filled(-np.inf, np.float16)),
    "1e300 in float64": with_head("not finite: head.weight", filled(1e300, np.float64)),
    "NaN in bfloat16": with_head("not finite", filled(np.nan, ml_dtypes.bfloat16)),
    "sums of cells beyond float32": unfit(
        "not finite: patch_embed.proj.weight",
        lambda a: a | {"patch_embed.proj.weight": np.full((8, 3, 8, 8), 3e38, np.float32)},
    ),
    "complex numbers": with_head("not floating-point: head.weight complex64", filled(1, "c8")),
    "integers": with_head("not floating-point: head.weight int8", filled(1, np.int8)),
    "truth values": with_head("not floating-point: head.weight bool", filled(True, bool)),
    "objects": with_head("not floating-point: head.weight object", filled(None, object)),
    "words": with_head("not floating-point: head.weight <U1", filled("a", "U1")),
    "dates": with_head(r"not floating-point: head.weight datetime64", filled(1, "M8[s]")),
    "records": with_head("not floating-point: head.weight", filled(1, [("x", "f4")])),
    "integers in place of positions": unfit(
        "not floating-point: pos_embed int64", lambda a: a | {"pos_embed": np.ones((1, 65, 8), int)}
    ),
    "one number expanded to a petabyte": unfit(
        r"misshapen: norm.bias \(1000000000000000,\) instead of \(8,\)",
        lambda a: a | {"norm.bias": np.broadcast_to(np.float32(1), (10**15,))},
    ),
    "a name with an escape sequence": unfit(
        r"unexpected: 'a\\x1b\[2J\\nb'", lambda a: a | {"a\x1b[2J\nb": a["norm.bias"]}
    ),
    "a name of a megabyte": unfit(
        r"unexpected: 'a{120}'", lambda a: a | {"a" * 2**20: a["norm.bias"]}
    ),
}

CASES = PATHS | MISTAKEN | SAFETENSORS | NPZ | ARRAYS
