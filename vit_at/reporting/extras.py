"""What an export holds if it is asked for: test images, and the classifier as a program."""

import functools

import jax
import jax.export
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from vit_at import models
from vit_at.data import sources
from vit_at.errors import UserError
from vit_at.workdir.checkpoint import Trained

IMAGES_FILE, STABLEHLO_FILE = "images.safetensors", "model.stablehlo"
_PLATFORMS = ("cpu", "cuda", "tpu")


def test_images(config: ConfigDict, count: int, data_dir: str) -> bytes:
    """A safetensors file of the first test images and their labels, in PyTorch's layout.

    'images' [count, C, H, W] uint8 and 'labels' [count] int64.

    Raises:
      UserError: the data can't be read, or has fewer images.
    """
    data = config.data.copy_and_resolve_references().unlock()
    data.dir = data_dir or data.dir
    examples = sources.load(data, data.test_split, threads=data.threads, count=count)
    images, labels = examples.read(np.arange(count))
    channels_first = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    return safetensors.numpy.save({"images": channels_first, "labels": labels.astype(np.int64)})


def program(trained: Trained) -> bytes:
    """The classifier as a serialized ``jax.export.Exported``, with its weights inside.

    images [B, H, W, C] float32 in [0, 1] -> logits [B, classes], for any B, on CPU, CUDA and TPU.
    ``jax.export.deserialize(bytearray(content)).call(images)`` runs it with JAX alone.

    Raises:
      UserError: flatbuffers is not installed.
    """
    model, data = trained.model, trained.config.data
    apply = functools.partial(models.classifier(model, data.mean, data.std), trained.params)
    (batch,) = jax.export.symbolic_shape("batch")
    side = model.image_size
    images = jax.ShapeDtypeStruct((batch, side, side, model.in_channels), "float32")
    try:
        exported = jax.export.export(jax.jit(apply), platforms=_PLATFORMS)(images)
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError(
            "--stablehlo needs the library flatbuffers; pip install 'vit_at[stablehlo]'"
        ) from error
