from .base import (
    Objective as Objective,
    OutputObjective as OutputObjective,
    RouterObjective as RouterObjective,
    read_objectives as read_objectives,
)
