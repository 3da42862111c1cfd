"""CIFAR-10, the best robust model of a laptop so far: a small ConViT, natural training, then AT.

    vit-at train cifar10_small:pretrain
    vit-at train cifar10_small

The recipe of the packaged model ``cifar10_convit_128x5_conv``: 1.1 million parameters, convolutions
before the blocks, Muon, natural training and then N-FGSM, averaged weights. 71.1 % clean and 43.1 %
under PGD-20 (CIFAR-10 stored as JPEG, first 1 000 test images, one seed) after 5 epochs of the one
and 10 of the other, an hour on two CPU cores of an AMD EPYC. The best weights on validation are
tested, as robustness falls again after half of the training. How it was found: docs/study.md.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common


def _pretrain(config: ConfigDict) -> None:
    """The natural training that the adversarial one starts from."""
    config.objective, config.model.pretrained = "natural", ""
    config.epochs, config.ema_decay = 5, 0.99
    config.optimizer.warmup_epochs = 0.2
    config.eval.validation_attack, config.eval.attacks = "clean", "clean,pgd-20"


OWN = {"pretrain": _pretrain}


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_sgd.get_config("scratch,model=convit_tiny")
    config.name = "cifar10_small"
    config.dtype = "bfloat16"
    config.epochs, config.batch_size = 20, 128
    config.ema_decay = 0.998
    config.model.stem, config.model.pretrained = "conv", "runs/cifar10_small-pretrain"
    config.model.embed_dim, config.model.depth, config.model.num_heads = 128, 5, 4
    config.mixing.probability = 0.0
    threat = config.threat
    threat.steps, threat.step_size, threat.start = 1, threat.eps, "noise"  # N-FGSM
    threat.eps_warmup_epochs = 2.0
    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.momentum = "muon", 0.006, 0.95
    optimizer.weight_decay = 0.05
    optimizer.schedule, optimizer.warmup_epochs = "cosine", 0.5
    config.eval.threat.step_size = threat.eps / 4
    config.eval.stop_if_overfitted = True
    config.eval.attacks, config.eval.num_examples = "clean,pgd-20,cw-20,autoattack", 1000
    return common.apply_variants(config, variants, OWN)
