"""Negative log likelihood of tokens, with logits made only where they are needed, a few rows at a time.

For a model with a vocabulary of 150,000 the logits of 2,048 tokens take more than a gigabyte; here they are made in
chunks and only for tokens that are scored. That needs the head apart from the rest, which is right only where a model
does nothing to its logits after the head (some scale or cap them): the first window is run through the whole model
and tells. Otherwise the model's own logits are used, with smaller batches.

Legend: B rows, S tokens in a row, M scored tokens of a batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit._memory import is_out_of_memory
from moekit.data.forcing import decoder_inputs
from moekit.errors import NumericFault, OutOfBudget
from moekit.evaluation.windows import Window
from moekit.runtime.answering import telling_its_own_faults

log = logging.getLogger(__name__)

CHUNK_BYTES = 128 * 2**20
# Where the head cannot be split off, the most that a batch's logits may take.
WHOLE_BYTES = 512 * 2**20


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, and afterwards every module in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def score_logits(logits_MV: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log softmax(logits)[target] in fp32, [M], and whether the target is the likeliest token, [M]."""
    logits_MV = logits_MV.float()
    of_target_M = logits_MV.gather(-1, target_M[:, None]).squeeze(-1)
    return torch.logsumexp(logits_MV, -1) - of_target_M, logits_MV.argmax(-1) == target_M


def mean_divergence(log_MV: Tensor, logits_MV: Tensor) -> float:
    """Mean over positions of KL(p || q), nats, in fp32 and added up in fp64; NaN where a logit is.

    Args:
        log_MV: log p, normalised.
        logits_MV: of q.
    """
    gap_MV = log_MV - logits_MV.float().log_softmax(-1)
    # Where p is zero its logarithm is minus infinity, and adds nothing.
    added_MV = (log_MV.exp() * gap_MV).masked_fill(log_MV.isneginf(), 0.0)
    return float(added_MV.double().sum(-1).mean())


class Scores(NamedTuple):
    """Scores of one window's targets.

    Attributes:
        nll_M: negative log likelihood of each target, nats, fp64.
        greedy_M: whether each target is the token the model finds likeliest.
    """

    nll_M: Tensor
    greedy_M: Tensor


class Scorer:
    """Scores windows with one model; what fails for lack of memory is tried again in halves.

    Args:
        model: a causal language model of transformers.
        chunk_bytes: how much memory the fp32 logits of one chunk may take.
    """

    def __init__(self, model: Any, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.model = model
        self.head: nn.Module | None = model.get_output_embeddings()
        self.base: nn.Module = model.base_model
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.chunk = max(1, chunk_bytes // (4 * self.vocabulary))
        self.apart: bool | None = None if self.head is not None and self.base is not model else False

    @torch.inference_mode()
    def __call__(self, windows: Sequence[Window]) -> list[Scores]:
        """Score each window's targets.

        Raises:
            NumericFault: a likelihood is NaN or infinite.
            OutOfBudget: not even one window fits in memory.
        """
        if self.apart is None and len(windows) > 1:
            shortest = min(range(len(windows)), key=lambda i: len(windows[i].inputs))
            [first] = self([windows[shortest]])
            rest = self([w for i, w in enumerate(windows) if i != shortest])
            return [*rest[:shortest], first, *rest[shortest:]]
        cells = len(windows) * max(len(w.inputs) for w in windows) * self.vocabulary
        if len(windows) > 1 and not self.apart and 4 * cells > WHOLE_BYTES:
            return self._halves(windows)
        try:
            return self._score(windows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(windows) == 1:
            raise OutOfBudget(
                f"a window of {len(windows[0].inputs)} tokens does not fit in memory",
                hint="choose a smaller window, or a device with more memory",
            )
        log.warning("out of memory on %d windows; trying halves", len(windows))
        return self._halves(windows)

    def _halves(self, windows: Sequence[Window]) -> list[Scores]:
        half = len(windows) // 2
        return self(windows[:half]) + self(windows[half:])

    def _score(self, windows: Sequence[Window]) -> list[Scores]:
        ids_BS, mask_BS = pad(windows, self.device)
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False}
        inputs |= decoder_inputs(self.model, ids_BS, mask_BS)
        sizes = [len(w.targets) for w in windows]
        row_M = torch.repeat_interleave(torch.tensor(sizes))
        column_M = torch.tensor([p for w in windows for p in w.positions])
        target_M = torch.tensor([t for w in windows for t in w.targets])
        chunks = [slice(i, i + self.chunk) for i in range(0, target_M.numel(), self.chunk)]
        # A model spread over several devices answers on another one than it is asked on: indices follow the answer.
        if self.apart:
            assert self.head is not None
            hidden_BSH = self.base(**inputs)[0]
            row_M, column_M, target_M = (t.to(hidden_BSH.device) for t in (row_M, column_M, target_M))
            hidden_MH = hidden_BSH[row_M, column_M]
            parts = [score_logits(self.head(hidden_MH[chunk]), target_M[chunk]) for chunk in chunks]
        else:
            with telling_its_own_faults(self.model):
                logits_BSV = self._whole(inputs) if self.apart is None else self.model(**inputs).logits
            row_M, column_M, target_M = (t.to(logits_BSV.device) for t in (row_M, column_M, target_M))
            parts = [score_logits(logits_BSV[row_M[chunk], column_M[chunk]], target_M[chunk]) for chunk in chunks]
        nll_M = torch.cat([nll for nll, _ in parts]).double().cpu()
        greedy_M = torch.cat([greedy for _, greedy in parts]).cpu()
        if not bool(torch.isfinite(nll_M).all()):
            worst = windows[int(row_M[int((~torch.isfinite(nll_M)).nonzero()[0])])]
            raise NumericFault(
                f"the likelihood of document {worst.document} is not finite",
                hint="run `moekit check` on the checkpoint: a weight or a router's logits may be NaN",
            )
        return [
            Scores(nll, greedy)
            for nll, greedy in zip(torch.split(nll_M, sizes), torch.split(greedy_M, sizes), strict=True)
        ]

    def _whole(self, inputs: dict[str, Any]) -> Tensor:
        """Run the whole model and learn whether its logits are its head's output on its base's output."""
        assert self.head is not None
        seen: dict[str, Tensor] = {}
        hooks = [
            self.base.register_forward_hook(lambda _m, _a, out: seen.__setitem__("base", out[0])),
            self.head.register_forward_hook(lambda _m, args, out: seen.update(given=args[0], made=out)),
        ]
        try:
            logits_BSV: Tensor = self.model(**inputs).logits
        finally:
            for hook in hooks:
                hook.remove()
        self.apart = (
            seen.keys() == {"base", "given", "made"}
            and seen["given"].shape == seen["base"].shape
            and torch.equal(seen["given"], seen["base"])
            and torch.equal(seen["made"].to(logits_BSV.dtype), logits_BSV)
        )
        return logits_BSV


def pad(windows: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, S] of windows, padded on the right with zeros, and 1 where a token is [B, S]."""
    longest = max(len(w.inputs) for w in windows)
    ids_BS = torch.zeros(len(windows), longest, dtype=torch.int64)
    mask_BS = torch.zeros(len(windows), longest, dtype=torch.int64)
    for row, window in enumerate(windows):
        ids_BS[row, : len(window.inputs)] = torch.as_tensor(window.inputs, dtype=torch.int64)
        mask_BS[row, : len(window.inputs)] = 1
    return ids_BS.to(device), mask_BS.to(device)
