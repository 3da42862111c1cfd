"""ARD and PRM: when and what is masked in the training attack.

The two maskings of Mo et al., "When Adversarial Training Meets Vision Transformers", NeurIPS 2022:

ARD  attention random dropping: in each attack step every attention block keeps its gradient with
     probability p. The mask acts in ``models.layers.gate_gradient``.
PRM  perturbation random masking: in each attack step int(P * (1 - p)) of the P patches, drawn
     without replacement, lose their perturbation. The mask acts in
     ``attacks.pgd.training_attack``.

Both share one keep probability p = keep_max * min(1, t / warmup), with t in epochs: at the start
nearly everything is masked, after the warm-up (with keep_max 1) nothing is. The masks are shared by
the batch; ``training.attack.draw`` draws them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Masking:
    """warmup_epochs, keep_max: the schedule; patch_size: side of PRM's patches in pixels."""

    ard: bool = False
    prm: bool = False
    warmup_epochs: float = 10.0
    keep_max: float = 1.0
    patch_size: int = 4

    @classmethod
    def of(cls, options: ConfigDict, model_patch_size: int) -> "Masking":
        """The masking of ``config.masking``."""
        return cls(**{**options, "patch_size": options.patch_size or model_patch_size})


def keep_probability(masking: Masking, progress: float | Array) -> Array:
    """p at ``progress``, the number of epochs done when the current step is; scalar."""
    warm = jnp.asarray(progress) / max(masking.warmup_epochs, 1e-9)
    return masking.keep_max * jnp.minimum(1.0, warm)


def num_masked_patches(num_patches: int, probability: float | Array) -> Array:
    """int(P * (1 - p)), scalar int32; whole numbers survive the rounding errors of p in float32."""
    return jnp.floor(num_patches * (1 - jnp.asarray(probability) + 1e-6)).astype(jnp.int32)


def draw_attn_keep(key: Array, steps: int, num_blocks: int, probability: Array) -> Array:
    """[steps, num_blocks] bool; False: the block's attention passes no gradient."""
    return jax.random.bernoulli(key, probability, (steps, num_blocks))


def draw_patch_keep(key: Array, steps: int, grid: tuple[int, int], probability: Array) -> Array:
    """[steps, rows, columns] bool; False: the patch's perturbation is zeroed."""
    num_patches = grid[0] * grid[1]
    places = jnp.tile(jnp.arange(num_patches), (steps, 1))
    shuffled = jax.random.permutation(key, places, axis=1, independent=True)
    keep = shuffled >= num_masked_patches(num_patches, probability)
    return keep.reshape(steps, *grid)
