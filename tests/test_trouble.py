"""Every way that we know to make train_gpt.py or run.sh refuse, fail or warn, and what it prints.

A case causes trouble and says nothing of the words. Two checks close the circle: every template
that the sources have (tests/trouble.py finds them) is printed by a case, and TROUBLE.md is the
page that these templates make. A new message needs a case here and a run of tests/trouble.py.

Stand-ins, where the fault itself is not to be had here: a forward that has no room, a disk that is
full, a file that may not be read, replicas that differ, and stubs of pip and nvidia-smi.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyData, make_documents
from jobs import (
    BARE_ENVIRONMENT,
    FORKS,
    TINY,
    TRAINER,
    environment,
    rank_of_job,
    start_ranks,
    write_tokens,
)
from test_run_sh import STUB, Checkout, add_program, link_venv, make_checkout, put_venv
from trouble import PAGE, Message, PythonSource, all_messages, page, shell_messages

import train_gpt
from data import caseops, prepare

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

MESSAGES = all_messages()
printed: set[str] = set()  # templates of what the cases saw


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


def bytes_of_fewer_tokens(place: Place) -> None:
    """Bytes by file, of two tokens."""
    path = write_tokens(place.data / "fineweb_val_bytes_000000.bin", [0, 1])
    place.edit_sidecar(caseops={"val_bytes": {path.name: train_gpt.sha256_of(path)}})


def tokenizer_with_marks(place: Place) -> None:
    """A tokenizer that marks capitals, and no bytes by file."""
    place.give_tokenizer(
        prepare.train_tokenizer(make_documents(2000, seed=1), 320, 0, caseops.TRAINER_OPTIONS)
    )


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
    return place.main(LOCAL_WORLD_SIZE="2", WORLD_SIZE="2")


def without_modules(place: Place) -> str:
    """The trainer on a system that lacks what Windows lacks."""
    place.patch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TRAINER), run_name="__main__")
    assert ended.value.code == 2
    return place.capfd.readouterr().err


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


def begun_with(
    name: str, damage: Callable[[Place], object] = lambda place: None, code: int = 2, **changed: str
) -> Case:
    """Train, change something, and begin another run with the weights in this file."""

    def case(place: Place) -> str:
        damage(trained(place))
        weights = str(place.run_folder / name)
        return place.main(code=code, RUN_ID="another", INIT_FROM=weights, **changed)

    return case


def other_tokenizer(place: Place) -> None:
    """The data now belong to a tokenizer of as many pieces, of another content."""
    place.give_tokenizer(place.tokenizer.read_bytes() + b"\x9a\x06\x01\x00")


def spoil_checkpoint(place: Place) -> None:
    path = place.run_folder / "checkpoint_1.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["tok_emb.weight"][3] = float("nan")
    torch.save(state, path)


def curves_that_fail(place: Place) -> None:
    """A writer of tensorboard's that cannot be made."""
    stub = SimpleNamespace(SummaryWriter=raises(OSError(errno.EROFS, "Read-only file system")))
    place.patch.setitem(sys.modules, "torch.utils.tensorboard", stub)


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


def no_locks(place: Place) -> None:
    place.patch.setattr(
        train_gpt.fcntl, "flock", raises(OSError(errno.ENOLCK, "No locks available"))
    )


def shards_exchanged(place: Place) -> None:
    """In the second step, every training shard is another one and has to be opened again."""

    def exchange(*given) -> None:
        for path in place.data.glob("fineweb_train_*"):
            write_tokens(path.with_suffix(".new"), range(4, 200)).replace(path)
        for rows in given:
            if isinstance(rows, train_gpt.TrainingRows):
                rows.opened.clear()

    place.at_call("train_step", 2, exchange)


