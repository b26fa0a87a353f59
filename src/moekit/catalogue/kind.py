"""Kinds of methods: one row each makes the command, the recipe's step and the pages of the documentation.

A kind is a folder of methods with a base class, and a job that runs any of them. Packages outside moekit add kinds
through the entry-point group ``moekit.kinds``: each entry point names a `Kind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from moekit._names import hint_for
from moekit.catalogue.taxonomy import Axis
from moekit.errors import BadConfig

KIND_ENTRY_POINTS = "moekit.kinds"


@dataclass(frozen=True)
class Kind:
    """What the catalogue knows of one kind of methods.

    Attributes:
        name: as `@register(kind=...)` says it.
        package: folder whose modules hold the methods; each is imported once, when the catalogue is first read.
        base: "module:Class" that every method of the kind is a subclass of.
        title: heading of its methods in the documentation.
        axis: place of its methods in the survey's taxonomy, unless one says otherwise.
        line: what its command does, one sentence for `moekit --help`; "" where it has no command.
        job: name of its command and of its recipe step; "" where other jobs use its methods.
        within: other commands that take its methods by name; their --help lists them.
        options: "module:Class" of the job's options (see `moekit.jobs.options.base.JobOptions`); "" without a job.
        laws: test files that hold every method of the kind to what it promises, from the root of its repository.
    """

    name: str
    package: str
    base: str
    title: str
    axis: Axis
    line: str = ""
    job: str = ""
    within: tuple[str, ...] = ()
    options: str = ""
    laws: tuple[str, ...] = ()


OWN = (
    Kind(
        name="convert",
        package="moekit.conversion.methods",
        base="moekit.conversion.base:Conversion",
        title="Dense to MoE",
        axis="training scheme",
        line="Turn a dense model into a MoE.",
        job="convert",
        options="moekit.jobs.options.convert:ConvertOptions",
        laws=("tests/laws/test_conversions.py",),
    ),
    Kind(
        name="prune",
        package="moekit.compress.prune",
        base="moekit.compress.engine.dropping:PruneMethod",
        title="Dropping experts",
        axis="compression",
        line="Drop the experts a model needs least, with the proof of what that costs.",
        job="prune",
        options="moekit.jobs.options.prune:PruneOptions",
        laws=("tests/laws/test_weight_methods.py", "tests/matrix/test_pruning.py"),
    ),
    Kind(
        name="merge",
        package="moekit.compress.merge",
        base="moekit.compress.engine.merging:MergeMethod",
        title="Merging experts",
        axis="compression",
        line="Fold the experts of each layer into fewer, with the proof of what that costs beside pruning.",
        job="merge",
        options="moekit.jobs.options.merge:MergeOptions",
        laws=("tests/laws/test_weight_methods.py", "tests/matrix/test_pruning.py"),
    ),
    Kind(
        name="slim",
        package="moekit.compress.slim",
        base="moekit.compress.engine.narrowing:SlimMethod",
        title="Narrowing experts",
        axis="compression",
        line="Make every expert narrower, with the proof of what that costs.",
        job="slim",
        options="moekit.jobs.options.slim:SlimOptions",
        laws=("tests/laws/test_weight_methods.py", "tests/matrix/test_slim.py"),
    ),
    Kind(
        name="sparsify",
        package="moekit.compress.sparsify",
        base="moekit.compress.engine.zeroing:SparsifyMethod",
        title="Zeroing single weights",
        axis="compression",
        line="Zero the weights of experts that matter least, with the proof of what that costs.",
        job="sparsify",
        options="moekit.jobs.options.sparsify:SparsifyOptions",
        laws=("tests/laws/test_weight_methods.py", "tests/matrix/test_sparsify.py"),
    ),
    Kind(
        name="quantize",
        package="moekit.compress.quantize",
        base="moekit.compress.engine.quantizing:QuantizeMethod",
        title="Rounding to few bits",
        axis="compression",
        line="Round the weights of experts to few bits, with the proof of what that costs.",
        job="quantize",
        options="moekit.jobs.options.quantize:QuantizeOptions",
        laws=("tests/laws/test_weight_methods.py", "tests/matrix/test_quantize.py"),
    ),
    Kind(
        name="sharer",
        package="moekit.compress.sharers",
        base="moekit.compress.engine.sharing:BitSharer",
        title="Sharing bits among experts",
        axis="compression",
        within=("quantize",),
        laws=("tests/laws/test_sharers.py",),
    ),
    Kind(
        name="routing",
        package="moekit.routing.methods",
        base="moekit.runtime.router:RouterPart",
        title="Routing policies",
        axis="gating",
        line="Plan a routing policy from a trace and write the constrained model.",
        job="route",
        options="moekit.jobs.options.route:RouteOptions",
        laws=(
            "tests/laws/test_attached.py",
            "tests/laws/test_causal.py",
            "tests/laws/test_checkpointing.py",
            "tests/laws/test_learned.py",
            "tests/laws/test_reordered.py",
            "tests/laws/test_routing.py",
            "tests/matrix/test_routing.py",
        ),
    ),
    Kind(
        name="experts",
        package="moekit.experts.methods",
        base="moekit.runtime.experts:ExpertsPart",
        title="What answers in the place of experts",
        axis="computation",
        within=("train",),
        laws=("tests/laws/test_experts_reference.py",),
    ),
    Kind(
        name="place",
        package="moekit.placement.solvers",
        base="moekit.placement.solver:Solver",
        title="Placement solvers",
        axis="computation",
        line="Decide which device holds which expert, and replay the trace to count the rows sent.",
        job="place",
        options="moekit.jobs.options.place:PlaceOptions",
        laws=("tests/laws/test_solvers.py",),
    ),
    Kind(
        name="dispatch",
        package="moekit.parallel.dispatchers",
        base="moekit.parallel.dispatcher:Dispatcher",
        title="Dispatchers between ranks",
        axis="communication",
        within=("train", "evaluate"),
        laws=("tests/parallel/test_dispatch.py", "tests/parallel/test_models.py"),
    ),
    Kind(
        name="objective",
        package="moekit.training.objectives",
        base="moekit.training.objectives.base:Objective",
        title="What training minimises",
        axis="training scheme",
        within=("train",),
        laws=("tests/laws/test_objectives.py",),
    ),
    Kind(
        name="balancer",
        package="moekit.training.balancers",
        base="moekit.training.balancers.base:Balancer",
        title="Balancing without a loss",
        axis="gating",
        within=("train",),
        laws=("tests/laws/test_balancers.py",),
    ),
    Kind(
        name="schedule",
        package="moekit.training.schedules",
        base="moekit.training.schedules.base:Schedule",
        title="Settings that move during training",
        axis="training scheme",
        within=("train",),
        laws=("tests/laws/test_schedules.py",),
    ),
)


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds, our own first, then those of installed packages.

    Raises:
        BadConfig: an entry point does not import or is no `Kind`, or two kinds share a name.
    """
    found = list(OWN)
    for point in entry_points(group=KIND_ENTRY_POINTS):
        where = f"the kind {point.name!r} of the package {point.dist.name if point.dist else '?'}"
        hint = f"fix or uninstall it: it is registered as {point.value!r} in the group {KIND_ENTRY_POINTS!r}"
        try:
            kind = point.load()
        except Exception as error:
            raise BadConfig(f"{where} does not import: {type(error).__name__}: {error}", hint=hint) from error
        if not isinstance(kind, Kind):
            raise BadConfig(f"{where} is no moekit.catalogue.Kind but {type(kind).__name__}", hint=hint)
        if any(kind.name == other.name or (kind.job and kind.job == other.job) for other in found):
            raise BadConfig(f"{where} takes the name of another kind or command", hint=hint)
        found.append(kind)
    return tuple(found)


def kind_of(name: str) -> Kind:
    """Look one kind up.

    Raises:
        BadConfig: no such kind; names near matches.
    """
    known = {kind.name: kind for kind in kinds()}
    if name not in known:
        raise BadConfig(f"no kind of methods is called {name!r}", hint=hint_for(name, known))
    return known[name]
