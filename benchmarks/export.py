"""Export a trained model again under other settings, and score each artifact in chunks.

    python benchmarks/export.py RUN_FOLDER "CODEC=lzma" "QUANT_CLIP=std CLIP_SIGMAS=..." ...

RUN_FOLDER holds the checkpoint of the end of training. Each further argument is a list of settings.
Hessians are collected once, on the training rows that would come next. The artifacts are kept in
RUN_FOLDER as artifact_1.bin and so on.
"""

import json
import math
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from train_gpt import CALIBRATION_ROWS, GPT, Config, Run, show_setting


def environment_of(settings: dict[str, object]) -> dict[str, str]:
    """Settings as one would write them in the environment."""
    return {
        name.upper(): value if isinstance(value, str) else show_setting(value)
        for name, value in settings.items()
    }


def settings(text: str) -> dict[str, str]:
    """NAME=value pairs as a dictionary."""
    return dict(pair.split("=", 1) for pair in text.split())


def load(folder: Path) -> tuple[Config, GPT, int]:
    """Settings, averaged model and steps of a run that has finished training."""
    kept = json.loads((folder / "settings.json").read_text())
    cfg = Config.from_env({**environment_of(kept), "RESUME": "0"})[0]
    path = max(folder.glob("checkpoint_*.pt"), key=lambda p: int(p.stem.split("_")[1]))
    saved = torch.load(path, "cpu", weights_only=True)
    model = GPT(cfg)
    averages = train_gpt.Averages(model, cfg)
    model.load_state_dict(saved["model"])
    for average, state in zip(averages.kept.values(), saved["averages"], strict=True):
        average.load_state_dict(state)
    averages.snapshots = saved["snapshots"]
    return cfg, averages.result(Run(cfg, 0, 1, torch.device("cpu"))), saved["step"]


def calibrated(cfg: Config, model: GPT, steps: int) -> dict[str, torch.Tensor]:
    """Hessians on the training rows that would come next, that of the logits' matrix too."""
    rows, model.cfg = train_gpt.TrainingRows(cfg), replace(cfg, quant_clip="std")
    return train_gpt.collect_hessians(
        model,
        lambda n: (
            rows.batch(steps * cfg.rows_per_step + n * CALIBRATION_ROWS, CALIBRATION_ROWS).input_ids
        ),
        cfg.gptq_calib_batches,
        math.inf,
        Run(model.cfg, 0, 1, torch.device("cpu")),
    )


def exported(
    cfg: Config,
    model: GPT,
    hessians: dict[str, torch.Tensor],
    val: train_gpt.Validation,
    **changes: str,
) -> tuple[bytes, float, int]:
    """The artifact under changed settings, its chunked bpb, and the code's bytes."""
    model.cfg = Config.from_env({**environment_of(asdict(cfg)), **changes})[0]
    run = Run(model.cfg, 0, 1, torch.device("cpu"))
    used = {
        name: H
        for name, H in hessians.items()
        if model.cfg.clips_by_deviation or name not in ("tok_emb", "lm_head")
    }
    with tempfile.TemporaryDirectory() as place:
        run.folder.path = Path(place)
        blob = train_gpt.export(model, used, b"", val, run)
    rebuilt = train_gpt.rebuild_model(model.cfg, train_gpt.decode_artifact(blob)[1], run)
    result = train_gpt.evaluate("artifact", train_gpt.training_nats, rebuilt, val, run)
    return blob, result.bpb, len(run.folder.source)


def main(folder: Path, variants: list[str]) -> None:
    cfg, model, steps = load(folder)
    val, hessians = train_gpt.load_validation(cfg), calibrated(cfg, model, steps)
    run = Run(model.cfg, 0, 1, torch.device("cpu"))
    result = train_gpt.evaluate("float", train_gpt.training_nats, model, val, run)
    print(f"float {result.bpb:.5f} bpb", flush=True)
    for number, variant in enumerate(variants, 1):
        blob, bpb, _ = exported(cfg, model, hessians, val, **settings(variant))
        (folder / f"artifact_{number}.bin").write_bytes(blob)
        print(f"{variant}: {len(blob)} bytes {bpb:.5f} bpb", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
