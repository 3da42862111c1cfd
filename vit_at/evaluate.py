"""Clean, PGD-n, CW-n and AutoAttack accuracy of a run, an export, weights or a function.

    vit-at evaluate runs/cifar10_sgd --attacks=clean,pgd-20,cw-20
    vit-at evaluate --weights=FILE --model=deit_small_patch16_224 --data=cifar10
    vit-at evaluate --function=MODULE:NAME --data=cifar10

    vit-at evaluate runs/cifar10_sgd --attacks=pgd-20 --eps=0,2/255,4/255,8/255
    vit-at evaluate runs/cifar10_sgd --attacks=pgd-20 --norm=linf,l2 --eps=8/255,0.5
    vit-at evaluate runs/cifar10_sgd --attacks=pgd-20 --from=runs/cifar10_ard_prm

Each result is stored with its protocol in ``results.json``, the outcome of each image in
``per_example.npz`` and ``per_example.csv``. Several eps give a curve, several norms their union,
and --from the accuracy on adversarial images that were made for other models.
"""

import argparse
import inspect
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from vit_at.attacks import NORMS
from vit_at.cli import add_process_arguments, join_processes
from vit_at.config import CHECKPOINTS, fraction
from vit_at.console import quiet_logging
from vit_at.data import sources
from vit_at.distributed import devices, processes, sharding
from vit_at.distributed.precision import PRECISIONS, check_precision
from vit_at.errors import Parser, explained_errors, one_sentence_errors
from vit_at.evaluation import arguments, curves, pseudo_labels, transfer
from vit_at.evaluation.evaluator import Evaluator, evaluate_and_store
from vit_at.evaluation.protocol import parse_attacks
from vit_at.evaluation.subject import in_classes_of
from vit_at.workdir.files import disk_errors, locked
from vit_at.workdir.results import Results, as_text


def fractions(text: str) -> tuple[float, ...]:
    """'0,2/255,4/255' as numbers."""
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(fraction(part))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"invalid fraction value: '{part}'") from error
    return tuple(numbers)


def norms(text: str) -> str:
    """The same text, if it is '', a norm, or several with commas."""
    for name in text.split(",") if text else ():
        if name.lower() not in NORMS:
            raise argparse.ArgumentTypeError(
                f"invalid choice: '{name}' (choose from {', '.join(NORMS)})"
            )
    return text


