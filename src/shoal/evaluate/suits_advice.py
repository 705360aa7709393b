"""From the numbers of `suits` to two sentences, by rules that anyone can check.

A depth is *kept* by a policy if at least 90% of tokens stay the same and the loss rises by at most 0.05 nats (5% of perplexity).
Both, because either alone misleads: on text that people wrote the most probable word may change while the text is predicted as
well as before, and on text that the model predicts badly the loss may fall while the model falls apart.

| shallowest realised depth that is kept | first sentence |
|---|---|
| at most 2/3 | much to skip as it is |
| between 2/3 and 1 | a little to skip as it is; tune to go further |
| none | little to skip without tuning; tune first |

The second sentence is about layers: one is *idle* where it changes the states of generated tokens by less than 10% (`LayerChange`).
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.evaluate.suits import Outcome, Suitability

KEPT_AGREEMENT = 0.9
"""Least share of unchanged tokens at which a depth counts as kept."""
KEPT_LOSS = 0.05
"""Largest rise of the loss, in nats per token, at which a depth counts as kept."""
MUCH = 2 / 3
"""Realised depth down to which a model must be kept to have much to skip."""
IDLE_CHANGE = 0.1
"""Relative change of a generated token's state below which a layer is idle."""


def advice(found: Suitability) -> str:
    """What the numbers say, in two sentences; three where the checkpoint was tuned for depth already."""
    sentences = [about_depth(found), about_layers(found)]
    if found.tuned is not None:
        depths = ", ".join(f"{depth:.2g}" for depth in found.tuned.depths)
        sentences.append(
            f"It was tuned with {found.tuned.policy} for depths {depths}, so these are not numbers of an untuned model."
        )
    return " ".join(sentences)


def about_depth(found: Suitability) -> str:
    """How far the model can be cut as it is."""
    skipping = [outcome for outcome in found.outcomes if outcome.realised_depth < 1]
    kept = [o for o in skipping if o.agreement.value >= KEPT_AGREEMENT and o.loss_increase.value <= KEPT_LOSS]
    if kept:
        shallowest = min(kept, key=lambda o: (o.realised_depth, -o.agreement.value))
        much = shallowest.realised_depth <= MUCH + 1e-9
        return (
            f"{found.model} has {'much' if much else 'a little'} to skip as it is: {described(shallowest)}"
            f"{'.' if much else '; tune it to go further.'}"
        )
    if not skipping:
        return f"{found.model} has too few layers for these depths: every plan runs all of them on completions of this length."
    best = max(skipping, key=lambda o: (o.depth, o.agreement.value, -o.loss_increase.value))
    return f"{found.model} leaves little to skip without tuning: {described(best)}, and that is the best policy there; tune first."


def described(outcome: Outcome) -> str:
    """An outcome in words."""
    return (
        f"at {outcome.realised_depth:.0%} of its layers ({outcome.policy}, depth {outcome.depth:.2g}) it agrees with itself on "
        f"{outcome.agreement.value:.0%} of tokens and its loss changes by {outcome.loss_increase.value:+.2f} nats"
    )


def about_layers(found: Suitability) -> str:
    """How many layers are idle."""
    changes = [layer.completion_change for layer in found.layers]
    idle = [layer for layer, change in enumerate(changes) if change < IDLE_CHANGE]
    if idle:
        return (
            f"{len(idle)} of {found.num_layers} layers ({intervals(idle)}) change generated tokens' states by less than "
            f"{IDLE_CHANGE:.0%}."
        )
    least = min(range(len(changes)), key=changes.__getitem__)
    return (
        f"No layer is idle (the least active, {least}, changes generated tokens' states by {changes[least]:.0%}), "
        "as newer models tend to be: they leave less to skip."
    )


def intervals(numbers: Sequence[int]) -> str:
    """Ascending whole numbers, neighbours drawn together.

    >>> intervals([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    first = [number for number in numbers if number - 1 not in numbers]
    last = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in zip(first, last, strict=True))
