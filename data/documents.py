"""Read documents from the files that people have: text, JSON and parquet, packed or not.

`find_inputs` chooses files, `read_documents` yields every document of them, bad ones too: each of
those says what its fault is, and the caller decides whether it is left out or ends everything. A
file that cannot be read on (a damaged archive, no JSON) is a BadInput. What is held in memory is
bounded, whatever a file unpacks to.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import shards
from shards import READ_BYTES, SPACE_MARK, BadInput, Failure, complain

TEXT_KINDS = (".txt", ".md")
PACKED_KINDS = (*TEXT_KINDS, ".jsonl", ".json")
PACKINGS = ("", ".gz", ".zst")
SUFFIXES = (*(kind + packing for kind in PACKED_KINDS for packing in PACKINGS), ".parquet")
KNOWN = ", ".join((*PACKED_KINDS, ".parquet"))

# One read of a .zst file may unpack to 30,000 times as much.
ZSTD_READ_BYTES = 4096
# A long text without separators becomes documents of about this size.
PIECE_BYTES = 1 << 20
# So many bad documents are named before the reading ends.
BAD_DOCUMENTS_NAMED = 20
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
BETWEEN_VALUES = re.compile(r"[,\s]*")


@dataclass(frozen=True)
class Fault:
    """Why a document cannot be used: a short `reason` to count by, and the whole story."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Document:
    """One text, where it was found, and how many bytes of input were read up to its end.

    A document with a fault has no text.
    """

    text: str
    place: str
    position: int = 0
    fault: Fault | None = None

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


@dataclass(frozen=True)
class Reading:
    """How files become documents.

    `text_key` names the text in JSON objects and parquet columns ("text" unless given);
    `separator` cuts the files of TEXT_KINDS, which are one document each without it.
    """

    text_key: str | None = None
    separator: re.Pattern[bytes] | None = None


def separator_pattern(text: str) -> re.Pattern[bytes]:
    r"""Return what --split-on means: "blank" for blank lines, else the text itself.

    \n and \t in it stand for a line end and a tab.
    """
    if not text:
        raise BadInput("--split-on: expected some text, got none")
    if text == "blank":
        return BLANK_LINES
    plain = text.replace("\\n", "\n").replace("\\t", "\t")
    return re.compile(re.escape(plain.encode("utf-8", "surrogateescape")))


# ---------------------------------------------------------------------------
# Which files
# ---------------------------------------------------------------------------


def kind_of(path: Path) -> str | None:
    """Return the ending of a file that can be read, such as ".jsonl.gz", or None.

    Files that macOS leaves beside others ("._name") are none of the kinds they are named for.
    """
    name = path.name.lower()
    if name.startswith("._"):
        return None
    fitting = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    return max(fitting, key=len, default=None)


def is_text(path: Path) -> bool:
    """Say whether a file holds plain text."""
    return (kind_of(path) or "").startswith(TEXT_KINDS)


@dataclass
class Inputs:
    """The files to read, each once, and how many files of folders were passed over, by ending."""

    files: list[Path]
    passed_over: Counter[str]

    def summary(self) -> str:
        """Return one line: what is read and what is not."""
        read = Counter(kind_of(path) or "" for path in self.files)
        number, passed = len(self.files), self.passed_over.total()
        if not passed:
            return f"reading {number:,} file(s): {counts(read)}"
        return (
            f"reading {number:,} of {number + passed:,} files: {counts(read)}; "
            f"passed over: {counts(self.passed_over)}"
        )


def counts(counter: Counter[str]) -> str:
    """Return a counter in words, the most frequent first; what is rare is put together."""
    frequent = counter.most_common(8)
    words = [f"{number:,} {name}" for name, number in frequent]
    if rest := counter.total() - sum(number for _, number in frequent):
        words.append(f"{rest:,} others")
    return ", ".join(words)


def find_inputs(paths: Iterable[Path]) -> Inputs:
    """Return the readable files among `paths` and in the folders among them.

    In the order given, folders sorted by name. Raises BadInput for what is missing, of another
    kind, or a folder without such files, and Failure where a package is missing to read them.
    """
    found: dict[str, Path] = {}
    passed_over: Counter[str] = Counter()
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside, others = files_in(path)
            passed_over += others
            if not inside:
                held = f" (it has {counts(others)})" if others else ""
                raise BadInput(f"{path}: no {KNOWN} file in this folder{held}")
        for file in inside:
            if not file.exists():
                raise BadInput(f"{file}: no such file or folder")
            if not file.is_file() or kind_of(file) is None:
                # Not a pipe: it could be read only once.
                raise BadInput(
                    f"{file}: expected a file ending in {KNOWN}, or packed as .gz or .zst"
                )
            found.setdefault(os.path.realpath(file), file)
    files = list(found.values())
    for file in files:
        if kind_of(file) == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise Failure(f"{file}: parquet files are read with pyarrow: pip install pyarrow")
    return Inputs(files, passed_over)


