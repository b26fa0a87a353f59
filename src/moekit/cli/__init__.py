"""The command line: one file per command, each a thin layer over the library; the only part that prints or exits."""
