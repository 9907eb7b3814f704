"""How wide the twins' slices of the vocabulary are, by the cache of the machine they run on."""

import pytest

from copg_kernels.kernels.blocks import SPLIT_TORCH, last_cache_bytes, split_for


@pytest.mark.parametrize(
    ("mebibytes", "entries"), [(0, 3200), (1, 1024), (16, 1536), (32, 3200), (64, 6528), (512, 8192)]
)
def test_a_slice_fits_the_cache(mebibytes, entries):
    assert split_for(mebibytes * 2**20) == entries
    assert entries in (1024, 8192) or entries * 2048 * 4 <= (mebibytes or 32) * 2**20


def test_the_last_level_counts(tmp_path):
    """As Linux writes it: the levels in order, data and instructions of the first apart."""
    for index, size in enumerate(("32K", "32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}/size").write_text(size + "\n")
    assert last_cache_bytes(tmp_path) == 32 * 2**20


def test_a_machine_that_does_not_say(tmp_path):
    assert last_cache_bytes(tmp_path / "none") == 0
    (tmp_path / "index0").mkdir()
    (tmp_path / "index0/size").write_text("unknown\n")
    assert last_cache_bytes(tmp_path) == 0


def test_this_machine():
    assert SPLIT_TORCH == split_for(last_cache_bytes())
