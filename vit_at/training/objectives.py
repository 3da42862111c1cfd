"""Training objectives: natural, AT, TRADES and MART.

at      Madry et al. 2018: cross-entropy on the adversarial image
trades  Zhang et al. 2019: CE(clean) + beta * KL(clean || adversarial)
mart    Wang et al. 2020: boosted CE(adversarial) + beta * KL * (1 - p_clean(y))

Each has two sides: the loss its attack maximises, and the loss its update minimises. Losses are
means over the batch, so micro-batches of equal size average to the whole.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vit_at.attacks import losses
from vit_at.config import CHOICES

Array = jax.Array
OBJECTIVES = CHOICES["objective"]
# The attack of TRADES and MART starts at this times N(0, 1), in normalised units: where the clean
# image is, KL has no gradient.
GAUSSIAN_START = ("trades", "mart")
START_SCALE = 0.001


def attack_loss(
    objective: str,
    apply: Callable[..., Array],
    params: Any,
    images: Array,
    targets: Array,
    clean_logits: Array | None = None,
) -> Callable[[Array, Array | None], Array]:
    """The scalar that the training attack maximises, summed over the batch.

    The sum, not the mean: examples don't interact, and a sum needs no batch size across devices.
    The clean logits of TRADES do not depend on the perturbation: computed once, here, if not given.
    """
    if objective == "trades":
        if clean_logits is None:
            clean_logits = apply(params, images)
        clean_logits = jax.lax.stop_gradient(clean_logits)
        return lambda x, keep: losses.kl_divergence(clean_logits, apply(params, x, keep)).sum()
    return lambda x, keep: losses.cross_entropy(apply(params, x, keep), targets).sum()


def training_loss(
    objective: str,
    apply: Callable[..., Array],
    params: Any,
    images: Array,
    adversarial: Array,
    targets: Array,
    *,
    beta: float = 6.0,
    rngs: dict[str, Array] | None = None,
    clean_logits: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss to minimise, and its terms.

    Args:
      apply: ``apply(params, images01, attn_grad_keep, train, rngs) -> logits``, see
        ``models.classifier``.
      images, adversarial: [B, H, W, C] in [0, 1]; no gradient flows into ``adversarial``.
      targets: [B, num_classes] probabilities.
      clean_logits: of ``images``, differentiable by the parameters, where TRADES or MART need them
        and they have been computed before; None: computed here, in training mode.

    Returns:
      (scalar, aux): aux has 'logits_clean' and 'logits_adv', None where the objective does not
      compute them, and the objective's terms among 'natural', 'ce_adv', 'margin', 'robust'.
    """
    adversarial = jax.lax.stop_gradient(adversarial)

    def forward(x):
        return apply(params, x, train=True, rngs=rngs)

    if objective == "natural":
        logits = forward(images)
        loss = losses.cross_entropy(logits, targets).mean()
        return loss, {"natural": loss, "logits_clean": logits, "logits_adv": None}
    if objective == "at":
        logits = forward(adversarial)
        loss = losses.cross_entropy(logits, targets).mean()
        return loss, {"ce_adv": loss, "logits_clean": None, "logits_adv": logits}
    clean = forward(images) if clean_logits is None else clean_logits
    adv = forward(adversarial)
    terms = _trades_terms if objective == "trades" else _mart_terms
    weighted = terms(clean, adv, targets, beta)
    loss = sum(term * weight for term, weight in weighted.values())
    aux = {name: term for name, (term, _) in weighted.items()}
    return loss, aux | {"logits_clean": clean, "logits_adv": adv}


def _trades_terms(clean: Array, adv: Array, targets: Array, beta: float) -> dict:
    """{name: (term, weight)}; neither side of the KL is detached."""
    natural = losses.cross_entropy(clean, targets).mean()
    robust = losses.kl_divergence(clean, adv).mean()
    return {"natural": (natural, 1.0), "robust": (robust, beta)}


def _mart_terms(clean: Array, adv: Array, targets: Array, beta: float) -> dict:
    """{name: (term, weight)}, with the constants of the authors' code; nothing is detached."""
    labels = jnp.argmax(targets, axis=-1)
    p_clean, p_adv = jax.nn.softmax(clean), jax.nn.softmax(adv)
    ce_adv = losses.cross_entropy(adv, targets).mean()
    p_wrong = losses.pick(p_adv, losses.best_wrong_class(adv, labels))
    margin = -jnp.log(1.0001 - p_wrong + 1e-12).mean()
    kl = jnp.sum(p_clean * (jax.nn.log_softmax(clean) - jnp.log(p_adv + 1e-12)), axis=-1)
    robust = (kl * (1.0000001 - losses.pick(p_clean, labels))).mean()
    return {"ce_adv": (ce_adv, 1.0), "margin": (margin, 1.0), "robust": (robust, beta)}
