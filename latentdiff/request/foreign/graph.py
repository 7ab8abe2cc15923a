"""A graph of ComfyUI as its `prompt` text holds it: node id -> {"class_type", "inputs"}; a link is [id, output]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from latentdiff.errors import DataError

MOST_NODES = 10_000
# What only hands a value on: class -> its input, where that is not "value".
_PRIMITIVES = {
    "PrimitiveNode": "value", "PrimitiveInt": "value", "PrimitiveFloat": "value", "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value", "PrimitiveBoolean": "value", "Reroute": "value", "INTConstant": "value",
    "FloatConstant": "value", "StringConstant": "string", "StringConstantMultiline": "string", "Text Multiline": "text",
    "Seed (rgthree)": "seed", "easy seed": "seed", "CR Seed": "seed", "Int": "Number", "CR Prompt Text": "prompt",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A node by its id; links and values of its inputs as in the text."""

    id: str
    kind: str
    inputs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.kind} ({self.id})"


class Graph:
    """The nodes; no walk over the links visits a node twice.

    Raises:
        DataError: it is none.
    """

    def __init__(self, content: Any) -> None:
        if not isinstance(content, dict) or not content or len(cast(dict[Any, Any], content)) > MOST_NODES:
            raise DataError(f"expected a graph of 1 to {MOST_NODES:,} nodes in the image's text of ComfyUI")
        self.nodes: dict[str, Node] = {}
        for key, entry in cast(dict[str, Any], content).items():
            kind, inputs = (entry.get(name) if isinstance(entry, dict) else None for name in ("class_type", "inputs"))
            if not isinstance(kind, str) or not isinstance(inputs, dict):
                raise DataError(f"node {key!r} of the image's graph of ComfyUI has no class_type or inputs")
            self.nodes[key] = Node(key, kind, cast(dict[str, Any], inputs))
        self.seen = set[str]()  # ids of the nodes that were asked for

    def of_kind(self, *kinds: str) -> list[Node]:
        """All nodes of these classes."""
        return [node for node in self.nodes.values() if node.kind in kinds]

    def linked(self, value: Any) -> Node | None:
        """The node that an input's value links to; None if it is no link."""
        if isinstance(value, list) and len(cast(list[Any], value)) == 2 and isinstance(value[0], str | int):
            found = self.nodes.get(str(cast(list[Any], value)[0]))
            self.seen |= {found.id} if found else set()
            return found
        return None

    def above(self, node: Node) -> set[str]:
        """The ids of all nodes that lead to one, and its own."""
        found, open_ = {node.id}, [node]
        while open_:
            for value in open_.pop().inputs.values():
                one = self.nodes.get(str(value[0])) if isinstance(value, list) and value else None
                if one and one.id not in found:
                    found.add(one.id)
                    open_.append(one)
        return found

    def behind(self, node: Node | None, name: str) -> Node | None:
        """The node behind an input, through nodes that only hand it on.

        Raises:
            DataError: they go round in a circle.
        """
        return self._through(self.linked(node.inputs.get(name)) if node else None)

    def value(self, node: Node, name: str) -> Any:
        """An input as a plain value; None if it is computed by a node that is not known.

        Raises:
            DataError: the links go round in a circle.
        """
        value = node.inputs.get(name)
        found = self._through(self.linked(value))
        if found is None:
            return None if isinstance(value, list | dict) else value
        inner = found.inputs.get(_PRIMITIVES.get(found.kind, ""))
        return None if isinstance(inner, list | dict) else inner

    def chain(self, node: Node | None, *names: str) -> Iterator[Node]:
        """The nodes one behind the other, along the first of some inputs that is linked.

        Raises:
            DataError: they go round in a circle.
        """
        seen = set[str]()
        while node is not None:
            if node.id in seen:
                raise DataError(f"the image's graph of ComfyUI goes round in a circle at {node}")
            seen.add(node.id)
            yield node
            before = node
            node = next((one for name in names if (one := self.behind(before, name))), None)

    def _through(self, node: Node | None) -> Node | None:
        seen = set[str]()
        while node is not None and node.kind in _PRIMITIVES:
            following = self.linked(node.inputs.get(_PRIMITIVES[node.kind]))
            if following is None or following.id in seen:
                if following:
                    raise DataError(f"the image's graph of ComfyUI goes round in a circle at {node}")
                return node
            seen.add(following.id)
            node = following
        return node
