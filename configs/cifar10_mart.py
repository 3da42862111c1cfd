"""CIFAR-10, MART (Wang et al. 2020) with SGD, beta 6.

    vit-at train cifar10_mart[:ard_prm]

No mixup or CutMix: MART needs plain labels. Its attack starts at 0.001 N(0, 1), normalised.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config()
    config.name = "cifar10_mart"
    config.objective = "mart"
    config.mixing.probability = 0.0
    return common.apply_variants(config, variants)
