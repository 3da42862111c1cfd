"""Flags that say when a robust accuracy can't be trusted.

    found = audit.audit(logits_fn, images, labels, result, surrogates={"other": adversarial})
    print(found.summary())

docs/audit.md explains each flag: raised if, what it means, what to do. Some checks need no attack,
some compare attacks; the curves over eps and over steps come from APGD-CE. Together they take a
fraction of the time of AutoAttack on the same images.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks import apgd, autoattack, curves, losses
from vit_at.attacks.autoattack import Budget, Result, Settings
from vit_at.attacks.norms import NORMS, random_directions
from vit_at.attacks.threat import Threat

Array = jax.Array
MEANING = {
    "randomised": "two calls on the same images give different logits",
    "probabilities": "the outputs are probabilities, not logits",
    "zero-gradients": "the DLR loss has no gradient for some images",
    "saturated-softmax": "the cross-entropy has no gradient for some images where DLR has one",
    "losses-disagree": "APGD on the DLR loss breaks images that APGD on the cross-entropy does not",
    "square-wins": "Square breaks images that the attacks with gradients do not",
    "more-steps-weaker": "the robust accuracy rises with more attack steps",
    "robust-at-any-eps": "images stay robust where every image is within reach",
    "unconfirmed": "a forward pass does not confirm successes of the attacks",
    "transfer-wins": "another model's adversarial images break what white-box attacks do not",
}
CURVE_EPS = (0.5, 1.0, 2.0, 4.0)  # times eps; then the whole image range
CURVE_STEPS = (10, 50, 100)
_CURVE_ITERATIONS = 20  # for the curve over eps
_DIFFERENT = 1e-4  # of unit-length logits, as in the official checks
_PROBABILITY = 1e-5
_MARGIN = 0.002  # of accuracy, as in the official check of Square


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
        lines = [f"flag {n}: {MEANING[n]} ({found})" for n, found in self.flags.items()]
        return "\n".join([*lines, "see docs/audit.md"]) if lines else "no flags"


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
      evaluated: the result of that call on the same images, or the settings of one: then without
        the flags that judge a result.
      surrogates: {name: adversarial images of another model, [N, H, W, C]}.
    """
    result = evaluated if isinstance(evaluated, Result) else None
    settings = evaluated if isinstance(evaluated, Settings) else evaluated.settings
    flags = check_model(logits_fn, images, labels, settings)
    if "randomised" in flags:
        return Audit(flags, {}, {})

    same = {name: getattr(settings, name) for name in ("norm", "batch_size", "seed", "mesh")}

    @functools.cache
    def robust(threat, attack="apgd-ce"):
        own = {"eps": threat.eps, "attacks": [attack], "budget": Budget(iterations=threat.steps)}
        found = autoattack.run(logits_fn, images, labels, **same, **own)
        return list(found.robust.values())[-1]

    threat, count = Threat(settings.norm, settings.eps), int(np.prod(images.shape[1:]))
    short = dataclasses.replace(threat, steps=_CURVE_ITERATIONS)
    whole = dataclasses.replace(short, eps=NORMS[settings.norm].diameter(count))
    logits = _logits(logits_fn, images, settings.batch_size)
    radii = [*curves.at_factors(short, CURVE_EPS, count), whole]
    eps_curve = curves.over_eps(losses.is_correct(logits, labels, np), robust, radii)
    by_steps = curves.at_steps(threat, CURVE_STEPS)
    steps_curve = curves.over_steps(robust, by_steps)
    flags |= judge_curves(eps_curve, steps_curve, len(images))
    if logits.shape[1] >= 3:
        longest = max(by_steps, key=lambda t: t.steps)
        flags |= _compare_losses(robust(longest), robust(longest, "apgd-dlr"))
    if result is not None:
        flags |= judge_result(result)
        flags |= judge_transfer(logits_fn, labels, result, surrogates or {})
    return Audit(flags, eps_curve, steps_curve)


