from .gate import Gate as Gate, GateSpec as GateSpec
from .identify import identify_gate as identify_gate
from .layout import (
    DiskLayout as DiskLayout,
    ExpertTensor as ExpertTensor,
    find_expert_tensors as find_expert_tensors,
)
from .permute import permute_checkpoint as permute_checkpoint, permute_experts as permute_experts
from .probe import (
    Geometry as Geometry,
    MoELayer as MoELayer,
    find_moe_layers as find_moe_layers,
)
