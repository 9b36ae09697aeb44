"""run.sh with a Python that only records what it is asked to do: no installs, no training."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from jobs import snapshot

from train_gpt import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PYTEST = "-m pytest -n auto --dist loadfile --no-loadscope-reorder"

# Stands in for python3 and, copied by "-m venv", for .venv/bin/python.
STUB = r"""#!/bin/sh
case "$*" in
-c*version_info*) exit "${STUB_VERSION_EXIT:-0}" ;;
-c*python_version*) echo "${STUB_VERSION:-3.11.9}" ; exit ;;
"- "*) cat >/dev/null ; printf '%s\n%s\n' "$STUB_MISSING" "$STUB_OTHER" ; exit ;;
-c*device_count*) echo "${STUB_GPUS:-0}" ; exit ;;
esac
echo "$* | PRESET=${PRESET-unset} SEED=${SEED-unset} DATA_PATH=${DATA_PATH-unset}" \
    "WAIT=$OMP_WAIT_POLICY THREADS=$OMP_NUM_THREADS" >>"$STUB_CALLS"
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
"data/prepare.py docs --vocab-size 4096") dataset=docs_sp4096 tokenizer=docs_4096_bpe.model ;;
"data/prepare.py docs"*) dataset=docs_sp1024 tokenizer=docs_1024_bpe.model ;;
"data/prepare.py fineweb --variant sp8192 --caseops")
    dataset=fineweb10B_sp8192_lossless_caps_caseops_v1_reserved
    tokenizer=fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model
    ;;
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
    return make_checkout(tmp_path / "with two spaces" / "repo", tmp_path / "bin")


def make_checkout(folder: Path, programs: Path) -> Checkout:
    """run.sh and what it looks for in a new folder, and in another the stub as python3."""
    folder.mkdir(parents=True)
    programs.mkdir()
    for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "train_gpt.py").touch()
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
    assert venv == "-m venv .venv"
    assert pip_probe_or_install.startswith("-m pip install")
    assert pip_probe_or_install.endswith("-r requirements.txt")
    assert rest == [
        "train_gpt.py --help",
        "data/prepare.py docs --vocab-size 4096",
        "train_gpt.py --check",
        "train_gpt.py",
    ]
    assert all("PRESET=cpu SEED=7 " in line for line in checkout.lines[-4:])
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
    assert checkout.calls[0] == "-m venv .venv"


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
    assert len(checkout.calls) == 3 and "PRESET=cpu" in checkout.lines[-1]


def test_eval_finds_the_artifact_where_the_caller_stands(
    checkout: Checkout, tmp_path: Path
) -> None:
    artifact = tmp_path / "my artifact.bin"
    artifact.touch()
    assert checkout.run("--eval", artifact.name, cwd=tmp_path, DATA_PATH="data").returncode == 0
    assert f"train_gpt.py --eval {artifact} | PRESET=unset " in checkout.lines[-1]
    assert " DATA_PATH=data " in checkout.lines[-1]


def test_sample_finds_the_artifact_and_leaves_the_prompt(
    checkout: Checkout, tmp_path: Path
) -> None:
    for name in ("my artifact.bin", "Once upon"):
        (tmp_path / name).touch()
    for prompt in ([], ["Once upon"]):
        assert checkout.run("--sample", "my artifact.bin", *prompt, cwd=tmp_path).returncode == 0
        assert checkout.calls[-1] == " ".join(
            ["train_gpt.py --sample", str(tmp_path / "my artifact.bin"), *prompt]
        )
        assert "PRESET=unset" in checkout.lines[-1]


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
    ("preset", "prepared"),
    [
        ("cpu", ["data/prepare.py docs --vocab-size 4096"]),
        ("mini", ["data/prepare.py docs"]),
        ("pr569,mini", ["data/prepare.py docs"]),
        ("pr1361", []),
        ("", []),
    ],
)
def test_preset_on_a_cpu(checkout: Checkout, preset: str, prepared: list[str]) -> None:
    assert checkout.run(PRESET=preset).returncode == 0
    assert [call for call in checkout.calls if "prepare" in call] == prepared
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


