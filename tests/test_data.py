"""Shards, the order of training rows, bytes per token, and the validation split's side file."""

from __future__ import annotations

import functools
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sentencepiece
import torch
from conftest import ROOT, TinyData, make_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import write_tokens

import train_gpt
from train_gpt import (
    Config,
    Refusal,
    TrainingRows,
    load_validation,
    micro_batches,
    open_shard,
    piece_bytes,
    read_sidecar,
)

PUBLISHED_TOKENIZERS = [
    sentencepiece.SentencePieceProcessor(model_file=str(path))
    for path in sorted((ROOT.parent / "shared/data/tokenizers").glob("*.model"))
]
# U+2581 is how SentencePiece writes a space, so prepare.py refuses texts that hold one.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"))


def refusal(call: Callable[[], object]) -> str:
    """The one line a call is refused with."""
    with pytest.raises(Refusal) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def rows_of(folder: Path, shards: list, seq_len: int, **changed: object) -> TrainingRows:
    """Training rows over these shards, written into a folder."""
    for i, tokens in enumerate(shards):
        write_tokens(folder / f"fineweb_train_{i:06d}.bin", tokens)
    return TrainingRows(
        Config(
            data_path=str(folder),
            vocab_size=65536,
            train_seq_len=seq_len,
            train_batch_tokens=seq_len,
            **changed,
        )
    )


# Shards


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_a_shard_reads_back_as_it_was_written(count: int, tmp_path: Path) -> None:
    tokens = open_shard(write_tokens(tmp_path / "shard.bin", range(count)), vocab_size=1000)
    assert tokens.tolist() == list(range(count))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: write_tokens(path, [1, 2, 3], magic=20240519),
        lambda path: write_tokens(path, [1, 2, 3], version=2),
        lambda path: write_tokens(path, [1, 2, 3], count=4),
        lambda path: write_tokens(path, [1, 2, 3], count=2),
        lambda path: write_tokens(path, [], count=0),
        lambda path: write_tokens(path, [], count=-1),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:1023]),
        lambda path: path.write_bytes(path.read_bytes()[:1024]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(
            np.frombuffer(path.read_bytes(), "<i4").astype(">i4").tobytes()
        ),
    ],
    ids=[
        "magic",
        "version",
        "short",
        "long",
        "empty",
        "negative",
        "no bytes",
        "half a header",
        "header only",
        "half a token less",
        "half a token more",
        "big-endian",
    ],
)
def test_a_damaged_shard_is_refused_by_name(damage: Callable, tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "shard.bin", [1, 2, 3, 4])
    damage(path)
    assert str(path) in refusal(lambda: open_shard(path, vocab_size=8))


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "shard.bin", [1, 7, 2])
    assert len(open_shard(path, vocab_size=8)) == 3
    assert "token id 7" in refusal(lambda: open_shard(path, vocab_size=7))


def test_a_bad_token_in_a_shard_too_large_to_search_is_found_in_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "FULL_SCAN_TOKENS", 0)
    monkeypatch.setattr(train_gpt, "SCAN_TOKENS", 8)
    rows = rows_of(tmp_path, [range(17)], 4, loader="sequential")
    rows.vocab_size = 16
    rows.batch(0, 3)
    with pytest.raises(RuntimeError, match="token id 16"):
        rows.batch(3, 1)


def test_shards_without_a_whole_row_are_refused(tmp_path: Path) -> None:
    assert "TRAIN_SEQ_LEN=4" in refusal(lambda: rows_of(tmp_path, [range(4), range(4)], 4))
    assert rows_of(tmp_path, [range(4), range(5)], 4).row(0).tolist() == [0, 1, 2, 3, 4]


