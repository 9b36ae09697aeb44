"""data/prepare.py: shards, byte counts, the built-in corpus and one's own text."""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare

import docstrings  # isort: skip
import documents  # isort: skip
import shards  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT.parent / "shared" / "data" / "tokenizers" / "fineweb_1024_bpe.model"
VOCAB = 320

# The shards of the built-in corpus with the versions of requirements.txt.
DOCS_SHA256 = {
    "datasets/docs_sp1024/fineweb_train_000000.bin": (
        "ba65dee81eb7be385783a9fa90fb6c396f501fd83145b3009d1d996f432a250f"
    ),
    "datasets/docs_sp1024/fineweb_val_000000.bin": (
        "4e41cce201987ef688723f33ce39f09e9c9564fa588e820e020f286195e8ee62"
    ),
    "tokenizers/docs_1024_bpe.model": (
        "745c71f19812b2bd2068e05edba21b3a1a6f8b3d5f10859637ffe8c465f5bc42"
    ),
}


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_disks():
    """Power cuts are not the subject, and a disk takes longer than the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


# Of the names and hashes of two data sets of write_recorded_corpus.
TEXT_SHA256 = "ab179ad90f507a3bed69ed7129782b345bf5fad3744d9b7ca36d68e0fdc96b4e"


def words(count: int, seed: int) -> str:
    """Return `count` words of a small language, on lines."""
    rng = random.Random(seed)
    syllables = ["ba", "ke", "lo", "mi", "nu", "pra", "sti", "tor", "xy", "17", "\u00e9"]
    made = ("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))
    return "".join(word + rng.choice([" ", " ", " ", "\n", "  "]) for word in made)


@functools.cache
def model_bytes() -> bytes:
    """A small tokenizer of our own."""
    return prepare.train_tokenizer([words(4000, seed=0)], VOCAB, 0)


@functools.cache
def small_tokenizer():
    """The same, loaded."""
    return prepare.Tokenizer(model_bytes(), "small.model")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """The same, as a file."""
    path = tmp_path / "given.model"
    path.write_bytes(model_bytes())
    return path


def tree(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a build that is neither hidden nor in a hidden folder."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_main(capsys, *argv: object) -> tuple[int, str, str]:
    """Run the command line in this process; return exit status, stdout and stderr."""
    capsys.readouterr()
    status = prepare.main([str(arg) for arg in argv])
    return status, *capsys.readouterr()


def assert_one_error(outcome: tuple[int, str, str], status: int, *expected: str) -> None:
    """Check exit status and that stderr is one line with all `expected` words."""
    code, _, stderr = outcome
    assert code == status, outcome
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for word in expected:
        assert word in stderr, stderr


def read_split(folder: Path, split: str, tokenizer) -> list[str]:
    """Return the texts of a split, decoded from its shards."""
    documents = prepare.iter_documents(prepare.shard_paths(folder, split))
    return [tokenizer.decode(ids) for ids in documents]


# Shards


def test_shard_bytes_by_hand(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    prepare.write_shard(path, np.array([1, 258, 65535]))
    header = bytes.fromhex("88d83401 01000000 03000000") + bytes(1024 - 12)
    assert path.read_bytes() == header + bytes.fromhex("0100 0201 ffff")
    assert int.from_bytes(header[:4], "little") == 20240520
    assert prepare.read_shard_header(path) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda b: b[:-1], "promises 3 tokens"),
        (lambda b: b + b"x", "promises 3 tokens"),
        (lambda b: b[:500], "500 bytes"),
        (lambda b: b"\0" + b[1:], "magic"),
        (lambda b: b[:4] + b"\2" + b[5:], "version 2"),
        (lambda b: b[:8] + b"\0" + b[9:1024], "promises 0 tokens"),
    ],
)
def test_bad_shards_are_refused(tmp_path, change, expected):
    path = tmp_path / "fineweb_val_000000.bin"
    prepare.write_shard(path, np.array([1, 2, 3]))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(prepare.BadInput, match=expected):
        prepare.read_shard_header(path)


def test_write_shard_refuses_ids_over_16_bits(tmp_path):
    with pytest.raises(ValueError, match="65535"):
        prepare.write_shard(tmp_path / "x.bin", np.array([1, 65536]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 100])
def test_iter_documents_crosses_blocks_and_shards(tmp_path, block_tokens):
    shards = [[1, 5, 6, 1, 7], [8, 9], [1, 1, 4]]
    for number, tokens in enumerate(shards):
        prepare.write_shard(prepare.shard_path(tmp_path, "val", number), np.array(tokens))
    paths = prepare.shard_paths(tmp_path, "val")
    found = [ids.tolist() for ids in prepare.iter_documents(paths, block_tokens)]
    assert found == [[1, 5, 6], [1, 7, 8, 9], [1], [1, 4]]


def test_iter_documents_needs_a_first_bos(tmp_path):
    path = prepare.shard_path(tmp_path, "val", 0)
    prepare.write_shard(path, np.array([5, 1, 5]))
    with pytest.raises(prepare.BadInput, match="not BOS"):
        list(prepare.iter_documents([path]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(5, 40))
def test_what_is_written_is_read_back(sizes, shard_tokens):
    """Documents of any size come back from shards of any size, all of which are full but one."""
    rng = np.random.default_rng(sum(sizes))
    made = [np.array([1, *rng.integers(4, 99, size=size)], dtype=np.uint16) for size in sizes]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = prepare.ShardWriter(folder, "val", shard_tokens)
        for ids in made:
            writer.add(ids, len(ids), 2 * len(ids))
        writer.close()
        paths = prepare.shard_paths(folder, "val")
        found = [ids.tolist() for ids in prepare.iter_documents(paths, block_tokens=7)]
        lengths = [prepare.read_shard_header(path) for path in paths]
    assert found == [ids.tolist() for ids in made]
    assert lengths[:-1] == [shard_tokens] * (len(lengths) - 1)
    total = sum(map(len, made))
    assert writer.documents == len(made) and writer.tokens == writer.raw_bytes == total
    assert writer.encoded_bytes == 2 * total


# Tokenizer and bytes


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(alphabet=st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])),
        st.text(alphabet="ab \n\t\0\r\u2585\u00a0\u3000\u00e9\ufb01\u0301\ufeff\ufffd<>0xs/"),
        st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "<0x0A>", " ", "  ", "bake"])).map(
            "".join
        ),
    )
)
def test_tokens_stand_for_exactly_the_bytes_of_the_text(text):
    tokenizer = small_tokenizer()
    (ids,) = tokenizer.encode([text])
    size = len(text.encode())
    assert tokenizer.counted_bytes(ids) == tokenizer.decoded_bytes(ids) == size
    assert tokenizer.decode(ids) == text
    assert ids[0] == 1 and not set(ids[1:].tolist()) & {0, 1, 2, 3}


def test_published_tokenizer_counts_its_normalised_text():
    if not PUBLISHED.exists():
        pytest.skip("the challenge's published tokenizer is not here")
    tokenizer = prepare.load_tokenizer(PUBLISHED)
    for text in ("plain words", "  a\t\n b  \ufb01 ", "\u4f60\u597d \U0001f600", " ", "\ufffd x"):
        (ids,) = tokenizer.encode([text])
        size = len(tokenizer.processor.normalize(text).replace("\u2581", " ").encode())
        assert tokenizer.counted_bytes(ids) == tokenizer.decoded_bytes(ids) == size


def test_trainer_settings_match_the_published_ones():
    """All fields of the trainer's settings but those that name files, read from the model."""
    if not PUBLISHED.exists():
        pytest.skip("the challenge's published tokenizer is not here")

    def fields(blob: bytes) -> dict[int, list]:
        found: dict[int, list] = {}
        stream = io.BytesIO(blob)

        def number() -> int:
            value = shift = 0
            while (byte := stream.read(1)[0]) & 0x80:
                value, shift = value | (byte & 0x7F) << shift, shift + 7
            return value | byte << shift

        while stream.tell() < len(blob):
            key = number()
            kind = key & 7
            value = number() if kind == 0 else stream.read({1: 8, 2: 0, 5: 4}[kind] or number())
            found.setdefault(key >> 3, []).append(value)
        return found

    trainer, normalizer = 2, 3
    ours = fields(prepare.train_tokenizer([words(40_000, seed=0)], 1024, 0))
    theirs = fields(PUBLISHED.read_bytes())
    ours_trainer, theirs_trainer = (fields(model[trainer][0]) for model in (ours, theirs))
    model_prefix, num_threads, shuffle, required_chars = 2, 16, 19, 36
    changed = {
        key
        for key in {*ours_trainer, *theirs_trainer}
        if ours_trainer.get(key) != theirs_trainer.get(key)
    }
    assert changed == {model_prefix, num_threads, shuffle, required_chars}
    name, charsmap, dummy_prefix, extra_spaces = 1, 2, 3, 4
    spec = fields(ours[normalizer][0])
    assert spec[name] == [b"identity"] and not spec.get(charsmap, [b""])[0]
    assert spec[dummy_prefix] == [0] and spec[extra_spaces] == [0]


