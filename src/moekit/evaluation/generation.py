"""The same prompts through two checkpoints, side by side: where they part, and how often they agree.

Two numbers, since each alone misleads. The *common share* is what is left of a's continuation once the two have parted;
a single early difference makes it small. The *agreement* feeds a's continuation to b and counts at how many positions
b would have chosen the same next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from moekit._progress import Progress, track
from moekit.checkpoint.several import writer_of
from moekit.data import vocabulary
from moekit.data.encoding import encode
from moekit.data.forcing import refuse_reader
from moekit.errors import BadConfig, BadData
from moekit.evaluation.likelihood import Scorer, evaluating
from moekit.evaluation.windows import Window, by_length


class Completion(BaseModel):
    """How one model continued one prompt.

    Attributes:
        prompt: the text given.
        prompt_ids: its tokens.
        ids: tokens of the continuation, with the end token if it came.
        text: the continuation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


class Completions(BaseModel):
    """How one model continued several prompts.

    Attributes:
        model: what to call it.
        completions: one per prompt, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    completions: tuple[Completion, ...]


class Pair(BaseModel):
    """Two continuations of one prompt.

    Attributes:
        prompt: the text given.
        a: text of the first model.
        b: text of the second.
        first_difference: number of the first token that differs (0 is the first one generated); None if none does.
        common: tokens both share before that.
        length: tokens of the longer continuation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    a: str
    b: str
    first_difference: int | None
    common: int
    length: int


class SideBySide(BaseModel):
    """Continuations of two models.

    Attributes:
        a: name of the first.
        b: name of the second.
        pairs: one per prompt.
        identical: share of prompts continued exactly alike.
        common_share: share of tokens that come before the first difference.
        agreement: share of a's tokens that b would have chosen too, given a's text; None if not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: str
    b: str
    pairs: tuple[Pair, ...]
    identical: float
    common_share: float
    agreement: float | None = None


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    name: str = "",
    progress: Progress | None = None,
) -> Completions:
    """Continue prompts greedily.

    Prompts of the same number of tokens share a batch, so there is no padding and a continuation does not depend on the
    other prompts.

    Args:
        model: causal language model of transformers; its mode is restored afterwards.
        tokenizer: its tokenizer.
        prompts: texts to continue; none may be empty.
        max_new_tokens: longest continuation.
        batch_size: prompts at a time.
        name: what to call the model.
        progress: told of each batch.

    Raises:
        BadData: no prompts, or an empty one.
        BadConfig: `max_new_tokens` below 1, or a tokenizer of another model.
        UnsupportedModel: an encoder with a decoder, which continues nothing.
    """
    refuse_reader(getattr(model, "config", None), "prompts cannot be continued")
    if max_new_tokens < 1:
        raise BadConfig(f"max_new_tokens is {max_new_tokens}", hint="choose at least 1")
    encoded = [tuple(encode(prompt, tokenizer)) for prompt in prompts]
    if not encoded or not all(encoded):
        raise BadData("there is nothing to continue: no prompt, or an empty one", hint="give at least one word")
    vocabulary.check(max(max(ids) for ids in encoded), vocabulary.embedding_rows(model))
    device = model.get_input_embeddings().weight.device
    end = _end_tokens(model, tokenizer)
    done: dict[int, Completion] = {}
    with evaluating(model):
        for some in track(_equal_lengths(encoded, batch_size), "generating", progress):
            out_BS = writer_of(model).generate(
                input_ids=torch.tensor([encoded[i] for i in some], device=device),
                attention_mask=torch.ones(len(some), len(encoded[some[0]]), dtype=torch.int64, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,
                pad_token_id=min(end, default=0),
            )
            for number, row in zip(some, out_BS[:, len(encoded[some[0]]) :].tolist(), strict=True):
                ids = _until(row, end)
                text = tokenizer.decode(ids, skip_special_tokens=True)
                done[number] = Completion(prompt=prompts[number], prompt_ids=encoded[number], ids=ids, text=text)
    return Completions(model=name, completions=tuple(done[i] for i in range(len(prompts))))


def side_by_side(a: Completions, b: Completions, agreement: float | None = None) -> SideBySide:
    """Put two models' continuations beside each other.

    Args:
        a: the baseline's.
        b: the other one's, of the same prompts.
        agreement: what `agreement(model_b, a)` gave, if measured.

    Raises:
        BadData: other prompts.
    """
    if [c.prompt for c in a.completions] != [c.prompt for c in b.completions]:
        raise BadData("the two models continued different prompts", hint="give both the same prompts")
    pairs = []
    for x, y in zip(a.completions, b.completions, strict=True):
        common = next(
            (i for i, (s, t) in enumerate(zip(x.ids, y.ids, strict=False)) if s != t), min(len(x.ids), len(y.ids))
        )
        length = max(len(x.ids), len(y.ids))
        pairs.append(
            Pair(
                prompt=x.prompt,
                a=x.text,
                b=y.text,
                first_difference=None if common == length else common,
                common=common,
                length=length,
            )
        )
    return SideBySide(
        a=a.model,
        b=b.model,
        pairs=tuple(pairs),
        identical=sum(p.first_difference is None for p in pairs) / len(pairs),
        common_share=sum(p.common for p in pairs) / max(1, sum(p.length for p in pairs)),
        agreement=agreement,
    )


def agreement(model: Any, completions: Completions, *, batch_tokens: int = 2048) -> float:
    """Share of another model's generated tokens that this model would have chosen too, each given the text before it.

    Args:
        model: the model asked.
        completions: the other model's.
        batch_tokens: rows times longest row of one forward.

    Raises:
        BadData: nothing was generated.
    """
    windows = [
        Window.of([*c.prompt_ids, *c.ids], len(c.prompt_ids), number)
        for number, c in enumerate(completions.completions)
        if c.ids
    ]
    if not windows:
        raise BadData("nothing was generated, so there is nothing to agree on")
    vocabulary.check(max(max(max(w.inputs), max(w.targets)) for w in windows), vocabulary.embedding_rows(model))
    scorer = Scorer(model)
    same = total = 0
    with evaluating(model):
        for group in by_length(windows, batch_tokens):
            for scores in scorer(group):
                same += int(scores.greedy_M.sum())
                total += scores.greedy_M.numel()
    return same / total


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = stated if isinstance(stated, list) else [stated]
    return {int(i) for i in [*found, getattr(tokenizer, "eos_token_id", None)] if i is not None}


def _until(ids: Sequence[int], end: set[int]) -> tuple[int, ...]:
    """Cut after the first end token; what follows is padding."""
    for i, token in enumerate(ids):
        if token in end:
            return tuple(ids[: i + 1])
    return tuple(ids)


def _equal_lengths(encoded: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    by_size: dict[int, list[int]] = {}
    for number, ids in enumerate(encoded):
        by_size.setdefault(len(ids), []).append(number)
    return [some[i : i + batch_size] for some in by_size.values() for i in range(0, len(some), batch_size)]
