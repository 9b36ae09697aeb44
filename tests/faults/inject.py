"""Do to tiny runs what happens to people's, and hold the trainer to what it promises then.

    python tests/faults/inject.py [KIND...]      every fault of these kinds, or of all

Seeds are fixed. Prints a line a fault and the counts; exits 1 if a promise was broken. After each
fault: what the user sees (one line, a documented exit code), what is on disk (all that was there
before, nothing partial under its final name), and what RESUME=1 gives (the artifact of an
undisturbed run, to the byte).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import faulthandler
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from conftest import ROOT, make_documents, make_tiny_data
from jobs import BARE_ENVIRONMENT, FORKS, TRAINER, events, snapshot, tiny_job

import train_gpt

# torch._dynamo is what a first optimizer step imports: half a second that no job should repeat.
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "train_gpt", "jobs", "inject"])

STEPS, TIMEOUT = 12, 60.0
SHORT = {"ITERATIONS": str(STEPS), "MICRO_BATCH_SEQS": "2", "CHECKPOINT_SECONDS": "0.02"}
PYTHON = sys.executable
# A phase begins with this line of the log; "{step}" is drawn.
PHASES = {
    "priming": r"^seed:1337",
    "training": r"^step:{step}/",
    "checkpoint": r"^checkpoint step:",
    "calibration": rf"^step:{STEPS}/",
    "quantization": r"^gptq:calibrated",
    "export": r"^gptq:quantized",
    "scoring": r"^Total submission size",
}
FILES = re.compile(
    r"log\.txt|metrics\.jsonl|settings\.json|train_gpt\.py|artifact\.bin|"
    r"checkpoint_\d+\.pt|\..*\.partial"
)


# What is planted in a forked process before its run begins


def at_call(owner: object, name: str, number: int, deed: Callable[[], object]) -> None:
    """Do a deed before the number-th call (from 1) of a function."""
    original, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def planted(*arguments, **named):
        if next(calls) == number:
            deed()
        return original(*arguments, **named)

    setattr(owner, name, planted)


def die_at(name: str, number: int) -> None:
    """SIGKILL at a system call of write_file."""
    at_call(os, name, number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_at(name: str, number: int, code: int) -> None:
    """A system call of write_file fails."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    at_call(os, name, number, fail)


def limit(what: str, size: int) -> None:
    """A limit of the operating system: a file's size or a process's memory, in bytes."""
    if what == "RLIMIT_FSIZE":
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return

    def squeeze() -> None:
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + size, held + size))

    at_call(train_gpt, "prime", 1, squeeze)


def nobody() -> None:
    """Not root any more, to whom no folder is closed, once data and source are read."""

    def drop() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    at_call(train_gpt.RunFolder, "open", 1, drop)


def plant_gradient(step: int, value: float) -> None:
    """Make one entry of a gradient `value` in the step-th training step."""
    original = train_gpt.train_step

    def planted(forward, model, optimizers, rows, number, *rest):
        handle = None
        if number == step and rest[-1].phase == "training":
            matrix = next(p for p in model.parameters() if p.ndim == 2)
            handle = matrix.register_hook(lambda g: g.index_fill(1, torch.tensor([3]), value))
        stats = original(forward, model, optimizers, rows, number, *rest)
        if handle is not None:
            handle.remove()
        return stats

    train_gpt.train_step = planted


def plant_weight(step: int, value: float) -> None:
    """Add `value` to a weight after the step-th training step."""
    original = train_gpt.train_step

    def planted(forward, model, optimizers, rows, number, *rest):
        stats = original(forward, model, optimizers, rows, number, *rest)
        if number == step and rest[-1].phase == "training":
            with torch.no_grad():
                next(p for p in model.parameters() if p.ndim == 2).view(-1)[17] += value
        return stats

    train_gpt.train_step = planted


def shift_clock(name: str, step: int, seconds: float) -> None:
    """From a training step on, a clock of the module time stands otherwise."""
    original, shifted = getattr(time, name), []
    at_call(train_gpt, "train_step", step + 2, lambda: shifted.append(seconds))

    def clock() -> float:
        return original() + sum(shifted)

    setattr(time, name, clock)
    if name == "perf_counter":
        train_gpt.Clock.__init__.__defaults__ = (clock,)  # which holds the function itself


def slow(rank: int, seconds: float) -> None:
    """One rank sleeps in every step."""
    original = train_gpt.train_step

    def planted(*arguments):
        if arguments[-1].ranks.rank == rank:
            time.sleep(seconds)
        return original(*arguments)

    train_gpt.train_step = planted


def pause_before(step: int, seconds: float) -> None:
    """Time for the harness to do something before a training step (priming takes two)."""
    at_call(train_gpt, "train_step", step + 2, lambda: time.sleep(seconds))


def small_memory(rows: int) -> None:
    """A forward of more rows than this has no room."""
    original = train_gpt.training_nats

    def planted(model, batch, *rest, **named):
        if len(batch.input_ids) > rows and model.training and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return original(model, batch, *rest, **named)

    train_gpt.training_nats = planted


