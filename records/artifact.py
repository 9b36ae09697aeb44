"""What an artifact holds, and a way out of here: the model as safetensors for plain PyTorch.

    python records/artifact.py export ARTIFACT FOLDER [--tokenizer FILE]

writes into a new folder

    model.safetensors   every parameter in float32, the values that the artifact stands for
    config.json         the settings of the network, fingerprints of tokenizer and validation text
    *.model             the tokenizer
    train_gpt.py        what defines the network
    load.py             ten lines that load it: `cd FOLDER && python load.py`

Artifacts are read by this repository's train_gpt.py, which treats them as hostile; nothing in
them is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from reading import Wrong, content, end_quietly, one_line, read_json, sha256

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# All that is asked of the trainer here, beside `values`, `scale` and `restore` of what it reads.
from train_gpt import Refusal, read_artifact, settings_within

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = struct.Struct("<8sHHQ32s")  # magic, version, codec, bytes of the body, sha256
CODECS = {1: "zstd", 2: "xz", 3: "brotli"}


# =================================================================================================
# What it holds
# =================================================================================================


@dataclass(frozen=True)
class Part:
    """One tensor as it is stored."""

    name: str
    shape: tuple[int, ...]
    bits: int  # the narrowest symmetric integers that hold it; 0 where it is fp16
    raw_integers: int  # bytes before compression: one an integer, two a float
    raw_floats: int
    entropy: float  # order-0 entropy of the integers, in bytes

    @property
    def raw(self) -> int:
        """Bytes before compression."""
        return self.raw_integers + self.raw_floats

    @property
    def estimate(self) -> float:
        """Bytes that a perfect coder of single integers would need, and the floats as they are."""
        return self.entropy + self.raw_floats


@dataclass(frozen=True)
class Anatomy:
    """An artifact by its tensors."""

    parts: list[Part]
    codec: str
    file_bytes: int
    body_bytes: int

    def total(self, field: str) -> float:
        """Sum of a field over all parts."""
        return sum(getattr(part, field) for part in self.parts)

    @property
    def header_bytes(self) -> int:
        """Bytes of the body that are neither integers nor floats."""
        return self.body_bytes - int(self.total("raw"))

    def by_kind(self, most: int) -> dict[str, list[Part]]:
        """Parts of one name but for layer numbers, largest first; the small ones put together."""
        kinds: dict[str, list[Part]] = {}
        for part in self.parts:
            words = ["*" if word.isdigit() else word for word in part.name.split(".")]
            kinds.setdefault(".".join(words), []).append(part)
        order = sorted(kinds, key=lambda kind: -sum(part.estimate for part in kinds[kind]))
        if len(order) <= most:
            return {kind: kinds[kind] for kind in order}
        found = {kind: kinds[kind] for kind in order[: most - 1]}
        found["all others"] = [part for kind in order[most - 1 :] for part in kinds[kind]]
        return found


def entropy_bytes(integers: torch.Tensor) -> float:
    """Order-0 entropy of 8-bit values, in bytes: -sum p log2 p / 8 over their shares p."""
    counts = torch.bincount(integers.flatten().int() + 128).double()
    shares = counts[counts > 0] / integers.numel()
    return float(-(shares * shares.log2()).sum()) * integers.numel() / 8


def part_of(name: str, values: torch.Tensor, scale: torch.Tensor | None) -> Part:
    """The measures of one tensor: int8 values with a scale a row, fp16 values, or packed bytes."""
    shape, count = tuple(values.shape), values.numel()
    if values.is_floating_point():
        return Part(name, shape, 0, 0, 2 * count, 0.0)
    entropy = entropy_bytes(values) if count else 0.0
    if scale is None:
        return Part(name, shape, 8, count, 0, entropy)
    largest = int(values.short().abs().max()) if count else 0
    return Part(name, shape, largest.bit_length() + 1, count, 2 * len(scale), entropy)


def anatomy(path: Path) -> Anatomy:
    """What the file holds; raises Refusal, in one line, if it cannot be read."""
    _, stored = read_artifact(path)
    _, _, codec, body_bytes, _ = PRELUDE.unpack(path.read_bytes()[: PRELUDE.size])
    parts = [part_of(name, tensor.values, tensor.scale) for name, tensor in stored.items()]
    return Anatomy(parts, CODECS.get(codec, "another codec"), path.stat().st_size, body_bytes)


def lines(found: Anatomy, code_bytes: int, limit: int) -> list[str]:
    """The table of tensors, largest first, and the totals."""
    whole = found.total("estimate") or 1.0
    row = "{:<34} {:>13} {:>5} {:>11} {:>11} {:>7}"
    said = [row.format("tensor", "shape", "bits", "bytes raw", "entropy", "of all")]
    for part in sorted(found.parts, key=lambda part: -part.estimate):
        said.append(
            row.format(
                one_line(part.name, 34),
                "x".join(map(str, part.shape)) or "1",
                part.bits or "fp16",
                f"{part.raw:,}",
                f"{part.estimate:,.0f}",
                f"{part.estimate / whole:.2%}",
            )
        )
    total = found.file_bytes + code_bytes
    left = f"left of {limit:,}" if total <= limit else "over the limit by"
    totals = (
        ("integers, one byte each", found.total("raw_integers")),
        ("  entropy of the integers", found.total("entropy")),
        ("scales and floats, two bytes each", found.total("raw_floats")),
        ("header (settings, names, shapes)", found.header_bytes),
        (f"body before {found.codec}", found.body_bytes),
        (f"artifact, compressed with {found.codec}", found.file_bytes),
        ("code", code_bytes),
        ("together", total),
        (left, abs(limit - total)),
    )
    return [
        *said,
        "",
        *(f"{words:<44} {number:>13,.0f}" for words, number in totals),
        "",
        "bits: the narrowest integers that hold the tensor. bytes raw: before compression.",
        "entropy: what a perfect coder of single integers would need, and the scales and floats as",
        "they are; of all: the tensor's part of that column. The file may be smaller: a codec also",
        "finds what numbers side by side have in common, and floats that repeat.",
    ]


# =================================================================================================
# Out of here
# =================================================================================================

LOADER = '''"""Load the exported model in plain PyTorch; run it in this folder."""
import json, math, torch, train_gpt

config, blob = json.load(open("config.json")), bytearray(open("model.safetensors", "rb").read())
start = 8 + int.from_bytes(blob[:8], "little")  # the JSON header ends here
weights = {}  # or, with the package: safetensors.torch.load_file("model.safetensors")
for name, entry in json.loads(blob[8:start]).items():
    where, count = start + entry["data_offsets"][0], math.prod(entry["shape"])
    weights[name] = torch.frombuffer(blob, dtype=torch.float32, count=count, offset=where)
    weights[name] = weights[name].view(entry["shape"])
model = train_gpt.GPT(train_gpt.settings_within(config, {})[0]).eval()
model.load_state_dict(weights)

with torch.no_grad():
    logits = model.logits(model.hidden(torch.tensor([[1, 2, 3]])))  # (1, 3, V): of the next token
print(logits.shape, "next token:", logits[0, -1].argmax().item())
'''


def safetensors_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """Float32 tensors in the safetensors format: 8 bytes of length, JSON header, raw values."""
    header, values, at = {}, [], 0
    for name, tensor in tensors.items():
        raw = tensor.detach().float().contiguous().numpy().astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(raw)],
        }
        values.append(raw)
        at += len(raw)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the values are aligned
    return len(head).to_bytes(8, "little") + head + b"".join(values)


def find_tokenizer(artifact: Path, wanted: str, given: Path | None) -> Path:
    """The tokenizer with the sha256 that the artifact names; raises Wrong if it is not there."""
    named = [os.environ["TOKENIZER_PATH"]] if os.environ.get("TOKENIZER_PATH") else []
    settings = artifact.parent / "settings.json"
    if settings.is_file():
        named.append(str(read_json(settings).get("tokenizer_path", "")))
    places = [
        *(ROOT / path for path in named),  # as the trainer does, from the root of the repository
        *sorted(artifact.parent.glob("*.model")),
        *sorted((ROOT / "data" / "tokenizers").glob("*.model")),
    ]
    for path in [given] if given else places:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted:
            return path
    looked = given or "TOKENIZER_PATH, beside the artifact, or in data/tokenizers/"
    raise Wrong(
        f"no tokenizer with sha256 {wanted[:12]}, which {artifact} was made with, at {looked}; "
        "name its file with --tokenizer"
    )


def export(artifact: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Write the model of an artifact into a new folder, whole or not at all.

    Raises Wrong if the folder exists or the tokenizer is not there, Refusal for an artifact that
    the trainer does not read.
    """
    if folder.exists():
        raise Wrong(f"{folder} exists already; nothing in it was touched")
    header, stored = read_artifact(artifact)
    settings_within(header, {})
    tokenizer = find_tokenizer(artifact, header["tokenizer"], tokenizer)
    config = {
        "settings": header["settings"],
        "tokenizer": {"file": tokenizer.name, "sha256": header["tokenizer"]},
        "validation": header["validation"],
        "artifact": {"sha256": sha256(artifact), "bytes": artifact.stat().st_size},
    }
    # Packed text of the counts is no parameter of the network.
    tensors = {
        name: tensor.restore()
        for name, tensor in stored.items()
        if tensor.values.dtype != torch.uint8
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export.") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        (made / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        (made / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (made / "load.py").write_text(LOADER, encoding="utf-8")
        shutil.copyfile(tokenizer, made / tokenizer.name)
        (made / "train_gpt.py").write_bytes(content(ROOT / "train_gpt.py"))
        made.rename(folder)


def main(arguments: list[str]) -> int:
    """Do what the command line asks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    out = verbs.add_parser("export", help="the model as safetensors, with what loads it")
    out.add_argument("artifact", type=Path)
    out.add_argument("folder", type=Path, help="a folder that does not exist yet")
    out.add_argument("--tokenizer", type=Path, help="the tokenizer's file, if it is not found")
    args = parser.parse_args(arguments)
    try:
        export(args.artifact, args.folder, args.tokenizer)
    except (OSError, Refusal, Wrong) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    for path in sorted(args.folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main(sys.argv[1:]))
