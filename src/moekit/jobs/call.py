"""Carry one job out, outside a recipe: a command and a Python call do the same work here."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel

from moekit import __version__
from moekit._files import require_own_folder
from moekit._progress import Progress
from moekit._ranks import is_first_rank
from moekit._validation import faults
from moekit.checkpoint import fingerprint_model
from moekit.checkpoint.atomic import atomic_write, lock, name_target
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.context import JobContext, LiveModel
from moekit.jobs.options.base import JobOptions, kinds_of
from moekit.jobs.shared.hashes import hash_of, reference_hash
from moekit.jobs.shared.outputs import check_output
from moekit.progress import progress_of

# What may stand for a text: a file, a folder, the name of a source or mix, a data set id; or texts, or domain -> texts.
TextLike: TypeAlias = str | Path | Sequence[str] | Mapping[str, Sequence[str]]
# What may stand for a model: a folder, a hub id, the name of a packaged model; or the model itself.
ModelLike: TypeAlias = str | Path | PreTrainedModel

# Functions that are not called as their job is: `moekit.data` and `moekit.report` are modules.
_FUNCTIONS = {"data": "write_data", "report": "write_report"}

Options = TypeVar("Options", bound=JobOptions)
Result = TypeVar("Result", bound="JobResult")


class JobResult(BaseModel):
    """What a job returns: what its command prints, and where it wrote.

    Attributes:
        out: the folder or file that was written; None where nothing was kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    out: Path | None

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with --json."""
        where = {} if self.out is None else {"out": str(self.out)}
        return {**where, **self.model_dump(exclude={"out"}, exclude_unset=True)}


def options_from(cls: type[Options], values: Mapping[str, Any], *, hint: str) -> Options:
    """Options from what a user gave.

    Args:
        cls: the job's options.
        values: field -> value.
        hint: where to read what is allowed.

    Raises:
        BadConfig: unknown or impossible ones; names each with what was given.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise BadConfig(faults(error), hint=hint) from error


def ready(options: Options, out: Path | None, *, overwrite: bool = False) -> tuple[Options, Path, bool]:
    """Refuse what cannot work, before any work.

    Returns:
        What is to be done, where it is written, and whether that may be replaced.

    Raises:
        BadConfig: an option is impossible, or what would be written would harm what is read.
    """
    settled, target, replace = options.settled(out, overwrite)
    settled.check()
    check_output(settled, target)
    return settled, target, replace


