"""Measure models and compare them: perplexity, multiple choice through lm-eval, side by side with error bars."""

from moekit._lazy import attach

# No module may be called like a function exported here: importing it would put the module in the function's place.
__getattr__, __dir__ = attach(
    __name__,
    {
        "Comparison": "comparison",
        "Completion": "generation",
        "Completions": "generation",
        "DomainComparison": "comparison",
        "DomainPerplexity": "documents",
        "Evaluation": "comparison",
        "McNemar": "pairs",
        "Metric": "questions",
        "PairedDifference": "pairs",
        "PerplexityResult": "documents",
        "SideBySide": "generation",
        "TaskComparison": "comparison",
        "TaskResult": "questions",
        "agreement": "generation",
        "choices": "questions",
        "compare": "comparison",
        "complete": "generation",
        "mcnemar": "pairs",
        "paired": "pairs",
        "perplexity": "documents",
        "perplexity_of_documents": "documents",
        "side_by_side": "generation",
    },
)
