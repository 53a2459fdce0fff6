"""Faults, each with the test that must fail when it is planted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        module: where its source is; elsewhere in the package if it has moved.
        old: whole lines, or a part of one, whatever their indentation is.
        new: what stands there instead.
        test: file name, and ``::function`` where one is enough.
        why: what is wrong then.
    """

    module: str
    old: str
    new: str
    test: str
    why: str


MODES = (
    Mutant(
        "compiler/capture/capture.py",
        "with evaluating(skeleton.module), torch.no_grad():\n"
        "return _capture(\nskeleton, spec, loss",
        "with torch.no_grad():\n    return _capture(\n        skeleton, spec, loss",
        "test_evaluation.py::test_evaluation_draws_nothing_and_counts_nothing",
        "evaluate() runs in training mode",
    ),
    Mutant(
        "compiler/capture/skeleton.py",
        "part.training = training",
        "pass",
        "test_evaluation.py::test_evaluation_draws_nothing_and_counts_nothing",
        "what was evaluated trains in evaluation mode",
    ),
)

LIMITS = (
    Mutant(
        "runtime/transport/replicas.py",
        "return torch.split(bucket, segment)",
        "return torch.split(bucket, segment)[:1]",
        "test_limits.py::test_the_mean_is_taken_of_every_segment",
        "the replicas' mean stops after its first segment",
    ),
    Mutant(
        "compiler/costs/memory.py",
        "segment = min(grad_bytes, SEGMENT_BYTES)",
        "segment = grad_bytes",
        "test_limits.py::test_the_plan_counts_a_segment_and_its_share",
        "the plan counts all gradients where one segment is exchanged",
    ),
    Mutant(
        "compiler/ir/shards.py",
        "min(PARCEL_BYTES, total // SHARES)",
        "total // SHARES",
        "test_limits.py::test_parcels_are_no_larger_than_the_limit",
        "parcels grow with the model",
    ),
    Mutant(
        "compiler/ir/ops.py",
        "part.add_(addend)",
        "part.add_(addend)\nbreak",
        "test_limits.py::test_addends_of_another_dtype_come_in_pieces",
        "only the first piece of a gradient in another dtype is added",
    ),
    Mutant(
        "runtime/state/accumulation.py",
        "total += piece.double().square_().sum()",
        "total = piece.double().square_().sum()",
        "test_limits.py::test_norms_of_large_gradients_count_all_elements",
        "the norm of a large gradient is that of its last piece",
    ),
    Mutant(
        "compiler/units/units.py",
        "room = MAX_UNITS - 1 - len(chosen)",
        "room = 10**6",
        "test_graph.py::test_many_layers_make_no_more_units_than_the_limit_and_alike",
        "a deep model has more units than the solver takes",
    ),
)

PLANNING = (
    Mutant(
        "compiler/planning/planner.py",
        "problem = replace(problem, reserve_bytes=reserves.next(tried, drafted))",
        "reserves.next(tried, drafted)",
        "test_prices.py",
        "the planner never applies its reserves",
    ),
    Mutant(
        "compiler/units/stash.py",
        "most = max((o.transient_bytes for r in readers for o in menus[r]), default=0)",
        "most = 0",
        "test_prices.py",
        "the transient of a stash's readers is forgotten",
    ),
    Mutant(
        "compiler/memory/program_memory.py",
        "self.live -= self.sizes[block]",
        "pass",
        "test_prices.py::test_prices_are_not_below_what_programs_hold",
        "the walk frees nothing within a program",
    ),
    Mutant(
        "compiler/ir/problem.py",
        "math.fsum(n * stash[s] for n, s in zip(counts, stages_here, strict=True))",
        "math.fsum(stash[s] for n, s in zip(counts, stages_here, strict=True))",
        "test_compare.py::test_rows",
        "a stash is priced once for all microbatches in flight",
    ),
    Mutant(
        "passes/schedule/verify.py",
        "_check_links(found)",
        "pass",
        "test_schedule_faults.py::test_two_ranks_agree_on_the_order_of_all_that_one_sends_the_other",
        "two ranks may order their messages in two ways",
    ),
    Mutant(
        "passes/schedule/communication.py",
        "slot = max(0, min(slot, read - 1, in_time))",
        "slot = max(0, read - 1)",
        "test_communication.py",
        "receives are posted whatever transfers take, and in another order than sends",
    ),
    Mutant(
        "compiler/ir/program.py",
        "last = (kind, max(later)) if later else step",
        "last = step",
        "test_drops.py",
        "what a rank hands over is dropped before it is sent to another one",
    ),
    Mutant(
        "passes/schedule/clock.py",
        "start = max(start, link.end_s[number])",
        "pass",
        "test_schedule.py::test_1f1b_takes_the_time_of_the_formula",
        "simulated stages wait for nothing",
    ),
    Mutant(
        "compiler/driver/deciding.py",
        '"microbatches": (plan.microbatches, settings.microbatches),',
        "",
        "test_planner.py::test_a_plan_is_for_all_that_programs_depend_on",
        "a plan is accepted for another number of microbatches",
    ),
    Mutant(
        "compiler/driver/deciding.py",
        "for name, ours in options.in_plan().items()}",
        'for name, ours in options.in_plan().items() if name != "zero"}',
        "test_planner.py::test_a_plan_is_for_all_that_programs_depend_on",
        "a plan is accepted at another level of ZeRO",
    ),
)

