"""Muon, AdamW and the routing table, against naive loops and torch's own optimizers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from test_model import SIZES, VARIANTS
from torch import Tensor, nn

import train_gpt
from train_gpt import (
    ATTENTION_MATRIX,
    GAIN,
    GATE,
    GPT,
    GROUPS,
    PRESETS,
    ROUTES,
    ROUTINGS,
    TABLE,
    Config,
    Muon,
    MuonSettings,
    Refusal,
    build_optimizers,
    of_kind,
    orthogonalize,
    pack_momentum,
    route_parameters,
    unpack_momentum,
)

SHAPES = [(6, 6), (12, 5), (4, 10), (6, 6), (4, 10), (1, 7)]


def with_singular_values(values: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random matrix of the given singular values, and its singular vectors U, V."""
    U = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(cols, len(values), dtype=torch.float64))[0]
    return (U * values) @ V.T, U, V


def naive_orthogonalize(G: np.ndarray, steps: int = 5) -> np.ndarray:
    """Newton-Schulz on the singular values, which is what it does to the matrix."""
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s) @ Vt


def naive_muon(
    W: np.ndarray, M: np.ndarray, g: np.ndarray, lr: float, mu: float, wd: float
) -> tuple[np.ndarray, np.ndarray]:
    """One step of one matrix; returns the new weight and momentum."""
    M = mu * M + g
    aspect = math.sqrt(max(1.0, W.shape[0] / W.shape[1]))
    return (1 - lr * wd) * W - lr * aspect * naive_orthogonalize(g + mu * M), M


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonalize_raises_singular_values_and_keeps_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.logspace(0, math.log10(0.003), 16, dtype=torch.float64)
    G, U, V = with_singular_values(values / values.norm(), *shape)
    raised = U.T @ orthogonalize(7.0 * G, 5) @ V
    assert (raised - raised.diag().diag()).abs().max() < 1e-9
    at_least = values / values.norm() >= 0.003
    assert raised.diag()[at_least].min() > 0.68
    assert raised.diag().max() < 1.21


def test_orthogonalize_leaves_what_is_not_there() -> None:
    torch.manual_seed(0)
    assert not orthogonalize(torch.zeros(2, 3, 4), 5).any()
    G, U, V = with_singular_values(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 9, 14)
    values = torch.linalg.svdvals(orthogonalize(G, 5))
    assert values[:3].min() > 0.68
    assert values[3:].max() < 1e-9


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 4)])
def test_a_stack_is_orthogonalized_matrix_by_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(2, 3, *shape, dtype=torch.float64) * torch.logspace(-3, 3, 3)[:, None, None]
    result = orthogonalize(stack, 5)
    for index in np.ndindex(2, 3):
        expected = naive_orthogonalize(stack[index].numpy())
        np.testing.assert_allclose(result[index].numpy(), expected, atol=1e-3)


