from .atomic import atomic_folder as atomic_folder, atomic_write as atomic_write
from .estimate import Estimate as Estimate
from .fingerprint import fingerprint_model as fingerprint_model
from .folder import Checkpoint as Checkpoint
from .model import load as load, save as save
from .parts import PartEntry as PartEntry
from .provenance import Provenance as Provenance
from .record import Expectations as Expectations, Record as Record
from .safety import TensorInfo as TensorInfo, read_header as read_header
from .shards import ShardWriter as ShardWriter
