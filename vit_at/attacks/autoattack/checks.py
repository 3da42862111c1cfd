"""What AutoAttack requires of its input and of the model; UserErrors name what is missing.

check_settings   the arguments
Classifier       logits of any number of images, in batches of one width
survey           one pass over the clean images: their range, digest and classes
"""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_at.attacks.autoattack import cost
from vit_at.attacks.autoattack.settings import Settings
from vit_at.attacks.inputs import (
    check_classes,
    check_count,
    check_range,
    check_threat,
    output_shape,
)
from vit_at.attacks.threat import Threat
from vit_at.distributed import processes, sharding
from vit_at.errors import UserError

_BATCH_TOLERANCE = 1e-3  # relative to the largest logit
_PROBED = 64  # images


def check_settings(settings: Settings, count: int) -> None:
    """Raises UserError for the first setting that is not allowed; count: values of an image."""
    check_threat(Threat(settings.norm, settings.eps), count)
    numbers = {"batch_size": settings.batch_size, **dataclasses.asdict(settings.budget)}
    rho, unset = numbers.pop("rho"), ("restarts", "targets")
    for name, value in numbers.items():
        if value is None and name in unset:
            continue
        check_count(name, value)
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho <= 1:
        raise UserError(
            f"rho is {rho!r}; it must be a share, from 0 to 1; the official one is 0.75"
        )
    seed = settings.seed
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}; it must be an integer from 0 to {2**32 - 1}")
    sharding.check_batch_size("batch_size", settings.batch_size, settings.mesh)


def read(images: Any, places: np.ndarray) -> np.ndarray:
    """The images at some places, [n, H, W, C] float32 on the host."""
    return np.asarray(images[places]).astype(np.float32, copy=False)


def as_batch_function(
    model: Callable[..., jax.Array], randomised: bool
) -> Callable[..., jax.Array]:
    """The model as (images, keys [b] or None) -> logits in float32, as the state of the attacks.

    A randomised one uses a key for each image.
    """
    if not randomised:
        return lambda images, keys=None: model(images).astype(jnp.float32)
    return jax.vmap(lambda image, key: model(image[None], key)[0].astype(jnp.float32))


@functools.lru_cache(maxsize=8)
def _logits_program(mesh: Mesh, randomised: bool):
    """The compiled (model, seed, images, index, draw) -> logits."""

    def logits(model, seed, images, index, draw):
        def key(i, d):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), d), i)

        keys = jax.vmap(key)(index, draw) if randomised else None
        return as_batch_function(model, randomised)(images, keys)

    split, whole = sharding.SPLIT, sharding.WHOLE
    return jax.jit(sharding.map_shards(logits, mesh, (whole, whole, split, split, split)))


class Classifier:
    """Logits of any number of images, in batches of one width.

    flop: of a forward pass of one image.
    """

    def __init__(self, model: Any, settings: Settings, shape: tuple[int, ...]):
        self.model, self.randomised = model, settings.randomised
        self._mesh, self._seed, self._shape = settings.mesh, np.uint32(settings.seed), tuple(shape)
        self._check_signature(shape)
        self._logits = _logits_program(self._mesh, self.randomised)

    def _check_signature(self, shape) -> None:
        arguments = [jax.ShapeDtypeStruct((1, *shape), jnp.float32)]
        if self.randomised:
            arguments.append(jax.eval_shape(lambda: jax.random.key(0)))
        try:
            inspect.signature(self.model).bind(*arguments)
        except TypeError as error:
            wanted = "(images, key)" if self.randomised else "(images)"
            raise UserError(
                f"logits_fn can't be called with {wanted} ({error}); for a randomised model use "
                "attacks='rand' and a function of (images, key)"
            ) from error
        out = output_shape(self.model, *arguments)
        if getattr(out, "ndim", 0) != 2 or out.shape[0] != 1 or out.shape[1] < 2:
            raise UserError(
                f"logits_fn gives {out} for one image; it must give logits [1, classes], 2 classes "
                "or more"
            )
        self.flop = cost.flop(self.model, *arguments)

    def __call__(
        self,
        images: np.ndarray,
        width: int,
        index: np.ndarray,
        draw: int | np.ndarray = 0,
    ) -> np.ndarray:
        """Logits [n, K] of images [n, H, W, C].

        index: [n], the images' places in the data; draw: a number, or one for each image [n]. Both
          fix the key of each image, for a randomised model.
        """
        logits, draws = [], np.broadcast_to(draw, len(images))
        for begin in range(0, len(images), width):
            some = slice(begin, begin + width)
            batch = images[some]
            logits.append(self.of_batch(batch.__getitem__, width, index[some], draws[some]))
        return np.concatenate(logits)

    def of_batch(
        self,
        images: Callable[[np.ndarray], np.ndarray],
        width: int,
        index: np.ndarray,
        draw: np.ndarray,
    ) -> np.ndarray:
        """Logits [n, K] of a batch of n images, at most ``width``.

        images: rows [m] of the batch -> images [m, H, W, C]; called for this process's rows.
        index, draw: [n], see ``__call__``.
        """
        mine = sharding.my_part(width, self._mesh)
        rows = np.arange(mine.start, min(mine.stop, len(index)))
        batch = np.zeros((mine.stop - mine.start, *self._shape), np.float32)
        if len(rows):
            batch[: len(rows)] = images(rows)
        missing = width - len(index)
        keys = (np.pad(x, (0, missing)).astype(np.uint32)[mine] for x in (index, draw))
        batch, places, draws = sharding.split_batch((batch, *keys), self._mesh)
        out = self._logits(self.model, self._seed, batch, places, draws)
        return sharding.gather(out)[: len(index)]


