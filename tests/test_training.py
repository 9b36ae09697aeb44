"""One optimizer step, priming and the averaged weights, on a tiny model and data set."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import SIZES, random_model
from test_optimizers import naive_muon
from torch import Tensor, nn

import train_gpt
from train_gpt import (
    GPT,
    Config,
    Moment,
    Run,
    RunFolder,
    Schedule,
    TrainingRows,
    build_optimizers,
    prime,
    qat_grids,
    refuse_non_finite,
    route_parameters,
    train,
    train_step,
    training_nats,
)

MOMENT = Moment(lr_scale=0.5, momentum=0.8, qat=False, done=False)


class Recorder:
    """Stands in for the optimizers: keeps the gradients it is given, changes nothing."""

    def __init__(self, groups: list[dict]) -> None:
        self.param_groups, self.gradients = groups, {}

    def step(self) -> None:
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                self.gradients[name] = p.grad.clone()

    def zero_grad(self, set_to_none: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


@pytest.fixture
def setting(tiny_data):
    """Makes settings, random model, rows and run: 6 rows of 16 tokens a step, no clock."""

    def make(**changes: object) -> tuple[Config, GPT, TrainingRows, Run]:
        sizes = {
            **SIZES,
            "vocab_size": 320,
            "train_seq_len": 16,
            "train_batch_tokens": 96,
            "data_path": str(tiny_data.data_path),
            "max_wallclock_seconds": 0.0,
            "iterations": 5,
            "warmdown_iters": 3,
            "val_loss_every": 0,
            "seed": 3,
            "eval_seq_len": 16,
            "eval_stride": 4,
            "eval_batch_seqs": 2,
            "int8_keep_float_max_numel": 300,
            "muon_momentum_warmup_steps": 4,
        }
        cfg = Config(**{**sizes, **changes})
        run = Run(cfg, rank=0, world_size=1, device=torch.device("cpu"))
        return cfg, random_model(cfg, dtype=torch.float32), TrainingRows(cfg), run

    return make


def gradients(setting, moment: Moment = MOMENT, **changes: object) -> tuple[dict, Tensor]:
    """What the optimizers get in step 2, and what the step reports."""
    cfg, model, rows, run = setting(**changes)
    recorder = Recorder(route_parameters(cfg, model))
    return recorder, train_step(training_nats, model, [recorder], rows, 2, moment, run)


def plain_gradients(setting, qat: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of the mean over the batch of step 2, and that mean."""
    _, model, rows, _ = setting()
    loss = training_nats(model, rows.batch(12, 6), qat_grids(model) if qat else None)[0].mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.detach()


@pytest.mark.parametrize("rows_at_once", [0, 1, 4, 6, 100])
@pytest.mark.parametrize("qat", [False, True])
def test_micro_batches_share_the_gradient_of_the_batch_mean(
    setting, rows_at_once: int, qat: bool
) -> None:
    moment = Moment(1.0, 0.9, qat, False)
    recorder, stats = gradients(setting, moment, micro_batch_seqs=rows_at_once, grad_clip_norm=0.0)
    expected, loss = plain_gradients(setting, qat)
    assert recorder.gradients.keys() == expected.keys()
    assert float(stats[0]) == pytest.approx(float(loss), rel=1e-6)
    for name, gradient in recorder.gradients.items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6 * (1 + largest))


