"""Which ONNX node and value an fx node comes from, if any.

The tag lies in ``node.meta["custom"]``, which torch hands on to whatever it makes of a node.
"""

from dataclasses import dataclass

from torch import fx

_NODE, _VALUE = "onnx_node", "onnx_value"


@dataclass(frozen=True)
class Origin:
    """Where an fx node comes from.

    Attributes:
        node: name of the ONNX node; empty for the copy of a constant or an input.
        value: name of the ONNX value whose elements the fx node computes; None for what is
            computed on the way to it.
    """

    node: str
    value: str | None = None


def origin_of(node: fx.Node) -> Origin | None:
    """The origin of an fx node, None where it did not come from an ONNX file."""
    custom = node.meta.get("custom") or {}
    return Origin(custom[_NODE], custom.get(_VALUE)) if _NODE in custom else None


def constant_copies(graph: fx.Graph, parameters: frozenset[str]) -> frozenset[str]:
    """Names of the fx nodes that stand for constants of an ONNX file.

    Args:
        graph: of the file.
        parameters: names of the placeholders that hold constants.
    """
    return frozenset(
        node.name
        for node in graph.nodes
        if (origin := origin_of(node)) is not None
        and not origin.node
        and any(source.name in parameters for source in node.all_input_nodes)
    )


def set_origin(node: fx.Node, origin: Origin) -> None:
    """Tag an fx node."""
    tags = {_NODE: origin.node} | ({} if origin.value is None else {_VALUE: origin.value})
    node.meta["custom"] = {**(node.meta.get("custom") or {}), **tags}
