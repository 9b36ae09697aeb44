"""Write what train_gpt.py reads: token shards, their tokenizer and a sidecar of facts.

    python data/prepare.py docs                         built-in corpus: offline, about a minute
    python data/prepare.py text books/ notes.jsonl.gz   your own text
    python data/prepare.py fineweb --variant sp1024     the challenge's data: 16 GB to download

Everything lands in data/datasets/<name>/ and data/tokenizers/ (--out moves both). Files appear
complete or not at all; the sidecar fineweb_val.json comes last, so a folder without one is
unfinished and the same command goes on with it.

Sections: 1 errors, 2 files, 3 shards, 4 tokenizer, 5 documents, 6 build, 7 docs, 8 text,
9 fineweb, 10 command line. data/README.md has the byte layout and the sidecar's fields.
"""

from __future__ import annotations

import argparse
import array
import ast
import codecs
import contextlib
import errno
import functools
import gc
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import operator
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

try:
    import numpy as np
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: the package {missing.name} is not installed: pip install -r requirements.txt"
    ) from None

DATA_ROOT = Path(__file__).resolve().parent
REQUIREMENTS = DATA_ROOT.parent / "requirements.txt"

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
SHARD_TOKENS = 100_000_000
BOS_ID = 1
MAX_VOCAB = 1 << 16
MAX_KEY = 1 << 64  # keys of documents are below it

SIDECAR = "fineweb_val.json"
JOURNAL = ".build.json"
SIDECAR_FORMAT = 1
# Raised when the same input would give other shards; recorded in every sidecar.
PREPARE_FORMAT = 1

DOCS_VAL_FRACTION = 0.03
TEXT_VAL_FRACTION = 0.01
# SentencePiece needs 40 to 70 bytes of memory for each byte of one document.
MAX_DOCUMENT_BYTES = 16 << 20
# The trainer holds its text in memory; beyond this it sees an even sample.
TOKENIZER_TEXT_BYTES = 64 << 20
BATCH_BYTES = 1 << 20
READ_BYTES = 1 << 20

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece


# ---------------------------------------------------------------------------
# 1 Errors
# ---------------------------------------------------------------------------


class BadInput(Exception):
    """What was asked for or given cannot be used: one line, exit status 2."""

    status = 2


class Failure(Exception):
    """The machine, an installed package or the network is in the way: one line, exit status 1."""

    status = 1


class Stopped(KeyboardInterrupt):
    """SIGTERM came."""


class InputChanged(Failure):
    """The documents are not those of the first pass."""


def one_line(text: str) -> str:
    """Return text with what cannot be printed on one line (file names may hold it) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print one line of report at once, also into a pipe."""
    print(one_line(text), flush=True)


def warn(text: str) -> None:
    """Print one line of warning to stderr."""
    print(one_line(f"warning: {text}"), file=sys.stderr, flush=True)


def progress_bar(total: float, unit: str, what: str) -> tqdm:
    """Return a bar with an ETA; in a log it writes a line every half minute at most."""
    on_screen = sys.stderr is not None and sys.stderr.isatty()
    pauses = {} if on_screen else {"mininterval": 30, "delay": 10, "disable": sys.stderr is None}
    return tqdm(total=total, unit=unit, unit_scale=True, desc=what, leave=False, **pauses)


