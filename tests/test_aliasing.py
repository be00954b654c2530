"""What a rewrite reads in place of something else: writes it must see, gradients it must not add, layouts it
must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.helpers import REFERENCE, evaluate, relative_error, run_both

B, H, S, T, D = 2, 3, 5, 7, 4
CASES: list[Any] = []


def case(*more: torch.Tensor, train: bool = True) -> Callable[[Any], Any]:
    """A function of q, k, v and `more`."""

    def register(function: Any) -> Any:
        CASES.append(pytest.param(function, more, train, id=function.__name__))
        return function

    return register


def A(scores, v):
    return F.softmax(scores, -1) @ v


def causal():
    return torch.arange(T)[None, :] <= torch.arange(S)[:, None]


# ------------------------------------------------------------------------- gradients that were switched off


@case()
def keys_copied_without_grad(q, k, v):
    with torch.no_grad():
        kk = k.clone()
    return A(q @ kk.mT, v)


@case()
def keys_viewed_without_grad(q, k, v):
    with torch.no_grad():
        kt = k.transpose(-2, -1)
    return A(q @ kt, v)


@case()
def keys_repeated_without_grad(q, k, v):
    with torch.no_grad():
        kk = k[:, :1].repeat_interleave(H, dim=1)
    return F.scaled_dot_product_attention(q, kk, v)


@case(torch.randn(1, H, 1, 1))
def sink_expanded_without_grad(q, k, v, s):
    with torch.no_grad():
        sink = s.expand(B, H, S, 1)
    return F.softmax(torch.cat([q @ k.mT, sink], -1), -1)[..., :-1] @ v


@case(torch.randn(H, S, T), torch.randn(1, S, T))
def bias_summed_without_grad(q, k, v, a, b):
    with torch.no_grad():
        bias = a + b + torch.where(causal(), 0.0, float("-inf"))
    return A(q @ k.mT + bias, v)


# ----------------------------------------------------------------------------------- results in other places


@case(torch.randn(B, H, S, T), train=False)
def scores_added_into_the_bias(q, k, v, bias):
    scores = bias.clone()
    scores += q @ k.mT
    return A(scores, v)


@case(torch.randn(B, H, S, T), train=False)
def scores_added_out(q, k, v, bias):
    out = bias.clone()
    return A(torch.add(q @ k.mT, out, out=out), v)


@case(torch.randn(B * H, S, T), train=False)
def scores_multiplied_into_the_bias(q, k, v, bias):
    scores = bias.clone()
    scores.baddbmm_(q.flatten(0, 1), k.flatten(0, 1).mT)
    return A(scores, v.flatten(0, 1))


@case(torch.randn(H, S, T), torch.randn(1, S, T), train=False)
def bias_added_in_place(q, k, v, a, b):
    bias = a * 1.0
    bias += b
    bias = bias + torch.where(causal(), 0.0, float("-inf"))
    return A(q @ k.mT + bias, v)


@case(train=False)
def keys_written_by_position(q, k, v):
    k = k * 1.0
    scores = q @ k.mT
    F.relu(k, True)
    return A(scores, v), k


@case(train=False)
def keys_written_in_a_list(q, k, v):
    k = k * 1.0
    scores = q @ k.mT
    torch._foreach_mul_([k], 2.0)
    return A(scores, v), k


@case(train=False)
def keys_written_in_a_tuple(q, k, v):
    k, index = k * 1.0, torch.empty(B, H, T, D, dtype=torch.long)
    scores = q @ k.mT
    torch.sort(k * -1.0, out=(k, index))
    return A(scores, v), k


@case(train=False)
def keys_written_in_a_checkpoint(q, k, v):
    def body(x):
        x.mul_(2.0)
        return x.sum()

    k = k * 1.0
    scores = q @ k.mT
    total = checkpoint(body, k, use_reentrant=False)
    return A(scores, v) + total


@case(train=False)
def copy_of_repeated_keys(q, k, v):
    k = k[:, :1] * 1.0
    wide = k[:, :, None].expand(B, 1, H, T, D).contiguous()
    k.mul_(3.0)
    return F.scaled_dot_product_attention(q, wide.reshape(B, H, T, D), v)


@case(train=False)
def heads_picked_before_they_are_repeated(q, k, v):
    wide = k[:, :2][:, torch.tensor([[1], [0]])].expand(B, 2, 2, T, D).reshape(B, 4, T, D)
    return F.scaled_dot_product_attention(q[:, [0, 1, 2, 0]], wide, v[:, [0, 1, 2, 0]])


@case(torch.randn(1, H, 1, 1), train=False)
def sink_written_to(q, k, v, s):
    sink = s.clone()
    sink[:, :2] = 3.0
    return F.softmax(torch.cat([q @ k.mT, sink.expand(B, H, S, 1)], -1), -1)[..., :-1] @ v


@case(train=False)
def scale_written_through_a_view(q, k, v):
    scale = torch.full((), 0.5)
    scale.view(1).mul_(3.0)
    return A(q @ k.mT * scale, v)


@case(train=False)
def scale_of_integers(q, k, v):
    return A(q @ k.mT * torch.full((), 2.7, dtype=torch.long), v)


@case(train=False)
def probabilities_of_integers(q, k, v):
    return F.softmax(q @ k.mT, -1).long().float() @ v


@case(train=False)
def large_constant_before_a_fill(q, k, v):
    return A((q @ k.mT - 1e10).masked_fill(~causal(), -1e9), v)


@case(train=False)
def fill_scaled_to_infinity(q, k, v):
    keep = causal() & (torch.arange(S)[:, None] > 0)
    lowest = torch.finfo(torch.float32).min
    return A((q @ k.mT + torch.where(keep, 0.0, lowest)) * 2, v)


@case(torch.randn(1, 1, S, T).masked_fill(torch.eye(S, T, dtype=torch.bool)[1:2], float("-inf")), train=False)
def rows_emptied_by_a_float_mask(q, k, v, m):
    empty = torch.full_like(m, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, torch.where(torch.arange(S)[:, None] == 2, empty, m))


@pytest.mark.parametrize(("function", "more", "train"), CASES)
def test_result_is_the_original(function: Any, more: tuple[torch.Tensor, ...], train: bool) -> None:
    torch.manual_seed(0)
    operands = (torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D))
    outcome = run_both(function, (*operands, *more), train=train)
    assert len(outcome.got) == len(outcome.want)
    assert outcome.error < 1e-4, outcome.report.why("")


def test_look_ups_of_equal_names_inside_and_outside_a_checkpoint() -> None:
    def body(q, k, v, keep, x):
        x = x & 2
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep & (x == 0)[:, None, None, :])

    def attend(q, k, v, labels):
        x = labels & 1
        return checkpoint(body, q, k, v, (x == 0)[:, None, None, :], labels, use_reentrant=False)

    labels = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 2, 2, 1, 1, 0, 3]])
    q, k, v = (torch.randn(B, H, n, D) for n in (S, T, T))
    assert run_both(attend, (q, k, v, labels), train=True).error < 1e-4


@pytest.mark.parametrize("kernel", ["reference", "flex"])
def test_view_of_the_result(kernel: str) -> None:
    """`view` needs the memory layout that the original has, whatever the kernel writes."""

    def attend(q, k, v):
        out = F.softmax(q @ k.mT, dim=-1) @ v
        return out.view(B * H, S, 16)

    q, k, v = (torch.randn(B, S, H, 16).transpose(1, 2) for _ in range(3))
    want = attend(q, k, v)
    options = {**REFERENCE, "attention": {"impl": kernel, "expect": 1}, "lowering": "eager"}
    with torch.no_grad():
        got = torch.compile(attend, backend="kp", options=options)(q, k, v)
    assert relative_error(got, want) < 1e-5


def test_write_after_the_attention_does_not_disturb_it() -> None:
    def attend(q, k, v):
        out = A(q @ k.mT, v)
        k[:, :, 0].zero_()
        return out, k

    outcome = run_both(attend, tuple(torch.randn(B, H, n, D) for n in (S, T, T)))
    assert len(outcome.report.rewritten()) == 1
    assert outcome.error < 1e-5


def test_functorch_transforms_are_left_alone() -> None:
    def attend(q, k, v):
        return torch.func.vmap(lambda a, b, c: A(a @ b.mT, c))(q, k, v)

    q, k, v = (torch.randn(B, H, n, D) for n in (S, T, T))
    outcome = run_both(attend, (q, k, v))
    assert [site.reason.code for site in outcome.report.refused()] == ["functorch"]
    assert outcome.error < 1e-5


def test_float_attribute_is_a_constant_and_a_float_argument_is_not() -> None:
    class Attend(torch.nn.Module):
        scale = 0.37

        def forward(self, q, k, v):
            return A(q @ k.mT * self.scale, v)

    inputs = (torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D))
    outcome = run_both(Attend(), inputs, dynamic=True)
    assert [site.spec for site in outcome.report.sites] == ["full"]
    assert outcome.error < 1e-5

    def attend(q, k, v, scale):
        return A(q @ k.mT * scale, v)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="kp", options=REFERENCE)
    for scale in (0.3, 0.4, 0.5):
        (got,), (want,) = (evaluate(f, (*inputs, scale), False) for f in (compiled, attend))
        assert relative_error(got, want) < 1e-5
