"""Pieces of a file that come and go, whoever still looks at them."""

from __future__ import annotations

import pytest
import torch

from moekit.streaming.spill import Spill


@pytest.mark.parametrize("nbytes", [40, 1 << 17])
def test_what_somebody_has_in_memory_is_not_written_over(nbytes: int) -> None:
    spill = Spill()
    first = torch.arange(nbytes).to(torch.uint8)
    slot = spill.put(first)
    other = spill.put(first + 1)
    got = spill.get(slot)
    spill.free(slot)
    spill.put(first + 2)
    assert torch.equal(got, first)
    got += 3
    assert torch.equal(spill.get(other), first + 1)
    before = spill.nbytes
    del got
    spill.free(other)
    spill.put(first + 4)
    assert spill.nbytes == before, "a piece that nobody has is used again"
    spill.close()