VERIFIERS = (
    Mutant(
        "passes/programs/verify.py",
        "missing = port.role is Role.VALUE and port.key not in known",
        "missing = False",
        "test_verify.py",
        "unknown values pass",
    ),
    Mutant(
        "passes/programs/verify.py",
        "given.add(found[node.all_input_nodes[1]][0])",
        "pass",
        "test_verify.py",
        "a write over a given gradient passes",
    ),
    Mutant(
        "passes/programs/verify.py",
        "if param.shape != found.shape or not (param.dtype is found.dtype or narrow):",
        "if param.shape != found.shape:",
        "test_verify.py",
        "a gradient in any dtype passes",
    ),
    Mutant(
        "passes/schedule/exchange.py",
        "if action.kind in (Kind.REDUCE_GRAD, Kind.SYNC_TIED) and at < computes[-1]:",
        "if False:",
        "test_verify.py",
        "gradients that are exchanged before all are added pass",
    ),
    Mutant(
        "passes/programs/verify.py",
        "if sent != received:",
        "if False:",
        "test_verify.py",
        "messages that arrive in another order pass",
    ),
)

FIGURES = (
    Mutant(
        "compiler/report/report.py",
        'm * plan.dp * sum(getattr(stage, f"{phase}_flops") for stage in stages)',
        'm * sum(getattr(stage, f"{phase}_flops") for stage in stages)',
        "test_figures.py::test_how_much_it_takes",
        "operations of one replica are called those of all",
    ),
    Mutant(
        "compiler/report/report.py",
        "made = plan.microbatches * plan.dp",
        "made = plan.microbatches",
        "test_figures.py::test_how_fast_it_is",
        "rows per second of one replica are called those of all",
    ),
    Mutant(
        "compiler/report/report.py",
        "[m.buffers + m.constants + m.batch + m.residue for m in held]",
        "[m.buffers + m.constants + m.residue for m in held]",
        "test_figures.py::test_what_memory_is_made_of",
        "the memory table leaves out the batch",
    ),
    Mutant(
        "compiler/report/quantities.py",
        'return _scale(numbers, 1024, "B", _BINARY)',
        'return _scale(numbers, 1000, "B", _BINARY)',
        "test_figures.py::test_bytes",
        "a KiB has 1000 bytes",
    ),
    Mutant(
        "compiler/report/hints.py",
        "growth * now.step_s / then.step_s",
        "now.step_s / then.step_s",
        "test_figures.py::test_hints_grow_no_further_than_their_limit",
        "a hint compares steps of different sizes",
    ),
    Mutant(
        "compiler/planning/advice.py",
        "moving = memory.peak_bytes - static.total",
        "moving = 0",
        "test_advice.py::test_parts_are_told_apart",
        "advice leaves activations out of what is needed",
    ),
    Mutant(
        "compiler/planning/advice.py",
        "stash = min(stash_bytes, moving) if inside else 0",
        "stash = min(stash_bytes, moving)",
        "test_advice.py::test_parts_are_told_apart",
        "a stash is told of where no microbatch is under way",
    ),
    Mutant(
        "compiler/costs/attention_flops.py",
        "None, 0 if is_causal else None, 0)",
        "None, None, 0)",
        "test_formulas.py::test_flops_of_fused_attention",
        "causal attention counts what it skips",
    ),
    Mutant(
        "compiler/costs/formulas.py",
        "return 2 * left.shape[1] * right.numel()",
        "return _product(left, right)",
        "test_formulas.py::test_products_in_groups",
        "every group multiplies all columns",
    ),
)

