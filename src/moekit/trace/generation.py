"""Record what routers choose while a model writes, token by token with its key-value cache.

Legend: B rows of a batch, S positions of a pass, P positions of the padded prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit._progress import Progress, track
from moekit.checkpoint.several import writer_of
from moekit.data.encoding import encode
from moekit.data.forcing import refuse_reader
from moekit.errors import BadConfig, BadData
from moekit.trace.live import Recorder
from moekit.trace.recorder import evaluating
from moekit.trace.recording import Recording
from moekit.trace.rows import UNNAMED_DOMAIN, Labels, RowCounter, Rows, batch_shape
from moekit.trace.store import Trace
from moekit.trace.tokens import GENERATED, PREFILL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSED = {"num_beams", "num_return_sequences", "assistant_model", "stopping_criteria", "stop_strings"}
_REFUSED |= {"prompt_lookup_num_tokens", "custom_generate", "synced_gpus"}


class Generation(NamedTuple):
    """What `record_generation` returns.

    Attributes:
        trace: prompts (phase 0) and what was generated (phase 1); the last token a row generates is never fed back, so
            it is not in the trace.
        tokens: ids generated for each prompt, end-of-text included, padding not.
    """

    trace: Trace
    tokens: list[list[int]]


class _Writing:
    """Labels the passes of one `generate` call: a row counts until it has written its end-of-text token."""

    def __init__(self, counter: RowCounter, prompts: Labels, ends: Tensor) -> None:
        self._counter = counter
        self._prompts = prompts
        self._ends = ends
        self._done = 0
        self._alive_B = torch.ones(len(prompts.mask_BS), dtype=torch.bool)

    def __call__(self, arguments: Mapping[str, Any]) -> Rows:
        rows, width = batch_shape(arguments)
        length = self._prompts.mask_BS.shape[1]
        if rows != len(self._alive_B):
            raise BadConfig("generate changed the number of rows", hint="record with one sequence a prompt, no beams")
        start, self._done = self._done, self._done + width
        if not start:
            return self._counter.start(self._prompts.columns(width))
        if self._done <= length:  # long prompts may be read in pieces
            return self._counter.resume(self._prompts.mask_BS[:, start : self._done], PREFILL)
        if width != 1:
            raise BadConfig("several tokens were generated in one pass", hint="record without assisted generation")
        self._alive_B &= ~torch.isin(arguments["input_ids"][:, 0].cpu(), self._ends)
        return self._counter.resume(self._alive_B[:, None].clone(), GENERATED)


def _end_tokens(model: PreTrainedModel, generate: Mapping[str, Any]) -> Tensor:
    """Ids that end a row, as `generate` will understand them."""
    config = generate.get("generation_config") or model.generation_config
    ends = generate.get("eos_token_id", getattr(config, "eos_token_id", None))
    if isinstance(ends, Tensor):
        ends = ends.flatten().tolist()
    return torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else list(ends), dtype=torch.int64)


def _to_ids(prompts: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[list[int]], list[str]]:
    ids: list[list[int]] = []
    domains: list[str] = []
    for number, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else getattr(prompt, "text", None)
        domains.append(str(getattr(prompt, "domain", UNNAMED_DOMAIN)))
        if text is None:
            ids.append([int(i) for i in prompt])
        elif tokenizer is None:
            raise BadConfig("prompts are text, but no tokenizer was given", hint="pass tokenizer=, or token ids")
        else:
            ids.append(encode(text, tokenizer))
        if not ids[-1]:
            raise BadData(f"prompt {number} has no tokens", hint="leave empty prompts out")
    return ids, domains


def _left_padded(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, ids))
    ids_BP = torch.full((len(ids), longest), pad_id, dtype=torch.int64)
    mask_BP = torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        ids_BP[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask_BP[row, longest - len(tokens) :] = True
    return ids_BP, mask_BP


def _cut(ids_S: Sequence[int], ends: Tensor) -> list[int]:
    stops = {int(e) for e in ends}
    for position, token in enumerate(ids_S):
        if token in stops:
            return list(ids_S[: position + 1])
    return list(ids_S)


def _write(
    recorder: Recorder, ids: Sequence[Sequence[int]], domains: Sequence[str], generate: Mapping[str, Any]
) -> list[list[int]]:
    """One `generate` call."""
    model = recorder.model
    assert isinstance(model, PreTrainedModel)
    ends = _end_tokens(model, generate)
    pad = generate.get("pad_token_id", model.generation_config.pad_token_id)
    pad_id = int(pad) if isinstance(pad, int) else int(ends[0]) if len(ends) else 0
    ids_BP, mask_BP = _left_padded(ids, pad_id)
    names = tuple(dict.fromkeys(domains))
    domain_B1 = torch.tensor([names.index(name) for name in domains])[:, None]
    prompts = Labels(mask_BP, None, domain_B1.expand_as(ids_BP), names)
    recorder.label_by(_Writing(recorder.counter, prompts, ends))
    try:
        written_BS = writer_of(model).generate(
            ids_BP.to(model.device),
            attention_mask=mask_BP.to(device=model.device, dtype=torch.int64),
            # Hooks do not run in the graphs that generate compiles for static caches.
            **{"disable_compile": True, "use_cache": True, **generate, "pad_token_id": pad_id},
        )
    finally:
        recorder.label_by(None)
    return [_cut(row, ends) for row in written_BS[:, ids_BP.shape[1] :].tolist()]


def record_generation(
    model: PreTrainedModel,
    prompts: Iterable[Any],
    *,
    max_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    statistics: Iterable[str] = ("basic",),
    keep_choices: bool = True,
    weights: bool = False,
    layers: Sequence[int] | None = None,
    once: bool = False,
    source: str = "",
    seed: int | None = None,
    fingerprint: str | None = None,
    progress: Progress | None = None,
    **generate: Any,
) -> Generation:
    """Let a model answer prompts and record what its routers choose on prompts and answers.

    Prompts of a batch are padded on the left; padding, and what is fed to rows that have ended, is never counted, so
    the trace does not depend on how prompts are batched.

    Args:
        model: a MoE, on any device.
        prompts: texts, `Document`s (whose domains are kept), or lists of token ids.
        max_new_tokens: at most so many new tokens a prompt.
        tokenizer: needed for texts.
        batch_size: prompts at a time.
        statistics: see `moekit.trace.Recording`, also for the arguments not named here.
        keep_choices: keep each token's choices.
        weights: keep their gate weights too.
        layers: decoder layers to record.
        once: compute single experts' outputs once where a statistic reads them.
        source: where the prompts came from.
        seed: sets torch's random state, where tokens are sampled.
        fingerprint: the model's.
        progress: told of each batch.
        **generate: passed on to `model.generate` (`do_sample`, `temperature`, `eos_token_id`, ...).

    Returns:
        The trace and the generated ids.

    Raises:
        BadData: no prompts, or an empty one.
        BadConfig: texts without tokenizer, or a way of generating that cannot be recorded (beams, assistants).
        NumericFault: NaN or infinity in a router, with its layer.
        UnsupportedModel: no MoE, or a compiled one.
    """
    refuse_reader(getattr(model, "config", None), "answers cannot be recorded as they are written")
    ids, domains = _to_ids(prompts, tokenizer)
    if not ids:
        raise BadData("there are no prompts", hint="give at least one")
    recording = Recording(
        statistics=statistics,
        keep_choices=keep_choices,
        weights=weights,
        layers=layers,
        once=once,
        tokenizer=tokenizer,
        source=source,
        seed=seed,
        fingerprint=fingerprint,
    )
    recorder = Recorder(model, recording)
    if recorder.needs_loss:
        raise BadConfig(
            "what a model writes has no loss to take gradients of",
            hint="record statistics of gradients on a given text",
        )
    for name in _REFUSED & set(generate):
        raise BadConfig(f"generation with {name} cannot be recorded", hint="leave it out")
    generate = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate}
    if seed is not None:
        torch.manual_seed(seed)
    tokens: list[list[int]] = []
    starts = range(0, len(ids), batch_size)
    with recorder, evaluating(model):
        for start in track(starts, "generating", progress, len(starts)):
            part = slice(start, start + batch_size)
            tokens += _write(recorder, ids[part], domains[part], generate)
    return Generation(recorder.trace(), tokens)
