"""More flags that say when a robust accuracy can't be trusted, and two curves.

    found = audit.audit(logits_fn, images, labels, result, surrogates={"other": adversarial})
    print(found.summary())

docs/audit.md explains each flag: raised if, what it means, what to do. A result has the flags of
``flags`` already, so the audit of a result holds the others. The curves over eps and over steps
come from APGD-CE. All of it takes a fraction of the time of AutoAttack on the same images.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks import autoattack, curves, losses
from vit_at.attacks.autoattack import Budget, Result, Settings
from vit_at.attacks.autoattack.checks import Classifier, as_batch_function, read
from vit_at.attacks.autoattack.flags import MARGIN, check_model, in_words
from vit_at.attacks.autoattack.functions import as_function
from vit_at.attacks.norms import NORMS
from vit_at.attacks.threat import Threat
from vit_at.distributed import sharding
from vit_at.distributed.precision import check_precision, products
from vit_at.errors import UserError

Array = jax.Array
CURVE_EPS = (0.5, 1.0, 2.0, 4.0)  # times eps; then the whole image range
CURVE_STEPS = (10, 50, 100)
_CURVE_ITERATIONS = 20  # for the curve over eps


@dataclasses.dataclass(frozen=True)
class Audit:
    """flags: {name in MEANING: what was found}; curves: {eps: accuracy} and {steps: accuracy}."""

    flags: dict[str, str]
    eps_curve: dict[float, float]
    steps_curve: dict[int, float]

    def record(self) -> dict[str, Any]:
        """As JSON values, for ``results.json``."""
        return {
            "flags": self.flags,
            "eps_curve": [[eps, accuracy] for eps, accuracy in self.eps_curve.items()],
            "steps_curve": [[steps, accuracy] for steps, accuracy in self.steps_curve.items()],
        }

    def summary(self) -> str:
        """One line for each flag."""
        return "\n".join(in_words(self.flags)) if self.flags else "no flags by the audit"


def audit(
    logits_fn: Callable[[Array], Array],
    images: np.ndarray,
    labels: np.ndarray,
    evaluated: Result | Settings,
    *,
    surrogates: Mapping[str, np.ndarray] | None = None,
) -> Audit:
    """Runs all checks on the images given; a few hundred are enough.

    Args:
      logits_fn, images, labels: as for ``autoattack.run``.
      evaluated: the result of that call on the same images; or the settings of one: then with the
        flags of the model, and without those that judge a result.
      surrogates: {name: adversarial images of another model, [N, H, W, C]}.

    Raises:
      UserError: the attacks are 'rand', or the devices can't compute in the precision.
    """
    settings = evaluated if isinstance(evaluated, Settings) else evaluated.settings
    if settings.randomised:
        raise UserError(
            "attacks is 'rand', but the audit takes no randomised model; audit the function with "
            "its key fixed, and attacks='standard'"
        )
    check_precision("precision", settings.precision, settings.mesh)
    images = images if hasattr(images, "shape") else np.asarray(images)
    images, labels = read(images, np.arange(len(labels))), np.asarray(labels)
    with products(settings.precision):
        return _audit(logits_fn, images, labels, evaluated, settings, surrogates or {})


def _audit(logits_fn, images, labels, evaluated, settings, surrogates) -> Audit:
    result = evaluated if isinstance(evaluated, Result) else None
    own = {} if result else check_function(logits_fn, images, labels, settings)
    if "randomised" in (result.flags if result else own):
        return Audit(own, {}, {})

    fields = ("norm", "batch_size", "seed", "mesh", "precision")
    same = {name: getattr(settings, name) for name in fields}

    @functools.cache
    def robust(threat, attack="apgd-ce"):
        budget = Budget(iterations=threat.steps)
        changed = {"eps": threat.eps, "attacks": [attack], "budget": budget}
        found = autoattack.run(logits_fn, images, labels, **same, **changed)
        return list(found.robust.values())[-1]

    threat, count = Threat(settings.norm, settings.eps), int(np.prod(images.shape[1:]))
    short = dataclasses.replace(threat, steps=_CURVE_ITERATIONS)
    whole = dataclasses.replace(short, eps=NORMS[settings.norm].diameter(count))
    logits = _logits(logits_fn, images, settings.batch_size)
    radii = [*curves.at_factors(short, CURVE_EPS, count), whole]
    eps_curve = curves.over_eps(losses.is_correct(logits, labels, np), robust, radii)
    by_steps = curves.at_steps(threat, CURVE_STEPS)
    steps_curve = curves.over_steps(robust, by_steps)
    flags = own | judge_curves(eps_curve, steps_curve, len(images))
    if logits.shape[1] >= 3:
        longest = max(by_steps, key=lambda t: t.steps)
        flags |= _compare_losses(robust(longest), robust(longest, "apgd-dlr"))
    if result is not None:
        flags |= judge_transfer(logits_fn, labels, result, surrogates)
    return Audit(flags, eps_curve, steps_curve)


def check_function(
    logits_fn: Any, images: np.ndarray, labels: np.ndarray, settings: Settings
) -> dict[str, str]:
    """``flags.check_model`` of what ``autoattack.run`` takes."""
    model = sharding.replicate(as_function(logits_fn), settings.mesh)
    images, labels = images[: settings.batch_size], np.asarray(labels)[: settings.batch_size]
    classify = Classifier(model, settings, images.shape[1:])
    logits = classify(images, settings.batch_size, np.arange(len(images)))
    return check_model(classify, images, logits, labels, settings)


def _compare_losses(by_ce: np.ndarray, by_dlr: np.ndarray) -> dict[str, str]:
    """The flag for images that DLR breaks and CE does not. A few of them are normal."""
    missed = by_ce.sum() - by_dlr.sum()
    if missed <= max(1, 0.05 * len(by_ce)):
        return {}
    found = f"robust to CE {by_ce.sum()}, to DLR {by_dlr.sum()}, of {len(by_ce)} images"
    return {"losses-disagree": found}


def judge_curves(
    eps_curve: Mapping[float, float], steps_curve: Mapping[int, float], count: int
) -> dict[str, str]:
    """The flags of the two curves, measured on ``count`` images."""
    flags = {}
    widest = max(eps_curve)
    if eps_curve[widest] > 0:
        flags["robust-at-any-eps"] = f"{eps_curve[widest]:.1%} at eps {widest:g}"
    fewest, most = min(steps_curve), max(steps_curve)
    lowest = min(steps_curve, key=lambda steps: steps_curve[steps])
    if steps_curve[most] > steps_curve[lowest] + max(MARGIN, 1.5 / count):
        rise = f"{steps_curve[lowest]:.1%} after {lowest} steps, {steps_curve[most]:.1%} after"
        flags["more-steps-weaker"] = f"{rise} {most} (from {fewest})"
    return flags


def judge_transfer(
    logits_fn: Callable[[Array], Array],
    labels: np.ndarray,
    result: Result,
    surrogates: Mapping[str, np.ndarray],
) -> dict[str, str]:
    """The flag of adversarial images that were made for other models within the same threat."""
    robust, labels = list(result.robust.values())[-1], np.asarray(labels)
    flags = {}
    for name, points in surrogates.items():
        logits = _logits(logits_fn, points, result.settings.batch_size)
        broken = int((robust & ~losses.is_correct(logits, labels, np)).sum())
        if broken:
            flags["transfer-wins"] = f"{broken} of {int(robust.sum())} robust images by {name}"
    return flags


def _logits(logits_fn, images, batch_size) -> np.ndarray:
    """Logits [N, K] of what ``autoattack.run`` takes, in batches and not jitted."""
    model = as_batch_function(as_function(logits_fn), randomised=False)
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(model(jnp.asarray(b, jnp.float32))) for b in batches])
