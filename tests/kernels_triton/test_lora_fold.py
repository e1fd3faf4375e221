"""What a product adds to itself of adapters: s against blocks in torch, dense, with zeros wherever nothing belongs."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.lora.fold import fold, fold_ref
from specserve_kernels.lora.tiles import lora_tiles
from specserve_kernels.tolerances import OP

SLOTS, RANK, PER_ROW, ROWS = 5, 48, 2, 20
RANKS = [3, 0, 48, 16, 17]


@pytest.mark.parametrize(("tokens", "in_features", "parts"), [(1, 40, 1), (13, 1100, 3), (32, 8200, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fold(tokens: int, in_features: int, parts: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows with none, one and two slots, named once and twice; A wider than one split and than 16 of them."""
    if device.type == "cpu" and in_features > 2000 and dtype == torch.float32:
        pytest.skip("takes the interpreter long, and is the other dtype's way")
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.randint(-1, SLOTS, (ROWS, PER_ROW), generator=generator)
    slots[:3] = torch.tensor([[2, 2], [4, 0], [-1, -1]])
    weights = torch.rand(ROWS, PER_ROW, generator=generator) - 0.3
    rows = torch.arange(tokens) % (ROWS + 1) - int(tokens > 1)
    x = torch.randn(tokens, in_features, generator=generator).to(device, dtype)
    a = (torch.randn(SLOTS * parts * RANK, in_features, generator=generator) / in_features**0.5).to(device, dtype)
    ranks = torch.tensor(RANKS, device=device)
    tiles = lora_tiles(rows.to(device), slots.to(device), weights.to(device), ranks, RANK)
    arrivals = torch.zeros(parts * tiles.blocks.shape[1] + 8 * parts, dtype=torch.int32, device=device)
    s = fold(x, a, parts, RANK, tiles, arrivals, pdl=False)
    want = fold_ref(x, a, parts, RANK, tiles)
    assert s.shape[0] == want.shape[0] == parts * tiles.tile
    rtol, atol = OP[dtype]
    torch.testing.assert_close(s[:, : want.shape[1]], want, rtol=rtol, atol=atol)
    assert torch.equal(s[:, : want.shape[1]] == 0, want == 0)
    assert not arrivals.any()
    again = fold(x, a, parts, RANK, tiles, arrivals, pdl=False)
    assert torch.equal(again[:, : want.shape[1]], s[:, : want.shape[1]])
