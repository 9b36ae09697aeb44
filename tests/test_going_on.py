"""Runs that begin with another's weights, runs that go on for longer, and their curves."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, TinyData
from hypothesis import given
from hypothesis import strategies as st
from jobs import environment, events, tiny_job
from test_trouble import SMALL

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
import reading
import record

pytestmark = pytest.mark.usefixtures("one_thread")


def job_of(data: TinyData, runs: Path, name: str, **changed: str) -> dict[str, str]:
    """A run of one layer whose rates stay as they begin."""
    return {**tiny_job(data, runs, name), **SMALL, "RUN_ID": name, "ITERATIONS": "4", **changed}


def run(job: dict[str, str], code: int = 0) -> Path:
    """Run a job to its end, which a process of its own would release its lock at; its folder."""
    locks: list[int] = []
    flock = train_gpt.fcntl.flock
    keep = mock.Mock(side_effect=lambda handle, how: locks.append(handle) or flock(handle, how))
    with environment(**job), mock.patch.object(train_gpt.fcntl, "flock", keep):
        try:
            ended = train_gpt.main([])
        except SystemExit as stopped:
            ended = stopped.code
    for handle in locks:
        os.close(handle)
    assert ended == code
    return Path(job["RUNS_DIR"], job["RUN_ID"])


def weights_in(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"checkpoint_{step}.pt", weights_only=True)["model"]


def reasons(folder: Path) -> str:
    return events(folder, "eligibility")[-1]["reasons"]


@pytest.fixture(scope="module")
def first(few_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    return run(job_of(few_data, tmp_path_factory.mktemp("first"), "first"))


# INIT_FROM


@pytest.mark.parametrize("source", ("artifact.bin", "checkpoint_4.pt"))
def test_a_run_begins_with_the_weights_of_another(
    first: Path, few_data: TinyData, tmp_path: Path, source: str
) -> None:
    """Its rates are zero, so that it ends with what it began with, to the bit."""
    given = str(first / source)
    job = job_of(few_data, tmp_path, "next", INIT_FROM=given, LR_MULT="0", SEED="7", ITERATIONS="1")
    begun = weights_in(run(job), 1)
    if source == "artifact.bin":
        _, stored = train_gpt.read_artifact(first / source)
        expected = {name: tensor.restore().float() for name, tensor in stored.items()}
    else:
        expected = weights_in(first, 4)
    assert begun.keys() == expected.keys()
    assert all(torch.equal(begun[name], expected[name]) for name in begun)
    assert "INIT_FROM" in reasons(tmp_path / "next") and "INIT_FROM" not in reasons(first)


def test_a_resumed_run_began_with_the_same_weights(
    first: Path, few_data: TinyData, tmp_path: Path
) -> None:
    """By content: the file may lie elsewhere, but not hold something else."""
    job = job_of(few_data, tmp_path, "next", INIT_FROM=str(first / "artifact.bin"))
    run(job)
    moved = tmp_path / "moved.bin"
    moved.write_bytes((first / "artifact.bin").read_bytes())
    run({**job, "INIT_FROM": str(moved), "RESUME": "1"})
    run({**job, "INIT_FROM": str(first / "checkpoint_4.pt"), "RESUME": "1"}, code=1)
    run({**job, "INIT_FROM": "", "RESUME": "1"}, code=1)


class Bomb:
    """What would run a program if a checkpoint were unpickled as it is."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def saved(state: object, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint with a state of any kind."""
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


def hostile_files(weights: dict[str, torch.Tensor], trace: Path) -> dict[str, bytes]:
    """Files that no run may begin with; `weights` would do."""
    table = weights["tok_emb.weight"]
    vast = torch.ones(1).expand(1 << 20, 1 << 20)
    return {
        "a program": saved({"model": Bomb(trace)}),
        "a program, not packed": pickle.dumps(Bomb(trace)),
        "compressed": saved({"model": weights}, zipfile.ZIP_DEFLATED),
        "no dictionary": saved([1, 2]),
        "no weights": saved({"model": {}}),
        "weights that are text": saved({"model": dict.fromkeys(weights, "text")}),
        "numbers for names": saved({"model": {**weights, 5: torch.ones(1)}}),
        "integers": saved({"model": {name: weight.int() for name, weight in weights.items()}}),
        "without memory": saved({"model": {n: w.to("meta") for n, w in weights.items()}}),
        "sparse": saved({"model": {n: w.to_sparse() for n, w in weights.items()}}),
        "huge": saved({"model": {**weights, "tok_emb.weight": vast}}),
        "one more": saved({"model": {**weights, "moon": torch.ones(2)}}),
        "not finite": saved({"model": {**weights, "tok_emb.weight": table * torch.inf}}),
    }


def test_a_hostile_file_is_refused_in_one_line(
    first: Path, few_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights"
    job = job_of(few_data, tmp_path / "runs", "next", INIT_FROM=str(path))
    for name, content in hostile_files(weights_in(first, 4), trace).items():
        path.write_bytes(content)
        capfd.readouterr()
        run(job, code=2)
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"error: INIT_FROM={path}"), name
        assert not trace.exists() and not (tmp_path / "runs").exists(), name
    path.write_bytes(saved({"model": weights_in(first, 4)}))
    run({**job, "ITERATIONS": "1"})


# A larger budget


