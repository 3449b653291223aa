"""Programs as ranks: run a command to its end, with an environment that works in containers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Three training steps; the digest covers every dispatched and combined row of them.
DEMO = ["-m", "deepep", "demo", "--epochs", "1", "--batch-size", "512", "--no-plot", "--digest"]
TIMEOUT = 200.0


def environment(**extra: str) -> dict[str, str]:
    """The environment of this process without any launcher's variables; root and few cores are fine for MPI."""
    foreign = re.compile(r"OMPI_|PMIX_|PMI_|TORCHELASTIC_|GLOO_|(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT)$")
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    here = {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [kept.get("PYTHONPATH")])]),
    }
    return {**kept, **here, **extra}


def torchrun(*args: str) -> list[str]:
    """The command line of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *args]


def finish(commands: Sequence[Sequence[str]], envs: Sequence[dict[str, str]] | None = None) -> list[str]:
    """Run commands side by side; what each printed. Fails, and leaves nothing running, if one fails or takes long."""
    envs = envs or [environment()] * len(commands)
    processes = [
        subprocess.Popen(
            command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        for command, env in zip(commands, envs, strict=True)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    for process, command, (out, err) in zip(processes, commands, outputs, strict=True):
        assert process.returncode == 0, f"{command} returned {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return [out for out, _ in outputs]


def digests(printed: str) -> dict[int, str]:
    """The hash of each rank's rows, from what the demo printed."""
    return {int(rank): digest for rank, digest in re.findall(r"^rank (\d+) rows ([0-9a-f]{64})$", printed, re.M)}
