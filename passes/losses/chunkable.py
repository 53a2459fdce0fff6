"""Which losses over classes can be computed without all of their logits at once.

From cross-entropy back to the product: casts, views and slices that leave the classes alone, and
what is done to each logit. Anything else between them, or that reads logits too, needs them whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...compiler.ir.graph import behind, written
from ...compiler.losses.logits import Step
from ...compiler.tensors.facts import storage_of

_ATEN = torch.ops.aten
_CROSS_ENTROPY = _ATEN.cross_entropy_loss.default
_NLL = (_ATEN.nll_loss_nd.default, _ATEN.nll_loss.default)
_LOG_SOFTMAX = _ATEN.log_softmax.int
_LOGSUMEXP = _ATEN.logsumexp.default
_COPIES = (_ATEN.contiguous.default, _ATEN.clone.default, _ATEN.alias.default)
VIEWS = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
_CASTS = (
    *(_ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.other, _ATEN._to_copy.default),
    _ATEN.type_as.default,
)
_SCALES = {
    _ATEN.mul.Tensor: "mul",
    _ATEN.mul.Scalar: "mul",
    _ATEN.div.Tensor: "div",
    _ATEN.div.Scalar: "div",
}
_TRANSPOSES = (_ATEN.t.default, _ATEN.transpose.int, _ATEN.numpy_T.default, _ATEN.permute.default)


class Whole(Exception):  # noqa: N818
    """Why logits have to exist."""


@dataclass
class Found:
    """A loss that can be computed in pieces.

    Attributes:
        loss: of cross-entropy.
        labels, class_weight, reduction, ignore_index, smoothing: its operands.
        dtype: of the logits that it reads.
        readers: of the logsumexp of the same logits.
        linear: what makes logits, of ``hidden``, ``weight`` (classes, width) or, if ``turned``, its
            transpose, and ``bias``.
        offset: a number for each class, which a step adds.
        moves: views and slices of logits, first to last.
        steps: first to last.
        logits: values that will not exist.
    """

    loss: fx.Node
    labels: fx.Node
    class_weight: fx.Node | None
    reduction: int
    ignore_index: int
    smoothing: float
    dtype: torch.dtype
    readers: list[fx.Node] = field(default_factory=list)
    linear: fx.Node | None = None
    hidden: fx.Node | None = None
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    offset: fx.Node | None = None
    turned: bool = False
    moves: list[fx.Node] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    logits: list[fx.Node] = field(default_factory=list)

    @property
    def classes(self) -> int:
        assert self.weight is not None
        rows, columns = self.weight.meta["val"].shape
        return int(columns if self.turned else rows)


def live_in(graph: fx.Graph) -> set[fx.Node]:
    """The nodes on which results, checks, or what is written into depend."""
    return set(behind(*(node for node in graph.nodes if node.is_impure())))


def losses_in(live: Collection[fx.Node]) -> list[fx.Node]:
    """Cross-entropies, in the order of the graph."""
    return sorted(node for node in live if node.target is _CROSS_ENTROPY or node.target in _NLL)


def recognised(loss: fx.Node, live: Collection[fx.Node]) -> Found:
    """Raises Whole where logits have to exist."""
    given = arguments(loss)
    labels, scores = given["target"], given["self"]
    if labels.meta["val"].is_floating_point():
        raise Whole("labels are probabilities")
    found = Found(
        loss,
        labels,
        given["weight"],
        int(given["reduction"]),
        int(given["ignore_index"]),
        float(given.get("label_smoothing", 0.0)),
        scores.meta["val"].dtype,
    )
    at = loss
    if loss.target in _NLL:
        if scores.target is not _LOG_SOFTMAX:
            raise Whole("nll_loss reads no log_softmax")
        _alone(scores, [loss], live)
        dim, dims = arguments(scores)["dim"], scores.meta["val"].dim()
        if dim % dims != (1 if dims > 1 else 0):
            raise Whole("log_softmax goes along another dimension than the classes")
        found.logits.append(scores)
        at, scores = scores, arguments(scores)["self"]
        _cast(found, scores.meta["val"].dtype, found.dtype)
    dims = scores.meta["val"].dim()
    if dims < 2:
        raise Whole("a loss of one token")
    if dims > 2:
        at, scores = _transposed(found, at, scores, live)
    else:
        found.readers = [user for user in scores.users if _is_logsumexp(user) and user in live]
    _walk(found, at, scores, live)
    _check_operands(found)
    _check_writes(found)
    return found


def _transposed(
    found: Found, at: fx.Node, scores: fx.Node, live: Collection[fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Of scores (batch, classes, ...), those of (batch, ..., classes)."""
    dims = scores.meta["val"].dim()
    given = arguments(scores) if scores.target in _TRANSPOSES else {}
    if scores.target is _ATEN.transpose.int:
        order = list(range(dims))
        one, other = given["dim0"] % dims, given["dim1"] % dims
        order[one], order[other] = order[other], order[one]
    elif scores.target is _ATEN.permute.default:
        order = [dim % dims for dim in given["dims"]]
    else:
        raise Whole("classes are not the last dimension of the logits")
    if order != [0, dims - 1, *range(1, dims - 1)]:
        raise Whole("classes are not the last dimension of the logits")
    _alone(scores, [at], live)
    found.logits.append(scores)
    source: fx.Node = given["self"]
    return scores, source


