"""How small codecs make the integers of an artifact, the scheme of #1855 among them.

    python benchmarks/packing.py records/*/*/artifact.bin     kept artifacts
    python benchmarks/packing.py --checkpoint runs/NAME/checkpoint_N.pt
    python benchmarks/packing.py --full-size                  synthetic matrices of #1855's shapes

#1855 concatenates transposed matrices of a kind, rows of some first ordered so that neighbours are
alike, and packs each kind by ZPAQ. ZPAQ is no Python package; brotli and LZMA stand in for it.
Bytes of its row orders count. Integers alone, without scales and headers.
"""

from __future__ import annotations

import argparse
import itertools
import lzma
import re
import sys
import time
from pathlib import Path

import brotli
import numpy as np
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402

SORTED_KINDS = ("tok_emb", "attn.c_q", "mlp.fc")
CODECS = {
    "zstd": lambda raw: zstandard.ZstdCompressor(level=22).compress(raw),
    "lzma": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
    "brotli": lambda raw: brotli.compress(raw, quality=11, lgwin=24),
}


def kind_of(name: str) -> tuple[str, int]:
    """#1855's key of a matrix's kind, those outside blocks first, and its layer."""
    found = re.match(r"blocks\.(\d+)\.(.*)", name)
    return (found[2], int(found[1])) if found else ("_" + name, 0)


def nearest_neighbour_order(q: np.ndarray) -> np.ndarray:
    """#1855's order of rows: from row 0 always on to the nearest left in L1: uint16 (rows,)."""
    rest = q.astype(np.int32)
    order = np.zeros(len(q), np.uint16)
    left = np.arange(1, len(q))
    for place in range(1, len(q)):
        distances = np.abs(rest[left] - rest[order[place - 1]]).sum(axis=1)
        nearest = distances.argmin()
        order[place] = left[nearest]
        left = np.delete(left, nearest)
    return order


def published_groups(matrices: dict[str, np.ndarray]) -> tuple[dict[str, bytes], bytes]:
    """#1855's bytes of each kind before its compressor, and those of the row orders."""
    groups, orders = {}, b""
    for kind, names in itertools.groupby(sorted(matrices, key=kind_of), lambda n: kind_of(n)[0]):
        group = b""
        for name in names:
            q = matrices[name]
            if any(part in name for part in SORTED_KINDS):
                order = nearest_neighbour_order(q)
                orders += order.astype("<u2").tobytes()
                q = q[order]
            group += np.ascontiguousarray(q.T).tobytes()
        groups[kind] = group
    return groups, orders


def rounded_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """A run's matrices on #1855's grids, to nearest, from a checkpoint that one trusts."""
    weights = torch.load(path, map_location="cpu", weights_only=False)["model"]
    made = {}
    for name, W in weights.items():
        if W.ndim == 2 and W.numel() > 4096:
            top = 63 if "tok_emb" in name else 31
            sigmas = 14.0 if "tok_emb" in name else 11.5 if "mlp" in name else 13.0
            scales = train_gpt.deviation_scales(W.float(), top, sigmas)
            q = torch.round(W.float() / scales.float()[:, None]).clamp(-top, top)
            made[name] = q.to(torch.int8).numpy()
    return made


def full_size(seed: int) -> dict[str, np.ndarray]:
    """Gaussian matrices of #1855's shapes and steps; columns of mlp.proj differ in deviation."""
    rng = np.random.default_rng(seed)
    shapes = {
        "attn.c_q": (512, 512, 13.0),
        "attn.c_k": (256, 512, 13.0),
        "attn.c_v": (256, 512, 13.0),
        "attn.proj": (512, 512, 13.0),
        "mlp.fc": (2048, 512, 11.5),
        "mlp.proj": (512, 2048, 11.5),
    }
    made = {"tok_emb": gaussian(rng, 8192, 512, 14.0 / 63, 0.1)}
    for layer, (name, (rows, columns, sigmas)) in itertools.product(range(11), shapes.items()):
        spread = 0.3 if name == "mlp.proj" else 0.1
        made[f"blocks.{layer}.{name}"] = gaussian(rng, rows, columns, sigmas / 31, spread)
    return made


def gaussian(rng, rows: int, columns: int, step: float, spread: float) -> np.ndarray:
    """Integers of normal rows in steps of `step` deviations, columns' logarithms normal as well."""
    W = rng.standard_normal((rows, columns), dtype=np.float32)
    W *= np.exp(spread * rng.standard_normal(columns)).astype(np.float32)
    return np.rint(W / (step * W.std(axis=1, keepdims=True))).clip(-127, 127).astype(np.int8)


def report(title: str, matrices: dict[str, np.ndarray], quick: bool) -> None:
    """Print what each codec makes of the matrices."""
    print(f"{title}: {sum(q.size for q in matrices.values()):,} integers")
    ordered = sorted(matrices, key=kind_of)
    start = time.process_time()
    facts, stream = train_gpt.encode_integers([matrices[name] for name in ordered])
    packed = time.process_time()
    shapes = [matrices[name].shape for name in ordered]
    back = train_gpt.decode_integers(facts, stream, shapes)
    read = time.process_time()
    if not all(np.array_equal(matrices[n], q) for n, q in zip(ordered, back, strict=True)):
        raise AssertionError("the range coder lost something")
    size = len(stream) + len(lzma.compress(facts))
    seconds = f"encode {packed - start:.1f} s, decode {read - packed:.1f} s"
    print(f"  range {size:,}  {seconds} of processor time")
    if quick:
        return
    raw = b"".join(matrices[name].tobytes() for name in ordered)
    groups, orders = published_groups(matrices)
    for name, compress in CODECS.items():
        plain = len(compress(raw))
        published = sum(len(compress(group)) for group in groups.values()) + len(compress(orders))
        print(
            f"  {name} {plain:,} ({size / plain - 1:+.2%} by range)  "
            f"as #1855 orders and groups {published:,} ({size / published - 1:+.2%} by range)"
        )


def main() -> None:
    """Report on each artifact given, or on the synthetic one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the range coder only")
    arguments = parser.parse_args()
    for path in arguments.artifacts:
        _, stored = train_gpt.read_artifact(path)
        grids = {name: s.values.numpy() for name, s in stored.items() if s.scale is not None}
        report(str(path.parent.name), grids, arguments.quick)
    if arguments.checkpoint:
        matrices = rounded_checkpoint(arguments.checkpoint)
        report(arguments.checkpoint.name, matrices, arguments.quick)
    if arguments.full_size:
        report("full size", full_size(0), arguments.quick)


if __name__ == "__main__":
    main()
