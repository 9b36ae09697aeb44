"""The records tool: folders made of runs alone, every changed digit found, honest comparison."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TinyData
from hypothesis import assume, given
from hypothesis import strategies as st
from jobs import environment, tiny_job
from scipy import stats

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
import artifact
import changes
import compliance
import record
import rederive

SEEDS = ("1", "2", "3")
TRACK = "track_cpu_5min"
RULES = record.TRACKS[TRACK]
CLOCKED = {"MAX_WALLCLOCK_SECONDS": "2", "ITERATIONS": "20000", "TRAIN_LOG_EVERY": "1000"}
ABOUT = (
    "--name",
    "Tiny",
    "--author",
    "Ann",
    "--github-id",
    "ann",
    "--blurb",
    "A trial.",
    "--date",
    "2026-01-02",
)


@pytest.fixture(scope="module", autouse=True)
def tiny_track():
    """The CPU track for the tests' own text; a busy machine passes two seconds now and then."""
    rules = record.TRACKS[TRACK]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            record.TRACKS,
            TRACK,
            {
                **rules,
                "dataset": "",
                "machine": "1 x .*",
                "reasons": (*rules["reasons"], "training and calibration"),
            },
        )
        yield


def job(data: TinyData, runs_dir: Path, name: str, **changed: str) -> Path:
    """A clock-driven run of two seconds whose log shows a dozen steps; returns its folder."""
    settings = {**CLOCKED, **changed}
    with environment(**tiny_job(data, runs_dir, name, **settings)):
        assert train_gpt.main([]) == 0
    return runs_dir / name


