"""Train one seed of an entry again, by its own script and settings, and compare the scores."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from checking import ROOT, environment_without
from reading import Run, Wrong, common_settings, portable, read_entry, read_run, shown


def environment_of(run: Run, runs_dir: Path, name: str) -> dict[str, str]:
    """The environment that trains a run again: all its settings, and as many threads."""
    settings = portable(common_settings(run.settings))
    settings |= {"seed": run.seed, "run_id": name, "runs_dir": str(runs_dir.resolve())}
    # The values follow from the settings that a preset had set, so that none is named again.
    settings["preset"] = ""
    env = environment_without(run.settings)
    env |= {name.upper(): shown(value) for name, value in settings.items()}
    for place in ("DATA_PATH", "TOKENIZER_PATH"):
        env[place] = os.environ.get(place, env[place])
    if threads := re.match(r"([0-9]{1,4}) threads", str(run.one("machine")["name"])):
        env |= {"OMP_NUM_THREADS": threads[1], "MKL_NUM_THREADS": threads[1]}
    return env


def chosen(runs: list[Run], seed: int | None) -> Run:
    """The run of a seed, or of the entry's first; raises Wrong for a seed that it lacks."""
    found = [run for run in runs if seed in (None, run.seed)]
    if not found:
        raise Wrong(f"--seed {seed}: the entry has {', '.join(str(run.seed) for run in runs)}")
    return found[0]


def repeat(folder: Path, seed: int | None, runs_dir: Path) -> tuple[bool, str]:
    """Whether a seed of an entry gives its score again, and a line that says so.

    The folder's train_gpt.py is run, for as long as it was the first time. Raises Wrong for a
    machine of another kind or a training that fails.
    """
    entry = read_entry(folder)
    run = chosen(entry, seed)
    name = f"repeat_{folder.resolve().name}_{run.seed}"
    if (runs_dir / name).exists():
        raise Wrong(f"{runs_dir / name} exists already; move it away to train again")
    if run.one("machine")["world_size"] != 1:
        raise Wrong(f"{folder}: trained by several processes; its README.md has the command")
    script = folder.resolve() / "train_gpt.py"
    print(f"{folder}: training seed {run.seed} again into {runs_dir / name}", file=sys.stderr)
    env = environment_of(run, runs_dir, name)
    if subprocess.run([sys.executable, str(script)], cwd=ROOT, env=env).returncode:
        raise Wrong(f"{folder}: its train_gpt.py did not end well; its last line says why")
    return verdict(entry, run, read_run(runs_dir / name))


def verdict(entry: list[Run], run: Run, again: Run) -> tuple[bool, str]:
    """Whether a score is the entry's: to the last digit, or within what seeds scatter."""
    before, now = (one.one("final")["val_bpb"] for one in (run, again))
    said = f"seed {run.seed}: {now:.8f} bits per byte, the entry says {before:.8f}"
    if now == before:
        return True, f"{said}: equal to the last digit"
    scores = [one.one("final")["val_bpb"] for one in entry]
    scatter = 2 * statistics.stdev(scores) if len(scores) > 1 else 0.0
    machines = {one.one("machine")["name"] for one in (run, again)}
    where = "on this kind of machine" if len(machines) == 1 else "on another kind of machine"
    within = abs(now - before) <= scatter
    bound = f"two standard deviations of the entry's seeds ({scatter:.6f})"
    return within, f"{said}: {'within' if within else 'farther than'} {bound}, {where}"
