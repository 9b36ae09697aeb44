"""Token-only n-gram tilt: repeats of what has been scored raise one token's probability.

Long passages of a validation stream occur twice. One pass from left to right counts, for every
context of order - 1 tokens, which token has followed it most often. Where that token's share
reaches a threshold it is the hint of this place, and its logit is raised by beta:

    p'(y) = p(y) exp(beta [y is the hint]) / (1 + p(hint) (exp(beta) - 1))

A hint depends on earlier tokens only and the normaliser is exact, so p' is a distribution that is
fixed before the target is seen. (parameter-golf #2135)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Factors of the hash of a context, oldest token first; the next one is the following token's.
HASH_FACTORS = (
    *(36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241),
    *(524309, 655373, 786433, 917521, 1048583, 1179653, 1310729, 1441801),
)
PAIR_FACTOR = 1000003
MAX_ORDER = len(HASH_FACTORS)


@dataclass(frozen=True)
class Hints:
    """For each target, what followed its context most often before it: (N,) each."""

    tokens: np.ndarray  # int64; 0 where the context is new
    shares: np.ndarray  # float32, of the times the context was followed by it; 0 where it is new

    def gates(self, threshold: float) -> np.ndarray:
        """Where a hint is sure enough: bool (N,)."""
        return (self.shares > 0) & (self.shares >= np.float32(threshold))


def context_keys(targets: np.ndarray, order: int) -> np.ndarray:
    """Hashes of the order - 1 tokens before each target that has so many: uint64.

    The first target counts as its own predecessor, so the first that has them is order - 2. The
    hash is the published one, of about 37 bits: on streams of many millions contexts do collide,
    which makes a hint worse but never non-causal.
    """
    length = order - 1
    stream = np.concatenate([targets[:1], targets]).astype(np.uint64)
    count = len(targets) - (length - 1)
    keys = np.zeros(max(count, 0), np.uint64)
    for place, factor in enumerate(HASH_FACTORS[:length]):
        keys ^= stream[place : place + len(keys)] * np.uint64(factor)
    return keys


def ranks(keys: np.ndarray) -> np.ndarray:
    """How many earlier elements are equal to each: int64 (N,)."""
    order, new = grouped(keys)
    places = np.arange(len(keys))
    starts = np.maximum.accumulate(np.where(new, places, 0))
    earlier = np.empty(len(keys), np.int64)
    earlier[order] = places - starts
    return earlier


def grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order that puts equal keys side by side, earliest first, and where each group begins."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order, new


def find_hints(targets: np.ndarray, order: int = 16) -> Hints:
    """The hints of all targets: (N,) token ids, the stream without its first BOS.

    Equal to the sequential pass that looks a context up first and then counts the target: the best
    token of a context is the last whose count exceeded all counts there before. Raises ValueError
    if the order is not from 2 to 16.
    """
    if not 2 <= order <= MAX_ORDER:
        raise ValueError(f"n-gram order {order}: expected 2 to {MAX_ORDER}")
    hints = np.zeros(len(targets), np.int64)
    shares = np.zeros(len(targets), np.float32)
    keys = context_keys(targets, order)
    if not len(keys):
        return Hints(hints, shares)
    first = order - 2
    followers = targets[first:].astype(np.uint64)
    pairs = (keys * np.uint64(PAIR_FACTOR)) ^ (followers * np.uint64(HASH_FACTORS[order - 1]))
    counts = ranks(pairs) + 1

    by_context, new = grouped(keys)
    counts = counts[by_context]
    places = np.arange(len(keys))
    # A group's offset is above all counts of the groups before it.
    offsets = np.cumsum(new) * (len(keys) + 1)
    best = np.maximum.accumulate(counts + offsets)
    leads = np.ones(len(keys), bool)
    leads[1:] = best[1:] > best[:-1]
    leaders = np.maximum.accumulate(np.where(leads, places, 0))
    starts = np.maximum.accumulate(np.where(new, places, 0))
    # What a target finds is what the one before it in its group left.
    found = np.flatnonzero(~new)
    before = found - 1
    at = by_context[found] + first
    hints[at] = followers[by_context[leaders[before]]]
    totals = found - starts[found]
    shares[at] = (best - offsets)[before] / totals
    return Hints(hints, shares)


def tilted_nats(
    nats: Tensor, hint_nats: Tensor, is_hint: Tensor, gates: Tensor, beta: float
) -> Tensor:
    """Nats of targets under the tilted distribution, from those of target and hint: (...).

    Only the score is tilted; a loss that is trained on takes the plain nats.
    """
    growth = torch.expm1(torch.tensor(beta, dtype=torch.float64)).to(nats.dtype)
    normaliser = torch.log1p(torch.exp(-hint_nats) * growth)
    return torch.where(gates, nats - beta * is_hint + normaliser, nats)


def tilted_logits(logits: Tensor, hints: Tensor, gates: Tensor, beta: float) -> Tensor:
    """Logits (..., V) with beta added to the hint's where its gate (...) is open."""
    raised = (beta * gates).to(logits.dtype).unsqueeze(-1)
    return logits.scatter_add(-1, hints.unsqueeze(-1), raised)
