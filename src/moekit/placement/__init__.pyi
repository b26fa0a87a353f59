from .apply import (
    apply_placement as apply_placement,
    place_checkpoint as place_checkpoint,
    routing_groups as routing_groups,
)
from .comparison import (
    Comparison as Comparison,
    compare as compare,
    compare_solvers as compare_solvers,
    place_repeatedly as place_repeatedly,
)
from .cost_model import (
    Cost as Cost,
    Payload as Payload,
    cost as cost,
)
from .exchanges import Exchange as Exchange
from .fitting import (
    LineFit as LineFit,
    LinkFit as LinkFit,
    calibrated as calibrated,
    fit_line as fit_line,
    fit_link as fit_link,
)
from .objective import balanced_sizes as balanced_sizes, intra_share as intra_share
from .paired import (
    PairedRows as PairedRows,
    constraint_gain as constraint_gain,
    paired_rows as paired_rows,
    rows_per_document as rows_per_document,
)
from .plan import Placement as Placement
from .planning import make_solver as make_solver, place as place
from .redundancy import add_copies as add_copies, place_by_load as place_by_load
from .replaying import replay as replay
from .replicas import Replication as Replication, replicate_experts as replicate_experts
from .result import ReplayResult as ReplayResult, expected_devices as expected_devices
from .scaling import (
    StepTime as StepTime,
    Workload as Workload,
    predict_scaling as predict_scaling,
    predict_step as predict_step,
)
from .sending import Prediction as Prediction, predict_sending as predict_sending
from .simulation import (
    Simulation as Simulation,
    place_trace as place_trace,
    simulate as simulate,
)
from .solver import Solution as Solution, Solver as Solver
from .tokensets import token_sets as token_sets
from .topology import (
    Topology as Topology,
    parse_bandwidth as parse_bandwidth,
    parse_latency as parse_latency,
)
