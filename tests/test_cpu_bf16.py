"""CPU_BF16: a CPU trains with products in bfloat16 where it is asked to, or where they pay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB_SIZE, TinyData
from jobs import BARE_ENVIRONMENT, TRAINER, events, tiny_job
from test_model import SIZES, random_ids, random_model

import train_gpt
from train_gpt import (
    Batch,
    Config,
    Linear,
    Moment,
    Refusal,
    Run,
    TrainingRows,
    has_bf16_products,
    multiply_in_bf16,
    pick_products,
    training_nats,
)

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not has_bf16_products(), reason="a processor without bf16 products")


def losses_and_artifact(
    tiny_data: TinyData, tmp_path: Path, name: str, **changes: str
) -> tuple[list[float], bytes]:
    """What a run of 40 steps logs and leaves."""
    job = tiny_job(tiny_data, tmp_path, name, ITERATIONS="40", EVAL_STRIDE="0", **changes)
    env = {**BARE_ENVIRONMENT, **job, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(TRAINER)], env=env, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    chosen = [event["kept"] for event in events(tmp_path / name, "products")]
    assert chosen == (["yes"] if changes.get("CPU_BF16") == "1" else [])
    losses = [event["train_loss"] for event in events(tmp_path / name, "step")]
    return losses, (tmp_path / name / "artifact.bin").read_bytes()


@needs_bf16
def test_a_run_in_bf16_trains_as_one_in_float32_and_repeats(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    """Its artifact is scored in float32: --eval gives the run's own score, without the setting."""
    plain, _ = losses_and_artifact(tiny_data, tmp_path, "plain")
    first, artifact = losses_and_artifact(tiny_data, tmp_path, "first", CPU_BF16="1")
    again = losses_and_artifact(tiny_data, tmp_path, "again", CPU_BF16="1")
    assert again == (first, artifact)
    assert first != plain
    assert first[-1] < first[0] - 0.3
    assert first == pytest.approx(plain, rel=0.02)
    score = events(tmp_path / "first", "eval")[-1]
    done = subprocess.run(
        [sys.executable, str(TRAINER), "--eval", str(tmp_path / "first" / "artifact.bin")],
        env={
            **BARE_ENVIRONMENT,
            "DATA_PATH": str(tiny_data.data_path),
            "TOKENIZER_PATH": str(tiny_data.tokenizer_path),
            "EVAL_STRIDE": "0",
            "OMP_NUM_THREADS": "1",
        },
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"{score['val_bpb']:.8f}" in done.stdout


def test_gradients_in_bf16_are_near_those_in_float32_and_scoring_is_untouched() -> None:
    cfg = Config(**SIZES)
    model = random_model(cfg, dtype=torch.float32)
    run = Run(cfg, 0, 1, CPU)
    ids = random_ids(cfg, 2, 17)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    found = {}
    for in_bf16 in (False, True):
        multiply_in_bf16(model, in_bf16, run)
        model.zero_grad()
        training_nats(model, batch)[0].mean().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        with torch.no_grad():
            scored = training_nats(model, batch)[0]
        found[in_bf16] = torch.cat(gradients), scored
    assert run.product_dtype == torch.bfloat16
    assert torch.equal(found[True][1], found[False][1])
    (plain, _), (rounded, _) = found[False], found[True]
    assert not torch.equal(plain, rounded)
    assert (plain - rounded).norm() < 0.03 * plain.norm()


@pytest.mark.parametrize(
    ("wanted", "clock", "able", "speed", "kept"),
    [
        ("auto", 60.0, True, 2.0, True),
        ("auto", 60.0, True, 1.02, False),
        ("auto", 60.0, False, 2.0, False),
        ("auto", 0.0, True, 2.0, False),
        ("0", 60.0, True, 2.0, False),
        ("1", 60.0, True, 0.5, True),
        ("1", 0.0, True, 0.5, True),
    ],
)
def test_bf16_is_taken_where_it_is_asked_for_or_quicker(
    wanted: str,
    clock: float,
    able: bool,
    speed: float,
    kept: bool,
    tiny_data: TinyData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trial's clock is one that passes say themselves."""
    cfg = Config(
        **SIZES
        | {
            "vocab_size": VOCAB_SIZE,
            "train_seq_len": 16,
            "eval_seq_len": 16,
            "eval_stride": 16,
            "train_batch_tokens": 64,
            "data_path": str(tiny_data.data_path),
            "tokenizer_path": str(tiny_data.tokenizer_path),
            "max_wallclock_seconds": clock,
            "cpu_bf16": wanted,
        }
    )
    run, model, now = Run(cfg, 0, 1, CPU), random_model(cfg, dtype=torch.float32), [0.0]

    def pass_time(*_: object) -> None:
        now[0] += 1.0 / speed if run.product_dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(train_gpt, "backward", pass_time)
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train_gpt, "has_bf16_products", lambda: able)
    moment = Moment(1.0, 0.9, False, False)
    pick_products(training_nats, model, TrainingRows(cfg), moment, run)
    assert (run.product_dtype == torch.bfloat16) == kept
    assert {module.in_bf16 for module in model.modules() if isinstance(module, Linear)} == {kept}


def test_bf16_is_refused_on_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any data are looked at; a GPU multiplies in bf16 anyway."""
    monkeypatch.setattr(train_gpt, "has_bf16_products", lambda: False)
    nowhere = {"data_path": "nowhere"}
    with pytest.raises(Refusal, match="^CPU_BF16=1: this processor"):
        train_gpt.load_inputs(Config(cpu_bf16="1", **nowhere), CPU)
    for wanted, device in (("auto", CPU), ("1", torch.device("cuda"))):
        with pytest.raises(Refusal, match="nowhere"):
            train_gpt.load_inputs(Config(cpu_bf16=wanted, **nowhere), device)
