"""Counted work: against torch's own counter, against sums by hand, and as the budget of a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyData
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import BARE_ENVIRONMENT, TRAINER, environment, events, run_ranks, tiny_job
from test_model import SIZES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import plan
import train_gpt
from train_gpt import GPT, PRESETS, Config, Moment, Refusal, Run, Schedule, TrainingRows

# Torch's counter


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by whole squares of scores, (B, T, H, K), as products that are counted."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.size(-1) ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def product(_: list[int], a: list[int], b: list[int], *rest: object, **named: object) -> int:
    """Operations of H.addmm_(a, b), which torch's counter leaves out."""
    return 2 * a[0] * a[1] * b[1]


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the products inside, those added in place as well."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        yield counter


def masked_half(cfg: Config, model: GPT, seq_len: int) -> int:
    """Operations of a token's attention, forward, that whole squares have beyond causal ones."""
    return len(model.plan) * 2 * seq_len * cfg.model_dim


@pytest.fixture
def setting(tiny_data: TinyData):
    """Makes settings, model, rows and run at tiny size."""

    def make(**changes: object) -> tuple[Config, GPT, TrainingRows, Run]:
        sizes = {
            **SIZES,
            "vocab_size": 320,
            "train_seq_len": 16,
            "train_batch_tokens": 96,
            "data_path": str(tiny_data.data_path),
            "tokenizer_path": str(tiny_data.tokenizer_path),
            "max_wallclock_seconds": 0.0,
            "iterations": 5,
            "eval_seq_len": 16,
            "eval_stride": 4,
            "eval_batch_seqs": 1,
            "int8_keep_float_max_numel": 300,
            "ttt_batch_seqs": 1,
        }
        cfg = Config(**{**sizes, **changes})
        run = Run(cfg, rank=0, world_size=1, device=torch.device("cpu"))
        model = GPT(cfg, plain_attention)
        train_gpt.initialize(model, cfg)
        return cfg, model, TrainingRows(cfg), run

    return make


