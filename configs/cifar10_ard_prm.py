"""CIFAR-10, AT with ARD and PRM: the paper's two inventions on top of cifar10_sgd.

    vit-at train cifar10_ard_prm

Both act only in the attack that makes the training images, for the first 10 of 40 epochs.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config()
    config.name = "cifar10_ard_prm"
    config.masking.ard = config.masking.prm = True
    return common.apply_variants(config, variants)
