"""How fast the validation split is scored, beside the rate of bare float32 products.

    python benchmarks/evaluate.py                  configuration P
    python benchmarks/evaluate.py mini --json FILE

Times whole calls of evaluate() on the first targets of the split, chunked and sliding, in turn
with one sgemm (2048 x 512 x 2048) each, at initial weights. Counted work: products of the blocks
and the causal half of attention for every token of every window, the head for every scored target.
The parts are timed alone, each in a batch of windows as evaluate() forms them.
"""

import torch
from measure import Bench, alternate, arguments, finish, flops, seconds, sgemm, shortened, t, table


def main() -> None:
    """Time chunked and sliding scoring, then the parts of one batch."""
    given = arguments(
        __doc__,
        chunked={"type": int, "default": 65_536, "help": "targets"},
        sliding={"type": int, "default": 16_384, "help": "targets"},
        times={"type": int, "default": 5, "help": "calls of each"},
    )
    bench, rate = Bench(given.configuration), sgemm()
    cfg, val, rows, facts = bench.cfg, t.load_validation(bench.cfg), [], {}
    part = flops(bench.model, cfg.eval_seq_len)
    for name, most, stride in (
        ("chunked", given.chunked, 0),
        ("sliding", given.sliding, cfg.eval_stride),
    ):
        split = shortened(val, min(most, len(val.tokens) - 1))
        targets = len(split.tokens) - 1
        shown = targets * cfg.eval_seq_len / stride if stride else targets
        work = 1e-9 * (shown * (part["blocks"] + part["attention"]) + targets * part["head"])
        scored = []
        took, product = alternate(
            lambda split=split, stride=stride, scored=scored: scored.append(
                t.evaluate("", t.training_nats, bench.model, split, bench.run, stride)
            ),
            rate,
            given.times,
        )
        facts[name] = {
            "targets": targets,
            "seconds": took,
            "targets/s": targets / took,
            "MFLOP a target": 1e3 * work / targets,
            "GFLOP/s": work / took,
            "sgemm GFLOP/s": product,
            "share": work / took / product,
            "nats": scored[-1].nats,
        }
        rows.append((name, *facts[name].values()))
    table(("", *facts["chunked"]), rows)
    with torch.no_grad():
        ids = torch.zeros(bench.run.scored_rows, cfg.eval_seq_len, dtype=torch.int64)
        hidden = bench.model.hidden(ids)
        took = {
            "hidden": seconds(lambda: bench.model.hidden(ids)),
            "logits of all": seconds(lambda: bench.model.logits(hidden)),
        }
    rows = [(name, 1e3 * s) for name, s in took.items()]
    table((f"a forward of {len(ids)} windows", "ms"), rows)
    finish({"configuration": given.configuration, **facts, "parts ms": dict(rows)}, given.json)


if __name__ == "__main__":
    main()
