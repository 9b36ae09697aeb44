"""The path that a GPU takes, at full size, where there is none.

Nothing is computed: fake tensors have a type, a shape and a device only. Without a GPU they have
no backward on `cuda`. So a step's types are checked on fake CPU tensors, its devices on `meta`, and
all but its backward on fake CUDA tensors, as is scoring. Where there is a GPU, the same tests run
on it too, with fewer rows.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt
from train_gpt import (
    BOS,
    GPT,
    KERNELS,
    MLP,
    PRESETS,
    Adapter,
    Averages,
    Batch,
    ChosenAttention,
    Config,
    Moment,
    Ranks,
    Refusal,
    Run,
    Validation,
    build_optimizers,
    collect_hessians,
    log_work,
    orthogonalize,
    pick_attention,
    route_parameters,
    sample_rows,
    score_windows,
    sdpa_attention,
    seconds_of_kernels,
    train_step,
    training_nats,
    windows,
)

BF16, FP32 = torch.bfloat16, torch.float32
SYSTEMS = {"defaults": {}, **{name: PRESETS[name] for name in PRESETS if name.startswith("pr")}}
SMALL = {"num_layers": 2, "xsa_last_n": 2, "ve_layers": "1", "train_batch_tokens": 4096 * 8}
GPUS, TOKENS_ON_A_REAL_GPU = 8, 8192

NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, NO_DEVICE])
clip_grad_norm_ = torch.nn.utils.clip_grad_norm_


@pytest.fixture(autouse=True)
def forget_kernels() -> Iterator[None]:
    """No kernel that stood in here is picked again."""
    yield
    train_gpt.find_attention.cache_clear()


class Indexing(TorchFunctionMode):
    """x[...] for fake CUDA tensors: in a CPU build torch's own asks for a guard of the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        x, keys = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        dim = 0
        for place, key in enumerate(keys):
            if isinstance(key, int):
                x = x.select(dim, key)
                continue
            if key is None:
                x = x.unsqueeze(dim)
            elif isinstance(key, slice):
                x = torch.ops.aten.slice(x, dim, key.start, key.stop, key.step or 1)
            elif key is Ellipsis:  # only slices come after it, each of one dimension
                dim = x.dim() - (len(keys) - 1 - place)
                continue
            else:
                raise NotImplementedError(f"index {key}")
            dim += 1
        return x


def few_boundaries(documents: Tensor) -> Tensor:
    """As document_boundaries() of fewer than 64 documents, but for the numbers."""
    return torch.zeros(64, dtype=torch.int32, device=documents.device)


@contextlib.contextmanager
def at(where: str) -> Iterator[torch.device]:
    """The device that `where` ends with; all tensors made inside are fake where it begins so."""
    with contextlib.ExitStack() as stack:
        if where.startswith("fake"):
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if where != "cuda":  # it reads a bound that is a tensor, and there is nothing to read
            stack.enter_context(mock.patch("torch.nn.utils.clip_grad_norm_"))
        if where == "fake cuda":
            stack.enter_context(
                Indexing() if torch.version.cuda is None else contextlib.nullcontext()
            )
            for owner, name in ((torch.Tensor, "pin_memory"), (torch.cuda, "synchronize")):
                stack.enter_context(mock.patch.object(owner, name, lambda x=None: x))
            # How many documents there are depends on ids, of which a fake tensor has none.
            stack.enter_context(mock.patch("train_gpt.document_boundaries", few_boundaries))
        if where == "meta":  # the fused update has a form for it that its check does not know
            stack.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused"))
        yield torch.device(where.split()[-1] + (":0" if where.endswith("cuda") else ""))


def share_of(system: str, where: str, **changed) -> Config:
    """A system's settings, with one step of one GPU of eight as the whole step."""
    cfg = Config(**{**SYSTEMS[system], **changed})
    tokens = TOKENS_ON_A_REAL_GPU if where == "cuda" else cfg.train_batch_tokens // GPUS
    return replace(cfg, train_batch_tokens=tokens, micro_batch_seqs=tokens // cfg.train_seq_len)


def build(
    cfg: Config, device: torch.device, kernel: Callable = sdpa_attention, trainable: bool = True
) -> GPT:
    """The model as a GPU has it: float32 weights, bfloat16 activations."""
    model = GPT(cfg, kernel, BF16)
    for module in model.modules():  # Module.to() does not move fake tensors
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(p.detach().to(device), trainable))
    return model