@pytest.mark.parametrize("bound", [0.01, 1e5])
def test_clipping_is_that_of_torch(setting, bound: float) -> None:
    recorder, stats = gradients(setting, grad_clip_norm=bound)
    _, model, rows, _ = setting()
    model(rows.batch(12, 6))[0].mean().backward()
    total = nn.utils.clip_grad_norm_(model.parameters(), bound)
    assert 0.01 < float(total) < 1e5
    assert float(stats[1:].norm()) == pytest.approx(float(total), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(recorder.gradients[name], p.grad, rtol=1e-5, atol=1e-7)


def test_two_steps_are_those_written_by_hand(setting) -> None:
    """AdamW of torch one parameter at a time, Muon as its equation, rates from the settings."""
    cfg, model, rows, run = setting(grad_clip_norm=0.5, muon_wd=0.3, adam_wd=0.2, lr_mult=2.0)
    reference = copy.deepcopy(model)
    optimizers = build_optimizers(cfg, route_parameters(cfg, model), torch.float32)
    muon = {
        name: np.zeros(p.shape)
        for name, p in reference.named_parameters()
        if p.ndim == 2
        and not name.endswith(("embed.weight", "emb.weight", "resid_mix", "skip_weights"))
    }
    adam = {
        name: torch.optim.AdamW([p], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
        for name, p in reference.named_parameters()
        if name not in muon
    }
    for step in range(2):
        train_step(training_nats, model, optimizers, rows, step, MOMENT, run)
        reference.zero_grad()
        reference(rows.batch(6 * step, 6))[0].mean().backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for name, p in reference.named_parameters():
            if name in muon:
                W, muon[name] = naive_muon(
                    p.detach().numpy(), muon[name], p.grad.numpy(), 2.0 * 0.025 * 0.5, 0.8, 0.3
                )
                p.data.copy_(torch.from_numpy(W))
            else:
                rate = 0.035 if "emb" in name else 0.025
                adam[name].param_groups[0]["lr"] = 2.0 * rate * 0.5
                adam[name].step()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)
        assert ours.grad is None


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name(setting) -> None:
    cfg, model, rows, run = setting()
    groups = route_parameters(cfg, model)
    with torch.no_grad():
        model.blocks[2].mlp.fc.weight[0, 0] = math.nan
    recorder = Recorder(groups)
    stats = train_step(training_nats, model, [recorder], rows, 0, MOMENT, run).tolist()
    with pytest.raises(FloatingPointError, match=r"step 7: loss nan.*mlp"):
        refuse_non_finite(stats, 7, groups)
    refuse_non_finite([1.0] * (1 + len(groups)), 7, groups)
    for bad, group in enumerate(groups):
        stats = [1.0] * (1 + len(groups))
        stats[1 + bad] = math.inf
        with pytest.raises(FloatingPointError) as error:
            refuse_non_finite(stats, 7, groups)
        named = [g["route"] for g in groups if g["route"] in str(error.value)]
        assert named == [group["route"]]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(setting, primed: bool = False, **changes: object) -> tuple[dict, dict, Run]:
    """Weights that train() returns, those it leaves in the model, and the run."""
    cfg, model, rows, run = setting(**changes)
    if primed:
        prime(training_nats, model, rows, run)
    state = train_gpt.Training(model, 0.0, ["data", 1], run)
    result, steps = train(training_nats, state, rows, None, run), state.step
    assert steps == cfg.iterations
    return weights(result), weights(model), run


def test_priming_leaves_no_trace(setting) -> None:
    """Nor does it skip a variant: each forward that the run will compile has run."""
    variants = []

    def forward(model, batch, grids=None, *given):
        variants.append((bool(grids), torch.is_grad_enabled(), batch.places is not None))
        return training_nats(model, batch, grids, *given)

    _, model, rows, run = setting()
    before = weights(model)
    seconds = prime(forward, model, rows, run)
    assert set(variants) == {
        (False, True, False),
        (True, True, False),
        (False, False, False),
        (False, False, True),
    }
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert min(seconds) > 0
    primed, fresh = trained(setting, primed=True)[0], trained(setting)[0]
    assert all(torch.equal(primed[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("mode", ["ema", "none"])
def test_training_returns_the_average_from_the_initial_weights_on(setting, mode: str) -> None:
    cfg, model, rows, run = setting()
    optimizers = build_optimizers(cfg, route_parameters(cfg, model), run.dtype)
    average = {name: p.double() for name, p in weights(model).items()}
    schedule, moments = Schedule(cfg), []
    for step in range(cfg.iterations):
        schedule.observe(step, 0.0)
        moments.append(schedule.at(step, 0.0))
        train_step(training_nats, model, optimizers, rows, step, moments[-1], run)
        average = {name: 0.7 * average[name] + 0.3 * p for name, p in weights(model).items()}
    result, last, run = trained(setting, avg_mode=mode, ema_decay=0.7)
    for name, p in weights(model).items():
        assert torch.equal(last[name], p)
        expected = average[name].float() if mode == "ema" else p
        torch.testing.assert_close(result[name], expected, rtol=0, atol=1e-6)
    assert run.ledger.activity["late_qat"] == sum(moment.qat for moment in moments)
    assert run.ledger.activity["warmdown"] == sum(moment.lr_scale < 1 for moment in moments) == 2
    assert run.ledger.activity["ema"] == (5 if mode == "ema" else 0)


ACTING = {
    "polar": {"muon_ns": "polar"},
    "rows": {"muon_row_norm": True},
    "neurons": {"muon_neuron_norm": 0.95},
    "cautious": {"muon_wd_form": "cautious", "muon_wd": 1.0},
    "slow momentum": {"muon_slow_share": 0.5},
    "cool-down": {"muon_momentum_cooldown_frac": 0.5},
    "beta2": {"beta2": 0.99},
    "decay of tables": {"embed_wd": 0.5},
    "rate floor": {"min_lr": 0.9},
    "last weights": {"avg_last_share": 0.4},
}


@pytest.mark.parametrize("name", ACTING)
def test_a_technique_changes_what_is_exported(setting, name: str) -> None:
    """And what it does not concern it leaves to the bit: a second run alike is equal."""
    plain, again = trained(setting)[0], trained(setting)[0]
    with_it, _, run = trained(setting, **ACTING[name])
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(not torch.equal(plain[name], with_it[name]) for name in plain)
    if name == "slow momentum":
        assert run.ledger.activity["slow_momentum"] == 3


def test_late_qat_changes_what_is_trained(setting) -> None:
    """From the step on at which it is logged."""
    with_it, _, run = trained(setting, late_qat_threshold=0.5)
    without, _, never = trained(setting, qat_mode="off")
    assert run.ledger.activity["late_qat"] == 1
    assert never.ledger.activity["late_qat"] == 0
    assert any(not torch.equal(with_it[name], without[name]) for name in without)


def test_ranks_share_the_rows_of_a_step(setting) -> None:
    """Every row once, whatever the number of ranks and rows a forward; more ranks than rows too."""
    for ranks in (1, 2, 4, 9):
        for at_once in (0, 1, 4):
            cfg = setting(micro_batch_seqs=at_once)[0]
            parts = [
                part
                for rank in range(ranks)
                for part in train_gpt.micro_batches(cfg, Run(cfg, rank, ranks, torch.device("cpu")))
            ]
            assert [row for first, count in parts for row in range(first, first + count)] == list(
                range(6)
            )
            assert all(1 <= count <= (at_once or 6) for _, count in parts)


# What the published systems chose otherwise


def naive_mile(setting, gamma: float, least: float) -> tuple[dict[str, Tensor], float]:
    """Gradient and value of sum(w nats) / sum(w) over the batch of step 2, weights held fixed."""
    _, model, rows, _ = setting()
    batch = rows.batch(12, 6)
    logits = model.logits(model.hidden(batch.input_ids))
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    w = (1 - (-entropy).exp()).pow(gamma).clamp(min=least)
    nats = -log_p.gather(-1, batch.target_ids.unsqueeze(-1)).squeeze(-1)
    loss = (w * nats).sum() / w.sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize("rows_at_once", [0, 1, 4])
@pytest.mark.parametrize(("gamma", "least"), [(1.1, 0.1), (3.0, 0.6), (0.0, 0.1)])
def test_mile_divides_by_the_weights_of_the_whole_batch(
    setting, gamma: float, least: float, rows_at_once: int
) -> None:
    moment = Moment(1.0, 0.9, False, False, mile_gamma=gamma)
    recorder, stats = gradients(
        setting,
        moment,
        micro_batch_seqs=rows_at_once,
        mile_gamma=1.1,
        mile_clamp_min=least,
        grad_clip_norm=0.0,
    )
    expected, loss = naive_mile(setting, gamma, least)
    assert float(stats[0]) == pytest.approx(loss, rel=1e-4)
    for name, gradient in recorder.gradients.items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * (1 + largest))


def test_mile_is_summed_over_ranks(setting) -> None:
    """Two ranks' contributions, added up by hand, give the one process's step."""
    moment = Moment(1.0, 0.9, False, False, mile_gamma=1.1)
    whole, stats = gradients(setting, moment, mile_gamma=1.1, grad_clip_norm=0.0)
    shares: list[list[Tensor]] = []
    for rank in range(2):
        cfg, model, rows, _ = setting(mile_gamma=1.1, grad_clip_norm=0.0, muon_parallel=False)
        run = Run(cfg, rank, 2, torch.device("cpu"))
        run.ranks.add_up = lambda tensors: shares.append([t.clone() for t in tensors])
        groups = route_parameters(cfg, model)
        train_step(training_nats, model, [Recorder(groups)], rows, 2, moment, run)
    loss, weight, *grads = (a + b for a, b in zip(*shares, strict=True))
    assert float(loss / weight) == pytest.approx(float(stats[0]), rel=1e-6)
    names = [name for group in groups for name in group["names"]]
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad / weight[0], whole.gradients[name], rtol=1e-4, atol=1e-6)


def test_each_rank_clips_its_own_mean(setting) -> None:
    """Rank 1 of 2 has the last three of six rows; what it adds up is half its clipped mean."""
    bound = 0.05
    cfg, model, rows, _ = setting(clip_before_reduce=True, grad_clip_norm=bound)
    shares: list[list[Tensor]] = []
    run = Run(cfg, 1, 2, torch.device("cpu"))
    run.ranks.add_up = lambda tensors: shares.append([t.clone() for t in tensors])
    groups = route_parameters(cfg, model)
    train_step(training_nats, model, [Recorder(groups)], rows, 2, MOMENT, run)
    reference = setting()[1]
    reference(rows.batch(15, 3))[0].mean().backward()
    total = nn.utils.clip_grad_norm_(reference.parameters(), bound)
    assert float(total) > 2 * bound
    names = [name for group in groups for name in group["names"]]
    for name, share in zip(names, shares[0][2:], strict=True):
        expected = reference.get_parameter(name).grad / 2
        torch.testing.assert_close(share, expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("last_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("mode", ["ema", "swa", "swa_of_ema", "none"])
def test_averages_are_those_of_a_naive_loop(setting, mode: str, last_share: float) -> None:
    cfg, model, _, run = setting(avg_mode=mode, ema_decay=0.7, avg_last_share=last_share)
    averages, torch_seed = train_gpt.Averages(model, cfg), torch.manual_seed(0)
    ema = {name: p.double() for name, p in weights(model).items()}
    snapshots: list[dict[str, Tensor]] = []
    for step in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch_seed))
        ema = {name: 0.7 * ema[name] + 0.3 * p for name, p in weights(model).items()}
        averages.update(snapshot=step in (2, 3, 5))
        if step in (2, 3, 5):
            snapshots.append(ema if mode == "swa_of_ema" else weights(model))
    mean = {name: sum(s[name].double() for s in snapshots) / 3 for name in ema}
    expected = {"ema": ema, "swa": mean, "swa_of_ema": mean, "none": weights(model)}[mode]
    last = {name: p.double() for name, p in weights(model).items()}
    for name, p in weights(averages.result(run)).items():
        blend = (1.0 - last_share) * expected[name].double() + last_share * last[name]
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.double(), blend, rtol=0, atol=1e-5)
    assert all(torch.equal(last[name], p.double()) for name, p in weights(model).items())


def test_without_a_snapshot_swa_falls_back(setting, capsys) -> None:
    for mode, expected in (("swa", "model"), ("swa_of_ema", "ema")):
        cfg, model, _, run = setting(avg_mode=mode, ema_decay=0.7)
        averages = train_gpt.Averages(model, cfg)
        averages.update(snapshot=False)
        assert averages.result(run) is (model if expected == "model" else averages.kept["ema"])
    assert "swa:applying" not in capsys.readouterr().out


def test_the_ledger_counts_what_acted(setting, capsys) -> None:
    """Five steps, the last three in the warmdown: scales 1, 1, 1, 2/3, 1/3."""
    run = trained(
        setting, avg_mode="swa", swa_start_frac=0.7, swa_every=1, mile_gamma=1.1, qat_mode="always"
    )[2]
    assert dict(run.ledger.activity) == {
        "always_qat": 5,
        "warmdown": 2,
        "momentum_ramp": 4,
        "mile": 5,
        "swa": 2,
    }
    assert dict(run.ledger.occasions) == dict.fromkeys(run.ledger.activity, 5)
    out = capsys.readouterr().out
    assert "swa:start step:4" in out
    assert "swa:applying averaged 2 checkpoints" in out
    assert "always_qat:enabled step:0" in out
    silent = trained(setting, avg_mode="swa", swa_every=100)[2]
    silent.ledger.log_activity()
    assert "warning: swa was configured and never acted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("calib", "reason"), [("train_after_cap", True), ("train", False), ("selfgen", False)]
)
def test_training_data_after_the_budget_is_not_eligible(calib: str, reason: bool) -> None:
    reasons = train_gpt.ineligible_settings(Config(gptq_calib=calib))
    assert any("GPTQ_CALIB" in text for text in reasons) == reason


