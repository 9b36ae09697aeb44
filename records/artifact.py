"""What an artifact holds: tensors, bits, bytes, entropy, and what the limit leaves.

Read with this repository's train_gpt.py, which treats the file as hostile; nothing in it is run.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import ARTIFACT_MAGIC, CODECS, PRELUDE, Stored, entropy_bytes, read_artifact

ROLE_NAMES = {"mlp": "MLP", "attn": "attention", "emb": "token embedding", "aux": "the rest"}


@dataclass(frozen=True)
class Part:
    """One tensor as it is stored."""

    name: str
    role: str
    shape: tuple[int, ...]
    bits: int  # the narrowest symmetric integers that hold it; 0 where it is fp16
    raw_integers: int  # bytes before compression: one an integer, two a float
    raw_floats: int
    entropy: float  # order-0 entropy of the integers, in bytes

    raw = property(lambda self: self.raw_integers + self.raw_floats)
    estimate = property(lambda self: self.entropy + self.raw_floats)


@dataclass(frozen=True)
class Anatomy:
    """An artifact by its tensors."""

    parts: list[Part]
    settings: dict[str, str]
    tokenizer: str
    validation: str
    codec: str
    file_bytes: int
    body_bytes: int
    by_role: dict[str, float]  # entropy of all integers of a role together, in bytes

    def total(self, field: str) -> float:
        """Sum of a field of all parts."""
        return sum(getattr(part, field) for part in self.parts)

    def role_entropy(self, role: str) -> float:
        """As the trainer logs it: order-0 entropy over all of a role's integers, in bytes."""
        return self.by_role.get(role, 0.0)

    header_bytes = property(lambda self: self.body_bytes - int(self.total("raw")))


def role_in(name: str) -> str:
    """A tensor's role in BITS, by its name, which is all that a stranger's artifact tells of it."""
    for role in ("mlp", "attn"):
        if name.startswith("blocks.") and f".{role}." in name:
            return role
    return "emb" if name.startswith(("tok_emb.", "lm_head.")) else "aux"


def part_of(name: str, stored: Stored) -> Part:
    """The measures of one tensor."""
    values = stored.values
    if stored.scale is None:
        return Part(name, role_in(name), tuple(values.shape), 0, 0, 2 * values.numel(), 0.0)
    largest = int(values.short().abs().max()) if values.numel() else 0
    return Part(
        name,
        role_in(name),
        tuple(values.shape),
        largest.bit_length() + 1,
        values.numel(),
        2 * len(stored.scale),
        entropy_bytes(values) if largest else 0.0,
    )


def is_whole(path: Path) -> bool:
    """Whether a file begins as an artifact does, and its checksum is that of the rest."""
    blob = path.read_bytes()
    if len(blob) < PRELUDE.size:
        return False
    magic, *_, sha256 = PRELUDE.unpack(blob[: PRELUDE.size])
    return magic == ARTIFACT_MAGIC and sha256 == hashlib.sha256(blob[PRELUDE.size :]).digest()


def anatomy(path: Path) -> Anatomy:
    """What the file holds; raises train_gpt.Refusal, in one line, if it cannot be read."""
    header, stored = read_artifact(path)
    _, _, number, body_bytes, _ = PRELUDE.unpack(path.read_bytes()[: PRELUDE.size])
    codec = next(name for name, known in CODECS.items() if known == number)
    integers: dict[str, list[torch.Tensor]] = {}
    for name, tensor in stored.items():
        if tensor.scale is not None:
            integers.setdefault(role_in(name), []).append(tensor.values.flatten())
    by_role = {role: entropy_bytes(torch.cat(mine)) for role, mine in integers.items()}
    return Anatomy(
        [part_of(name, tensor) for name, tensor in stored.items()],
        header["settings"],
        header["tokenizer"],
        header["validation"],
        codec,
        path.stat().st_size,
        body_bytes,
        by_role,
    )


def printable(text: str, width: int) -> str:
    """Text of a stranger in a column: no control characters, at most `width` of the rest."""
    text = "".join(c if c.isprintable() and c != "$" else "?" for c in text)  # $: matplotlib's
    return text if len(text) <= width else text[: width - 3] + "..."


def lines(found: Anatomy, code_bytes: int, limit: int) -> list[str]:
    """The table of tensors, largest first, and the totals."""
    whole = found.total("estimate") or 1.0
    row = "{:<34} {:>13} {:>5} {:>11} {:>11} {:>7}"
    said = [row.format("tensor", "shape", "bits", "bytes raw", "entropy", "share")]
    for part in sorted(found.parts, key=lambda part: -part.estimate):
        said.append(
            row.format(
                printable(part.name, 34),
                "x".join(map(str, part.shape)) or "1",
                part.bits or "fp16",
                f"{part.raw:,}",
                f"{part.estimate:,.0f}",
                f"{part.estimate / whole:.2%}",
            )
        )
    total, text = found.file_bytes + code_bytes, "{:<44} {:>13,.0f}"
    return [
        *said,
        "",
        text.format("integers, one byte each", found.total("raw_integers")),
        text.format("  entropy of the integers", found.total("entropy")),
        text.format("scales and floats, two bytes each", found.total("raw_floats")),
        text.format("header (settings, names, shapes)", found.header_bytes),
        text.format(f"body before {found.codec}", found.body_bytes),
        text.format(f"artifact, compressed with {found.codec}", found.file_bytes),
        text.format("code", code_bytes),
        text.format("together", total),
        text.format(
            "over the limit by" if total > limit else f"left of {limit:,}", abs(limit - total)
        ),
        "",
        "bits: the narrowest integers that hold the tensor. bytes raw: before compression.",
        "entropy: what a perfect coder of single integers would need, and the scales and floats as",
        "they are; share: of the sum of that column. The compressed file may be smaller: a codec",
        "also finds what numbers side by side have in common, and floats that repeat.",
    ]


def kind_of(name: str) -> str:
    """A tensor's name with its layer numbers left open."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
