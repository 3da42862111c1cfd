"""How much augmentation? None, crop and flip, mixup and CutMix on some batches, or strong.

    vit-at sweep configs/study/augmentation.py:cpu

``mixed`` is the paper's: mixup or CutMix on three batches of ten. ``strong`` mixes every batch and
smooths the labels. Digits are cropped but not flipped: a mirrored 2 is none.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def _augment(crop: bool, mixing: float, smoothing: float = 0.0) -> Callable[[ConfigDict], None]:
    def change(config: ConfigDict) -> None:
        config.data.crop_padding = config.data.image_size // 8 if crop else 0
        config.data.flip = crop and config.data.name != "digits"
        config.mixing.probability, config.label_smoothing = mixing, smoothing

    return change


OWN = {
    "plain": _augment(crop=False, mixing=0.0),
    "crop_flip": _augment(crop=True, mixing=0.0),
    "mixed": _augment(crop=True, mixing=0.3),
    "strong": _augment(crop=True, mixing=1.0, smoothing=0.1),
}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("augmentation", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for variants in OWN:
        base.over_seeds(add, variants)
