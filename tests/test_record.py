"""The records tool: an entry is made of runs alone, a forgery is found or does not score."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT, TinyData
from hypothesis import given
from hypothesis import strategies as st
from jobs import environment, snapshot, tiny_job
from scipy import stats

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
import checking
import comparison
import pages
import reading
import record
import tracks

SEEDS = (1, 2, 3)
TRACK = "track_non_record_16mb"
NAME = "2026-01-02_Tiny"
ABOUT = {
    "--name": "Tiny",
    "--author": "Ann",
    "--github-id": "ann",
    "--blurb": "A trial.",
    "--date": "2026-01-02",
    "--track": "non_record_16mb",
}


@pytest.fixture(scope="module")
def runs(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of three seeds of one recipe."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        given_settings = {"SEED": str(seed), "ITERATIONS": "12", "VAL_LOSS_EVERY": "5"}
        with environment(**tiny_job(tiny_data, folder, f"seed-{seed}", **given_settings)):
            assert train_gpt.main([]) == 0
    return [folder / f"seed-{seed}" for seed in SEEDS]


def run_here(command: list[str], env: dict[str, str], cwd: Path = ROOT, **_) -> SimpleNamespace:
    """What subprocess.run does with a Python script, in this process, which has torch already."""
    at = next(n for n, word in enumerate(command) if word.endswith(".py"))
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ, env, clear=True):
        patch.setattr(sys, "argv", command[at:])
        patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(command[at], run_name="__main__")
            except SystemExit as end:
                code = end.code
            except Exception:
                traceback.print_exc()
                code = 1
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def processes_are_quick():
    """No process of its own for each question to a script: importing torch takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "run_process", run_here)
        yield


def new(folders: list[Path], root: Path, **changed: str) -> int:
    options = ABOUT | {f"--{name}": value for name, value in changed.items()}
    words = [word for pair in options.items() for word in pair]
    return record.main(["new", *map(str, folders), *words, "--root", str(root)])


