"""A work directory -> weights for PyTorch, with a description for leaderboards.

    python -m vit_at.export runs/NAME [--checkpoint=best|last] [--output=DIR]

writes ``model.safetensors`` under the names of timm 1.x, for a strict ``load_state_dict``, and
``model.json``: what timm's ``create_model`` must be told, the normalisation, how the model was
trained, and its results in the fields of RobustBench's ``model_info``. In PyTorch:

    about = json.load(open("model.json"))
    model = timm.create_model(**about["timm"]["create_model"])
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = about["timm"]["layer_norm_eps"]
    model.load_state_dict(safetensors.torch.load_file("model.safetensors"))

Images in [0, 1] are normalised by ``about["normalisation"]`` first.
"""

import argparse
import hashlib
import json
import re
import sys
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from vit_at import weights
from vit_at.checkpoint import Trained, load_trained, write_atomically
from vit_at.config import UserError
from vit_at.models.convit import ConViT
from vit_at.models.swin import STAGES, SwinTransformer

WEIGHTS_FILE, DESCRIPTION_FILE, RESULTS_FILE = "model.safetensors", "model.json", "results.json"


def export(params: Any, model: Any, path: str | epath.Path, metadata: dict[str, Any]) -> epath.Path:
    """Writes the weights and their description, each file whole or not at all.

    Args:
      path: a directory; created if need be.
      metadata: of ``model.json``; 'architecture' (timm's name of the model) is required.

    Returns:
      The path of the weights.
    """
    path = epath.Path(path)
    state_dict = weights.to_timm(params, model, names="1.x")
    content = safetensors.numpy.save(_fold_scale(state_dict, model), metadata={"format": "pt"})
    description = metadata | {
        "timm": {
            "create_model": timm_arguments(model, metadata["architecture"]),
            "layer_norm_eps": model.norm_eps,
        },
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "weights": {"file": WEIGHTS_FILE, "sha256": hashlib.sha256(content).hexdigest()},
    }
    text = json.dumps(description, indent=2) + "\n"
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / WEIGHTS_FILE, content)
    write_atomically(path / DESCRIPTION_FILE, text)
    return path / WEIGHTS_FILE


def timm_arguments(model: Any, name: str) -> dict[str, Any]:
    """The arguments of timm's ``create_model`` for this model, whatever was overridden."""
    arguments = {
        "model_name": re.sub("_in2[12]k$", "", name),  # one architecture with and without
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
    if isinstance(model, ConViT):  # timm counts its width per head
        width = model.embed_dim // model.num_heads
        return arguments | {"embed_dim": width, "local_up_to_layer": model.local_blocks}
    return arguments | {"embed_dim": model.embed_dim, "qkv_bias": model.qkv_bias}


def _fold_scale(state_dict: dict[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """Moves an attention scale that timm cannot be told into the queries' weights."""
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


def describe(trained: Trained, results: Any) -> dict[str, Any]:
    """The metadata of a trained model.

    results: the content of its results.json, or None.
    """
    config = trained.config
    eps = config.threat.eps * 255
    return {
        "link": "",
        "name": config.name,
        "authors": "",
        "additional_data": bool(config.model.pretrained),
        "number_forward_passes": 1,
        "dataset": config.data.name,
        "venue": "Unpublished",
        "architecture": config.model.name,
        "eps": f"{round(eps)}/255" if abs(eps - round(eps)) < 1e-6 else f"{config.threat.eps:g}",
        "clean_acc": _percent(results, "clean"),
        "reported": _percent(results, "autoattack"),
        "autoattack_acc": _percent(results, "autoattack"),
        "unreliable": False,
        "threat_model": {"linf": "Linf", "l2": "L2"}[config.threat.norm],
        "num_classes": trained.model.num_classes,
        "normalisation": {"mean": list(config.data.mean), "std": list(config.data.std)},
        "training": config.to_dict(),
        "checkpoint": trained.values,
        "results": results,
    }


def _percent(results: Any, attack: str) -> str | None:
    """The accuracy under an attack in per cent, as RobustBench writes it; None: not evaluated."""
    records = results if isinstance(results, list) else []
    for record in reversed(records):
        if isinstance(record, dict) and str(record.get("attack", "")).startswith(attack):
            return f"{100 * record['accuracy']:.2f}"
    return None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_at.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", help="what 'python -m vit_at.main --workdir=...' has written")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--output", default="", help="directory; default: WORKDIR/export")
    flags = parser.parse_args(argv)
    workdir = epath.Path(flags.workdir)
    try:
        trained = load_trained(workdir, flags.checkpoint)
        results = workdir / RESULTS_FILE
        metadata = describe(trained, json.loads(results.read_text()) if results.exists() else None)
        output = flags.output or workdir / "export"
        written = export(trained.params, trained.model, output, metadata)
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(f"vit_at.export: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {written} and {written.parent / DESCRIPTION_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
