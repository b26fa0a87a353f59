from .attachment import (
    Attachment as Attachment,
    attach as attach,
    attached as attached,
    detach as detach,
    without_parts as without_parts,
)
from .block import BlockInputs as BlockInputs, BlockPart as BlockPart
from .context import ForwardContext as ForwardContext
from .experts import ExpertsInputs as ExpertsInputs, ExpertsPart as ExpertsPart
from .part import (
    LayerInit as LayerInit,
    PlanInputs as PlanInputs,
    RuntimePart as RuntimePart,
)
from .permute import permute_parts as permute_parts
from .router import (
    ChoosePart as ChoosePart,
    LimitPart as LimitPart,
    Routed as Routed,
    RouteInputs as RouteInputs,
    RouterPart as RouterPart,
    Scored as Scored,
    ScorePart as ScorePart,
)
from .saved import entries as entries, restore as restore
from .slots import learns as learns, parts_on as parts_on