@arguments.checked
def evaluate(
    source: epath.PathLike = "",
    attacks: str = "clean,pgd-20",
    *,
    weights: str = "",
    model: str = "",
    num_heads: int = 0,
    function: str = "",
    checkpoint: str = "",
    data: str = "",
    data_dir: str = "",
    split: str = "",
    ids: str = "",
    transform: str = "",
    image_size: int = 0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    num_examples: int = 0,
    norm: str = "",
    eps: float | Sequence[float] | None = None,
    step_size: float | None = None,
    restarts: int = 1,
    batch_size: int = 0,
    precision: str = "float32",
    seed: int = 0,
    workdir: str = "",
    from_runs: str = "",
    write_labels: str = "",
) -> list[dict[str, Any]]:
    """Measures the accuracy of a run, an export, weights or a function under attacks.

    A result that ``results.json`` has under the same protocol is not measured again.

    Args:
      source: a directory that ``vit_at.train`` or the export has written, or a model's name as in
        ``vit_at.load``; or '', and one of ``weights`` and ``function``.
      attacks: comma-separated: clean, pgd-N, cw-N, autoattack or one of its parts, such as apgd-t.
      weights: a weight file or 'hf:NAME', see ``vit_at.weights.load``; model: timm's name of its
        architecture; num_heads: where it can't be known from the name, see docs/evaluate.md.
      function: 'MODULE:NAME' of a function of images [B, H, W, C] in [0, 1] to logits [B, K].
      checkpoint: 'best' or 'last' of a work directory; '': the one that its run tests.
      data: as ``data.name`` of a configuration; '': that of the run, and cifar10 of the others.
      data_dir: TFDS data directory, or the one that holds 'folder:NAME'; '': the configuration's.
      split: such as 'test[:1000]'; '': the configuration's, and of other data the whole of it.
      ids: a file with one image a line, as CLASS/FILE, or 'robustbench' for its 5 000 of ImageNet:
        only these images of the split, in this order; '': all.
      transform: such as 'squash' or 'resize256-crop224', see ``vit_at.data.transforms``; '': the
        configuration's.
      image_size, mean, std: of weights and functions; 0 and (): the file's or the data set's.
      num_examples: the first so many images of it; 0: all.
      norm, eps, step_size: of the attacks, in pixel units of images in [0, 1]; '' and None: as in
        ``eval.threat``, with steps in proportion to eps. Several eps, also as an array, give a
        curve, in which 0 is clean images. Several norms, comma-separated, with one eps for each,
        give their union.
      restarts: random starts of PGD and CW, at most 1000; an image counts as robust if all fail.
      batch_size: over all devices; 0: the configuration's.
      precision: of float32 products on an NVIDIA GPU, see docs/evaluate.md.
      seed: of the random starts.
      workdir: where results are stored; '': the source, or a folder of runs/evaluate.
      from_runs: other work directories or exports, comma-separated. The adversarial images of each
        model are given to all; results are stored in ``transfer`` of the work directory.
      write_labels: a new .npz file for the images, the model's labels of them and its confidence,
        which ``data.extra`` of another training takes.

    Returns:
      One record for each attack, as in ``results.json``: accuracy, standard error, protocol. Of a
      union one more, and of ``from_runs`` one for each pair of models.

    Raises:
      UserError: a directory, file, data set or option that can't be used.
    """
    given = locals()
    subject = arguments.subject(given)
    config = subject.config
    config.eval.batch_size = batch_size or config.eval.batch_size
    sizes = (eps,) if isinstance(eps, (int, float)) else tuple(eps or ())
    threats = curves.threats(config, norm, sizes, step_size)
    mesh = sharding.make_mesh()
    sharding.check_batch_size("--batch_size", config.eval.batch_size, mesh)
    check_precision("--precision", precision, mesh)
    parsed = curves.attacks(attacks, threats, restarts, 0 in sizes, precision)
    labels_file = pathlib.Path(os.path.expanduser(write_labels))
    if write_labels:
        pseudo_labels.check_file(labels_file)
        arguments.make_writable(labels_file.parent, "--write_labels")
    models = transfer.subjects(subject, from_runs, checkpoint, parsed, data) if from_runs else {}
    threads = config.data.threads
    examples = sources.load(
        config.data, config.data.test_split, threads=threads, chosen=ids, count=num_examples
    )
    examples = in_classes_of(examples, subject)
    options = {"batch_size": config.eval.batch_size, "seed": seed, "threads": threads}
    directory = epath.Path(workdir).expanduser() if workdir else subject.workdir
    if models:
        directory /= transfer.TRANSFER_DIRECTORY
    else:
        evaluator = Evaluator(subject.apply, examples, parsed, mesh, **options)
    arguments.make_writable(directory, "--workdir")
    with disk_errors(directory), locked(directory, "evaluation"):
        results = Results(directory)
        if models:
            records = transfer.evaluate_transfer(models, examples, parsed, mesh, results, **options)
        else:
            about: dict[str, Any] = {"seed": seed, "weights": subject.weights}
            records = evaluate_and_store(evaluator, subject.params, examples, results, **about)
        if "," in norm:
            records += curves.store_unions(records, results, examples)
        if jax.process_index() == 0 and (models or len(threats) > 1):
            _write_tables(results, records)
    if write_labels:
        (clean,) = parse_attacks("clean", threats[0], precision=precision)
        options = {"batch_size": config.eval.batch_size, "threads": threads}
        labels = pseudo_labels.label(
            subject.apply, subject.params, examples, clean, mesh, **options
        )
        if jax.process_index() == 0:
            pseudo_labels.write(labels_file, examples, labels)
    return records


