"""run.sh with a Python that only records what it is asked to do: no installs, no training."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTEST = "-m pytest -n auto --dist loadfile"

# Stands in for python3 and, copied by "-m venv", for .venv/bin/python.
STUB = r"""#!/bin/sh
case "$*" in
-c*version_info*) exit "${STUB_VERSION_EXIT:-0}" ;;
-c*python_version*) echo "${STUB_VERSION:-3.11.9}" ; exit ;;
-c*device_count*) echo "${STUB_GPUS:-0}" ; exit ;;
esac
echo "$* | PRESET=${PRESET-unset} SEED=${SEED-unset} DATA_PATH=${DATA_PATH-unset}" >>"$STUB_CALLS"
case "$*" in
"-m venv"*)
    for folder in "$@"; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    ;;
"-m pip install"*)
    [ -z "$STUB_PIP_ERROR" ] && exit
    echo "WARNING: retrying" >&2
    echo "ERROR: $STUB_PIP_ERROR" >&2
    exit 1
    ;;
"-m ruff"*) exit "${STUB_RUFF_EXIT:-0}" ;;
"-m mypy"*) exit "${STUB_MYPY_EXIT:-0}" ;;
"-m pytest"*) exit "${STUB_PYTEST_EXIT:-0}" ;;
"data/prepare.py docs"*) dataset=docs_sp1024 tokenizer=docs_1024_bpe.model ;;
"data/prepare.py fineweb"*) dataset=fineweb10B_sp1024 tokenizer=fineweb_1024_bpe.model ;;
"train_gpt.py --help") exit "${STUB_SETTINGS_EXIT:-0}" ;;
"train_gpt.py --check") exit "${STUB_CHECK_EXIT:-0}" ;;
*train_gpt.py*) exit "${STUB_TRAIN_EXIT:-0}" ;;
esac
if [ -n "$dataset" ]; then
    mkdir -p "data/datasets/$dataset" data/tokenizers
    touch "data/datasets/$dataset/fineweb_val.json" "data/tokenizers/$tokenizer"
fi
"""


@dataclass
class Checkout:
    """A checkout that holds run.sh alone, and what its stub Python was called with."""

    folder: Path
    stub: Path

    def run(
        self, *arguments: str, cwd: Path | None = None, **settings: str
    ) -> subprocess.CompletedProcess:
        """Run run.sh; `calls` then holds what this run asked of Python."""
        self.calls_file.unlink(missing_ok=True)
        env = {
            "PATH": f"{self.stub.parent}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "STUB_CALLS": str(self.calls_file),
            **settings,
        }
        return subprocess.run(
            [str(self.folder / "run.sh"), *arguments],
            cwd=cwd or self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls_file(self) -> Path:
        """Where the stub notes its calls."""
        return self.folder.parent / "calls.txt"

    @property
    def calls(self) -> list[str]:
        """Command lines given to Python, without the environment."""
        return [line.split(" | ")[0] for line in self.lines]

    @property
    def lines(self) -> list[str]:
        """Command lines given to Python, with the environment."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh checkout in a folder whose name has spaces, with the stub as python3."""
    folder, programs = tmp_path / "with two spaces" / "repo", tmp_path / "bin"
    folder.mkdir(parents=True)
    programs.mkdir()
    for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder / name)
    stub = programs / "python3"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return Checkout(folder, stub)


def add_program(checkout: Checkout, name: str, text: str) -> None:
    """Put a program on the PATH that run.sh sees."""
    path = checkout.stub.parent / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_first_run_sets_up_prepares_checks_and_trains(checkout: Checkout) -> None:
    result = checkout.run(SEED="7")
    assert result.returncode == 0, result.stderr
    venv, pip_probe_or_install, *rest = checkout.calls
    assert venv == "-m venv --clear .venv"
    assert pip_probe_or_install.startswith("-m pip install")
    assert pip_probe_or_install.endswith("-r requirements.txt")
    assert rest == [
        "train_gpt.py --help",
        "data/prepare.py docs",
        "train_gpt.py --check",
        "train_gpt.py",
    ]
    assert all("PRESET=mini SEED=7 " in line for line in checkout.lines[-4:])
    assert all(line.startswith("run.sh: ") for line in result.stderr.splitlines())


