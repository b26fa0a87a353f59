from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from moekit.bench.dispatch import network
from moekit.errors import BadConfig
from tests.contracts import FULL

REASON = network.why_not()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=f"no network namespaces here: {REASON}")


def spaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"{network.PREFIX}-")]


def of(pid: int) -> list[str]:
    return [name for name in spaces() if name.startswith(f"{network.PREFIX}-{pid}-")]


def until(true: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("text", "bits"), [("200Mbit/s", 2e8), ("1Gbit/s", 1e9), ("50MB/s", 4e8), ("none", None), ("unshaped", None)]
)
def test_rates_are_read_with_their_unit(text: str, bits: float | None) -> None:
    assert network.read_rate(text) == bits


@pytest.mark.parametrize("text", ["fast", "200", "-1Mbit/s", "0Gbit/s", ""])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(BadConfig):
        network.read_rate(text)


@pytest.mark.parametrize(
    ("rate", "name"),
    [(2e8, "200 Mbit/s"), (1e9, "1 Gbit/s"), (1.5e9, "1.5 Gbit/s"), (None, "unshaped"), (9, "9 bit/s")],
)
def test_rates_are_written_as_they_are_sold(rate: float | None, name: str) -> None:
    assert network.name_rate(rate) == name


def test_it_says_why_there_can_be_no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(network.shutil, "which", lambda tool: f"/sbin/{tool}")
    assert network.why_not() == "network namespaces need root"
    with pytest.raises(BadConfig, match="need root"), network.two_nodes(shaped=True):
        pass
    monkeypatch.setattr(network.shutil, "which", lambda tool: None if tool == "tc" else "/sbin/ip")
    assert "tc not found" in str(network.why_not())
    with network.two_nodes() as modelled:
        assert not modelled.shaped
        assert "tc not found" in modelled.reason
        assert modelled.prefix(0) == []
        assert modelled.environment(1)["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_capability_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(network, "_capable", lambda bit: bit != network._NET_ADMIN)
    assert network.why_not() == "this process lacks CAP_NET_ADMIN"


@needs_namespaces
def test_two_nodes_see_each_other_at_the_rate_and_are_gone_afterwards() -> None:
    with network.two_nodes(shaped=True) as nodes:
        assert set(of(os.getpid())) == set(nodes.spaces)
        nodes.shape(2e7)
        seconds, sent = transfer(nodes, 1 << 20)
        # 1 MiB at 20 Mbit/s takes 0.42 s, less the bucket of 64 KiB.
        assert 0.35 < seconds < 1.5
        assert 1 << 20 < sent < 1.1 * (1 << 20)
        nodes.shape(None)
        assert transfer(nodes, 1 << 20)[0] < 0.35
    assert of(os.getpid()) == []


LISTEN = """
import socket
server = socket.create_server(("10.77.0.2", 5001))
print("ready", flush=True)
peer, _ = server.accept()
while peer.recv(1 << 16):
    pass
"""
SEND = """
import socket, sys, time
from moekit.bench.dispatch.network import sent_bytes
before = sent_bytes("v0")
begun = time.monotonic()
with socket.create_connection(("10.77.0.2", 5001)) as peer:
    peer.sendall(bytes(int(sys.argv[1])))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
print(time.monotonic() - begun, sent_bytes("v0") - before)
"""


def transfer(nodes: network.Network, count: int) -> tuple[float, int]:
    listener = subprocess.Popen(
        [*nodes.prefix(1), sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    try:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "ready\n"
        done = subprocess.run(
            [*nodes.prefix(0), sys.executable, "-c", SEND, str(count)], capture_output=True, text=True, check=True
        )
        listener.wait(120)
    finally:
        listener.kill()
        listener.wait()
        listener.stdout.close()
    seconds, sent = done.stdout.split()
    return float(seconds), int(sent)


@needs_namespaces
def test_an_exception_leaves_nothing_behind() -> None:
    def fail() -> None:
        with network.two_nodes(shaped=True):
            assert len(of(os.getpid())) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert of(os.getpid()) == []


HOLD = """
import signal, time
# Whoever runs the tests may have these ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from moekit.bench.dispatch.network import two_nodes
with two_nodes(shaped=True):
    print("made", flush=True)
    time.sleep(600)
"""


def hold() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    return process


@needs_namespaces
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=FULL) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_signals_leave_nothing_behind(number: signal.Signals) -> None:
    process = hold()
    assert len(of(process.pid)) == 2
    process.send_signal(number)
    assert process.wait(120) != 0
    assert of(process.pid) == []


@pytest.mark.full
@pytest.mark.slow
@needs_namespaces
def test_what_a_killed_run_left_is_removed_by_the_next_one() -> None:
    process = hold()
    process.kill()
    process.wait()
    assert len(of(process.pid)) == 2
    mine = os.getpid()
    with network.two_nodes(shaped=True):
        assert of(process.pid) == []
        assert len(of(mine)) == 2


@pytest.mark.full
@pytest.mark.slow
@needs_namespaces
def test_two_runs_do_not_disturb_each_other() -> None:
    process = hold()
    try:
        with network.two_nodes(shaped=True):
            assert len(of(process.pid)) == 2
        assert len(of(process.pid)) == 2
    finally:
        process.terminate()
        process.wait(120)
    assert until(lambda: of(process.pid) == [])


def test_counters_of_devices_are_read() -> None:
    assert network.sent_bytes("lo") >= 0