def files_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return what can be read in a folder and all below it, sorted, and the rest by ending.

    Links to folders are followed, each real folder once; one that cannot be read is an OSError.
    """

    def stop(error: OSError) -> None:
        raise error

    found: list[Path] = []
    others: Counter[str] = Counter()
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        for path in (Path(place, name) for name in names):
            if kind_of(path):
                found.append(path)
            else:
                others[path.suffix.lower() or "without an ending"] += 1
        real = {os.path.realpath(Path(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = [name for path, name in real.items() if path not in seen]
        seen |= real.keys()
    return sorted(found), others


# ---------------------------------------------------------------------------
# From files to bytes
# ---------------------------------------------------------------------------


def unpacked_blocks(path: Path, raw: io.BufferedReader) -> Iterator[bytes]:
    """Yield a file's content in small blocks, unpacked by its suffix; BadInput where damaged."""
    name = path.name.lower()
    try:
        if name.endswith((".gz", ".zst")) and not raw.peek(1):
            raise EOFError("0 bytes")
        if name.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                while block := unpacked.read(READ_BYTES):
                    yield block
        elif name.endswith(".zst"):
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
            chunk = b""
            if frame.eof:
                chunk = frame.unused_data
                frame = None
    if frame:
        raise EOFError("the last zstd frame is not complete")


def bounded_lines(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line without its newline); None for one over MAX_DOCUMENT_BYTES."""
    limit = shards.MAX_DOCUMENT_BYTES
    number = 1
    held = bytearray()
    for block in blocks:
        if not held and not block.strip(b"\n"):
            number += len(block)
            continue
        first, *others = block.split(b"\n")
        if len(held) <= limit:  # of a line that is too long the rest is not kept
            held += first
        for line in others:
            yield number, bytes(held) if len(held) <= limit else None
            number += 1
            held = bytearray(line)
    if held:
        yield number, bytes(held) if len(held) <= limit else None


def separated_pieces(
    blocks: Iterable[bytes], separator: re.Pattern[bytes]
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (first line, text) between separators; None for one over MAX_DOCUMENT_BYTES.

    Line ends beside a separator belong to it.
    """
    limit = shards.MAX_DOCUMENT_BYTES
    line = 1
    held = bytearray()
    too_long = False
    for block in itertools.chain(blocks, [None]):
        held += block or b""
        start = 0
        for found in separator.finditer(held):
            yield line, None if too_long else bytes(held[start : found.start()]).strip(b"\r\n")
            too_long = False
            line += held.count(b"\n", start, found.end())
            start = found.end()
        del held[:start]
        if len(held) > limit + READ_BYTES:
            # Enough stays for a separator that the next block completes.
            too_long = True
            line += held.count(b"\n", 0, -READ_BYTES)
            del held[:-READ_BYTES]
    too_long = too_long or len(held) > limit
    yield line, None if too_long else bytes(held).strip(b"\r\n")


def whole_text(blocks: Iterable[bytes]) -> bytes | None:
    """Return the content of a file, or None for one over MAX_DOCUMENT_BYTES."""
    held = bytearray()
    for block in blocks:
        held += block
        if len(held) > shards.MAX_DOCUMENT_BYTES:
            return None
    return bytes(held)


# ---------------------------------------------------------------------------
# From bytes to documents
# ---------------------------------------------------------------------------


def limit_words() -> str:
    """Return the largest size of a document in words."""
    return f"over {shards.MAX_DOCUMENT_BYTES >> 20} MiB"


def decoded_text(content: bytes) -> str | Fault:
    """Return UTF-8 as text without a byte-order mark, or where it is none."""
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        detail = f"not UTF-8 at byte {error.start:,}; convert it, e.g. with iconv"
        return Fault("not UTF-8", detail)


def object_text(value: object, text_key: str | None) -> str | Fault:
    """Return the text of one JSON value: under `text_key`, else "text", else a lone "content"."""
    key = text_key or "text"
    fields = value if isinstance(value, dict) else {}
    if text_key is None and key not in fields:
        strings = [name for name, inner in fields.items() if isinstance(inner, str)]
        if strings == ["content"]:
            key = "content"
    if key not in fields:
        keys = str(sorted(fields)[:5])[:80] if isinstance(value, dict) else "no object"
        detail = f'expected {{"{key}": "..."}}, got {keys} (--text-key names another key)'
        return Fault(f"no {key!r}", detail)
    if not isinstance(fields[key], str):
        return Fault(f"{key!r} is no string", f'"{key}" is not a string')
    return fields[key]


