"""The canonical-token mask: never a pair that occurs, always one that cannot, and its head."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import train_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
BOS = 1

WORDS = [
    *(
        "the",
        "then",
        "them",
        "other",
        "mother",
        "breathe",
        "a",
        "an",
        "and",
        "hand",
        "handed",
        "at",
    ),
    *("that", "hat", "1999", "2024", "12", "3.14", "Ab", "AB", "return", "self.value", "__init__"),
    *("lorem", "ipsum", "aaaa", "aaaaaa", "abab", "ababab", "...", "----", "==", "==="),
]


def training_lines() -> list[str]:
    """A small corpus with repeated letters, digits, runs of spaces and other scripts."""
    source = random.Random(5)
    others = [
        "\u00e9t\u00e9",
        "na\u00efve",
        "\u65e5\u672c\u8a9e",
        "\u65e5\u672c",
        "\U0001f600",
        "\t",
    ]
    lines = []
    for _ in range(400):
        words = [source.choice(WORDS + others) for _ in range(source.randint(1, 12))]
        gaps = [source.choice([" ", " ", " ", "  ", "    ", ""]) for _ in words]
        lines.append("".join(word + gap for word, gap in zip(words, gaps, strict=True)))
    return lines


def trained(**changes: object) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer trained on the small corpus."""
    options: dict = {"vocab_size": 420, "character_coverage": 0.98, **changes}
    model = train_tokenizer(training_lines(), **options)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def field(number: int, content: bytes | int) -> bytes:
    """One protobuf field: a number, or bytes with their length."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def handmade(
    scored: dict[str, float], defined: tuple[str, ...] = (), bytes_too: bool = False
) -> sentencepiece.SentencePieceProcessor:
    """A BPE model of these pieces and scores, with user-defined symbols and perhaps byte pieces."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(symbol, 0.0, 4) for symbol in defined]
    if bytes_too:
        pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, score, 1) for text, score in scored.items()]
    model = b""
    for text, score, kind in pieces:
        number = b"\x15" + np.float32(score).tobytes()  # field 2, four bytes
        model += field(1, field(1, text.encode()) + number + field(3, kind))
    trainer = field(3, 2)
    if bytes_too:
        trainer += field(35, 1)
    model += field(2, trainer)
    model += field(3, field(1, b"identity") + field(3, 0) + field(4, 0))
    return sentencepiece.SentencePieceProcessor(model_proto=model)


VARIANTS: dict[str, dict[str, object]] = {
    "ours": {},
    "dummy prefix, spaces folded": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "digits together": {"split_digits": False},
    "spaces inside pieces": {"split_by_whitespace": False},
    "spaces as suffixes": {"treat_whitespace_as_suffix": True},
    "no bytes": {"byte_fallback": False, "vocab_size": 160},
    "user-defined": {"user_defined_symbols": ["<a>", "an", "and", "\ue001", "th", "hat"]},
    "control symbols": {"control_symbols": ["<c>"]},
}


@functools.cache
def variant(name: str) -> tuple[sentencepiece.SentencePieceProcessor, np.ndarray]:
    """A trained tokenizer and its table."""
    tokenizer = trained(**VARIANTS[name])
    return tokenizer, train_gpt.forbidden_pairs(tokenizer)


