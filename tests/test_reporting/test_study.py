"""Runs are read back, grouped over seeds and averaged: hand-made work directories."""

import json

import pytest
import runs

from vit_at.errors import UserError
from vit_at.reporting import study
from vit_at.workdir.files import CONFIG_FILE

DIGEST = "0123456789abcdef"


def record(attack, accuracy, checkpoint="best", digest=DIGEST, **protocol):
    weights = {"digest": digest, "checkpoint": checkpoint, "step": 7}
    protocol = {
        "data": "digits/1.0.0 test",
        "num_examples": 100,
        "resolution": 8,
        "seed": 0,
        "weights": weights,
        "packages": {"jax": "0"},
    } | protocol
    return {
        "attack": attack,
        "accuracy": accuracy,
        "correct": int(100 * accuracy),
        "standard_error": 0.01,
        "protocol": protocol,
    }


def make_run(workdir, records=(), metrics="", **changes):
    """A work directory as a run leaves it, without weights."""
    config = runs.smoke(**{"data__test_split": "test"} | changes)
    workdir.mkdir(parents=True)
    (workdir / CONFIG_FILE).write_text(json.dumps(config.to_dict()))
    (workdir / "results.json").write_text(json.dumps(list(records)))
    if metrics:
        (workdir / "metrics.jsonl").write_text(metrics)
    return workdir


def pgd(accuracy, **protocol):
    threat = {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 20, "restarts": 1}
    return record("pgd-20", accuracy, **threat | protocol)


def test_seeds_are_averaged_and_what_differs_names_the_groups(tmp_path):
    for seed, accuracy in enumerate((0.70, 0.80)):
        make_run(tmp_path / f"at{seed}", [record("clean", 0.9), pgd(accuracy)], seed=seed)
        changes = {"masking__ard": True, "optimizer__schedule": "cosine", "seed": seed}
        make_run(tmp_path / f"ard{seed}", [pgd(0.5)], **changes)
    table = study.compare(study.groups(study.find([tmp_path])))
    assert table.headings == ("clean", "PGD-20")
    assert table.rows == (
        ("AT + ARD, schedule cosine", 2, ("-", "50.0 ± 0.0")),
        ("AT, schedule step", 2, ("90.0 ± 0.0", "75.0 ± 7.1")),
    )
    assert "| AT, schedule step | 2 | 90.0 ± 0.0 | 75.0 ± 7.1 |" in table.markdown()


def test_numbers_of_different_protocols_are_not_averaged(tmp_path):
    make_run(tmp_path / "a", [pgd(0.7)])
    make_run(tmp_path / "b", [pgd(0.1, eps=16 / 255)], seed=1)
    (table,) = [study.compare(study.groups(study.find([tmp_path])))]
    assert table.headings == ("PGD-20, eps 8/255", "PGD-20, eps 16/255")
    assert table.rows == (("AT", 2, ("70.0 (1 seeds)", "10.0 (1 seeds)")),)


def test_only_the_weights_that_the_configuration_tests_count(tmp_path):
    both = [record("clean", 0.5, checkpoint="last", digest="1" * 16), record("clean", 0.75)]
    (run,) = study.find([make_run(tmp_path / "a", both)])
    assert [r["accuracy"] for r in run.tested] == [0.75]


def test_they_count_by_their_other_name_too(tmp_path):
    """The best weights may be the last."""
    both = [record("clean", 0.75), record("pgd-20", 0.25, checkpoint="last")]
    (run,) = study.find([make_run(tmp_path / "a", both)])
    assert [r["accuracy"] for r in run.tested] == [0.75, 0.25]


def test_weights_of_earlier_steps_do_not_count(tmp_path):
    later = record("clean", 0.75)
    later["protocol"]["weights"] |= {"digest": "1" * 16, "step": 9}
    records = [record("clean", 0.5), later, record("clean", 0.25)]
    (run,) = study.find([make_run(tmp_path / "a", records)])
    assert [r["accuracy"] for r in run.tested] == [0.75]


def test_a_run_counts_once_with_its_own_seed(tmp_path):
    """Not each evaluation of it, nor the run again beside a copy."""
    records = [pgd(0.1, seed=1), pgd(0.7), pgd(0.2, seed=2)]
    places = [make_run(tmp_path / name, records) for name in ("a", "b")]
    table = study.compare(study.groups(study.find([places[0], *places])))
    assert table.rows == (("AT (a)", 1, ("70.0",)), ("AT (b)", 1, ("70.0",)))


