"""Curves over eps and attack steps, of outcomes that are known."""

import numpy as np
import pytest

from vit_at.attacks import Threat, curves

THRESHOLDS = np.array([0.0, 0.1, 0.3, 0.9])  # each image withstands smaller eps


def outcomes(threat):
    return threat.eps * threat.steps / 10 < THRESHOLDS


@pytest.mark.parametrize(("norm", "expected"), [("linf", [0.25, 0.5]), ("l2", [0.25, 0.5, 2.0])])
def test_factors_are_kept_up_to_the_whole_image_range(norm, expected):
    threats = curves.at_factors(Threat(norm, 0.5, 0.1), (0.5, 1, 4, 40), 16)
    assert [t.eps for t in threats] == expected
    assert [t.step_size / t.eps for t in threats] == pytest.approx([0.2] * len(threats))


def test_accuracy_over_eps_and_over_steps():
    threat = Threat("linf", 0.2, 0.05, 10)
    threats = curves.at_factors(threat, (1, 2), 16)
    by_eps = curves.over_eps(np.array([False, True, True, True]), outcomes, threats)
    assert by_eps == {0.0: 0.75, 0.2: 0.5, 0.4: 0.25}
    by_steps = curves.over_steps(outcomes, curves.at_steps(threat, (1, 10, 20)))
    assert by_steps == {1: 0.75, 10: 0.5, 20: 0.25}
