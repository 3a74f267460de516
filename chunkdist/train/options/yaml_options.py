"""The YAML file of a run, read so that no line of it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys, and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            name, line = str(key), key_node.start_mark.line + 1
            if name in seen:
                raise ValueError(
                    f"{name!r} is given twice, in lines {seen[name]} and {line}, and the first would be "
                    "ignored: write it once"
                )
            seen[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The options of a YAML file that `option` names.

    Raises:
        ValueError: the file cannot be read, holds no mapping of names, or a key twice; names the file.
    """
    if path.is_fifo():
        raise ValueError(f"{option} {path} is a pipe, which can be read only once: write a file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"{option} {path} cannot be read: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{option} {path} cannot be read: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{option} {path} holds no options: write 'name: value' lines")
    for key in content:
        if not isinstance(key, str):
            raise ValueError(f"{option} {path}: {key!r} is no option's name")
    variables = content.get("env", {})
    if not isinstance(variables, dict):
        raise ValueError(f"{option} {path}: env={variables!r} is no mapping of environment variables")
    return content
