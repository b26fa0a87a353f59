"""A token's output depends on earlier tokens only, and generating token by token equals one pass over all."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from moekit.catalogue import MethodRecord
from moekit.errors import UnsupportedModel
from moekit.runtime import attach, detach
from tests.families import build, logits, tokens
from tests.parts import Attended, Fading, Neighbours, stir
from tests.runtime_cases import cases, hang

KINDS = ("routing", "block", "experts")
CHANGED = 8


@pytest.mark.parametrize(("record", "family"), cases(KINDS))
def test_a_changed_token_changes_nothing_before_it(record: MethodRecord, family: str) -> None:
    model = build(family)
    hang(model, family, record)
    stir(model)
    ids = tokens(2, 12)
    other = ids.clone()
    other[:, CHANGED] = (other[:, CHANGED] - 3 + 1) % 100 + 3
    first, second = logits(model, ids), logits(model, other)
    torch.testing.assert_close(first[:, :CHANGED], second[:, :CHANGED], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:, CHANGED:], second[:, CHANGED:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("record", "family"), cases(KINDS))
def test_token_by_token_equals_one_pass(record: MethodRecord, family: str) -> None:
    model = build(family)
    hang(model, family, record)
    stir(model)
    ids = tokens(2, 10)
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    pieces = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 7), (7, 10))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("record", "family"), cases(KINDS, "sequence"))
def test_padding_changes_nothing(record: MethodRecord, family: str) -> None:
    model = build(family)
    hang(model, family, record)
    stir(model)
    ids = tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 9, dtype=torch.int64)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    left = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 4:]
    torch.testing.assert_close(left, logits(model, ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("record", "family"), cases(KINDS, "sequence"))
def test_beam_search_takes_what_parts_keep_along(record: MethodRecord, family: str) -> None:
    model = build(family)
    hang(model, family, record)
    stir(model)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    kept = model.generate(tokens(2, 6), use_cache=True, **settings)
    assert torch.equal(kept, model.generate(tokens(2, 6), use_cache=False, **settings))


@torch.no_grad()
def test_a_cache_that_is_cut_back_is_followed() -> None:
    model = build("qwen3_moe")
    attach(model, Neighbours())
    stir(model)
    ids = tokens(1, 10)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :8], past_key_values=cache)
    cache.crop(-3)
    rest = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits(model, ids)[:, 5:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_part_is_refused() -> None:
    model = build("qwen3_moe")
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(1, 5), past_key_values=cache)
    attach(model, Neighbours())
    with pytest.raises(UnsupportedModel, match="5 earlier positions") as refused:
        model(input_ids=tokens(1, 1), past_key_values=cache)
    assert refused.value.layer == 0


@torch.no_grad()
@pytest.mark.parametrize(("record", "family"), cases(KINDS, "attention"))
def test_the_kernel_of_attention_does_not_matter(record: MethodRecord, family: str) -> None:
    model = build(family)
    hang(model, family, record)
    stir(model)
    found = {}
    for implementation in ("eager", "sdpa"):
        try:
            model.set_attn_implementation(implementation)
        except ValueError:  # a family that has none but its own
            continue
        found[implementation] = logits(model)
    torch.testing.assert_close(found.get("sdpa", found["eager"]), found["eager"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoe"])
def test_mixing_by_attention_is_the_attention_map_times_values(family: str, implementation: str) -> None:
    """Against the map that eager attention returns, mean over heads."""
    model = build(family)
    model.set_attn_implementation(implementation)
    seen = {}

    class Look(Attended):
        def score(self, inputs):  # type: ignore[no-untyped-def]
            values = inputs.context.sequences(inputs.logits)
            seen[inputs.layer] = (values, inputs.context.attention(inputs.layer).mix(values))
            return super().score(inputs)

    attach(model, Look())
    ids = tokens(2, 9)
    model(input_ids=ids, use_cache=False)
    detach(model)
    model.set_attn_implementation("eager")
    maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    for layer, (values, mixed) in seen.items():
        torch.testing.assert_close(mixed, maps[layer].mean(dim=1) @ values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_state_does_not_go_back_with_a_cache_that_is_cut() -> None:
    model = build("qwen3_moe")
    attach(model, Fading())
    stir(model)
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(1, 8), past_key_values=cache)
    cache.crop(-3)
    with pytest.raises(UnsupportedModel, match="holds 5 positions, but 'memory' was kept after 8"):
        model(input_ids=tokens(1, 1), past_key_values=cache)
