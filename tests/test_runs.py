"""Tiny runs from end to end: what they leave, what they promise to repeat, how they end."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from conftest import TinyData
from jobs import TRAINER, environment, events, launch, snapshot, tiny_job

from train_gpt import Config, main, processor

STEPS = 20


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    settings: dict[str, str]
    folder: Path
    exit_code: int
    out: str
    err: str

    @property
    def log(self) -> str:
        """Its log."""
        return (self.folder / "log.txt").read_text(encoding="utf-8")

    @property
    def losses(self) -> list[float]:
        """The loss of each step, at full precision."""
        return [event["train_loss"] for event in events(self.folder, "step")]

    def line(self, pattern: str) -> re.Match:
        """The one line of the log that a pattern matches from its start."""
        (match,) = re.finditer(f"^{pattern}", self.log, re.M)
        return match


def finish(data: TinyData, runs_dir: Path, processes: int = 0, **changed: str) -> Finished:
    """Run train_gpt.py to its end in a process of its own, or in several."""
    job = tiny_job(data, runs_dir, **{"run_id": f"on-{processes}", **changed})
    done = launch(processes=processes, **job)
    return Finished(job, runs_dir / job["RUN_ID"], done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def run(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run that the others are compared with: plain python, one process."""
    return finish(tiny_data, tmp_path_factory.mktemp("runs"))


# What a run leaves


def test_a_run_ends_well_and_leaves_its_files(run: Finished) -> None:
    assert (run.exit_code, run.err) == (0, "")
    assert set(snapshot(run.folder)) == {
        "log.txt",
        "metrics.jsonl",
        "settings.json",
        "train_gpt.py",
        "artifact.bin",
        "checkpoint_20.pt",
    }
    assert (run.folder / "train_gpt.py").read_bytes() == TRAINER.read_bytes()
    assert json.loads((run.folder / "settings.json").read_text()) == asdict(
        Config.from_env(run.settings)[0]
    )
    assert run.out == run.log


SCORE = r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} .*eval_time:\d+ms$"


