"""The tables of a model of which the rows that a step touches travel, or are stepped, alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..compression.methods import OFF
from ..compression.tables import lookups_of, why_none
from ..ir.errors import OptionError
from ..ir.graph import JointGraph
from ..memory.optimizer_cost import Factory
from ..options.options import CompileOptions
from ..profiling.touched_rows import steps_rows, why_whole


class Tables:
    """Those of one model, which its first graph tells.

    Args:
        params: FQN -> a parameter, of which only shape and dtype matter.

    Attributes:
        names: FQNs; none before the first graph, and where rows are not asked for.
        stepped: FQNs of those of which the optimizer is given the touched rows alone.
    """

    def __init__(self, options: CompileOptions, params: Mapping[str, nn.Parameter]):
        self._options = options
        self.names = self.stepped = frozenset[str]()
        self._trained = {name: param for name, param in params.items() if param.requires_grad}

    def lookups(self, graph: JointGraph) -> dict[str, int]:
        """FQN -> how many rows a microbatch of this graph touches at most.

        Raises:
            OptionError: the first graph has no table, or the optimizer takes sparse gradients of
                none.
        """
        if self._options.sparse_embeddings == OFF:
            return {}
        found = lookups_of(graph, self._trained)
        if not self.names:
            self._begin(graph, frozenset(found))
        return {name: found.get(name, len(self._trained[name])) for name in sorted(self.names)}

    def _begin(self, graph: JointGraph, names: frozenset[str]) -> None:
        if not names:
            why = why_none(graph, self._trained)
            raise OptionError(
                f'sparse_embeddings="{self._options.sparse_embeddings}" has no effect on this '
                "model: of no trained parameter rows are looked up and nothing else is read"
                f"{f' ({why}, so that its gradient has all rows)' if why else ''}: leave it out"
            )
        self.names = names
        if self._options.sparse_embeddings == "step" and self._options.optimizer is not None:
            factory, params = self._options.optimizer, self._trained
            whys = {name: why_whole(factory, params, name) for name in sorted(names)}
            self.stepped = frozenset(name for name in names if not whys[name])
            if not self.stepped:
                largest = max(sorted(names), key=lambda name: params[name].numel())
                raise OptionError(
                    'sparse_embeddings="step" gives the optimizer sparse gradients, and '
                    f"{whys[largest]}: give one that takes them, such as "
                    f'pipecompile.Several(("{largest}", torch.optim.SparseAdam), ("*", '
                    'torch.optim.AdamW)), or sparse_embeddings="exchange", which goes with every '
                    "optimizer"
                )

    def optimizer(self, touched: Mapping[str, int] | None = None) -> Factory | None:
        """The optimizer as plans try it.

        Args:
            touched: FQN -> rows of a table that a replica touches per step at most; None for the
                rows in which there are numbers.
        """
        factory = self._options.optimizer
        if factory is None or not self.stepped:
            return factory
        dp = self._options.dp
        shares = {
            name: min(1.0, count * dp / max(1, len(self._trained[name])))
            for name, count in (touched or {}).items()
        }
        return steps_rows(factory, self.stepped, shares)
