"""Weights between files, timm's names and Flax parameters.

load        a file or a name on a model hub -> {timm name: array}
from_timm   {timm name: array} -> Flax parameters, adapted to the model's patch, resolution, classes
to_timm     Flax parameters -> {timm name: array}
convert     from_timm with a report of what was loaded, adapted, dropped and newly initialised

``files`` reads formats, ``adaptation`` changes shapes, ``conversion`` maps names and layouts.
"""

from vit_at.weights.conversion import Report, convert, from_timm, timm_shapes, to_timm
from vit_at.weights.files import HUB_PREFIX, load

__all__ = ["HUB_PREFIX", "Report", "convert", "from_timm", "load", "timm_shapes", "to_timm"]