class Rows:
    """Training rows of random ids, made beforehand on the host as the loader makes them."""

    def __init__(self, cfg: Config) -> None:
        shape = cfg.micro_batch_seqs, cfg.train_seq_len + 1
        ids = torch.from_numpy(np.random.default_rng(0).integers(BOS, cfg.vocab_size, shape))
        self.ids, self.targets = ids[:, :-1], ids[:, 1:]

    def batch(self, first_row: int, num_rows: int, longest_document: int | None = None) -> Batch:
        assert num_rows == len(self.ids)
        return Batch(self.ids, self.targets)


def make_validation(num_tokens: int, vocab_size: int) -> Validation:
    tokens = np.random.default_rng(1).integers(BOS, vocab_size, num_tokens).astype(np.uint16)
    return Validation(tokens, np.ones(num_tokens - 1, np.int16), "", "", 1, num_tokens)


def step(
    model: GPT, optimizers: list, rows: Rows, run: Run, qat: bool, forward: Callable = training_nats
) -> Tensor:
    moment = Moment(1.0, run.cfg.muon_momentum, qat, False, run.cfg.mile_gamma)
    return train_step(forward, model, optimizers, rows, 0, moment, run)


def optimizers_of(model: GPT) -> list:
    return build_optimizers(model.cfg, route_parameters(model.cfg, model), BF16)


# Types and shapes


class Types(TorchFunctionMode):
    """Counts what torch calls return inside a block, and names what is not in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.count, self.leaks = False, 0, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.inside:
            made = [x.dtype for x in tree_leaves(result) if is_real(x)]
            self.count += len(made)
            self.leaks += [f"{function.__name__}: {dtype}" for dtype in made if dtype != BF16]
        return result


def is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def kind(x: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return x.dtype, tuple(x.shape)


class Notes(defaultdict):
    """Types and shapes by the name of a stage, each of them once."""

    def __init__(self) -> None:
        super().__init__(set)

    def of(self, stage: str, function: Callable) -> Callable:
        """The function, its results noted under `stage`."""

        def noted(*args, **named):
            result = function(*args, **named)
            self[stage] |= {kind(x) for x in tree_leaves(result)}
            return result

        return noted


def note_blocks(model: GPT, notes: Notes, types: Types) -> None:
    """Watch what enters, leaves and comes back to each block, and each weight's gradient."""

    def before(block: nn.Module, inputs: tuple) -> None:
        (x, _), x0, read, _, extra_v, first_v, *_ = inputs
        notes["into blocks"] |= {y.dtype for y in (x, x0, read, extra_v, first_v) if y is not None}
        types.inside = True

    def after(block: nn.Module, inputs: tuple, lanes: tuple) -> None:
        types.inside = False
        x = lanes[0]
        notes["blocks"].add(kind(x))
        x.register_hook(lambda grad: notes["back to blocks"].add(kind(grad)))

    for block in model.blocks:
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: notes["gradients"].add((name, *kind(p.grad)))
        )


