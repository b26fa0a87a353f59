"""Disk, memory and rough time of a model before anything but headers is read or downloaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from moekit.checkpoint.experts import expert_counts, is_expert_tensor
from moekit.checkpoint.folder import CONFIG_FILE, read_tensors
from moekit.checkpoint.hub import first_line, looks_like_hub_id, network_errors
from moekit.checkpoint.names import config_top_k
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo, check_name, read_json
from moekit.checkpoint.sanity import check_config
from moekit.checkpoint.spec import MoESpec
from moekit.errors import BadCheckpoint, BadConfig

# Rough rates; `Estimate.assumptions` states those used.
DOWNLOAD_BYTES_PER_SECOND = 50e6
READ_BYTES_PER_SECOND = 1e9
# fp32 master weights, gradients and Adam's two moments; activations come on top.
TRAIN_BYTES_PER_PARAMETER = 16
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


class Estimate(BaseModel):
    """What a model will take.

    Attributes:
        model: folder or hub id.
        model_type: from its config.
        shards: number of weight files.
        disk_bytes: of the weights.
        download_bytes: still to be fetched (0 for a local folder).
        parameters: all of them.
        expert_parameters: those of routed experts.
        active_parameters: that take part in one token's forward.
        moe_layers: number of MoE layers.
        experts: routed experts of the largest layer.
        top_k: choices a token.
        load_bytes: weights in memory.
        peak_load_bytes: while loading: weights, and the largest stack of experts once more.
        train_bytes: full fine-tuning in fp32 with Adam, without activations.
        cache_bytes_per_token: key-value cache of one token.
        seconds: rough times: "download", "read", "check", "forward_1k_tokens".
        assumptions: the rates behind `seconds`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_type: str
    shards: int
    disk_bytes: int
    download_bytes: int
    parameters: int
    expert_parameters: int
    active_parameters: int
    moe_layers: int
    experts: int
    top_k: int | None
    load_bytes: int
    peak_load_bytes: int
    train_bytes: int
    cache_bytes_per_token: int
    seconds: dict[str, float]
    assumptions: dict[str, float]


@dataclass(frozen=True)
class _Headers:
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    remote: bool


def _hub_headers(model: str, revision: str | None, token: str | None) -> _Headers:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError

    errors: tuple[type[Exception], ...] = (*network_errors(), HFValidationError)
    try:
        config = hf_hub_download(model, CONFIG_FILE, revision=revision, token=token)
        metadata = HfApi(token=token).get_safetensors_metadata(model, revision=revision)
    except NotASafetensorsRepoError as error:
        raise BadCheckpoint(f"{model!r} has no safetensors weights", hint="see `moekit check`") from error
    except errors as error:
        raise BadCheckpoint(
            f"{model!r} is no local folder, and the hub does not tell its sizes: {first_line(error)}",
            hint="check the name, the network and, for a gated model, the token (hf auth login)",
        ) from error
    tensors = {
        name: TensorInfo(name, file, str(info.dtype), tuple(info.shape), (info.data_offsets[0], info.data_offsets[1]))
        for file, content in metadata.files_metadata.items()
        for name, info in content.tensors.items()
    }
    return _Headers(read_json(Path(config)), tensors, remote=True)


def _headers(model: str | Path, revision: str | None, token: str | None) -> _Headers:
    path = Path(model)
    if path.is_dir():
        config = read_json(check_name(path, CONFIG_FILE))
        check_config(config, path / CONFIG_FILE)
        return _Headers(config, read_tensors(path), remote=False)
    if not looks_like_hub_id(model):
        raise BadCheckpoint("there is no such folder", file=path, hint="give a model folder, or a hub id like org/name")
    return _hub_headers(str(model), revision, token)


def measured_flops(seconds: float = 0.05) -> float:
    """fp32 multiply-adds (times two) a second of this machine's CPU, from a short matrix product."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((384, 384), dtype=np.float32) for _ in range(2))
    left @ right
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        left @ right
        count += 1
    return count * 2 * 384**3 / (time.perf_counter() - start)


def estimate(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str = "auto",
    download_rate: float = DOWNLOAD_BYTES_PER_SECOND,
    read_rate: float = READ_BYTES_PER_SECOND,
    flops: float | None = None,
) -> Estimate:
    """Estimate disk, memory and time from headers only; of a hub model, a few kilobytes are fetched.

    Args:
        model: local folder or hub id.
        revision: of a hub model.
        token: hub token.
        dtype: of the weights in memory: "auto" (as stored), "float32", "bfloat16", "float16".
        download_rate: bytes a second.
        read_rate: bytes a second from disk.
        flops: operations a second of a forward; measured on the CPU by default.

    Raises:
        BadCheckpoint: no such model, or a damaged one.
        BadConfig: an unknown dtype.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise BadConfig(f"unknown dtype {dtype!r}", hint=f"choose auto, {', '.join(_DTYPES)}")
    headers = _headers(model, revision, token)
    tensors = headers.tensors.values()
    parameters = sum(info.numel for info in tensors)
    routed = sum(info.numel for name, info in headers.tensors.items() if is_expert_tensor(name))
    counts, top_k = expert_counts(headers.tensors), config_top_k(headers.config)
    experts = max(counts.values(), default=0)
    active = parameters - routed + (routed * min(top_k, experts) // experts if experts and top_k else routed)
    disk = sum(info.nbytes for info in tensors)
    load = disk if dtype == "auto" else parameters * DTYPE_BITS[_DTYPES[dtype]] // 8
    itemsize = load / parameters if parameters else 0.0
    largest = max([info.numel for info in tensors], default=0)
    stack = max(largest, routed * 2 // (3 * len(counts)) if counts else 0)  # gate and up of one layer
    rate = measured_flops() if flops is None else flops
    download = disk if headers.remote else 0
    return Estimate(
        model=str(model),
        model_type=str(headers.config.get("model_type")),
        shards=len({info.shard for info in tensors}),
        disk_bytes=disk,
        download_bytes=download,
        parameters=parameters,
        expert_parameters=routed,
        active_parameters=active,
        moe_layers=len(counts),
        experts=experts,
        top_k=top_k,
        load_bytes=load,
        peak_load_bytes=load + int(stack * itemsize),
        train_bytes=parameters * TRAIN_BYTES_PER_PARAMETER,
        cache_bytes_per_token=int(MoESpec.from_config(headers.config).cached_numbers * itemsize),
        seconds={
            "download": download / download_rate,
            "read": disk / read_rate,
            "check": disk / read_rate,
            "forward_1k_tokens": 2 * active * 1000 / rate,
        },
        assumptions={
            "download_bytes_per_second": download_rate,
            "read_bytes_per_second": read_rate,
            "flops": rate,
        },
    )
