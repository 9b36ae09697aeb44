"""CaseOps: published strings, no text is lost, and every byte of it is counted."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
from conftest import train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data import caseops, prepare
from data.caseops import ALLCAPS, CAPNEXT, CONTROLS, ESC, TITLE, inverse, transform

ROOT = Path(__file__).resolve().parent.parent

TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.text("aBcD", max_size=6),
        st.text([*CONTROLS, "a", "B", " "], max_size=6),
        st.sampled_from(["The NASA Launch", " ", "  ", "\n", "\u00c9COLE", "don't", "DON'T", "\t"]),
    ),
    max_size=8,
).map("".join)
# SentencePiece takes no lone surrogates.
PLAIN_TEXTS = TEXTS.map(lambda text: text.encode("utf-8", "ignore").decode())


def golden() -> dict:
    """The published transform's strings, pieces, surfaces and bytes."""
    golden_kit = pytest.importorskip("golden_kit", reason="no golden numbers")
    return golden_kit.facts(golden_kit.PR1855, "caseops")


# The text


def test_transform_is_the_published_one() -> None:
    examples = golden()["examples"]
    assert len(examples) == 53
    for example in examples:
        assert transform(example["text"]) == example["transformed"]
        assert inverse(example["transformed"]) == example["text"]


def test_what_the_published_inverse_refuses_is_refused() -> None:
    malformed = golden()["malformed"]
    assert len(malformed) == 8
    for text, verdict in malformed:
        assert verdict == "refused"
        with pytest.raises(ValueError, match="no text is transformed into this"):
            inverse(text)
        assert not set(inverse(text, strict=False)) & set(CONTROLS[:3])


@settings(max_examples=1000, deadline=None)
@given(text=TEXTS)
def test_no_text_is_lost(text: str) -> None:
    assert inverse(transform(text)) == text
    assert inverse(transform(text), strict=False) == text


@settings(max_examples=1000, deadline=None)
@given(marked=TEXTS)
def test_inverse_takes_nothing_but_what_transform_gives(marked: str) -> None:
    try:
        text = inverse(marked)
    except ValueError:
        return
    assert transform(text) == marked


def marked_letter_by_letter(text: str) -> str:
    """The transform as it is defined, one character after the other."""

    def is_letter(place: int) -> bool:
        return place < len(text) and text[place].isascii() and text[place].isalpha()

    out, place = "", 0
    while place < len(text):
        if not is_letter(place):
            out += ESC + text[place] if text[place] in CONTROLS else text[place]
            place += 1
            continue
        end = place
        while is_letter(end):
            end += 1
        word = text[place:end]
        capitals = [letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for letter in word]
        if all(capitals) and len(word) >= 2:
            out += ALLCAPS + word.lower()
        else:
            for index, (letter, capital) in enumerate(zip(word, capitals, strict=True)):
                mark = TITLE if index == 0 else CAPNEXT
                out += (mark if capital else "") + letter.lower()
        place = end
    return out


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_transform_is_its_definition(text: str) -> None:
    assert transform(text) == marked_letter_by_letter(text)


# Its bytes


def train(**changes: object) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer of transformed text with the marks as symbols of its own."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line]
    options: dict = {"vocab_size": 500, **caseops.TRAINER_OPTIONS, **changes}
    model = train_tokenizer(caseops.transformed(lines), **options)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


OURS = train()
PUBLISHED_STYLE = train(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)


def test_the_marks_have_the_published_ids() -> None:
    for tokenizer in (OURS, PUBLISHED_STYLE):
        assert [tokenizer.piece_to_id(mark) for mark in CONTROLS] == [4, 5, 6, 7]
        assert [tokenizer.is_byte(token) for token in (7, 8, 263, 264)] == [
            False,
            True,
            True,
            False,
        ]


