"""Read and write model folders: open, verify, stream, write atomically; refuse what is unsafe."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Checkpoint": "folder",
        "Estimate": "estimate",
        "Expectations": "record",
        "PartEntry": "parts",
        "Provenance": "provenance",
        "Record": "record",
        "ShardWriter": "shards",
        "TensorInfo": "safety",
        "atomic_folder": "atomic",
        "atomic_write": "atomic",
        "fingerprint_model": "fingerprint",
        "load": "model",
        "read_header": "safety",
        "save": "model",
    },
)
