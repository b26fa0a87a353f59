"""Multi-token-prediction layers whose experts are cut to as many as the decoder's layers keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moekit.checkpoint.folder import Checkpoint
from moekit.compress.engine.grouped import routing_groups
from moekit.compress.engine.mtp import Mtp, MtpKept, highest, mtp_blocks
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.request import PlanRequest
from moekit.errors import BadConfig

_DROP = "or leave them out (--mtp drop): they only speed up decoding"


def cuts_mtp(checkpoint: Checkpoint, mtp: Mtp) -> bool:
    """Whether multi-token-prediction layers are to be cut, and there are some that hold experts."""
    return mtp == "prune" and bool(mtp_blocks(checkpoint))


def check_mtp(
    checkpoint: Checkpoint, mtp: Mtp, request: PlanRequest, known: Mapping[str, Sequence[float]] | bool
) -> None:
    """Refuse to cut multi-token-prediction layers where nothing could say which of their experts stay.

    Args:
        checkpoint: the source.
        mtp: what becomes of them.
        request: whose budget holds.
        known: scores of their experts, or whether there is a text to take them on.

    Raises:
        BadConfig: there is neither, or layers may keep different numbers of experts.
    """
    if not cuts_mtp(checkpoint, mtp):
        return
    if request.keep_budget.scope == "global":
        raise BadConfig(
            "layers may keep different numbers of experts, so none can be told for multi-token-prediction layers",
            hint=f"say --scope uniform, {_DROP}",
        )
    blocks = mtp_blocks(checkpoint)
    missing = not known if isinstance(known, bool) else any(block.prefix not in known for block in blocks)
    if missing:
        raise BadConfig(
            f"nothing says which experts of the multi-token-prediction layer {blocks[0].prefix}* stay: no trace holds "
            "what its router chooses",
            file=checkpoint.path,
            hint=f"decide on text (moekit prune --data TEXT --mtp prune), {_DROP}",
        )


def some_kept(checkpoint: Checkpoint, mtp: Mtp, counts: Mapping[int, int]) -> MtpKept:
    """Any decision of the right size: how large the result is does not depend on who stays."""
    if not cuts_mtp(checkpoint, mtp):
        return {}
    return {block.prefix: tuple(range(min(counts.values()))) for block in mtp_blocks(checkpoint)}


def mtp_kept(plan: WeightPlan, checkpoint: Checkpoint, mtp: Mtp) -> MtpKept:
    """Which experts of multi-token-prediction layers stay: those that their routers gave the most weight."""
    if not cuts_mtp(checkpoint, mtp):
        return {}
    keep = min(outcome.experts for outcome in plan.outcomes.values())
    groups = routing_groups(checkpoint.config) if plan.file.groups == "equal" else 1
    return {block.prefix: highest(plan.file.mtp[block.prefix], keep, groups) for block in mtp_blocks(checkpoint)}
