"""CaseOps: text in lower case with marks for its capitals, and back without loss.

A small vocabulary spends many pieces on "the", "The" and "THE". CaseOps writes capitals as marks of
their own in front of lower-case letters, so that a tokenizer learns each word once:

    The NASA Launch   ->   T the A nasa T launch        (T, A: one character each, without spaces)
    iPhone            ->   i C phone

Bits per byte stay those of the original text: a sidecar beside the validation shards says for each
token how many bytes of the original it stands for. (parameter-golf, lossless_caps_caseops_v1)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

TITLE = "\ue001"  # the next letter is a capital, those after it are not
ALLCAPS = "\ue002"  # all letters up to the next other character are capitals
CAPNEXT = "\ue003"  # inside a word: the next letter is a capital
ESC = "\ue004"  # the next character is meant literally
CONTROLS = (TITLE, ALLCAPS, CAPNEXT, ESC)
NAME = "lossless_caps_caseops_v1"  # as it was published
# The options of SentencePieceTrainer.train that give the marks ids of their own, from 4 on.
TRAINER_OPTIONS = {"user_defined_symbols": list(CONTROLS)}

WORD_OR_CONTROL = re.compile(f"[A-Za-z]+|[{TITLE}-{ESC}]")
CAPITAL = re.compile("[A-Z]")
MARKED = re.compile(
    f"{ESC}(?P<literal>.)"
    f"|[{TITLE}{CAPNEXT}](?P<letter>[a-z])"
    f"|{ALLCAPS}(?P<letters>[a-z]+)"
    f"|[{TITLE}-{ESC}]",
    re.DOTALL,
)

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
MAX_TOKEN_BYTES = 65535  # the sidecar holds 16-bit numbers


# The text


def mark_word(found: re.Match[str]) -> str:
    """A run of ASCII letters with its capitals marked, or a literal control character escaped."""
    word = found[0]
    if word in CONTROLS:
        return ESC + word
    if word.islower():
        return word
    if word.isupper() and len(word) > 1:
        return ALLCAPS + word.lower()
    head = TITLE + word[0].lower() if word[0].isupper() else word[0]
    return head + CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), word[1:])


def transform(text: str) -> str:
    """Text with marks before lower-case letters instead of capitals; other scripts stay.

    Only runs of ASCII letters are changed, and control characters that the text itself holds are
    escaped, so that inverse() gives back any text.
    """
    return WORD_OR_CONTROL.sub(mark_word, text)


def unmark(found: re.Match[str]) -> str:
    """What a mark and the letters it is for stand for; nothing for a mark without any."""
    if found["literal"] is not None:
        return found["literal"]
    return (found["letter"] or found["letters"] or "").upper()


def inverse(marked: str, strict: bool = True) -> str:
    """The text of which transform() makes `marked`.

    Raises ValueError with the place if there is none. Not strict, it reads what a model has written
    as well as it can: marks that stand before no letter are dropped.
    """
    text = MARKED.sub(unmark, marked)
    if strict and (again := transform(text)) != marked:
        common = len(os.path.commonprefix([again, marked]))
        raise ValueError(f"no text is transformed into this: character {common} is out of place")
    return text


# Its bytes


def character_bytes(marked: str) -> np.ndarray:
    """For each character of a transformed text, the bytes of the original it stands for: int64.

    A mark 0, an escaped character its own bytes, any other character its length in UTF-8.
    """
    codes = np.frombuffer(marked.encode("utf-32-le"), "<u4").astype(np.int64)
    lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    lengths[(codes >= ord(TITLE)) & (codes <= ord(ESC))] = 0
    literals = [found.end() - 1 for found in re.finditer(f"{ESC}.", marked, re.DOTALL)]
    lengths[literals] = 3
    return lengths


def span_bytes(marked: str, spans: list[tuple[int, int]]) -> np.ndarray:
    """Bytes of the original text under spans (start, end) of the transformed one: int64."""
    before = np.concatenate([[0], np.cumsum(character_bytes(marked))])
    ends = np.array(spans, np.int64).reshape(-1, 2)
    return before[ends[:, 1]] - before[ends[:, 0]]


def tokens_and_bytes(
    tokenizer, text: str, published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A document's tokens, BOS first, and the bytes of the original text of each: int64 both.

    A piece stands for its surface, the span of the transformed text that it was made from; the last
    byte piece of a character has all of it. White space at either end of a document is in no
    surface where the normaliser drops it. The published accounting loses it; ours gives it to the
    first and the last piece, or to BOS if there is no other, so that the sum is the text's length.
    """
    marked = transform(text)
    pieces = tokenizer.encode(marked, out_type="offset_mapping")
    spans = pieces["offsets"]
    if published:
        counts = span_bytes(marked, spans)
        opening = 0
    else:
        ends = [end for _, end in spans[:-1]] + [len(marked)]
        counts = span_bytes(marked, list(zip([0, *ends[:-1]], ends, strict=True)))
        opening = 0 if spans else int(counts.sum())
        counts = counts[: len(spans)]
    ids = np.array([tokenizer.bos_id(), *pieces["ids"]], np.int64)
    return ids, np.concatenate([[opening], counts]).astype(np.int64)


