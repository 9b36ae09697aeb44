"""What was never run on a GPU, in eleven minutes on one of them: a table for README.md, and a JSON.

    benchmarks/gpu.sh                 on one GPU
    benchmarks/gpu.sh --tiny          the same at the size of `mini`, to try the script on a CPU
    benchmarks/gpu.sh --only NAME...  some of its parts, by the names that the report has

Each part has a limit of its own. One that fails, or takes longer, is reported with the last line
that it said, and the next one begins. The data are made on the spot: random words, whose scores
mean nothing. Of each preset an eighth of its step is measured, what one of eight GPUs does, but
that one GPU orthogonalises all matrices. Presets are compiled side by side and timed one by one.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from measure import Bench, machine, median, t
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import train_tokenizer, write_data  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
PRESETS = ("", *(name for name in t.PRESETS if name.startswith("pr")))  # "" has the defaults
PROFILED = ("pr1361", "pr1855")
LIMIT = 660  # seconds of everything
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 operations a second
MEMORY_OF_A_PRESET = 27 * 2**30  # bytes of a GPU, at most, while it is compiled
TOKENS = 98_304  # an eighth of the step of #1361
STEPS, TINY_STEPS, WARM_STEPS, PROFILED_STEPS = 30, 3, 3, 2
OPERATORS = 12  # of a profile that are shown


class Failed(Exception):
    """A part did not do what it should; the text is what it said last."""


class NotPossible(Failed):
    """This machine cannot do a part; the text says why."""


@dataclass
class Session:
    """One run of this script: where it works, at which size, and what it has started."""

    folder: Path
    tiny: bool
    kernel: str = ""  # of attention, the quickest
    exported: float = 0.0  # the score of what was exported
    part: str = ""  # the one at work
    ends: float = 0.0  # when it must, by time.monotonic()
    processes: list[subprocess.Popen] = field(default_factory=list)

    def settings(self, preset: str, **others: object) -> dict[str, str]:
        """Settings of a run on the made data, of a preset at its size or at that of `mini`."""
        names = [name for name in (preset, "mini" if self.tiny else "") if name]
        chosen = {
            "PRESET": ",".join(names),
            "DATA_PATH": self.folder / "datasets" / "tiny_sp320",
            "TOKENIZER_PATH": self.folder / "tokenizers" / "tiny_320_bpe.model",
            "RUNS_DIR": self.folder / "runs",
            "MAX_WALLCLOCK_SECONDS": 0,
            "ITERATIONS": 6,
            "WARMDOWN_FRAC": 0.5,
        }
        chosen["TRAIN_BATCH_TOKENS"] = 512 if self.tiny else TOKENS
        return {name: str(value) for name, value in (chosen | others).items()}

    def start(self, *command: str, **settings: str) -> subprocess.Popen:
        """Start this Python with a command; its process group ends with the part at the latest."""
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            # Threads that spin while they wait would take the cores from what runs beside them.
            env={"OMP_WAIT_POLICY": "passive", **os.environ, **settings},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(process)
        end_after(self.ends - time.monotonic(), process)
        return process

    def finish(self, process: subprocess.Popen, said: str = "", say: str = "") -> str:
        """All that a process says, after what it `said`, when told `say`; Failed if it fails."""
        said += process.communicate(say)[0]
        with open(self.folder / f"{self.part.replace(' ', '_')}.txt", "a") as file:
            file.write(said)
        if process.returncode == -signal.SIGKILL:
            raise Failed(f"stopped at its limit, after: {last_line(said)}")
        if process.returncode:
            raise Failed(last_line(said) or f"exit code {process.returncode}")
        return said

    def call(self, *command: str, **settings: str) -> str:
        """What a command says; Failed if it does not end well."""
        return self.finish(self.start(*command, **settings))

    def alone(self, work: str, preset: str, **others: object) -> subprocess.Popen:
        """One of ALONE in a process of its own."""
        tiny = ["--tiny"] if self.tiny else []
        settings = json.dumps(self.settings(preset, **others))
        return self.start(__file__, *tiny, "--alone", work, settings)


def end_after(seconds: float, process: subprocess.Popen) -> threading.Timer:
    """End a process and all that it started, unless it has ended by then."""

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()
    return timer


def result_in(said: str) -> Any:
    """What one of ALONE gives: it stands in the last line."""
    return json.loads(said.splitlines()[-1])


def last_line(text: str) -> str:
    """The last line that tells of an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Refusal)\b", line)]
    return (errors or lines or [""])[-1][:300]