def json_line_text(line: bytes, text_key: str | None) -> str | Fault:
    """Return the text of one .jsonl line."""
    content = decoded_text(line)
    if isinstance(content, Fault):
        return content
    try:
        # Numbers, of any length, stay numbers but are not worked out.
        value = json.loads(content, parse_int=len, parse_float=len)
    except (ValueError, RecursionError) as error:
        return Fault("not JSON", f"not JSON ({error})")
    return object_text(value, text_key)


def values_start(text: str, position: int) -> int:
    """Return where the next value or bracket starts, or the end of the text."""
    between = BETWEEN_VALUES.match(text, position)
    return between.end() if between else position


def json_values(blocks: Iterable[bytes], place: str) -> Iterator[object]:
    """Yield the elements of a JSON array, or consecutive JSON values; BadInput where broken.

    A byte that is no UTF-8 becomes half of a surrogate pair, a fault of its document.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
    parser = json.JSONDecoder(parse_int=len, parse_float=len)
    limit = shards.MAX_DOCUMENT_BYTES + READ_BYTES
    held = ""
    number = enough = 0
    in_array = closed = False
    for block in itertools.chain(blocks, [None]):
        at_end = block is None
        held += decoder.decode(block or b"", final=at_end)
        if len(held) < enough and not at_end:
            continue
        position = 0
        while (position := values_start(held, position)) < len(held):
            if closed:
                raise BadInput(f"{place}: not JSON (more text after the closing bracket)")
            if held[position] == "[" and number == 0 and not in_array:
                in_array = True
                position += 1
                continue
            if held[position] == "]" and in_array:
                closed = True
                position += 1
                continue
            try:
                value, end = parser.raw_decode(held, position)
            except (ValueError, RecursionError) as error:
                if at_end or isinstance(error, RecursionError):
                    raise BadInput(f"{place}: not JSON (value {number + 1}: {error})") from None
                break
            if end == len(held) and not at_end:
                break  # a number may go on in the next block
            number += 1
            position = end
            yield value
        held = held[position:]
        # A value that is not whole is tried again when there is twice as much of it.
        enough = min(2 * len(held), limit)
        if len(held) >= limit:
            raise BadInput(f"{place}: value {number + 1} is {limit_words()}, or the file no JSON")
    if in_array and not closed:
        raise BadInput(f"{place}: damaged or cut short (the array is not closed)")


def parquet_texts(path: Path, text_key: str | None) -> Iterator[str | Fault]:
    """Yield the text of every row of a parquet file; BadInput where there is no such column."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            is_string = (pyarrow.types.is_string, pyarrow.types.is_large_string)
            schema = file.schema_arrow
            names = [field.name for field in schema if any(kind(field.type) for kind in is_string)]
            column = text_key or "text"
            if text_key is None and names == ["content"]:
                column = "content"
            if column not in names:
                raise BadInput(
                    f'{path}: no column "{column}" of strings, but {names[:5]} '
                    "(--text-key names another)"
                )
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from map(parquet_value_text, batch.column(0))
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not a whole parquet file ({str(error)[:200]})") from None


