"""The packed trainer runs as the readable one does, is what its own run counts, and can be read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TinyData
from jobs import BARE_ENVIRONMENT, tiny_job

sys.path.insert(0, str(ROOT / "records"))
import pack

TEXT = (ROOT / "train_gpt.py").read_bytes()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainer as `pack.py` writes it, with plan.py beside it."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    assert pack.main([str(ROOT / "train_gpt.py"), str(path)]) == 0
    shutil.copy(ROOT / "plan.py", path.parent)
    return path


def launch(script: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        text=True,
        timeout=300,
        env={**BARE_ENVIRONMENT, "OMP_NUM_THREADS": "1", **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )


def test_the_text_can_be_read_again_by_both_commands(packed: Path) -> None:
    by_tool = subprocess.run(
        [sys.executable, str(ROOT / "records" / "pack.py"), "--text", str(packed)],
        capture_output=True,
        check=True,
    )
    by_itself = subprocess.run(
        [sys.executable, str(packed), "--text"], capture_output=True, check=True
    )
    assert by_tool.stdout == by_itself.stdout == TEXT
    assert packed.stat().st_size < 0.4 * len(TEXT)
    assert packed.read_bytes() == pack.pack(TEXT)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"import base64", b"import os, base64"),
        (b"exec(compile(text", b"exec(compile('' + text"),
        (b'b85decode(b"', b'b85decode(b"" + b"'),
        (b"--text", b"--test"),
    ],
)
def test_a_stub_with_anything_more_is_not_taken_for_packed(old: bytes, new: bytes) -> None:
    """So what is read out of a file that counts as packed is all that it runs."""
    forged = pack.pack(b"x = 1\n").replace(old, new, 1)
    assert forged != pack.pack(b"x = 1\n")
    assert not pack.is_packed(forged)
    assert pack.text_of(forged) == forged


def test_a_damaged_or_swollen_payload_is_one_line(tmp_path: Path, capsys) -> None:
    sound = pack.pack(b"x = 1\n")
    bomb = pack.HEAD + pack.base64.b85encode(pack.bz2.compress(bytes(1 << 26))) + pack.TAIL
    two = pack.HEAD + pack.base64.b85encode(2 * pack.bz2.compress(b"x = 1\n")) + pack.TAIL
    for script in (
        sound[: len(pack.HEAD) + 20] + pack.TAIL,
        bomb,
        two,
        pack.HEAD + b"~~~~~" + pack.TAIL,
    ):
        assert pack.is_packed(script)
        with pytest.raises(ValueError, match="payload"):
            pack.text_of(script)
    path = tmp_path / "x.py"
    path.write_bytes(bomb)
    assert pack.main(["--text", str(path)]) == 1
    path.write_bytes(TEXT)
    assert pack.main(["--text", str(path)]) == 1
    assert pack.main([str(path), str(path)]) == 1
    assert pack.main([str(path)]) == 1
    path.write_bytes(b"def f(:\n")
    assert pack.main([str(path), str(tmp_path / "y.py")]) == 1
    out, err = capsys.readouterr()
    assert err.count("error: ") == err.count("\n") == 5
    assert not out
    assert not (tmp_path / "y.py").exists()


def test_check_and_plan_of_the_packed_file(
    packed: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    job = tiny_job(tiny_data, tmp_path, "packed")
    assert launch(packed, "--check", **job).stdout.endswith("documents\n")
    planned = launch(packed, "--plan", **job)
    assert f"code {packed.stat().st_size:,}," in planned.stdout, planned.stderr
    (tmp_path / "train_gpt.py").write_bytes(packed.read_bytes())
    alone = launch(tmp_path / "train_gpt.py", "--plan", **job)
    assert alone.returncode == 2
    assert "--plan needs plan.py" in alone.stderr


def test_a_packed_run_counts_itself_and_is_scored_again(
    packed: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    plain = launch(ROOT / "train_gpt.py", **tiny_job(tiny_data, tmp_path, "plain"))
    small = launch(packed, **tiny_job(tiny_data, tmp_path, "small"))
    assert (plain.returncode, small.returncode) == (0, 0), small.stderr
    folders = tmp_path / "plain", tmp_path / "small"
    assert (folders[1] / "train_gpt.py").read_bytes() == packed.read_bytes()
    one, two = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in folders
    )
    sizes = [next(e for e in events if e["event"] == "artifact") for events in (one, two)]
    assert sizes[1]["code_bytes"] == packed.stat().st_size
    assert sizes[0]["total"] - sizes[1]["total"] == len(TEXT) - packed.stat().st_size
    assert sizes[0]["sha256"] == sizes[1]["sha256"]
    score = re.findall(r"^val_bpb:([0-9.]+)", small.stdout, re.M)
    again = launch(
        folders[1] / "train_gpt.py",
        "--eval",
        str(folders[1] / "artifact.bin"),
        **{name: value for name, value in tiny_data.env.items() if name != "VOCAB_SIZE"},
    )
    assert re.findall(r"^val_bpb:([0-9.]+)", again.stdout, re.M) == score, again.stderr


def test_the_packed_file_is_told_its_own_lines(tmp_path: Path) -> None:
    """Tracebacks, and whatever compiles a function from its source, see the text."""
    path = tmp_path / "x.py"
    path.write_bytes(
        pack.pack(
            b"import inspect\ndef f():\n    return 1 / 0  # here\n"
            b"print(inspect.getsource(f))\nimport traceback\ntry:\n    f()\n"
            b"except ZeroDivisionError:\n    traceback.print_exc()\nf()\n"
        )
    )
    found = launch(path)
    assert "return 1 / 0  # here" in found.stdout
    assert found.stderr.count("line 3, in f\n") == 2
    assert "line 3, in f\n    return 1 / 0  # here" in found.stderr
    assert "b85decode" not in found.stderr
