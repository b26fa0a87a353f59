"""Load the experts of one task alone: of each layer those that its pattern names, and no byte of any other.

What would be written for the same decision is planned by `moekit.compress.writing.prepare`: names, byte ranges and the
config of the smaller model. Here these bytes go into memory instead of a folder, through transformers' own loading,
which asks for one tensor after the other.

Legend: E experts, K choices a token, M experts kept.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME

from moekit._progress import Progress
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.folder import Checkpoint, listed
from moekit.checkpoint.model import quiet_transformers
from moekit.compress.budget import Budget, uniform_count
from moekit.compress.decision import LayerDecision
from moekit.compress.patterns.pattern import Pattern, keep_sets
from moekit.compress.prune.planning import geometries_of, sizes_of
from moekit.compress.resize import Groups
from moekit.compress.writing.prepare import Work, prepare
from moekit.compress.writing.slices import Kept
from moekit.errors import BadCheckpoint, BadConfig, UnsupportedModel

_DTYPES = {short: getattr(torch, name.removeprefix("torch.")) for name, short in TORCH_NAMES.items()}
# A read() may return less than asked for above 2 GiB.
_PIECE_BYTES = 1 << 30


def load_task(
    model: str | Path | Checkpoint,
    pattern: Pattern,
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
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a model that holds only a task's experts; its logits are those of the folder that `apply` would write.

    Memory is that of the kept experts and of what every token uses; from disk nothing else is read. A hub model is
    downloaded whole, as by `moekit.load`.

    Args:
        model: folder, hub id, or an opened and verified checkpoint.
        pattern: of the task, made of this model.
        keep: M of every layer: a count, a fraction, bytes of the whole model, or a `Budget` with scope "uniform".
        revision: of a hub model.
        token: hub token.
        device: "auto" takes a GPU if there is one; ignored with `device_map`.
        dtype: of the weights in memory; "auto" keeps the config's.
        device_map: as in transformers.
        protected: decoder layer -> experts that stay whatever their rank; they count towards M.
        top_k: K from now on; None as it is.
        groups: "free" routes without expert groups once experts are dropped, "equal" keeps them.
        progress: told bytes read.

    Returns:
        A stock transformers model in eval mode. Expert i of a layer is the i-th of those kept, in ascending order.

    Raises:
        BadConfig: the pattern is of another model, fewer experts than K, an impossible budget, protected experts that
            are not there, or a routing policy in the checkpoint.
        BadCheckpoint, UnsafeInput, UnsupportedModel: see `moekit.load` and `moekit.compress.writing.apply.apply`.
    """
    if isinstance(model, Checkpoint):
        checkpoint = model
    else:
        checkpoint = Checkpoint.open(model, revision=revision, token=token)
        checkpoint.verify()
    work = plan_task(checkpoint, pattern, keep, protected=protected, top_k=top_k, groups=groups)
    with KeptBytes(work, progress) as source:
        loaded = _load(work, source, dtype, device_map)
    if device_map is None:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        loaded.to(automatic if device == "auto" else device)
    return loaded.eval()


def plan_task(
    checkpoint: Checkpoint,
    pattern: Pattern,
    keep: Budget | int | float | str,
    *,
    protected: Mapping[int, Collection[int]] | None = None,
    top_k: int | None = None,
    groups: Groups = "free",
) -> Work:
    """All that is known of a task's model before a weight is read; arguments and errors as for `load_task`."""
    geometries = geometries_of(checkpoint)
    known = pattern.origin.fingerprint
    shape = {layer: pattern.origin.experts for layer in pattern.origin.layers}
    if (known and known != checkpoint.fingerprint) or shape != {n: g.experts for n, g in geometries.items()}:
        raise BadConfig(
            f"the pattern {pattern.task!r} was made of another model ({known[:12] or 'unknown'}), not of "
            f"{checkpoint.fingerprint[:12]}",
            file=checkpoint.path,
            hint="make patterns of this model (moekit pattern)",
        )
    if strange := sorted(set(protected or {}) - set(geometries)):
        raise BadConfig("experts of a layer are protected that holds no routed experts", layer=strange[0])
    budget = keep if isinstance(keep, Budget) else Budget(keep=keep)
    if budget.scope != "uniform":
        raise BadConfig("a pattern keeps equally many experts in each layer", hint='take a budget of scope "uniform"')
    counts = set(uniform_count(budget, sizes_of(checkpoint, geometries, top_k)).values())
    sets = keep_sets(pattern, counts.pop(), protected=protected)
    decisions = {layer: LayerDecision(keep=tuple(experts)) for layer, experts in sets.items()}
    return prepare(checkpoint, decisions, top_k=top_k, groups=groups)