def parquet_value_text(value) -> str | Fault:
    """Return one value (a pyarrow scalar) of a column of strings."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", f"not UTF-8 at byte {error.start:,}")
    return text if text is not None else Fault("text is no string", '"text" is not a string')


def file_texts(
    path: Path, raw: io.BufferedReader, reading: Reading
) -> Iterator[tuple[str, str | Fault]]:
    """Yield (place, text or fault) for each document of one opened file."""
    kind = kind_of(path) or ""
    if kind == ".parquet":
        for row, text in enumerate(parquet_texts(path, reading.text_key), 1):
            yield f"{path}:{row}", text
        return
    blocks = unpacked_blocks(path, raw)
    if kind.startswith(".jsonl"):
        for number, line in bounded_lines(blocks):
            if line is None:
                yield f"{path}:{number}", Fault("too long", f"a line of {limit_words()}")
            elif line.strip():
                yield f"{path}:{number}", json_line_text(line, reading.text_key)
    elif kind.startswith(".json"):
        for number, value in enumerate(json_values(blocks, str(path)), 1):
            text = value if isinstance(value, str) else object_text(value, reading.text_key)
            yield f"{path}:{number}", text
    elif reading.separator:
        for line_number, piece in separated_pieces(blocks, reading.separator):
            if piece is None:
                text = Fault("too long", f"{limit_words()} without a separator")
            else:
                text = decoded_text(piece)
            yield f"{path}:{line_number}", text
    else:
        content = whole_text(blocks)
        if content is None:
            detail = (
                f"{limit_words()}, and a text file is one document; cut it with --split-on, or "
                'write one {"text": ...} a line into a .jsonl file'
            )
            yield str(path), Fault("too long", detail)
        else:
            yield str(path), decoded_text(content)


def text_fault(text: str) -> Fault | None:
    """Return why a text cannot be a document, with the place inside it, or None."""
    for bad, reason, why in (
        (SPACE_MARK, "U+2581", "a literal U+2581, which SentencePiece uses for a space"),
        ("\0", "NUL", "a NUL character, as in UTF-16 and in files that are no text"),
        ("[\ud800-\udfff]", "half a surrogate", "half of a surrogate pair, which is no UTF-8"),
    ):
        if found := re.search(bad, text):
            line = text.count("\n", 0, found.start()) + 1
            column = found.start() - (text.rfind("\n", 0, found.start()) + 1) + 1
            where = f"line {line}, column {column} of the document"
            return Fault(reason, f"{why} ({where}); remove or replace it")
    if len(text) > shards.MAX_DOCUMENT_BYTES:
        return Fault("too long", f"a text of {limit_words()}")
    return None


def checked_document(place: str, text: str | Fault, position: int) -> Document:
    """Return a document, with a fault where its text cannot be used."""
    fault = text if isinstance(text, Fault) else text_fault(text)
    return Document("" if fault else str(text), place, position, fault)


def read_documents(files: Iterable[Path], reading: Reading) -> Iterator[Document]:
    """Yield the documents of files, empty and bad ones too."""
    before = 0
    for path in files:
        with open(path, "rb") as raw:
            for place, text in file_texts(path, raw, reading):
                yield checked_document(place, text, before + raw.tell())
            before += os.fstat(raw.fileno()).st_size


# ---------------------------------------------------------------------------
# One long text without separators
# ---------------------------------------------------------------------------


def text_size(path: Path) -> int:
    """Return the bytes that a file unpacks to."""
    with open(path, "rb") as raw:
        return sum(map(len, unpacked_blocks(path, raw)))


def text_beginning(path: Path) -> bytes:
    """Return the first block of the bytes that a file unpacks to."""
    with open(path, "rb") as raw:
        return next(unpacked_blocks(path, raw), b"")


def cut_place(held: bytes | bytearray, limit: int) -> int:
    """Return where to cut at most `limit` bytes off a text: after a line, a word or a character."""
    for mark in (b"\n", b" "):
        if end := held.rfind(mark, 0, limit) + 1:
            return end
    while limit and held[limit : limit + 1] and held[limit] & 0xC0 == 0x80:
        limit -= 1  # the byte at the cut goes on a character
    return limit


def long_text_pieces(path: Path, raw: io.BufferedReader, boundary: int) -> Iterator[tuple]:
    """Yield (split, first line, bytes): "train" up to byte `boundary` about, then "val"."""
    split = "train"
    line = 1
    done = 0
    held = bytearray()
    for block in itertools.chain(unpacked_blocks(path, raw), [None]):
        held += block or b""
        while held:
            limit = PIECE_BYTES
            if split == "train":
                limit = min(limit, boundary - done)
            if limit > len(held) or (limit == len(held) and block is not None):
                break
            end = cut_place(held, limit)
            piece = bytes(held[:end])
            del held[:end]
            if piece:
                yield split, line, piece
            done += end
            line += piece.count(b"\n")
            if split == "train" and (limit < PIECE_BYTES or done >= boundary):
                split = "val"
    if held:
        yield split, line, bytes(held)


def long_text_documents(path: Path, split: str, boundary: int) -> Iterator[Document]:
    """Yield one split of a long text in documents of about PIECE_BYTES."""
    with open(path, "rb") as raw:
        for of_split, line, piece in long_text_pieces(path, raw, boundary):
            if of_split == split:
                yield checked_document(f"{path}:{line}", decoded_text(piece), raw.tell())


# ---------------------------------------------------------------------------
# Documents that cannot be used
# ---------------------------------------------------------------------------


class BadDocuments:
    """Documents that cannot be used: left out and counted (--skip-bad), or named and refused."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.left_out: Counter[str] = Counter()
        self.named: list[str] = []

    def add(self, place: str, fault: Fault) -> None:
        """Take note of one; raises BadInput when enough have been named."""
        if self.skip:
            self.left_out[fault.reason] += 1
            return
        self.named.append(f"{place}: {fault.detail}")
        if len(self.named) == BAD_DOCUMENTS_NAMED:
            self.refuse_if_any("and there may be more: ")

    def refuse_if_any(self, more: str = "") -> None:
        """Raise BadInput where there are any; several are named first, one a line."""
        if len(self.named) == 1:
            raise BadInput(f"{self.named[0]} (--skip-bad leaves such documents out)")
        if self.named:
            number = self.name_all()
            raise BadInput(
                f"{number} documents cannot be used, {more}"
                "mend them, or leave such documents out with --skip-bad"
            )

    def name_all(self) -> int:
        """Print a line for each that was not refused yet; return how many there were."""
        number = len(self.named)
        while self.named:
            complain(f"bad document: {self.named.pop(0)}")
        return number
