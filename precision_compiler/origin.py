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
        node: name of the ONNX node; empty for the copy of a constant.
        value: name of the ONNX value whose elements the fx node computes; None for what is
            computed on the way to it.
    """

    node: str
    value: str | None = None


def origin_of(node: fx.Node) -> Origin | None:
    """The origin of an fx node, None where it did not come from an ONNX file."""
    custom = node.meta.get("custom") or {}
    return Origin(custom[_NODE], custom.get(_VALUE)) if _NODE in custom else None


def set_origin(node: fx.Node, origin: Origin) -> None:
    """Tag an fx node."""
    tags = {_NODE: origin.node} | ({} if origin.value is None else {_VALUE: origin.value})
    node.meta["custom"] = {**(node.meta.get("custom") or {}), **tags}
