"""Digits (packaged), AT of a small ViT with SGD, Linf 0.15: three minutes on two CPU cores.

    vit-at train digits_sgd

1 797 real 8x8 digits (UCI). They are nearly two-tone, so eps 8/255 hardly changes the accuracy, and
the recipe takes 0.15. From scratch, eps has to warm up (threat.eps_warmup_epochs) or nothing is
learned. Expected clean / PGD-20 accuracy: 94 % / 70 %; with :natural 93 % / 9 %. See docs/study.md.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs import common, default


def get_config(variants: str = "") -> ConfigDict:
    config = default.get_config()
    config.name = "digits_sgd"
    config.batch_size = 32
    config.model.name = "deit_tiny_patch16_224"
    config.model.patch_size = 2
    config.model.embed_dim, config.model.depth, config.model.num_heads = 64, 2, 2
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.mean, config.data.std = (0.31,), (0.38,)
    config.data.crop_padding, config.data.flip = 0, False
    config.data.validation_examples = 138
    config.mixing.probability = 0.0
    config.threat.eps, config.threat.step_size = 0.15, 0.0375
    config.threat.eps_warmup_epochs = 20.0
    config.masking.warmup_epochs = 20.0
    config.eval.every_epochs = 5
    config.eval.attacks = "clean,cw-20,pgd-20,pgd-100"
    return common.apply_variants(config, variants)


def sweep(add: Callable[..., None]) -> None:
    """The table of docs/index.md: vit-at sweep configs/digits_sgd.py."""
    for variants in ("natural", "", "ard_prm"):
        for seed in range(3):
            add(variants, {"seed": seed})