def _load(work: Work, source: KeptBytes, dtype: str | torch.dtype, device_map: Any) -> PreTrainedModel:
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(work.config), None)
    if kind is None or work.checkpoint.remote_code:
        raise UnsupportedModel(
            f"transformers itself has no causal language model of type {work.config.model_type!r}",
            file=work.checkpoint.path,
            hint="write the smaller folder instead (moekit prune), and load that",
        )
    with quiet_transformers():
        loaded, told = (kind[0] if isinstance(kind, tuple) else kind).from_pretrained(
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


def _config(work: Work) -> PreTrainedConfig:
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


class KeptBytes:
    """Reads what stays of a checkpoint, tensor by tensor, from several threads; a context manager.

    Args:
        work: what stays.
        progress: told bytes read.

    Attributes:
        nbytes: read so far.
    """

    def __init__(self, work: Work, progress: Progress | None = None) -> None:
        self._work = work
        self._progress = progress
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def __enter__(self) -> KeptBytes:
        folder = self._work.checkpoint.path
        for shard in sorted({kept.source.shard for kept in self._work.kept}):
            self._files[shard] = os.open(folder / shard, os.O_RDONLY)
        if self._progress is not None:
            self._progress.start("loading", sum(kept.spec.nbytes for kept in self._work.kept))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if self._progress is not None:
            self._progress.finish()

    def tensors(self) -> dict[str, Any]:
        """Names of the smaller model's tensors -> stand-ins, which are read when they are asked for."""
        return {kept.name: _Waiting(self, kept) for kept in self._work.kept}

    def read(self, kept: Kept) -> torch.Tensor:
        """Read what stays of one tensor.

        Raises:
            BadCheckpoint: a dtype that torch cannot hold, or the shard ends too early.
        """
        dtype = _DTYPES.get(kept.source.dtype)
        if dtype is None:
            raise self._unreadable(kept, f"torch has no dtype {kept.source.dtype}")
        if kept.scattered:
            data = torch.frombuffer(bytearray(kept.gather(self._work.checkpoint)), dtype=torch.uint8)
        else:
            data = torch.empty(kept.spec.nbytes, dtype=torch.uint8)
            self._fill(kept, data.numpy().data)
        with self._lock:
            self.nbytes += kept.source.nbytes if kept.scattered else len(data)
            if self._progress is not None:
                self._progress.advance(len(data))
        return data.view(dtype).reshape(kept.shape)

    def _fill(self, kept: Kept, view: memoryview) -> None:
        file, at = self._files[kept.source.shard], 0
        for start, end in _joined(kept.ranges()):
            while start < end:
                got = os.preadv(file, [view[at : at + min(end - start, _PIECE_BYTES)]], start)
                if not got:
                    raise self._unreadable(kept, "the shard ends before the tensor does")
                start, at = start + got, at + got

    def _unreadable(self, kept: Kept, reason: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"tensor {kept.source.name!r} cannot be read: {reason}",
            file=self._work.checkpoint.path / kept.source.shard,
            layer=kept.layer,
            hint="fetch the shard again",
        )


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


class _Waiting:
    """Stands for a tensor as safetensors' slices do: what transformers asks of those, it can ask of this."""

    def __init__(self, source: KeptBytes, kept: Kept) -> None:
        self._source = source
        self._kept = kept

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._source.read(self._kept)[index]

    def get_shape(self) -> list[int]:
        """Sizes, as a slice tells them."""
        return list(self._kept.shape)

    def get_dtype(self) -> str:
        """Safetensors' name of the dtype, as a slice tells it."""
        return self._kept.source.dtype

    @property
    def shape(self) -> torch.Size:
        """Sizes, as a tensor tells them."""
        return torch.Size(self._kept.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, as a tensor tells it."""
        return _DTYPES.get(self._kept.source.dtype)

    def is_floating_point(self) -> bool:
        """Whether it holds no integers: where a config names no dtype, that of the first such tensor counts."""
        return self.dtype is not None and self.dtype.is_floating_point
