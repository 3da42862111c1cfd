"""Flags that say when a robust accuracy can't be trusted, as far as they cost next to nothing.

``run`` raises those of this file, as the official code raises its warnings. ``audit`` raises the
others. docs/audit.md explains each: raised if, what it means, what to do.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_at.attacks import apgd, losses
from vit_at.attacks.autoattack.checks import Classifier, as_batch_function
from vit_at.attacks.autoattack.settings import Settings
from vit_at.attacks.norms import random_directions
from vit_at.attacks.threat import Threat
from vit_at.distributed import sharding

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
MARGIN = 0.002  # of accuracy, as in the official check of Square
_DIFFERENT = 1e-4  # of unit-length logits, as in the official checks
_PROBABILITY = 1e-5


def in_words(flags: dict[str, str]) -> list[str]:
    """A line for each flag."""
    return [f"flag {name}: {MEANING[name]} ({found})" for name, found in flags.items()]


def check_model(
    classify: Classifier,
    images: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    settings: Settings,
) -> dict[str, str]:
    """The flags that need no attack: {name in MEANING: what was found}.

    images: [n, H, W, C] in [0, 1], the first of the data, a batch at most; logits: [n, K], theirs;
    labels: [n].
    """
    images = images.astype(np.float32, copy=False)
    if not classify.randomised and (found := hidden_state(classify.model, images)):
        return {"randomised": found}
    flags, sums = {}, np.abs(logits.sum(1) - 1)
    if logits.min() > -_PROBABILITY and max(logits.max() - 1, sums.max()) < _PROBABILITY:
        flags["probabilities"] = f"all are in [0, 1] and add up to 1 on {len(logits)} images"
    if logits.shape[1] >= 3 and losses.is_correct(logits, labels, np).any():
        flags |= _check_gradients(classify, images, logits, labels, settings)
    return flags


def hidden_state(model: Any, images: np.ndarray) -> str:
    """How much the logits of two programs differ that JAX makes of the model; '': they are equal.

    Programs are compared before they are run: two traces of a pure function are equal.
    """

    def trace():
        traced = jax.make_jaxpr(lambda x: model(x))(images)  # a new function: JAX keeps traces
        return re.sub("0x[0-9a-f]+", "", str(traced.jaxpr)), traced.consts

    (first, constants), (second, others) = trace(), trace()
    if first == second and len(constants) == len(others):
        pairs = zip(constants, others, strict=True)
        if all(a is b or np.array_equal(a, b, equal_nan=True) for a, b in pairs):
            return ""
    logits, again = (np.asarray(jax.jit(lambda x: model(x))(images)) for _ in range(2))
    lengths = np.linalg.norm(logits, axis=1) + 1e-10
    change = (np.linalg.norm(logits - again, axis=1) / lengths).max()
    return f"they differ by up to {change:.2g} of their length" if change > _DIFFERENT else ""


@functools.partial(jax.jit, static_argnums=1)
def _input_gradient(model: Any, randomised: bool, images: Array, keys: Any, cotangent: Array):
    def logits(x):
        return as_batch_function(model, randomised)(x, keys)

    return jax.vjp(logits, images)[1](cotangent)[0]


def input_gradient(classify: Classifier, images: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """The gradient [n, H, W, C] of sum(cotangent * logits) by the images [n, H, W, C], on the host.

    cotangent: [n, K]. A randomised model draws the same in each call.
    """
    keys = jax.random.split(jax.random.key(0), len(images))
    return sharding.gather(
        _input_gradient(classify.model, classify.randomised, images, keys, cotangent)
    )


# The loss is compiled separately. XLA would fuse it with a multiplication at the model's end and
# round once, so the gradient of a saturated softmax would be rounding errors, not zeros.
@jax.jit
def _loss_gradients(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Of the cross-entropy and of DLR by the logits."""
    targets = jax.nn.one_hot(labels, logits.shape[1])
    of_ce = jax.grad(lambda z: losses.cross_entropy(z, targets).sum())(logits)
    return of_ce, jax.grad(lambda z: losses.dlr(z, labels).sum())(logits)


def _check_gradients(
    classify: Classifier,
    images: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    settings: Settings,
) -> dict[str, str]:
    """The flags of losses without a gradient, at the image or at APGD's random start."""
    correct = losses.is_correct(logits, labels, np)
    count = int(correct.sum())
    keys = jax.random.split(jax.random.key(0), len(images))
    directions = random_directions(keys, images.shape[1:], settings.norm)
    threat = Threat(settings.norm, settings.eps)
    begin = np.asarray(apgd.start(jnp.asarray(images), directions, threat).point)

    logits_there = classify(begin, settings.batch_size, np.arange(len(images)))

    def vanishes(points, logits):
        gradients = map(np.asarray, _loss_gradients(logits, labels))
        by_points = (input_gradient(classify, points, gradient) for gradient in gradients)
        return [(g == 0).all((1, 2, 3)) for g in by_points]

    of_both = zip(vanishes(images, logits), vanishes(begin, logits_there), strict=True)
    by_ce, by_dlr = (at_image | at_start for at_image, at_start in of_both)
    flags = {}
    if found := int((by_dlr & correct).sum()):
        flags["zero-gradients"] = f"{found} of {count} correct images"
    if only_ce := int((by_ce & ~by_dlr & correct).sum()):
        for_ce = int((by_ce & correct).sum())
        flags["saturated-softmax"] = f"{only_ce} of {count} correct images, {for_ce} for CE in all"
    return flags


def judge_outcomes(
    robust: dict[str, np.ndarray], work: dict[str, dict[str, int]], failures: dict[int, str]
) -> dict[str, str]:
    """The flags of what a cascade found: unconfirmed successes, and what Square adds.

    robust, work, failures: of a ``Result``.
    """
    flags = {}
    unconfirmed = sum(of_attack["unconfirmed"] for of_attack in work.values())
    if unconfirmed or failures:
        flags["unconfirmed"] = f"{unconfirmed} in the attacks, {len(failures)} at the end"
    names = list(robust)
    if "square" not in names[2:]:  # after 'clean' and a white-box attack
        return flags
    earlier = [robust[name] for name in names[: names.index("square")]]
    kept = np.logical_and.reduce(earlier)  # of attacks that ran individually, too
    before = float(kept.mean())
    fell = before - float((kept & robust["square"]).mean())
    if fell > MARGIN:
        flags["square-wins"] = f"the robust accuracy fell from {before:.2%} by {fell:.2%}"
    return flags
