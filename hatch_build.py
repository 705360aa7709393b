"""Compiles the CPU kernel into the wheel where a C compiler is at hand; without one the package is built all the same, without it.

CC=clang pip install .          another compiler
SHOAL_KERNEL=0 pip install .    no kernel
SHOAL_KERNEL=1 pip install .    an error instead of a package without the kernel
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-O3", "-std=gnu11", "-mavx2", "-mfma", "-fPIC", "-shared")
"""AVX2 and FMA are what the kernel is written for; it is loaded on processors that have them only."""


class KernelHook(BuildHookInterface[Any]):
    """Runs before a wheel, editable or not, is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile `kernels.c` beside itself and tag the wheel for this platform, where that works."""
        wanted = os.environ.get("SHOAL_KERNEL", "auto")
        if self.target_name != "wheel" or wanted == "0":
            return
        folder = Path(self.root) / "src/shoal/models/native"
        problem = compile_kernel(folder / "kernels.c", folder / "kernels.so")
        if problem is None:
            build_data["artifacts"].append("src/shoal/models/native/kernels.so")
            build_data["pure_python"] = False
            # It is loaded with ctypes: no Python version in its interface.
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        elif wanted == "1":
            raise RuntimeError(f"the CPU kernel was not built: {problem}")
        else:
            self.app.display_warning(f"the CPU kernel was not built, PyTorch does its work: {problem}")


def compile_kernel(source: Path, target: Path) -> str | None:
    """Compile `source`; returns why that was not possible, or None. The target appears whole or not at all."""
    target.unlink(missing_ok=True)
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
        return f"it is written for x86-64 on Linux and macOS, this is {platform.machine()} on {sys.platform}"
    partial = target.with_suffix(".partial")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    try:
        subprocess.run(
            [*compiler, *FLAGS, str(source), "-o", str(partial), "-lm"], check=True, capture_output=True, text=True
        )
    except OSError as error:
        return f"{compiler[0]} cannot be run ({error.strerror})"
    except subprocess.CalledProcessError as error:
        return f"{compiler[0]} failed: {error.stderr.strip().splitlines()[0] if error.stderr.strip() else error}"
    os.replace(partial, target)
    return None
