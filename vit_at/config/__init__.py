"""The schema of a configuration.

fields       the types and limits of the fields, and those that older files lack
derived      what several fields say together: the balls, and the weights that are tested
validation   validate: refuses unknown, out-of-range and contradictory values
trees        nested dicts as one dict with dotted names, and back
"""

from vit_at.config.derived import evaluated_weights, evaluation_threat, fraction, training_balls
from vit_at.config.fields import ADDED, CHECKPOINTS, CHOICES, MAX_STEPS, with_added
from vit_at.config.trees import differences, flatten, nested
from vit_at.config.validation import validate

__all__ = [
    "ADDED",
    "CHECKPOINTS",
    "CHOICES",
    "MAX_STEPS",
    "differences",
    "evaluated_weights",
    "evaluation_threat",
    "flatten",
    "fraction",
    "nested",
    "training_balls",
    "validate",
    "with_added",
]
