"""Results: a damaged file is found before an attack runs, and what was measured is never lost."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from etils import epath

from vit_at import evaluate
from vit_at.attacks import Threat
from vit_at.errors import UserError
from vit_at.evaluation import evaluator
from vit_at.evaluation.protocol import Attack, record
from vit_at.models import build
from vit_at.reporting import exported
from vit_at.workdir import results as module
from vit_at.workdir.checkpoint import Trained
from vit_at.workdir.results import Results

EXAMPLES = runs.examples(5)
CORRECT = np.array([True, False, True, True, False])
CLEAN = record(
    Attack("clean", "clean", Threat("linf", 0.1, 0.1, 1)),
    CORRECT,
    examples=EXAMPLES,
    seed=0,
    weights={"digest": "d"},
)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export of a tiny model of the digits, with random weights."""
    config = runs.resolved(**runs.QUICK)
    model = build(config, 10, "float32")
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    directory = tmp_path_factory.mktemp("export")
    about = exported.describe(Trained(config, model, params, {"step": 1}, "best"), [])
    exported.export(params, model, directory, about)
    return directory


def test_damaged_outcomes_are_refused_before_the_attack_and_the_advice_works(export, monkeypatch):
    few = {"num_examples": 8, "batch_size": 8}
    (clean,) = evaluate.evaluate(export, "clean", **few)
    damaged = export / "per_example.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "run", lambda *_, **__: pytest.fail("the attack runs"))
        with pytest.raises(UserError) as refusal:
            evaluate.evaluate(export, "clean,pgd-2", **few)
    assert "per_example.npz can't be read" in str(refusal.value)
    assert "move it away and run the same command again" in str(refusal.value)
    damaged.rename(export / "damaged.npz")
    again, attacked = evaluate.evaluate(export, "clean,pgd-2", **few)
    assert again == clean
    stored = Results(epath.Path(export))
    assert stored.records == [clean, attacked]
    assert stored.outcomes(clean) is None
    assert stored.outcomes(attacked)[1].sum() == attacked["correct"]


def test_damaged_outcomes_are_found_in_less_than_a_second(tmp_path):
    (tmp_path / "per_example.npz").write_bytes(b"PK\x03\x04" + bytes(10**6))
    start = time.monotonic()
    with pytest.raises(UserError, match="move it away"):
        Results(epath.Path(tmp_path))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("failing", ["per_example.npz", "results.json"])
def test_a_result_that_cannot_be_stored_is_saved_elsewhere(tmp_path, monkeypatch, failing):
    workdir, write = epath.Path(tmp_path / "run"), module.write_atomically
    workdir.mkdir()

    def full(path, content):
        if path == workdir / failing:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(module, "write_atomically", full)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError) as refusal:
        Results(workdir).add(CLEAN, CORRECT, EXAMPLES)
    sentence = str(refusal.value)
    assert "No space left" in sentence
    assert "accuracy 60.00%" in sentence
    (place,) = tmp_path.glob("vit_at-*")
    assert str(place) in sentence
    monkeypatch.undo()
    for path in place.iterdir():  # as the sentence says
        path.rename(tmp_path / "run" / path.name)
    restored = Results(workdir)
    assert restored.find(CLEAN) == CLEAN
    np.testing.assert_array_equal(restored.outcomes(CLEAN)[1], CORRECT)


def test_a_result_that_can_be_written_nowhere_is_in_the_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError) as refusal:
        Results(epath.Path(tmp_path)).add(CLEAN, CORRECT, EXAMPLES)
    text = str(refusal.value).partition("its record is ")[2].rpartition(";")[0]
    assert json.loads(text) == CLEAN


def test_a_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "results.json")
    path.write_text("[]")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        module.write_atomically(path, "[1]")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "[]"


def test_what_earlier_versions_wrote_is_read(tmp_path):
    """Records without a checkpoint, a standard attack and further fields."""
    entry = CLEAN | {"more": [1, None], "protocol": CLEAN["protocol"] | {"note": "x"}}
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    assert Results(epath.Path(tmp_path)).records == [entry]


@pytest.mark.slow
def test_the_command_writes_curves_unions_and_transfer_matrices(export, tmp_path, capsys):
    few = ["--attacks=pgd-2", "--num_examples=8", "--batch_size=8", f"--workdir={tmp_path}"]
    assert evaluate.main([str(export), *few, "--eps=0,0.05,0.1"]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[1:]] == ["clean", "pgd-2", "pgd-2"]
    assert "curves/pgd-2_linf_digits-1.0.0-test-48.csv" in printed.err
    curve = tmp_path / "curves" / "pgd-2_linf_digits-1.0.0-test-48.csv"
    assert curve.read_text().startswith("attack,norm,eps,")
    assert curve.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = curve.read_text()
    assert (
        evaluate.main([str(export), *few, "--eps=0.05,0.1", "--split=train"]) == 0
    )  # of other images
    assert curve.with_name("pgd-2_linf_digits-1.0.0-train.csv").exists()
    assert curve.read_text() == before
    assert evaluate.main([str(export), *few, "--norm=linf,l2", "--eps=0.1,0.5"]) == 0
    assert "pgd-2-union" in capsys.readouterr().out.splitlines()[-1]
    shutil.copytree(export, tmp_path / "other")
    assert evaluate.main([str(export), *few, f"--from={tmp_path / 'other'}"]) == 0
    assert "from other to export0" in capsys.readouterr().out.splitlines()[3]
    assert (tmp_path / "transfer" / "pgd-2_linf_0.1.png").exists()
    assert (tmp_path / "transfer" / "per_example.csv").exists()


def test_a_label_that_is_no_class_is_refused(tmp_path):
    arrays = {"index": np.arange(2), "correct": np.ones(2, bool), "margin": np.zeros(2)}
    arrays |= {"label": np.array([0, 3]), "prediction": np.zeros(2, int)}
    arrays["class_names"] = np.array(runs.CLASSES)
    np.savez(tmp_path / "per_example.npz", **{f"d/made/2 clean/{n}": a for n, a in arrays.items()})
    with pytest.raises(UserError, match=r"label' is no class.*move it away"):
        Results(epath.Path(tmp_path))


def test_a_record_from_before_transforms_is_that_of_squash(tmp_path):
    earlier = CLEAN | {"protocol": {k: v for k, v in CLEAN["protocol"].items() if k != "transform"}}
    (tmp_path / "results.json").write_text(json.dumps([earlier]))
    stored = Results(epath.Path(tmp_path))
    assert stored.find(CLEAN) == earlier
    for field, value in (
        ("transform", "resize9-crop8"),
        ("ids", "robustbench 0123"),
        ("precision", "tf32x3"),
        ("contents", "0123"),
    ):
        other = CLEAN | {"protocol": CLEAN["protocol"] | {field: value}, "accuracy": 0.2}
        assert stored.find(other) is None
        stored.add(other, CORRECT, EXAMPLES)
        assert field == "contents" or value in module.as_text([other])
    assert len(stored.records) == 5
    assert stored.outcomes(stored.records[1])[1].tolist() == CORRECT.tolist()
    assert len({module._key(record) for record in stored.records}) == 5
