"""Options of `moekit.jobs.data`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from moekit.jobs.options.base import CommandLine, JobOptions, TextRef


class DataOptions(JobOptions):
    """Fetch a source once and freeze it in the run folder, so that later steps read the same bytes.

    Text becomes `train.jsonl` and `heldout.jsonl`, which never overlap; a model, packaged or in a folder, a folder of
    links to its files.
    """

    job: ClassVar[str] = "moekit.jobs.data"
    command: ClassVar[CommandLine] = CommandLine(
        help="Fetch a source once and freeze it in a folder: text as `train.jsonl` and `heldout.jsonl`, which never "
        "overlap; a model, packaged or in a folder, as a folder of links to its files.",
        writes="folder to write",
        arguments=("source",),
        examples=("moekit data write six-domains --train-bytes 2000000 --heldout-bytes 200000 -o ./text",),
    )

    source: TextRef = Field(description="file, folder, source, mix (demo, six-domains), packaged model, or hub id")
    train_bytes: int | None = Field(
        default=None, ge=1, description="bytes of training text in all; everything by default"
    )
    profile_bytes: int | None = Field(default=None, ge=1, description="bytes of held-out text to profile routing on")
    heldout_bytes: int | None = Field(default=None, ge=1, description="bytes of the remaining held-out text, in all")
    passage_bytes: int | None = Field(
        default=None, ge=64, description="cut held-out documents into passages of about so many bytes, each a document"
    )
