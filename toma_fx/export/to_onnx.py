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

import hashlib
import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from toma_fx.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    MissingPackageError,
    UnknownNameError,
    nearest,
)
from toma_fx.export.artifact import Build
from toma_fx.export.manifest import Device, Manifest, ProgramSpec, TargetSpec, TensorSpec
from toma_fx.export.programs import Exported, Programs, parted
from toma_fx.export.targets import Lowered, Runtime, Target, apart, check_options
from toma_fx.methods.base import check_choice

Form = Literal["cached", "stateless"]
OPSETS = range(18, 26)
"""What `torch.onnx` writes and ONNX Runtime reads correctly."""
DEFAULT_OPSET = 23
"""The first with attention as one operator: it needs no tokens x tokens matrix on a GPU."""
WEIGHTS = "weights.safetensors"
INLINE = 1024
"""Bytes below which a constant stays in the model, where shape inference sees it."""
BUILD_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
# not the integers of indices and shapes: shape inference reads those, and not in other files
_SAFETENSORS = {
    "FLOAT": "F32",
    "FLOAT16": "F16",
    "BFLOAT16": "BF16",
    "DOUBLE": "F64",
    "INT8": "I8",
    "UINT8": "U8",
    "FLOAT8E4M3FN": "F8_E4M3",
    "FLOAT8E5M2": "F8_E5M2",
}
_ALIGNED = 64
"""Bytes that every tensor of the weights file starts at a multiple of."""


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
        target = TargetSpec("onnx", self.form, self.opset, {})
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


def file_of(call: str) -> str:
    """Name of the model of a program."""
    return f"{call}.onnx"


# -- packages -------------------------------------------------------------------------------------


def imported(package: str) -> Any:
    """An optional package.

    Raises:
        MissingPackageError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package, "onnx") from error


def _missing(package: str, extra: str) -> MissingPackageError:
    return MissingPackageError(
        f"ONNX artifacts need the package {package}",
        where=package,
        hint=f"pip install toma_fx[{extra}]",
    )


def _version(package: str) -> str:
    module: ModuleType = imported(package)
    return str(getattr(module, "__version__", "unknown"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks on packages looked for and constants left unfolded; errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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


# -- the graph ------------------------------------------------------------------------------------


def _cast_joins(model: Any) -> None:
    """Give the inputs of each Concat the type of its output: ATen promotes them, ONNX does not."""
    ir = imported("onnx_ir")
    for node in list(model.graph):
        if node.op_type != "Concat":
            continue
        want = node.outputs[0].dtype
        for i, value in enumerate(node.inputs):
            if want is None or value.dtype is None or value.dtype == want:
                continue
            cast = ir.node("Cast", [value], attributes={"to": want})
            cast.outputs[0].dtype, cast.outputs[0].shape = want, value.shape
            model.graph.insert_before(node, cast)
            node.replace_input_with(i, cast.outputs[0])


def _simplify(model: Any) -> None:
    """Fold small constants, take weights transposed, drop what is unused or there twice."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    common.RemoveUnusedNodesPass()(model)
    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=INLINE, should_fold=_foldable
    )
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _transpose_weights(model)
    _give_constants_a_node(model)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    # stack traces name the files of this machine
    common.ClearMetadataAndDocStringPass()(model)


def _foldable(node: Any) -> bool | None:
    """Not transposed weights: a folded one would be a copy."""
    if node.op_type == "Transpose" and node.inputs[0].const_value is not None:
        return bool(node.inputs[0].const_value.nbytes < INLINE)
    return None


def _give_constants_a_node(model: Any) -> None:
    """Copy outputs that are constants: nothing infers the shape of an initializer as an output.

    Patterns are such where every source merges, whatever the tokens are.
    """
    ir = imported("onnx_ir")
    for i, value in enumerate(model.graph.outputs):
        if value.is_initializer():
            node = ir.node("Identity", [value])
            node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
            model.graph.append(node)
            model.graph.outputs[i] = node.outputs[0]


