"""Noise and Gumbel-max sampling in Triton against their references: the same words, the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specserve_kernels.language import tl, triton
from specserve_kernels.sampling import drafting
from specserve_kernels.sampling import tokens as sampling
from specserve_kernels.sampling.noise import bits_to_gumbel, gumbel, noise_key, uniform
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.random import bits_to_gumbel as bits_to_gumbel_ref
from specserve_kernels.sampling.random import gumbel as gumbel_ref
from specserve_kernels.sampling.random import uniform as uniform_ref

VOCAB = 2311  # three tiles of 1024, the last one ragged; two of 2048


@triton.jit
def _noise(noise, threshold, seed, position, STREAM: tl.constexpr, SIZE: tl.constexpr):
    key = noise_key(tl.load(seed), tl.load(position), STREAM)
    tl.store(noise + tl.arange(0, SIZE), gumbel(key, tl.arange(0, SIZE)))
    tl.store(threshold, uniform(key))


@triton.jit
def _to_gumbel(noise, bits, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(noise + index, bits_to_gumbel(tl.load(bits + index)))


@pytest.mark.parametrize("seed", [0, 7, -(2**63), 2**63 - 1])
def test_noise_is_that_of_the_reference(device: torch.device, seed: int) -> None:
    seeds, position = torch.tensor([seed], device=device), torch.tensor([123_456_789], device=device)
    for stream in Stream:
        noise = torch.empty(512, device=device)
        threshold = torch.empty(1, dtype=torch.float64, device=device)
        _noise[(1,)](noise, threshold, seeds, position, STREAM=int(stream), SIZE=512)
        assert torch.equal(threshold, uniform_ref(seeds, position, stream))
        expected = gumbel_ref(seeds, position, stream, 512, torch.float32)[0]
        torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-6)


def test_noise_is_precise_at_every_magnitude(device: torch.device) -> None:
    powers = 2 ** torch.arange(53)
    generator = torch.Generator().manual_seed(0)
    bits = torch.cat((powers, powers + powers // 3, 2**53 - powers, torch.tensor([0])))
    bits = torch.cat((bits, torch.randint(0, 2**53, (1024 - len(bits),), generator=generator))).clamp(0, 2**53 - 1)
    noise = torch.empty(1024, device=device)
    _to_gumbel[(1,)](noise, bits.to(device), SIZE=1024)
    exact = bits_to_gumbel_ref(bits << 11, torch.float64)
    rounded = bits_to_gumbel_ref(bits << 11, torch.float32).double()
    # float32 itself errs near v = 1, where it cannot tell v from its neighbours: no worse than the reference there
    bound = 4e-7 * exact.abs().clamp(min=1.0) + 2 * (rounded - exact).abs()
    assert ((noise.cpu().double() - exact).abs() <= bound).all()


def make_rows(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Greedy and sampled rows, with impossible tokens and ties, two positions each."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 2, VOCAB, generator=generator) * 2).to(dtype)
    logits[1, :, 100:] = float("-inf")
    logits[0, 1] = 0.0
    logits[0, 0, [2000, 900, 1500]] = logits[0, 0].amax() + 1
    temperature = torch.tensor([0.0, 0.7, 1.3, 1.0])
    rows = {
        "logits": logits,
        "divisor": temperature.where(temperature > 0, 1.0),
        "seed": torch.tensor([5, -9, 2**60, 3]),
        "first_position": torch.tensor([0, 10, 7, 2**40]),
        "temperature": temperature,
    }
    return {name: values.to(device) for name, values in rows.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sample_tokens_equals_the_reference(device: torch.device, dtype: torch.dtype) -> None:
    rows = make_rows(device, dtype)
    expected = sampling.sample_tokens_ref(**rows)
    assert torch.equal(sampling.sample_tokens_triton(**rows), expected)
    assert expected[0].tolist() == [900, 0]
    strided = rows["logits"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(sampling.sample_tokens_triton(**{**rows, "logits": strided}), expected)
    alone = {name: values[2:3] for name, values in rows.items()}
    assert torch.equal(sampling.sample_tokens_triton(**alone), expected[2:3])


def test_without_divisor(device: torch.device) -> None:
    rows = make_rows(device, torch.float32)
    processed = {**rows, "logits": rows["logits"] / rows["divisor"][:, None, None], "divisor": None}
    assert torch.equal(sampling.sample_tokens_triton(**processed), sampling.sample_tokens_ref(**rows))


@pytest.mark.parametrize("vocab", [7, 1024, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_of_equal_tokens(device: torch.device, dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    logits[0] = float("-inf")
    logits[1] = torch.where(logits[1] < 0, -0.0, 0.0).to(dtype)
    index = torch.arange(vocab, device=device)
    expected = torch.where(logits == logits.amax(-1, keepdim=True), index, vocab).amin(-1)
    assert torch.equal(sampling.greedy_triton(logits), expected)
    logits[2] = float("nan")
    tokens = sampling.greedy_triton(logits)
    assert 0 <= int(tokens[2]) < vocab, "a token id whatever a row holds"
    tokens[2] = expected[2]
    assert torch.equal(tokens, expected)


def test_gumbel_argmax_with_a_stream_a_row_and_arguments_that_broadcast(device: torch.device) -> None:
    rows = make_rows(device, torch.float32)
    stream = torch.tensor([0, 1, 2, 3], device=device)[:, None]
    positions = rows["first_position"][:, None] + torch.tensor([0, 40], device=device)
    arguments = (rows["logits"], rows["seed"][:, None], positions, rows["temperature"][:, None], stream)
    assert torch.equal(sampling.gumbel_argmax_triton(*arguments), sampling.gumbel_argmax_ref(*arguments))


def test_a_draft_comes_with_its_softmax(device: torch.device) -> None:
    rows = make_rows(device, torch.float32)
    stream = torch.tensor([0, 1, 0, 1], device=device)
    arguments = (rows["logits"][:, 1], rows["seed"], rows["first_position"], rows["temperature"], stream)
    tokens, probs = drafting.draw_with_softmax(*arguments)
    expected_tokens, expected_probs = sampling.draw_with_softmax_ref(*arguments)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(probs, expected_probs, rtol=2e-6, atol=1e-9)
