"""Checkpoints with orbax: asynchronous, atomic, and verified when they are read.

    WORKDIR/checkpoints/last/STEP/    the whole training state; the newest few are kept
    WORKDIR/checkpoints/best/STEP/    the weights with the best validation
    WORKDIR/checkpoints/corrupt/      checkpoints that could not be read

Orbax writes into a temporary directory and renames it, so a checkpoint is complete or absent. Every
checkpoint also holds a fingerprint of each array, which detects changed bits.
"""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vit_at import models
from vit_at.config import differences, evaluated_weights, with_added
from vit_at.distributed import processes, sharding
from vit_at.errors import UserError, in_one_line
from vit_at.models import build
from vit_at.schema import is_remote
from vit_at.workdir.files import check_space, disk_errors, read_config

# Errors of the system, statuses of a bucket, and words of TensorStore for the same.
_UNREACHABLE = {errno.EIO, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EMFILE}
_STATUSES = {401, 403, 408, 429, 500, 502, 503, 504}
_REFUSALS = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|PERMISSION_DENIED|UNAUTHENTICATED|HTTP 5..|"
    "HTTP response code: (401|403|408|429|5..)|CURL error|credentials"
)
_METADATA = 2**20  # bytes allowed for what orbax writes beside the arrays


@jax.jit
def fingerprint(tree: Any) -> list[jax.Array]:
    """One uint32 per array: sum_i (2 i + 1) bits_i mod 2^32, i running over its 32-bit words.

    Any single changed word changes it. It does not depend on sharding: integer sums have no order.
    """

    def of_array(x):
        if x.dtype.itemsize < 4:
            x = x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1))

    return [of_array(x) for x in jax.tree.leaves(tree)]


def _plain_fingerprint(tree: Any) -> list[int]:
    return [int(x) for x in jax.device_get(fingerprint(tree))]


def _abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings to restore to: an array's own, or whole on every device."""
    whole = NamedSharding(mesh, sharding.WHOLE)

    def of_array(x):
        own = getattr(x, "sharding", None)
        laid = own if isinstance(own, NamedSharding) else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=laid)

    return jax.tree.map(of_array, tree)


def unreachable(error: Exception) -> bool:
    """Whether reading failed because the disk or bucket did not answer, or refused: no damage."""
    if isinstance(error, (ConnectionError, TimeoutError, PermissionError)):
        return True
    if isinstance(error, OSError) and error.errno in _UNREACHABLE:
        return True
    said = str(error).partition("[tensorstore_spec")[0]
    return getattr(error, "code", None) in _STATUSES or bool(_REFUSALS.search(said))


