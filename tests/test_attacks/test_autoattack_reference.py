"""Counts of surviving images against the official AutoAttack, on its model and images.

Random numbers differ, so the images that an attack breaks may differ at the border: the counts must
agree within 1 of the images, Square's within 3.
"""

import functools
import json

import jax
import numpy as np
import pytest
import reference_autoattack as reference

from vit_at.attacks import autoattack
from vit_at.attacks.autoattack import audit

COUNT = {"linf": 256, "l2": 128}
ALLOWED = {"square": 3}
ALONE = autoattack.Budget(queries=1000)  # as recorded


@functools.cache
def problem(count: int):
    images, labels = reference.images()
    params = jax.tree.map(jax.device_put, reference.parameters())
    logits_fn = functools.partial(reference.apply(), params)
    return logits_fn, np.asarray(images)[:count], np.asarray(labels)[:count]


def counts_of(norm: str, attacks, **options) -> dict[str, int]:
    result = autoattack.run(
        *problem(COUNT[norm]), norm=norm, eps=reference.EPS[norm], attacks=attacks, **options
    )
    assert not result.failures
    assert not any(work["unconfirmed"] for work in result.work.values())
    counts = {name: int(robust.sum()) for name, robust in result.robust.items()}
    print(json.dumps({"norm": norm, "counts": counts, "seconds": result.seconds}))
    return counts


def broken_before(norm: str, stage: int) -> int:
    """How many images the official cascade still had after a stage (-1: clean)."""
    broken_by = reference.arrays(norm)["cascade_broken_by"]
    return int(((broken_by == -1) | (broken_by > stage)).sum())


@pytest.mark.campaign
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cascade(norm):
    counts = counts_of(norm, "standard")
    for stage, name in enumerate(counts, start=-1):
        assert abs(counts[name] - broken_before(norm, stage)) <= 1, name


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_alone(norm, name):
    counts = counts_of(norm, [name], budget=ALONE)
    recorded = reference.arrays(norm)
    broken = recorded[f"ind_{name.replace('-', '_')}_broken"]
    official = int((recorded["clean_correct"] & ~broken).sum())
    assert abs(counts[name] - official) <= ALLOWED.get(name, 1)


@pytest.mark.campaign
def test_square_with_all_its_queries():
    official = int(reference.arrays("linf")["square5000_robust"].sum())
    assert abs(counts_of("linf", ["square"])["square"] - official) <= ALLOWED["square"]


@pytest.mark.campaign
def test_saturated_softmax():
    """Logits times 1000: APGD-CE overestimates, officially by 14 of 128; the cascade does not, and
    the audit says why. By how many depends on the random starts: they decide what can move at all.

    The factor is in the head's weights: beside the loss, XLA would fuse it into a multiply-add, and
    a saturated softmax would have a gradient of rounding errors.
    """
    logits_fn, images, labels = problem(128)
    params = logits_fn.args[0]
    head = jax.tree.map(lambda w: 1000 * w, params["head"])
    scaled = functools.partial(logits_fn.func, params | {"head": head})
    recorded = reference.arrays("masked")
    by_ce, by_all = (int(recorded[f"scale1000_{n}_robust"].sum()) for n in ("apgd_ce", "apgd_t"))
    assert by_ce - by_all == 14
    result = autoattack.run(scaled, images, labels, attacks=["apgd-ce", "apgd-t"])
    assert result.robust["apgd-ce"].sum() >= by_all + 10
    assert abs(result.robust["apgd-t"].sum() - by_all) <= 1
    flags = audit.audit(scaled, images, labels, result).flags
    assert {"saturated-softmax", "losses-disagree"} <= set(flags)
    assert (
        f"of {recorded['scale1000_clean_correct'].sum()} correct images"
        in flags["saturated-softmax"]
    )
