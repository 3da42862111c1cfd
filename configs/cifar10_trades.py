"""CIFAR-10, TRADES (Zhang et al. 2019) with SGD, beta 6.

    vit-at train cifar10_trades[:ard_prm]

No mixup or CutMix: TRADES needs plain labels. Its attack starts at 0.001 N(0, 1), normalised.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config()
    config.name = "cifar10_trades"
    config.objective = "trades"
    config.mixing.probability = 0.0
    return common.apply_variants(config, variants)
