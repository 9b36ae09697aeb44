"""The job queue and the ablation table, on runs of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TinyData
from jobs import BARE_ENVIRONMENT, TINY
from scipy import stats

SETTINGS = " ".join(f"{name}={value}" for name, value in {**TINY, "ITERATIONS": "4"}.items())


def script(name: str):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run_queue, ablations = script("run_queue"), script("ablations")


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A folder for job lists and runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def data(tiny_data: TinyData) -> str:
    """Settings of the tiny data, as a job names them."""
    return " ".join(shlex.quote(f"{name}={value}") for name, value in tiny_data.env.items())


def write_jobs(place: Path, *lines: str) -> Path:
    (place / "jobs.txt").write_text("\n".join(lines))
    return place / "jobs.txt"


def test_jobs_run_once_each_and_unfinished_ones_again(place, data, capsys):
    jobs = write_jobs(
        place, f"one {SETTINGS} {data} SEED=1  # the first", f"two {SETTINGS} {data} SEED=2"
    )
    runs = place / "runs"
    assert run_queue.main([str(jobs), str(runs), "--at-once", "2"]) == 0
    scores = {name: (runs / name / "metrics.jsonl").read_text() for name in ("one", "two")}
    assert all('"event": "final"' in text for text in scores.values())
    # One loses its end, as a run that was killed has none.
    events = scores["two"].splitlines(keepends=True)
    (runs / "two" / "metrics.jsonl").write_text("".join(events[:-1]))
    assert run_queue.main([str(jobs), str(runs), "--dry"]) == 0
    assert "1 of 2 jobs are left: two" in capsys.readouterr().out
    assert run_queue.main([str(jobs), str(runs)]) == 0
    assert (runs / "one" / "metrics.jsonl").read_text() == scores["one"]
    again = json.loads((runs / "two" / "metrics.jsonl").read_text().splitlines()[-1])
    assert again == json.loads(events[-1])
    assert (runs / "unfinished" / "two.1" / "log.txt").exists()
    # The name of a finished run cannot be given to another one.
    jobs = write_jobs(place, f"one {SETTINGS} {data} SEED=3")
    assert run_queue.main([str(jobs), str(runs)]) == 2
    assert "SEED=1" in capsys.readouterr().err


def test_a_job_that_fails_is_told_and_the_others_go_on(place, data, capsys):
    jobs = write_jobs(
        place, f"lost {SETTINGS} DATA_PATH={place}/nowhere", f"good {SETTINGS} {data}"
    )
    assert run_queue.main([str(jobs), str(place / "runs")]) == 1
    said = capsys.readouterr()
    assert "lost: exit 2" in said.out + said.err
    assert '"event": "final"' in (place / "runs" / "good" / "metrics.jsonl").read_text()


def test_a_run_over_its_limit_fails_once_and_is_told_again(place, data, capsys):
    jobs = write_jobs(place, f"big {SETTINGS} {data} ARTIFACT_LIMIT_BYTES=1000")
    assert run_queue.main([str(jobs), str(place / "runs")]) == 1
    assert "big: exit 3" in "".join(capsys.readouterr())
    assert run_queue.main([str(jobs), str(place / "runs")]) == 0
    said = "".join(capsys.readouterr())
    assert re.search(r"big: finished, [\d,]{7,} bytes over its limit", said)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a MATIRX_LR=1"], "MATRIX_LR"),
        (["a SEED=1", "a SEED=2"], "second job"),
        (["a SEED"], "NAME=value"),
        (["SEED=1"], "NAME=value"),
        (["a RUN_ID=b"], "the queue's to set"),
        (["a/b SEED=1"], "RUN_ID"),
        (["a 'SEED=1"], "line 1: No closing quotation"),
        (["# nothing"], "no job"),
        (["a FOO=1"], "FOO is not a setting"),
    ],
)
def test_a_wrong_list_is_refused_before_anything_runs(place, capsys, lines, said):
    assert run_queue.main([str(write_jobs(place, *lines)), str(place / "runs")]) == 2
    assert said in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_no_jobs_at_once_are_refused(place, capsys):
    jobs = write_jobs(place, f"a {SETTINGS}")
    assert run_queue.main([str(jobs), str(place / "runs"), "--at-once", "0"]) == 2
    assert "--at-once 0: expected 1 or more" in capsys.readouterr().err


def test_jobs_driven_by_the_clock_run_alone(place, capsys):
    jobs = write_jobs(place, "a PRESET=mini")
    assert run_queue.main([str(jobs), str(place / "runs"), "--at-once", "2"]) == 2
    assert "one at a time" in capsys.readouterr().err


def test_a_stopped_queue_ends_its_job_and_goes_on_later(place, data):
    long = SETTINGS.replace("ITERATIONS=4", "ITERATIONS=100000")
    jobs, runs = write_jobs(place, f"long {long} {data}"), place / "runs"
    process = subprocess.Popen(
        [sys.executable, ROOT / "benchmarks" / "run_queue.py", jobs, runs],
        env=BARE_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 60
    while "step:" not in (runs / "long.out").read_text() if (runs / "long.out").exists() else True:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    second = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run_queue.py", jobs, runs],
        env=BARE_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 2
    assert "another queue" in second.stderr
    process.send_signal(signal.SIGHUP)  # as all of train_gpt.END_SIGNALS
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "goes on from here" in said
    assert '"final"' not in (runs / "long" / "metrics.jsonl").read_text()


def made_run(folder: Path, score: float, machine: str = "a") -> None:
    folder.mkdir(parents=True)
    events = (
        {"event": "machine", "name": machine},
        {"event": "source", "sha256": "5" * 64},
        {"event": "summary", "steps": 600},
        {"event": "final", "val_bpb": score},
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_effects_are_paired_and_their_variance_is_pooled(tmp_path):
    rng = random.Random(0)
    names = ["xsa", "with_vrl_add", "ema"]
    scores = {(name, seed): rng.gauss(2, 0.01) for name in ("base", *names) for seed in (1, 2, 3)}
    for (name, seed), score in scores.items():
        made_run(tmp_path / f"{name}_seed{seed}", score)
    (tmp_path / "ema_seed4").mkdir()  # begun, and without a base
    (tmp_path / "ema_seed4" / "metrics.jsonl").write_text("")
    results = ablations.finished(tmp_path)
    results["ema_seed1 on b"] = results["ema_seed4 on a"] = {"val_bpb": 0.0}  # without a base
    for name, changed in (("base", {}), ("ema", {"source": "6"})):  # a base of another source
        results[f"{name}_seed5 on a"] = {**results["base_seed1 on a"], **changed}
    found = {effect.name: effect for effect in ablations.effects(results)}
    gained = {
        name: [
            (-1 if name.startswith("with_") else 1) * (scores[name, s] - scores["base", s])
            for s in (1, 2, 3)
        ]
        for name in names
    }
    deviation = np.sqrt(np.mean([statistics.variance(d) for d in gained.values()]))
    for name, values in gained.items():
        assert found[name].differences == pytest.approx(values)
        assert found[name].half_width == pytest.approx(
            stats.t.ppf(0.975, 6) * deviation / np.sqrt(3)
        )
        tells = abs(np.mean(values)) > found[name].half_width
        assert (found[name].verdict != "cannot tell") == tells
    text = ablations.table(list(found.values()), {"base": 10.0, "xsa": 8.0})
    assert "| +2.0 |" in text  # with XSA a step costs two milliseconds more
    ablations.draw(list(found.values()), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_results_are_collected_from_several_machines(tmp_path):
    file = tmp_path / "results.json"
    for machine, seed, base, changed in (
        ("a", 1, 2.0, 2.125),
        ("b", 1, 1.0, 1.25),
        ("b", 2, 1.5, 1.75),
    ):
        made_run(tmp_path / machine / f"base_seed{seed}", base, machine)
        made_run(tmp_path / machine / f"xsa_seed{seed}", changed, machine)
        ablations.collect(tmp_path / machine, file)
    ablations.collect(tmp_path / "a", file)  # again changes nothing
    (effect,) = ablations.effects(json.loads(file.read_text()))
    assert (effect.name, effect.differences) == ("xsa", [(0.125 + 0.25) / 2, 0.25])
    made_run(tmp_path / "other" / "base_seed1", 3.0, "a")
    before = file.read_text()
    with pytest.raises(SystemExit, match="base_seed1 on a is there"):
        ablations.collect(tmp_path / "other", file)
    assert file.read_text() == before


def test_ablations_change_what_they_say(place, capsys):
    ablations.print_jobs([1])
    jobs = run_queue.read_jobs(write_jobs(place, capsys.readouterr().out))
    settings = {job.name: run_queue.asdict(job.config) for job in jobs}
    base = settings.pop("base_seed1")
    assert len(settings) >= 20
    assert set(settings) == {f"{name}_seed1" for name in ablations.ABLATIONS}
    assert set(list(settings)[-len(ablations.VARIANTS) :]) == {
        f"{name}_seed1" for name in ablations.VARIANTS
    }
    for name, changed in settings.items():
        assert {key for key in base if base[key] != changed[key]} - {"run_id"}, name