def no_locks(code: int) -> None:
    """A file system that has no locks, and says so in this way."""
    import fcntl

    def refuse(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    fcntl.flock = refuse


def few_descriptors(spare: int) -> None:
    """Room for so many more open files than there are."""
    most = len(os.listdir("/proc/self/fd")) + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def cpu_limit(seconds: int) -> None:
    """A limit of processor time, which the kernel announces by SIGXCPU every second."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds, int(used) + 60))


def console(kind: str, step: int) -> None:
    """stdout and stderr go somewhere that goes away before a training step, or was never there."""
    if kind == "nowhere":
        sys.stdout = sys.stderr = None
        os.close(1)
        os.close(2)
        return
    if kind == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.openpty() if kind == "terminal" else os.pipe()
        at_call(train_gpt, "train_step", step + 2, lambda: os.close(reader))
        os.set_blocking(writer, False)  # nobody reads it, and it fills
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.close(writer)


PLANTS = {
    f.__name__: f
    for f in (
        die_at,
        fail_at,
        limit,
        nobody,
        plant_gradient,
        plant_weight,
        shift_clock,
        slow,
        pause_before,
        small_memory,
        no_locks,
        few_descriptors,
        cpu_limit,
        console,
    )
}


def child(rank: int, settings: dict[str, str], out: Path, plants: tuple[tuple, ...]) -> None:
    """A rank in a forked process; its output in out.RANK.out and out.RANK.err."""
    os.environ.clear()
    os.environ.update(settings, RANK=str(rank), LOCAL_RANK=str(rank))
    for stream, kind in ((1, "out"), (2, "err")):
        with open(f"{out}.{rank}.{kind}", "w") as to:
            os.dup2(to.fileno(), stream)
    faulthandler.register(signal.SIGQUIT)  # where a run hangs is told to its stderr
    torch.set_num_threads(1)
    for name, *arguments in plants:
        PLANTS[name](*arguments)
    try:
        code = train_gpt.main([])
    except SystemExit as ended:
        code = ended.code
    with contextlib.suppress(AttributeError, OSError):  # a console that has gone away
        sys.stdout.flush()
    os._exit(code)


# The bench


@dataclass
class Job:
    """A run under way, of one process or several, or one that has ended."""

    processes: list
    out: Path
    folder: Path

    def said(self, rank: int = 0) -> str:
        return Path(f"{self.out}.{rank}.err").read_text()

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text() if path.is_file() else ""

    @property
    def alive(self) -> bool:
        process = self.processes[0]
        return (
            process.poll() is None
            if isinstance(process, subprocess.Popen)
            else process.exitcode is None
        )

    def wait(self) -> list[int]:
        """Exit codes; a hang is an error."""
        codes, end = [], time.monotonic() + TIMEOUT
        for process in self.processes:
            left = max(end - time.monotonic(), 0.1)
            if isinstance(process, subprocess.Popen):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(left)
                codes.append(process.poll())
            else:
                process.join(left)
                codes.append(process.exitcode)
        hung = [
            process for process, code in zip(self.processes, codes, strict=True) if code is None
        ]
        for process in hung:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGQUIT)
            time.sleep(0.2)
            process.kill()
        assert not hung, f"hung for {TIMEOUT:.0f} s: {codes}\n{self.said()}\n{self.log[-600:]}"
        return codes

    def wait_for(self, pattern: str, after: int = 0) -> bool:
        """Until the log has a line beyond `after` characters; False if the run ended before."""
        end = time.monotonic() + TIMEOUT
        while not re.search(pattern, self.log[after:], re.M):
            if not self.alive:
                return False
            if time.monotonic() > end:
                self.wait()
            time.sleep(0.002)
        return True

    def ends(self, code: int, *patterns: str, rank: int = 0, lines: int = 1) -> str:
        """Assert exit code and the one line on stderr that each pattern matches."""
        codes, said = self.wait(), self.said(rank)
        assert codes[rank] == code, (codes, said, self.log[-600:])
        assert said.count("\n") == lines, said
        assert "Traceback" not in said, said
        for pattern in patterns:
            assert re.search(pattern, said, re.M), (pattern, said)
        return said.strip()


@dataclass
class Bench:
    """Tiny data, an undisturbed run of one rank and of two, and what those took and gave."""

    place: Path
    data: object = None
    expected: dict[int | str, str] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    kept: dict[str, bytes | None] = field(default_factory=dict)

    def prepare(self, two: bool = True) -> None:
        self.data = make_tiny_data(self.place / "data")
        for ranks in (1, 2) if two else (1,):
            job = self.start(f"whole{ranks}", ranks=ranks)
            began = {}
            while job.alive:
                for phase, mark in PHASES.items():
                    if phase not in began and re.search(mark.format(step=1), job.log, re.M):
                        began[phase] = time.monotonic()
                time.sleep(0.002)
            assert job.wait() == [0] * ranks, job.said()
            self.expected[ranks] = sha_of(job.folder)
            if ranks == 1:
                began["end"] = time.monotonic()
                times = [began[phase] for phase in (*PHASES, "end")]
                self.offsets = {
                    phase: max(after - before, 0.01)
                    for phase, before, after in zip(PHASES, times, times[1:], strict=False)
                }
        self.kept = self.precious()

    def precious(self) -> dict[str, str]:
        """Hashes of what no run may touch: the data and the runs that have ended."""
        found = {}
        for root in (self.place / "data", self.place / "whole1"):
            for name, content in snapshot(root).items():
                found[f"{root.name}/{name}"] = hashlib.sha256(content or b"").hexdigest()
        return found

    def start(
        self,
        name: str,
        *plants: tuple,
        ranks: int = 1,
        fresh: bool = False,
        out: str = "",
        odd: dict[str, str] | None = None,
        **changed: str,
    ) -> Job:
        """Start a run: forked, or the real command in a new process."""
        settings = tiny_job(self.data, self.place, name, **{**SHORT, **changed})
        where, folder = self.place / (out or f"{name}.first"), Path(settings["RUNS_DIR"], name)
        if fresh:
            with open(f"{where}.0.out", "w") as stdout, open(f"{where}.0.err", "w") as stderr:
                process = subprocess.Popen(
                    [PYTHON, str(TRAINER)],
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env={**BARE_ENVIRONMENT, **settings},
                )
            return Job([process], where, folder)
        job = {
            **BARE_ENVIRONMENT,
            **settings,
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **(odd or {}),
        }
        started = [
            FORKS.Process(target=child, args=(rank, job, where, plants)) for rank in range(ranks)
        ]
        for process in started:
            process.start()
        return Job(started, where, folder)

    def whole(self, folder: Path) -> None:
        """Assert that everything under its final name is complete."""
        if not folder.exists():
            return
        for path in folder.iterdir():
            assert FILES.fullmatch(path.name), path
        for path in folder.glob("checkpoint_*.pt"):
            torch.load(path, weights_only=True)
        if (folder / "artifact.bin").is_file():
            train_gpt.read_artifact(folder / "artifact.bin")
        if (folder / "settings.json").is_file():
            json.loads((folder / "settings.json").read_text())
        if (folder / "train_gpt.py").is_file():
            assert (folder / "train_gpt.py").read_bytes() == TRAINER.read_bytes()

    def is_undisturbed(self, job: Job) -> None:
        """Assert that a run said nothing, logged all of it, and gave the undisturbed artifact."""
        assert job.said() == ""
        assert sha_of(job.folder) == self.expected[1]
        logs = [folder / "metrics.jsonl" for folder in (job.folder, self.place / "whole1")]
        kinds = [[json.loads(line)["event"] for line in log.open()] for log in logs]
        assert kinds[0] == kinds[1]

    def resume(self, name: str, ranks: int = 1, **changed: str) -> Job:
        """Assert that RESUME=1 gives the artifact of the undisturbed run and a tidy folder."""
        self.whole(self.place / name)
        job = self.start(name, ranks=ranks, out=f"{name}.again", **{"RESUME": "1", **changed})
        assert job.wait() == [0] * ranks, job.said()
        assert job.said() == ""
        assert sha_of(job.folder) == self.expected[ranks], "another artifact after RESUME=1"
        left = sorted(path.name for path in job.folder.glob(".*"))
        assert not left, f"left behind: {left}"
        return job

    def finished_copy(self, name: str) -> Path:
        """A run that has ended, to go on with: its artifact must survive."""
        shutil.copytree(self.place / "whole1", self.place / name)
        settings = self.place / name / "settings.json"
        settings.write_text(
            json.dumps({**json.loads(settings.read_text()), "run_id": name}, indent=1)
        )
        return self.place / name

    def own_data(self, name: str) -> dict[str, str]:
        """A copy of the data that a fault may damage: the settings that point there."""
        root, copy = self.place / "data", self.place / f"data-{name}"
        shutil.copytree(root, copy)
        return {
            "DATA_PATH": str(copy / self.data.data_path.relative_to(root)),
            "TOKENIZER_PATH": str(copy / self.data.tokenizer_path.relative_to(root)),
        }


def sha_of(folder: Path) -> str:
    """sha256 of a run's artifact, on disk and as logged."""
    digest = hashlib.sha256((folder / "artifact.bin").read_bytes()).hexdigest()
    assert digest == events(folder, "artifact")[-1]["sha256"]
    return digest


PORTS, PORT_LOCK = iter(range(23_000 + os.getpid() % 4000, 32_000)), threading.Lock()


def free_port() -> int:
    """A port of this machine that no run of this harness was given before."""
    import socket

    with PORT_LOCK:
        for port in PORTS:
            with socket.socket() as test, contextlib.suppress(OSError):
                test.bind(("127.0.0.1", port))
                return port
    raise RuntimeError("no port left")


# The faults: each takes the bench, a name for its run, a generator and its number


FIRST_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MORE_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU, signal.SIGUSR2)


