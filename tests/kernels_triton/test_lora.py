"""LoRA grouped on the device, and what reads a linear's output with it, against slot by slot in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.ops.case import Setting
from benchmarks.ops.lora_layers import WAYS, Load
from benchmarks.shapes import SHAPES
from specserve_kernels import dispatch
from specserve_kernels.activation import silu_mul_ref
from specserve_kernels.lora import grouped as lora_grouped
from specserve_kernels.lora import shrink as lora_shrink
from specserve_kernels.lora.grouped import GroupedLora, Shrunk, SlotFactors, grouped_lora, grouped_lora_ref
from specserve_kernels.lora.tiles import lora_tiles
from specserve_kernels.norm import sum_dtype
from specserve_kernels.qkv import rotate_and_cache_ref
from specserve_kernels.tolerances import OP

SLOTS, MAX_RANK, STRIDE, PER_ROW, ROWS = 6, 20, 32, 3, 8
RANKS = [3, 0, 20, 1, 17, 16]  # one slot is empty, one is full


@pytest.fixture(autouse=True)
def few_tokens_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_grouped, "FEWEST_SPLIT", 1)


@pytest.fixture(autouse=True)
def nothing_lies_there() -> Iterator[None]:
    """New memory holds NaN: what was not written must not be read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Mix(NamedTuple):
    """Rows with no, one, several and repeated slots; tokens of all rows interleaved, some without a row."""

    token_rows: Tensor
    row_slots: Tensor
    row_weights: Tensor
    slot_ranks: Tensor

    def lora(self, linears: list[SlotFactors], max_rank: int = MAX_RANK, longest: int | None = None) -> GroupedLora:
        return grouped_lora(linears, max_rank, self.slot_ranks, *self[:3], behind=True, max_query_len=longest)


def mixed(tokens: int, device: torch.device, seed: int = 0) -> Mix:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, SLOTS, (ROWS, PER_ROW), generator=generator)
    slots[0], slots[1], slots[2] = -1, torch.tensor([2, 2, 4]), torch.tensor([-1, 5, -1])
    weights = torch.rand(ROWS, PER_ROW, generator=generator) - 0.3
    token_rows = torch.randint(-1, ROWS, (tokens,), generator=generator)
    return Mix(*(tensor.to(device) for tensor in (token_rows, slots, weights, torch.tensor(RANKS))))