# The sidecar


def sidecar_path(folder: Path, number: int) -> Path:
    """The byte counts that belong to fineweb_val_<number>.bin."""
    return folder / f"fineweb_val_bytes_{number:06d}.bin"


def write_sidecar(path: Path, counts: np.ndarray) -> None:
    """Write the bytes of each token of a shard in the shard's own format, at once or not at all.

    Raises ValueError for a token of more bytes than the format holds.
    """
    if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= MAX_TOKEN_BYTES:
        place = int(np.argmax(counts))
        raise ValueError(
            f"{path}: token {place} stands for {counts[place]:,} bytes; the format holds "
            f"0 to {MAX_TOKEN_BYTES:,}"
        )
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(counts)
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        with open(hidden, "wb") as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(counts, "<u2").data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def read_sidecar(path: Path, tokens: int) -> np.ndarray:
    """The bytes of each token of a shard of so many tokens: uint16.

    Raises ValueError if the file is missing, is of another format or counts other tokens.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing; bytes of the original text are counted by it")
    expected = 4 * HEADER_INTS + 2 * tokens
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes; {tokens:,} tokens need {expected:,}")
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(4 * HEADER_INTS), "<i4")
        if header[:3].tolist() != [SHARD_MAGIC, SHARD_VERSION, tokens]:
            raise ValueError(
                f"{path}: header {header[:3].tolist()}; expected "
                f"{[SHARD_MAGIC, SHARD_VERSION, tokens]}"
            )
        return np.fromfile(file, "<u2", tokens)


def contradiction(tokenizer, tokens: np.ndarray, counts: np.ndarray) -> int | None:
    """The place of the first token that cannot stand for so many bytes; None if there is none.

    It shows byte counts that belong to other shards. Marks stand for none, but for a mark of the
    text itself, after ESC, which has its own bytes and those of deleted characters after it. BOS
    stands for none in a document that has a piece. Only the first piece of a document may have
    more: what was dropped before it.
    """
    bos = tokenizer.bos_id()
    marks = [tokenizer.piece_to_id(mark) for mark in CONTROLS]
    is_mark = np.isin(tokens, marks)
    before = np.concatenate([[bos], tokens[:-1]])
    after = np.concatenate([tokens[1:], [bos]])
    is_literal = is_mark & (before == tokenizer.piece_to_id(ESC))
    silent = (is_mark & ~is_literal & (before != bos)) | ((tokens == bos) & (after != bos))
    allowed = ~silent | (counts == 0)
    allowed &= ~is_literal | (counts == 0) | (counts >= len(ESC.encode()))
    return None if allowed.all() else int(allowed.argmin())


def transformed(texts: Iterable[str]) -> Iterator[str]:
    """Each text transformed: what a CaseOps tokenizer is trained on."""
    yield from map(transform, texts)
