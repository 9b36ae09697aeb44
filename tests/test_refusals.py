"""What a run cannot use is refused before any work, in one line, and nothing on disk changes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import Field, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TinyData
from jobs import TINY, environment, launch, snapshot, tiny_job, write_tokens

import train_gpt
from train_gpt import Knob, Stored, encode_artifact, knob_of, main


@pytest.fixture
def place(tiny_data: TinyData, tmp_path: Path) -> Path:
    """A folder with the data, an empty runs/ and an artifact, all of it a test may damage."""
    shutil.copytree(tiny_data.data_path.parents[1], tmp_path / "data")
    (tmp_path / "runs").mkdir()
    header = {"settings": {}, "tokenizer": "", "validation": ""}
    (tmp_path / "artifact.bin").write_bytes(
        encode_artifact(header, {"w": Stored(torch.ones(64).half())})
    )
    return tmp_path


def settings_of(place: Path, data: TinyData, **changed: str) -> dict[str, str]:
    """A tiny run's settings on a place's own data."""
    root = data.data_path.parents[1]
    return {
        **TINY,
        "VOCAB_SIZE": data.env["VOCAB_SIZE"],
        "RUNS_DIR": str(place / "runs"),
        "DATA_PATH": str(place / "data" / data.data_path.relative_to(root)),
        "TOKENIZER_PATH": str(place / "data" / data.tokenizer_path.relative_to(root)),
        **changed,
    }


def shard(place: Path) -> Path:
    """The second training shard of a place."""
    return next(place.glob("data/datasets/*/fineweb_train_000001.bin"))


def cut_shard(place: Path) -> None:
    """Leave a training shard as an interrupted copy would."""
    os.truncate(shard(place), shard(place).stat().st_size - 1000)


def cut_artifact(place: Path) -> None:
    """Leave the artifact as an interrupted copy would."""
    os.truncate(place / "artifact.bin", 100)


def make_run(place: Path) -> None:
    """Leave a run of another day."""
    (place / "runs" / "mine").mkdir()
    (place / "runs" / "mine" / "log.txt").write_text("a result\n")


def nothing(place: Path) -> None:
    """Damage nothing."""


REFUSED = {
    "misspelled": (nothing, {"MATIRX_LR": "0.1"}, ["MATIRX_LR", "MATRIX_LR"]),
    "nan": (nothing, {"EMA_DECAY": "nan"}, ["EMA_DECAY=", "nan", "0.999999"]),
    "False": (nothing, {"TIE_EMBEDDINGS": "False"}, ["TIE_EMBEDDINGS='False'", "0 or 1"]),
    "truncated shard": (cut_shard, {}, ["fineweb_train_000001.bin", "prepare.py"]),
    "token beyond the vocabulary": (
        lambda place: write_tokens(shard(place), [1, 320] * 99),
        {},
        ["fineweb_train_000001.bin", "320", "VOCAB_SIZE=320"],
    ),
    "tokenizer of another vocabulary": (nothing, {"VOCAB_SIZE": "512"}, ["320 pieces", "512"]),
    "missing data folder": (
        lambda place: shutil.rmtree(shard(place).parent),
        {},
        ["DATA_PATH=", "prepare.py"],
    ),
    "existing RUN_ID": (make_run, {"RUN_ID": "mine"}, ["RUN_ID=mine", "exists already"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_refused_in_one_line_before_anything_is_written(
    case: str, place: Path, tiny_data: TinyData, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, changed, said = REFUSED[case]
    damage(place)
    before, settings = snapshot(place), settings_of(place, tiny_data, **changed)
    job = launch(cwd=place, **settings)
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith("error: ")
    assert len(job.stderr.splitlines()) == 1
    assert all(part in job.stderr for part in said), job.stderr
    with environment(**settings):
        assert main(["--check"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    assert all(part in err for part in said), err
    assert snapshot(place) == before


def test_check_accepts_a_run_to_resume_and_best_without_brotli(
    place: Path,
    tiny_data: TinyData,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_run(place)
    monkeypatch.setitem(sys.modules, "brotli", None)
    with environment(**settings_of(place, tiny_data, RUN_ID="mine", RESUME="1", CODEC="best")):
        assert main(["--check"]) == 0
    with environment(**settings_of(place, tiny_data, CODEC="brotli")):
        assert main(["--check"]) == 2
    assert "CODEC=brotli needs the Python package" in capfd.readouterr().err


@pytest.fixture
def checkout(place: Path) -> Path:
    """The place with run.sh and the trainer in it, set up with the Python that runs the tests."""
    for name in ("run.sh", "train_gpt.py", "requirements.txt"):
        shutil.copy(ROOT / name, place / name)
    (place / ".venv" / "bin").mkdir(parents=True)
    python = place / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    packages = (place / "requirements.txt").read_text()
    stamp = place / ".venv" / "requirements.txt.stamp"
    stamp.write_text(f"Python {platform.python_version()}\n{packages}")
    return place


@pytest.mark.parametrize("case", REFUSED)
def test_run_sh_passes_a_refusal_through(case: str, checkout: Path, tiny_data: TinyData) -> None:
    damage, changed, said = REFUSED[case]
    damage(checkout)
    before = snapshot(checkout)
    ours = settings_of(checkout, tiny_data, **changed)
    job = subprocess.run(
        [str(checkout / "run.sh")],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **ours},
    )
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith("error: ")
    assert len(job.stderr.splitlines()) == 1, job.stderr
    assert all(part in job.stderr for part in said), job.stderr
    assert snapshot(checkout) == before


@pytest.mark.parametrize(
    "damage",
    [
        cut_artifact,
        lambda place: (place / "artifact.bin").unlink(),
    ],
    ids=["truncated", "missing"],
)
def test_a_damaged_artifact_is_refused_in_one_line(damage: Callable, place: Path) -> None:
    damage(place)
    before = snapshot(place)
    job = launch("--eval", "artifact.bin", cwd=place)
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith("error: artifact.bin: ")
    assert len(job.stderr.splitlines()) == 1
    assert snapshot(place) == before


def test_one_process_of_several_says_why(place: Path, tiny_data: TinyData) -> None:
    job = launch(processes=2, cwd=place, **settings_of(place, tiny_data, DATA_PATH="not/here"))
    assert job.returncode != 0
    assert [line[:23] for line in job.stderr.splitlines() if line.startswith("error: ")] == [
        "error: DATA_PATH=not/he"
    ]
    assert list((place / "runs").iterdir()) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"EVAL_TRUNCATE": "1", "EVAL_SEQ_LEN": "8192"},
        {"TRAIN_SEQ_LEN": "65536", "TRAIN_BATCH_TOKENS": "65536"},
        {"RUN_ID": "x" * 300},
        {"ATTENTION": "fa3"},
    ],
    ids=["no target left", "no row", "long RUN_ID", "no kernel"],
)
def test_check_finds_what_would_fail_later(
    changed: dict[str, str], place: Path, tiny_data: TinyData, capfd: pytest.CaptureFixture[str]
) -> None:
    with environment(**settings_of(place, tiny_data, **changed)):
        assert main(["--check"]) == 2
    err = capfd.readouterr().err
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert any(name in err for name in changed), err


def test_check_of_what_can_run_changes_nothing(
    place: Path, tiny_data: TinyData, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(place)
    with environment(**settings_of(place, tiny_data, RUN_ID="new", EMA_ENABLED="1")):
        assert main(["--check"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "EMA_ENABLED=1 read as AVG_MODE=ema" in out
    assert "training tokens in 2 shards" in out
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "arguments", [["--chekc"], ["--check", "--plan"], ["--eval"], ["SEED=1"], ["--eval", "a", "b"]]
)
def test_an_unknown_argument_is_refused(
    arguments: list[str], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with environment():
        assert main(arguments) == 2
    err = capfd.readouterr().err
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert arguments[0] in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mlp_act", "relu2"),  # read where layers are made
        ("logit_softcap", "15"),  # and these in the forward alone
        ("rope_base", "100"),
        ("rope_ntk_ref", "8"),
        ("token_mask", "eval"),  # read by scoring
    ],
)
def test_a_setting_that_an_artifact_needs_is_refused_if_it_does_not_travel(
    name: str,
    value: str,
    few_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def misdeclared(setting: Field) -> Knob:
        knob = knob_of(setting)
        return replace(knob, reach="training") if setting.name == name else knob

    monkeypatch.setattr(train_gpt, "knob_of", misdeclared)
    given = {"ITERATIONS": "1", name.upper(): value}
    with environment(**tiny_job(few_data, tmp_path, "run", **given)):
        assert main([]) == 2
    assert f"error: {name.upper()} is read by" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == (name == "token_mask")
