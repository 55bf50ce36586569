"""Typed settings: a dataclass is the schema of one part of a recipe, and `parse` checks settings against it.

OmegaConf checks the types. A range or a list of choices stands in the field itself:

    lr: float = checked(0.1, at_least(0))
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass, replace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from composer.core import Time
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sassha.recipes.errors import ConfigError, did_you_mean

Check = Callable[[Any], None]
T = TypeVar("T")


def checked(default: Any, check: Check) -> Any:
    """Make a dataclass field whose value must pass `check`, which raises ValueError with the reason.

    Pass `dataclasses.MISSING` as the default of a field that every recipe must set.
    """
    return field(default=default, metadata={"check": check})


def arguments_of(built: type, without: Collection[str] = ()) -> type:
    """Make the schema of a class from its constructor: the same arguments, types and defaults.

    The constructor checks the values when `build` calls it.

    Args:
        built: the class, with type hints on its constructor.
        without: arguments that are not settings; `build` takes them, in the constructor's order.

    >>> from composer_sassha import SAM
    >>> arguments_of(SAM)(rho=0.1).build()
    SAM(rho=0.1, interval=1, sync_ascent=False, p=2, ascent_fraction=1.0)
    """
    hints = get_type_hints(built.__init__)  # type: ignore[misc]  # of this very class
    settings = [
        (name, _as_known(hints[name]), field(default=MISSING if p.default is p.empty else p.default))
        for name, p in inspect.signature(built).parameters.items()
        if name not in without
    ]

    def build(self: Any, *others: Any) -> Any:
        return built(*others, **{f.name: getattr(self, f.name) for f in fields(self)})

    return make_dataclass(built.__name__, settings, namespace={"__doc__": built.__doc__, "build": build})


def _as_known(hint: Any) -> Any:
    """Return the type that OmegaConf knows for a sequence of any kind."""
    return tuple[get_args(hint)[0], ...] if get_origin(hint) is Sequence else hint  # type: ignore[misc]


def at_least(low: float) -> Check:
    """Return a check: the value must be `low` or more."""

    def check(value: float) -> None:
        if not value >= low:  # written so that NaN fails as well
            raise ValueError(f"must be at least {low}")

    return check


def above(low: float) -> Check:
    """Return a check: the value must be more than `low`."""

    def check(value: float) -> None:
        if not value > low:
            raise ValueError(f"must be above {low}")

    return check


def fraction(value: float) -> None:
    """Check that the value is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError("must be in (0, 1]")


def within(low: float, high: float) -> Check:
    """Return a check: the value, or every number in a list, must be in [low, high)."""

    def check(value: Any) -> None:
        if not all(low <= number < high for number in _each(value)):
            raise ValueError(f"must be in [{low}, {high})")

    return check


def _each(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def one_of(*choices: str) -> Check:
    """Return a check: the value must be one of `choices`."""

    def check(value: str) -> None:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{did_you_mean(value, choices)}")

    return check


def time_in(*units: str, positive: bool = True) -> Check:
    """Return a check: the value, or each in a list, must be a Composer time such as 30ep in these units.

    >>> time_in("ep", "ba")("30 epochs")
    Traceback (most recent call last):
    ValueError: must be a number and a unit (ep, ba), such as 30ep
    """

    def check(value: Any) -> None:
        for time in _each(value):
            try:
                parsed = Time.from_timestring(time)
            except ValueError:
                parsed = None
            if parsed is None or parsed.unit.value not in units:
                raise ValueError(f"must be a number and a unit ({', '.join(units)}), such as 30{units[0]}")
            if parsed.value < 0 or (positive and parsed.value == 0):
                raise ValueError(f"must be {'above' if positive else 'at least'} 0{parsed.unit.value}")

    return check


def mapping(settings: Any, where: str) -> dict[str, Any]:
    """Return `settings` as a dictionary with string keys, or raise a ConfigError that names the place."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: {settings!r} is not a mapping of settings")
    return {str(key): value for key, value in settings.items()}


def parse(schema: type[T], settings: Any, where: str = "", owner: str = "a recipe") -> T:
    """Make an instance of the dataclass `schema` from `settings`, with its defaults filled in.

    Args:
        schema: a dataclass; its field types, `checked` fields and `__post_init__` check the values. A field
            that is a dataclass itself is made of a mapping in the same way.
        settings: a mapping of field names to values.
        where: the dotted place of the settings in the recipe, for messages; "" is the top level.
        owner: what takes these settings, for messages.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or a missing setting.
    """
    settings = mapping(settings, where or "the recipe")
    prefix = f"{where}." if where else ""
    known: dict[str, Field[Any]] = {f.name: f for f in fields(schema)}  # type: ignore[arg-type]
    hints, parts = get_type_hints(schema), {}
    config = OmegaConf.structured(schema)
    OmegaConf.set_readonly(config, False)  # as it is for a frozen dataclass
    one_by_one = not settings.keys() <= {key for key in known if not is_dataclass(hints[key])}
    if not one_by_one:
        try:
            config.merge_with(settings)  # at once, as each merge takes a millisecond
        except (OmegaConfBaseException, TypeError):
            one_by_one = True  # again, to name the key
    for key, value in settings.items() if one_by_one else ():
        if key not in known:
            takes = ", ".join(known) or "no settings"
            raise ConfigError(
                f"{prefix}{key}: unknown key{did_you_mean(key, known, prefix)} ({owner} takes: {takes})"
            )
        if is_dataclass(hints[key]):
            parts[key] = parse(hints[key], value, prefix + key, owner=key)
            continue
        try:
            config.merge_with({key: value})
        except (OmegaConfBaseException, TypeError) as error:
            raise ConfigError(f"{prefix}{key}={value}: {str(error).splitlines()[0]}") from error
    for key, f in known.items():
        if OmegaConf.is_missing(config, key):
            raise ConfigError(f"{prefix}{key}: {owner} must set it")
        if check := f.metadata.get("check"):
            value = getattr(config, key)
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            try:
                check(value)
            except ValueError as error:
                raise ConfigError(f"{prefix}{key}={value}: {error}") from error
    try:
        made: Any = OmegaConf.to_object(config)
        return replace(made, **parts)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or 'the recipe'}: {error}") from error


def lookup(registry: Mapping[str, type], name: Any, where: str) -> type:
    """Return the schema registered as `name`, or raise a ConfigError with the nearest name and all names."""
    if name is None:
        raise ConfigError(f"{where}: not given (there are: {', '.join(registry)})")
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(
            f"{where}: {name!r} is unknown{did_you_mean(name, registry)} (there are: {', '.join(registry)})"
        )
    return registry[name]
