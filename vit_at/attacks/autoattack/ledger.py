"""The outcome of every image on disk, from which a killed evaluation resumes.

DIRECTORY/ledger.npz             the protocol, the outcomes so far, and the runs in progress
DIRECTORY/slots_0_0-of-1.npz     the state of these runs, of process 0 of 1
DIRECTORY/adversarial_00000.npz  adversarial images, some in each file: index, image
DIRECTORY/per_example.npz        at the end: image x attack, and the worst case

Each process writes the state of its own runs, which is by far the largest; process 0 the others.
Files are written atomically, the ledger last. It holds the number of adversarial files that belong
to it: a later one, whose process was killed before it wrote the ledger, is ignored and overwritten.
The states have two names in turn, so that those of the ledger on disk stay. Where some can't be
found, as after another number of processes, the runs in progress begin again.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_at.attacks.autoattack.packing import Snapshot
from vit_at.config import differences
from vit_at.distributed import processes
from vit_at.errors import UserError, in_one_line
from vit_at.schema import Count, check_array, parse_json, read_arrays
from vit_at.workdir.files import disk_errors, write_atomically

LEDGER_FILE, PER_EXAMPLE_FILE = "ledger.npz", "per_example.npz"
_PART_FILE, _SLOTS_FILE = "adversarial_{:05d}.npz", "slots_{}_{}-of-{}.npz"
_NO_SLOTS = -1
NOT_ATTACKED, WITHSTOOD, BROKEN = 0, 1, 2
# Of a ``Ledger``, as they are: the kinds of their numbers.
_SAVED = {"clean": "bool", "outcome": "integers", "run": "integers", "step": "integers"}
_SAVED |= {"norm": "floats"}
# Of a snapshot's runs: kind and shape.
_RUNNING = dict.fromkeys(("image", "run", "steps"), ("integers", (-1,)))
_RUNNING |= {"waiting": ("integers", (-1, 2)), "work": ("integers", (2,))}
_SAME_LOGITS = 1e-3  # allowed difference, relative to the largest: devices round differently
_SAME_GRADIENT = 1e-2  # and of the gradient's norm, which adds up more rounding


class Ledger:
    """The outcomes of N images.

    clean: [N] bool, classified correctly; outcome: [N, attacks] int8, 0 not attacked, 1 withstood,
    2 broken; run, step: [N], of the success; norm: [N], of the adversarial perturbation.
    found: {image: adversarial image [H, W, C] float32} since the last ``Store.save``.
    individually: whether each attack runs on all correct images; run, step, norm and the
    adversarial image are then of the first attack that broke an image.
    stage: number of finished attacks; progress: of the current one, None: at its beginning.
    """

    def __init__(self, attacks: tuple[str, ...], count: int, individually: bool = False):
        self.attacks, self.individually = attacks, individually
        self.clean = np.zeros(count, bool)
        self.outcome = np.zeros((count, len(attacks)), np.int8)
        self.run, self.step = np.full(count, -1, np.int16), np.full(count, -1, np.int32)
        self.norm = np.full(count, np.nan, np.float32)
        self.found: dict[int, np.ndarray] = {}
        self.stage = 0
        self.progress: Snapshot | None = None
        self.work: dict[str, dict[str, int]] = {}

    @property
    def robust(self) -> np.ndarray:
        """[N] bool: correct, and broken by no attack so far."""
        return self.clean & ~(self.outcome == BROKEN).any(1)

    def robust_at(self, image: int) -> bool:
        """``robust`` of one image."""
        return bool(self.clean[image]) and not (self.outcome[image] == BROKEN).any()

    @property
    def attacked(self) -> np.ndarray:
        """[N] bool: the images that the next attack runs on."""
        return self.clean if self.individually else self.robust

    def robust_after(self) -> dict[str, np.ndarray]:
        """{attack: [N] bool} after each attack of the cascade; 'clean' first. If the attacks ran
        individually, each one's own outcome, and under 'all' what withstood every attack.
        """
        after, robust = {"clean": self.clean}, self.clean
        if self.individually:
            withstood = self.clean[:, None] & (self.outcome != BROKEN)
            own = dict(zip(self.attacks, withstood.T, strict=True))
            return after | own | {"all": self.robust}
        for column, attack in enumerate(self.attacks):
            robust = robust & (self.outcome[:, column] != BROKEN)
            after[attack] = robust
        return after

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of ``per_example.npz``.

        broken_by: the attack's place in the cascade, -1 robust, -2 misclassified from the start.
        """
        first = np.argmax(self.outcome == BROKEN, 1)
        broken_by = np.where(self.clean, np.where(self.robust, -1, first), -2)
        return {
            "attacks": np.array(self.attacks),
            "clean_correct": self.clean,
            "outcome": self.outcome,
            "broken_by": broken_by.astype(np.int8),
            "worst_case_correct": self.robust,
            "run": self.run,
            "step": self.step,
            "norm": self.norm,
        }