# Sequential rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(2, 9))
def test_sequential_rows_are_the_joined_stream_in_order(lengths: list[int], seq_len: int) -> None:
    lengths.append(seq_len + 1)
    stream = np.arange(sum(lengths))
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(
            Path(folder), np.split(stream, np.cumsum(lengths)[:-1]), seq_len, loader="sequential"
        )
        for n in range(3 * len(stream) // seq_len):  # so the stream is wrapped around twice
            at = np.arange(n * seq_len, n * seq_len + seq_len + 1)
            assert rows.row(n).tolist() == (at % len(stream)).tolist()


@pytest.mark.parametrize("loader", ["sequential", "shuffled"])
def test_targets_are_the_inputs_one_token_on(loader: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [range(40), range(100, 140)], 4, loader=loader)
    batch = rows.batch(3, 5)
    inputs, targets = batch.input_ids, batch.target_ids
    assert inputs.shape == targets.shape == (5, 4)
    assert inputs.dtype == targets.dtype == torch.int64
    for n in range(5):
        assert [*inputs[n].tolist(), int(targets[n, -1])] == rows.row(3 + n).tolist()
        assert inputs[n, 1:].tolist() == targets[n, :-1].tolist()


@pytest.mark.parametrize("micro_batch_seqs", [0, 1, 2, 5])
def test_ranks_share_out_each_row_of_a_step_once(micro_batch_seqs: int) -> None:
    for num_rows in (1, 2, 3, 7, 8, 12, 40):
        cfg = Config(
            train_seq_len=512, train_batch_tokens=512 * num_rows, micro_batch_seqs=micro_batch_seqs
        )
        for world_size in range(1, 9):
            ranks = [
                SimpleNamespace(
                    ranks=SimpleNamespace(rank=rank, world_size=world_size),
                    micro_batch_rows=micro_batch_seqs or 16,
                )
                for rank in range(world_size)
            ]
            dealt = [
                [
                    row
                    for first, count in micro_batches(cfg, rank)
                    for row in range(first, first + count)
                ]
                for rank in ranks
            ]
            counts = [count for rank in ranks for _, count in micro_batches(cfg, rank)]
            assert sum(dealt, []) == list(range(num_rows))
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
            assert all(0 < count <= (micro_batch_seqs or 16) for count in counts)


# Shuffled rows

SHARDS = [range(2), range(100, 116), range(200, 213), range(300, 305)]  # 0, 3, 3 and 1 blocks of 4
BLOCKS = sorted([*range(100, 109, 4), *range(200, 209, 4), 300])


@pytest.mark.parametrize("seed", [0, 1337])
def test_an_epoch_holds_every_block_within_a_shard_once(seed: int, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, SHARDS, 4, seed=seed)
    for epoch in range(5):
        drawn = [rows.row(len(BLOCKS) * epoch + i).tolist() for i in range(len(BLOCKS))]
        assert sorted(row[0] for row in drawn) == BLOCKS
        assert all(row == list(range(row[0], row[0] + 5)) for row in drawn)


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    def order(folder: str, seed: int, row_numbers: range) -> list[int]:
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = rows_of(tmp_path / folder, [range(4 * 50 + 1), range(1000, 1201)], 4, seed=seed)
        return [int(rows.row(n)[0]) for n in row_numbers]

    first, second = range(100), range(100, 200)
    assert order("here", 1, first) == order("there", 1, first)
    assert order("here", 1, second) == order("here", 1, range(200))[100:]
    assert order("here", 1, first) == order("here", 1, range(199, -1, -1))[:99:-1]
    assert order("here", 1, first) != order("here", 1, second)
    assert order("here", 1, first) != order("here", 2, first)


def test_shards_are_drawn_in_proportion_to_what_is_left_of_them(tmp_path: Path) -> None:
    sizes, epochs = (3, 9), 1000
    rows = rows_of(tmp_path, [range(13), range(100, 137)], 4)
    drawn: Counter[tuple[int, int]] = Counter()
    passed: Counter[tuple[int, int]] = Counter()
    positions = np.zeros((12, 12))
    for epoch in range(epochs):
        left = list(sizes)
        for i in range(12):
            token = int(rows.row(12 * epoch + i)[0])
            shard = token >= 100
            (passed if shard else drawn)[tuple(left)] += 1
            left[shard] -= 1
            positions[i, token // 4 if not shard else 3 + (token - 100) // 4] += 1
    for left in drawn | passed:
        test = scipy.stats.binomtest(drawn[left], drawn[left] + passed[left], left[0] / sum(left))
        assert test.pvalue > 1e-5, left
    # Each block is as likely at each place; 11/12 because every row and column adds up.
    expected = epochs / 12
    statistic = ((positions - expected) ** 2 / expected).sum() * 11 / 12
    assert 1e-5 < scipy.stats.chi2.sf(statistic, 11 * 11) < 1 - 1e-5


# Bytes per token


class SpelledPieces:
    """A tokenizer that is only its pieces."""

    CONTROL, UNKNOWN, UNUSED = ("<pad>", "<s>", "</s>"), "<unk>", "<unused>"

    def __init__(self, pieces: list[str], first_of_a: str = "a") -> None:
        self.pieces, self.first_of_a = pieces, first_of_a
        self.vocab_size, self.id_to_piece = lambda: len(pieces), pieces.__getitem__
        self.is_control = lambda i: pieces[i] in self.CONTROL
        self.is_unknown = lambda i: pieces[i] == self.UNKNOWN
        self.is_unused = lambda i: pieces[i] == self.UNUSED
        self.is_byte = lambda i: pieces[i].startswith("<0x")

    def encode(self, text: str, out_type: type) -> list[str]:
        """What "a" is split into."""
        return [self.first_of_a]


def test_pieces_count_as_by_hand() -> None:
    by_hand = {
        "<pad>": 0,
        "<s>": 0,
        "</s>": 0,
        "<unk>": 0,
        "<unused>": 0,
        "<0x0A>": 1,
        "<0xE2>": 1,
        "a": 1,
        "\u2581": 1,
        "\u2581b": 2,
        "\u2581\u2581": 2,
        "a\u2581b": 3,
        "\u00e9": 2,
        "\u2581\u65e5\u672c": 7,
        "\U0001f600": 4,
    }
    counts, opening = piece_bytes(SpelledPieces(list(by_hand)))
    assert dict(zip(by_hand, counts.tolist(), strict=True)) == by_hand
    assert not opening.any()
    counts, opening = piece_bytes(SpelledPieces(list(by_hand), first_of_a="\u2581a"))
    assert dict(zip(by_hand, counts.tolist(), strict=True)) == by_hand
    assert [p for p, one_less in zip(by_hand, opening, strict=True) if one_less] == [
        "\u2581",
        "\u2581b",
        "\u2581\u2581",
        "\u2581\u65e5\u672c",
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["no prefix", "dummy prefix"])
def tokenizer(request: pytest.FixtureRequest) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer of the tiny data's kind, with and without a space put before each document."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(4_000, seed=0)),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_id=0,
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


counts_of = functools.cache(piece_bytes)


def counted(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> int:
    """Bytes of a document by its pieces, as load_validation() counts them."""
    counts, opening = counts_of(tokenizer)
    ids = tokenizer.encode(text)
    return int(counts[ids].sum() - opening[ids[:1]].sum())


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_pieces_add_up_to_the_text(
    tokenizer: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert counted(tokenizer, text) == len(text.encode())


@pytest.mark.parametrize("text", ["a b", " a", "  a  ", "\na", "\t", " ", "\u65e5 a\u0301", "0 12"])
def test_white_space_and_rare_characters_count(
    tokenizer: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert counted(tokenizer, text) == len(text.encode())


def published_rule(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int]) -> int:
    """Bytes after BOS as the published scripts count them: a piece's leading space is apart."""
    total, after_boundary = 0, True
    for i in ids:
        boundary = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        if tokenizer.is_byte(i):
            total += 1
        elif not boundary:
            piece = tokenizer.id_to_piece(i)
            total += len(piece.removeprefix("\u2581").encode())
            total += piece.startswith("\u2581") and not after_boundary
        after_boundary = boundary
    return total


@pytest.mark.skipif(not PUBLISHED_TOKENIZERS, reason="the published tokenizers are not here")
@settings(max_examples=60, deadline=None)
@given(text=TEXTS | st.sampled_from(make_documents(1_000, seed=1)))
def test_published_tokenizers_count_their_normalised_text(text: str) -> None:
    for tokenizer in PUBLISHED_TOKENIZERS:
        normalised = tokenizer.normalize(text).replace("\u2581", " ")
        assert counted(tokenizer, text) == len(normalised.encode())
        assert counted(tokenizer, text) == published_rule(tokenizer, tokenizer.encode(text))


# The validation split


def tiny_config(data: TinyData, **changed: object) -> Config:
    """Settings that load the tiny data."""
    return Config(
        data_path=str(data.data_path),
        tokenizer_path=str(data.tokenizer_path),
        **{"vocab_size": int(data.env["VOCAB_SIZE"]), **changed},
    )


def test_validation_agrees_with_its_side_file(tiny_data: TinyData) -> None:
    val, facts = load_validation(tiny_config(tiny_data)), read_sidecar(str(tiny_data.data_path))
    assert len(val.tokens) == facts["tokens"]
    assert val.documents == facts["documents"]
    assert val.target_bytes.sum() == val.recorded_bytes == facts["raw_bytes"]
    assert not val.target_bytes[val.tokens[1:] == train_gpt.BOS].any()


def test_each_document_counts_its_own_bytes(tiny_data: TinyData) -> None:
    val = load_validation(tiny_config(tiny_data))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_data.tokenizer_path))
    starts = np.flatnonzero(val.tokens == train_gpt.BOS)
    for start, end in zip(starts, [*starts[1:], len(val.tokens)], strict=True):
        text = tokenizer.decode(val.tokens[start + 1 : end].tolist())
        assert val.target_bytes[start : end - 1].sum() == len(text.encode())


@pytest.fixture
def copied(tiny_data: TinyData, tmp_path: Path) -> TinyData:
    """A copy of the tiny data that a test may damage."""
    root = tiny_data.data_path.parents[1]
    shutil.copytree(root, tmp_path / "data")
    return TinyData(
        *(
            tmp_path / "data" / path.relative_to(root)
            for path in (tiny_data.data_path, tiny_data.tokenizer_path)
        )
    )


def edit_sidecar(data: TinyData, edit: Callable[[dict], object]) -> None:
    """Change the facts of a side file."""
    path = data.data_path / "fineweb_val.json"
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))


