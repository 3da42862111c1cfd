"""Prepares a TFDS data set for training: downloads it, and stores it as array_record.

    python -m vit_at.prepare cifar10
    python -m vit_at.prepare imagenette/320px-v2 --data_dir=/data/tfds
    python -m vit_at.prepare imagenet2012 --manual_dir=/data/downloads

A data set that is already there in TFDS's other format, tfrecord, is converted beside the old files
(same examples, same order); that needs neither TensorFlow nor a network. Downloading needs
TensorFlow, which training does not: ``pip install 'vit_at[prepare]'``. A data set that TFDS may not
download, such as ImageNet, is prepared from the archives in --manual_dir.
"""

import importlib.util
import json
import os
import struct
from collections.abc import Iterator

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from vit_at.data import backends
from vit_at.errors import UserError


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> epath.Path:
    """Makes a data set readable by `vit_at.data.sources.load`; does nothing if it is already.

    Args:
      name: NAME[/CONFIG][:VERSION] as TFDS has it.
      data_dir: TFDS directory; '': $TFDS_DATA_DIR or ~/tensorflow_datasets.
      manual_dir: where the archives lie that TFDS cannot download; '': TFDS's own choice.

    Returns:
      The directory of the prepared data set.

    Raises:
      UserError: unknown name, TensorFlow or archives missing, no network, or damaged files.
    """
    directory = backends.PACKAGED if name == "digits" else backends.tfds_directory(data_dir)
    prepared = backends.find_prepared(name, directory)
    if prepared is None:
        backends.check_known(name)
        return _download(name, directory, manual_dir)
    if not backends.is_array_record(tfds.builder_from_directory(prepared).info):
        convert(prepared)
    return prepared


def _download(name: str, directory: epath.Path, manual_dir: str) -> epath.Path:
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"Downloading {name} needs TensorFlow: run pip install 'vit_at[prepare]', or copy a "
            f"prepared data set into {directory}."
        )
    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    try:
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # whatever the data set's own script, the network and the disk raise
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"{name} could not be prepared in {directory}: {reason}") from error
    return builder.data_path


def convert(prepared: epath.Path) -> None:
    """Copies every tfrecord file of a prepared data set to an array_record file beside it.

    A record's bytes are the same in both formats, so no example is decoded.
    """
    info = tfds.builder_from_directory(prepared).info
    if info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise UserError(f"{prepared} is stored as {info.file_format.value}, not as tfrecord.")
    for split in info.splits.values():
        for source, length in zip(split.filepaths, split.shard_lengths, strict=True):
            target = source.parent / source.name.replace(".tfrecord", ".array_record")
            incomplete = target.parent / f"{target.name}.incomplete"
            writer = ArrayRecordWriter(os.fspath(incomplete), "group_size:1")
            copied = 0
            for record in tfrecords(source):
                writer.write(record)
                copied += 1
            writer.close()
            if copied != length:
                raise UserError(f"{source} has {copied} records, not {length}; download it again.")
            incomplete.replace(target)
    # Only now that all files are complete does the data set say that it has them.
    description = prepared / "dataset_info.json"
    content = json.loads(description.read_text())
    content.setdefault("alternativeFileFormats", []).append("array_record")
    description.write_text(json.dumps(content, indent=2))


def tfrecords(path: epath.Path) -> Iterator[bytes]:
    """Reads the records of a tfrecord file: 8 bytes length, 4 bytes checksum, data, checksum."""
    with path.open("rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            data, checksum = file.read(length), file.read(4)
            if len(header) < 12 or len(data) < length or len(checksum) < 4:
                raise UserError(f"{path} ends in the middle of a record; download it again.")
            yield data
