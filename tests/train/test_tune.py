"""Tuning end to end on a 2-layer model: the checkpoint, resuming, LoRA, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from shoal.cli.tune import tune as tune_command
from shoal.depth.checkpoint import TunedDepth
from shoal.depth.policies import POLICIES
from shoal.errors import CheckpointError, InvalidInput, InvalidPlan, MissingExtra, PickledCheckpoint, TuningDiverged
from shoal.train.config import TuneConfig
from shoal.train.data import IGNORED, LengthGrouped, collate, read_examples
from shoal.train.distill import READ, divergence
from shoal.train.state import newest_checkpoint
from shoal.train.tune import tune

pytestmark = [
    # transformers' own renaming of checkpointing, seen through accelerate and peft
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per letter."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 3-layer checkpoint and, beside it, data: the completion repeats the prompt's last letter."""
    home = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=29, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=32, dropout=0.1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    with (home / "data.jsonl").open("w", encoding="utf-8") as file:
        for i in range(120):
            letters = [LETTERS[(i * k) % 26] for k in range(1, 3 + i % 4)]
            row = {"prompt": " ".join(letters), "completion": " ".join(letters[-1:] * (1 + i % 5))}
            file.write(json.dumps(row) + "\n")
    return home


CONFIG = TuneConfig(depths=(1.0, 2 / 3), epochs=2, batch_size=16, learning_rate=1e-2, save_every=3)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def tokens_read(data: Path) -> int:
    """Tokens in the batches of `CONFIG`, counted from their masks."""
    examples = read_examples(data, make_tokenizer(), max_positions=32)
    order, total = LengthGrouped(examples, batch_size=16, seed=0), 0
    for epoch in range(2):
        order.set_epoch(epoch)
        places = list(order)
        for first in range(0, len(places), 16):
            batch = collate([examples[place] for place in places[first : first + 16]], pad_token_id=0)
            total += int(batch["attention_mask"].sum())
    return total


