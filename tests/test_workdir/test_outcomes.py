"""Outcomes of single images: the table, curves that fall, and the union over norms."""

import csv
import dataclasses
import io

import jax
import numpy as np
import pytest
import runs
from etils import epath

from vit_at.attacks import Threat
from vit_at.distributed import sharding
from vit_at.evaluation import curves
from vit_at.evaluation.evaluator import Evaluator, evaluate_and_store
from vit_at.evaluation.protocol import parse_attacks
from vit_at.workdir.outcomes import Measured, eps_curves, table
from vit_at.workdir.outcomes import union as worst_case
from vit_at.workdir.results import Results

EXAMPLES = runs.examples(21)
WEIGHTS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
LINF = [Threat("linf", eps, eps / 4) for eps in (0.01, 0.03, 0.1)]


def linear(params, images):
    return images.reshape(len(images), -1) @ params


def store(workdir, attacks):
    workdir.mkdir(exist_ok=True)
    mesh, results = sharding.make_mesh(jax.devices()[:1]), Results(epath.Path(workdir))
    evaluator = Evaluator(linear, EXAMPLES, attacks, mesh, batch_size=16, seed=0)
    about = {"seed": 0, "weights": {"step": 1}}
    return results, evaluate_and_store(evaluator, WEIGHTS, EXAMPLES, results, **about)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_a_curve_has_the_numbers_of_single_evaluations(tmp_path):
    results, records = store(tmp_path / "curve", curves.attacks("pgd-3", LINF, 1, clean=True))
    single = [store(tmp_path / "single", parse_attacks("clean", LINF[0]))[1][0]]
    for threat in LINF:
        single += store(tmp_path / "single", parse_attacks("pgd-3", threat))[1]
    assert records == single
    (curve,) = eps_curves(results.measured(records))
    assert curve.eps == [0, 0.01, 0.03, 0.1]
    assert curve.accuracy.tolist() == [entry["accuracy"] for entry in records]
    assert curve.standard_error == pytest.approx([entry["standard_error"] for entry in records])
    rows = rows_of(curve.csv())
    assert [float(row["accuracy"]) for row in rows] == curve.accuracy.tolist()
    assert [row["step_size"] for row in rows] == ["", "0.0025", "0.0075", "0.025"]


def test_a_union_is_correct_where_all_norms_are(tmp_path):
    threats = [LINF[1], Threat("l2", 0.3, 0.1)]
    results, records = store(tmp_path, curves.attacks("pgd-3", threats, 1, clean=False))
    (entry,) = curves.store_unions(records, results, EXAMPLES)
    one, two, both = (results.outcomes(r)[1] for r in (*records, entry))
    np.testing.assert_array_equal(both, one & two)
    parts = [made("pgd-3", [1, 0, 1, 0]), made("pgd-3", [1, 1, 0, 0])]
    assert worst_case(parts).tolist() == [True, False, False, False]
    assert entry["attack"] == "pgd-3-union"
    assert [part["norm"] for part in entry["protocol"]["union"]] == ["linf", "l2"]
    again = Results(epath.Path(tmp_path))
    assert again.find(entry) == entry
    np.testing.assert_array_equal(again.outcomes(entry)[1], both)
    columns = rows_of((tmp_path / "per_example.csv").read_text())
    assert [r["pgd-3-union linf 0.03 l2 0.3"] for r in columns] == [str(int(b)) for b in both]


def test_the_table_says_what_the_model_says_of_each_image(tmp_path):
    store(tmp_path, curves.attacks("clean,pgd-3", LINF[:2], 1, clean=False))
    rows = rows_of((tmp_path / "per_example.csv").read_text())
    images, labels = EXAMPLES.read(np.arange(21))
    logits = linear(WEIGHTS, images.astype(np.float32) / 255)
    others = np.where(np.arange(3) == labels[:, None], -np.inf, logits).max(1)
    margin = logits[np.arange(21), labels] - others
    assert [int(row["image"]) for row in rows] == list(range(21))
    assert [row["class_name"] for row in rows] == [runs.CLASSES[label] for label in labels]
    predictions = [row["predicted_class_name"] for row in rows]
    assert predictions == [runs.CLASSES[found] for found in logits.argmax(1)]
    np.testing.assert_allclose([float(r["clean_margin"]) for r in rows], margin, rtol=1e-4)
    assert [row["clean"] == "1" for row in rows] == (margin > 0).tolist()
    for row in rows:
        outcomes = {0.0: row["clean"], 0.01: row["pgd-3 linf 0.01"], 0.03: row["pgd-3 linf 0.03"]}
        broke = min((eps for eps, outcome in outcomes.items() if outcome == "0"), default="")
        assert row["pgd-3 linf broke at eps"] == str(broke)


