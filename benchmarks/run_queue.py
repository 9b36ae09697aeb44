"""Run a list of training jobs one at a time; run it again, and it goes on where it stopped.

    python benchmarks/run_queue.py JOBS.txt RUNS_FOLDER [--at-once 2] [--dry]

A line of JOBS.txt is a name and settings, as in `best_seed1 PRESET=mini SEED=1 MLP_MULT=4`; what
follows a # is left out, quotation marks are a shell's. A job's run is RUNS_FOLDER/<name>, its
console output RUNS_FOLDER/<name>.out. A run whose metrics hold the final score is finished and
never run again, though it be over its byte limit, which is said; one that was cut off is moved to
RUNS_FOLDER/unfinished/ and begun anew, since a resumed run cannot stand in a record. --at-once
gives each of several jobs its share of the cores; only step-driven jobs may run so, since jobs
beside each other slow each other down.

Every job is looked at before the first one starts. Exit 0: all finished; 1: some failed; 2: the
list is wrong.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from train_gpt import (  # noqa: E402
    ALIASES,
    RETIRED,
    Config,
    Refusal,
    handle_end_signals,
    sha256_of,
)

OURS = {field.name.upper() for field in fields(Config)} | {*ALIASES, *RETIRED}
NOT_COMPARED = {"run_id", "runs_dir"}


@dataclass(frozen=True)
class Job:
    """One run to make: its name and what is set for it."""

    name: str
    settings: dict[str, str]
    config: Config

    def folder(self, runs: Path) -> Path:
        return runs / self.name

    def finished(self, runs: Path) -> bool:
        """Whether the run is there and has its final score; Refusal if it is another run."""
        metrics = self.folder(runs) / "metrics.jsonl"
        if not metrics.exists() or '"event": "final"' not in metrics.read_text():
            return False
        found = json.loads((self.folder(runs) / "settings.json").read_text())
        wanted = json.loads(json.dumps(asdict(self.config)))
        other = sorted(
            name for name in wanted.keys() - NOT_COMPARED if found.get(name) != wanted[name]
        )
        if other:
            raise Refusal(
                f"{self.name}: {self.folder(runs)} is a finished run of other settings "
                f"({other[0].upper()}={found.get(other[0])}); give the job a new name"
            )
        return True


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a list; raises Refusal naming the line that is wrong."""
    jobs: list[Job] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            name, *pairs = shlex.split(line, comments=True) or [""]
            if not name:
                continue
            if any("=" not in pair for pair in (*pairs, f"RUN_ID={name}")) or "=" in name:
                raise Refusal("expected a name and NAME=value pairs")
            if name in [job.name for job in jobs]:
                raise Refusal(f"a second job is called {name}")
            settings = dict(pair.split("=", 1) for pair in pairs)
            if taken := settings.keys() & {"RUN_ID", "RUNS_DIR", "RESUME"}:
                raise Refusal(f"{min(taken)} is the queue's to set")
            config = Config.from_env({**settings, "RUN_ID": name})[0]
            if unknown := settings.keys() - OURS:
                raise Refusal(f"{min(unknown)} is not a setting")
        except ValueError as refusal:  # a quotation without an end, or a Refusal
            raise Refusal(f"{path}, line {number}: {refusal}") from None
        jobs.append(Job(name, settings, config))
    if not jobs:
        raise Refusal(f"{path} holds no job")
    return jobs


