"""Every message in data/README.md's "When something goes wrong" is produced here.

Each case is filed under its message as the table has it (`...` stands for anything). Two checks
close the circle: the table lists exactly these messages, and every place of its modules that
refuses or warns was reached by one of them and is described by the table.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import errno
import gzip
import importlib.util
import io
import json
import os
import re
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer, Repository
from test_fineweb import FOLDER, NAME, shard
from test_prepare import ROOT, VOCAB, edit_token, model_bytes, words

from data import prepare

import caseops  # isort: skip
import docstrings  # isort: skip
import documents  # isort: skip
import shards  # isort: skip

SOURCE = ROOT / "data" / "prepare.py"
MODULES = [
    ROOT / "data" / f"{name}.py" for name in ("prepare", "shards", "documents", "docstrings", "hub")
]
REPORTERS = ("BadInput", "Failure", "Fault", "NotPublished", "ArgumentTypeError", "warn")
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
README = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", README.partition("goes wrong")[2], re.MULTILINE)

# Files and lines that made a report which a case printed.
reached: set[tuple[str, int]] = set()


class Place:
    """A folder for one case, with a tokenizer, a text and the means to run prepare.py."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capsys) -> None:
        self.folder, self.patch, self.capsys = folder, patch, capsys
        self.out, self.model = folder / "out", folder / "given.model"
        self.model.write_bytes(model_bytes())
        self.data = self.out / f"datasets/t_sp{VOCAB}"
        self.good = self.write("t.jsonl", *({"text": f"text {i}"} for i in range(9)))

    def write(self, name: str, *lines: object) -> Path:
        """Write a file: bytes as they are, other objects as lines of JSON."""
        path = self.folder / name
        content = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
        path.write_bytes(b"\n".join(content))
        return path

    def run(self, *argv: object) -> str:
        """Run a command line; return the one line of its stderr."""
        self.capsys.readouterr()
        out = [] if argv[0] == "adopt" else ["--out", self.out]
        status = prepare.main([str(x) for x in (*argv, *out)])
        stderr = self.capsys.readouterr().err
        *named, stderr = stderr.splitlines(keepends=True)
        assert all(line.startswith("bad document: ") for line in named) and stderr.endswith("\n")
        expected = {"warning": (0,), "error": (1, 2, 130)}[stderr.partition(":")[0]]
        assert status in expected, stderr
        return stderr[:-1]

    def text(self, path: Path | None = None, *more: object) -> str:
        """Prepare a text with the given tokenizer."""
        return self.run("text", path or self.good, "--tokenizer", self.model, *more)

    def built(self) -> Place:
        """Have the good text prepared."""
        argv = ["text", self.good, "--tokenizer", self.model, "--out", self.out]
        assert prepare.main([str(x) for x in argv]) == 0
        return self


OURS = {"byte_fallback": True, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}

# Your text: file name, content

TEXTS = {
    "...: expected a file ending in ...": ("a.png", b"x"),
    "...: damaged or cut short (...)": ("a.txt.gz", gzip.compress(b"text" * 99)[:-9]),
    "...: not UTF-8 at byte ...": ("a.txt", b"caf\xe9"),
    "a NUL character, ... (line ..., column ... of the document)": ("a.txt", b"a\0bcd"),
    "a literal U+2581, ... (line ..., column ... of the document)": ("a.txt", "\u2581".encode()),
    "half of a surrogate pair, ... (line ..., column ... of the document)": (
        "a.jsonl",
        b'{"text": "\\ud800"}',
    ),
    "...: not JSON (...)": ("a.jsonl", b"text"),
    '...: expected {"...": "..."}, got ...': ("a.jsonl", b'{"body": "a"}'),
    '...: "text" is not a string': ("a.jsonl", b'{"text": 5}'),
    "the input holds no document with any text": ("a.txt", b""),
    "... document(s) and none left for training": ("a.jsonl", b'{"text": "a"}'),
    "... documents cannot be used": ("a.jsonl", b"5\n5"),
    "...: not JSON (value ...)": ("a.json", b'[{"text": "a"}, nope]'),
    "...: not JSON (more text after the closing bracket)": ("a.json", b"[] 5"),
    "...: damaged or cut short (the array is not closed)": ("a.json", b'[{"text": "a"}'),
}


