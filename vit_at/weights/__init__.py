"""Parameters under timm's names and as Flax has them; from files, from a model hub, and back.

from_timm   {timm name: array} -> Flax parameters, adapted to the model's patch, resolution, classes
to_timm     Flax parameters -> {timm name: array}
convert     from_timm with a report of what was loaded, adapted, dropped and newly initialised
load        a file or a model hub's name -> {timm name: array}

``conversion`` maps names and layouts, ``adaptation`` changes shapes, ``files`` reads formats.
"""

from vit_at.weights.conversion import Report, convert, from_timm, timm_shapes, to_timm
from vit_at.weights.files import HUB_PREFIX, load

__all__ = ["HUB_PREFIX", "Report", "convert", "from_timm", "load", "timm_shapes", "to_timm"]
