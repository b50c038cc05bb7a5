"""The wheel: one top-level package with its configs. It works next to packages named `envs` and `rewards`."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.quick import ROOT

pytestmark = pytest.mark.slow
TINY_RUN = {
    "model_name_or_path": "bundled:smollm2-135m",
    "max_steps": 1,
    "bf16": False,
    "num_tasks": 8,
    "evaluation_tasks": 0,
    "max_completion_length": 4,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "output_dir": "run",
}


def run(*command, cwd):
    argv = [str(argument) for argument in command]
    process = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    output = f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
    assert process.returncode == 0, f"{' '.join(argv)}\n{output}"
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from the files that git tracks or does not ignore."""
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    source = tmp_path_factory.mktemp("source")
    for name in names:
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source, cwd=out)
    (file,) = out.glob("rlkit_llm-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Create a virtual environment with the wheel, PyPI's `envs`, and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for file in metadata.files("envs"):
        target = packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file.locate(), target)
    # Puts the dependencies after the new environment's packages, and leaves out the editable install.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    options = ("--no-deps", "--no-index", "--force-reinstall", "--quiet")
    run(folder / "bin/python", "-m", "pip", "install", *options, wheel, cwd=folder)
    return folder


@pytest.fixture
def workdir(tmp_path):
    """A working directory with the user's own packages `envs` and `rewards`."""
    for name in ("envs", "rewards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'user'\n")
    return tmp_path


def test_wheel_contains_one_package_without_symlinks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"rlkit", "rlkit_llm"}
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for folder, suffix in (("rlkit", ".py"), ("envs", ".py"), ("rewards", ".py"), ("configs", ".yaml")):
        files = [name for name in tracked if name.startswith(f"{folder}/") and name.endswith(suffix)]
        prefix = "" if folder == "rlkit" else "rlkit/"
        assert files and {prefix + name for name in files if (ROOT / name).is_file()} <= set(names)
    assert {"rlkit/report/page.html", "rlkit/report/page.js", "rlkit/report/page.css"} <= set(names)


def test_import_finds_the_installed_rlkit_and_the_users_envs(installed, workdir):
    code = "import rlkit, envs, rewards; print(rlkit.__file__); print(envs.OWNER, rewards.OWNER)"
    file, owners = run(installed / "bin/python", "-c", code, cwd=workdir).splitlines()
    assert Path(file).is_relative_to(installed) and owners == "user user"


def test_commands_work_next_to_packages_of_the_same_names(installed, workdir):
    rlkit, python = installed / "bin/rlkit", installed / "bin/python"
    for command in ([rlkit], [python, "-m", "rlkit"]):
        assert "FAIL" not in run(*command, "check", "causal-v1", "-n", 8, cwd=workdir)
    assert "causal-v1" in run(rlkit, "envs", cwd=workdir)
    argv = [argument for key, value in TINY_RUN.items() for argument in (f"--{key}", value)]
    launcher = ("--accelerate", "cpu2", "--num_processes", 1)
    run(rlkit, "train", "configs/causal/smollm2.yaml", *launcher, *argv, cwd=workdir)
    assert (workdir / "run" / "model" / "model.safetensors").is_file()
    run(rlkit, "report", "run", "--out", "page.html", cwd=workdir)
    run(rlkit, "sweep", "configs/sweeps/causal_smollm2.yaml", "--collect", cwd=workdir)
    assert (workdir / "page.html").is_file()


def test_installed_configs_parse_in_any_directory(installed, workdir):
    code = """
from rlkit.arguments.parse import PARSERS
from rlkit.registry import PACKAGE, load_yaml
for path in sorted((PACKAGE / "configs").glob("*/*.yaml")):
    name = str(path.relative_to(PACKAGE))
    if path.parent.name in ("accelerate", "sweeps"):
        load_yaml(name)
        continue
    keys = load_yaml(name)
    command = "train" if "algorithm" in keys else "rank" if "objective" in keys else "sft"
    PARSERS[command]([name, "--use_cpu", "true", "--bf16", "false"])
    print(name)
"""
    assert "configs/causal/smollm2.yaml" in run(installed / "bin/python", "-c", code, cwd=workdir)


def test_uninstalling_leaves_the_package_envs_intact(installed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(installed, folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    run(folder / "bin/python", "-m", "pip", "uninstall", "--yes", "--quiet", "rlkit-llm", cwd=folder)
    assert not list(packages.glob("rlkit*")) and not (folder / "bin" / "rlkit").exists()
    assert all((packages / file).is_file() for file in metadata.files("envs"))
    code = "import envs; print(envs.__file__)"
    assert Path(run(folder / "bin/python", "-c", code, cwd=folder).strip()).is_relative_to(packages)
