"""The golden numbers of tests/golden/: how they are kept, and how they are compared.

A kit is a folder of NAME.npz and NAME.json files (README.md of tests/golden/ says what they hold),
or a pack of one: KIT.npz.xz for the arrays, equal ones once, each as the planes of its bytes, and
KIT.json.xz for the JSON files. Both are read by the same two functions.

    python tests/golden_kit.py pack FOLDER KIT     write tests/golden/KIT.*.xz from a whole kit
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import lzma
import re
import sys
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent / "golden"
SYSTEMS, PR1855 = GOLDEN / "systems", GOLDEN / "pr1855"
WHOLE_UP_TO = 256  # elements of a gradient that is kept as it is
# Of these a pack has every n-th row (token, place) only.
THINNED = {r"act/.*": 6, r"rope/(cos|sin)_T2048": 16}
GRADIENT = re.compile(r"grad(_unbanked)?/.+")

# What a pack leaves out of the five older systems' kit, because no test asks for it.
UNUSED = (
    r"hash_rope_.*/rope_eager_after_cast/.*",
    r"model_(569|334|295)/act/.*",
    r"model_.*/(logits_f64|mile_entropy)",
    r"model_(569|334|295)/logits_ntk24",
    r"muon_1361/.*/64x192(/.*)?",  # 32x64 is wide, too
    r"muon_1361/(bf16|fp32)/A/[123]/.*",  # of five steps the first and the last
    r"muon_1361/(bf16|fp32)/A/0/[^/]*/ns_.*",
    r"muon_1361/bf16/A/4/[^/]*/ns_.*",
    r"quant_(569|334|295)/.*",
    r"quant_.*/(ste_bf16|ste_grad|int6_percentile_b)/.*",
    r"quant_.*/gptq/.*/with_collection_damping/.*",
)


# Reading


@functools.cache
def unpacked(kit: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The index of a pack, and its arrays of byte planes."""
    with np.load(io.BytesIO(lzma.decompress(Path(f"{kit}.npz.xz").read_bytes()))) as arrays:
        planes = {name: arrays[name] for name in arrays.files}
    return json.loads(planes.pop("index").tobytes()), planes


def names(kit: Path, pattern: str) -> list[str]:
    """Names of the kit's arrays files that fit a regular expression, sorted."""
    files = unpacked(kit)[0] if is_pack(kit) else [path.stem for path in kit.glob("*.npz")]
    return sorted(name for name in files if re.fullmatch(pattern, name))


def is_pack(kit: Path) -> bool:
    """Whether the kit is a pack, not a folder."""
    return Path(f"{kit}.npz.xz").is_file()


def step_of(kit: Path, key: str) -> int:
    """The kit has every n-th row of this array."""
    steps = [n for pattern, n in THINNED.items() if re.fullmatch(pattern, key)]
    return steps[0] if steps and is_pack(kit) else 1


