"""What a configuration says of a training, in words: for the model card and the report."""

from typing import Any

from vit_at.config import flatten
from vit_at.reporting.study import method
from vit_at.training.objectives import OBJECTIVES
from vit_at.workdir.results import in_255ths

Values = dict[str, Any]
_STEPS = {"pgd": "steps", "apgd": "steps of APGD, at first"}
_STARTS = {"random": "", "zero": ", from the image itself", "noise": ", from noise, not projected"}


def facts(config: Values) -> list[tuple[str, str]]:
    """(label, text) of what a configuration, as nested dicts, says of the training.

    What is off is left out, so that an unusual training stands out.
    """
    attacks = OBJECTIVES[config["objective"]].attack
    said = [
        ("training", [method(flatten(config))]),
        ("model", _model(config["model"])),
        ("started from", [config["model"]["pretrained"] or "scratch"]),
        ("data", _data(config["data"])),
        ("augmentation", _augmentation(config["data"], config["mixing"])),
        ("label smoothing", _set("", config["label_smoothing"])),
        ("training attack", _attack(config["threat"]) if attacks else ["none"]),
        ("weight perturbation", _set("AWP, gamma ", config["awp"]["gamma"])),
        ("optimiser", _optimiser(config["optimizer"])),
        ("averaged weights", _averages(config)),
        ("length", [f"{config['epochs']} epochs", f"batch {config['batch_size']}"]),
        ("phases", [config["phases"]] if config["phases"] else []),
        ("training dtype", [config["dtype"]]),
        ("seed", [str(config["seed"])]),
    ]
    return [(label, ", ".join(parts)) for label, parts in said if parts]


def _set(words: str, value: float) -> list[str]:
    """The words and the number, unless it is 0."""
    return [f"{words}{value:g}"] if value else []


def _model(model: Values) -> list[str]:
    parts = [model["name"]]
    for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path"):
        parts += _set(f"{name} ", model[name])
    parts += _set("patch ", model["patch_size"])
    return parts + (["convolutions before the blocks"] if model["stem"] == "conv" else [])


def _data(data: Values) -> list[str]:
    parts = [f"{data['name']} at {data['image_size']} px", data["train_split"]]
    extra = data["extra"]
    if extra["name"]:
        parts.append(f"{extra['fraction']:.0%} of each batch from {extra['name']}")
    return parts


def _augmentation(data: Values, mixing: Values) -> list[str]:
    parts = _set("crop after padding by ", data["crop_padding"])
    parts += ["flip"] * data["flip"] + ([data["augment"]] if data["augment"] else [])
    if mixing["probability"]:
        parts.append(f"mixup or CutMix on {mixing['probability']:.0%} of the batches")
    return parts or ["none"]


def _attack(threat: Values) -> list[str]:
    steps, size = threat["steps"], in_255ths(threat["step_size"])
    word = _STEPS[threat["method"]] if steps > 1 else "step"
    parts = [threat["norm"], f"eps {in_255ths(threat['eps'])}"]
    parts += [f"{steps} {word} of {size}{_STARTS[threat['start']]}"]
    if threat["also"]:
        parts.append(f"the {threat['combine']} with {threat['also']}")
    warmup = threat["eps_warmup_epochs"]
    return parts + ([f"eps warm-up over {warmup:g} epochs"] if warmup else [])


def _optimiser(optimizer: Values) -> list[str]:
    parts = [optimizer["name"], f"learning rate {optimizer['learning_rate']:g}"]
    parts += [f"{optimizer['schedule']} schedule", f"weight decay {optimizer['weight_decay']:g}"]
    parts += _set("gradient clipped at ", optimizer["clip_norm"])
    decay = optimizer["layer_decay"]
    return parts + ([f"{decay:g} times the rate from a layer to the one below"] * (decay != 1))


def _averages(config: Values) -> list[str]:
    ema = _set("EMA, decay ", config["ema_decay"])
    return ema + ([f"SWA over {config['swa_epochs']:g} epochs"] if config["swa_epochs"] else [])
