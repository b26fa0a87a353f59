"""Load a stock model, and save one with what goes beside it, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from moekit._device import named_dtype, resolve_device
from moekit._memory import naming_memory
from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_folder, atomic_write
from moekit.checkpoint.card import CARD_FILE, licence_of, render
from moekit.checkpoint.carried import Mtp, carried, write_carried
from moekit.checkpoint.digest import config_digest, config_settings, file_digests, tensor_digests
from moekit.checkpoint.expected import verify
from moekit.checkpoint.experts import counts_of
from moekit.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint
from moekit.checkpoint.hollow import move, without_hollow
from moekit.checkpoint.left_out import layers_left_out, load_left_out
from moekit.checkpoint.meta import architecture
from moekit.checkpoint.names import config_top_k
from moekit.checkpoint.packed_loading import PackedWeights, add_packed, announce, holds_packed_experts, load_hollow
from moekit.checkpoint.precision import loading_dtype
from moekit.checkpoint.provenance import origin_of, stamp
from moekit.checkpoint.quantized.stock import naming_quantizer, refuse_misread
from moekit.checkpoint.record import TENSORS_FILE, Expectations, Record, TensorExpectation
from moekit.checkpoint.safety import check_name, load_tensors, read_header
from moekit.checkpoint.shards import DEFAULT_SHARD_BYTES, index_text
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.stored import as_stored, mark_stored, saved_bytes
from moekit.checkpoint.uneven import live_counts, uneven_counts
from moekit.checkpoint.uneven_loading import load_uneven
from moekit.errors import BadCheckpoint, BadConfig


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars of its own, which would tear those of the caller."""
    active = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            transformers_logging.enable_progress_bar()


@naming_memory("loading the model", "`moekit estimate` says what it needs; load it in a smaller dtype or elsewhere")
def load(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    allow_remote_code: bool = False,
    keep_packed: bool = False,
) -> PreTrainedModel:
    """Open, verify and load a checkpoint as the stock model; `moekit.load` attaches the parts of its record too.

    The class is the one that the config names, towers included, where it writes text; else the language model's.

    Args:
        model: local folder or hub id.
        revision: of a hub model.
        token: hub token.
        dtype: of the weights in memory; "auto" keeps the config's, but takes float32 where the device would only
            emulate bfloat16 or float16. A model that "auto" has widened so is saved as it was stored.
        device: "auto" takes a GPU if there is one; ignored with `device_map`.
        device_map: as in transformers.
        allow_remote_code: see `Checkpoint.open`.
        keep_packed: leave the experts of a folder in moekit's own packed form out, for a part that computes with them;
            otherwise they become floats.

    Returns:
        The model in eval mode.

    Raises:
        BadCheckpoint, UnsafeInput, UnsupportedModel: see `Checkpoint.open` and `verify`.
        UnsupportedModel: quantized weights that transformers cannot load on this device, or would misread.
        BadConfig: an unknown dtype or device.
    """
    place = resolve_device("auto" if device_map is not None else device)
    named_dtype(dtype)
    checkpoint = Checkpoint.open(model, revision=revision, token=token, allow_remote_code=allow_remote_code)
    layout = verify(checkpoint, whole=False)
    kind, stored = loading_dtype(checkpoint, dtype, place)
    if holds_packed_experts(checkpoint):
        how = load_hollow if keep_packed else load_uneven
        loaded = _load_whole(checkpoint, kind, device_map, how, "experts are packed integers")
    elif layers_left_out(checkpoint.record):
        loaded = _load_whole(checkpoint, kind, device_map, load_left_out, "a part stands for experts")
    elif uneven_counts(checkpoint):
        loaded = _load_whole(checkpoint, kind, device_map, load_uneven, "layers hold different numbers of experts")
    else:
        loaded = _load_stock(checkpoint, kind, device_map)
    if device_map is None:
        move(loaded, place)
    mark_stored(loaded, stored)
    loaded.eval()
    stamp(loaded, checkpoint, layout)
    return loaded


def _load_stock(checkpoint: Checkpoint, dtype: str | torch.dtype, device_map: Any) -> PreTrainedModel:
    refuse_misread(checkpoint)
    with quiet_transformers(), naming_quantizer(checkpoint):
        loaded, info = architecture(checkpoint).load(checkpoint.path, dtype=dtype, device_map=device_map)
    _refuse_partial(checkpoint, info)
    return loaded


def _load_whole(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device_map: Any, loader: Callable[..., Any], why: str
) -> PreTrainedModel:
    """Load what `from_pretrained` cannot, on one device."""
    if device_map is not None:
        raise BadConfig(f"{why}, which device_map does not place", file=checkpoint.path, hint="load on one device")
    with quiet_transformers():
        loaded: PreTrainedModel
        loaded, empty = loader(checkpoint, lambda given: empty_model(checkpoint, given), dtype)
    _refuse_partial(checkpoint, {"missing_keys": list(empty)})
    return loaded


