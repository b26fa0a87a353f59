"""Routing policies: how a token chooses experts. One file per method."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Gate": "moekit.anatomy.gate",
        "GateSpec": "moekit.anatomy.gate",
        "identify_gate": "moekit.anatomy.identify",
        "PlanInputs": "policy",
        "RoutingPolicy": "policy",
        "RoutingPlan": "plan",
        "plan_routing": "plan",
        "active_policy": "attach",
        "attach_policy": "attach",
        "make_policy": "plan",
        "detach_policy": "attach",
        "C2R": "methods.c2r",
        "TopK": "methods.topk",
        "partner_lists": "methods.c2r",
    },
)
