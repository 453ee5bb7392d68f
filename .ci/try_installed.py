"""Checks an installed torchdyn_mintime: it is not the checkout's, its metadata is of one version, its doctests pass.

`.ci/release` runs it in a new environment, from an empty folder, with the checkout's path as the argument.
"""

import doctest
import importlib
import pkgutil
import re
import sys
from importlib.metadata import metadata
from pathlib import Path

checkout = Path(sys.argv[1])
sys.path.remove(str(Path(__file__).parent))

import torchdyn_mintime as tm  # noqa: E402

assert checkout not in Path(tm.__file__).parents, f"imported from the checkout: {tm.__file__}"
found = metadata("torchdyn-mintime")
cited = re.search(r"^version: (\S+)$", (checkout / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
assert found["Version"] == tm.__version__ == cited, (found["Version"], tm.__version__, cited)
changes = (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
assert f"\n## [{tm.__version__}]\n" in changes, f"CHANGELOG.md has no heading for {tm.__version__}"
if changes.partition("## [Unreleased]")[2].partition("\n## [")[0].strip():
    print("CHANGELOG.md has unreleased changes: give them and __version__, pyproject.toml, CITATION.cff a new version.")

flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
failed = attempted = 0
for module in pkgutil.walk_packages(tm.__path__, "torchdyn_mintime."):
    if not module.name.endswith("__main__"):
        result = doctest.testmod(importlib.import_module(module.name), optionflags=flags)
        failed, attempted = failed + result.failed, attempted + result.attempted
print(f"torchdyn_mintime {tm.__version__}: {attempted - failed} of {attempted} doctest lines pass")
sys.exit(failed > 0 or attempted == 0)
