"""configurator.py: a user's script runs it with its own globals, as nanoGPT's scripts do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGURATOR = Path(__file__).resolve().parents[4] / "configurator.py"
pytestmark = pytest.mark.skipif(not CONFIGURATOR.is_file(), reason="configurator.py lies in a checkout only")

SCRIPT = f"""
import json
from pathlib import Path
batch_size, learning_rate, compile, dataset, top_k, betas = 12, 6e-4, True, "owt", None, (0.9, 0.95)
names = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, (int, float, bool, str, tuple))]
exec(open({str(CONFIGURATOR)!r}).read())
_plain = (int, float, bool, str, tuple, list, type(None))
values = {{k: v for k, v in globals().items() if not k.startswith("_") and isinstance(v, _plain)}}
print(json.dumps(values))
print("_configure" in globals())
"""


def run(folder: Path, *arguments: str, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def settings(folder: Path, *arguments: str) -> dict[str, object]:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    *_, values, leaked = done.stdout.splitlines()
    assert leaked == "False"
    return json.loads(values)


def test_without_arguments_nothing_changes(tmp_path: Path) -> None:
    got = settings(tmp_path)
    assert (got["batch_size"], got["learning_rate"], got["compile"], got["dataset"]) == (12, 6e-4, True, "owt")


def test_values_are_literals_of_the_same_type(tmp_path: Path) -> None:
    arguments = ["--batch_size=32", "--learning_rate=1e-3", "--compile=False", "--dataset=a=b", "--betas=(0.8, 0.9)"]
    got = settings(tmp_path, *arguments, "--top_k=5")
    assert (got["batch_size"], got["learning_rate"], got["compile"]) == (32, 1e-3, False)
    assert (got["dataset"], got["betas"], got["top_k"]) == ("a=b", [0.8, 0.9], 5)


def test_an_integer_serves_a_float_and_a_number_serves_a_name(tmp_path: Path) -> None:
    got = settings(tmp_path, "--learning_rate=1", "--dataset=2024")
    assert got["learning_rate"] == 1.0 and isinstance(got["learning_rate"], float)
    assert got["dataset"] == "2024"


def test_presets_and_arguments_apply_from_left_to_right(tmp_path: Path) -> None:
    # a preset computes, and sees the settings so far
    (tmp_path / "one.py").write_text("import time\nbatch_size = batch_size * 2 + 5 * 8\nfresh = 1\n")
    assert settings(tmp_path, "one.py")["batch_size"] == 64
    assert settings(tmp_path, "--batch_size=1", "one.py")["batch_size"] == 42
    got = settings(tmp_path, "one.py", "--batch_size=1", "--fresh=2")
    assert got["batch_size"] == 1 and got["fresh"] == 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batchsize=3", "Unknown config key: batchsize; did you mean batch_size?"),
        ("--__name__=x", "Unknown config key: __name__"),
        ("--json=3", "Unknown config key: json"),
        ("--batch_size=1.5", "expected int"),
        ("--batch_size=large", "expected int"),
        ("--batch_size=True", "expected int"),
        ("--batch_size=None", "expected int"),
        ("--compile=1", "expected bool"),
        ("--learning_rate=fast", "expected float"),
        ("--learning_rate=" + "(" * 500, "expected float"),
        ("--compile", "written --name=value"),
        ("batch_size=3", "neither a preset's path nor --name=value"),
        ("missing.py", "cannot read preset 'missing.py'"),
        (".", "cannot read preset '.'"),
        ("syntax.py", "preset 'syntax.py' is not a Python file"),
        ("binary.py", "preset 'binary.py' is not a Python file"),
        ("fails.py", "preset 'fails.py', line 2: NameError: name 'unheard_of' is not defined"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "syntax.py").write_text("batch_size = = 3\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "fails.py").write_text("\nbatch_size = unheard_of\n")
    done = run(tmp_path, argument)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_same_result_as_nanogpts_script(tmp_path: Path) -> None:
    """The settings dictionary that nanoGPT's train.py logs is collected by name after the overrides."""
    script = SCRIPT.replace("print(json.dumps(values))", "print(json.dumps({k: globals()[k] for k in names}))")
    done = run(tmp_path, "--batch_size=7", script=script)
    assert json.loads(done.stdout.splitlines()[-2])["batch_size"] == 7