def text_of_another_tokenizer(place: Place) -> None:
    place.patch.setattr(train_gpt, "check_stream", lambda tokens, forbidden: 5)


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
    two = SimpleNamespace(
        world_size=2,
        agree=lambda value: 0.0,
        any_of=lambda condition: condition,
    )
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
    "adaptation": (
        0,
        {
            "ITERATIONS": "2",
            "EVAL_WALLCLOCK_SECONDS": "0.0001",
            "TTT_MODE": "lora",
            "LORA_CHUNK_TOKENS": "16",
        },
    ),
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
        checkout = make_checkout(place.folder / "checkout", place.folder / "bin")
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


def broken_venv(checkout: Checkout) -> None:
    """Its Python starts and then can do nothing."""
    put_venv(checkout)
    python = checkout.folder / ".venv" / "bin" / "python"
    python.write_text(STUB.replace('"- "*)', '"- "*) exit 1 ;;\n"- "*)', 1))


def another_python(checkout: Checkout) -> None:
    """.venv has 3.11, PATH has 3.12 as well."""
    put_venv(checkout)
    add_program(checkout, "python3.12", STUB.replace("3.11.9", "3.12.1"))


def lists_gpus(checkout: Checkout) -> None:
    add_program(checkout, "nvidia-smi", "echo 'GPU 0: a'")


def refused(deed: Callable[[Place], object]) -> Case:
    """A mistake of a programmer, which Python code meets."""

    def case(place: Place) -> str:
        with pytest.raises(train_gpt.Refusal) as refusal:
            deed(place)
        return str(refusal.value)

    return case


def declared(**metadata: object) -> Case:
    """A setting whose declaration lacks something is refused where settings are made."""

    def deed(place: Place) -> None:
        place.patch.setitem(
            train_gpt.SETTINGS,
            "new_one",
            SimpleNamespace(name="new_one", default=False, metadata=metadata),
        )
        train_gpt.refuse_bad_declarations.cache_clear()
        try:
            train_gpt.Config()
        finally:
            train_gpt.refuse_bad_declarations.cache_clear()

    return refused(deed)


def kind_of(**declaration: object) -> Case:
    """A parameter whose kind is missing or does not fit."""
    layer = torch.nn.Linear(2, 3, bias=False)
    for name, value in declaration.items():
        setattr(layer.weight, name, value)
    return refused(lambda place: train_gpt.kinds_of(layer, train_gpt.Config()))


def unpacked(packed: bytes) -> Case:
    """Training tokens of an artifact."""
    return refused(lambda place: train_gpt.unpack_tokens(packed, 320))


