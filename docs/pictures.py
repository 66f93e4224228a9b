"""Draws the pictures of the router pages into docs/images: ``python docs/pictures.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

import torch_routers as tr

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREY = "#2a6f97", "#e07a2f", "#c9ced4"


def draw_topk() -> plt.Figure:
    """From the logits of one token to the weights of its experts, and five tokens at once."""
    logits = torch.tensor([0.2, 1.6, -0.9, 0.5, 2.1, -0.2, 0.9, -1.3])
    probs, experts = logits.softmax(0), range(len(logits))
    normalised, indices, _ = tr.ops.topk_gate(logits[None], 2)
    plain, _, _ = tr.ops.topk_gate(logits[None], 2, renormalize=False)
    chosen = indices[0].tolist()
    colors = [BLUE if e in chosen else GREY for e in experts]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.9), width_ratios=[1, 1, 1.15])
    left.bar(experts, logits, color=colors)
    left.axhline(0, color="black", linewidth=0.6)
    left.set(title="logits $z$, the largest two", xlabel="expert", xticks=experts)

    width = 0.38
    middle.bar(experts, probs, width, color=GREY, label="softmax $p$")
    for j, e in enumerate(chosen):
        middle.bar(e, plain[0, j], width, color=ORANGE, label="_" * j + "plain weight")
        middle.bar(e + width, normalised[0, j], width, color=BLUE, label="_" * j + "renormalised")
    middle.set(title="weights $w$ of their slots", xlabel="expert", xticks=experts, ylim=(0, 0.85))
    middle.legend(frameon=False, fontsize=8, loc="upper left")

    tokens = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([True, True, True, False, True])
    weights, indices, _ = tr.ops.topk_gate(tokens, 2, valid_mask=mask)
    _grid(right, 5, 8)
    for t in range(5):
        for weight, expert in zip(weights[t].tolist(), indices[t].tolist(), strict=True):
            if expert >= 0:
                right.add_patch(Rectangle((expert, t), 1, 1, color=BLUE, alpha=weight))
                right.text(expert + 0.5, t + 0.5, f"{weight:.2f}", ha="center", va="center",
                           fontsize=7.5, color="white" if weight > 0.5 else "black")  # fmt: skip
        if not mask[t]:
            right.add_patch(Rectangle((0, t), 8, 1, facecolor="none", edgecolor=GREY, hatch="////"))
    right.set(title="five tokens, one of them masked", xlabel="expert", ylabel="token")
    return figure


def draw_hash() -> plt.Figure:
    """A table, and the load it gives a text whose ids are as skewed as words are."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[1, 1.4])
    table = tr.HashRouter(vocab_size=12, num_experts=8).table
    _grid(left, 12, 8)
    for token, expert in enumerate(table[:, 0].tolist()):
        left.add_patch(Rectangle((expert, token), 1, 1, color=BLUE))
    left.set(title="a table: one expert per id", xlabel="expert", ylabel="token id")
    left.set_yticks([y + 0.5 for y in range(0, 12, 3)], range(0, 12, 3))

    counts = (100_000 / torch.arange(1, 1025)).long()  # Zipf
    routers = {
        "random table": (tr.HashRouter(1024, 8), ORANGE),
        "balanced table": (tr.HashRouter.balanced(counts, 8), BLUE),
    }
    for i, (name, (router, color)) in enumerate(routers.items()):
        load = torch.zeros(8).index_add(0, router.table[:, 0], counts.float()) / counts.sum()
        right.bar([e + 0.4 * i for e in range(8)], load, 0.4, color=color, label=name)
    right.axhline(1 / 8, color="black", linewidth=0.8, linestyle="--", label="equal shares")
    right.set(title="share of the tokens, 1024 ids of Zipf's law", xlabel="expert")
    right.set_xticks([e + 0.2 for e in range(8)], range(8))
    right.legend(frameon=False, fontsize=8)
    return figure


