"""Vision transformers as pure functions of their parameters.

create(name, ...)    a Flax module by timm's name
build(config, ...)   the same, by a configuration
NAMES                every name create() knows
classifier(model)    images in [0, 1] -> logits: normalisation is the first thing inside
unstack_blocks, stack_blocks   parameters as a loop of such calls wants them, and back
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_at.errors import UserError, nearest
from vit_at.models import blocks, convit, convnext, swin, vit, xcit
from vit_at.models.blocks import stack_blocks as stack_blocks

_FAMILIES = (
    (vit.VisionTransformer, vit.SIZES),
    (vit.DistilledTransformer, vit.DISTILLED_SIZES),
    (convit.ConViT, convit.SIZES),
    (swin.SwinTransformer, swin.SIZES),
    (xcit.XCiT, xcit.SIZES),
    (convnext.ConvNeXt, convnext.SIZES),
)
NAMES = tuple(sorted(name for _, sizes in _FAMILIES for name in sizes))
_ARCHITECTURE = (  # fields of the architecture that a configuration may set
    "stem",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qk_scale",
    "drop_path",
    "remat",
)

# A ``Classifier``, or any function
# apply(params, images01, attn_grad_keep=None, train=False, rngs=None) -> logits.
Apply = Callable[..., jax.Array]


def create(
    name: str,
    *,
    num_classes: int,
    image_size: int | None = None,
    patch_size: int | None = None,
    in_channels: int = 3,
    dtype: str = "float32",
    **overrides: Any,
) -> nn.Module:
    """Builds a model by timm's name.

    Args:
      image_size, patch_size: sides in pixels; None: those in the name.
      dtype: of the matrix products: bfloat16, float32, or float64 for exact checks.
      **overrides: fields of the architecture: stem, embed_dim, depth, num_heads, ...

    Returns:
      A module with ``apply({"params": p}, images, attn_grad_keep=None, train=False, rngs=None)``
      that maps normalised images [B, H, W, C] to float32 logits [B, num_classes];
      ``num_blocks`` is the length of ``attn_grad_keep``.

    Raises:
      UserError: the name or a field is unknown, or a size does not suit the architecture.
    """
    if name not in NAMES:
        raise UserError(f"model.name '{name}' is unknown; the nearest are {nearest(name, NAMES)}")
    family, sizes = next(f for f in _FAMILIES if name in f[1])
    unknown = sorted(overrides.keys() - {field.name for field in dataclasses.fields(family)})
    if unknown:
        raise UserError(f"{name} has no field {', '.join(unknown)}; remove it from the overrides")
    sides = {"image_size": image_size, "patch_size": patch_size}
    shape = {"image_size": 224} | sizes[name] | overrides
    shape |= {side: pixels for side, pixels in sides.items() if pixels is not None}
    if shape["image_size"] % shape["patch_size"]:
        raise UserError(
            f"model.patch_size {shape['patch_size']} does not divide data.image_size "
            f"{shape['image_size']}; choose a patch that does"
        )
    if shape["embed_dim"] % shape["num_heads"]:
        raise UserError(
            f"model.num_heads {shape['num_heads']} does not divide model.embed_dim "
            f"{shape['embed_dim']}; choose a number of heads that does"
        )
    if int(shape["embed_dim"] * shape["mlp_ratio"]) < 1:
        raise UserError(
            f"model.mlp_ratio {shape['mlp_ratio']} times model.embed_dim {shape['embed_dim']} is "
            "less than one unit; choose a larger model.mlp_ratio, or 0 for the architecture's"
        )
    return family(
        num_classes=num_classes,
        in_channels=in_channels,
        dtype=dtype,
        **shape,
    )


def build(config: ConfigDict, num_classes: int, dtype: str) -> nn.Module:
    """``config.model`` for ``num_classes`` classes; a field that is 0 keeps the architecture's own.

    Raises:
      UserError: an unknown name, sizes that do not divide, too few tokens, or ARD without
        attention.
    """
    options = config.model
    overrides = {name: options[name] for name in _ARCHITECTURE if options[name]}
    model = create(
        options.name,
        num_classes=num_classes,
        image_size=config.data.image_size,
        patch_size=options.patch_size or None,
        in_channels=len(config.data.mean),
        dtype=dtype,
        **overrides,
    )
    if model.num_tokens < 16 and not options.allow_few_tokens:
        raise UserError(
            f"model.patch_size leaves {model.num_tokens} tokens of a "
            f"{config.data.image_size}-pixel image, and with fewer than 16 a transformer hardly "
            "learns; choose a smaller patch, or set model.allow_few_tokens=True"
        )
    if config.masking.ard and not model.num_blocks:
        raise UserError(
            f"masking.ard is True, but {options.name} has no attention whose gradient could be "
            "dropped; set it to False, masking.prm works with any model"
        )
    return model


def training_dtype(config: ConfigDict, platform: str) -> str:
    """``config.dtype``, with 'auto' resolved for a platform: 'cpu', 'gpu' or 'tpu'."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else "bfloat16"


