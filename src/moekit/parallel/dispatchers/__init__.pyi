from .all_gather import AllGather as AllGather
from .all_reduce import AllReduce as AllReduce
from .hierarchical import Hierarchical as Hierarchical
from .once_per_expert import OncePerExpert as OncePerExpert
from .once_per_rank import OncePerRank as OncePerRank
