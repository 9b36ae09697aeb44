#!/usr/bin/env bash
# ./run.sh               set up, prepare data, train, export and score on what this machine has
# ./run.sh --VERB ...    set up, then a verb of train_gpt.py: --help, --check, --plan, --eval FILE,
#                        --sample FILE [PROMPT]
# ./run.sh test [--all]  lint, types and the CI set of tests (--all: slow ones too); further
#                        arguments go to pytest
# Settings are environment variables: SEED=7 ./run.sh. PYTHON=... names the Python for .venv.

# `sh run.sh` may start a plainer shell, which reads no further than this.
if [ -z "${BASH_VERSION:-}" ]; then
    command -v bash >/dev/null || { echo "run.sh: bash is not on PATH; install it" >&2 && exit 1; }
    exec bash "$0" "$@"
fi
set -euo pipefail

caller_dir=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
python=.venv/bin/python
made_here=.venv/made-by-run.sh # is in every .venv of ours

# Lines on stderr: of progress, of something to know, of what ends the script.
say() { printf 'run.sh: %s\n' "$*" >&2; }

warn() { say "$*"; }

die() {
    say "$*"
    exit 1
}

# This script makes .venv and data where it stands, so that must be the repository, on a system
# that the trainer runs on.
check_place() {
    case "$(uname -s)" in
    MINGW* | MSYS* | CYGWIN*) die "Windows is supported through WSL only: run this in WSL" ;;
    esac
    [ -f train_gpt.py ] && [ -f requirements.txt ] ||
        die "$PWD is not the repository: train_gpt.py does not stand beside run.sh there"
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

# The Python that PYTHON names, or the first on PATH of a supported version. Asking each candidate
# to run also passes over launchers on PATH that have nothing behind them.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || die "PYTHON=$PYTHON does not run or is not Python 3.10 to 3.13"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if is_supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.10 to 3.13 found on PATH; install one or name it: PYTHON=/path/to/python3 $0"
}

has_venv() {
    is_supported "$python" || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$python")" ] || return 1
    # A set-up that was interrupted can leave a Python without pip.
    # So can a system's Python that went to another version below it.
    [ "$(head -n 1 .venv/requirements.txt.stamp 2>/dev/null)" = "Python $(version_of "$python")" ] ||
        "$python" -m pip --version >/dev/null 2>&1
}

# Whether something is at .venv that this script did not make: uv, a person, a link to elsewhere.
is_foreign() {
    [ -e .venv ] || [ -L .venv ] || return 1
    [ -L .venv ] || ! { [ -f "$made_here" ] || [ -f .venv/requirements.txt.stamp ]; }
}

# What the Python of .venv has of requirements files: a line of packages that it lacks, a line of
# those that it has in another version.
compare_packages() {
    "$python" - "$@" <<'PYTHON'
import importlib.metadata
import re
import sys

missing, other = [], []
for line in "".join(open(file).read() for file in sys.argv[1:]).splitlines():
    name, _, version = line.strip().partition("==")
    if not re.match(r"\w", name):
        continue
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        missing.append(f"{name} {version}")
        continue
    if found.split("+")[0] != version:
        other.append(f"{name} {found} where {version} is asked for")
print(*(", ".join(names) for names in (missing, other)), sep="\n")
PYTHON
}

# A .venv that somebody else made is used if the packages are in it; nothing is changed there.
use_foreign_venv() {
    local missing other
    is_supported "$python" ||
        die ".venv, which run.sh did not make, has no Python 3.10 to 3.13 that runs here;" \
            "move it away, and run.sh makes one"
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$python")" ] ||
        die "PYTHON=$PYTHON is another version than the Python of .venv, which run.sh did not" \
            "make; move .venv away, or unset PYTHON"
    { read -r missing && read -r other; } < <(compare_packages "$@") ||
        die ".venv, which run.sh did not make, cannot list its packages; move it away, and" \
            "run.sh makes one"
    [ -z "$other" ] || warn ".venv, which run.sh did not make, has $other"
    [ -z "$missing" ] ||
        die ".venv, which run.sh did not make, lacks $missing; install $* into it, or move it" \
            "away, and run.sh makes one"
}

# A .venv of our own is made if there is none, and made again if its Python does not run.
ensure_venv() {
    local base
    if has_venv; then
        return
    fi
    base=$(find_python)
    say "creating .venv with Python $(version_of "$base")"
    # The mark comes first, so that what an interruption leaves is known as ours.
    if ! { rm -rf .venv && mkdir .venv && : >"$made_here" && "$base" -m venv .venv >&2; }; then
        rm -rf .venv
        die "could not create .venv with $base (Debian and Ubuntu need the package python3-venv)"
    fi
}