@pytest.mark.parametrize(
    ("calib", "inside"), [("train", True), ("train_after_cap", False), ("selfgen", False)]
)
def test_only_calibration_inside_the_budget_runs_on_its_clock(
    setting, calib: str, inside: bool
) -> None:
    """What is outside reserves nothing, and no deadline of the budget cuts it short."""
    cfg, model, rows, run = setting(
        gptq_calib=calib, gptq_calib_batches=3, max_wallclock_seconds=1e-6
    )
    train_gpt.calibrate(model, rows, 5, run)
    assert (run.ledger.training_clock.elapsed() > 0) == inside
    assert run.ledger.calibration_tokens == train_gpt.CALIBRATION_ROWS * 16 * (1 if inside else 3)
    assert (train_gpt.calibration_reserve(1.0, run) > 0) == inside


@pytest.mark.parametrize(("seconds", "late"), [(599.0, False), (601.0, True)])
def test_a_run_beyond_its_budget_is_not_eligible(setting, seconds: float, late: bool) -> None:
    """Whether or not anything was calibrated on the clock."""
    _, model, _, run = setting(gptq_variant="off", max_wallclock_seconds=600.0)
    run.ledger.training_clock.banked, run.ledger.trained_seconds, run.folder.path = (
        seconds,
        seconds,
        Path("nowhere"),
    )
    run.folder.append = lambda name, text: None
    result = train_gpt.EvalResult("artifact_sliding", 1.0, 1, 1, 1.0)
    assert train_gpt.log_summary(model, 5, 100, [result], run) == 0
    assert (
        any("training and calibration took 601.0 s" in why for why in run.ledger.ineligible) == late
    )


