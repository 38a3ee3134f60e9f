"""launch/: the files name existing commands and settings, and are valid in their languages."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from llm_from_scratch.config import Config
from llm_from_scratch.presets import find_preset
from llm_from_scratch.settings import leaf_types

ROOT = Path(__file__).resolve().parents[4]
LAUNCH = ROOT / "launch"
pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="an installed package has no launch files")
TORCHRUN = ("nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port", "rdzv_id", "rdzv_backend",
            "rdzv_endpoint", "max-restarts", "standalone")  # fmt: skip


def train_options(command: str) -> None:
    """Checks a torchrun command line: its own options, and the settings and presets that llm-train gets."""
    launcher, _, ours = command.replace("\\\n", " ").partition(" -m llm_from_scratch.cli.train")
    assert set(re.findall(r"--([a-z_-]+)[= ]", launcher.partition("torchrun")[2])) <= set(TORCHRUN)
    options = re.findall(r"--([a-z_]+)=", ours)
    assert "init_from" in options and set(options) <= set(leaf_types(Config)), options


def test_the_slurm_script_is_valid_and_queues_itself_again() -> None:
    script = LAUNCH / "slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    train_options(text[text.index("srun ") : text.index('"$@"')])
    flags = shlex.split(" ".join(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)))
    assert {"--requeue", "--signal=B:TERM@120", "--ntasks-per-node=1"} <= set(flags)


@pytest.mark.parametrize("option", ["--out_dir={}", "--out_dir {}"])
@pytest.mark.parametrize(
    "work, queued", [("false", False), ("mkdir -p run/step-00000010; false", True), ("true", False)]
)
def test_a_failed_run_is_queued_again_if_it_saved(tmp_path: Path, option: str, work: str, queued: bool) -> None:
    (tmp_path / "run" / "step-00000009").mkdir(parents=True)
    commands = {"srun": work, "scontrol": "[ $1 != requeue ] || touch queued"}
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "slurm.sh"), "quick", *option.format("run").split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (tmp_path / "queued").exists() == queued
    assert ("without a new checkpoint in run" in done.stdout) == (work == "false")


def test_the_spot_task_is_valid() -> None:
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "envs", "workdir", "setup", "run"}
    assert subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True).returncode == 0
    train_options(task["run"])
    assert "mirror" in task["run"] and "[data,remote]" in task["setup"]
    assert find_preset(task["envs"]["PRESET"]).is_file() and task["resources"]["use_spot"] is True


def test_the_image_copies_files_that_exist() -> None:
    text = re.sub(r"\\\n", " ", (LAUNCH / "Dockerfile").read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {words[0] for words in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "CMD"} and lines[0][0] == "FROM"
    for _, *sources, _ in (words for words in lines if words[0] == "COPY"):
        assert sources and all((ROOT / source).exists() for source in sources)


def test_the_image_excludes_data_and_runs() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"data/processed", "**/*.bin", "out*", ".venv"} <= set(ignored)


def test_the_submission_is_valid_python() -> None:
    compile((LAUNCH / "submit.py").read_text(), "submit.py", "exec")
