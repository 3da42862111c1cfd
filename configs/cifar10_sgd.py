"""CIFAR-10, AT with SGD: the paper's recipe for a ViT, Linf 8/255.

    python -m vit_at.main --config=configs/cifar10_sgd.py

It starts from weights pre-trained on ImageNet, which a ViT needs to become robust; :scratch goes
without, model.pretrained=FILE takes others. The paper's code uses batch 64, its text 128. Cost: 40
epochs of PGD-10, which is the work of 23 forward passes for each image of an epoch.
"""

from ml_collections import ConfigDict
from vit_at.configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "cifar10_sgd"
    common.use_published(config, "vit_base_patch16_224")
    return common.apply_variants(config, variants)
