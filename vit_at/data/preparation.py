"""Prepares a TFDS data set for training: downloads it, and stores it as array_record.

Downloading needs TensorFlow: ``pip install 'vit_at[prepare]'``. ImageNet and other sets that TFDS
can't download are prepared from the archives in --manual_dir. A data set in TFDS's older format,
tfrecord, is converted in place (same examples, same order), without TensorFlow or a network.
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
from vit_at.errors import UserError, in_one_line
from vit_at.schema import DatasetInfo, read_json


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> epath.Path:
    """Makes a data set readable by `vit_at.data.sources.load`; no-op if it is.

    Args:
      name: NAME[/CONFIG][:VERSION] as TFDS has it.
      data_dir: TFDS directory; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets.
      manual_dir: directory of archives that TFDS can't download; '' means TFDS's default.

    Returns:
      The directory of the prepared data set.

    Raises:
      UserError: the name is unknown, TensorFlow or an archive is missing, there is no network, or a
        file is damaged.
    """
    directory = backends.PACKAGED if name == "digits" else backends.tfds_directory(data_dir)
    prepared = backends.find_prepared(name, directory)
    if prepared is None:
        backends.check_known(name)
        return _download(name, directory, manual_dir)
    if not backends.is_array_record(backends.read_builder(prepared).info):
        convert(prepared)
    return prepared


def _download(name: str, directory: epath.Path, manual_dir: str) -> epath.Path:
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"downloading {name} needs TensorFlow; run pip install 'vit_at[prepare]', or copy a "
            f"prepared data set into {directory}"
        )
    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    try:
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # of the data set's script, the network or the disk
        reason = in_one_line(error, 500)
        raise UserError(f"{name} could not be prepared in {directory}: {reason}") from error
    return builder.data_path


def convert(prepared: epath.Path) -> None:
    """Copies every tfrecord file of a prepared data set to an array_record file beside it.

    A record's bytes are the same in both formats, so nothing is decoded.
    """
    info = backends.read_builder(prepared).info
    if info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise UserError(
            f"{prepared} is stored as {info.file_format.value}, not as tfrecord; prepare it again"
        )
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
                raise UserError(f"{source} has {copied} records, not {length}; download it again")
            incomplete.replace(target)
    # The new format is announced only after all files are complete.
    description = prepared / backends.INFO_FILE
    content = read_json(description, DatasetInfo, "prepare the data set again")
    content.setdefault("alternativeFileFormats", []).append("array_record")
    incomplete = description.with_name(f"{description.name}.incomplete")
    incomplete.write_text(json.dumps(content, indent=2))
    incomplete.replace(description)


def tfrecords(path: epath.Path) -> Iterator[bytes]:
    """The records of a tfrecord file: 8 bytes length, 4 bytes checksum, data, checksum."""
    with path.open("rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            data, checksum = file.read(length), file.read(4)
            if len(header) < 12 or len(data) < length or len(checksum) < 4:
                raise UserError(f"{path} ends in the middle of a record; download it again")
            yield data