def init_params(model: nn.Module, key: jax.Array) -> Any:
    """Freshly initialised parameters; the same key gives the same on any number of devices."""
    images = jnp.zeros((1, model.image_size, model.image_size, model.in_channels))
    return model.init(key, images)["params"]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Pixels to logits, with the model's normalisation inside; see ``classifier``."""

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self,
        params: Any,
        images01: jax.Array,
        attn_grad_keep: jax.Array | None = None,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Logits [B, num_classes] of images01 [B, H, W, C] in [0, 1].

        rngs: {'drop_path': a key, or an array [B] of keys, one for each image}.
        """
        shift, scale = (jnp.asarray(x, images01.dtype) for x in (self.mean, self.std))
        images = (images01 - shift) / scale
        forward: Callable[..., Any] = functools.partial(self.model.apply, {"params": params})
        if not (train and rngs and self.model.drop_path):
            return forward(images, attn_grad_keep)
        if rngs["drop_path"].ndim == 0:
            return forward(images, attn_grad_keep, train, rngs=rngs)

        def of_one(image, rngs):
            return forward(image[None], attn_grad_keep, train, rngs=rngs)[0]

        return jax.vmap(of_one)(images, rngs)

    @property
    def deterministic(self) -> bool:
        """Whether training computes the same logits as evaluation: no stochastic depth."""
        return not self.model.drop_path


def classifier(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Classifier:
    """Pixels to logits: ``apply(params, images01, attn_grad_keep=None, train=False, rngs=None)``.

    mean, std: of the normalisation, per channel, in units of images in [0, 1].
    """
    return Classifier(model, tuple(mean), tuple(std))


def for_device(apply: Apply, device: Any) -> Apply:
    """``apply`` as a device computes it best: attention in bfloat16 by one kernel.

    On GPUs since Ampere by cuDNN's, on TPUs by ``tpu_attention``. No-op for other dtypes and
    devices, for heads that cuDNN does not take, and plain functions.
    device: one of the mesh, which need not be there.
    """
    if not isinstance(apply, Classifier) or apply.model.dtype != "bfloat16":
        return apply
    capability = str(getattr(device, "compute_capability", ""))  # AMD's are no numbers
    ampere = capability[:1].isdigit() and float(capability) >= 8
    head_dim = apply.model.embed_dim // apply.model.num_heads
    if getattr(device, "platform", "") == "tpu":
        kernel = "pallas"
    elif ampere and head_dim % 8 == 0 and head_dim <= 128:
        kernel = "cudnn"
    else:
        return apply
    return dataclasses.replace(apply, model=apply.model.clone(attention_kernel=kernel))


def cast_kernels(apply: Apply, params: Any) -> Any:
    """The parameters of the blocks' linear layers in ``dtype``, as ``apply`` would cast them.

    For a loop that calls ``apply(params, ...)`` many times without a gradient by the parameters.
    No-op for plain functions.
    """
    if not isinstance(apply, Classifier):
        return params

    def cast(path, x):
        layers = [getattr(entry, "key", None) for entry in path[-2:-1]]
        return x.astype(apply.model.dtype) if set(layers) & set(blocks.LINEAR) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def unstack_blocks(apply: Apply, params: Any) -> Any:
    """The parameters as a loop that calls ``apply(params, ...)`` many times wants them.

    Every stack of blocks becomes a ``blocks.Unstacked``, which saves copying from and to stacks
    (docs/performance.md). No-op for plain functions. ``stack_blocks`` undoes it.
    """
    if not isinstance(apply, Classifier):
        return params
    names = {stack.split("/")[0] for stack in apply.model.stacks}

    def of_each(stack):
        rows = range(len(jax.tree.leaves(stack)[0]))
        return blocks.Unstacked(tuple(jax.tree.map(lambda x, i=i: x[i], stack) for i in rows))

    return {name: of_each(tree) if name in names else tree for name, tree in params.items()}
