"""What --plan says of a run: memory of a step traced on fake tensors, the rest from settings."""

import contextlib
import itertools
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

PEAK_FLOPS = 989e12  # of an H100 with dense bf16, a second
UTILISATION = 0.265  # of the peak, which the published 11-layer systems reach
TRACED_ROWS = 1009  # a prime: only what grows with the batch has a size that it divides

HEADER_BYTES = 1100.0
# By benchmarks/fit_plan.py: the rms of weights, in blocks divided by sqrt(width / row length), and
# in tables; bytes for a float; bytes for a byte of integers' entropy; the worst error of the sum.
FITTED = {"block": 0.206, "table": 0.501, "float": 1.68, "coded": 1.011, "error": 0.1}
RANGE_CODED = 1.002  # bytes over entropy under the range coder (records/NOTES.md), not fitted


def traced_step(
    cfg: train_gpt.Config, looping: bool = True
) -> tuple[train_gpt.GPT, dict[str, float]]:
    """The model on fake tensors, and for each token of an uncompiled step its FLOPs and bytes.

    FLOPs are those of matrix products and of attention, across whole rows, which ATTN_DOCS may
    spare. Bytes are those saved for the backward.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    saved: dict[int, torch.Tensor] = {}  # one tensor for each storage

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As a GPU's kernel does, without repeating the heads of k and v."""
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return flash(*heads_first, is_causal=True)[0].transpose(1, 2)

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.setdefault(x.untyped_storage()._cdata, x)
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, hooks:
        model = train_gpt.GPT(cfg, attend, torch.bfloat16)
        ids = torch.zeros(TRACED_ROWS, cfg.train_seq_len, dtype=torch.int64)
        nats, weights = model(train_gpt.Batch(ids, ids), looping=looping)
        (nats * weights).sum().backward()
    found = Counter[str]()
    for x in saved.values():
        size = x.untyped_storage().nbytes()
        is_wide = x.dtype == torch.float32
        is_logits = is_wide and size == 4 * ids.numel() * cfg.vocab_size
        if is_wide and "ToCopy" in str(x.grad_fn):
            size //= 2  # a GPU's norm keeps its bf16 input where a CPU's keeps a float32 copy
        if size % TRACED_ROWS == 0:
            found["logits" if is_logits else "saved activations"] += size
    # The kernel takes 2 products of T x T matrices forward and 5 backward, of which 1 repeats a
    # forward one. Work is what the causal half of the other 6 takes.
    forward = counter.flop_counts["Global"][flash]
    found["attention"] = 6 / 2 / 2 * forward
    found["counted"] = counter.get_total_flops()
    found["products"] = found["counted"] - 7 / 2 * forward
    return model, {kind: n / ids.numel() for kind, n in found.items()}


def artifact_bytes(
    model: train_gpt.GPT, parameters: dict, fit: dict = FITTED, factor: float = 1.0
) -> float:
    """The predicted size, if rows are Gaussian and integers are coded near their entropy.

    factor: what CLIP_SIGMAS is multiplied by.
    """
    cfg = model.cfg
    total = HEADER_BYTES
    coded = RANGE_CODED if cfg.codec == "range" else fit["coded"]
    for name, p in parameters.items():
        bits = train_gpt.bits_of(model, name)
        if bits == 0:
            total += fit["float"] * p.numel()
            continue
        # The clip and the step of a grid, in units of the weights' rms. A clip by CLIP_SEARCH lies
        # near the maximum of a row, but no lower than the floor of Q_SCALE_FLOOR.
        clip = -float(torch.special.ndtri(torch.tensor(0.28 / p.size(1))))  # the mean maximum
        floor = 0.0
        if cfg.clips_by_deviation:
            clip = max(clip, factor * train_gpt.setting_of(model, name, cfg.sigmas_by_role))
        elif bits == 8 or cfg.q_scale_floor == "inv_clip":
            rms = fit["table"]
            if "blocks" in name:
                rms = fit["block"] * (cfg.model_dim / p.size(1)) ** 0.5
            floor = 1.0 / rms
        top = train_gpt.largest_integer(bits)
        step = max(clip, floor) / top
        if cfg.clips_by_deviation:
            step /= (1 + step**2 / 12) ** 0.5  # GPTQ feeds errors back, which widens rows
        edges = torch.special.ndtr(step * torch.arange(0.5 - top, top, dtype=torch.float64))
        probs = edges.diff(prepend=torch.zeros(1), append=torch.ones(1))
        entropy = float(torch.special.entr(probs).sum()) / math.log(256)  # bytes an integer
        total += coded * p.numel() * entropy
        if clip > floor:  # scales at the floor are all alike and take no bytes
            total += fit["float"] * len(p)
    return total


