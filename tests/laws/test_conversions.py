"""What every way to make a MoE of a dense model promises."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit import catalogue
from moekit.catalogue import MethodRecord, Trait
from moekit.conversion.base import Conversion
from moekit.errors import BadConfig
from tests.dense import dense_model

IDS = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(1))


def of(*having: Trait, without: tuple[Trait, ...] = ()) -> list[Any]:
    """Registered conversions with some traits, and without others."""
    return [
        pytest.param(record, id=record.name)
        for record in catalogue.methods("convert")
        if record.traits.issuperset(having) and not record.traits & set(without)
    ]


@cache
def dense() -> PreTrainedModel:
    return dense_model("llama")


def example(record: MethodRecord) -> Conversion:
    made: Conversion = record.cls.examples()[0]
    return made


@cache
def converted(record: MethodRecord, seed: int = 5) -> PreTrainedModel:
    return example(record).convert(dense(), calibration=IDS, seed=seed)


def networks(model: PreTrainedModel) -> int:
    """Weights of the feed-forward networks; routers and gates of shared experts are none."""
    found = model.named_parameters()
    return sum(p.numel() for name, p in found if ".mlp." in name and not name.endswith("gate.weight"))


def alike(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    other = two.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("record", of("stock"))
def test_stock_transformers_computes_the_same(record: MethodRecord, tmp_path: Path) -> None:
    moe = converted(record)
    logits = moe(IDS).logits
    assert bool(logits.isfinite().all())
    moe.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert alike(again, moe)
    torch.testing.assert_close(again(IDS).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("record", of())
def test_what_is_no_feed_forward_network_stays(record: MethodRecord) -> None:
    stayed = {name: tensor for name, tensor in dense().state_dict().items() if ".mlp." not in name}
    found = converted(record).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stayed.items())
    assert {name for name in found if ".mlp." not in name} == set(stayed)


@pytest.mark.parametrize("record", of("grows"))
def test_there_are_more_weights(record: MethodRecord) -> None:
    assert networks(converted(record)) > networks(dense())


@pytest.mark.parametrize("record", of(without=("grows", "narrows")))
def test_there_are_as_many_weights(record: MethodRecord) -> None:
    assert networks(converted(record)) == networks(dense())


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("record", of())
def test_the_seed_matters_where_it_is_said_to(record: MethodRecord) -> None:
    assert alike(converted.__wrapped__(record), converted(record))
    differ = any(not alike(converted(record, seed), converted(record)) for seed in range(4))
    assert differ == ("stochastic" in record.traits)


@pytest.mark.parametrize("record", of())
def test_a_missing_text_is_refused_where_one_is_needed(record: MethodRecord) -> None:
    method = example(record)
    if method.needs_calibration:
        with pytest.raises(BadConfig):
            method.convert(dense())
    else:
        assert method.convert(dense()).config.num_hidden_layers == dense().config.num_hidden_layers