def draw_recurrent() -> plt.Figure:
    """One token on its way through three layers."""
    figure, axes = plt.subplots(figsize=(9, 3.2))
    axes.set(xlim=(0, 9), ylim=(0, 3.2))
    axes.axis("off")

    def box(x: float, y: float, text: str, color: str) -> None:
        frame = {"boxstyle": "round,pad=0.45", "facecolor": color, "edgecolor": "none"}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color="white", bbox=frame)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "black"})
        if text:
            middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
            axes.text(middle[0] + 0.1, middle[1] + 0.08, text, fontsize=9)

    axes.text(0.25, 1.6, "$h = 0$", va="center", fontsize=9)
    arrow((0.7, 1.6), (1.2, 1.6))
    for layer in range(3):
        x = 1.7 + 2.8 * layer
        box(x, 0.75, f"projector $W_1^{layer + 1}$", BLUE)
        box(x, 1.6, "shared cell", ORANGE)
        box(x, 2.45, f"head $W_2^{layer + 1}$", BLUE)
        arrow((x, 0.05), (x, 0.5), f"$x^{layer + 1}$")
        arrow((x, 1.0), (x, 1.35), "$u$")
        arrow((x, 1.85), (x, 2.2), "$h'$")
        arrow((x, 2.7), (x, 3.15), "logits")
        if layer < 2:
            arrow((x + 0.55, 1.6), (x + 2.25, 1.6), "state")
    return figure


def draw_smear() -> plt.Figure:
    """Weights of sequences; and two experts merged, against the mean of their results."""
    torch.manual_seed(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[1, 1.4])
    router = tr.SMEARRouter(hidden_size=16, num_experts=4, expert_dropout=0)
    with torch.no_grad():
        router.weight_norm_weight.fill_(0.4)
        weights = router(torch.randn(2, 9, 16)).merge.weights
    for b, color in enumerate((BLUE, ORANGE)):
        places = [e + 0.4 * b for e in range(4)]
        left.bar(places, weights[b], 0.4, color=color, label=f"sequence {b + 1}")
    left.set(title="weights $p$ of the experts", xlabel="expert")
    left.set_xticks([e + 0.2 for e in range(4)], range(4))
    left.legend(frameon=False, fontsize=8)

    experts, x = tr.MLPExperts(2, 4, 8, activation="silu"), 2 * torch.randn(1, 4)
    shares = torch.linspace(0, 1, 101)
    p = torch.stack([1 - shares, shares], 1)
    with torch.no_grad():
        each = experts(x.expand(2, 4), torch.tensor([0, 1, 2]))[:, 0]
        merge = tr.routing.Merge(p, torch.arange(102))
        merged = tr.SoftMergedExperts(experts)(x.expand(101, 4), merge)[:, 0]
    right.plot(shares, merged, color=BLUE, label="one expert of merged parameters")
    right.plot(shares, p @ each, color=ORANGE, label="mean of the results of both")
    right.set(title="a result, by the weight of the second expert", xlabel="$p_2$")
    right.legend(frameon=False, fontsize=8)
    return figure


def draw_entropy() -> plt.Figure:
    """How many experts random tokens keep; and the entropy of two experts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[1.4, 1])
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.2, 4, 400).unsqueeze(1)
    logits = spread * torch.randn(400, 8, generator=generator)
    for name, options, color in (
        ("top-p 0.75, at least 2", {"threshold": 1.0}, GREY),
        ("and all above 0.9", {}, BLUE),
    ):
        gate = tr.ops.entropy_gate(logits, **options)
        kept = (gate.weights != 0).sum(-1)
        left.scatter(gate.entropy, kept, s=14 if color == GREY else 5, color=color, label=name)
    left.set(title="experts of a token, of 8", xlabel="normalised entropy $H$, q = 1.1")
    left.legend(frameon=False, fontsize=8)

    p = torch.linspace(1e-4, 1 - 1e-4, 201)
    for q, color in (0.5, ORANGE), (1.1, BLUE), (2.0, GREY):
        gate = tr.ops.entropy_gate(torch.stack([p, 1 - p], 1).log(), q=q)
        right.plot(p, gate.entropy, color=color, label=f"q = {q}")
    right.set(title="normalised entropy of two experts", xlabel="$p_1$")
    right.legend(frameon=False, fontsize=8, loc="lower center")
    return figure


def draw_adaptive_k() -> plt.Figure:
    """The staircase of the numbers of experts, and calibrated thresholds on other tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
    random = torch.Generator().manual_seed(0)
    z = 3 * torch.rand(1500, 1, generator=random) * torch.randn(1500, 8, generator=random)
    p = z.softmax(-1)
    entropies = -(p * p.log()).sum(-1)

    def numbers(thresholds, part):
        indices = tr.ops.ragged_select(z[part], "entropy", thresholds=thresholds, counts=[1, 2, 4])
        return (indices >= 0).sum(-1)

    left.scatter(entropies, numbers([0.6, 1.2], slice(None)), s=5, color=BLUE)
    for threshold in 0.6, 1.2:
        left.axvline(threshold, color=GREY)
    left.set(title="experts of a token", xlabel="entropy, nats", yticks=[1, 2, 4])

    some, others = slice(0, 750), slice(750, None)
    targets = [1 + 0.15 * i for i in range(21)]
    found = []
    for target in targets:
        thresholds = tr.calibrate_thresholds(entropies[some], (1, 2, 4), target)
        found.append(numbers(thresholds, others).double().mean().item())
    right.plot([1, 4], [1, 4], color=GREY)
    right.plot(targets, found, ".", color=ORANGE)
    right.set(title="calibrated thresholds", xlabel="mean number asked for", ylabel="found")
    return figure