# Without a GPU, CUDA's libraries are gigabytes of no use.
hint_cpu_torch() {
    if [ "$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null &&
        [ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ]; then
        warn "no GPU here: if pip picks the CUDA build of torch (several GB), point" \
            "PIP_EXTRA_INDEX_URL or PIP_INDEX_URL at an index of CPU builds"
    fi
}

# The packages of a requirements file are installed once, and again when the file changes.
# Usage: install FILE [FILES IT INCLUDES]. The stamp is the text of the files itself, so an
# unchanged set-up is recognised without pip and without a network.
install() {
    local stamp=".venv/$1.stamp" wanted quiet=--quiet
    wanted="Python $(version_of "$python")
$(cat "$@")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    say "installing the packages of $1 (once; a few minutes)"
    [ ! -t 2 ] || quiet=--progress-bar=on
    if ! "$python" -m pip install "$quiet" --no-input --disable-pip-version-check -r "$1" \
        >&2 2>.venv/pip-errors.txt; then
        die "pip could not install $1: $(grep '^ERROR' .venv/pip-errors.txt | tail -n 1 | grep . ||
            tail -n 1 .venv/pip-errors.txt) (all of it: .venv/pip-errors.txt)"
    fi
    printf '%s\n' "$wanted" >"$stamp"
}

# Usage: set_up FILE [FILES IT INCLUDES], as for install.
set_up() {
    if is_foreign; then
        use_foreign_venv "$@"
        return
    fi
    ensure_venv
    if [ ! -f .venv/requirements.txt.stamp ]; then
        hint_cpu_torch
    fi
    install "$@"
}

# Everything runs, whatever fails before it, and the first failure decides the exit code.
run_tests() {
    local arg all=0 lint=0 layout=0 types=0 tests=0
    for arg in "$@"; do
        shift
        if [ "$arg" = --all ]; then
            all=1
        else
            set -- "$@" "$arg"
        fi
    done
    [ "$all" = 1 ] || set -- -m "not slow" "$@"
    set_up requirements.txt
    set_up requirements-dev.txt requirements.txt
    "$python" -m ruff check . || lint=$?
    "$python" -m ruff format --check --quiet . || layout=$?
    "$python" -m mypy || types=$?
    "$python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@" || tests=$?
    [ "$lint" = 0 ] || warn "ruff found problems, see above pytest's output"
    [ "$layout" = 0 ] || warn "some files are not laid out by 'ruff format .'"
    [ "$types" = 0 ] || warn "mypy found problems, see above pytest's output"
    [ "$tests" = 0 ] || exit "$tests"
    exit $((lint ? lint : layout ? layout : types))
}

# How many GPUs the run will use. torch counts what a run can use (CUDA_VISIBLE_DEVICES, the build installed), once it says that
# the driver is new enough for it; nvidia-smi does not.
count_gpus() {
    local gpus
    gpus=$("$python" -c 'import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>/dev/null) ||
        die "torch does not import; move .venv away and run again"
    if [ "$gpus" = 0 ] && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then
        warn "nvidia-smi lists GPUs but torch sees none (hidden, an old driver, or a CPU build):" \
            "using the CPU"
    fi
    printf '%s\n' "$gpus"
}

# The side file of the validation split is written last, so it marks a complete data set.
has_data() { [ -f "data/datasets/$1/fineweb_val.json" ] && [ -f "data/tokenizers/$2" ]; }

# Data are prepared unless they are there or DATA_PATH names others.
prepare_data() {
    local gpus=$1 preset=${PRESET:-} pieces marked
    if [ -n "${DATA_PATH:-}" ]; then
        return
    fi
    case ",${preset// /}," in
    *,cpu,*) set -- 4096 docs_sp4096 docs_4096_bpe.model docs --vocab-size 4096 ;;
    *,mini,*) set -- 1024 docs_sp1024 docs_1024_bpe.model docs ;;
    *,pr1855,* | *,pr2135,*)
        marked=lossless_caps_caseops_v1_reserved
        set -- 8192 "fineweb10B_sp8192_$marked" "fineweb_8192_bpe_$marked.model" \
            fineweb --variant sp8192 --caseops
        ;;
    *) set -- 1024 fineweb10B_sp1024 fineweb_1024_bpe.model fineweb --variant sp1024 ;;
    esac
    pieces=$1
    shift
    if has_data "$1" "$2"; then
        return
    fi
    if [ "$3" = fineweb ] && [ "$gpus" = 0 ]; then
        warn "no GPU, and PRESET has neither cpu nor mini: data is not prepared, set DATA_PATH"
        return
    fi
    if [ "${VOCAB_SIZE:-$pieces}" != "$pieces" ]; then
        die "VOCAB_SIZE=$VOCAB_SIZE, but the data prepared here have $pieces pieces; set" \
            "DATA_PATH and TOKENIZER_PATH too"
    fi
    # A bad setting is refused before the minutes that data takes.
    "$python" train_gpt.py --help >/dev/null
    shift 2
    say "preparing data: data/prepare.py $*"
    "$python" data/prepare.py "$@"
}

