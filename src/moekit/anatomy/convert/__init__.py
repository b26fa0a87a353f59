"""Dense to MoE: copy the feed-forward network, cut it into experts, or add experts beside it."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "ActivationSplit": "activation",
        "Conversion": "base",
        "CopyUpcycling": "copy",
        "DenseFFN": "maths",
        "MoEWeights": "maths",
        "RandomSplit": "random",
        "Residual": "residual",
        "SplitConversion": "split",
        "WeightSplit": "weights",
        "balanced_kmeans": "kmeans",
        "fit_router": "router_fit",
    },
)
