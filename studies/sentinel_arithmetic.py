"""The sentinel on arithmetic of growing size: slices from what a small network has learnt well to what it has hardly seen.

    python studies/sentinel_arithmetic.py --save

A Llama of 3 layers and width 128 over characters learns additions, subtractions and sums of digits, the answer's last digit first,
from random ones; longer numbers are rarer in training. The slices were fixed before any of their answers was seen: `add 2` to
`add 6` and `sub 2` to `sub 6` by number of digits, `terms 3` to `terms 8`, 250 prompts each, none of them trained on. `--longer`
asks the same network for `terms 9` to `terms 14` as well, sums longer than any in training: with the same --work the training is
done already. What is asked of the sentinel is in `sentinel.py`. No data is needed; an hour on one core, and an interrupted training
goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sentinel import TEMPERATURES, answer, describe, draw, measure, traces_file
from sentinel_tasks import Item, draw_terms
from shoal import Engine
from shoal.errors import ShoalError
from shoal.files import replaced
from study import RESULTS, open_work, parser, save, write_json

CHARACTERS = "0123456789+-="
END = "<|end|>"
LAYERS, WIDTH, HEADS, FFN = 3, 128, 4, 384
BATCH, LEARNING_RATE = 256, 2e-3
DIGITS = {1: 0.08, 2: 0.25, 3: 0.27, 4: 0.22, 5: 0.13, 6: 0.05}
"""How often numbers of so many digits are trained on."""
TERMS = {2: 0.2, 3: 0.25, 4: 0.2, 5: 0.14, 6: 0.1, 7: 0.07, 8: 0.04}
SLICES = {"add": range(2, 7), "sub": range(2, 7), "terms": range(3, 9)}
PER_SLICE = 250
SAVE_EVERY = 250


def draw_one(rng: random.Random, kind: str, size: int) -> tuple[str, str]:
    """A prompt of a kind and its answer, last digit first.

    >>> draw_one(random.Random(0), "add", 2)
    ('59+63=', '221')
    """
    if kind == "terms":
        prompt, value = draw_terms(size, rng)
        return prompt, value[::-1]
    low = 10 ** (size - 1) if size > 1 else 0
    a, b = (rng.randrange(low, 10**size) for _ in range(2))
    if kind == "add":
        return f"{a}+{b}=", str(a + b)[::-1]
    return f"{max(a, b)}-{min(a, b)}=", str(abs(a - b))[::-1]


def slices(count: int, kinds: Mapping[str, range] = SLICES) -> dict[str, list[Item]]:
    """What is asked; a slice is the same whichever stand after it."""
    rng, found = random.Random("slices"), {}
    for kind, sizes in kinds.items():
        for size in sizes:
            drawn: dict[str, str] = {}
            while len(drawn) < count:
                prompt, answer = draw_one(rng, kind, size)
                drawn[prompt] = answer
            found[f"{kind} {size}"] = [
                Item(prompt, lambda text, right=right: text.strip() == right)  # type: ignore[misc]
                for prompt, right in drawn.items()
            ]
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character."""
    vocab = {one: place for place, one in enumerate([END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def train(work: Path, steps: int, held_out: set[str]) -> None:
    """The network, unless it is there."""
    if (work / "training.json").is_file():
        return
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 1, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=FFN, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    rng, tokens, done = random.Random("training"), 0, 0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.is_file():
        kept = torch.load(checkpoint, weights_only=False)
        done, tokens = kept["step"], kept["tokens"]
        rng.setstate(kept["rng"])
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(kept[name])  # type: ignore[attr-defined]
    for step in range(done + 1, steps + 1):
        pairs = []
        while len(pairs) < BATCH:
            kind = rng.choice(("add", "sub", "terms"))
            sizes = TERMS if kind == "terms" else DIGITS
            one = draw_one(rng, kind, rng.choices(list(sizes), list(sizes.values()))[0])
            if one[0] not in held_out:
                pairs.append(one)
        rows = [[*tokenizer.encode(prompt), *tokenizer.encode(text), 0] for prompt, text in pairs]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = torch.full_like(ids, -100)
        for place, ((prompt, _), row) in enumerate(zip(pairs, rows, strict=True)):
            labels[place, len(prompt) : len(row)] = ids[place, len(prompt) : len(row)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(map(len, rows))
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
        if step % SAVE_EVERY == 0:
            with replaced(checkpoint) as partial:
                torch.save(
                    {
                        "step": step, "tokens": tokens, "rng": rng.getstate(), "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                    },
                    partial,
                )  # fmt: skip
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    write_json(work / "training.json", {"steps": steps, "tokens": tokens, "parameters": model.num_parameters()})


def run(options: argparse.Namespace) -> None:
    """Training, answers, and what the sentinel makes of them."""
    torch.set_num_threads(options.threads)
    work: Path = options.work
    steps, count = (4, 3) if options.quick else (options.steps, PER_SLICE)
    open_work(work, {"steps": steps, "quick": options.quick})
    trained_without, part = slices(count), ""
    asked = trained_without
    if options.longer:
        asked, part = slices(count, {**SLICES, "terms": range(3, 15)}), "-longer"
    train(work, steps, {item.prompt for items in trained_without.values() for item in items})
    engine = Engine.from_pretrained(work / "model", dtype="float32", max_batch=64, cache_gib=1)
    for temperature in TEMPERATURES:
        if not traces_file(work, temperature, part).is_file():
            answer(engine, asked, temperature, traces_file(work, temperature, part))
    if options.quick:
        return
    result, name = measure(work, part), "sentinel_arithmetic" + part.replace("-", "_")
    print(describe(result))
    draw(result, work / f"sentinel{part}.svg")
    if options.save:
        save(name, result)
        draw(result, RESULTS / f"{name}.svg")
    print(json.dumps({"study": name, **result}))


def main() -> None:
    options = parser(__doc__, work="sentinel_arithmetic")
    options.add_argument("--steps", type=int, default=8000)
    options.add_argument("--longer", action="store_true", help="further slices: sums longer than those in training")
    try:
        run(options.parse_args())
    except ShoalError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
