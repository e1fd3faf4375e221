"""The first half of grouped LoRA: s against blocks in torch, with zeros wherever nothing belongs."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.lora.shrink import arrivals_of, shrink, shrink_cut, shrink_ref
from specserve_kernels.lora.tiles import lora_tiles
from specserve_kernels.tolerances import OP

SLOTS, RANK, PER_ROW, ROWS = 5, 48, 2, 20
RANKS = [3, 0, 48, 16, 17]


@pytest.mark.parametrize(("tokens", "in_features", "parts"), [(1, 40, 1), (13, 540, 3), (70, 600, 1), (32, 8200, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense(tokens: int, in_features: int, parts: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows with none, one and two slots, named once and twice; A of one and of many splits, of one piece and several;
    the counters are ready for the next linear."""
    if device.type == "cpu" and in_features > 2000 and dtype == torch.float32:
        pytest.skip("takes the interpreter long, and is the other dtype's way")
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.randint(-1, SLOTS, (ROWS, PER_ROW), generator=generator)
    slots[:3] = torch.tensor([[2, 2], [4, 0], [-1, -1]])
    weights = torch.rand(ROWS, PER_ROW, generator=generator) - 0.3
    rows = torch.arange(tokens) % (ROWS + 1) - int(tokens > 1)
    x = torch.randn(tokens, in_features, generator=generator).to(device, dtype)
    a = (torch.randn(SLOTS * parts * RANK, in_features, generator=generator) / in_features**0.5).to(device, dtype)
    tiles = lora_tiles(rows.to(device), slots.to(device), weights.to(device), torch.tensor(RANKS, device=device), RANK)
    num_tiles, most = tiles.blocks.shape
    arrivals = torch.zeros(arrivals_of(num_tiles, parts, most), dtype=torch.int32, device=device)
    cut = shrink_cut(tokens, in_features, parts, PER_ROW, most, RANK, dtype, False)
    assert cut.dense
    want = shrink_ref(x, a, parts, RANK, tiles)
    first, again = (shrink(x, a, RANK, tiles, arrivals, cut) for _ in range(2))
    rtol, atol = OP[dtype]
    for tile, count in enumerate(tiles.counts.tolist()):
        got = first[tile, :, :, : -(-count // 4) * 64].cpu()
        wanted = torch.zeros(got.shape, dtype=torch.float64)
        wanted[..., : count * 16] = want[tile, :, :, : count * 16]
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=rtol, atol=atol)
        assert torch.equal(got == 0, wanted == 0)
        assert torch.equal(again[tile, :, :, : got.shape[-1]].cpu(), got)
    assert not arrivals.any()
