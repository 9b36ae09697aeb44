"""An experiment: a range coder for the integers of an artifact. No run of train_gpt.py uses it.

What it is: interleaved rANS with adaptive tables. An integer's table is chosen by the mean
magnitude that what was coded so far of its row and its column suggests, so that the decoder needs
no tables; the header, the floats and a few hints go through LZMA beside it.

What it measured, in bytes of whole artifacts (records/ARTIFACT.md, README.md): 1.2 to 2.8 % less
than brotli-11 over seven small models, 5.7 to 5.9 % less at width 256; on a mini of 965 steps
355,930 against brotli's 360,378 and CODEC=zstd's 368,730.

Why it is not in train_gpt.py: a codec of the project's own must beat brotli-11 by 2 %, which this
misses on five of those seven and on one of two artifacts of a whole mini run, and its 220 lines
would break the file's cap.

    packed = pack(*train_gpt.read_artifact(path))
    header, stored = unpack(packed)
"""

from __future__ import annotations

import io
import itertools
import json
import lzma
import math
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402
from train_gpt import MAX_BODY_BYTES, MAX_HEADER_BYTES, TINY_STEP, Refusal, Stored  # noqa: E402

RAW_LZMA = ({"id": lzma.FILTER_LZMA2, "preset": train_gpt.LZMA_PRESET, "lc": 0, "pb": 0},)
MAX_RANGE_INTEGERS, MAX_RANGE_MATRICES = 1 << 27, 1 << 10  # bound a decoder's time
PLANES = 1 << 31
MAX_STEP, SYMBOLS_A_LANE = 1 << 20, 1 << 16  # integers decoded at once, and so rows of a stack
OCTAVES, BINS, PRIOR = (-6, 7), 4, 128  # of mean |q|; bins an octave; a first table's samples
UNIT, SMALLEST = 256, 2.0**-7  # fixed point of sums; smallest divisor of what they sum
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error)


