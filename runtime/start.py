"""From options to a running pipeline: how many stages, which ranks, which device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.capture.exports import Exports
from ..compiler.capture.skeleton import Skeleton, skeleton_of
from ..compiler.capture.whole import with_loss
from ..compiler.driver.auto import Open, listed, weighing
from ..compiler.driver.builder import Builder
from ..compiler.driver.capturing import Shared
from ..compiler.driver.record import prepare
from ..compiler.ir.errors import OptionError, StateError
from ..compiler.options.microbatches import cut, divide
from ..compiler.options.options import CompileOptions
from ..compiler.options.parsing import AUTO
from ..compiler.plan.plan import Plan
from ..compiler.search.search import search
from ..compiler.search.space import ways_of
from ..compiler.search.subject import Subject
from ..compiler.tensors.fakes import is_fake
from .exchange.agreement import Agreement
from .exchange.devices import choose_device
from .exchange.ranks import Ranks
from .graphs import choice
from .kernels.choice import settled
from .pipeline import Pipeline
from .transport.mesh import Mesh, make_mesh, world_size
from .weights.weight_files import WeightFiles
from .world import Planning, plain_torch


def start(model: nn.Module, options: CompileOptions, stays: bool = True) -> Pipeline:
    """The pipeline of n_stages × dp ranks, as this process was started.

    Args:
        stays: whether the division does; of one that others follow, what has nowhere to go now may
            have with those.
    """
    if stays:
        options.check_shared()
    mesh = _mesh(_as_planned(options))
    if mesh.dp > 1 and mesh.pp > 1:
        options = replace(options, placement=mesh.order)
    device = choose_device(options.device, mesh)
    options, why = settled(choice.settled(options, device), device)
    model = with_loss(model, options.loss_fn)
    with plain_torch(device):
        skeleton = _skeleton(model, device, options)
        return Pipeline(model, options, skeleton, mesh, device, {"backend": why})


def _mesh(options: CompileOptions) -> Mesh:
    placement, order = options.shape(1).placement, options.numbering.order
    return make_mesh(options.n_stages, options.dp, placement, order)


def _as_planned(options: CompileOptions) -> CompileOptions:
    """With the places of ranks that a plan has, unless the user has said others."""
    if options.plan is None or options.placement != AUTO or options.dp == 1:
        return options
    plan = options.plan if isinstance(options.plan, Plan) else Plan.load(options.plan)
    return replace(options, placement=plan.options.get("placement", AUTO))


def chooses_places(options: CompileOptions) -> bool:
    """Whether this run may number its ranks in one order or the other: several machines have
    both several stages and several replicas, and there is a batch to plan for."""
    free = options.placement == AUTO and options.plan is None and options.cut is None
    batch = options.example_batch is not None and options.pin is None
    if not (free and batch and options.n_stages > 1 and options.dp > 1 and world_size()):
        return False
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) < world_size()


def _skeleton(model: nn.Module, device: torch.device, options: CompileOptions) -> Skeleton:
    given = options.dtypes, options.eager_modules, options.training
    return skeleton_of(model, device, *given)


def start_best(model: nn.Module, options: CompileOptions, open_: Open) -> Pipeline:
    """The pipeline with the shortest predicted step of all that options leave open.

    Rank 0 plans them all, by peak rates; the others wait for its choice.
    """
    count = open_.devices or world_size() or torch.cuda.device_count()
    if open_.divides and not count:
        raise OptionError('n_stages="auto" needs devices=, as this process sees no GPUs')
    if not open_.divides:
        options.check_shared()
    mesh = make_mesh(count, 1) if open_.divides else make_mesh(options.n_stages, options.dp)
    device = choose_device(options.device, mesh)
    named, own = options.backend != AUTO, options
    options, why = settled(choice.settled(options, device), device)
    if options.fuses:
        open_ = weighing(open_, own, device.type == "cpu")
    planning = Planning(mesh, device, options)
    with plain_torch(device), planning.guard():
        model = with_loss(model, options.loss_fn)
        return _best(model, options, open_, planning, mesh, device, {"backend": why}, named)


def _best(
    model: nn.Module,
    options: CompileOptions,
    open_: Open,
    planning: Planning,
    mesh: Mesh,
    device: torch.device,
    notes: dict[str, str],
    named: bool,
) -> Pipeline:
    """Args:
    notes: what was chosen before, and why.
    named: whether the backend was.
    """
    skeleton = _skeleton(model, device, options)
    agreement = Agreement(mesh, device)
    agreement.check_options(options)
    if not open_.divides:
        options.check_placement()
    dump_dir = None if mesh.rank else options.dump_dir
    agreement.together(lambda: prepare(dump_dir), OptionError)
    weights = options.weights
    if weights is not None:  # refuse what does not fit before planning
        agreement.together(lambda: WeightFiles(weights, skeleton), StateError)
    values, given = batches.flatten(options.example_batch)
    values = [] if any(map(is_fake, values)) else values
    brought = mesh.dp if mesh.distributed and not open_.divides else 1  # each replica its share
    whole = given.with_rows(given.rows * brought)
    target = planning.target(options, agreement)
    several = target.spec.topology is not None and options.placement == AUTO
    open_ = replace(open_, places=several)
    captured = Shared(Exports())

    def divided(tried: CompileOptions) -> tuple[BatchSpec, int, Sequence[torch.Tensor]]:
        piece, microbatches = divide(whole, tried, tried.dp)
        asked = batches.cut(values, (piece.rows, given.rows - piece.rows))[0] if values else ()
        return piece, microbatches, asked

    def builder(tried: CompileOptions) -> Builder:
        return Builder(skeleton, tried, target, captured=captured)

    devices = mesh.size
    asked = Subject(options, target, devices, builder, divided, named=named)
    ways = ways_of(open_, options, devices, whole.rows)
    team = Ranks(mesh, agreement, model, options)
    only_places = not open_.divides and not open_.orders
    if len(ways) == 1 and (open_.stages is not None or only_places):
        chosen = ways[0].of(options, example_batch=None)
        why = f"{ways[0]} is the only division of {mesh.size} that is allowed"
        if only_places:
            why = "pipeline: nothing is known of the links between machines"
    else:
        found = team.share(lambda: search(ways, asked.model))
        best = found.best
        chosen = best.way.of(options, microbatches=best.microbatches, example_batch=None)
        of = f"{found.told}; {listed(found.trials)}"
        why = f"{best.told(open_.orders)} is the shortest predicted step of {of}"
    what = "placement" if only_places else "stages"
    pipe = Pipeline(model, chosen, skeleton, _mesh(chosen), device, {what: why} | notes)
    rows = cut(whole.rows, pipe.data_shards)
    if open_.divides and values:
        values = batches.cut(values, rows)[pipe.data_shard]
    share = whole.with_rows(rows[pipe.data_shard])
    pipe.compile_for(share.build(values) if values else share)
    return pipe
