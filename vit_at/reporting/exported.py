"""Exports a run's weights for PyTorch, with a description for leaderboards.

model.safetensors    the weights, with the names of timm 1.x
model.json           how timm builds the model, the normalisation, the training configuration, and
                     the results in the fields of RobustBench's ``model_info``
load.py              gives the model in PyTorch, with the normalisation inside
config.json          timm's, for ``timm.create_model("local-dir:...")``, if timm builds this model
README.md            a model card
images.safetensors   if asked for: test images and their labels
model.stablehlo      if asked for: the whole classifier, for JAX without this package

No path of the machine is in them, and files of another kind or run are never overwritten.
``workdir.exported`` reads such a directory back.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

from vit_at import weights
from vit_at.config import differences, with_added
from vit_at.data import sources
from vit_at.errors import UserError
from vit_at.evaluation.protocol import weights_digest
from vit_at.reporting.extras import IMAGES_FILE, STABLEHLO_FILE, program, test_images
from vit_at.reporting.for_timm import (
    conv_stem,
    fold_scale,
    is_timms,
    timm_arguments,
    timm_config,
)
from vit_at.reporting.model_card import model_card
from vit_at.reporting.outputs import check_directory
from vit_at.reporting.run import is_own, last_part
from vit_at.schema import is_regular, read_json
from vit_at.workdir import registry
from vit_at.workdir.checkpoint import Trained
from vit_at.workdir.exported import EXPORT_AGAIN, WEIGHTS_FILE, sha256
from vit_at.workdir.files import DESCRIPTION_FILE, is_export, write_atomically
from vit_at.workdir.results import in_255ths

CARD_FILE, LOADER_FILE, TIMM_FILE = "README.md", "load.py", "config.json"
FILES = (
    WEIGHTS_FILE,
    DESCRIPTION_FILE,
    CARD_FILE,
    LOADER_FILE,
    TIMM_FILE,
    IMAGES_FILE,
    STABLEHLO_FILE,
)
_LOADER = epath.Path(__file__).parent / "packaged" / LOADER_FILE
_OF_A_CHECKPOINT = ("step", "num_classes", "class_names")  # the values that are exported


def export(
    params: Any,
    model: Any,
    path: str | epath.Path,
    metadata: dict[str, Any],
    extras: dict[str, bytes] | None = None,
) -> epath.Path:
    """Writes the weights, their description and what loads them, each file whole or not at all.

    Args:
      path: a directory; created if missing. Files of an earlier export that are not written again
        are removed.
      metadata: of ``model.json``; 'architecture' (timm's name of the model) and 'normalisation'
        ({'mean': [...], 'std': [...]}) are required.
      extras: {IMAGES_FILE or STABLEHLO_FILE: what it holds}.

    Returns:
      The path of the weights.

    Raises:
      UserError: the directory can't be written, or has files of these names that are not from an
        export of the same configuration, or were edited since; nothing was written. Files as they
        would be written, of an export that was killed, are its own.
    """
    path = epath.Path(path)
    check_directory(path, "--output")
    contents = _contents(params, model, metadata, extras or {})
    earlier = _check_own(path, metadata, contents)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(path / name, content)
    for name in earlier - contents.keys():
        (path / name).unlink()
    return path / WEIGHTS_FILE


def _contents(
    params: Any, model: Any, metadata: dict[str, Any], extras: dict[str, bytes]
) -> dict[str, bytes]:
    """{name: content} of all files, ``model.json`` last."""
    state_dict = fold_scale(weights.to_timm(params, model, names="1.x"), model)
    tensors = safetensors.numpy.save(state_dict, metadata={"format": "pt"})
    description = metadata | {
        "timm": {
            "create_model": timm_arguments(model, metadata["architecture"]),
            "layer_norm_eps": model.norm_eps,
            "conv_stem": conv_stem(model),  # load.py adds it
            "complete": is_timms(model),  # whether create_model alone gives the model
        },
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "weights": {"file": WEIGHTS_FILE, "sha256": sha256(tensors)},
    }
    if IMAGES_FILE in extras:
        described = {"file": IMAGES_FILE, "sha256": sha256(extras[IMAGES_FILE])}
        description["images"] = described
    contents = {WEIGHTS_FILE: tensors, LOADER_FILE: _LOADER.read_bytes()} | extras
    if is_timms(model):
        contents[TIMM_FILE] = _as_json(timm_config(model, metadata))
    contents[CARD_FILE] = model_card(description).encode(errors="replace")
    description["files"] = {name: sha256(content) for name, content in contents.items()}
    return contents | {DESCRIPTION_FILE: _as_json(description)}


def _as_json(value: dict[str, Any]) -> bytes:
    return f"{json.dumps(value, indent=2)}\n".encode()


def _check_own(
    directory: epath.Path, metadata: dict[str, Any], contents: dict[str, bytes]
) -> set[str]:
    """The files of an earlier export of this configuration; UserError if any other is there."""
    present = {name for name in FILES if (directory / name).exists()}
    own = {name for name in present & contents.keys() if _holds(directory / name, contents[name])}
    # Raised where model.json is not of an export.
    with contextlib.suppress(UserError, LookupError, TypeError, AttributeError):
        own |= _own_files(directory, metadata)
    if foreign := sorted(present - own):
        raise UserError(
            f"{directory} holds {' and '.join(foreign)}, which an export of this run has not "
            "written, or not in this form; move them away, or choose another --output"
        )
    return own


def _holds(path: epath.Path, content: bytes) -> bool:
    return is_regular(path) and path.read_bytes() == content


def _own_files(directory: epath.Path, metadata: dict[str, Any]) -> set[str]:
    """The unchanged files of an export of this configuration; any error if there is none."""
    if not is_regular(directory / DESCRIPTION_FILE):
        return set()
    stored: Any = read_json(directory / DESCRIPTION_FILE, dict[str, Any], EXPORT_AGAIN)
    wanted = json.loads(json.dumps(metadata))
    trainings = [with_added(about.get("training", {})) for about in (stored, wanted)]
    names = [(about.get("name"), about.get("architecture")) for about in (stored, wanted)]
    if names[0] != names[1] or differences(*trainings):
        return set()
    unchanged = {
        name
        for name, digest in stored["files"].items()
        if name in FILES
        and is_regular(directory / name)
        and sha256((directory / name).read_bytes()) == digest
    }
    return unchanged | {DESCRIPTION_FILE}


def describe(trained: Trained, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metadata of a trained model; records: the entries of its results.json."""
    config = _without_paths(trained.config)
    digest = weights_digest(trained.params)
    own = [
        r | {"protocol": r["protocol"] | {"data": last_part(r["protocol"]["data"])}}
        for r in records
        if r["protocol"]["weights"]["digest"] == digest
    ]
    robust = _percent(own, "autoattack", config)
    return {
        "link": "",
        "name": config.name,
        "authors": "",
        "additional_data": bool(config.model.pretrained or config.data.extra.name),
        "number_forward_passes": 1,
        "dataset": config.data.name,
        "venue": "Unpublished",
        "architecture": config.model.name,
        "eps": in_255ths(config.threat.eps),
        "clean_acc": _percent(own, "clean", config),
        "reported": robust,
        "autoattack_acc": robust,
        "unreliable": False,
        "threat_model": {"linf": "Linf", "l2": "L2", "l1": "L1"}[config.threat.norm],
        "num_classes": trained.model.num_classes,
        "normalisation": {"mean": list(config.data.mean), "std": list(config.data.std)},
        "training": config.to_dict(),
        "checkpoint": {n: trained.values[n] for n in _OF_A_CHECKPOINT if n in trained.values},
        "results": own,
    }


def _without_paths(config: ConfigDict) -> ConfigDict:
    """The configuration without the machine's paths: of folders and files, their names only."""
    public = config.copy_and_resolve_references().unlock()
    public.data.dir = public.data.decoded_dir = ""
    public.data.name = last_part(config.data.name)
    public.data.extra.name = last_part(config.data.extra.name)
    if not config.model.pretrained.startswith(weights.HUB_PREFIX):
        public.model.pretrained = config.model.pretrained.rstrip("/").rpartition("/")[2]
    return public.lock()


def _percent(records: Sequence[dict[str, Any]], attack: str, config: ConfigDict) -> str | None:
    """The accuracy in per cent under the trained threat, on the most of the own test images.

    A string with two digits after the point, as RobustBench has it; None if not measured.
    """
    threat = config.threat

    def fits(record):
        protocol = record["protocol"]
        norm, eps = protocol.get("norm", threat.norm), protocol.get("eps", threat.eps)
        same_threat = norm == threat.norm and abs(eps - threat.eps) < 1e-6
        known = same_threat and "union" not in protocol and is_own(record, config.data)
        return record["attack"].startswith(attack) and known

    measured = [record for record in records if fits(record)]
    if not measured:
        return None
    best = max(measured, key=lambda record: record["protocol"]["num_examples"])
    return f"{100 * best['accuracy']:.2f}"


def export_workdir(
    source: str | epath.Path,
    which: str = "",
    output: str = "",
    *,
    images: int = 0,
    data_dir: str = "",
    stablehlo: bool = False,
) -> epath.Path:
    """Exports weights of a work directory, or a model again.

    Args:
      source: a work directory, or a name as in ``vit_at.load``.
      which: 'best' or 'last' of a work directory; '': the one that its run tests.
      output: a directory; '': WORKDIR/export.
      images: the first so many test images are added; data_dir: of their data set, '': as trained.
      stablehlo: adds the classifier as a program.

    Raises:
      UserError: there are no such weights or images, or the directory can't be written (see
        ``export``).
    """
    if output:
        check_directory(epath.Path(output).expanduser(), "--output")  # before weights are read
    directory = registry.place(source)
    if not output and is_export(directory):
        raise UserError(f"{source} is an export already; give another place by --output")
    path = epath.Path(output).expanduser() if output else directory / "export"
    trained = registry.read(directory, which)
    metadata = describe(trained, registry.records_of(directory))
    extras = {}
    if images:
        _check_count(trained.config, images, data_dir)
        extras[IMAGES_FILE] = test_images(trained.config, images, data_dir)
    if stablehlo:
        extras[STABLEHLO_FILE] = program(trained)
    return export(trained.params, trained.model, path, metadata, extras)


def _check_count(config: ConfigDict, images: int, data_dir: str) -> None:
    """Checks that there are so many test images, before they are decoded."""
    data = config.data.copy_and_resolve_references().unlock()
    data.dir = data_dir or data.dir
    encoded = sources.open_encoded(data, data.test_split)
    most = len(encoded.indices)
    if not 0 <= images <= most:
        raise UserError(
            f"--images is {images}, but {encoded.name} has {most}; ask for at most these, or leave "
            "it out to export none"
        )
