"""From options to a running pipeline: how many stages, which ranks, which device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..compiler.capture import batch as batches
from ..compiler.capture.skeleton import skeleton_of
from ..compiler.capture.whole import with_loss
from ..compiler.driver.auto import choose_stages, listed
from ..compiler.driver.builder import Builder
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.driver.record import prepare
from ..compiler.ir.errors import OptionError, StateError
from ..compiler.options.microbatches import cut, divide
from ..compiler.options.options import CompileOptions
from ..compiler.tensors.fakes import is_fake
from .exchange.agreement import Agreement
from .exchange.devices import choose_device, device_of, target_of
from .exchange.mesh import Mesh, connect, make_mesh, world_size
from .exchange.ranks import Ranks
from .pipeline import Pipeline
from .weights.weight_files import WeightFiles
from .world import plain_torch


def start(model: nn.Module, options: CompileOptions) -> Pipeline:
    """The pipeline of n_stages × dp ranks, as this process was started."""
    options.check_zero()
    mesh = make_mesh(options.n_stages, options.dp, options.shape(1).placement)
    device = choose_device(options.device, mesh)
    model = with_loss(model, options.loss_fn)
    with plain_torch(device):
        skeleton = skeleton_of(model, device, options.dtypes, options.eager_modules)
        return Pipeline(model, options, skeleton, mesh, device)


def start_best(model: nn.Module, options: CompileOptions, devices: int | None) -> Pipeline:
    """The pipeline whose division of the devices has the shortest predicted step.

    Rank 0 plans them all, by peak rates; the others wait for its choice.
    """
    ranks = world_size()
    count = devices or ranks or torch.cuda.device_count()
    if not count:
        raise OptionError('n_stages="auto" needs devices=, as this process sees no GPUs')
    mesh = make_mesh(count, 1)
    device = choose_device(options.device, mesh)
    with plain_torch(device):
        return _best(with_loss(model, options.loss_fn), options, mesh, device)


def _best(model: nn.Module, options: CompileOptions, mesh: Mesh, device: torch.device) -> Pipeline:
    connect(mesh, device_of(mesh.local_ranks[0], device, mesh))
    skeleton = skeleton_of(model, device, options.dtypes, options.eager_modules)
    agreement = Agreement(mesh, device)
    agreement.check_options(options)
    dump_dir = None if mesh.rank else options.dump_dir
    agreement.together(lambda: prepare(dump_dir), OptionError)
    weights = options.weights
    if weights is not None:  # refuse what does not fit before planning
        agreement.together(lambda: WeightFiles(weights, skeleton), StateError)
    values, whole = batches.flatten(options.example_batch)
    values = [] if any(map(is_fake, values)) else values
    target = target_of(options, device, mesh)

    def build(n_stages: int, dp: int, finer: int) -> Compiled:
        tried = replace(options, n_stages=n_stages, dp=dp, dump_dir=None)
        piece, microbatches = divide(whole, tried, dp, finer=finer)
        asked = batches.cut(values, (piece.rows, whole.rows - piece.rows))[0] if values else ()
        return Builder(skeleton, tried, target).build(Mode.TRAIN, piece, microbatches, batch=asked)

    team = Ranks(mesh, agreement, model, options)
    best, trials = team.share(lambda: choose_stages(mesh.size, build))
    chosen = replace(
        options,
        n_stages=best.n_stages,
        dp=best.dp,
        microbatches=best.microbatches,
        example_batch=None,
    )
    mesh = make_mesh(best.n_stages, best.dp, chosen.shape(1).placement)
    why = f"{best} is the shortest predicted step of {listed(trials)}"
    pipe = Pipeline(model, chosen, skeleton, mesh, device, why)
    rows = cut(whole.rows, pipe.data_shards)
    mine = batches.cut(values, rows)[pipe.data_shard] if values else ()
    share = whole.with_rows(rows[pipe.data_shard])
    pipe.compile_for(share.build(mine) if values else share)
    return pipe
