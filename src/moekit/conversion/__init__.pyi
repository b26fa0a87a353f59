from .base import Conversion as Conversion
from .kmeans import balanced_kmeans as balanced_kmeans
from .maths import DenseFFN as DenseFFN, MoEWeights as MoEWeights
from .methods.activation import ActivationSplit as ActivationSplit
from .methods.copy import CopyUpcycling as CopyUpcycling
from .methods.random import RandomSplit as RandomSplit
from .methods.residual import Residual as Residual
from .methods.weights import WeightSplit as WeightSplit
from .router_fit import fit_router as fit_router
from .split import SplitConversion as SplitConversion
