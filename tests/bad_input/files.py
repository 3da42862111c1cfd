"""Files that are read back: JSON of a wrong shape, .npz files that are damaged or foreign."""

import copy
import io
import json
import os
import pickle

import numpy as np
from bad_input.case import Case
from etils import epath

from vit_at.attacks.autoattack.ledger import LEDGER_FILE, Ledger, Store
from vit_at.configs import digits_sgd
from vit_at.reporting import study_file
from vit_at.reporting.run import Run
from vit_at.workdir.exported import load_exported
from vit_at.workdir.results import Results

CONFIG = json.loads(json.dumps(digits_sgd.get_config("smoke").to_dict()))
PROTOCOL = {"data": "made test", "num_examples": 4, "seed": 0, "weights": {"digest": "d"}}
RECORD = {"attack": "clean", "accuracy": 0.5, "standard_error": 0.1, "protocol": PROTOCOL}
THREAT = {"norm": "linf", "eps": 0.1, "step_size": 0.02, "restarts": 1}
ATTACKED = RECORD | {"attack": "pgd-20", "protocol": PROTOCOL | THREAT}
MODEL = {"training": CONFIG, "checkpoint": {"step": 3}, "num_classes": 10}
MODEL |= {"weights": {"sha256": "0" * 64}}
ONE_RUN = {"name": "a", "config": {}, "records": [RECORD]}
STUDY = {"format": study_file.FORMAT, "config": CONFIG, "protocols": {"clean": {}}}
STUDY |= {"runs": [ONE_RUN]}

# {file: (what it holds when it is good, what reads it)}
READERS = {
    "config.json": (CONFIG, Run.read),
    "results.json": ([ATTACKED], lambda folder: Results(epath.Path(folder))),
    "model.json": (MODEL, load_exported),
    "study.json": (STUDY, lambda folder: study_file.read(epath.Path(folder / "study.json"))),
}


def case(name, says, content=None, make=None):
    """A case of one file; the other files of the folder are good."""

    def prepare(folder):
        if name in ("results.json", "metrics.jsonl"):
            (folder / "config.json").write_text(json.dumps(CONFIG))
        if make:
            make(folder / name)
        else:
            (folder / name).write_bytes(content)

    return Case(READERS[name][1] if name in READERS else Run.read, says, prepare)


# --- Contents that no JSON file may have ------------------------------------------------------


