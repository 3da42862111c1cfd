"""The programs of accelerators that are not there, and the tool that reads them."""

import argparse
import json
import pathlib
import subprocess
import sys
import types

import compiled
import hlo
import jax
import lowered
import pytest
import targets

from vit_at.distributed import sharding

PROGRAM = """
%fused (stack: bf16[8,4,16], row: bf16[4,16], i: s32[]) -> bf16[8,4,16] {
  %stack = bf16[8,4,16]{2,1,0} parameter(0)
  %row = bf16[4,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %row.1 = bf16[1,4,16]{2,1,0} bitcast(%row)
  ROOT %update = bf16[8,4,16]{2,1,0} dynamic-update-slice(%stack, %row.1, %i)
}

%condition (t: (s32[], bf16[8,4,16])) -> pred[] {
  %count = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %count), direction=LT
}

%body (t: (s32[], bf16[8,4,16])) -> (s32[], bf16[8,4,16]) {
  %stack.2 = bf16[8,4,16]{2,1,0} get-tuple-element(%t), index=1
  %row.2 = bf16[4,16]{1,0} get-tuple-element(%t), index=2
  %i.2 = s32[] get-tuple-element(%t), index=0
  %fusion.2 = bf16[8,4,16]{2,1,0} fusion(%stack.2, %row.2, %i.2), kind=kLoop, calls=%fused, metadata={op_name="step/Block/mlp/gelu"}
  %sum = f32[16]{0} all-reduce(%x), to_apply=%add
  ROOT %tuple = (s32[], bf16[8,4,16]{2,1,0}) tuple(%i.2, %fusion.2)
}

ENTRY %main (a: bf16[4,16]) -> bf16[4,8] {
  %a = bf16[4,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %product = (bf16[4,8]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}, metadata={op_name="step/Block/attn/qkv"}
  %while.1 = (s32[], bf16[8,4,16]{2,1,0}) while(%t), condition=%condition, body=%body, metadata={op_name="step/while"}
  ROOT %result = bf16[4,8]{1,0} get-tuple-element(%product), index=0
}
"""  # noqa: E501


def test_a_program_is_read_as_counted_by_hand():
    """A product without its scratch memory, and eight rows written into a stack in place."""
    found = compiled.summary(PROGRAM, targets.CHIPS["h200"])
    product, row = 2 * (4 * 16 + 16 * 8 + 4 * 8), 2 * 2 * 4 * 16 + 4
    assert found["parts"]["attention"]["bytes"] == product
    assert found["parts"]["MLP"] == found["kinds"]["stack"]
    assert found["kinds"]["stack"]["bytes"] == 8 * row
    assert found["products"] == {"bf16 [4,16] x [16,8]": 1}
    assert found["collectives"] == {"all-reduce": [8, 8 * 64]}
    assert found["collectives_in_loops"] == 8
    assert found["kernels"] == 1 + 8 + 8
    assert found["loop_trips"] == [8]


def test_a_kernel_of_our_own_takes_the_seconds_of_its_schedule(monkeypatch):
    """Of a TPU's program, where nothing else here has an estimate."""
    text = PROGRAM.replace("%product = (bf16[4,8]", "%attention_forward.3 = (bf16[4,8]")
    text = text.replace("(%product)", "(%attention_forward.3)")
    found = compiled.summary(text, targets.CHIPS["v5e"], {"attention_forward": 2e-6})
    assert found["parts"]["attention"]["seconds"] == found["estimated_s"] == 2e-6
    assert found["kernels"] == 1

    asked = []
    monkeypatch.setattr(compiled.schedule, "seconds", lambda *a: asked.append(a) or {"x": 1.0})
    model = types.SimpleNamespace(num_heads=3)
    assert compiled._kernel_seconds(text, "tpu:v5e:2x2", model) == {}
    text += "  %attention_forward.4 = bf16[65,256,192]{2,1,0:T(8,128)} custom-call(%qkv)\n"
    assert compiled._kernel_seconds(text, "tpu:v5e:2x2", model) == {"x": 1.0}
    assert asked == [("tpu:v5e:2x2", 65, 256, 192, 3)]


