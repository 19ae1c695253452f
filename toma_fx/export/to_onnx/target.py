"""ONNX: models that any runtime which reads ONNX can run, and ONNX Runtime to run them here.

    refresh.onnx, reuse.onnx, plain.onnx   one model for each kind of step, or refresh.onnx alone
    weights.safetensors                    the weights of all of them, each once

    exported program -> ONNX -> casts before mixed joins -> constants folded -> weights moved out
                     -> transposed weights stored as they are used -> names -> checked by path

Weights are external data of the models: their bytes lie in one file, whose header is that of
safetensors, so that it can also be read without any of the models. ONNX has no state, and a write
into a buffer would be lost without a word: patterns are inputs and outputs.

Matrices that a model transposes first are stored transposed. A runtime would do it when it loads a
model, once for each model, and so hold every such weight several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from toma_fx.errors import BuildError, ConfigError
from toma_fx.export.artifact import Build
from toma_fx.export.manifest import Device, Manifest, ProgramSpec, TargetSpec
from toma_fx.export.packages import _missing, _quiet, _version, imported
from toma_fx.export.programs import Exported, Programs
from toma_fx.export.targets import Lowered, Runtime, Target
from toma_fx.export.to_onnx.check import _check
from toma_fx.export.to_onnx.names import _Names, file_of
from toma_fx.export.to_onnx.passes import _cast_joins, _simplify
from toma_fx.export.to_onnx.runtime import ORTRuntime
from toma_fx.export.to_onnx.weights import WEIGHTS, _save, _store, _sync
from toma_fx.methods.checks import check_choice

Form = Literal["cached", "stateless"]


OPSETS = range(18, 26)
"""What `torch.onnx` writes and ONNX Runtime reads correctly."""


DEFAULT_OPSET = 23
"""The first with attention as one operator: it needs no tokens x tokens matrix on a GPU."""


BUILD_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ONNXTarget(Target):
    """ONNX models.

    Attributes:
        form: "cached", where patterns are handed from step to step; or "stateless", one model that
            selects in every merged step and takes no patterns.
        opset: version of the ONNX operators, 18 to 25. From 23 on attention is one operator;
            runtimes that lack it need 22 or less.

    Raises:
        UnknownNameError: no such form. ConfigError: no such opset.
    """

    form: Form = "cached"
    opset: int = DEFAULT_OPSET

    name = "onnx"

    def __post_init__(self) -> None:
        check_choice("form", self.form, get_args(Form))
        if type(self.opset) is not int or self.opset not in OPSETS:
            raise ConfigError(
                "unsupported ONNX opset",
                where="opset",
                expected=f"a whole number from {OPSETS[0]} to {OPSETS[-1]}",
                got=repr(self.opset),
                hint=f"leave it out for {DEFAULT_OPSET}",
            )

    def check_installed(self) -> None:
        """Raise, before anything is exported, if a package is missing.

        Raises:
            MissingPackageError: names it and the extra.
        """
        for package in BUILD_PACKAGES:
            imported(package)

    def check(self, programs: Programs) -> None:
        """Raise, before anything is made, if ONNX models can't be made or compared here.

        Raises:
            MissingPackageError: on a GPU, ONNX Runtime without CUDA.
            BuildError: bfloat16 on a CPU, or another device.
        """
        providers = imported("onnxruntime").get_available_providers()
        device = programs.device.type
        if device not in ("cpu", "cuda"):
            raise BuildError(
                "ONNX artifacts are built on cpu or cuda",
                where="device",
                expected="a model on cpu or cuda",
                got=device,
            )
        if device == "cuda" and "CUDAExecutionProvider" not in providers:
            raise _missing("onnxruntime-gpu", "onnx-gpu")
        tensors = [*programs.leaves, *programs.denoiser.denoiser.state_dict().values()]
        if device == "cpu" and any(getattr(x, "dtype", None) == torch.bfloat16 for x in tensors):
            raise BuildError(
                "ONNX Runtime has no bfloat16 kernels for CPUs, so nothing could be compared",
                where="dtype",
                expected="float32 or float16 on cpu, or bfloat16 on cuda",
                got="bfloat16 on cpu",
                hint="model.half() or model.float(), or move the model to a GPU",
            )

    def lower(self, programs: Programs, build: Build) -> Lowered:
        """Write one model for each program, and the weights with the first of them.

        Raises:
            BuildError: a program can't be expressed in ONNX; the disk is full.
        """
        chosen = self._chosen(programs)
        main = next(iter(chosen))
        specs = {}
        for call, made in chosen.items():
            names = _Names.of(programs, made)

            def write(folder: Path, call: str = call, names: _Names = names) -> None:
                model = self._converted(call, chosen[call], names)
                _store(model, folder, first=call == main)
                _save(model, folder / file_of(call))
                _check(folder / file_of(call), self.opset, names, call)
                _sync(model)

            files = (file_of(call), WEIGHTS) if call == main else (file_of(call),)
            build.stage(f"onnx {call}", write, *files)
            specs[call] = ProgramSpec(file_of(call), "", made.pattern_inputs, made.pattern_outputs)
        target = TargetSpec("onnx", {"form": self.form, "opset": str(self.opset)})
        device = Device(programs.device.type, "", "")
        versions = {p: _version(p) for p in ("onnx", "onnxscript", "onnxruntime")}
        return Lowered(target, device, specs, versions)

    def _chosen(self, programs: Programs) -> dict[str, Exported]:
        """The programs of the form: of the stateless one those without patterns."""
        if self.form == "cached":
            return {str(call): made for call, made in programs.items()}
        made: dict[str, Exported] = {
            call: programs[call] for call in programs if call in ("refresh", "plain")
        }
        if "refresh" not in made and "reuse" in programs:  # a method without patterns
            made = {"reuse": programs["reuse"], **made}
        return {call: replace(program, pattern_outputs=()) for call, program in made.items()}

    def _converted(self, call: str, made: Exported, names: _Names) -> Any:
        """One program as an ONNX model, weights still those of the process."""
        with _quiet():
            try:
                program = torch.onnx.export(
                    made.program,
                    dynamo=True,
                    opset_version=self.opset,
                    optimize=False,  # its rewriting takes minutes on unrolled selections
                    verbose=False,
                )
            except Exception as error:  # the exporter's translations raise whatever they like
                raise _inexpressible(call, error) from error
            assert program is not None
            model = program.model
            names.keep_outputs(model)
            _cast_joins(model)
            _simplify(model)
        names.give(model, call)
        return model

    @staticmethod
    def open(
        folder: Path, manifest: Manifest, device: torch.device, options: Mapping[str, Any]
    ) -> Runtime:
        """Open a verified artifact in ONNX Runtime.

        Args:
            folder, manifest: of the artifact. device: cpu or cuda.
            options: "providers": execution providers as ONNX Runtime takes them, first choice
                first; by default TensorRT and CUDA where they are installed, on a CUDA device.
                "threads": of one operator, on a CPU. "prepack": whether ONNX Runtime may rearrange
                weights for its CPU kernels, which costs memory: each model gets its own.

        Raises:
            MissingPackageError: ONNX Runtime is not installed. UnknownNameError: an unknown option
                or provider. ArtifactError: ONNX Runtime can't read the models, or not on `device`.
        """
        return ORTRuntime(folder, manifest, device, options)


def _inexpressible(call: str, error: Exception) -> BuildError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return BuildError(
        "a program can't be expressed in ONNX",
        where=call,
        got=f"{type(cause).__name__}: {str(cause)[:500]}",
        hint="report the model, or try another opset or method",
    )
