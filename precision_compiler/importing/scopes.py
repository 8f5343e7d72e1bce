"""Names that people recognise for the nodes of an ONNX file."""

from collections.abc import Iterator

import onnx_ir as ir


def scope_of(node: ir.Node) -> str:
    """Dotted path of the module that a node came from, or the node's own name.

    torch's exporters keep it in the metadata (dynamo) or in the name (TorchScript).
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    found = [part for part in _quoted(scopes) if part][:-1]
    if found:
        return found[-1]
    path = ".".join(str(node.name).strip("/").split("/")[:-1])
    return path or str(node.name)


def _quoted(text: str) -> Iterator[str]:
    """The entries of a list of strings as Python prints it."""
    yield from (part.strip(" '\"") for part in text.strip("[]").split(","))
