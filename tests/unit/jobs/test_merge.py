"""`use: merge`: what it is compared with, and that what was written is what was decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.jobs.merge import merge
from moekit.jobs.profile import profile
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=20)
    return folder


def test_the_proof_compares_with_pruning_by_reap_and_by_use_and_with_random_groups(made: Path, tmp_path: Path) -> None:
    result = merge(made / "moe", method="hc-smoe", keep=6, data=made / "text", out=tmp_path / "out")
    assert result.proof is not None
    assert [cost["name"] for cost in result.proof["baselines"]] == ["reap", "frequency", "random-groups"]
    assert result.check is not None
    assert result.check["ok"]


@pytest.mark.full
@pytest.mark.slow
def test_a_trace_gives_the_baselines_that_it_can(made: Path, tmp_path: Path) -> None:
    profile(made / "moe", data=made / "text", statistics=("load", "logit_gram"), out=tmp_path / "trace")
    result = merge(
        made / "moe", method="m-smoe", keep=6, trace=tmp_path / "trace", heldout=made / "text", out=tmp_path / "out"
    )
    assert result.proof is not None
    assert [cost["name"] for cost in result.proof["baselines"]] == ["frequency", "random-groups"]
