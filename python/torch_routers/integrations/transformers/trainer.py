"""The Trainer of Transformers: losses of routers reach its objective, in the right proportion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from torch_routers.delivery import Attached
from torch_routers.integrations.window import Window


class RoutingCallback(TrainerCallback):
    """Log the `summary` of every n-th optimiser step, and balance the routers.

    What is logged is of all tokens of the step: of all its micro-batches, on all ranks. Other steps
    are not looked at. Looking is no destination for losses; inside a compiled checkpoint it fails
    as `collect` does.

    Args:
        log_every: optimiser steps from one summary to the next; the steps are numbered from 1, as
            those that the Trainer logs.
        controller: of loss-free balancing. Its ``step()`` is called before each step of the
            optimiser, when the backward passes of all micro-batches are done. Make it when the
            model is on its device: after the Trainer.
        log: what is given the values as a dict. Default: they are appended to
            ``state.log_history`` alone. ``trainer.log`` hands them on to all that the Trainer
            reports to.

    A training that ends by an error may leave the callback looking: call `stop`.

    Raises:
        ValueError: ``log_every`` is less than 1; at the start, a model without routers.
    """

    def __init__(
        self,
        log_every: int = 10,
        controller: Any = None,
        *,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"RoutingCallback: expected log_every >= 1, got {log_every}")
        self.log_every, self.controller, self.log = log_every, controller, log
        self._window: Window | None = None

    def stop(self) -> None:
        """Look at no step any more, until the next training."""
        if self._window is not None:
            self._window.stop()
        self._window = None

    def on_train_begin(self, args, state, control, *, model, **kwargs) -> None:
        self.stop()
        self._window = Window(model)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if (state.global_step + 1) % self.log_every == 0:
            self._window.begin()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if self._window.looks:
            self._window.end()
            self._window.begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.controller is not None:
            self.controller.step()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self._window.looks:
            return
        self._window.end()
        values = self._window.read()
        if self.log is None:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            return
        wanted = control.should_log  # of the Trainer's own values, which are yet to come
        self.log(values)
        control.should_log = wanted

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()


class AttachedToLoss(Attached):
    """What `attach_to_loss` gives: `Attached`, called by a hook of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model_names = tuple(inspect.signature(model.forward).parameters)
        self._handle = model.register_forward_hook(self._after_forward, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()
        super().remove()

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, outputs: Any) -> Any:
        """The hook; a method, so that it is copied with the model."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if loss is None:
            if model.training:  # what an earlier call has learnt is not of this one
                self.scale.fill_(torch.nan)
            return outputs
        inputs = {**dict(zip(self._model_names, args)), **kwargs}
        outputs["loss"] = self(loss, share=_share(model, inputs, inputs.get("num_items_in_batch")))
        return outputs


def attach_to_loss(model: nn.Module) -> AttachedToLoss:
    r"""Deliver the losses of the model's routers by the ``loss`` that the model returns.

    For a training loop that is not yours, such as that of the Trainer, which takes
    ``outputs.loss`` to its end: a hook puts `Attached` around it, and no ``compute_loss`` is
    needed.

    .. math::  \nabla \Big( \sum_i \mathrm{CE}_i
               + \sum_i \frac{n_i}{n} \sum_\mathrm{router} \mathrm{aux}_i \Big)

    where the micro-batches :math:`i` of a step have :math:`n_i` of its :math:`n` labels. The
    Trainer divides the cross-entropy by :math:`n` inside the model (``num_items_in_batch``), hence
    the losses of routers, which are means, are multiplied by the share here; what multiplies the
    loss afterwards (number of ranks, accumulation, loss scaling) is learnt in backward. A model
    that is not given ``num_items_in_batch`` returns a mean, and its share is 1.

    The value of ``outputs.loss`` does not change: what the Trainer logs is the task's loss.

    Where ``outputs.loss`` is not what is trained (label smoothing, ``compute_loss_func``, the
    trainers of TRL) nothing is learnt: the scale is NaN, and so are all gradients of routers. Use
    `attach_to_trainer` there.

    Args:
        model: returns a dict with ``loss``, as models of Transformers do; on its device already.
            Call this after the Trainer is made, which moves it, and before ``torch.compile``.

    Returns:
        `Attached`, with ``remove()``.

    Raises:
        ValueError: the model has no router, or its losses are attached already.
    """
    return AttachedToLoss(model)


class AttachedToTrainer(Attached):
    """What `attach_to_trainer` gives: `Attached`, called on what ``compute_loss`` returns."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.model)
        self._trainer, self._compute_loss = trainer, trainer.compute_loss
        trainer.compute_loss = self._attached_loss

    def remove(self) -> None:
        self._trainer.compute_loss = self._compute_loss
        super().remove()

    def _attached_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        share = share_of_step(self._trainer, inputs, num_items_in_batch)
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        result = self._compute_loss(model, inputs, **options)
        if return_outputs:
            return self(result[0], share=share), *result[1:]
        return self(result, share=share)


def attach_to_trainer(trainer: Any) -> AttachedToTrainer:
    """Deliver the losses of the routers by the loss that a trainer's ``compute_loss`` returns.

    For whatever a Trainer of Transformers trains: with label smoothing or a ``compute_loss_func``,
    and in subclasses such as those of TRL, which make their own loss of what the model returns. The
    proportion is that of `attach_to_loss`, by `share_of_step`.

    Args:
        trainer: the Trainer; its method is replaced.

    Returns:
        `Attached`, with ``remove()``.

    Raises:
        ValueError: the model has no router, or its losses are attached already.
    """
    return AttachedToTrainer(trainer)


def share_of_step(
    trainer: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
) -> Tensor | float:
    """What to multiply losses of routers by, before they are added to that of ``compute_loss``.

    That is the part of the step's labels that the micro-batch has, times the number of ranks where
    the Trainer multiplies by that (``average_tokens_across_devices``); 1 where the Trainer's loss
    is a mean.

    Args:
        trainer: the Trainer.
        inputs, num_items_in_batch: what its ``compute_loss`` is given. Ask before you hand them on:
            with label smoothing the Trainer takes the labels out.

    Returns:
        A scalar, on the device of the labels. Nothing waits for it.
    """
    divides = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    items = num_items_in_batch if divides else None
    share = _share(trainer.model, inputs, items)
    if items is None or not trainer.args.average_tokens_across_devices:
        return share
    return share * (trainer.accelerator.num_processes // trainer.get_tp_size())


def _share(model: nn.Module, inputs: Mapping[str, Any], items: Tensor | int | None) -> Any:
    """The part of a step's items that a micro-batch has; they are counted as its loss does."""
    if items is None:
        return 1.0
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs["labels"]
        labels = labels[..., 1:] if _shifts_labels(model) else labels
    return labels.ne(-100).sum() / items


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the first label of a row is of no prediction."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    is_causal = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return is_causal and not getattr(config, "is_encoder_decoder", False)
