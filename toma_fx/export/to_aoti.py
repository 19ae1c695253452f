"""AOTInductor: compiled programs that need neither Python nor the model to run.

    programs.pt2          every program of the schedule, compiled, without weights
    weights.safetensors   the weights of all of them, each once, and constants

Weights lie outside the package because a package either repeats them for each program or holds
them as pickles that only Python reads. This file is mapped into memory, shared by the programs (and
by processes), holds no code, and is read from C++ in a page (`examples/cpp`).

Its metadata names what differs between the programs: `alias/PROGRAM/CONSTANT` is the tensor that a
program knows by another name than its own; `strided/NAME` gives shape and strides of a tensor that
is stored as its memory lies; `host/NAME` marks what GPU programs read from the host's memory.

A program reads whatever memory its constants point to: run without them it ends the process. So
only `_Programs` runs one, and it can't be made without all of them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import ArtifactError, BuildError, ConfigError, UnknownNameError, nearest
from toma_fx.export.artifact import Build
from toma_fx.export.manifest import Device, Manifest, ProgramSpec, TargetSpec
from toma_fx.export.programs import Exported, Programs, parted
from toma_fx.export.targets import Lowered, Runtime, Target, check_options

PACKAGE = "programs.pt2"
WEIGHTS = "weights.safetensors"
PARTS = "parts"
"""Folder of what is made on the way, gone when the build ends."""
_OWN = ("aot_inductor.package", "aot_inductor.output_path", "freezing", "cpp_wrapper")
"""Beginnings of Inductor's options that the target sets, or that would put weights elsewhere."""
_WORDS = ("avx", "fma", "amx", "bmi", "f16c", "sve", "neon", "asimd", "bf16", "i8mm", "vsx", "vxe")
"""Beginnings of the processor's capabilities that compiled code may use."""