def _refuse_partial(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    missing = sorted(info.get("missing_keys") or [])
    wrong = sorted(str(entry) for entry in info.get("mismatched_keys") or [])
    names = missing + wrong
    if names:
        raise BadCheckpoint(
            f"transformers filled {len(names)} tensors with random numbers: {', '.join(names)}",
            file=checkpoint.path,
            hint="the layout is one that this version of transformers does not read; try another version",
        )


def read_extra_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of moekit.safetensors, its header checked first; empty without the file."""
    path = check_name(folder, TENSORS_FILE)
    if not path.exists():
        return {}
    return load_tensors(path)


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    record: Record,
    extra_tensors: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    drop_unknown: bool = False,
    mtp: Mtp = "keep",
    packed: PackedWeights | None = None,
    progress: Progress | None = None,
) -> Record:
    """Save a stock Hugging Face folder with its record and card, whole or not at all, verified before it appears.

    What the checkpoint that the model was loaded from holds beyond the model (multi-token-prediction layers, a vision
    tower) is copied from there byte for byte, and its config is kept but for what has changed.
    Weights are written in the type they have in memory; those of a checkpoint that `load` has widened by itself, in the
    type it was stored in.

    Args:
        model: any causal LM; parts attached to it are saved by giving `record.parts` and their tensors.
        folder: target.
        tokenizer: saved beside the model.
        record: how it was made; fingerprint and expectations are filled in here.
        extra_tensors: for moekit.safetensors; name them "layers.<layer>.<what>".
        overwrite: replace an existing folder, at the very end.
        max_shard_bytes: of one shard.
        drop_unknown: leave out what the model's class has no place for; the folder is then of that class.
        mtp: whether multi-token-prediction layers of the source go along ("keep", "drop").
        packed: what stands for experts that the model does not hold as floats.
        progress: told about hashing.

    Returns:
        The record as written.

    Raises:
        BadConfig: the folder exists, or another process is writing it.
        BadCheckpoint: what was written does not hold what the config says; or the source holds more than the model
            and is gone or has changed: names what would be lost.
        OutOfBudget: not enough disk.
    """
    work = carried(origin_of(model), drop_unknown=drop_unknown, mtp=mtp)
    need = saved_bytes(model) + work.nbytes + (0 if packed is None else packed.nbytes)
    with atomic_folder(folder, overwrite=overwrite, need_bytes=need) as temporary:
        counts = live_counts(model)
        with as_stored(model):
            with quiet_transformers(), without_hollow(model):
                model.save_pretrained(temporary, max_shard_size=max_shard_bytes)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if packed is not None:
                add_packed(temporary, packed, max_shard_bytes)
            write_carried(work, temporary, model.config, max_shard_bytes=max_shard_bytes, counts=counts)
            if packed is not None:
                announce(temporary, packed)
        config = record.config if work.note is None else {**record.config, "left_out": work.note}
        expected = Expectations(experts=counts)
        record = record.model_copy(update={"config": config, "expectations": expected})
        return seal(temporary, record, extra_tensors=extra_tensors, progress=progress)


def seal(
    folder: Path,
    record: Record,
    *,
    extra_tensors: Mapping[str, torch.Tensor] | None = None,
    digests: Mapping[str, TensorExpectation] | None = None,
    progress: Progress | None = None,
) -> Record:
    """Turn a folder of config and shards into a moekit checkpoint: verify it, hash it, write record and card.

    For code that streams its own shards (see `ShardWriter`); call it inside `atomic_folder`. Tensors whose `digests`
    were taken while they were written are not read again.
    """
    if extra_tensors:
        save_file({n: t.detach().cpu().contiguous() for n, t in extra_tensors.items()}, folder / TENSORS_FILE)
        _index_single(folder)
    checkpoint = Checkpoint.open(folder)
    # What the record expects of the layers says whether they may differ.
    checkpoint.record = record
    verify(checkpoint, whole=False)
    extra = read_header(folder / TENSORS_FILE).tensors.values() if extra_tensors else ()
    expectations = Expectations(
        experts=counts_of(checkpoint),
        top_k=config_top_k(checkpoint.config),
        tensors=_all_digests(checkpoint, digests or {}, progress),
        extra=tensor_digests(folder, extra),
        config=config_digest(checkpoint.config),
        settings=config_settings(checkpoint.config),
        files=file_digests(folder),
    )
    full = record.model_copy(
        update={"fingerprint": checkpoint.fingerprint, "expectations": expectations, **_absolute_parent(record)}
    )
    full.write(folder)
    atomic_write(folder / CARD_FILE, render(full, checkpoint.config, licence_of(record.parent)))
    return full


def _all_digests(
    checkpoint: Checkpoint, known: Mapping[str, TensorExpectation], progress: Progress | None
) -> dict[str, TensorExpectation]:
    """Digests in file order; those of tensors that are not known are read."""
    unknown = [info for name, info in checkpoint.tensors.items() if name not in known]
    read = tensor_digests(checkpoint.path, unknown, progress=progress) if unknown else {}
    return {name: known[name] if name in known else read[name] for name in checkpoint.tensors}


def _absolute_parent(record: Record) -> dict[str, str]:
    """A parent that is a local folder, by its absolute path: the record is read from other working folders too."""
    if record.parent and Path(record.parent).is_dir():
        return {"parent": os.path.realpath(record.parent)}
    return {}


def _index_single(folder: Path) -> None:
    """Give a one-file model an index: vLLM loads every *.safetensors it sees unless an index names the shards."""
    single = folder / SINGLE_FILE
    if not single.exists():
        return
    tensors = read_header(single).tensors.values()
    shard = "model-00001-of-00001.safetensors"
    os.rename(single, folder / shard)
    total = sum(info.nbytes for info in tensors)
    atomic_write(folder / INDEX_FILE, index_text({info.name: shard for info in tensors}, total))
