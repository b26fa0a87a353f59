"""Every failure becomes one message and the right exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from moekit.cli._errors import config_error, explain, understand
from moekit.errors import BadCheckpoint, Interrupted, NumericFault, OutOfBudget, PeerLost, UnsafeInput


class Knobs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    top_t: int
    depth: list[int] = []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadCheckpoint("x"), 2),
        (NumericFault("x"), 2),
        (UnsafeInput("x"), 3),
        (OutOfBudget("x"), 4),
        (PeerLost("x"), 5),
        (Interrupted("x"), 130),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 4),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"), 4),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/x"), 2),
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 300), 2),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert understand(error).exit_code == code


def test_out_of_memory_of_torch_is_a_resource() -> None:
    import torch

    assert understand(torch.OutOfMemoryError("CUDA out of memory")).exit_code == 4
    # What the CPU allocator raises.
    assert (
        understand(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")).exit_code == 4
    )
    mmap = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert understand(mmap).exit_code == 4
    assert understand(OSError(errno.ENOMEM, "Cannot allocate memory")).exit_code == 4
    assert understand(RuntimeError("shapes differ")).exit_code == 1


def test_the_message_says_where_and_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    code = explain(NumericFault("NaN in the router", file="a.safetensors", layer=3, expert=7, hint="restore it"))
    told = capsys.readouterr().err
    assert code == 2
    for words in ("a.safetensors", "layer 3", "expert 7", "NaN in the router", "restore it"):
        assert words in told
    assert told.count("restore it") == 1


def test_pydantic_faults_name_the_key() -> None:
    with pytest.raises(ValidationError) as caught:
        Knobs.model_validate({"top_t": "many", "depth": [1, "x"], "tpo": 1})
    text = str(config_error(caught.value, "c2r"))
    assert text.startswith("c2r: ")
    assert "top_t: " in text
    assert "depth.1: " in text
    assert "tpo: Extra inputs are not permitted" in text
    assert "'many'" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_kill_ends_with_130(number: signal.Signals) -> None:
    code = """
import signal, time
# A shell that starts its tests in the background lets them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from moekit.cli import main as m
class Slow:
    @staticmethod
    def build():
        from moekit.cli._command import build_command
        def slow(terminal): print("ready", flush=True); time.sleep(60)
        return build_command(slow, examples=["moekit slow"])
import sys
m.HAND_MADE["slow"] = m.COMMANDS["slow"] = "x"
sys.modules["moekit.cli.slow"] = Slow
m.main(["slow"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    time.sleep(0.1)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in told
    assert "Traceback" not in told
