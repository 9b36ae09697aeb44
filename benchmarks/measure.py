"""What the measuring scripts share: a configuration's run, medians, the machine and its sgemm rate.

`Bench("P")` is benchmarks/config_p.env, any other name a PRESET. A warm model, its rows and
optimizers are ready to be timed; nothing is written to runs/.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t


def settings(name: str) -> dict[str, str]:
    """The environment of configuration P, or of a preset by its name."""
    if name != "P":
        return {"PRESET": name}
    lines = Path(__file__).with_name("config_p.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


class Bench:
    """One process's run of a configuration, at its initial weights."""

    def __init__(self, name: str, *changes: str) -> None:
        self.name = name
        self.cfg, _ = t.Config.from_env(
            settings(name) | dict(change.split("=", 1) for change in changes))
        self.rows, self.run = t.TrainingRows(self.cfg), t.Run(self.cfg, 0, 1, torch.device("cpu"))
        self.model = t.GPT(self.cfg, t.pick_attention(self.cfg, self.run.device)[1])
        t.initialize(self.model, self.cfg)
        groups = t.route_parameters(self.cfg, self.model)
        self.optimizers = t.build_optimizers(self.cfg, groups, torch.float32, self.run)
        self.moment = t.Moment(lr_scale=1.0, momentum=0.9, qat=False, done=False)
        t.compile_blocks(t.training_nats, self.model, self.rows, [self.moment], self.run)

    def step(self, number: int) -> torch.Tensor:
        """The numbered training step; returns what train_step returns."""
        return t.train_step(t.training_nats, self.model, self.optimizers, self.rows, number,
                            self.moment, self.run)


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


def machine() -> str:
    """Processor, threads and the instruction sets that torch takes."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else [platform.processor()]
    return (f"{names[0]}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")


def report(rows: list[tuple[str, float]], facts: dict[str, object]) -> None:
    """Print (part, milliseconds) rows with shares of the first, the facts, and all as one JSON."""
    for part, ms in rows:
        print(f"{part:<28} {ms:9.2f} ms {100 * ms / rows[0][1]:6.1f} %")
    for name, value in facts.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps({"ms": dict(rows), **facts}))


median = statistics.median