def perform(
    options: JobOptions,
    out: Path | None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
    live: LiveModel | None = None,
    kept: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Do a job, and leave nothing beside `out` but what the same call can go on with.

    Args:
        options: what to do.
        out: what to write.
        seed: of everything random.
        overwrite: replace `out`, at the very end, if it is there.
        progress: told how far it is.
        command: what the record of a written checkpoint says made it.
        live: the model itself, where it is in memory already.
        kept: whether `out` stays; False where the figures alone are wanted.

    Returns:
        What was written, and the figures.

    Raises:
        BadConfig: an option is impossible, `out` exists, is read, or is being written by the same call.
    """
    options, target, replace = ready(options, out, overwrite=overwrite)
    if target.exists() and not replace and not (target.is_dir() and not any(target.iterdir())):
        what = "file" if target.is_file() else "folder"
        raise BadConfig(f"the {what} exists", file=target, hint="choose another one, or say --overwrite")
    context = JobContext(
        out=target,
        # Nobody finds the scratch folder of a call again whose own folder is gone: no inputs are hashed for its name.
        scratch=target.parent / f".{target.name}.scratch-{_key(options, seed) if kept else 'once'}",
        seed=seed,
        progress=progress,
        command=command,
        overwrite=replace,
        live=live,
        kept=kept,
    )
    with _alone(context):
        require_own_folder(context.scratch)
        _refuse_further(options, context)
        return target, _run(options, context)


def _key(options: JobOptions, seed: int) -> str:
    """The same call on the same inputs finds the same scratch folder, so that work which can resume does."""
    inputs = [_hash(reference) for _, reference in options.inputs()]
    return hash_of([type(options).__name__, options.identity(), seed, inputs, __version__])[:16]


def _hash(reference: str) -> list[str | None]:
    """Of what a reference names; empty for what is not safe to read, which the job itself tells."""
    try:
        return reference_hash(reference)
    except MoekitError:
        return []


@contextmanager
def kept_or_not(options: JobOptions, out: Path | None) -> Iterator[Path | None]:
    """Where a job writes: `out`, or, for a job whose result alone may be wanted, a folder that is gone afterwards."""
    if out is not None or options.wants_out():
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "out"


@contextmanager
def _alone(context: JobContext) -> Iterator[None]:
    """Two starts of one call would write into one scratch folder; the ranks of one start may."""
    if not is_first_rank():
        yield
        return
    context.out.parent.mkdir(parents=True, exist_ok=True)
    # Not the scratch folder itself: jobs may lock that for their own writers.
    with lock(context.scratch.with_name(f"{context.scratch.name}-start")):
        yield


def _refuse_further(options: JobOptions, context: JobContext) -> None:
    """Files beside `out` may be there only if an interrupted run of the same call wrote them."""
    if context.overwrite or context.scratch.exists():
        return
    for file in options.further_outputs(context.out):
        if file.exists():
            raise BadConfig("the file exists", file=file, hint="choose another one, or say --overwrite")


def _run(options: JobOptions, context: JobContext) -> dict[str, Any]:
    try:
        results = options.run(context)
    except (MoekitError, OSError) as error:
        if not any(context.scratch.glob("checkpoint-*")):
            shutil.rmtree(context.scratch, ignore_errors=True)
            name_target(error, context.scratch, context.out)
        raise
    if is_first_rank():
        shutil.rmtree(context.scratch, ignore_errors=True)
    return results


def call(options: type[JobOptions], result: type[Result], values: dict[str, Any]) -> Result:
    """Carry a Python call out.

    Args:
        options: the job's.
        result: what it returns.
        values: the arguments of the call, by name.

    Raises:
        BadConfig: an option is unknown or impossible, or nothing says where to write.
    """
    given = dict(values)
    out, overwrite, seed = given.pop("out"), given.pop("overwrite"), given.pop("seed")
    progress = progress_of(given.pop("progress"))
    held = None
    if "tokenizer" in given:
        held = _live(given["model"], given.pop("tokenizer"))
        given["model"] = given["model"] if held is None else held.name
    for name, info in options.model_fields.items():
        if given.get(name) is None and info.default_factory is not None:
            given.pop(name, None)
        elif kinds_of(info) == ["text"] and given.get(name) is not None:
            given[name] = _texts(given[name], several=_is_mapping(info.annotation))
    ready_options = options_from(options, given, hint="help() of the function lists every option with its bounds")
    how: dict[str, Any] = {
        "seed": seed,
        "overwrite": overwrite,
        "progress": progress,
        "command": _call_text(ready_options),
        "live": held,
        "kept": out is not None or options.needs_out,
    }
    with _as_before(held), kept_or_not(ready_options, None if out is None else Path(out)) as place:
        target, figures = perform(ready_options, place, **how)
        return result(out=target if how["kept"] else None, **figures)


def _live(model: Any, tokenizer: Any) -> LiveModel | None:
    """The model itself, by a name that tells it from others; None for a reference.

    Raises:
        BadConfig: a model without its tokenizer.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    if tokenizer is None:
        raise BadConfig("a model in memory has no tokenizer with it", hint="give tokenizer=")
    return LiveModel(f"{type(model).__name__}-{fingerprint_model(model)[:12]}", model, tokenizer)


def _is_mapping(annotation: Any) -> bool:
    """Whether a field holds several things by name."""
    return any(typing.get_origin(part) is dict for part in (annotation, *typing.get_args(annotation)))


def _texts(given: Any, *, several: bool) -> Any:
    """What a text option was given, with texts themselves put into files.

    Args:
        given: see `TextLike`; or name -> such.
        several: whether the option itself is by name, so that names are no domains.
    """
    if several and isinstance(given, Mapping):
        return {name: _texts(text, several=False) for name, text in given.items()}
    return given if isinstance(given, str | Path) else _stored(given)


def _stored(texts: Sequence[str] | Mapping[str, Sequence[str]]) -> Path:
    """A file with these texts, in the cache, so that what was decided on them can be proved on them later.

    Raises:
        BadConfig: something else than texts.
    """
    domains = texts if isinstance(texts, Mapping) else {"text": texts}
    rows = [{"text": text, "domain": str(domain)} for domain, some in domains.items() for text in some]
    if not all(isinstance(row["text"], str) for row in rows):
        raise BadConfig("a list of texts holds something that is no text", hint="give strings, or domain -> strings")
    home = Path(os.environ.get("MOEKIT_HOME") or Path.home() / ".cache" / "moekit").expanduser()
    file = home / "texts" / f"{hash_of(rows)[:32]}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def function_name(options: type[JobOptions]) -> str:
    """What a job's function is called in `moekit`."""
    name = options.job.rpartition(".")[2]
    return _FUNCTIONS.get(name, name)


def _call_text(options: JobOptions) -> str:
    """A call as records tell it: what was given beside the defaults."""
    given = options.model_dump(mode="json", exclude_defaults=True)
    return f"moekit.{function_name(type(options))}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


@contextmanager
def _as_before(live: LiveModel | None) -> Iterator[None]:
    """A caller's model is left in the mode it came in."""
    if live is None:
        yield
        return
    training = live.model.training
    try:
        yield
    finally:
        live.model.train(training)