def test_second_run_installs_and_prepares_nothing(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run()
    result = checkout.run(cwd=tmp_path, STUB_PIP_ERROR="no network")
    assert result.returncode == 0, result.stderr
    assert checkout.calls == ["train_gpt.py --check", "train_gpt.py"]


def test_changed_requirements_are_installed(checkout: Checkout) -> None:
    checkout.run()
    with open(checkout.folder / "requirements.txt", "a") as requirements:
        requirements.write("one-more==1.0\n")
    checkout.run()
    assert [call.split()[-1] for call in checkout.calls] == [
        "requirements.txt",
        "--check",
        "train_gpt.py",
    ]


def test_failed_install_is_one_line_and_tried_again(checkout: Checkout) -> None:
    result = checkout.run(STUB_PIP_ERROR="No matching distribution found for torch")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("run.sh: pip could not install requirements.txt")
    assert "No matching distribution found for torch" in last
    assert not any("train_gpt" in call for call in checkout.calls)
    assert checkout.run().returncode == 0
    assert any(call.startswith("-m pip install") for call in checkout.calls)


def test_unsupported_python_is_one_line(checkout: Checkout) -> None:
    for name in ("python3.10", "python3.11", "python3.12", "python3.13", "python"):
        shutil.copy(checkout.stub, checkout.stub.with_name(name))
    result = checkout.run(STUB_VERSION_EXIT="1")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "3.10 to 3.13" in result.stderr
    result = checkout.run(PYTHON="/no/such/python")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "/no/such/python" in result.stderr


def test_named_python_is_used(checkout: Checkout) -> None:
    other = checkout.folder.parent / "other python"
    shutil.copy(checkout.stub, other)
    checkout.stub.unlink()
    assert checkout.run("--check", PYTHON=str(other)).returncode == 0
    assert checkout.calls[0] == "-m venv --clear .venv"


@pytest.mark.parametrize("code", [1, 2, 3, 130])
def test_exit_codes_pass_through(checkout: Checkout, code: int) -> None:
    checkout.run("--check")
    assert checkout.run(STUB_TRAIN_EXIT=str(code)).returncode == code
    assert checkout.calls[-1] == "train_gpt.py"
    assert checkout.run("--plan", STUB_TRAIN_EXIT=str(code)).returncode == code
    assert checkout.run(STUB_CHECK_EXIT=str(code)).returncode == code
    assert checkout.calls[-1] == "train_gpt.py --check"


def test_bad_setting_is_refused_before_data_is_prepared(checkout: Checkout) -> None:
    assert checkout.run(STUB_SETTINGS_EXIT="2").returncode == 2
    assert checkout.calls[-1] == "train_gpt.py --help"


@pytest.mark.parametrize("verb", ["--help", "--plan", "--check"])
def test_verbs_prepare_no_data(checkout: Checkout, verb: str) -> None:
    assert checkout.run(verb).returncode == 0
    assert checkout.calls[-1] == f"train_gpt.py {verb}"
    assert len(checkout.calls) == 3 and "PRESET=mini" in checkout.lines[-1]


def test_eval_finds_the_artifact_where_the_caller_stands(
    checkout: Checkout, tmp_path: Path
) -> None:
    artifact = tmp_path / "my artifact.bin"
    artifact.touch()
    assert checkout.run("--eval", artifact.name, cwd=tmp_path, DATA_PATH="data").returncode == 0
    assert checkout.lines[-1] == (
        f"train_gpt.py --eval {artifact} | PRESET=unset SEED=unset DATA_PATH=data"
    )


def test_relative_data_path_is_the_callers(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "my data").mkdir()
    checkout.run(cwd=tmp_path, DATA_PATH="my data")
    assert f"DATA_PATH={tmp_path}/my data" in checkout.lines[-1]
    assert not any("prepare" in call for call in checkout.calls)


def test_relative_data_path_stays_as_it_is_in_the_clone(checkout: Checkout) -> None:
    (checkout.folder / "my data").mkdir()
    checkout.run(DATA_PATH="my data")
    assert "DATA_PATH=my data" in checkout.lines[-1]


@pytest.mark.parametrize(
    ("preset", "prepared"), [("mini", True), ("pr569,mini", True), ("pr1361", False), ("", False)]
)
def test_preset_on_a_cpu(checkout: Checkout, preset: str, prepared: bool) -> None:
    assert checkout.run(PRESET=preset).returncode == 0
    assert ("data/prepare.py docs" in checkout.calls) == prepared
    assert f"PRESET={preset} " in checkout.lines[-1]


def test_gpus_get_fineweb_and_torchrun(checkout: Checkout) -> None:
    add_program(checkout, "nvidia-smi", "echo 'GPU 0: a'; echo 'GPU 1: b'")
    result = checkout.run(STUB_GPUS="2")
    assert result.returncode == 0, result.stderr
    assert checkout.calls[-3:] == [
        "data/prepare.py fineweb --variant sp1024",
        "train_gpt.py --check",
        "-m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py",
    ]
    assert "PRESET=unset" in checkout.lines[-1]


def test_one_gpu_needs_no_torchrun(checkout: Checkout) -> None:
    checkout.run(STUB_GPUS="1")
    assert checkout.calls[-3:] == [
        "data/prepare.py fineweb --variant sp1024",
        "train_gpt.py --check",
        "train_gpt.py",
    ]


def test_mini_on_gpus_takes_the_built_in_corpus(checkout: Checkout) -> None:
    checkout.run(STUB_GPUS="2", PRESET="mini")
    assert "data/prepare.py docs" in checkout.calls


def test_gpus_that_torch_cannot_use_are_named(checkout: Checkout) -> None:
    add_program(checkout, "nvidia-smi", "echo 'GPU 0: a'")
    result = checkout.run()
    assert "torch sees none" in result.stderr
    assert checkout.calls[-1] == "train_gpt.py" and "PRESET=mini" in checkout.lines[-1]


def test_tests_are_lint_types_and_the_ci_set(checkout: Checkout) -> None:
    assert checkout.run("test", "tests/test_a.py", "-x").returncode == 0
    assert [call.split()[-1] for call in checkout.calls[1:3]] == [
        "requirements.txt",
        "requirements-dev.txt",
    ]
    assert checkout.calls[3:] == [
        "-m ruff check .",
        "-m ruff format --check --quiet .",
        "-m mypy",
        f"{PYTEST} -m not slow tests/test_a.py -x",
    ]
    assert checkout.run("test", "--all").returncode == 0
    assert checkout.calls == [
        "-m ruff check .",
        "-m ruff format --check --quiet .",
        "-m mypy",
        PYTEST,
    ]


def test_tests_fail_when_lint_types_or_pytest_fail(checkout: Checkout) -> None:
    assert checkout.run("test", STUB_RUFF_EXIT="1").returncode == 1
    assert checkout.calls[-1].startswith("-m pytest")
    assert checkout.run("test", STUB_MYPY_EXIT="1").returncode == 1
    assert checkout.calls[-1].startswith("-m pytest")
    assert checkout.run("test", STUB_PYTEST_EXIT="5").returncode == 5


def test_scripts_are_executable() -> None:
    assert os.access(ROOT / "run.sh", os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
