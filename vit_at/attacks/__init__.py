"""Attacks: threat models, losses, and the loops that search for adversarial examples."""

from vit_at.attacks.pgd import pgd_attack
from vit_at.attacks.threat import Threat

__all__ = ["Threat", "pgd_attack"]
