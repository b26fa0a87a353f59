"""Ranks say what they are about to do, and stop before they begin where they do not all say the same."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel
from torch import Tensor

from moekit.errors import BadConfig, PeerLost

SHORT = 60  # characters of a value in a message
READ_WITHIN = 5.0  # seconds in which all ranks should have read why they stop
MISSING = "nothing"


class Store(Protocol):
    """What is needed of a `torch.distributed` store."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def get(self, key: str, /) -> bytes:
        """Read, once it is there."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all are there."""


class NotHeard(PeerLost):
    """Ranks that should have spoken did not.

    Args:
        ranks: which.
        reason: what they did not do, in words.
    """

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        super().__init__(
            f"{name_ranks(ranks)} did not {reason}",
            hint="dead, stuck or running other code; the last lines of that rank say more",
        )
        self.ranks, self.reason = tuple(ranks), reason


@dataclass(frozen=True)
class Statement:
    """A fact as one rank has it: a hash to compare and a short text to show."""

    digest: str
    text: str


def state(value: Any) -> dict[str, Statement]:
    """Statements of a value by path below it; "" is the value itself.

    Mappings and pydantic models are taken apart, so that a message can name the very key. Tensors count by type, shape
    and bytes.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Mapping) and value:
        return {
            f".{key}{path}": told
            for key, below in sorted(value.items(), key=lambda item: str(item[0]))
            for path, told in state(below).items()
        }
    if isinstance(value, Tensor):
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
        kind = str(value.dtype).removeprefix("torch.")
        whole = f"{kind}{list(value.shape)} {digest}"
        return {"": Statement(_hash(whole), f"{kind}{list(value.shape)} {digest[:12]}")}
    whole = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    short = whole if len(whole) <= SHORT else f"{whole[: SHORT - 13]}… {_hash(whole)[:11]}"
    return {"": Statement(_hash(f"{type(value).__name__} {whole}"), short)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def statements(facts: Mapping[str, Any]) -> dict[str, Statement]:
    """Statements of named facts: "config.top_k" and the like."""
    return {f"{name}{path}": told for name, value in facts.items() for path, told in state(value).items()}


def compare(told: Mapping[int, Mapping[str, Statement]]) -> list[str]:
    """Where ranks differ: one line a fact, naming those that differ from most; empty if all agree.

    Args:
        told: statements by rank. Where no value has a majority, rank 0's (or the lowest rank's) counts.
    """
    lines = []
    for fact in sorted({fact for facts in told.values() for fact in facts}):
        by_rank = {rank: told[rank].get(fact, Statement("", MISSING)) for rank in sorted(told)}
        counted = Counter(statement.digest for statement in by_rank.values())
        if len(counted) == 1:
            continue
        digest, most = counted.most_common(1)[0]
        if 2 * most <= len(by_rank):
            digest = next(iter(by_rank.values())).digest
        usual = next(statement.text for statement in by_rank.values() if statement.digest == digest)
        same = [rank for rank, statement in by_rank.items() if statement.digest == digest]
        others: dict[str, list[int]] = {}
        for rank, statement in by_rank.items():
            if statement.digest != digest:
                others.setdefault(statement.text, []).append(rank)
        odd = ", ".join(f"{name_ranks(ranks)} {_has(ranks)} {text}" for text, ranks in others.items())
        lines.append(f"{fact}: {odd}; {name_ranks(same)} {_has(same)} {usual}")
    return lines


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def name_ranks(ranks: Iterable[int]) -> str:
    """Name them: rank 2; ranks 1, 3; ranks 0-5."""
    found = sorted(ranks)
    if len(found) == 1:
        return f"rank {found[0]}"
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f"ranks {found[0]}-{found[-1]}"
    return "ranks " + ", ".join(map(str, found))


def disagreement(lines: Sequence[str]) -> BadConfig:
    """The error of lines from `compare`."""
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return BadConfig(
        f"ranks disagree about {'; '.join(lines[:3])}{more}",
        hint="start every rank with the same command, files and versions",
    )


def await_keys(store: Store, keys: Mapping[int, str], bound: float) -> list[int]:
    """Wait until ranks have written; the ranks that have not within `bound` seconds."""
    deadline, pause = time.monotonic() + bound, 0.002
    missing = dict(keys)
    while True:
        missing = {rank: key for rank, key in missing.items() if not store.check([key])}
        if not missing or time.monotonic() >= deadline:
            return list(missing)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def agree_through(store: Store, rank: int, world: int, topic: str, facts: Mapping[str, Any], bound: float) -> None:
    """See `agree`; over any store, under a topic that no other agreement of this job has.

    Args:
        store: read and written by all ranks.
        rank: own.
        world: how many.
        topic: prefix of the keys.
        facts: what must be equal.
        bound: seconds to wait for the others.
    """
    own = statements(facts)
    everyone = range(world)
    # Details first: who sees a hash can read them. They are only read where hashes differ.
    store.set(f"{topic}/facts/{rank}", json.dumps({fact: [s.digest, s.text] for fact, s in own.items()}))
    store.set(f"{topic}/hash/{rank}", _hash(json.dumps({fact: s.digest for fact, s in own.items()}, sort_keys=True)))
    late = await_keys(store, {other: f"{topic}/hash/{other}" for other in everyone}, bound)
    if late:
        raise NotHeard(late, f"say within {bound:.3g} s what it is about to do")
    if len({store.get(f"{topic}/hash/{other}") for other in everyone}) == 1:
        return
    told = {
        other: {fact: Statement(*both) for fact, both in json.loads(store.get(f"{topic}/facts/{other}")).items()}
        for other in everyone
    }
    # Whoever ends first may take the store or, through the launcher, the other ranks with it.
    store.set(f"{topic}/read/{rank}", "")
    await_keys(store, {other: f"{topic}/read/{other}" for other in everyone}, min(bound, READ_WITHIN))
    raise disagreement(compare(told))