def test_the_last_checkpoint_is_off_the_clock_and_others_are_not(setting, monkeypatch) -> None:
    ticking: list[bool] = []
    monkeypatch.setattr(
        train_gpt.Training,
        "save",
        lambda state, _: ticking.append(state.run.ledger.training_clock.since is not None),
    )
    trained(setting, checkpoint_seconds=1e-9)
    assert (len(ticking) > 2, all(ticking[:-1]), ticking[-1]) == (True, True, False)


def test_a_resumed_run_knows_what_acted_before(setting, monkeypatch) -> None:
    """The ledger of a run that was cut after three of five steps is that of a whole one."""

    def state_of(run: Run) -> train_gpt.Training:
        return train_gpt.Training(random_model(run.cfg, dtype=torch.float32), 0.0, ["data"], run)

    def step(state: train_gpt.Training, first: int, end: int) -> None:
        for number in range(first, end):
            state.schedule.observe(number, float(number))
            state.note_activity(state.schedule.at(number, float(number)))

    runs = [setting(avg_mode="swa", swa_start_frac=0.7, swa_every=1)[3] for _ in range(3)]
    whole, before, after = map(state_of, runs)
    step(whole, 0, 5)
    step(before, 0, 3)
    before.last_logged_share, saved = 30, []
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda _, state: saved.append(state))
    before.save(1.5)
    after.restore(saved[0])
    of_whole, of_before, of_after = (run.ledger for run in runs)
    assert (of_after.occasions, of_after.activity) == (of_before.occasions, of_before.activity)
    assert (after.last_logged_share, of_after.training_clock.elapsed()) == (30, 1.5)
    step(after, 3, 5)
    assert (of_after.occasions, of_after.activity) == (of_whole.occasions, of_whole.activity)
    assert of_after.occasions["swa"] == 5 and of_after.activity["swa"] == 2


