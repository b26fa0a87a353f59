from .batch import ExpertBatch as ExpertBatch, TokenBatch as TokenBatch
from .domains import (
    DomainReport as DomainReport,
    domain_divergence as domain_divergence,
    domain_information as domain_information,
    domain_report as domain_report,
)
from .generation import Generation as Generation, record_generation as record_generation
from .live import Recorder as Recorder
from .meta import (
    DataEntry as DataEntry,
    TraceMeta as TraceMeta,
    tokenizer_hash as tokenizer_hash,
)
from .metrics import (
    Collaboration as Collaboration,
    LoadBalance as LoadBalance,
    collaboration as collaboration,
    load_balance as load_balance,
    mean_collaboration as mean_collaboration,
)
from .recorder import record as record
from .recording import Recording as Recording
from .rows import Rows as Rows
from .statistics import (
    LayerStatistics as LayerStatistics,
    Statistics as Statistics,
    coactivation as coactivation,
    load as load,
)
from .store import Trace as Trace
from .summary import (
    TraceSummary as TraceSummary,
    check_summary as check_summary,
    single_figures as single_figures,
    summarise as summarise,
)
from .tokens import TokenLabels as TokenLabels
from .vocabulary import (
    GROUPS as GROUPS,
    Statistic as Statistic,
    expert_statistic as expert_statistic,
    known_statistics as known_statistics,
    statistic as statistic,
)
