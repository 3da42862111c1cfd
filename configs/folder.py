"""Images of your own, a folder for each split and class; AT with SGD, Linf 8/255.

    vit-at train folder --config.data.name=folder:PATH             # from published weights
    vit-at train folder:scratch --config.data.name=folder:PATH     # a small ViT, without a network

PATH/train/<class>/<image>, and PATH/test likewise; without a test split, a fifth of the training
images is held out. A few hundred images work. Image size (up to 224), mean and std are taken from
the training images, and all held-out images are in proportion to the classes. Published weights
and eps warm-up are what lets a ViT learn from few images: see docs/extend.md for what to expect.
"""

from ml_collections import ConfigDict

from vit_at.configs import common, default


def _scratch(config: ConfigDict) -> None:
    """A narrow, shallow ViT, which a few hundred images can train."""
    common.VARIANTS["scratch"](config)
    config.model.embed_dim, config.model.depth, config.model.num_heads = 96, 4, 3


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "folder"
    common.use_published(config, "deit_tiny_patch16_224")
    config.batch_size, config.eval.batch_size = 32, 128
    config.model.patch_size = 0
    config.data.name = "folder:images"
    config.data.from_images = "image_size,normalisation,splits"
    config.data.stratified = True
    config.data.image_size = 224  # at most
    config.data.mean, config.data.std = default.IMAGENET_MEAN, default.IMAGENET_STD
    config.threat.eps_warmup_epochs = 10.0
    config.masking.warmup_epochs = 10.0
    config.mixing.probability = 0.0
    config.eval.every_epochs = 5
    config.eval.attacks = "clean,cw-20,pgd-20,pgd-100"
    return common.apply_variants(config, variants, own={"scratch": _scratch})
