"""What quantisation costs: GPTQ against round-to-nearest, and the artifact against the float model.

    python benchmarks/quantize.py           after a full run of PRESET=mini (about six minutes)
    python benchmarks/quantize.py 60        after 60 step-driven steps

Prints GPTQ's objective tr(D H D^T) for every matrix under both, the largest ratio, and the
chunked validation bits per byte of the float model and of both quantised models.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t


def main() -> None:
    """Train, quantise twice, compare."""
    steps = {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": sys.argv[1]} if sys.argv[1:] else {}
    cfg, _ = t.Config.from_env({"PRESET": "mini", **steps})
    rows, val = t.TrainingRows(cfg), t.load_validation(cfg)
    with t.Run.start(cfg) as run:
        model = t.GPT(cfg)
        t.initialize(model, cfg)
        reserve = t.calibration_reserve(t.prime(t.training_nats, model, rows, run)[0], run)
        model, done = t.train(t.training_nats, model, rows, val, reserve, run)
        hessians = t.calibrate(model, rows, done, run)
        solved = t.quantize(model, hessians, run)
        nearest, ratios = dict(solved), {}
        for name, p in model.named_parameters():
            H = hessians.get(t.hessian_source(name.removesuffix(".weight")))
            bits, W = t.bits_of(cfg, name, p), p.detach().float()
            if bits and H is not None:
                nearest[name] = t.round_to_nearest(W, bits, cfg)
                errors = [t.weighted_error(W, s[name], H) for s in (solved, nearest)]
                ratios[name] = errors[0] / max(errors[1], 1e-30)
                print(f"{name:<32} gptq {errors[0]:<12.5g} nearest {errors[1]:<12.5g} "
                      f"ratio {ratios[name]:.3f}")
        print(f"matrices {len(ratios)}, worse under gptq "
              f"{sum(ratio > 1 for ratio in ratios.values())}, largest ratio "
              f"{max(ratios.values()):.3f}")
        bpb = {"float": t.evaluate("float", t.training_nats, model, val, run).bpb}
        for name, stored in (("gptq", solved), ("nearest", nearest)):
            bpb[name] = t.evaluate(name, t.training_nats, t.rebuild_model(cfg, stored, run), val,
                                   run).bpb
        print("  ".join(f"{name} {value:.5f} bpb" for name, value in bpb.items()))


if __name__ == "__main__":
    main()
