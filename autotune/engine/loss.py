"""The loss of a causal language model without its logits: they are made a share of them at a time.

Logits are as wide as the vocabulary, in the compute type and again in fp32 with their gradients,
and so often the largest tensors of a step. Here the head makes those of an eighth of the tokens,
and takes loss and gradients from them before it makes the next (as Liger's fused linear
cross-entropy does, arXiv:2410.10989, in a kernel of its own). Nothing is computed twice.
"""

import weakref
from typing import Any

import torch
from torch.nn import functional

from autotune.engine.batches import IGNORED
from autotune.errors import ConfigError

_CHUNKS = 8
"""Few enough that products stay large, and the logits are a small part of a step by then."""

Tensor = torch.Tensor


def chunk_loss(model: Any) -> None:  # noqa: ANN401 - PreTrainedModel
    """Have a model take its loss in chunks; its output has no logits any more.

    The value is that of transformers' ForCausalLMLoss, summed in another order.

    Raises:
        ConfigError: its head is no linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        msg = (
            f"the head of {type(model).__name__} is no plain linear layer, which a chunked loss "
            "needs: use loss=whole"
        )
        raise ConfigError(msg)
    # The head is called twice: by the model, to no effect, and by the loss with the labels. Both
    # calls are the module's own, as ZeRO 3 gathers the weight for those.
    forward = _Head(head)
    head.forward = forward  # type: ignore[assignment] # torch: a forward of one argument
    model.loss_function = _Loss(head, forward)


class _Head:
    """The head's forward: its input as it is, or with labels the sum of their losses."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self._head = head
        self._given: weakref.ref[torch.UntypedStorage] | None = None

    def gave(self, logits: Tensor) -> bool:
        """Tell whether these are what was returned in place of logits, unchanged since."""
        return self._given is not None and self._given() is logits.untyped_storage()

    def __call__(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            self._given = weakref.ref(hidden.untyped_storage())
            return hidden
        weight, bias = self._head.weight, self._head.bias
        flat = hidden.reshape(-1, hidden.shape[-1])
        trains = torch.is_grad_enabled()
        total: Tensor = _SummedLoss.apply(flat, weight, bias, labels.reshape(-1), trains)  # type: ignore[no-untyped-call] # torch
        return total


class _Loss:
    """Stands in for ForCausalLMLoss of transformers' loss_utils.py, whose arguments it takes."""

    def __init__(self, head: torch.nn.Linear, forward: _Head) -> None:
        self._head = head
        self._forward = forward

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,  # noqa: ANN401 - what other losses take
    ) -> Tensor:
        """Return the loss; `logits` are what the head was given.

        Raises:
            ConfigError: the model changes its logits on the way to the loss.
        """
        if not self._forward.gave(logits) or self._head.out_features != vocab_size:
            msg = (
                "the model changes its logits on the way to the loss (as by scaling or capping), "
                "which a chunked loss leaves out: use loss=whole"
            )
            raise ConfigError(msg)
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(logits.device)
        total: Tensor = self._head(logits, shift_labels)
        count = (shift_labels != ignore_index).sum()
        return total / (count if num_items_in_batch is None else num_items_in_batch)


class _SummedLoss(torch.autograd.Function):
    """The sum of the losses of tokens, whose gradients are taken as it is made.

    A loss is the last of a forward pass, so that its gradients are wanted next in any case.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        trains: bool,  # noqa: FBT001 - apply takes no names
    ) -> Tensor:
        """Return the sum.

        Shapes are [tokens, hidden], [vocabulary, hidden], [vocabulary] and [tokens].
        `trains` says whether gradients are wanted at all.
        """
        wanted = [trains and needed for needed in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros_like(tensor) if want and tensor is not None else None
            for want, tensor in zip(wanted, (hidden, weight, bias), strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = -(-len(hidden) // _CHUNKS)
        of_hidden, of_weight, of_bias = gradients
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, of_logits = _of_chunk(hidden[part], weight, bias, labels[part], any(wanted))
            total += loss
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[part])
            if of_weight is not None:
                torch.addmm(of_weight, of_logits.T, hidden[part], out=of_weight)
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of hidden states, weight and bias, scaled by that of the sum."""
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [one if one is None else one.mul_(of_total) for one in gradients]
        return (*scaled, None, None)


def _of_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    differentiate: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of some tokens, and its gradient in their logits if that is wanted."""
    logits = functional.linear(hidden, weight, bias).float()
    logs = functional.log_softmax(logits, dim=-1)
    del logits
    loss = functional.nll_loss(logs, labels, ignore_index=IGNORED, reduction="sum")
    if not differentiate:
        return loss, logs
    ignored = (labels == IGNORED)[:, None]
    # Probabilities, less one where the label is.
    of_logits = logs.exp_()
    places = labels[:, None].masked_fill(ignored, 0)
    of_logits.scatter_add_(1, places, torch.full_like(places, -1, dtype=of_logits.dtype))
    return loss, of_logits.masked_fill_(ignored, 0.0).to(hidden.dtype)
