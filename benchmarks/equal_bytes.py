"""Two ways to export the same trained weights, at equal bytes, paired by run.

    python benchmarks/equal_bytes.py "CODEC=zstd" "QUANT_CLIP=std CODEC=brotli" RUN_FOLDER...

The first way says how many bytes code and artifact take; the second gets that as its
ARTIFACT_TARGET_BYTES, and so never takes more. Prints chunked bits per byte of both for each run
(training done, as benchmarks/export.py wants it), the differences' mean and a paired t interval.
"""

import io
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path

from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from export import calibrated, exported, load, settings

import train_gpt


def main(
    first: str,
    second: str,
    folders: list[str],
    changed: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Print a row a run, then what they say together; the second is exported inside changed()."""
    differences = []
    for folder in folders:
        with redirect_stdout(io.StringIO()):
            cfg, model, steps = load(Path(folder))
            val, hessians = train_gpt.load_validation(cfg), calibrated(cfg, model, steps)
            blob, bpb, code = exported(cfg, model, hessians, val, **settings(first))
            target = {"ARTIFACT_TARGET_BYTES": str(code + len(blob))}
            with changed():
                other, other_bpb, _ = exported(
                    cfg, model, hessians, val, **target, **settings(second)
                )
        differences.append(other_bpb - bpb)
        print(
            f"seed {cfg.seed}, {steps} steps: {len(blob):,} bytes {bpb:.5f} bpb, then "
            f"{len(other):,} bytes {other_bpb:.5f} bpb, {differences[-1]:+.5f}",
            flush=True,
        )
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    print(
        f"{second} less {first}: {sum(differences) / len(differences):+.5f} bpb, 95 % interval "
        f"[{low:+.5f}, {high:+.5f}] over {len(differences)} pairs",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
