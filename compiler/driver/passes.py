"""Every pass of the compiler, in order: reading this file is reading the compiler.

=========  ===================================  ================================================
level      what its passes get                  where that comes from
=========  ===================================  ================================================
forward    `Exported`, the forward graph        torch.export (`compiler.capture`)
joint      `Joint`, with the derivative in it   AOTAutograd (`compiler.capture`)
placed     `Work`: every node has a stage       the planner's decision (`compiler.planning`)
programs   `Work` with stage programs           `lower`
schedule   `Work` with actions per rank         `schedule`
=========  ===================================  ================================================

A pass changes what it gets and returns a note. Then its checks run, and what it made is dumped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from ...passes.attention.kernels import choose_kernels
from ...passes.attention.restore import restore_attention
from ...passes.graph import autocast, boundary, operators
from ...passes.graph.carry import carry_sums, has_regions
from ...passes.graph.casts import is_widening, read_copies, settle_casts
from ...passes.graph.joins import copy_where_nothing_is_joined
from ...passes.graph.latest import read_once
from ...passes.graph.remat import rematerialise
from ...passes.graph.verify import verify_graph, verify_placement
from ...passes.losses.chunk_gradients import split_chunks
from ...passes.losses.chunks import chunk_losses, chunk_rows
from ...passes.programs.fusions import fuse
from ...passes.programs.gather import gather_parameters
from ...passes.programs.inplace import reuse_memory
from ...passes.programs.lower import lower
from ...passes.programs.verify import verify_program, verify_writes
from ...passes.schedule.communication import add_communication
from ...passes.schedule.exchange import add_exchange, verify_exchange
from ...passes.schedule.forward_only import forward_only
from ...passes.schedule.limits import verify_in_flight
from ...passes.schedule.verify import verify_compute, verify_schedule
from ..ir.actions import Schedule, to_text
from ..ir.errors import OptionError
from ..ir.program import Message, PipelineProgram
from ..memory.rank_memory import RankMemory
from ..planning.advice import gib
from ..planning.ordering import Ordering, has_order
from .record import Texts, texts_of
from .work import Exported, Joint, Work

W = TypeVar("W")


@dataclass(frozen=True)
class Pass(Generic[W]):
    """One step.

    Attributes:
        run: changes what it gets; returns what it did in one line, "" for nothing to say.
        verify: raise VerificationError where the result is not legal.
        dump: what makes readable texts of the result, by file name suffix.
        when: whether there is anything for it to do.
        needed: why it cannot be skipped; "" if it can.
        told: whether its note stands in the plan.
    """

    name: str
    run: Callable[[W], str]
    verify: Sequence[Callable[[W], None]] = ()
    dump: Callable[[W], Texts] = lambda _: {}
    when: Callable[[W], bool] = lambda _: True
    needed: str = ""
    told: bool = True


def _narrows_params(work: Exported | Joint) -> bool:
    return work.mixed is not None and work.mixed.narrows is not None


# -- forward graph --------------------------------------------------------------------------------


def _autocast(work: Exported) -> str:
    assert work.mixed is not None
    return autocast.insert_casts(work.module, work.leaves, work.mixed, work.device)


def _operators(work: Exported) -> str:
    assert work.mixed is not None
    return operators.compute_in_fp32(work.module, work.mixed.fp32)


def _chunks(work: Exported) -> str:
    assert work.chunks is not None
    return chunk_losses(work.module, work.chunks.rows, work.chunks.asked)


FORWARD: tuple[Pass[Exported], ...] = (
    Pass("attention", lambda work: restore_attention(work.module, work.leaves), told=False),
    Pass("joins", lambda w: copy_where_nothing_is_joined(w.module, w.leaves), told=False),
    Pass(
        "autocast",
        _autocast,
        when=lambda work: work.mixed is not None and work.mixed.autocasts is not None,
        needed="it makes the casts that precision= asks for",
        told=False,
    ),
    Pass(
        "operators",
        _operators,
        when=lambda work: _narrows_params(work) and bool(work.mixed and work.mixed.fp32),
        needed="it makes the casts that precision= asks for",
        told=False,
    ),
    Pass(
        "chunks",
        _chunks,
        when=lambda work: work.chunks is not None,
        needed="chunked_loss= asks for it",
    ),
    Pass(
        "kernels",
        lambda work: choose_kernels(work.module),
        when=lambda work: work.device == "cuda" and work.leaves[0].device.type == "cpu",
        told=False,
    ),
)


# -- joint graph ----------------------------------------------------------------------------------


def _precision(work: Joint) -> str:
    assert work.mixed is not None
    return f"{work.mixed}: {settle_casts(work.graph, work.mixed.compute)}"


def _masters(work: Joint) -> str:
    return read_copies(work.graph, work.held)


def _updates_buffers(work: Joint) -> bool:
    return bool(work.graph.mutations)


def _latest(work: Joint) -> str:
    return f"{read_once(work.graph)} buffers read before they are updated"


def _carried(work: Joint) -> str:
    return f"{carry_sums(work.graph)} sums of gradients go through regions"


def _chunk_gradients(work: Joint) -> str:
    return split_chunks(work.graph)


JOINT: tuple[Pass[Joint], ...] = (
    Pass(
        "chunk_gradients",
        _chunk_gradients,
        verify=(lambda work: verify_graph(work.graph),),
        when=lambda work: work.splits and bool(chunk_rows(work.graph.graph)),
        needed="weight gradients belong where the schedule runs them",
        told=False,
    ),
    Pass(
        "masters",
        _masters,
        verify=(lambda work: verify_graph(work.graph),),
        when=_narrows_params,
        needed="programs read parameters in another dtype than they are held in",
        told=False,
    ),
    Pass(
        "carry",
        _carried,
        verify=(lambda work: verify_graph(work.graph),),
        when=lambda work: has_regions(work.graph),
        needed="gradients would round otherwise than on one device",
        told=False,
    ),
    Pass(
        "latest",
        _latest,
        verify=(lambda work: verify_graph(work.graph),),
        when=_updates_buffers,
        needed="other microbatches would read what this one has written",
        told=False,
    ),
    Pass(
        "precision",
        _precision,
        verify=(lambda work: verify_graph(work.graph),),
        dump=lambda work: {".py": work.graph.text},
        when=lambda work: work.mixed is not None,
    ),
)


# -- placed graph ---------------------------------------------------------------------------------


def _verify_placed(work: Work) -> None:
    verify_graph(work.graph)
    verify_placement(work.graph, work.stage)


def _remat(work: Work) -> str:
    made = rematerialise(work.graph, work.locality, work.stage, work.recomputed)
    work.locality, work.stage, work.copies = made.locality, made.stage, made.copies
    return f"{len(made.copies)} operators computed again"


def _remat_texts(work: Work) -> Texts:
    lines = [f"stage {work.stage[copy]}  {node.name}" for copy, node in work.copies.items()]
    return {".txt": lambda: "\n".join(lines) + "\n"}


def _narrows(work: Work) -> bool:
    rounds = work.settings.options.boundary is not None
    return rounds or any(is_widening(node) for node in work.graph.graph.nodes)


def _boundary(work: Work) -> str:
    options = work.settings.options
    per_step = options.tied_grads == "per_step"
    made = boundary.narrow_crossings(
        work.graph, work.locality, work.stage, options.boundary, per_step
    )
    work.locality, work.stage = made.locality, made.stage
    options.compression.check_values(made.rounded, options.n_stages)
    return f"{len(made.inserted)} casts, so that what crosses is narrow"


PLACED: tuple[Pass[Work], ...] = (
    Pass("remat", _remat, verify=(_verify_placed,), dump=_remat_texts),
    Pass(
        "boundary",
        _boundary,
        verify=(_verify_placed,),
        when=_narrows,
        told=False,
    ),
)


# -- programs -------------------------------------------------------------------------------------


def _lower(work: Work) -> str:
    settings = work.settings
    work.program = work.whole = lower(
        work.graph,
        work.locality,
        work.stage,
        settings.options.stage_count,
        settings.options.tied_grads,
        split_backward=settings.schedule.splits_backward and work.graph.trains,
        keep_views=not settings.zero.divides_params,
    ).keeping(work.decision.kept)
    values = sum(len(message.values) for message in work.made.messages)
    return f"{values} boundary values in {len(work.made.messages)} messages"


def _inplace(work: Work) -> str:
    return str(reuse_memory(work.made, work.settings.device))


def _gather(work: Work) -> str:
    settings = work.settings
    owners = settings.footprint.owners(work.made)
    work.program = gather_parameters(work.made, settings.options.dp, owners)
    groups = sum(len(stage.groups) for stage in work.made.stages)
    return f"{groups} groups of parameters are made whole when they are read"


def _fuses(work: Work) -> bool:
    return work.settings.options.fuses


def _fuse(work: Work) -> str:
    fused = fuse(work.made)
    work.fused = fused.program
    whose = "eager kernels where not measured" if work.settings.rates.table is None else "these"
    return f"{fused}, compiled by Inductor; seconds are those of {whose}"


PROGRAMS: tuple[Pass[Work], ...] = (
    Pass(
        "lower",
        _lower,
        verify=(lambda work: verify_program(work.made),),
        dump=lambda work: texts_of(work.made),
        needed="it makes the programs",
    ),
    Pass(
        "inplace",
        _inplace,
        verify=(lambda work: verify_writes(work.made),),
        dump=lambda work: texts_of(work.made),
    ),
    Pass(
        "gather",
        _gather,
        verify=(lambda work: verify_program(work.made),),
        dump=lambda work: texts_of(work.made),
        when=lambda work: work.settings.zero.divides_params,
        needed="with zero=3 no rank has whole parameters for its programs to read",
    ),
    Pass(
        "fusions",
        _fuse,
        verify=(lambda work: verify_program(work.running),),
        dump=lambda work: texts_of(work.running),
        when=_fuses,
        needed='backend="inductor" compiles what it makes',
    ),
)


# -- schedule -------------------------------------------------------------------------------------


def _schedule(work: Work) -> str:
    settings, program = work.settings, work.made
    m = settings.microbatches
    if not program.trains:
        work.schedule = forward_only(settings.shape)
        return f"forward only, {m} microbatches"
    splits = tuple(stage.weight is not None for stage in program.stages)
    shape = replace(settings.shape, splits=splits)
    named = f"{settings.schedule.name}, {m} microbatches"
    if not settings.schedule.searches or settings.drafts:
        work.schedule = settings.schedule.order(shape)
        return named
    order = work.order if work.pace is None else work.pace.order
    if order is not None and has_order(order, shape):
        work.schedule = order
        return f"{named}, in the order that was decided"
    found = Ordering(
        settings.schedule,
        shape,
        program,
        work.timing,
        lambda schedule: _peaks(work, schedule),
        settings.options.schedule_memory,
        settings.budgets,
    ).search()
    work.schedule = found.schedule
    return f"{named}, {found.note}"


def _peaks(work: Work, order: Schedule) -> tuple[RankMemory, ...]:
    """Memory of every rank, if the compute actions are in this order."""
    settings, program = work.settings, work.made
    schedule = add_communication(order, program.messages, *work.seconds())
    if _exchanges(program, settings.options.dp):
        schedule = add_exchange(schedule, program, settings.options.dp, settings.zero)
    return work.memories(schedule)


def _communication(work: Work) -> str:
    before = sum(map(len, work.schedule))
    work.schedule = add_communication(work.schedule, work.made.messages, *work.seconds())
    return f"{sum(map(len, work.schedule)) - before} sends and receives per replica"


def _exchange(work: Work) -> str:
    before = sum(map(len, work.schedule))
    settings = work.settings
    work.schedule = add_exchange(work.schedule, work.made, settings.options.dp, settings.zero)
    return f"{sum(map(len, work.schedule)) - before} exchanges per replica"


def _legality(work: Work) -> tuple[Schedule, Sequence[Message], int, bool, list[int]]:
    program = work.made
    weights = [code.stage for code in program.stages if code.weight is not None]
    microbatches, trains = work.settings.microbatches, program.trains
    return work.schedule, program.messages, microbatches, trains, weights


def _verify_schedule(work: Work) -> None:
    program = work.made
    verify_schedule(*_legality(work))
    if program.trains and not work.settings.schedule.searches:
        verify_in_flight(work.schedule, work.settings.in_flight)


def _verify_exchange(work: Work) -> None:
    verify_exchange(work.schedule, work.made, work.settings.options.dp, work.settings.zero)


def _schedule_texts(work: Work) -> Texts:
    schedule = work.schedule
    return {".txt": lambda: to_text(schedule) + "\n"}


def _memory(work: Work) -> str:
    work.memory = work.memories(work.schedule)
    worst = max(work.memory, key=lambda memory: memory.peak_bytes)
    return f"at most {gib(worst.peak_bytes)}, in {worst.peak_at}"


def _exchanges(program: PipelineProgram, dp: int) -> bool:
    return dp > 1 or (program.trains and bool(program.tied))


SCHEDULE: tuple[Pass[Work], ...] = (
    Pass(
        "schedule",
        _schedule,
        verify=(lambda work: verify_compute(*_legality(work)),),
        dump=_schedule_texts,
        needed="it makes the actions that ranks carry out",
    ),
    Pass(
        "communication",
        _communication,
        verify=(_verify_schedule,),
        dump=_schedule_texts,
        needed="it adds the sends and receives that ranks would wait for",
        told=False,
    ),
    Pass(
        "exchange",
        _exchange,
        verify=(_verify_schedule, _verify_exchange),
        dump=_schedule_texts,
        when=lambda work: _exchanges(work.made, work.settings.options.dp),
        needed="without it replicas and tied weights would drift apart",
        told=False,
    ),
    Pass("memory", _memory, needed="plans and budgets are judged by it"),
)


ALL: tuple[Pass[Any], ...] = (*FORWARD, *JOINT, *PLACED, *PROGRAMS, *SCHEDULE)


def check_skip(names: Collection[str]) -> None:
    """Raises OptionError for a pass that does not exist, or that cannot be left out."""
    known = {each.name: each for each in ALL}
    optional = ", ".join(each.name for each in ALL if not each.needed)
    for name in names:
        if name not in known:
            raise OptionError(f"skip={name!r}: there is no such pass; {optional} can be skipped")
        if known[name].needed:
            raise OptionError(f"skip={name!r}: {known[name].needed}; {optional} can be skipped")
