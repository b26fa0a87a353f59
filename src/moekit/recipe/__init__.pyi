from .runner import (
    RunResult as RunResult,
    estimate as estimate,
    run as run,
)
from .schema import Recipe as Recipe, load_recipe as load_recipe
