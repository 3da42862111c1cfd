"""Training objectives in one table: natural, AT, TRADES and MART.

natural  cross-entropy on the clean image
at       Madry et al. 2018: cross-entropy on the adversarial image
trades   Zhang et al. 2019: CE(clean) + beta * KL(clean || adversarial)
mart     Wang et al. 2020: boosted CE(adversarial) + beta * KL * (1 - p_clean(y))

All that tells one from the others is its row in ``OBJECTIVES``; docs/extend.md adds one. Losses are
means over the batch, so micro-batches of equal size average to the whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_at import config as configuration
from vit_at.attacks import Threat, losses
from vit_at.errors import UserError, nearest
from vit_at.models import Apply

Array = jax.Array
Terms = dict[str, tuple[Array, float]]
BOTH = CLEAN, ADVERSARIAL = "clean", "adversarial"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What makes one objective.

    label: in reports.
    attack: what the training attack maximises, (logits, targets, clean logits) -> [B]; None: no
      attack.
    terms: what the update minimises, (clean logits, adversarial logits, targets, beta) ->
      {name: (scalar, weight)}; logits of images not in ``images`` are None.
    images: what the update passes over: CLEAN, ADVERSARIAL or BOTH.
    start: of the perturbation: 'uniform' in the ball, or 'gaussian', tiny (TRADES and MART).
    zero_start: whether the attack has a gradient at the image, so that it may start there.
    attack_needs_clean: whether the attack takes the clean logits: one pass more.
    plain_labels: whether the terms need one label per image, so that images can't be mixed.
    """

    label: str
    attack: Callable[..., Array] | None
    terms: Callable[..., Terms]
    images: tuple[str, ...]
    start: str = "uniform"
    zero_start: bool = True
    attack_needs_clean: bool = False
    plain_labels: bool = False


def ce_attack(logits: Array, targets: Array, clean: Array | None) -> Array:
    """Cross-entropy, [B]."""
    return losses.cross_entropy(logits, targets)


def kl_attack(logits: Array, targets: Array, clean: Array) -> Array:
    """KL(clean || adversarial), [B]."""
    return losses.kl_divergence(clean, logits)


def _natural_terms(clean: Array, adv: None, targets: Array, beta: float) -> Terms:
    return {"natural": (losses.cross_entropy(clean, targets).mean(), 1.0)}


def _at_terms(clean: None, adv: Array, targets: Array, beta: float) -> Terms:
    return {"ce_adv": (losses.cross_entropy(adv, targets).mean(), 1.0)}


def _trades_terms(clean: Array, adv: Array, targets: Array, beta: float) -> Terms:
    """Neither side of the KL is detached."""
    natural = losses.cross_entropy(clean, targets).mean()
    robust = losses.kl_divergence(clean, adv).mean()
    return {"natural": (natural, 1.0), "robust": (robust, beta)}


def _mart_terms(clean: Array, adv: Array, targets: Array, beta: float) -> Terms:
    """With the constants of the authors' code; nothing is detached."""
    labels = jnp.argmax(targets, axis=-1)
    p_clean, p_adv = jax.nn.softmax(clean), jax.nn.softmax(adv)
    ce_adv = losses.cross_entropy(adv, targets).mean()
    p_wrong = losses.pick(p_adv, losses.best_wrong_class(adv, labels))
    margin = -jnp.log(1.0001 - p_wrong + 1e-12).mean()
    kl = jnp.sum(p_clean * (jax.nn.log_softmax(clean) - jnp.log(p_adv + 1e-12)), axis=-1)
    robust = (kl * (1.0000001 - losses.pick(p_clean, labels))).mean()
    return {"ce_adv": (ce_adv, 1.0), "margin": (margin, 1.0), "robust": (robust, beta)}


OBJECTIVES = {
    "natural": Objective("natural", None, _natural_terms, (CLEAN,)),
    "at": Objective("AT", ce_attack, _at_terms, (ADVERSARIAL,)),
    "trades": Objective(
        "TRADES",
        kl_attack,
        _trades_terms,
        BOTH,
        start="gaussian",
        zero_start=False,  # KL has no gradient where both logits are equal
        attack_needs_clean=True,
        plain_labels=True,
    ),
    "mart": Objective("MART", ce_attack, _mart_terms, BOTH, start="gaussian", plain_labels=True),
}


_CLEAN_PASS = 2**16  # more than there are balls, whose numbers ``step`` folds in


def folded(rngs: Any, number: int) -> Any:
    """Other keys, in place of a key, keys [B], or a tree of these."""

    def fold(keys: Array) -> Array:
        if keys.ndim:
            return jax.vmap(fold)(keys)
        return jax.random.fold_in(keys, number)

    return jax.tree.map(fold, rngs)


