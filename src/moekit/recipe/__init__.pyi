from .forecast import durations as durations, estimate as estimate, left as left
from .runner import RunResult as RunResult, run as run
from .schema import Recipe as Recipe, load_recipe as load_recipe
