"""The range coder: exact, the same everywhere, near the entropy, bounded if attacked."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import CODECS, Refusal, Stored

HEADER = {"settings": {}, "tokenizer": "", "validation": ""}


# What comes back


def drawn(shape: tuple[int, int], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Integers of one kind of degeneracy, int8."""
    rows, columns = shape
    made = {
        "any": rng.integers(-128, 128, shape),
        "zero": np.zeros(shape),
        "extremes": rng.choice([-128, -127, 127], shape),
        "gaussian": np.clip(np.rint(rng.normal(0, 9, shape)), -31, 31),
        "twins": rng.integers(-100, 100, columns) + rng.integers(-1, 2, shape),
        "rows": np.rint(rng.normal(0, 1, shape) * 2.0 ** rng.integers(-3, 5, (rows, 1))),
        "columns": np.rint(rng.normal(0, 1, shape) * 2.0 ** rng.integers(-3, 5, columns)),
        "constant": np.full(shape, rng.integers(-128, 128)),
    }
    return made[kind].astype(np.int8)


KNOWN_TABLES = ([10521227, 14917661, 15737829, 16336813], [1096742, 5054364, 5874532, 6473516])
KINDS = ("any", "zero", "extremes", "gaussian", "twins", "rows", "columns", "constant")
SHAPES = st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from(KINDS))


def stored_streams(shapes, floats, text: bytes, rng: np.random.Generator) -> dict[str, Stored]:
    """Tensors of every storage kind with these integers, floats and bytes."""
    stored = {"text": Stored(torch.from_numpy(np.frombuffer(text, np.uint8).copy()))}
    for place, (rows, columns, kind) in enumerate(shapes):
        matrix = torch.from_numpy(drawn((rows, columns), kind, rng))
        stored[f"blocks.{place}.w"] = Stored(matrix, torch.ones(rows).half())
    for place, (size, ascending) in enumerate(floats):
        values = rng.standard_normal(size).astype(np.float16)
        values = np.sort(np.abs(values)) if ascending else values
        stored[f"f{place}"] = Stored(torch.from_numpy(values))
    return stored


def body_of(stored: dict[str, Stored]) -> bytes:
    """The body of these tensors under no codec."""
    blob = train_gpt.encode_artifact(HEADER, stored)
    return zstandard.ZstdDecompressor().decompress(blob[train_gpt.PRELUDE.size :])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(SHAPES, max_size=6),
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=4),
    st.binary(max_size=50),
    st.integers(0, 99),
)
def test_bodies_of_any_streams_come_back(shapes, floats, text, seed) -> None:
    body = body_of(stored_streams(shapes, floats, text, np.random.default_rng(seed)))
    packed = train_gpt.compress(body, "range")
    assert packed == train_gpt.compress(body, "range")
    assert train_gpt.decompress(packed, "range", len(body)) == body


def test_scales_in_order_take_a_fifth() -> None:
    scales = torch.rand(2048, generator=torch.Generator().manual_seed(0)).half()
    sizes = [
        len(train_gpt.compress(body_of({"s": Stored(values)}), "range"))
        for values in (scales, scales.sort().values)
    ]
    assert sizes[1] < 0.4 * sizes[0]


