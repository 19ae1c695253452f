"""Who made an artifact: what is signed loads, anything else is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from tests.export.edited import edit, list_anew
from tests.export.in_process import InProcess
from toma_fx.cli.main import main
from toma_fx.errors import ArtifactError, ConfigError, MissingPackageError
from toma_fx.export import loader
from toma_fx.export.reading import SIGNATURE, open_artifact, verify_artifact
from toma_fx.export.signatures import check_signature, sign


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; the public one has the suffix .pub."""
    pytest.importorskip("model_signing.signing")
    return new_key(tmp_path / "key.pem")


def new_key(path: Path, curve: str = "SECP256R1") -> Path:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(getattr(ec, curve)())
    path.write_bytes(
        private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    )
    public = private.public_key()
    path.with_suffix(".pub").write_bytes(
        public.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    )
    return path


def check(folder: Path, key: Path) -> None:
    with open_artifact(folder) as files:
        check_signature(files, key)


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_what_was_signed_is_trusted(copy: Path, key: Path, curve: str) -> None:
    other = new_key(key.with_name("other.pem"), curve)
    for each in (key, other):
        sign(copy, each)
        check(copy, each.with_suffix(".pub"))
    assert verify_artifact(copy)
    with pytest.raises(ArtifactError, match="not what the owner"):
        check(copy, key.with_suffix(".pub"))


def other_signature(folder: Path) -> None:
    sign(folder, new_key(folder.parent / "stranger.pem"))


def without_a_file(folder: Path) -> None:
    """Signed are fewer files than the manifest lists."""
    path = folder / "more.txt"
    path.write_text("x")
    edit(folder, lambda d: d["files"].update({"more.txt": d["files"]["reuse.txt"]}))
    list_anew(folder)


def other_program(folder: Path) -> None:
    (folder / "reuse.txt").write_text("other")
    list_anew(folder)


def cut(folder: Path) -> None:
    (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes()[:-10])


def emptied(folder: Path) -> None:
    data = json.loads((folder / SIGNATURE).read_text())
    data["dsseEnvelope"]["signatures"] = []
    (folder / SIGNATURE).write_text(json.dumps(data))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "unsigned": lambda folder: (folder / SIGNATURE).unlink(),
    "another key": other_signature,
    "another license": lambda folder: edit(folder, lambda d: d.update(license="mine")),
    "another program": other_program,
    "one more file": without_a_file,
    "cut": cut,
    "no signatures": emptied,
    "no bundle": lambda folder: (folder / SIGNATURE).write_text("{}"),
    "no JSON": lambda folder: (folder / SIGNATURE).write_text("x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_anything_else_is_refused(copy: Path, key: Path, change: Callable[[Path], Any]) -> None:
    """Although every checksum fits."""
    sign(copy, key)
    change(copy)
    verify_artifact(copy)
    with pytest.raises(ArtifactError, match="signed"):
        check(copy, key.with_suffix(".pub"))


def test_flipped_bits_of_a_signature(copy: Path, key: Path) -> None:
    sign(copy, key)
    good = (copy / SIGNATURE).read_bytes()
    with open_artifact(copy) as files:
        want = files.manifest.digest
    for at in range(0, len(good), 40):
        (copy / SIGNATURE).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            check(copy, key.with_suffix(".pub"))
        except ArtifactError:
            continue
        # parts that nobody signs, as the version of the bundle's form
        assert verify_artifact(copy).digest == want


def test_nothing_is_run_before(copy: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Target(InProcess):
        def open(self, *args: Any) -> Any:
            opened.append(args)
            return super().open(*args)

    target = Target()
    monkeypatch.setattr(loader, "TARGETS", {"in-process": ""})
    monkeypatch.setattr(loader, "target_class", lambda name: target)
    for trust in (key.with_suffix(".pub"), str(key.with_suffix(".pub"))):
        with pytest.raises(ArtifactError, match="not signed"):
            toma_fx.load(copy, trust=trust)
    assert opened == []
    sign(copy, key)
    loaded: Any = toma_fx.load(copy, trust=key.with_suffix(".pub"))
    assert len(opened) == 1
    loaded.save_pretrained(copy.parent / "saved")
    check(copy.parent / "saved", key.with_suffix(".pub"))
    pickled = pickle.dumps(loaded)
    assert pickle.loads(pickled).trust == loaded.trust
    (copy / SIGNATURE).unlink()
    with pytest.raises(ArtifactError, match="not signed"):
        pickle.loads(pickled)


def test_keys_that_are_none(copy: Path, key: Path) -> None:
    (key.parent / "text").write_text("x")
    for wrong in ("nowhere", "text", "key.pub", ""):
        with pytest.raises(ConfigError, match="a private key"):
            sign(copy, key.parent / wrong)
    sign(copy, key)
    for wrong in ("nowhere", "text", "key.pem"):
        with pytest.raises(ConfigError, match="a public key"):
            check(copy, key.parent / wrong)


def test_others_verify_and_sign(copy: Path, key: Path) -> None:
    """The command of model-signing takes what was signed here, and the other way round."""
    public, signature = key.with_suffix(".pub"), copy / SIGNATURE
    code = (
        "import sys; sys.path[:] = sys.argv.pop(1).split(':'); "
        "from model_signing._cli import main; main()"
    )

    def command(*words: Any) -> None:
        line = [sys.executable, "-c", code, ":".join(sys.path), *map(str, words)]
        subprocess.run(line, check=True, capture_output=True)

    sign(copy, key)
    command("verify", "key", copy, "--signature", signature, "--public_key", public)
    signature.unlink()
    command("sign", "key", copy, "--signature", signature, "--private_key", key)
    check(copy, public)


def test_commands(copy: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = str(key.with_suffix(".pub"))
    assert main(["verify", str(copy), "--trust", public])
    assert main(["sign", str(copy), "--key", str(key)]) in (None, 0)
    assert main(["verify", str(copy), "--trust", public]) in (None, 0)
    assert f"signed by {public}" in capsys.readouterr().out


def test_without_the_package(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(MissingPackageError, match=r"toma_fx\[sign\]"):
        sign(copy, "key.pem")
    with pytest.raises(MissingPackageError, match=r"toma_fx\[sign\]"):
        check(copy, Path("key.pub"))
