"""CIFAR-10, AT with N-FGSM: one attack step, 5 forward passes an image instead of 23.

    vit-at train cifar10_fast

de Jorge et al. 2022: the step starts from noise in twice the ball and is not clipped, which avoids
most of the catastrophic overfitting of FGSM. Validation by PGD-10 watches for the rest, and stops.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config()
    config.name = "cifar10_fast"
    config.threat.steps = 1
    config.threat.start = "noise"
    config.threat.step_size = 8 / 255
    config.eval.threat.step_size = 2 / 255
    config.eval.stop_if_overfitted = True
    return common.apply_variants(config, variants)
