"""The stand-in for a peer's step (benchmarks/peer_step.py) computes what our own step does."""

from __future__ import annotations

import math
import sys

import torch
from conftest import ROOT
from test_model import SIZES, random_ids, random_model

from train_gpt import (
    Batch,
    Config,
    Ranks,
    build_optimizers,
    route_parameters,
    training_nats,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import peer_step

# The published script looks across the starts of documents.
UNMASKED = {"smear_bos_mask": False, "bigram_bos_mask": False}


def test_two_steps_of_the_stand_in_are_ours() -> None:
    """Losses, and weights after AdamW and Muon, from the same initial weights."""
    rows = {"train_seq_len": 16, "eval_seq_len": 16, "eval_stride": 16}
    cfg = Config(**{**SIZES, **UNMASKED, **rows, "xsa_last_n": SIZES["num_layers"]})
    ours = random_model(cfg, dtype=torch.float32)
    step = peer_step.Step(cfg, bf16=False, compiled=False)
    step.model.load_state_dict(ours.state_dict())
    step.set_out()
    optimizers = build_optimizers(cfg, route_parameters(cfg, ours), torch.float32, Ranks())
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"], group["momentum"] = group["base_lr"], peer_step.MOMENTUM
    for seed in range(2):
        ids = random_ids(cfg, 2, 17, seed)
        loss = training_nats(ours, Batch(ids[:, :-1], ids[:, 1:]))[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), cfg.grad_clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert math.isclose(step(ids[:, :-1], ids[:, 1:]), loss.item(), rel_tol=1e-5)
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(step.model.state_dict()[name], weight, rtol=1e-3, atol=2e-4)
    moved = step.average["blocks.0.mlp.fc.weight"] - ours.blocks[0].mlp.fc.weight
    assert moved.abs().max() > 0
