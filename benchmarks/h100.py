"""The full-size training step on paper: what each part must compute and move on one H100 of eight.

    python benchmarks/h100.py                 the tables of benchmarks/H100.md: calculated
    python benchmarks/h100.py --measure       the parts that can be timed alone, on a CUDA device
    python benchmarks/h100.py --measure --tokens 2048    fewer tokens, on whatever is there

Bytes are those of a compiled step: what one kernel needs is read once and what another needs is
written once, bfloat16 activations, float32 weights. A part's roofline time is the longer of its
FLOPs at 989 TFLOP/s and its bytes at 3.35 TB/s. The stated efficiencies are assumptions.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from measure import median, t

GPUS, PEAK, BANDWIDTH, LINK = 8, 989e12, 3.35e12, 450e9  # FLOP/s, bytes/s, bytes/s each way
ASSUMED = {"products": 0.65, "attention": 0.35, "passes": 0.75, "updates": 0.4, "exchange": 0.7}
PUBLISHED = "84 to 87"  # ms a step of the published 11-layer systems, from their logs
MEASURED_ALL_ROWS = 703.0  # ms on one H100 with all rows of the step, benchmarks/README.md
BF16, FP32 = 2, 4


class Part(NamedTuple):
    """A part of one GPU's step: FLOPs counted once, bytes through its memory or its links."""

    name: str
    kind: str
    flops: float
    bytes: float

    computing = property(lambda self: 1e3 * self.flops / PEAK)  # ms
    moving = property(
        lambda self: 1e3 * self.bytes / (LINK if self.kind == "exchange" else BANDWIDTH)
    )
    roofline = property(lambda self: max(self.computing, self.moving))


def linears(cfg: t.Config) -> dict[str, list[tuple[int, int, int]]]:
    """(width in, width out, how many) of the products by name."""
    D, kv, M, L = (cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.mlp_dim, cfg.num_layers)
    return {
        "c_q, attn.proj": [(D, D, 2 * L)],
        "c_k, c_v": [(D, kv, 2 * L)],
        "mlp.fc": [(D, M, L)],
        "mlp.proj": [(M, D, L)],
        "head": [(D, cfg.vocab_size, 1)],
        "bigram.proj, ve.proj": [(cfg.bigram_dim, D, 1), (cfg.ve_dim, kv, 1)],
    }


def products(cfg: t.Config, tokens: int) -> Iterator[Part]:
    """Forward and both products of the backward; each reads and writes its operands."""
    for name, shapes in linears(cfg).items():
        yield Part(
            name,
            "products",
            sum(6.0 * a * b * n * tokens for a, b, n in shapes),
            sum(
                n * (3.0 * BF16 * (a + b) * tokens + (2 * BF16 + FP32) * a * b)
                for a, b, n in shapes
            ),
        )


def passes(cfg: t.Config, tokens: int) -> Iterator[Part]:
    """What is left when products and attention are taken out, fused as far as it goes."""
    D, kv, M, L = (cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.mlp_dim, cfg.num_layers)
    elements = {  # read and written a token and layer, forward + backward
        "mix with x0, skip, norm": 4.5 * D + 7 * D,
        "norm, rotation, gain of q and k": 2 * (D + kv) + 3 * (D + kv),
        "exclusive attention": (2 * D + kv) + (3 * D + 2 * kv),
        "residual, norm": 4 * D + 5 * D,
        "activation": 2 * M + 3 * M,
        "last residual": 3 * D + 2 * D,
    }
    for name, count in elements.items():
        yield Part(name, "passes", 0.0, float(BF16 * count * tokens * L))
    yield Part("embedding, smear, last norm", "passes", 0.0, 24.0 * BF16 * D * tokens)
    yield Part("softcap and loss", "passes", 0.0, 3.0 * BF16 * cfg.vocab_size * tokens)


