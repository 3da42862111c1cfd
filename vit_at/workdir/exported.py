"""Reads a directory that ``vit-at export`` has written.

load_exported      model.safetensors, the weights under the names of timm 1.x, as a Flax model
read_description   model.json: how to build the model, its normalisation, and what is known of it
"""

import hashlib
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vit_at import weights
from vit_at.config import validate
from vit_at.errors import UserError
from vit_at.models import build
from vit_at.schema import Description, check, read_json
from vit_at.workdir.checkpoint import Trained
from vit_at.workdir.files import DESCRIPTION_FILE, as_config
from vit_at.workdir.results import check_records

WEIGHTS_FILE = "model.safetensors"
EXPORT_AGAIN = "export the work directory again"


def sha256(content: bytes) -> str:
    """Its digest, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def read_description(directory: epath.Path) -> dict[str, Any]:
    """What ``model.json`` says.

    Raises:
      UserError: it is missing or damaged, or lacks the training configuration.
    """
    path = directory / DESCRIPTION_FILE
    about = read_json(path, dict[str, Any], EXPORT_AGAIN)
    if "training" not in about or "checkpoint" not in about:
        raise UserError(
            f"{path} has no 'training' and 'checkpoint', which say how to build the model; "
            f"{EXPORT_AGAIN}"
        )
    check(about, Description, path, EXPORT_AGAIN)
    check_records(about.get("results", []), path, EXPORT_AGAIN, inside="results")
    return about


def training_config(directory: epath.Path, about: dict[str, Any]) -> ConfigDict:
    """The configuration that the weights of an export were trained with.

    about: of ``read_description``. UserError if it is damaged there.
    """
    return as_config(about["training"], directory / DESCRIPTION_FILE, ".training")


def load_exported(directory: str | epath.Path) -> Trained:
    """Reads the weights that ``reporting.exported.export`` wrote to a directory.

    Raises:
      UserError: a file is missing or changed, or ``model.json`` lacks the training configuration.
    """
    directory = epath.Path(directory)
    about = read_description(directory)
    path = directory / WEIGHTS_FILE
    config = training_config(directory, about)
    validate(config)
    if not path.exists():
        raise UserError(f"{path} is missing; copy it beside {DESCRIPTION_FILE}")
    if sha256(path.read_bytes()) != about["weights"]["sha256"]:
        raise UserError(
            f"{path} is not the file that {DESCRIPTION_FILE} describes (its SHA-256 differs); "
            f"{EXPORT_AGAIN}"
        )
    built = config.copy_and_resolve_references().unlock()
    built.model.qk_scale = 0.0  # it is in the queries' weights, see reporting.exported
    model = build(built, about["num_classes"], "float32")
    params = weights.from_timm(weights.load(path), model)
    return Trained(config, model, params, about["checkpoint"], "export")
