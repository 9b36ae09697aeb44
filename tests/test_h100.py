"""The page on the full-size step says what its script calculates, and that agrees with a trace."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import plan
from train_gpt import Config

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import h100  # noqa: E402

CFG = Config.from_env({"PRESET": "pr1361"})[0]


def test_the_page_holds_what_the_script_prints() -> None:
    page = (FOLDER / "H100.md").read_text().splitlines()
    assert [line for line in h100.lines() if line not in page] == []


def test_flops_are_those_of_a_traced_step() -> None:
    counted = {
        kind: sum(p.flops for p in h100.parts(CFG) if p.kind == kind)
        for kind in ("products", "attention")
    }
    traced = plan.traced_step(CFG)[1]
    tokens = CFG.train_batch_tokens / h100.GPUS
    assert counted["products"] == pytest.approx(traced["products"] * tokens, rel=1e-9)
    assert counted["attention"] == pytest.approx(traced["attention"] * tokens, rel=0.01)


def test_ranks_exchange_what_the_plan_says() -> None:
    said = next(line for line in plan.lines(CFG, 0) if line.startswith("a rank sends"))
    numbers = [int(word.replace(",", "")) for word in said.split() if word[0].isdigit()]
    exchanged = sum(p.bytes for p in h100.parts(CFG) if p.kind == "exchange")
    assert exchanged == pytest.approx(sum(numbers), rel=1e-6)


def test_every_part_that_can_be_timed_runs() -> None:
    small = replace(CFG, num_layers=2, xsa_last_n=2, ve_layers="1", train_seq_len=32)
    with mock.patch("torch.compile", lambda work: work):
        ran = {name: work() for name, work in h100.trials(small, 64, torch.device("cpu"))}
    known = {p.name for p in h100.parts(CFG)}
    assert ran.keys() - known == {"blocks, all parts"}
    assert len(ran) == 10
