"""Prompts with the model's own answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekit.compress.self_calibration import answer_tokens, demonstrations, prompt_ids, prompt_text, with_answers
from moekit.data.batches import TokenizedDocument, tokenize
from moekit.data.text import Document
from moekit.errors import BadConfig, BadData
from moekit.evaluation import complete
from tests.families import build
from tests.tiny import tokenizer

PROMPTS = [
    Document("the old mill ", "prose", "a.txt"),
    Document("12 + 7 = ", "sums", "b.txt"),
    Document("a ", "prose", "c.txt"),
]
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def writer(family: str = "qwen3_moe") -> Any:
    """A model that writes only what its tokenizer can spell."""
    model = build(family).double()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer()) :] = 0
    return model


def chatting() -> Any:
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def test_texts_are_prompt_and_what_the_model_says_to_it() -> None:
    model = writer()
    answered = with_answers(model, tokenizer(), PROMPTS, max_new_tokens=6)
    said = complete(model, tokenizer(), [d.text for d in PROMPTS], max_new_tokens=6).completions
    assert [d.text for d in answered] == [c.prompt + c.text for c in said]
    assert [(d.domain, d.source) for d in answered] == [(d.domain, d.source) for d in PROMPTS]
    assert all(len(a.text) > len(p.text) for a, p in zip(answered, PROMPTS, strict=True))


def test_sequences_are_what_the_model_saw_and_wrote() -> None:
    model = writer()
    for size in (1, 3):
        sequences = answer_tokens(model, tokenizer(), PROMPTS, max_new_tokens=6, batch_size=size)
        said = complete(model, tokenizer(), [d.text for d in PROMPTS], max_new_tokens=6).completions
        assert [s.ids for s in sequences] == [[*c.prompt_ids, *c.ids] for c in said]
        assert [(s.domain, s.index) for s in sequences] == [("prose", 0), ("sums", 1), ("prose", 2)]


def test_an_answer_ends_with_the_tokenizers_end_token() -> None:
    model, made = writer(), tokenizer()
    free = answer_tokens(model, made, PROMPTS[:1], max_new_tokens=8)[0].ids
    start = len(prompt_ids(made, PROMPTS[0].text))
    made.eos_token = made.convert_ids_to_tokens(free[start + 1])
    first = free.index(free[start + 1], start)
    assert answer_tokens(model, made, PROMPTS[:1], max_new_tokens=8)[0].ids == free[: first + 1]


def test_a_chat_template_frames_the_prompt() -> None:
    made = chatting()
    assert prompt_text(made, "hi") == "<bos>user: hi\n>"
    ids = prompt_ids(made, "hi")
    assert ids[0] == made.bos_token_id
    assert ids.count(made.bos_token_id) == 1
    assert prompt_text(tokenizer(), "hi") == "hi"


def test_texts_of_a_chat_are_tokenized_to_what_the_model_saw() -> None:
    model, made = writer(), chatting()
    sequences = answer_tokens(model, made, PROMPTS, max_new_tokens=6)
    texts = with_answers(model, made, PROMPTS, max_new_tokens=6)
    assert [t.ids for t in tokenize(texts, made)] == [s.ids for s in sequences]


def test_tokenizers_that_drop_a_leading_space_lose_none() -> None:
    class Dropping:
        """Decodes as sentencepiece does: without the space before the first word."""

        def __init__(self) -> None:
            self.inner = tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return self.inner.decode(ids, **kwargs).removeprefix(" ")

    model = writer()
    space = tokenizer()(" ")["input_ids"][0]
    prompt = Document("the old mill", "prose", "a.txt")
    with torch.no_grad():  # every answer begins with a space
        model.lm_head.weight[:] = 0
        hidden = model.model(torch.tensor([prompt_ids(tokenizer(), prompt.text)])).last_hidden_state[0, -1]
        model.lm_head.weight[space] = hidden
    [answered] = with_answers(model, Dropping(), [prompt], max_new_tokens=1)  # type: ignore[arg-type]
    assert answered.text == "the old mill "


def test_what_cannot_be_asked() -> None:
    model = writer()
    with pytest.raises(BadConfig, match="max_new_tokens"):
        with_answers(model, tokenizer(), PROMPTS, max_new_tokens=0)
    with pytest.raises(BadData, match="no prompts"):
        with_answers(model, tokenizer(), [], max_new_tokens=2)
    with pytest.raises(BadData, match="no tokens"):
        with_answers(model, tokenizer(), [Document("", "prose", "a")], max_new_tokens=2)
    with pytest.raises(BadConfig, match="embeds 50"):
        with_answers(build("qwen3_moe", vocab_size=50), tokenizer(), PROMPTS, max_new_tokens=2)


def lengths(*sizes: int, domain: str = "maths", start: int = 0) -> list[TokenizedDocument]:
    return [TokenizedDocument([1] * size, domain, start + i) for i, size in enumerate(sizes)]


def test_the_longest_of_each_domain_are_demonstrations() -> None:
    items = lengths(3, 9, 1, 7) + lengths(2, 1, 5, domain="code", start=4)
    assert [d.index for d in demonstrations(items, 2)] == [1, 3, 4, 6]
    assert demonstrations(items) == items
    texts = [Document("x" * size, "maths", str(size)) for size in (4, 8, 6)]
    assert [d.source for d in demonstrations(texts, 1)] == ["8"]


def test_among_equal_lengths_the_seed_decides() -> None:
    items = lengths(*[5] * 30)
    first = demonstrations(items, 4, seed=1)
    assert first == demonstrations(items, 4, seed=1)
    assert len({tuple(d.index for d in demonstrations(items, 4, seed=s)) for s in range(5)}) == 5
    assert [d.index for d in first] == sorted(d.index for d in first)


def test_no_demonstrations() -> None:
    with pytest.raises(BadConfig, match="0 demonstrations"):
        demonstrations(lengths(1), 0)
    with pytest.raises(BadData, match="no texts"):
        demonstrations([], 3)  # type: ignore[type-var]