BITS = (
    Mutant(
        "runtime/transport/transport.py",
        "for part in others:",
        "for part in others[::-1]:",
        "test_wire.py::test_means_are_added_in_rank_order",
        "replicas are summed in another order",
    ),
    Mutant(
        "runtime/transport/wire.py",
        "if tensor.stride() == spec.stride:",
        "if tensor.shape == spec.shape:",
        "test_wire.py::test_other_strides_are_conformed",
        "values arrive in other strides",
    ),
    Mutant(
        "runtime/transport/wire.py",
        "found.append(read(piece, spec, at))",
        "found.append(read(piece, spec, 0))",
        "test_wire.py::test_values_keep_bits_and_strides",
        "small values of a message are all taken for the first",
    ),
    Mutant(
        "runtime/executor.py",
        "return action.kind is Kind.UNSHARD",
        "return action.kind is not Kind.B",
        "test_uneven_labels.py::test_a_batch_that_is_refused_changes_nothing",
        "what a forward makes leaves the rank before the batch is agreed on",
    ),
    Mutant(
        "runtime/session.py",
        "            weighed()\n            self._sums.open(scale)",
        "            self._sums.open(scale)\n            weighed()",
        "test_uneven_labels.py::test_a_batch_that_is_refused_changes_nothing",
        "gradients are taken up before the batch is agreed on",
    ),
    Mutant(
        "runtime/executor.py",
        "tangents = tangents / self.microbatches",
        "tangents = tangents / 1",
        "test_evaluation.py::test_kinds_of_batches",
        "gradients are the sum over the microbatches, not their mean",
    ),
    Mutant(
        "compiler/rows/loss.py",
        "return [real * _divisor(term, count) for count, real in pairs], sum(mine)",
        "return there, sum(there)",
        "test_batch_loss.py::test_the_loss_is_that_of_the_whole_batch",
        "microbatches count as much, however many labels they keep",
    ),
    Mutant(
        "compiler/rows/loss.py",
        "shares = [[share * pieces for share in many] for many in zip(*terms, strict=True)]",
        "shares = [[1.0 for share in many] for many in zip(*terms, strict=True)]",
        "test_batch_loss.py::test_the_loss_is_that_of_the_whole_batch",
        "terms of one loss count as much in every microbatch",
    ),
    Mutant(
        "compiler/rows/weighing.py",
        "if count.floor <= 0 and count.more <= 0:",
        "if False:",
        "test_batch_loss.py::test_the_loss_is_that_of_the_whole_batch",
        "a microbatch that keeps nothing divides zero by zero",
    ),
    Mutant(
        "passes/programs/inplace.py",
        "if last[block] > i or block in given or shared != [source]:",
        "if block in given or shared != [source]:",
        "test_inplace.py::test_activations_and_their_derivatives",
        "operators write over what is read later",
    ),
    Mutant(
        "passes/attention/restore.py",
        "return _Mask.CAUSAL if rows == columns and torch.equal(seen, causal) else _Mask.OTHER",
        "return _Mask.CAUSAL",
        "test_graph.py::test_only_exact_masks_are_dropped",
        "every constant mask becomes a causal one",
    ),
    Mutant(
        "runtime/loader.py",
        "mix(seed, number, end.replica, i)",
        "mix(seed, number, i)",
        "test_training.py::test_dropout_differs_between_microbatches_replicas_and_steps",
        "replicas drop the same elements",
    ),
    Mutant(
        "passes/generators/one_f_one_b.py",
        "alternating(s, last - s, shape.microbatches)",
        "alternating(s, last - s + 1, shape.microbatches)",
        "test_schedule.py::test_1f1b_is_the_published_one",
        "stages begin with one microbatch too many",
    ),
)

KEPT = (
    Mutant(
        "compiler/effects/replaced.py",
        "args, named = tree_map(self.of, (args, named))",
        "pass",
        "test_momentum_encoders.py::test_averages_are_those_of_one_device",
        "what has another memory is read in its old one",
    ),
    Mutant(
        "compiler/effects/replaced.py",
        'raise CaptureError(f"parameter {name!r}: forward {problem}")\n'
        "found.values[name] = new.detach().clone()",
        "pass",
        "test_momentum_encoders.py::test_averages_are_those_of_one_device",
        "the next call does not get the memory that this one has given",
    ),
    Mutant(
        "compiler/costs/footprint.py",
        "*(named[name] for name in updated)",
        "",
        "test_momentum_encoders.py::test_they_are_no_parameters_of_the_pipeline",
        "momentum encoders take no memory",
    ),
    Mutant(
        "compiler/tracing/padding.py",
        "return torch.where((kept[:, 1:] <= kept[:, :-1]).all(), zeroed, output)",
        "return zeroed",
        "test_padding.py::test_evaluation_is_that_of_one_device",
        "padding is zero where it comes first, too",
    ),
    Mutant(
        "compiler/tracing/padding.py",
        "return output if norm is None else norm(output)",
        "return output",
        "test_padding.py::test_evaluation_is_that_of_one_device",
        "the encoder's own norm is left out",
    ),
)

SIZES = (
    Mutant(
        "compiler/tracing/sizes.py",
        "if self.number(env, guard.expr) != 1:",
        "if False:",
        "test_sizes.py::test_guards_hold",
        "what a trace has decided by sizes is taken to hold for others",
    ),
    Mutant(
        "compiler/tracing/sizes.py",
        "if not each.holds(found):",
        "if False:",
        "test_template.py::test_what_depends_on_a_size_is_traced_for_it",
        "what a trace was told of values of sizes is taken to hold for others",
    ),
    Mutant(
        "compiler/general/shapes.py",
        "return bool(found) and all(found)",
        "return True",
        "test_shapes.py::test_another_graph_is_not_used",
        "a graph for all sizes is not compared with what was traced",
    ),
    Mutant(
        "compiler/general/shapes.py",
        "if not found.guards or (batch and found.guards.difference(batch) is None):",
        "if True:",
        "test_shapes.py::test_a_batch_that_answers_otherwise_has_a_graph_of_its_own",
        "a batch gets the graph of others that answer otherwise",
    ),
)