# The parts. Each returns what the report shall hold.


def make_data(session: Session) -> str:
    """A tokenizer of 1,024 pieces, and shards of random words."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrst"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(4000)]

    def document() -> str:
        length = rng.randint(100, 600)
        return " ".join(words[int(rng.expovariate(0.002)) % len(words)] for _ in range(length))

    texts = [document() for _ in range(100 if session.tiny else 1000)]
    scored = [document() for _ in range(4 if session.tiny else 40)]
    tokenizer = train_tokenizer(texts, vocab_size=1024, hard_vocab_limit=True)
    write_data(session.folder, tokenizer, [texts], scored)
    return f"{len(texts):,} documents to train on, {len(scored)} to score"


def run_tests(session: Session) -> str:
    """The tests that need a GPU; without one they are skipped."""
    return last_line(session.call("-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda_path.py"))


def try_attention(session: Session) -> dict:
    """Milliseconds of each attention kernel, or why it is not there."""
    found = result_in(session.finish(session.alone("attention", "pr1361")))
    times = {name: x["ms"] for name, x in found.items() if "ms" in x}
    session.kernel = min(times, key=lambda name: times[name])
    return found


def time_presets(session: Session) -> list[dict]:
    """Every preset: compiled side by side as far as memory allows, then timed one by one."""
    compiled = session.ends - 0.3 * (session.ends - time.monotonic())  # at the latest
    at_once = 2
    if CUDA:
        at_once = max(1, torch.cuda.mem_get_info()[1] // MEMORY_OF_A_PRESET)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))

    def prepare(name: str) -> tuple[str, subprocess.Popen, str]:
        if time.monotonic() > compiled:
            raise Failed("not reached")
        process = session.alone("preset", name, **kernel_for(name, session))
        timer = end_after(compiled - time.monotonic(), process)
        said = ""
        for line in process.stdout:
            said += line
            if line == "ready\n":
                timer.cancel()
                break
        return process, said

    facts = []
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [(name, pool.submit(prepare, name)) for name in PRESETS]
    for name, prepared in waiting:
        try:
            process, said = prepared.result()
            rows = result_in(session.finish(process, said, "go\n"))
        except Failed as failure:
            rows = [{"failed": str(failure)}]
        facts += [{"preset": name or "defaults", **row} for row in rows]
    return facts


def kernel_for(preset: str, session: Session) -> dict[str, str]:
    """The kernel of a preset that would try them all: others that compile would disturb it."""
    cfg, _ = t.Config.from_env(session.settings(preset))
    tries = CUDA and cfg.attention == "auto" and not cfg.attn_docs
    return {"ATTENTION": session.kernel or "sdpa"} if tries else {}


def export(session: Session) -> dict:
    """A run of few steps, not compiled: calibrated, quantised, packed, read back and scored."""
    settings = session.settings("pr1361", RUN_ID="exported", COMPILE=0)
    if session.tiny:
        settings["GPTQ_CALIB_BATCHES"] = "4"
    said = session.call("train_gpt.py", **settings)
    session.exported = score_in(said)
    size = re.findall(r"artifact ([\d,]+) bytes", said)[-1]
    return {"val_bpb": session.exported, "artifact bytes": size}


def evaluate(session: Session) -> dict:
    """The artifact scored again by --eval, compiled where there is a GPU."""
    made = session.settings("")
    artifact = session.folder / "runs" / "exported" / "artifact.bin"
    where = {name: made[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "RUNS_DIR")}
    score = score_in(session.call("train_gpt.py", "--eval", str(artifact), **where))
    return {"val_bpb": score, "less that of export": f"{score - session.exported:.8f}"}


def two_processes(session: Session) -> dict:
    """A small run of two processes, on two GPUs or on the CPU."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    settings = session.settings("pr1361" if session.tiny else "pr1361,mini", RUN_ID="two")
    del settings["TRAIN_BATCH_TOKENS"]
    try:
        return {"val_bpb": score_in(session.call(*launcher, "train_gpt.py", **settings))}
    except Failed as failure:
        if "one process for each" in str(failure):
            raise NotPossible(str(failure)) from None
        raise


