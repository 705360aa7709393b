"""Depth-aware fine-tuning of transformers' models: train a checkpoint so that fewer layers are enough."""
