"""Shared set-up: the repository root on sys.path, and a data set of a few thousand tokens."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # tests side by side share the cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

BOS_ID = 1
VOCAB_SIZE = 320
SYLLABLES = ("an", "be", "cor", "de", "fo", "gra", "in", "ka", "lo", "men", "or", "sto", "ta", "wi")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of few tests, whose tests take longest: a core idles at the end else."""
    tests_of = Counter(item.path for item in items)
    items.sort(key=lambda item: tests_of[item.path])


@dataclass(frozen=True)
class TinyData:
    """A tokenizer, two training shards and a validation shard, ready for train_gpt.py."""

    data_path: Path
    tokenizer_path: Path

    @property
    def env(self) -> dict[str, str]:
        """The settings that point a run at this data."""
        return {
            "DATA_PATH": str(self.data_path),
            "TOKENIZER_PATH": str(self.tokenizer_path),
            "VOCAB_SIZE": str(VOCAB_SIZE),
        }


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only make a second thread wait, for long where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_documents(num_words: int, seed: int) -> list[str]:
    """Return documents of 50 to 150 words in which some words are far likelier than others."""
    rng = random.Random(seed)
    words = ["".join(random.Random(i).choices(SYLLABLES, k=1 + i % 3)) for i in range(200)]
    documents = []
    while num_words > 0:
        length = rng.randint(50, 150)
        text = " ".join(words[min(int(rng.expovariate(0.04)), 199)] for _ in range(length))
        # Digits are split, rare characters fall back to bytes, and line ends must survive.
        rare = chr(rng.randint(0x4E00, 0x9FFF)) if len(documents) % 8 == 0 else "-"
        documents.append(f"{text.capitalize()}, {rng.randint(0, 999)}.\n{rare} {rng.choice(words)}")
        num_words -= length
    return documents


def train_tokenizer(sentences: Iterable[str], **changes: object) -> bytes:
    """Return a SentencePiece model, made as data/prepare.py makes one but for `changes`."""
    model = io.BytesIO()
    options: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": VOCAB_SIZE,
        "character_coverage": 0.999,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "pad_id": 0,
        "bos_id": BOS_ID,
        "eos_id": 2,
        "unk_id": 3,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **(options | changes)
    )
    return model.getvalue()


def write_shard(path: Path, documents: list[list[int]]) -> int:
    """Write one shard (each document: BOS, then its tokens) and return its number of tokens."""
    tokens = np.array([t for ids in documents for t in (BOS_ID, *ids)], dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return len(tokens)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """make_tiny_data's, in a folder with a space in its name."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny data"))


@pytest.fixture(scope="session")
def few_data(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Some 2,000 training tokens and 200 to score, for runs whose score says little."""
    return write_data(
        tmp_path_factory.mktemp("few data"),
        tiny_data.tokenizer_path.read_bytes(),
        [make_documents(num_words=400, seed=3)],
        make_documents(num_words=60, seed=4),
    )


def make_tiny_data(folder: Path) -> TinyData:
    """Two training shards of about 40,000 tokens and a validation shard of about 6,000."""
    train_texts = [make_documents(num_words=14_000, seed=shard) for shard in range(2)]
    val_texts = make_documents(num_words=2_100, seed=2)
    tokenizer = train_tokenizer([text for shard in train_texts for text in shard])
    return write_data(folder, tokenizer, train_texts, val_texts)


def write_data(
    folder: Path, tokenizer: bytes, train_texts: list[list[str]], val_texts: list[str]
) -> TinyData:
    """Write shards of these texts, the tokenizer and the side file, as data/prepare.py does."""
    data_path = folder / "datasets" / "tiny_sp320"
    tokenizer_path = folder / "tokenizers" / "tiny_320_bpe.model"
    data_path.mkdir(parents=True)
    tokenizer_path.parent.mkdir()
    tokenizer_path.write_bytes(tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    train_tokens = sum(
        write_shard(data_path / f"fineweb_train_{i:06d}.bin", processor.encode(texts))
        for i, texts in enumerate(train_texts)
    )
    val_ids = processor.encode(val_texts)
    val_shard = data_path / "fineweb_val_000000.bin"
    val_tokens = write_shard(val_shard, val_ids)

    sidecar = {
        "format": 1,
        "dataset": data_path.name,
        "documents": len(val_texts),
        "tokens": val_tokens,
        "raw_bytes": sum(len(text.encode()) for text in val_texts),
        "encoded_bytes": sum(len(text.encode()) for text in processor.decode(val_ids)),
        "val_shards": {val_shard.name: hashlib.sha256(val_shard.read_bytes()).hexdigest()},
        "tokenizer": {
            "file": tokenizer_path.name,
            "sha256": hashlib.sha256(tokenizer_path.read_bytes()).hexdigest(),
            "vocab_size": processor.vocab_size(),
            "bos_id": processor.bos_id(),
        },
        "split": "by seed",
        "shared_documents": 0,
        "train": {"documents": sum(map(len, train_texts)), "tokens": train_tokens},
        "builder": {},
    }
    (data_path / "fineweb_val.json").write_text(json.dumps(sidecar, indent=1) + "\n")
    return TinyData(data_path, tokenizer_path)