@pytest.fixture(scope="module")
def made(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entry made of them."""
    root = tmp_path_factory.mktemp("records")
    assert new(runs, root) == 0
    return root / TRACK / NAME


@pytest.fixture
def entry(made: Path, tmp_path: Path) -> Path:
    """A copy of the entry to tamper with."""
    return Path(shutil.copytree(made, tmp_path / made.name))


@pytest.fixture
def copies(runs: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the run folders to tamper with."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]


def claims_of(folder: Path) -> dict:
    return json.loads((folder / "submission.json").read_text())


def list_again(folder: Path, **changed: object) -> None:
    """What a forger does: change claims, and list the files as they are now."""
    claims = claims_of(folder) | changed
    claims["files"] = {
        path.name: reading.sha256(path)
        for path in folder.iterdir()
        if path.name not in checking.UNLISTED
    }
    (folder / "submission.json").write_text(json.dumps(claims, indent=1) + "\n")


def edit_events(path: Path, kind: str, **facts: object) -> None:
    """Change facts of all events of a kind in a metrics file."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["event"] == kind:
            event.update(facts)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def findings_of(folder: Path) -> str:
    return "\n".join(checking.check_folder(folder).findings)


# What an entry holds


def test_an_entry_is_made_of_its_runs_and_passes(made: Path, runs: list[Path], capsys) -> None:
    assert record.main(["check", str(made), "--details"]) == 0
    assert "Traceback" not in capsys.readouterr().out
    claims = claims_of(made)
    finals = [reading.read_run(run).one("final") for run in runs]
    scores = [final["val_bpb"] for final in finals]
    assert claims["val_bpb"] == pytest.approx(sum(scores) / 3, abs=1e-12)
    variance = sum((score - sum(scores) / 3) ** 2 for score in scores) / 2
    assert claims["val_bpb_std"] == pytest.approx(math.sqrt(variance), abs=1e-9)
    largest = max((run / "artifact.bin").stat().st_size for run in runs)
    assert claims["bytes_total"] == largest + (made / "train_gpt.py").stat().st_size
    assert claims["seeds"] == list(SEEDS)
    best = runs[scores.index(min(scores))]
    assert (made / "artifact.bin").read_bytes() == (best / "artifact.bin").read_bytes()
    assert len(claims["compliance"]) == 6
    assert set(claims["compliance"].values()) == {True}
    for name, _ in record.PICTURES:
        assert (made / name).read_bytes()[:4] == b"\x89PNG"


def test_the_command_gives_what_the_preset_does_not(made: Path) -> None:
    """Run as the page says, the settings come out as those of the entry."""
    claims = claims_of(made)
    given_settings = dict(
        word.split("=", 1) for word in claims["command"].split() if "=" in word and "$" not in word
    )
    given_settings = {name: value.strip("'") for name, value in given_settings.items()}
    cfg = train_gpt.Config.from_env(given_settings)[0]
    settings = json.loads((made / "settings.json").read_text())
    for name, value in reading.common_settings(vars(cfg)).items():
        if not name.endswith("_path"):
            assert reading.shown(value) == reading.shown(settings[name]), name
    defaults = vars(train_gpt.Config())
    for name in claims["settings"]:
        assert settings[name.lower()] != defaults[name.lower()]


def test_entries_of_this_repository_pass_and_the_board_is_theirs() -> None:
    found, rest = record.ranked_entries(ROOT / "records")
    assert not rest
    assert len(found) >= 8
    page = (ROOT / "records" / "README.md").read_text()
    assert page == pages.board_page(ROOT / "records", found, rest)


# Forgeries, whose files are listed anew


FORGED_CLAIMS = {
    "val_bpb": 1.0,
    "val_bpb_std": 0.0001,
    "bytes_total": 1000,
    "bytes_code": "1000",
    "params": 1,
    "seeds": [1, 2],
    "hardware": "8 x H100 (cuda)",
    "best_bpb": 1.0,
    "track": "track_10min_16mb",
    "name": "Other",
    "date": "2026-1-2",
    "author": None,
    "blurb": "A <!-- comment -->",
    "compliance": dict.fromkeys(pages.CONDITION_WORDS, False),
    "settings": {"NUM_LAYERS": "99"},
}


@pytest.mark.parametrize("key", FORGED_CLAIMS)
def test_a_claim_that_the_runs_do_not_give_is_found(key: str, entry: Path) -> None:
    list_again(entry, **{key: FORGED_CLAIMS[key]})
    assert record.main(["check", str(entry)]) == 1
    assert "submission.json" in findings_of(entry) or key == "track"


FORGED_EVENTS = [
    ("final", {"val_bpb": 1.0}),
    ("eval", {"num_bytes": 20_000}),
    ("eval", {"val_bpb": 1.0}),
    ("eval", {"targets": 1_000}),
    ("eval", {"legal": False}),
    ("artifact", {"total": 1_000}),
    ("artifact", {"code_bytes": 1_000, "total": 30_000}),
    ("artifact", {"sha256": "0" * 64}),
    ("source", {"sha256": "0" * 64}),
    ("summary", {"steps": 20_000}),
    ("summary", {"params": 1}),
    ("step", {"step": 7}),
    ("val_data", {"recorded": 1}),
    ("val_data", {"fingerprint": next(iter(tracks.KNOWN_SPLITS))}),
    ("activity", {"steps": 0}),
    ("machine", {"name": "fast"}),
    ("machine", {"name": "[x](y)"}),
    ("final", {"val_bpb": "1.0"}),
    ("summary", {"event": "nothing"}),
]


@pytest.mark.parametrize(("kind", "facts"), FORGED_EVENTS)
def test_metrics_that_do_not_add_up_are_found(kind: str, facts: dict, entry: Path, capsys) -> None:
    """In the seed whose artifact is kept; its README and log say nothing of most of these."""
    best = checking.best_of(reading.read_entry(entry))
    edit_events(best.path, kind, **facts)
    list_again(entry)
    assert record.main(["check", str(entry)]) == 1
    out, err = capsys.readouterr()
    assert not err
    assert len(out.splitlines()) == 2


def test_a_file_that_was_exchanged_added_or_lost_is_found(made: Path, tmp_path: Path) -> None:
    def harmed(harm) -> str:
        folder = Path(shutil.copytree(made, tmp_path / str(len(list(tmp_path.iterdir()))) / NAME))
        harm(folder)
        return findings_of(folder)

    assert "runs.png" in harmed(lambda folder: (folder / "runs.png").write_bytes(b"other"))
    for name in ("artifact.bin", "train_seed1.log", "README.md", "bytes.png", "train_gpt.py"):
        assert name in harmed(lambda folder, name=name: (folder / name).unlink()), name
    assert "helper.py" in harmed(lambda folder: (folder / "helper.py").write_text("x = 1\n"))
    assert "deeper" in harmed(lambda folder: (folder / "deeper").mkdir())

    def link(folder: Path) -> None:
        (folder / "runs.png").unlink()
        (folder / "runs.png").symlink_to("/etc/hostname")

    assert "runs.png" in harmed(link)
    assert not harmed(lambda folder: (folder / "NOTES.md").write_text("My notes.\n"))
    large = bytes(checking.MAX_NOTES_BYTES + 1)
    assert "NOTES.md" in harmed(lambda folder: (folder / "NOTES.md").write_bytes(large))


def test_what_lies_in_a_folder_belongs_together(entry: Path, runs: list[Path]) -> None:
    claims = claims_of(entry)
    scores = {seed: facts["val_bpb"] for seed, facts in claims["seed_results"].items()}
    worst = max(scores, key=scores.__getitem__)
    shutil.copy(runs[int(worst) - 1] / "artifact.bin", entry / "artifact.bin")
    shutil.copy(entry / "train_seed1.log", entry / "train_seed2.log")
    (entry / "README.md").write_text("# Tiny\n\nval_bpb 1.000000\n")
    with open(entry / "train_gpt.py", "ab") as script:
        script.write(b"# more\n")
    list_again(entry)
    found = findings_of(entry)
    for name in ("artifact.bin", "train_seed2.log", "README.md", "another train_gpt.py"):
        assert name in found


def test_one_run_cannot_stand_for_two_seeds(entry: Path) -> None:
    for name in ("metrics_seed{}.jsonl", "train_seed{}.log"):
        shutil.copy(entry / name.format(1), entry / name.format(2))
    claims = claims_of(entry)
    results = claims["seed_results"] | {"2": claims["seed_results"]["1"]}
    list_again(entry, seed_results=results)
    found = findings_of(entry)
    assert "same loss curve" in found
    assert "same artifact" in found


def test_a_folder_is_called_by_date_and_name_and_lies_in_its_track(
    made: Path, tmp_path: Path
) -> None:
    assert findings_of(Path(shutil.copytree(made, tmp_path / "2026-01-03_Tiny")))
    assert findings_of(Path(shutil.copytree(made, tmp_path / "track_10min_16mb" / NAME)))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "{}",
        "\0",
        '{"a":' * 100_000,
        '{"track": ["x"]}',
        '{"track": "moon", "files": {}}',
        '{"track": "track_non_record_16mb", "files": [1]}',
        '{"track": "track_non_record_16mb", "track": "track_10min_16mb"}',
        '{"val_bpb": NaN}',
    ],
)
def test_a_broken_submission_is_one_finding_not_a_traceback(
    content: str, entry: Path, capsys
) -> None:
    (entry / "submission.json").write_text(content)
    assert record.main(["check", str(entry)]) == 1
    out, err = capsys.readouterr()
    assert not err
    assert out.splitlines()[0].startswith("FAIL")
    assert out.isprintable() or out.count("\n") == 2


