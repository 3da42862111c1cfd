"""PyTorch's pickles: damaged, malicious, or of something else than arrays.

Files are written byte by byte, so they need no PyTorch here; where it is not installed, ``load``
says so, and its sentences can't be compared.
"""

import importlib.util
import os
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from bad_input.case import Case
from bad_input.weights import FOUR, archive, claims, refused, twice

TORCH = importlib.util.find_spec("torch") is not None


def pth(content: bytes, says: str) -> Case:
    """A .pth file whose pickle is read by PyTorch."""
    return refused("w.pth", content, says if TORCH else "needs PyTorch")


def integer(n: int) -> bytes:
    return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def whole(shape: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, shape)) + b"t"


def tensor(shape=(2, 2), stride=(2, 1), *, numel=4, offset=0, storage="Float", key="0") -> bytes:
    """The opcodes of a tensor, as torch.save writes it."""
    of_storage = text("storage") + f"ctorch\n{storage}Storage\n".encode() + text(key) + text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + of_storage + integer(numel) + b"tQ"
        # offset, shape, stride, requires_grad = False, no hooks
        + integer(offset) + whole(shape) + whole(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def state(value: bytes, key: bytes = b"") -> bytes:
    """A pickle of {'a': value}."""
    return b"\x80\x02}" + (key or text("a")) + value + b"s."


def saved(pickled: bytes, data: bytes = FOUR, *, name: str = "0", **members: bytes) -> bytes:
    """A .pth file with this pickle, and one storage."""
    files = {"data.pkl": pickled, "byteorder": b"little", f"data/{name}": data, "version": b"3\n"}
    return archive({f"archive/{n}": content for n, content in (files | members).items()})


def meta_tensor() -> bytes:
    call = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n("
    return call + b"ctorch\nfloat32\n" + whole((2, 2)) + whole((2, 1)) + b"\x89tR"


def sparse_tensor() -> bytes:
    indices = tensor((1, 2), (2, 1), numel=2, storage="Long", key="1")
    coo = b"ctorch.serialization\n_get_layout\n" + text("torch.sparse_coo") + b"\x85R"
    of_values = b"(" + indices + tensor((2,), (1,)) + whole((4,)) + b"\x89t"
    return b"ctorch._utils\n_rebuild_sparse_tensor\n" + coo + of_values + b"\x86R"


def quantised_tensor() -> bytes:
    of_storage = text("storage") + b"ctorch\nQUInt8Storage\n" + text("0") + text("cpu")
    scheme = b"(ctorch\nper_tensor_affine\nG" + struct.pack(">d", 0.1) + integer(0) + b"t"
    values = b"((" + of_storage + integer(16) + b"tQ" + integer(0) + whole((16,)) + whole((1,))
    hooks = b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_qtensor\n" + values + scheme + hooks


def float8_tensor() -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v3\n(("
    of_storage = text("storage") + b"ctorch.storage\nUntypedStorage\n" + text("0") + text("cpu")
    laid = integer(16) + b"tQ" + integer(0) + whole((16,)) + whole((1,))
    return call + of_storage + laid + b"\x89ccollections\nOrderedDict\n)Rctorch\nfloat8_e5m2\ntR"


class Named:
    """Pickles as a call of a function by its name."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


RUN = "nothing in it was run"
NINEFOLD = b"](" + b"h\x00" * 9 + b"eq\x00"  # a list of nine times the one in the memo
NO_STATE = "holds no state_dict"
CASES = {
    "a call of the shell": pth(saved(pickle.dumps(Named(os.system, "touch run"), 2)), RUN),
    "a call of the shell in the old format": pth(
        pickle.dumps(Named(os.system, "touch run"), 0), RUN
    ),
    "a call of eval": pth(saved(pickle.dumps({"a": Named(eval, "1")}, 2)), RUN),
    "an attribute by name": pth(
        saved(b"\x80\x02cbuiltins\ngetattr\n" + text("a") + text("b") + b"\x86R."), RUN
    ),
    "a module's class": pth(saved(b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b."), RUN),
    "a class of another package": pth(saved(b"\x80\x02cargparse\nNamespace\n)\x81}b."), RUN),
    "NumPy's arrays in a pickle": pth(pickle.dumps({"a": np.ones(3)}, 2), RUN),
    "an attribute set on a dict": pth(
        saved(b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__") + b"}sb."), "no arrays"
    ),
    "an unknown opcode": pth(saved(b"\x80\x02\xff."), "damaged"),
    "a stack that is empty": pth(saved(b"\x80\x02000."), "damaged"),
    "a memo that was never filled": pth(saved(b"\x80\x02h\x05."), "damaged"),
    "9 to the 99 lists by a memo": pth(saved(b"\x80\x02]q\x00" + NINEFOLD * 99 + b"."), NO_STATE),
    "a pickle that ends early": pth(saved(state(tensor())[:-20]), "damaged"),
    "lists nested 200000 deep": pth(
        saved(b"\x80\x02" + b"]" * 200000 + b"a" * 199999 + b"."), NO_STATE
    ),
    "marks without an end": pth(saved(b"\x80\x02" + b"(" * 100000), "damaged"),
    "a string that claims 4 GiB": pth(saved(b"\x80\x02X\xf0\xff\xff\xffa"), "damaged"),
    "bytes that claim 100 TB": pth(
        saved(b"\x80\x02cbuiltins\nbytearray\n" + integer(10**14) + b"\x85R."), "damaged"
    ),
    "TorchScript": pth(saved(state(tensor()), **{"constants.pkl": b"\x80\x02)."}), "damaged"),
    "an archive without a pickle": pth(archive({"a/b": b"c"}), "damaged"),
    "a damaged archive": pth(saved(state(tensor()))[: len(FOUR) - 200], "damaged"),
    "an old .tar file": pth(b"\0" * 257 + b"ustar\0" + b"\0" * 1000, "damaged"),
    "a member of .pth that claims 100 GiB": refused(
        "w.pth", archive({"archive/data.pkl": state(tensor())}, claims(100)), "holds 100.0 GiB"
    ),
    "a pickle that occurs twice": refused(
        "w.pth", archive({"archive/data.pkl": state(tensor())}, twice), "a name occurs twice"
    ),
    "a storage that claims 4 PB": pth(saved(state(tensor(numel=10**15))), "damaged"),
    "a storage that is not there": pth(saved(state(tensor(key="1"))), "damaged"),
    "a storage outside the archive": pth(saved(state(tensor(key="../../version"))), "damaged"),
    "a storage shorter than it says": pth(
        saved(state(tensor((20, 20), (20, 1), numel=400))), "damaged"
    ),
    "a shape beyond the storage": pth(saved(state(tensor((10**9, 10**9)))), "damaged"),
    "a start beyond the storage": pth(saved(state(tensor(offset=10**6))), "damaged"),
    "a negative stride": pth(saved(state(tensor(stride=(-2, 1)))), "damaged"),
    "a negative shape in .pth": pth(saved(state(tensor((-2, 2)))), "damaged"),
    "one number expanded to 400 PB": pth(
        saved(state(tensor((10**9, 10**8), (0, 0)))), "GiB of arrays, more than the 8 GiB allowed"
    ),
    "a quantised tensor": pth(
        saved(state(quantised_tensor())), r"'a' as torch.strided torch.quint8 on 'cpu'; convert it"
    ),
    "a sparse tensor": pth(
        saved(state(sparse_tensor()), **{"data/1": struct.pack("<2q", 0, 1)}),
        r"'a' as torch.sparse_coo",
    ),
    "a meta tensor": pth(saved(state(meta_tensor())), "'a' as .* on 'meta'"),
    "a float8 tensor": pth(saved(state(float8_tensor())), r"'a' as .*float8_e5m2"),
    "a checkpoint of an optimiser alone": pth(
        saved(b"\x80\x02}" + text("optimizer") + b"}" + text("step") + integer(3) + b"ss."),
        NO_STATE,
    ),
    "one tensor without a name": pth(saved(b"\x80\x02" + tensor() + b"."), NO_STATE),
    "a list of tensors": pth(saved(b"\x80\x02]" + tensor() + b"a."), NO_STATE),
    "numbers as names": pth(saved(state(tensor(), integer(1))), NO_STATE),
    "a number under 'model'": pth(saved(state(integer(1), text("model"))), NO_STATE),
    "an empty dict": pth(saved(b"\x80\x02}."), "holds no arrays"),
}
