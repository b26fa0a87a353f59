"""Parts that live in a model: what a router, its experts or its block do beside the stock code, and learn."""

from moekit._lazy import attach as _lazy

__getattr__, __dir__ = _lazy(
    __name__,
    {
        "RuntimePart": "part",
        "PlanInputs": "part",
        "LayerInit": "part",
        "RouterPart": "router",
        "ScorePart": "router",
        "ChoosePart": "router",
        "LimitPart": "router",
        "RouteInputs": "router",
        "Routed": "router",
        "Scored": "router",
        "BlockPart": "block",
        "BlockInputs": "block",
        "ExpertsPart": "experts",
        "ExpertsInputs": "experts",
        "ForwardContext": "context",
        "attach": "attachment",
        "attached": "attachment",
        "Attachment": "attachment",
        "detach": "attachment",
        "parts_on": "slots",
        "learns": "slots",
        "without_parts": "attachment",
        "permute_parts": "permute",
        "entries": "saved",
        "restore": "saved",
    },
)
