"""Write what train_gpt.py reads: token shards, their tokenizer and a sidecar of facts.

    python data/prepare.py docs                         built-in corpus: offline, about a minute
    python data/prepare.py text books/ notes.jsonl.gz   your own text
    python data/prepare.py fineweb --variant sp1024     the challenge's data: 16 GB to download
    python data/prepare.py adopt --data DIR --tokenizer FILE   shards that are already there

--caseops writes capitals as marks before lower-case letters (caseops.py).

Everything lands in data/datasets/<name>/ and data/tokenizers/ (--out moves both). A data set
appears complete or not at all: it is built in a hidden folder that takes its name at the end.
Only a download fills its folder file by file; its sidecar fineweb_val.json comes last.

Sections: 1 plans, 2 passes over the documents, 3 build, 4 shards made elsewhere, 5 command line.
Beside this file: shards.py (files, shards, tokenizers), documents.py (texts as people have them),
docstrings.py (the built-in corpus), caseops.py (capitals as marks), hub.py (downloads). README.md
has the byte layout.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import functools
import hashlib
import io
import json
import operator
import os
import re
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
try:
    import caseops
    import docstrings
    import documents
    import hub
    import numpy as np
    from documents import BadDocuments, Document, Fault, Reading
    from shards import (
        BOS_ID,
        MAX_VOCAB,
        SIDECAR,
        BadInput,
        Failure,
        ShardWriter,
        Tokenizer,
        appearing,
        complain,
        entry,
        file_sha256,
        installed_version,
        is_whole,
        iter_documents,
        load_tokenizer,
        progress_bar,
        read_json,
        read_shard_header,
        read_tokens,
        say,
        shard_path,
        shard_paths,
        sole_writer,
        train_tokenizer,
        warn,
        write_json,
        write_shard,
    )
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: the package {missing.name} is not installed: pip install -r requirements.txt"
    ) from None

# What benchmarks and tests take from here without this program using it itself.
__all__ = ["write_shard"]

DATA_ROOT = Path(__file__).resolve().parent
REQUIREMENTS = DATA_ROOT.parent / "requirements.txt"
SHARD_TOKENS = 100_000_000
MAX_KEY = 1 << 64  # keys of documents are below it
SIDECAR_FORMAT = 1
# Raised when the same input would give other shards; recorded in every sidecar.
PREPARE_FORMAT = 1
DOCS_VAL_FRACTION = 0.03
TEXT_VAL_FRACTION = 0.01
BATCH_BYTES = 1 << 20
SEPARATOR = "<|endoftext|>"  # what many files have between documents

FINEWEB_VARIANTS = {"sp1024": 1024, "sp2048": 2048, "sp4096": 4096, "sp8192": 8192}
FINEWEB_TRAIN_SHARDS = 80
FINEWEB_REPOSITORY = "willdepueoai/parameter-golf"
CASEOPS_REPOSITORY = "romeerp/parameter-golf-caseops-v1"
FINEWEB_PREFIX = "datasets"
# Says what a download is of, from before its first shard on.
DOWNLOAD_RECORD = ".build.json"


# ---------------------------------------------------------------------------
# 1 Plans: what to build
# ---------------------------------------------------------------------------


@dataclass
class Plan:
    """What to build: where documents come from, how they are split, and where it all goes.

    `documents` and `val_documents` start a fresh reading at each call; without the latter the
    split goes by hash. `versions` are those of the packages that decide the bytes (of the
    documents, too, where `versions_suffice`), `more_options` is what else decides them. With
    `caseops` the shards are of text whose capitals are marked.
    """

    name: str
    out: Path
    vocab_size: int
    documents: Callable[[], Iterator[Document]]
    versions: dict[str, str]
    versions_suffice: bool = False
    val_documents: Callable[[], Iterator[Document]] | None = None
    val_rule: str = "validation given"
    val_fraction: float = DOCS_VAL_FRACTION
    given_tokenizer: Path | None = None
    more_options: dict[str, object] = field(default_factory=dict)
    shard_tokens: int = SHARD_TOKENS
    workers: int = 1
    input_bytes: int = 0
    skip_bad: bool = False
    caseops: bool = False

    @property
    def folder(self) -> Path:
        kind = "case" if self.caseops else "sp"
        return self.out / "datasets" / f"{self.name}_{kind}{self.vocab_size}"

    @property
    def tokenizer_path(self) -> Path:
        kind = "_case" if self.caseops else ""
        name = f"{self.name}_{self.vocab_size}_bpe{kind}.model"
        if self.given_tokenizer:
            name = self.given_tokenizer.name
        return self.out / "tokenizers" / name

    def options(self) -> dict[str, object]:
        """Return what decides the bytes of the result besides the documents."""
        return {
            "prepare": PREPARE_FORMAT,
            "versions": self.versions,
            "vocab_size": self.vocab_size,
            "tokenizer": self.given_tokenizer and file_sha256(self.given_tokenizer),
            "val": "given" if self.val_documents else str(self.val_fraction),
            "shard_tokens": self.shard_tokens,
            **({"transform": caseops.NAME} if self.caseops else {}),
            **self.more_options,
        }

    def written(self, text: str) -> str:
        """Return the text that is tokenized for a document's own."""
        if not self.caseops:
            return text
        marked = caseops.transform(text)
        if caseops.inverse(marked, strict=False) != text:
            raise ValueError("CaseOps would lose some of a text")
        return marked


