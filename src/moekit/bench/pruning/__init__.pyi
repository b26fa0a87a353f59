from .bench import bench_pruning as bench_pruning
from .calibration import Subject as Subject
from .ranking import rank as rank
from .result import (
    PruneBenchResult as PruneBenchResult,
    PruneRun as PruneRun,
    Ranking as Ranking,
    RankRow as RankRow,
)
from .setting import (
    Entry as Entry,
    PruneBenchSetting as PruneBenchSetting,
    default_entries as default_entries,
)
from .text import take_tokens as take_tokens
