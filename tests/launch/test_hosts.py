"""Two hosts with their own names and addresses, over TCP: network namespaces joined by a virtual cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from launched import DEMO, digests, environment, finish, torchrun

ADDRESSES = ("10.231.77.1", "10.231.77.2")


@dataclass(frozen=True)
class Host:
    """A network namespace: its name, its address and its network card."""

    name: str
    address: str
    card: str

    def command(self, *args: str) -> list[str]:
        """Run something there, under the host's own name."""
        renamed = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", renamed, "sh", *args]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=20)


def connect(hosts: list[Host]) -> None:
    for host in hosts:
        ip("netns", "add", host.name)
    first, second = hosts
    ip("link", "add", first.card, "netns", first.name, "type", "veth", "peer", second.card, "netns", second.name)
    for host in hosts:
        ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.card)
        ip("-n", host.name, "link", "set", host.card, "up")
        ip("-n", host.name, "link", "set", "lo", "up")
    subprocess.run(first.command("true"), check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if sys.platform != "linux" or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need Linux with iproute2 and util-linux")
    tag = os.getpid()
    made = [Host(f"deepep{side}-{tag}", ADDRESSES[side], f"dep{side}x{tag}"[:15]) for side in (0, 1)]
    try:
        try:
            connect(made)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield made
    finally:
        for host in made:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False, timeout=20)


def test_two_hosts_move_the_same_rows_as_one(hosts: list[Host], spawned: dict[int, str]) -> None:
    place = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", hosts[0].address, "--master-port", "29533"]
    commands = [
        host.command(*torchrun(*place, "--node-rank", str(number), "--local-addr", host.address, *DEMO))
        for number, host in enumerate(hosts)
    ]
    envs = [environment(GLOO_SOCKET_IFNAME=host.card) for host in hosts]
    printed, silent = finish(commands, envs)
    assert "4 ranks on 2 host(s)" in printed
    assert "loss curve equals" in printed
    assert not silent
    assert digests(printed) == spawned
