"""The n-gram tilt: published numbers, naive dictionaries, causality and normalisation."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt


def published() -> dict[str, np.ndarray]:
    """What the published counter and wrapper of #2135 made of 1,753 tokens."""
    golden_kit = pytest.importorskip("golden_kit", reason="no golden numbers")
    return golden_kit.raw_numbers(golden_kit.PR1855, "ngram_2135")


@pytest.mark.parametrize(("order", "threshold", "gated"), [(16, 0.8, 658), (4, 0.5, 1408)])
def test_hints_are_the_published_ones(order: int, threshold: float, gated: int) -> None:
    golden = published()
    hints = train_gpt.find_hints(golden["tokens"][1:], order)
    gates = hints.gates(threshold)
    name = f"order{order}"
    assert gates.sum() == gated
    assert np.array_equal(gates, golden[f"{name}/gate_mask"])
    assert np.array_equal(hints.tokens, golden[f"{name}/top_token"])
    assert np.array_equal(hints.shares, golden[f"{name}/top_prob"])
    assert np.array_equal(np.where(gates, hints.tokens, 0), golden[f"{name}/hint_ids"])


def test_tilt_is_the_published_one() -> None:
    golden = {
        key.removeprefix("tilt/"): torch.from_numpy(value)
        for key, value in published().items()
        if key.startswith("tilt/")
    }
    beta = float(golden["beta"][0])
    nats = torch.nn.functional.cross_entropy(golden["logits"], golden["target"], reduction="none")
    hint_nats = torch.nn.functional.cross_entropy(
        golden["logits"], golden["hint"], reduction="none"
    )
    is_hint = golden["target"] == golden["hint"]
    tilted = train_gpt.tilted_nats(nats, hint_nats, is_hint, golden["gate"], beta)
    torch.testing.assert_close(tilted, golden["nll_tilted"], rtol=0, atol=1e-6)
    boost = (beta * golden["gate"]).to(golden["logits"].dtype)[:, None]
    raised = golden["logits"].scatter_add(-1, golden["hint"].long()[:, None], boost)
    by_logits = torch.nn.functional.cross_entropy(raised, golden["target"], reduction="none")
    torch.testing.assert_close(by_logits, golden["nll_tilted"], rtol=0, atol=2e-6)


def sequential(targets: list[int], order: int, key_of) -> tuple[list[int], list[float]]:
    """The pass as it is defined: look a context up, then count; keys as `key_of` makes them."""
    totals: dict = defaultdict(int)
    counts: dict = defaultdict(int)
    best: dict = {}
    context = targets[:1]
    tokens, shares = [], []
    for target in targets:
        tokens.append(0)
        shares.append(0.0)
        if len(context) >= order - 1:
            key, pair = key_of(context[-(order - 1) :], target)
            if totals[key]:
                tokens[-1], count = best[key]
                shares[-1] = float(np.float32(count / totals[key]))
            totals[key] += 1
            counts[pair] += 1
            if key not in best or counts[pair] > best[key][1]:
                best[key] = (target, counts[pair])
        context = [*context, target]
    return tokens, shares


STREAMS = st.lists(st.integers(0, 3), max_size=120)


@settings(max_examples=300, deadline=None)
@given(targets=STREAMS, order=st.integers(2, 6))
def test_hints_are_those_of_dictionaries(targets: list[int], order: int) -> None:
    def key_of(context: list[int], target: int) -> tuple[tuple, tuple]:
        return tuple(context), (*context, target)

    tokens, shares = sequential(targets, order, key_of)
    hints = train_gpt.find_hints(np.array(targets, np.uint16), order)
    assert hints.tokens.tolist() == tokens
    assert hints.shares.tolist() == shares


@settings(max_examples=200, deadline=None)
@given(targets=STREAMS, order=st.integers(2, 6))
def test_hints_are_those_of_the_pass_where_hashes_collide(targets: list[int], order: int) -> None:
    factors = (1, 2, 3, 1, 2, 3, 1)

    def key_of(context: list[int], target: int) -> tuple[int, int]:
        key = 0
        for token, factor in zip(context, factors, strict=False):
            key ^= token * factor
        return key, (key * 3) ^ (target * factors[order - 1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "HASH_FACTORS", factors)
        patch.setattr(train_gpt, "PAIR_FACTOR", 3)
        hints = train_gpt.find_hints(np.array(targets, np.uint16), order)
    tokens, shares = sequential(targets, order, key_of)
    assert hints.tokens.tolist() == tokens
    assert hints.shares.tolist() == shares


@settings(max_examples=100, deadline=None)
@given(targets=STREAMS, order=st.integers(2, 16), cut=st.integers(0, 120))
def test_a_hint_depends_on_earlier_tokens_only(targets: list[int], order: int, cut: int) -> None:
    changed = targets[:cut] + [3 - token for token in targets[cut:]]
    hints = train_gpt.find_hints(np.array(targets, np.uint16), order)
    others = train_gpt.find_hints(np.array(changed, np.uint16), order)
    known = slice(0, min(cut, len(targets)) + 1)  # the hint at `cut` is fixed before its target
    if cut == 0:
        return  # the first target is also its own context
    assert hints.tokens[known].tolist() == others.tokens[known].tolist()
    assert hints.shares[known].tolist() == others.shares[known].tolist()


def test_the_tilted_distribution_is_one() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(50, 11, dtype=torch.float64)
    hints = torch.randint(11, (50,))
    gates = torch.rand(50) < 0.5
    beta = 2.625
    every = torch.arange(11).expand(50, 11)
    nats = -torch.log_softmax(logits, -1)
    hint_nats = nats.gather(1, hints[:, None])
    tilted = train_gpt.tilted_nats(nats, hint_nats, every == hints[:, None], gates[:, None], beta)
    torch.testing.assert_close(torch.exp(-tilted).sum(-1), torch.ones(50, dtype=torch.float64))
    raised = logits.scatter_add(-1, hints[:, None], (beta * gates)[:, None].double())
    torch.testing.assert_close(tilted, -torch.log_softmax(raised, -1))
    assert torch.equal(tilted[~gates], nats[~gates])
    assert (tilted[gates] != nats[gates]).any()