class Store:
    """Reads and writes a ledger and its adversarial images; in memory if there is no directory.

    protocol: of the evaluation, as JSON values; logits: [n, K], of the first clean images, to
    recognise another model; gradient: [m, H, W, C], by the first of them, to recognise another
    backward pass of the same logits; None: not compared.
    """

    def __init__(
        self,
        directory: epath.Path | None,
        protocol: dict[str, Any],
        logits: np.ndarray,
        gradient: np.ndarray | None = None,
    ):
        self._directory, self._protocol, self._logits = directory, protocol, logits
        self._gradient = gradient
        self._parts, self._slots = 0, _NO_SLOTS
        self._in_memory: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def _remedy(self) -> str:
        return f"delete {self._directory} to start over"

    @property
    def keeps(self) -> bool:
        """Whether there is a directory."""
        return self._directory is not None

    def load(self, ledger: Ledger) -> bool:
        """Reads the ledger from disk; False if there is none.

        Raises:
          UserError: it belongs to another model, data or protocol, or can't be read; or the
            directory can't be made.
        """
        if self._directory is None:
            return False
        if not jax.process_index():
            with _writing(self._directory):  # fails now, not after the first attack
                pass
        if not processes.agree((self._directory / LEDGER_FILE).exists()):
            return False
        saved = self._read(LEDGER_FILE)
        self._check(saved)
        for name in _SAVED:
            shape = getattr(ledger, name).shape
            setattr(ledger, name, self._array(saved, name, _SAVED[name], shape))
        ledger.stage = int(self._array(saved, "stage", "integers", ()))
        ledger.work = self._json(saved, "work", dict[str, dict[str, Count]])
        self._slots, count = self._array(saved, "slots", "integers", (2,)).tolist()
        if self._slots != _NO_SLOTS:
            running = {
                name: self._array(saved, f"progress/{name}", *expected)
                for name, expected in _RUNNING.items()
            }
            ledger.progress = Snapshot(running, self._read_slots(count))
        self._parts = int(self._array(saved, "files", "integers", ()))
        count = len(ledger.clean)
        places = [places for places, _ in self.parts()]  # fail now if a file can't be read
        outside = any(((p < 0) | (p >= count)).any() for p in places)
        if (
            outside
            or not 0 <= ledger.stage <= len(ledger.attacks)
            or ledger.outcome.max(initial=0) > BROKEN
        ):
            raise UserError(
                f"{self._directory} is damaged (its numbers are out of range); {self._remedy}"
            )
        processes.barrier("ledger read")  # before the first process overwrites it
        return True

    def save(self, ledger: Ledger) -> None:
        """Writes the new adversarial images, then the ledger that counts them."""
        if ledger.found:
            index = np.array(sorted(ledger.found))
            images = np.stack([ledger.found[i] for i in index])
            if self._directory is None:
                self._in_memory.append((index, images))
            else:
                self._write(_PART_FILE.format(self._parts), {"index": index, "image": images})
            self._parts += 1
            ledger.found = {}
        if self._directory is None:
            return
        self._slots = _NO_SLOTS if ledger.progress is None else int(self._slots == 0)
        count, running = jax.process_count(), {}
        if ledger.progress is not None:
            running = {f"progress/{name}": x for name, x in ledger.progress.runs.items()}
            own = _SLOTS_FILE.format(self._slots, jax.process_index(), count)
            self._write(own, ledger.progress.slots, by_each=True)
            processes.barrier("slots written")
        arrays = {
            "protocol": np.array(json.dumps(self._protocol)),
            "logits": self._logits,
            "stage": np.array(ledger.stage),
            "files": np.array(self._parts),
            "slots": np.array([self._slots, count]),
            "work": np.array(json.dumps(ledger.work)),
        }
        arrays |= {name: getattr(ledger, name) for name in _SAVED}
        if self._gradient is not None:
            arrays["gradient"] = self._gradient
        self._write(LEDGER_FILE, arrays | running)
        if ledger.progress is None and not jax.process_index():
            for path in self._directory.glob(_SLOTS_FILE.format("*", "*", "*")):
                path.unlink(missing_ok=True)

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The adversarial images in parts: places [n] and images [n, H, W, C]."""
        if self._directory is None:
            yield from self._in_memory
            return
        for number in range(self._parts):
            name = _PART_FILE.format(number)
            part = self._read(name)
            index = self._array(part, "index", "integers", (-1,), name)
            yield index, self._array(part, "image", "floats", (len(index), -1, -1, -1), name)

    def save_per_example(self, ledger: Ledger) -> None:
        """Writes ``per_example.npz``."""
        if self._directory is not None:
            self._write(PER_EXAMPLE_FILE, ledger.columns())

    def _check(self, saved: dict[str, np.ndarray]) -> None:
        old = self._json(saved, "protocol", dict[str, Any])
        changes = differences(old, json.loads(json.dumps(self._protocol)))
        theirs = self._array(saved, "logits", "floats", (-1, -1))
        scale = max(float(np.abs(theirs).max(initial=0)), 1e-6)
        if not changes and (
            theirs.shape != self._logits.shape
            or np.abs(theirs - self._logits).max(initial=0) > _SAME_LOGITS * scale
        ):
            changes = ["its logits on the same images differ, so it is of another model"]
        if not changes and self._gradient_differs(saved):
            changes = [
                "its logits on the same images are the same, but its input gradient differs, so it "
                "is of another backward pass"
            ]
        if changes:
            raise UserError(
                f"{self._directory / LEDGER_FILE} belongs to another evaluation "
                f"({'; '.join(changes[:4])}); choose another workdir, or delete it to start over"
            )

    def _gradient_differs(self, saved: dict[str, np.ndarray]) -> bool:
        """On the images that both hold: a smaller batch has fewer, and an older ledger none."""
        if self._gradient is None or "gradient" not in saved:
            return False
        shape = (-1, *self._gradient.shape[1:])
        pair = self._gradient, self._array(saved, "gradient", "floats", shape)
        ours, theirs = (x[: min(map(len, pair))].astype(np.float64) for x in pair)
        scale = max(np.linalg.norm(ours), np.linalg.norm(theirs))
        return bool(np.linalg.norm(ours - theirs) > _SAME_GRADIENT * scale)

    def _read(self, name: str) -> dict[str, np.ndarray]:
        return read_arrays(self._directory / name, self._remedy)

    def _read_slots(self, count: int) -> dict[str, np.ndarray]:
        """The state of this process's slots; {} if that of any process is not there."""
        name = _SLOTS_FILE.format(self._slots, jax.process_index(), count)
        there = count == jax.process_count() and (self._directory / name).exists()
        return self._read(name) if processes.all_of(there) else {}

    def _array(
        self,
        arrays: dict[str, np.ndarray],
        name: str,
        kind: str,
        shape: tuple[int, ...],
        file: str = LEDGER_FILE,
    ) -> np.ndarray:
        return check_array(arrays, name, kind, shape, self._directory / file, self._remedy)

    def _json(self, arrays: dict[str, np.ndarray], name: str, kind: Any) -> Any:
        text = str(self._array(arrays, name, "text", ())).encode()
        return parse_json(text, kind, self._directory / LEDGER_FILE, self._remedy, nan=False)

    def _write(self, name: str, arrays: dict[str, np.ndarray], *, by_each: bool = False) -> None:
        if jax.process_index() and not by_each:
            return
        content = io.BytesIO()
        np.savez(content, **arrays)
        with _writing(self._directory):
            write_atomically(self._directory / name, content.getvalue())


@contextlib.contextmanager
def _writing(directory: epath.Path) -> Iterator[None]:
    """Makes the directory; turns what the disk raises into a UserError."""
    try:
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            yield
    except OSError as error:  # such as a directory in /proc
        raise UserError(
            f"{directory} could not be written ({in_one_line(error)}); choose another workdir"
        ) from error
