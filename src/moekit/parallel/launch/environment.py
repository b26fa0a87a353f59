"""Who this process is among the ranks, read from what a launcher set, and the way to the store they share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from moekit.errors import BadConfig, PeerLost

TIMEOUT, TIMEOUT_VARIABLE = 300.0, "MOEKIT_RANK_TIMEOUT"
STALL_AFTER, STALL_VARIABLE = 15.0, "MOEKIT_STALL_AFTER"


def seconds(given: float | None, variable: str, default: float, env: Mapping[str, str]) -> float:
    """A time-out as given, as a variable says, or as usual."""
    text = env.get(variable) if given is None else str(given)
    if text is None:
        return default
    with suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise BadConfig(f"{variable if given is None else 'a time-out'} is {text!r}, not a number of seconds above 0")


@dataclass(frozen=True)
class Environment:
    """Who this process is among the ranks, as torchrun (or a hand-made launch) tells in variables.

    Attributes:
        rank: own number.
        world: ranks in all; 1 where no launcher said anything.
        local_rank: own number on this machine.
        local_world: ranks on this machine.
        host: where the store is.
        port: its port.
        launcher_holds_store: else rank 0 does.
        attempt: which start this is, where a launcher restarts.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: str = ""
    port: int = 0
    launcher_holds_store: bool = False
    attempt: str = "0"

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Environment:
        """From variables.

        Raises:
            BadConfig: some are missing, or no numbers.
        """
        if "RANK" not in env and env.get("WORLD_SIZE", "1") == "1":
            return cls()
        hint = "start with torchrun, which sets them all, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        needed = ["RANK", "WORLD_SIZE"] + ([] if env.get("WORLD_SIZE") == "1" else ["MASTER_ADDR", "MASTER_PORT"])
        missing = [name for name in needed if not env.get(name)]
        if missing:
            raise BadConfig(f"this is to be one of several ranks, but {', '.join(missing)} is not set", hint=hint)
        numbers = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            text = env.get(name, {"LOCAL_RANK": env["RANK"], "LOCAL_WORLD_SIZE": env["WORLD_SIZE"]}.get(name, "0"))
            if not text.isdecimal():
                raise BadConfig(f"{name} is {text!r}, not a number", hint=hint)
            numbers[name] = int(text)
        return cls(
            rank=numbers["RANK"],
            world=numbers["WORLD_SIZE"],
            local_rank=numbers["LOCAL_RANK"],
            local_world=numbers["LOCAL_WORLD_SIZE"],
            host=env.get("MASTER_ADDR", ""),
            port=numbers["MASTER_PORT"],
            launcher_holds_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=env.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def connect(self, timeout: float, serve: bool = False) -> Store:
        """Open a connection to the store, or the store itself.

        Raises:
            PeerLost: nobody holds it.
            BadConfig: it cannot be held here.
        """
        within = timedelta(seconds=timeout)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it as exported
                self.host, self.port, None, serve, within, wait_for_workers=False, multi_tenant=serve
            )
        except (RuntimeError, ValueError) as error:
            at = f"{self.host}:{self.port}"
            if serve:
                raise BadConfig(f"rank 0 cannot open a store on {at}", hint="choose a free MASTER_PORT") from error
            raise PeerLost(
                f"rank {self.rank} finds no store on {at} within {timeout:.3g} s",
                hint="rank 0 (or the launcher) has not started there, or a firewall is between",
            ) from error
        return PrefixStore(f"moekit/{self.attempt}", store)
