"""`use: merge`: decide which experts become one, prove what that costs, and write the model with fewer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit._device import DtypeName
from moekit.data.encoding import Bos
from moekit.jobs.call import TextLike, call
from moekit.jobs.options.merge import MergeOptions
from moekit.jobs.weights.fewer_job import FewerResult, check, estimate, run, settle
from moekit.progress import ProgressLike

__all__ = ["FewerResult", "check", "estimate", "merge", "run", "settle"]


def merge(
    model: str | Path,
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    keep: int | float | str,
    data: TextLike | None = None,
    trace: str | Path | None = None,
    heldout: TextLike | None = None,
    scope: Literal["uniform", "global"] = "uniform",
    least: int | None = None,
    most: int | None = None,
    top_k: int | None = None,
    groups: Literal["free", "equal"] = "free",
    protect: str | Path | None = None,
    repair: Literal["none", "least-squares"] = "none",
    ridge: float | None = None,
    self_generated: int | None = None,
    demonstrations: int = 25,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    plan: str | Path | None = None,
    write: Literal["model", "plan"] = "model",
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    random_seeds: int = 1,
    stock_only: bool = False,
    mtp: Literal["drop", "keep", "prune"] = "drop",
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> FewerResult:
    """Let a merging method (`moekit methods merge`) fold experts into fewer, and prove what that costs.

    Args:
        model: MoE: folder or hub id.
        method: which experts go together, and how; see moekit methods merge.
        settings: the method's own knobs.
        keep: what stays: experts a layer (64), their fraction (0.5, 1/2; 1.0 is all), or bytes of the model (12GiB)
        data: text to decide on: file, folder, source, mix or hub id.
        trace: trace of this model to decide on, instead of data.
        heldout: text to prove the result on; by default a tenth of data, which is kept apart for it.
        scope: equally many in each layer, or wherever they are worth most (moekit.load only)
        least: fewest a layer keeps, with scope global.
        most: most a layer keeps, with scope global.
        top_k: choices a token makes from now on; as before by default.
        groups: routing groups: lift the router's limits to them, or keep equally many of each.
        protect: experts that stay: super, layer:expert pairs such as 1:68,2:92, or a JSON file.
        repair: refit the down projections of experts that stay to what each layer gave as a whole, on the text.
        ridge: of the repair: pulls refitted weights to what they were, as a share of the mean square of a neuron;
            0.0001 for experts with more than 20 tokens a neuron, else 0.01.
        self_generated: take data as prompts: decide on each with the model's own answer of up to so many tokens behind
            it (the whole model runs, not layer by layer)
        demonstrations: prompts of each domain that are answered.
        max_tokens: tokens of data, at most, shared by its domains; answered prompts count apart.
        seq_len: tokens a row, the model's limit if that is less; a prompt and its answer are one.
        batch_size: rows a pass.
        plan: also write scores and outcome to this file.
        write: write the smaller model, or the plan alone.
        proof: measure what it costs, against pruning by REAP and frequency, and random groups.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        random_seeds: random choices that the proof compares with.
        stock_only: refuse what stock transformers does not load.
        mtp: multi-token-prediction layers: leave them out, copy them, or cut them to as many experts, those that their
            own router gives the most weight on the text, behind the decoder as it was.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the smaller model; None writes the plan alone.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit merge` prints.

    Raises:
        BadConfig: an impossible option, a budget that the model cannot have, or nothing to decide or prove on.
        BadData: no text.
        BadCheckpoint: the model is damaged, or what was written is not what it must be; then nothing is left.
        OutOfBudget: the disk is too small.
    """
    return call(MergeOptions, FewerResult, dict(locals()))