BETWEEN_RUNS = (
    Mutant(
        "compiler/kept/store.py",
        "if name not in known or not torch.equal(known[name].to(kept), kept):",
        "if name not in known:",
        "test_store.py::test_another_value_of_a_buffer_that_decides_is_another_graph",
        "a graph that was made for another value of a buffer is taken from disk",
    ),
    Mutant(
        "compiler/kept/store.py",
        "make(self._skeleton.module, entry.changes)",
        "pass",
        "test_store.py::test_what_forward_sets_is_set_where_its_graph_is_found",
        "what a forward sets is lost where its graph is found on disk",
    ),
    Mutant(
        "compiler/kept/store.py",
        "if files:",
        "if not files:",
        "test_store.py::test_what_no_hash_tells_is_not_kept",
        "a graph is kept whose forward has read a file",
    ),
    Mutant(
        "compiler/kept/folder.py",
        "if not guards or (batch and guards.difference(batch) is None):",
        "if not guards or batch:",
        "test_store.py::test_another_answer_of_the_batch_is_another_graph",
        "a graph that was made for other answers of the batch is taken from disk",
    ),
    Mutant(
        "compiler/kept/identity.py",
        "walk.items((value.__defaults__, value.__kwdefaults__))",
        "pass",
        "test_identity.py::test_what_a_graph_depends_on_counts",
        "another default argument is no other code",
    ),
    Mutant(
        "compiler/kept/identity.py",
        "for cell in value.__closure__ or ():",
        "for cell in ():",
        "test_identity.py::test_closures_count",
        "what a function has from the one around it does not count",
    ),
    Mutant(
        "compiler/driver/deciding.py",
        'if option.plan == "decides"',
        'if option.plan == "nothing"',
        "test_store.py::test_other_plans",
        "a plan that was made for other options is taken from disk",
    ),
)

NUMBERS = (
    Mutant(
        "compiler/general/numbers.py",
        "if graph.fingerprint() != literal.graph.fingerprint():",
        "if graph is None:",
        "test_inputs.py::test_what_takes_the_number_itself_is_traced",
        "a number is an input where forward does other things with it",
    ),
    Mutant(
        "compiler/answers/inputs.py",
        "dtype = beside.dtype if floating else torch.get_default_dtype()",
        "dtype = beside.dtype if floating else torch.float64",
        "test_inputs.py::test_arithmetic_has_the_bits_of_python",
        "integers become another dtype beside a number",
    ),
    Mutant(
        "runtime/data/cutting.py",
        "if any(each != size for each in sizes) and sum(sizes) < size:",
        "if not sizes:",
        "test_cut.py::test_cuts_that_are_none",
        "a cut loses documents",
    ),
)

SHARDING = (
    Mutant(
        "runtime/transport/transport.py",
        "total.add_(parts, alpha=1 / count)",
        "total.add_(parts)",
        "test_wire.py::test_means_are_added_to_a_total",
        "sums over replicas are taken for means",
    ),
    Mutant(
        "compiler/ir/shards.py",
        "size = -(-rows // dp)",
        "size = rows // dp",
        "test_divisions.py::test_rows_are_those_of_torch_chunk",
        "the last rows belong to nobody",
    ),
    Mutant(
        "compiler/ir/shards.py",
        "self._spans[dp, replica] = start + first, end - first",
        "self._spans[dp, replica] = start, end - first",
        "test_divisions.py::test_parcels_have_every_row_once",
        "every piece of a tensor has its first rows",
    ),
    Mutant(
        "compiler/ir/zero.py",
        "return held, of_layer[layer_of(name), replica], replica",
        "return 0, of_layer[layer_of(name), replica], replica",
        "test_matrices.py::test_owners_have_as_many_bytes",
        "replicas own matrices of other sizes",
    ),
    Mutant(
        "compiler/profiling/optimizer_trial.py",
        "if not _alike(found, together, name):",
        "if found is together:",
        "test_optimizer_trial.py::test_how_far_a_step_looks",
        "one step size for all parameters goes unnoticed",
    ),
    Mutant(
        "runtime/kernels/rounding.py",
        "return torch.equal(at_once.addmm_(*second), apart.add_(torch.mm(*second)))",
        "return True",
        "test_rounding.py::test_a_trial_sees_another_order_of_additions",
        "products are added while they are made where that rounds otherwise",
    ),
    Mutant(
        "runtime/binding.py",
        'if self._state.device.type == "cpu" and self._kernels != kernels_now():',
        "if False:",
        "test_rounding.py::test_other_kernels_are_another_trial",
        "kernels that were tried with fewer threads are trusted with more",
    ),
    Mutant(
        "compiler/ir/ops.py",
        "at = int(where) if padding >= 0 and len(where) else -1",
        "at = -1",
        "test_rows.py::test_a_slot_adds_rows_as_it_adds_gradients",
        "a table's padding is trained where its gradient is added by rows",
    ),
    Mutant(
        "runtime/state/gradients.py",
        "slot.fresh = slot.fresh and item.piece < item.pieces - 1",
        "slot.fresh = False",
        "test_zero.py::test_odd_parameters_and_accumulation",
        "pieces after the first are added to what was there before",
    ),
    Mutant(
        "runtime/state/gradients.py",
        "return slot.owned if self._zero.streams else slot.tensor",
        "return slot.tensor",
        "test_kept.py::test_everything_kept_is_level_one",
        "of a tied gradient that is kept the replicas' own sums travel between stages",
    ),
    Mutant(
        "compiler/planning/keeping.py",
        "if peak <= budgets[rank]:",
        "if True:",
        "test_keeping.py::test_a_rank_keeps_the_most_that_fits",
        "more is kept than fits",
    ),
    Mutant(
        "compiler/driver/work.py",
        "links = sum(rank in ends for ends in ways)",
        "links = 4",
        "test_reserved.py::test_a_rank_pays_for_each_communicator_that_it_is_an_end_of",
        "every rank pays for as many communicators",
    ),
    Mutant(
        "compiler/costs/cluster.py",
        "hosts = topology.hosts or tuple(number // topology.devices for number in numbers)",
        "hosts = tuple(number // topology.devices for number in range(len(numbers)))",
        "test_cluster.py::test_ranks_are_in_the_machines_that_have_their_devices",
        "ranks fill machines in order, whatever devices these have",
    ),
    Mutant(
        "passes/partition/dominance.py",
        "and problem.alike",
        "and True",
        "test_unlike.py::test_what_takes_ranks_for_alike_steps_aside",
        "units move to a neighbour's stage although its device may be slower",
    ),
)

