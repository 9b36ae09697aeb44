"""Several processes: the same run on any number of them, whoever fails on the way."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TinyData
from jobs import (
    BARE_ENVIRONMENT,
    TRAINER,
    environment,
    events,
    run_ranks,
    start_ranks,
    tiny_job,
)
from torch import nn

import train_gpt
from train_gpt import Config, Muon, MuonSettings, Run

# 13 rows a step: no number of processes but one shares them evenly.
STEPS, ROWS = (
    "30",
    {"TRAIN_BATCH_TOKENS": str(13 * 64), "ITERATIONS": "30", "MICRO_BATCH_SEQS": "2"},
)


def curve(folder: Path) -> list[float]:
    return [event["train_loss"] for event in events(folder, "step")]


@pytest.fixture(scope="module")
def alone(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("worlds")
    run_ranks(1, folder / "out", **tiny_job(tiny_data, folder, "on-1", **ROWS))
    return folder / "on-1"


@pytest.mark.parametrize(
    ("set_to", "processes", "threads"),
    [("1", "4", 4), ("1", "32", 1), ("1", "1", 3), ("3", "4", 3), (None, "4", 3)],
)
def test_torchruns_one_thread_becomes_a_share_of_the_cores(
    set_to: str | None, processes: str, threads: int, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    # One process stands for one of several on a host.
    monkeypatch.setattr(train_gpt, "refuse_odd_ranks", lambda *ranks: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("OMP_NUM_THREADS", set_to) if set_to else monkeypatch.delenv(
        "OMP_NUM_THREADS", raising=False
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Run.start(Config()):
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


MANY = pytest.mark.slow
WORLDS = [
    (2, 1),
    (3, 1),
    (3, 0),
    (4, 1),
    (8, 1),
    pytest.param(6, 1, marks=MANY),
    *(pytest.param(processes, 0, marks=MANY) for processes in (2, 4, 6, 8)),
]


@pytest.mark.parametrize(("processes", "parallel"), WORLDS)
def test_any_number_of_processes_trains_the_same(
    processes: int, parallel: int, alone: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    """The loss curve is that of one process; the run itself compares the replicas' bits."""
    run_ranks(
        processes,
        tmp_path / "out",
        **tiny_job(tiny_data, tmp_path, "shared", MUON_PARALLEL=str(parallel), **ROWS),
    )
    assert len(curve(alone)) == 30
    assert curve(tmp_path / "shared") == pytest.approx(curve(alone), abs=1e-4)


# Muon's stacks, shared out