def score_in(log: str) -> float:
    """The score that a run printed last."""
    return float(re.findall(r"^val_bpb:([\d.]+)", log, re.MULTILINE)[-1])


PARTS: dict[str, tuple[Callable[[Session], object], float]] = {  # and their limits in seconds
    "data": (make_data, 30),
    "CUDA tests": (run_tests, 90),
    "attention": (try_attention, 45),
    "presets": (time_presets, 285),
    "two processes": (two_processes, 60),
    "export": (export, 100),
    "--eval": (evaluate, 65),
}


# What runs in processes of their own: nothing that fails or fills memory there harms the others.


def measure_attention(settings: dict[str, str], tiny: bool) -> dict:
    """Milliseconds of a layer's attention, forward and backward, by each kernel."""
    cfg, _ = t.Config.from_env(settings)
    if tiny:
        t.TRIAL_ROWS, t.TRIAL_LENGTH = 1, 128
    heads, tokens = (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim), t.TRIAL_ROWS * t.TRIAL_LENGTH
    works, found = {}, {}
    for name in t.KERNELS:
        try:
            source, kernel = t.working_kernel(name, heads, DEVICE)
            works[name] = t.trial_pass(kernel, heads, DEVICE)
            found[name] = {"source": source}
        except t.Refusal as refusal:
            found[name] = {"failed": str(refusal)}
    for name, seconds in t.seconds_of_kernels(works, t.Ranks(device=DEVICE)).items():
        if name in works:
            work = 6.0 * t.TRIAL_LENGTH * cfg.model_dim * tokens  # of the causal half
            found[name] |= {"ms": 1e3 * seconds, "TFLOP/s": 1e-12 * work / seconds}
    return found


def measure_preset(settings: dict[str, str], tiny: bool) -> list[dict]:
    """Steps of a preset, with and without its loop; waits to be told to time them."""
    given = " ".join(f"{name}={value}" for name, value in settings.items())
    started = time.perf_counter()
    bench = Bench(given, device=DEVICE)
    cfg = bench.cfg
    moments = [
        replace(bench.moment, qat=cfg.qat_mode == "always", mile_gamma=cfg.mile_gamma, looping=loop)
        for loop in ([False, True] if cfg.num_loops else [True])
    ]
    t.fit_micro_batch(bench.forward, bench.model, bench.rows, moments[-1], bench.run)
    for moment in moments:
        for number in range(WARM_STEPS):
            bench.step(number, moment)
    bench.run.wait_for_gpu()
    ready = time.perf_counter() - started
    if CUDA:
        torch.cuda.empty_cache()
    print("ready", flush=True)
    sys.stdin.readline()
    steps = TINY_STEPS if tiny else STEPS
    return [{"ready s": ready, **timed_steps(bench, moment, steps)} for moment in moments]


def timed_steps(bench: Bench, moment: t.Moment, steps: int) -> dict:
    """The facts of so many steps, and the operators of one where they are asked for."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    marks = [mark()]
    for number in range(steps):
        stats = bench.step(WARM_STEPS + number, moment)
        marks.append(mark())
    bench.run.wait_for_gpu()
    ms = median(between(*pair) for pair in zip(marks, marks[1:], strict=False))
    operations = t.step_operations(bench.model, moment.looping)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    if CUDA:
        peak = torch.cuda.max_memory_allocated()
    if not stats.isfinite().all():
        raise FloatingPointError("loss or gradients are not finite")
    facts = {
        "loops": {True: "yes", False: "no"}[moment.looping] if bench.cfg.num_loops else "",
        "kernel": bench.attention.name,
        "rows at once": bench.run.micro_batch_rows,
        "ms": ms,
        "tokens": bench.cfg.train_batch_tokens,
        "tokens/s": 1e3 * bench.cfg.train_batch_tokens / ms,
        "TFLOP": 1e-12 * operations,
        "MFU": 1e3 * operations / ms / peak_rate() if peak_rate() else None,
        "peak MiB": peak / 2**20,
        "loss": stats[0].item(),
    }
    if any(name in bench.cfg.preset for name in PROFILED):
        facts["operators"] = operators(bench, moment)
    return facts


def mark() -> object:
    """A point in time, of the GPU's queue where there is one: nothing waits for it."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: object, second: object) -> float:
    """Milliseconds between two marks that have passed."""
    return first.elapsed_time(second) if CUDA else 1e3 * (second - first)


