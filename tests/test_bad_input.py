"""Bad input by the hundred: each ends in one sentence, nothing is half-written, nothing hangs."""

import contextlib
import importlib
import io
import pathlib
import re
import signal
import stat

import pytest
from bad_input.case import Case

from vit_at import cli
from vit_at.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
TABLES = pathlib.Path(__file__).parent / "bad_input"
SECONDS = 60  # a case that takes longer hangs


def tables() -> dict[str, dict[str, Case]]:
    """{category: its cases}."""
    names = sorted(path.stem for path in TABLES.glob("*.py") if path.stem != "case")
    return {name: importlib.import_module(f"bad_input.{name}").CASES for name in names}


def parameters():
    """A pytest parameter for each case."""
    for category, cases in tables().items():
        for name, case in cases.items():
            marks = [pytest.mark.slow] if case.slow else []
            yield pytest.param(case, id=f"{category}: {name}", marks=marks)


@pytest.mark.parametrize("case", list(parameters()))
def test_a_bad_input_is_one_sentence_and_leaves_everything_as_it_was(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if case.prepare:
        case.prepare(tmp_path)
    before = contents(tmp_path)
    with no_hang():
        if callable(case.deed):
            with pytest.raises(UserError) as refusal:
                case.deed(tmp_path)
            said = [str(refusal.value)]
        else:
            status, said = run(case.deed)
            assert status == case.status, said
    assert len(said) == 1
    assert "\n" not in said[0]
    assert re.search(case.says, said[0]), said[0]
    assert contents(tmp_path) == before
    if case.corrected:
        assert run(case.corrected) == (0, [])


def run(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit status and errors of ``vit-at`` with these arguments, in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main(arguments)
        except SystemExit as ended:
            status = ended.code
    lines = errors.getvalue().splitlines()
    assert "Traceback (most recent call last):" not in lines
    return status, [line for line in lines if line.startswith("error:")]


def contents(folder: pathlib.Path) -> dict[str, object]:
    """Every file below a folder, with what is in it; links and devices by their kind only."""

    def content(path):
        mode = path.lstat().st_mode
        return path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)

    return {str(path): content(path) for path in folder.rglob("*") if path.suffix != ".lock"}


@contextlib.contextmanager
def no_hang():
    """Fails the test after SECONDS."""

    def fail(*_):
        pytest.fail(f"it went on for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_table_of_the_docs_counts_every_case():
    counts = {name: len(cases) for name, cases in tables().items()}
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\w+) \| .* \| (\d+) \|$", page, re.MULTILINE)
    assert {name: int(count) for name, count in rows} == counts | {"all": sum(counts.values())}
