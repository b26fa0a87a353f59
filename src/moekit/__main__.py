"""`python -m moekit`, also for launchers such as `torchrun -m moekit train ...`."""

from moekit.cli.main import main

main()
