"""A training state that is split over the devices: the same numbers in a fraction of the memory."""

import pathlib
import sys

import hlo
import jax
import numpy as np
import pytest
import runs
from etils import epath
from jax.sharding import PartitionSpec

from vit_at import models
from vit_at.distributed import sharding
from vit_at.models import build
from vit_at.training.setup import initial_state
from vit_at.training.step import TrainState
from vit_at.workdir.checkpoint import Checkpoints

sys.path.append(str(pathlib.Path(__file__).parents[2] / "launch"))
from cost import FLOAT32, sent_bytes

OPTIONS = {"model__embed_dim": 16, "ema_decay": 0.75}


def start(kind: str, devices: int = 4, **changes):
    setup = runs.tiny_setup(devices, sharding=kind, **OPTIONS | changes)
    return setup, initial_state(setup, runs.optimizer_of(setup))


def two_steps(kind: str, **changes):
    """(metrics of two steps, the last state, the compiled step)."""
    setup, state = start(kind, **changes)
    host = list(runs.batches(setup, 2))
    batches = [sharding.split_batch(batch, setup.mesh) for batch in host]
    step, metrics = runs.compiled_step(setup, state, batches[0]), []
    for batch in batches:
        state, of_step = step(state, batch)
        metrics.append(jax.device_get(of_step).compute())
    return metrics, state, step


@pytest.fixture(scope="module", params=[runs.slow(1), 2])
def both(request):
    """{'replicated' and 'fsdp': ``two_steps``} with one or several micro-batches."""
    kinds = ("replicated", "fsdp")
    return {kind: two_steps(kind, accumulate_steps=request.param) for kind in kinds}


def bytes_on(device: jax.Device, tree) -> int:
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def assert_equal_training(both):
    """Metrics of each step, and the last states, agree."""
    for ours, theirs in zip(both["fsdp"][0], both["replicated"][0], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, err_msg=name)
    ours, theirs = (jax.device_get(both[kind][1]) for kind in ("fsdp", "replicated"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, theirs)


def test_losses_and_weights_equal_those_of_replicated_training(both):
    assert_equal_training(both)


@pytest.mark.slow
def test_muon_makes_matrices_orthogonal_that_are_split_over_the_devices():
    muon = {"optimizer__name": "muon", "optimizer__learning_rate": 0.001}
    kinds = ("replicated", "fsdp")
    assert_equal_training({kind: two_steps(kind, **muon) for kind in kinds})


def test_a_device_holds_about_a_quarter_of_the_state_before_and_after_a_step(both):
    total = sum(x.nbytes for x in jax.tree.leaves(both["fsdp"][1]))
    for state in (start("fsdp")[1], both["fsdp"][1]):
        for device in jax.devices()[:4]:
            assert total / 4 <= bytes_on(device, state) < 0.3 * total
    assert bytes_on(jax.devices()[0], both["replicated"][1]) == total


def test_parameters_are_gathered_outside_of_the_attacks_loop(both, request):
    """And outside of that over several micro-batches, which holds it."""
    program = both["fsdp"][2].as_text()
    several = request.node.callspec.params["both"] > 1
    body = hlo.loop_body(program, "/shard_map/while" if several else "/shard_map/jvp()/while")
    assert "all-gather" not in hlo.reachable(program, body)
    assert "all-gather" in program


def test_an_array_is_split_along_its_longest_dimension_that_the_devices_divide():
    mesh = sharding.make_mesh(jax.devices()[:4])

    def spec(*shape):
        return sharding.layout(jax.ShapeDtypeStruct(shape, np.float32), mesh, "fsdp").spec

    assert spec(2, 8, 32) == PartitionSpec(None, None, "data")
    assert spec(2, 32, 8) == PartitionSpec(None, "data")
    assert spec(16, 30) == PartitionSpec("data")
    assert spec(3, 5) == spec() == PartitionSpec()
    whole = sharding.layout(jax.ShapeDtypeStruct((4, 4), np.float32), mesh, "replicated")
    assert whole.spec == PartitionSpec()


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (4, 2)])
def test_a_checkpoint_is_restored_on_another_number_of_devices(tmp_path, before, after):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(8, 12)).astype(np.float32), "b": np.ones(3, np.float32)}
    host = TrainState(np.int32(3), params, {"m": params}, None)
    meshes = {n: sharding.make_mesh(jax.devices()[:n]) for n in (before, after)}
    for n, kind in ((before, "fsdp"), (after, "replicated"), (after, "fsdp")):
        checkpoints = Checkpoints(epath.Path(tmp_path), keep=2)
        state = sharding.distribute(host, meshes[n], kind)
        if n == before and checkpoints.last.latest_step() is None:
            checkpoints.last.save(3, state.trees, {"step": 3})
        step, restored, _ = checkpoints.restore(state.trees, meshes[n])
        checkpoints.close()
        assert step == 3
        trees = (restored, state.trees, host.trees)
        for ours, given, wanted in zip(*map(jax.tree.leaves, trees), strict=True):
            assert ours.sharding == given.sharding
            np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_the_compiled_step_sends_what_the_formula_says(both, kind):
    """The gradient once, whatever the micro-batches; and with fsdp the parameters, once."""
    _, state, step = both[kind]
    sent = hlo.collective_bytes(step.as_text())
    gradient = FLOAT32 * sum(x.size for x in jax.tree.leaves(state.params))
    scattered = 4 * sent.get("reduce-scatter", 0)
    assert gradient <= sent["all-reduce"] + scattered < 1.02 * gradient + 400  # and metrics
    leaves = jax.tree.leaves(both["fsdp"][1].params)
    split = sum(x.nbytes for x in leaves if not x.is_fully_replicated)
    assert scattered == sent.get("all-gather", 0) == (split if kind == "fsdp" else 0)
    # 2 (N-1)/N of what is reduced, (N-1)/N of what is scattered or gathered
    by_program = 0.75 * (2 * sent["all-reduce"] + scattered + sent.get("all-gather", 0))
    assert by_program == pytest.approx(sent_bytes(gradient // 4, 4), rel=0.05)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        runs.slow("deit_tiny_patch16_224", 4),
        runs.slow("convit_tiny", 12),
        # Deep: only the third stage has many blocks, and at 12 the first outweighs it.
        runs.slow("swin_tiny_patch4_window7_224", 24),
    ],
)
def test_blocks_that_are_computed_again_give_the_same_gradient_in_less_memory(name, depth):
    options = {"data__image_size": 32, "model__patch_size": 4, "model__embed_dim": 16}
    config = runs.smoke(model__name=name, model__depth=depth, **options)
    x = np.random.default_rng(0).normal(size=(8, 32, 32, 1)).astype(np.float32)
    found = []
    for remat in (False, True):
        with config.unlocked():
            config.model.remat = remat
        model = build(config, 3, "float32")
        params = models.init_params(model, jax.random.key(0))
        keep = np.arange(model.num_blocks) % 2 == 0

        def loss(params, model=model, keep=keep):
            return (model.apply({"params": params}, x, keep, train=True) ** 2).sum()

        lowered = jax.jit(jax.grad(loss)).lower(params)
        compiled = lowered.compile()
        found.append((compiled(params), compiled.memory_analysis().temp_size_in_bytes))
    (plain, memory), (again, less) = found
    assert less < 0.8 * memory
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, plain)
