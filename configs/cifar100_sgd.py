"""CIFAR-100, AT with SGD: the CIFAR-10 recipe on 100 classes.

vit-at train cifar100_sgd
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config()
    config.name = "cifar100_sgd"
    config.data.name = "cifar100"
    config.data.mean = (0.5071, 0.4865, 0.4409)
    config.data.std = (0.2673, 0.2564, 0.2762)
    return common.apply_variants(config, variants)
