"""Under torch.compile attention is one registered operator, with the same result."""

from __future__ import annotations

import pytest
import torch

from tqai.backends.base import ExactTokens


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_traced_attention_is_the_same(native, page_format, history):
    found, _, _ = history(page_format(4, 2, 64), 1, 2, 3)
    recent = ExactTokens(torch.randn(1, 2, 2, 64), torch.randn(1, 2, 2, 64))
    query = torch.randn(1, 4, 1, 64)

    def step(query):
        attended = native.attend(query + 1.0, found, recent, recent, None, 0.125)
        return attended.out * 2.0, attended.lse

    wanted = step(query)
    traced = torch.compile(step, backend="eager", fullgraph=True)(query)
    for one, other in zip(traced, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_operator_passes_torchs_own_checks(native, page_format, history):
    from tqai.backends.native import op

    pages = page_format(4, 2, 64)
    found, _, _ = history(pages, 1, 2, 3)
    recent = torch.randn(1, 2, 1, 64)
    query = torch.randn(1, 4, 1, 64)
    text = op.spec_text(pages.key), op.spec_text(pages.value)
    arguments = (
        query,
        found.addresses,
        list(found.slabs),
        None,
        None,
        recent,
        recent,
        None,
        3,
        0,
        *text,
        0.1,
        0.0,
    )
    torch.library.opcheck(op.native_attend, arguments, test_utils=("test_schema", "test_faketensor"))
