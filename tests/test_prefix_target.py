"""The prefix-token target: which token begins another, its nats and gradients, when it acts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import TinyData
from jobs import events, launch, tiny_job
from test_model import SIZES, random_ids, random_model
from test_schedules import clocked, imagine, stepped
from torch._dynamo.testing import CompileCounter

import train_gpt
from train_gpt import Batch, Config, piece_prefixes


def naive_prefixes(tokenizer: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Every pair of tokens tried, by their bytes."""
    size = tokenizer.vocab_size()
    texts = [
        b""
        if re.fullmatch(r"<.*>", tokenizer.id_to_piece(token))
        else tokenizer.id_to_piece(token).replace("\u2581", " ").encode()
        for token in range(size)
    ]
    found = []
    for token in range(size):
        begin = [
            other
            for other in range(size)
            if 0 < len(texts[other]) < len(texts[token]) and texts[token].startswith(texts[other])
        ]
        found.append(max(begin, key=lambda other: len(texts[other]), default=token))
    return found


def test_prefixes_are_the_longest_by_bytes(tiny_data: TinyData) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_data.tokenizer_path))
    prefixes = piece_prefixes(tokenizer)
    assert prefixes.tolist() == naive_prefixes(tokenizer)
    assert (prefixes != np.arange(len(prefixes))).sum() > 20


PREFIXES = torch.tensor([0, 1, 2, 3, 4, *(n % 5 for n in range(5, SIZES["vocab_size"]))])


def prefixed_model(dtype: torch.dtype, masked: bool) -> tuple[train_gpt.GPT, Batch]:
    """A model that knows prefixes, perhaps with a token mask that allows all targets, and rows."""
    cfg = Config(**{**SIZES, "mile_gamma": 1.1})
    model, ids = random_model(cfg, dtype=dtype), random_ids(cfg, 3, 65)
    model.prefixes = PREFIXES
    if masked:
        forbidden = np.random.default_rng(0).random((cfg.vocab_size, cfg.vocab_size)) < 0.4
        forbidden[ids[:, :-1].flatten(), ids[:, 1:].flatten()] = False
        model.penalty = train_gpt.penalties(forbidden)
    return model, Batch(ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gamma", [None, 1.1])
def test_the_prefixs_nats_are_added(masked: bool, gamma: float | None) -> None:
    """In both codes, with the same gradients, and only where there is a prefix that may follow."""
    model, batch = prefixed_model(torch.float32, masked)
    gamma = gamma and torch.tensor(gamma)
    weight = torch.tensor(0.25)
    with torch.no_grad():
        plain, _ = model(batch, gamma)
        scored, weights = model(batch, gamma, weight)
        shares = model.logits(model.hidden(batch.input_ids), batch.input_ids).softmax(-1)
    terms = 0
    for place in np.ndindex(*batch.target_ids.shape):
        target = int(batch.target_ids[place])
        prefix = int(PREFIXES[target])
        share = float(shares[place][prefix])
        term = prefix != target and share > 0
        terms += term
        extra = -0.25 * np.log(share) if term else 0.0
        assert float(scored[place] - plain[place]) == pytest.approx(extra, abs=2e-5)
    assert 0.2 * plain.numel() < terms < plain.numel()
    found = []
    for own in (True, False):
        model.zero_grad()
        if own:
            nats, w = model(batch, gamma, weight)
        else:  # HeadNats is left out
            logits = model.logits(model.hidden(batch.input_ids), batch.input_ids)
            prefixes = PREFIXES[batch.target_ids]
            log_shares = logits.log_softmax(-1)
            second = log_shares.gather(-1, prefixes[..., None])[..., 0]
            counts = (prefixes != batch.target_ids) & second.isfinite()
            own_nats = -log_shares.gather(-1, batch.target_ids[..., None])[..., 0]
            nats = own_nats - weight * torch.where(counts, second, 0.0)
            w = weights
        torch.testing.assert_close(nats, scored, rtol=1e-5, atol=2e-5)
        (w * nats).mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, expected in zip(*found, strict=True):
        largest = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * largest + 1e-9)


def test_a_weight_of_zero_changes_nothing() -> None:
    model, batch = prefixed_model(torch.float32, masked=False)
    nats = [model(batch, None, weight)[0] for weight in (None, torch.tensor(0.0))]
    assert torch.equal(*nats)


@pytest.mark.parametrize("of", [stepped, clocked])
def test_the_weight_falls_over_the_second_third(of) -> None:
    moments = imagine(of(iterations=99, prefix_target=0.3), lambda n: 600 / 99)
    for n, moment in enumerate(moments):
        expected = 0.3 if n < 33 else 0.3 * max(66 - n, 0) / 33
        assert moment.prefix_weight == pytest.approx(expected, abs=1e-9), n
    assert not any(moment.prefix_weight for moment in imagine(of(iterations=99), lambda n: 6.0))


@pytest.mark.parametrize("mask", ["0", "1"])
def test_a_run_with_it_learns_otherwise(tiny_data: TinyData, tmp_path: Path, mask: str) -> None:
    curves = {}
    for weight in ("0", "0.25"):
        job = tiny_job(tiny_data, tmp_path, f"w{weight}", PREFIX_TARGET=weight, TOKEN_MASK=mask)
        done = launch(**job)
        assert done.returncode == 0, done.stderr
        curves[weight] = events(tmp_path / f"w{weight}", "step")
        active = {e["name"]: e["steps"] for e in events(tmp_path / f"w{weight}", "activity")}
        # Of 20 steps the first third and the second; step 14 has reached 0.
        assert active.get("prefix_target") == (14 if weight == "0.25" else None)
    first = [curves[weight][0]["train_loss"] for weight in ("0", "0.25")]
    assert 0.02 < first[1] / first[0] - 1 < 0.25
    assert curves["0"][-1]["train_loss"] != curves["0.25"][-1]["train_loss"]


def test_all_weights_are_one_graph() -> None:
    """Without a break, with a mask and without: the weight's fall compiles nothing anew."""
    graphs = CompileCounter()
    forward = torch.compile(train_gpt.training_nats, fullgraph=True, dynamic=False, backend=graphs)
    for number, masked in enumerate((False, True), start=1):
        model, batch = prefixed_model(torch.float32, masked)
        for weight in (0.25, 0.1, 0.0):
            given = (model, batch, None, None, torch.tensor(weight))
            compiled, plain = forward(*given)[0], train_gpt.training_nats(*given)[0]
            torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
            assert graphs.frame_count == number