@pytest.fixture(scope="module")
def tuned(start: Path) -> Path:
    """The uninterrupted run."""
    losses = []
    report = tune(
        str(start / "model"),
        start / "data.jsonl",
        start / "tuned",
        CONFIG,
        report=lambda step, num_steps, loss: losses.append((step, num_steps, loss)),
    )
    assert report.num_examples == 120
    assert report.steps == 16
    assert 0 < report.final_loss < 5
    assert report.tokens == tokens_read(start / "data.jsonl")
    assert report.horizon == 4  # median of 2..6 tokens, the end-of-sequence token included
    return start / "tuned"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_result_is_an_ordinary_checkpoint_with_its_plan(tuned: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    assert model.config.num_hidden_layers == 3
    assert model.config.use_cache  # the Trainer switches it off
    assert tokenizer("a b")["input_ids"] == [3, 4]
    assert TunedDepth.load(tuned) == TunedDepth(horizon=4, warmup_layers=1, depths=(1.0, 2 / 3))
    assert not tuned.with_name("tuned.tuning").exists()
    assert not list(tuned.parent.glob(".tuned.*"))


def test_tuning_lowers_the_loss(start: Path, tmp_path: Path):
    losses = []
    config = TuneConfig(depths=(1.0, 2 / 3), epochs=12, batch_size=16, learning_rate=1e-2)
    tune(
        str(start / "model"), start / "data.jsonl", tmp_path / "out", config,
        report=lambda step, num_steps, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.7 * losses[0]


CHILD = """
import sys
from pathlib import Path
from shoal.train.config import TuneConfig
from shoal.train.tune import tune
home, output = Path(sys.argv[1]), Path(sys.argv[2])
tune(str(home / "model"), home / "data.jsonl", output, TuneConfig(**eval(sys.argv[3])))
"""


NEED = replace(CONFIG, depths=(1.0, 1 / 3, 2 / 3), warmup_layers=0, depth_sampling="need", distill=0.5)
"""Everything that a state must bring back: recent losses, and a teacher that is made anew."""


@pytest.mark.parametrize("config", [CONFIG, NEED], ids=["even", "need"])
def test_killed_run_resumes_to_the_same_weights(start: Path, tuned: Path, tmp_path: Path, config: TuneConfig):
    if config is not CONFIG:
        tuned = tmp_path / "whole"
        tune(str(start / "model"), start / "data.jsonl", tuned, config)
    output = tmp_path / "resumed"
    state = tmp_path / "resumed.tuning"
    command = [sys.executable, "-c", CHILD, str(start), str(output), repr(asdict(config))]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while newest_checkpoint(state) is None:
            assert child.poll() is None, "the run ended before its first checkpoint was seen"
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert not output.exists()

    with pytest.raises(InvalidInput, match="interrupted run"):
        tune(str(start / "model"), start / "data.jsonl", output, config)
    other = replace(config, seed=9)
    with pytest.raises(InvalidInput, match="another seed: 0 before, 9 now"):
        tune(str(start / "model"), start / "data.jsonl", output, other, resume=True)

    report = tune(str(start / "model"), start / "data.jsonl", output, config, resume=True)
    assert report.steps == 16
    expected, found = weights(tuned), weights(output)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_two_processes_share_a_batch(start: Path, tmp_path: Path):
    """As under `accelerate launch`, on CPUs: the same batches, so the weights of one process. Dropout draws per process."""
    shutil.copytree(start / "model", tmp_path / "model")
    shutil.copy(start / "data.jsonl", tmp_path)
    settings = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {"dropout": 0.0}), encoding="utf-8")
    config = replace(NEED, epochs=1, batch_size=12)
    child = tmp_path / "child.py"
    child.write_text(CHILD, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(child), str(tmp_path), str(tmp_path / "two"), repr(asdict(config))]
    subprocess.run(command, check=True, capture_output=True)
    tune(str(tmp_path / "model"), tmp_path / "data.jsonl", tmp_path / "one", config)
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in expected.items():
        if not name.endswith("k_proj.bias"):  # has no effect on attention, so its gradient is noise
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_one_process_on_several_gpus_is_refused(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(InvalidInput, match="2 GPUs: run `accelerate launch"):
        tune(str(start / "model"), start / "data.jsonl", tmp_path / "out", CONFIG)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidInput, match="batch_size 16 must be a multiple of accumulate x processes = 3"):
        tune(str(start / "model"), start / "data.jsonl", tmp_path / "out", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path):
    for step, whole in ((3, True), (6, True), (9, False), (12, None)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        if whole is not None:
            (directory / "trainer_state.json").write_text("{}" if whole else "", encoding="utf-8")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_lora_is_merged(start: Path, tmp_path: Path):
    pytest.importorskip("peft", reason="peft comes with the extra 'train'")
    config = TuneConfig(depths=(2 / 3,), batch_size=16, accumulate=2, learning_rate=1e-2, lora_rank=2)
    tune(str(start / "model"), start / "data.jsonl", tmp_path / "out", config)
    before, after = weights(start / "model"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj.weight" in name for name in changed)
    assert all(name.endswith("weight") and "layers" in name and "norm" not in name for name in changed)


def test_what_is_refused(start: Path, tmp_path: Path):
    model, data = str(start / "model"), start / "data.jsonl"
    with pytest.raises(InvalidInput, match="exists already"):
        tune(model, data, tmp_path, CONFIG)
    with pytest.raises(InvalidPlan, match="choose between 2/3"):
        tune(model, data, tmp_path / "out", TuneConfig(depths=(0.2,)))
    with pytest.raises(CheckpointError, match="no such directory"):
        tune(str(tmp_path / "nothing"), data, tmp_path / "out", CONFIG)
    for wrong in (
        {"horizon": 0},
        {"warmup_layers": -1},
        {"epochs": 0},
        {"depths": ()},
        {"batch_size": 5, "accumulate": 2},
        {"lora_rank": 0},
        {"steps": 0},
        {"learning_rate": float("nan")},
        {"policy": "calm"},
        {"policy": "unified", "horizon": 4},
        {"policy": "d3", "warmup_layers": 2},
        {"depths": (0.5,), "depth_sampling": "need"},
        {"depth_sampling": "greedy"},
        {"distill": 1.5},
        {"from_scratch": True, "distill": 0.5},
        {"from_scratch": True, "lora_rank": 2},
        {"num_layers": 0},
        {"num_layers": 2},
    ):
        with pytest.raises(InvalidInput, match=next(reversed(wrong))):
            TuneConfig(**wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "skipdecode"])
def test_every_policy_is_trained_and_recorded(start: Path, tmp_path: Path, policy: str):
    config = TuneConfig(policy=policy, depths=(1.0, 2 / 3), steps=3, batch_size=16, learning_rate=1e-2)
    report = tune(str(start / "model"), start / "data.jsonl", tmp_path / "out", config)
    assert report.steps == 3
    assert TunedDepth.load(tmp_path / "out") == TunedDepth(policy=policy, horizon=4, depths=(1.0, 2 / 3))


def test_from_scratch_leaves_the_weights_alone_and_may_take_fewer_layers(start: Path, tmp_path: Path):
    bare = shutil.copytree(start / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    config = TuneConfig(depths=(1.0,), steps=1, batch_size=16, from_scratch=True, num_layers=2)
    data = start / "data.jsonl"
    for model, seed, output in ((start / "model", 0, "a"), (bare, 0, "b"), (bare, 1, "c")):
        tune(str(model), data, tmp_path / output, replace(config, seed=seed))
    a, b, c = (weights(tmp_path / output) for output in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.decoder.embed_tokens.weight"], c["model.decoder.embed_tokens.weight"])
    assert json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 2
    assert not any(".layers.2." in name for name in a)
    with pytest.raises(InvalidInput, match="num_layers must be at most 3"):
        tune(str(bare), data, tmp_path / "d", replace(config, num_layers=4))


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_good_state(start: Path, tmp_path: Path):
    """A learning rate of 0 in the first step (warm-up), far too much in the second: its weights break the third."""
    model, data, output = str(start / "model"), start / "data.jsonl", tmp_path / "out"
    config = TuneConfig(depths=(1.0,), steps=9, batch_size=16, learning_rate=1e30, save_every=1)
    state = tmp_path / "out.tuning"
    with pytest.raises(
        TuningDiverged, match=r"step 2, depth 1: the loss is .*checkpoint-1 is from before it.* below 1e\+30"
    ):
        tune(model, data, output, config)
    assert not output.exists()
    assert newest_checkpoint(state) == str(state / "checkpoint-1")
    kept = weights(state / "checkpoint-1")
    assert all(value.isfinite().all() for value in kept.values())
    with pytest.raises(TuningDiverged, match="step 2"):
        tune(model, data, output, config, resume=True)
    assert newest_checkpoint(state) == str(state / "checkpoint-1")


def test_what_the_engine_would_refuse_is_not_tuned(start: Path, tmp_path: Path):
    """Pickles, and a tensor that the decoder has no place for; transformers would load both."""
    data = start / "data.jsonl"
    pickled = shutil.copytree(start / "model", tmp_path / "pickled")
    torch.save(weights(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(PickledCheckpoint, match="shoal convert"):
        tune(str(pickled), data, tmp_path / "out", CONFIG)
    adapted = shutil.copytree(start / "model", tmp_path / "adapted")
    save_file({**weights(adapted), "lora_A.weight": torch.zeros(2)}, adapted / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lora_A\.weight"):
        tune(str(adapted), data, tmp_path / "out", CONFIG)


def test_missing_extras_are_named(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for package, config in (("accelerate", CONFIG), ("peft", replace(CONFIG, lora_rank=2))):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtra, match=rf"{package}: pip install 'shoal\[train\]'"):
                tune(str(start / "model"), start / "data.jsonl", tmp_path / "out", config)


def test_command(start: Path, tmp_path: Path):
    app = typer.Typer()
    app.command()(tune_command)
    arguments = [str(start / "model"), str(start / "data.jsonl"), "-o", str(tmp_path / "out"), "--batch-size", "32"]
    result = CliRunner().invoke(app, [*arguments, "--depths", "1,2/3", "--horizon", "5", "--lr", "1e-3"])
    assert result.exit_code == 0, result.output
    assert "120 examples, 4 steps" in result.output
    assert TunedDepth.load(tmp_path / "out") == TunedDepth(horizon=5, warmup_layers=1, depths=(1.0, 2 / 3))
    small = [str(tmp_path / "small") if a == str(tmp_path / "out") else a for a in arguments]
    more = ["--depths", "1,1/2", "--policy", "early-termination", "--depth-sampling", "need", "--steps", "2"]
    result = CliRunner().invoke(app, [*small, *more, "--from-scratch", "--num-layers", "2"])
    assert result.exit_code == 1, "two layers with one warm-up layer cannot run at depth 1/2"
    result = CliRunner().invoke(app, [*small, *more, "--depths", "1,2/3", "--distill", "0.5"])
    assert result.exit_code == 0, result.output
    expected = TunedDepth(policy="early-termination", horizon=4, depths=(1.0, 2 / 3))
    assert TunedDepth.load(tmp_path / "small") == expected
    refused = CliRunner().invoke(app, [*arguments, "--depths", "1,half"])
    assert refused.exit_code == 2
    assert "'half' is not a share of the layers" in refused.output


def agreement(student: Path, teacher: Path, data: Path) -> float:
    """Mean KL(teacher || student) per completion token of the data, in nats."""
    tokenizer = make_tokenizer()
    batch = collate(read_examples(data, tokenizer, max_positions=32), pad_token_id=0)
    logits = []
    for directory in (student, teacher):
        network = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        with torch.no_grad():
            logits.append(network(**{name: batch[name] for name in READ}).logits)
    return float(divergence(*logits, batch["labels"]) / (batch["labels"] != IGNORED).sum())


def test_another_checkpoint_teaches(start: Path, tmp_path: Path) -> None:
    """A smaller model from random weights comes to agree with the teacher that it is to draft for, who knows the task."""
    teacher, data = tmp_path / "teacher", start / "data.jsonl"
    tune(str(start / "model"), data, teacher, replace(CONFIG, depths=(1.0,), epochs=8))
    config = TuneConfig(depths=(1.0,), epochs=8, batch_size=16, learning_rate=1e-2, from_scratch=True, num_layers=1)
    taught = replace(config, distill=1.0, teacher=str(teacher))
    tune(str(start / "model"), data, tmp_path / "alone", replace(config, steps=1))
    tune(str(start / "model"), data, tmp_path / "taught", taught)
    assert agreement(tmp_path / "taught", teacher, data) < 0.3 * agreement(tmp_path / "alone", teacher, data)


def test_teachers_that_cannot_teach(start: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="needs a share of the loss"):
        TuneConfig(teacher="anything")
    other = tmp_path / "other"
    shutil.copytree(start / "model", other)
    state = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(InvalidInput, match="its tokenizer is another one"):
        tune(
            str(start / "model"),
            start / "data.jsonl",
            tmp_path / "out",
            replace(CONFIG, distill=0.5, teacher=str(other)),
        )
    assert not (tmp_path / "out").exists()
