"""What a report says of the run: versions, machine, seed, commands, hashes."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moekit import __version__
from moekit.report.data import RunInfo

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "scipy", "lm-eval", "datasets", "peft", "trl")


def describe_run(
    *,
    commands: Sequence[str] = (),
    seed: int | None = None,
    hashes: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> RunInfo:
    """Gather what can be known here; names of users and hosts are left out.

    Args:
        commands: as typed.
        seed: of everything random.
        hashes: fingerprint of each input and output, by name.
        more: further facts of the machine or the run, such as the time it took.
    """
    versions = {"moekit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return RunInfo(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seed=seed,
        commands=tuple(commands),
        machine=_machine() | dict(more or {}),
        versions=versions,
        hashes=dict(hashes or {}),
    )


def _machine() -> dict[str, str]:
    found = {"system": f"{platform.system()} {platform.machine()}", "processor": _processor()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found["cores"] = str(cores)
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory"] = f"{size / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        pass
    return found | _accelerator()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _accelerator() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"GPU": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))}
