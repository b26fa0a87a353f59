"""Time of `import moekit` and of `moekit --help` in fresh processes, median of several: each must be under a second."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

REPEATS = 7
LIMIT_SECONDS = 1.0

COMMANDS = {
    "python -c pass (for comparison)": [sys.executable, "-c", "pass"],
    "import moekit": [sys.executable, "-c", "import moekit"],
    "moekit --help": [sys.executable, "-c", "from moekit.cli.main import main; main(['--help'])"],
    "moekit run --help": [sys.executable, "-c", "from moekit.cli.main import main; main(['run', '--help'])"],
    "import torch (for comparison)": [sys.executable, "-c", "import torch"],
}
LIMITED = ("import moekit", "moekit --help")


def seconds(command: list[str], repeats: int = REPEATS) -> list[float]:
    """Wall time of each run; the first, which may read from a cold disk, is thrown away."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> int:
    """Print the table; 1 if a limit is broken."""
    print(f"{'command':34} {'median':>8} {'worst':>8}   of {REPEATS} fresh processes, seconds")
    slow = []
    for name, command in COMMANDS.items():
        times = seconds(command)
        print(f"{name:34} {statistics.median(times):8.3f} {max(times):8.3f}")
        if name in LIMITED and statistics.median(times) > LIMIT_SECONDS:
            slow.append(name)
    for name in slow:
        print(f"too slow: {name} takes more than {LIMIT_SECONDS} s")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
