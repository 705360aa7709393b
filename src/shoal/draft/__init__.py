"""Lossless drafting: something cheap proposes, the request's own plan verifies. Tokens stay the same; only passes get fewer."""

from shoal.draft.choices import Auto, NGram, SelfDraft, SmallModel, Suffix, Trigram

__all__ = ["Auto", "NGram", "SelfDraft", "SmallModel", "Suffix", "Trigram"]
