"""The build hook: the kernel where a compiler makes one, the package without it elsewhere, and nothing half made."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest

from shoal.models.native.library import Library

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "src/shoal/models/native"
T = TypeVar("T")


class Interface(Generic[T]):
    """Stands for hatchling's base class: the build has hatchling, the tests need not."""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook's module, with an environment that asks for nothing."""
    stub = ModuleType("interface")
    stub.BuildHookInterface = Interface  # type: ignore[attr-defined]
    parts = ["hatchling", "builders", "hooks", "plugin", "interface"]
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, ".".join(parts), stub)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("SHOAL_KERNEL", raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the library goes; an older one is there."""
    target = tmp_path / "kernels.so"
    target.write_bytes(b"of an earlier build")
    return target


def compiler(directory: Path, *lines: str) -> str:
    """A compiler that does what `lines` of a shell do, with what it was told to write in $out."""
    path = directory / "compiler"
    find_out = 'while [ "$1" != -o ]; do shift; done; out=$2'
    path.write_text("\n".join(("#!/bin/sh", find_out, *lines)) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


needs_shell = pytest.mark.skipif(shutil.which("sh") is None, reason="compilers of these tests are shell scripts")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler `cc` on this machine")


def test_no_compiler(build: ModuleType, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(target.parent / "none"))
    problem = build.compile_kernel(NATIVE / "kernels.c", target)
    assert problem == f"{target.parent / 'none'} cannot be run (No such file or directory)"
    assert not target.exists(), "a library of another source must not stay"


@needs_shell
def test_a_compiler_that_fails_half_way(build: ModuleType, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first complaint is the reason; what it wrote is no library."""
    path = compiler(
        target.parent, 'echo half > "$out"', "echo 'kernels.c:1: no AVX2 here' >&2", "echo more >&2", "exit 1"
    )
    monkeypatch.setenv("CC", path)
    assert build.compile_kernel(NATIVE / "kernels.c", target) == f"{path} failed: kernels.c:1: no AVX2 here"
    assert not target.exists()
    silent = compiler(target.parent, "exit 3")
    assert "returned non-zero exit status 3" in build.compile_kernel(NATIVE / "kernels.c", target)
    assert silent == path


@needs_shell
def test_the_library_appears_when_it_is_whole(build: ModuleType, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is at the target while the compiler writes; options in CC are options."""
    seen = target.parent / "seen"
    script = compiler(
        target.parent,
        'echo half > "$out"',
        f'if [ -e "{target}" ]; then echo early > "{seen}"; fi',
        'echo whole > "$out"',
    )
    monkeypatch.setenv("CC", f"'{script}' -march=x86-64-v3")
    assert build.compile_kernel(NATIVE / "kernels.c", target) is None
    assert target.read_text() == "whole\n"
    assert not seen.exists()
    assert sorted(path.name for path in target.parent.iterdir()) == ["compiler", "kernels.so"]


@pytest.mark.parametrize(("machine", "system"), [("aarch64", "linux"), ("arm64", "darwin"), ("AMD64", "win32")])
def test_other_processors_and_systems(
    build: ModuleType, target: Path, machine: str, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build.sys, "platform", system)
    problem = build.compile_kernel(NATIVE / "kernels.c", target)
    assert problem == f"it is written for x86-64 on Linux and macOS, this is {machine} on {system}"
    assert not target.exists()


@needs_compiler
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the kernel is written for x86-64, tested on Linux",
)
def test_the_real_sources(build: ModuleType, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compile, and the library has its entry points. Little optimised: that takes most of the time."""
    monkeypatch.setattr(build, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS))
    assert build.compile_kernel(NATIVE / "kernels.c", target) is None
    assert Library(target).runtime.parallel


def hook(build: ModuleType, root: Path, target_name: str = "wheel") -> tuple[dict[str, Any], list[str]]:
    """Run the hook over a package at `root`: the build's data, and the warnings."""
    warnings: list[str] = []
    data: dict[str, Any] = {"artifacts": []}
    app = SimpleNamespace(display_warning=warnings.append)
    stand_in = SimpleNamespace(root=str(root), target_name=target_name, app=app)
    build.KernelHook.initialize(stand_in, "standard", data)
    return data, warnings


@needs_shell
def test_the_hook(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel the wheel is of this platform and any Python 3; without one it is pure, unless the kernel is demanded."""
    library = tmp_path / "src/shoal/models/native/kernels.so"
    library.parent.mkdir(parents=True)
    monkeypatch.setenv("CC", compiler(tmp_path, 'echo library > "$out"'))
    data, warnings = hook(build, tmp_path)
    assert data["artifacts"] == ["src/shoal/models/native/kernels.so"]
    assert data["pure_python"] is False
    assert data["tag"].startswith("py3-none-")
    assert not set(data["tag"]) & set(". ")
    assert not warnings
    assert library.exists()
    library.unlink()

    assert hook(build, tmp_path, "sdist") == ({"artifacts": []}, [])
    monkeypatch.setenv("SHOAL_KERNEL", "0")
    assert hook(build, tmp_path) == ({"artifacts": []}, [])
    assert not library.exists()

    monkeypatch.setenv("CC", str(tmp_path / "none"))
    monkeypatch.delenv("SHOAL_KERNEL")
    data, warnings = hook(build, tmp_path)
    assert data == {"artifacts": []}
    assert len(warnings) == 1
    assert "the CPU kernel was not built, PyTorch does its work" in warnings[0]
    assert "none cannot be run" in warnings[0]
    monkeypatch.setenv("SHOAL_KERNEL", "1")
    with pytest.raises(RuntimeError, match=r"the CPU kernel was not built: .*none cannot be run"):
        hook(build, tmp_path)
