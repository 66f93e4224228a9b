"""A step of the recurrent router's cell, products included, against `torch.nn.GRUCell`."""

from collections.abc import Iterator

import torch
from torch import nn

import torch_routers as tr

from .harness import TOKENS, Options, Row

SIZE = 128


def rows(options: Options) -> Iterator[Row]:
    cell, theirs = tr.RecurrentCell(SIZE), nn.GRUCell(SIZE, SIZE)
    theirs.load_state_dict(cell.state_dict())

    def plain(u, state):
        a, b = (
            nn.functional.linear(x, weight, bias).unflatten(-1, (3, -1))
            for x, weight, bias in (
                (u, theirs.weight_ih, theirs.bias_ih),
                (state, theirs.weight_hh, theirs.bias_hh),
            )
        )
        reset, update = (a[:, :2] + b[:, :2]).sigmoid().unbind(1)
        candidate = (a[:, 2] + reset * b[:, 2]).tanh()
        return (candidate + update * (state - candidate),)

    for tokens in TOKENS[1::2] if options.quick else TOKENS:
        for backward in False, True:
            direction = "forward+backward" if backward else "forward"
            yield Row(
                name=f"gru_cell {direction} q={SIZE} T={tokens}",
                inputs=lambda t=tokens: (torch.randn(t, SIZE), torch.randn(t, SIZE).tanh()),
                ours=lambda u, state: (cell(u, state),),
                baselines={"GRUCell": lambda u, state: (theirs(u, state),), "plain": plain},
                compiled={"plain": plain},
                backward=backward,
                tolerance=1e-5,
            )
