"""Adversarial training: what a step draws, how it attacks, what it minimises, and the loop around.

objectives   natural, AT, TRADES and MART: the loss of the attack and the loss of the update
masking      ARD and PRM: when and what is masked in the training attack
optim        learning-rate schedules and the optimizer
step         one training step, a pure function
setup        from a configuration to data, model, initial state and compiled step
loop         steps with metrics, validation, checkpoints and signals around them
metrics      what a run writes of itself
"""

from vit_at.training.objectives import OBJECTIVES, training_loss
from vit_at.training.optim import make_optimizer
from vit_at.training.step import Draws, draw, perturb

__all__ = ["OBJECTIVES", "Draws", "draw", "make_optimizer", "perturb", "training_loss"]