def test_a_known_trip_count_and_the_longest_branch_count():
    text = PROGRAM.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    )
    text = text.replace(
        "ROOT %result",
        "%if = f32[2] conditional(%p), branch_computations={%one, %body}\n  ROOT %result",
    )
    text += "\n%one (x: f32[2]) -> f32[2] {\n  ROOT %copy.1 = f32[2]{0} copy(%x)\n}\n"
    times = {}
    for _, i, count, _ in hlo.Program(text).runs():
        times[i.name] = times.get(i.name, 0) + count
    assert times["fusion.2"] == 3 + 1
    assert "copy.1" not in times


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tpu:v9:2x2", "--target is 'tpu:v9:2x2'; use one of tpu:v5e, tpu:v6e, cuda:h200"),
        ("cuda:v5e", "use one of"),
        ("tpu:v5e:8", "a topology of v5e looks like 2x2"),
        ("cuda:h200:2x2", "a topology of h200 looks like 8"),
    ],
)
def test_an_unknown_target_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        targets.Target.of(text)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--depht=2", "unknown option --depht=2"),
        ("--model=deit_tiny_patch16_224", "write NAME@SIZE/PATCH"),
        ("--target=tpu:v6e", "a v6e needs libtpu: pip install -e '.[tpu]'"),
    ],
)
def test_a_bad_option_is_refused(word, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compiled.py", word])
    found = (lambda name: None) if "v6e" in word else (lambda name: name)
    monkeypatch.setattr(targets.importlib.util, "find_spec", found)
    with pytest.raises(SystemExit):
        compiled._parse_arguments()
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("program", compiled.PROGRAMS)
def test_every_program_of_a_recipe_can_be_lowered_on_shapes_alone(program):
    shape = {"model": "deit_tiny_patch16_224", "image_size": 8, "patch_size": 2}
    options = argparse.Namespace(program=program, recipe="digits_sgd", shape=shape, classes=10)
    options.depth, options.batch_per_device, options.attack = 2, 4, ""
    mesh = sharding.make_mesh(jax.devices()[:2])
    setup = lowered.make_setup(options, ["--config.model.embed_dim=24"], mesh)
    assert setup.config.batch_size == 8
    assert "stablehlo.while" in getattr(lowered, program)(setup, options).as_text()
    assert lowered.needed_flop(setup, options) > 1e6


def test_the_title_names_the_model_of_the_recipe_and_the_attack_that_is_asked_for():
    options = argparse.Namespace(program="evaluate", recipe="cifar10_small:scratch", shape={})
    options.classes, options.depth, options.batch_per_device, options.attack = 10, 0, 4, "pgd-3"
    setup = lowered.make_setup(options, [], sharding.make_mesh(jax.devices()[:1]))
    title = lowered.title(setup, options)
    assert title == "evaluate: convit_tiny 32/4 depth 5 b4 pgd-3 float32"


def report(tmp_path, target, *options):
    """The tool's JSON for a shallow AT step in bfloat16; a process of its own, as JAX is here."""
    out, tool = tmp_path / "report.json", pathlib.Path(compiled.__file__)
    options = (f"--target={target}", "--depth=2", "--batch_per_device=64", f"--out={out}", *options)
    done = subprocess.run([sys.executable, tool, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def check(found, kernels, size):
    """No product in float32 but the head's, no loop over images, no collective in the attack."""
    wide = [product for product in found["products"] if product.startswith("f32")]
    assert all(",10]" in product for product in wide)
    assert max(found["loop_trips"]) == 10  # the attack's steps
    assert found["collectives"]["all-reduce"][0] == 1
    assert found["collectives_in_loops"] == 0
    assert found["kernels"] < kernels
    assert found["bytes"] < size


@pytest.mark.slow
def test_a_shallow_step_for_a_tpu_slice(tmp_path):
    pytest.importorskip("libtpu", reason="needs the extra [tpu]")
    found = report(tmp_path, "tpu:v5e:2x2")
    check(found, kernels=1300, size=2e9)
    assert found["kinds"]["custom-call"]["kernels"] == 2 * 11  # attention and its gradient
    seconds = found["kernel_s"]
    assert seconds["attention_backward"] > seconds["attention_forward"] > 0
    kernels = found["kinds"]["custom-call"]["seconds"]
    assert kernels == pytest.approx(11 * sum(seconds.values()), rel=0.01)


@pytest.mark.slow
def test_a_shallow_step_for_two_gpus(tmp_path):
    pytest.importorskip("jax_cuda12_plugin", reason="needs the extra [cuda12]")
    found = report(tmp_path, "cuda:h200:2")
    check(found, kernels=1250, size=2.7e9)
    assert found["kinds"]["custom-call"]["kernels"] == 2 * 11  # attention and its gradient
