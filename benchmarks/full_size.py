"""Export a SYNTHETIC model of full size to a byte target: bytes, passes, seconds, peak memory.

    python benchmarks/full_size.py RUN_FOLDER [TARGET_BYTES]

No such model was trained. The shapes are PRESET=pr1361's, 27 million parameters; the weights are
drawn: for each kind of matrix (the same one of all layers) rows get deviations of the log-normal
distribution, and entries Student's t of the kurtosis, that are fitted on the trained `mini` run in
RUN_FOLDER. Hessians are those of the synthetic model on real tokens of the built-in corpus. Its
bytes and its time say something; its score would not, and none is taken. QUANT_CLIP=std,
GPTQ_VARIANT=full, CODEC=zstd. Linux only, for the peaks.
"""

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from export import calibrated, load

import train_gpt
from train_gpt import GPT, Config, Run

TARGET, CALIBRATION_BATCHES = 10_000_000, 4
SETTINGS = {
    "PRESET": "pr1361",
    "QUANT_CLIP": "std",
    "GPTQ_VARIANT": "full",
    "DATA_PATH": "./data/datasets/docs_sp1024",
    "TRAIN_SEQ_LEN": "1024",
    "TOKENIZER_PATH": "./data/tokenizers/docs_1024_bpe.model",
    "GPTQ_CALIB_BATCHES": str(CALIBRATION_BATCHES),
}

seconds: Counter[str] = Counter()
peaks: Counter[str] = Counter()  # MiB resident, the most while a phase ran
calls: Counter[str] = Counter()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time and the peak of what runs inside; phases may not overlap."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peaks[name] = max(peaks[name], int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024)
    calls[name] += 1


def counted(name: str) -> None:
    """Make a function of train_gpt a phase."""
    function: Callable = getattr(train_gpt, name)

    def measured(*arguments: object) -> object:
        with phase(name):
            return function(*arguments)

    setattr(train_gpt, name, measured)


def kind(name: str) -> str:
    """A parameter's name without its layer."""
    return re.sub(r"\d+", "#", name)


def fitted(model: GPT) -> dict[str, tuple[float, float, float]]:
    """Mean and spread of the log deviations of rows, and degrees of freedom, by kind of matrix."""
    rows: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        if name.endswith(".weight"):
            rows.setdefault(kind(name), []).append(p.detach())
    found = {}
    for name, matrices in rows.items():
        W = torch.cat(matrices)
        deviation = W.std(dim=1, correction=0, keepdim=True).clamp_min(1e-6)
        excess = float((W / deviation).pow(4).mean()) - 3
        logs = deviation.log()
        found[name] = float(logs.mean()), float(logs.std()), 4 + 6 / max(excess, 0.01)
    return found


@torch.no_grad()
def draw(model: GPT, trained: GPT) -> None:
    """Synthetic weights for `model`: matrices as fitted, all else at the trained one's mean."""
    shapes, means = fitted(trained), {}
    for name, p in trained.named_parameters():
        means.setdefault(kind(name), []).append(float(p.mean()))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if kind(name) in shapes:
            center, spread, freedom = shapes[kind(name)]
            center -= 0.5 * math.log(model.cfg.model_dim / trained.cfg.model_dim)
            # t = z / sqrt(chi^2 / n), of variance n / (n - 2); chi^2 of n is twice gamma of n / 2.
            z = torch.randn(p.shape, generator=generator)
            chi = 2 * torch._standard_gamma(torch.full(p.shape, freedom / 2), generator=generator)
            t = z * torch.rsqrt(chi / freedom) * math.sqrt((freedom - 2) / freedom)
            rows = torch.exp(center + spread * torch.randn(p.size(0), 1, generator=generator))
            p.copy_(t * rows)
        else:
            values = means[kind(name)]
            p.fill_(sum(values) / len(values))


def main(folder: Path, target: int) -> None:
    trained = load(folder)[1]
    for name, (center, spread, freedom) in fitted(trained).items():
        print(
            f"fitted on {trained.cfg.preset}: {name:28} row deviation {math.exp(center):.4f}, "
            f"spread of its log {spread:.3f}, degrees of freedom {freedom:.1f}"
        )
    cfg = Config.from_env({**SETTINGS, "ARTIFACT_TARGET_BYTES": str(target)})[0]
    with phase("drawing"):
        model = GPT(cfg)
        draw(model, trained)
    count = sum(p.numel() for p in model.parameters())
    print(f"SYNTHETIC model: {count:,} parameters, {torch.get_num_threads()} threads", flush=True)
    with phase("calibrating"):
        hessians = calibrated(cfg, model, 0)
    model.cfg = cfg
    header = train_gpt.artifact_header(cfg, train_gpt.load_validation(cfg))
    for name in ("quantize", "encode_artifact", "solve_factor"):
        counted(name)
    run = Run(cfg, 0, 1, torch.device("cpu"))
    blob = train_gpt.fit_artifact(model, hessians, header, run)[1]
    total = len(run.folder.source) + len(blob)
    for name in seconds:
        print(f"{name}: {calls[name]} times, {seconds[name]:.1f} s, peak {peaks[name]:,} MiB")
    print(
        f"SYNTHETIC export: {total:,} bytes with code, {total / target:.3%} of {target:,}, in "
        f"{sum(seconds.values()):.0f} s"
    )
    if not 0.99 * target <= total <= target:
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else TARGET)
