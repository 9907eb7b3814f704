"""docs/scaling.md: its tables are those of scripts/scaling.py, and its crossing points are where costs cross."""

from pathlib import Path

import pytest

from scripts.scaling import HEADS, LAYOUTS, cost, table

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_tables(head):
    assert table(head) in DOCUMENT, "run `python scripts/scaling.py` and paste what it prints"


def test_one_row_by_hand():
    """Llama 3 8B on 64 GPUs, 16,384 tokens each: V H = 525,336,576."""
    by_hand = cost(HEADS[0], "data, weight sharded", 64)
    assert by_hand.seconds == pytest.approx(3 * 21.79e-3, rel=1e-3)
    assert by_hand.state_bytes == 16 * 525_336_576 / 64
    assert by_hand.nvlink_bytes == 7 / 8 * 6 * 525_336_576 and by_hand.card_bytes == 7 / 64 * 6 * 525_336_576
    vocabulary = cost(HEADS[0], "vocabulary x data", 64)
    assert vocabulary.nvlink_bytes == 7 / 8 * 10 * 131_072 * 4_096 + 7 * 12 * 131_072
    assert vocabulary.card_bytes == 7 / 8 * 525_336_576


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
@pytest.mark.parametrize("quantity, tokens", [("nvlink_bytes", 9_600), ("working_bytes", 12_100)])
def test_where_the_vocabulary_crosses_the_data(head, quantity, tokens):
    _, sharded, vocabulary, _ = LAYOUTS
    less, more = (
        [getattr(cost(head, layout, 8, near), quantity) for layout in (sharded, vocabulary)]
        for near in (tokens - 200, tokens + 200)
    )
    assert less[1] < less[0] and more[1] > more[0]