# CPUs that the control groups of this process allow, rounded up; nothing where none limits them.
allowed_cpus() {
    local line folder quota period cpus least=
    while IFS= read -r line; do
        case $line in
        0::*) folder=/sys/fs/cgroup${line#0::} ;;
        *[:,]cpu[:,]*) folder=/sys/fs/cgroup/cpu${line#*:*:} ;;
        *) continue ;;
        esac
        while [ "$folder" != /sys/fs ]; do
            read -r quota period <<<"$(cd "$folder" 2>/dev/null &&
                cat cpu.max cpu.cfs_quota_us cpu.cfs_period_us 2>/dev/null | tr '\n' ' ')"
            if [[ $quota =~ ^[0-9]+$ ]]; then
                cpus=$(((quota + period - 1) / period))
                if [ -z "$least" ] || [ "$cpus" -lt "$least" ]; then least=$cpus; fi
            fi
            folder=${folder%/*}
        done
    done < <(cat /proc/self/cgroup 2>/dev/null)
    printf '%s' "$least"
}

# What a process reads at its start. A value of the caller's stays.
tune_for_cpu() {
    local kept=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0 allowed
    # Freed memory is kept, in huge pages where Linux offers them: a training step on a CPU takes
    # 10 to 25 % less time. Only glibc reads this.
    export GLIBC_TUNABLES="${GLIBC_TUNABLES-$kept:glibc.malloc.trim_threshold=17179869184}"
    # Threads that spin while they wait take the time of those they wait for, where CPUs are fewer.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-passive}"
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        allowed=$(allowed_cpus)
        if [ -n "$allowed" ] && [ "$allowed" -lt "$(getconf _NPROCESSORS_ONLN)" ]; then
            say "this machine's limits allow $allowed CPUs, so there are as many threads"
            export OMP_NUM_THREADS=$allowed
        fi
    fi
}

absolute() {
    if [ "$caller_dir" != "$PWD" ] && [ "${1#/}" = "$1" ] && [ -e "$caller_dir/$1" ]; then
        printf '%s\n' "$caller_dir/$1"
    else
        printf '%s\n' "$1"
    fi
}

check_place
if [ "${1:-}" = test ]; then
    shift
    run_tests "$@"
fi

# Paths were typed where the caller stands, not where this file lies.
[ -z "${DATA_PATH:-}" ] || DATA_PATH=$(absolute "$DATA_PATH")
[ -z "${TOKENIZER_PATH:-}" ] || TOKENIZER_PATH=$(absolute "$TOKENIZER_PATH")
[ -z "${INIT_FROM:-}" ] || INIT_FROM=$(absolute "$INIT_FROM")
case "${RUNS_DIR:-/}" in
/*) ;;
*) RUNS_DIR=$caller_dir/$RUNS_DIR ;;
esac
previous=
for arg in "$@"; do
    shift
    case $previous in --eval | --sample) arg=$(absolute "$arg") ;; esac
    set -- "$@" "$arg"
    previous=$arg
done

set_up requirements.txt

# What takes its model settings from an artifact gets no preset.
case "${1:-}" in
--eval* | --sample*)
    command -v nvidia-smi >/dev/null || tune_for_cpu
    exec "$python" train_gpt.py "$@"
    ;;
esac
gpus=$(count_gpus)
if [ "$gpus" = 0 ]; then
    export PRESET="${PRESET-cpu}"
    tune_for_cpu
fi
if [ $# -gt 0 ]; then
    exec "$python" train_gpt.py "$@"
fi
prepare_data "$gpus"
"$python" train_gpt.py --check
if [ "$gpus" -gt 1 ]; then
    say "training on $gpus GPUs"
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" train_gpt.py
fi
exec "$python" train_gpt.py