@given(st.binary(max_size=300))
def test_any_bytes_as_metrics_are_refused_in_one_line(harm: bytes) -> None:
    path = Path(os.environ["PYTEST_SCRATCH"]) / "metrics.jsonl"
    path.write_bytes(harm)
    try:
        events = reading.read_events(path)
    except reading.Wrong as wrong:
        assert "\n" not in reading.one_line(str(wrong))
    else:
        assert all(isinstance(event, dict) for event in events)


@pytest.fixture(autouse=True, scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory):
    """A folder for tests that try many inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        yield


def test_the_verdict_comes_first_and_a_line_for_each_folder(
    made: Path, entry: Path, capsys
) -> None:
    list_again(entry, val_bpb=1.0)
    assert record.main(["check", str(made), str(entry)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("FAIL: 1 of 2")
    assert [line.split()[0] for line in lines[1:]] == ["pass", "FAIL"]
    assert record.main(["check", str(made), "-v"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


# The proof


def test_a_score_is_proved_by_scoring_again(
    made: Path, entry: Path, tiny_data: TinyData, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forger who changes all that is said of a score alike passes, until it is scored."""
    best = min(reading.read_entry(entry), key=lambda run: run.one("final")["val_bpb"])
    for event in best.all("eval"):
        event["val_bpb"] *= 0.9
        event["val_loss"] *= 0.9
    final = best.one("final")
    truth = f"{final['val_bpb']:.8f}"
    final["val_bpb"] *= 0.9
    final["val_loss"] *= 0.9
    best.path.write_text("".join(json.dumps(event) + "\n" for event in best.events))
    log = entry / f"train_seed{best.seed}.log"
    log.write_text(log.read_text().replace(truth, f"{final['val_bpb']:.8f}"))
    script = (entry / "train_gpt.py").read_bytes()
    facts = checking.entry_facts(reading.read_entry(entry), script, claims_of(entry))
    page = " ".join(f"{seed['val_bpb']:.6f}" for seed in facts["seed_results"].values())
    (entry / "README.md").write_text(f"{facts['val_bpb']:.6f} {page}\n")
    list_again(entry, **facts)
    assert record.main(["check", str(entry)]) == 0
    own = {name: value for name, value in tiny_data.env.items() if name != "VOCAB_SIZE"}
    # A setting of whoever checks does not reach the script.
    with environment(**own, COMPILE="0", EVAL_STRIDE="7", NUM_LAYERS="9"):
        assert record.main(["check", str(entry), "--rescore"]) == 1
        assert truth in capsys.readouterr().out
        assert record.main(["check", str(made), "--rescore"]) == 0
        honest = capsys.readouterr().out
        best = checking.best_of(reading.read_entry(made))
        monkeypatch.setattr(checking, "run_process", subprocess.run)  # as it is without this file
        assert not list(checking.score_again(made, best, checking.Result(made)))
    assert truth in honest
    assert not list(made.glob("__pycache__"))


