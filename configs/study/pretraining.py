"""From pre-trained weights or from scratch? The paper: a ViT needs pre-training.

    python -m vit_at.main --config=configs/digits_sgd.py:natural   # for :cpu, the weights
    vit-at sweep configs/study/pretraining.py:cpu

The sizes for a GPU start from published weights, :small from the natural training of
``natural.py``. At :cpu it is a natural training of one seed on the same digits, and eps does not
warm up, as that would be another remedy for the same illness.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs import common
from vit_at.configs.study import base


def _start(pretrained: bool) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        if not pretrained:
            common.VARIANTS["scratch"](config)
        if config.data.name == "digits":
            config.model.pretrained = "runs/digits_sgd-natural" if pretrained else ""
            config.threat.eps_warmup_epochs = 0.0

    return change


OWN = {"pretrained": _start(True), "scratch": _start(False)}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("pretraining", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for variants in OWN:
        base.over_seeds(add, variants)
