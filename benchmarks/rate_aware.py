"""An experiment: GPTQ that rounds by error and by modelled bits, at equal bytes.

    python benchmarks/rate_aware.py "QUANT_CLIP=std CLIP_SIGMAS=..." RUN_FOLDER...

An integer that GPTQ rounds to may also become the next one towards zero: of q the one of least
((w - q s) / U_cc)^2 + lambda bits(q), where the first term is what the choice adds to GPTQ's own
objective and bits(q) = -log2 of q's share among the matrix' nearest integers. lambda is `weight`
times what a bit saves at high rate, d(s^2 / 12) / d bits = 2 ln 2 s^2 / 12, at the mean 1 / U_cc^2.
The second export takes the bytes of the first, which rounds as train_gpt.py does.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import equal_bytes

import train_gpt
from train_gpt import Config

WEIGHTS = (0.25, 0.5, 1.0)


def costs(W: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Bits of each integer from -levels to levels by their shares under nearest rounding."""
    q = torch.round(W / step).clamp(-levels, levels).flatten().long() + levels
    counts = torch.bincount(q, minlength=2 * levels + 1).float() + 0.5
    return -(counts / counts.sum()).log2()


def round_columns(
    W: torch.Tensor,
    step: torch.Tensor,
    U: torch.Tensor,
    tops: torch.Tensor,
    cfg: Config,
    weight: float,
) -> torch.Tensor:
    """train_gpt.round_columns with the choice above; W: (r, c), step: (n, r, 1) -> Q: (n, r, c)."""
    levels, rest = int(tops[0]), W.repeat(len(step), 1, 1)
    Q, bit_costs = torch.empty_like(rest), costs(W, step, levels)
    price = weight * 2 * math.log(2) / 12 * float((1 / U.diagonal()).square().mean())
    for col in range(W.size(1)):
        x = rest[..., col : col + 1] / step
        near = torch.round(x).clamp(-levels, levels)
        lower = near - near.sign()
        # Both terms over s^2.
        near_cost, lower_cost = (
            ((x - q) / U[col, col]).square() + price * bit_costs[q.long() + levels]
            for q in (near, lower)
        )
        Q[..., col : col + 1] = torch.where(lower_cost < near_cost, lower, near)
        error = (rest[..., col : col + 1] - Q[..., col : col + 1] * step) / U[col, col]
        rest[..., col:] -= error * U[col, col:]
    return Q


@contextmanager
def rounding(weight: float) -> Iterator[None]:
    """Let train_gpt round so."""
    before = train_gpt.round_columns
    train_gpt.round_columns = lambda *arguments: round_columns(*arguments, weight)
    try:
        yield
    finally:
        train_gpt.round_columns = before


def main(settings: str, folders: list[str]) -> None:
    for weight in WEIGHTS:
        print(f"lambda {weight:g} of a bit's saving", flush=True)
        equal_bytes.main(settings, settings, folders, partial(rounding, weight))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