def _walk(found: Found, at: fx.Node, node: fx.Node, live: Collection[fx.Node]) -> None:
    """From the loss back to the product."""
    classes = node.meta["val"].shape[-1]
    while True:
        _alone(node, [at, *found.readers], live)
        if written(node):
            raise Whole(f"{_name(node)} writes into logits")
        found.logits.append(node)
        if _product(found, node):
            if found.classes != classes:
                raise Whole("classes of the logits are not those of the product")
            found.moves.reverse()
            found.steps.reverse()
            return
        source = _step(found, node, classes)
        at, node = node, source


def _alone(node: fx.Node, readers: Sequence[fx.Node], live: Collection[fx.Node]) -> None:
    others = [user for user in node.users if user in live and user not in readers]
    if others:
        said = "they are returned" if others[0].op == "output" else f"{_name(others[0])} reads them"
        raise Whole(f"{said} too")


def _step(found: Found, node: fx.Node, classes: int) -> fx.Node:
    """Take down one operator between product and loss; its operand."""
    given = arguments(node)
    source = given.get("self")
    if not isinstance(source, fx.Node) or "val" not in source.meta:
        raise Whole(f"{_name(node)} makes them of the product")
    before, after = source.meta["val"], node.meta["val"]
    if node.target in _CASTS and before.device == after.device and after.is_floating_point():
        _cast(found, before.dtype, after.dtype)
    elif node.target in _COPIES:
        pass
    elif _moves(node, before, classes):
        found.moves.append(node)
    elif node.target in _SCALES and type(given["other"]) in (int, float):
        if after.dtype is not before.dtype:
            raise Whole(f"{_name(node)} changes their dtype")
        found.steps.append(Step(_SCALES[node.target], repr(float(given["other"]))))
    elif node.target is _ATEN.tanh.default:
        found.steps.append(Step("tanh"))
    elif node.target is _ATEN.add.Tensor and given["alpha"] == 1 and found.offset is None:
        source = _offset(found, node, classes)
    else:
        raise Whole(f"{_name(node)} makes them of the product")
    return source


def _moves(node: fx.Node, before: torch.Tensor, classes: int) -> bool:
    """Whether an operator views or slices logits, and leaves the classes alone."""
    if node.target is _ATEN.slice.Tensor:
        return int(arguments(node)["dim"]) % before.dim() != before.dim() - 1
    views = node.target in VIEWS or node.target is _ATEN.flatten.using_ints
    shapes = before.shape, node.meta["val"].shape
    return views and all(len(shape) > 1 and shape[-1] == classes for shape in shapes)