class Survey(NamedTuple):
    """What one pass over the clean images finds.

    ranking: [N, k], the classes with the highest logits, highest first; probe: [n, K], logits of
    the first images, at most 64, by which a ledger knows its model; digest: 16 hex digits of the
    SHA-256 over labels and each image's own.
    """

    ranking: np.ndarray
    probe: np.ndarray
    digest: str


def survey(
    classify: Classifier, images: Any, labels: np.ndarray, batch_size: int, ranks: int
) -> Survey:
    """Reads all clean images once, in batches; each process its part of each batch.

    Raises:
      UserError: images are outside [0, 1], labels are no classes of the model, or logits are not
        finite or depend on the rest of the batch.
    """
    digests = np.zeros((len(labels), 2), np.uint32)
    ranking, heads, not_finite = [], [], 0

    def checked(places: np.ndarray) -> np.ndarray:
        batch = read(images, places)
        check_range(batch)
        for place, image in zip(places, batch, strict=True):
            found = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
            digests[place] = np.frombuffer(found[:8], "<u4")
        return batch

    def logits_at(places: np.ndarray) -> np.ndarray:
        still = np.zeros(len(places), int)
        return classify.of_batch(lambda rows: checked(places[rows]), batch_size, places, still)

    for begin in range(0, len(labels), batch_size):
        places = np.arange(begin, min(begin + batch_size, len(labels)))
        logits = logits_at(places)
        not_finite += int((~np.isfinite(logits)).any(1).sum())
        ranking.append(np.argsort(-logits, axis=1, kind="stable")[:, :ranks])
        heads.append(logits[: max(_PROBED - begin, 0)])
        if not begin:
            of_first = logits
    digests = processes.sum_of(digests)  # each is of one process
    probe = np.concatenate(heads)
    if not_finite:
        raise UserError(
            f"logits_fn gives NaN or infinity for {not_finite} of {len(labels)} clean images, so "
            "no attack can be evaluated; check the weights and the normalisation"
        )
    check_classes(labels, probe.shape[1])
    if not classify.randomised:
        check_independence(logits_at, of_first)
    digest = hashlib.sha256(labels.astype(np.int32).tobytes() + digests.tobytes())
    return Survey(np.concatenate(ranking), probe, digest.hexdigest()[:16])


def check_independence(logits_at: Callable[[np.ndarray], np.ndarray], logits: np.ndarray) -> None:
    """Checks that an image's logits do not depend on the other images of the batch.

    logits_at: places [n] -> logits [n, K] of these images; logits: those of the first batch.
    """
    places, half = np.arange(len(logits)), -(-len(logits) // 2)
    moved = np.roll(logits_at(np.roll(places, 1)), -1, axis=0)
    halved = logits_at(places[:half])
    allowed = _BATCH_TOLERANCE * max(np.abs(logits).max(), 1e-6)
    changes = [np.abs(other - logits[: len(other)]).max() for other in (moved, halved)]
    if max(changes) > allowed:
        raise UserError(
            "the logits of an image depend on the other images of the batch; evaluate "
            "the model in its inference mode, without batch statistics or randomness"
        )