def docs_plan(
    out: Path,
    vocab_size: int,
    workers: int,
    folders: dict[str, Path] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    mark_capitals: bool = False,
) -> Plan:
    """Return the plan of the built-in corpus; `folders` replaces the installed packages."""
    versions = {"sentencepiece": installed_version("sentencepiece")}
    pinned = folders is None
    if folders is None:
        versions |= {name: installed_version(name) for name in docstrings.PACKAGES}
        warn_of_other_versions(versions)
        folders = {name: docstrings.package_folder(name) for name in docstrings.PACKAGES}
    collect = functools.cache(lambda: docstrings.collect_docs(folders, workers))
    return Plan(
        name="docs",
        out=out,
        vocab_size=vocab_size,
        documents=lambda: iter(collect()),
        versions=versions,
        versions_suffice=pinned and shard_tokens == SHARD_TOKENS,
        val_fraction=DOCS_VAL_FRACTION,
        shard_tokens=shard_tokens,
        workers=workers,
        caseops=mark_capitals,
    )


def warn_of_other_versions(versions: dict[str, str]) -> None:
    """Print one line if installed versions are not those requirements.txt pins."""
    pins = re.findall(r"^([\w-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    other = [f"{n} {versions[n]} (pinned {v})" for n, v in pins if versions.get(n, v) != v]
    if other:
        warn(f"{', '.join(other)}: these shards will differ from other machines' shards")


def text_name(given: str | None, paths: list[Path]) -> str:
    """Return the data set's name: the one given, else that of the first path."""
    ending = r"(\.(txt|md|jsonl|json|parquet))?(\.(gz|zst))?$"
    first = re.sub(ending, "", paths[0].resolve().name, flags=re.IGNORECASE)
    name = given if given is not None else re.sub(r"[^a-z0-9]+", "_", first.lower()).strip("_")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in ("docs", "fineweb10B"):
        raise BadInput(
            f"--name {name!r}: expected letters, digits, '.', '_' or '-', and neither 'docs' nor "
            "'fineweb10B', which this tool uses itself"
        )
    return name


def text_plan(args: argparse.Namespace) -> Plan:
    """Return the plan of `text` from its command line."""
    val_inputs = documents.find_inputs([args.val] if args.val else [])
    val_files = val_inputs.files
    in_val = {os.path.realpath(path) for path in val_files}
    inputs = documents.find_inputs(args.paths)
    files = [path for path in inputs.files if os.path.realpath(path) not in in_val]
    vocab_size = args.vocab_size or 1024
    if args.tokenizer:
        vocab_size = given_vocabulary(args)
    separator = None
    if args.split_on is not None:
        separator = documents.separator_pattern(args.split_on)
        if not any(map(documents.is_text, files + val_files)):
            raise BadInput("--split-on cuts .txt and .md files, and none was given")
    reading = Reading(args.text_key, separator)
    plan = Plan(
        name=text_name(args.name, args.paths),
        out=args.out,
        vocab_size=vocab_size,
        documents=lambda: documents.read_documents(files, reading),
        versions={"sentencepiece": installed_version("sentencepiece")},
        val_fraction=args.val_fraction,
        given_tokenizer=args.tokenizer,
        shard_tokens=args.shard_tokens,
        workers=args.workers,
        input_bytes=sum(path.stat().st_size for path in files),
        skip_bad=args.skip_bad,
        caseops=args.caseops,
    )
    say(inputs.summary())
    if args.val:
        say(f"validation: {val_inputs.summary()}")
        plan.val_documents = lambda: documents.read_documents(val_files, reading)
    elif len(files) == 1 and documents.is_text(files[0]) and not separator:
        plan_long_text(plan, files[0])
    return plan


def given_vocabulary(args: argparse.Namespace) -> int:
    """Return the size of the tokenizer that is given; BadInput where it cannot be meant."""
    tokenizer = load_tokenizer(args.tokenizer)
    if args.vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(
            f"--vocab-size {args.vocab_size}: {args.tokenizer} has {tokenizer.vocab_size}"
        )
    if args.caseops and not tokenizer.marks_capitals:
        raise BadInput(
            f"--caseops: {args.tokenizer} has no pieces for marks of capitals; "
            "leave --caseops or --tokenizer out"
        )
    if tokenizer.marks_capitals and not args.caseops:
        raise BadInput(f"{args.tokenizer}: is for text with marked capitals; add --caseops")
    return tokenizer.vocab_size


def plan_long_text(plan: Plan, path: Path) -> None:
    """Let a plan split one text without separators: its last share is the validation split."""
    boundary = int(documents.text_size(path) * (1 - Fraction(str(plan.val_fraction))))
    plan.documents = lambda: documents.long_text_documents(path, "train", boundary)
    plan.val_documents = lambda: documents.long_text_documents(path, "val", boundary)
    plan.val_rule = f"validation is the last {plan.val_fraction} of one text"
    plan.more_options = {"boundary": boundary}
    say(
        f"one text without separators: its last {plan.val_fraction:.2%} is the validation split "
        "(--split-on cuts it into documents, --val gives another validation text)"
    )
    if SEPARATOR.encode() in documents.text_beginning(path):
        warn(f"{path}: {SEPARATOR} is taken for text; --split-on '{SEPARATOR}' cuts there")


# ---------------------------------------------------------------------------
# 2 Passes over the documents
# ---------------------------------------------------------------------------


class Pass:
    """One reading of all documents: iterating yields each that is used, with its split.

    Documents of `val_documents` come first; of the others those with a key below `threshold` are
    held out. Counts go up as it goes: `documents` and `text_bytes` by split, `empty` documents
    and training documents `shared` with a given validation text, which are dropped. At its end
    `fingerprint` stands for options and documents. Holds 8 bytes in memory for each document of a
    given validation text. Raises BadInput at the end where documents cannot be used.
    """

    def __init__(self, plan: Plan, threshold: int) -> None:
        self.plan = plan
        self.threshold = threshold
        self.bad = BadDocuments(plan.skip_bad)
        self.documents: Counter[str] = Counter()
        self.text_bytes: Counter[str] = Counter()
        self.empty = 0
        self.shared = 0
        self.lowest = MAX_KEY
        options = json.dumps(plan.options(), sort_keys=True)
        self.hash = hashlib.sha256(options.encode())

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        keys = array.array("Q")
        if self.plan.val_documents:
            for document in self._usable(self.plan.val_documents()):
                self.hash.update(b"val" + document.digest)
                keys.append(document.key)
                yield self._counted("val", document)
        given = np.unique(np.array(keys, dtype=np.uint64))
        for document in self._usable(self.plan.documents()):
            self.hash.update(document.digest)
            self.lowest = min(self.lowest, document.key)
            if contains(given, document.key):
                self.shared += 1
            elif document.key < self.threshold:
                yield self._counted("val", document)
            else:
                yield self._counted("train", document)
        self.bad.refuse_if_any()
        if self.bad.left_out:
            self.hash.update(repr(sorted(self.bad.left_out.items())).encode())

    def _usable(self, found: Iterator[Document]) -> Iterator[Document]:
        while document := self._next(found):
            if document.fault:
                self.bad.add(document.place, document.fault)
            elif document.text:
                yield document
            else:
                self.empty += 1

    def _next(self, found: Iterator[Document]) -> Document | None:
        try:
            return next(found, None)
        except BadInput:  # a file that cannot be read on; the bad documents before it are no less
            self.bad.name_all()
            raise

    def _counted(self, split: str, document: Document) -> tuple[str, Document]:
        self.documents[split] += 1
        self.text_bytes[split] += len(document.utf8)
        return split, document

    @property
    def fingerprint(self) -> str:
        return self.hash.hexdigest()


def contains(keys: np.ndarray, key: int) -> bool:
    """Say whether a sorted uint64 array holds `key`."""
    place = int(np.searchsorted(keys, np.uint64(key)))
    return place < len(keys) and int(keys[place]) == key


def survey_documents(plan: Plan) -> Pass:
    """Read every document once, to count and to decide the split; return that pass.

    Raises BadInput where a document cannot be used or a split would be empty.
    """
    share = 0 if plan.val_documents else Fraction(str(plan.val_fraction))
    found = finished_pass(plan, int(share * MAX_KEY))
    number = found.documents
    if number["train"] and not number["val"] and not plan.val_documents:
        # The fraction missed every document: the lowest key is held out.
        found = finished_pass(plan, found.lowest + 1)
        number = found.documents
    if not number["train"] and not number["val"] and not found.shared:
        raise BadInput("the input holds no document with any text")
    if not number["val"]:
        raise BadInput("the validation text (--val) holds no document")
    if not number["train"]:
        raise BadInput(
            f"{number['val'] + found.shared} document(s) and none left for training: give more "
            "documents (--split-on cuts a text into some), or a validation text with --val PATH"
        )
    return found


def finished_pass(plan: Plan, threshold: int) -> Pass:
    """Return a pass that has read everything."""
    found = Pass(plan, threshold)
    with progress_bar(plan.input_bytes, "B", "reading", quiet=not plan.input_bytes) as bar:
        for _, document in found:
            bar.update(max(0, document.position - bar.n))
    return found


def same_documents(survey: Pass) -> Iterator[tuple[str, Document]]:
    """Yield what the survey saw, read again; Failure at the end where it was something else."""
    again = Pass(survey.plan, survey.threshold)
    yield from again
    if again.fingerprint != survey.fingerprint:
        raise Failure(f"{survey.plan.folder}: the input changed while it was read; run it again")


def training_texts(survey: Pass) -> Iterator[str]:
    """Yield the texts of the training split."""
    with progress_bar(survey.text_bytes["train"], "B", "tokenizer text") as bar:
        for split, document in same_documents(survey):
            if split == "train":
                bar.update(len(document.utf8))
                yield survey.plan.written(document.text)


def batches(
    found: Iterable[tuple[str, Document]], limit: int = BATCH_BYTES
) -> Iterator[list[tuple[str, Document]]]:
    """Group documents so that each list holds at most `limit` bytes of text, or one document."""
    batch: list[tuple[str, Document]] = []
    held = 0
    for split, document in found:
        size = len(document.utf8)
        if batch and held + size > limit:
            yield batch
            batch = []
            held = 0
        batch.append((split, document))
        held += size
    if batch:
        yield batch


# ---------------------------------------------------------------------------
# 3 Build
# ---------------------------------------------------------------------------


def build(plan: Plan) -> None:
    """Build the data set of `plan`, or report that it is already there.

    Raises BadInput where the folder holds anything else: what is there is never changed.
    """
    started = time.monotonic()
    folder = plan.folder
    with sole_writer(folder) as locked:
        before = read_json(folder / SIDECAR)
        if before is None and folder.exists() and not is_empty(folder):
            raise BadInput(
                f"{folder}: has no valid {SIDECAR}, so prepare.py did not finish it; move it away, "
                "or take its shards over with prepare.py adopt"
            )
        if before and (damage := dataset_damage(folder, plan.out / "tokenizers", before)):
            raise BadInput(
                f"{damage}; put back what it was, or delete it with {folder} and run this again"
            )
        if before and plan.versions_suffice and recorded_versions(before) == plan.versions:
            return say_complete(folder, before)
        survey = survey_documents(plan)
        if before and entry(before, "builder", "input") == survey.fingerprint:
            return say_complete(folder, before)
        if before:
            raise BadInput(
                f"{folder}: holds a data set of other input, settings or versions; "
                "delete the folder, or build elsewhere (--out, or another --name)"
            )
        say_left_out(survey)
        with hidden_folder(folder, clean=locked) as work:
            sidecar = build_in(work, plan, survey)
            place_tokenizer(work / plan.tokenizer_path.name, plan.tokenizer_path)
            os.rename(work, folder)
    say_done(folder, sidecar, started)


def recorded_versions(sidecar: dict) -> dict:
    """Return the versions that a build of this format recorded; empty for another's."""
    builder = entry(sidecar, "builder")
    if not isinstance(builder, dict) or builder.get("prepare") != PREPARE_FORMAT:
        return {}
    return {name: version for name, version in builder.items() if name not in ("prepare", "input")}


def is_empty(folder: Path) -> bool:
    """Say whether a path is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


@contextlib.contextmanager
def hidden_folder(folder: Path, clean: bool) -> Iterator[Path]:
    """Make a folder beside `folder` to build in; what is left of it at the end is deleted.

    `clean`: delete those of builds that were killed, too; nobody else works there.
    """
    if clean:
        for path in folder.parent.iterdir():
            if re.fullmatch(re.escape(f".{folder.name}.building-") + "[0-9a-f]{8}", path.name):
                shutil.rmtree(path)
    work = folder.with_name(f".{folder.name}.building-{secrets.token_hex(4)}")
    try:
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def build_in(work: Path, plan: Plan, survey: Pass) -> dict:
    """Write a whole data set and its tokenizer into `work`; return its sidecar."""
    path = work / plan.tokenizer_path.name
    if plan.given_tokenizer:
        model = plan.given_tokenizer.read_bytes()
    else:
        say(f"training a tokenizer of {plan.vocab_size:,} pieces")
        size = survey.text_bytes["train"]
        more_options = caseops.TRAINER_OPTIONS if plan.caseops else {}
        model = train_tokenizer(training_texts(survey), plan.vocab_size, size, more_options)
    with appearing(path) as file:
        file.write(model)
    refuse_other_tokenizer(path, plan.tokenizer_path)
    tokenizer = load_tokenizer(path)
    splits = encode_documents(work, survey, tokenizer)
    left_out = dict(sorted(survey.bad.left_out.items()))
    val, train = splits["val"], splits["train"]
    sidecar = {
        "format": SIDECAR_FORMAT,
        "dataset": plan.folder.name,
        "documents": val.documents,
        "tokens": val.tokens,
        "raw_bytes": val.raw_bytes,
        "encoded_bytes": val.encoded_bytes,
        "val_shards": shard_hashes(work, "val"),
        **byte_shard_facts(work, tokenizer, splits.get("val_bytes")),
        "tokenizer": tokenizer.facts(),
        "split": split_rule(survey),
        "shared_documents": 0,
        "train": {"documents": train.documents, "tokens": train.tokens},
        **({"left_out": left_out} if plan.skip_bad else {}),
        "builder": {"prepare": PREPARE_FORMAT, **plan.versions, "input": survey.fingerprint},
    }
    write_json(work / SIDECAR, sidecar)
    say_split("train", train.documents, train.tokens, train.encoded_bytes)
    return sidecar


def split_rule(survey: Pass) -> str:
    """Return the sidecar's sentence on how documents were split."""
    plan = survey.plan
    if plan.val_documents:
        return f"{plan.val_rule}; {survey.shared} training documents that are also in it dropped"
    return (
        f"validation where the first 8 bytes of sha256(text), big-endian, are below "
        f"{survey.threshold} of 2**64 (share {plan.val_fraction})"
    )


def encode_documents(work: Path, survey: Pass, tokenizer: Tokenizer) -> dict[str, ShardWriter]:
    """Write the shards of both splits, and with CaseOps the bytes of each validation token.

    Every document is checked: its tokens stand for exactly the bytes of its text (tokenizers of
    our own) or of the text SentencePiece decodes (given ones, which may normalise).
    """
    plan = survey.plan
    bad = BadDocuments(plan.skip_bad)
    names = ["val", "train", "val_bytes"] if plan.caseops else ["val", "train"]
    writers = {name: ShardWriter(work, name, plan.shard_tokens) for name in names}
    with progress_bar(survey.text_bytes.total(), "B", "tokens") as bar:
        for batch in batches(same_documents(survey)):
            texts = [plan.written(document.text) for _, document in batch]
            encoded = tokenizer.encode(texts, plan.workers)
            for (split, document), text, ids in zip(batch, texts, encoded, strict=True):
                raw_bytes = len(document.utf8)
                bar.update(raw_bytes)
                fault = miscount(plan, tokenizer, text, ids)
                if not fault and plan.caseops and split == "val":
                    fault = add_token_bytes(writers["val_bytes"], tokenizer, document.text)
                if fault:
                    bad.add(document.place, fault)
                    continue
                counted = raw_bytes if plan.caseops else tokenizer.counted_bytes(ids)
                writers[split].add(ids, raw_bytes, counted)
    bad.refuse_if_any()
    if bad.left_out:
        say(f"left out bad documents: {documents.counts(bad.left_out)}")
        survey.bad.left_out.update(bad.left_out)
    for name, writer in writers.items():
        writer.close()
        if not writer.documents:
            raise BadInput(f"{tokenizer.name} miscounts every document of the {name} split")
    return writers


def miscount(plan: Plan, tokenizer: Tokenizer, text: str, ids: np.ndarray) -> Fault | None:
    """Return why a document's tokens do not stand for its text (as it is tokenized), or None."""
    counted = tokenizer.counted_bytes(ids)
    expected = len(text.encode())
    if plan.given_tokenizer:
        expected = tokenizer.decoded_bytes(ids)
    if counted == expected and np.count_nonzero(tokenizer.silent[ids]) == 1:
        return None
    detail = (
        f"the tokens stand for {counted:,} bytes of text, not {expected:,}; "
        f"{tokenizer.name} cannot be used for it"
    )
    return Fault("miscounted by the tokenizer", detail)


def add_token_bytes(writer: ShardWriter, tokenizer: Tokenizer, text: str) -> Fault | None:
    """Append the bytes of the original text that each token of a document stands for.

    Counted are all of them, and apart from that those of the published accounting. Returns why
    the format does not hold them, or None.
    """
    _, counts = caseops.tokens_and_bytes(tokenizer.processor, text)
    if int(counts.max()) > caseops.MAX_TOKEN_BYTES:
        detail = f"one token stands for {counts.max():,} bytes; {caseops.MAX_TOKEN_BYTES:,} can be"
        return Fault("too many bytes a token", detail)
    _, published = caseops.tokens_and_bytes(tokenizer.processor, text, published=True)
    writer.add(counts, int(counts.sum()), int(published.sum()))
    return None


def byte_shard_facts(folder: Path, tokenizer: Tokenizer, counted: ShardWriter | None) -> dict:
    """Return the sidecar's entry about the bytes of each token, if there are such shards.

    `counted` is what made them; nobody knows it of shards made elsewhere.
    """
    if not tokenizer.marks_capitals:
        return {}
    facts = {
        "transform": caseops.NAME,
        "val_bytes": shard_hashes(folder, "val_bytes"),
        "published_bytes": counted.encoded_bytes if counted else None,
    }
    return {"caseops": facts}


def refuse_other_tokenizer(new: Path, path: Path) -> None:
    """Raise BadInput where `path` is there and another tokenizer than `new`: it may be in use."""
    if path.exists() and file_sha256(path) != file_sha256(new):
        raise BadInput(
            f"{path}: another tokenizer of this name is there; "
            "move it away, or build elsewhere (--out, or another --name)"
        )


def place_tokenizer(new: Path, path: Path) -> None:
    """Give a tokenizer file its name in out/tokenizers, unless it is there already."""
    refuse_other_tokenizer(new, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, path)


def shard_hashes(folder: Path, split: str) -> dict[str, str]:
    """Return the sha256 of each shard of a split by name."""
    return {path.name: file_sha256(path) for path in shard_paths(folder, split)}


def recorded_shards(sidecar: dict) -> dict[str, dict[str, str]]:
    """Return the hashes that a sidecar records, by split and name.

    Raises KeyError, TypeError or AttributeError where it is damaged.
    """
    hashes = {"val": dict(sidecar["val_shards"])}
    if "caseops" in sidecar:
        hashes["val_bytes"] = dict(sidecar["caseops"]["val_bytes"])
    return hashes


def dataset_damage(folder: Path, tokenizers: Path, sidecar: dict) -> str:
    """Return what is wrong with a complete data set, or "".

    Validation shards and tokenizer are hashed; training shards are checked by header, size and
    total of tokens.
    """
    try:
        for split, hashes in recorded_shards(sidecar).items():
            if sorted(hashes) != [path.name for path in shard_paths(folder, split)]:
                return f"{folder}: not the validation shards that {SIDECAR} records"
            for name, expected in hashes.items():
                if file_sha256(folder / name) != expected:
                    return f"{folder / name}: not the bytes that {SIDECAR} records"
        facts = sidecar["tokenizer"]
        if file_sha256(tokenizers / facts["file"]) != facts["sha256"]:
            return f"{tokenizers / facts['file']}: not the bytes that {SIDECAR} records"
        tokens = sum(read_shard_header(path) for path in shard_paths(folder, "train"))
        if sidecar["train"]["tokens"] not in (None, tokens):
            return f"{folder}: {tokens:,} training tokens, not {sidecar['train']['tokens']}"
        operator.index(sidecar["tokens"])
    except FileNotFoundError as error:
        return f"{error.filename}: missing"
    except BadInput as error:
        return str(error)
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"{folder / SIDECAR}: damaged"
    return ""


def say_left_out(survey: Pass) -> None:
    """Report the documents that are not used, if there are any."""
    if survey.empty or survey.shared:
        say(
            f"left out {survey.empty:,} empty documents and {survey.shared:,} training "
            "documents that are also in the validation text"
        )
    if left_out := survey.bad.left_out:
        say(f"left out {left_out.total():,} bad documents: {documents.counts(left_out)}")


def say_complete(folder: Path, sidecar: dict) -> None:
    """Report that there is nothing to do."""
    tokens = sidecar["train"]["tokens"]
    train = "" if tokens is None else f"{tokens:,} training tokens, "
    say(f"{folder}: complete ({train}{sidecar['tokens']:,} validation tokens); nothing to do")


def say_split(what: str, number: int | None, tokens: int, size: int | None = None) -> None:
    """Print one split's totals; those not known are left out."""
    facts = [f"tokens:{tokens:,}"]
    if number is not None:
        facts.insert(0, f"documents:{number:,}")
    if size is not None:
        facts.append(f"bytes:{size:,} bytes_per_token:{size / tokens:.4f}")
    say(f"{what} {' '.join(facts)}")


def say_done(folder: Path, sidecar: dict, started: float) -> None:
    """Print the validation split's totals and the closing line."""
    say_split("val", sidecar["documents"], sidecar["tokens"], sidecar["encoded_bytes"])
    seconds = time.monotonic() - started
    say(f"done {folder} tokenizer:{sidecar['tokenizer']['file']} seconds:{seconds:.1f}")


# ---------------------------------------------------------------------------
# 4 Shards made elsewhere: fineweb, adopt
# ---------------------------------------------------------------------------


def download_fineweb(args: argparse.Namespace) -> None:
    """Download a published variant; goes on after an interruption, does nothing when complete."""
    started = time.monotonic()
    usual = CASEOPS_REPOSITORY if args.caseops else FINEWEB_REPOSITORY
    repository = os.environ.get("MATCHED_FINEWEB_REPO_ID", usual)
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", FINEWEB_PREFIX)
    kind = hub.CASEOPS_ENDING if args.caseops else ""
    folder = args.out / "datasets" / f"fineweb10B_{args.variant}{kind}"
    tokenizers = args.out / "tokenizers"
    vocab_size = FINEWEB_VARIANTS[args.variant]
    with sole_writer(folder):
        revision = refuse_mixture(folder, repository)
        sidecar = read_json(folder / SIDECAR)
        if sidecar and all_there(folder, tokenizers, sidecar, args.train_shards):
            refuse_damage(folder, tokenizers, sidecar)
            return say_complete(folder, sidecar)
        with staging_folder(folder) as staging:
            source = hub.Hub(repository, prefix, staging, revision)
            offer = hub.published(source, folder.name, vocab_size, args.skip_manifest)
            if offer.train_shards is not None and args.train_shards > offer.train_shards:
                raise hub.too_many_shards(args.train_shards, source, folder, offer.train_shards)
            path = tokenizers / Path(offer.tokenizer).name
            tokenizer = fetch_tokenizer(source, offer.tokenizer, path, vocab_size, args.caseops)
            request = {"repository": repository, "revision": source.revision}
            write_json(folder / DOWNLOAD_RECORD, {"request": request})
            hub.fetch_shards(source, folder, offer, args.train_shards, args.caseops)
        if sidecar:
            refuse_damage(folder, tokenizers, sidecar)
        else:
            rule = f"as published by {repository} at {source.revision}"
            versions = {"huggingface_hub": installed_version("huggingface_hub")}
            sidecar = counted_sidecar(folder, tokenizer, rule, {**versions, **request})
            write_json(folder / SIDECAR, sidecar)
    say_split("train", None, sum(map(read_shard_header, shard_paths(folder, "train"))))
    say_done(folder, sidecar, started)


def refuse_mixture(folder: Path, repository: str) -> str:
    """Return the revision that the folder's files are of, or main; BadInput for other files.

    The repository may have changed since: shards of two revisions must not be mixed.
    """
    request = entry(read_json(folder / DOWNLOAD_RECORD), "request")
    before = entry(request, "repository")
    if before not in (None, repository):
        raise BadInput(
            f"{folder}: holds files of {before}, not of {repository}; "
            "delete the folder, or download elsewhere (--out)"
        )
    recorded = entry(read_json(folder / SIDECAR), "builder", "revision")
    for revision in (entry(request, "revision"), recorded):
        if isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision):
            return revision
    return "main"


