"""Experiments in benchmarks/ that change how weights are rounded, against what they claim to do."""

from __future__ import annotations

import sys

import numpy as np
import torch
from conftest import ROOT

from train_gpt import Config, inverse_factor, round_columns

sys.path.insert(0, str(ROOT / "benchmarks"))
import full_size
import low_rank
import rate_aware


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (24, 32) and the Hessian of correlated inputs."""
    torch.manual_seed(0)
    X = torch.randn(400, 32) @ torch.randn(32, 32)
    return torch.randn(24, 32), X.T @ X / len(X)


def test_without_a_price_of_bits_rounding_is_that_of_the_trainer() -> None:
    W, H = problem()
    U, step = inverse_factor(H), torch.full((1, 24, 1), 0.4)
    tops = torch.full((W.size(1),), 31.0)
    plain = round_columns(W, step, U, tops, Config())
    assert torch.equal(rate_aware.round_columns(W, step, U, tops, Config(), 0.0), plain)


def test_a_price_of_bits_buys_bits_for_error() -> None:
    W, H = problem()
    U, step = inverse_factor(H), torch.full((1, 24, 1), 0.4)
    tops = torch.full((W.size(1),), 31.0)
    bits, errors = [], []
    for weight in (0.0, 0.5, 2.0):
        Q = rate_aware.round_columns(W, step, U, tops, Config(), weight)[0]
        _, counts = np.unique(Q.numpy(), return_counts=True)
        bits.append(-(counts / Q.numel() * np.log2(counts / Q.numel())).sum())
        D = (W - Q * step[0]).double()
        errors.append(float(((D @ H.double()) * D).sum()))
    assert bits == sorted(bits, reverse=True) and errors == sorted(errors)


def test_costs_are_bits_of_shares() -> None:
    W = torch.tensor([[0.0, 0.1, 1.0, -1.1, 9.0]])
    found = rate_aware.costs(W, torch.ones(1, 1, 1), 3).tolist()
    counts = [0.5, 0.5, 1.5, 2.5, 1.5, 0.5, 1.5]
    np.testing.assert_allclose(found, -np.log2(np.array(counts) / sum(counts)), rtol=1e-5)


def test_a_correction_is_the_best_of_its_rank() -> None:
    """Eckart and Young: what remains is the tail of the weighted error's singular values."""
    E, H = problem()
    H += 0.01 * H.diagonal().mean() * torch.eye(32)
    tail = np.linalg.svd(E.double().numpy() @ np.linalg.cholesky(H.double().numpy()))[1]
    for rank in (1, 4, 12):
        a, b = low_rank.correction(E, H, rank)
        assert a.values.shape == (rank, 24) and b.values.shape == (rank, 32)
        D = (E - a.restore().T @ b.restore()).double()
        left = float(((D @ H.double()) * D).sum())
        assert 0.99 * (tail[rank:] ** 2).sum() < left < (tail**2).sum()


def test_synthetic_rows_have_the_fitted_statistics() -> None:
    cfg = Config.from_env(
        {"PRESET": "pr1361,mini", "NUM_LAYERS": "3", "XSA_LAST_N": "0", "VE_LAYERS": "1,2"}
    )[0]
    torch.manual_seed(0)
    trained, drawn = full_size.GPT(cfg), full_size.GPT(cfg)
    with torch.no_grad():
        for p in trained.parameters():
            if p.ndim == 2:
                p.normal_().mul_(torch.exp(0.3 * torch.randn(p.size(0), 1)))
                p[:, 0] *= 3.0  # a heavy tail
    full_size.draw(drawn, trained)
    wanted, found = full_size.fitted(trained), full_size.fitted(drawn)
    for name in ("blocks.#.mlp.fc.weight", "blocks.#.attn.c_q.weight", "bigram.embed.weight"):
        center, spread, freedom = wanted[name]
        assert abs(found[name][0] - center) < 0.1 and abs(found[name][1] / spread - 1) < 0.2
        assert freedom < 60 and found[name][2] < 2 * freedom
