"""No network where none is needed: at import, and when an artifact is scored again."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TinyData
from jobs import BARE_ENVIRONMENT, NO_NETWORK, environment, tiny_job

# Without arguments the trainer is imported, with some it is run.
BLOCKED = (
    NO_NETWORK
    + """
import train_gpt
sys.exit(train_gpt.main(sys.argv[1:]) if sys.argv[1:] else 0)
"""
)
SOURCES = sorted(
    [
        ROOT / "train_gpt.py",
        ROOT / "plan.py",
        ROOT / "data" / "prepare.py",
        *ROOT.glob("records/*.py"),
    ]
)


def blocked(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The trainer in a process that may not open a socket."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        cwd=cwd,
        text=True,
        env={**BARE_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=300,
    )


def test_import_opens_no_socket(tmp_path: Path) -> None:
    done = blocked(cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_artifact_is_scored_without_sockets_and_training_data(
    tiny_data: TinyData, tmp_path: Path, capsys
) -> None:
    from train_gpt import main

    with environment(**tiny_job(tiny_data, tmp_path, "run", ITERATIONS="2")):
        assert main([]) == 0
    score = capsys.readouterr().out.rpartition("\nval_bpb:")[2].split()[0]
    place = tmp_path / "elsewhere"
    for path in (tiny_data.tokenizer_path, *tiny_data.data_path.glob("fineweb_val*")):
        copy = place / "data" / path.relative_to(tiny_data.data_path.parents[1])
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    assert not list(place.rglob("fineweb_train*"))
    done = blocked("--eval", str(tmp_path / "run" / "artifact.bin"), cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\nval_bpb:{score} " in done.stdout


def dangers(source: str) -> list[str]:
    """Calls and imports that run what a file holds: pickle, eval, exec, unchecked torch.load."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [
            name
            for name in names
            if name.split(".")[0]
            in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
        ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(
                k.arg == "weights_only"
                and isinstance(k.value, ast.Constant)
                and k.value.value is True
                for k in node.keywords
            )
            found += [name] * (
                name in {"eval", "exec", "compile", "os.system"}
                or (name == "torch.load" and not safe)
                or any(k.arg == "allow_pickle" for k in node.keywords)
            )
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_is_run(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import load",
        "eval('1')",
        "exec(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_the_check_complains(source: str) -> None:
    assert dangers(source)
