"""`use: super-experts`: find the experts that make massive activations, and check whether the model breaks without."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName, resolve_device
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import model_item, read_text, text_item
from moekit.jobs.shared.opened import Source, check_runnable, open_source
from moekit.jobs.shared.protection import find_in_trace, protection_needs
from moekit.jobs.shared.pruning import WritingOptions, bytes_between, check_disk, read_heldout
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    from moekit.data import TokenBatches, TokenizedDocument
    from moekit.diagnose.super_experts.massive_activations import LayerStream
    from moekit.diagnose.super_experts.report import SuperExpertReport
    from moekit.evaluation.super_expert_study import SuperExpertStudy
    from moekit.evaluation.super_experts import SuperExpertCheck
    from moekit.jobs.shared.proof import HeldOut

# A report is small: some hundred bytes a layer, and a number for each expert.
_FILE_BYTES = 1 << 20


class SuperExpertsStep(Step):
    """Find the few experts that make massive activations, and check on held-out text whether the model breaks without.

    A super expert's largest |output| exceeds both a percentile of all and a share of the largest, in a layer whose
    block makes a massive activation (arXiv:2507.23279). Many models have none.
    """

    use: Literal["super-experts"] = "super-experts"
    model: ModelRef = Field(description="MoE: folder or hub id")
    data: TextRef = Field(description="text to find them on: file, folder, source, mix or hub id")
    heldout: TextRef | None = Field(
        default=None, description="text to check on; by default a tenth of data, which is kept apart for it"
    )
    percentile: float = Field(
        default=99.5, ge=0, le=100, description="of all experts' largest |outputs|, which a super expert's exceeds"
    )
    ratio: float = Field(default=0.1, ge=0, le=1, description="share of the largest of them that it exceeds")
    scope: Literal["first-75", "model", "formation"] = Field(
        default="first-75",
        description="layers whose experts compare: the first 75 % and those that form massive activations, all, or "
        "only those that form",
    )
    forming: Literal["gain", "first-75"] = Field(
        default="gain",
        description="layers that form massive activations: those whose block adds one, or the first 75 %",
    )
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens of data, at most, shared by its domains")
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    proof: bool = Field(
        default=True, description="where any are found, measure the model without them, and without as many others"
    )
    random_seeds: int = Field(default=5, ge=1, le=100, description="draws of as many others")
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the check in tokens (default: the model's, ≤ 1024)"
    )
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    @property
    def _options(self) -> WritingOptions:
        return WritingOptions(proof_tokens=self.proof_tokens, window=self.window, dtype=self.dtype)

    def check(self) -> None:
        """Refuse held-out text that nothing would be measured on."""
        resolve_device(self.device)
        if self.heldout is not None and not self.proof:
            raise BadConfig("there is held-out text, but no check", hint="leave --heldout or --no-proof out")

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """What lies on the disk meanwhile is exact where the model lies here."""
        model = model_item(self.model, sizes)
        reads = (model, *(text_item(text, sizes) for text in (self.data, self.heldout) if text))
        notes = ["layers are read from disk one at a time: memory does not grow with their number"]
        if self.proof:
            draws = f"{self.random_seeds} draw{'s' if self.random_seeds > 1 else ''} of as many others"
            notes.append(f"where any are found, the held-out text is walked without them, and without {draws}")
        disk: int | None = _FILE_BYTES
        memory = None
        if (Path(self.model).expanduser() / "config.json").is_file():
            source = open_source(self.model)
            check_runnable(source)
            disk = _FILE_BYTES + self._between(source)
            memory = 2 * _largest_layer(source) + (1 << 30)
        return Forecast(reads, (Item(str(out), _FILE_BYTES),), disk=disk, memory=memory, notes=tuple(notes))

    def run(self, work: JobContext) -> dict[str, Any]:
        """Refuse what is impossible, walk the text, judge, check, write."""
        from moekit.checkpoint import atomic_folder
        from moekit.evaluation.super_expert_study import STUDY_FILE, SuperExpertStudy

        self.check()
        source = open_source(self.model, work.progress)
        check_runnable(source)
        check_disk(work.out, work.scratch, _FILE_BYTES, self._between(source))
        rows, heldout = self._texts(source, work)
        report, streams = self._look(source, rows, work)
        check = None
        if report.found and heldout is not None:
            check = self._prove(source, report, heldout, work)
        study = SuperExpertStudy.of(report, streams, self._origin(), check)
        with atomic_folder(work.out, overwrite=work.overwrite) as folder:
            study.save(folder / STUDY_FILE)
        return told_of(study, work.out / STUDY_FILE)

    def _between(self, source: Source) -> int:
        proof = (self.proof_tokens or (1 << 20)) if self.proof else 0
        return bytes_between(source, self.max_tokens or (1 << 20), proof, 1 + self.random_seeds, 0)

    def _texts(self, source: Source, work: JobContext) -> tuple[TokenBatches, HeldOut | None]:
        """Rows to look at and text to check on; both are read before any work, as either may turn out empty."""
        from moekit.data.batches import arrange, pad_id_of
        from moekit.data.shares import take_shares

        kept_apart = self.proof and self.heldout is None
        documents = read_text(self.data, split="train" if kept_apart else None, seed=work.seed, progress=work.progress)
        tokenizer = source.tokenizer()
        # Sinks stand at the beginning of a text: each document begins a row, as texts of this model do.
        found = _begun(take_shares(documents, tokenizer, self.max_tokens, progress=work.progress), tokenizer)
        length = min(self.seq_len, source.longest)
        rows = arrange(found, length, pad=True, pad_id=pad_id_of(tokenizer))
        if not self.proof:
            return rows, None
        text, split = (self.data, "heldout") if self.heldout is None else (self.heldout, None)
        heldout = read_heldout(self._options, text, split, source, work)
        return rows, dataclasses.replace(heldout, documents=_begun(heldout.documents, tokenizer))

    def _look(
        self, source: Source, rows: TokenBatches, work: JobContext
    ) -> tuple[SuperExpertReport, tuple[LayerStream, ...]]:
        """One pass over the text; goes on at the layer that an interrupted one had come to."""
        from moekit.diagnose.super_experts.massive_activations import StreamedProfile, layer_streams

        needs = protection_needs(source)
        streamed = StreamedProfile(
            source.checkpoint,
            rows.batches(self.batch_size),
            moe_layers=source.geometries,
            statistics=needs,
            folder=work.scratch / "calibration",
            dtype=self._options.torch_dtype,
            device=self.device,
        )
        with streamed:
            streamed.run(work.progress)
            trace = streamed.trace(tokenizer=source.tokenizer(), source=self._origin(), seed=work.seed)
        rule = {"percentile": self.percentile, "ratio": self.ratio, "scope": self.scope, "forming": self.forming}
        report = find_in_trace(source, trace, **rule)
        return report, layer_streams(trace.require(needs), streamed.dense, streamed.apart)

    def _prove(self, source: Source, report: SuperExpertReport, heldout: HeldOut, work: JobContext) -> SuperExpertCheck:
        from moekit.evaluation.super_experts import check_super_experts

        return check_super_experts(
            source.checkpoint,
            heldout.documents,
            report.pairs,
            geometries=source.geometries,
            source=heldout.source,
            draws=self.random_seeds,
            seed=work.seed,
            window=heldout.window,
            folder=work.scratch / "check",
            dtype=self._options.torch_dtype,
            device=self.device,
            progress=work.progress,
        )

    def _origin(self) -> str:
        """The text by a name that holds in other working folders; the part in brackets tells that a rest was kept."""
        path = Path(self.data).expanduser()
        name = str(path.resolve()) if path.exists() else self.data
        return f"{name}[train]" if self.proof and self.heldout is None else name


def _begun(documents: Sequence[TokenizedDocument], tokenizer: Any) -> list[TokenizedDocument]:
    """The documents, each behind what the tokenizer puts before a text, such as a token of its beginning."""
    plain, usual = (list(tokenizer("a", add_special_tokens=told)["input_ids"]) for told in (False, True))
    starts = (n for n in range(len(usual)) if usual[n : n + len(plain)] == plain)
    before = usual[: next(starts, 0)]
    return [dataclasses.replace(document, ids=[*before, *document.ids]) for document in documents]


def _largest_layer(source: Source) -> int:
    """Bytes of the routed experts of the layer that has most of them."""
    from moekit.compress.engine.planning import sizes_of

    sizes = sizes_of(source.checkpoint, source.geometries)
    return max(each * sizes.experts[layer] for layer, each in sizes.expert_bytes.items())


def told_of(study: SuperExpertStudy, file: Path) -> dict[str, Any]:
    """A study as plain values, single experts' maxima left out.

    Args:
        study: what was found.
        file: where it lies.
    """
    told = study.model_dump(mode="json", exclude={"kind": True, "format": True, "report": {"format", "layers"}})
    forms = [layer for layer, profile in study.report.layers.items() if profile.forms]
    check = None if study.check is None else study.check.verdict
    return {
        **told,
        "verdict": study.report.verdict,
        "check_verdict": check,
        "forms": forms,
        "room": study.report.room,
        "file": str(file),
    }
