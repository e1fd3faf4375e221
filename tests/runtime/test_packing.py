"""What a step tells the device travels as one piece, and each array begins where kernels expect arrays to."""

from __future__ import annotations

import numpy as np
import torch

from specserve.runtime.packing import Packer


def test_arrays_come_back_aligned() -> None:
    packer = Packer()
    arrays = [[1], [], [2, 3, 4], [5, 6], np.arange(7, 12)]
    handles = [packer.add(array) for array in arrays]
    packer.upload(torch.device("cpu"))
    first = packer[handles[0]].data_ptr()
    for array, handle in zip(arrays, handles, strict=True):
        assert packer[handle].tolist() == list(array)
        assert (packer[handle].data_ptr() - first) % 16 == 0
