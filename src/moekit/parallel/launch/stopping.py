"""SIGTERM to one rank of several: is another rank gone, or is the whole job being stopped?"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType

from moekit.parallel.launch.health import PATIENCE, Heartbeat

STOP_WITHIN = 3.0  # seconds to find out why SIGTERM came


class Terminations:
    """SIGTERM, also where the main thread sits in a collective and cannot run Python.

    A launcher sends it to all ranks as soon as one dies, and where the whole job is stopped: a thread finds out which.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self.pid = os.getpid()
        self.pass_on = self.passed_on = False
        self.ignore_until: float | None = None
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.closed = threading.Event()
        self.fd_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.before = signal.signal(signal.SIGTERM, self._in_main)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._listen, name="moekit-sigterm", daemon=True).start()

    @classmethod
    def install(cls, heartbeat: Heartbeat) -> Terminations | None:
        """Take the signal over, where this may be done: Python leaves it to the main thread."""
        return cls(heartbeat) if threading.current_thread() is threading.main_thread() else None

    def _forget(self) -> None:
        if not self.closed.is_set():  # a child of this process (a data loader) is no rank
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGTERM, self.before)

    def _listen(self) -> None:
        while True:
            received = self.reader.recv(64)
            if not received:
                return
            if self.fd_before >= 0:
                with suppress(OSError):
                    os.write(self.fd_before, received)
            if signal.SIGTERM in received and not self.heartbeat.stopping and not self.closed.is_set():
                self.heartbeat.stopping = True
                self._find_out()

    def _find_out(self) -> None:
        self.heartbeat.tell("stopped", "by SIGTERM")
        found = self.heartbeat.gone_while_stopping(max(STOP_WITHIN, self.heartbeat.suspect_after + 1))
        if self.closed.is_set():
            return
        if found is not None:
            self.heartbeat.forward(found)
            self.heartbeat.end(str(found))
        self.pass_on = True
        # A real signal: it also wakes a main thread that sleeps or reads.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if not self.closed.wait(5.0) and not self.passed_on:
            self.heartbeat.end("stopped by SIGTERM", 128 + signal.SIGTERM)

    def _in_main(self, number: int, frame: FrameType | None) -> None:
        ending = self.ignore_until is not None and time.monotonic() < self.ignore_until
        if ending or not (self.pass_on or self.closed.is_set()):
            return  # this rank is ending for a reason of its own already, or the thread is finding out
        self.passed_on = True
        if callable(self.before):
            self.before(number, frame)
        elif self.before != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self, failed: bool) -> None:
        """Give the signal back; a rank that failed is let end in peace first."""
        self.closed.set()
        signal.set_wakeup_fd(self.fd_before)
        if failed:
            self.ignore_until = time.monotonic() + PATIENCE
            # The interpreter gives signals back before it has ended: SIGTERM would then replace the exit code.
            atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, self.before)
        self.writer.close()
