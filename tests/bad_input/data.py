"""Data: foreign and damaged images, files that are no files, damaged TFDS directories."""

import io
import json
import os
import shutil
import socket

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from bad_input.case import Case
from ml_collections import ConfigDict
from PIL import Image

from vit_at.data import backends, sources

DIGITS = next((backends.PACKAGED / "digits").iterdir())
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def load(name, split="train", **fields):
    """A deed: opens a data set below the folder and reads all its images."""

    def deed(folder):
        defaults = {"dir": str(folder), "image_size": 8, "mean": (0.5,), "cache_gib": 4.0}
        defaults |= {"transform": "squash", "stratified": False, "decoded_dir": ""}
        defaults |= {"train_split": "train", "test_split": "test"}
        where = name if name != "folder" else f"folder:{folder}"
        sources.load(ConfigDict({"name": where, **defaults, **fields}), split)

    return deed


# --- Images -----------------------------------------------------------------------------------


def image(kind, **options):
    """An 8 x 8 image in a format of PIL."""
    content = io.BytesIO()
    Image.effect_noise((8, 8), 50).save(content, kind, **options)
    return content.getvalue()


def folder_with(name="train/a/n.png", content=None, make=None):
    """Writes a good image, and a file of this content or a file that ``make(path)`` makes."""

    def prepare(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "good.png").write_bytes(image("PNG"))
        if make:
            make(path)
        else:
            path.write_bytes(content)

    return prepare


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


