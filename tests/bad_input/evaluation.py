"""``vit-at evaluate`` and ``vit_at.evaluate`` on a run, with options that can't be used."""

import shutil

from bad_input.calls import a_run
from bad_input.case import Case

import vit_at


def _without(name: str):
    def prepare(folder):
        a_run(folder)
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def _command(*options: str, says: str, **fields) -> Case:
    return Case(["evaluate", "run", *options], says, prepare=a_run, **fields)


def _call(says: str, *args, **options) -> Case:
    return Case(lambda folder: vit_at.evaluate(folder / "run", *args, **options), says, a_run)


CASES = {
    "unknown attack": _command(
        "--attacks=fgsm", says="attack 'fgsm' is unknown; write clean, pgd-N"
    ),
    "empty attack": _command("--attacks=clean,,pgd-2", says="attack '' is unknown"),
    "no attack": _command("--attacks=", says="attack '' is unknown"),
    "attack without steps": _command("--attacks=pgd", says="'pgd' is unknown"),
    "attack of no steps": _command("--attacks=pgd-0", says="'pgd-0' is unknown"),
    "attack of a negative number of steps": _command(
        "--attacks=pgd--3", says="'pgd--3' is unknown"
    ),
    "attack of half a step": _command("--attacks=pgd-2.5", says="'pgd-2.5' is unknown"),
    "steps in another script": _command("--attacks=cw-²", says="'cw-²' is unknown"),
    "attack in capitals": _command("--attacks=PGD-20", says="'PGD-20' is unknown"),
    "AutoAttack's rand": _command("--attacks=autoattack-rand", says="is unknown"),
    "attacks by semicolon": _command("--attacks=clean;pgd-2", says="'clean;pgd-2' is unknown"),
    "eps in 255ths": _command("--eps=8", says="eval.threat.eps is 8; .* did you mean 8/255"),
    "eps of 0": _command(
        "--eps=0", says="--eps is 0, which is the clean images; use --attacks=clean"
    ),
    "negative eps": _command("--eps=-0.1", says="--eps is -0.1; it must be over 0"),
    "eps not a number": _command("--eps=nan", says="--eps is nan"),
    "eps infinite": _command("--eps=inf", says="eps is inf"),
    "eps as a word": _command("--eps=eight", says="invalid fraction value: 'eight'"),
    "eps in per cent": _command("--eps=3%", says="invalid fraction value"),
    "step of 0": _command("--step_size=0", says="--step_size is 0; it must be over 0"),
    "negative step": _command("--step_size=-1/255", says="--step_size is -0.0039"),
    "step longer than the ball": _command("--step_size=0.9", says="at most twice eval.threat.eps"),
    "eps below half a step": _command(
        "--eps=0.001", "--step_size=0.05", says="eval.threat.step_size is 0.05"
    ),
    "norm without eps": _command("--norm=l2", says="give --eps too"),
    "unknown norm": _command("--norm=l0", says="invalid choice: 'l0'"),
    "L2 eps beyond any image": _command(
        "--norm=l2", "--eps=1e4", "--step_size=1", says="at most 100"
    ),
    "L1 eps beyond any image": _command(
        "--norm=l1", "--eps=65", "--step_size=1", says="at most 64"
    ),
    "no restarts": _command("--restarts=0", says="--restarts is 0; it must be 1 or more"),
    "negative restarts": _command("--restarts=-1", says="--restarts is -1"),
    "a precision of GPUs": _command(
        "--precision=tf32x3", says="--precision is 'tf32x3', which is for NVIDIA GPUs"
    ),
    "an unknown precision": _command("--precision=tf32", says="invalid choice: 'tf32'"),
    "from Python: an unknown precision": _call(
        "--precision is 'half'; use one of float32, bf16x9", "clean", precision="half"
    ),
    "labels of another suffix": _command("--write_labels=labels.json", says="an .npz file"),
    "labels nowhere": _command("--write_labels=none/x.npz", says="none is no directory"),
    "half a restart": _command("--restarts=1.5", says="invalid int value: '1.5'"),
    "batch that devices don't divide": _command("--batch_size=6", says="4 devices"),
    "negative batch": _command("--batch_size=-4", says="eval.batch_size is -4"),
    "more images than there are": _command(
        "--num_examples=1000", says="1000 examples are asked for"
    ),
    "negative number of images": _command("--num_examples=-1", says="-1 examples are asked for"),
    "unknown split": _command("--split=tset", says="tset"),
    "split beyond its end": _command("--split=test[:100000]", says="test\\[:100000\\]"),
    "split without an end": _command("--split=test[", says="test\\["),
    "negative seed": _command("--seed=-1", says="seed is -1"),
    "seed of 70 bits": _command(f"--seed={2**70}", says="seed is 1180591620717411303424"),
    "seed as a fraction": _command("--seed=1/2", says="invalid int value"),
    "unknown checkpoint": _command("--checkpoint=7", says="invalid choice: '7'"),
    "a second directory": _command("run2", says="'run2' is no flag"),
    "no configuration": Case(["evaluate", "run"], "config.json", _without("config.json")),
    "no checkpoints": Case(["evaluate", "run"], "no .*checkpoint", _without("checkpoints")),
    "a file instead of a run": Case(["evaluate", "run/config.json"], "config.json", a_run),
    "from Python: unknown attack": _call("attack 'pgd20' is unknown", "pgd20"),
    "from Python: negative seed": _call("seed is -1", "pgd-2", seed=-1),
    "from Python: no restarts": _call("--restarts is 0", "pgd-2", restarts=0),
    "eps of 0 twice": _command("--eps=0,0", says="use --attacks=clean without --eps"),
    "eps of 0 for one of two norms": _command(
        "--norm=linf,l2", "--eps=0,0.5", says="--eps is 0; it must be over 0"
    ),
    "from Python: eps of 0": _call("use --attacks=clean without", "pgd-2", eps=0.0),
    "from Python: results in /proc": _call(
        "no file can be written to /proc/foo .*; choose another --workdir", workdir="/proc/foo"
    ),
    "from Python: labels in /proc": _call(
        "no file can be written to /proc .*choose another --write_labels",
        write_labels="/proc/labels.npz",
    ),
    "from Python: too many images": _call("10000 examples are asked for", num_examples=10_000),
}
