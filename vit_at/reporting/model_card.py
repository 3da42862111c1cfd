"""The model card: the README.md beside exported weights."""

import json
import re
from collections.abc import Sequence
from typing import Any

from vit_at.config import flatten
from vit_at.reporting.facts import facts
from vit_at.reporting.study import method
from vit_at.training.objectives import OBJECTIVES
from vit_at.workdir.results import as_text

_LOADING = """\
```python
from load import load  # the file of this folder; needs torch, timm and safetensors

model = load()
logits = model(images)  # images [B, C, H, W]
```"""
_BY_TIMM = (
    '`timm.create_model("local-dir:THIS FOLDER", pretrained=True)` gives the same model without '
    "the normalisation."
)
_NOT_BY_TIMM = (
    "timm has no such model, as its stem is convolutional or its LayerNorm has another eps; "
    "`load.py` builds it from timm's pieces."
)


def quoted(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"[\\`*{}\[\]<>#|~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def model_card(about: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read.

    about: the content of ``model.json``.
    """
    training = about.get("training")
    parts = [
        _front_matter(about),
        f"# {quoted(about.get('name') or about['architecture'])}",
        _summary(about, training),
        "## Use",
        f"Images are {about['image_size']} x {about['image_size']} pixels in [0, 1]; they are "
        "normalised before the model, and eps is in pixel units before that.",
        _LOADING,
        _BY_TIMM if about.get("timm", {}).get("complete", True) else _NOT_BY_TIMM,
        "## Results",
        _results(about.get("results") or ()),
    ]
    if training:
        rows = [f"- {what} {quoted(how)}" for what, how in facts(training)]
        parts += ["## Training", "\n".join(rows)]
    parts += ["## Limits", _limits(about, training)]
    return "\n\n".join(parts) + "\n"


def _front_matter(about: dict[str, Any]) -> str:
    lines = ["---", "library_name: timm", "pipeline_tag: image-classification"]
    lines += ["tags:", "- adversarial-robustness", "- vision-transformer"]
    if about.get("dataset"):
        lines += ["datasets:", f"- {json.dumps(about['dataset'])}"]  # YAML quotes like JSON
    return "\n".join([*lines, "---"])


def _summary(about: dict[str, Any], training: dict[str, Any] | None) -> str:
    text = f"{quoted(about['architecture'])}, patch {about['patch_size']}"
    if training is None:
        return f"{text}, exported by vit_at."
    return (
        f"{text}, trained on {quoted(about['dataset'])} by vit_at: {method(flatten(training))}. "
        "The method is that of Mo et al., “When Adversarial Training Meets Vision Transformers”, "
        "NeurIPS 2022 (arXiv 2210.07540); the weights are not the authors'."
    )


def _results(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return "These weights have not been evaluated."
    said = "Accuracy and the main fields of its protocol; the whole protocol is in `model.json`."
    text = as_text(records)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    notes = {note: None for record in records for note in record.get("notes", ())}
    return "\n\n".join([said, f"{fence}\n{text}\n{fence}", *map(quoted, notes)])


def _limits(about: dict[str, Any], training: dict[str, Any] | None) -> str:
    attacks = {record["attack"] for record in about.get("results") or ()}
    text = "Robustness holds for this norm and eps only, and for images like the training images."
    if training and not OBJECTIVES[training["objective"]].attack:
        return "These weights were trained naturally: they are not robust."
    if not any(attack.startswith("autoattack") for attack in attacks):
        text += " AutoAttack has not been run, so the robust accuracies are only upper bounds."
    return text