def naive_decode(stream: bytes, lanes: int, steps: list) -> list[int]:
    """rANS by its definition, one symbol at a time; steps: (ends, tables) of each call."""
    words = [int.from_bytes(stream[at : at + 2], "little") for at in range(0, len(stream), 2)]
    states = [words[3 * k] | words[3 * k + 1] << 16 | words[3 * k + 2] << 32 for k in range(lanes)]
    at, symbols = 3 * lanes, []
    for ends, tables in steps:
        for place, table in enumerate(tables):
            lane = place % lanes
            slot = states[lane] % 65536
            symbol = max(k for k, end in enumerate(ends[table][:-1]) if end <= slot)
            start, end = int(ends[table][symbol]), int(ends[table][symbol + 1])
            states[lane] = (end - start) * (states[lane] // 65536) + slot - start
            if states[lane] < 1 << 32:
                states[lane] = states[lane] << 16 | words[at]
                at += 1
            symbols.append(symbol)
    assert at == len(words) and states == [1 << 32] * lanes
    return symbols


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_the_stream_is_rans_by_its_definition(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    encoder, steps, expected = train_gpt.RangeEncoder(), [], []
    for size in (5, 40, 1, 33):
        cuts = np.sort(rng.choice(np.arange(1, 65536), (2, 6)), axis=1)
        cuts = np.sort(cuts + np.arange(6), axis=1).clip(max=65535)
        ends = np.concatenate([np.zeros((2, 1)), cuts, np.full((2, 1), 65536)], 1).astype(np.int64)
        possible = [np.flatnonzero(np.diff(row)) for row in ends]
        tables = rng.integers(0, 2, size)
        symbols = np.array([rng.choice(possible[table]) for table in tables])
        encoder.code(ends, tables, symbols)
        steps.append((ends, tables))
        expected += list(symbols)
    stream = encoder.stream(lanes)
    assert naive_decode(stream, lanes, steps) == expected
    decoder = train_gpt.RangeDecoder(b"", stream, lanes)
    made = [decoder.code(ends, tables, np.zeros(len(tables))) for ends, tables in steps]
    decoder.check_end()
    assert list(np.concatenate(made)) == expected


# How small it is


def coded_bytes(*matrices: np.ndarray) -> int:
    """Bytes that the range coder takes."""
    return sum(map(len, train_gpt.encode_integers(matrices)))


def entropy_bytes(matrix: np.ndarray) -> float:
    """Order-0 entropy of a matrix in bytes."""
    shares = np.bincount(matrix.ravel().astype(int) + 128) / matrix.size
    return -matrix.size * float((shares[shares > 0] * np.log2(shares[shares > 0])).sum()) / 8


def test_integers_without_structure_take_their_entropy() -> None:
    rng = np.random.default_rng(1)
    for deviation in (0.2, 0.7, 2.7, 9.0, 30.0):
        matrix = np.rint(rng.normal(0, deviation, (512, 512))).clip(-127, 127).astype(np.int8)
        lanes = train_gpt.lanes_for(matrix.size)
        assert coded_bytes(matrix) < 1.004 * entropy_bytes(matrix) + 6 * lanes + 100


def test_deviations_by_row_and_by_column_are_made_use_of() -> None:
    rng = np.random.default_rng(2)
    rows, columns = np.exp2(rng.normal(0, 0.7, 512)), np.exp2(rng.normal(0, 0.7, 512))
    noise = rng.standard_normal((512, 512))
    alike = np.rint(4 * noise).clip(-127, 127).astype(np.int8)
    told = np.rint(4 * noise * rows[:, None] * columns).clip(-127, 127).astype(np.int8)
    assert coded_bytes(told) < 0.97 * entropy_bytes(told)
    # Logarithms of deviations average 0, and so does what they add to the entropy.
    assert coded_bytes(told) < 1.02 * coded_bytes(alike)
    assert coded_bytes(told.T.copy()) < 1.02 * coded_bytes(alike)


def test_rows_that_are_alike_cost_their_differences() -> None:
    rng = np.random.default_rng(3)
    matrix = rng.normal(0, 20, (400, 64)).clip(-90, 90)
    matrix[100::2] = matrix[7] + rng.normal(0, 0.5, (150, 64))
    matrix = np.rint(matrix).astype(np.int8)
    apart = coded_bytes(matrix[:100], matrix[101::2])
    assert coded_bytes(matrix) < apart + 0.3 * 150 * 64


def correlated(rows: int, columns: int) -> np.ndarray:
    """An int8 table whose columns share six factors."""
    rng = np.random.default_rng(4)
    made = 4 * rng.standard_normal((rows, 6)) @ rng.standard_normal((6, columns))
    return np.rint(made + 5 * rng.standard_normal(made.shape)).clip(-127, 127).astype(np.int8)


def test_correlated_columns_of_a_table_are_made_use_of(monkeypatch) -> None:
    table = correlated(4096, 32)
    predicted = coded_bytes(table)
    monkeypatch.setattr(train_gpt, "MAX_PREDICTED_MATRICES", 0)
    assert predicted < coded_bytes(table) - 0.5 * table.size / 8


def test_only_so_many_tables_of_many_rows_are_predicted() -> None:
    tables = [correlated(512, 16)] * 9
    facts, stream = train_gpt.encode_integers(tables)
    shapes = [table.shape for table in tables]
    assert np.array_equal(train_gpt.decode_integers(facts, stream, shapes), tables)
    kinds = facts[::5]  # there are no twins
    assert [kind & 64 for kind in kinds] == [64] * train_gpt.MAX_PREDICTED_MATRICES + [0]
    more = bytearray(facts)
    more[40] |= 64
    with pytest.raises(ValueError, match="is predicted"):
        train_gpt.decode_integers(bytes(more), stream, shapes)
    facts, stream = train_gpt.encode_integers([tables[0][:127]])
    with pytest.raises(ValueError, match="is predicted"):
        train_gpt.decode_integers(bytes([facts[0] | 64]) + facts[1:], stream, [(127, 16)])


# If attacked


def small_body(seed: int) -> bytes:
    """A body of a few hundred bytes with integers of every kind."""
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(1, 9)), int(rng.integers(1, 30)), kind) for kind in KINDS]
    return body_of(stored_streams(shapes, [(9, False), (5, True)], b"tokens", rng))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.data())
