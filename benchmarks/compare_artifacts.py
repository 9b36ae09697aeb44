"""Compare two configurations by artifact bits per byte over paired seeds, run in turn.

    python benchmarks/compare_artifacts.py benchmarks/config_p.env PRESET=mini --seeds 1 2 3

A configuration is a file of NAME=value lines or such pairs separated by commas or spaces. For
each seed both are run, A then B, in a process of their own, scored in chunks, and the
difference printed; then its mean and a paired t interval.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from train_gpt import ALIASES, RETIRED, Config  # noqa: E402


def settings(text: str) -> dict[str, str]:
    """NAME=value pairs of a file or of the text itself."""
    source = Path(text).read_text() if Path(text).is_file() else text.replace(" ", "\n")
    lines = [line for line in source.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def artifact_bpb(env: dict[str, str], seed: int, folder: str) -> tuple[float, float, int]:
    """Run once; returns bits per byte of the artifact, of the float model, and steps."""
    run_id = f"run{len(os.listdir(folder))}"
    ours = {field.name.upper() for field in fields(Config)} | {*ALIASES, *RETIRED}
    foreign = {name: value for name, value in os.environ.items() if name not in ours}
    subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
        env={
            **foreign,
            "EVAL_STRIDE": "0",
            **env,
            "SEED": str(seed),
            "RUNS_DIR": folder,
            "RUN_ID": run_id,
        },
    )
    lines = Path(folder, run_id, "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    scores = {e["name"]: e["val_bpb"] for e in events if e["event"] == "eval"}
    steps = next(e["steps"] for e in events if e["event"] == "summary")
    return scores["artifact_chunked"], scores["float_chunked"], steps


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            pair = [artifact_bpb(settings(side), seed, folder) for side in (options.a, options.b)]
            differences.append(pair[1][0] - pair[0][0])
            print(
                f"seed {seed}: "
                + "  ".join(
                    f"{side} artifact {bpb:.5f} float {float_bpb:.5f} steps {steps}"
                    for side, (bpb, float_bpb, steps) in zip("AB", pair, strict=True)
                )
                + f"  B-A {differences[-1]:+.5f}",
                flush=True,
            )
    summary = stats.ttest_1samp(differences, 0.0)
    low, high = summary.confidence_interval(0.95)
    print(
        f"B-A mean {sum(differences) / len(differences):+.5f} bpb, 95 % interval "
        f"[{low:+.5f}, {high:+.5f}] over {len(differences)} paired seeds"
    )


if __name__ == "__main__":
    main()
