"""What narrowing leaves of shared experts and of attention: how many parts, and which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit._progress import Progress
from moekit.compress.budget.width import multiple_for, width_for
from moekit.compress.engine.dense_cuts import Cuttable, InputCut, Kind, cuttables
from moekit.compress.engine.part_scores import part_scores, strongest
from moekit.errors import BadConfig
from moekit.jobs.shared.opened import OpenedModel
from moekit.trace.loss import Loss


def asked_parts(method: Any) -> Mapping[Kind, int | float | str]:
    """What a method keeps outside of routed experts; nothing for methods that look at these alone."""
    found: Mapping[Kind, int | float | str] = getattr(method, "kept_parts", {})
    return found


def sized_cuts(source: OpenedModel, method: Any) -> dict[str, InputCut]:
    """Cuts of the right sizes, whichever parts stay; {} where nothing is cut.

    Raises:
        BadConfig: more parts than there are, or a number that no kernel likes.
        UnsupportedModel: see `cuttables`.
    """
    asked = asked_parts(method)
    known = cuttables(source.checkpoint, list(asked)) if asked else {}
    made = {}
    for name, each in known.items():
        keep = _kept(each, asked[each.kind], getattr(method, "multiple", None))
        if keep < each.parts:
            made[name] = each.cut(range(keep))
    return made


def _kept(each: Cuttable, asked: int | float | str, multiple: int | None) -> int:
    if each.kind == "shared":
        return width_for(asked, each.parts, multiple_for(each.parts, multiple))
    if int(asked) > each.parts:
        raise BadConfig(
            f"attention has {each.parts} heads of keys and values, and cannot keep {asked}",
            layer=each.layer,
            hint=f"--set groups={each.parts} at most",
        )
    return int(asked)


def decided_cuts(
    source: OpenedModel,
    method: Any,
    model: Any,
    batches: Sequence[Any],
    loss: Loss,
    progress: Progress | None,
) -> dict[str, InputCut]:
    """The parts on which the loss depends most stay.

    Args:
        source: the model.
        method: says how many.
        model: the same, loaded as a whole.
        batches: of the text.
        loss: what is differentiated.
        progress: told batch by batch.
    """
    sized = sized_cuts(source, method)
    if not sized:
        return {}
    known = cuttables(source.checkpoint, sorted({cut.kind for cut in sized.values()}))
    scores = part_scores(model, batches, {name: known[name] for name in sized}, loss, progress)
    return {name: known[name].cut(strongest(scores[name], len(cut.keep))) for name, cut in sized.items()}
