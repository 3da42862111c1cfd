"""The headline of a page, and which results of curves a comparison shows."""

from matplotlib.figure import Figure
from test_study import make_run, pgd, record

from vit_at.reporting import page, pictures, robustness, study

EPS = {"eps": 0.15, "step_size": 0.0375}


def test_the_headline_is_the_strongest_attack_at_the_eps_of_evaluation(tmp_path):
    records = [record("clean", 0.969), pgd(0.75, **EPS), pgd(0.01, eps=0.4)]
    records += [pgd(0.716, **EPS) | {"attack": "pgd-100"}]
    (run,) = study.find([make_run(tmp_path / "a", records, threat__eps=0.15)])
    assert robustness.headline(run) == (
        "71.6 % of 100 test images withstand PGD-100 at Linf eps 0.15 (standard error 1.0); "
        "96.9 % are right without attack."
    )
    (clean,) = study.find([make_run(tmp_path / "b", records[:1])])
    assert robustness.headline(clean) == (
        "Of 100 test images, 96.9 % are right without attack; no attack has been evaluated."
    )


def test_the_headline_is_of_the_own_test_images(tmp_path):
    train = [record("clean", 1.0, num_examples=1000, data="digits/1.0.0 train")]
    train += [pgd(0.9, **EPS, num_examples=1000, data="digits/1.0.0 train")]
    own = [record("clean", 0.8), pgd(0.5, **EPS)]
    (run,) = study.find([make_run(tmp_path / "a", train + own, threat__eps=0.15)])
    assert robustness.headline(run).startswith("50.0 % of 100 test images withstand")
    (other,) = study.find([make_run(tmp_path / "b", train, threat__eps=0.15)])
    assert robustness.headline(other).startswith("90.0 % of 1000 images of digits/1.0.0 train with")


def test_a_comparison_leaves_curves_to_their_chart_and_natural_training_apart(tmp_path):
    for name, accuracy, objective in (
        ("a", 0.7, "at"),
        ("b", 0.6, "trades"),
        ("c", 0.1, "natural"),
    ):
        records = [record("clean", 0.9), pgd(accuracy, **EPS), pgd(0.02, eps=0.4)]
        make_run(tmp_path / name, records, objective=objective, threat__eps=0.15)
    runs = study.find([tmp_path])
    assert study.compare(study.groups(runs)).headings == ("clean", "PGD-20")
    text = page.comparison(runs)
    assert text.index("<th>Adversarial training") < text.index('<td class="name">TRADES')
    assert text.index('<td class="name">TRADES') < text.index("<th>Natural training")
    assert "Of 2 adversarial trainings, AT has the highest robust accuracy: 70.0" in text


def test_an_axis_over_eps_is_logarithmic_beyond_a_decade():
    scales = []
    for sizes in ([0, 0.1, 0.4], [0, 0.01, 0.4]):
        axes = Figure().subplots()
        pictures.line_chart("", {"": (sizes, [1, 1, 0])}, x="eps", eps=True).draw(axes)
        scales.append(axes.get_xscale())
    assert scales == ["linear", "symlog"]
