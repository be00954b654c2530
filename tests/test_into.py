"""Results in half precision that are not finished."""

from __future__ import annotations

import math

import pytest
import torch

from kp_compiler.lowering.into import divide, joined

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
def test_24_bits(dtype: torch.dtype) -> None:
    """Rounded to the nearest, of any size: off by 2⁻¹⁷ of the next power of two at most."""
    value = torch.randn(4096) * torch.exp2(torch.randint(-120, 120, (4096,)).float())
    upper, tail = torch.empty(4096, dtype=dtype), torch.empty(4096, dtype=torch.uint8)
    divide(value, upper, tail)
    assert ((joined(upper, tail) - value).abs() <= value.abs() * 2.0**-16).all()
    off = (joined(upper, tail) - value) / value.abs() * value.sign()
    assert off.mean().abs() < 0.1 * off.abs().mean()  # cut off it would be half of the bound, one way
    found = joined(upper, tail)
    divide(found, upper, tail)
    assert torch.equal(joined(upper, tail), found)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_no_number(dtype: torch.dtype) -> None:
    """The NaN of a GPU has all bits set."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)
    value = torch.cat([bits.view(torch.float32), torch.tensor([math.inf, -math.inf, 0.0, -0.0])])
    upper, tail = torch.empty(7, dtype=dtype), torch.empty(7, dtype=torch.uint8)
    divide(value, upper, tail)
    found = joined(upper, tail)
    assert found[:3].isnan().all() and torch.equal(found[3:].view(torch.int32), value[3:].view(torch.int32))