def forward_with_room_for(rows: int, seen: list[int]):
    """A forward that has no memory for more rows than that; notes the rows it is asked for."""

    def forward(model, batch, *rest):
        seen.append(len(batch.input_ids))
        if len(batch.input_ids) > rows:
            raise torch.OutOfMemoryError("no room")
        return training_nats(model, batch, *rest)

    return forward


def test_rows_a_forward_are_halved_until_they_fit(setting, capsys) -> None:
    cfg, model, rows, run = setting(train_batch_tokens=16 * 24)
    run.micro_batch_rows, seen = 20, []
    train_gpt.fit_micro_batch(forward_with_room_for(5, seen), model, rows, MOMENT, run)
    assert (seen, run.micro_batch_rows) == ([20, 10, 5], 5)
    assert capsys.readouterr().out == (
        "out of memory: trying 10 rows a forward\nout of memory: trying 5 rows a forward\n"
    )
    assert all(p.grad is None for p in model.parameters())


def test_a_forward_leaves_room_for_what_training_keeps(setting, monkeypatch) -> None:
    """Gradients' stacks, the optimizers' states and an average are there during the trial."""
    _, model, rows, run = setting()
    sizes, alike = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda p: (sizes.append(p.numel()), alike(p))[1])
    train_gpt.fit_micro_batch(
        lambda *given: (sizes.append(0), training_nats(*given))[1], model, rows, MOMENT, run
    )
    assert sum(sizes[: sizes.index(0)]) == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("asked", "tried"), [(4, [4]), (0, [6, 6, 3, 1])])
def test_what_cannot_fit_is_an_error(setting, asked: int, tried: list[int]) -> None:
    """What MICRO_BATCH_SEQS asks for is not changed; a step has 6 rows, so none tries more."""
    cfg, model, rows, run = setting(micro_batch_seqs=asked)
    run.micro_batch_rows, seen = asked or 12, []
    with pytest.raises(torch.OutOfMemoryError, match=f"^{asked or 1} rows a forward are too many"):
        train_gpt.fit_micro_batch(forward_with_room_for(0, seen), model, rows, MOMENT, run)
    assert seen == tried


def test_one_rank_without_room_lowers_the_rows_of_all(setting) -> None:
    """Another rank, which largest() speaks for, has no room until 3 rows are left."""
    _, model, rows, run = setting()
    run.micro_batch_rows, seen = 6, []
    run.ranks.largest = lambda failed: max(failed, float(run.micro_batch_rows > 3))
    train_gpt.fit_micro_batch(forward_with_room_for(99, seen), model, rows, MOMENT, run)
    assert (seen, run.micro_batch_rows) == ([6, 3], 3)