def a_signal(
    bench: Bench,
    name: str,
    rng: random.Random,
    number: int,
    fresh: bool = False,
    signals: tuple[signal.Signals, ...] = FIRST_SIGNALS,
) -> str:
    """SIGKILL, SIGTERM or SIGINT at a random time of a phase, perhaps of a run begun before."""
    phase, wave = list(PHASES)[number % 7], number // 7
    number_of = signals[wave % len(signals)]
    again = phase in ("calibration", "quantization", "export", "scoring") and wave % 2
    for attempt in range(8):
        if again:  # the artifact of an earlier end is there, and its last checkpoint
            bench.finished_copy(f"{name}-{attempt}")
        old = len((bench.place / "whole1" / "log.txt").read_text()) if again else 0
        job = bench.start(f"{name}-{attempt}", fresh=fresh, RESUME=str(int(bool(again))))
        mark = PHASES[phase].format(step=rng.randrange(1, STEPS))
        if phase == "calibration" and again:
            mark = "^resumed from"
        job.wait_for(mark, old)
        time.sleep(rng.uniform(0, bench.offsets[phase]) / 2**attempt)
        if job.alive:
            job.processes[0].send_signal(number_of) if fresh else os.kill(
                job.processes[0].pid, number_of
            )
        told = job.log[old:].rstrip().rpartition("\n")[2]
        code = job.wait()[0]
        if code != 0 and (code != -number_of or number_of == signal.SIGKILL):
            break
        # Without effect only where the run's last line was out already.
        assert told.startswith("artifact: "), f"{number_of.name} was ignored after: {told}"
    else:
        raise AssertionError("never landed")
    if number_of == signal.SIGKILL:
        said = job.ends(-signal.SIGKILL, lines=0)
    else:
        said = job.ends(
            128 + number_of,
            rf"^error: {number_of.name} (during [a-z ]+; what the run "
            rf"folder holds was kept|after step \d+; RESUME=1 RUN_ID={job.folder.name} "
            r"goes on from there)$",
        )
        if "after step" in said:
            step = int(re.search(r"after step (\d+)", said)[1])
            assert (job.folder / f"checkpoint_{step}.pt").is_file()
    if again:
        assert (job.folder / "artifact.bin").is_file()
    bench.resume(job.folder.name)
    return f"{number_of.name} in {phase}: {said or 'killed'}"


