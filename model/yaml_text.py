"""YAML that people wrote: a value, or one error, whatever is in it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from model.files import reason_of, shown

_MOST_NODES = 100_000  # with every alias written out


class _Loader(yaml.SafeLoader):
    """SafeLoader, but no key is there twice."""

    def __init__(self, text: str):
        super().__init__(text)
        self._flat: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) in self._flat:  # its merged keys may stand before its own
            return
        self._flat.add(id(node))
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if keys and keys.most_common(1)[0][1] > 1:
            (twice, _) = keys.most_common(1)[0]
            _, second, *_ = [key for key, _ in node.value if (key.tag, key.value) == twice]
            raise ConstructorError(None, None, f"the key {shown(twice[1])} is there twice", second.start_mark)
        super().flatten_mapping(node)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Aliases of aliases can make a value so large that nobody can print, check or copy it: such a text is refused.

    Raises:
        ValueError: it is not YAML, a key is there twice, or the value is too large or contains itself; the message
            has one line. PyYAML itself raises errors of many types.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > _MOST_NODES:
            raise ConstructorError(None, None, f"with its aliases written out it has more than {_MOST_NODES} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(reason_of(error)) from error


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """The values of a text below a node, itself included, with every alias written out.

    Args:
        counts: of the nodes seen so far, by id; None while a node is being counted.

    Raises:
        ConstructorError: a value contains itself.
    """
    if id(node) not in counts:
        counts[id(node)] = None
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    count = counts[id(node)]
    if count is None:
        raise ConstructorError(None, None, "a value contains itself", node.start_mark)
    return count
