"""The texts of a run: rows by name, each in the order of the run.

One text is called "train". With several (retain, forget, ...) each optimizer step sees as many micro-batches of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from moekit._progress import Progress
from moekit.data import vocabulary
from moekit.data.batches import TokenBatches, pack
from moekit.data.text import Document
from moekit.errors import BadConfig
from moekit.training.config import TrainConfig
from moekit.training.order import InTurn, OrderedRows, row_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAIN = "train"
Text = Sequence[Document] | TokenBatches


def read_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Text,
    config: TrainConfig,
    progress: Progress | None,
) -> TokenBatches:
    """One text as rows that fit the model.

    Raises:
        BadConfig: it has tokens that the model does not embed, or needs a tokenizer.
        BadData: it is empty.
    """
    embedded = vocabulary.embedding_rows(model)
    if isinstance(documents, TokenBatches):
        if len(documents) == 0:
            raise BadConfig("there are no rows to train on")
        vocabulary.check(documents.input_ids, embedded)
        return documents
    if tokenizer is None:
        raise BadConfig("text needs a tokenizer", hint="give the model's tokenizer, or rows of token ids")
    vocabulary.check(tokenizer, embedded)
    return pack(
        documents,
        tokenizer,
        config.seq_len,
        pad=config.pad,
        end_token=config.end_token,
        bos=config.bos,
        progress=progress,
    )


class Texts:
    """Named texts.

    Args:
        rows: name -> its rows.
        read: names that objectives read.
        config: sizes and seed.
        world: processes that train together.

    Attributes:
        rows: the texts that are read.
        steps: optimizer steps of the run; a number of passes is one over the first text.

    Raises:
        BadConfig: an objective reads a text that is not there, or none reads one that is.
    """

    def __init__(self, rows: Mapping[str, TokenBatches], read: set[str], config: TrainConfig, world: int) -> None:
        for name in sorted(read - rows.keys()):
            raise BadConfig(
                f"an objective reads the text {name!r}, which is not there", hint=f"there are: {', '.join(rows)}"
            )
        for name in sorted(rows.keys() - read):
            raise BadConfig(f"no objective reads the text {name!r}", hint="give an objective `text`, or leave it out")
        self.rows = dict(rows)
        self.steps = config.planned_steps(len(next(iter(rows.values()))), world)
        self._config, self._world = config, world
        self._orders: dict[str, list[int]] = {}

    @property
    def orders(self) -> dict[str, list[int]]:
        """Name -> numbers of its rows, in the order of the run."""
        if not self._orders:
            config = self._config
            needed = self.steps * config.batch * config.accumulation * self._world
            self._orders = {
                name: row_order(len(rows), needed, config.seed + place)
                for place, (name, rows) in enumerate(self.rows.items())
            }
        return self._orders

    def dataset(self, *, numbered: bool) -> Dataset[dict[str, Any]]:
        """Rows as Trainer takes them.

        Args:
            numbered: whether a row says its own number.
        """
        ordered = {name: OrderedRows(self.rows[name], order, numbered=numbered) for name, order in self.orders.items()}
        if len(ordered) == 1:
            return next(iter(ordered.values()))
        return InTurn(ordered, self._config.batch, self._world)

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on, padding left out."""
        total = 0
        for name, rows in self.rows.items():
            lengths_R = (rows.document_RS >= 0).sum(dim=1)
            total += int(lengths_R[torch.tensor(self.orders[name])].sum())
        return total

    @property
    def digest(self) -> str:
        """What makes these texts these texts."""
        whole = hashlib.sha256()
        for name, rows in self.rows.items():
            if len(self.rows) > 1:
                whole.update(f"{name}\n".encode())
            whole.update(rows.input_ids.numpy().tobytes() + rows.document_RS.numpy().tobytes())
        return whole.hexdigest()
