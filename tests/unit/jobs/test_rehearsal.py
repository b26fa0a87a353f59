"""A family that the installed transformers breaks off in is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.models.llama4 import modeling_llama4

from moekit.errors import UnsupportedModel
from moekit.jobs.shared import rehearsal
from moekit.jobs.shared.rehearsal import refuse_broken

CONFIG = {"model_type": "llama4", "text_config": {}}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    rehearsal._broken.cache_clear()
    yield
    rehearsal._broken.cache_clear()


def test_a_class_that_breaks_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama4, "Llama4CausalLMOutputWithPast", None)  # which its own forward pass calls
    with pytest.raises(UnsupportedModel, match="breaks off in its own Llama4ForConditionalGeneration"):
        refuse_broken(CONFIG)


@pytest.mark.parametrize(
    "config", [CONFIG | {"model_type": "qwen3_vl_moe"}, {"model_type": "mixtral"}, CONFIG | {"model_type": "none"}]
)
def test_others_go_on(config: dict[str, object]) -> None:
    refuse_broken(config)
