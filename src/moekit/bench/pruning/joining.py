"""Another method or size joins what earlier calls of the same bench measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from moekit.bench.pruning.result import PruneBenchResult, PruneRun
from moekit.bench.pruning.setting import Keep, PruneBenchSetting, same_keep
from moekit.data.batches import TokenizedDocument
from moekit.errors import BadConfig
from moekit.evaluation.windows import TextDigest

# What must be equal for numbers to be comparable; how many rows a pass takes and how much memory does not change them.
_FIXED = ("seq_len", "window", "search_tokens", "top_k", "seed")


def text_digest(*texts: Sequence[TokenizedDocument]) -> str:
    """sha256 of what is decided from and measured on."""
    told = [[[document.domain, str(TextDigest().add(document.ids))] for document in text] for text in texts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def dtype_name(dtype: torch.dtype | None) -> str:
    """Of the weights in memory."""
    return "as stored" if dtype is None else str(dtype).removeprefix("torch.")


def check_joins(
    earlier: PruneBenchResult, *, fingerprint: str, text: str, dtype: str, setting: PruneBenchSetting, folder: Path
) -> None:
    """Refuse to put numbers side by side that cannot be compared.

    Args:
        earlier: what the folder holds.
        fingerprint: of the model to be pruned.
        text: digest of the text; see `text_digest`.
        dtype: of the weights in memory.
        setting: what is asked for.
        folder: named in the message.

    Raises:
        BadConfig: another model, text or setting.
    """
    told = ["another model"] if earlier.fingerprint != fingerprint else []
    told += ["other text"] if earlier.text != text else []
    told += [f"weights {earlier.dtype} instead of {dtype}"] if earlier.dtype != dtype else []
    for name in _FIXED:
        old, new = getattr(earlier.setting, name), getattr(setting, name)
        told += [f"{name} {old} instead of {new}"] if old != new else []
    if told:
        raise BadConfig(
            f"the folder holds a bench of {', '.join(told)}",
            file=folder,
            hint="choose another folder, or forget what this one holds with --overwrite",
        )


def joined(earlier: PruneBenchResult, new: PruneBenchResult) -> PruneBenchResult:
    """The runs of both, without rankings; what was asked for again, with these knobs or others, is the new one's."""
    entries = {entry.name: entry for entry in earlier.setting.entries}
    asked = {entry.name: entry for entry in new.setting.entries}
    changed = {
        name
        for name, entry in asked.items()
        if name in entries and (entry.method, entry.settings) != (entries[name].method, entries[name].settings)
    }
    made = {_key(run) for run in new.runs}
    kept = [run for run in earlier.runs if run.name not in changed and _key(run) not in made]
    calibrations = {text.name: text for text in (*earlier.calibrations, *new.calibrations)}
    told = [s for s in earlier.skipped if s.name not in asked]
    setting = new.setting.model_copy(
        update={
            "entries": tuple((entries | asked).values()),
            "keep": _budgets(earlier.setting.keep, new.setting.keep),
            "seeds": max(earlier.setting.seeds, new.setting.seeds),
            "domains": tuple(dict.fromkeys((*earlier.setting.domains, *new.setting.domains))),
        }
    )
    return new.model_copy(
        update={
            "setting": setting,
            "calibrations": tuple(calibrations.values()),
            "runs": (*kept, *new.runs),
            "skipped": (*told, *new.skipped),
        }
    )


def _key(run: PruneRun) -> tuple[str, str, int, str]:
    return run.name, repr(run.keep), run.seed, run.calibration


def _budgets(earlier: Sequence[Keep], new: Sequence[Keep]) -> tuple[Keep, ...]:
    return (*earlier, *(keep for keep in new if not any(same_keep(keep, other) for other in earlier)))
