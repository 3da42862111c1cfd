"""Adversarial training of vision transformers in JAX/Flax, on TPU, GPU and CPU."""

__version__ = "0.1.0"
