"""Runs that are killed, starved, misled and damaged keep what the trainer promises (inject.py)."""

from __future__ import annotations

import pytest
from inject import FRESH, KINDS, bench, inject_all


def test_a_few_faults_of_each_kind() -> None:
    chosen = [(kind, number) for kind, (_, _, few) in KINDS.items() for number in range(few)]
    assert len(chosen) >= 30
    with bench() as made:
        broken, injected = inject_all(made, chosen)
    assert not broken, "\n".join(broken)
    assert injected >= 0.8 * len(chosen)  # some come too late on a machine that is fast or slow


def test_the_set_is_as_large_as_was_promised() -> None:
    assert sum(many for _, many, _ in KINDS.values()) >= 300
    assert sum(KINDS[kind][1] for kind in FRESH) == 59


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_fault() -> None:
    chosen = [(kind, number) for kind, (_, many, _) in KINDS.items() for number in range(many)]
    with bench() as made:
        broken, injected = inject_all(made, chosen)
    assert not broken, "\n".join(broken)
    assert injected >= 290
