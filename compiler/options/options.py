"""The options of one compilation: checked, with the number of stages and replicas known."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch

from ...passes.generators.shape import PipelineShape
from ...passes.schedule.from_file import kind_of
from ...passes.schedule.load import Load
from ...passes.schedule.registry import SCHEDULES, ScheduleKind
from ..compression.methods import OFF, Compression, parse_compression
from ..costs.topology import ORDERS, Numbering
from ..ir.errors import OptionError
from ..ir.precision import Precision, parse_precision
from . import checks
from .arguments import REPLICAS, STAGES, Arguments, Options
from .checks import ZERO
from .declaration import declarations_of
from .parsing import AUTO, parse_bytes

OF_SCHEDULE = ("schedule", "virtual_stages", "schedule_memory")
"""Options that say how microbatches are ordered."""

OF_TRAINING = {
    "optimizer": "nothing is trained",
    "lr_scheduler": "nothing is trained",
    "max_grad_norm": "there are no gradients",
    "tied_grads": "there are no gradients",
    "verify": "there are no steps to compare",
    "schedule": "every rank runs its forwards in order",
    "virtual_stages": "every rank has one stage",
    "schedule_memory": "every rank runs its forwards in order",
    "remat": "there is no backward that computes anything again",
    "chunked_loss": "outputs are whole",
    "zero": "there are no gradients and optimizer states to divide, and each stage has its weights",
    "zero_by": "there is nothing to divide",
    "zero_keep": "there is nothing to divide",
    "sparse_embeddings": "there are no gradients",
}
"""Options that inference has no use for -> why."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions(Options):
    """See `pipecompile.compile` for what each means.

    Raises:
        OptionError: one that is impossible, or has no effect beside the others.
    """

    n_stages: int = field(metadata=STAGES)
    dp: int = field(default=1, metadata=REPLICAS)

    @staticmethod
    def of(arguments: Arguments) -> CompileOptions:
        """Those that `compile` was given; of what is automatic the simplest."""
        own = declarations_of(Options)
        shared = {each.name: getattr(arguments, each.name) for each in fields(Options)}
        n_stages = 1 if arguments.n_stages == AUTO else arguments.n_stages
        dp = 1 if arguments.dp is None else arguments.dp
        given = shared | {"n_stages": n_stages, "dp": dp}
        if arguments.schedule == AUTO:  # what is asked of all is not asked of the simplest
            given |= {name: own[name].default for name in OF_SCHEDULE}
        return CompileOptions(**given)

    def __post_init__(self) -> None:
        for option in declarations_of(type(self)).values():
            option.check_value(getattr(self, option.name))
        if not self.training:
            self._check_inference()
        self._check_virtual()
        self._check_pin()
        if self.n_stages * self.dp > checks.MOST:
            raise OptionError(
                f"n_stages={self.n_stages} × dp={self.dp} are {self.n_stages * self.dp} ranks, "
                f"and there can be at most {checks.MOST}"
            )
        if self.costs == "profile" and self.hardware is not None:
            raise OptionError(
                'costs="profile" measures the device at hand: hardware= has no effect beside it'
            )
        if self.plan is not None:
            self._check_beside_plan()
        if self.zero == 0 and self.zero_by != AUTO:
            raise OptionError(
                f'zero_by="{self.zero_by}" has no effect with zero=0, which divides nothing: give '
                'zero=1, 2, 3 or "auto", or leave it out'
            )
        self._check_kept()
        self._check_graphs()
        self._check_compression()
        self._check_embeddings()
        if self.loss_weight is not None and self.loss_normalization == "microbatch":
            raise OptionError(
                'loss_weight= has no effect with loss_normalization="microbatch", which lets all '
                "microbatches count as much: leave one of them out"
            )
        if self.optimizer is None:
            for name in ("lr_scheduler", "max_grad_norm"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"{name} has no effect without optimizer=: give one, or call "
                        "clip_grad_norm_ and your scheduler in your own loop"
                    )

    def _check_inference(self) -> None:
        declared = declarations_of(type(self))
        for name, why in OF_TRAINING.items():
            idle = [declared[name].default, *([1] if name == "virtual_stages" else ())]
            if getattr(self, name) not in idle:
                raise OptionError(f"{name}= has no effect with training=False: {why}")
        dtypes = self.dtypes
        if dtypes is not None and dtypes.grads is not torch.float32:
            raise OptionError(
                "Precision(grads=) has no effect with training=False: there are no gradients"
            )

    def _check_virtual(self) -> None:
        if self.schedule_memory != AUTO and not self.kind.takes_limit:
            raise OptionError(
                f'schedule_memory="{self.schedule_memory}" has no effect with '
                f'schedule="{self.schedule}", whose memory follows from its order: use it with "zb"'
            )
        allowed = self.kind.virtual
        if self.virtual_stages is None or allowed is None or self.virtual_stages in allowed:
            return
        others = [
            f'"{kind.name}"'
            for kind in SCHEDULES.values()
            if kind.virtual is None or self.virtual_stages in kind.virtual
        ]
        instead = f"; {' and '.join(others)} can have {self.virtual_stages}" if others else ""
        raise OptionError(
            f'virtual_stages={self.virtual_stages}: schedule="{self.schedule}" deals '
            f"{' or '.join(map(str, allowed))} to each rank{instead}"
        )

    def _check_kept(self) -> None:
        given = f'zero_keep="{self.zero_keep}"'
        if self.zero_keep != AUTO and self.zero in (0, 1):
            raise OptionError(
                f"{given} has no effect with zero={self.zero}, where replicas exchange once per "
                'step: give zero=2, 3 or "auto", or leave it out'
            )
        if self.zero_keep == "gradients" and self.zero != 3:
            other = "at level 2 that is zero=1" if self.zero == 2 else "it is for one level"
            raise OptionError(
                f"{given} goes with zero=3 alone: {other}. Give zero=1 or 3, or "
                'zero_keep="auto" with memory='
            )

    def _check_graphs(self) -> None:
        if self.cudagraphs is not True:
            return
        if not isinstance(self.dynamic, str):
            raise OptionError(
                "cudagraphs=True records programs for one shape, and dynamic= announces ranges of "
                'sizes: leave one of them out, or give cudagraphs="auto"'
            )
        if self.zero in (2, 3):
            raise OptionError(
                f"cudagraphs=True cannot record what replicas exchange while programs run, as they "
                f'do with zero={self.zero}: give zero=0 or 1, or cudagraphs="auto"'
            )

    def _check_compression(self) -> None:
        gradients, values = self.compression.gradients, self.compression.values
        if values is not None and self.dtypes is not None and self.dtypes.boundary is not None:
            raise OptionError(
                f'compress={{"values": "{values}"}} and Precision(boundary=) both say in which '
                "dtype values travel between stages: leave one of them out"
            )
        if self.verify and (gradients or values):
            raise OptionError(
                f'compress="{self.compression}" rounds what travels, and verify={self.verify} '
                "compares with one process, where nothing does: verify without, then compress"
            )
        if gradients is None:
            return
        given = f'compress={{"gradients": "{gradients}"}}'
        if not self.training:
            raise OptionError(f"{given} has no effect with training=False: there are no gradients")
        if self.zero not in (0, 1):
            raise OptionError(
                f"{given} is for gradients that add up on every replica and are exchanged once per "
                f"step, and zero={self.zero!r} has each microbatch's leave at once: give zero=0 or "
                "1, or leave the gradients as they are"
            )

    def _check_embeddings(self) -> None:
        given = f'sparse_embeddings="{self.sparse_embeddings}"'
        if self.sparse_embeddings == OFF:
            return
        if self.zero != 0:
            raise OptionError(
                f"{given} is for gradients that every replica has whole, and zero={self.zero!r} "
                "divides their rows: give zero=0, or leave it out"
            )
        if self.sparse_embeddings != "step":
            return
        if self.optimizer is None:
            raise OptionError(
                f"{given} has no effect without optimizer=, which is given the rows: give one, or "
                'sparse_embeddings="exchange"'
            )
        if self.verify:
            raise OptionError(
                f"{given} gives the optimizer sparse gradients, and verify={self.verify} compares "
                'with one that has whole ones: verify with "exchange", or leave one of them out'
            )

    def _check_pin(self) -> None:
        for name, stage in (self.pin or {}).items():
            if not 0 <= stage < self.stage_count:
                raise OptionError(
                    f"pin={{{name!r}: {stage!r}}}: stages are 0 to {self.stage_count - 1}"
                )

    def _check_beside_plan(self) -> None:
        for name, option in declarations_of(type(self)).items():
            if option.plan == "decides" and getattr(self, name) != option.default:
                raise OptionError(
                    f"{name}= has no effect beside plan=: the plan has decided already"
                )

    def check_shared(self) -> None:
        """Raises OptionError where what is to be divided or compressed has nowhere to go: there is
        one replica, or one stage."""
        gradients, values = self.compression.gradients, self.compression.values
        if gradients is not None and self.dp == 1:
            raise OptionError(
                f'compress={{"gradients": "{gradients}"}} has no effect with dp=1, as there are no '
                "replicas to send gradients to: give dp=2 or more, or leave it out"
            )
        if values is not None and self.n_stages == 1:
            raise OptionError(
                f'compress={{"values": "{values}"}} has no effect with n_stages=1, as nothing is '
                "sent between stages: give n_stages=2 or more, or leave it out"
            )
        if self.sparse_embeddings == "exchange" and self.dp == 1:
            raise OptionError(
                'sparse_embeddings="exchange" has no effect with dp=1, as there are no replicas to '
                'exchange gradients with: give dp=2 or more, "step", or leave it out'
            )
        if self.zero not in (0, "auto") and self.dp == 1:
            raise OptionError(
                f"zero={self.zero} has no effect with dp=1, as there are no replicas to divide "
                "anything among: give dp=2 or more, or leave it out"
            )

    def check_placement(self) -> None:
        """Raises OptionError where all ranks that are neighbours have the same in common."""
        if self.placement != AUTO and (self.n_stages == 1 or self.dp == 1):
            one = "n_stages" if self.n_stages == 1 else "dp"
            raise OptionError(
                f'placement="{self.placement}" has no effect with {one}=1: it says whether ranks '
                "of a replica or replicas of a stage share a machine: leave it out"
            )

    @property
    def fuses(self) -> bool:
        """Whether runs of operators are compiled as a whole."""
        return self.backend == "inductor"

    @property
    def numbering(self) -> Numbering:
        """Of the ranks; where nothing was chosen those of a replica are neighbours."""
        order = ORDERS[0] if self.placement == AUTO else self.placement
        return Numbering(self.n_stages, self.dp, order)

    def in_plan(self) -> dict[str, str]:
        """What `Plan.options` holds: a plan is used again only where these are equal."""
        return {
            name: option.in_plan(getattr(self, name))
            for name, option in declarations_of(type(self)).items()
            if option.plan == "keeps"
        }

    def compared(self) -> dict[str, object]:
        """Option -> what must be equal on all ranks."""
        return {
            name: option.compared(name, self)
            for name, option in declarations_of(type(self)).items()
            if option.compared is not None
        }

    @cached_property
    def kind(self) -> ScheduleKind:
        """Of the schedule."""
        return kind_of(self.schedule)

    @property
    def virtual(self) -> int:
        """How many stages a rank holds."""
        return self.virtual_stages or self.kind.usual_virtual

    @property
    def stage_count(self) -> int:
        """Into how many stages the model is divided."""
        return self.n_stages * self.virtual

    def shape(self, microbatches: int) -> PipelineShape:
        """The pipeline of a replica."""
        return self.kind.shape(self.n_stages, microbatches, self.virtual)

    def load(self, microbatches: int) -> Load:
        """What its schedule asks of ranks."""
        return self.kind.load(self.shape(microbatches))

    @property
    def zero_levels(self) -> tuple[int, ...]:
        """Those to try, in this order."""
        if self.dp == 1 or self.zero == 0:
            return (0,)
        return ZERO if self.zero == "auto" else (int(self.zero),)

    @property
    def dtypes(self) -> Precision | None:
        """The precision, whole; None where dtypes stay as they are."""
        return parse_precision(self.precision)

    @property
    def mixed(self) -> Precision | None:
        """The precision, if it computes in a dtype narrower than fp32."""
        dtypes = self.dtypes
        return dtypes if dtypes is not None and dtypes.casts else None

    @cached_property
    def compression(self) -> Compression:
        """What is compressed."""
        return parse_compression(self.compress)

    @property
    def boundary(self) -> torch.dtype | None:
        """In which fp32 values travel between stages; int8 with scales; None for as they are."""
        if (values := self.compression.values) is not None:
            return {"bf16": torch.bfloat16, "int8": torch.int8}[values.name]
        return None if self.dtypes is None else self.dtypes.boundary

    @property
    def measures(self) -> bool:
        """Whether prices are measured on the device at hand, and not taken from its peak rates.

        "auto" measures, unless the environment's PIPECOMPILE_COSTS says "roofline", or another
        device than the one at hand is planned for.
        """
        if self.costs != "auto":
            return self.costs == "profile"
        return self.hardware is None and os.environ.get("PIPECOMPILE_COSTS") != "roofline"

    @property
    def priced(self) -> str:
        """ "profile", "calibrated" or "roofline"."""
        if self.costs == "calibrated":
            return self.costs
        return "profile" if self.measures else "roofline"

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_bytes(self.memory, "memory")
