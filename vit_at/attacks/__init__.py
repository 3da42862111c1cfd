"""Attacks: threat models, losses, and the loops that search for adversarial examples.

threat        Threat: norm, eps, step size and steps; one attack step within it
norms         the geometry of each norm, for all attacks
losses        cross-entropy, KL, CW margin, DLR and targeted DLR
pgd           training_attack (PGD with ARD and PRM) and pgd_attack (PGD and CW evaluation)
apgd          Auto-PGD
fab           the fast adaptive boundary attack
square        Square, which needs logits only
curves        robust accuracy over eps and over attack steps
autoattack/   apgd, fab and square one after the other, on any function from images to logits
"""

from vit_at.attacks.norms import NORMS
from vit_at.attacks.pgd import pgd_attack
from vit_at.attacks.threat import Threat

__all__ = ["NORMS", "Threat", "pgd_attack"]
