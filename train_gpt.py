"""Train a tiny language model under a byte and a time budget, and score its artifact.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    8 GPUs, FineWeb, the defaults
    PRESET=cpu python train_gpt.py                           two CPU cores, built-in corpus
    python train_gpt.py --help                               every setting
    python train_gpt.py --check                              check settings and data, then stop
    python train_gpt.py --plan                               what a run would do and cost
    python train_gpt.py --eval runs/<id>/artifact.bin        score an artifact again
    python train_gpt.py --sample runs/<id>/artifact.bin ""   draw text from its model

The number to lower is val_bpb: how many bits per byte of validation text the model needs once it
has been reloaded from the artifact. ARTIFACT_LIMIT_BYTES bounds code plus artifact,
MAX_WALLCLOCK_SECONDS bounds training and calibration, EVAL_WALLCLOCK_SECONDS bounds scoring.
Settings are environment variables; a run leaves its log, metrics, settings, source and artifact
in runs/<RUN_ID>/.

Sections, in the order of a run:

  1  Settings                     how a setting is declared, parsed and checked
  2  Run                          ranks, device, clock, log, run folder
  3  Data                         shards, training rows, validation split, bytes per token
  4  Token mask                   token pairs that a tokenizer cannot emit
  5  Model                        the network, one forward for everything
  6  Optimizers and schedules     Muon, AdamW, routing table, learning rate at a given time
  7  Counted work                 floating-point operations, counted from shapes
  8  Training                     priming, one step, the loop
  9  Quantization                 int6/int8 grids, Hessians, GPTQ
 10  Artifact                     model to bytes and back
 11  Range coder                  integers to few bytes and back
 12  Size                         the artifact's size: predicted, and made to fit the limit
 13  Counts                       n-grams and repeats, mixed with the network
 14  N-gram tilt                  hints from repeated passages of the scored text
 15  Evaluation                   windows, bits per byte, learning from what is scored
 16  Sampling                     text drawn from the model
 17  Faster on a CPU              hand-written derivatives
 18  Published variants           what only a published system needs
 19  Configuration                all settings together, presets, the environment
 20  Main                         a run from start to end, and the commands above

Shapes: B rows, T tokens a row, D model width, H query heads, G key/value heads, K head width,
V vocabulary, N tokens of a stream. Linear weights are (out, in).

A target is a token to predict; its nats are its cross entropy, -ln of the probability that the
model gives it. A place is an index: of a token in a row or a text, of a layer in the model's plan.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import io
import itertools
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
from typing import Any, ClassVar, NamedTuple, Protocol, TextIO, TypeVar, cast

try:
    import fcntl
    import resource
except ImportError:
    if __name__ != "__main__":  # an importing program needs the exception, not an exit
        raise
    print("error: this needs Linux or macOS; on Windows, run it inside WSL", file=sys.stderr)
    sys.exit(2)

# Signals that ask a process to end. They come from a scheduler, Ctrl-C, a closed terminal or a
# limit on CPU time; schedulers such as SLURM send USR1 or USR2 some time before they kill a job.
END_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGXCPU,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def handle_end_signals(handler: Callable[[int, FrameType | None], None]) -> dict:
    """Install `handler` for END_SIGNALS; returns the handlers that it replaces, by signal.

    A SIGHUP that is already ignored stays ignored, as nohup asks. Only the main thread may install
    handlers; on any other, nothing is installed.
    """
    before: dict = {}
    if threading.current_thread() is threading.main_thread():
        for number in END_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


def end_before_work(number: int, frame: FrameType | None) -> None:
    """End a process that has not begun to work, so that nothing can be lost."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one line per host is enough
        line = f"error: {signal.Signals(number).name} during starting; nothing was begun\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
    os._exit(128 + number)


if __name__ == "__main__":
    # This stands before the import of torch, which takes seconds and fixes how threads wait.
    # Threads that spin while they wait take the CPU from each other wherever fewer cores are free
    # than there are threads: in a container with a quota, or beside another program.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    handle_end_signals(end_before_work)

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

# =================================================================================================
# Settings
# How a setting is declared, parsed and checked. The settings themselves stand at the head of the
# sections that use them, in small parts; the section Configuration joins the parts and reads the
# environment.
# =================================================================================================


class Refusal(ValueError):
    """Settings, data or an artifact that a run cannot use; the message is one line."""

    def __str__(self) -> str:
        """The message, cut to 1,000 printable characters: it may quote a hostile file."""
        text = super().__str__()[:1000]
        return "".join(character if character.isprintable() else "?" for character in text)


# Everything that parsing an untrusted file's JSON and lengths may raise.
MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)

UNSAID = object()  # Knob.absent of a setting that declares none


@dataclass(frozen=True)
class Knob:
    """Everything about a setting but its name and default.

    accepts: (lowest, highest) for a number, the choices for a text; empty accepts any text.
    meaning: a sentence for --help, with the unit.
    reach: what the setting affects, which decides who may read it.
        "run": where and how the run works, never its result; may differ when a run is resumed.
        "training": what is learned or exported.
        "model": the network; such a setting travels in the artifact's header.
        "scoring": how an artifact is scored; travels too, and --eval may override it.
    absent: the value to assume for an artifact older than the setting; see VERSION_1_SETTINGS.
    tries: values, beside the choices, that tests combine with all other settings.
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

    @property
    def text_if_absent(self) -> str:
        """`absent` as an artifact's header would hold it."""
        return self.absent if isinstance(self.absent, str) else show_setting(self.absent)


def knob(
    reach: str,
    default: object,
    accepts: tuple,
    meaning: str,
    *,
    absent: object = UNSAID,
    tries: tuple = (),
) -> Any:
    """Declare a setting: a dataclass field that carries a Knob; see Knob for the arguments."""
    return field(default=default, metadata={"knob": Knob(accepts, meaning, reach, absent, tries)})


run_knob = functools.partial(knob, "run")
training_knob = functools.partial(knob, "training")
model_knob = functools.partial(knob, "model")
scoring_knob = functools.partial(knob, "scoring")

Checks = Iterator[tuple[object, str]]  # pairs of a condition and the complaint if it is false


class Part:
    """The settings of one subject, as a frozen dataclass; Config inherits from all parts.

    An environment variable that begins with one of `prefixes` but names no setting is refused as
    a misspelling; other unknown variables belong to other programs.
    """

    title: ClassVar[str]  # the part's heading in --help
    prefixes: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Yield conditions on the part's settings; a complaint names the settings it is about."""
        return iter(())


def knob_of(setting: Field) -> Knob:
    """The Knob that a field of Config carries."""
    return setting.metadata["knob"]


def parse_setting(name: str, text: str, setting: Field) -> object:
    """Parse the text of setting `name`; raises Refusal that says what was expected."""
    accepts = knob_of(setting).accepts
    kind: Any = type(setting.default)
    try:
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        raise Refusal(f"{name}={text!r}: expected {expected}") from None
    if kind is str and accepts and value not in accepts:
        raise Refusal(f"{name}={text!r}: expected one of {', '.join(accepts)}")
    if kind in (int, float) and not accepts[0] <= value <= accepts[1]:  # true for nan as well
        raise Refusal(f"{name}={value}: expected {accepts[0]} <= value <= {accepts[1]}")
    return value


def show_setting(value: object) -> str:
    """Format a setting's value as one would write it in the environment."""
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return text if text and text.isprintable() else repr(text)


class LimitedSettings:
    """A view of Config that refuses to show settings outside the given reaches; see Knob.

    The network reads its settings through it: one that depended on a setting that does not travel
    in the artifact would train and export, and then could not be rebuilt.
    """

    def __init__(self, cfg: Config, reaches: tuple[str, ...], reader: str) -> None:
        self._cfg = cfg
        self._reaches = reaches
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        """Look up a setting, or a property, which is computed through this same view."""
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
# The processes of a run and the files that it leaves behind.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class RunSettings(Part):
    """Where a run works and what it leaves behind."""

    title = "Run"

    preset: str = run_knob("", (), "Apply these presets, comma-separated; a later one wins.")
    not_ours: str = run_knob(
        "", (), "Ignore these variables, comma-separated: they look like settings and are not."
    )
    run_id: str = run_knob(
        "", (), "Name the run's folder under RUNS_DIR; empty takes UTC time and a random suffix."
    )
    runs_dir: str = run_knob("runs", (), "Make run folders in this folder.")
    seed: int = training_knob(1337, (0, 2**31 - 1), "Seed the initial weights and the data order.")
    attention: str = run_knob(
        "auto",
        ("auto", "fa3", "cudnn", "flash", "sdpa"),
        "Compute attention on CUDA with this kernel: auto takes the fastest in a trial, sdpa "
        "leaves the choice to torch.",
    )
    compile: str = run_knob(
        "auto", ("auto", "0", "1"), "Use torch.compile; auto does on CUDA and in long CPU runs."
    )
    cpu_bf16: str = training_knob(
        "auto",
        ("auto", "0", "1"),
        "On a CPU, multiply matrices in bfloat16 during training and keep the rest in float32; "
        "auto does so if the processor can and a trial is faster, but never in runs that end by "
        "steps or counted work, which repeat to the bit.",
    )
    resume: bool = run_knob(False, (), "Continue from the last checkpoint of RUN_ID, if any.")
    init_from: str = run_knob(
        "", (), "Start from the weights of another run: its artifact.bin or a checkpoint."
    )
    log_to: str = run_knob(
        "files",
        ("files", "tensorboard"),
        "With tensorboard, also write event files to the run folder; needs that package.",
    )
    checkpoint_seconds: float = run_knob(
        0.0,
        (0.0, 1e7),
        "Write checkpoints this many seconds apart; 0 writes them on a signal and at the end only.",
    )
    watchdog_seconds: float = run_knob(
        600.0, (0.1, 1e7), "Give up after waiting this many seconds for the other ranks."
    )
    train_log_every: int = run_knob(
        0, (0, math.inf), "Log one step in this many; 0 logs about 50 lines a run."
    )
    val_loss_every: int = run_knob(
        4000, (0, math.inf), "Validate after each this many steps; 0 validates at the end only."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A run's name must be valid for a folder, and only a named run can be resumed."""
        yield (
            re.fullmatch(r"[\w.-]{0,100}", cfg.run_id) and cfg.run_id not in (".", ".."),
            "RUN_ID must be up to 100 letters, digits, '_', '-' and '.'",
        )
        yield (
            cfg.cpu_bf16 != "1" or cfg.compile != "1",
            "CPU_BF16=1 has no effect on compiled training: it cannot be combined with COMPILE=1",
        )
        yield cfg.run_id or not cfg.resume, "RESUME needs the RUN_ID of the run to continue"


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(Part):
    """What a run may spend."""

    title = "Budgets"

    iterations: int = training_knob(20000, (1, 10**8), "Train for at most this many steps.")
    max_wallclock_seconds: float = training_knob(
        600.0, (0.0, 1e7), "Bound training and calibration to this many seconds; 0 sets no bound."
    )
    max_train_tflops: float = training_knob(
        0.0,
        (0.0, 1e9),
        "Bound training and calibration to this many TFLOP (10^12 floating-point operations), "
        "counted from shapes and so equal on every machine; 0 sets no bound.",
    )
    eval_wallclock_seconds: float = run_knob(
        600.0, (0.0, 1e7), "Bound the scoring of the artifact to this many seconds."
    )
    artifact_limit_bytes: int = training_knob(
        16_000_000, (1, 1 << 40), "Bound code and artifact together to this many bytes."
    )
    warmup_steps: int = training_knob(
        20, (0, 1000), "Warm up with this many steps before the clock starts, then undo them."
    )

    @property
    def step_driven(self) -> bool:
        """Whether a number of steps or operations ends the run, rather than the clock."""
        return self.max_wallclock_seconds == 0

    @property
    def budget_unit(self) -> str:
        """The unit of the run's budget; ITERATIONS bounds every run as well."""
        if self.max_train_tflops:
            return "operations"
        return "steps" if self.step_driven else "seconds"

    @property
    def whole_budget(self) -> float:
        """What training and calibration may cost, in budget_unit."""
        budgets = {
            "operations": round(1e12 * self.max_train_tflops),
            "steps": self.iterations,
            "seconds": self.max_wallclock_seconds,
        }
        return budgets[self.budget_unit]

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """With two budgets, the machine's speed would decide which of them ends the run."""
        yield (
            cfg.max_wallclock_seconds == 0 or cfg.max_train_tflops == 0,
            "a run has one budget: set one of MAX_WALLCLOCK_SECONDS and MAX_TRAIN_TFLOPS to 0",
        )


def say(line: str, to_stderr: bool = False) -> None:
    """Write a line to the console if that is still open: lost output must not end a run."""
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is None:  # it was closed before the process began
        return
    try:
        tqdm.write(line, file=stream)
        stream.flush()
    except UnicodeEncodeError:
        tqdm.write(line.encode("ascii", "backslashreplace").decode(), file=stream)
    except (OSError, ValueError):
        discard_output(stream)


def discard_output(stream: TextIO) -> None:
    """Point a broken stream at /dev/null, so that Python's flush at exit does not fail."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_standard_streams() -> None:
    """Open /dev/null in place of those of stdin, stdout and stderr that are closed.

    Otherwise the next file that the run opens would get that descriptor, and with it everything
    that a library prints there.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free one
        if descriptor > 2:
            os.close(descriptor)
            return


def divide_up(total: Any, size: Any) -> Any:
    """total / size rounded up, of integers or integer arrays: how many parts of `size` it takes."""
    return -(-total // size)


# Settings whose values may grow when a run is resumed.
BUDGETS = ("iterations", "max_wallclock_seconds", "max_train_tflops")
EXIT_FAILED, EXIT_REFUSED, EXIT_OVER_LIMIT, EXIT_INTERRUPTED = 1, 2, 3, 130
# Tokens in a forward. On a GPU memory is the bound. On a CPU the activations of a scoring forward
# should stay in its caches.
GPU_FORWARD_TOKENS, CPU_FORWARD_TOKENS, CPU_SCORING_TOKENS = 98_304, 8_192, 4_096


class Clock:
    """Seconds that count against a budget; the clock runs only inside `with clock.running()`."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.banked = 0.0
        self.since: float | None = None  # when it last began to run; None while it is stopped

    def elapsed(self) -> float:
        return self.banked + (self.now() - self.since if self.since is not None else 0.0)

    @contextlib.contextmanager
    def running(self, runs: bool = True) -> Iterator[None]:
        """Count the time spent inside the block; running(False) leaves that time out."""
        ran_before = self.since is not None
        self.set_running(runs)
        try:
            yield
        finally:
            self.set_running(ran_before)

    def set_running(self, runs: bool) -> None:
        """Bank the time so far, and start or stop the clock."""
        self.banked = self.elapsed()
        self.since = self.now() if runs else None


class Ranks:
    """The processes that share a run, seen from one of them, and what they exchange.

    Every decision that ranks must share goes through agree(), every sum through add_up() or
    scatter_sum(). With a single process these return what they are given.
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
        self.store = store  # through which the processes found each other
        # Muon divides each stack of matrices into this many parts; with 1, every rank works on all.
        self.num_parts = world_size if split_stacks else 1
        # Decisions are exchanged through host memory, so that they never wait for a GPU queue.
        self.control: dist.ProcessGroup | None = None
        # The time-out of this group is long: rank 0 may quantize alone while the others wait.
        self.patient: dist.ProcessGroup | None = None
        if world_size > 1 and dist.is_initialized():
            seconds = timedelta(seconds=watchdog_seconds)
            self.control = dist.new_group(backend="gloo", timeout=seconds)
            self.patient = dist.new_group(backend="gloo", timeout=20 * seconds)

    def agree(self, value: float) -> float:
        """Return rank 0's value on every rank."""
        return self.largest(value if self.is_main else -math.inf)

    def largest(self, value: float) -> float:
        """Return the largest of the ranks' values on every rank, in float64."""
        if self.world_size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return box.item()

    def any_of(self, condition: bool) -> bool:
        """Whether the condition holds on any rank."""
        return self.largest(float(condition)) > 0

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
        """This rank's part (m, ...) of a stack (n, ...); zeros pad it so that parts are equal."""
        count = divide_up(len(stack), self.num_parts)
        first = count * (self.rank % self.num_parts)
        part = stack[first : first + count].to(self.device)
        return torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])])

    def scatter_sum(self, stack: Tensor) -> Callable[[], Tensor]:
        """Start to sum a stack (n, ...) over ranks; call the result to get this rank's part."""
        if self.world_size == 1:
            return lambda: stack
        if self.num_parts == 1:
            return waiter(stack, dist.all_reduce(stack, async_op=True))
        padding = stack.new_zeros(-len(stack) % self.num_parts, *stack.shape[1:])
        whole = torch.cat([stack, padding])
        part = torch.empty_like(whole[: len(whole) // self.num_parts])
        return waiter(part, dist.reduce_scatter_single(part, whole, async_op=True))

    def gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Start to gather all ranks' parts (m, ...); call the result to get the padded stack."""
        if self.num_parts == 1:
            return lambda: part
        whole = part.new_empty(self.num_parts * len(part), *part.shape[1:])
        return waiter(whole, dist.all_gather_single(whole, part.contiguous(), async_op=True))

    def broadcast(self, content: bytes, source: int = 0) -> bytes:
        """Return the bytes of rank `source` on every rank; no shared file system is needed."""
        box = [content]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=source, group=self.patient)
        return box[0]

    def copy_from_main(self, model: nn.Module) -> None:
        """Copy rank 0's parameters to all ranks: different CPUs draw slightly different ones."""
        if self.world_size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def copy_of(self, own: Tensor | None, owner: int, shape: tuple[int, ...]) -> Tensor:
        """Return on every rank, in host memory, the float32 tensor that is `own` on the owner."""
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
        checksum = float(total.item() % 2**50)  # a float64 holds it exactly
        if self.any_of(checksum != self.agree(checksum)):
            raise RuntimeError(f"step {step}: the ranks' weights differ; do not use this run")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """If some ranks raise Refusal in this block, raise that of the lowest of them on all ranks.

        Otherwise the others would wait for that rank in vain, or end without saying why.
        """
        refusal = None
        try:
            yield
        except Refusal as error:
            refusal = error
        # The lowest rank that refused, or inf if none did.
        first = -self.largest(-math.inf if refusal is None else -self.rank)
        if first < math.inf:
            text = f"rank {first:.0f}: {refusal}" if first else str(refusal)
            raise Refusal(self.broadcast(text.encode(), int(first)).decode())

    def absent_ranks(self) -> str:
        """After a time-out, list the ranks that never came to the exchange, or "unknown".

        Every rank that waited in vain leaves a mark in the store; those without one are absent.
        """
        store = self.store
        missing = set(range(self.world_size))
        if store is None:
            return "unknown"

        def ask() -> None:
            store.set(f"rank {self.rank} waited", "")
            while True:
                here = [r for r in missing if store.check([f"rank {r} waited"])]
                missing.difference_update(here)
                time.sleep(0.1)

        # A thread asks, because a store never answers if the process that holds it is dead.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(3.0)
        if self.rank in missing:  # the store did not even return this rank's own mark
            return "unknown"
        return ", ".join(map(str, sorted(missing)))


def waiter(result: Tensor, work: dist.Work) -> Callable[[], Tensor]:
    """Make a function that waits for `work` and gives `result`; waiting again costs nothing."""

    @functools.cache
    def wait() -> Tensor:
        work.wait()
        return result

    return wait


class RunFolder:
    """The run's folder, runs/<RUN_ID>/: log, metrics, settings, source, checkpoints, artifact.

    Only rank 0 has a folder and writes. The other ranks call the same methods, which then do
    nothing, so that callers need not distinguish.
    """

    def __init__(self, cfg: Config, ranks: Ranks) -> None:
        self.cfg = cfg
        self.ranks = ranks
        self.path: Path | None = None
        self.source = Path(__file__).read_bytes()  # read once: it may be edited during the run
        self.larger_budgets: list[str] = []  # budgets that have grown since the run began
        self.draws = cfg.log_to == "tensorboard"  # whether to write tensorboard's curves
        self.curves: Any = None  # tensorboard's writer, once there is something to write
        self.drawn_step = 0  # the last step of which a curve has a point

    def open(self) -> None:
        """Make the folder, or with RESUME=1 continue in it; raises Refusal if it is unsuitable."""
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
        settings = folder / "settings.json"
        source = folder / "train_gpt.py"
        self.refuse_other_settings(settings)
        if source.is_file() and source.read_bytes() != self.source:
            raise Refusal(
                f"RESUME=1: the run began with {source}, and this train_gpt.py differs from it: "
                "resume with that file"
            )
        no_locks = self.lock_folder(folder)
        self.path = folder
        for partial in folder.glob(".*.partial"):  # left by a process that died while it wrote
            partial.unlink()
        for log in (folder / "log.txt", folder / "metrics.jsonl"):
            if log.is_file():
                whole_lines, newline, _cut_line = log.read_bytes().rpartition(b"\n")
                write_file(log, whole_lines + newline)
        write_file(settings, json.dumps(asdict(self.cfg), indent=1).encode())
        write_file(source, self.source)
        if no_locks:
            self.log(
                f"warning: {folder} cannot be locked ({no_locks}): see to it that no other "
                "process works in it, or choose a RUNS_DIR on another file system"
            )

    def lock_folder(self, folder: Path) -> str:
        """Lock the folder until this process ends; raises Refusal if another one has locked it.

        Returns "", or the reason why the file system cannot lock: the run goes on without.
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
        """Raise Refusal if the settings of the run to resume would give another result.

        A budget may have grown, so that a run which has ended can continue: see larger_budgets.
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
        """The run's checkpoints, newest first; files with other names are the user's."""
        by_step = {}
        for path in self.path.iterdir() if self.path is not None else ():
            if name := re.fullmatch(r"checkpoint_(\d+)\.pt", path.name):
                by_step[int(name[1])] = path
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def last_checkpoint(self) -> dict | None:
        """Load the newest readable checkpoint on every rank; None if the run begins anew."""
        content = b""
        for path in self.checkpoints() if self.cfg.resume else ():
            try:
                content = read_checkpoint(path)
                break
            except Exception as error:  # torch.load documents no exceptions
                self.log(f"warning: {path} cannot be read ({error}); trying the one before")
        content = self.ranks.broadcast(content)
        # Loaded to the CPU: otherwise torch puts every rank's tensors on the GPU that saved them.
        return torch.load(io.BytesIO(content), "cpu", weights_only=True) if content else None

    def append(self, name: str, text: str) -> None:
        """Append text to a file of the run folder, if the folder has been opened."""
        if self.path is not None:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(text)

    def log(self, template: str, event: str = "", **facts: object) -> None:
        """Log template.format(**facts) unless it is empty; write a named event to metrics.jsonl."""
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
        """With LOG_TO=tensorboard, add the numbers of a step or a score to its curves.

        Curves are never essential: if they cannot be written, the run goes on.
        """
        if not self.draws or self.path is None or event not in ("step", "eval"):
            return
        self.drawn_step = facts["step"] or self.drawn_step  # a score after training has step 0
        try:
            if self.curves is None:
                self.curves = tensorboard_writer()(self.path / "tensorboard", flush_secs=10)
            for name, value in facts.items():
                if isinstance(value, int | float) and name not in ("step", "legal"):
                    tag = f"{facts.get('name', event)}/{name}"
                    self.curves.add_scalar(tag, value, self.drawn_step)
        except Exception as error:  # tensorboard does not document what it raises
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
        """Make a progress bar with ETA on rank 0's terminal; it is silent without a terminal."""
        return tqdm(
            desc=label,
            leave=False,
            # With None, tqdm disables itself unless stderr is a terminal; it fails if it is closed.
            disable=None if self.ranks.is_main and sys.stderr is not None else True,
            unit_scale=True,
            dynamic_ncols=True,
            **how,
        )


def read_checkpoint(path: Path) -> bytes:
    """Read the bytes of a checkpoint; raises some exception if torch.load could not read it."""
    content = path.read_bytes()
    archive = zipfile.ZipFile(io.BytesIO(content))
    # torch compresses nothing; a stranger's compressed file may expand without bound.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("it is compressed")
    damaged = archive.testzip()  # torch verifies no checksums
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    torch.load(io.BytesIO(content), "cpu", weights_only=True)
    return content


def tensorboard_writer() -> Any:
    """Import torch's writer of tensorboard's event files; raises Refusal without that package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # it is optional, and may be of a version that torch cannot use
        raise Refusal(
            "LOG_TO=tensorboard needs the Python package tensorboard: pip install tensorboard "
            f"({error})"
        ) from None
    return SummaryWriter


class Ledger:
    """What a run has used and done: clocks, counts, and whether it may stand as a record."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.training_clock = Clock()  # training and calibration
        self.scoring_clock = Clock()
        self.table_clock = Clock(time.process_time)  # processor time of counts and their mixture
        self.trained_seconds = 0.0  # the training clock when calibration began
        self.training_operations = 0  # floating-point operations of training and calibration
        self.scoring_operations = 0
        self.calibration_tokens = 0
        self.occasions = Counter[str]()  # by technique: how often it could have acted
        self.activity = Counter[str]()  # by technique: how often it acted
        self.was_paused = False  # whether the process was paused since note_pause() was called
        self.ineligible: list[str] = []  # why the run cannot stand as a record

    def note(self, name: str, acted: bool) -> None:
        """Count one occasion on which a configured technique could act, and whether it did."""
        self.occasions[name] += 1
        self.activity[name] += int(acted)

    def mark_ineligible(self, reason: str) -> None:
        """Record a reason why the run cannot stand as a record, and warn of it."""
        self.ineligible.append(reason)
        self.folder.log(f"warning: not eligible as a record: {reason}")

    def note_pause(self, when: str) -> None:
        """Mark the run ineligible if the process was paused since the last call."""
        if self.was_paused:
            self.was_paused = False
            self.mark_ineligible(f"paused and continued {when}: its clock went on meanwhile")

    def log_activity(self) -> None:
        """Log how often each configured technique acted; warn of any that never did."""
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
        self.product_dtype = self.dtype  # the type in which training multiplies matrices
        self.phase = "starting"  # what the run is doing, for the message of a failure
        self.signals: list[int] = []  # signals that have asked training to end
        tokens = GPU_FORWARD_TOKENS if device.type == "cuda" else CPU_FORWARD_TOKENS
        self.micro_batch_rows = cfg.micro_batch_seqs or max(1, tokens // cfg.train_seq_len)

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations: bfloat16 on CUDA, float32 elsewhere (but see CPU_BF16)."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def compiled(self) -> bool:
        """Whether the whole forward is compiled; compile_blocks() may compile less on a CPU."""
        if self.cfg.compile == "auto":
            return self.device.type == "cuda"
        return self.cfg.compile == "1"

    @property
    def adaptation_rows(self) -> int:
        """How many rows each rank takes in a step of test-time training."""
        return divide_up(self.cfg.ttt_batch_seqs, self.ranks.world_size)

    @property
    def scored_rows(self) -> int:
        """How many windows one forward scores: EVAL_BATCH_SEQS, or fewer on a CPU."""
        if self.device.type != "cpu":
            return self.cfg.eval_batch_seqs
        fitting = max(1, CPU_SCORING_TOKENS // self.cfg.eval_seq_len)
        return min(self.cfg.eval_batch_seqs, fitting)

    def with_settings(self, cfg: Config) -> Run:
        """Return a copy of the run with other settings; it shares ranks, folder and ledger."""
        changed = copy.copy(self)
        changed.cfg = cfg
        return changed

    @classmethod
    @contextlib.contextmanager
    def start(cls, cfg: Config) -> Iterator[Run]:
        """Join the other ranks, handle signals inside the block, and report an error that ends it.

        A Refusal passes on to main(), which prints it; any other error ends the process here.
        """
        run = cls(cfg, *join_ranks(cfg))
        replaced = handle_end_signals(run.on_signal)  # handlers to put back, by signal
        if replaced:  # it is empty outside the main thread, which alone may install handlers
            replaced[signal.SIGCONT] = signal.signal(signal.SIGCONT, run.on_continue)
        try:
            yield run
        except (Refusal, BrokenPipeError):
            raise
        except Exception as error:
            run.tell_failure(error)
            raise SystemExit(EXIT_FAILED) from None
        finally:
            run.folder.close()
            for number, handler in replaced.items():
                signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()

    def tell_failure(self, error: Exception) -> None:
        """Print in one line what failed, and write the traceback to log.txt."""
        text = f"{type(error).__name__}: " + str(error).strip().split("\n")[0]
        if self.ranks.store is not None and "timed out" in str(error).lower():
            absent = self.ranks.absent_ranks()
            text = f"waited {self.cfg.watchdog_seconds:g} s; not there: rank {absent}"
        line = f"error: rank {self.ranks.rank}, during {self.phase}: {text}"
        say(line, to_stderr=True)
        with contextlib.suppress(OSError):  # if the disk is full, the line above says so
            self.folder.append("log.txt", "".join(traceback.format_exception(error)))

    @property
    def signal(self) -> int:
        """The number of the signal that asked training to end; 0 if none did."""
        return self.signals[0] if self.signals else 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Let training write a checkpoint and end; at any other time, end the process at once.

        A second SIGINT or SIGTERM ends training at once too. Other signals may come twice without
        meaning that: SIGXCPU comes every second, and a closing terminal may send two signals.
        """
        insists = number in self.signals and number in (signal.SIGINT, signal.SIGTERM)
        if self.phase != "training" or insists:
            self.stop(number, f"during {self.phase}; what the run folder holds was kept")
        self.signals.append(number)

    def on_continue(self, number: int, frame: FrameType | None) -> None:
        """Note that the process was paused, by Ctrl-Z or a scheduler, and now continues."""
        self.ledger.was_paused = True

    def stop(self, number: int, situation: str) -> None:
        """End the process because of a signal."""
        if self.ranks.is_main:
            say(f"error: {signal.Signals(number).name} {situation}", to_stderr=True)
        raise SystemExit(128 + number)

    def wait_for_gpu(self) -> None:
        """Wait until the GPU's queue, if any, is empty, so that a clock measures finished work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def to_device(self, x: Tensor) -> Tensor:
        """Copy `x` from the host to the run's device, to a GPU without waiting for it."""
        pinned = x.contiguous().pin_memory() if self.device.type == "cuda" else x
        return pinned.to(self.device, non_blocking=True)

    def fetch(self, x: Tensor) -> Callable[[], list[float]]:
        """Start to copy `x` to the host; call the result to wait for that and get the numbers."""
        if self.device.type != "cuda":
            return x.tolist
        host = x.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event()

        def numbers() -> list[float]:
            copied.synchronize()
            return host.tolist()

        return numbers

    def log_header(self, notes: list[str]) -> None:
        """Log what determines the run: notes, settings, versions, machine, source."""
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


def refuse_odd_ranks(rank: int, local_rank: int, world_size: int, on_host: int) -> None:
    """Raise Refusal if the launcher's variables contradict each other.

    on_host: LOCAL_WORLD_SIZE, the number of processes on this host.
    """
    if rank >= world_size:
        raise Refusal(
            f"RANK={rank}, WORLD_SIZE={world_size}: ranks go from 0 to WORLD_SIZE - 1; start "
            "the processes with torchrun, or a single one without these variables"
        )
    if "LOCAL_WORLD_SIZE" in os.environ and not local_rank < on_host <= world_size:
        raise Refusal(
            f"LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={on_host}, WORLD_SIZE={world_size}: "
            "expected LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE; torchrun sets them so"
        )
    if "WORLD_SIZE" in os.environ:
        return
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if os.environ.get(name, "0") not in ("", "0"):
            raise Refusal(
                f"{name}={os.environ[name]}, but no WORLD_SIZE: each process would train alone; "
                "start one torchrun on each host, or a single process"
            )


def join_ranks(cfg: Config) -> tuple[int, int, torch.device, dist.Store | None]:
    """Join the process group that torchrun's variables describe; without them, work alone.

    Returns rank, world size, device, and the store through which the processes found each other
    (None for a single process). Raises Refusal if the variables contradict each other, or if the
    other processes do not come.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    given = {name: os.environ.get(name, value) for name, value in alone.items()}
    if not all(map(str.isdecimal, given.values())):
        raise Refusal(
            f"{', '.join(given)} are {[*given.values()]}: expected "
            "whole numbers; torchrun sets them, a single process needs none"
        )
    rank, local_rank, world_size, on_host = map(int, given.values())
    refuse_odd_ranks(rank, local_rank, world_size, on_host)
    device = pick_device(local_rank, world_size, on_host)
    # torchrun sets OMP_NUM_THREADS=1, however many cores there are. A user who really wants one
    # thread sets MKL_NUM_THREADS too.
    by_torchrun = os.environ.get("OMP_NUM_THREADS") == "1" and "MKL_NUM_THREADS" not in os.environ
    if device.type == "cpu" and on_host > 1 and by_torchrun:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_host))
    if world_size == 1:
        return rank, world_size, device, None
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise Refusal(
            f"WORLD_SIZE={world_size}, but the processes do not find each other "
            f"({reason}); torchrun sets up all that they need"
        ) from None
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):  # torchrun on one host
        # The store outlives a restart; a prefix hides what the dead processes left in it.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=cfg.watchdog_seconds),
    )
    return rank, world_size, device, store


def pick_device(local_rank: int, world_size: int, on_host: int) -> torch.device:
    """Pick this process's device; raises Refusal if there are fewer GPUs than processes."""
    if torch.cuda.is_available():
        if on_host > (gpus := torch.cuda.device_count()):
            raise Refusal(
                f"{on_host} processes on this host, but it has {gpus} GPU(s): start one "
                "process for each (--nproc_per_node)"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available() and world_size == 1:
        return torch.device("mps")
    return torch.device("cpu")


def processor() -> str:
    """The CPU's model name, or its architecture if the system does not tell the name."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it appears under its name complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
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
        "./data/datasets/fineweb10B_sp1024", (), "Read training and validation shards from here."
    )
    tokenizer_path: str = run_knob(
        "./data/tokenizers/fineweb_1024_bpe.model", (), "Tokenize with this SentencePiece model."
    )
    loader: str = training_knob(
        "shuffled", ("shuffled", "sequential"), "Read training rows in this order."
    )
    train_batch_tokens: int = training_knob(
        786432, (2, 1 << 30), "Train on this many tokens a step, over all ranks."
    )
    train_seq_len: int = training_knob(
        2048, (2, 1 << 20), "Cut training text into rows of this many tokens."
    )
    doc_max_len: int = training_knob(
        0,
        (0, 1 << 20),
        "With ATTN_DOCS=1, cut documents after this many tokens; 0 cuts them at a row's end only.",
        tries=(5,),
    )
    doc_growth: str = training_knob(
        "",
        (),
        "With ATTN_DOCS=1, cut documents after fewer tokens early in the run: pairs of a share "
        "of the run and the length until then, such as 0.1:1024,0.7:2048 (#2014); DOC_MAX_LEN "
        "holds for the rest.",
        tries=("0.3:2,0.6:4",),
    )
    doc_growth_steps: int = training_knob(
        32,
        (0, 10**6),
        "Let learning rates rise from 0 over this many steps whenever DOC_GROWTH lengthens "
        "documents.",
    )
    micro_batch_seqs: int = training_knob(
        0,
        (0, 1 << 20),
        "Pass this many rows through the model at once; 0: as many as have 98,304 tokens, on a "
        "CPU 8,192.",
    )

    @property
    def rows_per_step(self) -> int:
        """The number of rows in a step's global batch."""
        return self.train_batch_tokens // self.train_seq_len

    @property
    def longest_document(self) -> int:
        """The number of tokens after which a document is cut in training, if ATTN_DOCS=1."""
        return self.doc_max_len or self.train_seq_len

    @property
    def context_stages(self) -> list[tuple[float, int]]:
        """DOC_GROWTH as stages: the share of the run at which each ends, and its longest document.

        The last stage is that of DOC_MAX_LEN. Raises Refusal if DOC_GROWTH cannot be parsed.
        """
        stages = []
        for part in self.doc_growth.replace(" ", "").split(",") if self.doc_growth else ():
            if not re.fullmatch(r"(0?\.\d{1,9}):([1-9]\d{0,6})", part):
                raise Refusal(
                    f"DOC_GROWTH={self.doc_growth!r}: expected shares of the run below 1 and "
                    "lengths in tokens, such as 0.1:1024,0.7:2048"
                )
            share, length = part.split(":")
            stages.append((float(share), int(length)))
        return [*stages, (1.0, self.longest_document)]

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A batch is a whole number of rows, and documents only grow."""
        yield (
            cfg.train_batch_tokens % cfg.train_seq_len == 0,
            "TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN",
        )
        for before, after in itertools.pairwise(cfg.context_stages):
            grows = before[0] < after[0] and before[1] < after[1]
            yield grows, "DOC_GROWTH must have rising shares, and lengths that rise to DOC_MAX_LEN"


SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
TOKEN_BYTES = 2
BOS = 1  # the token that begins a document
# Training sets of up to FULL_SCAN_TOKENS are searched for bad ids before the run. In larger ones
# only the first SCAN_TOKENS of each shard are searched then, and every batch when it is used.
FULL_SCAN_TOKENS = 200_000_000
SCAN_TOKENS = 1 << 20
SIDECAR = "fineweb_val.json"
OPEN_SHARDS = 128  # training shards that stay mapped; macOS allows a process 256 open files


def open_shard(path: Path, vocab_size: int, scan_tokens: int | None = None) -> np.memmap:
    """Memory-map a shard's tokens, uint16 (n,); raises Refusal unless header, size and ids fit."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=256)
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
    """Raise RuntimeError if the file has been cut short: reading on would raise SIGBUS."""
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
    """List the shards of a split in order; raises Refusal if there are none."""
    # The digit keeps out fineweb_val_bytes_000000.bin, which may stand beside the shards.
    if paths := sorted(Path(folder).glob(f"fineweb_{split}_[0-9]*.bin")):
        return paths
    raise Refusal(f"DATA_PATH={folder}: no fineweb_{split}_*.bin; data/prepare.py makes them")


@dataclass
class Batch:
    """B rows of T tokens, their targets, and facts about both; None where a fact is not needed.

    There is a target at each of the T places of a row, or only at S chosen ones.
    """

    input_ids: Tensor  # int64 (B, T)
    target_ids: Tensor  # int64 (B, T), or (B, S) with `places`
    places: Tensor | None = None  # int64 (B, S), the places in each row that have a target
    # Attention stays inside documents: int64 (B, T), see document_numbers(). None: whole rows.
    documents: Tensor | None = None
    boundaries: Tensor | None = None  # int32 (N,), see document_boundaries()
    # These have the shape of target_ids, in int64.
    scored: Tensor | None = None  # 1 where a target counts, 0 where not
    target_bytes: Tensor | None = None  # UTF-8 bytes of each target
    hint_ids: Tensor | None = None  # the token whose logit NGRAM_TILT raises, or -1

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `move` to each tensor of the batch, for example to bring it to a device."""
        tensors = ((each.name, getattr(self, each.name)) for each in fields(self))
        batch = Batch(**{name: move(x) for name, x in tensors if x is not None})
        if batch.boundaries is not None:  # one compiled graph shall serve any number of documents
            torch._dynamo.maybe_mark_dynamic(batch.boundaries, 0)
        return batch

    def by_document(self, longest: int) -> Batch:
        """Keep attention inside documents, which are cut after `longest` tokens."""
        documents = document_numbers(self.input_ids, longest)
        return replace(self, documents=documents, boundaries=document_boundaries(documents))


def document_numbers(input_ids: Tensor, longest: int) -> Tensor:
    """Number each token's document, through all rows in order: int64 (B, T) -> (B, T).

    A document begins at each BOS, at each start of a row, and `longest` tokens after it began.
    """
    places = torch.arange(input_ids.size(1), device=input_ids.device)
    begins = (input_ids == BOS) | (places == 0)
    start = torch.where(begins, places, 0).cummax(1).values  # where each token's document began
    begins = (places - start) % longest == 0
    return begins.flatten().cumsum(0).view_as(input_ids) - 1


def document_boundaries(documents: Tensor) -> Tensor:
    """The places where documents begin in the flattened rows, then where the last ends: int32 (N,).

    That end is repeated until N is a multiple of 64, so that few compiled graphs serve all batches.
    """
    lengths = documents.flatten().bincount()
    ends = lengths.cumsum(0)
    padding = 64 - (len(ends) + 1) % 64
    ends = F.pad(ends, (1, 0))
    return F.pad(ends, (0, padding), value=documents.numel()).to(torch.int32)


class TrainingRows:
    """Training rows of T+1 tokens, numbered 0, 1, ... without end; the same for every world size.

    LOADER=sequential: the shards, joined in order, are a stream that begins anew at its end; row n
    begins at token n T. LOADER=shuffled: shards are cut into blocks of T tokens, each read with the
    token after it; each epoch is a permutation of all blocks, drawn from SEED.
    """

    def __init__(self, cfg: Config) -> None:
        paths = shard_paths(cfg.data_path, "train")
        total = sum(path.stat().st_size // TOKEN_BYTES for path in paths)
        self.scan_tokens = None if total <= FULL_SCAN_TOKENS else SCAN_TOKENS
        self.shards = paths
        self.most_open = OPEN_SHARDS
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if open_files != resource.RLIM_INFINITY:  # half of the limit is left to everything else
            self.most_open = min(OPEN_SHARDS, open_files // 2)
        self.opened: dict[int, np.memmap] = {}  # by number, in the order in which they were opened
        self.seq_len = cfg.train_seq_len
        self.seed = cfg.seed
        self.vocab_size = cfg.vocab_size
        self.shuffled = cfg.loader == "shuffled"
        self.longest_document = cfg.longest_document if cfg.attn_docs else 0
        sizes = []
        for number, path in enumerate(paths):
            tokens = open_shard(path, cfg.vocab_size, self.scan_tokens)
            sizes.append(len(tokens))
            self.keep_open(number, tokens)
        # The number of each shard's first token and first block, then the total.
        self.first_token = np.cumsum([0, *sizes])
        self.first_block = np.cumsum([0, *((size - 1) // self.seq_len for size in sizes)])
        self.num_tokens = int(self.first_token[-1])
        self.num_blocks = int(self.first_block[-1])
        self.epoch = -1  # the epoch whose permutation is in `order`
        self.order: np.ndarray = np.empty(0, np.uint32)
        if not self.num_blocks:
            raise Refusal(
                f"DATA_PATH={cfg.data_path}: no shard holds a row of "
                f"TRAIN_SEQ_LEN={self.seq_len} tokens and one more: lower TRAIN_SEQ_LEN"
            )

    def batch(self, first_row: int, num_rows: int, longest_document: int | None = None) -> Batch:
        """Rows first_row, first_row + 1, ... with all their targets: int64 (num_rows, T) each.

        With ATTN_DOCS=1 documents are cut after `longest_document` tokens; None cuts them as at the
        end of the run.
        """
        for tokens in self.opened.values():
            refuse_cut_shard(tokens)
        rows = np.stack([self.row(n) for n in range(first_row, first_row + num_rows)])
        # A RuntimeError: the run has begun, and it is too late for a Refusal.
        check_ids(rows, self.vocab_size, "training shards", RuntimeError)
        ids = torch.from_numpy(rows.astype(np.int64))
        batch = Batch(ids[:, :-1], ids[:, 1:])
        if not self.longest_document:
            return batch
        return batch.by_document(longest_document or self.longest_document)

    def first_tokens(self, count: int) -> np.ndarray:
        """The first `count` tokens of the shards in order, or all if there are fewer: uint16."""
        parts: list[np.ndarray] = []
        missing = count
        for number in range(len(self.shards)):
            if missing == 0:
                break
            parts.append(np.asarray(self.tokens_of(number)[:missing]))
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def keep_open(self, number: int, tokens: np.memmap) -> None:
        """Keep a shard mapped; if there are too many, drop the one that was opened first."""
        self.opened[number] = tokens
        if len(self.opened) > self.most_open:
            del self.opened[next(iter(self.opened))]

    def tokens_of(self, number: int) -> np.memmap:
        """A shard's tokens, uint16 (n,); opens the shard again if it was dropped."""
        if number not in self.opened:
            try:
                tokens = open_shard(self.shards[number], self.vocab_size, 1)
            except Refusal as refusal:  # the run has begun: it is too late for a Refusal
                raise RuntimeError(str(refusal)) from None
            if len(tokens) != self.first_token[number + 1] - self.first_token[number]:
                raise RuntimeError(f"{self.shards[number]} has changed since the run began")
            self.keep_open(number, tokens)
        return self.opened[number]

    def row(self, n: int) -> np.ndarray:
        """Row n as uint16 (T+1,)."""
        if not self.shuffled:
            return self.row_of_stream(n * self.seq_len % self.num_tokens)
        epoch, position = divmod(n, self.num_blocks)
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.epoch = epoch
            self.order = generator.permutation(np.arange(self.num_blocks, dtype=np.uint32))
        block = int(self.order[position])
        shard = int(np.searchsorted(self.first_block, block, side="right")) - 1
        start = (block - int(self.first_block[shard])) * self.seq_len
        return self.tokens_of(shard)[start : start + self.seq_len + 1]

    def row_of_stream(self, start: int) -> np.ndarray:
        """T+1 tokens of the endless stream from token `start` on: uint16 (T+1,)."""
        places = (start + np.arange(self.seq_len + 1)) % self.num_tokens
        shards = np.searchsorted(self.first_token, places, side="right") - 1
        row = np.empty(len(places), np.uint16)
        for shard in np.unique(shards):
            in_shard = shards == shard
            row[in_shard] = self.tokens_of(int(shard))[places[in_shard] - self.first_token[shard]]
        return row


def piece_bytes(tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 bytes that each token stands for, and how many fewer right after BOS: int16 (V,) each.

    An ordinary piece counts its UTF-8 length, where every U+2581 is one space; a byte piece counts
    1, and a control, unknown or unused piece 0. A tokenizer with a dummy prefix begins each
    document with a space that is not in the text, so the first piece after BOS counts one less.
    """
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())]
    counts = [len(piece.replace("\u2581", " ").encode()) for piece in pieces]
    for token in range(len(pieces)):
        if tokenizer.is_byte(token):
            counts[token] = 1
        elif has_no_text(tokenizer, token):
            counts[token] = 0
    has_dummy_prefix = tokenizer.encode("a", out_type=str)[0].startswith("\u2581")
    fewer_after_bos = [has_dummy_prefix and piece.startswith("\u2581") for piece in pieces]
    return np.array(counts, np.int16), np.array(fewer_after_bos, np.int16)


def has_no_text(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> bool:
    """Whether a token is a control, unknown or unused piece."""
    return tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token)


def piece_prefixes(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """For each token, the token whose text is its longest proper prefix, or itself: int64 (V,).

    Byte pieces and pieces without text have no prefix, and are never a prefix of others.
    """
    token_of = {
        tokenizer.id_to_piece(token): token
        for token in range(tokenizer.vocab_size())
        if not (tokenizer.is_byte(token) or has_no_text(tokenizer, token))
    }
    prefixes = np.arange(tokenizer.vocab_size())
    for text, token in token_of.items():
        for end in range(len(text) - 1, 0, -1):
            if text[:end] in token_of:
                prefixes[token] = token_of[text[:end]]
                break
    return prefixes


# CaseOps: some tokenizers know words in lower case only. Marks say where the text has capitals,
# and a file beside the shards says how many bytes of the original text each token stands for.
# (parameter-golf, lossless_caps_caseops_v1; data/caseops.py has the definition)
TITLE, ALLCAPS, CAPNEXT, ESC = MARKS = "\ue001\ue002\ue003\ue004"
WORD_OR_MARK = re.compile(f"[A-Za-z]+|[{MARKS}]")
MARKED = re.compile(
    f"{ESC}(?P<literal>.)|{ALLCAPS}(?P<word>[a-z]+)|[{TITLE}{CAPNEXT}](?P<letter>[a-z])|[{MARKS}]",
    re.DOTALL,
)


def marks_capitals(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a tokenizer was made for marked text: it has a piece for each mark."""
    return all(tokenizer.piece_to_id(mark) != tokenizer.unk_id() for mark in MARKS)


def mark_word(found: re.Match[str]) -> str:
    """Replace a match of WORD_OR_MARK: put marks for a word's capitals, and ESC before a mark."""
    word = found[0]
    if word in MARKS:
        return ESC + word
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    marked = re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), word)
    return TITLE + marked[1:] if word[0].isupper() else marked


def unmark(found: re.Match[str]) -> str:
    """The text that a match of MARKED stands for; a mark that a model misplaced vanishes."""
    capitals = found["letter"] or found["word"] or ""
    return found["literal"] or capitals.upper()


def encode_text(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Encode a text, with its capitals marked if the tokenizer was made for that."""
    if marks_capitals(tokenizer):
        text = WORD_OR_MARK.sub(mark_word, text)
    return tokenizer.encode(text)


def decode_text(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int]) -> str:
    """Decode tokens to text, with capitals in place of their marks."""
    text = tokenizer.decode(ids)
    return MARKED.sub(unmark, text) if marks_capitals(tokenizer) else text


@dataclass(frozen=True)
class Validation:
    """A validation split, found to agree with its sidecar and tokenizer."""

    tokens: np.ndarray  # uint16 (N,)
    target_bytes: np.ndarray  # uint16 (N-1,), the bytes of tokens[1:], which are the targets
    fingerprint: str  # sha256 over the shards' sha256
    tokenizer_sha256: str
    documents: int  # their number
    recorded_bytes: int  # UTF-8 bytes of the whole text, as the sidecar records them
    forbidden: np.ndarray | None = None  # bool (V, V), with TOKEN_MASK: see forbidden_pairs()
    prefixes: np.ndarray | None = None  # int64 (V,), with PREFIX_TARGET: see piece_prefixes()
    accounting: str = ""  # a note on how bytes are counted, if not by the tokens' pieces

    def num_targets(self, cfg: Config) -> int:
        """The number of targets: all tokens but the first, or with EVAL_TRUNCATE full rows only."""
        targets = len(self.tokens) - 1
        return targets - targets % cfg.eval_seq_len if cfg.eval_truncate else targets


def read_sidecar(folder: str) -> dict:
    """Read what data/prepare.py recorded about a validation split; raises Refusal if it is damaged.

    Adds what follows from that: the files with their sha256, one fingerprint for all of them, and
    whether the bytes of tokens are counted in a file of their own (CaseOps).
    """
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
        facts["fingerprint"] = hashlib.sha256(hashes.encode()).hexdigest()
        if isinstance(facts["tokenizer"]["sha256"], str) and type(facts["encoded_bytes"]) is int:
            return facts
    raise Refusal(f"{path} is damaged: delete it and run data/prepare.py again")


def load_tokenizer(cfg: Config, recorded: dict) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The tokenizer and its sha256; raises Refusal unless it is the one that `recorded` names."""
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
            f"TOKENIZER_PATH={path} (sha256 {sha256[:12]}) is not the shards' tokenizer, "
            f"sha256 {recorded['sha256'][:12]}: give the one that they were made with"
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
    """How many bytes of text each token stands for, by its piece: uint16 (N,)."""
    counts, fewer_after_bos = piece_bytes(tokenizer)
    token_bytes = counts[tokens]
    token_bytes[1:] -= fewer_after_bos[tokens[1:]] * (tokens[:-1] == BOS)
    return token_bytes.astype(np.uint16)


def byte_shard(path: Path) -> Path:
    """The path of the file that counts the bytes of a validation shard's tokens, if any."""
    return path.with_name(path.name.replace("val_", "val_bytes_"))


def bytes_by_file(paths: list[Path]) -> np.ndarray:
    """How many bytes of the original text each token stands for, by the byte files: uint16 (N,)."""
    counts = []
    for path in paths:
        counts.append(open_shard(byte_shard(path), 1 << 16))  # counts, not ids: none is refused
        if byte_shard(path).stat().st_size != path.stat().st_size:
            raise Refusal(
                f"{byte_shard(path)} counts the bytes of {len(counts[-1]):,} tokens, and "
                f"{path.name} has others: delete the folder and run data/prepare.py again"
            )
    return np.concatenate(counts)


def published_accounting(sidecar: dict) -> str:
    """A note for the log on bytes counted by file: the published accounting leaves some out."""
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
    """Read the validation tokens and the bytes of each, both uint16 (N,); raises Refusal."""
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
# A BPE tokenizer never emits certain pairs of tokens, because it would merge their text in another
# way. The mask takes the probability of such tokens away and renormalizes the rest:
#     P'(x | context) = P(x | context) / (sum of P over allowed tokens) if (p, x) is allowed, else 0
# where p is the token before x. Earlier tokens do not matter: a pair occurs in some text if and
# only if its own text, encoded alone, gives this pair.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class MaskSettings(Part):
    """Whether tokens that the tokenizer cannot emit get a probability of 0."""

    title = "Token mask"

    token_mask: str = scoring_knob(
        "0",
        ("0", "eval", "1"),
        "Give no probability to tokens that the tokenizer cannot emit after the one before: never "
        "(0), when the artifact is scored (eval), or in training as well (1).",
        absent="0",
    )


# Types of pieces in a SentencePiece model, ModelProto.SentencePiece.Type; 6 is a byte.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)
BPE_MODEL = 2  # TrainerSpec.ModelType
CHECKED_PAIRS = 1 << 22  # pairs that are checked at a time


def wire_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield each field of a serialised protobuf message: its number, and its value.

    A value is an int or bytes; numbers of fixed size are given as their little-endian bytes.
    Raises Refusal if the bytes are no such message.
    """
    at = 0

    def varint() -> int:
        """Read a number, seven bits in each byte, lowest first; raises Refusal at the end."""
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
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise Refusal("the tokenizer is not a SentencePiece model")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise Refusal("the tokenizer is not a SentencePiece model")
        yield number, message[at : at + size]
        at += size


@dataclass(frozen=True)
class Pieces:
    """What a SentencePiece model file says: its pieces by id, and how it encodes."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    is_bpe: bool
    byte_fallback: bool
    escapes_spaces: bool  # whether spaces are written U+2581, so that no text holds U+0020


def read_pieces(tokenizer: sentencepiece.SentencePieceProcessor) -> Pieces:
    """Read a tokenizer's model file, whose fields are numbered in sentencepiece_model.proto."""
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
    """A symbol that is, for some time while a token's text is merged, its last (or first) one.

    Beside any other text, merges are done in the order of their scores, the best first. So the
    symbol is made at score `birth`, the worst among the merges up to the one that makes it, and
    gone at score `death`, the worst among those after it, up to the one that swallows it.
    """

    symbol: str
    birth: float
    death: float


def encode_alone(text: str, score_of: dict[str, float]) -> list[tuple[float, int]]:
    """Merge a text; returns for each merge its score and its left symbol's index at that time.

    Of all neighbours that together form a piece, those of the best score merge first, and of equal
    scores the leftmost.
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
    """A token's edges: the symbols that are ever its first, and those that are ever its last."""
    symbols = list(text)
    edges: tuple[list[Edge], list[Edge]] = ([], [])
    births = [np.inf, np.inf]  # of the present first symbol and the present last one
    since = [np.inf, np.inf]  # the worst score since each of them was made
    worst = np.inf
    for score, place in merges:
        worst = min(worst, score)
        since = [min(score, lowest) for lowest in since]
        is_swallowed = (place == 0, place + 2 == len(symbols))
        ends = (symbols[0], symbols[-1])
        for side in (0, 1):
            if is_swallowed[side]:
                edges[side].append(Edge(ends[side], births[side], since[side]))
                births[side] = worst
                since[side] = np.inf
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    for side in (0, 1):
        edges[side].append(Edge(text, births[side], -np.inf))
    return edges


@dataclass(frozen=True)
class EdgeTable:
    """All edges with one symbol, each array (n,): the tokens that have them, births and deaths."""

    ids: np.ndarray
    births: np.ndarray
    deaths: np.ndarray


def by_symbol(edges: dict[int, list[Edge]]) -> dict[str, EdgeTable]:
    """Gather the edges of all tokens by symbol."""
    gathered = defaultdict(list)
    for token, token_edges in edges.items():
        for edge in token_edges:
            gathered[edge.symbol].append((token, edge.birth, edge.death))
    tables = {}
    for symbol, rows in gathered.items():
        ids, births, deaths = zip(*rows, strict=True)
        tables[symbol] = EdgeTable(np.array(ids), np.array(births), np.array(deaths))
    return tables


def forbid_merges(
    forbidden: np.ndarray, score_of: dict[str, float], lasts: dict, firsts: dict
) -> None:
    """Forbid each pair in which a merge joins the end of the first and the start of the second.

    Both tokens are merged in one common order, the best score first, the leftmost of equals first.
    A merge over the boundary happens if both its symbols exist at the same time, and if its score
    is better than those of the merges that would swallow them. The merge that swallows the left
    symbol lies further left and so wins a tie; the one that swallows the right symbol loses it.
    """
    for text, score in score_of.items():
        for cut in range(1, len(text)):
            left = lasts.get(text[:cut])
            right = firsts.get(text[cut:])
            if left is None or right is None:
                continue
            beats_left = score > left.deaths
            beats_right = score >= right.deaths
            left_births = left.births[beats_left, None]
            left_deaths = left.deaths[beats_left, None]
            right_births = right.births[beats_right]
            right_deaths = right.deaths[beats_right]
            meet = right_births > np.minimum(left_births, left_deaths)
            meet &= left_births >= np.minimum(right_births, right_deaths)
            forbidden[np.ix_(left.ids[beats_left], right.ids[beats_right])] |= meet


def forbid_symbols(forbidden: np.ndarray, texts: dict[int, str], defined: dict[str, int]) -> None:
    """Forbid each pair whose boundary lies inside a user-defined symbol.

    texts: by token; defined: the user-defined symbols, with their tokens. They are found before
    all merges, from left to right, the longest first. So a symbol begins wherever its text does,
    except inside another symbol.
    """
    owners = set(defined.values())
    for symbol in defined:
        for cut in range(1, len(symbol)):
            start = symbol[:cut]
            rest = symbol[cut:]
            left = [
                token
                for token, text in texts.items()
                if text == start or (text.endswith(start) and token not in owners)
            ]
            right = [token for token, text in texts.items() if text.startswith(rest)]
            forbidden[np.ix_(left, right)] = True


def byte_places(known: set[str], escapes_spaces: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where bytes may stand in the UTF-8 of a character that has no piece and is spelt in bytes.

    known: the characters with a piece. Returns which byte may follow which inside a character,
    bool (256, 256), which may end a character and which may begin one, bool (256,) each.
    """
    codes = np.arange(0x110000, dtype="<u4")
    spelt = (codes < 0xD800) | (codes > 0xDFFF)  # surrogates are no characters
    spelt[[ord(character) for character in known]] = False
    if escapes_spaces:
        spelt[ord(" ")] = False
    spelling = np.frombuffer(codes[spelt].tobytes().decode("utf-32-le").encode("utf-8"), np.uint8)
    following = np.append(spelling[1:], np.uint8(0))
    goes_on = (following & 0xC0) == 0x80  # a continuation byte of UTF-8 follows
    inside = np.zeros((256, 256), bool)
    inside[spelling[goes_on], following[goes_on]] = True
    last = np.zeros(256, bool)
    last[spelling[~goes_on]] = True
    first = np.zeros(256, bool)
    first[spelling[(spelling & 0xC0) != 0x80]] = True
    return inside, last, first


def forbidden_pairs(tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Which tokens x (columns) cannot follow a token p (rows) in any encoded text: bool (V, V).

    Exact for the text and byte pieces of a BPE model, if any text may occur: texts that its
    normalizer would change are counted as possible. Next to control and unknown pieces everything
    is allowed, since a document may be cut anywhere. Nothing is forbidden for other kinds of model,
    nor for one with unused pieces, which it merges and then takes apart again. Raises Refusal if
    the tokenizer's file cannot be read.
    """
    pieces = read_pieces(tokenizer)
    size = len(pieces.texts)
    if not pieces.is_bpe or UNUSED in pieces.kinds:
        return np.zeros((size, size), bool)
    tokens = range(size)
    defined = {pieces.texts[i]: i for i in tokens if pieces.kinds[i] == USER_DEFINED}
    score_of = {pieces.texts[i]: pieces.scores[i] for i in tokens if pieces.kinds[i] == NORMAL}
    texts: dict[int, str] = {}  # of the tokens that stand for text and are emitted at all
    firsts: dict[int, list[Edge]] = {}
    lasts: dict[int, list[Edge]] = {}
    for token in tokens:
        text = pieces.texts[token]
        if pieces.kinds[token] == USER_DEFINED:
            texts[token] = text
        # A text that holds a user-defined symbol is encoded as that symbol and its surroundings.
        if pieces.kinds[token] != NORMAL or any(symbol in text for symbol in defined):
            continue
        merges = encode_alone(text, score_of)
        if len(merges) == len(text) - 1:  # its characters are merged into one token, itself
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
    """The index of the first token that may not follow the one before it; None if all may."""
    for start in range(0, len(tokens) - 1, CHECKED_PAIRS):
        block = np.asarray(tokens[start : start + CHECKED_PAIRS + 1])
        violations = forbidden[block[:-1], block[1:]]
        if violations.any():
            return start + 1 + int(violations.argmax())
    return None


def penalties(forbidden: np.ndarray) -> Tensor:
    """The token mask as a table to add to logits: -inf where forbidden, else 0; bfloat16 (V, V).

    On a CPU, adding rows of this table takes a tenth of the time of masked_fill() by a boolean one.
    """
    table = torch.zeros(forbidden.shape, dtype=torch.bfloat16)
    return table.masked_fill_(torch.from_numpy(forbidden), -torch.inf)


def mask_tokens(model: GPT, val: Validation, device: torch.device) -> None:
    """Make a model give no probability to tokens that the split's tokenizer cannot emit."""
    assert val.forbidden is not None
    model.penalty = penalties(val.forbidden).to(device)


def refuse_forbidden_pairs(tokens: np.ndarray, forbidden: np.ndarray, where: str) -> None:
    """Raise Refusal if a pair of neighbouring tokens is one that their tokenizer cannot emit."""
    place = check_stream(tokens, forbidden)
    if place is not None:
        raise Refusal(
            f"{where}: at place {place} token {int(tokens[place])} follows "
            f"{int(tokens[place - 1])}, which the tokenizer never emits, so the text was not "
            "encoded with it as a whole; TOKEN_MASK=0 goes on without the mask"
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

    vocab_size: int = model_knob(1024, (4, 65536), "Expect a tokenizer with this many pieces.")
    num_layers: int = model_knob(11, (1, 64), "Stack this many transformer blocks.")
    model_dim: int = model_knob(512, (8, 8192), "Give the residual stream this many channels.")
    num_heads: int = model_knob(8, (1, 128), "Use this many query heads, a divisor of MODEL_DIM.")
    num_kv_heads: int = model_knob(
        4, (1, 128), "Use this many key and value heads, a divisor of NUM_HEADS."
    )
    mlp_mult: float = model_knob(
        3.0, (0.25, 16.0), "Make the MLP this many times as wide as the stream.", tries=(2.0,)
    )
    mlp_act: str = model_knob(
        "leaky2", ("leaky2", "relu2"), "Activate the MLP by a squared leaky ReLU or squared ReLU."
    )
    leaky_slope: float = model_knob(
        0.5, (0.0, 1.0), "Give the leaky ReLU of MLP_ACT=leaky2 this slope below zero."
    )
    tie_embeddings: bool = model_knob(
        True, (), "Use one matrix as token embedding and output head."
    )
    logit_softcap: float = model_knob(
        30.0, (1.0, 1e4), "Bound logits z by this c, as c tanh(z / c).", tries=(15.0,)
    )
    ln_scale: str = model_knob(
        "1",
        ("0", "1", "learned"),
        "Scale the normed inputs of layer l by 1/sqrt(l+1) (1), or start its learned output gains "
        "at that value (learned).",
    )
    tied_embed_init_std: float = training_knob(
        0.005, (0.0, 1.0), "Start the token embedding with this standard deviation."
    )
    emb_svd_init: bool = training_knob(
        False, (), "Give the initial token embedding singular values that fall as k^(-1/2)."
    )
    proj_init: str = training_knob(
        "zero", ("zero", "ortho_mup"), "Start output projections at zero or scaled orthogonal."
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
        """Heads share the width evenly, and query heads share key and value heads evenly."""
        yield cfg.model_dim % cfg.num_heads == 0, "MODEL_DIM must be a multiple of NUM_HEADS"
        yield cfg.num_heads % cfg.num_kv_heads == 0, "NUM_KV_HEADS must divide NUM_HEADS"


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Part):
    """What is added to the token embedding before the first layer."""

    title = "Model: token pairs"
    prefixes: ClassVar[tuple[str, ...]] = ("SMEAR_", "BIGRAM_")

    smear_enabled: bool = model_knob(
        True, (), "Blend in the preceding token's embedding, by a learned gate (SmearGate)."
    )
    smear_form: str = model_knob(
        "channel",
        ("channel", "input"),
        "Compute SmearGate's gate from a learned number for each channel, after the first norm "
        "(channel), or from the token's first GATE_WINDOW channels, before that norm (input).",
        absent="channel",
    )
    smear_bos_mask: bool = model_knob(True, (), "Keep SmearGate's blend within documents.")
    bigram_vocab_size: int = model_knob(
        3072, (0, 1 << 20), "Embed token pairs in this many hash buckets (BigramHash); 0: none."
    )
    bigram_hash: str = model_knob(
        "xor", ("xor", "sum"), "Join the two tokens of a pair by XOR or sum; see BigramHash."
    )
    bigram_dim: int = model_knob(112, (1, 8192), "Give a BigramHash bucket this many channels.")
    bigram_bos_mask: bool = model_knob(True, (), "Keep BigramHash's pairs within documents.")
    bigram_init: str = training_knob(
        "zero_embed",
        ("zero_embed", "zero_proj"),
        "Start this factor of BigramHash at zero: its embedding table or its projection.",
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """BIGRAM_HASH=xor keeps one bucket for tokens that have no predecessor."""
        yield cfg.bigram_vocab_size != 1, "BIGRAM_VOCAB_SIZE must be 0 (off) or at least 2"


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(Part):
    """Positions, gains, gates and masks of attention."""

    title = "Model: attention"
    prefixes: ClassVar[tuple[str, ...]] = ("ROPE_", "XSA_", "ATTN_")

    qk_gain_init: float = model_knob(
        1.5, (0.0, 100.0), "Start the learned gain of normalized queries at this value."
    )
    rope_base: float = model_knob(
        10000.0, (2.0, 1e9), "Use this base for the rotary frequencies.", tries=(5e4,)
    )
    rope_dims: int = model_knob(
        16, (0, 1024), "Rotate this many dimensions of each head; 0 rotates all of them."
    )
    rope_ntk_ref: int = model_knob(
        1024, (0, 1 << 20), "Raise ROPE_BASE in rows of more tokens than this; 0 never does."
    )
    xsa_last_n: int = model_knob(
        11, (0, 64), "Use exclusive self attention (XSA) in this many of the last layers."
    )
    attn_gate: str = model_knob(
        "none",
        ("none", "sparse", "out"),
        "Multiply each head's output by a gate, a sigmoid of the token's channels (sparse), or by "
        "twice that gate, which starts at 1 (out).",
        absent="none",
    )
    attn_gate_scale: float = model_knob(
        1.0, (0.01, 100.0), "Multiply the argument of ATTN_GATE's sigmoid by this.", absent=1.0
    )
    gate_window: int = model_knob(
        12, (1, 8192), "Let ATTN_GATE and SMEAR_FORM=input read this many channels.", absent=12
    )
    attn_docs: bool = model_knob(
        False, (), "Keep attention inside documents, in training and in scoring.", absent=False
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Rotated dimensions come in pairs, and the NTK rule divides by their number minus 2."""
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
        "off",
        ("off", "add", "mix"),
        "Value residual learning (VRL): add layer 0's values to those of later layers, or mix "
        "both.",
    )
    ve_enabled: bool = model_knob(
        True, (), "Add an embedding of the token to the attention values of VE_LAYERS."
    )
    ve_dim: int = model_knob(128, (1, 8192), "Give the value embedding's table this many channels.")
    ve_layers: str = model_knob(
        "9,10", (), "Add value embeddings in these layers, counted from 0, comma-separated."
    )

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with value embeddings; raises Refusal if VE_LAYERS is wrong."""
        texts = [text.strip() for text in self.ve_layers.split(",") if text.strip()]
        are_numbers = all(re.fullmatch(r"[1-9]?\d", text) for text in texts)
        if not are_numbers or len(set(texts)) < len(texts):
            raise Refusal(f"VE_LAYERS={self.ve_layers!r}: expected distinct numbers from 0 to 99")
        return tuple(map(int, texts)) if self.ve_enabled else ()

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Value embeddings need layers that exist."""
        yield (
            all(layer < cfg.num_layers for layer in cfg.value_layers),
            "VE_LAYERS must all be below NUM_LAYERS",
        )


@dataclass(frozen=True, kw_only=True)
class DepthSettings(Part):
    """Whether some layers are executed repeatedly, with the same weights (depth recurrence)."""

    title = "Model: depth"
    prefixes: ClassVar[tuple[str, ...]] = ("LOOP_",)

    num_loops: int = model_knob(
        0, (0, 16), "Run layers LOOP_START to LOOP_END this many more times.", absent=0, tries=(2,)
    )
    loop_start: int = model_knob(
        3, (0, 63), "Begin the loop with this layer, counted from 0.", absent=3
    )
    loop_end: int = model_knob(
        5, (0, 63), "Let this be the last layer of the loop, counted from 0.", absent=5
    )
    enable_looping_at: float = training_knob(
        0.35, (0.0, 1.0), "Begin to loop after this fraction of the run."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A loop has layers, and begins before the run ends."""
        if cfg.num_loops == 0:
            return
        yield (
            cfg.loop_start <= cfg.loop_end < cfg.num_layers,
            "NUM_LOOPS needs LOOP_START <= LOOP_END < NUM_LAYERS",
        )
        last_step_begins = (cfg.iterations - 1) / cfg.iterations  # as a share of the run
        yield (
            cfg.enable_looping_at < 1.0
            and (not cfg.step_driven or cfg.enable_looping_at <= last_step_begins),
            "NUM_LOOPS has no effect, since no step of ITERATIONS begins after ENABLE_LOOPING_AT",
        )


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Part):
    """How layers read and write the residual stream."""

    title = "Model: residual stream"
    prefixes: ClassVar[tuple[str, ...]] = ("BACKOUT_",)

    skip_per_dim: str = model_knob(
        "1",
        ("0", "1", "off"),
        "Weigh each U-Net skip by a number for each channel (1) or by one number (0), or have no "
        "skips (off).",
    )
    skip_gates: bool = model_knob(
        False, (), "Blend each skip with the stream by a learned gate.", absent=False
    )
    parallel_start_layer: int = model_knob(
        0,
        (0, 63),
        "From this layer on, keep two lanes of the residual stream, one read by attention and one "
        "by the MLP; 0 never does.",
        absent=0,
        tries=(2,),
    )
    backout_mode: str = model_knob(
        "none",
        ("none", "mid", "cache"),
        "Before the head, subtract a multiple of an earlier layer's output: that of the middle "
        "layer (mid) or of CACHE_LAYER (cache).",
    )
    cache_layer: int = model_knob(
        7, (0, 63), "Keep this layer's output for BACKOUT_MODE=cache; later attention reads it too."
    )
    backout_init: float = training_knob(
        0.2, (-1.0, 1.0), "Start the factor of the subtracted output at this.", tries=(0.0,)
    )
    resid_mix_init: str = training_knob(
        "identity",
        ("identity", "phase"),
        "Start each layer's input as the residual stream alone (identity), or mixed with a share "
        "of the token embedding that falls with depth (phase).",
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """The layer whose output is subtracted comes before the last one."""
        yield (
            cfg.backout_layer < cfg.num_layers - 1,
            "BACKOUT_MODE must subtract the output of a layer before the last of NUM_LAYERS "
            "(with cache, that of CACHE_LAYER)",
        )


RMS_EPS = 1.1920929e-07  # float32 machine epsilon, whatever the activation type
BIGRAM_CURRENT, BIGRAM_PREVIOUS = 36313, 27191
AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
# Where kernels of causal attention come from on CUDA, by their names in ATTENTION. Of a kernel's
# sources the first that works is taken.
KERNELS = {
    "fa3": ("fa3/flash_attn_interface", "fa3/kernels"),
    "cudnn": ("cudnn",),
    "flash": ("flash",),
    "sdpa": ("sdpa",),  # torch's own choice
}
TORCH_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
TRIAL_ROWS, TRIAL_LENGTH, TRIAL_PASSES = 16, 2048, 4


def trains_on_cpu(x: Tensor) -> bool:
    """Whether the functions of the section "Faster on a CPU" serve these activations."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and x.dtype != torch.bfloat16


def product(x: Tensor, weight: Tensor, in_bf16: bool = False) -> Tensor:
    """W x in the type of x, (..., in) and (out, in) -> (..., out).

    With `in_bf16`, training on a CPU multiplies in bfloat16, also to get the gradients.
    """
    if in_bf16 and trains_on_cpu(x):
        return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)
    return F.linear(x, cast_like(weight, x))


def rms_norm(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """scale x / sqrt(mean(x^2) + eps) over the last dimension."""
    if x.device.type == "cpu":
        return RmsNorm.apply(x, scale)
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS) * scale


def cast_like(parameter: Tensor, x: Tensor) -> Tensor:
    """Cast a float32 parameter to the type of the activations that it is used with."""
    return parameter.to(x.dtype)


Start = Callable[[Tensor, "Config"], object]  # fills a parameter with its initial value
Shape = tuple[int, ...]
AnyTensor = TypeVar("AnyTensor", bound=Tensor)  # a Tensor or one of its subclasses


@dataclass(frozen=True)
class Kind:
    """What a parameter is. It decides how the parameter starts, learns, is rounded and stored.

    The parameter's name decides nothing.
    """

    name: str  # the row of ROUTES that says how such a parameter learns
    role: str  # the key of BITS and CLIP_SIGMAS that say how it is quantized
    fits: Callable[[Shape, Config], bool]  # whether a parameter of this kind can have a shape
    expected: str  # the shapes that fit, in words
    start: Start | None = None  # None keeps the value that the parameter was made with
    may_be_integers: bool = False  # in the artifact, if BITS and the parameter's size say so
    may_be_rounded: bool = False  # in training, by QAT
    inputs_of: str = ""  # the name of a sibling matrix that has the same inputs and Hessian


def is_matrix(shape: Shape, cfg: Config) -> bool:
    """Whether both dimensions are widths of the network."""
    kv_width = cfg.num_kv_heads * cfg.head_dim
    widths = (cfg.model_dim, kv_width, cfg.mlp_dim, cfg.bigram_dim, cfg.ve_dim)
    return len(shape) == 2 and all(side in widths for side in shape)


def is_table(shape: Shape, cfg: Config) -> bool:
    """Whether there is a row for each token, or for each bucket of token pairs."""
    return len(shape) == 2 and shape[0] in (cfg.vocab_size, cfg.bigram_vocab_size)


def is_vector(shape: Shape, cfg: Config) -> bool:
    """Whether the parameter is a scalar or a vector."""
    return len(shape) < 2


def is_channel_rows(shape: Shape, cfg: Config) -> bool:
    """Whether each row has a number for each channel, or a single number."""
    return len(shape) == 2 and shape[1] in (1, cfg.model_dim)


def is_gate(shape: Shape, cfg: Config) -> bool:
    """Whether the parameter is a scalar, a vector, or has at most one row for each head."""
    return len(shape) < 2 or (len(shape) == 2 and shape[0] <= cfg.num_heads)


def is_layer_rows(shape: Shape, cfg: Config) -> bool:
    """Whether there is a row for each layer."""
    return len(shape) == 2 and shape[0] == cfg.num_layers


# The start_...() functions fill a parameter with its initial value.


def start_orthogonal(parameter: Tensor, cfg: Config) -> None:
    """A random matrix whose singular values are all 1."""
    nn.init.orthogonal_(parameter)


def start_scaled(parameter: Tensor, cfg: Config) -> None:
    """A random matrix whose singular values are all 1 / sqrt(2 NUM_LAYERS)."""
    nn.init.orthogonal_(parameter, 1.0 / math.sqrt(2 * cfg.num_layers))


def start_output(parameter: Tensor, cfg: Config) -> None:
    """An output projection of attention or MLP: zeros by default, so that a block adds nothing."""
    if cfg.proj_init == "zero":
        parameter.zero_()
    else:
        start_scaled(parameter, cfg)


def start_auxiliary(parameter: Tensor, cfg: Config) -> None:
    """The projection of an embedding table into the network."""
    if cfg.optimizer_routing == "banks":
        start_orthogonal(parameter, cfg)
    else:
        start_scaled(parameter, cfg)


def start_pair_projection(parameter: Tensor, cfg: Config) -> None:
    """The projection of BigramHash."""
    start_auxiliary(parameter, cfg)  # drawn even if unused, so that later draws stay the same
    if cfg.bigram_init == "zero_proj":
        parameter.zero_()


def start_pair_table(parameter: Tensor, cfg: Config) -> None:
    """The buckets of BigramHash: zeros, unless its projection starts at zero."""
    if cfg.bigram_init == "zero_proj":
        start_orthogonal(parameter, cfg)
    else:
        parameter.zero_()


def start_token_table(parameter: Tensor, cfg: Config) -> None:
    """Normal numbers; EMB_SVD_INIT makes the k-th singular value the first / sqrt(k)."""
    nn.init.normal_(parameter, std=cfg.tied_embed_init_std)
    if cfg.emb_svd_init:
        U, S, Vh = torch.linalg.svd(parameter, full_matrices=False)
        powers = torch.arange(1, len(S) + 1, dtype=torch.float32) ** -0.5
        parameter.copy_(U * (S[0] * powers) @ Vh)


def start_value_table(parameter: Tensor, cfg: Config) -> None:
    """Small normal numbers."""
    nn.init.normal_(parameter, std=0.01)


def start_at_zero(parameter: Tensor, cfg: Config) -> None:
    """Zeros."""
    parameter.zero_()


def start_backout(parameter: Tensor, cfg: Config) -> None:
    """BACKOUT_INIT."""
    parameter.fill_(cfg.backout_init)


WIDTHS = "a width of the network on both sides"
ATTENTION_MATRIX = Kind(
    "attention matrix",
    "attn",
    is_matrix,
    WIDTHS,
    start_orthogonal,
    may_be_integers=True,
    may_be_rounded=True,
)
MLP_MATRIX = replace(ATTENTION_MATRIX, name="mlp matrix", role="mlp")
AUXILIARY_MATRIX = replace(
    ATTENTION_MATRIX, name="auxiliary matrix", role="aux", start=start_auxiliary
)
TABLE = Kind("table", "aux", is_table, "a row for each token or pair", may_be_integers=True)
TOKEN_TABLE = replace(TABLE, name="token table", role="emb", start=start_token_table)
HEAD = replace(TOKEN_TABLE, name="head", start=start_at_zero)
GAIN = Kind("gain", "aux", is_vector, "no more than one dimension")
ATTENTION_GAIN = replace(GAIN, role="attn")
GAIN_ROWS = Kind(
    "gain rows", "aux", is_channel_rows, "rows of 1 or MODEL_DIM", may_be_integers=True
)
GATE = Kind("gate", "aux", is_gate, "at most a row for each head")
LANE = replace(GATE, fits=is_layer_rows, expected="a row for each layer")


def of_kind(kind: Kind, parameter: AnyTensor) -> AnyTensor:
    """Mark a parameter as one of this kind, and return it."""
    parameter.kind = kind  # type: ignore[attr-defined]
    return parameter


def kinds_of(model: nn.Module, cfg: Config) -> dict[str, Kind]:
    """The kind of each parameter by name; raises Refusal if it has none, or another one's shape."""
    kinds = {}
    for name, parameter in model.named_parameters():
        kind = vars(parameter).get("kind")
        if kind is None:
            raise Refusal(f"parameter {name} has no kind: make it with of_kind(KIND, ...)")
        if not kind.fits(tuple(parameter.shape), cfg):
            shape = " x ".join(map(str, parameter.shape))
            raise Refusal(
                f"parameter {name} is declared as {kind.name}, which has {kind.expected}, "
                f"but its shape is {shape or 'a number'}: declare it as what it is"
            )
        kinds[name] = kind
    return kinds


@functools.lru_cache(8)
def kinds_for(cfg: Config) -> dict[str, Kind]:
    """The kind of each parameter of the network that these settings describe, by name."""
    return unallocated_model(cfg).kinds


# A low-rank change B A of a weight for each row of a batch: A (B, r, in) and B (B, out, r).
Delta = tuple[Tensor, Tensor]


def with_delta(y: Tensor, x: Tensor, delta: Delta | None) -> Tensor:
    """y (B, T, out) + B A x of x (B, T, in), each row by its own A and B; y if delta is None."""
    if delta is None:
        return y
    down, up = delta
    return y + (x @ down.mT) @ up.mT


@dataclass(frozen=True)
class RowDeltas:
    """Low-rank deltas for the rows of a batch (LoRA, arXiv:2106.09685).

    In each layer the deltas q, k and v add to the projections of these names; o and mlp lead from
    the normed input of attention or MLP directly to its output.
    """

    layers: tuple[dict[str, Delta], ...]  # by place in the plan, then by name: q, k, v, o, mlp
    head: Delta | None


NO_DELTAS: dict[str, Delta] = {}


class Linear(nn.Linear):
    """A matrix product without bias; its float32 weight is cast to the activations' type."""

    in_bf16 = False  # see multiply_in_bf16()

    def __init__(self, width_in: int, width_out: int, kind: Kind) -> None:
        super().__init__(width_in, width_out, bias=False)
        of_kind(kind, self.weight)

    def forward(self, x: Tensor, delta: Delta | None = None) -> Tensor:
        """(B, T, in) -> (B, T, out); a delta adds to the weight, for each row a different one."""
        return with_delta(product(x, self.weight, self.in_bf16), x, delta)

    def with_gain(self, y: Tensor, gain: Tensor, x: Tensor, delta: Delta | None) -> Tensor:
        """gain (W y + B A x), with a delta B A: y (B, T, in), x (B, T, D) -> (B, T, out)."""
        if delta is None and trains_on_cpu(y):  # cheaper than scaling the output
            return product(y, gain.unsqueeze(1) * self.weight, self.in_bf16)
        return cast_like(gain, y) * with_delta(self(y), x, delta)


class Table(nn.Embedding):
    """An embedding: a row of numbers for each token or bucket."""

    in_bf16 = False  # see multiply_in_bf16(): a tied token embedding is multiplied as the head

    def __init__(self, num_rows: int, width: int, kind: Kind) -> None:
        super().__init__(num_rows, width)
        of_kind(kind, self.weight)


class BigramHash(nn.Module):
    """An embedding of the pair (previous, current token), added to the token embedding.

    Pairs are hashed into n buckets. xor: (36313 t_i XOR 27191 t_{i-1}) mod (n - 1); sum:
    (36313 t_i + 27191 t_{i-1}) mod n. A token without a predecessor, which is the first of a row
    and with BIGRAM_BOS_MASK every BOS, has bucket n - 1 (xor) or 0 (sum).
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.by_sum = cfg.bigram_hash == "sum"
        self.bos_mask = cfg.bigram_bos_mask
        table = replace(TABLE, start=start_pair_table)
        projection = replace(AUXILIARY_MATRIX, start=start_pair_projection)
        self.embed = Table(cfg.bigram_vocab_size, cfg.bigram_dim, table)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim, projection)
        self.scale = of_kind(GAIN, nn.Parameter(torch.tensor(0.05)))

    def buckets(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T) bucket numbers."""
        n = self.embed.num_embeddings
        current = BIGRAM_CURRENT * input_ids[:, 1:]
        previous = BIGRAM_PREVIOUS * input_ids[:, :-1]
        if self.by_sum:
            hashed = (current + previous) % n
            no_predecessor = 0
        else:
            hashed = (current ^ previous) % (n - 1)
            no_predecessor = n - 1
        hashed = F.pad(hashed, (1, 0), value=no_predecessor)
        if self.bos_mask:
            hashed = torch.where(input_ids == BOS, no_predecessor, hashed)
        return hashed

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.scale * self.proj(self.embed(self.buckets(input_ids)).to(dtype))


class SmearGate(nn.Module):
    """x_i <- (1 - s) x_i + s x_{i-1}, x_{-1} = 0, s = sigmoid(gate), or 0 at a masked BOS."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.bos_mask = cfg.smear_bos_mask
        self.gate = of_kind(GATE, nn.Parameter(torch.zeros(cfg.model_dim)))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x: (B, T, D), input_ids: (B, T) -> (B, T, D)."""
        gate = torch.sigmoid(cast_like(self.gate, x))
        if self.bos_mask:
            gate = gate * (input_ids != BOS).unsqueeze(-1)
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        return torch.lerp(x, previous, gate.expand_as(x))


class InputSmearGate(nn.Module):
    """x_i <- x_i + lambda sigmoid(w . x_i) x_{i-1}, x_{-1} = 0.

    w has a weight for each of the first GATE_WINDOW channels. With SMEAR_BOS_MASK x_i stays as it
    is at BOS. Both w and lambda start at 0, so w has no gradient until lambda has moved.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.bos_mask = cfg.smear_bos_mask
        self.weight = of_kind(GATE, nn.Parameter(torch.zeros(cfg.gate_window)))
        self.scale = of_kind(GATE, nn.Parameter(torch.tensor(0.0)))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x: (B, T, D), input_ids: (B, T) -> (B, T, D)."""
        window = x[..., : len(self.weight)]
        gate = cast_like(self.scale, x) * torch.sigmoid(window @ cast_like(self.weight, x))
        if self.bos_mask:
            gate = gate * (input_ids != BOS)
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        return torch.addcmul(x, gate.unsqueeze(-1), previous)


class ValueEmbedding(nn.Module):
    """scale P E[t], an embedding of token t that some layers share and add to their values."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.embed = Table(cfg.vocab_size, cfg.ve_dim, replace(TABLE, start=start_value_table))
        self.proj = Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim, AUXILIARY_MATRIX)
        self.scale = of_kind(GAIN, nn.Parameter(torch.tensor(0.1)))

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) -> (B, T, G*K)."""
        extra = self.proj(self.embed(input_ids).to(dtype))
        return cast_like(self.scale, extra) * extra


def rotary_tables(cfg: Config, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables for rotate(): cosines and signed sines of position times frequency, float32 (T, R).

    R dimensions rotate, as R/2 pairs; pair i has frequency base^(-2i/R). Each table holds the
    pairs twice, and the second time the sines have the opposite sign. For rows longer than
    ROPE_NTK_REF the NTK rule raises the base.
    """
    dims, base = cfg.rotary_dims, cfg.rope_base
    if 0 < cfg.rope_ntk_ref < seq_len:
        base = base * (seq_len / cfg.rope_ntk_ref) ** (dims / (dims - 2))
    exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / base**exponents)
    return angles.cos().repeat(1, 2), torch.cat([angles.sin(), -angles.sin()], dim=-1)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs of dimensions (i, i + R/2), i < R/2, by position: (B, T, H, K) -> same."""
    cos, sin = (cast_like(table, x)[:, None, :] for table in rotation)
    R = cos.size(-1)
    first, rest = x.tensor_split([R], dim=-1)
    rotated = torch.addcmul(first * cos, first.roll(R // 2, -1), sin)
    return torch.cat([rotated, rest], dim=-1)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
    if q.device.type != "cuda":  # on a CPU, repeating k and v is faster than enable_gqa
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def document_attention(q: Tensor, k: Tensor, v: Tensor, extents: Tensor) -> Tensor:
    """Causal attention inside documents: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K).

    `extents` comes from document_extents(): a mask (B, 1, T, T), or boundaries (N,).
    """
    if extents.ndim == 1:
        attend = document_attention_on_gpu if q.is_cuda else document_attention_by_length
        return attend(q, k, v, extents)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=extents).transpose(1, 2)


def document_extents(documents: Tensor, boundaries: Tensor | None, in_graph: bool) -> Tensor:
    """What tells document_attention() where the documents of (B, T) are.

    It is `boundaries`, see document_boundaries(); or, in a compiled graph on a CPU, a mask
    (B, 1, T, T), whose shape does not depend on the documents.
    """
    if boundaries is not None and (documents.is_cuda or not in_graph):
        return boundaries
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


def document_attention_by_length(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> Tensor:
    """document_attention() on a CPU: all documents of one length form a batch.

    With a mask, the CPU would also compute scores across documents and discard them.
    """
    lengths = [length for length in boundaries.diff().tolist() if length]
    q_parts, k_parts, v_parts = (x.flatten(0, 1).split(lengths) for x in (q, k, v))
    outputs: dict[int, Tensor] = {}  # by the number of the document
    for length in dict.fromkeys(lengths):
        alike = [number for number, other in enumerate(lengths) if other == length]
        y = sdpa_attention(
            torch.stack([q_parts[number] for number in alike]),
            torch.stack([k_parts[number] for number in alike]),
            torch.stack([v_parts[number] for number in alike]),
        )
        outputs.update(zip(alike, y, strict=True))
    return torch.cat([outputs[number] for number in range(len(lengths))]).view_as(q)


def document_attention_on_gpu(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> Tensor:
    """document_attention() by torch's kernel of variable length; it has never run on a GPU yet."""
    shape = q.shape
    longest = q.size(1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    y = varlen_attn(
        q, k, v, boundaries, boundaries, longest, longest, window_size=(-1, 0), enable_gqa=True
    )
    return cast(Tensor, y).view(shape)


class ChosenAttention(NamedTuple):
    """The attention kernel of a run, for attention over whole rows."""

    name: str
    kernel: AttentionKernel
    trial: str = ""  # milliseconds of the kernels that were tried, and why others cannot be used


def pick_attention(cfg: Config, ranks: Ranks) -> ChosenAttention:
    """Choose the attention kernel, the same on all ranks; all ranks must call this together.

    Raises Refusal if the kernel that ATTENTION names does not work here.
    """
    heads = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    if cfg.attn_docs:
        why = "inside documents (ATTN_DOCS=1) only torch's kernel of variable length is used"
    elif ranks.device.type != "cuda":
        why = "there is no CUDA device"
    else:
        return find_attention(cfg.attention, heads, ranks)
    if cfg.attention not in ("auto", "sdpa"):
        raise Refusal(f"ATTENTION={cfg.attention}: {why}; use ATTENTION=auto")
    return ChosenAttention("varlen" if ranks.device.type == "cuda" else "sdpa", sdpa_attention)


# Cached, because compiled graphs serve a rebuilt model only if its kernel is the same object.
@functools.cache
def find_attention(wanted: str, heads: tuple[int, int, int], ranks: Ranks) -> ChosenAttention:
    """Find the kernel that is wanted on CUDA, for "auto" the fastest of those that work.

    heads: the number of query heads, the number of key and value heads, and their width.
    """
    if wanted != "auto":
        with ranks.together():
            try:
                return ChosenAttention(*working_kernel(wanted, heads, ranks.device))
            except Refusal as refusal:
                raise Refusal(f"ATTENTION={wanted}: {refusal}; use ATTENTION=auto") from None
    working: dict[str, tuple[str, AttentionKernel]] = {}
    failures = []
    for name in KERNELS:
        try:
            working[name] = working_kernel(name, heads, ranks.device)
        except Refusal as refusal:
            failures.append(f"no {name} ({refusal})")
    trials = {
        name: trial_pass(kernel, heads, ranks.device) for name, (_, kernel) in working.items()
    }
    seconds = seconds_of_kernels(trials, ranks)
    times = [f"{name} {1e3 * seconds[name]:.2f} ms" for name in trials]
    fastest = min(KERNELS, key=lambda name: seconds[name])
    if seconds[fastest] == math.inf:
        fastest = "sdpa"
    return ChosenAttention(*working[fastest], ", ".join(times + failures))


def working_kernel(
    name: str, heads: tuple[int, int, int], device: torch.device
) -> tuple[str, AttentionKernel]:
    """Try a kernel on the device; returns its source and itself, or raises Refusal if it fails."""
    failures = []
    for source in KERNELS[name]:
        try:
            attend = kernel_from(source)
            query, key = (
                torch.zeros(1, 64, count, heads[2], dtype=torch.bfloat16, device=device)
                for count in heads[:2]
            )
            if isinstance(attend(query, key, key), tuple):
                return source, functools.partial(first_output, attend)
            return source + chosen_by_torch(source, query, key), attend
        except Exception as error:  # foreign packages may raise any exception
            failures.append(f"{source.removeprefix('fa3/')}: " + str(error).split("\n")[0])
    raise Refusal(", ".join(failures))


def kernel_from(source: str) -> AttentionKernel:
    """Load a kernel from a source in KERNELS; foreign packages may raise any exception."""
    if source == "sdpa":
        return sdpa_attention
    if source in TORCH_BACKENDS:
        return functools.partial(attention_by, TORCH_BACKENDS[source])
    return flash_attention(source.removeprefix("fa3/"))


def attention_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by one kernel of torch; raises RuntimeError if it does not take these tensors."""
    with sdpa_kernel(backend):
        return sdpa_attention(q, k, v)


def chosen_by_torch(source: str, query: Tensor, key: Tensor) -> str:
    """Name the kernel that torch takes where the choice is its own, after a slash."""
    if source != "sdpa":
        return ""
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    try:
        backend = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True)
    except RuntimeError:  # it is torch's own function, and only a name is lost
        return ""
    return f"/{SDPBackend(backend).name.removesuffix('_ATTENTION').lower()}"


def trial_pass(
    kernel: AttentionKernel, heads: tuple[int, int, int], device: torch.device
) -> Callable[[], None]:
    """Prepare a trial: forward and backward of a kernel on long rows, several times."""
    shape = TRIAL_ROWS, TRIAL_LENGTH
    q, k, v = (
        torch.randn(*shape, count, heads[2], dtype=torch.bfloat16, device=device).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    )

    def work() -> None:
        with torch.enable_grad():
            for _ in range(TRIAL_PASSES):
                torch.autograd.grad(kernel(q, k, v), (q, k, v), q)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def seconds_of(work: Callable[[], None], now: Callable[[], float]) -> float:
    """Time a call by a clock that gives seconds."""
    start = now()
    work()
    return now() - start


def seconds_of_kernels(
    trials: dict[str, Callable[[], None]],
    ranks: Ranks,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of a pass of each kernel on the slowest rank; inf if any rank fails or lacks it.

    Every rank goes through all kernels in the same order, whichever of them it has.
    """
    seconds = {}
    for name in KERNELS:
        least = math.inf
        if name in trials:
            with contextlib.suppress(Exception):  # a kernel may fail in its backward
                trials[name]()
                least = min(seconds_of(trials[name], now) for _ in range(3)) / TRIAL_PASSES
        seconds[name] = ranks.largest(least)
    return seconds


def first_output(attend: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call a kernel that returns a tuple; returns its first item, the attention output."""
    return attend(q, k, v)[0]


def flash_attention(source: str) -> Callable:
    """Causal FlashAttention-3 from a package; "kernels" downloads it once."""
    module = __import__(source)
    if source == "kernels":
        module = module.get_kernel("kernels-community/flash-attn3", version=1)
    return functools.partial(module.flash_attn_func, causal=True)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention (XSA, arXiv:2603.09078): y <- y - (y . n) n, n = v / ||v||.

    y: (B, T, H, K), v: (B, T, G, K) -> (B, T, H, K), the part of y that is orthogonal to v.
    """
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H/G, K)
    v = v.unsqueeze(3)  # (B, T, G, 1, K)
    square = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-12).square()
    along = (grouped * v).sum(-1, keepdim=True) / square  # y . n = along ||v||
    return torch.addcmul(grouped, along, v, value=-1).flatten(2, 3)


@dataclass(frozen=True)
class Layer:
    """One execution of a block, and what it reads besides the residual stream.

    The plan is the list of layers; a layer's place is its index there. A block holds weights. With
    a loop (NUM_LOOPS) a block has several places in the plan; without, place and block are equal.
    """

    block: int  # the number of the block that is executed
    depth_scale: float  # the factor of the normed inputs of attention and MLP
    two_lanes: bool  # whether the stream has two lanes, read by attention and by the MLP
    exclusive: bool  # whether attention's output is made orthogonal to the token's value (XSA)
    skip_from: int | None  # the place whose output is added to the stream first (U-Net)
    skip_row: int | None  # the row of the skip weights for that output
    reads: int | None  # the place whose output attention reads instead of the stream
    value_scale: int | None  # the index of the value embedding's scale; None: no value embedding
    value_gate: int | None  # the index of the gate that adds layer 0's values (VRL_MODE=add)
    mixes_values: bool  # whether layer 0's values are mixed with the layer's own (VRL_MODE=mix)

    def __str__(self) -> str:
        """Format a line for the log: block, scale, and the optional parts that the layer has."""
        parts = [f"block:{self.block} depth_scale:{self.depth_scale:.3f}"]
        switches = {
            "two_lanes": self.two_lanes,
            "xsa": self.exclusive,
            "mixes_first_values": self.mixes_values,
        }
        parts += [name for name, is_on in switches.items() if is_on]
        for name in ("skip_from", "skip_row", "reads", "value_scale", "value_gate"):
            if getattr(self, name) is not None:
                parts.append(f"{name}:{getattr(self, name)}")
        return " ".join(parts)


def executed_blocks(cfg: Config, looping: bool) -> list[int]:
    """The blocks in the order in which they are executed; those of a loop come repeatedly."""
    once = list(range(cfg.num_layers))
    if not looping:
        return once
    after = cfg.loop_end + 1
    return once[:after] + once[cfg.loop_start : after] * cfg.num_loops + once[after:]


def plan_layers(cfg: Config, looping: bool = True) -> tuple[Layer, ...]:
    """The plan: the layers of the network in the order in which the stream passes them.

    The second half takes skips from the first half, from its last output to its first. Without
    `looping`, the plan has each block once, as before ENABLE_LOOPING_AT.
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
    """The last place in the plan at which `block` is executed; -1 if there is none."""
    last = -1
    for place, used in enumerate(blocks):  # torch.compile can trace a loop, but not a generator
        if used == block:
            last = place
    return last


class Attention(nn.Module):
    """Causal grouped-query attention with normalized, rotated queries and keys."""

    def __init__(self, cfg: Config, layer: Layer, kernel: AttentionKernel) -> None:
        super().__init__()
        width, kv_width = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        same_inputs = replace(ATTENTION_MATRIX, inputs_of="c_q")
        self.c_q = Linear(width, width, ATTENTION_MATRIX)
        self.c_k = Linear(width, kv_width, same_inputs)
        self.c_v = Linear(width, kv_width, same_inputs)
        self.proj = Linear(width, width, replace(ATTENTION_MATRIX, start=start_output))
        gains = torch.full((cfg.num_heads,), cfg.qk_gain_init)
        self.q_gain = of_kind(ATTENTION_GAIN, nn.Parameter(gains))
        self.vr_lambda: nn.Parameter | None = None  # factors of layer 0's values and of its own
        if layer.mixes_values:
            self.vr_lambda = of_kind(ATTENTION_GAIN, nn.Parameter(torch.full((2,), 0.5)))
        self.gate: nn.Parameter | None = None
        if cfg.attn_gate != "none":
            window = torch.zeros(cfg.num_heads, cfg.gate_window)
            self.gate = of_kind(GATE, nn.Parameter(window))
        self.gate_factor = 2.0 if cfg.attn_gate == "out" else 1.0
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
        """W x + extra, with VRL_MODE=mix mixed with layer 0's (arXiv:2410.17897): (B, T, G*K)."""
        return self.mixed_values(self.c_v(x, delta), extra_v, first_v)

    def mixed_values(self, v: Tensor, extra_v: Tensor | None, first_v: Tensor | None) -> Tensor:
        """The values from v = W x, (B, T, G*K) -> same; see values()."""
        if extra_v is not None:
            v = v + extra_v
        if self.vr_lambda is not None:
            first, own = cast_like(self.vr_lambda, v)
            v = first * first_v + own * v
        return v

    def gated(self, y: Tensor, x: Tensor) -> Tensor:
        """Multiply heads' outputs y (B, T, H, K) by gates of their input x (B, T, D)."""
        if self.gate is None:
            return y
        window = x[..., : self.gate.size(1)]
        gate = torch.sigmoid(self.gate_scale * F.linear(window, cast_like(self.gate, x)))
        return y * (self.gate_factor * gate).unsqueeze(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extents: Tensor | None) -> Tensor:
        """Causal attention, over whole rows or inside documents: see document_attention()."""
        return self.kernel(q, k, v) if extents is None else document_attention(q, k, v, extents)

    def forward(
        self,
        x: Tensor,
        gain: Tensor,
        rotation: tuple[Tensor, Tensor],
        extra_v: Tensor | None,
        first_v: Tensor | None,
        extents: Tensor | None = None,
        deltas: dict[str, Delta] = NO_DELTAS,
    ) -> Tensor:
        """x: (B, T, D) -> (B, T, D), multiplied by a gain (D,).

        extra_v, which is added to the values, and first_v, layer 0's values: (B, T, G*K) each.
        """
        if extents is None and not deltas and HeadsAttention.takes(x, self.head_dim, self.kernel):
            y = self.on_cpu(x, rotation, extra_v, first_v)
        else:
            q, k = self.c_q(x, deltas.get("q")), self.c_k(x, deltas.get("k"))
            v = self.values(x, extra_v, first_v, deltas.get("v"))
            q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
            q = rotate(rms_norm(q), rotation) * cast_like(self.q_gain, q)[:, None]
            y = self.attend(q, rotate(rms_norm(k), rotation), v, extents)
            if self.exclusive:
                y = exclude_own_value(y, v)
        return self.proj.with_gain(self.gated(y, x).flatten(2), gain, x, deltas.get("o"))

    def on_cpu(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        extra_v: Tensor | None,
        first_v: Tensor | None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, H, K) in training on a CPU: one product for all of q, k and v.

        HeadsAttention does the rest. It wants the channels of q and k that rotate as a pair side by
        side, so the rows of their weights are put in that order.
        """
        K = self.head_dim
        order = pairs_together(rotation[0].size(-1), K)
        qk_weight = torch.cat([self.c_q.weight, self.c_k.weight])
        qk_weight = qk_weight.unflatten(0, (-1, K)).index_select(1, order).flatten(0, 1)
        qkv = product(x, torch.cat([qk_weight, self.c_v.weight]), self.c_v.in_bf16)
        qk, v = qkv.split([len(qk_weight), len(self.c_v.weight)], dim=-1)
        v = self.mixed_values(v, extra_v, first_v)
        qk, v = (y.unflatten(-1, (-1, K)) for y in (qk, v))
        product_dtype = torch.bfloat16 if self.c_v.in_bf16 else x.dtype
        return HeadsAttention.apply(qk, v, self.q_gain, *rotation, self.exclusive, product_dtype)


class MLP(nn.Module):
    """x -> P leaky_relu(W x)^2; the slope is 0 for MLP_ACT=relu2."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.fc = Linear(cfg.model_dim, cfg.mlp_dim, MLP_MATRIX)
        self.proj = Linear(cfg.mlp_dim, cfg.model_dim, replace(MLP_MATRIX, start=start_output))
        self.slope = cfg.leaky_slope if cfg.mlp_act == "leaky2" else 0.0

    def forward(self, x: Tensor, gain: Tensor, deltas: dict[str, Delta] = NO_DELTAS) -> Tensor:
        """(B, T, D) -> (B, T, D), multiplied by a gain (D,)."""
        hidden = SquaredLeaky.apply(self.fc(x), self.slope)
        return self.proj.with_gain(hidden, gain, x, deltas.get("mlp"))


Lanes = tuple[Tensor, Tensor | None]  # the residual stream as one or two tensors (B, T, D)


def joined(lanes: Lanes) -> Tensor:
    """The stream as one tensor (B, T, D), the mean of its lanes."""
    stream, second = lanes
    return stream if second is None else 0.5 * (stream + second)


def in_lanes(lanes: Lanes, are_two: bool) -> Lanes:
    """Copy a single lane into two, or join two into one, as the next layer needs."""
    stream, second = lanes
    if not are_two:
        return joined(lanes), None
    return stream, stream if second is None else second


@dataclass
class Context:
    """What the layers read besides the stream."""

    plan: tuple[Layer, ...]
    x0: Tensor  # the normed embedding (B, T, D)
    rotation: tuple[Tensor, Tensor]  # see rotary_tables()
    extra_v: dict[int, Tensor]  # by place: what is added to the layer's values, (B, T, G*K)
    first_v: Tensor | None = None  # layer 0's values (B, T, G*K), where others mix them in
    extents: Tensor | None = None  # where the documents are, see document_extents()
    row_deltas: RowDeltas | None = None
    outputs: list[Lanes] = field(default_factory=list)  # by place: the stream after that layer


def start_mix_by_depth(parameter: Tensor, cfg: Config, block: int) -> None:
    """Factors (2, D) of stream and embedding in a block's input, which are 1 and 0 by default.

    With RESID_MIX_INIT=phase the first is a sigmoid of the block's depth, the second is the rest.
    """
    keep = 1.0
    if cfg.resid_mix_init == "phase":
        depth = block / max(cfg.num_layers - 1, 1)  # from 0 to 1
        keep = 1.0 / (1.0 + math.exp(-3.0 * (depth - 0.5)))
    parameter.copy_(torch.tensor([[keep], [1.0 - keep]]).expand_as(parameter))


class Block(nn.Module):
    """The weights of a layer, which mixes in the embedding, then adds attention, then an MLP."""

    def __init__(self, cfg: Config, layer: Layer, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer, kernel), MLP(cfg)
        mix = torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim)
        start_mix = functools.partial(start_mix_by_depth, block=layer.block)
        self.resid_mix = of_kind(replace(GAIN_ROWS, start=start_mix), nn.Parameter(mix))
        start = 1.0 / math.sqrt(layer.block + 1) if cfg.ln_scale == "learned" else 1.0
        gain = torch.full((cfg.model_dim,), start)
        self.attn_scale = of_kind(GAIN, nn.Parameter(gain))
        self.mlp_scale = of_kind(GAIN, nn.Parameter(gain.clone()))

    def mixed(self, x: Tensor, x0: Tensor) -> Tensor:
        """Mix the embedding x0 into a stream x: both (B, T, D) -> (B, T, D)."""
        keep, inject = cast_like(self.resid_mix, x)
        return torch.addcmul(keep * x, inject, x0)

    def forward(
        self,
        lanes: Lanes,
        x0: Tensor,
        read: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        extra_v: Tensor | None,
        first_v: Tensor | None,
        extents: Tensor | None,
        weights: tuple[Tensor, Tensor] | None,
        scale: float | Tensor,
        deltas: dict[str, Delta] = NO_DELTAS,
    ) -> Lanes:
        """The stream (B, T, D) -> (B, T, D), in one lane or two.

        In one lane, where no earlier output is read, with gains g and the norm's factor `scale`:

            m = a x + b x0,  y = m + g_attn attention(scale norm(m)),  y + g_mlp mlp(scale norm(y))

        x0, rotation, extra_v, first_v, extents: see Context.
        read: an earlier layer's output (B, T, D) that attention reads instead of the stream.
        weights: how two lanes are combined, see two_lanes().
        """
        x, second = lanes
        mixed = self.mixed(x, x0)
        u = rms_norm(mixed if read is None else self.mixed(read, x0), scale)
        attended = self.attn(u, self.attn_scale, rotation, extra_v, first_v, extents, deltas)
        if second is not None and weights is not None:
            mlp_output = self.mlp(rms_norm(second, scale), self.mlp_scale, deltas)
            return two_lanes(x, second, attended, mlp_output, *weights)
        x = mixed + attended
        return x + self.mlp(rms_norm(x, scale), self.mlp_scale, deltas), None


def with_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """Add an earlier output to the stream: x + w skip, or with a gate g x + (1 - g) w skip.

    x and skip: (B, T, D); weight and gate: (D,) or (1,); g = sigmoid(gate).
    """
    skip = cast_like(weight, x) * skip
    if gate is None:
        return x + skip
    return torch.lerp(skip, x, cast_like(torch.sigmoid(gate), x).expand_as(x))


def two_lanes(
    x: Tensor, second: Tensor, attended: Tensor, mlp_output: Tensor, keep: Tensor, write: Tensor
) -> Lanes:
    """Update both lanes: each is multiplied by a factor, and multiples of both outputs are added.

    Attention has read the first lane and the MLP the second. Lanes and outputs: (B, T, D). keep:
    (2,), the factor of each lane. write: (4,), the factors of attention's output in the first and
    the second lane, then those of the MLP's output.
    """
    keep, write = cast_like(keep, x), cast_like(write, x)
    first = keep[0] * x + write[0] * attended + write[2] * mlp_output
    second = keep[1] * second + write[1] * attended + write[3] * mlp_output
    return first, second


class LaneWeights(nn.Module):
    """The factors of two_lanes(), a row for each block; rows of blocks with one lane are unused."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.keep = of_kind(LANE, nn.Parameter(torch.full((cfg.num_layers, 2), 1.1)))
        self.write = of_kind(LANE, nn.Parameter(torch.ones(cfg.num_layers, 4)))

    def of(self, block: int) -> tuple[Tensor, Tensor]:
        """The factors `keep` (2,) and `write` (4,) of a block."""
        return self.keep[block], self.write[block]


def add_value_embeddings(model: GPT, context: Context, shared: Tensor) -> None:
    """Scale the shared value embedding (B, T, G*K) for each layer that adds it to its values."""
    for place, layer in enumerate(context.plan):
        if layer.value_scale is not None:
            scale = model.ve_layer_scales[layer.value_scale]
            context.extra_v[place] = cast_like(scale, shared) * shared


def add_first_values(model: GPT, context: Context) -> None:
    """Compute layer 0's values and put them where the other layers read them (VRL)."""
    # With VRL_MODE=mix they include layer 0's value embedding, with VRL_MODE=add they do not.
    own_extra = context.extra_v.get(0) if model.cfg.vrl_mode == "mix" else None
    deltas = NO_DELTAS if context.row_deltas is None else context.row_deltas.layers[0]
    block: Any = model.blocks[0]
    x = rms_norm(block.mixed(context.x0, context.x0), context.plan[0].depth_scale)
    first_v = block.attn.values(x, own_extra, None, deltas.get("v"))
    context.first_v = first_v
    for place, layer in enumerate(context.plan):
        if layer.value_gate is not None:
            gate = torch.sigmoid(model.vrl_alphas[layer.value_gate])
            context.extra_v[place] = (
                context.extra_v.get(place, 0.0) + cast_like(gate, first_v) * first_v
            )


class GPT(nn.Module):
    """The network: hidden(ids) -> logits(hidden) -> nats of the targets; forward() is all three."""

    def __init__(
        self,
        cfg: Config,
        kernel: AttentionKernel = sdpa_attention,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.dtype = dtype
        self.kernel = kernel
        self.penalty: Tensor | None = None  # the token mask (V, V), see mask_tokens()
        self.prefixes: Tensor | None = None  # (V,), for PREFIX_TARGET, see piece_prefixes()
        # (position of the first token, length of the whole row); None: ids are whole rows.
        self.row_place: tuple[int, int] | None = None
        self.compiled_block: Callable[..., Lanes] | None = None  # Block.forward, for training
        # From here on, settings that do not travel cannot be read. What the forward reads of the
        # whole `self.cfg` is tried by refuse_unreadable_network().
        cfg = cfg.for_model()
        self.plan = plan_layers(cfg)
        self.plan_before_looping = plan_layers(cfg, looping=False)
        half = len(self.plan) // 2
        self.tok_emb = Table(cfg.vocab_size, cfg.model_dim, TOKEN_TABLE)
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.model_dim, cfg.vocab_size, HEAD)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        smear = InputSmearGate if cfg.smear_form == "input" else SmearGate
        self.smear = smear(cfg) if cfg.smear_enabled else None
        # In reverse order, a block's first layer replaces its later ones.
        first_use = {layer.block: layer for layer in reversed(self.plan)}
        self.blocks = nn.ModuleList(Block(cfg, first_use[n], kernel) for n in sorted(first_use))
        shape = {"off": (0, 1), "0": (half, 1), "1": (half, cfg.model_dim)}[cfg.skip_per_dim]
        self.skip_weights = of_kind(GAIN_ROWS, nn.Parameter(torch.ones(shape)))
        self.skip_gates: nn.Parameter | None = None
        if cfg.skip_gates:
            self.skip_gates = of_kind(GAIN_ROWS, nn.Parameter(torch.zeros(shape)))
        has_lanes = any(layer.two_lanes for layer in self.plan)
        self.lanes = LaneWeights(cfg) if has_lanes else None
        self.ve_shared = ValueEmbedding(cfg) if cfg.value_layers else None
        self.ve_layer_scales = nn.ParameterList(
            of_kind(GAIN, nn.Parameter(torch.ones(1))) for _ in cfg.value_layers
        )
        gated_layers = range(1, cfg.num_layers) if cfg.vrl_mode == "add" else ()
        self.vrl_alphas = nn.ParameterList(
            of_kind(GATE, nn.Parameter(torch.tensor(0.0))) for _ in gated_layers
        )
        self.backout_lambda: nn.Parameter | None = None
        if cfg.backout_layer >= 0:
            backout = replace(GAIN, start=start_backout)
            self.backout_lambda = of_kind(backout, nn.Parameter(torch.tensor(0.0)))
        self.kinds = kinds_of(self, cfg)

    @property
    def head(self) -> Table | Linear:
        """The module whose weight (V, D) is the output head."""
        return self.tok_emb if self.lm_head is None else self.lm_head

    def embedded(self, input_ids: Tensor) -> Tensor:
        """Token and pair embeddings, normed and blended by SmearGate: (B, T) -> (B, T, D)."""
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
        row_deltas: RowDeltas | None = None,
    ) -> Context:
        """Prepare what the layers read besides the stream, from ids (B, T) and x0 (B, T, D)."""
        first, row_length = self.row_place or (0, input_ids.size(1))
        tables = rotary_tables(self.cfg, row_length, x0.device)
        cos, sin = (table[first : first + input_ids.size(1)] for table in tables)
        context = Context(
            plan=self.plan if looping else self.plan_before_looping,
            x0=x0,
            rotation=(cos, sin),
            extra_v={},
            row_deltas=row_deltas,
        )
        if documents is not None:
            in_graph = torch.compiler.is_compiling() or self.compiled_block is not None
            context.extents = document_extents(documents, boundaries, in_graph)
        if self.ve_shared is not None:
            add_value_embeddings(self, context, self.ve_shared(input_ids, self.dtype))
        if self.cfg.vrl_mode != "off":
            add_first_values(self, context)
        return context

    def layer(self, place: int, lanes: Lanes, context: Context) -> Lanes:
        """Pass the stream through the layer at `place` of the plan: lanes (B, T, D) -> same."""
        layer = context.plan[place]
        block: Any = self.blocks[layer.block]
        x, second = in_lanes(lanes, layer.two_lanes)
        if layer.skip_from is not None and layer.skip_row is not None:
            gate = None if self.skip_gates is None else self.skip_gates[layer.skip_row]
            weight = self.skip_weights[layer.skip_row]
            x = with_skip(x, joined(context.outputs[layer.skip_from]), weight, gate)
        read = None if layer.reads is None else joined(context.outputs[layer.reads])
        weights = None if self.lanes is None else self.lanes.of(layer.block)
        extra_v, first_v = context.extra_v.get(place), context.first_v
        rotation, extents = context.rotation, context.extents
        inputs = ((x, second), context.x0, read, rotation, extra_v, first_v, extents, weights)
        if context.row_deltas is not None:
            return block(*inputs, layer.depth_scale, context.row_deltas.layers[place])
        if self.compiled_block is None or not torch.is_grad_enabled():
            return block(*inputs, layer.depth_scale)
        # The scale is a tensor here, since a number would compile the block anew for each value.
        return self.compiled_block(block, *inputs, torch.tensor(layer.depth_scale))

    def hidden(
        self,
        input_ids: Tensor,
        documents: Tensor | None = None,
        boundaries: Tensor | None = None,
        looping: bool = True,
        row_deltas: RowDeltas | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D): the normed residual stream after the last layer.

        Attention reaches across whole rows, or stays inside `documents`; see Batch. Without
        `looping` each block is executed once, as it is before ENABLE_LOOPING_AT.
        """
        x = self.embedded(input_ids)
        context = self.context(input_ids, x, documents, boundaries, looping, row_deltas)
        lanes: Lanes = x, None
        for place in range(len(context.plan)):
            lanes = self.layer(place, lanes, context)
            context.outputs.append(lanes)
        x = joined(lanes)
        if self.backout_lambda is not None:
            kept = last_place([layer.block for layer in context.plan], self.cfg.backout_layer)
            x = x - cast_like(self.backout_lambda, x) * joined(context.outputs[kept])
        return rms_norm(x)

    def logits(
        self, hidden: Tensor, input_ids: Tensor | None = None, delta: Delta | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, V) float32, bounded by the softcap c as c tanh(z / c).

        With the token mask, a token that may not follow the one in `input_ids` (B, T) has -inf.
        """
        z = with_delta(F.linear(hidden, cast_like(self.head.weight, hidden)), hidden, delta).float()
        cap = self.cfg.logit_softcap
        logits = cap * z.div_(cap).tanh_()
        if self.penalty is None:
            return logits
        assert input_ids is not None, "the token mask needs the preceding tokens"
        return logits + F.embedding(input_ids, self.penalty)

    def hidden_at_targets(
        self, batch: Batch, looping: bool = True, row_deltas: RowDeltas | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, D) and input ids (B, S) where the batch has targets."""
        hidden = self.hidden(
            batch.input_ids, batch.documents, batch.boundaries, looping, row_deltas
        )
        if batch.places is None:
            return hidden, batch.input_ids
        at_targets = hidden.take_along_dim(batch.places.unsqueeze(-1), dim=1)
        return at_targets, batch.input_ids.take_along_dim(batch.places, dim=1)

    def forward(
        self,
        batch: Batch,
        mile_gamma: Tensor | None = None,
        prefix_weight: Tensor | None = None,
        looping: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The nats of each target and its weight in the loss, float32 (B, S) like the targets.

        Without `mile_gamma` all weights are 1, see mile_weights(). With `prefix_weight` w, w times
        the nats of the target's prefix are added, see prefix_targets().
        """
        hidden, input_ids = self.hidden_at_targets(batch, looping)
        targets = batch.target_ids
        prefixes = prefix_targets(self, input_ids, targets, prefix_weight)
        clamp_min = self.cfg.mile_clamp_min
        # HeadNats computes the same with a hand-written derivative, which no compiled graph needs.
        by_hand = hidden.dtype == torch.float32 and not torch.compiler.is_compiling()
        if by_hand and hidden.requires_grad:
            loss = (self.cfg.logit_softcap, mile_gamma, clamp_min)
            mask = (input_ids, self.penalty)
            head = self.head.weight
            product_dtype = torch.bfloat16 if self.head.in_bf16 else None
            return HeadNats.apply(hidden, head, targets, *loss, *mask, prefixes, product_dtype)
        logits = self.logits(hidden, input_ids)
        nats = target_nats(logits, targets)
        if prefixes is not None:
            nats = nats + prefixes[1] * target_nats(logits, prefixes[0])
        return nats, mile_weights(logits, mile_gamma, clamp_min)


def prefix_targets(
    model: GPT, input_ids: Tensor, targets: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """For each target the token that is its longest prefix, and that token's loss weight: (B, T).

    The loss weight is `weight`, but 0 if the target has no prefix, or if the token mask does not
    let the prefix follow the preceding token. Returns None if `weight` is None.
    """
    if weight is None:
        return None
    assert model.prefixes is not None, "PREFIX_TARGET needs the tokenizer's prefixes"
    prefixes = model.prefixes[targets]
    if model.penalty is not None:
        prefixes = torch.where(model.penalty[input_ids, prefixes] == 0, prefixes, targets)
    return prefixes, weight * (prefixes != targets)


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each target in nats: (B, T, V) and (B, T) -> (B, T)."""
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets)


@torch.no_grad()
def mile_weights(logits: Tensor, gamma: Tensor | None, clamp_min: float) -> Tensor:
    """Weights of the MiLe loss, max((1 - e^-entropy)^gamma, clamp_min): (..., V) -> (...).

    Without gamma they are 1. Source: arXiv:2310.19531.
    """
    if gamma is None:
        return torch.ones_like(logits.select(-1, 0))
    p = torch.softmax(logits, dim=-1)
    entropy = -(p * torch.log(p + 1e-8)).sum(-1)
    return (1.0 - torch.exp(-entropy)).clamp_min(0.0).pow(gamma).clamp_min(clamp_min)


@torch.no_grad()
def initialize(model: GPT, cfg: Config) -> None:
    """Give every parameter the initial value of its kind.

    The model must be on the CPU: random numbers are drawn there from SEED, so that runs on all
    devices start alike. Tables are drawn after everything else.
    """

    def is_of_table(named: tuple[str, nn.Parameter]) -> bool:
        return model.kinds[named[0]].fits is is_table

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        for name, parameter in sorted(model.named_parameters(), key=is_of_table):
            start = model.kinds[name].start
            if start is not None:
                start(parameter, cfg)


# =================================================================================================
# Optimizers and schedules
# ROUTES and GROUPS say which optimizer trains each parameter, and with which rate and decay.
# Schedule.at() gives the rates at a given time. Muon is here; AdamW is torch's.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class RateSettings(Part):
    """Learning rates, and how they change over the run."""

    title = "Optimizer: rates"
    prefixes: ClassVar[tuple[str, ...]] = ("WARMDOWN_",)

    lr_mult: float = training_knob(1.0, (0.0, 100.0), "Multiply every learning rate by this.")
    matrix_lr: float = training_knob(0.025, (0.0, 10.0), "Train matrices at this rate (Muon).")
    scalar_lr: float = training_knob(
        0.025, (0.0, 10.0), "Train gains, gates and scales at this rate (AdamW)."
    )
    tied_embed_lr: float = training_knob(
        0.035, (0.0, 10.0), "Train embedding tables at this rate (AdamW)."
    )
    embed_lr: float = training_knob(
        0.6, (0.0, 10.0), "Train the token embedding at this rate if TIE_EMBEDDINGS=0."
    )
    head_lr: float = training_knob(
        0.008, (0.0, 10.0), "Train the output head at this rate if TIE_EMBEDDINGS=0."
    )
    warmdown_iters: int = training_knob(
        3500, (0, 10**8), "Let the rates decay to 0 over this many steps at the end of the run."
    )
    warmdown_frac: float = training_knob(
        0.0, (0.0, 1.0), "If above 0, decay over this last fraction, not over WARMDOWN_ITERS."
    )
    warmdown_type: str = training_knob(
        "linear", ("linear", "cosine"), "Let the rates decay along a line or half a cosine."
    )
    min_lr: float = training_knob(
        0.0, (0.0, 1.0), "Let no rate decay below this fraction of its peak.", tries=(0.1,)
    )


@dataclass(frozen=True, kw_only=True)
class MuonSettings(Part):
    """The optimizer of matrices, and which parameters it trains."""

    title = "Optimizer: Muon"
    prefixes: ClassVar[tuple[str, ...]] = ("MUON_",)

    optimizer_routing: str = training_knob(
        "standard",
        ("standard", "banks", "by_ndim", "adam"),
        "Train with Muon all matrices (standard), those of the blocks (banks), all 2-D parameters "
        "except token embedding and head (by_ndim), or the matrices outside the blocks (adam).",
    )
    muon_momentum: float = training_knob(
        0.99, (0.0, 0.9999), "Keep Muon's momentum at this value once it has ramped up."
    )
    muon_momentum_warmup_start: float = training_knob(
        0.92, (0.0, 0.9999), "Start Muon's momentum at this value."
    )
    muon_momentum_warmup_steps: int = training_knob(
        1500, (0, 10**8), "Ramp Muon's momentum up over this many steps."
    )
    muon_ns: str = training_knob(
        "quintic",
        ("quintic", "polar"),
        "Orthogonalize updates by Newton-Schulz, with one polynomial for all steps (quintic), or "
        "by Polar Express, with another polynomial for each step (polar).",
    )
    muon_backend_steps: int = training_knob(
        5, (1, 20), "Orthogonalize by this many steps of MUON_NS.", tries=(3,)
    )
    muon_momentum_cooldown_frac: float = training_knob(
        0.0,
        (0.0, 1.0),
        "Let Muon's momentum fall back to its start over this last fraction of the run.",
        tries=(0.5,),
    )
    muon_slow_share: float = training_knob(
        0.0,
        (0.0, 1.0),
        "Blend this share of a second, slower momentum into Muon's own; 0 turns it off.",
        tries=(0.5,),
    )
    muon_slow_momentum: float = training_knob(
        0.98, (0.0, 0.9999), "Keep this fraction of the slower momentum at each step."
    )
    muon_slow_start_frac: float = training_knob(
        0.4, (0.0, 1.0), "Blend in the slower momentum after this fraction of the run."
    )
    muon_row_norm: bool = training_knob(
        False, (), "Divide each row of an update by its norm before orthogonalization."
    )
    muon_neuron_norm: float = training_knob(
        0.0,
        (0.0, 0.9999),
        "After orthogonalization, divide each neuron's update by the root of a running mean of its "
        "square, of which each step keeps this fraction (NorMuon: 0.95); 0 turns it off.",
        tries=(0.95,),
    )
    muon_quant_momentum: bool = training_knob(
        False, (), "Keep Muon's momentum as blocks of int8 between steps."
    )
    muon_parallel: bool = training_knob(
        True, (), "Divide Muon's matrices among the ranks, instead of updating all on each rank."
    )
    muon_wd: float = training_knob(0.04, (0.0, 10.0), "Use this decoupled weight decay in Muon.")
    muon_wd_form: str = training_knob(
        "plain",
        ("plain", "cautious"),
        "Decay all of Muon's weights (plain), or only those whose magnitude its step reduces too "
        "(cautious).",
    )
    muon_wd_order: str = training_knob(
        "before", ("before", "after"), "Decay Muon's weights before or after its step."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """An optimizer without parameters is a mistake."""
        yield (
            cfg.optimizer_routing != "adam" or cfg.bigram_vocab_size or cfg.value_layers,
            "OPTIMIZER_ROUTING leaves Muon no matrices unless BIGRAM_VOCAB_SIZE or VE_ENABLED is "
            "on",
        )


@dataclass(frozen=True, kw_only=True)
class AdamSettings(Part):
    """The optimizer of all other parameters, and the bound on gradients."""

    title = "Optimizer: AdamW"
    prefixes: ClassVar[tuple[str, ...]] = ("ADAM_",)

    adam_wd: float = training_knob(0.04, (0.0, 10.0), "Use this decoupled weight decay in AdamW.")
    embed_wd: float = training_knob(
        -1.0, (-1.0, 10.0), "Decay embedding tables by this; -1 takes ADAM_WD.", tries=(0.085,)
    )
    beta2: float = training_knob(
        0.95, (0.5, 0.99999), "Keep this fraction of AdamW's mean squared gradient at each step."
    )
    grad_clip_norm: float = training_knob(
        0.3, (0.0, 1e6), "Bound the norm of the whole gradient by this; 0 sets no bound."
    )
    clip_before_reduce: bool = training_knob(
        False, (), "Bound each rank's own gradient, before the ranks' gradients are summed."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """A negative decay would make tables grow."""
        yield (
            cfg.embed_wd == -1.0 or cfg.embed_wd >= 0.0,
            "EMBED_WD must be at least 0, or -1 to use ADAM_WD",
        )


# A step of orthogonalize() maps each singular value x to a x + b x^3 + c x^5. A row has the
# (a, b, c) of one step; the last row serves all further steps.
SINGULAR_VALUE_MAPS = {
    # Muon's Newton-Schulz iteration, with a large slope at zero: five steps bring singular values
    # of at least 0.003 times the norm into 0.68 to 1.21.
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # Polar Express (arXiv:2505.16932), made for five steps, which bring singular values of at least
    # 0.001 times the norm into 0.86 to 1.15. The paper's division by a margin is left out.
    "polar": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

MOMENTUM_BLOCK = 256  # elements that share a scale in MUON_QUANT_MOMENTUM
MILE_ENDS = 0.15  # lr_scale at which the MiLe loss has faded to plain cross entropy

# How each group of parameters learns; learning rate and weight decay are names of settings.
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
    """The parameter groups of the optimizers, one for each row of GROUPS in use.

    Each has its name ("route"), its optimizer's name, its parameters and their names, its peak
    rate and its weight decay.
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
    """Divide each row by its norm (MuonEq-R); rows of zeros stay zero: (..., r, c) -> same."""
    return matrices / matrices.norm(dim=-1, keepdim=True).clamp_min(1e-7)


def orthogonalize(matrices: Tensor, steps: int, maps: str = "quintic") -> Tensor:
    """Push the singular values of each matrix towards 1: (..., r, c) -> same.

    X <- aX + (bA + cA^2)X with A = XX^T, from X = G / ||G||_F; a zero matrix stays zero.
    a, b and c of each step come from SINGULAR_VALUE_MAPS[maps].
    """
    rows = SINGULAR_VALUE_MAPS[maps]
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    X = X.reshape(math.prod(X.shape[:-2]), *X.shape[-2:])  # as baddbmm() takes them
    for step in range(steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        A = X @ X.mT
        A = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, A, X, beta=a)
    return (X.mT if tall else X).view_as(matrices)


def normalize_neurons(updates: Tensor, kept: dict, keep: float) -> Tensor:
    """Divide each neuron's update by its root mean square over steps: (m, r, c) -> same.

    Each matrix keeps its norm. A neuron is a row or a column, whichever the matrix has more of.
    The running mean of its square is kept["neuron_squares"], of which each step keeps the fraction
    `keep`. Source: NorMuon, arXiv:2510.05491.
    """
    exact = updates.float() if updates.dtype == torch.bfloat16 else updates
    inputs = -1 if updates.size(-2) >= updates.size(-1) else -2  # the dimension along a neuron
    squares = exact.square().mean(inputs, keepdim=True)
    (mean_squares,) = kept.setdefault("neuron_squares", (torch.zeros_like(squares),))
    mean_squares.lerp_(squares, 1.0 - keep)
    divided = exact / mean_squares.clamp_min(1e-10).sqrt()
    norm_before = exact.norm(dim=(-2, -1), keepdim=True)
    norm_after = divided.norm(dim=(-2, -1), keepdim=True)
    return (divided * (norm_before / norm_after.clamp_min(1e-10))).to(updates.dtype)


def pack_momentum(momentum: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (n, r, c) blockwise to int8 (n, blocks, 256), with scales (n, blocks, 1)."""
    rows = momentum.flatten(1)
    blocks = F.pad(rows, (0, -rows.size(1) % MOMENTUM_BLOCK)).unflatten(1, (-1, MOMENTUM_BLOCK))
    scale = (blocks.abs().amax(dim=2, keepdim=True) / 127).clamp_min(1e-12)
    return torch.round(blocks / scale).clamp(-127, 127).to(torch.int8), scale


def unpack_momentum(packed: tuple[Tensor, Tensor], like_this: Tensor) -> Tensor:
    """Undo pack_momentum() except for rounding: (n, r, c), the shape of `like_this`."""
    integers, scale = packed
    rows = (integers.to(scale.dtype) * scale).flatten(1)
    return rows[:, : like_this[0].numel()].view_as(like_this)


class Muon(torch.optim.Optimizer):
    """M <- mu M + g, W <- (1 - lr wd) W - lr sqrt(max(1, r/c)) orthogonalize(g + mu M).

    W, the momentum M and the gradient g are matrices (r, c). Matrices of equal shape are stacked
    and orthogonalized together, in `dtype`. Source: Keller Jordan's Muon. Settings vary each part
    of the rule:

        how M is kept            MUON_QUANT_MOMENTUM            advance()
        a second M               MUON_SLOW_SHARE                nesterov()
        before orthogonalize     MUON_ROW_NORM                  normalize_rows()
        orthogonalize            MUON_NS                        orthogonalize()
        after orthogonalize      MUON_NEURON_NORM               normalize_neurons()
        decay of W               MUON_WD_FORM, MUON_WD_ORDER    apply()

    With MUON_PARALLEL the ranks divide each stack: a rank holds the summed gradients, the momentum
    and the updates of its own part only, and then all ranks gather the updates. What a stack keeps
    between steps, `kept` below, is in the state of its first weight: by name, a tuple of tensors.
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
        # For each stack whose sum over ranks is under way, a function that waits for it and returns
        # this rank's part.
        self.launched: list[Callable[[], Tensor]] = []
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
                weight.grad = None  # frees its memory for the update
            self.launched.append(self.ranks.scatter_sum(grad))

    def gradients(self, group: dict | None = None) -> list[Tensor]:
        """This rank's part (m, r, c) of each stack's summed gradient, or of one group's stacks."""
        if not self.launched:
            self.launch()
        return [
            wait()
            for (owner, _), wait in zip(self.stacks, self.launched, strict=True)
            if group is None or owner is group
        ]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without closures
        """Update the weights; one stack's update is gathered while the next is computed."""
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
        self.launched = []

    def apply(self, group: dict, weights: list[Tensor], updates: Tensor) -> None:
        """Decay a stack's weights and subtract lr sqrt(max(1, r/c)) times the updates (n, r, c)."""
        rows, cols = weights[0].shape
        updates = updates.to(weights[0].dtype)
        decay = 1.0 - group["lr"] * group["weight_decay"]
        rate = group["lr"] * math.sqrt(max(1.0, rows / cols))
        # Decay after the step: (W - rate U) decay = decay W - rate decay U.
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
                rate = rate * decay
        torch._foreach_add_(weights, updates.unbind(), alpha=-rate)

    def nesterov(self, grads: Tensor, kept: dict, group: dict) -> Tensor:
        """Advance M and return g + mu M, for a stack of gradients g (m, r, c).

        With MUON_SLOW_SHARE, M is blended with a slower momentum, which is a running mean of
        gradients; divided by 1 - mu it is as large as M. Source: modded-nanogpt #339 (bi-Maxwell
        momentum).
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
        """M <- mu M + g, for the momentum kept under `name`; returns it."""
        stored = kept.get(name, (torch.zeros_like(grads),))
        is_packed = len(stored) == 2  # integers and scales
        momentum = unpack_momentum(stored, grads) if is_packed else stored[0]
        momentum.mul_(mu).add_(grads)
        packs = self.cfg.muon_quant_momentum
        kept[name] = pack_momentum(momentum) if packs else (momentum,)
        return momentum

    def whole_state(self) -> list[dict[str, list[Tensor]]]:
        """Gather the state of each stack from all ranks: by name, a list of tensors (n, ...)."""
        return [
            {
                name: [self.ranks.gather(part)()[: len(weights)] for part in parts]
                for name, parts in self.state[weights[0]].items()
            }
            for _, weights in self.stacks
        ]

    def load_whole_state(self, whole: list[dict[str, list[Tensor]]]) -> None:
        """Take this rank's part of a whole_state(), which another number of ranks may have made."""
        for (_, weights), kept in zip(self.stacks, whole, strict=True):
            for name, parts in kept.items():
                self.state[weights[0]][name] = tuple(map(self.ranks.part_of, parts))


def build_optimizers(
    cfg: Config, groups: list[dict], dtype: torch.dtype, ranks: Ranks | None = None
) -> list:
    """Make AdamW and Muon for the groups of route_parameters(); train_step() sets their rates."""
    adam, muon = ([g for g in groups if g["optimizer"] == name] for name in ("adam", "muon"))
    return [
        torch.optim.AdamW(adam, lr=0.0, betas=(0.9, cfg.beta2), eps=1e-8, fused=True),
        Muon(muon, cfg, dtype, ranks),
    ]


def decay_scale(remaining: float, warmdown: float, shape: str) -> float:
    """The factor of the learning rates when `remaining` of the run is left, in warmdown's unit."""
    if warmdown <= 0:
        return 1.0
    linear = min(1.0, max(0.0, remaining) / warmdown)
    if shape == "linear":
        return linear
    return 0.5 * (1.0 - math.cos(math.pi * linear))


def prefix_scale(remaining: float, whole: float) -> float:
    """The factor of PREFIX_TARGET: 1 in the first third of the run, falling to 0 in the second."""
    if whole <= 0:
        return 0.0
    return min(max(3.0 * remaining / whole - 1.0, 0.0), 1.0)


def muon_momentum(cfg: Config, step: int, remaining: float, whole: float) -> float:
    """Muon's momentum, which rises linearly to its last value and may fall back at the end.

    remaining, whole: what is left of the run and its whole length, both in the budget's unit.
    """
    cooldown = cfg.muon_momentum_cooldown_frac * whole
    ramp = 1.0
    if cfg.muon_momentum_warmup_steps:
        ramp = min(step / cfg.muon_momentum_warmup_steps, 1.0)
    if max(remaining, 0.0) < cooldown:
        ramp *= max(remaining, 0.0) / cooldown
    return (1.0 - ramp) * cfg.muon_momentum_warmup_start + ramp * cfg.muon_momentum


@dataclass(frozen=True)
class Moment:
    """What the schedules say at one moment of the run, the beginning of a step."""

    lr_scale: float  # a group learns at its base_lr times this, see train_step()
    momentum: float  # Muon's
    qat: bool  # whether training rounds weights
    done: bool  # whether training has ended, so that this step is not made
    mile_gamma: float = 0.0  # the exponent of the MiLe loss
    snapshot: bool = False  # whether SWA takes the weights into its mean after the step
    slow_share: float = 0.0  # the share of Muon's slower momentum
    prefix_weight: float = 0.0  # the weight of the prefix's nats in the loss
    looping: bool = True  # whether the layers of a loop are repeated
    longest_document: int | None = None  # in tokens, with ATTN_DOCS=1; None: as in the last stage


def context_stage(cfg: Config, done: float) -> int:
    """The number of DOC_GROWTH's stage once the share `done` of training is over."""
    if not cfg.attn_docs:
        return 0
    return sum(done > share for share, _ in cfg.context_stages[:-1])


class Schedule:
    """Learning rates and switches at a given step, the same on every rank.

    observe() takes in what was measured; at() answers and changes nothing. How far training is goes
    by what is spent of the budget, in its unit: seconds, operations or steps. What a step costs is
    known exactly in operations and steps. In seconds it is the median of recent steps, once a few
    are known, since a slow first step must not look like the end of the run. The warmdown takes
    WARMDOWN_ITERS times this cost, but never more than the run.
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
        """reserve: the part of the budget that is kept for calibration, in the budget's unit.

        queued_steps: how many steps may wait in a GPU's queue.
        step_operations: floating-point operations of a step.
        early_operations: those of a step before layers loop; None if they are as many.
        """
        self.cfg = cfg
        self.unit = cfg.budget_unit
        self.budget = max(cfg.whole_budget - reserve, 0)
        self.queued_steps = queued_steps
        self.step_operations = step_operations
        self.early_operations = step_operations if early_operations is None else early_operations
        self.step_seconds: deque[float] = deque(maxlen=self.STEPS_KEPT)
        self.last_spent = 0.0
        self.qat = False  # whether QAT has begun
        self.looping = False  # whether looping has begun
        self.stage = 0  # the stage of DOC_GROWTH
        self.stage_begun = -cfg.doc_growth_steps  # the step with which it began

    def observe(self, step: int, spent: float) -> None:
        """Take in that step `step` (from 0) is about to begin with `spent` of the budget spent."""
        if step > 0:
            self.step_seconds.append(spent - self.last_spent)
        self.last_spent = spent
        # What has begun stays on, even if the next measurement would put off its beginning again.
        moment = self.at(step, spent)
        self.qat = moment.qat
        self.looping = moment.looping
        stage = context_stage(self.cfg, self.share_done(step, spent))
        if stage > self.stage:
            self.stage = stage
            self.stage_begun = step

    def at(self, step: int, spent: float) -> Moment:
        """What the schedules say for step `step` (from 0), with `spent` of the budget spent.

        spent: seconds of training, or floating-point operations; unused if the budget is in steps.
        """
        cfg = self.cfg
        remaining, whole = self.remaining_and_whole(step, spent)
        warmdown = self.warmdown(whole)
        blends_slow = remaining <= (1.0 - cfg.muon_slow_start_frac) * whole
        # Switches go by the scale before MIN_LR bounds it, so that each of them is reached.
        scale = decay_scale(remaining, warmdown, cfg.warmdown_type)
        done = self.share_done(step, spent)
        stage = max(self.stage, context_stage(cfg, done))
        qat_begins = cfg.qat_mode == "late" and scale < cfg.late_qat_threshold
        return Moment(
            lr_scale=max(scale, cfg.min_lr) * self.rise_after_growth(step, stage),
            momentum=muon_momentum(cfg, step, remaining, whole),
            qat=self.qat or cfg.qat_mode == "always" or qat_begins,
            done=self.has_ended(step, spent),
            mile_gamma=cfg.mile_gamma * max(scale - MILE_ENDS, 0.0) / (1.0 - MILE_ENDS),
            snapshot=scale < cfg.swa_start_frac and (step + 1) % cfg.swa_every == 0,
            slow_share=cfg.muon_slow_share if blends_slow else 0.0,
            prefix_weight=cfg.prefix_target * prefix_scale(remaining, whole),
            looping=self.looping or (cfg.num_loops > 0 and done >= cfg.enable_looping_at),
            longest_document=cfg.context_stages[stage][1],
        )

    def budget_spent(self, step: int, spent: float) -> float:
        """How much of the budget is spent when step `step` begins, in the budget's unit."""
        return step if self.unit == "steps" else spent

    def share_done(self, step: int, spent: float) -> float:
        """The share of training that is done when step `step` begins."""
        return self.budget_spent(step, spent) / max(self.budget, 1e-9)

    def rise_after_growth(self, step: int, stage: int) -> float:
        """The factor by which learning rates rise from 0 to 1 once a stage of DOC_GROWTH began."""
        begun = step if stage > self.stage else self.stage_begun
        steps = self.cfg.doc_growth_steps
        return min((step - begun) / steps, 1.0) if steps else 1.0

    def remaining_and_whole(self, step: int, spent: float) -> tuple[float, float]:
        """How much of the run is left, and its whole length, both in the budget's unit."""
        spent = self.budget_spent(step, spent)
        step_cost = self.step_cost()
        whole = float(self.budget)
        if step_cost:  # ITERATIONS may be reached before the budget is spent
            whole = min(whole, spent + (self.cfg.iterations - step) * step_cost)
        return whole - spent, whole

    def warmdown(self, whole: float) -> float:
        """The length of the warmdown in a run of length `whole`, both in the budget's unit."""
        cfg = self.cfg
        if cfg.warmdown_frac:
            return cfg.warmdown_frac * whole
        return min(cfg.warmdown_iters * self.step_cost(), whole)

    def step_cost(self) -> float:
        """What a step costs in the budget's unit; 0 while too few steps have been timed."""
        if self.unit == "steps":
            return 1
        if self.unit == "operations":
            return self.step_operations if self.looping else self.early_operations
        if len(self.step_seconds) < self.STEPS_NEEDED:
            return 0.0
        return float(np.median(self.step_seconds))

    def has_ended(self, step: int, spent: float) -> bool:
        """Whether training has ended; the first step is always made."""
        if step >= self.cfg.iterations:
            return True
        if step == 0:
            return False
        if self.unit != "seconds":
            return self.budget_spent(step, spent) + self.step_cost() > self.budget
        # The last step must end inside the budget, after those still in a GPU's queue.
        ahead = (1 + self.queued_steps) * self.step_cost()
        return spent + ahead >= self.budget

    def progress(self, step: int, spent: float) -> float:
        """How much of the run is done, calibration included, as a fraction."""
        progress = self.budget_spent(step, spent) / self.cfg.whole_budget
        if self.unit == "operations":
            return max(progress, step / self.cfg.iterations)
        return progress

    def acting(self, moment: Moment) -> dict[str, bool]:
        """For each configured technique that the schedule turns on or off, whether it is on."""
        cfg = self.cfg
        is_on = {}
        if cfg.qat_mode != "off":
            is_on[f"{cfg.qat_mode}_qat"] = moment.qat
        if cfg.warmdown_iters or cfg.warmdown_frac:
            is_on["warmdown"] = moment.lr_scale < 1.0
        if cfg.muon_momentum_warmup_steps:
            is_on["momentum_ramp"] = moment.momentum != cfg.muon_momentum
        if cfg.muon_slow_share:
            is_on["slow_momentum"] = moment.slow_share > 0
        if cfg.mile_gamma:
            is_on["mile"] = moment.mile_gamma > 0
        if cfg.prefix_target:
            is_on["prefix_target"] = moment.prefix_weight > 0
        if cfg.min_lr:
            is_on["rate_floor"] = moment.lr_scale == cfg.min_lr
        if cfg.num_loops:
            is_on["depth_loop"] = moment.looping
        if cfg.attn_docs and cfg.doc_growth:
            is_on["short_documents"] = moment.longest_document != cfg.longest_document
        return is_on


# =================================================================================================
# Counted work
# The floating-point operations of a run, counted from shapes and so equal on every machine. Only
# matrix products count, 2 m n k operations for one of (m, k) by (k, n). All else is a small part of
# a run, and how many operations a norm or an exponential takes depends on who counts.
# =================================================================================================


def weights_met(model: GPT, prefix: str) -> int:
    """How many weights a token is multiplied by in matrices and gates named `prefix`..."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(prefix)
        and parameter.ndim == 2
        and model.kinds[name].fits in (is_matrix, is_gate)  # rows of tables are only looked up
    )


def attention_operations(model: GPT, seq_len: int) -> int:
    """Operations per token of attention in one layer: scores, and their product with the values.

    Only the causal half counts, even where a kernel computes more.
    """
    return 2 * seq_len * model.cfg.num_heads * model.cfg.head_dim


def hidden_operations(model: GPT, seq_len: int, looping: bool = True) -> int:
    """Operations per token up to its last hidden state, in a row of `seq_len` tokens."""
    beside_blocks = weights_met(model, "") - weights_met(model, "blocks.")
    total = 2 * beside_blocks
    if model.cfg.vrl_mode != "off":  # layer 0's values are computed once more
        total += 2 * weights_met(model, f"blocks.{model.plan[0].block}.attn.c_v.")
    for layer in model.plan if looping else model.plan_before_looping:
        total += 2 * weights_met(model, f"blocks.{layer.block}.")
        total += attention_operations(model, seq_len)
    return total


def head_operations(model: GPT) -> int:
    """Operations per token from its last hidden state to its logits."""
    return 2 * model.cfg.vocab_size * model.cfg.model_dim


def orthogonalization_operations(rows: int, cols: int, steps: int) -> int:
    """Operations to orthogonalize a matrix X: in each step A = X X^T, A A, and a product with X."""
    short, long = min(rows, cols), max(rows, cols)
    return steps * (4 * short * short * long + 2 * short**3)


def muon_operations(model: GPT) -> int:
    """Operations of one update of all of Muon's matrices, counted once however many ranks do it."""
    cfg = model.cfg
    total = 0
    for group in route_parameters(cfg, model):
        if group["optimizer"] == "muon":
            for weight in group["params"]:
                rows, cols = weight.shape
                total += orthogonalization_operations(rows, cols, cfg.muon_backend_steps)
    return total


def step_operations(model: GPT, looping: bool = True) -> int:
    """Operations of a training step on all ranks; a backward pass counts as two forward passes."""
    cfg = model.cfg
    forward = hidden_operations(model, cfg.train_seq_len, looping) + head_operations(model)
    return 3 * forward * cfg.rows_per_step * cfg.train_seq_len + muon_operations(model)


def calibration_operations(model: GPT, tokens: int) -> int:
    """Operations to collect Hessians over `tokens`: the network without its head, and the sums."""
    executions = Counter(layer.block for layer in model.plan)
    per_token = hidden_operations(model, model.cfg.train_seq_len)
    for source, width in hessian_widths(model).items():
        block = re.match(r"blocks\.(\d+)\.", source)
        times = executions[int(block[1])] if block else 1
        per_token += times * 2 * width * width
    return per_token * tokens


def calibration_tokens(cfg: Config) -> int:
    """How many training tokens calibration processes within the training budget."""
    if cfg.gptq_variant == "off" or cfg.gptq_calib != "train":
        return 0
    return cfg.gptq_calib_batches * CALIBRATION_ROWS * cfg.train_seq_len


def scoring_operations(model: GPT, spans: np.ndarray, width: int, all_places: bool = True) -> int:
    """Operations to score windows, whose `spans` are rows (start, first scored, end).

    A window is scored in strips of `width` targets, and each strip computes the hidden states of
    its whole window. Logits are computed at all places of a strip, or else only at those that are
    scored. Rows that merely fill up a batch are not counted.
    """
    seq_len = model.cfg.eval_seq_len
    scored = spans[:, 2] - spans[:, 1]
    strips = int(divide_up(scored, width).sum())
    num_logits = strips * width if all_places else int(scored.sum())
    hidden = strips * seq_len * hidden_operations(model, seq_len)
    return hidden + num_logits * head_operations(model)


def adaptation_operations(model: GPT, rows: int) -> int:
    """Operations of a forward and backward pass over rows of EVAL_SEQ_LEN tokens."""
    seq_len = model.cfg.eval_seq_len
    forward = hidden_operations(model, seq_len) + head_operations(model)
    return 3 * rows * seq_len * forward


def chunk_operations(model: GPT, batch: Batch, adapted_layers: int, learns: bool) -> int:
    """Operations on a chunk of documents, whose deltas learn from it or not.

    In the backward pass a frozen weight takes one product, all others take two.
    """
    cfg = model.cfg
    window = batch.input_ids.size(1)
    targets = batch.target_ids.size(1)
    weights = window * hidden_operations(model, window) + targets * head_operations(model)
    deltas = 0
    for name, width in delta_outputs(cfg).items() if adapted_layers else ():
        places = targets if name == "head" else adapted_layers * window
        deltas += places * 2 * cfg.lora_rank * (cfg.model_dim + width)
    attention = len(model.plan) * window * attention_operations(model, window)
    backward_pass = weights + attention + 2 * deltas if learns else 0
    return len(batch.input_ids) * (weights + deltas + backward_pass)


def unallocated_model(cfg: Config) -> GPT:
    """Make the network of these settings on the meta device: shapes without memory for weights."""
    with torch.device("meta"):
        return GPT(cfg)


def refuse_unreadable_network(cfg: Config) -> None:
    """Raise Refusal if the network could not be rebuilt from the settings that travel.

    Its forward runs once without memory, with a view of the settings that shows no others.
    """
    model = unallocated_model(cfg)
    model.cfg = cfg.for_model()
    input_ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    model.logits(model.hidden(input_ids))


def refuse_small_budget(cfg: Config) -> None:
    """Raise Refusal if MAX_TRAIN_TFLOPS does not suffice for a training step and calibration."""
    if cfg.max_train_tflops == 0:
        return
    model = unallocated_model(cfg)
    calibration = calibration_operations(model, calibration_tokens(cfg))
    step = step_operations(model)
    if calibration + step > cfg.whole_budget:
        raise Refusal(
            f"MAX_TRAIN_TFLOPS={cfg.max_train_tflops:g} does not suffice for a step of "
            f"{step / 1e12:.4g} TFLOP and a calibration of {calibration / 1e12:.4g}: raise it, or "
            "lower GPTQ_CALIB_BATCHES or the size of the model"
        )


# =================================================================================================
# Training
# A step's gradient is that of the mean over the global batch, however many ranks share the batch.
# The loss is read back one step late, so that the GPU never waits for the CPU.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class LossSettings(Part):
    """What changes the loss from the plain mean of the targets' nats."""

    title = "Loss"
    prefixes: ClassVar[tuple[str, ...]] = ("MILE_", "PREFIX_")

    mile_gamma: float = training_knob(
        0.0, (0.0, 10.0), "Weigh targets by (1 - e^-entropy)^gamma (MiLe loss); 0 turns it off."
    )
    mile_clamp_min: float = training_knob(
        0.1, (0.0, 1.0), "Let no target's MiLe weight fall below this."
    )
    prefix_target: float = training_knob(
        0.0,
        (0.0, 10.0),
        "For a third of the run, add to the loss (and to train_loss in the log) this factor times "
        "the nats of the longest token that is a prefix of the target; over the next third the "
        "factor falls to 0.",
        tries=(0.25,),
    )


@dataclass(frozen=True, kw_only=True)
class AverageSettings(Part):
    """Which average of the weights is exported."""

    title = "Weight averaging"
    prefixes: ClassVar[tuple[str, ...]] = ("EMA_", "SWA_")

    avg_mode: str = training_knob(
        "ema",
        ("ema", "swa", "swa_of_ema", "none"),
        "Export a moving average (EMA) of the weights, a mean of snapshots (SWA), a mean of the "
        "EMA's snapshots, or the last weights.",
    )
    ema_decay: float = training_knob(
        0.997, (0.0, 0.999999), "Keep this fraction of the moving average (EMA) at each step."
    )
    swa_start_frac: float = training_knob(
        0.4, (0.0, 1.0), "Take SWA's snapshots once rates are below this fraction of their peak."
    )
    swa_every: int = training_knob(
        50, (1, 10**6), "Take SWA's snapshots this many steps apart.", tries=(2,)
    )
    avg_last_share: float = training_knob(
        0.0, (0.0, 1.0), "Blend this share of the last weights into the average.", tries=(0.4,)
    )


LEAST_GAIN = 0.05  # share of a pass's time that products in bfloat16 must save
REPLICA_CHECK_STEPS = 100  # steps between checks that all ranks hold the same weights
# On a CPU, compiled blocks are taken to save a share COMPILE_GAIN of the run's seconds, and
# compiling to take COMPILE_SECONDS. They are compiled where that is less.
COMPILE_GAIN = 0.05
COMPILE_SECONDS = 30.0
Forward = Callable[..., tuple[Tensor, Tensor]]  # training_nats, perhaps compiled


def training_nats(
    model: GPT,
    batch: Batch,
    grids: dict[str, int] | None = None,
    mile_gamma: Tensor | None = None,
    prefix_weight: Tensor | None = None,
    looping: bool = True,
) -> tuple[Tensor, Tensor]:
    """GPT.forward() for a batch; with `grids` from qat_grids(), weights are rounded to them."""
    inputs = (batch, mile_gamma, prefix_weight, looping)
    if not grids:
        return model(*inputs)
    rounded = fake_quantized(model, grids)
    return torch.func.functional_call(model, rounded, inputs)


def make_forward(run: Run) -> Forward:
    """Make the forward of training and evaluation; in a compiled run it has a graph per shape."""
    if not run.compiled:
        return training_nats
    torch._dynamo.config.recompile_limit = 64  # graphs; fit_micro_batch() alone may make ten
    return torch.compile(training_nats, fullgraph=True, dynamic=False)


def micro_batches(cfg: Config, run: Run) -> list[tuple[int, int]]:
    """Divide this rank's rows of a step's global batch: a list of (first row, number of rows)."""
    rank, world_size = run.ranks.rank, run.ranks.world_size
    first = rank * cfg.rows_per_step // world_size
    end = (rank + 1) * cfg.rows_per_step // world_size
    size = run.micro_batch_rows
    return [(start, min(size, end - start)) for start in range(first, end, size)]


def reduce_gradients(parameters: list[nn.Parameter], others: list[Tensor], run: Run) -> None:
    """Sum gradients and other tensors over ranks, in place; a rank without rows adds zeros."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    run.ranks.add_up([*others, *(p.grad for p in parameters if p.grad is not None)])


def backward(forward: Forward, model: GPT, batch: Batch, moment: Moment, run: Run) -> list[Tensor]:
    """Add a micro-batch's gradient; returns its share of the step's mean of w nats and of w.

    w is a target's weight in the loss.
    """
    cfg = run.cfg
    # What changes from step to step is a tensor: a number would compile a graph for each value.
    gamma = torch.full((), moment.mile_gamma, device=run.device) if cfg.mile_gamma else None
    prefix = torch.full((), moment.prefix_weight, device=run.device) if cfg.prefix_target else None
    grids = qat_grids(model) if moment.qat else None
    nats, weights = forward(model, batch.moved(run.to_device), grids, gamma, prefix, moment.looping)
    part = (weights * nats).sum() / cfg.train_batch_tokens
    part.backward()
    return [part.detach(), weights.sum() / cfg.train_batch_tokens]


def summed_gradients(optimizers: list, others: list[Tensor], run: Run) -> list[list[Tensor]]:
    """Sum `others` and each group's gradients over ranks; a rank gets its part of Muon's stacks."""
    muons = [opt for opt in optimizers if isinstance(opt, Muon)]
    for muon in muons:
        muon.launch()  # these sums are under way while the small gradients are summed
    adams = [opt for opt in optimizers if opt not in muons]
    parameters = [p for opt in adams for group in opt.param_groups for p in group["params"]]
    reduce_gradients(parameters, others, run)
    return [
        opt.gradients(group) if opt in muons else [p.grad for p in group["params"]]
        for opt in optimizers
        for group in opt.param_groups
    ]


def gradient_norms(gradients: list[list[Tensor]], optimizers: list, run: Run) -> Tensor:
    """The norm of each group's gradient, over all ranks that hold parts of it."""
    in_parts = [isinstance(opt, Muon) for opt in optimizers for _ in opt.param_groups]
    squares = torch.stack([nn.utils.get_total_norm(group).square() for group in gradients])
    if run.ranks.num_parts > 1:
        for index, part in enumerate(in_parts):
            if not (part or run.ranks.is_main):
                squares[index] = 0.0  # every rank holds this group whole; only rank 0 counts it
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
    """Make one optimizer step; returns the mean loss, then the gradient norm of each group.

    The loss is sum(w nats) / sum(w) over the global batch, where all weights w are 1 unless
    MILE_GAMMA is set. Gradients and loss are divided by sum(w) at the end, when all ranks know it.
    """
    cfg = run.cfg
    loss, weight = torch.zeros(1, device=run.device), torch.zeros(1, device=run.device)
    for first, count in micro_batches(cfg, run):
        first_row = step * cfg.rows_per_step + first
        batch = rows.batch(first_row, count, moment.longest_document)
        torch._foreach_add_([loss, weight], backward(forward, model, batch, moment, run))
    if cfg.grad_clip_norm and cfg.clip_before_reduce:  # bounds the mean over this rank's own rows
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
    """Raise FloatingPointError, naming the groups, if a number of train_step() is not finite."""
    if not all(map(math.isfinite, stats)):
        bad = [g["route"] for g, x in zip(groups, stats[1:], strict=True) if not math.isfinite(x)]
        raise FloatingPointError(
            f"step {step}: loss {stats[0]}, gradient not finite in: {'; '.join(bad) or 'no group'}"
        )


def fit_micro_batch(
    forward: Forward, model: GPT, rows: TrainingRows, moment: Moment, run: Run
) -> None:
    """Halve the rows of a forward until they and what training keeps fit into every rank's memory.

    Raises torch.OutOfMemoryError if a single row, or what MICRO_BATCH_SEQS asks for, is too much.
    """
    rows_of_a_rank = divide_up(run.cfg.rows_per_step, run.ranks.world_size)
    while True:
        failed = 1.0
        with contextlib.suppress(torch.OutOfMemoryError):
            # Four tensors a parameter take the room of the weight averages and optimizer states.
            _room = [torch.empty_like(p) for p in model.parameters() for _ in range(4)]
            count = min(run.micro_batch_rows, rows_of_a_rank)
            backward(forward, model, rows.batch(0, count), moment, run)
            failed = 0.0
        model.zero_grad(set_to_none=True)
        if not run.ranks.largest(failed):
            return
        if run.cfg.micro_batch_seqs or run.micro_batch_rows == 1:
            raise torch.OutOfMemoryError(
                f"{run.micro_batch_rows} rows a forward are too many: "
                "lower MICRO_BATCH_SEQS, or take a smaller model"
            )
        run.micro_batch_rows //= 2
        run.folder.log(f"out of memory: trying {run.micro_batch_rows} rows a forward")


def has_bf16_products() -> bool:
    """Whether this processor has instructions that multiply in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiply_in_bf16(model: GPT, wanted: bool, run: Run) -> None:
    """Set whether training, and a Muon that is made after this, multiply in bfloat16 or float32.

    Parameters, their gradients, the stream, norms, softmax and loss stay in float32.
    """
    run.product_dtype = torch.bfloat16 if wanted else run.dtype
    for module in model.modules():
        if isinstance(module, Linear | Table):
            module.in_bf16 = wanted


def pick_products(
    forward: Forward, model: GPT, rows: TrainingRows, moment: Moment, run: Run
) -> None:
    """Choose the type in which training multiplies on a CPU; see CPU_BF16."""
    wanted = run.cfg.cpu_bf16
    if run.device.type != "cpu" or run.compiled or wanted == "0":
        return
    if wanted == "auto" and (run.cfg.step_driven or not has_bf16_products()):
        return
    times: dict[bool, list[float]] = {False: [], True: []}
    batch = rows.batch(0, min(run.micro_batch_rows, run.cfg.rows_per_step))
    for in_bf16 in [False, True] * 4:
        multiply_in_bf16(model, in_bf16, run)
        start = time.perf_counter()
        backward(forward, model, batch, moment, run)
        times[in_bf16].append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    before, after = (min(times[in_bf16]) for in_bf16 in (False, True))
    is_faster = run.ranks.largest(after / before) < 1.0 - LEAST_GAIN
    multiply_in_bf16(model, is_faster or wanted == "1", run)
    run.folder.log(
        "products in bf16:{kept} pass:{before:.1f}ms->{after:.1f}ms",
        "products",
        kept="yes" if run.product_dtype == torch.bfloat16 else "no",
        before=1e3 * before,
        after=1e3 * after,
    )


def compile_blocks(
    forward: Forward, model: GPT, rows: TrainingRows, moments: list[Moment], run: Run
) -> None:
    """On a CPU, compile Block.forward for training, and keep that if trial passes become faster.

    One graph serves all layers. This is only for runs that the clock ends, which do not repeat
    exactly anyway. A machine without a C++ compiler trains uncompiled.
    """
    cfg = run.cfg
    saving = cfg.max_wallclock_seconds * COMPILE_GAIN
    if run.device.type != "cpu" or cfg.compile != "auto" or cfg.step_driven:
        return
    if run.product_dtype != run.dtype:  # compiled blocks would multiply in float32
        return
    if saving < COMPILE_SECONDS:
        run.folder.log(
            f"blocks compiled:no, to save {saving:.0f} s it might take {COMPILE_SECONDS:.0f} s"
        )
        return
    passes = {(count, moment) for _, count in micro_batches(cfg, run) for moment in moments}

    def trial() -> float:
        """Seconds of one forward and backward pass for each number of rows and each moment."""
        start = time.perf_counter()
        for count, moment in passes:
            batch = rows.batch(0, count, moment.longest_document)
            backward(forward, model, batch, moment, run)
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    plain = compiled = min(trial(), trial(), trial())
    compiling = 0.0
    failure = ""
    model.compiled_block = torch.compile(Block.forward, dynamic=False)
    try:
        compiling = trial()
        compiled = min(trial(), trial(), trial())
    except Exception as error:  # a compiler fails in many ways
        failure = ": " + str(error).strip().split("\n")[0]
    ratio = compiled / plain if passes else 0.0  # a rank without rows leaves the choice to others
    if run.ranks.largest(ratio) >= 1.0:
        model.compiled_block = None
        model.zero_grad(set_to_none=True)
    run.folder.log(
        "blocks compiled:{kept} seconds:{seconds:.1f} pass:{before:.1f}ms->{after:.1f}ms{why}",
        "blocks_compiled",
        kept="no" if model.compiled_block is None else "yes",
        why=failure,
        seconds=compiling,
        before=1e3 * plain,
        after=1e3 * compiled,
    )


def prime(forward: Forward, model: GPT, rows: TrainingRows, run: Run) -> tuple[float, float]:
    """Compile and warm up every path of the run before its clock starts, then undo all changes.

    Makes a few steps with optimizers of its own, with and without QAT and loops, with documents of
    each length. Returns the measured seconds of one calibration batch and of one evaluation batch.
    """
    run.phase = "priming"
    cfg = run.cfg
    initial_state = copy.deepcopy(model.state_dict())
    qat_states = {"late": [False, True], "always": [True], "off": [False]}[cfg.qat_mode]
    loop_states = [False, True] if cfg.num_loops else [False]
    lengths = [length for _, length in cfg.context_stages] if cfg.attn_docs else [None]
    usual = Moment(
        lr_scale=1.0,
        momentum=cfg.muon_momentum,
        qat=False,
        done=False,
        mile_gamma=cfg.mile_gamma,
    )
    moments = [
        replace(usual, qat=qat, looping=looping, longest_document=length)
        for length in lengths
        for looping in loop_states
        for qat in qat_states
    ]
    fit_micro_batch(forward, model, rows, moments[-1], run)
    pick_products(forward, model, rows, moments[-1], run)
    steps = max(cfg.warmup_steps, len(moments)) if run.compiled else len(moments)
    optimizers = build_optimizers(cfg, route_parameters(cfg, model), run.product_dtype, run.ranks)
    for step in range(steps):
        train_step(forward, model, optimizers, rows, step, moments[step % len(moments)], run)
        run.folder.log(f"warmup_step:{step + 1}/{steps}")
    model.load_state_dict(initial_state)
    scoring_seconds = prime_scoring(forward, model, run)
    compile_blocks(forward, model, rows, moments, run)
    ids = rows.batch(0, CALIBRATION_ROWS).input_ids
    calibration_seconds = timed(
        lambda: collect_hessians(model, lambda n: ids, 1, math.inf, run), run
    )
    return calibration_seconds, scoring_seconds


def prime_scoring(forward: Forward, model: GPT, run: Run) -> float:
    """Compile and warm up the forward of scoring; returns the seconds of an evaluation batch."""
    cfg = run.cfg
    T = cfg.eval_seq_len
    stride = cfg.eval_stride

    def blank(rows: int, *widths: int) -> Batch:
        """A batch of BOS: input_ids, target_ids and perhaps places, of these widths.

        Each is a tensor of its own, as in real batches: shared ones would compile another graph.
        """
        batch = Batch(*(torch.full((rows, width), BOS) for width in widths))
        batch = batch.by_document(T) if cfg.attn_docs else batch
        return batch.moved(run.to_device)

    if cfg.ttt_mode in ("score_first", "train_then_score"):
        forward(model, blank(run.adaptation_rows, T, T))[0].sum().backward()
        model.zero_grad(set_to_none=True)
    whole = blank(run.scored_rows, T, T)
    seconds = timed(lambda: forward(model, whole)[0].sum().item(), run)
    if 0 < stride < T:
        sliding = blank(run.scored_rows, T, stride, stride)
        seconds = timed(lambda: forward(model, sliding)[0].sum().item(), run)
    return seconds * cfg.eval_batch_seqs / run.scored_rows


@torch.no_grad()
def timed(work: Callable[[], object], run: Run) -> float:
    """Seconds of a second call, when all is compiled; every rank returns those of rank 0."""
    work()
    start = time.perf_counter()
    work()
    return run.ranks.agree(time.perf_counter() - start)


class Averages:
    """The weight averages that AVG_MODE keeps: "ema", "swa" (a mean of snapshots), or both."""

    def __init__(self, model: GPT, cfg: Config) -> None:
        self.model = model
        self.decay = cfg.ema_decay
        self.snapshots = 0  # the number that SWA has taken
        names = {"ema": ["ema"], "swa": ["swa"], "swa_of_ema": ["ema", "swa"], "none": []}
        self.kept = {name: copy.deepcopy(model) for name in names[cfg.avg_mode]}

    @torch.no_grad()
    def update(self, snapshot: bool) -> None:
        """Take the weights of a step into the averages, without waiting for a GPU."""
        if "ema" in self.kept:
            self.move("ema", self.model, 1.0 - self.decay)
        if not snapshot:
            return
        self.snapshots += 1
        if "swa" in self.kept:
            source = self.kept.get("ema", self.model)  # swa_of_ema takes the EMA's weights
            self.move("swa", source, 1.0 / self.snapshots)

    @torch.no_grad()
    def move(self, name: str, source: GPT, share: float) -> None:
        """Move an average A towards the weights W of `source`: A <- A + share (W - A)."""
        average: list[Tensor] = list(self.kept[name].parameters())
        torch._foreach_lerp_(average, list(source.parameters()), share)

    def acting(self, snapshot: bool) -> dict[str, bool]:
        """For each average that is kept, whether the step changed it."""
        changed = {"ema": True, "swa": snapshot}
        return {name: changed[name] for name in self.kept}

    def result(self, run: Run) -> GPT:
        """The model to export; call this once, since AVG_LAST_SHARE changes the kept average.

        If SWA took no snapshot, this is the model it would have averaged: the EMA or the last
        weights.
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
    """A step that a GPU may not have finished, and that is not in the log yet."""

    stats: Callable[[], list[float]]  # waits for the result of train_step() and returns it
    moment: Moment
    show: bool  # whether to log the step even if TRAIN_LOG_EVERY does not ask for it


class Training:
    """Everything that training changes; a checkpoint holds all of it, for any number of ranks."""

    def __init__(self, model: GPT, reserve: float, data: list, run: Run) -> None:
        """reserve: the part of the budget that is kept for calibration, in the budget's unit."""
        cfg = run.cfg
        self.model = model
        self.run = run
        self.data = data  # identifies the data: a checkpoint with another value is refused
        self.step = 0  # the number of steps that are done
        self.saved_at = 0.0  # seconds of training at the last checkpoint
        groups = route_parameters(cfg, model)
        self.optimizers = build_optimizers(cfg, groups, run.product_dtype, run.ranks)
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
        self.last_logged_share = -1  # how much of the run was done at the last log line, in 50ths

    @property
    def groups(self) -> list[dict]:
        """The parameter groups of all optimizers, in the order of train_step()'s norms."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def spent(self, seconds: float) -> float:
        """What `seconds` of training have cost: operations if the budget has them, else seconds."""
        if self.schedule.unit == "operations":
            return self.run.ledger.training_operations
        return seconds

    def begin_step(self, seconds: float) -> Moment:
        """What the schedules say for the next step, which begins after `seconds` of training."""
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
        """Take in a step that began after `seconds` of training, and log the one before it.

        The numbers of the step before have arrived by now, so that a GPU need not be waited for.
        """
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
        """Count in the ledger, for each scheduled technique, whether it acts in this step."""
        acting = self.schedule.acting(moment) | self.averages.acting(moment.snapshot)
        for name, acts in acting.items():
            if name.endswith("_qat") and not self.rounded_matrices:
                acts = False
            self.run.ledger.note(name, acts)

    def log_pending(self, seconds: float, show: bool = False) -> None:
        """Check and log the pending step, if any; `seconds` of training have passed."""
        if self.pending is None:
            return
        pending = self.pending
        self.pending = None
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
        """Whether the log shows the step that has just been done."""
        every = self.run.cfg.train_log_every
        if self.step <= 10:
            return True
        if every:
            return self.step % every == 0
        return int(50 * progress) > self.last_logged_share

    def save(self, seconds: float) -> None:
        """Write a checkpoint after `seconds` of training; all ranks must call this."""
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
                "context_stage": [schedule.stage, schedule.stage_begun],
                "occasions": dict(run.ledger.occasions),
                "activity": dict(run.ledger.activity),
                "last_logged_share": self.last_logged_share,
            }
        )

    def restore(self, saved: dict) -> None:
        """Continue from a checkpoint; raises RuntimeError if it was made on other data."""
        run, schedule = self.run, self.schedule
        if saved["data"] != self.data:
            raise RuntimeError(
                f"the checkpoint was made on other data ({saved['data']}, now "
                f"{self.data}): give the run its data again, or begin a new run"
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
        schedule.looping = saved["looping"]
        schedule.stage, schedule.stage_begun = saved["context_stage"]
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
        """Write a checkpoint if one is due, or if a signal asks the run to end; then end it."""
        self.run.ledger.note_pause(f"before step {self.step + 1}")
        every = self.run.cfg.checkpoint_seconds
        # All ranks use the number they agree on: run.signal may change on any rank at any time.
        end_signal = int(self.run.ranks.largest(self.run.signal))
        is_due = every > 0 and seconds - self.saved_at >= every
        if end_signal or is_due:
            self.log_pending(seconds)
            self.save(seconds)
            self.stop(end_signal)

    def stop(self, end_signal: int) -> None:
        """End the process if a signal, given by its number, has asked for that; 0 if none has."""
        if end_signal:
            name = self.run.folder.path.name if self.run.folder.path is not None else ""
            situation = f"after step {self.step}; RESUME=1 RUN_ID={name} goes on from there"
            self.run.stop(end_signal, situation)


def log_starts(
    state: Training, moment: Moment, qat_begins: bool, loops_begin: bool, documents_grow: bool
) -> None:
    """Log what begins with this step: longer documents, looping, SWA, QAT."""
    run = state.run
    if documents_grow:
        run.folder.log(
            "documents:grown step:{step} longest:{longest}",
            "documents_grown",
            step=state.step,
            longest=moment.longest_document,
        )
    if loops_begin:
        run.folder.log(
            "depth_loop:enabled step:{step} layers:{layers}",
            "depth_loop",
            step=state.step,
            layers=[layer.block for layer in state.model.plan],
        )
    if "swa" in state.averages.kept and moment.snapshot and not run.ledger.activity["swa"]:
        run.folder.log(f"swa:start step:{state.step + 1}")
    if qat_begins:
        run.folder.log(
            "{mode}_qat:enabled step:{step} scale:{scale:.4f} matrices:{matrices}",
            f"{run.cfg.qat_mode}_qat",
            mode=run.cfg.qat_mode,
            step=state.step,
            scale=moment.lr_scale,
            matrices=state.rounded_matrices,
        )


def train(forward: Forward, state: Training, rows: TrainingRows, val: Validation, run: Run) -> GPT:
    """Train until only calibration's reserve of the budget is left; returns the averaged model."""
    run.phase = "training"
    cfg, model, schedule = run.cfg, state.model, state.schedule
    clock = run.ledger.training_clock
    with clock.running(), training_bar(schedule, run) as bar:
        while True:
            step = state.step
            seconds = run.ranks.agree(clock.elapsed())
            state.save_if_asked(seconds)
            qat_before = schedule.qat
            looping_before = schedule.looping
            stage_before = schedule.stage
            moment = state.begin_step(seconds)
            if moment.done:
                break
            if cfg.val_loss_every and step and step % cfg.val_loss_every == 0:
                run.wait_for_gpu()
                with clock.running(False):
                    result = evaluate("validation", forward, model, val, run)
                    report(f"step:{step}/{cfg.iterations}", result, run, step)
            qat_begins = moment.qat and not qat_before
            loops_begin = moment.looping and not looping_before
            documents_grow = schedule.stage > stage_before
            log_starts(state, moment, qat_begins, loops_begin, documents_grow)
            stats = train_step(forward, model, state.optimizers, rows, step, moment, run)
            begins = qat_begins or loops_begin or documents_grow
            state.end_step(stats, moment, seconds, show=begins)
            bar.update(schedule.budget_spent(state.step, state.spent(seconds)) - bar.n)
        state.log_pending(clock.elapsed(), show=True)
    state.save(run.ranks.agree(clock.elapsed()))  # the clock has stopped: this costs no budget
    run.phase = "calibration"  # from here on, a signal ends the run at once
    state.stop(int(run.ranks.largest(run.signal)))  # a signal may have come after the last step
    run.ledger.trained_seconds = clock.elapsed()
    reason = "stopping: last step"
    if state.step < cfg.iterations:
        reason = {
            "seconds": "stopping_early: wallclock_cap",
            "operations": "stopping: MAX_TRAIN_TFLOPS holds no further step",
        }[schedule.unit]
    run.folder.log(
        "{reason} train_time:{ms:.0f}ms step:{step}/{iterations}",
        "trained",
        step=state.step,
        ms=1e3 * run.ledger.trained_seconds,
        iterations=cfg.iterations,
        reason=reason,
    )
    return state.averages.result(run)


def log_gates(model: GPT, run: Run) -> None:
    """Log the largest weight of each kind of gate; all start at 0, so one at 0 has never moved."""
    largest: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        is_gate_weight = model.kinds[name].fits is is_gate or name == "skip_gates"
        if is_gate_weight and parameter.numel():  # a model of one layer has an empty skip gate
            kind = re.sub(r"^blocks\.\d+\.", "", name)
            largest[kind] = max(largest.get(kind, 0.0), float(parameter.detach().abs().max()))
    if largest:
        weights = " ".join(f"{kind}:{weight:.4f}" for kind, weight in largest.items())
        run.folder.log(f"gates largest weights: {weights}", "gates", largest=largest)


def without_untrained_loops(model: GPT, state: Training, run: Run) -> tuple[GPT, Run]:
    """Remove loops from model and run if training ended before ENABLE_LOOPING_AT.

    Otherwise the exported network would repeat layers although its weights were never trained so.
    """
    if not run.cfg.num_loops or state.schedule.looping:
        return model, run
    run.folder.log("warning: training ended before ENABLE_LOOPING_AT: exported without loops")
    cfg = replace(run.cfg, num_loops=0)
    unlooped = GPT(cfg, model.kernel, run.dtype).to(run.device)
    unlooped.penalty = model.penalty
    for name, parameter in unlooped.named_parameters():
        trained = model.get_parameter(name).detach()
        # With loops there are more skips, and so more rows of skip weights.
        parameter.data.copy_(trained[: len(parameter)] if parameter.ndim else trained)
    return unlooped, run.with_settings(cfg)


def training_bar(schedule: Schedule, run: Run) -> tqdm:
    """Make the progress bar of training, in the budget's unit."""
    units = {"steps": "step", "seconds": "s", "operations": "FLOP"}
    return run.folder.progress("training", total=schedule.budget, unit=units[schedule.unit])


# =================================================================================================
# Quantization
# Policy (which tensor gets which grid), quantizers (tensor to integers and scales), and the
# Hessians that GPTQ needs. None of them knows about files.
#
# A row of a matrix (r, c) is stored on a grid: integers from -top to top, times the row's scale,
# which is the step of the grid. The clip is where the grid ends, top times the scale; what lies
# beyond is rounded to that. `top` is 31 for 6 bits, 127 for 8. The functions that choose among
# several scales compute all n candidates at once, along a first dimension.
# =================================================================================================


ROLES = ("mlp", "attn", "emb", "aux")  # each parameter has one; keys of BITS and CLIP_SIGMAS


@functools.lru_cache(8)  # needed for every matrix in every step with fake quantization
def values_by_role(name: str, text: str, to_number: type, pattern: str, expected: str) -> dict:
    """Parse a setting like mlp:6,attn:6,emb:8,aux:8 to {role or tensor name: number}; fp16 is 0.

    name: of the setting. pattern, expected: a value's form, as a regular expression and in words.
    Raises Refusal if a part is malformed, or if a role is missing or given twice.
    """
    values: dict = {}
    for part in text.split(","):
        owner, _, value = part.strip().partition(":")
        if (
            owner in values
            or not re.fullmatch(r"[\w.]{1,100}", owner)
            or not re.fullmatch(pattern, value)
        ):
            raise Refusal(
                f"{name}={text!r}: {part!r} is not one of {', '.join(ROLES)} or a tensor's name, "
                f"then a colon and {expected}"
            )
        values[owner] = 0 if value == "fp16" else to_number(value)
    if not set(ROLES) <= set(values):
        raise Refusal(f"{name}={text} must give each of {', '.join(ROLES)} once")
    return values


@dataclass(frozen=True, kw_only=True)
class QatSettings(Part):
    """Quantization-aware training (QAT): the forward reads weights rounded to the integer grid."""

    title = "Quantization-aware training"
    prefixes: ClassVar[tuple[str, ...]] = ("QAT_",)

    qat_mode: str = training_knob(
        "late",
        ("late", "always", "off"),
        "Round weights to the integer grid in training from LATE_QAT_THRESHOLD on (late), always "
        "or never (off).",
    )
    late_qat_threshold: float = training_knob(
        0.15, (0.0, 1.0), "Start QAT_MODE=late once rates are below this fraction of their peak."
    )
    qat_clip: str = training_knob(
        "absmax",
        ("absmax", "quantile"),
        "In QAT, clip a row at its largest magnitude, or at a quantile of its magnitudes.",
    )
    qat_targets: str = training_knob(
        "stored",
        ("stored", "linears", "blocks", "aux"),
        "In QAT, round the linear weights that are stored as integers (stored), all (linears), "
        "those of the blocks (blocks), or all others (aux).",
    )


@dataclass(frozen=True, kw_only=True)
class GridSettings(Part):
    """Which tensors become integers, with how many bits, and where their grids end."""

    title = "Quantization: grids"

    bits: str = model_knob(
        "mlp:6,attn:6,emb:8,aux:8",
        (),
        "Store the matrices of each role, or one tensor given by its name (tok_emb:7), in 2 to 8 "
        "bits or as fp16.",
    )
    int8_keep_float_max_numel: int = model_knob(
        65536, (0, 1 << 30), "Store tensors of up to this many elements as fp16."
    )
    quant_clip: str = training_knob(
        "percentile",
        ("percentile", "std", "std_published"),
        "Clip a row where CLIP_SEARCH says (percentile), or at CLIP_SIGMAS standard deviations "
        "(std_published); std clips at the row's maximum if that is larger, and takes only scales "
        "that are cheap to code.",
    )
    clip_sigmas: str = training_knob(
        "mlp:12.85,attn:12.85,emb:10,aux:30",
        (),
        "With QUANT_CLIP=std and std_published, clip a row at this many standard deviations, by "
        "role or tensor.",
        tries=("mlp:8,attn:8,emb:8,aux:20",),
    )
    gate_storage: str = training_knob(
        "fp16", ("fp16", "int8"), "Store attention gates as fp16, or as int8 with row scales."
    )
    clip_search: str = training_knob(
        "matrix",
        ("absmax", "matrix", "row"),
        "With QUANT_CLIP=percentile, clip a row at its maximum (absmax), or at the best of a few "
        "quantiles, chosen for a whole matrix or for each row.",
    )
    q_scale_floor: str = training_knob(
        "inv_clip",
        ("inv_clip", "tiny"),
        "Let no scale be below 1 / the grid's largest integer (inv_clip), or 2^-14 (tiny).",
    )

    @property
    def clips_by_deviation(self) -> bool:
        """Whether CLIP_SIGMAS sets the scales, and so the size of the artifact."""
        return self.quant_clip != "percentile"

    @property
    def bits_by_role(self) -> dict[str, int]:
        """BITS, by role or tensor name; 0 for fp16."""
        return values_by_role("BITS", self.bits, int, r"[2-8]|fp16", "2 to 8 or fp16")

    @property
    def sigmas_by_role(self) -> dict[str, float]:
        """CLIP_SIGMAS, by role or tensor name."""
        return values_by_role(
            "CLIP_SIGMAS",
            self.clip_sigmas,
            float,
            r"[1-9]\d{0,2}(\.\d+)?",
            "a number from 1 to 999",
        )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """BITS and CLIP_SIGMAS name only tensors that the model has."""
        for name, given in (("BITS", cfg.bits_by_role), ("CLIP_SIGMAS", cfg.sigmas_by_role)):
            layers = [int(number) for role in given for number in re.findall(r"\d+", role)]
            yield (
                all(layer < cfg.num_layers for layer in layers),
                f"{name} names a layer that is not below NUM_LAYERS",
            )
            for tensor in set(given) - set(ROLES):
                yield (
                    f"{tensor}.weight" in kinds_for(cfg),
                    f"{name} names {tensor!r}, which is no tensor of the model",
                )


@dataclass(frozen=True, kw_only=True)
class GptqSettings(Part):
    """GPTQ, which takes the inputs of a matrix into account when it rounds, and pruning."""

    title = "Quantization: GPTQ and pruning"
    prefixes: ClassVar[tuple[str, ...]] = ("GPTQ_", "PRUNE_")

    gptq_variant: str = training_knob(
        "full",
        ("full", "simple", "off"),
        "Round matrices by GPTQ (full), by the GPTQ of #1361 (simple), or to nearest (off).",
    )
    gptq_actorder: bool = training_knob(
        True, (), "In GPTQ, round the columns with the largest activations first."
    )
    gptq_select: str = training_knob(
        "mse",
        ("mse", "hessian"),
        "In GPTQ, choose the clip of least squared error (mse), or of least squared error weighted "
        "by the Hessian.",
    )
    gptq_calib: str = training_knob(
        "train",
        ("train", "selfgen", "train_after_cap"),
        "Calibrate GPTQ on training text within the training budget (train), on text that the "
        "model samples (selfgen; slow), or on training text after the budget (train_after_cap; "
        "such a run is not eligible as a record).",
    )
    gptq_calib_batches: int = training_knob(
        256, (1, 10**6), "Calibrate GPTQ on this many batches of 8 rows."
    )
    gptq_block_size: int = training_knob(
        128, (1, 1 << 16), "In GPTQ, round this many columns between updates of all later ones."
    )
    prune_frac: float = training_knob(
        0.0, (0.0, 0.99), "Zero this fraction of each large matrix before rounding."
    )
    prune_pct: float = training_knob(
        0.0, (0.0, 0.99), "After rounding, zero this fraction of the integers of less than 8 bits."
    )


MAX_RANK = 64  # the largest rank of a correction, in settings and in artifacts


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings(Part):
    """What reduces the rounding error of the matrices that it harms most."""

    title = "Quantization: corrections"
    prefixes: ClassVar[tuple[str, ...]] = ("LQER_", "AWQ_")

    lqer_top_k: int = training_knob(
        0,
        (0, 64),
        "Store a low-rank correction for this many matrices, those of the largest rounding error; "
        "0 turns it off.",
    )
    lqer_rank: int = training_knob(4, (1, MAX_RANK), "Give these corrections this rank.")
    lqer_group: int = training_knob(
        64, (1, 1 << 16), "Let this many elements of a correction's right factor share a scale."
    )
    awq_columns: int = training_knob(
        0, (0, 1 << 16), "Store the most important group of this many columns in 8 bits; 0: none."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Only GPTQ with one clip candidate per row can give some columns bits of their own."""
        yield (
            cfg.awq_columns == 0 or (cfg.clips_by_deviation and cfg.gptq_variant == "full"),
            "AWQ_COLUMNS needs QUANT_CLIP=std or std_published and GPTQ_VARIANT=full",
        )


# Quantiles of a row's magnitudes at which it may be clipped.
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999)  # candidates of CLIP_SEARCH besides the maximum
QAT_QUANTILE = 0.9995  # for QAT_CLIP=quantile
INT8_QUANTILE = 0.9999984  # for matrices of 8 bits without GPTQ

TINY_SCALE = 2.0**-14  # the least scale for Q_SCALE_FLOOR=tiny; the smallest normal fp16 number
SMALLEST_FP16 = 2.0**-24  # the smallest positive fp16 number, which is subnormal
INT8_TOP = 127  # the largest integer of a grid of 8 bits
SCALES_PER_OCTAVE = 8  # QUANT_CLIP=std takes only scales 2^(n / 8), n whole

CALIBRATION_ROWS = 8  # rows in a calibration batch
SAMPLING_TEMPERATURE = 0.8  # for calibration rows that the model samples
# What is added to a Hessian's diagonal, as a share of its mean; each further try adds ten times as
# much as the one before.
DAMPING = 0.01
DAMPING_TRIES = 5

# The integers of a low-rank correction's left and right factor lie in these ranges. A scale is the
# largest magnitude over its divisor, which puts that magnitude midway between those of the ends.
LEFT_RANGE, RIGHT_RANGE = (-2, 1), (-8, 7)
LEFT_DIVISOR, RIGHT_DIVISOR = 1.5, 7.5


def round_to_grid(x: Tensor, scale: Tensor, top: Any) -> Tensor:
    """The nearest integers from -top to top of x / scale, as floats; any shapes that broadcast."""
    return torch.round(x / scale).clamp(-top, top)


@dataclass(frozen=True)
class ProtectedColumns:
    """Neighbouring columns of a matrix (r, c) that have 8 bits and row scales of their own."""

    start: int
    width: int
    scale: Tensor  # fp16 (r,)

    @property
    def columns(self) -> slice:
        """The columns as a slice of the matrix's second dimension."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True)
class LowRank:
    """A correction A B of rank k that is added to a quantized matrix (r, c); A and B are integers.

    Low-rank quantization error reconstruction (LQER): arXiv:2402.02446; ranges and scales are those
    of parameter-golf #1855.
    """

    left: Tensor  # A: int8 (r, k), within LEFT_RANGE
    right: Tensor  # B: int8 (k, c), within RIGHT_RANGE
    left_scale: Tensor  # fp16 ()
    right_scales: Tensor  # fp16, one for each `group` elements of B in row-major order
    group: int

    def product(self) -> Tensor:
        """The correction A B with its scales: float32 (r, c)."""
        scales = self.right_scales.float().repeat_interleave(self.group)[: self.right.numel()]
        right = self.right.float() * scales.view_as(self.right)
        return (self.left_scale.float() * self.left.float()) @ right


@dataclass(frozen=True)
class Stored:
    """A tensor as the artifact holds it: integers with a scale for each row, floats, or bytes."""

    values: Tensor  # int8 (r, c), or fp16 of any shape, or uint8 (n,) for packed text
    scale: Tensor | None = None  # fp16 (r,), for integers only
    protected: ProtectedColumns | None = None
    low_rank: LowRank | None = None

    @property
    def kind(self) -> str:
        """How the tensor is stored: a key of STORAGE_KINDS."""
        if self.values.dtype == torch.uint8:
            return "packed"
        if self.scale is None:
            return "float"
        protected = "" if self.protected is None else "_protected"
        low_rank = "" if self.low_rank is None else "_low_rank"
        return f"grid{protected}{low_rank}"

    def numbers(self) -> list[int]:
        """What the header holds besides name and kind; the shapes of arrays() follow from these."""
        numbers = [*self.values.shape]
        if self.protected is not None:
            numbers += [self.protected.start, self.protected.width]
        if self.low_rank is not None:
            numbers += [self.low_rank.left.size(1), self.low_rank.group]
        return numbers

    def arrays(self) -> list[Tensor]:
        """The tensor's arrays in the order in which the artifact holds them, integers first."""
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
        """The tensor that has this kind, these numbers() and these arrays()."""
        rest = iter(arrays)
        values = next(rest)
        is_corrected = "low_rank" in kind
        factors = [next(rest), next(rest)] if is_corrected else []
        scale = next(rest, None)
        protected = low_rank = None
        if "protected" in kind:
            protected = ProtectedColumns(numbers[2], numbers[3], next(rest))
        if is_corrected:
            left, right = factors
            low_rank = LowRank(left, right, next(rest), next(rest), numbers[-1])
        return cls(values, scale, protected, low_rank)

    def cpu(self) -> Stored:
        """The same tensor in host memory."""
        return Stored.of(self.kind, self.numbers(), [array.cpu() for array in self.arrays()])

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
    """The value of BITS or CLIP_SIGMAS for a parameter: its own, or else that of its role."""
    return by_role.get(name.removesuffix(".weight"), by_role[model.kinds[name].role])


def bits_of(model: GPT, name: str) -> int:
    """Bits of a parameter's integers, or 0 for floats: only large matrices become integers."""
    parameter = model.get_parameter(name)
    is_large = parameter.numel() > model.cfg.int8_keep_float_max_numel
    if parameter.ndim != 2 or not is_large or not model.kinds[name].may_be_integers:
        return 0
    return setting_of(model, name, model.cfg.bits_by_role)


def largest_integer(bits: int) -> int:
    """The `top` of a grid: 31 for 6 bits, 127 for 8."""
    return 2 ** (bits - 1) - 1


def row_scales(clip: Tensor, top: int, floor: str) -> Tensor:
    """The scales with which rows are clipped at `clip`, any shape; floor: Q_SCALE_FLOOR.

    The floor inv_clip keeps the grid of rows of small numbers coarse, and so cheap to code.
    """
    least = 1.0 / top if floor == "inv_clip" else TINY_SCALE
    return (clip / top).clamp_min(least)


def fp16_scale(scale: Tensor) -> Tensor:
    """The nearest fp16 number, but never 0, since rows are divided by their scales."""
    return scale.half().clamp_min(SMALLEST_FP16)


def deviation_scales(W: Tensor, top: int, sigmas: float) -> Tensor:
    """The scales with which rows are clipped at `sigmas` deviations: (r, c), c >= 2 -> fp16 (r,).

    s = fp16(sigmas std(row) / top), where std divides by c - 1, as in parameter-golf #1855. A scale
    is a fixed share of the row's deviation, so that `sigmas` sets the integers' entropy.
    """
    return fp16_scale(sigmas * W.std(dim=1) / top)


def qat_grids(model: GPT) -> dict[str, int]:
    """The linear weights that QAT rounds, and their bits.

    A weight that is stored as floats is rounded to the bits of its role if it belongs to a block,
    and to 6 bits if not.
    """
    grids = {}
    for name, kind in model.kinds.items():
        if not kind.may_be_rounded:
            continue
        bits = bits_of(model, name)
        in_blocks = kind.role != "aux"
        is_target = {"stored": bits > 0, "linears": True, "blocks": in_blocks, "aux": not in_blocks}
        if is_target[model.cfg.qat_targets]:
            role_bits = model.cfg.bits_by_role[kind.role] if in_blocks else 0
            grids[name] = bits or role_bits or 6
    return grids


def row_quantile(x: Tensor, q: float) -> Tensor:
    """torch.quantile of each row, (r, c) -> (r, 1), but fast for q near 1, and compilable."""
    rank = q * (x.size(1) - 1)  # among the ascending elements; the quantile may lie between two
    largest = x.topk(x.size(1) - int(rank), dim=1).values  # in descending order
    below = largest[:, -1:]
    above = largest[:, -2:][:, :1]  # equal to `below` if that is the row's maximum
    return torch.lerp(below, above, rank - int(rank))


def fake_quantized(model: GPT, grids: dict[str, int]) -> dict[str, Tensor]:
    """The weights named in `grids` (name: bits), rounded to their grids: clamp(round(W / s)) s.

    The scales s follow QAT_CLIP. Gradients pass as if nothing had been rounded.
    """
    rounded = {}
    for name, bits in grids.items():
        weight = model.get_parameter(name)
        top = largest_integer(bits)
        magnitude = weight.detach().abs()
        if model.cfg.qat_clip == "quantile":
            clip = row_quantile(magnitude, QAT_QUANTILE)
        else:
            clip = magnitude.amax(dim=1, keepdim=True)
        scale = row_scales(clip, top, model.cfg.q_scale_floor)
        on_grid = round_to_grid(weight.detach(), scale, top) * scale
        rounded[name] = weight + (on_grid - weight.detach())
    return rounded


def clip_candidates(W: Tensor, bits: int, cfg: Config, sigmas: float = 0.0) -> Tensor:
    """Row scales to choose from by QUANT_CLIP, the largest last: (r, c) -> float32 (n, r).

    percentile: one candidate for each of CLIP_QUANTILES, and one for the row's maximum.
    std: one candidate, which clips at `sigmas` standard deviations, or at the row's maximum if that
    is larger, and is rounded to a power of 2^(1 / SCALES_PER_OCTAVE); that costs nothing in error
    and leaves few different scales to code.
    std_published: deviation_scales() alone; a matrix of one column, which has no deviation, is
    clipped at the maximum.
    """
    top = largest_integer(bits)
    if cfg.quant_clip == "std_published" and W.size(1) > 1:
        return deviation_scales(W, top, sigmas).float()[None]
    clips = W.abs().amax(dim=1)[None]
    if cfg.quant_clip == "std":
        clips = torch.maximum(clips, sigmas * W.std(dim=1, correction=0))
        power = torch.round(SCALES_PER_OCTAVE * (clips / top).log2())
        return torch.exp2(power / SCALES_PER_OCTAVE).clamp_min(TINY_SCALE)
    if cfg.clip_search != "absmax":
        quantiles = torch.tensor(CLIP_QUANTILES, device=W.device)
        clips = torch.cat([torch.quantile(W.abs(), quantiles, dim=1), clips])
    return row_scales(clips, top, cfg.q_scale_floor)


def pick_clip(errors: Tensor, Q: Tensor, scales: Tensor, cfg: Config) -> Stored:
    """The candidate of least error, chosen for the whole matrix or for each row (CLIP_SEARCH).

    For n candidates: errors (n, r), integers Q (n, r, c), scales (n, r).
    """
    rows = torch.arange(errors.size(1), device=errors.device)
    best = errors.argmin(0)
    if cfg.clip_search != "row":
        best = errors.sum(1).argmin().expand_as(rows)
    return Stored(Q[best, rows].to(torch.int8), scales[best, rows])


def column_grids(
    scales: Tensor, bits: int, num_columns: int, protected: ProtectedColumns | None
) -> tuple[Tensor, Tensor]:
    """The scale of each column, (n, r, 1) or with protected columns (n, r, c), and its top (c,).

    scales: (n, r), those of n candidates.
    """
    scale = scales.float().unsqueeze(-1)
    tops = torch.full((num_columns,), float(largest_integer(bits)), device=scales.device)
    if protected is not None:
        scale = scale.repeat(1, 1, num_columns)
        scale[..., protected.columns] = protected.scale.float()[:, None]
        tops[protected.columns] = INT8_TOP
    return scale, tops


def protect(
    W: Tensor, columns: slice | None, cfg: Config, sigmas: float
) -> ProtectedColumns | None:
    """Give columns of W (r, c) grids of 8 bits, with the clip of the others; None without any."""
    if columns is None:
        return None
    scale = clip_candidates(W, 8, cfg, sigmas)[-1].half()
    return ProtectedColumns(columns.start, columns.stop - columns.start, scale)


def round_to_nearest(
    W: Tensor, bits: int, cfg: Config, sigmas: float = 0.0, columns: slice | None = None
) -> Stored:
    """W (r, c) rounded to the nearest integers, with the clip of least squared error.

    sigmas: from CLIP_SIGMAS. columns: those that get 8 bits instead of `bits`.
    """
    scales = clip_candidates(W, bits, cfg, sigmas).half()
    protected = protect(W, columns, cfg, sigmas)
    scale, tops = column_grids(scales, bits, W.size(1), protected)
    Q = round_to_grid(W, scale, tops)
    stored = pick_clip((W - Q * scale).square().mean(dim=2), Q, scales, cfg)
    return replace(stored, protected=protected)


def int8_rows(W: Tensor) -> Stored:
    """W (r, c) rounded to the nearest integers of 8 bits, each row clipped at its INT8_QUANTILE.

    As published, it rounds by the exact scale, and the scale is rounded to fp16 only afterwards.
    """
    clip = torch.quantile(W.abs(), INT8_QUANTILE, dim=1)
    scale = row_scales(clip, INT8_TOP, "inv_clip")
    clipped = W.clamp(-clip[:, None], clip[:, None])
    q = round_to_grid(clipped, scale[:, None], INT8_TOP)
    return Stored(q.to(torch.int8), scale.half())


def gate_rows(W: Tensor) -> Stored:
    """W (r, c) rounded to the nearest integers of 8 bits, as GATE_STORAGE=int8 wants it.

    A row's scale is fp16(max |row| / 127).
    """
    scale = fp16_scale(W.abs().amax(dim=1) / INT8_TOP)
    q = round_to_grid(W, scale.float()[:, None], INT8_TOP)
    return Stored(q.to(torch.int8), scale)


def inverse_factor(H: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (H + damping I)^-1: (c, c) -> (c, c).

    The damping grows until H + damping I is positive definite; raises LinAlgError if it is not
    after DAMPING_TRIES.
    """
    identity = torch.eye(H.size(0), device=H.device)
    damping = DAMPING * H.diagonal().mean().clamp_min(1e-12)
    for _ in range(DAMPING_TRIES):
        with contextlib.suppress(torch.linalg.LinAlgError):
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(H + damping * identity))
            return torch.linalg.cholesky(inverse, upper=True)
        damping = damping * 10
    raise torch.linalg.LinAlgError("no damping made the Hessian positive definite")


def gptq(
    W: Tensor, H: Tensor, bits: int, cfg: Config, sigmas: float = 0.0, columns: slice | None = None
) -> Stored:
    """GPTQ (arXiv:2210.17323): integers Q and row scales s that keep ||(W - s Q) X||^2 small.

    W: (r, c); H = X X^T: (c, c); both float32. The columns are rounded one after the other, and
    those to come are changed so that they make up for a column's rounding error. Of the candidates
    for the clip the one of least squared error is kept, weighted by H if GPTQ_SELECT=hessian.
    sigmas: from CLIP_SIGMAS. columns: those that get 8 bits instead of `bits`.
    """
    scales = clip_candidates(W, bits, cfg, sigmas).half()
    protected = protect(W, columns, cfg, sigmas)
    scale, tops = column_grids(scales, bits, W.size(1), protected)
    unseen = H.diagonal() == 0  # inputs that were always 0
    H = H + torch.diag(unseen.float())
    order = torch.arange(W.size(1), device=W.device)
    if cfg.gptq_actorder:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
    W = W.masked_fill(unseen, 0.0)[:, order]
    H = H[order][:, order]
    if scale.size(2) > 1:
        scale = scale[..., order]
    Q = round_columns(W, scale, inverse_factor(H), tops[order], cfg)
    error = W - Q * scale
    weighted = error @ H if cfg.gptq_select == "hessian" else error
    stored = pick_clip((weighted * error).mean(dim=2), Q[..., torch.argsort(order)], scales, cfg)
    return replace(stored, protected=protected)


def round_columns(W: Tensor, scale: Tensor, U: Tensor, tops: Tensor, cfg: Config) -> Tensor:
    """GPTQ's loop over columns i: e = (w_i - q_i s) / U_ii, then w_j <- w_j - e U_ij for j > i.

    W: (r, c), scale: (n, r, 1) or (n, r, c) of n candidates, U: (c, c), tops: (c,) -> Q: (n, r, c).
    Columns after the current block of GPTQ_BLOCK_SIZE are updated once per block, by one matrix
    product.
    """
    top = tops.tolist()
    diagonal = U.diagonal().tolist()
    rest = W.T.repeat(1, len(scale))  # (c, n r): what the loop reads and writes is contiguous
    scales = scale.permute(2, 0, 1).reshape(scale.size(2), -1).expand_as(rest)
    Q = torch.empty_like(rest)
    for start in range(0, len(rest), cfg.gptq_block_size):
        stop = min(start + cfg.gptq_block_size, len(rest))
        errors: list[Tensor] = []
        for col in range(start, stop):
            column = rest[col]
            q = torch.div(column, scales[col], out=Q[col]).round_()
            q.clamp_(-top[col], top[col])
            errors.append((column - q * scales[col]).div_(diagonal[col]))
            rest[col + 1 : stop].addcmul_(U[col, col + 1 : stop, None], errors[-1], value=-1)
        rest[stop:] -= U[start:stop, stop:].T @ torch.stack(errors)
    return Q.T.reshape(len(scale), *W.shape)


def protected_group(
    matrices: dict[str, Tensor], activation_rms: dict[str, Tensor], width: int
) -> tuple[str, slice]:
    """The matrix and its group of `width` neighbouring columns that matter most; ("", ...) if none.

    AWQ-lite of parameter-golf #1945, after arXiv:2306.00978: groups begin at multiples of `width`,
    and one's score is the sum over its columns of the root mean square of the column's activations
    times its mean |w|. Columns left over at the end of a matrix are in no group.
    """
    best = ("", slice(0, 0))
    best_score = -math.inf
    for name, W in matrices.items():
        salience = activation_rms[name] * W.abs().mean(dim=0)
        whole = len(salience) // width * width
        scores = salience[:whole].view(-1, width).sum(dim=1)
        if whole and float(scores.max()) > best_score:
            best_score = float(scores.max())
            start = width * int(scores.argmax())
            best = (name, slice(start, start + width))
    return best


def quantize_factors(A: Tensor, B: Tensor, group: int) -> LowRank:
    """Round factors A (r, k) and B (k, c) to the integers of a correction.

    A has one scale. B has one for each `group` elements in row-major order; the last group may be
    shorter.
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
    """The correction of this rank that best removes an error (r, c) = U S V^T: A = U S, B = V^T."""
    U, S, Vh = torch.linalg.svd(error, full_matrices=False)
    return quantize_factors(U[:, :rank] * S[:rank], Vh[:rank], group)


def largest_errors(errors: dict[str, Tensor], count: int) -> list[str]:
    """Names of the `count` matrices of largest Frobenius norm, largest first."""
    norms = {name: float(error.norm()) for name, error in errors.items()}
    return sorted(norms, key=lambda name: -norms[name])[:count]


@torch.no_grad()
def order_hidden_units(model: GPT) -> None:
    """Sort each MLP's hidden units by the standard deviation of their rows in fc.

    Rows of fc and columns of proj are permuted alike, so that no output changes. The range coder
    codes ascending scales by their differences, which for u units saves about log2(u!) bits.
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
    """The module whose inputs give a matrix its Hessian: its own, or one with the same inputs."""
    module = name.removesuffix(".weight")
    sibling = model.kinds[name].inputs_of
    if not sibling:
        return module
    return f"{module.rpartition('.')[0]}.{sibling}"


def head_name(model: GPT) -> str:
    """The name of the module whose weights make logits: with tied embeddings, the token table."""
    return "tok_emb" if model.lm_head is None else "lm_head"


def hessian_widths(model: GPT) -> dict[str, int]:
    """The modules whose inputs are collected into a Hessian, and how many channels these have.

    The output head is among them only if CLIP_SIGMAS sets the scales.
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
    """Rows that the model samples after BOS: int64 (CALIBRATION_ROWS, seq_len); slow."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((CALIBRATION_ROWS, seq_len), BOS)
    for place in range(1, seq_len):  # the model reads whole rows: their length sets the rotary base
        on_device = ids.to(device)
        last = slice(place - 1, place)
        logits = model.logits(model.hidden(on_device)[:, last], on_device[:, last])[:, 0]
        probs = torch.softmax(logits / SAMPLING_TEMPERATURE, dim=-1).cpu()
        ids[:, place] = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return ids


@torch.no_grad()
def collect_hessians(
    model: GPT, batch_of: Callable[[int], Tensor], num_batches: int, deadline: float, run: Run
) -> dict[str, Tensor]:
    """Mean x x^T over the inputs of the modules of hessian_widths(): {name: float32 (c, c)}.

    batch_of(n) gives the ids (B, T) of batch n. In each round every rank takes one batch. No round
    begins that might end after `deadline` seconds on any rank's training clock.
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
    # All ranks go through equally many rounds, since they must agree in each; in the last one a
    # rank may find no batch left.
    own_batches = range(run.ranks.rank, num_batches + run.ranks.rank, run.ranks.world_size)
    for batch in run.folder.progress("calibrating", iterable=own_batches, unit="batch"):
        start = run.ledger.training_clock.elapsed()
        if batch < num_batches:
            input_ids = batch_of(batch)
            hidden = model.hidden(run.to_device(input_ids))
            if head in sums:
                add(head, hidden)
            seen += input_ids.numel()
        run.wait_for_gpu()
        end = run.ledger.training_clock.elapsed()
        if run.ranks.largest(float(end + 2 * (end - start) > deadline)):
            break
    for hook in hooks:
        hook.remove()
    run.ranks.add_up([seen, *sums.values()])
    run.ledger.calibration_tokens = int(seen.item())
    return {name: total / seen for name, total in sums.items()}


def budget_reserve(model: GPT, batch_seconds: float, run: Run) -> float:
    """The part of the training budget to keep for collecting Hessians, in the budget's unit."""
    if run.cfg.budget_unit == "operations":
        return calibration_operations(model, calibration_tokens(run.cfg))
    return calibration_reserve(batch_seconds, run)


def calibration_reserve(batch_seconds: float, run: Run) -> float:
    """Seconds of the training budget to keep for collecting Hessians, if a batch takes so long."""
    cfg = run.cfg
    if cfg.gptq_variant == "off" or cfg.gptq_calib != "train":
        return 0.0
    rounds = math.ceil(cfg.gptq_calib_batches / run.ranks.world_size)
    reserve = min(1.2 * rounds * batch_seconds, 0.5 * cfg.max_wallclock_seconds)
    run.folder.log(
        "calibration reserve:{seconds:.1f}s batches:{batches}",
        "reserve",
        seconds=reserve,
        batches=cfg.gptq_calib_batches,
    )
    return reserve


def calibrate(model: GPT, rows: TrainingRows, steps: int, run: Run) -> dict[str, Tensor]:
    """The Hessians that GPTQ needs, from training rows after the last step's, or sampled rows.

    GPTQ_CALIB=train counts as training, in time and in operations. Hidden units are sorted first if
    the codec profits from it, so that the Hessians are those of the sorted units.
    """
    cfg = run.cfg
    run.phase = "calibration"
    if cfg.orders_hidden_units:
        order_hidden_units(model)
    if cfg.gptq_variant == "off":
        return {}
    sampled: dict[int, Tensor] = {}
    if cfg.gptq_calib == "selfgen":
        own_batches = range(run.ranks.rank, cfg.gptq_calib_batches, run.ranks.world_size)
        for n in run.folder.progress("sampling rows", iterable=own_batches, unit="batch"):
            sampled[n] = sample_rows(model, cfg.train_seq_len, cfg.seed + n, run.device)

    def batch_of(n: int) -> Tensor:
        if sampled:
            return sampled[n]
        first = steps * cfg.rows_per_step + n * CALIBRATION_ROWS
        return rows.batch(first, CALIBRATION_ROWS).input_ids

    counts_as_training = cfg.gptq_calib == "train"
    deadline = math.inf
    if counts_as_training and not cfg.step_driven:
        deadline = cfg.max_wallclock_seconds
    with run.ledger.training_clock.running(counts_as_training):
        hessians = collect_hessians(model, batch_of, cfg.gptq_calib_batches, deadline, run)
    if counts_as_training:
        tokens = run.ledger.calibration_tokens
        run.ledger.training_operations += calibration_operations(model, tokens)
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
    """Zero the fraction PRUNE_PCT of the integers with fewer than 8 bits, in place."""
    low = {name: tensor for name, tensor in stored.items() if 0 < bits_of(model, name) < 8}
    if model.cfg.prune_pct and low:
        run.folder.log(
            "prune:zeroed {zeroed} of {of} integers below 8 bits",
            "pruned",
            zeroed=prune_integers(low, model.cfg.prune_pct),
            of=sum(tensor.values.numel() for tensor in low.values()),
        )


def prune_integers(stored: dict[str, Stored], fraction: float) -> int:
    """Zero the integers of smallest |q s|, as many as this fraction of all; returns their number.

    Integers that are 0 already are not among them. If too few others are left, all become 0.
    """
    sizes = [tensor.values.numel() for tensor in stored.values()]
    magnitude = torch.cat([tensor.restore().abs().flatten() for tensor in stored.values()])
    count = min(int(fraction * len(magnitude)), int(magnitude.count_nonzero()))
    magnitude[magnitude == 0] = math.inf
    is_pruned = torch.zeros(len(magnitude), dtype=torch.bool)
    is_pruned[magnitude.topk(count, largest=False).indices] = True
    for tensor, mask in zip(stored.values(), is_pruned.split(sizes), strict=True):
        tensor.values[mask.view_as(tensor.values)] = 0
    return count


def to_integers(
    W: Tensor, H: Tensor | None, bits: int, cfg: Config, sigmas: float, columns: slice | None
) -> tuple[Stored, bool]:
    """Quantize a matrix, by GPTQ if it has a Hessian; also returns whether GPTQ had to give up.

    Embedding tables have no Hessian; unless CLIP_SIGMAS sets the scales, int8_rows() clips them.
    """
    if H is None and bits == 8 and not cfg.clips_by_deviation:
        return int8_rows(W), False
    if H is None:
        return round_to_nearest(W, bits, cfg, sigmas), False
    try:
        if cfg.gptq_variant == "simple":
            return gptq_simple(W, H, bits, cfg, sigmas), False
        return gptq(W, H, bits, cfg, sigmas, columns), False
    except torch.linalg.LinAlgError:
        return round_to_nearest(W, bits, cfg, sigmas, columns), True


def pick_protected(model: GPT, hessians: dict[str, Tensor], run: Run) -> tuple[str, slice]:
    """The matrix and the columns to which AWQ_COLUMNS gives 8 bits; ("", ...) if none."""
    width = model.cfg.awq_columns
    matrices, activation_rms = {}, {}
    for name in model.kinds:
        H = hessians.get(hessian_source(model, name))
        if width and H is not None and bits_of(model, name):
            matrices[name] = model.get_parameter(name).detach().float().to(H.device)
            activation_rms[name] = H.diagonal().sqrt()
    name, columns = protected_group(matrices, activation_rms, width)
    if name:
        run.folder.log(
            "awq:protected {tensor} columns:{start}-{stop}",
            "protected",
            tensor=name,
            start=columns.start,
            stop=columns.stop,
        )
    return name, columns


def correct_largest_errors(model: GPT, stored: dict[str, Stored], run: Run) -> None:
    """Give the LQER_TOP_K matrices of largest rounding error a low-rank correction, in place."""
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
        remaining_error = errors[name] - low_rank.product()
        run.folder.log(
            "lqer:corrected {tensor} rank:{rank} error:{error:.5g} left:{left:.5g}",
            "corrected",
            tensor=name,
            rank=rank,
            error=float(errors[name].norm()),
            left=float(remaining_error.norm()),
        )


def store_floats(model: GPT, name: str, W: Tensor) -> Stored:
    """A parameter that BITS leaves as floats, in fp16; GATE_STORAGE=int8 makes gates integers."""
    is_gate_matrix = model.kinds[name] == GATE and W.ndim == 2
    if is_gate_matrix and model.cfg.gate_storage == "int8":
        return gate_rows(W.cpu())
    return Stored(W.half().cpu())


@torch.no_grad()
def quantize(
    model: GPT, hessians: dict[str, Tensor], run: Run, factor: float = 1.0
) -> dict[str, Stored]:
    """Every parameter as the artifact will hold it: integers where BITS says so, else fp16.

    PRUNE_FRAC and PRUNE_PCT zero some of them. `factor` multiplies CLIP_SIGMAS. Raises
    FloatingPointError, naming the parameter, if one is not finite or too large for fp16.
    """
    run.phase = "quantization"
    cfg = model.cfg
    stored: dict[str, Stored] = {}
    fallbacks = 0
    objective = 0.0
    # Devices other than these may lack Cholesky factors or float64.
    device = run.device if run.device.type == "cuda" else torch.device("cpu")
    protected_name, protected_columns = pick_protected(model, hessians, run)
    parameters = list(model.named_parameters())
    for name, p in run.folder.progress("quantizing", iterable=parameters, unit="tensor"):
        W = p.detach().float().to(device)
        if not W.half().isfinite().all():
            raise FloatingPointError(f"{name} is not finite, or too large for fp16")
        if cfg.prune_frac and W.ndim == 2 and W.numel() > cfg.int8_keep_float_max_numel:
            threshold = row_quantile(W.abs().view(1, -1), cfg.prune_frac)
            W = W.masked_fill(W.abs() < threshold, 0.0)
        bits = bits_of(model, name)
        if bits == 0:
            stored[name] = store_floats(model, name, W)
            continue
        H = hessians.get(hessian_source(model, name))
        H = None if H is None else H.to(device)
        sigmas = factor * setting_of(model, name, cfg.sigmas_by_role)
        columns = protected_columns if name == protected_name else None
        quantized, fell_back = to_integers(W, H, bits, cfg, sigmas, columns)
        if H is not None:
            objective += weighted_error(W, quantized, H)
        fallbacks += int(fell_back)
        stored[name] = quantized.cpu()
    prune_stored(model, stored, run)
    correct_largest_errors(model, stored, run)
    run.folder.log(
        "gptq:quantized variant:{variant} matrices:{matrices} fallbacks:{fallbacks} "
        "objective:{objective:.6g}",
        "quantized",
        variant=cfg.gptq_variant,
        fallbacks=fallbacks,
        matrices=sum(tensor.scale is not None for tensor in stored.values()),
        objective=objective,
    )
    return stored


# =================================================================================================
# Artifact
# One file: an uncompressed prelude (magic, version, codec, body length, sha256 of the rest), then
# one compressed body: a JSON header, all integers, all floats, packed text. A reader trusts none of
# it. records/ARTIFACT.md describes the format for other programs.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class ArtifactSettings(Part):
    """How the artifact is packed."""

    title = "Artifact"

    artifact_target_bytes: int = training_knob(
        0,
        (0, 1 << 40),
        "With QUANT_CLIP=std and std_published, clip so that code and artifact together end just "
        "below this many bytes; 0 only keeps them within ARTIFACT_LIMIT_BYTES.",
    )
    codec: str = training_knob(
        "zstd",
        ("zstd", "lzma", "brotli", "range", "best"),
        "Compress the artifact by this codec; best takes the smallest of zstd, lzma and range.",
    )

    @property
    def orders_hidden_units(self) -> bool:
        """Whether hidden units are sorted for the codec; CODEC=best does not know it so early."""
        return self.codec == "range"

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """The target lies within the limit."""
        yield (
            cfg.artifact_target_bytes <= cfg.artifact_limit_bytes,
            "ARTIFACT_TARGET_BYTES must be at most ARTIFACT_LIMIT_BYTES",
        )


ARTIFACT_MAGIC = b"TINYGPT\n"
ARTIFACT_VERSION = 3  # what is written; versions 1 and 2 are read as well
PRELUDE = struct.Struct("<8sHHQ32s")  # magic, version, codec, bytes of the body, sha256 of the rest
CODECS = {"zstd": 1, "lzma": 2, "brotli": 3, "range": 4}
BEST_OF = ("zstd", "lzma", "range")  # what CODEC=best tries

ZSTD_LEVEL = 22
ZSTD_SHORTEST_MATCHES = (6, 4, 3)  # bytes; all are tried, since no rule says which packs best
LONG_BODY = 1 << 22  # bytes; for a longer body only the first match length is tried, to save time
LZMA_PRESET = 6
LZMA_MEMORY = 1 << 26  # bytes that the decompressor may take; LZMA_PRESET needs 9 MiB

# Bounds on what a reader accepts, in bytes.
MAX_ARTIFACT_BYTES = 1 << 28
MAX_BODY_BYTES = 1 << 28
MAX_HEADER_BYTES = 1 << 20

# The settings that every artifact names, even one of version 1. A setting that was added since
# declares what an artifact means that does not name it; see Knob.absent.
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
    """One array of a stored tensor, as the body holds it."""

    dtype: str  # as numpy names it, little-endian
    shape: Callable[[list[int]], Shape]  # from the tensor's numbers in the header


@dataclass(frozen=True)
class StorageKind:
    """A way to store a tensor: how many numbers the header may give it, and its streams."""

    numbers: tuple[int, ...]
    streams: tuple[Stream, ...]


# The body holds all streams of the first type, tensor by tensor, then all of the second, ...
STREAM_TYPES = ("<i1", "<f2", "|u1")

# The numbers of a grid are its rows and columns; then, if it has protected columns, the first one
# and their number; then, if it has a correction, the rank and the group (see LowRank).
INTEGERS = Stream("<i1", lambda numbers: (numbers[0], numbers[1]))
ROW_SCALES = Stream("<f2", lambda numbers: (numbers[0],))
LEFT_FACTOR = Stream("<i1", lambda numbers: (numbers[0], numbers[-2]))
RIGHT_FACTOR = Stream("<i1", lambda numbers: (numbers[-2], numbers[1]))
LEFT_SCALE = Stream("<f2", lambda numbers: ())
RIGHT_SCALES = Stream("<f2", lambda numbers: (divide_up(numbers[-2] * numbers[1], numbers[-1]),))

GRID = (INTEGERS, ROW_SCALES)
CORRECTED_GRID = (INTEGERS, LEFT_FACTOR, RIGHT_FACTOR, ROW_SCALES)
FACTOR_SCALES = (LEFT_SCALE, RIGHT_SCALES)
STORAGE_KINDS = {
    "float": StorageKind((0, 1, 2), (Stream("<f2", tuple),)),
    "grid": StorageKind((2,), GRID),
    "grid_protected": StorageKind((4,), (*GRID, ROW_SCALES)),
    "grid_low_rank": StorageKind((4,), (*CORRECTED_GRID, *FACTOR_SCALES)),
    "grid_protected_low_rank": StorageKind((6,), (*CORRECTED_GRID, ROW_SCALES, *FACTOR_SCALES)),
    "packed": StorageKind((1,), (Stream("|u1", tuple),)),
}
TRAINING_TEXT = "training_text"  # the name of the packed tokens that COUNTS reads


def artifact_header(cfg: Config, val: Validation) -> dict:
    """What is needed to rebuild the model and to repeat its evaluation."""
    return {
        "settings": environment_of(cfg, "model", "scoring"),
        "tokenizer": val.tokenizer_sha256,
        "validation": val.fingerprint,
    }


def environment_of(cfg: Config, *reaches: str) -> dict[str, str]:
    """The settings of these reaches by name, as text that the environment could hold."""
    values = {name.upper(): getattr(cfg, name) for name in settings_of_reach(*reaches)}
    return {
        name: value if isinstance(value, str) else show_setting(value)
        for name, value in values.items()
    }


def brotli_module() -> Any:
    """The package brotli, which is optional; raises Refusal if it is missing or too old."""
    try:
        import brotli

        # Older versions cannot bound the output of a hostile stream.
        brotli.Decompressor().process(b"", output_buffer_limit=1)
        return brotli
    except (ImportError, TypeError):
        raise Refusal("CODEC=brotli needs the Python package brotli 1.2 or newer") from None


def compress(body: bytes, codec: str) -> bytes:
    """Compress the body by a codec of CODECS; the same body always gives the same bytes."""
    if codec == "zstd":
        return compress_with_zstd(body)
    if codec == "lzma":
        return lzma.compress(body, preset=LZMA_PRESET)
    if codec == "range":
        return pack_by_range(body)
    return brotli_module().compress(body, quality=11, lgwin=24)


def compress_with_zstd(body: bytes) -> bytes:
    """The smallest of a few zstd frames, each with another length of the shortest match."""
    lengths = ZSTD_SHORTEST_MATCHES[:1] if len(body) > LONG_BODY else ZSTD_SHORTEST_MATCHES
    frames = []
    for shortest in lengths:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            ZSTD_LEVEL, source_size=len(body), min_match=shortest
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        frames.append(compressor.compress(body))
    return min(frames, key=len)


def decompress(packed: bytes, codec: str, size: int) -> bytes:
    """The `size` bytes that compress() was given; raises Refusal if there are fewer or more.

    However far the packed bytes would expand, no more than size + 1 bytes are ever in memory.
    """
    try:
        body = decompress_within(packed, codec, size)
    except Refusal:
        raise
    except (zstandard.ZstdError, lzma.LZMAError, *MALFORMED) as error:
        raise Refusal(
            f"the artifact's body does not decompress ({type(error).__name__}: {error})"
        ) from None
    if body is None or len(body) != size:
        raise Refusal("the artifact's body does not end where its prelude says")
    return body


def decompress_within(packed: bytes, codec: str, size: int) -> bytes | None:
    """At most size + 1 bytes of the body; None if the packed bytes do not end where the body does.

    Raises Refusal if the codec is not installed. If the codec cannot read the packed bytes, it
    raises an error of its own or one of MALFORMED.
    """
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
        raise ValueError(error) from None
    return body if brotli_reader.is_finished() else None


def by_place_in_layer(name: str) -> tuple[str, list[int]]:
    """A sort key that puts a matrix's counterparts in all blocks side by side: best to compress."""
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
    """The artifact with this body: the prelude, then the compressed body."""
    codecs = BEST_OF if codec == "best" else (codec,)
    packed_by = {name: compress(body, name) for name in codecs}
    codec = min(packed_by, key=lambda name: len(packed_by[name]))
    packed = packed_by[codec]
    digest = hashlib.sha256(packed).digest()
    prelude = PRELUDE.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, CODECS[codec], len(body), digest)
    return prelude + packed


def unpack_body(blob: bytes) -> tuple[int, bytes]:
    """An artifact's format version and body; raises Refusal if it is damaged or not an artifact."""
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
    """Header and tensors of an artifact; raises Refusal if it is damaged or malformed."""
    version, body = unpack_body(blob)
    try:
        header, rows, end = header_of(body, version)
        return header, tensors_in_body(body, end, rows)
    except MALFORMED as error:
        raise Refusal(
            f"the artifact's header is malformed ({type(error).__name__}: {error})"
        ) from None


TensorRow = tuple[str, str, list[int]]  # in the header: name, storage kind, numbers (shape first)


def header_of(body: bytes, version: int) -> tuple[dict, list[TensorRow], int]:
    """A body's header, its rows of tensors, and where it ends; raises one of MALFORMED."""
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
        raise ValueError("it names a tensor twice")
    return header, rows, end


def tensor_row(row: list, version: int) -> TensorRow:
    """Check a row of the header, [name, kind, *numbers]; raises ValueError or TypeError if wrong.

    Format version 1 writes 0 for floats and 1 for a grid instead of the kind's name.
    """
    name, kind, *numbers = row
    if version == 1:
        if type(kind) is not int:
            raise ValueError(f"tensor {name!r} of kind {kind!r}")
        kind = {0: "float", 1: "grid"}[kind]
    is_known = type(name) is str and type(kind) is str and kind in STORAGE_KINDS
    if not is_known or len(numbers) not in STORAGE_KINDS[kind].numbers:
        raise ValueError(f"tensor {name!r} of kind {kind!r} and shape {numbers!r}")
    if not all(type(number) is int and 0 <= number <= MAX_BODY_BYTES for number in numbers):
        raise ValueError(f"tensor {name!r} of shape {numbers!r}")
    check_grid_numbers(kind, numbers)
    return name, kind, numbers


def check_grid_numbers(kind: str, numbers: list[int]) -> None:
    """Raise ValueError if a matrix cannot have the protected columns or correction in `numbers`."""
    if "protected" in kind:
        columns, start, width = numbers[1:4]
        if width < 1 or start + width > columns:
            raise ValueError(f"{width} protected columns from {start} of {columns}")
    if "low_rank" in kind:
        rank, group = numbers[-2:]
        if not 1 <= rank <= MAX_RANK or group < 1:
            raise ValueError(f"a correction of rank {rank} in groups of {group}")


def streams_in_body(rows: list[TensorRow]) -> Iterator[tuple[str, str, Shape]]:
    """Yield name, type and shape of every tensor's streams, in the order of the body."""
    for dtype in STREAM_TYPES:
        for name, kind, numbers in rows:
            for stream in STORAGE_KINDS[kind].streams:
                if stream.dtype == dtype:
                    yield name, dtype, stream.shape(numbers)


def arrays_in_body(
    body: bytes, start: int, rows: list[TensorRow]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield tensor name, type and content of each stream of a body whose header ends at `start`.

    Raises ValueError unless the streams fill the body exactly.
    """
    place = start
    for name, dtype, shape in streams_in_body(rows):
        flat = np.frombuffer(body, dtype, math.prod(shape), place)
        yield name, dtype, flat.reshape(shape)
        place += flat.nbytes
    if place != len(body):
        raise ValueError("the tensors do not add up to the body")


def tensors_in_body(body: bytes, start: int, rows: list[TensorRow]) -> dict[str, Stored]:
    """The tensors of a body whose header ends at `start`; raises ValueError if malformed."""
    arrays: dict[str, list[Tensor]] = {name: [] for name, _, _ in rows}
    for name, dtype, content in arrays_in_body(body, start, rows):
        native = torch.from_numpy(content.astype(content.dtype.newbyteorder("=")))
        if dtype == "<f2" and not native.isfinite().all():
            raise ValueError(f"tensor {name!r} is not finite")
        arrays[name].append(native)
    return {name: Stored.of(kind, numbers, arrays[name]) for name, kind, numbers in rows}


def settings_in_header(header: dict) -> dict[str, str]:
    """Every model and scoring setting of an artifact by name, as text.

    An artifact that is older than a setting does not name it, which means Knob.absent. Raises
    Refusal for a name that is not known here, or if a name is missing.
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
        if knob_of(setting).absent is UNSAID:
            raise Refusal(f"the artifact's header does not name the setting {name}")
        named[name] = knob_of(setting).text_if_absent
    return named


def settings_within(header: dict, env: dict[str, str]) -> tuple[Config, list[str]]:
    """An artifact's settings, overridden by those in `env`, and notes for the log.

    Raises Refusal for a setting in `env` that decides what the model is: only the artifact may.
    """
    in_artifact = settings_in_header(header)
    given, notes = translate_names(env, {name.upper(): f for name, f in SETTINGS.items()})
    of_model = {name.upper() for name in settings_of_reach("model")}
    if repeated := sorted(of_model & set(given)):
        raise Refusal(f"{repeated[0]} is set, but the artifact says what its model is: unset it")
    return Config.from_env({**in_artifact, **given})[0], notes


def read_artifact(path: Path) -> tuple[dict, dict[str, Stored]]:
    """Header and tensors of an artifact; raises Refusal if it is missing, huge or malformed."""
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
    """The model of an artifact's tensors, on the run's device.

    kernel: the attention kernel; None takes the one that the settings name. Raises Refusal if the
    tensors are not those of the model that `cfg` describes.
    """
    if kernel is None:
        kernel = pick_attention(cfg, run.ranks).kernel
    # The meta device lays the model out without memory: a header that lies allocates nothing.
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
# Integer matrices to bytes and back. The coder is interleaved rANS (asymmetric numeral systems).
# Its probabilities come from adaptive tables. Which table codes an integer depends on the magnitude
# that is expected of it: the product of a factor for its matrix, one for its row and one for its
# column.
#
# The columns of tables with many rows, token embeddings above all, are correlated. There a
# regression on the columns before it predicts an integer, and only the difference from that is
# coded. The regression is fitted to the rows before, which a decoder already has.
# =================================================================================================

TOTAL_FREQUENCY = 1 << 16  # the sum of a table's frequencies
LEAST_STATE = 1 << 32  # a state lies in [2^32, 2^48) and grows and shrinks by words of 16 bits
LANE_SHARE = 16  # there are sqrt(integers) / LANE_SHARE lanes: each takes 4 bytes, few take time
# Bounds on what is coded; lines are rows and columns.
MAX_INTEGERS, MAX_LINES, MAX_MATRICES = 1 << 27, 1 << 22, 1 << 12
MAX_CHUNK = 1 << 20  # integers coded at once

# The level of an expected magnitude m is LEVELS_PER_OCTAVE (log2(m) - LOWEST_OCTAVE), rounded.
# LEVELS_PER_TABLE neighbouring levels share a table.
LEVELS_PER_OCTAVE, LOWEST_OCTAVE, HIGHEST_OCTAVE = 16, -8, 7
LEVELS_PER_TABLE = 2
TABLES = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * LEVELS_PER_OCTAVE // LEVELS_PER_TABLE
PRIOR_SAMPLES = 512  # a new table starts as if it had counted this many integers
COUNT_UNIT = 256  # what an integer adds to a count, so that counts of the prior can be fractions
# Tables learn after each chunk of integers. A chunk has FIRST_CHUNK integers, or 1 / CHUNK_SHARE of
# those that the tables coded before it.
FIRST_CHUNK, CHUNK_SHARE = 512, 8

PROFILE_TOP = 63  # the largest magnitude of a row's or column's integer in a profile
PROFILE_PASSES = 6  # how often row factors are fitted to column factors and the other way round
LEAST_MEAN = 1e-4  # bounds mean magnitudes from below: a row may be all zeros
MAX_SHIFT = 6  # a profile's step is at most 2^MAX_SHIFT levels
STEP_IN_ERRORS = 3.5  # a profile's step in standard errors: finer ones cost more than they save
TWIN_COSINE = 0.9  # rows more similar than this may be coded by their difference
TWIN_CANDIDATES = 256  # the number of rows that are tried as the one to subtract

# Coefficients and innovations are multiples of 1 / COEFFICIENT_PARTS and 1 / INNOVATION_PARTS. Sums
# of their products are then exact in float64, in any order, so that every machine predicts alike.
COEFFICIENT_PARTS, INNOVATION_PARTS = 1 << 10, 1 << 6
LARGEST_COEFFICIENT = 16
RIDGE = 512  # the ridge counts as much as this many rows without any correlation
# The rows of a block are predicted at once. A block has FIRST_BLOCK rows, or 1 / BLOCK_SHARE of
# those before it.
FIRST_BLOCK, BLOCK_SHARE = 64, 4
# A regression takes columns^3 / 3 operations per block, so these bound a decoder's time.
MAX_PREDICTED_COLUMNS, MAX_PREDICTED_MATRICES, LEAST_ROWS_PER_COLUMN = 512, 8, 8
LEAST_SAVED_BITS = 0.01  # per integer; a matrix is predicted if that saves more


class RangeEncoder:
    """Interleaved rANS (arXiv:1311.2540, section 2.3): one state per lane, words of 16 bits.

    A symbol of frequency f, where all smaller symbols have the frequency F together, changes the
    state x of its lane to (x // f) 2^16 + x % f + F. A decoder undoes the last step first, so the
    stream is written from its end. `facts` are bytes that are stored as they are.
    """

    def __init__(self) -> None:
        self.facts = bytearray()
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []

    def code(self, ends: np.ndarray, tables: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Take in symbols to code, each by its own table; returns the symbols.

        ends: int64 (tables, symbols + 1), running sums of frequencies from 0 to TOTAL_FREQUENCY.
        """
        starts = ends[tables, symbols]
        widths = ends[tables, symbols + 1] - starts
        self.steps.append((starts.astype(np.uint16), (widths - 1).astype(np.uint16)))
        return symbols

    def stream(self, lanes: int) -> bytes:
        """The final states of the lanes, then the words in the order that a decoder reads."""
        states = np.full(lanes, LEAST_STATE, np.uint64)
        words = []
        for starts, widths in reversed(self.steps):
            for at in reversed(range(0, len(starts), lanes)):
                f = widths[at : at + lanes].astype(np.uint64) + 1
                x = states[: len(f)]
                is_full = x >= f << 32
                words.append(x[is_full].astype("<u2"))  # the low 16 bits
                x[is_full] >>= 16
                quotient = x // f
                x[:] = (quotient << 16) + (x - quotient * f) + starts[at : at + lanes]
        words.append(states.astype("<u8").view("<u2").reshape(-1, 4)[:, :3].ravel())
        return b"".join(part.tobytes() for part in reversed(words))


class RangeDecoder:
    """Reads what RangeEncoder wrote; raises ValueError if RangeEncoder cannot have written it."""

    def __init__(self, facts: bytes, stream: bytes, lanes: int) -> None:
        self.facts = facts
        self.facts_read = 0
        if len(stream) < 6 * lanes or len(stream) % 2:
            raise ValueError(f"a stream of {len(stream):,} bytes for {lanes:,} lanes")
        self.words = np.frombuffer(stream, "<u2").astype(np.uint64)
        self.words_read = 3 * lanes
        low, middle, high = self.words[: self.words_read].reshape(lanes, 3).T
        self.states = low | middle << 16 | high << 32

    def read_facts(self, size: int) -> bytes:
        """The next `size` bytes of the facts; raises ValueError past their end."""
        part = self.facts[self.facts_read : self.facts_read + size]
        if len(part) < size:
            raise ValueError("the facts end early")
        self.facts_read += size
        return part

    def code(self, ends: np.ndarray, tables: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """The next symbols, each by its own table; `symbols` only says how many there are."""
        bounds = (ends[:, :-1] + (np.arange(len(ends)) << 16)[:, None]).ravel()
        widths = np.diff(ends).ravel().astype(np.uint64)
        found = np.empty(len(tables), np.int64)
        lanes = len(self.states)
        for at in range(0, len(tables), lanes):
            x = self.states[: len(tables) - at]
            low = x & 0xFFFF
            slots = low.astype(np.int64) + (tables[at : at + lanes] << 16)
            interval = np.searchsorted(bounds, slots, side="right") - 1
            found[at : at + lanes] = interval
            x[:] = widths[interval] * (x >> 16) + (slots - bounds[interval]).astype(np.uint64)
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
    """The counts with which tables start: int64 (TABLES, 2 top + 1).

    The table for mean magnitude m starts as the discrete Gaussian g^(k^2), |k| <= top, where g is
    close to exp(-1 / (pi m^2)) for large m and to m / 2 for small m. Both hold if 1 / (1 - g) is
    1 + m / 2 + pi m^3 / (m + 0.3). Only + - * / of float64 are used, which all machines round alike
    (IEEE 754).
    """
    levels = (np.arange(TABLES) + 0.5) * LEVELS_PER_TABLE / LEVELS_PER_OCTAVE
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
    """Tables of the frequencies of integers from -top to top; they learn from what is coded."""

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
        """Code a matrix (r, c) in place, element (i, j) at level + rows[i] + columns[j].

        The size of a chunk depends only on how much was coded before, so that a decoder's tables
        learn at the same places.
        """
        values = matrix.reshape(-1)  # a view
        start = 0
        while start < len(values):
            size = max(FIRST_CHUNK, self.coded // CHUNK_SHARE)
            stop = min(len(values), start + min(size, MAX_CHUNK))
            i, j = np.divmod(np.arange(start, stop), matrix.shape[1])
            tables = (level + rows[i] + columns[j]) // LEVELS_PER_TABLE
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
    """The level of an expected magnitude, at most 255."""
    octaves = math.log2(max(magnitude, 2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
    return min(round(octaves * LEVELS_PER_OCTAVE), 255)


@dataclass
class Profile:
    """Expected magnitudes in a matrix (r, c), as levels: its own plus the row's and column's."""

    level: int
    rows: np.ndarray  # int64 (r,), in steps of 2^row_shift levels
    columns: np.ndarray  # int64 (c,), in steps of 2^column_shift levels
    row_shift: int
    column_shift: int

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Levels of the rows (r,) and of the columns (c,), to be added to the matrix's."""
        return self.rows << self.row_shift, self.columns << self.column_shift


def steps_of(means: np.ndarray, samples: int) -> tuple[np.ndarray, int]:
    """Logarithms of mean magnitudes, minus their average, in steps of 2^k levels: int64, and k.

    The logarithm of a mean m of n samples has by chance a variance of about
    (0.57 + max(1/m - 1, 0)) / n, that of normal integers if m is large and of rare ones if it is
    small. Each logarithm is shrunk towards the average by the share of chance in the variance
    (James and Stein). A step is the power of two near STEP_IN_ERRORS standard errors.
    """
    means = np.maximum(means, 0.5 / samples)
    chance = (0.57 + np.maximum(1 / means - 1, 0)) / samples
    logarithms = np.log(means)
    logarithms -= logarithms.mean()
    variance = max(float((logarithms**2 - chance).mean()), 0.0)
    levels = variance / (variance + chance) * logarithms / math.log(2) * LEVELS_PER_OCTAVE
    error = math.sqrt(float(np.median(chance))) / math.log(2) * LEVELS_PER_OCTAVE
    shift = min(max(round(math.log2(STEP_IN_ERRORS * error)), 0), MAX_SHIFT)
    steps = np.rint(levels / (1 << shift)).astype(np.int64)
    return steps.clip(-PROFILE_TOP, PROFILE_TOP), shift


def fit_profile(matrix: np.ndarray) -> Profile:
    """The profile of an integer matrix (r, c): |q_ij| is about m a_i b_j.

    The factors a and b have mean 1 and are fitted in turn.
    """
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
    expected = np.exp2(row_levels / LEVELS_PER_OCTAVE)[:, None]
    expected = expected * np.exp2(column_levels / LEVELS_PER_OCTAVE)
    profile.level = level_of(float((magnitudes / expected).mean()))
    return profile


def grid_top(largest: int) -> int:
    """The smallest 2^n - 1 that is at least `largest`; or 128 for 128, int8's largest magnitude."""
    return top_of_bits(min(largest, 128).bit_length())


def top_of_bits(bits: int) -> int:
    """The largest magnitude of `bits` bits: 0, 1, 3, ... 127, and 128 for 8; or ValueError."""
    if bits > 8:
        raise ValueError(f"integers of {bits} bits")
    return min((1 << bits) - 1, 128)


def wrap_integers(integers: np.ndarray, top: int) -> np.ndarray:
    """The integers from -top to top that are equal to these modulo 2 top + 1."""
    return (integers + top) % (2 * top + 1) - top


def find_twins(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of (r, c) that are best coded as differences from one row: bool (r,), and that row.

    Tokens that the text never uses have such rows: weight decay and the same gradient from the head
    act on all of them. Of up to TWIN_CANDIDATES rows, evenly spaced, the one is taken to which most
    rows have a cosine above TWIN_COSINE.
    """
    exact = matrix.astype(np.float64)
    candidates = exact[:: len(exact) // TWIN_CANDIDATES + 1]
    lengths = np.sqrt(np.maximum((exact * exact).sum(axis=1), 1))
    least = TWIN_COSINE * np.sqrt((candidates * candidates).sum(axis=1))
    near = candidates @ exact.T > least[:, None] * lengths
    twins = near[near.sum(axis=1).argmax()]
    first = int(twins.argmax())
    twins[first] = False
    # A magnitude m takes about log2(m + 1/2) bits, and naming the twins takes a bit for each row.
    own = np.log2(np.abs(exact[twins]) + 0.5).sum()
    as_differences = np.log2(np.abs(exact[twins] - exact[first]) + 0.5).sum()
    if own - as_differences < len(exact):
        twins = np.zeros(len(exact), bool)
    return twins, first


def regression_of(known: np.ndarray) -> np.ndarray:
    """Coefficients that predict a column from those before it: float64 (c + 1, c + 1).

    known: int (c, n), the columns as far as they are known; a column of ones is put before them. A
    column's innovation is its difference from its prediction. Entry [j, k] is the factor, in
    COEFFICIENT_PARTS, of column k's innovation in the prediction of column j. It is an entry of L
    in L D L^T, the matrix of the columns' scalar products with a ridge. Scalar products are whole
    and below 2^53; the rest is + - * / of float64 (see prior_counts).
    """
    rows = np.ones((len(known) + 1, known.shape[1]))
    rows[1:] = known
    rest = rows @ rows.T
    ridge = np.full(len(rest), RIDGE * (1 + rest.diagonal()[1:].mean()) / (1 + known.shape[1]))
    ridge[0] = 1
    rest += np.diag(ridge)
    lower = np.zeros_like(rest)
    for j in range(len(rest)):
        lower[j:, j] = rest[j:, j] / rest[j, j]
        rest[j:, j:] -= np.outer(lower[j:, j], rest[j, j:])
    most = LARGEST_COEFFICIENT * COEFFICIENT_PARTS
    return np.rint(lower * COEFFICIENT_PARTS).clip(-most, most)


def blocks_of(rows: int) -> Iterator[slice]:
    """The blocks of rows that are predicted at once, from all rows before them."""
    start = 0
    while start < rows:
        stop = min(rows, start + max(FIRST_BLOCK, start // BLOCK_SHARE))
        yield slice(start, stop)
        start = stop


def predict(lines: np.ndarray, excluded: np.ndarray, top: int, settle: SettleLine) -> None:
    """Go through blocks of rows, and in each through the columns: settle(j, block, prediction).

    lines: integers (columns, rows). A decoder's settle() fills in lines[j, block], which later
    predictions use.
    excluded: bool (rows,), rows that are predicted as 0 and not learned from.
    """
    for block in blocks_of(lines.shape[1]):
        learned = lines[:, : block.start][:, ~excluded[: block.start]]
        regression = regression_of(learned)
        innovations = np.full((len(regression), block.stop - block.start), INNOVATION_PARTS, float)
        for j, line in enumerate(lines):
            shares = regression[j + 1, : j + 1] @ innovations[: j + 1]
            fine = np.floor(shares / COEFFICIENT_PARTS + 0.5)
            fine = fine.clip(-top * INNOVATION_PARTS, top * INNOVATION_PARTS)
            fine[excluded[block]] = 0
            settle(j, block, np.floor(fine / INNOVATION_PARTS + 0.5).astype(np.int64))
            innovations[j + 1] = INNOVATION_PARTS * line[block] - fine


def differences(matrix: np.ndarray, excluded: np.ndarray, top: int) -> np.ndarray:
    """An integer matrix (r, c) minus its predictions, modulo 2 top + 1; see predict()."""
    lines = matrix.T.copy()
    rest = np.empty_like(lines)

    def settle(j: int, block: slice, prediction: np.ndarray) -> None:
        rest[j, block] = wrap_integers(lines[j, block] - prediction, top)

    predict(lines, excluded, top, settle)
    return rest.T.copy()


SettleLine = Callable[[int, slice, np.ndarray], None]


@dataclass
class IntegerModel:
    """All tables that code an artifact: those of profiles, and those of matrices by their `top`."""

    profiles: AdaptiveTables = field(default_factory=lambda: AdaptiveTables(PROFILE_TOP))
    integers: dict[int, AdaptiveTables] = field(default_factory=dict)
    predicted: int = 0  # the number of matrices predicted so far

    def may_predict(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape may be predicted."""
        fits = columns <= MAX_PREDICTED_COLUMNS and rows >= LEAST_ROWS_PER_COLUMN * columns
        return fits and self.predicted < MAX_PREDICTED_MATRICES

    def tables(self, top: int) -> AdaptiveTables:
        """The tables of integers from -top to top."""
        if top not in self.integers:
            self.integers[top] = AdaptiveTables(top)
        return self.integers[top]

    def code_steps(self, coder: Coder, steps: np.ndarray, spread: int) -> None:
        """Code a profile's steps in place; spread: 0 if all are 0, else 1 + their level."""
        if spread:
            zeros = np.zeros(len(steps), np.int64)
            self.profiles.code(coder, steps[None], spread - 1, zeros[:1], zeros)


def encode_matrix(encoder: RangeEncoder, model: IntegerModel, matrix: np.ndarray) -> None:
    """Code an integer matrix (r, c) of at least one element from -128 to 128.

    Its facts: a byte with the bits of `top`, where bit 6 is set if the matrix is predicted and bit
    7 if it has twins (see find_twins); the level; the shifts and the spreads of rows and columns;
    with twins, a bit for each row and the number of the row that is subtracted.
    """
    top = grid_top(int(np.abs(matrix).max()))
    twins, first = find_twins(matrix)
    coded = matrix.copy()
    coded[twins] = wrap_integers(coded[twins] - coded[first], top)
    is_predicted = False
    if model.may_predict(*coded.shape):
        rest = differences(coded, twins, top)
        # Bits are estimated as in find_twins().
        saved = np.log2(np.abs(coded) + 0.5).sum() - np.log2(np.abs(rest) + 0.5).sum()
        is_predicted = saved > LEAST_SAVED_BITS * coded.size
        coded = rest if is_predicted else coded
    profile = fit_profile(coded)
    spreads = [
        1 + level_of(float(np.abs(steps).mean())) if steps.any() else 0
        for steps in (profile.rows, profile.columns)
    ]
    kind = top.bit_length() | is_predicted << 6 | bool(twins.any()) << 7
    shifts = profile.row_shift | profile.column_shift << 4
    encoder.facts += bytes([kind, profile.level, shifts, *spreads])
    if twins.any():
        encoder.facts += np.packbits(twins).tobytes() + first.to_bytes(4, "little")
    model.code_steps(encoder, profile.rows, spreads[0])
    model.code_steps(encoder, profile.columns, spreads[1])
    tables = model.tables(top)
    row_levels, column_levels = profile.levels()
    if not is_predicted:
        tables.code(encoder, coded, profile.level, row_levels, column_levels)
        return
    model.predicted += 1
    lines = coded.T.copy()
    for block in blocks_of(len(coded)):
        for j, line in enumerate(lines):
            levels = column_levels[j : j + 1], row_levels[block]
            tables.code(encoder, line[None, block], profile.level, *levels)


def decode_matrix(
    decoder: RangeDecoder, model: IntegerModel, rows: int, columns: int
) -> np.ndarray:
    """The next matrix, int16 (rows, columns); raises ValueError if that cannot be decoded."""
    kind, level, shifts, row_spread, column_spread = decoder.read_facts(5)
    top = top_of_bits(kind & 63)
    is_predicted = bool(kind & 64)
    if is_predicted and not model.may_predict(rows, columns):
        raise ValueError(f"a matrix of {rows:,} rows and {columns:,} columns is predicted")
    twins: np.ndarray = np.zeros(rows, bool)
    first = 0
    if kind >> 7:
        packed_bits = np.frombuffer(decoder.read_facts(divide_up(rows, 8)), np.uint8)
        twins = np.unpackbits(packed_bits, count=rows).astype(bool)
        first = int.from_bytes(decoder.read_facts(4), "little")
        if first >= rows or twins[first]:
            raise ValueError(f"row {first:,} of {rows:,} cannot be the one that others differ from")
    row_steps = np.zeros(rows, np.int64)
    column_steps = np.zeros(columns, np.int64)
    model.code_steps(decoder, row_steps, row_spread)
    model.code_steps(decoder, column_steps, column_spread)
    matrix = np.zeros((rows, columns), np.int16)
    profile = Profile(level, row_steps, column_steps, shifts & 15, shifts >> 4)
    tables = model.tables(top)
    row_levels, column_levels = profile.levels()

    def settle(j: int, block: slice, prediction: np.ndarray) -> None:
        line = lines[j, block]  # a view
        tables.code(decoder, line[None], level, column_levels[j : j + 1], row_levels[block])
        line[:] = wrap_integers(line + prediction, top)

    if is_predicted:
        model.predicted += 1
        lines = matrix.T.copy()
        predict(lines, twins, top, settle)
        matrix = lines.T.copy()
    else:
        tables.code(decoder, matrix, level, row_levels, column_levels)
    matrix[twins] = wrap_integers(matrix[twins] + matrix[first], top)
    return matrix


def lanes_for(integers: int) -> int:
    """The number of lanes that code this many integers."""
    return max(1, math.isqrt(integers) // LANE_SHARE)


def encode_integers(matrices: Sequence[np.ndarray]) -> tuple[bytes, bytes]:
    """Pack matrices of integers from -128 to 128 into facts, which LZMA can shorten, and a stream.

    The same matrices always give the same bytes. Raises ValueError for shapes that decoders refuse.
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

    Raises ValueError for anything that encode_integers() cannot have written. Time and memory grow
    with the number of integers that `shapes` claims, however few bytes there are.
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


# LZMA packs everything in a body but the integers: its header, its floats, its packed text, and the
# facts that go with the integers.
FACTS_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "pb": 0}]
RANGE_LENGTHS = struct.Struct("<4I")  # bytes of header, facts, text, and of LZMA's output
MAX_FACTS = 1 << 20  # bytes of facts and flags, which the body itself does not hold


def float_planes(floats: Sequence[np.ndarray]) -> bytes:
    """fp16 tensors as bytes: a flag for each, then all high bytes, then all low bytes.

    The flag is 1 if a tensor's bit patterns ascend, as those of sorted scales do; then their
    differences are written instead of them.
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


def read_float_planes(content: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """The flat fp16 tensors, of these sizes, in what float_planes() made; or raises ValueError."""
    flags = content[: len(sizes)]
    planes = np.frombuffer(content, np.uint8, offset=len(sizes))
    if len(planes) != 2 * sum(sizes) or any(flag > 1 for flag in flags):
        raise ValueError(f"{len(content):,} bytes are not {sum(sizes):,} floats")
    high, low = planes.reshape(2, -1).astype(np.uint16)
    words = high << 8 | low
    tensors: list[np.ndarray] = []
    start = 0
    for flag, size in zip(flags, sizes, strict=True):
        patterns: np.ndarray = words[start : start + size]
        if flag:
            patterns = patterns.cumsum(dtype=np.uint16)
        tensors.append(np.frombuffer(patterns.astype("<u2").tobytes(), "<f2").astype(np.float16))
        start += size
    return tensors


def pack_by_range(body: bytes) -> bytes:
    """Pack an artifact's body by the range coder: lengths, LZMA's output, the integers' stream.

    Raises one of MALFORMED if the bytes are not a body.
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
    """The body of `size` bytes that pack_by_range() was given; raises one of MALFORMED if damaged.

    Before any integer is decoded, what the header promises must be `size` bytes in all.
    """
    header_size, facts_size, text_size, packed_size = RANGE_LENGTHS.unpack_from(packed)
    end = RANGE_LENGTHS.size + packed_size
    plain = unpack_lzma(packed[RANGE_LENGTHS.size : end], size + MAX_FACTS)
    parts = io.BytesIO(plain)
    head = struct.pack("<I", header_size) + parts.read(header_size)
    facts = parts.read(facts_size)
    text = parts.read(text_size)
    float_bytes = parts.read()
    _, rows, _ = header_of(head, ARTIFACT_VERSION)
    shapes: dict[str, list[Shape]] = {dtype: [] for dtype in STREAM_TYPES}
    for _, dtype, shape in streams_in_body(rows):
        shapes[dtype].append(shape)
    integers, floats, text_bytes = (sum(map(math.prod, shapes[dtype])) for dtype in STREAM_TYPES)
    if text_bytes != text_size or len(head) + integers + 2 * floats + text_bytes != size:
        raise ValueError("its header and lengths disagree")
    fp16_tensors = read_float_planes(float_bytes, [math.prod(shape) for shape in shapes["<f2"]])
    matrices = decode_integers(facts, packed[end:], shapes["<i1"])
    arrays = [*matrices, *(tensor.astype("<f2") for tensor in fp16_tensors)]
    return b"".join([head, *(array.tobytes() for array in arrays), text])


def unpack_lzma(packed: bytes, most: int) -> bytes:
    """What LZMA packed; raises ValueError if that is damaged or more than `most` bytes."""
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
# The artifact has a budget of bytes as training has one of seconds. Where CLIP_SIGMAS sets the
# scales, a factor of CLIP_SIGMAS makes all grids coarser, and so the artifact smaller; the smallest
# factor that meets the budget is searched for.
# =================================================================================================

SIZE_FORESEEN_AT = 0.1  # the share of the run after which the log predicts the artifact's size
FACTOR_BYTES = 0.2  # about what an element of a correction's factors takes
LEAST_CODED = 0.96  # a codec takes at least this share of the integers' entropy

SOLVER_PASSES = 8  # how often the whole model is quantized and packed at most
SOLVER_OCTAVES = (-4.0, 4.0)  # binary logarithms of the smallest and the largest factor
SOLVER_HALVINGS = 12  # how often that range is halved, by estimates of the size
SOLVER_AIM = 0.997  # a pass aims at this share of the target
SOLVER_LEAST = 0.99  # a pass must reach this share of ARTIFACT_TARGET_BYTES


def entropy_bytes(integers: Tensor) -> float:
    """Bytes that int8 values of any shape take by the entropy of their histogram."""
    frequencies = torch.bincount(integers.flatten().int() + 128).double() / integers.numel()
    nats = float(torch.special.entr(frequencies).sum()) * integers.numel()
    return nats / math.log(256)


@torch.no_grad()
def estimated_bytes(model: GPT, factor: float) -> float:
    """Entropy in bytes of all matrices, rounded to nearest by their largest candidates for scales.

    factor: what CLIP_SIGMAS is multiplied by.
    """
    total = 0.0
    for name, parameter in model.named_parameters():
        bits = bits_of(model, name)
        if bits == 0:
            continue
        weight = parameter.detach().float()
        top = largest_integer(bits)
        sigmas = factor * setting_of(model, name, model.cfg.sigmas_by_role)
        scale = clip_candidates(weight, bits, model.cfg, sigmas)[-1]
        total += entropy_bytes(round_to_grid(weight, scale[:, None], top))
    return total


def solve_factor(model: GPT, goal: float) -> float:
    """The smallest factor of CLIP_SIGMAS with which matrices take `goal` bytes, by estimate."""
    finest, coarsest = SOLVER_OCTAVES
    for _ in range(SOLVER_HALVINGS):
        middle = 0.5 * (finest + coarsest)
        if estimated_bytes(model, 2.0**middle) <= goal:
            coarsest = middle
        else:
            finest = middle
    return 2.0**coarsest


def correction_bytes(model: GPT) -> float:
    """An estimate of the bytes of low-rank corrections, as if the largest matrices got them."""
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
    """Log an estimate of the size of code and artifact; warn if they will not fit.

    The estimate knows neither Hessians nor the codec and tends to be low: it counts integers near
    their entropy, and a byte for each float. It holds early in a run because CLIP_SIGMAS are
    relative to the rows' deviations, so that rows may grow without taking more bytes.
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

    This is the secant method on estimated_bytes(): one pass shows how far the estimate is off, two
    passes show how many real bytes correspond to an estimated one. Once passes lie on both sides of
    the target, the next factor lies between theirs, since a codec's size is not a smooth function.
    """

    def __init__(self, model: GPT, target: int) -> None:
        self.model = model
        self.target = target
        self.largest_over = 0.0  # the largest factor whose artifact is over the target
        self.smallest_fitting = math.inf  # the smallest factor whose artifact fits
        self.totals: dict[float, int] = {}  # real bytes by estimated bytes

    def next_factor(self, factor: float, total: int) -> float:
        """The factor to try after one that gave `total` bytes; the same one at the range's end."""
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
        """Real bytes for each estimated one, by this pass and the last other one: 0.5 to 2."""
        slopes = [
            (total - other_total) / (estimate - other)
            for other, other_total in self.totals.items()
            if other != estimate
        ]
        return min(max(slopes[-1], 0.5), 2.0) if slopes else 1.0


def fit_artifact(
    model: GPT, hessians: dict[str, Tensor], packed_text: bytes, header: dict, run: Run
) -> tuple[dict[str, Stored], bytes]:
    """Quantize and pack until the artifact fits; returns the tensors and the artifact's bytes.

    Where CLIP_SIGMAS sets the scales, a pass must end just below ARTIFACT_TARGET_BYTES if that is
    set, and anywhere below the limit if not. Of up to SOLVER_PASSES passes the largest artifact
    that fits is kept, or the smallest if none fits. Elsewhere there is no factor, and so one pass.
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
        following = solver.next_factor(factor, total)
        if following == factor:
            break
        factor = following
    fitting = [attempt for attempt in tries if attempt[0] <= target]
    if fitting:
        return max(fitting, key=lambda attempt: attempt[0])[1:]
    return min(tries, key=lambda attempt: attempt[0])[1:]


def export(
    model: GPT, hessians: dict[str, Tensor], packed_text: bytes, val: Validation, run: Run
) -> bytes:
    """Quantize on rank 0 and write artifact.bin; returns its bytes as read back, on all ranks."""
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
    """Packed training text as a tensor of the artifact; nothing if there is none."""
    if not packed_text:
        return {}
    content = np.frombuffer(packed_text, np.uint8).copy()
    return {TRAINING_TEXT: Stored(torch.from_numpy(content))}


def log_sizes(model: GPT, stored: dict[str, Stored], run: Run) -> None:
    """Log for each role the number of its integers, their entropy in bytes, and its floats' bytes.

    The factors of corrections are integers with a histogram of their own.
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
    """How log lines name the artifact's format, by its MLP matrices: int6 or the like."""
    mlps = [stored[name] for name, kind in model.kinds.items() if kind.role == "mlp"]
    if any(tensor.scale is not None for tensor in mlps):
        return f"int{model.cfg.bits_by_role['mlp']}"
    return "fp16"


# =================================================================================================
# Counts
# The network's distribution mixed with n-gram counts and repeats of the training text and of the
# validation text that is already scored. Every distribution is over the whole vocabulary and sums
# to one; nothing that predicts a token depends on that token or on a later one. Mixture has the
# equation of the mixture, CountModel that of the n-grams.
#
# An n-gram's order is its number of tokens. Its context is all of it but the last token.
# =================================================================================================

MAX_VOCABULARY = 65_536  # ids are stored as uint16
MAX_ORDER = 16  # of an n-gram


@dataclass(frozen=True, kw_only=True)
class CountSettings(Part):
    """Which texts are counted, and how the counts are mixed with the network."""

    title = "Counts"
    prefixes: ClassVar[tuple[str, ...]] = ("COUNT_",)

    counts: str = scoring_knob(
        "off",
        ("off", "scored", "artifact", "both"),
        "Mix the network with n-gram counts of the validation text that is already scored "
        "(scored), of training text that the artifact carries (artifact), or of both.",
        absent="off",
    )
    count_bytes: int = training_knob(
        4_000_000, (1, 1 << 40), "Put training text of up to this many bytes into the artifact."
    )
    count_orders: str = scoring_knob(
        "2,8", (), "Count n-grams of these orders; may be empty.", absent="2,8", tries=("2,3",)
    )
    count_recent_tokens: int = scoring_knob(
        2048,
        (0, 1 << 20),
        "Expect tokens and pairs among this many last tokens to come again; 0 turns that off.",
        absent=2048,
        tries=(8,),
    )
    count_longest_match: int = scoring_knob(
        32, (0, 256), "Find repeats of up to this many tokens; 0 finds none.", absent=32, tries=(4,)
    )
    count_chunk_tokens: int = scoring_knob(
        64, (1, 4096), "Update the mixture after each this many targets.", absent=64, tries=(7,)
    )
    count_gate_rate: float = scoring_knob(
        0.02, (0.0, 10.0), "Train the mixture's weights at this rate; 0 fixes them.", absent=0.02
    )
    count_match_rate: float = scoring_knob(
        0.2, (0.0, 10.0), "Train the biases for repeats at this rate; 0 fixes them.", absent=0.2
    )

    @property
    def orders(self) -> tuple[int, ...]:
        """COUNT_ORDERS as numbers, perhaps none; raises Refusal if they cannot be parsed."""
        if not self.count_orders:
            return ()
        return parse_orders("COUNT_ORDERS", self.count_orders)

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
        """Orders are small numbers, and counting needs a text that is scored in order."""
        yield (
            all(2 <= order <= MAX_ORDER for order in cfg.orders),
            f"COUNT_ORDERS must be from 2 to {MAX_ORDER}",
        )
        yield (
            cfg.counts == "off" or cfg.eval_stride > 0,
            "COUNTS needs sliding windows: EVAL_STRIDE must be above 0",
        )


def parse_orders(name: str, text: str) -> tuple[int, ...]:
    """Parse distinct numbers like 2,4,8, in any order, to ascending ones; or raises Refusal."""
    numbers = [part.strip() for part in text.split(",")]
    are_numbers = all(re.fullmatch(r"[1-9]\d?", number) for number in numbers)
    if not are_numbers or len(set(numbers)) < len(numbers):
        raise Refusal(f"{name}={text!r}: expected distinct numbers like 2,4,8")
    return tuple(sorted(map(int, numbers)))


@dataclass(frozen=True)
class GramTable:
    """The n-grams of one order in a text, numbered by context and then by last token.

    All grams with one context, which is a gram of the order below, have neighbouring numbers. A
    gram whose context occurs only once has no number: no other place could learn from it.
    """

    gram_at: np.ndarray  # int32 (N,): number of the gram that ends at each token, or -1
    is_first: np.ndarray  # bool (N,): whether no earlier token ends the same gram
    first_gram: np.ndarray  # int32 (contexts + 1,): where the grams of each context begin
    last_token: np.ndarray  # uint16 (grams,): of each gram


class TextIndex:
    """Numbers for the n-grams of a text, and the longest earlier repeat before each token.

    The numbers are names only: what a text holds later never changes which earlier places share a
    name. They come from sorting, so they are exact; nothing is hashed. Tokens from `boundary` on
    are those to predict, and the text before is training text. Repeats are looked for in training
    text alone, or, if there is none, in all earlier text.
    """

    def __init__(
        self, tokens: np.ndarray, longest_order: int, longest_match: int = 0, boundary: int = 0
    ) -> None:
        self.tokens = np.asarray(tokens, np.uint16)
        self.boundary = boundary
        self.tables: list[GramTable] = []
        targets = len(tokens) - boundary
        self.match = MatchModel(targets if longest_match else 0)
        # For each gram to number: the place of its last token, ascending; its context's number.
        places: np.ndarray = np.arange(len(tokens), dtype=np.int32)
        contexts: np.ndarray = np.zeros(len(tokens), np.int32)
        num_contexts = 1
        for order in range(1, max(longest_order, longest_match) + 1):
            # A stable sort leaves equal grams in the order of the text.
            keys = contexts.astype(np.int64) * MAX_VOCABULARY + self.tokens[places]
            sorted_keys, permutation = (
                x.numpy() for x in torch.sort(torch.from_numpy(keys), stable=True)
            )
            del keys  # a text of many million tokens leaves no memory for what is not needed
            is_new = np.ones(len(places), bool)  # whether another gram begins, among sorted ones
            is_new[1:] = sorted_keys[1:] != sorted_keys[:-1]
            sorted_grams = np.cumsum(is_new, dtype=np.int32) - 1
            grams = np.empty_like(sorted_grams)
            grams[permutation] = sorted_grams
            if order <= longest_order:
                is_first = np.empty_like(is_new)
                is_first[permutation] = is_new
                self.add_table(places, grams, is_first, sorted_keys[is_new], num_contexts)
            del sorted_keys
            if order <= longest_match:
                group_start = np.flatnonzero(is_new).astype(np.int32)[sorted_grams]
                self.note_matches(order, places[permutation], group_start)
                del group_start
            del permutation, sorted_grams
            num_contexts = int(is_new.sum())
            is_context = np.bincount(grams, minlength=num_contexts) > 1
            if order >= longest_order:
                # From here on only repeats are looked for, and only grams before targets matter.
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
        """Add the table of the next order, whose grams end at `places`; grams: their numbers.

        keys: for each gram by number, its context's number * MAX_VOCABULARY + its last token.
        """
        gram_at = np.full(len(self.tokens), -1, np.int32)
        gram_at[places] = grams
        first_anywhere = np.ones(len(self.tokens), bool)  # a gram without a number occurs once
        first_anywhere[places] = is_first
        sizes = np.bincount(keys // MAX_VOCABULARY, minlength=num_contexts)
        first_gram = np.append(0, np.cumsum(sizes)).astype(np.int32)
        last_token = (keys % MAX_VOCABULARY).astype(np.uint16)
        self.tables.append(GramTable(gram_at, first_anywhere, first_gram, last_token))

    def note_matches(self, length: int, places: np.ndarray, group_start: np.ndarray) -> None:
        """Note for each target the latest earlier occurrence of the `length` tokens before it.

        places: where the grams of that length end, sorted by gram and then by place.
        group_start: for each of these, where in `places` its gram begins.
        """
        earlier = np.arange(-1, len(places) - 1, dtype=np.int32)
        if self.boundary:
            # The latest place in training text among the sorted places up to each.
            is_source = places + 1 < self.boundary
            latest = np.where(is_source, np.arange(len(places), dtype=np.int32), np.int32(-1))
            earlier[1:] = np.maximum.accumulate(latest)[:-1]
        is_target = (places + 1 >= self.boundary) & (places + 1 < len(self.tokens))
        found = is_target & (earlier >= group_start)
        target = places[found] + 1 - self.boundary
        self.match.length[target] = length
        self.match.source[target] = places[earlier[found]] + 1


class MatchModel:
    """For each target, the longest repeat of the tokens before it, and what followed it there."""

    def __init__(self, targets: int) -> None:
        self.length = np.zeros(targets, np.int16)  # of the repeat in tokens; 0 if there is none
        self.source = np.zeros(targets, np.int32)  # the place after its latest earlier occurrence


class Tally:
    """How often the grams of one order were counted, and how often each count occurs."""

    def __init__(self, grams: int) -> None:
        self.counts = np.zeros(grams, np.int32)
        self.grams_with = np.zeros(6, np.int64)  # grams counted 0, 1, 2, 3, 4 and more times
        self.unnumbered = 0  # grams without a number, which are counted once

    def add(self, grams: np.ndarray, weights: np.ndarray) -> None:
        """Add a weight (0 or 1) to each gram's count; grams may repeat, -1 has no number."""
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

        D_c = c - (c + 1) Y n_(c+1) / n_c with Y = n_1 / (n_1 + 2 n_2), where n_c grams were counted
        c times (Chen & Goodman 1998, equation 26). If some n_c is 0, they are 0.5, 1 and 1.5. A
        discount lies between 0.1 and its count, so that every token keeps a probability.
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
    """What is known of the longest context of each target that was seen before: int64 (n,) each."""

    order: np.ndarray  # of the n-grams with that context; 1 if no context was seen
    count: np.ndarray  # how often it was seen
    continuations: np.ndarray  # how many different tokens followed it

    @classmethod
    def of_nothing(cls, n: int) -> Evidence:
        """For n targets whose contexts are all new."""
        return cls(np.ones(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64))


class CountModel:
    """Interpolated modified Kneser-Ney over token ids (Chen & Goodman 1998, section 3.5).

    With h the context, h' the same without its first token, and c the count of h followed by w:

        p(w|h) = (c - D(c)) / sum_w c + sum_w D(c) / sum_w c * p(w|h'),    p() = 1/V.

    A model of order K counts occurrences at order K and, below it, the different tokens that came
    before: c(h w) = |{v: v h w was seen}|. Models of several orders share the counts below them.
    probs() uses all tokens before each target, except at order 1, which is as learn() left it.
    """

    def __init__(
        self, index: TextIndex, orders: tuple[int, ...], vocab_size: int, learned: int
    ) -> None:
        self.index = index
        self.orders = orders
        self.vocab_size = vocab_size
        self.learned = 0  # how many tokens of the text are counted
        self.occurrences = {order: self.empty_tally(order) for order in orders}
        self.predecessors = {order: self.empty_tally(order) for order in range(1, max(orders))}
        self.learn(learned)

    def empty_tally(self, order: int) -> Tally:
        """A tally of nothing yet for the grams of an order."""
        return Tally(len(self.index.tables[order - 1].last_token))

    def learn(self, until: int) -> None:
        """Count the tokens that are not counted yet, up to `until`, exclusive."""
        places = np.arange(self.learned, until)
        for order, tally in self.occurrences.items():
            ends = places[places >= order - 1]  # where grams of this order end
            tally.add(self.index.tables[order - 1].gram_at[ends], np.ones(len(ends), np.int32))
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
        # Sums are over the whole vocabulary, so that their rounding shows nothing of later tokens.
        counts = np.zeros(self.vocab_size)
        counts[self.index.tables[0].last_token] = tally.counts
        discount = tally.discounts()[np.minimum(counts, 3).astype(np.int64)]
        uniform = np.full(self.vocab_size, 1.0 / self.vocab_size)
        total = counts.sum()
        return (counts - discount + discount.sum() * uniform) / total if total else uniform

    def probs(self, places: np.ndarray, online: bool) -> tuple[dict[int, np.ndarray], Evidence]:
        """Distributions of the tokens at neighbouring places, float64 (n, V) by order.

        online: whether tokens that are not learned yet count too, each for the places after it.
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
        # Tokens that the tallies do not count yet are added to the rows of the places after them.
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
        """Counts of the matrix's entries, each as of the place of its row: float64 (entries,)."""
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
        """Write into `seen` what is known of the contexts that were seen."""
        total = np.bincount(self.row, counts, len(seen.order)).astype(np.int64)
        kinds = np.bincount(self.row, counts > 0, len(seen.order)).astype(np.int64)
        is_known = total > 0
        seen.order[is_known] = self.order
        seen.count[is_known] = total[is_known]
        seen.continuations[is_known] = kinds[is_known]


# Hints: tokens that may come next, by rules that read only earlier tokens

PROBABILITY_CLASSES = 10  # classes of the probability of a hint's token, by powers of two
START_BIAS = 0.1  # the initial bias of a hint, for each token of its repeat
GAP_CLASSES = 17  # classes of the distance to a token's last occurrence, by powers of two
FOLLOWED_FROM = 6  # a repeat of this many tokens is followed
FOLLOWED_SURELY = 16  # once this many tokens in a row agree, another repeat is no better
FOLLOWED_MISSES = 8  # a repeat is given up once this many of its last 16 tokens differ


@dataclass(frozen=True)
class Hint:
    """For each place of a text a token that may come there, and how strong the evidence is."""

    tokens: np.ndarray  # int32 (N,): the token, -1 where the rule knows none
    strength: np.ndarray  # int16 (N,): the class of the evidence for the token
    start: np.ndarray  # float64 (classes,): the initial bias of each class

    def biases(self, rate: float) -> AdagradTable:
        """The hint's biases: by strength, then by the token's probability in two distributions."""
        table = AdagradTable((len(self.start) + 2 * PROBABILITY_CLASSES,), rate)
        table.values[: len(self.start)] = torch.from_numpy(self.start)
        return table

    def at(self, places: slice, network: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens at n places (n,), -1 for none, and the indices of their three biases (3, n).

        network, longest: log-probabilities (n, V) of the network and of the longest order, from
        which a token's classes of probability come.
        """
        tokens = torch.from_numpy(self.tokens[places].astype(np.int64))
        buckets = [torch.from_numpy(self.strength[places].astype(np.int64))]
        first = len(self.start)
        for row in (network, longest):
            bits = row.gather(1, tokens.clamp_min(0)[:, None])[:, 0] / -math.log(2)
            buckets.append(first + bits.clamp(0, PROBABILITY_CLASSES - 1).long())
            first += PROBABILITY_CLASSES
        return tokens, torch.stack(buckets)


def hint_of_match(index: TextIndex, longest: int) -> Hint:
    """The hint at what followed the longest repeat, its strength the repeat's length."""
    match = index.match
    tokens = np.where(match.length > 0, index.tokens[match.source].astype(np.int32), -1)
    return Hint(tokens, match.length, START_BIAS * np.arange(longest + 1))


def hint_past_differences(tokens: np.ndarray, match: MatchModel, longest: int) -> Hint:
    """The hint of a repeat that is followed on even if some tokens differ.

    Its strength: how many tokens agreed since the last that differed, and how many of 16 differed.
    """
    hinted = np.full(len(tokens), -1, np.int32)
    strength = np.zeros(len(tokens), np.int16)
    text = np.ascontiguousarray(tokens, np.uint16).data
    lengths, sources = match.length.data, match.source.data
    source = -1  # the place whose token is expected
    agreed = 0
    differed = 0  # a bit for each of the last 16 tokens, 1 if it differed
    for place in range(1, len(tokens)):
        if source >= 0:
            is_right = text[source] == text[place - 1]
            agreed = min(agreed + 1, longest) if is_right else 0
            differed = (differed << 1 | (not is_right)) & 0xFFFF
            source += 1
            if differed.bit_count() >= FOLLOWED_MISSES:
                source = -1
        length = lengths[place]
        is_better = source < 0 or agreed < min(length, FOLLOWED_SURELY)
        if length >= FOLLOWED_FROM and is_better:
            source = sources[place]
            agreed = length
            differed = 0
        if source >= 0:
            hinted[place] = text[source]
            strength[place] = agreed * FOLLOWED_MISSES + differed.bit_count()
    start = START_BIAS * np.repeat(np.arange(longest + 1), FOLLOWED_MISSES)
    return Hint(hinted, strength, start)


def previous_places(tokens: np.ndarray) -> np.ndarray:
    """For each place, the latest earlier place with the same token, or -1: int32 (N,)."""
    order = np.argsort(tokens, kind="stable").astype(np.int32)
    is_same = tokens[order[1:]] == tokens[order[:-1]]
    previous = np.full(len(tokens), -1, np.int32)
    previous[order[1:][is_same]] = order[:-1][is_same]
    return previous


def gap_classes(previous: np.ndarray) -> np.ndarray:
    """The distance to each token's last occurrence, by powers of two; 0 if new: int16 (N,)."""
    gap = np.arange(len(previous), dtype=np.int32) - previous
    classes = 1 + log2_class(gap, GAP_CLASSES - 2)
    return np.where(previous >= 0, classes, 0).astype(np.int16)


def hint_of_last_follower(tokens: np.ndarray, previous: np.ndarray, gaps: np.ndarray) -> Hint:
    """The hint at what followed the last token last time, its strength how long ago that was."""
    hinted = np.full(len(tokens), -1, np.int32)
    followers = tokens[previous[:-1] + 1].astype(np.int32)
    hinted[1:] = np.where(previous[:-1] >= 0, followers, -1)
    return Hint(hinted, np.append(np.int16(0), gaps[:-1]), np.zeros(GAP_CLASSES))


# Distributions of recent tokens

RECENT_DECAY = 0.99  # a recent token counts this many times what the one after it counts
RECENT_NETWORK = 20.0  # the network's distribution counts as this many recent tokens
FOLLOWERS = 32  # at most this many occurrences of the last token count
FOLLOWER_DECAY = 0.9  # an occurrence counts this many times what the next one counts
FOLLOWERS_NETWORK = 3.0  # the network's distribution counts as this many occurrences


def expect_recent(tokens: np.ndarray, first: int, W: int, network: np.ndarray) -> np.ndarray:
    """The distribution of the last W tokens before each place, mixed with the network's.

    network: its distributions (n, V) at the n places from `first` on -> float64 (n, V).
    """
    n, V = network.shape
    ages = np.arange(min(first, W))[::-1]
    counts = np.empty((n, V))
    counts[0] = np.bincount(tokens[first - len(ages) : first], RECENT_DECAY**ages, V)
    for row in range(1, n):
        place = first + row
        counts[row] = RECENT_DECAY * counts[row - 1]
        counts[row, tokens[place - 1]] += 1
        if place > W:
            leaving = tokens[place - 1 - W]
            # Rounding may leave a count below 0 for a token that is not among the W any more.
            counts[row, leaving] = max(0.0, counts[row, leaving] - RECENT_DECAY**W)
    total = counts.sum(1, keepdims=True) + RECENT_NETWORK
    return (counts + RECENT_NETWORK * network) / total


def expect_followers(
    tokens: np.ndarray, previous: np.ndarray, first: int, W: int, network: np.ndarray
) -> np.ndarray:
    """The distribution of what followed earlier occurrences of the last token, with the network's.

    Of its occurrences among the last W tokens the latest FOLLOWERS count. previous: see
    previous_places(). network: its distributions (n, V) at the n places from `first` on
    -> float64 (n, V).
    """
    n = len(network)
    rows: np.ndarray = np.arange(n)
    counts = FOLLOWERS_NETWORK * network
    total = np.full(n, FOLLOWERS_NETWORK)
    earlier = previous[first - 1 + rows]
    for age in range(FOLLOWERS):
        is_near = (earlier >= 0) & (earlier >= first + rows - W)
        if not is_near.any():
            break
        rows, earlier = rows[is_near], earlier[is_near]
        counts[rows, tokens[earlier + 1]] += FOLLOWER_DECAY**age
        total[rows] += FOLLOWER_DECAY**age
        earlier = previous[earlier]
    return counts / total[:, None]


# Initial weights of distributions, rounded from those that were learned on held-out training text.
# That of the shortest order is negative, since what is likely in any context is weak evidence.
START_NETWORK = 0.6
START_LONGEST_ORDER = 0.4
START_SHORTEST_ORDER = -0.15
START_RECENT = 0.2
START_FOLLOWERS = 0.1
MAX_LOG2_COUNT = 5  # counts are put into classes by powers of two, up to 2^5
# Classes of a repeat's length: the shortest length in each class but the first, which begins at 0.
MATCH_CLASSES = np.array([4, 6, 8, 10, 12, 16, 24, 32])
LOG_OF_NOTHING = -1e4  # stands for -inf in the rows that are mixed, since -inf times 0 is nan


class Mixture:
    """One distribution from the network's, the counts' and the hints; it learns as it scores.

        p(w) = softmax over w of ( sum_i a_i log p_i(w) + sum_m b_m [w is the token of hint m] )

    The p_i are the distributions of the network, of Kneser-Ney for each order, of recent tokens and
    of followers. Each of several gates puts a target into a bucket, by what is known before it, and
    has a weight for each bucket and i; a_i is the initial weight plus those of all gates. b_m is
    the sum of three biases: by the hint's strength, and by the probabilities that the network and
    the longest order give its token. After a chunk of targets is scored, all weights and biases
    take an Adagrad step (Duchi et al. 2011) down the gradient of the chunk's nats,

        d nats / d a_i = sum_w p(w) log p_i(w) - log p_i(target),
        d nats / d b_m = p(hint) - [hint is the target],

    and the chunk's tokens are counted. Weights are float64. All state depends on the data alone.
    """

    def __init__(
        self,
        cfg: Config,
        training_tokens: np.ndarray,
        validation_tokens: np.ndarray,
        vocab_size: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Index and count the training tokens; the targets are validation_tokens[1:].

        dtype: the type of rows over the vocabulary; float32 halves their time.
        """
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.tokens = np.asarray(validation_tokens, np.uint16)
        self.previous = previous_places(self.tokens)
        self.gaps = gap_classes(self.previous)
        self.scored = 0  # the number of targets
        self.largest_sum_error = 0.0  # of a distribution's sum, which should be 1
        self.model: CountModel | None = None
        self.matches: list[MatchModel] = []
        self.hints: list[Hint] = []
        self.read_texts(training_tokens)
        starts = [START_NETWORK, *(start_of_order(order, cfg.orders) for order in cfg.orders)]
        if cfg.count_recent_tokens:
            starts += [START_RECENT, START_FOLLOWERS]
        self.start = torch.tensor(starts, dtype=torch.float64)
        shapes = [(size, len(starts)) for size in self.gate_sizes()]
        self.gates = [AdagradTable(shape, cfg.count_gate_rate) for shape in shapes]
        if self.hints and starts == [START_NETWORK] and cfg.count_gate_rate == 0:
            self.gates = []  # one fixed weight alone: hints tilt the network, see tilt()
        self.biases = [hint.biases(cfg.count_match_rate) for hint in self.hints]
        self.pending: list[Lesson] = []

    def read_texts(self, training: np.ndarray) -> None:
        """Count the texts that the settings name, and look for hints in them."""
        cfg = self.cfg
        longest = cfg.count_longest_match
        longest_order = max(cfg.orders, default=0)
        if not cfg.counts_training_text:
            training = training[:0]
        text = np.concatenate([training.astype(np.uint16), self.tokens])
        index = TextIndex(text, longest_order, longest, len(training))
        if cfg.orders:
            learned = len(training) + int(cfg.counts_scored_text)  # the first token is no target
            self.model = CountModel(index, cfg.orders, self.vocab_size, learned)
        indices = [index]
        if cfg.counts == "both" and longest:
            indices.append(TextIndex(self.tokens, 1, longest))
        if longest:
            self.matches = [each.match for each in indices]
            self.hints = [hint_of_match(each, longest) for each in indices]
            if cfg.counts_scored_text:
                self.hints.append(hint_past_differences(self.tokens, self.matches[-1], longest))
                self.hints.append(hint_of_last_follower(self.tokens, self.previous, self.gaps))

    def gate_sizes(self) -> list[int]:
        """The number of each gate's buckets, in the order of gate_buckets()."""
        varieties = (1 + MAX_LOG2_COUNT) ** 2
        lengths = (1 + len(MATCH_CLASSES)) ** len(self.matches)
        agreements = 8
        return [varieties, lengths, GAP_CLASSES, agreements, self.vocab_size]

    def score(self, network: Tensor) -> Tensor:
        """Nats of the next n targets, float64 (n,), given the network's log-probabilities (n, V).

        Chunks begin at fixed targets, so it changes nothing how rows are divided among calls.
        """
        chunk = self.cfg.count_chunk_tokens
        nats = [torch.zeros(0, dtype=torch.float64)]
        while len(network):
            n = min(chunk - self.scored % chunk, len(network))
            tokens = self.tokens[self.scored + 1 : self.scored + n + 1]
            target = torch.from_numpy(tokens.astype(np.int64))
            if self.gates:
                log_probs, lesson = self.mix(network[:n].to(self.dtype))
                nats.append(-log_probs.gather(1, target[:, None])[:, 0].double())
                self.pending.append(lesson.graded(target))
            else:
                nats.append(self.tilt(network[:n], target))
            self.scored += n
            network = network[n:]
            if self.scored % chunk == 0:
                self.learn()
        return torch.cat(nats)

    def tilt(self, network: Tensor, target: Tensor) -> Tensor:
        """Nats (n,) of the next targets if the network is mixed with hints alone."""
        # One target of a chunk is enough to see what the network's rows sum to.
        self.note_sums(network[:1].double().exp())
        lesson = Lesson([], torch.zeros(0, len(target), dtype=torch.int64))
        targets = slice(self.scored + 1, self.scored + 1 + len(target))
        for hint in self.hints:
            lesson.take_hint(*hint.at(targets, network, network))
        self.pending.append(lesson)
        return lesson.tilted(network, target, [table.values for table in self.biases])

    def note_sums(self, probs: Tensor) -> None:
        """Keep the largest difference between 1 and the sum of a row of probs (n, V)."""
        sum_error = float((probs.sum(1) - 1).abs().max())
        self.largest_sum_error = max(self.largest_sum_error, sum_error)

    def mix(self, network: Tensor) -> tuple[Tensor, Lesson]:
        """Log-probabilities (n, V) of the next targets, which must lie in one chunk."""
        n = len(network)
        # What the mask forbids has no probability in the mixture.
        forbidden = network == -math.inf
        rows, evidence = self.distributions(network.masked_fill(forbidden, LOG_OF_NOTHING))
        longest = rows[len(self.model.orders)] if self.model else rows[0]  # the longest order's
        lesson = Lesson(rows, self.gate_buckets(evidence, rows[0], longest, rows[-1]))
        targets = slice(self.scored + 1, self.scored + 1 + n)
        for hint in self.hints:
            lesson.take_hint(*hint.at(targets, rows[0], longest))
        weights = self.start.expand(n, -1)
        for gate, bucket in zip(self.gates, lesson.buckets, strict=True):
            weights = weights + gate.values[bucket]
        logits = torch.zeros_like(network)
        for i in range(len(rows)):
            logits.addcmul_(rows[i], weights[:, i : i + 1].to(self.dtype))
        for m in range(len(self.hints)):
            bias = self.biases[m].values[lesson.bias_buckets[m]].sum(0) * lesson.is_hinted[m]
            logits.scatter_add_(1, lesson.hinted[m][:, None], bias[:, None].to(self.dtype))
        log_probs = logits.masked_fill(forbidden, -math.inf).log_softmax(1)
        lesson.probs = log_probs.exp()
        self.note_sums(lesson.probs)
        return log_probs, lesson

    def distributions(self, network: Tensor) -> tuple[list[Tensor], Evidence]:
        """The rows log p_i (n, V) of the next targets, and what is known of their contexts."""
        n = len(network)
        first = self.scored + 1
        evidence = Evidence.of_nothing(n)
        experts: list[np.ndarray] = []
        if self.model:
            # The indexed text ends with the validation text.
            place = len(self.model.index.tokens) - len(self.tokens) + first
            online = self.cfg.counts_scored_text
            by_order, evidence = self.model.probs(np.arange(place, place + n), online)
            experts += [by_order[order] for order in self.model.orders]
        if W := self.cfg.count_recent_tokens:
            of_network = network.exp().numpy()
            experts.append(expect_recent(self.tokens, first, W, of_network))
            experts.append(expect_followers(self.tokens, self.previous, first, W, of_network))
        rows = [torch.from_numpy(probs).log().clamp_min(LOG_OF_NOTHING) for probs in experts]
        return [network, *(row.to(self.dtype) for row in rows)], evidence

    def gate_buckets(
        self, evidence: Evidence, network: Tensor, longest: Tensor, followers: Tensor
    ) -> Tensor:
        """The bucket of each gate for each target: int64 (gates, n)."""
        contexts = slice(self.scored, self.scored + len(network))
        targets = slice(self.scored + 1, self.scored + 1 + len(network))
        by_variety = log2_class(evidence.continuations) * (1 + MAX_LOG2_COUNT)
        by_variety += log2_class(evidence.count)
        by_match = np.zeros(len(network), np.int64)
        for match in self.matches:
            by_match *= 1 + len(MATCH_CLASSES)
            by_match += np.searchsorted(MATCH_CLASSES, match.length[targets], side="right")
        by_gap = self.gaps[contexts].astype(np.int64)
        by_token = self.tokens[contexts].astype(np.int64)
        best = [row.argmax(1) for row in (network, longest, followers)]
        by_agreement = (best[0] == best[1]) + 2 * (best[0] == best[2]) + 4 * (best[1] == best[2])
        by_evidence = [by_variety, by_match, by_gap, by_agreement.numpy(), by_token]
        return torch.from_numpy(np.stack(by_evidence))

    def learn(self) -> None:
        """Learn from the scored targets of the chunk: weights, biases and counts."""
        buckets = torch.cat([lesson.buckets for lesson in self.pending], 1)
        gradients = torch.cat([lesson.weight_gradients for lesson in self.pending])
        for gate, bucket in zip(self.gates, buckets, strict=True):
            gate.step(bucket, gradients)
        for m, bias in enumerate(self.biases):
            places = torch.cat([lesson.bias_buckets[m] for lesson in self.pending], 1)
            gradients = torch.cat([lesson.bias_gradients[m] for lesson in self.pending])
            bias.step(places.flatten(), gradients.repeat(len(places)))
        self.pending = []
        if self.model and self.cfg.counts_scored_text:
            self.model.learn(len(self.model.index.tokens) - len(self.tokens) + 1 + self.scored)


def log2_class(counts: np.ndarray, most: int = MAX_LOG2_COUNT) -> np.ndarray:
    """floor(log2(count)) up to `most`, 0 for a count of 0: int64."""
    exponent = np.frexp(np.maximum(counts, 1).astype(np.float64))[1] - 1
    return np.minimum(exponent, most).astype(np.int64)


def start_of_order(order: int, orders: tuple[int, ...]) -> float:
    """The initial weight of an order's distribution."""
    if order == max(orders):
        return START_LONGEST_ORDER
    if order == min(orders):
        return START_SHORTEST_ORDER
    return 0.0


class Lesson:
    """What the mixture needs of some targets to learn from them once they are scored."""

    def __init__(self, rows: list[Tensor], buckets: Tensor) -> None:
        self.rows = rows  # log p_i, (n, V) each
        self.probs = torch.zeros(0)  # the mixture's, (n, V)
        self.buckets = buckets  # int64 (gates, n)
        # For each hint:
        self.hinted: list[Tensor] = []  # the tokens, int64 (n,); any token where there is none
        self.is_hinted: list[Tensor] = []  # where there is one, bool (n,)
        self.bias_buckets: list[Tensor] = []  # int64 (3, n)
        self.bias_gradients: list[Tensor] = []  # float64 (n,)
        self.weight_gradients = torch.zeros(0)  # float64 (n, number of rows)

    def take_hint(self, tokens: Tensor, buckets: Tensor) -> None:
        """Take in a hint's tokens (n,), -1 for none, and the indices of its biases (3, n)."""
        self.hinted.append(tokens.clamp_min(0))
        self.is_hinted.append(tokens >= 0)
        self.bias_buckets.append(buckets)

    def graded(self, target: Tensor) -> Lesson:
        """Compute the gradients for targets (n,), and drop the rows, which are large."""
        probs = self.probs
        expected = torch.stack([(probs * row).sum(1) for row in self.rows], 1)
        place = target[:, None]
        observed = torch.cat([row.gather(1, place) for row in self.rows], 1)
        self.weight_gradients = (expected - observed).double()
        for token, is_hinted in zip(self.hinted, self.is_hinted, strict=True):
            predicted = probs.gather(1, token[:, None])[:, 0]
            is_right = (token == target).to(probs.dtype)
            self.bias_gradients.append(((predicted - is_right) * is_hinted).double())
        self.rows = []
        self.probs = torch.zeros(0)
        return self

    def tilted(self, network: Tensor, target: Tensor, biases: list[Tensor]) -> Tensor:
        """Nats (n,) of the targets if hints alone change the network's log-probabilities (n, V).

        With b(w) the sum of the biases of all hints at token w,

            p(w) = p_network(w) exp(b(w)) / Z,  Z = 1 + sum_hinted p_network(w) (exp(b(w)) - 1),

        where no sum goes over the whole vocabulary. Keeps the gradients of the biases.
        """
        token = torch.stack(self.hinted)  # (hints, n)
        is_hinted = torch.stack(self.is_hinted)
        chosen = [
            values[buckets] for values, buckets in zip(biases, self.bias_buckets, strict=True)
        ]
        bias = torch.stack([three.sum(0) for three in chosen]) * is_hinted
        log_probs = network.gather(1, token.T).T.double()
        is_same = token[:, None] == token  # (hints, hints, n)
        tilted = log_probs + (is_same * bias).sum(1)
        is_earlier = torch.ones(len(token), len(token), dtype=torch.bool).tril(-1)[..., None]
        is_first = is_hinted & ~(is_same & is_hinted & is_earlier).any(1)
        total = 1 + ((tilted.exp() - log_probs.exp()) * is_first).sum(0)
        is_right = (token == target) & is_hinted
        gradients = (tilted.exp() / total - is_right.double()) * is_hinted
        self.bias_gradients = list(gradients)
        self.weight_gradients = torch.zeros(len(target), 0, dtype=torch.float64)
        of_target = network.gather(1, target[:, None])[:, 0].double() + (bias * is_right).sum(0)
        return total.log() - of_target


class AdagradTable:
    """A table of weights by bucket that Adagrad trains, each with its sum of squared gradients."""

    def __init__(self, shape: tuple[int, ...], rate: float) -> None:
        self.values = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.ones(shape, dtype=torch.float64)
        self.rate = rate

    def step(self, bucket: Tensor, gradients: Tensor) -> None:
        """Move weights by gradients (n, ...) of n targets, whose buckets are `bucket` (n,)."""
        total = torch.zeros_like(self.values).index_add_(0, bucket, gradients)
        self.squares.index_add_(0, bucket, gradients.square())
        self.values -= self.rate * total / self.squares.sqrt()


# Training text is stored in the artifact as a little-endian uint32, the number of tokens, and then
# the tokens as uint16 in a raw LZMA2 stream. Coding them with the counts themselves would save a
# tenth, but then tokens would have to be decoded one by one.

PACKED_COUNT = struct.Struct("<I")
MAX_PACKED_TOKENS = 100_000_000  # an unpacked text takes two bytes a token
# Two-byte units: lp and pb let the coder know which byte of a token it is at.
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 24, "lp": 1, "pb": 1}]
PACKING_LOOKS_AT = 8  # tokens that are considered for each byte of COUNT_BYTES
HOLDOUT_EVERY = 20  # one document in this many is held out, to measure the worth of the others
TYPICAL_DOCUMENT = 1000  # tokens of average worth that are added to every document as a prior


def pack_tokens(tokens: np.ndarray) -> bytes:
    """The bytes that hold tokens in an artifact; unpack_tokens() reads them."""
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
    """The training tokens in an artifact, uint16 (n,); raises Refusal if there are none."""
    if TRAINING_TEXT not in stored:
        raise Refusal(
            f"COUNTS={cfg.counts} counts training text, and the artifact holds none: "
            "COUNTS=scored needs none"
        )
    return unpack_tokens(stored[TRAINING_TEXT].values.numpy().tobytes(), cfg.vocab_size)


def pack_training_text(rows: TrainingRows, run: Run) -> bytes:
    """Pack training text of at most COUNT_BYTES for the artifact; empty unless COUNTS asks for it.

    Only rank 0 does so. The time counts as training. Of the text the first tokens are considered,
    several times as many as can fit.
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
    """The documents of a text, the most useful first.

    One document in HOLDOUT_EVERY is held out. Each of its tokens that the longest repeat of the
    tokens before it predicts rightly is credited to the document that has the repeat. A document's
    worth is its credit per token; held-out documents get the average.
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
    """Pack the most useful documents of a training text, as many as `limit` bytes hold.

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
        # The most useful come last: of equal repeats the latest is the one that predicts.
        packed = pack_tokens(np.concatenate(documents[:kept][::-1]))
        if len(packed) <= limit:
            return packed
        bytes_per_token = 1.01 * max(bytes_per_token, len(packed) / ends[kept - 1])


# =================================================================================================
# N-gram tilt
# Long passages of a validation text occur twice. The logit of the token that followed the same
# context before, the hint, is raised. Hints come from earlier text alone, so that a distribution is
# fixed before its target is seen (parameter-golf #2135).
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class TiltSettings(Part):
    """When a repeat in the scored text raises a token's probability, and by how much."""

    title = "N-gram tilt"
    prefixes: ClassVar[tuple[str, ...]] = ("NGRAM_",)

    ngram_tilt: float = scoring_knob(
        0.0,
        (0.0, 20.0),
        "Add this to the logit of the token that followed the same context before; 0 turns it off.",
        absent=0.0,
        tries=(2.625,),
    )
    ngram_order: int = scoring_knob(
        16, (2, 16), "Take contexts of this many tokens minus one.", absent=16
    )
    ngram_threshold: float = scoring_knob(
        0.8,
        (0.0, 1.0),
        "Require that the token followed this fraction of the context's occurrences.",
        absent=0.8,
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """The tilt and the counts would both raise what repeats."""
        yield (
            cfg.ngram_tilt == 0 or cfg.counts == "off",
            "NGRAM_TILT and COUNTS both expect repeats: one of them must be off",
        )


# Factors in the hash of a context, oldest token first; the next factor is for the token after it.
HASH_FACTORS = (
    *(36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241),
    *(524309, 655373, 786433, 917521, 1048583, 1179653, 1310729, 1441801),
)
PAIR_FACTOR = 1000003


@dataclass(frozen=True)
class Hints:
    """For each target, the token that most often followed its context earlier: (N,) each."""

    tokens: np.ndarray  # int64; 0 where the context is new
    shares: np.ndarray  # float32: the share of the context's occurrences; 0 where it is new

    def gates(self, threshold: float) -> np.ndarray:
        """The targets whose hint is sure enough: bool (N,)."""
        return (self.shares > 0) & (self.shares >= np.float32(threshold))


def context_keys(targets: np.ndarray, order: int) -> np.ndarray:
    """Hashes of the order - 1 tokens before each target, for targets with that many: uint64.

    As published, the BOS before the first target is replaced by that target, so that target
    order - 2 is the first with enough tokens. The hash has about 37 bits: in streams of many
    million tokens contexts do collide, which makes hints worse but never non-causal.
    """
    length = order - 1
    stream = np.concatenate([targets[:1], targets]).astype(np.uint64)
    count = len(targets) - (length - 1)
    keys = np.zeros(max(count, 0), np.uint64)
    for place, factor in enumerate(HASH_FACTORS[:length]):
        keys ^= stream[place : place + len(keys)] * np.uint64(factor)
    return keys


def earlier_equals(keys: np.ndarray) -> np.ndarray:
    """For each element, how many earlier ones are equal to it: int64 (N,)."""
    order, is_new = grouped(keys)
    places = np.arange(len(keys))
    starts = np.maximum.accumulate(np.where(is_new, places, 0))
    earlier = np.empty(len(keys), np.int64)
    earlier[order] = places - starts
    return earlier


def grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order that puts equal keys side by side, earliest first, and where groups begin in it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_new = np.ones(len(keys), bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    return order, is_new


def find_hints(targets: np.ndarray, order: int = 16) -> Hints:
    """The hints for all targets (N,), which are the stream's token ids without its first BOS.

    They are equal to those of a sequential pass that, at each target, looks up the hint for its
    context and then counts the target. The hint is the token whose count was the last to exceed all
    others.
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

    by_context, is_new = grouped(keys)
    counts = counts[by_context]
    places = np.arange(len(keys))
    # Each group of equal contexts gets an offset above all counts of the groups before it, so that
    # one running maximum serves all groups.
    offsets = np.cumsum(is_new) * (len(keys) + 1)
    best = np.maximum.accumulate(counts + offsets)
    leads = np.ones(len(keys), bool)
    leads[1:] = best[1:] > best[:-1]
    leaders = np.maximum.accumulate(np.where(leads, places, 0))
    starts = np.maximum.accumulate(np.where(is_new, places, 0))
    # A target's hint is the state of its group after the target before it.
    repeated = np.flatnonzero(~is_new)
    before = repeated - 1
    hinted = by_context[repeated] + first
    hints[hinted] = followers[by_context[leaders[before]]]
    occurrences = repeated - starts[repeated]
    shares[hinted] = (best - offsets)[before] / occurrences
    return Hints(hints, shares)


def tilted_nats(
    nats: Tensor, hint_nats: Tensor, is_hint: Tensor, gates: Tensor, beta: float
) -> Tensor:
    """Nats of targets under the tilted distribution, given those of target and hint, any shape.

    p'(w) = p(w) exp(beta [w is the hint]) / (1 + p(hint) (exp(beta) - 1)) where `gates` is true.
    """
    growth = torch.expm1(torch.tensor(beta, dtype=torch.float64)).to(nats.dtype)
    log_normalizer = torch.log1p(torch.exp(-hint_nats) * growth)
    return torch.where(gates, nats - beta * is_hint + log_normalizer, nats)


def hints_in_order(val: Validation, order: np.ndarray | None, run: Run) -> np.ndarray | None:
    """The hint for each target, int64 (N,), -1 where none is sure enough; None without NGRAM_TILT.

    order: the targets (N,) in the order in which they are scored; None for the order of the text.
    No hint comes from what is scored later.
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
    model: GPT, batch: Batch, beta: float, row_deltas: RowDeltas | None = None
) -> tuple[Tensor, Tensor]:
    """Nats of the targets (B, T) to learn from, and those to score, with hints raised by beta."""
    hidden, input_ids = model.hidden_at_targets(batch, row_deltas=row_deltas)
    head = None if row_deltas is None else row_deltas.head
    logits = model.logits(hidden, input_ids, head).flatten(0, 1)
    targets = batch.target_ids.flatten()
    nats = F.cross_entropy(logits, targets, reduction="none")
    scores = nats.detach()
    if batch.hint_ids is not None:
        hints = batch.hint_ids.flatten()
        hint_nats = F.cross_entropy(logits.detach(), hints.clamp_min(0), reduction="none")
        scores = tilted_nats(scores, hint_nats, targets == hints, hints >= 0, beta)
    return nats.view_as(batch.target_ids), scores.view_as(batch.target_ids)


# =================================================================================================
# Evaluation
# Target n is token n + 1 of the text. A window is a stretch of text that the model reads; it scores
# its last targets. It is given by three numbers: its first target, the first target that it scores,
# and the end of both (exclusive). One loop scores any windows. Batches are formed before they are
# dealt to ranks, so the number of ranks never changes a score.
# =================================================================================================


MAX_BATCH_TOKENS = 1 << 23  # in a batch, whatever the header of a hostile artifact asks for


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Part):
    """Which windows of the validation text are scored."""

    title = "Evaluation"

    eval_seq_len: int = scoring_knob(2048, (2, 1 << 20), "Score windows of this many tokens.")
    eval_stride: int = scoring_knob(
        64, (0, 1 << 20), "Start windows this many targets apart; 0 lays windows side by side."
    )
    sliding: str = scoring_knob(
        "cover",
        ("cover", "published_s1", "published_s3"),
        "Score every target once (cover), or add a second score by a published system's windows.",
    )
    eval_batch_seqs: int = scoring_knob(32, (1, 1 << 16), "Score this many windows in a batch.")
    eval_truncate: bool = scoring_knob(
        False, (), "Leave out the targets after the last full window."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Windows leave no gap, and no artifact's header can ask for too large a batch."""
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
        "Adapt the model to text that is already scored: all weights to the whole text "
        "(score_first), or a low-rank change of its own to each document (lora). train_then_score "
        "trains before it scores, which gives no legal score.",
    )
    ttt_lr: float = scoring_knob(0.002, (0.0, 1.0), "Adapt by SGD at this peak learning rate.")
    ttt_momentum: float = scoring_knob(0.9, (0.0, 0.9999), "Adapt by SGD with this momentum.")
    ttt_epochs: int = scoring_knob(3, (1, 1000), "Pass over each scored chunk this many times.")
    ttt_chunk_tokens: int = scoring_knob(
        32768, (1, 1 << 30), "Adapt after each this many scored targets."
    )
    ttt_batch_seqs: int = scoring_knob(32, (1, 1 << 16), "Adapt on this many rows a step.")
    ttt_grad_clip: float = scoring_knob(
        1.0, (0.0, 1e6), "Clip the adaptation's gradient to this norm; 0 sets no bound."
    )
    ttt_freeze_blocks: int = scoring_knob(
        2, (0, 64), "Keep this many of the first blocks from adapting."
    )

    @staticmethod
    def checks(cfg: Config) -> Checks:
        """Adaptation needs sliding windows, some layers that learn, and a batch that fits."""
        if cfg.ttt_mode in ("off", "lora"):
            return
        yield cfg.eval_stride > 0, "TTT_MODE needs sliding windows: EVAL_STRIDE must be above 0"
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
    """TTT_MODE=lora: each document has low-rank deltas that learn from what is scored of it."""

    title = "Adaptation by document"
    prefixes: ClassVar[tuple[str, ...]] = ("LORA_",)

    lora_rank: int = scoring_knob(80, (1, 1024), "Give a delta B A this rank.", absent=80)
    lora_alpha: float = scoring_knob(
        144.0, (0.0, 1e6), "Multiply a delta by LORA_ALPHA / LORA_RANK.", absent=144.0
    )
    lora_places: str = scoring_knob(
        "q,k,v,o,mlp,head",
        (),
        "Add deltas at these places: in each layer q, k, v, o and mlp, and at the head.",
        absent="q,k,v,o,mlp,head",
        tries=("q,head",),
    )
    lora_lr: float = scoring_knob(
        1e-4, (0.0, 1.0), "Train deltas by AdamW at this rate.", absent=1e-4
    )
    lora_beta2: float = scoring_knob(
        0.99,
        (0.0, 0.99999),
        "Keep this fraction of AdamW's mean squared gradient at each step; beta 1 is 0.",
        absent=0.99,
    )
    lora_decay: float = scoring_knob(
        0.5, (0.0, 100.0), "Train deltas with this weight decay.", absent=0.5
    )
    lora_chunk_tokens: int = scoring_knob(
        48, (1, 1 << 20), "Train deltas after each chunk of this many targets.", absent=48
    )
    lora_short_chunks: str = scoring_knob(
        "",
        (),
        "Take shorter chunks for short documents: 256:8 means chunks of 8 targets in batches whose "
        "longest document has up to 256 (#2014).",
        absent="",
        tries=("256:8,2000:24",),
    )
    lora_batch_docs: int = scoring_knob(
        64, (1, 4096), "Score this many documents of similar length together.", absent=64
    )
    lora_lanes: int = scoring_knob(
        8,
        (1, 256),
        "Deal batches to this many lanes, whose deltas pass from batch to batch, and each lane to "
        "one rank.",
        absent=8,
    )
    lora_phases: int = scoring_knob(
        0, (0, 100), "Train all weights this many times on documents already scored.", absent=0
    )
    lora_phase_docs: int = scoring_knob(
        2500, (1, 1 << 30), "End LORA_PHASES once this many documents are scored.", absent=2500
    )
    lora_phase_lr: float = scoring_knob(
        1e-3, (0.0, 1.0), "Use this peak rate in LORA_PHASES, with TTT_MOMENTUM.", absent=1e-3
    )
    lora_phase_chunk_tokens: int = scoring_knob(
        32768, (2, 1 << 30), "Train on this many targets in a step of LORA_PHASES.", absent=32768
    )
    lora_phase_row_tokens: int = scoring_knob(
        0, (0, 1 << 20), "Use rows of this many tokens in LORA_PHASES; 0: EVAL_SEQ_LEN.", absent=0
    )

    @property
    def delta_names(self) -> tuple[str, ...]:
        """The names in LORA_PLACES; raises Refusal if they are not distinct ones of DELTA_NAMES."""
        names = tuple(name.strip() for name in self.lora_places.split(","))
        if len(set(names)) < len(names) or not set(names) <= set(DELTA_NAMES):
            raise Refusal(
                f"LORA_PLACES={self.lora_places!r}: expected distinct ones of "
                f"{', '.join(DELTA_NAMES)}"
            )
        return names

    @property
    def short_chunks(self) -> dict[int, int]:
        """LORA_SHORT_CHUNKS as {longest document of a batch: targets in a chunk}, ascending.

        Raises Refusal if it cannot be parsed.
        """
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
        assert cfg.delta_names  # raises Refusal if it cannot be parsed
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
STEP_PASSES = 4.0  # a step of learning, forward and backward, is taken to last this many forwards


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

    They start at 0, stride, 2 stride, ..., but the last one early enough to end with the text. The
    first window scores all its targets, each later one those that are not scored yet. With stride 0
    windows lie side by side instead, and the last may be short.
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
    """The windows `spans` (n, 3), padded to `size` rows, each with a strip of `width` targets.

    The strip has all targets that the window scores. Places, targets, their bytes and whether they
    are scored: (size, width). Places are None where the strip is the whole window. Padding scores
    nothing, and since attention is causal, no scored place sees it.
    """
    T = cfg.eval_seq_len
    last = val.num_targets(cfg) - 1
    padded = np.pad(spans, ((0, size - len(spans)), (0, 0)))
    start, first, end = np.split(padded, 3, axis=1)
    places = np.minimum(first - start, T - width) + np.arange(width)
    scored = (start + places >= first) & (start + places < end)
    inputs = np.minimum(start + np.arange(T), last)
    targets = np.minimum(start + places, last)
    batch = Batch(
        input_ids=ints(val.tokens[inputs]),
        target_ids=ints(val.tokens[targets + 1]),
        places=None if width == T else ints(places),
        scored=ints(scored),
        target_bytes=ints(val.target_bytes[targets]),
        hint_ids=None if hints is None else ints(hints[targets]),
    )
    return batch.by_document(T) if cfg.attn_docs else batch


def ints(numbers: np.ndarray) -> Tensor:
    """An array as a tensor of int64."""
    return torch.from_numpy(numbers.astype(np.int64))


def scored_sums(nats: Tensor, batch: Batch) -> Tensor:
    """Sums of nats, targets and bytes over what a batch scores, float64 (3,); nats: (B, S)."""
    assert batch.scored is not None and batch.target_bytes is not None
    addends = (nats.cpu().double(), batch.scored, batch.target_bytes)
    return torch.stack([(numbers * batch.scored).sum().double() for numbers in addends])


def in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Divide rows into batches of `size`; the last batch may be short."""
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
    """Sums of nats, targets and bytes over the windows `spans`: float64 (3,).

    Batches are added in a fixed order. hints: for each target of the text, see hints_in_order().
    """
    cfg = run.cfg
    batches = in_batches(strips_of(spans, width), cfg.eval_batch_seqs)
    sums = torch.zeros(len(batches), 3, dtype=torch.float64)
    for index in range(run.ranks.rank, len(batches), run.ranks.world_size):
        for rows in in_batches(batches[index], run.scored_rows):
            batch = window_batch(val, rows, run.scored_rows, width, cfg, hints)
            if hints is None:
                nats, _ = forward(model, batch.moved(run.to_device))
            else:
                _, nats = nats_and_scores(model, batch.moved(run.to_device), cfg.ngram_tilt)
            sums[index] += scored_sums(nats, batch)
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
    """Like score_windows(), but by the mixture of the model's distributions with those of counts.

    Each rank runs the model on one batch in a round. The mixture learns from what it has scored, so
    every rank gives it all batches, in the order of the text.
    """
    cfg, ranks = run.cfg, run.ranks
    batches = in_batches(strips_of(spans, width), cfg.eval_batch_seqs)
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(batches), ranks.world_size):
        round_of_batches = batches[first : first + ranks.world_size]
        own = None
        if ranks.rank < len(round_of_batches):
            own = log_probabilities(model, val, round_of_batches[ranks.rank], width, run)
        for owner, batch in enumerate(round_of_batches):
            targets = int((batch[:, 2] - batch[:, 1]).sum())
            log_probs = ranks.copy_of(own, owner, (targets, cfg.vocab_size))
            start = int(batch[0, 1])
            num_bytes = val.target_bytes[start : start + targets].sum(dtype=np.int64)
            with run.ledger.table_clock.running():
                nats = mixture.score(log_probs).sum()
            sums += torch.stack([nats, torch.tensor(targets), torch.tensor(num_bytes)]).double()
            bar.update()
    # The ranks' sums are equal unless their processors round differently; rank 0's are taken.
    return torch.tensor([ranks.agree(x) for x in sums.tolist()], dtype=torch.float64)


def log_probabilities(
    model: GPT, val: Validation, strips: np.ndarray, width: int, run: Run
) -> Tensor:
    """The model's log-probabilities for all targets that the strips score: float32 (n, V)."""
    rows = []
    for at_once in in_batches(strips, run.scored_rows):
        batch = window_batch(val, at_once, run.scored_rows, width, run.cfg).moved(run.to_device)
        assert batch.scored is not None
        hidden, input_ids = model.hidden_at_targets(batch)
        scored = batch.scored.bool()
        logits = model.logits(hidden[scored], input_ids[scored])
        rows.append(torch.log_softmax(logits, dim=-1).cpu())
    return torch.cat(rows)


def strips_of(spans: np.ndarray, width: int) -> np.ndarray:
    """Divide what each window scores into strips of at most `width` targets: windows (rows, 3).

    Logits are computed for `width` places of a window only, so a window that scores more, as the
    first one does, passes through the model once for each strip.
    """
    return np.array(
        [
            (start, strip, min(strip + width, end))
            for start, first, end in spans.tolist()
            for strip in range(first, end, width)
        ]
    )


class Learner(Protocol):
    """Learns from validation text; evaluate() shows it only text that has been scored."""

    chunk_targets: int  # how many targets are scored before it learns from them
    operations: int  # floating-point operations of its learning so far

    def learn_from(self, scored: ScoredChunk) -> None:
        """Learn from a chunk, all of whose targets have been scored."""


@dataclass(frozen=True)
class ScoredChunk:
    """Neighbouring targets that have just been scored, and how far the scoring is."""

    number: int  # the number of this chunk, counted from 0
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
    """Score the validation split in windows of EVAL_SEQ_LEN, `stride` targets apart; see windows().

    The loop makes a score legal: a chunk of targets is scored, and only then may a learner learn
    from it. Scores are by the model's distributions, as they are, tilted towards `hints` (see
    hints_in_order()), or mixed with those of counts. `spans`: other windows (n, 3) to score.
    """
    cfg = run.cfg
    started = time.perf_counter()
    num_targets = val.num_targets(cfg)
    if spans is None:
        spans = windows(num_targets, cfg.eval_seq_len, stride)
    chunk_targets = num_targets if learner is None else learner.chunk_targets
    chunk_of = spans[:, 1] // chunk_targets
    num_chunks = int(chunk_of[-1]) + 1
    sums = torch.zeros(3, dtype=torch.float64)
    num_batches = divide_up(len(spans), cfg.eval_batch_seqs)
    width = stride or cfg.eval_seq_len  # how many targets a window scores, the first one aside
    operations = scoring_operations(model, spans, width, all_places=mixture is None)
    with run.folder.progress(name, total=num_batches, unit="batch") as bar:
        for chunk in range(num_chunks):
            of_chunk = spans[chunk_of == chunk]
            # A window may score several chunks; it then belongs to the first of them.
            if len(of_chunk) > 0:
                if mixture is not None:
                    sums += score_mixed(mixture, model, val, of_chunk, width, run, bar)
                else:
                    sums += score_windows(forward, model, val, of_chunk, width, run, bar, hints)
            if learner is not None and chunk < num_chunks - 1:
                seconds = time.perf_counter() - started
                first, end = chunk * chunk_targets, (chunk + 1) * chunk_targets
                learner.learn_from(ScoredChunk(chunk, num_chunks, first, end, seconds))
    nats, targets, num_bytes = sums.tolist()
    if learner is not None:
        operations += learner.operations
    seconds = time.perf_counter() - started
    return EvalResult(name, nats, int(targets), int(num_bytes), seconds, operations)


class Adapter:
    """A Learner: test-time training by SGD on text that was scored, within the evaluation budget.

    After each chunk of TTT_CHUNK_TOKENS targets it passes TTT_EPOCHS times over them, at a rate
    that falls as a cosine over the chunks, unless the time is needed to score the rest.
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
        run.ledger.occasions["ttt"] = 0  # so that it is logged even if the split has one chunk

    def learn_from(self, scored: ScoredChunk) -> None:
        """Adapt to the chunk if the budget allows that and the scoring of the rest."""
        cfg, run = self.run.cfg, self.run
        run.ledger.occasions["ttt"] += 1
        if run.ranks.agree(float(self.seconds_needed(scored) > cfg.eval_wallclock_seconds)):
            return
        progress = scored.number / max(scored.num_chunks - 1, 1)
        lr = cfg.ttt_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        started = time.perf_counter()
        for _ in range(cfg.ttt_epochs):
            self.learn(scored.first, scored.end, lr, math.inf)
        run.wait_for_gpu()
        self.seconds += time.perf_counter() - started
        run.ledger.activity["ttt"] += 1

    def seconds_needed(self, scored: ScoredChunk) -> float:
        """Seconds of the budget if this chunk is learned and all is scored, with a margin."""
        seconds_to_score = (scored.seconds - self.seconds) / (scored.number + 1)  # a chunk
        seconds_to_learn = self.seconds / max(self.run.ledger.activity["ttt"], 1)
        to_come = 1.1 * seconds_to_score * scored.chunks_left + 1.5 * seconds_to_learn
        return self.run.ledger.scoring_clock.elapsed() + to_come

    def learn(self, first: int, end: int, lr: float, deadline: float) -> int:
        """Pass by SGD over the targets first to end - 1; returns the number of steps.

        No step begins after `deadline` seconds of the scoring clock.
        """
        cfg, run = self.run.cfg, self.run
        T = cfg.eval_seq_len
        rows = windows(min(end, self.val.num_targets(cfg)) - first, T, 0) + first
        self.optimizer.param_groups[0]["lr"] = lr
        batches = in_batches(rows, cfg.ttt_batch_seqs)
        for steps, batch in enumerate(batches):
            if run.ranks.agree(float(run.ledger.scoring_clock.elapsed() > deadline)):
                return steps
            self.operations += adaptation_operations(self.model, len(batch))
            own = batch[run.ranks.rank :: run.ranks.world_size]
            own_batch = window_batch(self.val, own, run.adaptation_rows, T, cfg)
            own_batch = own_batch.moved(run.to_device)
            assert own_batch.scored is not None
            nats, _ = self.forward(self.model, own_batch)
            num_targets = float((batch[:, 2] - batch[:, 1]).sum())
            ((nats * own_batch.scored).sum() / num_targets).backward()
            reduce_gradients(self.parameters, [], run)
            if cfg.ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(self.parameters, cfg.ttt_grad_clip)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
        return len(batches)


def frozen_parameters(model: GPT, cfg: Config) -> set[nn.Parameter]:
    """The parameters that stay as they are while the others adapt."""
    frozen = set(model.blocks[: cfg.ttt_freeze_blocks].parameters())
    if cfg.ttt_mode == "train_then_score":
        for module in (model.tok_emb, model.bigram, model.smear):
            if module is not None:
                frozen.update(module.parameters())
    return frozen


# Adaptation by document


def documents_of(val: Validation, cfg: Config) -> np.ndarray:
    """Documents as rows (first target, end of targets); the last target is the next one's BOS."""
    num_targets = val.num_targets(cfg)
    begins = np.flatnonzero(val.tokens[:num_targets] == BOS)
    firsts = np.union1d(begins, [0]).astype(np.int64)
    return np.stack([firsts, np.append(firsts[1:], num_targets)], axis=1)


def document_queue(val: Validation, cfg: Config) -> list[np.ndarray]:
    """Batches of documents of similar length, the longest documents first, ascending in a batch."""
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
    """A batch with the targets `at` to at + width - 1 of each document.

    A row begins with a window: up to EVAL_SEQ_LEN tokens of the document, which end before the last
    of these targets. The rest of the row is padding, which scores nothing, and which no scored
    place sees, since attention is causal.
    """
    first, end = np.split(documents, 2, axis=1)
    stop = np.minimum(first + at + width, end)
    start = np.maximum(stop - cfg.eval_seq_len, first)
    inputs = start + np.arange(int((stop - start).max()))
    targets = first + at + np.arange(width)
    scored = targets < stop
    targets = np.minimum(targets, stop - 1)
    return Batch(
        input_ids=ints(np.where(inputs < stop, val.tokens[np.minimum(inputs, stop - 1)], 0)),
        target_ids=ints(val.tokens[targets + 1]),
        places=ints(targets - start),
        scored=ints(scored),
        target_bytes=ints(val.target_bytes[targets]),
        hint_ids=None if hints is None else ints(hints[targets]),
    )


def wide_chunks(lengths: np.ndarray, at: int, run: Run) -> Iterator[tuple[slice, int, int]]:
    """Yield documents, first target and width of each forward that scores from `at` on.

    These chunks are wide because nothing is learned between them. lengths: of the documents in a
    batch, in targets, ascending.
    """
    T = run.cfg.eval_seq_len
    while at < lengths[-1]:
        width = T if at == 0 else divide_up(T, 2)
        for rows in in_batches(np.flatnonzero(lengths > at), run.scored_rows):
            yield slice(int(rows[0]), int(rows[-1]) + 1), at, width
        at += width


def wide_work(lengths: np.ndarray, at: int, run: Run) -> np.ndarray:
    """The numbers of forwards in wide_chunks(), and of places in their windows: float64 (2,)."""
    work = np.zeros(2)
    for rows, start, width in wide_chunks(lengths, at, run):
        window = min(run.cfg.eval_seq_len, start + width, int(lengths[rows][-1]))
        work += 1, len(lengths[rows]) * window
    return work


def delta_outputs(cfg: Config) -> dict[str, int]:
    """The width of the output to which the delta at each of LORA_PLACES is added."""
    kv_width = cfg.num_kv_heads * cfg.head_dim
    widths = {"k": kv_width, "v": kv_width, "head": cfg.vocab_size}
    return {name: widths.get(name, cfg.model_dim) for name in cfg.delta_names}


class DocumentDeltas:
    """Deltas (alpha / rank) B A for the documents of a batch, and the AdamW that trains them.

    A starts uniform in +-1 / sqrt(width) and B at zero, so that a document begins with the network
    as it is.
    """

    def __init__(
        self, cfg: Config, rows: int, depth: int, generator: torch.Generator, device: torch.device
    ) -> None:
        self.cfg = cfg
        self.rows = rows
        width, outputs = cfg.model_dim, delta_outputs(cfg)
        of_layers = [name for name in cfg.delta_names if name != "head"]

        def new_delta(name: str) -> Delta:
            """A random A and a B of zeros."""
            down = torch.rand(rows, cfg.lora_rank, width, generator=generator)
            down = (2.0 * down - 1.0) / math.sqrt(width)
            up = torch.zeros(rows, outputs[name], cfg.lora_rank)
            return down.to(device).requires_grad_(), up.to(device).requires_grad_()

        self.layers = [{name: new_delta(name) for name in of_layers} for _ in range(depth)]
        self.head = new_delta("head") if "head" in cfg.delta_names else None
        self.restart()

    def pairs(self) -> list[Delta]:
        """All deltas (A, B)."""
        of_layers = [delta for deltas in self.layers for delta in deltas.values()]
        return of_layers if self.head is None else [*of_layers, self.head]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin new documents: B becomes zero and AdamW's state empty, but A is kept."""
        for _, up in self.pairs():
            up.zero_()
        self.optimizer = torch.optim.AdamW(
            [matrix for delta in self.pairs() for matrix in delta],
            lr=self.cfg.lora_lr,
            betas=(0.0, self.cfg.lora_beta2),
            eps=1e-10,
            weight_decay=self.cfg.lora_decay,
        )

    def of_rows(self, rows: slice, dtype: torch.dtype) -> RowDeltas:
        """The scaled deltas of some of the batch's documents."""
        scale = self.cfg.lora_alpha / self.cfg.lora_rank

        def scaled_rows(delta: Delta) -> Delta:
            """The rows of one delta, scaled."""
            down, up = delta
            return down[rows].to(dtype), (scale * up[rows]).to(dtype)

        layers = [
            {name: scaled_rows(delta) for name, delta in deltas.items()} for deltas in self.layers
        ]
        return RowDeltas(tuple(layers), None if self.head is None else scaled_rows(self.head))

    def learn(self, loss: Tensor) -> None:
        """Take an AdamW step on the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class DocumentBudget:
    """Whether the evaluation budget allows one more step of learning and the scoring of the rest.

    The rest is counted as forwards, and places in them, in wide chunks without learning. What each
    costs is measured again and again, since a machine may slow down. Estimates tend to be too long,
    so that a budget that suffices for scoring without learning is kept.
    """

    MARGIN = 1.15  # the estimate of scoring the rest is multiplied by this
    # Costs are measured again after at least MEASURED_EACH of the budget, and after at least
    # MEASURED_AFTER times the seconds that measuring takes.
    MEASURED_EACH, MEASURED_AFTER = 0.05, 50

    def __init__(self, run: Run) -> None:
        self.run = run
        self.costs = np.zeros(2)  # seconds of a forward, and of a place in it, without deltas
        self.work_left = np.zeros(2)  # forwards and places of this rank's batches to come
        self.measure_at = 0.0  # seconds of the scoring clock
        # For the last steps: seconds of scoring a place with deltas, and of the whole step.
        self.recent: deque[tuple[float, float]] = deque(maxlen=8)

    def measure(self, forward: Callable[[int], int]) -> None:
        """Measure the costs: forward(n) scores n rows and returns the number of places in them.

        Each rank measures for itself, at any time: nothing here waits for another rank.
        """
        clock = self.run.ledger.scoring_clock
        began = clock.elapsed()
        one_row_seconds, _ = self.time_forward(forward, 1)
        seconds, places = self.time_forward(forward, self.run.scored_rows)
        self.costs[:] = one_row_seconds, seconds / places
        pause = self.MEASURED_EACH * self.run.cfg.eval_wallclock_seconds
        took = clock.elapsed() - began
        self.measure_at = clock.elapsed() + max(pause, self.MEASURED_AFTER * took)

    @staticmethod
    def time_forward(forward: Callable[[int], int], rows: int) -> tuple[float, int]:
        """Seconds of a second forward(rows), when all is warm, and the places in it."""
        forward(rows)
        start = time.perf_counter()
        places = forward(rows)
        return time.perf_counter() - start, places

    @property
    def wants_measuring(self) -> bool:
        """Whether it is time to measure the costs again."""
        return self.run.ledger.scoring_clock.elapsed() >= self.measure_at

    def note_step(self, places: int, scoring: float, learning: float) -> None:
        """Take in the seconds of a step: of scoring `places` with deltas, and of learning."""
        self.recent.append((scoring / places, scoring + learning))

    def is_short(self, work: np.ndarray | None = None, step_seconds: float = 0.0) -> bool:
        """Whether a step of learning, the rest of a batch, and all batches to come take too long.

        work: forwards and places in the rest of the batch, None if there is none. A step is taken
        to need at least `step_seconds`.
        """
        seconds = float(self.work_left @ self.costs)
        if work is not None:
            place_seconds = max((place for place, _ in self.recent), default=0.0)
            seconds += float(work @ np.maximum(self.costs, [0.0, place_seconds]))
        step_seconds = max([step_seconds, *(step for _, step in self.recent)])
        needed = step_seconds + self.MARGIN * seconds
        elapsed = self.run.ledger.scoring_clock.elapsed()
        return elapsed + needed > self.run.cfg.eval_wallclock_seconds


class DocumentScorer:
    """Scores documents, each with deltas of its own that learn from what is scored of it.

    Documents of similar length advance together. One forward scores a chunk of each, and unless the
    chunk is its document's last, the gradient of the same nats makes an AdamW step. When the rest
    of the budget is just enough to score what is left, scoring goes on in wide chunks, without
    learning. (parameter-golf #1855)
    """

    def __init__(
        self, forward: Forward, model: GPT, val: Validation, run: Run, hints: np.ndarray | None
    ) -> None:
        self.forward = forward
        self.model = model
        self.val = val
        self.run = run
        self.hints = hints
        self.phase = 0  # the number of LORA_PHASES that are over
        self.lanes: dict[int, DocumentDeltas] = {}
        self.generators: dict[int, torch.Generator] = {}  # by lane: they draw the deltas
        self.is_late = False  # whether the budget allows no more learning
        self.budget = DocumentBudget(run)
        self.operations = 0
        self.cut_short = 0  # the number of documents that were adapted to less than they could be
        run.ledger.occasions["ttt"] = 0

    def begin(self, queue: list[np.ndarray]) -> None:
        """Take in this rank's batches, and measure what scoring them without learning takes."""
        for documents in queue:
            self.budget.work_left += wide_work(documents[:, 1] - documents[:, 0], 0, self.run)
        if queue:
            self.measure(queue[0])
            self.is_late = self.budget.is_short()

    def measure(self, documents: np.ndarray) -> None:
        """Measure what scoring in wide chunks takes, on the longest of these documents."""
        cfg, run = self.run.cfg, self.run

        @torch.no_grad()
        def forward(rows: int) -> int:
            """Score the first window of `rows` documents; returns the number of its places."""
            width = cfg.eval_seq_len if rows > 1 else 1
            batch = chunk_batch(self.val, documents[-rows:], 0, width, cfg, None)
            batch = batch.moved(run.to_device)
            nats_and_scores(self.model, batch, 0.0)[1].sum().item()
            return batch.input_ids.numel()

        self.budget.measure(forward)

    def deltas_for(self, lane: int, rows: int) -> DocumentDeltas:
        """The lane's deltas for a new batch, restarted if its last batch had as many rows."""
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
        """Score a batch of documents in ascending length: sums of nats, targets and bytes (3,)."""
        cfg = self.run.cfg
        lengths = documents[:, 1] - documents[:, 0]
        longest = int(lengths[-1])
        fitting = [chunk for most, chunk in cfg.short_chunks.items() if longest <= most]
        chunk = fitting[0] if fitting else cfg.lora_chunk_tokens
        self.run.ledger.occasions["ttt"] += (longest - 1) // chunk
        if self.budget.wants_measuring and not self.is_late:
            self.measure(documents)
        self.budget.work_left -= wide_work(lengths, 0, self.run)
        sums = torch.zeros(3, dtype=torch.float64)
        deltas = None if self.is_late else self.deltas_for(lane, len(documents))
        at = 0
        while deltas is not None and at < longest and not self.is_late:
            first = int((lengths <= at).sum())
            sums += self.score_and_learn(documents, first, at, chunk, deltas)
            at += chunk
        if at < longest:
            self.cut_short += int((lengths > max(at, chunk)).sum())
        for rows, start, width in wide_chunks(lengths, at, self.run):
            sums += self.score_chunk(documents[rows], start, width, deltas, rows)[0]
        return sums

    def score_chunk(
        self,
        documents: np.ndarray,
        at: int,
        width: int,
        deltas: DocumentDeltas | None,
        rows: slice,
        learns: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Sums of nats, targets and bytes (3,) over a chunk of each document; and its nats (n, S).

        The nats have a gradient if the deltas shall learn. rows: which documents of the batch these
        are, to which the deltas belong.
        """
        cfg, run = self.run.cfg, self.run
        batch = chunk_batch(self.val, documents, at, width, cfg, self.hints)
        with torch.set_grad_enabled(learns):
            row_deltas = None if deltas is None else deltas.of_rows(rows, self.model.dtype)
            nats, scores = nats_and_scores(
                self.model, batch.moved(run.to_device), cfg.ngram_tilt, row_deltas
            )
        depth = 0 if row_deltas is None else len(row_deltas.layers)
        self.operations += chunk_operations(self.model, batch, depth, learns)
        return scored_sums(scores, batch), nats

    def score_and_learn(
        self, documents: np.ndarray, first: int, at: int, chunk: int, deltas: DocumentDeltas
    ) -> Tensor:
        """Score a chunk of the documents from `first` on: sums of nats, targets and bytes (3,).

        Then the deltas of documents that go on learn from it; its score is final by then.
        """
        run = self.run
        rows = slice(first, len(documents))
        documents = documents[first:]
        lengths = documents[:, 1] - documents[:, 0]
        goes_on = torch.from_numpy(lengths > at + chunk)
        learns = bool(goes_on.any())
        began = time.perf_counter()
        sums, nats = self.score_chunk(documents, at, chunk, deltas, rows, learns)
        scoring_seconds = time.perf_counter() - began
        rest = wide_work(lengths, at + chunk, run)
        self.is_late = self.budget.is_short(rest, STEP_PASSES * scoring_seconds)
        if learns and not self.is_late:
            deltas.learn((nats * run.to_device(goes_on)[:, None]).sum() / chunk)
            run.wait_for_gpu()
            learning_seconds = time.perf_counter() - began - scoring_seconds
            places = len(documents) * min(at + chunk, run.cfg.eval_seq_len)
            self.budget.note_step(places, scoring_seconds, learning_seconds)
            run.ledger.activity["ttt"] += 1
        return sums

    def learn_together(self, documents: np.ndarray) -> None:
        """Train all weights by SGD on documents that have been scored, as one of LORA_PHASES.

        Their tokens are joined and cut into chunks, and the last chunk, which may be short, is left
        out. Each chunk is a step, at a rate that falls as a cosine. Documents after this begin with
        new deltas. (phased global SGD, parameter-golf #1855)
        """
        cfg, run, model = self.run.cfg, self.run, self.model
        texts = [self.val.tokens[first : end + 1] for first, end in documents]
        tokens = torch.from_numpy(np.concatenate(texts).astype(np.int64))
        chunk, T = cfg.lora_phase_chunk_tokens, cfg.phase_row_tokens
        steps = divide_up(len(tokens) - 1, chunk) - 1
        num_targets = chunk - chunk % T  # whole rows of a chunk
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=cfg.lora_phase_lr, momentum=cfg.ttt_momentum)
        run.ledger.occasions["ttt_phases"] += steps
        # Until a step is measured, its seconds are estimated from those of a place in a forward.
        place_seconds = float(self.budget.costs[1])
        seconds = STEP_PASSES * num_targets * place_seconds / run.ranks.world_size
        for step in range(steps):
            is_short = self.budget.is_short(step_seconds=seconds)
            if run.ranks.any_of(self.is_late or is_short):
                break
            began = time.perf_counter()
            rate = cfg.lora_phase_lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
            ids = tokens[step * chunk : step * chunk + num_targets + 1]
            own = slice(run.ranks.rank, None, run.ranks.world_size)
            inputs = ids[:-1].view(-1, T)[own]
            targets = ids[1:].view(-1, T)[own]
            self.add_gradients(inputs, targets, num_targets)
            reduce_gradients(parameters, [], run)
            if cfg.ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, cfg.ttt_grad_clip)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            run.wait_for_gpu()
            seconds = time.perf_counter() - began
            # A backward pass counts as two forward passes.
            forward_operations = hidden_operations(model, T) + head_operations(model)
            self.operations += 3 * inputs.numel() * forward_operations
            run.ledger.activity["ttt_phases"] += 1
        self.phase += 1
        self.lanes.clear()
        self.generators.clear()

    def add_gradients(self, inputs: Tensor, targets: Tensor, num_targets: int) -> None:
        """Add the gradient of sum(nats) / num_targets over this rank's rows (n, T), if it has any.

        num_targets: how many targets all ranks have together.
        """
        cfg, run = self.run.cfg, self.run
        if len(inputs) == 0:
            return
        rows = max(1, run.scored_rows * cfg.eval_seq_len // cfg.phase_row_tokens)
        for some_inputs, some_targets in zip(inputs.split(rows), targets.split(rows), strict=True):
            batch = Batch(some_inputs, some_targets)
            if cfg.attn_docs:
                batch = batch.by_document(cfg.eval_seq_len)
            nats, _ = self.forward(self.model, batch.moved(run.to_device))
            (nats.sum() / num_targets).backward()


@contextlib.contextmanager
def frozen_weights(model: GPT, row_length: int) -> Iterator[None]:
    """Inside the block the weights have no gradients, and every input is the start of a row.

    row_length: the tokens of that row, which set the rotary base.
    """
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
    """Score the validation split document by document, with deltas that adapt to each document.

    Batches go to LORA_LANES lanes in the order of the queue, and each lane to one rank, so that the
    deltas with which a document begins do not depend on the number of ranks. With NGRAM_TILT, no
    hint comes from a document that is scored later.
    """
    cfg, ranks = run.cfg, run.ranks
    started = time.perf_counter()
    queue = document_queue(val, cfg)
    order = np.concatenate([np.arange(first, end) for batch in queue for first, end in batch])
    scorer = DocumentScorer(forward, model, val, run, hints_in_order(val, order, run))
    if cfg.lora_phases:
        run.ledger.occasions["ttt_phases"] = 0
    lanes, num_documents = cfg.lora_lanes, sum(map(len, queue))
    lengths = [int((batch[:, 1] - batch[:, 0]).sum()) for batch in queue]
    own = [n for n in range(len(queue)) if n % lanes % ranks.world_size == ranks.rank]
    last = min(cfg.lora_phase_docs, num_documents)
    # For each phase, the number of scored documents after which it comes, and from which it learns.
    phases = [last * (n + 1) // cfg.lora_phases for n in range(cfg.lora_phases)]
    sums = torch.zeros(len(queue), 3, dtype=torch.float64)
    with frozen_weights(model, cfg.eval_seq_len):
        scorer.begin([queue[n] for n in own])
    scorer.is_late = ranks.any_of(scorer.is_late)
    with run.folder.progress(name, total=len(order), unit="target") as bar:
        for first in range(0, len(queue), lanes):
            end = min(first + lanes, len(queue))
            with frozen_weights(model, cfg.eval_seq_len):
                for number in range(first, end):
                    if number in own:
                        sums[number] = scorer.score(queue[number], number - first)
            scorer.is_late = ranks.any_of(scorer.is_late)
            bar.update(sum(lengths[first:end]))
            scored = np.concatenate(queue[:end][::-1])  # ascending in length
            if phases and len(scored) >= phases[0] and end < len(queue):
                scorer.learn_together(scored[: phases.pop(0)])
    counts = torch.tensor([scorer.cut_short, scorer.operations], dtype=torch.float64)
    ranks.add_up([sums, counts])
    cut_short, operations = map(int, counts.tolist())
    if cut_short:
        run.folder.log(
            f"warning: {cut_short} of {num_documents} documents were adapted to less than "
            f"TTT_MODE=lora asks, to keep EVAL_WALLCLOCK_SECONDS={cfg.eval_wallclock_seconds:g}"
        )
    nats, targets, num_bytes = sums.sum(0).tolist()
    seconds = time.perf_counter() - started
    return EvalResult(name, nats, int(targets), int(num_bytes), seconds, operations)


def report(label: str, result: EvalResult, run: Run, step: int = 0, legal: bool = True) -> None:
    """Log a score under the name of what was scored; raises FloatingPointError if not finite."""
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
    """Scores the model rebuilt from an artifact in several ways, and logs each score.

    The settings of `run` are those of the artifact.
    """

    def __init__(
        self, stored: dict[str, Stored], val: Validation, forward: Forward, run: Run
    ) -> None:
        self.stored = stored
        self.val = val
        self.forward = forward
        self.run = run.with_settings(run.cfg.for_scoring())
        self.model = rebuild_model(run.cfg, stored, run)
        if self.run.cfg.token_mask != "0":
            mask_tokens(self.model, val, run.device)
        self.grid = grid_label(self.model, stored)
        self.results: list[EvalResult] = []

    def keep(self, result: EvalResult, label: str, legal: bool = True) -> EvalResult:
        """Log a score under this label and add it to the results; returns it."""
        report(label, result, self.run, legal=legal)
        self.results.append(result)
        return result

    def score(self, name: str, label: str, *, legal: bool = True, **how: Any) -> EvalResult:
        """Evaluate in windows, log the score and keep it; `how` are arguments of evaluate()."""
        result = evaluate(name, self.forward, self.model, self.val, self.run, **how)
        return self.keep(result, label, legal)

    def in_chunks(self, **how: Any) -> EvalResult:
        """The score in windows side by side."""
        return self.score("artifact_chunked", f"final_{self.grid}_roundtrip_exact", **how)

    def diagnostics(self) -> None:
        """Scores besides the headline: in chunks, in published windows, without each addition."""
        cfg, grid, stride = self.run.cfg, self.grid, self.run.cfg.eval_stride
        if stride > 0 or cfg.ttt_mode == "lora":  # otherwise the score in chunks is the headline
            self.in_chunks()
        if stride == 0:
            return
        if cfg.sliding != "cover":
            num_targets = self.val.num_targets(cfg)
            spans = published_windows(num_targets, cfg.eval_seq_len, stride, cfg.sliding)
            name = cfg.sliding
            self.score(f"artifact_{name}", f"final_{grid}_{name}", stride=stride, spans=spans)
        without = {
            "no_ttt": cfg.ttt_mode in ("score_first", "lora"),
            "no_counts": cfg.counts != "off",
            "no_tilt": cfg.ngram_tilt > 0 and cfg.ttt_mode != "lora",
        }
        for name, differs in without.items():
            if differs:
                self.score(f"artifact_sliding_{name}", f"final_{grid}_{name}", stride=stride)

    def headline(self) -> EvalResult:
        """The score by which runs are compared, with everything that the settings ask for."""
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
        label = f"final_{self.grid}_sliding_window_exact"
        if cfg.ttt_mode == "score_first":
            learner = Adapter(self.forward, self.model, val, run)
            label = "legal_ttt_exact"
        result = self.score(
            "artifact_sliding",
            label,
            stride=cfg.eval_stride,
            mixture=mixture,
            learner=learner,
            hints=hints,
        )
        if mixture is not None:
            self.run.folder.log(
                "counts:mixed largest_sum_error:{sum_error:.1e}",
                "counts_mixed",
                sum_error=mixture.largest_sum_error,
            )
        return result

    def after_training_on_it(self, scoring_seconds: float) -> None:
        """A score that is not legal: the model has trained on the text that it predicts."""
        train_then_score(Adapter(self.forward, self.model, self.val, self.run), scoring_seconds)
        name = "artifact_sliding_train_then_score"
        self.score(name, "illegal_ttt", stride=self.run.cfg.eval_stride, legal=False)


def score_artifact(
    stored: dict[str, Stored], val: Validation, forward: Forward, run: Run, diagnostics: bool
) -> list[EvalResult]:
    """Score an artifact's model; the last result is the headline.

    Only the headline's time counts against EVAL_WALLCLOCK_SECONDS. diagnostics: whether to compute
    the other scores too.
    """
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
    return [*(result for result in scores.results if result is not headline), headline]


def make_mixture(stored: dict[str, Stored], val: Validation, run: Run) -> Mixture | None:
    """The mixture of the network with the counts that COUNTS asks for; None if it is off."""
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
    """Log how long scoring should take at the measured speed; warn if that is over its budget."""
    cfg, budget = run.cfg, run.cfg.eval_wallclock_seconds
    num_windows = len(windows(val.num_targets(cfg), cfg.eval_seq_len, cfg.eval_stride))
    seconds = batch_seconds * math.ceil(num_windows / (cfg.eval_batch_seqs * run.ranks.world_size))
    run.folder.log(f"scoring expected:{seconds:.0f}s budget:{budget:.0f}s")
    if seconds > budget:
        run.folder.log(
            "warning: scoring will take longer than EVAL_WALLCLOCK_SECONDS; it runs to the end, "
            "but the run will not be eligible as a record"
        )


# =================================================================================================
# Sampling
# Text drawn token by token from an artifact's model, through the same forward that is trained and
# scored. The attention kernel caches the keys and values of earlier positions.
# =================================================================================================


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Part):
    """How --sample draws text; with the same SEED it draws the same."""

    title = "Sampling"
    prefixes: ClassVar[tuple[str, ...]] = ("SAMPLE_",)

    sample_tokens: int = run_knob(256, (1, 1 << 20), "Draw up to this many tokens.")
    sample_temperature: float = run_knob(
        0.8, (0.0, 100.0), "Divide logits by this; 0 always takes the most probable token."
    )
    sample_top_p: float = run_knob(
        0.95, (0.0, 1.0), "Draw from the most probable tokens, of this total probability."
    )


# On how many earlier tokens the first layer's input at a position depends: SmearGate mixes in the
# embedding of the token before, and the BigramHash of that one reads one more.
LOOKS_BACK = 2


class CachedAttention:
    """A causal attention kernel that caches the keys and values of a row's earlier positions.

    All layers call it, in the same order in every forward, so that the number of a call tells which
    layer's keys and values to take. Only the last `new` positions of a forward are new; at the
    others the output is 0, which nothing reads.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys and values (1, t, G, K), by call
        self.calls = 0  # the number of calls in this forward
        self.new = 0  # the number of new positions in this forward

    def begin(self, new: int, forget: bool = False) -> None:
        """Start a forward with `new` new positions; `forget` the cache if a new row begins."""
        self.calls = 0
        self.new = new
        if forget:
            self.kept = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, T, H, K), k and v (1, T, G, K) -> (1, T, H, K)."""
        call = self.calls
        self.calls += 1
        if call == len(self.kept):  # the first forward of a row
            self.kept.append((k, v))
            return sdpa_attention(q, k, v)
        earlier_k, earlier_v = self.kept[call]
        keys = torch.cat([earlier_k, k[:, -self.new :]], dim=1)
        values = torch.cat([earlier_v, v[:, -self.new :]], dim=1)
        self.kept[call] = keys, values
        groups = q.size(2) // k.size(2)
        query = q[:, -self.new :].transpose(1, 2)
        keys, values = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in (keys, values))
        # A single new position may attend to all that is cached, so it needs no mask.
        y = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)
        return torch.cat([torch.zeros_like(q[:, : -self.new]), y], dim=1)


@torch.no_grad()
def draw_tokens(
    model: GPT, cache: CachedAttention, ids: list[int], cfg: Config, device: torch.device
) -> Iterator[int]:
    """Yield up to SAMPLE_TOKENS tokens that the model draws after `ids`; a BOS ends the text early.

    The model reads fewer than EVAL_SEQ_LEN tokens: when a row is full, its second half begins the
    next row.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    T = cfg.eval_seq_len
    row = ids[-(T - 1) :]
    is_new_row = True  # whether nothing of the row is cached
    for _ in range(cfg.sample_tokens):
        inputs = row if is_new_row else row[-1 - LOOKS_BACK :]
        cache.begin(new=len(row) if is_new_row else 1, forget=is_new_row)
        model.row_place = (len(row) - len(inputs), T)
        input_ids = torch.tensor([inputs], device=device)
        last = model.hidden(input_ids)[:, -1:]
        logits = model.logits(last, input_ids[:, -1:])[0, 0].cpu()
        token = draw(logits, cfg.sample_temperature, cfg.sample_top_p, generator)
        if token == BOS:
            return
        yield token
        is_new_row = len(row) == T - 1
        row = [*row[T // 2 :], token] if is_new_row else [*row, token]


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from logits (V,): from the most probable ones, of total probability `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probs, tokens = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    is_beyond = probs.cumsum(0) - probs >= top_p
    is_beyond[0] = False
    probs = probs.masked_fill(is_beyond, 0.0)
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])


def stream_text(
    tokenizer: sentencepiece.SentencePieceProcessor, prompt: list[int], drawn: Iterator[int]
) -> None:
    """Write the prompt, and then the drawn tokens as soon as they complete characters."""
    ids = list(prompt)
    text = decode_text(tokenizer, ids)
    write_text(text)
    for token in drawn:
        ids.append(token)
        longer = decode_text(tokenizer, ids)
        if longer.endswith("\ufffd"):  # a character whose last bytes are still to come
            continue
        write_text(longer[len(text) :])
        text = longer
    write_text("\n")


def write_text(text: str) -> None:
    """Write text to stdout at once; what stdout cannot encode becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


# =================================================================================================
# Faster on a CPU
# Functions with hand-written derivatives that take fewer passes over memory than torch's on a CPU.
# Each names the plain expression that it replaces; on a GPU the compiler fuses that expression.
# =================================================================================================


class RmsNorm(torch.autograd.Function):
    """rms_norm in half the passes over memory that torch's separate operations take on a CPU."""

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


class HeadsAttention(torch.autograd.Function):
    """What Attention does between its projections, on a CPU, with few passes over memory.

    A head's query x becomes z = R x / rms(x), where R is the rotation, and then q = gain z /
    sqrt(K). Keys do so without gain and 1 / sqrt(K). P = softmax(q k^T) over the places up to the
    query's own, o = P v, and if attention is exclusive, y = o - a v with a = o.v / v.v. It replaces
    rotate(), sdpa_attention() and exclude_own_value(). Channels that rotate as a pair are
    neighbours here, and form one complex number.

    Queries are processed in blocks, each with the keys up to the block's end. P is kept for the
    backward pass, so that memory grows with T^2: LONGEST bounds T.
    """

    QUERIES, LONGEST = 64, 512  # places in a block, and in a row

    @staticmethod
    def takes(x: Tensor, K: int, kernel: AttentionKernel) -> bool:
        """Whether this replaces `kernel` for a layer's inputs x (B, T, D) and heads of width K."""
        if not trains_on_cpu(x) or kernel is not sdpa_attention:
            return False
        return K % 2 == 0 and x.size(1) <= HeadsAttention.LONGEST

    @staticmethod
    def forward(
        ctx,
        qk: Tensor,
        v: Tensor,
        gains: Tensor,
        cos: Tensor,
        sin: Tensor,
        exclusive: bool,
        product_dtype: torch.dtype,
    ) -> Tensor:
        """Queries and keys qk (B, T, H + G, K), v (B, T, G, K), gains (H,) -> (B, T, H, K).

        cos, sin: from rotary_tables(). The channels of qk are in the order of pairs_together().
        Matrices are multiplied, and P is kept, in `product_dtype`.
        """
        B, T, G, K = v.shape
        H = len(gains)
        pairs = cos.size(-1) // 2
        turns = torch.complex(cos[:, :pairs], -sin[:, :pairs])
        turns = F.pad(turns, (0, K // 2 - pairs), value=1.0).unsqueeze(1)
        norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
        r = torch.rsqrt(norm.square() / K + RMS_EPS)
        z = times_complex(qk * r, turns)
        scales = torch.cat([gains / math.sqrt(K), gains.new_ones(G)]).unsqueeze(1)
        q = by_key_head(z[:, :, :H] * scales[:H], G, product_dtype)
        k = by_key_head(z[:, :, H:], G, product_dtype)
        values = by_key_head(v, G, product_dtype)
        o = torch.empty_like(q)
        probabilities = []  # P of each block
        mask = q.new_full((HeadsAttention.QUERIES,) * 2, -math.inf).triu(1)
        mask = mask.repeat_interleave(H // G, dim=0)
        for first, last, rows in query_blocks(T, H // G):
            logits = q[:, rows] @ k[:, :last].mT
            size = last - first
            logits[:, :, first:] += mask[: len(logits[0]), :size]
            P = torch.softmax(logits, -1)
            torch.bmm(P, values[:, :last], out=o[:, rows])
            probabilities.append(P)
        y = by_place(o, G, T).to(v.dtype)
        own, square, along = v, y.new_zeros(()), y.new_zeros(())
        if exclusive:
            own = v.repeat_interleave(H // G, dim=2)
            square = torch.linalg.vector_norm(own, dim=-1, keepdim=True).clamp_min(1e-12).square()
            along = (y * own).sum(-1, keepdim=True) / square
            y.addcmul_(along, own, value=-1)
        of_exclusion = (own, square, along)
        ctx.save_for_backward(z, r, scales, q, k, values, y, turns, *of_exclusion, *probabilities)
        ctx.exclusive = exclusive
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries and keys, of values, and of gains; the other inputs have none.

        With g the gradient of y, that of o is f = g - b v, b = g.v / v.v, and that of v is the one
        from P v minus (b y + a f). With d that of z, that of x is R^T (d - z mean(d z)) / rms(x).
        """
        z, r, scales, q, k, values, y, turns, own, square, along, *probabilities = ctx.saved_tensors
        T, H, K = y.shape[1:]
        G = z.size(2) - H
        of_own = None
        if ctx.exclusive:
            part = (grad * own).sum(-1, keepdim=True) / square
            grad = torch.addcmul(grad, part, own, value=-1)
            of_own = torch.addcmul(part * y, along, grad).unflatten(2, (G, -1)).sum(3)
        g, of_q = by_key_head(grad, G, q.dtype), torch.empty_like(q)
        of_k, of_v = (torch.zeros(k.shape, dtype=grad.dtype) for _ in range(2))
        for (_, last, rows), P in zip(query_blocks(T, H // G), probabilities, strict=True):
            of_v[:, :last] += P.mT @ g[:, rows]
            of_P = g[:, rows] @ values[:, :last].mT
            of_logits = torch._softmax_backward_data(of_P, P, -1, P.dtype)
            torch.bmm(of_logits, k[:, :last], out=of_q[:, rows])
            of_k[:, :last] += of_logits.mT @ q[:, rows]
        d = torch.cat([by_place(of_q, G, T).to(z.dtype), by_place(of_k, G, T)], dim=2)
        dots = (d * z).sum(-1, keepdim=True)
        of_gains = dots[:, :, :H].sum((0, 1, 3)) / math.sqrt(K)
        d = torch.addcmul(d, dots / K, z, value=-1).mul_(scales * r)
        of_values = by_place(of_v, G, T)
        if of_own is not None:
            of_values = of_values - of_own
        return times_complex(d, turns.conj()), of_values, of_gains, *[None] * 4


def query_blocks(T: int, queries: int) -> Iterator[tuple[int, int, slice]]:
    """Yield blocks of places: the first, the last plus 1, and the rows of their queries.

    queries: how many query heads share a key head, and so how many rows a place has.
    """
    for first in range(0, T, HeadsAttention.QUERIES):
        last = min(first + HeadsAttention.QUERIES, T)
        yield first, last, slice(first * queries, last * queries)


def by_key_head(x: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, K) -> (B G, T H/G, K): the heads of a key head side by side, place by place."""
    return x.to(dtype).unflatten(2, (G, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def by_place(x: Tensor, G: int, T: int) -> Tensor:
    """Undo by_key_head(): (B G, T H/G, K) -> (B, T, H, K)."""
    return x.unflatten(1, (T, -1)).unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)


@functools.cache
def pairs_together(R: int, K: int) -> Tensor:
    """The order of a head's K channels in which those that rotate() pairs are neighbours."""
    rotated = torch.arange(R).view(2, -1).t().flatten()
    return torch.cat([rotated, torch.arange(R, K)])


def times_complex(x: Tensor, factors: Tensor) -> Tensor:
    """Real pairs (B, T, N, K) times complex factors (T, 1, K / 2): (B, T, N, K)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2)


class SquaredLeaky(torch.autograd.Function):
    """leaky_relu(u)^2 in fewer passes on a CPU; it keeps one tensor for the backward pass."""

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
    """Nats of the targets under softcapped logits, and their weights in the loss.

    For the backward pass it keeps one matrix (B*T, V): the derivative of each target's nats by its
    row of logits before the softcap, computed while the row is in the processor's cache. The
    gradient of the nats, which is known only in the backward pass, then multiplies rows of width D
    instead of V.
    """

    ROWS = 128  # rows of logits at a time

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
        product_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What GPT.forward() returns, for hidden (B, T, D), head (V, D), targets and inputs (B, T).

        penalty: the token mask (V, V), or None without it.
        prefixes: from prefix_targets(), second targets (B, T) and their weights (B, T).
        product_dtype: in which the backward pass multiplies; logits have the type of hidden.
        """
        shape = targets.shape
        hidden = hidden.flatten(0, 1)
        tanh_buffer = hidden.new_empty(HeadNats.ROWS, len(head))
        derivative = torch.empty(len(hidden), len(head), dtype=product_dtype or hidden.dtype)
        nats, weights, one = [], [], hidden.new_ones(())
        columns = [hidden, targets.reshape(-1, 1), input_ids.flatten(), derivative]
        columns += [column.reshape(-1, 1) for column in prefixes or ()]
        blocks = zip(*(column.split(HeadNats.ROWS) for column in columns), strict=True)
        for rows, target, previous, row_derivative, *second in blocks:
            tanh = tanh_buffer[: len(rows)]  # tanh(z / cap)
            torch.addmm(tanh, rows, head.t(), beta=0, alpha=1 / cap, out=tanh).tanh_()
            logits = cap * tanh
            if penalty is not None:
                logits += penalty.index_select(0, previous)
            weights.append(mile_weights(logits, gamma, clamp_min))
            row_nats, by_logits = nats_and_derivative(
                logits, target, second, cap, penalty is not None
            )
            nats.append(row_nats)
            slope = torch.addcmul(one, tanh, tanh, value=-1, out=tanh)  # of the softcap
            torch.mul(slope, by_logits, out=row_derivative)
        ctx.save_for_backward(hidden, head, derivative)
        loss_weights = torch.cat(weights).view(shape)
        ctx.mark_non_differentiable(loss_weights)
        return torch.cat(nats).view(shape), loss_weights

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and head; the other inputs have none."""
        hidden, head, derivative = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, 1)
        of_hidden = (grad * (derivative @ head.to(derivative.dtype))).view(*shape, -1)
        of_head = derivative.t() @ (grad * hidden).to(derivative.dtype)
        return of_hidden, of_head.to(head.dtype), *[None] * 8


def nats_and_derivative(
    logits: Tensor, targets: Tensor, prefixes: Sequence[Tensor], cap: float, masked: bool
) -> tuple[Tensor, Tensor]:
    """Nats of targets (n, 1), and their derivative by the logits (n, V), which it may overwrite.

    prefixes: second targets (n, 1) and their weights (n, 1), whose nats are added; or empty.
    """
    if prefixes:
        prefix, weight = prefixes
        # By how many nats the prefix is less likely than the target.
        difference = logits.gather(1, targets) - logits.gather(1, prefix)
    nats, derivative = nats_and_probs(logits, targets, cap, masked)
    if prefixes:
        nats = nats + weight * (nats + difference)
        derivative.mul_(1.0 + weight).scatter_add_(1, prefix, -weight)
    # The derivative of a target's nats is p, minus 1 at the target.
    return nats, derivative.scatter_add_(1, targets, derivative.new_full(targets.shape, -1.0))


LOG2_E = math.log2(math.e)


def nats_and_probs(
    logits: Tensor, targets: Tensor, cap: float, masked: bool
) -> tuple[Tensor, Tensor]:
    """Nats of the targets (n, 1), and the softmax of the logits (n, V), which it may overwrite."""
    if cap <= 30 and not masked:  # then no probability is too small for float32
        probs = torch.softmax(logits, -1)
        return -probs.gather(1, targets).log(), probs
    if masked:
        log_probs = torch.log_softmax(logits, -1)
        nats = -log_probs.gather(1, targets)
        # On a CPU exp() takes ten times as long where its result is 0; exp2() does not.
        return nats, log_probs.mul_(LOG2_E).exp2_()
    total = logits.logsumexp(-1, keepdim=True)
    nats = total - logits.gather(1, targets)
    return nats, logits.sub_(total).exp_()


# =================================================================================================
# Published variants
# What only the reproduction of a published system needs, and names that its command lines use.
# Nothing here is recommended; a reader of the main path may skip the section.
# =================================================================================================


def gptq_simple(W: Tensor, H: Tensor, bits: int, cfg: Config, sigmas: float = 0.0) -> Stored:
    """The GPTQ of parameter-golf #1361; arguments as in gptq().

    It never updates the inverse of H, and so corrects too much. It rounds by scales that are not
    fp16 yet, and chooses the clip by the error of rounding to nearest.
    """
    top = largest_integer(bits)
    U = inverse_factor(H)
    inverse = U.mT @ U
    scales = clip_candidates(W, bits, cfg, sigmas)
    scale = scales.unsqueeze(-1)
    tops = torch.full((W.size(1),), float(top))
    Q = round_columns(W, scale, inverse / inverse.diagonal()[:, None], tops, cfg)
    error = W - round_to_grid(W, scale, top) * scale
    return pick_clip(error.square().mean(dim=2), Q, scales.half(), cfg)


def published_windows(num_targets: int, seq_len: int, stride: int, form: str) -> np.ndarray:
    """Windows of published systems, as rows like those of windows(): int64 (windows, 3).

    published_s1 begins a window every `stride` targets up to the end, so the last ones are short;
    published_s3 has full windows only. The first window scores all its targets, the others their
    last `stride`, some of which may have been scored before.
    """
    starts: np.ndarray = np.arange(0, num_targets, stride)
    if form == "published_s3":
        starts = np.unique(np.minimum(starts, max(num_targets - seq_len, 0)))
    ends = np.minimum(starts + seq_len, num_targets)
    firsts = np.append(0, np.maximum(ends - stride, starts)[1:])
    return np.stack([starts, firsts, ends], axis=1)


def train_then_score(adapter: Adapter, scoring_seconds: float) -> None:
    """Train on the whole validation split; the score that follows is not legal.

    scoring_seconds: the part of the evaluation budget that is left for that score.
    """
    cfg, run = adapter.run.cfg, adapter.run
    end = adapter.val.num_targets(cfg)
    deadline = cfg.eval_wallclock_seconds - 1.1 * scoring_seconds
    steps_per_epoch = divide_up(end, cfg.eval_seq_len * cfg.ttt_batch_seqs)
    run.ledger.occasions["ttt"] = cfg.ttt_epochs * steps_per_epoch
    for _ in range(cfg.ttt_epochs):
        run.ledger.activity["ttt"] += adapter.learn(0, end, cfg.ttt_lr, deadline)
    run.folder.log(
        "warning: no legal score follows: the model has trained on the text before scoring it"
    )


# Published names of settings that have another name here: (our name, {published value: our value}).
# Where there is no table of values, they are the same. None leaves our setting as it is.
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

# Published names that are no settings here, with the values that are accepted because they change
# nothing: they turn a technique off, or are equal to a constant. None accepts any value.
RETIRED: dict[str, tuple[str, ...] | None] = {
    "DTG_ENABLED": ("0",),
    "GATED_ATTENTION": ("0",),
    "LATE_K_FP16": ("0",),
    "LAWA_ENABLED": ("0",),
    "LAWA_FREQ": None,
    "LAWA_K": None,
    "MTP_NUM_HEADS": ("0",),
    "MTP_LOSS_WEIGHT": None,
    "TARGET_MB": ("0",),
    "TARGET_BYTES": ("0",),
    "GPTQ_CALIB_SAMPLES": None,
    "GPTQ_RESERVE_MS": None,
    "MUON_BETA2": None,
    "VAL_BATCH_SIZE": None,
    "CONTROL_TENSOR_NAME_PATTERNS": ("",),
    "FP16_KEEP_NAME_PATTERNS": ("",),
    "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS": ("",),
    "ADAM_EPS": ("1e-8", "1e-08"),
    "BETA1": ("0.9",),
    "MUON_QUANT_BLOCK_SIZE": ("256",),
    "QAT_CLIP_PCT": ("0.9995",),
    "Q_SYMMETRIC": ("1",),
    "AUX_PROJ_MUP": ("1",),
    # BITS stands for all of these.
    "MLP_BITS": ("6",),
    "ATTN_BITS": ("6",),
    "EMB_BITS": ("8",),
    "AUX_EMB_BITS": ("8",),
}


def translate_aliases(env: dict[str, str], given: dict[str, str], known: dict) -> Iterator[str]:
    """Add to `given` the settings that published names in `env` mean, and yield a note for each.

    Of two published switches for one setting, the one that is on wins: EMA_ENABLED=0 SWA_ENABLED=1
    means AVG_MODE=swa. So those that are on are read first. Raises Refusal for an unknown value, or
    one that contradicts the setting itself.
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
    """Yield a note for each of RETIRED in `env`; raises Refusal if its value has an effect."""
    for name in sorted(set(RETIRED) & set(env)):
        accepted = RETIRED[name]
        if accepted is not None and env[name] not in accepted:
            raise Refusal(f"{name}={env[name]!r}: not available here, only {name}={accepted[0]} is")
        yield f"{name}={show_setting(env[name])} has no effect here"


# =================================================================================================
# Configuration
# All parts of the settings put together, the presets, and how the environment is read. Every wrong
# name or value, and every contradiction that can be known before a run, is refused here in one
# line. A setting's environment variable has the name of its field in upper case.
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

    Properties that need settings of several parts are here.
    """

    @property
    def rotary_dims(self) -> int:
        """Rotated dimensions of each head, R."""
        return self.rope_dims or self.head_dim

    @property
    def has_input_gates(self) -> bool:
        """Whether some gate reads the first GATE_WINDOW channels of its input."""
        smear_reads_input = self.smear_enabled and self.smear_form == "input"
        return smear_reads_input or self.attn_gate != "none"

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
        """Raise Refusal for settings that contradict each other, naming them and their values."""
        refuse_bad_declarations()
        for part in PARTS:
            for holds, complaint in part.checks(self):
                if not holds:
                    raise Refusal(self.with_values(complaint))

    def with_values(self, complaint: str) -> str:
        """The text with =VALUE after each name of a setting that does not have it yet."""

        def with_value(found: re.Match) -> str:
            word = found[0]
            if word.lower() not in SETTINGS:
                return word
            return f"{word}={show_setting(getattr(self, word.lower()))}"

        return re.sub(r"\b[A-Z][A-Z_0-9]+\b(?!=)", with_value, complaint)

    def for_model(self) -> Config:
        """The settings as the network may read them: reading any of another reach is refused."""
        return cast(Config, LimitedSettings(self, ("model",), "the model"))

    def for_scoring(self) -> Config:
        """The settings as scoring may read them: reading any of another reach is refused."""
        return cast(Config, LimitedSettings(self, ("run", "model", "scoring"), "scoring"))

    @classmethod
    def from_env(cls, env: dict[str, str]) -> tuple[Config, list[str]]:
        """The defaults, overridden by PRESET and then by `env`; and notes for the log.

        Raises Refusal for a name, value or combination that is wrong.
        """
        known = {name.upper(): setting for name, setting in SETTINGS.items()}
        given, notes = translate_names(env, known)
        values: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items()}
        for preset in preset_names(given.get("PRESET", "")):
            for name, value in PRESETS[preset].items():
                values[name] = scaled(values[name], value)
        for name, text in given.items():
            values[name.lower()] = parse_setting(name, text, known[name])
        if "WARMDOWN_ITERS" in given and "WARMDOWN_FRAC" not in given:
            values["warmdown_frac"] = 0.0  # otherwise a preset's fraction would win
        # A run has one budget: the one in `env` replaces that of the defaults or a preset.
        if values["max_train_tflops"] and "MAX_WALLCLOCK_SECONDS" not in given:
            values["max_wallclock_seconds"] = 0.0
        elif "MAX_WALLCLOCK_SECONDS" in given and "MAX_TRAIN_TFLOPS" not in given:
            values["max_train_tflops"] = 0.0
        return cls(**values), notes

    def listing(self) -> Iterator[str]:
        """The lines of --help and the log on all settings; * marks those that are not defaults."""
        for part in PARTS:
            yield f"{part.title}:"
            for name in settings_of(part):
                yield self.line_of(name)

    def line_of(self, name: str) -> str:
        """One setting as --help shows it: value, meaning, what it accepts, default."""
        value = getattr(self, name)
        setting = SETTINGS[name]
        declared = knob_of(setting)
        if isinstance(setting.default, bool):
            accepted = "0 or 1"
        elif isinstance(setting.default, str):
            accepted = "|".join(declared.accepts) or "text"
        else:
            accepted = f"{declared.accepts[0]:g} to {declared.accepts[1]:g}"
        mark = " "
        if value != setting.default:
            mark = "*"
            accepted += f"; default {show_setting(setting.default)}"
        return f"{mark} {name.upper():<29}{show_setting(value):<12} {declared.meaning} [{accepted}]"


SETTINGS: dict[str, Field] = {setting.name: setting for setting in fields(Config)}
PARTS = cast(tuple[type[Part], ...], Config.__bases__)


def settings_of(part: type[Part]) -> list[str]:
    """Names of a part's own settings, in the order of their declaration."""
    return [name for name in part.__annotations__ if name in SETTINGS]


def settings_of_reach(*reaches: str) -> list[str]:
    """Names of the settings of these reaches, in the order of their declaration."""
    return [
        name
        for part in PARTS
        for name in settings_of(part)
        if knob_of(SETTINGS[name]).reach in reaches
    ]


@functools.cache
def refuse_bad_declarations() -> None:
    """Raise Refusal if a setting is declared so that older artifacts could not be read any more."""
    for name, setting in SETTINGS.items():
        if not isinstance(setting.metadata.get("knob"), Knob):
            raise Refusal(
                f"{name.upper()} is declared without a knob: use training_knob or another"
            )
        if not knob_of(setting).travels or name in VERSION_1_SETTINGS:
            continue
        if knob_of(setting).absent is UNSAID:
            raise Refusal(
                f"{name.upper()} travels in artifacts and does not say what its absence in an "
                "older one means: add absent=..., the value at which nothing changes"
            )
        try:
            parse_setting(name.upper(), knob_of(setting).text_if_absent, setting)
        except Refusal as refusal:
            raise Refusal(f"absent=... in a declaration is no value: {refusal}") from None


def preset_names(text: str) -> list[str]:
    """The names in PRESET; raises Refusal if one is unknown, or if they cannot be combined."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PRESETS:
            raise Refusal(f"PRESET={name!r}: expected one of {', '.join(PRESETS)}")
    if "mini" in names[:-1]:
        raise Refusal(f"PRESET={','.join(names)}: mini scales the others, so it must come last")
    if "cpu" in names and len(names) > 1:
        raise Refusal(f"PRESET={','.join(names)}: cpu cannot be combined with other presets")
    return names


def scaled(previous: Any, value: Any) -> Any:
    """The value that a preset gives to a setting; a Fraction multiplies the previous value.

    The product is rounded, and at least 1 unless the previous value was 0.
    """
    if not isinstance(value, Fraction):
        return value
    return max(1, round(previous * value)) if previous else previous


# What the first five published systems below have in common: SmearGate and BigramHash reach across
# the starts of documents, text is read in order, and a last short validation row is left out.
PUBLISHED = {
    "loader": "sequential",
    "smear_bos_mask": False,
    "bigram_bos_mask": False,
    "eval_truncate": True,
}

# Pull request 1855 as it ran; 2135 differs in few settings. Their tokenizer knows lower case and
# marks for capitals (CaseOps).
FRONTIER = {
    "data_path": "./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
    "tokenizer_path": "./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
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
    "codec": "range",  # instead of ZPAQ, which is not available here
    "bits": "mlp:6,attn:6,emb:7,aux:8",
    "gptq_calib_batches": 16,
    "eval_truncate": True,
    "eval_stride": 0,
    # In a step of a phase each of eight ranks had a row of 4,096 tokens.
    "ttt_mode": "lora",
    "lora_phases": 3,
    "lora_phase_row_tokens": 4096,
}

PRESETS: dict[str, dict] = {
    # Pull requests of openai/parameter-golf as their scripts ran; records/SYSTEMS.md explains every
    # value. Averages that a script computed but never applied are left out: SWA in 1361, 569 and
    # 703, EMA in 334.
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
        # As its script sets it; but there the threshold came out as 0, so that nothing was pruned.
        "prune_pct": 0.02,
    },
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
        "qat_targets": "aux",  # its late QAT rounded no other linear weights
    },
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
        "qat_targets": "blocks",  # also the key matrices that are stored as fp16, see bits
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
    # The best recipe found for two CPU cores and the built-in corpus (see records/NOTES.md).
    "cpu": {
        "data_path": "./data/datasets/docs_sp4096",
        "tokenizer_path": "./data/tokenizers/docs_4096_bpe.model",
        "vocab_size": 4096,
        "token_mask": "1",
        "num_layers": 4,
        "model_dim": 96,
        "num_heads": 3,
        "num_kv_heads": 1,
        "rope_dims": 8,
        "xsa_last_n": 4,
        "cache_layer": 2,
        # Tables are large: a lookup costs little time, and the limit on bytes leaves room for them.
        "ve_layers": "0,1,2,3",
        "ve_dim": 96,
        "bigram_vocab_size": 65536,
        "bigram_dim": 96,
        "train_seq_len": 256,
        "eval_seq_len": 256,
        "eval_stride": 32,
        "train_batch_tokens": 2048,
        "max_wallclock_seconds": 240.0,
        "warmdown_frac": 0.5,
        "muon_momentum": 0.95,
        "muon_momentum_warmup_steps": 300,
        "muon_wd": 1.0,
        "muon_wd_form": "cautious",
        "ema_decay": 0.9,
        "gptq_calib_batches": 32,
        "int8_keep_float_max_numel": 1024,
        "counts": "both",
        # For COUNTS=off TTT_MODE=lora: so small a model learns much from the document it reads.
        "lora_lr": 0.001,
        "lora_chunk_tokens": 24,
    },
    # Scales any other preset down to two CPU cores, the built-in corpus and five minutes. It must
    # come last; a Fraction multiplies the value that the presets before it give.
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
        "lora_lanes": Fraction(1, 4),  # few enough that batches of the 98 documents follow a phase
        "lora_phase_docs": Fraction(1, 50),
        "lora_phase_chunk_tokens": Fraction(1, 16),
        "lora_phase_row_tokens": 0,
    },
}


def translate_names(env: dict[str, str], known: dict) -> tuple[dict[str, str], list[str]]:
    """The settings in `env` under our names, and notes for the log on all other names.

    Raises Refusal for a name or value that cannot be meant as it stands.
    """
    given = {name: env[name] for name in known if name in env}
    notes = [
        *translate_aliases(env, given, known),
        *retired_names(env),
        *misspelled_names(env, known),
    ]
    return given, notes


def misspelled_names(env: dict[str, str], known: dict) -> Iterator[str]:
    """Raise Refusal for a name similar to a setting's, if the value could be that setting's.

    If it could not, the variable is taken to be another program's, and a note is yielded.
    """
    excused = {name.strip() for name in env.get("NOT_OURS", "").split(",")}
    for name in sorted(env.keys() - known.keys() - ALIASES.keys() - RETIRED.keys() - excused):
        similar = similar_names(name, known)
        if fitting := [near for near in similar if value_fits(near, env[name], known)]:
            raise Refusal(
                f"{name} is not a setting; did you mean {fitting[0]}? (--help lists them; "
                f"NOT_OURS={name} says that it is another program's)"
            )
        if similar:
            yield f"{name}={show_setting(env[name])} is not read here: it is no setting"


def similar_names(name: str, known: dict) -> list[str]:
    """Settings and aliases that a name could be meant for, the most similar first."""
    # Short names must be more similar, since other programs use many (SPEED is not SEED).
    cutoff = 0.88 if len(name) > 8 else 0.92
    if near := difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=cutoff):
        return near
    ours = tuple(prefix for part in PARTS for prefix in part.prefixes if name.startswith(prefix))
    family = [setting for setting in known if setting.startswith(ours)]
    return difflib.get_close_matches(name, family, n=len(family) or 1, cutoff=0.0)


def value_fits(name: str, text: str, known: dict) -> bool:
    """Whether a text could be the value of a setting or alias; a path must exist for that."""
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
# verb_train() is the course of a run. After it come those of its steps that have no other section,
# then what --check, --plan, --eval, --sample and --help do, and main().
# =================================================================================================


def verb_train(cfg: Config, notes: list[str]) -> int:
    """Train, export, and score the exported model; returns the exit code."""
    with Run.start(cfg) as run:
        with run.ranks.together():
            rows, val = load_inputs(cfg, run.device)
            weights = weights_to_start_from(cfg, val)
        attention = pick_attention(cfg, run.ranks)
        run.folder.open()
        run.log_header(notes)
        model = make_model(attention.kernel, val, weights, run)
        log_work(model, rows, val, attention, run)
        forward = make_forward(run)
        calibration_seconds, batch_seconds = prime(forward, model, rows, run)
        reserve = budget_reserve(model, calibration_seconds, run)
        state = Training(model, reserve, data_identity(rows, val, cfg), run)
        if saved := run.folder.last_checkpoint():
            state.restore(saved)
        packed_text = pack_training_text(rows, run)
        averaged = train(forward, state, rows, val, run)
        log_gates(averaged, run)
        model, run = without_untrained_loops(averaged, state, run)
        hessians = calibrate(model, rows, state.step, run)
        float_result = score_float_model(forward, model, val, run)
        blob = export(model, hessians, packed_text, val, run)
        announce_scoring(batch_seconds, val, run)
        scores = score_export(blob, forward, val, run)
        run.ledger.log_activity()
        return log_summary(model, state.step, len(blob), [float_result, *scores], run)


def load_inputs(cfg: Config, device: torch.device) -> tuple[TrainingRows, Validation]:
    """Load training rows and validation split; raises Refusal for all that is bound to fail."""
    if cfg.codec == "brotli":
        brotli_module()
    if cfg.log_to == "tensorboard":
        tensorboard_writer()
    if cfg.cpu_bf16 == "1" and device.type == "cpu" and not has_bf16_products():
        raise Refusal(
            "CPU_BF16=1: this processor cannot multiply in bfloat16 (avx512_bf16 or AMX); "
            "use CPU_BF16=auto"
        )
    refuse_unreadable_network(cfg)
    refuse_small_budget(cfg)
    rows = TrainingRows(cfg)
    val = load_validation(cfg)
    if val.forbidden is not None:
        for number, path in enumerate(rows.shards):
            tokens = rows.tokens_of(number)[: rows.scan_tokens]
            refuse_forbidden_pairs(tokens, val.forbidden, str(path))
    return rows, val


def weights_to_start_from(cfg: Config, val: Validation) -> dict[str, Tensor]:
    """Read the weights in INIT_FROM, by parameter name; empty without INIT_FROM.

    The file may come from a stranger: nothing in it is executed, and no shape is trusted. Raises
    Refusal if it cannot be read, or if its model has other shapes or another tokenizer.
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
    parameters = unallocated_model(cfg).named_parameters()
    expected = {name: tuple(weight.shape) for name, weight in parameters}
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


def weights_of_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the model's weights in a checkpoint; raises Refusal if the file is not a checkpoint."""
    try:
        content = io.BytesIO(read_checkpoint(path))
        weights = torch.load(content, "cpu", weights_only=True)["model"]
        for name, weight in weights.items():
            kind = (weight.dtype, weight.layout, weight.device.type)
            if kind != (torch.float32, torch.strided, "cpu") or not isinstance(name, str):
                raise ValueError(f"{name} is {kind}")
        return weights
    except Exception as error:  # torch.load does not document what it raises
        raise Refusal(
            f"INIT_FROM={path}: neither an artifact nor a checkpoint that can be read ({error})"
        ) from None


def data_identity(rows: TrainingRows, val: Validation, cfg: Config) -> list:
    """Identify a run's data and initial weights; checkpoints with another identity are refused."""
    initial = [sha256_of(Path(cfg.init_from))] if cfg.init_from else []
    return [val.fingerprint, rows.num_tokens, *initial]


def make_model(
    kernel: AttentionKernel, val: Validation, weights: dict[str, Tensor], run: Run
) -> GPT:
    """The model with its initial weights, the same on all ranks, its token mask and prefixes.

    weights: those to start from; random ones if empty.
    """
    cfg = run.cfg
    model = GPT(cfg, kernel, run.dtype)
    initialize(model, cfg)
    if weights:
        model.load_state_dict(weights)
    run.ranks.copy_from_main(model.to(run.device))
    if cfg.token_mask == "1":
        mask_tokens(model, val, run.device)
    if val.prefixes is not None:
        model.prefixes = torch.from_numpy(val.prefixes).to(run.device)
    return model


def score_float_model(forward: Forward, model: GPT, val: Validation, run: Run) -> EvalResult:
    """Score the trained weights before they are quantized, in windows side by side."""
    run.phase = "scoring the float model"
    result = evaluate("float_chunked", forward, model, val, run)
    label = "DIAGNOSTIC"
    if run.cfg.avg_mode != "none":
        label += f" post_{run.cfg.avg_mode}"
    report(label, result, run)
    return result


def score_export(blob: bytes, forward: Forward, val: Validation, run: Run) -> list[EvalResult]:
    """Score an artifact's bytes by the settings in them alone, as --eval does; headline last."""
    run.phase = "scoring the artifact"
    header, stored = decode_artifact(blob)
    cfg, _ = settings_within(header, environment_of(run.cfg, "run"))
    return score_artifact(stored, val, forward, run.with_settings(cfg), diagnostics=True)


def log_work(
    model: GPT, rows: TrainingRows, val: Validation, attention: ChosenAttention, run: Run
) -> None:
    """Log what will be trained, and on what; note what keeps the run from being a record."""
    cfg = run.cfg
    machine = torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type
    if "H100" not in machine or run.ranks.world_size != 8:
        run.ledger.mark_ineligible(
            f"ran on {run.ranks.world_size} x {machine}, the track asks for 8 x H100"
        )
    for reason in ineligible_settings(cfg):
        run.ledger.mark_ineligible(reason)
    log_data(rows, val, run)
    run.folder.log(
        "model_params:{params}", "model", params=sum(p.numel() for p in model.parameters())
    )
    most_rows = max((count for _, count in micro_batches(cfg, run)), default=0)
    xsa_layers = [*range(cfg.num_layers - cfg.xsa_last_n, cfg.num_layers)]
    lines = (
        f"XSA:last_{cfg.xsa_last_n} active_layers:{xsa_layers}",
        f"world_size:{run.ranks.world_size} rows_per_step:{cfg.rows_per_step} "
        f"micro_batch_rows:{most_rows}",
        *attention_lines(attention, cfg),
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
    run.folder.log("\n".join(lines))


def log_data(rows: TrainingRows, val: Validation, run: Run) -> None:
    """Log which training and validation data the run uses."""
    cfg = run.cfg
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


def attention_lines(attention: ChosenAttention, cfg: Config) -> Iterator[str]:
    """Log lines on the attention kernel and the trial by which it was chosen."""
    yield (
        f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads} "
        f"kernel:{attention.name}"
    )
    if attention.trial:
        yield f"attention tried: {attention.trial}"


def plan_lines(model: GPT) -> Iterator[str]:
    """A log line for each layer in the order of execution; before them that without loops."""
    if model.cfg.num_loops:
        before = ",".join(str(layer.block) for layer in model.plan_before_looping)
        yield f"before ENABLE_LOOPING_AT={model.cfg.enable_looping_at:g}, blocks: {before}"
    for place, layer in enumerate(model.plan):
        yield f"layer:{place} {layer}"


def repeats(run: Run) -> str:
    """Say whether another run with these settings, seed included, would give the same bits."""
    if run.device.type != "cpu":
        return "no, whatever the settings: a GPU's attention sums its gradients in no fixed order"
    if not run.cfg.step_driven:
        return "no: the clock ends the run (MAX_WALLCLOCK_SECONDS=0 would leave that to ITERATIONS)"
    return f"to the bit on this machine, with {torch.get_num_threads()} threads a process"


def routing_table(cfg: Config, model: GPT) -> Iterator[str]:
    """A log line for each parameter group: how many parameters it has and how they learn."""
    for group in route_parameters(cfg, model):
        yield (
            f"{sum(p.numel() for p in group['params']):>12,} parameters  {group['optimizer']}  "
            f"lr:{group['base_lr']:<8g} wd:{group['weight_decay']:<6g} {group['route']}"
        )


def log_summary(model: GPT, steps: int, num_bytes: int, scores: list[EvalResult], run: Run) -> int:
    """Log at the end of a run what was trained, its size and its scores; returns the exit code."""
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
    run.ledger.note_pause("after training")
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
    """Log the operations of training and of scoring, and the processor time of the counts."""
    run.folder.log(
        "work training:{tflops:.6f} TFLOP scoring:{eval_tflops:.6f} TFLOP "
        "tables:{table_seconds:.1f} CPU seconds",
        "work",
        tflops=run.ledger.training_operations / 1e12,
        eval_tflops=run.ledger.scoring_operations / 1e12,
        table_seconds=run.ledger.table_clock.elapsed(),
    )


def ineligible_settings(cfg: Config) -> list[str]:
    """Which settings keep a run from being a record of the 10-minute, 16 MB track, in words."""
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
            (cfg.init_from, "INIT_FROM: the run began with the weights of another run"),
        )
        if wrong
    ]


def verb_check(cfg: Config, notes: list[str]) -> int:
    """Do --check: check settings, data and tokenizer as a run would, and nothing else."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, val = load_inputs(cfg, device)
    pick_attention(cfg, Ranks(device=device))
    weights_to_start_from(cfg, val)
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
    """Do --plan: say what a run would do, without data and without training, by plan.py."""
    script = Path(__file__).resolve().with_name("plan.py")
    if not script.is_file():
        raise Refusal("--plan needs plan.py, which stands beside train_gpt.py in its repository")
    print(*notes, sep="\n", end="\n" if notes else "")
    runpy.run_path(str(script), run_name="__main__")
    return 0


def locate_validation(cfg: Config, header: dict) -> Config:
    """The settings with the paths of an artifact's validation split and tokenizer.

    The split is known by its fingerprint, the tokenizer by its sha256. First the paths in the
    settings are tried, then everything in data/. Raises Refusal if either is not found.
    """
    for folder in (cfg.data_path, *map(str, sorted(Path("data/datasets").glob("*")))):
        with contextlib.suppress(Refusal):
            if read_sidecar(folder)["fingerprint"] == header["validation"]:
                break
    else:
        also = ""
        try:
            locate_tokenizer(cfg, header)
        except Refusal as refusal:  # one message names all that is missing
            also = f"; and {refusal}"
        raise Refusal(
            f"no validation split with fingerprint {header['validation'][:12]} in "
            f"DATA_PATH={cfg.data_path} or data/datasets/*; make it with data/prepare.py{also}"
        )
    return replace(locate_tokenizer(cfg, header), data_path=folder)


def locate_tokenizer(cfg: Config, header: dict) -> Config:
    """The settings with the path of an artifact's tokenizer; raises Refusal if it is not found."""
    for path in (Path(cfg.tokenizer_path), *sorted(Path("data/tokenizers").glob("*.model"))):
        if path.is_file() and sha256_of(path) == header["tokenizer"]:
            return replace(cfg, tokenizer_path=str(path))
    raise Refusal(
        f"no tokenizer with sha256 {header['tokenizer'][:12]} at "
        f"TOKENIZER_PATH={cfg.tokenizer_path} or in data/tokenizers/"
    )


def verb_eval(path: Path, env: dict[str, str]) -> int:
    """Do --eval: score an artifact again by the settings in it; returns the exit code."""
    header, stored = read_artifact(path)
    cfg, notes = settings_within(header, env)
    cfg = locate_validation(cfg, header)
    with Run.start(cfg) as run:
        run.log_header(notes)
        with run.ranks.together():
            val = load_validation(cfg)
        forward = make_forward(run)
        if run.compiled:  # before the clock starts, as in the run that made the artifact
            prime_scoring(forward, rebuild_model(cfg, stored, run), run)
        run.phase = "scoring the artifact"
        score = score_artifact(stored, val, forward, run, diagnostics=False)[-1]
        run.folder.log(
            f"val_bpb:{score.bpb:.8f} val_loss:{score.loss:.8f} ({score.name}, "
            f"stride {cfg.eval_stride})"
        )
    return 0


def verb_sample(path: Path, prompt: str, env: dict[str, str]) -> int:
    """Do --sample: write text that an artifact's model draws after the prompt."""
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
    """Do --help: print every setting with value, range and meaning."""
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
    """Do what the command line asks, or say in one line what failed; returns the exit code."""
    open_standard_streams()
    try:
        return run_verb(arguments)
    except Refusal as refusal:
        code, message = EXIT_REFUSED, str(refusal)
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        discard_output(sys.stdout)
        return EXIT_FAILED
    except OSError as error:
        code, message = EXIT_FAILED, str(error)
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted; what the run folder holds was kept"
    # All ranks refuse for the same reason, so one line per host is enough.
    if code != EXIT_REFUSED or os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"error: {message}", to_stderr=True)
    return code


def run_verb(arguments: list[str]) -> int:
    """Find the command, read the settings and run it; returns the command's exit code."""
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
    # All is done, and signals that come while Python exits shall change nothing.
    handle_end_signals(lambda number, frame: None)
    sys.exit(exit_code)
