"""What training minimises: one file an objective, entered into the catalogue as kind "objective"."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Objective": "base",
        "OutputObjective": "base",
        "RouterObjective": "base",
        "read_objectives": "base",
    },
)
