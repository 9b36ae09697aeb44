"""How near the solver comes to a target: trained runs exported at shares of their own size.

    python benchmarks/meet_target.py RUN_FOLDER...

For each run (training done, as benchmarks/export.py wants it): clips of CLIP_SIGMAS below, GPTQ on
(GPTQ_VARIANT=full where the run has it off), the whole size, code included; then, each as one
run's export would do it, ARTIFACT_TARGET_BYTES at 100, 85 and 70 % of that. Exits with 1 if any
artifact is above its target or below 99 % of it.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from export import calibrated, environment_of, load

import train_gpt

CLIP_SIGMAS = "mlp:12.85,attn:12.85,emb:20,aux:20"
SHARES = (1.0, 0.85, 0.7)


def fitted(model: train_gpt.GPT, hessians: dict, header: dict, target: int) -> tuple[int, int]:
    """Bytes of code and artifact under a target, 0 for none, and the passes it took."""
    settings = environment_of(asdict(model.cfg)) | {"ARTIFACT_TARGET_BYTES": str(target)}
    model.cfg = train_gpt.Config.from_env(settings)[0]
    run, passes = train_gpt.Run(model.cfg, 0, 1, torch.device("cpu")), []
    run.folder.log = lambda template, event="", **facts: passes.append(event)
    blob = train_gpt.fit_artifact(model, hessians, header, run)[1]
    return len(run.folder.source) + len(blob), passes.count("size_pass")


def main(folder: Path) -> bool:
    """Print the rows of one run; True if all of them are met."""
    cfg, model, steps = load(folder)
    variant = "full" if cfg.gptq_variant == "off" else cfg.gptq_variant
    model.cfg = train_gpt.Config.from_env(
        environment_of(asdict(cfg))
        | {"QUANT_CLIP": "std", "CLIP_SIGMAS": CLIP_SIGMAS, "GPTQ_VARIANT": variant}
    )[0]
    hessians = calibrated(model.cfg, model, steps)
    header = train_gpt.artifact_header(model.cfg, train_gpt.load_validation(cfg))
    whole, met = fitted(model, hessians, header, 0)[0], True
    for share in SHARES:
        target, start = int(share * whole), time.perf_counter()
        total, passes = fitted(model, hessians, header, target)
        met &= 0.99 * target <= total <= target
        print(
            f"| {cfg.preset} ({variant}, {cfg.codec}) | {share:.0%} | {target:,} | {total:,} | "
            f"{total / target:.3%} | {passes} | {time.perf_counter() - start:.1f} |",
            flush=True,
        )
    return met


if __name__ == "__main__":
    print("| system (GPTQ, codec) | of its size | target | bytes | share | passes | seconds |")
    print("|---|---|---|---|---|---|---|")
    sys.exit(not all(list(map(main, map(Path, sys.argv[1:])))))  # the list, for every row
