#!/usr/bin/env bash
# ./run.sh               set up, prepare data, train, export and score on what this machine has
# ./run.sh --VERB ...    set up, then a verb of train_gpt.py: --help, --check, --plan, --eval FILE
# ./run.sh test [--all]  lint, types and the CI set of tests (--all: slow ones too); further
#                        arguments go to pytest
# Settings are environment variables: SEED=7 ./run.sh. PYTHON=... names the Python for .venv.
set -euo pipefail

caller_dir=$PWD
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
python=.venv/bin/python

say() { printf 'run.sh: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

# Asking each candidate to run also passes over launchers on PATH that have nothing behind them.
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

ensure_venv() {
    local base
    if has_venv; then
        return
    fi
    base=$(find_python)
    say "creating .venv with Python $(version_of "$base")"
    if ! "$base" -m venv --clear .venv >&2; then
        rm -rf .venv
        die "could not create .venv with $base (Debian and Ubuntu need the package python3-venv)"
    fi
}

hint_cpu_torch() {
    if [ "$(uname -sm)" = "Linux x86_64" ] && ! command -v nvidia-smi >/dev/null &&
        [ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ]; then
        say "no GPU here: if pip picks the CUDA build of torch (several GB), point" \
            "PIP_EXTRA_INDEX_URL or PIP_INDEX_URL at an index of CPU builds"
    fi
}

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

set_up() {
    ensure_venv
    if [ ! -f .venv/requirements.txt.stamp ]; then
        hint_cpu_torch
    fi
    install requirements.txt
}

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
    set_up
    install requirements-dev.txt requirements.txt
    "$python" -m ruff check . || lint=$?
    "$python" -m ruff format --check --quiet . || layout=$?
    "$python" -m mypy || types=$?
    "$python" -m pytest -n auto --dist loadfile "$@" || tests=$?
    [ "$lint" = 0 ] || say "ruff found problems, see above pytest's output"
    [ "$layout" = 0 ] || say "some files are not laid out by 'ruff format .'"
    [ "$types" = 0 ] || say "mypy found problems, see above pytest's output"
    [ "$tests" = 0 ] || exit "$tests"
    exit $((lint ? lint : layout ? layout : types))
}

# torch counts what a run can use (CUDA_VISIBLE_DEVICES, the build installed), once it says that
# the driver is new enough for it; nvidia-smi does not.
count_gpus() {
    local gpus
    gpus=$("$python" -c 'import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>/dev/null) ||
        die "torch does not import; remove .venv and run again"
    if [ "$gpus" = 0 ] && nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null; then
        say "nvidia-smi lists GPUs but torch sees none (hidden, an old driver, or a CPU build):" \
            "using the CPU"
    fi
    printf '%s\n' "$gpus"
}

# The side file of the validation split is written last, so it marks a complete data set.
has_data() { [ -f "data/datasets/$1/fineweb_val.json" ] && [ -f "data/tokenizers/$2" ]; }

prepare_data() {
    local gpus=$1 preset=${PRESET:-}
    if [ -n "${DATA_PATH:-}" ]; then
        return
    fi
    case ",${preset// /}," in
    *,mini,*) set -- docs_sp1024 docs_1024_bpe.model docs ;;
    *) set -- fineweb10B_sp1024 fineweb_1024_bpe.model fineweb --variant sp1024 ;;
    esac
    if has_data "$1" "$2"; then
        return
    fi
    if [ "$3" = fineweb ] && [ "$gpus" = 0 ]; then
        say "no GPU and a PRESET without mini: data is not prepared, set DATA_PATH"
        return
    fi
    if [ "${VOCAB_SIZE:-1024}" != 1024 ]; then
        die "VOCAB_SIZE=$VOCAB_SIZE, but the data prepared here have 1024 pieces; set DATA_PATH" \
            "and TOKENIZER_PATH too"
    fi
    # A bad setting is refused before the minutes that data takes.
    "$python" train_gpt.py --help >/dev/null
    shift 2
    say "preparing data: data/prepare.py $*"
    "$python" data/prepare.py "$@"
}

# Freed memory is kept, in huge pages where Linux offers them: a training step on a CPU takes 10 to
# 25 % less time. Only glibc reads this, at the start of a process; a value of the caller's stays.
keep_memory() {
    local kept=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0
    export GLIBC_TUNABLES="${GLIBC_TUNABLES-$kept:glibc.malloc.trim_threshold=17179869184}"
}

absolute() {
    if [ "$caller_dir" != "$PWD" ] && [ "${1#/}" = "$1" ] && [ -e "$caller_dir/$1" ]; then
        printf '%s\n' "$caller_dir/$1"
    else
        printf '%s\n' "$1"
    fi
}

if [ "${1:-}" = test ]; then
    shift
    run_tests "$@"
fi

# Paths were typed where the caller stands, not where this file lies.
[ -z "${DATA_PATH:-}" ] || DATA_PATH=$(absolute "$DATA_PATH")
[ -z "${TOKENIZER_PATH:-}" ] || TOKENIZER_PATH=$(absolute "$TOKENIZER_PATH")
case "${RUNS_DIR:-/}" in
/*) ;;
*) RUNS_DIR=$caller_dir/$RUNS_DIR ;;
esac
previous=
for arg in "$@"; do
    shift
    [ "$previous" != --eval ] || arg=$(absolute "$arg")
    set -- "$@" "$arg"
    previous=$arg
done

set_up

# --eval takes its model settings from the artifact, so no preset is named for it.
case " $* " in
*" --eval"*)
    command -v nvidia-smi >/dev/null || keep_memory
    exec "$python" train_gpt.py "$@"
    ;;
esac
gpus=$(count_gpus)
if [ "$gpus" = 0 ]; then
    export PRESET="${PRESET-mini}"
    keep_memory
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
