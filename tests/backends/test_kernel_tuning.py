"""Launch configurations for targets in the table and for those that are not."""

from __future__ import annotations

import pytest
import torch

from hip_hf.backends.triton.common.tuning import TILES, Tile, tile_of

pytestmark = pytest.mark.fast


def tile(kernel: str, target: str, width: int) -> Tile:
    return tile_of(kernel, target, width, 16, torch.bfloat16)


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_unknown_targets_get_configurations_of_their_maker(kernel: str, width: int) -> None:
    """Newer ones the closest older entry's, older ones the smallest of the maker's: they have no
    more shared memory."""
    for target, dims in TILES[kernel].items():
        assert tile(kernel, target, width) == Tile(*dims[width])
    newer = dict(sm87="sm86", sm103="sm100", sm121="sm120", gfx950="gfx942", gfx1100="gfx942")
    for target, closest in newer.items():
        assert tile(kernel, target, width) == Tile(*TILES[kernel][closest][width])
    nvidia = [Tile(*dims[width]) for name, dims in TILES[kernel].items() if name.startswith("sm")]
    for target in ("sm75", "sm70"):
        got = tile(kernel, target, width)
        assert got in nvidia
        assert all(
            got.rows + 2 * got.keys * got.stages <= x.rows + 2 * x.keys * x.stages for x in nvidia
        )
    for target in ("gfx90a", "gfx906"):
        assert tile(kernel, target, width) == Tile(*TILES[kernel]["gfx942"][width])


def test_widths_between_two_entries_get_the_wider_ones() -> None:
    assert tile("prefill", "sm90", 96) == tile("prefill", "sm90", 128)
    assert tile("prefill", "sm90", 512) == tile("prefill", "sm90", 256)
