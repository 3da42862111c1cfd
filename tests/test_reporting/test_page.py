"""The page of a real toy run, read back as HTML, and of work directories that lack things."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import runs
from etils import epath
from test_study import make_run, pgd, record

import vit_at
from vit_at.attacks.autoattack.flags import MEANING
from vit_at.errors import UserError
from vit_at.reporting import exhibits, page
from vit_at.workdir import registry
from vit_at.workdir.checkpoint import load_trained
from vit_at.workdir.results import Results

ROOT = epath.Path(__file__).parents[2]


class Page(html.parser.HTMLParser):
    """What a test asks of a page: its text, tags, and everything that it would load."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.loads, self.open = [], [], [], []
        self.source = source
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for name, v in attributes if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / "trained")
    changes = runs.QUICK | {"masking__ard": True, "masking__prm": True}
    from vit_at.training.loop import train

    train(runs.smoke(**changes), workdir)
    return workdir


@pytest.fixture(scope="module")
def shown(trained):
    return Page(page.write([trained]).read_text())


def test_the_page_of_a_run_shows_everything_and_loads_nothing(shown, trained):
    for title in (
        "Results",
        "Accuracy by attack",
        "Training",
        "Accuracy by class",
        "Accuracy over eps and steps",
        "Attacked images",
        "What ARD and PRM mask",
    ):
        assert title in shown.words
    assert "Not shown" not in shown.words
    assert all(load.startswith("data:image/png;base64,") for load in shown.loads)
    assert "http" not in shown.source.replace("http://www.w3.org/", "")
    assert "script" not in shown.tags
    for entry in Results(trained).records:
        assert f"{100 * entry['accuracy']:.2f}" in shown.words
    assert "AT + ARD + PRM" in shown.words
    assert "prefers-color-scheme: dark" in shown.source
    assert 'name="viewport"' in shown.source


def test_charts_take_their_colours_from_the_page(shown):
    assert shown.tags.count("svg") >= 9
    figures = "".join(re.findall(r"<svg.*?</svg>", shown.source, re.DOTALL))
    assert "var(--c0)" in figures
    assert "var(--ink)" in figures
    assert not re.findall(r"#0[14]0[25]0[36]|#0a0b", figures)


def test_attacked_images_are_within_eps_and_the_first_of_the_split(trained):
    weights = load_trained(trained, "best")
    shown = exhibits.Exhibits(weights)
    found = shown.attacked(4)
    assert np.abs(found.adversarial - found.images).max() <= weights.config.threat.eps + 1e-6
    images, labels = shown._examples.read(np.arange(4))
    np.testing.assert_array_equal(found.images, images.astype(np.float32) / 255)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.clean_probabilities.sum(1), 1, rtol=1e-5)
    assert found.rollout[0].shape == (4, 4, 4)


def test_curves_begin_with_clean_accuracy_and_steps_make_the_attack_stronger(trained):
    shown = exhibits.Exhibits(load_trained(trained, "best"))
    by_eps, by_steps, count = shown.curves()
    assert count == 48
    (clean,) = [r["accuracy"] for r in Results(trained).records if r["attack"] == "clean"]
    assert by_eps[0.0] == pytest.approx(clean)
    eps = float(shown.threat.eps)
    assert by_eps[eps] == by_steps[exhibits.STEPS]
    assert by_eps[4 * eps] <= by_eps[eps] <= clean
    assert by_steps[50] <= by_steps[1]


@pytest.mark.slow
def test_a_model_too_large_for_the_machine_has_no_curves(trained, monkeypatch):
    shown = exhibits.Exhibits(load_trained(trained, "best"))
    assert shown.affordable == 128
    monkeypatch.setitem(exhibits._BUDGET, "cpu", 1e9)
    assert shown.affordable == 0
    assert len(shown.attacked(2).labels) == 2


def test_accuracy_by_class_adds_up_to_the_whole(trained):
    shown = exhibits.Exhibits(load_trained(trained, "best"))
    results = Results(trained)
    found = shown.by_class(results, results.records)
    _, labels = shown._examples.read(np.arange(48))
    for entry in results.records:
        counts = [(labels == int(name)).sum() for name in found]
        shares = [found[name].get(entry["attack"], 0) for name in found]
        assert np.dot(counts, shares) == pytest.approx(entry["correct"])


def test_the_masks_shown_are_those_of_half_the_warm_up(trained):
    image, draws, epoch = exhibits.Exhibits(load_trained(trained, "best")).masks()
    assert epoch == 0.5
    assert draws.patch_keep.shape == (2, 4, 4)
    assert (draws.patch_keep.sum((1, 2)) == 8).all()
    assert draws.attn_keep.shape == (2, 2)
    assert image.shape == (8, 8, 1)


def test_an_export_has_a_page_of_what_it_says_of_itself_and_is_attacked(tmp_path, trained):
    name = "digits_deit_64x2"
    words = Page(page.write([name], tmp_path / "page.html").read_text()).words
    for title in ("Results", "Accuracy by attack", "Attacked images", "no curves are drawn"):
        assert title in words
    for entry in vit_at.load(name).record:
        assert f"{100 * entry['accuracy']:.2f}" in words
    with pytest.raises(UserError, match="of an export"):
        page.write([name])
    table = page.write([registry.PACKAGED / name, trained], tmp_path / "table.md").read_text()
    assert name in table
    assert "AT + ARD + PRM" in table


