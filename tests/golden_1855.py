"""The model of #1855 from a kit of its golden numbers, and what it gives, under published names.

The published script keeps matrices in banks: qo_bank holds the queries of all layers and then the
outputs, kv_bank keys and then values; mlp_up_bank and mlp_down_bank have one matrix a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import golden_kit
import torch

from train_gpt import BOS, GPT, PRESETS, Batch, Config, document_boundaries, training_nats

LOOPS = {"loop_start": 3, "loop_end": 5, "num_loops": 2}
# The kit's configuration -> our settings, which a kit may choose freely.
SIZES = {
    "num_layers": "num_layers",
    "model_dim": "model_dim",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "mlp_mult": "mlp_mult",
    "vocab_size": "vocab_size",
    "logit_softcap": "logit_softcap",
    "rope_base": "rope_base",
    "rope_dims": "rope_dims",
    "xsa_last_n": "xsa_last_n",
    "qk_gain_init": "qk_gain_init",
    "loop_start": "loop_start",
    "loop_end": "loop_end",
    "num_loops": "num_loops",
    "parallel_start_layer": "parallel_start_layer",
    "gate_window": "gate_window",
    "sparse_attn_gate_scale": "attn_gate_scale",
}
BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}
RENAMED = {
    "smear.scale": "smear_lambda",
    "smear.weight": "smear_gate.weight",
    "lanes.keep": "parallel_resid_lambdas",
    "lanes.write": "parallel_post_lambdas",
}


def build(numbers: dict[str, torch.Tensor], facts: dict) -> GPT:
    """The preset at the kit's sizes, with the kit's weights; raises KeyError or ValueError."""
    config = {"vocab_size": numbers["param/tok_emb.weight"].size(0), **facts["config"]}
    sizes = {
        ours: type(getattr(Config(), ours))(float(config[theirs]))
        for theirs, ours in SIZES.items()
        if theirs in config
    }
    rows = {"train_seq_len": 2, "train_batch_tokens": 2, "eval_seq_len": 2, "eval_stride": 0}
    model = GPT(Config(**{**PRESETS["pr1855"], **rows, "ttt_mode": "off", **sizes}))
    used = set()
    for name, parameter in model.named_parameters():
        bank, index = published_place(name, model.cfg.num_layers)
        given = numbers[f"param/{bank}"]
        given = given if index is None else given[index]
        if given.numel() != parameter.numel():
            raise ValueError(f"{bank} has {given.numel()} numbers, expected {parameter.numel()}")
        parameter.data.copy_(given.reshape(parameter.shape))
        used.add(f"param/{bank}")
    unknown = {key for key in numbers if key.startswith("param/")} - used
    if unknown:
        raise ValueError(f"parameters without a counterpart: {', '.join(sorted(unknown))}")
    return model


def published_place(name: str, num_layers: int) -> tuple[str, int | None]:
    """The published tensor that holds a parameter of ours, and which matrix of a bank it is."""
    for bank, parts in BANKS.items():
        for half, part in enumerate(parts):
            if name.startswith("blocks.") and name.endswith(f".{part}.weight"):
                return bank, half * num_layers + int(name.split(".")[1])
    if name.endswith("attn.gate"):
        return f"{name}_w".replace("gate_w", "attn_gate_w"), None
    return RENAMED.get(name, name), None


def one_row(numbers: dict[str, torch.Tensor], boundaries: torch.Tensor | None = None) -> Batch:
    """The kit's tokens in one row, attention inside the documents that the boundaries give.

    Without boundaries documents begin at BOS.
    """
    ids = numbers["input_ids"].long()
    begins = (ids == BOS).nonzero()[:, 0] if boundaries is None else boundaries.long()
    begins = begins[(begins > 0) & (begins < len(ids))].contiguous()
    documents = torch.searchsorted(begins, torch.arange(len(ids)), right=True)[None]
    targets = numbers.get("target_ids", ids).long()
    return Batch(
        ids[None],
        targets[None],
        documents=documents,
        boundaries=document_boundaries(documents),
    )


def loss_and_logits(
    model: GPT, numbers: dict[str, torch.Tensor], facts: dict, mode: str, form: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, nats (T,) and logits (T, V) of the kit's tokens.

    mode: "on" or "off", whether layers loop. form: "packed", one row with documents, or "rows".
    """
    batch = one_row(numbers, numbers["cu_seqlens"])
    if form == "rows":
        length = int(facts["config"]["train_seq_len"])
        batch = Batch(batch.input_ids.view(-1, length), batch.target_ids.view(-1, length))
    looping = mode == "on"
    nats, _ = training_nats(model, batch, looping=looping)
    with torch.no_grad():
        hidden = model.hidden(batch.input_ids, batch.documents, batch.boundaries, looping)
        logits = model.logits(hidden)
    return nats.mean(), nats.detach().flatten(), logits.flatten(0, 1)


def banked(model: GPT) -> dict[str, torch.Tensor]:
    """The gradients under the published names, matrices in banks."""
    found: dict[str, dict[int | None, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        bank, index = published_place(name, model.cfg.num_layers)
        assert parameter.grad is not None, name
        found.setdefault(bank, {})[index] = parameter.grad
    return {
        bank: parts[None] if None in parts else torch.stack([parts[n] for n in range(len(parts))])
        for bank, parts in found.items()
    }


def gradients_of(
    model: GPT, numbers: dict[str, torch.Tensor], facts: dict, mode: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, bool]]:
    """Name, our gradient, the published one, and whether that is given as sums."""
    ours = banked(model)
    layers = facts["grad_off_bank_layers"] if mode == "off" else range(model.cfg.num_layers)
    for name, (published, is_sums) in golden_kit.gradients(numbers, mode).items():
        gradient = ours[name]
        if name in BANKS:
            halves = gradient.unflatten(0, (len(BANKS[name]), -1))
            gradient = halves[:, list(layers)].flatten(0, 1)
        elif gradient.numel() == published.numel():
            gradient = gradient.view_as(published)
        yield name, gradient, published, is_sums


@torch.no_grad()
def leak(model: GPT, numbers: dict[str, torch.Tensor], mode: str) -> float:
    """The largest change of a logit from a BOS on when the token before that BOS changes."""
    ids = numbers["input_ids"].long()
    looping, largest = mode == "on", 0.0
    documents = one_row(numbers, numbers["cu_seqlens"]).documents
    before = model.logits(model.hidden(ids[None], documents, looping=looping))[0]
    for at in (ids == BOS).nonzero()[:, 0].tolist():
        if at == 0 or ids[at - 1] == BOS:
            continue
        changed = ids.clone()
        changed[at - 1] = (ids[at - 1] + 1) % model.cfg.vocab_size
        changed[at - 1] += int(changed[at - 1] == BOS)
        after = model.logits(model.hidden(changed[None], documents, looping=looping))[0]
        if torch.equal(before[at - 1], after[at - 1]):
            raise ValueError(f"the token at {at - 1} changes nothing at all")
        largest = max(largest, float((before[at:] - after[at:]).abs().max()))
    return largest
