"""CIFAR-10, natural training from scratch: weights for an adversarial run to start from.

    vit-at train cifar10_pretrain:model=deit_tiny_patch16_224
    vit-at train cifar10_sgd:model=deit_tiny_patch16_224 \\
        --config.model.pretrained=runs/cifar10_pretrain-deit_tiny_patch16_224

For machines without the published weights. An epoch costs 3 forward passes an image instead of 23.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config()
    common.pretrain(config)
    config.name = "cifar10_pretrain"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 2.0
    return common.apply_variants(config, variants)
