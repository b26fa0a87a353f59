"""Record what routers choose, and on what: traces on disk, streaming statistics, figures of both."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Collaboration": "metrics",
        "DataEntry": "meta",
        "DomainReport": "domains",
        "Generation": "generation",
        "GROUPS": "vocabulary",
        "LayerStatistics": "statistics",
        "LoadBalance": "metrics",
        "Observation": "observation",
        "Recorder": "live",
        "Rows": "rows",
        "Statistic": "vocabulary",
        "Statistics": "statistics",
        "TokenLabels": "tokens",
        "Trace": "store",
        "TraceMeta": "meta",
        "TraceSummary": "summary",
        "coactivation": "statistics",
        "collaboration": "metrics",
        "domain_divergence": "domains",
        "domain_information": "domains",
        "domain_report": "domains",
        "known_statistics": "vocabulary",
        "load": "statistics",
        "load_balance": "metrics",
        "mean_collaboration": "metrics",
        "record": "recorder",
        "record_generation": "generation",
        "statistic": "vocabulary",
        "summarise": "summary",
        "tokenizer_hash": "meta",
    },
)
