"""A stand-in for a peer's training step: system #1361 (1.1122) in plain torch, for a CPU.

    python benchmarks/peer_step.py              configuration P, 21 timed steps
    python benchmarks/peer_step.py mini 31      the sizes of a preset
    python benchmarks/peer_step.py P 21 --bf16 --compile

It computes what that system's script is described to compute in a step, with torch's own
operations and nothing of train_gpt.py but the sizes of a configuration: the forward and backward
pass, the clip, AdamW, Muon matrix by matrix, the moving average. It is not that script, which asks
for CUDA. --bf16 has autocast and an orthogonalisation in bfloat16, as that script has on a GPU;
--compile compiles the whole loss and the orthogonalisation, as it does there. The tokens are drawn
at random. The last line is JSON for compare.py:

    peer="python benchmarks/peer_step.py P"
    python benchmarks/compare.py "$peer" "python benchmarks/train_step.py P"
"""

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import machine, median, seconds, settings, t
from torch import Tensor, nn
from tqdm import tqdm

NO_BIAS = {"bias": False}
MOMENTUM, MUON_DECAY, ADAM_DECAY = 0.95, 0.04, 0.04


def normed(x: Tensor) -> Tensor:
    """x over its root mean square."""
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Rotary positions of the first dimensions of each head; the base grows with long rows."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__()
        dims, length = cfg.rotary_dims, cfg.train_seq_len
        base = cfg.rope_base
        if cfg.rope_ntk_ref and length > cfg.rope_ntk_ref:
            base *= (length / cfg.rope_ntk_ref) ** (dims / (dims - 2))
        frequencies = base ** -(torch.arange(0, dims, 2) / dims)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, K) -> the same."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        half = cos.size(-1)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = first * cos + second * sin, second * cos - first * sin
        return torch.cat([*turned, rest], -1)


class Attention(nn.Module):
    """Grouped-query attention with normed, rotated queries and keys, and without own values."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__()
        keys = cfg.num_kv_heads * cfg.head_dim
        self.heads, self.kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.c_q = nn.Linear(cfg.model_dim, cfg.model_dim, **NO_BIAS)
        self.c_k = nn.Linear(cfg.model_dim, keys, **NO_BIAS)
        self.c_v = nn.Linear(cfg.model_dim, keys, **NO_BIAS)
        self.proj = nn.Linear(cfg.model_dim, cfg.model_dim, **NO_BIAS)
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.rotary = Rotary(cfg)

    def forward(self, x: Tensor, extra_v: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D); the extra is added to the values (B, T, G*K)."""
        B, T, D = x.shape
        v = self.c_v(x)
        v = v if extra_v is None else v + extra_v
        v = v.view(B, T, self.kv_heads, self.head_dim)
        q = self.c_q(x).view(B, T, self.heads, self.head_dim)
        k = self.c_k(x).view(B, T, self.kv_heads, self.head_dim)
        q, k = self.rotary(normed(q)), self.rotary(normed(k))
        q = q * self.q_gain.to(q.dtype)[:, None]
        heads = (y.transpose(1, 2) for y in (q, k, v))
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=grouped)
        y = self.without_own_value(y.transpose(1, 2), v)
        return self.proj(y.reshape(B, T, D))

    def without_own_value(self, y: Tensor, v: Tensor) -> Tensor:
        """What is left of y (B, T, H, K) at right angles to the token's own value."""
        grouped = y.unflatten(2, (self.kv_heads, -1))
        n = F.normalize(v, dim=-1).unsqueeze(3)
        return (grouped - (grouped * n).sum(-1, keepdim=True) * n).flatten(2, 3)


class MLP(nn.Module):
    """A projection of a squared leaky ReLU."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__()
        self.fc = nn.Linear(cfg.model_dim, cfg.mlp_dim, **NO_BIAS)
        self.proj = nn.Linear(cfg.mlp_dim, cfg.model_dim, **NO_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    """Attention and MLP, each with a gain for each channel, on the stream mixed with x0."""

    def __init__(self, cfg: t.Config, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, cfg.model_dim))
        self.depth_scale = (layer + 1) ** -0.5

    def forward(self, x: Tensor, x0: Tensor, extra_v: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        keep, inject = self.resid_mix.to(x.dtype)
        x = keep * x + inject * x0
        attended = self.attn(normed(x) * self.depth_scale, extra_v)
        x = x + self.attn_scale.to(x.dtype) * attended
        return x + self.mlp_scale.to(x.dtype) * self.mlp(normed(x) * self.depth_scale)


class Bigram(nn.Module):
    """An embedding of hashed pairs of tokens."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj = nn.Linear(cfg.bigram_dim, cfg.model_dim, **NO_BIAS)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        last = self.embed.num_embeddings - 1
        pairs = ((36313 * ids[:, 1:]) ^ (27191 * ids[:, :-1])) % last
        return self.scale * self.proj(self.embed(F.pad(pairs, (1, 0), value=last)))