def noting_kernel(notes: Notes) -> Callable:
    """torch's attention, its arguments noted; a head's numbers must be neighbours."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        notes["queries"].add(kind(q))
        notes["keys, values"] |= {kind(k), kind(v)}
        notes["last strides"] |= {x.stride(-1) for x in (q, k, v)}
        return sdpa_attention(q, k, v)

    return kernel


def state_types(optimizers: list) -> set[torch.dtype]:
    """Types of what the optimizers keep, but for counts of steps."""
    return {
        x.dtype
        for optimizer in optimizers
        for state in optimizer.state.values()
        for name, kept in state.items()
        if name != "step"
        for x in tree_leaves(kept)
    }


def check_types(cfg: Config, device: torch.device, qat: bool) -> None:
    """One training step, with every type and shape on its way; the equations say which."""
    B, T, D, K = cfg.micro_batch_seqs, cfg.train_seq_len, cfg.model_dim, cfg.head_dim
    notes, types = Notes(), Types()
    model = build(cfg, device, noting_kernel(notes))
    weights = {(name, FP32, tuple(p.shape)) for name, p in model.named_parameters()}
    note_blocks(model, notes, types)
    model.hidden, model.logits = (notes.of(f.__name__, f) for f in (model.hidden, model.logits))
    optimizers, rows, run = optimizers_of(model), Rows(cfg), Run(cfg, 0, 1, device)
    with types, mock.patch("train_gpt.orthogonalize", notes.of("orthogonalize", orthogonalize)):
        stats = step(model, optimizers, rows, run, qat, notes.of("nats", training_nats))
    assert types.leaks == []
    assert types.count > 50 * cfg.num_layers
    stream = {(BF16, (B, T, D))}
    assert notes["into blocks"] == {BF16}
    assert notes["queries"] == {(BF16, (B, T, cfg.num_heads, K))}
    assert notes["keys, values"] == {(BF16, (B, T, cfg.num_kv_heads, K))}
    assert notes["last strides"] == {1}
    assert notes["blocks"] == notes["hidden"] == notes["back to blocks"] == stream
    assert notes["logits"] == {(FP32, (B, T, cfg.vocab_size))}
    assert notes["nats"] == {(FP32, (B, T))}
    assert notes["gradients"] == weights
    assert {dtype for dtype, _ in notes["orthogonalize"]} == {BF16}
    assert weights == {(name, *kind(p)) for name, p in model.named_parameters()}
    assert state_types(optimizers) == {
        FP32,
        *([torch.int8, BF16] if cfg.muon_quant_momentum else []),
    }
    groups = sum(len(optimizer.param_groups) for optimizer in optimizers)
    assert (kind(stats), stats.device.type) == ((FP32, (1 + groups,)), device.type)


@pytest.mark.parametrize("where", ["fake cpu", CUDA])
@pytest.mark.parametrize(
    ("system", "qat"),
    [
        pytest.param(system, qat, id=f"{system}-{'QAT' if qat else 'plain'}")
        for system in SYSTEMS
        for qat in {"late": [False, True], "always": [True], "off": [False]}[
            Config(**SYSTEMS[system]).qat_mode
        ]
    ],
)
def test_types_and_shapes_of_the_training_step(system: str, qat: bool, where: str) -> None:
    with at(where) as device:
        check_types(share_of(system, where), device, qat)


def patch_of(owner: object, name: str, change: Callable) -> Callable:
    """A patch of owner.name by what `change` makes of it."""
    return lambda: mock.patch.object(owner, name, change(getattr(owner, name)))


TYPE_MISTAKES = {
    "float32 leaves the MLP": patch_of(
        MLP,
        "forward",
        lambda old: (
            lambda self, x, *_: self.proj(F.leaky_relu(self.fc(x), self.slope).float().square())
        ),
    ),
    "float32 inside XSA": patch_of(
        train_gpt,
        "exclude_own_value",
        lambda old: lambda y, v: old(y.float(), v.float()).to(y.dtype),
    ),
    "the mix of streams is not cast": patch_of(
        train_gpt, "cast_like", lambda old: lambda p, x: p if p.shape == (2, 512) else old(p, x)
    ),
    "float32 from the embedding on": patch_of(
        GPT,
        "hidden",
        lambda old: lambda self, *given: (self.__setattr__("dtype", FP32), old(self, *given))[1],
    ),
    "bfloat16 logits": patch_of(GPT, "logits", lambda old: lambda *given: old(*given).to(BF16)),
    "float32 in Muon": patch_of(train_gpt, "pack_momentum", lambda old: lambda m: old(m.float())),
    "bfloat16 weights": patch_of(
        train_gpt.Muon,
        "step",
        lambda old: (
            lambda self: (
                [p.__setattr__("data", p.data.to(BF16)) for p in self.param_groups[0]["params"]],
                old(self),
            )
        ),
    ),
    "a weight without a gradient": patch_of(
        train_gpt.SmearGate, "forward", lambda old: lambda self, x, ids: x
    ),
    "values of too many heads": patch_of(
        train_gpt.Attention, "values", lambda old: lambda self, x, *_: self.c_q(x)
    ),
    "strided queries": patch_of(
        train_gpt,
        "rotate",
        lambda old: lambda x, r: old(x, r).transpose(2, 3).contiguous().transpose(2, 3),
    ),
}


@pytest.mark.parametrize("mistake", TYPE_MISTAKES)
def test_a_wrong_type_is_noticed(mistake: str) -> None:
    with at("fake cpu") as device, pytest.raises(AssertionError), TYPE_MISTAKES[mistake]():
        check_types(
            share_of("defaults", "fake cpu", **SMALL, muon_quant_momentum=True), device, qat=False
        )


# Devices


class Devices(TorchDispatchMode):
    """Names the operations that make a tensor elsewhere, and those that take one and wait.

    A copy from host memory waits for all that the GPU has yet to do, unless non_blocking.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.count, self.elsewhere, self.waits = device, 0, [], []

    def is_elsewhere(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.device.type != self.device.type

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        result = function(*args, **kwargs)
        self.count += 1
        if any(map(self.is_elsewhere, tree_leaves(result))) and "pin_memory" not in name:
            self.elsewhere.append(name)
        elif any(map(self.is_elsewhere, args)) and not kwargs.get("non_blocking"):
            self.waits.append(name)
        return result


def watched_step(cfg: Config, device: torch.device) -> Devices:
    """A training step with all that can be on: QAT, and MiLe where it is set."""
    model, rows, run = build(cfg, device), Rows(cfg), Run(cfg, 0, 1, device)
    optimizers = optimizers_of(model)
    with Devices(device) as watch:
        stats = step(model, optimizers, rows, run, qat=True)
    assert stats.device.type == device.type
    assert watch.count > 1000
    return watch


@pytest.mark.parametrize("where", ["meta", CUDA])
@pytest.mark.parametrize("system", [*SYSTEMS])
def test_the_step_makes_every_tensor_on_its_device(system: str, where: str) -> None:
    with at(where) as device:
        assert watched_step(share_of(system, where), device).elsewhere == []


DEVICE_MISTAKES = {
    "rotary tables on the host": patch_of(
        train_gpt,
        "rotary_tables",
        lambda old: lambda cfg, length, device: old(cfg, length, torch.device("cpu")),
    ),
    "a number on the host": patch_of(
        GPT,
        "logits",
        lambda old: (  # mixes with any device
            lambda self, *given: old(self, *given) + torch.tensor(0.0)
        ),
    ),
    "a matrix on the host in Muon": patch_of(
        train_gpt,
        "orthogonalize",
        lambda old: lambda m, *given: old(m, *given) @ torch.eye(m.size(-1), dtype=m.dtype),
    ),
}


@pytest.mark.parametrize("mistake", DEVICE_MISTAKES)
def test_a_tensor_made_elsewhere_is_noticed(mistake: str) -> None:
    with (
        at("meta") as device,
        DEVICE_MISTAKES[mistake](),
        pytest.raises((AssertionError, RuntimeError), match=r"cpu|aten\.(lift_fresh|eye)"),
    ):
        assert watched_step(share_of("defaults", "meta", **SMALL), device).elsewhere == []


def test_clipping_before_the_exchange_reads_nothing() -> None:
    """A number read from a GPU is awaited; on `meta` there is none."""
    with at("meta") as device, mock.patch("torch.nn.utils.clip_grad_norm_", clip_grad_norm_):
        watched_step(share_of("pr703", "meta", **SMALL, cache_layer=0), device)


def test_averaging_never_waits() -> None:
    with at("meta") as device:
        model = build(share_of("defaults", "meta", **SMALL), device)
        averages = Averages(model, model.cfg)
        with Devices(device) as watch:
            averages.update(snapshot=True)
    assert watch.waits == []


@pytest.mark.parametrize("where", ["meta", CUDA])
@pytest.mark.parametrize("mode", ["ema", "swa", "swa_of_ema"])
def test_averages_stay_in_float32_on_the_device(mode: str, where: str) -> None:
    with at(where) as device:
        model = build(share_of("defaults", where, avg_mode=mode), device)
        averages, run = Averages(model, model.cfg), Run(model.cfg, 0, 1, device)
        for _ in range(2):
            averages.update(snapshot=True)
        averaged = averages.result(run)
    assert averaged is not model
    assert [(kind(p), p.device) for p in averaged.parameters()] == [
        (kind(p), p.device) for p in model.parameters()
    ]


@pytest.mark.parametrize("where", ["meta", CUDA])
@pytest.mark.parametrize("system", ["defaults", "pr334"])
def test_adaptation_makes_every_tensor_on_its_device(system: str, where: str) -> None:
    with at(where) as device:
        cfg = share_of(system, where, ttt_mode="score_first", ttt_batch_seqs=4)
        val = make_validation(4 * cfg.eval_seq_len + 1, cfg.vocab_size)
        model, run = build(cfg, device), Run(cfg, 0, 1, device)
        adapter = Adapter(training_nats, model, val, run)
        with Devices(device) as watch:
            assert adapter.learn(0, len(val.target_bytes), cfg.ttt_lr, math.inf) == 1
    assert watch.elsewhere == ["aten.lift_fresh.default"] * 4  # the batch, as it leaves numpy
    assert {kind(p) for p in model.parameters()} == {
        (FP32, tuple(p.shape)) for p in GPT(cfg).parameters()
    }


# Forward, update, calibration and scoring on CUDA


@pytest.mark.parametrize("where", ["fake cuda", CUDA])
@pytest.mark.parametrize("system", [*SYSTEMS])
def test_forward_and_update_on_cuda(system: str, where: str) -> None:
    """A step without its backward, as if every gradient were zero."""
    with at(where) as device, torch.no_grad(), mock.patch("torch.Tensor.backward"):
        cfg, notes = share_of(system, where), Notes()
        model = build(cfg, device, trainable=False)
        stats = step(
            model,
            optimizers_of(model),
            Rows(cfg),
            Run(cfg, 0, 1, device),
            True,
            notes.of("nats", training_nats),
        )
    assert stats.device.type == "cuda"
    assert notes["nats"] == {(FP32, (cfg.micro_batch_seqs, cfg.train_seq_len))}
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(FP32, "cuda")}


