"""Whether two versions of train_gpt.py compute the same, for every preset, at tiny size.

    python benchmarks/equality.py OLD_TRAINER NEW_TRAINER [--ranks 1,2] [--cases pr703,others]
    python benchmarks/equality.py --old-rev HEAD~3 NEW_TRAINER
    python benchmarks/equality.py --prepare FOLDER OLD_TRAINER     record the old side once
    python benchmarks/equality.py --against FOLDER NEW_TRAINER     and compare with it later

Every case is a run of ten steps without a clock, with one gloo process or several, in which every
technique of its settings acts. Compared are the exit code, the loss and the learning rate of each
step, every score, how often each technique acted, all integers and floats of the artifact as the
version's own reader gives them, the score of `--eval`, and the score that the new version's
`--eval` gives the old version's artifact. Each preset's settings at full size are compared too.
Everything must be equal to the bit; with --tolerance X, losses and scores may differ by X and
floats of the artifact by one unit in the last place. One line a case; exit 0 if all are equal, 1
if not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SECONDS_A_CASE = 300.0  # a rank that hangs is ended then
LAST_PLACE = 2.0**-10  # of an fp16 number, relative
KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR")  # of the caller's environment
ENVIRONMENT = {name: os.environ[name] for name in KEPT if name in os.environ} | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}

# Ten steps; the rate decays over the last five, late QAT is on in two and SWA takes three
# snapshots. Three rows a step are uneven for two processes.
TINY = {
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "ROPE_DIMS": "4",
    "ROPE_NTK_REF": "48",
    "VE_DIM": "16",
    "BIGRAM_DIM": "16",
    "BIGRAM_VOCAB_SIZE": "64",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "192",
    "MICRO_BATCH_SEQS": "2",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "32",
    "MAX_WALLCLOCK_SECONDS": "0",
    "ITERATIONS": "10",
    "WARMUP_STEPS": "1",
    "VAL_LOSS_EVERY": "5",
    "WARMDOWN_FRAC": "0.5",
    "LATE_QAT_THRESHOLD": "0.5",
    "SWA_START_FRAC": "0.7",
    "SWA_EVERY": "1",
    "MUON_MOMENTUM_WARMUP_STEPS": "5",
    "GPTQ_CALIB_BATCHES": "2",
    "GPTQ_BLOCK_SIZE": "16",
    "INT8_KEEP_FLOAT_MAX_NUMEL": "512",
    "TTT_EPOCHS": "1",
    "TTT_CHUNK_TOKENS": "2048",
    "COMPILE": "0",
}
CASES: dict[str, dict[str, str]] = {
    "defaults": {},
    "mini": {"PRESET": "mini"},
    "pr1361": {"PRESET": "pr1361"},
    "pr569": {"PRESET": "pr569"},
    "pr703": {"PRESET": "pr703"},
    "pr334": {"PRESET": "pr334"},
    "pr295": {"PRESET": "pr295"},
    # What no preset asks for.
    "others": {
        "TTT_MODE": "score_first",
        "TTT_EPOCHS": "2",
        "AVG_MODE": "swa_of_ema",
        "MILE_GAMMA": "0.8",
        "QUANT_CLIP": "std",
        "GPTQ_SELECT": "hessian",
        "CLIP_SEARCH": "row",
        "PRUNE_FRAC": "0.05",
        "PRUNE_PCT": "0.05",
        "VRL_MODE": "mix",
        "BACKOUT_MODE": "mid",
        "LN_SCALE": "learned",
        "SKIP_PER_DIM": "0",
        "PROJ_INIT": "ortho_mup",
        "WARMDOWN_TYPE": "cosine",
        "CODEC": "best",
        "GRAD_CLIP_NORM": "0.05",
    },
    "untied": {
        "TIE_EMBEDDINGS": "0",
        "AVG_MODE": "swa",
        "QAT_MODE": "always",
        "GPTQ_VARIANT": "simple",
        "GPTQ_CALIB": "train_after_cap",
        "BITS": "mlp:4,attn:fp16,emb:7,aux:8,blocks.1.mlp.fc:5",
        "MUON_PARALLEL": "0",
        "OPTIMIZER_ROUTING": "adam",
        "SKIP_PER_DIM": "off",
        "BIGRAM_VOCAB_SIZE": "0",
        "EVAL_STRIDE": "0",
    },
    # Loops, lanes, gates, corrections, the range coder, adaptation by document.
    "pr1855": {
        "PRESET": "pr1855",
        "NUM_LAYERS": "6",
        "XSA_LAST_N": "6",
        "LOOP_START": "2",
        "LOOP_END": "3",
        "PARALLEL_START_LAYER": "4",
        "LORA_RANK": "4",
        "LORA_CHUNK_TOKENS": "32",
        "LORA_BATCH_DOCS": "2",
        "LORA_PHASES": "2",
        "LORA_PHASE_DOCS": "8",
        "LORA_PHASE_CHUNK_TOKENS": "64",
        "MIN_LR": "0.2",
        "LORA_PHASE_ROW_TOKENS": "64",
        "NGRAM_TILT": "2.625",
        "NGRAM_ORDER": "3",
        "NGRAM_THRESHOLD": "0.3",
        "EVAL_STRIDE": "32",
    },
    "counts": {
        "COUNTS": "both",
        "COUNT_BYTES": "20000",
        "TOKEN_MASK": "1",
        "QUANT_CLIP": "std",
        "AWQ_COLUMNS": "8",
        "LQER_TOP_K": "2",
        "CODEC": "range",
        "ARTIFACT_TARGET_BYTES": "300000",
        "ARTIFACT_LIMIT_BYTES": "1000000",
        "GPTQ_CALIB": "selfgen",
    },
    "over_limit": {"PRESET": "mini", "ARTIFACT_LIMIT_BYTES": "1000"},
    "wrong_value": {"MLP_MULT": "-1"},
    "wrong_name": {"MUON_MOMENTUMM": "0.9"},
    "contradiction": {"TRAIN_BATCH_TOKENS": "100"},
}
PRESETS = ("", "mini", "pr1361", "pr569", "pr703", "pr334", "pr295")


# What one version computes. `serve` runs in a process of the version's own.


def load_trainer(path: Path):
    """The trainer as a module that sees its own neighbours."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


