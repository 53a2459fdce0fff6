"""From options to a running pipeline: how many stages, which ranks, which device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.capture.skeleton import Skeleton, skeleton_of
from ..compiler.capture.whole import with_loss
from ..compiler.driver.auto import Open, listed
from ..compiler.driver.builder import Builder
from ..compiler.driver.capturing import Shared
from ..compiler.driver.record import prepare
from ..compiler.ir.errors import OptionError, StateError
from ..compiler.options.microbatches import cut, divide
from ..compiler.options.options import CompileOptions
from ..compiler.search.search import search
from ..compiler.search.space import ways_of
from ..compiler.search.subject import Subject
from ..compiler.tensors.fakes import is_fake
from .exchange.agreement import Agreement
from .exchange.devices import choose_device, target_of
from .exchange.ranks import Ranks
from .graphs import choice
from .kernels.choice import settled
from .pipeline import Pipeline
from .transport.mesh import Mesh, make_mesh, world_size
from .weights.weight_files import WeightFiles
from .world import Planning, plain_torch


def start(model: nn.Module, options: CompileOptions) -> Pipeline:
    """The pipeline of n_stages × dp ranks, as this process was started."""
    options.check_zero()
    mesh = make_mesh(options.n_stages, options.dp, options.shape(1).placement)
    device = choose_device(options.device, mesh)
    options, why = settled(choice.settled(options, device), device)
    model = with_loss(model, options.loss_fn)
    with plain_torch(device):
        skeleton = _skeleton(model, device, options)
        return Pipeline(model, options, skeleton, mesh, device, {"backend": why})


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
        options.check_zero()
    mesh = make_mesh(count, 1) if open_.divides else make_mesh(options.n_stages, options.dp)
    device = choose_device(options.device, mesh)
    options, why = settled(choice.settled(options, device), device)
    planning = Planning(mesh, device, options)
    with plain_torch(device), planning.guard():
        model = with_loss(model, options.loss_fn)
        return _best(model, options, open_, mesh, device, {"backend": why})


def _best(
    model: nn.Module,
    options: CompileOptions,
    open_: Open,
    mesh: Mesh,
    device: torch.device,
    notes: dict[str, str],
) -> Pipeline:
    skeleton = _skeleton(model, device, options)
    agreement = Agreement(mesh, device)
    agreement.check_options(options)
    dump_dir = None if mesh.rank else options.dump_dir
    agreement.together(lambda: prepare(dump_dir), OptionError)
    weights = options.weights
    if weights is not None:  # refuse what does not fit before planning
        agreement.together(lambda: WeightFiles(weights, skeleton), StateError)
    values, given = batches.flatten(options.example_batch)
    values = [] if any(map(is_fake, values)) else values
    brought = mesh.dp if mesh.distributed and not open_.divides else 1  # each replica its share
    whole = given.with_rows(given.rows * brought)
    target = target_of(options, device, mesh)
    captured = Shared()

    def divided(tried: CompileOptions) -> tuple[BatchSpec, int, Sequence[torch.Tensor]]:
        piece, microbatches = divide(whole, tried, tried.dp)
        asked = batches.cut(values, (piece.rows, given.rows - piece.rows))[0] if values else ()
        return piece, microbatches, asked

    def builder(tried: CompileOptions) -> Builder:
        return Builder(skeleton, tried, target, captured=captured)

    devices = mesh.size
    asked = Subject(options, target, devices, builder, divided)
    ways = ways_of(open_, options, devices, whole.rows)
    team = Ranks(mesh, agreement, model, options)
    if open_.stages is not None and len(ways) == 1:
        chosen = ways[0].of(options, example_batch=None)
        why = f"{ways[0]} is the only division of {mesh.size} that is allowed"
    else:
        found = team.share(lambda: search(ways, asked.model))
        best = found.best
        chosen = best.way.of(options, microbatches=best.microbatches, example_batch=None)
        of = f"{found.told}; {listed(found.trials)}"
        why = f"{best.told(open_.orders)} is the shortest predicted step of {of}"
    mesh = make_mesh(chosen.n_stages, chosen.dp, chosen.shape(1).placement)
    pipe = Pipeline(model, chosen, skeleton, mesh, device, {"stages": why} | notes)
    rows = cut(whole.rows, pipe.data_shards)
    if open_.divides and values:
        values = batches.cut(values, rows)[pipe.data_shard]
    share = whole.with_rows(rows[pipe.data_shard])
    pipe.compile_for(share.build(values) if values else share)
    return pipe
