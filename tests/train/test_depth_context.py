"""The depth context computes what a mask over (layer, position) means, and nothing more."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import reference
from families import CONFIGS, tiny_model
from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.errors import InvalidInput, InvalidPlan, UnsupportedArchitecture
from shoal.train.depth_context import decoder_layers, depth_context

P = 4
PLANS = [
    DepthPlan((ALWAYS,) * 4),
    DepthPlan((ALWAYS, 0, 2, ALWAYS)),
    DepthPlan((ALWAYS, 1, 3, 6)),
    DepthPlan((1, ALWAYS, 0, 5)),
    DepthPlan((ALWAYS, 0, 2, ALWAYS), prompt_layers=(0, 2, 3)),
    DepthPlan((0, 0, 0, ALWAYS), prompt_layers=(3,)),
]


def checkpoint(model: nn.Module) -> None:
    """Switch gradient checkpointing on, under the old or the new name that transformers gives it."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def four_layers(family: str) -> transformers.PreTrainedModel:
    """A tiny random model; families differ in their own number of layers. Dropout is off, also in training mode."""
    model = tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows; prompts of 4, 2, 3 tokens padded on the left to P = 4, completions of 5, 6, 2 on the right to 6 columns."""
    ids = torch.randint(250, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 10, dtype=torch.long)
    for row, (prompt, completion) in enumerate([(4, 5), (2, 6), (3, 2)]):
        mask[row, 4 - prompt : 4 + completion] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def row_of(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], int]:
    """(tokens, prompt tokens) of a row, without its padding."""
    kept = batch["attention_mask"][row].bool()
    return batch["input_ids"][row][kept].tolist(), int(kept[:P].sum())


def expected_logits(model: nn.Module, batch: dict[str, torch.Tensor], plan: DepthPlan) -> list[torch.Tensor]:
    """The reference's logits of each row alone."""
    rows = []
    for row in range(len(batch["input_ids"])):
        token_ids, prompt_tokens = row_of(batch, row)
        schedule = reference.from_cutoffs([float(c) for c in plan.cutoffs])
        ran = reference.ran_table(plan.num_layers, prompt_tokens, len(token_ids), schedule, plan.prompt_layers)
        rows.append(reference.logits(model, token_ids, ran))
    return rows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("plan", PLANS)
def test_logits_of_a_ragged_batch_equal_the_reference(family, batch, plan, attention):
    model = four_layers(family)
    expected = expected_logits(model, batch, plan)
    model.set_attn_implementation(attention)
    with depth_context(model, plan, prompt_columns=P), torch.no_grad():
        found = model(**batch).logits
    for row, logits in enumerate(expected):
        assert logits.std() > 0.1
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row, real], logits, rtol=1e-4, atol=1e-4)


def test_unpadded_batch_without_mask(family):
    """Without padding transformers passes no mask at all to sdpa."""
    model, plan = four_layers(family), DepthPlan((ALWAYS, 0, 2, ALWAYS))
    batch = {"input_ids": torch.arange(20).reshape(2, 10), "attention_mask": torch.ones(2, 10)}
    expected = torch.stack(expected_logits(model, batch, plan))
    with depth_context(model, plan, prompt_columns=P), torch.no_grad():
        torch.testing.assert_close(model(batch["input_ids"]).logits, expected, rtol=1e-4, atol=1e-4)


def test_columns_past_the_cutoff_are_not_computed(family, batch):
    model = four_layers(family)
    plan = DepthPlan((ALWAYS, 0, 2, 5))
    seen = []
    norms = [next(m for m in layer.modules() if "Norm" in type(m).__name__) for layer in decoder_layers(model)]
    hooks = [norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])) for norm in norms]
    with depth_context(model, plan, prompt_columns=P), torch.no_grad():
        model(**batch)
    assert seen == [10, P, P + 2, P + 5]
    seen.clear()
    with (
        depth_context(model, DepthPlan((ALWAYS, 0, 2, 5), prompt_layers=(0, 2, 3)), prompt_columns=P),
        torch.no_grad(),
    ):
        model(**batch)
    assert seen == [10, P + 2, P + 5]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_exactly_the_layers_that_ran(family, batch, checkpointing):
    model = four_layers(family).train()
    if checkpointing:
        checkpoint(model)
    plan = DepthPlan((ALWAYS, 0, 2, ALWAYS), prompt_layers=(0, 2, 3))
    with depth_context(model, plan, prompt_columns=P):
        model(**batch).logits[batch["attention_mask"].bool()].square().mean().backward()
    for index, layer in enumerate(decoder_layers(model)):
        gradients = [p.grad for p in layer.parameters()]
        if index == 1:
            assert all(g is None for g in gradients)
        else:
            assert all(g is not None and g.isfinite().all() for g in gradients)
            assert any(g.abs().max() > 0 for g in gradients)