def draw_entmax() -> plt.Figure:
    """Weights of two experts, and of eight, by alpha."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[1, 1.2])
    difference = torch.linspace(-4, 4, 201)
    pair = torch.stack([difference, torch.zeros_like(difference)], 1)
    logits = torch.tensor([[2.1, 1.6, 0.9, 0.5, 0.2, -0.2, -0.9, -1.3]])
    for i, (alpha, color) in enumerate(((1.0, GREY), (1.5, BLUE), (2.0, ORANGE))):
        left.plot(
            difference, tr.ops.entmax(pair, alpha)[0][:, 0], color=color, label=f"α = {alpha}"
        )
        places = [e + 0.27 * i for e in range(8)]
        right.bar(places, tr.ops.entmax(logits, alpha)[0][0], 0.27, color=color)
    left.set(title="weight of the first of two experts", xlabel="$z_1 - z_2$")
    left.legend(frameon=False, fontsize=8)
    right.set(title="weights of eight experts of one token", xlabel="expert")
    right.set_xticks([e + 0.27 for e in range(8)], range(8))
    return figure


def draw_soft() -> plt.Figure:
    """The weights of one token in the four modes; and their gradients."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9))
    token = torch.tensor([[1.2, 0.7, 0.1, -0.3, -0.9]])
    factors = torch.tensor([0.3, -1.0, 0.6, 1.0, -0.4])  # what the task would have of each expert
    router = tr.SoftRouter(5, 5, top_k=2)
    router.weight.data = torch.eye(5)
    labels = torch.tensor([2])
    modes = ("soft", GREY), ("soft_topk", BLUE), ("st_topk", ORANGE), ("hard", "black")
    for i, (mode, color) in enumerate(modes):
        router.mode = mode
        logits = token.clone().requires_grad_()
        weights = router(logits, task_ids=labels).weights
        (slope,) = torch.autograd.grad((weights * factors).sum(), logits)
        places = [e + 0.2 * i for e in range(5)]
        axes[0].bar(places, weights[0].detach(), 0.2, color=color, label=mode)
        axes[1].bar(places, slope[0], 0.2, color=color)
    axes[0].set(title="weights of one token, label 2", xlabel="expert")
    axes[1].set(title="gradient of its logits", xlabel="expert")
    axes[1].axhline(0, color="black", linewidth=0.6)
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xticks([e + 0.3 for e in range(5)], range(5))
    return figure


