from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hivtp
import hivtp_ops
from hivtp.main import COMMANDS

ROOT = Path(__file__).parent.parent
PARTS = ("export", "engines", "runtime")
CORE = {"numpy", "PIL", "tokenizers", "jinja2", "markupsafe"}
STANDARD = sys.stdlib_module_names
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "safetensors", "onnxruntime_genai"}

# Makes every package absent but those named: what an installation with few extras is like.
ONLY = """
import sys

class Only:
    def __init__(self, allowed):
        self.allowed = allowed | {"hivtp", "hivtp_ops"} | sys.stdlib_module_names
        self.finders = sys.meta_path[:]

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in self.allowed and not top.startswith("_"):
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [Only(ALLOWED)]
"""


def run_python(code: str, allowed: set[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, in which only the packages `allowed` are installed; None is all."""
    if allowed is not None:
        code = ONLY.replace("ALLOWED", repr(allowed)) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_every_module_imports_with_the_core_alone():
    code = """
import importlib, json, pkgutil
import hivtp, hivtp_ops

names = [
    module.name
    for package in (hivtp, hivtp_ops)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    done = run_python(code, CORE)
    assert done.returncode == 0, done.stderr
    modules, packages = json.loads(done.stdout)
    files = [file for part in (*PARTS, "hivtp_ops") for file in (ROOT / part).rglob("*.py")]
    # `hivtp_ops` itself is not a module below a package, and each of the other parts is; so is `hivtp.main`.
    assert len(modules) == len(files) - 1 + 1
    assert "hivtp.main" in modules
    assert not (HEAVY | {"onnxruntime"}) & set(packages)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_shows_its_help_with_the_core_alone(command):
    done = run_python(f"from hivtp.main import main; main([{command!r}, '--help'])", CORE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: hivtp {command}")
    assert "examples:" in done.stdout


def test_the_script_of_the_export_shows_its_help_under_its_name():
    done = run_python("from hivtp.main import export; export(['--help'])", CORE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: hivtp-export")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command_and_loads_nothing_but_the_standard_library(arguments):
    code = f"import sys; from hivtp.main import main; code = main({arguments}); print(*sys.modules); sys.exit(code)"
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, modules = done.stdout.splitlines()
    assert lines[0] == "usage: hivtp COMMAND ..."
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    packages = {name.partition(".")[0] for name in modules.split()}
    assert not {name for name in packages if not name.startswith("_")} - STANDARD - {"hivtp"}


def test_the_version_is_that_of_the_package():
    done = run_python("from hivtp.main import main; main(['--version'])")
    assert done.stdout == f"hivtp {importlib.metadata.version('hivtp')}\n"
    code = """
import importlib.metadata

def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = version
from hivtp.main import main
main(["--version"])
"""
    done = run_python(code)
    assert done.stdout == "hivtp of unknown version: it was not installed\n"


@pytest.mark.parametrize("arguments", [[], ["serv"], ["--colour"], ["Run"]])
def test_what_is_not_a_command_exits_with_2_and_the_usage(arguments):
    done = run_python(f"import sys; from hivtp.main import main; sys.exit(main({arguments}))", CORE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: hivtp COMMAND ..." in done.stderr
    assert not arguments or done.stderr.startswith(f"hivtp: there is no command {arguments[0]!r}\n")


def test_the_commands_are_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    front_door = importlib.import_module("hivtp.main")
    assert scripts["hivtp"].load() is front_door.main
    assert scripts["hivtp-export"].load() is front_door.export


def test_running_without_an_engine_names_the_extra_that_brings_it(pruned_bundle):
    code = f"from hivtp.main import main; sys.exit(main(['run', {str(pruned_bundle)!r}, 'what']))"
    done = run_python(code, CORE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "hivtp run: onnxruntime is not installed; install it with: pip install 'hivtp[cpu]'\n"


def test_exporting_without_torch_names_the_extra_that_brings_it(tiny_checkpoint, tmp_path):
    destination = str(tmp_path / "bundle")
    code = f"from hivtp.main import export; sys.exit(export([{str(tiny_checkpoint)!r}, {destination!r}, '--quiet']))"
    done = run_python(code, CORE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("torch is not installed; install it with: pip install 'hivtp[export]'\n")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_exporting_no_decoder_needs_no_model_builder(tiny_checkpoint, tmp_path):
    code = f"""
import sys
sys.modules["onnxruntime_genai"] = None
from hivtp.main import export as main

def export(precision):
    arguments = [{str(tiny_checkpoint)!r}, {str(tmp_path)!r} + "/" + precision, "--language-precision", precision]
    return main([*arguments, "--quiet"])

assert export("none") == 0
sys.exit(export("fp32"))
"""
    done = run_python(code)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("hivtp-export: onnxruntime-genai is not installed")
    assert [folder.name for folder in tmp_path.iterdir()] == ["none"]


def test_running_a_bundle_never_imports_what_exporting_needs(pruned_bundle, photo, tmp_path):
    overlay = tmp_path / "kept.png"
    code = f"""
import sys
from hivtp import Pipeline, SamplingParams
from hivtp.main import main

pipeline = Pipeline.load({str(pruned_bundle)!r}, check_hashes=True)
sampling = SamplingParams(max_new_tokens=3, temperature=1.0, top_k=9, seed=1)
assert pipeline.generate("what", [{str(photo)!r}], sampling).token_ids
chat = pipeline.chat()
for question in ("how many dogs", "</s>"):
    "".join(chat.stream(question, sampling=sampling))
pipeline.close()
arguments = ["run", {str(pruned_bundle)!r}, "what", "--image", {str(photo)!r}, "--max-new-tokens", "2"]
assert main([*arguments, "--overlay", {str(overlay)!r}]) == 0
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    packages = set(done.stdout.splitlines()[-1].split())
    assert {"hivtp", "onnxruntime", "tokenizers"} <= packages
    assert not HEAVY & packages
    assert overlay.is_file()


def import_seconds(statement: str) -> float:
    """Processor time, since a busy machine stretches every other."""
    code = f"import time; started = time.process_time(); {statement}; print(time.process_time() - started)"
    return min(float(run_python(code).stdout) for _ in range(5))


def test_importing_hivtp_is_quick():
    assert import_seconds("import hivtp") < 0.1
    # Most of it is numpy's, whose time says how fast the machine is.
    assert import_seconds("from hivtp import Pipeline") < 3 * import_seconds("import numpy") + 0.1


def test_hivtp_imports_what_is_asked_for():
    code = """
import sys
import hivtp
assert "numpy" not in sys.modules
hivtp.PruningSpec
assert "hivtp.runtime.pipeline" not in sys.modules
assert hivtp.Pipeline.__module__ == "hivtp.runtime.pipeline"
assert set(hivtp.__all__) <= set(dir(hivtp))
try:
    hivtp.Pipelin
except AttributeError as error:
    print(error)
"""
    done = run_python(code)
    assert done.stderr == ""
    assert done.stdout == "module 'hivtp' has no attribute 'Pipelin'\n"


@pytest.mark.parametrize("link", [*(f"src/hivtp/{part}" for part in PARTS), "src/hivtp_ops"])
def test_the_links_under_src_lead_to_the_parts_at_the_root(link):
    path = ROOT / link
    assert path.is_symlink()
    assert not path.readlink().is_absolute()
    assert path.resolve() == ROOT.resolve() / path.name
    assert (path / "__init__.py").is_file()


def test_the_public_names_are_there():
    assert {"Pipeline", "Answer", "AnswerStream", "Timings", "PruningSpec", "HivtpError"} <= set(hivtp.__all__)
    assert {"PruningSpec", "select", "Selection", "HivtpError"} <= set(hivtp_ops.__all__)
    for package in (hivtp, hivtp_ops):
        assert all(hasattr(package, name) for name in package.__all__)
        assert package.__doc__
    assert (ROOT / "src" / "hivtp" / "py.typed").is_file()


def test_an_error_of_each_part_is_a_hivtp_error():
    errors = importlib.import_module("hivtp_ops.errors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 8
    assert all(issubclass(kind, (hivtp.HivtpError, UserWarning)) for kind in kinds)