def of_text(name: str, content: bytes) -> Callable[[Place], str]:
    return lambda place: place.text(place.write(name, content))


def small_limit(name: str, content: bytes, *more: object) -> Callable[[Place], str]:
    """Another text is given too: one alone would be cut."""

    def case(place: Place) -> str:
        place.patch.setattr(shards, "MAX_DOCUMENT_BYTES", 1 << 20)
        paths = (place.write(name, content), place.good)
        return place.run("text", *paths, "--tokenizer", place.model, *more)

    return case


def changed_input(place: Place) -> str:
    """The text changes when the first pass is over."""
    place.patch.setattr(
        prepare, "say_left_out", lambda survey: place.write("t.jsonl", {"text": "other"})
    )
    return place.text()


def without_pyarrow(place: Place) -> str:
    place.patch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    return place.text(place.write("a.parquet", b"PAR1"))


def parquet_file(**columns: list) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = place.folder / "a.parquet"
        parquet.write_table(pyarrow.table(columns), path)
        return place.text(path)

    return case


def invalid_parquet_text(place: Place) -> str:
    """A column of strings that holds bytes which are no UTF-8."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = place.folder / "a.parquet"
    array = pyarrow.array([b"caf\xe9"], type=pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": array}), path)
    return place.text(path)


def no_parquet(place: Place) -> str:
    pytest.importorskip("pyarrow")
    return place.text(place.write("a.parquet", b"PAR1"))


# Tokenizers


def trained(place: Place, size: int, text: str) -> str:
    lines = ({"text": f"{i} {text}"} for i in range(9))
    return place.run("text", place.write("a.jsonl", *lines), "--vocab-size", size)


def broken_trainer(place: Place) -> str:
    import sentencepiece

    def train(**options) -> None:
        raise RuntimeError("INTERNAL: bad luck\nand more")

    place.patch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    return place.run("text", place.good)


def with_model(content: bytes | None, limit: int | None = None) -> Callable[[Place], str]:
    """The given tokenizer has other content, is missing, or MAX_VOCAB is smaller."""

    def case(place: Place) -> str:
        place.model.unlink() if content is None else place.model.write_bytes(content)
        if limit:
            place.patch.setattr(shards, "MAX_VOCAB", limit)
        return place.text()

    return case


def write_model(place: Place, **options: object) -> None:
    """Train the given tokenizer with other options."""
    import sentencepiece

    defaults = {"model_type": "bpe", "vocab_size": 300, "hard_vocab_limit": False}
    with open(place.model, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([words(300, seed=i) for i in range(10)]),
            model_writer=file,
            minloglevel=2,
            **{**defaults, **options},
        )


def other_model(**options: object) -> Callable[[Place], str]:
    """A tokenizer trained with other options is given."""

    def case(place: Place) -> str:
        write_model(place, **options)
        return place.text()

    return case


def write_wordy_model(place: Place, *texts: str) -> None:
    """Write texts, and a tokenizer that decodes an x as two y."""
    rules = place.write("rules.tsv", b"78\t79 79\n")
    place.write("t.jsonl", *({"text": text} for text in texts))
    write_model(place, denormalization_rule_tsv=str(rules), **OURS)


def wordy_model(*texts: str, more: tuple = ()) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        write_wordy_model(place, *texts)
        return place.text(place.good, *more)

    return case


def marking_model(place: Place, **options: object) -> None:
    """Write a text with capitals, and a tokenizer with marks for them."""
    place.write("t.jsonl", *({"text": f"Text {i}{' ' * 70_000}and NASA"} for i in range(9)))
    write_model(place, **{**OURS, "vocab_size": VOCAB, **caseops.TRAINER_OPTIONS, **options})


def of_marks(*more: object) -> Callable[[Place], str]:
    """A text is prepared with a tokenizer that has marks for capitals and folds white space."""

    def case(place: Place) -> str:
        marking_model(place, add_dummy_prefix=False)
        return place.text(place.good, *more)

    return case


def adopted_marks(change: Callable[[Path], object]) -> Callable[[Place], str]:
    """Adopt shards of marked text after a change to their bytes of each token."""

    def case(place: Place) -> str:
        marking_model(
            place,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
        argv = ["text", place.good, "--tokenizer", place.model, "--caseops", "--out", place.out]
        assert prepare.main([str(x) for x in argv]) == 0
        folder = place.out / f"datasets/t_case{VOCAB}"
        (folder / "fineweb_val.json").unlink()
        change(folder / "fineweb_val_bytes_000000.bin")
        return place.run("adopt", folder, "--tokenizer", place.model)

    return case


def used_name(place: Place) -> str:
    place.built().model.write_bytes(prepare.train_tokenizer([words(4000, seed=9)], VOCAB, 0))
    return place.text(place.write("u.jsonl", {"text": "a"}, {"text": "b"}))


# The data set's folder


def other_input(place: Place) -> str:
    place.built().write("t.jsonl", {"text": "a"}, {"text": "b"})
    return place.text()


def foreign_shards(place: Place) -> str:
    (place.built().data / "fineweb_val.json").unlink()
    return place.text()


def at_once(place: Place) -> str:
    with prepare.sole_writer(place.data):
        return place.text()


def without_locks(place: Place) -> str:
    def no_lock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    place.patch.setattr(pytest.importorskip("fcntl"), "flock", no_lock)
    return place.text()


def damaged(place: Place) -> str:
    (place.built().data / "fineweb_val_000000.bin").write_bytes(b"")
    return place.text()


def adopted(change: Callable[[Place], object], *more: object) -> Callable[[Place], str]:
    """Adopt the shards of a data set without a sidecar after a change."""

    def case(place: Place) -> str:
        (place.built().data / "fineweb_val.json").unlink()
        change(place)
        return place.run("adopt", place.data, "--tokenizer", place.model, *more)

    return case


def edited(name: str, number: int, token: int) -> Callable[[Place], object]:
    """Change a token of a shard."""
    return lambda place: edit_token(place.data / name, number, token)


def full_disk(place: Place) -> str:
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    place.patch.setattr(os, "fsync", full)
    return place.text()


def not_allowed(place: Place) -> str:
    place.good.chmod(0)
    if os.access(place.good, os.R_OK):  # the superuser may
        denied = PermissionError(13, "Permission denied", str(place.good))
        place.patch.setattr(documents, "read_documents", lambda files, reading: raises(denied))
    return place.text()


def raises(error: BaseException) -> Iterator:
    raise error
    yield


def stopped(error: BaseException) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        place.patch.setattr(prepare, "survey_documents", lambda plan: next(raises(error)))
        return place.text()

    return case


def missing_package(place: Place) -> str:
    place.patch.setitem(sys.modules, "sentencepiece", None)
    return place.text()


def missing_at_start(place: Place) -> str:
    """What is needed before anything else."""
    place.patch.setitem(sys.modules, "numpy", None)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SOURCE))
    return str(caught.value)


def small_packages(place: Place) -> None:
    """Let `docs` read two modules instead of the installed packages."""
    for name in ("a", "b"):
        place.write(f"{name}.py", f'"""{words(900, seed=ord(name))}"""'.encode())
    place.patch.setattr(docstrings, "package_folder", lambda name: place.folder)


def other_versions(place: Place) -> str:
    small_packages(place)
    pins = place.write("requirements.txt", b"numpy==0.1")
    place.patch.setattr(prepare, "REQUIREMENTS", pins)
    return place.run("docs", "--vocab-size", VOCAB, "--workers", 1)


def killed_worker(place: Place) -> str:
    """Workers wait for a pipe and are killed there.

    All of them, until the run has ended: one that starts while the pool ends for the first one's
    death is not told to stop by Python 3.11, and would wait for the pipe for ever.
    """
    import multiprocessing

    small_packages(place)
    os.mkfifo(place.folder / "pipe.py")
    place.patch.setattr(prepare, "warn_of_other_versions", lambda versions: None)
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.02):
            for worker in multiprocessing.active_children():
                worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        return place.run("docs", "--vocab-size", VOCAB, "--workers", 2)
    finally:
        ended.set()
        killer.join()


# FineWeb


def published() -> Repository:
    """Return a repository of one shard a split and a small tokenizer."""
    tokens = np.array([1, *range(300, 310)])
    entry = {"name": "fineweb10B_sp1024", "tokenizer_name": "t"}
    manifest = {
        "datasets": [{**entry, "stats": {"files_train": 1, "files_val": 1}}],
        "tokenizers": [{"name": "t", "model_path": "tokenizers/t.model"}],
    }
    files = {f"{FOLDER}/fineweb_{split}_000000.bin": shard(tokens) for split in ("train", "val")}
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    for name in ("t", f"fineweb_{VOCAB}_bpe"):
        files[f"datasets/tokenizers/{name}.model"] = model_bytes()
    return Repository(NAME, files)


def hub(
    change: Callable[[Repository], object] = lambda repository: None,
    *argv: object,
    here: Callable[[Place], object] = lambda place: None,
    twice: bool = False,
    **environment: str,
) -> Callable[[Place], str]:
    """Download from a changed repository with something done here before, or between two times."""

    def case(place: Place) -> str:
        repository = published()
        change(repository)
        command = ("fineweb", "--variant", "sp1024", "--train-shards", 1, *argv)
        with HubServer(repository) as server:
            settings = {"HF_ENDPOINT": server.endpoint, "MATCHED_FINEWEB_REPO_ID": NAME}
            settings |= {
                "NO_PROXY": "127.0.0.1,localhost",
                "no_proxy": "127.0.0.1,localhost",
                **environment,
            }
            for name, value in settings.items():
                place.patch.setenv(name, value)
            place.patch.setattr(prepare.hub, "RETRY_PAUSES", (0.01,))
            place.patch.setattr(prepare, "FINEWEB_VARIANTS", {"sp1024": VOCAB})
            if twice:
                assert prepare.main([str(x) for x in (*command, "--out", place.out)]) == 0
            here(place)
            return place.run(*command)

    return case


def val_shard(content: bytes) -> Callable[[Repository], object]:
    """Publish another validation shard."""
    return lambda r: r.files.update({f"{FOLDER}/fineweb_val_000000.bin": content})


def faults(kind: str) -> Callable[[Repository], object]:
    """Let a fault strike at every attempt at the validation shard."""
    return lambda r: r.faults.update({f"{FOLDER}/fineweb_val_000000.bin": [kind] * 9})


def without(part: str) -> Callable[[Repository], object]:
    """Take away the files with `part` in their names."""
    return lambda r: [r.files.pop(name) for name in list(r.files) if part in name]


def miscounted(repository: Repository) -> None:
    """Publish a tokenizer that puts a space before a text, and a text that starts without one."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words(300, seed=i) for i in range(10)]),
        model_writer=model,
        minloglevel=2,
        model_type="bpe",
        vocab_size=VOCAB,
        **OURS,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    first = next(i for i in range(260, VOCAB) if tokenizer.id_to_piece(i)[0] != "\u2581")
    repository.files["datasets/tokenizers/t.model"] = model.getvalue()
    val_shard(shard([1, first]))(repository)


