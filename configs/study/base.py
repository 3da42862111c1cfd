"""The four sizes of a study, and how its recipes are made.

Each file here is one question, as a ``get_config`` and a ``sweep``:

    vit-at sweep configs/study/masking.py:cpu
    python -m vit_at.report runs/study_masking-cpu-sweep --out=masking.html

cpu    the packaged digits, 40 epochs: about a minute a run on one CPU core, and no more than 20
       runs a table. Small enough to repeat, too small to carry over to photographs.
small  CIFAR-10 with a ConViT of 228 000 parameters, from natural training (``natural.py``): a
       quarter of an hour a run on one CPU core. Far from convergence, so for questions of cost.
gpu    CIFAR-10 with DeiT-tiny from published weights, 40 epochs, AutoAttack on 1 000 images
paper  CIFAR-10 with ViT-B as published, AutoAttack on all test images
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_at.configs import cifar10_sgd, common, digits_sgd
from vit_at.errors import UserError

SEEDS = (0, 1, 2)
NATURAL = "runs/study_natural-small-sweep/{}"  # the weights that size small starts from
Variants = dict[str, Callable[[ConfigDict], None]]


def _small() -> ConfigDict:
    config = cifar10_sgd.get_config("scratch,model=convit_tiny")
    config.model.stem, config.model.pretrained = "conv", NATURAL.format("default")
    config.model.embed_dim, config.model.depth, config.model.num_heads = 64, 4, 4
    config.dtype = "bfloat16"
    config.epochs, config.batch_size = 3, 128
    config.mixing.probability = 0.0
    config.ema_decay = 0.99
    config.masking.warmup_epochs = 0.75  # a quarter of the training, as in the paper
    config.threat.steps, config.threat.step_size = 2, 5 / 255
    config.threat.eps_warmup_epochs = 0.5
    config.optimizer.schedule, config.optimizer.warmup_epochs = "cosine", 0.2
    config.eval.checkpoint, config.eval.threat.step_size = "last", 2 / 255
    config.eval.attacks, config.eval.num_examples = "clean,pgd-20,cw-20", 2000
    return config


def _gpu() -> ConfigDict:
    config = cifar10_sgd.get_config("model=deit_tiny_patch16_224")
    config.eval.attacks, config.eval.num_examples = "clean,pgd-20,autoattack", 1000
    return config


def _paper() -> ConfigDict:
    config = cifar10_sgd.get_config()
    config.eval.attacks = "clean,cw-20,pgd-20,pgd-100,autoattack"
    return config


SIZES: dict[str, Callable[[], ConfigDict]] = {
    "cpu": digits_sgd.get_config,
    "small": _small,
    "gpu": _gpu,
    "paper": _paper,
}


def start(
    question: str,
    variants: str,
    own: Variants | None = None,
    first: Callable[[ConfigDict], None] | None = None,
) -> ConfigDict:
    """The configuration of a size, the first word of SIZES among ``variants``, with the others.

    Args:
      question: names the study, and with the size the configuration.
      variants: of the config string; without a size: cpu.
      own: bare variants of this study alone.
      first: what this study changes of every size, before the variants.

    Raises:
      UserError: two sizes, or an unknown variant.
    """
    items = [item for item in variants.split(",") if item]
    sizes = [item for item in items if item in SIZES]
    if len(sizes) > 1:
        raise UserError(f"config variants '{sizes[0]}' and '{sizes[1]}' exclude each other")
    size = sizes[0] if sizes else "cpu"
    config = SIZES[size]()
    config.name = f"study_{question}-{size}"
    if first is not None:
        first(config)
    rest = ",".join(item for item in items if item not in SIZES)
    return common.apply_variants(config, rest, own)


def from_natural(config: ConfigDict, run: str) -> None:
    """Size small starts from another run of ``natural.py``; larger sizes keep their weights."""
    if config.model.pretrained == NATURAL.format("default"):
        config.model.pretrained = NATURAL.format(run)


def patch(config: ConfigDict) -> None:
    """One linear map of patches before the blocks, in place of convolutions."""
    config.model.stem = "patch"
    from_natural(config, "patch")


def half(config: ConfigDict) -> None:
    """Half of the training images, in as many updates."""
    config.data.train_split = "train[:50%]"
    config.epochs *= 2
    from_natural(config, "half")


def over_seeds(add: Callable[..., None], variants: str = "", **fields: object) -> None:
    """One arm of a study, once for each seed; a dot in a field is written as two underscores."""
    named = {name.replace("__", "."): value for name, value in fields.items()}
    for seed in SEEDS:
        add(variants, named | {"seed": seed})