def all_there(folder: Path, tokenizers: Path, sidecar: dict, train_shards: int) -> bool:
    """Say whether no file is missing or cut short, so that a download would change nothing."""
    paths = [shard_path(folder, "train", number) for number in range(train_shards)]
    for hashes in (entry(sidecar, "val_shards"), entry(sidecar, "caseops", "val_bytes")):
        if isinstance(hashes, dict):
            paths += [folder / name for name in hashes if isinstance(name, str)]
    tokenizer = entry(sidecar, "tokenizer", "file")
    has_tokenizer = isinstance(tokenizer, str) and (tokenizers / tokenizer).is_file()
    return has_tokenizer and all(map(is_whole, paths))


def refuse_damage(folder: Path, tokenizers: Path, sidecar: dict) -> None:
    """Raise BadInput where a download is not what its sidecar records."""
    if damage := dataset_damage(folder, tokenizers, sidecar):
        raise BadInput(f"{damage}; delete that file and run the same command again")


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Make room below `folder` for files on their way; nothing of it is left at the end."""
    staging = folder / ".download"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # stays where there is something in it
            folder.rmdir()


def fetch_tokenizer(
    source: hub.Hub, remote: str, path: Path, vocab_size: int, marks_capitals: bool
) -> Tokenizer:
    """Download the published tokenizer, check it, put it in place and return it loaded."""
    staged = source.fetch(remote)
    found = load_tokenizer(staged)
    if found.vocab_size != vocab_size:
        raise BadInput(
            f"{source.repository}: {remote} has {found.vocab_size} pieces, not {vocab_size}"
        )
    if found.marks_capitals != marks_capitals:
        has = "has" if found.marks_capitals else "lacks"
        raise BadInput(
            f"{source.repository}: {remote} {has} marks of capitals; --caseops is for tokenizers "
            "that have them"
        )
    place_tokenizer(staged, path)
    return load_tokenizer(path)


def adopt(folder: Path, tokenizer_path: Path) -> None:
    """Write the sidecar of shards that are there, after checking all of them; needs no network.

    Raises BadInput where a shard is missing or not whole, an id is beyond the vocabulary, a
    split does not start with BOS, or bytes cannot be counted with this tokenizer.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(tokenizer_path)
    for split in ("train", "val"):
        paths = shard_paths(folder, split)
        for number, path in enumerate(paths or [folder]):
            expected = shard_path(folder, split, number)
            if path != expected:
                raise BadInput(f"{expected}: missing; both splits are needed, from 000000 on")
    with sole_writer(folder):
        if (folder / SIDECAR).exists():
            before = read_json(folder / SIDECAR)
            damage = f"{folder / SIDECAR}: damaged"
            if before:
                sha256 = entry(before, "tokenizer", "sha256")
                given = {"file": tokenizer_path.name, "sha256": sha256}
                damage = dataset_damage(
                    folder, tokenizer_path.parent, {**before, "tokenizer": given}
                )
            if damage or not before:
                raise BadInput(f"{damage}; if the shards are right, move {SIDECAR} away first")
            return say_complete(folder, before)
        train = count_train(folder, tokenizer)
        sidecar = counted_sidecar(folder, tokenizer, "as found", {"adopted": True})
        sidecar["train"] = train
        write_json(folder / SIDECAR, sidecar)
    say_split("train", train["documents"], train["tokens"])
    say_done(folder, sidecar, started)