class Queue:
    """Runs jobs and ends the running ones when it is told to stop."""

    def __init__(self, runs: Path, at_once: int) -> None:
        self.runs, self.stopping = runs, threading.Event()
        self.threads = max(1, (os.cpu_count() or 1) // at_once)
        self.running: dict[str, subprocess.Popen] = {}

    def set_aside(self, job: Job) -> None:
        """Move what an unfinished run left to the first free name under unfinished/."""
        if not job.folder(self.runs).exists():
            return
        place = self.runs / "unfinished"
        place.mkdir(exist_ok=True)
        number = next(n for n in range(1, 10**6) if not (place / f"{job.name}.{n}").exists())
        job.folder(self.runs).rename(place / f"{job.name}.{number}")

    def run(self, job: Job) -> bool:
        """Make one run; returns whether it ended well."""
        if self.stopping.is_set():
            return False
        self.set_aside(job)
        foreign = {name: value for name, value in os.environ.items() if name not in OURS}
        env = {
            "OMP_NUM_THREADS": str(self.threads),
            **foreign,
            "PRESET": "",
            **job.settings,
            "RUNS_DIR": str(self.runs),
            "RUN_ID": job.name,
        }
        with open(self.runs / f"{job.name}.out", "w") as out:
            process = subprocess.Popen(
                ["./run.sh"], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
            self.running[job.name] = process
            if self.stopping.is_set():  # asked between the first look and the start
                process.terminate()
            code = process.wait()
        del self.running[job.name]
        if code and not self.stopping.is_set():
            said = (self.runs / f"{job.name}.out").read_text().splitlines()
            tqdm.write(f"{job.name}: exit {code}: {said[-1] if said else 'nothing was said'}")
        return not code

    def stop(self, number: int, frame: object) -> None:
        """End the running jobs; their runs are begun anew next time."""
        self.stopping.set()
        for process in list(self.running.values()):
            process.terminate()


def score_of(folder: Path) -> str:
    """The headline of a finished run, for the progress line."""
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    return f"{last['val_bpb']:.5f} bpb" if "val_bpb" in last else "done"


def bytes_over(folder: Path) -> int:
    """By how much a finished run's code and artifact are over ARTIFACT_LIMIT_BYTES."""
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return -next(event["left"] for event in events if event["event"] == "artifact")


def work(jobs: list[Job], runs: Path, at_once: int) -> int:
    """Run what is not finished; returns the exit code."""
    left = [job for job in jobs if not job.finished(runs)]
    for job in jobs:
        if job not in left and (over := bytes_over(job.folder(runs))) > 0:
            tqdm.write(f"{job.name}: finished, {over:,} bytes over its limit")
    sources = {sha256_of(job.folder(runs) / "train_gpt.py") for job in jobs if job not in left}
    if sources - {sha256_of(ROOT / "train_gpt.py")}:
        tqdm.write("warning: some finished runs are of another train_gpt.py than this one")
    queue, failed = Queue(runs, at_once), []
    before = handle_end_signals(queue.stop)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="job", smoothing=0)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool, bar:
        made = {pool.submit(queue.run, job): job for job in left}
        for future in concurrent.futures.as_completed(made):
            job = made[future]
            if queue.stopping.is_set():
                continue
            if future.result():
                tqdm.write(f"{job.name}: {score_of(job.folder(runs))}")
            else:
                failed.append(job.name)
            bar.update()
    for number, handler in before.items():
        signal.signal(number, handler)
    if queue.stopping.is_set():
        tqdm.write("stopped; the same command goes on from here")
        return 1
    if failed:
        tqdm.write(f"failed: {', '.join(failed)}; see their .out files")
    return int(bool(failed))


def main(arguments: list[str]) -> int:
    """Read the list, check it, and run it; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="only say what is left to do")
    given = parser.parse_args(arguments)
    try:
        jobs, runs = read_jobs(given.jobs), given.runs.resolve()
        timed = [job.name for job in jobs if not job.config.step_driven]
        if given.at_once < 1:
            raise Refusal(f"--at-once {given.at_once}: expected 1 or more")
        if given.at_once > 1 and timed:
            raise Refusal(f"{timed[0]} is driven by the clock: such jobs run one at a time")
        if given.dry:
            left = [job.name for job in jobs if not job.finished(runs)]
            print(f"{len(left)} of {len(jobs)} jobs are left: {' '.join(left) or 'none'}")
            return 0
        runs.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(open(runs / ".queue", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refusal(f"another queue is at work in {runs}") from None
            return work(jobs, runs, given.at_once)
    except (Refusal, OSError) as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