class Series:
    """The checkpoints of one kind, by step: named trees of arrays, and a dict of plain values."""

    def __init__(self, directory: epath.Path, keep: int | None, *, read_only: bool = False):
        if not is_remote(directory):
            directory = directory.resolve()  # orbax takes no relative path
        self._directory = directory
        # Two series may write the same step at the same time, so their barriers need own names.
        apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name)
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                multiprocessing_options=apart,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, trees: dict[str, Any], values: dict[str, Any]) -> None:
        """Starts to write a checkpoint; the arrays may be donated as soon as this returns.

        UserError if this or the previous save found the disk full or the directory not writable.
        """
        values = values | {"fingerprints": {n: _plain_fingerprint(t) for n, t in trees.items()}}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["values"] = ocp.args.JsonSave(values)
        check_space(self._directory, sum(x.nbytes for x in jax.tree.leaves(trees)) + _METADATA)
        with disk_errors(self._directory):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def values(self, step: int) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        items = ocp.args.Composite(values=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["values"]

    def restore(self, step: int, trees: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
        """The named trees of a checkpoint, on the devices as the given ones are.

        trees: {name: tree of arrays or shapes}, which the stored ones must match; where shapes are
        given, the arrays come whole onto every device of ``mesh``. ValueError if the stored arrays
        have changed on disk, or belong to another model.
        """
        items = {n: ocp.args.StandardRestore(_abstract(t, mesh)) for n, t in trees.items()}
        items["values"] = ocp.args.JsonRestore()
        stored = self._manager.restore(step, args=ocp.args.Composite(**items))
        for name in trees:
            if _plain_fingerprint(stored[name]) != stored["values"]["fingerprints"][name]:
                raise ValueError(f"the arrays of '{name}' are not those that were saved")
        return {name: stored[name] for name in trees}

    def newest_intact(self, read: Callable[[int], Any]) -> Any | None:
        """``read(step)`` of the newest checkpoint that can be read; None if there is none.

        Corrupt checkpoints are moved aside, with a warning. A disk or bucket that can't be reached
        is no damage, and raises a UserError. Bucket clients have tried again for a while by then.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, reason = None, "another process could not read it"
            try:
                found = read(step)
            except UserError:  # intact, but not to be used
                raise
            except Exception as error:
                if unreachable(error):
                    raise self.no_answer(step, error) from error
                reason = _reason(error)
            if processes.all_of(found is not None):
                return found
            path = self._directory / str(step)
            remedy = "falling back to the one before it"
            logging.warning("checkpoint %s is corrupt (%s); %s", path, reason, remedy)
            self._move_aside(step)
        return None

    def no_answer(self, step: int, error: Exception) -> UserError:
        """What to raise where ``unreachable`` holds."""
        return UserError(
            f"checkpoint {self._directory / str(step)} can't be read now "
            f"({in_one_line(error, 200)}); nothing was changed: run the same command again when "
            "the disk or bucket can be reached"
        )

    def _move_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._directory.parent / "corrupt"
            aside.mkdir(parents=True, exist_ok=True)
            if is_remote(aside):  # a bucket has no empty directories
                (aside / "README.txt").write_text("Checkpoints that could not be read.\n")
            taken = sum(path.name.split(".")[0] == str(step) for path in aside.iterdir())
            name = f"{step}.{taken}" if taken else str(step)
            (self._directory / str(step)).rename(aside / name)
        processes.barrier("moved aside")
        self._manager.reload()

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: Orbax saves none before them."""
        for later in [found for found in self._manager.all_steps() if found > step]:
            self._manager.delete(later)

    def wait(self) -> None:
        """Returns once everything is on disk; raises UserError if that failed."""
        with disk_errors(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self.wait()
        self._manager.close()


class Checkpoints:
    """The two series of a work directory: ``last`` for resuming, ``best`` for testing."""

    def __init__(self, workdir: epath.Path, keep: int = 2):
        self._root = workdir / "checkpoints"
        self.last = Series(self._root / "last", keep)
        self.best = Series(self._root / "best", 2)  # the second: if one is corrupt

    def restore(
        self, trees: dict[str, Any], mesh: Mesh, run: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest intact (step, trees, values); None if nothing has been saved.

        Best weights of later steps are deleted: the run makes them again, or others.

        run: what the checkpoints must be of, compared with their value 'run' if they have one.
        UserError if they are of another run, or if there are checkpoints and none can be read.
        """

        def read(step):
            values = self.last.values(step)
            changes = differences(_of_today(values.get("run") or {}, run or {}), run or {})
            if changes and "run" in values and run:
                raise UserError(
                    f"the checkpoints in {self._root / 'last'} are of another run "
                    f"({'; '.join(changes[:4])}); choose another --workdir, or the same "
                    "configuration and data to resume that run"
                )
            return step, self.last.restore(step, trees, mesh), values

        started = self.last.latest_step() is not None
        restored = self.last.newest_intact(read)
        if started and restored is None:
            raise UserError(
                f"none of the checkpoints in {self._root / 'last'} can be read; they were moved to "
                f"{self._root / 'corrupt'}: run the command again to start from step 0"
            )
        self.best.forget_after(restored[0] if restored else 0)
        return restored

    def save_best(self, params: Any, values: dict[str, Any]) -> None:
        """Starts to save the best weights, unless their step has been saved before."""
        if values["step"] != self.best.latest_step():
            self.best.save(values["step"], {"params": params}, values)

    def restore_best(self, params: Any, mesh: Mesh) -> tuple[Any, int] | None:
        """(weights, step) of the newest intact ``best`` checkpoint; None if there is none."""
        self.best.wait()

        def read(step):
            return self.best.restore(step, {"params": params}, mesh)["params"], step

        return self.best.newest_intact(read)

    def wait(self) -> None:
        """Returns once everything is on disk."""
        self.last.wait()
        self.best.wait()

    def close(self) -> None:
        """Waits and releases the threads."""
        self.last.close()
        self.best.close()


class Trained(NamedTuple):
    """The weights of a work directory or an export, ready to use."""

    config: ConfigDict
    model: Any
    params: Any
    values: dict[str, Any]  # of the checkpoint: step, num_classes, class_names, ...
    which: str  # of ``config.CHECKPOINTS``; 'export' of an export


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether a run has saved its state there: it resumes from it, or ``restore`` raises."""
    with _opened(workdir, "last") as series:
        return series is not None and series.latest_step() is not None


def last_values(workdir: epath.Path) -> dict[str, Any] | None:
    """The values of a run's newest state, such as 'step', 'best' and 'ended'; None if it has none.

    Of a state that can't be read, {'ended': False}: the run goes on from the one before it.
    """
    with _opened(workdir, "last") as series:
        step = series and series.latest_step()
        if step is None:
            return None
        try:
            return series.values(step)
        except (ValueError, OSError, KeyError):
            return {"ended": False}


@contextlib.contextmanager
def _opened(workdir: epath.Path, kind: str) -> Iterator[Series | None]:
    """The checkpoints of a kind, to be read only; None if the run has none."""
    directory = workdir / "checkpoints" / kind
    series = Series(directory, None, read_only=True) if directory.exists() else None
    try:
        yield series
    finally:
        if series:
            series.close()


def check_store(workdir: epath.Path) -> None:
    """Refuses a work directory whose checkpoints Orbax can't write: it has no S3.

    Raises:
      UserError: it is at an address other than gs://.
    """
    scheme, separator, _ = str(workdir).partition("://")
    if separator and scheme != "gs":
        raise UserError(
            f"the work directory {workdir} is at {scheme}://, where Orbax writes no checkpoints; "
            "give a path of a disk, which you can copy there afterwards, or a gs:// address"
        )


def _reason(error: Exception) -> str:
    """Why a checkpoint can't be read: Orbax raises a bare Exception from TensorStore's error."""
    return in_one_line((type(error) is Exception and error.__cause__) or error, 200)


def tested(workdir: epath.Path, config: Any) -> str:
    """The checkpoint that a run tests: ``eval.checkpoint``; 'best' if it overfitted and stopped."""
    if config["eval"]["stop_if_overfitted"] and (last_values(workdir) or {}).get("stopped"):
        return "best"
    return config["eval"]["checkpoint"]


def preferred(workdir: epath.Path, config: Any) -> str:
    """The checkpoint that a run tests, or 'last' where it has no such checkpoint yet."""
    which = tested(workdir, config)
    with _opened(workdir, which) as series:
        return which if series and series.latest_step() is not None else "last"


def load_trained(workdir: str | epath.Path, which: str = "", dtype: str = "float32") -> Trained:
    """The weights of a work directory.

    which: of ``config.CHECKPOINTS``; 'last' are those that the run evaluates, such as the averaged
      ones, 'last-raw', 'last-ema' and 'last-swa' those of this name. '': see ``tested``.

    Raises:
      UserError: no work directory, no such checkpoint, or a corrupt one.
    """
    workdir = epath.Path(workdir)
    check_store(workdir)
    config = read_config(workdir)
    which = which or tested(workdir, config)
    kind, _, average = which.partition("-")
    with _opened(workdir, kind) as series:
        step = series and series.latest_step()
        if series is None or step is None:
            remedy = "train it first"
            if kind == "best" and has_checkpoint(workdir):
                remedy = "take the last weights with --checkpoint=last, or resume the run"
            raise UserError(f"{workdir} holds no '{which}' checkpoint yet; {remedy}")
        try:
            values = series.values(step)
            model = build(config, values["num_classes"], dtype)
            shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
            # The best weights are stored alone, whichever they are.
            average = "raw" if kind == "best" else average or evaluated_weights(config)
            name = "params" if average == "raw" else average
            if name not in values["fingerprints"]:
                raise UserError(
                    f"{workdir} has no averaged weights '{name}'; set ema_decay or swa_epochs in "
                    "training, or use --checkpoint=last"
                )
            params = series.restore(step, {name: shapes}, sharding.make_mesh())[name]
        except UserError:
            raise
        except Exception as error:
            if unreachable(error):
                raise series.no_answer(step, error) from error
            raise UserError(
                f"the '{which}' checkpoint of {workdir} (step {step}) can't be read "
                f"({_reason(error)}); resume the run with its command, or use the other of "
                "--checkpoint=best and last"
            ) from error
    return Trained(config, model, params, values, which)


def _of_today(run: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run, with what earlier versions did not say."""
    if "config" not in run:
        return run
    contents = {k: v for k, v in now.get("data", {}).items() if k == "contents"}
    return run | {"config": with_added(run["config"]), "data": contents | run.get("data", {})}
