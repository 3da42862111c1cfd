"""Study files: what is written is read back, and what is damaged or foreign is refused."""

import json

import numpy as np
import pytest
from etils import epath
from test_page import Page
from test_study import make_run, pgd, record

from vit_at import report
from vit_at.config import nested
from vit_at.errors import UserError
from vit_at.reporting import page, study
from vit_at.reporting.run import Run, thin

METRICS = "".join(
    json.dumps({"step": s, "epoch": s / 4, "loss": 2 - s / 8, "images_per_second": 9.0}) + "\n"
    for s in range(1, 9)
)


@pytest.fixture
def runs(tmp_path):
    """A directory of work directories: AT and MART, two seeds each."""
    place = tmp_path / "runs"
    for seed, accuracy in enumerate((0.7, 0.8)):
        for objective in ("at", "mart"):
            entries = [record("clean", 0.9), pgd(accuracy)]
            changes = {"seed": seed, "objective": objective, "data__dir": "/somewhere"}
            changes |= {"data__decoded_dir": f"/somewhere/{seed}"}
            make_run(place / f"{objective}{seed}", entries, METRICS, **changes)
    return place


def test_a_study_file_gives_the_same_runs_table_and_page(runs, tmp_path):
    path = page.write([runs], tmp_path / "study.json")
    before, after = study.find([runs]), study.find([path])
    for old, new in zip(before, after, strict=True):
        assert new.name == old.name
        assert new.config == old.config | {
            "data": old.config["data"] | {"dir": "", "decoded_dir": ""}
        }
        assert new.records == old.records
        assert new.workdir is None
    tables = [study.compare(study.groups(found)).markdown() for found in (before, after)]
    assert tables[0] == tables[1]
    pages = [page.write([place], tmp_path / "page.html").read_text() for place in (runs, path)]
    assert pages[0] == pages[1]


def test_what_runs_share_is_stored_once_and_no_path_of_the_machine(runs, tmp_path):
    path = page.write([runs], tmp_path / "study.json")
    text = path.read_text()
    stored = json.loads(text)
    assert [entry["config"] for entry in stored["runs"]] == [
        {"objective": objective, "seed": seed} for objective in ("at", "mart") for seed in (0, 1)
    ]
    assert text.count("digits/1.0.0 test") == 2  # once for each attack
    assert "/somewhere" not in text
    assert str(tmp_path) not in text


def test_only_the_curves_that_a_page_draws_are_stored(runs, tmp_path):
    found = study.find([page.write([runs], tmp_path / "study.json")])
    assert [sorted(run.curves) for run in found] == [["loss"], [], ["loss"], []]
    assert found[0].series("loss") == study.find([runs])[0].series("loss")


def test_curves_are_thinned_and_rounded_and_accuracies_are_not(tmp_path):
    metrics = "".join(
        json.dumps({"step": s, "epoch": s / 3, "loss": 1 / s}) + "\n" for s in range(1, 999)
    )
    place = make_run(tmp_path / "a", [pgd(1 / 3)], metrics)
    (run,) = study.find([page.write([place], tmp_path / "study.json")])
    epochs, losses = run.series("loss")
    assert len(epochs) == len(losses) <= 80
    assert losses[1] == float(f"{np.mean([1 / s for s in range(14, 27)]):.5g}")
    assert run.records[0]["accuracy"] == 1 / 3


def test_what_was_filled_in_by_hand_stays(runs, tmp_path):
    path = page.write([runs], tmp_path / "study.json")
    by_hand = {"commands": ["vit-at sweep mine.py"], "machine": "a phone", "notes": "slow"}
    path.write_text(json.dumps(json.loads(path.read_text()) | by_hand))
    stored = json.loads(page.write([runs], path).read_text())
    assert {field: stored[field] for field in by_hand} == by_hand


def test_a_single_run_has_a_page_without_what_needs_weights(runs, tmp_path):
    path = page.write([runs / "at0"], tmp_path / "study.json")
    words = Page(page.write([path], tmp_path / "page.html").read_text()).words
    assert "70.00" in words
    assert "a study file holds no weights" in words
    with pytest.raises(UserError, match="--out"):
        page.write([path])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is no study file"),
        ('{"runs": []}', "is no study file"),
        ('{"format": "vit_at study 1"}', "is a damaged study file"),
        ('{"format": "vit_at study 1", "runs": []}', "is a damaged study file"),
        ('{"format": "vit_at study 1", "runs": [{"name": "a"}]}', "is a damaged study file"),
        (None, "does not exist"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path, capsys, text, said):
    path = tmp_path / "study.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        report.main([str(path), f"--out={tmp_path / 'table.md'}"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_foreign_file_is_not_overwritten(runs, tmp_path):
    path = epath.Path(tmp_path / "package.json")
    path.write_text('{"name": "mine"}')
    with pytest.raises(UserError, match="is no study file"):
        page.write([runs], path)
    assert path.read_text() == '{"name": "mine"}'


def test_nested_inverts_flatten():
    tree = {"a": 1, "b": {"c": [1, 2], "d": {"e": "f"}}}
    assert nested({"a": 1, "b.c": [1, 2], "b.d.e": "f"}) == tree


def test_many_points_are_averaged_and_few_left_alone():
    assert thin([1, 2], [3, 4], 160) == ([1, 2], [3, 4])
    xs, ys = thin(range(1000), np.ones(1000), 160)
    assert len(xs) <= 160
    assert set(ys) == {1.0}
    assert xs[0] == 3.0  # the mean of 0 ... 6


def test_a_run_without_metrics_has_empty_series():
    assert Run("x", {}).series("loss") == ([], [])
