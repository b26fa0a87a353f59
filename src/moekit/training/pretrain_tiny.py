"""A tiny model: a small MoE trained from scratch, in about an hour on two cores, on text of several domains.

Large enough that its routing is balanced and tells domains apart, small enough that a method can be tried on it in
minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    set_seed,
)

from moekit._device import resolve_device
from moekit._files import require_own_folder
from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_folder
from moekit.checkpoint.model import save
from moekit.checkpoint.record import Record
from moekit.data.batches import TokenBatches, pack
from moekit.data.split import Split, split_texts
from moekit.data.text import Document
from moekit.data.tokenizer import SMALLEST, train_tokenizer
from moekit.errors import BadData
from moekit.trace import record
from moekit.trace.summary import TraceSummary, summarise
from moekit.training.config import TrainConfig, TrainResult
from moekit.training.run import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOKENIZER, _CHECKPOINTS = "tokenizer", "training"


class TinyConfig(BaseModel):
    """Size of a tiny model, and how it is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Literal["qwen3_moe", "olmoe"] = Field(default="qwen3_moe", description="family of the model")
    vocabulary: int = Field(default=6144, ge=SMALLEST, le=65536, description="words of its own byte-level BPE")
    hidden: int = Field(default=256, ge=8, description="model width")
    layers: int = Field(default=6, ge=1, description="decoder layers, all MoE")
    heads: int = Field(default=4, ge=1, description="attention heads")
    kv_heads: int = Field(default=2, ge=1, description="key and value heads")
    experts: int = Field(default=32, ge=2, description="experts of each layer")
    top_k: int = Field(default=4, ge=1, description="experts that each token chooses")
    width: int = Field(default=64, ge=1, description="neurons of an expert")
    context: int = Field(default=512, ge=2, description="longest text it can read, in tokens")
    tokenizer_bytes: int = Field(default=12_000_000, ge=1, description="bytes of text the vocabulary is learnt from")
    figure_tokens: int = Field(default=98_304, ge=1, description="held-out tokens that routing figures are taken on")
    training: TrainConfig = Field(
        default=TrainConfig(
            tokens=12_000_000,
            lr=2e-3,
            warmup=0.02,
            weight_decay=0.1,
            beta2=0.98,
            seq_len=256,
            batch=16,
            objectives={"balance": 0.01, "z": 0.001},
            precision="auto",
            save_every=250,
        ),
        description="how it is trained",
    )

    @model_validator(mode="after")
    def _fits(self) -> TinyConfig:
        if self.top_k > self.experts:
            raise ValueError(f"a token cannot choose {self.top_k} of {self.experts} experts")
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError("hidden must be a multiple of 2 * heads, and heads one of kv_heads")
        if self.training.seq_len > self.context:
            raise ValueError(f"rows of {self.training.seq_len} tokens exceed the context of {self.context}")
        return self

    def model_settings(self) -> PreTrainedConfig:
        """The model's config in transformers' terms."""
        common = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            "use_cache": True,
        }
        if self.layout == "olmoe":
            return OlmoeConfig(**common, intermediate_size=self.width)
        return Qwen3MoeConfig(
            **common,
            head_dim=self.hidden // self.heads,
            intermediate_size=self.width * self.top_k,
            moe_intermediate_size=self.width,
        )


class TinyResult(BaseModel):
    """A tiny model and how well it turned out.

    Attributes:
        folder: the model, a stock checkpoint.
        parameters: all of them.
        training: losses, tokens, seconds.
        routing: balance and domain figures on held-out text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    parameters: int
    training: TrainResult
    routing: TraceSummary

    @property
    def heldout_loss(self) -> float:
        """Loss on held-out text at the end, nats a token."""
        return list(self.training.heldout_losses.values())[-1]

    def figures(self) -> dict[str, float]:
        """The figures that say whether routing is balanced and tells domains apart; means over layers."""
        layers = self.routing.layers
        figures = {
            "heldout_loss": self.heldout_loss,
            "load_cv": sum(layer.load.cv for layer in layers) / len(layers),
            "load_max_over_mean": sum(layer.load.max_over_mean for layer in layers) / len(layers),
            "never_routed": float(sum(layer.load.never_routed for layer in layers)),
        }
        if self.routing.mean_domains is not None:
            figures["domain_nmi"] = self.routing.mean_domains["normalised"]
            figures["domain_nmi_shuffled"] = self.routing.mean_domains["shuffled"]
        return figures


def split_documents(documents: Sequence[Document], split: Split) -> list[Document]:
    """One side of each domain's documents (see `moekit.data.split`)."""
    chosen = []
    for domain in dict.fromkeys(d.domain for d in documents):
        mine = [d for d in documents if d.domain == domain]
        chosen += [Document(t, domain, mine[i].source) for i, t in split_texts([d.text for d in mine], split)]
    return chosen


