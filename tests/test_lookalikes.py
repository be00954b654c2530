"""Nothing that only looks like attention is fused, and every refusal has its reason."""

from __future__ import annotations

import pytest
import torch

from tests.corpus.lookalikes import LOOK_ALIKES, LookAlike
from tests.helpers import run_both


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("twin", LOOK_ALIKES, ids=[t.name for t in LOOK_ALIKES])
def test_look_alike(twin: LookAlike, train: bool) -> None:
    if train and ("mutation" in twin.codes):
        pytest.skip("eager autograd itself refuses these writes")
    torch.manual_seed(1)
    outcome = run_both(twin.function, twin.inputs(torch.float32), train=train)
    codes = [site.reason.code for site in outcome.report.sites if site.reason is not None]
    assert codes == list(twin.codes), outcome.report.why("")
    assert not outcome.report.rewritten()
    if "dropout" not in twin.name:  # whose random numbers differ from run to run
        assert outcome.error < 1e-5
