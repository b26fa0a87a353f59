from .methods.c2r import C2R as C2R, partner_lists as partner_lists
from .methods.topk import TopK as TopK
from .plan import (
    RoutingPlan as RoutingPlan,
    make_policy as make_policy,
    plan_routing as plan_routing,
)
