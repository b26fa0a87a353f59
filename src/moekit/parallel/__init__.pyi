from .checkpoints.sharded import load_sharded as load_sharded, save_sharded as save_sharded
from .dispatcher import Dispatcher as Dispatcher
from .launch.beats import Departure as Departure
from .launch.health import RankGone as RankGone
from .launch.start import (
    StartedRanks as StartedRanks,
    agree as agree,
    start_ranks as start_ranks,
)
from .layout import ExpertLayout as ExpertLayout
from .ranks import Ranks as Ranks, expert_mesh as expert_mesh
from .sharding import (
    ExpertShard as ExpertShard,
    expert_parallel as expert_parallel,
    expert_parameters as expert_parameters,
    gather_experts as gather_experts,
    make_dispatcher as make_dispatcher,
    shards as shards,
)
from .traffic import Traffic as Traffic
