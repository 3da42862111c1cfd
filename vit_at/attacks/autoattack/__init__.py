"""AutoAttack (Croce and Hein 2020) on any function from images to logits.

    result = autoattack.run(functools.partial(apply, params), images, labels, eps=8 / 255)
    print(result.summary())

The path from ``run`` to an attack step:

    runner.run                checks the input, opens the ledger, runs the cascade, verifies
    cascade.Cascade.run       the attacks one after the other, on the images that are still robust
    packing.Packing.rounds    one attack: keeps the batch full of unfinished runs, round by round
    programs.Program.advance  one round, compiled: a loop over steps on all devices
    methods.Method.advance    one step of a batch: apgd.advance, fab.advance or square.advance

Beside it: ``settings`` names the attacks and versions and holds ``Settings`` and ``Budget``,
``functions`` takes a user's model apart for jit, ``checks`` validates it and the input, ``ledger``
keeps the outcome of every image on disk, and ``audit`` raises flags if a result can't be trusted.
"""

from vit_at.attacks.autoattack.runner import Result, run
from vit_at.attacks.autoattack.settings import Budget, Settings

__all__ = ["Budget", "Result", "Settings", "run"]
