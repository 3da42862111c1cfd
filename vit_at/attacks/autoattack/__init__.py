"""AutoAttack (Croce and Hein 2020): ``run`` on any function of images to logits.

A call goes through these files, in this order:

    runner    run: checks the input, opens the ledger, runs the cascade, verifies its result
    cascade   the attacks one after the other, each on the images that are still robust
    packing   one attack: keeps the device's batch full of images that are not broken yet
    methods   one attack step for a batch, of apgd, fab or square (in ``vit_at.attacks``)

Beside them, ``checks`` holds what is demanded of the input and the model, ``ledger`` the outcome of
every image on disk, and ``audit`` the flags that say when a result can't be trusted.
"""

from vit_at.attacks.autoattack.runner import Result, run

__all__ = ["Result", "run"]
