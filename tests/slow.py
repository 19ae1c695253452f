"""All slow tests by name, which `make test` leaves out and `make test-all` runs.

`tests/conftest.py` gives the marker `slow` to what an entry matches, and stops the run at an entry
that matches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Slow:
    """Tests by node id below `tests/`, and why they are slow.

    Attributes:
        tests: node id; "*" stands for any characters. quick: parameters of these tests, as pytest
            writes them between brackets, that stay in the quick run.
    """

    tests: str
    why: str
    quick: tuple[str, ...] = ()


INDUCTOR = "compiles with Inductor; quick tests compile the same kinds of program once"
WHOLE = "one more whole model, like those of the quick run"
MORE = "one more value of a parameter, computed like those of the quick run"
PIPELINE = "one more whole pipeline, like those of the quick run"
ONNX = "one more export to ONNX; quick tests export each kind of program and of selection"
PROCESSES = "several processes that import everything; the quick run has two small ones"
SUBPROCESS = "starts a process that imports everything, for an example or a command"

SLOW = (
    # benchmarks
    Slow("benchmarks/test_gpu.py::test_every_part_runs_in_small", INDUCTOR),
    Slow("benchmarks/test_gpu.py::test_sdxl_in_inference_mode", INDUCTOR),
    # measure
    Slow("measure/test_tune.py::test_a_recipe_for_a_*", "draws some twenty generations each"),
    Slow("measure/test_tune.py::test_the_command_writes_a_recipe", "draws some ten generations"),
    Slow("measure/test_tune.py::test_merging_alone_*", "draws some ten generations"),
    Slow("measure/test_subjects.py::test_a_configuration_is_optimized_*", "draws whole pictures"),
    Slow("measure/test_work.py::test_a_generation_of_every_kind_*", "draws whole pictures"),
    Slow("measure/test_work.py::test_kept_bytes_*", "draws whole pictures"),
    Slow("measure/test_bench.py::test_the_command_writes_json", "draws whole pictures"),
    Slow("measure/test_merging.py::test_levels_of_a_unet_merge_alone", WHOLE),
    # more values of a parameter, of which the quick run has one or two
    *(
        Slow(f"{name}", MORE)
        for name in (
            "run/test_switches.py::test_merging_off_is_the_original_and_on_as_before[salient]",
            "run/test_switches.py::test_merging_off_is_the_original_and_on_as_before[tofu]",
            "run/test_switches.py::test_merging_off_is_the_original_and_on_as_before[tomesd]",
            "run/test_runtime.py::test_no_gradients_are_kept_whatever_the_mode[no_grad]",
            "run/test_runtime.py::test_thrashing_is_a_warning[each twice]",
            "run/test_caching.py::test_equals_an_eager_implementation[flux-block-1]",
            "run/test_caching.py::test_fitted_weights_equal_an_eager_implementation[sdxl-deep-2]",
            "run/test_processes.py::test_copies_of_a_denoiser_keep_its_settings[pickle-True]",
            "run/test_interrupts.py::test_at_every_line_of_a_step[denoiser-RuntimeError]",
            "run/test_interrupts.py::test_at_every_line_of_a_told_step[True]",
            "run/test_stepper.py::test_threads_do_not_disturb_each_other[backend]",
            "serving/test_batcher.py::test_each_request_gets_what_it_gets_alone[flux-merged-computed]",
            "analysis/test_variants.py::test_changed_model[flux, DoRA]",
            "analysis/test_variants.py::test_changed_model[flux, two adapters]",
            "analysis/test_variants.py::test_odd_shapes[1-grid0-3]",
            "analysis/test_own_models.py::test_both_pass_the_oracles_of_the_matrix[packed-grid0]",
            "passes/test_oracles.py::test_permuted_tokens_give_the_original_output[flux-tile-sublayer]",
            "zoo/test_references.py::test_stack[pixart_sigma]",
        )
    ),
    Slow(
        "run/test_switches.py::test_a_configuration_for_some_calls[*]",
        MORE,
        quick=("args1-options1", "args6-options6"),
    ),
    Slow("analysis/test_vision.py::test_merges_or_says_why_not[*]", WHOLE, quick=("vit",)),
    Slow("methods/test_methods.py::test_compiled_without_recompilation[tomesd]", INDUCTOR),
    Slow(
        "run/test_runtime.py::test_one_compiled_program_per_use_and_no_recompilation"
        "[torch.compile]",
        INDUCTOR,
    ),
    Slow(
        "run/test_runtime.py::test_weights_and_patterns_are_static_inputs_of_compiled_programs"
        "[method]",
        INDUCTOR,
    ),
    *(
        Slow(f"zoo/test_zoo.py::test_denoiser[{name}]", WHOLE)
        for name in ("ddpm", "aura_flow", "sana")
    ),
    Slow("run/test_phases.py::test_every_phase_computes_what_it_does_alone", MORE),
    Slow("test_readme.py::test_sdxl_another_method_and_the_summary", PIPELINE),
    Slow("test_readme.py::test_back_end", PIPELINE),
    # inputs
    Slow(
        "test_inputs.py::test_they_are_those_of_the_pipelines_own_call[*]",
        PIPELINE,
        quick=("sdxl_controlnet", "flux_kontext"),
    ),
    Slow("run/test_switches.py::test_whole_models_need_one_capture[sdxl]", WHOLE),
    Slow("run/test_explain.py::test_without_weights[sdxl]", WHOLE),
    *(
        Slow(f"serving/test_triton.py::test_{name}", ONNX)
        for name in (
            "swapped_states_are_noticed",
            "a_step_of_a_sequence_that_has_not_begun_fails_alone",
            "a_bad_step_leaves_its_sequence_where_it_was",
            "what_was_abandoned_makes_room",
            "an_error_that_nobody_foresaw_fails_its_step",
            "outside_triton",
            "the_configuration_is_one_of_the_published_protobuf",
            "the_folder_is_an_artifact*",
            "what_python_left_is_no_reason_to_keep_an_artifact*",
        )
    ),
    Slow("test_types.py::*", "runs mypy over the whole package"),
    # docs
    Slow("test_docs.py::test_first_picture", "draws whole pictures"),
    Slow("test_docs.py::test_artifact_of_the_page", ONNX),
    Slow("test_docs.py::test_quality", "draws whole pictures"),
    Slow("test_docs.py::test_generate", "draws whole pictures"),
    Slow("test_docs.py::test_methods", PIPELINE),
    Slow("test_docs.py::test_warmup", PIPELINE),
    Slow("test_first_hour.py::*", SUBPROCESS),
    Slow("test_notebook.py::test_its_cells_run", "draws whole pictures"),
    # models
    Slow("models/test_train_latent.py::test_a_training_stops_*", "trains"),
    Slow("models/test_latent.py::test_merging_and_caching_apply[latent-sdxl]", WHOLE),
    Slow("models/test_latent.py::test_pictures_depend_on_*[latent-sdxl]", WHOLE),
    Slow("models/test_tiny.py::test_merging_stays_close_*[tiny-flux]", WHOLE),
    Slow(
        "run/test_caching.py::test_fitted_weights_equal_an_eager_implementation[*]",
        MORE,
        quick=("sdxl-deep-2", "flux-stack-2", "flux-block-0"),
    ),
    Slow(
        "run/test_guidance.py::test_both_processes_get_what_one_gets[*]",
        "starts two processes; a quick test of run/test_parallel.py does as well",
    ),
    Slow("run/test_compiled.py::test_dynamo_reads_nothing[torch.compile]", MORE),
    Slow("run/test_waits.py::test_told_steps_read_nothing[sdxl]", WHOLE),
    Slow("serving/test_batcher.py::test_an_error_belongs_to_one_request[*]", MORE, quick=("nan",)),
    Slow("serving/test_vllm_omni.py::test_pictures_are_those_of_diffusers*", PIPELINE),
    Slow("run/test_guidance.py::test_rows_that_cant_be_halved*", "starts two processes"),
    Slow("run/test_guidance.py::test_processes_that_disagree*", "starts two processes"),
    Slow("run/test_guidance.py::test_processes_with_other_models*", "starts two processes"),
    Slow("run/test_guidance.py::test_a_lost_process*", "starts two processes"),
    Slow(
        "serving/test_batcher.py::test_each_request_gets_what_it_gets_alone[*]",
        WHOLE,
        quick=("flux-merged-computed", "flux-both-all"),
    ),
    Slow("serving/test_engine.py::test_*alone[*]", WHOLE),
    Slow("serving/test_engine.py::test_pictures_of_compiled_steps", WHOLE),
    Slow("serving/test_server.py::*", "starts servers and waits for time-outs"),
    Slow("serving/test_triton.py::test_with_compiled_programs", INDUCTOR),
    Slow("serving/test_ray_serve.py::*", "starts Ray and waits for time-outs"),
    Slow("serving/test_comfyui_itself.py::*", "imports ComfyUI, which the stand-in is for"),
    Slow("serving/test_comfyui.py::test_a_picture[*]", MORE, quick=("False",)),
    *(
        Slow(f"serving/test_comfyui.py::test_{name}", "captures several more states of the model")
        for name in (
            "a_controlnet",
            "weights_patched_in_place_or_replaced",
            "clones_have_settings_of_their_own",
        )
    ),
    Slow("run/test_warmup.py::test_another_process_compiles_nothing", INDUCTOR),
    Slow("measure/test_subjects.py::test_compiled_subjects_draw_the_same", INDUCTOR),
    Slow("methods/test_recipe.py::test_a_model_takes_its_recipe", INDUCTOR),
    # export: ends builds at each of their calls
    Slow("export/test_fuzz.py::test_damaged_manifests[20000]", "reads 20,000 manifests"),
    Slow("export/test_fuzz.py::test_damaged_folders[2000]", "loads 2,000 folders"),
    Slow("export/test_manifests.py::test_flipped_bits_are_noticed[1]", "some 70,000 flips"),
    Slow("export/test_crashes.py::test_at_every_call", "some 230 builds"),
    Slow("export/test_crashes.py::test_two_builds_at_once", "some 600 builds"),
    Slow("export/test_crashes.py::test_real_builds*", "some 80 builds"),
    Slow("export/test_leaks.py::*", "loads 200 times and computes 10,000 steps"),
    Slow("export/test_onnx.py::test_onnx_runtime_reports_nothing_home", SUBPROCESS),
    Slow("graph/test_repeats.py::test_inductor_compiles_a_block_once", INDUCTOR),
    Slow("graph/test_repeats.py::test_programs[*]", WHOLE, quick=("flux-stack",)),
    # the quick run has to end in six minutes
    Slow("run/test_backend.py::test_another_shape[None]", INDUCTOR),
    Slow("run/test_processes.py::test_a_state_in_another_process", SUBPROCESS),
    Slow("models/test_latent.py::test_merging_and_caching_apply[latent-flux]", WHOLE),
    Slow("models/test_latent.py::test_pictures_depend_on_*[latent-flux]", WHOLE),
    Slow("run/test_phases.py::test_in_the_back_end", INDUCTOR),
    Slow("methods/test_key_sizes.py::test_compiled_and_exported", INDUCTOR),
    Slow("methods/test_dito.py::test_states_artifacts_and_compilation_agree", INDUCTOR),
    Slow("measure/test_quality.py::test_the_command_compares_an_embedded_model", "draws pictures"),
    Slow("measure/test_work.py::test_generations_are_timed_by_configuration", "draws pictures"),
    Slow("measure/test_tune.py::test_a_budget_that_is_too_small_*", "draws pictures"),
    Slow("export/test_artifact_pipelines.py::test_every_pipeline[flux_true_cfg]", PIPELINE),
    Slow("export/test_cached.py::test_fitted_weights[onnx]", ONNX),
    Slow("run/test_runtime.py::test_half_precision_models[small_flux-torch.float16]", MORE),
    Slow("analysis/test_variants.py::test_torchao[flux-int8 weights]", MORE),
    Slow("analysis/test_variants.py::test_windows_of_a_video[default]", MORE),
    Slow("pipelines/test_methods_reference.py::test_ca_tome_on_sdxl[config-1]", MORE),
    Slow("run/test_caching.py::test_merging_and_caching_equal_*[sdxl]", WHOLE),
    Slow("run/test_runtime.py::test_thrashing_is_a_warning[made ready]", MORE),
    Slow("analysis/test_variants.py::test_sizes_alternate_in_one_module", WHOLE),
    Slow("analysis/test_variants.py::test_a_declared_custom_op_merges[unet-True]", MORE),
    Slow("analysis/test_variants.py::test_odd_shapes_of_a_unet[1-14-18]", MORE),
    Slow("analysis/test_variants.py::test_changed_model[unet, float32 attention]", MORE),
    Slow("analysis/test_variants.py::test_odd_shapes[2-grid1-5]", MORE),
    Slow("run/test_backend.py::test_modes_are_inductor_patches[reduce-overhead]", INDUCTOR),
    Slow("cli/test_artifacts.py::test_an_interrupted_build_goes_on", ONNX),
    Slow("cli/test_sizes.py::test_generations_equal_those_of_artifacts_of_one_size", ONNX),
    Slow("capture/test_references.py::test_weights_of_another_form_are_captured_anew", MORE),
    Slow("capture/test_references.py::test_model_offload_with_quantized_weights[after]", MORE),
    Slow("run/test_backend.py::test_paths_start_at_the_model_however_it_is_called", INDUCTOR),
    Slow("run/test_backend.py::test_a_later_shape_without_sites_raises_the_error_itself", INDUCTOR),
    Slow("run/test_backend.py::test_include_and_exclude_name_module_paths", INDUCTOR),
    # run
    Slow(
        "run/test_caching.py::test_equals_an_eager_implementation[*]",
        MORE,
        quick=("sdxl-deep-2", "flux-stack-2", "flux-block-1"),
    ),
    Slow(
        "run/test_caching.py::test_a_frozen_input_gives_the_computed_step[*]",
        MORE,
        quick=("0.5-flux-block",),
    ),
    Slow(
        "run/test_caching.py::test_what_still_computes_goes_on_merging[*]",
        MORE,
        quick=("todo", "tomesd"),
    ),
    Slow("run/test_caching.py::test_computing_every_step_is_no_caching[sdxl]", WHOLE),
    Slow("run/test_caching.py::test_merging_and_caching_equal_*[flux]", WHOLE),
    Slow("run/test_parallel.py::test_models_give_what_one_process_gives[*]", PROCESSES),
    Slow("run/test_parallel.py::test_what_lines_up_with_tokens_*[*]", PROCESSES),
    Slow("run/test_parallel.py::test_text_that_attention_joins_*[*]", PROCESSES),
    Slow("run/test_parallel.py::test_compiled_programs_share_tokens[*]", PROCESSES),
    Slow("run/test_parallel.py::test_a_program_is_packaged_*", PROCESSES),
    Slow("run/test_parallel.py::test_a_lost_process_*[*]", PROCESSES),
    Slow("run/test_parallel.py::test_text_of_a_length_*", WHOLE),
    # export
    Slow("export/test_cached.py::test_from_cpp[*]", INDUCTOR),
    Slow("export/test_cached.py::test_targets[aoti]", INDUCTOR),
    Slow("export/test_cached.py::test_fitted_weights[aoti]", INDUCTOR),
    # analysis
    Slow("analysis/test_properties.py::test_right_or_refused[40]", MORE),
    Slow("analysis/test_twins.py::test_streams_*[*tomesd*]", MORE),
    Slow("methods/test_key_sizes.py::test_equal_tokens_merge_without_loss[*-block]", MORE),
    Slow("methods/test_methods.py::test_exported_to_onnx[tomesd]", ONNX),
    Slow("methods/test_dito.py::test_steps_equal_an_eager_implementation[ibtm]", MORE),
    Slow("methods/test_dito.py::test_signals_in_every_scope[block]", MORE),
    Slow("run/test_sequences.py::test_random_sequences[True]", MORE),
    Slow("passes/test_reference.py::test_flux_with_a_pattern_per_block[sublayer]", MORE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_on_flux[stack]", MORE),
    Slow("analysis/test_twins.py::test_branches_*[*-1]", MORE, quick=("folded-1",)),
    Slow("analysis/test_variants.py::test_torchao[flux-float8 activations]", MORE),
    Slow("analysis/test_variants.py::test_half_precision_*[unet-torch.float16]", MORE),
    Slow("analysis/test_own_models.py::test_both_pass_*[*-grid1]", MORE),
    Slow("capture/test_companions.py::test_companion[*-before]", MORE),
    Slow("capture/test_opaque.py::test_compiled[*]", INDUCTOR),
    Slow("capture/test_opaque.py::test_quantized[bitsandbytes *]", MORE),
    Slow("capture/test_companions.py::test_companion[FreeU*-through]", MORE),
    Slow("run/test_data_dependent.py::test_all_masks_*[options2]", MORE),
    Slow("run/test_data_dependent.py::test_all_masks_*[options3]", MORE),
    Slow("passes/test_input_streams.py::test_requests_*[by block]", MORE),
    Slow("passes/test_input_streams.py::test_requests_*[lagged and cached]", MORE),
    Slow("analysis/test_twins.py::test_streams_*[*toma-block]", MORE),
    Slow("run/test_phases.py::test_updates_are_kept_from_one_phase_to_the_next[deep]", MORE),
    Slow("run/test_interrupts.py::test_at_every_line_of_a_step[denoiser-KeyboardInterrupt]", MORE),
    Slow("analysis/test_random_modules.py::*[2000]", "2,000 random models"),
    Slow("analysis/test_operators.py::test_right_or_refused[90-*]", "10,000 random calls"),
    Slow(
        "analysis/test_vision.py::test_merges_or_says_why_not[*]",
        WHOLE,
        quick=("vit", "dinov2-registers", "siglip", "dpt", "sam", "swin"),
    ),
    Slow("analysis/test_variants.py::test_torchao[unet-*]", WHOLE),
    Slow("analysis/test_variants.py::test_torchao[flux-int8 activations]", MORE),
    Slow("analysis/test_variants.py::test_torchao[flux-float8 weights]", MORE),
    Slow("analysis/test_variants.py::test_torchao_as_diffusers_loads_it", WHOLE),
    Slow("analysis/test_variants.py::test_adapters_on_int8_weights_are_captured_once", WHOLE),
    Slow("analysis/test_variants.py::test_torchao_compiled[*]", INDUCTOR),
    Slow("analysis/test_variants.py::test_a_declared_custom_op_merges[unet-False]", WHOLE),
    Slow("analysis/test_variants.py::test_a_declared_custom_op_merges[flux-True]", MORE),
    Slow("analysis/test_variants.py::test_changed_model[unet, DoRA]", WHOLE),
    Slow("analysis/test_variants.py::test_changed_model[unet, two adapters]", WHOLE),
    Slow("analysis/test_variants.py::test_changed_model[unet, softmax*]", WHOLE),
    Slow("analysis/test_variants.py::test_changed_model[unet, gradient checkpointing]", WHOLE),
    Slow("analysis/test_variants.py::test_attention_written_out[sd15]", WHOLE),
    Slow(
        "analysis/test_variants.py::test_fused_projections_of_other_families[*]",
        WHOLE,
        quick=("sd3",),
    ),
    Slow("analysis/test_variants.py::test_rotary[*-table-True]", MORE),
    Slow("analysis/test_variants.py::test_rotary[*-a batch of tables-False]", MORE),
    Slow("analysis/test_variants.py::test_attention_slicing_of_a_unet", WHOLE),
    Slow("analysis/test_variants.py::test_half_precision_is_near_float32[unet-*bfloat16]", WHOLE),
    Slow("analysis/test_variants.py::test_half_precision_is_near_float32[flux-*.float16]", MORE),
    Slow("analysis/test_variants.py::test_autocast_around_a_call[unet]", WHOLE),
    Slow("analysis/test_variants.py::test_odd_shapes[4-grid3-17]", MORE),
    Slow("analysis/test_variants.py::test_odd_shapes_of_a_unet[3-26-22]", MORE),
    # capture
    Slow("capture/test_lora.py::test_every_operation_shows_and_is_captured_once[*]", WHOLE),
    Slow("capture/test_lora.py::test_sdxl", WHOLE),
    # cli
    Slow("cli/test_artifacts.py::test_what_a_build_says", SUBPROCESS),
    Slow("cli/test_artifacts.py::test_dry_run*", SUBPROCESS),
    # export
    Slow("export/test_aoti.py::*", "every test there runs what a compiler built"),
    Slow(
        "export/test_artifact_pipelines.py::test_every_pipeline[*]",
        PIPELINE,
        quick=("flux_true_cfg",),
    ),
    Slow("export/test_artifact_pipelines.py::test_guidance[*]", PIPELINE),
    Slow("export/test_artifact_pipelines.py::test_what_an_artifact_can_not_do", PIPELINE),
    Slow("export/test_artifact_pipelines.py::test_pictures_of_the_embedded_models[*]", PIPELINE),
    Slow(
        "export/test_coverage.py::test_programs_of_every_method[*]",
        MORE,
        quick=("toma", "tomesd"),
    ),
    Slow(
        "export/test_coverage.py::test_functions_of_every_method[*]",
        MORE,
        quick=("tofu-torch.*", "retom-ratio-torch.*"),
    ),
    Slow("export/test_coverage.py::test_onnx_artifacts_of_every_method[*]", ONNX, quick=("toma",)),
    Slow("export/test_coverage.py::test_onnx_models_of_every_method[*]", ONNX),
    Slow("export/test_coverage.py::test_whole_models[*]", WHOLE),
    Slow("export/test_onnx_models.py::test_opsets[*]", ONNX),
    Slow("export/test_onnx_models.py::test_stateless_without_patterns", ONNX),
    Slow("export/test_onnx_models.py::test_steps_without_merging[*]", ONNX),
    Slow("export/test_onnx_models.py::test_whole_models[*]", ONNX),
    Slow("export/test_onnx_models.py::test_half_precision[*]", ONNX),
    Slow("export/test_tensorrt.py::test_engines_through_all_steps[onnx]", ONNX),
    Slow("export/test_tensorrt.py::test_several_calls[*]", ONNX),
    Slow("export/test_sizes.py::test_constants_choose", MORE),
    Slow("export/test_tensorrt.py::test_coverage_needs_no_tensorrt[onnx]", ONNX),
    # methods
    Slow(
        "methods/test_methods.py::test_exported_to_onnx[*]",
        ONNX,
        quick=("toma", "tomesd"),
    ),
    Slow("methods/test_baselines.py::test_exports_to_onnx[*]", ONNX),
    Slow("methods/test_bigain.py::test_exports_to_onnx[*]", ONNX),
    Slow("methods/test_coredit.py::test_exports_to_onnx[*]", ONNX),
    Slow("methods/test_dito.py::test_exports_to_onnx[*]", ONNX),
    Slow("methods/test_topi.py::test_compiled_and_exported", ONNX),
    Slow("methods/test_retom.py::test_exports_to_onnx[*]", ONNX),
    Slow("methods/test_todo.py::test_exports_to_onnx[*]", ONNX),
    Slow("methods/test_tomesd.py::test_onnx_gives_the_same[*]", ONNX),
    Slow("methods/test_toma.py::test_compiled_and_eager_choose_the_same_tokens", INDUCTOR),
    Slow("methods/test_key_sizes.py::test_whole_models_equal_*[sublayer]", MORE),
    Slow(
        "methods/test_methods.py::test_compiled_without_recompilation[*]",
        MORE,
        quick=("toma", "tomesd", "salient"),
    ),
    Slow("methods/test_methods.py::test_example_of_an_own_method_runs", SUBPROCESS),
    Slow("methods/test_methods.py::test_whole_models_through_inductor[*]", INDUCTOR),
    Slow(
        "methods/test_facility_triton.py::test_the_kernel_chooses_what_pytorch_chooses",
        "Triton's interpreter; where there is a GPU, a quick test runs the same cases on it",
    ),
    # models
    Slow("models/test_tiny.py::test_merging_stays_close_to_the_*[tiny-sdxl]", WHOLE),
    Slow("models/test_tiny.py::test_demo_writes_pictures_and_figures", PIPELINE),
    Slow("models/test_tiny.py::test_a_quick_demo_of_one_model", PIPELINE),
    # passes
    Slow(
        "passes/test_oracles.py::test_permuted_tokens_give_the_original_output[*]",
        MORE,
        quick=("*-tile-*", "*-stripe-stack", "*-global-sublayer"),
    ),
    Slow("passes/test_reference.py::test_sdxl[*]", MORE, quick=("0.5-sublayer",)),
    Slow("passes/test_reference.py::test_flux[*]", MORE, quick=("0.5-block", "0.5-stack")),
    # pipelines
    Slow(
        "pipelines/test_matrix.py::test_stack[*]",
        PIPELINE,
        quick=("sdxl", "flux_true_cfg"),
    ),
    Slow(
        "pipelines/test_matrix.py::test_other_scopes[*]",
        PIPELINE,
        quick=("flux_ip_adapter-block", "flux_controlnet-sublayer"),
    ),
    Slow(
        "pipelines/test_matrix.py::test_lora_of_the_pipeline[*]",
        PIPELINE,
        quick=("flux_true_cfg",),
    ),
    Slow(
        "pipelines/test_matrix.py::test_saved_and_loaded[*]",
        PIPELINE,
        quick=("sdxl",),
    ),
    Slow(
        "pipelines/test_matrix.py::test_offload_copies_inference_mode_and_components[*]",
        PIPELINE,
        quick=("sdxl",),
    ),
    Slow(
        "pipelines/test_matrix.py::test_sequential_offload_says_what_to_do_instead[sdxl]", PIPELINE
    ),
    Slow("pipelines/test_matrix.py::test_ip_adapter_scale_and_unloading", PIPELINE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_on_sdxl[0.*]", WHOLE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_on_sd15[0.25]", MORE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_on_sd15[0.75]", MORE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_over_blocks_of_sdxl[stack]", MORE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_on_flux[block]", MORE),
    Slow("pipelines/test_methods_reference.py::test_ca_tome_on_sdxl[every-step]", MORE),
    Slow("pipelines/test_methods_reference.py::test_ca_tome_on_flux", WHOLE),
    Slow("pipelines/test_methods_reference.py::test_ca_tome_calibrated_*", WHOLE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_on_sdxl[cells-*]", MORE),
    Slow("pipelines/test_methods_reference.py::test_grid_baseline_*", WHOLE),
    Slow("run/test_state.py::test_threads_step_while_another_captures[True]", INDUCTOR),
    Slow("run/test_backend.py::test_timesteps_given_by_position[options2]", MORE),
    Slow("run/test_backend.py::test_timesteps_that_are_python_numbers[float]", MORE),
    Slow("capture/test_references.py::test_nothing_keeps_weak_*[run_compiled-*]", INDUCTOR),
    Slow("methods/test_key_sizes.py::test_whole_models_equal_*[stack]", MORE),
    Slow("analysis/test_variants.py::test_windows_of_a_video[space-time]", MORE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_over_blocks_of_sdxl[block]", MORE),
    Slow("pipelines/test_methods_reference.py::test_tomesd_on_sdxl[everything-*]", MORE),
    Slow("pipelines/test_methods_reference.py::test_retom_on_sdxl[window1-*]", MORE),
    Slow("pipelines/test_matrix.py::test_lora_of_the_pipeline[flux_true_cfg]", PIPELINE),
    Slow("capture/test_references.py::test_a_graph_follows_quantized_weights[True]", MORE),
    Slow("run/test_phases.py::test_updates_are_kept_from_one_phase_to_the_next[stack]", MORE),
    Slow(
        "pipelines/test_methods_reference.py::test_todo_on_sdxl[*]",
        MORE,
        quick=("factor0-*",),
    ),
    Slow("pipelines/test_methods_reference.py::test_todo_on_flux[3-nearest]", MORE),
    Slow(
        "pipelines/test_methods_reference.py::test_tofu_on_sdxl[*]",
        MORE,
        quick=("0.5-0.5-2",),
    ),
    Slow("pipelines/test_methods_reference.py::test_retom_on_sdxl[window2-*]", MORE),
    Slow("pipelines/test_methods_reference.py::test_retom_on_sdxl[window3-*]", MORE),
    Slow(
        "pipelines/test_reference_pipelines.py::test_keeping_every_token_is_the_original[*]",
        PIPELINE,
        quick=("sdxl_controlnet-*", "flux_true_cfg-*", "flux_kontext-*"),
    ),
    Slow(
        "pipelines/test_reference_pipelines.py::test_merging_the_scope_and_the_schedule*[*]",
        PIPELINE,
        quick=("sdxl_controlnet", "flux_true_cfg", "flux_kontext"),
    ),
    # run
    Slow(
        "run/test_backend.py::test_every_step_equals_the_optimized_denoiser[*]",
        WHOLE,
        quick=("small_flux",),
    ),
    Slow("run/test_backend.py::test_another_shape[False]", MORE),
    Slow("run/test_backend.py::test_timesteps_that_are_python_numbers[int]", MORE),
    Slow("run/test_backend.py::test_a_ratio_of_zero_is_plain_inductor", INDUCTOR),
    Slow("run/test_explain.py::test_every_attention_is_merged*[*]", MORE, quick=("stack",)),
    Slow(
        "capture/test_references.py::test_nothing_keeps_weak_references[*]",
        MORE,
        quick=("run_compiled-True",),
    ),
    Slow("capture/test_references.py::test_weights_that_are_away_while_*", WHOLE),
    Slow("capture/test_references.py::test_every_graph_of_a_model_follows", WHOLE),
    Slow("run/test_backend.py::test_timesteps_given_by_position[options0]", MORE),
    Slow("run/test_backend.py::test_timesteps_given_by_position[options1]", MORE),
    Slow("capture/test_references.py::test_a_graph_follows_quantized_weights[False]", MORE),
    Slow("capture/test_references.py::test_model_offload_with_quantized_weights[before]", MORE),
    Slow(
        "pipelines/test_generations.py::test_steps_are_the_schedulers[*]",
        MORE,
        quick=("DDIMScheduler-6-1",),
    ),
    Slow(
        "pipelines/test_generations.py::test_a_pipeline_*gets_the_truth[*]",
        MORE,
        quick=("flux_true_cfg",),
    ),
    Slow(
        "pipelines/test_generations.py::test_a_cancelled_request_leaves_nothing[*]",
        MORE,
        quick=("0-component", "0-pipeline"),
    ),
    Slow(
        "run/test_processes.py::test_copies_of_a_denoiser_keep_its_settings[*]",
        MORE,
        quick=("copy-False", "deepcopy-False", "pickle-True"),
    ),
    Slow("run/test_sequences.py::test_many_random_sequences[*]", "2,000 random worlds"),
    Slow(
        "run/test_runtime.py::test_half_precision_models[*]",
        WHOLE,
        quick=("small_flux-*.float16",),
    ),
    Slow(
        "passes/test_leading_tokens.py::test_steps_are_those_with_the_batch_first[*]",
        MORE,
        quick=("stack", "keys", "tofu", "cached blocks"),
    ),
    Slow(
        "passes/test_leading_tokens.py::test_requests_at_different_steps_share_a_batch[*]",
        MORE,
        quick=("cached",),
    ),
    # zoo
    Slow(
        "zoo/test_references.py::test_stack[*]",
        WHOLE,
        quick=("pixart_sigma", "sd3", "wan"),
    ),
    Slow("zoo/test_references.py::test_block[*]", WHOLE),
    Slow("zoo/test_linear_references.py::test_linear_attention[*]", MORE, quick=("sana-sublayer",)),
    Slow("zoo/test_references.py::test_tables_matter[*]", WHOLE),
    Slow("zoo/test_references.py::test_reuse[*]", WHOLE),
    Slow("zoo/test_references.py::test_mask_over_the_image[*]", WHOLE),
    Slow(
        "zoo/test_zoo.py::test_denoiser[*]",
        WHOLE,
        quick=(  # mechanisms of their own, of models that are quick to trace
            "ddpm", "sana", "aura_flow", "hunyuan_video_15",
        ),
    ),
    # measure
    Slow(
        "offline/test_generate.py::test_processes_that_are_killed_draw_the_same",
        "starts seven processes that capture a model; a quick test kills one",
    ),
    Slow("offline/test_pipelines.py::test_shards_of_a_pipeline", PIPELINE),
    Slow("offline/test_stage.py::test_in_ray_data", "starts a cluster of Ray and three models"),
    Slow("measure/test_processes.py::*", "starts two processes, three times"),
    Slow(
        "measure/test_bench.py::test_every_configuration_is_timed_in_every_mode",
        "captures and compiles a model twice; a quick test times the eager mode",
    ),
)  # fmt: skip


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text, re.DOTALL) is not None


def slow_tests(
    ids: Iterable[str], entries: Iterable[Slow] = SLOW
) -> tuple[dict[str, str], set[str]]:
    """Which of the node ids (below `tests/`) are slow and why, and the patterns that match none.

    A pattern of a file none of whose tests is among the ids is not looked at: a run of one room
    does not collect the others.
    """
    ids = list(ids)
    files = {i.partition("::")[0] for i in ids}
    slow: dict[str, str] = {}
    unused = set()
    for entry in entries:
        if entry.tests.partition("::")[0] not in files:
            continue
        matched = [i for i in ids if _matches(entry.tests, i)]
        parameters = {i: i.partition("[")[2].removesuffix("]") for i in matched}
        quick = {p: [i for i in matched if _matches(p, parameters[i])] for p in entry.quick}
        unused |= {f"{entry.tests}, quick {p}" for p, found in quick.items() if not found}
        kept = {i for found in quick.values() for i in found}
        slow |= {i: entry.why for i in matched if i not in kept}
        if kept.issuperset(matched):
            unused.add(entry.tests)
    return slow, unused
