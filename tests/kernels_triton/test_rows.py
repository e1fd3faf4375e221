"""Looking rows and tokens up in the device rows and appending to them, against the references."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.commit import commit_tokens_ref, commit_tokens_triton
from specserve_kernels.gather import gather_rows_ref, gather_rows_triton
from specserve_kernels.inputs import RowTables, gather_inputs_ref, gather_inputs_triton


@pytest.mark.parametrize(("tokens", "block_size"), [(1, 16), (7, 5), (300, 1)])
def test_gather_inputs(device: torch.device, tokens: int, block_size: int) -> None:
    """Of positions that are given, and of such as count from the row's last token on."""
    generator = torch.Generator().manual_seed(tokens)

    def ints(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    tables = RowTables(ints(33, 5) + 1, ints(1000, 5, 37), ints(99, 5, -(-37 // block_size)))
    args = (ints(5, tokens), ints(41, tokens) - 4, tables, block_size, 30)
    for mine, wanted in zip(gather_inputs_triton(*args), gather_inputs_ref(*args), strict=True):
        assert torch.equal(mine, wanted)
        assert mine.data_ptr() % 16 == 0, "or whoever reads it is compiled once more"


@pytest.mark.parametrize("shape", [(7, 1), (9, 1, 12), (5, 1500)])
def test_gather_rows(device: torch.device, shape: tuple[int, ...]) -> None:
    table = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    index = torch.tensor([3, 0, 4, 3], device=device)
    assert torch.equal(gather_rows_triton(table, index), gather_rows_ref(table, index))


@pytest.mark.parametrize("columns", [1, 4, 5, 9])
@pytest.mark.parametrize("all_kept", [False, True])
def test_commit_tokens(device: torch.device, columns: int, all_kept: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    history = torch.randint(1000, (6, 40), generator=generator).to(device)
    num_tokens = torch.randint(1, 30, (6,), generator=generator).to(device)
    rows = torch.tensor([4, 0, 5], device=device)
    tokens = torch.randint(1000, (3, columns), generator=generator).to(device)
    counts = None if all_kept else torch.randint(1, columns + 1, (3,), generator=generator).to(device)
    mine, wanted = (history.clone(), num_tokens.clone()), (history.clone(), num_tokens.clone())
    packed = commit_tokens_triton(*mine, rows, tokens, counts)
    assert torch.equal(packed, commit_tokens_ref(*wanted, rows, tokens, counts))
    assert torch.equal(mine[0], wanted[0]) and torch.equal(mine[1], wanted[1])
