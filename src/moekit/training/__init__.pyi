from .callback import MoECallback as MoECallback
from .collector import collect as collect
from .config import TrainConfig as TrainConfig, TrainResult as TrainResult
from .figures import RoutingFigures as RoutingFigures
from .freeze import (
    FreezeReport as FreezeReport,
    parts_of as parts_of,
    train_only as train_only,
)
from .lora import (
    LoraSettings as LoraSettings,
    add_lora as add_lora,
    merge_lora as merge_lora,
)
from .pretrain_tiny import (
    TinyConfig as TinyConfig,
    TinyResult as TinyResult,
    build_tiny_model as build_tiny_model,
    train_tiny as train_tiny,
)
from .resume import (
    CompleteCheckpoints as CompleteCheckpoints,
    ExactResume as ExactResume,
    last_complete_checkpoint as last_complete_checkpoint,
)
from .run import train as train
from .teacher import LiveTeacher as LiveTeacher
from .teacher_store import StoredTeacher as StoredTeacher, store_teacher as store_teacher