def test_tokenizer_ids_and_determinism():
    tokenizer = small_tokenizer().processor
    assert tokenizer.vocab_size() == VOCAB
    special = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert special == (0, 1, 2, 3)
    assert all(tokenizer.is_byte(i) for i in range(4, 260))
    again = prepare.train_tokenizer([words(4000, seed=0)], VOCAB, 0)
    assert again == model_bytes()


def test_space_is_one_byte_after_training_on_text_without_any():
    model = prepare.train_tokenizer(["\u4f60\u597d\u4e16\u754c\u5f88\u957f" * 40], 270, 0)
    tokenizer = prepare.Tokenizer(model, "no spaces")
    assert tokenizer.counted_bytes(tokenizer.encode(["a b"])[0]) == 3


def test_trainer_sees_all_text_in_short_pieces():
    text = words(3000, seed=1) + "x" * 5000 + words(10, seed=2)
    pieces = list(shards.trainer_sentences([text, "short"], keep_every=1))
    assert "".join(pieces) == text + "short"
    assert max(map(len, pieces)) <= 1000
    assert len(list(shards.trainer_sentences([text], keep_every=4))) < len(pieces) / 3


@pytest.mark.parametrize(("size", "expected"), [(261, "give more than"), (9000, "only yields")])
def test_vocabulary_that_does_not_fit(size, expected):
    with pytest.raises(prepare.BadInput, match=expected) as caught:
        prepare.train_tokenizer([words(300, seed=0)], size, 0)
    if size == 9000:
        fitting = int(re.search(r"--vocab-size (\d+)$", str(caught.value))[1])
        prepare.train_tokenizer([words(300, seed=0)], fitting, 0)


# The built-in corpus

MODULE = '''"""Module number {0}.

    An indented line,\\twith a tab.
Repeated below.
"""
class Thing:
    """{1}"""
    def method(self):
        """The same words in every module."""
        def inner():
            """Inside a function: {2}"""
    async def later(self):
        r"""Raw \\d and async {0}."""
try:
    def guarded(): "Single quotes {0}."
except ValueError:
    def fallback(): "In a handler {0}."
x = 1
"""Not a docstring."""
'''


def make_package(folder: Path, files: list[tuple[str, str]]) -> Path:
    """Write a package's files in the order given."""
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def fake_packages(folder: Path, backwards: bool = False) -> dict[str, Path]:
    """Write two packages of 40 modules, and files that must not matter; return their folders."""
    packages = {}
    for package in ("numpy", "other"):
        files = [
            (f"part{i % 4}/m{i}.py", MODULE.format(f"{package}{i}", words(60, i), words(9, i)))
            for i in range(40)
        ]
        files += [
            ("version.py", '"""Version."""'),
            ("__config__.py", '"""Config."""'),
            ("broken.py", '"""Broken."""\ndef broken(:'),
            ("newer.py", '"""Newer."""\ndef f[T](x: T): pass'),
            ("empty.py", ""),
            ("marks.py", '"""A \u2581 mark."""\nclass A:\n    """\\ud800"""'),
            ("notes.txt", "not a module"),
        ]
        if package == "numpy":
            files.append(("distutils/core.py", '"""Only before Python 3.12."""'))
        packages[package] = make_package(folder / package, files[::-1] if backwards else files)
    return packages


def test_module_docstrings(tmp_path):
    files = [("a.py", MODULE.format("A", "Doc.", "deep"))]
    path = make_package(tmp_path, files) / "a.py"
    assert docstrings.module_docstrings(path) == [
        "Module number A.\n\n    An indented line,   with a tab.\nRepeated below.",
        "Doc.",
        "The same words in every module.",
        "Inside a function: deep",
        "Raw \\d and async A.",
        "Single quotes A.",
        "In a handler A.",
    ]


def test_collected_documents(tmp_path):
    documents = docstrings.collect_docs(fake_packages(tmp_path), workers=1)
    assert len(documents) == 80
    text = "\n\n".join(document.text for document in documents)
    assert text.count("The same words in every module.") == 1
    for absent in ("Version", "Config", "Broken", "Newer", "Only before", "mark", "Not a doc"):
        assert absent not in text
    digests = [document.digest for document in documents]
    assert digests == sorted(digests)


