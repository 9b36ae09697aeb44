"""How fast a model is calibrated and quantised, and what quantisation costs it.

    python benchmarks/quantize.py              speed at configuration P, at initial weights
    python benchmarks/quantize.py mini --json FILE
    python benchmarks/quantize.py mini --train -1    loss after a full run (about six minutes)
    python benchmarks/quantize.py mini --train 60    loss after 60 step-driven steps

Speed: seconds of 32 calibration batches of 8 rows, in turn with one sgemm (2048 x 512 x 2048)
each, counted as forward without head and 2 c^2 FLOPs a token for each Hessian of c inputs; seconds
of quantising all matrices, and what each phase of it takes. Loss: GPTQ's objective tr(D H D^T) for
every matrix under GPTQ and under round-to-nearest, the largest ratio, and the chunked validation
bits per byte of the float model and of both quantised models.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from unittest import mock

from measure import (
    Bench,
    alternate,
    arguments,
    finish,
    flops,
    median,
    seconds,
    settings,
    sgemm,
    t,
    table,
)

BATCHES = 32
PHASES = (
    "clip_candidates",
    "inverse_factor",
    "round_columns",
    "pick",
    "weighted_error",
    "int8_rows",
    "round_to_nearest",
)


def timed(phase: str, spent: Counter) -> Callable:
    """A function of train_gpt that adds its seconds to `spent`."""
    work = getattr(t, phase)

    @functools.wraps(work)
    def call(*args: object) -> object:
        box: list = []
        spent[phase] += seconds(lambda: box.append(work(*args)))
        return box[0]

    return call


def speed(name: str, times: int) -> dict[str, object]:
    """Time calibration and quantisation."""
    bench, rate = Bench(name), sgemm()
    cfg, kept, rows = bench.cfg, {}, t.CALIBRATION_ROWS
    bench.run.folder.log = lambda *said, **facts: None

    def calibrate() -> None:
        kept.update(
            t.collect_hessians(
                bench.model,
                lambda n: bench.rows.batch(rows * n, rows).input_ids,
                BATCHES,
                math.inf,
                bench.run,
            )
        )

    took, product = alternate(calibrate, rate, times)
    part, tokens = flops(bench.model, cfg.train_seq_len), BATCHES * rows * cfg.train_seq_len
    hessians = sum(2.0 * len(H) ** 2 for H in kept.values())
    work = 1e-9 * tokens * (part["blocks"] + part["attention"] + hessians)
    facts = {
        "tokens": tokens,
        "seconds": took,
        "GFLOP": work,
        "GFLOP/s": work / took,
        "sgemm GFLOP/s": product,
        "share": work / took / product,
    }
    table(("", *facts), [("calibration", *facts.values())])
    whole = [seconds(lambda: t.quantize(bench.model, kept, bench.run)) for _ in range(times)]
    spent: Counter = Counter()
    with mock.patch.multiple(t, **{phase: timed(phase, spent) for phase in PHASES}):
        spent["whole, with clocks inside"] = seconds(
            lambda: t.quantize(bench.model, kept, bench.run)
        )
    matrices = sum(bool(t.bits_of(bench.model, name)) for name in bench.model.kinds)
    table(
        (f"{matrices} matrices, {len(kept)} Hessians", "s"),
        [("quantisation", median(whole)), *spent.most_common()],
    )
    return {
        "calibration": facts,
        "matrices": matrices,
        "quantisation s": median(whole),
        "phases s": dict(spent),
    }


def loss(name: str, steps: int) -> dict[str, object]:
    """Train, quantise twice, compare."""
    driven = {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": str(steps)} if steps > 0 else {}
    cfg, _ = t.Config.from_env({**settings(name), **driven})
    rows, val = t.TrainingRows(cfg), t.load_validation(cfg)
    with t.Run.start(cfg) as run:
        model = t.GPT(cfg)
        t.initialize(model, cfg)
        reserve = t.calibration_reserve(t.prime(t.training_nats, model, rows, run)[0], run)
        state = t.Training(model, reserve, [val.fingerprint, rows.num_tokens], run)
        model = t.train(t.training_nats, state, rows, val, run)
        hessians = t.calibrate(model, rows, state.step, run)
        solved = t.quantize(model, hessians, run)
        nearest, ratios = dict(solved), {}
        for name, p in model.named_parameters():
            H = hessians.get(t.hessian_source(model, name))
            bits, W = t.bits_of(model, name), p.detach().float()
            if bits and H is not None:
                nearest[name] = t.round_to_nearest(W, bits, cfg)
                errors = [t.weighted_error(W, s[name], H) for s in (solved, nearest)]
                ratios[name] = errors[0] / max(errors[1], 1e-30)
                print(
                    f"{name:<32} gptq {errors[0]:<12.5g} nearest {errors[1]:<12.5g} "
                    f"ratio {ratios[name]:.3f}"
                )
        worse, largest = sum(ratio > 1 for ratio in ratios.values()), max(ratios.values())
        print(f"matrices {len(ratios)}, worse under gptq {worse}, largest ratio {largest:.3f}")
        bpb = {"float": t.evaluate("float", t.training_nats, model, val, run).bpb}
        for name, stored in (("gptq", solved), ("nearest", nearest)):
            bpb[name] = t.evaluate(
                name, t.training_nats, t.rebuild_model(cfg, stored, run), val, run
            ).bpb
        print("  ".join(f"{name} {value:.5f} bpb" for name, value in bpb.items()))
    return {"ratios": ratios, "bpb": bpb}


def main() -> None:
    """Speed, or with --train loss."""
    given = arguments(
        __doc__,
        times={"type": int, "default": 5, "help": "calls of each"},
        train={"type": int, "default": 0, "help": "steps; -1: the whole budget"},
    )
    if given.train:
        facts = loss(given.configuration, given.train)
    else:
        facts = speed(given.configuration, given.times)
    finish({"configuration": given.configuration, **facts}, given.json)


if __name__ == "__main__":
    main()
