"""Routing policies: how a token chooses experts. One file per method; the slot they live in is `moekit.runtime`'s."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Gate": "moekit.anatomy.gate",
        "GateSpec": "moekit.anatomy.gate",
        "identify_gate": "moekit.anatomy.identify",
        "PlanInputs": "moekit.runtime.part",
        "RouterPart": "moekit.runtime.router",
        "ScorePart": "moekit.runtime.router",
        "ChoosePart": "moekit.runtime.router",
        "LimitPart": "moekit.runtime.router",
        "RouteInputs": "moekit.runtime.router",
        "Routed": "moekit.runtime.router",
        "Scored": "moekit.runtime.router",
        "RoutingPlan": "plan",
        "plan_routing": "plan",
        "make_policy": "plan",
        "C2R": "methods.c2r",
        "TopK": "methods.topk",
        "partner_lists": "methods.c2r",
    },
)
