"""Text that a model draws: the kept keys and values, what is drawn, the verb."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import TinyData
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import BARE_ENVIRONMENT, TRAINER, environment, tiny_job

import train_gpt
from train_gpt import GPT, CachedAttention, Config

CPU = torch.device("cpu")
VARIANTS = {
    "defaults": {},
    "mixed values": {"vrl_mode": "mix", "backout_mode": "cache", "cache_layer": 1},
    "added values": {"vrl_mode": "add", "backout_mode": "mid", "rope_ntk_ref": 8},
    "plain": {"smear_enabled": False, "bigram_vocab_size": 0, "xsa_last_n": 0, "rope_dims": 0},
}


def random_model(kernel: object = train_gpt.sdpa_attention, **changed: object) -> GPT:
    """A small model with random weights everywhere."""
    cfg = Config(
        **{
            "vocab_size": 40,
            "num_layers": 4,
            "model_dim": 16,
            "num_heads": 4,
            "num_kv_heads": 2,
            "rope_dims": 4,
            "xsa_last_n": 3,
            "ve_layers": "1,2",
            "bigram_vocab_size": 64,
            "eval_seq_len": 24,
            "eval_stride": 8,
            **changed,
        }
    )
    torch.manual_seed(3)
    model = GPT(cfg, kernel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("changed", VARIANTS.values(), ids=VARIANTS.keys())
def test_kept_keys_and_values_give_what_the_whole_row_gives(changed: dict) -> None:
    """Token by token with the cache, against whole rows of full length without one."""
    cache = CachedAttention()
    model = random_model(cache, **changed)
    whole = random_model(**changed)
    ids = [1, 5, 9, 1, 7, 30, 2, 2, 11, 39, 4, 8]
    row = torch.zeros(1, 24, dtype=torch.int64)
    row[0, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        expected = whole.logits(whole.hidden(row))[0]
        for length in range(5, len(ids) + 1):
            begins = length == 5
            shown = ids[:length] if begins else ids[length - 1 - train_gpt.LOOKS_BACK : length]
            cache.begin(new=length if begins else 1, forget=begins)
            model.row_place = (length - len(shown), 24)
            last = model.logits(model.hidden(torch.tensor([shown]))[:, -1:])[0, 0]
            torch.testing.assert_close(last, expected[length - 1], rtol=0, atol=2e-5)


def test_a_full_row_goes_on_and_the_draw_repeats() -> None:
    cache = CachedAttention()
    model = random_model(cache)
    cfg = Config(**{**vars(model.cfg), "sample_tokens": 60, "sample_top_p": 1.0})
    drawn = [list(train_gpt.draw_tokens(model, cache, [1, 6], cfg, CPU)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    other = Config(**{**vars(cfg), "seed": 5})
    assert list(train_gpt.draw_tokens(model, cache, [1, 6], other, CPU)) != drawn[0]


@settings(deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    st.floats(0.1, 3),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_only_the_likeliest_tokens_are_drawn(
    logits: list[float], temperature: float, top_p: float, seed: int
) -> None:
    """Those before the place at which the probabilities of the likelier ones reach top_p."""
    generator = torch.Generator().manual_seed(seed)
    drawn = train_gpt.draw(torch.tensor(logits), temperature, top_p, generator)
    shares = torch.softmax(torch.tensor(logits) / temperature, 0)
    likelier = shares[shares > shares[drawn]].sum()
    assert likelier < top_p or likelier == 0
    assert train_gpt.draw(torch.tensor(logits), 0.0, top_p, generator) == int(
        torch.tensor(logits).argmax()
    )


def test_the_draw_has_the_model_s_frequencies() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(1)
    drawn = [train_gpt.draw(logits, 1.0, 1.0, generator) for _ in range(4000)]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(frequencies, torch.softmax(logits, 0), rtol=0, atol=0.03)


def test_the_verb_writes_text_of_an_artifact(tiny_data: TinyData, tmp_path, capsys) -> None:
    with environment(**tiny_job(tiny_data, tmp_path, "drawn", ITERATIONS="2")):
        assert train_gpt.main([]) == 0
    artifact = tmp_path / "drawn" / "artifact.bin"
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        with environment(
            TOKENIZER_PATH=str(tiny_data.tokenizer_path), SEED=seed, SAMPLE_TOKENS="20"
        ):
            assert train_gpt.main(["--sample", str(artifact), "an be"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("an be") and texts[0] == texts[1] != texts[2]


def test_a_missing_artifact_or_tokenizer_is_refused_in_one_line(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, TRAINER, "--sample", "nowhere.bin"],
        cwd=tmp_path,
        env=BARE_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "nowhere.bin" in done.stderr
