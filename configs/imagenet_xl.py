"""ImageNet-1k, AT of ViT-L/14 on images that grow from 84 to 336 pixels, Linf 4/255: after AdvXL.

    vit-at train imagenet_xl[:model=vit_base_patch16_224] --config.model.pretrained=FILE

"Revisiting Adversarial Training at Scale" (Wang et al. 2024, arXiv 2401.04727): most of a run on
small images with one attack step, then larger images and stronger attacks, here as three phases of
one run, and stronger augmentation with them. Theirs train on up to a thousand times as many images,
and their epochs and step sizes are others. FILE holds natural weights with patches of 14 pixels;
without it, the recipe starts from scratch. Not measured here.
"""

from ml_collections import ConfigDict

from vit_at.configs import common, imagenet_convstem


def get_config(variants: str = "") -> ConfigDict:
    config = imagenet_convstem.get_config()
    config.name = "imagenet_xl"
    config.epochs, config.batch_size = 100, 1024
    config.model.name, config.model.stem = "vit_large_patch16_224", "patch"
    config.model.pretrained = ""
    config.data.image_size, config.model.patch_size = 336, 14
    config.data.augment = ""
    config.masking.patch_size = 14
    config.threat.method, config.threat.start = "pgd", "random"
    config.threat.step_size, config.threat.steps = 2 / 255, 3
    config.phases = (
        "0 data.image_size=84 threat.steps=1 threat.step_size=4/255; "
        "80 data.image_size=224 threat.steps=2 threat.step_size=3/255 data.augment=randaugment; "
        "95 data.image_size=336 threat.steps=3 threat.step_size=2/255"
    )
    config.optimizer.warmup_epochs = 5.0
    return common.apply_variants(config, variants)
