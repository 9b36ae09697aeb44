"""Every message in TROUBLE.md is produced here.

Each case is filed under its message as the tables have it (`...` stands for anything). Two checks
close the circle: the tables list exactly these messages, and the text of every place in
train_gpt.py and run.sh that refuses, fails or warns is among what the cases printed.

Stand-ins, where the fault itself is not to be had here: a forward that has no room, a disk that is
full, a file that may not be read, replicas that differ, and stubs of pip and nvidia-smi.
"""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TinyData
from jobs import BARE_ENVIRONMENT, FORKS, TINY, TRAINER, environment, rank_of_job, start_ranks
from test_run_sh import STUB, Checkout, add_program

import train_gpt

TROUBLE = (ROOT / "TROUBLE.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", TROUBLE, re.M)
SMALL = {
    **TINY,
    "NUM_LAYERS": "1",
    "XSA_LAST_N": "1",
    "VE_LAYERS": "0",
    "ITERATIONS": "1",
    "EVAL_STRIDE": "0",
    "TRAIN_SEQ_LEN": "16",
    "TRAIN_BATCH_TOKENS": "64",
    "RUN_ID": "mine",
    "QAT_MODE": "off",
    "GPTQ_VARIANT": "off",
    "MUON_MOMENTUM_WARMUP_STEPS": "0",
    "WARMDOWN_FRAC": "0",
    "WARMDOWN_ITERS": "0",
}

printed: list[str] = []  # all that the cases saw


class Place:
    """A folder for one case: data that it may damage, settings of a tiny run, what is printed."""

    def __init__(self, folder: Path, data: TinyData, patch: pytest.MonkeyPatch, capfd) -> None:
        self.folder, self.patch, self.capfd = folder, patch, capfd
        self.run_folder, root = folder / "runs" / "mine", data.data_path.parents[1]
        shutil.copytree(root, folder / "data")
        self.data = folder / "data" / data.data_path.relative_to(root)
        self.tokenizer = folder / "data" / data.tokenizer_path.relative_to(root)
        self.sidecar = self.data / "fineweb_val.json"
        self.settings = {
            **SMALL,
            "VOCAB_SIZE": data.env["VOCAB_SIZE"],
            "DATA_PATH": str(self.data),
            "TOKENIZER_PATH": str(self.tokenizer),
            "RUNS_DIR": str(folder / "runs"),
        }

    def main(self, *arguments: str, code: int = 2, bare: bool = False, **changed: str) -> str:
        """Run a command line here to its end; return its stdout, and its stderr of one line."""
        locks, flock = [], train_gpt.fcntl.flock
        self.patch.setattr(
            train_gpt.fcntl, "flock", lambda fd, how: locks.append(fd) or flock(fd, how)
        )
        self.capfd.readouterr()
        with environment(**{**({} if bare else self.settings), **changed}):
            try:
                ended = train_gpt.main(list(arguments))
            except SystemExit as stopped:
                ended = stopped.code
        self.patch.setattr(train_gpt.fcntl, "flock", flock)
        for lock in locks:  # a process keeps it to its end, which this one has not come to
            os.close(lock)
        out, err = self.capfd.readouterr()
        assert ended == code, (ended, out[-500:], err)
        assert err.count("\n") == (code not in (0, 3)) and "Traceback" not in err, err
        return out + err

    def shard(self, split: str = "train") -> Path:
        """The first shard of a split."""
        return self.data / f"fineweb_{split}_000000.bin"

    def edit_sidecar(self, **changed: object) -> None:
        """Change fields of fineweb_val.json."""
        facts = json.loads(self.sidecar.read_text())
        self.sidecar.write_text(json.dumps({**facts, **changed}))

    def give_tokenizer(self, content: bytes) -> None:
        """Another tokenizer, whose hash the sidecar records."""
        self.tokenizer.write_bytes(content)
        self.edit_sidecar(tokenizer={"sha256": hashlib.sha256(content).hexdigest()})

    def at_call(self, name: str, number: int, deed: Callable, owner: object = train_gpt) -> None:
        """Do a deed before the number-th call (from 1) of a function."""
        original, calls = getattr(owner, name), iter(range(1, 1 << 30))

        def planted(*given, **named):
            if next(calls) == number:
                deed(*given)
            return original(*given, **named)

        self.patch.setattr(owner, name, planted)


Case = Callable[[Place], str]


def raises(error: BaseException) -> Callable:
    """A function that raises it."""

    def fail(*given, **named):
        raise error

    return fail


# Settings and data: refused by --help and --check


def env(**changed: str) -> Case:
    return lambda place: place.main("--help", bare=True, **changed)