@dataclass(frozen=True)
class AOTITarget(Target):
    """Compiled with AOTInductor, for this version of torch and this kind of processor or GPU.

    Attributes:
        max_autotune: whether Inductor times alternatives of kernels: a slower build, for GPUs.
        inductor: other options of `torch._inductor.config`, as pairs of name and value.
    """

    max_autotune: bool = False
    inductor: tuple[tuple[str, Any], ...] = ()

    name = "aoti"

    def check_installed(self) -> None:
        """Raise, before anything is exported, for a wrong option or without a C++ compiler.

        Raises:
            BuildError: no C++ compiler. UnknownNameError: no such option of Inductor.
            ConfigError: an option that is the target's own.
        """
        self._check_options()
        _check_compiler()

    def check(self, programs: Programs) -> None:
        """Raise, before anything is made, if the programs can't be compiled here.

        Raises:
            BuildError: a device that can't be compiled for, quantised weights kept as tensor
                subclasses.
        """
        device = programs.device
        if device.type not in ("cpu", "cuda"):
            raise BuildError(
                "AOTInductor artifacts are made for cpu and cuda only",
                where="device",
                expected="a model on cpu or cuda",
                got=str(device),
            )
        for name, x in programs.denoiser.denoiser.state_dict().items():
            if type(x.data) is not Tensor or x.is_mkldnn:
                raise BuildError(
                    "a weight is no plain tensor",
                    where=name,
                    expected="torch.Tensor",
                    got=type(x.data).__name__,
                    hint="build the artifact from the model before it was quantised",
                )

    def lower(self, programs: Programs, build: Build) -> Lowered:
        """Compile each program, then write the package and the weights."""
        arch = architecture(programs.device)
        # another machine must not go on with what this one compiled
        here = f"for {platform.machine()} {hashlib.sha256(arch.encode()).hexdigest()[:8]}"
        package, weights = f"package {here}", "weights"
        parts = {call: _part(call) for call in programs}
        if not (build.has(package, PACKAGE) and build.has(weights, WEIGHTS)):
            for i, (call, made) in enumerate(programs.items(), 1):

                def compiled(folder: Path, call: str = call, made: Exported = made) -> None:
                    self._compile(folder, call, made, programs)

                stage = f"compile {call} ({i} of {len(programs)}) {here}"
                build.stage(stage, compiled, *parts[call])
        files: dict[str, str] = {call: names[0] for call, names in parts.items()}
        build.stage(package, lambda folder: _package(folder, files), PACKAGE)
        build.stage(weights, lambda folder: _save_weights(folder, programs), WEIGHTS)
        shutil.rmtree(build.folder / PARTS, ignore_errors=True)
        specs: dict[str, ProgramSpec] = {
            call: ProgramSpec(PACKAGE, call, made.pattern_inputs, made.pattern_outputs)
            for call, made in programs.items()
        }
        options = {"max_autotune": self.max_autotune, **dict(self.inductor)}
        target = TargetSpec("aoti", "", None, {k: str(v) for k, v in options.items()})
        device = Device(programs.device.type, _processor(programs.device), arch)
        return Lowered(target, device, specs, _versions(programs.device))

    @staticmethod
    def open(
        folder: Path, manifest: Manifest, device: torch.device, options: Mapping[str, Any]
    ) -> Runtime:
        """Open a verified artifact; weights are mapped, and copied only to a GPU.

        Raises:
            ArtifactError: made with another version of torch, for another device or processor, or
                a package and weights that don't belong together. UnknownNameError: any option.
        """
        check_options("aoti", options)
        _check_machine(manifest, device)
        return _Programs(folder, manifest, device)

    # -- building -------------------------------------------------------------------------------

    def _check_options(self) -> None:
        from torch._inductor import list_options

        for name, _ in self.inductor:
            if name.startswith(_OWN):
                raise ConfigError(
                    "this option is the target's own",
                    where="inductor",
                    expected="options that change neither the package nor where weights are",
                    got=name,
                )
            if name not in (known := list_options()):
                raise UnknownNameError(
                    "Inductor has no such option",
                    where="inductor",
                    got=name,
                    hint=nearest(name, known),
                )

    def _patches(self) -> dict[str, Any]:
        """Options for Inductor: weights come back as tensors, beside the compiled files."""
        from torch._inductor import list_mode_options

        tuned = list_mode_options("max-autotune-no-cudagraphs") if self.max_autotune else {}
        return {
            **(tuned or {}),
            **dict(self.inductor),
            "aot_inductor.package": True,
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        }

    def _compile(self, folder: Path, call: str, made: Exported, programs: Programs) -> None:
        """Write a package of one program without weights, and its constants."""
        from torch._inductor import aot_compile
        from torch._inductor.package.package import package_aoti
        from torch.export.pt2_archive._package_weights import Weights

        try:
            files = aot_compile(made.program.module(), made.example, options=self._patches())
            assert isinstance(files, list)
        except OSError:
            raise
        except Exception as error:  # its passes and the compiler raise whatever they like
            raise BuildError(
                "Inductor could not compile a program",
                where=call,
                got=f"{type(error).__name__}: {str(error)[:500]}",
                hint="try without max_autotune and options of Inductor, or report the model",
            ) from error
        package, constants = (folder / name for name in _part(call))
        package.parent.mkdir(exist_ok=True)
        package_aoti(str(package), {call: [f for f in files if not isinstance(f, Weights)]})
        given = {k: x for f in files if isinstance(f, Weights) for k, (x, _) in f.items()}
        _save_constants(constants, given, _by_memory(_state(programs)), programs.device)


def _part(call: str) -> tuple[str, str]:
    """Files of one program's stage."""
    return f"{PARTS}/{call}.pt2", f"{PARTS}/{call}.safetensors"


def _package(folder: Path, parts: Mapping[str, str]) -> None:
    """Join packages of one program each."""
    from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter
    from torch.export.pt2_archive.constants import AOTINDUCTOR_DIR

    with PT2ArchiveWriter(str(folder / PACKAGE)) as writer:
        for call, part in parts.items():
            with PT2ArchiveReader(str(folder / part)) as reader:
                for name in reader.get_file_names():
                    if name.startswith(f"{AOTINDUCTOR_DIR}{call}/"):
                        writer.write_bytes(name, reader.read_bytes(name))


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BuildError(
            "AOTInductor needs a C++ compiler",
            where="CXX",
            expected="g++ or clang++ on the path, or its name in CXX",
            hint="install g++",
        ) from error


