"""The thirty spellings: recognised as what they are, and computed right, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.corpus.forms import FORMS, Form, S
from tests.helpers import run_both

IDS = [f"{f.number}-{f.name}" for f in FORMS]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_form(form: Form, dtype: torch.dtype, train: bool) -> None:
    if form.refused == "already-fused" and (train or dtype != torch.float32):
        pytest.skip("FlexAttention has no such kernel on a CPU")
    outcome = run_both(form.function, form.inputs(dtype), train=train)
    sites = outcome.report.sites
    assert len(sites) == 1, outcome.report.table()
    if form.refused is not None:
        assert sites[0].reason is not None
        assert sites[0].reason.code == form.refused
    else:
        assert sites[0].status == "rewritten", outcome.report.why("")
        assert sites[0].spec == form.expect
    assert outcome.error < (2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_form_dynamic(form: Form) -> None:
    if form.refused is not None:
        pytest.skip("not rewritten")
    inputs = form.inputs(torch.float32)
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            if size == S:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    outcome = run_both(form.function, inputs)
    assert outcome.report.sites[0].status == "rewritten", outcome.report.why("")
    assert outcome.error < 2e-5


def test_coverage_bar() -> None:
    recognised = {f.number for f in FORMS} - {
        f.number for f in FORMS if f.refused not in (None, "already-fused")
    }
    assert {f.number for f in FORMS} == set(range(1, 31))
    assert len(recognised) >= 28
