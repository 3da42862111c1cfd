"""CIFAR-10, AT with SGD: the paper's recipe for a ViT, Linf 8/255.

    vit-at train cifar10_sgd

At full eps a ViT becomes robust only from pre-trained weights, here of ImageNet; :scratch goes
without, and --config.model.pretrained=FILE takes others. The paper's code uses batch 64, its
text 128. An epoch of PGD-10 costs 23 forward passes an image.
"""

from ml_collections import ConfigDict

from vit_at.configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "cifar10_sgd"
    common.use_published(config, "vit_base_patch16_224")
    return common.apply_variants(config, variants)