FRAGMENTS = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(
        [" ", "  ", "     ", "\n", "\t", "\u2581", "<a>", "\ue001", "an", "and", "<s>"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=4),
    st.text("0123456789", max_size=6),
    st.text("\u65e5\u672c\u8a9e\u4eba\U0001f600\U0001f680\U0001f468\u200d\u00e9\u00ef", max_size=4),
    st.text("thenadbr ", max_size=12),
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_no_pair_that_a_text_holds_is_forbidden(name: str, text: str) -> None:
    tokenizer, forbidden = variant(name)
    stream = np.array([BOS, *tokenizer.encode(text), BOS])
    assert train_gpt.check_stream(stream, forbidden) is None
    assert not forbidden[stream[:-1], stream[1:]].any()


PUBLISHED = sorted((ROOT.parent / "shared/data/tokenizers").glob("fineweb_*.model"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_tokenizers_hold_to_their_tables(path: Path) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    forbidden = train_gpt.forbidden_pairs(tokenizer)
    assert 0.02 < forbidden.mean() < 0.5
    source = random.Random(2)
    texts = [(ROOT / "README.md").read_text(), (ROOT / "data/README.md").read_text()]
    texts += ["".join(chr(source.randrange(1, 0xD800)) for _ in range(4000))]
    texts += ["".join(source.choice("aeionrst  \n0129\U0001f600") for _ in range(4000))]
    for text in texts:
        assert train_gpt.check_stream(np.array(tokenizer.encode(text)), forbidden) is None


def occurs_alone(tokenizer: sentencepiece.SentencePieceProcessor, p: int, x: int) -> bool:
    """Whether the text of two pieces, alone, is encoded as these two."""
    return tokenizer.encode(tokenizer.id_to_piece(p) + tokenizer.id_to_piece(x)) == [p, x]


def text_tokens(tokenizer: sentencepiece.SentencePieceProcessor) -> list[int]:
    """The tokens that stand for text by themselves."""
    silent = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_byte)
    return [i for i in range(tokenizer.vocab_size()) if not any(kind(i) for kind in silent)]


@pytest.mark.parametrize(
    "name", ["ours", "digits together", "spaces inside pieces", "user-defined"]
)
def test_every_other_pair_of_texts_occurs(name: str) -> None:
    """The table of a trained tokenizer against encoding each pair of pieces."""
    tokenizer, forbidden = variant(name)
    tokens = text_tokens(tokenizer)
    for p in tokens:
        expected = [not occurs_alone(tokenizer, p, x) for x in tokens]
        assert forbidden[p, tokens].tolist() == expected


SCORES = st.integers(-6, 0).map(float)
PIECES = st.dictionaries(st.text("abc", min_size=2, max_size=5), SCORES, min_size=1, max_size=14)
DEFINED = st.lists(st.text("abc", min_size=1, max_size=3), max_size=2, unique=True)
LETTERS = [first + rest for first in "abc" for rest in ("", *"abc")]
CONTEXTS = ["", *"abc", "ab", "bc", "ca", "aa", "bb", "cab", "abc", "aabb", "cacb"]


# A symbol that is born by a bad merge, after which a good one swallows it at once.
BORN_BADLY = {"ab": -5.0, "aab": -1.0}


@settings(max_examples=150, deadline=None)
@example(pieces=BORN_BADLY | {"cc": -3.0, "abcc": 0.0}, letters=[0.0] * 3, defined=[])
@example(pieces=BORN_BADLY | {"cc": -3.0, "aabc": -2.0}, letters=[0.0] * 3, defined=[])
@example(pieces=BORN_BADLY | {"abc": -3.0}, letters=[0.0] * 3, defined=[])
@example(pieces={"ba": -5.0, "baa": -1.0, "cc": -3.0, "ccba": 0.0}, letters=[0.0] * 3, defined=[])
@example(pieces={"ba": -5.0, "baa": -1.0, "cba": -3.0}, letters=[0.0] * 3, defined=[])
@given(pieces=PIECES, letters=st.lists(SCORES, min_size=3, max_size=3), defined=DEFINED)
def test_tables_of_any_scores_are_exact(
    pieces: dict[str, float], letters: list[float], defined: list[str]
) -> None:
    """Ties, pieces better than their parts and unreachable ones; no context makes a pair occur."""
    scored = dict(zip("abc", letters, strict=True)) | pieces
    scored = {text: score for text, score in scored.items() if text not in defined}
    tokenizer = handmade(scored, tuple(defined))
    forbidden = train_gpt.forbidden_pairs(tokenizer)
    tokens = text_tokens(tokenizer)
    alone = {(p, x) for p in tokens for x in tokens if occurs_alone(tokenizer, p, x)}
    for p in tokens:
        assert forbidden[p, tokens].tolist() == [(p, x) not in alone for x in tokens]
    seen = set()
    texts = {tokenizer.id_to_piece(token) for token in tokens}
    middles = [a + b for a in texts for b in texts][:60]
    for middle in middles:
        for before in CONTEXTS:
            for after in CONTEXTS:
                ids = tokenizer.encode(before + middle + after)
                seen.update(zip(ids, ids[1:], strict=False))
    assert seen <= alone


def test_byte_pairs_are_those_of_characters_that_are_no_pieces() -> None:
    """Against the encoding of every character there is, alone and beside others."""
    known = ["\u2581", "a", "b", "\u00e9", "\u65e5", "\U0001f600"]
    scored = dict.fromkeys(known, -5.0) | {"ab": -1.0, "\u65e5\u672c": -2.0}
    tokenizer = handmade(scored, ("\ue001",), bytes_too=True)
    forbidden = train_gpt.forbidden_pairs(tokenizer)
    byte_ids = np.array([tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)])
    inside = np.zeros((256, 256), bool)
    first = np.zeros(256, bool)
    last = np.zeros(256, bool)
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for character in everything:
        if character in (*known, "\ue001", " "):
            continue
        spelling = character.encode()
        first[spelling[0]] = True
        last[spelling[-1]] = True
        for p, x in zip(spelling, spelling[1:], strict=False):
            inside[p, x] = True
    expected = ~(inside | last[:, None] & first)
    assert np.array_equal(forbidden[np.ix_(byte_ids, byte_ids)], expected)
    a = tokenizer.piece_to_id("a")
    assert np.array_equal(forbidden[a, byte_ids], ~first)
    assert np.array_equal(forbidden[byte_ids, a], ~last)
    ids = np.array(tokenizer.encode("".join(everything)))
    assert train_gpt.check_stream(ids, forbidden) is None
    beside = np.array(tokenizer.encode("a".join(everything[::7])))
    assert train_gpt.check_stream(beside, forbidden) is None


@pytest.mark.parametrize("model_type", ["unigram", "char"])
def test_other_models_forbid_nothing(model_type: str) -> None:
    tokenizer = trained(model_type=model_type, vocab_size=300)
    assert not train_gpt.forbidden_pairs(tokenizer).any()


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 11), max_size=60), seed=st.integers(0, 99))
def test_check_stream_names_the_first_violation(ids: list[int], seed: int) -> None:
    forbidden = np.random.default_rng(seed).random((12, 12)) < 0.1
    places = [i for i in range(1, len(ids)) if forbidden[ids[i - 1], ids[i]]]
    block, train_gpt.CHECKED_PAIRS = train_gpt.CHECKED_PAIRS, 7
    try:
        found = train_gpt.check_stream(np.array(ids, np.uint16), forbidden)
    finally:
        train_gpt.CHECKED_PAIRS = block
    assert found == (places[0] if places else None)


