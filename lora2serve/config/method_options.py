"""``train.options``: the fields of the PEFT configuration of ``train.method``, checked against its own class."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from enum import Enum
from functools import cache, reduce
from importlib import import_module
from importlib.util import find_spec
from operator import or_
from types import GenericAlias, UnionType
from typing import TYPE_CHECKING, Literal, cast, get_args, get_origin

from lora2serve.config.schema import build
from lora2serve.config.train_methods import OWN

if TYPE_CHECKING:
    from peft import PeftConfig

# What the run itself says: its model, its task, its steps.
SET_HERE = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "tokenizer_name_or_path",
    "total_step", "runtime_config",
)  # fmt: skip
PATH = "train.options"


def config_class(method: str) -> type[PeftConfig]:
    """PEFT's configuration of a method."""
    if method in OWN:
        import_module(OWN[method])
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    found: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    return found


def option_names(method: str) -> list[str]:
    """The options of a method."""
    return [item.name for item in fields(config_class(method)) if item.name not in SET_HERE]


def read_options(method: str, options: Mapping[str, object], problems: list[str]) -> dict[str, object]:
    """The options as PEFT takes them; ``problems`` gets a line for each that its class does not have or not so.

    Without PEFT nothing is checked: training says what is not installed.
    """
    if find_spec("peft") is None:
        return dict(options)
    built = build(_options_class(method), dict(options), problems, path=PATH)
    return {name: yaml_value(getattr(built, name)) for name in options if hasattr(built, name)}


@cache
def _options_class(method: str) -> type[object]:
    return schema_class(config_class(method), option_names(method))


def schema_class(config: type[object], names: Sequence[str]) -> type[object]:
    """A dataclass of those fields of a library's configuration, with the schema's types; none has to be given."""
    hints = typing.get_type_hints(config)
    return make_dataclass("Options", [(name, schema_type(hints[name]), field(default=None)) for name in names])


def schema_type(hint: object) -> object:
    """A type of PEFT's as the schema knows it: lists as tuples, an Enum by its values."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, UnionType):
        named = any(isinstance(arg, type) and issubclass(arg, Enum) for arg in args)  # by text: by one of its values
        return reduce(or_, (cast("type", schema_type(arg)) for arg in args if not (named and arg is str)))
    if origin in (list, set, tuple):
        return GenericAlias(tuple, (schema_type(args[0]), ...))
    if origin is dict or hint is dict:
        return GenericAlias(Mapping, (str, schema_type(args[1]) if args else object))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Literal.__getitem__(tuple(item.value for item in hint))
    return hint


def yaml_value(value: object) -> object:
    """Lists again, which PEFT asks for by their type."""
    return [yaml_value(item) for item in value] if isinstance(value, tuple) else value
