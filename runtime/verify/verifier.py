"""Runs the first steps beside a plain copy of the model, on the rank that has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...compiler.capture import batch as batches
from ...compiler.capture.batch import BatchSpec
from ...compiler.ir.errors import BatchError, OptionError, VerifyError
from ...compiler.ir.ops import mix
from ...compiler.options.options import CompileOptions
from ...compiler.rows.loss import Weights
from ...compiler.rows.outputs import LOSS
from ..exchange.agreement import Agreement
from ..transport.mesh import Mesh
from .plain import Leaves, Outcome, Plain
from .report import Report

CLOSE = 1e-3  # of what may round otherwise
MOVED = 1e-2  # of parameters that are moved by it: small gradients may change their sign
FUSED = 1e-5  # of evaluation in fused kernels
OUTPUTS = 1e-4  # of the outputs of a whole batch: kernels round by its size


class Verifier:
    """Of one pipeline.

    Args:
        model: the user's; copied on rank 0.
        options: as the pipeline was compiled; ``verify`` says how many steps.
        device: of the copy; None on ranks that have none.

    Attributes:
        report: what was compared, on rank 0; of other ranks it is empty.

    Raises:
        OptionError: what cannot be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        options: CompileOptions,
        agreement: Agreement,
        mesh: Mesh,
        device: torch.device | None,
    ):
        self._options, self._agreement, self._mesh = options, agreement, mesh
        _check(options)
        self.report = Report(model, *_tolerance(options))
        self._plain = agreement.together(
            lambda: None if device is None else Plain(model, options, device), OptionError
        )
        self._done = 0
        self._expected: Outcome | None = None
        self._weights: Weights | None = None
        self._shares: list[Sequence[Leaves]] = []
        self._spec: BatchSpec | None = None

    @property
    def active(self) -> bool:
        """Whether the next step is compared."""
        return self._done < self._options.verify

    def begin(
        self,
        mine: Mapping[int, Sequence[Leaves]],
        spec: BatchSpec,
        seed: int,
        step: int,
        weights: Weights,
        eager: Collection[str] = (),
        updated: Collection[str] = (),
        in_pieces: bool = False,
    ) -> None:
        """A batch is about to be trained on; a collective, as all of these are.

        Args:
            mine: replica -> the leaves of its microbatches, of those that this process deals out.
            spec: of a microbatch.
            seed, step: what the pipeline draws from.
            weights: what microbatches count.
            eager: submodules that run eagerly and draw: each call from one seed.
            updated: frozen parameters that forward updates, which replicas have as buffers.
            in_pieces: its losses are computed without all of their logits.

        Raises:
            BatchError: terms of the loss count differently, which plain PyTorch cannot follow.
        """
        if not weights.even:
            raise BatchError(
                "verify= compares with plain PyTorch, which cannot weigh the terms of one loss "
                "apart, as this batch asks for: give batches whose microbatches keep as many "
                'labels, or loss_normalization="microbatch", while it compares'
            )
        if in_pieces:
            self.report.allow(CLOSE, f"chunked_loss={self._options.chunked_loss} adds by pieces")
        here = {r: [[leaf.cpu() for leaf in p] for p in pieces] for r, pieces in mine.items()}
        merged = {r: each for part in self._agreement.gather(here) for r, each in part.items()}
        self._shares, self._spec = [merged[replica] for replica in sorted(merged)], spec
        counts = [len(pieces) for pieces in self._shares]
        seeds = [[mix(seed, step, r, i) for i in range(n)] for r, n in enumerate(counts)]
        self._weights = weights = weights.first(counts)
        plain = self._plain
        self._expected = self._agreement.together(
            lambda: (
                None
                if plain is None
                else plain.step(self._shares, spec, seeds, weights, eager, updated)
            ),
            VerifyError,
        )

    def computed(self, loss: torch.Tensor, params: Mapping[str, nn.Parameter]) -> None:
        """It was run forward and backward."""
        parts = self._gathered({n: p.grad for n, p in params.items() if p.grad is not None})
        if self._expected is not None:
            self._compare("loss", {"loss": loss}, {"loss": self._expected.loss})
            like = self._expected.grads
            grads = {n: _whole(parts[n], like[n]) if n in like else parts[n][0] for n in parts}
            self._compare("gradients", grads, like)
        self._judge()

    def stepped(self, norm: torch.Tensor | None, state: Mapping[str, Any]) -> None:
        """The optimizer has stepped.

        Args:
            norm: of the gradients; None where they are not clipped.
            state: of the pipeline, under the names of the model.
        """
        expected = self._expected
        if expected is not None:
            if norm is not None and expected.norm is not None:
                self._compare("norm", {"norm": norm}, {"norm": expected.norm})
            for what, values in (("parameters", expected.params), ("buffers", expected.buffers)):
                first = {name: value for name, value in values.items() if name in state}
                self._compare(
                    what, {n: self._as_read(state[n], v) for n, v in first.items()}, first
                )
        self._judge()
        self._done += 1

    def _as_read(self, held: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """A buffer, or a parameter, in the dtype that the plain model has it in."""
        mixed = self._options.mixed
        return held if mixed is None or mixed.narrows is None else held.to(read.dtype)

    def evaluated(self, loss: torch.Tensor) -> None:
        """After the last step, the same batch in evaluation."""
        if self._plain is not None and self._spec is not None:
            assert self._weights is not None
            expected = self._plain.evaluate(self._shares, self._spec, self._weights)
            self._compare("evaluation", {"loss": loss}, {"loss": expected})
            if self._plain.fuses:
                self.report.notes.append(
                    f"differences of {FUSED:.0e} are allowed in evaluation, where torch computes "
                    "nn.TransformerEncoderLayer in one kernel (torch.backends.mha), which rounds "
                    "otherwise"
                )
        self._judge()

    def returned(self, output: Any, why_not: str = "") -> None:
        """And what the model returns for it.

        Args:
            output: on the ranks that have it.
            why_not: why nobody has.
        """
        mine = None
        if output is not None:
            named = batches.flatten_results(output)[0]
            mine = {name: value.cpu() for name, value in named.items()}
        found = [each for each in self._agreement.gather(mine) if each is not None]
        plain, spec = self._plain, self._spec
        if why_not:
            self.report.notes.append(f"outputs were not compared: {why_not}")
        elif spec is not None and spec.scales is not None:
            self.report.notes.append("outputs were not compared: cut= has cut the batch")
        elif plain is not None and plain.evaluation_updates:
            self.report.notes.append("outputs were not compared: evaluation updates buffers")
        elif plain is not None and spec is not None:
            shares = (
                self._shares if len(found) > 1 else [[p for share in self._shares for p in share]]
            )
            for output, share in zip(found, shares, strict=True):  # of each replica, or of all
                self._compare_outputs(output, plain, share, spec)
        self._judge()

    def _compare_outputs(
        self,
        found: dict[str, torch.Tensor],
        plain: Plain,
        pieces: Sequence[Leaves],
        spec: BatchSpec,
    ) -> None:
        whole = [
            torch.cat(rows) if rows[0].dim() else rows[0] for rows in zip(*pieces, strict=True)
        ]
        named = batches.flatten_results(plain.outputs(whole, spec.repeat(len(pieces))))[0]
        for each in (found, named):
            each.pop(LOSS, None)  # that of a batch is the mean over its microbatches
        tolerance = max(OUTPUTS, self.report.tolerance)
        self.report.compare(self._done, "outputs", found, named, tolerance)

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        if not expected:
            return
        evaluates, tolerance = what == "evaluation", self.report.tolerance
        if evaluates and self._plain is not None and self._plain.fuses:
            tolerance = max(tolerance, FUSED)
        elif what == "parameters" and tolerance:
            tolerance = MOVED
        step = self._done if evaluates else self._done + 1
        self.report.compare(step, what, found, expected, tolerance)

    def _judge(self) -> None:
        """Raises VerifyError on every rank, if something is wrong."""
        wrong = self.report.wrong
        text = None
        if wrong is not None:
            text = f"{self.report.difference()}\n{self.report.summary()}"
        first = self._agreement.gather(text)[0]
        if first is not None:
            raise VerifyError(
                f"the pipeline and the model in one process differ: {first}\nPlease report it "
                "with the model; verify=0 trains without the comparison"
            )

    def _gathered(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """What the replicas have, in their order, by name; on every rank."""
        mine = {name: each.detach().cpu().clone() for name, each in tensors.items()}
        found: dict[str, dict[int, torch.Tensor]] = {}
        for rank, part in enumerate(self._agreement.gather(mine)):
            for name, tensor in part.items():
                found.setdefault(name, {}).setdefault(self._mesh.replica_of(rank), tensor)
        return {name: [each[r] for r in sorted(each)] for name, each in found.items()}


def _whole(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """One replica's tensor, or the rows of all where they divide it."""
    return parts[0] if parts[0].shape == like.shape else torch.cat(list(parts))


def _check(options: CompileOptions) -> None:
    if options.optimizer is None:
        raise OptionError("verify= compares whole steps: give compile() an optimizer=")
    if options.mixed is not None and options.mixed.compute is torch.float16:
        raise OptionError(
            "verify= does not know when one process would skip a step of fp16: verify the model in "
            "fp32 or bf16"
        )
    if options.weights is not None:
        raise OptionError("verify= compares with the model's own weights: leave weights= out")


def _tolerance(options: CompileOptions) -> tuple[float, str]:
    reasons = []
    if options.zero not in (0, 1) and options.dp > 1:
        reasons.append(f"zero={options.zero} adds gradients in another order")
    elif options.zero == 1 and options.dp > 1 and options.max_grad_norm is not None:
        reasons.append("zero=1 takes the norm of rows")
    if options.tied_grads == "per_step" and options.stage_count > 1:
        reasons.append('tied_grads="per_step" adds parts of tied gradients in another order')
    if options.mixed is not None and options.mixed.autocasts is not None:
        reasons.append("reduced precision")
    if options.fuses:
        reasons.append('backend="inductor" rounds in fused kernels')
    return (CLOSE if reasons else 0.0), "; ".join(reasons)