def counted_sidecar(folder: Path, tokenizer: Tokenizer, split: str, builder: dict) -> dict:
    """Return the sidecar of shards made elsewhere: validation counted, training unknown."""
    return {
        "format": SIDECAR_FORMAT,
        "dataset": folder.resolve().name,
        **count_validation(folder, tokenizer),
        "val_shards": shard_hashes(folder, "val"),
        **byte_shard_facts(folder, tokenizer, None),
        "tokenizer": tokenizer.facts(),
        "split": split,
        "shared_documents": None,
        "train": {"documents": None, "tokens": None},
        "builder": {
            "prepare": PREPARE_FORMAT,
            "sentencepiece": installed_version("sentencepiece"),
            **builder,
        },
    }


def refuse_other_ids(place: Path, ids: np.ndarray, tokenizer: Tokenizer) -> None:
    """Raise BadInput where an id is beyond the vocabulary."""
    if int(ids.max()) >= tokenizer.vocab_size:
        raise BadInput(
            f"{place}: token {ids.max()}, but {tokenizer.name} has {tokenizer.vocab_size} pieces"
        )


def refuse_other_start(path: Path, tokens: np.ndarray) -> None:
    """Raise BadInput where a split does not start with a document."""
    if tokens[0] != BOS_ID:
        raise BadInput(f"{path}: the first token is {tokens[0]}, not BOS ({BOS_ID})")


