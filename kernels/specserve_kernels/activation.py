"""SwiGLU's gate (Shazeer 2020): silu(gate) * up = gate * sigmoid(gate) * up.

gate_up: [tokens, 2 * n], gates first; result [tokens, n] of the same dtype. The kernel computes in fp32 and rounds
once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import cdiv, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.overlap import overlaps, wait


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    size = gate_up.shape[-1] // 2
    gate, up = gate_up.split_with_sizes((size, size), -1)
    return F.silu(gate).mul_(up)


@triton.jit
def gated(gate, up):
    """silu(gate) * up of float32."""
    return gate * tl.sigmoid(gate) * up


@relaunched
@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK results of one token a program."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate_ptr = gate_up_ptr + token * (2 * SIZE) + column
    wait(PDL)
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + SIZE, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * SIZE + column, gated(gate, up).to(out_ptr.dtype.element_ty), mask=inside)


def _tile(results: int) -> tuple[int, int]:
    """(results a program, warps): a decode of few tokens spreads over the chip, a prefill saves programs."""
    if results <= 1 << 17:
        return 256, 1
    return (1024, 4) if results <= 1 << 22 else (2048, 4)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    (block, warps), pdl = _tile(tokens * size), overlaps(gate_up)
    _silu_mul_kernel[(tokens * cdiv(size, block),)](
        gate_up, out, SIZE=size, BLOCK=block, PDL=pdl, num_warps=warps, launch_pdl=pdl
    )
    return out


_IMPLEMENTATIONS = {"torch": silu_mul_ref, "triton": silu_mul_triton}


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [tokens, 2 * n] → [tokens, n]."""
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    return _IMPLEMENTATIONS[backend(gate_up, _IMPLEMENTATIONS)](gate_up)
