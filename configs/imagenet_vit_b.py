"""ImageNet-1k, AT of ViT-B with ARD, PRM and SGD, Linf 4/255: the paper's largest recipe.

    vit-at train imagenet_vit_b

10 epochs, batch 512, PGD-5, ARD and PRM over the first 2 epochs, from ImageNet-21k weights. Not
measured here; the authors' weights of 2024 have 68.38 % clean, 34.40 % AutoAttack (RobustBench).
"""

from ml_collections import ConfigDict

from vit_at.configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "imagenet_vit_b"
    config.epochs, config.batch_size = 10, 512
    common.use_published(config, "vit_base_patch16_224_in21k")
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.validation_examples = 10_000
    config.data.image_size, config.model.patch_size = 224, 0
    config.data.mean, config.data.std = default.IMAGENET_MEAN, default.IMAGENET_STD
    config.threat.eps, config.threat.step_size, config.threat.steps = 4 / 255, 1 / 255, 5
    config.masking.ard = config.masking.prm = True
    config.masking.warmup_epochs = 2.0
    config.masking.patch_size = 16
    config.eval.validation_attack = "pgd-5"
    config.eval.batch_size = 512
    config.eval.num_examples = 5000  # AutoAttack on all 50,000 would cost 7 times the training
    return common.apply_variants(config, variants)