def broken(content):
    """{kind: (text, what is said)} for a file that should hold this content."""
    text = json.dumps(content)
    return {
        "nothing": (b"", "is not valid JSON"),
        "half of it": (text[: len(text) // 2].encode(), "is not valid JSON"),
        "a comma too many": (text[:-1].encode() + b"," + text[-1:].encode(), "is not valid JSON"),
        "a byte order mark": (b"\xef\xbb\xbf" + text.encode(), "BOM"),
        "UTF-16": (text.encode("utf-16"), "is not valid JSON"),
        "nesting": (b"[" * 10**5 + b"]" * 10**5, "is nested too deeply"),
        "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        "a name twice": (b'{"a": 1, "a": 2}', "'a' stands twice"),
        "null": (b"null", r"is (damaged \(the whole is null|no study file)"),
        "a number": (b"3", "is (damaged|no study file)"),
        "text": (b'"config"', "is (damaged|no study file)"),
    }


CASES = {
    f"{name} holding {kind}": case(name, rf"{name} {says}" if says[0] == "i" else says, text)
    for name, (content, _) in READERS.items()
    for kind, (text, says) in broken(content).items()
}
CASES |= {
    f"{kind} as {name}": case(name, "is missing, or not a regular file|no is|is missing", make=make)
    for name in READERS
    for kind, make in (("a pipe", os.mkfifo), ("a folder", lambda path: path.mkdir()))
}


# --- JSON of a wrong shape --------------------------------------------------------------------

MISSING = object()


def changed(content, place, value):
    """A copy with another value at a place such as ('model', 'depth')."""
    content = copy.deepcopy(content)
    *groups, last = place
    inner = content
    for group in groups:
        inner = inner[group]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return content


SHAPES = {
    "config.json": [
        (["model"], 3, r"model is 3: expected `object`, got `int`"),
        (["model"], MISSING, r"missing required field `model`"),
        (["model", "depth"], "many", r"model.depth is \"many\""),
        (["model", "depth"], 1.5, r"model.depth is 1.5"),
        (["model", "remat"], 1, r"model.remat is 1"),
        (["threat", "eps"], float("nan"), "NaN is no number"),
        (["threat", "eps"], float("inf"), "Infinity is no number"),
        (["threat", "eps"], None, "threat.eps is null"),
        (["threat"], [], "threat is"),
        (["data", "mean"], 0.5, "data.mean is 0.5"),
        (["data", "mean"], ["a"], r"data.mean\[0\] is \"a\""),
        (["seed"], True, "seed is true"),
        (["optimizer", "learning_rate"], MISSING, "`learning_rate`"),
        (["eval", "attacks"], ["clean"], r"eval.attacks is \[\"clean\"\]"),
    ],
    "results.json": [
        ([0], [], r"\[0\] is \[\]"),
        ([0, "accuracy"], 1.5, r"\[0\].accuracy is 1.5: expected `float` <= 1.0"),
        ([0, "accuracy"], -0.1, r"\[0\].accuracy is -0.1"),
        ([0, "accuracy"], float("nan"), "NaN is no number"),
        ([0, "accuracy"], "0.5", r"\[0\].accuracy is \"0.5\""),
        ([0, "accuracy"], MISSING, "`accuracy`"),
        ([0, "attack"], 20, r"\[0\].attack is 20"),
        ([0, "standard_error"], MISSING, "`standard_error`"),
        ([0, "protocol"], None, r"\[0\].protocol is null"),
        ([0, "protocol", "eps"], MISSING, r"\[0\].protocol is .*`eps`"),
        ([0, "protocol", "eps"], -1, r"\[0\].protocol.eps is -1"),
        ([0, "protocol", "seed"], MISSING, "`seed`"),
        ([0, "protocol", "restarts"], MISSING, "`restarts`"),
        ([0, "protocol", "num_examples"], -4, r"num_examples is -4"),
        ([0, "protocol", "num_examples"], 10**30, r"num_examples is 10000"),
        ([0, "protocol", "weights"], {}, "`digest`"),
        ([0, "protocol", "weights"], "d", r"\[0\].protocol.weights is \"d\""),
        ([0, "cascade"], {"clean": 2}, r"\[0\].cascade"),
    ],
    "model.json": [
        (["training"], MISSING, "no 'training' and 'checkpoint'"),
        (["training"], [], r"training is \[\]"),
        (["training", "model"], 3, "training.model is 3"),
        (["training", "threat", "steps"], "10", r"training.threat.steps is \"10\""),
        (["training", "threat", "eps"], 1e999, "Infinity is no number"),
        (["checkpoint"], 3, "checkpoint is 3"),
        (["checkpoint"], {}, "`step`"),
        (["num_classes"], 0, "num_classes is 0"),
        (["num_classes"], 10**12, "num_classes is 1000000000000"),
        (["num_classes"], MISSING, "`num_classes`"),
        (["weights"], "model.safetensors", "weights is"),
        (["weights"], MISSING, "`weights`"),
        (["training", "model", "depth"], -1, "model.depth is -1"),
    ],
    "study.json": [
        (["format"], "vit_at study 2", "is no study file"),
        (["runs"], [], "runs is .*length >= 1"),
        (["runs"], {}, "runs is"),
        (["runs", 0, "name"], MISSING, "`name`"),
        (["runs", 0, "records"], None, r"runs\[0\].records is null"),
        (["runs", 0, "records", 0, "accuracy"], 50, r"runs\[0\].records\[0\].accuracy is 50"),
        (["runs", 0, "records", 0, "attack"], "pgd", "'pgd'"),
        (["runs", 0, "curves"], {"loss": [[1.0], [1.0], [1.0]]}, "curves"),
        (["runs", 0, "curves"], {"loss": [[1.0], []]}, "the curve loss"),
        (["runs", 0, "config"], {"model.depth.more": 1}, "is a damaged study file"),
        (["protocols"], [], "protocols is"),
        (["protocols", "clean"], 3, "protocols"),
        (["config"], {}, "missing required field"),
    ],
}
CASES |= {
    f"{name}: {'.'.join(map(str, place))} {'missing' if value is MISSING else f'= {value}'}": case(
        name, says, json.dumps(changed(READERS[name][0], place, value)).encode()
    )
    for name, shapes in SHAPES.items()
    for place, value, says in shapes
}
CASES |= {
    f"metrics.jsonl whose line is {line}": case("metrics.jsonl", says, f"{line}\n".encode())
    for line, says in [
        ("[]", "line 1 is"),
        ("null", "line 1 is null"),
        ('{"loss": 1.0}', "line 1 has no step"),
        ('{"step": 0, "epoch": 1}', "line 1 has no step"),
        ('{"step": 1, "loss": "low"}', r"line 1\[...\] is"),
    ]
}


# --- npz --------------------------------------------------------------------------------------

INDEX, CORRECT = np.arange(4), np.ones(4, bool)
OUTCOMES = {"d/clean/index": INDEX, "d/clean/correct": CORRECT}


class Malicious:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


def npz(arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def claiming(shape):
    """An array file whose header claims a shape, and that holds nothing more."""
    content = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def zipped(name, content):
    import zipfile

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(name, content)
    return archive.getvalue()


def no_numpy_array(text):
    content = io.BytesIO()
    np.save(content, INDEX)
    return content.getvalue() if text is None else text


def flipped(content):
    middle = len(content) // 4
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


GOOD = npz(OUTCOMES)
NO_ARCHIVES = {
    "nothing": b"",
    "half of it": GOOD[: len(GOOD) // 2],
    "a flipped byte": flipped(GOOD),
    "text": b"not an archive",
    "a single array": no_numpy_array(None),
    "a pickle": pickle.dumps(Malicious()),
    "Python objects": npz({"d/index": np.array([Malicious()], object), "d/correct": CORRECT}),
    "a huge array": zipped("d/index.npy", claiming((10**15,))),
    "an array cut short": zipped("d/index.npy", claiming((4,))),
}
WRONG_ARRAYS = {
    "foreign arrays": ({"weights": INDEX}, "no array '/index'"),
    "half a pair": ({"d/index": INDEX}, "no array 'd/correct'"),
    "numbers for outcomes": (
        {"d/index": INDEX, "d/correct": INDEX},
        r"int64\[4\], and must be bool",
    ),
    "shares for places": ({"d/index": INDEX / 2, "d/correct": CORRECT}, "float64"),
    "two lengths": (
        {"d/index": INDEX, "d/correct": CORRECT[:3]},
        r"bool\[3\], and must be bool\[4\]",
    ),
    "a matrix of places": ({"d/index": INDEX[None], "d/correct": CORRECT}, r"int64\[1, 4\]"),
    "a single number": ({"d/index": np.array(3), "d/correct": CORRECT}, r"int64\[\]"),
}


def outcomes(content=None, make=None):
    def prepare(folder):
        path = folder / "per_example.npz"
        make(path) if make else path.write_bytes(content)

    return prepare


ADVICE = ".*; move it away and run the same command again: results.json keeps the accuracies"
CASES |= {
    f"per_example.npz holding {kind}": Case(
        READERS["results.json"][1], f"can't be read as an .npz file{ADVICE}", outcomes(content)
    )
    for kind, content in NO_ARCHIVES.items()
}
CASES |= {
    f"per_example.npz with {kind}": Case(
        READERS["results.json"][1], f"{says}.*{ADVICE}", outcomes(npz(arrays))
    )
    for kind, (arrays, says) in WRONG_ARRAYS.items()
}
CASES["a pipe as per_example.npz"] = Case(
    READERS["results.json"][1], "not a regular file", outcomes(make=os.mkfifo)
)

LOGITS = np.zeros((4, 3), np.float32)


def load_ledger(folder):
    """Resumes an evaluation of 4 images by one attack."""
    Store(epath.Path(folder), {"eps": 0.1}, LOGITS).load(Ledger(("apgd-ce",), 4))


def ledger(content=None, **changes):
    """Writes a ledger with one file of adversarial images, with other arrays or another content."""

    def prepare(folder):
        whole = Ledger(("apgd-ce",), 4)
        whole.clean[:] = True
        whole.found[1] = np.zeros((2, 2, 1), np.float32)
        Store(epath.Path(folder), {"eps": 0.1}, LOGITS).save(whole)
        for path in folder.glob("*.npz"):
            arrays = dict(np.load(path))
            own = {k: v for k, v in changes.items() if k in arrays or path.name == LEDGER_FILE}
            own = {k: v for k, v in own.items() if k not in ("index", "image") or k in arrays}
            kept = {k: v for k, v in (arrays | own).items() if v is not MISSING}
            path.write_bytes(npz(kept))
        if content is not None:
            (folder / LEDGER_FILE).write_bytes(content)

    return prepare


LEDGERS = {
    "no archive": (ledger(b"text"), "can't be read as an .npz file"),
    "another archive": (ledger(GOOD), "no array 'protocol'"),
    "no logits": (ledger(logits=MISSING), "no array 'logits'"),
    "a protocol that is no JSON": (ledger(protocol=np.array("{")), "is not valid JSON"),
    "a protocol that is a list": (
        ledger(protocol=np.array("[]")),
        "expected `object`, got `array`",
    ),
    "a protocol that is a number": (ledger(protocol=np.array(3)), "must be text"),
    "a protocol of another eps": (ledger(protocol=np.array('{"eps": 1}')), "another evaluation"),
    "logits of another model": (ledger(logits=LOGITS + 1), "it is of another model"),
    "outcomes of other images": (ledger(clean=np.ones(5, bool)), r"'clean' is bool\[5\]"),
    "outcomes as numbers": (ledger(clean=np.ones(4)), r"'clean' is float64\[4\]"),
    "an unknown outcome": (ledger(outcome=np.full((4, 1), 7, np.int8)), "out of range"),
    "no stage": (ledger(stage=MISSING), "no array 'stage'"),
    "a later stage": (ledger(stage=np.array(9)), "out of range"),
    "work that is no object": (ledger(work=np.array("null")), "expected `object`, got `null`"),
    "work in words": (ledger(work=np.array('{"a": {"steps": "3"}}')), "expected `int`, got `str`"),
    "more files than there are": (ledger(files=np.array(2)), "adversarial_00001.npz is missing"),
    "half a run in progress": (
        ledger(**{"progress/image": INDEX, "slots": np.array([0, 1])}),
        "no array 'progress/run'",
    ),
    "no word of its slots": (ledger(slots=MISSING), "no array 'slots'"),
    "an adversarial image of no image": (ledger(index=np.array([9])), "out of range"),
    "adversarial images without places": (ledger(index=MISSING), "no array 'index'"),
    "flat adversarial images": (ledger(image=np.zeros((1, 4), np.float32)), r"float32\[1, 4\]"),
}
CASES |= {
    f"a ledger with {kind}": Case(load_ledger, says, prepare)
    for kind, (prepare, says) in LEDGERS.items()
}
