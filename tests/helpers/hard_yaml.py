"""YAML that is hard to read."""

from __future__ import annotations

_BOMB = [
    "a0: &a0 [x, x]",
    *(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]" for number in range(1, 30)),
]
# PyYAML reads it with errors of other types than its own, or its value never ends.
HARD_YAML = (
    "a: 2001-99-99",
    "a: !!bool x",
    "a: !!int ''",
    "a: !!float x",
    "a: !!timestamp x",
    "a: !!binary \u00e9",
    "a: !!python/object/apply:os.system [x]",
    "a: =",
    "? [a]\n: b",
    "? {a: b}\n: c",
    "&a [*a]",
    "a: &a {<<: *a}",
    "<<: 1",
    "[" * 5000,
    "{a: " * 5000,
    "- " * 5000,
    "a: " + "9" * 5000,
    "configs: [" + "*a, " * 3 + "]",
    "\n".join([*_BOMB, "configs: *a29"]),
    "\n".join([*_BOMB, "configs: [{config_name: *a29, data_files: '*'}]"]),
    "\n".join([*_BOMB, "configs: [{data_dir: *a29, data_files: '*'}]"]),
    "\n".join([*_BOMB, "configs: [{data_files: [{split: *a29, path: '*'}]}]"]),
    "\n".join([*_BOMB, "configs: [{data_files: [{split: a, path: *a29}]}]"]),
    "\n".join([*_BOMB, "deployments: *a29"]),
    "\n".join([*_BOMB, "deployments: [{name: tiny, parameters: {dataset: *a29}}]"]),
    "\n".join([*_BOMB, "deployments: [{name: tiny, parameters: {epochs: *a29}}]"]),
    "deployments: [{name: tiny, parameters: {1: 2, a: b}}]",
    "deployments: [{name: tiny, parameters: {}}, {name: tiny, parameters: {epochs: 1}}]",
    "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))]),
    "\n" * 20000,
    "configs: [{data_files: [[[train.jsonl]]]}]",
    "configs: [{data_files: {train: {a: b}}}]",
    "configs: [{data_dir: [a], data_files: x}]",
    "configs: [{data_dir: '..', data_files: '*'}]",
    "configs: [{data_dir: /etc, data_files: '*'}]",
    "configs: [{config_name: [a], data_files: '*'}]",
    "configs: [{data_files: [{split: [a], path: '*'}]}]",
)
