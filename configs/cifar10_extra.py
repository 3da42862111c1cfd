"""CIFAR-10, TRADES with generated images, AWP and averaged weights: what leads the leaderboards.

    vit-at train cifar10_extra --config.data.extra.name=npz:1m.npz

Wang et al. 2023: 70 % of each batch are images of a diffusion model (EDM) with labels; beta 5,
label smoothing 0.1, averaged weights. Their files are uncompressed .npz of 1 to 50 million images
(github.com/wzekai99/DM-Improves-AT). They train CNNs; AWP is Wu et al. 2020, with its gamma.
"""

from ml_collections import ConfigDict

from vit_at.configs import cifar10_trades, common


def get_config(variants: str = "") -> ConfigDict:
    config = cifar10_trades.get_config()
    config.name = "cifar10_extra"
    config.beta = 5.0
    config.label_smoothing = 0.1
    config.ema_decay = 0.995
    config.awp.gamma = 0.005
    config.data.extra.name = "npz:1m.npz"
    config.data.extra.fraction = 0.7
    return common.apply_variants(config, variants)
