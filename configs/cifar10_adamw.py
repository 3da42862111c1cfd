"""CIFAR-10, AT with AdamW: the paper's negative result (Section 4: SGD is clearly more robust).

    vit-at train cifar10_adamw

AdamW as ViTs are usually trained: cosine schedule with a warm-up, small rate, decoupled decay.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config()
    config.name = "cifar10_adamw"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1.0
    return common.apply_variants(config, variants)
