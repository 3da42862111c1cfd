"""Do images without labels help? Half of CIFAR-10 with labels, the other half with pseudo-labels.

    vit-at sweep study/natural:small
    vit-at evaluate runs/study_natural-small-sweep/half --attacks=clean \\
        "--split=train[50%:]" --num_examples=0 --write_labels=runs/pseudo_labels.npz
    vit-at sweep study/extra:small

``half`` has the labelled half alone; ``pseudo`` takes half of each batch from the other half, whose
labels are of a model that was trained naturally on the first. Both make as many updates as ``all``.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base

_LABELS = "npz:runs/pseudo_labels.npz"


def _pseudo(config: ConfigDict) -> None:
    base.half(config)
    config.data.extra.name, config.data.extra.fraction = _LABELS, 0.5


OWN = {"all": lambda config: None, "half": base.half, "pseudo": _pseudo}


def get_config(variants: str = "") -> ConfigDict:
    return base.start("extra", variants, OWN)


def sweep(add: Callable[..., None]) -> None:
    for variants in OWN:
        base.over_seeds(add, variants)
