"""Find routers, experts and shared experts; permute them; turn a dense model into a MoE."""

from moekit._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Geometry": "probe",
        "MoELayer": "probe",
        "find_moe_layers": "probe",
        "DiskLayout": "layout",
        "ExpertTensor": "layout",
        "find_expert_tensors": "layout",
        "permute_checkpoint": "permute",
        "permute_experts": "permute",
    },
)