def factors(
    in_features: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device, ranks: list[int] = RANKS,
    stride: int = STRIDE,
) -> SlotFactors:  # fmt: skip
    """Zeros from a rank to the next multiple of 16, and behind it what would show if it were read."""
    generator = torch.Generator().manual_seed(in_features)
    a = torch.randn(len(ranks), len(widths), stride, in_features, generator=generator) / in_features**0.5
    b = torch.randn(len(ranks), stride, sum(widths), generator=generator) * 0.1
    for slot, rank in enumerate(ranks):
        for rows, part in ((a[slot].transpose(0, 1), slice(None)), (b[slot], slice(None))):
            rows[rank:][part] = 0.0
            rows[-(-rank // 16) * 16 :] = float("nan")
    return SlotFactors(a.flatten(0, 2).to(device, dtype), b.flatten(0, 1).to(device, dtype), widths)


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def oracle(x: Tensor, y: Tensor, linear: SlotFactors, mix: Mix) -> Tensor:
    """y with the adapters' product, in float64."""
    wide = SlotFactors(linear.a.double(), linear.b.double(), linear.widths)
    return grouped_lora_ref(x.double(), y.double(), wide, *mix)


def split(batch: GroupedLora, index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Shrunk]:
    """What a product leaves that has A behind its weights, and y for their output."""
    s = (x.double() @ batch.linears[index].a.double().t()).to(y.dtype)
    return batch.split(index, torch.cat([y, s], 1))


def close(got: Tensor, want: Tensor) -> None:
    rtol, atol = OP[got.dtype]
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 20, 40])
def test_mixed_batches(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Mixed ranks and slots, one to three parts, several splits; one batch for all linears, each tile size."""
    mix = mixed(tokens, device)
    linears = [factors(40, (24, 8, 9), dtype, device), factors(600, (12,), dtype, device)]
    batch = mix.lora(linears)
    for index, linear in enumerate(linears):
        x = randn(tokens, linear.a.shape[1], dtype=dtype, device=device)
        y = randn(tokens, sum(linear.widths), dtype=dtype, device=device, seed=1)
        got = y.clone()
        batch.update(index, x).add_to(got)
        close(got, oracle(x, y, linear, mix))
        idle = mix.token_rows <= 0  # no row, or the row without slots
        assert torch.equal(got[idle], y[idle])
        for longest in (None, 1) if dtype != torch.float16 else ():  # read where it lies, and gathered
            product, update = split(mix.lora(linears, longest=longest), index, x, y)
            assert update.lies == ("dense" if longest else "behind")
            total = torch.ones_like(y)
            update.add_to(total, product)
            close(total, oracle(x, y.double() + 1, linear, mix))


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What long prefills take, with fewer tokens."""
    monkeypatch.setattr(lora_shrink, "FEW_TOKENS", 0)
    monkeypatch.setattr(lora_grouped, "_SOME_TOKENS", 0)
    cached = (lora_shrink.shrink_cut, lora_grouped._column_constants, lora_grouped._rotate_constants)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("tokens", [5, 150])
def test_prefill(tokens: int, device: torch.device) -> None:
    """x and y are columns of wider tensors."""
    mix = mixed(tokens, device)
    linear = factors(24, (8, 150), torch.float32, device)
    x = randn(tokens, 40, dtype=torch.float32, device=device)[:, 8:32]
    y = randn(tokens, 170, dtype=torch.float32, device=device)[:, 4:162]
    want = oracle(x, y, linear, mix)
    mix.lora([linear]).update(0, x).add_to(y)
    close(y, want)


@pytest.mark.parametrize("cut", ["few", "many"])
@pytest.mark.parametrize(("tokens", "dtype"), [(3, torch.float32), (37, torch.bfloat16)])
@pytest.mark.parametrize(("merged", "size"), [(True, 112), (False, 112), (False, 70)])
def test_gated(
    merged: bool, size: int, tokens: int, dtype: torch.dtype, cut: str, device: torch.device,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Gate and up are modules of their own, or one."""
    if cut == "many":
        request.getfixturevalue("many")
    mix = mixed(tokens, device)
    linear = factors(24, (2 * size,) if merged else (size, size), dtype, device)
    x, y = (randn(tokens, width, dtype=dtype, device=device) for width in (24, 2 * size))
    want = silu_mul_ref(oracle(x, y, linear, mix))
    close(mix.lora([linear]).update(0, x).silu_mul(y.clone()), want)
    for longest in (None, 1):
        product, update = split(mix.lora([linear], longest=longest), 0, x, y)
        close(update.silu_mul(product), want)


@pytest.mark.parametrize("cut", ["few", "many", "behind", "gathered"])
@pytest.mark.parametrize(("tokens", "dtype"), [(3, torch.float32), (37, torch.bfloat16)])
@pytest.mark.parametrize("norm", [True, False])
def test_rotated(
    norm: bool, tokens: int, dtype: torch.dtype, cut: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Queries, and keys and values in their slots; what is not finite does not reach the cache."""
    if cut == "many":
        request.getfixturevalue("many")
    heads, kv_heads, dim, mix = 4, 2, 24 if norm else 80, mixed(tokens, device)  # heads of 80 are taken in two pieces
    widths = (heads * dim, kv_heads * dim, kv_heads * dim)
    linear = factors(24, widths, dtype, device)
    x, y = (randn(tokens, width, dtype=dtype, device=device) for width in (24, sum(widths)))
    y[0, -1] = float("inf")
    cos, sin = (randn(tokens, 1, dim // 2, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    slots = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:tokens].to(device)
    caches = torch.zeros(2, 50, kv_heads, dim, dtype=dtype, device=device)
    weight = randn(heads + kv_heads, dim, dtype=dtype, device=device, seed=4).abs()
    head_norm = (weight, torch.tensor(1e-6, dtype=sum_dtype(dtype), device=device)) if norm else None
    wide_norm = (weight.double(), torch.tensor(1e-6, dtype=torch.float64, device=device)) if norm else None
    wide_caches = caches.double()
    want = rotate_and_cache_ref(
        oracle(x, y, linear, mix), cos.double(), sin.double(), wide_caches[0], wide_caches[1], slots,
        heads=heads, norm=wide_norm, finite=True,
    )  # fmt: skip
    batch = mix.lora([linear], longest=1 if cut == "gathered" else None)
    y, update = split(batch, 0, x, y) if cut in ("behind", "gathered") else (y, batch.update(0, x))
    got = update.rotate_and_cache(y, cos, sin, caches[0], caches[1], slots, heads=heads, norm=head_norm, finite=True)
    close(got, want)
    close(caches, wide_caches)


@pytest.mark.parametrize(("programs", "loops"), [(15, 1), (9, 2), (1, 5)])
def test_programs_of_several_blocks(
    programs: int, loops: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles of five blocks of columns, on devices that hold so many programs: s that lies behind y is read once
    for as many blocks as fill the device once. The last ones reach beyond a part's columns."""
    monkeypatch.setattr(lora_grouped, "_PROGRAMS", programs)
    monkeypatch.setattr(lora_grouped, "_column_constants", lora_grouped._column_constants.__wrapped__)  # not cached
    assert lora_grouped._loops(5, 3) == loops
    mix, dtype = mixed(150, device), torch.float32
    for widths in ((24, 200, 70), (288, 288)):
        linear, total = factors(24, widths, dtype, device), sum(widths)
        x, y = (randn(150, width, dtype=dtype, device=device) for width in (24, total))
        residual = randn(150, total + 20, dtype=dtype, device=device, seed=1)
        want = oracle(x, y.double() + residual[:, 4 : total + 4], linear, mix)
        beside = residual.clone()
        product, update = split(mix.lora([linear]), 0, x, y)
        update.add_to(beside[:, 4 : total + 4], product)
        close(beside[:, 4 : total + 4], want)
        assert torch.equal(beside[:, :4], residual[:, :4]) and torch.equal(beside[:, -16:], residual[:, -16:])
    close(update.silu_mul(product), silu_mul_ref(oracle(x, y, linear, mix)))


def test_what_is_gathered(device: torch.device) -> None:
    """Tiles of several requests: where many of these are expected, and where no request fills one."""
    mix = mixed(70, device)
    for many, longest, gathers in ((False, None, False), (False, 64, False), (False, 63, True), (True, None, True)):
        batch = grouped_lora([], MAX_RANK, mix.slot_ranks, *mix[:3], many=many, behind=True, max_query_len=longest)
        assert batch.splits and batch.gathers is gathers


def test_many_adapters(device: torch.device) -> None:
    """Ranks of 1 to 256, as many slots as tokens, beside prompts of one adapter each."""
    count = 130
    ranks = [1 + 37 * slot % 24 for slot in range(count)]
    ranks[7] = 256
    token_rows = torch.cat([torch.arange(count), torch.full((40,), 7), torch.full((90,), 3)]).to(device)
    row_slots = torch.arange(count, device=device)[:, None]
    weights = torch.linspace(0.5, 1.5, count, device=device)[:, None]
    mix = Mix(token_rows, row_slots, weights, torch.tensor(ranks, device=device))
    linear = factors(16, (16,), torch.float32, device, ranks, 256)
    x, y = (randn(count + 130, 16, dtype=torch.float32, device=device, seed=seed) for seed in (0, 1))
    want = oracle(x, y, linear, mix)
    product, behind = split(mix.lora([linear], 256), 0, x, y)
    gathered_product, gathered = split(mix.lora([linear], 256, 1), 0, x, y)
    mix.lora([linear], 256).update(0, x).add_to(y)
    for out, update in ((product, behind), (gathered_product, gathered)):
        update.add_to(out)
        close(out, want)
    close(y, want)


def test_decodes_among_a_prompt(device: torch.device) -> None:
    """Tiles of as many adapters as tokens beside tiles of one: the first ranks are taken apart from the others."""
    count, total, dtype = 50, 270, torch.bfloat16
    ranks = [1 + slot % 8 for slot in range(count)]
    token_rows = torch.cat([torch.arange(count), torch.full((total - count,), 7)]).to(device)
    row_slots = torch.arange(count, device=device)[:, None]
    weights = torch.linspace(0.5, 1.5, count, device=device)[:, None]
    mix = Mix(token_rows, row_slots, weights, torch.tensor(ranks, device=device))
    linear = factors(16, (16, 16), dtype, device, ranks, 16)
    x, y = (randn(total, width, dtype=dtype, device=device) for width in (16, 32))
    want = oracle(x, y, linear, mix)
    batch = mix.lora([linear], 8)
    for one in (batch, mix.lora([linear], 8, 1)):
        product, update = split(one, 0, x, y)
        close(update.silu_mul(product), silu_mul_ref(want))
    close(batch.update(0, x).silu_mul(y.clone()), silu_mul_ref(want))
    batch.update(0, x).add_to(y)
    close(y, want)


@pytest.mark.parametrize("tokens", [1, 30, 200])
def test_tiles(tokens: int, device: torch.device) -> None:
    """Each token's slots with the sums of their weights, and of each tile the blocks of its tokens' slots."""
    mix = mixed(tokens, device)
    tiles = lora_tiles(mix.token_rows, mix.row_slots, mix.row_weights, mix.slot_ranks, MAX_RANK)
    wanted: list[dict[int, float]] = []
    for row in mix.token_rows.tolist():
        wanted.append({})
        for slot, weight in zip(mix.row_slots[row].tolist(), mix.row_weights[row].tolist(), strict=True):
            if row >= 0 and slot >= 0 and RANKS[slot]:
                wanted[-1][slot] = wanted[-1].get(slot, 0.0) + weight
    wanted += [{}] * (tiles.token_slots.shape[0] - tokens)
    for token, (slots, weights) in enumerate(
        zip(tiles.token_slots.tolist(), tiles.token_weights.tolist(), strict=True)
    ):
        named = {slot: weight for slot, weight in zip(slots, weights, strict=True) if slot >= 0}
        assert named == pytest.approx(wanted[token]) and len(named) == sum(slot >= 0 for slot in slots)
    for tile, count in enumerate(tiles.counts.tolist()):
        slots_there = sorted({slot for token in wanted[tile * tiles.tile : (tile + 1) * tiles.tile] for slot in token})
        codes = [
            (slot << 16) | (block << 8) | min(16, RANKS[slot] - block * 16)
            for slot in slots_there
            for block in range(-(-RANKS[slot] // 16))
        ]
        assert tiles.blocks[tile, :count].tolist() == codes


def test_nothing_to_add(device: torch.device) -> None:
    mix = mixed(20, device)._replace(slot_ranks=torch.zeros(SLOTS, dtype=torch.int64, device=device))
    linear = factors(16, (8,), torch.float32, device)
    y = torch.full((20, 8), float("nan"), device=device)
    mix.lora([linear]).update(0, torch.ones(20, 16, device=device)).add_to(y)
    assert y.isnan().all()
    gate_up = randn(20, 8, dtype=torch.float32, device=device)
    halves = linear._replace(widths=(4, 4), a=linear.a.repeat(2, 1))
    got = mix.lora([halves]).update(0, torch.ones(20, 16, device=device)).silu_mul(gate_up)
    close(got, silu_mul_ref(gate_up))


@pytest.mark.parametrize("cut", ["few", "many", "behind", "gathered"])
def test_a_row_does_not_depend_on_its_neighbours(
    cut: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Bitwise: the same again, and the same when every other row has other adapters; overflows stay where they are."""
    if cut == "many":
        request.getfixturevalue("many")
    behind, tokens = cut in ("behind", "gathered"), 20
    dtype, large = (torch.bfloat16, 1e38) if behind else (torch.float16, 6e4)
    linear = factors(40, (24, 8), dtype, device)
    mix = mixed(tokens, device)
    mix.row_slots[3] = torch.tensor([0, 4, -1])
    mix.row_slots[4:] = torch.tensor([0, 5, 2])  # they share tiles with row 3
    mix.token_rows[:] = torch.arange(tokens) % 5 + 3
    x, y = (randn(tokens, width, dtype=dtype, device=device) for width in (40, 32))

    def apply(x: Tensor) -> Tensor:
        batch = mix.lora([linear], longest=1 if cut == "gathered" else None)
        out, update = split(batch, 0, x, y) if behind else (y.clone(), batch.update(0, x))
        update.add_to(out)
        return out

    first = apply(x)
    assert torch.equal(apply(x), first)
    row_3 = mix.token_rows == 3
    huge = torch.where(row_3[:, None], x, x * large)
    mix.row_slots[4:] = torch.tensor([0, 4, 3])
    second = apply(huge)
    assert not second[~row_3].isfinite().all()
    assert torch.equal(second[row_3], first[row_3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replayed_graph_sees_todays_slots(dtype: torch.dtype, device: torch.device) -> None:
    """Rows, slots, weights, ranks and factors are overwritten between the replays of one graph."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    tokens, mix = 50, mixed(50, device)
    linear = factors(256, (64, 32), dtype, device, [STRIDE] * SLOTS)
    x, y = (randn(tokens, width, dtype=dtype, device=device) for width in (256, 96))
    out = y.clone()

    def forward() -> None:
        out.copy_(y)
        mix.lora([linear]).update(0, x).add_to(out)

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for seed in range(3):
        for live, new in zip(mix, mixed(tokens, device, seed), strict=True):
            live.copy_(new)
        mix.slot_ranks[1] = seed
        linear.a.mul_(-1)
        graph.replay()
        close(out, oracle(x, y, linear, mix))


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_as_it_is_measured(way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's layer, by each way to what adapters add, against references in float32."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", frozenset({device.type}))
    load = Load(Setting(SHAPES["tiny"], device, rows=(1,), contexts=(9,), prompt=40), tokens=40, each=3)
    assert load.error(way) <= OP[torch.bfloat16][0]
    assert len(load.layers) > 1
    for mine, first in zip(load.layer(1, way), load.layer(0, way), strict=True):
        assert not torch.equal(mine, first)  # each layer has weights of its own