@pytest.fixture(scope="module")
def runs(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of one configuration."""
    folder = tmp_path_factory.mktemp("runs")
    return [job(tiny_data, folder, f"seed-{seed}", SEED=seed) for seed in SEEDS]


def new(run_folders: list[Path], root: Path, *more: str) -> int:
    return record.main(["new", *map(str, run_folders), *ABOUT, "--root", str(root), *more])


@pytest.fixture(scope="module")
def made(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entry made of them."""
    root = tmp_path_factory.mktemp("records")
    assert new(runs, root) == 0
    return root / TRACK / "2026-01-02_Tiny"


@pytest.fixture
def entry(made: Path, tmp_path: Path) -> Path:
    """A copy of the entry to tamper with."""
    return Path(shutil.copytree(made, tmp_path / made.name))


@pytest.fixture
def copies(runs: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the run folders to tamper with."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]


def rehash(folder: Path) -> None:
    """What a forger would do: list the files as they are now."""
    path = folder / "submission.json"
    claims = json.loads(path.read_text())
    claims["files"] = {name: record.sha256(folder / name) for name in claims["files"]}
    path.write_text(json.dumps(claims, indent=1) + "\n")


# What an entry holds


def test_an_entry_checks_and_holds_what_the_contract_names(made: Path, capsys) -> None:
    assert record.main(["check", str(made)]) == 0
    assert capsys.readouterr().out.endswith(f"\n{made}: ok (own format)\n")
    names = {path.name for path in made.iterdir()}
    assert names == {
        "README.md",
        "submission.json",
        "train_gpt.py",
        "settings.json",
        "requirements.txt",
        "artifact.bin",
        "loss.png",
        "bytes.png",
        "bpb.png",
        *(f"train_seed{s}.log" for s in SEEDS),
        *(f"metrics_seed{s}.jsonl" for s in SEEDS),
    }


def test_numbers_are_those_of_the_logs(made: Path, runs: list[Path]) -> None:
    claims = json.loads((made / "submission.json").read_text())
    scores = [
        float(re.findall(r"^val_bpb:([0-9.]+)", (run / "log.txt").read_text(), re.M)[0])
        for run in runs
    ]
    assert claims["val_bpb"] == pytest.approx(sum(scores) / 3, abs=1e-8)
    variance = sum((score - sum(scores) / 3) ** 2 for score in scores) / 2
    assert claims["val_bpb_std"] == pytest.approx(math.sqrt(variance), abs=1e-8)
    assert claims["bytes_code"] == (made / "train_gpt.py").stat().st_size
    assert claims["bytes_total"] == claims["bytes_code"] + max(
        (run / "artifact.bin").stat().st_size for run in runs
    )
    assert claims["seeds"] == [1, 2, 3]
    best = runs[scores.index(min(scores))]
    assert (made / "artifact.bin").read_bytes() == (best / "artifact.bin").read_bytes()
    assert all(claims["compliance"].values())
    assert len(claims["compliance"]) == 6
    shown = [float(x) for x in re.findall(r"\d\.\d{6}", (made / "README.md").read_text())]
    assert all(min(abs(score - x) for x in shown) < 6e-7 for score in scores)


def test_the_folder_scores_again_with_its_own_script(made: Path, tiny_data: TinyData) -> None:
    with environment(
        **{name: value for name, value in tiny_data.env.items() if name != "VOCAB_SIZE"}
    ):
        assert record.main(["check", str(made), "--rescore"]) == 0
    assert not list(made.glob("__pycache__"))


# Tampering


def change(path: Path, pattern: str, replacement: str | None = None) -> None:
    """Replace the first match; without a replacement, its one digit outside groups by the next."""

    def next_digit(match: re.Match) -> str:
        return match[1] + str((int(match[0][len(match[1])]) + 1) % 10)

    text = path.read_text()
    changed = re.sub(
        pattern, next_digit if replacement is None else replacement, text, count=1, flags=re.M
    )
    assert changed != text
    path.write_text(changed)


TAMPERINGS = {
    "a digit of a step": ("train_seed2.log", r"^(step:4/.* train_loss:\d\.\d{3})\d", None),
    "a digit of the score": ("train_seed2.log", r"^(val_bpb:\d\.)\d", None),
    "a digit of the metrics": ("metrics_seed1.jsonl", r'("event": "final", "val_bpb": )\d', None),
    "a loss in the metrics": ("metrics_seed1.jsonl", r'("train_loss": )\d', None),
    "a setting": ("settings.json", r'("matrix_lr": 0\.0)\d', None),
    "a setting in a log": ("train_seed3.log", r"^(. EMA_DECAY +0\.)\d", None),
    "a log line gone": ("train_seed3.log", r"^gptq:quantized.*\n", ""),
    "a score before the last": ("train_seed2.log", r"^(artifact_chunked val_bpb:\d\.)\d", None),
    "a size in a line of no event": ("train_seed1.log", r"^(Serialized model \w+\+\w+: )\d", None),
    "the code's size": ("train_seed3.log", r"^(Code size: )\d", None),
    "a header line": ("train_seed3.log", r"^(train_batch_tokens:)\d", None),
    "a header line gone": ("train_seed1.log", r"^world_size:.*\n", ""),
    "a step line gone": ("train_seed1.log", r"^step:7/.*\n", ""),
    "a line more": ("train_seed2.log", r"^(params:)", r"legal score 1.05000000\n\1"),
    "words more": ("train_seed2.log", r"^(params:)", r"checked by the organisers\n\1"),
    "a step line twice": ("train_seed2.log", r"^(step:4/.*\n)", r"\1\1"),
    "steps in another order": ("train_seed2.log", r"^(step:\d+/.*\n)(step:\d+/.*\n)", r"\2\1"),
    "a mark of the listing": ("train_seed2.log", r"^\* NUM_LAYERS", "  NUM_LAYERS"),
    "a default in the listing": ("train_seed2.log", r"^(\* NUM_LAYERS .*; default )\d", None),
    "a heading in the blurb": ("submission.json", r"A trial\.", "<h2>Results</h2>"),
    "a setting gone": ("settings.json", r'^ "qat_mode".*\n', ""),
    "prose in the README": ("README.md", r"^## Timing$", "val_bpb is 1.01.\n\n## Timing"),
    "the command": ("README.md", r"(MATRIX_LR=0\.0|NUM_LAYERS=)\d", None),
    "a claim more": ("submission.json", r"^ \"val_bpb\"", ' "best_bpb": 1.01,\n "val_bpb"'),
    "a claim twice": ("submission.json", r"^\{", '{\n "val_bpb": 1.01,'),
    "a number as text": ("submission.json", r'("bytes_code": )(\d+)', r'\1"\2"'),
    "no number": ("submission.json", r'("val_bpb_std": )[0-9.e-]+', r"\1NaN"),
    "a number without end": ("submission.json", r'("bytes_code": )\d+', r"\g<1>" + "9" * 400),
    "a rule that does not hold": ("submission.json", r'("causality": )true', r"\1false"),
    "no rules": ("submission.json", r'"compliance": \{[^}]*\}', '"compliance": null'),
    "an author that is none": ("submission.json", r'("author": )"Ann"', r"\1null"),
    "a block in the blurb": ("submission.json", r"A trial\.", "<!-- record.py 1: results -->"),
    "a final line gone": ("train_seed3.log", r"^params:.*\n", ""),
    "a digit of the README": ("README.md", r"(\| \*\*\d\.)\d", None),
    "a digit of the mean": ("submission.json", r'^( "val_bpb": \d\.)\d', None),
    "a digit of the spread": ("submission.json", r'^( "val_bpb_std": \d\.\d)\d', None),
    "the last digit of the mean": ("submission.json", r'^( "val_bpb": [0-9.]*)\d(?=,)', None),
    "iterations of a step": ("metrics_seed2.jsonl", r'("step": 12, "iterations": )\d', None),
    "a seed's result": ("submission.json", r'("val_loss": \d\.\d\d)\d', None),
    "the size": ("submission.json", r'("bytes_total": )\d', None),
    "the script": ("train_gpt.py", r"^import math$", "import math  # slip"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_change_is_found_and_its_place_named(what: str, entry: Path, capsys) -> None:
    """Even by one who lists the files anew; without that, sha256 finds any."""
    name, pattern, replacement = TAMPERINGS[what]
    change(entry / name, pattern, replacement)
    if name != "submission.json":
        rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    out = capsys.readouterr().out
    assert name in out, out


def test_a_file_changed_is_found_by_its_hash(entry: Path, capsys) -> None:
    with open(entry / "loss.png", "ab") as f:
        f.write(b"x")
    change(entry / "metrics_seed2.jsonl", r'("mib": \d+\.\d)\d')
    assert record.main(["check", str(entry)]) == 1
    out = capsys.readouterr().out
    assert "loss.png: changed" in out
    assert "metrics_seed2.jsonl: changed" in out


def in_both(entry: Path, **edits: object) -> None:
    """Change facts of events in the metrics of all seeds, and in their logs what they printed."""
    for seed in SEEDS:
        metrics, log = entry / f"metrics_seed{seed}.jsonl", entry / f"train_seed{seed}.log"
        script, lines = (entry / "train_gpt.py").read_text(), log.read_text()
        run = record.read_run(log, metrics, entry / "settings.json")
        before = [said for _, _, said, _ in record.lines_of(run, script)]
        for event in run.events:
            for key, edit in edits.items():
                kind, _, fact = key.partition("__")
                if event["event"] == kind and fact in event:
                    event[fact] = edit(event[fact])
        run.events = [event for event in run.events if None not in event.values()]
        after = [said for _, _, said, _ in record.lines_of(run, script)]
        if len(before) != len(after):
            gone = set().union(*before) - set().union(*after)
            lines = "".join(f"{x}\n" for x in lines.splitlines() if x not in gone)
        else:
            for old, new in zip(before, after, strict=True):
                for was, now in zip(old, new, strict=True):
                    lines = lines.replace(f"{was}\n", f"{now}\n")
        metrics.write_text("".join(json.dumps(event) + "\n" for event in run.events))
        log.write_text(lines)
    claims = json.loads((entry / "submission.json").read_text())
    runs, script = record.read_entry(entry), (entry / "train_gpt.py").read_bytes()
    facts = record.entry_facts(runs, script, claims)
    (entry / "README.md").write_text(record.readme(facts, runs, script))
    (entry / "submission.json").write_text(json.dumps({**facts, "files": claims["files"]}))
    rehash(entry)


def test_a_fact_more_in_one_seed_is_found(entry: Path, capsys) -> None:
    change(entry / "metrics_seed2.jsonl", r'("event": "model")', r'\1, "checked": true')
    rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    assert "the runs differ in which facts their events 'model' hold" in capsys.readouterr().out


def test_code_beside_the_script_is_found(entry: Path, capsys) -> None:
    """It would be imported from there, and its bytes be counted nowhere."""
    for name in ("helper.py", ".helper.py"):
        (entry / name).write_text("weights = b''\n")
    path = entry / "submission.json"
    path.write_text(
        path.read_text().replace('"files": {', '"files": {"helper.py": "", ".helper.py": "",')
    )
    rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    out = capsys.readouterr().out
    assert "helper.py: no file of an entry" in out
    assert ".helper.py: no file of an entry" in out
    assert "not listed" not in out


def test_a_folder_is_called_by_date_and_name(made: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(made, tmp_path / "2026-01-03_Tiny")
    assert record.main(["check", str(folder)]) == 1
    assert "its date and name make '2026-01-02_Tiny'" in capsys.readouterr().out


def test_redraw_writes_what_is_generated_and_nothing_else(entry: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in entry.iterdir()}
    for name in ("README.md", "loss.png"):
        (entry / name).write_bytes(b"old")
    claims = json.loads(before["submission.json"])
    (entry / "submission.json").write_text(json.dumps({**claims, "val_bpb": 1.0}))
    (entry / "NOTES.md").write_text("My notes.\n")
    assert record.main(["redraw", str(entry)]) == 0
    assert before == {
        path.name: path.read_bytes() for path in entry.iterdir() if path.name != "NOTES.md"
    }
    assert record.main(["check", str(entry)]) == 0
    change(entry / "metrics_seed1.jsonl", r'("train_loss": )\d')
    assert record.main(["redraw", str(entry)]) == 1
    assert "metrics_seed1.jsonl: not as submission.json lists it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        (
            {
                "eval__num_bytes": lambda n: 2 * n,
                "eval__val_bpb": lambda x: x / 2,
                "final__val_bpb": lambda x: x / 2,
            },
            "targets, the split has",
        ),
        ({"summary__seconds": lambda s: s / 2}, "train_seconds"),
        ({"activity__steps": lambda n: max(1, n - 1)}, "the steps give"),
        ({"step__ms": lambda ms: ms / 2}, "step_avg"),
        ({"artifact__left": lambda n: n + 10}, "artifact left"),
        ({"calibrated__tokens": lambda n: n + 1}, "calibrated on"),
        ({"val_data__pattern": lambda p: "x" + p}, "but DATA_PATH is"),
        ({"size__integers": lambda n: n + 1}, "artifact.bin: mlp has"),
        ({"size__entropy": lambda n: n + 1}, "artifact.bin: the entropy of mlp"),
        ({"summary__eval_seconds": lambda s: s / 1000}, "scoring took"),
        ({"summary__rate": lambda r: 2 * r}, "tokens a second"),
        ({"summary__params": lambda n: n - 1000}, "parameters in the summary"),
        ({"machine__world_size": lambda n: 64}, "ran on 64 x"),
        (
            {"activity__name": lambda name: None if name == "warmdown" else name},
            "warmdown is configured and the activity ledger lacks it",
        ),
        ({"eval__name": lambda name: None if name == "float_chunked" else name}, "float_chunked"),
    ],
)
def test_one_lie_told_everywhere_is_found(edits, words, entry: Path, capsys) -> None:
    """Log, metrics, claims and README changed alike, files listed anew."""
    try:
        in_both(entry, **edits)
    except record.Wrong:
        rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    assert words in capsys.readouterr().out


def test_what_is_no_plain_file_is_found(entry: Path, tmp_path: Path, capsys) -> None:
    shutil.move(entry / "loss.png", tmp_path / "loss.png")
    (entry / "loss.png").symlink_to(tmp_path / "loss.png")
    (entry / "folder").mkdir()
    (entry / "line\nbreak").write_text("")
    path = entry / "submission.json"
    path.write_text(path.read_text().replace('"files": {', '"files": {"../tampered": "x",'))
    assert record.main(["check", str(entry)]) == 1
    out = capsys.readouterr().out
    for words in (
        "loss.png: not a plain file",
        "folder: not a plain file",
        "line\\nbreak: not",
        "../tampered: belongs",
    ):
        assert words in out


def test_a_folder_in_the_wrong_track_is_found(made: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(made, tmp_path / "track_10min_16mb" / made.name)
    assert record.main(["check", str(folder)]) == 1
    assert "the folder lies in track_10min_16mb" in capsys.readouterr().out


def test_check_never_runs_the_script_and_is_not_fooled_by_its_exit(
    entry: Path, tmp_path: Path, capsys
) -> None:
    script = entry / "train_gpt.py"
    script.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nprint('val_bpb:1.0')\n"
        f"raise SystemExit(0)\n{script.read_text()}"
    )
    assert record.main(["check", str(entry)]) == 1
    assert not (tmp_path / "ran").exists()
    found = [
        *record.check_score_again(entry, record.read_entry(entry)),
        *record.check_rules_again(entry, json.loads((entry / "submission.json").read_text())),
    ]
    assert any("the log says" in finding for finding in found)
    assert any("the rules cannot be tried" in finding for finding in found)


@pytest.mark.parametrize(
    "text", ["x = " + "-" * 200_000 + "1", "\0", "class Config:\n a: int = f()"]
)
def test_a_broken_script_is_one_line(text: str, entry: Path, capsys) -> None:
    (entry / "train_gpt.py").write_text(text)
    assert record.main(["check", str(entry)]) == 1
    assert "Traceback" not in capsys.readouterr().out


def test_an_honest_number_of_one_log_alone_is_no_finding(entry: Path, capsys) -> None:
    """What a log says once and no event holds: the time that scoring was expected to take."""
    change(entry / "train_seed1.log", r"^scoring expected:\d+s", "scoring expected:7919s")
    rehash(entry)
    assert record.main(["check", str(entry)]) == 0
    assert "cannot be verified: log line 'scoring expected:Ns'" in capsys.readouterr().out
    change(entry / "train_seed1.log", r"^(scoring expected:7919s budget:)\d")
    rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    assert re.search(r"train_seed1.log:\d+: budget:\d+, but it is 600", capsys.readouterr().out)


# What the log does not show, in a forger's hands


def unshown(folder: Path, seed: str) -> tuple[Path, list[dict], int]:
    """Metrics of a seed: path, events, and the number of a step that no log line shows."""
    path = folder / f"metrics_seed{seed}.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    log = (folder / f"train_seed{seed}.log").read_text()
    last = max(e["step"] for e in events if e["event"] == "step")
    return (
        path,
        events,
        next(
            n
            for n, e in enumerate(events)
            if e["event"] == "step"
            and 0.75 * last < e["step"] < last  # well inside the warmdown
            and f"\nstep:{e['step']}/" not in log
        ),
    )


FORGERIES = {
    "a rate": ({"lr_scale": lambda e: e["lr_scale"] * 0.99}, "settings and step times give"),
    "an end foreseen": ({"eta": lambda e: e["eta"] + 1}, "eta"),
    "a mean time": ({"step_avg": lambda e: e["step_avg"] + 1}, "is not ms / step"),
    "a time": ({"ms": lambda e: e["ms"] + 0.01}, "is not ms / step"),
    "a time and what follows from it": (
        {
            "ms": lambda e: e["ms"] + 0.5,
            "step_avg": lambda e: e["ms"] / e["step"],
            "eta": lambda e: 2 - e["ms"] / 1e3,
        },
        "settings and step times give",
    ),
    "a step left out": ({"step": lambda e: e["step"] + 1}, "the steps are not 1, 2"),
    "time that runs backwards": ({"ms": lambda e: e["ms"] - 1e3}, "run backwards"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_steps_that_no_log_shows_follow_from_the_others(what: str, entry: Path, capsys) -> None:
    edits, words = FORGERIES[what]
    path, events, at = unshown(entry, "2")
    for fact, edit in edits.items():
        events[at][fact] = edit(events[at])
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"metrics_seed2.jsonl: .*{words}", out), out


def test_a_script_with_a_schedule_of_its_own_is_not_held_to_ours(runs: list[Path]) -> None:
    """Where no seed keeps to ours it is said; where others do, a seed that does not is found."""
    script = (runs[0] / "train_gpt.py").read_text()
    other = script.replace("return linear if shape", "linear = linear\n    return linear if shape")
    assert not record.own_schedule(script)
    assert record.own_schedule(other)
    read = [record.read_run(f / "log.txt", f / "metrics.jsonl", f / "settings.json") for f in runs]
    assert record.check_schedules(read, other) == record.check_schedules(read, script) == ([], [])
    for number, run in enumerate(read, start=1):
        run.all("step")[-1]["lr_scale"] += 0.01
        findings, doubts = record.check_schedules(read, script)
        assert (len(findings), doubts) == (number, [])
        findings, doubts = record.check_schedules(read, other)
        assert (len(findings), len(doubts)) == ((number, 0) if number < 3 else (0, 1))


def test_what_cannot_be_derived_is_said(entry: Path, capsys) -> None:
    path, events, at = unshown(entry, "2")
    events[at]["train_loss"] -= 0.5
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    rehash(entry)
    assert record.main(["check", str(entry)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"cannot be verified: train_loss of [1-9]\d* steps that train_seed2.log does "
        "not show",
        out,
    )
    assert "digits that the log line rounds away, of step's train_loss, eval's ms" in out


@pytest.mark.parametrize(
    ("step_driven", "changed"),
    [
        (False, {"warmdown_frac": 0.4}),
        (False, {"warmdown_iters": 60, "warmdown_frac": 0.0}),
        (True, {"warmdown_iters": 30, "warmdown_frac": 0.0}),
        (False, {"warmdown_type": "cosine"}),
        (True, {"warmdown_frac": 0.5, "warmdown_type": "cosine"}),
        (False, {"iterations": 90, "warmdown_frac": 0.5}),
    ],
)
def test_the_schedule_derived_is_the_trainers(step_driven: bool, changed: dict) -> None:
    """On times drawn at random, the trainer's schedule and the equations stated here agree."""
    cfg = train_gpt.Config(
        **{"iterations": 120, "max_wallclock_seconds": 0.0 if step_driven else 20.0, **changed}
    )
    draw = random.Random(str(changed))
    schedule, now, steps = train_gpt.Schedule(cfg, 1.5), 0.0, []
    while True:
        schedule.observe(len(steps), now)
        moment = schedule.at(len(steps), now)
        if moment.done:
            break
        now += draw.uniform(0.1, 0.3)
        steps.append(
            {"event": "step", "step": len(steps) + 1, "ms": 1e3 * now, "lr_scale": moment.lr_scale}
        )
    events = [*([] if step_driven else [{"event": "reserve", "seconds": 1.5}]), *steps]
    run = record.SeedRun(Path("log"), Path("metrics"), "", events, vars(cfg))
    derived = list(rederive.scales(run))
    assert len(derived) > 60
    for event, (scale, _) in zip(steps, derived, strict=True):
        assert event["lr_scale"] == pytest.approx(scale, rel=1e-9, abs=1e-12)
    assert not list(rederive.check_schedule(run))
    steps[60]["lr_scale"] += 1e-6
    assert len(list(rederive.check_schedule(run))) == 1


def allowed(name: str, before: str, after: str, unverified: str) -> bool:
    """Whether a line with one digit changed is among what `check` says it cannot verify."""
    if name.endswith(".log"):
        shape = re.sub(r"[0-9][0-9.,]*", "N", before.partition(" budget:")[0])
        return (
            f"log line {shape!r}" in unverified
            and before.partition(" budget:")[2] == after.partition(" budget:")[2]
        )
    if not name.endswith(".jsonl"):
        return False
    one, two = json.loads(before), json.loads(after)
    facts = {fact for fact in one if one[fact] != two.get(fact)}
    trusted = (*rederive.TRUSTED.get(one["event"], ()), "sha256" * (one["event"] == "artifact"))
    return all(
        fact in trusted
        or (
            isinstance(one[fact], float)
            and math.isclose(one[fact], two[fact], rel_tol=1e-8, abs_tol=1e-8)
        )
        for fact in facts
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["train_seed2.log", "metrics_seed2.jsonl", "settings.json", "submission.json", "README.md"],
)
def test_any_digit_changed_is_found_or_listed_as_unverified(name: str, entry: Path) -> None:
    """Sampled; the files are listed anew, as a forger would. Every kind of line has its turn."""
    draw, path = random.Random(name), entry / name
    text = path.read_text()
    unverified = "\n".join(record.check_folder(entry)["unverified"])
    kinds: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines()):
        if re.search("[0-9]", line):
            kinds.setdefault(re.sub("[0-9.,e-]+", "0", line)[:60], []).append(number)
    samples = [draw.choice(numbers) for numbers in kinds.values()]
    draw.shuffle(samples)
    for number in samples[:60]:
        lines = text.splitlines(keepends=True)
        at = draw.choice([m.start() for m in re.finditer("[0-9]", lines[number])])
        before = lines[number]
        lines[number] = (
            before[:at] + str((int(before[at]) + draw.randint(1, 9)) % 10) + before[at + 1 :]
        )
        path.write_text("".join(lines))
        if name != "submission.json":
            rehash(entry)
        findings = record.check_folder(entry)["findings"]
        if findings:
            place = name if name[:7] != "metrics" else "seed2|submission.json|README|artifact.bin"
            assert any(re.search(place, finding) for finding in findings), (before, findings)
        else:
            assert allowed(name, before, lines[number], unverified), (before, lines[number])


def test_a_seed_of_another_run_is_found(
    entry: Path, tiny_data: TinyData, tmp_path: Path, capsys
) -> None:
    other = job(tiny_data, tmp_path, "other", SEED="3", MATRIX_LR="0.01")
    shutil.copy(other / "log.txt", entry / "train_seed3.log")
    shutil.copy(other / "metrics.jsonl", entry / "metrics_seed3.jsonl")
    rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    assert "train_seed3.log: MATRIX_LR is 0.01" in capsys.readouterr().out


def test_one_run_cannot_stand_for_two(entry: Path, capsys) -> None:
    shutil.copy(entry / "metrics_seed1.jsonl", entry / "metrics_seed2.jsonl")
    log = (entry / "train_seed1.log").read_text()
    (entry / "train_seed2.log").write_text(re.sub(r"SEED +1 ", "SEED    2 ", log))
    rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    assert "same loss curve" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "artifact.bin",
        "train_seed1.log",
        "metrics_seed3.jsonl",
        "settings.json",
        "README.md",
        "loss.png",
        "train_gpt.py",
    ],
)
def test_a_missing_file_is_found(name: str, entry: Path, capsys) -> None:
    (entry / name).unlink()
    assert record.main(["check", str(entry)]) == 1
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"track": "moon"}',
        "\0",
        '{"a":' * 100_000,
        '{"track": ["x"]}',
        '{"track": "track_cpu_5min", "files": [1]}',
    ],
)
def test_a_broken_submission_is_one_line_not_a_traceback(content: str, entry: Path, capsys) -> None:
    (entry / "submission.json").write_text(content)
    assert record.main(["check", str(entry)]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "submission.json" in out


def test_findings_as_json(entry: Path, capsys) -> None:
    change(entry / "submission.json", r'("bytes_total": )\d')
    assert record.main(["check", "--json", str(entry)]) == 1
    (result,) = json.loads(capsys.readouterr().out)
    assert any("bytes_total" in finding for finding in result["findings"])


# What `new` refuses


def events_edited(folder: Path, kind: str, **facts: object) -> None:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["event"] == kind:
            line.update(facts)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_refused(
    copies: list[Path], tmp_path: Path, tiny_data: TinyData, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone; nothing is left behind, and the untouched runs still pass afterwards."""
    root, (first, second, third) = tmp_path / "records", copies

    def refused(folders: list[Path], words: str, *more: str) -> None:
        assert new(folders, root, *more) == 1
        err = capsys.readouterr().err
        assert words in err, err
        assert err.count("\n") == 1
        assert not list(root.glob("*/*"))

    refused([first, second], "2 seeds")
    refused([first, second, second], "one stands twice")
    refused([first, second, tmp_path / "nowhere"], "no such file")
    refused(copies, "--track moon", "--track", "moon")
    refused(copies, "expected YYYY-MM-DD", "--date", "../../../2026-01-02")
    refused(copies, "blurb", "--blurb", "A <!-- record.py 1: results --> b")
    script = (third / "train_gpt.py").read_bytes()
    (third / "train_gpt.py").write_bytes(script + b"\n")
    refused(copies, "different train_gpt.py")
    for folder in copies:
        (folder / "train_gpt.py").write_bytes(script + b"\n")
    refused(copies, "another train_gpt.py ran")
    for folder in copies:
        (folder / "train_gpt.py").write_bytes(script)
    with monkeypatch.context() as patch:
        patch.setattr(record, "LIMIT_BYTES", 1000)
        refused(copies, "over the cap")
    artifact = (third / "artifact.bin").read_bytes()
    (third / "artifact.bin").write_bytes(artifact[:-1])
    refused(copies, "artifact.bin")
    (third / "artifact.bin").write_bytes(artifact)
    metrics = (third / "metrics.jsonl").read_text()
    events_edited(third, "activity", steps=0)
    refused(copies, "was configured and acted 0 times")
    (third / "metrics.jsonl").write_text(metrics + '{"event": "resumed"}\n')
    refused(copies, "resumed")
    (third / "metrics.jsonl").write_text(metrics)
    driven = job(
        tiny_data, tmp_path, "driven", SEED="3", MAX_WALLCLOCK_SECONDS="0", ITERATIONS="20"
    )
    refused([first, second, driven], "ITERATIONS=20, but 20000 in")
    run = record.read_run(driven / "log.txt", driven / "metrics.jsonl", driven / "settings.json")
    assert any("MAX_WALLCLOCK_SECONDS=0" in finding for finding in record.check_track(run, TRACK))
    assert new(copies, root) == 0
    assert new(copies, root) == 1
    assert "exists already" in capsys.readouterr().err


def test_an_illegal_score_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    folder = job(tiny_data, tmp_path, "late", SEED="1", GPTQ_CALIB="train_after_cap")
    run = record.read_run(folder / "log.txt", folder / "metrics.jsonl", folder / "settings.json")
    assert any(
        "not eligible: GPTQ_CALIB=train_after_cap" in finding
        for finding in record.check_track(run, TRACK)
    )


# The compliance suite finds what it looks for


def flawed(tmp_path: Path, old: str, replacement: str):
    """The trainer with a fault, as a module."""
    text = (ROOT / "train_gpt.py").read_text()
    assert old in text
    path = tmp_path / "train_gpt.py"
    path.write_text(text.replace(old, replacement))
    return compliance.load_script(path)


def small(script, **changed):
    cfg = script.Config(
        **{
            **train_gpt.PRESETS["mini"],
            "rope_dims": 8,
            "bigram_vocab_size": 64,
            "bigram_dim": 8,
            "ve_dim": 8,
            "num_layers": 3,
            "xsa_last_n": 1,
            "ve_layers": "1",
            "model_dim": 32,
            "eval_seq_len": 32,
            "eval_stride": 8,
            "vocab_size": 64,
            "swa_every": 5,
            "ttt_batch_seqs": 2,
            **changed,
            "ttt_chunk_tokens": 64,
        }
    )
    model = script.GPT(cfg)
    script.initialize(model, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return cfg, model


@pytest.mark.parametrize(
    ("old", "replacement"),
    [
        ("is_causal=True", "is_causal=False"),
        ("F.pad(x[:, :-1], (0, 0, 1, 0))", "F.pad(x[:, 1:], (0, 0, 0, 1))"),
        (
            "x = rms_norm((self.tok_emb(input_ids)",
            "x = rms_norm((self.tok_emb(input_ids) + self.tok_emb(input_ids).mean(1, keepdim=True)",
        ),
    ],
)
def test_a_leak_from_the_future_is_seen(old: str, replacement: str, tmp_path: Path) -> None:
    assert not compliance.is_causal(small(flawed(tmp_path, old, replacement))[1], 64, 32)
    assert compliance.is_causal(small(train_gpt)[1], 64, 32)


def test_a_score_that_is_no_distribution_is_seen(tmp_path: Path) -> None:
    script = flawed(
        tmp_path,
        "return nats.view_as(target_ids), mile",
        "return 0.9 * nats.view_as(target_ids), mile",
    )
    assert not compliance.is_a_distribution(small(script)[1], 64, 32)
    assert compliance.is_a_distribution(small(train_gpt)[1], 64, 32)


def test_a_target_scored_twice_is_seen(tmp_path: Path) -> None:
    script = flawed(
        tmp_path,
        'if form == "cover" else np.maximum(ends - stride',
        'if form == "never" else np.maximum(ends - stride',
    )
    assert not compliance.scores_once(script, small(script)[0], 100)
    assert compliance.scores_once(train_gpt, small(train_gpt)[0], 100)


def test_learning_before_scoring_is_seen(tmp_path: Path) -> None:
    script = flawed(tmp_path, "done * size, cfg.ttt_lr", "(done + 1) * size, cfg.ttt_lr")
    cfg, model = small(script, ttt_mode="score_first", ttt_freeze_blocks=0)
    assert not compliance.scores_before_update(script, cfg, model)
    cfg, model = small(train_gpt, ttt_mode="score_first", ttt_freeze_blocks=0)
    assert compliance.scores_before_update(train_gpt, cfg, model)
    cfg, model = small(train_gpt)
    assert compliance.scores_before_update(train_gpt, cfg, model)


def test_the_suite_looks_at_every_condition(runs: list[Path]) -> None:
    settings = json.loads((runs[0] / "settings.json").read_text())
    found = compliance.suite(ROOT / "train_gpt.py", runs[0] / "artifact.bin", settings)
    assert found == dict.fromkeys(record.CONDITIONS, True)


# A stranger's folder in the official format


def official(folder: Path, seeds: dict[int, dict], **claims: object) -> Path:
    """A folder as the official repository's README describes it."""
    folder.mkdir()
    (folder / "train_gpt.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# Ours\n")
    for seed, facts in seeds.items():
        lines = [
            "step:20000/20000 train_loss:2.1 train_time:599000ms step_avg:85ms",
            f"stopping_early: wallclock_cap train_time:{facts.get('ms', 599_900)}ms "
            "step:7000/20000",
            "Code size: 6 bytes",
            f"Total submission size int6+zstd: {facts.get('total', 15_900_000)} bytes",
        ]
        if "bpb" in facts:
            lines.append(
                f"final_int6_sliding_window_exact val_loss:1.9 val_bpb:{facts['bpb']} "
                "eval_time:75000ms"
            )
        (folder / f"train_seed{seed}.log").write_text("\n".join(lines) + "\n")
    (folder / "submission.json").write_text(
        json.dumps(
            {"author": "B", "name": "Theirs", "val_bpb": 1.12, "bytes_total": 15_900_000, **claims}
        )
    )
    return folder


def test_a_sound_folder_in_the_official_format(tmp_path: Path, capsys) -> None:
    folder = official(tmp_path / "theirs", {1: {"bpb": 1.11}, 2: {"bpb": 1.12}, 3: {"bpb": 1.13}})
    assert record.main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "cannot be verified: no metrics and no activity ledger" in out
    assert "ok (official format)" in out


def test_three_planted_faults_are_named(tmp_path: Path, capsys) -> None:
    folder = official(
        tmp_path / "theirs",
        {1: {"bpb": 1.11}, 2: {"bpb": 1.12, "total": 16_024_793}, 3: {}},
        val_bpb=1.10,
    )
    assert record.main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "train_seed2.log: 16,024,793 bytes are over the cap" in out
    assert "train_seed3.log: no line of the final score" in out
    assert "val_bpb is 1.1, the logs' mean is 1.115" in out


@pytest.mark.parametrize(
    ("seeds", "claims", "words"),
    [
        ({1: {"bpb": 1.12}, 2: {"bpb": 1.12}}, {}, "2 logs"),
        (
            {1: {"bpb": 1.12, "ms": 602_000}, 2: {"bpb": 1.12}, 3: {"bpb": 1.12}},
            {},
            "train_seed1.log: training took 602,000 ms",
        ),
        (
            {n: {"bpb": 1.12} for n in (1, 2, 3)},
            {"bytes_total": 15_000_000},
            "bytes_total is 15000000",
        ),
        (
            {n: {"bpb": 1.12} for n in (1, 2, 3)},
            {"seed_results": {"1": {"val_bpb": 1.05}}},
            "1.05 of a seed is in no log",
        ),
    ],
)
def test_other_faults_in_the_official_format(seeds, claims, words, tmp_path: Path, capsys) -> None:
    assert record.main(["check", str(official(tmp_path / "theirs", seeds, **claims))]) == 1
    assert words in capsys.readouterr().out


# Logs as two generations of the official script wrote them, from published folders.
EARLY = """val_loader:shards pattern=/data/fineweb_val_*.bin tokens:62021632
model_params:17059912
tie_embeddings:True embed_lr:0.1 matrix_lr:{lr} scalar_lr:0.04
seed:{seed}
warmup_step:1/20
step:200/20000 train_loss:2.9737 train_time:9015ms step_avg:45.08ms
stopping_early: wallclock_cap train_time:{ms}ms step:13224/20000
Code size: 6 bytes
Total submission size: 67270835 bytes
Total submission size int8+zlib: {total} bytes
final_int8_zlib_roundtrip val_loss:2.0425 val_bpb:1.2097 eval_time:{eval_ms}ms
final_int8_zlib_roundtrip_exact val_loss:2.04248064 val_bpb:{bpb}
"""
LATE = """Hyperparameters:
  matrix_lr: {lr}
  seed: {seed}
val_tokens: 40540160
warmup_step: 1/20
0/20000 val_loss: 9.0090 val_bpb: 3.4877
stopping_early: wallclock_cap train_time: {ms}ms step: 4550/20000
pre-quantization post-ema val_loss:2.80873254 val_bpb:1.08734790 eval_time:7440ms
Code size: 6 bytes
Total submission size quantized+brotli: {total} bytes
quantized_sliding_window val_loss:2.79714850 val_bpb:1.08286335 eval_time:120961ms
quantized_ttt val_loss:2.79180191 val_bpb:{bpb} eval_time:{eval_ms}ms
"""


def published(folder: Path, log: str, second: dict | None = None, **claims: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# Theirs\n")
    bpb, results = "1.20967208" if log is EARLY else "1.08079352", {}
    for seed in (42, 314, 999):
        facts = {
            "seed": seed,
            "lr": 0.022,
            "ms": 588_047,
            "total": 15_991_930 + seed,
            "bpb": bpb,
            "eval_ms": 366_525,
            **((second or {}) if seed == 314 else {}),
        }
        (folder / f"train_seed{seed}.log").write_text(log.format(**facts))
        results[seed] = {"val_bpb": float(facts["bpb"]), "artifact_bytes": facts["total"]}
    (folder / "submission.json").write_text(
        json.dumps({"val_bpb": float(bpb), "seed_results": results, **claims})
    )
    return folder


@pytest.mark.parametrize("log", [EARLY, LATE])
@pytest.mark.parametrize(
    ("second", "claims", "words"),
    [
        ({}, {}, ""),
        ({"total": 16_071_321}, {}, "train_seed314.log: 16,071,321 bytes are over the cap"),
        ({"ms": 602_000}, {}, "train_seed314.log: training took 602,000 ms"),
        ({"eval_ms": 688_000}, {}, "train_seed314.log: evaluation took 688,000 ms"),
        ({"lr": 0.026}, {}, "train_seed314.log: matrix_lr is 0.026"),
        ({"seed": 42}, {}, "seeds [42, 42, 999]: one stands twice"),
        ({"bpb": "0.92379000"}, {}, "validation bytes, the text has 151,080,891"),
        ({}, {"val_bpb_std": 0.02}, "val_bpb_std is 0.02"),
        ({}, {"artifact_size_bytes": 15_000_000}, "artifact_size_bytes is 15000000"),
        ({}, {"bytes_model_int6_zstd": 16_000_001}, "over the cap"),
        ({}, {"seed_results": {"42": {"artifact_bytes": 15_000_000}}}, "15000000 of a seed"),
        ({}, {"val_bpb": "1.08"}, "val_bpb is '1.08', not a number"),
        ({}, {"val_bpb": None}, "val_bpb is None, not a number"),
        ({}, {"seed_results": [1, 2], "bytes_total": 15_991_972}, ""),
    ],
)
def test_folders_as_published(
    log: str, second: dict, claims: dict, words: str, tmp_path: Path, capsys
) -> None:
    folder = published(tmp_path / "theirs", log, second, **claims)
    assert record.main(["check", str(folder)]) == int(bool(words))
    assert words in capsys.readouterr().out


def test_an_entry_without_its_metrics_is_not_taken_for_an_official_one(entry: Path, capsys) -> None:
    for path in entry.glob("metrics_*"):
        path.unlink()
    assert record.main(["check", str(entry)]) == 1
    assert "metrics_seed1.jsonl: no such file" in capsys.readouterr().out


# Comparison


def test_paired_by_seed_as_scipy_and_by_hand() -> None:
    a = {"1": 2.00, "2": 2.10, "3": 2.05}
    b = {"1": 1.98, "2": 2.07, "3": 2.04}
    found = record.compare_scores(a, b)
    deltas = [-0.02, -0.03, -0.01]
    mean, error = sum(deltas) / 3, stats.sem(deltas)
    assert found.paired and found.count == 3
    assert found.difference == pytest.approx(mean)
    half = stats.t.ppf(0.975, 2) * error
    assert found.interval == pytest.approx((mean - half, mean + half))
    assert found.p_better == pytest.approx(stats.t.cdf(mean / error, 2))
    by_margin = record.compare_scores(a, b, margin=0.005)
    assert by_margin.p_by_margin == pytest.approx(stats.t.cdf((mean + 0.005) / error, 2))
    assert by_margin.p_by_margin > found.p_better


def test_unpaired_as_welch() -> None:
    x, y = [2.00, 2.10, 2.05, 2.03], [1.9, 1.95, 1.92]
    found = record.compare_scores(
        {f"a{n}": v for n, v in enumerate(x)}, {f"b{n}": v for n, v in enumerate(y)}
    )
    expected = stats.ttest_ind(y, x, equal_var=False)
    assert not found.paired
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_better == pytest.approx(expected.pvalue / 2)
    with pytest.raises(record.Wrong):
        record.compare_scores({"1": 2.0}, {"2": 2.0, "3": 2.1})


def claims_of(name: str, scores: list[float], fingerprint: str = "f") -> dict:
    mean = sum(scores) / len(scores)
    return {
        "name": name,
        "val_bpb": mean,
        "val_loss": 1.7 * mean,
        "data": {"fingerprint": fingerprint},
        "hardware": "1 x 2 threads (cpu)",
        "seed_results": {
            str(n): {"val_bpb": s, "val_loss": 1.7 * s, "steps": 100} for n, s in enumerate(scores)
        },
    }


def test_the_verdict_in_words() -> None:
    a = claims_of("Old", [2.00, 2.10, 2.05])
    text = record.compare_text(a, claims_of("New", [1.90, 2.001, 1.949]))
    assert "B is lower on average by 0.100" in text
    assert "B is better: chance alone would rarely give 3 such runs." in text
    assert "p < 0.01: met" in text
    unclear = record.compare_text(a, claims_of("New", [2.01, 2.08, 2.06]))
    assert "Nobody can tell" in unclear
    assert "p < 0.01: not met" in unclear
    worse = record.compare_text(a, claims_of("New", [2.10, 2.201, 2.149]))
    assert "B is higher on average" in worse
    assert "A is better" in worse
    assert "p < 0.25: not met" in worse
    assert "different validation text" in record.compare_text(a, claims_of("X", [1.0, 1.2], "g"))
    elsewhere = {**claims_of("New", [1.90, 2.001, 1.949]), "hardware": "1 x fast (cpu)"}
    assert "A ran on 1 x 2 threads (cpu), B on 1 x fast" in record.compare_text(a, elsewhere)
    assert "warning" not in text
    assert record.compare_text(a, a) == (
        "A and B are the same runs (Old, 3 seeds):\n"
        "a thing compared with itself is neither better nor worse."
    )
    shifted = claims_of("New", [score + 0.01 for score in (2.00, 2.10, 2.05)])
    with pytest.raises(record.Wrong, match="do not scatter"):
        record.compare_text(a, shifted)
    for said in (text, unclear, worse):
        assert not re.search("confidence|significan|hypothes|deviation|t-test", said)


def test_compare_warns_of_an_entry_that_does_not_check(made: Path, entry: Path, capsys) -> None:
    change(entry / "submission.json", r'("bytes_total": )\d')
    claims = json.loads((entry / "submission.json").read_text())
    for n, result in enumerate(claims["seed_results"].values(), start=1):
        result["val_bpb"] -= 0.01 * n
    (entry / "submission.json").write_text(json.dumps(claims))
    record.main(["compare", str(made), str(entry)])
    assert "warning: B does not pass check" in capsys.readouterr().out


# What a folder may try


def copy_of(run: record.SeedRun, **changed: dict) -> record.SeedRun:
    """A run with facts of its events changed, by the events' names."""
    events = [{**event, **changed.get(event["event"], {})} for event in run.events]
    return replace(run, events=events)


def test_a_run_does_not_stand_for_two_seeds(made: Path) -> None:
    first, second, _ = record.read_entry(made)
    found = list(record.check_together([first, first, second], TRACK))
    for what in ("loss curve", "step times", "artifact"):
        assert f"two seeds have the same {what}" in found
    assert not any(
        "two seeds have" in finding
        for finding in record.check_together(record.read_entry(made), TRACK)
    )


def test_all_targets_are_scored(made: Path) -> None:
    run, script = record.read_entry(made)[0], (made / "train_gpt.py").read_bytes()
    headline = run.one("final")["name"]
    (scored,) = [event for event in run.all("eval") if event["name"] == headline]
    short = replace(
        run,
        events=[
            {**event, "targets": scored["targets"] - 1} if event is scored else event
            for event in run.events
        ],
    )
    assert any("targets scored of" in finding for finding in record.check_numbers(short, script))
    whole = run.one("val_data")["tokens"] - 1
    half = replace(
        run,
        settings={**run.settings, "eval_truncate": True, "eval_seq_len": whole // 2 + 1},
        events=[
            {**event, "targets": whole // 2 + 1} if event is scored else event
            for event in run.events
        ],
    )
    assert any("targets scored of" in finding for finding in record.check_numbers(half, script))
    assert not list(record.check_numbers(run, script))


@pytest.mark.parametrize("name", ["2 threads | Ann | 2020", "<img src=x>", "a\x1b[2J", "[x](y)"])
def test_what_goes_on_the_board_is_plain(name: str, made: Path) -> None:
    run = copy_of(record.read_entry(made)[0], machine={"name": name})
    found = record.check_numbers(run, (made / "train_gpt.py").read_bytes())
    assert any("expected plain text" in finding for finding in found)


@pytest.mark.parametrize("cookie", ["raw_unicode_escape", "utf-7", "latin-1", "nonsense"])
def test_a_script_is_utf_8_or_refused(cookie: str) -> None:
    """Under another encoding Python may run what is a comment here."""
    with pytest.raises(record.Wrong, match=r"train_gpt\.py: "):
        record.readable(f"# coding: {cookie}\n# \\u000aimport os\n".encode())
    assert record.readable(b"# coding: utf-8\nx = 1\n").endswith("x = 1\n")


@given(template=st.text("ab:{", max_size=9), line=st.text("ab:", max_size=9))
def test_a_line_fits_a_template_as_a_regular_expression_says(template: str, line: str) -> None:
    assume("{" in template)
    template = template.replace("{", "{x}")
    pattern = ".*".join(map(re.escape, template.split("{x}")))
    assert record.fits(line, template) == bool(re.fullmatch(pattern, line))


def test_hostile_texts_take_no_time(made: Path) -> None:
    run, script = record.read_entry(made)[0], record.readable((made / "train_gpt.py").read_bytes())
    begin = time.monotonic()
    part = "/ train_loss: train_time:ms step_avg:ms lr_scale: eta:"
    assert any(
        "not what" in finding
        for finding in record.check_log(
            replace(run, log=run.log + "step:" + part * 200 + "s\n"), script
        )
    )
    assert re.findall(record.OFFICIAL_LINES["seed"], "\n" * 200_000 + "seed: 7", re.M) == ["7"]
    big = "PRESETS = {'a': {'num_layers': Fraction('1e9999999999')}}\n"
    assert record.given_by_hand(run.settings, script + big)
    assert list(record.check_training(copy_of(run, summary={"steps": 3_000_000_000})))
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("/etc/hostname"),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(bytes((1 << 20) + 1)),
    ],
    ids=["link", "folder", "large"],
)
def test_notes_are_a_small_plain_file(make, entry: Path, capsys) -> None:
    (entry / "NOTES.md").write_text("Notes.\n")
    assert record.main(["check", str(entry)]) == 0
    (entry / "NOTES.md").unlink()
    make(entry / "NOTES.md")
    assert record.main(["check", str(entry)]) == 1
    assert "NOTES.md: " in capsys.readouterr().out


def test_code_from_elsewhere_is_told() -> None:
    ours = (ROOT / "train_gpt.py").read_text()
    assert record.foreign_imports(ours) == []
    more = "import helper.more, json\nfrom .near import x\nfrom other import y\n"
    assert record.foreign_imports(ours + more) == ["helper", "near", "other"]


def test_a_base_is_of_the_same_track_and_text(
    made: Path, runs: list[Path], tmp_path: Path, capsys
) -> None:
    root = tmp_path / "records"
    elsewhere = Path(shutil.copytree(made, root / "track_non_record_16mb" / made.name))
    assert new(runs, root, "--base", str(elsewhere), "--name", "Other") == 1
    assert "expected an entry of track_cpu_5min" in capsys.readouterr().err
    base = Path(shutil.copytree(made, root / TRACK / made.name))
    claims = json.loads((base / "submission.json").read_text())
    claims["data"]["fingerprint"] = "0" * 64
    (base / "submission.json").write_text(json.dumps(claims))
    assert new(runs, root, "--base", str(base), "--name", "Other") == 1
    assert "another validation text" in capsys.readouterr().err


def test_scoring_again_ignores_the_checkers_own_settings(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def run(command: list[str], **how) -> SimpleNamespace:
        seen.update(how["env"])
        return SimpleNamespace(returncode=1, stdout="", stderr="")

    monkeypatch.setattr(record.subprocess, "run", run)
    with environment(EVAL_STRIDE="7", NUM_LAYERS="3", DATA_PATH="/data"):
        list(record.check_score_again(made, record.read_entry(made)))
    assert "EVAL_STRIDE" not in seen and "NUM_LAYERS" not in seen
    assert seen["DATA_PATH"] == "/data"


def test_one_text_cut_by_two_tokenizers_is_compared_by_its_bytes() -> None:
    (one, (text, *_)), (two, (same, *_)) = list(record.KNOWN_SPLITS.items())[:2]
    assert text == same
    a, b = claims_of("Old", [2.00, 2.10, 2.05], one), claims_of("New", [1.90, 2.00, 1.94], two)
    for seed in b["seed_results"].values():
        seed["val_loss"] *= 1.5  # longer pieces
    assert "different validation text" not in record.compare_text(a, b)
    of_a, of_b = record.scores_of(a, b, "val_loss")
    assert [of_b[seed] - of_a[seed] for seed in of_a] == pytest.approx([-0.17, -0.17, -0.187])
    assert record.text_scored(claims_of("Other", [2.0, 2.1], "0" * 64)) != text
    assert record.text_scored({"data": {"fingerprint": [one]}}) != text


def test_prepared_data_are_shown_where_any_clone_has_them() -> None:
    given = {
        "data_path": "/home/me/./clone/data/datasets/docs_sp4096",
        "seed": 1,
        "tokenizer_path": "/elsewhere/t.model",
    }
    assert record.portable(given) == given | {"data_path": "./data/datasets/docs_sp4096"}
    own = {"data_path": "/mnt/data/datasets/mine_sp4096", "tokenizer_path": ["no text"]}
    assert record.portable(own) == own


# The board


def test_board_ranks_within_one_text_only(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "records"
    for name, bpb, split in (("Good", 1.5, "aa"), ("Bad", 1.7, "aa"), ("Elsewhere", 0.9, "bb")):
        folder = root / TRACK / f"2026-01-02_{name}"
        shutil.copytree(made, folder)
        claims = json.loads((folder / "submission.json").read_text())
        claims.update(name=name, val_bpb=bpb)
        claims["data"]["fingerprint"] = split
        (folder / "submission.json").write_text(json.dumps(claims))
    monkeypatch.setattr(record, "check_folder", lambda folder: {"findings": [], "format": "own"})
    assert record.main(["board", "--root", str(root)]) == 0
    page = (root / "README.md").read_text()
    ranked = re.findall(r"^\| (\d) \| \[(\w+)\]", page, re.M)
    assert ranked == [("1", "Good"), ("2", "Bad"), ("1", "Elsewhere")]
    assert "Nobody has run it yet" in page
    steps = statistics.fmean(seed["steps"] for seed in claims["seed_results"].values())
    assert page.count(f"| {steps:,.0f} | ") == page.count(f"| {claims['hardware']} | ") == 3
    for track, rules in record.TRACKS.items():
        assert rules["command"] in (root / track / "README.md").read_text()
    assert (root / "board.png").read_bytes()[:4] == b"\x89PNG"


def test_board_ranks_nothing_that_does_not_check(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "records"
    shutil.copytree(made, root / TRACK / made.name)
    folder = shutil.copytree(made, root / TRACK / "2026-01-02_Forged")
    change(folder / "submission.json", r'^( "val_bpb": \d\.)\d')
    published(root / "track_10min_16mb" / "theirs", LATE)
    (root / "track_10min_16mb" / "empty").mkdir()
    assert record.main(["board", "--root", str(root)]) == 0
    page = (root / "README.md").read_text()
    assert len(re.findall(r"^\| 1 \|", page, re.M)) == 1
    assert re.search(r"Not ranked: \[2026-01-02_Forged\].*: `check` has \d+ findings", page)
    assert re.search(r"Not ranked: \[theirs\].*official format", page)
    assert "Not ranked: [empty]" in page


def test_an_entry_based_on_another_lists_what_changed(
    made: Path, runs: list[Path], tmp_path: Path, capsys
) -> None:
    root = tmp_path / "records"
    base = Path(shutil.copytree(made, root / TRACK / made.name))
    claims = json.loads((base / "submission.json").read_text())
    claims["settings"]["EMA_DECAY"] = "0.7"
    for n, result in enumerate(claims["seed_results"].values()):
        result["val_loss"] += 0.1 + 0.01 * n
    (base / "submission.json").write_text(json.dumps(claims))
    change(base / "train_gpt.py", "^import math$", "import math\nimport this")
    assert new(runs, root, "--base", str(base), "--name", "Other") == 0
    folder = root / TRACK / "2026-01-02_Other"
    assert record.main(["check", str(folder)]) == 0
    page, diff = ((folder / name).read_text() for name in ("README.md", "source.diff"))
    assert re.search(
        r"with probability 0\.00\d+\.\n\n\| setting \| Tiny \| here \|\n.*\n"
        r"\| EMA_DECAY \| 0\.7 \| 0\.9 \|\n",
        page,
    )
    assert "[line by line](source.diff): +0 -1 lines." in page
    assert "| head | +0 | -1 |" in page
    assert "\n-import this\n" in diff
    for name, pattern in (
        ("submission.json", r'("p": 0\.0)\d'),
        ("source.diff", "^-import t()"),
        ("submission.json", r'("head",\n +)\d'),
    ):
        text = (folder / name).read_text()
        change(folder / name, pattern, "-import T" if name == "source.diff" else None)
        rehash(folder)
        assert record.main(["check", str(folder)]) == 1
        assert name in capsys.readouterr().out
        (folder / name).write_text(text)
    (folder / "source.diff").write_text("")
    assert record.main(["check", str(folder)]) == 1
    (folder / "source.diff").write_text(diff)
    shutil.rmtree(base)
    rehash(folder)
    capsys.readouterr()
    assert record.main(["check", str(folder)]) == 0
    said = "score, p and changes of 2026-01-02_Tiny, which is not beside it"
    assert said in capsys.readouterr().out
    change(folder / "source.diff", r"^( import )math$", r"\1maths")
    rehash(folder)
    assert record.main(["check", str(folder)]) == 1
    assert re.search(r"source.diff:\d+: not what train_gpt.py:\d+ holds", capsys.readouterr().out)


def test_the_source_diff_and_its_summary_by_function() -> None:
    old = (
        "import a\n\n# =====\n# First part\n# =====\n\n\ndef f(x):\n    return x\n\n\nclass C:\n"
        "    def m(self):\n        return 1\n\n    def gone(self):\n        pass\n"
    )
    new = (
        old.replace("return x", "y = x\n    return y")
        .replace("import a", "import b")
        .replace("\n    def gone(self):\n        pass\n", "")
        .replace("return 1", "return 2")
    )
    trees = record.parsed(old), record.parsed(new)
    assert changes.counted(old, new, *trees) == [
        ["head", 1, 1],
        ["First part: f", 2, 1],
        ["First part: C", 0, 1],
        ["First part: C.m", 1, 1],
        ["First part: C.gone", 0, 2],
    ]
    diff = changes.source_diff(old, new)
    assert diff.startswith("--- base/train_gpt.py\n+++ train_gpt.py\n@@ ")
    assert not list(changes.misfits(diff, new))
    assert list(changes.misfits(diff, old))
    assert list(changes.misfits("@@ nonsense\n", new))
    assert changes.source_diff(old, old) == ""
    assert changes.counted(old, old, trees[0], trees[0]) == []
    long = changes.source_diff("", "x = 1\n" * 100_000)
    assert len(long) <= changes.MAX_DIFF_BYTES
    assert re.search(r"\n# cut here: \d+ lines more; .*\n$", long)
    assert not list(changes.misfits(long, "x = 1\n" * 100_000))


def test_entries_of_this_repository_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(record.TRACKS, TRACK, RULES)
    found, rest = record.entries(ROOT / "records")
    assert not rest
    page = (ROOT / "records" / "README.md").read_text()
    assert page == record.board(ROOT / "records", found, rest)


def test_the_command_gives_what_neither_defaults_nor_preset_do() -> None:
    script = (ROOT / "train_gpt.py").read_text()
    for preset in ("", "mini", *train_gpt.PRESETS, "pr569,mini"):
        given = {"PRESET": preset} if preset else {}
        cfg = train_gpt.Config.from_env({**given, "MATRIX_LR": "0.5", "SEED": "7"})[0]
        assert record.given_by_hand(vars(cfg), script) == {"MATRIX_LR": "0.5"}


# Entries of every kind


def test_a_last_step_that_ends_over_the_budget_has_no_time_left(runs: list[Path]) -> None:
    folder = runs[0]
    run = record.read_run(folder / "log.txt", folder / "metrics.jsonl", folder / "settings.json")
    last = run.all("step")[-1]
    last["ms"], last["eta"] = 1e3 * run.settings["max_wallclock_seconds"] + 2.0, 0.0
    said = " ".join(record.rederive.check_clock(run))
    assert "eta" not in said
    last["eta"] = -0.1
    assert "eta -0.1" in " ".join(record.rederive.check_clock(run))


def test_seeds_may_need_different_numbers_of_passes(tiny_data: TinyData, tmp_path: Path) -> None:
    """QUANT_CLIP=std with a target: the solver tries as often as it must, for each seed alone."""
    target = str((ROOT / "train_gpt.py").stat().st_size + 31_000)
    found = [
        job(
            tiny_data,
            tmp_path,
            f"seed-{seed}",
            SEED=seed,
            QUANT_CLIP="std",
            **({"ARTIFACT_TARGET_BYTES": target}),
        )
        for seed in SEEDS
    ]
    runs = [record.read_run(f / "log.txt", f / "metrics.jsonl", f / "settings.json") for f in found]
    passes = [len(run.all("size_pass")) for run in runs]
    assert min(passes) >= 1
    assert new(found, tmp_path / "records") == 0
    entry = tmp_path / "records" / TRACK / "2026-01-02_Tiny"
    assert record.main(["check", str(entry)]) == 0
    for run in runs[1:]:  # however many the seeds happened to need, let one have a single pass
        run.events = [e for e in run.events if e["event"] != "size_pass"]
    assert not [f for f in record.check_together(runs, TRACK) if "size_pass" in f]


def test_a_packed_script_makes_an_entry(tiny_data: TinyData, tmp_path: Path, capsys) -> None:
    packed = tmp_path / "packed" / "train_gpt.py"
    assert record.pack.main([str(ROOT / "train_gpt.py"), str(packed)]) == 0
    script, found = compliance.load_script(packed), []
    for seed in SEEDS:
        with environment(**tiny_job(tiny_data, tmp_path, f"seed-{seed}", **CLOCKED, SEED=seed)):
            assert script.main([]) == 0
        found.append(tmp_path / f"seed-{seed}")
    assert new(found, tmp_path / "records") == 0
    entry = tmp_path / "records" / TRACK / "2026-01-02_Tiny"
    assert record.main(["check", str(entry)]) == 0
    claims, page = (
        json.loads((entry / "submission.json").read_text()),
        (entry / "README.md").read_text(),
    )
    assert (entry / "train_gpt.py").read_bytes() == packed.read_bytes()
    assert claims["bytes_code"] == packed.stat().st_size
    assert claims["bytes_text"] == (ROOT / "train_gpt.py").stat().st_size
    assert "(packed; " in page
    assert "python records/pack.py --text train_gpt.py" in page
    assert "Traceback" not in capsys.readouterr().err


# What an artifact holds


def test_show_adds_up_an_artifact(runs: list[Path], tmp_path: Path, capsys) -> None:
    path, plot = runs[0] / "artifact.bin", tmp_path / "plot.png"
    assert record.main(["show", str(path), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    _, stored = train_gpt.read_artifact(path)
    rows = {row.split()[0]: row.split()[1:] for row in said.splitlines() if row.endswith("%")}
    assert rows.keys() == stored.keys()
    for name, tensor in stored.items():
        shape, bits, raw, entropy, _ = rows[name]
        assert shape == ("x".join(map(str, tensor.values.shape)) or "1")
        values = tensor.values.flatten().tolist()
        if tensor.scale is None:
            assert (bits, raw) == ("fp16", f"{2 * len(values):,}")
            continue
        assert raw == f"{len(values) + 2 * len(tensor.scale):,}"
        assert 2 ** (int(bits) - 1) > max(map(abs, values)) >= 2 ** (int(bits) - 2)
        counts = [values.count(v) / len(values) for v in set(values)]
        coded = -len(values) * sum(p * math.log2(p) for p in counts) / 8
        assert float(entropy.replace(",", "")) == pytest.approx(
            coded + 2 * len(tensor.scale), abs=0.51
        )
    assert sum(float(row[-1].rstrip("%")) for row in rows.values()) == pytest.approx(100, abs=0.5)

    def total(words: str) -> int:
        return int(re.search(rf"^ *{words} +([0-9,]+)$", said, re.M)[1].replace(",", ""))

    assert total("artifact, compressed with zstd") == path.stat().st_size
    assert total("code") == (ROOT / "train_gpt.py").stat().st_size
    assert total("left of 16,000,000") == 16_000_000 - total("together")
    assert total("body before zstd") == total("integers, one byte each") + total(
        "scales and floats, two bytes each"
    ) + total(r"header \(settings, names, shapes\)")
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert record.main(["show", str(runs[0] / "log.txt")]) == 1
    assert record.main(["show", str(tmp_path / "nothing")]) == 1


def test_show_of_hostile_artifacts_is_one_line(runs: list[Path], tmp_path: Path, capsys) -> None:
    sound, path = (runs[0] / "artifact.bin").read_bytes(), tmp_path / "artifact.bin"
    header, stored = train_gpt.decode_artifact(sound)
    odd = {f"$x^\n\x1b[2J.{n}.{name}": tensor for n, (name, tensor) in enumerate(stored.items())}
    for blob in (b"", sound[:50], sound[:-1], b"x" + sound[1:]):
        path.write_bytes(blob)
        assert record.main(["show", str(path)]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    path.write_bytes(train_gpt.encode_artifact(header, odd))
    assert record.main(["show", str(path), "--plot", str(tmp_path / "x.png")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    empty = {"a": train_gpt.Stored(torch.zeros(0, 4, dtype=torch.int8), torch.zeros(0).half())}
    path.write_bytes(train_gpt.encode_artifact(header, empty))
    assert record.main(["show", str(path), "--plot", str(tmp_path / "y.png")]) == 0
    assert artifact.anatomy(path).total("raw") == 0


def test_bytes_that_are_no_artifact_are_found_whichever_reader_the_script_has(entry: Path) -> None:
    path, runs = entry / "artifact.bin", record.read_entry(entry)
    theirs = (entry / "train_gpt.py").read_text()
    other = theirs.replace("def cut_payload(body: bytes", "def cut_payload(whole: bytes")
    assert other != theirs
    sound = path.read_bytes()
    for damaged in (os.urandom(len(sound)), sound[:-1], sound[:60] + b"?" + sound[61:], b""):
        path.write_bytes(damaged)
        for script in (theirs, other):
            found, doubts = record.check_contents(entry, runs, script)
            assert found
            assert not doubts