def build_fake_docs(out: Path, packages: Path, workers: int, seed: str) -> dict[str, str]:
    """Build the docs corpus of fake packages in a fresh process; return its hashes."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import prepare; from pathlib import Path; "
        "out, packages, workers = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]); "
        "folders = {name: packages / name for name in ('numpy', 'other')}\n"
        "if __name__ == '__main__':\n"
        "    prepare.build(prepare.docs_plan(out, 320, workers, folders, shard_tokens=4000))"
    )
    script = out.with_suffix(".py")
    script.write_text(code)
    subprocess.run(
        [sys.executable, script, ROOT / "data", out, packages, str(workers)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
        timeout=120,
    )
    return tree(out)


def test_docs_bytes_depend_on_nothing_but_the_modules(tmp_path):
    first = tmp_path / "one"
    second = tmp_path / "another place" / "deeper"
    fake_packages(first)
    fake_packages(second, backwards=True)
    expected = build_fake_docs(tmp_path / "out1", first, workers=1, seed="0")
    assert len(expected) >= 5
    assert build_fake_docs(tmp_path / "out2", second, workers=2, seed="1") == expected
    assert build_fake_docs(tmp_path / "out3", second, workers=3, seed="77") == expected


def test_docs_packages_are_found_without_importing_them():
    code = (
        "import sys, prepare, docstrings; "
        "[docstrings.package_folder(p) for p in docstrings.PACKAGES]; "
        "print([p for p in ('torch', 'sympy', 'networkx', 'mpmath', 'sentencepiece') "
        "if p in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "data", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def other_versions(names: set[str]) -> str:
    """Say which installed versions are not those that the recorded hashes belong to."""
    pins = re.findall(r"^([\w-]+)==(\S+)", prepare.REQUIREMENTS.read_text(), re.MULTILINE)
    wanted = {name: pin for name, pin in pins if name in names}
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in wanted}
    return ", ".join(f"{n} {installed[n]}" for n in wanted if installed[n] != wanted[n])


@pytest.mark.slow
def test_docs_of_the_pinned_packages(tmp_path, capsys):
    if other := other_versions({*docstrings.PACKAGES, "sentencepiece"}):
        pytest.skip(f"the hashes belong to other versions than {other}")
    assert run_main(capsys, "docs", "--out", tmp_path)[0] == 0
    got = tree(tmp_path)
    assert {name: got[name] for name in DOCS_SHA256} == DOCS_SHA256
    sidecar = prepare.read_json(tmp_path / "datasets/docs_sp1024" / prepare.SIDECAR)
    assert sidecar["raw_bytes"] == sidecar["encoded_bytes"] == 365_438


def test_finished_docs_are_known_by_their_versions(tmp_path, capsys, monkeypatch):
    """Nothing is read again while the packages are those of the sidecar."""
    packages = fake_packages(tmp_path / "packages")
    monkeypatch.setattr(docstrings, "PACKAGES", ("numpy",))
    monkeypatch.setattr(docstrings, "package_folder", packages.__getitem__)
    argv = ("docs", "--vocab-size", VOCAB, "--workers", 1, "--out", tmp_path / "out")
    assert run_main(capsys, *argv)[0] == 0
    read = docstrings.collect_docs
    monkeypatch.setattr(docstrings, "collect_docs", None)
    assert "nothing to do" in run_main(capsys, *argv)[1]
    monkeypatch.setattr(docstrings, "collect_docs", read)
    monkeypatch.setattr(prepare, "installed_version", lambda name: "0.1")
    code, _, stderr = run_main(capsys, *argv)
    assert code == 2 and "other input, settings or versions" in stderr


def test_other_versions_are_one_warning(monkeypatch, capsys, tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("torch==1.0\nnumpy==2.0  # reason\n# sympy==9\n")
    monkeypatch.setattr(prepare, "REQUIREMENTS", pins)
    prepare.warn_of_other_versions({"torch": "1.0", "numpy": "2.1", "sympy": "1"})
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "numpy 2.1 (pinned 2.0)" in stderr and "torch" not in stderr


# One's own text


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Return different documents of about 200 words."""
    return [f"{seed}-{i} " + words(200, seed=1000 * seed + i) for i in range(count)]


def json_lines(texts: list[str]) -> bytes:
    """Return texts as a .jsonl file."""
    return "".join(
        json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)
    ).encode()


