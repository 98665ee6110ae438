"""YAML that people wrote: a value, or one error, whatever is in it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from model.files import reason_of, shown

_MOST_KEYS = 1000  # of one mapping, merged ones included: merges of merges double with each line


class _Loader(yaml.SafeLoader):
    """SafeLoader, but no key is there twice, and a mapping does not grow without bounds by merge keys (``<<``)."""

    def __init__(self, text: str):
        super().__init__(text)
        self._flat: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) in self._flat:  # its merged keys may stand before its own
            return
        self._flat.add(id(node))
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if keys and keys.most_common(1)[0][1] > 1:
            (_, name), _ = keys.most_common(1)[0]
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {shown(name)} is there twice", node.start_mark
            )
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, f"more than {_MOST_KEYS} keys", node.start_mark)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, or a key is there twice; the message has one line. PyYAML itself raises errors of
            many types.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(reason_of(error)) from error
