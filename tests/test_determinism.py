"""Two step-driven runs of one seed are equal to the bit, with one CPU thread and with two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyData
from jobs import BARE_ENVIRONMENT, TRAINER, events, tiny_job

from train_gpt import Config, Run, repeats


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_of_one_seed_are_equal_to_the_bit(
    threads: int, tiny_data: TinyData, tmp_path: Path
) -> None:
    curves, artifacts = [], []
    for n in range(2):
        # Wide enough that two threads share the products.
        job = tiny_job(
            tiny_data,
            tmp_path,
            f"run{n}",
            ITERATIONS="6",
            MODEL_DIM="128",
            TRAIN_BATCH_TOKENS="1024",
            MICRO_BATCH_SEQS="8",
            EVAL_STRIDE="0",
        )
        env = {
            **BARE_ENVIRONMENT,
            **job,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        done = subprocess.run(
            [sys.executable, str(TRAINER)], env=env, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert f"\nrepeats:to the bit on this machine, with {threads} threads " in done.stdout
        folder = tmp_path / f"run{n}"
        curves.append([event["train_loss"] for event in events(folder, "step")])
        artifacts.append((folder / "artifact.bin").read_bytes())
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]
    assert artifacts[0] == artifacts[1]


@pytest.mark.parametrize(
    ("device", "seconds", "said"),
    [
        ("cuda", 0.0, "no, whatever the settings"),
        ("cuda", 600.0, "no, whatever the settings"),
        ("cpu", 600.0, "MAX_WALLCLOCK_SECONDS=0"),
        ("cpu", 0.0, "to the bit"),
    ],
)
def test_the_log_says_what_equality_takes(device: str, seconds: float, said: str) -> None:
    run = Run(Config(max_wallclock_seconds=seconds), 0, 1, torch.device(device))
    assert said in repeats(run)