@pytest.mark.parametrize("system", ["pr1855", "pr2135"])
def test_the_last_systems_get_the_text_that_they_were_trained_on(
    checkout: Checkout, system: str
) -> None:
    """Once: it is found where the preset looks for it."""
    settings = {"STUB_GPUS": "1", "PRESET": system}
    assert checkout.run(**settings).returncode == 0
    assert "data/prepare.py fineweb --variant sp8192 --caseops" in checkout.calls
    for path in (
        PRESETS[system]["data_path"] + "/fineweb_val.json",
        PRESETS[system]["tokenizer_path"],
    ):
        assert (checkout.folder / path).is_file()
    assert checkout.run(**settings).returncode == 0
    assert not any("data/prepare.py" in call for call in checkout.calls)
    assert checkout.run(**settings, VOCAB_SIZE="1024").returncode == 0  # nothing to prepare
    checkout.run(PRESET=f"{system},mini")
    assert "data/prepare.py docs" in checkout.calls


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
    assert checkout.calls[-1] == "train_gpt.py" and "PRESET=cpu" in checkout.lines[-1]


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


# A .venv of somebody else


def put_venv(checkout: Checkout) -> Path:
    """Make a .venv as uv does, without run.sh's mark; return somebody's file in it."""
    (checkout.folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.stub, checkout.folder / ".venv" / "bin" / "python")
    own = checkout.folder / ".venv" / "their own"
    own.write_text("kept")
    return own


def link_venv(checkout: Checkout) -> Path:
    """Make .venv a link to one that run.sh made elsewhere; return somebody's file in it."""
    own = put_venv(checkout)
    (own.parent / "made-by-run.sh").touch()
    elsewhere = checkout.folder.parent / "elsewhere"
    own.parent.rename(elsewhere)
    own.parent.symlink_to(elsewhere)
    return elsewhere / own.name


@pytest.mark.parametrize("put", [put_venv, link_venv])
@pytest.mark.parametrize("arguments", [("--help",), (), ("test",)])
def test_a_venv_of_somebody_else_is_used(
    checkout: Checkout, put: Callable[[Checkout], Path], arguments: tuple[str, ...]
) -> None:
    own = put(checkout)
    before = snapshot(own.parent)
    result = checkout.run(*arguments, STUB_OTHER="torch 2.0 where 2.1 is asked for")
    assert result.returncode == 0 and "torch 2.0" in result.stderr
    assert snapshot(own.parent) == before
    assert not any("venv" in call or "pip" in call for call in checkout.calls)


@pytest.mark.parametrize("put", [put_venv, link_venv])
@pytest.mark.parametrize(
    "settings",
    [
        {"STUB_MISSING": "torch 2.1"},
        {"STUB_VERSION_EXIT": "1"},
        {"PYTHON": "python3.12"},
    ],
)
def test_a_venv_of_somebody_else_that_does_not_do_is_left_alone(
    checkout: Checkout, put: Callable[[Checkout], Path], settings: dict[str, str]
) -> None:
    own = put(checkout)
    before = snapshot(own.parent)
    other_version = STUB.replace("3.11.9", "3.12.1")
    add_program(checkout, "python3.12", other_version)
    result = checkout.run("--help", **settings)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert settings.get("STUB_MISSING", ".venv") in result.stderr
    assert snapshot(own.parent) == before
    assert checkout.calls == []


def test_a_venv_that_cannot_be_run_is_left_alone(checkout: Checkout) -> None:
    own = put_venv(checkout)
    (own.parent / "bin" / "python").write_text("#!/no/such/python\n")
    assert checkout.run("--help").returncode == 1
    assert own.is_file() and checkout.calls == []


def test_what_an_interrupted_set_up_leaves_is_ours(checkout: Checkout) -> None:
    checkout.run(STUB_PIP_ERROR="no network")
    (checkout.folder / ".venv" / "bin" / "python").unlink()
    assert checkout.run("--help").returncode == 0
    assert "-m venv .venv" in checkout.calls


