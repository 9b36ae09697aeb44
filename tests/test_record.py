"""The records tool: folders made of runs alone, every changed digit found, honest comparison."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TinyData
from jobs import environment, tiny_job
from scipy import stats

import train_gpt

sys.path.insert(0, str(ROOT / "records"))
import compliance
import record

SEEDS = ("1", "2", "3")
TRACK = "track_cpu_5min"
ABOUT = ("--name", "Tiny", "--author", "Ann", "--github-id", "ann", "--blurb", "A trial.",
         "--date", "2026-01-02")


@pytest.fixture(scope="module", autouse=True)
def tiny_track():
    """The CPU track, but open to the tests' own text; a busy machine passes 2.5 s now and then."""
    rules = record.TRACKS[TRACK]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(record.TRACKS, TRACK, {
            **rules, "dataset": "", "reasons": (*rules["reasons"], "training and calibration")})
        yield


def job(data: TinyData, runs_dir: Path, name: str, **changed: str) -> Path:
    """A clock-driven run of some seconds; returns its folder."""
    settings = {"MAX_WALLCLOCK_SECONDS": "2.5", "ITERATIONS": "20000", **changed}
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
    assert names == {"README.md", "submission.json", "train_gpt.py", "settings.json",
                     "requirements.txt", "artifact.bin", "loss.png", "bytes.png", "bpb.png",
                     *(f"train_seed{s}.log" for s in SEEDS),
                     *(f"metrics_seed{s}.jsonl" for s in SEEDS)}


def test_numbers_are_those_of_the_logs(made: Path, runs: list[Path]) -> None:
    claims = json.loads((made / "submission.json").read_text())
    scores = [float(re.findall(r"^val_bpb:([0-9.]+)", (run / "log.txt").read_text(), re.M)[0])
              for run in runs]
    assert claims["val_bpb"] == pytest.approx(sum(scores) / 3, abs=1e-8)
    variance = sum((score - sum(scores) / 3) ** 2 for score in scores) / 2
    assert claims["val_bpb_std"] == pytest.approx(math.sqrt(variance), abs=1e-8)
    assert claims["bytes_code"] == (made / "train_gpt.py").stat().st_size
    assert claims["bytes_total"] == claims["bytes_code"] + max(
        (run / "artifact.bin").stat().st_size for run in runs)
    assert claims["seeds"] == [1, 2, 3]
    best = runs[scores.index(min(scores))]
    assert (made / "artifact.bin").read_bytes() == (best / "artifact.bin").read_bytes()
    assert all(claims["compliance"].values())
    assert len(claims["compliance"]) == 6
    page = (made / "README.md").read_text()
    assert all(f"{score:.6f}" in page for score in scores)


def test_the_folder_scores_again_with_its_own_script(made: Path, tiny_data: TinyData) -> None:
    with environment(**{name: value for name, value in tiny_data.env.items()
                        if name != "VOCAB_SIZE"}):
        assert record.main(["check", str(made), "--rescore"]) == 0


# Tampering


def change(path: Path, pattern: str, replacement: str | None = None) -> None:
    """Replace the first match; without a replacement, its one digit outside groups by the next."""
    def next_digit(match: re.Match) -> str:
        return match[1] + str((int(match[0][len(match[1])]) + 1) % 10)

    text = path.read_text()
    changed = re.sub(pattern, next_digit if replacement is None else replacement, text, count=1,
                     flags=re.M)
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
    "a final line gone": ("train_seed3.log", r"^params:.*\n", ""),
    "a digit of the README": ("README.md", r"(\| \*\*\d\.)\d", None),
    "a digit of the mean": ("submission.json", r'^( "val_bpb": \d\.)\d', None),
    "a digit of the spread": ("submission.json", r'^( "val_bpb_std": \d\.\d)\d', None),
    "a seed's result": ("submission.json", r'("val_loss": \d\.\d\d)\d', None),
    "the size": ("submission.json", r'("bytes_total": )\d', None),
    "the script": ("train_gpt.py", r"^import math$", "import math  # slip"),
}


