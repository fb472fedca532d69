# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The composition matrix: which tests cover which cell.

Each cell is a Pyro handler, or a way to run a model, and a place: around ``macro_do``
("outside"), in the model that it wraps ("inside"), or both. Tests with the fixtures
``do`` and ``add`` run as wrapper, decorator and context manager. The answer is a closed
form where there is one, and otherwise the program after the intervention, by hand.
"""

import importlib
import pathlib

import pytest

CELLS = {
    "test_plain": {
        "plain call": "test_plain_call_",
        "plain call, aggregate": "test_plain_call_of_aggregate_",
        "trace, Natural": "test_trace_has_the_density_",
        "trace, Natural, confounded": "test_trace_of_a_confounded_program_has_",
        "trace, Natural, given": "test_trace_of_a_confounded_program_with_given_",
        "trace, Residual": "test_trace_of_residual_",
        "trace, Allocate": "test_trace_of_allocate_",
        "trace, Proportional and Shift": "test_trace_of_what_acts_on_the_natural_",
        "trace, Explicit": "test_trace_of_explicit_",
        "trace, gradients": "test_trace_has_the_gradients_",
        "trace, aggregate": "test_trace_of_aggregate_",
        "aggregate outside macro_do": "test_aggregate_outside_macro_do_",
        "aggregate inside macro_do": "test_aggregate_inside_macro_do_",
    },
    "test_condition": {
        "condition inside, other site": "test_condition_inside_on_a_cause_",
        "condition inside, effect": "test_condition_inside_on_an_effect_",
        "condition outside, other site": "test_condition_outside_on_a_cause_",
        "condition outside, given site": "test_condition_outside_on_a_given_",
        "condition outside, effect": "test_condition_outside_on_an_effect_",
        "condition inside, micro site": "test_condition_inside_on_a_micro_",
        "condition outside, micro site": "test_condition_outside_on_a_micro_",
        "condition inside, macro value": "test_condition_inside_on_the_macro_",
        "condition outside, macro value": "test_condition_outside_on_the_macro_",
        "condition, latent on the fibre": "test_condition_outside_on_the_latent_",
        "condition, latent off the fibre": "test_condition_on_the_latent_site_off_",
        "condition, aggregate": "test_condition_on_another_site_is_seen_by_",
        "condition, aggregate, micro site": "test_condition_on_a_micro_site_is_seen_",
        "condition, aggregate, macro value": "test_condition_outside_on_an_aggregat",
    },
    "test_do": {
        "do inside, other site": "test_do_inside_on_a_cause_",
        "do outside, other site": "test_do_outside_on_a_cause_",
        "do, effect": "test_do_on_an_effect_",
        "do inside, given site": "test_do_inside_on_a_given_cause_",
        "do outside, given site": "test_do_outside_on_a_given_cause_",
        "do inside, micro site": "test_do_inside_on_a_micro_site_is_an_error_",
        "do outside, micro site": "test_do_outside_on_a_micro_site_is_an_error_",
        "do outside, macro value": "test_do_outside_on_the_macro_value_",
        "do outside, latent": "test_do_outside_on_the_latent_site_",
        "do, aggregate": "test_do_on_another_site_is_seen_by_",
        "do outside, aggregate, micro site": "test_do_outside_on_a_micro_site_is_what",
        "do outside, aggregate, macro value": "test_do_outside_on_an_aggregated_",
        "do inside, aggregate, micro site": "test_do_inside_on_a_micro_site_is_ref",
        "two, disjoint, nested": "test_two_nested_macro_do_each_",
        "two, disjoint, nested, given": "test_two_nested_macro_do_with_given_",
        "two, disjoint, one handler": "test_two_macro_do_on_independent_parts_",
        "two, disjoint, one handler, given": "test_two_macro_do_in_one_handler_with_",
        "two, one given the other": "test_two_macro_do_in_one_handler_may_",
        "two, dependent": "test_two_macro_do_in_one_handler_that_are_dependent_",
        "two, natural state": "test_second_macro_do_may_act_on_the_natural_",
        "two, one acts on the other": "test_two_macro_do_where_one_acts_",
        "two, shared, nested": "test_two_nested_macro_do_on_a_shared_",
        "two, shared, one handler": "test_two_macro_do_on_a_shared_site_in_one_",
        "two, aggregate": "test_aggregates_may_share_",
    },
    "test_plates": {
        "plate outside": "test_plate_outside_draws_",
        "plate outside, confounded": "test_plate_outside_of_a_confounded_",
        "plate outside, given": "test_plate_outside_holds_",
        "plate outside, grid of values": "test_plate_outside_takes_a_grid_",
        "plate outside, aggregate": "test_plate_outside_of_aggregate",
        "plate inside, stays": "test_plate_inside_stays_",
        "plate inside, given": "test_plate_inside_holds_",
        "plate inside, aggregate": "test_plate_inside_of_aggregate_",
        "plate inside, over": "test_plate_in_over_is_",
        "plate inside, over, aggregate": "test_plate_in_over_of_aggregate_",
        "plate inside, both": "test_one_plate_stays_and_one_is_added_up",
        "plates inside and outside": "test_plate_inside_and_plate_outside",
        "subsampled, inside": "test_subsampled_plate_scales_",
        "subsampled, outside": "test_subsampled_plate_outside_",
        "subsampled, over": "test_subsampled_plate_in_over_is_an_error_that_",
        "subsampled, aggregate": "test_subsampled_plate_of_aggregate_",
        "subsampled, over, aggregate": "test_subsampled_plate_in_over_is_an_error_of",
    },
    "test_mask_scale": {
        "mask inside and outside, whole": "test_mask_of_a_whole_",
        "mask inside": "test_mask_inside_",
        "mask outside": "test_mask_outside_",
        "mask of elements": "test_mask_of_elements_",
        "mask, aggregate": "test_mask_is_seen_by_",
        "scale inside and outside": "test_scale_of_a_whole_",
        "scale inside times outside": "test_scales_inside_and_outside_",
        "scale, gradients": "test_scale_acts_on_",
        "scale, aggregate": "test_scale_is_seen_by_",
    },
    "test_block_scope": {
        "block inside, micro site": "test_block_inside_that_hides_a_micro_site_is_an_",
        "block inside, other site": "test_block_inside_that_hides_another_",
        "block inside, cause": "test_block_inside_that_hides_a_cause_",
        "block inside, given": "test_block_inside_that_hides_a_given_",
        "block outside": "test_block_outside_hides_",
        "block inside, aggregate": "test_block_inside_that_hides_a_micro_site_is_unk",
        "block outside, aggregate": "test_block_outside_of_aggregate_",
        "scope inside": "test_scope_inside_is_",
        "scope inside, given": "test_scope_inside_of_given",
        "scope outside": "test_scope_outside_names_",
        "scope outside, given": "test_scope_outside_of_given",
        "scopes inside and outside": "test_scopes_inside_and_",
        "scope, aggregate": "test_scope_of_aggregate",
    },
    "test_lift_replay": {
        "lift inside": "test_lift_inside_makes_",
        "lift inside, given": "test_lift_inside_with_given_",
        "lift outside": "test_lift_outside_holds_",
        "lift, aggregate": "test_lift_is_seen_by_",
        "replay of the intervened": "test_replay_of_a_trace_of_the_intervened_",
        "replay of the unaltered": "test_replay_of_a_trace_of_the_unaltered_",
        "replay, off the fibre": "test_replay_of_a_latent_site_off_",
        "replay, parameters": "test_replay_of_parameters_",
        "replay, aggregate": "test_replay_is_seen_by_",
    },
    "test_reparam": {
        "reparam inside, micro site": "test_reparam_inside_of_a_micro_site_leaves_",
        "reparam outside, micro site": "test_reparam_outside_of_a_micro_",
        "reparam inside, cause": "test_reparam_inside_of_a_cause_that_is_integr",
        "reparam outside, cause": "test_reparam_outside_of_a_cause_",
        "reparam, given": "test_reparam_of_a_given_cause_",
        "reparam, effect": "test_reparam_of_an_effect",
        "reparam, aggregate": "test_reparam_is_seen_by_",
    },
    "test_enumeration": {
        "enumeration beside": "test_enumerated_site_beside_",
        "enumeration of given, ELBO": "test_given_site_that_is_enumerated_gives_",
        "enumeration of given, posterior": "test_given_site_that_is_enumerated_has_",
        "enumeration of given, plate": "test_given_site_that_is_enumerated_in_",
        "enumeration of what is not given": "test_discrete_cause_that_is_not_given_",
        "enumeration, aggregate": "test_aggregate_of_an_enumerated_",
        "markov beside": "test_markov_chain_beside_",
        "markov, micro sites": "test_micro_sites_along_a_markov_",
        "enumerated chain, given": "test_given_chain_in_a_plain_loop_",
        "markov, given": "test_given_markov_chain_within_",
        "markov, given, out of scope": "test_given_markov_chain_out_of_scope_",
        "markov, aggregate": "test_aggregate_along_a_markov_",
    },
    "test_inference": {
        "vectorize_particles": "test_particles_each_have_",
        "vectorize_particles, given": "test_vectorized_particles_each_",
        "vectorize_particles, gradients": "test_vectorized_particles_have_the_grad",
        "Predictive": "test_predictive_holds_the_total_",
        "Predictive, over": "test_predictive_never_adds_up_",
        "Predictive, posterior samples": "test_predictive_holds_the_given_",
        "Predictive, samples of the unaltered": "test_predictive_with_samples_of_",
        "Predictive, grid": "test_predictive_with_a_grid_",
        "Predictive, bare grid": "test_predictive_with_a_bare_grid_",
        "Predictive, aggregate": "test_predictive_of_aggregate_",
        "Importance": "test_importance_",
        "AutoNormal": "test_auto_normal_at_",
        "AutoNormal, coordinates": "test_auto_normal_has_",
        "AutoMultivariateNormal": "test_auto_multivariate_normal_can_",
        "AutoMultivariateNormal, coordinates": "test_auto_multivariate_normal_has_",
        "NUTS, potential": "test_nuts_sees_",
        "NUTS, given": "test_nuts_holds_",
        "NUTS, run": "test_nuts_in_a_short_run_",
        "NUTS, posterior (slow)": "test_nuts_samples_",
    },
    "test_modules": {
        "PyroModule, parameters": "test_wrapped_module_exposes_",
        "PyroModule, PyroSample and PyroParam": "test_module_samples_are_micro_",
        "PyroModule, context": "test_module_samples_in_a_context",
        "PyroModule, nested": "test_wrapped_module_as_part_",
        "PyroModule, buffers": "test_buffers_are_",
        "PyroModule, param store": "test_param_store_holds_what_a_plain_run_of_a_",
        "param store": "test_param_store_holds_what_a_plain_run_leaves_",
    },
    "test_program_views": {
        "render_model": "test_rendered_edges_are_",
        "render_model, macro value": "test_rendered_macro_value_",
        "render_model, aggregate": "test_rendered_edges_of_aggregate",
        "get_dependencies": "test_dependencies_are_",
        "get_dependencies, plates": "test_dependencies_of_a_batch_",
        "get_dependencies, aggregate": "test_dependencies_of_aggregate_",
        "get_model_relations": "test_relations_cut_",
    },
}


@pytest.mark.parametrize(
    "module, cell", [(m, c) for m, cells in CELLS.items() for c in cells]
)
def test_cell_is_covered(module, cell):
    names = dir(importlib.import_module(f".{module}", __package__))
    assert any(name.startswith(CELLS[module][cell]) for name in names)


def test_no_module_is_left_out():
    found = {path.stem for path in pathlib.Path(__file__).parent.glob("test_*.py")}
    assert found == set(CELLS) | {"test_matrix"}
