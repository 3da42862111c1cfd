"""Computes what a report shows of a trained model: attacked images, curves, masks, classes.

Everything is computed on the first test images. One compiled attack takes eps, step size and number
of steps as arguments.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_at import models
from vit_at.attacks import Threat, curves, pgd_attack
from vit_at.attacks.losses import is_correct
from vit_at.config import evaluation_threat
from vit_at.data import sources
from vit_at.reporting import rollout
from vit_at.training.attack import Draws, draw
from vit_at.training.masking import Masking
from vit_at.workdir.checkpoint import Trained
from vit_at.workdir.results import Results

Array = jax.Array
CURVE_EPS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # times the trained eps
CURVE_STEPS = (1, 2, 5, 10, 20, 50)
CURVE_IMAGES = (16, 128)  # at least, or there are no curves, and at most
PICTURES = 6
STEPS = 20  # of the attack on pictures, and of the curve over eps
# Floating-point operations that the curves may take: about a minute.
_BUDGET = {"cpu": 2e12}
_ACCELERATED_BUDGET = 1e15
_MOST_LABELS = 20_000  # images that may be decoded for their labels alone


@dataclasses.dataclass(frozen=True)
class Attacked:
    """n test images before and after PGD, [n, H, W, C] in [0, 1]; probabilities: [n, K].

    rollout: [n, rows, columns] of the clean and of the adversarial images, or None.
    """

    images: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    clean_probabilities: np.ndarray
    adversarial_probabilities: np.ndarray
    rollout: tuple[np.ndarray, np.ndarray] | None


class Exhibits:
    """Computes what a report shows of one run's weights, on the test split of its configuration.

    Raises:
      UserError: the data set can't be read here.
    """

    def __init__(self, trained: Trained):
        self._trained, config = trained, trained.config
        data = sources.streamed(config.data)  # decode only what is shown
        self._examples = sources.load(data, data.test_split, threads=data.threads)
        self.class_names = self._examples.class_names
        self._params = jax.device_put(trained.params, jax.devices()[0])  # one is enough
        self.threat = dataclasses.replace(Threat.of(evaluation_threat(config)), steps=STEPS)
        apply = models.classifier(trained.model, config.data.mean, config.data.std)
        self._logits = jax.jit(apply)

        def attack(params, images, labels, eps, step_size, steps):
            threat = Threat(self.threat.norm, eps, step_size, steps)
            logits_fn = functools.partial(apply, params)
            return pgd_attack(logits_fn, images, labels, jax.random.key(config.seed), threat)

        self._attack = jax.jit(attack)

    def _first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self._examples.read(np.arange(min(count, len(self._examples))))
        return images.astype(np.float32) / 255, labels

    def _perturb(self, images: np.ndarray, labels: np.ndarray, threat: Threat) -> np.ndarray:
        numbers = jnp.float32(threat.eps), jnp.float32(threat.step_size), jnp.int32(threat.steps)
        with jax.default_matmul_precision("highest"):
            return np.asarray(self._attack(self._params, images, labels, *numbers))

    def _predict(self, images: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.nn.softmax(self._logits(self._params, images)))

    @property
    def affordable(self) -> int:
        """Number of images for the curves; 0 if the model is too large for this machine."""
        fewest, most = CURVE_IMAGES
        gradients = len(CURVE_EPS) * STEPS + sum(CURVE_STEPS)
        cost = 3 * self._trained.model.forward_flops() * gradients
        count = int(_BUDGET.get(jax.devices()[0].platform, _ACCELERATED_BUDGET) / cost)
        return min(count, most) if count >= fewest else 0

    def attacked(self, count: int = PICTURES) -> Attacked:
        """The first ``count`` test images, attacked by PGD."""
        images, labels = self._first(max(count, self.affordable))  # the curves' shape
        adversarial = self._perturb(images, labels, self.threat)
        before, after = self._predict(images)[:count], self._predict(adversarial)[:count]
        images, adversarial = images[:count], adversarial[:count]
        attention = None
        if rollout.has_rollout(self._trained.model):
            mean, std = self._trained.config.data.mean, self._trained.config.data.std
            looks = jax.jit(functools.partial(rollout.rollout, self._trained.model))
            points = ((x - np.float32(mean)) / np.float32(std) for x in (images, adversarial))
            attention = tuple(np.asarray(looks(self._params, x)) for x in points)
        return Attacked(images, adversarial, labels[:count], before, after, attention)

    def curves(self) -> tuple[dict[float, float], dict[int, float], int]:
        """PGD accuracy by eps (0: clean) and by number of steps, on so many first test images.

        Not to be called where none is ``affordable``.
        """
        images, labels = self._first(self.affordable)

        def correct(points):
            return is_correct(self._predict(points), labels, np)

        @functools.cache
        def robust(threat):
            return correct(self._perturb(images, labels, threat))

        radii = curves.at_factors(self.threat, CURVE_EPS, images[0].size)
        by_eps = curves.over_eps(correct(images), robust, radii)
        by_steps = curves.over_steps(robust, curves.at_steps(self.threat, CURVE_STEPS))
        return by_eps, by_steps, len(images)

    def masks(self) -> tuple[np.ndarray, Draws, float] | None:
        """A test image [H, W, C], the draws of one training attack on it, and the epoch.

        The epoch is half of the warm-up, where half is masked. None if ARD and PRM are off.
        """
        config, model = self._trained.config, self._trained.model
        if not (config.masking.ard or config.masking.prm):
            return None
        images, _ = self._first(1)
        epoch = config.masking.warmup_epochs / 2
        draws = draw(
            jax.random.key(config.seed),
            objective=config.objective,
            threat=Threat.of(config.threat),
            masking=Masking.of(config.masking, model.patch_size),
            progress=epoch,
            image_shape=images.shape,
            num_blocks=model.num_blocks,
        )
        return images[0], jax.device_get(draws), epoch

    def by_class(self, results: Results, records: list[dict[str, Any]]) -> dict[str, Any] | None:
        """{class name: {attack: accuracy}} of stored outcomes; None without outcomes or labels."""
        outcomes = {r["attack"]: results.outcomes(r) for r in records}
        outcomes = {name: found for name, found in outcomes.items() if found is not None}
        tested = max((len(index) for index, _ in outcomes.values()), default=0)
        if not 0 < tested <= min(_MOST_LABELS, len(self._examples)):
            return None
        examples = self._examples.take(np.arange(tested))
        labels = dict(zip(examples.indices, examples.labels(), strict=True))
        found: dict[str, dict[str, float]] = {name: {} for name in self.class_names}
        for attack, (index, correct) in outcomes.items():
            of_image = np.array([labels.get(place, -1) for place in index])
            for label, name in enumerate(self.class_names):
                if (of_image == label).any():
                    found[name][attack] = float(correct[of_image == label].mean())
        return found
