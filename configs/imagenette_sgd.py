"""Imagenette (v1, ten ImageNet classes) at 224 pixels, AT with SGD, Linf 8/255: the paper's.

vit-at train imagenette_sgd
"""

from ml_collections import ConfigDict

from vit_at.configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "imagenette_sgd"
    common.use_published(config, "vit_base_patch16_224")
    config.data.name = "imagenette/full-size"
    config.data.test_split = "validation"
    config.data.validation_examples = 500
    config.data.image_size, config.model.patch_size = 224, 0
    config.data.mean, config.data.std = default.IMAGENET_MEAN, default.IMAGENET_STD
    config.masking.patch_size = 16
    return common.apply_variants(config, variants)
