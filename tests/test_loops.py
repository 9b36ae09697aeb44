"""Loops of layers in a run: when they begin, that all who read weights after training loop."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TinyData
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import environment, events

import train_gpt
from train_gpt import GPT, PRESETS, Batch, Config, Refusal, Run, Schedule

SIZES = {
    "vocab_size": 64,
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "xsa_last_n": 2,
    "bigram_vocab_size": 0,
    "ve_enabled": False,
    "train_seq_len": 16,
    "train_batch_tokens": 64,
    "eval_seq_len": 16,
    "eval_stride": 0,
    "skip_gates": True,
    "num_loops": 2,
    "loop_start": 1,
    "loop_end": 2,
}


@given(st.integers(2, 300), st.floats(0, 1))
@settings(deadline=None)
def test_loops_begin_with_the_first_step_whose_share_of_the_run_is_over(
    iterations: int, at: float
) -> None:
    given_settings = {
        **SIZES,
        "iterations": iterations,
        "max_wallclock_seconds": 0.0,
        "enable_looping_at": at,
    }
    begins = [step for step in range(iterations) if step / iterations >= at]
    if not begins or at == 1.0:
        with pytest.raises(Refusal, match="NUM_LOOPS=2 has no effect"):
            Config(**given_settings)
        return
    schedule = Schedule(Config(**given_settings))
    for step in range(iterations):
        schedule.observe(step, 0.1 * step)
        assert schedule.at(step, 0.1 * step).looping == (step >= begins[0])


def test_loops_go_on_once_they_began() -> None:
    """By the clock, of the budget less what calibration needs; a clock cannot turn them off."""
    cfg = Config(**SIZES, max_wallclock_seconds=600.0, enable_looping_at=0.35)
    schedule = Schedule(cfg, 0.5)
    assert not schedule.at(2177, 209.8).looping
    assert schedule.at(2178, 209.825).looping
    schedule.observe(2178, 209.825)
    assert schedule.at(2179, 0.0).looping


def test_a_run_without_loops_says_nothing_of_them() -> None:
    cfg = Config(**{**SIZES, "num_loops": 0})
    moment = Schedule(cfg).at(0, 0.0)
    assert "depth_loop" not in Schedule(cfg).acting(moment)


def test_a_run_loops_from_its_date_on_and_in_all_that_follows(
    tiny_data: TinyData, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration, validation and the artifact's score execute the looped plan."""
    seen: list[tuple[str, bool]] = []
    hidden = GPT.hidden

    def noting(self, input_ids, documents=None, boundaries=None, looping=True, row_deltas=None):
        seen.append(("grad" if torch.is_grad_enabled() else "no grad", looping))
        return hidden(self, input_ids, documents, boundaries, looping, row_deltas)

    monkeypatch.setattr(GPT, "hidden", noting)
    given_settings = {
        **{name: value for name, value in SIZES.items() if name != "vocab_size"},
        "iterations": 8,
        "max_wallclock_seconds": 0,
        "enable_looping_at": 0.5,
        "val_loss_every": 2,
    }
    text = {name.upper(): train_gpt.show_setting(value) for name, value in given_settings.items()}
    with environment(**{**tiny_data.env, **text, "RUNS_DIR": str(tmp_path), "RUN_ID": "run"}):
        assert train_gpt.main([]) == 0
    assert {looping for grad, looping in seen if grad == "no grad"} == {True}
    assert {looping for grad, looping in seen if grad == "grad"} == {True, False}
    (begun,) = events(tmp_path / "run", "depth_loop")
    assert begun["step"] == 4
    assert begun["layers"] == [0, 1, 2, 1, 2, 1, 2, 3]
    active = {event["name"]: event for event in events(tmp_path / "run", "activity")}
    assert (active["depth_loop"]["steps"], active["depth_loop"]["of"]) == (4, 8)


@pytest.mark.parametrize("looping", [False, True])
def test_a_run_that_ends_before_its_loops_is_what_it_was_trained_as(looping: bool) -> None:
    cfg = Config(**SIZES, max_wallclock_seconds=600.0)
    model, run = GPT(cfg), Run(cfg, 0, 1, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    ids = torch.randint(64, (2, 17))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    state = SimpleNamespace(schedule=SimpleNamespace(looping=looping))
    exported, after = train_gpt.without_untrained_loops(model, state, run)
    with torch.no_grad():
        torch.testing.assert_close(exported(batch)[0], model(batch, looping=looping)[0])
    assert after.cfg.num_loops == exported.cfg.num_loops == (2 if looping else 0)


@pytest.mark.parametrize("system", ["pr1855", "pr2135"])
def test_the_networks_have_their_published_sizes(system: str) -> None:
    """#2135 counts two softcaps that its run left as they were; they are constants here."""
    with torch.device("meta"):
        model = GPT(Config(**PRESETS[system]))
    assert sum(p.numel() for p in model.parameters()) == 35_945_671
    inert = [p for name, p in model.named_parameters() if name.startswith("lanes.")]
    assert sum(p.numel() for p in inert) == 66


@pytest.mark.parametrize("vocab_size", [8192])
def test_the_first_loss_is_that_of_the_published_run(vocab_size: int) -> None:
    """Every output starts at 0, and each gate where it is defined to: 9.0087 on real text."""
    cfg = Config(**PRESETS["pr1855"])
    model = GPT(cfg)
    train_gpt.initialize(model, cfg)
    assert model.skip_gates is not None
    assert not model.skip_gates.any()
    assert (model.blocks[3].attn.q_gain == 5.0).all()
    assert not model.blocks[3].attn.gate.any()
    assert (model.lanes.keep == torch.tensor(1.1)).all()
    assert (model.lanes.write == 1).all()
    ids = torch.randint(vocab_size, (1, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        nats, _ = model(Batch(ids[:, :-1], ids[:, 1:]))
    assert abs(nats.mean() - math.log(vocab_size)) < 0.02