def other_tokenizer(data: TinyData, model: bytes) -> None:
    """Put another file in the tokenizer's place, and its hash in the side file."""
    data.tokenizer_path.write_bytes(model)
    edit_sidecar(
        data,
        lambda facts: facts["tokenizer"].update(sha256=train_gpt.sha256_of(data.tokenizer_path)),
    )


def flip_last_token(data: TinyData) -> None:
    """Change one token of the validation shard."""
    path = data.data_path / "fineweb_val_000000.bin"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


DISAGREEMENTS = {
    "another shard": (flip_last_token, "not those its fineweb_val.json records"),
    "another hash": (
        lambda data: edit_sidecar(
            data, lambda facts: facts["val_shards"].update({"fineweb_val_000000.bin": "0" * 64})
        ),
        "not those its fineweb_val.json records",
    ),
    "one shard more": (
        lambda data: shutil.copy(
            data.data_path / "fineweb_val_000000.bin", data.data_path / "fineweb_val_000001.bin"
        ),
        "not those its fineweb_val.json records",
    ),
    "no shard": (lambda data: (data.data_path / "fineweb_val_000000.bin").unlink(), "DATA_PATH"),
    "a byte more": (
        lambda data: edit_sidecar(
            data, lambda facts: facts.update(encoded_bytes=facts["encoded_bytes"] + 1)
        ),
        "bytes",
    ),
    # Field 1000 means nothing to SentencePiece: the same tokenizer in another file.
    "another tokenizer": (
        lambda data: data.tokenizer_path.write_bytes(
            data.tokenizer_path.read_bytes() + b"\xc0\x3e\x01"
        ),
        "sha256",
    ),
    "no tokenizer": (lambda data: data.tokenizer_path.unlink(), "no such file"),
    "not a tokenizer": (
        lambda data: other_tokenizer(data, b"This is no model."),
        "not a SentencePiece model",
    ),
    "no side file": (lambda data: (data.data_path / "fineweb_val.json").unlink(), "is missing"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_validation_data_that_disagrees_is_refused(case: str, copied: TinyData) -> None:
    disagree, said = DISAGREEMENTS[case]
    disagree(copied)
    message = refusal(lambda: load_validation(tiny_config(copied)))
    assert str(copied.data_path) in message or str(copied.tokenizer_path) in message
    assert said in message


def test_a_tokenizer_of_another_size_or_bos_is_refused(
    tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "VOCAB_SIZE=321" in refusal(
        lambda: load_validation(tiny_config(tiny_data, vocab_size=321))
    )
    monkeypatch.setattr(train_gpt, "BOS", 2)
    assert "BOS id 1" in refusal(lambda: load_validation(tiny_config(tiny_data)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'"text"',
        b"[" * 100_000,
    ],
    ids=["empty", "cut", "binary", "list", "null", "object", "text", "deep"],
)
def test_a_damaged_side_file_is_refused(content: bytes, copied: TinyData) -> None:
    (copied.data_path / "fineweb_val.json").write_bytes(content)
    assert "fineweb_val.json" in refusal(lambda: load_validation(tiny_config(copied)))


@pytest.mark.parametrize(
    ("fact", "wrong"),
    [
        ("tokenizer", None),
        ("tokenizer", {}),
        ("tokenizer", {"sha256": 5}),
        ("tokenizer", "x"),
        ("val_shards", None),
        ("val_shards", ["x"]),
        ("val_shards", {"fineweb_val_000000.bin": None}),
        ("encoded_bytes", None),
        ("encoded_bytes", "many"),
        ("encoded_bytes", [1]),
    ],
)
def test_a_side_file_with_a_fact_of_another_type_is_refused(
    fact: str, wrong: object, copied: TinyData
) -> None:
    edit_sidecar(copied, lambda facts: facts.update({fact: wrong}))
    assert "fineweb_val.json" in refusal(lambda: load_validation(tiny_config(copied)))
    edit_sidecar(copied, lambda facts: facts.pop(fact))
    assert "fineweb_val.json" in refusal(lambda: load_validation(tiny_config(copied)))


def test_the_first_piece_after_bos_saves_the_dummy_prefix(
    copied: TinyData, tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    texts = ["be cor de", " an", "", "1 2\nbe"]
    ids = [i for text in texts for i in (1, *tokenizer.encode(text))]
    shard = write_tokens(copied.data_path / "fineweb_val_000000.bin", ids)
    other_tokenizer(copied, tokenizer.serialized_model_proto())
    edit_sidecar(
        copied,
        lambda facts: facts.update(
            encoded_bytes=sum(len(text.encode()) for text in texts),
            val_shards={shard.name: train_gpt.sha256_of(shard)},
        ),
    )
    val = load_validation(tiny_config(copied, vocab_size=tokenizer.vocab_size()))
    assert val.target_bytes.sum() == sum(len(text.encode()) for text in texts)