def _transpose_weights(model: Any) -> None:
    """Make `Transpose(weight)` a weight; it is transposed when it is written."""
    ir = imported("onnx_ir")
    made: dict[tuple[str, tuple[int, ...]], Any] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not source.is_initializer() or source.const_value.nbytes < INLINE:
            continue
        order = tuple(node.attributes["perm"].as_ints())
        key = source.name, order
        if key not in made:
            made[key] = ir.Value(
                name=f"{source.name}.{''.join(map(str, order))}",
                const_value=_Transposed.of(source.const_value, order),
            )
            made[key].dtype, made[key].shape = source.dtype, made[key].const_value.shape
            model.graph.register_initializer(made[key])
        ir.convenience.replace_all_uses_with(node.outputs[0], made[key])


class _Transposed:
    """A lazily transposed tensor."""

    @staticmethod
    def of(tensor: Any, order: Sequence[int]) -> Any:
        """`tensor` with its dimensions in another order; nothing is copied until it is read."""
        ir = imported("onnx_ir")
        shape = ir.Shape([tensor.shape[i] for i in order])

        def read() -> Any:
            return ir.tensor(_array(tensor).transpose(order).copy(), dtype=tensor.dtype)

        return ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=tensor.name, cache=False)


@dataclass(frozen=True)
class _Names:
    """What the inputs and outputs of a model are called, and what they are.

    Attributes:
        inputs, outputs: in the order of the model.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, programs: Programs, made: Exported) -> _Names:
        """Names of the manifest."""
        patterns = programs.patterns
        inputs = {**programs.inputs, **{name: patterns[name] for name in made.pattern_inputs}}
        outputs = {**programs.outputs, **{name: patterns[name] for name in made.pattern_outputs}}
        return cls(
            tuple(TensorSpec.of(name, x) for name, x in inputs.items()),
            tuple(TensorSpec.of(name, x) for name, x in outputs.items()),
        )

    def keep_outputs(self, model: Any) -> None:
        """Drop outputs that have no name: patterns, of a stateless program."""
        del model.graph.outputs[len(self.outputs) :]

    def give(self, model: Any, call: str) -> None:
        """Name the inputs and outputs.

        Raises:
            BuildError: the model has others.
        """
        graph = model.graph
        for kind, values, specs in (
            ("inputs", graph.inputs, self.inputs),
            ("outputs", graph.outputs, self.outputs),
        ):
            if len(values) != len(specs):
                names = [spec.name for spec in specs]
                got = [value.name for value in values]
                raise _wrong(call, f"{kind} {', '.join(names)}", ", ".join(map(str, got)))
        wanted = {spec.name for spec in (*self.inputs, *self.outputs)}
        inner = (v for node in graph for v in node.outputs)
        for value in (*graph.inputs, *inner, *list(graph.initializers.values())):
            if value.name in wanted:
                value.name = f"{value.name}.inner"
        for value, spec in zip(
            (*graph.inputs, *graph.outputs), (*self.inputs, *self.outputs), strict=True
        ):
            value.name = spec.name


def _wrong(call: str, expected: str, got: str) -> BuildError:
    return BuildError(
        "the exporter wrote another model than asked for",
        where=file_of(call),
        expected=expected,
        got=got,
        hint="please report this model and opset",
    )


# -- weights --------------------------------------------------------------------------------------


def _array(tensor: Any) -> Any:
    """Values of a tensor on the CPU; a view of them where it is there already."""
    return tensor.numpy()


def _bytes(tensor: Any) -> memoryview:
    """Values of a tensor as they lie in memory, contiguous."""
    import numpy as np

    flat = np.ascontiguousarray(_array(tensor)).reshape(-1)
    data: memoryview = flat.view(np.uint8).data
    return data


def _store(model: Any, folder: Path, *, first: bool) -> None:
    """Move weights out of a model: into a new file, or to the places where others have them."""
    weights = [
        value
        for value in model.graph.initializers.values()
        if value.const_value.nbytes >= INLINE and value.dtype.name in _SAFETENSORS
    ]
    if first:
        _write_weights(weights, folder / WEIGHTS)
    _point(model, weights, folder / WEIGHTS)


def _write_weights(weights: Sequence[Any], path: Path) -> None:
    """Write the weights file, one tensor in memory at a time."""
    header: dict[str, Any] = {}
    at = 0
    # the longest element first: then every tensor starts at a multiple of its own
    for value in (ordered := sorted(weights, key=lambda v: (-v.dtype.itemsize, v.name))):
        end = at + value.const_value.nbytes
        header[value.name] = {
            "dtype": _SAFETENSORS[value.dtype.name],
            "shape": [int(n) for n in value.const_value.shape],
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in ordered:
            file.write(_bytes(value.const_value))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of the weights file, and where its data starts."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _point(model: Any, weights: Sequence[Any], path: Path) -> None:
    """Make the weights of a model external data, wherever the file has the same values.

    They get the names they have in the file; others stay in the model.
    """
    ir = imported("onnx_ir")
    header, start = _header(path)
    stored = dict[tuple[str, tuple[int, ...], bytes], str]()
    with path.open("rb") as file:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            digest = hashlib.sha256(file.read(end - begin)).digest()
            stored.setdefault((entry["dtype"], tuple(entry["shape"]), digest), name)
    given: dict[str, Any] = {}
    for value in weights:
        tensor = value.const_value
        digest = hashlib.sha256(_bytes(tensor)).digest()
        dtype, shape = _SAFETENSORS[tensor.dtype.name], tuple(int(n) for n in tensor.shape)
        place = dtype, shape, digest
        if place not in stored:
            continue
        name = stored[place]
        if name in given:
            ir.convenience.replace_all_uses_with(value, given[name])
            model.graph.initializers.pop(value.name)
            continue
        begin, end = header[name]["data_offsets"]
        value.const_value = ir.ExternalTensor(
            path.name,
            start + begin,
            end - begin,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(path.parent),
        )
        given[name] = value
    for i, value in enumerate(given.values()):
        value.name = f"weight.{i}.moving"  # names may have to change places
    for final, value in given.items():
        value.name = final


def _save(model: Any, path: Path) -> None:
    ir, onnx = imported("onnx_ir"), imported("onnx")
    opsets = [onnx.helper.make_opsetid(name, n) for name, n in model.opset_imports.items()]
    # the exporter says the same version of the format for all opsets
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(opsets))
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _sync(model: Any) -> None:
    """Let go of the weights file."""
    for value in model.graph.initializers.values():
        release = getattr(value.const_value, "release", None)
        if release is not None:
            release()


def _check(path: Path, opset: int, names: _Names, call: str) -> None:
    """The written model must be valid, of the opset asked for, and of the shapes promised.

    Raises:
        BuildError: it is not.
    """
    onnx = imported("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # protobuf's and the checker's errors have no base of their own
        raise _wrong(call, "a valid ONNX model", str(error)[:500]) from error
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": opset}:
        raise _wrong(call, f"operators of opset {opset} alone", str(opsets))
    try:
        inferred = onnx.shape_inference.infer_shapes(_bare(onnx, model), strict_mode=True)
    except Exception as error:  # as above
        raise _wrong(call, "shapes that can be inferred", str(error)[:500]) from error
    for kind, values, specs in (
        ("input", model.graph.input, names.inputs),
        ("output", model.graph.output, names.outputs),
        ("inferred output", inferred.graph.output, names.outputs),
    ):
        for value, spec in zip(values, specs, strict=True):
            got = _described(onnx, value)
            if got != spec:
                raise _wrong(call, f"{kind} {spec}", str(got))


def _bare(onnx: Any, model: Any) -> Any:
    """A model that says of no value what it is, unless nothing else does.

    ONNX infers nothing for some operators (GroupNormalization, up to opset 25 at least).
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    opset = model.opset_import[0].version
    said = [
        name
        for node in model.graph.node
        if not onnx.defs.get_schema(node.op_type, opset).has_type_and_shape_inference_function
        for name in node.output
    ]
    kept = [value for value in model.graph.value_info if value.name in said]
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(kept)
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    return bare


