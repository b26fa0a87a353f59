from .loader import LayerLoader as LayerLoader
from .states import States as States
from .walk import Walk as Walk