def check(damage: Callable[[Place], object] = lambda place: None, **changed: str) -> Case:
    """Damage something, then --check."""

    def case(place: Place) -> str:
        damage(place)
        return place.main("--check", **{"RUN_ID": "", **changed})

    return case


def overwrite(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


def not_readable(place: Place) -> None:
    place.patch.setattr(np, "fromfile", raises(PermissionError(13, "Permission denied", "shard")))


def no_plan(place: Place) -> str:
    copy = place.folder / "train_gpt.py"
    shutil.copy(TRAINER, copy)
    place.patch.setattr(train_gpt, "__file__", str(copy))
    return place.main("--plan")


def without_torchrun(place: Place) -> str:
    return place.main(WORLD_SIZE="2", RANK="0")


def more_processes_than_gpus(place: Place) -> str:
    place.patch.setattr(train_gpt.torch.cuda, "is_available", lambda: True)
    place.patch.setattr(train_gpt.torch.cuda, "device_count", lambda: 1)
    return place.main(LOCAL_WORLD_SIZE="2")


def at_start(name: str, code: int, error: BaseException) -> Case:
    """Something is raised where a command begins."""

    def case(place: Place) -> str:
        place.patch.setattr(train_gpt, name, raises(error))
        return place.main("--check", code=code)

    return case


# Several processes, forked


def rank_1_refuses(place: Place) -> str:
    """Only rank 1 lacks its data; what both print."""
    job = {
        **BARE_ENVIRONMENT,
        **place.settings,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(24_000 + os.getpid() % 6000),
    }
    outs = [place.folder / f"out.{rank}" for rank in range(2)]
    ranks = [
        FORKS.Process(
            target=rank_of_job,
            args=(rank, {**job, "DATA_PATH": (str(place.data), "not/here")[rank]}, outs[rank]),
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [2, 2]
    assert outs[1].read_text() == ""  # one a host is enough
    return outs[0].read_text()


def rank_1_hangs(place: Place) -> str:
    """Rank 1 is stopped when the run has begun; what rank 0 prints."""
    out = place.folder / "out"
    ranks = start_ranks(
        2,
        out,
        **{
            **place.settings,
            "WATCHDOG_SECONDS": "1",
            "MAX_WALLCLOCK_SECONDS": "60",
            "ITERATIONS": "100000",
        },
    )
    log, end = place.run_folder / "log.txt", time.monotonic() + 60
    while not (log.is_file() and "step:1/" in log.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ranks[0].join(60)
    ranks[1].kill()
    assert ranks[0].exitcode == 1
    return out.with_suffix(".0").read_text().splitlines()[-1]


# The run folder


finished: dict[str, bytes] = {}  # the files of a run that has ended, in the first place of all


def trained(place: Place) -> Place:
    """Have the run "mine" end: once, and elsewhere as if it had been there."""
    if not finished:
        place.main(code=0)
        finished.update({path.name: path.read_bytes() for path in place.run_folder.iterdir()})
        finished["."] = bytes(place.folder)
    place.run_folder.mkdir(parents=True, exist_ok=True)
    for name in finished.keys() - {"."}:
        (place.run_folder / name).write_bytes(finished[name])
    settings = finished["settings.json"].replace(finished["."], bytes(place.folder))
    (place.run_folder / "settings.json").write_bytes(settings)
    return place


def resumed(damage: Callable[[Place], object], code: int = 2, **changed: str) -> Case:
    """Train, do something to the run or its surroundings, and go on with it."""

    def case(place: Place) -> str:
        damage(trained(place))
        return place.main(code=code, RESUME="1", **changed)

    return case


def at_work(place: Place) -> None:
    """Another process, or this one through another descriptor, holds the folder."""
    holder = os.open(place.run_folder, os.O_RDONLY)
    train_gpt.fcntl.flock(holder, train_gpt.fcntl.LOCK_EX)


def more_data(place: Place) -> None:
    shutil.copy(place.shard(), place.data / "fineweb_train_000009.bin")


def bad_checkpoint(place: Place) -> None:
    (place.run_folder / "checkpoint_9.pt").write_bytes(b"not a checkpoint")


# While it runs: something is planted, then a run


def during(plant: Callable[[Place], object], code: int = 1, **changed: str) -> Case:
    def case(place: Place) -> str:
        plant(place)
        return place.main(code=code, **changed)

    return case


def full_disk(place: Place) -> None:
    place.at_call("fsync", 3, raises(OSError(errno.ENOSPC, "No space left on device")), os)


def no_room(place: Place, most: int = 0) -> None:
    original = train_gpt.training_nats

    def forward(model, batch, *rest):
        if len(batch.input_ids) > most:
            raise torch.OutOfMemoryError("no room")
        return original(model, batch, *rest)

    place.patch.setattr(train_gpt, "training_nats", forward)


def little_room(place: Place) -> None:
    """Two rows a forward; the run ends when it is known."""
    no_room(place, most=2)
    place.at_call("build_optimizers", 1, raises(RuntimeError("the end\nof the test")))


def weights_become(value: float, function: str, number: int = 1) -> Callable[[Place], None]:
    """Before a call of a function that takes the model, one of its weights becomes `value`."""

    def plant(place: Place) -> None:
        def spoil(*given) -> None:
            model = next(x for x in given if isinstance(x, torch.nn.Module))
            with torch.no_grad():
                model.tok_emb.weight[3] = value

        place.at_call(function, number, spoil)

    return plant


def spoiled_before_saving(place: Place) -> None:
    def spoil(state, seconds: float) -> None:
        with torch.no_grad():
            state.model.tok_emb.weight[3] = float("inf")

    place.at_call("save", 1, spoil, train_gpt.Training)


def shard_cut(place: Place) -> None:
    place.at_call("train_step", 2, lambda *given: os.truncate(place.shard(), 2000))


def late_bad_id(place: Place) -> None:
    """Past what is searched before the run of a large set."""
    for name, value in (("FULL_SCAN_TOKENS", 0), ("SCAN_TOKENS", 10)):
        place.patch.setattr(train_gpt, name, value)
    for path in place.data.glob("fineweb_train_*"):
        overwrite(path, 1024 + 2 * 20, b"\xff\xff")


def replicas_differ(place: Place) -> None:
    """The other of two ranks has another sum of bits."""
    two = SimpleNamespace(world_size=2, agree=lambda value, op="first": value * (op == "most"))
    original = train_gpt.Ranks.check_replicas
    place.patch.setattr(
        train_gpt.Ranks, "check_replicas", lambda ranks, model, step: original(two, model, step)
    )


def signalled(number: int, function: str, call: int) -> Callable[[Place], None]:
    return lambda place: place.at_call(function, call, lambda *given: os.kill(os.getpid(), number))


# Runs that end well and warn

WARNING_RUNS = {
    # Everything that settings alone make a run ineligible for; a schedule that never acts.
    "settings": (
        0,
        {
            "EVAL_WALLCLOCK_SECONDS": "601",
            "ARTIFACT_LIMIT_BYTES": "16000001",
            "GPTQ_CALIB": "train_after_cap",
            "AVG_MODE": "swa",
            "SWA_EVERY": "1000",
            "TTT_MODE": "train_then_score",
            "EVAL_STRIDE": "64",
            "TTT_EPOCHS": "1",
            "TTT_FREEZE_BLOCKS": "0",
        },
    ),
    "clocks": (
        0,
        {
            "MAX_WALLCLOCK_SECONDS": "0.0001",
            "EVAL_WALLCLOCK_SECONDS": "0.0001",
            "GPTQ_VARIANT": "full",
            "GPTQ_CALIB_BATCHES": "1",
        },
    ),
    "limits": (3, {"ITERATIONS": "2", "ARTIFACT_LIMIT_BYTES": "1000"}),
    "hours": (0, {"MAX_WALLCLOCK_SECONDS": "601", "COMPILE": "0"}),
}
warned: dict[str, str] = {}  # what each of them printed


def warning(kind: str) -> Case:
    """What one of WARNING_RUNS prints; each is run once."""

    def case(place: Place) -> str:
        code, changed = WARNING_RUNS[kind]
        if kind not in warned:
            warned[kind] = place.main(code=code, **changed)
        return warned[kind]

    return case


# Artifacts


@functools.cache
def small_artifact() -> tuple[dict, bytes]:
    """A header that names all it must, and an artifact with it of a tensor that no model has."""
    with environment():
        cfg = train_gpt.Config.from_env({})[0]
    val = SimpleNamespace(tokenizer_sha256="t" * 64, fingerprint="v" * 64)
    header = train_gpt.artifact_header(cfg, val)
    return header, train_gpt.encode_artifact(header, {"w": train_gpt.Stored(torch.ones(64).half())})


def packed(body: bytes, size: int | None = None, codec: int = 1, version: int = 1) -> bytes:
    """A prelude of our own before a body."""
    prelude = train_gpt.PRELUDE.pack(
        b"TINYGPT\n",
        version,
        codec,
        len(body) if size is None else size,
        hashlib.sha256(body).digest(),
    )
    return prelude + body


def scored(content: bytes | None, **settings: str) -> Case:
    """--eval of a file, none of whose settings is ours."""

    def case(place: Place) -> str:
        path = place.folder / "artifact.bin"
        if content is not None:
            path.write_bytes(content)
        place.patch.chdir(place.folder)
        return place.main("--eval", "artifact.bin", bare=True, **settings)

    return case


def huge(place: Place) -> str:
    with open(place.folder / "artifact.bin", "wb") as file:
        file.truncate((1 << 28) + 1)
    return scored(None)(place)


def scored_elsewhere(change: dict, **settings: str) -> Case:
    """--eval of the small artifact with another header, beside the tiny data."""

    def case(place: Place) -> str:
        facts = json.loads(place.sidecar.read_text())
        shards = "".join(sha256 for _, sha256 in sorted(facts["val_shards"].items()))
        ours = {
            "validation": hashlib.sha256(shards.encode()).hexdigest(),
            "tokenizer": facts["tokenizer"]["sha256"],
        }
        header = {**small_artifact()[0], **ours}
        header["settings"] = {**header["settings"], "VOCAB_SIZE": place.settings["VOCAB_SIZE"]}
        stored = {"w": train_gpt.Stored(torch.ones(64).half())}
        blob = train_gpt.encode_artifact({**header, **change}, stored)
        paths = {"DATA_PATH": str(place.data), "TOKENIZER_PATH": str(place.tokenizer)}
        return scored(blob, **paths, **settings)(place)

    return case


# run.sh


def shell(
    *arguments: str,
    code: int = 0,
    prepare: Callable[[Checkout], object] = lambda c: None,
    bare: bool = False,
    **settings: str,
) -> Case:
    """Run run.sh with test_run_sh's stub of Python."""

    def case(place: Place) -> str:
        folder = place.folder / "checkout"
        folder.mkdir()
        (place.folder / "bin").mkdir()
        for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, folder / name)
        stub = place.folder / "bin" / "python3"
        stub.write_text(STUB)
        stub.chmod(0o755)
        checkout = Checkout(folder, stub)
        prepare(checkout)
        result = checkout.run(*arguments, **settings)
        assert result.returncode == code, result
        return result.stderr

    return case


def no_good_python(checkout: Checkout) -> None:
    for name in ("python3.10", "python3.11", "python3.12", "python3.13", "python"):
        shutil.copy(checkout.stub, checkout.stub.with_name(name))


def python_that(pattern: str, answer: str) -> Callable[[Checkout], None]:
    """The stub answers a command otherwise."""

    def prepare(checkout: Checkout) -> None:
        checkout.stub.write_text(
            STUB.replace('case "$*" in', f'case "$*" in\n{pattern}) {answer} ;;', 1)
        )

    return prepare


def lists_gpus(checkout: Checkout) -> None:
    add_program(checkout, "nvidia-smi", "echo 'GPU 0: a'")


RANK, RECORD = "rank ..., during ...: ", "warning: not eligible as a record: "
BIG = {"NUM_LAYERS": "11"}
CASES: dict[str, Case] = {
    # Settings
    "... is not a setting; did you mean ...? (--help lists them)": env(MATIRX_LR="1"),
    "...: expected 0 or 1": env(TIE_EMBEDDINGS="False"),
    "...: expected a whole number": env(NUM_LAYERS="nine"),
    "...: expected a number": env(EMA_DECAY="x"),
    "...: expected one of ...": env(LOADER="random"),
    "...: expected ... <= value <= ...": env(EMA_DECAY="nan"),
    "...: expected ... (here ...)": env(LATE_QAT="True"),
    "... means ..., but ... is set too: keep one": env(LATE_QAT="0", QAT_MODE="late"),
    "...: not available here, only ... is": env(MTP_NUM_HEADS="2"),
    "PRESET=...: mini scales the others: it goes last": env(PRESET="mini,pr1361"),
    "VE_LAYERS=...: expected different numbers from 0 on": env(VE_LAYERS="9,9"),
    "...: ... is not mlp, attn, emb, aux or a tensor and a colon and ...": env(BITS="mlp:9"),
    "... must give each of mlp, attn, emb, aux once": env(BITS="mlp:6,attn:6,emb:8"),
    "MODEL_DIM=... must be a multiple of NUM_HEADS=...": env(NUM_HEADS="7"),
    "NUM_KV_HEADS=... must divide NUM_HEADS=...": env(NUM_KV_HEADS="3"),
    "OPTIMIZER_ROUTING=... leaves Muon nothing without BIGRAM_VOCAB_SIZE=... and VE_ENABLED=...": env(
        OPTIMIZER_ROUTING="adam", BIGRAM_VOCAB_SIZE="0", VE_ENABLED="0"
    ),
    "ROPE_DIMS=... must be even and at most MODEL_DIM=... / NUM_HEADS=..., ...": env(
        ROPE_DIMS="15"
    ),
    "ROPE_NTK_REF=... must be 0 (off) unless ROPE_DIMS=... (0: all ...) is above 2": env(
        ROPE_DIMS="2"
    ),
    "XSA_LAST_N=... must be at most NUM_LAYERS=...": env(XSA_LAST_N="12"),
    "BIGRAM_VOCAB_SIZE=... must be 0 (off) or at least 2": env(BIGRAM_VOCAB_SIZE="1"),
    "VE_LAYERS=... must all be below NUM_LAYERS=...": env(VE_LAYERS="9,11"),
    "BACKOUT_MODE=... (CACHE_LAYER=...) needs a layer of NUM_LAYERS=... after the one it keeps": env(
        BACKOUT_MODE="cache", CACHE_LAYER="10"
    ),
    "TRAIN_BATCH_TOKENS=... must be a multiple of TRAIN_SEQ_LEN=...": env(
        TRAIN_BATCH_TOKENS="3000"
    ),
    "EVAL_STRIDE=... must be at most EVAL_SEQ_LEN=...": env(EVAL_STRIDE="2049"),
    "EVAL_BATCH_SEQS=... (TTT_BATCH_SEQS=...) times EVAL_SEQ_LEN=... must be at most ... tokens": env(
        EVAL_BATCH_SEQS="4097"
    ),
    "BITS=... names a layer beyond NUM_LAYERS=...": env(
        BITS="mlp:6,attn:6,emb:8,aux:8,blocks.11.attn.c_k:8"
    ),
    "BITS=... names ..., which is no tensor of the model": env(
        BITS="mlp:6,attn:6,emb:8,aux:8,all:8"
    ),
    "CLIP_SIGMAS=... names ..., which is no tensor of the model": env(
        CLIP_SIGMAS="mlp:9,attn:9,emb:9,aux:9,all:8"
    ),
    "CLIP_SIGMAS=... names a layer beyond NUM_LAYERS=...": env(
        CLIP_SIGMAS="mlp:9,attn:9,emb:9,aux:9,blocks.11.attn.c_k:8"
    ),
    "ARTIFACT_TARGET_BYTES=... must be at most ARTIFACT_LIMIT_BYTES=...": env(
        ARTIFACT_TARGET_BYTES="16000001"
    ),
    "TTT_MODE=... needs sliding windows, not EVAL_STRIDE=...": env(
        TTT_MODE="score_first", EVAL_STRIDE="0"
    ),
    "TTT_FREEZE_BLOCKS=... leaves none of NUM_LAYERS=... to adapt": env(
        TTT_MODE="score_first", TTT_FREEZE_BLOCKS="11"
    ),
    "RUN_ID=... must be up to 100 letters, digits, '_', '-' and '.'": env(RUN_ID=".."),
    "RESUME needs the RUN_ID=... of the run to go on with": env(RESUME="1"),
    # Start
    "arguments ...: expected nothing, --help, --check, --plan or --eval ARTIFACT; ...": lambda place: (
        place.main("--chekc")
    ),
    "--plan needs plan.py, which stands beside train_gpt.py in its repository": no_plan,
    "ATTENTION=fa3: ...; use ATTENTION=auto": check(ATTENTION="fa3"),
    "CODEC=brotli needs the Python package brotli 1.2 or newer": check(
        lambda p: p.patch.setitem(sys.modules, "brotli", None), CODEC="brotli"
    ),
    "... processes on this host, but it has ... GPU(s): start one process for each "
    "(--nproc_per_node)": more_processes_than_gpus,
    "WORLD_SIZE=..., but the processes do not find each other (...); torchrun sets up all that "
    "they need": without_torchrun,
    "RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE are ...: expected whole numbers; torchrun sets "
    "them, a single process needs none": during(lambda p: None, code=2, WORLD_SIZE="two"),
    "rank ...: ...": rank_1_refuses,
    "[Errno 13] Permission denied: ...": lambda p: not_readable(p) or p.main("--check", code=1),
    # Data
    "DATA_PATH=...: no fineweb_..._*.bin; data/prepare.py makes them": check(DATA_PATH="not/here"),
    "...: not a token shard (expected magic ..., version ...); make it again with "
    "data/prepare.py": check(lambda p: overwrite(p.shard(), 0, b"text")),
    "...: ... bytes do not hold the ... tokens that its header promises: delete it and run "
    "data/prepare.py again": check(lambda p: os.truncate(p.shard(), 9000)),
    "...: token id ... is outside VOCAB_SIZE=...; the shards belong to another tokenizer": check(
        lambda p: overwrite(p.shard(), 2000, b"\xff\xff")
    ),
    "DATA_PATH=...: no shard holds a row of TRAIN_SEQ_LEN=... tokens and one more": check(
        TRAIN_SEQ_LEN="65536", TRAIN_BATCH_TOKENS="65536"
    ),
    "... is missing: run data/prepare.py, which keeps shards it finds": check(
        lambda p: p.sidecar.unlink()
    ),
    "... is damaged: delete it and run data/prepare.py again": check(
        lambda p: p.sidecar.write_text("{}")
    ),
    "TOKENIZER_PATH=...: no such file; data/prepare.py makes it": check(
        lambda p: p.tokenizer.unlink()
    ),
    "TOKENIZER_PATH=... (sha256 ...) is not the shards' tokenizer, sha256 ...": check(
        lambda p: p.tokenizer.write_bytes(b"another")
    ),
    "...: not a SentencePiece model (...)": check(lambda p: p.give_tokenizer(b"no model")),
    "TOKENIZER_PATH=... has ... pieces, BOS id ...; expected VOCAB_SIZE=... and 1": check(
        VOCAB_SIZE="512"
    ),
    "the validation shards in ... are not those its fineweb_val.json records; delete that folder "
    "and run data/prepare.py again": check(lambda p: overwrite(p.shard("val"), 2000, b"\5\0\5\0")),
    "the validation pieces in ... are ... bytes, fineweb_val.json records ...: run "
    "data/prepare.py again": check(lambda p: p.edit_sidecar(encoded_bytes=7)),
    "... validation tokens in ... leave none to score: EVAL_SEQ_LEN=..., EVAL_TRUNCATE=...": check(
        EVAL_TRUNCATE="1", EVAL_SEQ_LEN="8192"
    ),
    # The run folder
    "RUN_ID=...: ... exists already; nothing in it was touched. Choose another RUN_ID, or "
    "RESUME=1 to go on": during(lambda p: p.run_folder.mkdir(parents=True), code=2),
    "RUN_ID=...: ... exists already; choose another, or RESUME=1 to go on": check(
        lambda p: p.run_folder.mkdir(parents=True), RUN_ID="mine"
    ),
    "RUN_ID=...: another process is at work in ...": resumed(at_work),
    "RESUME=1: ...=..., but the run in ... has ...": resumed(lambda p: None, SEED="7"),
    "RESUME=1: ... is damaged: begin a new run": resumed(
        lambda p: (p.run_folder / "settings.json").write_text("[1]")
    ),
    "RESUME=1: ... began this run, and another one is running now": resumed(
        lambda p: (p.run_folder / "train_gpt.py").write_text("older")
    ),
    RANK + "RuntimeError: the checkpoint was made on other data (..., now ...): give the run its "
    "data back, or begin a new one": resumed(more_data, code=1),
    "warning: ... cannot be read (...); trying the one before": resumed(bad_checkpoint, code=0),
    RANK + "OSError: [Errno 28] No space left on device": during(full_disk),
    # While it runs
    "out of memory: trying ... rows a forward": during(little_room),
    RANK + "OutOfMemoryError: ... rows a forward are too many: lower MICRO_BATCH_SEQS, or take a "
    "smaller model": during(no_room),
    RANK + "FloatingPointError: step ...: loss ..., gradient not finite in: ...": during(
        weights_become(float("nan"), "train_step", 2)
    ),
    RANK + "FloatingPointError: step ...: ... is not finite any more": during(
        spoiled_before_saving
    ),
    RANK + "FloatingPointError: ... is not finite, or too large for fp16": during(
        weights_become(1e6, "quantize")
    ),
    RANK + "FloatingPointError: ...: the loss is ...": during(
        weights_become(float("nan"), "evaluate")
    ),
    RANK + "RuntimeError: ... was cut short while the run read it": during(shard_cut),
    RANK + "RuntimeError: step ...: the ranks' weights differ; do not use this run": during(
        replicas_differ
    ),
    RANK + "waited ... s; not there: rank ...": rank_1_hangs,
    RANK + "...: ...": during(
        lambda p: p.patch.setattr(
            train_gpt, "prime", raises(RuntimeError("CUDA error: unspecified\nand more"))
        )
    ),
    "SIG... after step ...; RESUME=1 RUN_ID=... goes on from there": during(
        signalled(signal.SIGTERM, "train_step", 2), code=143, ITERATIONS="5"
    ),
    "SIG... during ...; what the run folder holds was kept": during(
        signalled(signal.SIGINT, "prime", 1), code=130
    ),
    "interrupted; what the run folder holds was kept": at_start(
        "load_validation", 130, KeyboardInterrupt()
    ),
    "warning: ... was configured and never acted": warning("settings"),
    "warning: scoring will pass EVAL_WALLCLOCK_SECONDS; it runs to the end all the same, and the "
    "run will not be eligible as a record": warning("clocks"),
    "warning: no legal score follows: the model has trained on the text before scoring it": warning(
        "settings"
    ),
    "warning: code and artifact will be over ... bytes, by ... or more: take fewer parameters or "
    "BITS": warning("limits"),
    "code and artifact are ... bytes over ARTIFACT_LIMIT_BYTES=...; take fewer parameters or BITS": warning(
        "limits"
    ),
    RECORD + "ran on ..., the track asks for 8 x H100": warning("settings"),
    RECORD + "MAX_WALLCLOCK_SECONDS=0: the run is step-driven": warning("settings"),
    RECORD + "MAX_WALLCLOCK_SECONDS is above 600": warning("hours"),
    RECORD + "EVAL_WALLCLOCK_SECONDS is above 600": warning("settings"),
    RECORD + "ARTIFACT_LIMIT_BYTES is above 16,000,000": warning("settings"),
    RECORD + "GPTQ_CALIB=train_after_cap: training data was used after the budget": warning(
        "settings"
    ),
    RECORD + "the text is not FineWeb": warning("settings"),
    RECORD + "resumed from a checkpoint of step ...": resumed(lambda p: None, code=0),
    RECORD + "training and calibration took ... s": warning("clocks"),
    RECORD + "code and artifact have ... bytes, ... over ARTIFACT_LIMIT_BYTES=...": warning(
        "limits"
    ),
    RECORD + "scoring took ... s, EVAL_WALLCLOCK_SECONDS=...": warning("clocks"),
    # Artifacts and --eval
    "...: no such artifact": scored(None),
    "... has ... bytes; artifacts are read up to ...": huge,
    "...: not an artifact of train_gpt.py (its first bytes are wrong)": scored(b"text"),
    "...: artifact version ..., codec ...: this train_gpt.py reads version ..., codecs ...": scored(
        packed(b"", version=99)
    ),
    "...: the artifact is damaged (its sha256 does not match); copy it again": scored(
        packed(b"abc") + b"d"
    ),
    "...: the artifact's body has ... bytes; the bound is ...": scored(packed(b"", 1 << 40)),
    "...: the artifact's body does not decompress (...)": scored(
        packed(b"no stream of any codec", codec=2)
    ),
    "...: the artifact's body does not end where its prelude says": scored(
        packed(train_gpt.compress(b"abc", "lzma"), 2, codec=2)
    ),
    "...: the artifact's header is malformed (...)": scored(
        packed(train_gpt.compress(b"abc", "lzma"), 3, codec=2)
    ),
    "the artifact's tensors are not those of the model its settings describe": scored_elsewhere({}),
    "the artifact's header must name the settings of this train_gpt.py; ... is not here or missing "
    "there": scored_elsewhere({"settings": {}}),
    "... is set, but the artifact says what its model is: unset it": lambda place: scored(
        small_artifact()[1], NUM_LAYERS="3"
    )(place),
    "no validation split with fingerprint ... in DATA_PATH=... or data/datasets/*; make it with "
    "data/prepare.py": scored_elsewhere({"validation": "none"}),
    "no tokenizer with sha256 ... at TOKENIZER_PATH=... or in data/tokenizers/": scored_elsewhere(
        {"tokenizer": "none"}
    ),
    # run.sh
    "run.sh: no Python 3.10 to 3.13 found on PATH; install one or name it: "
    "PYTHON=/path/to/python3 ...": shell(code=1, prepare=no_good_python, STUB_VERSION_EXIT="1"),
    "run.sh: PYTHON=... does not run or is not Python 3.10 to 3.13": shell(
        code=1, PYTHON="/no/one"
    ),
    "run.sh: could not create .venv with ... (Debian and Ubuntu need the package python3-venv)": shell(
        code=1, prepare=python_that('"-m venv"*', "exit 1")
    ),
    "run.sh: no GPU here: if pip picks the CUDA build of torch (several GB), point "
    "PIP_EXTRA_INDEX_URL or PIP_INDEX_URL at an index of CPU builds": shell(
        prepare=lambda c: add_program(c, "uname", "echo Linux x86_64")
    ),
    "run.sh: pip could not install ... (all of it: .venv/pip-errors.txt)": shell(
        code=1, STUB_PIP_ERROR="no network"
    ),
    "run.sh: torch does not import; remove .venv and run again": shell(
        code=1, prepare=python_that("-c*device_count*", "exit 1")
    ),
    "run.sh: nvidia-smi lists GPUs but torch sees none (hidden, an old driver, or a CPU build): "
    "using the CPU": shell(prepare=lists_gpus),
    "run.sh: VOCAB_SIZE=..., but the data prepared here have 1024 pieces; set DATA_PATH and "
    "TOKENIZER_PATH too": shell(code=1, VOCAB_SIZE="4096"),
    "run.sh: no GPU and a PRESET without mini: data is not prepared, set DATA_PATH": shell(
        PRESET="pr1361"
    ),
    "run.sh: ruff found problems, see above pytest's output": shell(
        "test", code=1, STUB_RUFF_EXIT="1"
    ),
    "run.sh: mypy found problems, see above pytest's output": shell(
        "test", code=1, STUB_MYPY_EXIT="1"
    ),
}
# Other ways to some of the messages.
MORE: list[tuple[str, Case]] = [
    ("...: expected one of ...", env(PRESET="maxi")),
    (
        "...: token id ... is outside VOCAB_SIZE=...; the shards belong to another tokenizer",
        during(late_bad_id, LOADER="sequential"),
    ),
]


@pytest.fixture
def place(
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Place:
    """A place for one case."""
    return Place(tmp_path, tiny_data, monkeypatch, capfd)


def pattern_of(message: str) -> str:
    """A message of the tables as a regular expression of a whole line."""
    return "^(error: )?" + ".+".join(map(re.escape, message.split("..."))) + "$"


def check_case(place: Place, message: str, case: Case) -> None:
    """Run a case; one of its lines has to be as the message says."""
    text = case(place)
    assert re.search(pattern_of(message), text, re.M), text[-2000:]
    printed.extend(re.findall(r"^(?:error|warning|out of memory|run\.sh).*", text, re.M))


@pytest.mark.parametrize("message", CASES)
def test_message(place: Place, message: str) -> None:
    check_case(place, message, CASES[message])


@pytest.mark.parametrize(("message", "case"), MORE, ids=range(len(MORE)))
def test_other_ways(place: Place, message: str, case: Case) -> None:
    check_case(place, message, case)


def test_the_tables_list_these_messages() -> None:
    assert sorted(TABLE) == sorted(CASES)


# What the source can say


def template(node: ast.expr) -> str:
    """A string of the source as a regular expression, `.*` for what is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    return ".*"


ERRORS = {
    "Refusal",
    "RuntimeError",
    "FloatingPointError",
    "OutOfMemoryError",
    "error",
    "mark_ineligible",
    "stop",
}


def sites(source: str) -> Iterator[tuple[int, str]]:
    """Line and template of every text that refuses, fails or warns."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            name, text = ast.unparse(node.func).rpartition(".")[2], template(node.args[-1])
            if name in ("log", "write", "print"):
                text = template(node.args[0])
                if not re.match(r"warning|error|out\\ of\\ memory", text):
                    continue
            elif name not in ERRORS:
                continue
            yield node.lineno, text
        if isinstance(node, ast.FunctionDef) and node.name in (
            "__post_init__",
            "static_ineligibility",
        ):
            for row in ast.walk(node):
                if isinstance(row, ast.Tuple) and len(row.elts) == 2:
                    yield (
                        row.lineno,
                        re.sub(
                            r"\b([A-Z]+(_[A-Z]+)+|BITS)\b(?!=)", r"\1(=.*)?", template(row.elts[1])
                        ),
                    )


def unsaid(source: str, said: str) -> list[str]:
    """The sites of a source that no line of `said` is from."""
    return [
        f"line {number}: {text}"
        for number, text in sites(source)
        if len(re.sub(r"\W|\.\*", "", text)) > 6 and not re.search(text, said)
    ]


def test_a_text_that_is_not_said_is_found() -> None:
    source = "raise Refusal(f'{a}: the moon is {b} away')\nrun.log('warning: the sun is near')"
    assert len(unsaid(source, "error: x: the moon is far away\n")) == 1
    assert unsaid(source, "x: the moon is 7 away\nwarning: the sun is near") == []


def test_every_text_of_the_source_was_printed(request: pytest.FixtureRequest) -> None:
    """What refuses, fails or warns in train_gpt.py and run.sh was printed by a case above."""
    selected = sum(
        item.name.startswith(("test_message", "test_other"))
        for item in request.session.items
        if item.path == Path(__file__)
    )
    if selected < len(CASES) + len(MORE):
        pytest.skip("needs all the cases of this file in the same run")
    source, said = TRAINER.read_text(encoding="utf-8"), "\n".join(printed)
    assert len(list(sites(source))) > 90
    missing = unsaid(source, said)
    assert not missing, "\n".join(missing)
    shell_texts = re.findall(r'\b(?:die|say) ((?:"[^"]*"|\\\n|\s)+)', (ROOT / "run.sh").read_text())
    progress = ("creating .venv", "installing the packages", "preparing data", "training on", "$*")
    for text in (re.sub(r'"\s*(\\\n)?\s*"|^"|"\s*$', " ", text).strip() for text in shell_texts):
        if not text.startswith(progress):
            words = re.sub(r"\$\(.*?\)\)?|\$\{?\w+\}?", "\0", re.sub(r"\s+", " ", text)).strip()
            assert re.search(".*".join(map(re.escape, words.split("\0"))), said), text