@pytest.mark.parametrize("where", ["fake cuda", CUDA])
@pytest.mark.parametrize("system", [*SYSTEMS])
def test_scoring_on_cuda(system: str, where: str) -> None:
    """A batch of sliding windows, some of which score nothing."""
    cfg = share_of(system, where)
    cfg = replace(cfg, eval_batch_seqs=4 if where == "cuda" else cfg.eval_batch_seqs)
    val = make_validation(3 * cfg.eval_seq_len + 1, cfg.vocab_size)
    spans = windows(2 * cfg.eval_seq_len, cfg.eval_seq_len, cfg.eval_stride)
    width = cfg.eval_stride or cfg.eval_seq_len
    spans, notes = spans[: cfg.eval_batch_seqs - 1], Notes()
    with at(where) as device, torch.no_grad():
        model, run = build(cfg, device, trainable=False), Run(cfg, 0, 1, device)
        sums = score_windows(
            notes.of("nats", training_nats),
            model,
            val,
            spans,
            width,
            run,
            run.folder.progress("scoring"),
        )
    assert notes["nats"] == {(FP32, (cfg.eval_batch_seqs, width))}
    assert (kind(sums), sums.device.type) == ((torch.float64, (3,)), "cpu")
    if where == "cuda":
        assert sums.isfinite().all()
        assert sums[1] == sum(end - first for _, first, end in spans)


