"""Dense to MoE: copy the feed-forward network, cut it into experts, or add experts beside it."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "ActivationSplit": "methods.activation",
        "Conversion": "base",
        "CopyUpcycling": "methods.copy",
        "DenseFFN": "maths",
        "MoEWeights": "maths",
        "RandomSplit": "methods.random",
        "Residual": "methods.residual",
        "SplitConversion": "split",
        "WeightSplit": "methods.weights",
        "balanced_kmeans": "kmeans",
        "fit_router": "router_fit",
    },
)
