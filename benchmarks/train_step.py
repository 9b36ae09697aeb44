"""Where a training step's time goes, beside the rate of bare float32 products.

    python benchmarks/train_step.py              configuration P
    python benchmarks/train_step.py mini 31      a preset, 31 timed steps
    python benchmarks/train_step.py P 21 COMPILE=0      with a setting changed

Steps alternate with one sgemm (2048 x 512 x 2048) each. A part is timed alone at the step's own
shapes, and but for "forward" without compiled blocks: the parts need not add up to the step. "Bare"
is what no step can do without: the matrix products, attention and orthogonalisation, nothing around
them. P's step counts as 31.7 GFLOP, its share of the sgemm rate is printed with it; presets have no
such count.
"""

import sys
from collections.abc import Callable

import torch
from measure import Bench, machine, median, report, seconds, sgemm, t
from tqdm import tqdm

STEP_GFLOP = {"P": 31.7}  # counted analytically: products, attention and orthogonalisation


def both_ways(work: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of `work` at copies of `inputs`, gradients of ones."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]

    def call() -> None:
        y = work(*inputs)
        y.backward(torch.ones_like(y))

    return call


def products(model: t.GPT, tokens: int) -> Callable[[], None]:
    """The three products of each matrix in a step: forward, and the backward's two."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, t.Linear)]
    weights += [model.tok_emb.weight.detach()] if model.lm_head is None else []
    work = []
    for w in weights:
        x, y = torch.randn(tokens, w.size(1)), torch.randn(tokens, w.size(0))
        work += [
            (x, w.t(), torch.empty_like(y)),
            (y, w, torch.empty_like(x)),
            (y.t(), x, torch.empty_like(w)),
        ]

    def call() -> None:
        for a, b, out in work:
            torch.mm(a, b, out=out)

    return call


def parts(bench: Bench) -> dict[str, Callable[[], object]]:
    """Each part of a step as a call without arguments."""
    model, cfg, run, rows = bench.model, bench.cfg, bench.run, bench.rows
    batch = rows.batch(0, min(run.micro_batch_rows, cfg.rows_per_step))
    ids, targets = batch.input_ids, batch.target_ids
    block, x = model.blocks[-1], torch.randn(*ids.shape, cfg.model_dim)
    context = model.context(ids, x)
    context.rotation = tuple(table.detach() for table in context.rotation)
    first_v = None if context.first_v is None else context.first_v.detach()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return t.HeadNats.apply(
            hidden, model.head.weight, targets, cfg.logit_softcap, None, 0.0, targets, None
        )[0]

    def embed() -> None:
        model.embedded(ids).sum().backward()

    averages, adam, muon = t.Averages(model, cfg), *bench.optimizers
    stacks = [torch.randn(len(weights), *weights[0].shape) for _, weights in muon.stacks]

    def attend(x: torch.Tensor) -> torch.Tensor:
        return block.attn(x, block.attn_scale, context.rotation, None, first_v)

    def think(x: torch.Tensor) -> torch.Tensor:
        return block.mlp(x, block.mlp_scale)

    def adamw() -> None:
        for group in adam.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        adam.step()

    heads = [torch.randn(*ids.shape, cfg.num_heads, cfg.head_dim) for _ in range(3)]
    return {
        "bare products": products(model, ids.numel()),
        f"bare attention x {cfg.num_layers}, both ways": both_ways(t.sdpa_attention, *heads),
        "loader": lambda: rows.batch(0, cfg.rows_per_step),
        "forward": lambda: t.training_nats(model, batch),
        "embedding, both ways": embed,
        f"attention x {cfg.num_layers}, both ways": both_ways(attend, x),
        f"mlp x {cfg.num_layers}, both ways": both_ways(think, x),
        "head and loss, both ways": both_ways(loss, x),
        "orthogonalisation": lambda: [
            t.orthogonalize(stack, cfg.muon_backend_steps, cfg.muon_ns) for stack in stacks
        ],
        "AdamW": adamw,
        "averaging": lambda: averages.update(False),
    }


def main() -> None:
    """Time whole steps against sgemm, then the parts."""
    name, steps = (sys.argv[1:] + ["P", "21"][len(sys.argv) - 1 :])[:2]
    bench, rate = Bench(name, *sys.argv[3:]), sgemm()
    if bench.cfg.rows_per_step > bench.run.micro_batch_rows:
        raise SystemExit(
            "the parts are those of one forward: set MICRO_BATCH_SEQS="
            f"{bench.cfg.rows_per_step}, the rows of a step"
        )
    for number in range(3):
        bench.step(number)
        rate()
    whole, rates = [], []
    for number in tqdm(range(3, 3 + int(steps)), "steps", disable=None):
        whole.append(seconds(lambda number=number: bench.step(number)))
        rates.append(rate())
    rows = [("step", 1e3 * median(whole))]
    for part, work in tqdm(parts(bench).items(), "parts", disable=None):
        work()
        times = bench.cfg.num_layers if f" x {bench.cfg.num_layers}," in part else 1
        rows.append((part, 1e3 * times * median(seconds(work) for _ in range(15))))
    ms = dict(rows)
    bare = sum(ms[part] for part in ms if part.startswith("bare")) + ms["orthogonalisation"]
    facts = {
        "configuration": name,
        "machine": machine(),
        "sgemm GFLOP/s": median(rates),
        "bare ms": bare,
        "step / bare": ms["step"] / bare,
        "tokens/s": bench.cfg.train_batch_tokens / median(whole),
    }
    if name in STEP_GFLOP and all(c.startswith("COMPILE=") for c in sys.argv[3:]):
        facts["bare, share of sgemm"] = STEP_GFLOP[name] / bare * 1e3 / median(rates)
        facts["step GFLOP/s"] = STEP_GFLOP[name] / median(whole)
        facts["share of sgemm"] = median(
            STEP_GFLOP[name] / s / r for s, r in zip(whole, rates, strict=True)
        )
    report(rows, facts)


if __name__ == "__main__":
    main()
