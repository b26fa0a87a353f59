"""Load the experts of one task alone: of each layer those that its expert set names, and no byte of any other.

What would be written for the same outcome is planned by `moekit.compress.engine.layout`: names, byte ranges and the
config of the smaller model. Here these bytes go into memory instead of a folder, through transformers' own loading,
which asks for one tensor after the other.

Legend: E experts, K choices a token, M experts kept.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from moekit._device import resolve_device
from moekit._progress import Progress
from moekit._validation import faults
from moekit.checkpoint.architecture import architecture_of
from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint, listed
from moekit.checkpoint.model import quiet_transformers
from moekit.checkpoint.precision import loading_dtype
from moekit.checkpoint.stored import mark_stored
from moekit.compress.budget.sizes import Budget, uniform_count
from moekit.compress.engine.layout import OutputLayout, prepare
from moekit.compress.engine.measuring import geometries_of, sizes_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.resize import Groups
from moekit.errors import BadCheckpoint, BadConfig, UnsupportedModel
from moekit.serving.expert_sets.expert_set import ExpertSet, keep_sets
from moekit.serving.expert_sets.kept_bytes import KeptBytes

if TYPE_CHECKING:
    import torch


def load_task(
    model: str | Path | Checkpoint,
    expert_set: ExpertSet,
    keep: Budget | int | float | str,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    protected: Mapping[int, Collection[int]] | None = None,
    top_k: int | None = None,
    groups: Groups = "free",
    other_weights: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a model that holds only a task's experts; its logits are those of the folder that `apply` would write.

    Memory is that of the kept experts and of what every token uses, and while it is loaded one layer of it more; from
    disk nothing else is read. A hub model is downloaded whole, as by `moekit.load`.

    Args:
        model: folder, hub id, or an opened and verified checkpoint.
        expert_set: of the task, made of this model.
        keep: M of every layer: a count, a fraction, bytes of the whole model, or a `Budget` with scope "uniform".
        revision: of a hub model.
        token: hub token.
        device: "auto" takes a GPU if there is one; ignored with `device_map`.
        dtype: of the weights in memory; "auto" as for `moekit.load`.
        device_map: as in transformers.
        protected: decoder layer -> experts that stay whatever their rank; they count towards M.
        top_k: K from now on; None as it is.
        groups: "free" routes without expert groups once experts are dropped, "equal" keeps them.
        other_weights: take an expert set of a model of the same shape and other weights, such as the original of a
            quantized copy.
        progress: told bytes read.

    Returns:
        A stock transformers model in eval mode. Expert i of a layer is the i-th of those kept, in ascending order.

    Raises:
        BadConfig: the expert set is of another model, fewer experts than K, an impossible budget, protected experts
            that are not there, or a routing policy in the checkpoint.
        BadCheckpoint, UnsafeInput, UnsupportedModel: see `moekit.load` and `moekit.compress.engine.apply.apply`.
    """
    if isinstance(model, Checkpoint):
        checkpoint = model
    else:
        checkpoint = Checkpoint.open(model, revision=revision, token=token)
        verify(checkpoint)
    work = plan_task(
        checkpoint,
        expert_set,
        keep,
        protected=protected,
        top_k=top_k,
        groups=groups,
        other_weights=other_weights,
    )
    place = resolve_device("auto" if device_map is not None else device)
    kind, stored = loading_dtype(checkpoint, dtype, place)
    with KeptBytes(work, progress) as source:
        loaded = _load(work, source, kind, device_map)
    if device_map is None:
        loaded.to(place)
    mark_stored(loaded, stored)
    return loaded.eval()


def plan_task(
    checkpoint: Checkpoint,
    expert_set: ExpertSet,
    keep: Budget | int | float | str,
    *,
    protected: Mapping[int, Collection[int]] | None = None,
    top_k: int | None = None,
    groups: Groups = "free",
    other_weights: bool = False,
) -> OutputLayout:
    """All that is known of a task's model before a weight is read; arguments and errors as for `load_task`."""
    geometries = geometries_of(checkpoint)
    known = "" if other_weights else expert_set.origin.fingerprint
    shape = {layer: expert_set.origin.experts for layer in expert_set.origin.layers}
    if (known and known != checkpoint.fingerprint) or shape != {n: g.experts for n, g in geometries.items()}:
        raise BadConfig(
            f"the expert set {expert_set.task!r} was made of another model ({known[:12] or 'of another shape'}), not "
            f"of {checkpoint.fingerprint[:12]}",
            file=checkpoint.path,
            hint="make expert sets of this model (moekit expert-sets)",
        )
    if strange := sorted(set(protected or {}) - set(geometries)):
        raise BadConfig("experts of a layer are protected that holds no routed experts", layer=strange[0])
    budget = keep if isinstance(keep, Budget) else _budget(keep)
    if budget.scope != "uniform":
        raise BadConfig(
            "an expert set keeps equally many experts in each layer", hint='take a budget of scope "uniform"'
        )
    counts = set(uniform_count(budget, sizes_of(checkpoint, geometries, top_k)).values())
    sets = keep_sets(expert_set, counts.pop(), protected=protected)
    outcomes = {layer: LayerOutcome(keep=tuple(experts)) for layer, experts in sets.items()}
    return prepare(checkpoint, outcomes, top_k=top_k, groups=groups)


def _budget(keep: int | float | str) -> Budget:
    try:
        return Budget(keep=keep)
    except ValidationError as error:
        raise BadConfig(
            f"{keep!r} is no budget: {faults(error, most=1)}",
            hint="keep a number of experts from 1 up, a fraction such as 0.5, or bytes such as 12GiB",
        ) from error


def _load(work: OutputLayout, source: KeptBytes, dtype: str | torch.dtype, device_map: Any) -> PreTrainedModel:
    kind: Any = architecture_of(work.config, remote=work.checkpoint.remote_code, file=work.checkpoint.path).kind
    if kind is None or kind.config_class is not type(work.config):
        raise UnsupportedModel(
            f"transformers itself has no class of type {work.config.model_type!r} that writes text",
            file=work.checkpoint.path,
            hint="write the smaller folder instead (moekit prune), and load that",
        )
    with quiet_transformers(), _in_turn():
        loaded, told = kind.from_pretrained(
            None,
            config=_config(work),
            state_dict=source.tensors(),
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
        )
    _refuse_partial(work.checkpoint, told)
    assert isinstance(loaded, PreTrainedModel)
    folder = work.checkpoint.path
    loaded.config.name_or_path = loaded.name_or_path = str(folder)
    if loaded.can_generate() and (folder / GENERATION_CONFIG_NAME).is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return loaded


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """Let transformers read what it is about to convert, not all of it ahead: that would be in memory twice."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _config(work: OutputLayout) -> PreTrainedConfig:
    """The smaller model's config, with how the checkpoint is quantized."""
    made = copy.deepcopy(work.config)
    raw = work.checkpoint.config if work.config_text is None else json.loads(work.config_text)
    if "quantization_config" in raw:
        made.quantization_config = raw["quantization_config"]
    return made


def _refuse_partial(checkpoint: Checkpoint, told: Mapping[str, Any]) -> None:
    wrong: list[str] = [*told.get("missing_keys", ()), *map(str, told.get("mismatched_keys", ()))]
    wrong += [*told.get("error_msgs", ()), *map(str, told.get("conversion_errors", ()))]
    if wrong:
        raise BadCheckpoint(
            f"{len(wrong)} tensors did not get their weights: {listed(sorted(wrong))}",
            file=checkpoint.path,
            hint="the layout is one that this version of transformers does not read; write the smaller folder instead "
            "(moekit prune)",
        )
