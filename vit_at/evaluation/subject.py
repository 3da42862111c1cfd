"""What is evaluated: a work directory, an export, or a weight file; ``functions`` adds functions.

Subject        the function from images to logits, and what data, threat and records need to know
of_directory   that of a work directory, an export or a packaged model
of_file        that of a weight file of somebody else, or of a name on the hub
in_classes_of  examples with the labels of the model's classes
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vit_at import models, weights
from vit_at.configs import common, default
from vit_at.data.examples import Examples
from vit_at.errors import UserError
from vit_at.evaluation.protocol import weights_digest
from vit_at.weights.architecture import arguments_for
from vit_at.weights.forms import in_words
from vit_at.workdir import registry
from vit_at.workdir.files import DESCRIPTION_FILE, is_export

# Of weight files, functions and models that lie in no directory of the user's, each in a folder of
# its name.
RESULTS_DIRECTORY = "runs/evaluate"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    apply: (params, images01 [B, H, W, C]) -> logits [B, num_classes].
    config: gives data, threat and batch size; unlocked.
    weights: what records say of the weights; with a digest, where that of the parameters alone does
      not identify the function.
    workdir: where results are stored.
    class_names: by label, () if unknown.
    """

    apply: Callable[..., jax.Array]
    params: Any
    config: ConfigDict
    weights: dict[str, Any]
    workdir: epath.Path
    num_classes: int
    class_names: tuple[str, ...] = ()


def of_directory(source: epath.PathLike, checkpoint: str, *, of_others: bool = False) -> Subject:
    """That of a work directory, an export or a packaged model, see ``registry.place``.

    Args:
      checkpoint: 'best' or 'last' of a work directory; '': the one that its run tests.
      of_others: the checkpoint is also meant for others, so an export is no error.

    Raises:
      UserError: it is none of these, or can't be read.
    """
    directory = registry.place(source)
    trained = registry.read(directory, "" if of_others and is_export(directory) else checkpoint)
    own = epath.Path(source).expanduser().exists()
    config, values = ConfigDict(trained.config).unlock(), trained.values
    return Subject(
        models.classifier(trained.model, config.data.mean, config.data.std),
        trained.params,
        config,
        {"checkpoint": trained.which, "step": values["step"]},
        directory if own else results_directory(str(source).rpartition("/")[2]),
        trained.model.num_classes,
        tuple(values.get("class_names", ())),
    )


