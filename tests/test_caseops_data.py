"""CaseOps from a text to a score: what is written, what is counted, and what is drawn."""

from __future__ import annotations

import io
import json
import math
import random
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import ROOT, TinyData
from hub_server import HubServer, Repository
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import environment, events, tiny_job
from test_caseops import PUBLISHED_STYLE, TEXTS
from test_fineweb import NAME, shard

import train_gpt
from data import caseops, prepare

VOCAB = 400
WORDS = ["The", "NASA", "Launch", "an", "iPhone;", "McDonald", "DON'T", "ABc", "17", "go"]
WORDS += ["\u00c9COLE", "\ue004", "\ufb01n\n"]
MARKED_NAME = "fineweb10B_sp1024_lossless_caps_caseops_v1_reserved"


def make_texts(number: int, seed: int = 0) -> list[str]:
    """Documents of some lines of words with capitals, white space at some of the ends."""
    rng = random.Random(seed)
    lines = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line]
    texts = []
    for _ in range(number):
        parts = [*rng.choices(WORDS, k=9), rng.choice(lines)]
        rng.shuffle(parts)
        texts.append(rng.choice(["", "", "  ", "\n"]) + " ".join(parts) + rng.choice(["", " \n"]))
    return list(dict.fromkeys(texts))


def prepared(out: Path, texts: list[str], *more: str) -> Path:
    """Prepare texts with CaseOps; return the data set's folder."""
    out.mkdir(parents=True, exist_ok=True)
    source = out / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--caseops", "--name", "t", "--val-fraction", "0.3", "--shard-tokens", "4000"]
    assert prepare.main(["text", str(source), "--out", str(out), *options, *more]) == 0
    return next((out / "datasets").glob("t_case*"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(400)


@pytest.fixture(scope="module")
def built(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """A data set with a tokenizer of its own; shared, so not to be changed."""
    out = tmp_path_factory.mktemp("case")
    folder = prepared(out, texts, "--vocab-size", str(VOCAB))
    return TinyData(folder, out / "tokenizers" / f"t_{VOCAB}_bpe_case.model")


@pytest.fixture(scope="module")
def folding(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """A data set with a given tokenizer that folds white space, as the published one does."""
    out = tmp_path_factory.mktemp("folding")
    model = out / "folding.model"
    model.write_bytes(PUBLISHED_STYLE.serialized_model_proto())
    return TinyData(prepared(out, texts, "--tokenizer", str(model)), model)


@pytest.fixture
def copied(folding: TinyData, tmp_path: Path) -> TinyData:
    """A copy that a test may damage."""
    folder = tmp_path / "datasets" / folding.data_path.name
    shutil.copytree(folding.data_path, folder)
    tokenizer = tmp_path / "tokenizers" / folding.tokenizer_path.name
    tokenizer.parent.mkdir()
    shutil.copy(folding.tokenizer_path, tokenizer)
    return TinyData(folder, tokenizer)


def documents_and_bytes(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each validation document's tokens, and the bytes of each of them."""
    tokens, counts = (
        np.concatenate([prepare.read_tokens(path) for path in prepare.shard_paths(folder, split)])
        for split in ("val", "val_bytes")
    )
    starts = np.flatnonzero(tokens == 1)[1:]
    return list(zip(np.split(tokens, starts), np.split(counts, starts), strict=True))


def config_of(data: TinyData, **changed: object) -> train_gpt.Config:
    return train_gpt.Config(
        data_path=str(data.data_path),
        tokenizer_path=str(data.tokenizer_path),
        vocab_size=prepare.load_tokenizer(data.tokenizer_path).vocab_size,
        **changed,
    )


def held_out(texts: list[str]) -> list[str]:
    """The texts that belong to validation, in order."""
    limit = int(0.3 * 2**64)
    return [text for text in texts if prepare.Document(text, "").key < limit]


# What is written


def test_every_document_comes_back_and_each_of_its_bytes_is_counted(
    texts: list[str], built: TinyData
) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(built.tokenizer_path))
    found = []
    for ids, counts in documents_and_bytes(built.data_path):
        text = caseops.inverse(tokenizer.decode(ids.tolist()))
        assert counts.sum() == len(text.encode())
        found.append(text)
    assert found == held_out(texts)
    paths = prepare.shard_paths(built.data_path, "train")
    train = [
        caseops.inverse(tokenizer.decode(ids.tolist())) for ids in prepare.iter_documents(paths)
    ]
    assert train == [text for text in texts if text not in set(found)]
    assert len(prepare.shard_paths(built.data_path, "val")) > 1
    sidecar = prepare.read_json(built.data_path / prepare.SIDECAR)
    size = sum(len(text.encode()) for text in found)
    assert sidecar["raw_bytes"] == sidecar["encoded_bytes"] == size
    assert sidecar["caseops"]["published_bytes"] == size
    assert sidecar["caseops"]["transform"] == caseops.NAME


def test_a_tokenizer_that_folds_space_counts_all_bytes_too(
    texts: list[str], folding: TinyData
) -> None:
    sums = [int(counts.sum()) for _, counts in documents_and_bytes(folding.data_path)]
    assert sums == [len(text.encode()) for text in held_out(texts)]
    sidecar = prepare.read_json(folding.data_path / prepare.SIDECAR)
    lost = sum(len(text) - len(text.strip()) for text in held_out(texts))
    assert sidecar["encoded_bytes"] - sidecar["caseops"]["published_bytes"] == lost > 0


def test_the_same_command_knows_what_it_made(
    texts: list[str], built: TinyData, tmp_path: Path, capsys
) -> None:
    folder = built.data_path
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = folder.parents[1]
    capsys.readouterr()
    prepared(out, texts, "--vocab-size", str(VOCAB))
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    plain = tmp_path / "plain"
    shutil.copytree(out, plain)
    (plain / "datasets" / folder.name / "fineweb_val_bytes_000000.bin").unlink()
    argv = ["text", str(plain / "texts.jsonl"), "--out", str(plain), "--caseops", "--name", "t"]
    assert prepare.main([*argv, "--vocab-size", str(VOCAB)]) == 2
    assert "not the validation shards" in capsys.readouterr().err


def test_adopted_shards_are_counted_by_their_bytes(copied: TinyData, capsys) -> None:
    path = copied.data_path / prepare.SIDECAR
    made = prepare.read_json(path)
    path.unlink()
    argv = ["adopt", str(copied.data_path), "--tokenizer", str(copied.tokenizer_path)]
    assert prepare.main(argv) == 0
    found = prepare.read_json(path)
    unknown = {"raw_bytes", "shared_documents", "split", "builder", "caseops"}
    assert {key for key in made if found[key] != made[key]} == unknown
    assert found["caseops"]["val_bytes"] == made["caseops"]["val_bytes"]
    assert prepare.main(argv) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_published_data_set_is_read_as_it_is(tmp_path: Path, monkeypatch) -> None:
    texts = ["The NASA Launch", " iPhone ", "\ufb01n DON'T"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=caseops.transformed(make_texts(400)),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **caseops.TRAINER_OPTIONS,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pairs = [caseops.tokens_and_bytes(tokenizer, text, published=True) for text in texts]
    tokens, counts = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    remote = f"datasets/datasets/{MARKED_NAME}"
    name = "fineweb_1024_bpe_lossless_caps_caseops_v1_reserved.model"
    files = {
        f"{remote}/fineweb_train_000000.bin": shard(tokens),
        f"{remote}/fineweb_val_000000.bin": shard(tokens),
        f"{remote}/fineweb_val_bytes_000000.bin": shard(counts),
        f"datasets/tokenizers/{name}": model.getvalue(),
    }
    monkeypatch.setattr(prepare, "FINEWEB_VARIANTS", {"sp1024": tokenizer.vocab_size()})
    name = name.replace("1024", str(tokenizer.vocab_size()))
    files[f"datasets/tokenizers/{name}"] = model.getvalue()
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", NAME)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")
    argv = ["fineweb", "--variant", "sp1024", "--caseops", "--train-shards", "1"]
    argv += ["--skip-manifest", "--out", str(tmp_path)]
    with HubServer(Repository(NAME, files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        assert prepare.main(argv) == 0
    data = TinyData(tmp_path / "datasets" / MARKED_NAME, tmp_path / "tokenizers" / name)
    sidecar = prepare.read_json(data.data_path / prepare.SIDECAR)
    assert sidecar["encoded_bytes"] == sum(len(text.strip().encode()) for text in texts)
    assert sidecar["raw_bytes"] is sidecar["caseops"]["published_bytes"] is None
    val = train_gpt.load_validation(config_of(data))
    assert val.target_bytes.tolist() == counts[1:].tolist()
    assert "not recorded" in val.accounting


def test_a_hold_out_of_marked_text_counts_by_file(
    texts: list[str], built: TinyData, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(built.data_path.parents[1], tmp_path / "data")
    folder = tmp_path / "data" / "datasets" / built.data_path.name
    monkeypatch.setattr(sys, "argv", ["holdout.py", str(folder), "--share", "0.2"])
    runpy.run_path(str(ROOT / "benchmarks" / "holdout.py"), run_name="__main__")
    held = folder.with_name(f"{folder.name}_holdout")
    chosen = [text for text in texts if prepare.Document(text, "").key >= 0.8 * 2**64]
    data = TinyData(held, tmp_path / "data" / "tokenizers" / built.tokenizer_path.name)
    val = train_gpt.load_validation(config_of(data))
    assert val.documents == len(chosen) > 0
    assert val.recorded_bytes == sum(len(text.encode()) for text in chosen)


# What the trainer makes of it


def test_bytes_of_targets_are_those_of_the_file(folding: TinyData) -> None:
    val = train_gpt.load_validation(config_of(folding))
    pairs = documents_and_bytes(folding.data_path)
    counts = np.concatenate([counts for _, counts in pairs])
    assert val.target_bytes.tolist() == counts[1:].tolist()
    assert len(val.tokens) == len(counts)
    lost = (
        val.recorded_bytes
        - prepare.read_json(folding.data_path / prepare.SIDECAR)["caseops"]["published_bytes"]
    )
    assert f"leaves {lost:,} out" in val.accounting and f"{val.recorded_bytes:,}" in val.accounting


def edit_sidecar(data: TinyData, **changed: object) -> None:
    path = data.data_path / prepare.SIDECAR
    prepare.write_json(path, {**json.loads(path.read_bytes()), **changed})


def edit_bytes(data: TinyData, change) -> Path:
    """Change the first file of bytes."""
    path = caseops.sidecar_path(data.data_path, 0)
    tokens = np.array(prepare.read_tokens(path))
    prepare.write_shard(path, change(tokens))
    return path


def record_again(data: TinyData, path: Path) -> None:
    """Let the sidecar have the hash that a file of bytes has now."""
    caseops_facts = json.loads((data.data_path / prepare.SIDECAR).read_bytes())["caseops"]
    caseops_facts["val_bytes"][path.name] = prepare.file_sha256(path)
    edit_sidecar(data, caseops=caseops_facts)


DAMAGES = {
    "another file": (lambda d: edit_bytes(d, lambda x: np.roll(x, 1)), "not those its"),
    "no file": (lambda d: caseops.sidecar_path(d.data_path, 0).unlink(), "not those its"),
    "a shorter file": (
        lambda d: record_again(d, edit_bytes(d, lambda x: x[:-1])),
        "and fineweb_val_000000.bin has others",
    ),
    "another sum": (
        lambda d: record_again(d, edit_bytes(d, lambda x: x + (np.arange(len(x)) == 9))),
        "bytes",
    ),
    "a sidecar that knows of none": (lambda d: edit_sidecar(d, caseops={"val_bytes": {}}), "marks"),
    "a damaged entry": (lambda d: edit_sidecar(d, caseops="yes"), "damaged"),
    "half an entry": (lambda d: edit_sidecar(d, caseops={}), "damaged"),
    "another half": (lambda d: edit_sidecar(d, caseops={"val_bytes": ["x"]}), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_bytes_that_do_not_belong_to_the_shards_are_refused(case: str, copied: TinyData) -> None:
    damage, said = DAMAGES[case]
    damage(copied)
    with pytest.raises(train_gpt.Refusal, match=said):
        train_gpt.load_validation(config_of(copied))


def test_the_fingerprint_is_of_the_bytes_too(copied: TinyData) -> None:
    before = train_gpt.load_validation(config_of(copied)).fingerprint

    def moved(counts: np.ndarray) -> np.ndarray:
        first, last = np.flatnonzero(counts)[[0, -1]]
        counts[first] += 1
        counts[last] -= 1
        return counts

    record_again(copied, edit_bytes(copied, moved))
    assert train_gpt.load_validation(config_of(copied)).fingerprint != before


def test_shards_of_bytes_are_no_validation_shards(built: TinyData) -> None:
    names = [path.name for path in train_gpt.shard_paths(str(built.data_path), "val")]
    assert names and not any("bytes" in name for name in names)
    assert names == [path.name for path in prepare.shard_paths(built.data_path, "val")]


def test_bits_per_byte_are_of_the_original_text(
    texts: list[str], folding: TinyData, tmp_path: Path, capsys
) -> None:
    """A run's score, and its log, against a count by hand; --eval and --sample after it."""
    vocab_size = str(config_of(folding).vocab_size)
    here = {"VOCAB_SIZE": vocab_size, "TOKEN_MASK": "1"}
    with environment(**tiny_job(folding, tmp_path, "case", ITERATIONS="3", **here)):
        assert train_gpt.main([]) == 0
    size = sum(len(text.encode()) for text in held_out(texts))
    lost = sum(len(text) - len(text.strip()) for text in held_out(texts))
    scores = events(tmp_path / "case", "eval")
    for score in scores:
        assert score["num_bytes"] == size
        bits = score["val_loss"] * score["targets"] / math.log(2)
        assert score["val_bpb"] == pytest.approx(bits / size, rel=1e-9)
    assert scores[-1]["val_bpb"] < 8
    log = (tmp_path / "case" / "log.txt").read_text("utf-8")
    assert f"val_bytes:{size:,} by file" in log and f"leaves {lost:,} out" in log
    artifact = str(tmp_path / "case" / "artifact.bin")
    where = {
        "DATA_PATH": str(folding.data_path),
        "TOKENIZER_PATH": str(folding.tokenizer_path),
        "RUNS_DIR": str(tmp_path),
        "SAMPLE_TOKENS": "40",
    }
    capsys.readouterr()
    with environment(**where):
        assert train_gpt.main(["--eval", artifact]) == 0
        again = capsys.readouterr().out
        assert train_gpt.main(["--sample", artifact, "An iPhone of NASA"]) == 0
    final = events(tmp_path / "case", "final")[-1]
    assert f"val_bpb:{final['val_bpb']:.8f}" in again
    drawn = capsys.readouterr().out
    assert drawn.startswith("An iPhone of NASA") and not set(drawn) & set(caseops.CONTROLS[:3])


def own(model: object) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_the_trainer_reads_and_writes_as_the_definition_does(text: str) -> None:
    """Its own short form of both ways, against data/caseops.py; of what a model may write, too."""
    marked = train_gpt.WORD_OR_MARK.sub(train_gpt.mark_word, text)
    assert marked == caseops.transform(text)
    assert train_gpt.MARKED.sub(train_gpt.unmark, marked) == text
    assert train_gpt.MARKED.sub(train_gpt.unmark, text) == caseops.inverse(text, strict=False)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS.map(lambda text: text.encode("utf-8", "ignore").decode()), data=st.data())
def test_drawn_text_only_grows(text: str, data: st.DataObject) -> None:
    """What is shown of the first tokens is the beginning of what is shown of more."""
    ids = train_gpt.encode_text(PUBLISHED_STYLE, text)
    ids += data.draw(st.lists(st.integers(4, 60), max_size=8))
    shown = ""
    for end in range(len(ids) + 1):
        longer = train_gpt.decode_text(PUBLISHED_STYLE, ids[:end])
        if not PUBLISHED_STYLE.decode(ids[:end]).endswith("\ufffd"):
            assert longer.startswith(shown)
            shown = longer


def test_a_plain_tokenizer_s_text_stays(tiny_data: TinyData) -> None:
    tokenizer = own(tiny_data.tokenizer_path)
    assert train_gpt.decode_text(tokenizer, train_gpt.encode_text(tokenizer, "An iPhone")) == (
        "An iPhone"
    )
