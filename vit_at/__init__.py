"""Adversarial training of vision transformers in JAX/Flax, on TPU, GPU and CPU.

    import vit_at
    model = vit_at.create("deit_tiny_patch16_224", num_classes=10)

What ``__all__`` names is imported when first used, so ``import vit_at`` loads neither JAX nor Flax.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_at.attacks import Threat, autoattack, pgd_attack
    from vit_at.evaluate import evaluate
    from vit_at.models import classifier, create
    from vit_at.training.loop import train
    from vit_at.workdir.registry import load

__version__ = "0.1.0"
__all__ = [
    "Threat",
    "autoattack",
    "classifier",
    "create",
    "evaluate",
    "load",
    "pgd_attack",
    "train",
]

# In a checkout configs/ lies beside this package; only an installation makes it vit_at.configs.
if importlib.util.find_spec("vit_at.configs") is None:
    raise ModuleNotFoundError(
        "vit_at is on Python's path, but not installed: run 'pip install -e .' in its checkout"
    )

_MODULE_OF = {
    "Threat": "vit_at.attacks",
    "classifier": "vit_at.models",
    "create": "vit_at.models",
    "load": "vit_at.workdir.registry",
    "pgd_attack": "vit_at.attacks",
    "train": "vit_at.training.loop",
}
# ``evaluate`` is a module too, which can be called: it takes the function's place.
_MODULES = {"autoattack": "vit_at.attacks.autoattack", "evaluate": "vit_at.evaluate"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'vit_at' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
