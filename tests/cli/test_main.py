"""Help, version, usage errors, and what the process says and returns."""

import subprocess
import sys

import pytest

from flexrun import __version__
from flexrun.cli import COMMANDS, main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flexrun {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_data(arguments, capsys):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: flexrun") and captured.err == ""


@pytest.mark.parametrize(
    "arguments, complaint, hint",
    [
        ([], "COMMAND", "flexrun --help"),
        (["walk"], "invalid choice", "flexrun --help"),
        (["run"], "--model", "flexrun run --help"),
        (["run", "-i", "a", "-o", "b", "--model", "m", "--max-token", "3"], "'--max-token'", "--max-tokens?"),
        (["run", "-i", "a", "-o", "b", "--model", "m", "--zzz"], "'--zzz'", "flexrun run --help"),
        (["run", "-i", "a", "-o", "b", "--model", "m", "--n", "x"], "invalid int value", "flexrun run --help"),
    ],
)
def test_usage_errors_end_with_a_hint(arguments, complaint, hint, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    message, blank, last = captured.err.rstrip("\n").split("\n")
    assert message.startswith("error: ") and complaint in message
    assert blank == "" and last.startswith("hint: ") and hint in last
    assert captured.out == ""


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from flexrun.cli import main; main(['run', '--help'])\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'tqdm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "flexrun", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"flexrun {__version__}\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_libraries_are_imported_is_no_traceback(name):
    program = (
        f"import os, signal; from flexrun import cli; cli.import_torch = lambda: os.kill(os.getpid(), signal.{name})\n"
        "cli.main(['run', '-i', 'a', '-o', 'b', '--model', 'm'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "error: interrupted\n\nhint: nothing was begun; run it again\n"
