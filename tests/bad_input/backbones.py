"""XCiT and ConvNeXt: sizes and fields that they don't have, ARD without attention, bad weights."""

import numpy as np
from bad_input.case import Case

from vit_at import models, weights


def xcit(says: str, *fields: str) -> Case:
    return train("xcit_nano_12_p16_224", says, *fields)


def convnext(says: str, *fields: str) -> Case:
    sizes = ("model.depth=10", "model.num_heads=0", "data.image_size=32", "model.embed_dim=16")
    return train("convnext_tiny", says, *sizes, *fields)


def train(name: str, says: str, *fields: str) -> Case:
    fields = (f"model.name={name}", *fields)
    flags = [f"--config.{field}" for field in fields]
    return Case(["train", "digits_sgd:smoke", "--no-report", "--workdir=run", *flags], says)


def statistics(says: str, name: str, value: float | None) -> Case:
    """Weights of an XCiT whose BatchNorm statistics are wrong, or missing."""

    def load(folder):
        sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
        model = models.create("xcit_nano_12_p16_224", num_classes=2, **sizes)
        weights.from_timm(arrays(model), model)

    def arrays(model):
        import jax

        shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
        named = weights.timm_shapes(shapes, model)
        state = {name: np.ones(shape, np.float32) for name, shape in named.items()}
        kept = {} if value is None else {name: np.full_like(state[name], value)}
        return {n: v for n, v in state.items() if n != name} | kept

    return Case(load, says)


BN = "blocks.0.local_mp.bn"
CASES = {
    "XCiT with a patch that is no power of 2": xcit("model.patch_size 12", "model.patch_size=12"),
    "XCiT with a patch larger than its convolutions": xcit(
        "32 does not suit this XCiT.* choose one of 2, 4, 8, 16",
        "model.patch_size=32",
        "data.image_size=32",
    ),
    "XCiT with a second stem": xcit("model.stem is 'conv', but XCiT", "model.stem=conv"),
    "XCiT with an attention scale": xcit("learns a temperature; use 0", "model.qk_scale=0.1"),
    "XCiT too narrow for its stem": xcit("model.embed_dim 20", "model.embed_dim=20"),
    "ConvNeXt with heads": convnext("has no attention; use 0", "model.num_heads=2"),
    "ConvNeXt with an attention scale": convnext("has no attention; use 0", "model.qk_scale=0.1"),
    "ConvNeXt with too few blocks": convnext("model.depth 4 is too small", "model.depth=4"),
    "ConvNeXt on an odd grid": convnext("a multiple of 32, such as 32 or 64", "data.image_size=48"),
    "ConvNeXt's stem with small patches": convnext(
        "ConvNeXt has for patches of 4 pixels", "model.stem=conv", "model.patch_size=2"
    ),
    "ARD without attention": convnext(
        "masking.ard is True, but convnext_tiny has no attention", "masking.ard=True"
    ),
    "a negative variance": statistics(f"{BN}.running_var holds -1", f"{BN}.running_var", -1.0),
    "no variance": statistics(f"missing: {BN}.running_var", f"{BN}.running_var", None),
    "a variance that is no number": statistics("not finite", f"{BN}.running_var", float("nan")),
}