def test_packages_are_compared_with_the_requirements(tmp_path: Path) -> None:
    """The comparison itself, by a real Python and files that name what it has and lacks."""
    found = importlib.metadata.version("numpy")
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "train_gpt.py").write_text("print('ran')")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    cases = (
        (f"# of numbers\nnumpy=={found}\n", 0, ""),
        ("numpy==0.0.1\n", 0, f"numpy {found} where 0.0.1 is asked for"),
        (f"no-such-package==7\nnumpy=={found}\nnor-this==8\n", 1, "no-such-package 7, nor-this 8"),
    )
    for text, code, said in cases:
        (tmp_path / "requirements.txt").write_text(text)
        result = subprocess.run(
            [str(tmp_path / "run.sh"), "--eval"], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == code and said in result.stderr, result
        assert ("ran" in result.stdout) == (code == 0)


# Other hosts, other callers


@pytest.mark.parametrize("system", ["MINGW64_NT-10.0", "MSYS_NT-10.0", "CYGWIN_NT-10.0"])
def test_windows_is_told_of_wsl(checkout: Checkout, system: str) -> None:
    add_program(checkout, "uname", f"echo {system}")
    result = checkout.run()
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "WSL" in result.stderr and checkout.calls == []


def test_another_shell_hands_over_to_bash(checkout: Checkout) -> None:
    checkout.run("--help")
    done = subprocess.run(
        ["/bin/sh", "run.sh", "--help"],
        cwd=checkout.folder,
        env={"PATH": f"{checkout.stub.parent}:/usr/bin:/bin", "STUB_CALLS": "calls.txt"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_does_nothing_in_another_project(checkout: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "somewhere"
    elsewhere.mkdir()
    shutil.copy(ROOT / "run.sh", elsewhere / "run.sh")
    (elsewhere / "requirements.txt").touch()
    result = Checkout(elsewhere, checkout.stub).run()
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in elsewhere.iterdir()) == ["requirements.txt", "run.sh"]


def test_threads_wait_passively_unless_the_caller_says_otherwise(checkout: Checkout) -> None:
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        checkout.run("--check", **given)
        assert f"WAIT={expected} " in checkout.lines[-1]


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu.max": "max 100000"}, ""),
        ({"cpu.max": "100000 100000"}, "1"),
        ({"cpu.max": "150000 100000"}, "2"),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, ""),
        ({"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}, "3"),
        ({"cpu.max": "6400000 100000"}, ""),  # more than there are
    ],
)
def test_threads_are_as_many_as_the_quota_allows(
    checkout: Checkout, files: dict[str, str], threads: str
) -> None:
    add_program(checkout, "getconf", "echo 8")
    answers = "".join(f"    {name}) echo '{text}' ;;\n" for name, text in files.items())
    groups = "0::/" if "cpu.max" in files else "3:cpuset:/\n2:cpu,cpuacct:/"
    add_program(
        checkout,
        "cat",
        f'case "$*" in cpu.max*) ;; /proc/self/cgroup) printf "{groups}\\n" ; exit ;;'
        ' *) exec /bin/cat "$@" ;; esac\n'
        f'for name in "$@"; do\n    case $name in\n{answers}    esac\ndone',
    )
    checkout.run("--check")
    assert checkout.lines[-1].endswith(f"THREADS={threads}")
    checkout.run("--check", OMP_NUM_THREADS="5")
    assert checkout.lines[-1].endswith("THREADS=5")


def test_a_checkout_changes_no_line_ends(tmp_path: Path) -> None:
    """Not even one by a Git that is set to: scripts are executed, records are hashed."""
    files = {"run.sh": b"#!/bin/sh\n", "log.txt": b"one\ntwo\n", "theirs.txt": b"one\r\ntwo\r\n"}
    origin = tmp_path / "origin"
    origin.mkdir()
    shutil.copy(ROOT / ".gitattributes", origin)
    for name, content in files.items():
        (origin / name).write_bytes(content)
    for settings in ("core.autocrlf=true", "core.autocrlf=input", "core.eol=crlf"):
        git = ["git", "-c", settings, "-c", "user.name=a", "-c", "user.email=a@b"]
        shutil.rmtree(origin / ".git", ignore_errors=True)
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *command], cwd=origin, check=True, capture_output=True)
        copy = tmp_path / settings
        subprocess.run([*git, "clone", "-q", str(origin), str(copy)], check=True)
        assert {name: (copy / name).read_bytes() for name in files} == files


def test_scripts_are_executable() -> None:
    assert os.access(ROOT / "run.sh", os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