def test_a_tokenizer_is_trained_by_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare.train_tokenizer needs no more than one option and transformed text."""
    plain = sentencepiece.SentencePieceTrainer.train

    def with_marks(**options: object) -> None:
        plain(**options, **caseops.TRAINER_OPTIONS)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", with_marks)
    text = (ROOT / "README.md").read_text()
    model = prepare.train_tokenizer(caseops.transformed([text]), 400, len(text))
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = tokenizer.encode(transform(text))
    assert inverse(tokenizer.decode(ids)) == text
    assert 4 in ids


def test_bytes_are_the_published_ones() -> None:
    """Of the published surfaces, found again in the transformed text."""
    for example in golden()["examples"]:
        spans, at = [], 0
        for surface in example["surfaces"]:
            start = example["transformed"].index(surface, at)
            at = start + len(surface)
            spans.append((start, at))
        counts = caseops.span_bytes(example["transformed"], spans)
        assert counts.tolist() == example["bytes"]


def test_sums_are_the_published_ones() -> None:
    """With a tokenizer of the same normaliser; ours counts the bytes of the text."""
    for example in golden()["examples"]:
        text = example["text"]
        _, published = caseops.tokens_and_bytes(PUBLISHED_STYLE, text, published=True)
        _, ours = caseops.tokens_and_bytes(PUBLISHED_STYLE, text)
        assert published.sum() == example["sidecar_bytes"]
        assert ours.sum() == example["utf8_bytes"]


@settings(max_examples=400, deadline=None)
@given(text=PLAIN_TEXTS)
def test_every_byte_is_counted_once(text: str) -> None:
    for tokenizer in (OURS, PUBLISHED_STYLE):
        ids, counts = caseops.tokens_and_bytes(tokenizer, text)
        assert ids.tolist() == [1, *tokenizer.encode(transform(text))]
        assert counts.sum() == len(text.encode())
        assert len(counts) == len(ids)
        assert counts.min() >= 0
        _, published = caseops.tokens_and_bytes(tokenizer, text, published=True)
        assert (published <= counts).all()
        assert published[0] == 0


@settings(max_examples=200, deadline=None)
@given(text=PLAIN_TEXTS)
def test_pieces_without_a_normaliser_count_their_own_letters(text: str) -> None:
    """Against the pieces: a mark 0, escaped 3; all bytes of a character at its last byte piece."""
    ids, counts = caseops.tokens_and_bytes(OURS, text)
    escaped = False
    expected: list[int] = []
    spelling = b""
    for token in ids[1:].tolist():
        piece = OURS.id_to_piece(token).replace("\u2581", " ")
        if OURS.is_byte(token):
            spelling += bytes([int(piece[3:5], 16)])
            try:
                spelling.decode()
            except UnicodeDecodeError:
                expected.append(0)
                continue
            expected.append(len(spelling))
            spelling = b""
            escaped = False
        elif piece in CONTROLS:
            expected.append(3 if escaped else 0)
            escaped = piece == ESC and not escaped
        else:
            expected.append(len(piece.encode()))
            escaped = False
    # A literal U+2581 is read as a space, and counts as the three bytes it is.
    if "\u2581" not in text:
        assert counts[1:].tolist() == expected


# The sidecar


def test_sidecar_is_a_shard_beside_its_tokens(tmp_path: Path) -> None:
    counts = np.array([0, 3, 65535, 1])
    path = caseops.sidecar_path(tmp_path, 7)
    caseops.write_sidecar(path, counts)
    assert path.name == "fineweb_val_bytes_000007.bin"
    assert prepare.read_shard_header(path) == 4
    assert caseops.read_sidecar(path, 4).tolist() == counts.tolist()
    assert prepare.shard_paths(tmp_path, "val") == []
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_sidecars_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = caseops.sidecar_path(tmp_path, 0)
    with pytest.raises(ValueError, match="missing"):
        caseops.read_sidecar(path, 3)
    with pytest.raises(ValueError, match="token 1 stands for 65,536 bytes"):
        caseops.write_sidecar(path, np.array([1, 65536]))
    assert not list(tmp_path.iterdir())
    caseops.write_sidecar(path, np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="4 tokens need"):
        caseops.read_sidecar(path, 4)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="header"):
        caseops.read_sidecar(path, 3)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(PLAIN_TEXTS, min_size=1, max_size=4), published=st.booleans())
@hypothesis.example(
    texts=["\ue001\x0b"], published=True
)  # a deleted character after a literal mark
@hypothesis.example(texts=["\x0bA", "  \ue004", "\x0b", "a"], published=False)
def test_own_counts_contradict_no_token(texts: list[str], published: bool) -> None:
    for tokenizer in (OURS, PUBLISHED_STYLE):
        pairs = [caseops.tokens_and_bytes(tokenizer, text, published) for text in texts]
        tokens, counts = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        assert caseops.contradiction(tokenizer, tokens, counts) is None


def test_counts_of_other_shards_are_found() -> None:
    text = f"The NASA Launch of {ESC} in Florida"
    tokens, counts = caseops.tokens_and_bytes(OURS, text, published=True)
    mark = 2 + int(np.flatnonzero(np.isin(tokens[2:], [4, 5, 6, 7]))[0])
    assert caseops.contradiction(OURS, tokens, np.roll(counts, -1)) == mark
    literal = 1 + int(np.flatnonzero((tokens[:-1] == 7) & (tokens[1:] == 7))[0])
    for place, count in ((0, 2), (mark, 1), (literal, 2)):
        changed = counts.copy()
        changed[place] = count
        assert caseops.contradiction(OURS, tokens, changed) == place
