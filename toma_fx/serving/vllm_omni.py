"""Flux in vLLM-Omni, by its step protocol: its scheduler says who steps, `StepBatcher` batches.

    runner, for each request:  prepare_encode(state)
            for each step:     denoise_step(batch, states) -> noise of all, in their order
                               step_scheduler(state, noise)     of each
            at its end:        post_decode(state)

What a request keeps lies in its own state of the runner, so that a request that is aborted, which
the runner does not tell, leaves nothing behind. Contract: vLLM-Omni 0.30, `SupportsStepExecution`
of `vllm_omni/diffusion/models/interface.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from toma_fx.api import optimize
from toma_fx.compat.libraries import unpack_latents
from toma_fx.errors import ConfigError, MissingPackageError
from toma_fx.export.packages import import_package
from toma_fx.serving.batcher import StepBatcher

NAME = "TomaFluxPipeline"
KEY = "toma_fx"
"""Of what a request keeps, in `state.extra`, and of our settings, in `additional_config`."""


def register() -> None:
    """Make the pipeline known to vLLM-Omni; the entry point `vllm_omni.general_plugins`."""
    registry = _import("vllm_omni.diffusion.registry")
    registry.register_diffusion_model(NAME, __name__, NAME, post_process_func_name="post_process")


def post_process(od_config: Any) -> Callable[[Tensor], Any]:
    """What makes pictures of decoded tensors, in the process that answers."""
    from diffusers.image_processor import VaeImageProcessor

    if od_config.output_type == "latent":
        return lambda latents: latents
    pictures: Callable[[Tensor], Any] = VaeImageProcessor().postprocess
    return pictures


def _import(name: str) -> Any:
    return import_package(
        name,
        lambda _: MissingPackageError(
            "the plug-in needs vLLM-Omni", where=name, hint="pip install vllm-omni"
        ),
    )


class TomaFluxPipeline(nn.Module):
    """Text to image by Flux: the pipeline of diffusers, its loop turned inside out.

    Args:
        od_config: of vLLM-Omni. `additional_config["toma_fx"]` holds options of `toma_fx.optimize`,
            besides `buckets` (of `StepBatcher`) and `compile`. prefix: not used.

    Raises:
        ConfigError: step execution is off.
    """

    supports_step_execution: ClassVar[bool] = True
    supports_request_batch: ClassVar[bool] = True

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        from diffusers import FluxPipeline

        super().__init__()
        if not od_config.step_execution:
            raise ConfigError(
                "the pipeline draws step by step only", where="step_execution",
                expected="True", got=repr(od_config.step_execution), hint="--step-execution",
            )  # fmt: skip
        self.device = _import("vllm_omni.diffusion.distributed.utils").get_local_device()
        self.pipeline: Any = FluxPipeline.from_pretrained(
            od_config.model, torch_dtype=od_config.dtype
        ).to(self.device)
        options = dict(od_config.additional_config.get(KEY, {}))
        buckets, compiled = options.pop("buckets", (1, 2, 4, 8)), options.pop("compile", False)
        transformer: Any = optimize(self.pipeline.transformer, **options)
        self.batcher = StepBatcher(transformer.compile() if compiled else transformer, buckets)
        for name, part in self.pipeline.components.items():  # to be seen by those who move weights
            if isinstance(part, nn.Module):
                self.add_module(name, part)

    def load_weights(self, weights: Any) -> set[str]:
        """Names of the parameters: they are loaded already."""
        return {name for name, _ in self.named_parameters()}

    @torch.no_grad()
    def prepare_encode(self, state: Any, **_: Any) -> Any:
        """Text, noise and timesteps of a request."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        pipe, sampling = self.pipeline, state.sampling
        side = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = sampling.height or side, sampling.width or side
        count = max(sampling.num_outputs_per_prompt, 1)
        embeds, pooled, text_ids = pipe.encode_prompt(
            _prompt(state.prompt), device=self.device, num_images_per_prompt=count,
            max_sequence_length=sampling.max_sequence_length or 512,
        )  # fmt: skip
        channels = pipe.transformer.config.in_channels // 4
        state.latents, image_ids = pipe.prepare_latents(
            count, channels, height, width, embeds.dtype, self.device, sampling.generator
        )
        steps = sampling.num_inference_steps or 28
        scheduler = copy.deepcopy(pipe.scheduler)
        names = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
        shift = [scheduler.config[name] for name in names]
        state.timesteps, _steps = retrieve_timesteps(
            scheduler, steps, self.device, sigmas=np.linspace(1.0, 1 / steps, steps).tolist(),
            mu=calculate_shift(state.latents.shape[1], *shift),
        )  # fmt: skip
        scheduler.set_begin_index(0)
        state.scheduler, state.step_index = scheduler, 0
        call = {
            "pooled_projections": pooled,
            "encoder_hidden_states": embeds,
            "txt_ids": text_ids,
            "img_ids": image_ids,
            "return_dict": False,
        }
        if pipe.transformer.config.guidance_embeds:
            scale = sampling.guidance_scale if sampling.guidance_scale_provided else 3.5
            call["guidance"] = torch.full((count,), float(scale), device=self.device)
        state.extra[KEY] = {"call": call, "size": (height, width), "state": None, "error": None}
        return state

    @torch.no_grad()
    def denoise_step(
        self, input_batch: Any, *, states: Sequence[Any] | None = None, **_: Any
    ) -> Tensor:
        """Noise of all requests, their rows in the order of `states`.

        Raises:
            ConfigError: without the requests; the batch alone does not tell what they keep.
        """
        if states is None:
            raise ConfigError("denoise_step without states", where="states", got="None")
        calls = {}
        for each in states:
            own, latents = each.extra[KEY], each.latents
            self.batcher.join(each.request_id, steps=len(each.timesteps), state=own["state"])
            time = each.current_timestep.expand(len(latents)).to(latents.dtype) / 1000
            calls[each.request_id] = {**own["call"], "hidden_states": latents, "timestep": time}
        results = self.batcher.step(calls)
        noise = []
        for each in states:
            own, result = each.extra[KEY], results[each.request_id]
            own["state"], own["error"] = self.batcher.leave(each.request_id), result.error
            failed = result.error is not None
            noise.append(torch.zeros_like(each.latents) if failed else result.outputs[0])
        return torch.cat(noise)

    @torch.no_grad()
    def step_scheduler(self, state: Any, noise_pred: Tensor, **_: Any) -> None:
        """Move a request by its noise; raises what its step met, so that it fails alone."""
        if state.extra[KEY]["error"] is not None:
            raise state.extra[KEY]["error"]
        moved = state.scheduler.step(
            noise_pred, state.current_timestep, state.latents, return_dict=False
        )[0]
        state.latents = moved.to(state.latents.dtype)
        state.step_index += 1

    @torch.no_grad()
    def post_decode(self, state: Any, **_: Any) -> Any:
        """The pictures of a request, [n, 3, H, W] in [-1, 1], or its latents."""
        result = _import("vllm_omni.diffusion.data").DiffusionOutput
        if state.sampling.output_type == "latent":
            return result(output=state.latents)
        pipe = self.pipeline
        height, width = state.extra[KEY]["size"]
        latents = unpack_latents(pipe, state.latents, height, width)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return result(output=pipe.vae.decode(latents, return_dict=False)[0])


def _prompt(prompt: Any) -> str:
    """The text of a request.

    Raises:
        ConfigError: there is none, or there is a negative one, which Flux has no use for.
    """
    fields = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt or {})
    if not isinstance(fields.get("prompt"), str) or fields.get("negative_prompt"):
        raise ConfigError(
            "a prompt that can't be drawn", where="prompt",
            expected="a text, and no negative one", got=repr(prompt),
        )  # fmt: skip
    return str(fields["prompt"])