def _described(onnx: Any, value: Any) -> TensorSpec:
    """What a model says of an input or output."""
    kind = value.type.tensor_type
    shape = tuple(d.dim_value for d in kind.shape.dim)
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type)
    return TensorSpec(value.name, shape, names.get(dtype, dtype.lower()))


# -- running --------------------------------------------------------------------------------------

OPTIONS = ("providers", "threads", "prepack")
Provider = str | tuple[str, Mapping[str, Any]]


class ORTRuntime(Runtime):
    """The models of an artifact in ONNX Runtime.

    Inputs are read, and outputs written, where torch has them, on the GPU too: nothing goes through
    the host. Weights are read once and given to every session.

    Attributes:
        sessions: by program. providers: those in use, first choice first.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: torch.device, options: Mapping[str, Any]
    ) -> None:
        """See `ONNXTarget.open`."""
        ort = imported("onnxruntime")
        check_options("onnx", options, OPTIONS)
        self._device = device
        chosen = options.get("providers")
        providers = default_providers(device) if chosen is None else list(chosen)
        self.providers = _known(ort, providers)
        _check_device(self.providers, device, manifest)
        shared = _shared(folder / WEIGHTS, device, self.providers)
        # ONNX Runtime keeps pointers to these
        self._weights = {name: _ort_value(ort, x) for name, x in shared.items()}
        self._kept = shared
        self.sessions: dict[str, Any] = {}
        self._programs: dict[str, _Bound] = {}
        specs = {spec.name: spec for spec in (*manifest.outputs, *manifest.patterns)}
        for call, program in manifest.programs.items():
            session = self._session(ort, folder / program.file, options, providers)
            self.sessions[call] = session
            outputs = [specs[x.name] for x in session.get_outputs()]
            self._programs[call] = _Bound(session, outputs, program.patterns_out, device)

    def run(
        self, call: str, inputs: Sequence[Tensor], patterns: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step; see `Runtime.run`."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has its own
        return self._programs[call].run(inputs, patterns)

    def _session(
        self, ort: Any, path: Path, options: Mapping[str, Any], providers: Sequence[Provider]
    ) -> Any:
        """One model, ready to run.

        Raises:
            ArtifactError: ONNX Runtime can't read it, or not with the first provider.
        """
        said = ort.SessionOptions()
        said.log_severity_level = 3
        if "threads" in options:
            said.intra_op_num_threads = options["threads"]
        if not options.get("prepack", False):
            said.add_session_config_entry("session.disable_prepacking", "1")
            # the levels above arrange the weights of convolutions anew
            said.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        for name, value in self._weights.items():
            said.add_initializer(name, value)
        try:
            session = ort.InferenceSession(str(path), said, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise ArtifactError(
                "ONNX Runtime can't open a model",
                where=str(path),
                got=f"{type(error).__name__}: {str(error)[:500]}",
                hint="install the version of ONNX Runtime that the manifest names, or a newer one",
            ) from error
        if self.providers[0] not in session.get_providers():
            raise ArtifactError(
                "ONNX Runtime could not use a provider",
                where="providers",
                expected=self.providers[0],
                got=", ".join(session.get_providers()),
                hint="install the libraries that it needs, or leave it out of providers",
            )
        return session


class _Bound:
    """A session with outputs that have their places."""

    def __init__(
        self,
        session: Any,
        outputs: Sequence[TensorSpec],
        patterns: Sequence[str],
        device: torch.device,
    ) -> None:
        self._session, self._patterns = session, patterns
        self._names = [x.name for x in session.get_inputs()]
        self._outputs = {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            for spec in outputs
        }

    def run(
        self, inputs: Sequence[Tensor], patterns: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step; outputs live until the next."""
        named = (patterns[name] for name in self._names[len(inputs) :])
        given = apart([*inputs, *named], self._outputs.values())
        binding = self._session.io_binding()
        for name, x in zip(self._names, given, strict=True):
            binding.bind_input(name, *self._place(x))
        for name, x in self._outputs.items():
            binding.bind_output(name, *self._place(x))
        self._session.run_with_iobinding(binding)
        return parted(list(self._outputs.values()), self._patterns)

    def _place(self, x: Tensor) -> tuple[str, int, Any, list[int], int]:
        """Where a tensor is and what it is, as ONNX Runtime wants to hear it."""
        return x.device.type, x.device.index or 0, _element(x.dtype), list(x.shape), x.data_ptr()


