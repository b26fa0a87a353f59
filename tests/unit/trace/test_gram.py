"""Second moments of rows that come in batches, against one plain product."""

from __future__ import annotations

import pytest
import torch

from moekit.trace import gram
from moekit.trace.gram import Gram


@pytest.mark.parametrize("columns", [5, 6, 8])
@pytest.mark.parametrize("sizes", [(), (1,), (2, 3, 9, 1)])
def test_batches_add_up(columns: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_ROWS", 4)
    monkeypatch.setattr(gram, "_COLUMNS", 3)
    rows_NC = torch.randn(sum(sizes), columns, generator=torch.Generator().manual_seed(0))
    found = Gram(columns, torch.device("cpu"))
    for rows_nC in rows_NC.split(sizes):
        found.add(rows_nC)
    total_CC = found.total()
    assert found.rows == sum(sizes)
    assert total_CC.dtype == torch.float64
    torch.testing.assert_close(total_CC, rows_NC.double().T @ rows_NC.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.total(), total_CC)
