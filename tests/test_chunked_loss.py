"""The loss in chunks: the same value and gradients as transformers' own, without the logits."""

from typing import Any

import pytest
import torch

from autotune.engine.batches import IGNORED
from autotune.engine.loss import chunk_loss
from autotune.errors import ConfigError

VOCABULARY, HIDDEN = 509, 32


def llama(**changes: Any) -> Any:  # noqa: ANN401 - keys of a config, a model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    return LlamaForCausalLM(config)


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    trained = torch.rand((rows, length), generator=generator) < 0.6
    trained[:, -1] = True
    return {"input_ids": ids, "labels": ids.where(trained, IGNORED)}


def step(model: Any, **inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:  # noqa: ANN401
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return float(loss.detach()), {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(1, 2), (1, 7), (3, 50), (2, 129)])
@pytest.mark.parametrize("items", [None, 37])
def test_loss_and_gradients_are_those_of_the_whole(
    rows: int, length: int, items: int | None, *, tied: bool
) -> None:
    model, inputs = llama(tie_word_embeddings=tied), batch(rows, length)
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    whole, gradients = step(model, **inputs)
    chunk_loss(model)
    chunked, chunked_gradients = step(model, **inputs)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert chunked_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_frozen_head_with_a_bias_and_a_loss_that_is_only_looked_at() -> None:
    model, inputs = llama(), batch(3, 40)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    model.lm_head.weight.requires_grad_(requires_grad=False)
    whole, gradients = step(model, **inputs)
    chunk_loss(model)
    chunked, chunked_gradients = step(model, **inputs)
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert "lm_head.weight" not in chunked_gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert float(model(**inputs).loss) == pytest.approx(whole, rel=1e-6)


def test_a_row_without_a_trained_token_has_no_loss() -> None:
    model, inputs = llama(), batch(1, 9)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    chunk_loss(model)
    loss, gradients = step(model, **inputs, num_items_in_batch=torch.tensor(5))
    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients.values())


def test_logits_that_are_capped_or_scaled_are_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**small)),
        CohereForCausalLM(CohereConfig(**small)),
    ):
        chunk_loss(model)
        with pytest.raises(ConfigError, match="loss=whole"):
            model(**batch(1, 9))


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = llama()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ConfigError, match="loss=whole"):
        chunk_loss(model)