def draw_relu() -> plt.Figure:
    """From the logits of one token to its weights; and the experts of neighbouring tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=[1, 1.2])
    logits = torch.tensor([[0.6, -0.2, 0.3, 0.0, -0.5, 1.1, -0.1, 0.2]])
    weights = tr.ops.relu_rms_gate(logits, torch.ones(8)).weights[0]
    left.bar([e - 0.2 for e in range(8)], logits[0], 0.4, color=GREY, label="logits $z$")
    left.bar([e + 0.2 for e in range(8)], weights, 0.4, color=BLUE, label="weights $y$, gain 1")
    left.axhline(0, color="black", linewidth=0.6)
    left.set(title="one token", xlabel="expert", xticks=range(8))
    left.legend(frameon=False, fontsize=8)

    generator = torch.Generator().manual_seed(4)
    steps = torch.randn(24, 8, generator=generator).cumsum(0) / 3
    active = tr.ops.relu_rms_gate(steps, torch.ones(8)).weights != 0
    right.imshow(active.T, aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    right.set(title="active experts of 24 tokens", xlabel="token", ylabel="expert")
    return figure


def draw_prototype() -> plt.Figure:
    """Which of three directions in the plane is first, by two scores."""
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 3), sharey=True)
    angles = torch.tensor([0.3, 1.7, 3.6])
    prototypes = torch.stack([angles.cos(), angles.sin()], 1)
    line = torch.linspace(-1.2, 1.2, 161)
    points = torch.cartesian_prod(line, line)
    router = tr.PrototypeRouter(2, 3, 1)
    router.prototypes.copy_(prototypes)
    absolute = router(points).indices[:, 0]
    signed = (F.normalize(points, dim=1) @ prototypes.T).argmax(1)
    colors = ListedColormap(["#bcd4e2", "#f3d2b8", GREY])
    for axis, experts, title in zip(axes, (absolute, signed), ("absolute", "normalized")):
        axis.imshow(
            experts.view(161, 161).T, origin="lower", extent=(-1.2, 1.2, -1.2, 1.2), cmap=colors
        )
        for e, (x, y) in enumerate(prototypes.tolist()):
            axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->"})
            axis.text(1.08 * x, 1.08 * y, f"$p_{e}$", ha="center", va="center")
        axis.set(title=title, xticks=[], yticks=[])
    return figure


def draw_poly() -> plt.Figure:
    """The weights of a table; and those of one skill in training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9))
    table = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) * 2
    router = tr.PolyRouter(6, 4).eval()
    router.weight.data = table
    weights = router(torch.zeros(4, 1), task_ids=torch.arange(4)).weights.detach()
    left.imshow(weights, cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
    for (task, skill), weight in zip(
        torch.cartesian_prod(torch.arange(4), torch.arange(6)).tolist(), weights.flatten()
    ):
        left.text(skill, task, f"{weight:.2f}", ha="center", va="center", fontsize=7.5)
    left.set(title="weights of four tasks", xlabel="skill", ylabel="task", yticks=range(4))
    router = tr.PolyRouter(2, 3)
    router.weight.data = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    tasks = torch.arange(3).repeat_interleave(20000)
    weights = router(torch.zeros(len(tasks), 1), task_ids=tasks, seed=1).weights[:, 0].detach()
    for task, color in enumerate([GREY, BLUE, ORANGE]):
        label = f"logit {router.weight[task, 0]:.0f}"
        right.hist(weights[tasks == task], 50, histtype="step", color=color, label=label)
    right.set(title="weight of one of two skills in training", xlabel="weight", yticks=[])
    right.legend(frameon=False, fontsize=8)
    return figure


def draw_rank() -> plt.Figure:
    """A projection; and which of its rows one token keeps."""
    torch.manual_seed(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), width_ratios=[1.4, 1])
    router = tr.RankRouter(24, 8, 2)
    left.imshow(router.projection, cmap="PuOr", vmin=-0.3, vmax=0.3, aspect="auto")
    left.set(title="the projection $A$", xlabel="feature", ylabel="rank", yticks=range(8))
    routing = router(torch.randn(1, 24))
    kept = routing.indices[0].tolist()
    right.bar(range(8), routing.logits[0], color=[BLUE if e in kept else GREY for e in range(8)])
    right.axhline(0, color="black", linewidth=0.6)
    right.set(title="$z = A x$, the two kept", xlabel="rank", xticks=range(8))
    return figure


def _grid(axes: plt.Axes, rows: int, columns: int) -> None:
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_xticks([x + 0.5 for x in range(columns)], range(columns))
    axes.set_yticks([y + 0.5 for y in range(rows)], range(rows))
    axes.tick_params(length=0)
    for x in range(1, columns):
        axes.axvline(x, color=GREY, linewidth=0.5)
    for y in range(1, rows):
        axes.axhline(y, color=GREY, linewidth=0.5)


def main() -> None:
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "svg.hashsalt": "torch-routers"})
    IMAGES.mkdir(exist_ok=True)
    for draw in (
        draw_topk,
        draw_hash,
        draw_recurrent,
        draw_smear,
        draw_entropy,
        draw_adaptive_k,
        draw_entmax,
        draw_relu,
        draw_soft,
        draw_prototype,
        draw_poly,
        draw_rank,
    ):
        figure = draw()
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        path = IMAGES / f"{draw.__name__.removeprefix('draw_')}.svg"
        figure.savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
