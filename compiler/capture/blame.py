"""Why a model could not be captured: the module, the user's line, and what to change."""

from __future__ import annotations

import dis
import re
import traceback
import types
from collections.abc import Iterator

import torch
from torch import fx

from ..effects.code import is_foreign, user_line
from ..ir.errors import BatchError, CaptureError, PipecompileError, RaisedError
from ..ir.graph import module_path, tensors

_OTHERWISE = (
    "if the model runs on this batch by itself, tracing takes another branch here: pass optional "
    "inputs such as attention_mask, or make this code traceable by torch.export"
)
_RAISE = "RAISE_VARARGS"  # Python's instruction for raise and assert
_DERIVED = "write the derivative as operators, or as a torch.autograd.Function's backward"
_ADVICE = {
    "GuardOnDataDependentSymNode": "a decision, a number or a shape depends on the values in a "
    "tensor (if, .item(), float()): compute both sides and choose with torch.where, keep it a "
    "tensor, pass it in as a Python value, or skip a mere check if torch.compiler.is_compiling()",
    "DataDependentOutputException": "a tensor's value is read in Python (.item(), bool(), int()): "
    "keep it a tensor, or pass the number in as a Python value",
    "DynamicOutputShapeException": "an operator's output shape depends on data (nonzero, boolean "
    "indexing, unique): use masks of a fixed shape",
    "UnsupportedOperatorException": "this operator has no shape rule: register one with "
    "torch.library.register_fake",
}


def data_dependent(traced: fx.GraphModule, error: Exception) -> tuple[str, str]:
    """Module and source line of the first operator with a result, or a derivative, that only data
    can tell."""
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        sizes = [n for t in tensors(value) for n in t.shape]
        if any(
            isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in (value, *sizes)
        ):
            return module_path(node).removeprefix("model").removeprefix("."), user_line(node)
    in_derivative = type(error).__name__ == "DynamicOutputShapeException"
    for node in filter(_selects, traced.graph.nodes if in_derivative else ()):
        return module_path(node).removeprefix("model").removeprefix("."), user_line(node)
    return "", ""


def _selects(node: fx.Node) -> bool:
    """Whether elements are chosen by a mask, as the derivative does then, too."""
    chosen = node.args[1] if "aten.index" in str(node.target) and len(node.args) > 1 else ()
    return isinstance(chosen, (list, tuple)) and any(
        isinstance(each, fx.Node) and tensors(each.meta.get("val"))[0].dtype is torch.bool
        for each in chosen
    )


def explain(
    error: Exception, model: str, module: str, line: str = "", given: str = "", asked: bool = False
) -> PipecompileError:
    """The user's own mistake if one is in the chain, else what failed, where, and what to do.

    Args:
        given: the batch and its dtypes, which may be to blame.
        asked: whether forward has got values of the batch, and may refuse them.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        if cause in chain:
            break
        chain.append(cause)
    for item in chain:
        if isinstance(item, CaptureError) and item.module is None:
            item.module = module
        if isinstance(item, PipecompileError):
            return item
    said = _said(chain[-1]) if asked else ""
    if said:
        return RaisedError(
            f"{model} raises on this batch: in module {module or '(the model itself)'!r}, "
            f"{_user_line(chain)}: {said}"
        )
    kinds = [type(item).__name__ for item in chain]
    kind = next((k for k in kinds if k in _ADVICE), kinds[-1])
    advice = _ADVICE.get(kind, _OTHERWISE)
    if "Unexpected fake buffer" in str(error):
        advice = (
            "forward reads .data of a parameter or buffer (use .detach()), or differentiates with "
            f"torch.func: {_DERIVED}"
        )
    if "functorch" in str(error) or "does not have a grad_fn" in str(error):
        advice = f"forward differentiates, or maps with torch.func: {_DERIVED}"
    first_line = str(chain[-1]).strip().splitlines()[0] if str(chain[-1]).strip() else kinds[-1]
    if given and re.search(r"dtype|scalar type|Input type", first_line):
        return BatchError(
            f"{model} does not take the batch {given}: module {module or '(the model itself)'!r} "
            f"refuses a dtype ({first_line}): convert that leaf with .to()"
        )
    what = f"{kind}: {first_line}"
    why = f"{what}; {advice}" if advice is _OTHERWISE else f"{advice} ({what})"
    return CaptureError(
        f"{model} cannot be captured: in module {module or '(the model itself)'!r}, "
        f"{line or _user_line(chain)}: {why}",
        module,
    )


def is_explained(error: Exception) -> bool:
    """Whether an error names a cause, and not that tracing may have taken another branch."""
    return _OTHERWISE not in str(error)


def _said(error: BaseException) -> str:
    """What the code of the model, or a `torch._check` of it, has raised; "" for other errors."""
    frames = [(tb.tb_frame, tb.tb_lasti) for tb in _walk(error.__traceback__)]
    callers = [frame for frame, _ in frames if not _is_check(frame)]
    if not callers or is_foreign(callers[-1].f_code.co_filename):
        return ""  # torch's own, of a kernel that a fake tensor cannot have
    frame, at = frames[-1]
    if dis.opname[frame.f_code.co_code[at]] != _RAISE:
        return ""
    kind, text = type(error).__name__, str(error)
    for each, _ in frames:  # transformers leaves its message out while it is traced
        if each.f_code.co_name == "torch_compilable_check":
            message, kind = each.f_locals["msg"], each.f_locals["error_type"].__name__
            text = message() if callable(message) else message
    return f"{kind}: {text}" if text else kind


def _is_check(frame: types.FrameType) -> bool:
    """Whether it is of `torch._check` or its like."""
    return frame.f_code.co_name.startswith("_check") and frame.f_globals["__name__"] == "torch"


def _walk(frame: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while frame is not None:
        yield frame
        frame = frame.tb_next


def _user_line(chain: list[BaseException]) -> str:
    """File, line and text of the innermost frame that is neither torch's nor pipecompile's."""
    found = "an unknown line"
    for item in chain:
        frames = [f for f in traceback.extract_tb(item.__traceback__) if not is_foreign(f.filename)]
        if frames:
            found = f"at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})"
    return found
