"""Train a tiny language model under a byte and a time budget, and score its artifact.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    8 GPUs, FineWeb, the defaults
    PRESET=mini python train_gpt.py                          two CPU cores, built-in corpus
    python train_gpt.py --help                               every setting
    python train_gpt.py --check                              look at settings and data, do nothing
    python train_gpt.py --plan                               what a run would do and cost
    python train_gpt.py --eval runs/<id>/artifact.bin        score an artifact again
    python train_gpt.py --sample runs/<id>/artifact.bin ""   text that its model draws

The number to bring down is val_bpb, bits per byte of the validation text by the model that the
artifact holds. ARTIFACT_LIMIT_BYTES bounds code plus artifact, MAX_WALLCLOCK_SECONDS training
and calibration, EVAL_WALLCLOCK_SECONDS scoring. Hyperparameters are environment variables; a
run leaves its log, metrics, settings, source and artifact in runs/<RUN_ID>/.

Sections, in the order of a run:

  1  Settings                     what a setting is, and what its readers may read
  2  Run                          ranks, device, clock, log, run folder
  3  Data                         shards, training rows, validation split, bytes per token
  4  Token mask                   what a tokenizer cannot emit
  5  Model                        the network, one forward for everything
  6  Optimizers and schedules     Muon, AdamW, routing table, learning rate at a given time
  7  Training                     priming, one step, the loop
  8  Quantization                 int6/int8 grids, Hessians, GPTQ
  9  Artifact                     bytes to model and back
 10  Range coder                integers to few bytes and back
 11  Size                         what it will take, and how it is made to fit
 12  Counts                       n-grams and repeats, mixed with the network
 13  Evaluation                   windows, bits per byte, learning from what is scored
 14  Sampling                     text that the model draws
 15  Faster on a CPU              derivatives by hand
 16  Published variants           what only a published system needs
 17  Configuration                all settings together, presets, the environment
 18  Main                         the story, and the verbs above

Shapes: B rows, T tokens a row, D model width, H query heads, G key/value heads, K head width,
V vocabulary, N tokens of a stream. Linear weights are (out, in).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import io
import json
import lzma
import math
import os
import platform
import re
import runpy
import signal
import struct
import sys
import threading
import time
import traceback
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol, TypeVar, cast

try:
    import fcntl
    import resource
except ImportError:
    if __name__ != "__main__":
        raise
    print("error: this needs Linux or macOS; on Windows, run it inside WSL", file=sys.stderr)
    sys.exit(2)

# What asks a process to end: a scheduler, Ctrl-C, a terminal that goes away, a limit of CPU time,
# and what SLURM and its like send some time before they kill.
END_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGXCPU,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def handle_end_signals(handler: Callable[[int, FrameType | None], None]) -> dict:
    """Let `handler` take what asks the process to end; returns the handlers before.

    A hang-up that is ignored already stays so: that is what nohup asks for. Off the main thread
    signals are the host program's matter.
    """
    before: dict = {}
    if threading.current_thread() is threading.main_thread():
        for number in END_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


def end_before_work(number: int, frame: FrameType | None) -> None:
    """End a process that has not begun to work: nothing can be lost."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one a host is enough
        line = f"error: {signal.Signals(number).name} during starting; nothing was begun\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
    os._exit(128 + number)


if __name__ == "__main__":
    # Before what follows, as importing torch takes seconds and settles how its threads wait.
    # Threads that spin while they wait take the CPU from each other where there is less of it
    # than cores: in a container with a quota, beside a neighbour at work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    handle_end_signals(end_before_work)

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

# =================================================================================================
# Settings
# What a setting is. The settings themselves stand at the head of the sections that use them, in
# small parts; the section Configuration puts the parts together and reads the environment.
# =================================================================================================


class Refusal(ValueError):
    """Settings, data or an artifact that a run cannot use; the message is one line."""

    def __str__(self) -> str:
        """At most 1,000 printable characters, since a hostile file's texts may hold anything."""
        text = super().__str__()[:1000]
        return "".join(character if character.isprintable() else "?" for character in text)


# What reading a stranger's JSON and lengths may raise.
MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)

UNSAID = object()  # marks a setting that does not say what its absence in an artifact means


@dataclass(frozen=True)
class Knob:
    """What is known of a setting beside its name and default.

    accepts: (lowest, highest) of a number, the choices of a text; empty for any text.
    meaning: a sentence for --help, with the unit.
    reach: who may read the setting.
        "run": where and how the run works, never what comes out of it; may differ on resuming.
        "training": decides what is learned or exported.
        "model": decides the network that an artifact holds; travels in its header.
        "scoring": decides how an artifact is scored; travels too, and may be set anew for --eval.
    absent: the value that artifacts from before this setting mean; see VERSION_1_SETTINGS.
    tries: values beside the choices that the tests compose with all other settings.
    """

    accepts: tuple
    meaning: str
    reach: str
    absent: object
    tries: tuple

    @property
    def travels(self) -> bool:
        """Whether an artifact's header holds the setting."""
        return self.reach in ("model", "scoring")


def knob_of_reach(reach: str) -> Callable[..., Any]:
    """A function that declares settings of this reach; see Knob."""

    def declare(
        default: object,
        accepts: tuple,
        meaning: str,
        *,
        absent: object = UNSAID,
        tries: tuple = (),
    ) -> Any:
        """A dataclass field with its Knob; see there for the arguments."""
        return field(
            default=default, metadata={"knob": Knob(accepts, meaning, reach, absent, tries)}
        )

    return declare


run_knob = knob_of_reach("run")
training_knob = knob_of_reach("training")
model_knob = knob_of_reach("model")
scoring_knob = knob_of_reach("scoring")

Checks = Iterator[tuple[object, str]]  # whether a condition holds, and the complaint if not


class Part:
    """The settings of one subject, as a frozen dataclass; Config inherits from all parts.

    Names in the environment that begin with one of `prefixes` are ours: one that is no setting
    is a mistake, not somebody else's variable.
    """

    title: ClassVar[str]  # heads the part in --help
    prefixes: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Conditions on the part's settings, each with its complaint, which names settings."""
        return iter(())


def knob_of(setting: Field) -> Knob:
    """What a field of Config says of its setting."""
    return setting.metadata["knob"]


def parse_setting(name: str, text: str, setting: Field) -> object:
    """The value of setting `name` from its text; raises Refusal naming what was expected."""
    accepts = knob_of(setting).accepts
    kind: Any = type(setting.default)
    try:
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        raise Refusal(f"{name}={text!r}: expected {expected}") from None
    if kind is str and accepts and value not in accepts:
        raise Refusal(f"{name}={text!r}: expected one of {', '.join(accepts)}")
    if kind in (int, float) and not accepts[0] <= value <= accepts[1]:  # refuses nan as well
        raise Refusal(f"{name}={value}: expected {accepts[0]} <= value <= {accepts[1]}")
    return value


def show_setting(value: object) -> str:
    """A setting's value as one would write it in the environment."""
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return text if text and text.isprintable() else repr(text)


class LimitedSettings:
    """The settings that one kind of reader may read; any other one is refused.

    It keeps the network from depending on a setting that does not travel in the artifact: such a
    model would train and export, and then not be rebuilt.
    """

    def __init__(self, cfg: Config, reaches: tuple[str, ...], reader: str) -> None:
        self._cfg = cfg
        self._reaches = reaches
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        """The value of a setting, or of a property computed from settings within reach."""
        found = inspect.getattr_static(type(self._cfg), name)
        if isinstance(found, property):
            assert found.fget is not None
            return found.fget(self)
        setting = type(self._cfg).__dataclass_fields__.get(name)
        if setting is not None and knob_of(setting).reach not in self._reaches:
            raise Refusal(
                f"{name.upper()} is read by {self._reader}, but its reach is "
                f"{knob_of(setting).reach!r}: declare it with {self._reaches[-1]}_knob"
            )
        return getattr(self._cfg, name)


# =================================================================================================
# Run
# What a process is and what a run leaves behind. Every decision that ranks must share goes
# through agree(), every sum through add_up() or scatter_sum(); with one process they do nothing.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class RunSettings(Part):
    """Where a run works and what it leaves behind."""

    title = "Run"

    preset: str = run_knob("", (), "Names of presets, comma-separated; later ones win.")
    not_ours: str = run_knob(
        "", (), "Names of other programs' variables, comma-separated, that look like settings."
    )
    run_id: str = run_knob("", (), "Folder under RUNS_DIR; empty takes UTC time and a suffix.")
    runs_dir: str = run_knob("runs", (), "Folder in which run folders are made.")
    seed: int = training_knob(1337, (0, 2**31 - 1), "Seed of initial weights and data order.")
    attention: str = run_knob("auto", ("auto", "fa3", "sdpa"), "Attention kernel.")
    compile: str = run_knob(
        "auto", ("auto", "0", "1"), "Use torch.compile; auto does on CUDA and in long CPU runs."
    )
    resume: bool = run_knob(False, (), "Go on from the last checkpoint of RUN_ID, if there is one.")
    init_from: str = run_knob(
        "", (), "An artifact.bin or checkpoint of a run with whose weights this one begins."
    )
    log_to: str = run_knob(
        "files",
        ("files", "tensorboard"),
        "tensorboard writes event files too, in the run folder; it needs that package.",
    )
    checkpoint_seconds: float = run_knob(
        0.0, (0.0, 1e7), "Seconds between checkpoints; 0 writes them on signals and at the end."
    )
    watchdog_seconds: float = run_knob(
        600.0, (0.1, 1e7), "Seconds that a rank waits for the others before it gives up."
    )
    train_log_every: int = run_knob(
        0, (0, math.inf), "Steps between log lines; 0 logs about 50 lines."
    )
    val_loss_every: int = run_knob(
        4000, (0, math.inf), "Steps between validations; 0 validates at the end only."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A run's name is the name of a folder, and only a named run can be resumed."""
        yield (
            re.fullmatch(r"[\w.-]{0,100}", cfg.run_id) and cfg.run_id not in (".", ".."),
            "RUN_ID must be up to 100 letters, digits, '_', '-' and '.'",
        )
        yield cfg.run_id or not cfg.resume, "RESUME needs the RUN_ID of the run to go on with"


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(Part):
    """What a run may spend."""

    title = "Budgets"

    iterations: int = training_knob(20000, (1, 10**8), "Largest number of training steps.")
    max_wallclock_seconds: float = training_knob(
        600.0, (0.0, 1e7), "Seconds for training and calibration; 0 makes the run step-driven."
    )
    max_train_tflops: float = training_knob(
        0.0,
        (0.0, 1e9),
        "Counted 10^12 floating-point operations for training and calibration instead of seconds, "
        "equal on every machine; 0 sets no bound.",
    )
    eval_wallclock_seconds: float = run_knob(600.0, (0.0, 1e7), "Seconds for scoring the artifact.")
    artifact_limit_bytes: int = training_knob(
        16_000_000, (1, 1 << 40), "Most decimal bytes that code and artifact may have together."
    )
    warmup_steps: int = training_knob(
        20, (0, 1000), "Priming steps before the clock starts, undone afterwards."
    )

    @property
    def step_driven(self) -> bool:
        """Whether what is counted ends the run, steps or operations, rather than the clock."""
        return self.max_wallclock_seconds == 0

    @property
    def budget_unit(self) -> str:
        """What the run's budget is counted in; ITERATIONS bounds every run besides."""
        if self.max_train_tflops:
            return "operations"
        return "steps" if self.step_driven else "seconds"

    @property
    def whole_budget(self) -> float:
        """What training and calibration may cost, in its unit."""
        budgets = {
            "operations": round(1e12 * self.max_train_tflops),
            "steps": self.iterations,
            "seconds": self.max_wallclock_seconds,
        }
        return budgets[self.budget_unit]

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Two budgets would leave it to the machine which of them ends the run."""
        yield (
            cfg.max_wallclock_seconds == 0 or cfg.max_train_tflops == 0,
            "a run has one budget, and the other is 0: MAX_WALLCLOCK_SECONDS or MAX_TRAIN_TFLOPS",
        )


def say(line: str, to_stderr: bool = False) -> None:
    """Write a line to the console. It may have gone away: output is never essential."""
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is None:  # closed before the process began
        return
    try:
        tqdm.write(line, file=stream)
        stream.flush()
    except UnicodeEncodeError:
        tqdm.write(line.encode("ascii", "backslashreplace").decode(), file=stream)
    except (OSError, ValueError):
        # What is left in the stream's buffer must not fail again when Python exits.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def open_standard_streams() -> None:
    """Open what was closed of stdin, stdout and stderr, or a file of the run would take its place.

    Python has no stream for a closed one; say() knows.
    """
    while True:
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            return


# Settings that a run may be resumed with larger values of.
BUDGETS = ("iterations", "max_wallclock_seconds", "max_train_tflops")
EXIT_FAILED, EXIT_REFUSED, EXIT_OVER_LIMIT, EXIT_INTERRUPTED = 1, 2, 3, 130
CACHED_TOKENS = 4096  # of a forward without backward on a CPU: more leave its caches


class Clock:
    """Seconds that count against a budget: runs only inside `with clock.running()`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.banked = 0.0
        self.since: float | None = None  # when it began to run

    def elapsed(self) -> float:
        return self.banked + (self.now() - self.since if self.since is not None else 0.0)

    @contextlib.contextmanager
    def running(self, runs: bool = True) -> Iterator[None]:
        """Count the time spent inside, or with running(False) leave it out."""
        before = self.since is not None
        self.banked, self.since = self.elapsed(), self.now() if runs else None
        try:
            yield
        finally:
            self.banked, self.since = self.elapsed(), self.now() if before else None


class Ranks:
    """The processes that share a run, of which this is one, and what they exchange.

    Every decision that ranks must share goes through agree(), every sum through add_up() or
    scatter_sum(). With a single process these do nothing.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        *,
        split_stacks: bool = True,
        watchdog_seconds: float = 600.0,
        store: dist.Store | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device or torch.device("cpu")
        self.is_main = rank == 0
        self.store = store  # where the processes found each other
        # Into how many parts the stacks of Muon are split; with 1, every rank does all of them.
        self.num_parts = world_size if split_stacks else 1
        # Decisions are exchanged through host memory, so that they never wait for a GPU queue.
        self.control: dist.ProcessGroup | None = None
        self.patient: dist.ProcessGroup | None = None
        if world_size > 1 and dist.is_initialized():
            seconds = timedelta(seconds=watchdog_seconds)
            self.control = dist.new_group(backend="gloo", timeout=seconds)
            # Rank 0 may quantise long alone before it sends what came out.
            self.patient = dist.new_group(backend="gloo", timeout=20 * seconds)

    def agree(self, value: float, op: str = "first") -> float:
        """Rank 0's value, on every rank; with op="most" the largest of all ranks' values."""
        if self.world_size == 1:
            return value
        counts = op == "most" or self.is_main
        box = torch.tensor(value if counts else -math.inf, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return box.item()

    def any_of(self, condition: bool) -> bool:
        """Whether the condition holds on any rank."""
        return self.agree(float(condition), "most") > 0

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all ranks, in place, in one exchange; same order on every rank."""
        if self.world_size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, group=self.control if flat.device.type == "cpu" else None)
        totals = flat.split([t.numel() for t in tensors])
        shaped = [total.view_as(t) for total, t in zip(totals, tensors, strict=True)]
        torch._foreach_copy_(tensors, shaped)

    def part_of(self, stack: Tensor) -> Tensor:
        """This rank's part of a stack (n, ...), padded with zeros to equal parts: (m, ...)."""
        count = -(-len(stack) // self.num_parts)
        first = count * (self.rank % self.num_parts)
        part = stack[first : first + count].to(self.device)
        return torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])])

    def scatter_sum(self, stack: Tensor) -> Callable[[], Tensor]:
        """Start to sum (n, ...) over ranks; what waits for it gives this rank's part (m, ...)."""
        if self.world_size == 1:
            return lambda: stack
        if self.num_parts == 1:
            return waiter(stack, dist.all_reduce(stack, async_op=True))
        padding = stack.new_zeros(-len(stack) % self.num_parts, *stack.shape[1:])
        whole = torch.cat([stack, padding])
        part = torch.empty_like(whole[: len(whole) // self.num_parts])
        return waiter(part, dist.reduce_scatter_single(part, whole, async_op=True))

    def gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Start to put all ranks' parts (m, ...) together; what waits for it gives the whole."""
        if self.num_parts == 1:
            return lambda: part
        whole = part.new_empty(self.num_parts * len(part), *part.shape[1:])
        return waiter(whole, dist.all_gather_single(whole, part.contiguous(), async_op=True))

    def broadcast(self, content: bytes, source: int = 0) -> bytes:
        """The bytes of rank `source`, on every rank, whether or not they share a file system."""
        box = [content]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=source, group=self.patient)
        return box[0]

    def copy_from_main(self, model: nn.Module) -> None:
        """Give every rank rank 0's parameters: different CPUs may draw slightly different ones."""
        if self.world_size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def copy_of(self, own: Tensor | None, owner: int, shape: tuple[int, ...]) -> Tensor:
        """Rank `owner`'s float32 tensor of this shape in host memory, on every rank."""
        if self.world_size == 1:
            assert own is not None
            return own
        copied = torch.empty(shape)
        if self.rank == owner:
            assert own is not None
            copied.copy_(own)
        dist.broadcast(copied, src=owner, group=self.control)
        return copied

    def check_replicas(self, model: nn.Module, step: int) -> None:
        """Raise RuntimeError unless all ranks hold the same weights, by a sum of their bits."""
        if self.world_size == 1:
            return
        bits = [p.detach().view(torch.int32) for p in model.parameters()]
        total = torch.stack([part.sum(dtype=torch.int64) for part in bits]).sum()
        mine = float(total.item() % 2**50)  # a float64 holds it exactly
        of_main = self.agree(mine)
        if self.any_of(mine != of_main):
            raise RuntimeError(f"step {step}: the ranks' weights differ; do not use this run")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If any rank refuses in this block, every rank does, by the words of the first of them.

        Otherwise the others would wait for it in vain, or end without saying why.
        """
        refusal = None
        try:
            yield
        except Refusal as error:
            refusal = error
        # The lowest rank that refused, or inf: the largest of the negated ranks, negated.
        first = -self.agree(-math.inf if refusal is None else -self.rank, "most")
        if first < math.inf:
            text = f"rank {first:.0f}: {refusal}" if first else str(refusal)
            raise Refusal(self.broadcast(text.encode(), int(first)).decode())

    def absent(self) -> str:
        """After a time-out, the ranks that did not come to it; or "unknown".

        Every rank that waited in vain says so in the store: the others are absent.
        """
        store, missing = self.store, set(range(self.world_size))
        if store is None:
            return "unknown"

        def ask() -> None:
            store.set(f"rank {self.rank} waited", "")
            while True:
                here = [r for r in missing if store.check([f"rank {r} waited"])]
                missing.difference_update(here)
                time.sleep(0.1)

        # In a thread of its own, as a store never answers if the process that holds it is dead.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(3.0)
        if self.rank in missing:  # the store did not even tell this rank of itself
            return "unknown"
        return ", ".join(map(str, sorted(missing)))


def waiter(result: Tensor, work: dist.Work) -> Callable[[], Tensor]:
    """A function that waits for `result`; waiting again costs nothing."""

    @functools.cache
    def wait() -> Tensor:
        work.wait()
        return result

    return wait


class RunFolder:
    """What a run leaves in runs/<RUN_ID>/: log, metrics, settings, source, checkpoints, artifact.

    Only rank 0 has a folder and writes. The other ranks call the same methods, which then do
    nothing, so that no caller has to ask.
    """

    def __init__(self, cfg: Config, ranks: Ranks) -> None:
        self.cfg = cfg
        self.ranks = ranks
        self.path: Path | None = None
        self.source = Path(__file__).read_bytes()  # once: the file may be edited while it runs
        self.larger_budgets: list[str] = []  # than the run was begun with
        self.draws = cfg.log_to == "tensorboard"
        self.curves: Any = None  # tensorboard's writer, from the first step on
        self.drawn_step = 0

    def open(self) -> None:
        """Make the folder with settings and source, or with RESUME go on in it, or Refusal."""
        name = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + os.urandom(3).hex()
        with self.ranks.together():
            if self.ranks.is_main:
                self.claim(Path(self.cfg.runs_dir, self.cfg.run_id or name))
        self.log(f"{self.path}/log.txt")

    def claim(self, folder: Path) -> None:
        """Take the folder for this process; raises Refusal if it is another run's."""
        try:
            folder.mkdir(parents=True, exist_ok=self.cfg.resume)
        except FileExistsError:
            raise Refusal(
                f"RUN_ID={folder.name}: {folder} exists already; nothing in it was "
                "touched. Choose another RUN_ID, or RESUME=1 to go on"
            ) from None
        settings, source = folder / "settings.json", folder / "train_gpt.py"
        self.refuse_other_settings(settings)
        if source.is_file() and source.read_bytes() != self.source:
            raise Refusal(f"RESUME=1: {source} began this run, and another one is running now")
        no_locks = self.lock_folder(folder)
        self.path = folder
        for torn in folder.glob(".*.partial"):  # of a process that died while it wrote
            torn.unlink()
        for log in (folder / "log.txt", folder / "metrics.jsonl"):
            if log.is_file():
                whole_lines, end, _torn = log.read_bytes().rpartition(b"\n")
                write_file(log, whole_lines + end)
        write_file(settings, json.dumps(asdict(self.cfg), indent=1).encode())
        write_file(source, self.source)
        if no_locks:
            self.log(
                f"warning: {folder} cannot be locked ({no_locks}): see to it that no other "
                "process works in it, or choose a RUNS_DIR on another file system"
            )

    def lock_folder(self, folder: Path) -> str:
        """Keep other processes out until this one ends, however it does; Refusal if one is in.

        Returns why the file system has no locks, where it has none: a lock is a precaution.
        """
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"RUN_ID={folder.name}: another process is at work in {folder}") from None
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def refuse_other_settings(self, path: Path) -> None:
        """Raise Refusal if the run that wrote these settings was to give another result.

        It may go on for longer than it was to: a larger budget is noted in larger_budgets.
        """
        if not path.is_file():
            return
        try:
            theirs = dict(json.loads(path.read_bytes()))
        except MALFORMED:
            raise Refusal(f"RESUME=1: {path} is damaged: begin a new run") from None
        for name in sorted(settings_of_reach("training", "model", "scoring")):
            ours, before = getattr(self.cfg, name), theirs.get(name)
            if ours == before:
                continue
            if name in BUDGETS and isinstance(before, int | float) and 0 < before < ours:
                self.larger_budgets.append(
                    f"{name.upper()}={show_setting(ours)}, begun with {show_setting(before)}"
                )
                continue
            raise Refusal(
                f"RESUME=1: {name.upper()}={show_setting(ours)}, but the run in {path.parent} has "
                f"{show_setting(before)}; only a budget may grow (INIT_FROM begins a new run with "
                "its weights)"
            )

    def save_checkpoint(self, state: dict) -> None:
        """Write checkpoint_<step>.pt, whole or not at all, and keep the newest two."""
        if self.path is None:
            return
        packed = io.BytesIO()
        torch.save(state, packed)
        write_file(self.path / f"checkpoint_{state['step']}.pt", packed.getbuffer())
        for old in self.checkpoints()[2:]:
            old.unlink()
        self.log(f"checkpoint step:{state['step']} bytes:{packed.tell()}")

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, newest first; other names are somebody's own."""
        by_step = {}
        for path in self.path.iterdir() if self.path is not None else ():
            if name := re.fullmatch(r"checkpoint_(\d+)\.pt", path.name):
                by_step[int(name[1])] = path
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def last_checkpoint(self) -> dict | None:
        """The newest checkpoint that can be read, on every rank; None to begin anew."""
        content = b""
        for path in self.checkpoints() if self.cfg.resume else ():
            try:
                content = read_checkpoint(path)
                break
            except Exception as error:  # what torch.load raises is not told
                self.log(f"warning: {path} cannot be read ({error}); trying the one before")
        content = self.ranks.broadcast(content)
        # By way of the CPU: what one GPU saved, all ranks would put on that one.
        return torch.load(io.BytesIO(content), "cpu", weights_only=True) if content else None

    def append(self, name: str, text: str) -> None:
        """Add text to a file of the run folder, if there is one yet."""
        if self.path is not None:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(text)

    def log(self, template: str, event: str = "", **facts: object) -> None:
        """Write a line, unless empty, to console and log.txt, and an event to metrics.jsonl."""
        if not self.ranks.is_main:
            return
        if template:
            line = template.format(**facts) if facts else template
            say(line)
            self.append("log.txt", line + "\n")
        if event:
            self.append("metrics.jsonl", json.dumps({"event": event, **facts}) + "\n")
            self.draw(event, facts)

    def draw(self, event: str, facts: dict[str, Any]) -> None:
        """Add the numbers of a step or a score to tensorboard's curves, with LOG_TO.

        Curves are never essential: without them the run goes on.
        """
        if not self.draws or self.path is None or event not in ("step", "eval"):
            return
        self.drawn_step = facts["step"] or self.drawn_step  # 0: a score after training
        try:
            if self.curves is None:
                self.curves = tensorboard_writer()(self.path / "tensorboard", flush_secs=10)
            for name, value in facts.items():
                if isinstance(value, int | float) and name not in ("step", "legal"):
                    tag = f"{facts.get('name', event)}/{name}"
                    self.curves.add_scalar(tag, value, self.drawn_step)
        except Exception as error:  # what another package raises is not told
            self.draws = False
            self.curves = None
            kind = type(error).__name__
            self.log(f"warning: tensorboard's event files end here ({kind}: {error})")

    def close(self) -> None:
        """Write out the numbers that tensorboard's writer still holds."""
        with contextlib.suppress(Exception):
            if self.curves is not None:
                self.curves.close()

    def progress(self, label: str, **how: Any) -> tqdm:
        """A progress bar with ETA on rank 0's terminal; silent where there is no terminal."""
        return tqdm(
            desc=label,
            leave=False,
            disable=None if self.ranks.is_main else True,
            unit_scale=True,
            dynamic_ncols=True,
            **how,
        )


def read_checkpoint(path: Path) -> bytes:
    """The bytes of a checkpoint that torch.load can read; raises whatever shows that it cannot."""
    content = path.read_bytes()
    archive = zipfile.ZipFile(io.BytesIO(content))
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("it is compressed, which torch does not do")  # and may hold any amount
    damaged = archive.testzip()  # torch checks no sums
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    torch.load(io.BytesIO(content), "cpu", weights_only=True)
    return content


def tensorboard_writer() -> Any:
    """torch's writer of tensorboard's event files; raises Refusal without that package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # it is optional, and may be of a version that torch cannot use
        raise Refusal(
            "LOG_TO=tensorboard needs the Python package tensorboard: pip install tensorboard "
            f"({error})"
        ) from None
    return SummaryWriter


class Ledger:
    """What a run used and did: its clocks, when each technique acted, and if it may be a record."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.training_clock = Clock()  # training and calibration
        self.scoring_clock = Clock()
        self.table_clock = Clock(time.process_time)  # processor time of counts and their mixture
        self.trained_seconds = 0.0  # of the training clock, before calibration
        self.training_operations = 0  # counted, in training and calibration
        self.scoring_operations = 0
        self.calibration_tokens = 0
        # By technique: how often it could have acted, and how often it did.
        self.occasions = Counter[str]()
        self.activity = Counter[str]()
        self.ineligible: list[str] = []  # reasons

    def note(self, name: str, acted: bool) -> None:
        """Count an occasion on which a technique that is configured may act, and whether it did."""
        self.occasions[name] += 1
        self.activity[name] += int(acted)

    def mark_ineligible(self, reason: str) -> None:
        """Note why the run cannot stand as a record."""
        self.ineligible.append(reason)
        self.folder.log(f"warning: not eligible as a record: {reason}")

    def log_activity(self) -> None:
        """Log how often each scheduled technique was active; warn of any that never was."""
        for name, occasions in self.occasions.items():
            self.folder.log(
                "activity {name} steps:{steps} of:{of}",
                "activity",
                name=name,
                steps=self.activity[name],
                of=occasions,
            )
            if not self.activity[name]:
                self.folder.log(f"warning: {name} was configured and never acted")


class Run:
    """One process of a run: its settings and device, its ranks, its run folder, its ledger."""

    def __init__(
        self,
        cfg: Config,
        rank: int,
        world_size: int,
        device: torch.device,
        store: dist.Store | None = None,
    ) -> None:
        self.cfg = cfg
        self.device = device
        self.ranks = Ranks(
            rank,
            world_size,
            device,
            split_stacks=cfg.muon_parallel,
            watchdog_seconds=cfg.watchdog_seconds,
            store=store,
        )
        self.folder = RunFolder(cfg, self.ranks)
        self.ledger = Ledger(self.folder)
        self.phase = "starting"  # what the run is at; a message names it if the run fails
        self.signals: list[int] = []  # that asked training to end
        self.continued = False  # whether it goes on after it was stopped, by Ctrl-Z or a scheduler
        # Of one forward and backward, where MICRO_BATCH_SEQS does not say.
        tokens_at_once = 98_304 if device.type == "cuda" else 8_192
        self.micro_batch_rows = cfg.micro_batch_seqs or max(1, tokens_at_once // cfg.train_seq_len)

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations: bf16 on a GPU, float32 on a CPU: few multiply bf16 natively."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def compiled(self) -> bool:
        """Whether the whole forward is compiled."""
        if self.cfg.compile == "auto":
            return self.device.type == "cuda"
        return self.cfg.compile == "1"

    @property
    def adaptation_rows(self) -> int:
        """Rows of a rank in a step of test-time training."""
        return -(-self.cfg.ttt_batch_seqs // self.ranks.world_size)

    @property
    def scored_rows(self) -> int:
        """Windows that are scored at once, of a batch of EVAL_BATCH_SEQS."""
        if self.device.type != "cpu":
            return self.cfg.eval_batch_seqs
        return min(self.cfg.eval_batch_seqs, max(1, CACHED_TOKENS // self.cfg.eval_seq_len))

    def with_settings(self, cfg: Config) -> Run:
        """The same process, ranks, folder and ledger under other settings."""
        other = copy.copy(self)
        other.cfg = cfg
        return other

    @classmethod
    @contextlib.contextmanager
    def start(cls, cfg: Config) -> Iterator[Run]:
        """Open the process group that torchrun's environment describes, if any; close it after."""
        run = cls(cfg, *join_ranks(cfg))
        before = handle_end_signals(run.on_signal)
        if before:
            before[signal.SIGCONT] = signal.signal(signal.SIGCONT, run.on_continue)
        try:
            yield run
        except Refusal:
            raise
        except Exception as error:
            run.tell_failure(error)
            raise SystemExit(EXIT_FAILED) from None
        finally:
            run.folder.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()

    def tell_failure(self, error: Exception) -> None:
        """Say in one line on the console what failed, and in log.txt where."""
        text = f"{type(error).__name__}: " + str(error).strip().split("\n")[0]
        if self.ranks.store is not None and "timed out" in str(error).lower():
            absent = self.ranks.absent()
            text = f"waited {self.cfg.watchdog_seconds:g} s; not there: rank {absent}"
        line = f"error: rank {self.ranks.rank}, during {self.phase}: {text}"
        say(line, to_stderr=True)
        with contextlib.suppress(OSError):  # a full disk has been named already
            self.folder.append("log.txt", "".join(traceback.format_exception(error)))

    @property
    def signal(self) -> int:
        """The number of the signal that asked training to end; 0 if none did."""
        return self.signals[0] if self.signals else 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask training to write a checkpoint and end; anywhere else, or asked again, end now."""
        insists = number in self.signals and number in (signal.SIGINT, signal.SIGTERM)
        if self.phase != "training" or insists:
            self.stop(number, f"during {self.phase}; what the run folder holds was kept")
        # One that came before the end asks no more: a CPU limit's signal comes every second, and
        # who closes a terminal may send two kinds.
        self.signals.append(number)

    def on_continue(self, number: int, frame: FrameType | None) -> None:
        """Note that the process was stopped for a while, and goes on."""
        self.continued = True

    def stop(self, number: int, situation: str) -> None:
        """End the process because of a signal."""
        if self.ranks.is_main:
            say(f"error: {signal.Signals(number).name} {situation}", to_stderr=True)
        raise SystemExit(128 + number)

    def settle(self) -> None:
        """Wait until the GPU has done what was asked of it, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def put(self, x: Tensor) -> Tensor:
        """`x` of the host on the run's device; only what lies together goes without waiting."""
        pinned = x.contiguous().pin_memory() if self.device.type == "cuda" else x
        return pinned.to(self.device, non_blocking=True)

    def fetch(self, x: Tensor) -> Callable[[], list[float]]:
        """Start to copy `x` to the host; what waits for that, and for no later work, gives it."""
        if self.device.type != "cuda":
            return x.tolist
        host = x.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event()

        def numbers() -> list[float]:
            copied.synchronize()
            return host.tolist()

        return numbers

    def log_header(self, notes: list[str]) -> None:
        """Log what this run takes: settings, versions, machine, source."""
        log, source = self.folder.log, self.folder.source
        name = f"{torch.get_num_threads()} threads of {processor()}"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name()
        log("\n".join((*notes, *self.cfg.listing())))
        log(
            "versions python:{python} torch:{torch} numpy:{numpy} sentencepiece:{sp} "
            "zstandard:{zstd}",
            "versions",
            python=sys.version.split()[0],
            torch=torch.__version__,
            numpy=np.__version__,
            sp=sentencepiece.__version__,
            zstd=zstandard.__version__,
        )
        log(
            "machine device:{device} name:{name} world_size:{world_size} dtype:{dtype} "
            "compiled:{compiled}",
            "machine",
            device=self.device.type,
            dtype=str(self.dtype),
            name=name,
            world_size=self.ranks.world_size,
            compiled=self.compiled,
        )
        log(
            "source sha256:{sha256} bytes:{num_bytes}",
            "source",
            num_bytes=len(source),
            sha256=hashlib.sha256(source).hexdigest(),
        )


def refuse_odd_ranks(rank: int, local_rank: int, world_size: int, here: int) -> None:
    """Raise Refusal if what a launcher says of this process cannot be."""
    if rank >= world_size:
        raise Refusal(
            f"RANK={rank}, WORLD_SIZE={world_size}: ranks go from 0 to WORLD_SIZE - 1; start "
            "the processes with torchrun, or a single one without these variables"
        )
    if "LOCAL_WORLD_SIZE" in os.environ and not local_rank < here <= world_size:
        raise Refusal(
            f"LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={here}, WORLD_SIZE={world_size}: expected "
            "LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE; torchrun sets them so"
        )
    if "WORLD_SIZE" in os.environ:
        return
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if os.environ.get(name, "0") not in ("", "0"):
            raise Refusal(
                f"{name}={os.environ[name]}, but no WORLD_SIZE: each process would train alone; "
                "start one torchrun a host, or a single process"
            )


def join_ranks(cfg: Config) -> tuple[int, int, torch.device, dist.Store | None]:
    """Find the other processes: (rank, world size, device, where they found each other).

    The environment is that of torchrun; without it, the process is alone. Raises Refusal if the
    environment contradicts itself, or the others are not there.
    """
    given = {
        "RANK": os.environ.get("RANK", "0"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1"),
    }
    if not all(map(str.isdecimal, given.values())):
        raise Refusal(
            f"{', '.join(given)} are {[*given.values()]}: expected "
            "whole numbers; torchrun sets them, a single process needs none"
        )
    rank, local_rank, world_size, here = map(int, given.values())
    refuse_odd_ranks(rank, local_rank, world_size, here)
    device = pick_device(local_rank, world_size, here)
    asked = os.environ.get("OMP_NUM_THREADS") == "1" and "MKL_NUM_THREADS" not in os.environ
    if device.type == "cpu" and here > 1 and asked:
        # What torchrun sets, whatever the cores; one thread by choice takes MKL_NUM_THREADS.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    if world_size == 1:
        return rank, world_size, device, None
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        said = str(error).strip().split("\n")[0]
        raise Refusal(
            f"WORLD_SIZE={world_size}, but the processes do not find each other "
            f"({said}); torchrun sets up all that they need"
        ) from None
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):  # torchrun on one host
        # Its store outlives a restart: what dead processes left there must not be found.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=cfg.watchdog_seconds),
    )
    return rank, world_size, device, store


def pick_device(local_rank: int, world_size: int, here: int) -> torch.device:
    """The device of one of `here` processes on this host; Refusal without a GPU for each."""
    if torch.cuda.is_available():
        if here > (gpus := torch.cuda.device_count()):
            raise Refusal(
                f"{here} processes on this host, but it has {gpus} GPU(s): start one "
                "process for each (--nproc_per_node)"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available() and world_size == 1:
        return torch.device("mps")
    return torch.device("cpu")


def processor() -> str:
    """What the CPU calls itself; its architecture where the system does not say."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# =================================================================================================
# Data
# A shard is 256 little-endian int32 (magic, version, token count, zeros) and then the tokens as
# uint16. Documents begin with BOS and nothing else separates them.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class DataSettings(Part):
    """Where the text is, and how it is cut into training rows."""

    title = "Data"

    data_path: str = run_knob(
        "./data/datasets/fineweb10B_sp1024", (), "Folder of the training and validation shards."
    )
    tokenizer_path: str = run_knob(
        "./data/tokenizers/fineweb_1024_bpe.model", (), "The shards' SentencePiece model."
    )
    loader: str = training_knob(
        "shuffled", ("shuffled", "sequential"), "Order in which training rows are read."
    )
    train_batch_tokens: int = training_knob(
        786432, (2, 1 << 30), "Tokens a training step, over all ranks."
    )
    train_seq_len: int = training_knob(2048, (2, 1 << 20), "Tokens a training row.")
    doc_max_len: int = training_knob(
        0,
        (0, 1 << 20),
        "Tokens after which ATTN_DOCS=1 cuts a document; 0 cuts where a row ends.",
        tries=(5,),
    )
    micro_batch_seqs: int = training_knob(
        0, (0, 1 << 20), "Rows a forward; 0 takes 98,304 tokens, on a CPU 8,192."
    )

    @property
    def rows_per_step(self) -> int:
        """Rows of a step's global batch."""
        return self.train_batch_tokens // self.train_seq_len

    @property
    def longest_document(self) -> int:
        """Tokens of a document that attention reaches across in training, at most."""
        return self.doc_max_len or self.train_seq_len

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A batch is a whole number of rows."""
        yield (
            cfg.train_batch_tokens % cfg.train_seq_len == 0,
            "TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN",
        )


SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES, TOKEN_BYTES = 20240520, 1, 1024, 2
BOS = 1
# Training shards up to this many tokens in all are searched for bad ids before the run; larger
# sets are searched in their first million tokens each, and batch by batch as they are used.
FULL_SCAN_TOKENS, SCAN_TOKENS = 200_000_000, 1 << 20
SIDECAR = "fineweb_val.json"


OPEN_SHARDS = 128  # training shards that stay mapped; macOS allows a process 256 files


def open_shard(path: Path, vocab_size: int, scan_tokens: int | None = None) -> np.memmap:
    """Memory-map a shard's tokens, uint16 (n,); raises Refusal unless header, size and ids fit."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise Refusal(
            f"{path}: not a token shard (expected magic {SHARD_MAGIC}, version "
            f"{SHARD_VERSION}); make it again with data/prepare.py"
        )
    count = int(header[2])
    if size != SHARD_HEADER_BYTES + TOKEN_BYTES * count or count < 1:
        raise Refusal(
            f"{path}: {size:,} bytes do not hold the {count:,} tokens that its header "
            "promises: delete it and run data/prepare.py again"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))
    check_ids(tokens[:scan_tokens], vocab_size, str(path))
    return tokens


def refuse_cut_shard(tokens: np.memmap) -> None:
    """Raise RuntimeError if the file is shorter now: reading on would end the process by SIGBUS."""
    size = tokens.base.size()  # type: ignore[union-attr, operator]  # its base is an mmap
    if size < SHARD_HEADER_BYTES + tokens.nbytes:
        raise RuntimeError(f"{tokens.filename} was cut short while the run read it")


def check_ids(tokens: np.ndarray, vocab_size: int, where: str, error: type = Refusal) -> None:
    """Raise `error` if a token id is outside the vocabulary."""
    if (largest := int(tokens.max())) >= vocab_size:
        raise error(
            f"{where}: token id {largest} is outside VOCAB_SIZE={vocab_size}; "
            "the shards belong to another tokenizer"
        )


def shard_paths(folder: str, split: str) -> list[Path]:
    """The shards of a split in order; raises Refusal if there are none."""
    # Beside fineweb_val_000000.bin there may be fineweb_val_bytes_000000.bin.
    if paths := sorted(Path(folder).glob(f"fineweb_{split}_[0-9]*.bin")):
        return paths
    raise Refusal(f"DATA_PATH={folder}: no fineweb_{split}_*.bin; data/prepare.py makes them")


@dataclass
class Batch:
    """Rows of tokens, and what is asked about them; what has no use in a batch is None.

    B rows of T tokens; targets of all places, or of the S places of each row that are asked for.
    """

    input_ids: Tensor  # int64 (B, T)
    target_ids: Tensor  # int64 (B, T), or (B, S) with `places`
    places: Tensor | None = None  # int64 (B, S), positions in the row whose targets are asked for
    documents: Tensor | None = (
        None  # int64 (B, T), see document_numbers(): inside it attention acts
    )
    boundaries: Tensor | None = None  # int32 (N,), see document_boundaries()
    scored: Tensor | None = None  # int64 like target_ids: 1 where a target counts, 0 where not
    target_bytes: Tensor | None = None  # int64 like target_ids: UTF-8 bytes of each target
    hint_ids: Tensor | None = None  # int64 like target_ids: whose logit NGRAM_TILT raises, or -1

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors as `move` gives it, on a device, say."""
        given = ((column.name, getattr(self, column.name)) for column in fields(self))
        return Batch(**{name: move(x) for name, x in given if x is not None})

    def by_document(self, longest: int) -> Batch:
        """The batch with attention kept inside documents, cut after `longest` tokens."""
        documents = document_numbers(self.input_ids, longest)
        return replace(self, documents=documents, boundaries=document_boundaries(documents))


def document_numbers(input_ids: Tensor, longest: int) -> Tensor:
    """The number of each token's document, counted through all rows: int64 (B, T).

    A document begins with BOS, with a row, and `longest` tokens after it began.
    """
    places = torch.arange(input_ids.size(1), device=input_ids.device)
    begins = (input_ids == BOS) | (places == 0)
    first = torch.where(begins, places, 0).cummax(1).values
    begins = (places - first) % longest == 0
    return begins.flatten().cumsum(0).view_as(input_ids) - 1


def document_boundaries(documents: Tensor) -> Tensor:
    """Where documents begin in the rows laid end to end, and the end of all: int32 (N,).

    The end is repeated up to a multiple of 64, or every batch would need a compiled graph of its
    own.
    """
    lengths = documents.flatten().bincount()
    ends = lengths.cumsum(0)
    padding = 64 - (len(ends) + 1) % 64
    ends = F.pad(ends, (1, 0))
    return F.pad(ends, (0, padding), value=documents.numel()).to(torch.int32)


class TrainingRows:
    """Training rows of T+1 tokens, numbered from 0 without end; the same for every world size.

    sequential: row n is the stream's tokens from n T on, shards joined in order and wrapped.
    shuffled: each epoch is a random permutation of all blocks of T tokens inside a shard, by SEED.
    """

    def __init__(self, cfg: Config) -> None:
        paths = shard_paths(cfg.data_path, "train")
        total = sum(path.stat().st_size // TOKEN_BYTES for path in paths)
        self.scan_tokens = None if total <= FULL_SCAN_TOKENS else SCAN_TOKENS
        self.shards = paths
        self.opened: dict[int, np.memmap] = {}  # by number, the one longest open first
        self.seq_len, self.seed, self.vocab_size = cfg.train_seq_len, cfg.seed, cfg.vocab_size
        self.shuffled = cfg.loader == "shuffled"
        self.longest_document = cfg.longest_document if cfg.attn_docs else 0
        sizes = []
        for number, path in enumerate(paths):
            tokens = open_shard(path, cfg.vocab_size, self.scan_tokens)
            sizes.append(len(tokens))
            self.keep_open(number, tokens)
        self.first_token = np.cumsum([0, *sizes])
        self.first_block = np.cumsum([0, *((size - 1) // self.seq_len for size in sizes)])
        self.num_tokens, self.num_blocks = int(self.first_token[-1]), int(self.first_block[-1])
        self.epoch = -1
        self.order: np.ndarray = np.empty(0, np.uint32)  # of the epoch's blocks
        if not self.num_blocks:
            raise Refusal(
                f"DATA_PATH={cfg.data_path}: no shard holds a row of "
                f"TRAIN_SEQ_LEN={self.seq_len} tokens and one more"
            )

    def batch(self, first_row: int, num_rows: int) -> Batch:
        """Input and target ids of rows first_row, first_row + 1, ...: int64 (num_rows, T) each."""
        for tokens in self.opened.values():
            refuse_cut_shard(tokens)
        rows = np.stack([self.row(n) for n in range(first_row, first_row + num_rows)])
        # Too late to refuse: the run has begun.
        check_ids(rows, self.vocab_size, "training shards", RuntimeError)
        ids = torch.from_numpy(rows.astype(np.int64))
        batch = Batch(ids[:, :-1], ids[:, 1:])
        return batch.by_document(self.longest_document) if self.longest_document else batch

    def first_tokens(self, count: int) -> np.ndarray:
        """The first tokens of the shards in their order, at most `count`: uint16 (n,)."""
        found: list[np.ndarray] = []
        left = count
        for number in range(len(self.shards)):
            if left == 0:
                break
            found.append(np.asarray(self.tokens_of(number)[:left]))
            left -= len(found[-1])
        return np.concatenate(found)

    def keep_open(self, number: int, tokens: np.memmap) -> None:
        """Keep a shard open, and of many only the last few: a process may have 256 files open."""
        self.opened[number] = tokens
        if len(self.opened) > OPEN_SHARDS:
            del self.opened[next(iter(self.opened))]

    def tokens_of(self, number: int) -> np.memmap:
        """A shard's tokens, uint16 (n,); opened again if it was not kept open."""
        if number not in self.opened:
            try:
                tokens = open_shard(self.shards[number], self.vocab_size, 1)
            except Refusal as refusal:  # too late to refuse: the run has begun
                raise RuntimeError(str(refusal)) from None
            if len(tokens) != self.first_token[number + 1] - self.first_token[number]:
                raise RuntimeError(f"{self.shards[number]} has changed since the run began")
            self.keep_open(number, tokens)
        return self.opened[number]

    def row(self, n: int) -> np.ndarray:
        """Row n as uint16 (T+1,)."""
        if not self.shuffled:
            return self.take(n * self.seq_len % self.num_tokens)
        epoch, position = divmod(n, self.num_blocks)
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.epoch, self.order = (
                epoch,
                generator.permutation(np.arange(self.num_blocks, dtype=np.uint32)),
            )
        block = int(self.order[position])
        shard = int(np.searchsorted(self.first_block, block, side="right")) - 1
        start = (block - int(self.first_block[shard])) * self.seq_len
        return self.tokens_of(shard)[start : start + self.seq_len + 1]

    def take(self, start: int) -> np.ndarray:
        """T+1 tokens of the circular stream from token `start` on, uint16 (T+1,)."""
        at = (start + np.arange(self.seq_len + 1)) % self.num_tokens
        shards, row = np.searchsorted(self.first_token, at, side="right") - 1, at.astype(np.uint16)
        for shard in np.unique(shards):
            here = shards == shard
            row[here] = self.tokens_of(int(shard))[at[here] - self.first_token[shard]]
        return row


def piece_bytes(tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes each token stands for, and the saving of those that open a document.

    A piece counts its UTF-8 length with every U+2581 read as one space, a byte piece 1, a
    control, unknown or unused piece 0. A tokenizer with a dummy prefix puts a space before each
    document that is not in the text: the first piece after BOS counts one less.
    """
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())]
    no_text = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused)
    counts = [
        1
        if tokenizer.is_byte(token)
        else 0
        if any(kind(token) for kind in no_text)
        else len(piece.replace("\u2581", " ").encode())
        for token, piece in enumerate(pieces)
    ]
    prefixed = tokenizer.encode("a", out_type=str)[0].startswith("\u2581")
    opening = [prefixed and piece.startswith("\u2581") for piece in pieces]
    return np.array(counts, np.int16), np.array(opening, np.int16)


def piece_prefixes(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """For each token the one with the longest text that begins its own; itself where none does.

    Only whole pieces count: a byte, control, unknown or unused piece neither begins one nor is
    begun. Returns int64 (V,).
    """
    no_text = (
        tokenizer.is_control,
        tokenizer.is_unknown,
        tokenizer.is_unused,
        tokenizer.is_byte,
    )
    token_of = {
        tokenizer.id_to_piece(token): token
        for token in range(tokenizer.vocab_size())
        if not any(kind(token) for kind in no_text)
    }
    prefixes = np.arange(tokenizer.vocab_size())
    for text, token in token_of.items():
        shorter = (text[:end] for end in range(len(text) - 1, 0, -1))
        prefixes[token] = next((token_of[t] for t in shorter if t in token_of), token)
    return prefixes


# CaseOps: a tokenizer may know words in lower case only. Marks then say where the text has
# capitals, and a file beside the shards how many bytes of the text each token stands for.
# (parameter-golf, lossless_caps_caseops_v1; data/caseops.py has the definition)
TITLE, ALLCAPS, CAPNEXT, ESC = MARKS = "\ue001\ue002\ue003\ue004"
WORD_OR_MARK = re.compile(f"[A-Za-z]+|[{MARKS}]")
MARKED = re.compile(
    f"{ESC}(?P<literal>.)|{ALLCAPS}(?P<word>[a-z]+)|[{TITLE}{CAPNEXT}](?P<letter>[a-z])|[{MARKS}]",
    re.DOTALL,
)


def marks_capitals(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a tokenizer has pieces for the marks, so that its text is a marked one."""
    return all(tokenizer.piece_to_id(mark) != tokenizer.unk_id() for mark in MARKS)


def mark_word(found: re.Match[str]) -> str:
    """A run of ASCII letters with marks before its capitals, or a mark of the text itself."""
    word = found[0]
    if word in MARKS:
        return ESC + word
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    marked = re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), word)
    return TITLE + marked[1:] if word[0].isupper() else marked


def unmark(found: re.Match[str]) -> str:
    """What a mark and its letters stand for; nothing where a model wrote a mark before neither."""
    capitals = found["letter"] or found["word"] or ""
    return found["literal"] or capitals.upper()


def encode_text(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """A text's tokens, its capitals marked if the tokenizer is one for that."""
    if marks_capitals(tokenizer):
        text = WORD_OR_MARK.sub(mark_word, text)
    return tokenizer.encode(text)


def decode_text(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int]) -> str:
    """The text of tokens, with capitals again where they are marked."""
    text = tokenizer.decode(ids)
    return MARKED.sub(unmark, text) if marks_capitals(tokenizer) else text


@dataclass(frozen=True)
class Validation:
    """A validation split that agrees with its sidecar and tokenizer."""

    tokens: np.ndarray  # uint16 (N,)
    target_bytes: np.ndarray  # uint16 (N-1,), of tokens[1:], the targets
    fingerprint: str
    tokenizer_sha256: str
    documents: int
    recorded_bytes: int
    forbidden: np.ndarray | None = None  # bool (V, V), with TOKEN_MASK: pairs never emitted
    prefixes: np.ndarray | None = None  # int64 (V,), with PREFIX_TARGET: see piece_prefixes()
    accounting: str = ""  # what is to be said of bytes that are not those of the pieces

    def num_targets(self, cfg: Config) -> int:
        """Targets to score: every token but the first, or those of full rows (EVAL_TRUNCATE)."""
        targets = len(self.tokens) - 1
        return targets - targets % cfg.eval_seq_len if cfg.eval_truncate else targets


def read_sidecar(folder: str) -> dict:
    """What data/prepare.py recorded of a validation split, and its fingerprint; or Refusal."""
    path = Path(folder, SIDECAR)
    if not path.is_file():
        raise Refusal(
            f"{path} is missing: data/prepare.py adopt --data {path.parent} --tokenizer FILE "
            "makes it from the shards"
        )
    with contextlib.suppress(*MALFORMED):
        facts = json.loads(path.read_bytes())
        caseops = facts.get("caseops", {"val_bytes": {}})
        facts["files"] = {**facts["val_shards"], **caseops["val_bytes"]}
        facts["counted_by_file"] = bool(caseops["val_bytes"])
        facts["published_bytes"] = caseops.get("published_bytes")
        hashes = "".join(sha256 for _, sha256 in sorted(facts["files"].items()))
        facts["fingerprint"] = hashlib.sha256(hashes.encode()).hexdigest()  # one name for them
        if isinstance(facts["tokenizer"]["sha256"], str) and type(facts["encoded_bytes"]) is int:
            return facts
    raise Refusal(f"{path} is damaged: delete it and run data/prepare.py again")


def load_tokenizer(cfg: Config, recorded: dict) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The tokenizer that a sidecar records, and its sha256; raises Refusal if it is another one."""
    path = Path(cfg.tokenizer_path)
    if path.read_bytes().lstrip().startswith(b"{"):
        raise Refusal(
            f"TOKENIZER_PATH={path} is a tokenizer in JSON, as of Hugging Face; only a "
            "SentencePiece model will do, whose pieces say how many bytes a token stands for and "
            f"whose BOS is id {BOS}: data/prepare.py text FILES trains one on your text"
        )
    sha256 = sha256_of(path)
    if sha256 != recorded["sha256"]:
        raise Refusal(
            f"TOKENIZER_PATH={path} (sha256 {sha256[:12]}) is not the "
            f"shards' tokenizer, sha256 {recorded['sha256'][:12]}"
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise Refusal(f"{path}: not a SentencePiece model ({error})") from None
    if tokenizer.vocab_size() != cfg.vocab_size or tokenizer.bos_id() != BOS:
        raise Refusal(
            f"TOKENIZER_PATH={path} has {tokenizer.vocab_size()} pieces, BOS "
            f"id {tokenizer.bos_id()}; expected VOCAB_SIZE={cfg.vocab_size} and {BOS}"
        )
    return tokenizer, sha256


def bytes_by_piece(
    tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor
) -> np.ndarray:
    """The bytes of text that each token stands for, by its piece: uint16 (N,)."""
    counts, opening = piece_bytes(tokenizer)
    token_bytes = counts[tokens]
    token_bytes[1:] -= opening[tokens[1:]] * (tokens[:-1] == BOS)
    return token_bytes.astype(np.uint16)


def byte_shard(path: Path) -> Path:
    """The file that counts the bytes of a validation shard's tokens, where there is one."""
    return path.with_name(path.name.replace("val_", "val_bytes_"))


def bytes_by_file(paths: list[Path]) -> np.ndarray:
    """The bytes of the original text that each token of some shards stands for: uint16 (N,)."""
    counts = []
    for path in paths:
        counts.append(open_shard(byte_shard(path), 1 << 16))
        if byte_shard(path).stat().st_size != path.stat().st_size:
            raise Refusal(
                f"{byte_shard(path)} counts the bytes of {len(counts[-1]):,} tokens, and "
                f"{path.name} has others: delete the folder and run data/prepare.py again"
            )
    return np.concatenate(counts)


def published_accounting(sidecar: dict) -> str:
    """What is to be said of bytes counted by file: the published accounting leaves some out."""
    counted, published = sidecar["encoded_bytes"], sidecar["published_bytes"]
    if type(published) is not int:
        return f"{counted:,} by file; whether it leaves ends of documents out is not recorded"
    return (
        f"{counted:,} by file, all of the original text; the published accounting leaves "
        f"{counted - published:,} out and has {published:,}"
    )


def read_split(
    cfg: Config, sidecar: dict, tokenizer: sentencepiece.SentencePieceProcessor
) -> tuple[np.ndarray, np.ndarray]:
    """The validation tokens and the bytes of each, uint16 (N,) both; raises Refusal."""
    paths = shard_paths(cfg.data_path, "val")
    files = [*paths, *map(byte_shard, paths)] if sidecar["counted_by_file"] else paths
    if {path.name: sha256_of(path) for path in files if path.is_file()} != sidecar["files"]:
        raise Refusal(
            f"the validation shards in {cfg.data_path} are not those its {SIDECAR} "
            "records; delete that folder and run data/prepare.py again"
        )
    tokens = np.concatenate([open_shard(path, cfg.vocab_size) for path in paths])
    if sidecar["counted_by_file"]:
        return tokens, bytes_by_file(paths)
    if marks_capitals(tokenizer):
        raise Refusal(
            f"TOKENIZER_PATH={cfg.tokenizer_path} marks capitals, and {SIDECAR} in "
            f"{cfg.data_path} knows no bytes of each token: data/prepare.py --caseops makes them"
        )
    return tokens, bytes_by_piece(tokens, tokenizer)


def load_validation(cfg: Config) -> Validation:
    """Read the validation split whole and check it; raises Refusal on any disagreement."""
    if not Path(cfg.tokenizer_path).is_file():
        raise Refusal(
            f"TOKENIZER_PATH={cfg.tokenizer_path}: no such file; data/prepare.py makes it"
        )
    shard_paths(cfg.data_path, "val")
    sidecar = read_sidecar(cfg.data_path)
    tokenizer, tokenizer_sha256 = load_tokenizer(cfg, sidecar["tokenizer"])
    tokens, token_bytes = read_split(cfg, sidecar, tokenizer)
    counted = int(token_bytes.sum(dtype=np.int64))
    if counted != sidecar["encoded_bytes"]:
        raise Refusal(
            f"the validation pieces in {cfg.data_path} are {counted:,} bytes, {SIDECAR} "
            f"records {sidecar['encoded_bytes']:,}: run data/prepare.py again"
        )
    forbidden = None
    if cfg.token_mask != "0":
        forbidden = forbidden_pairs(tokenizer)
        refuse_forbidden_pairs(tokens, forbidden, f"the validation split in {cfg.data_path}")
    val = Validation(
        tokens=tokens,
        target_bytes=token_bytes[1:],
        fingerprint=sidecar["fingerprint"],
        tokenizer_sha256=tokenizer_sha256,
        documents=int((tokens == BOS).sum()),
        recorded_bytes=counted,
        forbidden=forbidden,
        prefixes=piece_prefixes(tokenizer) if cfg.prefix_target else None,
        accounting=published_accounting(sidecar) if sidecar["counted_by_file"] else "",
    )
    if not val.target_bytes[: val.num_targets(cfg)].any():
        raise Refusal(
            f"{len(tokens):,} validation tokens in {cfg.data_path} leave none to score: "
            f"EVAL_SEQ_LEN={cfg.eval_seq_len}, EVAL_TRUNCATE={int(cfg.eval_truncate)}"
        )
    return val


# =================================================================================================
# Token mask
# A BPE tokenizer never emits some pairs of tokens: their text would have been merged differently.
# Their probability is taken away exactly, P'(x | context) = P(x | context) [(p, x) is allowed] /
# (1 - sum of P over forbidden tokens), p the token before x. Context beyond p decides nothing:
# a pair can stand in some text if and only if its own text, alone, is encoded as this pair.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class MaskSettings(Part):
    """Whether tokens that the tokenizer cannot emit get any probability."""

    title = "Token mask"

    token_mask: str = scoring_knob(
        "0",
        ("0", "eval", "1"),
        "Give no probability to tokens that the tokenizer cannot emit after the one before: "
        "never, in the artifact's score, in training too.",
        absent="0",
    )


# Types of pieces in a SentencePiece model; 6 is a byte.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)
BPE_MODEL = 2  # TrainerSpec.ModelType
CHECKED_PAIRS = 1 << 22  # at a time


def wire_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field of a serialised protobuf message: its number, and a number or bytes.

    Fixed-size values come as their little-endian bytes. Raises Refusal if it is no message.
    """
    at = 0

    def varint() -> int:
        """The number at this place, seven bits a byte, the lowest first."""
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise Refusal("the tokenizer is not a SentencePiece model")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        sizes = {1: 8, 5: 4}
        if kind not in sizes and kind != 2:
            raise Refusal("the tokenizer is not a SentencePiece model")
        size = varint() if kind == 2 else sizes[kind]
        if at + size > len(message):
            raise Refusal("the tokenizer is not a SentencePiece model")
        yield key >> 3, message[at : at + size]
        at += size


@dataclass(frozen=True)
class Pieces:
    """The pieces of a SentencePiece model by id, and how it encodes."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    is_bpe: bool
    byte_fallback: bool
    escapes_spaces: bool  # a space is written U+2581, so that no text holds U+0020


def read_pieces(tokenizer: sentencepiece.SentencePieceProcessor) -> Pieces:
    """What the model file says; the processor itself does not tell user-defined from others."""
    texts, scores, kinds = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, content in wire_fields(tokenizer.serialized_model_proto()):
        if number == 1 and isinstance(content, bytes):
            piece = dict(wire_fields(content))
            texts.append(bytes(piece[1]).decode("utf-8"))
            scores.append(float(np.frombuffer(bytes(piece.get(2, bytes(4))), "<f4")[0]))
            kinds.append(int(piece.get(3, NORMAL)))
        elif number == 2 and isinstance(content, bytes):
            trainer.update(wire_fields(content))
        elif number == 3 and isinstance(content, bytes):
            normalizer.update(wire_fields(content))
    return Pieces(
        texts,
        scores,
        kinds,
        is_bpe=trainer.get(3, 1) == BPE_MODEL,
        byte_fallback=bool(trainer.get(35, 0)),
        escapes_spaces=bool(normalizer.get(5, 1)),
    )


@dataclass(frozen=True)
class Edge:
    """A symbol that is at one time the last (or the first) of a token that is being merged.

    Merges are done best score first. `birth` is the worst score of the merges up to the one that
    makes the symbol, `death` the worst of those from there to the one that swallows it.
    """

    symbol: str
    birth: float
    death: float


def encode_alone(text: str, score_of: dict[str, float]) -> list[tuple[float, int]]:
    """The merges of a text in their order: score, and the place of the left symbol at that time.

    Best score first, the leftmost of equal ones; any two neighbours merge that form a piece.
    """
    symbols = list(text)
    merges: list[tuple[float, int]] = []
    while True:
        candidates = [
            (-score_of[left + right], place)
            for place, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in score_of
        ]
        if not candidates:
            return merges
        cost, place = min(candidates)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        merges.append((-cost, place))


def edges_of(text: str, merges: list[tuple[float, int]]) -> tuple[list[Edge], list[Edge]]:
    """The symbols that are the first and the last of a token, each from birth to death."""
    symbols = list(text)
    found: tuple[list[Edge], list[Edge]] = ([], [])
    births = [np.inf, np.inf]
    since = [np.inf, np.inf]
    worst = np.inf
    for score, place in merges:
        worst = min(worst, score)
        since = [min(score, lowest) for lowest in since]
        touched = (place == 0, place + 2 == len(symbols))
        ends = (symbols[0], symbols[-1])
        for side in (0, 1):
            if touched[side]:
                found[side].append(Edge(ends[side], births[side], since[side]))
                births[side] = worst
                since[side] = np.inf
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    for side in (0, 1):
        found[side].append(Edge(text, births[side], -np.inf))
    return found


@dataclass(frozen=True)
class EdgeTable:
    """All tokens that have a symbol at their end (or start): ids, births and deaths."""

    ids: np.ndarray
    births: np.ndarray
    deaths: np.ndarray


def by_symbol(edges: dict[int, list[Edge]]) -> dict[str, EdgeTable]:
    """The edges of each token, gathered by symbol."""
    gathered = defaultdict(list)
    for token, own in edges.items():
        for edge in own:
            gathered[edge.symbol].append((token, edge.birth, edge.death))
    tables = {}
    for symbol, rows in gathered.items():
        ids, births, deaths = zip(*rows, strict=True)
        tables[symbol] = EdgeTable(np.array(ids), np.array(births), np.array(deaths))
    return tables


def forbid_merges(
    forbidden: np.ndarray, score_of: dict[str, float], lasts: dict, firsts: dict
) -> None:
    """Forbid each pair of which a merge would join the end of the first and the start of the other.

    Both halves are merged in one common order, best first, those of the left first among equals. A
    merge over the boundary happens if its symbols live at one time and it is better than what would
    swallow either; against the left half it loses a tie, against the right half it wins one.
    """
    for text, score in score_of.items():
        for cut in range(1, len(text)):
            left = lasts.get(text[:cut])
            right = firsts.get(text[cut:])
            if left is None or right is None:
                continue
            own = score > left.deaths
            other = score >= right.deaths
            birth, death = left.births[own, None], left.deaths[own, None]
            births, deaths = right.births[other], right.deaths[other]
            meet = births > np.minimum(birth, death)
            meet &= birth >= np.minimum(births, deaths)
            forbidden[np.ix_(left.ids[own], right.ids[other])] |= meet


def forbid_symbols(forbidden: np.ndarray, texts: dict[int, str], defined: dict[str, int]) -> None:
    """Forbid each pair over whose boundary a user-defined symbol would be read.

    Such symbols are found before all merges, from left to right, the longest first, so one begins
    wherever its text does, except inside another one.
    """
    owners = set(defined.values())
    for symbol in defined:
        for cut in range(1, len(symbol)):
            start = symbol[:cut]
            rest = symbol[cut:]
            left = [
                token
                for token, text in texts.items()
                if (text == start if token in owners else text.endswith(start))
            ]
            right = [token for token, text in texts.items() if text.startswith(rest)]
            forbidden[np.ix_(left, right)] = True


def byte_places(known: set[str], escapes_spaces: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes beside each other in a character that is no piece (256, 256); last ones, first ones.

    Byte tokens spell what is no piece, one whole character of UTF-8 after the other.
    """
    codes = np.arange(0x110000, dtype="<u4")
    spelt = (codes < 0xD800) | (codes > 0xDFFF)  # surrogates are no characters
    spelt[[ord(character) for character in known]] = False
    if escapes_spaces:
        spelt[ord(" ")] = False
    spelling = np.frombuffer(codes[spelt].tobytes().decode("utf-32-le").encode("utf-8"), np.uint8)
    following = np.append(spelling[1:], np.uint8(0))
    goes_on = (following & 0xC0) == 0x80
    inside = np.zeros((256, 256), bool)
    inside[spelling[goes_on], following[goes_on]] = True
    last = np.zeros(256, bool)
    last[spelling[~goes_on]] = True
    first = np.zeros(256, bool)
    first[spelling[(spelling & 0xC0) != 0x80]] = True
    return inside, last, first


def forbidden_pairs(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Which tokens x (columns) no text can have after a token p (rows): bool (V, V).

    Exact for the text and byte pieces of a BPE model that reads every text; a normaliser makes some
    texts impossible, which is not used. Beside control and unknown pieces everything is allowed: a
    document may be cut anywhere. Nothing is forbidden for other kinds of model and for those with
    unused pieces, which are merged and taken apart again. Raises Refusal if it is no model.
    """
    pieces = read_pieces(tokenizer)
    size = len(pieces.texts)
    if not pieces.is_bpe or UNUSED in pieces.kinds:
        return np.zeros((size, size), bool)
    tokens = range(size)
    defined = {pieces.texts[i]: i for i in tokens if pieces.kinds[i] == USER_DEFINED}
    # Characters spell symbols before they can be merged into one.
    score_of = {pieces.texts[i]: pieces.scores[i] for i in tokens if pieces.kinds[i] == NORMAL}
    texts: dict[int, str] = {}  # of the tokens that stand for text and do occur
    firsts: dict[int, list[Edge]] = {}
    lasts: dict[int, list[Edge]] = {}
    for token in tokens:
        text = pieces.texts[token]
        if pieces.kinds[token] == USER_DEFINED:
            texts[token] = text
        if pieces.kinds[token] != NORMAL or any(symbol in text for symbol in defined):
            continue
        merges = encode_alone(text, score_of)
        if len(merges) == len(text) - 1:
            texts[token] = text
            firsts[token], lasts[token] = edges_of(text, merges)

    forbidden = np.ones((size, size), bool)
    emitted = np.array(list(texts), dtype=np.int64)
    forbidden[np.ix_(emitted, emitted)] = False
    forbid_merges(forbidden, score_of, by_symbol(lasts), by_symbol(firsts))
    forbid_symbols(forbidden, texts, defined)
    if pieces.byte_fallback:
        byte_ids = np.array([tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)])
        known = {text for text in texts.values() if len(text) == 1}
        inside, last, first = byte_places(known, pieces.escapes_spaces)
        forbidden[np.ix_(byte_ids, byte_ids)] = ~(inside | (last[:, None] & first))
        forbidden[np.ix_(emitted, byte_ids[first])] = False
        forbidden[np.ix_(byte_ids[last], emitted)] = False
    special = [i for i in tokens if pieces.kinds[i] in (CONTROL, UNKNOWN)]
    forbidden[special] = False
    forbidden[:, special] = False
    return forbidden


def check_stream(tokens: np.ndarray, forbidden: np.ndarray) -> int | None:
    """The place of the first token that may not follow the one before it; None if there is none."""
    for start in range(0, len(tokens) - 1, CHECKED_PAIRS):
        block = np.asarray(tokens[start : start + CHECKED_PAIRS + 1])
        violations = forbidden[block[:-1], block[1:]]
        if violations.any():
            return start + 1 + int(violations.argmax())
    return None


def penalties(forbidden: np.ndarray) -> Tensor:
    """What to add to logits: -inf where forbidden, else 0; bfloat16 (V, V), 2 V^2 bytes.

    Adding rows of such a table costs a CPU a tenth of what masked_fill() of a boolean one does.
    """
    table = torch.zeros(forbidden.shape, dtype=torch.bfloat16)
    return table.masked_fill_(torch.from_numpy(forbidden), -torch.inf)


def mask_tokens(model: GPT, val: Validation, device: torch.device) -> None:
    """Let a model give no probability to what the split's tokenizer cannot emit."""
    assert val.forbidden is not None
    model.penalty = penalties(val.forbidden).to(device)


def refuse_forbidden_pairs(tokens: np.ndarray, forbidden: np.ndarray, where: str) -> None:
    """Raise Refusal, naming the place, if a text holds what its tokenizer cannot emit."""
    place = check_stream(tokens, forbidden)
    if place is not None:
        raise Refusal(
            f"{where}: token {int(tokens[place])} after {int(tokens[place - 1])} at place {place} "
            "is none that the tokenizer emits, so the text was not encoded with it as a whole; "
            "TOKEN_MASK=0 goes on without the mask"
        )


# =================================================================================================
# Model
# A decoder-only transformer whose second half takes U-shaped skips from its first half. Optional
# parts have a neutral stand-in, so that every forward reads as its equation.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class ShapeSettings(Part):
    """The size of the network and its simplest choices."""

    title = "Model: shape"

    vocab_size: int = model_knob(1024, (4, 65536), "Pieces of the tokenizer.")
    num_layers: int = model_knob(11, (1, 64), "Transformer blocks.")
    model_dim: int = model_knob(512, (8, 8192), "Width of the residual stream.")
    num_heads: int = model_knob(8, (1, 128), "Query heads; their number divides MODEL_DIM.")
    num_kv_heads: int = model_knob(
        4, (1, 128), "Key and value heads; their number divides NUM_HEADS."
    )
    mlp_mult: float = model_knob(
        3.0, (0.25, 16.0), "Width of the MLP over that of the model.", tries=(2.0,)
    )
    mlp_act: str = model_knob(
        "leaky2", ("leaky2", "relu2"), "Activation of the MLP: a squared leaky or plain ReLU."
    )
    leaky_slope: float = model_knob(0.5, (0.0, 1.0), "Slope below zero of MLP_ACT=leaky2.")
    tie_embeddings: bool = model_knob(
        True, (), "Use one matrix as token embedding and output head."
    )
    logit_softcap: float = model_knob(
        30.0, (1.0, 1e4), "The bound c of logits, c tanh(z / c).", tries=(15.0,)
    )
    ln_scale: str = model_knob(
        "1", ("0", "1", "learned"), "Scale the inputs of layer l by 1/sqrt(l+1), or learn to."
    )
    tied_embed_init_std: float = training_knob(
        0.005, (0.0, 1.0), "Standard deviation of the initial token embedding."
    )
    emb_svd_init: bool = training_knob(
        False, (), "Give the initial embedding singular values that fall as k^(-1/2)."
    )
    proj_init: str = training_knob(
        "zero", ("zero", "ortho_mup"), "Initial output projections: zero, or scaled orthogonal."
    )

    @property
    def head_dim(self) -> int:
        """Width of an attention head, K."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Heads divide the width evenly."""
        yield cfg.model_dim % cfg.num_heads == 0, "MODEL_DIM must be a multiple of NUM_HEADS"
        yield cfg.num_heads % cfg.num_kv_heads == 0, "NUM_KV_HEADS must divide NUM_HEADS"


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Part):
    """What is added to the token embedding before the first layer."""

    title = "Model: token pairs"
    prefixes: ClassVar[tuple[str, ...]] = ("SMEAR_", "BIGRAM_")

    smear_enabled: bool = model_knob(
        True, (), "Blend the previous token's embedding in, by a learned gate (SmearGate)."
    )
    smear_form: str = model_knob(
        "channel",
        ("channel", "input"),
        "SmearGate's gate: one for each channel, after the first norm; or before that norm, by "
        "GATE_WINDOW channels of the token.",
        absent="channel",
    )
    smear_bos_mask: bool = model_knob(True, (), "Let SmearGate not reach across a document start.")
    bigram_vocab_size: int = model_knob(
        3072, (0, 1 << 20), "Buckets of BigramHash, an embedding of token pairs; 0 turns it off."
    )
    bigram_hash: str = model_knob("xor", ("xor", "sum"), "How BigramHash hashes a pair.")
    bigram_dim: int = model_knob(112, (1, 8192), "Width of a BigramHash bucket.")
    bigram_bos_mask: bool = model_knob(
        True, (), "Let BigramHash not reach across a document start."
    )
    bigram_init: str = training_knob(
        "zero_embed", ("zero_embed", "zero_proj"), "Which factor of BigramHash starts at zero."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """One bucket is kept for tokens without a predecessor."""
        yield cfg.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE must be 0 (off) or at least 2"


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(Part):
    """Queries, keys and what attention gives."""

    title = "Model: attention"
    prefixes: ClassVar[tuple[str, ...]] = ("ROPE_", "XSA_", "ATTN_")

    qk_gain_init: float = model_knob(1.5, (0.0, 100.0), "Initial gain of normalised queries.")
    rope_base: float = model_knob(
        10000.0, (2.0, 1e9), "Base of the rotary frequencies.", tries=(5e4,)
    )
    rope_dims: int = model_knob(
        16, (0, 1024), "Rotated dimensions of each head; 0 rotates all of them."
    )
    rope_ntk_ref: int = model_knob(
        1024, (0, 1 << 20), "Row length in tokens from which ROPE_BASE grows; 0 keeps it."
    )
    xsa_last_n: int = model_knob(
        11, (0, 64), "Number of last layers with exclusive self attention (XSA)."
    )
    attn_gate: str = model_knob(
        "none",
        ("none", "sparse", "out"),
        "Gate of each head's output by the token: sigmoid, or twice that, which starts at 1.",
        absent="none",
    )
    attn_gate_scale: float = model_knob(
        1.0, (0.01, 100.0), "Factor of what the sigmoid of ATTN_GATE is taken of.", absent=1.0
    )
    gate_window: int = model_knob(
        12, (1, 8192), "Channels that ATTN_GATE and SMEAR_FORM=input look at.", absent=12
    )
    attn_docs: bool = model_knob(
        False, (), "Keep attention inside documents, in training and in scoring.", absent=False
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Rotated dimensions come in pairs, and the NTK rule divides by their number less 2."""
        yield (
            cfg.rotary_dims % 2 == 0 and cfg.rotary_dims <= cfg.head_dim,
            f"ROPE_DIMS must be even and at most MODEL_DIM / NUM_HEADS, {cfg.head_dim}",
        )
        yield (
            cfg.rope_ntk_ref == 0 or cfg.rotary_dims > 2,
            f"ROPE_NTK_REF must be 0 (off) unless ROPE_DIMS (0: all {cfg.head_dim}) is above 2",
        )
        yield cfg.xsa_last_n <= cfg.num_layers, "XSA_LAST_N must be at most NUM_LAYERS"
        yield (
            cfg.gate_window <= cfg.model_dim or not cfg.has_input_gates,
            "GATE_WINDOW must be at most MODEL_DIM",
        )


@dataclass(frozen=True, kw_only=True)
class ValueSettings(Part):
    """What is added to the values of attention."""

    title = "Model: values"
    prefixes: ClassVar[tuple[str, ...]] = ("VE_", "VRL_")

    vrl_mode: str = model_knob(
        "off", ("off", "add", "mix"), "How layer 0's values enter later layers (VRL)."
    )
    ve_enabled: bool = model_knob(True, (), "Add an embedding of the token to some layers' values.")
    ve_dim: int = model_knob(128, (1, 8192), "Width of the value embedding's table.")
    ve_layers: str = model_knob(
        "9,10", (), "Layers with value embeddings, counted from 0, comma-separated."
    )

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Layers with value embeddings, in the order of their scales; or Refusal."""
        names = [name.strip() for name in self.ve_layers.split(",") if name.strip()]
        if len(set(names)) < len(names) or not all(re.fullmatch(r"[1-9]?\d", n) for n in names):
            raise Refusal(f"VE_LAYERS={self.ve_layers!r}: expected different numbers from 0 on")
        return tuple(map(int, names)) if self.ve_enabled else ()

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Value embeddings need layers that exist."""
        yield (
            all(layer < cfg.num_layers for layer in cfg.value_layers),
            "VE_LAYERS must all be below NUM_LAYERS",
        )


@dataclass(frozen=True, kw_only=True)
class DepthSettings(Part):
    """In which order layers are executed."""

    title = "Model: depth"
    prefixes: ClassVar[tuple[str, ...]] = ("LOOP_",)

    num_loops: int = model_knob(
        0,
        (0, 16),
        "How many more times layers LOOP_START to LOOP_END are executed.",
        absent=0,
        tries=(2,),
    )
    loop_start: int = model_knob(3, (0, 63), "First layer of the loop.", absent=3)
    loop_end: int = model_knob(5, (0, 63), "Last layer of the loop.", absent=5)
    enable_looping_at: float = training_knob(
        0.35, (0.0, 1.0), "Fraction of the run from which layers loop."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A loop has layers, and a run that reaches it."""
        if cfg.num_loops:
            yield (
                cfg.loop_start <= cfg.loop_end < cfg.num_layers,
                "NUM_LOOPS needs LOOP_START <= LOOP_END < NUM_LAYERS",
            )
            begins = "NUM_LOOPS never act: ENABLE_LOOPING_AT is"
            yield cfg.enable_looping_at < 1.0, f"{begins} the end of the run"
            last = (cfg.iterations - 1) / cfg.iterations
            yield (
                not cfg.step_driven or cfg.enable_looping_at <= last,
                f"{begins} beyond the last of ITERATIONS",
            )


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Part):
    """How layers read and write the residual stream."""

    title = "Model: residual stream"
    prefixes: ClassVar[tuple[str, ...]] = ("BACKOUT_",)

    skip_per_dim: str = model_knob(
        "1", ("0", "1", "off"), "U-Net skips with a weight for each channel, for each layer; none."
    )
    skip_gates: bool = model_knob(
        False, (), "Let a learned gate weigh each skip against the stream.", absent=False
    )
    parallel_start_layer: int = model_knob(
        0,
        (0, 63),
        "First of the layers whose attention and MLP work on two lanes side by side; 0 has none.",
        absent=0,
        tries=(2,),
    )
    backout_mode: str = model_knob(
        "none", ("none", "mid", "cache"), "Which layer's output is subtracted before the head."
    )
    cache_layer: int = model_knob(
        7, (0, 63), "Layer that BACKOUT_MODE=cache keeps; later attention reads it as well."
    )
    backout_init: float = training_knob(
        0.2, (-1.0, 1.0), "Initial weight of the backout.", tries=(0.0,)
    )
    resid_mix_init: str = training_knob(
        "identity", ("identity", "phase"), "Initial weight of the embedding in a layer's input."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """The last layer's output is the stream itself."""
        yield (
            cfg.backout_layer < cfg.num_layers - 1,
            "BACKOUT_MODE (CACHE_LAYER) needs a layer of NUM_LAYERS after the one it keeps",
        )


RMS_EPS = 1.1920929e-07  # float32 machine epsilon, whatever the activation type
BIGRAM_CURRENT, BIGRAM_PREVIOUS = 36313, 27191
AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """scale x / sqrt(mean(x^2) + eps) over the last dimension."""
    if x.device.type == "cpu":
        return RmsNorm.apply(x, scale)
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS) * scale


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A float32 gain or gate in the type of the activations it meets."""
    return parameter.to(x.dtype)


# What a parameter is. Start, optimizer, rounding and storage go by it, never by a name.

Start = Callable[[Tensor, "Config"], object]  # fills a parameter with its initial value
Shape = tuple[int, ...]
Made = TypeVar("Made", bound=Tensor)


@dataclass(frozen=True)
class Kind:
    """What a parameter is; it decides how the parameter starts, learns and is stored."""

    name: str  # its row in ROUTES, which says how it learns
    role: str  # its row in BITS and CLIP_SIGMAS
    fits: Callable[[Shape, Config], bool]  # whether a parameter of this kind can have a shape
    expected: str  # the shapes that fit, in words
    start: Start | None = None  # None leaves the value that the parameter was made with
    may_be_integers: bool = False  # in the artifact; whether it is decided by BITS and its size
    may_be_rounded: bool = False  # in training, by QAT
    inputs_of: str = ""  # the matrix beside it that has the same inputs, and so the same Hessian


def is_matrix(shape: Shape, cfg: Config) -> bool:
    """Whether it leads from one width of the network to another."""
    kv_width = cfg.num_kv_heads * cfg.head_dim
    widths = (cfg.model_dim, kv_width, cfg.mlp_dim, cfg.bigram_dim, cfg.ve_dim)
    return len(shape) == 2 and all(side in widths for side in shape)


def is_table(shape: Shape, cfg: Config) -> bool:
    """Whether it has a row for each token, or for each bucket of token pairs."""
    return len(shape) == 2 and shape[0] in (cfg.vocab_size, cfg.bigram_vocab_size)


def is_vector(shape: Shape, cfg: Config) -> bool:
    """Whether it is a number or a row of numbers."""
    return len(shape) < 2


def is_rows(shape: Shape, cfg: Config) -> bool:
    """Whether its rows have a number for each channel, or one for all of them."""
    return len(shape) == 2 and shape[1] in (1, cfg.model_dim)


def is_gate(shape: Shape, cfg: Config) -> bool:
    """Whether it has a number, or a row of numbers, for each channel or head."""
    return len(shape) < 2 or (len(shape) == 2 and shape[0] <= cfg.num_heads)


def is_layer_rows(shape: Shape, cfg: Config) -> bool:
    """Whether it has a row of numbers for each layer."""
    return len(shape) == 2 and shape[0] == cfg.num_layers


def start_orthogonal(parameter: Tensor, cfg: Config) -> None:
    """A random matrix whose singular values are all 1."""
    nn.init.orthogonal_(parameter)


def start_scaled(parameter: Tensor, cfg: Config) -> None:
    """A random matrix whose singular values are all 1 / sqrt(2 L)."""
    nn.init.orthogonal_(parameter, 1.0 / math.sqrt(2 * cfg.num_layers))


def start_output(parameter: Tensor, cfg: Config) -> None:
    """The output of attention or MLP, at 0 by default: a block starts as the identity."""
    if cfg.proj_init == "zero":
        parameter.zero_()
    else:
        start_scaled(parameter, cfg)


def start_auxiliary(parameter: Tensor, cfg: Config) -> None:
    """A projection of a table."""
    if cfg.optimizer_routing == "banks":
        start_orthogonal(parameter, cfg)
    else:
        start_scaled(parameter, cfg)


def start_pair_projection(parameter: Tensor, cfg: Config) -> None:
    """The projection of BigramHash, drawn in any case: BIGRAM_INIT changes no other matrix."""
    start_auxiliary(parameter, cfg)
    if cfg.bigram_init == "zero_proj":
        parameter.zero_()


def start_pair_table(parameter: Tensor, cfg: Config) -> None:
    """The buckets of BigramHash; one of its two factors is 0, so that it starts without effect."""
    if cfg.bigram_init == "zero_proj":
        start_orthogonal(parameter, cfg)
    else:
        parameter.zero_()


def start_token_table(parameter: Tensor, cfg: Config) -> None:
    """A normal table; EMB_SVD_INIT makes its k-th singular value the first / sqrt(k)."""
    nn.init.normal_(parameter, std=cfg.tied_embed_init_std)
    if cfg.emb_svd_init:
        U, S, Vh = torch.linalg.svd(parameter, full_matrices=False)
        powers = torch.arange(1, len(S) + 1, dtype=torch.float32) ** -0.5
        parameter.copy_(U * (S[0] * powers) @ Vh)


def start_value_table(parameter: Tensor, cfg: Config) -> None:
    """A small normal table."""
    nn.init.normal_(parameter, std=0.01)


def start_at_zero(parameter: Tensor, cfg: Config) -> None:
    """Zeros."""
    parameter.zero_()


def start_backout(parameter: Tensor, cfg: Config) -> None:
    """BACKOUT_INIT."""
    parameter.fill_(cfg.backout_init)


WIDTHS = "a width of the network on both sides"
ATTENTION_MATRIX = Kind("attention matrix", "attn", is_matrix, WIDTHS, start_orthogonal, True, True)
MLP_MATRIX = replace(ATTENTION_MATRIX, name="mlp matrix", role="mlp")
AUXILIARY_MATRIX = replace(
    ATTENTION_MATRIX, name="auxiliary matrix", role="aux", start=start_auxiliary
)
TABLE = Kind("table", "aux", is_table, "a row for each token or pair", may_be_integers=True)
TOKEN_TABLE = replace(TABLE, name="token table", role="emb", start=start_token_table)
HEAD = replace(TOKEN_TABLE, name="head", start=start_at_zero)
GAIN = Kind("gain", "aux", is_vector, "no more than one dimension")
ATTENTION_GAIN = replace(GAIN, role="attn")
GAIN_ROWS = Kind("gain rows", "aux", is_rows, "rows of 1 or MODEL_DIM", may_be_integers=True)
GATE = Kind("gate", "aux", is_gate, "at most a row for each head")
LANE = replace(GATE, fits=is_layer_rows, expected="a row for each layer")


def known(kind: Kind, parameter: Made) -> Made:
    """The parameter, marked as one of this kind."""
    parameter.kind = kind  # type: ignore[attr-defined]
    return parameter


def kinds_of(model: nn.Module, cfg: Config) -> dict[str, Kind]:
    """The kind of each parameter by name; Refusal for one without a kind or of a wrong shape."""
    kinds = {}
    for name, parameter in model.named_parameters():
        kind = vars(parameter).get("kind")
        if kind is None:
            raise Refusal(f"parameter {name} has no kind: make it with known(KIND, ...)")
        if not kind.fits(tuple(parameter.shape), cfg):
            shape = " x ".join(map(str, parameter.shape))
            raise Refusal(
                f"parameter {name} is declared as {kind.name}, which has {kind.expected}, "
                f"but its shape is {shape or 'a number'}: declare it as what it is"
            )
        kinds[name] = kind
    return kinds


@functools.lru_cache(8)
def kinds_within(cfg: Config) -> dict[str, Kind]:
    """The kinds of the model that these settings describe, which is laid out without memory."""
    with torch.device("meta"):
        return GPT(cfg).kinds


Delta = tuple[Tensor, Tensor]  # of low rank r, for each row of a batch: (B, r, in), (B, out, r)


def with_delta(y: Tensor, x: Tensor, delta: Delta | None) -> Tensor:
    """y (B, T, out) + B A x of x (B, T, in), by each row's own A and B; y without a delta."""
    if delta is None:
        return y
    down, up = delta
    return y + (x @ down.mT) @ up.mT


@dataclass(frozen=True)
class Adapters:
    """Deltas for the rows of a batch, each for one place where the network takes one.

    Those of a layer are called q, k and v, which join its projections, and o and mlp, which go
    straight from the normed input of attention and MLP to its output (LoRA, arXiv:2106.09685).
    """

    layers: tuple[dict[str, Delta], ...]  # by place in the plan
    head: Delta | None


NO_DELTAS: dict[str, Delta] = {}


class Linear(nn.Linear):
    """Matrix product without bias; the float32 weight is cast to the activations' type."""

    def __init__(self, width_in: int, width_out: int, kind: Kind) -> None:
        super().__init__(width_in, width_out, bias=False)
        known(kind, self.weight)

    def forward(self, x: Tensor, delta: Delta | None = None) -> Tensor:
        """(B, T, in) -> (B, T, out); a delta adds to the weight, for each row its own."""
        return with_delta(F.linear(x, like(self.weight, x)), x, delta)


class Table(nn.Embedding):
    """A row of numbers for each token or bucket."""

    def __init__(self, num_rows: int, width: int, kind: Kind) -> None:
        super().__init__(num_rows, width)
        known(kind, self.weight)


class BigramHash(nn.Module):
    """Additive embedding of the pair (previous, current token), hashed into n buckets.

    xor: (36313 t_i XOR 27191 t_{i-1}) mod (n - 1); sum: (36313 t_i + 27191 t_{i-1}) mod n. What
    has no predecessor, a row's first token and with the mask every BOS, has n - 1 or 0.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.by_sum = cfg.bigram_hash == "sum"
        self.bos_mask = cfg.bigram_bos_mask
        table = replace(TABLE, start=start_pair_table)
        projection = replace(AUXILIARY_MATRIX, start=start_pair_projection)
        self.embed = Table(cfg.bigram_vocab_size, cfg.bigram_dim, table)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim, projection)
        self.scale = known(GAIN, nn.Parameter(torch.tensor(0.05)))

    def buckets(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T) bucket numbers."""
        n = self.embed.num_embeddings
        current = BIGRAM_CURRENT * input_ids[:, 1:]
        previous = BIGRAM_PREVIOUS * input_ids[:, :-1]
        if self.by_sum:
            hashed, without = (current + previous) % n, 0
        else:
            hashed, without = (current ^ previous) % (n - 1), n - 1
        hashed = F.pad(hashed, (1, 0), value=without)
        if self.bos_mask:
            hashed = torch.where(input_ids == BOS, without, hashed)
        return hashed

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.scale * self.proj(self.embed(self.buckets(input_ids)).to(dtype))


class SmearGate(nn.Module):
    """x_i <- (1 - s) x_i + s x_{i-1}, x_{-1} = 0, s = sigmoid(gate), masked 0 at BOS."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.bos_mask = cfg.smear_bos_mask
        self.gate = known(GATE, nn.Parameter(torch.zeros(cfg.model_dim)))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x: (B, T, D), input_ids: (B, T) -> (B, T, D)."""
        gate = torch.sigmoid(like(self.gate, x))
        if self.bos_mask:
            gate = gate * (input_ids != BOS).unsqueeze(-1)
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        return torch.lerp(x, previous, gate.expand_as(x))


class InputSmearGate(nn.Module):
    """x_i <- x_i + lambda sigmoid(w . x_i) x_{i-1}, x_{-1} = 0, masked x_i at BOS.

    w weighs the first GATE_WINDOW channels. Both factors start at 0, so that w learns nothing
    before lambda has moved.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.bos_mask = cfg.smear_bos_mask
        self.weight = known(GATE, nn.Parameter(torch.zeros(cfg.gate_window)))
        self.scale = known(GATE, nn.Parameter(torch.tensor(0.0)))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x: (B, T, D), input_ids: (B, T) -> (B, T, D)."""
        seen = x[..., : len(self.weight)]
        gate = like(self.scale, x) * torch.sigmoid(seen @ like(self.weight, x))
        if self.bos_mask:
            gate = gate * (input_ids != BOS)
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        return torch.addcmul(x, gate.unsqueeze(-1), previous)


class ValueEmbedding(nn.Module):
    """Token identity for the values of late layers: scale * P E[t], shared by those layers."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.embed = Table(cfg.vocab_size, cfg.ve_dim, replace(TABLE, start=start_value_table))
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim, AUXILIARY_MATRIX)
        self.scale = known(GAIN, nn.Parameter(torch.tensor(0.1)))

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) -> (B, T, G*K)."""
        extra = self.proj(self.embed(input_ids).to(dtype))
        return like(self.scale, extra) * extra


def rotary_tables(cfg: Config, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables of rotate(): cos and signed sin of position times frequency, float32 (T, R) each.

    The frequency of pair i is base^(-2i/R); each table has the R/2 pairs twice, and the sine has
    its sign turned the second time. The NTK rule raises the base for rows beyond ROPE_NTK_REF.
    """
    dims, base = cfg.rotary_dims, cfg.rope_base
    if 0 < cfg.rope_ntk_ref < seq_len:
        base = base * (seq_len / cfg.rope_ntk_ref) ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponents)
    return angles.cos().repeat(1, 2), torch.cat([angles.sin(), -angles.sin()], dim=-1)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions, (B, T, H, K) -> the same: of the first R dimensions, i pairs i + R/2."""
    cos, sin = (like(table, x)[:, None, :] for table in rotation)
    turned, rest = x.tensor_split([cos.size(-1)], dim=-1)
    turned = torch.addcmul(turned * cos, turned.roll(cos.size(-1) // 2, -1), sin)
    return torch.cat([turned, rest], dim=-1)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
    if q.device.type != "cuda":  # repeated heads take 0.7 of the time of enable_gqa on a CPU
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def attention_inside(q: Tensor, k: Tensor, v: Tensor, inside: Tensor) -> Tensor:
    """Causal attention inside documents: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K).

    `inside` is a mask (B, 1, T, T), or the boundaries (N,) for kernels of variable length.
    """
    if inside.ndim == 1:
        variable = variable_length_attention if q.is_cuda else attention_by_length
        return variable(q, k, v, inside)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=inside).transpose(1, 2)


def what_attention_sees(documents: Tensor, boundaries: Tensor | None, in_graph: bool) -> Tensor:
    """Documents (B, T) as attention_inside() takes them on their device.

    On a CPU a compiled graph takes a mask, whose shape does not depend on the documents.
    """
    if boundaries is not None and (documents.is_cuda or not in_graph):
        return boundaries
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


def attention_by_length(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> Tensor:
    """attention_inside() on a CPU: documents of the same length together, and no others.

    A mask would have the work done across documents, and in both directions, and then undo it.
    """
    lengths = [length for length in boundaries.diff().tolist() if length]
    documents = [x.flatten(0, 1).split(lengths) for x in (q, k, v)]
    found: dict[int, Tensor] = {}  # by document
    for length in dict.fromkeys(lengths):
        alike = [number for number, other in enumerate(lengths) if other == length]
        y = sdpa_attention(*(torch.stack([part[number] for number in alike]) for part in documents))
        found.update(zip(alike, y, strict=True))
    return torch.cat([found[number] for number in range(len(lengths))]).view_as(q)


def variable_length_attention(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> Tensor:
    """attention_inside() on a GPU, where no work is done across documents; untried there."""
    rows = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    longest = rows[1]
    y = varlen_attn(
        q, k, v, boundaries, boundaries, longest, longest, window_size=(-1, 0), enable_gqa=True
    )
    return cast(Tensor, y).view(rows)


def pick_attention(cfg: Config, device: torch.device) -> tuple[str, AttentionKernel]:
    """The attention kernel of these settings and its name; or Refusal, see find_attention()."""
    return find_attention(cfg.attention, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, device)


@functools.cache  # one kernel object for a model and its rebuilt twin, or compiled graphs miss
def find_attention(
    wanted: str, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> tuple[str, AttentionKernel]:
    """FlashAttention-3 where a trial of it works, else torch's kernel; and its name.

    Raises Refusal if ATTENTION=fa3 and no source of it works here.
    """
    why = [] if device.type == "cuda" else ["there is no CUDA device"]
    sources = () if why or wanted == "sdpa" else ("flash_attn_interface", "kernels")
    for source in sources:
        try:
            attend = flash_attention(source)
            query = torch.zeros(1, 64, num_heads, head_dim, dtype=torch.bfloat16, device=device)
            key = torch.zeros(1, 64, num_kv_heads, head_dim, dtype=torch.bfloat16, device=device)
            if isinstance(attend(query, key, key), tuple):
                return f"fa3/{source}", functools.partial(first_output, attend)
            return f"fa3/{source}", attend
        except Exception as error:  # foreign packages raise anything; torch's kernel remains
            why.append(f"{source}: " + str(error).split("\n")[0])
    if wanted == "fa3":
        raise Refusal(f"ATTENTION=fa3: {', '.join(why)}; use ATTENTION=auto")
    return "sdpa", sdpa_attention


def first_output(attend: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention's output, of a kernel that returns more beside it."""
    return attend(q, k, v)[0]


def flash_attention(source: str) -> Callable:
    """Causal FlashAttention-3 of a package; that of "kernels" is downloaded once."""
    module = __import__(source)
    if source == "kernels":
        module = module.get_kernel("kernels-community/flash-attn3", version=1)
    return functools.partial(module.flash_attn_func, causal=True)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention (XSA, arXiv:2603.09078): y <- y - (y . n) n, n = v / ||v||.

    y: (B, T, H, K), v: (B, T, G, K) -> (B, T, H, K), what is left at right angles to v.
    """
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H/G, K)
    v = v.unsqueeze(3)  # (B, T, G, 1, K)
    square = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-12).square()
    along = (grouped * v).sum(-1, keepdim=True) / square  # y . n = along ||v||
    return torch.addcmul(grouped, along, v, value=-1).flatten(2, 3)


@dataclass(frozen=True)
class Layer:
    """One step through the network: whose weights it has, and what goes into it beside the stream.

    Layers are counted by their place in the plan; what belongs to weights goes by `block`.
    Without loops (NUM_LOOPS) the two are the same number.
    """

    block: int  # whose weights
    depth_scale: float  # of the normed inputs of attention and MLP
    two_lanes: bool  # whether attention and MLP work side by side, on a lane each
    exclusive: bool  # whether a token's own value is taken out of what attention gives (XSA)
    skip_from: int | None  # the earlier layer whose output is added to the stream first (U-Net)
    skip_row: int | None  # the row of the skip weights that multiplies that output
    reads: int | None  # the earlier layer whose output attention reads instead of the stream
    value_scale: int | None  # which of the value embedding's scales; None without one
    value_gate: int | None  # which of the gates that add layer 0's values (VRL_MODE=add)
    mixes_values: bool  # whether layer 0's values are mixed with its own (VRL_MODE=mix)

    def __str__(self) -> str:
        """A line for the log: the block, its scale, and the optional parts that the layer has."""
        parts = [f"block:{self.block} depth_scale:{self.depth_scale:.3f}"]
        parts += ["two_lanes"] if self.two_lanes else []
        parts += ["xsa"] if self.exclusive else []
        parts += ["mixes_first_values"] if self.mixes_values else []
        for name in ("skip_from", "skip_row", "reads", "value_scale", "value_gate"):
            number = getattr(self, name)
            parts += [] if number is None else [f"{name}:{number}"]
        return " ".join(parts)


def executed_blocks(cfg: Config, looping: bool) -> list[int]:
    """Whose weights the layers of the plan have, in order; those of a loop come again."""
    once = list(range(cfg.num_layers))
    if not looping:
        return once
    after = cfg.loop_end + 1
    return once[:after] + once[cfg.loop_start : after] * cfg.num_loops + once[after:]


def plan_layers(cfg: Config, looping: bool = True) -> tuple[Layer, ...]:
    """The layers of the network, in the order in which the stream goes through them.

    The second half takes skips from the first, the last output first. A layer of a loop is
    several layers of the plan, unless it is the plan before looping begins.
    """
    blocks = executed_blocks(cfg, looping and cfg.num_loops > 0)
    half = len(blocks) // 2
    kept = last_place(blocks, cfg.backout_layer)
    plan = []
    for place, block in enumerate(blocks):
        skip_row = skip_from = reads = value_scale = value_gate = None
        if cfg.skip_per_dim != "off" and half <= place < 2 * half:
            skip_row = place - half
            skip_from = half - 1 - skip_row
        if cfg.backout_mode == "cache" and place >= half and place > kept:
            reads = kept
        if block in cfg.value_layers:
            value_scale = cfg.value_layers.index(block)
        if cfg.vrl_mode == "add" and block > 0:
            value_gate = block - 1
        layer = Layer(
            block=block,
            depth_scale=1.0 / math.sqrt(block + 1) if cfg.ln_scale == "1" else 1.0,
            two_lanes=0 < cfg.parallel_start_layer <= block,
            exclusive=block >= cfg.num_layers - cfg.xsa_last_n,
            skip_from=skip_from,
            skip_row=skip_row,
            reads=reads,
            value_scale=value_scale,
            value_gate=value_gate,
            mixes_values=cfg.vrl_mode == "mix" and block > 0,
        )
        plan.append(layer)
    return tuple(plan)


def last_place(blocks: list[int], block: int) -> int:
    """Where the weights of `block` are used for the last time; -1 if nowhere."""
    last = -1
    for place, used in enumerate(blocks):
        if used == block:
            last = place
    return last


class Attention(nn.Module):
    """Causal grouped-query attention with normalised, rotated queries and keys."""

    def __init__(self, cfg: Config, layer: Layer, kernel: AttentionKernel) -> None:
        super().__init__()
        width, kv_width = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        beside_queries = replace(ATTENTION_MATRIX, inputs_of="c_q")
        self.c_q = Linear(width, width, ATTENTION_MATRIX)
        self.c_k = Linear(width, kv_width, beside_queries)
        self.c_v = Linear(width, kv_width, beside_queries)
        self.proj = Linear(width, width, replace(ATTENTION_MATRIX, start=start_output))
        gains = torch.full((cfg.num_heads,), cfg.qk_gain_init)
        self.q_gain = known(ATTENTION_GAIN, nn.Parameter(gains))
        self.vr_lambda: nn.Parameter | None = None  # shares of layer 0's values and of its own
        if layer.mixes_values:
            self.vr_lambda = known(ATTENTION_GAIN, nn.Parameter(torch.full((2,), 0.5)))
        self.gate: nn.Parameter | None = None
        if cfg.attn_gate != "none":
            window = torch.zeros(cfg.num_heads, cfg.gate_window)
            self.gate = known(GATE, nn.Parameter(window))
        self.most_of_gate = 2.0 if cfg.attn_gate == "out" else 1.0
        self.gate_scale = cfg.attn_gate_scale
        self.kernel = kernel
        self.head_dim = cfg.head_dim
        self.exclusive = layer.exclusive

    def values(
        self,
        x: Tensor,
        extra_v: Tensor | None,
        first_v: Tensor | None,
        delta: Delta | None = None,
    ) -> Tensor:
        """W x + extra, which VRL_MODE=mix (arXiv:2410.17897) mixes with layer 0's: (B, T, G*K)."""
        v = self.c_v(x, delta)
        if extra_v is not None:
            v = v + extra_v
        if self.vr_lambda is not None:
            first, own = like(self.vr_lambda, v)
            v = first * first_v + own * v
        return v

    def gated(self, y: Tensor, x: Tensor) -> Tensor:
        """What heads give, (B, T, H, K), by a gate that looks at their input (B, T, D)."""
        if self.gate is None:
            return y
        seen = x[..., : self.gate.size(1)]
        gate = torch.sigmoid(self.gate_scale * F.linear(seen, like(self.gate, x)))
        return y * (self.most_of_gate * gate).unsqueeze(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inside: Tensor | None) -> Tensor:
        """Causal attention, in whole rows or inside documents: see attention_inside()."""
        return self.kernel(q, k, v) if inside is None else attention_inside(q, k, v, inside)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        extra_v: Tensor | None,
        first_v: Tensor | None,
        inside: Tensor | None = None,
        deltas: dict[str, Delta] = NO_DELTAS,
    ) -> Tensor:
        """x: (B, T, D); added to the values and layer 0's: (B, T, G*K) -> (B, T, D)."""
        q, k = self.c_q(x, deltas.get("q")), self.c_k(x, deltas.get("k"))
        v = self.values(x, extra_v, first_v, deltas.get("v"))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        q = rotate(rms_norm(q), rotation) * like(self.q_gain, q)[:, None]
        y = self.attend(q, rotate(rms_norm(k), rotation), v, inside)
        if self.exclusive:
            y = exclude_own_value(y, v)
        return with_delta(self.proj(self.gated(y, x).flatten(2)), x, deltas.get("o"))


class MLP(nn.Module):
    """x -> P leaky_relu(W x)^2; the slope is 0 for MLP_ACT=relu2."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.fc = Linear(cfg.model_dim, cfg.mlp_dim, MLP_MATRIX)
        self.proj = Linear(cfg.mlp_dim, cfg.model_dim, replace(MLP_MATRIX, start=start_output))
        self.slope = cfg.leaky_slope if cfg.mlp_act == "leaky2" else 0.0

    def forward(self, x: Tensor, deltas: dict[str, Delta] = NO_DELTAS) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        y = self.proj(SquaredLeaky.apply(self.fc(x), self.slope))
        return with_delta(y, x, deltas.get("mlp"))


Lanes = tuple[Tensor, Tensor | None]  # the stream (B, T, D), and the second lane where there is one


def joined(lanes: Lanes) -> Tensor:
    """The stream, (B, T, D): the mean of its lanes."""
    stream, second = lanes
    return stream if second is None else 0.5 * (stream + second)


def in_lanes(lanes: Lanes, are_two: bool) -> Lanes:
    """The stream in as many lanes as a layer has: split in two equal ones, or joined."""
    stream, second = lanes
    if not are_two:
        return joined(lanes), None
    return stream, stream if second is None else second


@dataclass
class Context:
    """What the layers read beside the stream."""

    plan: tuple[Layer, ...]
    x0: Tensor  # normed embedding (B, T, D)
    rotation: tuple[Tensor, Tensor]
    extra_v: dict[int, Tensor]  # by layer, added to its values (B, T, G*K)
    first_v: Tensor | None = None  # layer 0's values (B, T, G*K), where others mix them in
    inside: Tensor | None = None  # the documents, for attention_inside()
    adapters: Adapters | None = None
    outputs: list[Lanes] = field(default_factory=list)  # after each layer so far


def start_mix_by_depth(parameter: Tensor, cfg: Config, block: int) -> None:
    """Shares of stream and embedding in a layer's input: the stream's grows with depth, or is 1."""
    keep = 1.0
    if cfg.resid_mix_init == "phase":
        depth = block / max(cfg.num_layers - 1, 1)  # from 0 to 1
        keep = 1.0 / (1.0 + math.exp(-3.0 * (depth - 0.5)))
    parameter.copy_(torch.tensor([[keep], [1.0 - keep]]).expand_as(parameter))


class Block(nn.Module):
    """One layer: mix in the embedding, then attention, then MLP, each with a learned gain."""

    def __init__(self, cfg: Config, layer: Layer, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer, kernel), MLP(cfg)
        mix = torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim)
        start_mix = functools.partial(start_mix_by_depth, block=layer.block)
        self.resid_mix = known(replace(GAIN_ROWS, start=start_mix), nn.Parameter(mix))
        start = 1.0 / math.sqrt(layer.block + 1) if cfg.ln_scale == "learned" else 1.0
        gain = torch.full((cfg.model_dim,), start)
        self.attn_scale = known(GAIN, nn.Parameter(gain))
        self.mlp_scale = known(GAIN, nn.Parameter(gain.clone()))

    def mixed(self, x: Tensor, x0: Tensor) -> Tensor:
        """A stream with the embedding mixed in: (B, T, D) and (B, T, D) -> (B, T, D)."""
        keep, inject = like(self.resid_mix, x)
        return torch.addcmul(keep * x, inject, x0)

    def first_values(
        self, x0: Tensor, extra_v: Tensor | None, s: float, delta: Delta | None
    ) -> Tensor:
        """The values of the first layer, of the embedding (B, T, D): (B, T, G*K)."""
        return self.attn.values(rms_norm(self.mixed(x0, x0), s), extra_v, None, delta)

    def forward(
        self,
        lanes: Lanes,
        x0: Tensor,
        read: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        extra_v: Tensor | None,
        first_v: Tensor | None,
        inside: Tensor | None,
        weights: tuple[Tensor, Tensor] | None,
        s: float | Tensor,
        deltas: dict[str, Delta] = NO_DELTAS,
    ) -> Lanes:
        """The stream (B, T, D) -> (B, T, D), or with `weights` both lanes, see two_lanes().

        Attention reads an earlier stream where it is given.
        """
        x, second = lanes
        a, b = like(self.attn_scale, x), like(self.mlp_scale, x)
        u = self.mixed(x, x0)
        seen = u if read is None else self.mixed(read, x0)
        attended = a * self.attn(rms_norm(seen, s), rotation, extra_v, first_v, inside, deltas)
        if second is not None and weights is not None:
            thought = b * self.mlp(rms_norm(second, s), deltas)
            return two_lanes(x, second, attended, thought, *weights)
        x = u + attended
        return x + b * self.mlp(rms_norm(x, s), deltas), None


def with_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """The stream with an earlier layer's output: x + w skip, or g x + (1 - g) w skip.

    Both are (B, T, D), weight and gate (D,) or (1,); g = sigmoid(gate).
    """
    skip = like(weight, x) * skip
    if gate is None:
        return x + skip
    return torch.lerp(skip, x, like(torch.sigmoid(gate), x).expand_as(x))


def two_lanes(
    x: Tensor, second: Tensor, attended: Tensor, thought: Tensor, keep: Tensor, write: Tensor
) -> Lanes:
    """Two residual streams, each of which keeps a share of itself and takes what both parts give.

    Attention reads the first, the MLP the second. Streams and outputs: (B, T, D); keep: (2,), of
    each lane; write: (4,), attention to either lane, MLP to either lane.
    """
    keep, write = like(keep, x), like(write, x)
    first = keep[0] * x + write[0] * attended + write[2] * thought
    second = keep[1] * second + write[1] * attended + write[3] * thought
    return first, second


class LaneWeights(nn.Module):
    """What two_lanes() takes, a row for each layer; those of layers with one lane have no use."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.keep = known(LANE, nn.Parameter(torch.full((cfg.num_layers, 2), 1.1)))
        self.write = known(LANE, nn.Parameter(torch.ones(cfg.num_layers, 4)))

    def of(self, block: int) -> tuple[Tensor, Tensor]:
        """Of a layer: shares that lanes keep (2,), shares that they take (4,)."""
        return self.keep[block], self.write[block]


def add_first_values(model: GPT, c: Context) -> None:
    """Put layer 0's values (VRL) where the other layers read them."""
    # Only VRL_MODE=mix takes layer 0's values with its value embedding.
    own_extra = c.extra_v.get(0) if model.cfg.vrl_mode == "mix" else None
    deltas = NO_DELTAS if c.adapters is None else c.adapters.layers[0]
    block: Any = model.blocks[0]
    first_v = block.first_values(c.x0, own_extra, c.plan[0].depth_scale, deltas.get("v"))
    c.first_v = first_v
    for place, layer in enumerate(c.plan):
        if layer.value_gate is not None:
            gate = torch.sigmoid(model.vrl_alphas[layer.value_gate])
            c.extra_v[place] = c.extra_v.get(place, 0.0) + like(gate, first_v) * first_v


class GPT(nn.Module):
    """hidden(ids) -> logits(hidden) -> nats of the targets; forward is all three."""

    def __init__(
        self,
        cfg: Config,
        kernel: AttentionKernel = sdpa_attention,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.cfg, self.dtype, self.kernel = cfg, dtype, kernel
        self.penalty: Tensor | None = None  # the token mask (V, V), see mask_tokens()
        self.prefixes: Tensor | None = None  # of PREFIX_TARGET (V,), see piece_prefixes()
        # Where ids stand in their row: first position and the row's length. None: they are it.
        self.row_place: tuple[int, int] | None = None
        self.compiled_block: Callable[..., Lanes] | None = None  # Block.forward, for training
        cfg = cfg.for_model()
        self.plan = plan_layers(cfg)
        self.plan_before_looping = plan_layers(cfg, looping=False)
        half = len(self.plan) // 2
        self.tok_emb = Table(cfg.vocab_size, cfg.model_dim, TOKEN_TABLE)
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size, HEAD)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        smear = InputSmearGate if cfg.smear_form == "input" else SmearGate
        self.smear = smear(cfg) if cfg.smear_enabled else None
        first_use = {layer.block: layer for layer in reversed(self.plan)}
        self.blocks = nn.ModuleList(Block(cfg, first_use[n], kernel) for n in sorted(first_use))
        skips = {"off": (0, 1), "0": (half, 1), "1": (half, cfg.model_dim)}[cfg.skip_per_dim]
        self.skip_weights = known(GAIN_ROWS, nn.Parameter(torch.ones(skips)))
        self.skip_gates: nn.Parameter | None = None
        if cfg.skip_gates:
            self.skip_gates = known(GAIN_ROWS, nn.Parameter(torch.zeros(skips)))
        has_lanes = any(layer.two_lanes for layer in self.plan)
        self.lanes = LaneWeights(cfg) if has_lanes else None
        self.ve_shared = ValueEmbedding(cfg) if cfg.value_layers else None
        self.ve_layer_scales = nn.ParameterList(
            known(GAIN, nn.Parameter(torch.ones(1))) for _ in cfg.value_layers
        )
        mixing = range(1, cfg.num_layers) if cfg.vrl_mode == "add" else ()
        self.vrl_alphas = nn.ParameterList(
            known(GATE, nn.Parameter(torch.tensor(0.0))) for _ in mixing
        )
        self.backout_lambda: nn.Parameter | None = None
        if cfg.backout_layer >= 0:
            backout = replace(GAIN, start=start_backout)
            self.backout_lambda = known(backout, nn.Parameter(torch.tensor(0.0)))
        self.kinds = kinds_of(self, cfg)

    head = property(lambda self: self.tok_emb if self.lm_head is None else self.lm_head)

    def embedded(self, input_ids: Tensor) -> Tensor:
        """The normed embedding of tokens and token pairs, smeared: (B, T) -> (B, T, D)."""
        x = self.tok_emb(input_ids)
        if self.bigram is not None:
            x = x + self.bigram(input_ids, self.dtype)
        x = x.to(self.dtype)
        if isinstance(self.smear, InputSmearGate):
            return rms_norm(self.smear(x, input_ids))
        x = rms_norm(x)
        return x if self.smear is None else self.smear(x, input_ids)

    def context(
        self,
        input_ids: Tensor,
        x0: Tensor,
        documents: Tensor | None = None,
        boundaries: Tensor | None = None,
        looping: bool = True,
        adapters: Adapters | None = None,
    ) -> Context:
        """What the layers read beside the stream, of ids (B, T) and embedding x0 (B, T, D)."""
        first, row_length = self.row_place or (0, input_ids.size(1))
        tables = rotary_tables(self.cfg, row_length, x0.device)
        cos, sin = (table[first : first + input_ids.size(1)] for table in tables)
        c = Context(
            plan=self.plan if looping else self.plan_before_looping,
            x0=x0,
            rotation=(cos, sin),
            extra_v={},
            adapters=adapters,
        )
        if documents is not None:
            in_graph = torch.compiler.is_compiling() or self.compiled_block is not None
            c.inside = what_attention_sees(documents, boundaries, in_graph)
        if self.ve_shared is not None:
            shared = self.ve_shared(input_ids, self.dtype)
            for place, layer in enumerate(c.plan):
                if layer.value_scale is not None:
                    scale = self.ve_layer_scales[layer.value_scale]
                    c.extra_v[place] = like(scale, shared) * shared
        if self.cfg.vrl_mode != "off":
            add_first_values(self, c)
        return c

    def layer(self, place: int, lanes: Lanes, c: Context) -> Lanes:
        """The stream (B, T, D) -> (B, T, D) through a layer of the plan; the same of both lanes."""
        layer = c.plan[place]
        block: Any = self.blocks[layer.block]
        x, second = in_lanes(lanes, layer.two_lanes)
        if layer.skip_from is not None and layer.skip_row is not None:
            gate = None if self.skip_gates is None else self.skip_gates[layer.skip_row]
            weight = self.skip_weights[layer.skip_row]
            x = with_skip(x, joined(c.outputs[layer.skip_from]), weight, gate)
        read = None if layer.reads is None else joined(c.outputs[layer.reads])
        weights = None if self.lanes is None else self.lanes.of(layer.block)
        extra_v = c.extra_v.get(place)
        given = (x, second), c.x0, read, c.rotation, extra_v, c.first_v, c.inside, weights
        if c.adapters is not None:
            return block(*given, layer.depth_scale, c.adapters.layers[place])
        if self.compiled_block is None or not torch.is_grad_enabled():
            return block(*given, layer.depth_scale)
        # A tensor, or each depth would need a compiled block of its own.
        return self.compiled_block(block, *given, torch.tensor(layer.depth_scale))

    def hidden(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        boundaries: Tensor | None = None,
        looping: bool = True,
        adapters: Adapters | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D): the normed residual stream after the last layer.

        Attention reaches across whole rows, or inside `documents`, see Batch. Without `looping`
        each layer is executed once, as before ENABLE_LOOPING_AT.
        """
        x = self.embedded(input_ids)
        c = self.context(input_ids, x, documents, boundaries, looping, adapters)
        lanes: Lanes = x, None
        for place in range(len(c.plan)):
            lanes = self.layer(place, lanes, c)
            c.outputs.append(lanes)
        x = joined(lanes)
        if self.backout_lambda is not None:
            kept = last_place([layer.block for layer in c.plan], self.cfg.backout_layer)
            x = x - like(self.backout_lambda, x) * joined(c.outputs[kept])
        return rms_norm(x)

    def logits(
        self, hidden: Tensor, input_ids: Tensor | None = None, delta: Delta | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, V) float32, bounded by the softcap c: c tanh(z / c).

        With the token mask, -inf where a token may not follow that of `input_ids` (B, T).
        """
        z = with_delta(F.linear(hidden, like(self.head.weight, hidden)), hidden, delta).float()
        cap = self.cfg.logit_softcap
        logits = cap * z.div_(cap).tanh_()
        if self.penalty is None:
            return logits
        assert input_ids is not None, "the token mask needs the tokens before"
        return logits + F.embedding(input_ids, self.penalty)

    def asked(
        self, batch: Batch, looping: bool = True, adapters: Adapters | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of a batch where its targets are, and the tokens there: (B, S, D), (B, S).

        S is T where the batch names no places.
        """
        inside = batch.documents, batch.boundaries
        hidden = self.hidden(batch.input_ids, *inside, looping, adapters)
        if batch.places is None:
            return hidden, batch.input_ids
        asked = hidden.take_along_dim(batch.places.unsqueeze(-1), dim=1)
        return asked, batch.input_ids.take_along_dim(batch.places, dim=1)

    def forward(
        self,
        batch: Batch,
        mile_gamma: Tensor | None = None,
        prefix_weight: Tensor | None = None,
        looping: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Nats of each target and its weight in the loss, float32 like the targets (B, T or S).

        A `mile_gamma` of None leaves out MiLe, and then all weights are 1. With `prefix_weight`
        the nats of the target's prefix are added, so many times.
        """
        hidden, input_ids = self.asked(batch, looping)
        targets = batch.target_ids
        prefixes = prefix_targets(self, input_ids, targets, prefix_weight)
        cap, clamp_min = self.cfg.logit_softcap, self.cfg.mile_clamp_min
        # Graphs fuse what HeadNats does by hand; the CUDA path is bfloat16.
        plain = torch.compiler.is_compiling() or hidden.dtype != torch.float32
        if hidden.requires_grad and not plain:
            mask = (input_ids, self.penalty)
            head = self.head.weight
            loss = (mile_gamma, clamp_min)
            return HeadNats.apply(hidden, head, targets, cap, *loss, *mask, prefixes)
        logits = self.logits(hidden, input_ids)
        nats = target_nats(logits, targets)
        if prefixes is not None:
            nats = nats + prefixes[1] * target_nats(logits, prefixes[0])
        return nats, mile_weights(logits, mile_gamma, clamp_min)


def prefix_targets(
    model: GPT, input_ids: Tensor, targets: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Tokens that begin the targets (B, T) and their weights in the loss (B, T).

    A target that no token begins, or none that may follow the token before it, is its own prefix
    at a weight of 0. None where `weight` is.
    """
    if weight is None:
        return None
    assert model.prefixes is not None, "PREFIX_TARGET needs the tokenizer's prefixes"
    prefixes = model.prefixes[targets]
    if model.penalty is not None:
        prefixes = torch.where(model.penalty[input_ids, prefixes] == 0, prefixes, targets)
    return prefixes, weight * (prefixes != targets)


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each target in nats: (B, T, V) and (B, T) -> (B, T)."""
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets)


@torch.no_grad()
def mile_weights(logits: Tensor, gamma: Tensor | None, clamp_min: float) -> Tensor:
    """MiLe loss (arXiv:2310.19531): max((1 - e^-entropy)^gamma, clamp_min), (..., V) -> (...)."""
    if gamma is None:  # without MiLe; else a tensor, so that its schedule never recompiles a graph
        return torch.ones_like(logits.select(-1, 0))
    p = torch.softmax(logits, dim=-1)
    entropy = -(p * torch.log(p + 1e-8)).sum(-1)
    return (1.0 - torch.exp(-entropy)).clamp_min(0.0).pow(gamma).clamp_min(clamp_min)


@torch.no_grad()
def initialize(model: GPT, cfg: Config) -> None:
    """Give every parameter the initial value of its kind.

    Random ones are drawn from SEED on the CPU, so that every device starts alike; matrices come
    before tables.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        for of_tables in (False, True):
            for name, parameter in model.named_parameters():
                kind = model.kinds[name]
                if kind.start is not None and (kind.fits is is_table) == of_tables:
                    kind.start(parameter, cfg)


# =================================================================================================
# Optimizers and schedules
# Two tables and one rule each: ROUTES says which parameter goes where, Schedule.at() what the
# rates are at a given time, Muon.step() and AdamW what they do.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class RateSettings(Part):
    """Learning rates and what shapes them over the run."""

    title = "Optimizer: rates"
    prefixes: ClassVar[tuple[str, ...]] = ("WARMDOWN_",)

    lr_mult: float = training_knob(1.0, (0.0, 100.0), "Factor of every learning rate.")
    matrix_lr: float = training_knob(0.025, (0.0, 10.0), "Learning rate of matrices (Muon).")
    scalar_lr: float = training_knob(
        0.025, (0.0, 10.0), "Learning rate of gains, gates and scales (AdamW)."
    )
    tied_embed_lr: float = training_knob(
        0.035, (0.0, 10.0), "Learning rate of embedding tables (AdamW)."
    )
    embed_lr: float = training_knob(
        0.6, (0.0, 10.0), "Learning rate of the token embedding if TIE_EMBEDDINGS=0."
    )
    head_lr: float = training_knob(
        0.008, (0.0, 10.0), "Learning rate of the output head if TIE_EMBEDDINGS=0."
    )
    warmdown_iters: int = training_knob(
        3500, (0, 10**8), "Last steps of the run, over which the rates decay to 0."
    )
    warmdown_frac: float = training_knob(
        0.0, (0.0, 1.0), "Above 0: the fraction of the run that decays, instead of WARMDOWN_ITERS."
    )
    warmdown_type: str = training_knob("linear", ("linear", "cosine"), "Shape of the decay.")
    min_lr: float = training_knob(
        0.0,
        (0.0, 1.0),
        "The fraction of each rate below which its decay does not go.",
        tries=(0.1,),
    )


@dataclass(frozen=True, kw_only=True)
class MuonSettings(Part):
    """The optimizer of matrices, and what it is used for."""

    title = "Optimizer: Muon"
    prefixes: ClassVar[tuple[str, ...]] = ("MUON_",)

    optimizer_routing: str = training_knob(
        "standard",
        ("standard", "banks", "by_ndim", "adam"),
        "Which parameters Muon trains: matrices; those of blocks; all 2-D ones but token "
        "embedding and head; those outside the blocks.",
    )
    muon_momentum: float = training_knob(
        0.99, (0.0, 0.9999), "Muon's momentum once it has ramped up."
    )
    muon_momentum_warmup_start: float = training_knob(
        0.92, (0.0, 0.9999), "Muon's momentum at step 0."
    )
    muon_momentum_warmup_steps: int = training_knob(
        1500, (0, 10**8), "Steps over which Muon's momentum ramps up."
    )
    muon_ns: str = training_knob(
        "quintic",
        ("quintic", "polar"),
        "Polynomials that orthogonalise an update: Newton-Schulz with one for all steps, or "
        "Polar Express with one for each.",
    )
    muon_backend_steps: int = training_knob(5, (1, 20), "Steps of MUON_NS.", tries=(3,))
    muon_momentum_cooldown_frac: float = training_knob(
        0.0,
        (0.0, 1.0),
        "Last fraction of the run, in which Muon's momentum falls to its start.",
        tries=(0.5,),
    )
    muon_slow_share: float = training_knob(
        0.0,
        (0.0, 1.0),
        "Share of a second, slower momentum beside Muon's own; 0 keeps none.",
        tries=(0.5,),
    )
    muon_slow_momentum: float = training_knob(
        0.98, (0.0, 0.9999), "Fraction of the slower momentum that a step keeps."
    )
    muon_slow_start_frac: float = training_knob(
        0.4, (0.0, 1.0), "Fraction of the run from which the slower momentum counts."
    )
    muon_row_norm: bool = training_knob(
        False, (), "Bring the rows of an update to one norm before it is orthogonalised."
    )
    muon_neuron_norm: float = training_knob(
        0.0,
        (0.0, 0.9999),
        "Fraction that a step keeps of each neuron's mean squared update, by whose root the "
        "orthogonalised update is divided (NorMuon: 0.95); 0 turns it off.",
        tries=(0.95,),
    )
    muon_quant_momentum: bool = training_knob(
        False, (), "Keep Muon's momentum as blocks of int8 between steps."
    )
    muon_parallel: bool = training_knob(
        True, (), "Let ranks share Muon's matrices out, rather than each doing all of them."
    )
    muon_wd: float = training_knob(0.04, (0.0, 10.0), "Muon's decoupled weight decay.")
    muon_wd_form: str = training_knob(
        "plain",
        ("plain", "cautious"),
        "Whether all weights decay, or only those that the step makes smaller as well.",
    )
    muon_wd_order: str = training_knob(
        "before", ("before", "after"), "Whether Muon decays weights before or after its step."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """An optimizer without parameters is a mistake."""
        yield (
            cfg.optimizer_routing != "adam" or cfg.bigram_vocab_size or cfg.value_layers,
            "OPTIMIZER_ROUTING leaves Muon nothing without BIGRAM_VOCAB_SIZE and VE_ENABLED",
        )


@dataclass(frozen=True, kw_only=True)
class AdamSettings(Part):
    """The optimizer of all other parameters, and the bound on gradients."""

    title = "Optimizer: AdamW"
    prefixes: ClassVar[tuple[str, ...]] = ("ADAM_",)

    adam_wd: float = training_knob(0.04, (0.0, 10.0), "AdamW's decoupled weight decay.")
    embed_wd: float = training_knob(
        -1.0,
        (-1.0, 10.0),
        "The decay of embedding tables instead of ADAM_WD; -1 leaves that.",
        tries=(0.085,),
    )
    beta2: float = training_knob(
        0.95, (0.5, 0.99999), "Fraction of AdamW's mean squared gradient that a step keeps."
    )
    grad_clip_norm: float = training_knob(
        0.3, (0.0, 1e6), "Largest norm of the whole gradient; 0 sets no bound."
    )
    clip_before_reduce: bool = training_knob(
        False, (), "Bound each rank's own gradient, before they are summed."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A negative decay would let tables grow."""
        yield (
            cfg.embed_wd == -1.0 or cfg.embed_wd >= 0.0,
            "EMBED_WD is no decay: it is at least 0, or -1 for that of ADAM_WD",
        )


# What orthogonalize() does to singular values: x <- a x + b x^3 + c x^5, a row (a, b, c) for each
# step, and the last row for all steps that are left.
SINGULAR_VALUE_MAPS = {
    # Muon's Newton-Schulz iteration: large slope at zero; singular values from 0.003 of the norm
    # upward end within 0.68 to 1.21 after five steps.
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # Polar Express (arXiv:2505.16932), made for five steps: from 0.001 of the norm upward, 0.86
    # to 1.15. It is used without the paper's division by a margin, as in #1855.
    "polar": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

MOMENTUM_BLOCK = 256  # elements that share a scale in MUON_QUANT_MOMENTUM
MILE_ENDS = 0.15  # rate scale at which the MiLe loss has faded to plain cross entropy

# How each group of parameters learns.
# fmt: off
GROUPS = {
    # group               optimizer  learning rate  weight decay
    "head":              ("adam", "head_lr",       "adam_wd"),
    "tokens":            ("adam", "token_lr",      "table_wd"),
    "tables":            ("adam", "tied_embed_lr", "table_wd"),
    "attention":         ("muon", "matrix_lr",     "muon_wd"),
    "mlp":               ("muon", "matrix_lr",     "muon_wd"),
    "auxiliary":         ("muon", "matrix_lr",     "muon_wd"),
    "gains":             ("adam", "scalar_lr",     "adam_wd"),
    "blocks by adam":    ("adam", "matrix_lr",     "adam_wd"),
    "auxiliary by adam": ("adam", "scalar_lr",     "adam_wd"),
    "other 2-D":         ("muon", "matrix_lr",     "muon_wd"),
}
# The group of each kind of parameter, by OPTIMIZER_ROUTING.
ROUTINGS = ("standard", "banks", "by_ndim", "adam")
ROUTES = {
    # kind              standard     banks                by_ndim      adam
    "head":             ("head",      "head",              "head",      "head"),
    "token table":      ("tokens",    "tokens",            "tokens",    "tokens"),
    "table":            ("tables",    "tables",            "other 2-D", "tables"),
    "attention matrix": ("attention", "attention",         "attention", "blocks by adam"),
    "mlp matrix":       ("mlp",       "mlp",               "mlp",       "blocks by adam"),
    "auxiliary matrix": ("auxiliary", "auxiliary by adam", "other 2-D", "auxiliary"),
    "gain":             ("gains",     "gains",             "gains",     "gains"),
    "gain rows":        ("gains",     "gains",             "other 2-D", "gains"),
    "gate":             ("gains",     "gains",             "gains",     "gains"),
}
# fmt: on


def route_parameters(cfg: Config, model: GPT) -> list[dict]:
    """Parameter groups of the optimizers, one for each group of GROUPS in use.

    Each has its name ("route"), optimizer, parameters and their names, rate and weight decay.
    """
    routing = ROUTINGS.index(cfg.optimizer_routing)
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        route = ROUTES[model.kinds[name].name][routing]
        optimizer, rate, decay = GROUPS[route]
        empty = {
            "route": route,
            "optimizer": optimizer,
            "params": [],
            "names": [],
            "base_lr": getattr(cfg, rate) * cfg.lr_mult,
            "weight_decay": getattr(cfg, decay),
        }
        group = groups.setdefault(route, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def normalize_rows(matrices: Tensor) -> Tensor:
    """Divide each row by its norm (MuonEq-R); a row of zeros stays: (..., r, c) -> same."""
    return matrices / matrices.norm(dim=-1, keepdim=True).clamp_min(1e-7)


def orthogonalize(matrices: Tensor, steps: int, maps: str = "quintic") -> Tensor:
    """Push the singular values of each matrix towards 1: (..., r, c) -> same.

    X <- aX + (bA + cA^2)X with A = XX^T, from X = G / ||G||_F; a zero matrix stays zero.
    `maps` is a row of SINGULAR_VALUE_MAPS, which has a, b and c.
    """
    rows = SINGULAR_VALUE_MAPS[maps]
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for step in range(steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def normalize_neurons(updates: Tensor, kept: dict, keep: float) -> Tensor:
    """Divide each neuron's update by its root mean square over steps; norms stay: (m, r, c).

    A neuron is a place along a matrix's longer side. The mean square moves by 1 - `keep` a step
    and is kept as "neuron_squares". Source: NorMuon, arXiv:2510.05491.
    """
    exact = updates.float() if updates.dtype == torch.bfloat16 else updates
    across = -1 if updates.size(-2) >= updates.size(-1) else -2
    squares = exact.square().mean(across, keepdim=True)
    (mean_squares,) = kept.setdefault("neuron_squares", (torch.zeros_like(squares),))
    mean_squares.lerp_(squares, 1.0 - keep)
    evened = exact / mean_squares.clamp_min(1e-10).sqrt()
    norms = [x.norm(dim=(-2, -1), keepdim=True) for x in (exact, evened)]
    return (evened * (norms[0] / norms[1].clamp_min(1e-10))).to(updates.dtype)


def pack_momentum(momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Blockwise int8: (n, r, c) -> integers (n, blocks, 256), scales (n, blocks, 1), its type."""
    rows = momentum.flatten(1)
    blocks = F.pad(rows, (0, -rows.size(1) % MOMENTUM_BLOCK)).unflatten(1, (-1, MOMENTUM_BLOCK))
    scale = (blocks.abs().amax(dim=2, keepdim=True) / 127).clamp_min(1e-12)
    return torch.round(blocks / scale).clamp(-127, 127).to(torch.int8), scale


def unpack_momentum(packed: tuple[Tensor, Tensor], like_this: Tensor) -> Tensor:
    """The momentum that pack_momentum packed, in the shape (n, r, c) of `like_this`."""
    q, scale = packed
    rows = (q.to(scale.dtype) * scale).flatten(1)
    return rows[:, : like_this[0].numel()].view_as(like_this)


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr sqrt(max(1, r/c)) orthogonalize(g + mu M), M <- mu M + g.

    Equal shapes are stacked and orthogonalised together, in `dtype`. Source: Keller Jordan's
    Muon. Each step of the rule has its variants, which MuonSettings names:

        M between steps          MUON_QUANT_MOMENTUM            advance()
        a second M               MUON_SLOW_SHARE                nesterov()
        before it is orthogonal  MUON_ROW_NORM                  normalize_rows()
        orthogonal               MUON_NS                        orthogonalize()
        after it is orthogonal   MUON_NEURON_NORM               normalize_neurons()
        decay of W               MUON_WD_FORM, MUON_WD_ORDER    apply()

    With MUON_PARALLEL the ranks divide each stack among them: a rank has the summed gradients,
    the momentum and the updates of its own part only, and then all ranks gather the updates.
    """

    def __init__(
        self,
        groups: list[dict],
        cfg: MuonSettings,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": 0.95, "slow_share": 0.0})
        self.cfg = cfg
        self.dtype = dtype
        self.ranks = ranks or Ranks()
        self.shares: list[Callable[[], Tensor]] = []  # of launched sums
        self.stacks = [
            (group, [w for w in group["params"] if w.shape == shape])
            for group in self.param_groups
            for shape in dict.fromkeys(w.shape for w in group["params"])
        ]

    def launch(self) -> None:
        """Stack the gradients of each shape and start to sum them over ranks."""
        for _, weights in self.stacks:
            grad = torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
            for weight in weights:
                weight.grad = None  # its memory is free for the update
            self.shares.append(self.ranks.scatter_sum(grad))

    def gradients(self, group: dict | None = None) -> list[Tensor]:
        """This rank's share (m, r, c) of each launched stack, or of those of one group."""
        if not self.shares:
            self.launch()
        return [
            wait()
            for (of, _), wait in zip(self.stacks, self.shares, strict=True)
            if group is None or of is group
        ]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without closures
        """Apply one update from the gradients; one stack's travels while the next is computed."""
        cfg = self.cfg
        updates = []
        for (group, weights), grads in zip(self.stacks, self.gradients(), strict=True):
            kept = self.state[weights[0]]
            update = self.nesterov(grads, kept, group)
            if cfg.muon_row_norm:
                update = normalize_rows(update)
            update = orthogonalize(update.to(self.dtype), cfg.muon_backend_steps, cfg.muon_ns)
            if cfg.muon_neuron_norm:
                update = normalize_neurons(update, kept, cfg.muon_neuron_norm)
            updates.append(self.ranks.gather(update))
        for (group, weights), wait in zip(self.stacks, updates, strict=True):
            self.apply(group, weights, wait()[: len(weights)])
        self.shares = []

    def apply(self, group: dict, weights: list[Tensor], updates: Tensor) -> None:
        """Decay the weights of a stack and let them take their updates (n, r, c)."""
        rows, cols = weights[0].shape
        updates = updates.to(weights[0].dtype)
        decay = 1.0 - group["lr"] * group["weight_decay"]
        rate = group["lr"] * math.sqrt(max(1.0, rows / cols))
        decay_after = self.cfg.muon_wd_order == "after"
        if self.cfg.muon_wd_form == "cautious":
            shrinks = torch.stack(weights).mul_(updates) >= 0
            decays = torch.ones_like(updates).masked_fill_(shrinks, decay)
            torch._foreach_mul_(weights, decays.unbind())
            if decay_after:
                updates = updates * decays
        else:
            torch._foreach_mul_(weights, decay)
            if decay_after:
                rate = decayed_rate(rate, decay)
        torch._foreach_add_(weights, updates.unbind(), alpha=-rate)

    def nesterov(self, grads: Tensor, kept: dict, group: dict) -> Tensor:
        """g + mu M of a stack (m, r, c); with MUON_SLOW_SHARE, M is blended with a slower one.

        The slower one is kept as a mean of gradients and divided by 1 - mu where it is used, so
        that it has the size of M. Source: modded-nanogpt #339 (bi-Maxwell momentum).
        """
        mu = group["momentum"]
        if self.cfg.muon_quant_momentum:
            grads = grads.to(self.dtype)
        momentum = self.advance("momentum", grads, kept, mu)
        if self.cfg.muon_slow_share:
            slow_mu = self.cfg.muon_slow_momentum
            slow = self.advance("slow_momentum", grads * (1.0 - slow_mu), kept, slow_mu)
            momentum = momentum.lerp(slow / (1.0 - mu), group["slow_share"])
        return grads.add(momentum, alpha=mu)

    def advance(self, name: str, grads: Tensor, kept: dict, mu: float) -> Tensor:
        """M <- mu M + g, which is kept under its name, and returned."""
        parts = kept.get(name, (torch.zeros_like(grads),))
        momentum = unpack_momentum(parts, grads) if len(parts) == 2 else parts[0]
        momentum.mul_(mu).add_(grads)
        packed = self.cfg.muon_quant_momentum
        kept[name] = pack_momentum(momentum) if packed else (momentum,)
        return momentum

    def whole_state(self) -> list[dict[str, list[Tensor]]]:
        """What each stack keeps, from all ranks, (n, ...); packed momentum as two tensors."""
        return [
            {
                name: [self.ranks.gather(part)()[: len(weights)] for part in parts]
                for name, parts in self.state[weights[0]].items()
            }
            for _, weights in self.stacks
        ]

    def load_whole_state(self, whole: list[dict[str, list[Tensor]]]) -> None:
        """Take this rank's share of what whole_state() gave, on any number of ranks."""
        for (_, weights), kept in zip(self.stacks, whole, strict=True):
            for name, parts in kept.items():
                self.state[weights[0]][name] = tuple(map(self.ranks.part_of, parts))


def build_optimizers(
    cfg: Config, groups: list[dict], dtype: torch.dtype, ranks: Ranks | None = None
) -> list:
    """AdamW and Muon over the groups of route_parameters; rates are set step by step."""
    adam, muon = ([g for g in groups if g["optimizer"] == name] for name in ("adam", "muon"))
    return [
        torch.optim.AdamW(adam, lr=0.0, betas=(0.9, cfg.beta2), eps=1e-8, fused=True),
        Muon(muon, cfg, dtype, ranks),
    ]


def decay_scale(remaining: float, warmdown: float, shape: str) -> float:
    """Learning-rate scale with `remaining` of the run left, in the unit of `warmdown`."""
    if warmdown <= 0:
        return 1.0
    linear = min(1.0, max(0.0, remaining) / warmdown)
    if shape == "linear":
        return linear
    return 0.5 * (1.0 - math.cos(math.pi * linear))


def decay_left(scale: float, shape: str) -> float:
    """The fraction of the warmdown that is left when the rates have this scale."""
    if shape == "linear":
        return scale
    return math.acos(1.0 - 2.0 * scale) / math.pi


def prefix_scale(remaining: float, whole: float) -> float:
    """Scale of PREFIX_TARGET: 1 in the first third of the run, 0 at its second third's end."""
    if whole <= 0:
        return 0.0
    return min(max(3.0 * remaining / whole - 1.0, 0.0), 1.0)


@dataclass(frozen=True)
class Moment:
    """What the schedules say at one step."""

    lr_scale: float
    momentum: float  # of Muon
    qat: bool
    done: bool  # the run has ended; this step is not made
    mile_gamma: float = 0.0
    snapshot: bool = False  # SWA takes one after the step
    slow_share: float = 0.0  # of Muon's slower momentum
    prefix_weight: float = 0.0  # of the prefix's nats in the loss
    looping: bool = True  # layers LOOP_START to LOOP_END are executed again, if there is a loop


class Schedule:
    """Rates and switches at a given step; the same on every rank.

    observe() takes in what was measured, at() answers and changes nothing. The run's clock is
    what has been spent of its budget, in the budget's unit: seconds, operations or steps. What a
    step costs is known exactly, but for seconds: there the median of recent steps stands for it,
    once a few are known, since a slow first step must not look like the end of the run. By it
    WARMDOWN_ITERS are put into the budget's unit. A warmdown never exceeds the run.
    """

    STEPS_NEEDED = 5  # steps whose seconds must be known before their median counts
    STEPS_KEPT = 50

    def __init__(
        self,
        cfg: Config,
        reserve: float = 0.0,
        queued_steps: int = 0,
        step_operations: int = 0,
        early_operations: int | None = None,
    ) -> None:
        """`reserve` of the budget is kept for calibration; `step_operations` a step counts.

        `early_operations` is what it counts before layers loop; None: as much.
        """
        self.cfg = cfg
        self.unit = cfg.budget_unit
        self.budget = max(cfg.whole_budget - reserve, 0)
        self.queued_steps = queued_steps  # that a GPU may still have to do
        self.step_operations = step_operations
        self.early_operations = step_operations if early_operations is None else early_operations
        self.step_seconds: deque[float] = deque(maxlen=self.STEPS_KEPT)
        self.last_spent = 0.0
        self.qat = False  # whether it has begun
        self.looping = False  # likewise

    def observe(self, step: int, spent: float) -> None:
        """Take in that step `step` (from 0) is about to begin, `spent` of the budget gone."""
        if step > 0:
            self.step_seconds.append(spent - self.last_spent)
        self.last_spent = spent
        # Late QAT stays on once it is on: the scale is measured and may waver. So do loops.
        moment = self.at(step, spent)
        self.qat = moment.qat
        self.looping = moment.looping

    def at(self, step: int, spent: float) -> Moment:
        """The schedules at step `step` (from 0), `spent` of the budget gone.

        spent: seconds of training or counted operations; a budget of steps goes by `step` alone.
        """
        cfg = self.cfg
        remaining, whole = self.remaining_and_whole(step, spent)
        warmdown = self.warmdown(whole)
        slow_counts = remaining <= (1.0 - cfg.muon_slow_start_frac) * whole
        # Switches go by the scale without its floor, so that each is reached in the end.
        scale = decay_scale(remaining, warmdown, cfg.warmdown_type)
        qat_begins = cfg.qat_mode == "late" and scale < cfg.late_qat_threshold
        return Moment(
            lr_scale=max(scale, cfg.min_lr),
            momentum=self.momentum(step, remaining, whole),
            qat=self.qat or cfg.qat_mode == "always" or qat_begins,
            done=self.has_ended(step, spent),
            mile_gamma=cfg.mile_gamma * max(scale - MILE_ENDS, 0.0) / (1.0 - MILE_ENDS),
            snapshot=scale < cfg.swa_start_frac and (step + 1) % cfg.swa_every == 0,
            slow_share=cfg.muon_slow_share if slow_counts else 0.0,
            prefix_weight=cfg.prefix_target * prefix_scale(remaining, whole),
            looping=self.looping or self.loops_begin(step, spent),
        )

    def position(self, step: int, spent: float) -> float:
        """How much of the budget is gone, in its unit."""
        return step if self.unit == "steps" else spent

    def loops_begin(self, step: int, spent: float) -> bool:
        """Whether the fraction of the run is over from which layers loop, if any do."""
        over = self.position(step, spent) / max(self.budget, 1e-9)
        return self.cfg.num_loops > 0 and over >= self.cfg.enable_looping_at

    def remaining_and_whole(self, step: int, spent: float) -> tuple[float, float]:
        """What is left of the run and how long it is in all, both in the budget's unit."""
        spent = self.position(step, spent)
        step_cost = self.step_cost()
        whole = float(self.budget)
        if step_cost:  # the last of ITERATIONS may come before the budget ends
            whole = min(whole, spent + (self.cfg.iterations - step) * step_cost)
        return whole - spent, whole

    def warmdown(self, whole: float) -> float:
        """How much of a run that is so long decays, in the same unit."""
        cfg = self.cfg
        if cfg.warmdown_frac:
            return cfg.warmdown_frac * whole
        return min(cfg.warmdown_iters * self.step_cost(), whole)

    def step_cost(self) -> float:
        """What the next step costs; of seconds the median of recent steps, 0 until it is known."""
        if self.unit == "steps":
            return 1
        if self.unit == "operations":
            return self.step_operations if self.looping else self.early_operations
        if len(self.step_seconds) < self.STEPS_NEEDED:
            return 0.0
        return float(np.median(self.step_seconds))

    def momentum(self, step: int, remaining: float, whole: float) -> float:
        """Muon's momentum, which rises linearly to its last value, and may fall back in the end.

        `remaining` is what is left of the `whole` run, in one unit.
        """
        cfg = self.cfg
        cooldown = cfg.muon_momentum_cooldown_frac * whole
        ramp = 1.0
        if cfg.muon_momentum_warmup_steps:
            ramp = min(step / cfg.muon_momentum_warmup_steps, 1.0)
        if max(remaining, 0.0) < cooldown:
            ramp *= max(remaining, 0.0) / cooldown
        return (1.0 - ramp) * cfg.muon_momentum_warmup_start + ramp * cfg.muon_momentum

    def has_ended(self, step: int, spent: float) -> bool:
        """Whether training has ended; the first step is always made."""
        if step >= self.cfg.iterations:
            return True
        if step == 0:
            return False
        if self.unit != "seconds":
            return self.position(step, spent) + self.step_cost() > self.budget
        # The last step must end inside the budget, after those still in a GPU's queue.
        ahead = (1 + self.queued_steps) * self.step_cost()
        return spent + ahead >= self.budget

    def progress(self, step: int, spent: float) -> float:
        """The fraction of the run that is over, calibration included, from 0 to 1."""
        progress = self.position(step, spent) / self.cfg.whole_budget
        if self.unit == "operations":
            return max(progress, step / self.cfg.iterations)
        return progress

    def acting(self, moment: Moment) -> dict[str, bool]:
        """Each configured technique that the schedule turns on or off: whether it acts now."""
        cfg, found = self.cfg, {}
        if cfg.qat_mode != "off":
            found[f"{cfg.qat_mode}_qat"] = moment.qat
        if cfg.warmdown_iters or cfg.warmdown_frac:
            found["warmdown"] = moment.lr_scale < 1.0
        if cfg.muon_momentum_warmup_steps:
            found["momentum_ramp"] = moment.momentum != cfg.muon_momentum
        if cfg.muon_slow_share:
            found["slow_momentum"] = moment.slow_share > 0
        if cfg.mile_gamma:
            found["mile"] = moment.mile_gamma > 0
        if cfg.prefix_target:
            found["prefix_target"] = moment.prefix_weight > 0
        if cfg.num_loops:
            found["depth_loop"] = moment.looping
        return found

    def turning_points(self) -> Iterator[tuple[str, float]]:
        """What changes as the rates decay, and the fraction of the warmdown left at that time."""
        cfg = self.cfg
        scales = {f"warmdown ({cfg.warmdown_type})": 1.0}
        if cfg.qat_mode == "late":
            scales["late QAT"] = cfg.late_qat_threshold
        if "swa" in cfg.avg_mode:
            scales[f"SWA, every {cfg.swa_every} steps"] = cfg.swa_start_frac
        if cfg.mile_gamma:
            scales["MiLe: plain cross entropy"] = MILE_ENDS
        if cfg.min_lr:
            scales[f"rate floor of {cfg.min_lr:g}"] = cfg.min_lr
        for name, scale in scales.items():
            if scale:
                yield name, decay_left(scale, cfg.warmdown_type)

    def dates(self) -> Iterator[tuple[str, float]]:
        """What changes at a fixed fraction of the run, and that fraction."""
        cfg = self.cfg
        if cfg.muon_momentum_cooldown_frac:
            yield "momentum cool-down", 1.0 - cfg.muon_momentum_cooldown_frac
        if cfg.muon_slow_share:
            yield "slower momentum", cfg.muon_slow_start_frac
        if cfg.prefix_target:
            yield "prefix target: its fall", 1.0 / 3.0
            yield "prefix target: none", 2.0 / 3.0


# =================================================================================================
# Counted work
# The floating-point operations of a run, counted from shapes and so equal on every machine. Only
# products count, with 2 m n k operations for one of (m, k) and (k, n): all else is a small part of
# a run, and how many operations a norm or an exponential has is no fact of mathematics.
# =================================================================================================


def weights_met(model: GPT, prefix: str) -> int:
    """Weights of the matrices whose names begin so: a token is multiplied by each of them."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(prefix)
        and parameter.ndim == 2
        and model.kinds[name].fits in (is_matrix, is_gate)
    )


def attention_operations(model: GPT, seq_len: int) -> int:
    """Of a token in one layer of a row this long: scores, and their product with the values.

    Only the causal half of either counts, also where a kernel computes more.
    """
    return 2 * seq_len * model.cfg.num_heads * model.cfg.head_dim


def hidden_operations(model: GPT, seq_len: int, looping: bool = True) -> int:
    """Of a token up to its last hidden state, in a row this long; before layers loop or after."""
    beside_blocks = weights_met(model, "") - weights_met(model, "blocks.")
    total = 2 * beside_blocks
    if model.cfg.vrl_mode != "off":  # layer 0's values are computed once more
        total += 2 * weights_met(model, f"blocks.{model.plan[0].block}.attn.c_v.")
    for layer in model.plan if looping else model.plan_before_looping:
        total += 2 * weights_met(model, f"blocks.{layer.block}.")
        total += attention_operations(model, seq_len)
    return total


def head_operations(model: GPT) -> int:
    """Of a token from its hidden state to its logits."""
    return 2 * model.cfg.vocab_size * model.cfg.model_dim


def orthogonalization_operations(rows: int, cols: int, steps: int) -> int:
    """Of a matrix: A = X X^T, A A and their sum's product with X, in each step."""
    short, long = min(rows, cols), max(rows, cols)
    return steps * (4 * short * short * long + 2 * short**3)


def muon_operations(model: GPT) -> int:
    """Of one update of all matrices of Muon; once, however many ranks repeat it."""
    cfg = model.cfg
    total = 0
    for group in route_parameters(cfg, model):
        if group["optimizer"] == "muon":
            for weight in group["params"]:
                rows, cols = weight.shape
                total += orthogonalization_operations(rows, cols, cfg.muon_backend_steps)
    return total


def step_operations(model: GPT, looping: bool = True) -> int:
    """Of a training step of all ranks: forward, twice that backward, and the optimizer."""
    cfg = model.cfg
    forward = hidden_operations(model, cfg.train_seq_len, looping) + head_operations(model)
    return 3 * forward * cfg.rows_per_step * cfg.train_seq_len + muon_operations(model)


def calibration_operations(model: GPT, tokens: int) -> int:
    """Of Hessians over so many tokens in training rows: the network without its head, and sums."""
    executions = Counter(layer.block for layer in model.plan)
    a_token = hidden_operations(model, model.cfg.train_seq_len)
    for source, width in hessian_widths(model).items():
        block = re.match(r"blocks\.(\d+)\.", source)
        times = executions[int(block[1])] if block else 1
        a_token += times * 2 * width * width
    return a_token * tokens


def calibration_tokens(cfg: Config) -> int:
    """Tokens of training rows that calibration takes within the budget."""
    if cfg.gptq_variant == "off" or cfg.gptq_calib != "train":
        return 0
    return cfg.gptq_calib_batches * CALIBRATION_ROWS * cfg.train_seq_len


def scoring_operations(model: GPT, spans: np.ndarray, width: int, all_places: bool = True) -> int:
    """Of scoring windows (start, first scored, end) in strips of `width` targets.

    Each strip takes its whole window up to the hidden states. Logits are made at all its places,
    or only at those that are scored. Rows that merely fill up a batch are left out.
    """
    seq_len = model.cfg.eval_seq_len
    scored = spans[:, 2] - spans[:, 1]
    strips = int((-(-scored // width)).sum())
    asked = strips * width if all_places else int(scored.sum())
    hidden = strips * seq_len * hidden_operations(model, seq_len)
    return hidden + asked * head_operations(model)


def adaptation_operations(model: GPT, rows: int) -> int:
    """Of a pass forward and backward over rows of EVAL_SEQ_LEN, whatever learns from it."""
    seq_len = model.cfg.eval_seq_len
    forward = hidden_operations(model, seq_len) + head_operations(model)
    return 3 * rows * seq_len * forward


def laid_out(cfg: Config) -> GPT:
    """The network of these settings, without memory for its weights."""
    with torch.device("meta"):
        return GPT(cfg)


def refuse_small_budget(cfg: Config) -> None:
    """Raise Refusal if MAX_TRAIN_TFLOPS does not hold calibration and a step."""
    if cfg.max_train_tflops == 0:
        return
    model = laid_out(cfg)
    calibration = calibration_operations(model, calibration_tokens(cfg))
    step = step_operations(model)
    if calibration + step > cfg.whole_budget:
        raise Refusal(
            f"MAX_TRAIN_TFLOPS={cfg.max_train_tflops:g} does not hold a step of "
            f"{step / 1e12:.4g} TFLOP and calibration's {calibration / 1e12:.4g}: raise it, or "
            "lower GPTQ_CALIB_BATCHES or the size of the model"
        )


# =================================================================================================
# Training
# A step's gradient is that of the mean over the global batch, however many ranks share it. The
# loss is read back one step late, so that a GPU never waits for it.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class LossSettings(Part):
    """What training minimises beside the mean of the nats."""

    title = "Loss"
    prefixes: ClassVar[tuple[str, ...]] = ("MILE_", "PREFIX_")

    mile_gamma: float = training_knob(
        0.0, (0.0, 10.0), "Exponent of the MiLe weight (1 - e^-entropy)^gamma; 0 turns it off."
    )
    mile_clamp_min: float = training_knob(0.1, (0.0, 1.0), "Least MiLe weight of a token.")
    prefix_target: float = training_knob(
        0.0,
        (0.0, 10.0),
        "Weight in the loss, train_loss too, of the longest token that begins the target, for a "
        "third of the run; it falls to 0 over the next third. 0 turns it off.",
        tries=(0.25,),
    )


@dataclass(frozen=True, kw_only=True)
class AverageSettings(Part):
    """Which average of the weights is exported."""

    title = "Weight averaging"
    prefixes: ClassVar[tuple[str, ...]] = ("EMA_", "SWA_")

    avg_mode: str = training_knob("ema", ("ema", "swa", "swa_of_ema", "none"), "Weights to export.")
    ema_decay: float = training_knob(
        0.997, (0.0, 0.999999), "Fraction of the moving average (EMA) that a step keeps."
    )
    swa_start_frac: float = training_knob(
        0.4, (0.0, 1.0), "Rate scale below which SWA takes snapshots."
    )
    swa_every: int = training_knob(50, (1, 10**6), "Steps between SWA's snapshots.", tries=(2,))
    avg_last_share: float = training_knob(
        0.0,
        (0.0, 1.0),
        "Share of the last weights in what is exported, beside the average's.",
        tries=(0.4,),
    )


REPLICA_CHECK_STEPS = 100  # between proofs that all ranks hold the same weights
REGION_GAIN, REGION_SECONDS = 0.12, 30.0  # saved by compiled blocks, at least; taken, at most
Forward = Callable[..., tuple[Tensor, Tensor]]  # training_nats, perhaps compiled


def training_nats(
    model: GPT,
    batch: Batch,
    grids: dict[str, int] | None = None,
    mile_gamma: Tensor | None = None,
    prefix_weight: Tensor | None = None,
    looping: bool = True,
) -> tuple[Tensor, Tensor]:
    """What GPT.forward gives for a batch, QAT rounding weights to `grids`, if there are any."""
    inputs = (batch, mile_gamma, prefix_weight, looping)
    if not grids:
        return model(*inputs)
    rounded = fake_quantized(model, grids)
    return torch.func.functional_call(model, rounded, inputs)


def make_forward(run: Run) -> Forward:
    """The forward of training and evaluation; compiled, one graph for each shape and for QAT."""
    torch._dynamo.config.recompile_limit = 64  # graphs; fit_micro_batch() alone may leave ten
    return (
        torch.compile(training_nats, fullgraph=True, dynamic=False)
        if run.compiled
        else training_nats
    )


def micro_batches(cfg: Config, run: Run) -> list[tuple[int, int]]:
    """This rank's rows of a step's global batch, as (first row, number of rows)."""
    first, last = (
        n * cfg.rows_per_step // run.ranks.world_size for n in (run.ranks.rank, run.ranks.rank + 1)
    )
    size = run.micro_batch_rows
    return [(start, min(size, last - start)) for start in range(first, last, size)]


def reduce_gradients(parameters: list[nn.Parameter], others: list[Tensor], run: Run) -> None:
    """Add up gradients and other tensors over ranks; a rank without rows adds nothing."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    run.ranks.add_up([*others, *(p.grad for p in parameters if p.grad is not None)])


def backward(forward: Forward, model: GPT, batch: Batch, moment: Moment, run: Run) -> list[Tensor]:
    """Add the gradient of a micro-batch; returns its sum(w nats) and sum(w), over a whole step."""
    cfg = run.cfg
    # What changes from step to step is a tensor, or each value would compile a graph of its own.
    gamma = torch.full((), moment.mile_gamma, device=run.device) if cfg.mile_gamma else None
    prefix = torch.full((), moment.prefix_weight, device=run.device) if cfg.prefix_target else None
    grids = qat_grids(model) if moment.qat else None
    nats, weights = forward(model, batch.moved(run.put), grids, gamma, prefix, moment.looping)
    part = (weights * nats).sum() / cfg.train_batch_tokens
    part.backward()
    return [part.detach(), weights.sum() / cfg.train_batch_tokens]


def summed_gradients(optimizers: list, others: list[Tensor], run: Run) -> list[list[Tensor]]:
    """Each group's gradients, summed over ranks as `others` are; Muon's as this rank's shares."""
    muons = [opt for opt in optimizers if isinstance(opt, Muon)]
    for muon in muons:
        muon.launch()  # travels while the small gradients are packed and summed
    reduce_gradients(
        [
            p
            for opt in optimizers
            if opt not in muons
            for group in opt.param_groups
            for p in group["params"]
        ],
        others,
        run,
    )
    return [
        opt.gradients(group) if opt in muons else [p.grad for p in group["params"]]
        for opt in optimizers
        for group in opt.param_groups
    ]


def gradient_norms(gradients: list[list[Tensor]], optimizers: list, run: Run) -> Tensor:
    """Norm of each group's gradient, whoever holds its parts."""
    shared = [isinstance(opt, Muon) for opt in optimizers for _ in opt.param_groups]
    squares = torch.stack(
        [  # what every rank holds whole is counted on one
            torch.nn.utils.get_total_norm(group).square()
            * (part or run.ranks.is_main or run.ranks.num_parts == 1)
            for group, part in zip(gradients, shared, strict=True)
        ]
    )
    if run.ranks.num_parts > 1:
        run.ranks.add_up([squares])
    return squares.sqrt()


def train_step(
    forward: Forward,
    model: GPT,
    optimizers: list,
    rows: TrainingRows,
    step: int,
    moment: Moment,
    run: Run,
) -> Tensor:
    """One optimizer step; returns [mean loss, then the gradient norm of each group].

    The loss is sum(w nats) / sum(w) over the global batch, w = 1 but for MiLe, divided last.
    """
    cfg = run.cfg
    loss, weight = torch.zeros(1, device=run.device), torch.zeros(1, device=run.device)
    for first, count in micro_batches(cfg, run):
        batch = rows.batch(step * cfg.rows_per_step + first, count)
        torch._foreach_add_([loss, weight], backward(forward, model, batch, moment, run))
    if cfg.grad_clip_norm and cfg.clip_before_reduce:  # the bound is on each rank's own mean
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(model.parameters(), cfg.grad_clip_norm, norm / weight[0])
    gradients = summed_gradients(optimizers, [loss, weight], run)
    norms = gradient_norms(gradients, optimizers, run)
    scale = 1.0 / weight if cfg.mile_gamma else torch.ones_like(weight)
    norms, loss = norms * scale, loss * scale
    if cfg.grad_clip_norm and not cfg.clip_before_reduce:
        scale = scale * (cfg.grad_clip_norm / (norms.norm() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([g for group in gradients for g in group], scale[0])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * moment.lr_scale
            group["momentum"] = moment.momentum
            group["slow_share"] = moment.slow_share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cat([loss, norms])


def refuse_non_finite(stats: list[float], step: int, groups: list[dict]) -> None:
    """Raise FloatingPointError naming step and tensors if a loss or gradient is not finite."""
    if not all(map(math.isfinite, stats)):
        bad = [g["route"] for g, x in zip(groups, stats[1:], strict=True) if not math.isfinite(x)]
        raise FloatingPointError(
            f"step {step}: loss {stats[0]}, gradient not finite in: {'; '.join(bad) or 'no group'}"
        )


def fit_micro_batch(
    forward: Forward, model: GPT, rows: TrainingRows, moment: Moment, run: Run
) -> None:
    """Halve the rows of a forward until every rank's memory holds them and what training keeps.

    Raises torch.OutOfMemoryError if a single row, or what MICRO_BATCH_SEQS asks for, is too much.
    """
    cfg, most = run.cfg, -(-run.cfg.rows_per_step // run.ranks.world_size)
    while True:
        failed = 1.0
        with contextlib.suppress(torch.OutOfMemoryError):
            _kept = [torch.empty_like(p) for p in model.parameters() for _ in range(4)]
            backward(forward, model, rows.batch(0, min(run.micro_batch_rows, most)), moment, run)
            failed = 0.0
        model.zero_grad(set_to_none=True)
        if not run.ranks.agree(failed, "most"):
            return
        if cfg.micro_batch_seqs or run.micro_batch_rows == 1:
            raise torch.OutOfMemoryError(
                f"{run.micro_batch_rows} rows a forward are too many: "
                "lower MICRO_BATCH_SEQS, or take a smaller model"
            )
        run.micro_batch_rows //= 2
        run.folder.log(f"out of memory: trying {run.micro_batch_rows} rows a forward")


def compile_blocks(
    forward: Forward, model: GPT, rows: TrainingRows, moments: list[Moment], run: Run
) -> None:
    """On a CPU, compile one block for the training of all layers, if the run should earn it back.

    Only for runs by the clock, as what times decide does not repeat. Kept if trial passes of all
    that steps may do take less time with it; a machine without a C++ compiler goes on without.
    """
    cfg, saving = run.cfg, run.cfg.max_wallclock_seconds * REGION_GAIN
    if run.device.type != "cpu" or cfg.compile != "auto" or cfg.step_driven:
        return
    if saving < REGION_SECONDS:
        run.folder.log(
            f"blocks compiled:no, to save {saving:.0f} s it might take {REGION_SECONDS:.0f} s"
        )
        return
    kinds = {(count, moment) for _, count in micro_batches(cfg, run) for moment in moments}

    def trial() -> float:
        """Seconds of a forward and backward pass of every kind."""
        start = time.perf_counter()
        for count, moment in kinds:
            backward(forward, model, rows.batch(0, count), moment, run)
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    plain, compiling, why = min(trial(), trial(), trial()), 0.0, ""
    model.compiled_block = torch.compile(Block.forward, dynamic=False)
    try:
        compiling, compiled = trial(), min(trial(), trial(), trial())
    except Exception as error:  # a compiler fails in many ways
        compiled, why = plain, ": " + str(error).strip().split("\n")[0]
    if (
        run.ranks.agree(compiled / plain if kinds else 0.0, "most") >= 1.0
    ):  # some ranks have no rows
        model.compiled_block = None
        model.zero_grad(set_to_none=True)
    run.folder.log(
        "blocks compiled:{kept} seconds:{seconds:.1f} pass:{before:.1f}ms->{after:.1f}ms{why}",
        "blocks_compiled",
        kept="no" if model.compiled_block is None else "yes",
        why=why,
        seconds=compiling,
        before=1e3 * plain,
        after=1e3 * compiled,
    )


def prime(forward: Forward, model: GPT, rows: TrainingRows, run: Run) -> tuple[float, float]:
    """Compile and warm up every path of the run, untimed, and put everything back.

    Trains a few steps with throw-away optimizers, with and without QAT and loops. Returns the
    measured seconds of one calibration batch and of one evaluation batch.
    """
    cfg, run.phase = run.cfg, "priming"
    before = copy.deepcopy(model.state_dict())
    qat_kinds = {"late": [False, True], "always": [True], "off": [False]}[cfg.qat_mode]
    loop_kinds = [False, True] if cfg.num_loops else [False]
    momentum, gamma = cfg.muon_momentum, cfg.mile_gamma
    moments = [
        Moment(1.0, momentum, qat, False, gamma, looping=looping)
        for looping in loop_kinds
        for qat in qat_kinds
    ]
    fit_micro_batch(forward, model, rows, moments[-1], run)
    steps = max(cfg.warmup_steps, len(moments)) if run.compiled else len(moments)
    optimizers = build_optimizers(cfg, route_parameters(cfg, model), run.dtype, run.ranks)
    for step in range(steps):
        train_step(forward, model, optimizers, rows, step, moments[step % len(moments)], run)
        run.folder.log(f"warmup_step:{step + 1}/{steps}")
    model.load_state_dict(before)
    scored, ids = prime_scoring(forward, model, run), rows.batch(0, CALIBRATION_ROWS).input_ids
    compile_blocks(forward, model, rows, moments, run)
    return timed(lambda: collect_hessians(model, lambda n: ids, 1, math.inf, run), run), scored


def prime_scoring(forward: Forward, model: GPT, run: Run) -> float:
    """Compile and warm up what scoring runs; the measured seconds of an evaluation batch."""
    cfg, T, strip = run.cfg, run.cfg.eval_seq_len, run.cfg.eval_stride

    def blank(rows: int, *widths: int) -> Batch:  # not one tensor twice: it compiles anew
        batch = Batch(*(torch.full((rows, width), BOS) for width in widths))
        batch = batch.by_document(T) if cfg.attn_docs else batch
        return batch.moved(run.put)

    if cfg.ttt_mode in ("score_first", "train_then_score"):
        forward(model, blank(run.adaptation_rows, T, T))[0].sum().backward()
        model.zero_grad(set_to_none=True)
    whole, sliding = blank(run.scored_rows, T, T), blank(run.scored_rows, T, strip, strip)
    scored = timed(lambda: forward(model, whole)[0].sum().item(), run)
    if 0 < strip < T:
        scored = timed(lambda: forward(model, sliding)[0].sum().item(), run)
    return scored * cfg.eval_batch_seqs / run.scored_rows


@torch.no_grad()
def timed(work: Callable[[], object], run: Run) -> float:
    """Seconds of the second of two calls: by then all is compiled."""
    work()
    start = time.perf_counter()
    work()
    return run.ranks.agree(time.perf_counter() - start)


class Averages:
    """The weight averages of AVG_MODE: EMA, mean of snapshots (SWA), or SWA of the EMA."""

    def __init__(self, model: GPT, cfg: Config) -> None:
        self.model = model
        self.decay = cfg.ema_decay
        self.snapshots = 0  # that SWA has taken
        # "swa_of_ema" has both names in it.
        self.kept = {name: copy.deepcopy(model) for name in ("ema", "swa") if name in cfg.avg_mode}

    @torch.no_grad()
    def update(self, snapshot: bool) -> None:
        """Take in the weights of a step, without waiting for a GPU."""
        if "ema" in self.kept:
            self.move("ema", self.model, 1.0 - self.decay)
        if not snapshot:
            return
        self.snapshots += 1
        if "swa" in self.kept:  # of the EMA's weights, where there is one
            self.move("swa", self.kept.get("ema", self.model), 1.0 / self.snapshots)

    @torch.no_grad()
    def move(self, name: str, source: GPT, share: float) -> None:
        """Move an average A towards the weights W of `source`: A <- A + share (W - A)."""
        average: list[Tensor] = list(self.kept[name].parameters())
        torch._foreach_lerp_(average, list(source.parameters()), share)

    def acting(self, snapshot: bool) -> dict[str, bool]:
        """Each average that is kept: whether the step changed it."""
        changed = {"ema": True, "swa": snapshot}
        return {name: changed[name] for name in self.kept}

    def result(self, run: Run) -> GPT:
        """The model to export. Ask once: AVG_LAST_SHARE moves the average that is kept.

        SWA without any snapshot gives what it would have averaged, the EMA or the last weights.
        """
        if "swa" in self.kept and self.snapshots:
            run.folder.log(
                "swa:applying averaged {snapshots} checkpoints", "swa", snapshots=self.snapshots
            )
            name = "swa"
        elif "ema" in self.kept:
            run.folder.log("ema:applying EMA weights")
            name = "ema"
        else:
            return self.model
        if share := run.cfg.avg_last_share:
            run.folder.log(f"{name}:blended with {share:g} of the last weights")
            self.move(name, self.model, share)
        return self.kept[name]


@dataclass(frozen=True)
class Pending:
    """A step that a GPU may still be at work on, and that is not in the log yet."""

    stats: Callable[[], list[float]]  # waits for train_step()'s numbers
    moment: Moment
    show: bool  # in the log, even if it is not its turn


class Training:
    """All that training changes, saved and restored whole, whatever the number of ranks."""

    def __init__(self, model: GPT, reserve: float, data: list, run: Run) -> None:
        """`reserve` of the budget, in its unit, is kept for calibration."""
        cfg = run.cfg
        self.model = model
        self.run = run
        self.data = data  # what a checkpoint's data must be equal to
        self.step = 0  # steps done
        self.saved_at = 0.0  # seconds of training at the last checkpoint
        groups = route_parameters(cfg, model)
        self.optimizers = build_optimizers(cfg, groups, run.dtype, run.ranks)
        self.adam, self.muon = self.optimizers
        self.averages = Averages(model, cfg)
        queued_steps = int(run.device.type == "cuda")
        self.step_operations = step_operations(model)
        self.early_operations = step_operations(model, looping=False)
        self.schedule = Schedule(
            cfg, reserve, queued_steps, self.step_operations, self.early_operations
        )
        self.rounded_matrices = len(qat_grids(model))
        self.pending: Pending | None = None
        self.last_logged_share = -1  # of the run, in fiftieths

    @property
    def groups(self) -> list[dict]:
        """The parameter groups of all optimizers, in the order of train_step()'s norms."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def spent(self, seconds: float) -> float:
        """What training has cost, in the budget's unit, `seconds` into it."""
        if self.schedule.unit == "operations":
            return self.run.ledger.training_operations
        return seconds

    def begin_step(self, seconds: float) -> Moment:
        """What the schedules say of the step that is to be made, `seconds` into training."""
        run, schedule = self.run, self.schedule
        spent = self.spent(seconds)
        progress_before = schedule.progress(self.step - 1, schedule.last_spent)
        schedule.observe(self.step, spent)
        moment = schedule.at(self.step, spent)
        if moment.done:
            return moment
        progress = schedule.progress(self.step, spent)
        if run.ranks.is_main and progress_before < SIZE_FORESEEN_AT <= progress:
            foresee_size(self.model, self.step, run)
        return moment

    def end_step(self, stats: Tensor, moment: Moment, seconds: float, show: bool) -> None:
        """Take in a step that was begun at `seconds`; its own numbers are read one step later."""
        run = self.run
        self.averages.update(moment.snapshot)
        self.note_activity(moment)
        self.log_pending(seconds)
        self.step += 1
        operations = self.step_operations if moment.looping else self.early_operations
        run.ledger.training_operations += operations
        if self.step % REPLICA_CHECK_STEPS == 0:
            run.ranks.check_replicas(self.model, self.step)
        self.pending = Pending(run.fetch(stats), moment, show)

    def note_activity(self, moment: Moment) -> None:
        """Count, for each technique that acts at some time only, whether it acts in this step."""
        acting = self.schedule.acting(moment) | self.averages.acting(moment.snapshot)
        for name, acts in acting.items():
            if name.endswith("_qat") and not self.rounded_matrices:
                acts = False
            self.run.ledger.note(name, acts)

    def log_pending(self, seconds: float, show: bool = False) -> None:
        """Check and log the last finished step; `seconds` have passed since training began."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        loss, *norms = pending.stats()
        refuse_non_finite([loss, *norms], self.step, self.groups)
        iterations = self.run.cfg.iterations
        progress = self.schedule.progress(self.step, self.spent(seconds))
        template = (
            "step:{step}/{iterations} train_loss:{train_loss:.4f} train_time:{ms:.0f}ms "
            "step_avg:{step_avg:.2f}ms lr_scale:{lr_scale:.4f} eta:{eta:.0f}s"
        )
        shown = show or pending.show or self.is_due(progress)
        if shown:
            self.last_logged_share = int(50 * progress)
        self.run.folder.log(
            template if shown else "",
            "step",
            step=self.step,
            iterations=iterations,
            train_loss=loss,
            ms=1e3 * seconds,
            step_avg=1e3 * seconds / self.step,
            lr_scale=pending.moment.lr_scale,
            tflops=self.run.ledger.training_operations / 1e12,
            eta=max(0.0, seconds * (1 - progress) / max(progress, 1e-9)),
        )

    def is_due(self, progress: float) -> bool:
        """Whether it is the last step's turn to be shown in the log."""
        every = self.run.cfg.train_log_every
        if self.step <= 10:
            return True
        if every:
            return self.step % every == 0
        return int(50 * progress) > self.last_logged_share

    def save(self, seconds: float) -> None:
        """Write a checkpoint, after `seconds` of training; all ranks take part."""
        run, schedule = self.run, self.schedule
        self.saved_at = seconds
        muon = self.muon.whole_state()
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"step {self.step}: {name} is not finite any more")
        run.ranks.check_replicas(self.model, self.step)
        run.folder.save_checkpoint(
            {
                "step": self.step,
                "seconds": seconds,
                "data": self.data,
                "muon": muon,
                "model": self.model.state_dict(),
                "adam": self.adam.state_dict(),
                "averages": [average.state_dict() for average in self.averages.kept.values()],
                "snapshots": self.averages.snapshots,
                "schedule": [schedule.qat, schedule.last_spent, list(schedule.step_seconds)],
                "operations": run.ledger.training_operations,
                "looping": schedule.looping,
                "occasions": dict(run.ledger.occasions),
                "activity": dict(run.ledger.activity),
                "last_logged_share": self.last_logged_share,
            }
        )

    def restore(self, saved: dict) -> None:
        """Go on from a checkpoint; raises RuntimeError if it is of other data."""
        run, schedule = self.run, self.schedule
        if saved["data"] != self.data:
            raise RuntimeError(
                f"the checkpoint was made on other data ({saved['data']}, now "
                f"{self.data}): give the run its data back, or begin a new one"
            )
        self.step = saved["step"]
        self.saved_at = saved["seconds"]
        run.ledger.training_clock.banked = saved["seconds"]
        self.model.load_state_dict(saved["model"])
        self.adam.load_state_dict(saved["adam"])
        self.muon.load_whole_state(saved["muon"])
        for average, state in zip(self.averages.kept.values(), saved["averages"], strict=True):
            average.load_state_dict(state)
        self.averages.snapshots = saved["snapshots"]
        schedule.qat, schedule.last_spent, step_seconds = saved["schedule"]
        schedule.step_seconds.extend(step_seconds)
        run.ledger.training_operations = saved["operations"]
        schedule.looping = saved.get("looping", True)
        run.ledger.occasions = Counter(saved["occasions"])
        run.ledger.activity = Counter(saved["activity"])
        self.last_logged_share = saved["last_logged_share"]
        run.folder.log(
            "resumed from step:{step} train_time:{ms:.0f}ms",
            "resumed",
            step=self.step,
            ms=1e3 * saved["seconds"],
        )
        run.ledger.mark_ineligible(f"resumed from a checkpoint of step {self.step}")
        for change in run.folder.larger_budgets:
            run.ledger.mark_ineligible(f"{change}: rates are those of the longer run from here on")

    def save_if_asked(self, seconds: float) -> None:
        """Write a checkpoint if one is due or a signal asks the run to end; then end it."""
        if self.run.continued:
            self.run.continued = False
            self.run.ledger.mark_ineligible(
                f"stopped and continued before step {self.step + 1}: its clock went on meanwhile"
            )
        every = self.run.cfg.checkpoint_seconds
        # Not written back to run.signal, which a signal may set while ranks agree.
        asked = int(self.run.ranks.agree(self.run.signal, "most"))
        due = every > 0 and seconds - self.saved_at >= every
        if asked or due:
            self.log_pending(seconds)
            self.save(seconds)
            self.stop(asked)

    def stop(self, asked: int) -> None:
        """End the process, once the checkpoint is written, if signal number `asked` is not 0."""
        if asked:
            name = self.run.folder.path.name if self.run.folder.path is not None else ""
            situation = f"after step {self.step}; RESUME=1 RUN_ID={name} goes on from there"
            self.run.stop(asked, situation)


def log_starts(state: Training, moment: Moment, qat_begins: bool, loops_begin: bool) -> None:
    """Log what begins with this step."""
    run, mode = state.run, state.run.cfg.qat_mode
    if loops_begin:
        run.folder.log(
            "depth_loop:enabled step:{step} layers:{layers}",
            "depth_loop",
            step=state.step,
            layers=[layer.block for layer in state.model.plan],
        )
    if "swa" in state.averages.kept and moment.snapshot and not run.ledger.activity["swa"]:
        run.folder.log(f"swa:start step:{state.step + 1}")
    if not qat_begins:
        return
    run.folder.log(
        "{mode}_qat:enabled step:{step} scale:{scale:.4f} matrices:{matrices}",
        f"{mode}_qat",
        mode=mode,
        step=state.step,
        scale=moment.lr_scale,
        matrices=state.rounded_matrices,
    )


def train(forward: Forward, state: Training, rows: TrainingRows, val: Validation, run: Run) -> GPT:
    """Train until the budget less the reserve ends; returns the averaged model."""
    run.phase = "training"
    cfg, model, schedule = run.cfg, state.model, state.schedule
    clock = run.ledger.training_clock
    with clock.running(), training_bar(schedule, run) as bar:
        while True:
            step, seconds = state.step, run.ranks.agree(clock.elapsed())
            state.save_if_asked(seconds)
            qat_before = schedule.qat
            looping_before = schedule.looping
            moment = state.begin_step(seconds)
            if moment.done:
                break
            if cfg.val_loss_every and step and step % cfg.val_loss_every == 0:
                run.settle()
                with clock.running(False):
                    result = evaluate("validation", forward, model, val, run)
                    report(f"step:{step}/{cfg.iterations}", result, run, step)
            qat_begins = moment.qat and not qat_before
            loops_begin = moment.looping and not looping_before
            log_starts(state, moment, qat_begins, loops_begin)
            stats = train_step(forward, model, state.optimizers, rows, step, moment, run)
            state.end_step(stats, moment, seconds, show=qat_begins or loops_begin)
            bar.update(schedule.position(state.step, state.spent(seconds)) - bar.n)
        state.log_pending(clock.elapsed(), show=True)
    state.save(run.ranks.agree(clock.elapsed()))  # off the clock: training has ended
    run.phase = "calibration"  # a signal ends the run at once from here on
    state.stop(int(run.ranks.agree(run.signal, "most")))  # a signal that came after the last step
    run.ledger.trained_seconds = clock.elapsed()
    reasons = {
        "seconds": "stopping_early: wallclock_cap",
        "operations": "stopping: MAX_TRAIN_TFLOPS holds no further step",
    }
    reason = "stopping: last step"
    if state.step < cfg.iterations:
        reason = reasons[schedule.unit]
    run.folder.log(
        "{reason} train_time:{ms:.0f}ms step:{step}/{iterations}",
        "trained",
        step=state.step,
        ms=1e3 * run.ledger.trained_seconds,
        iterations=cfg.iterations,
        reason=reason,
    )
    return state.averages.result(run)


def as_trained(model: GPT, state: Training, run: Run) -> tuple[GPT, Run]:
    """Model and run without loops, if training ended before ENABLE_LOOPING_AT; else as they are.

    The weights never met the looped plan. What they are worth is what they were trained for.
    """
    if not run.cfg.num_loops or state.schedule.looping:
        return model, run
    run.folder.log("warning: training ended before ENABLE_LOOPING_AT: exported without loops")
    cfg = replace(run.cfg, num_loops=0)
    plain = GPT(cfg, model.kernel, run.dtype).to(run.device)
    plain.penalty = model.penalty
    for name, parameter in plain.named_parameters():
        trained = model.get_parameter(name).detach()
        parameter.data.copy_(trained[: len(parameter)] if parameter.ndim else trained)
    return plain, run.with_settings(cfg)


def training_bar(schedule: Schedule, run: Run) -> tqdm:
    """The progress bar of training, in the unit that ends the run."""
    units = {"steps": "step", "seconds": "s", "operations": "FLOP"}
    return run.folder.progress("training", total=schedule.budget, unit=units[schedule.unit])


# =================================================================================================
# Quantization
# Policy (which tensor gets which grid), quantizers (tensor to integers and scales), and the
# Hessians that GPTQ needs. None of them knows about files.
# =================================================================================================


ROLES = ("mlp", "attn", "emb", "aux")  # of parameters, in BITS and CLIP_SIGMAS


@functools.lru_cache(8)  # asked for every matrix in every step with fake quantisation
def values_by_role(name: str, text: str, kind: type, pattern: str, expected: str) -> dict:
    """The values of a text like mlp:6,attn:6,emb:8,aux:8 of roles and matrices, fp16 as 0."""
    found: dict = {}
    for part in text.split(","):
        role, _, value = part.strip().partition(":")
        if role in found or not re.fullmatch(r"[\w.]+", role) or not re.fullmatch(pattern, value):
            raise Refusal(
                f"{name}={text!r}: {part!r} is not {', '.join(ROLES)} or a tensor "
                f"and a colon and {expected}"
            )
        found[role] = 0 if value == "fp16" else kind(value)
    if not set(ROLES) <= set(found):
        raise Refusal(f"{name}={text} must give each of {', '.join(ROLES)} once")
    return found


@dataclass(frozen=True, kw_only=True)
class QatSettings(Part):
    """Training through the integer grid (quantisation-aware training, QAT)."""

    title = "Quantisation-aware training"
    prefixes: ClassVar[tuple[str, ...]] = ("QAT_",)

    qat_mode: str = training_knob(
        "late", ("late", "always", "off"), "When training rounds weights to the integer grid."
    )
    late_qat_threshold: float = training_knob(
        0.15, (0.0, 1.0), "Rate scale below which QAT_MODE=late starts."
    )
    qat_clip: str = training_knob(
        "absmax", ("absmax", "quantile"), "End of a row's grid: its maximum, or a quantile."
    )
    qat_targets: str = training_knob(
        "stored",
        ("stored", "linears", "aux"),
        "Which linears QAT rounds: those stored as integers, all, those outside the blocks.",
    )


@dataclass(frozen=True, kw_only=True)
class GridSettings(Part):
    """Which tensors become integers, of how many bits and in which steps."""

    title = "Quantisation: grids"

    bits: str = model_knob(
        "mlp:6,attn:6,emb:8,aux:8", (), "Bits by role or tensor (tok_emb): 2 to 8, or fp16."
    )
    int8_keep_float_max_numel: int = model_knob(
        65536, (0, 1 << 30), "Tensors of up to this many elements are stored as fp16."
    )
    quant_clip: str = training_knob(
        "percentile",
        ("percentile", "std", "std_published"),
        "What ends a row's grid: CLIP_SEARCH, or CLIP_SIGMAS; std takes the row's maximum if that "
        "is farther, and steps that are cheap to code, std_published any fp16.",
    )
    clip_sigmas: str = training_knob(
        "mlp:12.85,attn:12.85,emb:10,aux:30",
        (),
        "Standard deviations of a row at which QUANT_CLIP=std and std_published clip, by role or "
        "tensor.",
        tries=("mlp:8,attn:8,emb:8,aux:20",),
    )
    gate_storage: str = training_knob(
        "fp16", ("fp16", "int8"), "How gates of attention are stored; int8 has a scale for a row."
    )
    clip_search: str = training_knob(
        "matrix",
        ("absmax", "matrix", "row"),
        "Clips of QUANT_CLIP=percentile: the maximum, the best quantile of a matrix or a row.",
    )
    q_scale_floor: str = training_knob(
        "inv_clip", ("inv_clip", "tiny"), "Least step of a grid: 1 / largest integer, or 2^-14."
    )

    @property
    def clips_by_deviation(self) -> bool:
        """Whether CLIP_SIGMAS sets the steps of grids, and so the size of the artifact."""
        return self.quant_clip != "percentile"

    @property
    def bits_by_role(self) -> dict[str, int]:
        """Bits of each role's integers, or of a tensor's by its name; 0 for fp16."""
        return values_by_role("BITS", self.bits, int, r"[2-8]|fp16", "2 to 8 or fp16")

    @property
    def sigmas_by_role(self) -> dict[str, float]:
        """Standard deviations of a row at which its grid ends, by role or tensor."""
        return values_by_role(
            "CLIP_SIGMAS",
            self.clip_sigmas,
            float,
            r"[1-9]\d{0,2}(\.\d+)?",
            "a number from 1 to 999",
        )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Tensors named in BITS and CLIP_SIGMAS are of the model."""
        for name, given in (("BITS", cfg.bits_by_role), ("CLIP_SIGMAS", cfg.sigmas_by_role)):
            layers = [int(number) for role in given for number in re.findall(r"\d+", role)]
            yield (
                all(layer < cfg.num_layers for layer in layers),
                f"{name} names a layer beyond NUM_LAYERS",
            )
            for tensor in set(given) - set(ROLES):
                yield (
                    f"{tensor}.weight" in kinds_within(cfg),
                    f"{name} names {tensor!r}, which is no tensor of the model",
                )


@dataclass(frozen=True, kw_only=True)
class GptqSettings(Part):
    """Rounding that takes the inputs of a matrix into account, and what is pruned."""

    title = "Quantisation: GPTQ and pruning"
    prefixes: ClassVar[tuple[str, ...]] = ("GPTQ_", "PRUNE_")

    gptq_variant: str = training_knob(
        "full", ("full", "simple", "off"), "Form of GPTQ; off rounds to nearest."
    )
    gptq_actorder: bool = training_knob(True, (), "Round columns of large activations first.")
    gptq_select: str = training_knob(
        "mse", ("mse", "hessian"), "Error by which GPTQ chooses a clip."
    )
    gptq_calib: str = training_knob(
        "train",
        ("train", "selfgen", "train_after_cap"),
        "Text for calibration: training data within the budget, text the model draws (slow), "
        "training data after the budget (not eligible).",
    )
    gptq_calib_batches: int = training_knob(256, (1, 10**6), "Calibration batches, of 8 rows each.")
    gptq_block_size: int = training_knob(
        128, (1, 1 << 16), "Columns that GPTQ rounds between updates of all later ones."
    )
    prune_frac: float = training_knob(
        0.0, (0.0, 0.99), "Fraction of each large matrix that is zeroed before export."
    )
    prune_pct: float = training_knob(
        0.0, (0.0, 0.99), "Fraction of the integers below 8 bits that is zeroed at export."
    )


MAX_RANK = 64  # of a correction, by settings and in an artifact


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings(Part):
    """What is stored beside a matrix's integers where they cost most."""

    title = "Quantisation: corrections"
    prefixes: ClassVar[tuple[str, ...]] = ("LQER_", "AWQ_")

    lqer_top_k: int = training_knob(
        0, (0, 64), "Matrices of largest rounding error that get a low-rank correction; 0 is off."
    )
    lqer_rank: int = training_knob(4, (1, MAX_RANK), "Rank of such a correction.")
    lqer_group: int = training_knob(
        64, (1, 1 << 16), "Numbers of its right factor that share a scale."
    )
    awq_columns: int = training_knob(
        0, (0, 1 << 16), "Columns of the one group of inputs that GPTQ gives 8 bits; 0 is off."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A group with bits of its own is a matter of GPTQ with one candidate a row."""
        yield (
            cfg.awq_columns == 0 or (cfg.clips_by_deviation and cfg.gptq_variant == "full"),
            "AWQ_COLUMNS needs QUANT_CLIP=std or std_published and GPTQ_VARIANT=full",
        )


CALIBRATION_ROWS, TEMPERATURE = 8, 0.8  # rows a calibration batch; of rows the model draws
CLIP_QUANTILES, QAT_QUANTILE, INT8_QUANTILE = (0.999, 0.9995, 0.9999, 0.99999), 0.9995, 0.9999984
TINY_STEP = 2.0**-14  # smallest normal fp16
SCALES_AN_OCTAVE = 8  # of QUANT_CLIP=std
DAMPING, DAMPING_TRIES = 0.01, 5
LEAST_HALF = 2.0**-24  # the smallest positive fp16
INT8_TOP = 127  # of a grid of 8 bits
LEFT_RANGE, RIGHT_RANGE = (-2, 1), (-8, 7)  # of the integers of a correction's factors
LEFT_DIVISOR, RIGHT_DIVISOR = 1.5, 7.5  # the largest magnitude lands half a step past the end


@dataclass(frozen=True)
class Protected:
    """Columns of a matrix (r, c) with steps of their own, finer than those of its other columns."""

    start: int
    width: int
    scale: Tensor  # fp16 (r,)

    @property
    def columns(self) -> slice:
        """The columns."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True)
class LowRank:
    """A correction A B of a quantised matrix (r, c), of rank k, in integers.

    Low-rank quantisation error reconstruction (LQER): arXiv:2402.02446; the grids are those of
    pull request 1855.
    """

    left: Tensor  # int8 (r, k), within LEFT_RANGE
    right: Tensor  # int8 (k, c), within RIGHT_RANGE
    left_scale: Tensor  # fp16 ()
    right_scales: Tensor  # fp16, one for each group of the right factor by rows
    group: int

    def product(self) -> Tensor:
        """The correction, float32 (r, c)."""
        scales = self.right_scales.float().repeat_interleave(self.group)[: self.right.numel()]
        right = self.right.float() * scales.view_as(self.right)
        return (self.left_scale.float() * self.left.float()) @ right


@dataclass(frozen=True)
class Stored:
    """A tensor as the artifact holds it: integers with one scale a row, or floats."""

    values: Tensor  # int8 (rows, cols), or fp16 of any shape, or bytes
    scale: Tensor | None = None  # fp16 (rows,)
    protected: Protected | None = None
    low_rank: LowRank | None = None

    @property
    def kind(self) -> str:
        """Its storage kind, of STORAGE_KINDS."""
        if self.values.dtype == torch.uint8:
            return "packed"
        if self.scale is None:
            return "float"
        protected = "" if self.protected is None else "_protected"
        low_rank = "" if self.low_rank is None else "_low_rank"
        return f"grid{protected}{low_rank}"

    def numbers(self) -> list[int]:
        """The numbers of its row in the header, from which the shapes of its arrays follow."""
        numbers = [*self.values.shape]
        if self.protected is not None:
            numbers += [self.protected.start, self.protected.width]
        if self.low_rank is not None:
            numbers += [self.low_rank.left.size(1), self.low_rank.group]
        return numbers

    def arrays(self) -> list[Tensor]:
        """Its streams in the artifact, integers before floats."""
        integers, floats = [self.values], []
        if self.scale is not None:
            floats.append(self.scale)
        if self.protected is not None:
            floats.append(self.protected.scale)
        if self.low_rank is not None:
            integers += [self.low_rank.left, self.low_rank.right]
            floats += [self.low_rank.left_scale, self.low_rank.right_scales]
        return integers + floats

    @classmethod
    def of(cls, kind: str, numbers: list[int], arrays: list[Tensor]) -> Stored:
        """The tensor that has this kind, these numbers and these arrays."""
        parts = iter(arrays)
        values = next(parts)
        is_corrected = "low_rank" in kind
        factors = [next(parts), next(parts)] if is_corrected else []
        scale = next(parts, None)
        protected = low_rank = None
        if "protected" in kind:
            protected = Protected(numbers[2], numbers[3], next(parts))
        if is_corrected:
            left, right = factors
            low_rank = LowRank(left, right, next(parts), next(parts), numbers[-1])
        return cls(values, scale, protected, low_rank)

    def restore(self) -> Tensor:
        """The float32 tensor that the values stand for."""
        values = self.values.float()
        if self.scale is None:
            return values
        steps = self.scale.float()[:, None]
        if self.protected is not None:
            steps = steps.repeat(1, values.size(1))
            steps[:, self.protected.columns] = self.protected.scale.float()[:, None]
        values.mul_(steps)
        if self.low_rank is not None:
            values.add_(self.low_rank.product())
        return values


def setting_of(model: GPT, name: str, by_role: dict):
    """What BITS or CLIP_SIGMAS says of a parameter, by its own name or by its role."""
    return by_role.get(name.removesuffix(".weight"), by_role[model.kinds[name].role])


def bits_of(model: GPT, name: str) -> int:
    """Bits of a parameter's integers; 0 for fp16, as all but large matrices are stored."""
    parameter = model.get_parameter(name)
    small = parameter.ndim != 2 or parameter.numel() <= model.cfg.int8_keep_float_max_numel
    if small or not model.kinds[name].may_be_integers:
        return 0
    return setting_of(model, name, model.cfg.bits_by_role)


def largest_integer(bits: int) -> int:
    """The top of a symmetric grid: 31 at 6 bits, 127 at 8."""
    return 2 ** (bits - 1) - 1


def row_scales(clip: Tensor, levels: int, floor: str) -> Tensor:
    """The step of each row's grid whose top is at `clip`, but no less than Q_SCALE_FLOOR says.

    inv_clip keeps rows of small numbers coarse, and so cheap to code.
    """
    least = 1.0 / levels if floor == "inv_clip" else TINY_STEP
    return (clip / levels).clamp_min(least)


def fp16_scale(scale: Tensor) -> Tensor:
    """The nearest fp16, but never 0: a row of zeros would be divided by its scale."""
    return scale.half().clamp_min(LEAST_HALF)


def deviation_scales(W: Tensor, levels: int, sigmas: float) -> Tensor:
    """Row scales that put `sigmas` deviations at the grid's top: (r, c), c >= 2 -> fp16 (r,).

    s = fp16(k std(row) / top), std with n - 1, as the pull request 1855 has it. The step is
    k / top deviations, so that k sets the integers' entropy.
    """
    return fp16_scale(sigmas * W.std(dim=1) / levels)


def qat_grids(model: GPT) -> dict[str, int]:
    """Name and bits (6 for what is stored as fp16) of each linear weight that QAT reaches."""
    grids = {}
    for name, kind in model.kinds.items():
        if not kind.may_be_rounded:
            continue
        bits = bits_of(model, name)
        reached = {"stored": bits > 0, "linears": True, "aux": kind.role == "aux"}
        if reached[model.cfg.qat_targets]:
            grids[name] = bits or 6
    return grids


def row_quantile(x: Tensor, q: float) -> Tensor:
    """torch.quantile of rows, (r, c) -> (r, 1), by the few largest: quick, and it compiles."""
    place = q * (x.size(1) - 1)
    top = x.topk(x.size(1) - int(place), dim=1).values
    return torch.lerp(top[:, -1:], top[:, -2:][:, :1], place - int(place))


def fake_quantized(model: GPT, grids: dict[str, int]) -> dict[str, Tensor]:
    """The weights of `grids` on their grids, clamp(round(W / s)) s, where s is by QAT_CLIP.

    Gradients pass as if nothing had been rounded.
    """
    seen = {}
    for name, bits in grids.items():
        weight = model.get_parameter(name)
        levels = largest_integer(bits)
        magnitude = weight.detach().abs()
        if model.cfg.qat_clip == "quantile":
            clip = row_quantile(magnitude, QAT_QUANTILE)
        else:
            clip = magnitude.amax(dim=1, keepdim=True)
        scale = row_scales(clip, levels, model.cfg.q_scale_floor)
        grid = torch.round(weight.detach() / scale).clamp(-levels, levels) * scale
        seen[name] = weight + (grid - weight.detach())
    return seen


def clip_candidates(W: Tensor, bits: int, cfg: Config, sigmas: float = 0.0) -> Tensor:
    """Row scales to choose from, the row maximum's last: (r, c) -> float32 (candidates, r).

    QUANT_CLIP=std has only one: the row's grid ends at `sigmas` standard deviations, or at its
    maximum where that is farther. The scale is rounded to a logarithmic grid, which costs nothing
    in error and leaves few different scales to be coded. std_published has deviation_scales(), but
    for a single column, which has no deviation: there a grid ends at the maximum.
    """
    if cfg.quant_clip == "std_published" and W.size(1) > 1:
        return deviation_scales(W, largest_integer(bits), sigmas).float()[None]
    clips = W.abs().amax(dim=1)[None]
    if cfg.quant_clip == "std":
        clips = torch.maximum(clips, sigmas * W.std(dim=1, correction=0))
        octaves = torch.round(SCALES_AN_OCTAVE * (clips / largest_integer(bits)).log2())
        return torch.exp2(octaves / SCALES_AN_OCTAVE).clamp_min(TINY_STEP)
    if cfg.clip_search != "absmax":
        quantiles = torch.tensor(CLIP_QUANTILES, device=W.device)
        clips = torch.cat([torch.quantile(W.abs(), quantiles, dim=1), clips])
    return row_scales(clips, largest_integer(bits), cfg.q_scale_floor)


def pick(errors: Tensor, Q: Tensor, scales: Tensor, cfg: Config) -> Stored:
    """The candidate of least error: (n, r), (n, r, c), (n, r) -> by matrix, or by row."""
    rows = torch.arange(errors.size(1), device=errors.device)
    best = errors.argmin(0)
    if cfg.clip_search != "row":
        best = errors.sum(1).argmin().expand_as(rows)
    return Stored(Q[best, rows].to(torch.int8), scales[best, rows])


def grids_of(
    scales: Tensor, bits: int, num_columns: int, protected: Protected | None
) -> tuple[Tensor, Tensor]:
    """Steps, (n, r, 1) or where they differ by column (n, r, c), and largest integers, (c,)."""
    steps = scales.float().unsqueeze(-1)
    tops = torch.full((num_columns,), float(largest_integer(bits)), device=scales.device)
    if protected is not None:
        steps = steps.repeat(1, 1, num_columns)
        steps[..., protected.columns] = protected.scale.float()[:, None]
        tops[protected.columns] = INT8_TOP
    return steps, tops


def protect(W: Tensor, group: slice | None, cfg: Config, sigmas: float) -> Protected | None:
    """A group of columns on a grid of 8 bits that ends where their rows' own do."""
    if group is None:
        return None
    scale = clip_candidates(W, 8, cfg, sigmas)[-1].half()
    return Protected(group.start, group.stop - group.start, scale)


def round_to_nearest(
    W: Tensor, bits: int, cfg: Config, sigmas: float = 0.0, group: slice | None = None
) -> Stored:
    """Nearest integers at the clip of least squared error; `group` are columns of 8 bits."""
    scales = clip_candidates(W, bits, cfg, sigmas).half()
    protected = protect(W, group, cfg, sigmas)
    step, tops = grids_of(scales, bits, W.size(1), protected)
    Q = torch.round(W / step).clamp(-tops, tops)
    made = pick((W - Q * step).square().mean(dim=2), Q, scales, cfg)
    return replace(made, protected=protected)


def int8_rows(W: Tensor) -> Stored:
    """Embedding tables: nearest of +-127 steps of a row's INT8_QUANTILE / 127."""
    clip = torch.quantile(W.abs(), INT8_QUANTILE, dim=1)
    scale = row_scales(clip, 127, "inv_clip")
    q = torch.round(W.clamp(-clip[:, None], clip[:, None]) / scale[:, None]).clamp(-127, 127)
    return Stored(q.to(torch.int8), scale.half())


def gate_rows(W: Tensor) -> Stored:
    """Gates by GATE_STORAGE=int8: nearest of +-127 steps of fp16(max |row| / 127)."""
    scale = fp16_scale(W.abs().amax(dim=1) / INT8_TOP)
    q = torch.round(W / scale.float()[:, None]).clamp(-INT8_TOP, INT8_TOP)
    return Stored(q.to(torch.int8), scale)


def inverse_factor(H: Tensor) -> Tensor:
    """Upper U with U^T U = (H + damping)^-1, (c, c); damping grows in tries, then LinAlgError."""
    identity = torch.eye(H.size(0), device=H.device)
    damping = DAMPING * H.diagonal().mean().clamp_min(1e-12)
    for _ in range(DAMPING_TRIES):
        with contextlib.suppress(torch.linalg.LinAlgError):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(H + damping * identity))
            return torch.linalg.cholesky(inverse, upper=True)
        damping = damping * 10
    raise torch.linalg.LinAlgError("no damping made the Hessian positive definite")


def gptq(
    W: Tensor, H: Tensor, bits: int, cfg: Config, sigmas: float = 0.0, group: slice | None = None
) -> Stored:
    """Integers Q and row scales s that keep ||(W - s Q) X||^2 small, H = X X^T.

    W: (r, c), H: (c, c), float32. arXiv:2210.17323: the rounding error of a column is made up for
    in the columns that are not rounded yet. All clip candidates are tried, and the one of the
    least error is taken, squared or by the Hessian (GPTQ_SELECT). `group` are columns of 8 bits.
    """
    scales = clip_candidates(W, bits, cfg, sigmas).half()
    protected = protect(W, group, cfg, sigmas)
    step, tops = grids_of(scales, bits, W.size(1), protected)
    dead = H.diagonal() == 0  # inputs that were never seen
    H = H + torch.diag(dead.float())
    order = torch.arange(W.size(1), device=W.device)
    if cfg.gptq_actorder:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
    W = W.masked_fill(dead, 0.0)[:, order]
    H = H[order][:, order]
    if step.size(2) > 1:
        step = step[..., order]
    Q = feed_back(W, step, inverse_factor(H), tops[order], cfg)
    error = W - Q * step
    weighed = error @ H if cfg.gptq_select == "hessian" else error
    made = pick((weighed * error).mean(dim=2), Q[..., torch.argsort(order)], scales, cfg)
    return replace(made, protected=protected)


def feed_back(W: Tensor, step: Tensor, U: Tensor, tops: Tensor, cfg: Config) -> Tensor:
    """GPTQ's loop over columns i: e = (w_i - q_i s) / U_ii, then w_j <- w_j - e U_ij for j > i.

    W: (r, c), step: (n, r, 1) or (n, r, c) of n candidates, U: (c, c), tops: (c,), the largest
    integers -> Q: (n, r, c).
    """
    levels, diagonal = tops.tolist(), U.diagonal().tolist()
    rest = W.T.repeat(1, len(step))  # (c, n r): what the loop reads and writes lies together
    steps = step.permute(2, 0, 1).reshape(step.size(2), -1).expand_as(rest)
    Q = torch.empty_like(rest)
    for start in range(0, len(rest), cfg.gptq_block_size):
        stop, errors = min(start + cfg.gptq_block_size, len(rest)), []
        for col in range(start, stop):
            column = rest[col]
            q = torch.div(column, steps[col], out=Q[col]).round_()
            q.clamp_(-levels[col], levels[col])
            errors.append((column - q * steps[col]).div_(diagonal[col]))
            rest[col + 1 : stop].addcmul_(U[col, col + 1 : stop, None], errors[-1], value=-1)
        rest[stop:] -= U[start:stop, stop:].T @ torch.stack(errors)
    return Q.T.reshape(len(step), *W.shape)


def protected_group(
    matrices: dict[str, Tensor], activation_rms: dict[str, Tensor], width: int
) -> tuple[str, slice]:
    """Of all aligned groups of input columns the one worth most bits: matrix and columns.

    AWQ-lite of pull request 1945, after arXiv:2306.00978: the score is the sum over the group of
    the root mean square of a column's activations times its mean |w|. A remainder of columns is
    no group. The name is "" where no matrix has a whole group.
    """
    best, best_score = ("", slice(0, 0)), -math.inf
    for name, W in matrices.items():
        salience = activation_rms[name] * W.abs().mean(dim=0)
        whole = len(salience) // width * width
        scores = salience[:whole].view(-1, width).sum(dim=1)
        if whole and float(scores.max()) > best_score:
            start = width * int(scores.argmax())
            best, best_score = (name, slice(start, start + width)), float(scores.max())
    return best


def quantize_factors(A: Tensor, B: Tensor, group: int) -> LowRank:
    """Factors (r, k) and (k, c) on a correction's grids.

    A has one scale, max |A| / 1.5; B has one for each `group` values in row-major order, max / 7.5.
    The last group may be shorter.
    """
    left_scale = fp16_scale(A.abs().max() / LEFT_DIVISOR)
    left = torch.round(A / left_scale.float()).clamp(*LEFT_RANGE)
    groups = B.flatten().split(group)
    largest = torch.stack([part.abs().max() for part in groups])
    right_scales = fp16_scale(largest / RIGHT_DIVISOR)
    scaled = [part / scale for part, scale in zip(groups, right_scales.float(), strict=True)]
    right = torch.round(torch.cat(scaled)).clamp(*RIGHT_RANGE).view_as(B)
    return LowRank(left.to(torch.int8), right.to(torch.int8), left_scale, right_scales, group)


def low_rank_correction(error: Tensor, rank: int, group: int) -> LowRank:
    """The correction of rank `rank` that takes most of an error (r, c): A = U S, B = V^T."""
    U, S, Vh = torch.linalg.svd(error, full_matrices=False)
    return quantize_factors(U[:, :rank] * S[:rank], Vh[:rank], group)


def largest_errors(errors: dict[str, Tensor], count: int) -> list[str]:
    """Names of the `count` matrices of largest Frobenius norm, largest first."""
    norms = {name: float(error.norm()) for name, error in errors.items()}
    return sorted(norms, key=lambda name: -norms[name])[:count]


@torch.no_grad()
def order_hidden_units(model: GPT) -> None:
    """Put each MLP's hidden units in the order of their rows' deviation, which changes no output.

    Rows of fc and columns of proj are permuted alike. The range coder tells scales that ascend by
    their differences, so that the log2(u!) bits of an order are saved and nothing is stored.
    """
    for module in model.modules():
        if isinstance(module, MLP):
            order = torch.argsort(module.fc.weight.float().std(dim=1), stable=True)
            module.fc.weight.copy_(module.fc.weight[order])
            module.proj.weight.copy_(module.proj.weight[:, order])


def weighted_error(W: Tensor, stored: Stored, H: Tensor) -> float:
    """GPTQ's objective tr((W - Q) H (W - Q)^T), in float64."""
    delta = (W - stored.restore().to(W.device)).double()
    return float(((delta @ H.double()) * delta).sum())


def hessian_source(model: GPT, name: str) -> str:
    """The module by whose inputs a matrix is rounded: its own, or one with the same inputs."""
    module, beside = name.removesuffix(".weight"), model.kinds[name].inputs_of
    if not beside:
        return module
    return f"{module.rpartition('.')[0]}.{beside}"


def head_name(model: GPT) -> str:
    """The module whose weights make logits."""
    return "tok_emb" if model.lm_head is None else "lm_head"


def hessian_widths(model: GPT) -> dict[str, int]:
    """The modules whose inputs make a Hessian, and how many channels these have.

    The matrix that makes logits is among them only where CLIP_SIGMAS sets the steps.
    """
    by_deviation = model.cfg.clips_by_deviation
    widths = {}
    for name, kind in model.kinds.items():
        wanted = kind.may_be_rounded or (by_deviation and name == f"{head_name(model)}.weight")
        if wanted and bits_of(model, name):
            widths[hessian_source(model, name)] = model.get_parameter(name).size(1)
    return widths


@torch.no_grad()
def sample_rows(model: GPT, seq_len: int, seed: int, device: torch.device) -> Tensor:
    """A batch the model draws itself after BOS, at TEMPERATURE: int64 (rows, seq_len); slow."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((CALIBRATION_ROWS, seq_len), BOS)
    for at in range(1, seq_len):  # whole rows: their length sets the rotary base
        on_device = ids.to(device)
        last = model.hidden(on_device)[:, at - 1 : at]
        logits = model.logits(last, on_device[:, at - 1 : at])[:, 0]
        p = torch.softmax(logits / TEMPERATURE, dim=-1).cpu()
        ids[:, at] = torch.multinomial(p, 1, generator=generator)[:, 0]
    return ids


@torch.no_grad()
def collect_hessians(
    model: GPT, batch_of: Callable[[int], Tensor], num_batches: int, deadline: float, run: Run
) -> dict[str, Tensor]:
    """Mean x x^T of the inputs of each linear that becomes integers: {name: float32 (c, c)}.

    batch_of(n) gives the ids (B, T) of batch n. Ranks take a batch each until for any of them
    another could end after `deadline` seconds of its clock.
    """
    head = head_name(model)
    sums = {
        source: torch.zeros(width, width, device=run.device)
        for source, width in hessian_widths(model).items()
    }
    seen = torch.zeros(1, device=run.device)

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        sums[name].addmm_(x.T, x)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: add(name, inputs[0])
        )
        for name in sums.keys() - {head}
    ]
    rounds = range(
        run.ranks.rank, num_batches + run.ranks.rank, run.ranks.world_size
    )  # as many on every rank
    for batch in run.folder.progress("calibrating", iterable=rounds, unit="batch"):
        start = run.ledger.training_clock.elapsed()
        if batch < num_batches:
            input_ids = batch_of(batch)
            hidden = model.hidden(run.put(input_ids))
            if head in sums:
                add(head, hidden)
            seen += input_ids.numel()
        run.settle()
        end = run.ledger.training_clock.elapsed()
        if run.ranks.agree(float(end + 2 * (end - start) > deadline), "most"):
            break
    for hook in hooks:
        hook.remove()
    run.ranks.add_up([seen, *sums.values()])
    run.ledger.calibration_tokens = int(seen.item())
    return {name: total / seen for name, total in sums.items()}


def budget_reserve(model: GPT, batch_seconds: float, run: Run) -> float:
    """What of the training budget to keep for collecting Hessians, in the budget's unit."""
    if run.cfg.budget_unit == "operations":
        return calibration_operations(model, calibration_tokens(run.cfg))
    return calibration_reserve(batch_seconds, run)


def calibration_reserve(batch_seconds: float, run: Run) -> float:
    """Seconds of the training budget to keep for collecting Hessians, from the measured cost."""
    cfg = run.cfg
    if cfg.gptq_variant == "off" or cfg.gptq_calib != "train":
        return 0.0
    share = math.ceil(cfg.gptq_calib_batches / run.ranks.world_size)
    reserve = min(1.2 * share * batch_seconds, 0.5 * cfg.max_wallclock_seconds)
    run.folder.log(
        "calibration reserve:{seconds:.1f}s batches:{batches}",
        "reserve",
        seconds=reserve,
        batches=cfg.gptq_calib_batches,
    )
    return reserve


def calibrate(model: GPT, rows: TrainingRows, steps: int, run: Run) -> dict[str, Tensor]:
    """Hessians: inside the training budget on the next training rows, outside it on drawn ones.

    Hidden units are put in order first where the codec makes use of it.
    """
    cfg, run.phase, inside = run.cfg, "calibration", run.cfg.gptq_calib == "train"
    if cfg.orders_hidden_units:
        order_hidden_units(model)
    if cfg.gptq_variant == "off":
        return {}

    def batch_of(n: int, /) -> Tensor:
        return rows.batch(
            steps * cfg.rows_per_step + n * CALIBRATION_ROWS, CALIBRATION_ROWS
        ).input_ids

    if cfg.gptq_calib == "selfgen":
        mine = range(run.ranks.rank, cfg.gptq_calib_batches, run.ranks.world_size)
        batch_of = {
            n: sample_rows(model, cfg.train_seq_len, cfg.seed + n, run.device)
            for n in run.folder.progress("drawing rows", iterable=mine, unit="batch")
        }.__getitem__
    with run.ledger.training_clock.running() if inside else contextlib.nullcontext():
        deadline = cfg.max_wallclock_seconds if inside and not cfg.step_driven else math.inf
        hessians = collect_hessians(model, batch_of, cfg.gptq_calib_batches, deadline, run)
    if inside:
        used_tokens = run.ledger.calibration_tokens
        run.ledger.training_operations += calibration_operations(model, used_tokens)
    used = run.ranks.agree(run.ledger.training_clock.elapsed())
    run.folder.log(
        "gptq:calibrated source:{source} tokens:{tokens} train_time:{ms:.0f}ms",
        "calibrated",
        source=cfg.gptq_calib,
        tokens=run.ledger.calibration_tokens,
        ms=1e3 * used,
    )
    return hessians


def prune_stored(model: GPT, stored: dict[str, Stored], run: Run) -> None:
    """Zero what PRUNE_PCT asks for."""
    low = {name: s for name, s in stored.items() if 0 < bits_of(model, name) < 8}
    share = model.cfg.prune_pct
    if share and low:
        run.folder.log(
            "prune:zeroed {zeroed} of {of} integers below 8 bits",
            "pruned",
            zeroed=prune_integers(low, share),
            of=sum(s.values.numel() for s in low.values()),
        )


def prune_integers(stored: dict[str, Stored], share: float) -> int:
    """Zero `share` of all integers, of those not zero yet the smallest |q s|; returns how many."""
    sizes = [s.values.numel() for s in stored.values()]
    cost = torch.cat([s.restore().abs().flatten() for s in stored.values()])
    count = min(int(share * len(cost)), int(cost.count_nonzero()))
    cost[cost == 0] = math.inf
    doomed = torch.zeros(len(cost), dtype=torch.bool)
    doomed[cost.topk(count, largest=False).indices] = True
    for s, mask in zip(stored.values(), doomed.split(sizes), strict=True):
        s.values[mask.view_as(s.values)] = 0
    return count


def to_integers(
    W: Tensor, H: Tensor | None, bits: int, cfg: Config, sigmas: float, group: slice | None
) -> tuple[Stored, bool]:
    """A matrix on its grid, by GPTQ where there is a Hessian; and whether GPTQ had to give up."""
    if H is None and bits == 8 and not cfg.clips_by_deviation:
        return int8_rows(W), False
    if H is None:
        return round_to_nearest(W, bits, cfg, sigmas), False
    try:
        if cfg.gptq_variant == "simple":
            return gptq_simple(W, H, bits, cfg, sigmas), False
        return gptq(W, H, bits, cfg, sigmas, group), False
    except torch.linalg.LinAlgError:
        return round_to_nearest(W, bits, cfg, sigmas, group), True


def pick_protected(
    model: GPT, hessians: dict[str, Tensor], run: Run
) -> tuple[str, slice] | tuple[None, None]:
    """The matrix and the columns that AWQ_COLUMNS gives 8 bits, of all that have a Hessian."""
    width = model.cfg.awq_columns
    matrices, activation_rms = {}, {}
    for name in model.kinds:
        H = hessians.get(hessian_source(model, name))
        if width and H is not None and bits_of(model, name):
            matrices[name] = model.get_parameter(name).detach().float().to(H.device)
            activation_rms[name] = H.diagonal().sqrt()
    if not matrices:
        return None, None
    name, group = protected_group(matrices, activation_rms, width)
    if not name:
        return None, None
    run.folder.log(
        "awq:protected {tensor} columns:{start}-{stop}",
        "protected",
        tensor=name,
        start=group.start,
        stop=group.stop,
    )
    return name, group


def correct_largest_errors(model: GPT, stored: dict[str, Stored], run: Run) -> None:
    """Give the LQER_TOP_K matrices of largest error a low-rank correction of it, in place."""
    cfg = model.cfg
    if not cfg.lqer_top_k:
        return
    errors = {
        name: model.get_parameter(name).detach().float().cpu() - tensor.restore()
        for name, tensor in stored.items()
        if bits_of(model, name)
    }
    for name in largest_errors(errors, cfg.lqer_top_k):
        rank = min(cfg.lqer_rank, *errors[name].shape)
        low_rank = low_rank_correction(errors[name], rank, cfg.lqer_group)
        stored[name] = replace(stored[name], low_rank=low_rank)
        left = errors[name] - low_rank.product()
        run.folder.log(
            "lqer:corrected {tensor} rank:{rank} error:{error:.5g} left:{left:.5g}",
            "corrected",
            tensor=name,
            rank=rank,
            error=float(errors[name].norm()),
            left=float(left.norm()),
        )


def store_floats(model: GPT, name: str, W: Tensor) -> Stored:
    """A parameter that BITS does not make integers: fp16, or a gate's rows of int8."""
    is_gate_matrix = model.kinds[name] == GATE and W.ndim == 2
    if is_gate_matrix and model.cfg.gate_storage == "int8":
        return gate_rows(W.cpu())
    return Stored(W.half().cpu())


@torch.no_grad()
def quantize(
    model: GPT, hessians: dict[str, Tensor], run: Run, factor: float = 1.0
) -> dict[str, Stored]:
    """Every parameter as the artifact will hold it: integers where BITS says so, else fp16.

    What PRUNE_FRAC and PRUNE_PCT ask for is zeroed. `factor` multiplies CLIP_SIGMAS. Raises
    FloatingPointError, naming the parameter, if one is not finite or too large for fp16.
    """
    run.phase = "quantization"
    cfg = model.cfg
    stored: dict[str, Stored] = {}
    fallbacks, objective = 0, 0.0
    # Factorisations and float64 sums are not to be had on every other device.
    device = run.device if run.device.type == "cuda" else torch.device("cpu")
    protected_name, group = pick_protected(model, hessians, run)
    for name, p in run.folder.progress(
        "quantizing", iterable=[*model.named_parameters()], unit="tensor"
    ):
        W = p.detach().float().to(device)
        if not W.half().isfinite().all():
            raise FloatingPointError(f"{name} is not finite, or too large for fp16")
        if cfg.prune_frac and W.ndim == 2 and W.numel() > cfg.int8_keep_float_max_numel:
            least = row_quantile(W.abs().view(1, -1), cfg.prune_frac)
            W = W.masked_fill(W.abs() < least, 0.0)
        bits = bits_of(model, name)
        if bits == 0:
            stored[name] = store_floats(model, name, W)
            continue
        H = hessians.get(hessian_source(model, name))
        H = None if H is None else H.to(device)
        sigmas = factor * setting_of(model, name, cfg.sigmas_by_role)
        own_group = group if name == protected_name else None
        made, fell_back = to_integers(W, H, bits, cfg, sigmas, own_group)
        if H is not None:
            objective += weighted_error(W, made, H)
        fallbacks += fell_back
        arrays = [array.cpu() for array in made.arrays()]
        stored[name] = Stored.of(made.kind, made.numbers(), arrays)
    prune_stored(model, stored, run)
    correct_largest_errors(model, stored, run)
    run.folder.log(
        "gptq:quantized variant:{variant} matrices:{matrices} fallbacks:{fallbacks} "
        "objective:{objective:.6g}",
        "quantized",
        variant=cfg.gptq_variant,
        fallbacks=fallbacks,
        matrices=sum(s.scale is not None for s in stored.values()),
        objective=objective,
    )
    return stored


# =================================================================================================
# Artifact
# One file: an uncompressed prelude (magic, version, codec, body length, sha256 of the rest), then
# one compressed body of JSON header, then all integers, then all floats. A reader trusts none of
# it. records/ARTIFACT.md describes the format for other programs.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class ArtifactSettings(Part):
    """How the artifact is packed."""

    title = "Artifact"

    artifact_target_bytes: int = training_knob(
        0,
        (0, 1 << 40),
        "With QUANT_CLIP=std or std_published, bytes of code and artifact to end just below; 0 "
        "aims only when they are over the limit.",
    )
    codec: str = training_knob(
        "zstd",
        ("zstd", "lzma", "brotli", "range", "best"),
        "Compression of the artifact; best is the smallest of zstd, lzma and range.",
    )

    @property
    def orders_hidden_units(self) -> bool:
        """Whether the codec makes use of an order of hidden units; best leaves weights alone."""
        return self.codec == "range"

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A target above the limit could not be met."""
        yield (
            cfg.artifact_target_bytes <= cfg.artifact_limit_bytes,
            "ARTIFACT_TARGET_BYTES must be at most ARTIFACT_LIMIT_BYTES",
        )


ARTIFACT_MAGIC = b"TINYGPT\n"
ARTIFACT_VERSION = 2  # what is written; version 1 is read as well
PRELUDE = struct.Struct("<8sHHQ32s")  # magic, version, codec, bytes of the body, sha256 of the rest
CODECS = {"zstd": 1, "lzma": 2, "brotli": 3, "range": 4}
BEST_OF = ("zstd", "lzma", "range")  # what CODEC=best tries

ZSTD_LEVEL = 22
ZSTD_SHORTEST_MATCHES = (6, 4, 3)  # bytes; all are tried, since no rule says which packs best
LONG_BODY = 1 << 22  # bytes from which only the first of them is tried, for time
LZMA_PRESET = 6
LZMA_MEMORY = 1 << 26  # bytes that the decompressor may take; LZMA_PRESET needs 9 MiB

# Bounds on what a reader accepts, in bytes.
MAX_ARTIFACT_BYTES = 1 << 28
MAX_BODY_BYTES = 1 << 28
MAX_HEADER_BYTES = 1 << 20

# Settings that the first artifacts named. What came later says what its absence means.
VERSION_1_SETTINGS = frozenset(
    """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult mlp_act leaky_slope
    tie_embeddings logit_softcap qk_gain_init rope_base rope_dims rope_ntk_ref xsa_last_n vrl_mode
    backout_mode cache_layer skip_per_dim ln_scale smear_enabled smear_bos_mask bigram_vocab_size
    bigram_hash bigram_dim bigram_bos_mask ve_enabled ve_dim ve_layers bits
    int8_keep_float_max_numel eval_seq_len eval_stride sliding eval_batch_seqs eval_truncate
    ttt_mode ttt_lr ttt_momentum ttt_epochs ttt_chunk_tokens ttt_batch_seqs ttt_grad_clip
    ttt_freeze_blocks""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Stream:
    """One array of equal numbers that a stored tensor consists of."""

    dtype: str  # as numpy names it, little-endian
    shape: Callable[[list[int]], Shape]  # from the numbers of the tensor's row in the header


@dataclass(frozen=True)
class StorageKind:
    """A way to store a tensor: how many numbers its row may have, and its streams."""

    numbers: tuple[int, ...]
    streams: tuple[Stream, ...]


# The body holds all streams of the first type, tensor by tensor, then all of the second, ...
STREAM_TYPES = ("<i1", "<f2", "|u1")
ROW_SCALES = Stream("<f2", lambda row: (row[0],))
GRID_STREAMS = (Stream("<i1", lambda row: (row[0], row[1])), ROW_SCALES)
# A correction's row ends with its rank and its group.
LEFT_FACTOR = Stream("<i1", lambda row: (row[0], row[-2]))
RIGHT_FACTOR = Stream("<i1", lambda row: (row[-2], row[1]))
CORRECTED_STREAMS = (GRID_STREAMS[0], LEFT_FACTOR, RIGHT_FACTOR, ROW_SCALES)
FACTOR_SCALES = (
    Stream("<f2", lambda row: ()),
    Stream("<f2", lambda row: (-(-row[-2] * row[1] // row[-1]),)),
)
# After a tensor's own (rows, columns) comes where protected columns start and how many they are.
STORAGE_KINDS = {
    "float": StorageKind((0, 1, 2), (Stream("<f2", tuple),)),
    "grid": StorageKind((2,), GRID_STREAMS),
    "grid_protected": StorageKind((4,), (*GRID_STREAMS, ROW_SCALES)),
    "grid_low_rank": StorageKind((4,), (*CORRECTED_STREAMS, *FACTOR_SCALES)),
    "grid_protected_low_rank": StorageKind((6,), (*CORRECTED_STREAMS, ROW_SCALES, *FACTOR_SCALES)),
    "packed": StorageKind((1,), (Stream("|u1", tuple),)),
}
TRAINING_TEXT = "training_text"  # the name of the packed tokens that COUNTS reads


def artifact_header(cfg: Config, val: Validation) -> dict:
    """What rebuilding the model and repeating its evaluation takes."""
    return {
        "settings": environment_of(cfg, "model", "scoring"),
        "tokenizer": val.tokenizer_sha256,
        "validation": val.fingerprint,
    }


def environment_of(cfg: Config, *reaches: str) -> dict[str, str]:
    """The settings of these reaches as the environment would give them."""
    values = {name.upper(): getattr(cfg, name) for name in settings_of_reach(*reaches)}
    return {
        name: value if isinstance(value, str) else show_setting(value)
        for name, value in values.items()
    }


def brotli_module() -> Any:
    """The package brotli, which is optional; raises Refusal if it is missing or too old."""
    try:
        import brotli

        # Older versions cannot bound what a hostile stream becomes.
        brotli.Decompressor().process(b"", output_buffer_limit=1)
        return brotli
    except (ImportError, TypeError):
        raise Refusal("CODEC=brotli needs the Python package brotli 1.2 or newer") from None


def compress(body: bytes, codec: str) -> bytes:
    """The body under a codec of CODECS; the same bytes always give the same bytes."""
    if codec == "zstd":
        return compress_with_zstd(body)
    if codec == "lzma":
        return lzma.compress(body, preset=LZMA_PRESET)
    if codec == "range":
        return pack_by_range(body)
    return brotli_module().compress(body, quality=11, lgwin=24)


def compress_with_zstd(body: bytes) -> bytes:
    """The shortest of a few zstd frames, which differ in the shortest match they look for."""
    tries = 1 if len(body) > LONG_BODY else len(ZSTD_SHORTEST_MATCHES)
    frames = []
    for shortest in ZSTD_SHORTEST_MATCHES[:tries]:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            ZSTD_LEVEL, source_size=len(body), min_match=shortest
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        frames.append(compressor.compress(body))
    return min(frames, key=len)


def decompress(packed: bytes, codec: str, size: int) -> bytes:
    """What compress() was given, `size` bytes; never holds more. Raises Refusal otherwise."""
    try:
        body = decompress_within(packed, codec, size)
    except (zstandard.ZstdError, lzma.LZMAError) as error:
        raise Refusal(f"the artifact's body does not decompress ({error})") from None
    if body is None or len(body) != size:
        raise Refusal("the artifact's body does not end where its prelude says")
    return body


def decompress_within(packed: bytes, codec: str, size: int) -> bytes | None:
    """The body, if it ends where the packed bytes end and `size` bounds it; else None or more."""
    if codec == "zstd":
        if zstandard.frame_content_size(packed) != size:
            return None
        return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    if codec == "lzma":
        lzma_reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=LZMA_MEMORY)
        body = lzma_reader.decompress(packed, max_length=size + 1)
        complete = lzma_reader.eof and not lzma_reader.unused_data
        return body if complete else None
    if codec == "range":
        return unpack_by_range(packed, size)
    brotli = brotli_module()
    brotli_reader = brotli.Decompressor()
    try:
        body = brotli_reader.process(packed, output_buffer_limit=size + 1)
    except brotli.error as error:
        raise Refusal(f"the artifact's body does not decompress ({error})") from None
    return body if brotli_reader.is_finished() else None


def by_place_in_layer(name: str) -> tuple[str, list[int]]:
    """A sort key that puts the same matrix of all layers side by side, which compresses best."""
    return re.sub(r"\d+", "", name), [int(number) for number in re.findall(r"\d+", name)]


def encode_artifact(header: dict, stored: dict[str, Stored], codec: str = "zstd") -> bytes:
    """The artifact's bytes; the same header and tensors always give the same bytes."""
    ordered = {name: stored[name] for name in sorted(stored, key=by_place_in_layer)}
    tensors = [[name, tensor.kind, *tensor.numbers()] for name, tensor in ordered.items()]
    text = json.dumps({**header, "tensors": tensors}, sort_keys=True, separators=(",", ":"))
    body = [struct.pack("<I", len(text)), text.encode()]
    arrays = {name: iter(tensor.arrays()) for name, tensor in ordered.items()}
    for name, dtype, _ in streams_in_body([tensor_row(row, ARTIFACT_VERSION) for row in tensors]):
        body.append(next(arrays[name]).numpy().astype(dtype).tobytes())
    return pack_body(b"".join(body), codec)


def pack_body(body: bytes, codec: str) -> bytes:
    """The artifact of a body: the prelude, then the body under the codec, or the best one."""
    codecs = BEST_OF if codec == "best" else (codec,)
    packed_by = {name: compress(body, name) for name in codecs}
    codec = min(packed_by, key=lambda name: len(packed_by[name]))
    packed = packed_by[codec]
    digest = hashlib.sha256(packed).digest()
    prelude = PRELUDE.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, CODECS[codec], len(body), digest)
    return prelude + packed


def unpack_body(blob: bytes) -> tuple[int, bytes]:
    """Format version and body of an artifact; raises Refusal before trusting any length in it."""
    if len(blob) < PRELUDE.size or blob[:8] != ARTIFACT_MAGIC:
        raise Refusal("not an artifact of train_gpt.py (its first bytes are wrong)")
    _, version, number, size, digest = PRELUDE.unpack_from(blob)
    packed = blob[PRELUDE.size :]
    codecs = {number: name for name, number in CODECS.items()}
    known = 1 <= version <= ARTIFACT_VERSION and number in codecs
    if not known or (version == 1 and codecs[number] == "range"):
        raise Refusal(
            f"artifact version {version}, codec {number}: this train_gpt.py reads "
            f"versions 1 to {ARTIFACT_VERSION}, codecs {CODECS}"
        )
    if hashlib.sha256(packed).digest() != digest:
        raise Refusal("the artifact is damaged (its sha256 does not match); copy it again")
    if size > MAX_BODY_BYTES:
        raise Refusal(f"the artifact's body has {size:,} bytes; the bound is {MAX_BODY_BYTES:,}")
    return version, decompress(packed, codecs[number], size)


def decode_artifact(blob: bytes) -> tuple[dict, dict[str, Stored]]:
    """Header and tensors of an artifact; raises Refusal before trusting any length in it."""
    version, body = unpack_body(blob)
    try:
        header, rows, end = header_of(body, version)
        return header, cut_payload(body, end, rows)
    except MALFORMED as error:
        raise Refusal(
            f"the artifact's header is malformed ({type(error).__name__}: {error})"
        ) from None


TensorRow = tuple[str, str, list[int]]  # name, storage kind, its numbers: the shape comes first


def header_of(body: bytes, version: int) -> tuple[dict, list[TensorRow], int]:
    """A body's header, the rows of its tensors, and where it ends; raises one of MALFORMED."""
    (header_bytes,) = struct.unpack_from("<I", body)
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"it is longer than {MAX_HEADER_BYTES:,} bytes")
    end = 4 + header_bytes
    header = json.loads(body[4:end].decode())
    texts = [header["tokenizer"], header["validation"], *header["settings"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a setting or fingerprint is not text")
    rows = [tensor_row(row, version) for row in header["tensors"]]
    if len({name for name, _, _ in rows}) < len(rows):
        raise ValueError("a tensor is there twice")
    return header, rows, end


def tensor_row(row: list, version: int) -> TensorRow:
    """A tensor of the header, [name, kind, *numbers], checked; raises ValueError or TypeError.

    Version 1 has 0 for floats and 1 for a grid in the place of the kind's name.
    """
    name, kind, *numbers = row
    if version == 1:
        if type(kind) is not int:
            raise ValueError(f"tensor {name!r} of kind {kind!r}")
        kind = {0: "float", 1: "grid"}[kind]
    sound = type(name) is str and type(kind) is str and kind in STORAGE_KINDS
    if not sound or len(numbers) not in STORAGE_KINDS[kind].numbers:
        raise ValueError(f"tensor {name!r} of kind {kind!r} and shape {numbers!r}")
    if not all(type(number) is int and 0 <= number <= MAX_BODY_BYTES for number in numbers):
        raise ValueError(f"tensor {name!r} of shape {numbers!r}")
    check_grid_numbers(kind, numbers)
    return name, kind, numbers


def check_grid_numbers(kind: str, numbers: list[int]) -> None:
    """Raise ValueError where protected columns or a correction's rank cannot be."""
    if "protected" in kind:
        columns, start, width = numbers[1:4]
        if width < 1 or start + width > columns:
            raise ValueError(f"{width} protected columns from {start} of {columns}")
    if "low_rank" in kind:
        rank, group = numbers[-2:]
        if not 1 <= rank <= MAX_RANK or group < 1:
            raise ValueError(f"a correction of rank {rank} in groups of {group}")


def streams_in_body(rows: list[TensorRow]) -> Iterator[tuple[str, str, Shape]]:
    """Name, type and shape of every stream, in the order in which the body holds them."""
    for dtype in STREAM_TYPES:
        for name, kind, numbers in rows:
            for stream in STORAGE_KINDS[kind].streams:
                if stream.dtype == dtype:
                    yield name, dtype, stream.shape(numbers)


def arrays_in_body(
    body: bytes, start: int, rows: list[TensorRow]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, type and numbers of all streams, which fill the body from `start`, or ValueError."""
    place = start
    for name, dtype, shape in streams_in_body(rows):
        flat = np.frombuffer(body, dtype, math.prod(shape), place)
        yield name, dtype, flat.reshape(shape)
        place += flat.nbytes
    if place != len(body):
        raise ValueError("the tensors do not add up to the body")


def cut_payload(body: bytes, start: int, rows: list[TensorRow]) -> dict[str, Stored]:
    """The tensors whose streams fill the body from `start` to its end, or ValueError."""
    arrays: dict[str, list[Tensor]] = {name: [] for name, _, _ in rows}
    for name, dtype, numbers in arrays_in_body(body, start, rows):
        native = torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("=")))
        if dtype == "<f2" and not native.isfinite().all():
            raise ValueError(f"tensor {name!r} is not finite")
        arrays[name].append(native)
    return {name: Stored.of(kind, numbers, arrays[name]) for name, kind, numbers in rows}


def settings_in_header(header: dict) -> dict[str, str]:
    """Every model and scoring setting of an artifact by name, as text; raises Refusal.

    An artifact from before a setting was added does not name it: the setting says itself what
    that means. A name that is not known here is refused.
    """
    named = dict(header["settings"])
    ours = {name.upper(): SETTINGS[name] for name in settings_of_reach("model", "scoring")}
    if unknown := sorted(named.keys() - ours.keys()):
        raise Refusal(
            f"the artifact names {unknown[0]!r}, which is no setting of this train_gpt.py: "
            "score it with the train_gpt.py of its run"
        )
    for name, setting in ours.items():
        if name in named:
            continue
        absent = knob_of(setting).absent
        if absent is UNSAID:
            raise Refusal(f"the artifact's header does not name the setting {name}")
        named[name] = absent if isinstance(absent, str) else show_setting(absent)
    return named


def settings_within(header: dict, env: dict[str, str]) -> tuple[Config, list[str]]:
    """An artifact's settings, then those of `env`, and notes for the log; or Refusal."""
    travelled = settings_in_header(header)
    given, notes = translate_names(env, {name.upper(): f for name, f in SETTINGS.items()})
    of_model = {name.upper() for name in settings_of_reach("model")}
    if repeated := sorted(of_model & set(given)):
        raise Refusal(f"{repeated[0]} is set, but the artifact says what its model is: unset it")
    return Config.from_env({**travelled, **given})[0], notes


def read_artifact(path: Path) -> tuple[dict, dict[str, Stored]]:
    """Header and tensors of the file; raises Refusal if it is missing, huge or malformed."""
    if not path.is_file():
        raise Refusal(f"{path}: no such artifact")
    if (size := path.stat().st_size) > MAX_ARTIFACT_BYTES:
        raise Refusal(f"{path} has {size:,} bytes; artifacts are read up to {MAX_ARTIFACT_BYTES:,}")
    try:
        return decode_artifact(path.read_bytes())
    except Refusal as refusal:
        raise Refusal(f"{path}: {refusal}") from None


def rebuild_model(
    cfg: Config, stored: dict[str, Stored], run: Run, kernel: AttentionKernel | None = None
) -> GPT:
    """The model an artifact holds, on the run's device; raises Refusal if it holds another.

    kernel: its attention kernel; None takes that of the settings.
    """
    if kernel is None:
        kernel = pick_attention(cfg, run.device)[1]
    # The empty model is laid out without memory, so that a lying header allocates nothing.
    with torch.device("meta"):
        model = GPT(cfg, kernel, run.dtype)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = {name: tensor for name, tensor in stored.items() if tensor.kind != "packed"}
    if expected != {name: tuple(tensor.values.shape) for name, tensor in tensors.items()}:
        raise Refusal("the artifact's tensors are not those of the model its settings describe")
    restored = {name: tensor.restore() for name, tensor in tensors.items()}
    model.load_state_dict(restored, assign=True)
    return model.to(run.device)


# =================================================================================================
# Range coder
# Integers of matrices to bytes and back. The coder is interleaved rANS; the model is that an
# integer's expected magnitude is the product of a matrix's, a row's and a column's.
# =================================================================================================

TOTAL_FREQUENCY = 1 << 16  # of each table
LEAST_STATE = 1 << 32  # a state lies in [2^32, 2^48) and grows and shrinks by words of 16 bits
LANE_SHARE = 16  # there are sqrt(integers) / LANE_SHARE lanes: each costs 4 bytes, few cost time
# Bounds on what is coded; lines are rows and columns.
MAX_INTEGERS, MAX_LINES, MAX_MATRICES = 1 << 27, 1 << 22, 1 << 12
MAX_CHUNK = 1 << 20  # integers coded at once

# A level is LEVELS_AN_OCTAVE times log2 of an expected magnitude, from 2^LOWEST_OCTAVE on.
LEVELS_AN_OCTAVE, LOWEST_OCTAVE, HIGHEST_OCTAVE = 16, -8, 7
LEVELS_A_TABLE = 2
TABLES = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * LEVELS_AN_OCTAVE // LEVELS_A_TABLE
PRIOR_SAMPLES, COUNT_UNIT = 512, 256  # integers that a fresh table counts; one integer's count
FIRST_CHUNK, CHUNK_SHARE = 512, 8  # tables learn after each chunk, of this share of all so far

PROFILE_TOP, PROFILE_PASSES, MAX_SHIFT, LEAST_MEAN = 63, 6, 6, 1e-4
STEP_IN_ERRORS = 3.5  # a profile's step in standard errors: finer ones cost more than they save
TWIN_COSINE, TWIN_CANDIDATES = 0.9, 256


class RangeEncoder:
    """Interleaved rANS (arXiv:1311.2540, section 2.3): one state a lane, words of 16 bits.

    A symbol of frequency f, above others of frequencies F in all, takes the state x of its lane
    to (x // f) 2^16 + x % f + F. Decoding runs backwards, so the stream is written from its end.
    Facts are bytes that a decoder is told outright.
    """

    def __init__(self) -> None:
        self.facts = bytearray()
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def code(self, ends: np.ndarray, tables: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Note symbols, each of its own table; returns them.

        ends: int64 (tables, symbols + 1), running sums of frequencies from 0 to TOTAL_FREQUENCY.
        """
        starts = ends[tables, symbols]
        widths = ends[tables, symbols + 1] - starts
        self.steps.append((starts.astype(np.uint16), (widths - 1).astype(np.uint16)))
        return symbols

    def stream(self, lanes: int) -> bytes:
        """The final states of the lanes, then words in the order in which a decoder wants them."""
        states = np.full(lanes, LEAST_STATE, np.uint64)
        words = []
        for starts, widths in reversed(self.steps):
            for at in reversed(range(0, len(starts), lanes)):
                f = widths[at : at + lanes].astype(np.uint64) + 1
                x = states[: len(f)]
                full = x >= f << 32
                words.append(x[full].astype("<u2"))  # the low half
                x[full] >>= 16
                quotient = x // f
                x[:] = (quotient << 16) + (x - quotient * f) + starts[at : at + lanes]
        words.append(states.astype("<u8").view("<u2").reshape(-1, 4)[:, :3].ravel())
        return b"".join(part.tobytes() for part in reversed(words))


class RangeDecoder:
    """Reads what RangeEncoder wrote; raises ValueError where it cannot have written that."""

    def __init__(self, facts: bytes, stream: bytes, lanes: int) -> None:
        self.facts, self.facts_read = facts, 0
        if len(stream) < 6 * lanes or len(stream) % 2:
            raise ValueError(f"a stream of {len(stream):,} bytes for {lanes:,} lanes")
        self.words = np.frombuffer(stream, "<u2").astype(np.uint64)
        self.words_read = 3 * lanes
        low, middle, high = self.words[: self.words_read].reshape(lanes, 3).T
        self.states = low | middle << 16 | high << 32

    def told(self, size: int) -> bytes:
        """The next bytes of the facts; raises ValueError past their end."""
        part = self.facts[self.facts_read : self.facts_read + size]
        if len(part) < size:
            raise ValueError("the facts end early")
        self.facts_read += size
        return part

    def code(self, ends: np.ndarray, tables: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """The next symbols, each of its own table; of those given only the number counts."""
        bounds = (ends[:, :-1] + (np.arange(len(ends)) << 16)[:, None]).ravel()
        widths = np.diff(ends).ravel().astype(np.uint64)
        found = np.empty(len(tables), np.int64)
        lanes = len(self.states)
        for at in range(0, len(tables), lanes):
            x = self.states[: len(tables) - at]
            low = x & 0xFFFF
            slots = low.astype(np.int64) + (tables[at : at + lanes] << 16)
            here = np.searchsorted(bounds, slots, side="right") - 1
            found[at : at + lanes] = here
            x[:] = widths[here] * (x >> 16) + (slots - bounds[here]).astype(np.uint64)
            small = x < LEAST_STATE
            stop = self.words_read + np.count_nonzero(small)
            if stop > len(self.words):
                raise ValueError("the stream ends early")
            x[small] = x[small] << 16 | self.words[self.words_read : stop]
            self.words_read = stop
        return found - tables * (ends.shape[1] - 1)

    def check_end(self) -> None:
        """Raise ValueError unless decoding ended where encoding began."""
        all_read = self.facts_read == len(self.facts) and self.words_read == len(self.words)
        if not all_read or (self.states != LEAST_STATE).any():
            raise ValueError("facts or stream do not end where they should")


Coder = RangeEncoder | RangeDecoder


@functools.cache
def prior_counts(top: int) -> np.ndarray:
    """What tables count before the first integer: int64 (TABLES, 2 top + 1).

    The table for mean magnitude m is the discrete Gaussian g^(k^2), |k| <= top. Its g is
    exp(-1 / (pi m^2)) for large m and m / 2 for small ones; 1 / (1 - g) near
    1 + m / 2 + pi m^3 / (m + 0.3) is either. Here are only + - * / of float64, which all machines
    round alike (IEEE 754).
    """
    levels = (np.arange(TABLES) + 0.5) * LEVELS_A_TABLE / LEVELS_AN_OCTAVE
    octaves = np.floor(levels)
    part = levels - octaves
    mantissa = 1 + part * (0.6565 + 0.3435 * part)  # near 2^part
    means = np.ldexp(mantissa, octaves.astype(np.int32) + LOWEST_OCTAVE)[:, None]
    g = np.repeat(
        1 - 1 / (1 + means / 2 + math.pi * means * means * means / (means + 0.3)), top, axis=1
    )
    right = np.cumprod(np.cumprod(g * g, axis=1) / g, axis=1)  # products of g^(2k - 1)
    shape = np.concatenate([right[:, ::-1], np.ones_like(means), right], axis=1)
    peak = COUNT_UNIT * PRIOR_SAMPLES / np.maximum(math.pi * means, 1)
    return np.rint(peak * shape).astype(np.int64)


class AdaptiveTables:
    """Tables of the integers within +-top, one for each two levels, that learn what is coded."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.counts = prior_counts(top).copy()
        self.coded = 0

    def ends(self, tables: slice) -> np.ndarray:
        """Running sums of frequencies, none of them 0: int64 (tables, 2 top + 2)."""
        counts = self.counts[tables]
        symbols = counts.shape[1]
        totals = counts.sum(axis=1, keepdims=True)
        frequencies = 1 + counts * (TOTAL_FREQUENCY - symbols) // totals
        frequencies[:, self.top] += TOTAL_FREQUENCY - frequencies.sum(axis=1)
        return np.pad(frequencies.cumsum(axis=1), ((0, 0), (1, 0)))

    def code(self, coder: Coder, matrix: np.ndarray, level: int, rows, columns) -> None:
        """Code a matrix (r, c) in place, levels being level + rows[i] + columns[j].

        Chunks go by share of what these tables coded so far, so that the decoder learns alike.
        """
        values = matrix.reshape(-1)  # a view
        start = 0
        while start < len(values):
            size = max(FIRST_CHUNK, self.coded // CHUNK_SHARE)
            stop = min(len(values), start + min(size, MAX_CHUNK))
            i, j = np.divmod(np.arange(start, stop), matrix.shape[1])
            tables = (level + rows[i] + columns[j]) // LEVELS_A_TABLE
            tables = np.clip(tables, 0, TABLES - 1)
            shifted = values[start:stop].astype(np.int64) + self.top
            lowest = int(tables.min())
            ends = self.ends(slice(lowest, int(tables.max()) + 1))
            symbols = coder.code(ends, tables - lowest, shifted)
            values[start:stop] = symbols - self.top
            places = tables * self.counts.shape[1] + symbols
            counted = np.bincount(places, minlength=self.counts.size)
            self.counts += COUNT_UNIT * counted.reshape(self.counts.shape)
            self.coded += stop - start
            start = stop


def level_of(magnitude: float) -> int:
    """The level of an expected magnitude, within a byte."""
    octaves = math.log2(max(magnitude, 2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
    return min(round(octaves * LEVELS_AN_OCTAVE), 255)


@dataclass
class Profile:
    """What the model says of a matrix (r, c): its level, and levels above it by row and column.

    The latter are whole steps of 2^n levels.
    """

    level: int
    rows: np.ndarray  # int64 (r,), in steps
    columns: np.ndarray  # int64 (c,), in steps
    row_shift: int
    column_shift: int

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Levels of rows and of columns, to be added to the matrix's."""
        return self.rows << self.row_shift, self.columns << self.column_shift


def steps_of(means: np.ndarray, samples: int) -> tuple[np.ndarray, int]:
    """Logarithms of mean magnitudes, less their average, in steps of 2^n levels: int64, and n.

    A mean m of n samples has a logarithm of variance chance = (0.57 + (1/m - 1)^+) / n, as for
    normal integers if large and rare ones if small. Each logarithm is drawn to the average as far
    as the share of chance in the variance of all says (James and Stein). A step is the power of
    two near STEP_IN_ERRORS of the standard error that is left.
    """
    means = np.maximum(means, 0.5 / samples)
    chance = (0.57 + np.maximum(1 / means - 1, 0)) / samples
    logarithms = np.log(means)
    logarithms -= logarithms.mean()
    true = max(float((logarithms**2 - chance).mean()), 0.0)
    levels = true / (true + chance) * logarithms / math.log(2) * LEVELS_AN_OCTAVE
    error = math.sqrt(float(np.median(chance))) / math.log(2) * LEVELS_AN_OCTAVE
    shift = min(max(round(math.log2(STEP_IN_ERRORS * error)), 0), MAX_SHIFT)
    steps = np.rint(levels / (1 << shift)).astype(np.int64)
    return steps.clip(-PROFILE_TOP, PROFILE_TOP), shift


def fit_profile(matrix: np.ndarray) -> Profile:
    """The profile by which an integer matrix (r, c) codes well: alternating means fit |q_ij| by
    m a_i b_j, a and b of mean 1."""
    magnitudes = np.abs(matrix).astype(np.float64)
    mean = max(float(magnitudes.mean()), LEAST_MEAN)
    columns = np.ones(matrix.shape[1])
    rows = np.ones(matrix.shape[0])
    for _ in range(PROFILE_PASSES):
        rows = np.maximum((magnitudes / columns).mean(axis=1), LEAST_MEAN)
        rows /= rows.mean()
        columns = np.maximum((magnitudes / rows[:, None]).mean(axis=0), LEAST_MEAN)
        columns /= columns.mean()
    row_steps, row_shift = steps_of(mean * rows, matrix.shape[1])
    column_steps, column_shift = steps_of(mean * columns, matrix.shape[0])
    profile = Profile(0, row_steps, column_steps, row_shift, column_shift)
    row_levels, column_levels = profile.levels()
    expected = np.exp2(row_levels / LEVELS_AN_OCTAVE)[:, None]
    expected = expected * np.exp2(column_levels / LEVELS_AN_OCTAVE)
    profile.level = level_of(float((magnitudes / expected).mean()))
    return profile


def grid_top(largest: int) -> int:
    """The end 2^n - 1 of a symmetric grid that holds `largest`; 128 for int8's own end."""
    return top_of_bits(min(largest, 128).bit_length())


def top_of_bits(bits: int) -> int:
    """0, 1, 3, ... 127 and 128; raises ValueError for more than 8 bits."""
    if bits > 8:
        raise ValueError(f"integers of {bits} bits")
    return min((1 << bits) - 1, 128)


def wrap_integers(integers: np.ndarray, top: int) -> np.ndarray:
    """Integers modulo 2 top + 1, within +-top."""
    return (integers + top) % (2 * top + 1) - top


def find_twins(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of (r, c) that are best told as differences from one of them, and that one: bool (r,).

    Unused tokens have them: nothing but weight decay and the head's common pull acts on their
    rows. They are those of cosine above TWIN_COSINE with the one of up to TWIN_CANDIDATES rows,
    evenly taken, that has most such.
    """
    exact = matrix.astype(np.float64)
    candidates = exact[:: len(exact) // TWIN_CANDIDATES + 1]
    lengths = np.sqrt(np.maximum((exact * exact).sum(axis=1), 1))
    least = TWIN_COSINE * np.sqrt((candidates * candidates).sum(axis=1))
    near = candidates @ exact.T > least[:, None] * lengths
    twins = near[near.sum(axis=1).argmax()]
    first = int(twins.argmax())
    twins[first] = False
    # A magnitude m takes some log2(m + 1/2) bits, and telling twins takes one for each row.
    own = np.log2(np.abs(exact[twins]) + 0.5).sum()
    as_differences = np.log2(np.abs(exact[twins] - exact[first]) + 0.5).sum()
    if own - as_differences < len(exact):
        twins = np.zeros(len(exact), bool)
    return twins, first


@dataclass
class IntegerModel:
    """All tables of an artifact: those of profiles, and those of integers by their top."""

    profiles: AdaptiveTables = field(default_factory=lambda: AdaptiveTables(PROFILE_TOP))
    integers: dict[int, AdaptiveTables] = field(default_factory=dict)

    def tables(self, top: int) -> AdaptiveTables:
        """The tables of integers within +-top."""
        if top not in self.integers:
            self.integers[top] = AdaptiveTables(top)
        return self.integers[top]

    def code_steps(self, coder: Coder, steps: np.ndarray, spread: int) -> None:
        """Code a profile's steps in place; spread: 0 where all are 0, else 1 + their level."""
        if spread:
            zeros = np.zeros(len(steps), np.int64)
            self.profiles.code(coder, steps[None], spread - 1, zeros[:1], zeros)


def encode_matrix(encoder: RangeEncoder, model: IntegerModel, matrix: np.ndarray) -> None:
    """Code an integer matrix (r, c) of at least one element within +-128.

    Facts: bits of its grid, the highest bit set where there are twins; level; shifts and
    spreads of rows and of columns; with twins a bit for each row and the row they differ from.
    """
    top = grid_top(int(np.abs(matrix).max()))
    twins, first = find_twins(matrix)
    coded = matrix.copy()
    coded[twins] = wrap_integers(coded[twins] - coded[first], top)
    profile = fit_profile(coded)
    spreads = [
        1 + level_of(float(np.abs(steps).mean())) if steps.any() else 0
        for steps in (profile.rows, profile.columns)
    ]
    kind = top.bit_length() | bool(twins.any()) << 7
    shifts = profile.row_shift | profile.column_shift << 4
    encoder.facts += bytes([kind, profile.level, shifts, *spreads])
    if twins.any():
        encoder.facts += np.packbits(twins).tobytes() + first.to_bytes(4, "little")
    model.code_steps(encoder, profile.rows, spreads[0])
    model.code_steps(encoder, profile.columns, spreads[1])
    model.tables(top).code(encoder, coded, profile.level, *profile.levels())


def decode_matrix(
    decoder: RangeDecoder, model: IntegerModel, rows: int, columns: int
) -> np.ndarray:
    """The next matrix, int16 (rows, columns); raises ValueError where there cannot be one."""
    kind, level, shifts, row_spread, column_spread = decoder.told(5)
    top = top_of_bits(kind & 127)
    twins: np.ndarray = np.zeros(rows, bool)
    first = 0
    if kind >> 7:
        told = np.frombuffer(decoder.told((rows + 7) // 8), np.uint8)
        twins = np.unpackbits(told, count=rows).astype(bool)
        first = int.from_bytes(decoder.told(4), "little")
        if first >= rows or twins[first]:
            raise ValueError(f"row {first:,} of {rows:,} is no row for others to differ from")
    row_steps = np.zeros(rows, np.int64)
    column_steps = np.zeros(columns, np.int64)
    model.code_steps(decoder, row_steps, row_spread)
    model.code_steps(decoder, column_steps, column_spread)
    matrix = np.zeros((rows, columns), np.int16)
    profile = Profile(level, row_steps, column_steps, shifts & 15, shifts >> 4)
    model.tables(top).code(decoder, matrix, level, *profile.levels())
    matrix[twins] = wrap_integers(matrix[twins] + matrix[first], top)
    return matrix


def lanes_for(integers: int) -> int:
    """How many lanes code so many integers."""
    return max(1, math.isqrt(integers) // LANE_SHARE)


def encode_integers(matrices: Sequence[np.ndarray]) -> tuple[bytes, bytes]:
    """Pack integer matrices within +-128: facts, which a general codec shortens, and a stream.

    The same matrices always give the same bytes. Raises ValueError where a decoder would refuse.
    """
    check_shapes([matrix.shape for matrix in matrices])
    encoder, model, integers = RangeEncoder(), IntegerModel(), 0
    for matrix in matrices:
        if matrix.size:
            encode_matrix(encoder, model, matrix.astype(np.int16))
            integers += matrix.size
    return bytes(encoder.facts), encoder.stream(lanes_for(integers))


def decode_integers(facts: bytes, stream: bytes, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The int8 matrices of these shapes that encode_integers() packed.

    Raises ValueError for anything that it cannot have written. Takes time and memory in
    proportion to the integers that `shapes` claims, however few bytes there are.
    """
    check_shapes(shapes)
    decoder = RangeDecoder(facts, stream, lanes_for(sum(math.prod(shape) for shape in shapes)))
    model, matrices = IntegerModel(), []
    for shape in shapes:
        matrix = np.zeros(shape, np.int16)
        if matrix.size:
            matrix = decode_matrix(decoder, model, *shape)
        if matrix.size and (matrix.max() > 127 or matrix.min() < -128):
            raise ValueError("an integer is outside int8")
        matrices.append(matrix.astype(np.int8))
    decoder.check_end()
    return matrices


def check_shapes(shapes: Sequence[Shape]) -> None:
    """Raise ValueError for shapes that are not of matrices, or too many or too large."""
    for shape in shapes:
        if len(shape) != 2 or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"expected a shape (rows, columns), not {shape!r}")
    sizes = len(shapes), sum(map(sum, shapes)), sum(map(math.prod, shapes))
    bounds = MAX_MATRICES, MAX_LINES, MAX_INTEGERS
    if any(size > bound for size, bound in zip(sizes, bounds, strict=True)):
        raise ValueError(f"matrices, lines and integers are {sizes}; the bounds are {bounds}")


# LZMA packs everything else of a body: its header, its floats, its packed text, and the facts
# that go with the integers.
FACTS_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "pb": 0}]
RANGE_LENGTHS = struct.Struct("<4I")  # bytes of header, facts and text; of all that LZMA packs
MAX_FACTS = 1 << 20  # bytes of facts and flags, which the body itself does not hold


def float_planes(floats: Sequence[np.ndarray]) -> bytes:
    """fp16 tensors as bytes: a flag for each, then all high bytes, then all low bytes.

    The flag says that the bit patterns ascend, as sorted scales do, and that their differences
    are told in their place.
    """
    flags = bytearray()
    words: list[np.ndarray] = [np.empty(0, np.uint16)]
    for tensor in floats:
        patterns = np.frombuffer(tensor.astype("<f2").tobytes(), "<u2")
        ascending = bool((patterns[1:] >= patterns[:-1]).all())
        flags.append(ascending)
        words.append(np.diff(patterns, prepend=np.uint16(0)) if ascending else patterns)
    planes = np.concatenate(words).astype("<u2").view(np.uint8)
    return bytes(flags) + planes[1::2].tobytes() + planes[::2].tobytes()


def read_float_planes(told: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """What float_planes() made of flat tensors of these sizes; ValueError if that cannot be."""
    flags, planes = told[: len(sizes)], np.frombuffer(told, np.uint8, offset=len(sizes))
    if len(planes) != 2 * sum(sizes) or any(flag > 1 for flag in flags):
        raise ValueError(f"{len(told):,} bytes are not {sum(sizes):,} floats")
    high, low = planes.reshape(2, -1).astype(np.uint16)
    words = high << 8 | low
    tensors: list[np.ndarray] = []
    at = 0
    for flag, size in zip(flags, sizes, strict=True):
        patterns: np.ndarray = words[at : at + size]
        if flag:
            patterns = patterns.cumsum(dtype=np.uint16)
        tensors.append(np.frombuffer(patterns.astype("<u2").tobytes(), "<f2").astype(np.float16))
        at += size
    return tensors


def pack_by_range(body: bytes) -> bytes:
    """An artifact's body under the range coder: lengths, what LZMA packs, the integers' stream.

    Raises one of MALFORMED for bytes that are no body.
    """
    header, rows, start = header_of(body, ARTIFACT_VERSION)
    streams: dict[str, list[np.ndarray]] = {dtype: [] for dtype in STREAM_TYPES}
    for _, dtype, numbers in arrays_in_body(body, start, rows):
        streams[dtype].append(numbers)
    facts, stream = encode_integers(streams["<i1"])
    text = b"".join(numbers.tobytes() for numbers in streams["|u1"])
    plain = body[4:start] + facts + text + float_planes(streams["<f2"])
    packed = lzma.compress(plain, lzma.FORMAT_RAW, filters=FACTS_FILTERS)
    lengths = RANGE_LENGTHS.pack(start - 4, len(facts), len(text), len(packed))
    return lengths + packed + stream


def unpack_by_range(packed: bytes, size: int) -> bytes:
    """The body of `size` bytes that pack_by_range() was given; raises Refusal otherwise."""
    try:
        return read_range(packed, size)
    except MALFORMED as error:
        raise Refusal(
            f"the artifact's body does not decompress ({type(error).__name__}: {error})"
        ) from None


def read_range(packed: bytes, size: int) -> bytes:
    """As unpack_by_range(), but raises one of MALFORMED.

    Before integers are read, what the header promises has been found to be `size` bytes in all.
    """
    header_size, facts_size, text_size, packed_size = RANGE_LENGTHS.unpack_from(packed)
    end = RANGE_LENGTHS.size + packed_size
    plain = unpack_lzma(packed[RANGE_LENGTHS.size : end], size + MAX_FACTS)
    parts = io.BytesIO(plain)
    head = struct.pack("<I", header_size) + parts.read(header_size)
    facts, text, floats = parts.read(facts_size), parts.read(text_size), parts.read()
    _, rows, _ = header_of(head, ARTIFACT_VERSION)
    shapes: dict[str, list[Shape]] = {dtype: [] for dtype in STREAM_TYPES}
    for _, dtype, shape in streams_in_body(rows):
        shapes[dtype].append(shape)
    integers, halves, texts = (sum(map(math.prod, shapes[dtype])) for dtype in STREAM_TYPES)
    if texts != text_size or len(head) + integers + 2 * halves + texts != size:
        raise ValueError("its header and lengths disagree")
    numbers = read_float_planes(floats, [math.prod(shape) for shape in shapes["<f2"]])
    matrices = decode_integers(facts, packed[end:], shapes["<i1"])
    arrays = [*matrices, *(half.astype("<f2") for half in numbers)]
    return b"".join([head, *(array.tobytes() for array in arrays), text])


def unpack_lzma(packed: bytes, most: int) -> bytes:
    """What LZMA packed, at most `most` bytes; raises ValueError otherwise."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FACTS_FILTERS)
    try:
        plain = reader.decompress(packed, max_length=most)
    except lzma.LZMAError as error:
        raise ValueError(f"LZMA cannot read its part ({error})") from None
    if not reader.eof or reader.unused_data:
        raise ValueError("LZMA's part does not end where it should")
    return plain


# =================================================================================================
# Size
# The artifact has a budget of bytes as training has one of seconds. Steps by CLIP_SIGMAS have one
# knob, a factor of all of them: coarser steps take fewer bytes. It is solved for.
# =================================================================================================

SIZE_FORESEEN_AT = 0.1  # of the run: when the log says what the artifact will take
FACTOR_BYTES = 0.2  # a number of LQER's factors
LEAST_CODED = 0.96  # of the integers' entropy: what a codec takes at least

SOLVER_PASSES = 8
SOLVER_OCTAVES = (-4.0, 4.0)  # binary logarithms of the finest and the coarsest factor
SOLVER_HALVINGS = 12
SOLVER_AIM = 0.997  # of the target: what a pass aims at
SOLVER_LEAST = 0.99  # of ARTIFACT_TARGET_BYTES: what a pass must reach


def entropy_bytes(integers: Tensor) -> float:
    """Order-0 entropy of int8 values of any shape, in bytes."""
    frequencies = torch.bincount(integers.flatten().int() + 128).double() / integers.numel()
    nats = float(torch.special.entr(frequencies).sum()) * integers.numel()
    return nats / math.log(256)


@torch.no_grad()
def estimated_bytes(model: GPT, factor: float) -> float:
    """Entropy of all matrices' nearest integers at the largest clips, CLIP_SIGMAS by `factor`."""
    total = 0.0
    for name, parameter in model.named_parameters():
        bits = bits_of(model, name)
        if bits == 0:
            continue
        weight = parameter.detach().float()
        levels = largest_integer(bits)
        sigmas = factor * setting_of(model, name, model.cfg.sigmas_by_role)
        step = clip_candidates(weight, bits, model.cfg, sigmas)[-1]
        total += entropy_bytes(torch.round(weight / step[:, None]).clamp_(-levels, levels))
    return total


def solve_factor(model: GPT, goal: float) -> float:
    """The least factor of CLIP_SIGMAS, the finest steps, whose estimate is at most `goal` bytes."""
    finest, coarsest = SOLVER_OCTAVES
    for _ in range(SOLVER_HALVINGS):
        middle = 0.5 * (finest + coarsest)
        if estimated_bytes(model, 2.0**middle) <= goal:
            coarsest = middle
        else:
            finest = middle
    return 2.0**coarsest


def correction_bytes(model: GPT) -> float:
    """About what LQER's factors and their scales take: those of the largest matrices."""
    cfg = model.cfg
    matrices = [model.get_parameter(name) for name in model.kinds if bits_of(model, name)]
    largest = sorted(matrices, key=Tensor.numel, reverse=True)[: cfg.lqer_top_k]
    total = 0.0
    for matrix in largest:
        rows, columns = matrix.shape
        rank = min(cfg.lqer_rank, rows, columns)
        total += FACTOR_BYTES * rank * (rows + columns) + rank * columns / cfg.lqer_group
    return total


def foresee_size(model: GPT, step: int, run: Run) -> None:
    """Log what code and artifact of the present weights would take, and warn of a vain target.

    The estimate knows neither Hessians nor codec and is rather too low: integers near their
    entropy, floats at a byte. It holds early in a run because CLIP_SIGMAS go by the shape of rows,
    which they keep as they grow.
    """
    cfg = run.cfg
    coarsest_octaves = 0.0  # percentile clips cannot be made coarser
    target = cfg.artifact_limit_bytes
    if cfg.clips_by_deviation:
        coarsest_octaves = SOLVER_OCTAVES[1]
        target = cfg.artifact_target_bytes or target
    fixed = float(len(run.folder.source))
    for name, parameter in model.named_parameters():
        # A scale for each row of integers, or every float.
        fixed += len(parameter) if bits_of(model, name) else parameter.numel()
    fixed += correction_bytes(model)
    total = fixed + LEAST_CODED * estimated_bytes(model, 1.0)
    coarsest = fixed + LEAST_CODED * estimated_bytes(model, 2.0**coarsest_octaves)
    run.folder.log(
        "size foreseen at step:{step} total:{total:.0f} coarsest:{coarsest:.0f} target:{target}",
        "size_foreseen",
        step=step,
        total=total,
        coarsest=coarsest,
        target=target,
    )
    if coarsest > target:
        run.folder.log(
            f"warning: code and artifact will be over {target} bytes, by "
            f"{coarsest - target:.0f} or more: take fewer parameters or BITS"
        )


class SizeSolver:
    """Finds the factor of CLIP_SIGMAS at which code and artifact end just below a target.

    A pass that misses tells how far the estimate is off, two passes how much of its change is
    real; the next pass takes the factor that is solved with both. Two factors on either side of
    the target bound the next one, since a codec's size is not a smooth function.
    """

    def __init__(self, model: GPT, target: int) -> None:
        self.model = model
        self.target = target
        self.largest_over = 0.0  # factors whose artifact is over the target, and those that fit
        self.smallest_fitting = math.inf
        self.totals: dict[float, int] = {}  # bytes by their estimate

    def next_factor(self, factor: float, total: int) -> float:
        """The factor to try after one that gave `total` bytes; the same at the scale's end."""
        if total > self.target:
            self.largest_over = max(self.largest_over, factor)
        else:
            self.smallest_fitting = min(self.smallest_fitting, factor)
        estimate = estimated_bytes(self.model, factor)
        slope = self.slope(estimate, total)
        self.totals[estimate] = total
        goal = estimate + (SOLVER_AIM * self.target - total) / slope
        solved = solve_factor(self.model, goal)
        bounded = 0 < self.largest_over < self.smallest_fitting < math.inf
        if bounded and not self.largest_over < solved < self.smallest_fitting:
            return math.sqrt(self.largest_over * self.smallest_fitting)
        return solved

    def slope(self, estimate: float, total: int) -> float:
        """Real bytes a byte of estimate, from the last other pass; within 0.5 and 2."""
        slopes = [
            (total - other_total) / (estimate - other)
            for other, other_total in self.totals.items()
            if other != estimate
        ]
        return min(max(slopes[-1], 0.5), 2.0) if slopes else 1.0


def fit_artifact(
    model: GPT, hessians: dict[str, Tensor], packed_text: bytes, header: dict, run: Run
) -> tuple[dict[str, Stored], bytes]:
    """Quantised tensors and their artifact, the largest below the target that few passes find.

    Where CLIP_SIGMAS sets the steps, the target is ARTIFACT_TARGET_BYTES, which a pass must come
    close to, or without one the limit. Other clips have no knob: there is one pass.
    """
    cfg = run.cfg
    target = cfg.artifact_target_bytes or cfg.artifact_limit_bytes
    least = SOLVER_LEAST * target if cfg.artifact_target_bytes else 0
    solver = SizeSolver(model, target)
    factor = 1.0
    tries: list[tuple[int, dict[str, Stored], bytes]] = []
    for solver_pass in range(SOLVER_PASSES):
        stored = quantize(model, hessians, run, factor)
        blob = encode_artifact(header, {**stored, **stored_text(packed_text)}, cfg.codec)
        total = len(run.folder.source) + len(blob)
        tries.append((total, stored, blob))
        run.folder.log(
            "size_pass:{solved} factor:{factor:.4f} total:{total} target:{target}",
            "size_pass",
            solved=solver_pass,
            factor=factor,
            total=total,
            target=target,
        )
        if not cfg.clips_by_deviation or least <= total <= target:
            break
        last, factor = factor, solver.next_factor(factor, total)
        if factor == last:
            break
    fitting = [one for one in tries if one[0] <= target]
    if fitting:
        return max(fitting, key=lambda one: one[0])[1:]
    return min(tries, key=lambda one: one[0])[1:]


def export(
    model: GPT, hessians: dict[str, Tensor], packed_text: bytes, val: Validation, run: Run
) -> bytes:
    """Quantise on rank 0, write artifact.bin, and return what can be read back, on all ranks."""
    if run.folder.path is None:  # only rank 0 has one
        return run.ranks.broadcast(b"")
    cfg = run.cfg
    path = run.folder.path / "artifact.bin"
    stored, blob = fit_artifact(model, hessians, packed_text, artifact_header(cfg, val), run)
    run.phase = "export"
    write_file(path, blob)
    blob = path.read_bytes()
    log_sizes(model, stored, run)
    total = len(run.folder.source) + len(blob)
    limit = cfg.artifact_limit_bytes
    label = f"{grid_label(model, stored)}+{cfg.codec}"
    run.folder.log(
        f"Serialized model {label}: {len(blob)} bytes\nCode size: {len(run.folder.source)} bytes"
    )
    run.folder.log(
        "Total submission size {label}: {total} bytes limit:{limit} left:{left}",
        "artifact",
        label=label,
        model_bytes=len(blob),
        code_bytes=len(run.folder.source),
        total=total,
        limit=limit,
        left=limit - total,
        sha256=hashlib.sha256(blob).hexdigest(),
    )
    if total > limit:
        run.ledger.mark_ineligible(
            f"code and artifact have {total} bytes, {total - limit} over "
            f"ARTIFACT_LIMIT_BYTES={limit}"
        )
    return run.ranks.broadcast(blob)


def stored_text(packed_text: bytes) -> dict[str, Stored]:
    """Training text as the artifact holds it, if there is any."""
    if not packed_text:
        return {}
    content = np.frombuffer(packed_text, np.uint8).copy()
    return {TRAINING_TEXT: Stored(torch.from_numpy(content))}


def log_sizes(model: GPT, stored: dict[str, Stored], run: Run) -> None:
    """Log what each role takes: elements, and the order-0 entropy of its integers in bytes.

    A role's corrections are among its integers, by a histogram of their own, and its floats.
    """
    for role in ROLES:
        tensors = [tensor for name, tensor in stored.items() if model.kinds[name].role == role]
        nothing = torch.empty(0, dtype=torch.int8)
        integers, factors, floats = [nothing], [nothing], 0
        for tensor in tensors:
            for array in tensor.arrays():
                if array.dtype != torch.int8:
                    floats += array.numel()
                elif array is tensor.values:
                    integers.append(array.flatten())
                else:
                    factors.append(array.flatten())
        entropy = entropy_bytes(torch.cat(integers)) + entropy_bytes(torch.cat(factors))
        run.folder.log(
            "size {role} tensors:{tensors} integers:{integers} entropy_bytes:{entropy:.0f} "
            "float_bytes:{floats} corrected:{corrected} protected:{protected}",
            "size",
            role=role,
            tensors=len(tensors),
            integers=sum(map(len, integers + factors)),
            entropy=entropy,
            floats=2 * floats,
            corrected=sum(tensor.low_rank is not None for tensor in tensors),
            protected=sum(tensor.protected is not None for tensor in tensors),
        )


def grid_label(model: GPT, stored: dict[str, Stored]) -> str:
    """How log lines call the artifact's block matrices."""
    mlps = [stored[name] for name, kind in model.kinds.items() if kind.role == "mlp"]
    if any(tensor.scale is not None for tensor in mlps):
        return f"int{model.cfg.bits_by_role['mlp']}"
    return "fp16"


# =================================================================================================
# Counts
# N-grams and repeats of the training text and of the validation text that is already scored,
# mixed with the network's distribution. Every distribution is over the whole vocabulary and sums
# to one; nothing that predicts a token depends on that token or on a later one. The equation of
# the mixture stands at Mixture, that of the n-grams at CountModel.
# =================================================================================================

MAX_VOCABULARY = 65_536  # ids are stored as uint16
MAX_ORDER = 16  # tokens of the longest n-gram


@dataclass(frozen=True, kw_only=True)
class CountSettings(Part):
    """Which texts are counted, and how their distributions join the network's."""

    title = "Counts"
    prefixes: ClassVar[tuple[str, ...]] = ("COUNT_",)

    counts: str = scoring_knob(
        "off",
        ("off", "scored", "artifact", "both"),
        "Texts whose n-grams are mixed with the network: those that are scored already, training "
        "text in the artifact, both.",
        absent="off",
    )
    count_bytes: int = training_knob(
        4_000_000, (1, 1 << 40), "Bytes of the artifact for the training text that is counted."
    )
    count_orders: str = scoring_knob(
        "2,8",
        (),
        "Orders of the n-grams of training and scored text.",
        absent="2,8",
        tries=("2,3",),
    )
    count_scored_orders: str = scoring_knob(
        "2,6",
        (),
        "Orders of the n-grams of the scored text alone; may be none.",
        absent="2,6",
        tries=("2",),
    )
    count_recent_tokens: int = scoring_knob(
        128,
        (0, 1 << 20),
        "Last tokens that are expected to come again; 0: none.",
        absent=128,
        tries=(8,),
    )
    count_longest_match: int = scoring_knob(
        32,
        (0, 256),
        "Tokens of context that are compared to find repeats; 0: no repeats.",
        absent=32,
        tries=(4,),
    )
    count_chunk_tokens: int = scoring_knob(
        64,
        (1, 4096),
        "Targets that are scored before the counts learn from them.",
        absent=64,
        tries=(7,),
    )
    count_gate_rate: float = scoring_knob(
        0.02, (0.0, 10.0), "Learning rate of the mixture's weights; 0 keeps them.", absent=0.02
    )
    count_match_rate: float = scoring_knob(
        0.4, (0.0, 10.0), "Learning rate of the biases for repeats; 0 keeps them.", absent=0.4
    )

    @property
    def orders_of_texts(self) -> tuple[int, ...]:
        """COUNT_ORDERS as numbers; or Refusal."""
        return parse_orders("COUNT_ORDERS", self.count_orders)

    @property
    def orders_of_scored(self) -> tuple[int, ...]:
        """COUNT_SCORED_ORDERS as numbers, perhaps none; or Refusal."""
        if not self.count_scored_orders:
            return ()
        return parse_orders("COUNT_SCORED_ORDERS", self.count_scored_orders)

    @property
    def counts_scored_text(self) -> bool:
        """Whether validation text is counted once it is scored."""
        return self.counts in ("scored", "both")

    @property
    def counts_training_text(self) -> bool:
        """Whether the artifact carries training text to be counted."""
        return self.counts in ("artifact", "both")

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Orders are small numbers, and counting goes along sliding windows."""
        orders = (*cfg.orders_of_texts, *cfg.orders_of_scored)
        yield (
            all(2 <= order <= MAX_ORDER for order in orders),
            f"COUNT_ORDERS and COUNT_SCORED_ORDERS must be from 2 to {MAX_ORDER}",
        )
        yield (
            cfg.counts == "off" or cfg.eval_stride > 0,
            "COUNTS needs sliding windows, not EVAL_STRIDE",
        )


def parse_orders(name: str, text: str) -> tuple[int, ...]:
    """Different numbers from a text like 2,4,8; or Refusal."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d?", number) for number in numbers):
        raise Refusal(f"{name}={text!r}: expected numbers like 2,4,8")
    if len(set(numbers)) < len(numbers):
        raise Refusal(f"{name}={text!r}: expected different numbers")
    return tuple(map(int, numbers))


@dataclass(frozen=True)
class GramTable:
    """The n-grams of one order in a text, numbered in the order of (context, last token).

    A gram's context is all of it but its last token, a gram of the order below. All grams with one
    context have neighbouring numbers. Places whose context occurs nowhere else have no number: no
    other place could learn from them.
    """

    gram_at: np.ndarray  # int32 (N,): number of the gram that ends at each token, or -1
    is_first: np.ndarray  # bool (N,): no earlier token ends the same gram
    first_gram: np.ndarray  # int32 (contexts + 1,): where the grams of each context begin
    last_token: np.ndarray  # uint16 (grams,)


class TextIndex:
    """Numbers for the n-grams of a text, and the longest earlier repeat before each token.

    The numbers are names only: what a text holds later never changes which earlier places share a
    name. Numbering by sorting is exact; nothing is hashed. Tokens from `boundary` on are those to
    predict. What lies before is training text; repeats are looked for there alone, or, if there is
    none, in all that came earlier.
    """

    def __init__(
        self, tokens: np.ndarray, longest_order: int, longest_match: int = 0, boundary: int = 0
    ) -> None:
        self.tokens = np.asarray(tokens, np.uint16)
        self.boundary = boundary
        self.tables: list[GramTable] = []
        targets = len(tokens) - boundary
        self.match = MatchModel(targets if longest_match else 0)
        # Of each gram to number: the place of its last token, ascending, and its context's number.
        places: np.ndarray = np.arange(len(tokens), dtype=np.int32)
        contexts: np.ndarray = np.zeros(len(tokens), np.int32)
        num_contexts = 1
        for order in range(1, max(longest_order, longest_match) + 1):
            # A stable sort leaves equal grams in the order of the text.
            keys = contexts.astype(np.int64) * MAX_VOCABULARY + self.tokens[places]
            sorted_keys, permutation = (
                x.numpy() for x in torch.sort(torch.from_numpy(keys), stable=True)
            )
            del keys  # a text of many million tokens leaves no room for what is not needed
            opens = np.ones(len(places), bool)
            opens[1:] = sorted_keys[1:] != sorted_keys[:-1]
            gram_sorted = np.cumsum(opens, dtype=np.int32) - 1
            grams = np.empty_like(gram_sorted)
            grams[permutation] = gram_sorted
            if order <= longest_order:
                is_first = np.empty_like(opens)
                is_first[permutation] = opens
                self.add_table(places, grams, is_first, sorted_keys[opens], num_contexts)
            del sorted_keys
            if order <= longest_match:
                group_start = np.flatnonzero(opens).astype(np.int32)[gram_sorted]
                self.note_matches(order, places[permutation], group_start)
                del group_start
            del permutation, gram_sorted
            num_contexts = int(opens.sum())
            is_context = np.bincount(grams, minlength=num_contexts) > 1
            if order >= longest_order:
                # Only matches are looked for from here on, and only grams before targets matter.
                before_target = np.zeros(num_contexts, bool)
                before_target[grams[places + 1 + longest_match - order >= boundary]] = True
                is_context &= before_target
            keep = is_context[grams] & (places < len(tokens) - 1)
            contexts = grams[keep]
            places = places[keep] + 1

    def add_table(
        self,
        places: np.ndarray,
        grams: np.ndarray,
        is_first: np.ndarray,
        keys: np.ndarray,
        num_contexts: int,
    ) -> None:
        """Keep the numbers of the next order: of the grams ending at `places`; a key for each."""
        gram_at = np.full(len(self.tokens), -1, np.int32)
        gram_at[places] = grams
        first_anywhere = np.ones(len(self.tokens), bool)  # a gram without a number occurs once
        first_anywhere[places] = is_first
        sizes = np.bincount(keys // MAX_VOCABULARY, minlength=num_contexts)
        first_gram = np.append(0, np.cumsum(sizes)).astype(np.int32)
        last_token = (keys % MAX_VOCABULARY).astype(np.uint16)
        self.tables.append(GramTable(gram_at, first_anywhere, first_gram, last_token))

    def note_matches(self, length: int, places: np.ndarray, group_start: np.ndarray) -> None:
        """Keep the latest repeat of each target's last `length` tokens.

        `places` end grams of that length, sorted by gram and then by place; `group_start` says
        where in them each one's gram begins.
        """
        earlier = np.arange(-1, len(places) - 1, dtype=np.int32)
        if self.boundary:
            # The latest source up to each place, from which the search goes on at the next.
            is_source = places + 1 < self.boundary
            latest = np.where(is_source, np.arange(len(places), dtype=np.int32), np.int32(-1))
            earlier[1:] = np.maximum.accumulate(latest)[:-1]
        is_target = (places + 1 >= self.boundary) & (places + 1 < len(self.tokens))
        found = is_target & (earlier >= group_start)
        target = places[found] + 1 - self.boundary
        self.match.length[target] = length
        self.match.source[target] = places[earlier[found]] + 1


class MatchModel:
    """What followed the longest repeat of the tokens before each target, the latest such place."""

    def __init__(self, targets: int) -> None:
        self.length = np.zeros(targets, np.int16)  # tokens that agree; 0: none does
        self.source = np.zeros(targets, np.int32)  # place in the text of what followed them there


class Tally:
    """How often the grams of one order were counted, and how often each count occurs."""

    def __init__(self, grams: int) -> None:
        self.counts = np.zeros(grams, np.int32)
        self.grams_with = np.zeros(6, np.int64)  # grams counted 0, 1, 2, 3, 4 and more times
        self.unnumbered = 0  # grams without a number, which are counted once

    def add(self, grams: np.ndarray, weights: np.ndarray) -> None:
        """Count each gram `weights` (0 or 1) more times; grams may repeat, -1 has no number."""
        numbered = grams >= 0
        self.unnumbered += int(weights[~numbered].sum())
        grams = grams[numbered]
        weights = weights[numbered]
        if len(grams) > len(self.counts) // 8:
            self.counts += np.bincount(grams, weights, len(self.counts)).astype(np.int32)
            self.grams_with[:] = np.bincount(np.minimum(self.counts, 5), minlength=6)
            return
        touched = np.unique(grams)
        self.grams_with -= np.bincount(np.minimum(self.counts[touched], 5), minlength=6)
        np.add.at(self.counts, grams, weights)
        self.grams_with += np.bincount(np.minimum(self.counts[touched], 5), minlength=6)

    def discounts(self) -> np.ndarray:
        """Discounts of the counts 0, 1, 2 and 3 or more, float64 (4,).

        D_c = c - (c + 1) Y n_(c+1) / n_c with Y = n_1 / (n_1 + 2 n_2) and n_c the grams counted c
        times (Chen & Goodman 1998, equation 26). Too few counts to estimate them give 0.5, 1 and
        1.5. A discount stays within 0.1 and its count, so that every token keeps a probability.
        """
        n = self.grams_with.astype(np.float64)
        n[1] += self.unnumbered
        if min(n[1:5]) == 0:
            return np.array([0.0, 0.5, 1.0, 1.5])
        Y = n[1] / (n[1] + 2 * n[2])
        c = np.arange(1, 4)
        estimates = c - (c + 1) * Y * n[2:5] / n[1:4]
        return np.append(0.0, np.clip(estimates, 0.1, c))


@dataclass
class Evidence:
    """What the longest context that was seen before each target has shown: int64 (n,) each."""

    order: np.ndarray  # tokens of that context and one, 1 if there is none
    count: np.ndarray  # occurrences
    continuations: np.ndarray  # different tokens after it

    @classmethod
    def of_nothing(cls, n: int) -> Evidence:
        """For n targets whose contexts are all new."""
        return cls(np.ones(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64))


class CountModel:
    """Interpolated modified Kneser-Ney over token ids (Chen & Goodman 1998, section 3.5).

    With h the context, h' the same without its first token, and c the count of h followed by w:

        p(w|h) = (c - D(c)) / sum_w c + sum_w D(c) / sum_w c * p(w|h'),    p() = 1/V.

    A model of order K counts occurrences at order K and, below it, the different tokens that came
    before: c(h w) = |{v: v h w was seen}|. Models of several orders share what is below them.
    `log_probs` reads counts up to each target; the lowest order alone is as of the last lesson.
    """

    def __init__(
        self, index: TextIndex, orders: tuple[int, ...], vocab_size: int, learned: int
    ) -> None:
        self.index = index
        self.orders = orders
        self.vocab_size = vocab_size
        self.learned = 0  # tokens of the text that are counted
        self.occurrences = {order: self.empty_tally(order) for order in orders}
        self.predecessors = {order: self.empty_tally(order) for order in range(1, max(orders))}
        self.learn(learned)

    def empty_tally(self, order: int) -> Tally:
        """A tally of nothing yet for the grams of an order."""
        return Tally(len(self.index.tables[order - 1].last_token))

    def learn(self, until: int) -> None:
        """Count the tokens from the last lesson up to `until`, exclusive."""
        places = np.arange(self.learned, until)
        for order, tally in self.occurrences.items():
            whole = places[places >= order - 1]
            tally.add(self.index.tables[order - 1].gram_at[whole], np.ones(len(whole), np.int32))
        for order, tally in self.predecessors.items():
            tally.add(
                self.index.tables[order - 1].gram_at[places], self.new_predecessors(order, places)
            )
        self.learned = until

    def new_predecessors(self, order: int, places: np.ndarray) -> np.ndarray:
        """1 where the gram of `order` that ends at a place has a new token before it, else 0."""
        longer = self.index.tables[order]
        return (longer.is_first[places] & (places >= order)).astype(np.int32)

    def lowest_order(self) -> np.ndarray:
        """p(w) without a context, float64 (V,)."""
        tally = self.predecessors[1]
        # Over the vocabulary, so that no sum's rounding knows which tokens come later.
        counts = np.zeros(self.vocab_size)
        counts[self.index.tables[0].last_token] = tally.counts
        discount = tally.discounts()[np.minimum(counts, 3).astype(np.int64)]
        uniform = np.full(self.vocab_size, 1.0 / self.vocab_size)
        total = counts.sum()
        return (counts - discount + discount.sum() * uniform) / total if total else uniform

    def probs(self, places: np.ndarray, online: bool) -> tuple[dict[int, np.ndarray], Evidence]:
        """Distributions of the tokens at neighbouring places, float64 (n, V) by order.

        online: tokens since the last lesson count too, each for the places after it.
        """
        n = len(places)
        lower = np.tile(self.lowest_order(), (n, 1))
        seen = Evidence.of_nothing(n)
        result = {}
        for order in range(2, max(self.orders) + 1):
            continuations = Continuations(self, order, places, online)
            if order in self.occurrences:
                counts = continuations.counts(
                    self.occurrences[order], np.ones(len(continuations.pending))
                )
                result[order] = continuations.interpolate(lower, counts, self.occurrences[order])
            if order in self.predecessors:
                is_new = self.new_predecessors(order, continuations.pending)
                counts = continuations.counts(self.predecessors[order], is_new)
                lower = continuations.interpolate(lower, counts, self.predecessors[order])
            continuations.note(seen, counts)
        return result, seen


class Continuations:
    """The grams that continue the contexts of some places: a sparse matrix (n, V), row by row."""

    def __init__(self, model: CountModel, order: int, places: np.ndarray, online: bool) -> None:
        self.model = model
        self.order = order
        table = model.index.tables[order - 1]
        contexts = self.contexts_of(places)
        # A context without a number has no grams.
        first = np.where(contexts >= 0, table.first_gram[contexts], 0)
        end = np.where(contexts >= 0, table.first_gram[contexts + 1], 0)
        row_start = np.cumsum(end - first) - (end - first)
        self.row = np.repeat(np.arange(len(places)), end - first)
        self.gram = np.arange(len(self.row)) + np.repeat(first - row_start, end - first)
        self.cell = self.row * model.vocab_size + table.last_token[self.gram]
        # Tokens that the tallies do not hold yet join the rows of the places after them.
        self.pending = np.arange(model.learned, places[-1] if online else model.learned)
        same_context = contexts[:, None] == self.contexts_of(self.pending)
        is_earlier = self.pending < places[:, None]
        later, self.earlier = np.nonzero(same_context & is_earlier & (end > first)[:, None])
        gram = table.gram_at[self.pending[self.earlier]]
        self.pending_entry = row_start[later] + gram - first[later]

    def contexts_of(self, places: np.ndarray) -> np.ndarray:
        """Numbers of the contexts before places, int64 (n,), -1 where a place has none."""
        numbers = self.model.index.tables[self.order - 2].gram_at[places - 1]
        return np.where(places >= self.order - 1, numbers, -1).astype(np.int64)

    def counts(self, tally: Tally, pending_weights: np.ndarray) -> np.ndarray:
        """Counts of the matrix's entries at the time of their rows, float64."""
        counts = tally.counts[self.gram].astype(np.float64)
        np.add.at(counts, self.pending_entry, pending_weights[self.earlier])
        return counts

    def interpolate(self, lower: np.ndarray, counts: np.ndarray, tally: Tally) -> np.ndarray:
        """The distributions of this order from those of the order below, float64 (n, V)."""
        discount = tally.discounts()[np.minimum(counts, 3).astype(np.int64)]
        total = np.bincount(self.row, counts, len(lower))
        discounted = np.bincount(self.row, discount, len(lower))
        is_known = total > 0
        total[~is_known] = 1
        probs = lower * np.where(is_known, discounted / total, 1.0)[:, None]
        probs.reshape(-1)[self.cell] += (counts - discount) / total[self.row]
        return probs

    def note(self, seen: Evidence, counts: np.ndarray) -> None:
        """Write down the evidence of the contexts that were seen."""
        total = np.bincount(self.row, counts, len(seen.order)).astype(np.int64)
        kinds = np.bincount(self.row, counts > 0, len(seen.order)).astype(np.int64)
        is_known = total > 0
        seen.order[is_known] = self.order
        seen.count[is_known] = total[is_known]
        seen.continuations[is_known] = kinds[is_known]


# Weights before any lesson, rounded from what they came to on a hold-out of the training text. The
# shortest order's is negative: what is likely in any context counts less as evidence.
START_NETWORK = 0.6
START_LONGEST_ORDER = 0.4
START_SHORTEST_ORDER = -0.15
START_RECENT = 0.2
START_BIAS = 0.1  # for each token of a match
MAX_LOG2_COUNT = 5  # counts are told apart by powers of two up to here
MATCH_CLASSES = np.array([4, 6, 8, 10, 12, 16, 24, 32])  # shortest length of each class but none
MAX_CONFIDENCE = 7  # largest probabilities, by powers of the square root of one half


class Mixture:
    """The network's, the counts' and the matches' distributions as one; it learns as it scores.

        p(w) = softmax over w of ( sum_i a_i log p_i(w) + sum_m b_m [w is what match m predicts] )

    The weights a_i are sums over gates: each gate has a bucket of evidence known before the target,
    and one weight for each distribution in each bucket. The bias b_m belongs to the match's length.
    After a chunk of targets is scored, each weight goes one Adagrad step (Duchi et al. 2011) down
    the gradient of the chunk's nats, d nats / d a_i = sum_w p(w) log p_i(w) - log p_i(target), and
    the chunk's tokens are counted. Weights are float64, and all state depends on the data alone.
    """

    def __init__(
        self,
        cfg: Config,
        training_tokens: np.ndarray,
        validation_tokens: np.ndarray,
        vocab_size: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Index and count the training tokens; targets are validation_tokens[1:].

        dtype is that of rows over the vocabulary: float32 halves their time.
        """
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.tokens = np.asarray(validation_tokens, np.int64)
        self.scored = 0  # targets
        self.largest_sum_error = 0.0
        self.models: dict[str, CountModel] = {}  # by the text they read, the most telling first
        self.matches: list[tuple[np.ndarray, np.ndarray]] = []  # length and prediction by place
        self.count_texts(training_tokens)
        experts = [("network", 0)]
        experts += [(name, order) for name, model in self.models.items() for order in model.orders]
        if cfg.count_recent_tokens:
            experts.append(("recent", 0))
        self.experts = experts
        self.start = torch.tensor([self.start_weight(*e) for e in experts], dtype=torch.float64)
        shapes = [(size, len(experts)) for size in self.gate_sizes()]
        self.gates = [AdagradTable(shape, cfg.count_gate_rate) for shape in shapes]
        lengths = (cfg.count_longest_match + 1,)
        self.biases = [AdagradTable(lengths, cfg.count_match_rate) for _ in self.matches]
        for bias in self.biases:
            bias.values += START_BIAS * torch.arange(cfg.count_longest_match + 1)
        self.pending: list[Lesson] = []

    def count_texts(self, training: np.ndarray) -> None:
        """Make the count models and match models of the texts that the settings name."""
        cfg = self.cfg
        if cfg.counts_training_text:
            text = np.concatenate([training, self.tokens])
            learned = len(training) + int(cfg.counts_scored_text)  # the first token is no target
            self.add_text("training", text, cfg.orders_of_texts, len(training), learned)
        if cfg.counts_scored_text:
            self.add_text("scored", self.tokens, cfg.orders_of_scored, 0, 1)

    def add_text(
        self, name: str, text: np.ndarray, orders: tuple[int, ...], boundary: int, learned: int
    ) -> None:
        """Count a text that the validation text ends, and look for the matches in it."""
        index = TextIndex(text, max(orders, default=0), self.cfg.count_longest_match, boundary)
        if orders:
            self.models[name] = CountModel(index, orders, self.vocab_size, learned)
        if self.cfg.count_longest_match:
            predictions = index.tokens[index.match.source]
            self.matches.append((index.match.length, predictions))

    def start_weight(self, source: str, order: int) -> float:
        """The plain constant that a distribution's weight begins with."""
        if source == "network":
            return START_NETWORK
        if source == "recent":
            return START_RECENT
        main = next(iter(self.models), "")
        if source == main and order == max(self.models[main].orders):
            return START_LONGEST_ORDER
        if source == main and order == min(self.models[main].orders):
            return START_SHORTEST_ORDER
        return 0.0

    def gate_sizes(self) -> list[int]:
        """Buckets of each gate, in the order of buckets()."""
        orders = 1 + max([1] + [max(model.orders) for model in self.models.values()])
        classes = 1 + MAX_LOG2_COUNT
        confidences = 1 + MAX_CONFIDENCE
        lengths = 1 + len(MATCH_CLASSES)
        return [orders * classes, classes * classes, lengths ** len(self.matches), confidences**2]

    def score(self, network: Tensor) -> Tensor:
        """Nats of the next n targets, float64 (n,), given the network's log-probabilities (n, V).

        Chunks lie on a fixed grid of targets: how the rows are dealt to calls changes nothing.
        """
        chunk = self.cfg.count_chunk_tokens
        nats = [torch.zeros(0, dtype=torch.float64)]
        while len(network):
            n = min(chunk - self.scored % chunk, len(network))
            log_probs, lesson = self.mix(network[:n].to(self.dtype))
            target = torch.from_numpy(self.tokens[self.scored + 1 : self.scored + n + 1])
            nats.append(-log_probs.gather(1, target[:, None]).squeeze(1).double())
            self.pending.append(lesson.graded(target))
            self.scored += n
            network = network[n:]
            if self.scored % chunk == 0:
                self.learn()
        return torch.cat(nats)

    def mix(self, network: Tensor) -> tuple[Tensor, Lesson]:
        """Log-probabilities (n, V) of the next targets, which must lie in one chunk."""
        n = len(network)
        # What the mask forbids has no probability in the mixture; its experts stay finite.
        forbidden = network == -math.inf
        network = network.masked_fill(forbidden, -1e4)
        rows = [network]
        telling = []  # the distribution of the longest order, and the evidence for it
        for model in self.models.values():
            # The validation text ends every text that is counted.
            place = len(model.index.tokens) - len(self.tokens) + 1 + self.scored
            online = self.cfg.counts_scored_text
            probs, seen = model.probs(np.arange(place, place + n), online)
            rows += [torch.from_numpy(probs[order]).log() for order in model.orders]
            telling.append((probs[max(model.orders)], seen))
        if not telling:  # matches alone
            main = network.exp().numpy()
            telling = [(main, Evidence.of_nothing(n))]
        main, evidence = telling[0]
        if W := self.cfg.count_recent_tokens:
            rows.append(
                torch.from_numpy(expect_recent(self.tokens, self.scored + 1, W, main)).log()
            )
        rows = [row.to(self.dtype) for row in rows]
        targets = slice(self.scored + 1, self.scored + 1 + n)
        lengths = [length[targets].astype(np.int64) for length, _ in self.matches]
        predictions = [prediction[targets].astype(np.int64) for _, prediction in self.matches]
        lesson = Lesson(
            expert_rows=rows,
            buckets=self.buckets(evidence, lengths, network, main),
            lengths=[torch.from_numpy(length) for length in lengths],
            predictions=[torch.from_numpy(prediction) for prediction in predictions],
        )
        weights = self.start.expand(n, -1)
        for gate, bucket in zip(self.gates, lesson.buckets, strict=True):
            weights = weights + gate.values[bucket]
        logits = torch.zeros_like(network)
        for i in range(len(rows)):
            logits.addcmul_(rows[i], weights[:, i : i + 1].to(self.dtype))
        for m in range(len(self.matches)):
            bias = self.biases[m].values[lesson.lengths[m]] * (lesson.lengths[m] > 0)
            logits.scatter_add_(1, lesson.predictions[m][:, None], bias[:, None].to(self.dtype))
        log_probs = logits.masked_fill(forbidden, -math.inf).log_softmax(1)
        lesson.probs = log_probs.exp()
        sum_error = float((lesson.probs.sum(1) - 1).abs().max())
        self.largest_sum_error = max(self.largest_sum_error, sum_error)
        return log_probs, lesson

    def buckets(
        self, evidence: Evidence, lengths: list[np.ndarray], network: Tensor, main: np.ndarray
    ) -> Tensor:
        """The bucket of each gate for each target: int64 (gates, n)."""
        classes = 1 + MAX_LOG2_COUNT
        count = log2_class(evidence.count)
        by_order = evidence.order * classes + count
        by_variety = log2_class(evidence.continuations) * classes + count
        by_match = np.zeros_like(count)
        for length in lengths:
            by_match = by_match * (1 + len(MATCH_CLASSES))
            by_match += np.searchsorted(MATCH_CLASSES, length, side="right")
        half_bits = [-2 * network.amax(1).numpy() / np.log(2), -2 * np.log2(main.max(1))]
        confidence = [np.clip(h, 0, MAX_CONFIDENCE).astype(np.int64) for h in half_bits]
        by_confidence = confidence[0] * (1 + MAX_CONFIDENCE) + confidence[1]
        return torch.from_numpy(np.stack([by_order, by_variety, by_match, by_confidence]))

    def learn(self) -> None:
        """Learn from the scored targets of the chunk: weights, biases and counts."""
        buckets = torch.cat([lesson.buckets for lesson in self.pending], 1)
        gradients = torch.cat([lesson.weight_gradients for lesson in self.pending])
        for gate, bucket in zip(self.gates, buckets, strict=True):
            gate.step(bucket, gradients)
        for m, bias in enumerate(self.biases):
            lengths = torch.cat([lesson.lengths[m] for lesson in self.pending])
            bias.step(lengths, torch.cat([lesson.bias_gradients[m] for lesson in self.pending]))
        self.pending = []
        if self.cfg.counts_scored_text:
            for model in self.models.values():
                model.learn(len(model.index.tokens) - len(self.tokens) + 1 + self.scored)


def expect_recent(tokens: np.ndarray, first: int, W: int, main: np.ndarray) -> np.ndarray:
    """Each of the W tokens before a place counted once, and W / 2 times another distribution.

    `main` (n, V) is that other one, of the places from `first` on; float64 (n, V).
    """
    n, V = main.shape
    counts = np.zeros((n, V))
    counts[0] = np.bincount(tokens[max(first - W, 0) : first], minlength=V)
    for row in range(1, n):
        place = first + row
        counts[row] = counts[row - 1]
        counts[row, tokens[place - 1]] += 1
        if place > W:
            counts[row, tokens[place - 1 - W]] -= 1
    return (counts + W / 2 * main) / (counts.sum(1, keepdims=True) + W / 2)


def log2_class(counts: np.ndarray) -> np.ndarray:
    """floor(log2(count)) up to MAX_LOG2_COUNT, 0 for a count of 0: int64."""
    exponent = np.frexp(np.maximum(counts, 1).astype(np.float64))[1] - 1
    return np.minimum(exponent, MAX_LOG2_COUNT).astype(np.int64)


class Lesson:
    """What the mixture needs of some targets to learn from them once they are scored."""

    def __init__(
        self,
        expert_rows: list[Tensor],
        buckets: Tensor,
        lengths: list[Tensor],
        predictions: list[Tensor],
    ) -> None:
        self.expert_rows = expert_rows  # (n, V) each
        self.probs = torch.zeros(0)  # of the mixture, (n, V)
        self.buckets = buckets  # int64 (gates, n)
        self.lengths = lengths  # of each match, int64 (n,)
        self.predictions = predictions  # of each match, int64 (n,)
        self.weight_gradients = torch.zeros(0)  # float64 (n, experts)
        self.bias_gradients: list[Tensor] = []  # of each match, float64 (n,)

    def graded(self, target: Tensor) -> Lesson:
        """Compute the gradients of the targets' nats, int64 (n,), and let go of what is large."""
        probs = self.probs
        expected = torch.stack([(probs * row).sum(1) for row in self.expert_rows], 1)
        place = target[:, None]
        observed = torch.cat([row.gather(1, place) for row in self.expert_rows], 1)
        self.weight_gradients = (expected - observed).double()
        for length, prediction in zip(self.lengths, self.predictions, strict=True):
            predicted = probs.gather(1, prediction[:, None]).squeeze(1)
            is_right = (prediction == target).to(probs.dtype)
            gradient = (predicted - is_right) * (length > 0)
            self.bias_gradients.append(gradient.double())
        self.expert_rows = []
        self.probs = torch.zeros(0)
        return self


class AdagradTable:
    """A table of weights by bucket, each with its own sum of squared gradients."""

    def __init__(self, shape: tuple[int, ...], rate: float) -> None:
        self.values = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.ones(shape, dtype=torch.float64)
        self.rate = rate

    def step(self, bucket: Tensor, gradients: Tensor) -> None:
        """Move the weights of each target's bucket by its gradients: (n,), (n, ...)."""
        total = torch.zeros_like(self.values).index_add_(0, bucket, gradients)
        self.squares.index_add_(0, bucket, gradients.square())
        self.values -= self.rate * total / self.squares.sqrt()


# Training tokens in the artifact:
# A little-endian uint32, the number of tokens, and then the tokens as uint16 in a raw LZMA2 stream.
# Coding them with the counts would save a tenth, but decode one token after the other.

PACKED_COUNT = struct.Struct("<I")
MAX_PACKED_TOKENS = 100_000_000  # an unpacked text takes two bytes a token
# Two-byte units: lp and pb let the coder know which byte of a token it is at.
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 24, "lp": 1, "pb": 1}]
PACKING_LOOKS_AT = 8  # tokens for each byte of COUNT_BYTES
HOLDOUT_EVERY = 20  # documents, of which one shows what the others are worth
TYPICAL_DOCUMENT = 1000  # tokens of average worth that every document is taken to have besides


def pack_tokens(tokens: np.ndarray) -> bytes:
    """The tokens' bytes in an artifact; unpack_tokens() reads them."""
    body = lzma.compress(tokens.astype("<u2").tobytes(), lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    return PACKED_COUNT.pack(len(tokens)) + body


def unpack_tokens(packed: bytes, vocab_size: int) -> np.ndarray:
    """The tokens of pack_tokens(), uint16 (n,); raises Refusal if they are malformed."""
    if len(packed) < PACKED_COUNT.size:
        raise Refusal(f"{len(packed)} bytes of training tokens: expected a count first")
    (count,) = PACKED_COUNT.unpack_from(packed)
    if count > MAX_PACKED_TOKENS:
        raise Refusal(f"{count:,} training tokens; at most {MAX_PACKED_TOKENS:,} are read")
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    try:
        # One byte more than promised tells a longer stream.
        content = decoder.decompress(packed[PACKED_COUNT.size :], max_length=2 * count + 1)
    except lzma.LZMAError as error:
        raise Refusal(f"the training tokens are no LZMA2 stream ({error})") from None
    if len(content) != 2 * count or not decoder.eof or decoder.unused_data:
        raise Refusal(f"the training tokens are not the {count:,} that their count promises")
    tokens = np.frombuffer(content, "<u2")
    if count and tokens.max() >= vocab_size:
        raise Refusal(f"training token {tokens.max()} is outside VOCAB_SIZE={vocab_size}")
    return tokens


def text_of_artifact(stored: dict[str, Stored], cfg: Config) -> np.ndarray:
    """The training tokens in an artifact, uint16 (n,); or Refusal."""
    if TRAINING_TEXT not in stored:
        raise Refusal(
            f"COUNTS={cfg.counts} counts training text, and the artifact holds none: "
            "COUNTS=scored needs none"
        )
    return unpack_tokens(stored[TRAINING_TEXT].values.numpy().tobytes(), cfg.vocab_size)


def pack_training_text(rows: TrainingRows, run: Run) -> bytes:
    """On rank 0, training text of at most COUNT_BYTES for the artifact; empty without COUNTS.

    It counts as training. Only the first tokens are looked at, several times what can fit.
    """
    cfg = run.cfg
    if not cfg.counts_training_text or not run.ranks.is_main:
        return b""
    run.phase = "packing training text"
    with run.ledger.training_clock.running(), run.ledger.table_clock.running():
        tokens = rows.first_tokens(PACKING_LOOKS_AT * cfg.count_bytes)
        packed = pack_within(tokens, cfg.count_bytes, BOS)
    run.folder.log(
        "counts:packed tokens_looked_at:{tokens} bytes:{num_bytes} train_time:{ms:.0f}ms",
        "counts_packed",
        tokens=len(tokens),
        num_bytes=len(packed),
        ms=1e3 * run.ledger.training_clock.elapsed(),
    )
    return packed


def documents_by_worth(tokens: np.ndarray, bos: int) -> list[np.ndarray]:
    """The documents of a text, those first that predict most tokens of a hold-out per own token.

    A document is credited with each token of the hold-out that the longest repeat before it,
    when that repeat lies in the document, predicts rightly. The hold-out's own documents are
    taken to be of average worth.
    """
    documents = np.split(tokens, np.flatnonzero(tokens == bos)[1:])
    held_out = documents[::HOLDOUT_EVERY]
    others = [document for i, document in enumerate(documents) if i % HOLDOUT_EVERY]
    if not others:
        return documents
    boundary = sum(map(len, others))
    text = np.concatenate(others + held_out)
    match = TextIndex(text, 1, 16, boundary).match
    is_right = (match.length > 0) & (text[match.source] == text[boundary:])
    starts = np.cumsum([0] + [len(document) for document in others])
    document_of = np.searchsorted(starts, match.source[is_right], side="right") - 1
    credit = np.bincount(document_of, minlength=len(others))
    average = credit.sum() / boundary
    smoothed = credit + average * TYPICAL_DOCUMENT
    worth = smoothed / (np.diff(starts) + TYPICAL_DOCUMENT)
    ranking = np.argsort(-np.append(worth, np.full(len(held_out), average)), kind="stable")
    return [(others + held_out)[i] for i in ranking]


def pack_within(tokens: np.ndarray, limit: int, bos: int) -> bytes:
    """As much of the training text as `limit` bytes hold, the worthiest documents, packed.

    Raises Refusal if not even the first document fits.
    """
    packed = pack_tokens(tokens)
    if len(packed) <= limit:
        return packed
    documents = documents_by_worth(tokens, bos)
    ends = np.cumsum([len(document) for document in documents])
    bytes_per_token = len(packed) / len(tokens)
    while True:
        kept = int(np.searchsorted(ends, limit / bytes_per_token, side="right"))
        if not kept:
            raise Refusal(f"COUNT_BYTES={limit} holds none of the training documents: allow more")
        # The worthiest come last, so that the latest of equal repeats lies in them.
        packed = pack_tokens(np.concatenate(documents[:kept][::-1]))
        if len(packed) <= limit:
            return packed
        bytes_per_token = 1.01 * max(bytes_per_token, len(packed) / ends[kept - 1])


# =================================================================================================
# N-gram tilt
# Long passages of a validation text occur twice. What followed the same tokens before has its
# logit raised: a distribution that is fixed before the target is seen. (parameter-golf #2135)
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class TiltSettings(Part):
    """Where repeats of the scored text raise a token's probability, and how much."""

    title = "N-gram tilt"
    prefixes: ClassVar[tuple[str, ...]] = ("NGRAM_",)

    ngram_tilt: float = scoring_knob(
        0.0,
        (0.0, 20.0),
        "What is added to the logit of the token that followed the same context; 0 is off.",
        absent=0.0,
        tries=(2.625,),
    )
    ngram_order: int = scoring_knob(
        16, (2, 16), "Tokens of the context and its follower.", absent=16
    )
    ngram_threshold: float = scoring_knob(
        0.8, (0.0, 1.0), "Share of the follower in a context, at least.", absent=0.8
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """The counts have repeats of their own."""
        yield (
            cfg.ngram_tilt == 0 or cfg.counts == "off",
            "NGRAM_TILT and COUNTS both expect repeats: one of them must be off",
        )


# Factors of the hash of a context, oldest token first; the next one is the following token's.
HASH_FACTORS = (
    *(36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241),
    *(524309, 655373, 786433, 917521, 1048583, 1179653, 1310729, 1441801),
)
PAIR_FACTOR = 1000003


@dataclass(frozen=True)
class Hints:
    """For each target, what followed its context most often before it: (N,) each."""

    tokens: np.ndarray  # int64; 0 where the context is new
    shares: np.ndarray  # float32, of the times the context was followed by it; 0 where it is new

    def gates(self, threshold: float) -> np.ndarray:
        """Where a hint is sure enough: bool (N,)."""
        return (self.shares > 0) & (self.shares >= np.float32(threshold))


def context_keys(targets: np.ndarray, order: int) -> np.ndarray:
    """Hashes of the order - 1 tokens before each target that has so many: uint64.

    The first target counts as its own predecessor, so the first that has them is order - 2. The
    hash is the published one, of about 37 bits: on streams of many millions contexts do collide,
    which makes a hint worse but never non-causal.
    """
    length = order - 1
    stream = np.concatenate([targets[:1], targets]).astype(np.uint64)
    count = len(targets) - (length - 1)
    keys = np.zeros(max(count, 0), np.uint64)
    for place, factor in enumerate(HASH_FACTORS[:length]):
        keys ^= stream[place : place + len(keys)] * np.uint64(factor)
    return keys


def earlier_equals(keys: np.ndarray) -> np.ndarray:
    """How many earlier elements are equal to each: int64 (N,)."""
    order, new = grouped(keys)
    places = np.arange(len(keys))
    starts = np.maximum.accumulate(np.where(new, places, 0))
    earlier = np.empty(len(keys), np.int64)
    earlier[order] = places - starts
    return earlier


def grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order that puts equal keys side by side, earliest first, and where each group begins."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order, new


def find_hints(targets: np.ndarray, order: int = 16) -> Hints:
    """The hints of all targets: (N,) token ids, the stream without its first BOS.

    Equal to the sequential pass that looks a context up first and then counts the target: the best
    token of a context is the last whose count exceeded all counts there before.
    """
    hints = np.zeros(len(targets), np.int64)
    shares = np.zeros(len(targets), np.float32)
    keys = context_keys(targets, order)
    if not len(keys):
        return Hints(hints, shares)
    first = order - 2
    followers = targets[first:].astype(np.uint64)
    pairs = (keys * np.uint64(PAIR_FACTOR)) ^ (followers * np.uint64(HASH_FACTORS[order - 1]))
    counts = earlier_equals(pairs) + 1

    by_context, new = grouped(keys)
    counts = counts[by_context]
    places = np.arange(len(keys))
    # A group's offset is above all counts of the groups before it.
    offsets = np.cumsum(new) * (len(keys) + 1)
    best = np.maximum.accumulate(counts + offsets)
    leads = np.ones(len(keys), bool)
    leads[1:] = best[1:] > best[:-1]
    leaders = np.maximum.accumulate(np.where(leads, places, 0))
    starts = np.maximum.accumulate(np.where(new, places, 0))
    # What a target finds is what the one before it in its group left.
    found = np.flatnonzero(~new)
    before = found - 1
    at = by_context[found] + first
    hints[at] = followers[by_context[leaders[before]]]
    totals = found - starts[found]
    shares[at] = (best - offsets)[before] / totals
    return Hints(hints, shares)


def tilted_nats(
    nats: Tensor, hint_nats: Tensor, is_hint: Tensor, gates: Tensor, beta: float
) -> Tensor:
    """Nats of targets under the tilted distribution, from those of target and hint: (...).

    Only the score is tilted; a loss that is trained on takes the plain nats.
    """
    growth = torch.expm1(torch.tensor(beta, dtype=torch.float64)).to(nats.dtype)
    normaliser = torch.log1p(torch.exp(-hint_nats) * growth)
    return torch.where(gates, nats - beta * is_hint + normaliser, nats)


def hints_in_order(val: Validation, order: np.ndarray | None, run: Run) -> np.ndarray | None:
    """The hint of each target, -1 where its gate is closed: int64 (N,); None without NGRAM_TILT.

    order: the targets (N,) in the order in which they are scored, as no hint may come from what is
    scored later; None for that of the text.
    """
    cfg = run.cfg
    if cfg.ngram_tilt == 0:
        return None
    targets = val.tokens[1 : val.num_targets(cfg) + 1]
    if order is None:
        order = np.arange(len(targets))
    hints = find_hints(targets[order], cfg.ngram_order)
    gates = hints.gates(cfg.ngram_threshold)
    in_text = np.full(len(targets), -1)
    in_text[order[gates]] = hints.tokens[gates]
    run.ledger.occasions["ngram_tilt"] += len(targets)
    run.ledger.activity["ngram_tilt"] += int(gates.sum())
    return in_text


def nats_and_scores(
    model: GPT, batch: Batch, beta: float, adapters: Adapters | None = None
) -> tuple[Tensor, Tensor]:
    """Nats of the targets, to learn from, and what is scored: tilted by beta to the hints."""
    hidden, input_ids = model.asked(batch, adapters=adapters)
    head = None if adapters is None else adapters.head
    logits = model.logits(hidden, input_ids, head).flatten(0, 1)
    targets = batch.target_ids.flatten()
    nats = F.cross_entropy(logits, targets, reduction="none")
    scores = nats.detach()
    if batch.hint_ids is not None:
        hints = batch.hint_ids.flatten()
        of_hints = F.cross_entropy(logits.detach(), hints.clamp_min(0), reduction="none")
        scores = tilted_nats(scores, of_hints, targets == hints, hints >= 0, beta)
    return nats.view_as(batch.target_ids), scores.view_as(batch.target_ids)


# =================================================================================================
# Evaluation
# Windows are data: (start, first scored, end of scored), in targets. One loop scores any of
# them. Batches are formed before they are dealt to ranks, so no world size changes the score.
# =================================================================================================


MAX_BATCH_TOKENS = 1 << 23  # of one evaluation forward; an artifact's header may ask for any


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Part):
    """Which windows of the validation text are scored."""

    title = "Evaluation"

    eval_seq_len: int = scoring_knob(2048, (2, 1 << 20), "Tokens of a validation window.")
    eval_stride: int = scoring_knob(
        64, (0, 1 << 20), "Targets from one window to the next; 0 scores chunks only."
    )
    sliding: str = scoring_knob(
        "cover",
        ("cover", "published_s1", "published_s3"),
        "Windows: cover scores every target once; the others print a second, labelled line.",
    )
    eval_batch_seqs: int = scoring_knob(32, (1, 1 << 16), "Windows a forward.")
    eval_truncate: bool = scoring_knob(
        False, (), "Leave out the targets after the last full window."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Windows overlap or touch; a forward's size is bounded, as a header may ask for any."""
        yield cfg.eval_stride <= cfg.eval_seq_len, "EVAL_STRIDE must be at most EVAL_SEQ_LEN"
        yield (
            cfg.eval_seq_len * cfg.eval_batch_seqs <= MAX_BATCH_TOKENS,
            f"EVAL_BATCH_SEQS times EVAL_SEQ_LEN must be at most {MAX_BATCH_TOKENS:,} tokens",
        )


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings(Part):
    """Learning from the validation text once it is scored (test-time training, TTT)."""

    title = "Adaptation"
    prefixes: ClassVar[tuple[str, ...]] = ("TTT_",)

    ttt_mode: str = scoring_knob(
        "off",
        ("off", "score_first", "lora", "train_then_score"),
        "Adapt to text that was scored, as a whole or document by document (lora); "
        "train_then_score trains first and is no legal score.",
    )
    ttt_lr: float = scoring_knob(0.002, (0.0, 1.0), "Learning rate of the adaptation (SGD).")
    ttt_momentum: float = scoring_knob(0.9, (0.0, 0.9999), "Momentum of the adaptation.")
    ttt_epochs: int = scoring_knob(3, (1, 1000), "Passes over the text that is adapted to.")
    ttt_chunk_tokens: int = scoring_knob(
        32768, (1, 1 << 30), "Targets that are scored before each adaptation."
    )
    ttt_batch_seqs: int = scoring_knob(32, (1, 1 << 16), "Rows of an adaptation step.")
    ttt_grad_clip: float = scoring_knob(
        1.0, (0.0, 1e6), "Largest norm of the adaptation's gradient; 0 sets no bound."
    )
    ttt_freeze_blocks: int = scoring_knob(2, (0, 64), "Number of first blocks that do not adapt.")

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Adaptation needs sliding windows, some layers that learn, and a batch that fits."""
        if cfg.ttt_mode in ("off", "lora"):
            return
        yield cfg.eval_stride > 0, "TTT_MODE needs sliding windows, not EVAL_STRIDE"
        yield (
            cfg.ttt_freeze_blocks < cfg.num_layers,
            "TTT_FREEZE_BLOCKS leaves none of NUM_LAYERS to adapt",
        )
        yield (
            cfg.eval_seq_len * cfg.ttt_batch_seqs <= MAX_BATCH_TOKENS,
            f"TTT_BATCH_SEQS times EVAL_SEQ_LEN must be at most {MAX_BATCH_TOKENS:,} tokens",
        )


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Part):
    """TTT_MODE=lora: each document has deltas of low rank that learn from what is scored of it."""

    title = "Adaptation by document"
    prefixes: ClassVar[tuple[str, ...]] = ("LORA_",)

    lora_rank: int = scoring_knob(80, (1, 1024), "Rank r of a delta.", absent=80)
    lora_alpha: float = scoring_knob(
        144.0, (0.0, 1e6), "A delta counts LORA_ALPHA / LORA_RANK times.", absent=144.0
    )
    lora_places: str = scoring_knob(
        "q,k,v,o,mlp,head",
        (),
        "Where a layer takes deltas (q, k, v, o, mlp), and the head, comma-separated.",
        absent="q,k,v,o,mlp,head",
        tries=("q,head",),
    )
    lora_lr: float = scoring_knob(1e-4, (0.0, 1.0), "Learning rate of AdamW.", absent=1e-4)
    lora_beta2: float = scoring_knob(
        0.99, (0.0, 0.99999), "Decay of AdamW's mean of squares; beta 1 is 0.", absent=0.99
    )
    lora_decay: float = scoring_knob(0.5, (0.0, 100.0), "Weight decay of AdamW.", absent=0.5)
    lora_chunk_tokens: int = scoring_knob(
        48, (1, 1 << 20), "Targets of a document that are scored before each step.", absent=48
    )
    lora_short_chunks: str = scoring_knob(
        "",
        (),
        "Chunks of batches without longer documents, such as 256:8,2000:24 (#2014).",
        absent="",
        tries=("256:8,2000:24",),
    )
    lora_batch_docs: int = scoring_knob(
        64, (1, 4096), "Documents of like length in step.", absent=64
    )
    lora_lanes: int = scoring_knob(
        8, (1, 256), "Queues of batches, each with deltas of its own; no more ranks work.", absent=8
    )
    lora_phases: int = scoring_knob(
        0,
        (0, 100),
        "How often all weights learn from the shortest documents that are scored.",
        absent=0,
    )
    lora_phase_docs: int = scoring_knob(
        2500, (1, 1 << 30), "Documents scored before the last of LORA_PHASES.", absent=2500
    )
    lora_phase_lr: float = scoring_knob(
        1e-3, (0.0, 1.0), "Learning rate of LORA_PHASES; TTT_MOMENTUM goes with it.", absent=1e-3
    )
    lora_phase_chunk_tokens: int = scoring_knob(
        32768, (2, 1 << 30), "Targets of a step of LORA_PHASES.", absent=32768
    )
    lora_phase_row_tokens: int = scoring_knob(
        0, (0, 1 << 20), "Tokens of a row there; 0 takes EVAL_SEQ_LEN.", absent=0
    )

    @property
    def delta_names(self) -> tuple[str, ...]:
        """LORA_PLACES one by one; or Refusal."""
        names = tuple(name.strip() for name in self.lora_places.split(","))
        if len(set(names)) < len(names) or not set(names) <= set(DELTA_NAMES):
            raise Refusal(
                f"LORA_PLACES={self.lora_places!r}: expected different ones of "
                f"{', '.join(DELTA_NAMES)}"
            )
        return names

    @property
    def short_chunks(self) -> dict[int, int]:
        """Chunks by the longest document of a batch, the shortest first; or Refusal."""
        pairs = [part.strip() for part in self.lora_short_chunks.split(",") if part.strip()]
        if not all(re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,5}", pair) for pair in pairs):
            raise Refusal(
                f"LORA_SHORT_CHUNKS={self.lora_short_chunks!r}: expected pairs of document and "
                "chunk length, such as 256:8,2000:24"
            )
        chunks = {int(longest): int(chunk) for longest, chunk in (p.split(":") for p in pairs)}
        return dict(sorted(chunks.items()))

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A chunk fits into a window, a row into a chunk, and the counts see the text in order."""
        assert cfg.delta_names  # or Refusal
        largest = max((cfg.lora_chunk_tokens, *cfg.short_chunks.values()))
        if cfg.ttt_mode != "lora":
            return
        yield (
            cfg.counts == "off",
            "TTT_MODE scores documents by their length, but COUNTS learn in the order of the text: "
            "one of them must be off",
        )
        yield (
            largest <= cfg.eval_seq_len,
            "LORA_CHUNK_TOKENS and LORA_SHORT_CHUNKS must be at most EVAL_SEQ_LEN",
        )
        yield (
            cfg.lora_batch_docs * cfg.eval_seq_len <= MAX_BATCH_TOKENS,
            f"LORA_BATCH_DOCS times EVAL_SEQ_LEN must be at most {MAX_BATCH_TOKENS:,} tokens",
        )
        yield (
            cfg.phase_row_tokens <= cfg.lora_phase_chunk_tokens,
            "LORA_PHASE_ROW_TOKENS (0: EVAL_SEQ_LEN) must be at most LORA_PHASE_CHUNK_TOKENS",
        )


DELTA_NAMES = ("q", "k", "v", "o", "mlp", "head")


@dataclass(frozen=True)
class EvalResult:
    """Sums over the scored targets, and what was scored."""

    name: str
    nats: float
    targets: int
    num_bytes: int
    seconds: float
    operations: int = 0  # counted, of scoring and of learning from what was scored

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets

    @property
    def bpb(self) -> float:
        """Bits per byte of the text."""
        return self.nats / (math.log(2) * self.num_bytes)


def windows(num_targets: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows over `num_targets` targets as rows (start, first scored, end): int64 (windows, 3).

    They start at 0, stride, 2 stride, ... and the last is anchored at the end. The first scores
    all its targets, each later one those that are not scored yet. Stride 0 gives chunks side by
    side instead, of which the last may be short.
    """
    starts: np.ndarray = np.arange(0, num_targets, stride or seq_len)
    if stride > 0:
        starts = np.unique(np.minimum(starts, max(num_targets - seq_len, 0)))
    ends = np.minimum(starts + seq_len, num_targets)
    firsts = np.append(0, ends[:-1])
    return np.stack([starts, firsts, ends], axis=1)


def window_batch(
    val: Validation,
    spans: np.ndarray,
    size: int,
    width: int,
    cfg: Config,
    hints: np.ndarray | None = None,
) -> Batch:
    """The windows `spans`, padded to `size` rows; of each the strip that holds what it scores.

    Places, targets, bytes and what is scored are (size, width). There are no places where the
    strip is the whole window. Padding scores nothing, and causality keeps it harmless.
    """
    T = cfg.eval_seq_len
    last = val.num_targets(cfg) - 1
    padded = np.pad(spans, ((0, size - len(spans)), (0, 0)))
    start, first, end = np.split(padded, 3, axis=1)
    places = np.minimum(first - start, T - width) + np.arange(width)
    scored = (start + places >= first) & (start + places < end)
    inputs = np.minimum(start + np.arange(T), last)
    targets = np.minimum(start + places, last)

    def ints(column: np.ndarray) -> Tensor:
        return torch.from_numpy(column.astype(np.int64))

    batch = Batch(
        input_ids=ints(val.tokens[inputs]),
        target_ids=ints(val.tokens[targets + 1]),
        places=None if width == T else ints(places),
        scored=ints(scored),
        target_bytes=ints(val.target_bytes[targets]),
        hint_ids=None if hints is None else ints(hints[targets]),
    )
    return batch.by_document(T) if cfg.attn_docs else batch


def in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows `size` at a time; the last batch may be short."""
    return np.array_split(rows, range(size, len(rows), size))


@torch.no_grad()
def score_windows(
    forward: Forward,
    model: GPT,
    val: Validation,
    spans: np.ndarray,
    width: int,
    run: Run,
    bar: tqdm,
    hints: np.ndarray | None = None,
) -> Tensor:
    """Nats, targets and bytes of the windows `spans`, added in the order of batches: (3,).

    hints: of each target of the text, see hints_in_order().
    """
    cfg = run.cfg
    batches = in_batches(strips_of(spans, width), cfg.eval_batch_seqs)
    sums = torch.zeros(len(batches), 3, dtype=torch.float64)
    for index in range(run.ranks.rank, len(batches), run.ranks.world_size):
        for rows in in_batches(batches[index], run.scored_rows):
            batch = window_batch(val, rows, run.scored_rows, width, cfg, hints)
            if hints is None:
                nats = forward(model, batch.moved(run.put))[0].cpu().double()
            else:
                scores = nats_and_scores(model, batch.moved(run.put), cfg.ngram_tilt)[1]
                nats = scores.cpu().double()
            scored, num_bytes = batch.scored, batch.target_bytes
            assert scored is not None and num_bytes is not None
            counted = [(x * scored).sum().double() for x in (nats, scored, num_bytes)]
            sums[index] += torch.stack(counted)
        bar.update(run.ranks.world_size)
    run.ranks.add_up([sums])
    return sums.sum(0)


@torch.no_grad()
def score_mixed(
    mixture: Mixture,
    model: GPT,
    val: Validation,
    spans: np.ndarray,
    width: int,
    run: Run,
    bar: tqdm,
) -> Tensor:
    """As score_windows(), by the mixture of the model's distributions and the counts'.

    Ranks share out the batches; the mixture sees all of them, in the order of the text, on every
    rank, since it learns from what was scored before.
    """
    cfg, ranks = run.cfg, run.ranks
    batches = in_batches(strips_of(spans, width), cfg.eval_batch_seqs)
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(batches), ranks.world_size):
        at_once = batches[first : first + ranks.world_size]
        own = None
        if ranks.rank < len(at_once):
            own = log_probabilities(model, val, at_once[ranks.rank], width, run)
        for owner, batch in enumerate(at_once):
            targets = int((batch[:, 2] - batch[:, 1]).sum())
            log_probs = ranks.copy_of(own, owner, (targets, cfg.vocab_size))
            start = int(batch[0, 1])
            num_bytes = val.target_bytes[start : start + targets].sum(dtype=np.int64)
            with run.ledger.table_clock.running():
                nats = mixture.score(log_probs).sum()
            sums += torch.stack([nats, torch.tensor(targets), torch.tensor(num_bytes)]).double()
            bar.update()
    # Where processors differ, rank 0's sums are those of all ranks.
    return torch.tensor([ranks.agree(x) for x in sums.tolist()], dtype=torch.float64)


def log_probabilities(
    model: GPT, val: Validation, strips: np.ndarray, width: int, run: Run
) -> Tensor:
    """The model's log-probabilities of what the strips score, in their order: float32 (n, V)."""
    rows = []
    for few in in_batches(strips, run.scored_rows):
        batch = window_batch(val, few, run.scored_rows, width, run.cfg).moved(run.put)
        assert batch.scored is not None
        hidden, input_ids = model.asked(batch)
        scored = batch.scored.bool()
        logits = model.logits(hidden[scored], input_ids[scored])
        rows.append(torch.log_softmax(logits, dim=-1).cpu())
    return torch.cat(rows)


def strips_of(spans: np.ndarray, width: int) -> np.ndarray:
    """Windows as strips of at most `width` targets: rows (start, first scored, end).

    Only a strip of a window meets the head; a window that scores more is shown again.
    """
    return np.array(
        [
            (start, at, min(at + width, end))
            for start, first, end in spans.tolist()
            for at in range(first, end, width)
        ]
    )


class Learner(Protocol):
    """What learns from validation text; evaluate() shows it only text that has been scored."""

    chunk_targets: int  # how many targets are scored before it learns from them
    operations: int  # counted, of its learning so far

    def learn_from(self, scored: ScoredChunk) -> None:
        """Learn from a chunk, all of whose targets have been scored."""


@dataclass(frozen=True)
class ScoredChunk:
    """A stretch of targets that has just been scored, and how the scoring stands."""

    number: int  # of this chunk, from 0
    num_chunks: int
    first: int  # its targets are first to end - 1
    end: int
    seconds: float  # since the scoring began

    @property
    def chunks_left(self) -> int:
        """Chunks that are still to be scored."""
        return self.num_chunks - self.number - 1


def evaluate(
    name: str,
    forward: Forward,
    model: GPT,
    val: Validation,
    run: Run,
    stride: int = 0,
    spans: np.ndarray | None = None,
    mixture: Mixture | None = None,
    learner: Learner | None = None,
    hints: np.ndarray | None = None,
) -> EvalResult:
    """Score the validation split in windows of EVAL_SEQ_LEN, chunks side by side at stride 0.

    The loop is the rule of a legal score: a chunk of targets is scored, by the model's
    distributions, their tilt to `hints` or their mixture with the counts', and only then may a
    learner learn from it. `spans` replaces the windows by others.
    """
    cfg = run.cfg
    started = time.perf_counter()
    num_targets = val.num_targets(cfg)
    if spans is None:
        spans = windows(num_targets, cfg.eval_seq_len, stride)
    size = num_targets if learner is None else learner.chunk_targets
    chunk_of = spans[:, 1] // size
    num_chunks = int(chunk_of[-1]) + 1
    sums = torch.zeros(3, dtype=torch.float64)
    num_batches = -(-len(spans) // cfg.eval_batch_seqs)
    width = stride or cfg.eval_seq_len
    operations = scoring_operations(model, spans, width, all_places=mixture is None)
    with run.folder.progress(name, total=num_batches, unit="batch") as bar:
        for chunk in range(num_chunks):
            of_chunk = spans[chunk_of == chunk]
            if len(of_chunk) == 0:  # a window may be longer than a chunk
                pass
            elif mixture is not None:
                sums += score_mixed(mixture, model, val, of_chunk, width, run, bar)
            else:
                sums += score_windows(forward, model, val, of_chunk, width, run, bar, hints)
            if learner is not None and chunk < num_chunks - 1:
                seconds = time.perf_counter() - started
                first, end = chunk * size, (chunk + 1) * size
                learner.learn_from(ScoredChunk(chunk, num_chunks, first, end, seconds))
    nats, targets, num_bytes = sums.tolist()
    if learner is not None:
        operations += learner.operations
    seconds = time.perf_counter() - started
    return EvalResult(name, nats, int(targets), int(num_bytes), seconds, operations)


class Adapter:
    """Test-time training by SGD on text that was scored, within the evaluation budget.

    A learner: after each chunk of TTT_CHUNK_TOKENS targets it passes TTT_EPOCHS times over them,
    at a rate that falls as a cosine over the chunks, unless scoring the rest needs the time.
    """

    def __init__(self, forward: Forward, model: GPT, val: Validation, run: Run) -> None:
        cfg = run.cfg
        self.forward = forward
        self.model = model
        self.val = val
        self.run = run
        self.chunk_targets = cfg.ttt_chunk_tokens
        self.seconds = 0.0  # spent on learning so far
        self.operations = 0
        frozen = frozen_parameters(model, cfg)
        self.parameters = [p for p in model.parameters() if p not in frozen]
        self.optimizer = torch.optim.SGD(self.parameters, lr=cfg.ttt_lr, momentum=cfg.ttt_momentum)
        run.ledger.occasions["ttt"] = 0  # a split of one chunk leaves it none

    def learn_from(self, scored: ScoredChunk) -> None:
        """Adapt to the chunk, if what is left of the budget then still holds the scoring."""
        cfg, run = self.run.cfg, self.run
        run.ledger.occasions["ttt"] += 1
        if run.ranks.agree(float(self.seconds_needed(scored) > cfg.eval_wallclock_seconds)):
            return
        progress = scored.number / max(scored.num_chunks - 1, 1)
        lr = cfg.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        started = time.perf_counter()
        for _ in range(cfg.ttt_epochs):
            self.learn(scored.first, scored.end, lr, math.inf)
        run.settle()
        self.seconds += time.perf_counter() - started
        run.ledger.activity["ttt"] += 1

    def seconds_needed(self, scored: ScoredChunk) -> float:
        """Seconds of the budget once this chunk is learned and all is scored, with a margin."""
        scoring_a_chunk = (scored.seconds - self.seconds) / (scored.number + 1)
        learning_a_chunk = self.seconds / max(self.run.ledger.activity["ttt"], 1)
        to_come = 1.1 * scoring_a_chunk * scored.chunks_left + 1.5 * learning_a_chunk
        return self.run.ledger.scoring_clock.elapsed() + to_come

    def learn(self, first: int, end: int, lr: float, deadline: float) -> int:
        """SGD on the targets first to end, begun before `deadline`; returns steps taken."""
        cfg, run = self.run.cfg, self.run
        T = cfg.eval_seq_len
        rows = windows(min(end, self.val.num_targets(cfg)) - first, T, 0) + first
        self.optimizer.param_groups[0]["lr"] = lr
        batches = in_batches(rows, cfg.ttt_batch_seqs)
        for steps, batch in enumerate(batches):
            if run.ranks.agree(float(run.ledger.scoring_clock.elapsed() > deadline)):
                return steps
            self.operations += adaptation_operations(self.model, len(batch))
            mine = batch[run.ranks.rank :: run.ranks.world_size]
            shown = window_batch(self.val, mine, run.adaptation_rows, T, cfg).moved(run.put)
            assert shown.scored is not None
            nats, _ = self.forward(self.model, shown)
            num_targets = float((batch[:, 2] - batch[:, 1]).sum())
            ((nats * shown.scored).sum() / num_targets).backward()
            reduce_gradients(self.parameters, [], run)
            if cfg.ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(self.parameters, cfg.ttt_grad_clip)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
        return len(batches)


def frozen_parameters(model: GPT, cfg: Config) -> set[nn.Parameter]:
    """The parameters that do not adapt."""
    frozen = set(model.blocks[: cfg.ttt_freeze_blocks].parameters())
    if cfg.ttt_mode == "train_then_score":
        for module in (model.tok_emb, model.bigram, model.smear):
            if module is not None:
                frozen.update(module.parameters())
    return frozen


# Adaptation by document


def documents_of(val: Validation, cfg: Config) -> np.ndarray:
    """Documents by their targets, as rows (first, end): from one BOS to the next, included."""
    num_targets = val.num_targets(cfg)
    begins = np.flatnonzero(val.tokens[:num_targets] == BOS)
    firsts = np.union1d(begins, [0]).astype(np.int64)
    return np.stack([firsts, np.append(firsts[1:], num_targets)], axis=1)


def document_queue(val: Validation, cfg: Config) -> list[np.ndarray]:
    """Batches of documents of like length, the longest first; in each, the shortest first."""
    documents = documents_of(val, cfg)
    lengths = documents[:, 1] - documents[:, 0]
    by_length = documents[np.argsort(lengths, kind="stable")]
    return in_batches(by_length, cfg.lora_batch_docs)[::-1]


def chunk_batch(
    val: Validation,
    documents: np.ndarray,
    at: int,
    width: int,
    cfg: Config,
    hints: np.ndarray | None,
) -> Batch:
    """Of each document the targets at to at + width - 1, in a window that ends with them.

    A window has up to EVAL_SEQ_LEN tokens of the document, from its row's start. Rows are padded;
    padding scores nothing, and causality keeps it harmless.
    """
    first, end = np.split(documents, 2, axis=1)
    asked = first + at
    stop = np.minimum(asked + width, end)
    start = np.maximum(stop - cfg.eval_seq_len, first)
    inputs = start + np.arange(int((stop - start).max()))
    targets = asked + np.arange(width)
    scored = targets < stop
    targets = np.minimum(targets, stop - 1)

    def ints(column: np.ndarray) -> Tensor:
        return torch.from_numpy(column.astype(np.int64))

    return Batch(
        input_ids=ints(np.where(inputs < stop, val.tokens[np.minimum(inputs, stop - 1)], 0)),
        target_ids=ints(val.tokens[targets + 1]),
        places=ints(targets - start),
        scored=ints(scored),
        target_bytes=ints(val.target_bytes[targets]),
        hint_ids=None if hints is None else ints(hints[targets]),
    )


class DocumentDeltas:
    """Deltas alpha / r B A for the documents of a batch, and the AdamW that trains them.

    A is uniform in +-1 / sqrt(width), B zero: a document begins with the network as it is.
    """

    def __init__(
        self, cfg: Config, rows: int, depth: int, generator: torch.Generator, device: torch.device
    ) -> None:
        self.cfg = cfg
        self.rows = rows
        width, kv_width = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        outputs = {"k": kv_width, "v": kv_width, "head": cfg.vocab_size}
        of_layers = [name for name in cfg.delta_names if name != "head"]

        def drawn(name: str) -> Delta:
            """A drawn, B zero."""
            down = torch.rand(rows, cfg.lora_rank, width, generator=generator)
            down = (2.0 * down - 1.0) / math.sqrt(width)
            up = torch.zeros(rows, outputs.get(name, width), cfg.lora_rank)
            return down.to(device).requires_grad_(), up.to(device).requires_grad_()

        self.layers = [{name: drawn(name) for name in of_layers} for _ in range(depth)]
        self.head = drawn("head") if "head" in cfg.delta_names else None
        self.restart()

    def pairs(self) -> list[Delta]:
        """All deltas (A, B)."""
        of_layers = [delta for deltas in self.layers for delta in deltas.values()]
        return of_layers if self.head is None else [*of_layers, self.head]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin new documents: B is zero and AdamW remembers nothing, but A is kept."""
        for _, up in self.pairs():
            up.zero_()
        self.optimizer = torch.optim.AdamW(
            [matrix for delta in self.pairs() for matrix in delta],
            lr=self.cfg.lora_lr,
            betas=(0.0, self.cfg.lora_beta2),
            eps=1e-10,
            weight_decay=self.cfg.lora_decay,
        )

    def of_rows(self, first: int, end: int, dtype: torch.dtype) -> Adapters:
        """The deltas of some of the batch's documents, as the network takes them."""
        scale = self.cfg.lora_alpha / self.cfg.lora_rank

        def given(delta: Delta) -> Delta:
            """The rows of one delta, scaled."""
            down, up = delta
            return down[first:end].to(dtype), (scale * up[first:end]).to(dtype)

        layers = [{name: given(delta) for name, delta in own.items()} for own in self.layers]
        return Adapters(tuple(layers), None if self.head is None else given(self.head))

    def learn(self, loss: Tensor) -> None:
        """A step down the gradient of the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class DocumentScorer:
    """Scores documents, each with deltas of its own that learn from what is scored of it.

    Documents of like length go in step. One forward scores a chunk of each and gives the gradient
    of an AdamW step, unless the chunk is its document's last. When the rest of the budget just
    holds the scoring of what is left, that goes on in wide chunks, without learning.
    (parameter-golf #1855)
    """

    def __init__(
        self, forward: Forward, model: GPT, val: Validation, run: Run, hints: np.ndarray | None
    ) -> None:
        self.forward = forward
        self.model = model
        self.val = val
        self.run = run
        self.hints = hints
        self.phase = 0
        self.lanes: dict[int, DocumentDeltas] = {}
        self.generators: dict[int, torch.Generator] = {}
        self.is_late = False  # whether the budget holds no more learning
        self.targets_left = 0  # of this rank
        self.seconds_a_place = 0.0  # of a forward in wide chunks
        self.learning_seconds = 0.0  # of the longest step
        self.cut_short = 0  # documents that learned less than they could
        run.ledger.occasions["ttt"] = 0

    def measure(self, documents: np.ndarray) -> None:
        """Find what scoring in wide chunks takes, on the last of these documents."""
        cfg, run = self.run.cfg, self.run
        few = documents[-run.scored_rows :]
        batch = chunk_batch(self.val, few, 0, cfg.eval_seq_len, cfg, None).moved(run.put)
        seconds = timed(lambda: nats_and_scores(self.model, batch, 0.0)[1].sum().item(), run)
        self.seconds_a_place = seconds / batch.input_ids.numel()

    def deltas_for(self, lane: int, rows: int) -> DocumentDeltas:
        """The lane's deltas for a new batch: its last ones, if the batch has as many rows."""
        if lane not in self.generators:
            seed = self.phase * self.run.cfg.lora_lanes + lane
            self.generators[lane] = torch.Generator().manual_seed(seed)
        if lane in self.lanes and self.lanes[lane].rows == rows:
            self.lanes[lane].restart()
        else:
            depth, device = len(self.model.plan), self.run.device
            generator = self.generators[lane]
            self.lanes[lane] = DocumentDeltas(self.run.cfg, rows, depth, generator, device)
        return self.lanes[lane]

    def score(self, documents: np.ndarray, lane: int) -> Tensor:
        """Score a batch of documents, the shortest first: nats, targets and bytes (3,)."""
        cfg = self.run.cfg
        lengths = documents[:, 1] - documents[:, 0]
        longest = int(lengths[-1])
        chunk = next(
            (chunk for most, chunk in cfg.short_chunks.items() if longest <= most),
            cfg.lora_chunk_tokens,
        )
        self.run.ledger.occasions["ttt"] += (longest - 1) // chunk
        sums = torch.zeros(3, dtype=torch.float64)
        deltas = None if self.is_late else self.deltas_for(lane, len(documents))
        at = 0
        while deltas is not None and at < longest and not self.is_late:
            first = int((lengths <= at).sum())
            sums += self.score_and_learn(documents, first, at, chunk, deltas)
            at += chunk
        if at < longest:
            self.cut_short += int((lengths > max(at, chunk)).sum())
        while at < longest:
            width = cfg.eval_seq_len if at == 0 else -(-cfg.eval_seq_len // 2)
            for few in in_batches(np.flatnonzero(lengths > at), self.run.scored_rows):
                rows = int(few[0]), int(few[-1]) + 1
                sums += self.score_chunk(documents[slice(*rows)], at, width, deltas, rows)[0]
            at += width
        return sums

    def score_chunk(
        self,
        documents: np.ndarray,
        at: int,
        width: int,
        deltas: DocumentDeltas | None,
        rows: tuple[int, int],
        learns: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Nats, targets and bytes (3,) of a chunk of each document, and its nats, to learn from.

        rows: where the documents stand in the batch to which the deltas belong, from and to.
        """
        cfg, run = self.run.cfg, self.run
        batch = chunk_batch(self.val, documents, at, width, cfg, self.hints)
        with torch.set_grad_enabled(learns):
            adapters = None if deltas is None else deltas.of_rows(*rows, self.model.dtype)
            nats, scores = nats_and_scores(
                self.model, batch.moved(run.put), cfg.ngram_tilt, adapters
            )
        scored, num_bytes = batch.scored, batch.target_bytes
        assert scored is not None and num_bytes is not None
        counted = [(x * scored).sum().double() for x in (scores.cpu().double(), scored, num_bytes)]
        self.targets_left -= int(scored.sum())
        return torch.stack(counted), nats

    def score_and_learn(
        self, documents: np.ndarray, first: int, at: int, chunk: int, deltas: DocumentDeltas
    ) -> Tensor:
        """Score a chunk of the documents from the first on, then learn of those that go on: (3,).

        A chunk's score is final before its nats are learned from.
        """
        run = self.run
        documents = documents[first:]
        goes_on = torch.from_numpy(documents[:, 1] - documents[:, 0] > at + chunk)
        learns = bool(goes_on.any())
        rows = first, first + len(documents)
        sums, nats = self.score_chunk(documents, at, chunk, deltas, rows, learns)
        self.is_late = self.seconds_needed() > run.cfg.eval_wallclock_seconds
        if learns and not self.is_late:
            started = time.perf_counter()
            deltas.learn((nats * run.put(goes_on)[:, None]).sum() / chunk)
            run.settle()
            self.learning_seconds = max(self.learning_seconds, time.perf_counter() - started)
            run.ledger.activity["ttt"] += 1
        return sums

    def seconds_needed(self) -> float:
        """Seconds of the budget if one more step is learned and the rest is scored, with a margin.

        A target takes two places at most, as wide chunks advance by half a window.
        """
        scoring = 1.2 * 2 * self.seconds_a_place * self.targets_left
        to_come = self.learning_seconds + scoring
        return self.run.ledger.scoring_clock.elapsed() + to_come

    def learn_together(self, documents: np.ndarray) -> None:
        """SGD of all weights on documents that are scored, as training sees text; a new phase.

        Their tokens are laid end to end and cut into chunks, of which the last is left out; each
        chunk is a step, at a rate that falls as a cosine. (phased global SGD, parameter-golf #1855)
        """
        cfg, run, model = self.run.cfg, self.run, self.model
        shown = [self.val.tokens[first : end + 1] for first, end in documents]
        tokens = torch.from_numpy(np.concatenate(shown).astype(np.int64))
        chunk, T = cfg.lora_phase_chunk_tokens, cfg.phase_row_tokens
        steps = -(-(len(tokens) - 1) // chunk) - 1
        used = chunk - chunk % T
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=cfg.lora_phase_lr, momentum=cfg.ttt_momentum)
        run.ledger.occasions["ttt_phases"] += steps
        for step in range(steps):
            late = self.seconds_needed() > cfg.eval_wallclock_seconds
            if run.ranks.any_of(self.is_late or late):
                break
            rate = cfg.lora_phase_lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
            ids = tokens[step * chunk : step * chunk + used + 1]
            own = slice(run.ranks.rank, None, run.ranks.world_size)
            rows = ids[:-1].view(-1, T)[own], ids[1:].view(-1, T)[own]
            self.add_gradients(*rows, used)
            reduce_gradients(parameters, [], run)
            if cfg.ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, cfg.ttt_grad_clip)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            run.ledger.activity["ttt_phases"] += 1
        self.phase += 1
        self.lanes.clear()
        self.generators.clear()

    def add_gradients(self, inputs: Tensor, targets: Tensor, num_targets: int) -> None:
        """Gradients of the mean nats of a chunk, of this rank's rows (n, T), which may be none."""
        cfg, run = self.run.cfg, self.run
        if len(inputs) == 0:
            return
        at_once = max(1, run.scored_rows * cfg.eval_seq_len // cfg.phase_row_tokens)
        for few, asked in zip(inputs.split(at_once), targets.split(at_once), strict=True):
            batch = Batch(few, asked)
            if cfg.attn_docs:
                batch = batch.by_document(cfg.eval_seq_len)
            nats, _ = self.forward(self.model, batch.moved(run.put))
            (nats.sum() / num_targets).backward()


@contextlib.contextmanager
def at_rest(model: GPT, row_length: int) -> Iterator[None]:
    """Weights that have no gradient, and positions of rows of this length, which may be cut."""
    model.requires_grad_(False)
    model.row_place = (0, row_length)
    try:
        yield
    finally:
        model.row_place = None
        model.requires_grad_(True)


def evaluate_documents(
    name: str, forward: Forward, model: GPT, val: Validation, run: Run
) -> EvalResult:
    """Score the validation split document by document, each of which adapts to itself.

    Batches go to LORA_LANES lanes in the order of the queue, and a lane to the rank that its number
    says, so that what a document finds depends on the text alone. No hint comes from a document
    that is scored later.
    """
    cfg, ranks = run.cfg, run.ranks
    started = time.perf_counter()
    queue = document_queue(val, cfg)
    order = np.concatenate([np.arange(first, end) for batch in queue for first, end in batch])
    scorer = DocumentScorer(forward, model, val, run, hints_in_order(val, order, run))
    lanes, num_documents = cfg.lora_lanes, sum(map(len, queue))
    lengths = [int((batch[:, 1] - batch[:, 0]).sum()) for batch in queue]
    owned = [n for n in range(len(queue)) if n % lanes % ranks.world_size == ranks.rank]
    scorer.targets_left = sum(lengths[n] for n in owned)
    last = min(cfg.lora_phase_docs, num_documents)
    phases = [last * (n + 1) // cfg.lora_phases for n in range(cfg.lora_phases)]
    sums = torch.zeros(len(queue), 3, dtype=torch.float64)
    with at_rest(model, cfg.eval_seq_len):
        scorer.measure(queue[0])
    with run.folder.progress(name, total=len(order), unit="target") as bar:
        for first in range(0, len(queue), lanes):
            end = min(first + lanes, len(queue))
            with at_rest(model, cfg.eval_seq_len):
                for number in range(first, end):
                    if number in owned:
                        sums[number] = scorer.score(queue[number], number - first)
            scorer.is_late = ranks.any_of(scorer.is_late)
            bar.update(sum(lengths[first:end]))
            scored = np.concatenate(queue[:end][::-1])
            if phases and len(scored) >= phases[0] and end < len(queue):
                scorer.learn_together(scored[: phases.pop(0)])
    cut_short = torch.tensor(float(scorer.cut_short), dtype=torch.float64)
    ranks.add_up([sums, cut_short])
    if cut_short:
        run.folder.log(
            f"warning: {int(cut_short)} of {num_documents} documents were adapted to less than "
            f"TTT_MODE=lora asks, to keep EVAL_WALLCLOCK_SECONDS={cfg.eval_wallclock_seconds:g}"
        )
    nats, targets, num_bytes = sums.sum(0).tolist()
    return EvalResult(name, nats, int(targets), int(num_bytes), time.perf_counter() - started)


def report(label: str, result: EvalResult, run: Run, step: int = 0, legal: bool = True) -> None:
    """Log a score under what was scored; raises FloatingPointError if it is not finite."""
    if not math.isfinite(result.nats):
        raise FloatingPointError(f"{result.name}: the loss is {result.nats}")
    run.folder.log(
        "{label} val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f} name:{name} targets:{targets} "
        "bytes:{num_bytes} eval_time:{ms:.0f}ms",
        "eval",
        label=label,
        name=result.name,
        step=step,
        val_loss=result.loss,
        val_bpb=result.bpb,
        targets=result.targets,
        num_bytes=result.num_bytes,
        ms=1e3 * result.seconds,
        legal=legal,
    )


class ArtifactScores:
    """The scores of the model rebuilt from an artifact, each logged under what was scored.

    The settings of `run` are those of the artifact.
    """

    def __init__(
        self, stored: dict[str, Stored], val: Validation, forward: Forward, run: Run
    ) -> None:
        self.stored = stored
        self.val = val
        self.forward = forward
        self.model = rebuild_model(run.cfg, stored, run)
        if run.cfg.token_mask != "0":
            mask_tokens(self.model, val, run.device)
        self.run = run.with_settings(run.cfg.for_scoring())
        self.label = grid_label(self.model, stored)
        self.results: list[EvalResult] = []

    def keep(self, result: EvalResult, tag: str, legal: bool = True) -> EvalResult:
        """A score, logged and kept."""
        report(tag, result, self.run, legal=legal)
        self.results.append(result)
        return result

    def score(self, name: str, tag: str, *, legal: bool = True, **how: Any) -> EvalResult:
        """One evaluation in windows, logged and kept."""
        result = evaluate(name, self.forward, self.model, self.val, self.run, **how)
        return self.keep(result, tag, legal)

    def in_chunks(self, **how: Any) -> EvalResult:
        """The score in chunks side by side."""
        return self.score("artifact_chunked", f"final_{self.label}_roundtrip_exact", **how)

    def diagnostics(self) -> None:
        """Scores beside the headline: in chunks, in published windows, without each addition."""
        cfg, label, stride = self.run.cfg, self.label, self.run.cfg.eval_stride
        if stride == 0:
            return
        self.in_chunks()
        if cfg.sliding != "cover":
            num_targets = self.val.num_targets(cfg)
            spans = published_windows(num_targets, cfg.eval_seq_len, stride, cfg.sliding)
            name = f"{label}_{cfg.sliding}"
            self.score(f"artifact_{cfg.sliding}", f"final_{name}", stride=stride, spans=spans)
        without = {
            "no_ttt": cfg.ttt_mode in ("score_first", "lora"),
            "no_counts": cfg.counts != "off",
            "no_tilt": cfg.ngram_tilt > 0 and cfg.ttt_mode != "lora",
        }
        for name, differs in without.items():
            if differs:
                self.score(f"artifact_sliding_{name}", f"final_{label}_{name}", stride=stride)

    def headline(self) -> EvalResult:
        """The score by which runs are compared, with all that the settings add."""
        cfg, val, run = self.run.cfg, self.val, self.run
        if cfg.ttt_mode == "lora":
            name = "artifact_documents"
            by_document = evaluate_documents(name, self.forward, self.model, val, run)
            return self.keep(by_document, "legal_ttt_exact")
        hints = hints_in_order(val, None, run)
        if cfg.eval_stride == 0:
            return self.in_chunks(hints=hints)
        mixture = make_mixture(self.stored, val, run)
        learner = None
        tag = f"final_{self.label}_sliding_window_exact"
        if cfg.ttt_mode == "score_first":
            learner = Adapter(self.forward, self.model, val, run)
            tag = "legal_ttt_exact"
        return self.score(
            "artifact_sliding",
            tag,
            stride=cfg.eval_stride,
            mixture=mixture,
            learner=learner,
            hints=hints,
        )

    def after_training_on_it(self, scoring_seconds: float) -> None:
        """The score that is not legal: the model learns from the text before it is asked."""
        train_then_score(Adapter(self.forward, self.model, self.val, self.run), scoring_seconds)
        name = "artifact_sliding_train_then_score"
        self.score(name, "illegal_ttt", stride=self.run.cfg.eval_stride, legal=False)


def score_artifact(
    stored: dict[str, Stored], val: Validation, forward: Forward, run: Run, diagnostics: bool
) -> list[EvalResult]:
    """Score the model of an artifact; the last score is the headline, which is timed."""
    scores = ArtifactScores(stored, val, forward, run)
    cfg, ledger = scores.run.cfg, run.ledger
    if diagnostics:
        scores.diagnostics()
    with ledger.scoring_clock.running():
        headline = scores.headline()
        if diagnostics and cfg.ttt_mode == "train_then_score":
            scores.after_training_on_it(headline.seconds)
    ledger.scoring_operations = headline.operations
    seconds, budget = ledger.scoring_clock.elapsed(), cfg.eval_wallclock_seconds
    if seconds > budget:
        ledger.mark_ineligible(f"scoring took {seconds:.0f} s, EVAL_WALLCLOCK_SECONDS={budget:.0f}")
    scores.results.remove(headline)
    return [*scores.results, headline]


def make_mixture(stored: dict[str, Stored], val: Validation, run: Run) -> Mixture | None:
    """The counts of an artifact, ready to score the split; None if COUNTS is off."""
    cfg = run.cfg
    if cfg.counts == "off":
        return None
    started = time.perf_counter()
    training_text = np.empty(0, np.uint16)
    if cfg.counts_training_text:
        training_text = text_of_artifact(stored, cfg)
    scored_text = val.tokens[: val.num_targets(cfg) + 1]
    with run.ledger.table_clock.running():
        mixture = Mixture(cfg, training_text, scored_text, cfg.vocab_size)
    run.folder.log(
        "counts:ready mode:{mode} training_tokens:{training_tokens} seconds:{seconds:.1f}",
        "counts",
        mode=cfg.counts,
        training_tokens=len(training_text),
        seconds=time.perf_counter() - started,
    )
    return mixture


def announce_scoring(batch_seconds: float, val: Validation, run: Run) -> None:
    """Warn before scoring starts if the measured speed says that it will pass its budget."""
    cfg, budget = run.cfg, run.cfg.eval_wallclock_seconds
    num_windows = len(windows(val.num_targets(cfg), cfg.eval_seq_len, cfg.eval_stride))
    seconds = batch_seconds * math.ceil(num_windows / (cfg.eval_batch_seqs * run.ranks.world_size))
    run.folder.log(f"scoring expected:{seconds:.0f}s budget:{budget:.0f}s")
    if seconds > budget:
        run.folder.log(
            "warning: scoring will pass EVAL_WALLCLOCK_SECONDS; it runs to the end all the "
            "same, and the run will not be eligible as a record"
        )


# =================================================================================================
# Sampling
# Text that the model of an artifact draws itself, token by token, through the same forward that
# is trained and scored. Keys and values of earlier positions are kept by the attention kernel.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Part):
    """How --sample draws; SEED makes it repeat."""

    title = "Sampling"
    prefixes: ClassVar[tuple[str, ...]] = ("SAMPLE_",)

    sample_tokens: int = run_knob(256, (1, 1 << 20), "Tokens that --sample draws at most.")
    sample_temperature: float = run_knob(
        0.8, (0.0, 100.0), "Temperature of the draw; 0 always takes the likeliest token."
    )
    sample_top_p: float = run_knob(
        0.95, (0.0, 1.0), "Draw from the likeliest tokens that have this probability together."
    )


# Tokens before a new one that its input depends on: SmearGate takes in the one before, whose
# BigramHash takes in one more.
LOOKS_BACK = 2


class CachedAttention:
    """A causal attention kernel that keeps keys and values of a row's earlier positions.

    It is asked by one execution of a layer after the other, in the same order in every forward.
    Of each forward only the last `new` positions are new, and only their outputs mean something.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys and values (1, t, G, K), by execution
        self.execution = 0
        self.new = 0

    def begin(self, new: int, forget: bool = False) -> None:
        """Before a forward with `new` new positions; the first of a row forgets what was kept."""
        self.execution = 0
        self.new = new
        if forget:
            self.kept = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, T, H, K), k and v (1, T, G, K) -> (1, T, H, K)."""
        if self.execution == len(self.kept):  # the first forward of a row
            self.kept.append((k, v))
            self.execution += 1
            return sdpa_attention(q, k, v)
        earlier_k, earlier_v = self.kept[self.execution]
        keys = torch.cat([earlier_k, k[:, -self.new :]], dim=1)
        values = torch.cat([earlier_v, v[:, -self.new :]], dim=1)
        self.kept[self.execution] = keys, values
        self.execution += 1
        groups = q.size(2) // k.size(2)
        query = q[:, -self.new :].transpose(1, 2)
        keys, values = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (keys, values))
        # One new position may see all that is kept: no mask.
        y = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)
        return torch.cat([torch.zeros_like(q[:, : -self.new]), y], dim=1)


@torch.no_grad()
def draw_tokens(
    model: GPT, cache: CachedAttention, ids: list[int], cfg: Config, device: torch.device
) -> Iterator[int]:
    """Tokens that the model draws after `ids`, up to and without the next BOS or SAMPLE_TOKENS.

    A row is EVAL_SEQ_LEN tokens at most; a full one goes on with its second half.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    T = cfg.eval_seq_len
    row = ids[-(T - 1) :]
    begins = True
    for _ in range(cfg.sample_tokens):
        shown = row if begins else row[-1 - LOOKS_BACK :]
        cache.begin(new=len(row) if begins else 1, forget=begins)
        model.row_place = (len(row) - len(shown), T)
        input_ids = torch.tensor([shown], device=device)
        last = model.hidden(input_ids)[:, -1:]
        logits = model.logits(last, input_ids[:, -1:])[0, 0].cpu()
        token = draw(logits, cfg.sample_temperature, cfg.sample_top_p, generator)
        if token == BOS:
            return
        yield token
        begins = len(row) == T - 1
        row = [*row[T // 2 :], token] if begins else [*row, token]


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits (V,), of the likeliest ones that have `top_p` together."""
    if temperature == 0:
        return int(logits.argmax())
    shares, tokens = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    is_beyond = shares.cumsum(0) - shares >= top_p
    is_beyond[0] = False
    shares = shares.masked_fill(is_beyond, 0.0)
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])


def stream_text(
    tokenizer: sentencepiece.SentencePieceProcessor, prompt: list[int], drawn: Iterator[int]
) -> None:
    """Write the prompt and the drawn tokens to the console as soon as they are text."""
    ids = list(prompt)
    text = decode_text(tokenizer, ids)
    write_text(text)
    for token in drawn:
        ids.append(token)
        longer = decode_text(tokenizer, ids)
        if longer.endswith("\ufffd"):  # the first bytes of a character
            continue
        write_text(longer[len(text) :])
        text = longer
    write_text("\n")


def write_text(text: str) -> None:
    """Write to stdout at once, whatever its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


# =================================================================================================
# Faster on a CPU
# Functions with a derivative of their own, in fewer passes over memory than torch takes on a CPU.
# Each says which plain expression it stands for; a GPU's compiler fuses that itself.
# =================================================================================================


class RmsNorm(torch.autograd.Function):
    """rms_norm in half the passes that torch takes on a CPU, of which it makes separate ones."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float | Tensor) -> Tensor:
        """y = scale r x, r = 1 / sqrt(mean(x^2) + eps): (..., D) -> (..., D)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = torch.rsqrt(norm.square() / x.size(-1) + RMS_EPS)
        ctx.save_for_backward(x, r)
        ctx.scale = scale
        return x * (scale * r)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """scale r (g - r^2 mean(g x) x)."""
        x, r = ctx.saved_tensors
        along = (grad * x).sum(-1, keepdim=True) * r.square() / x.size(-1)
        return torch.addcmul(grad, along, x, value=-1).mul_(ctx.scale * r), None


class SquaredLeaky(torch.autograd.Function):
    """leaky_relu(u)^2 in fewer passes on a CPU, and with one tensor kept for the backward."""

    @staticmethod
    def forward(ctx, u: Tensor, slope: float) -> Tensor:
        """h = leaky_relu(u), h^2: any shape."""
        h = F.leaky_relu(u, slope)
        ctx.save_for_backward(h)
        ctx.slope = slope
        return h * h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """2 h leaky_relu'(u) g, where h leaky_relu'(u) is leaky_relu(h)."""
        (h,) = ctx.saved_tensors
        return F.leaky_relu(h, ctx.slope).mul_(grad).mul_(2.0), None


class HeadNats(torch.autograd.Function):
    """Nats of the targets at capped logits, and their weights; it keeps one matrix (B*T, V).

    That is the derivative of each target's nats by its row of logits before the cap, found while
    the row is in the processor's cache. What multiplies it in the loss is known only in the
    backward, and multiplies rows of width D there instead of V.
    """

    ROWS = 128  # of logits, at a time

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        cap: float,
        gamma: Tensor | None,
        clamp_min: float,
        input_ids: Tensor,
        penalty: Tensor | None,
        prefixes: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of hidden (B, T, D), head (V, D), targets and inputs (B, T): what GPT.forward gives.

        penalty: the token mask (V, V), or None without it.
        prefixes: what GPT.prefix_targets() gives, second targets (B, T) and their weights (B, T).
        """
        shape = targets.shape
        hidden = hidden.flatten(0, 1)
        pull = hidden.new_empty(len(hidden), len(head))  # that derivative
        nats, weights = [], []
        columns = [hidden, targets.reshape(-1, 1), input_ids.flatten(), pull]
        columns += [column.reshape(-1, 1) for column in prefixes or ()]
        blocks = zip(*(column.split(HeadNats.ROWS) for column in columns), strict=True)
        # Rows of `pull` hold tanh(z / cap) first, here `bent`, and the derivative at the end.
        for own, at, before, bent, *second in blocks:
            torch.mm(own, head.t(), out=bent).div_(cap).tanh_()
            logits = cap * bent
            if penalty is not None:
                logits += penalty.index_select(0, before)
            weights.append(mile_weights(logits, gamma, clamp_min))
            if second:
                other, share = second
                # By how many nats the second target is less likely than the first.
                farther = logits.gather(1, at) - logits.gather(1, other)
            own_nats, p = nats_and_shares(logits, at, penalty is not None)
            excess = p
            if second:
                own_nats = own_nats + share * (own_nats + farther)
                excess = p.mul_(1.0 + share).scatter_add_(1, other, -share)
            nats.append(own_nats)
            excess.scatter_add_(1, at, p.new_full(at.shape, -1.0))
            bent.square_().neg_().add_(1.0).mul_(excess)  # (1 - tanh^2) (p - [target])
        ctx.save_for_backward(hidden, head, pull)
        of_loss = torch.cat(weights).view(shape)
        ctx.mark_non_differentiable(of_loss)
        return torch.cat(nats).view(shape), of_loss

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Of hidden and head, the only inputs that have one."""
        hidden, head, pull = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, 1)
        of_hidden = (grad * (pull @ head)).view(*shape, -1)
        of_head = pull.t() @ (grad * hidden)
        return of_hidden, of_head, *[None] * 7


LOG2_E = math.log2(math.e)


def nats_and_shares(logits: Tensor, targets: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """Nats of the targets (n, 1), and the softmax of the logits (n, V), which are lost."""
    if masked:
        log_shares = torch.log_softmax(logits, -1)
        nats = -log_shares.gather(1, targets)
        # On a CPU exp() takes ten times as long where it gives 0; exp2() does not.
        return nats, log_shares.mul_(LOG2_E).exp2_()
    total = logits.logsumexp(-1, keepdim=True)
    nats = total - logits.gather(1, targets)
    return nats, logits.sub_(total).exp_()


# =================================================================================================
# Published variants
# What only a published system needs to be reproduced, and names that its command lines use.
# Nothing here is recommended; a reader of the main path may leave the section out.
# =================================================================================================


def gptq_simple(W: Tensor, H: Tensor, bits: int, cfg: Config, sigmas: float = 0.0) -> Stored:
    """The GPTQ of #1361: it never updates the inverse of H, and so corrects too much.

    It rounds by scales that are not yet fp16, and chooses the clip by nearest rounding.
    """
    levels = largest_integer(bits)
    U = inverse_factor(H)
    inverse = U.mT @ U
    scales = clip_candidates(W, bits, cfg, sigmas)
    step = scales.unsqueeze(-1)
    tops = torch.full((W.size(1),), float(levels))
    Q = feed_back(W, step, inverse / inverse.diagonal()[:, None], tops, cfg)
    error = W - torch.round(W / step).clamp(-levels, levels) * step
    return pick(error.square().mean(dim=2), Q, scales.half(), cfg)


def decayed_rate(rate: float, decay: float) -> float:
    """Muon's rate under MUON_WD_ORDER=after: decay that follows the step decays the step too."""
    return rate * decay


def published_windows(num_targets: int, seq_len: int, stride: int, form: str) -> np.ndarray:
    """Windows of published systems, like those of windows(): int64 (windows, 3).

    published_s1 has a window for every stride, of which the last are short, published_s3 full
    windows only. Each scores its last `stride` targets, the first all of its.
    """
    starts: np.ndarray = np.arange(0, num_targets, stride)
    if form == "published_s3":
        starts = np.unique(np.minimum(starts, max(num_targets - seq_len, 0)))
    ends = np.minimum(starts + seq_len, num_targets)
    firsts = np.append(0, np.maximum(ends - stride, starts)[1:])
    return np.stack([starts, firsts, ends], axis=1)


def train_then_score(adapter: Adapter, scoring_seconds: float) -> None:
    """Train on the whole split, of which `scoring_seconds` of the budget are then scored again.

    This is no legal evaluation: the model has seen what it is asked.
    """
    cfg, run = adapter.run.cfg, adapter.run
    end = adapter.val.num_targets(cfg)
    deadline = cfg.eval_wallclock_seconds - 1.1 * scoring_seconds
    steps_an_epoch = -(-end // (cfg.eval_seq_len * cfg.ttt_batch_seqs))
    run.ledger.occasions["ttt"] = cfg.ttt_epochs * steps_an_epoch
    for _ in range(cfg.ttt_epochs):
        run.ledger.activity["ttt"] += adapter.learn(0, end, cfg.ttt_lr, deadline)
    run.folder.log(
        "warning: no legal score follows: the model has trained on the text before scoring it"
    )


# Published names of settings we call otherwise: (our name, {published value: ours}), where no
# table of values means that the value carries over as it is.
ALIASES: dict[str, tuple[str, dict[str, str | None] | None]] = {
    "BACKOUT_LAMBDA_INIT": ("BACKOUT_INIT", None),
    "MUON_NS_STEPS": ("MUON_BACKEND_STEPS", None),
    "MUON_ROW_NORMALIZE": ("MUON_ROW_NORM", None),
    "QAT_THRESHOLD": ("LATE_QAT_THRESHOLD", None),
    "SWA_INTERVAL": ("SWA_EVERY", None),
    "SWA_PCT": ("SWA_START_FRAC", None),
    **{
        alias: (name, {"0": off, "1": on})
        for alias, name, off, on in (
            ("BACKOUT_ENABLED", "BACKOUT_MODE", "none", "mid"),
            ("VRL", "VRL_MODE", "off", "add"),
            ("EMA_ENABLED", "AVG_MODE", "none", "ema"),
            ("SWA_ENABLED", "AVG_MODE", None, "swa"),
            ("LATE_QAT", "QAT_MODE", "off", "late"),
            ("QAT_ENABLED", "QAT_MODE", "off", "always"),
            ("NO_COMPILE", "COMPILE", "auto", "0"),
            ("TORCH_COMPILE_DISABLE", "COMPILE", "auto", "0"),
            ("NO_FA3", "ATTENTION", "auto", "sdpa"),
            ("USE_GPTQ", "GPTQ_VARIANT", "off", "full"),
            ("TTT_ENABLED", "TTT_MODE", "off", "score_first"),
            ("VALUE_RESIDUAL", "VRL_MODE", "off", "mix"),
        )
    },
}

# Published names of techniques that are not here: the values at which they are off. None marks
# a name that has no effect on anything here, whatever its value.
RETIRED: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(
        (
            "DTG_ENABLED",
            "GATED_ATTENTION",
            "LATE_K_FP16",
            "LAWA_ENABLED",
            "MTP_NUM_HEADS",
            "TARGET_MB",
        ),
        ("0",),
    ),
    **dict.fromkeys(
        (
            "GPTQ_CALIB_SAMPLES",
            "GPTQ_RESERVE_MS",
            "LAWA_FREQ",
            "LAWA_K",
            "MTP_LOSS_WEIGHT",
            "MUON_BETA2",
            "VAL_BATCH_SIZE",
        )
    ),
    **dict.fromkeys(
        (
            "CONTROL_TENSOR_NAME_PATTERNS",
            "FP16_KEEP_NAME_PATTERNS",
            "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS",
        ),
        ("",),
    ),
    "ADAM_EPS": ("1e-8", "1e-08"),
    "BETA1": ("0.9",),
    "TARGET_BYTES": ("0",),
    "MUON_QUANT_BLOCK_SIZE": ("256",),
    "QAT_CLIP_PCT": ("0.9995",),
    "Q_SYMMETRIC": ("1",),
    "AUX_PROJ_MUP": ("1",),
    "MLP_BITS": ("6",),
    "ATTN_BITS": ("6",),
    "EMB_BITS": ("8",),
    "AUX_EMB_BITS": ("8",),  # BITS has them all
}


def translate_aliases(env: dict[str, str], given: dict[str, str], known: dict) -> Iterator[str]:
    """Add to `given` what published names in `env` mean, with a note for each; or Refusal.

    A published switch that is off gives way to another one that is on for the same setting:
    EMA_ENABLED=0 SWA_ENABLED=1 means AVG_MODE=swa. So those that are on come first.
    """
    translated = set()
    for alias in sorted(set(ALIASES) & set(env), key=lambda alias: (env[alias] == "0", alias)):
        name, values = ALIASES[alias]
        value: str | None = env[alias]
        if values is not None:
            if value not in values:
                raise Refusal(f"{alias}={value!r}: expected {', '.join(values)} (here {name})")
            value = values[value]
        if value is None or (env[alias] == "0" and name in translated):
            yield f"{alias}={env[alias]} leaves {name} as it is"
            continue
        translated.add(name)
        stated = given.setdefault(name, value)
        if parse_setting(name, stated, known[name]) != parse_setting(name, value, known[name]):
            raise Refusal(
                f"{alias}={env[alias].strip()} means {name}={value}, but {name}={stated} "
                "is set too: keep one"
            )
        yield f"{alias}={env[alias].strip()} read as {name}={value.strip()}"


def retired_names(env: dict[str, str]) -> Iterator[str]:
    """A note for each name in `env` of a technique that is not here and off; or Refusal."""
    for name in sorted(set(RETIRED) & set(env)):
        off = RETIRED[name]
        if off is not None and env[name] not in off:
            raise Refusal(f"{name}={env[name]!r}: not available here, only {name}={off[0]} is")
        yield f"{name}={show_setting(env[name])} has no effect here"


# =================================================================================================
# Configuration
# All parts of the settings put together, the presets, and how the environment is read. Every name,
# value and contradiction that can be known to be wrong is refused here, in one line, before any
# work. Environment names are the upper-case names of the fields.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class Config(
    RunSettings,
    BudgetSettings,
    DataSettings,
    MaskSettings,
    ShapeSettings,
    TokenSettings,
    AttentionSettings,
    ValueSettings,
    DepthSettings,
    StreamSettings,
    RateSettings,
    MuonSettings,
    AdamSettings,
    LossSettings,
    AverageSettings,
    QatSettings,
    GridSettings,
    GptqSettings,
    CorrectionSettings,
    ArtifactSettings,
    CountSettings,
    EvaluationSettings,
    AdaptationSettings,
    LoraSettings,
    TiltSettings,
    SampleSettings,
):
    """All settings of a run, checked; the defaults are the recommended combination.

    Properties that need settings of several parts stand here.
    """

    @property
    def rotary_dims(self) -> int:
        """Rotated dimensions of each head, R."""
        return self.rope_dims or self.head_dim

    @property
    def has_input_gates(self) -> bool:
        """Whether some gate looks at GATE_WINDOW channels."""
        smears = self.smear_enabled and self.smear_form == "input"
        return smears or self.attn_gate != "none"

    @property
    def backout_layer(self) -> int:
        """The layer whose output is subtracted at the end; -1 for none."""
        layers = {"none": -1, "mid": self.num_layers // 2, "cache": self.cache_layer}
        return layers[self.backout_mode]

    @property
    def phase_row_tokens(self) -> int:
        """Tokens of a row in LORA_PHASES."""
        return self.lora_phase_row_tokens or self.eval_seq_len

    @property
    def token_lr(self) -> float:
        """Learning rate of the token embedding, tied or not."""
        return self.tied_embed_lr if self.tie_embeddings else self.embed_lr

    @property
    def table_wd(self) -> float:
        """Weight decay of embedding tables."""
        return self.adam_wd if self.embed_wd < 0 else self.embed_wd

    def __post_init__(self) -> None:
        """Raise Refusal for settings that contradict each other, with the values of those named."""
        refuse_bad_declarations()
        for part in PARTS:
            for holds, complaint in part.checks(self):
                if not holds:
                    raise Refusal(self.with_values(complaint))

    def with_values(self, complaint: str) -> str:
        """The text with each setting's name followed by its value."""

        def with_value(name: re.Match) -> str:
            if name[0].lower() not in SETTINGS:
                return name[0]
            return f"{name[0]}={show_setting(getattr(self, name[0].lower()))}"

        return re.sub(r"\b[A-Z][A-Z_0-9]+\b(?!=)", with_value, complaint)

    def for_model(self) -> Config:
        """The settings that the network may read; reading another one is refused."""
        return cast(Config, LimitedSettings(self, ("model",), "the model"))

    def for_scoring(self) -> Config:
        """The settings that scoring an artifact may read; reading another one is refused."""
        return cast(Config, LimitedSettings(self, ("run", "model", "scoring"), "scoring"))

    @classmethod
    def from_env(cls, env: dict[str, str]) -> tuple[Config, list[str]]:
        """Settings from defaults, then PRESET, then `env`, and notes for the log; or Refusal."""
        known = {name.upper(): setting for name, setting in SETTINGS.items()}
        given, notes = translate_names(env, known)
        values: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items()}
        for preset in preset_names(given.get("PRESET", "")):
            for name, value in PRESETS[preset].items():
                values[name] = scaled(values[name], value)
        for name, text in given.items():
            values[name.lower()] = parse_setting(name, text, known[name])
        if "WARMDOWN_ITERS" in given and "WARMDOWN_FRAC" not in given:
            values["warmdown_frac"] = 0.0  # a preset's fraction gives way to what was asked for
        # A budget that was asked for takes the place of one that was not.
        if values["max_train_tflops"] and "MAX_WALLCLOCK_SECONDS" not in given:
            values["max_wallclock_seconds"] = 0.0
        elif "MAX_WALLCLOCK_SECONDS" in given and "MAX_TRAIN_TFLOPS" not in given:
            values["max_train_tflops"] = 0.0
        return cls(**values), notes

    def listing(self) -> Iterator[str]:
        """Lines of --help and of the log's head: settings, * where they differ from defaults."""
        for part in PARTS:
            yield f"{part.title}:"
            for name in settings_of(part):
                yield self.line_of(name)

    def line_of(self, name: str) -> str:
        """One setting as --help shows it: value, meaning, what it accepts, default."""
        value, setting = getattr(self, name), SETTINGS[name]
        about = knob_of(setting)
        if isinstance(setting.default, bool):
            accepted = "0 or 1"
        elif isinstance(setting.default, str):
            accepted = "|".join(about.accepts) or "text"
        else:
            accepted = f"{about.accepts[0]:g} to {about.accepts[1]:g}"
        mark = " "
        if value != setting.default:
            mark = "*"
            accepted += f"; default {show_setting(setting.default)}"
        return f"{mark} {name.upper():<29}{show_setting(value):<12} {about.meaning} [{accepted}]"


SETTINGS: dict[str, Field] = {setting.name: setting for setting in fields(Config)}
PARTS = cast(tuple[type[Part], ...], Config.__bases__)


def settings_of(part: type[Part]) -> list[str]:
    """Names of a part's own settings, in the order of their declaration."""
    return [name for name in part.__annotations__ if name in SETTINGS]


def settings_of_reach(*reaches: str) -> list[str]:
    """Names of the settings of these reaches, in order: "model", "scoring" or both."""
    return [
        name
        for part in PARTS
        for name in settings_of(part)
        if knob_of(SETTINGS[name]).reach in reaches
    ]


@functools.cache
def refuse_bad_declarations() -> None:
    """Raise Refusal if a setting travels in artifacts but older ones could not be read."""
    for name, setting in SETTINGS.items():
        if not isinstance(setting.metadata.get("knob"), Knob):
            raise Refusal(f"{name.upper()} is declared without a knob: use training_knob or so")
        silent = knob_of(setting).absent is UNSAID and name not in VERSION_1_SETTINGS
        if knob_of(setting).travels and silent:
            raise Refusal(
                f"{name.upper()} travels in artifacts and does not say what its absence in an "
                "older one means: add absent=..., the value at which nothing changes"
            )


def preset_names(text: str) -> list[str]:
    """The names in PRESET; raises Refusal for an unknown one, or if a scale is not the last."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PRESETS:
            raise Refusal(f"PRESET={name!r}: expected one of {', '.join(PRESETS)}")
    if "mini" in names[:-1]:
        raise Refusal(f"PRESET={','.join(names)}: mini scales the others: it goes last")
    return names


def scaled(before: Any, value: Any) -> Any:
    """A preset's value; a fraction is of what the setting would be without the preset."""
    if not isinstance(value, Fraction):
        return value
    return before and max(1, round(before * value))


# What all five published systems share: no masks at document starts, text in stream order, the
# last short validation row dropped.
PUBLISHED = {
    "loader": "sequential",
    "smear_bos_mask": False,
    "bigram_bos_mask": False,
    "eval_truncate": True,
}

# #1855 as it ran; #2135 differs in few settings. CaseOps is a matter of the data and its tokenizer.
FRONTIER = {
    "loader": "sequential",
    "vocab_size": 8192,
    "mlp_mult": 4.0,
    "qk_gain_init": 5.0,
    "rope_ntk_ref": 0,
    "attn_docs": True,
    "attn_gate": "sparse",
    "attn_gate_scale": 0.5,
    "smear_form": "input",
    "bigram_vocab_size": 0,
    "ve_enabled": False,
    "num_loops": 2,
    "skip_gates": True,
    "parallel_start_layer": 8,
    "matrix_lr": 0.026,
    "scalar_lr": 0.02,
    "tied_embed_lr": 0.03,
    "muon_momentum": 0.97,
    "muon_ns": "polar",
    "muon_row_norm": True,
    "muon_wd": 0.095,
    "embed_wd": 0.085,
    "adam_wd": 0.02,
    "beta2": 0.99,
    "min_lr": 0.1,
    "clip_before_reduce": True,
    "warmdown_frac": 0.85,
    "ema_decay": 0.9965,
    "qat_mode": "off",
    "quant_clip": "std_published",
    "clip_sigmas": "mlp:11.5,attn:13,emb:14,aux:13",
    "lqer_top_k": 3,
    "gate_storage": "int8",
    "codec": "range",  # in place of ZPAQ by kinds of matrices
    "bits": "mlp:6,attn:6,emb:7,aux:8",
    "gptq_calib_batches": 16,
    "eval_truncate": True,
    "eval_stride": 0,
    # Each of eight ranks had a row of 4,096 tokens in a step of a phase.
    "ttt_mode": "lora",
    "lora_phases": 3,
    "lora_phase_row_tokens": 4096,
}

PRESETS: dict[str, dict] = {
    # openai/parameter-golf pull requests, as their scripts ran; records/SYSTEMS.md has every line.
    # Averages that were computed, never applied, are left out: #1361, #569, #703 SWA; #334 EMA.
    "pr1361": PUBLISHED
    | {
        "warmdown_iters": 3200,
        "qat_targets": "linears",
        "gptq_variant": "simple",
        "gptq_actorder": False,
        "gptq_calib_batches": 64,
        "eval_stride": 32,
        "sliding": "published_s1",
        "attention": "sdpa",
    },
    "pr569": PUBLISHED
    | {
        "bigram_vocab_size": 2048,
        "bigram_dim": 128,
        "vrl_mode": "add",
        "resid_mix_init": "phase",
        "qat_targets": "linears",
        "qat_clip": "quantile",
        "bits": "mlp:6,attn:6,emb:8,aux:6",
        "prune_pct": 0.02,
    },  # at a threshold of 0, so that nothing was pruned
    "pr703": PUBLISHED
    | {
        "bigram_vocab_size": 1536,
        "bigram_dim": 128,
        "xsa_last_n": 4,
        "backout_mode": "cache",
        "backout_init": 0.1,
        "matrix_lr": 0.026,
        "scalar_lr": 0.026,
        "tied_embed_lr": 0.0364,
        "embed_lr": 0.624,
        "head_lr": 0.00832,
        "optimizer_routing": "banks",
        "muon_quant_momentum": True,
        "clip_before_reduce": True,
        "mile_gamma": 1.1,
        "codec": "lzma",
        "sliding": "published_s1",
        "qat_targets": "aux",
    },  # its late QAT reached no other linear
    "pr334": PUBLISHED
    | {
        "mlp_act": "relu2",
        "rope_base": 50000.0,
        "rope_ntk_ref": 0,
        "xsa_last_n": 0,
        "bigram_vocab_size": 2048,
        "bigram_dim": 64,
        "bigram_hash": "sum",
        "ve_enabled": False,
        "train_seq_len": 1024,
        "eval_seq_len": 1024,
        "train_batch_tokens": 524288,
        "matrix_lr": 0.04,
        "scalar_lr": 0.04,
        "tied_embed_lr": 0.05,
        "muon_momentum": 0.95,
        "muon_momentum_warmup_start": 0.85,
        "muon_momentum_warmup_steps": 500,
        "adam_wd": 0.0,
        "muon_wd_order": "after",
        "optimizer_routing": "by_ndim",
        "grad_clip_norm": 0.0,
        "warmdown_iters": 3000,
        "avg_mode": "swa",
        "swa_every": 1,
        "qat_mode": "off",
        "bits": "mlp:5,attn:5,emb:8,aux:8",
        "q_scale_floor": "tiny",
        "gptq_variant": "off",
        "clip_search": "absmax",
        "sliding": "published_s3",
        "ttt_mode": "train_then_score",
        "ttt_grad_clip": 0.0,
        "ttt_batch_seqs": 1,
        "compile": "0",
        "attention": "sdpa",
    },
    "pr295": PUBLISHED
    | {
        "num_layers": 10,
        "mlp_act": "relu2",
        "rope_dims": 64,
        "rope_ntk_ref": 2048,
        "xsa_last_n": 0,
        "ln_scale": "0",
        "bigram_vocab_size": 10240,
        "bigram_dim": 128,
        "bigram_init": "zero_proj",
        "ve_enabled": False,
        "resid_mix_init": "phase",
        "backout_mode": "mid",
        "emb_svd_init": True,
        "matrix_lr": 0.02,
        "scalar_lr": 0.02,
        "tied_embed_lr": 0.03,
        "adam_wd": 0.01,
        "warmdown_iters": 3000,
        "avg_mode": "swa",
        "qat_mode": "always",
        "q_scale_floor": "tiny",
        "gptq_variant": "off",
        "bits": "mlp:5,attn:6,emb:fp16,aux:6,blocks.8.attn.c_k:fp16,blocks.9.attn.c_k:fp16",
        "clip_search": "absmax",
        "prune_frac": 0.08,
        "attention": "sdpa",
    },
    "pr1855": FRONTIER,
    "pr2135": FRONTIER
    | {
        "smear_bos_mask": False,
        "matrix_lr": 0.028,
        "gptq_calib_batches": 32,
        "eval_seq_len": 2560,
        "lqer_group": 32,
        "gate_storage": "fp16",
        "lora_places": "q,v,o,mlp,head",
        "lora_lr": 8e-5,
        "lora_decay": 2.0,
        "lora_phases": 1,
        "ngram_tilt": 2.625,
    },
    # A scale, not a system: two CPU cores, the built-in corpus, five minutes. Goes last; fractions
    # are of the system's own value.
    "mini": {
        "data_path": "./data/datasets/docs_sp1024",
        "tokenizer_path": "./data/tokenizers/docs_1024_bpe.model",
        "vocab_size": 1024,
        "loader": "shuffled",
        "model_dim": 64,
        "num_heads": 2,
        "num_kv_heads": 1,
        "rope_dims": Fraction(1, 2),
        "bigram_vocab_size": Fraction(1, 3),
        "bigram_dim": Fraction(2, 7),
        "ve_dim": Fraction(1, 4),
        "train_seq_len": 256,
        "eval_seq_len": 256,
        "train_batch_tokens": 2048,
        "max_wallclock_seconds": 300.0,
        "warmdown_frac": 0.5,
        "ema_decay": 0.9,
        "swa_every": Fraction(1, 10),
        "gptq_calib_batches": 32,
        "int8_keep_float_max_numel": 1024,
        "ttt_chunk_tokens": Fraction(1, 8),
        "lora_batch_docs": Fraction(1, 4),
        "lora_phase_docs": Fraction(1, 25),
        "lora_phase_chunk_tokens": Fraction(1, 16),
        "lora_phase_row_tokens": 0,
    },
}


def translate_names(env: dict[str, str], known: dict) -> tuple[dict[str, str], list[str]]:
    """The settings named in `env` under our names, and a note for each translation, or Refusal."""
    given = {name: env[name] for name in known if name in env}
    notes = [
        *translate_aliases(env, given, known),
        *retired_names(env),
        *misspelled_names(env, known),
    ]
    return given, notes


def misspelled_names(env: dict[str, str], known: dict) -> Iterator[str]:
    """Refuse a name that is almost one of ours, if its value fits a setting that it resembles.

    A value that does not fit is taken for another program's variable: it gets a note.
    """
    excused = {name.strip() for name in env.get("NOT_OURS", "").split(",")}
    for name in sorted(env.keys() - known.keys() - ALIASES.keys() - RETIRED.keys() - excused):
        resembled = resembled_names(name, known)
        if fitting := [near for near in resembled if value_fits(near, env[name], known)]:
            raise Refusal(
                f"{name} is not a setting; did you mean {fitting[0]}? (--help lists them; "
                f"NOT_OURS={name} says that it is another program's)"
            )
        if resembled:
            yield f"{name}={show_setting(env[name])} is not read here: it is no setting"


def resembled_names(name: str, known: dict) -> list[str]:
    """Settings and aliases that a name could be meant for, the likeliest first."""
    # Short names lie close to words of other programs (SPEED, SEED): they must differ less.
    cutoff = 0.88 if len(name) > 8 else 0.92
    if near := difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=cutoff):
        return near
    ours = [prefix for part in PARTS for prefix in part.prefixes if name.startswith(prefix)]
    family = [setting for setting in known if setting.startswith(tuple(ours))] if ours else []
    return difflib.get_close_matches(name, family, n=len(family) or 1, cutoff=0.0)


def value_fits(name: str, text: str, known: dict) -> bool:
    """Whether a text can be the value of a setting or alias; a path only if it is there."""
    name, values = ALIASES.get(name, (name, None))
    if values is not None:
        return text in values
    try:
        parse_setting(name, text, known[name])
        if name == "PRESET":
            preset_names(text)
    except Refusal:
        return False
    return not name.endswith("_PATH") or Path(text).exists()


# =================================================================================================
# Main
# The story of a run, and the verbs that do less.
# =================================================================================================


def look(
    cfg: Config, device: torch.device
) -> tuple[TrainingRows, Validation, str, AttentionKernel]:
    """What a run takes from outside itself: data, kernel and its name; or Refusal."""
    if cfg.codec == "brotli":
        brotli_module()
    if cfg.log_to == "tensorboard":
        tensorboard_writer()
    refuse_small_budget(cfg)
    rows = TrainingRows(cfg)
    val = load_validation(cfg)
    if val.forbidden is not None:
        for number, path in enumerate(rows.shards):
            tokens = rows.tokens_of(number)[: rows.scan_tokens]
            refuse_forbidden_pairs(tokens, val.forbidden, str(path))
    return rows, val, *pick_attention(cfg, device)


def first_weights(cfg: Config, val: Validation) -> dict[str, Tensor]:
    """The weights in INIT_FROM, by parameter; empty without it. Raises Refusal if they do not do.

    The file may be a stranger's: nothing in it is run, and no shape is believed.
    """
    if not cfg.init_from:
        return {}
    path = Path(cfg.init_from)
    if not path.is_file():
        raise Refusal(f"INIT_FROM={path}: no such file; expected an artifact.bin or a checkpoint")
    with open(path, "rb") as file:
        is_artifact = file.read(len(ARTIFACT_MAGIC)) == ARTIFACT_MAGIC
    if is_artifact:
        header, stored = read_artifact(path)
        if header["tokenizer"] != val.tokenizer_sha256:
            raise Refusal(f"INIT_FROM={path}: its model reads the tokens of another tokenizer")
        weights = {
            name: tensor.restore() for name, tensor in stored.items() if tensor.kind != "packed"
        }
    else:
        weights = weights_of_checkpoint(path)
    expected = {name: tuple(weight.shape) for name, weight in laid_out(cfg).named_parameters()}
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | given.keys()):
        if given.get(name) != expected.get(name):
            raise Refusal(
                f"INIT_FROM={path}: {name} is {given.get(name, 'not there')}, and in the model of "
                f"these settings {expected.get(name, 'not there')}: give both runs the same shape"
            )
        if not weights[name].isfinite().all():
            raise Refusal(f"INIT_FROM={path}: {name} holds numbers that are not finite")
    return weights


def origin(rows: TrainingRows, val: Validation, cfg: Config) -> list:
    """What a run learns from, to tell by content whether a checkpoint learned from the same."""
    begun_with = [sha256_of(Path(cfg.init_from))] if cfg.init_from else []
    return [val.fingerprint, rows.num_tokens, *begun_with]


def weights_of_checkpoint(path: Path) -> dict[str, Tensor]:
    """The model's weights in a checkpoint; raises Refusal if the file is none."""
    try:
        content = io.BytesIO(read_checkpoint(path))
        weights = torch.load(content, "cpu", weights_only=True)["model"]
        for name, weight in weights.items():
            kind = (weight.dtype, weight.layout, weight.device.type)
            if kind != (torch.float32, torch.strided, "cpu") or not isinstance(name, str):
                raise ValueError(f"{name} is {kind}")
        return weights
    except Exception as error:  # what torch.load raises is not told
        raise Refusal(
            f"INIT_FROM={path}: neither an artifact nor a checkpoint that can be read ({error})"
        ) from None


def verb_train(cfg: Config, notes: list[str]) -> int:
    """Train, export, and score the exported model; returns the exit code."""
    with Run.start(cfg) as run:
        with run.ranks.together():
            rows, val, kernel_name, kernel = look(cfg, run.device)
            begun_with = first_weights(cfg, val)
        run.folder.open()
        run.log_header(notes)
        model = GPT(cfg, kernel, run.dtype)
        initialize(model, cfg)
        if begun_with:
            model.load_state_dict(begun_with)
        run.ranks.copy_from_main(model.to(run.device))
        if cfg.token_mask == "1":
            mask_tokens(model, val, run.device)
        if val.prefixes is not None:
            model.prefixes = torch.from_numpy(val.prefixes).to(run.device)
        log_work(model, rows, val, kernel_name, run)
        forward = make_forward(run)
        calibration_seconds, eval_seconds = prime(forward, model, rows, run)
        reserve = budget_reserve(model, calibration_seconds, run)
        state = Training(model, reserve, origin(rows, val, cfg), run)
        if saved := run.folder.last_checkpoint():
            state.restore(saved)
        packed_text = pack_training_text(rows, run)
        model, steps = train(forward, state, rows, val, run), state.step
        model, run = as_trained(model, state, run)
        hessians = calibrate(model, rows, steps, run)
        run.phase = "scoring the float model"
        float_result = evaluate("float_chunked", forward, model, val, run)
        report("DIAGNOSTIC" + f" post_{cfg.avg_mode}" * (cfg.avg_mode != "none"), float_result, run)
        blob = export(model, hessians, packed_text, val, run)
        announce_scoring(eval_seconds, val, run)
        run.phase = "scoring the artifact"
        header, stored = decode_artifact(blob)
        scoring_cfg, _ = settings_within(header, environment_of(cfg, "run"))
        scoring = run.with_settings(scoring_cfg)
        scores = score_artifact(stored, val, forward, scoring, diagnostics=True)
        run.ledger.log_activity()
        return log_summary(model, steps, len(blob), [float_result, *scores], run)


def log_work(model: GPT, rows: TrainingRows, val: Validation, kernel: str, run: Run) -> None:
    """Log what is about to be trained, on what."""
    cfg, first_xsa = run.cfg, run.cfg.num_layers - run.cfg.xsa_last_n
    machine = torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type
    if "H100" not in machine or run.ranks.world_size != 8:
        run.ledger.mark_ineligible(
            f"ran on {run.ranks.world_size} x {machine}, the track asks for 8 x H100"
        )
    for reason in static_ineligibility(cfg):
        run.ledger.mark_ineligible(reason)
    run.folder.log(
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.tokenizer_path}"
    )
    run.folder.log(
        "train_loader:dataset:{dataset} train_shards:{shards} tokens:{tokens}",
        "train_data",
        dataset=Path(cfg.data_path).name,
        shards=len(rows.shards),
        tokens=rows.num_tokens,
    )
    run.folder.log(
        "val_loader:shards pattern={pattern} tokens:{tokens} documents:{documents} "
        "bytes:{num_bytes} recorded_bytes:{recorded} fingerprint:{fingerprint}",
        "val_data",
        tokens=len(val.tokens),
        pattern=f"{cfg.data_path}/fineweb_val_*.bin",
        documents=val.documents,
        num_bytes=int(val.target_bytes.sum(dtype=np.int64)),
        recorded=val.recorded_bytes,
        fingerprint=val.fingerprint,
    )
    if val.accounting:
        run.folder.log(f"val_bytes:{val.accounting}")
    run.folder.log(
        "model_params:{params}", "model", params=sum(p.numel() for p in model.parameters())
    )
    most = max((count for _, count in micro_batches(cfg, run)), default=0)
    run.folder.log(
        "\n".join(
            (
                f"XSA:last_{cfg.xsa_last_n} active_layers:{list(range(first_xsa, cfg.num_layers))}",
                f"world_size:{run.ranks.world_size} rows_per_step:{cfg.rows_per_step} "
                f"micro_batch_rows:{most}",
                f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads} "
                f"kernel:{kernel}",
                f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} "
                f"iterations:{cfg.iterations} warmup_steps:{cfg.warmup_steps} "
                f"max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f} "
                f"max_train_tflops:{cfg.max_train_tflops:g}",
                f"work of a step:{step_operations(model) / 1e12:.6g} TFLOP",
                *plan_lines(model),
                *routing_table(cfg, model),
                f"repeats:{repeats(run)}",
                f"seed:{cfg.seed}",
            )
        )
    )


def plan_lines(model: GPT) -> Iterator[str]:
    """The layers in the order in which they are executed, and the order before they loop."""
    if model.cfg.num_loops:
        before = ",".join(str(layer.block) for layer in model.plan_before_looping)
        yield f"before ENABLE_LOOPING_AT={model.cfg.enable_looping_at:g}, blocks: {before}"
    for place, layer in enumerate(model.plan):
        yield f"layer:{place} {layer}"


def repeats(run: Run) -> str:
    """Whether another run of these settings, this seed included, gives the same bits."""
    if run.device.type != "cpu":
        return "no, whatever the settings: a GPU's attention sums its gradients in no fixed order"
    if not run.cfg.step_driven:
        return "no: the clock ends the run (MAX_WALLCLOCK_SECONDS=0 would leave that to ITERATIONS)"
    return f"to the bit on this machine, with {torch.get_num_threads()} threads a process"


def routing_table(cfg: Config, model: GPT) -> Iterator[str]:
    """One line a parameter group: how many parameters learn how."""
    for group in route_parameters(cfg, model):
        yield (
            f"{sum(p.numel() for p in group['params']):>12,} parameters  {group['optimizer']}  "
            f"lr:{group['base_lr']:<8g} wd:{group['weight_decay']:<6g} {group['route']}"
        )


def log_summary(model: GPT, steps: int, num_bytes: int, scores: list[EvalResult], run: Run) -> int:
    """The last lines of the log: what was trained, its size, its scores; returns the exit code."""
    cfg = run.cfg
    if run.device.type == "cuda":
        run.folder.log(
            f"peak memory allocated: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() / 2**20:.0f} MiB"
        )
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    run.folder.log(
        "peak memory resident: {mib:.0f} MiB",
        "memory",
        mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
    )
    if (used := run.ledger.training_clock.elapsed()) > cfg.max_wallclock_seconds > 0:
        run.ledger.mark_ineligible(f"training and calibration took {used:.1f} s")
    run.folder.log(
        "eligible:{eligible} {reasons}",
        "eligibility",
        eligible=int(not run.ledger.ineligible),
        reasons="; ".join(run.ledger.ineligible),
    )
    run.folder.log(
        "params:{params} steps:{steps} tokens_per_second:{rate:.0f} "
        "train_seconds:{seconds:.1f} eval_seconds:{eval_seconds:.1f}",
        "summary",
        params=sum(p.numel() for p in model.parameters()),
        steps=steps,
        rate=steps * cfg.train_batch_tokens / run.ledger.trained_seconds,
        seconds=run.ledger.training_clock.elapsed(),
        eval_seconds=run.ledger.scoring_clock.elapsed(),
    )
    log_counted_work(run)
    total, limit = len(run.folder.source) + num_bytes, cfg.artifact_limit_bytes
    run.folder.log(
        f"artifact {num_bytes:,} bytes + code {len(run.folder.source):,} = {total:,} of "
        f"{limit:,} bytes, {limit - total:,} left"
    )
    for score in scores[:-1]:
        run.folder.log(f"{score.name} val_bpb:{score.bpb:.8f}")
    run.folder.log(
        "val_bpb:{val_bpb:.8f} val_loss:{val_loss:.8f} ({name}, stride {stride}, {sliding})",
        "final",
        val_bpb=scores[-1].bpb,
        val_loss=scores[-1].loss,
        name=scores[-1].name,
        stride=cfg.eval_stride,
        sliding="cover",
    )
    run.folder.log(f"log: {run.folder.path}/log.txt\nartifact: {run.folder.path}/artifact.bin")
    if total <= limit:
        return 0
    run.folder.log(
        f"error: code and artifact are {total - limit:,} bytes over ARTIFACT_LIMIT_BYTES="
        f"{limit:,}; take fewer parameters or BITS"
    )
    return EXIT_OVER_LIMIT


def log_counted_work(run: Run) -> None:
    """Log the operations of training with calibration and of scoring, and the counts' seconds."""
    run.folder.log(
        "work training:{tflops:.6f} TFLOP scoring:{eval_tflops:.6f} TFLOP "
        "tables:{table_seconds:.1f} CPU seconds",
        "work",
        tflops=run.ledger.training_operations / 1e12,
        eval_tflops=run.ledger.scoring_operations / 1e12,
        table_seconds=run.ledger.table_clock.elapsed(),
    )


def static_ineligibility(cfg: Config) -> list[str]:
    """Settings that keep a run from standing as a record of the 10-minute, 16 MB track."""
    return [
        reason
        for wrong, reason in (
            (cfg.step_driven, "MAX_WALLCLOCK_SECONDS=0: the run is step-driven"),
            (cfg.max_wallclock_seconds > 600, "MAX_WALLCLOCK_SECONDS is above 600"),
            (cfg.eval_wallclock_seconds > 600, "EVAL_WALLCLOCK_SECONDS is above 600"),
            (cfg.artifact_limit_bytes > 16_000_000, "ARTIFACT_LIMIT_BYTES is above 16,000,000"),
            (
                cfg.gptq_calib == "train_after_cap",
                "GPTQ_CALIB=train_after_cap: training data was used after the budget",
            ),
            (not Path(cfg.data_path).name.startswith("fineweb10B_"), "the text is not FineWeb"),
            (cfg.init_from, "INIT_FROM: the run began with the weights of another"),
        )
        if wrong
    ]


def verb_check(cfg: Config, notes: list[str]) -> int:
    """Look at settings, data and tokenizer as a run would, and do nothing else."""
    rows, val, *_ = look(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    laid_out(cfg)
    first_weights(cfg, val)
    if cfg.run_id and not cfg.resume and Path(cfg.runs_dir, cfg.run_id).exists():
        raise Refusal(
            f"RUN_ID={cfg.run_id}: {Path(cfg.runs_dir, cfg.run_id)} exists already; "
            "choose another, or RESUME=1 to go on"
        )
    print(
        *notes,
        f"ok: {rows.num_tokens:,} training tokens in {len(rows.shards)} shards, "
        f"{len(val.tokens):,} validation tokens in {val.documents:,} documents",
        sep="\n",
    )
    return 0


def verb_plan(cfg: Config, notes: list[str]) -> int:
    """Say what a run would do, without data and without training: plan.py is run, and says it."""
    script = Path(__file__).resolve().with_name("plan.py")
    if not script.is_file():
        raise Refusal("--plan needs plan.py, which stands beside train_gpt.py in its repository")
    print(*notes, sep="\n", end="\n" if notes else "")
    runpy.run_path(str(script), run_name="__main__")
    return 0


def locate_validation(cfg: Config, header: dict) -> Config:
    """Settings pointing at the split and tokenizer an artifact was scored on, or Refusal."""
    for folder in (cfg.data_path, *map(str, sorted(Path("data/datasets").glob("*")))):
        with contextlib.suppress(Refusal):
            if read_sidecar(folder)["fingerprint"] == header["validation"]:
                break
    else:
        raise Refusal(
            f"no validation split with fingerprint {header['validation'][:12]} in "
            f"DATA_PATH={cfg.data_path} or data/datasets/*; make it with data/prepare.py"
        )
    return replace(locate_tokenizer(cfg, header), data_path=folder)


def locate_tokenizer(cfg: Config, header: dict) -> Config:
    """Settings pointing at the tokenizer of an artifact's text, or Refusal."""
    for path in (Path(cfg.tokenizer_path), *sorted(Path("data/tokenizers").glob("*.model"))):
        if path.is_file() and sha256_of(path) == header["tokenizer"]:
            return replace(cfg, tokenizer_path=str(path))
    raise Refusal(
        f"no tokenizer with sha256 {header['tokenizer'][:12]} at "
        f"TOKENIZER_PATH={cfg.tokenizer_path} or in data/tokenizers/"
    )


def verb_eval(path: Path, env: dict[str, str]) -> int:
    """Score an artifact again: the model comes from its header alone."""
    header, stored = read_artifact(path)
    cfg, notes = settings_within(header, env)
    cfg = locate_validation(cfg, header)
    with Run.start(cfg) as run:
        run.log_header(notes)
        with run.ranks.together():
            val = load_validation(cfg)
        forward = make_forward(run)
        if run.compiled:  # off the clock, as in the run that made it
            prime_scoring(forward, rebuild_model(cfg, stored, run), run)
        run.phase = "scoring the artifact"
        score = score_artifact(stored, val, forward, run, diagnostics=False)[-1]
        run.folder.log(
            f"val_bpb:{score.bpb:.8f} val_loss:{score.loss:.8f} ({score.name}, "
            f"stride {cfg.eval_stride})"
        )
    return 0


def verb_sample(path: Path, prompt: str, env: dict[str, str]) -> int:
    """Write text that an artifact's model draws after the prompt; returns the exit code."""
    header, stored = read_artifact(path)
    cfg, _ = settings_within(header, env)
    cfg = locate_tokenizer(cfg, header)
    tokenizer, _ = load_tokenizer(cfg, {"sha256": header["tokenizer"]})
    with Run.start(cfg) as run:
        run.phase = "sampling"
        cache = CachedAttention()
        model = rebuild_model(cfg, stored, run, cache)
        if cfg.token_mask != "0":
            model.penalty = penalties(forbidden_pairs(tokenizer)).to(run.device)
        ids = encode_text(tokenizer, prompt)
        stream_text(tokenizer, ids, draw_tokens(model, cache, [BOS, *ids], cfg, run.device))
    return 0


def verb_help(cfg: Config, notes: list[str]) -> int:
    """Print every setting with value, range and meaning."""
    print(__doc__ or "", *cfg.listing(), sep="\n")  # python -OO leaves no docstrings
    print(f"\nPresets: {', '.join(PRESETS)}. * marks what differs from the defaults.")
    return 0


VERBS = {
    (): verb_train,
    ("--check",): verb_check,
    ("--plan",): verb_plan,
    ("--help",): verb_help,
    ("-h",): verb_help,
}


def main(arguments: list[str]) -> int:
    """Do what the command line asks; returns the exit code, having said in one line what failed."""
    open_standard_streams()
    try:
        return do(arguments)
    except Refusal as refusal:
        code, said = EXIT_REFUSED, str(refusal)
    except BrokenPipeError:  # who read the output has seen enough
        return EXIT_FAILED
    except OSError as error:
        code, said = EXIT_FAILED, str(error)
    except KeyboardInterrupt:
        code, said = EXIT_INTERRUPTED, "interrupted; what the run folder holds was kept"
    if code != EXIT_REFUSED or os.environ.get("LOCAL_RANK", "0") == "0":  # one a host is enough
        say(f"error: {said}", to_stderr=True)
    return code


def do(arguments: list[str]) -> int:
    """Find the verb, and read the settings; returns the verb's exit code."""
    if arguments[:1] == ["--eval"] and len(arguments) == 2:
        return verb_eval(Path(arguments[1]), dict(os.environ))
    if arguments[:1] == ["--sample"] and len(arguments) in (2, 3):
        return verb_sample(Path(arguments[1]), "".join(arguments[2:]), dict(os.environ))
    verb = VERBS.get(tuple(arguments))
    if verb is None:
        raise Refusal(
            f"arguments {' '.join(arguments)!r}: expected nothing, --help, --check, "
            "--plan, --eval ARTIFACT or --sample ARTIFACT [PROMPT]; "
            "hyperparameters are environment variables"
        )
    cfg, notes = Config.from_env(dict(os.environ))
    return verb(cfg, notes)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    # All is done, and as Python exits no handler can say anything any more.
    handle_end_signals(lambda number, frame: None)
    sys.exit(exit_code)
