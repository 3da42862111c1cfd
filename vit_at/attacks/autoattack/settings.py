"""What an AutoAttack evaluation runs: the attacks and versions by name, and their settings."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jax.sharding import Mesh

from vit_at.attacks.threat import Threat
from vit_at.distributed import sharding
from vit_at.errors import UserError, nearest

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
KEEP = ("first", "worst")
_APGD = ("apgd-ce", "apgd-dlr")
_RESTARTED = {"plus": (*_APGD, "fab")}  # 5 times
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
TARGETS = 9  # of the targeted attacks, 5 of APGD-T in l1; all wrong classes if there are fewer
_CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one run of an attack may compute; the default is the official one.

    iterations: of APGD and FAB; queries: of Square. restarts: of each attack, and of each target of
    the targeted ones; targets: the most likely wrong classes. None: those of the version.
    samples: draws of a randomised model for each gradient of APGD (EOT). rho: APGD in linf and l2
    halves its step if a smaller share of the iterations since the last checkpoint raised the loss.
    """

    iterations: int = 100
    queries: int = 5000
    restarts: int | None = None
    targets: int | None = None
    samples: int = 20
    rho: float = 0.75


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an evaluation, as for ``autoattack.run``. mesh: default, all devices.

    eps: None: 8/255 in linf, while another norm needs one. UserError: the norm, eps, keep or
    individually is not allowed.
    """

    norm: str = "linf"
    eps: float = None  # type: ignore[assignment]  # never None afterwards
    attacks: str | Sequence[str] = "standard"
    batch_size: int = 256
    seed: int = 0
    budget: Budget = Budget()
    individually: bool = False
    keep: str = "first"
    mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    precision: str = "float32"

    def __post_init__(self):
        threat = Threat(self.norm, self.eps)  # checks both
        if np.ndim(threat.eps):
            raise UserError(
                f"eps has the shape {np.shape(threat.eps)}; give one number for all images, such "
                "as 8 / 255"
            )
        object.__setattr__(self, "norm", threat.norm)
        object.__setattr__(self, "eps", float(threat.eps))
        if self.keep not in KEEP:
            raise UserError(f"keep is {self.keep!r}; use one of {', '.join(KEEP)}")
        if not isinstance(self.individually, bool):
            raise UserError(f"individually is {self.individually!r}; it must be True or False")
        if not isinstance(self.budget, Budget):
            raise UserError(
                f"budget is {self.budget!r}; give a Budget, such as Budget(queries=1000)"
            )

    @property
    def version(self) -> str:
        """One of ``VERSIONS``, or 'custom' for a list of attacks."""
        named = isinstance(self.attacks, str) and self.attacks in VERSIONS
        return str(self.attacks) if named else "custom"

    @property
    def in_phases(self) -> bool:
        """Whether APGD in l1 starts in larger balls: officially in the standard version only."""
        return self.norm == "l1" and self.version in ("standard", "custom")

    def restarts(self, attack: str) -> int:
        """How often an attack is run, for each of its targets if it has some."""
        many = attack in _RESTARTED.get(self.version, ()) or (self.in_phases and attack in _APGD)
        return self.budget.restarts or (5 if many else 1)

    def targets(self, attack: str, num_classes: int) -> int:
        """How many target classes an attack tries; 1 for an untargeted attack."""
        if not attack.endswith("-t"):
            return 1
        official = 5 if self.in_phases and attack == "apgd-t" else TARGETS
        return min(self.budget.targets or official, num_classes - 1)

    @property
    def randomised(self) -> bool:
        """Whether the model takes a key for its randomness."""
        return self.version == "rand"


def parse(attacks: str | Sequence[str]) -> tuple[str, ...]:
    """The attacks of a version or of a custom list.

    Raises:
      UserError: the version or an attack is unknown, or one is named twice.
    """
    if isinstance(attacks, str):
        if attacks in VERSIONS:
            return VERSIONS[attacks]
        attacks = [name.strip() for name in attacks.split(",")]
    if not isinstance(attacks, Iterable):
        raise UserError(
            f"attacks is {attacks!r}; use {', '.join(VERSIONS)} or a list of {', '.join(NAMES)}"
        )
    attacks = tuple(attacks)
    for name in attacks:
        if name not in NAMES:
            choices = (*VERSIONS, *NAMES)
            raise UserError(
                f"attack '{name}' is unknown; use {', '.join(VERSIONS)} or a list of "
                f"{', '.join(NAMES)} (nearest: {nearest(str(name), choices, 1)})"
            )
    if not attacks or len(set(attacks)) < len(attacks):
        raise UserError("the attacks must be at least one, each named once; change the list")
    return attacks


def for_classes(
    names: tuple[str, ...], num_classes: int, targets: int = TARGETS
) -> tuple[tuple[str, ...], list[str]]:
    """The attacks that work with ``num_classes``, and a sentence for each change.

    The DLR loss needs 3 classes and the targeted DLR loss 4: with 3 classes, APGD-DLR replaces
    APGD-T; with 2, both are left out. With fewer than 10 classes there are fewer than 9 targets.

    Raises:
      UserError: no attack is left.
    """
    kept, notes = [], []
    for name in names:
        if num_classes >= _CLASSES_NEEDED.get(name, 2):
            kept.append(name)
        elif name == "apgd-t" and num_classes == 3 and "apgd-dlr" not in names:
            kept.append("apgd-dlr")
            notes.append("the targeted DLR loss needs 4 classes: apgd-dlr replaces apgd-t")
        else:
            notes.append(f"{name} is left out: its loss needs more than {num_classes} classes")
    if any(name.endswith("-t") for name in kept) and num_classes <= targets:
        notes.append(f"{num_classes} classes allow {num_classes - 1} targets, not {targets}")
    if not kept:
        raise UserError(f"no attack of {', '.join(names)} works with {num_classes} classes")
    return tuple(kept), notes
