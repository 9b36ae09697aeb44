"""Muon's variants, each against its equation in float64, matrix by matrix, on one rank and two."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_model import SIZES
from torch import Tensor, nn

from train_gpt import GPT, SINGULAR_VALUE_MAPS, Config, Muon, MuonSettings, Ranks, route_parameters

SHAPES = [(6, 6), (12, 5), (4, 10), (1, 7)]
STEPS = 5
SLOW = {"muon_slow_share": 0.5615, "muon_slow_momentum": 0.98}
RULES = {
    "plain": {},
    "polar express": {"muon_ns": "polar"},
    "three steps": {"muon_ns": "polar", "muon_backend_steps": 3},
    "seven steps": {"muon_ns": "polar", "muon_backend_steps": 7},
    "rows": {"muon_row_norm": True},
    "neurons": {"muon_neuron_norm": 0.95},
    "cautious": {"muon_wd_form": "cautious"},
    "cautious after": {"muon_wd_form": "cautious", "muon_wd_order": "after"},
    "slow momentum": SLOW,
    "all": {
        "muon_ns": "polar",
        "muon_row_norm": True,
        "muon_neuron_norm": 0.9,
        "muon_wd_form": "cautious",
        **SLOW,
    },
}


class NaiveMatrix:
    """One matrix under Muon's rule, in float64 and one number at a time where that is plainest."""

    def __init__(self, W: np.ndarray, rule: MuonSettings) -> None:
        self.W, self.rule = W.astype(np.float64), rule
        self.M, self.slow = np.zeros_like(self.W), np.zeros_like(self.W)
        self.squares = np.zeros(max(W.shape))

    def orthogonal(self, G: np.ndarray) -> np.ndarray:
        """The polynomials on the singular values, which is what they do to the matrix."""
        U, s, Vt = np.linalg.svd(G, full_matrices=False)
        s = s / np.linalg.norm(s)
        table = SINGULAR_VALUE_MAPS[self.rule.muon_ns]
        for a, b, c in (*table, *[table[-1]] * 20)[: self.rule.muon_backend_steps]:
            s = a * s + b * s**3 + c * s**5
        return (U * s) @ Vt

    def evened(self, update: np.ndarray) -> np.ndarray:
        """NorMuon: along the longer side, each place by its own running size."""
        keep, tall = self.rule.muon_neuron_norm, update.shape[0] >= update.shape[1]
        neurons = update if tall else update.T
        out = np.zeros_like(neurons)
        for n, row in enumerate(neurons):
            self.squares[n] = keep * self.squares[n] + (1 - keep) * np.mean(row**2)
            out[n] = row / math.sqrt(max(self.squares[n], 1e-10))
        out *= np.linalg.norm(update) / np.linalg.norm(out)
        return out if tall else out.T

    def step(self, g: np.ndarray, lr: float, mu: float, wd: float, slow_share: float) -> None:
        """One step."""
        rule, W = self.rule, self.W
        self.M = mu * self.M + g
        beta = rule.muon_slow_momentum
        self.slow = beta * self.slow + (1 - beta) * g
        blend = (1 - slow_share) * (1 - mu) * self.M + slow_share * self.slow
        u = (1 - mu) * g + mu * blend
        if rule.muon_row_norm:
            u = np.stack([row / max(np.linalg.norm(row), 1e-7) for row in u])
        update = self.orthogonal(u)
        if rule.muon_neuron_norm:
            update = self.evened(update)
        decays = np.ones_like(W)
        if rule.muon_wd_form == "cautious":
            for place in np.ndindex(W.shape):  # the step goes against the weight: it shrinks it
                decays[place] = W[place] * -update[place] <= 0
        kept = 1 - lr * wd * decays
        step = lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * update
        self.W = (W - step) * kept if rule.muon_wd_order == "after" else W * kept - step


