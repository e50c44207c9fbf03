"""Commands made from configurations: a field becomes an option, in ``--help``, in YAML files and in errors."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperOption

from bvpo_stats.errors import UserError, wording
from bvpo_stats.options import Group, Option, field_types, members

_FIELD = re.compile(
    r"(?P<column>\b(?:[Ff]ield|[Cc]olumn)s? `\w+`(?:(?:, (?:and |or )?| and | or )`\w+`)*)"  # of a record, no setting
    r"|`(?P<foreign>[a-z]\w*)(?:=(?P<given>[^`]*))?` of `(?P<command>[a-z-]+)`"
    r"|`(?P<name>[a-z]\w*)(?:=(?P<value>[^`]*))?`"
)


@dataclass(frozen=True)
class _Parameter:
    """One option of a command, and the field that it fills."""

    path: tuple[str, ...]
    kind: Any
    option: Option
    default: Any
    required_by_group: bool = False

    @property
    def flag(self) -> str:
        return "--" + (self.option.name or self.path[-1]).replace("_", "-")

    @property
    def declared(self) -> str:
        """The flag; with its opposite where neither is the default, e.g. ``--bf16/--no-bf16`` for the preset's."""
        open_switch = set(members(self.kind)) == {bool, NoneType}
        return f"{self.flag}/--no-{self.flag.lstrip('-')}" if open_switch else self.flag

    @property
    def name(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")

    def parameter(self, names: Mapping[str, str]) -> inspect.Parameter:
        """As typer reads it from a function's signature."""
        option, default = self.option, self.default
        if option.read is not None:
            kind, default = (str | None if option.spelled is None else str), option.spelled
        else:
            kind = _typed(self.kind)
        if option.shown is not None or default is None or default == ():
            kind, default = (kind if NoneType in members(kind) else kind | None), None
        info = typer.Option(
            self.declared,
            help=in_options(option.help, names),
            metavar=option.metavar,
            show_default=True if option.shown is None else in_options(option.shown, names) or False,
        )
        default = inspect.Parameter.empty if default is MISSING else default
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )

    def value(self, given: Any) -> Any:
        """The field's value for what the command line gave."""
        if given is None:
            return MISSING
        if self.option.read is not None:
            return self.option.read(given)
        return tuple(given) if isinstance(given, list) else given


def _typed(kind: Any) -> Any:
    """The type of an option: of one choice the word, of a tuple a list (the option is repeatable)."""
    for each in members(kind):
        if get_origin(each) is Literal:
            kind = str if kind is each else str | None
        elif get_origin(each) is tuple:
            kind = list[get_args(each)[0]] | None  # type: ignore[misc]
    return kind


def _parameters(
    config: type, path: tuple[str, ...] = (), group: Group | None = None, optional: bool = False
) -> Iterator[_Parameter]:
    entries = {entry.name: entry for entry in fields(config)}
    for name, (kind, note) in field_types(config).items():
        inner = _inner(kind)
        if inner is not None:
            yield from _parameters(
                inner, (*path, name), note if isinstance(note, Group) else None, NoneType in members(kind)
            )
        elif isinstance(note, Option):
            option = note if group is None else group.options.get(name, note)
            if option is None:
                continue
            default = entries[name].default
            needed = optional and default is MISSING
            yield _Parameter((*path, name), kind, option, None if needed else default, needed)


def _inner(kind: Any) -> type | None:
    """The dataclass with options of its own that a field holds, if it holds one."""
    for each in members(kind):
        if isinstance(each, type) and is_dataclass(each) and any(note for _, note in field_types(each).values()):
            return each
    return None


def _filled(config: type, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> Any:
    """An instance of a configuration; an optional group that needs a value and has none is None."""
    found: dict[str, Any] = {}
    entries = {entry.name: entry for entry in fields(config)}
    for name, (kind, _) in field_types(config).items():
        inner = _inner(kind)
        if inner is not None:
            found[name] = _filled(inner, values, (*path, name))
        else:
            found[name] = values.get((*path, name), MISSING)
    found = {name: value for name, value in found.items() if value is not MISSING}
    for name, entry in entries.items():
        if name not in found and entry.default is MISSING and entry.default_factory is MISSING and path:
            return None
    return config(**found)


def _check_groups(parameters: list[_Parameter], given: frozenset[str]) -> None:
    """Refuses options of an optional group, such as a server's, that lacks what it cannot be without."""
    for needed in (each for each in parameters if each.required_by_group and each.name not in given):
        for other in parameters:
            if other.path[:-1] == needed.path[:-1] and other.name in given:
                raise UserError(f"`{other.path[-1]}` says nothing without `{needed.path[-1]}`; give that, too.")


def add_command(
    app: typer.Typer,
    name: str,
    run: Callable[..., None],
    *,
    output: str,
    examples: str,
    find: Callable[[dict[str, Any], Path], dict[str, Any]] | None = None,
) -> None:
    """Makes a command of a function ``(config, output)`` or ``(config, output, given)``.

    The options are those of the configuration's fields, ``--output`` and ``--config``; help, defaults and limits stand
    there. ``given`` holds the names of the options that the user gave.

    Args:
        app: Takes the command.
        name: Name of the command.
        run: What it does; its docstring is the command's description.
        output: Default of ``--output``.
        examples: What ``--help`` ends with.
        find: Gives values for options that the user left out, from what the user gave by option and ``--output``.
    """
    config: type = get_type_hints(run)["config"]
    parameters = list(_parameters(config))
    names = {parameter.path[-1]: parameter.flag for parameter in reversed(parameters)} | {"output": "--output"}
    wants_given = "given" in inspect.signature(run).parameters

    def call(context: typer.Context, **words: Any) -> None:
        values = {parameter.path: parameter.value(words[parameter.name]) for parameter in parameters}
        sources = {each: context.get_parameter_source(each) for each in words}
        given = frozenset(each for each, source in sources.items() if source and source.name != "DEFAULT")
        _check_groups(parameters, given)
        if find is not None:
            found = find({each: words[each] for each in given}, words["output"])
            values |= {parameter.path: found[parameter.name] for parameter in parameters if parameter.name in found}
        arguments = [_filled(config, values), words["output"]]
        run(*arguments, given) if wants_given else run(*arguments)

    own = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    signature = [own, *(parameter.parameter(names) for parameter in parameters), *_common(output)]
    call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in signature}
    call.__doc__, call.__name__ = run.__doc__, run.__name__
    blank = frozenset(parameter.flag for parameter in parameters if parameter.option.blank)
    app.command(name, cls=type("_Command", (Command,), {"names": names, "blank": blank}), epilog=examples)(call)


