"""Random-access labelled images: TFDS data sets, image folders, and the packaged digits.

`load` opens a data set by its name. `Examples.read(indices)` decodes exactly the images asked for,
to uint8 arrays of one size. Because any image can be read at any time, the order of training is a
pure function of (seed, step): there is no shuffle buffer, and nothing to restore on resuming.
"""

import io
from functools import partial
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from vit_at.data import backends, cache, folders, ids, transforms
from vit_at.data.examples import Examples, Origin
from vit_at.errors import UserError, in_one_line


def load(
    data: ConfigDict, split: str, *, threads: int = 0, chosen: str = "", count: int = 0
) -> Examples:
    """Opens a split of a data set; keeps it decoded in memory if it is small enough.

    Args:
      data: config.data; its fields name, dir, image_size, transform, stratified, mean, cache_gib,
        decoded_dir and, for a folder's classes, train_split and test_split are used. The length of
        mean is the number of channels.
      split: in TFDS's notation, also for folders: "train", "train[:90%]", "test[:48]".
      threads: number of threads that fill the cache; 0 means one per core.
      chosen: a list of images, see ``ids``: only these, in its order; '': all.
      count: the first so many of them; 0: all. Only these are decoded.

    Raises:
      UserError: the data set is unknown or not prepared, it has no images or labels, the split is
        unknown or empty, the transform is unknown, decoded_dir can't be used, or an image of the
        list is not there; with a count, also that there are fewer, or an image twice.
    """
    listed = ids.read(chosen) if chosen else None
    transform = transforms.parse(data.transform, data.image_size)
    encoded = open_encoded(data, split)
    shape = (data.image_size, data.image_size, len(data.mean))
    _warn_of_loss(encoded, shape)
    rows = np.arange(len(encoded.indices))
    if listed:
        rows = ids.rows_of(listed, encoded.names(), encoded.name)
    examples = Examples(
        encoded.name,
        encoded.class_names,
        shape,
        encoded.indices[rows],
        rows,
        partial(_decode_rows, encoded, shape, transform),
        encoded.origin,
        data.transform,
        listed.about if listed else "",
        partial(_labels_of, encoded),
        encoded.contents,
        encoded.source,
    )
    examples = select(examples, count)
    if examples.nbytes <= data.cache_gib * 2**30:
        return cache.in_memory(examples, threads)
    if not data.decoded_dir:
        return examples
    root = Path(data.decoded_dir).expanduser()
    return cache.on_disk(examples, encoded.fingerprint(), root, threads)


def streamed(data: ConfigDict) -> ConfigDict:
    """An unlocked copy of config.data by which ``load`` decodes images only when they are read."""
    data = data.copy_and_resolve_references().unlock()
    data.cache_gib, data.decoded_dir = 0.0, ""
    return data


def select(examples: Examples, count: int) -> Examples:
    """The first ``count`` examples, 0: all.

    Raises:
      UserError: the count is negative or too large, or the split holds an image twice.
    """
    for split in {name for name, _ in examples.origin}:
        places = np.concatenate([rows for name, rows in examples.origin if name == split])
        if repeated := len(places) - len(np.unique(places)):
            raise UserError(
                f"{examples.name} holds {repeated} images of '{split}' more than once; choose "
                "parts that do not overlap"
            )
    if not 0 <= count <= len(examples):
        raise UserError(
            f"{count} examples are asked for, but {examples.name} has {len(examples)}; "
            "ask for at most these, or for 0 to use all"
        )
    return examples.take(np.arange(count)) if count else examples


def open_encoded(data: ConfigDict, split: str) -> backends.Encoded:
    """Opens a split with its images still encoded; data, split and errors are as in `load`."""
    if data.name.startswith("folder:"):
        used = (data.train_split, data.test_split)
        encoded = folders.open_folder(path_of(data), split, used=used, stratified=data.stratified)
    elif data.name.startswith("npy:"):
        encoded = folders.open_npy(path_of(data), split)
    else:
        encoded = backends.open_tfds(data.name, data.dir, split)
    if not len(encoded.indices):
        raise UserError(f"split '{split}' of {encoded.name} selects no examples; widen its slice")
    return encoded


def _warn_of_loss(encoded: backends.Encoded, image_shape: tuple[int, int, int]) -> None:
    """Warns where colour images are read as grey, or images shrunk to a quarter or less."""
    found, (size, _, channels) = backends.headers(encoded), image_shape
    colour = sum(not mode.startswith(("1", "L", "I")) for _, _, mode in found)
    if channels == 1 and 2 * colour > len(found):
        logging.warning(
            "%s: colour images are read as grey, as data.mean has one channel; for colour, give "
            "data.mean and data.std three, or start from the recipe 'folder'",
            encoded.name,
        )
    side = int(np.median([min(width, height) for width, height, _ in found] or [0]))
    if side >= 4 * size:
        logging.warning(
            "%s: images of about %d pixels are shrunk to data.image_size %d; a larger one, or the "
            "recipe 'folder', keeps more of them",
            encoded.name,
            side,
            size,
        )


def path_of(data: ConfigDict) -> Path:
    """PATH of 'folder:PATH' and 'npy:PATH'; a relative one begins in data.dir."""
    return Path(data.dir).expanduser() / Path(data.name.partition(":")[2]).expanduser()


