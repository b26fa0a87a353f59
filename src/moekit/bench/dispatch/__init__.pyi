from .harness import run_bench as run_bench
from .network import two_nodes as two_nodes
from .result import BenchResult as BenchResult
from .setting import DispatchBenchSetting as DispatchBenchSetting