PRECISION = (
    Mutant(
        "compiler/ir/precision.py",
        "return self.grads if dtype is torch.float32 else dtype",
        "return dtype",
        "test_precision.py::test_gradients_add_up_in_the_dtype_asked_for",
        "gradients add up in fp32 whatever was asked for",
    ),
    Mutant(
        "runtime/state/model_state.py",
        "state.grads.scale(1 / scale)",
        "pass",
        "test_loss_scaler.py::test_fp64_gradients_are_unscaled_too",
        "gradients stay scaled",
    ),
    Mutant(
        "runtime/stepping/loss_scaler.py",
        "self.skipped += 1\nself._good = 0",
        "self.skipped += 1",
        "test_loss_scaler.py::test_the_scale_is_that_of_torchs_scaler",
        "good steps before an overflow count for growth",
    ),
    Mutant(
        "compiler/capture/exporting.py",
        "args, kwargs = cast_floats((args, kwargs), self.floats)",
        "pass",
        "test_narrow_parameters.py::test_buffers_are_read_narrow_and_held_as_they_came",
        "what a model with narrow parameters is given stays wide",
    ),
    Mutant(
        "compiler/capture/narrowing.py",
        "add_border(island, compute)",
        "pass",
        "test_narrow_parameters.py::test_a_module_in_fp32_has_borders",
        "modules in fp32 are given narrow values",
    ),
    Mutant(
        "passes/programs/gather.py",
        "nodes = _late_views(nodes, ports, sharded)",
        "pass",
        "test_gather.py::test_a_backward_fetches_a_layer_while_the_one_after_computes",
        "a backward fetches all layers at its start",
    ),
    Mutant(
        "compiler/tracing/kept.py",
        "_forget_switches(graph, last)",
        "pass",
        "test_scaled_products.py::test_products_in_fp8_keep_the_bits",
        "what follows a Function with no_grad() inside has no gradient",
    ),
    Mutant(
        "passes/graph/casts.py",
        "if key in first:",
        "if False:",
        "test_autocast.py::test_one_cast_per_value_and_none_of_a_parameter",
        "a value is cast for each of its readers",
    ),
    Mutant(
        "passes/graph/casts.py",
        "return source.dtype in REDUCED and made.dtype not in REDUCED",
        "return True",
        "test_precision.py::test_islands_and_buffers_are_as_autocast_leaves_them",
        "rounding and widening again is taken for nothing",
    ),
)

FREEING = (
    Mutant(
        "runtime/executor.py",
        "for name in bound.drops:\ndel values[name]",
        "pass",
        "test_planner.py::test_the_predicted_peak_is_the_measured_one",
        "a microbatch keeps what nobody needs any more",
    ),
    Mutant(
        "compiler/ir/program.py",
        ", = boxed; boxed.clear()",
        ", = boxed",
        "test_boxed.py::test_arguments_are_let_go_when_they_are_last_read",
        "arguments live until a program ends",
    ),
)