class Smear(nn.Module):
    """Each position blended with the one before."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        share = torch.sigmoid(self.gate.to(x.dtype))
        return (1 - share) * x + share * F.pad(x[:, :-1], (0, 0, 1, 0))


class ValueEmbedding(nn.Module):
    """A table of tokens for the values of some layers."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.ve_dim)
        self.proj = nn.Linear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim, **NO_BIAS)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, G*K)."""
        return self.scale * self.proj(self.embed(ids))


class Peer(nn.Module):
    """The network, with parameters called as train_gpt.GPT calls them, so that a test can copy."""

    def __init__(self, cfg: t.Config) -> None:
        super().__init__()
        half = cfg.num_layers // 2
        self.half, self.value_layers = half, cfg.value_layers
        self.softcap = cfg.logit_softcap
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram, self.smear = Bigram(cfg), Smear(cfg)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(half, cfg.model_dim))
        self.ve_shared = ValueEmbedding(cfg)
        self.ve_layer_scales = nn.ParameterList(torch.ones(1) for _ in cfg.value_layers)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean nats of targets (B, T) after inputs (B, T)."""
        x = self.smear(normed(self.tok_emb(ids) + self.bigram(ids)))
        x0, values, kept = x, self.ve_shared(ids), []
        scales = dict(zip(self.value_layers, self.ve_layer_scales, strict=True))
        for layer, block in enumerate(self.blocks):
            if layer >= self.half and kept:
                x = x + self.skip_weights[layer - self.half].to(x.dtype) * kept.pop()
            x = block(x, x0, scales[layer] * values if layer in scales else None)
            if layer < self.half:
                kept.append(x)
        logits = F.linear(normed(x), self.tok_emb.weight)
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def newton_schulz(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values of a matrix towards 1, in five steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = gradient.to(dtype)
    X = X / (X.norm() + 1e-7)
    tall = X.size(0) > X.size(1)
    X = X.T if tall else X
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.T if tall else X


class Step:
    """The network, its optimizers and its moving average."""

    def __init__(self, cfg: t.Config, bf16: bool, compiled: bool) -> None:
        self.cfg, self.bf16 = cfg, bf16
        self.model = Peer(cfg)
        self.loss: Callable[..., Tensor] = self.model
        self.orthogonal: Callable[..., Tensor] = newton_schulz
        if compiled:
            self.loss = torch.compile(self.model, dynamic=False)
            self.orthogonal = torch.compile(newton_schulz, dynamic=False)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight)
        for block in self.model.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)
        nn.init.normal_(self.model.tok_emb.weight, std=0.005)
        nn.init.zeros_(self.model.bigram.embed.weight)
        nn.init.normal_(self.model.ve_shared.embed.weight, std=0.01)
        self.set_out()

    def set_out(self) -> None:
        """Sort the parameters by optimizer; begin the average at the weights of now."""
        tables = {m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)}
        linears = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        rest = [p for p in self.model.parameters() if p not in tables and p.ndim < 2]
        rest += [self.model.skip_weights, *(block.resid_mix for block in self.model.blocks)]
        groups = [
            {"params": list(tables), "lr": self.cfg.tied_embed_lr},
            {"params": rest, "lr": self.cfg.scalar_lr},
        ]
        self.adam = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=ADAM_DECAY, fused=True
        )
        self.matrices = {weight: torch.zeros_like(weight) for weight in linears}
        self.average = {name: x.clone() for name, x in self.model.state_dict().items()}

    @torch.no_grad()
    def muon(self) -> None:
        """Momentum, orthogonalisation, decay and update, matrix by matrix."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        for weight, momentum in self.matrices.items():
            momentum.mul_(MOMENTUM).add_(weight.grad)
            update = self.orthogonal(weight.grad.add(momentum, alpha=MOMENTUM), dtype)
            tall = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
            weight.mul_(1.0 - self.cfg.matrix_lr * MUON_DECAY)
            weight.add_(update.to(weight.dtype), alpha=-self.cfg.matrix_lr * tall)

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """One step on a batch (B, T); its loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip_norm)
        self.adam.step()
        self.muon()
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, x in self.model.state_dict().items():
                self.average[name].mul_(self.cfg.ema_decay).add_(x, alpha=1 - self.cfg.ema_decay)
        return loss.detach()


def main() -> None:
    """Time whole steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configuration", nargs="?", default="P")
    parser.add_argument("steps", nargs="?", type=int, default=21)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    cfg, _ = t.Config.from_env(settings(given.configuration))
    step = Step(cfg, given.bf16, given.compile)
    rows, T = cfg.rows_per_step, cfg.train_seq_len
    texts = torch.randint(2, cfg.vocab_size, (given.steps + 3, rows, T + 1))
    for text in texts[:3]:
        step(text[:, :-1], text[:, 1:])
    times = [
        seconds(lambda text=text: step(text[:, :-1], text[:, 1:]))
        for text in tqdm(texts[3:], "steps", disable=None)
    ]
    print(f"stand-in for #1361 at {given.configuration}: {1e3 * median(times):.1f} ms a step")
    print(json.dumps({"ms": {"step": 1e3 * median(times)}, "machine": machine()}))


if __name__ == "__main__":
    main()
