from .runner import (
    RunResult as RunResult,
    forecast as forecast,
    run as run,
)
from .schema import Recipe as Recipe, load_recipe as load_recipe
