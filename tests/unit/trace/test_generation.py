"""Traces of generation: what is recorded step by step with a cache equals a forward over the whole text."""

from __future__ import annotations

import pytest
import torch

from moekit.data.text import Document
from moekit.errors import BadConfig, BadData
from moekit.trace import Recorder, record, record_generation
from tests.families import FAMILIES, build
from tests.unit.trace.samples import same_statistics

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [40], [3, 100, 4, 77]]


def exact(family: str) -> torch.nn.Module:
    model = build(family).double()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_equals_a_forward_over_prompt_and_answer(family: str) -> None:
    model = exact(family)
    trace, written = record_generation(model, PROMPTS, max_new_tokens=7, batch_size=3, weights=True)
    texts = [prompt + new[:-1] for prompt, new in zip(PROMPTS, written, strict=True)]
    whole = record(model, [torch.tensor([text]) for text in texts], weights=True)
    assert trace.meta.tokens == sum(map(len, texts))
    assert torch.equal(trace.sequence_N, whole.sequence_N)
    assert torch.equal(trace.document_N, whole.document_N)
    assert torch.equal(trace.position_N, whole.position_N)
    for layer in trace.meta.layers:
        assert torch.equal(trace.indices(layer), whole.indices(layer))
        torch.testing.assert_close(trace.weights(layer), whole.weights(layer), rtol=1e-3, atol=1e-4)
    same_statistics(trace.statistics, whole.statistics)
    phases = [n for p, w in zip(PROMPTS, written, strict=True) for n in [0] * len(p) + [1] * (len(w) - 1)]
    assert trace.phase_N.tolist() == phases


@pytest.mark.parametrize("once", [False, True])
def test_rows_that_ended_are_not_counted(once: bool) -> None:
    model = exact("mixtral")
    free = record_generation(model, PROMPTS, max_new_tokens=8).tokens
    end = free[1][2]  # the token that row 1 writes third ends it, and others later or never
    alone = [record_generation(model, [p], max_new_tokens=8, eos_token_id=end, once=once) for p in PROMPTS]
    together = record_generation(model, PROMPTS, max_new_tokens=8, batch_size=4, eos_token_id=end, once=once)
    assert together.tokens == [g.tokens[0] for g in alone]
    assert together.tokens[1] == free[1][: free[1].index(end) + 1]
    assert len({len(t) for t in together.tokens}) > 1
    assert together.trace.meta.tokens == sum(g.trace.meta.tokens for g in alone)
    assert together.trace.meta.tokens == sum(len(p) + len(t) - 1 for p, t in zip(PROMPTS, together.tokens, strict=True))
    for layer in (0, 1):
        expected = torch.cat([g.trace.indices(layer) for g in alone])
        assert torch.equal(together.trace.indices(layer), expected)
        assert together.trace.statistics is not None
        loads = [g.trace.statistics[layer]["load"] for g in alone if g.trace.statistics is not None]
        assert torch.equal(together.trace.statistics[layer]["load"], torch.stack(loads).sum(0))


def test_statistics_beyond_choices_while_generating() -> None:
    model = exact("qwen3_moe")
    names = ("basic", "outputs", "residual", "router", "inputs")
    trace, written = record_generation(model, PROMPTS, max_new_tokens=5, batch_size=4, statistics=names)
    texts = [torch.tensor([p + w[:-1]]) for p, w in zip(PROMPTS, written, strict=True)]
    whole = record(model, texts, statistics=names)
    assert trace.statistics is not None
    assert whole.statistics is not None
    for layer, stats in whole.statistics.items():
        for name, value in stats.items():
            got = trace.statistics[layer][name]
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_prompts_read_in_pieces() -> None:
    model = exact("mixtral")
    whole = record_generation(model, PROMPTS, max_new_tokens=4, batch_size=4)
    pieces = record_generation(model, PROMPTS, max_new_tokens=4, batch_size=4, prefill_chunk_size=2)
    assert pieces.tokens == whole.tokens
    assert torch.equal(pieces.trace.indices(0), whole.trace.indices(0))
    assert torch.equal(pieces.trace.phase_N, whole.trace.phase_N)
    assert torch.equal(pieces.trace.position_N, whole.trace.position_N)


def test_documents_keep_their_domains() -> None:
    class Letters:
        """One id a letter."""

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 100 + 3 for c in text]}

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(103)}

    documents = [Document("abc", "prose", "x"), Document("12", "code", "x"), "z"]
    trace, _ = record_generation(
        build("mixtral"), documents, max_new_tokens=3, tokenizer=Letters(), batch_size=2, eos_token_id=None
    )
    assert trace.meta.domains == ["prose", "code", "text"]
    assert trace.domain_N.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert [(e.domain, e.documents) for e in trace.meta.data] == [("prose", 1), ("code", 1), ("text", 1)]


def test_a_recorder_follows_a_users_own_generation() -> None:
    model = exact("mixtral")
    ids = torch.tensor([PROMPTS[1]])
    with Recorder(model) as recorder, torch.no_grad():
        written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    trace = recorder.trace()
    whole = record(model, [written[:, :-1]])
    assert torch.equal(trace.indices(0), whole.indices(0))
    assert trace.phase_N.tolist() == [0] * 5 + [1] * 3
    assert trace.sequence_N.unique().tolist() == [0]


def test_a_cache_from_before_the_recording_is_refused() -> None:
    model = build("mixtral")
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
        with Recorder(model), pytest.raises(BadConfig, match="not recorded from their start"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


def test_sampling_repeats_with_its_seed() -> None:
    model = build("mixtral")
    runs = [
        record_generation(model, PROMPTS, max_new_tokens=6, seed=seed, do_sample=True, temperature=2.0).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_what_cannot_be_recorded_is_refused() -> None:
    model = build("mixtral")
    for extra in ({"num_beams": 2}, {"assistant_model": model}, {"num_return_sequences": 2}):
        with pytest.raises(BadConfig, match="cannot be recorded"):
            record_generation(model, PROMPTS, max_new_tokens=2, **extra)
    with pytest.raises(BadConfig, match="no tokenizer"):
        record_generation(model, ["text"], max_new_tokens=2)
    with pytest.raises(BadData, match="no prompts"):
        record_generation(model, [], max_new_tokens=2)
    with pytest.raises(BadData, match="prompt 1 has no tokens"):
        record_generation(model, [[3], []], max_new_tokens=2)