def plain_tokenizer(repository: Repository) -> None:
    """Publish a tokenizer of plain text under the name of one that marks capitals."""
    name = f"fineweb_{VOCAB}_bpe{prepare.hub.CASEOPS_ENDING}.model"
    repository.files[f"datasets/tokenizers/{name}"] = model_bytes()


def patched(target: object, name: str, value: object) -> Callable[[Place], object]:
    return lambda place: place.patch.setattr(target, name, value)


def broken_library(error: Exception) -> Callable[[Place], object]:
    """Let every request fail in the same way."""
    import huggingface_hub

    def fail(url):
        raise error

    return patched(huggingface_hub, "get_hf_file_metadata", fail)


def hub_library(place: Place) -> None:
    import huggingface_hub

    place.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def leave(name: str, content: bytes) -> Callable[[Place], object]:
    """Leave a file in the folder of the download."""

    def act(place: Place) -> None:
        folder = place.out / "datasets/fineweb10B_sp1024"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return act


CASES: dict[str, Callable[[Place], str]] = {
    # Your text
    **{message: of_text(*file) for message, file in TEXTS.items()},
    "...: no such file or folder": lambda p: p.text(p.folder / "missing"),
    "...: no .txt, ... file in this folder": lambda p: p.text(p.data.mkdir(parents=True) or p.data),
    "...: a line of over ... MiB": small_limit("a.jsonl", b"x" * (2 << 20)),
    "...: over ... MiB, and a text file is one document": small_limit("a.txt", b"x" * (2 << 20)),
    "...: over ... MiB without a separator": small_limit(
        "a.txt", b"x" * (3 << 20), "--split-on", "blank"
    ),
    "...: a text of over ... MiB": small_limit("a.json", json.dumps(["x" * (3 << 19)]).encode()),
    "...: value ... is over ... MiB, or the file no JSON": small_limit(
        "a.json", b'["' + b"x" * (3 << 20)
    ),
    "--split-on: expected some text, got none": lambda p: p.text(p.good, "--split-on", ""),
    "warning: ...: ... is taken for text": lambda p: p.text(
        p.write("a.txt", words(300, seed=1).encode() + b"<|endoftext|>\n" + b"a b c " * 99)
    ),
    "--split-on cuts .txt and .md files": lambda p: p.text(p.good, "--split-on", "blank"),
    "...: parquet files are read with pyarrow: pip install pyarrow": without_pyarrow,
    '...: no column "..." of strings, but ...': parquet_file(body=["a"]),
    "...: not a whole parquet file (...)": no_parquet,
    "the validation text (--val) holds no document": lambda p: p.text(
        p.good, "--val", p.write("v.txt")
    ),
    "...: the input changed while it was read": changed_input,
    # Tokenizers
    "--vocab-size ...: the training text only yields ... pieces": lambda p: trained(p, 9000, "a"),
    "--vocab-size ...: bytes and frequent characters alone take ... pieces": lambda p: trained(
        p, 261, "abcdefgh"
    ),
    "the training text has nothing a tokenizer can be trained on": lambda p: p.run(
        "text", p.write("a.jsonl", {"text": "\u2585"}, {"text": "\u2585\u2585"})
    ),
    "--vocab-size ...: SentencePiece said ...": broken_trainer,
    "--vocab-size ...: ... has ...": lambda p: p.text(p.good, "--vocab-size", 999),
    "...: no such tokenizer file": with_model(None),
    "...: a tokenizer in JSON, as of Hugging Face": with_model(b'{"model": {"type": "BPE"}}'),
    "...: not a SentencePiece model": with_model(b"no model"),
    "...: has no byte pieces": other_model(bos_id=1, unk_id=0),
    "...: its BOS is id ...; shards need id ...": other_model(
        byte_fallback=True, bos_id=2, eos_id=1
    ),
    "...: ... pieces; shards hold ids below ...": with_model(model_bytes(), limit=100),
    "...: makes ... of 'a b'": other_model(treat_whitespace_as_suffix=True, **OURS),
    "...: the tokens stand for ... bytes of text, not ...": wordy_model("a", "b", "xx"),
    "... miscounts every document of the ... split": wordy_model(
        "xa", "xb", "xx", more=("--skip-bad",)
    ),
    "...: another tokenizer of this name is there": used_name,
    # The data set's folder
    "...: holds a data set of other input, settings or versions": other_input,
    "...: has no valid fineweb_val.json": foreign_shards,
    "...: another prepare.py is writing here": at_once,
    "...; put back what it was, or delete it with ... and run this again": damaged,
    "warning: ...: this file system has no file locks (...)": without_locks,
    "a fault of this program, please report it": stopped(ZeroDivisionError()),
    "...: No space left on device; free some space": full_disk,
    "...: Permission denied": not_allowed,
    "out of memory": stopped(MemoryError()),
    "a worker process was killed": killed_worker,
    "interrupted; nothing half made is left": stopped(KeyboardInterrupt()),
    "the package ... is not installed": missing_package,
    "warning: ...: these shards will differ from other machines' shards": other_versions,
    # The command line
    "... (try: ... --help)": lambda p: p.text(p.good, "--val", "a", "--val-fraction", 0.1),
    "...: expected a whole number ...": lambda p: p.text(p.good, "--vocab-size", 9),
    "...: expected a number over 0 and at most 0.5": lambda p: p.text(p.good, "--val-fraction", 1),
    "expected a path, got an empty one": lambda p: p.run("text", ""),
    "--name ...: expected letters, digits, ...": lambda p: p.text(p.good, "--name", "../a"),
    # FineWeb
    "...: cannot reach ...: offline, or a proxy is in the way": hub(
        HF_ENDPOINT="http://127.0.0.1:9"
    ),
    "HF_ENDPOINT=...: expected an address such as ...": hub(HF_ENDPOINT="nowhere"),
    "...: the proxy ... needs a package (...)": hub(
        here=broken_library(ImportError("'socksio' is not installed")), ALL_PROXY="socks5://a"
    ),
    "...: the proxy ... cannot be used (...)": hub(
        here=broken_library(ValueError("bad proxy")), ALL_PROXY="http://a"
    ),
    "...: a package is missing (...)": hub(here=broken_library(ImportError("httpx"))),
    "...; trying again would not help, please report it": hub(
        here=broken_library(TypeError("no such argument"))
    ),
    "HF_HUB_OFFLINE is set": hub(here=hub_library),
    "...: fewer bytes arrived than the hub announced; run the same command again": hub(
        faults("short")
    ),
    "...: ...: ...; run the same command again": hub(
        here=patched(prepare.hub, "file_sha256", lambda path: "0")
    ),
    "...: the hub answered ..., ... times": hub(faults("head500")),
    "...: the hub answered ...": hub(faults("head403")),
    "... does not answer like a Hugging Face hub": hub(faults("portal")),
    "...: no such data set repository": hub(MATCHED_FINEWEB_REPO_ID="nobody/nothing"),
    "... does not publish ...": hub(without("manifest")),
    "...: manifest.json does not describe ...": hub(
        lambda r: r.files.update({"datasets/manifest.json": b"[]"})
    ),
    "--train-shards ...: ... publishes ... for ...": hub(
        lambda r: None, "--skip-manifest", "--train-shards", 2
    ),
    "disk full: ... needs ... GB more": hub(
        here=patched(prepare.hub.shutil, "disk_usage", lambda path: argparse.Namespace(free=10))
    ),
    "...: ... publishes only ...; delete it": hub(
        here=leave("fineweb_val_000001.bin", shard([1, 5]))
    ),
    "...: holds files of ..., not of ...": hub(
        here=leave(".build.json", b'{"request": {"repository": "other/golf"}}')
    ),
    "...; delete that file and run the same command again": hub(
        here=leave("fineweb_val_000000.bin", shard([1, 5])), twice=True
    ),
    "adopt: give the folder of the shards once": adopted(lambda p: None, "--data", "x"),
    "...: missing; both splits are needed": adopted(
        lambda p: (p.data / "fineweb_val_000000.bin").unlink()
    ),
    "...; if the shards are right, move fineweb_val.json away first": adopted(
        lambda p: (p.data / "fineweb_val.json").write_text("{}")
    ),
    "...: ... has ... pieces, not ...": hub(
        here=patched(prepare, "FINEWEB_VARIANTS", {"sp1024": 999})
    ),
    "...: header says magic ..., version ...": hub(val_shard(bytes(2000))),
    "...: the header promises ... tokens": hub(val_shard(shard([1, 5])[:-1])),
    "...: ... bytes, but a shard starts with a header of ...": hub(val_shard(b"short")),
    "...: the first token is ..., not BOS (...)": hub(val_shard(shard([5, 1]))),
    "...: over ... tokens without a BOS": hub(here=patched(shards, "MAX_DOCUMENT_BYTES", 4)),
    "...: token ..., but ... has ... pieces": hub(val_shard(shard([1, VOCAB]))),
    "...: validation document ... is ... bytes by its pieces": hub(miscounted),
    # CaseOps
    "--caseops: ... has no pieces for marks of capitals": lambda p: p.text(p.good, "--caseops"),
    "...: is for text with marked capitals; add --caseops": of_marks(),
    "...: one token stands for ... bytes": of_marks("--caseops"),
    "...: ... lacks marks of capitals": hub(plain_tokenizer, "--caseops", "--skip-manifest"),
    "...: missing; bytes of the original text are counted by it": adopted_marks(Path.unlink),
    "...: ... bytes; ... tokens need ...": adopted_marks(lambda path: path.write_bytes(b"")),
    "...: header ...; expected ...": adopted_marks(
        lambda path: path.write_bytes(bytes(path.stat().st_size))
    ),
    "...: validation token ... is said to stand for ... bytes": adopted_marks(
        lambda path: edit_token(path, 0, 3)
    ),
}
# Other ways to some of the messages.
MORE = [
    ("...: not UTF-8 at byte ...", invalid_parquet_text),
    ('...: "text" is not a string', parquet_file(text=["a", None])),
    (
        "...: the first token is ..., not BOS (...)",
        adopted(edited("fineweb_train_000000.bin", 0, 5)),
    ),
    (
        "...: token ..., but ... has ... pieces",
        adopted(edited("fineweb_train_000000.bin", 1, VOCAB)),
    ),
    ("the package ... is not installed", missing_at_start),
    ("... does not publish ...", hub(without("_bpe.model"), "--skip-manifest")),
    ("--train-shards ...: ... publishes ... for ...", hub(lambda r: None, "--train-shards", 2)),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch, capsys) -> Iterator[Place]:
    """A place for one case; what is reported there is traced to its line."""
    made: list[tuple[str, int, str]] = []

    def traced(function: Callable) -> Callable:
        def report(*args, **more):
            caller = sys._getframe(1)
            made.append((Path(caller.f_code.co_filename).name, caller.f_lineno, str(args[-1])))
            return function(*args, **more)

        return report

    for module in (prepare, shards):
        monkeypatch.setattr(module, "warn", traced(module.warn))
    for kind in (shards.BadInput, shards.Failure, documents.Fault, argparse.ArgumentTypeError):
        monkeypatch.setattr(kind, "__init__", traced(kind.__init__))
    here = Place(tmp_path, monkeypatch, capsys)
    here.made = made
    return here


