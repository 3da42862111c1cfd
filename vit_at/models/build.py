"""The model that a configuration describes."""

import flax.linen as nn
from ml_collections import ConfigDict

from vit_at import models
from vit_at.config import check_tokens

_ARCHITECTURE = ("embed_dim", "depth", "num_heads", "mlp_ratio", "qk_scale", "drop_path", "remat")


def build(config: ConfigDict, num_classes: int, dtype: str) -> nn.Module:
    """``config.model`` for ``num_classes`` classes; a field that is 0 keeps the architecture's own.

    Raises:
      UserError: an unknown name, sizes that do not divide, or too few tokens.
    """
    options = config.model
    overrides = {name: options[name] for name in _ARCHITECTURE if options[name]}
    model = models.create(
        options.name,
        num_classes=num_classes,
        image_size=config.data.image_size,
        patch_size=options.patch_size or None,
        in_channels=len(config.data.mean),
        dtype=dtype,
        **overrides,
    )
    check_tokens(config, model.num_tokens)
    return model


def training_dtype(config: ConfigDict, platform: str) -> str:
    """``config.dtype``, with 'auto' resolved for a platform: 'cpu', 'gpu' or 'tpu'."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else "bfloat16"
