"""What the tools of data/ share: errors, whole files, token shards, and tokenizers.

Sections: 1 errors and reports, 2 files and locks, 3 shards, 4 tokenizers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import caseops
import filelock
import numpy as np
from tqdm import tqdm

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
BOS_ID = 1
MAX_VOCAB = 1 << 16
SIDECAR = "fineweb_val.json"

# SentencePiece needs 40 to 70 bytes of memory for each byte of one document.
MAX_DOCUMENT_BYTES = 16 << 20
# The trainer holds its text in memory; beyond this it sees an even sample.
TOKENIZER_TEXT_BYTES = 64 << 20
READ_BYTES = 1 << 20

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece


# ---------------------------------------------------------------------------
# 1 Errors and reports
# ---------------------------------------------------------------------------


class BadInput(Exception):
    """What was asked for or given cannot be used: exit status 2."""

    status = 2


class Failure(Exception):
    """The machine, an installed package or the network is in the way: exit status 1."""

    status = 1


def one_line(text: str) -> str:
    """Return text with what cannot be printed on one line (file names may hold it) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print one line of report at once. A closed output ends the reports, never the work."""
    try:
        print(one_line(text), flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open to the end


def complain(text: str) -> None:
    """Print one line to stderr; a closed stderr is no further trouble."""
    with contextlib.suppress(OSError, ValueError):
        print(one_line(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print one line of warning to stderr."""
    complain(f"warning: {text}")


def progress_bar(total: float, unit: str, what: str, quiet: bool = False) -> tqdm:
    """Return a bar with an ETA; in a log it writes a line every half minute at most."""
    quiet = quiet or sys.stderr is None
    pauses = {}
    if not quiet and not sys.stderr.isatty():
        pauses = {"mininterval": 30, "delay": 10}
    options = {"unit": unit, "unit_scale": True, "desc": what, "leave": False, "disable": quiet}
    return tqdm(total=total, **options, **pauses)


# ---------------------------------------------------------------------------
# 2 Files and locks
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
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def entry(value: object, *keys: str) -> object:
    """Return value[key][key]..., or None where that is not there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def installed_version(name: str) -> str:
    """Return a package's version without its build tag ("+cpu")."""
    return importlib.metadata.version(name).partition("+")[0]


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[bool]:
    """Hold a lock on a data set's folder; yields whether there is one.

    The lock keeps two processes from doing the same work; what each of them writes is whole
    without it. So a file system without locks is reported and work goes on, and a place where
    nothing can be written is left for the first write to report. The lock ends with the process,
    however that ends. Raises Failure where another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    held = True
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Failure(f"{folder}: another prepare.py is writing here; wait for it") from None
    except (OSError, NotImplementedError) as error:
        held = False
        read_only = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
        # An error with a file's name comes from making the file, one without from locking it.
        if getattr(error, "filename", None) and not read_only:
            raise
        if not read_only:
            warn(
                f"{folder.parent}: this file system has no file locks ({error}); going on without, "
                "so do not start a second prepare.py for the same data set"
            )
    try:
        yield held
    finally:
        with contextlib.suppress(OSError):  # Windows keeps files that are open
            path.unlink()
        if held:
            lock.release()


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


def is_whole(path: Path) -> bool:
    """Say whether a shard is there, as long as its header says."""
    with contextlib.suppress(BadInput, FileNotFoundError):
        read_shard_header(path)
        return True
    return False


def read_tokens(path: Path) -> np.ndarray:
    """Return the ids of a shard as a read-only uint16 array that is mapped, not read."""
    read_shard_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


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
        tokens = read_tokens(path)
        if not parts and tokens[0] != BOS_ID:
            raise BadInput(f"{path}: the first token is {tokens[0]}, not BOS ({BOS_ID})")
        for start in range(0, len(tokens), block_tokens):
            block = np.array(tokens[start : start + block_tokens], dtype=np.uint16)
            for piece in np.split(block, np.flatnonzero(block == BOS_ID)):
                if not len(piece):
                    continue
                if piece[0] == BOS_ID and parts:
                    yield np.concatenate(parts)
                    parts.clear()
                    held = 0
                parts.append(piece)
                held += len(piece)
                if held > MAX_DOCUMENT_BYTES:
                    raise BadInput(f"{path}: over {MAX_DOCUMENT_BYTES:,} tokens without a BOS")
    if parts:
        yield np.concatenate(parts)


class ShardWriter:
    """Writes rows of 16-bit numbers, such as the ids of documents, to the shards of one split.

    `documents`, `raw_bytes` (as text) and `encoded_bytes` (as tokens stand for) count what was
    added, `tokens` what is in finished shards. Holds one shard in memory.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder = folder
        self.split = split
        self.buffer = np.empty(shard_tokens, dtype="<u2")
        self.filled = 0
        self.shards = 0
        self.documents = 0
        self.tokens = 0
        self.raw_bytes = 0
        self.encoded_bytes = 0

    def add(self, ids: np.ndarray, raw_bytes: int = 0, encoded_bytes: int = 0) -> None:
        """Append one document; it goes on in the next shard where this one is full."""
        self.documents += 1
        self.raw_bytes += raw_bytes
        self.encoded_bytes += encoded_bytes
        while len(ids):
            part = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            ids = ids[len(part) :]
            if self.filled == len(self.buffer):
                self._finish_shard()

    def close(self) -> None:
        """Write the last, shorter shard."""
        if self.filled:
            self._finish_shard()

    def _finish_shard(self) -> None:
        write_shard(shard_path(self.folder, self.split, self.shards), self.buffer[: self.filled])
        self.shards += 1
        self.tokens += self.filled
        self.filled = 0