TOKENS = train_gpt.pack_tokens(np.arange(320))
NO_ABSENCE = train_gpt.Knob((), "", "model", train_gpt.UNSAID, ())
BIG = {"NUM_LAYERS": "11"}
CASES: dict[str, Case] = {
    # Settings
    "misspelled name": env(MATIRX_LR="1"),
    "switch that is neither 0 nor 1": env(TIE_EMBEDDINGS="False"),
    "word for a whole number": env(NUM_LAYERS="nine"),
    "word for a number": env(EMA_DECAY="x"),
    "unknown choice": env(LOADER="random"),
    "unknown preset": env(PRESET="maxi"),
    "nan": env(EMA_DECAY="nan"),
    "published name with another value": env(LATE_QAT="True"),
    "published name beside ours": env(LATE_QAT="0", QAT_MODE="late"),
    "retired technique": env(MTP_NUM_HEADS="2"),
    "scale before a system": env(PRESET="mini,pr1361"),
    "recipe for a CPU beside a system": env(PRESET="pr1361,cpu"),
    "bfloat16 in compiled training": env(CPU_BF16="1", COMPILE="1"),
    "growth that is none": env(ATTN_DOCS="1", DOC_GROWTH="soon"),
    "growth that shrinks": env(ATTN_DOCS="1", DOC_MAX_LEN="64", DOC_GROWTH="0.5:64,0.2:32"),
    "a layer named twice": env(VE_LAYERS="9,9"),
    "bits of nothing": env(BITS="mlp:9"),
    "bits without a role": env(BITS="mlp:6,attn:6,emb:8"),
    "width that heads do not divide": env(NUM_HEADS="7"),
    "heads that key heads do not divide": env(NUM_KV_HEADS="3"),
    "nothing for Muon": env(OPTIMIZER_ROUTING="adam", BIGRAM_VOCAB_SIZE="0", VE_ENABLED="0"),
    "odd rotation": env(ROPE_DIMS="15"),
    "NTK of two dimensions": env(ROPE_DIMS="2"),
    "XSA beyond the layers": env(XSA_LAST_N="12"),
    "one bigram": env(BIGRAM_VOCAB_SIZE="1"),
    "value embeddings beyond the layers": env(VE_LAYERS="9,11"),
    "backout of the last layer": env(BACKOUT_MODE="cache", CACHE_LAYER="10"),
    "batch of no whole rows": env(TRAIN_BATCH_TOKENS="3000"),
    "stride beyond the window": env(EVAL_STRIDE="2049"),
    "too many windows at once": env(EVAL_BATCH_SEQS="4097"),
    "too many windows learnt from at once": env(TTT_MODE="score_first", TTT_BATCH_SEQS="4097"),
    "bits beyond the layers": env(BITS="mlp:6,attn:6,emb:8,aux:8,blocks.11.attn.c_k:8"),
    "clips beyond the layers": env(CLIP_SIGMAS="mlp:9,attn:9,emb:9,aux:9,blocks.11.attn.c_k:8"),
    "bits of a tensor that is not there": env(BITS="mlp:6,attn:6,emb:8,aux:8,all:8"),
    "clips of a tensor that is not there": env(CLIP_SIGMAS="mlp:9,attn:9,emb:9,aux:9,all:8"),
    "a gate that looks too far": env(ATTN_GATE="sparse", GATE_WINDOW="600"),
    "loops of no layers": env(NUM_LOOPS="1", LOOP_START="5", LOOP_END="3"),
    "loops from the end on": env(NUM_LOOPS="1", ENABLE_LOOPING_AT="1"),
    "loops after the last step": env(
        NUM_LOOPS="1", ITERATIONS="2", MAX_WALLCLOCK_SECONDS="0", ENABLE_LOOPING_AT="0.9"
    ),
    "finer columns without a grid by deviation": env(AWQ_COLUMNS="8"),
    "a tilt beside counts": env(NGRAM_TILT="2", COUNTS="scored"),
    "documents beside counts": env(TTT_MODE="lora", COUNTS="scored"),
    "an order of counts twice": env(COUNT_ORDERS="2,2"),
    "an order of one": env(COUNT_ORDERS="1,2"),
    "an order that is no number": env(COUNT_ORDERS="x"),
    "counts without windows": env(COUNTS="scored", EVAL_STRIDE="0"),
    "embeddings with half a decay": env(EMBED_WD="-0.5"),
    "two budgets": env(MAX_TRAIN_TFLOPS="1", MAX_WALLCLOCK_SECONDS="60"),
    "operations that hold no step": check(MAX_TRAIN_TFLOPS="0.000001"),
    "clips of nothing": env(CLIP_SIGMAS="mlp"),
    "target over the limit": env(ARTIFACT_TARGET_BYTES="16000001"),
    "adaptation without windows": env(TTT_MODE="score_first", EVAL_STRIDE="0"),
    "nothing left to adapt": env(TTT_MODE="score_first", TTT_FREEZE_BLOCKS="11"),
    "name that is no folder's": env(RUN_ID=".."),
    "resuming no run": env(RESUME="1"),
    "setting that the network may not read": refused(lambda p: train_gpt.Config().for_model().seed),
    "setting without a knob": declared(),
    "setting without an absence": declared(knob=NO_ABSENCE),
    "setting whose absence is no value of it": declared(knob=replace(NO_ABSENCE, absent="none")),
    "parameter of no kind": kind_of(),
    "parameter of a wrong kind": kind_of(kind=train_gpt.GAIN),
    # Start
    "a system without locks": without_modules,
    "a rank beyond the number of ranks": during(lambda p: None, code=2, RANK="5"),
    "more processes here than in all": during(
        lambda p: None, code=2, WORLD_SIZE="2", LOCAL_WORLD_SIZE="4"
    ),
    "a launcher that says only half": during(lambda p: None, code=2, SLURM_PROCID="1"),
    "deltas at a strange place": check(LORA_PLACES="q,w"),
    "chunks without a length": check(LORA_SHORT_CHUNKS="256"),
    "repeats twice": check(NGRAM_TILT="2", COUNTS="scored"),
    "counts out of order": check(TTT_MODE="lora", COUNTS="scored"),
    "chunks wider than windows": check(TTT_MODE="lora", LORA_CHUNK_TOKENS="65"),
    "many long documents at once": check(
        TTT_MODE="lora", LORA_BATCH_DOCS="4096", EVAL_SEQ_LEN="65536", EVAL_BATCH_SEQS="1"
    ),
    "rows longer than chunks": check(
        TTT_MODE="lora",
        LORA_CHUNK_TOKENS="8",
        LORA_PHASE_ROW_TOKENS="64",
        LORA_PHASE_CHUNK_TOKENS="32",
    ),
    "misspelled verb": lambda place: place.main("--chekc"),
    "plan without its file": no_plan,
    "attention that is not here": check(ATTENTION="fa3"),
    "curves without tensorboard": check(
        lambda p: p.patch.setitem(sys.modules, "torch.utils.tensorboard", None),
        LOG_TO="tensorboard",
    ),
    "curves that cannot be written": during(curves_that_fail, code=0, LOG_TO="tensorboard"),
    "weights of no file": check(INIT_FROM="not/here"),
    "weights of no kind of file": check(
        lambda p: p.patch.chdir(p.folder) or (p.folder / "weights").write_bytes(b"text"),
        INIT_FROM="weights",
    ),
    "weights of another run": begun_with("artifact.bin", code=0),
    "weights of another shape": begun_with("artifact.bin", MODEL_DIM="48"),
    "weights of another tokenizer": begun_with("artifact.bin", other_tokenizer),
    "weights that are not finite": begun_with("checkpoint_1.pt", spoil_checkpoint),
    "attention in rows only": check(ATTENTION="cudnn", ATTN_DOCS="1"),
    "codec that is not here": check(
        lambda p: p.patch.setitem(sys.modules, "brotli", None), CODEC="brotli"
    ),
    "more processes than GPUs": more_processes_than_gpus,
    "several processes without a meeting place": without_torchrun,
    "a number of processes that is none": during(lambda p: None, code=2, WORLD_SIZE="two"),
    "data that only one rank lacks": rank_1_refuses,
    "data that may not be read": lambda p: not_readable(p) or p.main("--check", code=1),
    # Data
    "no data": check(DATA_PATH="not/here"),
    "no shard": check(lambda p: overwrite(p.shard(), 0, b"text")),
    "shard cut": check(lambda p: os.truncate(p.shard(), 9000)),
    "shard of another tokenizer": check(lambda p: overwrite(p.shard(), 2000, b"\xff\xff")),
    "late in a large shard, another tokenizer": during(late_bad_id, LOADER="sequential"),
    "shards shorter than a row": check(TRAIN_SEQ_LEN="65536", TRAIN_BATCH_TOKENS="65536"),
    "no sidecar": check(lambda p: p.sidecar.unlink()),
    "sidecar of nothing": check(lambda p: p.sidecar.write_text("{}")),
    "no tokenizer": check(lambda p: p.tokenizer.unlink()),
    "another tokenizer": check(lambda p: p.tokenizer.write_bytes(b"another")),
    "a tokenizer of another program": check(lambda p: p.tokenizer.write_text('{"model": {}}')),
    "no tokenizer's content": check(lambda p: p.give_tokenizer(b"no model")),
    "tokenizer of another size": check(VOCAB_SIZE="512"),
    "another validation text": check(lambda p: overwrite(p.shard("val"), 2000, b"\5\0\5\0")),
    "sidecar of another text": check(lambda p: p.edit_sidecar(encoded_bytes=7)),
    "bytes of fewer tokens": check(bytes_of_fewer_tokens),
    "marks without their bytes": check(tokenizer_with_marks),
    "text of another tokenizer": check(text_of_another_tokenizer, TOKEN_MASK="eval"),
    "tokenizer that ends early": refused(lambda p: [*train_gpt.wire_fields(b"\x80")]),
    "nothing to score": check(EVAL_TRUNCATE="1", EVAL_SEQ_LEN="8192"),
    # The run folder
    "a run of this name": during(lambda p: p.run_folder.mkdir(parents=True), code=2),
    "a run of this name, foreseen": check(
        lambda p: p.run_folder.mkdir(parents=True), RUN_ID="mine"
    ),
    "another process at work": resumed(at_work),
    "resuming with another setting": resumed(lambda p: None, SEED="7"),
    "resuming with a larger budget": resumed(lambda p: None, code=0, ITERATIONS="2"),
    "resuming without settings": resumed(
        lambda p: (p.run_folder / "settings.json").write_text("[1]")
    ),
    "resuming with another trainer": resumed(
        lambda p: (p.run_folder / "train_gpt.py").write_text("older")
    ),
    "resuming on other data": resumed(more_data, code=1),
    "damaged checkpoint": resumed(bad_checkpoint, code=0),
    "full disk": during(full_disk),
    "no locks": during(no_locks, code=0),
    # While it runs
    "little memory": during(little_room),
    "no memory": during(no_room),
    "weights spoiled while training": during(weights_become(float("nan"), "train_step", 2)),
    "weights spoiled before a checkpoint": during(spoiled_before_saving),
    "weights too large to store": during(weights_become(1e6, "quantize")),
    "weights spoiled before scoring": during(weights_become(float("nan"), "evaluate")),
    "shard cut while it is read": during(shard_cut),
    "shards exchanged while they are read": during(shards_exchanged),
    "paused and continued": during(
        signalled(signal.SIGCONT, "train_step", 1), code=0, ITERATIONS="2"
    ),
    "paused and continued after training": during(
        signalled(signal.SIGCONT, "quantize", 1), code=0, ITERATIONS="2"
    ),
    "ranks that differ": during(replicas_differ),
    "a rank that hangs": rank_1_hangs,
    "an error of torch": during(
        lambda p: p.patch.setattr(
            train_gpt, "prime", raises(RuntimeError("CUDA error: unspecified\nand more"))
        )
    ),
    "SIGTERM while training": during(
        signalled(signal.SIGTERM, "train_step", 2), code=143, ITERATIONS="5"
    ),
    "SIGINT before training": during(signalled(signal.SIGINT, "prime", 1), code=130),
    "SIGINT before a run": at_start("load_validation", 130, KeyboardInterrupt()),
    "settings of no record": warning("settings"),
    "hours instead of minutes": warning("hours"),
    "clocks that run out": warning("clocks"),
    "too little time to adapt": warning("adaptation"),
    "artifact over the limit": warning("limits"),
    "resumed": resumed(lambda p: None, code=0),
    # Artifacts and --eval
    "no artifact": scored(None),
    "huge artifact": huge,
    "artifact of something else": scored(b"text"),
    "artifact of another version": scored(packed(b"", version=99)),
    "damaged artifact": scored(packed(b"abc") + b"d"),
    "artifact that promises much": scored(packed(b"", 1 << 40)),
    "artifact that is not compressed": scored(packed(b"no stream of any codec", codec=2)),
    "artifact that ends early": scored(packed(train_gpt.compress(b"abc", "lzma"), 2, codec=2)),
    "artifact without a header": scored(packed(train_gpt.compress(b"abc", "lzma"), 3, codec=2)),
    "artifact of another model": scored_elsewhere({}),
    "artifact without settings": scored_elsewhere({"settings": {}}),
    "artifact with a strange setting": lambda place: scored_elsewhere(
        {"settings": {**small_artifact()[0]["settings"], "MOON": "1"}}
    )(place),
    "artifact and a setting of the model": lambda place: scored(
        small_artifact()[1], NUM_LAYERS="3"
    )(place),
    "counted text without a count": unpacked(b"abc"),
    "counted text that promises much": unpacked(b"\xff" * 40),
    "counted text that is not compressed": unpacked(TOKENS[:4] + b"text"),
    "counted text that ends early": unpacked(TOKENS[:-1]),
    "counted text of another tokenizer": unpacked(train_gpt.pack_tokens(np.arange(321))),
    "counts of a text that is not there": refused(
        lambda p: train_gpt.text_of_artifact({}, train_gpt.Config(counts="train"))
    ),
    "counted text that fits in nothing": refused(
        lambda p: train_gpt.pack_within(np.arange(320), 8, 1)
    ),
    "artifact of other text": scored_elsewhere({"validation": "none"}),
    "artifact of another tokenizer": scored_elsewhere({"tokenizer": "none"}),
    # run.sh
    "no Python": shell(code=1, prepare=no_good_python, STUB_VERSION_EXIT="1"),
    "a Python that is not there": shell(code=1, PYTHON="/no/one"),
    "no .venv can be made": shell(code=1, prepare=python_that('"-m venv"*', "exit 1")),
    "no GPU": shell(prepare=lambda c: add_program(c, "uname", "echo Linux x86_64")),
    "pip fails": shell(code=1, STUB_PIP_ERROR="no network"),
    "torch fails": shell(code=1, prepare=python_that("-c*device_count*", "exit 1")),
    "GPUs that torch does not see": shell(prepare=lists_gpus),
    "data of another vocabulary": shell(code=1, VOCAB_SIZE="1024"),
    "no data for a large preset": shell(PRESET="pr1361"),
    "lint fails": shell("test", code=1, STUB_RUFF_EXIT="1"),
    "types fail": shell("test", code=1, STUB_MYPY_EXIT="1"),
    "Windows": shell(code=1, prepare=lambda c: add_program(c, "uname", "echo MSYS_NT-10.0")),
    "another project": shell(code=1, prepare=lambda c: (c.folder / "train_gpt.py").unlink()),
    "a .venv of others without a Python": shell(code=1, prepare=put_venv, STUB_VERSION_EXIT="1"),
    "a .venv of others without packages": shell(code=1, prepare=link_venv, STUB_MISSING="torch 2"),
    "a .venv of others with other packages": shell(prepare=put_venv, STUB_OTHER="torch 2.0"),
    "a .venv of others that is broken": shell(code=1, prepare=broken_venv),
    "a .venv of others and another Python": shell(
        code=1, prepare=another_python, PYTHON="python3.12"
    ),
}
# What these print are words of the system, or of the rank that prints them.
WORDS_OF_OTHERS = {"data that may not be read"}