def training_loss(
    objective: str,
    apply: Apply,
    params: Any,
    images: Array,
    adversarial: Array,
    targets: Array,
    *,
    beta: float = 6.0,
    rngs: dict[str, Array] | None = None,
    clean_logits: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The loss to minimise, and its terms.

    Args:
      objective: a name in ``OBJECTIVES``.
      apply: ``apply(params, images01, attn_grad_keep, train, rngs) -> logits``, see
        ``models.classifier``.
      images, adversarial: [B, H, W, C] in [0, 1]; no gradient flows into ``adversarial``.
      targets: [B, num_classes] probabilities.
      beta: weight of the robust term of TRADES and MART.
      rngs: {'drop_path': key or keys [B]}, for stochastic depth, which drops other branches in the
        clean pass than in the adversarial one.
      clean_logits: of ``images``, differentiable by the parameters, if they have been computed
        before; None: computed here, in training mode, where the objective needs them.

    Returns:
      (scalar, aux): aux has 'logits_clean' and 'logits_adv', None where the objective does not
      compute them, and the terms by name, among 'natural', 'ce_adv', 'margin' and 'robust'.
    """
    row, adv = OBJECTIVES[objective], None
    clean = clean_logits if CLEAN in row.images else None
    if CLEAN in row.images and clean is None:
        own = folded(rngs, _CLEAN_PASS) if row.images == BOTH else rngs
        clean = apply(params, images, train=True, rngs=own)
    if ADVERSARIAL in row.images:
        adv = apply(params, jax.lax.stop_gradient(adversarial), train=True, rngs=rngs)
    weighted = row.terms(clean, adv, targets, beta)
    loss: Any = sum(term * weight for term, weight in weighted.values())
    terms: dict[str, Any] = {name: term for name, (term, _) in weighted.items()}
    return loss, terms | {"logits_clean": clean, "logits_adv": adv}


def check(config: ConfigDict) -> None:
    """``config.validate``, and a UserError where a field contradicts the objective."""
    configuration.validate(config)
    name = config.objective
    if name not in OBJECTIVES:
        raise UserError(
            f"objective is '{name}', which is unknown; allowed are {', '.join(OBJECTIVES)} "
            f"(nearest: {nearest(str(name), OBJECTIVES, 1)})"
        )
    row = OBJECTIVES[name]
    _check_attack(config)
    if config.threat.start == "zero" and not row.zero_start:
        raise UserError(
            f"threat.start is 'zero', where the loss of the {row.label} attack has no gradient; "
            f"use 'random' with objective '{name}'"
        )
    if config.mixing.probability and row.plain_labels:
        raise UserError(
            f"mixing.probability is {config.mixing.probability:g}, but {name} needs plain labels; "
            "set it to 0 or use objective 'at'"
        )
    if row.attack is None and config.awp.gamma:
        raise UserError(
            f"awp.gamma is {config.awp.gamma:g}, but objective '{name}' has no attack; set it to 0 "
            "or choose another objective"
        )
    if row.attack is None and config.threat.also:
        raise UserError(
            f"threat.also is '{config.threat.also}', but objective '{name}' has no attack; set it "
            "to '' or choose another objective"
        )
    masked = config.masking.ard or config.masking.prm
    if masked and row.attack is None:
        raise UserError(
            f"masking.ard or masking.prm is on, but objective '{name}' has no attack to mask; "
            "turn them off or choose another objective"
        )
    warmups = {
        "threat.eps_warmup_epochs": config.threat.eps_warmup_epochs if row.attack else 0,
        "masking.warmup_epochs": config.masking.warmup_epochs if masked else 0,
        "awp.warmup_epochs": config.awp.warmup_epochs if config.awp.gamma else 0,
    }
    for field, epochs in warmups.items():
        if epochs > config.epochs:
            raise UserError(
                f"{field} is {epochs:g}, but the run ends after {config.epochs} epochs, before "
                f"full strength; it must be at most {config.epochs}"
            )


def _check_attack(config: ConfigDict) -> None:
    norms = [threat.norm for threat in Threat.all_of(config.threat)]
    unsuited = {
        "a norm is 'l1'; use pgd, or linf and l2": "l1" in norms,
        "threat.start is 'noise'; use pgd, or random or zero": config.threat.start == "noise",
        "masking.prm is on; use pgd, or ARD alone": config.masking.prm,
    }
    for found in [words for words, clashes in unsuited.items() if clashes]:
        if config.threat.method == "apgd":
            raise UserError(f"threat.method is 'apgd', but {found}")