def peak_rate() -> float:
    """The operations a second that this GPU could do; 0 where it is not known."""
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((rate for known, rate in PEAKS.items() if known in name), 0.0)


def operators(bench: Bench, moment: t.Moment) -> list[tuple[str, float, float]]:
    """Kernels of the GPU, or operators of the CPU, that take most of a step: ms, share of all."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as profiler:
        for number in range(PROFILED_STEPS):
            bench.step(number, moment)
        bench.run.wait_for_gpu()
    rows = profiler.key_averages()
    if CUDA:
        found = [
            (row.key, row.self_device_time_total)
            for row in rows
            if row.device_type == DeviceType.CUDA
        ]
    else:
        found = [(row.key, row.self_cpu_time_total) for row in rows]
    found.sort(key=lambda pair: -pair[1])
    every = sum(micro for _, micro in found)
    return [
        (name[:80], 1e-3 * micro / PROFILED_STEPS, micro / every)
        for name, micro in found[:OPERATORS]
    ]


ALONE = {"attention": measure_attention, "preset": measure_preset}


# The report


def row(*cells: object) -> str:
    """A row of a table; a bar in a cell would end it."""
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def preset_lines(rows: list[dict]) -> Iterator[str]:
    """The table of the presets."""
    yield row(
        "preset", "loops", "kernel", "ms a step", "tokens a step", "tokens a second",
        "TFLOP a step", "of peak", "peak MiB", "ready after, s",
    )  # fmt: skip
    yield row("---", "---", "---", *7 * ["---:"])
    for x in rows:
        if "failed" in x:
            yield row(x["preset"], "", f"failed: {x['failed']}", *7 * [""])
            continue
        share = f"{x['MFU']:.1%}" if x["MFU"] else "not known"
        yield row(
            x["preset"], x["loops"], x["kernel"], f"{x['ms']:.1f}", f"{x['tokens']:,}",
            f"{x['tokens/s']:,.0f}", f"{x['TFLOP']:.3g}", share, f"{x['peak MiB']:,.0f}",
            f"{x['ready s']:.0f}",
        )  # fmt: skip


def attention_lines(found: dict) -> Iterator[str]:
    """The table of the attention kernels."""
    yield row("kernel", "ms, both ways", "TFLOP/s")
    yield row("---", "---:", "---:")
    for name, x in found.items():
        if "failed" in x:
            yield row(name, f"not here: {x['failed']}", "")
        else:
            yield row(x["source"], f"{x['ms']:.3f}", f"{x['TFLOP/s']:.3g}")


def operator_lines(rows: list[dict]) -> Iterator[str]:
    """What takes most of a step, of the presets that were looked into."""
    for x in rows:
        if "operators" not in x:
            continue
        loops = {"yes": ", looping", "no": ", before it loops", "": ""}[x["loops"]]
        yield ""
        yield row(f"{x['preset']}{loops}, while profiled", "ms a step", "share")
        yield row("---", "---:", "---:")
        for name, ms, share in x["operators"]:
            yield row(name, f"{ms:.2f}", f"{share:.1%}")


def report_lines(report: dict) -> Iterator[str]:
    """The report in Markdown."""
    where = report["machine"]
    yield f"## On one {where['device']}"
    yield ""
    yield (
        f"`benchmarks/gpu.sh{' --tiny' if report['tiny'] else ''}`, {report['date']}, "
        f"{where['processor']}. "
        + ("At the size of `mini`: this tries the script. " if report["tiny"] else "")
        + f"Medians of {TINY_STEPS if report['tiny'] else STEPS} steps of "
        + ("512 tokens" if report["tiny"] else "an eighth of the step's tokens")
        + "; operations are counted once, of products and the causal half of attention."
    )
    parts = report["parts"]
    for name, lines in (("presets", preset_lines), ("attention", attention_lines)):
        if parts.get(name, {}).get("facts"):
            yield ""
            yield from lines(parts[name]["facts"])
    yield ""
    yield row("part", "outcome", "seconds", "limit")
    yield row("---", "---", "---:", "---:")
    for name, part in parts.items():
        outcome = f"{part['outcome']}: {part['said']}" if part["said"] else part["outcome"]
        yield row(name, outcome, f"{part['seconds']:.0f}", f"{part['limit']:.0f}")
    if parts.get("presets", {}).get("facts"):
        yield from operator_lines(parts["presets"]["facts"])


def run_part(name: str, session: Session, limit: float) -> dict:
    """Do a part; what came of it, whatever it was."""
    started = time.monotonic()
    session.part, session.ends = name, started + limit
    facts: object = None
    outcome, said = "done", ""
    try:
        if limit <= 0:
            raise NotPossible(f"not reached in {LIMIT} s")
        facts = PARTS[name][0](session)
        if isinstance(facts, list) and any("failed" in x for x in facts):
            outcome = "failed in part"
    except NotPossible as failure:
        outcome, said = "not possible", str(failure)
    except Failed as failure:
        outcome, said = "failed", str(failure)
    except Exception as failure:  # whatever it is, the other parts are still to come
        outcome, said = "failed", f"{type(failure).__name__}: {failure}"
    if isinstance(facts, str):
        said = facts
    if isinstance(facts, dict) and "val_bpb" in facts:
        said = ", ".join(f"{key} {value}" for key, value in facts.items())
    seconds = time.monotonic() - started
    return {"outcome": outcome, "said": said, "seconds": seconds, "limit": limit, "facts": facts}


def run_all(names: list[str], session: Session) -> dict:
    """Do all parts, and leave the report after each of them."""
    report = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "tiny": session.tiny,
        "machine": {
            "device": torch.cuda.get_device_name() if CUDA else "CPU",
            "torch": torch.__version__,
            "processor": machine(),
        },
        "parts": {},
    }
    ends = time.monotonic() + LIMIT
    for number, name in enumerate(names):
        limit = min(PARTS[name][1], ends - time.monotonic())
        print(f"part {number + 1} of {len(names)}, {name}: at most {limit:.0f} s", flush=True)
        part = run_part(name, session, limit)
        print(f"  {part['outcome']}, {part['seconds']:.0f} s {part['said']}", flush=True)
        report["parts"][name] = part
        (session.folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (session.folder / "gpu.md").write_text("\n".join(report_lines(report)) + "\n")
    return report


def main() -> int:
    """All parts and their report, or one of ALONE; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="at the size of `mini`")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="NAME")
    parser.add_argument("--out", type=Path, help="a new folder; by default one under runs/")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        work, settings = given.alone
        print(json.dumps(ALONE[work](json.loads(settings), given.tiny)))
        return 0
    if not CUDA and not given.tiny:
        print("error: there is no GPU here; --tiny tries the script on a CPU", file=sys.stderr)
        return 2
    folder = given.out or ROOT / "runs" / f"gpu-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    folder = folder.resolve()
    folder.mkdir(parents=True)
    session = Session(folder, given.tiny)
    names = [name for name in PARTS if name in ("data", *given.only)]
    try:
        report = run_all(names, session)
    finally:
        for process in session.processes:
            end_after(0.0, process).join()
    print("", *report_lines(report), "", f"report: {folder}/gpu.md, gpu.json", sep="\n")
    outcomes = {part["outcome"] for part in report["parts"].values()}
    return int(not outcomes <= {"done", "not possible"})


if __name__ == "__main__":
    sys.exit(main())
