"""What --plan says of a run: one step traced on fake tensors, the rest counted from settings."""

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

PEAK_FLOPS, UTILISATION = 989e12, 0.265  # an H100's dense bf16; what the 11-layer systems reach
TRACED_ROWS = 1009  # a prime, so that only what grows with the batch is a multiple of it in size
# By benchmarks/fit_plan.py: rms (in blocks by sqrt(width / row length)), coded bytes, worst error.
FITTED = {"block": 0.206, "table": 0.501, "float": 1.68, "coded": 1.011, "error": 0.1}


def traced_step(
    cfg: train_gpt.Config, looping: bool = True
) -> tuple[train_gpt.GPT, dict[str, float]]:
    """The model on fake tensors, and a token's FLOPs and bytes saved for backward, uncompiled.

    Attention is counted across whole rows, which ATTN_DOCS may spare.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    saved, found = dict[int, torch.Tensor](), Counter[str]()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: (saved.setdefault(x.untyped_storage()._cdata, x), x), lambda both: both[1]
    )
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, hooks:
        model = train_gpt.GPT(
            cfg,
            lambda *qkv: flash(  # as a GPU's, it repeats no head
                *(x.transpose(1, 2) for x in qkv), is_causal=True
            )[0].transpose(1, 2),
            torch.bfloat16,
        )
        ids = torch.zeros(TRACED_ROWS, cfg.train_seq_len, dtype=torch.int64)
        torch.mul(*model(train_gpt.Batch(ids, ids), looping=looping)).sum().backward()
    for x in saved.values():
        size, wide = x.untyped_storage().nbytes(), x.dtype == torch.float32
        logits = wide and size == 4 * ids.numel() * cfg.vocab_size
        # A GPU's norm keeps its bf16 input where a CPU's keeps a float32 copy.
        size = size // 2 if wide and "ToCopy" in str(x.grad_fn) else size
        found["logits" if logits else "saved activations"] += size * (size % TRACED_ROWS == 0)
    found["counted"], forward = counter.get_total_flops(), counter.flop_counts["Global"][flash]
    # Of the squares' 2 products forward and 5 backward, 1 repeated, the causal half of 6 is work.
    found["attention"], found["products"] = 1.5 * forward, found["counted"] - 3.5 * forward
    return model, {kind: n / ids.numel() for kind, n in found.items()}


def artifact_bytes(
    model: train_gpt.GPT, parameters: dict, fit: dict = FITTED, by: float = 1
) -> float:
    """Predicted size, CLIP_SIGMAS times `by`: Gaussian rows on grids, coded near their entropy."""
    cfg = model.cfg
    total, std = 1100.0, cfg.quant_clip == "std"  # the header
    for name, p in parameters.items():
        if not (bits := train_gpt.bits_of(model, name)):
            total += fit["float"] * p.numel()
            continue
        block = "blocks" in name and fit["block"] * (cfg.model_dim / p.size(1)) ** 0.5
        mean_maximum = -float(torch.special.ndtri(torch.tensor(0.28 / p.size(1))))  # in rms
        clip = max(mean_maximum, std * by * train_gpt.setting_of(model, name, cfg.sigmas_by_role))
        floor = (bits == 8 or cfg.q_scale_floor == "inv_clip") / (block or fit["table"]) * (not std)
        step = max(clip, floor) / (top := train_gpt.largest_integer(bits))
        step /= (1 + std * step**2 / 12) ** 0.5  # GPTQ feeds errors back, which widens rows
        edges = torch.special.ndtr(step * torch.arange(0.5 - top, top, dtype=torch.float64))
        shares = edges.diff(prepend=torch.zeros(1), append=torch.ones(1))
        entropy = float(torch.special.entr(shares).sum()) / math.log(256)  # bytes an integer
        scales = len(p) * (clip > floor)  # those at the floor are all alike and take no bytes
        total += fit["coded"] * p.numel() * entropy + fit["float"] * scales
    return total


def schedule_dates(cfg: train_gpt.Config) -> Iterator[str]:
    """When each scheduled thing starts, in the unit that drives the run, or before its end."""
    ramp = f"momentum ramp: to {cfg.muon_momentum:g} in {cfg.muon_momentum_warmup_steps:,} steps"
    schedule = train_gpt.Schedule(cfg)
    if cfg.step_driven:
        unit, whole = "steps", float(cfg.iterations)
        yield f"end: {whole:g} steps"
    else:
        unit, whole = "s", schedule.budget
        yield f"end: {whole:g} s, or {cfg.iterations:,} steps"
    yield ramp
    if cfg.num_loops:
        yield f"depth loop: from {cfg.enable_looping_at * whole:g} {unit} on"
    if cfg.step_driven or cfg.warmdown_frac:
        _, warmdown = schedule.remaining_and_warmdown(0, 0.0)
        for name, left in schedule.turning_points():
            yield f"{name}: from {whole - left * warmdown:g} {unit} on"
    else:  # WARMDOWN_ITERS become seconds once the time of a step is known
        for name, left in schedule.turning_points():
            yield f"{name}: the last {left * cfg.warmdown_iters:,.0f} steps"


def work_before_looping(cfg: train_gpt.Config) -> float:
    """FLOPs a token as long as no layer is executed again."""
    _, step = traced_step(cfg, looping=False)
    return step["products"] + step["attention"]


def steps_in_budget(cfg: train_gpt.Config, seconds: float, seconds_before: float) -> int:
    """Steps of a run, of which one takes `seconds`, and `seconds_before` before loops begin."""
    share = cfg.enable_looping_at if cfg.num_loops else 0.0
    whole = cfg.max_wallclock_seconds * (share / seconds_before + (1.0 - share) / seconds)
    return int(min(cfg.iterations, whole or math.inf))


def lines(cfg: train_gpt.Config, code_bytes: int) -> Iterator[str]:
    """Everything that --plan prints; `code_bytes` is the size of the file that would run."""
    (model, step), widths = traced_step(cfg), Counter[int]()
    ranks = int(os.environ.get("WORLD_SIZE", 8))
    parameters, groups = dict(model.named_parameters()), train_gpt.route_parameters(cfg, model)
    for name, p in parameters.items():
        widths[train_gpt.bits_of(model, name)] += p.numel()
    adam = sum(p.numel() for g in groups if g["optimizer"] == "adam" for p in g["params"])
    stacks = Counter(
        (g["route"], p.shape) for g in groups if g["optimizer"] == "muon" for p in g["params"]
    )
    sharers = ranks if cfg.muon_parallel else 1
    muon = sum(-(-n // sharers) * shape.numel() for (_, shape), n in stacks.items())  # a rank's
    everywhere = adam if cfg.muon_parallel else adam + muon  # all-reduced
    tokens, row, attention = cfg.train_batch_tokens, cfg.train_seq_len, step["attention"]
    work = step["products"] + attention
    rows = min(cfg.micro_batch_seqs or 98_304 // row or 1, -(-cfg.rows_per_step // ranks))
    seconds, seconds_before = (
        n * tokens / (ranks * PEAK_FLOPS * UTILISATION) for n in (work, work_before_looping(cfg))
    )
    steps = steps_in_budget(cfg, seconds, seconds_before)
    count, limit, end = widths.total(), cfg.artifact_limit_bytes, train_gpt.SOLVER_OCTAVES[1]
    size, least = (artifact_bytes(model, parameters, by=2.0**octaves) for octaves in (0, end))
    least, target = (1 - FITTED["error"]) * least + code_bytes, cfg.artifact_target_bytes or limit
    memory = {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * adam + muon * (1 + 2 / 256 if cfg.muon_quant_momentum else 4),
        "averages": 4 * count * (("ema" in cfg.avg_mode) + ("swa" in cfg.avg_mode)),
        **{kind: step[kind] * rows * row for kind in ("saved activations", "logits")},
    }
    yield f"parameters: {count:,}"
    yield from train_gpt.routing_table(cfg, model)
    yield "stored as: " + ", ".join(
        f"{n:,} at {f'int{bits}' if bits else 'fp16'}" for bits, n in sorted(widths.items())
    )
    yield f"a step: {tokens:,} tokens, {cfg.rows_per_step:,} rows of {row:,}, {rows} at once a GPU"
    yield (
        f"FLOPs: {work / 1e6:.1f} M a token (published for 11 layers at T=2048: 228 M), "
        f"{attention / 1e6:.1f} M of it causal attention, {work * tokens / 1e12:.4g} T a step"
    )
    yield (
        f"speed, stated: {ranks} H100 at {UTILISATION:.1%} of {PEAK_FLOPS / 1e12:g} TFLOP/s, "
        f"{1e3 * seconds:.4g} ms a step, {steps:,} steps, {steps * tokens / 1e9:.3g} B tokens"
    )
    if cfg.num_loops:
        yield f"before looping: {1e3 * seconds_before:.4g} ms a step"
    yield (
        "memory a GPU, MiB: "
        + ", ".join(f"{k} {n / 2**20:,.0f}" for k, n in memory.items())
        + f", in all {sum(memory.values()) / 2**20:,.0f} (published, compiled: 18,873 to 23,629)"
    )
    yield (
        f"a rank sends, a step: {4 * muon * (sharers - 1):,} bytes reduce-scattered, "
        f"{2 * muon * (sharers - 1):,} gathered, "
        f"{8 * everywhere * (ranks - 1) // ranks:,} all-reduced"
    )
    yield (
        f"artifact, predicted: {size:,.0f} +- {size * FITTED['error']:,.0f} bytes, and code "
        f"{code_bytes:,}, of {limit:,}; {limit - size - code_bytes:,.0f} left"
    )
    yield f"{'warning: ' * (least > target)}no clips leave less than {least:,.0f}, of {target:,}"
    yield from schedule_dates(cfg)
    reasons = "; ".join(train_gpt.static_ineligibility(cfg))
    yield f"eligible as a record: {f'no: {reasons}' if reasons else 'yes, in time on 8 x H100'}"


if __name__ == "__main__":
    try:
        settings, _ = train_gpt.Config.from_env(dict(os.environ))
        print(*lines(settings, Path(train_gpt.__file__).stat().st_size), sep="\n")
    except train_gpt.Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