# -- weights ----------------------------------------------------------------------------------


def _state(programs: Programs) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in programs.denoiser.denoiser.state_dict().items()}


def _memory(x: Tensor) -> tuple[Any, ...]:
    """What two tensors that are the same have in common."""
    return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device


def _by_memory(state: Mapping[str, Tensor]) -> dict[tuple[Any, ...], str]:
    """The first name of every weight; tied weights have several."""
    found: dict[tuple[Any, ...], str] = {}
    for name, x in state.items():
        found.setdefault(_memory(x), name)
    return found


def _save_constants(
    path: Path,
    given: Mapping[str, Tensor],
    known: Mapping[tuple[Any, ...], str],
    device: torch.device,
) -> None:
    """Write down which weight each constant of a program is, and the values of those that are none.

    Raises:
        BuildError: a constant has no plain memory.
    """
    sources, own = {}, {}
    for name, x in given.items():
        if x.is_mkldnn or type(x.data) is not Tensor:
            raise BuildError(
                "a constant is no plain tensor",
                where=name,
                got=f"{type(x.data).__name__}, {x.layout}",
                hint="leave Inductor's options as they are",
            )
        sources[name] = known.get(_memory(x), "")
        if not sources[name]:
            own[name] = x.detach()
    _save(path, own, {"sources": json.dumps(sources)}, device)


def _save_weights(folder: Path, programs: Programs) -> None:
    """Write every weight that a program uses once, and constants that are no weights."""
    from safetensors import safe_open

    state = _state(programs)
    stored: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for call in programs:
        with safe_open(folder / _part(call)[1], "pt") as part:
            sources = json.loads(part.metadata()["sources"])
            for name, source in sources.items():
                if source:
                    stored[source] = state[source]
                else:
                    value = _tensor(part, name, programs.device)
                    source = _same(constants, value) or f"constant.{len(constants)}"
                    constants[source] = value
                if source != name:
                    metadata[f"alias/{call}/{name}"] = source
    _save(folder / WEIGHTS, {**stored, **constants}, metadata, programs.device)


def _same(known: Mapping[str, Tensor], x: Tensor) -> str | None:
    """Name of a constant of the same value and layout."""
    for name, y in known.items():
        if _memory(x)[1:] == _memory(y)[1:] and torch.equal(x, y):
            return name
    return None