@pytest.fixture
def place(
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Place:
    """A place for one case."""
    return Place(tmp_path, tiny_data, monkeypatch, capfd)


@pytest.mark.parametrize("cause", CASES)
def test_trouble_is_told(place: Place, cause: str) -> None:
    """A case prints at least one of the messages."""
    text = CASES[cause](place)
    told = [message.text for message in MESSAGES if message.pattern.search(text)]
    assert told or cause in WORDS_OF_OTHERS, text[-2000:]
    printed.update(told)


# Their causes take a whole run by the clock, or a body of CODEC=range that is malformed.
CAUSED_ELSEWHERE = (
    "warning: training ended before ENABLE_LOOPING_AT: exported without loops",  # test_loops.py
    "the artifact's body does not decompress (...: ...)",  # test_codec.py, fuzz_artifact.py
    # test_cpu_bf16.py, test_artifact.py
    "CPU_BF16=1: this processor cannot multiply in bfloat16 (avx512_bf16 or AMX); use CPU_BF16=auto",
    "no validation split with fingerprint ... in DATA_PATH=... or data/datasets/*; make it with "
    "data/prepare.py; and ...",
)


def test_every_message_was_printed(request: pytest.FixtureRequest) -> None:
    run = [item for item in request.session.items if item.name.startswith("test_trouble_is_told")]
    if len(run) < len(CASES):
        pytest.skip("needs all the cases of this file in the same run")
    told = {*printed, *CAUSED_ELSEWHERE}
    missing = [message.text for message in MESSAGES if message.text not in told]
    assert not missing, "no case prints:\n" + "\n".join(missing)


def test_the_page_is_what_the_sources_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/trouble.py"


# How messages are found

SOURCE = '''
# =================================================================================================
# Moons
# Where they are.
# =================================================================================================
class Part:
    moon_size: int = run_knob(1, (0, 9), "Size.")

    def checks(cfg):
        """Moons are small. They are many."""
        yield cfg.moon_size < 8, f"MOON_SIZE must be below {8}"
        yield True, "CHEESE is no setting"

def mark(reason):
    """Note a reason."""
    log(f"warning: not a moon: {reason}")
    log("step: all is well")

def look(names, kind, error):
    """Look at the moon."""
    why = "too near to see" if names else "too far to see"
    expected = {int: "a whole number", float: "a number"}[kind]
    if kind:
        raise Refusal(f"{names}: the moon is {why}, expected {expected}")
    elif names:
        raise ValueError("this is caught by the caller")
    elif error:
        raise error("the moon is not there")
    mark(f"{names} has no crater")
    for reason in reasons(names):
        mark(reason)
    code, said = 1, "the moon went down"
    print(f"error: {said}")

def reasons(names):
    """There may be many."""
    return [reason for wrong, reason in ((names, "it has an atmosphere"),) if wrong]
'''
SHELL = """
# Moons are looked for. One is enough.
look() {
    say "looking for moons"
    warn "$count moons in $(cat file)" \\
        "are too many"
    die "no moon at ${PLACE:-}"
}
"""


def test_messages_of_python_are_found() -> None:
    told = {message.text: message for message in PythonSource(SOURCE).messages()}
    small, nearby = "Moons are small.", "Look at the moon."
    assert {text: (message.effect, message.reason) for text, message in told.items()} == {
        "MOON_SIZE=... must be below ...": ("refused", small),
        "CHEESE is no setting": ("refused", small),
        **{
            f"...: the moon is {why}, expected {expected}": ("refused", nearby)
            for why in ("too near to see", "too far to see")
            for expected in ("a whole number", "a number")
        },
        "the moon is not there": ("refused or failed", nearby),
        "warning: not a moon: ... has no crater": ("warning", nearby),
        "warning: not a moon: it has an atmosphere": ("warning", "There may be many."),
        "the moon went down": ("failed", nearby),
    }
    assert {message.section for message in told.values()} == {"Moons"}


def test_messages_of_a_shell_script_are_found() -> None:
    assert list(shell_messages(SHELL)) == [
        Message("run.sh", f"run.sh: {text}", effect, "Moons are looked for.")
        for text, effect in (
            ("... moons in ... are too many", "warning"),
            ("no moon at ...", "failed"),
        )
    ]


def test_a_template_finds_what_it_prints() -> None:
    message = Message("", "...: no moon at (...)", "failed", "")
    assert message.pattern.search("error: here: no moon at (there)\n")
    assert not message.pattern.search("error: here: no moon\nat (there)")
