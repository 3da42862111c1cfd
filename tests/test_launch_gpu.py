"""The pieces that run on a lent GPU: which benchmarks and trainings they start, and their limit."""

import re

import pytest
from test_launch import LAUNCH, said, stand_in

PYTHON = """
echo "$@" >> "$LOG"
if [ "${SLEEP:-}" ]; then exec sleep "$SLEEP"; fi
"""


def gpu_piece(piece, tmp_path, status=0, **environment) -> list[str]:
    stand_in(tmp_path, "python", PYTHON)
    log = tmp_path / "log"
    environment |= {"PYTHON": str(tmp_path / "python"), "LOG": str(log), "DATA_DIR": "/data"}
    said(LAUNCH / "gpu_benchmark.sh", piece, tmp_path / "out", status=status, **environment)
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    ("piece", "files"),
    [
        ("tiny", ["step_tiny_small_batch", "step_tiny"]),
        ("small", ["step_small"]),
        ("base", ["step_base"]),
        ("attention", ["attention_tiny", "attention_base"]),
        ("flags", ["flags"]),
        ("precision", ["precision"]),
    ],
)
def test_a_piece_on_a_gpu_writes_a_file_for_each_of_its_benchmarks(piece, files, tmp_path):
    calls = gpu_piece(piece, tmp_path)
    for call, file in zip(calls, files, strict=True):
        assert call.startswith("benchmarks/")
        assert call.endswith(f"--out {tmp_path}/out/{file}.json")


def test_a_piece_on_a_gpu_ends_in_time_and_says_so(tmp_path):
    calls = gpu_piece("tiny", tmp_path, status=1, LIMIT="1", SLEEP="60")
    assert len(calls) == 1  # nothing is started once the time is over
    assert "at its time limit" in (tmp_path / "out/step_tiny.txt").read_text()


def test_a_gpu_trains_on_the_data_that_it_is_given(tmp_path):
    natural, *adversarial = gpu_piece("train", tmp_path)
    for call in (natural, *adversarial):
        assert "vit_at.main" in call
        assert "--config.data.dir=/data" in call
    (started,) = re.findall("--workdir=(runs/[^ ]+)", natural)
    assert "cifar10_pretrain" in natural
    assert len(adversarial) == 2
    assert all(call.endswith(f"--config.model.pretrained={started}") for call in adversarial)


def test_an_unknown_piece_is_refused():
    said(LAUNCH / "gpu_benchmark.sh", "scaling", "/tmp", status=2)
