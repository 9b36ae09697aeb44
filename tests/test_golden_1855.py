"""The network of #1855 against the numbers that its own script gave: tests/golden/README.md."""

from __future__ import annotations

import functools
from dataclasses import replace

import golden_kit
import pytest
import torch
from golden_1855 import LOOPS, banked, build, gradients_of, leak, loss_and_logits, one_row
from golden_kit import PR1855

import train_gpt
from train_gpt import BOS, GPT, Batch, Config, plan_layers

LOGITS_WITHIN, LOSSES_WITHIN, GRADIENTS_WITHIN = 2e-5, 2e-6, 1e-4
MODES = ("off", "on")


@functools.cache
def kit() -> tuple[train_gpt.GPT, dict[str, torch.Tensor], dict]:
    numbers, facts = golden_kit.numbers(PR1855, "model"), golden_kit.facts(PR1855, "model")
    return build(numbers, facts), numbers, facts


@pytest.mark.parametrize("form", ["packed", "rows"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_and_losses_are_the_published_ones(mode: str, form: str) -> None:
    model, numbers, facts = kit()
    loss, nats, logits = loss_and_logits(model, numbers, facts, mode, form)
    published = numbers[f"logits/{mode}/{form}"]
    assert (logits - published).abs().max() <= LOGITS_WITHIN
    assert (nats - numbers[f"nll/{mode}/{form}"]).abs().max() <= LOGITS_WITHIN
    assert abs(loss.item() - facts["losses"][f"{mode}/{form}"]) <= LOSSES_WITHIN


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_published_ones(mode: str) -> None:
    model, numbers, facts = kit()
    model.zero_grad()
    loss_and_logits(model, numbers, facts, mode, "packed")[0].backward()
    compared = set()
    for name, ours, published, is_sums in gradients_of(model, numbers, facts, mode):
        error = golden_kit.gradient_error(ours, published, is_sums)
        assert error <= GRADIENTS_WITHIN, f"{mode} {name}: {error:.1e}"
        compared.add(name)
    assert compared == facts["gradnorm"][mode].keys()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["packed", "rows"])
def test_norms_of_whole_gradients_are_the_published_ones(mode: str, form: str) -> None:
    """These see every element of the banks, of which the pack has sums only."""
    model, numbers, facts = kit()
    model.zero_grad()
    loss_and_logits(model, numbers, facts, mode, form)[0].backward()
    norms = facts["gradnorm" if form == "packed" else "gradnorm_rows"][mode]
    for name, gradient in banked(model).items():
        assert gradient.norm().item() == pytest.approx(norms[name], rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("mode", MODES)
def test_every_execution_leaves_the_published_stream(mode: str) -> None:
    model, numbers, _ = kit()
    step = golden_kit.step_of(PR1855, f"act/{mode}/x0")
    batch = one_row(numbers, numbers["cu_seqlens"])
    with torch.no_grad():
        x0 = model.embedded(batch.input_ids)
        context = model.context(batch.input_ids, x0, batch.documents, looping=mode == "on")
        lanes = x0, None
        torch.testing.assert_close(x0[0, ::step], numbers["act/x0"], rtol=3e-5, atol=2e-6)
        for place, layer in enumerate(context.plan):
            lanes = model.layer(place, lanes, context)
            context.outputs.append(lanes)
            names = ("_lane0", "_lane1") if layer.two_lanes else ("",)
            for lane, name in zip(lanes, names, strict=False):
                key = f"act/{mode}/exec_{place:02}{name}_block_{layer.block}"
                assert lane is not None
                torch.testing.assert_close(lane[0, ::step], numbers[key], rtol=3e-5, atol=2e-5)
        hidden = model.hidden(batch.input_ids, batch.documents, looping=mode == "on")
    published = numbers[f"act/{mode}/final_norm"]
    torch.testing.assert_close(hidden[0, ::step], published, rtol=3e-5, atol=2e-5)


@pytest.mark.parametrize("case", golden_kit.facts(PR1855, "schedule_loops_groups")["loops"])
def test_layers_are_executed_in_the_published_order(case: dict) -> None:
    sizes = {name: case[name] for name in ("num_layers", "loop_start", "loop_end", "num_loops")}
    cfg = Config(**sizes, xsa_last_n=0, ve_layers="")
    for looping, suffix in ((True, ""), (False, "_off")):
        plan = plan_layers(cfg.for_model(), looping)
        encoder, decoder = case[f"encoder{suffix}"], case[f"decoder{suffix}"]
        assert [layer.block for layer in plan] == encoder + decoder
        popped = list(reversed(range(len(encoder))))
        skips = [layer.skip_from for layer in plan[len(encoder) :]]
        assert skips == (popped + [None])[: len(decoder)]
        rows = [layer.skip_row for layer in plan if layer.skip_row is not None]
        assert rows == list(range(len(encoder)))
    with torch.device("meta"):
        assert len(train_gpt.GPT(cfg).skip_weights) == case["num_skip_weights"]


CU_EXAMPLES = golden_kit.facts(PR1855, "model")["cu_examples"]


@pytest.mark.parametrize("case", [case for case in CU_EXAMPLES if case["max_doc_len"]])
def test_documents_begin_where_the_published_ones_do(case: dict) -> None:
    """At BOS, and the longest allowed number of tokens after; a row's own begin is one, too."""
    ids = torch.full((1, case["total"]), 5)
    ids[0, case["bos"]] = BOS
    batch = Batch(ids, ids).by_document(case["max_doc_len"])
    assert batch.boundaries is not None
    assert batch.boundaries.unique().tolist() == sorted(set(case["cu"]))
    assert batch.boundaries.dtype == torch.int32
    assert batch.boundaries.sort().values.equal(batch.boundaries)
    assert len(batch.boundaries) % 64 == 0


@pytest.mark.parametrize("mode", MODES)
def test_nothing_leaks_across_a_boundary(mode: str) -> None:
    """The token before BOS changes no logit from BOS on, bit for bit."""
    model, numbers, _ = kit()
    assert leak(model, numbers, mode) == 0.0
    unmasked = GPT(replace(model.cfg, smear_bos_mask=False))  # as #2135 ran
    unmasked.load_state_dict(model.state_dict())
    assert leak(unmasked, numbers, mode) > 0.0


def test_the_loop_of_the_kit_is_the_published_one() -> None:
    model, _, _ = kit()
    assert {name: getattr(model.cfg, name) for name in LOOPS} == LOOPS
