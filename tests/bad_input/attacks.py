"""Calls of ``pgd_attack`` and ``autoattack.run`` with arguments that are not allowed."""

import jax
import jax.numpy as jnp
import numpy as np
from bad_input.case import Case

from vit_at.attacks import Threat, autoattack, pgd_attack
from vit_at.attacks.autoattack import Budget

IMAGES, LABELS = np.full((8, 8, 8, 3), 0.5, np.float32), np.arange(8) % 5


def logits_fn(images):
    return jax.nn.one_hot(jnp.zeros(len(images), int), 5) + images.mean((1, 2, 3))[:, None]


def run(says, model=logits_fn, images=IMAGES, labels=LABELS, **options) -> Case:
    """``autoattack.run`` on a model that answers in milliseconds."""
    options = {"batch_size": 8, "attacks": ["square"]} | options
    return Case(lambda folder: autoattack.run(model, images, labels, **options), says)


def budget(says, **options) -> Case:
    """``autoattack.run`` with a budget."""
    return run(says, budget=Budget(**options))


def pgd(says, images=IMAGES, labels=LABELS, threat=None, model=logits_fn, **options) -> Case:
    """``pgd_attack``; threat: the arguments of ``Threat``."""

    def deed(folder):
        del folder
        key = options.pop("key", jax.random.key(0))
        return pgd_attack(model, images, labels, key, Threat(**(threat or {})), **options)

    return Case(deed, says)


def changed(value):
    """The images with one value changed."""
    images = IMAGES.copy()
    images[3, 2, 1, 0] = value
    return images


def of_batch(images):
    return logits_fn(images) * (1 + images[:1].mean()) + jnp.arange(len(images))[:, None] % 7 * 5.0


CASES = {
    "norm that is none": run("norm is 'l3', which is unknown; use one of linf, l2, l1", norm="l3"),
    "norm that is a number": run("norm is '2', which is unknown", norm=2),
    "norm None": run("norm is 'None'", norm=None),
    "eps of 255": run("eps is 8; .* 8/255, say, not 8", eps=8),
    "eps 0": run("eps is 0", eps=0),
    "negative eps": run("eps is -0.1", eps=-0.1),
    "eps NaN": run("eps is nan", eps=float("nan")),
    "infinite eps": run("eps is inf", norm="l2", eps=float("inf")),
    "eps as text": run("eps is the text '8/255'", eps="8/255"),
    "eps beyond every l1 ball": run("at most 192", norm="l1", eps=193),
    "eps beyond every l2 ball": run("at most 13.8564", norm="L2", eps=14),
    "unknown version": run("nearest: standard", attacks="standrad"),
    "unknown attack in a list": run("attack 'pgd' is unknown", attacks=["apgd-ce", "pgd"]),
    "no attack": run("at least one", attacks=[]),
    "empty name of an attack": run("attack '' is unknown", attacks=""),
    "an attack twice": run("each named once", attacks="fab,fab"),
    "rand without a key": run(r"can't be called with \(images, key\)", attacks="rand"),
    "targeted DLR for three classes only": run(
        "no attack of apgd-t",
        model=lambda x: logits_fn(x)[:, :2],
        labels=LABELS % 2,
        attacks=["apgd-t"],
    ),
    "batch of nothing": run("batch_size is 0", batch_size=0),
    "batch as text": run("batch_size is '8'", batch_size="8"),
    "batch of a fraction": run("batch_size is 2.5", batch_size=2.5),
    "negative seed": run("seed is -1", seed=-1),
    "seed of 64 bits": run("seed is 1099511627776", seed=2**40),
    "unknown keep": run("keep is 'best'; use one of first, worst", keep="best"),
    "keep None": run("keep is None", keep=None),
    "individually as text": run(
        "individually is 'yes'; it must be True or False", individually="yes"
    ),
    "budget as a dict": run("give a Budget", budget={"queries": 10}),
    "no iterations": budget("iterations is 0; it must be an integer", iterations=0),
    "half an iteration": budget("iterations is 1.5", iterations=1.5),
    "queries as text": budget("queries is '5000'", queries="5000"),
    "queries None": budget("queries is None", queries=None),
    "no restarts": budget("restarts is 0", restarts=0),
    "restarts True": budget("restarts is True", restarts=True),
    "negative targets": budget("targets is -1", targets=-1),
    "no samples": budget("samples is 0", samples=0),
    "rho above 1": budget("rho is 1.5; it must be a share", rho=1.5),
    "rho NaN": budget("rho is nan", rho=float("nan")),
    "rho as text": budget("rho is '3/4'", rho="3/4"),
    "images of another layout": run(
        r"looks like \[N, C, H, W\]", images=IMAGES.transpose(0, 3, 1, 2)
    ),
    "one image": run(r"they must be \[N, H, W, C\]", images=IMAGES[0]),
    "no images": run("N > 0", images=IMAGES[:0], labels=LABELS[:0]),
    "images of bytes": run("divide them by 255", images=np.zeros(IMAGES.shape, np.uint8)),
    "one value above 1": run("images range from 0.5 to 1.01", images=changed(1.01)),
    "one value NaN": run("images range from nan", images=changed(np.nan)),
    "one value infinite": run("to inf", images=changed(np.inf)),
    "labels of another number": run("one integer for each of the 8", labels=LABELS[:7]),
    "one-hot labels": run("one integer for each of the 8", labels=np.eye(5)[LABELS].astype(int)),
    "labels of fractions": run("labels are float64", labels=LABELS / 1.0),
    "labels from 1": run("labels range from 1 to 5", labels=LABELS + 1),
    "labels that wrap around to a class": run(
        "labels range from 4294967296", labels=LABELS + 2**32
    ),
    "model that is no function": run("logits_fn is a list", model=[1, 2]),
    "model of numpy": run("can't be traced by JAX", model=lambda x: np.asarray(x).mean((1, 2))),
    "model without logits": run("must give logits", model=lambda x: x.mean((1, 2, 3))),
    "model of one class": run("2 classes", model=lambda x: logits_fn(x)[:, :1], labels=LABELS * 0),
    "model of NaN": run("gives NaN or infinity for 8 of 8", model=lambda x: logits_fn(x) * jnp.nan),
    "model of two arguments": run("can't be called", model=lambda x, y: logits_fn(x)),
    "model that mixes its batch": run("depend on the other images", model=of_batch),
    "pgd: unknown loss": pgd("use one of ce, cw", loss="dlr"),
    "pgd: no key": pgd("give a key", key=None),
    "pgd: no restarts": pgd("restarts is 0", restarts=0),
    "pgd: start of another shape": pgd(r"init has the shape", init=np.zeros((8, 8, 8, 3))),
    "pgd: no steps": pgd("steps is 0", threat={"steps": 0}),
    "pgd: step size as text": pgd("step_size is the text", threat={"step_size": "2/255"}),
    "pgd: eps of an l1 ball in linf": pgd("eps is 12", threat={"eps": 12.0}),
    "pgd: labels below 0": pgd("labels range from -1", labels=LABELS - 1),
    "pgd: images of 255": pgd("images range from 127.5", images=255 * IMAGES),
    "pgd: model without logits": pgd("logits_fn gives", model=lambda x: x),
}
