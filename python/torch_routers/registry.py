"""Names for classes, and configurations for objects.

Defining a class registers it; there is no table to edit. A configuration is the constructor's
arguments, which every object keeps under their own names.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_routers.routers import Router

_CLASSES: dict[str, type[Configurable]] = {}


def check_choice(caller: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """An error for a value that is not among those to choose from."""
    if value not in choices:
        raise ValueError(f"{caller}: expected {name} among {list(choices)}, got {value!r}")


class Configurable:
    """An object that can be told, and built again, as plain data.

    ``class Name(Base, register=False)`` is no class of its own: its objects tell that of ``Base``.
    """

    def __init_subclass__(cls, *, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not register:
            return
        known = _CLASSES.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"registry: expected a class name that is not in use, got {cls.__name__!r}, "
                f"which {known.__module__} defines"
            )
        _CLASSES[cls.__name__] = cls  # defined again, as in a notebook: the new one holds

    def config(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `from_config` builds the same object again.

        Weights and buffers are not in it: they are in the ``state_dict``.
        """
        return {"class": type(self).__name__} | {
            name: _plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters
        }


def from_config(config: dict[str, Any]) -> Any:
    """Build the object that a configuration describes.

    Only registered classes are built, and only from numbers, strings, lists and configurations of
    other objects, or those objects themselves.

    Raises:
        ValueError: anything else, and arguments that the class does not take.

    >>> loss = from_config({"class": "ZLoss", "weight": 0.001})
    >>> loss.config()
    {'class': 'ZLoss', 'weight': 0.001}
    """
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("class"), str)
        or not all(isinstance(name, str) for name in config)
    ):
        raise ValueError(
            f"from_config: expected config with the name of a class under 'class', got {config!r}"
        )
    cls = lookup("from_config", config["class"])
    arguments = {name: _build(value) for name, value in config.items() if name != "class"}
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"from_config: expected config with the arguments of {cls.__name__}, "
            f"{list(inspect.signature(cls).parameters)}, got {sorted(arguments)} ({error})"
        ) from None
    return cls(**arguments)


def create_router(name: str, **arguments: Any) -> Router:
    """Build a router by the name of its class, or of a known model.

    Args:
        name: one of `list_routers` or `list_presets`.
        arguments: of the constructor. A model brings its own, except ``hidden_size``; what is given
            here takes precedence.

    Raises:
        ValueError: an unknown name, or arguments that the class does not take.

    >>> create_router("TopKRouter", hidden_size=16, num_experts=4, top_k=2).num_experts
    4
    >>> create_router("deepseek_v3", hidden_size=16).scale
    2.5
    """
    from torch_routers.presets import PRESETS
    from torch_routers.routers import Router

    if name in PRESETS:
        return from_config({"class": "TopKRouter"} | PRESETS[name].router | arguments)
    if name not in _CLASSES or not issubclass(_CLASSES[name], Router):
        raise ValueError(
            f"create_router: expected one of {[*list_routers(), *sorted(PRESETS)]}, got {name!r}"
        )
    return from_config({"class": name} | arguments)


def router_parameters(name: str) -> set[str]:
    """What `create_router` takes besides the name."""
    from torch_routers.presets import PRESETS

    cls = lookup("create_router", "TopKRouter" if name in PRESETS else name)
    return set(inspect.signature(cls).parameters)


def list_routers(pattern: str = "*", **traits: Any) -> list[str]:
    """Names for `create_router`, by shell pattern and by fields of `RouterTraits`.

    >>> list_routers("TopK*", causal=True)
    ['TopKRouter']
    """
    from torch_routers.routers import Router, RouterTraits

    unknown = set(traits) - set(RouterTraits._fields)
    if unknown:
        raise ValueError(
            f"list_routers: expected traits among {list(RouterTraits._fields)}, "
            f"got {sorted(unknown)}"
        )
    return sorted(
        name
        for name, cls in _CLASSES.items()
        if issubclass(cls, Router)
        and cls is not Router
        and fnmatch.fnmatchcase(name, pattern)
        and all(getattr(cls.traits, trait) == value for trait, value in traits.items())
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Configurable):
        return value.config()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return [_plain(item) for item in value]


def _build(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_build(item) for item in value]
    if isinstance(value, dict):
        return from_config(value)
    if value is None or isinstance(value, (bool, int, float, str, Configurable)):
        return value
    raise ValueError(
        "from_config: expected numbers, strings, lists and configurations of other objects, "
        f"got {type(value).__name__}"
    )


def lookup(caller: str, name: str) -> type[Configurable]:
    """The class of that name."""
    if name not in _CLASSES:
        raise ValueError(f"{caller}: expected one of {sorted(_CLASSES)}, got {name!r}")
    return _CLASSES[name]
