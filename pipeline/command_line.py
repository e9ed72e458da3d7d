"""Flags and YAML -> a checked configuration -> one call -> an exit code.

Every job goes through ``run_job``: the flags are the fields of its pydantic model, all values out
of range are told at once, and a fault is one line on stderr with its own exit code (errors.py).
``--config FILE.yaml`` gives values from a file, ``--preset NAME`` those of a published row, where
the job has presets; flags after them win.
"""

import difflib
import inspect
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import tyro
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from pipeline.errors import ConfigError, PatchseedError, one_line, without_secrets

Job = TypeVar("Job", bound=BaseModel)

Presets = Mapping[str, dict[str, Any]]
"""Nested values of a job's knobs, by the name that ``--preset`` takes."""

_CONFIG_HELP = "--config FILE.yaml gives any of these from a file; flags after it win."
_PRESET_HELP = "--preset NAME gives those of a published row; --list-presets names them."


class Interrupted(BaseException):
    """SIGTERM, as `ray job stop` and schedulers send it; ends the job like Ctrl-C does."""


def run_job(
    job: type[Job],
    call: Callable[[Job], int | None],
    description: str | None,
    presets: Presets | None = None,
) -> NoReturn:
    """Parse the command line into ``job``, run ``call`` on it, and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    debug = "--debug" in sys.argv
    try:
        code = call(parse(job, sys.argv[1:], description, presets)) or 0
        sys.stdout.flush()
    except PatchseedError as fault:
        code = fault.exit_code
        _tell(f"{type(fault).__name__}: {without_secrets(str(fault))}", debug)
    except (KeyboardInterrupt, Interrupted, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != signal.SIGTERM:
            raise
        # While Ray starts, a handler of its own turns SIGTERM into SystemExit(15).
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
        again = getattr(job, "goes_on_with", "")
        kept = f": what is finished is kept, {again} goes on with it" if again else ""
        _tell(f"Interrupted{kept}", debug)
    except Exception as fault:
        if isinstance(fault, BrokenPipeError) and _nobody_reads():
            code = 128 + signal.SIGPIPE
        else:
            # The last door: whatever is unforeseen still ends as one line and code 1.
            code = 1
            line = f"{type(fault).__name__}: {without_secrets(str(fault))}"
            _tell(f"Unexpected {line} (--debug shows the traceback; please report it)", debug)
    # Whoever stops a job twice means it: what is left is to end, and that in silence.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether stdout was closed at its other end, as `| head` does; what is left goes nowhere."""
    stdout = sys.stdout.fileno()
    asked = select.poll()
    asked.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def _tell(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    sys.stderr.write(line + "\n")


def parse(
    job: type[Job],
    args: Sequence[str],
    description: str | None = None,
    presets: Presets | None = None,
) -> Job:
    """The configuration that ``args`` spell.

    Raises:
        ConfigError: values out of range (all of them in one message), or a bad YAML file.
        SystemExit: after --list-presets (0); tyro's own, after --help (0) or an unknown flag (2,
            with a suggestion).
    """
    if presets and "--list-presets" in args:
        sys.stdout.write("\n".join(presets) + "\n")
        sys.exit(0)
    rules = ConstructorRegistry()
    rules.struct_rule(_fields_as_dict)
    with rules:
        told = f"{description or ''}\n\n{_CONFIG_HELP}"
        told = f"{told}\n{_PRESET_HELP}" if presets else told
        values: Any = tyro.cli(job, args=_spelled_out(args, presets or {}), description=told)
    try:
        return job.model_validate(values)
    except ValidationError as fault:
        raise ConfigError(_all_faults(fault)) from fault


def _fields_as_dict(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Let tyro collect a model's fields unbuilt: pydantic then sees them all at once."""
    if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None
    fields = tuple(
        StructFieldSpec(
            name=name,
            type=cast(type[Any], field.annotation),
            default=tyro.MISSING if field.is_required() else field.get_default(),
            helptext=field.description,
        )
        for name, field in _own_fields_first(info.type)
    )
    return StructConstructorSpec(instantiate=dict, fields=fields)


def _own_fields_first(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """A job's own flags before those that several share, as --help should list them."""
    owners = [inspect.get_annotations(one) for one in model.__mro__]

    def distance(item: tuple[str, FieldInfo]) -> int:
        return next(i for i, names in enumerate(owners) if item[0] in names)

    return sorted(model.model_fields.items(), key=distance)


def _spelled_out(args: Sequence[str], presets: Presets) -> list[str]:
    """``args`` with ``--config FILE`` and ``--preset NAME`` replaced by what they stand for."""
    flags: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, _, value = arg.partition("=")
        if name == "--config" or (name == "--preset" and presets):
            value = value or (rest.pop(0) if rest else "")
            values = _read_yaml(value) if name == "--config" else _preset(value, presets)
            flags += _flags_of(values)
        else:
            flags.append(arg)
    return flags


def _preset(name: str, presets: Presets) -> dict[str, Any]:
    if name in presets:
        return presets[name]
    close = difflib.get_close_matches(name, presets, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(f"--preset {name or 'NAME'} is unknown; {hint}--list-presets names them all")


def _read_yaml(path: str) -> dict[str, Any]:
    if not path:
        raise ConfigError("--config needs a file: --config job.yaml")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as fault:
        raise ConfigError(f"--config {path} cannot be read: {one_line(fault)}") from fault
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} must hold names and values, got {type(content).__name__}"
        )
    return content


def _flags_of(values: dict[str, Any], prefix: str = "--") -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        flag = prefix + str(name).replace("_", "-")
        if isinstance(value, dict):
            flags += _flags_of(value, flag + ".")
        elif isinstance(value, bool):
            head, _, last = flag.rpartition(".") if "." in flag else ("--", "", flag[2:])
            flags.append(flag if value else f"{head}{'.' if '.' in flag else ''}no-{last}")
        else:
            flags += [
                flag,
                *(str(item) for item in (value if isinstance(value, list) else [value])),
            ]
    return flags


def _all_faults(fault: ValidationError) -> str:
    """Every value out of range, one a line: the flag, the rule, what was given."""
    lines = []
    for error in fault.errors():
        # Without the place in a tuple: flags take all of its values at once.
        names = [part for part in error["loc"] if isinstance(part, str)]
        flag = "--" + ".".join(names).replace("_", "-")
        message = error["msg"].removeprefix("Value error, ")
        rule = message[0].lower() + message[1:]
        if not error["loc"] or isinstance(error["input"], dict):
            # A rule between several settings: it names them, and what was given, itself.
            lines.append(message)
        else:
            lines.append(f"{flag}: {rule}, got {error['input']!r}")
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} settings are wrong:\n" + "\n".join(f"  {line}" for line in lines)
