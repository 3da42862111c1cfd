"""What several fields say together: the balls, and which weights are tested."""

from ml_collections import ConfigDict

from vit_at.config.fields import CHOICES
from vit_at.errors import UserError


def fraction(text: str) -> float:
    """'8/255' or '0.03', as perturbation sizes are written, as a number; ValueError: neither."""
    top, _, bottom = text.partition("/")
    if bottom and not float(bottom):
        raise ValueError(f"'{text}' divides by 0")
    return float(top) / float(bottom or 1)


def training_balls(threat: ConfigDict) -> list[ConfigDict]:
    """``threat``, then a copy of it for each NORM:EPS:STEP_SIZE of ``threat.also``, in any case.

    UserError: one can't be read, or its norm is unknown or named before.
    """
    norms, found = CHOICES["threat.norm"], {threat.norm: threat}
    for text in filter(None, map(str.strip, threat.also.lower().split(","))):
        norm, *numbers = text.split(":")
        try:
            eps, step_size = map(fraction, numbers)
        except ValueError:
            raise UserError(
                f"threat.also has '{text}'; write NORM:EPS:STEP_SIZE, such as 'l2:0.5:0.125'"
            ) from None
        if norm in found or norm not in norms:
            raise UserError(
                f"threat.also has '{text}', whose norm is named before or unknown; name each of "
                f"{', '.join(norms)} at most once"
            )
        found[norm] = ConfigDict({**threat, "norm": norm, "eps": eps, "step_size": step_size})
    return list(found.values())


def evaluation_threat(config: ConfigDict) -> ConfigDict:
    """The threat of validation and evaluation: ``threat``, with what ``eval.threat`` changes.

    Without a step size there, steps are those of training, but at most a quarter of eps, as in
    published evaluations: FGSM and PGD-2 train with longer ones.

    Raises:
      UserError: the norm is another one than in training, and eps or step_size is not given.
    """
    threat, own = config.threat.copy_and_resolve_references().unlock(), config.eval.threat
    changes = {field: own[field] for field in ("norm", "eps", "step_size") if own[field]}
    if changes.get("norm", threat.norm) != threat.norm and len(changes) < 3:
        raise UserError(
            f"eval.threat.norm is {own.norm}, but threat.norm is {threat.norm}, whose eps means "
            "something else; give eval.threat.eps and eval.threat.step_size too"
        )
    threat.update(changes)
    if not own.step_size:
        threat.step_size = min(threat.step_size, threat.eps / 4)
    return threat


def evaluated_weights(config: ConfigDict) -> str:
    """Which weights are validated and tested, ``eval.weights``: raw, ema or swa."""
    if config.eval.weights:
        return config.eval.weights
    return "swa" if config.swa_epochs else "ema" if config.ema_decay else "raw"
