"""CIFAR-10, AT of a small ConViT from scratch: the best robust model of a laptop so far.

    vit-at train cifar10_small

The recipe of the packaged model ``cifar10_convit_96x4_conv``: 506 000 parameters, convolutions
before the blocks, PGD-2 with a growing eps, averaged weights. 66.5 % clean and 32.8 % AutoAttack
(CIFAR-10 stored as JPEG, first 1 000 test images, one seed). An epoch costs 7 forward passes an
image: about 3 minutes on two CPU cores of an AMD EPYC.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config("scratch,model=convit_tiny")
    config.name = "cifar10_small"
    config.dtype = "bfloat16"
    config.epochs, config.batch_size = 26, 128
    config.ema_decay = 0.998
    config.model.stem = "conv"
    config.model.embed_dim, config.model.depth, config.model.num_heads = 96, 4, 4
    config.mixing.probability = 0.0
    config.threat.steps, config.threat.step_size = 2, 5 / 255
    config.threat.eps_warmup_epochs = 8.0  # from scratch, full eps from the start stays at chance
    config.optimizer.schedule, config.optimizer.warmup_epochs = "cosine", 1.0
    config.eval.every_epochs = 2
    config.eval.attacks, config.eval.num_examples = "clean,pgd-20,cw-20,autoattack", 1000
    return common.apply_variants(config, variants)
