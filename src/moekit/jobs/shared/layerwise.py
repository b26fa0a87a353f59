"""Whether a model is run layer by layer because transformers has no kernels for its weights here."""

from __future__ import annotations

from pathlib import Path

from moekit._device import resolve_device
from moekit._progress import Progress
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.quantized.weights import quantized_weights
from moekit.errors import UnsupportedModel
from moekit.jobs.shared.inputs import model_location
from moekit.jobs.shared.opened import OpenedModel, open_source


def layerwise_source(reference: str, *, device: str, progress: Progress | None = None) -> OpenedModel | None:
    """A quantized model that is to run on a CPU, opened, where its weights can be read as floats; None for all others.

    One that carries a routing policy is left to transformers, too: its layers alone would not route by it.

    Args:
        reference: folder, hub id, or name of a packaged model.
        device: that it is to run on.
        progress: told of downloads.

    Raises:
        BadCheckpoint, UnsafeInput, UnsupportedModel: as `moekit.load`.
    """
    if resolve_device(device).type != "cpu":
        return None
    location = model_location(reference, progress)
    checkpoint = Checkpoint.open(Path(location).expanduser() if Path(location).expanduser().is_dir() else location)
    if "quantization_config" not in checkpoint.config or (checkpoint.record is not None and checkpoint.record.parts):
        return None
    try:
        quantized_weights(checkpoint)
    except UnsupportedModel:  # transformers may know it
        return None
    return open_source(reference, progress)
