"""A command line for every method, from the command that runs methods of its kind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moekit.cli._options import fields_of

if TYPE_CHECKING:
    from moekit.catalogue import MethodRecord
    from moekit.jobs.options.base import CommandLine

# Kinds without a command of their own: what they are an option of.
_TRAIN = "moekit train ./moe --data ./text --steps 50 -o ./tuned"
_OPTION_OF = {
    "objective": _TRAIN + " --objectives '{{{name}: {settings}}}'",
    "experts": _TRAIN + " --experts {settings}",
    "balancer": _TRAIN + " --balancer {settings}",
    "schedule": _TRAIN + " --schedules '{{lr: {settings}}}'",
    "sharer": "moekit quantize ./moe --method gptq --mean-bits 2.5 --share {name} --data ./text -o ./mixed",
    "dispatch": "torchrun --nproc-per-node 4 -m " + _TRAIN + " --ep 4 --dispatch {name}",
}

# Values of knobs that must be given, here for the learning rate; and methods that need another line than their kind.
_VALUES = {"start": "2e-4", "end": "2e-5", "at": "2e-4", "values": "[2e-4, 2e-5]"}
_OWN = {
    ("sharer", "uniform"): "moekit quantize ./moe --method gptq --mean-bits 3 --share uniform --data ./text -o ./even",
    ("dispatch", "all-reduce"): "torchrun --nproc-per-node 4 -m moekit generate ./moe --ep 4 --dispatch all-reduce",
    ("experts", "novices"): "moekit prune ./moe --method mone --keep 0.5 --data ./text -o ./with-novices",
    ("experts", "packed"): "moekit export ./four-bits --to packed -o ./small",
    ("quantize", "nested"): "moekit quantize ./moe --method nested --bits 3 --heldout ./text -o ./nested",
    ("objective", "ce"): _TRAIN + " --texts '{retain: ./other}' --objectives '{keep: {use: ce, text: retain}}'",
    ("objective", "device-balance"): _TRAIN + " --device-balance '{groups: 4, weight: 0.01}'",
    ("objective", "kd"): _TRAIN + " --kd 1 --teacher ./teacher",
    ("schedule", "phases"): _TRAIN
    + " --schedules '{lr: {use: phases, phases: [{until: 1, schedule: {use: constant, at: 2e-4}}]}}'",
}


def example_of(record: MethodRecord) -> str:
    """A command line that uses a method; "" for a kind that nothing is known of."""
    from moekit import catalogue
    from moekit.jobs.table import jobs

    if (record.kind, record.name) in _OWN:
        return _OWN[record.kind, record.name]
    if record.kind in _OPTION_OF:
        return _OPTION_OF[record.kind].format(name=record.name, settings=_settings(record))
    job = next((kind.job for kind in catalogue.kinds() if kind.name == record.kind), "")
    if not job:
        return ""
    told = jobs()[job].load().command
    return told.example(record) if told.example is not None else _by_option(record, told)


def _by_option(record: MethodRecord, told: CommandLine) -> str:
    """The command's first example with this method in it."""
    line = next((line for line in told.examples if "--method " in line and "--set " not in line), "")
    knobs = "".join(f" --set {name}=..." for name in _required(record))
    return re.sub(r"--method \S+", f"--method {record.name}{knobs}", line)


def _settings(record: MethodRecord) -> str:
    """What an option of training is given: a weight, a name, or settings where some must be given."""
    told = ", ".join(f"{name}: {_VALUES.get(name, '...')}" for name in _required(record))
    if record.kind == "objective":
        return f"{{weight: 0.01, {told}}}" if told else "0.01"
    if record.kind == "schedule":
        return f"{{use: {record.name}, {told}}}" if told else f"{{use: {record.name}}}"
    return f"'{{use: {record.name}, {told}}}'" if told else record.name


def _required(record: MethodRecord) -> list[str]:
    return [name for name, field in fields_of(record.cls).items() if field.is_required()]