@pytest.mark.parametrize(
    "pattern",
    [
        r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=\S",
        r"train_loader:dataset:tiny_sp320 train_shards:2 ",
        r"val_loader:shards pattern=.* tokens:\d+ ",
        r"model_params:\d+$",
        r"XSA:last_3 active_layers:\[0, 1, 2\]$",
        r"world_size:1 ",
        r"attention_mode:gqa num_heads:4 num_kv_heads:2 ",
        r"seed:1337$",
        r"warmup_step:1/",
        r"step:1/20 train_loss:\d\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms ",
        r"late_qat:enabled step:17 scale:0\.3000 ",
        r"ema:applying EMA weights$",
        rf"DIAGNOSTIC post_ema {SCORE}",
        r"gptq:calibrated ",
        r"gptq:quantized ",
        r"Serialized model int6\+zstd: \d+ bytes$",
        r"Code size: \d+ bytes$",
        r"Total submission size int6\+zstd: \d+ bytes ",
        rf"final_int6_roundtrip_exact {SCORE}",
        rf"final_int6_sliding_window_exact {SCORE}",
        r"source sha256:[0-9a-f]{64} bytes:\d+$",
        r"machine device:cpu name:\d+ threads of \S.* world_size:1 ",
        r"[* ] NUM_LAYERS +3 ",
        r"activity late_qat steps:3 of:20$",
        r"activity ema steps:20 of:20$",
        r"activity warmdown steps:9 of:20$",
        r"activity momentum_ramp steps:10 of:20$",
    ],
)
def test_the_log_says_it_once_and_in_the_words_people_search_for(
    run: Finished, pattern: str
) -> None:
    assert run.line(pattern)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (
            "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: other\n",
            "Some CPU @ 2 GHz",
        ),
        ("BogoMIPS\t: 50\n", None),
        (OSError(), None),
    ],
    ids=["named", "unnamed", "no file"],
)
def test_a_processor_says_its_name(
    said: str | OSError, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if isinstance(said, OSError):
            raise said
        return said

    monkeypatch.setattr(Path, "read_text", read)
    assert processor() == (named or platform.processor() or platform.machine())


def test_metrics_hold_the_facts_of_the_log(run: Finished) -> None:
    steps = events(run.folder, "step")
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    for event in steps:
        logged = run.line(rf"step:{event['step']}/{STEPS} train_loss:(\S+) .*lr_scale:(\S+) ")
        assert logged.groups() == (f"{event['train_loss']:.4f}", f"{event['lr_scale']:.4f}")
    for event in events(run.folder, "eval"):
        logged = run.line(rf"{event['label']} val_loss:(\S+) val_bpb:(\S+) name:{event['name']} ")
        assert logged.groups() == (f"{event['val_loss']:.8f}", f"{event['val_bpb']:.8f}")
    assert {event["name"] for event in events(run.folder, "eval")} == {
        "float_chunked",
        "artifact_chunked",
        "artifact_sliding",
    }
    (sizes,), blob = events(run.folder, "artifact"), (run.folder / "artifact.bin").read_bytes()
    assert sizes["sha256"] == hashlib.sha256(blob).hexdigest()
    assert sizes["model_bytes"] == len(blob)
    assert sizes["code_bytes"] == TRAINER.stat().st_size
    assert sizes["left"] == 16_000_000 - len(blob) - TRAINER.stat().st_size


def test_each_step_logs_the_scale_that_it_used(run: Finished) -> None:
    scales = [event["lr_scale"] for event in events(run.folder, "step")]
    assert scales == pytest.approx([min(1.0, (STEPS - step) / 10) for step in range(STEPS)])


def test_the_last_lines_say_what_came_of_it(run: Finished) -> None:
    last = "\n".join(run.out.splitlines()[-8:])
    scores = {event["name"]: event["val_bpb"] for event in events(run.folder, "eval")}
    (sizes,) = events(run.folder, "artifact")
    (params,) = re.findall(r"^model_params:(\d+)$", run.log, re.M)
    assert f"params:{params} steps:{STEPS} tokens_per_second:" in last
    assert f"{sizes['model_bytes']:,} bytes" in last
    assert "16,000,000 bytes" in last
    for name in ("float_chunked", "artifact_chunked", "artifact_sliding"):
        assert f"{scores[name]:.8f}" in last, name
    assert f"val_bpb:{scores['artifact_sliding']:.8f} " in last
    assert f"log: {run.folder / 'log.txt'}" in last
    assert f"artifact: {run.folder / 'artifact.bin'}" in last


# The artifact scored again


def headline(text: str) -> str:
    """The headline score that a run or --eval prints."""
    return re.findall(r"^val_bpb:(\d+\.\d{8}) ", text, re.M)[-1]


@pytest.fixture(scope="module")
def elsewhere(run: Finished, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifact, the tokenizer and the validation split, and nothing else."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(run.folder / "artifact.bin", folder)
    for path in (tiny_data.tokenizer_path, *tiny_data.data_path.glob("fineweb_val*")):
        copy = folder / "data" / path.relative_to(tiny_data.data_path.parents[1])
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


def test_eval_repeats_the_score_from_artifact_and_validation_split_alone(
    run: Finished, elsewhere: Path
) -> None:
    before = snapshot(elsewhere)
    job = launch("--eval", "artifact.bin", cwd=elsewhere, DATA_PATH="not/here")
    assert (job.returncode, job.stderr) == (0, "")
    assert headline(job.stdout) == headline(run.out)
    assert snapshot(elsewhere) == before


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ({"EVAL_STRIDE": "0"}, "artifact_chunked"),
        ({"EVAL_BATCH_SEQS": "5", "PRESET": "mini"}, "artifact_sliding"),
    ],
)
def test_eval_takes_evaluation_settings_from_the_environment(
    override: dict[str, str],
    name: str,
    run: Finished,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(elsewhere)
    with environment(**override):
        assert main(["--eval", "artifact.bin"]) == 0
    (expected,) = [e["val_bpb"] for e in events(run.folder, "eval") if e["name"] == name]
    out = capsys.readouterr().out
    assert float(headline(out)) == pytest.approx(expected, abs=1e-6)
    assert name in out


@pytest.mark.parametrize("setting", ["NUM_LAYERS", "VOCAB_SIZE", "LOGIT_SOFTCAP"])
def test_eval_refuses_model_settings(
    setting: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with environment(**{setting: "3"}):
        assert main(["--eval", str(elsewhere / "artifact.bin")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {setting} is set")


# What is promised to be equal


def test_two_runs_of_one_seed_are_identical(
    run: Finished, tiny_data: TinyData, tmp_path: Path
) -> None:
    again = finish(tiny_data, tmp_path, processes=1)
    assert again.exit_code == 0
    assert again.losses == run.losses
    assert (again.folder / "artifact.bin").read_bytes() == (
        run.folder / "artifact.bin"
    ).read_bytes()
    assert headline(again.out) == headline(run.out)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_run_without_changing_it(
    processes: int, run: Finished, tiny_data: TinyData, tmp_path: Path
) -> None:
    shared = finish(tiny_data, tmp_path, processes=processes)
    assert shared.exit_code == 0, shared.err
    assert len(shared.losses) == STEPS
    assert shared.losses == pytest.approx(run.losses, abs=1e-4)
    assert shared.line(rf"world_size:{processes} rows_per_step:3 ")
    assert shared.line("val_bpb:enabled")
    assert shared.out == shared.log
    calibrated = [events(job.folder, "calibrated")[0]["tokens"] for job in (shared, run)]
    assert calibrated[0] == calibrated[1]
    targets = {event["targets"] for job in (shared, run) for event in events(job.folder, "eval")}
    assert len(targets) == 1


# How runs end


def main_job(job: dict[str, str]) -> int:
    """The exit code of a run in this process."""
    try:
        with environment(**job):
            return main([])
    except SystemExit as stopped:
        return int(stopped.code)


def test_an_artifact_over_its_limit_exits_3_with_everything_kept(
    run: Finished, tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a run without averaging, late QAT, sliding windows and RUN_ID, of another seed."""
    job = tiny_job(
        tiny_data,
        tmp_path,
        "",
        ARTIFACT_LIMIT_BYTES="1000",
        ITERATIONS="4",
        SEED="1",
        QAT_MODE="off",
        AVG_MODE="none",
        EVAL_STRIDE="0",
        VAL_LOSS_EVERY="2",
    )
    assert main_job(job) == 3
    captured = capsys.readouterr()
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", folder.name)
    done = Finished(job, folder, 3, *captured)
    assert {name.replace("_4.", "_20.") for name in snapshot(folder)} == set(snapshot(run.folder))
    total = TRAINER.stat().st_size + (folder / "artifact.bin").stat().st_size
    assert f"{total} bytes, {total - 1000} over ARTIFACT_LIMIT_BYTES=1000" in done.out + done.err
    assert done.line(f"error: .*{total - 1000:,} bytes over ARTIFACT_LIMIT_BYTES=1,000")
    assert done.line(rf"DIAGNOSTIC {SCORE}")
    assert done.line(r"step:2/4 val_loss:\d+\.\d{8} val_bpb:")
    assert "late_qat:" not in done.out
    assert "activity late_qat" not in done.out
    assert "activity ema" not in done.out
    assert headline(done.out) == done.line(r"final_int6_roundtrip_exact .*val_bpb:(\S+) ")[1]
    assert "sliding_window" not in done.out
    assert done.losses[0] != run.losses[0]


def test_a_clock_driven_run_ends_inside_its_budget_at_a_rate_near_zero(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    budget, late = 5.0, 0.15
    assert (
        main_job(
            tiny_job(
                tiny_data,
                tmp_path,
                "clock",
                MAX_WALLCLOCK_SECONDS=str(budget),
                ITERATIONS="100000",
                LATE_QAT_THRESHOLD=str(late),
            )
        )
        == 0
    )
    steps = events(tmp_path / "clock", "step")
    (trained,) = events(tmp_path / "clock", "trained")
    (calibrated,) = events(tmp_path / "clock", "calibrated")
    ends = [0.0, *(event["ms"] / 1e3 for event in steps)]
    slowest = max(after - before for before, after in zip(ends, ends[1:], strict=False))
    assert trained["ms"] < calibrated["ms"] < 1e3 * (budget + slowest + 0.5)
    assert trained["reason"].startswith("stopping_early: wallclock_cap")
    scales = [event["lr_scale"] for event in steps]
    assert scales[0] == 1.0
    assert scales[-1] < 0.05 + 2 * slowest / (0.5 * budget)
    (enabled,) = events(tmp_path / "clock", "late_qat")
    assert enabled["scale"] < late
    (active,) = [e for e in events(tmp_path / "clock", "activity") if e["name"] == "late_qat"]
    assert active["steps"] == sum(scale < late for scale in scales)


def test_a_run_that_diverges_stops_and_names_step_and_tensors(
    tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Decay of 10 at a rate of 1000 multiplies the gains by -9,999 a step: infinite within ten.
    job = tiny_job(tiny_data, tmp_path, "diverges", SCALAR_LR="10", LR_MULT="100", ADAM_WD="10")
    assert main_job(job) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: rank 0, during training: FloatingPointError: step \d+: loss ", line)
    assert "gradient not finite in: " in line
    assert "FloatingPointError" in (tmp_path / "diverges" / "log.txt").read_text().splitlines()[-1]
    assert 1 < int(re.search(r"step (\d+)", line)[1]) < STEPS
    assert "artifact.bin" not in snapshot(tmp_path / "diverges")


# The published systems

OF_A_SYSTEM = ("NUM_LAYERS", "XSA_LAST_N", "VE_LAYERS", "BIGRAM_VOCAB_SIZE", "BIGRAM_DIM", "VE_DIM")


SEEDS = ("pr1361", "pr569", "pr703", "pr334", "pr295")
# Adaptation by document at a size that has several batches before each phase, and little to do.
BY_DOCUMENT = {
    "LORA_RANK": "4",
    "LORA_BATCH_DOCS": "4",
    "LORA_LANES": "1",
    "LORA_PHASE_DOCS": "12",
    "LORA_PHASE_CHUNK_TOKENS": "256",
    "NGRAM_ORDER": "4",
}


def system_job(system: str, data: TinyData, runs_dir: Path, **changed: str) -> dict[str, str]:
    """A tiny run of a published system, its layers and techniques kept."""
    rope_dims = "16" if system == "pr295" else "8"  # of 16, as 64 of 64 there
    job = tiny_job(
        data,
        runs_dir,
        system,
        PRESET=f"{system},mini",
        MODEL_DIM="32",
        NUM_HEADS="2",
        NUM_KV_HEADS="1",
        ROPE_DIMS=rope_dims,
        LOADER="shuffled",
        SWA_EVERY="2",
        TTT_EPOCHS="1",
        ITERATIONS="12",
    )
    return {**{k: v for k, v in job.items() if k not in OF_A_SYSTEM}, **changed}


@pytest.mark.parametrize("system", SEEDS)
def test_a_published_system_trains_exports_and_scores(
    system: str, tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every technique it schedules acts, and the score is repeated from the artifact alone."""
    job = system_job(system, tiny_data, tmp_path)
    assert main_job(job) == 0
    folder, (final,) = tmp_path / system, events(tmp_path / system, "final")
    activity = {e["name"]: e["steps"] for e in events(folder, "activity")}
    techniques = {
        "pr1361": {"late_qat", "ema"},
        "pr569": {"late_qat", "ema"},
        "pr703": {"late_qat", "ema", "mile"},
        "pr334": {"swa", "ttt"},
        "pr295": {"always_qat", "swa"},
    }[system] | {"warmdown", "momentum_ramp"}
    assert activity.keys() == techniques
    assert all(activity.values()), activity
    assert "never acted" not in capsys.readouterr().out
    scores = {e["name"]: e for e in events(folder, "eval")}
    published = Config.from_env(job)[0].sliding
    assert (f"artifact_{published}" in scores) == (published != "cover")
    assert {name for name, e in scores.items() if not e["legal"]} == (
        {"artifact_sliding_train_then_score"} if system == "pr334" else set()
    )
    assert final["val_bpb"] == scores["artifact_sliding"]["val_bpb"]
    if system == "pr334":
        assert scores["artifact_sliding_train_then_score"]["val_bpb"] != final["val_bpb"]
        assert "no legal score follows" in (folder / "log.txt").read_text()
    with environment(
        DATA_PATH=str(tiny_data.data_path), TOKENIZER_PATH=str(tiny_data.tokenizer_path)
    ):
        assert main(["--eval", str(folder / "artifact.bin")]) == 0
    assert f"val_bpb:{final['val_bpb']:.8f} " in capsys.readouterr().out


@pytest.mark.parametrize("system", ["pr1855", "pr2135"])
def test_a_system_that_adapts_by_document_trains_exports_and_scores(
    system: str, tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that it schedules acts, its gates move, and --eval repeats its score."""
    job = system_job(system, tiny_data, tmp_path, ITERATIONS="24", **BY_DOCUMENT)
    job.pop("EVAL_STRIDE")
    assert main_job(job) == 0
    folder = tmp_path / system
    activity = {e["name"]: (e["steps"], e["of"]) for e in events(folder, "activity")}
    techniques = {"warmdown", "momentum_ramp", "depth_loop", "rate_floor", "ema"}
    techniques |= {"ttt", "ttt_phases"}
    if system == "pr2135":
        techniques.add("ngram_tilt")
    assert activity.keys() == techniques
    assert all(acted for acted, _ in activity.values()), activity
    assert activity["ttt"][0] == activity["ttt"][1]
    (gates,) = events(folder, "gates")
    assert gates["largest"].keys() == {"attn.gate", "skip_gates", "smear.weight", "smear.scale"}
    assert all(gates["largest"].values())
    assert "never acted" not in capsys.readouterr().out
    scores = {e["name"]: e for e in events(folder, "eval")}
    assert scores.keys() == {"float_chunked", "artifact_chunked", "artifact_documents"}
    assert scores["artifact_documents"]["label"] == "legal_ttt_exact"
    (final,) = events(folder, "final")
    assert final["val_bpb"] == scores["artifact_documents"]["val_bpb"]
    assert final["val_bpb"] != scores["artifact_chunked"]["val_bpb"]
    (work,) = events(folder, "work")
    assert work["eval_tflops"] > 0
    with environment(
        DATA_PATH=str(tiny_data.data_path), TOKENIZER_PATH=str(tiny_data.tokenizer_path)
    ):
        assert main(["--eval", str(folder / "artifact.bin")]) == 0
    assert f"val_bpb:{final['val_bpb']:.8f} " in capsys.readouterr().out


def test_adaptation_to_scored_text_is_the_headline_and_is_repeated(
    tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(
        tiny_data,
        tmp_path,
        "ttt",
        TTT_MODE="score_first",
        TTT_CHUNK_TOKENS="512",
        TTT_FREEZE_BLOCKS="1",
        TTT_LR="0.05",
        ITERATIONS="8",
        CODEC="lzma",
    )
    assert main_job(job) == 0
    folder, (final,) = tmp_path / "ttt", events(tmp_path / "ttt", "final")
    scores = {e["name"]: e["val_bpb"] for e in events(folder, "eval")}
    assert final["val_bpb"] == scores["artifact_sliding"] < scores["artifact_sliding_no_ttt"]
    assert "legal_ttt_exact" in (folder / "log.txt").read_text()
    with environment(
        DATA_PATH=str(tiny_data.data_path), TOKENIZER_PATH=str(tiny_data.tokenizer_path)
    ):
        assert main(["--eval", str(folder / "artifact.bin")]) == 0
    assert f"val_bpb:{final['val_bpb']:.8f} " in capsys.readouterr().out


def test_adaptation_on_several_processes_ends_with_the_same_score(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    """Three processes, two rows a chunk: one has none and must not keep the others waiting."""
    ttt = {
        "TTT_MODE": "score_first",
        "TTT_CHUNK_TOKENS": "128",
        "TTT_FREEZE_BLOCKS": "0",
        "TTT_LR": "0.02",
        "TTT_EPOCHS": "1",
        "ITERATIONS": "4",
        "MICRO_BATCH_SEQS": "1",
    }
    one, three = (finish(tiny_data, tmp_path, n, **ttt) for n in (0, 3))
    assert (one.exit_code, three.exit_code) == (0, 0), three.err
    scores = [events(run.folder, "final")[0]["val_bpb"] for run in (one, three)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    acted = [
        next(e for e in events(run.folder, "activity") if e["name"] == "ttt")["steps"]
        for run in (one, three)
    ]
    assert acted[0] == acted[1] > 3
