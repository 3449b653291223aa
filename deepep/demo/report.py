"""What the demo prints and draws."""

from __future__ import annotations

from pathlib import Path

from deepep.demo.options import Options
from deepep.demo.train import Outcome


def tolerance(options: Options) -> float:
    """Say how far the loss curves may be apart.

    Sums over ranks and over a whole batch differ by float64 roundings. From three experts per token on, the float32
    sums over experts are in another order, too, and may now and then turn a router's choice.
    """
    return 1e-9 if options.num_topk <= 2 else 1e-2


def agrees(options: Options, outcome: Outcome, alone: Outcome) -> bool:
    """Say whether the loss curve of the ranks is that of the single process."""
    return largest_difference(outcome, alone) <= tolerance(options)


def largest_difference(outcome: Outcome, alone: Outcome) -> float:
    """Give the largest difference between two loss curves, over all steps."""
    return max(abs(mine - other) for mine, other in zip(outcome.losses, alone.losses, strict=True))


def text(options: Options, outcomes: list[Outcome], alone: Outcome) -> str:
    """Describe a training run, one outcome per rank, and compare it with that of a single process."""
    first = outcomes[0]
    difference, num_steps = largest_difference(first, alone), len(first.losses)
    lines = [
        (
            f"backend {first.backend}, {options.device}, {len(outcomes)} ranks on {first.num_hosts} host(s), "
            f"{options.num_experts} experts, top-{options.num_topk}, seed {options.seed}"
        ),
        f"loss: {first.losses[0]:.4f} -> {first.losses[-1]:.4f} in {num_steps} steps",
        f"test accuracy: {100 * first.accuracy:.1f} %",
        "",
        "rank  experts    rows sent    MB sent",
    ]
    for rank, outcome in enumerate(outcomes):
        share = options.experts_of(rank, len(outcomes))
        owned = f"{share.start}-{share.stop - 1}"
        lines.append(f"{rank:4}  {owned:>7}  {outcome.num_rows:11,}  {outcome.num_bytes / 1e6:9.2f}")
    lines += ["(rows that left their rank, there and back, in training and test)"]
    lines += ["", "load of each expert, last epoch:"]
    lines += _bars(first.expert_load)
    verdict = "equals" if agrees(options, first, alone) else "DIFFERS from"
    lines += [
        "",
        (
            f"loss curve {verdict} the one of a single process without communication: "
            f"largest difference {difference:.1e} over {num_steps} steps (tolerance {tolerance(options):.0e})"
        ),
        f"test accuracy of the single process: {100 * alone.accuracy:.1f} %",
    ]
    lines += [f"rank {rank} rows {outcome.digest}" for rank, outcome in enumerate(outcomes) if outcome.digest]
    return "\n".join(lines)


def plot(path: Path, options: Options, outcomes: list[Outcome], alone: Outcome) -> None:
    """Draw both loss curves and the load of each expert, coloured by its rank."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    first = outcomes[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(first.losses, color="tab:blue", linewidth=3, label=f"{len(outcomes)} ranks, backend {first.backend}")
    left.plot(alone.losses, color="tab:orange", linewidth=1, linestyle="--", label="one process, no communication")
    left.set(xlabel="step", ylabel="loss", yscale="log", title=f"test accuracy {100 * first.accuracy:.1f} %")
    left.legend()
    for rank in range(len(outcomes)):
        share = options.experts_of(rank, len(outcomes))
        right.bar(share, [first.expert_load[expert] for expert in share], color=f"C{rank % 10}", label=f"rank {rank}")
    right.set(xlabel="expert", ylabel="tokens", title="load of each expert, last epoch")
    right.legend(ncols=2, loc="lower right", framealpha=0.9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(load: list[int]) -> list[str]:
    most, total = max(load), sum(load)
    return [
        f"{expert:4}  {'#' * round(40 * tokens / most):40}  {tokens:6} tokens  {100 * tokens / total:5.1f} %"
        for expert, tokens in enumerate(load)
    ]
