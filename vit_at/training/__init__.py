"""Adversarial training: the objectives, the step, and the loop around it.

objectives   natural, AT, TRADES and MART, a row each of one table
masking      ARD and PRM: when and what is masked in the training attack
attack       the attack of a step: its random draws, and the images it makes
optim        learning-rate schedules and the optimizer
step         one training step, a pure function
setup        from a configuration to data, model, initial state and compiled step
loop         steps with metrics, validation, checkpoints and signals around them
signals      ending a run between two steps
metrics      what a run reports
"""

from vit_at.training.attack import Draws, draw, perturb
from vit_at.training.objectives import OBJECTIVES, training_loss
from vit_at.training.optim import make_optimizer

__all__ = ["OBJECTIVES", "Draws", "draw", "make_optimizer", "perturb", "training_loss"]
