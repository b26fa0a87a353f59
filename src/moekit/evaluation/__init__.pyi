from .comparison import (
    Comparison as Comparison,
    DomainComparison as DomainComparison,
    Evaluation as Evaluation,
    TaskComparison as TaskComparison,
    compare as compare,
)
from .documents import (
    DomainPerplexity as DomainPerplexity,
    PerplexityResult as PerplexityResult,
    perplexity as perplexity,
    perplexity_of_documents as perplexity_of_documents,
)
from .generation import (
    Completion as Completion,
    Completions as Completions,
    SideBySide as SideBySide,
    agreement as agreement,
    complete as complete,
    side_by_side as side_by_side,
)
from .pairs import (
    McNemar as McNemar,
    PairedDifference as PairedDifference,
    mcnemar as mcnemar,
    paired as paired,
)
from .questions import (
    Metric as Metric,
    TaskResult as TaskResult,
    choices as choices,
)