def test_any_change_of_a_byte_is_refused_or_reads_as_something(seed: int, data) -> None:
    body = small_body(seed)
    packed = bytearray(train_gpt.compress(body, "range"))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(packed) - 1))
        packed[place] ^= data.draw(st.integers(1, 255))
    try:
        train_gpt.decompress(bytes(packed), "range", len(body))
    except Refusal as refusal:
        assert 0 < len(str(refusal)) < 300


def test_every_shortened_and_every_lengthened_body_is_refused() -> None:
    body = small_body(0)
    packed = train_gpt.compress(body, "range")
    for size in range(len(packed)):
        with pytest.raises(Refusal, match=r"\w"):
            train_gpt.decompress(packed[:size], "range", len(body))
    for extra in (b"\0", b"\0\0", b"x" * 99):
        with pytest.raises(Refusal, match=r"\w"):
            train_gpt.decompress(packed + extra, "range", len(body))
    for size in (0, 1, len(body) - 1, len(body) + 1, 1 << 28):
        with pytest.raises(Refusal, match="disagree|does not"):
            train_gpt.decompress(packed, "range", size)


def test_it_is_smaller_than_every_codec_on_matrices_like_a_models() -> None:
    rng = np.random.default_rng(1)
    stored = {}
    for layer in range(2):
        units = rng.lognormal(0, 0.5, 192)
        for name, matrix in (
            ("c_q", rng.normal(0, 2.4, (64, 64))),
            ("fc", rng.normal(0, 2.4, (192, 64))),
            ("proj", rng.normal(0, 2.4, (64, 192)) * units),
        ):
            q = torch.from_numpy(np.rint(matrix).clip(-127, 127).astype(np.int8))
            stored[f"blocks.{layer}.{name}"] = Stored(q, torch.ones(len(q)).half())
    body = body_of(stored)
    sizes = {codec: len(train_gpt.compress(body, codec)) for codec in CODECS}
    assert sizes.pop("range") < 0.97 * min(sizes.values())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=60), st.lists(SHAPES, max_size=4))
def test_bytes_of_chance_are_no_integers(stream: bytes, facts: bytes, shapes) -> None:
    with contextlib.suppress(ValueError):
        train_gpt.decode_integers(facts, stream, [shape[:2] for shape in shapes])


@pytest.mark.parametrize(
    "shapes",
    [
        [(1 << 14, (1 << 13) + 1)],
        [(1 << 23, 1)],
        [(0, 1 << 23)],
        [(1, 1)] * 5000,
        [(-1, 4)],
        [(1.0, 2)],
        [(True, 2)],
        [(4,)],
        [(2, 2, 2)],
    ],
)
def test_shapes_that_promise_too_much_are_refused_at_once(shapes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\w"):
            train_gpt.decode_integers(b"\0" * 99, b"\0" * 99, shapes)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_tiny_stream_of_many_integers_is_read_in_bounded_memory() -> None:
    zeros = np.zeros((1 << 12, 1 << 12), np.int8)
    facts, stream = train_gpt.encode_integers([zeros])
    assert len(facts) + len(stream) < 1 << 14
    tracemalloc.start()
    try:
        (back,) = train_gpt.decode_integers(facts, stream, [zeros.shape])
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not back.any() and most < 6 * zeros.size + 100 * train_gpt.MAX_CHUNK


def test_the_bytes_are_those_of_every_machine() -> None:
    # What makes tables is exact: these sums change with any difference of rounding.
    sums = [int(train_gpt.prior_counts(top).sum()) for top in (1, 31, 63, 127)]
    checks = [int((train_gpt.prior_counts(top) % 9973).sum()) for top in (1, 31, 63, 127)]
    assert (sums, checks) == KNOWN_TABLES
