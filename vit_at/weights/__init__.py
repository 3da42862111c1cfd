"""Weights between files, timm's names and Flax parameters.

load        a file or a name on a model hub -> {timm name: array}
read        the same, with the normalisation of the file
from_timm   {timm name: array} -> Flax parameters, adapted to the model's patch, resolution, classes
to_timm     Flax parameters -> {timm name: array}
convert     from_timm with a report of what was loaded, adapted, dropped and newly initialised

``files`` reads formats, ``forms`` removes wrappings, ``architecture`` reads sizes from shapes,
``adaptation`` changes shapes, ``conversion`` maps names and layouts.
"""

from vit_at.weights.conversion import Report, convert, from_timm, timm_shapes, to_timm
from vit_at.weights.files import HUB_PREFIX, load, read
from vit_at.weights.forms import Plain

__all__ = [
    "HUB_PREFIX",
    "Plain",
    "Report",
    "convert",
    "from_timm",
    "load",
    "read",
    "timm_shapes",
    "to_timm",
]
