"""The kernel is compiled once and kept, never taken from where others could have put it, and never needed."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.delta import compiled, decode_block, encode_block
from common.delta.primitives import NumpyPrimitives
from tests.builders_delta import a_kernel

ROOT = Path(__file__).resolve().parents[3]
SANITIZERS = ("-O1", "-g", "-fPIC", "-shared", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="session")
def a_compiled_kernel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("compiled")
    a_kernel(directory)  # skips where there is no compiler
    return kernels_in(directory)[0]


@pytest.fixture
def compilations(a_compiled_kernel, monkeypatch) -> list[Path]:
    """Makes compiling quick; the paths compiled to."""
    paths: list[Path] = []

    def compile_kernel(path: Path, flags) -> None:
        shutil.copy(a_compiled_kernel, path)
        paths.append(path)

    monkeypatch.setattr(compiled, "compile_kernel", compile_kernel)
    return paths


def kernels_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("kernel-*.so"))


def test_it_is_compiled_once_and_then_found(compilations, tmp_path):
    assert compiled.load_kernel(tmp_path) is not None
    assert compiled.load_kernel(tmp_path) is not None
    assert list(tmp_path.iterdir()) == compilations == kernels_in(tmp_path)


def test_compiling_leaves_nothing_but_the_kernel(a_compiled_kernel):
    assert list(a_compiled_kernel.parent.iterdir()) == [a_compiled_kernel]
    assert a_compiled_kernel.stat().st_mode & 0o777 == 0o700


def test_another_source_or_other_flags_or_another_processor_get_a_kernel_of_their_own(
    compilations, tmp_path, monkeypatch
):
    compiled.load_kernel(tmp_path)
    compiled.load_kernel(tmp_path, (*compiled.FLAGS, "-DOTHER"))
    assert len(kernels_in(tmp_path)) == 2
    shutil.copytree(compiled.SOURCES, tmp_path / "edited")
    with (tmp_path / "edited" / "lists.h").open("a") as source:
        source.write("/* edited */\n")
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "SOURCES", tmp_path / "edited")
        compiled.load_kernel(tmp_path)
    assert len(kernels_in(tmp_path)) == 3
    monkeypatch.setattr(compiled, "_processor", lambda: b"another")
    compiled.load_kernel(tmp_path)
    assert kernels_in(tmp_path) == sorted(compilations)
    assert len(compilations) == 4


def test_without_a_compiler_numpy_does_it_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    assert compiled.load_kernel(tmp_path) is None
    assert "coded by numpy" in caplog.text
    assert "there is no C compiler (no-such-compiler)" in caplog.text


def test_a_compiler_that_fails_is_no_obstacle_and_leaves_nothing_behind(a_compiled_kernel, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert compiled.load_kernel(tmp_path / "kernels", ("--no-such-flag",)) is None
    assert "--no-such-flag" in caplog.text
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_obstacle(tmp_path):
    (tmp_path / "file").touch()
    assert compiled.load_kernel(tmp_path / "file" / "kernels") is None


@pytest.mark.parametrize("writable_by", [0o020, 0o002], ids=["its group", "everybody"])
@pytest.mark.parametrize("what", ["folder", "kernel"])
def test_code_that_others_could_have_written_is_not_run(compilations, tmp_path, what, writable_by, caplog):
    caplog.set_level(logging.INFO)
    directory = tmp_path / "kernels"
    assert compiled.load_kernel(directory) is not None
    path = directory if what == "folder" else kernels_in(directory)[0]
    path.chmod(path.stat().st_mode | writable_by)
    assert compiled.load_kernel(directory) is None
    assert f"{path} could have been written by others" in caplog.text


def test_code_of_another_user_is_not_run(compilations, tmp_path, monkeypatch):
    assert compiled.load_kernel(tmp_path / "kernels") is not None
    user = os.getuid()
    monkeypatch.setattr(compiled.os, "getuid", lambda: user + 1)
    assert compiled.load_kernel(tmp_path / "kernels") is None


def test_a_file_that_is_no_kernel_is_no_obstacle(tmp_path, monkeypatch):
    def write_nonsense(path: Path, flags) -> None:
        path.write_bytes(b"cut short")
        path.chmod(0o700)

    monkeypatch.setattr(compiled, "compile_kernel", write_nonsense)
    assert compiled.load_kernel(tmp_path) is None


def test_it_lives_in_the_virtual_environment_or_else_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.sys, "prefix", str(tmp_path / "venv"))
    assert compiled._cache_directory() == tmp_path / "venv" / "kernels"
    monkeypatch.setattr(compiled.sys, "prefix", sys.base_prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiled._cache_directory() == tmp_path / "cache" / "countercurrent"


def test_a_user_without_a_home_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.sys, "prefix", sys.base_prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    assert compiled.load_kernel() is None


def test_nothing_is_compiled_into_a_folder_that_others_can_write_to(compilations, tmp_path):
    tmp_path.chmod(0o777)
    assert compiled.load_kernel(tmp_path) is None
    assert compilations == []


@pytest.mark.parametrize("library", [None, "compiled"])
def test_what_is_used_is_the_fastest_there_is(library, compilations, tmp_path, monkeypatch):
    compiled.primitives.cache_clear()
    monkeypatch.setattr(compiled, "_cache_directory", lambda: tmp_path)
    if library is None:
        monkeypatch.setattr(compiled, "load_kernel", lambda: None)
    chosen = compiled.primitives()
    assert isinstance(chosen, NumpyPrimitives if library is None else compiled.CompiledPrimitives)
    old, new = np.arange(200, dtype=np.uint16), np.arange(1, 201, dtype=np.uint16)
    decode_block(encode_block(old, new, "bfloat16"), old, "bfloat16").apply_to(old)
    assert np.array_equal(old, new)
    compiled.primitives.cache_clear()


@pytest.mark.parametrize("portable", [(), ("-U__SSE2__", "-U__AVX512BW__", "-U__BMI2__")], ids=["simd", "portable"])
def test_the_kernel_stays_within_its_arrays_whatever_it_reads(a_compiled_kernel, tmp_path, portable):
    """Under the address and undefined behaviour sanitizers, which end the process at the first offence."""
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False).stdout
    if not Path(runtime.strip()).is_absolute():
        pytest.skip("there is no address sanitizer")
    flags = (*SANITIZERS, *(flag for flag in compiled.FLAGS if flag.startswith("-march")), *portable)
    compiled.compile_kernel(kernel := tmp_path / "kernel.so", flags)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # so that small arrays have guards around them as well
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.fuzz_delta", str(kernel), "300", "5"]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "refused" in result.stdout