def a_fresh_signal(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The same, to python train_gpt.py in a process of its own."""
    return a_signal(bench, name, rng, number, fresh=True)


def another_signal(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The same with what a closed terminal, a scheduler or a limit of processor time sends."""
    return a_signal(bench, name, rng, number, signals=MORE_SIGNALS)


def another_fresh_signal(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The same, to python train_gpt.py in a process of its own."""
    return a_signal(bench, name, rng, number, fresh=True, signals=MORE_SIGNALS[number % 4 :])


def a_signal_at_the_start(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A signal while Python still imports: nothing was begun, and the same command does it all."""
    number_of = (*MORE_SIGNALS, *FIRST_SIGNALS[1:])[number % 6]
    job = bench.start(name, fresh=True)
    status = Path(f"/proc/{job.processes[0].pid}/status")
    bit = 1 << (number_of - 1)
    while job.alive:  # until a handler stands: before it, a signal is the system's matter
        caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.M)
        if caught and int(caught[1], 16) & bit and number_of != signal.SIGINT:
            break
        if "torch" in Path(f"/proc/{job.processes[0].pid}/maps").read_text():
            break  # Python itself catches SIGINT
    time.sleep(rng.uniform(0, 0.3))
    job.processes[0].send_signal(number_of)
    said = job.ends(128 + number_of, rf"^error: {number_of.name} during starting; ")
    assert not job.folder.exists() or not list(job.folder.glob("checkpoint_*"))
    bench.resume(name)
    return said


def a_closed_console(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """Output goes into a closed pipe, a full device, a terminal that goes away, or nowhere."""
    kind = ("closed pipe", "full", "terminal", "nowhere")[number % 4]
    job = bench.start(name, ("console", kind, rng.randrange(1, STEPS)))
    assert job.wait() == [0], job.log[-600:]
    bench.is_undisturbed(job)
    return f"{kind}: all of it is in log.txt"


def a_stop(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The process is stopped at a random time of a phase, and goes on later."""
    phase = list(PHASES)[number % 7]
    job = bench.start(name)
    if not job.wait_for(PHASES[phase].format(step=rng.randrange(1, STEPS - 2))):
        return "not injected: it had ended"
    os.kill(job.processes[0].pid, signal.SIGSTOP)
    ended = re.search("^eligible:", job.log, re.M)
    time.sleep(rng.uniform(0.1, 0.5))
    os.kill(job.processes[0].pid, signal.SIGCONT)
    assert job.wait() == [0], job.said()
    assert job.said() == ""
    assert sha_of(job.folder) == bench.expected[1]
    if not ended:
        assert re.search("^eligible:0 .*paused and continued", job.log, re.M)
    return f"stopped in {phase}"


def no_file_locks(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The file system of the runs has no locks: a warning, and the same run."""
    code = (errno.ENOLCK, errno.ENOSYS, errno.EBADF, 524)[number % 4]
    job = bench.start(name, ("no_locks", code))
    assert job.wait() == [0], job.said()
    bench.is_undisturbed(job)
    assert "cannot be locked" in job.log
    return f"errno {code}: went on"


def few_open_files(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """More shards than the process may open files: it reads them all."""
    mine, spare = bench.own_data(name), (24, 48, 96)[number % 3]
    shards = sorted(Path(mine["DATA_PATH"]).glob("fineweb_train_*"))
    tokens = b"".join(path.read_bytes()[1024:] for path in shards)
    size = len(tokens) // (60 + 40 * number) // 2 * 2
    for at, begin in enumerate(range(0, len(tokens), size)):
        header = np.zeros(256, "<i4")
        part = tokens[begin : begin + size]
        header[:3] = 20240520, 1, len(part) // 2
        path = Path(mine["DATA_PATH"], f"fineweb_train_{at:06d}.bin")
        path.write_bytes(header.tobytes() + part)
    job = bench.start(name, ("few_descriptors", spare), **mine)
    assert job.wait() == [0], job.said()
    free = bench.start(f"{name}-free", **mine)
    assert free.wait() == [0], free.said()
    assert sha_of(job.folder) == sha_of(free.folder)
    return f"{at + 1} shards, {spare} files"


def a_cpu_limit(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The kernel's own SIGXCPU, which comes again every second until the run has ended."""
    job = bench.start(name, ("cpu_limit", 1), ITERATIONS="100000")
    said = job.ends(128 + signal.SIGXCPU, r"^error: SIGXCPU (after step \d+|during )")
    bench.whole(job.folder)
    if step := re.search(r"after step (\d+)", said):
        assert (job.folder / f"checkpoint_{step[1]}.pt").is_file()
    return said


LONGER_LOCK = threading.Lock()


def a_longer_run(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A run that has ended goes on with a larger budget and is ended again: nothing is lost."""
    budget = {"ITERATIONS": str(STEPS + 8)}
    with LONGER_LOCK:  # the first of these faults finds out what an undisturbed run gives
        if not bench.expected.get("longer"):
            folder = bench.finished_copy("longer")
            assert bench.start("longer", RESUME="1", **budget).wait() == [0]
            bench.expected["longer"] = sha_of(folder)
    folder = bench.finished_copy(name)
    before = (folder / "artifact.bin").read_bytes()
    number_of = (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP)[number % 3]
    step = STEPS + rng.randrange(1, 6)
    pause = ("pause_before", step - STEPS + 1, 0.2)
    job = bench.start(name, pause, RESUME="1", **budget)
    assert job.wait_for(f"^step:{step}/")
    os.kill(job.processes[0].pid, number_of)
    code = -number_of if number_of == signal.SIGKILL else 128 + number_of
    said = job.ends(code, lines=int(code > 0))
    assert (folder / "artifact.bin").read_bytes() == before
    bench.start(name, out=f"{name}.less", RESUME="1").ends(2, "ITERATIONS=.*only a budget may grow")
    again = bench.start(name, out=f"{name}.again", RESUME="1", **budget)
    assert again.wait() == [0], again.said()
    assert sha_of(folder) == bench.expected["longer"]
    return f"{number_of.name} after step {step}: {said or 'killed'}"


def bad_first_weights(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """What INIT_FROM names is cut, emptied, something else, or has a bit wrong."""
    kind = ("artifact.bin", f"checkpoint_{STEPS}.pt")[number % 2]
    content = bytearray((bench.place / "whole1" / kind).read_bytes())
    damage = ("cut", "empty", "noise", "bit")[number // 2 % 4]
    content[rng.randrange(len(content) // 4, len(content) // 2)] ^= 1 << rng.randrange(8)
    path = bench.place / f"data-{name}"
    path.mkdir()
    path = path / kind
    path.write_bytes(
        {
            "cut": content[: rng.randrange(1, len(content))],
            "empty": b"",
            "noise": rng.randbytes(5000),
            "bit": content,
        }[damage]
    )
    job = bench.start(name, INIT_FROM=str(path))
    if damage == "bit" and job.wait() == [0]:
        return f"{damage} of {kind}: in the padding between tensors"
    said = job.ends(2, f"^error: (INIT_FROM=)?{re.escape(str(path))}")
    assert not job.folder.exists()
    return f"{damage} of {kind}: {said}"


def an_odd_launcher(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A launcher that contradicts itself: one line before any work."""
    odd = (
        {"WORLD_SIZE": "two"},
        {"LOCAL_WORLD_SIZE": "4"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
    )[number % 4]
    job = bench.start(name, odd=odd)
    said = job.ends(2, "^error: .*WORLD_SIZE")
    assert not job.folder.exists()
    return said


def a_move(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A run that was ended goes on elsewhere: data, tokenizer and run folder lie in new places."""
    mine = bench.own_data(name)
    job = bench.start(name, ("pause_before", 6, 0.2), **mine)
    assert job.wait_for("^step:4/")
    number_of = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGHUP)[number % 4]
    os.kill(job.processes[0].pid, number_of)
    job.wait()
    target = bench.place / f"data-{name}" / "elsewhere"
    shutil.move(bench.place / name, target / f"{name}-moved")
    for old in list(mine.values()):
        shutil.move(old, target / Path(old).name)
    moved = {key: str(target / Path(old).name) for key, old in mine.items()}
    again = bench.start(
        f"{name}-moved", out=f"{name}.again", RESUME="1", RUNS_DIR=str(target), **moved
    )
    assert again.wait() == [0], again.said()
    assert sha_of(target / f"{name}-moved") == bench.expected[1]
    return f"{number_of.name}, moved, went on"


def a_draw_cut(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """--sample is ended, or who read its output has seen enough: at most a line, no traceback."""
    number_of = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, 0)[number % 4]
    process = subprocess.Popen(
        [PYTHON, str(TRAINER), "--sample", str(bench.place / "whole1" / "artifact.bin"), "an"],
        env={
            **BARE_ENVIRONMENT,
            "TOKENIZER_PATH": str(bench.data.tokenizer_path),
            "SAMPLE_TOKENS": "100000",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(2) == "an"
    time.sleep(rng.uniform(0, 0.3))
    process.stdout.close() if number_of == 0 else process.send_signal(number_of)
    said = process.stderr.read()
    code = process.wait(TIMEOUT)
    assert code == (1 if number_of == 0 else 128 + number_of), (code, said)
    assert said.count("\n") <= (number_of != 0), said
    return said.strip() or "ended quietly"


def a_kill_in_a_write(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """SIGKILL between a file's content and its name: settings, source, checkpoints, artifact."""
    call = ("fsync", "replace")[number % 2]
    job = bench.start(name, ("die_at", call, nth := 1 + number // 2 % 6))
    if job.wait()[0] == 0:
        return f"not reached: {call} {nth}"
    job.ends(-signal.SIGKILL, lines=0)
    bench.resume(name)
    return f"SIGKILL in {call} {nth}"


def a_full_disk(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A write fails in the middle or the end: file too large, no space, input/output error."""
    if number % 3 == 0:
        plant = ("limit", "RLIMIT_FSIZE", int(10 ** rng.uniform(2, 5.7)))
    else:
        code = (errno.ENOSPC, errno.EIO)[number % 2]
        plant = ("fail_at", "fsync", 1 + number % 5, code)
    job = bench.start(name, plant)
    said = job.ends(1, "^error: .*(File too large|No space left|Input/output error)")
    bench.resume(name)
    return f"{plant}: {said}"


def a_small_disk(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The run folder is on a file system that fills up."""
    runs, size = bench.place / f"{name}-disk", int(10 ** rng.uniform(4.6, 6.3)) // 4096 * 4096
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(runs)], capture_output=True
    )
    if mounted.returncode:
        return "not injected: mount needs root"
    try:
        job = bench.start(name, RUNS_DIR=str(runs))
        said = job.ends(1, r"^error: .*No space left on device")
        bench.whole(runs / name)
        subprocess.run(["mount", "-o", "remount,size=64m", str(runs)], check=True)
        again = bench.start(name, RUNS_DIR=str(runs), RESUME="1", out=f"{name}.again")
        assert again.wait() == [0], again.said()
        assert sha_of(runs / name) == bench.expected[1]
        assert not list((runs / name).glob(".*"))
    finally:
        subprocess.run(["umount", str(runs)], check=True)
    return f"tmpfs of {size} bytes: {said}"


def a_closed_folder(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The run folder cannot be made, cannot be written, or goes away during the run."""
    runs = bench.place / f"{name}-runs"
    if number % 3 == 0:
        runs.write_text("a file\n")
        said = bench.start(name, RUNS_DIR=str(runs)).ends(1, f"^error: .*{runs}")
        assert runs.read_text() == "a file\n"
        return said
    if number % 3 == 1:
        runs.mkdir(mode=0o555)
        bench.place.chmod(0o755)
        plants = [("nobody",)] if os.getuid() == 0 else []
        said = bench.start(name, *plants, RUNS_DIR=str(runs)).ends(
            1, f"^error: .*Permission denied: .*{runs}"
        )
        assert not list(runs.iterdir())
        return said
    job = bench.start(name, ("pause_before", rng.randrange(2, STEPS), 0.2))
    assert job.wait_for("^step:1/")
    while job.folder.exists():  # the run may write into it meanwhile
        shutil.rmtree(job.folder, ignore_errors=True)
    said = job.ends(1, f"^error: .*No such file or directory: .*{job.folder}")
    bench.resume(name)
    return said


def a_shard_deleted(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A training shard is removed or replaced by another file while the run reads it."""
    mine, step = bench.own_data(name), rng.randrange(1, STEPS - 2)
    job = bench.start(name, ("pause_before", step + 2, 0.2), **mine)
    assert job.wait_for(f"^step:{step}/")
    shard = Path(mine["DATA_PATH"], f"fineweb_train_00000{number % 2}.bin")
    shard.rename(shard.with_suffix(".gone")) if number % 3 == 0 else shard.unlink()
    if number % 3 == 2:
        shard.write_bytes(b"something else\n")
    assert job.wait() == [0], job.said()
    assert sha_of(job.folder) == bench.expected[1]
    return "read on to the same artifact"


def a_shard_cut(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A training shard is cut short in place: what is mapped of it is no longer there."""
    mine, step = bench.own_data(name), rng.randrange(1, STEPS - 2)
    job = bench.start(name, ("pause_before", step + 2, 0.2), **mine)
    assert job.wait_for(f"^step:{step}/")
    shard = Path(mine["DATA_PATH"], f"fineweb_train_00000{number % 2}.bin")
    content = shard.read_bytes()
    os.truncate(shard, rng.choice([0, 1024, 4096, len(content) // 2, len(content) - 2]))
    said = job.ends(1, f"^error: rank 0, during training: RuntimeError: .*{shard.name} was cut")
    refused = bench.start(name, out=f"{name}.refused", RESUME="1", **mine)
    refused.ends(2, f"^error: .*{shard.name}")
    shard.write_bytes(content)
    bench.resume(name, **mine)
    return said


def a_nan(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A gradient or a weight that is not a finite number, in a step that is drawn."""
    step, value = rng.randrange(1, STEPS), (float("nan"), float("inf"))[number // 2 % 2]
    plant = ("plant_gradient", "plant_weight")[number % 2]
    job = bench.start(name, (plant, step, value), CHECKPOINT_SECONDS="0.0001")
    said = job.ends(
        1,
        rf"^error: rank 0, during training: FloatingPointError: step {step + 1}"
        r"|^error: rank 0, during training: FloatingPointError: step \d+: ",
    )
    for path in job.folder.glob("checkpoint_*.pt"):
        weights = torch.load(path, weights_only=True)["model"].values()
        assert all(weight.isfinite().all() for weight in weights), f"{path} is not finite"
    assert not (job.folder / "artifact.bin").exists()
    bench.resume(name)
    return f"{plant} {value}: {said}"


def a_spike(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A finite jump of a weight or a gradient, or text of another kind: the run goes on, logged."""
    step = rng.randrange(3, STEPS - 3)
    if number % 3 == 2:
        mine = bench.own_data(name)
        shard = Path(mine["DATA_PATH"], "fineweb_train_000000.bin")
        content = bytearray(shard.read_bytes())
        noise = bytes(b for _ in range(9000) for b in rng.randrange(4, 320).to_bytes(2, "little"))
        content[1024 : 1024 + len(noise)] = noise
        shard.write_bytes(content)
        job = bench.start(name, **mine)
    else:
        job = bench.start(
            name, (("plant_weight", step, 300.0), ("plant_gradient", step, 1e6))[number % 3]
        )
    assert job.wait() == [0], job.said()
    assert job.said() == ""
    losses = [event["train_loss"] for event in events(job.folder, "step")]
    assert len(losses) == STEPS
    assert losses != [event["train_loss"] for event in events(bench.place / "whole1", "step")]
    return f"largest loss {max(losses):.2f}"


def a_clock_jump(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The wall clock or the run's clock jumps, by seconds or years, forward or back."""
    clock, step = ("time", "perf_counter")[number % 2], rng.randrange(1, STEPS - 1)
    seconds = (3600.0, -3600.0, 1e9, -1e9)[number // 2 % 4]
    job = bench.start(name, ("shift_clock", clock, step, seconds))
    assert job.wait() == [0], job.said()
    assert job.said() == ""
    assert sha_of(job.folder) == bench.expected[1]
    return f"{clock} by {seconds:g} s"


def a_clock_jump_in_a_timed_run(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A run on the clock whose machine slept: it ends, exports and scores."""
    job = bench.start(
        name,
        ("shift_clock", "perf_counter", step := rng.randrange(2, 9), 3600.0),
        MAX_WALLCLOCK_SECONDS="60",  # of which a few pass before the jump
        ITERATIONS="100000",
        CHECKPOINT_SECONDS="0",
    )
    assert job.wait() == [0], job.said()
    assert "stopping_early: wallclock_cap" in job.log
    assert re.search("^eligible:0 .*training and calibration took", job.log, re.M)
    return f"slept an hour after step {step}"


def a_slow_rank(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """One rank of two takes longer than the other."""
    job = bench.start(name, ("slow", number % 2, rng.uniform(0.02, 0.1)), ranks=2)
    assert job.wait() == [0, 0], job.said()
    assert sha_of(job.folder) == bench.expected[2]
    return f"rank {number % 2} slow"


def a_hung_rank(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A rank that does not answer: the other says who, and ends; nothing is lost."""
    victim = number % 2
    job = bench.start(name, ("pause_before", 6, 0.2), ranks=2, WATCHDOG_SECONDS="1.5")
    assert job.wait_for("^step:4/")
    process = job.processes[victim]
    os.kill(process.pid, signal.SIGSTOP)
    other = Job([job.processes[1 - victim]], job.out, job.folder)
    try:
        assert other.wait() == [1]
        said = job.said(1 - victim).strip()
        assert re.fullmatch(
            rf"error: rank {1 - victim}, during training: waited 1.5 s; "
            rf"not there: rank ({victim}|unknown)",
            said,
        ), said
    finally:
        process.kill()
        process.join()
    bench.resume(name, ranks=2, WATCHDOG_SECONDS="600")
    return said


def a_dead_rank(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """A rank is killed: the other ends as well, with one line."""
    victim, step = number % 2, rng.randrange(1, STEPS - 2)
    job = bench.start(name, ("pause_before", step + 2, 0.2), ranks=2, WATCHDOG_SECONDS="5")
    assert job.wait_for(f"^step:{step}/")
    os.kill(job.processes[victim].pid, signal.SIGKILL)
    job.wait()
    said = job.ends(1, "^error: rank ", rank=1 - victim)
    bench.resume(name, ranks=2, WATCHDOG_SECONDS="600")
    return said


def no_memory(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """Priming does not fit: fewer rows if they were ours to choose, else a line that says so."""
    if number % 3 == 0:
        job = bench.start(name, ("small_memory", 1), MICRO_BATCH_SEQS="0", EVAL_BATCH_SEQS="1")
        assert job.wait() == [0], job.said()
        assert "out of memory: trying 1 rows a forward" in job.log
        return "fewer rows a forward"
    if number % 3 == 1:
        said = bench.start(name, ("small_memory", 1)).ends(
            1, "^error: rank 0, during priming: .*MICRO_BATCH_SEQS"
        )
        bench.resume(name)
        return said
    # Ten million parameters, and no room for a second copy of them.
    job = bench.start(name, ("limit", "RLIMIT_DATA", 24 << 20), MODEL_DIM="512")
    said = job.ends(1, "^error: rank 0, during priming: .*can't allocate memory")
    bench.whole(job.folder)
    return said


def another_tokenizer(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The tokenizer was swapped between preparation and training."""
    mine = bench.own_data(name)
    path = Path(mine["TOKENIZER_PATH"])
    model = bytearray(path.read_bytes())
    if number % 2:
        model[rng.randrange(len(model))] ^= 1
    else:
        from conftest import train_tokenizer

        model = train_tokenizer(make_documents(8000, seed=100 + number))
    path.write_bytes(bytes(model))
    job = bench.start(name, **mine)
    said = job.ends(2, "^error: TOKENIZER_PATH=.* is not the shards' tokenizer")
    assert not job.folder.exists()
    return said


def two_at_once(
    bench: Bench, name: str, rng: random.Random, number: int, fresh: bool = False
) -> str:
    """Two runs with one RUN_ID: one does all the work, the other is refused."""
    resume = (("0", "0"), ("1", "1"), ("0", "1"))[number % 3]
    jobs = [bench.start(name, fresh=fresh, out=f"{name}.{n}", RESUME=resume[n]) for n in range(2)]
    codes = [job.wait()[0] for job in jobs]
    assert sorted(codes) == [0, 2], (codes, [job.said() for job in jobs])
    said = jobs[codes.index(2)].ends(2, "^error: RUN_ID=.*(exists already|another process is at)")
    assert jobs[codes.index(0)].said() == ""
    assert sha_of(jobs[0].folder) == bench.expected[1]
    assert len(events(jobs[0].folder, "final")) == 1
    return said


def two_fresh_at_once(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The same with two commands."""
    return two_at_once(bench, name, rng, number, fresh=True)


def a_bad_checkpoint(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """The newest checkpoint is cut, emptied, overwritten, or has one bit of its weights wrong."""
    job = bench.start(name, ("die_at", "fsync", 5))
    job.wait()
    newest = max(job.folder.glob("checkpoint_*.pt"), key=lambda p: int(p.stem[11:]))
    content = bytearray(newest.read_bytes())
    damage = ("cut", "empty", "noise", "bit")[number % 4]
    if damage == "bit":
        content[rng.randrange(len(content) // 4, len(content) // 2)] ^= 1 << rng.randrange(8)
    newest.write_bytes(
        {
            "cut": content[: rng.randrange(1, len(content))],
            "empty": b"",
            "noise": rng.randbytes(5000),
            "bit": content,
        }[damage]
    )
    again = bench.start(name, out=f"{name}.again", RESUME="1")
    assert again.wait() == [0], again.said()
    assert sha_of(job.folder) == bench.expected[1], f"another artifact: {damage}"
    # A bit of the padding between tensors changes nothing.
    assert f"warning: {newest} cannot be read" in job.log or damage == "bit"
    return f"{damage}: passed over"


def a_preparation_cut(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """data/prepare.py is ended at a random time; the same command finishes with the same bytes."""
    text = bench.place / "documents.jsonl"
    with PORT_LOCK:
        if not (bench.place / "prepared").exists():
            text.write_text(
                "".join(json.dumps({"text": t}) + "\n" for t in make_documents(30_000, seed=3))
            )
            began = time.monotonic()
            assert prepare(text, bench.place / "prepared").wait() == 0
            bench.offsets["preparation"] = time.monotonic() - began
    ends = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *MORE_SIGNALS[1:])
    number_of = ends[number % len(ends)]
    out, whole = bench.place / name, bench.offsets["preparation"]
    for attempt in range(8):
        process = prepare(text, out)
        while process.poll() is None and not out.exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.5 * whole) / 2**attempt)
        process.send_signal(number_of)
        code, said = process.wait(TIMEOUT), process.stderr.read()
        if code != 0:
            break
        shutil.rmtree(out)
    # As it leaves, all done, Python has no handlers any more.
    done = code == -number_of and snapshot(out) == snapshot(bench.place / "prepared")
    assert done or code == (-9 if number_of == signal.SIGKILL else 128 + number_of), (code, said)
    assert said.count("\n") == (code > 0), said
    assert prepare(text, out).wait(TIMEOUT) == 0
    assert snapshot(out) == snapshot(bench.place / "prepared")
    return f"{number_of.name}: {said.strip().splitlines()[-1] if said.strip() else 'killed'}"


def prepare(text: Path, out: Path) -> subprocess.Popen:
    """The preparation of a small corpus."""
    return subprocess.Popen(
        [
            PYTHON,
            str(ROOT / "data" / "prepare.py"),
            "text",
            str(text),
            "--name",
            "small",
            "--vocab-size",
            "320",
            "--val-fraction",
            "0.1",
            "--shard-tokens",
            "20000",
            "--workers",
            "1",
            "--out",
            str(out),
        ],
        env=BARE_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def an_evaluation_cut(bench: Bench, name: str, rng: random.Random, number: int) -> str:
    """--eval is ended while it scores; the artifact is as it was, and scores the same again."""
    number_of = (signal.SIGTERM, signal.SIGINT)[number % 2]
    artifact = bench.place / "whole1" / "artifact.bin"
    ours = {
        "DATA_PATH": str(bench.data.data_path),
        "TOKENIZER_PATH": str(bench.data.tokenizer_path),
    }
    process = subprocess.Popen(
        [PYTHON, str(TRAINER), "--eval", str(artifact)],
        text=True,
        env={**BARE_ENVIRONMENT, **ours, "EVAL_STRIDE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in process.stdout:
        if line.startswith("source sha256"):
            break
    time.sleep(rng.uniform(0.05, 0.2))
    process.send_signal(number_of)
    said = process.stderr.read()
    assert process.wait(TIMEOUT) == 128 + number_of, said
    assert re.fullmatch(rf"error: {number_of.name} during [a-z ]+; what .* was kept\n", said), said
    return said.strip()


# How many of each: (a function, faults in all, faults of them in the quick set)
KINDS = {
    kind.__name__: (kind, many, few)
    for kind, many, few in (
        (a_fresh_signal, 21, 1),
        (two_fresh_at_once, 3, 0),
        (a_preparation_cut, 14, 0),
        (an_evaluation_cut, 4, 0),
        (another_fresh_signal, 7, 0),
        (a_signal_at_the_start, 6, 0),
        (a_draw_cut, 4, 0),
        (a_signal, 63, 7),
        (another_signal, 28, 2),
        (a_closed_console, 8, 1),
        (a_stop, 7, 1),
        (no_file_locks, 4, 1),
        (few_open_files, 3, 1),
        (a_cpu_limit, 2, 0),
        (a_longer_run, 6, 1),
        (bad_first_weights, 8, 2),
        (an_odd_launcher, 4, 1),
        (a_move, 4, 1),
        (a_kill_in_a_write, 12, 2),
        (a_full_disk, 18, 3),
        (a_small_disk, 6, 1),
        (a_closed_folder, 6, 3),
        (a_shard_deleted, 6, 1),
        (a_shard_cut, 10, 2),
        (a_nan, 12, 2),
        (a_spike, 6, 0),
        (a_clock_jump, 8, 1),
        (a_clock_jump_in_a_timed_run, 2, 0),
        (a_slow_rank, 2, 0),
        (a_hung_rank, 4, 1),
        (a_dead_rank, 4, 1),
        (no_memory, 6, 2),
        (another_tokenizer, 4, 1),
        (two_at_once, 6, 1),
        (a_bad_checkpoint, 8, 1),
    )
}
FRESH = (
    "a_fresh_signal",
    "two_fresh_at_once",
    "a_preparation_cut",
    "an_evaluation_cut",
    "another_fresh_signal",
    "a_signal_at_the_start",
    "a_draw_cut",
)


@contextlib.contextmanager
def bench(two: bool = True) -> Iterator[Bench]:
    """A prepared bench in a folder that goes away."""
    with tempfile.TemporaryDirectory() as place:
        made = Bench(Path(place))
        made.prepare(two)
        yield made


def inject(made: Bench, kind: str, number: int) -> tuple[bool, str]:
    """One fault; whether every promise was kept, and what was seen or what was broken."""
    name = f"{kind}-{number}"
    try:
        said = KINDS[kind][0](made, name, random.Random(name), number)
        assert made.precious() == made.kept, "something that was there before has changed"
        return True, said.replace(str(made.place), "")
    except Exception:
        return False, traceback.format_exc()
    finally:
        for left in (made.place / name, made.place / f"data-{name}"):
            shutil.rmtree(left, ignore_errors=True)


def inject_all(made: Bench, chosen: list[tuple[str, int]]) -> tuple[list[str], int]:
    """All of them, two at a time; prints a line each and the counts.

    Returns what was broken and how many faults really came about.
    """
    broken, counts = [], collections.Counter()
    with ThreadPoolExecutor(2) as pool:
        results = [
            (kind, number, pool.submit(inject, made, kind, number)) for kind, number in chosen
        ]
        for kind, number, result in results:
            kept, said = result.result()
            counts["injected"] += not said.startswith(("not injected", "not reached"))
            counts["fresh"] += kind in FRESH
            print(f"{'kept' if kept else 'BROKEN'} {kind} {number}: {said}", flush=True)
            if not kept:
                broken.append(f"{kind} {number}: {said}")
    print(
        f"{counts['injected']} faults injected, {counts['fresh']} of them in processes of their "
        f"own; {len(broken)} broke a promise",
        flush=True,
    )
    return broken, counts["injected"]


def main(kinds: list[str]) -> int:
    began = time.monotonic()
    with bench() as made:
        broken, _ = inject_all(
            made, [(kind, number) for kind in kinds or KINDS for number in range(KINDS[kind][1])]
        )
    print(f"{time.monotonic() - began:.0f} s")
    return int(bool(broken))


if __name__ == "__main__":
    import inject as this  # what forked processes unpickle lies in a module of this name

    sys.exit(this.main(sys.argv[1:]))