def made(attack, correct, eps=0.0):
    protocol = {"data": "made test", "weights": {"digest": "d"}, "seed": 0}
    if eps:
        protocol |= {"norm": "linf", "eps": eps, "step_size": eps, "restarts": 1}
    correct = np.array(correct, bool)
    record = {"attack": attack, "accuracy": correct.mean(), "protocol": protocol}
    return Measured(record, np.arange(len(correct)), correct)


def test_what_a_small_eps_breaks_counts_as_broken_at_a_larger_one():
    measured = [
        made("pgd-9", [1, 0, 1, 0], 0.2),
        made("pgd-9", [1, 1, 0, 0], 0.1),
        made("clean", [1, 1, 1, 0]),
    ]
    (curve,) = eps_curves(measured)
    assert curve.eps == [0, 0.1, 0.2]
    assert curve.accuracy.tolist() == [0.75, 0.5, 0.25]
    rows = rows_of(table(measured))
    assert [row["pgd-9 linf broke at eps"] for row in rows] == ["", "0.2", "0.1", "0.0"]
    assert [row["pgd-9 linf 0.2"] for row in rows] == ["1", "0", "1", "0"]  # as measured
    assert {row["clean_prediction"] for row in rows} == {""}  # of an earlier version


def test_what_was_measured_before_images_changed_is_left_out():
    measured = [made("clean", [1, 1]), made("pgd-9", [1, 0], 0.1), made("pgd-9", [0, 0], 0.2)]
    for m, contents in zip(measured, ("old", "new", "new"), strict=True):
        m.record["protocol"]["contents"] = contents
    (curve,) = eps_curves(measured)
    assert curve.eps == [0.1, 0.2]
    rows = rows_of(table(measured))
    assert [row.get("clean", "") for row in rows] == ["", ""]
    assert [row["pgd-9 linf 0.1"] for row in rows] == ["1", "0"]


def test_columns_that_share_a_name_say_what_tells_them_apart():
    measured = [made("pgd-9", [1], 0.2), made("pgd-9", [0], 0.2)]
    measured[1].record["protocol"]["restarts"] = 5
    (row,) = rows_of(table(measured))
    assert row["pgd-9 linf 0.2 step 0.2 x1 seed 0"] == "1"
    assert row["pgd-9 linf 0.2 step 0.2 x5 seed 0"] == "0"


def test_evaluations_of_another_protocol_are_kept_apart():
    squashed = [made("clean", [1, 1]), made("pgd-9", [1, 0], 0.1), made("pgd-9", [0, 0], 0.2)]
    cropped = [made("clean", [0, 1]), made("pgd-9", [0, 1], 0.1), made("pgd-9", [0, 1], 0.2)]
    for m in cropped:
        m.record["protocol"]["transform"] = "crop"
    one, other = eps_curves(squashed + cropped)
    assert one.accuracy.tolist() == [1, 0.5, 0]
    assert other.accuracy.tolist() == [0.5, 0.5, 0.5]
    rows = rows_of(table(squashed + cropped))
    assert [row["data"] for row in rows] == ["made test"] * 2 + ["made test, transform crop"] * 2
    assert [row["clean"] for row in rows] == ["1", "1", "0", "1"]
    assert [row["pgd-9 linf broke at eps"] for row in rows] == ["0.2", "0.1", "0.0", ""]


def test_curves_that_share_a_name_say_what_tells_them_apart():
    measured = [made("pgd-9", [1], 0.1), made("pgd-9", [0], 0.2)]
    again = [made("pgd-9", [0], 0.1), made("pgd-9", [0], 0.2)]
    for m in again:
        m.record["protocol"]["restarts"] = 5
    (row,) = rows_of(table(measured + again))
    assert row["pgd-9 linf x1 seed 0 broke at eps"] == "0.2"
    assert row["pgd-9 linf x5 seed 0 broke at eps"] == "0.1"


def test_images_of_two_splits_have_a_row_each():
    both = made("clean", [1, 1, 0, 0])
    rows = rows_of(table([dataclasses.replace(both, index=np.array([0, 1, 0, 1]))]))
    assert [(row["image"], row["clean"]) for row in rows] == [
        ("0", "1"),
        ("0", "0"),
        ("1", "1"),
        ("1", "0"),
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("", (), None), [("linf", 0.1, 0.02)]),
        (("", (0.2,), None), [("linf", 0.2, 0.04)]),
        (("", (0.2, 0, 0.05), None), [("linf", 0.05, 0.01), ("linf", 0.2, 0.04)]),
        (("", (0.05, 0.2), 0.03), [("linf", 0.05, 0.03), ("linf", 0.2, 0.03)]),
        (("l2,linf", (1, 0.1), None), [("l2", 1, 0.2), ("linf", 0.1, 0.02)]),
    ],
)
def test_the_threats_that_options_ask_for(options, expected):
    config = runs.smoke(**runs.QUICK, eval__threat__step_size=0.02).unlock()
    found = [(t.norm, t.eps, t.step_size) for t in curves.threats(config, *options)]
    assert found == [(norm, eps, pytest.approx(step)) for norm, eps, step in expected]