def test_what_a_work_directory_lacks_is_said_in_a_sentence(tmp_path, trained):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "config.json", bare / "config.json")
    words = Page(page.write([bare]).read_text()).words
    assert "Nothing has been evaluated yet" in words
    assert "no curves are drawn" in words
    assert "holds no 'last' checkpoint yet" in words


def test_data_that_are_gone_leave_the_rest_of_the_page(tmp_path, trained):
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    config = json.loads((moved / "config.json").read_text())
    config["data"]["name"] = f"folder:{tmp_path / 'gone'}"
    (moved / "config.json").write_text(json.dumps(config))
    words = Page(page.write([moved]).read_text()).words
    assert "No attacked images and no accuracy by class: " in words
    assert "gone" in words
    assert "Training loss" in words


def test_runs_are_compared_over_seeds(tmp_path):
    metrics = "".join(
        json.dumps({"step": s, "epoch": s / 4, "loss": 2.0 / s, "validation/clean": s / 10}) + "\n"
        for s in range(1, 9)
    )
    for seed, accuracy in enumerate((0.7, 0.8)):
        make_run(tmp_path / f"a{seed}", [pgd(accuracy)], metrics, seed=seed)
        make_run(tmp_path / f"b{seed}", [pgd(0.5)], seed=seed, objective="mart")
    found = Page(page.write([tmp_path], tmp_path / "page.html").read_text())
    assert "4 runs compared" in found.words
    assert "75.0 ± 7.1" in found.words
    assert "Training curves of “MART”: there are no metrics here" in found.words
    assert found.tags.count("svg") == 3  # side by side, validation, loss
    text = page.write([tmp_path], tmp_path / "table.md").read_text()
    assert "| MART | 2 | 50.0 ± 0.0 |" in text


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_a_report_is_replaced_and_every_other_file_is_kept(tmp_path, suffix):
    workdir = make_run(tmp_path / "a", [pgd(0.5)])
    out = tmp_path / "new" / f"o{suffix}"
    first = page.write([workdir], out).read_text()
    assert page.write([workdir], out).read_text() == first
    out.write_text(f"mine\n{first}")
    with pytest.raises(UserError, match="move it away"):
        page.write([workdir], out)
    assert out.read_text() == f"mine\n{first}"


def test_a_comparison_needs_a_place(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1)
    with pytest.raises(UserError, match="--out"):
        page.write([tmp_path])


def test_results_of_a_function_have_a_page(tmp_path):
    """Its records name no checkpoint."""
    found = record("clean", 0.75)
    found["protocol"]["weights"] = {"digest": "f" * 16}
    place = make_run(tmp_path / "run", [found])
    assert "f" * 16 in Page(page.write([place]).read_text()).words


def test_flags_of_the_audit_are_said_in_the_words_of_its_documentation(tmp_path):
    entry = record("autoattack", 0.4, norm="linf", eps=8 / 255)
    entry["cascade"] = {"clean": 0.9, "apgd-ce": 0.5, "square": 0.4}
    curves = {"eps_curve": [[0.0, 0.9], [0.03, 0.4]], "steps_curve": [[10, 0.5], [100, 0.4]]}
    entry["audit"] = {"flags": {"square-wins": "the accuracy fell"}} | curves
    found = Page(page.write([make_run(tmp_path / "a", [entry])]).read_text())
    assert "Square breaks images that the attacks with gradients do not" in found.words
    assert "A search without gradients should not find more than attacks" in found.words
    assert found.tags.count("svg") == 4  # by attack, the cascade, over eps, over steps


def test_every_flag_has_the_words_of_docs_audit():
    words = json.loads((page._PACKAGED / "flags.json").read_text())
    assert words.keys() == MEANING.keys()
    documented = " ".join((ROOT / "docs" / "audit.md").read_text().replace("`", "").split())
    for sentences in words.values():
        assert sentences["means"] in documented
        assert sentences["remedy"] in documented


def test_published_numbers_are_those_of_the_same_data_and_threat():
    config = runs.smoke().to_dict()
    config["data"]["name"] = "imagenet2012"
    assert page.published(config) == {}  # digits' eps
    config["threat"]["eps"] = 4 / 255
    papers = [row for row in page.published(config)["entries"] if "2210.07540" in row["source"]]
    ours = [row for row in papers if row["measured_by"].startswith("RobustBench")]
    assert [(row["clean"], row["autoattack"]) for row in ours] == [(68.38, 34.4), (74.66, 38.3)]
    assert all("re-trained" in row["source"] and row["transform"] == "squash" for row in ours)
    (claim,) = (row for row in papers if row not in ours)
    assert (claim["clean"], claim["autoattack"]) == (74.36, 38.61)


def test_a_failing_report_is_a_warning(tmp_path, caplog):
    assert page.write_after_training(epath.Path(tmp_path / "none")) is None