def test_text_of_every_format(tmp_path, capsys):
    """One document set in six kinds of file, in nested folders, comes back entire."""
    texts = make_texts(60)
    source = tmp_path / "my texts"
    (source / "deep").mkdir(parents=True)
    parts = [texts[i::6] for i in range(6)]
    for i, text in enumerate(parts[0]):
        (source / f"t{i}.txt").write_bytes(text.encode())
    for i, text in enumerate(parts[1]):
        (source / "deep" / f"t{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    for i, text in enumerate(parts[2]):
        (source / f"z{i}.TXT.zst").write_bytes(zstandard.compress(text.encode()))
    (source / "a.jsonl").write_bytes(json_lines(parts[3]).replace(b"\n", b"\r\n\n"))
    (source / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(parts[4])))
    half = json_lines(parts[5][:5]), json_lines(parts[5][5:])
    (source / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, half)))
    (source / "ignored.png").write_text("no text file")
    (source / "empty.txt").write_text("")

    argv = ("text", source, "--out", tmp_path / "out", "--vocab-size", VOCAB)
    code, stdout, stderr = run_main(capsys, *argv, "--val-fraction", "0.2")
    assert (code, stderr) == (0, "")
    folder = tmp_path / "out/datasets/my_texts_sp320"
    tokenizer = prepare.load_tokenizer(tmp_path / "out/tokenizers/my_texts_320_bpe.model")
    train, val = (read_split(folder, split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    assert len(train) > len(val) > 0 and not set(train) & set(val)
    keys = [hashlib.sha256(text.encode()).digest()[:8] for text in val]
    assert all(int.from_bytes(key, "big") < 0.2 * 2**64 for key in keys)

    sidecar = prepare.read_json(folder / "fineweb_val.json")
    val_bytes = sum(len(text.encode()) for text in val)
    assert sidecar["documents"] == len(val)
    assert sidecar["raw_bytes"] == sidecar["encoded_bytes"] == val_bytes
    assert sidecar["tokens"] == prepare.read_shard_header(folder / "fineweb_val_000000.bin")
    assert sidecar["train"]["documents"] == len(train)
    assert sidecar["shared_documents"] == 0
    assert sidecar["tokenizer"]["file"] == "my_texts_320_bpe.model"
    assert f"documents:{len(train)}" in stdout and "bytes_per_token" in stdout

    assert "nothing to do" in run_main(capsys, *argv, "--val-fraction", "0.2")[1]
    assert_one_error(run_main(capsys, *argv, "--val-fraction", "0.3"), 2, "other input, settings")
    assert tree(folder)["fineweb_val.json"]


def test_same_text_elsewhere_gives_the_same_bytes(tmp_path, capsys):
    texts = make_texts(30)
    for name, workers in (("one", 1), ("two", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(json_lines(texts))
        argv = ("--name", "same", "--vocab-size", VOCAB, "--workers", workers)
        out = tmp_path / f"out_{name}"
        assert run_main(capsys, "text", tmp_path / name, *argv, "--out", out)[0] == 0
    assert tree(tmp_path / "out_one") == tree(tmp_path / "out_two")


def write_recorded_corpus(folder: Path) -> None:
    """Write files of the kinds that the first version read, without a byte-order mark."""
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(make_texts(25, seed=1))))
    (folder / "b.jsonl").write_bytes(json_lines(["", *make_texts(4, seed=2), "x\u00e9\t\n "]))
    for i, text in enumerate(make_texts(3, seed=3)):
        (folder / f"{i}.txt").write_text(text)


def test_bytes_are_those_of_the_first_version(tmp_path, capsys):
    """What was recorded of the program before its parts: shards, tokenizer and sidecar."""
    versions = {"numpy", "sentencepiece"}
    if other_versions(versions):
        pytest.skip("the hashes belong to other versions")
    write_recorded_corpus(tmp_path / "in")
    (tmp_path / "val.txt").write_text(make_texts(25, seed=1)[3])
    argv = ("text", tmp_path / "in", "--vocab-size", VOCAB, "--shard-tokens", 5000)
    for name, more in (
        ("hash", ("--val-fraction", 0.2)),
        ("given", ("--val", tmp_path / "val.txt")),
    ):
        options = ("--name", name, "--out", tmp_path / "out", *more)
        assert run_main(capsys, *argv, *options)[0] == 0
    lines = "".join(f"{name} {sha}\n" for name, sha in sorted(tree(tmp_path / "out").items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == TEXT_SHA256


def test_given_validation_text_and_tokenizer(tmp_path, capsys, model_file):
    train, val = make_texts(12), make_texts(5, seed=7)
    (tmp_path / "train.jsonl").write_bytes(json_lines([*train, val[3], val[0], train[0]]))
    (tmp_path / "val.jsonl").write_bytes(json_lines(val))
    argv = ["text", tmp_path, "--val", tmp_path / "val.jsonl", "--out", tmp_path / "out"]
    argv += ["--tokenizer", model_file, "--name", "given"]
    assert run_main(capsys, *argv)[0] == 0
    folder = tmp_path / "out/datasets/given_sp320"
    tokenizer = small_tokenizer()
    assert read_split(folder, "val", tokenizer) == val
    assert read_split(folder, "train", tokenizer) == [*train, train[0]]
    sidecar = prepare.read_json(folder / "fineweb_val.json")
    assert sidecar["shared_documents"] == 0 and "2 training documents" in sidecar["split"]
    assert (tmp_path / "out/tokenizers/given.model").read_bytes() == model_file.read_bytes()


def test_published_tokenizer_on_own_text(tmp_path, capsys):
    if not PUBLISHED.exists():
        pytest.skip("the challenge's published tokenizer is not here")
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"  two  spaces\t{i}\n" for i in range(9)]))
    argv = ("text", tmp_path / "a.jsonl", "--tokenizer", PUBLISHED, "--out", tmp_path)
    assert run_main(capsys, *argv)[0] == 0
    sidecar = prepare.read_json(tmp_path / "datasets/a_sp1024/fineweb_val.json")
    assert sidecar["raw_bytes"] == len(b"  two  spaces\t0\n")
    assert sidecar["encoded_bytes"] == len(b"two spaces 0")


def test_at_least_one_document_is_held_out(tmp_path, capsys, model_file):
    texts = [f"text number {i}" for i in range(3)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    argv = ("--tokenizer", model_file, "--val-fraction", "0.000001", "--out", tmp_path)
    assert run_main(capsys, "text", tmp_path / "a.jsonl", *argv)[0] == 0
    val = read_split(tmp_path / "datasets/a_sp320", "val", small_tokenizer())
    assert val == [min(texts, key=lambda text: hashlib.sha256(text.encode()).digest())]


REFUSED = {
    "mark.txt": (b"one\ntwo \xe2\x96\x81", ("mark.txt:2: ", "U+2581", "line 1, column 5")),
    "latin.txt": (b"caf\xe9", ("latin.txt:1: not UTF-8 at byte 0",)),
    "mark.jsonl": (b'{"text": "a"}\n\n{"text": "\\u2581"}', ("mark.jsonl:3: ", "U+2581")),
    "half.jsonl": (b'{"text": "\\ud83d"}', ("half.jsonl:1: ", "surrogate")),
    "bad.jsonl": (b'{"text": "a"}\nnot json', ("bad.jsonl:2: not JSON",)),
    "list.jsonl": (b"[1]", ("list.jsonl:1: ", '{"text": "..."}', "list")),
    "key.jsonl": (b'{"body": "a"}', ("key.jsonl:1: ", "body")),
    "latin.jsonl": (b'{"text": "caf\xe9"}', ("latin.jsonl:1: not UTF-8 at byte 13",)),
    "cut.jsonl.gz": (gzip.compress(json_lines(make_texts(9)))[:-20], ("cut.jsonl.gz", "damaged")),
    "no.txt.gz": (b"plain", ("no.txt.gz: damaged",)),
    "cut.txt.zst": (zstandard.compress(os.urandom(9999))[:-20], ("cut.txt.zst", "not complete")),
    "no.txt.zst": (b"plain text", ("no.txt.zst: damaged",)),
    "picture.png": (b"x", ("picture.png: expected a file ending in",)),
    "blank.jsonl": (b"\n\n", ("no document with any text",)),
    "one.jsonl": (b'{"text": "a single document"}', ("none left for training", "--val")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_texts(tmp_path, capsys, model_file, name):
    content, expected = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    outcome = run_main(capsys, "text", tmp_path / name, "--tokenizer", model_file, "--out", out)
    assert_one_error(outcome, 2, *expected)
    assert not list(out.rglob("*.*"))


def test_refused_sizes(tmp_path, capsys, model_file, monkeypatch):
    monkeypatch.setattr(shards, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "other.txt").write_text("another text")
    (tmp_path / "big.txt").write_bytes(b"x" * (1 << 20) + b"y")
    (tmp_path / "bomb.txt.zst").write_bytes(zstandard.compress(b"x" * (1 << 26)))
    (tmp_path / "big.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * (2 << 20))
    argv = (tmp_path / "other.txt", "--tokenizer", model_file, "--out", tmp_path / "out")
    for name in ("big.txt", "bomb.txt.zst"):
        outcome = run_main(capsys, "text", tmp_path / name, *argv)
        assert_one_error(outcome, 2, f"{name}: over 1 MiB", ".jsonl", "--split-on")
    outcome = run_main(capsys, "text", tmp_path / "big.jsonl", *argv)
    assert_one_error(outcome, 2, "big.jsonl:2: ")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "docs|text|fineweb|adopt"),
        (["docs", "--vocab-size", "100"], "261..65536"),
        (["docs", "--wrong"], "--wrong"),
        (["text"], "PATH"),
        (["text", "missing.txt"], "missing.txt: no such file"),
        (["text", "folder"], "folder: no .txt"),
        (["text", "a.txt", "--val-fraction", "0.9"], "at most 0.5"),
        (["text", "a.txt", "--val-fraction", "nan"], "at most 0.5"),
        (["text", "a.txt", "--name", "../up"], "--name '../up'"),
        (["text", "a.txt", "--name", "docs"], "--name 'docs'"),
        (["text", "a.txt", "--tokenizer", "a.txt"], "a.txt: not a SentencePiece model"),
        (["text", "a.txt", "--tokenizer", "none.model"], "none.model: no such tokenizer"),
        (["text", "a.txt", "--tokenizer", "given.model", "--vocab-size", "999"], "has 320"),
        (["fineweb", "--variant", "sp512"], "sp512"),
        (["fineweb"], "--variant"),
        (["fineweb", "--variant", "sp1024", "--train-shards", "-1"], "-1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_command_lines(tmp_path, capsys, monkeypatch, model_file, argv, expected):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("folder").mkdir()
    outcome = run_main(capsys, *argv, *(["--out", "out"] if argv else []))
    assert_one_error(outcome, 2, expected)
    assert not Path("out").exists()


def test_refused_tokenizers(tmp_path):
    import sentencepiece

    def train(**changes) -> Path:
        model = io.BytesIO()
        defaults = {"model_type": "bpe", "vocab_size": 300, "bos_id": 1, "unk_id": 0}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([words(300, seed=i) for i in range(10)]),
            model_writer=model,
            minloglevel=2,
            hard_vocab_limit=False,
            **{**defaults, **changes},
        )
        (tmp_path / "other.model").write_bytes(model.getvalue())
        return tmp_path / "other.model"

    with pytest.raises(prepare.BadInput, match="no byte pieces"):
        prepare.load_tokenizer(train())
    with pytest.raises(prepare.BadInput, match="BOS is id 2"):
        prepare.load_tokenizer(train(byte_fallback=True, bos_id=2, eos_id=1))
    # A dummy prefix is fine: its space is not text.
    tokenizer = prepare.load_tokenizer(train(byte_fallback=True, add_dummy_prefix=True))
    (ids,) = tokenizer.encode(["bake lo"])
    assert tokenizer.dummy_prefix
    assert tokenizer.decoded_bytes(ids) == tokenizer.counted_bytes(ids) == 7
    assert tokenizer.piece_bytes[ids].sum() == 8


def test_a_tokenizer_in_use_is_not_replaced(tmp_path, capsys, model_file):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(make_texts(9, seed=seed)))
    out = tmp_path / "out"
    argv = ("--tokenizer", model_file, "--out", out)
    assert run_main(capsys, "text", tmp_path / "a.jsonl", *argv)[0] == 0
    other = prepare.train_tokenizer([words(4000, seed=9)], VOCAB, 0)
    model_file.write_bytes(other)
    outcome = run_main(capsys, "text", tmp_path / "b.jsonl", *argv)
    assert_one_error(outcome, 2, "given.model", "another tokenizer of this name")
    assert (out / "tokenizers/given.model").read_bytes() == model_bytes()


# What people's files are like


def built(capsys, tmp_path: Path, *argv: object) -> tuple[dict, dict[str, list[str]], str]:
    """Build a data set named t into out/; return its sidecar, its texts by split and stdout."""
    model = tmp_path / "given.model"
    model.write_bytes(model_bytes())
    options = ("--name", "t", "--tokenizer", model, "--out", tmp_path / "out")
    code, stdout, stderr = run_main(capsys, "text", *argv, *options)
    assert (code, stderr) == (0, "")
    folder = tmp_path / "out" / "datasets" / f"t_sp{VOCAB}"
    texts = {split: read_split(folder, split, small_tokenizer()) for split in ("train", "val")}
    return prepare.read_json(folder / prepare.SIDECAR), texts, stdout


def all_texts(texts: dict[str, list[str]]) -> list[str]:
    return sorted(texts["train"] + texts["val"])


MARKED = "\ufeff".encode()
OBJECTS = [{"text": f"text {i}", "n": 10**i} for i in range(9)]
FORMS = {
    "a.json": json.dumps(OBJECTS, indent=1).encode(),
    "b.json": b"".join(json.dumps(x).encode() + b"\n" for x in OBJECTS),
    "c.json": MARKED + json.dumps([x["text"] for x in OBJECTS]).encode(),
    "d.json.gz": gzip.compress(json.dumps(OBJECTS).encode()),
    "e.jsonl": b"".join(b'{"content": "%s", "n": 1}\n' % x["text"].encode() for x in OBJECTS),
    "f.jsonl": MARKED + b"\r\n".join(json.dumps(x).encode() for x in OBJECTS),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_texts_in_every_form(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(FORMS[name])
    _, texts, _ = built(capsys, tmp_path, tmp_path / name)
    assert all_texts(texts) == [x["text"] for x in OBJECTS]


json_texts = st.text(st.characters(exclude_characters="\0\u2581", exclude_categories=["Cs"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(json_texts, max_size=9), st.booleans(), st.sampled_from([None, 0, 2]), st.data())
def test_json_arrays_are_read_in_blocks_of_any_size(texts, escaped, indent, data):
    """However a file is cut into blocks, its values are those that json reads at once."""
    values = [{"text": text, "more": [1.5e9, None, {"a": []}]} for text in texts]
    content = json.dumps(values, ensure_ascii=escaped, indent=indent).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=30)))
    blocks = [content[a:b] for a, b in itertools.pairwise([0, *cuts, len(content)])]
    found = list(documents.json_values(blocks, "here"))
    assert [documents.object_text(value, None) for value in found] == texts


@pytest.mark.parametrize(
    "content",
    [b"[", b'["1", "2"', b'[{"text": "a"}] more', b"{", b"[}", b"]", b"[" * 99_999, b'["a" "b"'],
    ids=range(8),
)
def test_broken_json_is_refused(tmp_path, capsys, model_file, content):
    (tmp_path / "a.json").write_bytes(content)
    argv = ("text", tmp_path / "a.json", "--tokenizer", model_file, "--out", tmp_path / "out")
    assert_one_error(run_main(capsys, *argv), 2, "a.json")


def test_the_text_has_another_key(tmp_path, capsys, model_file):
    lines = "".join(json.dumps({"body": f"text {i}", "title": "t"}) + "\n" for i in range(9))
    (tmp_path / "a.jsonl").write_text(lines)
    _, texts, _ = built(capsys, tmp_path, tmp_path / "a.jsonl", "--text-key", "body")
    assert all_texts(texts) == [f"text {i}" for i in range(9)]
    # A "content" beside another string may not be the text.
    (tmp_path / "b.jsonl").write_text('{"content": "a", "title": "b"}')
    argv = ("text", tmp_path / "b.jsonl", "--tokenizer", model_file, "--out", tmp_path / "out")
    assert_one_error(run_main(capsys, *argv), 2, "--text-key", "'title'")


def test_parquet(tmp_path, capsys, model_file):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"text {i}" for i in range(700)]
    for name, column in (("a", "text"), ("b", "content"), ("c", "body")):
        table = pyarrow.table({column: texts, "n": range(700)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=300)
    for name, more in (("a", ()), ("b", ()), ("c", ("--text-key", "body"))):
        _, found, _ = built(capsys, tmp_path, tmp_path / f"{name}.parquet", *more)
        assert all_texts(found) == sorted(texts)
        shutil.rmtree(tmp_path / "out")
    argv = ("--tokenizer", model_file, "--out", tmp_path / "out")
    assert_one_error(run_main(capsys, "text", tmp_path / "c.parquet", *argv), 2, "--text-key")
    (tmp_path / "d.parquet").write_bytes(b"PAR1" + bytes(99))
    assert_one_error(run_main(capsys, "text", tmp_path / "d.parquet", *argv), 2, "d.parquet")


def test_parquet_without_pyarrow(tmp_path, capsys, model_file, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    outcome = run_main(capsys, "text", tmp_path / "a.parquet", "--out", tmp_path / "out")
    assert_one_error(outcome, 1, "a.parquet", "pip install pyarrow")


def test_byte_order_marks_are_no_text(tmp_path, capsys):
    for name in ("a.txt", "b.md", "c.txt"):
        (tmp_path / name).write_bytes(MARKED + f"text of {name}".encode())
    paths = [tmp_path / name for name in ("a.txt", "b.md", "c.txt")]
    _, texts, _ = built(capsys, tmp_path, *paths)
    assert all_texts(texts) == ["text of a.txt", "text of b.md", "text of c.txt"]


def test_what_is_read_and_what_is_not_is_said(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.txt").write_text(f"text {i}")
        (source / f"{i}.png").write_bytes(b"x")
    (source / "Makefile").write_text("x")
    (source / "a.JSONL").write_text('{"text": "a"}')
    _, _, stdout = built(capsys, tmp_path, source)
    first = stdout.splitlines()[0]
    assert first.startswith("reading 4 of 8 files: 3 .txt, 1 .jsonl; passed over: 3 .png, 1 ")


# One long text


@pytest.mark.parametrize(
    ("separator", "option"),
    [
        ("\n<|endoftext|>\n", "<|endoftext|>"),
        ("<|endoftext|>", "<|endoftext|>"),
        ("\n", "\\n"),
        ("\n\n", "blank"),
        ("\n \t\n\n", "blank"),
        ("\r\n\r\n", "blank"),
    ],
)
def test_a_text_is_cut_at_separators(tmp_path, capsys, separator, option):
    made = [f"number {i}" for i in range(50)]
    (tmp_path / "a.txt").write_bytes(MARKED + separator.join(made).encode())
    _, texts, _ = built(capsys, tmp_path, tmp_path / "a.txt", "--split-on", option)
    assert all_texts(texts) == sorted(made)


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n|", max_size=60), st.sampled_from(["|", "ab", "\n", "||"]), st.data())
def test_separators_are_found_in_blocks_of_any_size(text, separator, data):
    content = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=9)))
    blocks = [content[a:b] for a, b in itertools.pairwise([0, *cuts, len(content)])]
    pattern = documents.separator_pattern(separator)
    found = [piece for _, piece in documents.separated_pieces(blocks, pattern)]
    assert found == [piece.strip("\n").encode() for piece in text.split(separator)]


def test_split_on_needs_a_text(tmp_path, capsys, model_file):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    argv = ("text", tmp_path / "a.jsonl", "--split-on", "blank", "--tokenizer", model_file)
    assert_one_error(run_main(capsys, *argv, "--out", tmp_path / "out"), 2, "--split-on cuts .txt")


def test_the_last_share_of_one_text_is_held_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    text = words(2000, seed=3) + "\n" + "\u00e9" * 1500 + words(500, seed=4)
    (tmp_path / "a.txt").write_text(text)
    argv = (tmp_path / "a.txt", "--val-fraction", 0.2)
    sidecar, texts, stdout = built(capsys, tmp_path, *argv)
    assert "".join(texts["train"] + texts["val"]) == text
    assert max(len(piece.encode()) for piece in texts["train"] + texts["val"]) <= 1000
    assert 0.19 < sidecar["raw_bytes"] / len(text.encode()) < 0.21
    assert "last 0.2 of one text" in sidecar["split"] and "20.00%" in stdout


@settings(max_examples=200, deadline=None)
@given(
    st.text("a\u00e9\U0001f600 \n", max_size=200),
    st.integers(1, 60),
    st.integers(0, 99),
    st.booleans(),
)
def test_a_long_text_is_cut_without_loss(text, piece_bytes, percent, packed):
    content = text.encode()
    boundary = len(content) * percent // 100
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", max(4, piece_bytes))
        path = Path(name, "a.txt.gz" if packed else "a.txt")
        path.write_bytes(gzip.compress(content) if packed else content)
        found = {
            split: [d.text for d in documents.long_text_documents(path, split, boundary)]
            for split in ("train", "val")
        }
        assert documents.text_size(path) == len(content)
    assert "".join(found["train"] + found["val"]) == text
    assert len("".join(found["train"]).encode()) <= boundary
    assert all(len(piece.encode()) <= max(4, piece_bytes) for piece in sum(found.values(), []))


# Bad documents

BAD_LINES = {
    b'{"text": "a\\u0000b"}': "NUL",
    b'{"text": "\\u2581"}': "U+2581",
    b'{"text": "\\ud800"}': "half a surrogate",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "a"': "not JSON",
    b'{"body": "a"}': "no 'text'",
    b'{"text": 5}': "'text' is no string",
    b'{"text": "' + b"x" * (1 << 20) + b'"}': "too long",
}


def write_bad_lines(path: Path) -> list[str]:
    """Write good lines with a bad one of each kind among them; return the good texts."""
    texts = [f"good {i}" for i in range(3 * len(BAD_LINES))]
    lines = [json.dumps({"text": text}).encode() for text in texts]
    for number, bad in enumerate(BAD_LINES):
        lines.insert(4 * number, bad)
    path.write_bytes(b"\n".join(lines))
    return texts


def test_bad_documents_are_all_named(tmp_path, capsys, model_file, monkeypatch):
    monkeypatch.setattr(shards, "MAX_DOCUMENT_BYTES", 1 << 19)
    write_bad_lines(tmp_path / "a.jsonl")
    argv = ("text", tmp_path / "a.jsonl", "--tokenizer", model_file, "--out", tmp_path / "out")
    code, _, stderr = run_main(capsys, *argv)
    *named, last = stderr.splitlines()
    assert code == 2 and last.startswith(f"error: {len(BAD_LINES)} documents")
    assert "--skip-bad" in last
    for number, line in enumerate(named):
        assert line.startswith(f"bad document: {tmp_path / 'a.jsonl'}:{4 * number + 1}: "), line
    assert len(named) == len(BAD_LINES)
    # Of very many only the first are named.
    (tmp_path / "a.jsonl").write_bytes(b"5\n" * 1000)
    assert run_main(capsys, *argv)[2].count("\n") == documents.BAD_DOCUMENTS_NAMED + 1


def test_bad_documents_are_left_out_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shards, "MAX_DOCUMENT_BYTES", 1 << 19)
    good = write_bad_lines(tmp_path / "a.jsonl")
    sidecar, texts, stdout = built(capsys, tmp_path, tmp_path / "a.jsonl", "--skip-bad")
    assert all_texts(texts) == sorted(good)
    assert sidecar["left_out"] == dict.fromkeys(sorted(BAD_LINES.values()), 1)
    assert f"left out {len(BAD_LINES)} bad documents: " in stdout and "1 NUL" in stdout
    # Another number of them is another input.
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes() + b"\n5")
    argv = ("--skip-bad", "--name", "t", "--tokenizer", tmp_path / "given.model")
    outcome = run_main(capsys, "text", path, *argv, "--out", tmp_path / "out")
    assert_one_error(outcome, 2, "other input")


# Shards made elsewhere


@pytest.fixture
def elsewhere(tmp_path, capsys) -> Path:
    """The folder of a data set without its sidecar."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(make_texts(30)))
    built(capsys, tmp_path, tmp_path / "a.jsonl", "--shard-tokens", 4000, "--val-fraction", 0.3)
    folder = tmp_path / "out" / "datasets" / f"t_sp{VOCAB}"
    (folder / prepare.SIDECAR).rename(tmp_path / "built.json")
    return folder


def test_adopted_shards_are_counted(elsewhere, tmp_path, capsys):
    argv = ("adopt", "--data", elsewhere, "--tokenizer", tmp_path / "given.model")
    before = tree(elsewhere)
    code, stdout, stderr = run_main(capsys, *argv)
    assert (code, stderr) == (0, "") and "done" in stdout
    sidecar = prepare.read_json(elsewhere / prepare.SIDECAR)
    assert before.items() <= tree(elsewhere).items()
    made = prepare.read_json(tmp_path / "built.json")
    unknown = {"raw_bytes", "shared_documents", "split", "builder"}
    assert sidecar.keys() == made.keys()
    assert {key for key in made if sidecar[key] != made[key]} == unknown
    assert "nothing to do" in run_main(capsys, *argv)[1]
    assert "nothing to do" in run_main(capsys, "adopt", elsewhere, *argv[3:])[1]
    # By content: a copy of the tokenizer is as good, and another one of its name is not.
    copy = tmp_path / "copy.model"
    copy.write_bytes((tmp_path / "given.model").read_bytes())
    assert "nothing to do" in run_main(capsys, "adopt", elsewhere, "--tokenizer", copy)[1]
    copy.write_bytes(copy.read_bytes() + b"\xc0\x3e\x01")  # a field that means nothing
    outcome = run_main(capsys, "adopt", elsewhere, "--tokenizer", copy)
    assert_one_error(outcome, 2, str(copy), "not the bytes")


def edit_token(path: Path, number: int, token: int) -> None:
    """Change one token of a shard."""
    content = bytearray(path.read_bytes())
    content[1024 + 2 * number : 1026 + 2 * number] = token.to_bytes(2, "little")
    path.write_bytes(content)


BAD_SHARDS = {
    "a missing shard": (lambda f: (f / "fineweb_train_000001.bin").unlink(), "train_000001"),
    "no validation": (lambda f: [p.unlink() for p in f.glob("*val*.bin")], "val_000000"),
    "a short shard": (lambda f: os.truncate(f / "fineweb_val_000000.bin", 2000), "promises"),
    "a foreign id": (lambda f: edit_token(f / "fineweb_train_000001.bin", 5, VOCAB), "pieces"),
    "no BOS": (lambda f: edit_token(f / "fineweb_train_000000.bin", 0, 5), "not BOS"),
    "another sidecar": (lambda f: (f / "fineweb_val.json").write_text("{}"), "damaged"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards_are_not_adopted(elsewhere, tmp_path, capsys, name):
    change, word = BAD_SHARDS[name]
    change(elsewhere)
    before = tree(elsewhere)
    outcome = run_main(capsys, "adopt", elsewhere, "--tokenizer", tmp_path / "given.model")
    assert_one_error(outcome, 2, str(elsewhere), word)
    assert tree(elsewhere) == before


# Interruption


def own_text_argv(folder: Path, out: Path) -> list[str]:
    """Return a command line that makes about ten shards of the texts in a folder."""
    argv = ["text", folder, "--out", out, "--name", "t", "--vocab-size", VOCAB]
    argv += ["--shard-tokens", 4000, "--val-fraction", 0.2]
    return [str(arg) for arg in argv]


@pytest.fixture(scope="module")
def texts_and_result(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder of texts, and the hashes of what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_bytes(json_lines(make_texts(60)))
    out = tmp_path_factory.mktemp("undisturbed")
    assert prepare.main(own_text_argv(folder, out)) == 0
    return folder, tree(out)


def test_interrupted_before_or_after_any_rename(texts_and_result, tmp_path, monkeypatch):
    """Ctrl-C around every file's appearance; the next run ends with the same bytes."""
    folder, expected = texts_and_result
    assert len(expected) > 8
    rename = os.replace
    for stop in range(0, 200, 3):
        out = tmp_path / str(stop)
        calls = 0

        def replace(source, target, stop=stop):
            nonlocal calls
            calls += 1
            if calls == stop // 2 + 1 and stop % 2 == 0:
                raise KeyboardInterrupt
            rename(source, target)
            if calls == stop // 2 + 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(prepare.os, "replace", replace)
            status = prepare.main(own_text_argv(folder, out))
        if status == 0:
            break
        assert status == 130
        assert (out / "datasets/t_sp320/fineweb_val.json").exists() <= (tree(out) == expected)
        assert prepare.main(own_text_argv(folder, out)) == 0
        assert tree(out) == expected
    assert 12 < stop < 190


def test_killed_at_any_time(texts_and_result, tmp_path):
    """SIGKILL at several moments of one build; the last run ends with the same bytes."""
    folder, expected = texts_and_result
    command = [sys.executable, ROOT / "data" / "prepare.py", *own_text_argv(folder, tmp_path)]
    for delay in (0.3, 0.4, 0.5, 0.6, 0.7):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert all(expected.get(name) == sha for name, sha in tree(tmp_path).items())
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert tree(tmp_path) == expected
    assert not list(tmp_path.rglob(".*.tmp"))


def test_an_interrupted_build_leaves_nothing(texts_and_result, tmp_path, monkeypatch):
    folder, _ = texts_and_result

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "split_rule", interrupted)
    assert prepare.main(own_text_argv(folder, tmp_path)) == 130
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_damage_is_named_and_nothing_is_changed(texts_and_result, tmp_path, capsys):
    """A finished data set that is not as recorded is refused; without it all is built again."""
    folder, expected = texts_and_result
    argv = own_text_argv(folder, tmp_path)
    assert prepare.main(argv) == 0
    data = tmp_path / "datasets/t_sp320"
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_val.json"):
        path = data / name
        content = path.read_bytes()
        path.write_bytes(content[:-9] + (content[:9] if "val_0" in name else b""))
        changed = tree(tmp_path)
        assert_one_error(run_main(capsys, *argv), 2, name)
        assert tree(tmp_path) == changed
        path.write_bytes(content)
    (data / prepare.SIDECAR).unlink()
    assert_one_error(run_main(capsys, *argv), 2, "did not finish it", "adopt")
    shutil.rmtree(data)
    assert prepare.main(argv) == 0
    assert tree(tmp_path) == expected


