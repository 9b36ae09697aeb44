"""Export a trained model again under other settings, and score each artifact.

    python benchmarks/export.py RUN_FOLDER "CODEC=lzma" "QUANT_CLIP=std CLIP_SIGMAS=..." ...

RUN_FOLDER holds a checkpoint of the end of training (checkpoint_<step>.pt). Each further argument
is a list of settings. Hessians are collected once, on the training rows that would come next.
"""

import contextlib
import io
import json
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t


def load(folder: Path) -> tuple[t.Config, t.GPT, int]:
    """Settings, averaged model and steps of a run that has finished training."""
    env = {k.upper(): t.show_setting(v) for k, v in
           json.loads((folder / "settings.json").read_text()).items()}
    cfg = t.Config.from_env({**env, "RESUME": "0"})[0]
    path = max(folder.glob("checkpoint_*.pt"), key=lambda p: int(p.stem.split("_")[1]))
    saved = torch.load(path, weights_only=True)
    model = t.GPT(cfg)
    states = saved["averages"] or [saved["model"]]
    model.load_state_dict(states[-1] if saved["snapshots"] or len(states) == 1 else states[0])
    return cfg, model, saved["step"]


def main(folder: str, variants: list[str]) -> None:
    cfg, model, steps = load(Path(folder))
    torch.manual_seed(0)
    rows, val = t.TrainingRows(cfg), t.load_validation(cfg)
    run = t.Run(replace(cfg, quant_clip="std", max_wallclock_seconds=0), 0, 1, torch.device("cpu"))
    model.cfg = run.cfg
    hessians = t.collect_hessians(model, lambda n: rows.batch(
        steps * cfg.rows_per_step + n * t.CALIBRATION_ROWS, t.CALIBRATION_ROWS)[0],
        cfg.gptq_calib_batches, math.inf, run)
    stride = int(os.environ.get("STRIDE", 0))
    result = t.evaluate("float", t.training_nats, model, val, run, stride)
    print(f"float {result.bpb:.5f}", flush=True)
    for variant in variants:
        changes = dict(pair.split("=", 1) for pair in variant.split())
        new = t.Config.from_env({**{f: t.show_setting(v) for f, v in
                                    ((k.upper(), v) for k, v in vars(cfg).items())}, **changes})[0]
        model.cfg = new
        run = t.Run(new, 0, 1, torch.device("cpu"))
        known = hessians if new.quant_clip == "std" else {
            k: v for k, v in hessians.items() if k not in ("tok_emb", "lm_head")}
        with tempfile.TemporaryDirectory() as place:
            run.folder = Path(place)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                blob = t.export(model, known, val, run)
        sizes = [line for line in out.getvalue().splitlines() if line.startswith("size_pass")]
        print(*sizes, sep="\n")
        scored = t.rebuild_model(new, t.decode_artifact(blob)[1], run)
        result = t.evaluate("artifact", t.training_nats, scored, val, run, stride)
        print(f"{variant}: {len(blob)} bytes {result.bpb:.5f} bpb", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