def raw_numbers(kit: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of NAME.npz; raises OSError, ValueError or zipfile.BadZipFile if unreadable."""
    if not is_pack(kit):
        with np.load(kit / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    index, planes = unpacked(kit)
    found = {}
    for key, (blob, dtype, shape, form) in index[name].items():
        array = np.frombuffer(planes[blob].T.tobytes(), dtype=dtype)
        if form == "triangle":
            found[key] = np.zeros(shape, dtype)
            lower = np.tril_indices(shape[0])
            found[key][lower] = array
            found[key].T[lower] = array
        else:
            found[key] = array.reshape(shape).copy()
    return found


@functools.cache
def numbers(kit: Path, name: str) -> dict[str, torch.Tensor]:
    """The arrays of NAME.npz as tensors; texts are left out."""
    arrays = raw_numbers(kit, name)
    return {
        key: torch.from_numpy(array) for key, array in arrays.items() if array.dtype.kind in "iufb"
    }


@functools.cache
def facts(kit: Path, name: str) -> dict:
    """The contents of NAME.json."""
    if not is_pack(kit):
        return json.loads((kit / f"{name}.json").read_text())
    return json.loads(lzma.decompress(Path(f"{kit}.json.xz").read_bytes()))[name]


# Gradients
# A whole kit has a gradient's every element. A pack has small ones whole, and of a matrix (or of
# each matrix of a bank) its largest element and its sums along rows and along columns, each
# element under a sign that only its row or its column decides. An error of one element is an
# error of two sums; errors of many cancel in all sums only by a chance of powers of two.


def signs(count: int) -> torch.Tensor:
    """The first of an endless sequence of signs, the same on every machine."""
    stream = hashlib.shake_256(b"signs of the golden numbers").digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[:count]
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))


def signed_sums(gradient: torch.Tensor) -> torch.Tensor:
    """The largest element, the signed sums of all rows, those of all columns: float64."""
    exact = gradient.double()
    rows, columns = exact.shape[-2:]
    along_rows = exact @ signs(columns)
    along_columns = signs(rows) @ exact
    return torch.cat([exact.abs().max()[None], along_rows.flatten(), along_columns.flatten()])


def gradient_error(ours: torch.Tensor, published: torch.Tensor, is_sums: bool) -> float:
    """The largest error of a gradient, or of its sums, over the published largest element."""
    if not is_sums:
        published = published.view_as(ours)
        return float((ours - published).abs().max()) / max(float(published.abs().max()), 1e-30)
    sums = published.double()
    return float((signed_sums(ours) - sums).abs().max()) / max(float(sums[0]), 1e-30)


def gradients(arrays: dict, kind: str) -> dict[str, tuple[torch.Tensor, bool]]:
    """Of each parameter the published gradient of a loss, and whether it is given as sums."""
    pattern = re.compile(rf"(grad|sums)(_unbanked)?/{re.escape(kind)}/(.+)")
    matches = {key: pattern.fullmatch(key) for key in arrays}
    return {match[3]: (arrays[key], match[1] == "sums") for key, match in matches.items() if match}


# Packing


def packed_form(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Under which name an array goes into a pack, and what of it."""
    if GRADIENT.fullmatch(key) and array.ndim > 1 and array.size > WHOLE_UP_TO:
        sums = signed_sums(torch.from_numpy(array)).float().numpy()
        return f"sums{key.removeprefix('grad')}", sums
    for pattern, step in THINNED.items():
        if re.fullmatch(pattern, key):
            return key, np.ascontiguousarray(array[..., ::step, :])
    return key, array


def is_symmetric(array: np.ndarray) -> bool:
    """Whether a matrix is kept as its lower triangle."""
    square = array.ndim == 2 and array.shape[0] == array.shape[1]
    return square and array.size > WHOLE_UP_TO and np.array_equal(array, array.T)


def pack(folder: Path, kit: Path) -> None:
    """Write a pack of a whole kit: what tests use, each different array once."""
    index: dict[str, dict] = {}
    planes: dict[str, np.ndarray] = {}
    blobs: dict[bytes, str] = {}
    for path in sorted(folder.glob("*.npz")):
        kept = {}
        for whole_key, whole in raw_numbers(folder, path.stem).items():
            if any(re.fullmatch(unused, f"{path.stem}/{whole_key}") for unused in UNUSED):
                continue
            key, array = packed_form(whole_key, whole)
            form = "triangle" if is_symmetric(array) else "whole"
            held = array[np.tril_indices(len(array))] if form == "triangle" else array
            content = held.tobytes()
            digest = hashlib.sha256(content).digest()
            if digest not in blobs:
                blobs[digest] = f"b{len(blobs)}"
                planes[blobs[digest]] = (
                    np.frombuffer(content, np.uint8).reshape(-1, array.dtype.itemsize).T
                )
            kept[key] = [blobs[digest], array.dtype.str, array.shape, form]
        if kept:
            index[path.stem] = kept
    text = np.frombuffer(json.dumps(index).encode(), np.uint8)
    whole_pack = io.BytesIO()
    np.savez(whole_pack, index=text, **planes)
    jsons = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for kind, content in (
        ("npz", whole_pack.getvalue()),
        ("json", json.dumps(jsons, separators=(",", ":")).encode()),
    ):
        out = Path(f"{kit}.{kind}.xz")
        out.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
        print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "pack":
        sys.exit(__doc__)
    pack(Path(sys.argv[2]), GOLDEN / sys.argv[3])