CHECKPOINTS = (
    Mutant(
        "runtime/pipeline.py",
        "self.zero_grad()\nsession.refresh()",
        "session.refresh()",
        "test_checkpoint.py::test_loading_drops_the_gradients_that_wait",
        "load() keeps pending gradients",
    ),
    Mutant(
        "runtime/checkpoint/restore.py",
        "rank = self._rank if self._rank < len(saved) else 0",
        "rank = 0",
        "test_checkpoint.py::test_ranks_get_back_what_was_their_own",
        "one rank's random stream is given to all",
    ),
    Mutant(
        "runtime/checkpoint/restore.py",
        "_check_ties(training.state, index)",
        "pass",
        "test_checkpoint_errors.py::test_ties_are_those_that_were_saved",
        "tied names are not checked",
    ),
    Mutant(
        "runtime/files/index.py",
        "sync(path)",
        "pass",
        "test_checkpoint_folder.py::test_everything_is_on_the_disk_before_it_gets_its_name",
        "the index may not be on the disk",
    ),
    Mutant(
        "runtime/files/tensor_file.py",
        "os.fsync(file.fileno())",
        "pass",
        "test_checkpoint_folder.py::test_everything_is_on_the_disk_before_it_gets_its_name",
        "tensors may not be on the disk",
    ),
    Mutant(
        "runtime/files/step_folder.py",
        "final.rename(replaced)",
        "_remove(final)",
        "test_checkpoint_folder.py::test_killed_at_any_moment",
        "for a moment there is no checkpoint at all",
    ),
    Mutant(
        "runtime/checkpoint/storage.py",
        "if path.resolve().parent != folder.resolve():",
        "if False:",
        "test_checkpoint_errors.py::test_damaged_checkpoints",
        "a checkpoint reads files outside of its folder",
    ),
    Mutant(
        "runtime/checkpoint/storage.py",
        "if found != chunk.checksum:",
        "if False:",
        "test_checkpoint_damage.py::test_what_is_not_verified_is_read_as_it_is",
        "values are not compared with their checksum",
    ),
    Mutant(
        "runtime/files/tensor_file.py",
        "if checksums.of_bytes(header) != facts.header:",
        "if False:",
        "test_checkpoint_damage.py::test_what_a_header_says_beside_its_tensors_is_compared_too",
        "headers are not compared with their checksum",
    ),
    Mutant(
        "runtime/files/index.py",
        "if verify and seal is False:",
        "if False:",
        "test_checkpoint_damage.py::test_any_flipped_bit_is_refused_by_file_and_tensor",
        "the index is not compared with its checksum",
    ),
    Mutant(
        "runtime/files/index.py",
        "if _overlap(chunks):",
        "if False:",
        "test_checkpoint_damage.py::test_what_no_training_has_left",
        "pieces of a tensor may overlap",
    ),
    Mutant(
        "runtime/checkpoint/restore.py",
        "bounds.check_scheduler(scheduler, state)",
        "pass",
        "test_checkpoint_damage.py::test_what_no_training_has_left",
        "a scheduler's state replaces its methods",
    ),
    Mutant(
        "runtime/checkpoint/optimizer_state.py",
        "bounds.check_settings(self.optimizer, group, found)",
        "pass",
        "test_checkpoint_damage.py::test_what_no_training_has_left",
        "a learning rate may be NaN",
    ),
    Mutant(
        "runtime/checkpoint/checkpoint.py",
        "restore.take_back(failure)",
        "pass",
        "test_all_or_nothing.py::test_a_late_failure_leaves_everything_as_it_was",
        "what took its state stays changed where another refuses",
    ),
    Mutant(
        "runtime/checkpoint/checkpoint.py",
        "self._agreement.together(restore.change)",
        "restore.change()",
        "test_all_or_nothing.py::test_what_one_rank_refuses_changes_no_other",
        "a rank goes on where another refuses",
    ),
    Mutant(
        "runtime/checkpoint/restore.py",
        "torch.empty_like(held) for",
        "held for",
        "test_all_or_nothing.py::test_a_late_failure_leaves_everything_as_it_was",
        "parameters are read in place",
    ),
    Mutant(
        "runtime/files/owner.py",
        "if found is not None and not _is_over(found, mine):",
        "if False:",
        "test_owner.py::test_another_run_is_told_whose_the_folder_is",
        "two runs save to one folder",
    ),
    Mutant(
        "runtime/files/step_folder.py",
        "if path.is_symlink():\npath.unlink()\nelif path.exists():",
        "if path.exists():",
        "test_owner.py::test_keep_removes_a_link_and_not_what_it_leads_to",
        "what keep= makes of a link stays in the folder",
    ),
    Mutant(
        "runtime/world.py",
        "if not self._turn.acquire(blocking=False):",
        "if False:",
        "test_threads.py::test_a_second_thread_is_refused",
        "two threads are in one pipeline",
    ),
    Mutant(
        "compiler/profiling/timing_cache.py",
        "if _is_time(value)",
        "if True",
        "test_profile.py::test_times_that_are_none_are_left_out_and_written_over",
        "times that are none are planned with",
    ),
)

WATCHDOG = (
    Mutant(
        "runtime/exchange/watchdog.py",
        "elif now - noticed > 2 * GRACE_S and watchdog.working:",
        "elif False:",
        "test_watchdog.py",
        "a blocked rank waits for ever",
    ),
    Mutant(
        "runtime/exchange/watchdog.py",
        "GRACE_S and watchdog.working:",
        "GRACE_S:",
        "test_watchdog.py",
        "a rank is ended though its call has just ended",
    ),
    Mutant(
        "compiler/host/frames.py",
        "co_stacksize=SLOTS",
        "co_stacksize=16",
        "test_frames.py",
        "frames have no room",
    ),
    Mutant(
        "runtime/exchange/watchdog.py",
        "self.call += 1",
        "pass",
        "test_watchdog.py",
        "an error that all caught fails the next call",
    ),
    Mutant(
        "runtime/exchange/watchdog.py",
        "failure = watchdog.first_failure() if watchdog.working else None",
        "failure = watchdog.first_failure()",
        "test_watchdog.py",
        "time between calls counts as time to notice a failure",
    ),
    Mutant(
        "runtime/exchange/watchdog.py",
        'raise PeerFailedError(f"{cause}{_seen(error)}") from None',
        'raise PeerFailedError(f"{cause}{_seen(error)}") from error',
        "test_watchdog.py::test_the_first_cause_is_on_top",
        "a raw error of a socket is printed above the first cause",
    ),
    Mutant(
        "runtime/transport/joining.py",
        "if number == mine:",
        "if number:",
        "test_lookout.py::test_an_attempt_gets_a_name_of_its_own_beside_what_an_earlier_one_left",
        "a restart takes the name of the attempt before",
    ),
    Mutant(
        "runtime/exchange/lookout.py",
        "place.inside and place.order >= loss.order + (0 if loss.inside else 1)",
        "place.inside and place.order >= loss.order",
        "test_lookout.py::test_a_death_concerns_calls_that_need_the_rank",
        "a rank that has died ends a call that it had finished",
    ),
    Mutant(
        "runtime/exchange/lookout.py",
        "elif waited >= max(joining.FIRST_S, 2 * self._told):",
        "elif waited >= joining.FIRST_S:",
        "test_lookout.py::test_who_is_waited_for_in_the_end_is_named",
        "a wait is told twice per second",
    ),
    Mutant(
        "runtime/exchange/lookout.py",
        "queue.extend(onward)",
        "pass",
        "test_lookout.py::test_who_is_waited_for_in_the_end_is_named",
        "who waits itself is named for whom it waits for",
    ),
    Mutant(
        "runtime/exchange/lookout.py",
        "self._doing.wake()",
        "pass",
        "test_lookout.py::test_who_waits_longer_than_the_limit_ends_the_run",
        "who waits for a lost rank is not woken",
    ),
    Mutant(
        "runtime/exchange/lookout.py",
        "outside = self.rank in loss.ranks and not self._doing.place.inside",
        "outside = False",
        "test_lookout.py::test_a_rank_that_gave_itself_up_ends",
        "a rank that is blocked in its loader stays",
    ),
    Mutant(
        "runtime/exchange/peers.py",
        "if _state(pid)[1] != born:",
        "if False:",
        "test_lookout.py::test_a_process_that_has_another_ones_number_is_not_taken_for_it",
        "another process with a rank's number is taken for it",
    ),
    Mutant(
        "runtime/executor.py",
        "HERE.act(text)",
        "pass",
        "test_lookout.py::test_a_killed_rank_is_named",
        "nobody knows in which action a rank has died",
    ),
    Mutant(
        "runtime/transport/doing.py",
        "self._page[: _INSIDE + 1] = before",
        "pass",
        "test_lookout.py::test_a_page_says_where_a_process_is",
        "a call inside of another one ends it",
    ),
)