def check_splits(data: ConfigDict, train: Examples, test: Examples) -> None:
    """Refuses test images that are training images too, and folders that differ in their classes.

    Raises:
      UserError: one of these; the first is allowed by ``data.allow_overlap``.
    """
    overlap = _common(train.origin, test.origin)
    if overlap and not data.allow_overlap:
        raise UserError(
            f"data.test_split '{data.test_split}' has {overlap} images of data.train_split "
            f"'{data.train_split}'; choose splits without common images, or set "
            "data.allow_overlap=True"
        )
    if not data.name.startswith("folder:"):
        return
    root = path_of(data)
    found = [{c for s, _ in e.origin for c in folders.folders(root / s)} for e in (train, test)]
    if single := sorted(found[0] ^ found[1]):
        raise UserError(
            f"only one of data.train_split '{data.train_split}' and data.test_split "
            f"'{data.test_split}' of {root} has the classes {', '.join(single[:5])}; give both the "
            "same classes"
        )


def check_extra(
    data: ConfigDict, extra: Examples, held_out: Examples | None, test: Examples
) -> None:
    """Refuses images of ``data.extra`` that validation or the test has.

    Raises:
      UserError: there are any, and ``data.allow_overlap`` does not allow them.
    """
    if extra.source != test.source or data.allow_overlap:
        return
    found = {"of the test": _common(extra.origin, test.origin)}
    if held_out:
        found["held out for validation"] = _common(extra.origin, held_out.own_origin())
    for what, count in found.items():
        if count:
            raise UserError(
                f"data.extra.split '{data.extra.split}' has {count} images {what}; choose a split "
                "without them, or set data.allow_overlap=True"
            )


def _common(some: Origin, others: Origin) -> int:
    """How many images are in both."""
    pairs = [(x, y) for split, x in some for other, y in others if split == other]
    return sum(len(np.intersect1d(x, y)) for x, y in pairs)


def hold_out(
    examples: Examples, n: int, seed: int, *, stratified: bool = False
) -> tuple[Examples, Examples | None]:
    """Splits n random examples off; the seed alone chooses which. n = 0: (examples, None).

    stratified: as many of each class as is its share of the examples, to within one.
    """
    if not 0 <= n < len(examples):
        raise UserError(
            f"data.validation_examples is {n}; it must be at least 0 and less than the "
            f"{len(examples)} examples of {examples.name}"
        )
    if n == 0:
        return examples, None
    shuffled = np.random.Generator(np.random.Philox(seed)).permutation(len(examples))
    if stratified:
        shuffled = shuffled[folders.in_proportion(examples.take(shuffled).labels())]
    return examples.take(np.sort(shuffled[n:])), examples.take(np.sort(shuffled[:n]))


def _decode_rows(
    encoded: backends.Encoded,
    image_shape: tuple[int, int, int],
    transform: transforms.Transform,
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(rows), *image_shape), np.uint8)
    contents, labels = _fetch(encoded, rows)
    for i, (row, content) in enumerate(zip(rows, contents, strict=True)):
        try:
            images[i] = decode(content, image_shape, transform)
        except Exception as error:  # PIL raises many, such as SyntaxError and struct.error
            reason = in_one_line(error)
            raise UserError(
                f"{encoded.where(row)} can't be decoded ({reason}); repair or remove it"
            ) from error
    return images, labels


def _labels_of(encoded: backends.Encoded, rows: np.ndarray) -> np.ndarray:
    return _fetch(encoded, rows)[1]


def _fetch(encoded: backends.Encoded, rows: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Encoded images and labels [n] int32 of these rows."""
    try:
        fetched = encoded.fetch(rows.tolist())
    except Exception as error:  # of the disk, array_record and TFDS
        reason = in_one_line(error, 300)
        raise UserError(f"{encoded.name} can't be read ({reason}); restore the file") from error
    for row, (_, label) in zip(rows, fetched, strict=True):
        if not 0 <= label < len(encoded.class_names):
            raise UserError(f"{encoded.where(row)} has no label ({label}); choose another split")
    contents = [content for content, _ in fetched]
    return contents, np.array([label for _, label in fetched], np.int32)


def decode(
    encoded: bytes,
    image_shape: tuple[int, int, int],
    transform: transforms.Transform = transforms.squash,
) -> np.ndarray:
    """Decodes a PNG, JPEG, WebP or BMP file to uint8 [S, S, C], C being 1 (grey) or 3 (colour).

    Other formats raise ValueError: some of PIL's decoders start programs, as that of EPS.
    transform: what makes an image of any size square, see ``transforms``.
    """
    size, _, channels = image_shape
    try:
        opened = Image.open(io.BytesIO(encoded), formats=backends.FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("it is no PNG, JPEG, WebP or BMP image, or its header is cut") from error
    with opened:
        image = _convert(opened, {1: "L", 3: "RGB"}[channels])
    return np.asarray(transform(image, size)).reshape(image_shape)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip at 255 instead of scaling
        values = np.clip(np.asarray(image), 0, 65535)
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # direct conversion warns
    return image.convert(mode)
