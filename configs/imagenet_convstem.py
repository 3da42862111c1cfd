"""ImageNet-1k, AT of ViT-S with a convolutional stem and AdamW, Linf 4/255: Singh et al. 2023.

    vit-at train imagenet_convstem[:model=convnext_tiny] --config.model.pretrained=FILE

"Revisiting Adversarial Training for ImageNet" (arXiv 2303.01870): a stem of convolutions instead
of patches, weight averaging, label smoothing, 300 epochs. FILE holds natural weights with this
stem, from which theirs start; without it, the recipe starts from scratch. Their result, by
RobustBench: 72.56 % clean, 48.08 % AutoAttack; by the authors, ConvNeXt-T: 72.7 / 49.5. Not
measured here. The attack is theirs, two steps of APGD from the image.
"""

from ml_collections import ConfigDict

from vit_at.configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "imagenet_convstem"
    config.epochs, config.batch_size = 300, 640
    config.label_smoothing, config.ema_decay = 0.1, 0.9999
    config.model.name, config.model.stem = "deit_small_patch16_224", "conv"
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.validation_examples = 10_000
    config.data.image_size, config.model.patch_size = 224, 0
    config.data.mean, config.data.std = default.IMAGENET_MEAN, default.IMAGENET_STD
    config.mixing.probability = 1.0
    config.data.augment = "randaugment-2-9,random-erasing-0.25"
    config.threat.method, config.threat.start, config.threat.steps = "apgd", "zero", 2
    config.threat.eps, config.threat.step_size = 4 / 255, 2 / 255
    config.masking.patch_size = 16
    config.optimizer.name, config.optimizer.b2 = "adamw", 0.95
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 0.0
    config.optimizer.schedule, config.optimizer.warmup_epochs = "cosine", 20.0
    config.eval.validation_attack = "pgd-5"
    config.eval.batch_size = 512
    config.eval.num_examples = 5000
    return common.apply_variants(config, variants)
