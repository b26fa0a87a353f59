"""Options of steps whose model several ranks may hold together, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from moekit import catalogue
from moekit.checkpoint import fingerprint_model
from moekit.errors import BadConfig
from moekit.jobs.options.ranked import RankedOptions
from moekit.parallel import expert_mesh, expert_parallel
from moekit.parallel.launch.start import StartedRanks, start_ranks
from moekit.parallel.ranks import Ranks
from moekit.placement import Placement


def check_ranks(options: RankedOptions, *, divided: bool = False) -> None:
    """Refuse what cannot work before anything is loaded.

    Args:
        options: how ranks share the model.
        divided: whether ranks that do not share it divide the work in another way, as training does the text.

    Raises:
        BadConfig: no such dispatcher; options without ranks; ranks that torchrun has not started.
    """
    catalogue.get("dispatch", options.dispatch)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.ep == 1:
        if given := options.given(*(name for name in RankedOptions.model_fields if name != "ep")):
            raise BadConfig(
                f"{', '.join(given)} given, which {'is' if len(given) == 1 else 'are'} about several ranks",
                hint="give --ep, the number of ranks",
            )
        if world > 1 and not divided:
            raise BadConfig(
                f"{world} ranks are started, and each would do all of the work",
                hint=f"say --ep {world} to share the model, or start one process",
            )
        return
    if world % options.ep:
        raise BadConfig(
            f"{world} rank{'s' * (world > 1)} cannot share experts {options.ep} by {options.ep}",
            hint=f"torchrun --nproc-per-node {options.ep} -m moekit ... --ep {options.ep}",
        )


@contextmanager
def ranks_of(options: RankedOptions) -> Iterator[StartedRanks | None]:
    """The ranks of this run, watched while they work; None where the model is not shared."""
    if options.ep == 1:
        yield None
        return
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
