"""Transfer between linear models: white-box on the diagonal, and what is stored."""

import csv
import io

import jax
import numpy as np
import pytest
import runs
from etils import epath
from test_evaluator import linear

from vit_at.attacks import Threat
from vit_at.distributed import sharding
from vit_at.errors import UserError
from vit_at.evaluation import transfer
from vit_at.evaluation.evaluator import Evaluator
from vit_at.evaluation.protocol import parse_attacks
from vit_at.evaluation.subject import Subject
from vit_at.reporting.tables import matrix_csv
from vit_at.workdir.results import Results

EXAMPLES = runs.examples(21)
ATTACKS = parse_attacks("clean,pgd-3", Threat("linf", 0.1, 0.04))


def subject(seed, **changes):
    weights = np.random.default_rng(seed).normal(size=(64, 3)).astype(np.float32)
    config = runs.smoke(**runs.QUICK).unlock()
    made = Subject(linear, weights, config, {"step": seed}, epath.Path("."), 3, runs.CLASSES)
    config.data.update(changes)
    return made


MODELS = {"a": subject(0), "b": subject(1)}


def measure(workdir):
    mesh, results = sharding.make_mesh(jax.devices()[:2]), Results(epath.Path(workdir))
    return results, transfer.evaluate_transfer(
        MODELS, EXAMPLES, ATTACKS, mesh, results, batch_size=8, seed=3
    )


def test_on_its_own_images_a_model_is_as_under_the_white_box_attack(tmp_path, monkeypatch):
    results, records = measure(tmp_path)
    (matrix,) = transfer.matrices(records)
    assert matrix.names == ("a", "b")
    for place, model in enumerate(MODELS.values()):
        mesh = sharding.make_mesh(jax.devices()[:2])
        own = Evaluator(linear, EXAMPLES, ATTACKS, mesh, batch_size=8, seed=3)
        expected = own.run(ATTACKS[1], model.params)
        stored = records[3 * place]  # aa, ab, ba, bb
        np.testing.assert_array_equal(results.outcomes(stored)[1], expected)
        assert matrix.accuracy[place, place] == expected.mean()
    assert matrix.accuracy[1, 0] > matrix.accuracy[0, 0]  # images of the other model harm less
    rows = list(csv.reader(io.StringIO(matrix_csv(matrix))))
    assert [row[0] for row in rows] == ["made for", "a", "b"]
    np.testing.assert_array_equal(np.array(rows[1:])[:, 1:3].astype(float), matrix.accuracy)
    monkeypatch.setattr(transfer, "by_parts", lambda *_: None)  # nothing can be measured
    assert measure(tmp_path)[1] == records


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (subject(1, name="cifar10"), "the data set of a is digits, but that of b is cifar10"),
        (subject(1, image_size=16), r"the image shape of a is \(8, 8, 1\)"),
    ],
)
def test_models_of_other_data_are_refused(other, said, monkeypatch):
    monkeypatch.setattr(transfer, "of_directory", lambda *_, **__: other)
    with pytest.raises(UserError, match=said):
        transfer.subjects(
            Subject(linear, None, subject(0).config, {}, epath.Path("runs/a"), 3), "b", "", ATTACKS
        )
