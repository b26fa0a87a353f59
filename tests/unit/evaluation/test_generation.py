from __future__ import annotations

import pytest
import torch

from moekit.errors import BadConfig, BadData
from moekit.evaluation.generation import Completion, Completions, agreement, complete, side_by_side
from tests.families import build

PROMPTS = ["abc", "hello world", "abd", "x", "tuv"]


def greedy(model, ids, steps, end=None):
    """One token at a time, the whole text each time."""
    ids = list(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_continuations_are_greedy_and_independent_of_the_other_prompts(tokenizer, family):
    model = build(family)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token, saved = None, tokenizer.eos_token
    try:
        together = complete(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2, name="m")
    finally:
        tokenizer.eos_token = saved
    assert together.model == "m"
    assert [c.prompt for c in together.completions] == PROMPTS
    for completion in together.completions:
        assert [*completion.prompt_ids, *completion.ids] == greedy(model, completion.prompt_ids, 6)
        assert completion.text == tokenizer.decode(completion.ids, skip_special_tokens=True)


def test_a_continuation_ends_with_the_end_token(tokenizer):
    model = build("mixtral")
    free = complete(model, tokenizer, ["abc", "xyz"], max_new_tokens=8)
    end = free.completions[0].ids[2]
    model.generation_config.eos_token_id = [end, 99]
    ended = complete(model, tokenizer, ["abc", "xyz"], max_new_tokens=8)
    ids = ended.completions[0].ids
    assert ids[-1] == end
    assert ids == free.completions[0].ids[: free.completions[0].ids.index(end) + 1]


def completions(name, *rows):
    return Completions(
        model=name,
        completions=tuple(
            Completion(prompt=f"p{i}", prompt_ids=(1,), ids=tuple(ids), text=str(ids)) for i, ids in enumerate(rows)
        ),
    )


def test_where_two_models_part():
    a = completions("a", [1, 2, 3], [4, 5, 6, 7], [8, 9], [1])
    b = completions("b", [1, 2, 3], [4, 5, 0, 7], [8], [2])
    result = side_by_side(a, b, agreement=0.9)
    assert [p.first_difference for p in result.pairs] == [None, 2, 1, 0]
    assert [p.common for p in result.pairs] == [3, 2, 1, 0]
    assert result.identical == 0.25
    assert result.common_share == pytest.approx(6 / 10)
    assert result.agreement == 0.9
    assert (result.a, result.b) == ("a", "b")


def test_agreement_is_counted_with_the_other_models_text_before_each_token(tokenizer):
    a, b = build("mixtral"), build("mixtral", seed=1)
    of_a = complete(a, tokenizer, PROMPTS, max_new_tokens=5)
    assert agreement(a, of_a) == 1.0
    same = total = 0
    for c in of_a.completions:
        for i, token in enumerate(c.ids):
            total += 1
            same += greedy(b, [*c.prompt_ids, *c.ids[:i]], 1)[-1] == token
    assert agreement(b, of_a, batch_tokens=8) == pytest.approx(same / total)
    with pytest.raises(BadData, match="nothing was generated"):
        agreement(a, completions("a", []))


def test_bad_prompts_are_refused(tokenizer):
    model = build("mixtral")
    for prompts in ([], ["abc", ""]):
        with pytest.raises(BadData, match="nothing to continue"):
            complete(model, tokenizer, prompts)
    with pytest.raises(BadConfig, match="max_new_tokens"):
        complete(model, tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(BadConfig, match="embeds 50"):
        complete(build("mixtral", vocab_size=50), tokenizer, ["~"])
    with pytest.raises(BadData, match="different prompts"):
        side_by_side(completions("a", [1]), completions("b", [1], [2]))