def test_check_runs_nothing_and_rescore_is_not_fooled_by_an_exit(
    entry: Path, tmp_path: Path
) -> None:
    (entry / "train_gpt.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nprint('val_bpb:1.0')\n"
    )
    assert record.main(["check", str(entry)]) == 1
    assert not (tmp_path / "ran").exists()
    best = checking.best_of(reading.read_entry(entry))
    assert list(checking.score_again(entry, best, checking.Result(entry)))


@pytest.mark.parametrize("said", ["", "done\n", '{"compliance": NaN}\n', "[]\n"])
def test_rules_that_cannot_be_tried_are_not_kept(
    said: str, entry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(returncode=0, stdout=said, stderr="")
    monkeypatch.setattr(checking, "run_process", lambda *_, **how: done)
    with pytest.raises(reading.Wrong):
        list(checking.try_rules_again(entry, claims_of(entry)))


# What `new` refuses


def test_new_refuses_and_leaves_nothing(copies: list[Path], tmp_path: Path, capsys) -> None:
    root, (first, second, third) = tmp_path / "records", copies

    def refused(folders: list[Path], **changed: str) -> str:
        assert new(folders, root, **changed) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert not list(root.glob("*/*"))
        return err

    assert "stands twice" in refused([first, second, second])
    refused([first, second, tmp_path / "nowhere"])
    refused(copies, track="moon")
    assert "closed" in refused(copies, track="track_cpu_5min")
    refused(copies, track="cpu_20tflop")
    refused(copies, date="../../../2026-01-02")
    refused(copies, blurb="A <!-- comment -->")
    refused(copies, name="../x")
    refused(copies, track="10min_16mb")
    before = snapshot(third)

    def restored() -> None:
        for name, data in before.items():
            (third / name).write_bytes(data)

    (third / "train_gpt.py").write_bytes(before["train_gpt.py"] + b"\n")
    assert "different train_gpt.py" in refused(copies)
    restored()
    (third / "artifact.bin").write_bytes(before["artifact.bin"][:-1])
    assert "artifact.bin" in refused(copies)
    restored()
    settings = json.loads(before["settings.json"]) | {"matrix_lr": 0.5}
    (third / "settings.json").write_text(json.dumps(settings))
    assert "MATRIX_LR" in refused(copies)
    restored()
    (third / "metrics.jsonl").write_bytes(before["metrics.jsonl"] + b'{"event": "resumed"}\n')
    assert "resumed" in refused(copies)
    restored()
    lines = before["metrics.jsonl"].splitlines(keepends=True)
    (third / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    assert "has not ended" in refused(copies)


def test_an_entry_is_never_written_over(made: Path, runs: list[Path], capsys) -> None:
    before = snapshot(made)
    assert new(runs, made.parents[1]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(made) == before


def test_an_entry_says_what_changed_against_its_base(
    made: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "records"
    base = Path(shutil.copytree(made, root / TRACK / made.name))
    for path in base.glob("metrics_*"):
        loss = 0.1 + 0.01 * int(path.stem[-1])
        edit_events(path, "final", val_loss=3.2 + loss, val_bpb=2.2 + loss)
    (base / "train_gpt.py").write_bytes((base / "train_gpt.py").read_bytes() + b"import this\n")
    list_again(base, settings=claims_of(base)["settings"] | {"EMA_DECAY": "0.7"}, val_bpb=2.32)
    monkeypatch.setattr(record, "ask_script", lambda *paths: said_of(made))
    monkeypatch.setitem(sys.modules, "pictures", None)
    assert new(runs, root, base=str(base), name="Other") == 0
    folder = root / TRACK / "2026-01-02_Other"
    said = claims_of(folder)["base"]
    assert ["EMA_DECAY", "0.7", "0.9"] in said["changes"]
    assert (said["added"], said["removed"]) == (0, 1)
    assert 0 < said["p"] < 0.05
    assert "\n-import this\n" in (folder / "source.diff").read_text()
    assert not findings_of(folder)
    list_again(folder, base=said | {"val_bpb": 9.0})
    assert "base" in findings_of(folder)
    list_again(base)
    (base / "submission.json").write_text(
        json.dumps(claims_of(base) | {"data": {"fingerprint": 1}})
    )
    assert new(runs, root, base=str(base), name="Third") == 1


def said_of(made: Path) -> dict:
    """What the script would say again of the runs of an entry that exists."""
    settings = json.loads((made / "settings.json").read_text())
    defaults = dict(vars(train_gpt.Config()))
    return {
        "compliance": claims_of(made)["compliance"],
        "defaults": defaults,
        "preset": {name: settings.get(name, value) for name, value in defaults.items()},
    }


# Comparison


def test_paired_by_seed_as_scipy_and_by_hand() -> None:
    before = {1: 2.00, 2: 2.10, 3: 2.05}
    after = {1: 1.98, 2: 2.07, 3: 2.04}
    found = comparison.difference(before, after)
    deltas = [-0.02, -0.03, -0.01]
    mean, error = sum(deltas) / 3, stats.sem(deltas)
    assert found.paired
    assert found.count == 3
    assert found.mean == pytest.approx(mean)
    half = stats.t.ppf(0.975, 2) * error
    assert found.interval == pytest.approx((mean - half, mean + half))
    assert found.p_better == pytest.approx(stats.t.cdf(mean / error, 2))
    by_margin = comparison.difference(before, after, margin=0.005)
    assert by_margin.p_by_margin == pytest.approx(stats.t.cdf((mean + 0.005) / error, 2))


def test_unpaired_as_welch() -> None:
    before, after = [2.00, 2.10, 2.05, 2.03], [1.9, 1.95, 1.92]
    found = comparison.difference(dict(enumerate(before)), dict(enumerate(after, start=10)))
    expected = stats.ttest_ind(after, before, equal_var=False)
    assert not found.paired
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_better == pytest.approx(expected.pvalue / 2)


@pytest.mark.parametrize(
    ("after", "beginning"),
    [
        ((1.90, 2.001, 1.949), "B is better"),
        ((2.10, 2.201, 2.149), "A is better"),
        ((2.01, 2.08, 2.06), "Nobody can tell"),
        ((2.01, 2.11, 2.06), "Nobody can tell"),  # as if shifted by hand: no scatter at all
        ((1.50,), "Nobody can tell"),
    ],
)
def test_the_verdict(after: tuple[float, ...], beginning: str) -> None:
    before = dict(enumerate((2.00, 2.10, 2.05)))
    assert comparison.verdict(comparison.difference(before, dict(enumerate(after)))).startswith(
        beginning
    )


def with_scores(made: Path, folder: Path, name: str, scores: tuple[float, ...], **data) -> Path:
    """An entry's runs as plain run folders below `folder`, with other scores."""
    settings = json.loads((made / "settings.json").read_text())
    for seed, score in enumerate(scores, start=1):
        run = folder / f"{name}_{seed}"
        run.mkdir(parents=True)
        (run / "settings.json").write_text(json.dumps(settings | {"seed": seed, "blurb": name}))
        shutil.copy(made / "metrics_seed1.jsonl", run / "metrics.jsonl")
        edit_events(run / "metrics.jsonl", "final", val_bpb=score, val_loss=1.5 * score)
        if data:
            edit_events(run / "metrics.jsonl", "val_data", **data)
    return folder


def test_run_folders_are_grouped_by_recipe_and_paired_by_seed(
    made: Path, tmp_path: Path, capsys
) -> None:
    with_scores(made, tmp_path, "old", (2.00, 2.10, 2.05))
    with_scores(made, tmp_path, "new", (1.90, 2.001, 1.949))
    folders = [*sorted(tmp_path.glob("old*")), *sorted(tmp_path.glob("new*"))]
    assert record.main(["compare", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("B is better")
    assert "BLURB: old in A, new in B" in out
    # Whatever their order.
    first, second = comparison.sides([folders[n] for n in (0, 3, 4, 1, 2, 5)])
    assert sorted(first.facts) == sorted(second.facts) == [1, 2, 3]
    assert first.mean("val_bpb") == pytest.approx(2.05)
    # An entry against a run folder, and one run against another.
    assert record.main(["compare", str(made), str(folders[0])]) == 0
    assert record.main(["compare", str(folders[0]), str(folders[3])]) == 0
    assert "Nobody can tell" in capsys.readouterr().out
    # Three recipes, or one, are no two sides; a run that has not ended has no score.
    assert record.main(["compare", str(made), *map(str, folders)]) == 1
    assert record.main(["compare", *map(str, folders[:3])]) == 1
    unfinished = folders[0] / "metrics.jsonl"
    unfinished.write_text("".join(unfinished.read_text().splitlines(keepends=True)[:-1]))
    assert record.main(["compare", str(folders[0]), str(folders[3])]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("error: ") == err.count("\n") == 3


def test_scores_of_two_texts_are_not_compared(made: Path, tmp_path: Path) -> None:
    with_scores(made, tmp_path, "old", (2.00,))
    with_scores(made, tmp_path, "new", (1.00,), fingerprint="0" * 64)
    assert record.main(["compare", str(tmp_path / "old_1"), str(tmp_path / "new_1")]) == 1


def test_one_text_cut_by_two_tokenizers_is_compared_by_its_bytes(
    made: Path, tmp_path: Path
) -> None:
    one, two = list(tracks.KNOWN_SPLITS)[:2]
    with_scores(made, tmp_path, "old", (2.00, 2.10), fingerprint=one)
    with_scores(made, tmp_path, "new", (1.90, 2.00), fingerprint=two)
    a, b = comparison.sides([*sorted(tmp_path.glob("old*")), *sorted(tmp_path.glob("new*"))])
    for facts in b.facts.values():
        facts["val_loss"] *= 1.5  # longer pieces
    of_a, of_b = comparison.scores_of(a, b, "val_loss")
    assert [of_b[seed] - of_a[seed] for seed in of_a] == pytest.approx([-0.15, -0.15])
    assert a.text == b.text


# Pictures, live runs, and what may be missing


def ink(path: Path) -> int:
    """Pixels of a picture that are not white."""
    from matplotlib import image

    return int((image.imread(path)[..., :3] < 0.95).any(-1).sum())


def test_plot_draws_runs_and_entries_live_or_ended(
    made: Path, copies: list[Path], tmp_path: Path, capsys
) -> None:
    live = copies[0] / "metrics.jsonl"
    lines = live.read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"step": 8' in line)
    live.write_text("".join(lines[:at]) + lines[at][:25])  # half a line: it is being written
    empty = copies[1] / "metrics.jsonl"
    empty.write_text("")
    sizes = []
    for number, folders in enumerate((copies[:2], [*copies, made])):
        out = tmp_path / f"{number}.png"
        by = "seconds" if made in folders else "steps"
        command = ["plot", *map(str, folders), "--by", by, "--out", str(out)]
        assert record.main(command) == 0
        sizes.append(ink(out))
    assert sizes == sorted(set(sizes))
    assert "7 steps" in capsys.readouterr().out


def test_training_losses_are_drawn_in_the_unit_of_the_score(runs: list[Path]) -> None:
    import pictures

    run = reading.read_run(runs[0])
    final = run.all("final")[-1]
    assert final["val_loss"] * pictures.bits_of_a_nat(run) == pytest.approx(final["val_bpb"])
    assert pictures.bits_of_a_nat(reading.Run(run.path, 1, run.all("step"), {})) is None


def test_plot_never_overwrites_what_is_no_picture(entry: Path, tmp_path: Path, capsys) -> None:
    """Nor does it draw steps that do not say what they are drawn by."""
    mine = tmp_path / "thesis.txt"
    mine.write_text("mine")
    assert record.main(["plot", str(entry), "--out", str(mine)]) == 1
    for path in entry.glob("metrics_*"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            event.pop("tflops", None)
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    by_work = ["--by", "tflops", "--out", str(tmp_path / "x.png")]
    assert record.main(["plot", str(entry), *by_work]) == 1
    assert record.main(["plot", str(tmp_path)]) == 1
    assert mine.read_text() == "mine"
    assert not (tmp_path / "x.png").exists()
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.parametrize("missing", ["matplotlib", "scipy"])
def test_without_a_package_the_tool_works_or_names_it_in_a_line(
    missing: str, made: Path, runs: list[Path], tmp_path: Path, capsys, monkeypatch
) -> None:
    for name in [name for name in sys.modules if name == "pictures" or name.startswith(missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(record, "ask_script", lambda *paths: said_of(made))
    with_scores(made, tmp_path / "other", "new", (1.90, 2.001, 1.949))
    other = sorted((tmp_path / "other").iterdir())
    assert record.main(["check", str(made)]) == 0
    assert record.main(["compare", str(made), str(other[0])]) == 0
    assert record.main(["compare", *map(str, [*runs, *other])]) == 0
    compared = capsys.readouterr().out
    if missing == "matplotlib":
        assert new(runs, tmp_path / "records") == 0
        assert not findings_of(tmp_path / "records" / TRACK / NAME)
        assert record.main(["plot", str(made), "--out", str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr().err + compared
    assert f"pip install {missing}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("flags", [["-OO"], []])
def test_the_command_line_without_docstrings_and_into_a_closed_pipe(flags: list[str]) -> None:
    entry = ROOT / "records/track_cpu_5min/2026-11-27_Defaults-mini"
    command = [sys.executable, *flags, str(ROOT / "records" / "record.py")]
    done = subprocess.run([*command, "check", str(entry)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([*command, "--help"], capture_output=True).returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(
        [*command, "check", str(entry)], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert closed.stderr == ""
    assert closed.returncode == -13  # SIGPIPE, which a shell shows as 141


# The board


def test_the_board_ranks_within_one_text_and_shows_counted_work(
    made: Path, tmp_path: Path, capsys
) -> None:
    root = tmp_path / "records"
    for name, factor, work in (("Good", 1.0, 12.5), ("Bad", 1.1, 20.0)):
        folder = root / TRACK / f"2026-01-02_{name}"
        shutil.copytree(made, folder)
        for path in folder.glob("metrics_*"):
            events = [json.loads(line) for line in path.read_text().splitlines()]
            for event in events:
                for key in event.keys() & {"val_bpb", "val_loss"}:
                    event[key] *= factor
            events.insert(-1, {"event": "work", "tflops": work})
            path.write_text("".join(json.dumps(event) + "\n" for event in events))
        runs, script = reading.read_entry(folder), (folder / "train_gpt.py").read_bytes()
        facts = checking.entry_facts(runs, script, claims_of(folder) | {"name": name})
        scores = [facts["val_bpb"], *(s["val_bpb"] for s in facts["seed_results"].values())]
        (folder / "README.md").write_text(" ".join(f"{score:.6f}" for score in scores))
        for run in runs:
            score = run.one("final")["val_bpb"]
            (folder / f"train_seed{run.seed}.log").write_text(f"{score:.8f}\n")
        list_again(folder, **facts)
    forged = Path(shutil.copytree(made, root / TRACK / NAME))
    list_again(forged, val_bpb=0.9)
    (root / "track_10min_16mb" / "empty").mkdir(parents=True)
    assert record.main(["board", "--root", str(root)]) == 0
    page = (root / "README.md").read_text()
    ranked = re.findall(r"^\| (\d) \| \[(\w+)\].*?\| (12.5|20) \|", page, re.M)
    assert ranked == [("1", "Good", "12.5"), ("2", "Bad", "20")]
    assert f"Not ranked: [{NAME}]" in page
    assert "Not ranked: [empty]" in page
    import pictures

    claims = [claims_of(root / TRACK / f"2026-01-02_{name}") for name in ("Good", "Bad")]
    without_work = [{key: claim[key] for key in claim if key != "tflops"} for claim in claims]
    pictures.draw_board(root / "alone.png", without_work)
    pictures_of = [(root / name).read_bytes() for name in ("board.png", "alone.png")]
    width, alone = (int.from_bytes(png[16:20], "big") for png in pictures_of)
    assert width > alone  # a second panel, against counted work
    for track, rules in tracks.TRACKS.items():
        is_open = rules.state == tracks.OPEN
        written = root / track / "README.md"
        assert ("record.py new" in written.read_text()) == is_open
        assert rules.reasons in written.read_text()
    capsys.readouterr()


def test_prepared_data_are_shown_where_any_clone_has_them() -> None:
    given_settings = {
        "data_path": "/home/me/./clone/data/datasets/docs_sp4096",
        "seed": 1,
        "tokenizer_path": "/elsewhere/t.model",
    }
    right = given_settings | {"data_path": "./data/datasets/docs_sp4096"}
    assert reading.portable(given_settings) == right
    own = {"data_path": "/mnt/data/datasets/mine_sp4096", "tokenizer_path": ["no text"]}
    assert reading.portable(own) == own
