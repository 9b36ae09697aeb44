"""Kill ranks of runs under torchrun --max-restarts, and compare what they end with.

    python tests/kill_runs.py [COUNT]      ten kills by default, about half a minute each

One run is left alone. Each of the others loses a rank to SIGKILL at a moment drawn with a fixed
seed; torchrun starts it again, it goes on from its last checkpoint, and its artifact must have the
same sha256. Prints a line a kill and the counts; exits 1 if one differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import make_tiny_data
from jobs import BARE_ENVIRONMENT, TRAINER, events, tiny_job

PROCESSES, SEED = 2, 20
STEPS = 40
LONG = {
    "ITERATIONS": str(STEPS),
    "TRAIN_BATCH_TOKENS": "768",
    "MICRO_BATCH_SEQS": "2",
    "CHECKPOINT_SECONDS": "0.5",
    "RESUME": "1",
}
# Phase, and what tells that it has begun: a line of the log, or a file.
MOMENTS = {
    "priming": "seed:1337",
    "training": "step:{step}/",
    "checkpointing": ".checkpoint_*.partial",
    "calibration": f"checkpoint step:{STEPS} ",
    "quantization": "gptq:calibrated",
    "export": "gptq:quantized",
    "scoring": "Total submission size",
}


def started(out: Path, settings: dict[str, str]) -> subprocess.Popen:
    """A run under torchrun that may be restarted three times."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--max-restarts=3",
        f"--nproc_per_node={PROCESSES}",
        "--monitor-interval=0.1",
        str(TRAINER),
    ]
    with open(out, "w") as log:
        return subprocess.Popen(
            command,
            env={**BARE_ENVIRONMENT, **settings},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


def ranks_of(agent: subprocess.Popen) -> dict[int, int]:
    """Process numbers of a torchrun's workers by rank (Linux)."""
    found = {}
    for line in subprocess.run(
        ["pgrep", "-P", str(agent.pid)], text=True, capture_output=True
    ).stdout.split():
        try:
            variables = Path(f"/proc/{line}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(line)
    return found


def wait_for(folder: Path, mark: str, agent: subprocess.Popen) -> None:
    """Until the log says `mark` or, if it is a pattern of files, one is there."""
    while agent.poll() is None:
        if mark.startswith("."):
            if list(folder.glob(mark)):
                return
        elif (folder / "log.txt").is_file() and mark in (folder / "log.txt").read_text():
            return
        time.sleep(0.002)


def artifact_of(folder: Path) -> str:
    """sha256 of the artifact a run ended with, as it logged it."""
    return events(folder, "artifact")[-1]["sha256"]


def main(count: int) -> int:
    rng, wrong = random.Random(SEED), 0
    with tempfile.TemporaryDirectory() as place:
        data = make_tiny_data(Path(place, "data"))
        whole = tiny_job(data, Path(place), "whole", **LONG)
        assert started(Path(place, "whole.out"), whole).wait() == 0
        expected = artifact_of(Path(place, "whole"))
        print(f"undisturbed: {expected[:16]}", flush=True)
        for kill in range(count):
            # Every phase once, then any; the rank is drawn too.
            phase = list(MOMENTS)[kill] if kill < len(MOMENTS) else rng.choice(list(MOMENTS))
            rank, step = rng.randrange(PROCESSES), rng.randrange(2, STEPS - 1)
            folder, out = Path(place, f"kill-{kill}"), Path(place, f"kill-{kill}.out")
            agent = started(out, tiny_job(data, Path(place), folder.name, **LONG))
            wait_for(folder, MOMENTS[phase].format(step=step), agent)
            time.sleep(rng.uniform(0, 0.05))
            victim = ranks_of(agent).get(rank)
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
            code = agent.wait(300)
            text = (folder / "log.txt").read_text() if (folder / "log.txt").is_file() else ""
            same = code == 0 and artifact_of(folder) == expected
            wrong += not same or victim is None
            print(
                json.dumps(
                    {
                        "kill": kill,
                        "phase": phase,
                        "rank": rank,
                        "step": step,
                        "killed": victim is not None,
                        "exit": code,
                        "resumed": text.count("resumed from step:"),
                        "same": same,
                    }
                ),
                flush=True,
            )
            if not same:
                print(out.read_text()[-3000:], file=sys.stderr)
    print(f"{count} kills, {count - wrong} ended with the artifact of the undisturbed run")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