def test_what_killed_builds_left_is_cleared_away(texts_and_result, tmp_path):
    folder, expected = texts_and_result
    killed = tmp_path / "datasets" / ".t_sp320.building-0123abcd"
    others = [
        tmp_path / "datasets" / f".{name}" / "x"
        for name in ("t_sp3200.building-0123abcd", "t_sp320.building-mine", "t_sp320")
    ]
    for path in (killed / "x", *others):
        path.parent.mkdir(parents=True)
        path.write_text("x")
    assert prepare.main(own_text_argv(folder, tmp_path)) == 0
    assert not killed.exists() and all(path.exists() for path in others)
    for path in others:
        path.unlink()
    assert tree(tmp_path) == expected


def test_two_builds_at_once(texts_and_result, tmp_path, capsys):
    folder, _ = texts_and_result
    with prepare.sole_writer(tmp_path / "datasets/t_sp320"):
        outcome = run_main(capsys, *own_text_argv(folder, tmp_path))
    assert_one_error(outcome, 1, "another prepare.py")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EBADF, 524])
def test_a_file_system_without_locks(texts_and_result, tmp_path, capsys, monkeypatch, number):
    """It is said in one line, and the data set is built."""
    fcntl = pytest.importorskip("fcntl")
    folder, expected = texts_and_result

    def no_lock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    code, _, stderr = run_main(capsys, *own_text_argv(folder, tmp_path))
    assert code == 0 and stderr.startswith("warning: ") and stderr.count("\n") == 1
    assert "no file locks" in stderr and str(tmp_path) in stderr
    assert tree(tmp_path) == expected