def _save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], device: torch.device
) -> None:
    """Write tensors of programs on `device`, those not contiguous as their memory lies."""
    from safetensors.torch import save_file

    said, flat = dict(metadata), {}
    for name, x in tensors.items():
        if x.device.type != device.type:
            said[f"host/{name}"] = ""
        if not x.is_contiguous():
            said[f"strided/{name}"] = json.dumps([list(x.shape), list(x.stride())])
            x = x.as_strided((_span(x),), (1,))
        flat[name] = x.cpu()
    save_file(flat, path, metadata=said or None)
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def _span(x: Tensor) -> int:
    """Elements of memory from the first of a tensor to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _tensor(file: Any, name: str, device: torch.device) -> Tensor:
    """A tensor of an open weights file, where and with the strides that it had."""
    x: Tensor = file.get_tensor(name)
    metadata = file.metadata() or {}
    if strided := metadata.get(f"strided/{name}"):
        x = x.as_strided(*json.loads(strided))
    return x if f"host/{name}" in metadata else x.to(device)


# -- the machine --------------------------------------------------------------------------------


def architecture(device: torch.device) -> str:
    """Words for what compiled code may ask of a machine, sorted.

    Inductor compiles for the very processor it runs on, so these are all of its vector extensions;
    for a GPU its compute capability comes on top.
    """
    able = torch.cpu.get_capabilities()
    words = [k for k, v in able.items() if v is True and k.startswith(_WORDS)]
    if device.type == "cuda":
        words.append("sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    return " ".join([sys.platform, platform.machine(), *sorted(words)])


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions(device: torch.device) -> dict[str, str]:
    return {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}


def _check_machine(manifest: Manifest, device: torch.device) -> None:
    """Refuse what was compiled for something else, before anything of it is loaded.

    Raises:
        ArtifactError: naming the first difference.
    """
    if manifest.versions.get("torch") != torch.__version__:
        raise ArtifactError(
            "the artifact was made with another version of torch",
            where="versions.torch",
            expected=f"torch {manifest.versions.get('torch')}",
            got=f"torch {torch.__version__}",
            hint="install that version, or build the artifact anew",
        )
    if device.type != manifest.device.type:
        raise ArtifactError(
            "the artifact was compiled for another device",
            where="device.type",
            expected=manifest.device.type,
            got=device.type,
            hint="build it for that device",
        )
    here = architecture(device)
    lacking = set(manifest.device.arch.split()) - set(here.split())
    if lacking or not manifest.device.arch:
        raise ArtifactError(
            "the artifact was compiled for another processor",
            where="device.arch",
            expected=f"{manifest.device.arch or 'an architecture'} ({manifest.device.name})",
            got=f"{here}: without {', '.join(sorted(lacking)) or 'a check'}",
            hint="build it on a machine of this kind",
        )


# -- running ------------------------------------------------------------------------------------


class _Programs(Runtime):
    """Compiled programs with their weights."""

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        """Map the weights, load the programs, and give each all its constants.

        Raises:
            ArtifactError: a program or constant is missing, or can't be loaded.
        """
        from torch.export.pt2_archive._package import load_pt2

        self._specs = manifest.programs
        with _loading(folder / WEIGHTS):
            self._weights, self._aliases = _weights(folder / WEIGHTS, device)
        index = -1 if device.index is None else device.index
        with _loading(folder / PACKAGE):
            runners = load_pt2(str(folder / PACKAGE), device_index=index).aoti_runners
            self._runners = {
                call: self._complete(runners, spec.entry) for call, spec in self._specs.items()
            }

    def run(
        self, call: str, inputs: Sequence[Tensor], patterns: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step. Programs read memory as their examples lay: contiguous."""
        spec = self._specs[call]
        given = (*inputs, *(patterns[name] for name in spec.patterns_in))
        results = self._runners[call].run([x.contiguous() for x in given])
        return parted(results, spec.patterns_out)

    def _complete(self, runners: Mapping[str, Any], entry: str) -> Any:
        """The loader of a program that has been given all its constants."""
        if entry not in runners:
            raise _mismatched(PACKAGE, f"a program {entry}", ", ".join(sorted(runners)))
        needed = runners[entry].get_constant_fqns()
        names = {name: self._aliases.get(f"{entry}/{name}", name) for name in needed}
        lacking = [name for name, stored in names.items() if stored not in self._weights]
        if lacking:
            raise _mismatched(WEIGHTS, f"constants of {entry}", f"none for {lacking[:3]}")
        # the programs keep pointers: this object owns the tensors
        constants = {name: self._weights[stored] for name, stored in names.items()}
        runners[entry].load_constants(constants, check_full_update=True, user_managed=True)
        return runners[entry].loader


def _weights(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, names by "program/constant" where they differ)."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: _tensor(file, name, device) for name in file.keys()}  # noqa: SIM118
    aliases = {
        key.removeprefix("alias/"): name
        for key, name in metadata.items()
        if key.startswith("alias/")
    }
    return tensors, aliases


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """What libraries raise for a file that they can't read, as one typed error."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            "a file of the artifact can't be loaded",
            where=str(path),
            got=f"{type(error).__name__}: {str(error)[:500]}",
            hint="build the artifact anew",
        ) from error


def _mismatched(file: str, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "the package and the weights don't belong together",
        where=file,
        expected=expected,
        got=got,
        hint="build the artifact anew",
    )
