"""Exports a run's weights for PyTorch, with a description for leaderboards.

``export`` writes ``model.safetensors`` with the names of timm 1.x, for a strict
``load_state_dict``; ``model.json`` with the arguments of timm's ``create_model``, the
normalisation, the training configuration, and the results in the fields of RobustBench's
``model_info``; and ``README.md``, a model card with the PyTorch code that loads them. No path of
the machine is in them, and files of another kind or run are never overwritten.
``workdir.exported`` reads such a directory back.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

from vit_at import weights
from vit_at.config import differences, with_added
from vit_at.errors import UserError
from vit_at.evaluation.protocol import weights_digest
from vit_at.models.convit import ConViT
from vit_at.models.convnext import ConvNeXt
from vit_at.models.swin import STAGES, SwinTransformer
from vit_at.models.xcit import XCiT
from vit_at.reporting.model_card import model_card
from vit_at.reporting.outputs import check_directory
from vit_at.schema import is_regular, read_json
from vit_at.workdir.checkpoint import Trained, load_trained
from vit_at.workdir.exported import DESCRIPTION_FILE, EXPORT_AGAIN, WEIGHTS_FILE, sha256
from vit_at.workdir.files import write_atomically
from vit_at.workdir.results import in_255ths, read_records

CARD_FILE = "README.md"
FILES = (WEIGHTS_FILE, DESCRIPTION_FILE, CARD_FILE)
_OF_A_CHECKPOINT = ("step", "num_classes", "class_names")  # the values that are exported


def export(params: Any, model: Any, path: str | epath.Path, metadata: dict[str, Any]) -> epath.Path:
    """Writes the weights, their description and a model card, each file whole or not at all.

    Args:
      path: a directory; created if missing.
      metadata: of ``model.json``; 'architecture' (timm's name of the model) is required.

    Returns:
      The path of the weights.

    Raises:
      UserError: the directory can't be written, or has files of these names that are not from an
        export of the same configuration, or were edited since; nothing was written.
    """
    path = epath.Path(path)
    check_directory(path, "--output")
    _check_own(path, metadata)
    state_dict = weights.to_timm(params, model, names="1.x")
    content = safetensors.numpy.save(_fold_scale(state_dict, model), metadata={"format": "pt"})
    description = metadata | {
        "timm": {
            "create_model": timm_arguments(model, metadata["architecture"]),
            "layer_norm_eps": model.norm_eps,
        },
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "weights": {"file": WEIGHTS_FILE, "sha256": sha256(content)},
    }
    card = model_card(description).encode(errors="replace")
    description["card"] = {"file": CARD_FILE, "sha256": sha256(card)}
    text = json.dumps(description, indent=2) + "\n"
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / WEIGHTS_FILE, content)
    write_atomically(path / CARD_FILE, card)
    write_atomically(path / DESCRIPTION_FILE, text)
    return path / WEIGHTS_FILE


def _check_own(directory: epath.Path, metadata: dict[str, Any]) -> None:
    """Raises UserError for files that an export of this configuration has not written like this."""
    present = {name for name in FILES if (directory / name).exists()}
    own: set[str] = set()
    # Raised where model.json is not of an export.
    with contextlib.suppress(UserError, LookupError, TypeError, AttributeError):
        own = _own_files(directory, metadata)
    if foreign := sorted(present - own):
        raise UserError(
            f"{directory} holds {' and '.join(foreign)}, which an export of this run has not "
            "written, or not in this form; move them away, or choose another --output"
        )


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
    digests = {WEIGHTS_FILE: stored["weights"]["sha256"], CARD_FILE: stored["card"]["sha256"]}
    unchanged = {
        name
        for name, digest in digests.items()
        if is_regular(directory / name) and sha256((directory / name).read_bytes()) == digest
    }
    return unchanged | {DESCRIPTION_FILE}


def timm_arguments(model: Any, name: str) -> dict[str, Any]:
    """The arguments of timm's ``create_model`` for this model, with its overrides.

    Raises:
      UserError: timm has no such model.
    """
    if isinstance(model, ConvNeXt):
        if model.stem != "patch" or model.mlp_ratio != 4:
            raise UserError(
                f"timm has no {name} with model.stem '{model.stem}' and model.mlp_ratio "
                f"{model.mlp_ratio:g}, so it can't be exported; those with 'patch' and 4 can"
            )
        return {
            "model_name": name,
            "num_classes": model.num_classes,
            "in_chans": model.in_channels,
            "patch_size": model.patch_size,
            "depths": list(model.depths),
            "dims": [model.embed_dim * 2**i for i in range(STAGES)],
        }
    arguments = {
        "model_name": re.sub("_in2[12]k$|_timm05$", "", name),  # one name for several weights
        "num_classes": model.num_classes,
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.in_channels,
        "mlp_ratio": model.mlp_ratio,
    }
    if isinstance(model, SwinTransformer):
        return arguments | {
            "embed_dim": model.embed_dim,
            "depths": list(model.depths),
            "num_heads": [model.num_heads * 2**i for i in range(STAGES)],
            "window_size": model.window_size,
        }
    arguments |= {"depth": model.depth, "num_heads": model.num_heads}
    if isinstance(model, XCiT):
        if model.patch_size != 2**model.convolutions:
            raise UserError(
                f"timm has no {name} with model.patch_size {model.patch_size}, so it can't be "
                f"exported; one with {2**model.convolutions} can"
            )
        arguments["model_name"] = re.sub("(medium|large)_12", r"\1_24", name)  # timm has no such
        own = {"tokens_norm": model.tokens_norm, "eta": model.layer_scale}
        return arguments | own | {"embed_dim": model.embed_dim}
    if isinstance(model, ConViT):  # timm counts its width per head
        width = model.embed_dim // model.num_heads
        return arguments | {"embed_dim": width, "local_up_to_layer": model.local_blocks}
    return arguments | {"embed_dim": model.embed_dim, "qkv_bias": model.qkv_bias}


def _fold_scale(state_dict: dict[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """Multiplies an attention scale other than timm's into the queries' weights."""
    if not model.qk_scale:
        return state_dict
    factor = model.qk_scale * (model.embed_dim // model.num_heads) ** 0.5
    folded = dict(state_dict)
    for name, value in state_dict.items():
        match = re.search(r"\.attn\.(qkv|qk)\.(weight|bias)$", name)
        if match:
            value = value.copy()
            value[: len(value) // len(match[1])] *= factor
            folded[name] = value
    return folded


def describe(trained: Trained, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metadata of a trained model; records: the entries of its results.json."""
    config = _without_paths(trained.config)
    digest = weights_digest(trained.params)
    own = [
        r | {"protocol": r["protocol"] | {"data": _last_part(r["protocol"]["data"])}}
        for r in records
        if r["protocol"]["weights"]["digest"] == digest
    ]
    robust = _percent(own, "autoattack", config.threat)
    return {
        "link": "",
        "name": config.name,
        "authors": "",
        "additional_data": bool(config.model.pretrained),
        "number_forward_passes": 1,
        "dataset": config.data.name,
        "venue": "Unpublished",
        "architecture": config.model.name,
        "eps": in_255ths(config.threat.eps),
        "clean_acc": _percent(own, "clean", config.threat),
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
    public.data.dir = ""
    public.data.name = _last_part(config.data.name)
    if not config.model.pretrained.startswith(weights.HUB_PREFIX):
        public.model.pretrained = config.model.pretrained.rstrip("/").rpartition("/")[2]
    return public.lock()


def _last_part(data: str) -> str:
    """'folder:/home/me/flowers test' -> 'folder:flowers test'; other data sets as they are."""
    return re.sub(r"^folder:.*/(?=[^/])", "folder:", data, flags=re.DOTALL).rstrip("/")


def _percent(records: Sequence[dict[str, Any]], attack: str, threat: ConfigDict) -> str | None:
    """The accuracy in per cent under the trained threat, on the most images; None if not measured.

    A string with two digits after the point, as RobustBench has it.
    """

    def fits(record):
        protocol = record["protocol"]
        norm, eps = protocol.get("norm", threat.norm), protocol.get("eps", threat.eps)
        same_threat = norm == threat.norm and abs(eps - threat.eps) < 1e-6
        return record["attack"].startswith(attack) and same_threat

    measured = [record for record in records if fits(record)]
    if not measured:
        return None
    best = max(measured, key=lambda record: record["protocol"]["num_examples"])
    return f"{100 * best['accuracy']:.2f}"


def export_workdir(workdir: str | epath.Path, which: str, output: str = "") -> epath.Path:
    """Exports the ``best`` or ``last`` weights of a work directory; default output: WORKDIR/export.

    Raises:
      UserError: there are no such weights, or the directory can't be written (see ``export``).
    """
    workdir = epath.Path(workdir).expanduser()
    path = epath.Path(output).expanduser() if output else workdir / "export"
    if output:
        check_directory(path, "--output")  # before the weights are read
    trained = load_trained(workdir, which)
    metadata = describe(trained, read_records(workdir))
    return export(trained.params, trained.model, path, metadata)
