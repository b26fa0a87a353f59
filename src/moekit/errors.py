"""Every failure has a name.

Library code raises one of these and never prints or exits; `moekit.cli` turns them into one readable
message and an exit code. A message says what is wrong, *where* (file, layer, expert) and the way out (`hint`).
"""

from __future__ import annotations

from pathlib import Path


class MoekitError(Exception):
    """Base of all moekit errors.

    Args:
        message: what is wrong, one sentence.
        file: the file or folder it was found in.
        layer: decoder layer index.
        expert: logical expert index.
        hint: what the user can do about it.
    """

    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        layer: int | None = None,
        expert: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.layer = layer
        self.expert = expert
        self.hint = hint

    def __str__(self) -> str:
        where = [
            text
            for text in (
                self.file,
                None if self.layer is None else f"layer {self.layer}",
                None if self.expert is None else f"expert {self.expert}",
            )
            if text
        ]
        head = f"{', '.join(where)}: {self.message}" if where else self.message
        return f"{head}\n  -> {self.hint}" if self.hint else head


class BadCheckpoint(MoekitError):
    """A model folder is damaged, incomplete or contradicts its own config."""

    exit_code = 2


class UnsupportedModel(MoekitError):
    """The model is no MoE, or its router or experts do not follow the contract."""

    exit_code = 2


class BadConfig(MoekitError):
    """A value, recipe or plan is impossible for this model; the message names the nearest legal one."""

    exit_code = 2


class BadData(MoekitError):
    """Text, questions or a trace are empty, damaged or belong to something else."""

    exit_code = 2


class NumericFault(MoekitError):
    """NaN or infinity where a finite number must be."""

    exit_code = 2


class UnsafeInput(MoekitError):
    """Pickles, remote code, paths that leave the folder, headers that lie."""

    exit_code = 3


class OutOfBudget(MoekitError):
    """Memory or disk does not suffice; the message names needed and available bytes."""

    exit_code = 4


class PeerLost(MoekitError):
    """A rank died, stalled or disagrees."""

    exit_code = 5


class Interrupted(MoekitError):
    """The user or the system asked to stop."""

    exit_code = 130
