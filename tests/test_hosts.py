"""Other hosts of the code: a thread, no console, little room, another folder, plain Python."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import TinyData
from jobs import BARE_ENVIRONMENT, TRAINER, environment, events
from test_going_on import job_of, run

import train_gpt

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_thread_may_train_and_keeps_its_hosts_signals(few_data: TinyData, tmp_path: Path) -> None:
    """Twice in a row, off the main thread and on it."""
    before = [signal.getsignal(number) for number in train_gpt.END_SIGNALS]
    codes = []
    for name in ("thread1", "thread2"):
        with environment(**job_of(few_data, tmp_path, name, ITERATIONS="1")):
            worker = threading.Thread(target=lambda: codes.append(train_gpt.main([])))
            worker.start()
            worker.join()
    assert codes == [0, 0]
    for name in ("main1", "main2"):
        run(job_of(few_data, tmp_path, name, ITERATIONS="1"))
    assert [signal.getsignal(number) for number in train_gpt.END_SIGNALS] == before


@pytest.mark.parametrize("closed", ("<&- >&- 2>&-", ">/dev/full 2>/dev/full"))
def test_a_run_needs_no_console(few_data: TinyData, tmp_path: Path, closed: str) -> None:
    """Its log is whole where the streams of the process were closed from the beginning, or full."""
    job = job_of(few_data, tmp_path, "mine", ITERATIONS="1")
    command = f'"{sys.executable}" "{TRAINER}" {closed}'
    done = subprocess.run(["sh", "-c", command], env={**BARE_ENVIRONMENT, **job}, timeout=300)
    assert done.returncode == 0
    assert events(tmp_path / "mine", "final")
    assert "Traceback" not in (tmp_path / "mine" / "log.txt").read_text()


@pytest.mark.parametrize("may_open", (4, 6, resource.RLIM_INFINITY))
def test_few_files_may_be_open(
    tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch, may_open: int, tmp_path: Path
) -> None:
    """The rows are the same, and no more shards are open than half of what is allowed."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(6):
        shard = tiny_data.data_path / f"fineweb_train_{number % 2:06d}.bin"
        shutil.copy(shard, folder / f"fineweb_train_{number:06d}.bin")
    settings = {**tiny_data.env, "PRESET": "mini", "DATA_PATH": str(folder)}
    with environment():
        cfg = train_gpt.Config.from_env(settings)[0]
    free = train_gpt.TrainingRows(cfg)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (may_open, may_open))
    few = train_gpt.TrainingRows(cfg)
    for first in range(0, 40, 8):
        assert few.batch(first, 8).input_ids.equal(free.batch(first, 8).input_ids)
        assert len(few.opened) <= (may_open // 2 if may_open > 0 else 6)


def test_a_run_goes_on_in_another_place(
    few_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, tokenizer and run lie elsewhere, by relative paths, and the log has another interval.

    What is decided by content is compared by content: other data of the same names are refused.
    """
    job = job_of(few_data, tmp_path / "here", "mine")
    there = tmp_path / "there"
    first = run(job)
    shutil.copytree(first, there / "runs" / "renamed")
    shutil.copytree(few_data.data_path, there / "texts")
    shutil.copy(few_data.tokenizer_path, there / "pieces.model")
    monkeypatch.chdir(there)
    moved = {
        **job,
        "RUNS_DIR": "runs",
        "RUN_ID": "renamed",
        "DATA_PATH": "texts",
        "TOKENIZER_PATH": "./pieces.model",
        "TRAIN_LOG_EVERY": "7",
        "RESUME": "1",
    }
    again = run(moved)
    assert (again / "artifact.bin").read_bytes() == (first / "artifact.bin").read_bytes()
    shutil.copy("texts/fineweb_train_000000.bin", "texts/fineweb_train_000001.bin")
    run(moved, code=1)


def test_eval_says_all_that_an_artifact_lacks(
    few_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """An artifact alone in another folder: split and tokenizer are both named, in one line."""
    artifact = run(job_of(few_data, tmp_path, "mine", ITERATIONS="1")) / "artifact.bin"
    header = train_gpt.read_artifact(artifact)[0]
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for given, lacks in (
        ({}, {"validation", "tokenizer"}),
        ({"DATA_PATH": str(few_data.data_path)}, {"tokenizer"}),
        ({"TOKENIZER_PATH": str(few_data.tokenizer_path)}, {"validation"}),
    ):
        capfd.readouterr()
        with environment(**given):
            assert train_gpt.main(["--eval", str(artifact)]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert {name for name in ("validation", "tokenizer") if header[name][:12] in said} == lacks
    assert not os.listdir(empty)


@pytest.mark.parametrize("argument", ("--help", "--check"))
def test_the_trainer_needs_no_docstrings(few_data: TinyData, tmp_path: Path, argument: str) -> None:
    """python -OO takes docstrings and assertions away."""
    job = {**BARE_ENVIRONMENT, **job_of(few_data, tmp_path, "mine")}
    command = [sys.executable, "-OO", str(TRAINER), argument]
    done = subprocess.run(command, env=job, text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert not done.stdout.startswith("None")
