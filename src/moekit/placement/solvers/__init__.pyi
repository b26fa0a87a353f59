from .contiguous import Contiguous as Contiguous
from .exact import Exact as Exact
from .greedy import Greedy as Greedy
from .random import Random as Random
from .swap import Swap as Swap
