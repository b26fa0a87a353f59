"""Law: layer by layer from disk, statistics are those of the model in memory; or they are refused with the reason."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from moekit.checkpoint.folder import Checkpoint
from moekit.errors import UnsupportedModel
from moekit.trace.sources.table import refuse_streaming
from moekit.trace.statistics import Statistics
from moekit.trace.streamed import Streamed, record_streamed
from tests.checkpoints import plain
from tests.laws.recorded import CASES, batch, close, get, names, whole

STREAMED = [(family, name) for family, name in CASES if not refuse_streaming(get(name).sources)]


@cache
def streamed(family: str) -> Statistics:
    with TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(plain(Path(folder) / "m", family))
        kept = [name for name in names(family) if not refuse_streaming(get(name).sources)]
        parts = [batch([0, 1]), batch([2, 3], padded=2)]
        found = record_streamed(checkpoint, parts, statistics=kept, dtype=torch.float64).statistics
    assert found is not None
    return found


@pytest.mark.parametrize(("family", "name"), STREAMED)
def test_streamed_equals_live(family: str, name: str) -> None:
    for layer, stats in whole(family).items():
        close(name, stats, streamed(family)[layer])


@pytest.mark.parametrize("name", ["neuron_taylor", "stream_gradient_square"])
def test_gradients_are_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))
    with pytest.raises(UnsupportedModel, match="all layers above at once"):
        Streamed(checkpoint, [batch([0])], statistics=name)
