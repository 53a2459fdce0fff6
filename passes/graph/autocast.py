"""Casts in an exported forward graph, before it is differentiated: `torch.autocast` as a pass.

The graph was traced under autocast, so that branches of the model that ask for a dtype went the
way they would go; the casts themselves, which autocast makes while kernels are called, are not in
it. Here they become nodes:

=====================  ======================================================================
a cast of              is made
=====================  ======================================================================
a parameter            once per graph: all products that read it read one copy
any other value        for every reader, as autocast does: gradients then add up in fp32, with
                       autocast's bits; equal casts are merged after differentiation
=====================  ======================================================================

Regions of the model under an autocast of its own (``torch.autocast(..., enabled=False)`` around a
router or rotary tables) keep the dtypes that their author chose. fp64, integers and booleans are
never cast, nor is the output of any operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from ...compiler.ir.errors import OptionError, VerificationError
from ...compiler.ir.graph import is_operator, module_path, tensors
from ...compiler.ir.precision import Precision
from ...compiler.tensors.pytree import tree_leaves
from .autocast_tables import TABLES, TO_FP32_BY_DTYPE

_TO = torch.ops.aten.to.dtype
_MADE_OF_PRODUCTS = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "bilinear"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
}
"""Operators without a rule of their own, on CPUs at least, in which autocast finds products."""


def insert_casts(
    module: fx.GraphModule, leaves: Sequence[torch.Tensor], precision: Precision, table: str
) -> str:
    """Insert the casts in place; returns a note.

    Args:
        module: exported under autocast.
        leaves: its arguments, fake.
        table: whose operator lists count where the precision does not say.

    Raises:
        OptionError: the precision names a module or an operator that a model in training lacks.
    """
    rules = _Rules(precision, precision.table or table)
    caster = _Caster(module, rules)
    trains = torch.is_grad_enabled()
    with torch.no_grad():
        caster.run(*leaves, enable_io_processing=False)
    if trains:
        rules.check_names()
    module.recompile()
    casts, params = rules.counts["cast"], rules.counts["param"]
    return f"{casts + params} casts, {params} of them of parameters" if casts + params else ""


class _Rules:
    """What the precision says about an operator, and what has been cast so far."""

    def __init__(self, precision: Precision, table: str):
        self.precision, self.table = precision, TABLES[table]
        self.counts: Counter[str] = Counter()
        self.met: set[str] = set()
        self.operators: set[str] = set()

    def dtype_for(self, node: fx.Node, inputs: Sequence[torch.Tensor]) -> torch.dtype | None:
        """In which an operator wants its inputs; None for as they are."""
        name = _name(node)
        precision, table = self.precision, self.table
        path = module_path(node).removeprefix("model").removeprefix(".")
        self.operators.add(name)
        if name in precision.fp32:
            return torch.float32
        if name in precision.lower or name in table.lower:
            patterns = precision.fp32_patterns(path)
            self.met |= patterns
            return torch.float32 if patterns else precision.compute
        if name in table.fp32:
            return torch.float32
        if name in table.widest:
            wide = any(t.dtype is torch.float32 for t in inputs)
            return torch.float32 if wide else precision.compute
        return None

    def leaves_to_torch(self, node: fx.Node) -> bool:
        """Whether torch casts inside an operator while it takes it apart."""
        table, name = self.table, _name(node)
        ruled = name in table.lower | table.fp32 | table.widest
        return name in _MADE_OF_PRODUCTS and not ruled

    def check_names(self) -> None:
        for name in (*self.precision.lower, *self.precision.fp32):
            if name not in self.operators:
                raise OptionError(
                    f"Precision: the model calls no operator {name!r}; it calls "
                    f"{', '.join(sorted(self.operators - {''}))}"
                )
        for pattern in self.precision.fp32_modules:
            if pattern not in self.met:
                raise OptionError(
                    f"fp32_modules: {pattern!r} stands for no module of the model that would "
                    "compute in a narrower dtype"
                )


class _Caster(fx.Interpreter):
    """Runs a graph on fake tensors, and puts casts in front of each operator before it runs."""

    def __init__(self, module: fx.GraphModule, rules: _Rules):
        super().__init__(module)
        self.rules = rules
        self.graph = module.graph
        self.params: dict[tuple[int, torch.dtype], fx.Node] = {}
        for node in list(module.graph.nodes):
            if str(node.target).startswith("aten._assert_tensor_metadata"):
                module.graph.erase_node(node)  # of dtypes that operator lists may change

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            inner = _submodule(n, self.env)
            if inner is not None:
                args, _ = self.fetch_args_kwargs_from_env(n)
                at = next(i for i, arg in enumerate(args) if arg is inner)
                made = _Caster(inner, self.rules).run(*args[at + 1 :], enable_io_processing=False)
                inner.recompile()
                return made
            if is_operator(n):
                self._cast_inputs(n)
                if self.rules.leaves_to_torch(n):
                    n.target = _under_autocast(n.target, self.rules.precision.compute)
        made = super().run_node(n)
        _check_no_fp64(n, made)
        return made

    def _cast_inputs(self, node: fx.Node) -> None:
        sources = [a for a in node.all_input_nodes if _eligible(self.env[a])]
        dtype = self.rules.dtype_for(node, [self.env[a] for a in sources])
        if dtype is None or all(self.env[a].dtype is dtype for a in sources):
            return
        if dtype is torch.float32 and _name(node) in TO_FP32_BY_DTYPE and _set_dtype(node, dtype):
            return
        made = {a: self._cast(a, dtype, node) for a in sources if self.env[a].dtype is not dtype}
        node.args = fx.node.map_arg(node.args, lambda a: made.get(a, a))
        node.kwargs = fx.node.map_arg(node.kwargs, lambda a: made.get(a, a))

    def _cast(self, source: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        value = self.env[source]
        is_param = isinstance(value, torch.nn.Parameter)
        key = (id(value), dtype)
        if is_param and key in self.params:
            return self.params[key]
        with self.graph.inserting_before(reader):
            cast = self.graph.call_function(_TO, (source, dtype))
        stack = {k: v for k, v in reader.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self.env[cast] = made = _TO(value, dtype)
        cast.meta = {**stack, "val": made}
        if is_param:
            self.params[key] = cast
        self.rules.counts["param" if is_param else "cast"] += 1
        return cast


def _under_autocast(op: Any, dtype: torch.dtype) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        kind = next(leaf.device.type for leaf in leaves if torch.is_tensor(leaf))
        with torch.autocast(kind, dtype):
            return op(*args, **kwargs)

    return call


def _name(node: fx.Node) -> str:
    target: Any = node.target
    namespace, _, name = target._schema.name.partition("::")
    return str(name) if namespace == "aten" else ""


def _submodule(node: fx.Node, env: dict[fx.Node, Any]) -> fx.GraphModule | None:
    """The graph that runs under no_grad or is checkpointed. What other higher-order operators run
    is cast by torch, if at all: in a region with an autocast of its own as the model says."""
    name = str(node.target)
    if "wrap_with_set_grad_enabled" not in name and "checkpoint" not in name:
        return None
    found = (env[a] for a in node.all_input_nodes if a.op == "get_attr")
    return next((value for value in found if isinstance(value, fx.GraphModule)), None)


def _eligible(value: object) -> bool:
    """As autocast has it: floating point, but not fp64."""
    dtype = value.dtype if isinstance(value, torch.Tensor) else None
    return dtype is not None and dtype.is_floating_point and dtype is not torch.float64


def _set_dtype(node: fx.Node, dtype: torch.dtype) -> bool:
    """Tell an operator in which dtype to compute, unless the model did; False if it cannot be."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    if "dtype" not in names:
        return False
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("dtype") is None:
        node.args, node.kwargs = (), given | {"dtype": dtype}
    return True


def _check_no_fp64(node: fx.Node, made: object) -> None:
    def doubles(value: object) -> Collection[torch.Tensor]:
        return [t for t in tensors(value) if t.dtype is torch.float64]

    if doubles(made) and not doubles(node.meta.get("val")) and "val" in node.meta:
        raise VerificationError(f"{node} became fp64")