# ---------------------------------------------------------------------------
# 4 Tokenizers
# ---------------------------------------------------------------------------


class Tokenizer:
    """A SentencePiece model: texts to ids, and how many bytes of text ids stand for.

    All that the tools ask of a tokenizer is here, so another kind needs the same methods. Ids of
    a document are uint16 (N,) and start with BOS.
    """

    def __init__(self, model: bytes, name: str) -> None:
        """Load a serialised model; `name` is its file's. Raises BadInput where it is none."""
        import sentencepiece

        self.name = name
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            # Not by the file's name: SentencePiece refuses names that are no UTF-8.
            self.processor.LoadFromSerializedProto(model)
            self.vocab_size: int = self.processor.vocab_size()
        except RuntimeError:
            raise BadInput(f"{name}: not a SentencePiece model") from None
        self.bos_id: int = self.processor.bos_id()
        ids = range(self.vocab_size)
        self.byte = np.array([self.processor.is_byte(i) for i in ids])
        self.silent = np.array([self._is_silent(i) for i in ids])
        pieces = [self.processor.id_to_piece(i) for i in ids]
        self.starts_with_space = np.array([piece.startswith(SPACE_MARK) for piece in pieces])
        # Bytes of text by piece: a byte piece is one byte, control pieces are none.
        lengths = [len(piece.replace(SPACE_MARK, " ").encode()) for piece in pieces]
        self.piece_bytes = np.array(lengths, dtype=np.int64)
        self.piece_bytes[self.byte] = 1
        self.piece_bytes[self.silent] = 0
        # Some models put a space before every text; that space is not in the text.
        self.dummy_prefix: bool = bool(self.starts_with_space[self.processor.encode("a")[0]])
        # Decoding drops the space of a first piece under some normalizers; text is never first.
        self.guard: list[int] = self.processor.encode("a")
        self.guard_bytes = len(self.processor.decode(self.guard, out_type=bytes))
        # Of text that caseops.transform() has changed; bytes per token then are in files.
        marks = [self.processor.piece_to_id(mark) for mark in caseops.CONTROLS]
        self.marks_capitals: bool = self.processor.unk_id() not in marks

    def _is_silent(self, token: int) -> bool:
        """Say whether a token stands for no text: control, unknown or unused."""
        model = self.processor
        return model.is_control(token) or model.is_unknown(token) or model.is_unused(token)

    def encode(self, texts: list[str], workers: int = 1) -> list[np.ndarray]:
        """Return the ids of each text, BOS first."""
        encoded = self.processor.encode(texts, out_type="numpy", num_threads=workers)
        return [np.concatenate(([BOS_ID], ids)).astype(np.uint16) for ids in encoded]

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of a document's ids."""
        return self.processor.decode([int(i) for i in ids])

    def counted_bytes(self, ids: np.ndarray) -> int:
        """Return a document's bytes as the trainer counts them: piece by piece."""
        count = int(self.piece_bytes[ids].sum())
        if self.dummy_prefix and len(ids) > 1:
            count -= int(self.starts_with_space[ids[1]])
        return count

    def decoded_bytes(self, ids: np.ndarray) -> int:
        """Return a document's bytes by decoding it with SentencePiece."""
        spoken = ids[~self.silent[ids]]
        text = self._decoded(spoken)
        count = len(text)
        if b"\xef\xbf\xbd" in text:
            # U+FFFD may stand for bytes that are no UTF-8 (a document cut inside a character):
            # a byte piece is one byte whatever its neighbours are.
            is_byte = self.byte[spoken]
            count = len(self._decoded(spoken[~is_byte])) + int(is_byte.sum())
        if self.dummy_prefix and len(spoken):
            count -= 1
        return count

    def _decoded(self, ids: np.ndarray) -> bytes:
        text = self.processor.decode(self.guard + ids.tolist(), out_type=bytes)
        return text[self.guard_bytes :]

    def facts(self) -> dict[str, object]:
        """Return the sidecar's entry about the tokenizer."""
        return {
            "file": self.name,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
        }


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a model file.

    Raises BadInput for a file that is no model, for one without byte fallback (it would lose
    text), with another BOS than id 1 (it would lose document starts), with ids over 16 bits or
    that gives another text back, such as one that ends in a space (it would be counted).
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such tokenizer file")
    model = path.read_bytes()
    if model.lstrip().startswith(b"{"):
        raise BadInput(
            f"{path}: a tokenizer in JSON, as of Hugging Face; only a SentencePiece model will do, "
            "whose pieces say how many bytes a token stands for and whose BOS is id 1: without "
            "--tokenizer one is trained on your text"
        )
    try:
        tokenizer = Tokenizer(model, path.name)
    except BadInput:
        raise BadInput(f"{path}: not a SentencePiece model") from None
    if not tokenizer.byte.any():
        raise BadInput(f"{path}: has no byte pieces; train it with byte_fallback=true")
    if tokenizer.bos_id != BOS_ID:
        raise BadInput(f"{path}: its BOS is id {tokenizer.bos_id}; shards need id {BOS_ID}")
    if tokenizer.vocab_size > MAX_VOCAB:
        raise BadInput(
            f"{path}: {tokenizer.vocab_size:,} pieces; shards hold ids below {MAX_VOCAB:,}"
        )
    if (back := tokenizer.decode(tokenizer.encode(["a b"])[0])) != "a b":
        raise BadInput(f"{path}: makes {back!r} of 'a b'; bytes cannot be counted with it")
    return tokenizer


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


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, text_bytes: int, more_options: dict | None = None
) -> bytes:
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
            **(more_options or {}),
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