def test_pretrained_weights_of_each_seed_s_own_do_not_split_a_group(tmp_path):
    for seed in range(2):
        source = {"model__pretrained": f"runs/natural-seed={seed}"}
        make_run(tmp_path / f"p{seed}", [pgd(0.5)], seed=seed, **source)
        make_run(tmp_path / f"s{seed}", [pgd(0.5)], seed=seed)
    names = [group.name for group in study.groups(study.find([tmp_path]))]
    assert names == ["AT, from natural-seed=*", "AT, from scratch"]


def test_where_much_differs_the_work_directory_names_the_group(tmp_path):
    make_run(tmp_path / "plain", [pgd(0.5)])
    other = {"epochs": 3, "batch_size": 8, "beta": 2.0, "label_smoothing": 0.1, "ema_decay": 0.5}
    make_run(tmp_path / "seed=0", [pgd(0.5)], **other | {"epochs": 4})
    for seed in (0, 1):
        make_run(tmp_path / f"strange-seed={seed}", [pgd(0.5)], seed=seed, **other)
    names = [group.name for group in study.groups(study.find([tmp_path]))]
    assert names == ["AT (plain)", "AT", "AT (strange)"]


def test_numbers_in_names_are_sorted_by_their_values(tmp_path):
    for epochs in (10, 5, 20):
        make_run(tmp_path / f"epochs={epochs}.0-seed=0", [pgd(0.5)], epochs=epochs)
    names = [group.name for group in study.groups(study.find([tmp_path]))]
    assert names == ["AT, epochs 5", "AT, epochs 10", "AT, epochs 20"]


def test_fields_of_the_attack_do_not_tell_natural_training_from_the_rest(tmp_path):
    make_run(tmp_path / "a", [pgd(0.5)], threat__eps_warmup_epochs=1.0)
    make_run(tmp_path / "n", [pgd(0.1)], objective="natural", threat__eps_warmup_epochs=0.0)
    names = [group.name for group in study.groups(study.find([tmp_path]))]
    assert names == ["AT", "natural"]


def test_the_masks_warm_up_does_not_tell_trainings_without_masks_from_each_other(tmp_path):
    for i, (prm, epochs) in enumerate(((False, 1.0), (False, 2.0), (True, 1.0), (True, 2.0))):
        changes = {"masking__prm": prm, "masking__warmup_epochs": epochs, "seed": i}
        make_run(tmp_path / f"run{i}", [pgd(0.5)], **changes)
    names = [group.name for group in study.groups(study.find([tmp_path]))]
    assert names == ["AT", "AT + PRM, warmup_epochs 1", "AT + PRM, warmup_epochs 2"]


def test_metrics_end_where_a_crash_has_cut_a_line(tmp_path):
    lines = '{"step": 1, "epoch": 0.5, "loss": 2.0}\n{"step": 2, "epoch": 1.0, "loss": 1.0}\n{"st'
    (run,) = study.find([make_run(tmp_path / "a", metrics=lines)])
    assert run.series("loss") == ([0.5, 1.0], [2.0, 1.0])
    assert run.series("absent") == ([], [])


def test_a_place_without_runs_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is no work directory"):
        study.find([tmp_path])


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "-"), ([0.5], "50.0"), ([0.5, 0.5], "50.0 ± 0.0"), ([0.0, 1.0], "50.0 ± 70.7")],
)
def test_mean_and_deviation(values, text):
    assert study.mean_and_deviation(values) == text


def test_results_of_another_transform_have_a_column_of_their_own():
    records = [
        pgd(0.5),
        pgd(0.4, transform="resize256-crop224"),
        pgd(0.3, transform="squash", ids="robustbench 0123"),
        pgd(0.6, precision="bf16x9"),
    ]
    columns = [study.Column.of(found) for found in (*records, pgd(0.5, transform="squash"))]
    assert len(set(columns)) == 4
    assert columns[0] == columns[4]
    headings = [column.heading(columns) for column in columns[:4]]
    assert headings[1] == "PGD-20, resize256-crop224, all images, float32"
    assert headings[2] == "PGD-20, squash, images of robustbench 0123, float32"
    assert headings[3] == "PGD-20, squash, all images, bf16x9"
