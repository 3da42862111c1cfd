"""The benchmarks: what a step needs at least, and what is kept when one is ended early."""

import dataclasses
import json
import sys

import common
import costs
import hlo
import jax
import jax.numpy as jnp
import limits
import ours
import pytest
import step
import tables
import traced
import variants

from vit_at.training import metrics


@pytest.mark.parametrize(
    ("objective", "passes"), [("at", (10, 1)), ("trades", (10, 2)), ("mart", (10, 2))]
)
def test_a_step_needs_its_attack_and_one_training_pass_for_each_kind_of_image(objective, passes):
    case = common.Case(objective=objective, depth=2)
    attack_steps, training_passes = passes
    model = ours.models.build(ours.configuration(case), 10, "float32")
    attention = 2 * model.multiply_adds()[1]
    linear = model.forward_flops() - attention
    needed = attack_steps * (2 * linear + 3 * attention)
    needed += training_passes * 3 * (linear + attention)
    assert limits.case_flops(case, ours.configuration(case)) == case.batch * needed


def test_the_result_is_written_after_each_case(tmp_path, monkeypatch):
    path, seen = tmp_path / "result.json", []

    def measure(case, options, with_torch):
        seen.append(json.loads(path.read_text())["cases"] if path.exists() else None)
        return {"title": case.title}

    monkeypatch.setattr(step, "_measure", measure)
    words = ["--batch=4,8", "--against=", f"--out={path}"]
    monkeypatch.setattr(sys, "argv", ["step.py", *words])
    step.main()
    titles = [case["title"] for case in json.loads(path.read_text())["cases"]]
    assert seen == [None, [{"title": titles[0]}]]
    assert ["b4 at-10" in titles[0], "b8 at-10" in titles[1]] == [True, True]


def test_a_way_of_pytorch_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "--against=eager,jit"])
    with pytest.raises(SystemExit):
        step.main()
    assert "--against is 'eager,jit'; choose of eager, compiled, graphs" in capsys.readouterr().err


def test_each_method_changes_the_step_and_costs_what_its_passes_say():
    base = common.Case(steps=2, depth=2)
    made = {name: ours.configuration(base, changes) for name, changes in costs.METHODS.items()}
    passes = {name: metrics.step_flops(config, 1.0) / 64 for name, config in made.items()}
    assert passes["none"] == passes["EMA"] == 7
    assert [passes[name] for name in ("N-FGSM", "APGD-2", "AWP")] == [5, 8, 10]
    assert len({str(config) for config in made.values()}) == len(made)


def test_a_trace_counts_the_kernels_of_a_step_by_part():
    def blocks(x, kernel):
        with jax.named_scope("mlp"):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ kernel), x)

    x = jnp.eye(64)
    program = jax.jit(blocks).lower(x, x).compile()
    kernels = traced.profiled(lambda: jax.block_until_ready(program(x, x)), steps=2)
    times = {name: traced.Time(count, seconds) for name, (count, seconds) in kernels.items()}
    found = traced.summary(hlo.Program(program.as_text()), times)
    products = found["kinds"]["product f32"]
    assert products["kernels"] == 6 / jax.device_count()  # 3 trips, 2 steps
    assert products["bytes"] == products["kernels"] * 3 * 64 * 64 * 4
    assert found["parts"]["MLP"]["seconds"] >= products["seconds"] > 0
    assert found["seconds"] == pytest.approx(sum(p["seconds"] for p in found["parts"].values()))


def test_attention_and_options_of_xla_change_one_thing_each():
    case = common.Case()
    plain = dataclasses.replace(case, plain_attention=True)
    assert list(variants.variants("attention", case).values()) == [(case, {}), (plain, {})]
    flags = [env["XLA_FLAGS"] for _, env in variants.variants("flags", case).values()]
    assert len(set(flags)) == len(flags) == len(variants.FLAGS)
    assert all(text == text.strip() for text in flags)  # XLA takes a space for a file's name


def test_the_tables_of_the_pages_are_those_of_the_files():
    pages = [page.read_text() for page in tables.PAGES]
    assert [tables.filled(page) for page in pages] == pages
    assert [page.count("<!-- ") for page in pages] == [3, 1]
