"""A family that the installed transformers breaks off in is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
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


def test_it_draws_no_number_that_the_work_would_draw() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    refuse_broken(CONFIG | {"model_type": "qwen3_vl_moe"})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_package_that_is_not_there_says_nothing_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanting(*args: object, **named: object) -> None:
        raise ImportError("needs a package")

    monkeypatch.setattr(modeling_llama4.Llama4ForCausalLM, "__init__", wanting)
    refuse_broken(CONFIG)