def _common(output: str) -> Iterator[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    help_ = "Folder for the results; the same folder again resumes the run."
    yield inspect.Parameter(
        "output", kind, default=Path(output), annotation=Annotated[Path, typer.Option("--output", help=help_)]
    )
    yield inspect.Parameter(
        "config",
        kind,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                "--config",
                help="YAML file with any of these options; the command line wins.",
                callback=read_config,
                is_eager=True,
            ),
        ],
    )


class Command(TyperCommand):
    """A command whose errors name its options, where those of the package name fields."""

    names: Mapping[str, str] = {}
    """Fields whose options have names of their own."""

    blank: frozenset[str] = frozenset()
    """Options for which an empty word means something."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the words; an empty one mostly comes from a shell variable that is not set, and is refused."""
        for before, word in zip(["", *args], args, strict=False):
            option, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
            if equals and not value.strip() and option not in self.blank:
                name = option if option.startswith("-") else "an argument"
                raise UserError(f"{name} is empty; is a shell variable not set? Give a value, or leave it out.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Runs the command."""
        options = {str(p.name): p.opts[0] for p in self.params if isinstance(p, TyperOption)} | dict(self.names)
        before = wording.set(lambda message: in_options(message, options))
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise UserError(in_options(str(error), options)) from error
        finally:
            wording.reset(before)


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Says a message about fields in options: ``limit=0`` between backticks becomes ``--limit 0``.

    What is no field of the command stays as it is: fields of records ("field `temperature`") among them. A setting of
    another command says whose it is.

    Args:
        message: Of a `UserError`.
        options: The option of each field.

    >>> in_options('`limit=0`: too few. Use `unmatched_prompts="drop"` or `verbose`.', {"limit": "--limit",
    ...     "unmatched_prompts": "--unmatched"})
    '--limit 0: too few. Use --unmatched drop or `verbose`.'
    >>> in_options("field `limit` is null; raise `max_new_tokens` of `sample`", {"limit": "--limit"})
    'field `limit` is null; raise --max-new-tokens of `bvpo-stats sample`'
    >>> in_options("`engine='file'` of `sample` counts them", {})
    '--engine file of `bvpo-stats sample` counts them'
    """

    def spoken(match: re.Match[str]) -> str:
        if match["foreign"]:
            given = "" if match["given"] is None else _words(match["given"])
            option = f"--{match['foreign'].replace('_', '-')}" + (f" {given}" if given else "")
            return f"{option} of `bvpo-stats {match['command']}`"
        name, value = match["name"], match["value"]
        if name not in options:
            return match[0]
        words = "" if value is None else _words(value)
        return options[name] + (f" {words}" if words else "")

    return _FIELD.sub(spoken, message)


def _words(value: str) -> str:
    try:
        read = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value  # inf, FILE, ...
    if read is True:
        return ""  # a flag
    if isinstance(read, list | tuple):
        return shlex.quote(",".join(map(str, read)))
    return shlex.quote(str(read))


def read_config(context: typer.Context, value: Path | None) -> Path | None:
    """Makes a YAML file's values the defaults of the command; options on the command line win."""
    if value is None:
        return None
    import yaml

    try:
        loaded: object = yaml.safe_load(value.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"--config {value}: cannot be read as YAML ({error}).") from error
    if not isinstance(loaded, dict):
        raise UserError(f"--config {value}: must map option names to values, e.g. `samples: 5`.")
    options = {str(key).replace("-", "_").lstrip("_"): entry for key, entry in loaded.items()}
    known = {str(parameter.name) for parameter in context.command.params} - {"config"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"--config {value}: unknown options {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    flags = {str(parameter.name) for parameter in context.command.params if getattr(parameter, "is_flag", False)}
    for name, entry in options.items():
        entries = entry if isinstance(entry, list) else [entry]
        plain = (bool,) if name in flags else (str, int, float)
        if not all(each is None or type(each) in plain for each in entries):
            kinds = "true or false" if name in flags else "a word, a number or a list of these"
            raise UserError(f"--config {value}: {name} must be {kinds}.")
        if "" in entries and f"--{name}".replace("_", "-") not in getattr(context.command, "blank", ()):
            raise UserError(f"--config {value}: {name} is empty. Give a value, or leave it out.")
        if name not in flags:  # as the command line would give it: 1 is no true, and 5 may be a folder's name
            words = [None if each is None else str(each) for each in entries]
            options[name] = words if isinstance(entry, list) else words[0]
    context.default_map = options
    return value