def build_tiny_model(config: TinyConfig, device: str = "auto") -> PreTrainedModel:
    """An untrained tiny model in fp32, the same for the same seed.

    Args:
        config: its size; `config.training.seed` draws its weights.
        device: "cpu", "cuda", or "auto".
    """
    set_seed(config.training.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config.model_settings(), dtype=torch.float32)
    place = resolve_device(device)
    return model.to(place)


def train_tiny(
    config: TinyConfig,
    documents: Sequence[Document],
    output: str | Path,
    progress: Progress | None = None,
    *,
    heldout: Sequence[Document] | None = None,
    scratch: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    command: str = "moekit.training.train_tiny",
) -> TinyResult:
    """Train a tiny model from scratch and save it as a stock checkpoint.

    Args:
        config: its size and training.
        documents: text of several domains.
        output: folder of the finished model.
        progress: told how far it is.
        heldout: text for the figures; a tenth of `documents`, left out of training, by default.
        scratch: folder that survives a kill, from which the training continues; beside `output` by default.
        device: "cpu", "cuda", or "auto".
        overwrite: replace a model that is at `output`.
        command: what the model's record says made it.

    Returns:
        Where it is, its losses, and its routing on held-out text.

    Raises:
        BadData: no text, or too little for the vocabulary.
        BadConfig: `output` exists, or `scratch` holds another run.
    """
    target = Path(output)
    work = Path(scratch) if scratch is not None else target.parent / f".{target.name}-scratch"
    require_own_folder(work)
    if heldout is None:
        documents, heldout = split_documents(documents, "train"), split_documents(documents, "heldout")
    if not documents or not heldout:
        raise BadData("there is no text to train or to judge on", hint="give a folder with a file for each domain")
    tokenizer = _tokenizer(config, documents, work)
    rows = pack(documents, tokenizer, config.training.seq_len, end_token=True, progress=progress)
    judged = even_rows(pack(heldout, tokenizer, config.training.seq_len, end_token=True), config.figure_tokens)
    model = build_tiny_model(config, device)
    result = train(
        model, tokenizer, rows, config.training, output=work / _CHECKPOINTS, heldout=judged, progress=progress
    )
    trace = record(model, judged.batches(config.training.batch), tokenizer=tokenizer, progress=progress)
    tiny = TinyResult(
        folder=str(target),
        parameters=sum(p.numel() for p in model.parameters()),
        training=result,
        routing=summarise(trace, seed=config.training.seed),
    )
    settings = config.model_dump(mode="json")
    scores = {**tiny.figures(), "losses": result.losses, "seconds": result.seconds, "tokens": result.tokens}
    made = Record(command=command, seed=config.training.seed, config=settings, scores=scores)
    save(model, target, tokenizer=tokenizer, record=made, overwrite=overwrite, progress=progress)
    return tiny


def _tokenizer(config: TinyConfig, documents: Sequence[Document], work: Path) -> PreTrainedTokenizerBase:
    """Learn the vocabulary, or read the one that a killed run learnt."""
    folder = work / _TOKENIZER
    if folder.exists():
        kept: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
        if len(kept) == config.vocabulary:
            return kept
    learnt = train_tokenizer(
        documents, config.vocabulary, limit_bytes=config.tokenizer_bytes, seed=config.training.seed
    )
    work.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, overwrite=True) as temporary:
        learnt.save_pretrained(temporary)
    return learnt


def even_rows(rows: TokenBatches, limit_tokens: int) -> TokenBatches:
    """The first rows of each domain, as many of each, up to a number of tokens in all."""
    domain_R = rows.domain_RS[:, 0]
    share = max(limit_tokens // (rows.input_ids.shape[1] * len(rows.domains)), 1)
    kept = torch.cat([(domain_R == d).nonzero().flatten()[:share] for d in range(len(rows.domains))])
    return TokenBatches(rows.input_ids[kept], rows.document_RS[kept], rows.domain_RS[kept], rows.domains)