def _write_tables(results: Results, records: list[dict[str, Any]]) -> None:
    """Writes the curves or matrices of records; says where."""
    from vit_at.reporting import tables  # matplotlib is not needed otherwise

    for path in tables.write(results, records):
        print(f"table and picture: {path}.csv, .png", file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command: arguments of ``evaluate``, and those of processes."""
    add = parser.add_argument
    written = "what 'vit-at train' or 'vit-at export' has written"
    add("source", metavar="WORKDIR", nargs="?", default="", help=written)
    add("--weights", default="", metavar="FILE", help="weights of somebody else, or hf:NAME")
    add("--model", default="", metavar="MODEL", help="timm's name of their architecture")
    add("--num_heads", type=int, default=0, help="of weights that are as wide as no known model")
    add("--function", default="", metavar="MODULE:NAME", help="of images [B, H, W, C] to logits")
    add("--attacks", default="clean,pgd-20", help="such as clean,pgd-20,cw-20,autoattack")
    add("--checkpoint", default="", choices=CHECKPOINTS, help="default: the one its run tests")
    add("--data", default="", help="name of a data set, as in a recipe; default: that of the run")
    add("--data_dir", default="", help="of TFDS, or the one that holds folder:NAME")
    add("--split", default="", help="such as test or test[:1000]; default: the configuration's")
    add("--ids", default="", metavar="FILE", help="images, CLASS/FILE a line; or 'robustbench'")
    add("--transform", default="", metavar="NAME", help="such as squash or resize256-crop224")
    add("--image_size", type=int, default=0, help="side in pixels; of weights and functions")
    add("--mean", type=fractions, default=(), help="of the normalisation of weights, such as a,b,c")
    add("--std", type=fractions, default=(), help="likewise")
    add("--num_examples", type=int, default=0, help="the first so many images; 0: all")
    add("--norm", type=norms, default="", help="linf, l2 or l1, or several; default: as trained")
    add(
        "--eps",
        type=fractions,
        help="of images in [0, 1], such as 8/255 or 0,4/255,8/255",
    )
    add("--step_size", type=fraction, help="in the same units; default: scaled with eps")
    add("--restarts", type=int, default=1, help="random starts of PGD and CW")
    add("--batch_size", type=int, default=0, help="over all devices")
    how = "of float32 products on an NVIDIA GPU; default: float32"
    add("--precision", default="float32", choices=tuple(PRECISIONS), help=how)
    add("--seed", type=int, default=0, help="of the random starts")
    add("--workdir", default="", metavar="DIR", help="where results are stored")
    kept = "a new file for images, labels by the model and its confidence"
    add("--write_labels", default="", metavar="FILE.npz", help=kept)
    others = "whose adversarial images it is given, comma-separated"
    add("--from", dest="from_runs", default="", metavar="WORKDIRS", help=others)
    add_process_arguments(parser)


def main(words: Sequence[str] | None = None) -> int:
    """Evaluates; returns the exit status, 2 for a mistake of the user's."""
    quiet_logging()
    parser = Parser(prog="vit-at evaluate", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(words)
    shares = max(1, options.num_processes)
    batch_sizes = [options.batch_size // shares] if options.batch_size else []
    workdir = options.source or options.workdir
    with one_sentence_errors(workdir):
        devices.configure(*batch_sizes, cache=options.compilation_cache, workdir=workdir)
        join_processes(options)
        with processes.shared_exit(), explained_errors(workdir):
            processes.end_on_sigterm()  # there is nothing to save
            names = inspect.signature(evaluate).parameters
            records = evaluate(**{name: getattr(options, name) for name in names})
            if jax.process_index() == 0:
                print(as_text(records))
    return 0


class _Callable(types.ModuleType):
    """Lets ``vit_at.evaluate`` be called, as it is this module once this has been imported."""

    def __call__(self, *args: Any, **options: Any) -> list[dict[str, Any]]:
        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
