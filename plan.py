"""What --plan says of a run: one step traced on fake tensors, the rest counted from settings."""

import contextlib
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
    total, std = 1100.0, cfg.clips_by_deviation  # the header
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


def schedule_dates(cfg: train_gpt.Config, schedule: train_gpt.Schedule) -> Iterator[str]:
    """When each scheduled thing starts, in the unit that drives the run, or before its end."""
    unit = {"steps": "steps", "seconds": "s", "operations": "TFLOP"}[schedule.unit]
    scale = 1e12 if schedule.unit == "operations" else 1.0
    _, whole = schedule.remaining_and_whole(0, 0.0)
    if schedule.unit == "steps":
        yield f"end: {whole:g} steps"
    else:
        yield f"end: {whole / scale:g} {unit}, or {cfg.iterations:,} steps"
    yield f"momentum ramp: to {cfg.muon_momentum:g} in {cfg.muon_momentum_warmup_steps:,} steps"
    for name, share in schedule.dates():
        yield f"{name}: from {share * whole / scale:g} {unit} on"
    if cfg.num_loops:
        yield f"depth loop: from {cfg.enable_looping_at * whole / scale:g} {unit} on"
    if cfg.step_driven or cfg.warmdown_frac:
        warmdown = schedule.warmdown(whole)
        for name, left in schedule.turning_points():
            yield f"{name}: from {(whole - left * warmdown) / scale:g} {unit} on"
    else:  # WARMDOWN_ITERS become seconds once the time of a step is known
        for name, left in schedule.turning_points():
            yield f"{name}: the last {left * cfg.warmdown_iters:,.0f} steps"


def counted_steps(schedule: train_gpt.Schedule) -> int:
    """The steps that a budget of operations holds, those before layers loop among them."""
    cfg = schedule.cfg
    early = 0
    if cfg.num_loops:
        early = math.ceil(cfg.enable_looping_at * schedule.budget / schedule.early_operations)
    left = schedule.budget - early * schedule.early_operations
    return min(cfg.iterations, early + int(left // schedule.step_operations))


def counted_training(cfg: train_gpt.Config, model: train_gpt.GPT, reserve: int) -> str:
    """What training takes of MAX_TRAIN_TFLOPS, counted as a run counts it."""
    a_step = train_gpt.step_operations(model)
    early = train_gpt.step_operations(model, looping=False)
    muon = train_gpt.muon_operations(model)
    said = (
        f"work of training: {a_step / 1e12:.4g} TFLOP a step, {muon / 1e12:.4g} of it "
        f"orthogonalisation, and {reserve / 1e12:.4g} of calibration"
    )
    if cfg.max_train_tflops:
        steps = counted_steps(train_gpt.Schedule(cfg, reserve, 0, a_step, early))
        said += f"; {steps:,} steps of MAX_TRAIN_TFLOPS={cfg.max_train_tflops:g}"
    return said


def counted_scoring(cfg: train_gpt.Config, model: train_gpt.GPT) -> str:
    """The operations of scoring the validation split, or without it of a million targets."""
    targets = 1_000_000
    of_what = " for each million targets"
    with contextlib.suppress(train_gpt.Refusal):
        targets = train_gpt.read_sidecar(cfg.data_path)["tokens"] - 1
        of_what = ""
    if cfg.eval_truncate:
        targets -= targets % cfg.eval_seq_len
    spans = train_gpt.windows(targets, cfg.eval_seq_len, cfg.eval_stride)
    width = cfg.eval_stride or cfg.eval_seq_len
    scoring = train_gpt.scoring_operations(model, spans, width, all_places=cfg.counts == "off")
    said = f"work of scoring: {scoring / 1e12:.4g} TFLOP{of_what}"
    if cfg.ttt_mode == "score_first":
        full_chunks = (targets - 1) // cfg.ttt_chunk_tokens
        rows = cfg.ttt_epochs * full_chunks * -(-cfg.ttt_chunk_tokens // cfg.eval_seq_len)
        learning = train_gpt.adaptation_operations(model, rows)
        said += f", and {learning / 1e12:.4g} of adaptation"
    return said


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
    momenta = muon * (2 if cfg.muon_slow_share else 1)
    everywhere = adam if cfg.muon_parallel else adam + muon  # all-reduced
    tokens, row = cfg.train_batch_tokens, cfg.train_seq_len
    attention = 3 * len(model.plan) * train_gpt.attention_operations(model, row)
    work = 3 * (train_gpt.hidden_operations(model, row) + train_gpt.head_operations(model))
    calibration = train_gpt.calibration_tokens(cfg)
    reserve = train_gpt.calibration_operations(model, calibration)
    operations = [train_gpt.step_operations(model, looping) for looping in (True, False)]
    schedule = train_gpt.Schedule(cfg, 0.0, 0, *operations)
    if cfg.max_train_tflops:
        train_gpt.refuse_small_budget(cfg)
        schedule = train_gpt.Schedule(cfg, reserve, 0, *operations)
    rows = min(cfg.micro_batch_seqs or 98_304 // row or 1, -(-cfg.rows_per_step // ranks))
    seconds = work * tokens / (ranks * PEAK_FLOPS * UTILISATION)
    steps = int(min(cfg.iterations, cfg.max_wallclock_seconds / seconds or math.inf))
    if cfg.max_train_tflops:
        steps = counted_steps(schedule)
    count, limit, end = widths.total(), cfg.artifact_limit_bytes, train_gpt.SOLVER_OCTAVES[1]
    size, least = (artifact_bytes(model, parameters, by=2.0**octaves) for octaves in (0, end))
    least, target = (1 - FITTED["error"]) * least + code_bytes, cfg.artifact_target_bytes or limit
    memory = {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * adam + momenta * (1 + 2 / 256 if cfg.muon_quant_momentum else 4),
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
    yield counted_training(cfg, model, reserve)
    yield counted_scoring(cfg, model)
    yield (
        f"speed, stated: {ranks} H100 at {UTILISATION:.1%} of {PEAK_FLOPS / 1e12:g} TFLOP/s, "
        f"{1e3 * seconds:.4g} ms a step, {steps:,} steps, {steps * tokens / 1e9:.3g} B tokens"
    )
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
    yield from schedule_dates(cfg, schedule)
    reasons = "; ".join(train_gpt.static_ineligibility(cfg))
    yield f"eligible as a record: {f'no: {reasons}' if reasons else 'yes, in time on 8 x H100'}"


if __name__ == "__main__":
    try:
        settings, _ = train_gpt.Config.from_env(dict(os.environ))
        print(*lines(settings, Path(train_gpt.__file__).stat().st_size), sep="\n")
    except train_gpt.Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