def check_model(
    logits_fn: Callable[[Array], Array], images: np.ndarray, labels: np.ndarray, settings: Settings
) -> dict[str, str]:
    """The flags that need no attack, on at most a batch of images."""
    batch = jnp.asarray(images[: settings.batch_size], jnp.float32)
    classes = jnp.asarray(labels[: settings.batch_size], jnp.int32)
    flags, logits = {}, np.asarray(logits_fn(batch))
    again = np.asarray(logits_fn(batch))  # not jitted, to expose hidden state
    lengths = np.linalg.norm(logits, axis=1) + 1e-10
    change = np.linalg.norm(logits - again, axis=1) / lengths
    if change.max() > _DIFFERENT:
        return {"randomised": f"they differ by up to {change.max():.2g} of their length"}
    sums = np.abs(logits.sum(1) - 1)
    if logits.min() > -_PROBABILITY and max(logits.max() - 1, sums.max()) < _PROBABILITY:
        flags["probabilities"] = f"all are in [0, 1] and add up to 1 on {len(logits)} images"
    correct = losses.is_correct(logits, np.asarray(classes), np)
    if logits.shape[1] >= 3 and correct.any():
        flags |= _check_gradients(logits_fn, batch, classes, correct, settings)
    return flags


def _check_gradients(logits_fn, images, labels, correct, settings) -> dict[str, str]:
    """The flags of losses without a gradient, at the image or at APGD's random start."""
    norm, keys = settings.norm, jax.random.split(jax.random.key(0), len(images))
    directions = random_directions(keys, images.shape[1:], norm)
    begin = apgd.start(images, directions, Threat(norm, settings.eps)).point

    # The loss is compiled separately. XLA would fuse it with a multiplication at the model's end
    # and round once, so the gradient of a saturated softmax would be rounding errors, not zeros.
    one_hot = functools.partial(jax.nn.one_hot, labels)
    of_losses = [
        jax.jit(jax.grad(lambda z: losses.cross_entropy(z, one_hot(z.shape[1])).sum())),
        jax.jit(jax.grad(lambda z: losses.dlr(z, labels).sum())),
    ]
    forward = jax.jit(logits_fn)
    backward = jax.jit(lambda x, cotangent: jax.vjp(logits_fn, x)[1](cotangent)[0])

    def vanishes(points):
        logits = forward(points)
        gradients = [backward(points, gradient(logits)) for gradient in of_losses]
        return [(g == 0).all((1, 2, 3)) for g in gradients]

    at_image, at_start = jax.device_get((vanishes(images), vanishes(begin)))
    zero = [a | b for a, b in zip(at_image, at_start, strict=True)]
    flags, count = {}, int(correct.sum())
    by_ce, by_dlr = (int((z & correct).sum()) for z in zero)
    only_ce = int((zero[0] & ~zero[1] & correct).sum())
    if by_dlr:
        flags["zero-gradients"] = f"{by_dlr} of {count} correct images"
    if only_ce:
        flags["saturated-softmax"] = f"{only_ce} of {count} correct images, {by_ce} for CE in all"
    return flags


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
    if steps_curve[most] > steps_curve[lowest] + max(_MARGIN, 1.5 / count):
        rise = f"{steps_curve[lowest]:.1%} after {lowest} steps, {steps_curve[most]:.1%} after"
        flags["more-steps-weaker"] = f"{rise} {most} (from {fewest})"
    return flags


def judge_result(result: Result) -> dict[str, str]:
    """The flags of what a cascade found: unconfirmed successes, and what Square adds."""
    flags = {}
    unconfirmed = sum(work["unconfirmed"] for work in result.work.values())
    if unconfirmed or result.failures:
        flags["unconfirmed"] = f"{unconfirmed} in the attacks, {len(result.failures)} at the end"
    names = list(result.robust)
    if "square" not in names[2:]:  # after 'clean' and a white-box attack
        return flags
    earlier = [result.robust[name] for name in names[: names.index("square")]]
    kept = np.logical_and.reduce(earlier)  # of attacks that ran individually, too
    before = float(kept.mean())
    fell = before - float((kept & result.robust["square"]).mean())
    if fell > _MARGIN:
        flags["square-wins"] = f"the robust accuracy fell from {before:.2%} by {fell:.2%}"
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
    """Logits [N, K], in batches and not jitted."""
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(logits_fn(jnp.asarray(b, jnp.float32))) for b in batches])
