"""The variants that every recipe has: ``cifar10_trades:model=deit_small_patch16_224,ard_prm``.

Each comma-separated item is a variant of VARIANTS: a word, or a word with a value.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.errors import UserError, nearest

# Published weights, under their present names on the model hub: those of the paper, then more.
# ViT-small of depth 8 is only a file of timm 0.5's release, to be fetched by hand.
PUBLISHED = {
    "vit_small_patch16_224_timm05": "vit_small_p16_224-15ec54c9.pth",
    "vit_base_patch16_224": "hf:timm/vit_base_patch16_224.orig_in21k_ft_in1k",
    "vit_base_patch16_224_in21k": "hf:timm/vit_base_patch16_224.orig_in21k",
    "vit_large_patch16_224": "hf:timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deit_tiny_patch16_224": "hf:timm/deit_tiny_patch16_224.fb_in1k",
    "deit_small_patch16_224": "hf:timm/deit_small_patch16_224.fb_in1k",
    "deit_base_patch16_224": "hf:timm/deit_base_patch16_224.fb_in1k",
    "convit_tiny": "hf:timm/convit_tiny.fb_in1k",
    "convit_small": "hf:timm/convit_small.fb_in1k",
    "convit_base": "hf:timm/convit_base.fb_in1k",
    "swin_tiny_patch4_window7_224": "hf:timm/swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small_patch4_window7_224": "hf:timm/swin_small_patch4_window7_224.ms_in1k",
    "swin_base_patch4_window7_224": "hf:timm/swin_base_patch4_window7_224.ms_in1k",
    "swin_base_patch4_window7_224_in22k": "hf:timm/swin_base_patch4_window7_224.ms_in22k",
    "swin_large_patch4_window7_224": "hf:timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_large_patch4_window7_224_in22k": "hf:timm/swin_large_patch4_window7_224.ms_in22k",
    "deit_base_patch16_384": "hf:timm/deit_base_patch16_384.fb_in1k",
    "deit_tiny_distilled_patch16_224": "hf:timm/deit_tiny_distilled_patch16_224.fb_in1k",
    "deit_small_distilled_patch16_224": "hf:timm/deit_small_distilled_patch16_224.fb_in1k",
    "deit_base_distilled_patch16_224": "hf:timm/deit_base_distilled_patch16_224.fb_in1k",
    "deit_base_distilled_patch16_384": "hf:timm/deit_base_distilled_patch16_384.fb_in1k",
    "vit_tiny_patch16_224": "hf:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_tiny_patch16_384": "hf:timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k",
    "vit_small_patch16_224": "hf:timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch16_384": "hf:timm/vit_small_patch16_384.augreg_in21k_ft_in1k",
    "vit_small_patch32_224": "hf:timm/vit_small_patch32_224.augreg_in21k_ft_in1k",
    "vit_small_patch32_384": "hf:timm/vit_small_patch32_384.augreg_in21k_ft_in1k",
    "vit_base_patch8_224": "hf:timm/vit_base_patch8_224.augreg_in21k_ft_in1k",
    "vit_base_patch16_384": "hf:timm/vit_base_patch16_384.augreg_in21k_ft_in1k",
    "vit_base_patch32_224": "hf:timm/vit_base_patch32_224.augreg_in21k_ft_in1k",
    "vit_base_patch32_384": "hf:timm/vit_base_patch32_384.augreg_in21k_ft_in1k",
    "vit_large_patch16_384": "hf:timm/vit_large_patch16_384.augreg_in21k_ft_in1k",
    "vit_large_patch32_384": "hf:timm/vit_large_patch32_384.orig_in21k_ft_in1k",
    "xcit_nano_12_p16_224": "hf:timm/xcit_nano_12_p16_224.fb_in1k",
    "xcit_tiny_12_p16_224": "hf:timm/xcit_tiny_12_p16_224.fb_in1k",
    "xcit_tiny_24_p16_224": "hf:timm/xcit_tiny_24_p16_224.fb_in1k",
    "xcit_small_12_p16_224": "hf:timm/xcit_small_12_p16_224.fb_in1k",
    "xcit_small_24_p16_224": "hf:timm/xcit_small_24_p16_224.fb_in1k",
    "xcit_medium_24_p16_224": "hf:timm/xcit_medium_24_p16_224.fb_in1k",
    "xcit_large_24_p16_224": "hf:timm/xcit_large_24_p16_224.fb_in1k",
    "xcit_nano_12_p8_224": "hf:timm/xcit_nano_12_p8_224.fb_in1k",
    "xcit_tiny_12_p8_224": "hf:timm/xcit_tiny_12_p8_224.fb_in1k",
    "xcit_tiny_24_p8_224": "hf:timm/xcit_tiny_24_p8_224.fb_in1k",
    "xcit_small_12_p8_224": "hf:timm/xcit_small_12_p8_224.fb_in1k",
    "xcit_small_24_p8_224": "hf:timm/xcit_small_24_p8_224.fb_in1k",
    "xcit_medium_24_p8_224": "hf:timm/xcit_medium_24_p8_224.fb_in1k",
    "xcit_large_24_p8_224": "hf:timm/xcit_large_24_p8_224.fb_in1k",
    "xcit_small_12_p4_32": "hf:timm/xcit_small_12_p16_224.fb_in1k",
    "convnext_tiny": "hf:timm/convnext_tiny.fb_in1k",
    "convnext_small": "hf:timm/convnext_small.fb_in1k",
    "convnext_base": "hf:timm/convnext_base.fb_in1k",
    "convnext_large": "hf:timm/convnext_large.fb_in1k",
}


def use_published(config: ConfigDict, name: str) -> ConfigDict:
    """Takes a model with the weights that the paper starts it from."""
    config.model.name = name
    config.model.pretrained = PUBLISHED.get(name, "")
    # timm 0.5 scales the attention of these weights by the whole width.
    config.model.qk_scale = 768**-0.5 if name == "vit_small_patch16_224_timm05" else 0.0
    return config


def _model(config: ConfigDict, name: str) -> None:
    """Another model, with its published weights where the recipe starts from such."""
    if config.model.pretrained:
        use_published(config, name)
    config.model.name = name
    if name.startswith("swin"):
        config.optimizer.momentum = 0.5  # as the paper's code


def _scratch(config: ConfigDict) -> None:
    config.model.pretrained, config.model.qk_scale = "", 0.0


def _ard(config: ConfigDict) -> None:
    config.masking.ard = True


def _prm(config: ConfigDict) -> None:
    config.masking.prm = True


def _ard_prm(config: ConfigDict) -> None:
    _ard(config)
    _prm(config)


def _smoke(config: ConfigDict) -> None:
    """The same path at toy size, in seconds and with no data to prepare: a check, not a result."""
    config.data.name, config.data.dir = "digits", ""
    config.data.train_split, config.data.test_split = "train[:160]", "test[:48]"
    config.data.from_images, config.data.transform = "", "squash"
    config.data.validation_examples = 32
    if config.data.extra.name:
        config.data.extra.name, config.data.extra.split = "digits", "train[160:320]"
    config.data.image_size, config.model.patch_size = 16, 4
    config.model.embed_dim, config.model.depth, config.model.num_heads = 32, 2, 2
    _scratch(config)
    config.masking.patch_size = 0
    config.epochs, config.batch_size, config.eval.batch_size = 2, 32, 16
    config.masking.warmup_epochs = config.threat.eps_warmup_epochs = 1.0
    config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, 1.0)
    config.threat.steps = 2
    if config.phases:
        config.model.patch_size = 2
        config.phases = "0 data.image_size=8 threat.steps=1; 1 data.image_size=16 threat.steps=2"
    config.eval.every_epochs = 1
    config.eval.validation_attack = "pgd-2"
    config.eval.attacks, config.eval.num_examples = "clean,cw-2,pgd-2", 0
    config.log_every_steps = 1


def _natural(config: ConfigDict) -> None:
    """The same budget without an attack: what robustness is compared with."""
    config.objective = "natural"


def pretrain(config: ConfigDict) -> None:
    """Natural training from scratch, for an adversarial run to start from; no attack validates."""
    _natural(config)
    _scratch(config)
    config.eval.validation_attack, config.eval.attacks = "clean", "clean,pgd-20"


VARIANTS: dict[str, Callable[..., None]] = {
    "model": _model,
    "ard": _ard,
    "prm": _prm,
    "ard_prm": _ard_prm,
    "natural": _natural,
    "scratch": _scratch,
    "smoke": _smoke,
}
TAKES_VALUE = frozenset({"model"})


def apply_variants(
    config: ConfigDict, variants: str, own: dict[str, Callable[..., None]] | None = None
) -> ConfigDict:
    """Applies a config string and adds it to the config's name.

    own: bare variants of this recipe alone.

    Raises:
      UserError: an item that is no variant, or lacks or does not take a value.
    """
    known = VARIANTS | (own or {})
    for item in filter(None, variants.split(",")):
        word, equals, value = item.partition("=")
        if word not in known:
            near = nearest(word, known)
            raise UserError(f"config variant '{word}' is unknown; use {near}")
        if (word in TAKES_VALUE) != bool(value):
            usage = f"{word}=NAME" if word in TAKES_VALUE else f"{word} without a value"
            raise UserError(f"config variant '{item}' is malformed; write {usage}")
        known[word](config, *([value] if equals else []))
        config.name += "-" + (value or word)
    return config
