"""What the measuring scripts share: a configuration's run, medians, the machine and its sgemm rate.

`Bench("P")` is benchmarks/config_p.env, "NAME=value ..." those settings, any other name a PRESET. A
warm model, its rows and optimizers are ready to be timed; nothing is written to runs/.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t

CPU = torch.device("cpu")


def settings(name: str) -> dict[str, str]:
    """The environment of configuration P, of NAME=value pairs, or of a preset by its name."""
    if "=" in name:
        return dict(pair.split("=", 1) for pair in name.split())
    if name != "P":
        return {"PRESET": name}
    lines = Path(__file__).with_name("config_p.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


class Bench:
    """One process's run of a configuration, at its initial weights."""

    def __init__(self, name: str, *changes: str, device: torch.device = CPU) -> None:
        self.name = name
        self.cfg, _ = t.Config.from_env(
            settings(name) | dict(change.split("=", 1) for change in changes)
        )
        self.rows, self.run = t.TrainingRows(self.cfg), t.Run(self.cfg, 0, 1, device)
        self.attention = t.pick_attention(self.cfg, self.run.ranks)
        self.model = t.GPT(self.cfg, self.attention.kernel, self.run.dtype)
        t.initialize(self.model, self.cfg)
        self.model.to(device)
        self.forward = t.make_forward(self.run)
        self.moment = t.Moment(lr_scale=1.0, momentum=0.9, qat=False, done=False)
        t.pick_products(self.forward, self.model, self.rows, self.moment, self.run)
        groups = t.route_parameters(self.cfg, self.model)
        self.optimizers = t.build_optimizers(
            self.cfg, groups, self.run.product_dtype, self.run.ranks
        )
        t.compile_blocks(self.forward, self.model, self.rows, [self.moment], self.run)

    def step(self, number: int, moment: t.Moment | None = None) -> torch.Tensor:
        """The numbered training step; returns what train_step returns."""
        now = moment or self.moment
        return t.train_step(
            self.forward, self.model, self.optimizers, self.rows, number, now, self.run
        )


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sgemm(rows: int = 2048, inner: int = 512, cols: int = 2048) -> Callable[[], float]:
    """A measurement of float32 products by torch: each call returns GFLOP/s of one product."""
    a, b = torch.randn(rows, inner), torch.randn(inner, cols)
    out = torch.empty(rows, cols)
    return lambda: 2e-9 * rows * inner * cols / seconds(lambda: torch.mm(a, b, out=out))


def flops(model: t.GPT, seq_len: int) -> dict[str, float]:
    """Forward FLOPs a token by part: products of the blocks, causal half of attention, head."""
    cfg = model.cfg
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2 and len(p) > 2)
    return {
        "blocks": 2.0 * weights,
        "attention": 2.0 * seq_len * cfg.model_dim * cfg.num_layers,
        "head": 2.0 * cfg.model_dim * cfg.vocab_size,
    }


def shortened(val: t.Validation, targets: int) -> t.Validation:
    """The first targets of a split."""
    return replace(val, tokens=val.tokens[: targets + 1], target_bytes=val.target_bytes[:targets])


def alternate(
    work: Callable[[], object], rate: Callable[[], float], times: int
) -> tuple[float, float]:
    """Median seconds of `work`, and median GFLOP/s of an sgemm before each call of it."""
    work()
    rate()
    pairs = [(rate(), seconds(work)) for _ in range(times)]
    return median(s for _, s in pairs), median(r for r, _ in pairs)


def arguments(doc: str, **options: dict) -> argparse.Namespace:
    """A script's command line: a configuration, --json FILE, and more options by name."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configuration", nargs="?", default="P", help="P, or presets by name")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    for name, how in options.items():
        parser.add_argument(f"--{name}", **how)
    return parser.parse_args()


def table(header: tuple[str, ...], rows: list[tuple]) -> None:
    """Print rows under a header, numbers with as many digits as they need."""
    cells = [
        [f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row] for row in (header, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        print(
            first.ljust(widths[0]),
            *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True)),
            sep="  ",
        )


def finish(facts: dict[str, object], file: str | None) -> None:
    """Print all facts as one line of JSON, after the machine's name, and write them to `file`."""
    print(f"machine: {machine()}")
    text = json.dumps({"machine": machine(), **facts})
    print(text)
    if file:
        Path(file).write_text(text + "\n")


def machine() -> str:
    """Processor, threads and the instruction sets that torch takes."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else [platform.processor()]
    )
    return (
        f"{names[0]}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )


def report(rows: list[tuple[str, float]], facts: dict[str, object]) -> None:
    """Print (part, milliseconds) rows with shares of the first, the facts, and all as one JSON."""
    for part, ms in rows:
        print(f"{part:<28} {ms:9.2f} ms {100 * ms / rows[0][1]:6.1f} %")
    for name, value in facts.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps({"ms": dict(rows), **facts}))


median = statistics.median
