"""Counts beside the network, against naive statements of the same equations."""

import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import events, launch, tiny_job

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # noqa: E402

BOS = 1


class NaiveKneserNey:
    """Chen & Goodman's model by its definition, in dictionaries of tuples.

    `seen` is counted; discounts and the distribution without a context are those of `lesson`.
    """

    def __init__(self, lesson: list[int], seen: list[int], order: int, vocab_size: int) -> None:
        self.order = order
        self.vocab_size = vocab_size
        self.grams = {k: self.count(seen, k) for k in range(1, order + 1)}
        lesson_grams = {k: self.count(lesson, k) for k in range(1, order + 1)}
        self.grams[1] = lesson_grams[1]
        self.discounts = {k: self.estimate(lesson_grams[k]) for k in range(1, order + 1)}

    def count(self, text: list[int], k: int) -> dict[tuple, int]:
        if k == self.order:
            return Counter(tuple(text[i : i + k]) for i in range(len(text) - k + 1))
        before = defaultdict(set)
        for i in range(len(text) - k):
            before[tuple(text[i + 1 : i + 1 + k])].add(text[i])
            # A longer model tells predecessors apart by the whole longer gram, which is the same.
        return {gram: len(tokens) for gram, tokens in before.items()}

    def estimate(self, grams: dict[tuple, int]) -> list[float]:
        n = [sum(1 for c in grams.values() if c == wanted) for wanted in range(5)]
        if 0 in n[1:]:
            return [0.0, 0.5, 1.0, 1.5]
        Y = n[1] / (n[1] + 2 * n[2])
        estimates = [c - (c + 1) * Y * n[c + 1] / n[c] for c in (1, 2, 3)]
        return [0.0] + [min(max(d, 0.1), c) for c, d in enumerate(estimates, start=1)]

    def prob(self, token: int, context: tuple) -> float:
        k = len(context) + 1
        lower = 1 / self.vocab_size if k == 1 else self.prob(token, context[1:])
        followers = [self.grams[k].get((*context, w), 0) for w in range(self.vocab_size)]
        if not sum(followers):
            return lower
        discount = self.discounts[k]
        left = sum(discount[min(c, 3)] for c in followers)
        count = followers[token]
        return (count - discount[min(count, 3)] + left * lower) / sum(followers)