def test_muon_is_its_equation_for_each_matrix() -> None:
    """Two groups, shapes that repeat, momentum and rate that change from step to step."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
    groups = [
        {"params": weights[:4], "weight_decay": 0.3},
        {"params": weights[4:], "weight_decay": 0.0},
    ]
    muon = Muon(groups, MuonSettings(), torch.float64)
    expected = [(w.detach().numpy().copy(), np.zeros(w.shape)) for w in weights]
    for step in range(4):
        lr, mu = 0.1 / (step + 1), 0.5 + 0.1 * step
        for n, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight)
            expected[n] = naive_muon(*expected[n], weight.grad.numpy(), lr, mu, 0.3 * (n < 4))
        for group in muon.param_groups:
            group.update(lr=lr, momentum=mu)
        muon.step()
        for weight, (W, _) in zip(weights, expected, strict=True):
            np.testing.assert_allclose(weight.detach().numpy(), W, atol=1e-6)


def test_muon_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch averages gradients where ours adds them up, a factor that the norm takes out while the
    momentum stays the same; its products are bf16 whatever the weights, here made float32."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(w.detach().clone()) for w in ours]
    muon = Muon([{"params": ours, "weight_decay": 0.2}], MuonSettings(), torch.float32)
    muon.param_groups[0].update(lr=0.05, momentum=0.9)
    torch_muon = torch.optim.Muon(
        theirs,
        lr=0.05,
        momentum=0.9,
        weight_decay=0.2,
        nesterov=True,
        ns_coefficients=(3.4445, -4.7750, 2.0315),
        ns_steps=5,
        adjust_lr_fn="original",
    )
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        muon.step()
        torch_muon.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)


def test_adamw_is_its_equation() -> None:
    """Decay first and with the scheduled rate, then the step with both means unbiased."""
    torch.manual_seed(0)
    cfg = Config(**SIZES, adam_wd=0.3)
    groups = route_parameters(cfg, GPT(cfg))
    adam = build_optimizers(cfg, groups, torch.float32)[0]
    weights = [p for group in adam.param_groups for p in group["params"]]
    assert len(weights) == sum(len(g["params"]) for g in groups if g["optimizer"] == "adam")
    expected = [p.detach().double() for p in weights]
    means, squares = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for step in range(1, 5):
        lr = 0.1 / step
        for n, p in enumerate(weights):
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            means[n] = 0.9 * means[n] + 0.1 * g
            squares[n] = 0.95 * squares[n] + 0.05 * g * g
            unbiased = means[n] / (1 - 0.9**step), squares[n] / (1 - 0.95**step)
            expected[n] = (1 - lr * 0.3) * expected[n] - lr * unbiased[0] / (
                unbiased[1].sqrt() + 1e-8
            )
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
    for p, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_routed_once(variant: str) -> None:
    cfg = Config(**{**SIZES, **VARIANTS[variant]})
    model = GPT(cfg)
    groups = route_parameters(cfg, model)
    routed = {name: p for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    assert sum(len(group["names"]) for group in groups) == len(routed)
    assert routed.keys() == dict(model.named_parameters()).keys()
    assert all(routed[name] is p for name, p in model.named_parameters())
    adam, muon = build_optimizers(cfg, groups, torch.float32)
    assert {p.ndim for group in muon.param_groups for p in group["params"]} == {2}
    assert sum(len(g["params"]) for o in (adam, muon) for g in o.param_groups) == len(routed)


def test_every_route_is_in_use() -> None:
    used = set()
    for tied in (True, False):
        for routing in ROUTINGS:
            cfg = Config(**SIZES, tie_embeddings=tied, optimizer_routing=routing)
            used |= {group["route"] for group in route_parameters(cfg, GPT(cfg))}
    assert used == GROUPS.keys()
    assert all(set(row) <= GROUPS.keys() for row in ROUTES.values())


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (nn.Parameter(torch.ones(1)), "parameter blocks.0.attn.odd has no kind"),
        (
            of_kind(ATTENTION_MATRIX, nn.Parameter(torch.ones(4, 12))),
            "blocks.0.attn.odd is declared as attention matrix",
        ),
        (of_kind(GAIN, nn.Parameter(torch.ones(32, 32))), "blocks.0.attn.odd is declared as gain"),
        (of_kind(TABLE, nn.Parameter(torch.ones(5, 32))), "blocks.0.attn.odd is declared as table"),
        (of_kind(GATE, nn.Parameter(torch.ones(32, 32))), "blocks.0.attn.odd is declared as gate"),
    ],
)
def test_a_parameter_without_a_kind_or_of_a_wrong_one_is_refused(
    made: nn.Parameter, complaint: str, monkeypatch
) -> None:
    make = train_gpt.Attention.__init__

    def with_one_more(self, *given) -> None:
        make(self, *given)
        self.odd = made

    monkeypatch.setattr(train_gpt.Attention, "__init__", with_one_more)
    with pytest.raises(Refusal, match=re.escape(complaint)):
        GPT(Config(**SIZES))


def test_rates_and_decay_come_from_their_settings() -> None:
    rates = {
        "matrix_lr": 2.0,
        "scalar_lr": 3.0,
        "tied_embed_lr": 5.0,
        "embed_lr": 7.0,
        "head_lr": 11.0,
        "adam_wd": 0.1,
        "muon_wd": 0.2,
        "lr_mult": 0.5,
    }
    of = {}
    for tied in (True, False):
        cfg = Config(**SIZES, **rates, tie_embeddings=tied)
        of[tied] = {
            name: (group["base_lr"], group["weight_decay"])
            for group in route_parameters(cfg, GPT(cfg))
            for name in group["names"]
        }
    assert of[True]["tok_emb.weight"] == (2.5, 0.1)
    assert of[False]["tok_emb.weight"] == (3.5, 0.1)
    assert of[False]["lm_head.weight"] == (5.5, 0.1)
    for tied in (True, False):
        assert of[tied]["blocks.0.mlp.fc.weight"] == of[tied]["bigram.proj.weight"] == (1.0, 0.2)
        assert of[tied]["blocks.4.attn.q_gain"] == of[tied]["skip_weights"] == (1.5, 0.1)
        assert of[tied]["bigram.embed.weight"] == of[tied]["ve_shared.embed.weight"] == (2.5, 0.1)


# What the published systems chose otherwise


def grouped(**changes: object) -> dict[str, tuple[str, float, float]]:
    """Optimizer, rate and decay of each parameter of a small model."""
    cfg = Config(**{**SIZES, **changes})
    return {
        name: (group["optimizer"], group["base_lr"], group["weight_decay"])
        for group in route_parameters(cfg, GPT(cfg))
        for name in group["names"]
    }


def test_routing_variants_move_what_they_say() -> None:
    rates = {
        "matrix_lr": 2.0,
        "scalar_lr": 3.0,
        "tied_embed_lr": 5.0,
        "adam_wd": 0.1,
        "muon_wd": 0.2,
        "vrl_mode": "mix",
        "backout_mode": "mid",
    }
    muon, scalar, table = ("muon", 2.0, 0.2), ("adam", 3.0, 0.1), ("adam", 5.0, 0.1)
    shapes = {name: p.ndim for name, p in GPT(Config(**SIZES)).named_parameters()}
    for routing in ROUTINGS:
        routes = grouped(**rates, optimizer_routing=routing)
        aux = scalar if routing == "banks" else muon
        assert routes["bigram.proj.weight"] == routes["ve_shared.proj.weight"] == aux
        assert routes["tok_emb.weight"] == table
        assert routes["backout_lambda"] == routes["blocks.3.attn.vr_lambda"] == scalar
        blocks = ("adam", 2.0, 0.1) if routing == "adam" else muon
        assert routes["blocks.2.mlp.proj.weight"] == routes["blocks.0.attn.c_k.weight"] == blocks
        if routing == "by_ndim":
            assert {name for name, route in routes.items() if route[0] == "muon"} == {
                name for name, dims in shapes.items() if dims == 2
            } - {"tok_emb.weight"}
        else:
            assert routes["bigram.embed.weight"] == routes["ve_shared.embed.weight"] == table
            assert routes["skip_weights"] == routes["blocks.0.resid_mix"] == scalar


@pytest.mark.parametrize(
    ("system", "matrix", "token", "scalar", "adam_wd"),
    [
        ("pr1361", 0.025, 0.035, 0.025, 0.04),
        ("pr569", 0.025, 0.035, 0.025, 0.04),
        ("pr703", 0.026, 0.0364, 0.026, 0.04),
        ("pr334", 0.04, 0.05, 0.04, 0.0),
        ("pr295", 0.02, 0.03, 0.02, 0.01),
    ],
)
def test_published_rates_and_decays(
    system: str, matrix: float, token: float, scalar: float, adam_wd: float
) -> None:
    with torch.device("meta"):
        model = GPT(Config(**PRESETS[system]))
    for group in route_parameters(model.cfg, model):
        decay = 0.04 if group["optimizer"] == "muon" else adam_wd
        assert group["weight_decay"] == decay
        rates = {"tokens": token, "tables": token}
        rate = matrix if group["optimizer"] == "muon" else rates.get(group["route"], scalar)
        assert group["base_lr"] == pytest.approx(rate)


@pytest.mark.parametrize("decay_first", [True, False])
def test_decay_before_or_after_the_step(decay_first: bool) -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    before, W.grad = W.detach().numpy().copy(), torch.randn(6, 4, dtype=torch.float64)
    rule = MuonSettings(muon_wd_order="before" if decay_first else "after")
    muon = Muon([{"params": [W], "weight_decay": 0.5}], rule, torch.float64)
    muon.param_groups[0].update(lr=0.1, momentum=0.9)
    step, _ = naive_muon(before, np.zeros_like(before), W.grad.numpy(), 0.1, 0.9, 0.0)
    muon.step()
    expected = step - 0.05 * before if decay_first else 0.95 * step
    np.testing.assert_allclose(W.detach().numpy(), expected, atol=1e-7)


def test_adam_without_decay_is_plain_adam() -> None:
    torch.manual_seed(0)
    cfg = Config(**SIZES, adam_wd=0.0)
    adam, _ = build_optimizers(cfg, route_parameters(cfg, GPT(cfg)), torch.float32)
    ours = [p for group in adam.param_groups for p in group["params"]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    plain = torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for group in adam.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        adam.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 16, 16), (3, 10, 30)])
def test_packed_momentum_is_blockwise_int8(shape: tuple[int, ...]) -> None:
    """Blocks of 256 over each flattened matrix, the last one padded with zeros."""
    torch.manual_seed(0)
    M = torch.randn(shape) * torch.logspace(-6, 3, shape[-1])
    q, scale = pack_momentum(M)
    assert q.dtype == torch.int8
    assert len(q) == len(scale) == len(M)
    unpacked = unpack_momentum((q, scale), M)
    for flat, back in zip(M.flatten(1).numpy(), unpacked.flatten(1).numpy(), strict=True):
        for start in range(0, len(flat), 256):
            block, near = flat[start : start + 256], back[start : start + 256]
            s = max(np.abs(block).max() / 127, 1e-12)
            expected = np.clip(np.round(block / s), -127, 127) * s
            np.testing.assert_allclose(near, expected, rtol=1e-5, atol=1e-2 * s)
            assert np.abs(near - block).max() <= 0.501 * s
    zeros = torch.zeros(2, 3, 4)
    assert torch.equal(unpack_momentum(pack_momentum(zeros), zeros), zeros)


def test_packed_momentum_acts_unrounded_and_is_kept_rounded() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 70)) for _ in range(2)]
    rule = MuonSettings(muon_quant_momentum=True)
    muon = Muon([{"params": weights, "weight_decay": 0.1}], rule, torch.float32)
    muon.param_groups[0].update(lr=0.1, momentum=0.9)
    kept = torch.zeros(2, 5, 70)
    for _ in range(4):
        grads = torch.randn(2, 5, 70)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        M = 0.9 * kept + grads
        expected = [
            0.99 * w.detach().numpy() - 0.1 * naive_orthogonalize((g + 0.9 * m).numpy())
            for w, g, m in zip(weights, grads, M, strict=True)
        ]
        muon.step()
        for weight, W in zip(weights, expected, strict=True):
            np.testing.assert_allclose(weight.detach().numpy(), W, atol=2e-4)
        kept = unpack_momentum(pack_momentum(M), M)
        assert not torch.equal(kept, M)