def _offset(found: Found, node: fx.Node, classes: int) -> fx.Node:
    """A constant number for each class is added; what it is added to."""
    one, other = node.args[:2]
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        raise Whole("add makes them of the product")
    if other.meta["val"].numel() != classes:
        one, other = other, one
    value, after = other.meta["val"], node.meta["val"]
    of_classes = value.numel() == classes and value.shape[-1] == classes
    if not of_classes or after.shape != one.meta["val"].shape:
        raise Whole("add makes them of the product")
    if any(each.op == "get_attr" and _is_trained(each) for each in behind(other)):
        raise Whole("a trained parameter is added to them")
    found.offset = other
    found.steps.append(Step("add"))
    _cast(found, one.meta["val"].dtype, after.dtype)
    return one


def _is_trained(node: fx.Node) -> bool:
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return isinstance(value, torch.nn.Parameter) and value.requires_grad


def _cast(found: Found, before: torch.dtype, after: torch.dtype) -> None:
    if before is not after:
        found.steps.append(Step("to", str(after).removeprefix("torch.")))


def _product(found: Found, node: fx.Node) -> bool:
    """Whether a node is the product that makes logits."""
    given = arguments(node)
    if node.target is _ATEN.linear.default:
        parts = given["input"], given["weight"], given["bias"]
    elif node.target is _ATEN.addmm.default:
        if (given["beta"], given["alpha"]) != (1, 1) or given["self"].meta["val"].dim() != 1:
            return False
        parts, found.turned = (given["mat1"], given["mat2"], given["self"]), True
    elif node.target in (_ATEN.matmul.default, _ATEN.mm.default):
        other = given["other"] if "other" in given else given["mat2"]
        parts, found.turned = (given["self"], other, None), True
    else:
        return False
    found.linear = node
    found.hidden, found.weight, found.bias = parts
    weight = parts[1].meta["val"]
    if weight.dim() != 2 or parts[0].meta["val"].dim() < 2:
        raise Whole(f"{_name(node)} makes them, of no matrix")
    dtypes = {part.meta["val"].dtype for part in parts if part is not None}
    if len(dtypes) > 1 or not weight.is_floating_point():
        raise Whole(f"{_name(node)} makes them, of several dtypes")
    return True


def _is_logsumexp(node: fx.Node) -> bool:
    given = arguments(node) if node.target is _LOGSUMEXP else {}
    return bool(given) and [dim % 2 for dim in given["dim"]] == [1] and not given["keepdim"]


def _check_operands(found: Found) -> None:
    """Raises Whole if labels, and weights of classes, are not there where all is read."""
    read = [each for each in (found.labels, found.class_weight) if each is not None]
    if any(reader < each for reader in found.readers for each in read):
        raise Whole("their logsumexp is read before there are labels")


def _check_writes(found: Found) -> None:
    """Raises Whole if what the operator reads, or logits, are written into before the loss."""
    assert found.linear is not None
    read = [found.hidden, found.weight, found.bias, found.offset]
    if found.readers:  # all is read where the first of them is
        read += [found.labels, found.class_weight]
    places = _places([*(each for each in read if each is not None), *found.logits])
    node = found.linear.next
    while node is not found.loss:
        if places & _places(written(node)):
            raise Whole(f"{_name(node)} writes into what they are made of")
        node = node.next


def _places(nodes: Sequence[fx.Node]) -> set[int]:
    values = (node.meta.get("val") for node in nodes)
    found = (each for each in values if isinstance(each, torch.Tensor))
    return set(map(storage_of, found))


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def arguments(node: fx.Node) -> dict[str, Any]:
    """Of an operator of torch's, by their names, those that are not given with their defaults."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    defaults = {a.name: a.default_value for a in schema.arguments}
    names = (argument.name for argument in schema.arguments)
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
