"""Evaluation: known answers from fake models, the protocol, and the command line."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from etils import epath

import vit_at
from vit_at import evaluate
from vit_at.attacks import Threat
from vit_at.config import fraction
from vit_at.distributed import sharding
from vit_at.errors import UserError
from vit_at.evaluation.evaluator import Evaluator, evaluate_and_store
from vit_at.evaluation.protocol import parse_attacks, weights_digest
from vit_at.reporting import exported
from vit_at.workdir import registry
from vit_at.workdir.checkpoint import load_trained
from vit_at.workdir.results import Results, as_text, in_255ths

THREAT = Threat("linf", 0.3, 0.1, 3)
EXAMPLES = runs.examples(45)  # in batches of 16, the last has 3 rows to fill


def read_all(examples):
    images, labels = examples.read(np.arange(len(examples)))
    return images.astype(np.float32) / 255, labels


def constant(params, images):
    """Always class 1, by a wide margin."""
    return jnp.tile(jnp.array([0.0, 5.0, 1.0]), (len(images), 1)) + 0 * images.sum()


def linear(params, images):
    return images.reshape(len(images), -1) @ params


WEIGHTS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


def outcomes(apply, params=None, *, examples=EXAMPLES, devices=1, batch_size=16, seed=0, **options):
    attacks = parse_attacks("clean,pgd-3,cw-3", THREAT, **options)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return dict(Evaluator(apply, examples, attacks, mesh, batch_size=batch_size, seed=seed)(params))


def test_a_constant_model_is_right_on_its_class_alone_under_every_attack():
    _, labels = read_all(EXAMPLES)
    for correct in outcomes(constant).values():
        np.testing.assert_array_equal(correct, labels == 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_whose_logits_are_not_finite_is_never_correct(value):
    """One logit of dark images is replaced; argmax would often still find the label."""

    def partly(params, images):
        dark = images.mean((1, 2, 3)) < 0.5
        logits = linear(params, images)
        return logits.at[:, 0].set(jnp.where(dark, -value, logits[:, 0]))

    images, _ = read_all(EXAMPLES)
    finite = outcomes(linear, WEIGHTS)["clean"]
    dark = images.mean((1, 2, 3)) < 0.5
    assert (finite & dark).any()
    found = outcomes(partly, WEIGHTS)
    np.testing.assert_array_equal(found["clean"], finite & ~dark)
    for correct in found.values():
        assert not (correct & dark).any()


def test_clean_outcomes_are_those_of_the_logits():
    images, labels = read_all(EXAMPLES)
    expected = linear(WEIGHTS, images).argmax(-1) == labels
    np.testing.assert_array_equal(outcomes(linear, WEIGHTS)["clean"], expected)


def test_an_attack_breaks_only_and_some():
    clean, pgd, cw = outcomes(linear, WEIGHTS).values()
    assert not (pgd & ~clean).any()
    assert not (cw & ~clean).any()
    assert pgd.sum() < clean.sum()
    assert cw.sum() < clean.sum()


@pytest.mark.parametrize(("devices", "batch_size"), [(2, 16), runs.slow(4, 64)])
def test_outcomes_do_not_depend_on_batches_or_devices(devices, batch_size):
    expected = outcomes(linear, WEIGHTS, restarts=2)
    other = outcomes(linear, WEIGHTS, restarts=2, devices=devices, batch_size=batch_size)
    for name in expected:
        np.testing.assert_array_equal(expected[name], other[name])


def test_an_images_start_belongs_to_its_place_in_the_split():
    """So a part of the test set gives these images the outcomes that the whole does."""
    rows = np.array([40, 3, 17, 22])
    part = outcomes(linear, WEIGHTS, examples=EXAMPLES.take(rows), batch_size=3)
    for name, whole in outcomes(linear, WEIGHTS).items():
        np.testing.assert_array_equal(part[name], whole[rows])


# --- Names ------------------------------------------------------------------------------------


def test_the_number_in_an_attacks_name_is_that_of_its_steps():
    clean, pgd, cw = parse_attacks("clean, pgd-20,cw-7", THREAT, restarts=3)
    assert clean.kind == "clean"
    assert (pgd.kind, pgd.loss, pgd.threat.steps, pgd.restarts) == ("pgd", "ce", 20, 3)
    assert (cw.kind, cw.loss, cw.threat.steps) == ("cw", "cw", 7)
    assert pgd.threat == dataclasses.replace(THREAT, steps=20)


@pytest.mark.parametrize(
    "name", ["", "pdg-20", "pgd", "pgd-", "pgd-0", "pgd-x", "pgd-²", "clean-2"]
)
def test_an_unknown_attack_is_refused_with_how_to_write_one(name):
    with pytest.raises(UserError, match="write clean, pgd-N or cw-N"):
        parse_attacks(f"clean,{name}", THREAT)


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), ("1", 1.0)])
def test_fractions_are_numbers(text, value):
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["8/0", "eight", "1/2/3", "/255", ""])
def test_what_is_no_fraction_is_refused(text):
    with pytest.raises(ValueError):
        fraction(text)


# --- Results ----------------------------------------------------------------------------------


def store(workdir, attacks="clean,pgd-3", threat=THREAT, examples=EXAMPLES, evaluator=Evaluator):
    mesh = sharding.make_mesh(jax.devices()[:1])
    return evaluate_and_store(
        evaluator(linear, examples, parse_attacks(attacks, threat), mesh, batch_size=16, seed=0),
        WEIGHTS,
        examples,
        Results(epath.Path(workdir)),
        seed=0,
        weights={"checkpoint": "best", "step": 12},
    )


def test_a_record_holds_its_accuracy_and_the_whole_protocol(tmp_path):
    clean, pgd = store(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == [clean, pgd]
    expected = outcomes(linear, WEIGHTS)["pgd-3"]
    assert pgd["accuracy"] == expected.mean()
    assert pgd["correct"] == expected.sum()
    p = expected.mean()
    assert pgd["standard_error"] == pytest.approx((p * (1 - p) / 45) ** 0.5)
    protocol = pgd["protocol"]
    assert protocol.pop("packages").keys() == {"vit_at", "jax", "jaxlib", "flax", "numpy"}
    assert protocol == {
        "data": "made/1.0.0 test",
        "num_examples": 45,
        "resolution": 8,
        "transform": "squash",
        "seed": 0,
        "dtype": "float32",
        "weights": {"digest": weights_digest(WEIGHTS), "checkpoint": "best", "step": 12},
        "norm": "linf",
        "eps": 0.3,
        "step_size": 0.1,
        "steps": 3,
        "restarts": 1,
        "loss": "ce",
    }
    assert "eps" not in clean["protocol"]


def test_outcomes_of_each_image_are_kept_under_their_evaluation(tmp_path):
    store(tmp_path)
    half_step = dataclasses.replace(THREAT, step_size=0.05)
    store(tmp_path, threat=half_step)  # another protocol, so another entry
    near = dataclasses.replace(THREAT, eps=0.300001)  # not to be rounded to 0.3
    store(tmp_path, threat=near)
    store(tmp_path, examples=EXAMPLES.take(np.arange(10)))
    records = json.loads((tmp_path / "results.json").read_text())
    with np.load(tmp_path / "per_example.npz") as archive:
        saved = dict(archive)
    assert len(records) == 6  # clean is the same for the first three
    outcomes_kept = {name: value for name, value in saved.items() if name.endswith("/correct")}
    assert len(outcomes_kept) == 6
    assert sorted(int(v.sum()) for v in outcomes_kept.values()) == sorted(
        entry["correct"] for entry in records
    )
    for name in outcomes_kept:
        index = saved[name.replace("/correct", "/index")]
        np.testing.assert_array_equal(index, EXAMPLES.indices[: len(index)])


class Refusing(Evaluator):
    """Fails where anything is computed."""

    def run(self, attack, params, **options):
        raise AssertionError(attack.name)


def test_what_is_stored_is_neither_computed_again_nor_listed_twice(tmp_path):
    first = store(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    assert store(tmp_path, evaluator=Refusing) == first
    assert (tmp_path / "results.json").read_bytes() == before
    with pytest.raises(AssertionError, match="cw-3"):
        store(tmp_path, attacks="clean,cw-3", evaluator=Refusing)


def test_the_digest_follows_every_weight_and_name():
    digests = {
        weights_digest(tree)
        for tree in ({"a": np.zeros(2)}, {"b": np.zeros(2)}, {"a": np.array([0.0, 1e-30])})
    }
    assert len(digests) == 3


def test_the_table_shows_every_record(tmp_path):
    lines = as_text(store(tmp_path, threat=Threat("linf", 8 / 255, 2 / 255, 3))).splitlines()
    assert lines[0].split() == ["attack", "accuracy", "images", "protocol"]
    assert lines[1].startswith("clean")
    assert "linf eps 8/255, step 2/255, 1 restart(s), made/1.0.0 test" in lines[2]


@pytest.mark.parametrize(("value", "text"), [(8 / 255, "8/255"), (0.1, "0.1"), (0.0314, "0.0314")])
def test_sizes_are_written_in_255ths_where_they_are_such(value, text):
    assert in_255ths(value) == text


# --- The command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.trained(tmp_path_factory.mktemp("run"))


def status_and_lines(capsys, *arguments):
    """(exit status, lines of stdout, lines of stderr)."""
    capsys.readouterr()
    try:
        status = evaluate.main([str(a) for a in arguments])
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


def test_the_command_evaluates_a_work_directory_and_adds_to_its_results(workdir, capsys):
    before = json.loads((workdir / "results.json").read_text())
    arguments = [workdir, "--attacks=clean,pgd-1", "--num_examples=12", "--batch_size=8"]
    status, lines, _ = status_and_lines(capsys, *arguments, "--eps=16/255", "--step_size=8/255")
    assert status == 0
    assert "eps 16/255, step 8/255" in lines[2]
    after = json.loads((workdir / "results.json").read_text())
    assert after[: len(before)] == before
    clean, pgd = after[len(before) :]
    assert clean["protocol"]["num_examples"] == pgd["protocol"]["num_examples"] == 12
    assert pgd["protocol"]["eps"] == 16 / 255
    assert pgd["protocol"]["weights"]["digest"] == before[0]["protocol"]["weights"]["digest"]
    assert status_and_lines(capsys, *arguments, "--eps=16/255", "--step_size=8/255")[1] == lines
    assert json.loads((workdir / "results.json").read_text()) == after


def test_the_defaults_repeat_the_final_evaluation(workdir, capsys):
    """The same code and protocol, so nothing is computed."""
    before = (workdir / "results.json").read_bytes()
    status, lines, _ = status_and_lines(capsys, workdir, "--attacks=clean,pgd-2")
    assert status == 0
    assert [line.split()[0] for line in lines[1:]] == ["clean", "pgd-2"]
    assert (workdir / "results.json").read_bytes() == before


def test_without_a_name_the_weights_are_those_that_the_run_tests(workdir, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["eval"]["checkpoint"] = "last"
    (run / "config.json").write_text(json.dumps(config))
    last = weights_digest(load_trained(run, "last").params)
    assert last != weights_digest(load_trained(run, "best").params)
    (record,) = evaluate.evaluate(run, "clean", num_examples=8)
    tested = record["protocol"]["weights"]
    assert (tested["checkpoint"], tested["digest"]) == ("last", last)
    assert weights_digest(registry.load(run).params) == last


def test_exported_weights_are_evaluated_like_the_work_directory(workdir, tmp_path, capsys):
    exported.export_workdir(workdir, "last", str(tmp_path / "there"))
    arguments = ["--attacks=clean,pgd-2,apgd-ce", "--num_examples=8", "--batch_size=8"]
    status, lines, _ = status_and_lines(capsys, tmp_path / "there", *arguments)
    assert status == 0
    assert lines == status_and_lines(capsys, workdir, *arguments, "--checkpoint=last")[1]
    assert "apgd-ce" in lines[-1]
    weights = tmp_path / "there" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    status, _, (line,) = status_and_lines(capsys, tmp_path / "there")
    assert status == 2
    assert "its SHA-256 differs" in line
    weights.unlink()
    assert "is missing" in status_and_lines(capsys, tmp_path / "there")[2][0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attacks=pdg-20"], "attack 'pdg-20' is unknown"),
        (["--num_examples=1000"], "1000 examples are asked for"),
        (["--num_examples=-1"], "-1 examples are asked for"),
        (["--split=tset"], "has no split 'tset'"),
        (["--eps=8"], "threat.eps is 8"),
        (["--eps=8/0"], "invalid fraction value: '8/0'"),
        (["--norm=l2"], "give --eps too"),
        (["--restarts=0"], "--restarts is 0"),
        (["--batch_size=10"], "--batch_size is 10, which 4 devices"),
        (["--checkpoint=newest"], "invalid choice: 'newest'"),
        (["--atacks=clean"], "'atacks' is unknown; the nearest are --attacks"),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_sentence(workdir, capsys, arguments, said):
    status, out, err = status_and_lines(capsys, workdir, *arguments)
    assert status == 2
    assert out == []
    assert said in err[-1]
    assert "error: " in err[-1]


def test_a_directory_that_no_run_has_written_is_refused(tmp_path, capsys):
    status, _, (line,) = status_and_lines(capsys, tmp_path / "nothing")
    assert status == 2
    assert "is no work directory" in line
    assert not (tmp_path / "nothing").exists()


def test_the_records_state_the_threat_of_evaluation(tmp_path):
    """A run trained with large steps is validated and tested with the steps of ``eval.threat``."""
    config = runs.smoke(**runs.QUICK, eval__threat__step_size=0.02, eval__attacks="pgd-2")
    records = vit_at.train(config, epath.Path(tmp_path))
    protocol = records[0]["protocol"]
    assert (protocol["eps"], protocol["step_size"]) == (0.1, 0.02)
    (again,) = vit_at.evaluate(tmp_path, "pgd-2", batch_size=16)
    assert again["protocol"]["step_size"] == 0.02
    (other,) = vit_at.evaluate(tmp_path, "pgd-2", batch_size=16, eps=0.05, step_size=0.03)
    assert (other["protocol"]["eps"], other["protocol"]["step_size"]) == (0.05, 0.03)
    for norm, eps, scaled in (("linf", 0.05, 0.01), ("l2", 1.0, 0.2)):
        (other,) = vit_at.evaluate(tmp_path, "pgd-2", batch_size=16, norm=norm, eps=eps)
        assert other["protocol"]["step_size"] == pytest.approx(scaled)
