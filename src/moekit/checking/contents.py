"""What a folder lacks: of what its own config announces, and of what its parent holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moekit.checking.report import Finding
from moekit.checkpoint.config_file import announced_mtp
from moekit.checkpoint.expected import stated_differences, unknown_tensors
from moekit.checkpoint.experts import counts_of, mtp_tensors
from moekit.checkpoint.folder import CONFIG_FILE, Checkpoint, listed
from moekit.checkpoint.layout import Layout
from moekit.checkpoint.names import expert_in, in_tower, stated_depth, text_config

_SOME = "while others of them are"


def check_announced(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Multi-token-prediction layers and towers that the config announces and no tensor holds."""
    count = announced_mtp(checkpoint.config)
    if count and not mtp_tensors(checkpoint):
        yield Finding(
            severity="warning",
            code="mtp-missing",
            message=f"the config announces multi-token-prediction layers ({count}), no tensor holds any",
            file=str(checkpoint.path / CONFIG_FILE),
            hint="answers are the same, speculative decoding with them fails; set the number to 0 if they are gone",
        )
    differences = stated_differences(checkpoint)
    if differences is not None and differences.missing:
        kind = (checkpoint.config.get("architectures") or ["?"])[0]
        yield Finding(
            severity="error",
            code="missing-tensor",
            message=f"{kind}, which the config names, demands {len(differences.missing)} tensors that are missing: "
            f"{listed(differences.missing, 5)}",
            file=str(checkpoint.path),
            hint="make it again from its parent; moekit copies what the language model has no place for",
        )


def check_lost(
    child: Checkpoint, parent: Checkpoint, layout: Layout | None, theirs: Layout | None
) -> Iterator[Finding]:
    """Tensors of the parent that the child has in no form.

    Args:
        child: what is checked.
        parent: what it was made from.
        layout: of the child's config.
        theirs: of the parent's.
    """
    if layout is None or theirs is None:
        return
    if layout.live.keys() != theirs.live.keys():  # another family or number of layers, or a language model alone
        towers = {name for name in parent.tensors if in_tower(theirs.live_name(name))} - set(child.tensors)
        if towers and text_config(child.config).get("model_type") == text_config(parent.config).get("model_type"):
            yield _lost(child, towers, "warning", "beside the language model")
        return
    beyond = mtp_tensors(parent)
    lost = {n for n in unknown_tensors(parent, theirs) if _still(n, child, beyond) not in {None, *child.tensors}}
    if not lost:
        return
    mtp = lost & beyond
    if mtp:
        # Some of them are here: then all must be.
        announced, some = announced_mtp(child.config), beyond & set(child.tensors)
        what = "of multi-token-prediction layers"
        yield _lost(child, mtp, "error" if announced or some else "note", what, None if announced else _SOME)
    if lost - mtp:
        same = child.config.get("architectures") == parent.config.get("architectures")
        yield _lost(child, lost - mtp, "error" if same else "warning", "beyond the language model")


def _still(name: str, child: Checkpoint, mtp: set[str]) -> str | None:
    """What a tensor of the parent is called in the child; None for an expert that was cut from its layer on purpose."""
    expert = expert_in(name)
    kept = {} if child.record is None else child.record.scores.get("kept_mtp") or {}
    prefix = next((prefix for prefix in kept if name.startswith(prefix)), None)
    if expert is None or name not in mtp or prefix is None:
        return name
    if expert not in kept[prefix]:
        return None
    return name.replace(f".experts.{expert}.", f".experts.{list(kept[prefix]).index(expert)}.")


def _lost(child: Checkpoint, names: Iterable[str], severity: str, what: str, broken: str | None = None) -> Finding:
    ordered = sorted(names)
    tail = {
        "error": broken or "and the config still announces them",
        "warning": "and the config names another class",
        "note": "and the config announces none: left out on purpose",
    }[severity]
    return Finding.model_validate(
        {
            "severity": severity,
            "code": "lost-tensors",
            "message": f"{len(ordered)} tensors {what} that the parent has are not here, {tail}: {listed(ordered, 3)}",
            "file": str(child.path),
            "hint": None if severity == "note" else "make it again from the parent with moekit, which copies them",
        }
    )


def expert_layers(checkpoint: Checkpoint) -> dict[int, int]:
    """Decoder layer -> routed experts, multi-token-prediction layers left out."""
    layers = stated_depth(checkpoint.config)
    counts = counts_of(checkpoint)
    return {layer: count for layer, count in counts.items() if layers is None or layer < layers}