def check_case(place: Place, message: str, case: Callable[[Place], str]) -> None:
    """Run a case; its line has to be as the message says."""
    line = case(place)
    assert re.search(".+".join(map(re.escape, message.split("..."))), line), line
    for name, number, text in place.made:
        # A path at the start may have been replaced by a public name.
        text = shards.one_line(text)
        if text in line or text.partition(": ")[2] in line:
            reached.add((name, number))


@pytest.mark.parametrize("message", CASES)
def test_message(place, message):
    check_case(place, message, CASES[message])


@pytest.mark.parametrize(("message", "case"), MORE, ids=range(len(MORE)))
def test_other_ways(place, message, case):
    check_case(place, message, case)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (OSError("handle is closed"), "a worker process was killed; run again with --workers 1"),
        (OSError(errno.ENFILE, "Too many open files"), "Too many open files"),
    ],
)
def test_workers_that_cannot_be_started(place, raised, line):
    """A pool that breaks while it starts a worker says so in an OSError that has no errno."""

    def submit(pool, *args):
        raise raised

    small_packages(place)
    place.patch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", submit)
    assert line in place.run("docs", "--vocab-size", VOCAB, "--workers", 2)


def test_miscounted_documents_are_left_out_and_counted(place):
    write_wordy_model(place, "xx", "ab", "b", "ba", "x", "xa", "ke")
    argv = ("--tokenizer", place.model, "--skip-bad", "--val-fraction", 0.5, "--out", place.out)
    for said in ("left out bad documents: 3 miscounted by the tokenizer", "nothing to do"):
        assert prepare.main([str(x) for x in ("text", place.good, *argv)]) == 0
        assert said in place.capsys.readouterr().out
    sidecar = prepare.read_json(next(place.out.rglob("fineweb_val.json")))
    assert sidecar["left_out"] == {"miscounted by the tokenizer": 3}
    assert sidecar["documents"] + sidecar["train"]["documents"] == 4


def test_the_table_lists_these_messages():
    assert sorted(TABLE) == sorted(CASES)


def test_every_report_in_the_source_was_printed(request):
    """Each call that makes a refusal or a warning was reached by a case above, and printed."""
    selected = sum(
        item.name.startswith(("test_message", "test_other")) for item in request.session.items
    )
    if selected < len(CASES) + len(MORE):
        pytest.skip("needs all the cases of this file in the same run")
    missed = []
    number = 0
    for path in MODULES:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(call, ast.Call) and ast.unparse(call.func)
            if named and named.rpartition(".")[2] in REPORTERS:
                number += 1
                lines = range(call.lineno, call.end_lineno + 1)
                if not reached & {(path.name, line) for line in lines}:
                    missed.append((path.name, call.lineno, ast.unparse(call)))
    assert number > 50
    if not HAS_PYARROW:
        missed = [(name, line, call) for name, line, call in missed if not is_parquet(call)]
    assert not missed


def is_parquet(call: str) -> bool:
    """Say whether a report is about a parquet file, which only pyarrow reads."""
    return any(part in call for part in ("parquet", "no column", "error.start:,}'", "no string'"))
