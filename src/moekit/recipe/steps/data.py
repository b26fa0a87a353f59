"""`use: data`: put text, questions or a packaged model into the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moekit.recipe.inputs import is_packaged_model, model_item, model_location, read_text, text_item
from moekit.recipe.plan import Forecast, Item, Sizes, disk_bytes
from moekit.recipe.restore import copy_folder
from moekit.recipe.steps.base import Step, TextRef, Workplace

MANIFEST = "data.json"


class DataStep(Step):
    """Fetch a source once and freeze it in the run folder, so that later steps read the same bytes.

    Text becomes `train.jsonl` and `heldout.jsonl`, which never overlap; a packaged model becomes a model folder.
    """

    use: Literal["data"] = "data"
    source: TextRef = Field(description="file, folder, source, mix (demo, six-domains), packaged model, or hub id")
    train_bytes: int | None = Field(
        default=None, ge=1, description="bytes of training text in all; everything by default"
    )
    heldout_bytes: int | None = Field(default=None, ge=1, description="bytes of held-out text in all")

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Sizes of what is fetched and kept."""
        source = text_item(self.source, sizes)
        if is_packaged_model(self.source):
            model = model_item(self.source, sizes)
            return Forecast((model,), (Item(str(out), model.nbytes),), disk=model.nbytes, memory=model.nbytes)
        limits = [self.train_bytes, self.heldout_bytes]
        kept = source.nbytes if None in limits else sum(limit for limit in limits if limit is not None)
        notes = () if source.nbytes is not None else ("how much is downloaded is known only when it is there",)
        return Forecast((source,), (Item(str(out), kept),), disk=kept, memory=source.nbytes, notes=notes)

    def run(self, work: Workplace) -> dict[str, Any]:
        """Fetch and write."""
        if is_packaged_model(self.source):
            return _link_model(Path(model_location(self.source, work.progress)), work)
        from moekit.checkpoint import atomic_folder

        summary: dict[str, Any] = {"source": self.source, "domains": {}}
        with atomic_folder(work.out, overwrite=work.overwrite) as folder:
            for split, limit in (("train", self.train_bytes), ("heldout", self.heldout_bytes)):
                documents = read_text(
                    self.source, split=split, limit_bytes=limit, seed=work.seed, progress=work.progress
                )
                with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
                    for document in documents:
                        fields = {"text": document.text, "domain": document.domain, "source": document.source}
                        stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
                        counts = summary["domains"].setdefault(document.domain, {})
                        part = counts.setdefault(split, {"documents": 0, "bytes": 0})
                        part["documents"] += 1
                        part["bytes"] += len(document.text.encode())
            (folder / MANIFEST).write_text(json.dumps(summary, indent=1) + "\n")
        return summary


def _link_model(source: Path, work: Workplace) -> dict[str, Any]:
    copy_folder(source, work.out, overwrite=work.overwrite)
    return {"source": str(source), "bytes": disk_bytes(work.out)}
