"""The machine instructions of XLA's kernels for a Hopper GPU, counted on a machine without one.

XLA compiles for the GPU and dumps its kernels in PTX, NVIDIA's portable assembly; ptxas assembles them for sm_90a, and
nvdisasm lists the result. An instruction counts once for each thread of a launch: whatever stands in a loop, counts too
little (`loops` says so), and what only few threads reach, such as the end of a reduction, too much. Products are left
out: they are not tuned without a GPU.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

NAME = "counted"  # of the function that is compiled: only its kernels are dumped
TOOLS = next(filter(Path.is_dir, (Path(folder, "nvidia/cu13/bin") for folder in sys.path)), None)
GRID = re.compile(r"(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
LABEL, BRANCH = re.compile(r"^(\.L_\w+):", re.MULTILINE), re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
FIGURES = re.compile(r"function '(\w+)' for.*?(\d+) bytes spill stores, (\d+).*?Used (\d+)", re.DOTALL)


class Kernel(NamedTuple):
    """One launch: `instructions` of one thread, and what that makes for each of so many elements."""

    name: str
    threads: int
    instructions: int
    registers: int
    spilled_bytes: int
    loops: bool

    def per_element(self, elements: int) -> float:
        return self.instructions * self.threads / elements


def dump_kernels(folder: Path) -> None:
    """Have XLA dump kernels from now on; before it has compiled anything."""
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_module_re={NAME} --xla_dump_emitter_re=.*"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def kernels(folder: Path) -> list[Kernel]:
    """The kernels of the program that was compiled last, without products, in the order of their launches."""
    texts = [path.read_text(encoding="utf-8") for path in folder.glob(f"*{NAME}*.ptx")]
    codes = {name: kernel for text in texts if ".entry" in text for name, kernel in assembled(text).items()}
    launches = next(folder.glob(f"*{NAME}*.thunk_sequence.txt")).read_text(encoding="utf-8")
    shutil.rmtree(folder)
    folder.mkdir()
    found = []
    for name, *sizes in GRID.findall(launches):
        if name in codes and not re.search("gemm|dot", name):
            found.append(codes[name]._replace(threads=math.prod(map(int, sizes))))
    return found


def assembled(ptx: str) -> dict[str, Kernel]:
    """The kernels of a text of PTX, by name, without the threads of their launch."""
    if TOOLS is None:
        raise RuntimeError("ptxas and nvdisasm are not installed; make test-aot installs them")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        log = _run("ptxas", "-arch=sm_90a", "-v", "-o", binary, source).stderr
        listing = _run("nvdisasm", "-c", binary).stdout
    parts = re.split(r"^\.text\.(\w+):\n", listing, flags=re.MULTILINE)
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {
        name: Kernel(name, 0, instructions, int(used), int(out) + int(back), loops)
        for name, out, back, used in FIGURES.findall(log)
        for instructions, loops in [counted(code[name])]
    }


def counted(listing: str) -> tuple[int, bool]:
    """The instructions of a listing, without those that do nothing, and whether a branch leads back to some of them."""
    names = [name for name in INSTRUCTION.findall(listing) if name != "NOP"]
    places = {match[1]: match.end() for match in LABEL.finditer(listing)}
    # Behind its end, a kernel branches to itself for ever: nothing stands between that label and that branch.
    backward = (listing[places[match[1]] : match.start()] for match in BRANCH.finditer(listing) if match[1] in places)
    return len(names), any(";" in between for between in backward)


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
