"""Operations in threads that have not touched CUDA before: those of autograd, and the user's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from gpu_steps import Step
from low_latency_steps import Decoder

import deepep
from deepep.autograd import combine, dispatch
from deepep.testing.launch import spawn


def test_a_backward_pass_may_begin_with_an_operation() -> None:
    assert spawn(begin_backward, 2, device="cuda", timeout=100) == ["done"] * 2


def test_any_thread_may_call() -> None:
    assert spawn(call_elsewhere, 2, device="cuda", timeout=100) == ["done"] * 2


def begin_backward(group: Any) -> str:
    """Nothing of torch runs in autograd's thread before the backward of combine."""
    buffer = deepep.Buffer(group, backend="ipc", timeout=20)
    prepared = Step(buffer, 2)
    x = prepared.x.clone().requires_grad_()
    grad = torch.randn_like(prepared.x)
    recv_x, _, _, _, handle = dispatch(buffer, x, prepared.routing["topk_idx"], None, 8)
    combine(buffer, recv_x, handle).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), grad.float() * prepared.copies, rtol=2e-2, atol=1e-2)
    buffer.destroy()
    return "done"


def call_elsewhere(group: Any) -> str:
    buffer = deepep.Buffer(group, backend="ipc", timeout=20)
    prepared, decoder = Step(buffer, 2), Decoder(group, timeout=20)
    decoder.draw(1)
    wanted = decoder.step()
    prepared.check(prepared.run())
    results: list[torch.Tensor] = []

    def call(work: Callable[[], torch.Tensor]) -> None:
        torch.cuda.set_device(prepared.x.device)  # each thread has its own; this alone makes no context for device 0
        results.append(work())

    for work in (prepared.run, decoder.step):
        thread = threading.Thread(target=call, args=(work,))
        thread.start()
        thread.join()
    prepared.check(results[0])
    assert torch.equal(results[1], wanted)
    decoder.buffer.destroy()
    buffer.destroy()
    return "done"