def blank(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.full((2, 3, 16), BOS, device=device).unbind()


@pytest.mark.parametrize("where", ["fake cuda", CUDA])
@pytest.mark.parametrize("system", ["defaults", "pr1361"])
def test_calibration_on_cuda(system: str, where: str) -> None:
    item = (
        mock.patch("torch.Tensor.item", lambda x: 1.0)
        if where != "cuda"
        else contextlib.nullcontext()
    )  # a count of tokens, of which a fake tensor has none
    with at(where) as device, torch.no_grad(), item:
        cfg = share_of(system, where)
        model, run = build(cfg, device, trainable=False), Run(cfg, 0, 1, device)
        ids = torch.full((8, cfg.train_seq_len), BOS)
        hessians = collect_hessians(model, lambda n: ids, 1, math.inf, run)
    assert {(H.dtype, H.device.type, H.size(0)) for H in hessians.values()} == {
        (FP32, "cuda", width) for width in (cfg.model_dim, cfg.mlp_dim)
    }  # others stay fp16


def test_rows_are_pinned_whole() -> None:
    """What is not contiguous is copied by way of memory that is not pinned, and waited for."""
    pinned, rows = [], torch.arange(34).view(2, 17)
    with at("fake cuda") as device:
        run = Run(Config(), 0, 1, device)
        with mock.patch.object(Tensor, "pin_memory", lambda x: (pinned.append(x), x)[1]):
            for part in (rows[:, :-1], rows[:, 1:]):
                assert run.to_device(part).device.type == "cuda"
    assert [x.is_contiguous() for x in pinned] == [True, True]


@pytest.mark.parametrize("where", [CUDA])
def test_what_is_fetched_waits_for_no_later_work(where: str) -> None:
    run, matrix = Run(Config(), 0, 1, torch.device(where)), torch.ones(8192, 8192, device=where)
    numbers = run.fetch(torch.tensor([1.5, -2.0], device=where))
    for _ in range(200):
        torch.mm(matrix, matrix)
    later = torch.cuda.Event()
    later.record()
    assert numbers() == [1.5, -2.0]
    assert not later.query()
    torch.cuda.synchronize()


def test_rows_that_the_model_draws_are_the_hosts() -> None:
    """So that they can be pinned, as rows of the data are."""
    cfg, drawn = share_of("defaults", "fake cuda", **SMALL), []
    with (
        at("fake cuda") as device,
        torch.no_grad(),
        mock.patch(
            "torch.multinomial",
            lambda p, n, generator: (drawn.append(p.device.type), torch.full((len(p), n), BOS))[1],
        ),
    ):
        ids = sample_rows(build(cfg, device, trainable=False), 3, 0, device)
    assert (ids.device.type, tuple(ids.shape), drawn) == ("cpu", (8, 3), ["cpu", "cpu"])


def test_a_host_tensor_in_scoring_is_noticed() -> None:
    with (
        at("fake cuda") as device,
        torch.no_grad(),
        pytest.raises(RuntimeError, match="cpu"),
        DEVICE_MISTAKES["rotary tables on the host"](),
    ):
        cfg = share_of("defaults", "fake cuda", **SMALL)
        training_nats(build(cfg, device, trainable=False), Batch(*blank(device)))


# Kernels of attention: FlashAttention-3, as flash_attn_interface or through the kernels package,
# those of torch, and which of them is taken


def documented(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """flash_attn_func by its documentation: q (B, T, H, K), k and v (B, T, G, K), half precision.

    Consecutive heads of q share one of k and v; the scale is 1 / sqrt(K) unless given.
    """
    assert q.dtype == k.dtype == v.dtype == BF16
    assert k.shape == v.shape
    assert q.shape[:2] == k.shape[:2] and q.size(3) == k.size(3) and q.size(2) % k.size(2) == 0
    scale, shared = softmax_scale or q.size(3) ** -0.5, q.size(2) // k.size(2)
    heads, sums = [], []
    for head in range(q.size(2)):
        scores = scale * q.select(2, head).float() @ k.select(2, head // shared).float().mT
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        heads.append((torch.softmax(scores, -1) @ v.select(2, head // shared).float()).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    out = torch.stack(heads, dim=2)
    return (out, torch.stack(sums, dim=1)) if return_attn_probs else out


def documented_pair(q, k, v, **options):
    """As releases before return_attn_probs: always with the logarithms of the sums."""
    return documented(q, k, v, return_attn_probs=True, **options)


def failing(error: Exception) -> Callable:
    def fail(*args, **options):
        raise error

    return fail


def install(
    monkeypatch: pytest.MonkeyPatch,
    interface: Callable | None = None,
    hub: Callable | None = None,
    get_kernel: Callable | None = None,
) -> list[str]:
    """Put stand-ins where the packages would be, None for one that is missing; lists hub calls."""
    asked = []

    def get(repo_id: str, *, revision: str | None = None, version: int | None = None):
        assert (revision is None) != (version is None)  # as its documentation wants
        asked.append(repo_id)
        return SimpleNamespace(flash_attn_func=hub)

    for name, content in (
        ("flash_attn_interface", interface and {"flash_attn_func": interface}),
        ("kernels", (hub or get_kernel) and {"get_kernel": get_kernel or get}),
    ):
        module = ModuleType(name)
        vars(module).update(content or {})
        monkeypatch.setitem(sys.modules, name, module if content else None)
    return asked


# Seconds that a trial is said to have taken where nothing can be timed.
SECONDS = {"fa3": 0.001, "sdpa": 0.002, "cudnn": 0.003, "flash": 0.004}


def picked(
    attention: str = "auto",
    where: str = "fake cuda",
    seconds: dict[str, float] = SECONDS,
    **changed: object,
) -> ChosenAttention:
    train_gpt.find_attention.cache_clear()

    def said(works: dict, ranks: Ranks) -> dict[str, float]:
        return {name: seconds[name] if name in works else math.inf for name in KERNELS}

    with at(where) as device, contextlib.ExitStack() as stack:
        if where != "cuda":
            stack.enter_context(mock.patch("train_gpt.seconds_of_kernels", said))
        return pick_attention(Config(attention=attention, **changed), Ranks(device=device))


def queries_keys_values(cfg: Config) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, 37, heads, cfg.head_dim).to(BF16).requires_grad_()
        for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    ]


@pytest.mark.parametrize("source", ["flash_attn_interface", "kernels"])
@pytest.mark.parametrize("function", [documented, documented_pair])
def test_flash_attention_is_torchs_attention(
    function: Callable, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, for either source and either form of the result."""
    asked = install(monkeypatch, **{"hub" if source == "kernels" else "interface": function})
    name, kernel, _ = picked()
    assert name == f"fa3/{source}"
    assert asked == ["kernels-community/flash-attn3"] * (source == "kernels")
    found = []
    for attend in (kernel, torch.compile(kernel, fullgraph=True, backend="eager"), sdpa_attention):
        inputs = queries_keys_values(Config())
        y = attend(*inputs)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y, *(x.grad for x in inputs)])
    for ours, compiled, torchs in zip(*found, strict=True):
        assert torch.equal(ours, compiled)
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2)


def test_a_wrong_flash_attention_is_noticed() -> None:
    """The comparison sees a missing mask, and heads that share in another order."""
    q, k, v = (x.detach() for x in queries_keys_values(Config()))
    y = sdpa_attention(q, k, v)
    for wrong in (documented(q, k, v), documented(q, k.flip(2), v.flip(2), causal=True)):
        assert (wrong - y).abs().max() > 0.5


def test_the_interface_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is asked of the hub, and with ATTENTION=sdpa nothing of either."""
    asked = install(monkeypatch, interface=documented, hub=documented)
    assert picked().name == picked("fa3").name == "fa3/flash_attn_interface"
    assert picked("sdpa") == ("sdpa", sdpa_attention, "")
    assert picked(where="fake cpu") == ("sdpa", sdpa_attention, "")
    assert asked == []


FAILURES = {
    "both missing": ({}, ["flash_attn_interface", "kernels"]),
    "the trial fails": (
        {"interface": failing(RuntimeError("no kernel image\nis available"))},
        ["flash_attn_interface: no kernel image,"],
    ),
    "another signature": ({"interface": lambda q, k, v: q}, ["causal"]),
    "no build": ({"get_kernel": failing(FileNotFoundError("no build variant"))}, ["no build"]),
    "no network": ({"get_kernel": failing(OSError("cannot reach the hub"))}, ["cannot reach"]),
    "no such function": ({"get_kernel": lambda *_, **__: SimpleNamespace()}, ["flash_attn_func"]),
    "no message": ({"interface": failing(ValueError())}, ["flash_attn_interface: ,"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_without_flash_attention_torchs_is_taken(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, reasons = FAILURES[failure]
    install(monkeypatch, **installed)
    name, kernel, trial = picked()
    assert (name, kernel) == ("sdpa", sdpa_attention)
    assert all(reason.rstrip(",") in trial for reason in reasons), trial
    with pytest.raises(Refusal, match="^ATTENTION=fa3: ") as refusal:
        picked("fa3")
    text = str(refusal.value)
    assert "\n" not in text and text.endswith("; use ATTENTION=auto")
    assert all(reason in text for reason in reasons), text


def test_a_broken_interface_gives_way_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, interface=failing(RuntimeError("broken")), hub=documented)
    assert picked().name == picked("fa3").name == "fa3/kernels"


@pytest.mark.parametrize("attention", ["fa3", "cudnn", "flash"])
def test_a_kernel_of_gpus_is_refused_without_one(attention: str) -> None:
    with pytest.raises(
        Refusal, match=f"={attention}: there is no CUDA device; use ATTENTION=auto$"
    ):
        picked(attention, "fake cpu")


def test_documents_have_a_kernel_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial of kernels that would not be called; none of those is promised either."""
    assert picked(attn_docs=True) == ("varlen", sdpa_attention, "")
    assert picked("sdpa", "fake cpu", attn_docs=True) == ("sdpa", sdpa_attention, "")
    with pytest.raises(Refusal, match="^ATTENTION=cudnn: inside documents .*ATTENTION=auto$"):
        picked("cudnn", attn_docs=True)


@pytest.mark.parametrize("quickest", KERNELS)
def test_the_quickest_kernel_is_taken(quickest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has its name and what all of them took."""
    install(monkeypatch, interface=documented)
    name, kernel, trial = picked(seconds={**SECONDS, quickest: 0.0005})
    assert name.split("/")[0] == quickest
    assert trial.count(" ms") == len(KERNELS)
    assert f"{quickest} 0.50 ms" in trial
    if quickest in train_gpt.TORCH_BACKENDS:
        assert kernel.args == (train_gpt.TORCH_BACKENDS[quickest],)


class Clock:
    """Stands still but for the work that says it took some time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def work(self, *passes: float) -> Callable[[], None]:
        """Work that takes each of these times in turn, and fails after them."""
        times = iter(passes)

        def work() -> None:
            self.seconds += next(times)

        return work


def test_a_kernels_time_is_the_least_after_the_first() -> None:
    clock, passes = Clock(), train_gpt.TRIAL_PASSES
    works = {
        "cudnn": clock.work(100.0, 5.0, 4.0, 6.0),
        "sdpa": clock.work(1.0, 7.0, 7.0, 7.0),
        "flash": clock.work(1.0, 2.0),  # fails in its third call
    }
    found = seconds_of_kernels(works, Ranks(), lambda: clock.seconds)
    assert found == {
        "fa3": math.inf,
        "cudnn": 4.0 / passes,
        "flash": math.inf,
        "sdpa": 7.0 / passes,
    }


class Pair(Ranks):
    """One of two ranks; what the other says is given."""

    def __init__(self, others: list[float]) -> None:
        super().__init__()
        self.others = iter(others)

    def largest(self, value: float) -> float:
        return max(value, next(self.others))


def test_ranks_take_the_kernel_that_is_quickest_on_the_slowest_of_them() -> None:
    """One that another rank lacks or fails at is not taken, whatever this rank has."""
    clock, passes = Clock(), train_gpt.TRIAL_PASSES
    works = {"fa3": clock.work(*4 * [1.0]), "cudnn": clock.work(*4 * [2.0])}
    ranks = Pair([math.inf, 3.0, 0.1, 5.0])
    found = seconds_of_kernels(works, ranks, lambda: clock.seconds)
    assert found == {"fa3": math.inf, "cudnn": 3.0, "flash": math.inf, "sdpa": math.inf}
    assert found["cudnn"] > 2.0 / passes
    assert [*ranks.others] == []  # every kernel was spoken of, those that are not here too


@pytest.mark.parametrize("backend", ["flash", "sdpa"])
def test_a_forced_kernel_of_torch_is_one_graph(backend: str) -> None:
    """Values and gradients; on a CPU, which has torch's flash kernel too."""
    kernel, found = train_gpt.kernel_from(backend), []
    torch._dynamo.reset()
    for attend in (torch.compile(kernel, fullgraph=True, backend="aot_eager"), sdpa_attention):
        inputs = [x.detach().float().requires_grad_() for x in queries_keys_values(Config())]
        y = attend(*inputs)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y, *(x.grad for x in inputs)])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_torch_lacks_is_refused_by_its_name() -> None:
    """This torch has no cuDNN on a CPU: what it says is the reason."""
    with pytest.raises(Refusal, match="^cudnn: .*backend"):
        train_gpt.working_kernel("cudnn", (4, 2, 16), torch.device("cpu"))
    assert train_gpt.working_kernel("flash", (4, 2, 16), torch.device("cpu"))[0] == "flash"
    assert train_gpt.working_kernel("sdpa", (4, 2, 16), torch.device("cpu"))[0] == "sdpa/flash"


def test_the_model_calls_it_as_documented(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full-size batch on CUDA; the log names the kernel."""
    install(monkeypatch, interface=documented)
    cfg, notes = share_of("defaults", "fake cuda"), Notes()
    attention = picked()
    with at("fake cuda") as device, torch.no_grad():
        model = build(cfg, device, notes.of("attention", attention.kernel), trainable=False)
        nats, _ = training_nats(model, Batch(*(x.to(device) for x in vars(Rows(cfg)).values())))
    shape = cfg.micro_batch_seqs, cfg.train_seq_len
    assert kind(nats) == (FP32, shape)
    assert notes["attention"] == {(BF16, (*shape, cfg.num_heads, cfg.head_dim))}
    run = Run(cfg, 0, 1, torch.device("cpu"))
    val = make_validation(cfg.eval_seq_len + 1, cfg.vocab_size)
    log_work(model, SimpleNamespace(shards=[], num_tokens=0), val, attention, run)
    said = capsys.readouterr().out
    assert " kernel:fa3/flash_attn_interface\nattention tried: fa3 1.00 ms, cudnn" in said


@pytest.mark.parametrize("where", [CUDA])
@pytest.mark.parametrize("attention", ["auto", *KERNELS])
def test_the_kernel_of_this_gpu_is_torchs_attention(attention: str, where: str) -> None:
    """Whatever is installed here, with its gradients."""
    try:
        name, kernel, _ = picked(attention, where)
    except Refusal as refusal:
        assert attention not in ("auto", "sdpa")
        pytest.skip(str(refusal))
    found = []
    for attend in (kernel, sdpa_attention):
        inputs = [x.detach().cuda().requires_grad_() for x in queries_keys_values(Config())]
        y = attend(*inputs)
        (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
        found.append([y, *(x.grad for x in inputs)])
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2, msg=name)
