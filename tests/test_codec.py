"""The range coder of benchmarks: exact, the same everywhere, near the entropy, safe if attacked."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import math
import random
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import CODECS, Refusal, Stored

sys.path.insert(0, str(ROOT / "benchmarks"))
import range_coder  # noqa: E402
from range_coder import RangeDecoder, RangeEncoder, compress, decompress, pack, unpack  # noqa: E402

EMPTY = {"settings": {}, "tokenizer": "", "validation": ""}


def integers(q: np.ndarray, scales: np.ndarray | None = None) -> Stored:
    """A tensor of integers, its scales 1 unless given."""
    scales = np.ones(len(q)) if scales is None else scales
    return Stored(torch.from_numpy(q.astype(np.int8)), torch.from_numpy(scales.astype(np.float16)))


def body_of(stored: dict[str, Stored]) -> bytes:
    """The body of an artifact before any codec."""
    return range_coder.body_of(EMPTY, stored)


# What comes back


NAMES = st.sampled_from(
    [
        "tok_emb.weight",
        "a",
        *(
            f"blocks.{layer}.{name}.weight"
            for layer in (0, 1, 10)
            for name in ("attn.c_q", "mlp.fc", "mlp.proj")
        ),
    ]
)
KINDS = st.sampled_from(["any", "zero", "extremes", "gaussian", "alike", "rows"])


def drawn(shape: tuple[int, int], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Integers of one kind of degeneracy."""
    r, c = shape
    return {
        "any": rng.integers(-128, 128, shape),
        "zero": np.zeros(shape),
        "extremes": rng.choice([-128, -127, 127], shape),
        "gaussian": np.clip(np.rint(rng.normal(0, 9, shape)), -31, 31),
        "alike": rng.integers(-100, 100, c) + rng.integers(-1, 2, shape),
        "rows": np.rint(rng.normal(0, 1, shape) * 2.0 ** rng.integers(-3, 5, (r, 1))),
    }[kind]


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(NAMES, st.tuples(st.integers(0, 40), st.integers(0, 40), KINDS), max_size=6),
    st.integers(0, 99),
)
def test_integers_of_any_shape_and_kind_come_back(shapes: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    body = body_of(
        {
            name: integers(drawn((r, c), kind, rng), rng.lognormal(-3, 1, r))
            for name, (r, c, kind) in shapes.items()
        }
    )
    packed = compress(body)
    assert decompress(packed, len(body)) == body
    assert compress(body) == packed


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_that_are_no_body_come_back(body: bytes) -> None:
    assert decompress(compress(body), len(body)) == body


@pytest.mark.parametrize("header", [EMPTY, {**EMPTY, "tensors": [], "settings": {"A": "1"}}])
def test_headers_and_tensors_come_back(header: dict) -> None:
    stored = {**model_like(8, 0), "gain": Stored(torch.ones(5, dtype=torch.float16))}
    read, tensors = unpack(pack(header, stored))
    assert {**read, "tensors": 0} == {**header, "tensors": 0}
    assert tensors.keys() == stored.keys()
    for name, was in stored.items():
        assert torch.equal(tensors[name].values, was.values)
        assert (was.scale is None) == (tensors[name].scale is None)
        assert was.scale is None or torch.equal(tensors[name].scale, was.scale)


def test_a_claim_beyond_the_bound_is_refused() -> None:
    for packed in (b"", b"1234567", struct.pack("<Q", (1 << 30) + 1) + bytes(99)):
        with pytest.raises(Refusal, match="bound is 268,435,456"):
            unpack(packed)


def model_like(width: int, seed: int, layers: int = 2) -> dict[str, Stored]:
    """Gaussian matrices of a small model, columns of mlp.proj as large as rows of mlp.fc, and a
    table a quarter of whose rows are nearly the same."""
    rng, stored = np.random.default_rng(seed), {}
    for layer in range(layers):
        units = rng.lognormal(0, 0.5, 3 * width)
        block = f"blocks.{layer}"
        stored[f"{block}.attn.c_q.weight"] = integers(np.rint(rng.normal(0, 2.4, (width, width))))
        stored[f"{block}.mlp.fc.weight"] = integers(
            np.rint(rng.normal(0, 2.4, (3 * width, width))), units
        )
        stored[f"{block}.mlp.proj.weight"] = integers(
            np.clip(np.rint(rng.normal(0, 2.4, (width, 3 * width)) * units), -127, 127)
        )
    table = np.rint(rng.normal(0, 6, (8 * width, width)))
    table[::4] = table[0] + rng.integers(-1, 2, (2 * width, width))
    stored["tok_emb.weight"] = integers(table)
    return stored


def test_the_bytes_do_not_depend_on_threads(tmp_path: object) -> None:
    body = body_of(model_like(48, 0))
    (tmp_path / "body").write_bytes(body)
    script = (
        "import hashlib, sys, range_coder, pathlib; body = pathlib.Path(sys.argv[1])"
        ".read_bytes(); print(hashlib.sha256(range_coder.compress(body)).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / "body"],
            cwd=ROOT / "benchmarks",
            check=True,
            text=True,
            capture_output=True,
            env={"OMP_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n},
        ).stdout.strip()
        for n in "12"
    }
    assert digests == {hashlib.sha256(compress(body)).hexdigest()}


# The coder against a scalar one


def scalar_encode(steps: list, lanes: int) -> list[int]:
    """rANS by its equation, one symbol at a time, in Python's integers: words as they are read."""
    states, words = [1 << 32] * lanes, []
    symbols = [
        (k % lanes, int(start), int(f))
        for starts, frequencies in steps
        for k, (start, f) in enumerate(zip(starts, frequencies, strict=True))
    ]
    # A lane's state is renewed before its symbol; within lanes read together, the last first.
    for lane, start, f in reversed(symbols):
        if states[lane] >= f << 32:
            words.append(states[lane] & 0xFFFF)
            states[lane] >>= 16
        states[lane] = (states[lane] // f << 16) + states[lane] % f + start
    return [x >> shift & 0xFFFF for x in states for shift in (0, 16, 32)] + words[::-1]


def scalar_decode(words: list[int], steps: list, lanes: int) -> list[int]:
    """The slots' symbols, one at a time: tables are (running sums, bins) by step."""
    states = [words[3 * k] | words[3 * k + 1] << 16 | words[3 * k + 2] << 32 for k in range(lanes)]
    rest, read = iter(words[3 * lanes :]), []
    for ends, bins in steps:
        for k, b in enumerate(bins):
            x, sums = states[k % lanes], [int(end) for end in ends[b]]
            symbol = next(s for s in range(len(sums) - 1) if sums[s] <= x & 0xFFFF < sums[s + 1])
            x = (sums[symbol + 1] - sums[symbol]) * (x >> 16) + (x & 0xFFFF) - sums[symbol]
            states[k % lanes] = x << 16 | next(rest) if x < 1 << 32 else x
            read.append(symbol)
    assert states == [1 << 32] * lanes
    assert next(rest, None) is None
    return read


def random_tables(rng: np.random.Generator) -> np.ndarray:
    """Running sums of 1 to 5 tables of the same 1 to 9 symbols, no frequency 0."""
    n = int(rng.integers(1, 10))
    cuts = [
        np.sort(rng.choice(np.arange(1, 1 << 16), n - 1, replace=False))
        for _ in range(rng.integers(1, 6))
    ]
    return np.array([[0, *cut, 1 << 16] for cut in cuts])


@pytest.mark.parametrize("seed", range(20))
def test_the_coder_agrees_with_a_scalar_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lanes, encoder, tables = int(rng.integers(1, 9)), RangeEncoder(), []
    for _ in range(rng.integers(1, 6)):
        ends = random_tables(rng)
        bins = rng.integers(0, len(ends), rng.integers(0, 60))
        symbols = rng.integers(0, ends.shape[1] - 1, len(bins))
        encoder.code(ends, bins, symbols)
        tables.append((ends, bins, symbols))
    stream = encoder.stream(lanes)
    words = np.frombuffer(stream, "<u2").tolist()
    assert words == scalar_encode(encoder.steps, lanes)
    decoder = RangeDecoder(b"", stream, lanes)
    read = [decoder.code(ends, bins, np.zeros_like(bins)).tolist() for ends, bins, _ in tables]
    assert read == [symbols.tolist() for *_, symbols in tables]
    assert sum(read, []) == scalar_decode(words, [table[:2] for table in tables], lanes)
    assert decoder.at == len(words)


# The model against its equations


class Spy(RangeEncoder):
    """Keeps the tables that integers are coded with."""

    def __init__(self):
        super().__init__()
        self.bins, self.sums = [], []

    def code(self, ends: np.ndarray, bins: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        self.bins.append(bins.tolist())
        self.sums.append(ends)
        return super().code(ends, bins, symbols)


def naive_bins(Q: np.ndarray, columns: np.ndarray, told: bytes) -> list[list[int]]:
    """The bin of every integer by step, each from all integers before it, one by one."""
    L, r, c = Q.shape
    floats = [float(np.array(byte << 7, np.uint16).view(np.float16)) for byte in told]
    weight_i, weight_j, m = floats[0], floats[1], floats[2:]
    history, steps, done = [], [], 0  # of (layer, i, j, a, b, |q|)
    while done < c:
        width, step, new = min(c - done, max(1, done // 8)), [], []
        for layer in range(L):
            for i in range(r):
                for k in range(width):
                    j = (done + k - i) % c
                    row = [h for h in history if h[:2] == (layer, i)]
                    column = [h for h in history if (h[0], h[2]) == (layer, j)]
                    a = (
                        256 * weight_i
                        + sum(round(256 * q / max(b * m[layer], 2**-7)) for *_, b, q in row)
                    ) / (256 * (weight_i + done))
                    # All columns of a stack were met as often.
                    b = (
                        round(256 * weight_j * columns[layer, j])
                        + sum(
                            round(256 * q / max(a_then * m[layer], 2**-7))
                            for *_, a_then, _, q in column
                        )
                    ) / (256 * (weight_j + len(column)))
                    expected = min(max(a * b * m[layer], 2.0**-6), 127.0)
                    octave = math.floor(math.log2(expected))
                    step.append(4 * (octave + 6) + int(4 * (expected / 2.0**octave - 1)))
                    new.append((layer, i, j, a, b, abs(int(Q[layer, i, j]))))
        history += new
        steps.append(step)
        done += width
    return steps


@pytest.mark.parametrize(
    ("shape", "seed"),
    [((1, 9, 20), 0), ((3, 4, 18), 1), ((2, 25, 11), 2), ((1, 1, 30), 3), ((1, 30, 1), 4)],
)
def test_an_integer_is_coded_by_the_mean_that_its_row_and_column_suggest(
    shape: tuple[int, int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    Q = np.rint(rng.normal(0, 3, shape) * rng.lognormal(0, 0.7, shape[2])).clip(-31, 31)
    columns, spy = rng.choice([0.25, 0.5, 1.0], (shape[0], shape[2])), Spy()
    counts = range_coder.first_counts(31)
    range_coder.code_stack(spy, Q.astype(np.int16), 31, counts, columns)
    assert spy.bins == naive_bins(Q, columns, bytes(spy.hints))
    for sums in spy.sums:
        assert (np.diff(sums) >= 1).all()
        assert (sums[:, 0] == 0).all()
        assert (sums[:, -1] == 1 << 16).all()
    seen = counts - range_coder.first_counts(31)  # 256 an integer, in its bin
    assert seen.sum() == 256 * Q.size
    assert np.array_equal(seen.sum(0) // 256, np.bincount(Q.astype(int).ravel() + 31, minlength=63))


@pytest.mark.parametrize("top", [1, 31, 127, 128])
def test_first_tables_are_symmetric_and_have_the_mean_of_their_bin(top: int) -> None:
    k = np.abs(np.arange(-top, top + 1))
    for b, row in enumerate(range_coder.first_counts(top).astype(float)):
        assert np.array_equal(row, row[::-1])
        assert (np.diff(row[top:]) <= 0).all()
        mean = 2.0 ** (b // 4 - 6) * (1 + (b % 4 + 0.5) / 4)
        if 0.5 < mean < top / 5:
            assert (row * k).sum() / row.sum() == pytest.approx(mean, rel=0.12)
    assert range_coder.first_counts(0).shape == (52, 1)


def test_rows_that_are_alike_are_found_and_only_they() -> None:
    rng = np.random.default_rng(0)
    Q, alike = rng.normal(0, 20, (300, 32)), rng.random(300) < 0.3
    alike[0] = True
    Q[alike] = Q[0] * rng.uniform(0.5, 1.5, (alike.sum(), 1)) + rng.normal(0, 2, (alike.sum(), 32))
    assert np.array_equal(range_coder.twins(np.rint(Q).clip(-127, 127)), alike)
    assert not range_coder.twins(np.zeros((9, 4))).any()


# How near the entropy


def test_gaussians_take_what_their_scales_leave_of_them() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.lognormal(0, 0.4, (256, 1)), rng.lognormal(0, 0.4, 256)
    spread = 4 * rows * columns
    q = np.rint(rng.normal(0, 1, (256, 256)) * spread).clip(-127, 127)
    steps = np.arange(-128, 129)
    cdf = torch.special.ndtr(torch.from_numpy((q[..., None] + [-0.5, 0.5]) / spread[..., None]))
    ideal = -(cdf[..., 1] - cdf[..., 0]).log2().sum().item() / 8
    shares = np.array([(q == k).mean() for k in steps])
    order_0 = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * q.size / 8
    size = len(compress(body_of({"w": integers(q)})))
    assert ideal < size < 1.025 * ideal
    assert size < 0.96 * order_0


def test_it_beats_every_codec_on_matrices_like_a_models() -> None:
    body = body_of(model_like(64, 1))
    sizes = {codec: len(train_gpt.compress(body, codec)) for codec in CODECS}
    assert len(compress(body)) < 0.98 * min(sizes.values())


# Hostile streams


def test_every_truncation_and_addition_is_refused() -> None:
    body = body_of(model_like(4, 0))
    packed = compress(body)
    for end in range(0, len(packed), 1 + len(packed) // 300):
        with pytest.raises(Refusal):
            decompress(packed[:end], len(body))
    for more in (b"\0", b"\0\0", packed):
        with pytest.raises(Refusal):
            decompress(packed + more, len(body))
    for size in (0, 1, len(body) - 1, len(body) + 1, 1 << 29):
        with pytest.raises(Refusal):
            decompress(packed, size)


def test_flipped_bits_are_refused_or_read_and_nothing_else() -> None:
    body = body_of(model_like(3, 1))
    packed, rng, read = compress(body), random.Random(0), 0
    sealed = struct.pack("<Q", len(body))
    for _ in range(500):
        damaged = bytearray(packed)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        begin = time.perf_counter()
        try:
            unpack(sealed + bytes(damaged))
            read += 1
        except Refusal as refusal:
            assert len(str(refusal).splitlines()) == 1
        assert time.perf_counter() - begin < 5
    # A stream that leads nowhere is refused; what is left is what LZMA holds of floats and hints.
    assert read < 50


def forged(tensors: list, hints: bytes, stream: bytes) -> tuple[bytes, int]:
    """A stream of the coder whose parts are all as given, and the size it claims."""
    text = json.dumps({**EMPTY, "tensors": tensors}).encode()
    floats = b"\0\x3c" * sum(
        shape[0] if is_integer else math.prod(shape) for _, is_integer, *shape in tensors
    )
    told = struct.pack("<I", len(text)) + text + floats[1::2] + floats[::2] + hints
    packed = lzma.compress(told, lzma.FORMAT_RAW, filters=range_coder.RAW_LZMA)
    size = (
        4
        + len(text)
        + len(floats)
        + sum(math.prod(shape) for _, is_integer, *shape in tensors if is_integer)
    )
    return struct.pack("<I", len(packed) + range_coder.PLANES) + packed + stream, size


@pytest.mark.parametrize("hints", [bytes([k] * 40) for k in (0, 1, 127, 128, 254, 255)])
@pytest.mark.parametrize("shape", [(7, 9), (200, 3), (1, 200)])
@pytest.mark.filterwarnings("error")
def test_hints_of_any_bytes_are_survived(hints: bytes, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for stream in (rng.bytes(6), rng.bytes(6 + 2000), bytes(3000), b"\xff" * 3000):
        packed, size = forged([["w", 1, *shape]], hints, stream)
        with pytest.raises(Refusal):
            decompress(packed, size)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([["w", 1, 1 << 14, 1 << 14]], "268,435,456 integers"),
        ([["w", 1, 1 << 25, 2]], "rows"),
        ([["w", 1, (1 << 20) + 1, 1]], "rows"),
        ([[f"w{k}", 1, 1, 1] for k in range(1025)], "1,025 matrices"),
        ([[f"blocks.{k}.w", 1, 1 << 19, 1] for k in range(3)], "rows"),
    ],
    ids=["integers", "rows", "a row too many", "matrices", "stack"],
)
def test_more_than_the_bounds_is_refused(tensors: list, said: str) -> None:
    text = json.dumps({**EMPTY, "tensors": tensors}).encode()
    size = 4 + len(text) + sum(math.prod(shape) + 2 * shape[0] for _, _, *shape in tensors)
    told = (
        struct.pack("<I", len(text))
        + text
        + bytes(sum(2 * shape[0] for _, _, *shape in tensors) + 100)
    )
    packed = lzma.compress(told, lzma.FORMAT_RAW, filters=range_coder.RAW_LZMA)
    with pytest.raises(Refusal, match=said):
        decompress(
            struct.pack("<I", len(packed) + range_coder.PLANES) + packed + bytes(1 << 16), size
        )


def test_a_tall_table_is_decoded_in_bounded_steps() -> None:
    packed, size = forged(
        [["w", 1, 1 << 20, 16]], bytes([1]) + bytes(1 << 17) + bytes(3), bytes(6 * 256)
    )
    tracemalloc.start()
    try:
        with pytest.raises(Refusal):
            decompress(packed, size)
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()


# The format


GOLDEN = """
rgAAAOABDQCmAABdgDC+Ol36pTRnvR3ie8bDdF93Yxq8GkXID83ZBoalNzcNfvEWfEG7BVa2lkTAVFtSNZMol9qIOpYJItYBdFW5
EroUrelPObCGnJNUT6GTvLVZDjUqnL6KIEX6byor4gedXH4eNDBwb4xO931Iu+Yv/QYieqFKgTNndEOinlrAi0EZp7VinZqjkyvV
DSu8rUiFvuo4P6vxGbShMXwSqxkyKnixOK4gAKP7CiWIAOIgvIwZYHk3bzqCVlkNH1uepqBLyqKed1Xh
"""


def test_an_artifact_of_today_is_read_as_ever() -> None:
    stored = model_like(2, 0, layers=1)
    body = body_of(stored)
    assert decompress(base64.b64decode(GOLDEN), len(body)) == body