class Ranks:
    """Runs of several ranks in one process, whose exchanges are done by hand."""

    def __init__(self, count: int) -> None:
        self.runs = [Run(Config(), rank, count, torch.device("cpu")) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("matrices", [1, 3, 8, 11])
def test_shares_of_a_stack_are_equal_and_make_it_up(count: int, matrices: int) -> None:
    stack = torch.randn(matrices, 2, 3)
    parts = [run.ranks.part_of(stack) for run in Ranks(count).runs]
    assert len({part.shape for part in parts}) == 1
    whole = torch.cat(parts)
    assert torch.equal(whole[:matrices], stack)
    assert not whole[matrices:].any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("more", [{}, {"muon_slow_share": 0.5, "muon_neuron_norm": 0.9}])
def test_what_muon_keeps_is_whole_whatever_the_number_of_ranks(packed: bool, more: dict) -> None:
    """What one process saves, three take up, each its part, and step on as the one does."""
    torch.manual_seed(0)
    shape, count, steps = (40, 24), 3, 4
    weights = [nn.Parameter(torch.randn(shape)) for _ in range(5)]
    gradients = [[torch.randn(shape) for _ in weights] for _ in range(steps)]

    def optimizer(run: Run, parameters: list) -> Muon:
        group = {"params": parameters, "weight_decay": 0.1, "route": "all"}
        rule = MuonSettings(muon_quant_momentum=packed, **more)
        muon = Muon([group], rule, torch.float32, run.ranks)
        muon.param_groups[0].update(lr=0.1, momentum=0.9, slow_share=0.5)
        return muon

    def take(muon: Muon, parameters: list, grads: list) -> None:
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        muon.step()

    one = optimizer(Ranks(1).runs[0], weights)
    for grads in gradients[:-1]:
        take(one, weights, grads)
    saved = copy.deepcopy(one.whole_state())
    before = [w.detach().clone() for w in weights]
    assert len(saved[0]) == 1 + len(more)
    assert [len(part) for part in saved[0]["momentum"]] == [5] * (2 if packed else 1)
    take(one, weights, gradients[-1])
    updates = []
    for run in Ranks(count).runs:
        mine = [nn.Parameter(w.clone()) for w in before]
        run.ranks.scatter_sum = lambda stack, run=run: lambda: run.ranks.part_of(stack)
        run.ranks.gather = lambda part: (updates.append(part), lambda: torch.zeros(6, *shape))[1]
        muon = optimizer(run, mine)
        muon.load_whole_state(saved)
        take(muon, mine, gradients[-1])
    update = torch.cat(updates)[:5]
    expected = [
        (b * (1 - 0.1 * 0.1) - w) / (0.1 * (40 / 24) ** 0.5)
        for b, w in zip(before, weights, strict=True)
    ]
    torch.testing.assert_close(update, torch.stack(expected), rtol=0, atol=2e-5)


def differing_replicas(rank: int) -> bool:
    """Whether check_replicas sees one weight of rank 1 off by its last bit."""
    run, model = Run(Config(), rank, 2, torch.device("cpu")), nn.Linear(4, 4)
    answers: dict[str, float] = {}

    def agree(value: float) -> float:
        answers.setdefault("bits", value)
        return answers["bits"]

    torch.manual_seed(0)
    nn.init.normal_(model.weight)
    nn.init.zeros_(model.bias)
    run.ranks.agree = agree
    run.ranks.largest = lambda value: value
    run.ranks.check_replicas(model, 1)
    with torch.no_grad():
        model.weight[1, 2] = torch.nextafter(model.weight[1, 2], torch.tensor(9.0))
    try:
        run.ranks.check_replicas(model, 2)
    except RuntimeError as error:
        assert "step 2: the ranks' weights differ" in str(error)
        return True
    return False


def test_a_replica_that_differs_by_one_bit_is_found() -> None:
    assert differing_replicas(0)


# Checkpoints


LONG = {"ITERATIONS": "40", "TRAIN_BATCH_TOKENS": "384", "MICRO_BATCH_SEQS": "2"}


def sha(folder: Path) -> str:
    return events(folder, "artifact")[-1]["sha256"]


def wait_for(path: Path, pattern: str, seconds: float = 120.0) -> None:
    """Until a log has a line."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.is_file() and re.search(pattern, path.read_text(), re.M):
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} never said {pattern}")


# Two int8 momenta, NorMuon, MiLe, prefixes, both kinds of averages; a SWA that has begun when the
# checkpoint is made.
QUAINT = {
    "PRESET": "pr703,mini",
    "CACHE_LAYER": "1",
    "AVG_MODE": "swa_of_ema",
    "SWA_EVERY": "2",
    "SWA_START_FRAC": "1",
    "WARMDOWN_FRAC": "0.9",
    "MUON_SLOW_SHARE": "0.5",
    "MUON_SLOW_START_FRAC": "0.1",
    "MUON_NEURON_NORM": "0.9",
    "PREFIX_TARGET": "0.25",
}


@pytest.fixture(scope="module", params=[{}, QUAINT], ids=["defaults", "quaint"])
def undisturbed(request, tiny_data: TinyData, tmp_path_factory) -> tuple[str, dict]:
    """The artifact of a run of two processes, and its settings."""
    folder, changed = tmp_path_factory.mktemp("undisturbed"), {**LONG, **request.param}
    run_ranks(2, folder / "out", **tiny_job(tiny_data, folder, "whole", **changed))
    return sha(folder / "whole"), changed


def test_sigterm_then_resume_gives_the_same_artifact(
    undisturbed, tiny_data: TinyData, tmp_path: Path
) -> None:
    expected, changed = undisturbed
    job = tiny_job(tiny_data, tmp_path, "cut", **changed)
    ranks = start_ranks(2, tmp_path / "first", **job)
    wait_for(tmp_path / "cut" / "log.txt", r"^step:9/")
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [128 + signal.SIGTERM] * 2
    said = (tmp_path / "first.0").read_text()
    assert re.search(r"^error: SIGTERM after step \d+; RESUME=1 RUN_ID=cut goes on", said, re.M)
    assert len(list((tmp_path / "cut").glob("checkpoint_*.pt"))) == 1
    run_ranks(2, tmp_path / "again", **job, RESUME="1")
    assert sha(tmp_path / "cut") == expected
    log = (tmp_path / "cut" / "log.txt").read_text()
    assert re.search(r"^resumed from step:\d+ ", log, re.M)
    assert re.search(r"^eligible:0 .*resumed from a checkpoint", log, re.M)
    assert events(tmp_path / "cut", "resumed")[0]["step"] > 8


def test_export_resumes_without_training_and_two_checkpoints_are_kept(
    undisturbed, tiny_data: TinyData, tmp_path: Path
) -> None:
    """CHECKPOINT_SECONDS may change on the way; a broken checkpoint is passed over."""
    expected, changed = undisturbed
    job = tiny_job(tiny_data, tmp_path, "kept", **changed)
    run_ranks(2, tmp_path / "first", **job, CHECKPOINT_SECONDS="0.3")
    folder = tmp_path / "kept"
    older, last = sorted(folder.glob("checkpoint_*.pt"), key=lambda p: int(p.stem[11:]))
    assert last.name == "checkpoint_40.pt"
    assert sha(folder) == expected
    (folder / "artifact.bin").unlink()
    copies = [folder / "checkpoint_best.pt", folder / "checkpoint_5_copy.pt"]
    for path in copies:  # somebody's, never read and never deleted
        path.write_bytes(last.read_bytes())
    run_ranks(2, tmp_path / "second", **job, RESUME="1")
    assert len(curve(folder)) == 40
    assert sha(folder) == expected
    last.write_bytes(last.read_bytes()[:-1000])
    run_ranks(2, tmp_path / "third", **job, RESUME="1")
    assert f"warning: {last} cannot be read" in (folder / "log.txt").read_text()
    assert len(curve(folder)) == 40 + 40 - int(older.stem[11:])
    assert sha(folder) == expected
    assert all(path.exists() for path in copies)


def test_a_checkpoint_goes_on_with_another_number_of_processes(
    alone: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    job = tiny_job(tiny_data, tmp_path, "moved", **ROWS)
    ranks = start_ranks(3, tmp_path / "first", **job)
    wait_for(tmp_path / "moved" / "log.txt", r"^step:5/")
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    for rank in ranks:
        rank.join(60)
    run_ranks(2, tmp_path / "again", **job, RESUME="1")
    by_step = {e["step"]: e["train_loss"] for e in events(tmp_path / "moved", "step")}
    assert [by_step[n + 1] for n in range(30)] == pytest.approx(curve(alone), abs=1e-4)


def test_resume_refuses_what_is_not_the_same_run(
    alone: Path, tiny_data: TinyData, tmp_path: Path, capsys, monkeypatch
) -> None:
    job = tiny_job(tiny_data, alone.parent, alone.name, **ROWS)

    def refused(words: str, **changed: str) -> None:
        with environment(**{**job, **changed}):
            assert train_gpt.main([]) == 2
        err = capsys.readouterr().err
        assert words in err, err
        assert err.count("\n") == 1

    before = {path: path.stat().st_mtime_ns for path in alone.iterdir()}
    refused("exists already")
    refused("MATRIX_LR=0.3, but the run in", RESUME="1", MATRIX_LR="0.3")
    refused("of the run to continue", RESUME="1", RUN_ID="")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "__file__", str(tmp_path / "other.py"))
        (tmp_path / "other.py").write_text("x = 1\n")
        refused("the run began with", RESUME="1")
    assert before == {path: path.stat().st_mtime_ns for path in alone.iterdir()}


def test_two_processes_cannot_work_in_one_folder(
    tiny_data: TinyData, tmp_path: Path, capsys
) -> None:
    job = tiny_job(tiny_data, tmp_path, "one", **{**LONG, "ITERATIONS": "2000"})
    (rank,) = start_ranks(1, tmp_path / "first", **job)
    wait_for(tmp_path / "one" / "log.txt", r"^step:2/")
    with environment(**job, RESUME="1"):
        assert train_gpt.main([]) == 2
    assert "another process is at work in" in capsys.readouterr().err
    os.kill(rank.pid, signal.SIGKILL)
    rank.join(60)


def test_resume_without_a_checkpoint_begins_anew(tiny_data: TinyData, tmp_path: Path) -> None:
    """Killed in the middle of a line: the torn line goes, and the run starts over."""
    job = tiny_job(tiny_data, tmp_path, "young", RESUME="1")
    (rank,) = start_ranks(1, tmp_path / "first", **job)
    wait_for(tmp_path / "young" / "log.txt", r"^step:3/")
    os.kill(rank.pid, signal.SIGKILL)
    rank.join(60)
    with open(tmp_path / "young" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"event": "ste')
    run_ranks(1, tmp_path / "again", **job)
    assert [e["step"] for e in events(tmp_path / "young", "step")][-20:] == list(range(1, 21))


# What goes wrong


def test_the_watchdog_names_phase_and_rank(tiny_data: TinyData, tmp_path: Path) -> None:
    job = tiny_job(
        tiny_data, tmp_path, "hung", WATCHDOG_SECONDS="3", **{**LONG, "ITERATIONS": "2000"}
    )
    ranks = start_ranks(3, tmp_path / "out", **job)
    wait_for(tmp_path / "hung" / "log.txt", r"^step:3/")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        for rank in (0, 2):
            ranks[rank].join(60)
            assert ranks[rank].exitcode == 1
            said = (tmp_path / f"out.{rank}").read_text()
            assert re.search(
                rf"^error: rank {rank}, during training: waited 3 s; "
                r"not there: rank 1$",
                said,
                re.M,
            ), said
    finally:
        for rank in ranks:
            rank.kill()


def test_micro_batches_shrink_until_memory_holds_them(
    tiny_data: TinyData, tmp_path: Path, capsys, monkeypatch
) -> None:
    """A forward of more than two rows runs out of memory; what is asked for by name is kept."""
    forward = train_gpt.training_nats

    def small_memory(model, batch, *rest):
        if len(batch.input_ids) > 2 and model.training and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return forward(model, batch, *rest)

    monkeypatch.setattr(train_gpt, "training_nats", small_memory)
    job = tiny_job(
        tiny_data, tmp_path, "small", ITERATIONS="3", TRAIN_BATCH_TOKENS="768", EVAL_BATCH_SEQS="2"
    )
    with environment(**job):
        assert train_gpt.main([]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^out of memory: trying (\d+) rows", out, re.M)[-1] == "2"
    with (
        environment(**{**job, "RUN_ID": "asked", "MICRO_BATCH_SEQS": "4"}),
        pytest.raises(SystemExit) as ended,
    ):
        train_gpt.main([])
    assert ended.value.code == 1
    assert (
        "during priming: OutOfMemoryError: 4 rows a forward are too many: lower "
        "MICRO_BATCH_SEQS" in capsys.readouterr().err
    )


# Two machines


def netns(*arguments: str) -> bool:
    """Whether ip(8) did it."""
    try:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def hosts() -> Iterator[list[tuple[list[str], str, str]]]:
    """Two hosts, (command prefix, address, interface): network namespaces, or else loopback."""
    names = [f"tiny-{os.getpid()}-{n}" for n in range(2)]
    made = all(netns("netns", "add", name) for name in names) and netns(
        "link",
        "add",
        "tiny0",
        "netns",
        names[0],
        "type",
        "veth",
        "peer",
        "name",
        "tiny1",
        "netns",
        names[1],
    )
    for n, name in enumerate(names if made else ()):
        for words in (
            ["addr", "add", f"10.99.0.{n + 1}/24", "dev", f"tiny{n}"],
            ["link", "set", f"tiny{n}", "up"],
            ["link", "set", "lo", "up"],
        ):
            made = made and netns("-n", name, *words)
    try:
        yield (
            [
                (["ip", "netns", "exec", name], f"10.99.0.{n + 1}", f"tiny{n}")
                for n, name in enumerate(names)
            ]
            if made
            else [([], "127.0.0.1", "lo")] * 2
        )
    finally:
        for name in names:
            netns("netns", "del", name)


def test_two_nodes_end_like_one(hosts: list, tiny_data: TinyData, tmp_path: Path) -> None:
    """torchrun --nnodes=2, each host with a process and a run folder's place of its own."""
    job = {**ROWS, "ITERATIONS": "10"}
    run_ranks(2, tmp_path / "out", **tiny_job(tiny_data, tmp_path, "one", **job))
    nodes = []
    for node, (prefix, _, interface) in enumerate(hosts):
        settings = tiny_job(tiny_data, tmp_path / f"host{node}", "two", **job)
        command = [
            *prefix,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node_rank={node}",
            "--nproc_per_node=1",
            f"--master_addr={hosts[0][1]}",
            "--master_port=29617",
            str(TRAINER),
        ]
        with open(tmp_path / f"node{node}", "w") as out:
            nodes.append(
                subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    env={**BARE_ENVIRONMENT, **settings, "GLOO_SOCKET_IFNAME": interface},
                )
            )
    codes = [node.wait(300) for node in nodes]
    assert codes == [0, 0], (tmp_path / "node0").read_text() + (tmp_path / "node1").read_text()
    assert sha(tmp_path / "host0" / "two") == sha(tmp_path / "one")
    assert not (tmp_path / "host1").exists()
