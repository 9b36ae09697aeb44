"""data/prepare.py on random corpora: a complete data set, or one line that names the place.

The corpora are made from seeds; what is expected of each is worked out here from its documents,
without data/prepare.py, and its shards are read back without it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from test_prepare import ROOT, model_bytes, run_main

from data import prepare
from train_gpt import Config, load_validation

import shards  # isort: skip

FUZZED, FUZZED_IN_CI = 2_000, 50
LARGEST = 1 << 17  # bytes of a document; the real limit would make slow tests
VAL_FRACTION = "0.2"
PUBLISHED = sorted(ROOT.parent.glob("shared/data/tokenizers/*.model"))

# What could be taken for something else: names of pieces, characters that SentencePiece uses
# itself or replaces, white space of every kind, marks that join with their neighbours.
ODD = (
    *("<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0x00>", "\u2585", "\u2047", "\u2580", "\u2582"),
    *(" ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85", "\u200b"),
    *("e\u0301", "\u0301", "\ufb01", "\uff21", "\u212b", "\u1e9b\u0323", "\ufeff", "\ufffd"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u4f60\u597d"),
    *("\x01", "\x1b[31m", "\x7f", "\uffff", "\U0010ffff", "\ue000", "\u202e", '"', "\\", "{}"),
    *("bake", "lo", "torpra", "17", "0", "\u00e9"),
)


def random_text(rng: random.Random) -> str:
    """Return a text of up to a few hundred characters that can be a document; it may be empty."""
    kind, size = rng.random(), int(rng.expovariate(1 / 40))
    if kind < 0.45:
        return "".join(rng.choice(ODD) for _ in range(size))
    if kind < 0.9:
        top = rng.choice([0x7F, 0x2FF, 0xFFFF, 0x10FFFF])
        text = "".join(chr(rng.randint(1, top)) for _ in range(size))
        return re.sub("[\ud800-\udfff\u2581]", "", text)
    return rng.choice(ODD) * rng.choice([0, 1, 200, 2000])


@dataclass
class File:
    """One file to be written: its documents in order, or the complaint it must end in.

    `complaint` is what follows the file's name in the message.
    """

    suffix: str
    content: bytes
    documents: list[str] = field(default_factory=list)
    complaint: str = ""


def packed(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """Return content as a file with this suffix holds it, in one or two frames."""
    cut = rng.randint(0, len(content))
    parts = [content] if rng.random() < 0.7 else [content[:cut], content[cut:]]
    if suffix.lower().endswith(".gz"):
        return b"".join(map(gzip.compress, parts))
    if suffix.lower().endswith(".zst"):
        return b"".join(map(zstandard.compress, parts))
    return content


def random_suffix(rng: random.Random, *kinds: str) -> str:
    """Return a suffix of one of the kinds, packed or not, sometimes in capitals."""
    suffix = rng.choice(kinds) + rng.choice(["", "", ".gz", ".zst"])
    return suffix.upper() if rng.random() < 0.1 else suffix


def json_line(text: str, rng: random.Random) -> bytes:
    """Return one good line: other fields, numbers of any size, escapes or none."""
    value = {"text": text}
    if rng.random() < 0.3:
        value = {"id": "\u2581", "deep": [[{}], None], **value, "more": {"text": 1}}
    line = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.2:
        number = rng.choice(["9" * 6000, "-1e999999", "1.5E+4", "NaN", "-0"])
        line = f'{{"n": {number}, {line[1:]}'
    line = rng.choice(["", "", " ", "\t"]) + line + rng.choice(["", "", " ", "\r"])
    return line.encode()


def good_file(rng: random.Random) -> File:
    """Return a file without a fault."""
    suffix = random_suffix(rng, ".txt", ".md", ".json", ".jsonl", ".jsonl")
    kind = suffix.lower()
    if kind.startswith((".txt", ".md")):
        content = random_text(rng).encode()
        texts = [content.decode().removeprefix("\ufeff")]
    elif re.match(r"\.json\b", kind):
        texts = [random_text(rng) for _ in range(rng.choice([0, 1, 3, 8]))]
        values = [rng.choice([text, {"text": text, "n": 5}]) for text in texts]
        indent = rng.choice([None, 0, 1])
        content = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=indent).encode()
    else:
        texts = [random_text(rng) for _ in range(rng.choice([0, 1, 3, 8]))]
        lines = [json_line(text, rng) for text in texts]
        for _ in range(rng.choice([0, 0, 2])):
            lines.insert(rng.randint(0, len(lines)), rng.choice([b"", b"  ", b"\r"]))
        content = b"\n".join(lines) + rng.choice([b"", b"\n"])
    if not content and suffix.lower().endswith((".gz", ".zst")):
        content = b"\n" if "jsonl" in suffix.lower() else b"text"
        texts = [] if "jsonl" in suffix.lower() else ["text"]
    return File(suffix, packed(content, suffix, rng), texts)


BAD_TEXTS = {  # what must not be in a text, as bytes of a .txt file, and the complaint
    b"a\n b\xe2\x96\x81c": ": a literal U+2581, .* (line 2, column 3 of the document)",
    b"ab\0": ": a NUL character, .* (line 1, column 3 of the document)",
    b"ab\xff": ": not UTF-8 at byte 2;",
    b"a\xed\xa0\x80": ": not UTF-8 at byte 1;",
    b"a\xc0\xaf": ": not UTF-8 at byte 1;",
    b"\xf0\x9f\x98": ": not UTF-8 at byte 0;",
}
BAD_LINES = {
    rb'{"text": "a\u2581"}': ": a literal U+2581, .* (line 1, column 2 of the document)",
    rb'{"text": "\n\u0000"}': ": a NUL character, .* (line 2, column 1 of the document)",
    rb'{"text": "\ud800"}': ": half of a surrogate pair",
    b'{"text": "\xff"}': ": not UTF-8 at byte 10;",
    b'{"text": "a\0"}': ": not JSON (",
    b'{"text": "a"': ": not JSON (",
    b'{"text": "a"} {}': ": not JSON (",
    b'{"text": nope}': ": not JSON (",
    b"[" * 20_000: ": not JSON (",
    b'{"text": 1e999}': ': "text" is not a string',
    b'{"text": null}': ': "text" is not a string',
    b'{"texts\\n": "a"}': ": expected {",
    b'["text"]': ": expected {",
    b"9" * 9_000: ": expected {",
    b"NaN": ": expected {",
    b'"text"': ": expected {",
    b'{"text": "' + b"x" * LARGEST + b'"}': ": a line of over 0 MiB",
}


def bad_file(rng: random.Random) -> File:
    """Return a file with one fault."""
    if rng.random() < 0.2:
        suffix = rng.choice([".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
        whole = packed(json_line("text " * 50, rng) * 3, suffix, random.Random(1))
        content = rng.choice([b"", b"no archive", whole[: rng.randint(1, len(whole) - 1)]])
        return File(suffix, content, complaint=": damaged or cut short (")
    if rng.random() < 0.4:
        suffix = random_suffix(rng, ".txt")
        big = {b"x" * (LARGEST + 1): ": over 0 MiB, and a text file is one document"}
        content, complaint = rng.choice([*BAD_TEXTS.items(), *big.items()])
    else:
        suffix = random_suffix(rng, ".jsonl")
        lines = [json_line(random_text(rng), rng) for _ in range(rng.choice([0, 0, 3]))]
        bad, complaint = rng.choice([*BAD_LINES.items()])
        # A line that is too long is one at the end, too.
        content = b"\n".join([*lines, bad, json_line("after", rng)])
        complaint = f":{len(lines) + 1}{complaint}"
    return File(suffix, packed(content, suffix, rng), complaint=complaint)


def write_folder(folder: Path, rng: random.Random, faults: int) -> tuple[list[str], str | None]:
    """Fill a folder; return the documents in order, and the first message it must end in."""
    files: dict[Path, File] = {}
    names = ["a", "b b", "\u00e4\U0001f600", "c\nd", "..e", "-f", "g\udcff", "*", ".h"]
    # A single text would be cut into documents.
    for made in [good_file(rng) for _ in range(rng.randint(2, 6))] + [
        bad_file(rng) for _ in range(faults)
    ]:
        place = folder.joinpath(*rng.choices(names, k=rng.randint(0, 3)))
        files[place / f"{rng.choice(names)}{len(files)}{made.suffix}"] = made
    for path, made in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.content)
    (folder / "notes.png").write_text("no text file")
    if rng.random() < 0.2:  # what leads back to the same files gives them once
        (folder / "zz loop").symlink_to(folder)
        path = rng.choice(list(files))
        (folder / f"\U0010ffff{files[path].suffix}").symlink_to(path)
    documents: list[str] = []
    for path in sorted(files):
        if complaint := files[path].complaint:
            return [], f"{path}{complaint}"
        documents += files[path].documents
    return [text for text in documents if text], None


def key_of(text: str) -> int:
    """Return what decides the split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_by_hash(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return the training and validation documents by the rule of the README."""
    keys = [key_of(text) for text in documents]
    limit = int(Fraction(VAL_FRACTION) * 2**64)
    if keys and min(keys) >= limit:
        limit = min(keys) + 1
    val = [text for text, key in zip(documents, keys, strict=True) if key < limit]
    return [text for text, key in zip(documents, keys, strict=True) if key >= limit], val


def read_shards(folder: Path, split: str, pieces: list[bytes]) -> tuple[list[str], list[Path]]:
    """Return the texts of a split and its shards, read with nothing but the README."""
    paths, tokens = sorted(folder.glob(f"fineweb_{split}_*.bin")), []
    for number, path in enumerate(paths):
        assert path.name == f"fineweb_{split}_{number:06d}.bin"
        content = path.read_bytes()
        magic, version, count = struct.unpack_from("<3i", content)
        assert (magic, version, len(content)) == (20240520, 1, 1024 + 2 * count)
        assert not any(content[12:1024])
        tokens += struct.unpack_from(f"<{count}H", content, 1024)
    assert tokens[0] == 1
    texts: list[list[bytes]] = []
    for token in tokens:
        if token == 1:
            texts.append([])
        else:
            texts[-1].append(pieces[token])
    return [b"".join(parts).decode() for parts in texts], paths


def piece_texts(tokenizer: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """Return what each piece stands for."""
    texts = []
    for token in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(token)
        byte = tokenizer.is_byte(token)
        texts.append(
            bytes([int(piece[3:5], 16)]) if byte else piece.replace("\u2581", " ").encode()
        )
    return texts


def check_data_set(out: Path, expected: dict[str, list[str]]) -> None:
    """Check that a finished data set is whole, agrees with its sidecar and holds the documents."""
    (folder,) = (out / "datasets").iterdir()
    sidecar = json.loads((folder / "fineweb_val.json").read_bytes())
    model = out / "tokenizers" / sidecar["tokenizer"]["file"]
    pieces = piece_texts(sentencepiece.SentencePieceProcessor(model_file=str(model)))
    found = {split: read_shards(folder, split, pieces) for split in ("train", "val")}
    assert {split: texts for split, (texts, _) in found.items()} == expected
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found["val"][1]}
    assert sidecar["val_shards"] == hashes
    assert sidecar["tokenizer"]["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    size = sum(len(text.encode()) for text in expected["val"])
    assert sidecar["raw_bytes"] == sidecar["encoded_bytes"] == size
    assert sidecar["documents"] == len(expected["val"])
    assert sidecar["train"]["documents"] == len(expected["train"])
    names = {path.name for path in folder.iterdir()}
    shards = {path.name for _, paths in found.values() for path in paths}
    assert names == shards | {"fineweb_val.json"}


def check_corpus(seed: int, place: Path, model: Path, capsys) -> str:
    """Prepare one random corpus and check all of it; return what became of it."""
    rng, source, out = random.Random(seed), place / "in", place / "out"
    documents, complaint = write_folder(source, rng, rng.choice([0, 0, 0, 1, 1, 2]))
    argv: list[object] = ["text", source, "--out", out, "--name", "f", "--workers", 1]
    argv += ["--shard-tokens", rng.choice([7, 100, 10_000])]
    train, val = split_by_hash(documents)
    if rng.random() < 0.25:
        val, val_complaint = write_folder(place / "val", rng, rng.choice([0, 0, 1]))
        if documents and not val_complaint:  # a document of both
            same = place / "val" / "\U0010ffff~same.jsonl"
            same.write_text(json.dumps({"text": documents[0]}))
            val.append(documents[0])
        complaint = val_complaint or complaint
        train = [text for text in documents if text not in set(val)]
        argv += ["--val", place / "val"]
    else:
        argv += ["--val-fraction", VAL_FRACTION]
    own = rng.random() < 0.03
    argv += ["--vocab-size", 270] if own else ["--tokenizer", model]
    if complaint is None and not (train and val):
        complaint = "none left for training" if val else "holds no document"

    status, stdout, stderr = run_main(capsys, *argv)
    if status == 0:
        assert complaint is None and stderr == "" and "\ndone " in stdout
        check_data_set(out, {"train": train, "val": val})
        return "built"
    *named, last = stderr.splitlines()
    assert status == 2 and last.startswith("error: "), stderr
    assert all(line.startswith("bad document: ") for line in named), stderr
    assert all(line.isprintable() and len(line) < 1000 for line in stderr.splitlines()), stderr
    if complaint:
        printed = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in complaint)
        assert re.search(re.escape(printed).replace(r"\.\*", ".*"), stderr), (complaint, stderr)
    else:
        assert own and ("--vocab-size 270: " in stderr or "nothing a tokenizer" in stderr), stderr
    assert not [path for path in out.rglob("*") if path.is_file() and path.name[0] != "."]
    return "refused"


def check_corpora(seeds: range, folder: Path, capsys, monkeypatch) -> dict[str, int]:
    """Check one corpus a seed, each in a folder of its own; return how many ended how."""
    monkeypatch.setattr(shards, "MAX_DOCUMENT_BYTES", LARGEST)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # power cuts are not the subject
    model = folder / "given.model"
    model.write_bytes(model_bytes())
    outcomes = {"built": 0, "refused": 0}
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        try:
            outcomes[check_corpus(seed, place, model, capsys)] += 1
        except BaseException as error:
            error.args = (f"seed {seed}: {error}",)
            raise
    return outcomes


def test_random_corpora(tmp_path, capsys, monkeypatch):
    outcomes = check_corpora(range(FUZZED_IN_CI), tmp_path, capsys, monkeypatch)
    assert min(outcomes.values()) > FUZZED_IN_CI // 5


@pytest.mark.slow
def test_more_random_corpora(tmp_path, capsys, monkeypatch):
    outcomes = check_corpora(range(FUZZED), tmp_path, capsys, monkeypatch)
    assert min(outcomes.values()) > FUZZED // 5
    with capsys.disabled():
        print(f" {FUZZED:,} corpora: {outcomes} ", end="")


# Bytes

BYTES_DOCUMENTS, BYTES_DOCUMENTS_IN_CI = 10_000, 300
TOKENIZERS = ["small", "odd", "docs_1024_bpe.model", *(path.name for path in PUBLISHED)]


def tokenizer_file(name: str, folder: Path) -> Path:
    """Return a tokenizer trained here (on words, or on odd texts), on the docs, or published."""
    found = [path for path in (*PUBLISHED, ROOT / "data/tokenizers" / name) if path.name == name]
    if found and found[0].is_file():
        return found[0]
    if name.endswith(".model"):
        pytest.skip(f"{name} is not here")
    path = folder / f"{name}.model"
    rng = random.Random(0)
    path.write_bytes(
        model_bytes()
        if name == "small"
        else prepare.train_tokenizer(["".join(rng.choices(ODD, k=50)) for _ in range(900)], 700, 0)
    )
    return path


def count_disagreements(name: str, number: int, folder: Path, capsys) -> int:
    """Prepare random documents as a validation split; return how many the trainer counts wrong.

    Right is the UTF-8 length of the text, of the normalised text with a published tokenizer.
    """
    rng, texts = random.Random(number), []
    while len(texts) < number:
        texts += filter(None, [random_text(rng)])
    for side, side_texts in (("train", ["a text of its own"]), ("val", texts)):
        lines = [json.dumps({"text": text}) for text in side_texts]
        (folder / f"{side}.jsonl").write_text("\n".join(lines))
    model = tokenizer_file(name, folder)
    argv = ["text", folder / "train.jsonl", "--val", folder / "val.jsonl", "--name", "bytes"]
    outcome = run_main(capsys, *argv, "--tokenizer", model, "--out", folder / "out")
    assert outcome[0] == 0, outcome
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = tokenizer.vocab_size()
    data = str(folder / f"out/datasets/bytes_sp{size}")
    val = load_validation(Config(data_path=data, tokenizer_path=str(model), vocab_size=size))
    starts = np.flatnonzero(val.tokens == tokenizer.bos_id())
    assert len(starts) == number
    # A token's bytes stand at its predecessor, so a document's from its BOS to before the next.
    counted = np.add.reduceat(np.append(val.target_bytes, 0).astype(np.int64), starts)
    if model in PUBLISHED:
        texts = [tokenizer.normalize(text).replace("\u2581", " ") for text in texts]
    return int((counted != [len(text.encode()) for text in texts]).sum())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_random_documents(name, tmp_path, capsys):
    assert count_disagreements(name, BYTES_DOCUMENTS_IN_CI, tmp_path, capsys) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_more_random_documents(name, tmp_path, capsys):
    assert count_disagreements(name, BYTES_DOCUMENTS, tmp_path, capsys) == 0
