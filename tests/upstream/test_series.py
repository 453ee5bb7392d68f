"""The patches in docs/upstream apply in order and each alone, and the patched torchdyn no longer shows its faults.

`make upstream` runs every half and every patch's tests; here are those that take a second.
"""

import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream import series

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git, which applies the patches, is not installed")

PAGES = Path(series.ROOT / "docs/upstream")


@pytest.mark.parametrize("patch", series.PATCHES, ids=lambda patch: patch.stem)
def test_each_patch_applies_alone_and_brings_a_test(patch, tmp_path):
    series.apply([patch], series.copy_torchdyn(tmp_path))
    files = series.own_tests(patch)
    assert files and all((tmp_path / name).is_file() for name in files)


def test_the_series_applies_in_order_and_mends_faults(tmp_path):
    patched = series.apply(series.PATCHES, series.copy_torchdyn(tmp_path))
    quick = ["-k", "test_u1_ or test_u9_plain_rk4 or test_u12 or test_u15 or test_u16"]
    found = series.fault_halves(patched, *quick)
    assert len(found) == 6 and all(found.values()), found


@settings(max_examples=5)  # a tenth of a second each
@given(patches=st.lists(st.sampled_from(series.PATCHES), unique=True, min_size=2))
def test_any_of_them_apply_in_any_order(patches):
    with tempfile.TemporaryDirectory() as folder:
        series.apply(patches, series.copy_torchdyn(Path(folder)))


def test_a_patch_that_does_not_fit_is_an_error(tmp_path):
    folder = series.apply(series.PATCHES[:1], series.copy_torchdyn(tmp_path))
    with pytest.raises(series.subprocess.CalledProcessError) as caught:
        series.apply(series.PATCHES[:1], folder)
    assert "patch does not apply" in caught.value.stderr or "already exists" in caught.value.stderr


def test_every_patch_has_a_page_and_every_fault_a_patch_or_a_reason():
    pages = {page.stem for page in PAGES.glob("u*.md")}
    text = {page: (PAGES / f"{page}.md").read_text(encoding="utf-8") for page in pages}
    linked = {name for body in text.values() for name in re.findall(r"patches/(u[\w-]+)\.patch", body)}
    assert linked == {patch.stem for patch in series.PATCHES}
    halves = {
        number
        for file in Path(__file__).parent.glob("test_u*.py")
        for number in re.findall(r"def test_u(\d+)_plain", file.read_text(encoding="utf-8"))
    }
    mended = {str(int(patch.stem[1:3])) for patch in series.PATCHES}
    left = {re.match(r"test_u(\d+)", start).group(1) for start in series.LEFT}
    assert halves == mended | left | {"5"}  # U5 is what U2 does to an adjoint