def test_a_run_that_goes_on_is_the_longer_run(
    first: Path, few_data: TinyData, tmp_path: Path
) -> None:
    """With rates that stay, four steps and then three more are seven steps, to the bit."""
    whole = run(job_of(few_data, tmp_path, "whole", ITERATIONS="7"))
    job = job_of(few_data, tmp_path, "longer")
    before = (run(job) / "artifact.bin").read_bytes()
    assert before == (first / "artifact.bin").read_bytes()
    longer = run({**job, "RESUME": "1", "ITERATIONS": "7"})
    assert (longer / "artifact.bin").read_bytes() == (whole / "artifact.bin").read_bytes() != before
    read = reading.read_run(longer)
    assert [step["step"] for step in read.all("step")] == [1, 2, 3, 4, 5, 6, 7]
    assert read.one("final") == events(longer, "final")[-1]
    assert record.main(["compare", str(whole), str(longer)]) == 0
    assert "ITERATIONS=7, begun with 4" in reasons(longer)
    assert "begun with" not in reasons(whole)


@pytest.mark.parametrize(
    ("budget", "small", "large"),
    (("MAX_TRAIN_TFLOPS", "0.0003", "0.0006"), ("MAX_WALLCLOCK_SECONDS", "0.4", "0.8")),
)
def test_every_kind_of_budget_may_grow(
    few_data: TinyData, tmp_path: Path, budget: str, small: str, large: str
) -> None:
    """It takes more steps, and the rates are those of the longer run; less or other is refused."""
    job = job_of(few_data, tmp_path, "mine", ITERATIONS="100000", WARMDOWN_FRAC="0.5")
    job.pop("MAX_WALLCLOCK_SECONDS", None)
    folder = run({**job, budget: small})
    steps = events(folder, "trained")[-1]["step"]
    assert events(folder, "step")[-1]["lr_scale"] < 0.2
    run({**job, budget: large, "RESUME": "1"})
    assert events(folder, "trained")[-1]["step"] > steps
    scales = [e["lr_scale"] for e in events(folder, "step") if e["step"] > steps]
    assert scales[0] > 0.5 and scales[-1] < 0.2
    assert f"{budget}=" in reasons(folder)
    run({**job, budget: small, "RESUME": "1"}, code=2)
    run({**job, "MAX_WALLCLOCK_SECONDS": "0", "MAX_TRAIN_TFLOPS": "0", "RESUME": "1"}, code=2)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
)
def test_a_run_of_several_processes_is_read_as_one_training(processes: list) -> None:
    """Each process goes on from a checkpoint of a step that is there, or begins anew."""
    told: list[dict] = []
    trained: list[tuple[int, int]] = []  # (process, step) that count in the end
    for number, (checkpoint, more) in enumerate(processes):
        kept = [one for one in trained if one[1] <= checkpoint]
        first = len(kept)
        trained = kept + [(number, first + n + 1) for n in range(more)]
        told.append({"event": "versions", "of": number})
        if first:
            told.append({"event": "resumed", "step": first})
        told += [{"event": "step", "step": step, "of": n} for n, step in trained if n == number]
        told.append({"event": "final", "of": number})
    read = reading.as_one_training(told)
    steps = [(e["of"], e["step"]) for e in read if e["event"] == "step"]
    assert steps == trained
    assert [e["of"] for e in read if e["event"] in ("versions", "final")] == [number, number]


# Curves


class Writer:
    """Stands for tensorboard's, and for what goes wrong with it."""

    made: list[Writer]
    fails_at = 1 << 30

    def __init__(self, folder: Path, flush_secs: float) -> None:
        self.folder, self.scalars, self.closed = folder, [], False
        self.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if len(self.scalars) == self.fails_at:
            raise OSError(28, "No space left on device")
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("fails_at", (1 << 30, 0, 9))
def test_curves_hold_what_metrics_do_and_never_end_a_run(
    first: Path,
    few_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails_at: int,
) -> None:
    kind = type("Planted", (Writer,), {"made": [], "fails_at": fails_at})
    stub = SimpleNamespace(SummaryWriter=kind)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    folder = run(job_of(few_data, tmp_path, "drawn", LOG_TO="tensorboard"))
    assert (folder / "artifact.bin").read_bytes() == (first / "artifact.bin").read_bytes()
    [writer] = kind.made
    assert writer.folder == folder / "tensorboard"
    if fails_at < 100:
        assert (folder / "log.txt").read_text().count("tensorboard's event files end here") == 1
        assert len(writer.scalars) == fails_at
        return
    assert writer.closed
    losses = [(value, step) for tag, value, step in writer.scalars if tag == "step/train_loss"]
    assert losses == [(e["train_loss"], e["step"]) for e in events(folder, "step")]
    scores = {tag: (value, step) for tag, value, step in writer.scalars if "val_bpb" in tag}
    assert scores == {
        f"{e['name']}/val_bpb": (e["val_bpb"], e["step"] or 4) for e in events(folder, "eval")
    }


def test_event_files_are_read_back_by_tensorboard(few_data: TinyData, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = run(job_of(few_data, tmp_path, "drawn", LOG_TO="tensorboard"))
    read = accumulator.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    drawn = [(point.step, point.value) for point in read.Scalars("step/train_loss")]
    logged = [(e["step"], e["train_loss"]) for e in events(folder, "step")]
    assert drawn == pytest.approx(logged, rel=1e-6)