def test_two_builds_at_once_without_locks(texts_and_result, tmp_path, capsys, monkeypatch):
    """They do the same work twice, and what is there in the end is whole."""
    folder, expected = texts_and_result
    place, statuses = prepare.place_tokenizer, []

    def other_build_first(new, path):
        monkeypatch.setattr(prepare, "place_tokenizer", place)
        statuses.append(prepare.main(own_text_argv(folder, tmp_path)))
        place(new, path)

    def no_lock(folder):
        return contextlib.nullcontext(False)

    monkeypatch.setattr(prepare, "sole_writer", no_lock)
    monkeypatch.setattr(prepare, "place_tokenizer", other_build_first)
    (tmp_path / "datasets").mkdir()
    outcome = run_main(capsys, *own_text_argv(folder, tmp_path))
    assert statuses == [0] and outcome[0] == 1 and outcome[2].count("\n") == 1
    assert tree(tmp_path) == expected


def test_complete_data_that_cannot_be_written(texts_and_result, tmp_path, capsys, monkeypatch):
    """No lock can be made there, and none is needed to say that nothing is to do."""
    folder, _ = texts_and_result
    assert prepare.main(own_text_argv(folder, tmp_path)) == 0

    def read_only(lock, *args, **more):
        raise OSError(errno.EROFS, "Read-only file system", lock.lock_file)

    monkeypatch.setattr(shards.filelock.FileLock, "acquire", read_only)
    code, stdout, stderr = run_main(capsys, *own_text_argv(folder, tmp_path))
    assert (code, stderr) == (0, "") and "nothing to do" in stdout