class Rank(Ranks):
    """One of two ranks, each a thread of this process; they meet at a board."""

    def __init__(self, rank: int, board: dict, meeting: threading.Barrier) -> None:
        super().__init__(rank, 2)
        self.board, self.meeting = board, meeting

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """Both ranks' tensors."""
        self.board[self.rank] = tensor.clone()
        self.meeting.wait(30)
        both = [self.board[rank].clone() for rank in range(2)]
        self.meeting.wait(30)
        return both

    def scatter_sum(self, stack: Tensor):
        """This rank's part of both ranks' sum."""
        part = self.part_of(sum(self.exchange(stack)))
        return lambda: part

    def gather(self, part: Tensor):
        """Both ranks' parts."""
        whole = torch.cat(self.exchange(part))
        return lambda: whole


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_equation(name: str, world: int) -> None:
    """Two groups, shapes that repeat; rate, momentum and share change from step to step."""
    generator = torch.Generator().manual_seed(1)
    shapes = [*SHAPES, *SHAPES, SHAPES[0]]
    rule = MuonSettings(**RULES[name])
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    parts = [
        [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(world)]
        for _ in range(STEPS)
    ]
    hypers = [
        {
            "lr": 0.02 / (step + 1),
            "momentum": 0.85 + 0.02 * step,
            "slow_share": rule.muon_slow_share if step > 1 else 0.0,
        }
        for step in range(STEPS)
    ]
    decays = [3.0 if n < 5 else 0.5 for n in range(len(shapes))]

    def run(ranks: Ranks) -> list[Tensor]:
        """What a rank's weights are in the end."""
        weights = [nn.Parameter(start.clone()) for start in starts]
        groups = [
            {"params": weights[:5], "weight_decay": 3.0},
            {"params": weights[5:], "weight_decay": 0.5},
        ]
        muon = Muon(groups, rule, torch.float32, ranks)
        for step in range(STEPS):
            for weight, grad in zip(weights, parts[step][ranks.rank], strict=True):
                weight.grad = grad.clone()
            for group in muon.param_groups:
                group.update(hypers[step])
            muon.step()
        return [weight.detach() for weight in weights]

    if world == 1:
        ends = [run(Ranks())]
    else:
        board, meeting = {}, threading.Barrier(2)
        with ThreadPoolExecutor(2) as threads:
            ends = list(threads.map(run, [Rank(rank, board, meeting) for rank in range(2)]))
    naive = [NaiveMatrix(start.numpy(), rule) for start in starts]
    for step in range(STEPS):
        hyper = hypers[step]
        for n, matrix in enumerate(naive):
            g = sum(part[n] for part in parts[step]).numpy().astype(np.float64)
            matrix.step(g, hyper["lr"], hyper["momentum"], decays[n], hyper["slow_share"])
    for weights in ends:
        for weight, matrix in zip(weights, naive, strict=True):
            np.testing.assert_allclose(weight.numpy(), matrix.W, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in RULES if name != "plain"])
def test_a_rule_differs_from_the_plain_one(name: str) -> None:
    """By more than rounding: the naive test would not see a variant that is never taken."""
    ends = []
    for changes in ({}, RULES[name]):
        torch.manual_seed(0)
        W = nn.Parameter(torch.randn(12, 5))
        muon = Muon([{"params": [W], "weight_decay": 1.0}], MuonSettings(**changes), torch.float32)
        muon.param_groups[0].update(lr=0.02, momentum=0.9, slow_share=0.5)
        for _ in range(3):
            W.grad = torch.randn(12, 5)
            muon.step()
        ends.append(W.detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tall", [True, False])
def test_even_neurons_keep_the_updates_norm(dtype: torch.dtype, tall: bool) -> None:
    """Of one gradient again and again: neurons' steps become equal, the whole stays as long."""
    torch.manual_seed(0)
    G = torch.randn(40, 10) * torch.logspace(-2, 0, 40)[:, None]
    G = G if tall else G.T
    ends = []
    for keep in (0.0, 0.5):
        W = nn.Parameter(torch.zeros_like(G))
        rule = MuonSettings(muon_neuron_norm=keep)
        muon = Muon([{"params": [W], "weight_decay": 0.0}], rule, dtype)
        muon.param_groups[0].update(lr=1.0, momentum=0.0)
        for _ in range(12):
            W.data.zero_()
            W.grad = G.clone()
            muon.step()
        ends.append(W.detach())
    sizes = [W.norm(dim=1 if tall else 0) for W in ends]
    assert ends[1].norm() == pytest.approx(float(ends[0].norm()), rel=1e-2)
    assert sizes[0].max() > 2 * sizes[0].min()
    assert sizes[1].max() < 1.02 * sizes[1].min()


def test_a_matrix_without_a_gradient_stays() -> None:
    for changes in RULES.values():
        W = nn.Parameter(torch.randn(4, 6))
        before = W.detach().clone()
        muon = Muon([{"params": [W], "weight_decay": 0.0}], MuonSettings(**changes), torch.float32)
        muon.param_groups[0].update(lr=0.1, momentum=0.9, slow_share=0.5)
        muon.step()
        assert torch.equal(W, before)


def test_tables_decay_by_their_own_setting() -> None:
    decays = {}
    for embed_wd in (-1.0, 0.0, 0.085):
        cfg = Config(**SIZES, adam_wd=0.02, embed_wd=embed_wd)
        decays[embed_wd] = {
            group["route"]: group["weight_decay"]
            for group in route_parameters(cfg, GPT(cfg))
            if group["optimizer"] == "adam"
        }
    assert set(decays[-1.0].values()) == {0.02}
    assert decays[0.085] == decays[-1.0] | {"tokens": 0.085, "tables": 0.085}
    assert decays[0.0] == decays[-1.0] | {"tokens": 0.0, "tables": 0.0}