def decay_left(scale: float, shape: str) -> float:
    """The fraction of the warmdown that is left when decay_scale() gives `scale`; its inverse."""
    if shape == "linear":
        return scale
    return math.acos(1.0 - 2.0 * scale) / math.pi


def turning_points(cfg: train_gpt.Config) -> Iterator[tuple[str, float]]:
    """Yield what changes as the rates decay, and the fraction of the warmdown left then."""
    scales = {f"warmdown ({cfg.warmdown_type})": 1.0}
    if cfg.qat_mode == "late":
        scales["late QAT"] = cfg.late_qat_threshold
    if "swa" in cfg.avg_mode:
        scales[f"SWA, every {cfg.swa_every} steps"] = cfg.swa_start_frac
    if cfg.mile_gamma:
        scales["MiLe: plain cross entropy"] = train_gpt.MILE_ENDS
    if cfg.min_lr:
        scales[f"rate floor of {cfg.min_lr:g}"] = cfg.min_lr
    for name, scale in scales.items():
        if scale:
            yield name, decay_left(scale, cfg.warmdown_type)


def dates(cfg: train_gpt.Config) -> Iterator[tuple[str, float]]:
    """Yield what changes at a fixed fraction of the run, and that fraction."""
    if cfg.muon_momentum_cooldown_frac:
        yield "momentum cool-down", 1.0 - cfg.muon_momentum_cooldown_frac
    if cfg.muon_slow_share:
        yield "slower momentum", cfg.muon_slow_start_frac
    if cfg.prefix_target:
        yield "prefix target: its fall", 1.0 / 3.0
        yield "prefix target: none", 2.0 / 3.0
    if cfg.attn_docs:
        for (share, _), (_, length) in itertools.pairwise(cfg.context_stages):
            yield f"documents of up to {length:,} tokens", share
    if cfg.num_loops:
        yield "depth loop", cfg.enable_looping_at


def schedule_dates(cfg: train_gpt.Config, schedule: train_gpt.Schedule) -> Iterator[str]:
    """When each scheduled thing starts, in the unit of the budget that ends the run."""
    unit = {"steps": "steps", "seconds": "s", "operations": "TFLOP"}[schedule.unit]
    scale = 1e12 if schedule.unit == "operations" else 1.0
    _, whole = schedule.remaining_and_whole(0, 0.0)
    if schedule.unit == "steps":
        yield f"end: {whole:g} steps"
    else:
        yield f"end: {whole / scale:g} {unit}, or {cfg.iterations:,} steps"
    yield f"momentum ramp: to {cfg.muon_momentum:g} in {cfg.muon_momentum_warmup_steps:,} steps"
    for name, share in dates(cfg):
        yield f"{name}: from {share * whole / scale:g} {unit} on"
    if cfg.step_driven or cfg.warmdown_frac:
        warmdown = schedule.warmdown(whole)
        for name, left in turning_points(cfg):
            yield f"{name}: from {(whole - left * warmdown) / scale:g} {unit} on"
    else:  # WARMDOWN_ITERS become seconds once the time of a step is known
        for name, left in turning_points(cfg):
            yield f"{name}: the last {left * cfg.warmdown_iters:,.0f} steps"