def of_file(
    source: str,
    name: str,
    config: ConfigDict,
    *,
    num_heads: int = 0,
    image_size: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Subject:
    """That of a source that ``weights.load`` reads.

    The digest covers the parameters, the architecture and the normalisation.

    Args:
      name: timm's name of the architecture.
      config: of data, threat and batch size; its image size, mean and std are replaced.
      num_heads, image_size: 0: the name's, or what the shapes say.
      mean, std: of the normalisation, per channel, in units of images in [0, 1]; (): the file's,
        else that of the data set.

    Raises:
      UserError: a file or name that can't be used, or arrays that do not fit.
    """
    folder = epath.Path(source).expanduser()
    if any((folder / own).exists() for own in (DESCRIPTION_FILE, "checkpoints")):
        raise UserError(
            f"--weights is {source}, an export or a work directory, which says itself how to build "
            f"its model; run 'vit-at evaluate {source}', without --weights and --model"
        )
    named, loaded = models.create(name, num_classes=1), weights.read(source)
    common.use_published(config, name)  # timm 0.5's own attention scale
    config.model.pretrained = ""
    arguments = arguments_for(loaded.arrays, name, num_heads)
    if config.model.qk_scale:
        arguments["qk_scale"] = config.model.qk_scale
    on_hub = source.startswith(weights.HUB_PREFIX)
    shown = source if on_hub else os.path.basename(source.rstrip("/"))
    if changes := [
        f"{field} {value} (not {getattr(named, field)})"
        for field, value in arguments.items()
        if field != "num_classes" and value != getattr(named, field)
    ]:
        print(f"{shown}: {name} with {', '.join(changes)}", file=sys.stderr)
    if image_size:
        arguments["image_size"] = image_size
    model = models.create(name, **arguments)
    mean, std = _normalisation(loaded, config.data.name, model.in_channels, mean, std)
    config.data.image_size, config.data.mean, config.data.std = model.image_size, mean, std
    about = {"source": shown, "model": name} | arguments | {"mean": mean, "std": std}
    params = weights.from_timm(loaded.arrays, model)
    about["digest"] = weights_digest({"params": params, "about": json.dumps(about)})
    place = results_directory(shown.rpartition("/")[2] if on_hub else epath.Path(shown).stem)
    apply = models.classifier(model, mean, std)
    return Subject(apply, params, config, about, place, model.num_classes)


def _normalisation(
    loaded: weights.Plain, data: str, channels: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std: the file's, else the given ones, else those of the data set, which is said."""
    known = (default.CIFAR_MEAN, default.CIFAR_STD, "CIFAR-10's")
    if "cifar" not in data.lower():
        known = (default.IMAGENET_MEAN, default.IMAGENET_STD, "ImageNet's")
    found = []
    for option, given, own, usual in zip(
        ("--mean", "--std"), (mean, std), (loaded.mean, loaded.std), known[:2], strict=True
    ):
        same = len(given) in (1, len(own)) and np.allclose(given, own, atol=1e-3)
        if own and given and not same:
            raise UserError(
                f"{option} is {in_words(given)}, but the file itself normalises by "
                f"{in_words(own)}; leave {option} out"
            )
        values = tuple(own or given or usual)
        if len(values) == 1 and channels == 3:
            values *= 3
        if len(values) != channels:
            whose = f"{known[2]} normalisation, the usual one for '{data}',"
            whose = option if given else "the file's normalisation" if own else whose
            raise UserError(
                f"the weights take images of {channels} channel{'s' * (channels > 1)}, and {whose} "
                f"has {len(values)} ({in_words(values)}); give one number a channel by --mean and "
                "--std"
            )
        found.append(values)
    if not (loaded.mean or (mean and std)):
        print(
            f"normalisation: {known[2]}, as the data are '{data}': mean {in_words(found[0])}, "
            f"std {in_words(found[1])}; --mean and --std change it",
            file=sys.stderr,
        )
    return found[0], found[1]


def results_directory(name: str) -> epath.Path:
    """Where results of what lies in no directory of the user's are stored."""
    return epath.Path(RESULTS_DIRECTORY) / name


def in_classes_of(examples: Examples, subject: Subject) -> Examples:
    """The examples with the labels of the subject's classes.

    Where both have class names, and those of the examples are some or all of the subject's, labels
    are mapped by name. Those of an .npy file are numbers already, of which the highest may be
    missing. The prediction is over all classes of the subject.

    Raises:
      UserError: the names don't say which class is which, and the numbers of classes differ.
    """
    names = subject.class_names
    if examples.class_names == names:
        return examples
    if set(examples.class_names) <= set(names):
        return examples.relabelled(names)
    if examples.name.startswith("npy:") and examples.num_classes < subject.num_classes:
        return examples.relabelled(tuple(map(str, range(subject.num_classes))))
    if examples.num_classes != subject.num_classes:
        raise UserError(
            f"{examples.name} has {examples.num_classes} classes, but the model "
            f"{subject.num_classes}; choose data with the model's classes by --data, or a folder "
            "whose classes have the names of some of them"
        )
    if names and examples.class_names != tuple(map(str, range(len(names)))):
        logging.warning(
            "the classes of %s have other names than the model's, such as '%s' for '%s'; they are "
            "taken in this order",
            examples.name,
            *next((e, n) for e, n in zip(examples.class_names, names, strict=True) if e != n),
        )
    return examples