def updates(cfg: t.Config) -> Iterator[Part]:
    """Optimizers, averages and what ranks exchange: of the weights, whatever the tokens."""
    with torch.device("meta"):
        model = t.GPT(cfg)
    groups = t.route_parameters(cfg, model)
    stacks = Counter(p.shape for g in groups if g["optimizer"] == "muon" for p in g["params"])
    adam = sum(p.numel() for g in groups if g["optimizer"] == "adam" for p in g["params"])
    every, flops, moved, shared = sum(p.numel() for p in model.parameters()), 0.0, 0.0, 0
    for shape, count in stacks.items():
        few, many, mine = min(shape), max(shape), -(-count // GPUS)
        flops += mine * cfg.muon_backend_steps * (4.0 * few**2 * many + 2.0 * few**3)
        moved += mine * cfg.muon_backend_steps * BF16 * (4.0 * few * many + 5.0 * few**2)
        shared += mine * shape.numel()
    yield Part("orthogonalisation, this rank's share", "updates", flops, moved)
    # Cast to bfloat16, stacked gradients, momentum of a share, updates and averages; AdamW.
    per_weight = (FP32 + BF16) + 2 * FP32 + (BF16 + 2 * FP32)
    averages = 3 * FP32 * (("ema" in cfg.avg_mode) + ("swa" in cfg.avg_mode))
    yield Part(
        "casts, gradients, updates",
        "passes",
        0.0,
        float((every - adam) * per_weight + shared * 4 * FP32 + adam * 7 * FP32),
    )
    yield Part("average of the weights", "passes", 0.0, float(every * averages))
    yield Part(
        "gradients and updates between ranks",
        "exchange",
        0.0,
        (FP32 + BF16) * shared * (GPUS - 1.0) + 2 * FP32 * adam * (GPUS - 1) / GPUS,
    )


def parts(cfg: t.Config) -> list[Part]:
    """One GPU's step."""
    tokens, width = cfg.train_batch_tokens // GPUS, cfg.num_kv_heads * cfg.head_dim
    # Six products over the causal half; flash attention repeats a seventh, which is not counted.
    attention = Part(
        "attention",
        "attention",
        6.0 * cfg.train_seq_len * cfg.model_dim * tokens * cfg.num_layers,
        BF16 * (6.0 * cfg.model_dim + 6.0 * width) * tokens * cfg.num_layers,
    )
    return [*products(cfg, tokens), attention, *passes(cfg, tokens), *updates(cfg)]


def row(*cells: object) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def step_lines(cfg: t.Config) -> Iterator[str]:
    """The step by part, and its sums."""
    found, tokens = parts(cfg), cfg.train_batch_tokens // GPUS
    yield f"{tokens:,} tokens of {cfg.train_batch_tokens:,} on each of {GPUS} GPUs"
    yield row("part", "GFLOP", "GB", "ms computing", "ms moving", "roofline ms")
    yield row("---", *5 * ["---:"])
    for p in found:
        yield row(
            p.name,
            f"{p.flops / 1e9:,.0f}",
            f"{p.bytes / 1e9:.2f}",
            f"{p.computing:.2f}",
            f"{p.moving:.2f}",
            f"{p.roofline:.2f}",
        )
    yield row(
        "all",
        f"{sum(p.flops for p in found) / 1e9:,.0f}",
        f"{sum(p.bytes for p in found) / 1e9:.2f}",
        f"{sum(p.computing for p in found):.2f}",
        f"{sum(p.moving for p in found):.2f}",
        f"{sum(p.roofline for p in found):.2f}",
    )


def kind_lines(cfg: t.Config) -> Iterator[str]:
    """The step by kind of work, at its roofline and at the assumed share of it."""
    yield row("kind", "roofline ms", "assumed share", "ms at that share")
    yield row("---", *3 * ["---:"])
    total, reached = 0.0, 0.0
    for kind, share in ASSUMED.items():
        ms = sum(p.roofline for p in parts(cfg) if p.kind == kind)
        total, reached = total + ms, reached + ms / share
        yield row(kind, f"{ms:.2f}", f"{share:.2f}", f"{ms / share:.2f}")
    yield row("all", f"{total:.2f}", "", f"{reached:.2f}")
    work = sum(p.flops for p in parts(cfg) if p.kind in ("products", "attention"))
    yield (
        f"ideal, FLOPs of products and attention alone: {1e3 * work / PEAK:.1f} ms; "
        f"published: {PUBLISHED} ms; measured here on one H100, an eighth of the step with "
        f"all rows: {MEASURED_ALL_ROWS / GPUS:.1f} ms"
    )


def other_lines(cfg: t.Config) -> Iterator[str]:
    """Scoring and calibration: with and without what this code leaves out."""
    D, V, M, L, T = (cfg.model_dim, cfg.vocab_size, cfg.mlp_dim, cfg.num_layers, cfg.eval_seq_len)
    blocks = (
        sum(
            2.0 * a * b * n
            for name, shapes in linears(cfg).items()
            if "." in name or "c_" in name
            for a, b, n in shapes
        )
        + 2.0 * T * D * L
    )
    shown, scored = cfg.eval_batch_seqs * T, cfg.eval_batch_seqs * cfg.eval_stride
    logits = 5.0 * FP32 * V  # product out, softcap, log-softmax: written or read five times
    yield row("work", "all places", "what is needed", "saved")
    yield row("---", *3 * ["---:"])
    for name, many, few in (
        ("rows of logits of a batch of windows", shown, scored),
        (
            "its GFLOP, blocks and head",
            1e-9 * shown * (blocks + 2 * D * V),
            1e-9 * (shown * blocks + scored * 2 * D * V),
        ),
        ("its MB of logits, written and read", 1e-6 * shown * logits, 1e-6 * scored * logits),
        (
            "MFLOP of Hessians a calibration token",
            2e-6 * L * (5 * D**2 + M**2),
            2e-6 * L * (3 * D**2 + M**2),
        ),
        ("MB of Hessians", 4e-6 * L * (5 * D**2 + M**2), 4e-6 * L * (3 * D**2 + M**2)),
    ):
        yield row(name, f"{many:,.0f}", f"{few:,.0f}", f"{1 - few / many:.1%}")


def lines() -> Iterator[str]:
    """All tables."""
    cfg = t.Config.from_env({"PRESET": "pr1361"})[0]
    for table in (step_lines, kind_lines, other_lines):
        yield from table(cfg)
        yield ""


def both_ways(work: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of `work`."""
    inputs = [x.requires_grad_() for x in inputs]

    def call() -> None:
        y = work(*inputs)
        y.backward(torch.ones_like(y))

    return call


def trials(cfg: t.Config, tokens: int, device: torch.device) -> Iterator[tuple[str, Callable]]:
    """The parts that can be timed alone, under the names of parts()."""

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    rows, kv = tokens // cfg.train_seq_len, cfg.num_kv_heads
    for name, shapes in linears(cfg).items():
        calls = [
            (both_ways(torch.nn.functional.linear, some(tokens, a), some(b, a)), n)
            for a, b, n in shapes
        ]
        yield name, lambda calls=calls: [call() for call, n in calls for _ in range(n)]
    kernel = t.pick_attention(cfg, t.Ranks(device=device)).kernel
    q, k, v = (
        some(rows, cfg.train_seq_len, heads, cfg.head_dim) for heads in (cfg.num_heads, kv, kv)
    )
    attend = both_ways(kernel, q, k, v)
    yield "attention", lambda: [attend() for _ in range(cfg.num_layers)]
    model = t.GPT(cfg, kernel, torch.bfloat16).to(device)
    ids = torch.full((rows, cfg.train_seq_len), t.BOS, device=device)
    x = some(rows, cfg.train_seq_len, cfg.model_dim)
    context = model.context(ids, x)
    context.extra_v = {}
    whole = both_ways(torch.compile(lambda x: model.layer(0, (x, None), context)[0]), x)
    yield "blocks, all parts", lambda: [whole() for _ in range(cfg.num_layers)]
    stacks = Counter(
        p.shape
        for g in t.route_parameters(cfg, model)
        if g["optimizer"] == "muon"
        for p in g["params"]
    )
    shares = [some(-(-count // GPUS), *shape) for shape, count in stacks.items()]
    yield (
        "orthogonalisation, this rank's share",
        lambda: [t.orthogonalize(share, cfg.muon_backend_steps, cfg.muon_ns) for share in shares],
    )
    averages = t.Averages(model, cfg)
    yield "average of the weights", lambda: averages.update(False)


def measure(tokens: int) -> None:
    """Time the parts beside their roofline; medians of ten calls."""
    cfg = t.Config.from_env({"PRESET": "pr1361"})[0]
    run = t.Run(cfg, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here = replace(cfg, train_batch_tokens=GPUS * tokens)  # a GPU's share is what is timed
    bounds = {p.name: p.roofline for p in parts(here)}
    print(
        f"{torch.cuda.get_device_name() if run.device.type == 'cuda' else 'no GPU'}, "
        f"{tokens:,} tokens, torch {torch.__version__}"
    )
    for name, work in trials(cfg, tokens, run.device):
        times = []
        for _ in range(12):
            run.wait_for_gpu()
            clock = t.Clock()
            with clock.running():
                work()
                run.wait_for_gpu()
            times.append(1e3 * clock.elapsed())
        bound = f"{bounds[name]:8.2f} ms at the roofline" if name in bounds else ""
        print(f"{name:<40} {median(times[2:]):8.2f} ms {bound}", flush=True)


def main() -> None:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--tokens", type=int, default=98_304)
    given = parser.parse_args()
    if given.measure:
        measure(given.tokens)
    else:
        print(*lines(), sep="\n")


if __name__ == "__main__":
    main()