def count_train(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Return documents and tokens of the training shards, every id checked."""
    paths = shard_paths(folder, "train")
    found = {"documents": 0, "tokens": 0}
    with progress_bar(sum(map(read_shard_header, paths)), "token", "training shards") as bar:
        for path in paths:
            tokens = read_tokens(path)
            if path == paths[0]:
                refuse_other_start(path, tokens)
            for block in np.array_split(tokens, -(-len(tokens) // (1 << 24))):
                refuse_other_ids(path, block, tokenizer)
                found["documents"] += int(np.count_nonzero(block == BOS_ID))
                found["tokens"] += len(block)
                bar.update(len(block))
    return found


def count_validation(folder: Path, tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return documents, tokens and bytes of the validation split, by decoding it.

    Where capitals are marked the bytes are those of the files that count them.
    """
    if tokenizer.marks_capitals:
        return count_byte_shards(folder, tokenizer)
    paths = shard_paths(folder, "val")
    number = tokens = encoded = 0
    with progress_bar(sum(map(read_shard_header, paths)), "token", "counting bytes") as bar:
        for ids in iter_documents(paths):
            refuse_other_ids(folder, ids, tokenizer)
            counted = tokenizer.counted_bytes(ids)
            expected = tokenizer.decoded_bytes(ids)
            if counted != expected:
                raise BadInput(
                    f"{folder}: validation document {number:,} is {counted:,} bytes by its "
                    f"pieces but {expected:,} decoded; bytes cannot be counted with "
                    f"{tokenizer.name}"
                )
            number += 1
            tokens += len(ids)
            encoded += counted
            bar.update(len(ids))
    return {"documents": number, "tokens": tokens, "raw_bytes": None, "encoded_bytes": encoded}


def count_byte_shards(folder: Path, tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return documents, tokens and bytes of a validation split by its bytes of each token.

    Raises BadInput where a token has none, or more than it can stand for.
    """
    tokens = [read_tokens(path) for path in shard_paths(folder, "val")]
    refuse_other_start(shard_path(folder, "val", 0), tokens[0])
    counts = []
    for number, ids in enumerate(tokens):
        refuse_other_ids(shard_path(folder, "val", number), ids, tokenizer)
        try:
            counts.append(caseops.read_sidecar(caseops.sidecar_path(folder, number), len(ids)))
        except ValueError as error:
            raise BadInput(str(error)) from None
    ids, token_bytes = np.concatenate(tokens), np.concatenate(counts)
    place = caseops.contradiction(tokenizer.processor, ids, token_bytes)
    if place is not None:
        raise BadInput(
            f"{folder}: validation token {place:,} is said to stand for {token_bytes[place]} "
            "bytes, which it cannot; the byte counts belong to other shards"
        )
    return {
        "documents": int(np.count_nonzero(ids == BOS_ID)),
        "tokens": len(ids),
        "raw_bytes": None,
        "encoded_bytes": int(token_bytes.sum(dtype=np.int64)),
    }


# ---------------------------------------------------------------------------
# 5 Command line
# ---------------------------------------------------------------------------

TEXT_HELP = """\
Files end in .txt or .md (one document a file), .jsonl (one {"text": "..."} a line), .json (an
array of such objects) or .parquet (a column "text"; takes pip install pyarrow). All but parquet
may be packed as .gz or .zst. Folders are searched, and a line says what was read and what was
passed over. A document may have up to 16 MiB. One text alone is cut: its last share is the
validation split.

examples:
  python data/prepare.py text books/
  python data/prepare.py text stories.txt --split-on '<|endoftext|>'
  python data/prepare.py text notes.md --split-on=---
  python data/prepare.py text train.jsonl.zst --val val.jsonl.zst --name mine --vocab-size 4096
  python data/prepare.py text notes/ --tokenizer data/tokenizers/docs_1024_bpe.model
then:
  DATA_PATH=data/datasets/books_sp1024 TOKENIZER_PATH=data/tokenizers/books_1024_bpe.model \\
      python train_gpt.py
"""
FINEWEB_HELP = """\
A training shard holds 100 million tokens (200 MB); the published record runs use 80. Files are
verified before they take their names, and the same command goes on after an interruption.
MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and the
folder inside it; HF_ENDPOINT names another hub.

examples:
  python data/prepare.py fineweb --variant sp1024
  python data/prepare.py fineweb --variant sp1024 --train-shards 1
  python data/prepare.py fineweb --variant sp8192 --caseops
"""
DOCS_HELP = """\
The docstrings of torch, numpy, sympy, networkx and mpmath as requirements.txt pins them: 14 MB
of technical English, the same bytes on every machine.

examples:
  python data/prepare.py docs
  python data/prepare.py docs --caseops
"""
ADOPT_HELP = """\
For shards that came from elsewhere: the challenge's own downloader, another machine, a friend.
Every header and id is checked and the validation bytes are counted by decoding each document;
then the sidecar fineweb_val.json is written beside the shards. Nothing else is changed.

example:
  python data/prepare.py adopt --data data/datasets/fineweb10B_sp1024 \\
      --tokenizer data/tokenizers/fineweb_1024_bpe.model
"""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; `number` is which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (try: {self.prog} --help)")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type for an integer in low..high."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number {low}..{high}")
        return int(text)

    return parse


def given_path(text: str) -> Path:
    """Parse a path for argparse; an empty one, of a variable not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty one")
    return Path(text)


def fraction(text: str) -> float:
    """Parse a share in (0, 0.5] for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 0.5:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number over 0 and at most 0.5")
    return value


def usable_cores() -> int:
    """Return how many processes to use; more than 16 only take memory."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), 16)
    return min(os.cpu_count() or 1, 16)


def build_parser() -> Parser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    about = (__doc__ or "").partition("\nSections:")[0]  # -OO takes the text away
    parser = Parser(prog="prepare.py", description=about, formatter_class=raw)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="docs|text|fineweb|adopt"
    )

    def command(name: str, what: str, epilog: str) -> Parser:
        return commands.add_parser(
            name, help=what, description=what, epilog=epilog, formatter_class=raw
        )

    docs = command("docs", "Build the built-in corpus.", DOCS_HELP)
    text = command("text", "Build a data set of your own text.", TEXT_HELP)
    fineweb = command("fineweb", "Download the challenge's data.", FINEWEB_HELP)
    for sub in (docs, text, fineweb):
        where = "gets datasets/ and tokenizers/ (data/)"
        sub.add_argument("--out", type=given_path, default=DATA_ROOT, help=where)
        marks = "write capitals as marks before lower-case letters"
        sub.add_argument("--caseops", action="store_true", help=marks)
    add_text_options(text)
    add_build_options(docs, vocab_size=1024)
    add_build_options(text, vocab_size=None)
    add = fineweb.add_argument
    add("--variant", choices=FINEWEB_VARIANTS, required=True, help="which tokenizer")
    shard_number = whole_number(1, 100_000)
    add("--train-shards", type=shard_number, default=FINEWEB_TRAIN_SHARDS, help="%(default)s")
    add("--skip-manifest", action="store_true", help="go by file names; for a stale manifest")
    add = command("adopt", "Take over shards that are there.", ADOPT_HELP).add_argument
    add("folder", nargs="?", type=given_path, metavar="DIR", help="the same as --data DIR")
    add("--data", type=given_path, metavar="DIR", help="the folder of the shards")
    add("--tokenizer", type=given_path, required=True, metavar="FILE", help="their tokenizer")
    return parser


def add_text_options(parser: Parser) -> None:
    """Add the options of `text` alone."""
    add = parser.add_argument
    add("paths", nargs="+", type=given_path, metavar="PATH", help="files and folders")
    add("--name", help="data set name (default: after the first PATH)")
    model = "use this SentencePiece model as it is"
    add("--tokenizer", type=given_path, metavar="MODEL", help=model)
    key = 'the text\'s name in JSON objects and parquet (default "text", else a lone "content")'
    add("--text-key", metavar="KEY", help=key)
    cut = 'cut .txt and .md files into documents at this text, or at "blank" lines'
    add("--split-on", metavar="TEXT", help=cut)
    skip = "leave documents that cannot be used out, and count them by reason"
    add("--skip-bad", action="store_true", help=skip)
    held_out = parser.add_mutually_exclusive_group()
    val = "validation text (default: a share of PATH)"
    held_out.add_argument("--val", type=given_path, metavar="PATH", help=val)
    share = "share of documents held out, by hash (default %(default)s)"
    held_out.add_argument("--val-fraction", type=fraction, default=TEXT_VAL_FRACTION, help=share)


def add_build_options(parser: Parser, vocab_size: int | None) -> None:
    """Add the options of `docs` and `text`."""
    add = parser.add_argument
    pieces = whole_number(261, MAX_VOCAB)
    add("--vocab-size", type=pieces, default=vocab_size, help="pieces to train (default 1024)")
    tokens = whole_number(1, 1 << 30)
    add("--shard-tokens", type=tokens, default=SHARD_TOKENS, help="tokens a shard (1e8)")
    processes = whole_number(1, 256)
    cores = "processes (all cores, at most 16)"
    add("--workers", type=processes, default=usable_cores(), help=cores)


def run(argv: list[str] | None) -> None:
    """Do what the command line asks; raises BadInput, Failure or OSError."""
    args = build_parser().parse_args(argv)
    if args.command == "docs":
        plan = docs_plan(
            args.out,
            args.vocab_size,
            args.workers,
            shard_tokens=args.shard_tokens,
            mark_capitals=args.caseops,
        )
        build(plan)
    elif args.command == "text":
        build(text_plan(args))
    elif args.command == "adopt":
        if (args.folder is None) == (args.data is None):
            raise BadInput("adopt: give the folder of the shards once, as --data DIR")
        adopt(args.data or args.folder, args.tokenizer)
    else:
        download_fineweb(args)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return 0, 2 for bad input, 1 for anything in the way, 128 + a signal."""
    status = 1
    try:
        run(argv)
    except (BadInput, Failure) as error:
        complaint = str(error)
        status = error.status
    except ModuleNotFoundError as error:
        complaint = f"the package {error.name} is not installed: pip install -r requirements.txt"
    except MemoryError:
        complaint = "out of memory; free some, or run with --workers 1"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space and run the same command again" if full else ""
        complaint = f"{error.filename or 'writing'}: {error.strerror or error}{advice}"
    except KeyboardInterrupt as stop:
        status = 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
        complaint = "interrupted; nothing half made is left, run the same command again"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        complaint = f"a fault of this program, please report it: {error!r} ({where})"
    else:
        return 0
    complain(f"error: {complaint}")
    return status


def stop(number: int, frame: object) -> NoReturn:
    """End as after Ctrl-C, so that nothing half written stays."""
    raise Stopped(number)


def catch_signals() -> None:
    """Let every signal that asks for the end do what Ctrl-C does, unless it is ignored (nohup)."""
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


if __name__ == "__main__":
    catch_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be of any kind
    sys.exit(main())