# ---------------------------------------------------------------------------
# 2 Files
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a hidden file that takes the name `path` only when the block ends without error.

    Every OSError of the block names a file; those of a full disk do not by themselves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        with open(hidden, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        hidden.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented ASCII JSON; the file appears complete or not at all."""
    with appearing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode("ascii"))


def read_json(path: Path) -> dict | None:
    """Return the object in a JSON file, or None where it is missing or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def entry(value: object, *keys: str) -> object:
    """Return value[key][key]..., or None where that is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def sole_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a folder; it ends with the process, however that dies.

    Another process that holds it is waited for, or a Failure. Without file locks (Windows) it
    does nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = folder / ".lock"
    with open(lock, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Failure(f"{folder}: another prepare.py is writing here; wait for it") from None
        try:
            yield
        finally:
            if list(folder.iterdir()) == [lock]:
                lock.unlink()
                folder.rmdir()


# ---------------------------------------------------------------------------
# 3 Shards
# ---------------------------------------------------------------------------


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Return folder/fineweb_<split>_<number>.bin with six digits."""
    return folder / f"fineweb_{split}_{number:06d}.bin"


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Return the existing shards of a split ("train" or "val") in order."""
    return sorted(folder.glob(f"fineweb_{split}_" + "[0-9]" * 6 + ".bin"))


def shard_header(count: int) -> bytes:
    """Return the 1,024-byte header of a shard of `count` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, count
    return header.tobytes()


def read_shard_header(path: Path) -> int:
    """Return the token count of a shard whose header and size agree; BadInput otherwise."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(start) < HEADER_BYTES:
        raise BadInput(
            f"{path}: {size:,} bytes, but a shard starts with a header of {HEADER_BYTES:,}"
        )
    magic, version, count = (int(x) for x in np.frombuffer(start, dtype="<i4")[:3])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise BadInput(
            f"{path}: header says magic {magic}, version {version}; "
            f"a token shard has {SHARD_MAGIC}, {SHARD_VERSION}"
        )
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if count < 1 or size != expected:
        raise BadInput(
            f"{path}: the header promises {count:,} tokens ({expected:,} bytes) "
            f"but the file has {size:,} bytes"
        )
    return count


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write a one-dimensional array of ids below 65,536 as one shard."""
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < MAX_VOCAB:
        raise ValueError(f"{path}: token ids must lie in 0..{MAX_VOCAB - 1}")
    with appearing(path) as file:
        file.write(shard_header(len(tokens)))
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def iter_documents(paths: Iterable[Path], block_tokens: int = 1 << 22) -> Iterator[np.ndarray]:
    """Yield every document of consecutive shards as uint16 ids, each starting with BOS.

    Documents may cross shards. Holds one block and one document in memory. Raises BadInput where
    the first token is not BOS or a document is longer than MAX_DOCUMENT_BYTES tokens.
    """
    parts: list[np.ndarray] = []
    held = 0
    for path in paths:
        read_shard_header(path)
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
        if not parts and tokens[0] != BOS_ID:
            raise BadInput(f"{path}: the first token is {tokens[0]}, not BOS ({BOS_ID})")
        for start in range(0, len(tokens), block_tokens):
            block = np.array(tokens[start : start + block_tokens], dtype=np.uint16)
            edges = np.flatnonzero(block == BOS_ID)
            for piece in np.split(block, edges):
                if not len(piece):
                    continue
                if piece[0] == BOS_ID and parts:
                    yield np.concatenate(parts)
                    parts, held = [], 0
                parts.append(piece)
                held += len(piece)
                if held > MAX_DOCUMENT_BYTES:
                    raise BadInput(f"{path}: over {MAX_DOCUMENT_BYTES:,} tokens without a BOS")
    if parts:
        yield np.concatenate(parts)


@dataclass
class SplitProgress:
    """How far one split has got, as of its last finished shard.

    `documents` are entirely in finished shards, and `offset` tokens of the next one; `raw_bytes`
    and `encoded_bytes` count the same documents and `chain` is their hash.
    """

    shards: int = 0
    documents: int = 0
    chain: str = ""
    offset: int = 0
    tokens: int = 0
    raw_bytes: int = 0
    encoded_bytes: int = 0
    done: bool = False


class SplitWriter:
    """Append documents to the shards of one split, going on where `progress` stands.

    The caller starts with the first document that is not entirely written (number
    progress.documents); `save` is called after every finished shard.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shard_tokens: int,
        progress: SplitProgress,
        save: Callable[[], None],
    ) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.progress, self.save = progress, save
        self.skip = progress.offset
        self.buffer = np.empty(shard_tokens, dtype="<u2")
        self.filled = 0

    def add(self, ids: np.ndarray, raw_bytes: int, encoded_bytes: int) -> None:
        """Write one document's ids (BOS included) and count its bytes of text."""
        position, self.skip = self.skip, 0
        while position < len(ids):
            part = ids[position : position + self.shard_tokens - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            position += len(part)
            if self.filled == self.shard_tokens:
                self._finish_shard(offset=position)
        self.progress.documents += 1
        self.progress.offset = 0
        self.progress.raw_bytes += raw_bytes
        self.progress.encoded_bytes += encoded_bytes

    def close(self) -> None:
        """Write the last, shorter shard and mark the split as done."""
        if self.filled:
            self._finish_shard(offset=0)
        self.progress.done = True
        self.save()

    def _finish_shard(self, offset: int) -> None:
        path = shard_path(self.folder, self.split, self.progress.shards)
        write_shard(path, self.buffer[: self.filled])
        self.progress.shards += 1
        self.progress.tokens += self.filled
        self.progress.offset = offset
        self.filled = 0
        self.save()


# ---------------------------------------------------------------------------
# 4 Tokenizer
# ---------------------------------------------------------------------------


def load_tokenizer(path: Path):
    """Return the SentencePieceProcessor of a model file.

    Raises BadInput for a file that is no model, for one without byte fallback (it would lose
    text), with another BOS than id 1 (it would lose document starts), with ids over 16 bits or
    that gives another text back, such as one that ends in a space (it would be counted).
    """
    import sentencepiece

    if not path.is_file():
        raise BadInput(f"{path}: no such tokenizer file")
    try:
        # Not by name: SentencePiece refuses names that are no UTF-8.
        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(path.read_bytes())
        size = tokenizer.vocab_size()
    except RuntimeError:
        raise BadInput(f"{path}: not a SentencePiece model") from None
    if not any(tokenizer.is_byte(i) for i in range(size)):
        raise BadInput(f"{path}: has no byte pieces; train it with byte_fallback=true")
    if tokenizer.bos_id() != BOS_ID:
        raise BadInput(f"{path}: its BOS is id {tokenizer.bos_id()}; shards need id {BOS_ID}")
    if size > MAX_VOCAB:
        raise BadInput(f"{path}: {size:,} pieces; shards hold ids below {MAX_VOCAB:,}")
    if (back := tokenizer.decode(tokenizer.encode("a b"))) != "a b":
        raise BadInput(f"{path}: makes {back!r} of 'a b'; bytes cannot be counted with it")
    return tokenizer


def piece_bytes(tokenizer) -> np.ndarray:
    """Return (vocabulary,) int64: how many bytes of text each token stands for.

    The UTF-8 length of the piece with every U+2581 read as one space; 1 for byte pieces; 0 for
    control, unknown and unused pieces.
    """
    lengths = np.zeros(tokenizer.vocab_size(), dtype=np.int64)
    for token in range(len(lengths)):
        if tokenizer.is_byte(token):
            lengths[token] = 1
        elif not is_silent(tokenizer, token):
            lengths[token] = len(tokenizer.id_to_piece(token).replace(SPACE_MARK, " ").encode())
    return lengths


def is_silent(tokenizer, token: int) -> bool:
    """Say whether a token stands for no text: control, unknown or unused."""
    return tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token)


def has_dummy_prefix(tokenizer) -> bool:
    """Say whether the tokenizer puts a space before every text."""
    return tokenizer.encode("a", out_type=str)[0].startswith(SPACE_MARK)


class PieceBytes:
    """Count the bytes of text of a document's tokens as the trainer does: piece by piece."""

    def __init__(self, tokenizer) -> None:
        ids = range(tokenizer.vocab_size())
        self.lengths = piece_bytes(tokenizer)
        # The space of a dummy prefix is not in the text.
        self.opening = np.zeros(len(ids), dtype=np.int64)
        if has_dummy_prefix(tokenizer):
            self.opening[:] = [tokenizer.id_to_piece(i).startswith(SPACE_MARK) for i in ids]

    def count(self, ids: np.ndarray) -> int:
        """Return the bytes that one document's `ids`, of which the first is BOS, stand for."""
        return int(self.lengths[ids].sum()) - int(self.opening[ids[1:2]].sum())


class DecodedBytes:
    """Count the bytes of text of token sequences by decoding them with SentencePiece."""

    def __init__(self, tokenizer) -> None:
        ids = range(tokenizer.vocab_size())
        self.tokenizer = tokenizer
        self.silent = np.array([is_silent(tokenizer, i) for i in ids])
        self.byte = np.array([tokenizer.is_byte(i) for i in ids])
        # Decoding drops the space of a first piece under some normalizers; text is never first.
        self.guard = tokenizer.encode("a")
        self.guard_bytes = len(tokenizer.decode(self.guard, out_type=bytes))
        self.dummy_prefix = has_dummy_prefix(tokenizer)

    def count(self, ids: np.ndarray) -> int:
        """Return the byte length of one document's text; `ids` may start with BOS."""
        spoken = ids[~self.silent[ids]]
        text = self._decode(spoken)
        if b"\xef\xbf\xbd" in text:
            # U+FFFD may stand for bytes that are no UTF-8 (a document cut inside a character):
            # a byte piece is one byte whatever its neighbours are.
            is_byte = self.byte[spoken]
            length = len(self._decode(spoken[~is_byte])) + int(is_byte.sum())
        else:
            length = len(text)
        return length - int(self.dummy_prefix and len(spoken) > 0)

    def _decode(self, ids: np.ndarray) -> bytes:
        text = self.tokenizer.decode(self.guard + ids.tolist(), out_type=bytes)
        return text[self.guard_bytes :]


def trainer_sentences(texts: Iterable[str], keep_every: int) -> Iterator[str]:
    """Yield pieces of at most 1,000 characters, cut before white space, every `keep_every`-th.

    The trainer ignores sentences over 4,192 bytes, so whole documents would be lost.
    """
    window = 1000
    counter = itertools.count()
    for text in texts:
        start = 0
        while start < len(text):
            end = start + window
            if end < len(text):
                cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
                end = cut if cut > start else end
            if next(counter) % keep_every == 0:
                yield text[start:end]
            start = end


def train_tokenizer(texts: Iterable[str], vocab_size: int, text_bytes: int) -> bytes:
    """Return a SentencePiece model (serialised) trained on `texts`, `text_bytes` long in all.

    The settings of the challenge's tokenizers, except that nothing is normalised. The same texts
    in the same order give the same bytes. Raises BadInput where the vocabulary does not fit.
    """
    import sentencepiece

    model = io.BytesIO()
    keep_every = max(1, -(-text_bytes // TOKENIZER_TEXT_BYTES))
    inner: list[BaseException] = []

    def sentences() -> Iterator[str]:
        """Keep an exception of the texts, which SentencePiece would pass on as one of its own."""
        try:
            yield from trainer_sentences(texts, keep_every)
        except BaseException as error:
            inner.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # A text without spaces would else spell a later space as the three bytes of U+2581.
            required_chars=SPACE_MARK,
            shuffle_input_sentence=False,
            # Recorded in the model, so part of its hash.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise inner[0] if inner else BadInput(trainer_complaint(str(error), vocab_size)) from None
    got = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if got != vocab_size:
        raise BadInput(
            f"--vocab-size {vocab_size}: the training text only yields {got} pieces; "
            f"give more text or --vocab-size {got}"
        )
    return model.getvalue()


def trainer_complaint(message: str, vocab_size: int) -> str:
    """Return one line for an error of the SentencePiece trainer."""
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: bytes and frequent characters alone take "
            f"{needed[1]} pieces; give more than that"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "the training text has nothing a tokenizer can be trained on; give more text"
    return f"--vocab-size {vocab_size}: SentencePiece said {message.splitlines()[0]}"


# ---------------------------------------------------------------------------
# 5 Documents
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One text, where it was found, and how many bytes of input were read up to its end."""

    text: str
    place: str
    position: int = 0

    @functools.cached_property
    def utf8(self) -> bytes:
        """The text as UTF-8."""
        return self.text.encode()

    @functools.cached_property
    def digest(self) -> bytes:
        """The sha256 of the text as UTF-8."""
        return hashlib.sha256(self.utf8).digest()

    @property
    def key(self) -> int:
        """The first 8 bytes of the digest as an integer: it decides the split."""
        return int.from_bytes(self.digest[:8], "big")


def text_complaint(text: str) -> str | None:
    """Return why a text cannot be a document, with the place inside it, or None."""
    for bad, why in (
        (SPACE_MARK, "a literal U+2581, which SentencePiece uses for a space"),
        ("\0", "a NUL character, as in UTF-16 and in files that are no text"),
        ("[\ud800-\udfff]", "half of a surrogate pair, which is no UTF-8"),
    ):
        if found := re.search(bad, text):
            line = text.count("\n", 0, found.start()) + 1
            column = found.start() - (text.rfind("\n", 0, found.start()) + 1) + 1
            return f"{why} (line {line}, column {column} of the document)"
    return None


def batches(documents: Iterable[Document], limit: int = BATCH_BYTES) -> Iterator[list[Document]]:
    """Group documents so that each list holds at most `limit` bytes of text, or one document."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        size = len(document.utf8)
        if batch and held + size > limit:
            yield batch
            batch, held = [], 0
        batch.append(document)
        held += size
    if batch:
        yield batch


# ---------------------------------------------------------------------------
# 6 Build
# ---------------------------------------------------------------------------


@dataclass
class Plan:
    """What to build: where documents come from, how they are split, and where it all goes.

    `documents` and `val_documents` start a fresh pass at each call; without the latter the split
    goes by hash. `request` says cheaply what was asked, to recognise finished work by.
    """

    name: str
    out: Path
    vocab_size: int
    documents: Callable[[], Iterator[Document]]
    request: dict
    versions: dict
    val_documents: Callable[[], Iterator[Document]] | None = None
    val_fraction: float = DOCS_VAL_FRACTION
    given_tokenizer: Path | None = None
    shard_tokens: int = SHARD_TOKENS
    workers: int = 1
    input_bytes: int = 0
    val_threshold: int = field(init=False)

    def __post_init__(self) -> None:
        share = 0 if self.val_documents else Fraction(str(self.val_fraction))
        self.val_threshold = int(share * MAX_KEY)

    @property
    def folder(self) -> Path:
        return self.out / "datasets" / f"{self.name}_sp{self.vocab_size}"

    @property
    def tokenizer_path(self) -> Path:
        name = f"{self.name}_{self.vocab_size}_bpe.model"
        if self.given_tokenizer:
            name = self.given_tokenizer.name
        return self.out / "tokenizers" / name

    def options(self) -> dict:
        """Return what decides the bytes of the result besides the documents."""
        return {
            "prepare": PREPARE_FORMAT,
            "versions": self.versions,
            "vocab_size": self.vocab_size,
            "tokenizer": self.given_tokenizer and file_sha256(self.given_tokenizer),
            "val": "given" if self.val_documents else str(self.val_fraction),
            "shard_tokens": self.shard_tokens,
        }

    def split_rule(self, shared: int) -> str:
        """Return the sidecar's sentence on how documents were split."""
        if self.val_documents:
            return f"validation given; {shared} training documents that are also in it dropped"
        return (
            f"validation where the first 8 bytes of sha256(text), big-endian, are below "
            f"{self.val_threshold} of 2**64 (share {self.val_fraction})"
        )


@dataclass
class Survey:
    """What one pass over all documents found.

    `val_keys` are the sorted keys of the validation documents (uint64); `documents`, `text_bytes`
    and `chains` (of the documents' digests, in order) are per split; `shared` training documents
    were dropped as also in validation, `empty` ones because they have no text.
    """

    fingerprint: str = ""
    val_keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    text_bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    chains: dict[str, str] = field(default_factory=lambda: {"train": "", "val": ""})
    shared: int = 0
    empty: int = 0


def chained(chain: str, document: Document) -> str:
    """Return the hash of the documents in `chain` and one more; "" is the chain of none."""
    return hashlib.sha256(chain.encode() + document.digest).hexdigest()


def survey_documents(plan: Plan) -> Survey:
    """Read every document once: count, decide the split, fingerprint input and options.

    Holds 8 bytes for each validation document. Raises BadInput where a split would be empty.
    """
    total = hashlib.sha256(json.dumps(plan.options(), sort_keys=True).encode())
    found, keys, lowest = Survey(), array.array("Q"), MAX_KEY

    def count(document: Document, split: str) -> None:
        found.documents[split] += 1
        found.text_bytes[split] += len(document.utf8)
        found.chains[split] = chained(found.chains[split], document)
        if split == "val":
            keys.append(document.key)

    for document in plan.val_documents() if plan.val_documents else ():
        if document.text:
            total.update(b"val" + document.digest)
            count(document, "val")
        else:
            found.empty += 1
    given_keys = np.unique(np.array(keys, dtype=np.uint64))
    with progress_bar(plan.input_bytes, "B", "reading") as bar:
        for document in plan.documents():
            bar.update(document.position - bar.n)
            if not document.text:
                found.empty += 1
                continue
            total.update(document.digest)
            lowest = min(lowest, document.key)
            if contains(given_keys, document.key):
                found.shared += 1
            else:
                count(document, "val" if document.key < plan.val_threshold else "train")
    if found.documents["train"] and not found.documents["val"] and not plan.val_documents:
        # The fraction missed every document: take the lowest key, in one more pass.
        plan.val_threshold = lowest + 1
        return survey_documents(plan)
    refuse_empty_split(found.documents, found.shared)
    found.val_keys = np.unique(np.array(keys, dtype=np.uint64))
    found.fingerprint = total.hexdigest()
    return found


def contains(keys: np.ndarray, key: int) -> bool:
    """Say whether a sorted uint64 array holds `key`."""
    place = int(np.searchsorted(keys, np.uint64(key)))
    return place < len(keys) and int(keys[place]) == key


def refuse_empty_split(counts: dict[str, int], shared: int) -> None:
    """Raise BadInput unless both splits have a document."""
    if not counts["train"] and not counts["val"] and not shared:
        raise BadInput("the input holds no document with any text")
    if not counts["val"]:
        raise BadInput("the validation text (--val) holds no document")
    if not counts["train"]:
        raise BadInput(
            f"{counts['val'] + shared} document(s) and none left for training: give more "
            "documents (a .txt file is one), or a validation text of its own with --val PATH"
        )


def split_documents(plan: Plan, survey: Survey, split: str) -> Iterator[Document]:
    """Yield the documents of one split in input order; the keys decide, whatever the source.

    Raises InputChanged at the end unless they were those of the survey.
    """
    given, chain = split == "val" and plan.val_documents, ""
    for document in given() if given else plan.documents():
        held_out = given or contains(survey.val_keys, document.key)
        if document.text and bool(held_out) == (split == "val"):
            chain = chained(chain, document)
            yield document
    if chain != survey.chains[split]:
        raise input_changed(plan)


def input_changed(plan: Plan) -> InputChanged:
    """Return the refusal of documents that are not those of the first pass."""
    return InputChanged(f"{plan.folder}: the input changed while it was read; run it again")


class Journal:
    """The record of a build under way, so that an interrupted one goes on where it stood."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        stored = read_json(self.path) or {}
        self.request = stored.get("request")
        self.fingerprint = stored.get("fingerprint")
        self.tokenizer_sha256 = stored.get("tokenizer_sha256")
        self.splits = {name: SplitProgress() for name in ("val", "train")}
        for name, fresh in self.splits.items():
            kinds = {key: type(value) for key, value in asdict(fresh).items()}
            progress = entry(stored, "splits", name)
            if isinstance(progress, dict) and kinds == {k: type(v) for k, v in progress.items()}:
                self.splits[name] = SplitProgress(**progress)

    def start(self, request: dict, fingerprint: str, rebuild: bool) -> None:
        """Go on where the stored state stands, or start anew.

        Anew after `rebuild` (the folder holds a damaged data set), with another fingerprint or
        with a shard missing. Raises BadInput where shards are there that no build recorded.
        """
        known = rebuild or self.fingerprint is not None
        if rebuild or self.fingerprint != fingerprint or not self.shards_whole():
            for path in itertools.chain(*(shard_paths(self.path.parent, s) for s in self.splits)):
                if not known:
                    raise BadInput(f"{path}: not written by prepare.py; move the folder away")
                path.unlink()
            self.splits = {name: SplitProgress() for name in self.splits}
            self.tokenizer_sha256 = None
        self.request, self.fingerprint = request, fingerprint
        self.save()

    def forget(self) -> None:
        """Make the next build of this folder start anew."""
        self.fingerprint = ""
        self.save()

    def shards_whole(self) -> bool:
        """Say whether every shard recorded as finished is there with the right header and size."""
        try:
            for split, progress in self.splits.items():
                if min(progress.shards, progress.documents, progress.offset) < 0:
                    return False
                for number in range(progress.shards):
                    read_shard_header(shard_path(self.path.parent, split, number))
        except (BadInput, FileNotFoundError):
            return False
        return True

    def save(self) -> None:
        """Write the record."""
        splits = {name: asdict(progress) for name, progress in self.splits.items()}
        fields = ("request", "fingerprint", "tokenizer_sha256")
        write_json(self.path, {**{name: getattr(self, name) for name in fields}, "splits": splits})


def build(plan: Plan) -> None:
    """Build the data set of `plan`, or report that it is already there.

    Raises BadInput where the folder holds a complete data set of other input or settings.
    """
    started = time.monotonic()
    with sole_writer(plan.folder):
        sidecar = read_json(plan.folder / SIDECAR)
        journal = Journal(plan.folder)
        damage = sidecar and dataset_damage(plan.folder, plan.out / "tokenizers", sidecar)
        if sidecar and not damage and journal.request == plan.request:
            return say_complete(plan.folder, sidecar)
        survey = survey_documents(plan)
        if sidecar:
            if entry(sidecar, "builder", "input") != survey.fingerprint:
                raise BadInput(
                    f"{plan.folder}: holds a data set of other input, settings or versions; "
                    "delete the folder, or build elsewhere (--out, or another --name)"
                )
            if not damage:
                return say_complete(plan.folder, sidecar)
            warn(f"{damage}: building {plan.folder.name} again")
            (plan.folder / SIDECAR).unlink()
        if survey.empty or survey.shared:
            say(
                f"left out {survey.empty:,} empty documents and {survey.shared:,} training "
                "documents that are also in the validation text"
            )
        journal.start(plan.request, survey.fingerprint, rebuild=bool(sidecar))
        try:
            tokenizer = prepare_tokenizer(plan, survey, journal)
            for split in ("val", "train"):
                encode_split(plan, survey, tokenizer, journal, split)
        except InputChanged:
            journal.forget()
            raise
        sidecar = built_sidecar(plan, survey, tokenizer, journal)
        write_json(plan.folder / SIDECAR, sidecar)
        for leftover in plan.folder.glob(".*.tmp"):
            leftover.unlink()
    train = journal.splits["train"]
    say_split("train", train.documents, train.tokens, train.encoded_bytes)
    say_done(plan.folder, sidecar, started)


def prepare_tokenizer(plan: Plan, survey: Survey, journal: Journal):
    """Put the tokenizer file in place (trained on the training split, or copied) and load it."""
    path = plan.tokenizer_path
    if not (path.is_file() and file_sha256(path) == journal.tokenizer_sha256):
        if plan.given_tokenizer:
            model = plan.given_tokenizer.read_bytes()
        else:
            say(f"training a tokenizer of {plan.vocab_size:,} pieces")
            size = survey.text_bytes["train"]
            with progress_bar(size, "B", "tokenizer text") as bar:
                model = train_tokenizer(training_texts(plan, survey, bar), plan.vocab_size, size)
        place_tokenizer(path, model)
        journal.tokenizer_sha256 = hashlib.sha256(model).hexdigest()
        journal.save()
    return load_tokenizer(path)


def training_texts(plan: Plan, survey: Survey, bar: tqdm) -> Iterator[str]:
    """Yield the texts of the training split, counting their bytes on `bar`."""
    for document in split_documents(plan, survey, "train"):
        bar.update(len(document.utf8))
        yield document.text


def place_tokenizer(path: Path, model: bytes) -> None:
    """Write out/tokenizers/<file> unless it is there; BadInput where a data set needs another."""
    # Builds of several data sets may share a tokenizer.
    with sole_writer(path.parent, wait=True):
        old = file_sha256(path) if path.is_file() else None
        if old == hashlib.sha256(model).hexdigest():
            return
        for other in sorted(path.parent.parent.glob("datasets/*/")):
            users = (  # finished or under way
                entry(read_json(other / SIDECAR), "tokenizer", "sha256"),
                entry(read_json(other / JOURNAL), "tokenizer_sha256"),
            )
            if old and old in users:
                raise BadInput(
                    f"{path}: another tokenizer of this name is in use by {other.name}; "
                    "build elsewhere (--out, or another --name), or delete both"
                )
        with appearing(path) as file:
            file.write(model)


def encode_split(plan: Plan, survey: Survey, tokenizer, journal: Journal, split: str) -> None:
    """Write the shards of one split from where the journal stands.

    Every document is checked: its tokens stand for exactly the bytes of its text (tokenizers of
    our own) or of the text SentencePiece decodes (given ones, which may normalise).
    """
    progress = journal.splits[split]
    if progress.done:
        return
    pieces, decoded = PieceBytes(tokenizer), DecodedBytes(tokenizer)
    writer = SplitWriter(plan.folder, split, plan.shard_tokens, progress, journal.save)
    documents, before = split_documents(plan, survey, split), ""
    for document in itertools.islice(documents, progress.documents):
        before = chained(before, document)
    if before != progress.chain:
        raise input_changed(plan)
    with progress_bar(survey.text_bytes[split], "B", f"{split} tokens") as bar:
        bar.update(progress.raw_bytes)
        for batch in batches(documents):
            texts = [document.text for document in batch]
            encoded = tokenizer.encode(texts, out_type="numpy", num_threads=plan.workers)
            for document, ids in zip(batch, encoded, strict=True):
                ids = np.concatenate(([BOS_ID], ids)).astype(np.uint16)
                counted = pieces.count(ids)
                expected = decoded.count(ids) if plan.given_tokenizer else len(document.utf8)
                if counted != expected or np.count_nonzero(decoded.silent[ids]) != 1:
                    raise BadInput(
                        f"{document.place}: the tokens stand for {counted:,} bytes of text, not "
                        f"{expected:,}; {plan.tokenizer_path.name} cannot be used for it"
                    )
                writer.add(ids, len(document.utf8), counted)
                progress.chain = chained(progress.chain, document)
                bar.update(len(document.utf8))
    writer.close()


def built_sidecar(plan: Plan, survey: Survey, tokenizer, journal: Journal) -> dict:
    """Return the sidecar of a finished build."""
    val, train = journal.splits["val"], journal.splits["train"]
    return {
        "format": SIDECAR_FORMAT,
        "dataset": plan.folder.name,
        "documents": val.documents,
        "tokens": val.tokens,
        "raw_bytes": val.raw_bytes,
        "encoded_bytes": val.encoded_bytes,
        "val_shards": {p.name: file_sha256(p) for p in shard_paths(plan.folder, "val")},
        "tokenizer": tokenizer_facts(plan.tokenizer_path, tokenizer),
        "split": plan.split_rule(survey.shared),
        "shared_documents": 0,
        "train": {"documents": train.documents, "tokens": train.tokens},
        "builder": {"prepare": PREPARE_FORMAT, **plan.versions, "input": survey.fingerprint},
    }


def tokenizer_facts(path: Path, tokenizer) -> dict:
    """Return the sidecar's entry about a tokenizer file."""
    return {
        "file": path.name,
        "sha256": file_sha256(path),
        "vocab_size": tokenizer.vocab_size(),
        "bos_id": tokenizer.bos_id(),
    }


def dataset_damage(folder: Path, tokenizers: Path, sidecar: dict) -> str | None:
    """Return what is wrong with a complete data set, or None.

    Validation shards and tokenizer are hashed; training shards are checked by header, size and
    total of tokens.
    """
    try:
        if [path.name for path in shard_paths(folder, "val")] != sorted(sidecar["val_shards"]):
            return f"{folder}: not the validation shards the sidecar records"
        for name, expected in sidecar["val_shards"].items():
            if file_sha256(folder / name) != expected:
                return f"{folder / name}: not the bytes the sidecar records"
        facts = sidecar["tokenizer"]
        if file_sha256(tokenizers / facts["file"]) != facts["sha256"]:
            return f"{tokenizers / facts['file']}: not the bytes the sidecar records"
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
    return None


def say_complete(folder: Path, sidecar: dict) -> None:
    """Report that there is nothing to do."""
    tokens = sidecar["train"]["tokens"]
    train = "" if tokens is None else f"{tokens:,} training tokens, "
    say(f"{folder}: complete ({train}{sidecar['tokens']:,} validation tokens); nothing to do")


def say_split(what: str, documents: int | None, tokens: int, size: int | None) -> None:
    """Print one split's totals; those not known are left out."""
    facts = [f"tokens:{tokens:,}"]
    if documents is not None:
        facts.insert(0, f"documents:{documents:,}")
    if size is not None:
        facts.append(f"bytes:{size:,} bytes_per_token:{size / tokens:.4f}")
    say(f"{what} {' '.join(facts)}")


def say_done(folder: Path, sidecar: dict, started: float) -> None:
    """Print the validation split's totals and the closing line."""
    say_split("val", sidecar["documents"], sidecar["tokens"], sidecar["encoded_bytes"])
    seconds = time.monotonic() - started
    say(f"done {folder} tokenizer:{sidecar['tokenizer']['file']} seconds:{seconds:.1f}")


# ---------------------------------------------------------------------------
# 7 docs
# ---------------------------------------------------------------------------

DOCS_PACKAGES = ("torch", "numpy", "sympy", "networkx", "mpmath")
# Written anew by every build of a package.
DOCS_SKIPPED_FILES = {"version.py", "__config__.py"}
# Only in the wheels for Python below 3.12.
DOCS_SKIPPED_FOLDERS = {"numpy/distutils"}
DOCS_PYTHON = (3, 10)


def installed_version(name: str) -> str:
    """Return a package's version without its build tag ("+cpu")."""
    return importlib.metadata.version(name).partition("+")[0]


def warn_of_other_versions(versions: dict[str, str]) -> None:
    """Print one line if installed versions are not those requirements.txt pins."""
    pins = re.findall(r"^([\w-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    other = [f"{n} {versions[n]} (pinned {v})" for n, v in pins if versions.get(n, v) != v]
    if other:
        warn(f"{', '.join(other)}: these shards will differ from other machines' shards")


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(name=name)
    return Path(next(iter(spec.submodule_search_locations)))


def module_files(package: str, folder: Path) -> list[tuple[str, Path]]:
    """Return (package/relative/path.py, file) for a package's modules, sorted by the former."""
    files = []
    for path in folder.rglob("*.py"):
        name = f"{package}/{path.relative_to(folder).as_posix()}"
        skipped = any(name.startswith(f"{part}/") for part in DOCS_SKIPPED_FOLDERS)
        if path.name not in DOCS_SKIPPED_FILES and not skipped:
            files.append((name, path))
    return sorted(files)


def module_docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file in source order, cleaned of indentation.

    A file that Python 3.10 cannot read has none, whichever Python this is; docstrings that could
    not be documents are left out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes(), feature_version=DOCS_PYTHON)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if text and not text_complaint(text):
                found.append(text)
        inner = (ast.stmt, ast.excepthandler, ast.match_case)
        stack.extend(n for n in reversed(list(ast.iter_child_nodes(node))) if isinstance(n, inner))
    return found


def start_worker() -> None:
    """Leave Ctrl-C to the parent and end when the parent is gone, even if it was killed."""
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Syntax trees hold no cycles; looking for some took a quarter of the time.
    gc.disable()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def map_files(paths: list[Path], workers: int) -> Iterator[list[str]]:
    """Yield module_docstrings of each path, in order, with `workers` processes."""
    if workers == 1:
        yield from map(module_docstrings, paths)
        return
    import concurrent.futures
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker) as pool:
        try:
            yield from pool.map(module_docstrings, paths, chunksize=8)
        except BaseException as error:
            # A pool that breaks while it starts another worker raises OSError without an errno.
            unnumbered = isinstance(error, OSError) and error.errno is None
            if unnumbered or isinstance(error, concurrent.futures.process.BrokenProcessPool):
                message = "a worker process was killed; run again with --workers 1"
                raise Failure(message) from None
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def collect_docs(folders: dict[str, Path], workers: int) -> list[Document]:
    """Return one document a module of the packages in `folders`, in order of their digests.

    A docstring that occurs again, in the order of packages and paths, is dropped.
    """
    files = [pair for package in folders for pair in module_files(package, folders[package])]
    say(f"reading the docstrings of {', '.join(folders)}: {len(files):,} files")
    seen: set[str] = set()
    documents = {}
    with progress_bar(len(files), "file", "docstrings") as bar:
        texts = map_files([path for _, path in files], workers)
        for (name, _), docstrings in zip(files, texts, strict=True):
            fresh = [text for text in dict.fromkeys(docstrings) if text not in seen]
            seen.update(fresh)
            if fresh:
                document = Document("\n\n".join(fresh), name)
                documents[document.digest] = document
            bar.update()
    return [documents[digest] for digest in sorted(documents)]


def docs_plan(
    out: Path,
    vocab_size: int,
    workers: int,
    folders: dict[str, Path] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Plan:
    """Return the plan of the built-in corpus; `folders` replaces the installed packages."""
    versions = {"sentencepiece": installed_version("sentencepiece")}
    if folders is None:
        versions |= {name: installed_version(name) for name in DOCS_PACKAGES}
        warn_of_other_versions(versions)
        folders = {name: package_folder(name) for name in DOCS_PACKAGES}
    collect = functools.cache(lambda: collect_docs(folders, workers))
    request = {"docs": versions, "vocab_size": vocab_size, "shard_tokens": shard_tokens}
    return Plan(
        name="docs",
        out=out,
        vocab_size=vocab_size,
        documents=lambda: iter(collect()),
        request={**request, "prepare": PREPARE_FORMAT},
        versions=versions,
        val_fraction=DOCS_VAL_FRACTION,
        shard_tokens=shard_tokens,
        workers=workers,
    )


# ---------------------------------------------------------------------------
# 8 text
# ---------------------------------------------------------------------------

TEXT_KINDS = (".txt", ".jsonl")
TEXT_PACKINGS = ("", ".gz", ".zst")
TEXT_SUFFIXES = tuple(kind + packing for kind in TEXT_KINDS for packing in TEXT_PACKINGS)
# One read of a .zst file may unpack to 30,000 times as much.
ZSTD_READ_BYTES = 4096


def find_inputs(paths: Iterable[Path]) -> list[Path]:
    """Return the text files among `paths` and in the folders among them, each once.

    In the order given, folders sorted by name. Raises BadInput for what is missing, of another
    kind, or a folder without text files.
    """
    found: dict[str, Path] = {}
    for path in paths:
        inside = text_files_in(path) if path.is_dir() else [path]
        if not inside:
            raise BadInput(f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
        for file in inside:
            if not file.exists():
                raise BadInput(f"{file}: no such file or folder")
            if not file.is_file() or not is_text_file(file):
                # Not a pipe: it could be read only once.
                raise BadInput(f"{file}: expected a file ending in {', '.join(TEXT_SUFFIXES)}")
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def text_files_in(folder: Path) -> list[Path]:
    """Return what has a text file's name in a folder and all below it, sorted.

    Links to folders are followed, each real folder once; one that cannot be read is an OSError.
    """

    def stop(error: OSError) -> None:
        raise error

    found, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        found += [path for name in names if is_text_file(path := Path(place, name))]
        real = {os.path.realpath(Path(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = [name for path, name in real.items() if path not in seen]
        seen |= real.keys()
    return sorted(found)


def is_text_file(path: Path) -> bool:
    """Say whether a file's name is one of the kinds that can be read, and none of macOS's own."""
    return path.name.lower().endswith(TEXT_SUFFIXES) and not path.name.startswith("._")


def unpacked_blocks(path: Path, raw: io.BufferedReader) -> Iterator[bytes]:
    """Yield a file's content in small blocks, unpacked by its suffix; BadInput where damaged."""
    try:
        if path.name.lower().endswith((".gz", ".zst")) and not raw.peek(1):
            raise EOFError("0 bytes")
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                while block := unpacked.read(READ_BYTES):
                    yield block
        elif path.name.lower().endswith(".zst"):
            yield from zstd_blocks(raw)
        else:
            while block := raw.read(READ_BYTES):
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path}: damaged or cut short ({error})") from None


def zstd_blocks(raw: io.BufferedReader) -> Iterator[bytes]:
    """Yield the content of consecutive zstd frames; EOFError where they are no whole frames."""
    import zstandard

    frame = None
    while chunk := raw.read(ZSTD_READ_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                unpacked = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            for start in range(0, len(unpacked), READ_BYTES):
                yield unpacked[start : start + READ_BYTES]
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last zstd frame is not complete")


def bounded_lines(blocks: Iterable[bytes], place: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line without its newline); BadInput over MAX_DOCUMENT_BYTES."""
    number, held = 1, bytearray()
    for block in blocks:
        if not held and not block.strip(b"\n"):
            number += len(block)
            continue
        first, *others = block.split(b"\n")
        held += first
        for line in (*others, None):
            if len(held) > MAX_DOCUMENT_BYTES:
                raise BadInput(f"{place}:{number}: a line of over {MAX_DOCUMENT_BYTES >> 20} MiB")
            if line is not None:
                yield number, bytes(held)
                number, held = number + 1, bytearray(line)
    if held:
        yield number, bytes(held)


def whole_text(blocks: Iterable[bytes], place: str) -> bytes:
    """Return the content of a .txt file; BadInput over MAX_DOCUMENT_BYTES."""
    held = bytearray()
    for block in blocks:
        held += block
        if len(held) > MAX_DOCUMENT_BYTES:
            raise BadInput(
                f"{place}: over {MAX_DOCUMENT_BYTES >> 20} MiB, and a .txt file is one document; "
                'split it into documents: several files, or one .jsonl with {"text": ...} lines'
            )
    return bytes(held)


def json_text(line: bytes, place: str) -> str:
    """Return the "text" of one .jsonl line; BadInput where there is none."""
    content = decoded_text(line.removeprefix(codecs.BOM_UTF8), place)
    try:
        # Numbers, of any length, stay numbers but are not worked out.
        value = json.loads(content, parse_int=len, parse_float=len)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: not JSON ({error})") from None
    if not isinstance(value, dict) or "text" not in value:
        keys = str(sorted(value)[:5])[:80] if isinstance(value, dict) else "no object"
        raise BadInput(f'{place}: expected {{"text": "..."}}, got {keys}')
    if not isinstance(value["text"], str):
        raise BadInput(f'{place}: "text" is not a string')
    return value["text"]


def decoded_text(content: bytes, place: str) -> str:
    """Return UTF-8 as text; BadInput with the place of the first byte that is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{place}: not UTF-8 at byte {error.start:,}; convert it, e.g. with iconv"
        ) from None


def file_texts(path: Path, raw: io.BufferedReader) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for each document of one opened file."""
    blocks = unpacked_blocks(path, raw)
    if re.search(r"\.jsonl(\.gz|\.zst)?$", path.name, re.IGNORECASE):
        for number, line in bounded_lines(blocks, str(path)):
            if line.strip():
                yield f"{path}:{number}", json_text(line, f"{path}:{number}")
        return
    yield str(path), decoded_text(whole_text(blocks, str(path)), str(path))


def read_documents(files: Iterable[Path]) -> Iterator[Document]:
    """Yield the documents of text files, empty ones too; BadInput with the place of bad ones."""
    before = 0
    for path in files:
        with open(path, "rb") as raw:
            for place, text in file_texts(path, raw):
                if why := text_complaint(text):
                    raise BadInput(f"{place}: {why}; remove or replace it")
                yield Document(text, place, before + raw.tell())
            before += os.fstat(raw.fileno()).st_size


def text_name(given: str | None, paths: list[Path]) -> str:
    """Return the data set's name: the one given, else that of the first path."""
    first = re.sub(r"(\.(txt|jsonl))?(\.(gz|zst))?$", "", paths[0].resolve().name, flags=re.I)
    name = given if given is not None else re.sub(r"[^a-z0-9]+", "_", first.lower()).strip("_")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in ("docs", "fineweb10B"):
        raise BadInput(
            f"--name {name!r}: expected letters, digits, '.', '_' or '-', and neither 'docs' nor "
            "'fineweb10B', which this tool uses itself"
        )
    return name


def file_stamps(files: Iterable[Path]) -> list[list]:
    """Return [absolute path, size, modification time] of each file."""
    stats = [(os.path.realpath(path), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def text_plan(args: argparse.Namespace) -> Plan:
    """Return the plan of `text` from its command line."""
    val_files = find_inputs([args.val]) if args.val else []
    in_val = {os.path.realpath(path) for path in val_files}
    files = [p for p in find_inputs(args.paths) if os.path.realpath(p) not in in_val]
    vocab_size = args.vocab_size or 1024
    if args.tokenizer:
        vocab_size = load_tokenizer(args.tokenizer).vocab_size()
        if args.vocab_size not in (None, vocab_size):
            raise BadInput(f"--vocab-size {args.vocab_size}: {args.tokenizer} has {vocab_size}")
    return Plan(
        name=text_name(args.name, args.paths),
        out=args.out,
        vocab_size=vocab_size,
        documents=lambda: read_documents(files),
        request={
            "prepare": PREPARE_FORMAT,
            "sentencepiece": installed_version("sentencepiece"),
            "files": file_stamps(files),
            "val": file_stamps(val_files),
            "vocab_size": vocab_size,
            "tokenizer": args.tokenizer and file_sha256(args.tokenizer),
            "val_fraction": None if args.val else str(args.val_fraction),
            "shard_tokens": args.shard_tokens,
        },
        versions={"sentencepiece": installed_version("sentencepiece")},
        val_documents=(lambda: read_documents(val_files)) if args.val else None,
        val_fraction=args.val_fraction,
        given_tokenizer=args.tokenizer,
        shard_tokens=args.shard_tokens,
        workers=args.workers,
        input_bytes=sum(path.stat().st_size for path in files),
    )


# ---------------------------------------------------------------------------
# 9 fineweb
# ---------------------------------------------------------------------------

FINEWEB_VARIANTS = {"sp1024": 1024, "sp2048": 2048, "sp4096": 4096, "sp8192": 8192}
FINEWEB_TRAIN_SHARDS = 80
FINEWEB_REPOSITORY = "willdepueoai/parameter-golf"
FINEWEB_PREFIX = "datasets"
# Seconds between the attempts at one file.
RETRY_PAUSES = (1, 2, 4, 8)


class NotPublished(BadInput):
    """The repository is there but has no such file."""


@dataclass(frozen=True)
class Published:
    """What a repository offers for a variant; None where no manifest says so.

    `tokenizer` is the model's path below the prefix.
    """

    tokenizer: str
    train_shards: int | None = None
    val_shards: int | None = None


class Hub:
    """Files of one revision of a data set repository, through huggingface_hub.

    The revision is that of the first file asked about, so all files belong together. `staging`
    is on the disk of the final place, and nothing goes through the shared cache: a second copy
    of 16 GB would be in the way.
    """

    def __init__(self, repository: str, prefix: str, staging: Path, revision: str) -> None:
        # The cache of hf_xet would be a second copy too.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
        self.library = huggingface_hub
        self.repository, self.prefix, self.staging = repository, prefix.strip("/"), staging
        self.revision = revision

    def remote(self, path: str) -> str:
        """Return the path inside the repository."""
        return f"{self.prefix}/{path}" if self.prefix else path

    def facts(self, path: str):
        """Return size and etag of a file (huggingface_hub's HfFileMetadata)."""
        url = self.library.hf_hub_url(
            self.repository,
            self.remote(path),
            repo_type="dataset",
            revision=self.revision,
            endpoint=hub_address(),
        )
        facts = self._attempt(path, lambda: self.library.get_hf_file_metadata(url))
        if not facts.commit_hash:
            raise Failure(f"{hub_address()} does not answer like a Hugging Face hub (HF_ENDPOINT)")
        self.revision = facts.commit_hash
        return facts

    def fetch(self, path: str, facts=None, tick: Callable[[float], None] | None = None) -> Path:
        """Download a file into the staging folder, whole, and return where it is.

        `facts` are those of the file, if already asked for; `tick` is told of bytes as they
        arrive. Raises NotPublished, BadInput or Failure.
        """
        facts = facts or self.facts(path)
        self.staging.mkdir(parents=True, exist_ok=True)
        require_space(self.staging, facts.size or 0)

        class Ticker(tqdm):
            def __init__(self, *args, **kwargs) -> None:
                # hf_xet reports twice: bytes received, and written as a bar one position below.
                self.counts = not kwargs.get("position")
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float = 1) -> None:
                if tick and self.counts:
                    tick(n)

        def download() -> Path:
            place = self.library.hf_hub_download(
                self.repository,
                self.remote(path),
                repo_type="dataset",
                revision=self.revision,
                endpoint=hub_address(),
                local_dir=self.staging,
                tqdm_class=Ticker,
            )
            refuse_other_bytes(Path(place), facts.size, facts.etag)
            return Path(place)

        return self._attempt(path, download)

    def _attempt(self, path: str, call: Callable):
        for pause in (*RETRY_PAUSES, None):
            try:
                return call()
            except Exception as error:
                reason = self._reason(error, path)
                if pause is None:
                    raise Failure(f"{path}: {reason}; run the same command again") from None
                time.sleep(pause)

    def _reason(self, error: Exception, path: str) -> str:
        """Return why an attempt failed if another may succeed; raise where none can."""
        errors = self.library.errors
        if isinstance(error, (Failure, BadInput)) or getattr(error, "errno", 0) == errno.ENOSPC:
            raise error
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise Failure("HF_HUB_OFFLINE is set: FineWeb can only be downloaded online") from None
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            error = error.__cause__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
            gone = (
                ""
                if self.revision == "main"
                else (f", or its revision {self.revision[:12]}, which the folder has, is gone")
            )
            raise BadInput(
                f"{self.repository}: no such data set repository, or not a public one{gone} "
                "(MATCHED_FINEWEB_REPO_ID chooses it)"
            ) from None
        if status == 404:
            raise NotPublished(f"{self.repository} does not publish {self.remote(path)}") from None
        if status is not None and status < 500 and status not in (408, 429):
            raise Failure(f"{path}: the hub answered {status}") from None
        if status is not None:
            return f"the hub answered {status}, {len(RETRY_PAUSES) + 1} times"
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            return f"cannot reach {hub_address()}: offline, or a proxy is in the way"
        if "Consistency check failed" in str(error):
            return "fewer bytes arrived than the hub announced"
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def hub_address() -> str:
    """Return where the hub is: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def require_space(folder: Path, size: int) -> None:
    """Raise Failure unless the disk of `folder` has room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise Failure(
            f"disk full: {folder} needs {size / 1e9:.2f} GB more and has {free / 1e9:.2f} GB; "
            "free some space and run the same command again"
        )


def refuse_other_bytes(path: Path, size: int | None, etag: str | None) -> None:
    """Delete a file and raise OSError unless it has the size and, if that is a sha256, the etag."""
    got = path.stat().st_size
    if size is not None and got != size:
        path.unlink()
        raise OSError(f"{got:,} bytes arrived of {size:,}")
    if etag and re.fullmatch("[0-9a-f]{64}", etag) and file_sha256(path) != etag:
        path.unlink()
        raise OSError("the bytes that arrived are not those of the published sha256")


def published(hub: Hub, variant: str, skip_manifest: bool) -> Published:
    """Return what the repository offers for a variant, by its manifest or by convention."""
    size, name = FINEWEB_VARIANTS[variant], f"fineweb10B_{variant}"
    if skip_manifest:
        return Published(tokenizer=f"tokenizers/fineweb_{size}_bpe.model")
    try:
        path = hub.fetch("manifest.json")
    except NotPublished as error:
        raise BadInput(f"{error}; try --skip-manifest") from None
    try:
        return read_manifest(json.loads(path.read_bytes()), name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{hub.repository}: manifest.json does not describe {name} "
            f"({type(error).__name__}: {error}); try --skip-manifest"
        ) from None


def read_manifest(manifest: dict, name: str) -> Published:
    """Return a manifest's entry of a data set; ValueError, KeyError or TypeError if it is bad."""
    known = {entry["name"]: entry for entry in manifest["datasets"]}
    if name not in known:
        raise ValueError(f"it lists {', '.join(sorted(known)) or 'nothing'}")
    entry = known[name]
    counts = [entry["stats"][key] for key in ("files_train", "files_val")]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"{counts} shards")
    tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
    tokenizer = tokenizers[entry["tokenizer_name"]]
    paths = [tokenizer.get(key) for key in ("model_path", "path", "vocab_path")]
    models = [path for path in paths if path and path.endswith(".model")]
    if not models or ".." in Path(models[0]).parts:
        raise ValueError(f"no .model file for tokenizer {entry['tokenizer_name']}")
    return Published(models[0], *counts)


def is_whole(path: Path) -> bool:
    """Say whether a shard is there, as long as its header says."""
    with contextlib.suppress(BadInput, FileNotFoundError):
        read_shard_header(path)
        return True
    return False


def fetch_shard(hub: Hub, folder: Path, split: str, number: int, remaining: int, bar: tqdm) -> None:
    """Download one shard, verify size, hash and header, and give it its name.

    Does nothing for one that is there and whole. `remaining` shards, this one too, are missing.
    """
    path = shard_path(folder, split, number)
    if is_whole(path):
        return
    remote = f"datasets/{folder.name}/{path.name}"
    facts = hub.facts(remote)
    size, before = facts.size or 0, bar.n
    bar.total = before + remaining * size
    require_space(folder, remaining * size)
    staged = hub.fetch(remote, facts, bar.update)
    # Attempts that failed have been counted too.
    bar.update(before + size - bar.n)
    try:
        read_shard_header(staged)
    except BadInput as error:
        staged.unlink()
        why = str(error).replace(str(staged), remote)
        raise BadInput(f"{hub.repository}: {why}") from None
    # A shard with its name counts as whole, so its bytes have to be on the disk before.
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, path)


def fetch_shards(hub: Hub, folder: Path, offer: Published, train_shards: int) -> None:
    """Download all validation shards and the first `train_shards` training shards."""
    with progress_bar(0, "B", folder.name) as bar:
        for number in itertools.count():
            if number == offer.val_shards:
                break
            try:
                fetch_shard(hub, folder, "val", number, 1, bar)
            except NotPublished:
                if number == 0 or offer.val_shards is not None:
                    raise
                break
        if extra := shard_paths(folder, "val")[number:]:
            raise BadInput(f"{extra[0]}: {hub.repository} publishes only {number}; delete it")
        missing = [n for n in range(train_shards) if not is_whole(shard_path(folder, "train", n))]
        for done, number in enumerate(missing):
            try:
                fetch_shard(hub, folder, "train", number, len(missing) - done, bar)
            except NotPublished:
                raise too_many_shards(train_shards, hub, folder, number) from None


def too_many_shards(wanted: int, hub: Hub, folder: Path, number: int) -> BadInput:
    """Return the refusal of more training shards than there are."""
    return BadInput(
        f"--train-shards {wanted}: {hub.repository} publishes {number} for {folder.name}"
    )


def count_validation(folder: Path, tokenizer, name: str) -> dict[str, int | None]:
    """Return documents, tokens and encoded bytes of the validation split, by decoding it."""
    pieces, decoded = PieceBytes(tokenizer), DecodedBytes(tokenizer)
    vocab_size = tokenizer.vocab_size()
    paths = shard_paths(folder, "val")
    documents = tokens = encoded = 0
    with progress_bar(sum(map(read_shard_header, paths)), "token", "counting bytes") as bar:
        for ids in iter_documents(paths):
            if int(ids.max()) >= vocab_size:
                raise BadInput(f"{folder}: token {ids.max()}, but {name} has {vocab_size} pieces")
            counted, expected = pieces.count(ids), decoded.count(ids)
            if counted != expected:
                raise BadInput(
                    f"{folder}: validation document {documents:,} is {counted:,} bytes by its "
                    f"pieces but {expected:,} decoded; bytes cannot be counted with {name}"
                )
            documents += 1
            tokens += len(ids)
            encoded += counted
            bar.update(len(ids))
    return {"documents": documents, "tokens": tokens, "raw_bytes": None, "encoded_bytes": encoded}


def fineweb_complete(folder: Path, tokenizers: Path, train_shards: int) -> bool:
    """Say whether nothing is missing; validation shards that are not as recorded are deleted."""
    sidecar = read_json(folder / SIDECAR)
    if not sidecar:
        return False
    if damage := dataset_damage(folder, tokenizers, sidecar):
        warn(f"{damage}: fetching again what is damaged")
        recorded = entry(sidecar, "val_shards")
        for path in shard_paths(folder, "val"):  # the record may name any file
            if entry(recorded, path.name) != file_sha256(path):
                path.unlink()
        return False
    wanted = {shard_path(folder, "train", number) for number in range(train_shards)}
    if not wanted <= set(shard_paths(folder, "train")):
        return False
    say_complete(folder, sidecar)
    return True


def fineweb_sidecar(hub: Hub, folder: Path, path: Path, tokenizer) -> dict:
    """Return the sidecar of a download: validation split counted, training split unknown."""
    return {
        "format": SIDECAR_FORMAT,
        "dataset": folder.name,
        **count_validation(folder, tokenizer, path.name),
        "val_shards": {p.name: file_sha256(p) for p in shard_paths(folder, "val")},
        "tokenizer": tokenizer_facts(path, tokenizer),
        "split": f"as published by {hub.repository} at {hub.revision}",
        "shared_documents": None,
        "train": {"documents": None, "tokens": None},
        "builder": {
            "prepare": PREPARE_FORMAT,
            "sentencepiece": installed_version("sentencepiece"),
            "huggingface_hub": installed_version("huggingface_hub"),
            "repository": hub.repository,
            "revision": hub.revision,
        },
    }


def download_fineweb(
    out: Path, variant: str, train_shards: int, skip_manifest: bool, repository: str, prefix: str
) -> None:
    """Download a published variant; goes on after an interruption, does nothing when complete."""
    started = time.monotonic()
    folder = out / "datasets" / f"fineweb10B_{variant}"
    staging = folder / ".download"
    with sole_writer(folder):
        revision = refuse_mixture(folder, repository)
        if fineweb_complete(folder, out / "tokenizers", train_shards):
            return
        shutil.rmtree(staging, ignore_errors=True)
        try:
            hub = Hub(repository, prefix, staging, revision)
            offer = published(hub, variant, skip_manifest)
            if offer.train_shards is not None and train_shards > offer.train_shards:
                raise too_many_shards(train_shards, hub, folder, offer.train_shards)
            path = out / "tokenizers" / Path(offer.tokenizer).name
            tokenizer = fetch_tokenizer(hub, offer.tokenizer, path, FINEWEB_VARIANTS[variant])
            request = {"repository": repository, "revision": hub.revision}
            write_json(
                folder / JOURNAL, {"request": request, "tokenizer_sha256": file_sha256(path)}
            )
            say(f"downloading {folder.name} from {repository} at {hub.revision[:12]}")
            fetch_shards(hub, folder, offer, train_shards)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        sidecar = read_json(folder / SIDECAR)
        if not sidecar or dataset_damage(folder, out / "tokenizers", sidecar):
            sidecar = fineweb_sidecar(hub, folder, path, tokenizer)
            write_json(folder / SIDECAR, sidecar)
    say_split("train", None, sum(map(read_shard_header, shard_paths(folder, "train"))), None)
    say_done(folder, sidecar, started)


def refuse_mixture(folder: Path, repository: str) -> str:
    """Return the revision that the folder's files are of, or main; BadInput for other files.

    The repository may have changed since: shards of two revisions must not be mixed.
    """
    request = entry(read_json(folder / JOURNAL), "request")
    before = entry(request, "repository")
    if before not in (None, repository):
        raise BadInput(
            f"{folder}: holds files of {before}, not of {repository}; "
            "delete the folder, or download elsewhere (--out)"
        )
    for revision in (
        entry(request, "revision"),
        entry(read_json(folder / SIDECAR), "builder", "revision"),
    ):
        if isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision):
            return revision
    return "main"


def fetch_tokenizer(hub: Hub, remote: str, path: Path, vocab_size: int):
    """Download the published tokenizer, check it, put it in place and return it loaded."""
    staged = hub.fetch(remote)
    size = load_tokenizer(staged).vocab_size()
    if size != vocab_size:
        raise BadInput(f"{hub.repository}: {remote} has {size} pieces, not {vocab_size}")
    place_tokenizer(path, staged.read_bytes())
    return load_tokenizer(path)


# ---------------------------------------------------------------------------
# 10 Command line
# ---------------------------------------------------------------------------

TEXT_HELP = """\
Files end in .txt (one document a file) or .jsonl (one {"text": "..."} a line), as they are or
packed as .gz or .zst; folders are searched for them. A document may have up to 16 MiB.

examples:
  python data/prepare.py text books/
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
"""
DOCS_HELP = """\
The docstrings of torch, numpy, sympy, networkx and mpmath as requirements.txt pins them: 14 MB
of technical English, the same bytes on every machine.

example:
  python data/prepare.py docs
"""


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


def build_parser() -> Parser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="prepare.py", description=__doc__.partition("\nSections:")[0], formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="docs|text|fineweb")

    def command(name: str, what: str, epilog: str) -> Parser:
        sub = commands.add_parser(
            name, help=what, description=what, epilog=epilog, formatter_class=raw
        )
        sub.add_argument(
            "--out",
            type=given_path,
            default=DATA_ROOT,
            help="gets datasets/ and tokenizers/ (data/)",
        )
        return sub

    docs = command("docs", "Build the built-in corpus.", DOCS_HELP)
    text = command("text", "Build a data set of your own text.", TEXT_HELP)
    text.add_argument("paths", nargs="+", type=given_path, metavar="PATH", help="files and folders")
    text.add_argument("--name", help="data set name (default: after the first PATH)")
    add = text.add_argument
    add(
        "--tokenizer",
        type=given_path,
        metavar="MODEL",
        help="use this SentencePiece model as it is",
    )
    held_out = text.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val", type=given_path, metavar="PATH", help="validation text (default: a share of PATH)"
    )
    held_out.add_argument(
        "--val-fraction",
        type=fraction,
        default=TEXT_VAL_FRACTION,
        help="share of documents held out, by hash (default %(default)s)",
    )
    for sub, default in ((docs, 1024), (text, None)):
        add = sub.add_argument
        size = whole_number(261, MAX_VOCAB)
        add("--vocab-size", type=size, default=default, help="pieces to train (default 1024)")
        tokens = whole_number(1, 1 << 30)
        add("--shard-tokens", type=tokens, default=SHARD_TOKENS, help="tokens a shard (1e8)")
        # What this process may use, where the system says it; more than 16 only take memory.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(cores or 1, 16)
        add(
            "--workers",
            type=whole_number(1, 256),
            default=workers,
            help="processes (all cores, at most 16)",
        )
    fineweb = command("fineweb", "Download the challenge's data.", FINEWEB_HELP)
    add = fineweb.add_argument
    add("--variant", choices=FINEWEB_VARIANTS, required=True, help="which tokenizer")
    shards = whole_number(1, 100_000)
    add("--train-shards", type=shards, default=FINEWEB_TRAIN_SHARDS, help="default %(default)s")
    add("--skip-manifest", action="store_true", help="go by file names; for a stale manifest")
    return parser


def run(argv: list[str] | None) -> None:
    """Do what the command line asks; raises BadInput, Failure or OSError."""
    args = build_parser().parse_args(argv)
    if args.command == "docs":
        build(docs_plan(args.out, args.vocab_size, args.workers, shard_tokens=args.shard_tokens))
    elif args.command == "text":
        build(text_plan(args))
    else:
        repository = os.environ.get("MATCHED_FINEWEB_REPO_ID", FINEWEB_REPOSITORY)
        prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", FINEWEB_PREFIX)
        download_fineweb(
            args.out, args.variant, args.train_shards, args.skip_manifest, repository, prefix
        )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return 0, 2 for bad input, 1 for anything in the way, 128 + a signal."""
    try:
        run(argv)
    except (BadInput, Failure) as error:
        complaint, status = str(error), error.status
    except ModuleNotFoundError as error:
        complaint = f"the package {error.name} is not installed: pip install -r requirements.txt"
        status = 1
    except MemoryError:
        complaint, status = "out of memory; free some, or run with --workers 1", 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space and run the same command again" if full else ""
        complaint = f"{error.filename or 'writing'}: {error.strerror or error}{advice}"
        status = 1
    except KeyboardInterrupt as stop:
        status = 128 + (signal.SIGTERM if isinstance(stop, Stopped) else signal.SIGINT)
        complaint = "interrupted; the same command goes on from here"
    else:
        return 0
    print(one_line(f"error: {complaint}"), file=sys.stderr)
    return status


def stop(number: int, frame: object) -> NoReturn:
    """End as after Ctrl-C, so that nothing half written stays."""
    raise Stopped


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
