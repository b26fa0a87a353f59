"""Two nodes on one machine: network namespaces, a pair of virtual Ethernet devices between them, and a rate.

Ranks of one namespace talk over its loopback, unshaped; what goes from one to the other leaves through its device,
whose token bucket (tc tbf) lets so many bits a second pass, and whose counters say how many bytes left.

Namespaces belong to the machine, not to a process, so they are removed when the run ends, however it ends; those of a
run that was killed outright are removed by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moekit.errors import BadConfig, Interrupted
from moekit.placement.topology import parse_bandwidth

NODES = 2
PREFIX = "moekit-ep"
BURST, LATENCY = "64kb", "50ms"
# Bits of CapEff: CAP_NET_ADMIN makes devices and rates, CAP_SYS_ADMIN namespaces.
_NET_ADMIN, _SYS_ADMIN = 12, 21
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def read_rate(text: str) -> float | None:
    """Bits a second of `200Mbit/s`, `1Gbit/s`, `50MB/s`; None for `none`, a link that is not slowed down.

    Raises:
        BadConfig: not a rate.
    """
    return None if text.strip().lower() in {"none", "unshaped"} else parse_bandwidth(text) * 8


def name_rate(rate: float | None) -> str:
    """A rate as people write it."""
    if rate is None:
        return "unshaped"
    for unit in ("G", "M", "k"):
        if rate >= _UNITS[unit.lower()]:
            return f"{rate / _UNITS[unit.lower()]:g} {unit}bit/s"
    return f"{rate:g} bit/s"


def why_not() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [
        name for bit, name in ((_NET_ADMIN, "CAP_NET_ADMIN"), (_SYS_ADMIN, "CAP_SYS_ADMIN")) if not _capable(bit)
    ]
    if lacking:
        return f"this process lacks {' and '.join(lacking)}"
    remove_stale()
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        _run("ip", "netns", "exec", probe, "tc", "qdisc", "add", "dev", "v0", "root", *_tbf(1e9))
    except BadConfig as error:
        return f"the kernel refuses: {error.message}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None


def _capable(bit: int) -> bool:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective, 16) >> bit & 1)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadConfig(f"{' '.join(command)}: {(done.stderr or done.stdout).strip() or done.returncode}")
    return done.stdout


def _tbf(rate: float) -> list[str]:
    return ["tbf", "rate", f"{rate:.0f}bit", "burst", BURST, "latency", LATENCY]


def remove_stale() -> list[str]:
    """Remove namespaces of runs whose process is gone; their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    removed = []
    for line in listed.splitlines():
        found = re.match(rf"({PREFIX}-(\d+)-\w+)", line)
        if found and not os.path.exists(f"/proc/{found[2]}"):
            subprocess.run(["ip", "netns", "del", found[1]], capture_output=True, check=False)
            removed.append(found[1])
    return removed


@dataclass(eq=False)
class Network:
    """Where the ranks run.

    Attributes:
        shaped: namespaces with a device between them; else the machine's loopback, and the link is only modelled.
        spaces: name of each node's namespace.
        reason: why it is not shaped.
    """

    shaped: bool
    spaces: tuple[str, ...] = ()
    reason: str = ""
    _port: int = field(default_factory=lambda: _free_port())

    def prefix(self, node: int) -> list[str]:
        """What a command begins with to run on a node."""
        return ["ip", "netns", "exec", self.spaces[node]] if self.shaped else []

    def environment(self, node: int) -> dict[str, str]:
        """Where ranks of a node find each other."""
        if not self.shaped:
            return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port), "GLOO_SOCKET_IFNAME": "lo"}
        return {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(self._port), "GLOO_SOCKET_IFNAME": self.device(node)}

    def device(self, node: int) -> str:
        """The device through which bytes leave a node."""
        return f"v{node}" if self.shaped else ""

    def shape(self, rate: float | None) -> None:
        """Let so many bits a second leave each node; None lets all pass.

        Raises:
            BadConfig: tc refuses.
        """
        if not self.shaped:
            return
        for node, space in enumerate(self.spaces):
            inside = ["ip", "netns", "exec", space, "tc", "qdisc"]
            subprocess.run([*inside, "del", "dev", self.device(node), "root"], capture_output=True, check=False)
            if rate is not None:
                _run(*inside, "add", "dev", self.device(node), "root", *_tbf(rate))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def two_nodes(*, shaped: bool | None = None) -> Iterator[Network]:
    """A network of two nodes, removed on the way out.

    Args:
        shaped: namespaces; None takes them where they can be made and the loopback elsewhere.

    Raises:
        BadConfig: namespaces are asked for and cannot be made.
    """
    reason = "not asked for" if shaped is False else why_not()
    if reason:
        if shaped:
            raise BadConfig(f"no shaped network: {reason}", hint="run as root in a container that may, or without it")
        yield Network(False, reason=reason)
        return
    with _ended_by_sigterm():
        network = Network(True, tuple(f"{PREFIX}-{os.getpid()}-n{node}" for node in range(NODES)))
        try:
            _make(network)
            yield network
        finally:
            _remove(network.spaces)


def _make(network: Network) -> None:
    first, second = network.spaces
    _remove(network.spaces)
    for space in network.spaces:
        _run("ip", "netns", "add", space)
    # Both ends are born inside, so that no name of the machine's own network is taken.
    _run("ip", "link", "add", "v0", "netns", first, "type", "veth", "peer", "name", "v1", "netns", second)
    for node, space in enumerate(network.spaces):
        _run("ip", "-n", space, "addr", "add", f"10.77.0.{node + 1}/24", "dev", network.device(node))
        _run("ip", "-n", space, "link", "set", network.device(node), "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")


def _remove(spaces: Sequence[str]) -> None:
    """Delete namespaces and their devices; nothing may cut this short."""
    main = threading.current_thread() is threading.main_thread()
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING} if main else {}
    try:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turn signals that would end the process at once into an exception, so that the network is removed."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Interrupted(f"ended by {signal.Signals(number).name}")

    taken = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                taken[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def sent_bytes(device: str) -> int:
    """Bytes that ever left through a device; to be read inside its namespace."""
    with open(f"/sys/class/net/{device}/statistics/tx_bytes", encoding="ascii") as counter:
        return int(counter.read())
