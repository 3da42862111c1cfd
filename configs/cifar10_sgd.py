"""CIFAR-10, AT with SGD: the paper's recipe for a ViT, Linf 8/255.

    python -m vit_at.main --config=configs/cifar10_sgd.py

The paper (Table 1 and Section 4) starts from weights pre-trained on ImageNet, which every ViT needs:
set model.pretrained. Its code uses batch 64, its text 128. Cost: 40 epochs of PGD-10, that is 23
forward passes an image and epoch.
"""

from ml_collections import ConfigDict

from configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "cifar10_sgd"
    return common.apply_variants(config, variants)