@pytest.mark.parametrize("forged", [False, True], ids=["", "files-listed-anew"])
@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_change_is_found_and_its_place_named(what: str, forged: bool, entry: Path,
                                               capsys) -> None:
    name, pattern, replacement = TAMPERINGS[what]
    change(entry / name, pattern, replacement)
    if forged:
        rehash(entry)
    assert record.main(["check", str(entry)]) == 1
    out = capsys.readouterr().out
    assert name in out, out


def test_a_seed_of_another_run_is_found(entry: Path, tiny_data: TinyData, tmp_path: Path,
                                        capsys) -> None:
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


@pytest.mark.parametrize("name", ["artifact.bin", "train_seed1.log", "metrics_seed3.jsonl",
                                  "settings.json", "README.md", "loss.png", "train_gpt.py"])
def test_a_missing_file_is_found(name: str, entry: Path, capsys) -> None:
    (entry / name).unlink()
    assert record.main(["check", str(entry)]) == 1
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"track": "moon"}', "\0"])
def test_a_broken_submission_is_one_line_not_a_traceback(content: str, entry: Path,
                                                         capsys) -> None:
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


def test_refused(copies: list[Path], tmp_path: Path, tiny_data: TinyData, capsys,
                 monkeypatch: pytest.MonkeyPatch) -> None:
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
    driven = job(tiny_data, tmp_path, "driven", SEED="3", MAX_WALLCLOCK_SECONDS="0",
                 ITERATIONS="20")
    refused([first, second, driven], "ITERATIONS=20, but 20000 in")
    run = record.read_run(driven / "log.txt", driven / "metrics.jsonl", driven / "settings.json")
    assert any("MAX_WALLCLOCK_SECONDS=0" in finding for finding in record.check_track(run, TRACK))
    assert new(copies, root) == 0
    assert new(copies, root) == 1
    assert "exists already" in capsys.readouterr().err


def test_an_illegal_score_is_refused(tiny_data: TinyData, tmp_path: Path, capsys) -> None:
    folders = [job(tiny_data, tmp_path, f"ttt-{seed}", SEED=seed, GPTQ_CALIB="train_after_cap")
               for seed in SEEDS]
    assert new(folders, tmp_path / "records") == 1
    assert "train_after_cap" in capsys.readouterr().err


# The compliance suite finds what it looks for


def flawed(tmp_path: Path, old: str, replacement: str):
    """The trainer with a fault, as a module."""
    text = (ROOT / "train_gpt.py").read_text()
    assert old in text
    path = tmp_path / "train_gpt.py"
    path.write_text(text.replace(old, replacement))
    return compliance.load_script(path)