# In a model


def case(dtype: torch.dtype, tokens: int = 150) -> tuple[torch.Tensor, ...]:
    """Hidden states, head, allowed targets, input tokens and penalties of a small vocabulary."""
    torch.manual_seed(4)
    vocabulary, width = 23, 5
    forbidden = torch.rand(vocabulary, vocabulary) < 0.3
    forbidden[:, 0] = False
    ids = torch.randint(vocabulary, (2, tokens))
    allowed = (~forbidden).double()
    targets = torch.multinomial(allowed[ids.flatten()], 1).view_as(ids)
    hidden = torch.randn(2, tokens, width, dtype=dtype)
    head = torch.randn(vocabulary, width, dtype=dtype)
    return hidden, head, targets, ids, forbidden


def naive_nats(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    ids: torch.Tensor,
    forbidden: torch.Tensor,
    cap: float,
) -> torch.Tensor:
    """P'(x) = P(x) [allowed] / (1 - forbidden mass), place by place."""
    p = torch.softmax(cap * torch.tanh(hidden @ head.t() / cap), -1)
    mass = (p * forbidden[ids]).sum(-1)
    own = p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -torch.log(own / (1 - mass))


def test_masked_head_is_the_renormalised_distribution() -> None:
    hidden, head, targets, ids, forbidden = case(torch.float32)
    penalty = train_gpt.penalties(forbidden.numpy())
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    gamma = torch.tensor(1.1)
    nats, weights = train_gpt.HeadNats.apply(*leaves, targets, 4.0, gamma, 0.1, ids, penalty)
    doubles = [x.double().requires_grad_() for x in (hidden, head)]
    expected = naive_nats(*doubles, targets, ids, forbidden, 4.0)
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=1e-5)
    factor = torch.rand_like(nats)
    (nats * factor).sum().backward()
    (expected * factor.double()).sum().backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-4, atol=1e-4)
    logits = 4.0 * torch.tanh(hidden @ head.t() / 4.0) + penalty[ids]
    torch.testing.assert_close(weights, train_gpt.mile_weights(logits, gamma, 0.1))
    assert torch.isfinite(weights).all()
    plain = train_gpt.HeadNats.apply(hidden, head, targets, 4.0, None, 0.1, ids, None)[0]
    assert (nats <= plain + 1e-5).all()
    assert (nats < plain - 1e-2).any()


def test_a_mask_that_forbids_nothing_changes_nothing() -> None:
    hidden, head, targets, ids, _ = case(torch.float32)
    nothing = train_gpt.penalties(np.zeros((len(head), len(head)), bool))
    results = []
    for penalty in (None, nothing):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        nats, _ = train_gpt.HeadNats.apply(*leaves, targets, 4.0, None, 0.1, ids, penalty)
        nats.mean().backward()
        results.append((nats, *(leaf.grad for leaf in leaves)))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-6)


def test_masked_head_has_the_gradient_of_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """gradcheck in double precision, over more than one block of rows."""
    monkeypatch.setattr(train_gpt.HeadNats, "ROWS", 4)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    hidden, head, targets, ids, forbidden = case(torch.float64, tokens=5)
    penalty = train_gpt.penalties(forbidden.numpy())

    def nats(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return train_gpt.HeadNats.apply(hidden, head, targets, 4.0, None, 0.1, ids, penalty)[0]

    assert torch.autograd.gradcheck(nats, (hidden.requires_grad_(), head.requires_grad_()))
