"""Builds the wheel from the sdist, installs it with the core dependencies alone, and imports and starts all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from hivtp.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

# Runs in the fresh environment, away from the checkout.
CHECK = """
import importlib, importlib.util, pathlib, pkgutil
import hivtp, hivtp_ops
for package in (hivtp, hivtp_ops):
    assert "site-packages" in package.__file__, package.__file__
    assert (pathlib.Path(package.__file__).parent / "py.typed").is_file(), package
names = [module.name for package in (hivtp, hivtp_ops)
         for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for part in ("hivtp.export.exporter", "hivtp.engines.bundle", "hivtp.runtime.pipeline", "hivtp_ops.selection"):
    assert part in names, part
for name in names:
    importlib.import_module(name)
assert list((pathlib.Path(hivtp_ops.__file__).parent / "kernels").glob("*.cu")), "the CUDA kernel is not packed"
playground = pathlib.Path(hivtp.__file__).parent / "runtime" / "serving" / "playground"
assert {"index.html", "app.js", "style.css"} <= {file.name for file in playground.iterdir()}, "the page is not packed"
for absent in ("torch", "transformers", "onnx", "onnxruntime"):
    assert importlib.util.find_spec(absent) is None, absent
print(f"imported {len(names)} modules from the wheel with the core alone")
"""


def run(*command: str | Path) -> None:
    """Run a command away from the checkout; raises if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], check=True, cwd=tempfile.gettempdir(), env=environment)


def main() -> None:
    """Build, install, import."""
    with tempfile.TemporaryDirectory() as folder:
        # `build` makes the sdist first and the wheel from what the sdist holds.
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        [wheel] = Path(folder).glob("*.whl")
        environment = Path(folder) / "environment"
        venv.create(environment, with_pip=True)
        run(environment / "bin" / "pip", "install", "--quiet", wheel)
        run(environment / "bin" / "python", "-c", CHECK)
        for command in ("hivtp", "hivtp-export", *(f"hivtp {name}" for name in COMMANDS)):
            program, *arguments = command.split()
            subprocess.run([environment / "bin" / program, *arguments, "--help"], check=True, stdout=subprocess.DEVNULL)
    print("the wheel is whole")


if __name__ == "__main__":
    main()
