"""AutoAttack on the examples of a data set, with an audit of the result, for ``evaluate``."""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from vit_at import models
from vit_at.attacks import autoattack
from vit_at.attacks.autoattack import audit
from vit_at.data.examples import Examples, file_name
from vit_at.evaluation.protocol import Attack

LEDGERS = "autoattack"  # in a work directory
_AUDITED = 128  # images at most


class Pixels:
    """The images of examples, [N, H, W, C] float32 in [0, 1], decoded when indexed."""

    dtype = np.dtype(np.float32)

    def __init__(self, examples: Examples):
        self._examples, self.shape = examples, (len(examples), *examples.image_shape)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._examples.read(places)[0].astype(np.float32) / 255


def evaluate_autoattack(
    apply: Callable[..., jax.Array],
    params: Any,
    examples: Examples,
    attack: Attack,
    mesh: Mesh,
    *,
    seed: int,
    batch_size: int,
    workdir: epath.Path | None,
    digest: str,
    progress: bool,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Runs ``attack.version`` and, if that is several attacks, the audit on the first images.

    workdir: of the ledger, None: none is kept; digest: of the weights, in the ledger's name.

    Returns:
      Correct [N] bool after the last attack, and further entries of the record: the accuracy after
      each attack, and the audit's flags and curves.
    """
    threat, labels, images = attack.threat, examples.labels(), Pixels(examples)
    progress = progress and jax.process_index() == 0
    if jax.process_count() > 1:  # in the audit, each process calls the model on its own
        params = jax.device_get(params)
    params = models.unstack_blocks(apply, params)
    logits_fn = functools.partial(apply, params)
    if workdir is not None:
        workdir = workdir / LEDGERS / _ledger_name(attack, examples, seed, digest)
    options = {"norm": threat.norm, "eps": threat.eps, "attacks": attack.version, "mesh": mesh}
    options |= {"batch_size": batch_size, "seed": seed, "workdir": workdir, "progress": progress}
    options |= {"precision": attack.precision}
    result = autoattack.run(logits_fn, images, labels, **options)
    details = {"cascade": {name: float(robust.mean()) for name, robust in result.robust.items()}}
    lines = [result.summary()]
    if result.flags:
        details["flags"] = result.flags
    if result.notes:
        details["notes"] = list(result.notes)
    if result.failures:
        details["unverified"] = {str(image): why for image, why in result.failures.items()}
    if len(result.robust) > 2:  # 'clean' and more than one attack
        few = np.arange(min(_AUDITED, len(labels)))
        first = {name: robust[few] for name, robust in result.robust.items()}
        first = dataclasses.replace(result, robust=first)
        audited = audit.audit(logits_fn, images[few], labels[few], first)
        details["audit"] = audited.record()
        lines.append(audited.summary())
    if progress:
        print("\n".join(lines), file=sys.stderr)
    return list(result.robust.values())[-1], details


def _ledger_name(attack: Attack, examples: Examples, seed: int, digest: str) -> str:
    """A directory name that is unique to the evaluation."""
    transform = "" if examples.transform == "squash" else examples.transform
    data = " ".join([examples.name, transform, examples.ids]).lower()
    data = re.sub(r"[^a-z0-9.]+", "-", data).strip("-")
    threat = f"{attack.threat.norm}_{float(attack.threat.eps)!r}"
    how = "" if attack.precision == "float32" else f"_{attack.precision}"
    how += f"_{examples.contents}" if examples.contents else ""
    after = f"_{len(examples)}_seed{seed}_{digest}{how}"
    return file_name(f"{attack.version}_{threat}_", data, after)