class RangeEncoder:
    """Interleaved rANS: 48-bit states in lanes, 16-bit words, frequencies of 2^16 in all.

    A symbol of frequency f, start F the sum of those before it, takes the state x of its lane to
    (x // f) 2^16 + x % f + F. Decoding runs backwards, so the stream is written from its end.
    """

    def __init__(self):
        self.hints, self.steps = bytearray(), []

    def hint(self, size: int, choose: Callable[[], bytes]) -> np.ndarray:
        """Bytes that the decoder is told."""
        self.hints += (told := choose())
        return np.frombuffer(told, np.uint8)

    def code(self, ends: np.ndarray, bins: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Note symbols of tables `bins`; ends: running sums of their frequencies, from 0."""
        starts = ends[bins, symbols]
        self.steps.append((starts, ends[bins, symbols + 1] - starts))
        return symbols

    def stream(self, lanes: int) -> bytes:
        """Final states, then words in the order in which a decoder wants them."""
        states, words = np.full(lanes, 1 << 32, np.uint64), []
        for starts, frequencies in reversed(self.steps):
            for at in reversed(range(0, len(starts), lanes)):
                f = frequencies[at : at + lanes].astype(np.uint64)
                x = states[: len(f)]
                full = x >= f << 32
                words.append(x[full].astype("<u2"))  # the low half
                x[full] >>= 16
                x[:] = (x // f << 16) + x % f + starts[at : at + lanes]
        words.append(states.astype("<u8").view("<u2").reshape(-1, 4)[:, :3])
        return b"".join(part.tobytes() for part in reversed(words))


class RangeDecoder:
    """Reads what RangeEncoder wrote; raises ValueError where it cannot have."""

    def __init__(self, hints: bytes, stream: bytes, lanes: int):
        self.hints, self.at = io.BytesIO(hints), 3 * lanes
        self.words = np.frombuffer(stream, "<u2").astype(np.uint64)
        low, middle, high = self.words[: self.at].reshape(lanes, 3).T
        self.states = low | middle << 16 | high << 32

    def hint(self, size: int, choose: Callable) -> np.ndarray:
        """The next bytes that the encoder told; raises ValueError past their end."""
        return np.frombuffer(self.hints.read(size), np.uint8, size)

    def code(self, ends: np.ndarray, bins: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """The next symbols; of those given only the number counts."""
        bounds = (ends[:, :-1] + (np.arange(len(ends)) << 16)[:, None]).ravel()
        frequencies, read = np.diff(ends).ravel().astype(np.uint64), np.empty_like(bins)
        for at in range(0, len(bins), lanes := len(self.states)):
            x = self.states[: len(bins) - at]
            slots = (x & 0xFFFF).astype(np.int64) + (bins[at : at + lanes] << 16)
            read[at : at + lanes] = found = np.searchsorted(bounds, slots, side="right") - 1
            x[:] = frequencies[found] * (x >> 16) + (slots - bounds[found]).astype(np.uint64)
            low = x < 1 << 32
            end = self.at + np.count_nonzero(low)
            x[low] = x[low] << 16 | self.words[self.at : end]  # ValueError where too few are left
            self.at = end
        return read - bins * (ends.shape[1] - 1)


def first_counts(top: int) -> np.ndarray:
    """A table of PRIOR g^(k k), |k| <= top, for each bin of mean |k|; (bins, 2 top + 1).

    A Gaussian's g is exp(-1 / (pi m^2)). Here and below only + - * / of float64, each rounded as
    IEEE 754 says, and sums of integers: all machines agree.
    """
    octaves = np.ldexp(1.0, np.arange(*OCTAVES))[:, None]
    means = (octaves * (1 + (np.arange(BINS) + 0.5) / BINS)).reshape(-1, 1)
    g = np.repeat(1 - 1 / (1 + means / 4 + math.pi * means * means), top, 1)
    half = np.cumprod(np.cumprod(g * g, 1) / g, 1)  # of g^(2k - 1)
    table = np.concatenate([half[:, ::-1], np.ones_like(means), half], 1)
    return np.rint(UNIT * PRIOR * table / np.maximum(math.pi * means, 1)).astype(np.int64)


def choose_hints(Q: np.ndarray, columns: np.ndarray) -> bytes:
    """What code_stack() is told: how many samples the prior of a row's, of a column's mean |q|
    is worth, by moments: 0.57, the variance of log |q|, over that of their true logs; and the
    mean |q| of each matrix. All as the 5 exponent and 3 mantissa bits of a float16."""
    size, weights = np.abs(Q) / columns[:, None], []
    for axis in (2, 1):
        logs, noise = np.log(size.mean(axis) + 0.001), 0.57 / Q.shape[axis]
        weights.append(0.57 / max(logs.var(axis=1).mean() - noise, 2e-4))
    told = np.array([*weights, *size.mean((1, 2))], np.float16)
    return ((told.view(np.uint16) + 64) >> 7).astype(np.uint8).tobytes()


def code_stack(
    coder: RangeEncoder | RangeDecoder,
    Q: np.ndarray,
    top: int,
    counts: np.ndarray,
    columns: np.ndarray,
) -> None:
    """Code (L, r, c) integers within +-top, in place, counting them in `counts`.

    Diagonals of all L matrices are coded together, so that each step meets every row and every
    column. An integer's table is that of the bin of a_i b_j m: the mean |q| of its matrix, and
    how many times larger row i and column j were so far. columns: (L, c), what b_j starts from.
    """
    L, r, c = Q.shape
    told = coder.hint(2 + L, lambda: choose_hints(Q, columns)).astype(np.uint16) << 7
    told = np.fmax(np.fmin(told.view(np.float16).astype(np.float64), 2.0**12), SMALLEST)
    weight_i, weight_j, m, size = told[0], told[1], told[2:, None, None], 2 * top + 1
    rows, columns = np.full((L, r), UNIT * weight_i), np.rint(UNIT * weight_j * columns)
    seen, done, i = np.zeros(c), 0, np.arange(r)[:, None]
    while done < c:
        width = min(c - done, max(1, min(done // 8, MAX_STEP // (L * r))))
        j = (np.arange(done, done + width) - i) % c
        a = rows[:, :, None] / (UNIT * (weight_i + done))
        b = (columns / (UNIT * (weight_j + seen)))[:, j]
        expected = np.clip(a * b * m, 2.0 ** OCTAVES[0], 2.0 ** OCTAVES[1] - 1)
        bins = (expected.astype(np.float32).view(np.int32) >> 21).astype(np.int64).ravel()
        bins -= (127 + OCTAVES[0]) * BINS  # exponent and 2 bits of the mantissa, in a float32
        f = 1 + counts * ((1 << 16) - size) // counts.sum(1, keepdims=True)
        f[:, top] += (1 << 16) - f.sum(1)
        ends = np.pad(f.cumsum(1), ((0, 0), (1, 0)))
        symbols = coder.code(ends, bins, Q[:, i, j].ravel() + top)
        counts += UNIT * np.bincount(bins * size + symbols, minlength=counts.size).reshape(
            counts.shape
        )
        Q[:, i, j] = symbols.reshape(a.shape[0], *j.shape) - top
        x = UNIT * np.abs(Q[:, i, j].astype(np.float64))
        rows += np.rint(x / np.maximum(b * m, SMALLEST)).sum(2)
        place = np.arange(L)[:, None, None] * c + j
        ratios = np.rint(x / np.maximum(a * m, SMALLEST))
        columns += np.bincount(place.ravel(), ratios.ravel(), L * c).reshape(L, c)
        seen += np.bincount(j.ravel(), minlength=c)
        done += width


def twins(Q: np.ndarray) -> np.ndarray:
    """Which rows of (r, c) point where most others do, as those of unused tokens do; (r,) bool:
    cosine above 0.9 with the one of up to 256 rows that has most such."""
    Q = Q.astype(np.float64)  # in which these sums of integers are exact, in any order
    some, squares = Q[:: len(Q) // 256 + 1], (Q * Q).sum(1)
    products = some @ Q.T
    near = np.sign(products) * products**2 > 0.81 * (some * some).sum(1)[:, None] * squares
    return near[near.sum(1).argmax()]


def code_integers(
    coder: RangeEncoder | RangeDecoder,
    matrices: dict[str, tuple[int, int, int]],
    halves: np.ndarray,
    q: np.ndarray,
) -> None:
    """Code the flat integers q, in place, of matrices {name: (rows, columns, scales' place)}.

    A run of names that differ in numbers only is a stack. Columns of mlp.proj start from the
    scales of mlp.fc, of the same hidden units. Rows of a table with twins are coded as
    differences from the first of them, modulo the grid.
    """
    tables, at = {}, 0
    for (_, r, c), group in itertools.groupby(
        matrices, lambda name: (re.sub(r"\d+", "", name), *matrices[name][:2])
    ):
        L = len(names := list(group))
        Q = q[at : (at := at + L * r * c)].reshape(L, r, c)
        if not Q.size:
            continue
        if L * r > MAX_STEP:
            raise ValueError(f"{L} times {r} rows")
        told = coder.hint(1, lambda Q=Q: bytes([int(np.abs(Q).max()).bit_length()]))
        top = min(128, (1 << min(int(told[0]), 8)) - 1)  # of a grid of 2^n - 1, or of int8
        columns, twin, first = np.ones((L, c)), np.zeros(r, bool), 0
        for b, name in zip(columns, names, strict=True):
            units, _, place = matrices.get(name.replace(".mlp.proj.", ".mlp.fc."), (0, 0, 0))
            if ".mlp.proj." in name and units == c:
                scales = np.fmin(np.abs(halves[place : place + c].astype(np.float64)), 2.0**16)
                b[:] = np.fmax(scales / np.fmax(scales.max(), TINY_STEP), 1 / 64)
        if L == 1:
            told = coder.hint((r + 7) // 8, lambda Q=Q: np.packbits(twins(Q[0])).tobytes())
            twin = np.unpackbits(told)[:r] == 1
            twin[first := twin.argmax()] = False
        for like, chosen in ((0, ~twin), (1, twin)):
            if (part := Q[:, chosen] - like * Q[:, first : first + 1]).size:
                part = (part + top) % (2 * top + 1) - top
                counts = tables.setdefault((top, like), first_counts(top))
                code_stack(coder, part, top, counts, columns)
                part += like * Q[:, first : first + 1]
                Q[:, chosen] = (part + top) % (2 * top + 1) - top


def cut_header(body: bytes) -> tuple[dict, int]:
    """A body's header, its tensors [name, is integer, *shape], and the integers' place, or an
    error of MALFORMED."""
    (header_bytes,) = struct.unpack_from("<I", body)
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"it is longer than {MAX_HEADER_BYTES:,} bytes")
    header = json.loads(body[4 : 4 + header_bytes])
    for name, is_integer, *shape in header["tensors"]:
        whole = all(type(n) is int and 0 <= n <= MAX_BODY_BYTES for n in shape)
        if type(name) is not str or len(shape) > 2 or not whole or (is_integer and len(shape) < 2):
            raise ValueError(f"tensor {name!r} of shape {shape!r}")
    return header, 4 + header_bytes


def range_parts(body: bytes, size: int) -> tuple[int, dict[str, tuple[int, int, int]], int]:
    """Of a body of `size` bytes, or its beginning: bytes before its integers, the matrices of
    those as code_integers() wants them, their number. A body of another kind has no integers."""
    matrices, floats = {}, 0
    try:
        header, start = cut_header(body)
        for name, is_integer, *shape in header["tensors"]:
            if is_integer:
                matrices[name] = (*shape, floats)
            floats += shape[0] if is_integer else math.prod(shape)
    except MALFORMED:
        return size, {}, 0
    n = sum(r * c for r, c, _ in matrices.values())
    if start + n + 2 * floats != size:
        return size, {}, 0
    if n > MAX_RANGE_INTEGERS or len(matrices) > MAX_RANGE_MATRICES:
        raise ValueError(f"{n:,} integers in {len(matrices):,} matrices")
    return start, matrices, n


def compress(body: bytes) -> bytes:
    """The length of what LZMA packs; that: header, floats, hints; integers.

    Floats as they are, or, the length's highest bit set, all their high and then low bytes.
    """
    start, matrices, n = range_parts(body, len(body))
    q, coder = np.frombuffer(body, "<i1", n, start).astype(np.int16), RangeEncoder()
    floats = np.frombuffer(body, np.uint8, offset=start + n)
    code_integers(coder, matrices, floats.view("<f2"), q)
    tries = [
        lzma.compress(
            body[:start] + part.tobytes() + coder.hints, lzma.FORMAT_RAW, filters=RAW_LZMA
        )
        for part in (floats, np.concatenate([floats[1::2], floats[::2]]))
    ]
    planes = len(tries[1]) < len(tries[0])
    word = struct.pack("<I", len(tries[planes]) + PLANES * planes)
    return word + tries[planes] + coder.stream(-(-n // SYMBOLS_A_LANE))


def read_body(packed: bytes, size: int) -> bytes:
    """What compress() was given; raises ValueError if that cannot be."""
    planes, length = divmod(int.from_bytes(packed[:4], "little"), PLANES)
    end = 4 + length
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=RAW_LZMA)
    told = reader.decompress(packed[4:end], max_length=2 * size + 4096)
    start, matrices, n = range_parts(told, size)
    floats = np.frombuffer(told, np.uint8, size - start - n, start)
    floats = floats.reshape(2, -1)[::-1].T.copy() if planes else floats.copy()
    coder = RangeDecoder(told[size - n :], packed[end:], -(-n // SYMBOLS_A_LANE))
    code_integers(coder, matrices, floats.view("<f2").ravel(), q := np.zeros(n, np.int16))
    # Decoding ends where encoding began.
    used = reader.eof and not coder.hints.read(1) and coder.at == len(coder.words)
    if not used or reader.unused_data or (coder.states != 1 << 32).any():
        raise ValueError("its parts do not end where they should")
    return told[:start] + q.astype(np.int8).tobytes() + floats.tobytes()


def decompress(packed: bytes, size: int) -> bytes:
    """What compress() was given, `size` bytes. Raises Refusal otherwise."""
    try:
        return read_body(packed, size)
    except (ValueError, lzma.LZMAError) as error:
        raise Refusal(f"the packed body does not decompress ({error})") from None


def body_of(header: dict, stored: dict[str, Stored]) -> bytes:
    """An artifact's body before any codec: its header, integers, floats."""
    facts = {name: fact for name, fact in header.items() if name != "tensors"}
    blob = train_gpt.encode_artifact(facts, stored, "zstd")
    size = train_gpt.PRELUDE.unpack_from(blob)[3]
    return train_gpt.decompress(blob[train_gpt.PRELUDE.size :], "zstd", size)


def pack(header: dict, stored: dict[str, Stored]) -> bytes:
    """What train_gpt.read_artifact() gives, in 8 bytes of the body's length and its coding."""
    body = body_of(header, stored)
    return struct.pack("<Q", len(body)) + compress(body)


def unpack(packed: bytes) -> tuple[dict, dict[str, Stored]]:
    """Header and tensors that pack() was given; raises Refusal if that cannot be."""
    size = int.from_bytes(packed[:8], "little")
    if len(packed) < 8 or size > MAX_BODY_BYTES:
        raise Refusal(f"the packed body claims {size:,} bytes; the bound is {MAX_BODY_BYTES:,}")
    body = decompress(packed[8:], size)
    try:
        header, start = cut_header(body)
        return header, train_gpt.cut_payload(
            body, start, [train_gpt.tensor_row(row, 2) for row in header["tensors"]]
        )
    except MALFORMED as error:
        raise Refusal(f"the header is malformed ({error!r})") from None