def test_checkpointing_does_not_change_gradients(batch):
    gradients = []
    for checkpointing in (False, True):
        model = four_layers("llama").train()
        if checkpointing:
            checkpoint(model)
        with depth_context(model, DepthPlan((ALWAYS, 0, 2, ALWAYS)), prompt_columns=P):
            model(**batch).logits[batch["attention_mask"].bool()].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_model_is_restored_even_after_an_error(batch):
    model = four_layers("opt")
    own = decoder_layers(model)[0]
    own.forward = own_forward = type(own).forward.__get__(own)  # as accelerate's hooks do
    with torch.no_grad():
        before = model(**batch).logits
        with pytest.raises(InvalidInput, match="past_key_values"), depth_context(model, PLANS[1], prompt_columns=P):
            model(**batch, past_key_values="a cache")
        assert torch.equal(model(**batch).logits, before)
    assert decoder_layers(model)[0].forward is own_forward
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model)[1:])
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_peft_model(batch):
    peft = pytest.importorskip("peft", reason="peft comes with the extra 'train'")
    plain = four_layers("llama")
    adapted = peft.get_peft_model(
        four_layers("llama"), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        with depth_context(plain, PLANS[1], prompt_columns=P):
            expected = plain(**batch).logits
        with depth_context(adapted, PLANS[1], prompt_columns=P):
            # A new adapter adds nothing yet.
            torch.testing.assert_close(adapted(**batch).logits, expected)


def test_layers_whose_class_was_derived(batch):
    """FSDP2 turns the class of a layer into a subclass of it."""
    model, plan = four_layers("gpt2"), PLANS[1]
    with torch.no_grad():
        with depth_context(model, plan, prompt_columns=P):
            expected = model(**batch).logits
        for layer in decoder_layers(model):
            layer.__class__ = type("FSDP" + type(layer).__name__, (type(layer),), {})
        with depth_context(model, plan, prompt_columns=P):
            assert torch.equal(model(**batch).logits, expected)


def test_generate_without_cache_runs_the_plan(batch):
    """`generate` recomputes the prefix at every step; the plan's cutoffs make that exact."""
    model = four_layers("gpt2")
    plan = DepthPlan((ALWAYS, 0, 2, ALWAYS))
    prompt = {"input_ids": batch["input_ids"][:1, :P], "attention_mask": torch.ones(1, P, dtype=torch.long)}
    with depth_context(model, plan, prompt_columns=P), torch.no_grad():
        ids = model.generate(
            **prompt, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0, eos_token_id=None
        )
        logits = model(input_ids=ids).logits
    assert ids[0, P:].tolist() == logits[0, P - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "gap|padding"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1]])}, "padding"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 0]])}, "padding"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "batch, columns"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "packed"),
        ({"past_key_values": "a cache"}, "past_key_values"),
    ],
)
def test_packed_rows_and_caches_are_refused(change, message):
    model = four_layers("llama")
    inputs = {"input_ids": torch.arange(6)[None], **change}
    with depth_context(model, PLANS[1], prompt_columns=2), pytest.raises(InvalidInput, match=message):
        model(**inputs)


def test_unknown_mask_format_is_refused():
    from shoal.train.depth_context import cut

    with pytest.raises(InvalidInput, match="attention_mask given as object"):
        cut("attention_mask", object(), 3, 6)
    with pytest.raises(InvalidInput, match="cu_seq_lens_q"):
        cut("cu_seq_lens_q", torch.tensor([0, 3, 6]), 3, 6)
    assert cut("attention_mask", torch.ones(2, 6), 3, 6).shape == (2, 3)  # flash attention


def test_plan_of_another_model_is_refused():
    with (
        pytest.raises(InvalidPlan, match="3 layers, the model has 4"),
        depth_context(four_layers("opt"), DepthPlan((ALWAYS,) * 3), prompt_columns=P),
    ):
        pass
    with pytest.raises(UnsupportedArchitecture, match="Qwen3"):
        decoder_layers(nn.Linear(2, 2))