VARIANTS = [
    {},
    {"vrl_mode": "add"},
    {"vrl_mode": "mix", "mlp_mult": 2.0, "muon_backend_steps": 3},
    {"tie_embeddings": False, "skip_per_dim": "off"},
    {"bigram_vocab_size": 0, "ve_enabled": False, "optimizer_routing": "by_ndim"},
    {"optimizer_routing": "banks", "quant_clip": "std"},
    {"backout_mode": "mid", "xsa_last_n": 0, "mile_gamma": 1.0},
    {"num_loops": 2, "loop_start": 1, "loop_end": 1, "quant_clip": "std"},
    {"num_loops": 1, "loop_start": 0, "loop_end": 1, "skip_gates": True, "vrl_mode": "mix"},
    {"attn_gate": "sparse", "gate_window": 8, "smear_form": "input"},
    {"parallel_start_layer": 1, "muon_ns": "polar", "muon_row_norm": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_step_counts_what_torch_counts(setting, changes: dict) -> None:
    """To the operation; whole squares of attention are twice the causal half that we count."""
    cfg, model, rows, run = setting(**changes)
    groups = train_gpt.route_parameters(cfg, model)
    optimizers = train_gpt.build_optimizers(cfg, groups, run.dtype)
    moment = Moment(1.0, 0.9, qat=False, done=False, mile_gamma=cfg.mile_gamma)
    with counting() as counter:
        train_gpt.train_step(train_gpt.training_nats, model, optimizers, rows, 0, moment, run)
    beyond = 3 * cfg.train_batch_tokens * masked_half(cfg, model, cfg.train_seq_len)
    assert counter.get_total_flops() == train_gpt.step_operations(model) + beyond


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_calibration_counts_what_torch_counts(setting, changes: dict) -> None:
    cfg, model, rows, run = setting(**changes)
    model.requires_grad_(False)  # torch's counter follows modules by their gradients
    batches, size = 3, train_gpt.CALIBRATION_ROWS
    with counting() as counter:
        train_gpt.collect_hessians(
            model, lambda n: rows.batch(size * n, size).input_ids, batches, torch.inf, run
        )
    tokens = run.ledger.calibration_tokens
    assert tokens == batches * size * cfg.train_seq_len
    beyond = tokens * masked_half(cfg, model, cfg.train_seq_len)
    assert counter.get_total_flops() == train_gpt.calibration_operations(model, tokens) + beyond


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eval_stride": 0},
        {"eval_stride": 6},
        {"eval_stride": 16},
        {"ttt_mode": "score_first", "ttt_chunk_tokens": 100, "ttt_epochs": 2},
        {"counts": "scored"},
    ],
    ids=str,
)
def test_scoring_counts_what_torch_counts(setting, changes: dict) -> None:
    cfg, model, _, run = setting(**changes)
    whole = train_gpt.load_validation(cfg)
    kept = 200
    val = train_gpt.replace(
        whole, tokens=whole.tokens[:kept], target_bytes=whole.target_bytes[: kept - 1]
    )
    mixture = learner = None
    if cfg.counts != "off":
        mixture = train_gpt.Mixture(cfg, np.empty(0, np.uint16), val.tokens, cfg.vocab_size)
        mixture.score = lambda network: network[:, 0]  # mixing is no product that is counted
    if cfg.ttt_mode != "off":
        learner = train_gpt.Adapter(train_gpt.training_nats, model, val, run)
    with counting() as counter:
        result = train_gpt.evaluate(
            "tiny",
            train_gpt.training_nats,
            model,
            val,
            run,
            stride=cfg.eval_stride,
            mixture=mixture,
            learner=learner,
        )
    assert result.targets == kept - 1
    T = cfg.eval_seq_len
    spans = train_gpt.windows(kept - 1, T, cfg.eval_stride)
    shown = T * len(train_gpt.strips_of(spans, cfg.eval_stride or T))
    if learner is not None:
        passed = T * cfg.ttt_epochs * -(-100 // T)  # the last chunk teaches nobody
        assert learner.operations == 3 * passed * (
            train_gpt.hidden_operations(model, T) + train_gpt.head_operations(model)
        )
        shown += 3 * passed
    beyond = shown * masked_half(cfg, model, T)
    assert counter.get_total_flops() == result.operations + beyond


class Products(TorchDispatchMode):
    """Counts the products inside as torch's counter does, which cannot follow frozen modules."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, out_val=made)
        return made


@pytest.mark.parametrize("places", ["q,k,v,o,mlp,head", "q,v"])
def test_adaptation_by_document_counts_what_torch_counts(setting, places: str) -> None:
    """Nearly: behind the first layer's inputs nothing learns, so they need no gradient."""
    cfg, model, _, run = setting(
        ttt_mode="lora",
        lora_rank=4,
        lora_places=places,
        lora_chunk_tokens=8,
        lora_batch_docs=2,
        num_layers=6,
    )
    val = train_gpt.load_validation(cfg)
    lengths = np.array([[0, 30], [0, 33]])
    scorer = train_gpt.DocumentScorer(train_gpt.training_nats, model, val, run, None)
    with train_gpt.frozen_weights(model, cfg.eval_seq_len), Products() as counter:
        scorer.score(lengths, 0)
    learned, scored = run.ledger.activity["ttt"], 9  # chunks of one or two documents
    assert learned == 4
    squares = 3 * learned * 2 + scored - 2 * learned  # rows of squares, back and forth
    beyond = squares * 16 * masked_half(cfg, model, 16)
    assert counter.operations == pytest.approx(scorer.operations + beyond, rel=0.1)


SYSTEMS = [name for name in PRESETS if name.startswith("pr")]


@pytest.mark.parametrize("preset", ["", "mini", "cpu", *SYSTEMS])
def test_presets_count_what_torch_counts_on_fake_tensors(preset: str) -> None:
    """At full size; the squares of a flash kernel, with one repeated, are seven for our three."""
    cfg = Config.from_env({"PRESET": preset})[0]
    model, traced = plan.traced_step(cfg)
    a_token = traced["products"] + traced["attention"]
    muon = train_gpt.muon_operations(model)
    assert train_gpt.step_operations(model) == cfg.train_batch_tokens * a_token + muon


@given(
    rows=st.integers(1, 40), cols=st.integers(1, 40), steps=st.integers(1, 6), count=st.integers(1)
)
@settings(deadline=None, max_examples=20)
def test_an_orthogonalisation_counts_what_torch_counts(
    rows: int, cols: int, steps: int, count: int
) -> None:
    matrices = torch.randn(count % 3 + 1, rows, cols)
    with counting() as counter:
        train_gpt.orthogonalize(matrices, steps)
    one = train_gpt.orthogonalization_operations(rows, cols, steps)
    assert counter.get_total_flops() == len(matrices) * one


# Sums by hand


def test_a_step_is_the_naive_sum() -> None:
    D, kv, hidden, V, T, tokens, layers = 32, 16, 96, 320, 64, 192, 3
    sizes = {
        "num_layers": layers,
        "model_dim": D,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": V,
        "train_seq_len": T,
        "train_batch_tokens": tokens,
        "bigram_dim": 20,
        "ve_dim": 24,
        "ve_layers": "1",
        "xsa_last_n": 2,
        "rope_dims": 4,
    }
    matrices = [(20, D), (24, kv)]
    for _ in range(layers):
        matrices += [(D, D), (kv, D), (kv, D), (D, D), (hidden, D), (D, hidden)]
    total = 0
    for _ in range(tokens):
        for rows, cols in [*matrices, (V, D)]:
            total += 6 * rows * cols
    for _ in range(tokens // T):
        for _ in range(layers):
            total += 3 * (2 * T * T * D + 2 * T * T * D) // 2
    for rows, cols in matrices:
        short, long = min(rows, cols), max(rows, cols)
        for _ in range(5):
            total += 2 * short * long * short + 2 * short**3 + 2 * short * short * long
    cfg = Config(**sizes, max_wallclock_seconds=0.0)
    assert train_gpt.step_operations(train_gpt.unallocated_model(cfg)) == total


# The schedule's clock


def counted(**changes: object) -> Config:
    """A run by operations."""
    return Config(
        **{
            "max_wallclock_seconds": 0.0,
            "max_train_tflops": 1.0,
            "warmdown_iters": 40,
            **changes,
        }
    )


@given(
    step=st.integers(1_000_000_000, 300_000_000_000),
    reserve=st.integers(0, 300_000_000_000),
    iterations=st.integers(1, 300),
    warmdown=st.sampled_from([{"warmdown_iters": 40}, {"warmdown_frac": 0.3}]),
)
@settings(deadline=None, max_examples=60)
def test_a_run_by_operations_is_one_of_as_many_steps(
    step: int, reserve: int, iterations: int, warmdown: dict
) -> None:
    """It ends with the last step that fits, and its rates are those of a run of that budget."""
    cfg = counted(iterations=iterations, **warmdown)
    schedule, spent, moments = Schedule(cfg, reserve, 0, step), 0, []
    while True:
        schedule.observe(len(moments), spent)
        moment = schedule.at(len(moments), spent)
        if moment.done:
            break
        assert 0 <= schedule.progress(len(moments), spent) <= 1
        moments.append(moment)
        spent += step
    fitting = (10**12 - reserve) // step
    assert len(moments) == min(fitting, iterations)
    whole = min((10**12 - reserve) / step, iterations)  # steps, of which the last may be a part
    decays = min(warmdown.get("warmdown_iters", 0.3 * whole), whole)
    for number, moment in enumerate(moments):
        assert moment.lr_scale == pytest.approx(min(1.0, (whole - number) / decays), rel=1e-9)


def test_one_budget_is_taken_and_two_are_refused() -> None:
    def budgets(**env: str) -> tuple[float, float]:
        cfg = Config.from_env(env)[0]
        return cfg.max_wallclock_seconds, cfg.max_train_tflops

    assert budgets() == (600.0, 0.0)
    assert budgets(MAX_TRAIN_TFLOPS="2") == (0.0, 2.0)
    assert budgets(MAX_TRAIN_TFLOPS="2", PRESET="mini") == (0.0, 2.0)
    assert budgets(MAX_TRAIN_TFLOPS="0", PRESET="mini") == (300.0, 0.0)
    assert budgets(MAX_TRAIN_TFLOPS="2", MAX_WALLCLOCK_SECONDS="0") == (0.0, 2.0)
    with pytest.raises(Refusal, match="MAX_WALLCLOCK_SECONDS=9.0 and MAX_TRAIN_TFLOPS=2.0 to 0"):
        budgets(MAX_TRAIN_TFLOPS="2", MAX_WALLCLOCK_SECONDS="9")


@pytest.mark.parametrize("step", [0, 1])
def test_a_budget_without_room_for_a_step_is_refused(setting, step: int) -> None:
    cfg, model, *_ = setting()
    calibration = train_gpt.calibration_operations(model, train_gpt.calibration_tokens(cfg))
    assert calibration > 0
    least = (calibration + train_gpt.step_operations(model)) / 1e12
    train_gpt.refuse_small_budget(train_gpt.replace(cfg, max_train_tflops=least))
    with pytest.raises(Refusal, match="does not suffice for a step of"):
        train_gpt.refuse_small_budget(train_gpt.replace(cfg, max_train_tflops=0.999 * least))


# Whole runs

BUDGET = 0.008
WIDE = {"EVAL_STRIDE": "0", "ITERATIONS": "1000", "MODEL_DIM": "64", "MICRO_BATCH_SEQS": "1"}


def counted_job(data: TinyData, runs_dir: Path, run_id: str, **changed: str) -> dict[str, str]:
    """A tiny run by operations."""
    job = tiny_job(data, runs_dir, run_id, **WIDE, MAX_TRAIN_TFLOPS=str(BUDGET), **changed)
    del job["MAX_WALLCLOCK_SECONDS"]
    return job


def run_alone(job: dict[str, str], **environment: str) -> Path:
    """Run a job in a process of its own; its folder."""
    env = {**BARE_ENVIRONMENT, **job, **environment}
    done = subprocess.run([sys.executable, str(TRAINER)], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return Path(job["RUNS_DIR"], job["RUN_ID"])


def final_bpb(folder: Path) -> float:
    """The headline score of a run."""
    return events(folder, "final")[0]["val_bpb"]


@pytest.fixture(scope="module")
def whole(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by operations with one thread."""
    return run_alone(counted_job(tiny_data, tmp_path_factory.mktemp("runs"), "whole"))


def test_a_run_by_operations_spends_them_and_says_so(whole: Path) -> None:
    log = (whole / "log.txt").read_text()
    assert "repeats:to the bit on this machine" in log
    assert "stopping: MAX_TRAIN_TFLOPS holds no further step" in log
    (work,) = events(whole, "work")
    steps = events(whole, "step")
    cost = steps[0]["tflops"]
    assert [step["tflops"] for step in steps] == pytest.approx(
        [cost * (number + 1) for number in range(len(steps))]
    )
    assert 10 < len(steps) < 1000
    assert BUDGET - cost < work["tflops"] <= BUDGET
    assert work["tflops"] - steps[-1]["tflops"] > 0  # calibration
    assert work["eval_tflops"] > 0
    assert work["table_seconds"] == 0
    scales = [step["lr_scale"] for step in steps]
    assert scales == sorted(scales, reverse=True)
    assert scales[0] == 1.0
    # The last half decays, and what is left at the end is less than a step beside the last one.
    decaying = 0.5 * (BUDGET - (work["tflops"] - steps[-1]["tflops"]))
    assert scales[-1] < 2 * cost / decaying
    # What is left takes as long a TFLOP as what was done; the last step leaves calibration.
    halfway = steps[len(steps) // 2]
    left = BUDGET - halfway["tflops"]
    assert halfway["eta"] == pytest.approx(halfway["ms"] / 1e3 * left / halfway["tflops"], rel=0.2)


def test_two_runs_of_one_seed_are_equal_to_the_bit(
    whole: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    again = run_alone(counted_job(tiny_data, tmp_path, "again"))
    assert (again / "artifact.bin").read_bytes() == (whole / "artifact.bin").read_bytes()
    assert final_bpb(again) == final_bpb(whole)
    assert events(again, "work")[0] == events(whole, "work")[0]


@pytest.mark.parametrize(
    "environment",
    [{"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}, {"ATEN_CPU_CAPABILITY": "avx2"}],
    ids=["two threads", "avx2"],
)
def test_elsewhere_a_run_takes_the_same_steps_to_nearly_the_same_score(
    environment: dict, whole: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    """Sums in another order differ in their last bits, and training carries that on.

    Measured after these 22 steps: losses and score within 3 parts in 10^7 of each other; of two
    processes within 8. Longer training carries it further.
    """
    other = run_alone(counted_job(tiny_data, tmp_path, "other"), **environment)
    assert events(other, "work")[0] == events(whole, "work")[0]
    ours, theirs = events(whole, "step"), events(other, "step")
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["tflops"] == yours["tflops"]
        assert mine["lr_scale"] == yours["lr_scale"]
        assert mine["train_loss"] == pytest.approx(yours["train_loss"], rel=1e-4)
    assert final_bpb(other) == pytest.approx(final_bpb(whole), rel=1e-4)


def test_a_resumed_run_goes_on_with_its_account(
    whole: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    job = counted_job(tiny_data, tmp_path, "cut", CHECKPOINT_SECONDS="0.01")
    env = {**BARE_ENVIRONMENT, **job}
    with subprocess.Popen(
        [sys.executable, str(TRAINER)], env=env, text=True, stdout=subprocess.PIPE
    ) as process:
        for line in process.stdout:
            if re.match(r"step:9/", line):
                process.send_signal(signal.SIGTERM)
                break
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    run_alone(job, RESUME="1")
    cut = tmp_path / "cut"
    assert len(events(cut, "resumed")) == 1
    assert (cut / "artifact.bin").read_bytes() == (whole / "artifact.bin").read_bytes()
    assert events(cut, "work")[0] == events(whole, "work")[0]
    assert [e["step"] for e in events(cut, "step")] == [e["step"] for e in events(whole, "step")]


def test_two_ranks_take_the_steps_of_one(whole: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    run_ranks(2, tmp_path / "ranks", **counted_job(tiny_data, tmp_path, "two"))
    two = tmp_path / "two"
    ours, theirs = events(whole, "step"), events(two, "step")
    assert [step["tflops"] for step in ours] == [step["tflops"] for step in theirs]
    assert [step["lr_scale"] for step in ours] == [step["lr_scale"] for step in theirs]
    assert events(two, "work")[0] == events(whole, "work")[0]
    assert final_bpb(two) == pytest.approx(final_bpb(whole), rel=1e-4)


def test_counts_say_their_processor_seconds(tiny_data: TinyData, tmp_path: Path) -> None:
    job = tiny_job(tiny_data, tmp_path, "counts", COUNTS="both", ITERATIONS="2")
    with environment(**job):
        assert train_gpt.main([]) == 0
    (work,) = events(tmp_path / "counts", "work")
    assert 0 < work["table_seconds"] < os.times().user


# The plan


def test_the_plan_says_the_steps_of_the_budget_and_the_work_of_scoring(tiny_data: TinyData) -> None:
    env = {"PRESET": "mini", **tiny_data.env, "MAX_TRAIN_TFLOPS": "1"}
    cfg = Config.from_env(env)[0]
    model = train_gpt.unallocated_model(cfg)
    calibration = train_gpt.calibration_operations(model, train_gpt.calibration_tokens(cfg))
    steps = (10**12 - calibration) // train_gpt.step_operations(model)
    with environment(**env):
        said = "\n".join(plan.lines(cfg, 150_000))
    assert f"{steps:,} steps of MAX_TRAIN_TFLOPS=1" in said
    targets = len(train_gpt.load_validation(cfg).tokens) - 1
    spans = train_gpt.windows(targets, cfg.eval_seq_len, cfg.eval_stride)
    scoring = train_gpt.scoring_operations(model, spans, cfg.eval_stride)
    assert f"work of scoring: {scoring / 1e12:.4g} TFLOP" in said
