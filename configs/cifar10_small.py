"""CIFAR-10, the best robust model of a laptop so far: a small ConViT, natural training, then AT.

    vit-at train cifar10_small:pretrain
    vit-at train cifar10_small

The recipe of the packaged model ``cifar10_convit_128x5_conv``: 1.1 million parameters, convolutions
before the blocks, Muon, natural training and then PGD-2 with mixup and CutMix, averaged weights.
The last weights are tested: under AutoAttack they withstand more than those that PGD-10 on 1 000
images finds best. Its accuracy and cost, and how it was found: docs/study.md.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def _pretrain(config: ConfigDict) -> None:
    """The natural training that the adversarial one starts from."""
    common.pretrain(config)
    config.epochs, config.ema_decay = 5, 0.99
    config.eval.checkpoint = "best"
    config.mixing.probability = 0.0
    config.optimizer.warmup_epochs = 0.2


OWN = {"pretrain": _pretrain}


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config("scratch,model=convit_tiny")
    config.name = "cifar10_small"
    config.dtype = "bfloat16"
    config.epochs, config.batch_size = 20, 128
    config.ema_decay = 0.998
    config.model.stem, config.model.pretrained = "conv", "runs/cifar10_small-pretrain"
    config.model.embed_dim, config.model.depth, config.model.num_heads = 128, 5, 4
    config.threat.steps, config.threat.step_size = 2, 5 / 255
    config.threat.eps_warmup_epochs = 2.0
    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.momentum = "muon", 0.006, 0.95
    optimizer.weight_decay = 0.05
    optimizer.schedule, optimizer.warmup_epochs = "cosine", 0.5
    config.eval.checkpoint, config.eval.threat.step_size = "last", 2 / 255
    config.eval.stop_if_overfitted = True  # of few attack steps, a run may learn to fool them
    config.eval.attacks, config.eval.num_examples = "clean,pgd-20,cw-20,autoattack", 1000
    return common.apply_variants(config, variants, OWN)
