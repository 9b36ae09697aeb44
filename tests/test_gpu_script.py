"""benchmarks/gpu.py goes on whatever a part does, and tells it in its report."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from jobs import BARE_ENVIRONMENT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402


def test_a_minimal_run_writes_its_report(tmp_path: Path) -> None:
    """A GPU's kernels are missing with a reason; torch's own is timed."""
    folder = tmp_path / "report"
    command = [ROOT / "benchmarks" / "gpu.sh", "--tiny", "--only", "attention", "--out", folder]
    subprocess.run(command, env=BARE_ENVIRONMENT, check=True, timeout=200)
    parts = json.loads((folder / "gpu.json").read_text())["parts"]
    assert {name: part["outcome"] for name, part in parts.items()} == {
        "data": "done",
        "attention": "done",
    }
    found = parts["attention"]["facts"]
    assert found["sdpa"]["ms"] > 0
    assert "flash_attn_interface" in found["fa3"]["failed"]
    page = (folder / "gpu.md").read_text()
    assert "| sdpa/flash | " in page
    assert "| fa3 | not here: " in page
    assert (folder / "datasets" / "tiny_sp320" / "fineweb_val.json").is_file()


@pytest.mark.parametrize("preset", ["pr1361", "pr1855"])
def test_steps_of_a_preset_are_timed(preset: str, tmp_path: Path, monkeypatch) -> None:
    """With and without its loop; the faster and the slower cost what is counted."""
    session = gpu.Session(tmp_path, tiny=True)
    gpu.make_data(session)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(gpu, "TINY_STEPS", 1)
    smallest = {"NUM_LAYERS": 6, "VE_LAYERS": "", "XSA_LAST_N": 6, "TRAIN_BATCH_TOKENS": 256}
    if preset == "pr1855":
        smallest["PARALLEL_START_LAYER"] = 4
    rows = gpu.measure_preset(session.settings(preset, **smallest), tiny=True)
    assert [row["loops"] for row in rows] == (["no", "yes"] if preset == "pr1855" else [""])
    assert sorted(row["TFLOP"] for row in rows) == [row["TFLOP"] for row in rows]
    assert all(row["ms"] > 0 and row["peak MiB"] > 50 and row["loss"] > 1 for row in rows)
    assert all(0 < share <= 1 for row in rows for _, _, share in row["operators"])
    lines = [*gpu.preset_lines([{"preset": preset, **row} for row in rows])]
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def fails(session: gpu.Session) -> str:
    return session.call("-c", "print('begun'); print('error: no | way'); raise SystemExit(3)")


def hangs(session: gpu.Session) -> str:
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    return session.call("-c", code)


def cannot(session: gpu.Session) -> str:
    raise gpu.NotPossible("one GPU")


def breaks(session: gpu.Session) -> dict:
    return {}["nothing"]


def test_whatever_a_part_does_the_next_begins(tmp_path: Path, monkeypatch) -> None:
    works = {"fails": fails, "hangs": hangs, "cannot": cannot, "breaks": breaks, "ends": last}
    limits = dict.fromkeys(works, 60.0) | {"hangs": 5.0}
    monkeypatch.setattr(gpu, "PARTS", {name: (works[name], limits[name]) for name in works})
    session, started = gpu.Session(tmp_path, tiny=True), time.monotonic()
    report = gpu.run_all([*works], session)
    assert time.monotonic() - started < 50
    told = {name: (part["outcome"], part["said"]) for name, part in report["parts"].items()}
    assert told == {
        "fails": ("failed", "error: no | way"),
        "hangs": ("failed", "stopped at its limit, after: begun"),
        "cannot": ("not possible", "one GPU"),
        "breaks": ("failed", "KeyError: 'nothing'"),
        "ends": ("done", "all is well"),
    }
    assert (tmp_path / "fails.txt").read_text() == "begun\nerror: no | way\n"
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line[:1] == "|"]
    assert {line.count("|") for line in rows} == {5}


def last(session: gpu.Session) -> str:
    return "all is well"


def test_without_a_gpu_only_the_trial_of_the_script_runs(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "CUDA", False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "none")])
    assert gpu.main() == 2
    assert "--tiny" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("preset", gpu.PRESETS)
def test_every_preset_that_is_timed_has_a_tiny_form(preset: str, tmp_path: Path) -> None:
    settings = gpu.Session(tmp_path, tiny=True).settings(preset)
    cfg, _ = gpu.t.Config.from_env(settings)
    assert cfg.train_batch_tokens == 512
