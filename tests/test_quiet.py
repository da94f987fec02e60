"""Whose lines reach the user: ours and the user's own, not other libraries' warnings about calls that are ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = """
import warnings
from curate.cli.quiet import hush
hush()
from transformers.utils import logging
logging.get_logger("transformers.generation.utils").warning("NOISE of a logger")
logging.get_logger("transformers.generation.utils").error("ERROR of a logger")
warnings.warn_explicit("NOISE of a warning", UserWarning, "f.py", 1, module="torch.nn.modules")
warnings.warn_explicit("OWN warning", UserWarning, "f.py", 1, module="my_grader")
"""


@pytest.mark.parametrize(("debug", "noise"), [("", False), ("0", False), ("1", True)])
def test_warnings_of_libraries_are_shown_on_demand(debug, noise):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "CURATE_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [name in done.stderr for name in ("ERROR of a logger", "OWN warning")] == [True, True]
    assert [f"NOISE of a {what}" in done.stderr for what in ("logger", "warning")] == [noise, noise]