@st.composite
def texts(draw, longest=90):
    vocab_size = draw(st.integers(2, 6))
    text = draw(st.lists(st.integers(0, vocab_size - 1), min_size=8, max_size=longest))
    if draw(st.booleans()):  # long repeats
        text = text + text[: len(text) // 2]
    return vocab_size, np.array(text)


@settings(deadline=None, max_examples=150)
@given(texts(), st.sets(st.integers(2, 9), min_size=1), st.data())
def test_every_probability_is_that_of_naive_kneser_ney(case, orders, data):
    vocab_size, text = case
    learned = data.draw(st.integers(0, len(text) - 2))
    first = data.draw(st.integers(max(learned, 1), len(text) - 1))
    online = data.draw(st.booleans())
    index = train_gpt.TextIndex(text, max(orders))
    model = train_gpt.CountModel(index, tuple(sorted(orders)), vocab_size, learned)
    places = np.arange(first, len(text))
    probs, seen = model.probs(places, online)
    for each in orders:
        assert np.abs(probs[each].sum(1) - 1).max() < 1e-9
        for row, place in enumerate(places):
            lesson = text[:learned].tolist()
            known = text[:place].tolist() if online else lesson
            naive = NaiveKneserNey(lesson, known, each, vocab_size)
            context = tuple(text[max(place - each + 1, 0) : place].tolist())
            expected = [naive.prob(w, context) for w in range(vocab_size)]
            np.testing.assert_allclose(probs[each][row], expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(texts(), st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_learning_in_steps_is_learning_at_once(case, steps):
    vocab_size, text = case
    index = train_gpt.TextIndex(text, 4)
    until = min(sum(steps), len(text) - 1)
    at_once = train_gpt.CountModel(index, (2, 4), vocab_size, until)
    in_steps = train_gpt.CountModel(index, (2, 4), vocab_size, 0)
    for end in np.cumsum(steps):
        in_steps.learn(min(int(end), until))
    places = np.arange(until, len(text))
    for order in (2, 4):
        expected = at_once.probs(places, online=True)[0][order]
        assert np.array_equal(in_steps.probs(places, online=True)[0][order], expected)


def test_evidence_is_that_of_the_longest_seen_context():
    text = np.array([5, 1, 2, 3, 1, 2, 4, 1, 2, 3, 0, 1, 2])
    model = train_gpt.CountModel(train_gpt.TextIndex(text, 3), (3,), 6, len(text) - 1)
    _, seen = model.probs(np.array([len(text) - 1]), online=False)  # after "0 1": 0 is new there
    assert (seen.order[0], seen.count[0], seen.continuations[0]) == (2, 3, 1)


@settings(deadline=None, max_examples=150)
@given(texts(), st.integers(1, 9), st.integers(1, 9), st.data())
def test_matches_are_the_latest_longest_repeats(case, longest_order, longest_match, data):
    _, text = case
    boundary = data.draw(st.integers(0, len(text) - 1))
    index = train_gpt.TextIndex(text, longest_order, longest_match, boundary)
    for target in range(boundary, len(text)):
        length, source = 0, None
        for place in range(1, boundary or target):
            for wanted in range(1, longest_match + 1):
                context = text[max(place - wanted, 0) : place].tolist()
                same = context == text[max(target - wanted, 0) : target].tolist()
                if place >= wanted and same and wanted >= length:
                    length, source = wanted, place
        assert index.match.length[target - boundary] == length
        if length:
            assert index.match.source[target - boundary] == source


# The mixture


def words(seed: int, length: int, vocab_size: int = 24) -> np.ndarray:
    """Text of a dozen words, the same for every seed, so that counting helps."""
    generator = np.random.default_rng(0)
    vocabulary = [generator.integers(2, vocab_size, generator.integers(2, 6)) for _ in range(12)]
    text = [vocabulary[i] for i in np.random.default_rng(seed).integers(0, 12, length)]
    return np.concatenate([[BOS], *text])[:length]


def network_rows(targets: int, vocab_size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(targets, vocab_size, generator=generator).log_softmax(1)


def mixture_of(mode: str, validation: np.ndarray, **given: str) -> train_gpt.Mixture:
    chosen = {"COUNT_ORDERS": "2,4", "COUNT_CHUNK_TOKENS": "16"}
    cfg, _ = train_gpt.Config.from_env({"COUNTS": mode, **chosen, **given})
    return train_gpt.Mixture(cfg, words(1, 600), validation, 24)


MODES = ("scored", "artifact", "both")
ALONE = {"COUNT_ORDERS": "", "COUNT_RECENT_TOKENS": "0", "COUNT_GATE_RATE": "0"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("given", [{}, ALONE], ids=["all", "hints alone"])
def test_later_tokens_change_no_earlier_nats(mode, cut, given):
    text = words(2, 300)
    other = np.append(text[: cut + 1], words(3, 300 - cut - 1))
    network = network_rows(299)
    changed = network.clone()
    changed[cut:] = network_rows(400)[-(299 - cut) :]
    nats = mixture_of(mode, text, **given).score(network)
    again = mixture_of(mode, other, **given).score(changed)
    assert torch.equal(nats[:cut], again[:cut])
    assert not torch.equal(nats[cut:], again[cut:])


@pytest.mark.parametrize("mode", MODES)
def test_how_rows_are_dealt_to_calls_changes_nothing(mode):
    text = words(2, 200)
    network = network_rows(199)
    at_once = mixture_of(mode, text).score(network)
    mixture = mixture_of(mode, text)
    pieces = [mixture.score(rows) for rows in network.split([1, 15, 40, 3, 100, 40])]
    torch.testing.assert_close(torch.cat(pieces), at_once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_mixture_sums_to_one_and_uses_counts(mode):
    text = words(2, 1500)
    network = network_rows(1499)
    mixture = mixture_of(mode, text)
    nats = mixture.score(network)
    assert mixture.largest_sum_error < 1e-12
    uniform = np.log(24)
    assert nats[700:].mean() < 0.7 * uniform
    mixed, _ = mixture_of(mode, text).mix(network[:16].double())
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(16, dtype=torch.float64))


@pytest.mark.parametrize("window", [17, 60, 200])
def test_what_the_mask_forbids_stays_so_when_recent_tokens_leave(window):
    """No token follows itself in this text, nor may it; the window of recent ones moves on."""
    text = words(3, 700)
    text = text[np.insert(text[1:] != text[:-1], 0, True)]
    network = network_rows(len(text) - 1)
    network[torch.arange(len(text) - 1), torch.from_numpy(text[:-1].astype(np.int64))] = -torch.inf
    mixture = mixture_of("both", text, COUNT_RECENT_TOKENS=str(window))
    nats = mixture.score(network.log_softmax(1))
    assert torch.isfinite(nats).all()
    assert mixture.largest_sum_error < 1e-9
    alone = train_gpt.expect_recent(text, 1, window, np.zeros((len(text) - 1, 24)))
    assert (alone >= 0).all()


def test_matches_alone_tilt_the_network():
    text = words(2, 1500)
    mixture = mixture_of("scored", text, COUNT_ORDERS="", COUNT_RECENT_TOKENS="0")
    network = network_rows(1499)
    nats = mixture.score(network)
    target = torch.from_numpy(text[1:].astype(np.int64))
    alone = -network.gather(1, target[:, None]).squeeze(1)
    assert len(mixture.start) == 1  # the network's
    assert nats[700:].mean() < 0.8 * alone[700:].mean()


@pytest.mark.parametrize("mode", ["scored", "both"])
def test_tilting_by_hints_is_the_mixture_of_weight_one(mode):
    text = words(2, 700)
    network = network_rows(699)
    tilting, mixing = (mixture_of(mode, text, **ALONE) for _ in range(2))
    assert not tilting.gates
    # A mixture over the whole vocabulary, whose only weight is 1 and stays so.
    mixing.gates = [train_gpt.AdagradTable((size, 1), 0.0) for size in mixing.gate_sizes()]
    mixing.start = torch.ones(1, dtype=torch.float64)
    rows = network.double().log_softmax(1)
    torch.testing.assert_close(tilting.score(rows), mixing.score(rows), rtol=0, atol=1e-9)
    for one, two in zip(tilting.biases, mixing.biases, strict=True):
        torch.testing.assert_close(one.values, two.values, rtol=0, atol=1e-9)
    assert any(table.values.abs().max() > 1 for table in tilting.biases)


def test_tilting_costs_and_gains_nothing_without_hints():
    text = words(2, 100)
    mixture = mixture_of("scored", text, COUNT_LONGEST_MATCH="0", **ALONE)
    rows = network_rows(99).double().log_softmax(1)
    mixture.start[:] = 1
    target = torch.from_numpy(text[1:].astype(np.int64))
    alone = -rows.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(mixture.score(rows), alone, rtol=0, atol=1e-9)


def test_both_texts_beat_either():
    text = words(2, 1500)
    nats = {mode: float(mixture_of(mode, text).score(network_rows(1499)).sum()) for mode in MODES}
    assert nats["both"] < min(nats["scored"], nats["artifact"])


def test_a_static_mixture_keeps_its_state():
    text = words(2, 300)
    mixture = mixture_of("artifact", text, COUNT_GATE_RATE="0", COUNT_MATCH_RATE="0")
    mixture.score(network_rows(299))
    fresh = mixture_of("artifact", text)
    for table, start in zip(
        mixture.gates + mixture.biases, fresh.gates + fresh.biases, strict=True
    ):
        assert torch.equal(table.values, start.values)
    assert mixture.model.learned == 600


def test_gradients_are_those_of_the_nats():
    text = words(2, 400)
    mixture = mixture_of("both", text)
    network = network_rows(399)
    mixture.score(network[:128])
    rows = network[128:144].double()
    target = torch.from_numpy(text[129:145].astype(np.int64))

    def total_nats() -> float:
        return -float(mixture.mix(rows)[0].gather(1, target[:, None]).sum())

    _, lesson = mixture.mix(rows)
    lesson = lesson.graded(target)
    tables = [(gate, bucket) for gate, bucket in zip(mixture.gates, lesson.buckets, strict=True)]
    checks = [(gate.values, bucket, lesson.weight_gradients) for gate, bucket in tables]
    assert len(mixture.biases) == 4
    for m, bias in enumerate(mixture.biases):
        for buckets in lesson.bias_buckets[m]:
            checks.append((bias.values, buckets, lesson.bias_gradients[m]))
    for values, bucket, gradients in checks:
        total = torch.zeros_like(values).index_add_(0, bucket, gradients)
        for place in total.nonzero()[:6].tolist():
            step = 1e-5
            values[tuple(place)] += step
            above = total_nats()
            values[tuple(place)] -= 2 * step
            below = total_nats()
            values[tuple(place)] += step
            assert (above - below) / (2 * step) == pytest.approx(
                float(total[tuple(place)]), rel=1e-4, abs=1e-6
            )


def test_learning_follows_adagrad():
    table = train_gpt.AdagradTable((2,), rate=0.5)
    table.step(torch.tensor([0, 0]), torch.tensor([3.0, 1.0], dtype=torch.float64))
    table.step(torch.tensor([0, 1]), torch.tensor([-2.0, 0.0], dtype=torch.float64))
    squares = [1 + 9 + 1, 1 + 9 + 1 + 4]
    expected = -0.5 * 4 / squares[0] ** 0.5 + 0.5 * 2 / squares[1] ** 0.5
    assert table.values.tolist() == pytest.approx([expected, 0.0])


def rows_of_a_network(n: int) -> np.ndarray:
    return network_rows(n).double().softmax(1).numpy()


@pytest.mark.parametrize("first", [3, 41])
@pytest.mark.parametrize("W", [1, 7, 2048])
def test_recent_tokens_are_those_of_the_window(first, W):
    text = words(2, 100)
    network = rows_of_a_network(8)
    rows = train_gpt.expect_recent(text, first, W, network)
    for row in range(8):
        place = first + row
        weights = train_gpt.RECENT_NETWORK * network[row]
        for age, source in enumerate(range(place - 1, max(place - W, 0) - 1, -1)):
            weights[text[source]] += train_gpt.RECENT_DECAY**age
        np.testing.assert_allclose(rows[row], weights / weights.sum(), atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(texts(), st.integers(1, 60), st.data())
def test_followers_are_the_latest_of_the_last_token(case, W, data):
    vocab_size, text = case
    first = data.draw(st.integers(1, len(text) - 1))
    network = rows_of_a_network(len(text) - first)[:, :vocab_size]
    previous = train_gpt.previous_places(text)
    rows = train_gpt.expect_followers(text, previous, first, W, network)
    for row, place in enumerate(range(first, len(text))):
        near = range(place - 2, max(place - W, 0) - 1, -1)
        found = [text[j + 1] for j in near if text[j] == text[place - 1]]
        weights = train_gpt.FOLLOWERS_NETWORK * network[row]
        for age, token in enumerate(found[: train_gpt.FOLLOWERS]):
            weights[token] += train_gpt.FOLLOWER_DECAY**age
        expected = weights / (weights.sum() + 3.0 * (1 - network[row].sum()))
        np.testing.assert_allclose(rows[row], expected, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(texts())
def test_the_hint_of_the_last_follower(case):
    _, text = case
    previous = train_gpt.previous_places(text)
    gaps = train_gpt.gap_classes(previous)
    hint = train_gpt.hint_of_last_follower(text, previous, gaps)
    for place in range(len(text)):
        sources = [j for j in range(place - 1) if text[j] == text[place - 1]]
        expected = text[sources[-1] + 1] if sources else -1
        assert hint.tokens[place] == expected
        bits = (place - 1 - sources[-1]).bit_length() if sources else 0
        assert hint.strength[place] == min(bits, train_gpt.GAP_CLASSES - 1)


def test_a_repeat_is_followed_past_a_difference_and_given_up():
    phrase = list(range(2, 22))
    noise = list(range(60, 80))
    changed = phrase[:10] + [40] + phrase[11:]
    text = np.array([BOS, *phrase, 50, *changed, *noise], np.uint16)
    index = train_gpt.TextIndex(text, 1, 8)
    hint = train_gpt.hint_past_differences(text, index.match, 8)
    start = 22  # of the changed phrase
    assert (hint.tokens[: start + 6] == -1).all()  # no repeat is long enough
    assert hint.tokens[start + 6 : start + 20].tolist() == phrase[6:]
    agreed, differed = np.divmod(hint.strength, train_gpt.FOLLOWED_MISSES)
    assert agreed[start + 10 : start + 14].tolist() == [8, 0, 1, 2]
    assert differed[start + 10 : start + 14].tolist() == [0, 1, 1, 1]
    ends = start + 20 + train_gpt.FOLLOWED_MISSES
    assert (hint.tokens[ends : ends + 2] == -1).all()


@settings(deadline=None, max_examples=100)
@given(texts(), st.data())
def test_hints_know_no_later_token(case, data):
    vocab_size, text = case
    text = text.astype(np.uint16)
    cut = data.draw(st.integers(1, len(text) - 1))
    other = text.copy()
    other[cut:] = data.draw(st.integers(0, vocab_size - 1))
    hints = []
    for each in (text, other):
        index = train_gpt.TextIndex(each, 1, 9)
        previous = train_gpt.previous_places(each)
        gaps = train_gpt.gap_classes(previous)
        hints.append(
            (
                train_gpt.hint_of_match(index, 9),
                train_gpt.hint_past_differences(each, index.match, 9),
                train_gpt.hint_of_last_follower(each, previous, gaps),
            )
        )
    for one, two in zip(*hints, strict=True):
        assert np.array_equal(one.tokens[: cut + 1], two.tokens[: cut + 1])
        assert np.array_equal(one.strength[: cut + 1], two.strength[: cut + 1])


@pytest.mark.parametrize(
    "given",
    [
        {"COUNTS": "all"},
        {"COUNT_ORDERS": "1,2"},
        {"COUNT_ORDERS": "2,17"},
        {"COUNT_ORDERS": "3,3"},
        {"COUNT_LONGEST_MATCH": "257"},
        {"COUNT_CHUNK_TOKENS": "0"},
        {"COUNT_RECENT_TOKENS": "-1"},
        {"COUNT_GATE_RATE": "-1"},
        {"COUNTS": "both", "EVAL_STRIDE": "0"},
    ],
)
def test_settings_that_no_mixture_can_have_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(train_gpt.Refusal, match="expected|needs|must"):
        train_gpt.Config.from_env(given)


def test_orders_may_be_listed_in_any_order() -> None:
    """Gates and hints look at the longest order, wherever it stands in the list."""
    assert train_gpt.Config(count_orders="8,2,4").orders == (2, 4, 8)


# Training tokens in the artifact


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 65535), max_size=400))
def test_packing_round_trip(tokens):
    packed = train_gpt.pack_tokens(np.array(tokens, np.uint16))
    assert train_gpt.unpack_tokens(packed, 65536).tolist() == tokens


PACKED_WORDS = train_gpt.pack_tokens(words(1, 500).astype(np.uint16))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_hostile_tokens_are_refused_or_in_range(data):
    packed = bytearray(PACKED_WORDS)
    kind = data.draw(st.sampled_from(["flip", "cut", "extend", "noise"]))
    place = data.draw(st.integers(0, len(packed) - 1))
    if kind == "flip":
        packed[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del packed[place:]
    elif kind == "extend":
        packed += data.draw(st.binary(min_size=1, max_size=20))
    else:
        packed = bytearray(data.draw(st.binary(max_size=300)))
    try:
        tokens = train_gpt.unpack_tokens(bytes(packed), 24)
    except train_gpt.Refusal as error:
        assert "\n" not in str(error)
    else:  # LZMA2 has no checksum, so a flipped bit may give other tokens
        assert kind in ("flip", "noise")
        assert not len(tokens) or tokens.max() < 24


def test_packed_tokens_with_wrong_counts_are_refused():
    tokens = words(1, 500).astype(np.uint16)
    packed = train_gpt.pack_tokens(tokens)
    body = packed[train_gpt.PACKED_COUNT.size :]
    for count in (0, 499, 501, 2**32 - 1):
        with pytest.raises(train_gpt.Refusal, match="training tokens"):
            train_gpt.unpack_tokens(train_gpt.PACKED_COUNT.pack(count) + body, 24)
    with pytest.raises(train_gpt.Refusal, match="outside VOCAB_SIZE=20"):
        train_gpt.unpack_tokens(packed, 20)
    with pytest.raises(train_gpt.Refusal, match="training tokens"):
        train_gpt.unpack_tokens(packed + b"\0", 24)


def test_a_small_count_bounds_what_a_bomb_unpacks_to():
    bomb = train_gpt.pack_tokens(np.zeros(5_000_000, np.uint16))
    assert len(bomb) < 5_000
    with pytest.raises(train_gpt.Refusal, match="promises"):
        train_gpt.unpack_tokens(train_gpt.PACKED_COUNT.pack(10) + bomb[4:], 24)


def documents_of(tokens: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(d) for d in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])]


def test_the_worthiest_documents_are_kept_within_the_limit():
    generator = np.random.default_rng(0)
    phrases = [generator.integers(2, 400, 100) for _ in range(15)]
    useful = [np.append(BOS, phrase) for phrase in phrases]
    useless = [np.append(BOS, generator.integers(2, 400, 400)) for _ in range(42)]
    held_out = [np.concatenate([[BOS], *phrases[i::3]]) for i in range(3)]
    documents = useful + useless
    for i in range(3):
        documents.insert(i * train_gpt.HOLDOUT_EVERY, held_out[i])
    tokens = np.concatenate(documents).astype(np.uint16)
    ranking = [tuple(d) for d in train_gpt.documents_by_worth(tokens, BOS)]
    assert Counter(ranking) == Counter(documents_of(tokens))
    assert set(ranking[:15]) == {tuple(d) for d in useful}
    everything = train_gpt.pack_tokens(tokens)
    assert train_gpt.pack_within(tokens, len(everything), BOS) == everything
    packed = train_gpt.pack_within(tokens, len(everything) // 3, BOS)
    assert len(everything) // 4 < len(packed) <= len(everything) // 3
    kept = documents_of(train_gpt.unpack_tokens(packed, 400))
    assert not Counter(kept) - Counter(documents_of(tokens))
    assert {tuple(d) for d in useful} <= set(kept)


def test_a_limit_below_every_document_is_refused():
    tokens = np.concatenate([words(i, 300) for i in range(50)]).astype(np.uint16)
    with pytest.raises(train_gpt.Refusal, match="holds none"):
        train_gpt.pack_within(tokens, 8, BOS)


# On the trainer itself


def headline(output: str) -> str:
    """The last score that an evaluation printed."""
    return re.findall(r"val_bpb:(\d+\.\d{8})", output)[-1]


@pytest.mark.slow
def test_one_two_and_three_processes_repeat_the_score(tiny_data, tmp_path):
    job = tiny_job(tiny_data, tmp_path, "counted", COUNTS="both", COUNT_BYTES="20000")
    run = launch(**job)
    assert run.returncode == 0, run.stderr
    # The shards of training text are not needed any more.
    alone = tmp_path / "validation alone"
    alone.mkdir()
    for path in Path(job["DATA_PATH"]).glob("*_val*"):
        shutil.copy(path, alone)
    again = {"DATA_PATH": str(alone), "TOKENIZER_PATH": job["TOKENIZER_PATH"]}
    artifact = str(next((tmp_path / "counted").glob("*.bin")))
    scores = {headline(run.stdout)}
    (mixed,) = events(tmp_path / "counted", "counts_mixed")
    assert mixed["sum_error"] < 1e-9
    for processes in (0, 2, 3):
        scored = launch("--eval", artifact, processes=processes, **again, RUNS_DIR=str(tmp_path))
        assert scored.returncode == 0, scored.stderr
        scores.add(headline(scored.stdout))
    assert len(scores) == 1
    network = launch("--eval", artifact, **again, RUNS_DIR=str(tmp_path), COUNTS="off")
    assert float(headline(network.stdout)) > float(scores.pop())