SOLVER = (
    Mutant(
        "passes/partition/dominance.py",
        "if w in problem.pins or w in held:",
        "if w in held:",
        "test_dominance.py",
        "a pinned unit goes to its neighbour",
    ),
    Mutant(
        "passes/partition/dominance.py",
        "if option.stash_bytes or option.static_bytes or option.transient_bytes",
        "if option.stash_bytes or option.static_bytes",
        "test_dominance.py",
        "a unit's peak goes with it to its neighbour",
    ),
    Mutant(
        "passes/partition/dominance.py",
        "surely_sent = for_v or not all(may_stay([unit]) for unit in others)",
        "surely_sent = for_v or bool(others)",
        "test_dominance.py::test_a_unit_stays_with_those_that_read_the_same",
        "a unit leaves those beside it that read it",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "for users, good in ((kept.users, False), (kept.unless, True)):",
        "for users, good in ((kept.users, False),):",
        "test_dominance.py",
        "the option that would spare shared bytes is dropped",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "for users, good in ((kept.users, False), (kept.unless, True)):",
        "for users, good in ((kept.unless, True),):",
        "test_dominance.py",
        "the option that shares no bytes is dropped",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "replace(kept, users=renamed(kept.users), unless=renamed(kept.unless))\n"
        "for kept in problem.kept\n),\n)",
        "replace(kept, unless=renamed(kept.unless))\nfor kept in problem.kept\n),\n)",
        "test_dominance.py",
        "shared bytes count for options that were dropped",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "replace(kept, users=renamed(kept.users), unless=renamed(kept.unless))\n"
        "for kept in problem.kept\n),\n)",
        "replace(kept, users=renamed(kept.users))\nfor kept in problem.kept\n),\n)",
        "test_presolve.py::test_shared_bytes_are_those_of_the_same_option_after_others_are_dropped",
        "another option than before spares shared bytes",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "elif which is None or 0 in which:",
        "else:",
        "test_presolve.py::test_what_only_a_dropped_option_shares_takes_no_bytes",
        "a unit shares bytes that only a dropped option of it shared",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "if reserve + most + shared + transient > budget:",
        "if most + shared + transient > budget:",
        "test_presolve.py::test_a_limit_that_binds_stays",
        "a limit is dropped that only the reserve makes bind",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "max(option.transient_bytes for each in problem.options for option in each)",
        "max(each[0].transient_bytes for each in problem.options)",
        "test_presolve.py::test_a_limit_that_the_last_option_breaks_stays",
        "a limit is dropped that only another option's peak breaks",
    ),
    Mutant(
        "passes/partition/presolve.py",
        "if problem.min_units > 1:",
        "if False:",
        "test_presolve.py::test_units_of_a_group_count_one_by_one",
        "a group counts as one unit",
    ),
    Mutant(
        "passes/partition/dominance.py",
        "loss_a -= value.receive_s * (not may_stay(others))\nloss_b -= value.send_s * (not others)",
        "loss_a -= value.receive_s\nloss_b -= value.send_s * (not others)",
        "test_dominance.py::test_a_unit_stays_with_those_that_read_the_same",
        "a unit leaves a stage that receives what it reads all the same",
    ),
    Mutant(
        "passes/partition/dominance.py",
        "if not any(math.isfinite(budget) for budget in problem.budget_bytes):\nreturn set()",
        "if not all(math.isfinite(budget) for budget in problem.budget_bytes):\n    return set()",
        "test_dominance.py::test_a_unit_that_is_pinned_or_has_bytes_stays",
        "bytes do not count where one stage has no limit",
    ),
    Mutant(
        "passes/integer/windows.py",
        "np.cumsum(room), np.cumsum(room[::-1])",
        "np.cumsum(room), np.cumsum(room)",
        "test_windows.py::test_windows_are_as_wide_as_they_have_to_be",
        "the last stages have the room of the first",
    ),
    Mutant(
        "passes/integer/windows.py",
        "np.array(problem.fewest_s(kind)), {}",
        "np.array([each[0].on(kind) for each in problem.options]), {}",
        "test_windows.py::test_windows_are_as_wide_as_they_have_to_be",
        "a unit's first option counts as its fastest",
    ),
    Mutant(
        "passes/integer/windows.py",
        "fewest = min(problem.in_flight)",
        "fewest = max(problem.in_flight)",
        "test_windows.py::test_windows_are_as_wide_as_they_have_to_be",
        "a stash counts on every stage as on that with the most in flight",
    ),
    Mutant(
        "passes/integer/windows.py",
        "np.array(problem.budget_bytes) - np.array(problem.reserve_bytes)",
        "np.array(problem.budget_bytes) - 2 * np.array(problem.reserve_bytes)",
        "test_windows.py::test_windows_are_as_wide_as_they_have_to_be",
        "reserves are taken off twice",
    ),
    Mutant(
        "passes/integer/windows.py",
        "first[lead], final[lead] = max(first[lead], first[unit]), min(final[lead], final[unit])",
        "pass",
        "test_windows.py::test_windows_are_as_wide_as_they_have_to_be",
        "a pin holds for one unit of its group",
    ),
    Mutant(
        "passes/integer/solvers.py",
        "lp.solverModel = Quiet()",
        "lp.solverModel = highspy.Highs()",
        "test_silence.py::test_the_first_solve_of_a_process_prints_nothing",
        "the solver writes above what commands print",
    ),
)

