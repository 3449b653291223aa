"""Where the kernel sources are, and what a kernel's binary depends on."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from deepep.errors import BackendUnavailable, InvalidArgument

_INCLUDE = re.compile(rb'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)


@functools.cache
def source_root() -> Path:
    """Find the folder with `include/`, `kernels/` and `transports/`: shipped in the package, or `csrc/` of a checkout.

    Raises:
        BackendUnavailable: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for root in (package.parent / "csrc", package / "_csrc"):
        if (root / "include" / "deepep").is_dir():
            return root
    raise BackendUnavailable(f"no kernel sources in {package / '_csrc'} or beside the package; reinstall deepep")


def transport_names() -> list[str]:
    """List the transports by name, `csrc/transports/<name>.cuh`, in alphabetical order."""
    return sorted(path.stem for path in (source_root() / "transports").glob("*.cuh"))


def source_path(source: str) -> Path:
    """Give a kernel file by its path inside the source root; raises `InvalidArgument` where there is none."""
    path = source_root() / source
    if not path.is_file():
        raise InvalidArgument(f"no kernel source '{source}' in {source_root()}")
    return path


def transport_header(transport: str) -> str:
    """Give the header of a transport, relative to the source root; raises `InvalidArgument` naming those there are."""
    header = f"transports/{transport}.cuh"
    if not (source_root() / header).is_file():
        raise InvalidArgument(f"no transport '{transport}': there are {', '.join(transport_names())}")
    return header


def include_dirs() -> list[Path]:
    """Folders that `#include` is resolved against, in order."""
    return [source_root() / "include", source_root(), source_root() / "include" / "nvrtc"]


def content_hash(source: str, transport: str) -> str:
    """Hash a kernel file, the transport and every header of ours that they reach, as hex digits."""
    digest = hashlib.sha256()
    for path in _closure([source_path(source), source_root() / transport_header(transport)]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(source_root())} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _closure(roots: list[Path]) -> Iterator[Path]:
    """Walk files and the headers they include, each once; headers that are not ours are left to the compiler."""
    seen: set[Path] = set()
    queue = list(roots)
    while queue:
        path = queue.pop(0)
        if path in seen:
            continue
        seen.add(path)
        yield path
        for include in _INCLUDE.findall(path.read_bytes()):
            candidates = [folder / include.decode() for folder in (path.parent, *include_dirs())]
            queue += [candidate.resolve() for candidate in candidates if candidate.is_file()][:1]