def _element(dtype: torch.dtype) -> Any:
    """numpy's name of a type, or ONNX's number of one that numpy lacks."""
    import numpy as np

    if dtype == torch.bfloat16:
        return 16
    return getattr(np, {torch.bool: "bool_"}.get(dtype, str(dtype).removeprefix("torch.")))


def default_providers(device: torch.device) -> list[Provider]:
    """TensorRT where it is installed and CUDA on a GPU, and the CPU."""
    available = imported("onnxruntime").get_available_providers()
    index = {"device_id": device.index or 0}
    wanted: list[Provider] = []
    if device.type == "cuda":
        # the list names TensorRT whether its libraries are there or not
        if importlib.util.find_spec("tensorrt") is not None:
            wanted.append(("TensorrtExecutionProvider", {**index, "trt_fp16_enable": True}))
        wanted.append(("CUDAExecutionProvider", index))
    found = [p for p in wanted if _provider(p) in available]
    return [*found, "CPUExecutionProvider"]


def _provider(given: Any) -> str:
    return str(given[0]) if isinstance(given, (tuple, list)) else str(given)


def _known(ort: Any, providers: Sequence[Any]) -> list[str]:
    """Names of the providers.

    Raises:
        UnknownNameError: this ONNX Runtime has no such provider, or none is given.
    """
    names, available = [_provider(p) for p in providers], ort.get_available_providers()
    for name in names or ["none"]:
        if name not in available:
            raise UnknownNameError(
                "this ONNX Runtime has no such provider",
                where="providers",
                expected=", ".join(available),
                got=name,
                hint="pip install toma_fx[onnx-gpu] for CUDA and TensorRT; "
                + nearest(name, available),
            )
    return names