def test_disk_full_is_one_line(texts_and_result, tmp_path, capsys, monkeypatch):
    folder, _ = texts_and_result

    def full(path, tokens):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(shards, "write_shard", full)
    outcome = run_main(capsys, *own_text_argv(folder, tmp_path))
    assert_one_error(outcome, 1, "No space left", "free some space", "fineweb_")


def test_a_fault_of_the_program_is_one_line(texts_and_result, tmp_path, capsys, monkeypatch):
    folder, _ = texts_and_result
    monkeypatch.setattr(prepare, "split_rule", lambda survey: survey.nothing)
    outcome = run_main(capsys, *own_text_argv(folder, tmp_path))
    assert_one_error(outcome, 1, "a fault of this program", "AttributeError", "test_prepare.py")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_console_is_no_trouble(texts_and_result, tmp_path, closed):
    folder, expected = texts_and_result
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, ROOT / "data" / "prepare.py", *own_text_argv(folder, tmp_path)]
    done = subprocess.run(command, **{closed: write_end})
    os.close(write_end)
    assert done.returncode == 0
    assert tree(tmp_path) == expected


def test_without_docstrings_of_its_own():
    """PYTHONOPTIMIZE=2 takes __doc__ away."""
    for more in ([], ["text"]):
        command = [sys.executable, "-OO", ROOT / "data" / "prepare.py", *more, "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "None" not in done.stdout.splitlines()


def test_help_and_start_are_fast_and_light():
    code = "import sys, prepare; print('torch' in sys.modules, 'sentencepiece' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "data", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    for command in ([], ["docs"], ["text"], ["fineweb"], ["adopt"]):
        with pytest.raises(SystemExit) as caught:
            prepare.main([*command, "--help"])
        assert caught.value.code == 0
