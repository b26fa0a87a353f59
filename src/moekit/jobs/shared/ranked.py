"""Options of steps whose model several ranks may hold together, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moekit.errors import BadConfig

if TYPE_CHECKING:
    from moekit.parallel.launch.start import StartedRanks
    from moekit.parallel.ranks import Ranks


class RankedOptions(BaseModel):
    """How ranks share the experts of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    ep: int = Field(default=1, ge=1, description="ranks that share each layer's experts; start them with torchrun")
    nodes: int = Field(default=1, ge=1, description="nodes that these ranks stand in, for hierarchical dispatch")
    dispatch: str = Field(default="once-per-rank", description="how tokens travel; see moekit methods dispatch")
    placement: Path | None = Field(default=None, description="placement file: which rank holds which expert")
    codec: Literal["none", "int8"] = Field(default="none", description="int8 sends hidden states in 8 bits; lossy")

    def check_ranks(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            BadConfig: no such dispatcher; options without ranks; ranks that torchrun has not started.
        """
        from moekit import catalogue

        catalogue.get("dispatch", self.dispatch)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.ep == 1:
            if self.placement is not None or self.codec != "none":
                raise BadConfig("placement and codec are about several ranks", hint="give --ep, the number of ranks")
            return
        if world % self.ep:
            raise BadConfig(
                f"{world} rank{'s' * (world > 1)} cannot share experts {self.ep} by {self.ep}",
                hint=f"torchrun --nproc-per-node {self.ep} -m moekit ... --ep {self.ep}",
            )


@contextmanager
def ranks_of(options: RankedOptions) -> Iterator[StartedRanks | None]:
    """The ranks of this run, watched while they work; None where the model is not shared."""
    if options.ep == 1:
        yield None
        return
    from moekit.parallel.launch.start import start_ranks

    with start_ranks() as started:
        yield started


def deal_out(
    model: Any, options: RankedOptions, started: StartedRanks, *, shared_batch: bool, facts: dict[str, Any]
) -> Ranks:
    """Make sure that all ranks mean the same, and give each its experts.

    Args:
        model: the whole model.
        options: how.
        started: the ranks.
        shared_batch: whether all hold the same tokens.
        facts: what all must agree on, beside versions, model and placement.

    Raises:
        BadConfig: the ranks disagree, or the options do not fit the model.
    """
    import torch
    import transformers

    from moekit.checkpoint import fingerprint_model
    from moekit.parallel import expert_mesh, expert_parallel
    from moekit.parallel.ranks import Ranks
    from moekit.placement import Placement

    fingerprint = fingerprint_model(model)
    placement = None if options.placement is None else Placement.load(options.placement)
    if placement is not None:
        placement.check_model(fingerprint)
    started.agree(
        {
            **facts,
            **options.model_dump(mode="json", exclude={"placement"}),
            "model": fingerprint,
            "placement": None if placement is None else placement.hash,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    )
    ranks = Ranks.of(expert_mesh(options.ep, options.nodes, torch.device(model.device).type))
    expert_parallel(
        model,
        ranks,
        dispatch=options.dispatch,
        placement=placement,
        shared_batch=shared_batch,
        codec=options.codec,
    )
    return ranks
