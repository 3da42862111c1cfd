"""CIFAR-10, TRADES of XCiT-S12 with AdamW, Linf 8/255: the light recipe of Debenedetti et al. 2023.

    vit-at train cifar10_xcit --config.model.pretrained=FILE

"A Light Recipe to Train Robust Vision Transformers" (arXiv 2209.07399): no heavy augmentation, a
large weight decay. FILE holds their ImageNet model, trained adversarially at 8/255; without it, the
recipe starts from natural ImageNet weights. Their result, by RobustBench: 90.06 % clean, 56.14 %
AutoAttack; with :model=xcit_medium_12_p4_32 91.30 / 57.27, xcit_large_12_p4_32 91.73 / 57.58. Not
measured here. Theirs also uses CutMix and crops of varying size, and BatchNorm with the statistics
of the batch; a batch there is 64 images a device.
"""

from ml_collections import ConfigDict

from vit_at.configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "cifar10_xcit"
    config.objective, config.beta = "trades", 6.0
    config.mixing.probability = 0.0
    config.epochs, config.batch_size = 20, 512
    common.use_published(config, "xcit_small_12_p4_32")
    config.model.drop_path = 0.05
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.weight_decay = 0.5
    config.optimizer.clip_norm = 0.0
    config.optimizer.schedule, config.optimizer.warmup_epochs = "cosine", 5.0
    return common.apply_variants(config, variants)