def _check_device(providers: Sequence[str], device: torch.device, manifest: Manifest) -> None:
    """Raise unless the models can run on the device that tensors are on.

    Raises:
        ArtifactError: neither a CPU nor a GPU of this machine, or bfloat16 on a CPU.
        MissingPackageError: a GPU, and an ONNX Runtime without CUDA.
    """
    trouble = ""
    if device.type not in ("cpu", "cuda"):
        trouble = "ONNX models run on cpu and cuda, not on another device"
    elif device.type == "cuda" and not torch.cuda.is_available():
        trouble = "torch finds no GPU on this machine"
    elif device.type == "cpu" and "bfloat16" in _dtypes(manifest):
        trouble = "ONNX Runtime has no bfloat16 kernels for CPUs"
    if trouble:
        raise ArtifactError(
            trouble,
            where="device",
            got=str(device),
            hint='load(..., device="cpu") or device="cuda", as the machine and the dtype allow',
        )
    on_gpu = {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(providers)
    if device.type == "cuda" and not on_gpu:
        raise _missing("onnxruntime-gpu", "onnx-gpu")


def _dtypes(manifest: Manifest) -> set[str]:
    """Of weights, inputs, outputs and patterns."""
    specs = (*(spec.tensor for spec in manifest.inputs), *manifest.outputs, *manifest.patterns)
    return {manifest.dtype, *(spec.dtype for spec in specs)}


def _shared(path: Path, device: torch.device, providers: Sequence[str]) -> dict[str, Tensor]:
    """The weights, once for all sessions: mapped on a CPU, on a GPU in its memory.

    TensorRT copies weights into its engines: nothing is gained by having them there too.
    """
    from safetensors import safe_open

    if "TensorrtExecutionProvider" in providers:
        return {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _ort_value(ort: Any, x: Tensor) -> Any:
    """A tensor as ONNX Runtime's, in the same memory."""
    return ort.OrtValue.from_dlpack(x)
