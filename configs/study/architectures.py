"""Which architecture? ViT without qkv bias, DeiT and ConViT; at :cpu all of one width and depth.

    vit-at sweep configs/study/architectures.py:cpu

timm publishes the weights of vit_small of depth 8 only as a file of its release 0.5: put
vit_small_p16_224-15ec54c9.pth where you start the larger sizes. Swin is for images of 224 pixels.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs.study import base


def get_config(variants: str = "") -> ConfigDict:
    return base.start("architectures", variants)


def sweep(add: Callable[..., None]) -> None:
    for name in ("deit_tiny_patch16_224", "vit_small_patch16_224_timm05", "convit_tiny"):
        base.over_seeds(add, f"model={name}")