PNG, NO_IMAGE = image("PNG"), r"train/a/n\.png can't be decoded \(it is no PNG, JPEG, WebP or BMP"
HUGE = PNG[:16] + (60_000).to_bytes(4, "big") * 2 + PNG[24:]  # its header claims 60 000 x 60 000
FOREIGN = {
    "EPS": EPS,
    "GIF": image("GIF"),
    "TIFF": image("TIFF"),
    "ICO": image("ICO"),
    "PPM": image("PPM"),
    "TGA": image("TGA"),
    "PCX": image("PCX"),
    "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "WMF": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(80),
    "FITS": b"SIMPLE  =                    T" + bytes(2850),
    "HTML": b"<html>404 not found</html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "nothing": b"",
    "zeros": bytes(200),
    "a signature alone": PNG[:8],
}
DAMAGED = {
    "half a PNG": PNG[: len(PNG) // 2],
    "half a JPEG": image("JPEG")[:-60],
    "half a WebP": image("WEBP", lossless=True)[:-20],
    "half a BMP": image("BMP")[:-30],
    "a PNG with a wrong checksum": flipped(PNG, 29),
    "a PNG of 60 000 x 60 000 pixels": HUGE,
}
CASES = {
    f"{kind} named n.png": Case(load("folder"), NO_IMAGE, folder_with(content=content))
    for kind, content in FOREIGN.items()
}
CASES |= {
    f"{kind}": Case(load("folder"), r"n\.png can't be decoded", folder_with(content=content))
    for kind, content in DAMAGED.items()
}


# --- Folders ----------------------------------------------------------------------------------


def unix_socket(path):
    """A socket at a path, bound by its short name, as a socket's path has at most 108 bytes."""
    here = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def chain(path):
    """A link to a link that leads back."""
    path.symlink_to("other.png")
    path.with_name("other.png").symlink_to(path.name)


IRREGULAR = {
    "a pipe": os.mkfifo,
    "a socket": unix_socket,
    "a folder": lambda path: path.mkdir(),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to a folder": lambda path: path.symlink_to(".."),
    "a link to nothing": lambda path: path.symlink_to("gone.png"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a loop of two links": chain,
}
CASES |= {
    f"{kind} named n.png": Case(load("folder"), r"\.png is no regular file", folder_with(make=make))
    for kind, make in IRREGULAR.items()
}


def only(*names):
    """Writes empty files, and folders where a name ends in a slash."""

    def prepare(folder):
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if name.endswith("/") else path.touch()

    return prepare


def loop_of_folders(folder):
    folder_with("train/a/n.png", PNG)(folder)
    (folder / "train/b").symlink_to("..")


CASES |= {
    "no folder": Case(load("folder:/nowhere"), "which is no directory"),
    "a folder of an empty name": Case(load("folder:"), "has no classes|has no images"),
    "a file as the folder": Case(load("folder:x.png"), "is no directory", only("x.png")),
    "an empty folder": Case(load("folder"), "has no classes"),
    "images without a class": Case(load("folder"), "has no classes", only("train/n.png")),
    "an empty class": Case(load("folder"), "train/a has no images", only("train/a/")),
    "only text": Case(load("folder"), "train/a has no images", only("train/a/n.txt")),
    "only hidden images": Case(load("folder"), "has no images", only("train/a/.n.png")),
    "only a hidden class": Case(load("folder"), "has no classes", only("train/.a/n.png")),
    "a class that is a link to its parent": Case(
        load("folder"), "b has no images", loop_of_folders
    ),
    "an unknown split": Case(load("folder", "val"), "split 'val'", folder_with(content=PNG)),
    "a slice of nothing": Case(
        load("folder", "train[:0]"), "no examples", folder_with(content=PNG)
    ),
}


# --- TFDS -------------------------------------------------------------------------------------


def digits_with(change):
    """Copies the digits as the data set 'copied', and changes its directory."""

    def prepare(folder):
        shutil.copytree(DIGITS, folder / "copied/1.0.0")
        change(folder / "copied/1.0.0")

    return prepare


def json_with(name, change):
    """A change of one JSON file of the directory."""

    def edit(directory):
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(change(content)))

    return digits_with(edit)


def text_of(name, text):
    return digits_with(lambda directory: (directory / name).write_bytes(text))


def irregular(name, make):
    def replace(directory):
        (directory / name).unlink()
        make(directory / name)

    return digits_with(replace)


def feature(content):
    """features.json with a third feature."""

    def add(described):
        described["featuresDict"]["features"]["more"] = content
        return described

    return json_with("features.json", add)


def eps_inside(directory):
    """Replaces the first image of the test split by an EPS of the same length."""
    path = next(directory.glob("*test.array_record*"))
    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    start = records[0].index(PNG[:8])
    end = records[0].index(b"IEND", start) + 8
    content = EPS[: end - start].ljust(end - start)
    records[0] = records[0][:start] + content + records[0][end:]
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def garbage_inside(directory):
    path = next(directory.glob("*test.array_record*"))
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(359):
        writer.write(b"no example")
    writer.close()


INFO, FEATURES = "dataset_info.json", "features.json"
RECORDS = "digits-test.array_record-00000-of-00001"
OPENED, TESTED = load("copied"), load("copied", "test")
CLASS = {"pythonClassName": "antigravity.Feature", "text": {}}
TFDS = "tensorflow_datasets.core.features"
NESTED = {"pythonClassName": f"{TFDS}.sequence_feature.Sequence"}
NESTED |= {"sequence": {"feature": CLASS}}
TEXTS = {"nothing": b"", "half": b'{"name": "co', "bytes that are no text": b"\xff\xfe\x00"}
TEXTS |= {"a list": b"[]", "null": b"null", "nesting": b"[" * 10**5}
CASES |= {
    f"{name} holding {kind}": Case(OPENED, rf"{name} is ", text_of(name, text))
    for name in (INFO, FEATURES)
    for kind, text in TEXTS.items()
}
CASES |= {
    f"dataset_info.json with {kind}": Case(
        OPENED, rf"{INFO} is damaged .*{says}", json_with(INFO, c)
    )
    for kind, says, c in [
        ("no name", "`name`", lambda d: {k: v for k, v in d.items() if k != "name"}),
        ("splits as an object", "splits is", lambda d: d | {"splits": {}}),
        ("a number as its version", "version is 1", lambda d: d | {"version": 1}),
        ("a split without a name", "`name`", lambda d: d | {"splits": [{}]}),
        (
            "a negative length",
            "shardLengths",
            lambda d: d | {"splits": [{"name": "train", "shardLengths": ["-1"]}]},
        ),
    ]
}
CASES |= {
    "an unknown format of records": Case(
        OPENED, "can't be read", json_with(INFO, lambda d: d | {"fileFormat": "zip"})
    ),
    "records that only TensorFlow reads": Case(
        OPENED, "vit-at prepare", json_with(INFO, lambda d: d | {"fileFormat": "tfrecord"})
    ),
    "a feature of a foreign class": Case(OPENED, "'antigravity.Feature'", feature(CLASS)),
    "a foreign class inside a sequence": Case(OPENED, "'antigravity.Feature'", feature(NESTED)),
    "a foreign class by its other name": Case(
        OPENED, "'antigravity.F'", feature({"python_class_name": "antigravity.F", "text": {}})
    ),
    "a foreign class in the older form": Case(
        OPENED, "'os.system'", json_with(FEATURES, lambda _: {"type": "os.system", "content": "id"})
    ),
    "a feature that TFDS lacks": Case(
        OPENED, "can't be read", feature({"pythonClassName": f"{TFDS}.image_feature.Picture"})
    ),
    "no features.json": Case(OPENED, "is missing", irregular(FEATURES, lambda path: None)),
    "a pipe as features.json": Case(OPENED, "no regular file", irregular(FEATURES, os.mkfifo)),
    "a pipe as dataset_info.json": Case(OPENED, "no regular file", irregular(INFO, os.mkfifo)),
    "a pipe of records": Case(TESTED, "no regular file", irregular(RECORDS, os.mkfifo)),
    "no records": Case(TESTED, "can't be read", irregular(RECORDS, lambda path: None)),
    "records cut short": Case(TESTED, "can't be read", text_of(RECORDS, b"cut")),
    "records that are no examples": Case(
        TESTED, "can't be (read|decoded)", digits_with(garbage_inside)
    ),
    "an EPS among the records": Case(TESTED, "no PNG, JPEG", digits_with(eps_inside)),
    "a set of an unknown name": Case(load("cifar1O"), "TFDS has no data set"),
    "a set that is not prepared": Case(load("cifar10"), "is not prepared"),
}
