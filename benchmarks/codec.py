"""What each codec makes of an artifact: bytes of each kind of tensor and of the whole, seconds.

    python benchmarks/codec.py records/track_cpu_5min/2026-11-25_Defaults-mini/artifact.bin
    python benchmarks/codec.py runs/*/artifact.bin
    python benchmarks/codec.py --synthetic     27 million Gaussian integers, for time and memory

The integers of a kind are packed alone by zstd-22, lzma-9e, brotli-11 and the range coder.
`order-0` is the entropy of their histogram, which a decoder would not know. The last lines are
whole artifacts: each CODEC as a run writes it (zstd tries three least lengths of a repetition), and
zstd-22 and lzma-9e as they come.
"""

import argparse
import lzma
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import brotli
import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402
from train_gpt import Stored  # noqa: E402


def packers() -> dict[str, tuple[Callable, Callable]]:
    """By name, what packs a body, and what gives it back from that and its size."""
    return {
        "zstd-22": (
            zstandard.ZstdCompressor(level=22).compress,
            lambda packed, size: zstandard.decompress(packed),
        ),
        "lzma-9e": (
            lambda body: lzma.compress(body, preset=9 | lzma.PRESET_EXTREME),
            lambda packed, size: lzma.decompress(packed),
        ),
        **{
            codec: (
                partial(train_gpt.compress, codec=codec),
                partial(train_gpt.decompress, codec=codec),
            )
            for codec in train_gpt.CODECS
        },
    }


def order_0(q: np.ndarray) -> float:
    """Bytes of the integers at the entropy of their histogram."""
    shares = np.unique(q, return_counts=True)[1] / q.size
    return -(shares * np.log(shares)).sum() / math.log(256) * q.size


def packed_alone(content: bytes) -> list[int]:
    """Bytes under zstd-22, lzma-9e and brotli-11."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return [
        len(zstandard.ZstdCompressor(level=22).compress(content)),
        len(lzma.compress(content, lzma.FORMAT_RAW, filters=filters)),
        len(brotli.compress(content, quality=11, lgwin=24)),
    ]


def range_bytes(matrices: list[np.ndarray]) -> int:
    """Bytes under the range coder, facts by LZMA."""
    facts, stream = train_gpt.encode_integers(matrices)
    filters = train_gpt.FACTS_FILTERS
    return len(lzma.compress(facts, lzma.FORMAT_RAW, filters=filters)) + len(stream)


def kinds_of(stored: dict[str, Stored]) -> dict[str, list[np.ndarray]]:
    """Integer matrices by kind: the names without the layers' numbers."""
    kinds: dict[str, list[np.ndarray]] = {}
    for name in sorted(stored, key=train_gpt.by_place_in_layer):
        kind = re.sub(r"\d+\.", "*.", name)
        for array in stored[name].arrays():
            if array.dtype == torch.int8:
                kinds.setdefault(kind, []).append(array.numpy())
    return kinds


def show(label: str, header: dict, stored: dict[str, Stored]) -> None:
    """Print the tables of one artifact."""
    blob = train_gpt.encode_artifact(header, stored)
    body = train_gpt.unpack_body(blob)[1]
    columns = ("order-0", "zstd-22", "lzma-9e", "brotli-11", "range")
    print(f"\n{label}\n{'kind':32}{'integers':>10}" + "".join(f"{name:>11}" for name in columns))
    rows = []
    for kind, matrices in kinds_of(stored).items():
        q = np.concatenate([matrix.ravel() for matrix in matrices])
        costs = (order_0(q), *packed_alone(q.tobytes()), range_bytes(matrices))
        rows.append((len(q), *costs))
        print(f"{kind:32}{len(q):10,}" + "".join(f"{x:11,.0f}" for x in costs))
    totals = [sum(column) for column in zip(*rows, strict=True)]
    print(f"{'all integers':32}{totals[0]:10,}" + "".join(f"{x:11,.0f}" for x in totals[1:]))
    sizes = {}
    for codec, (pack, unpack) in packers().items():
        begin = time.perf_counter()
        packed = pack(body)
        middle, sizes[codec] = time.perf_counter(), train_gpt.PRELUDE.size + len(packed)
        read = unpack(packed, size=len(body))
        end = time.perf_counter()
        if read != body:
            raise SystemExit(f"{codec} gave back other bytes")
        print(
            f"{codec:7} {sizes[codec]:11,} bytes, {sizes[codec] / sizes['zstd-22'] - 1:+7.2%} of "
            f"zstd-22, encode {middle - begin:6.2f} s, decode {end - middle:6.2f} s"
        )
    print(f"range against brotli: {sizes['range'] / sizes['brotli'] - 1:+.2%}")


def synthetic() -> dict[str, Stored]:
    """Gaussian integers of the published size: 11 layers of width 512, steps of std / 2.41."""
    rng, stored = np.random.default_rng(0), {}
    shapes = {
        "attn.c_q": (512, 512),
        "attn.c_k": (256, 512),
        "attn.c_v": (256, 512),
        "attn.proj": (512, 512),
        "mlp.fc": (1536, 512),
        "mlp.proj": (512, 1536),
    }
    matrices = {
        f"blocks.{layer}.{name}.weight": (*shape, 31 / 12.85)
        for layer in range(11)
        for name, shape in shapes.items()
    }
    matrices |= {"tok_emb.weight": (1024, 512, 127 / 20), "bigram.embed.weight": (2048, 128, 6.35)}
    for name, (r, c, spread) in matrices.items():
        q = rng.standard_normal((r, c), dtype=np.float32) * spread
        if name.endswith("mlp.proj.weight"):
            q *= rng.lognormal(0, 0.3, c).astype(np.float32)
        stored[name] = Stored(
            torch.from_numpy(q.round().clip(-127, 127).astype(np.int8)),
            torch.from_numpy(rng.lognormal(-3, 0.15, r).astype(np.float16)),
        )
    return stored


def main() -> None:
    """Show every artifact named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--synthetic", action="store_true")
    options = parser.parse_args()
    for path in options.artifacts:
        show(str(path), *train_gpt.read_artifact(path))
    if options.synthetic:
        empty = {"settings": {}, "tokenizer": "", "validation": ""}
        show("synthetic, 11 layers of width 512", empty, synthetic())


if __name__ == "__main__":
    main()
