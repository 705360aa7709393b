"""Random weights of a checkpoint's config, for every family."""

from __future__ import annotations

import json

import pytest

from families import CONFIGS, save, tiny_model
from shoal.engine.engine import Engine
from shoal.engine.sampling import Sampling
from shoal.train.depth_context import decoder_layers
from shoal.train.start import from_scratch


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_fewer_layers_of_a_config_make_a_checkpoint_that_the_engine_runs(tmp_path, family):
    whole = save(tiny_model(family), tmp_path / "whole")
    network, tokenizer = from_scratch(str(whole), num_layers=2, seed=0)
    assert len(decoder_layers(network)) == 2
    network.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    names = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    assert names.get("num_hidden_layers", names.get("n_layer")) == 2
    engine = Engine.from_pretrained(tmp_path / "small", cache_gib=0.05)
    (done,) = engine.generate(["ab"], sampling=Sampling(max_new_tokens=3, ignore_eos=True))
    assert len(done.token_ids) == 3
    assert engine.shape.num_layers == 2
