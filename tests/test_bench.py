"""``gradstats bench``: the hardware's limits, what is measured and how it is shown."""

from __future__ import annotations

import functools
import operator

import numpy
import pytest
import torch

import gradstats
from gradstats.ops import limits


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if not limits.available(request.param):
        pytest.skip(f"no compiled kernels: {gradstats.backends()[request.param].detail}")
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ---- the limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 4096])
@pytest.mark.parametrize("words", [[0, 1], [16], [3, 65], [1000, 0, 7, 70_001], [1_000_003]])
def test_reading_misses_no_byte(device, ahead, words, threads):
    generator = torch.Generator().manual_seed(sum(words))
    rest = 0 if device == "cuda" else 5  # which wants whole words of 16 bytes
    sizes = [16 * n + rest for n in words]
    tensors = [torch.randint(256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
    expected = functools.reduce(operator.xor, (int(numpy.bitwise_xor.reduce(t.numpy())) for t in tensors))
    assert limits.read([t.to(device) for t in tensors], ahead=ahead).item() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiply_adds_are_all_done(device, dtype, threads):
    like = torch.empty(0, dtype=dtype, device=device)
    few, many = (limits.multiply_add(like, count).item() for count in (1, 50 * 10**6))
    assert few > 0
    assert few % 4096 == 0  # steps in a piece
    assert 50 * 10**6 <= many < 50 * 10**6 + few
    assert many % few == 0


def test_limits_refuse_what_they_cannot_do(device):
    with pytest.raises(RuntimeError, match="contiguous"):
        limits.read([torch.zeros(4, 4, device=device).T[1:]])
    with pytest.raises(RuntimeError, match="float32 or float64"):
        limits.multiply_add(torch.empty(0, dtype=torch.float16, device=device), 1)