def run_rank(trainer, arguments: list[str], settings: dict[str, str], said: Path) -> None:
    """In a forked process: one rank of a run, from its environment to its exit code."""
    os.environ.clear()
    os.environ.update(settings)
    with open(said, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    code = 70  # as of an exception that main() lets through
    with contextlib.suppress(BaseException):
        code = trainer.main(arguments)
        sys.stdout.flush()
    os._exit(code)


def run_ranks(trainer, arguments: list[str], settings: dict[str, str], ranks: int, said: Path):
    """Run the trainer's main() on forked ranks; returns their exit codes, -9 for one that hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = {}
    for rank in range(ranks):
        env = {**ENVIRONMENT, **settings}
        if ranks > 1:
            env |= {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = os.fork()
        if process == 0:
            run_rank(trainer, arguments, env, Path(f"{said}.rank{rank}"))
        running[process] = rank
    codes, deadline = [0] * ranks, time.monotonic() + SECONDS_A_CASE
    while running:
        if time.monotonic() > deadline:
            for process in running:
                os.kill(process, signal.SIGKILL)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return codes


def artifact_arrays(trainer, path: Path) -> dict[str, np.ndarray]:
    """Every tensor of an artifact: what is stored of it, and the floats a model gets.

    What is stored is told by kind, integers and floats, not by the reader's own names for it.
    """
    arrays = {}
    _, stored = trainer.decode_artifact(path.read_bytes())
    for name, tensor in stored.items():
        held = [part for part in leaves(tensor).values() if hasattr(part, "numpy")]
        for kind, wanted in (("floats", True), ("integers", False)):
            found = [part.numpy() for part in held if part.is_floating_point() == wanted]
            arrays |= {f"{name}/{kind}/{n}": array for n, array in enumerate(found)}
        arrays[f"{name}/restored"] = tensor.restore().float().numpy()
    return arrays


def leaves(settings: object) -> dict[str, object]:
    """All values of a dataclass of values and dataclasses, by their names alone."""
    found: dict[str, object] = {}
    for f in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, f.name)
        found |= leaves(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return found


def score_again(trainer, artifact: Path, data: dict[str, str], said: Path) -> str:
    """What `--eval` says of an artifact: its last line's numbers, or its exit code."""
    env = {name: data[name] for name in ("DATA_PATH", "TOKENIZER_PATH")} | {"COMPILE": "0"}
    codes = run_ranks(trainer, ["--eval", str(artifact)], env, 1, said)
    text = Path(f"{said}.rank0").read_text()
    scores = re.findall(r"^val_bpb:\S+ val_loss:\S+", text, re.MULTILINE)
    return scores[-1] if codes == [0] and scores else f"exit {codes[0]}"


def preset_settings(trainer) -> dict[str, dict]:
    """The settings of every preset, at its own size."""
    return {
        preset: leaves(trainer.Config.from_env({"PRESET": preset})[0])
        for preset in (*PRESETS, *(f"{preset},mini" for preset in PRESETS if preset != "mini"))
    }


def run_case(trainer, name: str, ranks: int, job: dict) -> dict:
    """Run a case and look at what it left; keeps its artifact and the arrays in it."""
    out, data, label = Path(job["out"]), job["data"], f"{name}-{ranks}"
    settings = {**TINY, **data, **CASES[name], "RUNS_DIR": str(out / "runs"), "RUN_ID": label}
    folder = out / "runs" / label
    kept: dict = {"codes": run_ranks(trainer, [], settings, ranks, out / label)}
    lines, artifact = folder / "metrics.jsonl", folder / "artifact.bin"
    events = lines.read_text().splitlines() if lines.is_file() else []
    kept["events"] = [json.loads(event) for event in events]
    if artifact.is_file():
        shutil.copy(artifact, out / f"{label}.bin")
        np.savez_compressed(out / f"{label}.npz", **artifact_arrays(trainer, artifact))
        kept["eval"] = score_again(trainer, artifact, data, out / f"{label}.eval")
    earlier = Path(job["earlier"], f"{label}.bin") if job["earlier"] else None
    if earlier and earlier.is_file():
        kept["eval_of_old"] = score_again(trainer, earlier, data, out / f"{label}.cross")
    return kept


def serve(path: Path, job_path: Path) -> None:
    """Run the cases of a job with the trainer at `path`, and write what each computed."""
    job = json.loads(job_path.read_text())
    trainer, out = load_trainer(path), Path(job["out"])
    (out / "presets.json").write_text(json.dumps(preset_settings(trainer)))
    for name, ranks in job["cases"]:
        start = time.monotonic()
        (out / f"{name}-{ranks}.json").write_text(json.dumps(run_case(trainer, name, ranks, job)))
        seconds = time.monotonic() - start
        print(f"{path.name}: {name} x {ranks}, {seconds:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(out / "runs", ignore_errors=True)


def compute(
    trainer: Path, out: Path, data: dict[str, str], cases: list, earlier: Path | None
) -> None:
    """Have a version compute the cases, in a process of its own that starts beside its file."""
    out.mkdir(parents=True)
    job = {"out": str(out), "data": data, "cases": cases, "earlier": earlier and str(earlier)}
    (out / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(trainer)]
    subprocess.run(
        [*command, str(out / "job.json")],
        cwd=trainer.parent,
        env=ENVIRONMENT,
        check=True,
        stdin=subprocess.DEVNULL,
    )


# The comparison


def of_event(events: list[dict], kind: str, names: tuple[str, ...]) -> list[list]:
    """Some facts of each event of a kind, in order."""
    return [[event.get(name) for name in names] for event in events if event["event"] == kind]


def differing_numbers(what: str, old: list[list], new: list[list], tolerance: float) -> list[str]:
    """Complaints about two tables of numbers and texts."""
    if len(old) != len(new):
        return [f"{len(old)} {what} became {len(new)}"]
    for before, after in zip(old, new, strict=True):
        for x, y in zip(before, after, strict=True):
            near = isinstance(x, float) and isinstance(y, float) and abs(x - y) <= tolerance
            if x != y and not near:
                return [f"{what}: {before} became {after}"]
    return []


def differing_arrays(old: Path, new: Path, tolerance: float) -> list[str]:
    """Complaints about the arrays of two artifacts."""
    if not (old.is_file() and new.is_file()):
        return [] if old.is_file() == new.is_file() else ["one side has no artifact"]
    with np.load(old) as before, np.load(new) as after:
        if odd := sorted(set(before.files) ^ set(after.files)):
            return [f"artifact: {len(odd)} arrays on one side only, {odd[0]} first"]
        bad = []
        for name in before.files:
            x, y = before[name], after[name]
            floats = x.dtype.kind == "f" and tolerance > 0
            equal = x.shape == y.shape and x.dtype.kind == y.dtype.kind
            if equal and floats:
                equal = np.allclose(y, x, rtol=LAST_PLACE, atol=2.0**-24)
            elif equal:
                equal = np.array_equal(x, y)
            if not equal:
                bad.append(name)
    return [f"artifact: {len(bad)} arrays differ, {bad[0]} first"] if bad else []


# Events of a run's metrics, what they are, and which of their facts are compared.
TABLES = {
    "step": ("steps", ("step", "train_loss", "lr_scale")),
    "eval": ("scores", ("name", "step", "val_loss", "val_bpb", "targets", "num_bytes", "legal")),
    "activity": ("techniques", ("name", "steps", "of")),
    "final": ("final scores", ("val_bpb", "val_loss", "name")),
}


def spoken_scores(text: str) -> list:
    """The numbers of what `score_again` gives, or the text itself if there are none."""
    return [float(number) for number in re.findall(r":(\S+)", text)] or [text]


def differing_case(old: Path, new: Path, label: str, tolerance: float) -> tuple[list[str], str]:
    """Complaints about a case, and in a few words what was compared."""
    before, after = (json.loads((side / f"{label}.json").read_text()) for side in (old, new))
    bad, compared = [], f"exit {before['codes'][0]}"
    if before["codes"] != after["codes"]:
        said = (new / f"{label}.rank0").read_text().splitlines()
        last = said[-1] if said else "nothing"
        bad.append(f"exit codes {before['codes']} became {after['codes']}, saying: {last}")
    for kind, (what, names) in TABLES.items():
        pair = [of_event(side["events"], kind, names) for side in (before, after)]
        if kind == "activity":
            pair = [sorted(rows) for rows in pair]
            idle = [name for name, steps, _ in pair[0] if not steps]
            bad += [f"this case does not test {name}, which never acts in it" for name in idle]
        bad += differing_numbers(what, *pair, tolerance)
        compared += f", {len(pair[0])} {what}" if pair[0] else ""
    bad += differing_arrays(old / f"{label}.npz", new / f"{label}.npz", tolerance)
    for key, what in (("eval", "--eval"), ("eval_of_old", "--eval of the old artifact")):
        if key in after and "eval" in before:
            pair = [[spoken_scores(before["eval"])], [spoken_scores(after[key])]]
            bad += differing_numbers(what, *pair, tolerance)
    return bad, compared


def differing_presets(old: Path, new: Path) -> list[str]:
    """Complaints about the settings, at full size, that both sides know."""
    before, after = (json.loads((side / "presets.json").read_text()) for side in (old, new))
    bad = []
    for preset, settings in before.items():
        for name, value in settings.items():
            if name not in after[preset]:
                bad.append(f"{name.upper()} is gone")
            elif after[preset][name] != value:
                bad.append(f"PRESET={preset}: {name.upper()} {value} became {after[preset][name]}")
    return sorted(set(bad))


def compare(old: Path, new: Path, cases: list, tolerance: float) -> bool:
    """Print a line a case and a verdict; returns whether all is equal."""
    bad = differing_presets(old, new)
    print(f"{'presets':<16} {'; '.join(bad) or 'equal'}")
    failed = int(bool(bad))
    for name, ranks in cases:
        bad, compared = differing_case(old, new, f"{name}-{ranks}", tolerance)
        failed += bool(bad)
        print(f"{name:<13}x {ranks} {'; '.join(bad) or f'equal ({compared})'}")
    print("all equal" if not failed else f"{failed} of {len(cases) + 1} differ")
    return not failed


# The command


def make_data(folder: Path) -> dict[str, str]:
    """The tests' tiny data set below a folder, made if it is not there; as settings."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TinyData, make_tiny_data

    datasets, tokenizers = folder / "datasets", folder / "tokenizers"
    if not datasets.is_dir():
        return make_tiny_data(folder).env
    return TinyData(next(datasets.iterdir()), next(tokenizers.glob("*.model"))).env


def check_out(revision: str, folder: Path) -> Path:
    """The trainer of a git revision, with the Python files beside it."""
    git = ["git", "-C", str(ROOT)]
    names = subprocess.check_output([*git, "ls-tree", "--name-only", revision], text=True)
    folder.mkdir()
    for name in filter(lambda name: name.endswith(".py"), names.splitlines()):
        content = subprocess.check_output([*git, "show", f"{revision}:{name}"])
        (folder / name).write_bytes(content)
    return folder / "train_gpt.py"


def main(arguments: list[str]) -> int:
    """Compute both sides, or one, and compare; returns the exit code."""
    if arguments[:1] == ["--serve"]:
        serve(Path(arguments[1]), Path(arguments[2]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainers", type=Path, nargs="+", metavar="TRAINER")
    parser.add_argument("--old-rev", help="the old trainer is that of this git revision")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--cases", "--presets", default=",".join(CASES))
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--tolerance", type=float, default=0.0)
    given = parser.parse_args(arguments)
    cases = [
        (name, int(ranks)) for ranks in given.ranks.split(",") for name in given.cases.split(",")
    ]
    if unknown := {name for name, _ in cases} - CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    trainers = [path.resolve() for path in given.trainers]
    if missing := [path for path in trainers if not path.is_file()]:
        parser.error(f"{missing[0]}: no such file")
    one_side = bool(given.old_rev or given.prepare or given.against)
    if len(trainers) != 2 - one_side:
        parser.error(f"expected {2 - one_side} trainers, got {len(trainers)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.prepare or given.against or temporary).resolve()
        old = folder / "old"
        if not given.against:
            if given.old_rev:
                trainers.insert(0, check_out(given.old_rev, Path(temporary, "checkout")))
            data = make_data(folder / "data")
            compute(trainers[0], old, data, cases, None)
        if given.prepare:
            print(f"recorded {len(cases)} cases in {folder}")
            return 0
        data = make_data(folder / "data")
        new = Path(temporary, "new")
        compute(trainers[-1], new, data, cases, old)
        return int(not compare(old, new, cases, given.tolerance))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