LINKS = (
    Mutant(
        "runtime/compression/rounding.py",
        "self._kept.index_copy_(0, rows, wide.sub_(self._codec.decode(data)))",
        "self._kept.index_fill_(0, rows, 0.0)",
        "test_compressed_gradients.py::test_what_is_sent_and_what_is_kept_are_all",
        "what was rounded away is forgotten",
    ),
    Mutant(
        "runtime/compression/touched.py",
        "rows_pay(max(each),",
        "rows_pay(each[self._endpoint.replica],",
        "test_touched_rows.py::test_any_rows_have_the_bits_of_their_mean",
        "replicas decide each by its own rows whether rows travel",
    ),
    Mutant(
        "compiler/profiling/touched_rows.py",
        "_pieces(bits.view(whole))",
        "_pieces(bits)",
        "test_touched_rows.py::test_any_rows_have_the_bits_of_their_mean",
        "rows of -0 count as untouched",
    ),
    Mutant(
        "runtime/files/tensor_file.py",
        "checksums.of_tensor(tensor) == sums[name]",
        "sums[name]",
        "test_weight_files.py::test_any_flipped_bit_of_an_export_is_told_or_does_no_harm",
        "checksums of exports are not compared",
    ),
    Mutant(
        "passes/attention/kernels.py",
        "if self.masks or query.dtype not in _HALVES",
        "if query.dtype not in _HALVES",
        "test_attention_kernels.py",
        "masked attention is planned by a kernel that takes no mask",
    ),
    Mutant(
        "compiler/tracing/copies.py",
        "if different is None or different & template.reads:",
        "if different is None:",
        "test_copies.py::test_layers_that_read_what_differs_are_traced",
        "layers are copies of one that read something else",
    ),
    Mutant(
        "compiler/tracing/copies.py",
        "found[path, name] = StandIn((path, name), value, used.add)",
        "found[path, name] = StandIn((path, name), value, len)",
        "test_helpers.py::test_layers_that_use_more_than_what_the_cache_returns_are_traced",
        "layers are copies of one that does something else with its number",
    ),
    Mutant(
        "compiler/layers/copies.py",
        "found[owners[other]] = self.copies[period][at]",
        "found[owners[other]] = self.copies[1][at]",
        "test_layers.py::test_layers_are_differentiated_once_where_they_are_alike",
        "gradients of layers that are copies are those of the first copy",
    ),
    Mutant(
        "compiler/layers/copies.py",
        "        self._check_states()\n",
        "",
        "test_layers.py::test_what_layers_share_has_the_gradients_of_all",
        "a weight that layers share has the gradient of one",
    ),
    Mutant(
        "compiler/costs/topology.py",
        'return rank // self.pp if self.order == "pipeline" else rank % self.dp',
        "return rank // self.pp",
        "test_topology.py",
        "replicas are told from ranks in one order alone",
    ),
)

MUTANTS = (
    *MODES,
    *LIMITS,
    *PLANNING,
    *SOLVER,
    *VERIFIERS,
    *FIGURES,
    *BITS,
    *KEPT,
    *SIZES,
    *BETWEEN_RUNS,
    *NUMBERS,
    *SHARDING,
    *PRECISION,
    *FREEING,
    *CHECKPOINTS,
    *WATCHDOG,
    *LINKS,
)
