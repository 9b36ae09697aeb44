"""Two step-driven runs of one seed are equal to the bit, with one CPU thread and with two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinyData
from jobs import BARE_ENVIRONMENT, TRAINER, events, tiny_job


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_of_one_seed_are_equal_to_the_bit(threads: int, tiny_data: TinyData,
                                               tmp_path: Path) -> None:
    curves, artifacts = [], []
    for n in range(2):
        # Wide enough that two threads share the products.
        job = tiny_job(tiny_data, tmp_path, f"run{n}", ITERATIONS="6", MODEL_DIM="128",
                       TRAIN_BATCH_TOKENS="1024", MICRO_BATCH_SEQS="8", EVAL_STRIDE="0")
        env = {**BARE_ENVIRONMENT, **job, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, str(TRAINER)], env=env, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert f"name:{threads} threads" in done.stdout
        folder = tmp_path / f"run{n}"
        curves.append([event["train_loss"] for event in events(folder, "step")])
        artifacts.append((folder / "artifact.bin").read_bytes())
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]
    assert artifacts[0] == artifacts[1]
