"""Runs of train_gpt.py that take seconds, in a process of their own or in this one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from conftest import ROOT, TinyData

TRAINER = ROOT / "train_gpt.py"
# Nothing of the developer's own settings reaches a job, and every job computes on one CPU thread.
BARE_ENVIRONMENT = {
    name: os.environ[name]
    for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR")
    if name in os.environ
} | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# The beginning of a script that may open no connection, server or look-up: an audit hook refuses
# every one, and nothing can take it away.
NO_NETWORK = """
import sys
def hook(event, arguments):
    if event.startswith("socket."):
        raise RuntimeError("network: " + event)
sys.addaudithook(hook)
import socket
try:
    socket.socket()
    raise SystemExit("sockets are not blocked")
except RuntimeError:
    pass
"""

# A model of 45,000 parameters with every technique on. Three rows a step are uneven for two
# processes and leave one of four without a row.
TINY = {
    "PRESET": "mini",
    "NUM_LAYERS": "3",
    "XSA_LAST_N": "3",
    "VE_LAYERS": "1,2",
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "VE_DIM": "16",
    "BIGRAM_DIM": "16",
    "BIGRAM_VOCAB_SIZE": "64",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "192",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "32",
    "MAX_WALLCLOCK_SECONDS": "0",
    "ITERATIONS": "20",
    "WARMDOWN_FRAC": "0.5",
    "LATE_QAT_THRESHOLD": "0.35",
    "MUON_MOMENTUM_WARMUP_STEPS": "10",
    "GPTQ_CALIB_BATCHES": "2",
    "INT8_KEEP_FLOAT_MAX_NUMEL": "512",
    "TRAIN_LOG_EVERY": "1",
}


def launch(
    *arguments: str, cwd: Path | None = None, processes: int = 0, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run train_gpt.py with plain python, or under torchrun with that many processes."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    command = [sys.executable, *(torchrun if processes else ()), str(TRAINER), *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**BARE_ENVIRONMENT, **settings},
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
    )


def rank_of_job(rank: int, settings: dict[str, str], out: Path) -> None:
    """What one forked process of run_ranks does."""
    os.environ.clear()
    os.environ.update(settings, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(out, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    import train_gpt

    code = train_gpt.main([])
    sys.stdout.flush()
    os._exit(code)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "train_gpt", "jobs"])


def start_ranks(processes: int, out: Path, **settings: str) -> list:
    """Start a job on that many gloo processes, forked from one that has imported torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {
        **BARE_ENVIRONMENT,
        **settings,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    started = [
        FORKS.Process(target=rank_of_job, args=(rank, job, out.with_suffix(f".{rank}")))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def run_ranks(processes: int, out: Path, **settings: str) -> None:
    """Run a job on gloo processes to its end, which must be a good one."""
    started = start_ranks(processes, out, **settings)
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0] * processes, out.with_suffix(
        ".0"
    ).read_text()


@contextlib.contextmanager
def environment(**settings: str) -> Iterator[None]:
    """In this process, an environment of these settings and nothing of the developer's."""
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ, {**BARE_ENVIRONMENT, **settings}, clear=True):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def tiny_job(data: TinyData, runs_dir: Path, run_id: str, **settings: str) -> dict[str, str]:
    """The settings of a tiny run on the tiny data."""
    return {**TINY, **data.env, "RUNS_DIR": str(runs_dir), "RUN_ID": run_id, **settings}


def events(folder: Path, kind: str) -> list[dict]:
    """What a run's metrics.jsonl says of one kind of event, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of each file, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def write_tokens(
    path: Path,
    tokens: Iterable[int],
    count: int | None = None,
    magic: int = 20240520,
    version: int = 1,
) -> Path:
    """Write a shard by the book: 256 int32, of which three are used, then uint16 tokens."""
    ids = np.fromiter(tokens, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path
