"""Sources: what statistics may look at of a forward pass, one file a kind.

`table` says what each one shows and costs; the other modules hold the hooks that fetch it.
"""