def small(script, **changed):
    cfg = script.Config(**{**train_gpt.PRESETS["mini"], "rope_dims": 8, "bigram_vocab_size": 64,
                           "bigram_dim": 8, "ve_dim": 8, "num_layers": 3, "xsa_last_n": 1,
                           "ve_layers": "1", "model_dim": 32, "eval_seq_len": 32,
                           "eval_stride": 8, "vocab_size": 64, "swa_every": 5,
                           "ttt_batch_seqs": 2, **changed, "ttt_chunk_tokens": 64})
    model = script.GPT(cfg)
    script.initialize(model, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return cfg, model


@pytest.mark.parametrize(("old", "replacement"), [
    ("is_causal=True", "is_causal=False"),
    ("F.pad(x[:, :-1], (0, 0, 1, 0))", "F.pad(x[:, 1:], (0, 0, 0, 1))"),
    ("x = rms_norm((self.tok_emb(input_ids)",
     "x = rms_norm((self.tok_emb(input_ids) + self.tok_emb(input_ids).mean(1, keepdim=True)"),
])
def test_a_leak_from_the_future_is_seen(old: str, replacement: str, tmp_path: Path) -> None:
    assert not compliance.is_causal(small(flawed(tmp_path, old, replacement))[1], 64, 32)
    assert compliance.is_causal(small(train_gpt)[1], 64, 32)


def test_a_score_that_is_no_distribution_is_seen(tmp_path: Path) -> None:
    script = flawed(tmp_path, "nats = nats.view_as(target_ids)",
                    "nats = 0.9 * nats.view_as(target_ids)")
    assert not compliance.is_a_distribution(small(script)[1], 64, 32)
    assert compliance.is_a_distribution(small(train_gpt)[1], 64, 32)


def test_a_target_scored_twice_is_seen(tmp_path: Path) -> None:
    script = flawed(tmp_path, 'if form == "cover" else np.maximum(ends - stride',
                    'if form == "never" else np.maximum(ends - stride')
    assert not compliance.scores_once(script, small(script)[0], 100)
    assert compliance.scores_once(train_gpt, small(train_gpt)[0], 100)


def test_learning_before_scoring_is_seen(tmp_path: Path) -> None:
    script = flawed(tmp_path, "done * cfg.ttt_chunk_tokens,", "(done + 1) * cfg.ttt_chunk_tokens,")
    cfg, model = small(script, ttt_mode="score_first", ttt_freeze_blocks=0)
    assert not compliance.scores_before_update(script, cfg, model)
    cfg, model = small(train_gpt, ttt_mode="score_first", ttt_freeze_blocks=0)
    assert compliance.scores_before_update(train_gpt, cfg, model)
    cfg, model = small(train_gpt)
    assert compliance.scores_before_update(train_gpt, cfg, model)


# A stranger's folder in the official format


def official(folder: Path, seeds: dict[int, dict], **claims: object) -> Path:
    """A folder as the official repository's README describes it."""
    folder.mkdir()
    (folder / "train_gpt.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# Ours\n")
    for seed, facts in seeds.items():
        lines = ["step:20000/20000 train_loss:2.1 train_time:599000ms step_avg:85ms",
                 f"stopping_early: wallclock_cap train_time:{facts.get('ms', 599_900)}ms "
                 "step:7000/20000", "Code size: 6 bytes",
                 f"Total submission size int6+zstd: {facts.get('total', 15_900_000)} bytes"]
        if "bpb" in facts:
            lines.append(f"final_int6_sliding_window_exact val_loss:1.9 val_bpb:{facts['bpb']} "
                         "eval_time:75000ms")
        (folder / f"train_seed{seed}.log").write_text("\n".join(lines) + "\n")
    (folder / "submission.json").write_text(json.dumps(
        {"author": "B", "name": "Theirs", "val_bpb": 1.12, "bytes_total": 15_900_000, **claims}))
    return folder


def test_a_sound_folder_in_the_official_format(tmp_path: Path, capsys) -> None:
    folder = official(tmp_path / "theirs", {1: {"bpb": 1.11}, 2: {"bpb": 1.12}, 3: {"bpb": 1.13}})
    assert record.main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "cannot be verified: no metrics and no activity ledger" in out
    assert "ok (official format)" in out


def test_three_planted_faults_are_named(tmp_path: Path, capsys) -> None:
    folder = official(tmp_path / "theirs", {
        1: {"bpb": 1.11}, 2: {"bpb": 1.12, "total": 16_024_793}, 3: {}}, val_bpb=1.10)
    assert record.main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "train_seed2.log: 16,024,793 bytes are over the cap" in out
    assert "train_seed3.log: no line of the final score" in out
    assert "val_bpb is 1.1, the logs' mean is 1.115" in out


@pytest.mark.parametrize(("seeds", "claims", "words"), [
    ({1: {"bpb": 1.12}, 2: {"bpb": 1.12}}, {}, "2 logs"),
    ({1: {"bpb": 1.12, "ms": 602_000}, 2: {"bpb": 1.12}, 3: {"bpb": 1.12}}, {},
     "train_seed1.log: training took 602.0 s"),
    ({n: {"bpb": 1.12} for n in (1, 2, 3)}, {"bytes_total": 15_000_000}, "bytes_total is 15000000"),
    ({n: {"bpb": 1.12} for n in (1, 2, 3)}, {"seed_results": {"1": {"val_bpb": 1.05}}},
     "1.05 of a seed is in no log"),
])
def test_other_faults_in_the_official_format(seeds, claims, words, tmp_path: Path,
                                             capsys) -> None:
    assert record.main(["check", str(official(tmp_path / "theirs", seeds, **claims))]) == 1
    assert words in capsys.readouterr().out


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
    found = record.compare_scores({f"a{n}": v for n, v in enumerate(x)},
                                  {f"b{n}": v for n, v in enumerate(y)})
    expected = stats.ttest_ind(y, x, equal_var=False)
    assert not found.paired
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_better == pytest.approx(expected.pvalue / 2)
    with pytest.raises(record.Wrong):
        record.compare_scores({"1": 2.0}, {"2": 2.0, "3": 2.1})


def claims_of(name: str, scores: list[float], fingerprint: str = "f") -> dict:
    return {"name": name, "val_bpb": sum(scores) / len(scores),
            "data": {"fingerprint": fingerprint},
            "seed_results": {str(n): {"val_bpb": s, "val_loss": 1.7 * s}
                             for n, s in enumerate(scores)}}


def test_the_verdict_in_words() -> None:
    a = claims_of("Old", [2.00, 2.10, 2.05])
    text = record.compare_text(a, claims_of("New", [1.90, 2.001, 1.949]))
    assert "B is better by 0.100" in text
    assert "the difference is not chance" in text
    assert "p < 0.01): met" in text
    unclear = record.compare_text(a, claims_of("New", [2.01, 2.08, 2.06]))
    assert "cannot tell" in unclear
    assert "p < 0.01): not met" in unclear
    worse = record.compare_text(a, claims_of("New", [2.10, 2.201, 2.149]))
    assert "B is worse" in worse
    assert "p < 0.25): not met" in worse
    assert "different validation text" in record.compare_text(a, claims_of("X", [1.0, 1.1], "g"))


# The board


def test_board_ranks_within_one_text_only(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "records"
    for name, bpb, split in (("Good", 1.5, "aa"), ("Bad", 1.7, "aa"), ("Elsewhere", 0.9, "bb")):
        folder = root / TRACK / f"2026-01-02_{name}"
        shutil.copytree(made, folder)
        claims = json.loads((folder / "submission.json").read_text())
        claims.update(name=name, val_bpb=bpb)
        claims["data"]["fingerprint"] = split
        (folder / "submission.json").write_text(json.dumps(claims))
    assert record.main(["board", "--root", str(root)]) == 0
    page = (root / "README.md").read_text()
    ranked = re.findall(r"^\| (\d) \| \[(\w+)\]", page, re.M)
    assert ranked == [("1", "Good"), ("2", "Bad"), ("1", "Elsewhere")]
    assert "Nobody has run it yet" in page
    assert (root / "board.png").read_bytes()[:4] == b"\x89PNG"


def test_an_entry_based_on_another_lists_what_changed(made: Path, tiny_data: TinyData,
                                                      tmp_path: Path) -> None:
    folders = [job(tiny_data, tmp_path, f"run-{s}", SEED=s, EMA_DECAY="0.8") for s in SEEDS]
    root = tmp_path / "records"
    base = Path(shutil.copytree(made, root / TRACK / made.name))
    assert new(folders, root, "--base", str(base), "--name", "Other") == 0
    folder = root / TRACK / "2026-01-02_Other"
    assert record.main(["check", str(folder)]) == 0
    page = (folder / "README.md").read_text()
    assert "EMA_DECAY 0.9 -> 0.8; source the same." in page


def test_entries_of_this_repository_check() -> None:
    folders = [str(path.parent) for path in (ROOT / "records").glob("track_*/*/submission.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(record.TRACKS, TRACK, {**record.TRACKS[TRACK], "dataset": "docs_",
                                             "reasons": record.TRACKS[TRACK]["reasons"][:2]})
        assert record.main(["check", *folders]) == 0
    page = (ROOT / "records" / "README.md").read_text()
    assert page == record.board(ROOT / "records")
