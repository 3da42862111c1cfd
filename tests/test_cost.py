"""Costs on paper: counted by hand, and read off a program's text."""

import json
import pathlib
import sys

import hlo
import pytest

from vit_at.configs import cifar10_sgd, digits_sgd, imagenet_vit_b
from vit_at.errors import UserError
from vit_at.reporting.list_recipes import Cost, cost_of

sys.path.append(str(pathlib.Path(__file__).parents[1] / "launch"))
import cost

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"

HLO = """
%body (p: f32[10,4]) -> f32[10,4] {
  %all-reduce.1 = f32[10,4]{1,0} all-reduce(f32[10,4]{1,0} %a), channel_id=1
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %all-reduce.2 = (f32[], /*index=1*/bf16[3]{0}) all-reduce(f32[] %b, bf16[3]{0} %c), to_apply=%add
  %while.1 = (f32[2]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %all-gather.7 = f32[8]{0} all-gather(f32[2]{0} %d), dimensions={0}
  %add.1 = f32[8]{0} add(f32[8]{0} %all-reduce.1, f32[8]{0} %all-gather.7)
}
"""  # noqa: E501


def test_collectives_are_counted_by_their_results_and_loops():
    assert hlo.collective_bytes(HLO) == {"all-reduce": 3 * 160 + 4 + 6, "all-gather": 32}


def test_imagenets_cost_is_that_counted_by_hand():
    config = imagenet_vit_b.get_config()
    training = cost_of(config)
    assert training.parameters == 86_567_656  # timm's vit_base_patch16_224
    assert training.steps == 10 * (1_271_167 // 512)
    unread = 196 * (12 * 768**2 + 2 * 197 * 768)  # of the last block, patches
    forward = 2 * (17.56e9 - unread)  # 17.56 G multiply-adds in the paper
    assert training.step_flops == pytest.approx(512 * (2 * 5 + 3) * forward, rel=0.01)
    autoattack = 1 + 0.3 * (2 * 100 + 2 * 9 * 100 + 3 * 9 * 100 + 5000)
    passes = 5_000 * (1 + 41 + 41 + 201 + autoattack) + 10 * 10_000 * (1 + 11)
    operations = cost.evaluation_flops(config, training.forward_flops, robust=0.3)
    assert operations == pytest.approx(6 * passes * forward, rel=0.01)


def test_autoattacks_passes_are_those_that_were_counted():
    """337,028 forward and 83,285 backward passes for 256 images, 43 of which withstand all."""
    record = json.loads((RESULTS / "autoattack_cpu2.json").read_text())["ours"]
    counts = record["model_evaluations"].values()
    passes = sum(attack["forward"] + attack["backward"] for attack in counts)
    config = cifar10_sgd.get_config()
    config.unlock().eval.num_examples, config.eval.every_epochs = 256, 0
    config.eval.attacks = "autoattack"
    robust = record["robust"]["square"] / 256
    assert cost.evaluation_flops(config, 1.0, robust) == pytest.approx(6 * passes, rel=0.01)


def test_bytes_and_efficiency():
    assert cost.sent_bytes(100, 4) == 2 * 0.75 * 400
    assert cost.sent_bytes(100, 1) == 0
    chip = cost.Chip(flops=100.0, link=10.0, torus=4)
    training = Cost(parameters=10, steps=1, forward_flops=0.0, step_flops=8000.0)
    # compute 8000 / (4 * 0.5 * 100) = 40 s; 60 bytes at 10 a second: 6 s
    assert cost.efficiency(training, 4, chip, utilisation=0.5) == pytest.approx(40 / 46)
    assert chip.bandwidth(2) == 5.0


def test_the_report_names_batches_that_do_not_divide(capsys):
    assert cost.main(["configs/digits_sgd.py:smoke", "--chip=v6e"]) == 0
    assert "64  the batch of 32 does not divide" in capsys.readouterr().out
    config = digits_sgd.get_config()
    with config.unlocked():
        config.data.name = "folder:somewhere"
    with pytest.raises(UserError, match="size of data set 'folder:somewhere' is not known"):
        cost_of(config)
    with pytest.raises(UserError, match="test images folder:somewhere has is not known; give"):
        cost.evaluation_flops(config, 1.0, 0.5)