def counted_steps(schedule: train_gpt.Schedule) -> int:
    """The steps that a budget of operations holds, the cheaper ones before layers loop included."""
    cfg = schedule.cfg
    early = 0
    if cfg.num_loops:
        early = math.ceil(cfg.enable_looping_at * schedule.budget / schedule.early_operations)
    left = schedule.budget - early * schedule.early_operations
    return min(cfg.iterations, early + int(left // schedule.step_operations))


def counted_training(cfg: train_gpt.Config, model: train_gpt.GPT, reserve: int) -> str:
    """What training takes of MAX_TRAIN_TFLOPS, counted as a run counts it.

    reserve: the operations of calibration.
    """
    a_step = train_gpt.step_operations(model)
    early = train_gpt.step_operations(model, looping=False)
    muon = train_gpt.muon_operations(model)
    line = (
        f"work of training: {a_step / 1e12:.4g} TFLOP a step, {muon / 1e12:.4g} of it "
        f"orthogonalisation, and {reserve / 1e12:.4g} of calibration"
    )
    if cfg.max_train_tflops:
        steps = counted_steps(train_gpt.Schedule(cfg, reserve, 0, a_step, early))
        line += f"; {steps:,} steps of MAX_TRAIN_TFLOPS={cfg.max_train_tflops:g}"
    return line


def counted_scoring(cfg: train_gpt.Config, model: train_gpt.GPT) -> str:
    """The operations of scoring the validation split, or a million targets if it is not there."""
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
    line = f"work of scoring: {scoring / 1e12:.4g} TFLOP{of_what}"
    if cfg.ttt_mode == "score_first":
        full_chunks = (targets - 1) // cfg.ttt_chunk_tokens
        rows = cfg.ttt_epochs * full_chunks * -(-cfg.ttt_chunk_tokens // cfg.eval_seq_len)
        learning = train_gpt.adaptation_operations(model, rows)
        line += f", and {learning / 1e12:.4g} of adaptation"
    return line


class Plan:
    """What a run of these settings would do on H100s; lines() says it."""

    def __init__(self, cfg: train_gpt.Config, code_bytes: int) -> None:
        self.cfg = cfg
        self.code_bytes = code_bytes  # of the file that would run
        self.ranks = int(os.environ.get("WORLD_SIZE", 8))
        self.model, self.step = traced_step(cfg)
        self.parameters = dict(self.model.named_parameters())
        self.reserve = train_gpt.calibration_operations(
            self.model, train_gpt.calibration_tokens(cfg)
        )
        reserve = 0
        if cfg.max_train_tflops:
            train_gpt.refuse_small_budget(cfg)
            reserve = self.reserve
        operations = train_gpt.step_operations(self.model)
        early = train_gpt.step_operations(self.model, looping=False)
        self.schedule = train_gpt.Schedule(cfg, reserve, 0, operations, early)

    @property
    def rows_at_once(self) -> int:
        """Rows that a GPU takes in one forward."""
        cfg = self.cfg
        wanted = cfg.micro_batch_seqs or 98_304 // cfg.train_seq_len or 1
        return min(wanted, -(-cfg.rows_per_step // self.ranks))

    def work_of_token(self, looping: bool = True) -> int:
        """FLOPs of a token's forward and backward, of which the latter takes twice as many."""
        hidden = train_gpt.hidden_operations(self.model, self.cfg.train_seq_len, looping)
        return 3 * (hidden + train_gpt.head_operations(self.model))

    def seconds_of_step(self, looping: bool = True) -> float:
        """Seconds that a step takes if the GPUs reach UTILISATION of PEAK_FLOPS."""
        flops = self.work_of_token(looping) * self.cfg.train_batch_tokens
        return flops / (self.ranks * PEAK_FLOPS * UTILISATION)

    def num_steps(self) -> int:
        """How many steps the budget should hold."""
        cfg = self.cfg
        if cfg.max_train_tflops:
            return counted_steps(self.schedule)
        if cfg.step_driven:
            return cfg.iterations
        before = cfg.enable_looping_at if cfg.num_loops else 0.0
        steps_a_second = before / self.seconds_of_step(looping=False)
        steps_a_second += (1.0 - before) / self.seconds_of_step()
        return int(min(cfg.iterations, cfg.max_wallclock_seconds * steps_a_second))

    def sizes(self) -> Iterator[str]:
        """Lines on the parameters: how many there are, how they learn, how they are stored."""
        yield f"parameters: {sum(p.numel() for p in self.parameters.values()):,}"
        yield from train_gpt.routing_table(self.cfg, self.model)
        widths = Counter[int]()
        for name, parameter in self.parameters.items():
            widths[train_gpt.bits_of(self.model, name)] += parameter.numel()
        stored = []
        for bits, number in sorted(widths.items()):
            kind = f"int{bits}" if bits else "fp16"
            stored.append(f"{number:,} at {kind}")
        yield "stored as: " + ", ".join(stored)

    def work(self) -> Iterator[str]:
        """Lines on a step, what it takes and how long, and on what scoring takes."""
        cfg = self.cfg
        tokens = cfg.train_batch_tokens
        yield (
            f"a step: {tokens:,} tokens, {cfg.rows_per_step:,} rows of {cfg.train_seq_len:,}, "
            f"{self.rows_at_once} at once a GPU"
        )
        a_layer = train_gpt.attention_operations(self.model, cfg.train_seq_len)
        attention = 3 * len(self.model.plan) * a_layer
        work = self.work_of_token()
        yield (
            f"FLOPs: {work / 1e6:.1f} M a token (published for 11 layers at T=2048: 228 M), "
            f"{attention / 1e6:.1f} M of it causal attention, {work * tokens / 1e12:.4g} T a step"
        )
        yield counted_training(cfg, self.model, self.reserve)
        yield counted_scoring(cfg, self.model)
        steps = self.num_steps()
        yield (
            f"speed, stated: {self.ranks} H100 at {UTILISATION:.1%} of {PEAK_FLOPS / 1e12:g} "
            f"TFLOP/s, {1e3 * self.seconds_of_step():.4g} ms a step, {steps:,} steps, "
            f"{steps * tokens / 1e9:.3g} B tokens"
        )
        if cfg.num_loops:
            before = 1e3 * self.seconds_of_step(looping=False)
            yield f"before the loop begins: {before:.4g} ms a step"

    def optimizer_numbers(self) -> tuple[int, int]:
        """Parameters that AdamW has on a GPU, and that Muon has, whose stacks ranks may split."""
        adam = 0
        stacks = Counter[tuple[str, torch.Size]]()
        for group in train_gpt.route_parameters(self.cfg, self.model):
            for parameter in group["params"]:
                if group["optimizer"] == "adam":
                    adam += parameter.numel()
                else:
                    stacks[group["route"], parameter.shape] += 1
        owners = self.ranks if self.cfg.muon_parallel else 1
        muon = 0
        for (_, shape), number in stacks.items():
            muon += -(-number // owners) * shape.numel()
        return adam, muon

    def memory(self) -> Iterator[str]:
        """Lines on what a GPU holds and what it sends."""
        cfg = self.cfg
        count = sum(parameter.numel() for parameter in self.parameters.values())
        adam, muon = self.optimizer_numbers()
        momenta = muon * (2 if cfg.muon_slow_share else 1)
        averages = [name for name in ("ema", "swa") if name in cfg.avg_mode]
        held = {
            "parameters": 4 * count,
            "gradients": 4 * count,
            "optimizer": 8 * adam + momenta * (1 + 2 / 256 if cfg.muon_quant_momentum else 4),
            "averages": 4 * count * len(averages),
        }
        for kind in ("saved activations", "logits"):
            held[kind] = self.step[kind] * self.rows_at_once * cfg.train_seq_len
        parts = ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in held.items())
        whole = sum(held.values()) / 2**20
        yield (
            f"memory a GPU, MiB: {parts}, in all {whole:,.0f} "
            "(published, compiled: 18,873 to 23,629)"
        )
        others = self.ranks - 1 if cfg.muon_parallel else 0
        everywhere = adam if cfg.muon_parallel else adam + muon
        reduced = 8 * everywhere * (self.ranks - 1) // self.ranks
        yield (
            f"a rank sends, a step: {4 * muon * others:,} bytes reduce-scattered, "
            f"{2 * muon * others:,} gathered, {reduced:,} all-reduced"
        )

    def artifact(self) -> Iterator[str]:
        """Lines on the predicted size, and on whether the artifact could fit at all."""
        cfg = self.cfg
        limit = cfg.artifact_limit_bytes
        size = artifact_bytes(self.model, self.parameters)
        left = limit - size - self.code_bytes
        yield (
            f"artifact, predicted: {size:,.0f} +- {size * FITTED['error']:,.0f} bytes, and code "
            f"{self.code_bytes:,}, of {limit:,}; {left:,.0f} left"
        )
        coarsest = 2.0 ** train_gpt.SOLVER_OCTAVES[1]
        least = artifact_bytes(self.model, self.parameters, factor=coarsest)
        least = (1 - FITTED["error"]) * least + self.code_bytes
        target = cfg.artifact_target_bytes or limit
        warning = "warning: " if least > target else ""
        yield f"{warning}no clips leave less than {least:,.0f}, of {target:,}"

    def lines(self) -> Iterator[str]:
        """Everything that --plan prints."""
        yield from self.sizes()
        yield from self.work()
        yield from self.memory()
        yield from self.artifact()
        yield from schedule_dates(self.cfg, self.schedule)
        reasons = "; ".join(train_gpt.ineligible_settings(self.cfg))
        verdict = f"no: {reasons}" if reasons else "yes, in time on 8 x H100"
        yield f"eligible as a record: {verdict}"


def lines(cfg: train_gpt.Config, code_bytes: int) -> Iterator[str]:
    """Everything that --plan prints; `code_bytes` is the size of the file that would run."""
    return Plan(cfg, code_bytes).lines()


if __name__ == "__main__":
    try:
        settings, _ = train_gpt.Config.from_env(dict(os.environ))
        print(*lines(settings, Path(train_gpt.__file__).stat().st_size), sep="\n")
    except train_gpt.Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
